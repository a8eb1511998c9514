//! What is kept of one weight file in one state.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use longshore_models::byte_range::ByteRange;
use tracing::{debug, warn};
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use super::{
    super::{UNFINISHED, short_hash},
    WeightCache,
    directory::{InUse, entries, hold},
    stretches::{CHECKSUM_BYTES, Part, Stretches, cut, file_name, stored_bytes, to_fetch},
    within,
};

/// What is kept of one weight file in one state.
#[derive(Debug)]
pub(super) struct KeptFile {
    cache: Arc<WeightCache>,
    name: String,
    dir: PathBuf,
    /// Tells its checksums from those of other files.
    seed: u64,
    stretches: Mutex<Stretches>,
    damage_told: AtomicBool,
    _in_use: InUse,
}

impl KeptFile {
    /// Looks at what is there.
    pub(super) fn open(
        cache: &Arc<WeightCache>,
        name: &str,
        bytes: u64,
        version: &str,
    ) -> io::Result<Self> {
        cache.room.trim()?;
        let state = format!("{name}\n{bytes}\n{version}\n");
        let text = format!("{}\n{state}", cache.uri);
        let dir = cache.model().join(short_hash(state.as_bytes()));
        let (in_use, freed) = hold(&dir, &text)?;
        cache.room.give_back(freed);
        let mut stretches = Stretches::default();
        for file in entries(&dir).iter().filter(|file| file.complete) {
            stretches.add(file.stretch);
        }
        Ok(Self {
            cache: Arc::clone(cache),
            name: name.to_owned(),
            dir,
            seed: xxh3_64(text.as_bytes()),
            stretches: Mutex::new(stretches),
            damage_told: AtomicBool::new(false),
            _in_use: in_use,
        })
    }

    /// Fills `target` with what of `range` is kept; returns what is to be fetched, in order.
    pub(super) fn read(&self, range: ByteRange, target: &mut [u8]) -> Vec<ByteRange> {
        let mut missing = Vec::new();
        for part in self.look_up(range) {
            match part {
                Part::Missing(part) => missing.push(part),
                Part::Kept { part, stretch } => {
                    if !self.read_kept(part, stretch, &mut target[within(part, range)]) {
                        missing.push(part);
                    }
                }
            }
        }
        to_fetch(&missing)
    }

    /// What is kept of `range`, by this process or another that reads in the same pieces.
    fn look_up(&self, range: ByteRange) -> Vec<Part> {
        let mut stretches = self.stretches();
        for piece in cut(range) {
            if !stretches.cover(piece) && self.path(piece).exists() {
                stretches.add(piece);
            }
        }
        stretches.parts(range)
    }

    /// Fills `target` with part of a stretch; false where that is not what was kept (WCH-2), or has been removed.
    fn read_kept(&self, part: ByteRange, stretch: ByteRange, target: &mut [u8]) -> bool {
        let why = match self.read_checked(part, stretch, target) {
            Ok(true) => return true,
            Ok(false) => "the checksum differs".to_owned(),
            Err(e) => e.to_string(),
        };
        self.stretches().remove(stretch);
        match fs::remove_file(self.path(stretch)) {
            // there was no room for it any more
            Err(e) if e.kind() == io::ErrorKind::NotFound => return false,
            Err(_) => {}
            Ok(()) => self.cache.room.give_back(stored_bytes(stretch)),
        }
        self.tell_damage(stretch, &why);
        false
    }

    /// Whether the bytes of a stretch are those that were kept; its `part` is in `target` then.
    fn read_checked(
        &self,
        part: ByteRange,
        stretch: ByteRange,
        target: &mut [u8],
    ) -> io::Result<bool> {
        let mut file = File::open(self.path(stretch))?;
        let mut hash = self.hasher(stretch);
        hash_through(&mut file, part.start - stretch.start, &mut hash)?;
        file.read_exact(target)?;
        hash.update(target);
        hash_through(&mut file, stretch.end - part.end, &mut hash)?;
        let mut checksum = [0; CHECKSUM_BYTES as usize];
        file.read_exact(&mut checksum)?;
        Ok(hash.digest128().to_le_bytes() == checksum)
    }

