//! Which tensors are read together. Pure.
//!
//! ```text
//! file    | q | k | v | skipped, 3 KiB | o |  skipped, 2 MiB  |        embedding, 30 MiB        | norm |
//! batches | one: q k v o, read in one go  |                  | one, read in four parts         | one  |
//! ```

use longshore_models::{
    byte_range::ByteRange,
    checkpoint::{Checkpoint, Tensor, TensorId},
};

use crate::{error::RankError, staging::DIRECT_ALIGNMENT};

/// The longest read, its alignment included.
const READ_BYTES_MAX: u64 = 8 << 20;

/// Gaps between wanted tensors up to this length are read through. A read costs about as much as 64 KiB of bandwidth.
const GAP_BYTES_MAX: u64 = 64 << 10;

/// Reads that the memory limit is to have room for, where the tensors allow it.
const READS_IN_LIMIT: u64 = 4;

/// What batches are made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Staging memory that may exist at a time.
    pub(super) memory_bytes: u64,
    /// The longest read; a multiple of [`DIRECT_ALIGNMENT`].
    pub(super) read_bytes: u64,
}

impl Limits {
    pub(super) fn new(memory_bytes: u64) -> Self {
        let share = (memory_bytes / READS_IN_LIMIT).min(READ_BYTES_MAX);
        let read_bytes = (share - share % DIRECT_ALIGNMENT).max(DIRECT_ALIGNMENT);
        Self { memory_bytes, read_bytes }
    }
}

/// Tensors that lie together in a file and share a piece of staging memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) file: u32,
    /// From the first byte of the first tensor to the last byte of the last.
    pub(super) range: ByteRange,
    /// In the order of the file; never empty.
    pub(super) tensors: Vec<TensorId>,
    /// Bytes of the range that no wanted tensor has.
    pub(super) gap_bytes: u64,
}

impl Batch {
    /// The staging memory that it takes: the pages of the file that it touches.
    pub(super) fn memory_bytes(&self) -> u64 {
        pages(self.range).len()
    }

    /// Offset in the file of the first byte of its staging memory: a byte keeps its place within the page, and a tensor
    /// the alignment that it has in the file.
    pub(super) fn base(&self) -> u64 {
        pages(self.range).start
    }

    /// The reads that it is carried out in; no two touch the same page.
    pub(super) fn parts(&self, read_bytes: u64) -> impl Iterator<Item = ByteRange> {
        let (base, range) = (self.base(), self.range);
        let starts = (base..range.end).step_by(read_bytes as usize);
        starts.filter_map(move |at| ByteRange::new(at, at + read_bytes).intersect(&range))
    }

    /// The range with `tensor` in it, where the two are near enough to be read in one go.
    fn joined(&self, tensor: &Tensor, limits: &Limits) -> Option<ByteRange> {
        if self.file != tensor.file {
            return None;
        }
        let range = ByteRange::new(self.range.start, tensor.file_range.end);
        let near = tensor.file_range.start - self.range.end <= GAP_BYTES_MAX
            && pages(range).len() <= limits.read_bytes;
        near.then_some(range)
    }
}

/// The whole pages that hold `range`; none for an empty one.
pub(super) fn pages(range: ByteRange) -> ByteRange {
    let start = range.start - range.start % DIRECT_ALIGNMENT;
    match range.is_empty() {
        true => ByteRange::new(start, start),
        false => ByteRange::new(start, range.end.next_multiple_of(DIRECT_ALIGNMENT)),
    }
}

/// The least memory limit under which a stream can hand out every wanted tensor of `checkpoint`, in bytes.
pub fn memory_bytes_min(checkpoint: &Checkpoint, wanted: impl Fn(&str) -> bool) -> u64 {
    let wanted = checkpoint.tensors.iter().filter(|tensor| wanted(&tensor.name));
    wanted.map(|tensor| pages(tensor.file_range).len()).max().unwrap_or(0)
}

/// The wanted tensors of `checkpoint` in batches, in the order of the files.
///
/// # Errors
/// A tensor that does not fit into the memory limit by itself.
pub(super) fn batches(
    checkpoint: &Checkpoint,
    mut wanted: impl FnMut(&str) -> bool,
    limits: &Limits,
) -> Result<Vec<Batch>, RankError> {
    let mut batches: Vec<Batch> = Vec::new();
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        if !wanted(&tensor.name) {
            continue;
        }
        let needed = pages(tensor.file_range).len();
        if needed > limits.memory_bytes {
            return Err(RankError::TensorOverLimit {
                tensor: tensor.name.clone(),
                bytes: tensor.file_range.len(),
                needed,
                limit: limits.memory_bytes,
            });
        }
        let id = id as TensorId;
        let joined = batches.last_mut().and_then(|b| Some((b.joined(tensor, limits)?, b)));
        match joined {
            Some((range, batch)) => {
                batch.gap_bytes += tensor.file_range.start - batch.range.end;
                batch.range = range;
                batch.tensors.push(id);
            }
            None => batches.push(Batch {
                file: tensor.file,
                range: tensor.file_range,
                tensors: vec![id],
                gap_bytes: 0,
            }),
        }
    }
    Ok(batches)
}

