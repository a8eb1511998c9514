use super::Exclude;

type Made = (Exclude, Vec<String>);

fn list(entries: &[&str]) -> Vec<String> {
    entries.iter().map(|e| (*e).to_owned()).collect()
}

fn quiet((exclude, warnings): Made) -> Exclude {
    assert_eq!(warnings, [""; 0]);
    exclude
}

fn fp8(entries: &[&str]) -> Exclude {
    quiet(Exclude::fp8("f: k".into(), &list(entries)))
}

fn modelopt(entries: &[&str]) -> Exclude {
    quiet(Exclude::modelopt("f: k".into(), &list(entries)))
}

fn quark(entries: &[&str]) -> Exclude {
    quiet(Exclude::quark("f: k".into(), &list(entries), &[]))
}

fn int4(entries: &[&str]) -> Exclude {
    quiet(Exclude::compressed_tensors("f: k".into(), &list(entries), &list(&["Linear"])))
}

fn named(exclude: &Exclude, modules: &[&str]) {
    for module in modules {
        assert!(exclude.names(module), "{exclude:?} should name {module}");
    }
}

fn left_over(exclude: &Exclude, modules: &[&str]) {
    for module in modules {
        assert!(!exclude.names(module), "{exclude:?} should leave {module} over");
    }
}

const LAYER: &str = "model.layers.3.";

fn layer(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| format!("{LAYER}{n}")).collect()
}

fn strs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

/// A router's entry is neither `gate_proj` nor `gate_up_proj`, in any method but compressed-tensors, which reads parts.
#[test]
fn the_router_is_no_gate_projection() {
    let projections = layer(&["mlp.gate_proj", "mlp.up_proj", "mlp.experts.0.gate_proj"]);
    for exclude in [fp8, modelopt, quark] {
        left_over(&exclude(&["model.layers.3.mlp.gate"]), &strs(&projections));
    }
    named(&int4(&["model.layers.3.mlp.gate"]), &["model.layers.3.mlp.gate_proj"]);
}

#[test]
fn fp8_entries_are_whole_segments_with_and_without_model() {
    let exclude =
        fp8(&["model.layers.3.self_attn.q_b_proj", "layers.4.mlp", "lm_head", "o_proj.x"]);
    named(&exclude, &["model.layers.3.self_attn.q_b_proj", "layers.3.self_attn.q_b_proj"]);
    named(&exclude, &["model.layers.4.mlp.up_proj", "model.layers.4.mlp.experts.9.up_proj"]);
    left_over(&exclude, &["model.layers.40.mlp.up_proj", "model.layers.3.self_attn.q_a_proj"]);
    left_over(&exclude, &["model.layers.3.self_attn.o_proj", "model.layers.13.self_attn.q_b_proj"]);
}

/// Published lists contain a misspelt name (GLM-5: `indexers_proj`); it names nothing and is no error.
#[test]
fn a_misspelt_entry_names_nothing() {
    let exclude = fp8(&["model.layers.3.self_attn.indexers_proj"]);
    left_over(&exclude, &strs(&layer(&["self_attn.indexer.wk", "self_attn.indexer.wq_b"])));
}

/// FP8 keeps all experts of a layer alike: one named expert stands for all of them, a shared one does not.
#[test]
fn fp8_takes_one_expert_for_all_of_its_layer() {
    let exclude = fp8(&["model.layers.3.mlp.experts.5.down_proj", "mlp.experts.6.up_proj"]);
    named(&exclude, &strs(&layer(&["mlp.experts.0.gate_proj", "mlp.experts.5.down_proj"])));
    left_over(&exclude, &["model.layers.4.mlp.experts.5.down_proj"]);
    let shared = "model.layers.3.mlp.shared_experts.down_proj";
    left_over(&exclude, &[shared]);
    let exclude = fp8(&[shared]);
    named(&exclude, &[shared]);
    left_over(&exclude, &["model.layers.3.mlp.experts.5.down_proj"]);
}

