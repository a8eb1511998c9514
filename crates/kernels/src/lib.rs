//! Byte transforms that finish parameters for their kernels. Host code is the definition.
//!
//! | transform | shapes | in place |
//! |---|---|---|
//! | [`host::copy`] | strided rows of bytes | no |
//! | [`host::cast`] | floats to floats, I32 to I64; nearest even | no |
//! | [`host::permute`] | row orders SHUF32 and W31PERM | index functions |
//! | [`host::blocks`] | `[rows, row_bytes]` → `[row_bytes/128, rows, 128]`, rows permuted | yes, one matrix of workspace |
//! | [`host::mla`] | `[h·(dn+dv), kl]` → `[h, kl, dn]`, `[h, dv, kl]` | no |

pub mod host;
