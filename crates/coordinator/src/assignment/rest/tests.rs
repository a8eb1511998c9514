//! Against a model that lists every byte: which rank needs it, has it, was handed it.
//!
//! Each story follows from its seed alone: a checkpoint, a group, a policy, then losses one after the other, each in the
//! middle of the load that the one before made necessary.

mod model;

use longshore_harness::generator::{Checkpoint as Written, Family, Scheme};
use longshore_models::{
    checkpoint::Checkpoint,
    have::{Have, RankSet},
    placement::Placement,
};
use longshore_rank::protocol::{Read, ReadFrom};
use tempfile::TempDir;

use self::model::Model;
use crate::{
    assignment::{Assignment, Policy, assign, assign_rest},
    discover::discover,
    plan::{Plan, PlanOptions},
    synth::Synth,
};

/// Numbers from a seed. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A checkpoint with the groups that it is loaded onto: tp, ep, kernel layout, shared experts fused.
type Groups = &'static [(u32, u32, Option<&'static str>, bool)];

/// Small dimensions with every kind of piece: fused, row-parallel, replicated, shared between neighbours, of experts, clipped,
/// converted.
fn checkpoints() -> Vec<(Written, Groups)> {
    use Family::{DeepseekV3, GlmMoeDsa, KimiK25, Llama, Qwen3, Qwen3Moe};
    use Scheme::{Bf16, Fp8, Int4, Mxfp4, Nvfp4};
    let of = |family, scheme| {
        Written::new(family, scheme).set("num_hidden_layers", 2).set("vocab_size", 190)
    };
    let thirds = of(Llama, Bf16)
        .set("num_attention_heads", 6)
        .set("num_key_value_heads", 3)
        .set("intermediate_size", 192)
        .set("vocab_size", 192)
        .set("norm_dtype", "F32");
    vec![
        (of(Llama, Bf16).set("norm_dtype", "F32"), &[(1, 1, None, false), (2, 1, None, false)]),
        (thirds, &[(3, 1, None, false)]),
        (of(Qwen3, Bf16).set("num_key_value_heads", 2), &[(4, 1, None, false)]),
        (of(Qwen3Moe, Bf16), &[(4, 4, None, false), (8, 2, None, false)]),
        (of(DeepseekV3, Bf16), &[(2, 2, Some("trtllm"), false), (4, 2, Some("none"), true)]),
        (of(DeepseekV3, Fp8), &[(2, 1, None, false)]),
        (of(DeepseekV3, Nvfp4), &[(2, 1, None, false), (2, 2, Some("none"), true)]),
        (of(GlmMoeDsa, Mxfp4), &[(2, 1, None, false), (4, 4, Some("none"), false)]),
        (of(KimiK25, Int4), &[(4, 1, None, false)]),
    ]
}

struct Loaded {
    _directory: TempDir,
    what: String,
    plan: Plan,
}

/// Everything of [`checkpoints`], planned.
fn loads() -> Vec<Loaded> {
    let mut loads = Vec::new();
    for (written, groups) in checkpoints() {
        for &(tp, ep, layout, fuse) in groups {
            let directory = tempfile::tempdir().unwrap();
            written.write(directory.path()).unwrap();
            let mut options = PlanOptions { tp, ep, ..PlanOptions::default() };
            options.model.kernel_layout = layout.map(|layout| layout.parse().unwrap());
            options.model.fuse_shared_experts = fuse;
            let plan = Plan::new(discover(directory.path()).unwrap(), &options).unwrap();
            let what = format!("{written:?} tp {tp} ep {ep} {layout:?} fused {fuse}");
            loads.push(Loaded { _directory: directory, what, plan });
        }
    }
    loads
}

fn policy(random: &mut Random) -> Policy {
    Policy {
        exchange: random.below(4) > 0,
        read_bytes: random.pick(&[1 << 10, 3000, 4 << 10, 16 << 10, 64 << 10, 1 << 20]),
        gap_bytes: random.pick(&[0, 100, 4 << 10]),
        row_gap_bytes: random.pick(&[0, 63, 127, 191, 200, 4 << 10, 1 << 20]),
    }
}

/// A load that stops at a random point: each rank has got through a part of its reads, of which each rank has been handed
/// some, one of them up to a step.
fn interrupt(
    random: &mut Random,
    checkpoint: &Checkpoint,
    policy: &Policy,
    assignment: &Assignment,
    have: &mut [Have],
) {
    let (per_mille, lost) = (random.pick(&[0, 200, 900, 1000, 1000]), random.pick(&[0, 0, 3, 30]));
    for (reader, reads) in assignment.reads.iter().enumerate() {
        let done = reads.len() as u64 * random.below(per_mille + 1).max(per_mille / 2) / 1000;
        for (number, read) in (0..).zip(reads).take_while(|(number, _)| *number <= done) {
            let step = 1 << (10 + random.below(4));
            for (rank, have) in (0..).zip(&mut *have) {
                if !takes(assignment, policy, reader as u32, rank, read) || random.below(100) < lost
                {
                    continue;
                }
                let steps = checkpoint.cut(read.file, read.range, step);
                let landed = if number < done { usize::MAX } else { random.below(3) as usize };
                steps.take(landed).for_each(|step| have.insert(read.file, step));
            }
        }
    }
}

