//! One read, and where its bytes go.
//!
//! A file in the page cache, or one that is not on local storage, is read straight into parameters, by one scattered read; what
//! would fall into many short runs (row-parallel weights), needs conversion, or is wanted by nobody goes to a slab instead, and
//! from there to its places. Through the page cache such a read is taken in steps that stay within a core's cache ([`steps`]). A
//! read past the page cache goes to a slab as a whole. Bytes that several ranks need are read once and copied from the first.
//!
//! A rank that is a process of its own reads what others want into a slot that they will see or be sent from. Its own
//! share goes straight into its parameters where nobody else wants it, and is copied from the slot where others do.
//!
//! ```text
//! file      | gate rows of rank 0 | gate rows of rank 1 | down: 256 bytes each to ranks 0 1 0 1 0 1 … | norm |
//! iovecs    | → rank 0            | → rank 1            | → slab, then 256 bytes at a time            | → rank 0, copied to 1 |
//! ```

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

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
    storage::{CheckpointSource, RemoteRead, Staged},
};

/// Tensors whose runs are shorter than this on average are cheaper through a slab than as iovecs of their own.
const RUN_BYTES_MIN: u64 = 1024;

/// Bytes of one step through the page cache: what is placed from the slab, and the pages that were just zeroed, are still
/// in a core's second-level cache (2 ranks of a checkpoint of small tensors: 5 % less processor time than with 2 MiB).
const STEP_BYTES: u64 = 512 << 10;

/// The steps in which `range` of `file` is carried out.
pub fn steps(
    checkpoint: &Checkpoint,
    file: u32,
    range: ByteRange,
    direct: bool,
) -> impl Iterator<Item = ByteRange> {
    checkpoint.cut(file, range, if direct { range.len() } else { STEP_BYTES })
}

/// The ranks whose parameters are in this process.
#[derive(Debug, Clone)]
pub enum Ranks {
    /// All of them.
    All(Arc<Vec<Peer>>),
    /// One; the others are processes of their own.
    One(u32, Box<Peer>),
}

impl Ranks {
    /// A rank, if it is in this process.
    pub fn here(&self, rank: u32) -> Option<&Peer> {
        match self {
            Ranks::All(peers) => peers.get(rank as usize),
            Ranks::One(own, peer) => (*own == rank).then_some(peer),
        }
    }
}

/// Where bytes go that are not read in place.
#[derive(Debug)]
pub enum Slab<'a> {
    /// A slab of this rank's own, taken when there is need of one.
    Own(&'a Staging),
    /// The part of a slot for other processes that this range has; what passes the page cache still needs a slab.
    Slot(&'a mut [u8], &'a Staging),
}

/// Carries out the reads of one rank; one per worker, so that its lists are reused.
#[derive(Debug, Default)]
pub struct Scatter {
    spans: Vec<Span>,
    parts: Vec<Part>,
    runs: Vec<Run>,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the pointers in `runs` and `iovecs` are only used within one call of `execute`; between calls they are dead
// values.
unsafe impl Send for Scatter {}

/// The spans of one tensor within a read.
#[derive(Debug, Clone)]
struct Part {
    spans: Range<usize>,
    /// Whether they are read in place; otherwise they are placed from a slab.
    in_place: bool,
}

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
    /// Bytes that were asked of storage once more.
    pub retried_bytes: u64,
    /// Bytes that came from what this host has kept of the storage.
    pub cached_bytes: u64,
}

impl Scatter {
    /// Reads `read` (one of the [`steps`] of a planned one) on behalf of `rank` and places every byte of it in the
    /// parameters of this process that want it; with a slot, the bytes that other processes want are in it afterwards.
    ///
    /// [`Scatter::spans`] then tells what landed where, the spans of other processes included.
    ///
    /// # Errors
    /// Storage fails, or a conversion is not known.
    pub fn execute(
        &mut self,
        plan: &LoadPlan,
        rank: u32,
        read: &Read,
        source: &CheckpointSource,
        ranks: &Ranks,
        slab: Slab<'_>,
    ) -> Result<Outcome, RankError> {
        self.find_spans(plan, rank, read);
        if source.mode.direct && !source.scatters() {
            return self.read_staged(read.range, source, ranks, slab);
        }
        self.find_runs(ranks);
        self.read_scattered(read.range, source, ranks, slab)
    }