#[cfg(test)]
mod tests {
    use longshore_models::{Dtype, checkpoint::CheckpointFile, header::HeaderEntry};

    use super::*;

    /// A checkpoint of U8 tensors of these sizes, one list per file; tensors are called `file.number`.
    fn checkpoint(files: &[&[u64]]) -> Checkpoint {
        let headers = files.iter().enumerate().map(|(f, sizes)| {
            let mut at = 0;
            let entries = sizes.iter().enumerate().map(|(t, &bytes)| {
                at += bytes;
                HeaderEntry {
                    name: format!("{f}.{t}"),
                    dtype: Dtype::U8,
                    shape: vec![bytes],
                    data_offsets: ByteRange::new(at - bytes, at),
                }
            });
            let entries: Vec<HeaderEntry> = entries.collect();
            let (name, header_bytes) = (format!("{f}.safetensors"), 100);
            (CheckpointFile { name, bytes: at + header_bytes, header_bytes }, entries)
        });
        Checkpoint::new(headers.collect(), None).unwrap()
    }

    fn ids(batches: &[Batch]) -> Vec<&[TensorId]> {
        batches.iter().map(|b| &b.tensors[..]).collect()
    }

    #[test]
    fn neighbours_of_a_file_are_read_together_up_to_the_longest_read() {
        let mib = 1 << 20;
        let c = checkpoint(&[&[mib, mib, 5 * mib, 3 * mib, 10], &[10]]);
        let all = batches(&c, |_| true, &Limits::new(1 << 30)).unwrap();
        assert_eq!(ids(&all), [&[0, 1, 2][..], &[3, 4], &[5]]);
        assert!(all.iter().all(|b| b.gap_bytes == 0));
    }

    #[test]
    fn short_gaps_are_read_through_and_counted_long_ones_are_not() {
        let c = checkpoint(&[&[10, 1000, 10, 70_000, 10]]);
        let wanted = |name: &str| ["0.0", "0.2", "0.4"].contains(&name);
        let some = batches(&c, wanted, &Limits::new(1 << 30)).unwrap();
        assert_eq!(ids(&some), [&[0, 2][..], &[4]]);
        assert_eq!((some[0].gap_bytes, some[1].gap_bytes), (1000, 0));
    }

    /// Every byte of a batch is in one part, and the pages of two parts are different ones.
    #[test]
    fn parts_cover_a_batch_and_share_no_page() {
        let c = checkpoint(&[&[0, 3, 50_000, 4096, 5_000, 1 << 20]]);
        for memory in [1 << 30, 1 << 21, 1_060_000] {
            let limits = Limits::new(memory);
            for batch in batches(&c, |_| true, &limits).unwrap() {
                let (mut at, mut page) = (batch.range.start, batch.base());
                for part in batch.parts(limits.read_bytes) {
                    assert_eq!((part.start, pages(part).start), (at, page), "{part}");
                    assert!(pages(part).len() <= limits.read_bytes);
                    (at, page) = (part.end, pages(part).end);
                }
                assert_eq!((at, page - batch.base()), (batch.range.end, batch.memory_bytes()));
            }
        }
    }

    #[test]
    fn tensors_without_bytes_take_no_memory() {
        let c = checkpoint(&[&[0, 0]]);
        let all = batches(&c, |_| true, &Limits::new(0)).unwrap();
        assert_eq!((all.len(), all[0].memory_bytes()), (1, 0));
        assert_eq!(all[0].parts(4096).count(), 0);
    }

    #[test]
    fn a_tensor_larger_than_the_limit_is_refused_with_both_figures() {
        let c = checkpoint(&[&[10, 50_000]]);
        let text = batches(&c, |_| true, &Limits::new(40_000)).unwrap_err().to_string();
        assert!(text.contains("0.1") && text.contains("50000") && text.contains("40000"), "{text}");
        assert!(batches(&c, |name| name == "0.0", &Limits::new(40_000)).is_ok());
        let least = memory_bytes_min(&c, |_| true);
        assert!(batches(&c, |_| true, &Limits::new(least)).is_ok());
        assert!(batches(&c, |_| true, &Limits::new(least - 1)).is_err());
    }
}