/// Some ranks are lost, and with them what they have.
fn lose(random: &mut Random, have: &mut [Have]) {
    for _ in 0..random.pick(&[0, 1, 1, 1, 2, 3]) {
        let lost = random.below(have.len() as u64);
        have[lost as usize] = Have::default();
    }
}

fn takes(assignment: &Assignment, policy: &Policy, reader: u32, rank: u32, read: &Read) -> bool {
    let settled = &assignment.settled[read.settled as usize];
    (policy.exchange || rank == reader) && !settled.contains(rank)
}

/// One story: a first load, then what is left after each of some losses.
fn story(load: &Loaded, seed: u64) {
    let mut random = Random(seed);
    let (placement, checkpoint) = (load.plan.placement(), load.plan.checkpoint());
    let policy = policy(&mut random);
    let mut model = Model::new(placement, checkpoint, load.plan.load.reads.len());
    let mut have = vec![Have::default(); load.plan.load.reads.len()];
    let mut assignment = assign(placement, checkpoint, &policy);
    for turn in 0..4 {
        interrupt(&mut random, checkpoint, &policy, &assignment, &mut have);
        lose(&mut random, &mut have);
        assignment = assign_rest(placement, checkpoint, &policy, &have);
        let checked = model.check(&assignment, &policy, &have);
        if let Err(wrong) = checked {
            panic!("seed {seed}, turn {turn}, {policy:?}, {}: {wrong}", load.what);
        }
        let closed: Vec<Have> = (0..)
            .zip(&have)
            .map(|(rank, h)| {
                let closed = placement.closed(checkpoint, rank, h);
                if let Err(wrong) = model.check_closed(rank, h, &closed) {
                    panic!("seed {seed}, turn {turn}, rank {rank}, {}: {wrong}", load.what);
                }
                assert_eq!(placement.closed(checkpoint, rank, &closed), closed, "seed {seed}");
                closed
            })
            .collect();
        // the plan's own proof agrees
        load.plan.rest(&have).unwrap();
        let again = assign_rest(placement, checkpoint, &policy, &closed);
        assert_eq!((&again.reads, &again.settled), (&assignment.reads, &assignment.settled));
    }
}

/// `LONGSHORE_CASES=from..to` runs other seeds than the default ones.
fn seeds() -> std::ops::Range<u64> {
    let given = std::env::var("LONGSHORE_CASES").ok();
    let given = given.and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    given.unwrap_or(0..40)
}

/// Whatever was interrupted and lost, in whatever order: see [`model`] for the list of what holds.
#[test]
fn every_missing_byte_is_brought_once_and_no_other() {
    let loads = loads();
    for seed in seeds() {
        story(&loads[(seed % loads.len() as u64) as usize], seed);
    }
}

#[test]
fn with_nothing_landed_it_is_the_first_load_again() {
    for load in loads() {
        let (placement, checkpoint) = (load.plan.placement(), load.plan.checkpoint());
        for seed in 0..8 {
            let policy = policy(&mut Random(seed));
            let nothing = vec![Have::default(); load.plan.load.reads.len()];
            let rest = assign_rest(placement, checkpoint, &policy, &nothing);
            let first = assign(placement, checkpoint, &policy);
            assert_eq!(rest.reads, first.reads, "{}", load.what);
            assert_eq!((rest.settled, rest.rounds), (first.settled, first.rounds));
        }
    }
}

/// What each rank has at the end of a load.
fn everything(placement: &Placement, checkpoint: &Checkpoint) -> Vec<Have> {
    let whole = || {
        let mut have = Have::default();
        for tensor in &checkpoint.tensors {
            have.insert(tensor.file, tensor.file_range);
        }
        have
    };
    (0..placement.parallel.tp()).map(|_| whole()).collect()
}

fn bytes(reads: &[Read], from: ReadFrom) -> u64 {
    reads.iter().filter(|read| read.from == from).map(|read| read.range.len()).sum()
}

