//! How NVFP4 linear layers and experts are finished (§4a, §4b).

use super::build::Builder;
use super::options::Layout;
use super::permute::{interleave_and_shuffle, shuffle_rows_32, swizzle_128x4};
use super::tensor::Tensor;

/// The raw NVFP4 parameters of one layer's experts on one rank, scalars in final slots.
#[derive(Debug)]
pub(super) struct Nvfp4Experts {
    /// Per local expert `[2·Il, H/2]`, halves in final order.
    pub(super) w13: Vec<Tensor>,
    /// Per local expert `[2·Il, H/16]`.
    pub(super) w13_scale: Vec<Tensor>,
    /// Per local expert `[H, Il/2]`.
    pub(super) w2: Vec<Tensor>,
    /// Per local expert `[H, Il/16]`.
    pub(super) w2_scale: Vec<Tensor>,
    /// Per local expert two slots.
    pub(super) w13_scale_2: Vec<[f32; 2]>,
    /// Per local expert.
    pub(super) w2_scale_2: Vec<f32>,
    /// Per expert of the whole model two slots.
    pub(super) w13_input: Vec<[f32; 2]>,
    /// Per expert of the whole model.
    pub(super) w2_input: Vec<f32>,
    /// The place of each local expert in the whole model.
    pub(super) global: Vec<usize>,
}

