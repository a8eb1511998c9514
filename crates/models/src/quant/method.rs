//! What a declaration means, method by method, and whether it is a kind that is supported.
//!
//! Each function takes the object that declares (a `quantization_config`, or the whole of `hf_quant_config.json`).
//! Whatever is not supported is an error that names file, key, what is expected and what stands there. Source: reference
//! §1.6 (a) to (d).

use serde_json::Value;

use crate::{
    config::Config,
    error::PlanError,
    quant::{Declared, Exclude, Scheme},
};

/// ModelOpt's name of the one algorithm that is supported.
pub(super) const NVFP4: &str = "NVFP4";

/// Elements of K that share an NVFP4 scale.
const NVFP4_GROUP: u64 = 16;

/// FP8 with one scale per 128×128 block (§1.6 a).
pub(super) fn fp8(block: &Config) -> Result<Declared, PlanError> {
    require(block, "activation_scheme", "dynamic", false)?;
    require(block, "fmt", "e4m3", false)?;
    let shape = block.get("weight_block_size").and_then(Value::as_array);
    let shape: Option<Vec<u64>> = shape.and_then(|s| s.iter().map(Value::as_u64).collect());
    if shape.as_deref() != Some(&[128, 128]) {
        return Err(block.wrong("weight_block_size", "[128, 128]"));
    }
    let (place, entries) = list(block, ["ignored_layers", "modules_to_not_convert"])?;
    let (exclude, warnings) = Exclude::fp8(place, &entries);
    Ok(declared(block, Scheme::Fp8, false, exclude, warnings))
}

/// ModelOpt's NVFP4, flat (`config.json`) or nested under `quantization` (`hf_quant_config.json`) (§1.6 b).
pub(super) fn modelopt(block: &Config) -> Result<Declared, PlanError> {
    let (holder, algo) = modelopt_algo(block);
    if algo.as_deref().is_none_or(|algo| !algo.eq_ignore_ascii_case(NVFP4)) {
        return Err(holder.wrong("quant_algo", NVFP4));
    }
    let expected = "16, the group size of NVFP4";
    let sizes = group_sizes(block);
    if sizes.is_empty() {
        return Err(holder.wrong("group_size", expected));
    }
    if let Some((place, _)) = sizes.iter().find(|(_, size)| *size != Some(NVFP4_GROUP)) {
        return Err(place.wrong("group_size", expected));
    }
    let (place, entries) = list(&holder, ["ignore", "exclude_modules"])?;
    let (exclude, warnings) = Exclude::modelopt(place, &entries);
    let kv_cache_fp8 = holder.text("kv_cache_quant_algo") == Some("FP8") || flat_kv_fp8(&holder);
    Ok(declared(block, Scheme::Nvfp4, kv_cache_fp8, exclude, warnings))
}

/// The object that holds `quant_algo`, and its value; the flat form is preferred.
pub(super) fn modelopt_algo(block: &Config) -> (Config, Option<String>) {
    let flat = block.text("quant_algo").map(str::to_owned);
    match (flat, block.nested("quantization")) {
        (None, Some(nested)) => {
            let algo = nested.text("quant_algo").map(str::to_owned);
            (nested, algo)
        }
        (algo, _) => (block.clone(), algo),
    }
}

/// Every `group_size` of a declaration, with the object that holds it: top level, `quantization`, `config_groups`.
pub(super) fn group_sizes(block: &Config) -> Vec<(Config, Option<u64>)> {
    let groups = block.nested("config_groups").map(|g| g.children()).unwrap_or_default();
    let weights = groups.iter().filter_map(|(_, group)| group.nested("weights"));
    [Some(block.clone()), block.nested("quantization")]
        .into_iter()
        .flatten()
        .chain(weights)
        .filter(|place| place.get("group_size").is_some())
        .map(|place| {
            let size = place.get("group_size").and_then(Value::as_u64);
            (place, size)
        })
        .collect()
}

/// `kv_cache_scheme`: a name, or an object of type float with 8 bits.
fn flat_kv_fp8(block: &Config) -> bool {
    match block.nested("kv_cache_scheme") {
        Some(scheme) => {
            let bits = scheme.get("num_bits").and_then(Value::as_u64);
            scheme.text("type") == Some("float") && bits == Some(8)
        }
        None => matches!(block.text("kv_cache_scheme"), Some("FP8" | "FLOAT8")),
    }
}

