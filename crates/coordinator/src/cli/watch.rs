//! Progress of a running load: bars on a terminal, a sparse log line otherwise.

use std::{
    io::IsTerminal,
    sync::{Arc, Condvar, Mutex, PoisonError, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use longshore_rank::protocol::Progress;
use tracing::info;

use crate::{plan::Plan, report::bytes_text};

/// Between two looks at the counters.
const TICK: Duration = Duration::from_millis(100);
/// Between two log lines.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// A thread that shows progress until it is stopped.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(super) fn start(plan: &Plan, progress: &[Arc<Progress>]) -> Self {
        let stop: Arc<(Mutex<bool>, Condvar)> = Arc::default();
        let ranks: Vec<(u64, Arc<Progress>)> =
            plan.forecast.iter().map(|f| f.storage_bytes).zip(progress.iter().cloned()).collect();
        let bars = std::io::stderr().is_terminal()
            && tracing::level_filters::LevelFilter::current() >= tracing::Level::INFO;
        let stopped = Arc::clone(&stop);
        let run = move || {
            if bars { show_bars(&ranks, &stopped) } else { log_lines(&ranks, &stopped) }
        };
        // progress is a courtesy: without a thread the load goes on in silence
        let thread = std::thread::Builder::new().name("progress".into()).spawn(run).ok();
        Self { stop, thread }
    }

    pub(super) fn stop(mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // a panic in there has been printed already
            let _ = thread.join();
        }
    }
}

/// Waits a tick; `true` once stopped.
fn wait(stop: &(Mutex<bool>, Condvar)) -> bool {
    let stopped = stop.0.lock().unwrap_or_else(PoisonError::into_inner);
    let result = stop.1.wait_timeout_while(stopped, TICK, |stopped| !*stopped);
    *result.unwrap_or_else(PoisonError::into_inner).0
}

fn show_bars(ranks: &[(u64, Arc<Progress>)], stop: &(Mutex<bool>, Condvar)) {
    let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let template = "rank {prefix:>4} {bar:32} {bytes}/{total_bytes} {binary_bytes_per_sec} {msg}";
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bars: Vec<ProgressBar> = ranks
        .iter()
        .enumerate()
        .map(|(rank, (total, _))| {
            let bar = all.add(ProgressBar::new(*total).with_style(style.clone()));
            bar.with_prefix(rank.to_string())
        })
        .collect();
    loop {
        let stopped = wait(stop);
        for (bar, (_, progress)) in bars.iter().zip(ranks) {
            bar.set_position(progress.read_bytes.load(Ordering::Relaxed));
            bar.set_message(progress.phase().name());
        }
        if stopped {
            bars.iter().for_each(ProgressBar::abandon);
            return;
        }
    }
}

fn log_lines(ranks: &[(u64, Arc<Progress>)], stop: &(Mutex<bool>, Condvar)) {
    let total: u64 = ranks.iter().map(|(bytes, _)| bytes).sum();
    let started = Instant::now();
    let mut last = started;
    while !wait(stop) {
        if last.elapsed() < LOG_EVERY {
            continue;
        }
        last = Instant::now();
        let read: u64 = ranks.iter().map(|(_, p)| p.read_bytes.load(Ordering::Relaxed)).sum();
        let slowest = ranks.iter().enumerate().min_by_key(|(_, (_, p))| p.phase() as u8);
        let (rank, phase) = slowest.map_or((0, "waiting"), |(r, (_, p))| (r, p.phase().name()));
        let rate = read as f64 / started.elapsed().as_secs_f64() / 1e9;
        info!(
            "{} of {} read, {rate:.2} GB/s; rank {rank} {phase}",
            bytes_text(read),
            bytes_text(total)
        );
    }
}
