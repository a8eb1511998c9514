//! What a plan or a load says of itself: JSON for programs, tables for people.

use std::{collections::BTreeMap, fmt::Write};

use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use serde::Serialize;

use longshore_rank::protocol::{Generation, RankReport};

use crate::{load::staging_forecast, plan::Plan, verify::Verified};

/// What was loaded, for whom: the keys that manifest and JSON share.
#[derive(Debug, Clone, Serialize)]
pub struct Identity {
    /// The source as the user gave it.
    pub source: String,
    /// Model family.
    pub family: &'static str,
    /// Quantisation scheme.
    pub quant: &'static str,
    /// Tensor-parallel size.
    pub tp: u32,
    /// Expert-parallel size.
    pub ep: u32,
    /// The effective kernel layout.
    pub kernel_layout: &'static str,
}

impl Identity {
    /// The identity of `plan`, made for `source`.
    pub fn of(plan: &Plan, source: &str) -> Self {
        let parallel = plan.placement().parallel;
        Self {
            source: source.to_owned(),
            family: plan.model.family.name(),
            quant: plan.model.declared.scheme.name(),
            tp: parallel.tp(),
            ep: parallel.ep(),
            kernel_layout: plan.model.layout.kernels.name(),
        }
    }
}

/// What ranks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RanksAs {
    /// Threads of one process.
    Threads,
    /// Processes.
    Processes,
}

/// A tensor that no rank needs.
#[derive(Debug, Clone, Serialize)]
pub struct SkippedEntry {
    /// Its name.
    pub tensor: String,
    /// Why.
    pub why: &'static str,
}

/// One rank of [`Report`]. Sizes in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct RankEntry {
    /// The rank.
    pub rank: u32,
    /// Bytes of its parameters; aliases count nothing.
    pub parameter_bytes: u64,
    /// Number of its parameters.
    pub parameters: usize,
    /// Number of its aliases.
    pub aliases: usize,
    /// Weight bytes asked of storage.
    pub storage_bytes_read: u64,
    /// Weight bytes that were not, as the weight cache had them; together, these are what the rank read.
    pub cached_bytes_read: u64,
    /// Reads issued to storage.
    pub storage_reads: u64,
    /// Bytes read for alignment only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub padding_bytes_read: Option<u64>,
    /// Bytes received from other ranks.
    pub received_bytes: u64,
    /// Bytes handed to other ranks.
    pub sent_bytes: u64,
    /// The most staging memory held; of a plan, the most that it would take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_staging_bytes: Option<u64>,
    /// The most device memory that the rank's process had allocated on its device, where its parameters live on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_device_bytes: Option<u64>,
    /// Staging memory still held at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_staging_bytes: Option<u64>,
    /// The process's peak resident memory (ranks that are threads share one process).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Until the rank was ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// The JSON of `load` and `plan` (contract §3); `plan` leaves out what only a load can know.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was loaded.
    #[serde(flatten)]
    pub identity: Identity,
    /// Where parameters live.
    pub device: &'static str,
    /// Threads or processes.
    pub ranks_as: RanksAs,
    /// Whether ranks passed bytes to each other.
    pub exchange: bool,
    /// Why.
    pub exchange_reason: String,
    /// Exchange rounds of the plan.
    pub rounds: u32,
    /// The longest read.
    pub read_bytes: u64,
    /// Bytes of all tensors in the files.
    pub checkpoint_bytes: u64,
    /// Checkpoint bytes that any rank needs, each once.
    pub needed_bytes: u64,
    /// Weight bytes asked of storage; a plan takes none to be in the weight cache.
    pub storage_bytes_read: u64,
    /// Weight bytes that were not, as the weight cache had them; together, these are what was read.
    pub cached_bytes_read: u64,
    /// Of a reload, those of `needed_bytes` that were in place before, as their files are the same; where ranks are processes,
    /// on rank 0.
    pub kept_bytes: u64,
    /// Bytes of headers.
    pub header_bytes_read: u64,
    /// Bytes read for alignment only.
    pub padding_bytes_read: u64,
    /// Bytes read a second time.
    pub retried_bytes: u64,
    /// Bytes that passed between ranks.
    pub exchanged_bytes: u64,
    /// From the first header until every rank was ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Seconds by phase.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub phases: BTreeMap<&'static str, f64>,
    /// Peak resident memory of this process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// The load's generation.
    pub generation: u64,
    /// Ranks that were replaced.
    pub restarts: u32,
    /// Weight bytes that these had asked of storage, as of their last heartbeats; not part of `storage_bytes_read`.
    pub lost_bytes_read: u64,
    /// Each rank.
    pub ranks: Vec<RankEntry>,
    /// Tensors that no rank needs.
    pub skipped: Vec<SkippedEntry>,
    /// Which files were verified, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// What looked odd.
    pub warnings: Vec<String>,
    /// Over all parameters of all ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// What was lost in the course of a load that became complete all the same.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lost {
    /// Ranks that were replaced.
    pub ranks: u32,
    /// Weight bytes that they had asked of storage, as of their last heartbeats.
    pub bytes_read: u64,
}

