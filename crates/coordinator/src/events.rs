//! What rank processes tell of themselves while they load, for whoever watches from outside: a line of JSON per event.
//!
//! With `LONGSHORE_EVENTS=FILE` in its environment each rank process appends to FILE, under whatever launcher, and
//! [`chaos`](crate::chaos) reads it. A line is written at once and is shorter than 4 KiB, so those of several processes do not
//! mix. A file that cannot be written to gives one warning, and never disturbs a load.
//!
//! ```text
//! {"time":1763758421.25,"rank":1,"pid":4711,"generation":1,"read_bytes":65536,"event":"phase","phase":"finishing"}
//! ```
//!
//! Every line has `time` (seconds since 1970), `rank` and `pid` (of the process that writes), `generation` (as that process
//! knows it; 0 before the first) and `read_bytes` (weight bytes that it has asked of storage so far). `event` is one of:
//!
//! | event | written by | when, and what else is there |
//! |---|---|---|
//! | `started` | each rank | its process begins: `world_size`, and `process`, by which it is told from any other (host, pid, start) |
//! | `joined` | each rank | it has met the coordinator, or the successor of one that was lost |
//! | `phase` | each rank | `phase`: `waiting` (for the others, once per generation), `reading`, `finishing`, `ready` |
//! | `generation` | the coordinator | a generation of the load begins |
//! | `lost` | the coordinator; of the coordinator itself, every other rank | `who`, the rank; `why`; `who_read_bytes`, as of its last heartbeat |
//! | `replaced` | the coordinator | `who`: another process has joined in the place of one that was lost |
//! | `shrunk` | the coordinator | the group goes on with the ranks that are `left`: what it tells of ranks numbers them anew, in their order |
//! | `complete` | the coordinator | every parameter of every rank is complete |
//! | `failed` | the coordinator | the load has failed, or the group after it: `why` |
//! | `ended` | each rank | it leaves the group: `why`, where that is no good end; may come twice |
//!
//! The coordinator is in rank 0's process. A process that is killed writes nothing more. More keys and events may be added.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::Write,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use longshore_rank::protocol::{Generation, Phase, Progress, RankCommand};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    coordination::{LoadEnd, Order},
    fence::ProcessIdentity,
    place::Place,
    processes::remote::LEFT,
};

/// The environment variable that names the file.
pub const EVENTS_VARIABLE: &str = "LONGSHORE_EVENTS";

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When. **Units:** seconds since 1970.
    pub time: f64,
    /// The rank that writes.
    pub rank: u32,
    /// Its process.
    pub pid: u32,
    /// The generation of the load, as that process knows it.
    pub generation: Generation,
    /// Weight bytes that it has asked of storage so far.
    pub read_bytes: u64,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum What {
    /// A rank's process begins.
    Started {
        /// Ranks of the group.
        world_size: u32,
        /// Which process it is, where the system tells.
        process: Option<ProcessIdentity>,
    },
    /// It has met the coordinator.
    Joined,
    /// What it does now.
    Phase {
        /// `waiting`, `reading`, `finishing` or `ready`.
        phase: String,
    },
    /// A generation of the load begins.
    Generation,
    /// A rank counts as lost.
    Lost {
        /// The rank.
        who: u32,
        /// Why.
        why: String,
        /// Weight bytes that it had asked of storage, as of its last heartbeat.
        who_read_bytes: u64,
    },
    /// Another process has joined in the place of one that was lost.
    Replaced {
        /// The rank.
        who: u32,
    },
    /// The group goes on with fewer ranks, and numbers them anew in their order.
    Shrunk {
        /// How many.
        left: u32,
    },
    /// Every parameter of every rank is complete.
    Complete,
    /// The load has failed, or the group after it.
    Failed {
        /// Why.
        why: String,
    },
    /// The rank leaves the group.
    Ended {
        /// Why, where that is no good end.
        why: Option<String>,
    },
    /// An event that this version does not know.
    #[serde(other)]
    Unknown,
}

/// This process's end of the file.
#[derive(Debug)]
struct Own {
    file: File,
    rank: u32,
    generation: AtomicU64,
    progress: OnceLock<Arc<Progress>>,
    /// Lost and not replaced, as its coordinator knows.
    lost: Mutex<BTreeSet<u32>>,
    /// Its load is complete: that ranks leave, each in its time, is no failure.
    complete: AtomicBool,
    warned: AtomicBool,
}

/// A process is one rank, so it has one of these at most.
static OWN: OnceLock<Own> = OnceLock::new();

/// The longest reason that is told: with every character escaped it leaves room for the rest of a line.
const WHY_BYTES_MAX: usize = 500;

/// The process of a rank begins: opens the file if one is asked for.
pub(crate) fn open(place: &Place) {
    let asked = std::env::var_os(EVENTS_VARIABLE).filter(|path| !path.is_empty());
    let Some(file) = asked.and_then(|path| open_file(&path)) else { return };
    let own = Own {
        file,
        rank: place.rank,
        generation: AtomicU64::new(0),
        progress: OnceLock::new(),
        lost: Mutex::default(),
        complete: AtomicBool::new(false),
        warned: AtomicBool::new(false),
    };
    if OWN.set(own).is_ok() {
        let process = ProcessIdentity::own().ok();
        emit(What::Started { world_size: place.world_size, process });
    }
}

fn open_file(path: &OsStr) -> Option<File> {
    match OpenOptions::new().append(true).create(true).open(path) {
        Ok(file) => Some(file),
        Err(e) => {
            warn!("{EVENTS_VARIABLE}: {} cannot be opened: {e}", path.display());
            None
        }
    }
}