    /// The spans of the last read.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Lists the spans of `read`, a read on behalf of `rank`.
    pub(crate) fn find_spans(&mut self, plan: &LoadPlan, rank: u32, read: &Read) {
        self.spans.clear();
        self.parts.clear();
        let wanted = |r| (plan.exchange || r == rank) && plan.takes(r, read);
        for (tensor, within, offset) in tensors_in(&plan.checkpoint, read.file, read.range) {
            let first = self.spans.len();
            plan.placement.spans(tensor, within, wanted, |mut span| {
                span.source_offset += offset;
                self.spans.push(span);
            });
            self.parts.push(Part { spans: first..self.spans.len(), in_place: false });
        }
    }

    /// Lists the runs that are read in place, in the order of the file.
    fn find_runs(&mut self, ranks: &Ranks) {
        self.runs.clear();
        for part in &mut self.parts {
            let spans = &self.spans[part.spans.clone()];
            let here = || spans.iter().filter_map(|s| Some((s, ranks.here(s.rank)?)));
            let rows: u64 = here().map(|(s, _)| s.rows).sum();
            let bytes: u64 = here().map(|(s, _)| s.source_bytes()).sum();
            part.in_place = rows * RUN_BYTES_MIN <= bytes.max(RUN_BYTES_MIN)
                && here().all(|(s, _)| s.cast.is_none())
                && !wanted_on_both_sides(spans, ranks);
            if !part.in_place {
                continue;
            }
            for (span, peer) in here() {
                let first = peer.memory.span_target(span).as_ptr();
                for row in 0..span.rows {
                    self.runs.push(Run {
                        source_offset: span.source_offset + row * span.source_stride,
                        bytes: span.width,
                        // within the extent that `span_target` checked
                        target: first.wrapping_add((row * span.target_stride) as usize),
                    });
                }
            }
        }
        self.runs.sort_by_key(|run| run.source_offset);
        let apart = |w: &[Run]| {
            w[1].source_offset >= w[0].source_offset + w[0].bytes || repeats(&w[0], &w[1])
        };
        if !self.runs.windows(2).all(apart) {
            // runs that overlap in part: no placement has them, but a slab would serve
            self.runs.clear();
            self.parts.iter_mut().for_each(|part| part.in_place = false);
        }
    }

    /// One scattered read: runs to their places, everything else to the same offset of a slab.
    fn read_scattered(
        &mut self,
        range: ByteRange,
        source: &CheckpointSource,
        ranks: &Ranks,
        slab: Slab<'_>,
    ) -> Result<Outcome, RankError> {
        let in_place: u64 = self.distinct_runs().map(|run| run.bytes).sum();
        let mut lease;
        let slab = match slab {
            Slab::Slot(slot, _) => slot,
            Slab::Own(_) if in_place == range.len() => &mut [][..],
            Slab::Own(staging) => {
                lease = staging.lease()?;
                lease.bytes_mut()
            }
        };
        self.list_iovecs(range.len(), slab);
        // SAFETY: each target lies within a parameter (`span_target` checked it) that `ranks` keeps alive, where by RNK-1
        // this read is the only one that writes, or within the slab that is leased.
        let read = unsafe { source.read_scattered(range, &mut self.iovecs) }?;
        for pair in self.runs.windows(2).filter(|w| repeats(&w[0], &w[1])) {
            // SAFETY: the first was just filled by the read or by the copy before and is not complete for anyone yet;
            // the second is a different run, so by RNK-1 the two do not overlap and nobody else touches them.
            unsafe {
                let bytes = pair[0].bytes as usize;
                std::ptr::copy_nonoverlapping(pair[0].target, pair[1].target, bytes);
            }
        }
        for part in self.parts.iter().filter(|part| !part.in_place) {
            place_all(&self.spans[part.spans.clone()], slab, ranks)?;
        }
        let RemoteRead { requests: reads, retried_bytes, cached_bytes } = read;
        Ok(Outcome { reads, padding_bytes: 0, retried_bytes, cached_bytes })
    }