/// What a load was found to have done.
#[derive(Debug, Clone, Copy)]
pub struct Done<'a> {
    /// What each rank did.
    pub reports: &'a [RankReport],
    /// What looked odd in the values.
    pub warnings: &'a [String],
    /// Which files were verified, where that was asked for.
    pub verified: Option<&'a Verified>,
    /// Checkpoint bytes that were in place before.
    pub kept_bytes: u64,
    /// Its generation.
    pub generation: Generation,
    /// What was lost on the way.
    pub lost: Lost,
    /// What the ranks are.
    pub ranks_as: RanksAs,
    /// Peak resident memory of each rank, where ranks are processes.
    pub peak_rss_bytes: Option<&'a [u64]>,
}

impl Report {
    /// The forecast of a plan.
    pub fn forecast(plan: &Plan, source: &str, ranks_as: RanksAs) -> Self {
        let (checkpoint, placement) = (plan.checkpoint(), plan.placement());
        let ranks = plan.forecast.iter().enumerate().map(|(rank, f)| RankEntry {
            rank: rank as u32,
            parameter_bytes: placement.parameter_bytes(),
            parameters: placement.params.len(),
            aliases: placement.aliases.len(),
            storage_bytes_read: f.storage_bytes,
            cached_bytes_read: 0,
            storage_reads: f.reads,
            padding_bytes_read: None,
            received_bytes: f.received_bytes,
            sent_bytes: f.sent_bytes,
            peak_staging_bytes: Some(staging_forecast(plan, ranks_as == RanksAs::Processes)),
            peak_device_bytes: None,
            final_staging_bytes: None,
            peak_rss_bytes: None,
            seconds: None,
        });
        let skipped = placement.skipped.iter().map(|s| SkippedEntry {
            tensor: checkpoint.tensors[s.tensor as usize].name.clone(),
            why: s.why,
        });
        Self {
            identity: Identity::of(plan, source),
            device: "cpu",
            ranks_as,
            exchange: plan.load.exchange,
            exchange_reason: plan.exchange_reason.clone(),
            rounds: plan.rounds,
            read_bytes: plan.load.read_bytes_max,
            checkpoint_bytes: checkpoint.data_bytes(),
            needed_bytes: plan.needed_bytes,
            storage_bytes_read: plan.forecast.iter().map(|f| f.storage_bytes).sum(),
            cached_bytes_read: 0,
            kept_bytes: 0,
            header_bytes_read: plan.header_bytes,
            padding_bytes_read: 0,
            retried_bytes: 0,
            exchanged_bytes: plan.forecast.iter().map(|f| f.received_bytes).sum(),
            seconds: None,
            phases: BTreeMap::new(),
            peak_rss_bytes: peak_rss_bytes(),
            generation: 1,
            restarts: 0,
            lost_bytes_read: 0,
            ranks: ranks.collect(),
            skipped: skipped.collect(),
            verified: None,
            warnings: placement.warnings.clone(),
            digest: None,
        }
    }

    /// What a load did: the forecast's figures replaced by what was counted.
    pub fn of_load(plan: &Plan, source: &str, done: &Done<'_>) -> Self {
        let mut this = Self::forecast(plan, source, done.ranks_as);
        let own = this.peak_rss_bytes;
        for (number, (entry, report)) in this.ranks.iter_mut().zip(done.reports).enumerate() {
            entry.storage_bytes_read = report.storage_bytes_read;
            entry.cached_bytes_read = report.cached_bytes_read;
            entry.storage_reads = report.reads;
            entry.padding_bytes_read = Some(report.padding_bytes_read);
            entry.received_bytes = report.received_bytes;
            entry.sent_bytes = report.sent_bytes;
            entry.peak_staging_bytes = Some(report.peak_staging_bytes);
            entry.peak_device_bytes = report.peak_device_bytes;
            entry.final_staging_bytes = Some(report.final_staging_bytes);
            entry.peak_rss_bytes = done.peak_rss_bytes.map_or(own, |all| Some(all[number]));
            entry.seconds = Some(report.elapsed.as_secs_f64());
        }
        let on_device = done.reports.iter().any(|r| r.peak_device_bytes.is_some());
        this.device = if on_device { "cuda" } else { "cpu" };
        this.kept_bytes = done.kept_bytes;
        this.generation = done.generation;
        this.restarts = done.lost.ranks;
        this.lost_bytes_read = done.lost.bytes_read;
        this.warnings.extend_from_slice(done.warnings);
        this.verified = done.verified.cloned();
        this.storage_bytes_read = done.reports.iter().map(|r| r.storage_bytes_read).sum();
        this.cached_bytes_read = done.reports.iter().map(|r| r.cached_bytes_read).sum();
        this.padding_bytes_read = done.reports.iter().map(|r| r.padding_bytes_read).sum();
        this.retried_bytes = done.reports.iter().map(|r| r.retried_bytes).sum();
        this.exchanged_bytes = done.reports.iter().map(|r| r.received_bytes).sum();
        this
    }

