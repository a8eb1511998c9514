//! A seed → world size, checkpoint, timing, and what goes wrong when.

use std::time::Duration;

use crate::simulation::{
    base::{Form, Shape},
    dice::Dice,
};

/// Everything about one run that is not decided as it goes.
#[derive(Debug, Clone)]
pub(super) struct Scenario {
    pub(super) seed: u64,
    pub(super) form: Form,
    /// Reads under way on a rank.
    pub(super) concurrency: u32,
    /// Slots to send from, and to receive into from each other rank.
    pub(super) slots: u32,
    pub(super) replacements_max: u32,
    /// The group goes on without the ranks that it loses.
    pub(super) shrinks: bool,
    /// How long the coordinator, or its successor, is looked for, and ranks are waited for.
    pub(super) join_limit: Duration,
    /// How long processes take at most to start, and to plan for a smaller group.
    pub(super) late_millis: u64,
    pub(super) planning_millis: u64,
    pub(super) silent_after: Duration,
    /// How long a read takes at most.
    pub(super) read_millis: u64,
    pub(super) latency_millis: u64,
    pub(super) faults: Vec<(When, Fault)>,
}

/// When a fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    At(Duration),
    /// So long after a process of this rank has got there for the so-many-th time.
    Reached(u32, Point, u32, Duration),
}

/// Where a rank has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    Announced,
    Prepared,
    Started,
    Read,
    Received,
    Finished,
    Ready,
    Released,
    Orphaned,
    HandedOver,
    Regrouped,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The rank's process ends and its memory with it; `silently`: its host as well, so that nobody is told. Another comes in its
    /// place after a while, or never.
    Crash { rank: u32, silently: bool, back: Option<Duration> },
    /// The process stands still, its memory and connections do not go away; another may come in its place meanwhile.
    Pause { rank: u32, lasting: Duration, replaced: Option<Duration> },
    /// What two ranks say to each other comes late.
    Hold { a: u32, b: u32, lasting: Duration },
    /// What they say is lost.
    Cut { a: u32, b: u32, lasting: Duration },
    /// What one says to the other is lost.
    Mute { from: u32, to: u32, lasting: Duration },
    /// The connection over which a rank sends bytes next breaks, and nothing else.
    Break { rank: u32 },
    /// A read of this rank fails.
    StorageFails { rank: u32 },
    /// The reads of this rank return only afterwards.
    StorageHangs { rank: u32, lasting: Duration },
    /// They take so many times as long.
    StorageSlow { rank: u32, times: u32, lasting: Duration },
}

impl Scenario {
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed, "scenario", 0);
        let ranks = dice.pick(&[1, 2, 2, 2, 4, 4, 4, 8]);
        let form = Form {
            shape: dice.pick(&[Shape::Dense, Shape::Dense, Shape::Experts, Shape::Latent]),
            ranks,
            exchange: dice.chance(85),
            read_bytes: dice.pick(&[1 << 10, 2 << 10, 4 << 10, 16 << 10]),
        };
        let forgiving = dice.chance(85);
        let count = dice.pick(&[0, 1, 1, 2, 2, 3, 4, 6, 8]);
        let mut faults: Vec<(When, Fault)> = Vec::with_capacity(count);
        for _ in 0..count {
            // two at once are another thing than one after the other
            let together = faults.last().filter(|_| dice.chance(25)).map(|(when, _)| *when);
            let when = together.unwrap_or_else(|| when(&mut dice, ranks));
            faults.push((when, fault(&mut dice, ranks, forgiving)));
        }
        let scenario = Self {
            seed,
            form,
            concurrency: dice.pick(&[1, 2, 3]),
            slots: dice.pick(&[1, 2, 4]),
            // what is simulated for as long as it takes has no limit that could be met
            replacements_max: if forgiving { 1000 } else { dice.pick(&[0, 1, 2]) },
            shrinks: false,
            join_limit: Duration::from_secs(20),
            late_millis: 200,
            planning_millis: 0,
            silent_after: Duration::from_millis(dice.pick(&[500, 1000])),
            read_millis: dice.pick(&[5, 20, 60]),
            latency_millis: dice.pick(&[2, 10, 40]),
            faults,
        };
        let mut dice = Dice::new(seed, "group", 0);
        if ranks > 1 && dice.chance(SHRINKING) { scenario.shrinking(&mut dice) } else { scenario }
    }

    /// The same, of a group that goes on without the ranks that it loses. Nobody comes in rank 0's place.
    fn shrinking(self, dice: &mut Dice) -> Self {
        let ranks = dice.pick(&[2, 4, 4, 4, 8]);
        let count = dice.pick(&[1, 2, 2, 3, 3, 4, 6]);
        let mut faults: Vec<(When, Fault)> = Vec::with_capacity(count);
        for _ in 0..count {
            let together = faults.last().filter(|_| dice.chance(25)).map(|(when, _)| *when);
            let when = together.unwrap_or_else(|| when_shrinking(dice, ranks, !faults.is_empty()));
            faults.push((when, loss(dice, ranks)));
        }
        let form = Form { ranks, ..self.form };
        // short enough that some miss it: some storage hangs for longer
        let join_limit = Duration::from_secs(6);
        let (late_millis, planning_millis) = (dice.pick(&[200, 200, 1500]), dice.pick(&[20, 1000]));
        // longer than some goodbyes are waited for
        let silent_after = Duration::from_millis(dice.pick(&[500, 1000, 1000, 3000]));
        Self {
            form,
            silent_after,
            faults,
            shrinks: true,
            join_limit,
            late_millis,
            planning_millis,
            ..self
        }
    }

    /// Whether the load may come to nothing: losses may be more than are allowed, or a replacement may not come.
    pub(super) fn may_fail(&self) -> bool {
        self.replacements_max < 1000
    }

    /// Whether anything that is said may be lost: a connection that has lost something is reset later.
    pub(super) fn loses_messages(&self) -> bool {
        let loses = |fault: &Fault| matches!(fault, Fault::Cut { .. } | Fault::Mute { .. });
        self.faults.iter().any(|(_, fault)| loses(fault))
    }
}

