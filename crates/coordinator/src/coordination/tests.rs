//! Stories of groups: what happens, and what is decided.

use longshore_rank::error::RankError;

use super::*;

fn ready(rank: u32, generation: Generation) -> RankEvent {
    RankEvent { rank, generation, kind: RankEventKind::Ready(None, RankReport::default()) }
}

/// Who is silent may be stopped, and is in the way of those who wait for it; who has left may be doing its last work.
#[test]
fn of_complete_ranks_only_the_silent_are_dismissed_and_only_if_they_are_needed() {
    let now = Instant::now();
    let mut coordination =
        Coordination::new(4, 4, Duration::from_secs(10), Recovery::NONE, Vec::new());
    coordination.begin(1, now);
    (0..4).for_each(|rank| drop(coordination.joined(rank)));
    (0..4).for_each(|rank| drop(coordination.event(ready(rank, 1), now)));
    let mut lost = |rank, departure| {
        let orders = coordination.lost(rank, departure, now);
        assert!(matches!(orders[..], [Order::TellAll(RankCommand::Abort { .. })]), "{orders:?}");
    };
    lost(1, Departure::Left("its process left before the end".into()));
    lost(2, Departure::Silent("nothing was heard for 5s".into()));
    assert!(coordination.is_silent(2) && !coordination.is_silent(1));
    assert_eq!(coordination.over().map(|(rank, _)| rank), Some(1), "the first cause");
    match &coordination.awaited()[..] {
        [Order::Dismiss(2, why)] => assert_eq!(why, "nothing was heard for 5s"),
        other => panic!("{other:?}"),
    }
    assert!(coordination.awaited().is_empty() && !coordination.is_silent(2));
}

/// A link may break between the last rank's news and the release: found by simulation.
#[test]
fn a_rank_that_missed_its_release_is_told_when_it_is_back() {
    let now = Instant::now();
    let recovery =
        Recovery { replacements_max: 3, join_limit: Duration::from_secs(10), ..Recovery::NONE };
    let mut coordination = Coordination::new(2, 2, Duration::from_secs(10), recovery, Vec::new());
    coordination.begin(4, now);
    (0..2).for_each(|rank| drop(coordination.joined(rank)));
    coordination.event(ready(0, 4), now);
    let orders = coordination.event(ready(1, 4), now);
    assert!(matches!(orders[..], [Order::TellAll(RankCommand::Release { generation: 4 }), _]));
    coordination.lost(1, Departure::Left("nothing was heard".to_owned()), now);
    match &coordination.joined(1)[..] {
        [Order::Tell(1, RankCommand::Release { generation: 4 }), Order::Dismiss(1, why)] => {
            assert_eq!(why, "rank 1 was lost: nothing was heard");
        }
        other => panic!("{other:?}"),
    }
}

const TEN_SECONDS: Duration = Duration::from_secs(10);

/// A group that goes on without lost ranks, its coordinator with rank 0, and a clock.
struct Shrinking {
    coordination: Coordination,
    now: Instant,
}

impl Shrinking {
    fn new(ranks: u32) -> Self {
        let recovery = Recovery {
            own_rank: Some(0),
            shrinks: true,
            join_limit: TEN_SECONDS,
            ..Recovery::NONE
        };
        let mut coordination = Coordination::new(ranks, ranks, TEN_SECONDS, recovery, Vec::new());
        coordination.begin(1, Instant::now());
        Self { coordination, now: Instant::now() }
    }

    fn lose(&mut self, rank: u32) -> Vec<Order> {
        self.coordination.lost(rank, Departure::Left("killed".to_owned()), self.now)
    }

    /// What is decided after so many milliseconds.
    fn after(&mut self, ms: u64) -> Option<Outcome> {
        self.now += Duration::from_millis(ms);
        let orders = self.coordination.look(None, self.now);
        orders.into_iter().find_map(|order| match order {
            Order::Answer(outcome) => Some(outcome),
            _ => None,
        })
    }
}

fn tells_to_hand_over(orders: &[Order]) -> bool {
    let is = |order: &Order| matches!(order, Order::TellAll(RankCommand::HandOver { .. }));
    orders.iter().any(is)
}

#[test]
fn a_group_goes_on_as_those_that_are_left_once_that_is_certain() {
    let mut group = Shrinking::new(4);
    (0..4).for_each(|rank| drop(group.coordination.joined(rank)));
    let orders = group.lose(2);
    assert!(matches!(orders[0], Order::Dismiss(2, _)) && tells_to_hand_over(&orders));
    assert!(group.after(200).is_none());
    // in the meantime nothing that ranks say counts, and another loss is waited with as well
    assert!(group.coordination.event(ready(1, 1), group.now).is_empty());
    let orders = group.lose(1);
    assert!(matches!(orders[..], [Order::Dismiss(1, _)]));
    // nobody comes back
    assert!(matches!(group.coordination.joined(2)[..], [Order::Dismiss(2, _)]));
    let Some(Ok(LoadEnd::Shrunk(shrunk))) = group.after(200) else { panic!() };
    assert_eq!((shrunk.ranks, shrunk.generation), (vec![0, 3], 1));
    let causes: Vec<String> = shrunk.losses.iter().map(LoadError::line).collect();
    assert_eq!(causes, ["rank 2 was lost: killed", "rank 1 was lost: killed"]);
    assert!(group.after(5000).is_none());
}

