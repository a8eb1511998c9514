//! The small API where ranks are processes, here with a thread in the place of each: what they tell each other once they
//! are loaded, and what they learn when one of them is lost.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{net::TcpListener, path::Path, sync::Barrier, thread};

use longshore::{Load, LoadError, Place, Rank, Secret};
use longshore_harness::{
    generator::{Checkpoint, Family, Scheme},
    scratch::Scratch,
};

/// Loads a small model on `ranks` ranks and goes on with each.
fn with_ranks<T: Send>(ranks: u32, then: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    let secret = Secret::random_text().unwrap();
    // free at the time of asking; each rank tries those after it as well
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let join = |rank: u32, dir: &Path| {
        let place = Place::new(rank, ranks, "127.0.0.1", port)?.secret(Secret::from_text(&secret));
        let load = Load::from(dir.to_str().unwrap());
        load.join(place.local_rank(rank, ranks)?)?.wait()
    };
    thread::scope(|scope| {
        let (join, then, dir) = (&join, &then, &dir);
        let threads: Vec<_> =
            (0..ranks).map(|rank| scope.spawn(move || then(join(rank, dir).unwrap()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_rank_is_told_all_pieces() {
    let told = with_ranks(4, |mut rank| {
        let own = vec![7; rank.place().rank as usize];
        let first = rank.all_gather(own).unwrap();
        // as much as there is room for
        let own = vec![rank.place().rank as u8; 1 << 18];
        let second = rank.all_gather(own).unwrap();
        rank.barrier().unwrap();
        rank.leave().unwrap();
        (first, second)
    });
    for (first, second) in told {
        assert_eq!(first, [&[][..], &[7], &[7, 7], &[7, 7, 7]]);
        assert!(second.iter().zip(0..).all(|(piece, rank)| piece[..] == vec![rank; 1 << 18]));
        assert_eq!(second.len(), 4);
    }
}

/// One that is too long is refused on its rank, and has been sent to nobody.
#[test]
fn a_piece_that_is_too_long_is_refused() {
    with_ranks(2, |mut rank| {
        let refused = rank.all_gather(vec![0; (1 << 19) + 1]).unwrap_err();
        assert_eq!(
            refused.line(),
            "all_gather: a piece of 524289 bytes, at most 524288 with 2 ranks"
        );
        rank.barrier().unwrap();
        rank.leave().unwrap();
    });
}

/// Those that wait for it and those that come later, on rank 0 and elsewhere.
#[test]
fn a_lost_rank_is_told_to_all_however_often_they_ask() {
    for lost in [0, 1, 2] {
        let all_are_through = Barrier::new(4);
        let said = with_ranks(4, |mut rank| {
            let own = rank.place().rank;
            rank.barrier().unwrap();
            all_are_through.wait();
            if own == lost {
                drop(rank);
                return None;
            }
            let first = rank.barrier().unwrap_err();
            let second = rank.barrier().unwrap_err();
            Some((own, first, second))
        });
        for (own, first, second) in said.into_iter().flatten() {
            for e in [&first, &second] {
                let line = e.line();
                let names_it = line.contains(&format!("rank {lost}")) || line.contains("(rank 0)");
                assert!(names_it, "rank {own} of rank {lost}: {line}");
            }
            match (own, lost) {
                (0, _) => assert!(matches!(first, LoadError::RankLost { .. }), "{first}"),
                (_, 0) => assert!(matches!(first, LoadError::CoordinatorLost { .. }), "{first}"),
                // unless rank 0 was faster to end
                _ => assert!(
                    matches!(
                        first,
                        LoadError::GroupEnded { .. } | LoadError::CoordinatorLost { .. }
                    ),
                    "{first}"
                ),
            }
        }
    }
}

/// Servers are asynchronous, and let go of things where they are.
#[test]
fn what_was_loaded_may_be_dropped_in_asynchronous_code() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    with_ranks(1, |rank| runtime.block_on(async move { drop(rank) }));
    let scratch = Scratch::new().unwrap();
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(scratch.path()).unwrap();
    let load = Load::from(scratch.path().to_str().unwrap());
    let loading = load.clone().start().unwrap();
    let loaded = load.start().unwrap().wait().unwrap();
    runtime.block_on(async move { drop((loading, loaded)) });
}

/// A server loads its draft model while the ranks of the first load stay in touch: the same processes, the same place.
#[test]
fn the_same_processes_form_a_second_group() {
    let scratch = Scratch::new().unwrap();
    let draft = scratch.join("draft");
    Checkpoint::new(Family::Qwen3, Scheme::Bf16).write(&draft).unwrap();
    let norms = with_ranks(2, |mut first| {
        let load = Load::from(draft.to_str().unwrap());
        let mut second = load.join(first.place().clone()).unwrap().wait().unwrap();
        second.barrier().unwrap();
        first.barrier().unwrap();
        let name = "model.layers.0.self_attn.q_norm.weight";
        let of = |rank: &Rank| rank.params().unwrap().get(name).is_some();
        let found = (of(&first), of(&second));
        second.leave().unwrap();
        first.barrier().unwrap();
        first.leave().unwrap();
        found
    });
    assert_eq!(norms, [(false, true); 2]);
}
