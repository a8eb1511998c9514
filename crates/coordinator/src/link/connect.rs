//! Addresses → a connection to the coordinator, which may start later than the ranks, and not on the first of them.

use std::{fmt, io, net::SocketAddr, time::Duration};

use socket2::SockRef;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    error::line,
    fence::ProcessIdentity,
    link::{
        cable::{self, Cable},
        handshake::{self, Credentials, JoinError, Mismatch},
        same_user, tcp,
    },
    secret::SECRET_VARIABLE,
};

/// How long an address may take to accept. An address of this host answers at once, one that drops packets never.
const ACCEPT_LIMIT: Duration = Duration::from_secs(2);

/// How long it may take to greet; then the next one's turn has come. A coordinator with every place taken by strangers needs half of it.
const GREETING_LIMIT: Duration = Duration::from_secs(1);

/// The pause after the first round, doubled after each.
const PAUSE_MIN: Duration = Duration::from_millis(50);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// A connection to the coordinator, or to whoever else admits.
#[derive(Debug)]
pub struct Connected {
    /// The connection, right behind the handshake.
    pub stream: TcpStream,
    /// Its other end.
    pub address: SocketAddr,
    /// Which process that is, where it could tell.
    pub process: Option<ProcessIdentity>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Whoever owns the address could pass for the coordinator.
    #[error(
        "{address} is not on this host: set {SECRET_VARIABLE} to the same text for all processes"
    )]
    NoSecret {
        /// The address.
        address: SocketAddr,
    },
    /// The coordinator does not want this rank.
    #[error("the coordinator at {address} refused this rank")]
    Refused {
        /// Its address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: Mismatch,
    },
    /// The time is over.
    #[error("no coordinator admitted this rank in time: {0}")]
    Nobody(Answers),
}

/// What each address answered last; `None`: nothing came of it before the time was over.
#[derive(Debug)]
pub struct Answers(pub Vec<(SocketAddr, Option<JoinError>)>);

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no address was given");
        }
        for (i, (address, answer)) in self.0.iter().enumerate() {
            let answer = answer.as_ref().map_or_else(|| "no answer yet".to_owned(), |a| line(a));
            write!(f, "{}{address}: {answer}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// Connects to the first of `candidates` that greets as one of ours and admits us, trying them in turn until `deadline`.
///
/// A coordinator left over from before a restart is waited out, and so is a predecessor of this rank that still counts as
/// present; any other refusal is final.
///
/// # Errors
/// We are refused, nobody admits us in time, or there is no secret and a candidate is on another host.
///
/// # Cancel safety
/// Dropping the future closes whatever is open.
pub async fn connect(
    candidates: &[SocketAddr],
    credentials: &Credentials,
    deadline: Instant,
) -> Result<Connected, ConnectError> {
    let distant = candidates.iter().find(|a| !same_user::is_local(**a));
    if let (None, Some(&address)) = (&credentials.secret, distant) {
        return Err(ConnectError::NoSecret { address });
    }
    let mut answers = Answers(candidates.iter().map(|&a| (a, None)).collect());
    let mut pause = PAUSE_MIN;
    loop {
        for (address, answer) in &mut answers.0 {
            match timeout_at(deadline, join_at(*address, credentials)).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(JoinError::Refused(source))) if source.is_final() => {
                    return Err(ConnectError::Refused { address: *address, source });
                }
                Ok(Err(why)) => *answer = Some(why),
                // what it answered before says more
                Err(_) => {}
            }
        }
        if candidates.is_empty() || Instant::now() + pause >= deadline {
            return Err(ConnectError::Nobody(answers));
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn join_at(address: SocketAddr, credentials: &Credentials) -> Result<Connected, JoinError> {
    let connecting = async {
        cable::pass().await;
        TcpStream::connect(address).await
    };
    let stream = timeout(ACCEPT_LIMIT, connecting).await.map_err(io::Error::from)??;
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(hang_up_on_myself(&stream)?.into());
    }
    tcp::set_options(&stream)?;
    let mut cable = Cable::new(stream);
    let within = credentials.within.min(GREETING_LIMIT);
    let greeting = handshake::hear_greeting(&mut cable, within).await?;
    // only now: a connection that nobody has accepted yet belongs to nobody
    if credentials.secret.is_none() {
        same_user::check(cable.stream()).await.map_err(JoinError::User)?;
    }
    let process = handshake::answer_greeting(&mut cable, credentials, greeting).await?;
    Ok(Connected { stream: cable.into_stream(), address, process })
}

/// Where nobody listens, the kernel may pick the very port as ours and connect the socket to itself. Reset rather than closed, it
/// does not keep the port from the coordinator.
fn hang_up_on_myself(stream: &TcpStream) -> io::Result<io::Error> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
    Ok(io::ErrorKind::ConnectionRefused.into())
}

#[cfg(test)]
mod tests;