    /// The runs without their repetitions.
    fn distinct_runs(&self) -> impl Iterator<Item = &Run> {
        let first = |(i, run): &(usize, &Run)| *i == 0 || !repeats(&self.runs[i - 1], run);
        self.runs.iter().enumerate().filter(first).map(|(_, run)| run)
    }

    /// Runs as iovecs, the gaps between them as iovecs into the slab.
    fn list_iovecs(&mut self, bytes: u64, slab: &mut [u8]) {
        let mut iovecs = std::mem::take(&mut self.iovecs);
        iovecs.clear();
        let mut at = 0;
        let mut to_slab = |iovecs: &mut Vec<libc::iovec>, from: u64, to: u64| {
            let gap = &mut slab[from as usize..to as usize];
            iovecs.push(libc::iovec { iov_base: gap.as_mut_ptr().cast(), iov_len: gap.len() });
        };
        for run in self.distinct_runs() {
            if run.source_offset > at {
                to_slab(&mut iovecs, at, run.source_offset);
            }
            iovecs.push(libc::iovec { iov_base: run.target.cast(), iov_len: run.bytes as usize });
            at = run.source_offset + run.bytes;
        }
        if at < bytes {
            to_slab(&mut iovecs, at, bytes);
        }
        self.iovecs = iovecs;
    }

    /// One read past the page cache into a slab, and from there to all places. Slots are not read into directly: their
    /// pages are small, and a direct read into scattered pages is split into many requests to the device.
    fn read_staged(
        &mut self,
        range: ByteRange,
        source: &CheckpointSource,
        ranks: &Ranks,
        slab: Slab<'_>,
    ) -> Result<Outcome, RankError> {
        let (slot, staging) = match slab {
            Slab::Own(staging) => (None, staging),
            Slab::Slot(slot, staging) => (Some(slot), staging),
        };
        let mut lease = staging.lease()?;
        let staged = source.read_staged(range, lease.bytes_mut())?;
        let bytes = &lease.bytes_mut()[staged.begin..][..range.len() as usize];
        place_all(&self.spans, bytes, ranks)?;
        if let Some(slot) = slot {
            self.fill_slot(bytes, slot, ranks);
        }
        let Staged { padding_bytes, reads, retried_bytes, cached_bytes, .. } = staged;
        Ok(Outcome { reads, padding_bytes, retried_bytes, cached_bytes })
    }

    /// Copies what other processes want to the same offsets of a slot, once for all of them.
    pub(crate) fn fill_slot(&self, bytes: &[u8], slot: &mut [u8], ranks: &Ranks) {
        let same = |a: &Span, b: &Span| {
            (a.source_offset, a.rows, a.width) == (b.source_offset, b.rows, b.width)
        };
        let mut last: Option<&Span> = None;
        for span in self.spans.iter().filter(|s| ranks.here(s.rank).is_none()) {
            if last.is_some_and(|last| same(last, span)) {
                continue;
            }
            last = Some(span);
            for row in 0..span.rows {
                let at = (span.source_offset + row * span.source_stride) as usize;
                let run = at..at + span.width as usize;
                slot[run.clone()].copy_from_slice(&bytes[run]);
            }
        }
    }
}

/// Whether any byte of a tensor's spans is wanted both in this process and in another.
fn wanted_on_both_sides(spans: &[Span], ranks: &Ranks) -> bool {
    if let Ranks::All(_) = ranks {
        return false;
    }
    let (here, apart): (Vec<&Span>, Vec<&Span>) =
        spans.iter().partition(|s| ranks.here(s.rank).is_some());
    here.iter().any(|a| apart.iter().any(|b| share_bytes(a, b)))
}

/// Whether two spans of one tensor have source bytes in common.
fn share_bytes(a: &Span, b: &Span) -> bool {
    let end = |s: &Span| s.source_offset + (s.rows - 1) * s.source_stride + s.width;
    if a.rows == 0 || b.rows == 0 || a.source_offset >= end(b) || b.source_offset >= end(a) {
        return false;
    }
    (0..a.rows).any(|row| {
        let start = a.source_offset + row * a.source_stride;
        // the first row of `b` that ends past `start`
        let row = match (start + 1).checked_sub(b.source_offset + b.width) {
            None => 0,
            Some(past) if b.rows > 1 => past.div_ceil(b.source_stride),
            Some(0) => 0,
            Some(_) => return false,
        };
        row < b.rows && b.source_offset + row * b.source_stride < start + a.width
    })
}

