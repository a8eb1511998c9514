//! What goes over the control link. The words are those of `longshore_rank::protocol`, without what only has a meaning within
//! one process.

use std::time::Duration;

use longshore_models::have::Have;
use longshore_rank::protocol::{Endpoint, Generation, PlanName, RankCommand, RankReport};
use serde::{Deserialize, Serialize};

/// From the coordinator to a rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum ToRank {
    /// [`RankCommand::Allocate`].
    Allocate {
        /// The generation.
        generation: Generation,
    },
    /// [`RankCommand::Load`].
    Load {
        /// The generation.
        generation: Generation,
        /// All ranks.
        roster: Vec<Endpoint>,
        /// What each of them has.
        have: Vec<Have>,
    },
    /// [`RankCommand::Start`].
    Start {
        /// The generation.
        generation: Generation,
    },
    /// [`RankCommand::Abort`].
    Abort {
        /// The generation.
        generation: Generation,
        /// Why.
        why: String,
    },
    /// [`RankCommand::Release`].
    Release {
        /// The generation.
        generation: Generation,
    },
    /// [`RankCommand::HandOver`].
    HandOver {
        /// The generation.
        generation: Generation,
    },
    /// The group goes on as another one, of these of its ranks, in this order.
    Shrink {
        /// Their numbers here.
        ranks: Vec<u32>,
    },
    /// The group goes on without this process: it ends.
    Dismissed {
        /// Why.
        why: String,
    },
    /// Every rank has contributed its piece: all of them, in the order of ranks, where the rank has asked for them.
    Gathered(Vec<Vec<u8>>),
    /// What was gathered for a reload was given up on all ranks.
    NotGathered {
        /// The rank that has not contributed.
        unanswered: u32,
        /// How long it was waited for.
        after: Duration,
    },
}

impl ToRank {
    /// The command as the rank's actor knows it; `None` for what is not its business.
    pub(crate) fn command(self) -> Option<RankCommand> {
        Some(match self {
            ToRank::Allocate { generation } => RankCommand::Allocate { generation },
            ToRank::Load { generation, roster, have } => {
                let peers = longshore_rank::protocol::Peers::Apart(roster.into());
                RankCommand::Load { generation, peers, have: have.into() }
            }
            ToRank::Start { generation } => RankCommand::Start { generation },
            ToRank::Abort { generation, why } => RankCommand::Abort { generation, why },
            ToRank::Release { generation } => RankCommand::Release { generation },
            ToRank::HandOver { generation } => RankCommand::HandOver { generation },
            ToRank::Shrink { .. } | ToRank::Dismissed { .. } => return None,
            ToRank::Gathered(_) | ToRank::NotGathered { .. } => return None,
        })
    }
}

/// From a rank to the coordinator.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum ToCoordinator {
    /// It was in this generation under another coordinator.
    Knows {
        /// The generation.
        generation: Generation,
    },
    /// Something happened in a load.
    Event {
        /// The generation that it speaks of.
        generation: Generation,
        /// What happened.
        what: Happened,
    },
    /// Its piece of what is gathered.
    Contributed(Piece),
}

/// What one rank contributes to what is gathered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Piece {
    /// What it tells.
    pub(crate) bytes: Vec<u8>,
    /// Whether it wants to be told all pieces, not only that they are there.
    pub(crate) wants_all: bool,
    /// Whether it is part of a reload: then it is not waited for without end.
    pub(crate) in_reload: bool,
}

/// What happened on a rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Happened {
    /// Parameters are allocated.
    Allocated {
        /// How others reach it.
        endpoint: Endpoint,
        /// The plan of the whole load.
        plan: PlanName,
        /// What has landed in them.
        have: Have,
    },
    /// It can begin.
    Prepared {
        /// To carry out this plan.
        plan: PlanName,
    },
    /// It is complete.
    Ready(RankReport),
    /// It gave up.
    Failed {
        /// The error and all causes.
        text: String,
        /// Whether the user can mend it.
        refused: bool,
        /// Whether no other process in its place would fare better.
        lasting: bool,
        /// The rank that it could not go on without.
        blames: Option<u32>,
    },
}