/// Of a hundred groups of several ranks, so many go on without those that they lose.
const SHRINKING: u64 = 30;

fn when(dice: &mut Dice, ranks: u32) -> When {
    if dice.chance(25) {
        return When::At(dice.millis(0, 1500));
    }
    let points = [
        Point::Announced,
        Point::Prepared,
        Point::Started,
        Point::Read,
        Point::Read,
        Point::Received,
        Point::Received,
        Point::Finished,
        Point::Ready,
        Point::Ready,
        Point::Released,
        Point::Orphaned,
    ];
    let (point, rank) = (dice.pick(&points), dice.below(ranks.into()) as u32);
    let often = match point {
        Point::Read | Point::Received | Point::Finished => 1 + dice.below(20) as u32,
        Point::Released => 1,
        _ => dice.pick(&[1, 1, 2, 2, 3, 4]),
    };
    let later = if dice.chance(60) { Duration::ZERO } else { dice.millis(1, 150) };
    When::Reached(rank, point, often, later)
}

/// As [`when`], not after the end; `later`: often while a group gives way to a smaller one.
fn when_shrinking(dice: &mut Dice, ranks: u32, later: bool) -> When {
    if dice.chance(20) {
        return When::At(dice.millis(0, 1500));
    }
    let points = [
        Point::Announced,
        Point::Prepared,
        Point::Started,
        Point::Read,
        Point::Read,
        Point::Received,
        Point::Received,
        Point::Finished,
        Point::Ready,
    ];
    let point = match later && dice.chance(40) {
        true => dice.pick(&[Point::HandedOver, Point::Regrouped]),
        false => dice.pick(&points),
    };
    let often = match point {
        Point::Read | Point::Received | Point::Finished => 1 + dice.below(8) as u32,
        Point::HandedOver | Point::Regrouped => dice.pick(&[1, 1, 2]),
        _ => 1,
    };
    let after = if dice.chance(50) { Duration::ZERO } else { dice.millis(1, 400) };
    When::Reached(dice.below(ranks.into()) as u32, point, often, after)
}

/// As [`fault`]: most often of one that the group can do without, in whose place another seldom comes.
fn loss(dice: &mut Dice, ranks: u32) -> Fault {
    let rank = if dice.chance(8) { 0 } else { 1 + dice.below(u64::from(ranks) - 1) as u32 };
    let other = dice.below(ranks.into()) as u32;
    let replaced = rank > 0 && dice.chance(25);
    match dice.below(100) {
        0..45 => {
            let back = replaced.then(|| dice.millis(20, 2500));
            Fault::Crash { rank, silently: dice.chance(25), back }
        }
        45..58 => {
            let replaced = replaced.then(|| dice.millis(50, 2000));
            Fault::Pause { rank, lasting: dice.millis(50, 5000), replaced }
        }
        58..63 => Fault::Hold { a: rank, b: other, lasting: dice.millis(50, 2500) },
        63..69 => Fault::Cut { a: rank, b: other, lasting: dice.millis(20, 2500) },
        69..72 => Fault::Mute { from: rank, to: other, lasting: dice.millis(20, 2500) },
        72..75 => Fault::Mute { from: other, to: rank, lasting: dice.millis(20, 2500) },
        75..78 => Fault::Break { rank },
        78..89 => Fault::StorageFails { rank },
        89..97 => Fault::StorageHangs { rank, lasting: dice.millis(200, 6000) },
        _ => {
            Fault::StorageSlow { rank, times: dice.pick(&[3, 20]), lasting: dice.millis(200, 2000) }
        }
    }
}

fn fault(dice: &mut Dice, ranks: u32, forgiving: bool) -> Fault {
    // rank 0's process is the coordinator's as well
    let rank = if dice.chance(25) { 0 } else { dice.below(ranks.into()) as u32 };
    let other = dice.below(ranks.into()) as u32;
    match dice.below(100) {
        0..40 => {
            let never = !forgiving && dice.chance(30);
            let back = (!never).then(|| dice.millis(20, 2500));
            Fault::Crash { rank, silently: dice.chance(25), back }
        }
        40..60 => {
            let replaced = dice.chance(75).then(|| dice.millis(50, 2000));
            Fault::Pause { rank, lasting: dice.millis(50, 5000), replaced }
        }
        60..70 => Fault::Hold { a: rank, b: other, lasting: dice.millis(50, 2500) },
        70..75 => Fault::Cut { a: rank, b: other, lasting: dice.millis(20, 2500) },
        75..79 => Fault::Mute { from: rank, to: other, lasting: dice.millis(20, 2500) },
        79..82 => Fault::Break { rank },
        82..89 => Fault::StorageFails { rank },
        89..95 => Fault::StorageHangs { rank, lasting: dice.millis(200, 6000) },
        _ => {
            Fault::StorageSlow { rank, times: dice.pick(&[3, 20]), lasting: dice.millis(200, 2000) }
        }
    }
}
