//! An address → proven connections, whatever else knocks there.
//!
//! Every connection is heard by a task of its own, so a slow stranger delays nobody. Those that have not proven anything yet
//! are bounded: when there are too many, the next one is let in at the expense of the one that has dawdled longest, but
//! nobody is put out before [`PATIENCE`] is over, so that a large group joining at once does not put out itself.

use std::{collections::VecDeque, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{AbortHandle, JoinError, JoinSet},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    link::{
        cable::Cable,
        handshake::{self, Admissions, Joined, Refusal, Terms},
        same_user, tcp,
    },
    secret::SECRET_VARIABLE,
};

use strangers::Strangers;

mod strangers;

/// Connections in handshake at a time.
pub const UNPROVEN_MAX: usize = 64;

/// How long each of them is left in peace: a handshake takes two round trips.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// Connections that are proven and not taken yet; beyond them none is accepted. Two for each of 32 ranks.
const READY_MAX: usize = 64;

/// From a failed accept to the next: it fails for want of descriptors, and some may be closed meanwhile.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Why nothing listens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Whoever can reach the address could join.
    #[error(
        "{address} can be reached from other hosts: set {SECRET_VARIABLE} to the same text for all processes, or listen on 127.0.0.1"
    )]
    NoSecret {
        /// The address.
        address: SocketAddr,
    },
    /// None of the addresses can be had.
    #[error("none of the addresses can be listened on: {0}")]
    Taken(Tried),
}

/// What was tried, and what came of it.
#[derive(Debug, Default)]
pub struct Tried(pub Vec<(SocketAddr, io::Error)>);

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none was given");
        }
        for (i, (address, why)) in self.0.iter().enumerate() {
            write!(f, "{}{address}: {why}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// A connection whose other end is proven.
#[derive(Debug)]
pub struct Admitted {
    /// Who it is.
    pub joined: Joined,
    /// The connection, right behind the handshake.
    pub stream: TcpStream,
    /// Its other end.
    pub address: SocketAddr,
}

/// A bound address.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    terms: Arc<Terms>,
}

impl Listener {
    /// Listens on the first of `candidates` that can be had.
    ///
    /// # Errors
    /// A candidate can be reached from other hosts and there is no secret, or none can be had.
    pub async fn bind(candidates: &[SocketAddr], terms: Terms) -> Result<Self, ListenError> {
        let exposed = candidates.iter().find(|a| !same_user::is_local(**a));
        if let (None, Some(&address)) = (&terms.secret, exposed) {
            return Err(ListenError::NoSecret { address });
        }
        let mut tried = Tried::default();
        for &candidate in candidates {
            match bind_one(candidate).await {
                Ok((listener, address)) => {
                    return Ok(Self { listener, address, terms: Arc::new(terms) });
                }
                Err(why) => tried.0.push((candidate, why)),
            }
        }
        Err(ListenError::Taken(tried))
    }

    /// Listens with a socket that is bound already; in the runtime's context.
    ///
    /// # Errors
    /// As for [`Listener::bind`].
    pub fn from_std(listener: std::net::TcpListener, terms: Terms) -> Result<Self, ListenError> {
        let unusable = |address| move |why| ListenError::Taken(Tried(vec![(address, why)]));
        let unknown = SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), 0);
        let address = listener.local_addr().map_err(unusable(unknown))?;
        if terms.secret.is_none() && !same_user::is_local(address) {
            return Err(ListenError::NoSecret { address });
        }
        listener.set_nonblocking(true).map_err(unusable(address))?;
        let listener = TcpListener::from_std(listener).map_err(unusable(address))?;
        Ok(Self { listener, address, terms: Arc::new(terms) })
    }

    /// Where it listens; with the port that was given where port 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who was admitted, and may be forgotten while [`Listener::run`] goes on.
    pub fn admissions(&self) -> Admissions {
        self.terms.admissions.clone()
    }

    /// Hands proven connections to `admitted` until nobody takes them any more, one of each rank for each purpose, unless it is
    /// [forgotten](Admissions::forget).
    ///
    /// # Cancel safety
    /// Dropping the future closes the address and every connection that was not handed on.
    pub async fn run(self, admitted: mpsc::Sender<Admitted>) {
        let mut door = Door::new(self.terms);
        loop {
            let now = Instant::now();
            let room_at = door.room_at(now);
            let can_accept = room_at.is_some_and(|at| at <= now);
            tokio::select! {
                accepted = self.listener.accept(), if can_accept => match accepted {
                    Ok((stream, address)) => door.hear(stream, address),
                    Err(why) => door.accept_failed(&why).await,
                },
                Some(heard) = door.handshakes.join_next() => door.heard(heard),
                () = sleep_until(room_at.unwrap_or(now)), if room_at.is_some() && !can_accept => {}
                permit = admitted.reserve(), if !door.ready.is_empty() => {
                    let (Ok(permit), Some(ready)) = (permit, door.ready.pop_front()) else { return };
                    permit.send(ready);
                }
                () = admitted.closed() => return,
            }
        }
    }
}