/// Quark's MXFP4 (§1.6 c).
pub(super) fn quark(block: &Config) -> Result<Declared, PlanError> {
    let global = object(block, "global_quant_config")?;
    require_mxfp4(&global, false)?;
    let export = block.nested("export");
    let kv_groups = match &export {
        Some(export) => export.texts("kv_cache_group")?,
        None => Vec::new(),
    };
    // the scheme is the same for all layers or absent: each other one would need tensors of its own kind
    let mut unquantised = Vec::new();
    for (pattern, layer) in children(block, "layer_quant_config") {
        if layer.get("weight").is_none() && layer.get("input_tensors").is_none() {
            unquantised.push(pattern);
        } else {
            require_mxfp4(&layer, kv_groups.contains(&pattern))?;
        }
    }
    for (_, layer) in children(block, "layer_type_quant_config") {
        require_mxfp4(&layer, false)?;
    }
    let (place, entries) = list(block, ["exclude"])?;
    let (exclude, warnings) = Exclude::quark(place, &entries, &unquantised);
    Ok(declared(block, Scheme::Mxfp4, !kv_groups.is_empty(), exclude, warnings))
}

/// Refuses what is not MXFP4 as published; `kv` allows a specification of the KV cache under `output_tensors`.
fn require_mxfp4(layer: &Config, kv: bool) -> Result<(), PlanError> {
    for (key, dynamic) in [("weight", false), ("input_tensors", true)] {
        let side = object(layer, key)?;
        require(&side, "dtype", "fp4", true)?;
        require(&side, "qscheme", "per_group", true)?;
        require(&side, "group_size", 32, true)?;
        require(&side, "scale_format", "e8m0", true)?;
        require(&side, "is_dynamic", dynamic, false)?;
    }
    let outputs = (!kv).then_some("output_tensors");
    for key in outputs.into_iter().chain(["bias"]) {
        if layer.get(key).is_some() {
            return Err(layer.wrong(key, "null"));
        }
    }
    Ok(())
}

/// compressed-tensors INT4, packed along K (§1.6 d).
pub(super) fn compressed_tensors(block: &Config) -> Result<Declared, PlanError> {
    require(block, "format", "pack-quantized", false)?;
    if block.get("linear_fp8_config").is_some() {
        let expected = "null (FP8 linear layers beside INT4 experts are not supported)";
        return Err(block.wrong("linear_fp8_config", expected));
    }
    let groups = children(block, "config_groups");
    if groups.is_empty() {
        return Err(block.wrong("config_groups", "at least one group"));
    }
    let mut targets = Vec::new();
    for (_, group) in &groups {
        let weights = object(group, "weights")?;
        require(&weights, "num_bits", 4, true)?;
        require(&weights, "type", "int", true)?;
        require(&weights, "strategy", "group", false)?;
        require(&weights, "group_size", 32, true)?;
        require(&weights, "symmetric", true, false)?;
        require(&weights, "dynamic", false, false)?;
        require(&weights, "actorder", false, false)?;
        if group.get("input_activations").is_some() {
            return Err(group.wrong("input_activations", "null"));
        }
        targets.extend(group.texts("targets")?);
    }
    let (place, entries) = list(block, ["ignore"])?;
    let (exclude, warnings) = Exclude::compressed_tensors(place, &entries, &targets);
    Ok(declared(block, Scheme::Int4, flat_kv_fp8(block), exclude, warnings))
}

fn declared(
    block: &Config,
    scheme: Scheme,
    kv_cache_fp8: bool,
    exclude: Exclude,
    warnings: Vec<String>,
) -> Declared {
    let declared_in = block.file().to_owned();
    Declared { scheme, declared_in, kv_cache_fp8, exclude: Some(exclude), warnings, user: None }
}

/// The first list that is there, and where it stands (or would stand).
fn list<const N: usize>(
    block: &Config,
    keys: [&str; N],
) -> Result<(String, Vec<String>), PlanError> {
    let key = keys.into_iter().find(|key| block.get(key).is_some()).unwrap_or(keys[0]);
    Ok((block.place(key), block.texts(key)?))
}

/// The objects under `key`, by name; what is no object counts as an empty one.
fn children(block: &Config, key: &str) -> Vec<(String, Config)> {
    block.nested(key).map(|nested| nested.children()).unwrap_or_default()
}

fn object(block: &Config, key: &str) -> Result<Config, PlanError> {
    block.nested(key).ok_or_else(|| block.wrong(key, "an object"))
}

/// Refuses another value than the one that is supported; `needed`: its absence, too.
fn require(
    block: &Config,
    key: &str,
    value: impl Into<Value>,
    needed: bool,
) -> Result<(), PlanError> {
    let value = value.into();
    match block.get(key) {
        None if !needed => Ok(()),
        Some(found) if *found == value => Ok(()),
        _ => Err(block.wrong(key, &value.to_string())),
    }
}
