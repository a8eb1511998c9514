//! The events of one run: read as they come, and what they tell.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::PathBuf,
};

use serde::Serialize;

use crate::{
    events::{Event, What},
    fence::ProcessIdentity,
};

/// How far a rank's process is, as seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// From its start until it begins to read: it plans, joins, waits for the others.
    Joining,
    /// Until its own reads are done.
    Reading,
    /// Until it is complete.
    Finishing,
    /// Until it leaves the group.
    Ready,
}

impl Stage {
    /// All of them, in their order.
    pub const ALL: [Stage; 4] = [Stage::Joining, Stage::Reading, Stage::Finishing, Stage::Ready];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Joining => "joining",
            Stage::Reading => "reading",
            Stage::Finishing => "finishing",
            Stage::Ready => "ready",
        }
    }

    /// The stage with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| stage.name() == name)
    }
}

/// A file of events that others append to.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: Option<File>,
    /// The beginning of a line whose end has not come.
    partial: Vec<u8>,
    pub(super) events: Events,
}

impl Log {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, file: None, partial: Vec::new(), events: Events::default() }
    }

    /// Takes in what has come since the last time.
    pub(super) fn read(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                opened => self.file = Some(opened?),
            }
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        file.read_to_end(&mut self.partial)?;
        let Some(end) = self.partial.iter().rposition(|byte| *byte == b'\n') else { return Ok(()) };
        let rest = self.partial.split_off(end + 1);
        let lines = std::mem::replace(&mut self.partial, rest);
        // what is no event is not of this program
        let events =
            lines.split(|byte| *byte == b'\n').filter_map(|l| serde_json::from_slice(l).ok());
        self.events.0.extend(events);
        Ok(())
    }
}

/// What has happened in a run.
#[derive(Debug, Default)]
pub(super) struct Events(pub(super) Vec<Event>);

/// One process of a rank, by what it has told.
#[derive(Debug)]
pub(super) struct Life<'a> {
    pub(super) started: f64,
    pub(super) pid: u32,
    pub(super) process: Option<&'a ProcessIdentity>,
    /// When it has last met a coordinator.
    pub(super) joined: Option<f64>,
    /// When it entered which stage; the first is joining.
    stages: Vec<(Stage, f64)>,
    pub(super) ended: Option<f64>,
}

impl Life<'_> {
    /// How far it is.
    pub(super) fn stage(&self) -> Stage {
        self.stages.last().map_or(Stage::Joining, |(stage, _)| *stage)
    }

    /// How far it was at `time`.
    pub(super) fn stage_at(&self, time: f64) -> Stage {
        let before = self.stages.iter().rfind(|(_, entered)| *entered <= time);
        before.map_or(Stage::Joining, |(stage, _)| *stage)
    }

    /// When it entered the stage that it is in.
    pub(super) fn entered(&self) -> f64 {
        self.stages.last().map_or(self.started, |(_, entered)| *entered)
    }

    /// How long each stage took that it has left.
    pub(super) fn durations(&self) -> impl Iterator<Item = (Stage, f64)> {
        let ends =
            self.stages.iter().skip(1).map(|(_, entered)| Some(*entered)).chain([self.ended]);
        self.stages.iter().zip(ends).filter_map(|((stage, from), to)| Some((*stage, to? - from)))
    }
}

impl Events {
    /// Ranks of the group; 0: none has begun.
    pub(super) fn world_size(&self) -> u32 {
        let sizes = self.0.iter().filter_map(|event| match &event.what {
            What::Started { world_size, .. } => Some(*world_size),
            _ => None,
        });
        sizes.max().unwrap_or(0)
    }

    /// Every process that ranks had.
    pub(super) fn processes(&self) -> impl Iterator<Item = (u32, &ProcessIdentity)> {
        self.0.iter().filter_map(|event| match &event.what {
            What::Started { process, .. } => Some((event.rank, process.as_ref()?)),
            _ => None,
        })
    }