    /// A disk that is bad is said to be so once for each file, not for each stretch.
    fn tell_damage(&self, stretch: ByteRange, why: &str) {
        let (uri, name, dir) = (&self.cache.uri, &self.name, self.cache.room.root.display());
        let text = format!(
            "{uri}/{name}: bytes {stretch} as kept in {dir} are damaged, they are fetched again: {why}"
        );
        match self.damage_told.swap(true, Ordering::Relaxed) {
            false => warn!("{text}"),
            true => debug!("{text}"),
        }
    }

    /// Keeps `bytes`, which were fetched, as far as there is room.
    pub(super) fn keep(&self, range: ByteRange, bytes: &[u8]) {
        for piece in cut(range) {
            if self.cache.is_stopped() {
                return;
            }
            match self.write_making_room(piece, &bytes[within(piece, range)]) {
                Ok(true) => self.stretches().add(piece),
                Ok(false) => return,
                Err(e) => return self.cache.stop(&e),
            }
        }
    }

    /// [`write`](Self::write), in the place of what nobody uses where the file system is full.
    fn write_making_room(&self, stretch: ByteRange, bytes: &[u8]) -> io::Result<bool> {
        match self.write(stretch, bytes) {
            Err(e) if super::is_full(&e) && self.cache.room.make_some()? => {
                self.write(stretch, bytes)
            }
            done => done,
        }
    }

    /// Writes a stretch; false if there is no room for it. It gets its name when it is complete (WCH-1).
    fn write(&self, stretch: ByteRange, bytes: &[u8]) -> io::Result<bool> {
        let (path, size) = (self.path(stretch), stored_bytes(stretch));
        // by another process meanwhile
        if path.exists() {
            return Ok(true);
        }
        let aside = self.dir.join(self.unfinished_name(stretch));
        let Some(mut file) = self.cache.room.take(size, || File::create_new(&aside))? else {
            return Ok(false);
        };
        let mut hash = self.hasher(stretch);
        hash.update(bytes);
        let written = file
            .write_all(bytes)
            .and_then(|()| file.write_all(&hash.digest128().to_le_bytes()))
            .and_then(|()| fs::rename(&aside, &path));
        if written.is_err() {
            let _ = fs::remove_file(&aside);
            self.cache.room.give_back(size);
        }
        written.map(|()| true)
    }

    fn path(&self, stretch: ByteRange) -> PathBuf {
        self.dir.join(file_name(stretch))
    }

    /// No two are the same, whatever process writes.
    fn unfinished_name(&self, stretch: ByteRange) -> String {
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        format!("{}.{:016x}-{number}{UNFINISHED}", file_name(stretch), self.cache.token)
    }

    /// For checksums that are those of this stretch of this file only.
    fn hasher(&self, stretch: ByteRange) -> Xxh3 {
        Xxh3::with_seed(xxh3_64_with_seed(&stretch.start.to_le_bytes(), self.seed))
    }

    fn stretches(&self) -> MutexGuard<'_, Stretches> {
        self.stretches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hashes the next `bytes` bytes, which nobody wants.
fn hash_through(file: &mut File, bytes: u64, hash: &mut Xxh3) -> io::Result<()> {
    /// Within a core's cache.
    const CHUNK_BYTES: u64 = 256 << 10;
    let mut chunk = vec![0; bytes.min(CHUNK_BYTES) as usize];
    let mut left = bytes;
    while left > 0 {
        let chunk = &mut chunk[..left.min(CHUNK_BYTES) as usize];
        file.read_exact(chunk)?;
        hash.update(chunk);
        left -= chunk.len() as u64;
    }
    Ok(())
}
