//! Rank processes, as a test sees them.

use std::{
    env,
    fs::{self, File},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use longshore_emulator::{NcclOptions, Options, emulated, emulated_nccl, library_dir};
use tempfile::TempDir;

use crate::place::{FOLDER, RANK, SIZE, STORY, note, notes};

/// For a whole story, on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(120);

/// A process for each rank, all in the same story.
pub(crate) struct Ranks {
    size: u32,
    story: String,
    pub(crate) options: Options,
    pub(crate) nccl: NcclOptions,
    /// Whether each rank seems to be on a host of its own.
    pub(crate) own_hosts: bool,
    library: &'static Path,
    folder: TempDir,
    /// `None`: killed.
    children: Vec<Option<Child>>,
}

impl Ranks {
    /// Ranks to be, with a device each; `None`, said aloud, where nothing can be emulated.
    pub(crate) fn of(size: u32, story: &str) -> Option<Self> {
        let library = library_dir(env!("CARGO_TARGET_TMPDIR"))?;
        Some(Self {
            size,
            story: story.to_owned(),
            options: Options { devices: size.max(2), ..Options::default() },
            nccl: NcclOptions::default(),
            own_hosts: false,
            library,
            folder: tempfile::tempdir().unwrap(),
            children: Vec::new(),
        })
    }

    pub(crate) fn start(&mut self) {
        for rank in 0..self.size {
            let output = File::create(self.folder.path().join(format!("output-{rank}"))).unwrap();
            let mut command = Command::new(env::current_exe().unwrap());
            command.args(["--exact", "rank", "--nocapture"]);
            emulated(&mut command, self.library, &self.options);
            let host_id = self.own_hosts.then(|| format!("host of rank {rank}"));
            emulated_nccl(&mut command, &NcclOptions { host_id, ..self.nccl.clone() });
            command.env(STORY, &self.story).env(FOLDER, self.folder.path());
            command.env(RANK, rank.to_string()).env(SIZE, self.size.to_string());
            command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
            self.children.push(Some(command.spawn().unwrap()));
        }
    }

    /// Waits until so many ranks have left this note.
    pub(crate) fn wait_for(&mut self, name: &str, count: u32) {
        let begun = Instant::now();
        while notes(self.folder.path(), name) < count {
            let ended = self.look().is_none_or(|ended| ended.is_some());
            if ended || begun.elapsed() > LIMIT {
                panic!("not all say {name}\n{}", self.output());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Leaves a note for all ranks.
    pub(crate) fn note(&self, name: &str) {
        note(self.folder.path(), name, self.size, &[]);
    }

    /// With SIGKILL.
    pub(crate) fn kill(&mut self, rank: u32) {
        let mut child = self.children[rank as usize].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// All that were not killed come to a good end.
    pub(crate) fn succeed(&mut self) {
        let begun = Instant::now();
        while let Some(ended) = self.look() {
            match ended {
                Some(status) if status.success() => {}
                Some(status) => panic!("{}: {status}\n{}", self.story, self.output()),
                None if begun.elapsed() > LIMIT => {
                    panic!("{} hangs\n{}", self.story, self.output())
                }
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// One of them does not; what all have said.
    pub(crate) fn fail(&mut self) -> String {
        let begun = Instant::now();
        while let Some(ended) = self.look() {
            match ended {
                Some(status) if !status.success() => return self.output(),
                None if begun.elapsed() > LIMIT => {
                    panic!("{} hangs\n{}", self.story, self.output())
                }
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
        panic!("{} succeeds\n{}", self.story, self.output())
    }

    /// One that has ended since the last look; none at all are left where that is `None`.
    fn look(&mut self) -> Option<Option<ExitStatus>> {
        for place in &mut self.children {
            if let Some(status) = place.as_mut().and_then(|child| child.try_wait().unwrap()) {
                *place = None;
                return Some(Some(status));
            }
        }
        self.children.iter().any(Option::is_some).then_some(None)
    }

    fn output(&self) -> String {
        let of =
            |rank| fs::read(self.folder.path().join(format!("output-{rank}"))).unwrap_or_default();
        let all = (0..self.size)
            .map(|rank| format!("rank {rank}: {}\n", String::from_utf8_lossy(&of(rank))));
        all.collect()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
