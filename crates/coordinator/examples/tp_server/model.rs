//! A dense Llama on one rank of a tensor-parallel group: token ids → logits of the last token.
//!
//! Works on the parameters as the loader leaves them, by their runtime names, and does not care who loaded them. Written
//! once for any number of ranks; with one, the two collectives have nothing to do.
//!
//! | parameter | shape on this rank | what it is a part of |
//! |---|---|---|
//! | `model.embed_tokens.weight`, `lm_head.weight` | `[padded vocabulary / tp, hidden]` | rows |
//! | `…self_attn.qkv_proj.weight` | `[(heads + 2 · key/value heads) · head_dim, hidden]` | rows of q, of k, of v, in this order |
//! | `…self_attn.o_proj.weight` | `[hidden, heads · head_dim]` | columns: its output is a partial sum |
//! | `…mlp.gate_up_proj.weight` | `[2 · inner, hidden]` | rows of gate, then of up |
//! | `…mlp.down_proj.weight` | `[hidden, inner]` | columns: its output is a partial sum |
//! | norms | `[hidden]` | whole on every rank |

use std::io;

use serde_json::Value;

use crate::math::{Matrix, add, attend, numbers, rms_norm, rope, silu_times};

/// The ranks that compute together, seen from one of them.
pub(crate) trait Group {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Replaces `x` on every rank by the sum of all ranks' `x`, the same to the bit everywhere.
    fn all_reduce(&mut self, x: &mut [f32]) -> io::Result<()>;
    /// All ranks' parts, one after the other.
    fn all_gather(&mut self, part: &[f32]) -> io::Result<Vec<f32>>;
}

/// Where parameters come from: `name` → shape and bytes (BF16), aliases included.
pub(crate) trait Params {
    /// The parameter of that name.
    fn param(&self, name: &str) -> Option<(&[u64], &[u8])>;
}

/// Why there are no logits.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelError {
    /// The configuration is not one that this model computes.
    #[error("config.json: {key} is {found}, {expected} is computed here")]
    Config { key: &'static str, found: Value, expected: &'static str },
    /// A parameter is missing or has another shape.
    #[error("parameter {name} is {found:?}, expected {expected:?} in BF16")]
    Param { name: String, found: Option<Vec<u64>>, expected: Vec<usize> },
    /// A token that is not in the vocabulary, or no token at all.
    #[error("{}, the vocabulary has {vocab}", .found.map_or("no token".into(), |token| format!("token {token}")))]
    Token { found: Option<u32>, vocab: usize },
    /// Another rank does not answer.
    #[error("a collective operation failed")]
    Group(#[from] io::Error),
}

/// Dimensions of the whole model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) inner: usize,
    pub(crate) vocab: usize,
    pub(crate) eps: f32,
    pub(crate) theta: f32,
}

impl Dims {
    /// Reads them from a Llama's `config.json`.
    ///
    /// # Errors
    /// A key is missing, or asks for what is not computed here.
    pub(crate) fn from_config(config: &Value) -> Result<Self, ModelError> {
        let refuse =
            |key, expected| Err(ModelError::Config { key, found: config[key].clone(), expected });
        if config["model_type"] != "llama" {
            return refuse("model_type", "llama");
        }
        for key in ["rope_scaling", "attention_bias", "mlp_bias"] {
            if !matches!(config[key], Value::Null | Value::Bool(false)) {
                return refuse(key, "none");
            }
        }
        if !matches!(config["hidden_act"].as_str(), None | Some("silu")) {
            return refuse("hidden_act", "silu");
        }
        let size = |key| match config[key].as_u64() {
            Some(n) if n > 0 => Ok(n as usize),
            _ => Err(ModelError::Config { key, found: config[key].clone(), expected: "a number" }),
        };
        let size_or = |key, default| if config[key].is_null() { Ok(default) } else { size(key) };
        let (hidden, heads) = (size("hidden_size")?, size("num_attention_heads")?);
        Ok(Self {
            layers: size("num_hidden_layers")?,
            hidden,
            heads,
            kv_heads: size_or("num_key_value_heads", heads)?,
            head_dim: size_or("head_dim", hidden / heads)?,
            inner: size("intermediate_size")?,
            vocab: size("vocab_size")?,
            eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
            theta: config["rope_theta"].as_f64().unwrap_or(10_000.0) as f32,
        })
    }
}

/// The vocabulary is padded to whole multiples of this before it is shared out.
const VOCAB_PAD: usize = 64;

/// One rank's part of the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    dims: Dims,
    /// Query heads of this rank.
    heads: usize,
    /// Key/value heads of this rank; with fewer than ranks, several ranks hold the same one.
    kv_heads: usize,
    /// Inner numbers of the MLP on this rank.
    inner: usize,
    /// Rows of the vocabulary on this rank, padding included.
    vocab: usize,
}

impl Model {
    /// The part of each of `ranks` ranks. The loader refuses dimensions that they do not divide.
    pub(crate) fn new(dims: Dims, ranks: usize) -> Self {
        Self {
            dims,
            heads: dims.heads / ranks,
            kv_heads: (dims.kv_heads / ranks).max(1),
            inner: dims.inner / ranks,
            vocab: dims.vocab.next_multiple_of(VOCAB_PAD) / ranks,
        }
    }

