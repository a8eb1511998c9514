//! One read, and where its bytes go.
//!
//! Buffered files are read straight into parameters (one scattered read; no staging) when the runs are long enough;
//! everything else passes through a slab. Bytes that several ranks need are read once and copied from the first.

use std::sync::atomic::Ordering;

use longshore_kernels::host::cast::cast;
use longshore_models::{
    byte_range::ByteRange,
    checkpoint::{Checkpoint, TensorId},
    placement::Span,
};

use crate::{
    error::RankError,
    protocol::{LoadPlan, Peer, Read},
    staging::Staging,
    storage::CheckpointSource,
};

/// Runs shorter than this on average are cheaper through a slab than as iovecs of their own.
const RUN_BYTES_MIN: u64 = 1024;

/// Carries out the reads of one rank; one per worker, so that its lists are reused.
#[derive(Debug, Default)]
pub struct Scatter {
    spans: Vec<Span>,
    runs: Vec<Run>,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the pointers in `iovecs` are only used within one call of `execute`; between calls they are dead values.
unsafe impl Send for Scatter {}

/// One contiguous piece of a read that lands in one place.
#[derive(Debug, Clone, Copy)]
struct Run {
    source_offset: u64,
    bytes: u64,
    target: *mut u8,
}

/// What one read did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Reads issued to storage.
    pub reads: u64,
    /// Bytes read for alignment only.
    pub padding_bytes: u64,
}

impl Scatter {
    /// Reads `read` on behalf of `rank` and places every byte of it in the parameters that want it.
    ///
    /// [`Scatter::spans`] then tells what landed.
    ///
    /// # Errors
    /// Storage fails, or a conversion is not known.
    pub fn execute(
        &mut self,
        plan: &LoadPlan,
        rank: u32,
        read: &Read,
        source: &CheckpointSource,
        peers: &[Peer],
        staging: &Staging,
    ) -> Result<Outcome, RankError> {
        self.find_spans(plan, rank, read);
        if !source.mode.direct && self.find_runs(read.range, peers) {
            return self.read_in_place(read.range, source);
        }
        let mut lease = staging.lease()?;
        let staged = source.read_staged(read.range, lease.bytes_mut())?;
        let bytes = &lease.bytes_mut()[staged.begin..][..read.range.len() as usize];
        for span in &self.spans {
            place(span, bytes, &peers[span.rank as usize])?;
        }
        Ok(Outcome { reads: staged.reads, padding_bytes: staged.padding_bytes })
    }

