//! What all runs together say: JSON for programs, a table for people.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use serde::Serialize;

use super::{Chaos, FaultReport, Reference, RunReport, Verdict};
use crate::report::bytes_text;

/// What all runs together say.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was run.
    pub command: String,
    /// Repeats the choice of faults, ranks and moments.
    pub seed: u64,
    /// Ranks of the group.
    pub ranks: u32,
    /// How long the undisturbed run took until the load was complete.
    pub undisturbed_seconds: f64,
    /// Weight bytes that were asked of storage in it.
    pub undisturbed_bytes_read: u64,
    /// Its digest over all parameters, if the command prints it: else digests are not compared.
    pub digest: Option<String>,
    /// The disturbed ones.
    pub runs: Vec<RunReport>,
    /// How many were right.
    pub right: usize,
    /// To how many nothing could be done when it should have been.
    pub missed: usize,
    /// How many were wrong.
    pub wrong: usize,
}

impl Chaos {
    pub(super) fn report(&self, reference: &Reference, runs: Vec<RunReport>) -> Report {
        let count = |verdict| runs.iter().filter(|run| run.verdict == verdict).count();
        Report {
            command: self.shown.clone(),
            seed: self.seed,
            ranks: reference.world_size,
            undisturbed_seconds: reference.seconds,
            undisturbed_bytes_read: reference.read_bytes,
            digest: reference.digest.clone(),
            right: count(Verdict::Right),
            missed: count(Verdict::Missed),
            wrong: count(Verdict::Wrong),
            runs,
        }
    }
}

impl Report {
    /// Whether no run was wrong.
    pub fn is_right(&self) -> bool {
        self.wrong == 0
    }

    /// The runs as a table, with the verdict beneath.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        table.set_header([
            "run",
            "fault",
            "rank",
            "phase",
            "detected after",
            "recovered after",
            "read again",
            "time",
            "verdict",
        ]);
        for run in &self.runs {
            let lines = |text: fn(&FaultReport) -> String| {
                run.faults.iter().map(text).collect::<Vec<_>>().join("\n")
            };
            table.add_row([
                run.run.to_string(),
                lines(|fault| fault.fault.clone()),
                lines(|fault| fault.rank.to_string()),
                lines(phase_text),
                lines(|fault| seconds_text(fault.detected_after)),
                lines(|fault| seconds_text(fault.recovered_after)),
                bytes_text(run.bytes_read_again),
                format!("{:.2} ×", run.ratio),
                verdict_word(run.verdict).to_owned(),
            ]);
        }
        for number in [0, 2, 4, 5, 6, 7] {
            if let Some(column) = table.column_mut(number) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        format!("{table}\n{}", self.summary())
    }

    fn summary(&self) -> String {
        let undisturbed = bytes_text(self.undisturbed_bytes_read);
        let mut text = format!(
            "undisturbed: {} ranks complete after {:.3} s, {undisturbed} read",
            self.ranks, self.undisturbed_seconds
        );
        for run in self.runs.iter().filter(|run| run.verdict != Verdict::Right) {
            // writing to a String cannot fail
            let _ = write!(text, "\nrun {}: {}", run.run, verdict_text(run));
        }
        if let Some(kept) = self.runs.iter().find_map(|run| run.kept.as_ref()) {
            let _ = write!(text, "\nevents and output of what went wrong: {kept}");
        }
        if self.digest.is_none() {
            text += "\ndigests were not compared: the command prints none";
        }
        let Self { right, missed, wrong, seed, .. } = self;
        let runs = self.runs.len();
        let _ = write!(
            text,
            "\n{runs} runs: {right} right, {wrong} wrong, {missed} missed; --seed {seed} repeats them"
        );
        text
    }
}

fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Right => "right",
        Verdict::Missed => "missed",
        Verdict::Wrong => "WRONG",
    }
}

/// The verdict, and why.
pub(super) fn verdict_text(run: &RunReport) -> String {
    let word = verdict_word(run.verdict);
    let missed = run.faults.iter().filter_map(|fault| fault.missed.as_ref());
    let why: Vec<String> = match run.verdict {
        Verdict::Right => Vec::new(),
        Verdict::Wrong => run.wrong.clone(),
        Verdict::Missed => missed.cloned().collect(),
    };
    if why.is_empty() { word.to_owned() } else { format!("{word}: {}", why.join("; ")) }
}

fn phase_text(fault: &FaultReport) -> String {
    match fault.phase {
        // what was asked for is a moment, or this phase
        Some(phase) if fault.wanted != phase.name() => {
            format!("{} ({})", phase.name(), fault.wanted)
        }
        Some(phase) => phase.name().to_owned(),
        None => format!("– ({})", fault.wanted),
    }
}

fn seconds_text(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "–".to_owned(), |seconds| format!("{seconds:.3} s"))
}
