//! Against a source in memory that counts what is asked of it, in directories of their own.

use std::{fs, os::unix::fs::FileExt, sync::atomic::AtomicU64, time::SystemTime};

use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    directory::{entries, states, total_bytes},
    stretches::{STRETCH_BYTES, stored_bytes},
    *,
};

/// A file elsewhere.
#[derive(Debug)]
struct Source {
    content: Vec<u8>,
    version: String,
    asked: AtomicU64,
}

impl Source {
    fn new(bytes: u64, version: &str) -> Arc<Self> {
        let mut state = xxh3_64(version.as_bytes()) | 1;
        let content = (0..bytes).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
        let (content, version) = (content.collect(), version.to_owned());
        Arc::new(Self { content, version, asked: AtomicU64::new(0) })
    }

    /// Bytes that were asked for since the last time.
    fn asked(&self) -> u64 {
        self.asked.swap(0, Ordering::Relaxed)
    }
}

impl RemoteFile for Source {
    fn identity(&self) -> FileIdentity {
        FileIdentity::remote(self.content.len() as u64, self.version.clone())
    }

    fn read(&self, range: ByteRange, targets: &mut [&mut [u8]]) -> Result<RemoteRead, RankError> {
        self.asked.fetch_add(range.len(), Ordering::Relaxed);
        let mut at = range.start as usize;
        for target in targets {
            target.copy_from_slice(&self.content[at..at + target.len()]);
            at += target.len();
        }
        Ok(RemoteRead { requests: 1, ..RemoteRead::default() })
    }
}

const MIB: u64 = 1 << 20;

fn keep(dir: &Path) -> KeepWeights {
    KeepWeights { dir: dir.to_owned(), limit_bytes: None }
}

fn limited(dir: &Path, limit: u64) -> KeepWeights {
    KeepWeights { limit_bytes: Some(limit), ..keep(dir) }
}

/// As a process does that begins: nothing is known but what is on disk.
fn open(keep: &KeepWeights, name: &str, source: &Arc<Source>) -> Arc<dyn RemoteFile> {
    WeightCache::open(keep, "s3://bucket/model").unwrap().file(name, Arc::clone(source) as _)
}

/// Reads a range, which must be right, and returns how much of it was asked of the source.
fn read(file: &dyn RemoteFile, source: &Source, start: u64, end: u64) -> u64 {
    let mut target = vec![0; (end - start) as usize];
    source.asked();
    let read = file.read(ByteRange::new(start, end), &mut [&mut target]).unwrap();
    assert!(target == source.content[start as usize..end as usize], "{start}..{end}");
    let asked = source.asked();
    assert_eq!(read.cached_bytes, end - start - asked);
    assert_eq!(read.requests == 0, asked == 0);
    asked
}

/// The paths of all stretches, those that are being written included.
fn stretches(dir: &Path) -> Vec<PathBuf> {
    let states = states(&dir.join("weights"));
    let mut paths: Vec<PathBuf> =
        states.iter().flat_map(|s| entries(&s.dir)).map(|entry| entry.path).collect();
    paths.sort();
    paths
}

#[test]
fn what_was_read_is_not_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(5 * MIB + 3, "1");
    let file = open(&keep(dir.path()), "a", &source);
    assert_eq!(read(&*file, &source, MIB / 2, 3 * MIB), 5 * MIB / 2);
    assert_eq!(read(&*file, &source, 2 * MIB, 4 * MIB), MIB);
    drop(file);
    let file = open(&keep(dir.path()), "a", &source);
    assert_eq!(read(&*file, &source, MIB / 2, 4 * MIB), 0);
    assert_eq!(read(&*file, &source, 0, 5 * MIB + 3), MIB / 2 + MIB + 3);
    // another state is another file, and so is another name
    let replaced = Source::new(5 * MIB + 3, "2");
    assert_eq!(read(&*open(&keep(dir.path()), "a", &replaced), &replaced, 0, MIB), MIB);
    assert_eq!(read(&*open(&keep(dir.path()), "b", &source), &source, 0, MIB), MIB);
}

/// A plan opens all files, and reads nothing.
#[test]
fn what_is_not_read_is_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(10, "1");
    let file = open(&keep(dir.path()), "a", &source);
    file.read(ByteRange::new(7, 7), &mut []).unwrap();
    assert_eq!((list(dir.path()).len(), source.asked()), (0, 0));
}

