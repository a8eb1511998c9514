//! A plan's hash: rank processes plan on their own, and agree on this before the first byte.
//!
//! It covers everything that decides who reads what and where it lands: the files and their lengths, tensors, parameters,
//! pieces, finishes, reads, and the version of this program. Where the checkpoint lies does not matter, and neither does when
//! its files were written: each host may have its own copy.

use std::fmt::{self, Write};

use longshore_models::declare::Split;
use longshore_rank::protocol::{LoadPlan, PlanName, ReadFrom};
use xxhash_rust::xxh3::Xxh3;

/// The hash of `plan`.
pub(crate) fn plan_hash(plan: &LoadPlan) -> PlanName {
    let mut hash = Hash(Xxh3::new());
    hash.text(env!("CARGO_PKG_VERSION"));
    for file in &plan.checkpoint.files {
        hash.text(&file.name);
        hash.numbers(&[file.bytes, file.header_bytes]);
    }
    for tensor in &plan.checkpoint.tensors {
        hash.text(&tensor.name);
        hash.shown(&tensor.dtype);
        hash.numbers(&tensor.shape);
        hash.numbers(&[tensor.file.into(), tensor.file_range.start, tensor.file_range.end]);
    }
    let placement = &plan.placement;
    for param in &placement.params {
        hash.text(&param.name);
        hash.shown(&param.dtype);
        hash.numbers(&param.shape);
        hash.numbers(&[param.bytes, param.derived.into()]);
    }
    for piece in placement.pieces() {
        let (cols, per) = match piece.split {
            Split::Rows { per } => (0, per),
            Split::Cols { per } => (1, per),
        };
        hash.numbers(&[piece.param.into(), piece.row_bytes, piece.rows.0, piece.rows.1, cols, per]);
        hash.numbers(&[piece.target_offset, piece.target_stride]);
        hash.shown(&piece.members);
    }
    hash.shown(&(&placement.parallel, &placement.layout, &placement.finishes, &placement.aliases));
    for reads in &plan.reads {
        hash.numbers(&[reads.len() as u64]);
        for read in reads {
            let round = read.round.map_or(0, |round| u64::from(round) + 1);
            hash.numbers(&[read.file.into(), read.range.start, read.range.end, round]);
            let from = match read.from {
                ReadFrom::Storage => 0,
                ReadFrom::Parameters => 1,
                ReadFrom::Former => 2,
            };
            hash.numbers(&[from, read.settled.into()]);
        }
    }
    hash.shown(&plan.settled);
    hash.numbers(&[plan.exchange.into(), plan.read_bytes_max]);
    hash.0.digest128().to_le_bytes()
}

struct Hash(Xxh3);

impl Hash {
    fn numbers(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.0.update(&number.to_le_bytes());
        }
    }

    /// With its length, so that ("ab", "c") is not ("a", "bc").
    fn text(&mut self, text: &str) {
        self.numbers(&[text.len() as u64]);
        self.0.update(text.as_bytes());
    }

    fn shown(&mut self, value: &impl fmt::Debug) {
        // a hash takes whatever is written
        let _ = write!(self, "{value:?};");
    }
}

impl Write for Hash {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::{
        discover::discover,
        plan::{Exchange, Plan, PlanOptions},
        synth::Synth,
    };

    fn hash(dir: &Path, change: impl FnOnce(&mut PlanOptions)) -> [u8; 16] {
        let mut options = PlanOptions { tp: 4, ..PlanOptions::default() };
        change(&mut options);
        Plan::new(discover(dir).unwrap(), &options).unwrap().hash()
    }

    /// Two ranks that would do different things never agree; two hosts with a copy each do.
    #[test]
    fn whatever_changes_what_a_rank_does_changes_the_hash() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = |name: &str| scratch.path().join(name);
        let synth = |name: &str, family: &str, scheme: &str| {
            Synth::new(family, scheme).write(&dir(name)).unwrap();
            dir(name)
        };
        let here = synth("here", "deepseek_v3", "bf16");
        let copy = synth("there", "deepseek_v3", "bf16");
        let other = synth("other", "deepseek_v32", "bf16");
        let plain = hash(&here, |_| {});
        assert_eq!(hash(&copy, |_| {}), plain);
        let others = [
            hash(&other, |_| {}),
            hash(&here, |o| o.tp = 2),
            hash(&here, |o| o.ep = 2),
            hash(&here, |o| o.exchange = Exchange::Off),
            hash(&here, |o| o.read_bytes = Some(64 << 10)),
            hash(&here, |o| o.model.fuse_shared_experts = true),
            hash(&here, |o| o.model.draft = true),
            hash(&here, |o| o.model.kernel_layout = Some("none".parse().unwrap())),
            hash(&here, |o| o.model.kernel_layout = Some("trtllm".parse().unwrap())),
        ];
        for (i, hash) in others.iter().enumerate() {
            assert_ne!(*hash, plain, "{i}");
            assert!(!others[..i].contains(hash), "{i}");
        }
    }
}
