//! Socket options of every connection of ours.

use std::{io, net, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Idle connections are probed after 15 s, then three times, 5 s apart: a host that vanished is noticed in half a minute even
/// where no session watches.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(5))
    .with_retries(3);

/// Sent bytes that nobody acknowledges break the connection after so long; the kernel's own answer is a quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(10);

/// Sets the options of a control connection: small messages leave at once, and a vanished host is noticed.
///
/// # Errors
/// The kernel refuses an option.
pub fn set_options(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))
}

/// Hands a data connection on to plain threads: blocking, and patient with a receiver that takes nothing for a while.
///
/// The time limit for unacknowledged bytes goes, because it also counts while the receiver's window is closed, and a rank that
/// waits for its own storage leaves it closed for as long as that takes (seen on Linux 6.18: a limit of 2 s ended a connection
/// whose receiver was alive and did not read after 2.5 s). Whether the rank is alive its control link tells.
///
/// # Errors
/// The stream cannot be taken from its runtime, or the kernel refuses an option.
pub fn into_blocking(stream: TcpStream) -> io::Result<net::TcpStream> {
    let stream = stream.into_std()?;
    SockRef::from(&stream).set_tcp_user_timeout(None)?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}
