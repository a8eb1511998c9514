//! Damage to the tensors of a checkpoint, before they are laid out in files.

use std::io;

use super::family::named_enum;
use super::numbers::random_bytes;
use super::tensor::Tensor;
use super::{Family, Scheme, refuse};

named_enum! {
    /// One way in which a checkpoint can be broken.
    Break {
        /// A norm of layer 1 is absent.
        MissingTensor = "missing_tensor",
        /// A tensor that no model has.
        ExtraTensor = "extra_tensor",
        /// A vision tensor that no model has; Kimi-K2.5 only.
        UnknownVisionTensor = "unknown_vision_tensor",
        /// `o_proj` of layer 1 lacks its last row.
        WrongShape = "wrong_shape",
        /// A norm of layer 1 is stored as I32.
        WrongDtype = "wrong_dtype",
        /// The last file lacks its last 1000 bytes.
        TruncatedFile = "truncated_file",
        /// The last file's header claims to be longer than the file.
        HeaderTooLong = "header_too_long",
        /// The last file's header is not UTF-8, let alone JSON.
        HeaderNotJson = "header_not_json",
        /// The last tensor of the last file begins inside its neighbour.
        OverlappingOffsets = "overlapping_offsets",
        /// 64 bytes of the last file belong to no tensor.
        HoleInOffsets = "hole_in_offsets",
        /// A shape whose product overflows.
        OffsetOverflow = "offset_overflow",
        /// A tensor lies in two files with different bytes.
        DupTensorTwoFiles = "dup_tensor_two_files",
        /// The index names a file that is not there.
        IndexPointsToMissingFile = "index_points_to_missing_file",
        /// The index names a file outside the directory, which exists.
        IndexPathTraversal = "index_path_traversal",
        /// An expert's scale is absent.
        MissingScale = "missing_scale",
        /// kv_a of layer 1 is absent.
        QAWithoutKvA = "q_a_without_kv_a",
        /// up of one expert is absent.
        GateWithoutUp = "gate_without_up",
        /// `architectures` is an empty list.
        EmptyArchitectures = "empty_architectures",
        /// `config.json` ends in the middle.
        ConfigNotJson = "config_not_json",
        /// The last file's header claims 2^63 bytes.
        HugeHeaderLength = "huge_header_length",
        /// NaN and infinity among the weights, which is no damage: the load succeeds.
        NonfiniteOk = "nonfinite_ok",
    }
}

/// Breaks the tensors, where that is the kind of damage; says what a good message names (any one
/// of these).
///
/// # Errors
/// A kind that the family or scheme cannot have.
pub(super) fn tensors(
    groups: &mut [Vec<Tensor>],
    kind: Break,
    family: Family,
    scheme: Scheme,
    seed: u64,
) -> io::Result<Vec<String>> {
    let names = match kind {
        Break::MissingTensor => {
            vec![take(groups, "layers.1.post_attention_layernorm.weight")?.name]
        }
        Break::ExtraTensor => {
            let lead = if family == Family::KimiK25 { "language_model." } else { "" };
            add_mystery(groups, format!("{lead}model.layers.0.self_attn.mystery_proj.weight"))
        }
        Break::UnknownVisionTensor if family == Family::KimiK25 => {
            add_mystery(groups, "vision_tower.encoder.blocks.0.mystery.weight".into())
        }
        Break::UnknownVisionTensor => {
            return Err(refuse("unknown_vision_tensor needs the family kimi_k25".into()));
        }
        Break::WrongShape => {
            let tensor = find(groups, "layers.1.self_attn.o_proj.weight")?;
            let row = tensor.data.len() / tensor.shape[0];
            tensor.shape[0] -= 1;
            tensor.data.truncate(tensor.shape[0] * row);
            vec![tensor.name.clone()]
        }
        Break::WrongDtype => {
            let tensor = find(groups, "layers.1.input_layernorm.weight")?;
            tensor.dtype = "I32".into();
            tensor.data = random_bytes(seed, "wrong", 4 * tensor.shape[0]);
            vec![tensor.name.clone()]
        }
        Break::MissingScale => missing_scale(groups, scheme)?,
        Break::QAWithoutKvA => {
            let name = take(groups, "layers.1.self_attn.kv_a_proj_with_mqa.weight")?.name;
            let lead = before(&name, "kv_a_proj_with_mqa");
            ["kv_a_proj_with_mqa", "q_a_proj", "fused_qkv_a_proj_with_mqa"]
                .map(|part| format!("{lead}{part}"))
                .into()
        }
        Break::GateWithoutUp => {
            let suffix = if scheme == Scheme::Int4 { "weight_packed" } else { "weight" };
            let name = take(groups, &format!("mlp.experts.3.up_proj.{suffix}"))?.name;
            let lead = before(&name, "experts.3");
            ["experts.3.up_proj", "experts.3.gate_proj", "experts.w13"]
                .map(|part| format!("{lead}{part}"))
                .into()
        }
        Break::NonfiniteOk => {
            nonfinite(find(groups, "layers.1.input_layernorm.weight")?);
            nonfinite(find(groups, "layers.1.self_attn.o_proj.weight")?);
            vec![]
        }
        _ => vec![],
    };
    Ok(names)
}

