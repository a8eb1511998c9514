//! What is usual: running quantiles of how long the first byte takes, and how long a MiB takes from then on.

use std::time::Duration;

/// The last measurements of one kind. Few enough to sort at need, many enough for a tail of a few percent.
#[derive(Debug, Clone)]
struct Window {
    values: Vec<f32>,
    next: usize,
}

const WINDOW: usize = 128;
/// Below this many measurements nothing is usual yet.
const MEASUREMENTS_MIN: usize = 16;

impl Window {
    fn new() -> Window {
        Window { values: Vec::with_capacity(WINDOW), next: 0 }
    }

    fn add(&mut self, value: f32) {
        if self.values.len() < WINDOW {
            self.values.push(value);
        } else {
            self.values[self.next] = value;
        }
        self.next = (self.next + 1) % WINDOW;
    }

    fn quantile(&self, share: f64) -> Option<f32> {
        if self.values.len() < MEASUREMENTS_MIN {
            return None;
        }
        let mut sorted = self.values.clone();
        let index = ((sorted.len() - 1) as f64 * share).round() as usize;
        Some(*sorted.select_nth_unstable_by(index, f32::total_cmp).1)
    }
}

/// What requests to one store usually take.
#[derive(Debug, Clone)]
pub(crate) struct Usual {
    first_byte: Window,
    per_mib: Window,
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

    /// How long a request may bring nothing before it is slower than usual. `None` while nothing is known.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let usual = self.first_byte.quantile(0.9)?;
        Some(Duration::from_secs_f32(usual * PATIENCE).max(PATIENCE_MIN))
    }

    /// How long a body of `bytes` may take before it is slower than usual.
    pub(crate) fn body_patience(&self, bytes: u64) -> Option<Duration> {
        let usual = self.per_mib.quantile(0.9)?;
        let whole = usual * PATIENCE * (bytes as f32 / (1 << 20) as f32);
        Some(Duration::from_secs_f32(whole).max(self.patience()?))
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
        assert!(
            usual.patience().unwrap().abs_diff(Duration::from_millis(150))
                < Duration::from_millis(1)
        );
        assert_eq!(usual.body_patience(1), None);
    }

    #[test]
    fn a_slow_tail_of_a_few_percent_does_not_move_it() {
        let mut usual = Usual::new();
        for n in 0..1000 {
            usual.first_byte(Duration::from_millis(if n % 20 == 0 { 2000 } else { 40 }));
            usual.body(8 << 20, Duration::from_millis(80));
        }
        assert!(usual.patience().unwrap() < Duration::from_millis(130));
        assert!(usual.body_patience(8 << 20).unwrap() < Duration::from_millis(260));
    }

    #[test]
    fn it_follows_a_storage_that_becomes_slow() {
        let mut usual = Usual::new();
        for n in 0..400 {
            usual.first_byte(Duration::from_millis(if n < 200 { 10 } else { 1000 }));
        }
        assert!(usual.patience().unwrap() >= Duration::from_secs(3));
    }
}
