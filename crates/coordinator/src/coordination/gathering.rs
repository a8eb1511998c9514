//! What every rank contributes a piece to, round after round, and who keeps the others waiting in a reload. Pure: pieces and a
//! clock in, what is to be told out.
//!
//! Each rank's first piece belongs to the first round, its second to the second, and so on; it contributes the next one when it
//! was told of the last.
//!
//! 1. A round of a reload is waited for only so long: when its time is over all who have contributed are told who has not. What the
//!    program around asks for takes as long as it likes.
//! 2. A round that was given up is over for all: whoever comes late is told the same, and nobody is told that it is complete.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::processes::message::Piece;

/// The rounds of a group.
#[derive(Debug)]
pub(crate) struct Gathering {
    /// How long a round of a reload may take.
    limit: Duration,
    seats: Vec<Seat>,
}

#[derive(Debug, Default)]
struct Seat {
    piece: Option<(Piece, Instant)>,
    /// Rounds that were given up before this rank came to them, each with the rank that was named.
    late: VecDeque<u32>,
}

/// What is to be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// All have contributed: these pieces, in the order of ranks.
    Complete(Vec<Piece>),
    /// It was given up: to these ranks, as that one does not answer.
    GivenUp { told: Vec<u32>, unanswered: u32, after: Duration },
}

impl Gathering {
    /// Of so many ranks, which hold parameters.
    pub(crate) fn new(holders: u32, limit: Duration) -> Self {
        Self { limit, seats: (0..holders).map(|_| Seat::default()).collect() }
    }

    /// Whether a rank has contributed and waits for others.
    pub(crate) fn is_awaited(&self) -> bool {
        self.seats.iter().any(|seat| seat.piece.is_some())
    }

    /// Another process will be in the place of this rank, or none.
    pub(crate) fn vacate(&mut self, rank: u32) {
        // a rank that holds nothing has no seat
        if let Some(seat) = self.seats.get_mut(rank as usize) {
            *seat = Seat::default();
        }
    }

    /// A rank contributes to its next round.
    pub(crate) fn contributed(&mut self, rank: u32, piece: Piece, now: Instant) -> Option<Round> {
        let seat = self.seats.get_mut(rank as usize)?;
        if let Some(unanswered) = seat.late.pop_front() {
            return Some(Round::GivenUp { told: vec![rank], unanswered, after: self.limit });
        }
        seat.piece = Some((piece, now));
        if !self.seats.iter().all(|seat| seat.piece.is_some()) {
            return None;
        }
        let pieces = self.seats.iter_mut().filter_map(|seat| seat.piece.take());
        Some(Round::Complete(pieces.map(|(piece, _)| piece).collect()))
    }

    /// Time has passed.
    pub(crate) fn look(&mut self, now: Instant) -> Option<Round> {
        let pieces = self.seats.iter().filter_map(|seat| seat.piece.as_ref());
        let first = pieces.filter(|(piece, _)| piece.in_reload).map(|(_, since)| *since).min()?;
        if now.duration_since(first) < self.limit {
            return None;
        }
        let unanswered = self.seats.iter().position(|seat| seat.piece.is_none())? as u32;
        let mut told = Vec::new();
        for (rank, seat) in (0..).zip(&mut self.seats) {
            match seat.piece.take() {
                Some(_) => told.push(rank),
                None => seat.late.push_back(unanswered),
            }
        }
        Some(Round::GivenUp { told, unanswered, after: self.limit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn piece(text: &str, in_reload: bool) -> Piece {
        Piece { bytes: text.into(), wants_all: true, in_reload }
    }

    fn given_up(told: &[u32], unanswered: u32) -> Option<Round> {
        Some(Round::GivenUp { told: told.to_vec(), unanswered, after: LIMIT })
    }

    #[test]
    fn a_round_of_a_reload_is_given_up_for_all_and_the_next_is_whole() {
        let start = Instant::now();
        let mut gathering = Gathering::new(3, LIMIT);
        let vote = || piece("vote", true);
        assert_eq!(gathering.contributed(0, vote(), start), None);
        assert_eq!(gathering.contributed(2, vote(), start + LIMIT / 2), None);
        assert_eq!(gathering.look(start + LIMIT - Duration::from_millis(1)), None);
        assert_eq!(gathering.look(start + LIMIT), given_up(&[0, 2], 1));
        assert!(!gathering.is_awaited());
        assert_eq!(gathering.look(start + 2 * LIMIT), None);
        // the others try again, and the late one comes to what was given up first
        let again = start + 2 * LIMIT;
        assert_eq!(gathering.contributed(0, vote(), again), None);
        assert_eq!(gathering.contributed(1, vote(), again), given_up(&[1], 1));
        assert_eq!(gathering.contributed(2, vote(), again), None);
        let whole = gathering.contributed(1, vote(), again);
        assert_eq!(whole, Some(Round::Complete(vec![vote(), vote(), vote()])));
    }

    /// However often the others have given up meanwhile.
    #[test]
    fn a_rank_catches_up_with_every_round_that_was_given_up() {
        let mut now = Instant::now();
        let mut gathering = Gathering::new(2, LIMIT);
        for _ in 0..3 {
            assert_eq!(gathering.contributed(1, piece("", true), now), None);
            now += LIMIT;
            assert_eq!(gathering.look(now), given_up(&[1], 0));
        }
        for _ in 0..3 {
            assert_eq!(gathering.contributed(0, piece("", true), now), given_up(&[0], 0));
        }
        assert_eq!(gathering.contributed(0, piece("", true), now), None);
        // what is in its place knows nothing of this
        gathering.vacate(0);
        assert!(!gathering.is_awaited());
    }

    #[test]
    fn what_the_program_asks_for_takes_as_long_as_it_likes() {
        let start = Instant::now();
        let mut gathering = Gathering::new(2, LIMIT);
        assert_eq!(gathering.contributed(0, piece("a", false), start), None);
        assert!(gathering.is_awaited());
        assert_eq!(gathering.look(start + 1000 * LIMIT), None);
        let whole = Round::Complete(vec![piece("a", false), piece("b", false)]);
        assert_eq!(gathering.contributed(1, piece("b", false), start + 1000 * LIMIT), Some(whole));
    }
}
