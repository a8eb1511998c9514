//! Sets of ranks by number: few are different, and runs that refer to them are many.

use std::{collections::HashMap, ops::Index};

use longshore_models::have::RankSet;

/// Number of a set.
pub(super) type SetId = u32;

/// Sets, each once; the first is empty.
#[derive(Debug)]
pub(super) struct Sets {
    sets: Vec<RankSet>,
    ids: HashMap<RankSet, SetId>,
    unions: HashMap<(SetId, SetId), SetId>,
}

impl Default for Sets {
    fn default() -> Self {
        let mut this =
            Self { sets: Vec::new(), ids: HashMap::default(), unions: HashMap::default() };
        this.id(&RankSet::default());
        this
    }
}

impl Sets {
    /// The empty set.
    pub(super) const EMPTY: SetId = 0;

    /// The number of `set`.
    pub(super) fn id(&mut self, set: &RankSet) -> SetId {
        if let Some(id) = self.ids.get(set) {
            return *id;
        }
        let id = self.sets.len() as SetId;
        self.sets.push(set.clone());
        self.ids.insert(set.clone(), id);
        id
    }

    /// The ranks that are in `a` or in `b`.
    pub(super) fn union(&mut self, a: SetId, b: SetId) -> SetId {
        if a == b {
            return a;
        }
        if let Some(id) = self.unions.get(&(a, b)) {
            return *id;
        }
        let union = self[a].iter().chain(self[b].iter()).collect();
        let id = self.id(&union);
        self.unions.insert((a, b), id);
        id
    }

    /// All sets, in the order of their numbers.
    pub(super) fn into_vec(self) -> Vec<RankSet> {
        self.sets
    }
}

impl Index<SetId> for Sets {
    type Output = RankSet;

    fn index(&self, id: SetId) -> &RankSet {
        &self.sets[id as usize]
    }
}
