//! Linear layers: which part of each tensor a rank holds, and under which names (§3.2).

use super::build::Builder;
use super::checkpoint::Stored;
use super::tensor::Tensor;

/// Which part of a tensor a rank holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    Whole,
    /// Part `index` of `count` equal parts of the output dimension.
    Rows {
        index: usize,
        count: usize,
    },
    /// Part `index` of `count` equal parts of the input dimension.
    Columns {
        index: usize,
        count: usize,
    },
}

impl Cut {
    /// This part of a weight, a block scale or a bias.
    pub(super) fn of(self, tensor: &Tensor) -> Tensor {
        match self {
            Cut::Whole => tensor.clone(),
            Cut::Rows { index, count } => {
                let share = exact(tensor.shape[0], count);
                tensor.rows(index * share, share)
            }
            // a bias has no input dimension: every rank holds it in full
            Cut::Columns { .. } if tensor.shape.len() == 1 => tensor.clone(),
            Cut::Columns { index, count } => {
                let share = exact(tensor.shape[1], count);
                tensor.columns(index * share, share)
            }
        }
    }
}

fn exact(size: usize, count: usize) -> usize {
    assert_eq!(size % count, 0, "{size} in {count} parts");
    size / count
}

/// One module of the checkpoint and the part of it that goes into a runtime module.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) module: String,
    pub(super) cut: Cut,
}

impl Part {
    pub(super) fn new(module: impl Into<String>, cut: Cut) -> Part {
        Part { module: module.into(), cut }
    }
}

impl Builder<'_> {
    /// An output-parallel cut for this rank.
    pub(super) fn rows(&self) -> Cut {
        Cut::Rows { index: self.rank, count: self.options.tp }
    }

    /// An input-parallel cut for this rank.
    pub(super) fn columns(&self) -> Cut {
        Cut::Columns { index: self.rank, count: self.options.tp }
    }

    /// A linear layer made of one module.
    pub(super) fn linear_of(&mut self, target: &str, source: &str, cut: Cut) {
        self.linear(target, &[Part::new(source, cut)], 1);
    }

    /// A linear layer whose parts lie one below the other, with a slot for the scalars of each of
    /// the first `slots` parts.
    pub(super) fn linear(&mut self, target: &str, parts: &[Part], slots: usize) {
        let stored = self.checkpoint.stored(&parts[0].module);
        for part in parts {
            let other = self.checkpoint.stored(&part.module);
            assert_eq!(other, stored, "{} is stored in another way", part.module);
        }
        let named = |suffix: &str| format!("{target}.{suffix}");
        match stored {
            Stored::Bf16 => {
                let weight = self.stacked(parts, "weight");
                self.put(named("weight"), weight.cast(self.checkpoint.model_dtype()));
            }
            Stored::Fp8 => {
                let scale = self.stacked(parts, "weight_scale_inv");
                self.put(named("weight"), self.stacked(parts, "weight"));
                self.put(named("weight_scale_inv"), scale.cast("F32"));
            }
            Stored::Mxfp4 => {
                self.put(named("weight"), self.stacked(parts, "weight"));
                self.put(named("weight_scale"), self.stacked(parts, "weight_scale"));
            }
            Stored::Int4 => {
                let scale = self.stacked(parts, "weight_scale");
                self.put(named("weight_packed"), self.stacked(parts, "weight_packed"));
                self.put(named("weight_scale"), scale.cast("BF16"));
                let shapes: Vec<_> = parts.iter().map(|p| self.weight_shape(&p.module)).collect();
                self.put(named("weight_shape"), shapes[0].clone());
            }
            Stored::Nvfp4 => {
                let weight = self.stacked(parts, "weight");
                let scale = self.stacked(parts, "weight_scale");
                let scale_2 = self.scalars(parts, "weight_scale_2");
                let input_scale = self.scalars(parts, "input_scale");
                let (scale_2, input_scale) = (&scale_2[..slots], &input_scale[..slots]);
                self.nvfp4_linear(target, weight, scale, scale_2, input_scale);
            }
        }
        if self.checkpoint.has(&format!("{}.bias", parts[0].module)) {
            let bias = self.stacked(parts, "bias");
            self.put(named("bias"), bias.cast(self.checkpoint.model_dtype()));
        }
    }

    /// The parts' own shares of one tensor each, one below the other.
    pub(super) fn stacked(&self, parts: &[Part], suffix: &str) -> Tensor {
        let shares = parts.iter().map(|part| {
            let tensor = self.checkpoint.get(&format!("{}.{suffix}", part.module));
            part.cut.of(tensor)
        });
        Tensor::stack(&shares.collect::<Vec<_>>())
    }

    /// The unsharded rows and columns of one module, I64 whatever the file has.
    pub(super) fn weight_shape(&self, module: &str) -> Tensor {
        let shape = self.checkpoint.get(&format!("{module}.weight_shape"));
        let size = shape.element();
        let mut bytes = Vec::new();
        for number in shape.bytes.chunks_exact(size) {
            bytes.extend(number);
            bytes.extend(vec![0; 8 - size]); // little-endian and never negative
        }
        Tensor::new("I64", &[2], bytes)
    }

    fn scalars(&self, parts: &[Part], suffix: &str) -> Vec<f32> {
        let scalar = |part: &Part| self.checkpoint.scalar(&format!("{}.{suffix}", part.module));
        parts.iter().map(scalar).collect()
    }
}
