//! What is done to which rank, and when: chosen before anything runs, from a seed. Pure.

use std::{fmt, str::FromStr, time::Duration};

use longshore_rank::cut::Cut;

use super::log::Stage;

/// What is done to a rank's process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and nothing after it. Not before the rank has joined: one that never comes is waited for.
    Stop,
    /// SIGSTOP; SIGCONT once its replacement has joined, at the latest after so long.
    StopContinue(Duration),
    /// SIGSTOP, SIGCONT after so long.
    Pause(Duration),
    /// Stopped again and again until the end: it has one part in so many of the time.
    Slow(u32),
    /// Cut off from storage, or from the other ranks; from those not before it has joined, as with [`Fault::Stop`].
    Cut(Cut),
}

/// A process that was not replaced by then has to go on, or nobody would.
const CONTINUE_AFTER: Duration = Duration::from_secs(10);

impl Fault {
    /// What is done if nothing is asked for: each way in which a rank is lost, and one in which it is only late.
    pub const DEFAULT: [Fault; 5] = [
        Fault::Kill,
        Fault::StopContinue(CONTINUE_AFTER),
        Fault::Pause(Duration::from_secs(1)),
        Fault::Cut(Cut::Storage),
        Fault::Cut(Cut::Network),
    ];

    /// Whether only its silence tells that the rank is lost.
    pub(super) fn is_silent(&self) -> bool {
        matches!(self, Fault::Stop | Fault::Cut(Cut::Network))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kill => write!(f, "kill"),
            Fault::Stop => write!(f, "stop"),
            Fault::StopContinue(CONTINUE_AFTER) => write!(f, "stop-continue"),
            Fault::StopContinue(limit) => write!(f, "stop-continue:{}", limit.as_secs_f64()),
            Fault::Pause(time) => write!(f, "pause:{}", time.as_secs_f64()),
            Fault::Slow(factor) => write!(f, "slow:{factor}"),
            Fault::Cut(cut) => write!(f, "{cut}"),
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(cut) = text.parse() {
            return Ok(Fault::Cut(cut));
        }
        let (name, value) = text.split_once(':').map_or((text, None), |(n, v)| (n, Some(v)));
        match (name, value) {
            ("kill", None) => Ok(Fault::Kill),
            ("stop", None) => Ok(Fault::Stop),
            ("stop-continue", None) => Ok(Fault::StopContinue(CONTINUE_AFTER)),
            ("stop-continue", Some(value)) => Ok(Fault::StopContinue(seconds(value)?)),
            ("pause", Some(value)) => Ok(Fault::Pause(seconds(value)?)),
            ("slow", Some(value)) => match value.parse() {
                Ok(factor @ 2..=100) => Ok(Fault::Slow(factor)),
                _ => Err("expected slow: and a factor from 2 to 100".into()),
            },
            _ => Err("one of kill, stop, stop-continue[:SECONDS], pause:SECONDS, slow:FACTOR, storage[:hang], network".into()),
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.001..=86_400.0).contains(seconds));
    let seconds = seconds.and_then(|seconds: f64| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| "expected a number of seconds from 0.001 to 86400 after the colon".into())
}

/// A choice that is the user's, or the seed's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<T> {
    /// This one.
    This(T),
    /// Another for each run.
    Random,
}

/// When something is done to a rank, as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum When {
    /// In the course of this phase of the rank's process.
    Phase(Choice<Stage>),
    /// So long after the command was started.
    At(Choice<Duration>),
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// What is done; every one with every rank and moment.
    pub faults: Vec<Fault>,
    /// To whom.
    pub ranks: Vec<Choice<u32>>,
    /// When.
    pub moments: Vec<When>,
    /// Runs of each combination.
    pub runs: u32,
    /// Faults in each run: the first is the combination's, the others are chosen from what is asked for.
    pub losses: u32,
}

/// What is done to one rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Strike {
    pub(super) fault: Fault,
    pub(super) rank: u32,
    pub(super) moment: Moment,
}

impl Strike {
    /// The same, where its stage was over before its moment came.
    pub(super) fn sooner(&self) -> Self {
        match self.moment {
            Moment::Within { stage, part } => {
                Self { moment: Moment::Within { stage, part: part / 4.0 }, ..*self }
            }
            Moment::At(_) | Moment::Part(_) | Moment::Later(_) => *self,
        }
    }
}

/// When. Parts are of how long the same took undisturbed, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Moment {
    /// After this part of the stage of the rank's process.
    Within { stage: Stage, part: f64 },
    /// So many seconds after the command was started.
    At(f64),
    /// After this part of the time until the load was complete.
    Part(f64),
    /// The same, after the strike before.
    Later(f64),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Moment::Within { stage, .. } => write!(f, "{}", stage.name()),
            Moment::At(seconds) => write!(f, "at {seconds} s"),
            Moment::Part(part) => write!(f, "at {:.0} %", part * 100.0),
            Moment::Later(part) => write!(f, "{:.0} % later", part * 100.0),
        }
    }
}

