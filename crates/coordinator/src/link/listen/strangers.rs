//! Who was turned away, each told once: whoever can reach a port must not be able to fill the log.

use std::{
    collections::HashSet,
    mem::{Discriminant, discriminant},
    net::{IpAddr, SocketAddr},
};

use crate::{
    error::line,
    link::handshake::{Mismatch, Refusal},
};

/// Pairs of host and reason that are remembered, and so the most lines that a log gets.
const REMEMBERED_MAX: usize = 1024;

/// A host, and what kind of stranger came from there.
type Kind = (IpAddr, Discriminant<Refusal>, Option<Discriminant<Mismatch>>);

#[derive(Debug, Default)]
pub(super) struct Strangers {
    seen: HashSet<Kind>,
    is_full: bool,
}

impl Strangers {
    /// Logs that `address` was turned away: as a warning the first time, for debugging only later.
    pub(super) fn report(&mut self, address: SocketAddr, refusal: &Refusal) {
        let why = line(refusal);
        if self.is_news(address.ip(), refusal) {
            tracing::warn!("turned away a connection from {address}: {why}");
        } else {
            tracing::debug!("turned away a connection from {address}: {why}");
        }
    }

    fn is_news(&mut self, host: IpAddr, refusal: &Refusal) -> bool {
        let mismatch = match refusal {
            Refusal::Mismatch(why) => Some(discriminant(why)),
            _ => None,
        };
        let kind = (host.to_canonical(), discriminant(refusal), mismatch);
        if self.seen.contains(&kind) {
            return false;
        }
        if self.seen.len() < REMEMBERED_MAX {
            return self.seen.insert(kind);
        }
        if !std::mem::replace(&mut self.is_full, true) {
            tracing::warn!(
                "too many kinds of strangers: further ones are logged for debugging only"
            );
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn each_host_and_kind_is_news_once() {
        let mut strangers = Strangers::default();
        let (a, b): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let old = Refusal::Mismatch(Mismatch::Attempt { joiner: 1, group: 2 });
        let rank = Refusal::Mismatch(Mismatch::Rank { rank: 9, world_size: 2 });
        for (host, refusal) in [(a, &Refusal::Proof), (a, &old), (a, &rank), (b, &rank)] {
            assert!(strangers.is_news(host, refusal));
            assert!(!strangers.is_news(host, refusal));
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut strangers = Strangers::default();
        for i in 0..REMEMBERED_MAX as u32 {
            assert!(strangers.is_news(Ipv4Addr::from_bits(i).into(), &Refusal::Closed));
        }
        assert!(!strangers.is_news([255, 0, 0, 1].into(), &Refusal::Closed));
        assert_eq!(strangers.seen.len(), REMEMBERED_MAX);
    }
}
