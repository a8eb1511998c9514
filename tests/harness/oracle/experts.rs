//! Routed experts: one parameter for all local experts (§2.3, §3.5, §4b, §4e, §4g).

use super::build::Builder;
use super::checkpoint::{Checkpoint, Stored};
use super::nvfp4::Nvfp4Experts;
use super::options::Layout;
use super::permute::{
    column_blocks, interleave_and_shuffle, shuffle_16x16, shuffle_e8m0, shuffle_rows_32,
};
use super::tensor::Tensor;

impl<'a> Builder<'a> {
    /// The experts of a layer; `source` and `target` end in `mlp.`.
    pub(super) fn experts(&mut self, source: &str, target: &str) {
        let stored = self.checkpoint.stored(&format!("{source}experts.0.gate_proj"));
        let raw = self.raw_experts(source, stored);
        let out = format!("{target}experts.");
        match stored {
            Stored::Bf16 => self.bf16_experts(&out, &raw),
            Stored::Fp8 => self.fp8_experts(&out, &raw),
            Stored::Mxfp4 => {
                let (w13, w13_scale) = (raw.w13("weight", 1), raw.w13("weight_scale", 1));
                let (w2, w2_scale) = (raw.w2("weight", 2), raw.w2("weight_scale", 32));
                self.mxfp4_experts(&out, "w13", &w13, &w13_scale);
                self.mxfp4_experts(&out, "w2", &w2, &w2_scale);
            }
            Stored::Int4 => self.int4_experts(&out, &raw),
            Stored::Nvfp4 => {
                let modules = &raw.modules;
                let experts = Nvfp4Experts {
                    w13: raw.w13("weight", 1),
                    w13_scale: raw.w13("weight_scale", 1),
                    w2: raw.w2("weight", 2),
                    w2_scale: raw.w2("weight_scale", 16),
                    w13_scale_2: modules.iter().map(|m| self.pair(m, "weight_scale_2")).collect(),
                    w2_scale_2: modules.iter().map(|m| self.down(m, "weight_scale_2")).collect(),
                    w13_input: self.all_experts(source, |m| self.pair(m, "input_scale")),
                    w2_input: self.all_experts(source, |m| self.down(m, "input_scale")),
                    global: self.local_experts(),
                };
                self.nvfp4_experts(&out, &experts);
            }
        }
    }

