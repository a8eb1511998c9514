//! Compares what a load wrote with what it should have written.
//!
//! A load's output is one file per rank and a manifest, as the contract's section on `--out`
//! describes them. What it should be comes from the oracle or from a conformance case.

mod expectation;
mod output;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

#[cfg(test)]
pub(crate) use self::expectation::sha256;
pub use self::expectation::{Expectation, ExpectedParam, ExpectedRank};
use crate::cases::Case;
use crate::oracle::{Answer, Param, Rank};

/// Compares an output directory with the oracle's answer; the number of equal parameters.
///
/// # Errors
/// The first differences, a line each.
pub fn with_answer(out_dir: &Path, answer: &Answer) -> Result<usize, String> {
    Expectation::from(answer).check_directory(out_dir)
}

/// Compares an output directory with a conformance case; the number of equal parameters.
///
/// # Errors
/// The first differences, a line each.
pub fn with_case(out_dir: &Path, case: &Case) -> Result<usize, String> {
    Expectation::of_case(case).check_directory(out_dir)
}

/// Counts what is equal and keeps what is not.
#[derive(Debug, Default)]
struct Tally {
    equal: usize,
    lines: Vec<String>,
}

impl Tally {
    const LINES_MAX: usize = 20;

    fn result(mut self) -> Result<usize, String> {
        if self.lines.is_empty() {
            return Ok(self.equal);
        }
        let count = self.lines.len();
        self.lines.truncate(Tally::LINES_MAX);
        let shown = self.lines.len();
        let rest =
            if count > shown { format!(", {} not shown", count - shown) } else { String::new() };
        self.lines.push(format!("{count} differences{rest}, {} parameters equal", self.equal));
        Err(self.lines.join("\n"))
    }

    fn rank(&mut self, number: usize, want: &ExpectedRank, got: &Rank) {
        let label = format!("rank {number}");
        for (name, want) in &want.parameters {
            match got.parameters.get(name).map(|got| difference(want, got)) {
                None => self.lines.push(format!("{label}: {name}: missing")),
                Some(Some(difference)) => self.lines.push(format!("{label}: {name}: {difference}")),
                Some(None) => self.equal += 1,
            }
        }
        for name in got.parameters.keys().filter(|name| !want.parameters.contains_key(*name)) {
            self.lines.push(format!("{label}: {name}: not expected"));
        }
        self.aliases(&label, &want.aliases, &got.aliases);
    }

    fn aliases(
        &mut self,
        label: &str,
        want: &BTreeMap<String, String>,
        got: &BTreeMap<String, String>,
    ) {
        let names: BTreeSet<_> = want.keys().chain(got.keys()).collect();
        for name in names {
            let (want, got) = (want.get(name), got.get(name));
            if want != got {
                self.lines.push(format!("{label}: alias {name}: want {want:?}, got {got:?}"));
            }
        }
    }
}

fn difference(want: &ExpectedParam, got: &Param) -> Option<String> {
    if (&want.dtype, &want.shape) != (&got.dtype, &got.shape) {
        let (want, got) = ((&want.dtype, &want.shape), (&got.dtype, &got.shape));
        return Some(format!("want {} {:?}, got {} {:?}", want.0, want.1, got.0, got.1));
    }
    if want.sha256 == expectation::sha256(&got.bytes) {
        return None;
    }
    let Some(bytes) = &want.bytes else {
        return Some(format!("bytes differ ({} {:?})", want.dtype, want.shape));
    };
    let same = bytes.iter().zip(&got.bytes).take_while(|(w, g)| w == g).count();
    let some = |bytes: &[u8]| bytes.iter().skip(same).take(8).map(|b| format!("{b:02x}")).collect();
    let (want_some, got_some): (Vec<String>, Vec<String>) = (some(bytes), some(&got.bytes));
    let (dtype, shape, length) = (&want.dtype, &want.shape, bytes.len());
    let (want_some, got_some) = (want_some.join(" "), got_some.join(" "));
    Some(format!(
        "{dtype} {shape:?} differs from byte {same} of {length}: want {want_some}, got {got_some}"
    ))
}

impl Expectation {
    /// Compares an output directory, the manifest included; the number of equal parameters.
    ///
    /// # Errors
    /// The first differences, a line each.
    pub fn check_directory(&self, out_dir: &Path) -> Result<usize, String> {
        let mut tally = Tally::default();
        for (number, want) in self.ranks.iter().enumerate() {
            match output::read_rank(&out_dir.join(&want.file)) {
                Ok(got) => tally.rank(number, want, &got),
                Err(error) => tally.lines.push(format!("rank {number}: {}: {error}", want.file)),
            }
        }
        let expected: BTreeSet<_> = self.ranks.iter().map(|rank| rank.file.clone()).collect();
        for file in output::rank_files(out_dir).difference(&expected) {
            tally.lines.push(format!("{file}: not expected"));
        }
        match output::read_manifest(out_dir) {
            Ok(manifest) => tally.lines.extend(self.manifest_differences(&manifest)),
            Err(error) => tally.lines.push(format!("manifest.json: {error}")),
        }
        tally.result()
    }

    /// Compares an answer of the oracle; the number of equal parameters.
    ///
    /// # Errors
    /// The first differences, a line each.
    pub fn check_answer(&self, answer: &Answer) -> Result<usize, String> {
        let mut tally = Tally::default();
        let other = Expectation::from(answer);
        tally.lines.extend(self.header_differences("answer", |key| other.header()[key].clone()));
        if self.ranks.len() != answer.ranks.len() {
            let (want, got) = (self.ranks.len(), answer.ranks.len());
            tally.lines.push(format!("want {want} ranks, got {got}"));
        }
        for (number, (want, got)) in self.ranks.iter().zip(&answer.ranks).enumerate() {
            tally.rank(number, want, got);
        }
        tally.result()
    }
}

#[cfg(test)]
mod tests;
