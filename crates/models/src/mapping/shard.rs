//! The names of a fused parameter's parts, as the runtimes' weight loaders call them.

use std::fmt;

use serde::{Serialize, Serializer};

/// Which part of a runtime parameter a tensor is.
///
/// Prints as the field writes it (`q`, `0`, `w1`, `none`); in JSON the numbers are numbers and `none` is `null`, so
/// that a Python trainer gets what its `weight_loader` takes. Source: reference §2.1, §2.8, §2.9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Shard {
    /// The tensor is the whole parameter (of an expert, where there are experts).
    Whole,
    /// The queries of `qkv_proj`.
    Q,
    /// The keys of `qkv_proj`.
    K,
    /// The values of `qkv_proj`.
    V,
    /// By number: gate 0 and up 1 of `gate_up_proj`, q_a 0 and kv_a 1 of `fused_qkv_a_proj_with_mqa`.
    Index(u32),
    /// An expert's gate, in `w13`.
    W1,
    /// An expert's down, which is all of `w2`.
    W2,
    /// An expert's up, in `w13`.
    W3,
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Shard::Whole => "none",
            Shard::Q => "q",
            Shard::K => "k",
            Shard::V => "v",
            Shard::Index(number) => return number.fmt(f),
            Shard::W1 => "w1",
            Shard::W2 => "w2",
            Shard::W3 => "w3",
        })
    }
}

impl Serialize for Shard {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Shard::Whole => serializer.serialize_none(),
            Shard::Index(number) => serializer.serialize_u32(*number),
            named => serializer.collect_str(named),
        }
    }
}
