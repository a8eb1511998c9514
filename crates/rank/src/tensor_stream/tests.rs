use std::{fs, path::Path, sync::atomic::Ordering};

use longshore_models::{
    Dtype, byte_range::ByteRange, checkpoint::CheckpointFile, header::HeaderEntry,
};

use super::*;
use crate::storage::IoChoice;

/// One file of `count` tensors of `bytes` bytes each; tensor `n` is filled with the number `n`.
fn checkpoint(dir: &Path, count: u64, bytes: u64) -> Arc<Checkpoint> {
    let data: Vec<u8> = (0..count).flat_map(|n| vec![n as u8; bytes as usize]).collect();
    fs::write(dir.join("f"), data).unwrap();
    let entries = (0..count).map(|n| HeaderEntry {
        name: n.to_string(),
        dtype: Dtype::U8,
        shape: vec![bytes],
        data_offsets: ByteRange::new(n * bytes, (n + 1) * bytes),
    });
    let file = CheckpointFile { name: "f".into(), bytes: count * bytes, header_bytes: 0 };
    Arc::new(Checkpoint::new(vec![(file, entries.collect())], None).unwrap())
}

fn sources(dir: &Path) -> Vec<CheckpointSource> {
    vec![CheckpointSource::open(dir, "f", IoChoice::Buffered).unwrap()]
}

fn options(memory_limit: u64) -> StreamOptions {
    StreamOptions { memory_limit, concurrency: 2, patience: Duration::ZERO }
}

#[test]
fn tensors_may_go_to_other_threads() {
    fn goes<T: Send + Sync + 'static>() {}
    goes::<Tensor>();
    goes::<TensorStream>();
}

/// A reader that panics (here, because the file that it is to read is not there) is an error, not a hang.
#[test]
fn a_panic_of_a_reader_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path(), 2, 100);
    let mut stream =
        TensorStream::open(checkpoint, Vec::new(), |_| true, &options(1 << 20)).unwrap();
    assert!(matches!(stream.next().unwrap_err(), RankError::Panicked(_)));
    let again = stream.next().unwrap_err();
    assert!(matches!(&again, RankError::StreamOver { why } if why.contains("panicked")), "{again}");
}

/// Of a batch of which one tensor is held, the pages of the others come back when memory is short.
#[test]
fn a_held_tensor_costs_its_own_pages_only() {
    let dir = tempfile::tempdir().unwrap();
    // four to a batch
    let checkpoint = checkpoint(dir.path(), 64, 4096);
    let limit = 64 << 10;
    let mut stream =
        TensorStream::open(checkpoint, sources(dir.path()), |_| true, &options(limit)).unwrap();
    let progress = stream.progress();
    let mut held = Vec::new();
    while let Some(tensor) = stream.next().unwrap() {
        let number: u64 = tensor.name().parse().unwrap();
        assert!(tensor.bytes().iter().all(|&b| u64::from(b) == number));
        if number % 8 == 0 {
            held.push(tensor);
        }
    }
    assert_eq!(held.len(), 8);
    for tensor in &held {
        let number: u8 = tensor.name().parse().unwrap();
        assert_eq!(tensor.bytes(), [number; 4096], "trimmed around it");
    }
    assert!(progress.peak_staging_bytes.load(Ordering::Relaxed) <= limit);
    drop((held, stream));
    assert_eq!(progress.staging_bytes.load(Ordering::Relaxed), 0);
}

/// Tensors without elements come like all others, without a read.
#[test]
fn tensors_without_bytes_are_handed_out() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path(), 3, 0);
    let mut stream =
        TensorStream::open(checkpoint, sources(dir.path()), |_| true, &options(0)).unwrap();
    for _ in 0..3 {
        assert!(stream.next().unwrap().unwrap().bytes().is_empty());
    }
    assert!(stream.next().unwrap().is_none());
    assert_eq!(stream.progress().reads.load(Ordering::Relaxed), 0);
}

/// Debug builds overwrite what is given back.
#[test]
fn returned_memory_is_poisoned() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(dir.path(), 2, 64);
    let mut stream =
        TensorStream::open(checkpoint, sources(dir.path()), |_| true, &options(1 << 20)).unwrap();
    let (a, b) = (stream.next().unwrap().unwrap(), stream.next().unwrap().unwrap());
    let address = a.bytes().as_ptr();
    drop(a);
    // SAFETY: `b` lies in the same slab and keeps its memory alive; nobody writes to it now.
    let after = unsafe { std::slice::from_raw_parts(address, 64) };
    let expected = if cfg!(debug_assertions) { crate::staging::POISON } else { 0 };
    assert!(after.iter().all(|&byte| byte == expected));
    assert!(b.bytes().iter().all(|&byte| byte == 1));
}
