//! A whole group under simulation: coordinator, links and ranks in one thread, with a clock, a network and a storage of their
//! own, all from one seed.
//!
//! Tests of processes show that what is foreseen is survived; here chance looks for what nobody has foreseen. A seed gives world
//! size, checkpoint, timing, and a schedule of losses, pauses, delayed and lost messages and failing storage (`scenario`).
//! Invariants hold after every step (`watch`, `memory`); then nothing goes wrong any more, and the load has to come to its end.
//!
//! In a quarter of the seeds lost ranks are not replaced: the group goes on as a smaller one (`group`), and again, down to rank 0
//! alone; without that one everybody ends. Nobody that is there or on its way is left behind before its time is over, nobody that
//! is left behind takes part, what a rank had is not read again, and each rank of the last group holds what it would have held if
//! that had been the first.
//!
//! | real | simulated |
//! |---|---|
//! | what the coordinator decides (`coordination`) | its actor (`coordinator`) |
//! | what is left, and who reads it (`plan`, `assignment`, placement and have-sets) | storage, parameters, finishes (`world`, `memory`) |
//! | the plan for fewer ranks, and what of it former shares give | the steps from one group to the next (`member`, `group`) |
//! | what a rank decides (`longshore_rank::state`) | its actor and workers (`rank`, `job`) |
//! | handshake, session, frames, messages as bytes (`link`, `processes::message`) | network and clock (turmoil), processes (`member`) |
//! | | rounds between ranks over TCP alone (`exchange`): neither shared memory nor NCCL |
//!
//! Every process has a host of its own, its successors as well: so one that was thought dead can go on beside the one in its place.
//!
//! A failing seed is printed, and repeats: `LONGSHORE_SEEDS=17..18 cargo test -p longshore --lib simulation -- --ignored`, with
//! `RUST_LOG=longshore=info` and `--nocapture` step by step. Seeds that have found something stay in `simulation/seeds.txt`. `scripts/simulate.sh` runs many.

mod base;
mod bug;
mod coordinator;
mod dice;
mod exchange;
mod group;
mod job;
mod member;
mod memory;
mod rank;
mod run;
mod scenario;
mod watch;
mod world;

use std::{
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use self::{bug::Bug, run::Outcome, scenario::Scenario};

/// Runs seeds on all processors; those that did not end as they should, the first of each processor.
fn failures(seeds: Range<u64>, bug: Option<Bug>) -> (Vec<(u64, String)>, Vec<Outcome>) {
    let next = AtomicU64::new(seeds.start);
    let (failed, ended) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || !failed.lock().unwrap().is_empty() {
                        return;
                    }
                    match run::run(Scenario::new(seed), bug) {
                        Ok(outcome) => ended.lock().unwrap().push(outcome),
                        Err(why) => failed.lock().unwrap().push((seed, why)),
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort();
    (failed, ended.into_inner().unwrap())
}

fn hold(seeds: Range<u64>) {
    let shown = tracing_subscriber::EnvFilter::from_default_env();
    // another test may have set it
    let _ = tracing_subscriber::fmt().with_env_filter(shown).with_test_writer().try_init();
    let (failed, ended) = failures(seeds, None);
    if let Some((seed, why)) = failed.first() {
        panic!("seed {seed}: {why}\n{:#?}", Scenario::new(*seed));
    }
    let complete = ended.iter().filter(|outcome| outcome.answer.is_ok()).count();
    let processes: usize = ended.iter().map(|outcome| outcome.processes).sum();
    let handed_on: u64 = ended.iter().map(|outcome| outcome.handed_on_bytes).sum();
    let resumed: u32 = ended.iter().map(|outcome| outcome.resumed).sum();
    let shrunk: usize = ended.iter().map(|outcome| outcome.shrunk).sum();
    let taken_over: u64 = ended.iter().map(|outcome| outcome.taken_over_bytes).sum();
    let simulated: Duration = ended.iter().map(|outcome| outcome.elapsed).sum();
    println!(
        "{complete} of {} loads complete, {processes} processes, {resumed} times a rank went on with what it had, \
         {handed_on} bytes out of parameters, {shrunk} times a group shrank, {taken_over} bytes out of former shares, \
         {simulated:.0?} simulated",
        ended.len()
    );
}

#[test]
fn five_hundred_seeds_hold() {
    hold(0..500);
}

/// Seeds that have found something once.
#[test]
fn seeds_that_have_failed_hold() {
    for line in include_str!("simulation/seeds.txt").lines() {
        let seed = line.split('#').next().unwrap_or_default().trim();
        if !seed.is_empty() {
            let seed: u64 = seed.parse().unwrap();
            hold(seed..seed + 1);
        }
    }
}

/// As many seeds as are asked for: `LONGSHORE_SEEDS=0..20000`.
#[test]
#[ignore = "for scripts/simulate.sh, and to repeat a seed"]
fn seeds_that_are_asked_for_hold() {
    let asked = std::env::var("LONGSHORE_SEEDS").expect("LONGSHORE_SEEDS=first..end");
    let (first, end) = asked.split_once("..").expect("first..end");
    hold(first.parse().unwrap()..end.parse().unwrap());
}

#[test]
fn a_seed_repeats() {
    for seed in 0..20 {
        let twice = [(); 2].map(|()| run::run(Scenario::new(seed), None));
        assert_eq!(twice[0], twice[1], "seed {seed}");
    }
}

/// That the invariants catch a bug.
fn catch(bug: Bug) {
    match failures(0..200, Some(bug)).0.first() {
        Some((seed, why)) => println!("seed {seed}: {why}"),
        None => panic!("{bug:?} is not caught within 200 seeds"),
    }
}

/// A test for each bug that can be planted.
macro_rules! planted {
    ($($test:ident: $bug:ident,)*) => {
        $(
            #[test]
            fn $test() {
                catch(Bug::$bug);
            }
        )*
    };
}

planted! {
    a_rank_that_forgets_what_has_landed_is_caught: ForgetsRange,
    a_rank_that_says_it_has_more_than_it_has_is_caught: HaveTooLarge,
    a_rank_that_does_not_wait_for_its_workers_is_caught: DoesNotWaitForWorkers,
    bytes_that_go_to_who_has_them_are_caught: IgnoresSettled,
    a_rank_that_reads_what_it_has_is_caught: ReadsWhatItHas,
    a_finish_that_is_run_again_is_caught: FinishesAgain,
    a_rank_that_is_ready_too_soon_is_caught: ReadyTooSoon,
    a_slot_that_is_not_free_is_caught: TakesSlotInUse,
    a_coordinator_that_hears_an_old_generation_is_caught: HearsOldGeneration,
    a_rank_that_hears_its_old_workers_is_caught: HearsOldWorkers,
    a_release_that_comes_too_soon_is_caught: ReleasesTooSoon,
    two_processes_in_one_place_are_caught: SeatsTwo,
    a_replacement_that_is_told_nothing_is_caught: ForgetsReplacement,
    a_rank_that_numbers_the_others_otherwise_is_caught: NumbersOtherwise,
    what_is_looked_for_under_the_wrong_number_is_caught: TakesPresentNumber,
    a_rank_that_hands_over_too_much_is_caught: HandsOverTooMuch,
    a_rank_that_hands_over_too_little_is_caught: HandsOverTooLittle,
    a_rank_that_hands_over_too_soon_is_caught: HandsOverTooSoon,
    a_rank_that_is_left_behind_on_its_way_is_caught: LeavesWhoeverIsOnItsWay,
    a_rank_that_goes_on_left_behind_is_caught: GoesOnLeftBehind,
}
