//! Byte transforms that finish parameters for their kernels. Host code is the definition.
//!
//! | transform | shapes, in bytes unless named otherwise | in place | workspace |
//! |---|---|---|---|
//! | [`host::cast`] | elements: floats to floats, I32 to I64; nearest even | no | – |
//! | [`host::permute`] | row orders SHUF32, W31PERM and IL64 | index functions | – |
//! | [`host::rows`] | `[rows, row_bytes]` → the same, rows permuted | yes | a row and a bit per row, or 8 KiB |
//! | [`host::swizzle`] | `[rows, cols]`, padded, rows permuted → 128×4 blocks | no | – |
//! | | the same without padding | yes | 128 rows |
//! | [`host::shuffle`] | E8M0 scales `[rows, cols]`, weights `[rows, row_bytes]`: AITER's tiles | yes | 32 or 16 rows |
//! | [`host::blocks`] | `[rows, row_bytes]`, rows permuted → `[row_bytes/128, rows, 128]` | yes | 32 rows |
//! | [`host::mla`] | BF16, FP8 or MXFP4 `[h·(dn+dv), kl]` → BF16 `[h, kl, dn]`, `[h, dv, kl]` | no | 32 rows of its own |
//! | [`host::nvfp4`] | per-tensor scales → `alpha`, inverses | values | – |
//! | [`host::kv`] | `k_scale`, `v_scale` → the pair in use | values | – |
//!
//! Each works on one thread and keeps no state; a workspace belongs to the caller, who uses it again for the next matrix.
//! How fast they are beside a plain copy: `scripts/bench_kernels.sh`. [`cuda`] describes their twins for GPUs.

pub mod cuda;
pub mod host;
