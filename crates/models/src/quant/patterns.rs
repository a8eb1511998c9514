//! Sets of name patterns, searched at a cost that hardly depends on how many there are.
//!
//! Lists name hundreds of modules and a checkpoint has ten thousands, so nothing here is tried entry by entry: literal
//! entries go into an automaton, globs are found by their literal beginning, regular expressions are one set.

use std::collections::{BTreeMap, HashSet};

use aho_corasick::AhoCorasick;
use regex::bytes::{RegexSet, RegexSetBuilder};

/// A set of patterns; a name matches when any of them does.
#[derive(Clone, Default)]
pub(super) struct Patterns {
    exact: HashSet<String>,
    runs: Option<AhoCorasick>,
    parts: Option<AhoCorasick>,
    globs: Vec<GlobGroup>,
    segment_globs: Vec<String>,
    regexes: Option<RegexSet>,
}

/// The globs with one literal beginning.
#[derive(Clone)]
struct GlobGroup {
    start: String,
    globs: Vec<String>,
    /// The group with the longest beginning that this one begins with.
    parent: Option<usize>,
}

/// Collects patterns.
#[derive(Default)]
pub(super) struct PatternsBuilder {
    /// Names.
    pub(super) exact: Vec<String>,
    /// Names that match as a complete run of dotted segments anywhere: `mlp.gate` in `layers.3.mlp.gate`, but not in
    /// `layers.3.mlp.gate_proj`.
    pub(super) runs: Vec<String>,
    /// Texts that match anywhere, in upper or lower case.
    pub(super) parts: Vec<String>,
    /// Shell globs over a whole name (`*` also matches dots).
    pub(super) globs: Vec<String>,
    /// Shell globs over any single dotted segment.
    pub(super) segment_globs: Vec<String>,
    /// Regular expressions, anchored at the start.
    pub(super) regexes: Vec<String>,
}

impl PatternsBuilder {
    /// The set, and those patterns that could not be understood and match nothing.
    pub(super) fn build(self) -> (Patterns, Vec<String>) {
        let mut unusable = Vec::new();
        let runs: Vec<String> = self.runs.iter().map(|run| format!(".{run}.")).collect();
        let patterns = Patterns {
            exact: self.exact.into_iter().collect(),
            runs: literals(&runs, false, &mut unusable),
            parts: literals(&self.parts, true, &mut unusable),
            globs: glob_groups(self.globs),
            segment_globs: self.segment_globs,
            regexes: regexes(self.regexes, &mut unusable),
        };
        (patterns, unusable)
    }
}

/// The groups, sorted by their beginnings.
fn glob_groups(globs: Vec<String>) -> Vec<GlobGroup> {
    let mut by_start: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for glob in globs {
        let start = glob.split(['*', '?']).next().unwrap_or_default().to_owned();
        by_start.entry(start).or_default().push(glob);
    }
    let mut groups: Vec<GlobGroup> = Vec::with_capacity(by_start.len());
    for (start, globs) in by_start {
        // what begins with a text follows it directly, so the parent is the group before or one of its parents
        let mut parent = groups.len().checked_sub(1);
        while let Some(at) = parent.filter(|&at| !start.starts_with(&groups[at].start)) {
            parent = groups[at].parent;
        }
        groups.push(GlobGroup { start, globs, parent });
    }
    groups
}

fn literals(texts: &[String], any_case: bool, unusable: &mut Vec<String>) -> Option<AhoCorasick> {
    if texts.is_empty() {
        return None;
    }
    let made = AhoCorasick::builder().ascii_case_insensitive(any_case).build(texts);
    if made.is_err() {
        unusable.extend_from_slice(texts);
    }
    made.ok()
}

fn regexes(mut texts: Vec<String>, unusable: &mut Vec<String>) -> Option<RegexSet> {
    if texts.is_empty() {
        return None;
    }
    if let Ok(set) = regex_set(&texts) {
        return Some(set);
    }
    texts.retain(|text| {
        let usable = regex_set(std::slice::from_ref(text)).is_ok();
        if !usable {
            unusable.push(text.clone());
        }
        usable
    });
    let set = regex_set(&texts);
    if set.is_err() {
        // each is fine, all together are too large
        unusable.extend(texts);
    }
    set.ok()
}

/// Matching is linear in the name whatever the patterns; a set that would need too much memory is refused.
fn regex_set(texts: &[String]) -> Result<RegexSet, regex::Error> {
    let anchored = texts.iter().map(|text| format!("^(?:{text})"));
    RegexSetBuilder::new(anchored).unicode(false).build()
}

impl Patterns {
    /// Whether nothing can match.
    pub(super) fn is_empty(&self) -> bool {
        self.exact.is_empty()
            && self.runs.is_none()
            && self.parts.is_none()
            && self.globs.is_empty()
            && self.segment_globs.is_empty()
            && self.regexes.is_none()
    }

    /// Whether any pattern matches `name`, or `name` without `prefix` where it begins with that.
    pub(super) fn matches(&self, name: &str, prefix: &str) -> bool {
        // what matches within the shorter name matches within the longer one
        self.within(name)
            || self.whole(name)
            || name.strip_prefix(prefix).is_some_and(|shorter| self.whole(shorter))
    }