/// A star stands for any text, digits and dots included: layer 6 and a star are layers 6 and 60 to 69.
#[test]
fn modelopt_globs_match_the_whole_name() {
    let exclude = modelopt(&["model.layers.6*"]);
    named(&exclude, &["model.layers.6.mlp.up_proj", "model.layers.60.self_attn.o_proj"]);
    left_over(&exclude, &["model.layers.16.mlp.up_proj", "model.layers.5.mlp.up_proj"]);
    let exclude = modelopt(&["model.layers.6.*", "model.layers.1.self_attn*", "*.7.mlp.*"]);
    named(&exclude, &["model.layers.6.mlp.up_proj", "model.layers.1.self_attn.o_proj"]);
    named(&exclude, &["model.layers.7.mlp.up_proj"]);
    left_over(&exclude, &["model.layers.60.mlp.up_proj", "model.layers.10.self_attn.o_proj"]);
    // the star does not stand for a beginning that is missing
    left_over(&modelopt(&["layers.6*"]), &["model.layers.6.mlp.up_proj"]);
}

#[test]
fn modelopt_globs_match_a_single_segment() {
    let exclude = modelopt(&["self_attn*", "*_experts", "vision_tower*"]);
    named(&exclude, &strs(&layer(&["self_attn.o_proj", "mlp.shared_experts.up_proj"])));
    left_over(&exclude, &strs(&layer(&["mlp.experts.0.up_proj", "mlp.up_proj"])));
}

#[test]
fn modelopt_names_without_a_star_are_runs_of_segments() {
    let exclude = modelopt(&["model.layers.3.self_attn.q_a_proj", "shared_experts", "lm_head"]);
    named(&exclude, &strs(&layer(&["self_attn.q_a_proj", "mlp.shared_experts.up_proj"])));
    left_over(&exclude, &strs(&layer(&["self_attn.q_b_proj", "mlp.experts.0.up_proj"])));
    // the shortcut by which one layer's entry would hold for every layer is left aside
    left_over(&exclude, &["model.layers.4.self_attn.q_a_proj"]);
}

/// Kimi-K2.5's two spellings of a layer are the same, and the wrapper's prefix may be missing in list or name.
#[test]
fn spellings_of_the_wrapper_are_the_same() {
    let module = "language_model.model.layers.1.self_attn.o_proj";
    let other = "language_model.model.layers.10.self_attn.o_proj";
    for lead in ["language_model.model.", "language_model.", "model."] {
        let glob = format!("{lead}layers.1.self_attn*");
        let name = format!("{lead}layers.1.self_attn.o_proj");
        for exclude in [modelopt(&[&glob]), modelopt(&[&name]), quark(&[&name]), int4(&[&name])] {
            named(&exclude, &[module]);
            left_over(&exclude, &[other]);
        }
        let inner = "model.layers.1.self_attn.o_proj";
        named(&modelopt(&[&glob]), &[inner]);
        named(&quark(&[&name]), &[inner]);
    }
    named(&quark(&[r"re:language_model\.layers\.1\.self_attn"]), &[module]);
    named(&int4(&[r"re:model\.layers\.1\.self_attn"]), &[module]);
}

#[test]
fn quark_understands_names_and_regexes_but_no_globs() {
    let exclude = quark(&[
        "model.layers.3.self_attn.o_proj",
        r"re:.*mlp\.gate$",
        r"re:model\.layers\.\d+\.self_attn\.q_",
        "*shared_experts*",
    ]);
    named(&exclude, &strs(&layer(&["self_attn.o_proj", "self_attn.q_a_proj"])));
    left_over(&exclude, &strs(&layer(&["mlp.gate_proj", "mlp.shared_experts.up_proj"])));
    left_over(&exclude, &["model.layers.13.self_attn.o_proj", "x.model.layers.3.self_attn.kv"]);
}

/// Layers with a configuration of their own are found by globs.
#[test]
fn quark_layers_without_quantisation_are_globs() {
    let layers = list(&["*self_attn*", "model.layers.3.mlp.down_pro?"]);
    let exclude = quiet(Exclude::quark("f: k".into(), &[], &layers));
    named(&exclude, &strs(&layer(&["self_attn.o_proj", "mlp.down_proj"])));
    left_over(&exclude, &strs(&layer(&["mlp.up_proj"])));
}