    fn raw_experts(&self, source: &str, stored: Stored) -> RawExperts<'a> {
        let local = self.local_experts().into_iter();
        let share = self.inner_share(stored);
        RawExperts {
            checkpoint: self.checkpoint,
            modules: local.map(|e| self.expert_module(source, e)).collect(),
            up_first: self.up_first(stored),
            start: self.moe_tp_rank() * share,
            share,
        }
    }

    /// Experts in the model, the fused shared one not counted.
    pub(super) fn routed_experts(&self) -> usize {
        let routed = self.checkpoint.size("n_routed_experts");
        if routed > 0 { routed } else { self.checkpoint.size("num_experts") }
    }

    /// Numbers of the experts of this rank; a fused shared expert is the last one everywhere.
    fn local_experts(&self) -> Vec<usize> {
        let share = self.routed_experts() / self.options.ep;
        let mut local: Vec<_> = (self.ep_rank() * share..(self.ep_rank() + 1) * share).collect();
        if self.options.fuse_shared_experts {
            local.push(self.routed_experts());
        }
        local
    }

    /// The checkpoint's module of an expert, with the dot after it.
    fn expert_module(&self, source: &str, expert: usize) -> String {
        if expert == self.routed_experts() {
            return format!("{source}shared_experts.");
        }
        format!("{source}experts.{expert}.")
    }

    fn all_experts<T>(&self, source: &str, value: impl Fn(&str) -> T) -> Vec<T> {
        let count = self.routed_experts() + usize::from(self.options.fuse_shared_experts);
        (0..count).map(|e| value(&self.expert_module(source, e))).collect()
    }

    /// The scalars of gate and up in their slots: `trtllm` has up's in slot 0.
    fn pair(&self, module: &str, suffix: &str) -> [f32; 2] {
        let scalar = |part: &str| self.checkpoint.scalar(&format!("{module}{part}.{suffix}"));
        match self.layout {
            Layout::Trtllm => [scalar("up_proj"), scalar("gate_proj")],
            _ => [scalar("gate_proj"), scalar("up_proj")],
        }
    }

    fn down(&self, module: &str, suffix: &str) -> f32 {
        self.checkpoint.scalar(&format!("{module}down_proj.{suffix}"))
    }

    fn bf16_experts(&mut self, out: &str, raw: &RawExperts<'_>) {
        let dtype = self.checkpoint.model_dtype();
        let finish = |tensor: &Tensor, permute: &dyn Fn(&Tensor) -> Tensor| {
            let tensor = tensor.cast(dtype);
            match self.layout {
                Layout::Trtllm => column_blocks(&permute(&tensor), 128 / tensor.element()),
                _ => tensor,
            }
        };
        let w13 = raw.w13("weight", 1).into_iter().map(|t| finish(&t, &interleave_and_shuffle));
        let w2 = raw.w2("weight", 1).into_iter().map(|t| finish(&t, &shuffle_rows_32));
        let (w13, w2): (Vec<_>, Vec<_>) = (w13.collect(), w2.collect());
        self.put(format!("{out}w13_weight"), Tensor::batch(&w13));
        self.put(format!("{out}w2_weight"), Tensor::batch(&w2));
    }

    fn fp8_experts(&mut self, out: &str, raw: &RawExperts<'_>) {
        let w13_scale = Tensor::batch(&raw.w13("weight_scale_inv", 128)).cast("F32");
        let w2_scale = Tensor::batch(&raw.w2("weight_scale_inv", 128)).cast("F32");
        self.put(format!("{out}w13_weight"), Tensor::batch(&raw.w13("weight", 1)));
        self.put(format!("{out}w13_weight_scale_inv"), w13_scale);
        self.put(format!("{out}w2_weight"), Tensor::batch(&raw.w2("weight", 1)));
        self.put(format!("{out}w2_weight_scale_inv"), w2_scale);
    }

    fn int4_experts(&mut self, out: &str, raw: &RawExperts<'_>) {
        let w13_scale = Tensor::batch(&raw.w13("weight_scale", 1)).cast("BF16");
        let w2_scale = Tensor::batch(&raw.w2("weight_scale", 32)).cast("BF16");
        self.put(format!("{out}w13_weight_packed"), Tensor::batch(&raw.w13("weight_packed", 1)));
        self.put(format!("{out}w13_weight_scale"), w13_scale);
        self.put(format!("{out}w2_weight_packed"), Tensor::batch(&raw.w2("weight_packed", 8)));
        self.put(format!("{out}w2_weight_scale"), w2_scale);
        let shapes = |part: &str| {
            let shape = |m: &String| self.weight_shape(&format!("{m}{part}"));
            Tensor::batch(&raw.modules.iter().map(shape).collect::<Vec<_>>())
        };
        let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(shapes);
        assert_eq!(gate, up, "gate and up differ in shape");
        self.put(format!("{out}w13_weight_shape"), gate);
        self.put(format!("{out}w2_weight_shape"), down);
    }

    fn mxfp4_experts(&mut self, out: &str, w: &str, weights: &[Tensor], scales: &[Tensor]) {
        let mut weight = Tensor::batch(weights);
        let mut scale = Tensor::batch(scales);
        if self.layout == Layout::Aiter {
            weight = Tensor::batch(&weights.iter().map(shuffle_16x16).collect::<Vec<_>>());
            scale = shuffle_e8m0(&Tensor::stack(scales)).reshaped(&scale.shape);
        }
        self.put(format!("{out}{w}_weight"), weight);
        self.put(format!("{out}{w}_weight_scale"), scale);
    }

    /// Whether the up half comes first in w13.
    fn up_first(&self, stored: Stored) -> bool {
        match self.layout {
            Layout::Trtllm => matches!(stored, Stored::Bf16 | Stored::Fp8 | Stored::Nvfp4),
            Layout::FlashinferCutlass => matches!(stored, Stored::Bf16 | Stored::Nvfp4),
            _ => false,
        }
    }

    /// Il: a rank's share of one expert's inner size, rounded up where the layout pads.
    pub(super) fn inner_share(&self, stored: Stored) -> usize {
        let share = self.checkpoint.size("moe_intermediate_size") / self.moe_tp();
        match (self.layout, stored) {
            (Layout::Trtllm, Stored::Bf16 | Stored::Fp8 | Stored::Nvfp4) => {
                share.next_multiple_of(128)
            }
            (Layout::Aiter, Stored::Mxfp4) => share.next_multiple_of(256),
            _ => share,
        }
    }
}

/// The rank's own slices of its experts' tensors, before any permutation.
struct RawExperts<'a> {
    checkpoint: &'a Checkpoint,
    /// The checkpoint's modules of the local experts, with the dot after them.
    modules: Vec<String>,
    up_first: bool,
    /// First element of the inner size that this rank holds, of `share` elements.
    start: usize,
    share: usize,
}

impl RawExperts<'_> {
    /// Per expert both halves; `unit` elements of the inner size have one row.
    fn w13(&self, suffix: &str, unit: usize) -> Vec<Tensor> {
        let order = match self.up_first {
            true => ["up_proj", "gate_proj"],
            false => ["gate_proj", "up_proj"],
        };
        let expert = |module: &String| {
            let halves = order.map(|part| {
                let whole = self.checkpoint.get(&format!("{module}{part}.{suffix}"));
                whole.rows_or_zeros(self.start / unit, self.share / unit)
            });
            Tensor::stack(&halves)
        };
        self.modules.iter().map(expert).collect()
    }

    /// Per expert its columns; `unit` elements of the inner size have one column.
    fn w2(&self, suffix: &str, unit: usize) -> Vec<Tensor> {
        let expert = |module: &String| {
            let whole = self.checkpoint.get(&format!("{module}down_proj.{suffix}"));
            whole.columns_or_zeros(self.start / unit, self.share / unit)
        };
        self.modules.iter().map(expert).collect()
    }
}
