//! What is seen of all processes, by one who sees everything at once, and what must hold of it.

use std::net::IpAddr;

use longshore_models::have::Have;
use longshore_rank::protocol::Generation;
use xxhash_rust::xxh3::Xxh3;

use crate::simulation::scenario::Point;

/// Numbers the processes of a run in the order of their starts.
pub(super) type ProcessId = usize;

/// Everything that is seen.
pub(super) struct Watch {
    /// The first thing that must never be.
    pub(super) violation: Option<String>,
    pub(super) processes: Vec<Seen>,
    /// How often each rank has got to each point.
    points: Vec<[u32; POINTS]>,
    /// The answer of each coordinator, named by its process.
    pub(super) answers: Vec<(ProcessId, Result<Generation, String>)>,
    /// What was done, to tell that anything was.
    pub(super) storage_bytes: u64,
    pub(super) handed_on_bytes: u64,
    /// Bytes that came out of what ranks had in former groups.
    pub(super) taken_over_bytes: u64,
    /// How often a rank went on with what it had.
    pub(super) resumed: u32,
    /// The processes of each smaller group that the first has shrunk to, in the order of their numbers in it.
    pub(super) groups: Vec<Vec<ProcessId>>,
    /// How many of the first ranks hold parameters, of the group that has answered.
    pub(super) holders: usize,
    /// Of everything that was seen, in order.
    trace: Xxh3,
}

const POINTS: usize = 11;

/// One process.
#[derive(Debug)]
pub(super) struct Seen {
    /// The rank that it was started as.
    pub(super) rank: u32,
    /// The group that it is in: how often the first one has shrunk to it, and the process's number in it.
    pub(super) place: (usize, u32),
    /// What it had in the first group when that shrank.
    pub(super) had: Have,
    pub(super) host: String,
    pub(super) address: Option<IpAddr>,
    /// The latest generation that it was told of.
    pub(super) generation: Generation,
    /// What it has told in which generation, and in which place.
    announced: Vec<(Generation, (usize, u32), Have)>,
    /// The processes of each generation that it has begun to join.
    rosters: Vec<(Generation, Vec<ProcessId>)>,
    prepared: Vec<Generation>,
    ready: Vec<Generation>,
    pub(super) released: Option<Generation>,
    /// It is gone, by itself or not.
    pub(super) gone: bool,
    /// Why it went, if by itself.
    pub(super) exited: Option<String>,
}

impl Seen {
    /// Its process is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.gone || self.exited.is_some()
    }
}

impl Watch {
    pub(super) fn new(ranks: usize) -> Self {
        Self {
            violation: None,
            processes: Vec::new(),
            points: vec![[0; POINTS]; ranks],
            answers: Vec::new(),
            storage_bytes: 0,
            handed_on_bytes: 0,
            taken_over_bytes: 0,
            groups: Vec::new(),
            holders: 0,
            resumed: 0,
            trace: Xxh3::new(),
        }
    }

    /// A hash of everything that was seen, in order: two runs of one seed have the same.
    pub(super) fn trace(&self) -> u64 {
        self.trace.digest()
    }

    /// Notes something for [`Watch::trace`].
    pub(super) fn note(&mut self, what: &[u64]) {
        what.iter().for_each(|number| self.trace.update(&number.to_le_bytes()));
    }

    /// The first is the one that counts.
    pub(super) fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// A process is started.
    pub(super) fn start(&mut self, rank: u32) -> ProcessId {
        let id = self.processes.len();
        self.processes.push(Seen {
            rank,
            place: (0, rank),
            had: Have::default(),
            host: format!("rank{rank}-{id}"),
            address: None,
            generation: 0,
            announced: Vec::new(),
            rosters: Vec::new(),
            prepared: Vec::new(),
            ready: Vec::new(),
            released: None,
            gone: false,
            exited: None,
        });
        id
    }

