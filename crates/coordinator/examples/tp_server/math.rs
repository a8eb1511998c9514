//! The arithmetic of a Llama layer in plain loops: BF16 weights, `f32` everything else. Written to be read.

/// A BF16 matrix as it lies in memory: little-endian, one row after the other, as a checkpoint has it.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// The numbers of one row.
    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = f32> + use<'a> {
        numbers(&self.bytes[2 * self.cols * row..][..2 * self.cols])
    }

    /// What a linear layer does: `x: [tokens, cols]` → `[tokens, rows]`, each row of the weight times each token.
    pub(crate) fn times(&self, x: &[f32]) -> Vec<f32> {
        let tokens = x.len() / self.cols;
        let mut out = vec![0.0; tokens * self.rows];
        let mut weights = vec![0.0; self.cols];
        for row in 0..self.rows {
            weights.iter_mut().zip(self.row(row)).for_each(|(slot, w)| *slot = w);
            for (token, x) in x.chunks_exact(self.cols).enumerate() {
                out[token * self.rows + row] = dot(&weights, x);
            }
        }
        out
    }
}

/// BF16 is the upper half of an `f32`.
pub(crate) fn numbers(bytes: &[u8]) -> impl Iterator<Item = f32> + use<'_> {
    let upper = |pair: &[u8; 2]| u32::from(u16::from_le_bytes(*pair)) << 16;
    bytes.as_chunks::<2>().0.iter().map(move |pair| f32::from_bits(upper(pair)))
}

/// The sum of products.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Adds `b` to `a`.
pub(crate) fn add(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

/// RMSNorm of each token of `x: [tokens, weight.len()]`: divided by the root of its mean square, times the weight.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for token in x.chunks_exact(weight.len()) {
        let mean_square = dot(token, token) / weight.len() as f32;
        let scale = 1.0 / (mean_square + eps).sqrt();
        out.extend(token.iter().zip(weight).map(|(x, w)| x * scale * w));
    }
    out
}

/// Rotary position embedding of one head, as Llama's checkpoints on the hub have it: number `i` of the first half and
/// number `i` of the second are turned together, by `position · theta^(-i / half)` radians.
pub(crate) fn rope(head: &mut [f32], position: usize, theta: f32) {
    let half = head.len() / 2;
    let (first, second) = head.split_at_mut(half);
    for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
        let angle = position as f32 * theta.powf(-(i as f32) / half as f32);
        let (sin, cos) = angle.sin_cos();
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// Turns scores into shares that sum to one.
pub(crate) fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - largest).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s /= sum);
}

/// Attention of one query head: the values of the tokens so far, weighted by how well their keys fit. The causal mask is
/// that `keys` and `values` end with the query's own token.
pub(crate) fn attend<'k>(
    query: &[f32],
    keys: impl Iterator<Item = &'k [f32]>,
    values: impl Iterator<Item = &'k [f32]>,
    out: &mut [f32],
) {
    let scale = 1.0 / (query.len() as f32).sqrt();
    let mut shares: Vec<f32> = keys.map(|key| dot(query, key) * scale).collect();
    softmax(&mut shares);
    for (share, value) in shares.iter().zip(values) {
        out.iter_mut().zip(value).for_each(|(out, v)| *out += share * v);
    }
}

/// SwiGLU: `gate · sigmoid(gate) · up`.
pub(crate) fn silu_times(gate: f32, up: f32) -> f32 {
    gate / (1.0 + (-gate).exp()) * up
}
