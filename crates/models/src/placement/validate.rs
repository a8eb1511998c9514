//! Proves a placement before it is trusted.
//!
//! * Every byte of every parameter that pieces fill is reserved by exactly one piece, on the ranks of every expert group.
//! * No piece leaves its tensor, and the pieces of a tensor need all of its bytes.

use crate::{
    checkpoint::{Checkpoint, TensorId},
    declare::Split,
    error::PlanError,
    placement::{PlacedPiece, Placement},
};

pub(super) fn check(placement: &Placement, checkpoint: &Checkpoint) -> Result<(), PlanError> {
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        check_tensor(&tensor.name, placement.pieces_of(id as TensorId), tensor.file_range.len())?;
    }
    check_params(placement)
}

/// The pieces of a tensor lie within it, and together with all their parts they need every byte of it.
fn check_tensor(name: &str, pieces: &[PlacedPiece], bytes: u64) -> Result<(), PlanError> {
    let mut at = 0;
    for piece in pieces {
        let wrong =
            |found: String| Err(PlanError::Inconsistent { what: format!("tensor {name}"), found });
        if piece.rows.0 * piece.row_bytes != at {
            return wrong(format!("piece begins at row {}, byte {at} was next", piece.rows.0));
        }
        at = piece.rows.1 * piece.row_bytes;
        let covered = match piece.split {
            Split::Rows { per } => {
                per * u64::from(piece.members.parts()) >= piece.rows.1 - piece.rows.0
            }
            Split::Cols { per } => per * u64::from(piece.members.parts()) >= piece.row_bytes,
        };
        if !covered {
            return wrong(format!(
                "{} parts of {:?} leave bytes out",
                piece.members.parts(),
                piece.split
            ));
        }
        if piece.target_stride == 0 && at > 0 {
            return wrong("rows of no width".into());
        }
    }
    if !pieces.is_empty() && at != bytes {
        let found = format!("pieces cover {at} of {bytes} bytes");
        return Err(PlanError::Inconsistent { what: format!("tensor {name}"), found });
    }
    Ok(())
}

/// The reserved ranges tile each parameter, whichever expert group looks.
fn check_params(placement: &Placement) -> Result<(), PlanError> {
    let mut of_param: Vec<Vec<u32>> = vec![Vec::new(); placement.params.len()];
    for (i, piece) in placement.pieces.iter().enumerate() {
        of_param[piece.param as usize].push(i as u32);
    }
    let moe_tp = placement.parallel.moe_tp();
    for (param, indices) in placement.params.iter().zip(&mut of_param) {
        indices.sort_by_key(|&i| placement.pieces[i as usize].target_offset);
        let pieces = || indices.iter().map(|&i| &placement.pieces[i as usize]);
        let everywhere =
            pieces().all(|p| p.members.ranks().len() as u32 == placement.parallel.tp());
        let groups = if everywhere { 1 } else { placement.parallel.ep() };
        for group in 0..groups {
            let mine = pieces().filter(|p| p.members.part(group * moe_tp).is_some());
            let mut at = 0;
            for piece in mine {
                if piece.target_offset != at {
                    return Err(PlanError::Inconsistent {
                        what: format!("parameter {}", param.name),
                        found: format!(
                            "byte {at} was next, a piece begins at {}",
                            piece.target_offset
                        ),
                    });
                }
                at += piece.reserved_bytes();
            }
            if at != param.filled_bytes {
                let found = format!("pieces fill {at} of {} bytes", param.filled_bytes);
                let what = format!("parameter {}", param.name);
                return Err(PlanError::Inconsistent { what, found });
            }
        }
    }
    Ok(())
}