    /// How often a rank has got to a point.
    pub(super) fn count(&self, rank: u32, point: Point) -> u32 {
        self.points[rank as usize][point as usize]
    }

    /// A process has got to a point.
    pub(super) fn reach(&mut self, process: ProcessId, point: Point) {
        let rank = self.processes[process].rank;
        self.points[rank as usize][point as usize] += 1;
        self.note(&[process as u64, point as u64]);
    }

    /// A process does what belongs to `generation`.
    ///
    /// # Errors
    /// It was told of a later one.
    pub(super) fn act(&self, process: ProcessId, generation: Generation) -> Result<(), String> {
        let seen = &self.processes[process];
        if generation == seen.generation {
            return Ok(());
        }
        let (host, now) = (&seen.host, seen.generation);
        Err(format!("{host} acts on generation {generation}, it is {now}"))
    }

    /// The coordinator has decided that the group goes on as one of these processes.
    ///
    /// # Errors
    /// One of them is not in the group.
    pub(super) fn shrink(&mut self, processes: Vec<ProcessId>) -> Result<(), String> {
        let group = self.groups.len();
        let other = processes.iter().find(|process| self.processes[**process].place.0 != group);
        let other = other.map(|process| self.processes[*process].host.clone());
        self.groups.push(processes);
        other.map_or(Ok(()), |host| Err(format!("{host} is to go on in a group that it is not of")))
    }

    /// Whether a process is to go on in a smaller group, with a coordinator that is there, and does not yet.
    pub(super) fn goes_on(&self, process: ProcessId, coordinator: ProcessId) -> bool {
        let there = self.processes.get(coordinator).is_some_and(|seen| !seen.is_lost());
        there && self.is_to_go_on(process)
    }

    fn is_to_go_on(&self, process: ProcessId) -> bool {
        let next = self.groups.get(self.processes[process].place.0);
        next.is_some_and(|group| group.contains(&process))
    }

    /// A process takes part in a smaller group.
    pub(super) fn regroup(&mut self, process: ProcessId, place: (usize, u32)) {
        self.reach(process, Point::Regrouped);
        self.processes[process].place = place;
    }

    /// A process was not let in by the coordinator.
    ///
    /// # Errors
    /// That waits for it, to go on in a smaller group with it.
    pub(super) fn is_left_out(
        &self,
        process: ProcessId,
        coordinator: ProcessId,
    ) -> Result<(), String> {
        let Seen { place: (group, number), host, .. } = &self.processes[process];
        let over =
            self.processes.get(coordinator).is_none_or(Seen::is_lost) || !self.answers.is_empty();
        let is_of = |of: usize| self.groups.get(of).is_some_and(|group| group.contains(&process));
        if over || *group < self.groups.len() || !group.checked_sub(1).is_some_and(is_of) {
            return Ok(());
        }
        Err(format!("{host} is not let in as rank {number} of the group that it is of"))
    }

    /// A process acts as one of its group.
    ///
    /// # Errors
    /// The group has gone on without it, or it has another's number.
    fn belong(&self, process: ProcessId) -> Result<(), String> {
        let Seen { place: (group, number), host, .. } = &self.processes[process];
        let Some(of) = group.checked_sub(1) else { return Ok(()) };
        let member = self.groups.get(of).and_then(|group| group.get(*number as usize));
        if member == Some(&process) {
            return Ok(());
        }
        Err(format!("{host} acts as rank {number} of a group in which that is another process"))
    }

    /// A process has told what it has.
    ///
    /// # Errors
    /// It is not one of the group.
    pub(super) fn announce(
        &mut self,
        process: ProcessId,
        generation: Generation,
        have: Have,
    ) -> Result<(), String> {
        self.reach(process, Point::Announced);
        if !have.is_empty() {
            self.resumed += 1;
        }
        let seen = &mut self.processes[process];
        seen.announced.push((generation, seen.place, have));
        self.belong(process)
    }

