//! What is usual: running quantiles of how long the first byte takes, and how long a MiB takes from then on.

use std::time::Duration;

/// The last measurements of one kind. Few enough to sort after each, many enough for a tail of a few percent.
#[derive(Debug, Clone)]
struct Window {
    values: Vec<f32>,
    next: usize,
    /// The 90th percentile.
    usual: Option<f32>,
}

const WINDOW: usize = 128;
/// Below this many measurements nothing is usual yet.
const MEASUREMENTS_MIN: usize = 16;

impl Window {
    fn new() -> Window {
        Window { values: Vec::with_capacity(WINDOW), next: 0, usual: None }
    }

    fn add(&mut self, value: f32) {
        if self.values.len() < WINDOW {
            self.values.push(value);
        } else {
            self.values[self.next] = value;
        }
        self.next = (self.next + 1) % WINDOW;
        if self.values.len() >= MEASUREMENTS_MIN {
            let mut sorted = self.values.clone();
            let index = (sorted.len() - 1) * 9 / 10;
            self.usual = Some(*sorted.select_nth_unstable_by(index, f32::total_cmp).1);
        }
    }
}

/// What requests to one store usually take.
#[derive(Debug, Clone)]
pub(crate) struct Usual {
    first_byte: Window,
    per_mib: Window,
}

/// What a request may take before it is slower than usual.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Patience {
    /// Without bringing anything.
    pub(crate) silence: Duration,
    per_mib: Option<Duration>,
}

impl Patience {
    /// For a body of `bytes`, from its first one on. `None` while no body is known.
    pub(crate) fn body(&self, bytes: usize) -> Option<Duration> {
        let whole = self.per_mib?.mul_f64(bytes as f64 / (1 << 20) as f64);
        Some(whole.max(self.silence))
    }
}

/// How many times the 90th percentile is too much.
const PATIENCE: f32 = 3.0;
/// Never less patience than this: what a busy machine takes to schedule a thread is not the storage's delay.
const PATIENCE_MIN: Duration = Duration::from_millis(100);

impl Usual {
    pub(crate) fn new() -> Usual {
        Usual { first_byte: Window::new(), per_mib: Window::new() }
    }

    /// A request's first byte came, or had not come when another was ahead.
    pub(crate) fn first_byte(&mut self, after: Duration) {
        self.first_byte.add(after.as_secs_f32());
    }

    /// A body of `bytes` took `time` after its first byte.
    pub(crate) fn body(&mut self, bytes: u64, time: Duration) {
        // shorter ones measure the first chunk only
        if bytes >= 1 << 20 {
            self.per_mib.add(time.as_secs_f32() / (bytes as f32 / (1 << 20) as f32));
        }
    }

    /// What a request may take before it is slower than usual. `None` while nothing is known.
    pub(crate) fn patience(&self) -> Option<Patience> {
        let silence = Duration::from_secs_f32(self.first_byte.usual? * PATIENCE).max(PATIENCE_MIN);
        let per_mib = self.per_mib.usual.map(|usual| Duration::from_secs_f32(usual * PATIENCE));
        Some(Patience { silence, per_mib })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_usual_at_first() {
        let mut usual = Usual::new();
        for _ in 0..MEASUREMENTS_MIN - 1 {
            usual.first_byte(Duration::from_millis(50));
        }
        assert_eq!(usual.patience(), None);
        usual.first_byte(Duration::from_millis(50));
        let patience = usual.patience().unwrap();
        assert!(patience.silence.abs_diff(Duration::from_millis(150)) < Duration::from_millis(1));
        assert_eq!(patience.body(1), None);
    }

    #[test]
    fn a_slow_tail_of_a_few_percent_does_not_move_it() {
        let mut usual = Usual::new();
        for n in 0..1000 {
            usual.first_byte(Duration::from_millis(if n % 20 == 0 { 2000 } else { 40 }));
            usual.body(8 << 20, Duration::from_millis(80));
        }
        let patience = usual.patience().unwrap();
        assert!(patience.silence < Duration::from_millis(130));
        assert!(patience.body(8 << 20).unwrap() < Duration::from_millis(260));
        assert_eq!(patience.body(1), Some(patience.silence));
    }

    #[test]
    fn it_follows_a_storage_that_becomes_slow() {
        let mut usual = Usual::new();
        for n in 0..400 {
            usual.first_byte(Duration::from_millis(if n < 200 { 10 } else { 1000 }));
        }
        assert!(usual.patience().unwrap().silence >= Duration::from_secs(3));
    }
}
