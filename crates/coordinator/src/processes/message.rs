//! What goes over the control link. The words are those of `longshore_rank::protocol`, without what only has a meaning within
//! one process.

use longshore_rank::protocol::{Endpoint, Generation, RankCommand, RankReport};
use serde::{Deserialize, Serialize};

/// Bytes of a plan's hash.
pub(crate) const PLAN_HASH_BYTES: usize = 16;

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
    /// Every rank has contributed its piece: all of them, in the order of ranks, where the rank has asked for them.
    Gathered(Vec<Vec<u8>>),
}

impl ToRank {
    /// The command as the rank's actor knows it; `None` for what is not its business.
    pub(crate) fn command(self) -> Option<RankCommand> {
        Some(match self {
            ToRank::Allocate { generation } => RankCommand::Allocate { generation },
            ToRank::Load { generation, roster } => {
                let peers = longshore_rank::protocol::Peers::Apart(roster.into());
                RankCommand::Load { generation, peers }
            }
            ToRank::Start { generation } => RankCommand::Start { generation },
            ToRank::Abort { generation, why } => RankCommand::Abort { generation, why },
            ToRank::Release { generation } => RankCommand::Release { generation },
            ToRank::Gathered(_) => return None,
        })
    }
}

/// From a rank to the coordinator.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum ToCoordinator {
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
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Piece {
    /// What it tells.
    pub(crate) bytes: Vec<u8>,
    /// Whether it wants to be told all pieces, not only that they are there.
    pub(crate) wants_all: bool,
}

/// What happened on a rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Happened {
    /// Parameters are allocated.
    Allocated {
        /// How others reach it.
        endpoint: Endpoint,
        /// The plan that it will carry out.
        plan: [u8; PLAN_HASH_BYTES],
    },
    /// It can begin.
    Prepared,
    /// It is complete.
    Ready(RankReport),
    /// It gave up.
    Failed {
        /// The error and all causes.
        text: String,
        /// Whether the user can mend it.
        refused: bool,
        /// The rank that it could not go on without.
        blames: Option<u32>,
    },
}
