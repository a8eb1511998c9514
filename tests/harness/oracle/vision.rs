//! The vision tower and projector of Kimi-K2.5 (§1.4, §2.7, §3.4).

use super::build::Builder;
use super::checkpoint::Checkpoint;
use super::options::Options;
use super::tensor::Tensor;

/// Whether the model has a vision tower and this load wants it.
pub(super) fn is_loaded(checkpoint: &Checkpoint, options: &Options) -> bool {
    has_tower(checkpoint) && !options.language_only && !options.draft
}

/// Whether the model has a vision tower.
pub(super) fn has_tower(checkpoint: &Checkpoint) -> bool {
    checkpoint.config["vision_config"].is_object()
}

/// A dimension of the tower: its `vt_` key, else the plain one, else the published value.
pub(super) fn size(checkpoint: &Checkpoint, key: &str, published: usize) -> usize {
    let vision = &checkpoint.config["vision_config"];
    let found = vision[format!("vt_{key}")].as_u64().or(vision[key].as_u64());
    found.map_or(published, |size| size as usize)
}

impl Builder<'_> {
    /// The tower and the projector: attention is split over the ranks, the rest replicated.
    pub(super) fn vision(&mut self) {
        let tower = "vision_tower.";
        for name in ["patch_embed.proj.weight", "patch_embed.proj.bias"] {
            self.replicated(&format!("{tower}{name}"));
        }
        self.replicated("vision_tower.patch_embed.pos_emb.weight");
        for i in 0..size(self.checkpoint, "num_hidden_layers", 27) {
            self.block(&format!("{tower}encoder.blocks.{i}."));
        }
        for kind in ["weight", "bias"] {
            self.replicated(&format!("{tower}encoder.final_layernorm.{kind}"));
            self.replicated(&format!("mm_projector.pre_norm.{kind}"));
            for (source, target) in [("proj.0", "linear_1"), ("proj.2", "linear_2")] {
                let source = format!("mm_projector.{source}.{kind}");
                self.put_plain(&format!("mm_projector.{target}.{kind}"), &source);
            }
        }
    }

    fn replicated(&mut self, name: &str) {
        self.put_plain(name, name);
    }

    fn block(&mut self, block: &str) {
        for kind in ["weight", "bias"] {
            for name in ["norm0", "norm1", "mlp.fc0", "mlp.fc1"] {
                self.replicated(&format!("{block}{name}.{kind}"));
            }
            let qkv = self.heads_of_each(&format!("{block}wqkv.{kind}"));
            let proj = self.columns().of(self.checkpoint.get(&format!("{block}wo.{kind}")));
            let dtype = self.checkpoint.model_dtype();
            self.put(format!("{block}attn.qkv_proj.{kind}"), qkv.cast(dtype));
            self.put(format!("{block}attn.proj.{kind}"), proj.cast(dtype));
        }
    }

    /// The rank's heads of q, of k and of v, which lie one behind the other in one tensor.
    fn heads_of_each(&self, name: &str) -> Tensor {
        let fused = self.checkpoint.get(name);
        let third = fused.shape[0] / 3;
        let parts = [0, 1, 2].map(|i| self.rows().of(&fused.rows(i * third, third)));
        Tensor::stack(&parts)
    }
}