    /// The last process of a rank.
    pub(super) fn life(&self, rank: u32) -> Option<Life<'_>> {
        let starts =
            |event: &Event| matches!(event.what, What::Started { .. }) && event.rank == rank;
        let at = self.0.iter().rposition(starts)?;
        Some(self.life_from(at))
    }

    /// The process of `rank` with this number.
    pub(super) fn life_of(&self, rank: u32, pid: u32) -> Option<Life<'_>> {
        let starts = |event: &Event| {
            matches!(event.what, What::Started { .. }) && (event.rank, event.pid) == (rank, pid)
        };
        let at = self.0.iter().rposition(starts)?;
        Some(self.life_from(at))
    }

    fn life_from(&self, at: usize) -> Life<'_> {
        let first = &self.0[at];
        let process = match &first.what {
            What::Started { process, .. } => process.as_ref(),
            _ => None,
        };
        let (started, pid) = (first.time, first.pid);
        let stages = vec![(Stage::Joining, started)];
        let mut life = Life { started, pid, process, joined: None, stages, ended: None };
        for event in self.0[at..].iter().filter(|e| (e.rank, e.pid) == (first.rank, first.pid)) {
            match &event.what {
                What::Joined => life.joined = Some(event.time),
                What::Ended { .. } => {
                    life.ended.get_or_insert(event.time);
                }
                What::Phase { phase } => {
                    let stage = Stage::named(phase).unwrap_or(Stage::Joining);
                    if stage != life.stage() {
                        life.stages.push((stage, event.time));
                    }
                }
                _ => {}
            }
        }
        life
    }

    /// When the load was last complete.
    pub(super) fn complete(&self) -> Option<f64> {
        self.0.iter().rfind(|event| event.what == What::Complete).map(|event| event.time)
    }

    /// When it was first noticed that what was done to `rank` at `time` has cost it its process `pid`: its coordinator says
    /// so, or the load has failed, or another process begins in its place.
    pub(super) fn noticed(&self, rank: u32, pid: u32, time: f64) -> Option<f64> {
        let notices = |event: &&Event| {
            event.time >= time
                && match &event.what {
                    What::Lost { who, .. } => *who == rank,
                    What::Started { .. } => event.rank == rank && event.pid != pid,
                    What::Failed { .. } => true,
                    _ => false,
                }
        };
        self.0.iter().filter(notices).map(|event| event.time).reduce(f64::min)
    }

    /// Whether there is somebody who waits for what the rank says: of the coordinator's any other that has met it, of the others
    /// the coordinator that there is now.
    pub(super) fn is_heard_of(&self, rank: u32) -> bool {
        let since = self.life(0).map_or(f64::INFINITY, |coordinator| coordinator.started);
        let has_met = |rank| {
            let joined = self.life(rank).and_then(|life| life.joined);
            joined.is_some_and(|joined| joined >= since)
        };
        match rank {
            0 => (1..self.world_size()).any(has_met),
            rank => has_met(rank),
        }
    }

    /// Whether another process than `pid` has joined as `rank` since `time`.
    pub(super) fn is_replaced(&self, rank: u32, pid: u32, time: f64) -> bool {
        let joins = |event: &Event| {
            event.what == What::Joined
                && event.rank == rank
                && event.pid != pid
                && event.time >= time
        };
        self.0.iter().any(joins)
    }

    /// Weight bytes that all processes together have asked of storage, as far as they have told, or their coordinator did.
    pub(super) fn read_bytes(&self) -> u64 {
        let mut current: BTreeMap<u32, u32> = BTreeMap::new();
        let mut read: BTreeMap<(u32, u32), u64> = BTreeMap::new();
        let mut note = |rank, pid, bytes: u64| {
            let known = read.entry((rank, pid)).or_default();
            *known = bytes.max(*known);
        };
        for event in &self.0 {
            match &event.what {
                What::Started { .. } => {
                    current.insert(event.rank, event.pid);
                }
                What::Lost { who, who_read_bytes, .. } => {
                    if let Some(pid) = current.get(who) {
                        note(*who, *pid, *who_read_bytes);
                    }
                }
                _ => {}
            }
            note(event.rank, event.pid, event.read_bytes);
        }
        read.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, io::Write};

    use super::*;

    fn event(time: f64, rank: u32, pid: u32, read_bytes: u64, what: What) -> Event {
        Event { time, rank, pid, generation: 1, read_bytes, what }
    }

    fn started() -> What {
        What::Started { world_size: 2, process: None }
    }

    fn phase(name: &str) -> What {
        What::Phase { phase: name.into() }
    }

    /// Rank 1 is killed while it reads.
    fn replaced() -> Events {
        let lost = What::Lost { who: 1, why: String::new(), who_read_bytes: 30 };
        Events(vec![
            event(0.0, 0, 10, 0, started()),
            event(0.0, 1, 11, 0, started()),
            event(1.0, 1, 11, 0, What::Joined),
            event(1.5, 1, 11, 0, phase("waiting")),
            event(2.0, 1, 11, 0, phase("reading")),
            event(2.0, 0, 10, 0, phase("reading")),
            event(3.0, 0, 10, 60, lost),
            event(3.5, 1, 12, 0, started()),
            event(4.0, 1, 12, 0, What::Joined),
            event(5.0, 1, 12, 0, phase("reading")),
            event(6.0, 1, 12, 50, phase("finishing")),
            event(7.0, 0, 10, 60, What::Complete),
            event(8.0, 1, 12, 50, What::Ended { why: None }),
        ])
    }

    #[test]
    fn a_rank_is_its_last_process_and_each_process_has_its_stages() {
        let events = replaced();
        let last = events.life(1).unwrap();
        assert_eq!((last.pid, last.stage(), last.ended), (12, Stage::Finishing, Some(8.0)));
        let durations: Vec<_> = last.durations().collect();
        let wanted = [(Stage::Joining, 1.5), (Stage::Reading, 1.0), (Stage::Finishing, 2.0)];
        assert_eq!(durations, wanted);
        let first = events.life_of(1, 11).unwrap();
        assert_eq!((first.stage_at(1.9), first.stage_at(2.5)), (Stage::Joining, Stage::Reading));
        assert_eq!((first.entered(), first.joined, first.ended), (2.0, Some(1.0), None));
        assert!(events.life(2).is_none());
        assert!(events.is_heard_of(0) && events.is_heard_of(1) && !events.is_heard_of(2));
        // it has not joined another coordinator than the first
        let mut orphan = events;
        orphan.0.push(event(9.0, 0, 13, 0, started()));
        assert!(!orphan.is_heard_of(0) && !orphan.is_heard_of(1));
    }

    #[test]
    fn a_loss_is_noticed_by_whoever_tells_first() {
        let events = replaced();
        assert_eq!(events.noticed(1, 11, 2.5), Some(3.0));
        assert_eq!(events.noticed(1, 11, 3.2), Some(3.5), "the launcher has");
        assert_eq!(events.noticed(0, 10, 2.5), None);
        assert!(events.is_replaced(1, 11, 2.5) && !events.is_replaced(0, 10, 2.5));
    }

    #[test]
    fn what_a_lost_process_had_read_counts() {
        assert_eq!(replaced().read_bytes(), 60 + 30 + 50);
    }

    #[test]
    fn lines_are_taken_when_they_are_whole_and_understood() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("events");
        let mut log = Log::new(path.clone());
        log.read().unwrap();
        let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        let line = serde_json::to_string(&event(1.0, 0, 1, 0, What::Joined)).unwrap();
        let (begin, end) = line.split_at(20);
        file.write_all(format!("{line}\nnonsense\n{begin}").as_bytes()).unwrap();
        log.read().unwrap();
        assert_eq!(log.events.0.len(), 1);
        file.write_all(format!("{end}\n").as_bytes()).unwrap();
        log.read().unwrap();
        assert_eq!(log.events.0.len(), 2);
        assert_eq!(log.events.0[0], log.events.0[1]);
    }
}
