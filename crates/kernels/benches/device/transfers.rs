//! The ways to the device: bare copies from pinned memory, slabs as a rank uploads them, reads from the page cache.

use std::{
    error::Error,
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    ptr::NonNull,
    slice,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use longshore_kernels::cuda::{
    driver::{CudaError, Device, DeviceMemory, Event, Registration, Stream},
    launch,
    place::{PlaceSpan, Runs, SpanTable},
};

use crate::{
    Row, Settings, Table,
    arenas::{Arenas, fill},
    median,
};

/// The longest read of a load, and what a rank copies at a time. Source: `longshore load --help`, `--read-size`.
const SLAB_BYTES: usize = 2 << 20;
/// Slabs of a rank: two for each of 16 reads in flight.
const SLABS: usize = 32;
/// What a bare copy copies.
const BARE_BYTES: usize = 256 << 20;
/// What is asked of uploads beside a bare copy.
const WANTED: Option<f64> = Some(0.9);

const HUGE_PAGE: usize = 2 << 20;

/// Pinned memory on huge pages, where the system has them; as a rank's.
struct Pinned {
    // unpinned before it is freed: fields are dropped in this order
    _registration: Registration,
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Pinned {
    fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let mut memory: Vec<u8> = Vec::with_capacity(bytes + HUGE_PAGE);
        let start = memory.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        let first = memory.as_mut_ptr().wrapping_add(start);
        // SAFETY: `start + bytes` is within the vector's allocation. Advice only: an error changes nothing.
        unsafe { libc::madvise(first.cast(), bytes, libc::MADV_HUGEPAGE) };
        memory.resize(start + bytes, 0);
        fill(&mut memory[start..]);
        let first = NonNull::from(&mut memory[start]);
        // SAFETY: the vector stays as it is until the registration has gone.
        let registration = unsafe { device.register(first, bytes)? };
        Ok(Self { _registration: registration, memory, start, bytes })
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.bytes]
    }
}

/// One large copy; slabs of a load's size; the same with their placement, as a rank does it.
pub(crate) fn to_device(
    table: &mut Table,
    arenas: &mut Arenas,
    tiny: bool,
) -> Result<(), Box<dyn Error>> {
    let total = arenas.target.len() as usize;
    let slab_bytes = if tiny { 64 << 10 } else { SLAB_BYTES };
    let bare_bytes = BARE_BYTES.min(total);
    let size = |bytes: usize| match bytes >> 20 {
        0 => format!("{} KiB", bytes >> 10),
        mib => format!("{mib} MiB"),
    };
    let bare = Row::new("host to device, one pinned copy", size(bare_bytes), None);
    let slabs = format!("{SLABS} slabs of {}", size(slab_bytes));
    let copied = Row::new("host to device, slabs", &slabs, None);
    let placed = Row::new("host to device, slabs, placed", slabs, WANTED);
    if ![&bare, &copied, &placed].into_iter().any(|row| table.wants(row)) {
        return Ok(());
    }

    let pinned = Pinned::new(&arenas.device, bare_bytes)?;
    let (from, to) = (pinned.bytes().as_ptr(), arenas.target.address());
    let copy = |stream: &Stream| {
        // SAFETY: both are as long, and stay until the stream was waited for.
        unsafe { stream.copy_to_device(to, from, bare_bytes as u64)? };
        stream.synchronize()
    };
    let limit = bare_bytes as f64 / seconds(table, || copy(&arenas.stream))?;
    table.print(&bare, limit, None, None);
    drop(pinned);

    let mut ring = Ring::new(&arenas.device, slab_bytes)?;
    let bytes = total / slab_bytes * slab_bytes;
    let rate = bytes as f64 / seconds(table, || ring.upload(arenas, false))?;
    table.print(&copied, rate, Some(limit), None);
    let rate = bytes as f64 / seconds(table, || ring.upload(arenas, true))?;
    let equal = ring.was_placed(arenas, bytes)?;
    table.print(&placed, rate, Some(limit), Some(equal));
    Ok(())
}

/// Seconds that `run` takes on the host's clock, once warm.
fn seconds<E>(table: &Table, mut run: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let begun = Instant::now();
    run()?;
    while begun.elapsed() < table.warm_up {
        run()?;
    }
    let mut all = Vec::with_capacity(table.samples);
    for _ in 0..table.samples {
        let begun = Instant::now();
        run()?;
        all.push(begun.elapsed().as_secs_f64());
    }
    Ok(median(all))
}

/// Slabs on both sides, with what tells how far the use of each has come.
struct Ring {
    slab_bytes: usize,
    host: Pinned,
    tables: Pinned,
    device: DeviceMemory,
    device_tables: DeviceMemory,
    places: Stream,
    copied: Vec<Event>,
    placed: Vec<Event>,
}

impl Ring {
    fn new(device: &Arc<Device>, slab_bytes: usize) -> Result<Self, CudaError> {
        let events = || (0..SLABS).map(|_| device.event()).collect::<Result<Vec<_>, _>>();
        let (bytes, table_bytes) = (SLABS * slab_bytes, SLABS * size_of::<PlaceSpan>());
        Ok(Self {
            slab_bytes,
            host: Pinned::new(device, bytes)?,
            tables: Pinned::new(device, table_bytes)?,
            device: device.allocate("a benchmark", bytes as u64)?,
            device_tables: device.allocate("a benchmark", table_bytes as u64)?,
            places: device.stream()?,
            copied: events()?,
            placed: events()?,
        })
    }

