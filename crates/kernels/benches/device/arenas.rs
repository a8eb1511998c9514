//! Memory that rows work on: a source with known contents, a target, a workspace; and how a row is timed and compared.

use std::{
    error::Error,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Instant,
};

use longshore_kernels::cuda::driver::{CudaError, Device, DeviceMemory, Event, Stream};

use crate::{Row, Table, median};

/// What a rank takes at most where less does. Source: `WORKSPACE_BYTES_MAX` of `longshore-rank`.
const WORKSPACE_BYTES: u64 = 64 << 20;

/// Launches between two looks at the device's clock.
const TURNS: usize = 4;

pub(crate) struct Arenas {
    pub(crate) device: Arc<Device>,
    pub(crate) stream: Stream,
    begun: Event,
    ended: Event,
    pub(crate) source: DeviceMemory,
    pub(crate) target: DeviceMemory,
    pub(crate) workspace: DeviceMemory,
    /// What `source` holds.
    pub(crate) contents: Vec<u8>,
    want: Vec<u8>,
    got: Vec<u8>,
}

/// How a target begins, which a row may rely on.
pub(crate) enum Start {
    /// As the source.
    Copied,
    /// As nothing that a kernel makes by chance.
    Filled,
}

/// What a row does, on the device and on the host.
pub(crate) struct Work<'a> {
    /// Bytes that it reads and writes.
    pub(crate) bytes: u64,
    pub(crate) start: Start,
    /// Launches it once.
    pub(crate) launch: &'a dyn Fn(&Arenas) -> Result<(), CudaError>,
    /// Does it to the first bytes of a target, given the source; as many as the row uses.
    pub(crate) host: &'a dyn Fn(&[u8], &mut [u8]),
    /// How many these are.
    pub(crate) target_bytes: usize,
}

const FILLING: u8 = 0x3c;

impl Arenas {
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let mut contents = vec![0; bytes];
        fill(&mut contents);
        let memory = |bytes| device.allocate("a benchmark", bytes);
        let stream = device.stream()?;
        let source = memory(bytes as u64)?;
        // SAFETY: both are as long, and nobody else has them, until the stream is done.
        unsafe { stream.copy_to_device(source.address(), contents.as_ptr(), bytes as u64)? };
        stream.synchronize()?;
        Ok(Self {
            stream,
            begun: device.timed_event()?,
            ended: device.timed_event()?,
            source,
            target: memory(bytes as u64)?,
            workspace: memory(WORKSPACE_BYTES)?,
            contents,
            want: vec![0; bytes],
            got: vec![0; bytes],
            device: Arc::clone(device),
        })
    }

    /// Device memory with these contents.
    pub(crate) fn uploaded(&self, contents: &[u8]) -> Result<DeviceMemory, CudaError> {
        let memory = self.device.allocate("a benchmark", contents.len() as u64)?;
        // SAFETY: both are as long, and nobody else has them, until the stream is done.
        unsafe { self.stream.copy_to_device(memory.address(), contents.as_ptr(), memory.len())? };
        self.stream.synchronize()?;
        Ok(memory)
    }

    /// Runs a row once, compares what it made, and times it beside a copy of as many bytes.
    pub(crate) fn measure(
        &mut self,
        table: &mut Table,
        row: &Row,
        work: &Work<'_>,
    ) -> Result<(), Box<dyn Error>> {
        if !table.wants(row) {
            return Ok(());
        }
        self.begin(&work.start)?;
        (work.launch)(self)?;
        let equal = self.compare(row, work)?;
        // a copy reads and writes, so that half of the bytes are copied
        let copied = (work.bytes / 2).min(self.target.len());
        let begun = Instant::now();
        while begun.elapsed() < table.warm_up {
            self.seconds(&|this| this.copy(copied))?;
            self.seconds(work.launch)?;
        }
        let (mut copies, mut kernels) = (Vec::new(), Vec::new());
        for _ in 0..table.samples {
            copies.push(self.seconds(&|this| this.copy(copied))?);
            kernels.push(self.seconds(work.launch)?);
        }
        let limit = 2.0 * copied as f64 / median(copies);
        table.print(row, work.bytes as f64 / median(kernels), Some(limit), Some(equal));
        Ok(())
    }

    /// Copies the first bytes of the source to the target.
    fn copy(&self, bytes: u64) -> Result<(), CudaError> {
        // SAFETY: both are as long; all that uses them is on this stream.
        unsafe { self.stream.copy_within(self.target.address(), self.source.address(), bytes) }
    }

    fn begin(&self, start: &Start) -> Result<(), CudaError> {
        match start {
            Start::Copied => self.copy(self.target.len()),
            // SAFETY: the target is as long; all that uses it is on this stream.
            Start::Filled => unsafe {
                self.stream.fill(self.target.address(), FILLING, self.target.len())
            },
        }
    }

    fn compare(&mut self, row: &Row, work: &Work<'_>) -> Result<bool, CudaError> {
        let bytes = work.target_bytes;
        let (want, got) = (&mut self.want[..bytes], &mut self.got[..bytes]);
        // SAFETY: both are at least as long, and nobody else has them, until the stream is done.
        unsafe {
            self.stream.copy_to_host(got.as_mut_ptr(), self.target.address(), bytes as u64)?;
        }
        match work.start {
            Start::Copied => want.copy_from_slice(&self.contents[..bytes]),
            Start::Filled => want.fill(FILLING),
        }
        (work.host)(&self.contents, want);
        self.stream.synchronize()?;
        if want == got {
            return Ok(true);
        }
        let at = want.iter().zip(&*got).position(|(want, got)| want != got).unwrap_or(0);
        let (want, got) = (want[at], got[at]);
        eprintln!("{} {}: byte {at} is {got:#x}, not {want:#x}", row.name, row.shape);
        Ok(false)
    }

    /// Seconds of one launch.
    fn seconds(&self, launch: &dyn Fn(&Arenas) -> Result<(), CudaError>) -> Result<f64, CudaError> {
        self.stream.record(&self.begun)?;
        for _ in 0..TURNS {
            launch(self)?;
        }
        self.stream.record(&self.ended)?;
        self.ended.synchronize()?;
        Ok(self.ended.seconds_since(&self.begun)? / TURNS as f64)
    }
}

/// Runs `run` on pieces of `bytes` bytes, with their numbers, on all cores.
pub(crate) fn each(memory: &mut [u8], bytes: usize, run: impl Fn(usize, &mut [u8]) + Sync) {
    let pieces = Mutex::new(memory.chunks_mut(bytes).enumerate());
    let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
    let threads = thread::available_parallelism().map_or(2, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((number, piece)) = next() {
                    run(number, piece);
                }
            });
        }
    });
}

/// Pseudo-random bytes, no two pieces of which are alike.
pub(crate) fn fill(memory: &mut [u8]) {
    const PIECE: usize = 1 << 20;
    each(memory, PIECE, |number, piece| {
        let mut state = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for word in piece.chunks_mut(8) {
            // xorshift64: every code occurs, in no order
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
    });
}