/// From now on the phases of this rank are told, and what it has read.
pub(crate) fn watch(progress: &Arc<Progress>) {
    let Some(own) = OWN.get() else { return };
    if own.progress.set(Arc::clone(progress)).is_ok() {
        progress.tell(|phase| emit(What::Phase { phase: phase.name().into() }));
    }
}

/// This rank was told that a generation begins.
pub(crate) fn generation(generation: Generation) {
    let Some(own) = OWN.get() else { return };
    own.generation.store(generation, Ordering::Relaxed);
    emit(What::Phase { phase: Phase::Waiting.name().into() });
}

/// The coordinator has lost a rank or gets one back, begins, or is done; `read_bytes` is what a rank has read.
pub(crate) fn ordered(order: &Order, read_bytes: impl FnOnce(u32) -> u64) {
    let Some(own) = OWN.get() else { return };
    let lost = || own.lost.lock().unwrap_or_else(PoisonError::into_inner);
    match order {
        Order::TellAll(RankCommand::Allocate { generation }) => {
            own.complete.store(false, Ordering::Relaxed);
            own.write(*generation, What::Generation);
        }
        Order::TellAll(RankCommand::Abort { why, .. })
            if own.complete.load(Ordering::Relaxed) && why.ends_with(LEFT) => {}
        Order::TellAll(RankCommand::Abort { generation, why }) => {
            own.write(*generation, What::Failed { why: shortened(why) });
        }
        Order::Tell(who, RankCommand::Allocate { generation }) if lost().remove(who) => {
            own.write(*generation, What::Replaced { who: *who });
        }
        Order::Dismiss(who, why) => {
            lost().insert(*who);
            let who_read_bytes = read_bytes(*who);
            emit(What::Lost { who: *who, why: shortened(why), who_read_bytes });
        }
        Order::Answer(Ok(LoadEnd::Shrunk(shrunk))) => {
            // they are numbered anew
            lost().clear();
            own.write(shrunk.generation, What::Shrunk { left: shrunk.ranks.len() as u32 });
        }
        Order::Answer(Ok(LoadEnd::Complete(loaded))) => {
            own.complete.store(true, Ordering::Relaxed);
            own.write(loaded.generation, What::Complete);
        }
        _ => {}
    }
}

/// The coordinator itself was lost; what it had read nobody knows.
pub(crate) fn coordinator_lost(why: &str) {
    emit(What::Lost { who: 0, why: shortened(why), who_read_bytes: 0 });
}

/// This rank leaves the group.
pub(crate) fn ended(why: Option<&str>) {
    emit(What::Ended { why: why.map(shortened) });
}

/// Tells what happened, if anyone wants to know.
pub(crate) fn emit(what: What) {
    if let Some(own) = OWN.get() {
        own.write(own.generation.load(Ordering::Relaxed), what);
    }
}

impl Own {
    fn write(&self, generation: Generation, what: What) {
        let read_bytes = self.progress.get().map_or(0, |p| p.read_bytes.load(Ordering::Relaxed));
        let pid = std::process::id();
        let event = Event { time: now(), rank: self.rank, pid, generation, read_bytes, what };
        // what has no text of its own cannot fail to be put into one
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.push(b'\n');
        if let Err(e) = (&self.file).write_all(&line)
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            warn!("{EVENTS_VARIABLE}: an event cannot be written: {e}");
        }
    }
}

/// The time as events have it.
pub(crate) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn shortened(why: &str) -> String {
    why[..why.floor_char_boundary(WHY_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_what_the_module_says() {
        let what = What::Phase { phase: "finishing".into() };
        let (time, read_bytes) = (1763758421.25, 65536);
        let event = Event { time, rank: 1, pid: 4711, generation: 1, read_bytes, what };
        let line = r#"{"time":1763758421.25,"rank":1,"pid":4711,"generation":1,"read_bytes":65536,"event":"phase","phase":"finishing"}"#;
        assert_eq!(serde_json::to_string(&event).unwrap(), line);
        assert_eq!(serde_json::from_str::<Event>(line).unwrap(), event);
    }

    #[test]
    fn every_event_is_read_back() {
        let process = Some(ProcessIdentity { host: "h".into(), pid: 7, start: u64::MAX });
        for what in [
            What::Started { world_size: 2, process },
            What::Joined,
            What::Generation,
            What::Lost { who: 1, why: "killed".into(), who_read_bytes: 9 },
            What::Replaced { who: 1 },
            What::Shrunk { left: 3 },
            What::Complete,
            What::Failed { why: "no".into() },
            What::Ended { why: None },
        ] {
            let event = Event { time: 1.0, rank: 0, pid: 1, generation: 2, read_bytes: 3, what };
            let line = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event, "{line}");
        }
    }

    /// Written at once only if it is short, however long the cause.
    #[test]
    fn a_line_has_room_for_any_reason() {
        let why = shortened(&"\u{1}".repeat(10_000));
        let what = What::Lost { who: u32::MAX, why, who_read_bytes: u64::MAX };
        let (rank, pid, generation) = (u32::MAX, u32::MAX, u64::MAX);
        let event = Event { time: now(), rank, pid, generation, read_bytes: u64::MAX, what };
        assert!(serde_json::to_vec(&event).unwrap().len() < 4096);
        assert_eq!(shortened("äö"), "äö");
        assert!(shortened(&"ä".repeat(400)).len() <= WHY_BYTES_MAX);
    }
}