/// One rank of N is lost when everything has landed: its replacement reads what it alone needs, and nothing more where gaps are
/// not read through; whoever is left reads nothing, and hands on what is replicated.
#[test]
fn a_rank_lost_at_the_end_costs_its_share_of_storage_reads() {
    for load in loads() {
        let (placement, checkpoint) = (load.plan.placement(), load.plan.checkpoint());
        let ranks = load.plan.load.reads.len();
        let mut model = Model::new(placement, checkpoint, ranks);
        for lost in 0..ranks {
            let mut have = everything(placement, checkpoint);
            have[lost] = Have::default();
            let policy =
                Policy { exchange: true, read_bytes: 2048, gap_bytes: 0, row_gap_bytes: 0 };
            let rest = assign_rest(placement, checkpoint, &policy, &have);
            model.check(&rest, &policy, &have).unwrap();
            let needed = model.needed_bytes(lost);
            let handed_over = if ranks == 1 { 0 } else { model.handed_over_bytes(lost) };
            assert_eq!(bytes(&rest.reads[lost], ReadFrom::Storage), needed - handed_over);
            let mut sent = 0;
            for (rank, reads) in rest.reads.iter().enumerate().filter(|(rank, _)| *rank != lost) {
                assert_eq!(bytes(reads, ReadFrom::Storage), 0, "{} rank {rank}", load.what);
                sent += bytes(reads, ReadFrom::Parameters);
            }
            assert_eq!(sent, handed_over, "{}", load.what);
        }
    }
}

/// Half of the files is there, then a rank is lost: it has more to read alone, so the others read more of what nobody has.
#[test]
fn a_replacement_reads_less_of_what_nobody_has() {
    let directory = tempfile::tempdir().unwrap();
    Synth::new("llama", "bf16").write(directory.path()).unwrap();
    let options = PlanOptions { tp: 4, ..PlanOptions::default() };
    let plan = Plan::new(discover(directory.path()).unwrap(), &options).unwrap();
    let (placement, checkpoint) = (plan.placement(), plan.checkpoint());
    let mut have = vec![Have::default(); 4];
    let mut half = checkpoint.data_bytes() / 2;
    for tensor in &checkpoint.tensors {
        if half < tensor.file_range.len() {
            break;
        }
        half -= tensor.file_range.len();
        have.iter_mut().for_each(|have| have.insert(tensor.file, tensor.file_range));
    }
    have[2] = Have::default();
    // longer than any rank's part of a tensor, so that none of it is read directly
    let read_bytes = 40_000;
    let policy = Policy { exchange: true, read_bytes, gap_bytes: 0, row_gap_bytes: 0 };
    let rest = assign_rest(placement, checkpoint, &policy, &have);
    let read: Vec<u64> = rest.reads.iter().map(|r| bytes(r, ReadFrom::Storage)).collect();
    let (most, least) = (read.iter().max().unwrap(), read.iter().min().unwrap());
    assert!(most - least <= read_bytes, "{read:?}");
    let handed_on = |rank: usize| -> u64 {
        let stored = rest.reads[rank].iter().filter(|read| read.from == ReadFrom::Storage);
        stored.filter(|read| read.round.is_some()).map(|read| read.range.len()).sum()
    };
    assert!(handed_on(2) < read[2] / 2 && handed_on(0) == read[0], "{read:?}");
}

/// Two lost ranks miss the same replicated bytes: a survivor hands them to both at once, and survivors take turns.
#[test]
fn two_replacements_are_handed_replicated_bytes_together() {
    let directory = tempfile::tempdir().unwrap();
    Synth::new("llama", "bf16").write(directory.path()).unwrap();
    let options = PlanOptions { tp: 4, ..PlanOptions::default() };
    let plan = Plan::new(discover(directory.path()).unwrap(), &options).unwrap();
    let (placement, checkpoint) = (plan.placement(), plan.checkpoint());
    let mut have = everything(placement, checkpoint);
    (have[1], have[3]) = (Have::default(), Have::default());
    let policy = Policy { exchange: true, read_bytes: 4096, gap_bytes: 0, row_gap_bytes: 0 };
    let rest = assign_rest(placement, checkpoint, &policy, &have);
    let norm = checkpoint.get("model.norm.weight").unwrap();
    let of_norm: Vec<(usize, &Read)> = (0..4)
        .flat_map(|rank| rest.reads[rank].iter().map(move |read| (rank, read)))
        .filter(|(_, read)| read.file == norm.file)
        .filter(|(_, read)| read.range.intersect(&norm.file_range).is_some())
        .collect();
    let [(reader, read)] = of_norm[..] else { panic!("{of_norm:?}") };
    assert!(reader == 0 || reader == 2);
    assert_eq!((read.from, read.round.is_some()), (ReadFrom::Parameters, true));
    assert_eq!(rest.settled[read.settled as usize], RankSet::from_iter([0, 2]));
    let sent = [0, 2].map(|rank| bytes(&rest.reads[rank], ReadFrom::Parameters));
    assert!(sent[0].abs_diff(sent[1]) <= norm.file_range.len(), "{sent:?}");
}
