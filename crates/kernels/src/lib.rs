//! Byte transforms that finish parameters for their kernels. Host code is the definition.
//!
//! | transform | shapes | in place |
//! |---|---|---|
//! | [`host::cast`] | floats to floats, I32 to I64; nearest even | no |
//! | [`host::permute`] | row orders SHUF32, W31PERM and IL64 | index functions |
//! | [`host::rows`] | `[rows, row_bytes]` → the same, rows permuted | yes, one band of workspace |
//! | [`host::swizzle`] | `[rows, cols]` bytes, padded, rows permuted → 128×4 blocks | out of place; in place where nothing is padded, one band of workspace |
//! | [`host::shuffle`] | E8M0 scales and 16×16 weight tiles for AITER | yes, one band of workspace |
//! | [`host::blocks`] | `[rows, row_bytes]` → `[row_bytes/128, rows, 128]`, rows permuted | yes, one matrix of workspace |
//! | [`host::mla`] | `[h·(dn+dv), kl]` → `[h, kl, dn]`, `[h, dv, kl]` | no |
//! | [`host::nvfp4`] | per-tensor scales → `alpha`, inverses | values |

pub mod host;
