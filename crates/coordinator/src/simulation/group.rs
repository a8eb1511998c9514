//! The group that a process is in, and how it goes over to a smaller one, as `processes::Attempt` has it.

use std::{rc::Rc, sync::Arc};

use longshore_models::have::Have;

use crate::simulation::{base::Base, bug::Bug, job::Held, world::World};

/// A group, as one of its processes knows it.
#[derive(Debug, Clone)]
pub(super) struct Group {
    /// How often the first one has shrunk to it.
    pub(super) number: usize,
    /// The process's number in it.
    pub(super) rank: u32,
    pub(super) ranks: u32,
    /// What it loads.
    pub(super) base: Arc<Base>,
    /// The first one, where this is what is left of it.
    pub(super) before: Option<Before>,
}

/// What goes over from the first group.
#[derive(Debug, Clone)]
pub(super) struct Before {
    pub(super) base: Arc<Base>,
    /// The number there of each rank that is left, in their order.
    pub(super) ranks: Vec<u32>,
    /// What this process had in it.
    pub(super) former: Option<Rc<Former>>,
}

/// What a process had in a former group.
#[derive(Debug)]
pub(super) struct Former {
    /// Its number there.
    pub(super) rank: u32,
    pub(super) held: Rc<Held>,
    pub(super) have: Have,
}

impl Group {
    pub(super) fn first(world: &World, rank: u32) -> Self {
        let base = Arc::clone(&world.base);
        Self { number: 0, rank, ranks: world.scenario.form.ranks, base, before: None }
    }

    /// How many of the first ranks hold parameters.
    pub(super) fn holders(&self) -> u32 {
        self.base.placement().parallel.tp()
    }

    /// What this process had in a former group.
    pub(super) fn former(&self) -> Option<&Rc<Former>> {
        self.before.as_ref()?.former.as_ref()
    }

    /// The group of those that are left, where this process had `former` in this one.
    ///
    /// # Errors
    /// It is not one of them.
    pub(super) fn with_fewer(
        &self,
        world: &World,
        ranks: &[u32],
        former: Option<Former>,
    ) -> Result<Self, String> {
        let mut ranks = ranks.to_vec();
        if world.has(Bug::NumbersOtherwise) && self.rank == 1 {
            ranks[1..].reverse();
        }
        let rank = ranks.iter().position(|rank| *rank == self.rank);
        let rank = rank.ok_or("the group goes on without this rank")? as u32;
        let left = ranks.len() as u32;
        let before = match self.before.clone() {
            None => Before { base: Arc::clone(&self.base), ranks, former: former.map(Rc::new) },
            Some(first) => {
                let ranks = ranks.iter().map(|rank| first.ranks[*rank as usize]).collect();
                Before { ranks, ..first }
            }
        };
        let base = Base::for_fewer(world.scenario.form, left);
        Ok(Self { number: self.number + 1, rank, ranks: left, base, before: Some(before) })
    }
}
