//! Random dimensions, switches and options against the oracle: what it accepts is loaded bit for bit, what it refuses is
//! refused.
//!
//! Each case follows from its number alone. `LONGSHORE_CASES=from..to` runs others than the default ones.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{ops::Range, panic::catch_unwind};

use longshore::{load::RunOptions, plan::Exchange};
use longshore_harness::{
    generator::{Checkpoint, Family, Preset, Scheme},
    oracle,
    scratch::Scratch,
};
use longshore_rank::storage::IoChoice;
use serde_json::{Value, json};

mod common;

use common::{compare, load_with, plan_options};

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

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize].clone()
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.next() % n == 0
    }
}

/// What may be changed, and into what.
fn settings(family: Family, scheme: Scheme) -> Vec<(&'static str, Vec<Value>)> {
    let numbers = |values: &[u64]| values.iter().map(|v| json!(v)).collect::<Vec<Value>>();
    let switch = || vec![json!(true), json!(false)];
    let mut menu = vec![
        ("num_hidden_layers", numbers(&[1, 2])),
        ("hidden_size", numbers(&[128, 192, 256, 384])),
        ("intermediate_size", numbers(&[128, 192, 256, 384, 512])),
        ("vocab_size", numbers(&[100, 128, 190, 256])),
        ("files", numbers(&[1, 2, 5])),
        ("unaligned", switch()),
        ("inv_freq", switch()),
        ("norm_dtype", vec![json!("F32"), json!("BF16")]),
        ("model_dtype", vec![json!("bfloat16"), json!("bfloat16"), json!("float16")]),
        ("num_attention_heads", numbers(&[2, 4, 8])),
        ("tie_word_embeddings", switch()),
    ];
    let dense = matches!(family, Family::Llama | Family::Qwen3 | Family::Qwen3Moe);
    if dense {
        menu.extend([
            ("num_key_value_heads", numbers(&[1, 2, 4])),
            ("head_dim", numbers(&[16, 32])),
            ("attention_bias", switch()),
        ]);
    } else {
        let mut ranks = numbers(&[64, 128, 256]);
        // an indexer has no weights without a rank
        if !matches!(family, Family::DeepseekV32 | Family::GlmMoeDsa) {
            ranks.push(Value::Null);
        }
        menu.extend([
            ("q_lora_rank", ranks),
            ("kv_lora_rank", numbers(&[64, 128])),
            ("qk_nope_head_dim", numbers(&[32, 48, 64])),
            ("v_head_dim", numbers(&[32, 64, 80])),
            ("n_shared_experts", numbers(&[0, 1, 1, 2])),
            ("first_k_dense_replace", numbers(&[0, 1])),
            ("n_routed_experts", numbers(&[2, 4, 6, 8])),
        ]);
    }
    if family == Family::Qwen3Moe {
        menu.push(("num_experts", numbers(&[2, 4, 8])));
    }
    if family != Family::Llama && family != Family::Qwen3 {
        menu.push(("moe_intermediate_size", numbers(&[64, 96, 128, 160, 256, 384, 512])));
    }
    match scheme {
        Scheme::Nvfp4 => menu.extend([
            ("kv_scales", switch()),
            ("scalar_shape", numbers(&[0, 1])),
            ("input_scale_pair_differs", switch()),
            ("nvfp4_attention", switch()),
        ]),
        Scheme::Mxfp4 => menu.extend([("mxfp4_shared", switch()), ("mxfp4_kv_b", switch())]),
        Scheme::Int4 => menu.push(("int4_linears", switch())),
        _ => {}
    }
    if family == Family::KimiK25 {
        menu.push(("short_layer_names", switch()));
    }
    menu
}

fn checkpoint(random: &mut Random) -> Checkpoint {
    let family = random.pick(Family::ALL);
    let scheme = random.pick(family.schemes());
    let preset = random.pick(&[Preset::Tiny, Preset::Odd]);
    let mut checkpoint = Checkpoint::new(family, scheme).preset(preset).seed(random.next() % 1000);
    for (key, values) in settings(family, scheme) {
        if random.one_in(3) {
            checkpoint = checkpoint.set(key, random.pick(&values));
        }
    }
    checkpoint
}

fn options(random: &mut Random) -> oracle::Options {
    let tp = random.pick(&[1, 2, 2, 3, 4, 8]);
    let divisors: Vec<usize> = (1..=tp).filter(|ep| tp % ep == 0).collect();
    let mut options = oracle::Options::tp(tp).ep(random.pick(&divisors));
    if random.one_in(2) {
        let layouts = ["none", "cutlass", "flashinfer-cutlass", "trtllm", "aiter"];
        options = options.kernel_layout(random.pick(&layouts));
    }
    if random.one_in(5) {
        options = options.fuse_shared_experts();
    }
    match random.next() % 12 {
        0 => options.draft(),
        1 => options.language_only(),
        2 => options.encoder_only(),
        _ => options,
    }
}

/// How a case ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// The generator has no such checkpoint.
    Nothing,
    Refused,
    Loaded,
}

fn run(case: u64) -> Ended {
    let mut random = Random(case);
    let (checkpoint, options) = (checkpoint(&mut random), options(&mut random));
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    // dimensions that the generator asserts against
    let written = catch_unwind(|| checkpoint.write(&dir));
    if !matches!(written, Ok(Ok(_))) {
        return Ended::Nothing;
    }
    let what = format!("case {case}: {checkpoint:?} {:?}", options.arguments());
    let mut wanted = plan_options(&options, random.pick(&[Exchange::On, Exchange::Off]));
    wanted.read_bytes = random.pick(&[None, Some(64 << 10)]);
    let planned = longshore::discover::discover(&dir)
        .and_then(|found| longshore::plan::Plan::new(found, &wanted));
    match (oracle::answer(&dir, &options), planned) {
        (Err(_), Err(_)) => Ended::Refused,
        (Ok(answer), Ok(plan)) => {
            let io = random.pick(&[IoChoice::Buffered, IoChoice::Direct]);
            let run = RunOptions { io, ..RunOptions::default() };
            let loaded = load_with(&plan, &run).unwrap_or_else(|e| panic!("{what}: {}", e.line()));
            compare(&what, &loaded, &answer);
            Ended::Loaded
        }
        (Err(e), Ok(_)) => panic!("{what}: should be refused: {e}"),
        (Ok(_), Err(e)) => panic!("{what}: should load: {}", e.line()),
    }
}

fn cases() -> Range<u64> {
    let Ok(text) = std::env::var("LONGSHORE_CASES") else {
        return 0..300;
    };
    let range = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    range.unwrap_or_else(|| panic!("LONGSHORE_CASES={text} is not FROM..TO"))
}

#[test]
fn random_models_equal_the_oracle() {
    let cases = cases();
    let count = cases.end - cases.start;
    let ended: Vec<Ended> = cases.map(run).collect();
    let loaded = ended.iter().filter(|e| **e == Ended::Loaded).count() as u64;
    let refused = ended.iter().filter(|e| **e == Ended::Refused).count() as u64;
    println!("{count} cases: {loaded} loaded, {refused} refused");
    assert!(4 * loaded >= count, "only {loaded} of {count} were loaded");
}
