//! The example server's arithmetic: pieces against numbers worked out by hand, the whole against an independent reading
//! of the checkpoint, and ranks together against one alone.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    collections::HashMap,
    fs, io,
    path::Path,
    sync::{Barrier, Mutex},
};

use longshore::plan::Exchange;
use longshore_harness::{
    generator::{Checkpoint, Family, Preset, Scheme},
    oracle,
    scratch::Scratch,
};
use longshore_rank::params::ReadyParams;
use safetensors::SafeTensors;
use serde_json::{Value, json};

mod common;
#[path = "../crates/coordinator/examples/tp_server/math.rs"]
mod math;
#[path = "../crates/coordinator/examples/tp_server/model.rs"]
mod model;

use common::{load, plan};
use math::{Matrix, attend, rms_norm, rope, silu_times, softmax};
use model::{Dims, Group, Model, ModelError, Params};

const TOKENS: [u32; 7] = [3, 99, 0, 41, 3, 77, 12];

/// What a rank holds, second names included.
struct Finished<'a>(HashMap<&'a str, (&'a [u64], &'a [u8])>);

impl<'a> Finished<'a> {
    fn of(ready: &'a ReadyParams) -> Self {
        let mut all: HashMap<_, _> =
            ready.iter().map(|p| (p.name, (p.shape, p.data.host().unwrap()))).collect();
        for (name, source) in ready.aliases() {
            all.insert(name, all[source]);
        }
        Self(all)
    }
}

impl Params for Finished<'_> {
    fn param(&self, name: &str) -> Option<(&[u64], &[u8])> {
        self.0.get(name).copied()
    }
}

/// Ranks that are threads: each puts its part down, all wait, each takes what it wants, all wait again.
struct Threads<'a> {
    rank: usize,
    meeting: &'a Meeting,
}

struct Meeting {
    parts: Vec<Mutex<Vec<f32>>>,
    barrier: Barrier,
}

impl Meeting {
    fn of(ranks: usize) -> Self {
        let parts = (0..ranks).map(|_| Mutex::default()).collect();
        Self { parts, barrier: Barrier::new(ranks) }
    }
}

impl Threads<'_> {
    fn exchange(&self, part: &[f32]) -> Vec<Vec<f32>> {
        *self.meeting.parts[self.rank].lock().unwrap() = part.to_vec();
        self.meeting.barrier.wait();
        let all = self.meeting.parts.iter().map(|part| part.lock().unwrap().clone()).collect();
        self.meeting.barrier.wait();
        all
    }
}