    /// The spans of the last read.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    fn find_spans(&mut self, plan: &LoadPlan, rank: u32, read: &Read) {
        self.spans.clear();
        for (tensor, within, offset) in tensors_in(&plan.checkpoint, read.file, read.range) {
            let wanted = |r| plan.exchange || r == rank;
            plan.placement.spans(tensor, within, wanted, |mut span| {
                span.source_offset += offset;
                self.spans.push(span);
            });
        }
    }

    /// Lists the runs of all spans in the order of the file; `false` when a slab serves better.
    fn find_runs(&mut self, range: ByteRange, peers: &[Peer]) -> bool {
        let rows: u64 = self.spans.iter().map(|s| s.rows).sum();
        if rows * RUN_BYTES_MIN > range.len() || self.spans.iter().any(|s| s.cast.is_some()) {
            return false;
        }
        self.runs.clear();
        for span in &self.spans {
            for row in 0..span.rows {
                self.runs.push(Run {
                    source_offset: span.source_offset + row * span.source_stride,
                    bytes: span.width,
                    target: peers[span.rank as usize].memory.run_target(span, row).as_ptr(),
                });
            }
        }
        self.runs.sort_by_key(|run| run.source_offset);
        self.runs_tile(range.len())
    }

    /// Whether the runs cover `bytes` bytes without a gap, repeated runs being exact repetitions.
    fn runs_tile(&self, bytes: u64) -> bool {
        let mut at = 0;
        let mut previous: Option<&Run> = None;
        for run in &self.runs {
            match previous {
                Some(p) if p.source_offset == run.source_offset => {
                    if p.bytes != run.bytes {
                        return false;
                    }
                }
                _ if run.source_offset == at => at += run.bytes,
                _ => return false,
            }
            previous = Some(run);
        }
        at == bytes
    }

    fn read_in_place(
        &mut self,
        range: ByteRange,
        source: &CheckpointSource,
    ) -> Result<Outcome, RankError> {
        self.iovecs.clear();
        let repeats =
            |runs: &[Run], i: usize| i > 0 && runs[i].source_offset == runs[i - 1].source_offset;
        for (i, run) in self.runs.iter().enumerate() {
            if !repeats(&self.runs, i) {
                let (iov_base, iov_len) = (run.target.cast(), run.bytes as usize);
                self.iovecs.push(libc::iovec { iov_base, iov_len });
            }
        }
        // SAFETY: each target lies within a parameter (`run_target` checked it) that `peers` keeps alive, and by RNK-1
        // this read is the only one that writes there.
        let reads = unsafe { source.read_scattered(range, &mut self.iovecs) }?;
        for i in (1..self.runs.len()).filter(|&i| repeats(&self.runs, i)) {
            let (from, to) = (self.runs[i - 1], self.runs[i]);
            // SAFETY: `from` was just filled by the read or by the copy before and is not complete for anyone yet;
            // `to` is a different run, so by RNK-1 the two do not overlap and nobody else touches them.
            unsafe { std::ptr::copy_nonoverlapping(from.target, to.target, to.bytes as usize) };
        }
        Ok(Outcome { reads, padding_bytes: 0 })
    }
}

/// Copies one span from the bytes of a read to its parameter.
fn place(span: &Span, bytes: &[u8], peer: &Peer) -> Result<(), RankError> {
    for row in 0..span.rows {
        let from = (span.source_offset + row * span.source_stride) as usize;
        let run = &bytes[from..from + span.width as usize];
        let target = peer.memory.run_target(span, row).as_ptr();
        let Some((source_dtype, target_dtype)) = span.cast else {
            // SAFETY: `run_target` checked that `width` bytes follow `target` within the parameter, which `peer` keeps
            // alive; by RNK-1 nobody else touches them, and a slab is not part of any parameter.
            unsafe { std::ptr::copy_nonoverlapping(run.as_ptr(), target, run.len()) };
            continue;
        };
        // SAFETY: as above, for the width after conversion.
        let target =
            unsafe { std::slice::from_raw_parts_mut(target, span.target_width() as usize) };
        if !cast(run, source_dtype, target, target_dtype) {
            return Err(RankError::Transform {
                param: peer.memory.placement().params[span.param as usize].name.clone(),
                what: format!("no conversion from {source_dtype} to {target_dtype}"),
            });
        }
    }
    Ok(())
}

/// The tensors that `range` of `file` touches: `(tensor, the part of it, where that part begins in the range)`.
pub fn tensors_in(
    checkpoint: &Checkpoint,
    file: u32,
    range: ByteRange,
) -> impl Iterator<Item = (TensorId, ByteRange, u64)> {
    let tensors = &checkpoint.tensors;
    let first = tensors.partition_point(|t| (t.file, t.file_range.end) <= (file, range.start));
    tensors[first..]
        .iter()
        .enumerate()
        .take_while(move |(_, t)| t.file == file && t.file_range.start < range.end)
        .filter_map(move |(i, t)| {
            let part = t.file_range.intersect(&range)?;
            let start = t.file_range.start;
            let within = ByteRange::new(part.start - start, part.end - start);
            Some(((first + i) as TensorId, within, part.start - range.start))
        })
}

/// Adds what the spans of one read moved between ranks to the counters of both sides.
pub(crate) fn count_exchange(spans: &[Span], reader: u32, peers: &[Peer]) {
    for span in spans.iter().filter(|s| s.rank != reader) {
        let bytes = span.source_bytes();
        peers[reader as usize].progress.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        peers[span.rank as usize].progress.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}
