#!/usr/bin/env python3
"""Writes a complete synthetic checkpoint in the Hugging Face layout: random weights, real names, shapes and dtypes.

  gen_ckpt.py DIR --model deepseek|llama [--size-gb 4] [--layers N] [--file-mib 512] [--seed 0]

deepseek   FP8-block DeepSeek-V3 with a hidden size of 1024: one dense layer, then MoE layers of 256 experts whose
           tensors are 512 KiB. 4 GiB are about 14 000 tensors.
llama      BF16 Llama-3.1-8B with fewer layers: 4 GiB are 48 tensors of up to 1 GiB.

The number of layers is the one whose size comes nearest to --size-gb (GiB). Files are cut as Hugging Face's splitter
does (in order, at most --file-mib, a larger tensor alone) and ordered inside as the safetensors library orders them
(larger element first, then by name). Needs numpy only; the same seed gives the same bytes. DIR appears only when it
is complete.
"""
import argparse
import json
import os
import shutil
import struct

import numpy as np

ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def deepseek_config(layers):
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 2560,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 512, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": layers, "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0, "q_lora_rank": 384, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    }


def llama_config(layers):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": layers, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 128256,
    }


def deepseek_layer(c, prefix, moe):
    hidden, heads, q_lora, kv_lora = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, v_dim = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]

    def fp8(name, rows, cols):
        yield name + ".weight", "F8_E4M3", (rows, cols)
        yield name + ".weight_scale_inv", "F32", (-(-rows // 128), -(-cols // 128))

    def mlp(name, inter):
        yield from fp8(name + "gate_proj", inter, hidden)
        yield from fp8(name + "up_proj", inter, hidden)
        yield from fp8(name + "down_proj", hidden, inter)

    attention = prefix + "self_attn."
    yield prefix + "input_layernorm.weight", "BF16", (hidden,)
    yield from fp8(attention + "q_a_proj", q_lora, hidden)
    yield attention + "q_a_layernorm.weight", "BF16", (q_lora,)
    yield from fp8(attention + "q_b_proj", heads * (nope + rope), q_lora)
    yield from fp8(attention + "kv_a_proj_with_mqa", kv_lora + rope, hidden)
    yield attention + "kv_a_layernorm.weight", "BF16", (kv_lora,)
    yield from fp8(attention + "kv_b_proj", heads * (nope + v_dim), kv_lora)
    yield from fp8(attention + "o_proj", hidden, heads * v_dim)
    yield prefix + "post_attention_layernorm.weight", "BF16", (hidden,)
    if not moe:
        yield from mlp(prefix + "mlp.", c["intermediate_size"])
        return
    yield prefix + "mlp.gate.weight", "BF16", (c["n_routed_experts"], hidden)
    yield prefix + "mlp.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],)
    for expert in range(c["n_routed_experts"]):
        yield from mlp(f"{prefix}mlp.experts.{expert}.", c["moe_intermediate_size"])
    yield from mlp(prefix + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])


def llama_layer(c, prefix):
    hidden, inter, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    yield prefix + "input_layernorm.weight", "BF16", (hidden,)
    yield prefix + "self_attn.q_proj.weight", "BF16", (q, hidden)
    yield prefix + "self_attn.k_proj.weight", "BF16", (kv, hidden)
    yield prefix + "self_attn.v_proj.weight", "BF16", (kv, hidden)
    yield prefix + "self_attn.o_proj.weight", "BF16", (hidden, q)
    yield prefix + "post_attention_layernorm.weight", "BF16", (hidden,)
    yield prefix + "mlp.gate_proj.weight", "BF16", (inter, hidden)
    yield prefix + "mlp.up_proj.weight", "BF16", (inter, hidden)
    yield prefix + "mlp.down_proj.weight", "BF16", (hidden, inter)


def tensors(model, layers):
    """(config, [(name, dtype, shape, bytes)]) of a whole model, in the order of its state dict."""
    c = deepseek_config(layers) if model == "deepseek" else llama_config(layers)
    found = [("model.embed_tokens.weight", "BF16", (c["vocab_size"], c["hidden_size"]))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found += (deepseek_layer(c, prefix, layer >= c["first_k_dense_replace"]) if model == "deepseek"
                  else llama_layer(c, prefix))
    found.append(("model.norm.weight", "BF16", (c["hidden_size"],)))
    found.append(("lm_head.weight", "BF16", (c["vocab_size"], c["hidden_size"])))
    return c, [(n, d, s, ELEMENT_BYTES[d] * int(np.prod(s))) for n, d, s in found]


def total_bytes(model, layers):
    return sum(n for _, _, _, n in tensors(model, layers)[1])


def layers_nearest(model, target):
    low = 2  # DeepSeek's first layer is dense: two layers are the smallest model with experts
    while total_bytes(model, low + 1) <= target:
        low += 1
    return min(low, low + 1, key=lambda layers: abs(total_bytes(model, layers) - target))


def split_into_files(plan, limit):
    files, size = [[]], 0
    for tensor in plan:
        if files[-1] and size + tensor[3] > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor[3]
    return files


def random_data(rng, name, dtype, nbytes):
    """Finite values of a plausible size: the top exponent bit is cleared, so |x| < 2 and no pattern is a NaN."""
    if dtype == "F32":
        return rng.uniform(1e-4, 1e-2, nbytes // 4).astype("<f4").tobytes()
    data = np.frombuffer(bytearray(rng.bytes(nbytes)), dtype="<u2" if dtype == "BF16" else "u1")
    data &= data.dtype.type(0xBFFF if dtype == "BF16" else 0xBF)
    return data.tobytes()


def write_file(path, group, rng):
    group = sorted(group, key=lambda t: (-ELEMENT_BYTES[t[1]], t[0]))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, nbytes in group:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, _, nbytes in group:
            f.write(random_data(rng, name, dtype, nbytes))
        f.flush()
        os.fsync(f.fileno())  # a dirty page cannot be dropped from the cache later


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("dir")
    ap.add_argument("--model", choices=("deepseek", "llama"), required=True)
    ap.add_argument("--size-gb", type=float, default=4.0, help="GiB aimed at")
    ap.add_argument("--layers", type=int, help="exactly so many layers instead")
    ap.add_argument("--file-mib", type=int, default=512)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()

    layers = a.layers or layers_nearest(a.model, a.size_gb * 2**30)
    config, plan = tensors(a.model, layers)
    files = split_into_files(plan, a.file_mib << 20)
    total = sum(t[3] for t in plan)

    tmp = a.dir.rstrip("/") + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    rng, weight_map = np.random.default_rng(a.seed), {}
    for i, group in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        write_file(os.path.join(tmp, name), group, rng)
        weight_map |= {t[0]: name for t in group}
    for name, content in (("config.json", config),
                          ("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})):
        with open(os.path.join(tmp, name), "w") as f:
            json.dump(content, f, indent=2)
    os.rename(tmp, a.dir)
    print(json.dumps({"dir": a.dir, "model": a.model, "layers": layers, "files": len(files), "tensors": len(plan),
                      "bytes": total, "median_tensor": sorted(t[3] for t in plan)[len(plan) // 2]}))


if __name__ == "__main__":
    main()