impl Group for Threads<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.meeting.parts.len()
    }

    fn all_reduce(&mut self, x: &mut [f32]) -> io::Result<()> {
        let all = self.exchange(x);
        x.iter_mut().enumerate().for_each(|(i, x)| *x = all.iter().map(|part| part[i]).sum());
        Ok(())
    }

    fn all_gather(&mut self, part: &[f32]) -> io::Result<Vec<f32>> {
        Ok(self.exchange(part).concat())
    }
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// Loads `dir` on `tp` ranks of this process and computes on all of them.
fn logits(dir: &Path, tp: usize, tokens: &[u32]) -> Vec<f32> {
    let dims = Dims::from_config(&config(dir)).unwrap();
    let loaded = load(&plan(dir, &oracle::Options::tp(tp), Exchange::On).unwrap());
    let meeting = Meeting::of(tp);
    let mut all = std::thread::scope(|scope| {
        let threads = loaded.ranks.iter().map(|ready| {
            let mut group = Threads { rank: ready.rank as usize, meeting: &meeting };
            scope.spawn(move || {
                let model = Model::new(dims, group.size());
                model.forward(&Finished::of(ready), &mut group, tokens).unwrap()
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(all.windows(2).all(|w| w[0] == w[1]), "every rank has the same logits");
    all.swap_remove(0)
}

/// The largest difference, relative to the largest logit.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    assert!(largest > 0.0 && largest.is_finite());
    a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

/// Dimensions that tell mistakes: two ranks share a key/value head at tp 4, the vocabulary needs padding.
fn checkpoints() -> Vec<Checkpoint> {
    let llama = || Checkpoint::new(Family::Llama, Scheme::Bf16);
    vec![
        llama(),
        llama().set("num_key_value_heads", 2).set("vocab_size", 100),
        llama().set("tie_word_embeddings", true).set("head_dim", 32),
        llama().preset(Preset::Odd),
    ]
}

fn with_checkpoint(checkpoint: &Checkpoint, test: impl FnOnce(&Path)) {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    checkpoint.write(&dir).unwrap();
    test(&dir);
}

#[test]
fn ranks_together_compute_what_one_computes_alone() {
    for checkpoint in checkpoints() {
        with_checkpoint(&checkpoint, |dir| {
            let alone = logits(dir, 1, &TOKENS);
            for tp in [2, 4] {
                let apart = difference(&logits(dir, tp, &TOKENS), &alone);
                assert!(apart < 1e-3, "{checkpoint:?} tp {tp}: {apart}");
            }
            // order matters, so positions and mask do something
            let mut swapped = TOKENS;
            swapped.swap(0, 1);
            assert!(difference(&logits(dir, 1, &swapped), &alone) > 1e-2, "{checkpoint:?}");
        });
    }
}

/// The loader fuses, shards and pads; this reads the checkpoint's own tensors and does none of that.
#[test]
fn the_unsharded_computation_is_that_of_the_checkpoints_own_tensors() {
    for checkpoint in checkpoints() {
        with_checkpoint(&checkpoint, |dir| {
            let naive: Vec<f32> = Naive::read(dir).logits(&TOKENS);
            let apart = difference(&logits(dir, 1, &TOKENS), &naive);
            assert!(apart < 1e-3, "{checkpoint:?}: {apart}");
        });
    }
}

/// The model once more: in `f64`, token by token, with keys and values of earlier tokens kept, unfused.
struct Naive {
    config: Value,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Naive {
    fn read(dir: &Path) -> Self {
        let mut tensors = HashMap::new();
        let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        for path in paths.filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
            let file = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&file).unwrap().iter() {
                assert_eq!(view.dtype(), safetensors::Dtype::BF16, "{name}");
                let pairs = view.data().chunks(2);
                let wide = pairs.map(|p| f64::from(f32::from_le_bytes([0, 0, p[0], p[1]])));
                tensors.insert(name.to_owned(), (view.shape().to_vec(), wide.collect()));
            }
        }
        Self { config: config(dir), tensors }
    }

    fn number(&self, key: &str) -> f64 {
        self.config[key].as_f64().unwrap()
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (shape, weight) = &self.tensors[&format!("{name}.weight")];
        let cell = |i: usize| (0..shape[1]).map(|j| weight[i * shape[1] + j] * x[j]).sum();
        (0..shape[0]).map(cell).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (_, weight) = &self.tensors[&format!("{name}.weight")];
        let square: f64 = x.iter().map(|x| x * x).sum();
        let rms = (square / x.len() as f64 + self.number("rms_norm_eps")).sqrt();
        (0..x.len()).map(|i| x[i] / rms * weight[i]).collect()
    }

    /// Head `h` of `x`, each pair of numbers a complex one that is multiplied by `e^(i · angle)`.
    fn turned(&self, x: &[f64], h: usize, position: usize) -> Vec<f64> {
        let dim = self.number("head_dim") as usize;
        let mut head = x[h * dim..(h + 1) * dim].to_vec();
        for i in 0..dim / 2 {
            let angle =
                position as f64 / self.number("rope_theta").powf(2.0 * i as f64 / dim as f64);
            let (re, im) = (head[i], head[i + dim / 2]);
            head[i] = re * angle.cos() - im * angle.sin();
            head[i + dim / 2] = re * angle.sin() + im * angle.cos();
        }
        head
    }

    fn logits(&self, tokens: &[u32]) -> Vec<f32> {
        let [layers, heads, kv_heads, dim] =
            ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
                .map(|key| self.number(key) as usize);
        let plus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
        // keys and values seen so far: of each layer, each head, each token
        let mut seen = vec![vec![Vec::<(Vec<f64>, Vec<f64>)>::new(); kv_heads]; layers];
        let mut last = Vec::new();
        for (position, &token) in tokens.iter().enumerate() {
            let (shape, table) = &self.tensors["model.embed_tokens.weight"];
            let mut x = table[token as usize * shape[1]..][..shape[1]].to_vec();
            for (layer, seen) in seen.iter_mut().enumerate() {
                let name = |module: &str| format!("model.layers.{layer}.{module}");
                let normed = self.norm(&name("input_layernorm"), &x);
                let [q, k, v] = ["q", "k", "v"]
                    .map(|p| self.linear(&name(&format!("self_attn.{p}_proj")), &normed));
                for (h, seen) in seen.iter_mut().enumerate() {
                    seen.push((self.turned(&k, h, position), v[h * dim..][..dim].to_vec()));
                }
                let mut mixed = Vec::new();
                for h in 0..heads {
                    let (q, of_group) = (self.turned(&q, h, position), &seen[h * kv_heads / heads]);
                    let score = |k: &[f64]| {
                        let fit: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        (fit / (dim as f64).sqrt()).exp()
                    };
                    let scores: Vec<f64> = of_group.iter().map(|(k, _)| score(k)).collect();
                    let sum: f64 = scores.iter().sum();
                    for i in 0..dim {
                        let parts = scores.iter().zip(of_group).map(|(s, (_, v))| s / sum * v[i]);
                        mixed.push(parts.sum());
                    }
                }
                x = plus(&x, &self.linear(&name("self_attn.o_proj"), &mixed));
                let normed = self.norm(&name("post_attention_layernorm"), &x);
                let gate = self.linear(&name("mlp.gate_proj"), &normed);
                let up = self.linear(&name("mlp.up_proj"), &normed);
                let inner: Vec<f64> =
                    gate.iter().zip(&up).map(|(g, u)| g * u / (1.0 + (-g).exp())).collect();
                x = plus(&x, &self.linear(&name("mlp.down_proj"), &inner));
            }
            last = x;
        }
        let head = match self.config["tie_word_embeddings"] == true {
            true => "model.embed_tokens",
            false => "lm_head",
        };
        let logits = self.linear(head, &self.norm("model.norm", &last));
        logits.into_iter().map(|x| x as f32).collect()
    }
}

fn assert_near(found: &[f32], expected: &[f32]) {
    let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
    assert!(
        found.len() == expected.len() && found.iter().zip(expected).all(near),
        "{found:?}, expected {expected:?}"
    );
}

#[test]
fn rms_norm_by_hand() {
    // mean square (9 + 16) / 2 = 12.5, and 12.5 again
    let root = 12.5f32.sqrt();
    let expected = [3.0 / root, 8.0 / root, -4.0 / root, 6.0 / root];
    assert_near(&rms_norm(&[3.0, 4.0, -4.0, 3.0], &[1.0, 2.0], 0.0), &expected);
    assert_near(&rms_norm(&[0.0, 0.0], &[1.0, 1.0], 1e-5), &[0.0, 0.0]);
}

#[test]
fn rope_by_hand() {
    // with theta 100 and four numbers, the pairs (1st, 3rd) and (2nd, 4th) turn by 1 and by 1/10 radian per position
    let mut head = [1.0, 0.0, 0.0, 1.0];
    rope(&mut head, 0, 100.0);
    assert_near(&head, &[1.0, 0.0, 0.0, 1.0]);
    rope(&mut head, 2, 100.0);
    let (sin2, cos2) = 2.0f32.sin_cos();
    let (sin02, cos02) = 0.2f32.sin_cos();
    assert_near(&head, &[cos2, -sin02, sin2, cos02]);
}

/// What rotary embedding is for: how well a key fits depends on how far apart the two are, not on where they stand.
#[test]
fn rope_sees_distances_only() {
    let fit = |query: usize, key: usize| {
        let (mut q, mut k) = ([0.3, -1.0, 2.0, 0.7], [1.1, 0.4, -0.2, 0.9]);
        rope(&mut q, query, 500.0);
        rope(&mut k, key, 500.0);
        math::dot(&q, &k)
    };
    assert_near(&[fit(9, 4)], &[fit(5, 0)]);
    assert!((fit(9, 4) - fit(9, 5)).abs() > 1e-2);
}

#[test]
fn attention_by_hand() {
    let mut shares = [0.0, 3.0f32.ln(), 1000.0];
    softmax(&mut shares[..2]);
    assert_near(&shares[..2], &[0.25, 0.75]);
    softmax(&mut shares);
    assert_near(&shares, &[0.0, 0.0, 1.0]);
    // scores 0 and ln 3 after the division by √4
    let query = [2.0, 0.0, 0.0, 0.0];
    let keys: [&[f32]; 2] = [&[0.0; 4], &[3.0f32.ln(), 9.0, 9.0, 9.0]];
    let values: [&[f32]; 2] = [&[4.0, 0.0, 0.0, 8.0], &[0.0, 4.0, 0.0, 8.0]];
    let mut out = [0.0; 4];
    attend(&query, keys.into_iter(), values.into_iter(), &mut out);
    assert_near(&out, &[1.0, 3.0, 0.0, 8.0]);
}

#[test]
fn linear_layer_and_gate_by_hand() {
    // BF16 of 1, 2, -3, 0.5 in two rows
    let bytes = [0x80, 0x3f, 0x00, 0x40, 0x40, 0xc0, 0x00, 0x3f];
    let weight = Matrix { rows: 2, cols: 2, bytes: &bytes };
    assert_near(&weight.times(&[1.0, 1.0, 10.0, 20.0]), &[3.0, -2.5, 50.0, -20.0]);
    // ln 3 · sigmoid(ln 3) = ln 3 · 3/4
    assert_near(&[silu_times(3.0f32.ln(), 2.0), silu_times(0.0, 5.0)], &[1.5 * 3.0f32.ln(), 0.0]);
}

#[test]
fn what_is_not_computed_is_refused() {
    let config = json!({
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 2,
        "intermediate_size": 8, "vocab_size": 10,
    });
    let dims = Dims::from_config(&config).unwrap();
    assert_eq!((dims.kv_heads, dims.head_dim), (2, 2));
    for (key, value) in [
        ("model_type", json!("qwen3")),
        ("rope_scaling", json!({ "factor": 8.0 })),
        ("attention_bias", json!(true)),
        ("hidden_act", json!("gelu")),
        ("hidden_size", json!("4")),
    ] {
        let mut other = config.clone();
        other[key] = value;
        let text = Dims::from_config(&other).unwrap_err().to_string();
        assert!(text.contains(key), "{text}");
    }
    let (meeting, nothing) = (Meeting::of(1), Finished(HashMap::new()));
    let mut alone = Threads { rank: 0, meeting: &meeting };
    let mut error =
        |tokens: &[u32]| Model::new(dims, 1).forward(&nothing, &mut alone, tokens).unwrap_err();
    assert!(matches!(error(&[]), ModelError::Token { found: None, .. }));
    assert!(matches!(error(&[3, 10]), ModelError::Token { found: Some(10), .. }));
    assert!(matches!(error(&[3]), ModelError::Param { found: None, .. }));
}