impl Builder<'_> {
    /// One linear layer of `weight: [N, K/2]` and `scale: [N, K/16]`.
    pub(super) fn nvfp4_linear(
        &mut self,
        target: &str,
        weight: Tensor,
        scale: Tensor,
        scale_2: &[f32],
        input_scale: &[f32],
    ) {
        let named = |suffix: &str| format!("{target}.{suffix}");
        self.put(named("weight_scale_2"), Tensor::numbers(&[scale_2.len()], scale_2));
        self.put(named("input_scale"), Tensor::numbers(&[input_scale.len()], input_scale));
        if self.layout == Layout::None {
            self.put(named("weight"), weight);
            self.put(named("weight_scale"), scale);
            return;
        }
        let input = maximum(input_scale);
        self.put(named("alpha"), Tensor::numbers(&[], &[input * maximum(scale_2)]));
        self.put(named("input_scale_inv"), Tensor::numbers(&[], &[1.0 / input]));

        let [rows, half_columns] = weight.matrix();
        let columns = 2 * half_columns;
        let derived = if self.layout == Layout::Trtllm {
            let tall = rows.next_multiple_of(128);
            let padded = weight.padded(tall, columns.next_multiple_of(64) / 2);
            self.put(named("weight"), shuffle_rows_32(&padded));
            let padded = scale.padded(tall, scale.shape[1].next_multiple_of(4));
            swizzle_128x4(&shuffle_rows_32(&padded))
        } else {
            let (tall, wide) = (rows.next_multiple_of(32), columns.next_multiple_of(32));
            self.put(named("weight"), weight.padded(tall, wide / 2));
            swizzle_128x4(&scale)
        };
        let (source, name) = (named("weight_scale"), named("weight_scale_interleaved"));
        self.alias_or_put(source, name, scale, derived);
    }

    /// The derived scale in its source's place if it fits there, else both.
    fn alias_or_put(&mut self, source: String, name: String, raw: Tensor, derived: Tensor) {
        if raw.shape == derived.shape {
            self.put(source.clone(), derived);
            self.alias(name, source);
        } else {
            self.put(source, raw);
            self.put(name, derived);
        }
    }

    /// One layer's experts.
    pub(super) fn nvfp4_experts(&mut self, target: &str, raw: &Nvfp4Experts) {
        let named = |suffix: &str| format!("{target}{suffix}");
        let pairs = |pairs: &[[f32; 2]]| Tensor::numbers(&[pairs.len(), 2], &pairs.concat());
        let singles = |values: &[f32]| Tensor::numbers(&[values.len()], values);
        self.put(named("w13_weight_scale_2"), pairs(&raw.w13_scale_2));
        self.put(named("w2_weight_scale_2"), singles(&raw.w2_scale_2));
        self.put(named("w13_input_scale"), pairs(&raw.w13_input));
        self.put(named("w2_input_scale"), singles(&raw.w2_input));
        match self.layout {
            Layout::None => {
                self.put(named("w13_weight"), Tensor::batch(&raw.w13));
                self.put(named("w13_weight_scale"), Tensor::batch(&raw.w13_scale));
                self.put(named("w2_weight"), Tensor::batch(&raw.w2));
                self.put(named("w2_weight_scale"), Tensor::batch(&raw.w2_scale));
                return;
            }
            Layout::Trtllm => self.nvfp4_experts_trtllm(target, raw),
            _ => self.nvfp4_experts_cutlass(target, raw),
        }
        self.nvfp4_expert_scalars(target, raw);
    }

    fn nvfp4_experts_cutlass(&mut self, target: &str, raw: &Nvfp4Experts) {
        for (w, weight, scale) in
            [("w13", &raw.w13, &raw.w13_scale), ("w2", &raw.w2, &raw.w2_scale)]
        {
            let derived: Vec<Tensor> = scale.iter().map(swizzle_128x4).collect();
            self.put(format!("{target}{w}_weight"), Tensor::batch(weight));
            self.alias_or_put(
                format!("{target}{w}_weight_scale"),
                format!("{target}{w}_blockscale_swizzled"),
                Tensor::batch(scale),
                Tensor::batch(&derived),
            );
        }
    }

    fn nvfp4_experts_trtllm(&mut self, target: &str, raw: &Nvfp4Experts) {
        let named = |suffix: &str| format!("{target}{suffix}");
        let each = |tensors: &[Tensor], finish: &dyn Fn(&Tensor) -> Tensor| {
            Tensor::batch(&tensors.iter().map(finish).collect::<Vec<_>>())
        };
        let w13_scale = each(&raw.w13_scale, &|s| swizzle_128x4(&interleave_and_shuffle(s)));
        let w2_scale = each(&raw.w2_scale, &|s| swizzle_128x4(&shuffle_rows_32(s)));
        assert_eq!(w13_scale.shape[1..], raw.w13_scale[0].shape, "scales fill whole tiles");
        assert_eq!(w2_scale.shape[1..], raw.w2_scale[0].shape, "scales fill whole tiles");
        self.put(named("w13_weight"), each(&raw.w13, &interleave_and_shuffle));
        self.put(named("w13_weight_scale"), w13_scale);
        self.put(named("w2_weight"), each(&raw.w2, &shuffle_rows_32));
        self.put(named("w2_weight_scale"), w2_scale);
        for w in ["w13", "w2"] {
            let derived = named(&format!("{w}_blockscale_swizzled"));
            self.alias(derived, named(&format!("{w}_weight_scale")));
        }
    }

    fn nvfp4_expert_scalars(&mut self, target: &str, raw: &Nvfp4Experts) {
        let named = |suffix: &str| format!("{target}{suffix}");
        let singles = |values: &[f32]| Tensor::numbers(&[values.len()], values);
        let own =
            |values: Vec<f32>| -> Vec<f32> { raw.global.iter().map(|e| values[*e]).collect() };
        // per expert for `cutlass`, one number over all experts of the model for the other two
        let per_expert = self.layout == Layout::Cutlass;
        let w13_inputs: Vec<f32> = raw.w13_input.iter().map(|pair| maximum(pair)).collect();
        let (a1, a2) = if per_expert {
            (own(w13_inputs), own(raw.w2_input.clone()))
        } else {
            let count = raw.global.len();
            (vec![maximum(&w13_inputs); count], vec![maximum(&raw.w2_input); count])
        };
        let g1: Vec<f32> = a1.iter().zip(&raw.w13_scale_2).map(|(a, s)| a * s[0]).collect();
        let g2: Vec<f32> = a2.iter().zip(&raw.w2_scale_2).map(|(a, s)| a * s).collect();
        self.put(named("g1_alphas"), singles(&g1));
        self.put(named("g2_alphas"), singles(&g2));
        let quant = |a: &[f32]| -> Vec<f32> { a.iter().map(|a| 1.0 / a).collect() };
        let (quant_1, quant_2) = (quant(&a1), quant(&a2));
        if self.layout == Layout::Trtllm {
            let scaled: Vec<f32> = quant_2.iter().zip(&g1).map(|(q, g)| q * g).collect();
            self.put(named("g1_scale_c"), singles(&scaled));
        }
        for (w, values) in [("w13", quant_1), ("w2", quant_2)] {
            let tensor = match per_expert {
                true => singles(&values),
                false => Tensor::numbers(&[], &values[..1]),
            };
            self.put(named(&format!("{w}_input_scale_quant")), tensor);
        }
    }
}

fn maximum(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}
