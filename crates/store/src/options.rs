//! How a store is read: limits in time and number, each with its reason, and the settings that lead to the storage.

use std::{collections::BTreeMap, env, fmt, time::Duration};

use crate::{error::StoreError, location::Location};

/// How a store is read.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Requests in flight. `Some(n)`: exactly that many where there is so much to ask for. `None`: what the storage gives,
    /// found by trying, between 1 and [`StoreOptions::CONCURRENCY_MAX`]. Hedges are not counted.
    pub concurrency: Option<usize>,
    /// How long a request may bring nothing (fewer than 64 KiB, where more is missing) before it is given up and the
    /// rest asked for again. Default 10 s: the first byte of S3, GCS and the hub comes in well under 1 s, and even a
    /// frozen front end is replaced in a few seconds.
    pub stall_after: Duration,
    /// How long one piece of a read (at most [`part_bytes`](Self::part_bytes)) may take from its first request on, with
    /// all its retries. Default 120 s: long enough to sit out a throttled minute, and 8 MiB in
    /// that time are 70 KB/s, slower than anything worth waiting for.
    pub give_up_after: Duration,
    /// Whether a request that is much slower than usual is asked a second time, at most 5 % more requests. Default yes.
    pub hedge: bool,
    /// The longest range that one request asks for; longer reads are split evenly. Default 8 MiB: S3's advice for
    /// byte-range fetches is 8–16 MiB, and at 100 MB/s per connection it takes 80 ms, some times the wait for the first
    /// byte. **Source:** "Performance design patterns for Amazon S3", Amazon S3 user guide.
    pub part_bytes: u64,
    /// Where credentials, endpoints and regions come from. Default: the environment of the process.
    pub settings: Settings,
}

impl StoreOptions {
    /// The most requests in flight where the number is found by trying. 128 requests of 8 MiB cover 100 Gbit/s at a
    /// latency of 85 ms.
    pub const CONCURRENCY_MAX: usize = 128;

    /// Refuses what cannot be meant.
    pub(crate) fn check(&self, location: &Location) -> Result<(), StoreError> {
        let reason = match self {
            StoreOptions { concurrency: Some(0), .. } => "a concurrency of 0 reads nothing",
            StoreOptions { part_bytes: 0, .. } => "parts of 0 bytes hold nothing",
            _ if self.stall_after.is_zero() || self.give_up_after.is_zero() => {
                "a time limit of 0 leaves no time"
            }
            _ => return Ok(()),
        };
        Err(StoreError::BadSetting { location: location.to_string(), reason: reason.to_owned() })
    }
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            concurrency: None,
            stall_after: Duration::from_secs(10),
            give_up_after: Duration::from_secs(120),
            hedge: true,
            part_bytes: 8 << 20,
            settings: Settings::from_env(),
        }
    }
}

/// Environment variables, or what stands for them. Printed without values, as some are secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    /// The environment of the process. Variables that are empty or not UTF-8 count as not set.
    pub fn from_env() -> Settings {
        let pairs = env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        pairs.collect()
    }

    /// A variable's value, unless it is empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The first of some variables that is set, with its name.
    pub(crate) fn first<'a>(&'a self, names: &[&'a str]) -> Option<(&'a str, &'a str)> {
        names.iter().find_map(|name| Some((*name, self.get(name)?)))
    }

    /// All variables whose name starts with `prefix`.
    pub(crate) fn starting_with<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0
            .iter()
            .filter(move |(name, _)| name.starts_with(prefix))
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

impl FromIterator<(String, String)> for Settings {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Settings {
        Settings(pairs.into_iter().filter(|(_, value)| !value.is_empty()).collect())
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Settings {
    fn from(pairs: [(&str, &str); N]) -> Settings {
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Settings({} variables)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_printed_without_values() {
        let settings = Settings::from([("AWS_SECRET_ACCESS_KEY", "hunter2"), ("AWS_REGION", "")]);
        assert_eq!(settings.get("AWS_SECRET_ACCESS_KEY"), Some("hunter2"));
        assert_eq!(settings.get("AWS_REGION"), None);
        let options = StoreOptions { settings, ..StoreOptions::default() };
        assert!(!format!("{options:?}").contains("hunter2"));
    }
}
