//! Lists of modules that are left unquantised, and how each method reads its own. Source: reference §1.6, §2.6.
//!
//! A list speaks of run-time modules or of checkpoint modules, so an entry that names a fused module (`gate_up_proj`,
//! `qkv_proj`, `fused_qkv_a_proj_with_mqa`, `mlp.experts`) stands for all its parts. Kimi-K2.5's two spellings,
//! `language_model.layers.` and `language_model.model.layers.`, are the same, and `language_model.` may be left out.
//!
//! Left aside on purpose: ModelOpt's shortcut for the MLA projections, by which an entry for one layer holds for all of
//! them (reference §2.6, "[BUG-like]"); published lists name every layer.

use std::{borrow::Cow, fmt};

use crate::quant::patterns::{Patterns, PatternsBuilder};

/// The wrapper's prefix, which methods do or do not see.
const LANGUAGE: &str = "language_model.";

/// The modules that a declaration leaves unquantised.
#[derive(Clone)]
pub struct Exclude {
    place: String,
    entries: usize,
    skip: Patterns,
    /// What is quantised at all, where a declaration says so.
    only: Option<Patterns>,
}

impl fmt::Debug for Exclude {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exclude")
            .field("place", &self.place)
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl Exclude {
    /// FP8's list: each entry is a run of dotted segments, with and without a leading `model.`; one that names a single
    /// expert stands for all experts of its layer.
    pub(super) fn fp8(place: String, entries: &[String]) -> (Self, Vec<String>) {
        let mut builder = PatternsBuilder::default();
        for entry in spellings(entries) {
            let run = entry.strip_prefix("model.").unwrap_or(&entry);
            if let Some((layer, _)) = run.split_once(".experts.")
                && layer.contains("layers.")
            {
                builder.runs.push(format!("{layer}.experts"));
            }
            builder.runs.push(run.to_owned());
        }
        Self::new(place, entries, builder, None)
    }

    /// ModelOpt's list: runs of dotted segments, or globs over the whole name or a single segment.
    pub(super) fn modelopt(place: String, entries: &[String]) -> (Self, Vec<String>) {
        let mut builder = PatternsBuilder::default();
        for entry in spellings(entries) {
            match entry.contains('*') {
                false => builder.runs.push(entry),
                true => {
                    if !entry.contains('.') {
                        builder.segment_globs.push(entry.clone());
                    }
                    builder.globs.push(entry);
                }
            }
        }
        Self::new(place, entries, builder, None)
    }

    /// Quark's list: exact names and `re:` expressions; `layers` are globs of layers with a configuration of their own
    /// that quantises nothing.
    pub(super) fn quark(
        place: String,
        entries: &[String],
        layers: &[String],
    ) -> (Self, Vec<String>) {
        let mut builder = PatternsBuilder::default();
        for entry in spellings(entries) {
            match entry.strip_prefix("re:") {
                Some(regex) => builder.regexes.push(regex.to_owned()),
                None => builder.exact.push(entry),
            }
        }
        builder.globs.extend(spellings(layers));
        Self::new(place, entries, builder, None)
    }

    /// compressed-tensors' list: `re:` expressions and case-insensitive parts of names; `targets` says what is quantised
    /// at all: names, `re:` expressions, or classes of layers (`Linear` is all of them).
    pub(super) fn compressed_tensors(
        place: String,
        entries: &[String],
        targets: &[String],
    ) -> (Self, Vec<String>) {
        let mut builder = PatternsBuilder::default();
        for entry in spellings(entries) {
            match entry.strip_prefix("re:") {
                Some(regex) => builder.regexes.push(regex.to_owned()),
                None => builder.parts.push(entry),
            }
        }
        let mut only = PatternsBuilder::default();
        for target in spellings(targets) {
            match target.strip_prefix("re:") {
                Some(regex) => only.regexes.push(regex.to_owned()),
                None => only.exact.push(target),
            }
        }
        let all = targets.is_empty() || targets.iter().any(|target| is_linear_class(target));
        Self::new(place, entries, builder, (!all).then_some(only))
    }

    fn new(
        place: String,
        entries: &[String],
        skip: PatternsBuilder,
        only: Option<PatternsBuilder>,
    ) -> (Self, Vec<String>) {
        let (skip, mut unusable) = skip.build();
        let only = only.map(|only| {
            let (only, more) = only.build();
            unusable.extend(more);
            only
        });
        unusable.sort();
        unusable.dedup();
        let warn = |entry: &String| format!("{place}: {entry} cannot be understood and is ignored");
        let warnings = unusable.iter().map(warn).collect();
        (Self { place, entries: entries.len(), skip, only }, warnings)
    }

    /// File and key of the list, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Whether `module` (its canonical name) is left unquantised.
    pub fn names(&self, module: &str) -> bool {
        let quantises = |only: &Patterns| any_spelling(only, module);
        self.only.as_ref().is_some_and(|only| !quantises(only))
            || !self.skip.is_empty() && any_spelling(&self.skip, module)
    }
}

/// Whether the module or the fused one that it is a part of matches, with or without the wrapper's prefix.
fn any_spelling(patterns: &Patterns, module: &str) -> bool {
    patterns.matches(module, LANGUAGE)
        || fused(module).is_some_and(|name| patterns.matches(&name, LANGUAGE))
}

/// The run-time module that `module` is a part of.
fn fused(module: &str) -> Option<Cow<'_, str>> {
    if let Some(at) = module.rfind(".experts.") {
        return Some(Cow::Borrowed(&module[..at + ".experts".len()]));
    }
    let (parent, last) = module.rsplit_once('.')?;
    let whole = match last {
        "gate_proj" | "up_proj" => "gate_up_proj",
        "q_proj" | "k_proj" | "v_proj" => "qkv_proj",
        "q_a_proj" | "kv_a_proj_with_mqa" => "fused_qkv_a_proj_with_mqa",
        _ => return None,
    };
    Some(Cow::Owned(format!("{parent}.{whole}")))
}

/// The entries in the spelling of canonical names, with the wrapper's prefix and without it (reference §2.6, §2.7).
fn spellings(entries: &[String]) -> Vec<String> {
    let mut out = Vec::with_capacity(entries.len());
    for entry in entries {
        let (lead, dotted) = match entry.strip_prefix("re:") {
            Some(regex) => ("re:", regex),
            None => ("", entry.as_str()),
        };
        let mut canonical = dotted.to_owned();
        for dot in [".", r"\."] {
            if let Some(rest) = dotted.strip_prefix(&format!("language_model{dot}layers{dot}")) {
                canonical = format!("language_model{dot}model{dot}layers{dot}{rest}");
            }
        }
        if let Some(inner) = canonical.strip_prefix(LANGUAGE).filter(|inner| !inner.is_empty()) {
            out.push(format!("{lead}{inner}"));
        }
        out.push(format!("{lead}{canonical}"));
    }
    out
}

/// Whether a target is part of the name of a class of linear layers, in upper or lower case (§1.6 d).
fn is_linear_class(target: &str) -> bool {
    const CLASSES: [&str; 6] = [
        "linear",
        "replicatedlinear",
        "rowparallellinear",
        "columnparallellinear",
        "mergedcolumnparallellinear",
        "qkvparallellinear",
    ];
    let target = target.to_ascii_lowercase();
    !target.is_empty() && CLASSES.iter().any(|class| class.contains(&target))
}

#[cfg(test)]
mod tests;