/// Whoever reads in the same pieces finds at once what another has kept; long reads are kept in several stretches.
#[test]
fn what_another_process_keeps_meanwhile_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(3 * STRETCH_BYTES, "1");
    let [one, other] = [(); 2].map(|()| open(&keep(dir.path()), "a", &source));
    assert_eq!(read(&*other, &source, 0, 1), 1);
    let (start, end) = (MIB, MIB + STRETCH_BYTES + 5);
    assert_eq!(read(&*one, &source, start, end), end - start);
    assert_eq!(read(&*other, &source, start, end), 0);
    assert_eq!(stretches(dir.path()).len(), 3);
}

/// WCH-2: wherever a stretch is damaged, and however, its bytes are asked for again, once.
#[test]
fn what_is_damaged_is_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(MIB, "1");
    let length = 1000 + 16;
    read(&*open(&keep(dir.path()), "a", &source), &source, 500, 1500);
    let [path] = &stretches(dir.path())[..] else { panic!("one stretch") };
    for at in (0..length).step_by(7) {
        let mut bytes = fs::read(path).unwrap();
        assert_eq!(bytes.len(), length);
        bytes[at] ^= 1;
        fs::write(path, &bytes).unwrap();
        let file = open(&keep(dir.path()), "a", &source);
        assert_eq!(read(&*file, &source, 500, 1500), 1000, "{at}");
        assert_eq!(read(&*file, &source, 500, 1500), 0, "{at}");
    }
    for (round, damage) in [0, 15, 1000, 1015].into_iter().enumerate() {
        File::options().write(true).open(path).unwrap().set_len(damage).unwrap();
        let file = open(&keep(dir.path()), "a", &source);
        // a part of it is as good as all of it
        let start = 600 + 100 * round as u64;
        assert_eq!(read(&*file, &source, start, start + 100), 100, "{damage}");
        // what is kept before, between and after short gaps is fetched with them
        assert!(read(&*file, &source, 500, 1500) >= 900 - 100 * round as u64, "{damage}");
        assert_eq!(read(&*file, &source, 500, 1500), 0, "{damage}");
    }
    // another stretch's bytes under this one's name
    read(&*open(&keep(dir.path()), "b", &source), &source, 500, 1500);
    let other = stretches(dir.path()).into_iter().find(|p| p.parent() != path.parent()).unwrap();
    fs::copy(&other, path).unwrap();
    let moved = path.with_file_name("0000000000002000-00000000000023e8");
    fs::copy(&other, &moved).unwrap();
    let file = open(&keep(dir.path()), "a", &source);
    assert_eq!(read(&*file, &source, 500, 1500), 1000);
    assert_eq!(read(&*file, &source, 0x2000, 0x23e8), 1000);
}

/// WCH-1: what a process leaves in the middle of a write is no stretch, and goes with the next that uses the file.
#[test]
fn what_is_half_written_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(MIB, "1");
    let file = open(&keep(dir.path()), "a", &source);
    read(&*file, &source, 0, 100);
    let half = states(&dir.path().join("weights"))[0]
        .dir
        .join("0000000000000200-0000000000000300.00000000000000aa-0.unfinished");
    fs::write(&half, &source.content[0x200..0x280]).unwrap();
    let beside = open(&keep(dir.path()), "a", &source);
    read(&*beside, &source, 0, 100);
    assert!(half.exists(), "who writes it may live, as somebody uses the file");
    drop((file, beside));
    let again = open(&keep(dir.path()), "a", &source);
    assert_eq!(read(&*again, &source, 0, 100), 0);
    assert!(!half.exists());
    assert_eq!(read(&*again, &source, 0x200, 0x300), 0x100);
}

