//! Digests of finished parameters.
//!
//! Every load can be compared with any other by one digest over all ranks; XXH3-128 per parameter, because it runs at
//! memory speed. The manifest of `--out` has SHA-256 as well.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use longshore_rank::params::{ParamView, ReadyParams};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;

/// The digest over all parameters of all ranks: lower-case hex, the same however the bytes travelled.
pub fn group_digest(ranks: &[ReadyParams]) -> String {
    let mut all = Sha256::new();
    let hashes = each_param(ranks, |param| xxh3_128(param.bytes));
    for (rank, hashes) in ranks.iter().zip(hashes) {
        for (param, hash) in rank.iter().zip(hashes) {
            let ParamView { name, dtype, shape, .. } = param;
            all.update(format!("{} {name} {dtype} {shape:?} {hash:032x}\n", rank.rank));
        }
    }
    hex(&all.finalize())
}

/// SHA-256 of every parameter of every rank, lower-case hex, in the order of [`ReadyParams::iter`].
pub fn param_sha256(ranks: &[ReadyParams]) -> Vec<Vec<String>> {
    each_param(ranks, |param| hex(&Sha256::digest(param.bytes)))
}

/// Calls `hash` for every parameter of every rank, on all cores.
fn each_param<T: Send>(
    ranks: &[ReadyParams],
    hash: impl Fn(ParamView<'_>) -> T + Sync,
) -> Vec<Vec<T>> {
    let work: Vec<(usize, ParamView<'_>)> =
        ranks.iter().enumerate().flat_map(|(r, rank)| rank.iter().map(move |p| (r, p))).collect();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(work.len()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some((_, param)) = work.get(i) else {
                        return;
                    };
                    let result = hash(*param);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((i, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(i, _)| *i);
    let mut of_rank: Vec<Vec<T>> = ranks.iter().map(|_| Vec::new()).collect();
    for (i, result) in results {
        of_rank[work[i].0].push(result);
    }
    of_rank
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