    /// Logits of the token that follows `tokens`, one per word of the vocabulary; the same on every rank.
    ///
    /// Every rank calls it with the same tokens.
    ///
    /// # Errors
    /// A parameter is not what it should be, a token is unknown, or another rank does not answer.
    pub(crate) fn forward(
        &self,
        params: &impl Params,
        group: &mut impl Group,
        tokens: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        let hidden = self.dims.hidden;
        let mut x = self.embed(params, group, tokens)?;
        for layer in 0..self.dims.layers {
            let name = |module: &str| format!("model.layers.{layer}.{module}.weight");
            let normed = self.norm(params, &name("input_layernorm"), &x)?;
            let qkv = self.matrix(params, &name("self_attn.qkv_proj"), self.qkv_rows(), hidden)?;
            let o = self.matrix(params, &name("self_attn.o_proj"), hidden, self.q_cols())?;
            let mut out = o.times(&self.attention(&qkv.times(&normed)));
            group.all_reduce(&mut out)?;
            add(&mut x, &out);

            let normed = self.norm(params, &name("post_attention_layernorm"), &x)?;
            let gate_up = self.matrix(params, &name("mlp.gate_up_proj"), 2 * self.inner, hidden)?;
            let down = self.matrix(params, &name("mlp.down_proj"), hidden, self.inner)?;
            let mut out = down.times(&self.gated(&gate_up.times(&normed)));
            group.all_reduce(&mut out)?;
            add(&mut x, &out);
        }
        let last = self.norm(params, "model.norm.weight", &x[x.len() - hidden..])?;
        let head = self.matrix(params, "lm_head.weight", self.vocab, hidden)?;
        let mut logits = group.all_gather(&head.times(&last))?;
        logits.truncate(self.dims.vocab);
        Ok(logits)
    }

    /// `[tokens, hidden]`: each token's row comes from the one rank that has it.
    fn embed(
        &self,
        params: &impl Params,
        group: &mut impl Group,
        tokens: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        let (hidden, vocab) = (self.dims.hidden, self.dims.vocab);
        let unknown = tokens.iter().find(|&&token| token as usize >= vocab);
        if unknown.is_some() || tokens.is_empty() {
            return Err(ModelError::Token { found: unknown.copied(), vocab });
        }
        let table = self.matrix(params, "model.embed_tokens.weight", self.vocab, hidden)?;
        let first = group.rank() * self.vocab;
        let mut x = vec![0.0; tokens.len() * hidden];
        for (&token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            let row = (token as usize).wrapping_sub(first);
            if row < self.vocab {
                x.iter_mut().zip(table.row(row)).for_each(|(x, w)| *x = w);
            }
        }
        group.all_reduce(&mut x)?;
        Ok(x)
    }

    /// Attention of this rank's heads: `qkv: [tokens, rows of qkv_proj]` → `[tokens, heads · head_dim]`.
    fn attention(&self, qkv: &[f32]) -> Vec<f32> {
        let (dim, width) = (self.dims.head_dim, self.qkv_rows());
        let mut qkv = qkv.to_vec();
        for (position, token) in qkv.chunks_exact_mut(width).enumerate() {
            let (turned, _values) = token.split_at_mut((self.heads + self.kv_heads) * dim);
            turned.chunks_exact_mut(dim).for_each(|head| rope(head, position, self.dims.theta));
        }
        let tokens: Vec<&[f32]> = qkv.chunks_exact(width).collect();
        let mut out = vec![0.0; tokens.len() * self.q_cols()];
        for (position, out) in out.chunks_exact_mut(self.q_cols()).enumerate() {
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                // so many query heads share a key/value head
                let kv = head / (self.heads / self.kv_heads);
                let part =
                    |slot: usize| tokens[..=position].iter().map(move |t| &t[slot * dim..][..dim]);
                let (keys, values) = (part(self.heads + kv), part(self.heads + self.kv_heads + kv));
                attend(&tokens[position][head * dim..][..dim], keys, values, out);
            }
        }
        out
    }

    /// `[tokens, 2 · inner]`, gate then up → `[tokens, inner]`.
    fn gated(&self, gate_up: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(gate_up.len() / 2);
        for token in gate_up.chunks_exact(2 * self.inner) {
            let (gate, up) = token.split_at(self.inner);
            out.extend(gate.iter().zip(up).map(|(&gate, &up)| silu_times(gate, up)));
        }
        out
    }

    fn norm(&self, params: &impl Params, name: &str, x: &[f32]) -> Result<Vec<f32>, ModelError> {
        let weight: Vec<f32> = numbers(bytes(params, name, &[self.dims.hidden])?).collect();
        Ok(rms_norm(x, &weight, self.dims.eps))
    }

    fn matrix<'p>(
        &self,
        params: &'p impl Params,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix<'p>, ModelError> {
        Ok(Matrix { rows, cols, bytes: bytes(params, name, &[rows, cols])? })
    }

    fn q_cols(&self) -> usize {
        self.heads * self.dims.head_dim
    }

    fn qkv_rows(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dims.head_dim
    }
}

/// The bytes of a parameter that has the shape it should have.
fn bytes<'p>(
    params: &'p impl Params,
    name: &str,
    expected: &[usize],
) -> Result<&'p [u8], ModelError> {
    let found = params.param(name);
    match found {
        Some((shape, bytes))
            if shape.iter().map(|&d| d as usize).eq(expected.iter().copied())
                && bytes.len() == 2 * expected.iter().product::<usize>() =>
        {
            Ok(bytes)
        }
        _ => Err(ModelError::Param {
            name: name.to_owned(),
            found: found.map(|(shape, _)| shape.to_vec()),
            expected: expected.to_vec(),
        }),
    }
}