    /// The report as a table with a summary beneath.
    pub fn table(&self) -> String {
        let loaded = self.seconds.is_some();
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        let mut head = vec!["rank", "parameters", "storage read", "reads", "received", "sent"];
        if loaded {
            head.extend(["seconds", "GB/s"]);
        }
        table.set_header(head);
        for r in &self.ranks {
            let mut row = vec![
                r.rank.to_string(),
                bytes_text(r.parameter_bytes),
                bytes_text(r.storage_bytes_read),
                r.storage_reads.to_string(),
                bytes_text(r.received_bytes),
                bytes_text(r.sent_bytes),
            ];
            if let Some(seconds) = r.seconds {
                row.push(format!("{seconds:.3}"));
                row.push(format!("{:.2}", r.parameter_bytes as f64 / seconds.max(1e-9) / 1e9));
            }
            table.add_row(row);
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!("{table}\n{}", self.summary())
    }

    fn summary(&self) -> String {
        let i = &self.identity;
        let mut text = format!(
            "{} {}, tp {}, ep {}, kernel layout {}: {} needed of {}",
            i.family,
            i.quant,
            i.tp,
            i.ep,
            i.kernel_layout,
            bytes_text(self.needed_bytes),
            bytes_text(self.checkpoint_bytes),
        );
        let ratio = self.storage_bytes_read as f64 / (self.needed_bytes as f64).max(1.0);
        let exchange = if self.exchange { "on" } else { "off" };
        let cached = match self.cached_bytes_read {
            0 => String::new(),
            bytes => format!(", from the weight cache {}", bytes_text(bytes)),
        };
        let kept = match self.kept_bytes {
            0 => String::new(),
            bytes => format!(", in place before {}", bytes_text(bytes)),
        };
        // writing to a String cannot fail
        let _ = write!(
            text,
            "\nread from storage {} ({ratio:.3} × needed){cached}{kept}, exchanged {} in {} round{} (exchange {exchange}: {})",
            bytes_text(self.storage_bytes_read),
            bytes_text(self.exchanged_bytes),
            self.rounds,
            if self.rounds == 1 { "" } else { "s" },
            self.exchange_reason,
        );
        if self.restarts > 0 {
            let _ = write!(
                text,
                "\n{} rank{} replaced, after {} read from storage",
                self.restarts,
                if self.restarts == 1 { "" } else { "s" },
                bytes_text(self.lost_bytes_read),
            );
        }
        if !self.skipped.is_empty() {
            let _ = write!(text, "\n{} tensors skipped", self.skipped.len());
            let mut by_reason: BTreeMap<&str, u64> = BTreeMap::new();
            for s in &self.skipped {
                *by_reason.entry(s.why).or_default() += 1;
            }
            for (why, count) in by_reason {
                let _ = write!(text, "; {count}: {why}");
            }
        }
        if let Some(Verified { verified, unpublished }) = &self.verified {
            let _ = write!(text, "\n{} files verified", verified.len());
            if let Some(first) = unpublished.first() {
                let count = unpublished.len();
                let _ = write!(
                    text,
                    "; {count} have no published digest: {first}{}",
                    if count > 1 { ", …" } else { "" }
                );
            }
        }
        for warning in &self.warnings {
            let _ = write!(text, "\nwarning: {warning}");
        }
        if let Some(seconds) = self.seconds {
            let rate = self.needed_bytes as f64 / seconds.max(1e-9) / 1e9;
            let _ = write!(text, "\nready after {seconds:.3} s ({rate:.2} GB/s)");
        }
        if let Some(digest) = &self.digest {
            let _ = write!(text, "\ndigest {digest}");
        }
        text
    }
}

/// A byte count for people: `1.50 GiB`.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

/// Peak resident memory of this process (`VmHWM`), in bytes.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