    /// The patterns that match a part of a name.
    fn within(&self, name: &str) -> bool {
        self.runs.as_ref().is_some_and(|runs| runs.is_match(&format!(".{name}.")))
            || self.parts.as_ref().is_some_and(|parts| parts.is_match(name))
            || self.any_segment_glob(name)
    }

    /// The patterns that match from a name's beginning.
    fn whole(&self, name: &str) -> bool {
        self.exact.contains(name)
            || self.any_glob(name)
            || self.regexes.as_ref().is_some_and(|set| set.is_match(name.as_bytes()))
    }

    fn any_glob(&self, name: &str) -> bool {
        // every beginning of `name` is the last group up to `name` in order, or one of its parents
        let after = self.globs.partition_point(|group| group.start.as_str() <= name);
        let mut at = after.checked_sub(1);
        while let Some(group) = at.map(|at| &self.globs[at]) {
            let matches = |glob: &String| glob_matches(glob.as_bytes(), name.as_bytes());
            if name.starts_with(&group.start) && group.globs.iter().any(matches) {
                return true;
            }
            at = group.parent;
        }
        false
    }

    fn any_segment_glob(&self, name: &str) -> bool {
        !self.segment_globs.is_empty()
            && name.split('.').any(|segment| {
                let mut globs = self.segment_globs.iter();
                globs.any(|glob| glob_matches(glob.as_bytes(), segment.as_bytes()))
            })
    }
}

/// `*` matches any text, `?` one byte. At a mismatch the last star takes one byte more; no other star has to give way.
fn glob_matches(glob: &[u8], name: &[u8]) -> bool {
    let (mut g, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, n));
                g += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[n] => (g, n) = (g + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (g, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(fill: impl FnOnce(&mut PatternsBuilder)) -> Patterns {
        let mut builder = PatternsBuilder::default();
        fill(&mut builder);
        let (patterns, unusable) = builder.build();
        assert_eq!(unusable, [""; 0]);
        patterns
    }

    fn hit(patterns: &Patterns, name: &str) -> bool {
        patterns.matches(name, "wrapper.")
    }

    #[test]
    fn a_run_is_whole_segments_at_the_start_in_the_middle_or_at_the_end() {
        let runs = one(|b| b.runs = vec!["mlp.gate".into(), "lm_head".into(), "a.1".into()]);
        for name in ["mlp.gate", "x.mlp.gate", "mlp.gate.y", "x.mlp.gate.y", "lm_head", "a.1.b"] {
            assert!(hit(&runs, name), "{name}");
        }
        for name in ["mlp.gate_proj", "xmlp.gate", "mlp.experts.gate", "mlp", "a.10", "ba.1"] {
            assert!(!hit(&runs, name), "{name}");
        }
    }

    #[test]
    fn a_regex_is_anchored_at_the_start_only() {
        let set = one(|b| b.regexes = vec![r"model\.layers\.\d+\.self_attn".into()]);
        assert!(hit(&set, "model.layers.12.self_attn.o_proj"));
        assert!(!hit(&set, "language_model.model.layers.12.self_attn"));
        assert!(!hit(&set, "model.layers.x.self_attn"));
    }

    #[test]
    fn an_unusable_regex_is_reported_and_spoils_no_other() {
        let texts = [r"(?=x)y", r".*\.q", r"(", "(a{1000}){1000}"].map(str::to_owned).to_vec();
        let (set, unusable) = PatternsBuilder { regexes: texts, ..Default::default() }.build();
        assert_eq!(unusable, ["(?=x)y", "(", "(a{1000}){1000}"]);
        assert!(hit(&set, "x.q") && !hit(&set, "y"));
    }

    #[test]
    fn parts_ignore_case_and_segments() {
        let parts = one(|b| b.parts = vec!["LM_Head".into(), "shared".into()]);
        assert!(hit(&parts, "x.lm_head") && hit(&parts, "mlp.Shared_experts.up"));
        assert!(!hit(&parts, "head"));
    }

    #[test]
    fn a_prefix_may_be_left_out_of_whole_names() {
        let fills: [fn(&mut PatternsBuilder); 3] = [
            |b| b.exact = vec!["a.b".into()],
            |b| b.globs = vec!["a.*".into()],
            |b| b.regexes = vec!["a".into()],
        ];
        for fill in fills {
            let set = one(fill);
            assert!(hit(&set, "a.b") && hit(&set, "wrapper.a.b") && !hit(&set, "other.a.b"));
        }
    }

    /// The definition of a glob, by trying everything.
    fn naive(glob: &[u8], name: &[u8]) -> bool {
        match (glob.split_first(), name.split_first()) {
            (None, rest) => rest.is_none(),
            (Some((b'*', tail)), rest) => {
                naive(tail, name) || rest.is_some_and(|(_, more)| naive(glob, more))
            }
            (Some((&g, tail)), Some((&n, more))) => (g == b'?' || g == n) && naive(tail, more),
            (Some(_), None) => false,
        }
    }

    proptest! {
        #[test]
        fn globs_match_what_the_definition_says(
            globs in proptest::collection::vec("[ab.]{0,4}[ab.?*]{0,5}", 1..6), name in "[ab.]{0,10}",
        ) {
            let wanted = globs.iter().any(|glob| naive(glob.as_bytes(), name.as_bytes()));
            let set = one(|b| b.globs = globs);
            prop_assert_eq!(hit(&set, &name), wanted);
        }
    }
}