fn missing_scale(groups: &mut [Vec<Tensor>], scheme: Scheme) -> io::Result<Vec<String>> {
    let scale = match scheme {
        Scheme::Bf16 => return Err(refuse("missing_scale needs a quantised scheme".into())),
        Scheme::Fp8 => "weight_scale_inv",
        Scheme::Nvfp4 => "weight_scale_2",
        Scheme::Mxfp4 | Scheme::Int4 => "weight_scale",
    };
    let name = take(groups, &format!("layers.1.mlp.experts.2.down_proj.{scale}"))?.name;
    let module = before(&name, &format!(".{scale}")).to_owned();
    Ok(vec![name, module])
}

fn nonfinite(tensor: &mut Tensor) {
    if tensor.dtype == "BF16" {
        tensor.data[..6].copy_from_slice(&[0xC0, 0x7F, 0x80, 0x7F, 0x80, 0xFF]); // NaN, inf, -inf
    } else {
        tensor.data[..2].copy_from_slice(&[0x7F, 0xFF]); // the two NaN codes of F8_E4M3
    }
}

fn add_mystery(groups: &mut [Vec<Tensor>], name: String) -> Vec<String> {
    groups[0].push(Tensor::new(&name, "BF16", &[4, 4], vec![0; 32]));
    vec![name]
}

/// Where the tensor with this ending lies, the first by name: file and place in it.
pub(super) fn locate(groups: &[Vec<Tensor>], suffix: &str) -> io::Result<(usize, usize)> {
    let mut hits = Vec::new();
    for (f, group) in groups.iter().enumerate() {
        for (i, tensor) in group.iter().enumerate() {
            if tensor.name.ends_with(suffix) {
                hits.push((&tensor.name, f, i));
            }
        }
    }
    let first = hits.into_iter().min().ok_or_else(|| {
        refuse(format!(
            "this kind of damage needs a tensor named …{suffix}; choose another family or scheme"
        ))
    })?;
    Ok((first.1, first.2))
}

fn find<'a>(groups: &'a mut [Vec<Tensor>], suffix: &str) -> io::Result<&'a mut Tensor> {
    let (f, i) = locate(groups, suffix)?;
    Ok(&mut groups[f][i])
}

fn take(groups: &mut [Vec<Tensor>], suffix: &str) -> io::Result<Tensor> {
    let (f, i) = locate(groups, suffix)?;
    Ok(groups[f].remove(i))
}

fn before<'a>(name: &'a str, part: &str) -> &'a str {
    name.split_once(part).map_or(name, |(lead, _)| lead)
}