/// WCH-4, and by age.
#[test]
fn what_was_not_used_for_longest_goes_first() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(MIB, "1");
    let root = dir.path().join("weights");
    let one = stored_bytes(ByteRange::new(0, MIB));
    let limit = 2 * one + one / 2;
    let names = ["a", "b", "c"];
    for name in names {
        let file = open(&limited(dir.path(), limit), name, &source);
        assert_eq!(read(&*file, &source, 0, MIB), MIB);
        assert!(total_bytes(&root) <= limit);
        // clocks of file systems are coarse
        std::thread::sleep(Duration::from_millis(20));
    }
    let asked = |name| read(&*open(&limited(dir.path(), limit), name, &source), &source, 0, MIB);
    assert_eq!(asked("c"), 0);
    assert_eq!(asked("b"), 0);
    assert_eq!(asked("a"), MIB);
    // c was used before b
    assert_eq!(asked("b"), 0);
    assert_eq!(asked("c"), MIB);
    // a lower limit counts although everything is there
    assert_eq!(read(&*open(&limited(dir.path(), one), "c", &source), &source, 0, MIB), 0);
    assert_eq!(total_bytes(&root), one);
    assert_eq!(counted(&root), one);
}

#[test]
fn what_is_in_use_stays_and_the_rest_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(MIB, "1");
    let one = stored_bytes(ByteRange::new(0, MIB / 4));
    let first = open(&limited(dir.path(), 2 * one), "a", &source);
    for start in [0, 1, 2, 3].map(|quarter| quarter * MIB / 4) {
        assert_eq!(read(&*first, &source, start, start + MIB / 4), MIB / 4);
    }
    let second = open(&limited(dir.path(), 2 * one), "b", &source);
    assert_eq!(read(&*second, &source, 0, MIB), MIB);
    assert_eq!(read(&*first, &source, 0, MIB), MIB / 2);
    assert_eq!(total_bytes(&dir.path().join("weights")), 2 * one);
    drop((first, second));
    let second = open(&limited(dir.path(), 2 * one), "b", &source);
    assert_eq!(read(&*second, &source, 0, MIB / 4), MIB / 4);
    assert_eq!(read(&*second, &source, 0, MIB / 4), 0);
}

/// Nothing of a limit of nothing, and nothing of a file that does not fit.
#[test]
fn what_does_not_fit_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(MIB, "1");
    for limit in [0, 4096, MIB] {
        let file = open(&limited(dir.path(), limit), "a", &source);
        assert_eq!(read(&*file, &source, 0, MIB), MIB);
        assert_eq!(read(&*file, &source, 0, MIB), MIB);
        assert_eq!(stretches(dir.path()), [] as [PathBuf; 0]);
    }
}

#[test]
fn what_is_kept_is_listed_and_pruned() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(list(dir.path()).len(), 0);
    assert_eq!(prune(dir.path(), Duration::ZERO).unwrap().len(), 0);
    let source = Source::new(MIB, "1");
    let file = open(&keep(dir.path()), "a", &source);
    read(&*file, &source, 0, 5000);
    read(&*file, &source, 5000, 5001);
    read(&*open(&keep(dir.path()), "b", &source), &source, 0, 1);
    let [model] = &list(dir.path())[..] else { panic!("one model") };
    assert_eq!((model.uri.as_str(), model.files, model.bytes), ("s3://bucket/model", 2, 4 * 4096));
    let long_ago = SystemTime::now() - Duration::from_secs(1000);
    for state in states(&dir.path().join("weights")) {
        File::open(state.dir.join("used")).unwrap().set_modified(long_ago).unwrap();
    }
    assert_eq!(prune(dir.path(), Duration::from_secs(2000)).unwrap().len(), 0);
    // a is in use
    let removed = prune(dir.path(), Duration::from_secs(500)).unwrap();
    assert_eq!((removed[0].files, removed[0].bytes), (1, 4096));
    drop(file);
    assert_eq!(prune(dir.path(), Duration::from_secs(500)).unwrap()[0].bytes, 3 * 4096);
    assert_eq!((list(dir.path()).len(), stretches(dir.path()).len()), (0, 0));
}

/// What removes everything under a load's feet makes it slower.
#[test]
fn a_directory_that_is_removed_meanwhile_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::new(MIB, "1");
    let file = open(&keep(dir.path()), "a", &source);
    read(&*file, &source, 0, 5000);
    fs::remove_dir_all(dir.path()).unwrap();
    assert_eq!(read(&*file, &source, 0, 6000), 6000);
    assert_eq!(read(&*file, &source, 0, 6000), 6000);
}

#[test]
fn a_directory_that_cannot_be_written_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    for unusable in [dir.path().join("file"), dir.path().join("file/cache"), "/proc/cache".into()] {
        let refused = WeightCache::open(&keep(&unusable), "s3://a/b").unwrap_err();
        assert!(refused.line().contains(unusable.to_str().unwrap()), "{}", refused.line());
        assert_eq!(refused.exit_code(), 2);
    }
}