/// Copies those of the `spans` of a read that are of this process to their parameters.
pub(crate) fn place_all(spans: &[Span], bytes: &[u8], ranks: &Ranks) -> Result<(), RankError> {
    for span in spans {
        if let Some(peer) = ranks.here(span.rank) {
            place(span, bytes, peer)?;
        }
    }
    Ok(())
}

/// Whether `b` wants the same bytes of the file as `a`.
fn repeats(a: &Run, b: &Run) -> bool {
    (a.source_offset, a.bytes) == (b.source_offset, b.bytes)
}

/// Copies one span from the bytes of a read to its parameter.
fn place(span: &Span, bytes: &[u8], peer: &Peer) -> Result<(), RankError> {
    let first = peer.memory.span_target(span).as_ptr();
    let (width, target_width) = (span.width as usize, span.target_width() as usize);
    for row in 0..span.rows {
        let from = (span.source_offset + row * span.source_stride) as usize;
        let run = &bytes[from..from + width];
        let target = first.wrapping_add((row * span.target_stride) as usize);
        // SAFETY: `span_target` checked that every run of the span lies within the parameter, which `peer` keeps alive
        // and has touched; by RNK-1 nobody else accesses these bytes, and a slab is not part of any parameter.
        let target = unsafe { std::slice::from_raw_parts_mut(target, target_width) };
        match span.cast {
            None => target.copy_from_slice(run),
            Some((from, to)) if cast(run, from, target, to) => {}
            Some((from, to)) => {
                return Err(RankError::Transform {
                    param: peer.memory.placement().params[span.param as usize].name.clone(),
                    what: format!("no conversion from {from} to {to}"),
                });
            }
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

/// Adds what the spans of one read moved between ranks to the counters of both sides, as far as they are here.
pub(crate) fn count_exchange(spans: &[Span], reader: u32, ranks: &Ranks) {
    count_sent(spans, reader, ranks);
    count_received(spans, reader, ranks);
}

/// Adds what `reader` handed to other ranks to its counter, if it is here.
pub(crate) fn count_sent(spans: &[Span], reader: u32, ranks: &Ranks) {
    if let Some(peer) = ranks.here(reader) {
        let bytes = spans.iter().filter(|s| s.rank != reader).map(Span::source_bytes).sum();
        peer.progress.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Adds what other ranks than `reader` got of its read to their counters, as far as they are here.
pub(crate) fn count_received(spans: &[Span], reader: u32, ranks: &Ranks) {
    for span in spans.iter().filter(|s| s.rank != reader) {
        if let Some(target) = ranks.here(span.rank) {
            target.progress.received_bytes.fetch_add(span.source_bytes(), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(source_offset: u64, width: u64, source_stride: u64, rows: u64) -> Span {
        let (rank, param, target_offset) = (0, 0, 0);
        let (target_stride, cast) = (width, None);
        Span {
            rank,
            param,
            source_offset,
            target_offset,
            rows,
            width,
            source_stride,
            target_stride,
            cast,
        }
    }

    /// Against every byte listed.
    #[test]
    fn spans_share_bytes_when_they_do() {
        let bytes = |s: &Span| -> Vec<u64> {
            let rows = (0..s.rows).map(|r| s.source_offset + r * s.source_stride);
            rows.flat_map(|first| first..first + s.width).collect()
        };
        let mut shared = 0;
        let spans: Vec<Span> = (0..12)
            .flat_map(|offset| {
                [(1, 4, 3), (2, 5, 4), (3, 3, 2), (4, 9, 1), (2, 7, 0)]
                    .map(|(width, stride, rows)| span(offset, width, stride, rows))
            })
            .collect();
        for a in &spans {
            for b in &spans {
                let listed = bytes(b);
                let want = bytes(a).iter().any(|byte| listed.contains(byte));
                assert_eq!(share_bytes(a, b), want, "{a:?} {b:?}");
                shared += u32::from(want);
            }
        }
        assert!(shared > 100);
    }
}
