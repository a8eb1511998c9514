//! How ModelOpt wrote the declarations of published NVFP4 checkpoints.

use super::Family;
use super::json::Json;
use super::quantization::{Declared, layers, strings};
use super::settings::Settings;

/// The declarations of the checkpoint's style.
///
/// # Errors
/// Quantised attention in a style that has none.
pub(super) fn declare(family: Family, p: &Settings) -> Result<Declared, String> {
    let style = p.text("quant_style").unwrap_or_default();
    if style == "v3" {
        let exclude = v3_exclude(p);
        let nested = nested_form(p, "0.23.0", exclude);
        return Ok(Declared { in_config: None, in_hf_quant_config: Some(nested) });
    }
    if style == "early" {
        return Ok(Declared { in_config: Some(early(p)), in_hf_quant_config: None });
    }
    let exclude = match (style, p.flag("nvfp4_attention")) {
        ("v31", _) => v31_exclude(p),
        ("glm5", _) => glm5_exclude(p),
        (_, true) => return Err(format!("quant_style {style} has no nvfp4_attention")),
        _ => kimi_exclude(p, style),
    };
    let in_hf_quant_config = match style {
        "v31" => Some(nested_form(p, "0.22.1", exclude.clone())),
        "glm5" => Some(nested_form(p, "0.42.0rc1", exclude.clone())),
        "k26" => Some(nested_form(p, "0.44.0", exclude.clone())),
        _ => None,
    };
    let in_config = match (family, style) {
        (Family::KimiK25, "k25") => Some(flat_form(p, "0.41.0", exclude)),
        (Family::KimiK25, _) => Some(flat_form(p, "0.44.0", exclude)),
        _ => None,
    };
    Ok(Declared { in_config, in_hf_quant_config })
}

fn producer(version: &str) -> Json {
    Json::object([("name", "modelopt".into()), ("version", version.into())])
}

fn nested_form(p: &Settings, version: &str, exclude: Vec<String>) -> Json {
    let kv = if p.flag("kv_scales") { Json::from("FP8") } else { Json::Null };
    let quantization = Json::object([
        ("quant_algo", "NVFP4".into()),
        ("kv_cache_quant_algo", kv),
        ("group_size", 16.into()),
        ("exclude_modules", exclude.into()),
    ]);
    Json::object([("producer", producer(version)), ("quantization", quantization)])
}

/// `config_groups` of ModelOpt's flat form.
fn nvfp4_groups() -> Json {
    let group = Json::object([
        ("dynamic", false.into()),
        ("num_bits", 4.into()),
        ("type", "float".into()),
        ("group_size", 16.into()),
    ]);
    let group_0 = Json::object([
        ("input_activations", group.clone()),
        ("weights", group),
        ("targets", ["Linear"].into()),
    ]);
    Json::object([("group_0", group_0)])
}

fn add_kv_scheme(q: &mut Json, p: &Settings) {
    if p.flag("kv_scales") {
        let scheme = Json::object([
            ("dynamic", false.into()),
            ("num_bits", 8.into()),
            ("type", "float".into()),
        ]);
        q.set("kv_cache_scheme", scheme);
    }
}

fn flat_form(p: &Settings, version: &str, exclude: Vec<String>) -> Json {
    let mut q = Json::object([
        ("config_groups", nvfp4_groups()),
        ("ignore", exclude.into()),
        ("quant_algo", "NVFP4".into()),
        ("producer", producer(version)),
        ("quant_method", "modelopt".into()),
    ]);
    add_kv_scheme(&mut q, p);
    q
}

/// An early Kimi-K2.5 export.
fn early(p: &Settings) -> Json {
    let mut ignore = strings(["lm_head", "language_model.lm_head", "vision_tower*"]);
    ignore.push("mm_projector*".to_owned());
    ignore.extend(layers(p).map(|i| format!("language_model.layers.{i}.self_attn*")));
    let mut q = Json::object([
        ("quant_method", "modelopt".into()),
        ("quant_algo", "NVFP4".into()),
        ("config_groups", nvfp4_groups()),
        ("ignore", ignore.into()),
        ("producer", producer("0.39.0")),
    ]);
    add_kv_scheme(&mut q, p);
    q
}

/// DeepSeek-V3 and R1, first exports.
fn v3_exclude(p: &Settings) -> Vec<String> {
    let part = if p.flag("nvfp4_attention") { ".kv_b_proj" } else { "*" };
    let mut exclude: Vec<_> =
        layers(p).map(|i| format!("model.layers.{i}.self_attn{part}")).collect();
    exclude.extend(strings(["lm_head", "model.embed_tokens"]));
    exclude.push(format!("model.layers.{}*", p.size("num_hidden_layers")));
    let moe = p.size("first_k_dense_replace")..p.size("num_hidden_layers");
    exclude.extend(moe.map(|i| format!("model.layers.{i}.mlp.gate")));
    exclude
}

/// The prediction layer's entries.
fn whole_layers(p: &Settings) -> impl Iterator<Item = String> {
    let count = p.size("num_hidden_layers");
    (count..count + p.size("mtp")).map(|i| format!("model.layers.{i}*"))
}

fn attention_parts(p: &Settings) -> Vec<&'static str> {
    match p.flag("nvfp4_attention") {
        true => vec![],
        false => vec!["kv_a_proj_with_mqa", "q_a_proj", "q_b_proj"],
    }
}

fn each_layer(p: &Settings, parts: &[&str]) -> Vec<String> {
    let names = |i| parts.iter().map(move |n| format!("model.layers.{i}.self_attn.{n}"));
    layers(p).flat_map(names).collect()
}

/// Entries in order of their spelling (layer 10 before layer 2), as published.
fn v31_exclude(p: &Settings) -> Vec<String> {
    let mut parts = attention_parts(p);
    parts.push("kv_b_proj");
    let mut exclude = each_layer(p, &parts);
    exclude.sort();
    exclude.extend(whole_layers(p));
    exclude.insert(0, "lm_head".to_owned());
    exclude
}

fn glm5_exclude(p: &Settings) -> Vec<String> {
    let mut parts = attention_parts(p);
    parts.extend(["kv_b_proj", "indexer*"]);
    if !p.flag("nvfp4_attention") {
        parts.push("o_proj");
    }
    let mut exclude = each_layer(p, &parts);
    let count = p.size("num_hidden_layers");
    // in the published list, too
    exclude.extend(
        (count..count + p.size("mtp")).map(|i| format!("model.layers.{i}.self_attn.o_proj")),
    );
    exclude.extend(whole_layers(p));
    exclude.sort();
    exclude.insert(0, "lm_head".to_owned());
    exclude
}

fn kimi_exclude(p: &Settings, style: &str) -> Vec<String> {
    let lead = "language_model.model.layers.";
    let mut exclude: Vec<_> = layers(p).map(|i| format!("{lead}{i}.self_attn*")).collect();
    if style == "k26" {
        if !exclude.is_empty() {
            exclude.remove(0);
        }
        exclude.push(format!("{lead}0*"));
        exclude.extend(layers(p).skip(1).map(|i| format!("{lead}{i}.mlp.shared_experts*")));
    }
    exclude.sort();
    exclude.insert(0, "language_model.lm_head".to_owned());
    exclude.extend(strings(["mm_projector*", "vision_tower*"]));
    exclude
}