/// Late in a stage, or in a load, is too late where this one happens to be faster than the undisturbed one.
const PART_MAX: f64 = 0.75;

/// What is done in each run.
pub(super) fn schedule(wanted: &Wanted, world_size: u32, seed: u64) -> Vec<Vec<Strike>> {
    let mut runs = Vec::new();
    for _ in 0..wanted.runs {
        for fault in &wanted.faults {
            for when in &wanted.moments {
                for rank in &wanted.ranks {
                    // each run has a source of its own, so that it is the same whatever the others choose
                    let mut random = Random(seed ^ (runs.len() as u64 + 1).wrapping_mul(GOLDEN));
                    runs.push(strikes(wanted, (*fault, *rank, *when), world_size, &mut random));
                }
            }
        }
    }
    runs
}

fn strikes(
    wanted: &Wanted,
    (fault, rank, when): (Fault, Choice<u32>, When),
    world_size: u32,
    random: &mut Random,
) -> Vec<Strike> {
    let mut one_of = |rank| match rank {
        Choice::This(rank) => (rank, random.part()),
        Choice::Random => (random.below(u64::from(world_size)) as u32, random.part()),
    };
    let (rank, part) = one_of(rank);
    let moment = match when {
        When::Phase(stage) => {
            let stage = match stage {
                Choice::This(stage) => stage,
                Choice::Random => Stage::ALL[random.below(Stage::ALL.len() as u64) as usize],
            };
            Moment::Within { stage, part }
        }
        When::At(Choice::This(time)) => Moment::At(time.as_secs_f64()),
        When::At(Choice::Random) => Moment::Part(part),
    };
    let mut strikes = vec![Strike { fault, rank, moment }];
    for _ in 1..wanted.losses {
        let fault = wanted.faults[random.below(wanted.faults.len() as u64) as usize];
        let rank = match wanted.ranks[random.below(wanted.ranks.len() as u64) as usize] {
            Choice::This(rank) => rank,
            Choice::Random => random.below(u64::from(world_size)) as u32,
        };
        strikes.push(Strike { fault, rank, moment: Moment::Later(random.part()) });
    }
    strikes
}

/// SplitMix64: short, and the same everywhere for ever. **Source:** Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014; its constants.
struct Random(u64);

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The bias of the remainder is one in 2⁵⁰ for the small numbers here.
    fn below(&mut self, count: u64) -> u64 {
        self.next() % count.max(1)
    }

    fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64 * PART_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            faults: vec![Fault::Kill, Fault::Pause(Duration::from_millis(1500))],
            ranks: vec![Choice::This(1), Choice::Random],
            moments: vec![
                When::Phase(Choice::This(Stage::Reading)),
                When::Phase(Choice::Random),
                When::At(Choice::Random),
            ],
            runs: 3,
            losses: 2,
        }
    }

    #[test]
    fn a_seed_repeats_the_schedule_and_another_does_not() {
        let first = schedule(&wanted(), 4, 7);
        assert_eq!(first, schedule(&wanted(), 4, 7));
        assert_ne!(first, schedule(&wanted(), 4, 8));
    }

    #[test]
    fn every_combination_has_its_runs_and_every_run_its_strikes() {
        let runs = schedule(&wanted(), 4, 1);
        assert_eq!(runs.len(), 2 * 2 * 3 * 3);
        for strikes in &runs {
            assert_eq!(strikes.len(), 2);
            assert!(strikes.iter().all(|strike| strike.rank < 4));
            assert!(matches!(strikes[1].moment, Moment::Later(part) if part <= PART_MAX));
        }
        let reading = |s: &&Vec<Strike>| matches!(s[0].moment, Moment::Within { stage, .. } if stage == Stage::Reading);
        assert!(runs.iter().filter(reading).count() >= 12);
        // what is random is not the same every time
        let ranks: std::collections::BTreeSet<u32> = runs.iter().map(|s| s[0].rank).collect();
        assert!(ranks.len() > 2, "{ranks:?}");
    }

    #[test]
    fn faults_are_read_as_they_are_shown() {
        for text in [
            "kill",
            "stop",
            "stop-continue",
            "stop-continue:2.5",
            "pause:0.5",
            "slow:4",
            "storage",
            "storage:hang",
            "network",
        ] {
            assert_eq!(text.parse::<Fault>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "pause",
            "pause:",
            "pause:0",
            "pause:x",
            "slow:1",
            "slow",
            "kill:1",
            "stop:1",
            "storage:no",
            "network:1",
        ] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }
}