/// One that reads for longer than the others was told to end as these left: found by simulation.
#[test]
fn whoever_leaves_a_group_that_has_shrunk_is_not_lost() {
    let mut group = Shrinking::new(4);
    (0..4).for_each(|rank| drop(group.coordination.joined(rank)));
    group.lose(2);
    assert!(matches!(group.after(500), Some(Ok(LoadEnd::Shrunk(_)))));
    assert!(group.lose(1).is_empty());
    assert_eq!(group.coordination.over(), None);
}

#[test]
fn ranks_that_are_on_their_way_are_not_left_behind() {
    let mut group = Shrinking::new(3);
    group.coordination.joined(1);
    assert!(tells_to_hand_over(&group.lose(1)));
    assert!(group.after(1000).is_none());
    group.coordination.joined(0);
    assert!(group.after(1000).is_none());
    let told = group.coordination.joined(2);
    assert!(matches!(told[..], [Order::Tell(2, RankCommand::HandOver { generation: 1 })]));
    let Some(Ok(LoadEnd::Shrunk(shrunk))) = group.after(0) else { panic!() };
    assert_eq!(shrunk.ranks, [0, 2]);
    // but not for ever
    let mut group = Shrinking::new(3);
    (0..2).for_each(|rank| drop(group.coordination.joined(rank)));
    group.lose(1);
    assert!(group.after(9000).is_none());
    let Some(Ok(LoadEnd::Shrunk(shrunk))) = group.after(1500) else { panic!() };
    assert_eq!(shrunk.ranks, [0]);
}

/// It stood still when a smaller group began, and the others' time was over before its own rank was there: found by
/// simulation.
#[test]
fn a_group_does_not_go_on_without_its_coordinators_own_rank() {
    let mut group = Shrinking::new(3);
    let lost = LoadError::RankLost { rank: 3, reason: "killed".to_owned() };
    group.coordination.losses.push(lost);
    assert!(group.after(12_000).is_none());
    (0..2).for_each(|rank| drop(group.coordination.joined(rank)));
    assert!(group.after(9_000).is_none());
    assert!(group.after(1_500).is_none());
    let Some(Ok(LoadEnd::Shrunk(shrunk))) = group.after(500) else { panic!() };
    assert_eq!(shrunk.ranks, [0, 1]);
}

/// What breaks between two ranks may be either's; the group cannot go on without its coordinator's.
#[test]
fn of_two_that_cannot_reach_each_other_the_coordinators_own_goes_on() {
    for (reports, blamed, left) in [(0, 2, vec![0, 1]), (2, 0, vec![0, 1]), (2, 1, vec![0, 1])] {
        let mut group = Shrinking::new(3);
        (0..3).for_each(|rank| drop(group.coordination.joined(rank)));
        let broken = RankError::Reported {
            text: "broken".to_owned(),
            refused: false,
            lasting: false,
            blames: Some(blamed),
        };
        let kind = RankEventKind::Failed(broken);
        let event = RankEvent { rank: reports, generation: 1, kind };
        assert!(group.coordination.event(event, group.now).is_empty());
        assert!(group.after(500).is_none());
        let Some(Ok(LoadEnd::Shrunk(shrunk))) = group.after(500) else { panic!() };
        assert_eq!(shrunk.ranks, left);
    }
}

#[test]
fn a_rank_that_never_comes_is_done_without() {
    let mut group = Shrinking::new(3);
    (0..2).for_each(|rank| drop(group.coordination.joined(rank)));
    assert!(group.after(9000).is_none());
    assert!(group.after(1500).is_none());
    let Some(Ok(LoadEnd::Shrunk(shrunk))) = group.after(400) else { panic!() };
    assert_eq!(shrunk.ranks, [0, 1]);
    assert!(matches!(shrunk.losses[..], [LoadError::Missing { .. }]));
}

#[test]
fn without_the_coordinators_own_rank_a_load_is_over() {
    let mut group = Shrinking::new(3);
    (0..3).for_each(|rank| drop(group.coordination.joined(rank)));
    group.lose(1);
    let orders = group.lose(0);
    let Some(Order::Answer(Err(e))) = orders.last() else { panic!("{orders:?}") };
    assert_eq!(e.line(), "rank 1 was lost: killed; then rank 0 was lost: killed");
    assert!(group.after(5000).is_none());
}