    /// Uploads as many slabs as the target holds, over and over from the same ring, and places each where it belongs.
    fn upload(&mut self, arenas: &Arenas, place: bool) -> Result<(), CudaError> {
        for number in 0..arenas.target.len() as usize / self.slab_bytes {
            let slot = number % SLABS;
            if number >= SLABS {
                let last = if place { &self.placed } else { &self.copied };
                last[slot].synchronize()?;
            }
            let (offset, bytes) = (slot * self.slab_bytes, self.slab_bytes as u64);
            let slab = self.device.address() + offset as u64;
            // SAFETY: both slabs are as long, and free: whatever used them has ended, as was just waited for.
            unsafe {
                let from = self.host.bytes()[offset..].as_ptr();
                arenas.stream.copy_to_device(slab, from, bytes)?;
            }
            arenas.stream.record(&self.copied[slot])?;
            if place {
                self.places.wait(&self.copied[slot])?;
                self.place(slot, slab, arenas.target.address() + number as u64 * bytes)?;
                self.places.record(&self.placed[slot])?;
            }
        }
        arenas.stream.synchronize()?;
        self.places.synchronize()
    }

    /// Places all of a slab in one run, by a table of one span, which is copied first.
    fn place(&mut self, slot: usize, slab: u64, target: u64) -> Result<(), CudaError> {
        const TABLE_BYTES: usize = size_of::<PlaceSpan>();
        let mut table = SpanTable::default();
        let run = Runs {
            source_offset: 0,
            target,
            rows: 1,
            width: self.slab_bytes as u64,
            source_stride: 0,
            target_stride: 0,
            cast: None,
        };
        assert!(table.push(run), "nothing is converted");
        let pinned = &mut self.tables.bytes_mut()[slot * TABLE_BYTES..][..TABLE_BYTES];
        // SAFETY: a span has no padding (its own test states the size); the slice ends before the table changes.
        pinned.copy_from_slice(unsafe {
            slice::from_raw_parts(table.spans().as_ptr().cast(), TABLE_BYTES)
        });
        let on_device = self.device_tables.address() + (slot * TABLE_BYTES) as u64;
        // SAFETY: slab, tables and target stay until the stream was waited for; whatever used the slot has ended.
        unsafe {
            self.places.copy_to_device(on_device, pinned.as_ptr(), TABLE_BYTES as u64)?;
            launch::place(&self.places, slab, on_device, &table)
        }
    }

    /// Whether the first `bytes` bytes of the target are what was uploaded.
    fn was_placed(&self, arenas: &Arenas, bytes: usize) -> Result<bool, CudaError> {
        let mut got = vec![0; bytes];
        // SAFETY: both are at least as long, and nobody else has them, until the stream is done.
        unsafe {
            arenas.stream.copy_to_host(got.as_mut_ptr(), arenas.target.address(), bytes as u64)?;
        }
        arenas.stream.synchronize()?;
        Ok(got.chunks(self.host.bytes).all(|got| got == &self.host.bytes()[..got.len()]))
    }
}

/// Threads that do nothing but read blocks of a load's size into pinned memory, two buffers each.
pub(crate) fn read(
    table: &mut Table,
    device: &Arc<Device>,
    settings: &Settings,
) -> Result<(), Box<dyn Error>> {
    let mut blocks = Vec::new();
    let mut bytes = 0;
    for path in &settings.read {
        let file = Arc::new(File::open(path).map_err(|e| format!("{}: {e}", path.display()))?);
        let length = file.metadata()?.len();
        bytes += length;
        for offset in (0..length).step_by(SLAB_BYTES) {
            let length = (length - offset).min(SLAB_BYTES as u64) as usize;
            blocks.push((Arc::clone(&file), offset, length));
        }
    }
    let slabs = || Pinned::new(device, 2 * SLAB_BYTES);
    let mut slabs = (0..settings.threads).map(|_| slabs()).collect::<Result<Vec<_>, _>>()?;
    let taken = seconds(table, || {
        let next = AtomicUsize::new(0);
        let read = |slabs: &mut Pinned| -> io::Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some((file, offset, length)) = blocks.get(number) else { return Ok(()) };
                let slab = slabs.bytes_mut().chunks_mut(SLAB_BYTES).nth(number % 2);
                let slab = slab.unwrap_or_default();
                file.read_exact_at(&mut slab[..*length], *offset)?;
            }
        };
        thread::scope(|scope| {
            let threads: Vec<_> =
                slabs.iter_mut().map(|slabs| scope.spawn(|| read(slabs))).collect();
            let panicked = |_| Err(io::Error::other("a thread panicked"));
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(panicked))
        })
    })?;
    let shape = format!("{} files, {} threads", settings.read.len(), settings.threads);
    table.print(
        &Row::new("page cache to pinned memory", shape, None),
        bytes as f64 / taken,
        None,
        None,
    );
    Ok(())
}
