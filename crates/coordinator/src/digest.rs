//! Digests of finished parameters.
//!
//! Every load can be compared with any other by one digest over all ranks; XXH3-128 per parameter, because it runs at
//! memory speed. The manifest of `--out` has SHA-256 as well.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use longshore_rank::{
    error::RankError,
    params::{
        ParamView, ReadyParams,
        data::{Data, Window},
    },
};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::error::LoadError;

/// The digest over all parameters of all ranks: lower-case hex, the same however the bytes travelled.
///
/// # Errors
/// A device that holds parameters fails.
pub fn group_digest(ranks: &[ReadyParams]) -> Result<String, LoadError> {
    let hashes = each_param(ranks, xxh3)?;
    let mut all = Sha256::new();
    for (rank, hashes) in ranks.iter().zip(hashes) {
        add_rank(&mut all, rank.rank, rank, hashes.into_iter());
    }
    Ok(hex(&all.finalize()))
}

/// One rank's share of [`group_digest`]: the hash of each parameter, in the order of [`ReadyParams::iter`].
pub(crate) fn param_hashes(rank: &ReadyParams) -> Result<Vec<u128>, LoadError> {
    let mut hashes = each_param(std::slice::from_ref(rank), xxh3)?;
    Ok(hashes.pop().unwrap_or_default())
}

fn xxh3(window: &mut Window, data: Data<'_>) -> Result<u128, RankError> {
    let mut hash = Xxh3::new();
    window.read(data, |bytes| hash.update(bytes))?;
    Ok(hash.digest128())
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
pub(crate) fn param_sha256(rank: &ReadyParams) -> Result<Vec<[u8; 32]>, LoadError> {
    let sha256 = |window: &mut Window, data: Data<'_>| {
        let mut hash = Sha256::new();
        window.read(data, |bytes| hash.update(bytes))?;
        Ok(hash.finalize().into())
    };
    Ok(each_param(std::slice::from_ref(rank), sha256)?.pop().unwrap_or_default())
}

/// Calls `hash` for every parameter of every rank, on all cores.
fn each_param<T: Send>(
    ranks: &[ReadyParams],
    hash: impl Fn(&mut Window, Data<'_>) -> Result<T, RankError> + Sync,
) -> Result<Vec<Vec<T>>, LoadError> {
    let work: Vec<(usize, ParamView<'_>)> =
        ranks.iter().enumerate().flat_map(|(r, rank)| rank.iter().map(move |p| (r, p))).collect();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(work.len()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let mut window = Window::default();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some((_, param)) = work.get(i) else {
                        return;
                    };
                    let result = hash(&mut window, param.data);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((i, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(i, _)| *i);
    let mut of_rank: Vec<Vec<T>> = ranks.iter().map(|_| Vec::new()).collect();
    for (i, result) in results {
        let rank = work[i].0;
        let failed = |source| LoadError::ReadBack { rank: ranks[rank].rank, source };
        of_rank[rank].push(result.map_err(failed)?);
    }
    Ok(of_rank)
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