async fn bind_one(candidate: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(candidate).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Who has knocked, and how far each has come.
#[derive(Debug)]
struct Door {
    terms: Arc<Terms>,
    handshakes: JoinSet<Heard>,
    /// Those in handshake, the longest first.
    knocking: VecDeque<Knocking>,
    /// Those that are proven and not taken yet.
    ready: VecDeque<Admitted>,
    strangers: Strangers,
    accept_fails: bool,
}

#[derive(Debug)]
struct Knocking {
    since: Instant,
    address: SocketAddr,
    task: AbortHandle,
}

/// What came of a handshake.
type Heard = Result<Admitted, (SocketAddr, Refusal)>;

impl Door {
    fn new(terms: Arc<Terms>) -> Self {
        Self {
            terms,
            handshakes: JoinSet::new(),
            knocking: VecDeque::new(),
            ready: VecDeque::new(),
            strangers: Strangers::default(),
            accept_fails: false,
        }
    }

    /// When one more connection can be heard, if need be in the place of one that had its time; `None`: not before a proven one is taken.
    fn room_at(&self, now: Instant) -> Option<Instant> {
        let longest = self.knocking.front().map(|k| k.since);
        match longest {
            _ if self.ready.len() >= READY_MAX => None,
            Some(since) if self.knocking.len() >= UNPROVEN_MAX => Some(since + PATIENCE),
            _ => Some(now),
        }
    }

    fn hear(&mut self, stream: TcpStream, address: SocketAddr) {
        self.accept_fails = false;
        if self.knocking.len() >= UNPROVEN_MAX
            && let Some(out) = self.knocking.pop_front()
        {
            out.task.abort();
            self.strangers.report(out.address, &Refusal::Crowded);
        }
        let terms = Arc::clone(&self.terms);
        let task = self.handshakes.spawn(async move {
            admit(stream, address, &terms).await.map_err(|refusal| (address, refusal))
        });
        self.knocking.push_back(Knocking { since: Instant::now(), address, task });
    }

    fn heard(&mut self, heard: Result<Heard, JoinError>) {
        self.knocking.retain(|k| !k.task.is_finished());
        match heard {
            Ok(Ok(admitted)) => self.ready.push_back(admitted),
            Ok(Err((address, refusal))) => self.strangers.report(address, &refusal),
            // put out, and reported then
            Err(end) if end.is_cancelled() => {}
            Err(end) => tracing::error!("a handshake's task died: {end}"),
        }
    }

    async fn accept_failed(&mut self, why: &io::Error) {
        if !std::mem::replace(&mut self.accept_fails, true) {
            tracing::warn!("connections cannot be accepted for now: {why}");
        }
        sleep(ACCEPT_AGAIN).await;
    }
}

async fn admit(stream: TcpStream, address: SocketAddr, terms: &Terms) -> Result<Admitted, Refusal> {
    tcp::set_options(&stream).map_err(Refusal::Io)?;
    let mut cable = Cable::new(stream);
    // before the greeting: one that is closed by now has not seen the challenge, and never will
    if terms.secret.is_none() {
        same_user::check(cable.stream()).await.map_err(Refusal::User)?;
    }
    let joined = handshake::admit(&mut cable, terms).await?;
    Ok(Admitted { joined, stream: cable.into_stream(), address })
}

#[cfg(test)]
mod tests;