    /// A process is told who takes part in a generation, and what each has.
    ///
    /// # Errors
    /// One of them never said so, has something else, or others were told differently.
    pub(super) fn meet(
        &mut self,
        process: ProcessId,
        generation: Generation,
        roster: &[IpAddr],
        have: &[Have],
    ) -> Result<(), String> {
        let mut processes = Vec::with_capacity(roster.len());
        for (rank, address) in roster.iter().enumerate() {
            let is_it = |seen: &Seen| seen.address == Some(*address);
            let Some(other) = self.processes.iter().position(is_it) else {
                return Err(format!("nobody is at {address}"));
            };
            let seen = &self.processes[other];
            let group = self.processes[process].place.0;
            let told = seen.announced.iter().rev().find(|(g, ..)| *g == generation);
            let is_this = |(_, place, told): &&(_, _, Have)| {
                *place == (group, rank as u32) && *told == have[rank]
            };
            if told.filter(is_this).is_none() {
                let host = &seen.host;
                return Err(format!("{host} has not told this of generation {generation}"));
            }
            processes.push(other);
        }
        if processes.get(self.processes[process].place.1 as usize) != Some(&process) {
            let host = &self.processes[process].host;
            return Err(format!("{host} is to join a group in which another has its place"));
        }
        for &other in &processes {
            let told = self.processes[other].rosters.iter().find(|(g, _)| *g == generation);
            if told.is_some_and(|(_, told)| *told != processes) {
                return Err(format!("two groups join each other as generation {generation}"));
            }
        }
        self.processes[process].rosters.push((generation, processes));
        self.belong(process)
    }

    /// A process can begin.
    pub(super) fn prepare(&mut self, process: ProcessId, generation: Generation) {
        self.reach(process, Point::Prepared);
        self.processes[process].prepared.push(generation);
    }

    /// A process begins.
    ///
    /// # Errors
    /// Another one is not prepared.
    pub(super) fn begin(
        &mut self,
        process: ProcessId,
        generation: Generation,
    ) -> Result<(), String> {
        self.reach(process, Point::Started);
        self.all(process, generation, "begins, not prepared is", |seen| &seen.prepared)
    }

    /// A process is complete.
    pub(super) fn ready(&mut self, process: ProcessId, generation: Generation) {
        self.reach(process, Point::Ready);
        self.processes[process].ready.push(generation);
    }

    /// A process hands out its parameters.
    ///
    /// # Errors
    /// Another one is not complete in the same generation.
    pub(super) fn release(
        &mut self,
        process: ProcessId,
        generation: Generation,
    ) -> Result<(), String> {
        self.reach(process, Point::Released);
        self.processes[process].released = Some(generation);
        let Seen { place, host, .. } = &self.processes[process];
        if place.0 != self.groups.len() {
            return Err(format!("{host} is released, and was left behind"));
        }
        self.all(process, generation, "is released, not ready is", |seen| &seen.ready)
    }

    fn all(
        &self,
        process: ProcessId,
        generation: Generation,
        does: &str,
        done: impl Fn(&Seen) -> &Vec<Generation>,
    ) -> Result<(), String> {
        let host = &self.processes[process].host;
        let roster = self.roster(process, generation);
        let roster = roster.ok_or_else(|| format!("{host} {does} everybody"))?;
        let all: Vec<&Seen> = roster.iter().map(|p| &self.processes[*p]).collect();
        match all.iter().find(|seen| !done(seen).contains(&generation)) {
            None => Ok(()),
            Some(other) => {
                let other = &other.host;
                Err(format!("{host} {does} {other}, in generation {generation}"))
            }
        }
    }

    /// Who takes part in a generation, as a process was told.
    pub(super) fn roster(
        &self,
        process: ProcessId,
        generation: Generation,
    ) -> Option<&[ProcessId]> {
        let rosters = self.processes[process].rosters.iter().rev();
        rosters.filter(|(g, _)| *g == generation).map(|(_, roster)| &roster[..]).next()
    }
}