/// Several processes at once, here with a lock of their own each as if they were, with a limit that is too small for them: every
/// byte is right, and there is never more than the limit.
#[test]
fn many_share_it_within_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let sources: Vec<Arc<Source>> = (0..3).map(|n| Source::new(MIB, &n.to_string())).collect();
    let limit = 40 * 4096 * 4;
    let root = dir.path().join("weights");
    std::thread::scope(|scope| {
        for reader in 0..6_u64 {
            let (sources, dir, root) = (&sources, &dir, &root);
            scope.spawn(move || {
                for round in 0..5 {
                    let source = &sources[((reader + round) % 3) as usize];
                    let file = open(&limited(dir.path(), limit), "a", source);
                    let step = 9000 + 500 * reader;
                    for start in (0..MIB).step_by(step as usize) {
                        read_only(&*file, source, start, (start + step).min(MIB));
                    }
                    assert!(counted(root) <= limit);
                }
            });
        }
    });
    assert!(counted(&root) >= total_bytes(&root));
}

/// What all who write say that there is.
fn counted(root: &Path) -> u64 {
    u64::from_le_bytes(fs::read(root.join("total")).unwrap().try_into().unwrap())
}

/// As [`read`], where others ask the source too.
fn read_only(file: &dyn RemoteFile, source: &Source, start: u64, end: u64) {
    let mut target = vec![0; (end - start) as usize];
    file.read(ByteRange::new(start, end), &mut [&mut target]).unwrap();
    assert!(target == source.content[start as usize..end as usize], "{start}..{end}");
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    /// The process ends, and another begins.
    Restart,
    /// A byte of a stretch is changed.
    Damage(proptest::sample::Index, proptest::sample::Index),
    /// A stretch is removed.
    Remove(proptest::sample::Index),
    /// It is cut.
    Truncate(proptest::sample::Index, proptest::sample::Index),
}

fn steps() -> impl Strategy<Value = Step> {
    const BYTES: u64 = 200_000;
    prop_oneof![
        4 => (0..BYTES, 0..BYTES).prop_map(|(a, b)| Step::Read(a.min(b), a.max(b))),
        1 => Just(Step::Restart),
        1 => any::<(proptest::sample::Index, proptest::sample::Index)>().prop_map(|(a, b)| Step::Damage(a, b)),
        1 => any::<proptest::sample::Index>().prop_map(Step::Remove),
        1 => any::<(proptest::sample::Index, proptest::sample::Index)>().prop_map(|(a, b)| Step::Truncate(a, b)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// WCH-2, WCH-3: whatever happens to what is kept, what is read is right; what was read is not asked for for ever.
    #[test]
    fn whatever_happens_what_is_read_is_right(steps in proptest::collection::vec(steps(), 1..24)) {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::new(200_000, "1");
        let mut file = open(&keep(dir.path()), "a", &source);
        for step in steps {
            let stretches = stretches(dir.path());
            let chosen = |index: &proptest::sample::Index| index.get(&stretches).clone();
            match step {
                Step::Read(start, end) => {
                    // each time that something is asked for again, what was damaged is gone
                    let mut rounds = 0..=stretches.len() + 1;
                    prop_assert!(rounds.any(|_| read(&*file, &source, start, end) == 0));
                }
                Step::Restart => file = open(&keep(dir.path()), "a", &source),
                _ if stretches.is_empty() => {}
                Step::Damage(stretch, at) => {
                    let path = chosen(&stretch);
                    let mut bytes = fs::read(&path).unwrap();
                    if !bytes.is_empty() {
                        let at = at.index(bytes.len());
                        bytes[at] ^= 0x10;
                        let file = File::options().write(true).open(&path).unwrap();
                        file.write_all_at(&bytes, 0).unwrap();
                    }
                }
                Step::Remove(stretch) => fs::remove_file(chosen(&stretch)).unwrap(),
                Step::Truncate(stretch, at) => {
                    let path = chosen(&stretch);
                    let bytes = fs::metadata(&path).unwrap().len() as usize;
                    let file = File::options().write(true).open(&path).unwrap();
                    file.set_len(at.index(bytes + 1) as u64).unwrap();
                }
            }
        }
    }
}