/// The published list of Kimi-K2.5 in INT4: only routed experts are quantised.
#[test]
fn compressed_tensors_list_of_kimi_leaves_the_routed_experts() {
    let exclude = int4(&[
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ]);
    let lead = "language_model.model.layers.3.";
    for name in ["self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.gate_proj"] {
        named(&exclude, &[&format!("{lead}{name}")]);
    }
    for name in ["gate_proj", "up_proj", "down_proj"] {
        left_over(&exclude, &[&format!("{lead}mlp.experts.383.{name}")]);
    }
}

#[test]
fn compressed_tensors_reads_parts_in_any_case() {
    let exclude = int4(&["LAYERS.3.", "Shared"]);
    named(&exclude, &["model.layers.3.mlp.up_proj", "model.layers.4.mlp.shared_experts.up_proj"]);
    left_over(&exclude, &["model.layers.13.mlp.up_proj"]);
}

/// Only what the targets say is quantised; a class of linear layers is all of them.
#[test]
fn compressed_tensors_targets_limit_what_is_quantised() {
    let targets = list(&["re:.*experts.*", "model.layers.0.mlp.up_proj"]);
    let exclude = quiet(Exclude::compressed_tensors("f: k".into(), &list(&["shared"]), &targets));
    left_over(&exclude, &["model.layers.3.mlp.experts.1.up_proj", "model.layers.0.mlp.up_proj"]);
    named(&exclude, &["model.layers.1.mlp.up_proj", "model.layers.3.mlp.shared_experts.up_proj"]);
    for class in ["Linear", "RowParallelLinear"] {
        let targets = list(&[class]);
        let all = quiet(Exclude::compressed_tensors("f: k".into(), &[], &targets));
        left_over(&all, &["model.layers.1.mlp.up_proj"]);
    }
}

/// An entry may name the fused run-time module; it stands for all its parts, and for nothing else.
#[test]
fn fused_names_stand_for_their_parts() {
    let fused = [
        ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"][..], "mlp.down_proj"),
        ("self_attn.qkv_proj", &["self_attn.q_proj", "self_attn.v_proj"], "self_attn.o_proj"),
        (
            "self_attn.fused_qkv_a_proj_with_mqa",
            &["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"],
            "self_attn.q_b_proj",
        ),
        (
            "mlp.experts",
            &["mlp.experts.0.gate_proj", "mlp.experts.77.down_proj"],
            "mlp.shared_experts.down_proj",
        ),
    ];
    for (name, parts, other) in fused {
        for exclude in [fp8, modelopt, quark, int4] {
            let exclude = exclude(&[&format!("{LAYER}{name}")]);
            named(&exclude, &strs(&layer(parts)));
            left_over(&exclude, &[&format!("{LAYER}{other}")]);
        }
        let end = name.replace('.', r"\.");
        for exclude in [quark, int4] {
            let exclude = exclude(&[&format!("re:.*{end}$")]);
            named(&exclude, &strs(&layer(parts)));
            left_over(&exclude, &[&format!("{LAYER}{other}")]);
        }
    }
    named(&modelopt(&["*mlp.experts"]), &strs(&layer(&["mlp.experts.0.up_proj"])));
}

#[test]
fn an_entry_that_is_no_regex_is_a_warning_and_names_nothing() {
    let entries = list(&["re:(?!x).*", "model.layers.3.mlp.up_proj"]);
    let (exclude, warnings) = Exclude::quark("config.json: exclude".into(), &entries, &[]);
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].starts_with("config.json: exclude: (?!x).*"), "{warnings:?}");
    named(&exclude, &["model.layers.3.mlp.up_proj"]);
    left_over(&exclude, &["model.layers.3.mlp.down_proj"]);
}

#[test]
fn an_empty_list_names_nothing() {
    for exclude in [fp8, modelopt, quark, int4] {
        left_over(&exclude(&[]), &["model.layers.3.mlp.up_proj", ""]);
    }
}
