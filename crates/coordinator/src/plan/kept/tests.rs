//! Against the same worked out tensor by tensor, until nothing changes any more.

use std::{
    collections::BTreeSet,
    fs::{self, File, FileTimes},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use longshore_harness::generator::{Checkpoint as Written, Family, Scheme};
use longshore_models::{declare::ParamId, have::Have, transform::KvScales};
use longshore_rank::{protocol::LoadPlan, storage::FileIdentity};
use tempfile::TempDir;

use super::*;
use crate::{
    discover::discover,
    plan::{Exchange, PlanOptions, storage_bytes},
};

/// Long after whatever was written for a test.
fn later() -> SystemTime {
    SystemTime::now() + Duration::from_secs(3600)
}

struct Case {
    scratch: TempDir,
    options: PlanOptions,
}

impl Case {
    /// A checkpoint in `a`, in 5 files.
    fn new(family: Family, scheme: Scheme, tp: u32, layout: Option<&str>) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let written = Written::new(family, scheme).set("num_hidden_layers", 2).files(5);
        written.write(&scratch.path().join("a")).unwrap();
        let exchange = Exchange::On;
        let mut options = PlanOptions { tp, exchange, ..PlanOptions::default() };
        options.model.kernel_layout = layout.map(|layout| layout.parse().unwrap());
        Self { scratch, options }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn plan(&self, name: &str) -> Plan {
        Plan::new(discover(self.path(name)).unwrap(), &self.options).unwrap()
    }

    /// The files of `a` as `name`: those that are `another` by their names copied, the rest linked.
    fn linked(&self, name: &str, another: impl Fn(&str) -> bool) {
        fs::create_dir(self.path(name)).unwrap();
        for file in names(&self.path("a")) {
            let (from, to) = (self.path("a").join(&file), self.path(name).join(&file));
            match another(&file) {
                true => drop(fs::copy(from, to).unwrap()),
                false => fs::hard_link(from, to).unwrap(),
            }
        }
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let files = fs::read_dir(dir).unwrap().flatten();
    files.map(|file| file.file_name().into_string().unwrap()).collect()
}

fn cases() -> Vec<Case> {
    use Family::{DeepseekV3, GlmMoeDsa, KimiK25, Llama};
    vec![
        Case::new(Llama, Scheme::Bf16, 2, None),
        Case::new(DeepseekV3, Scheme::Bf16, 1, None),
        Case::new(DeepseekV3, Scheme::Fp8, 2, None),
        Case::new(DeepseekV3, Scheme::Nvfp4, 2, Some("trtllm")),
        Case::new(GlmMoeDsa, Scheme::Mxfp4, 2, Some("aiter")),
        Case::new(KimiK25, Scheme::Int4, 4, None),
    ]
}

/// Parameters that have to be loaded again where the files that are `another` hold something else.
fn touched(plan: &Plan, another: impl Fn(&str) -> bool) -> BTreeSet<ParamId> {
    let (checkpoint, placement) = (plan.checkpoint(), plan.placement());
    let mut touched = BTreeSet::new();
    let params_of = |id: usize| placement.pieces_of(id as TensorId).iter().map(|p| p.param);
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        if another(&checkpoint.files[tensor.file as usize].name) {
            touched.extend(params_of(id));
        }
    }
    loop {
        let before = touched.len();
        for id in 0..checkpoint.tensors.len() {
            if params_of(id).any(|param| touched.contains(&param)) {
                touched.extend(params_of(id));
            }
        }
        for finish in &placement.finishes {
            let all: Vec<ParamId> = finish.inputs().into_iter().chain(finish.outputs()).collect();
            if all.iter().any(|param| touched.contains(param)) {
                touched.extend(all);
            }
        }
        if touched.len() == before {
            return touched;
        }
    }
}

fn params(flags: &[bool], wanted: bool) -> BTreeSet<ParamId> {
    (0..).zip(flags).filter(|(_, flag)| **flag == wanted).map(|(param, _)| param).collect()
}

/// What stays is what nothing that has changed has to do with, and the rest of the load reads all else, once.
#[test]
fn what_stays_has_nothing_to_do_with_what_has_changed() {
    let mut some = 0;
    for case in cases() {
        // any of five files, and what is not a file of weights besides
        for files in 0..1u32 << 5 {
            let another = |name: &str| {
                let number =
                    name.strip_prefix("model-0000").and_then(|rest| rest[..1].parse().ok());
                number.is_none_or(|number: u32| files >> (number - 1) & 1 == 1)
            };
            let name = format!("b{files}");
            case.linked(&name, another);
            let (held, next) = (case.plan("a"), case.plan(&name));
            let changed = changed(&held, &next, later());
            assert_eq!(changed, super::changed(&next, &held, later()));
            let kept = next.kept(&changed);
            let want = touched(&next, another);
            assert_eq!(params(&kept.params, false), want);
            let mut have = Have::default();
            let placement = next.placement();
            for (id, tensor) in next.checkpoint().tensors.iter().enumerate() {
                let mut pieces = placement.pieces_of(id as TensorId).iter().peekable();
                if pieces.peek().is_some() && pieces.all(|p| !want.contains(&p.param)) {
                    have.insert(tensor.file, tensor.file_range);
                }
            }
            assert_eq!(kept.have, have);
            // checked in there: nothing that is had lands, and all else does, once
            let left = next.left(&vec![kept.have.clone(); case.options.tp as usize]).unwrap();
            let read: u64 = storage_bytes(&left).iter().sum();
            assert_eq!(read + kept.bytes, next.needed_bytes);
            assert_eq!(kept.bytes == next.needed_bytes, files == 0);
            assert_eq!(kept.is_empty(), want.len() == placement.params.len());
            some += usize::from(kept.bytes > 0 && read > 0);
        }
    }
    assert!(some > 60, "of only {some} a part stays");
}

/// Numbers and names of files may be others.
#[test]
fn files_that_were_renamed_are_the_same() {
    let case = Case::new(Family::DeepseekV3, Scheme::Fp8, 2, None);
    fs::create_dir(case.path("b")).unwrap();
    let renamed = |name: &str| {
        let number: Option<u32> =
            name.strip_prefix("model-0000").and_then(|rest| rest[..1].parse().ok());
        number.map_or(name.to_owned(), |number| format!("weights-{}.safetensors", 9 - number))
    };
    for name in names(&case.path("a")) {
        let (from, to) = (case.path("a").join(&name), case.path("b").join(renamed(&name)));
        if name != "model.safetensors.index.json" {
            fs::hard_link(from, to).unwrap();
            continue;
        }
        let mut index: serde_json::Value =
            serde_json::from_slice(&fs::read(from).unwrap()).unwrap();
        for file in index["weight_map"].as_object_mut().unwrap().values_mut() {
            *file = renamed(file.as_str().unwrap()).into();
        }
        fs::write(to, index.to_string()).unwrap();
    }
    let (held, next) = (case.plan("a"), case.plan("b"));
    let kept = next.kept(&changed(&held, &next, later()));
    assert_eq!(kept.bytes, next.needed_bytes);
    let first = |plan: &Plan| plan.checkpoint().files[0].bytes;
    assert_ne!(first(&held), first(&next), "they are in another order");
}

/// Another content may have the same length and time of writing.
#[test]
fn a_file_that_was_written_again_is_another_whatever_its_times_say() {
    let case = Case::new(Family::Llama, Scheme::Bf16, 1, None);
    let held = case.plan("a");
    let same = changed(&held, &case.plan("a"), later());
    assert!(!same.contains(&true));
    let norm = held.checkpoint().get("model.norm.weight").unwrap();
    let path = case.path("a").join(held.checkpoint().file_name(norm));
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let bytes = fs::read(&path).unwrap();
    let written_again = || {
        fs::write(&path, &bytes).unwrap();
        let times = FileTimes::new().set_modified(modified);
        File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        case.plan("a")
    };
    let mut next = written_again();
    // the clock of the file system may tick a few times a second only
    while next.identities == held.identities {
        next = written_again();
    }
    for (before, now) in held.identities.iter().zip(next.identities.iter()) {
        assert!(before.is_still(now));
    }
    let kept = next.kept(&changed(&held, &next, later()));
    assert!(kept.bytes > 0 && kept.have.file(norm.file).ranges().is_empty());
}

/// What was written just before it was read may have been written again just after, with the same time.
#[test]
fn a_file_that_was_just_written_may_be_another() {
    let case = Case::new(Family::Llama, Scheme::Bf16, 1, None);
    let (held, next) = (case.plan("a"), case.plan("a"));
    for (opened, certain) in [
        (SystemTime::now(), false),
        (SystemTime::now() + Duration::from_secs(1), false),
        (SystemTime::now() + Duration::from_secs(3), true),
        (SystemTime::UNIX_EPOCH, false),
    ] {
        let changed = changed(&held, &next, opened);
        assert!(changed.iter().all(|changed| *changed != certain), "{opened:?}");
    }
}

/// `plan` with something about it `altered`.
fn altered(plan: &Plan, alter: impl FnOnce(&mut Placement)) -> Plan {
    let LoadPlan { checkpoint, placement, reads, settled, exchange, read_bytes_max } = &*plan.load;
    let mut placement = (**placement).clone();
    alter(&mut placement);
    let load = LoadPlan {
        checkpoint: Arc::clone(checkpoint),
        placement: Arc::new(placement),
        reads: reads.clone(),
        settled: settled.clone(),
        exchange: *exchange,
        read_bytes_max: *read_bytes_max,
    };
    Plan { load: Arc::new(load), ..plan.clone() }
}

/// The same bytes finished in another way, or not at all, are other weights.
#[test]
fn another_step_changes_whatever_takes_part_in_it() {
    let case = Case::new(Family::DeepseekV3, Scheme::Nvfp4, 2, Some("trtllm"));
    let plan = case.plan("a");
    for number in 0..plan.placement().finishes.len() {
        let left_out = altered(&plan, |placement| {
            placement.finishes.remove(number);
        });
        let finish = &plan.placement().finishes[number];
        let want: BTreeSet<ParamId> = finish.inputs().into_iter().chain(finish.outputs()).collect();
        assert_eq!(params(&changed(&plan, &left_out, later()), true), want);
        assert_eq!(params(&changed(&left_out, &plan, later()), true), want);
        // what other steps make of these goes with them
        let kept = plan.kept(&changed(&left_out, &plan, later()));
        assert!(want.iter().all(|param| !kept.has(*param)) && !kept.is_empty());
    }
    let find = |finish: &&mut Finish| matches!(finish, Finish::ExpertScalars(_));
    let other_config = altered(&plan, |placement| match placement.finishes.iter_mut().find(find) {
        Some(Finish::ExpertScalars(scalars)) => scalars.per_expert ^= true,
        _ => panic!("it has scalars of experts"),
    });
    let changed = changed(&plan, &other_config, later());
    let names = params(&changed, true);
    let names = names.iter().map(|p| plan.placement().params[*p as usize].name.as_str());
    assert!(
        names.clone().any(|name| name.contains("g1_alphas")),
        "{:?}",
        names.collect::<Vec<_>>()
    );
}

/// What lies in one tensor stays or goes together, as a tensor is read whole; so does what a step works on in place.
#[test]
fn parameters_of_one_tensor_or_step_go_together() {
    let case = Case::new(Family::Llama, Scheme::Bf16, 1, None);
    let plan = case.plan("a");
    let [norm, head] = ["model.norm.weight", "lm_head.weight"].map(|name| {
        let params = plan.placement().params.iter();
        params.clone().position(|p| p.name == name).unwrap() as ParamId
    });
    let mut changed = vec![false; plan.placement().params.len()];
    changed[norm as usize] = true;
    let alone = plan.kept(&changed);
    assert!(!alone.has(norm) && alone.has(head));
    let v_given = false;
    let joined = altered(&plan, |placement| {
        placement.finishes.push(Finish::KvScales(KvScales { k: head, v: norm, v_given }));
    });
    let together = joined.kept(&changed);
    assert!(!together.has(norm) && !together.has(head));
    assert!(together.bytes < alone.bytes);
}

/// Whoever holds other parameters keeps nothing, and numbers of parameters are not taken for others.
#[test]
fn of_other_parameters_nothing_stays() {
    let mut case = Case::new(Family::Llama, Scheme::Bf16, 2, None);
    let held = case.plan("a");
    case.options.tp = 1;
    let next = case.plan("a");
    assert!(changed(&held, &next, later()).iter().all(|changed| *changed));
    assert_eq!(changed(&held, &next, later()).len(), next.placement().params.len());
}

/// What an object store tells of an object.
fn told(version: &str, name: Option<&str>) -> FileIdentity {
    let identity = FileIdentity::remote(5000, version);
    match name {
        Some(name) => identity.named(name.to_owned()),
        None => identity,
    }
}

/// A version alone may be a time, or a weak tag: it does for a load, which reads within seconds, but not for good.
#[test]
fn what_is_elsewhere_stays_by_its_name_alone() {
    let case = Case::new(Family::Llama, Scheme::Bf16, 1, None);
    let with = |told: &dyn Fn(usize) -> FileIdentity| {
        let plan = case.plan("a");
        let identities = (0..plan.identities.len()).map(told).collect();
        Plan { identities: Arc::new(identities), ..plan }
    };
    let kept =
        |held: &Plan, next: &Plan| next.kept(&changed(held, next, SystemTime::UNIX_EPOCH)).bytes;
    let named = with(&|file| told("v1", Some(&format!("uri/{file} v1"))));
    assert_eq!(kept(&named, &named), named.needed_bytes);
    // a digest is the same in another version
    let in_another = with(&|file| told("v2", Some(&format!("uri/{file} v1"))));
    assert_eq!(kept(&named, &in_another), named.needed_bytes);
    let another = with(&|file| told("v1", Some(&format!("uri/{file} v{}", 1 + file % 2))));
    assert!((1..named.needed_bytes).contains(&kept(&named, &another)));
    let unnamed = with(&|_| told("v1", None));
    assert_eq!(kept(&unnamed, &unnamed), 0);
    assert_eq!(kept(&named, &unnamed), 0);
    assert_eq!(kept(&named, &case.plan("a")), 0);
}
