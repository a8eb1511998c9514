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
    let hashes = each_param(ranks, |param| xxh3_128(param.bytes));
    let mut all = Sha256::new();
    for (rank, hashes) in ranks.iter().zip(hashes) {
        add_rank(&mut all, rank.rank, rank, hashes.into_iter());
    }
    hex(&all.finalize())
}

/// One rank's share of [`group_digest`]: the hash of each parameter, in the order of [`ReadyParams::iter`].
pub(crate) fn param_hashes(rank: &ReadyParams) -> Vec<u128> {
    let mut hashes = each_param(std::slice::from_ref(rank), |param| xxh3_128(param.bytes));
    hashes.pop().unwrap_or_default()
}

/// [`group_digest`], of every rank's share in their order; names and shapes are those of `any`, the same on every rank.
pub(crate) fn combine(any: &ReadyParams, shares: impl Iterator<Item = Vec<u128>>) -> String {
    let mut all = Sha256::new();
    for (rank, hashes) in shares.enumerate() {
        add_rank(&mut all, rank as u32, any, hashes.into_iter());
    }
    hex(&all.finalize())
}

fn add_rank(all: &mut Sha256, rank: u32, params: &ReadyParams, hashes: impl Iterator<Item = u128>) {
    for (param, hash) in params.iter().zip(hashes) {
        let ParamView { name, dtype, shape, .. } = param;
        all.update(format!("{rank} {name} {dtype} {shape:?} {hash:032x}\n"));
    }
}

/// SHA-256 of every parameter of a rank, in the order of [`ReadyParams::iter`].
pub(crate) fn param_sha256(rank: &ReadyParams) -> Vec<[u8; 32]> {
    let hash = |param: ParamView<'_>| Sha256::digest(param.bytes).into();
    each_param(std::slice::from_ref(rank), hash).pop().unwrap_or_default()
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

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
