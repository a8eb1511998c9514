//! What all processes of one run share: nothing that they could tell each other by, only what is done to them and what is
//! seen of them.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use longshore_models::have::Have;
use longshore_rank::{
    error::RankError,
    protocol::{LoadPlan, PlanName, Read, ReadFrom},
};
use tokio::time::sleep;

use crate::{
    assignment::FormerGroup,
    link::session::Timing,
    plan::plan_hash,
    simulation::{
        base::Base,
        bug::Bug,
        dice::Dice,
        group::{Before, Group},
        scenario::Scenario,
        watch::{ProcessId, Watch},
    },
};

/// One run.
pub(super) struct World {
    pub(super) scenario: Scenario,
    /// What is loaded, by the first group.
    pub(super) base: Arc<Base>,
    bug: Option<Bug>,
    pub(super) watch: RefCell<Watch>,
    /// Of each rank what its storage does.
    pub(super) storage: RefCell<Vec<Storage>>,
    /// Where each rank is looked for: its latest process, if it ever had one.
    pub(super) latest: RefCell<Vec<ProcessId>>,
    /// Of each rank whether the next connection that it sends over breaks.
    pub(super) breaks: RefCell<Vec<bool>>,
    /// As of the last step.
    pub(super) now: Cell<Duration>,
    plans: RefCell<Vec<Planned>>,
}

/// A plan, and what it was made from: who is left of the first group, and what each rank has.
type Planned = (Vec<u32>, Vec<Have>, Arc<LoadPlan>, PlanName);

/// The storage as one rank meets it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Storage {
    pub(super) next_fails: bool,
    pub(super) hangs_until: Duration,
    pub(super) slow_until: Duration,
    pub(super) slow_times: u32,
}

impl World {
    pub(super) fn new(scenario: Scenario, bug: Option<Bug>) -> Rc<Self> {
        let ranks = scenario.form.ranks as usize;
        Rc::new(Self {
            base: Base::of(scenario.form),
            watch: RefCell::new(Watch::new(ranks)),
            storage: RefCell::new(vec![Storage::default(); ranks]),
            latest: RefCell::new(vec![ProcessId::MAX; ranks]),
            breaks: RefCell::new(vec![false; ranks]),
            now: Cell::default(),
            plans: RefCell::default(),
            bug,
            scenario,
        })
    }

    /// Whether this bug is planted.
    pub(super) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// Of the first group.
    pub(super) fn ranks(&self) -> u32 {
        self.scenario.form.ranks
    }

    pub(super) fn timing(&self) -> Timing {
        let silent_after = self.scenario.silent_after;
        Timing { beat_every: silent_after / 10, silent_after }
    }

    /// Something that must never be has been.
    pub(super) fn violate(&self, what: impl Into<String>) {
        let now = self.now.get();
        self.watch.borrow_mut().violate(format!("after {now:?}: {}", what.into()));
    }

    /// Notes a violation, if there is one.
    pub(super) fn holds(&self, checked: Result<(), String>) {
        if let Err(what) = checked {
            self.violate(what);
        }
    }

    /// Starts a task of the process that this is called in; a panic in it is a violation.
    pub(super) fn spawn(
        self: &Rc<Self>,
        task: impl Future<Output = ()> + 'static,
    ) -> tokio::task::AbortHandle {
        let guard = NoPanic(Rc::clone(self));
        let guarded = async move {
            let _guard = guard;
            task.await;
        };
        tokio::task::spawn_local(guarded).abort_handle()
    }

    /// The plan of what is left, as every rank makes it; made once, since all make the same.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn plan(
        &self,
        group: &Group,
        have: &[Have],
    ) -> Result<(Arc<LoadPlan>, PlanName), RankError> {
        let Group { base, before, .. } = group;
        let left = before.as_ref().map_or(&[][..], |before| &before.ranks);
        if left.is_empty() && have.iter().all(Have::is_empty) {
            return Ok((Arc::clone(&base.plan.load), base.name));
        }
        let known = |(of, had, ..): &&Planned| of == left && had == have;
        if let Some((.., plan, name)) = self.plans.borrow().iter().find(known) {
            return Ok((Arc::clone(plan), *name));
        }
        let rest = match before {
            None => base.plan.rest(have),
            Some(before) => base.plan.after(&before.base.plan, left, have),
        };
        let rest = rest.map_err(|e| RankError::Rest(e.line()))?;
        if let Some(before) = before {
            self.check_not_read_again(group, before, &rest);
        }
        let (name, rest) = (plan_hash(&rest), Arc::new(rest));
        self.plans.borrow_mut().push((left.to_vec(), have.to_vec(), Arc::clone(&rest), name));
        Ok((rest, name))
    }

    /// Nothing is read that a rank that is left had as it is in the file.
    fn check_not_read_again(&self, group: &Group, before: &Before, plan: &LoadPlan) {
        if !plan.exchange {
            return;
        }
        let had: Vec<Have> = {
            let watch = self.watch.borrow();
            let members = watch.groups[group.number - 1].iter();
            members.map(|process| watch.processes[*process].had.clone()).collect()
        };
        if had.len() != before.ranks.len() {
            return;
        }
        let former = FormerGroup::new(before.base.placement(), &before.ranks, &had);
        let stored = plan.reads.iter().flatten().filter(|read| read.from == ReadFrom::Storage);
        for read in stored {
            for range in plan.checkpoint.cut(read.file, read.range, CHECKED_BYTES) {
                let having = former.having(&plan.checkpoint, read.file, range);
                if let Some(rank) = having.iter().next() {
                    self.violate(format!("{range} is read again, which rank {rank} had"));
                }
            }
        }
    }

    /// Waits until storage has answered a read of `rank`.
    ///
    /// # Errors
    /// It has failed.
    pub(super) async fn storage(
        &self,
        rank: u32,
        read: &Read,
        dice: &mut Dice,
    ) -> Result<(), RankError> {
        let mut times = 1;
        {
            let storage = &mut self.storage.borrow_mut()[rank as usize];
            if std::mem::take(&mut storage.next_fails) {
                return Err(RankError::Read {
                    file: "simulated".to_owned(),
                    offset: read.range.start,
                    bytes: read.range.len(),
                    source: io::Error::other("the disk is on fire"),
                });
            }
            if self.now.get() < storage.slow_until {
                times = storage.slow_times;
            }
        }
        sleep(dice.millis(1, self.scenario.read_millis) * times).await;
        loop {
            let until = self.storage.borrow()[rank as usize].hangs_until;
            if self.now.get() >= until {
                return Ok(());
            }
            sleep(until - self.now.get()).await;
        }
    }
}

/// Whether bytes are read again is looked at in pieces of so many: a row of most tensors.
const CHECKED_BYTES: u64 = 128;

struct NoPanic(Rc<World>);

impl Drop for NoPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.violate("a task has panicked");
        }
    }
}
