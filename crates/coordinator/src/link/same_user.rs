//! Who owns the other end of a connection within this host.
//!
//! Without a secret this is all that keeps other users of the host away. The kernel lists every TCP socket of the network
//! namespace with the user that made it; a connection's other end is the line with its two addresses exchanged. A
//! socket that its process has closed is listed as root's, so only established ones count.
//!
//! **Source:** `Documentation/networking/proc_net_tcp.rst` of Linux; `sock_i_uid` for what becomes of closed ones.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{net::TcpStream, task::spawn_blocking, time::sleep};

/// The kernel's tables of sockets. An IPv4 connection may be in either.
const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];

/// A table is no snapshot: a line can be missed while others come and go.
const LOOKS: u32 = 3;

/// From one look to the next.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// The state of a socket whose two ends are both open.
const ESTABLISHED: &str = "01";

/// Why the other end is not taken for one of the same user.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SameUserError {
    /// It is someone else's.
    #[error("the connection's other end {address} belongs to user {theirs}, this is user {ours}")]
    Other {
        /// Its address.
        address: SocketAddr,
        /// Its user.
        theirs: u32,
        /// This process's user.
        ours: u32,
    },
    /// The kernel does not list it: it has been closed, or is not on this host.
    #[error("the connection's other end {address} is not among this host's open sockets")]
    Unknown {
        /// Its address.
        address: SocketAddr,
    },
    /// The kernel's list cannot be read, or the connection's addresses cannot.
    #[error("the sockets of this host cannot be looked up")]
    Io(#[from] io::Error),
}

/// Whether connections to and from `address` stay within this host.
pub fn is_local(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// Makes sure that the other end of `stream` belongs to the user of this process.
///
/// # Errors
/// It belongs to another, or to nobody that can be seen from here.
pub async fn check(stream: &TcpStream) -> Result<(), SameUserError> {
    check_for(stream, current_user()).await
}

/// The user that this process acts as.
pub(crate) fn current_user() -> u32 {
    // SAFETY: geteuid takes nothing, touches no memory of ours and cannot fail
    unsafe { libc::geteuid() }
}

pub(crate) async fn check_for(stream: &TcpStream, ours: u32) -> Result<(), SameUserError> {
    let (address, here) = (stream.peer_addr()?, stream.local_addr()?);
    for look in 0..LOOKS {
        if look > 0 {
            sleep(BETWEEN_LOOKS).await;
        }
        let owner =
            spawn_blocking(move || owner(address, here)).await.map_err(io::Error::other)??;
        match owner {
            Some(theirs) if theirs == ours => return Ok(()),
            Some(theirs) => return Err(SameUserError::Other { address, theirs, ours }),
            None => {}
        }
    }
    Err(SameUserError::Unknown { address })
}

/// The user of the established socket that is bound to `local` and connected to `remote`.
fn owner(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
    for table in TABLES {
        let table = match File::open(table) {
            // a kernel without IPv6
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            table => BufReader::new(table?),
        };
        for line in table.lines().skip(1) {
            if let Some(user) = user_of(&line?, local, remote) {
                return Ok(Some(user));
            }
        }
    }
    Ok(None)
}

/// The user in `line` of a table, if it is the line looked for.
fn user_of(line: &str, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    // slot, local address, remote address, state, queues, timer, retransmits, user
    let mut fields = line.split_ascii_whitespace().skip(1);
    let is = |field: &str, wanted: SocketAddr| {
        parse_address(field) == Some(SocketAddr::new(wanted.ip().to_canonical(), wanted.port()))
    };
    if !is(fields.next()?, local) || !is(fields.next()?, remote) || fields.next()? != ESTABLISHED {
        return None;
    }
    fields.nth(3)?.parse().ok()
}

/// `0100007F:1F90` → 127.0.0.1:8080: words of the address as the processor sees them, the port as a number.
fn parse_address(field: &str) -> Option<SocketAddr> {
    let (address, port) = field.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut octets = [0; 16];
    let words = octets.chunks_exact_mut(4).zip(address.as_bytes().chunks(8));
    for (word, digits) in words {
        let digits = std::str::from_utf8(digits).ok()?;
        word.copy_from_slice(&u32::from_str_radix(digits, 16).ok()?.to_ne_bytes());
    }
    let ip: IpAddr = match (address.len(), octets) {
        (8, [a, b, c, d, ..]) => Ipv4Addr::new(a, b, c, d).into(),
        (32, octets) => Ipv6Addr::from(octets).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Addresses in the tables are in the byte order of the processor, and so are these lines.
    #[cfg(target_endian = "little")]
    #[test]
    fn the_line_with_both_addresses_names_the_user() {
        let line = "   1: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 41 1 0 20";
        let (local, remote) =
            ("127.0.0.1:40000".parse().unwrap(), "127.0.0.1:8080".parse().unwrap());
        assert_eq!(user_of(line, local, remote), Some(1000));
        assert_eq!(user_of(line, remote, local), None);
        let mapped = "[::ffff:127.0.0.1]:40000".parse().unwrap();
        assert_eq!(user_of(line, mapped, remote), Some(1000));

        // one that its process has closed is listed as root's
        let orphan = line.replace(" 01 ", " 04 ").replace("1000", "   0");
        assert_eq!(user_of(&orphan, local, remote), None);

        let six = "   2: 0000000000000000FFFF00000100007F:9C40 0000000000000000FFFF00000100007F:1F90 01 0:0 0:0 0  1001 0 41";
        assert_eq!(user_of(six, local, remote), Some(1001));
        let six = "   2: 00000000000000000000000001000000:9C40 00000000000000000000000001000000:1F90 01 0:0 0:0 0  1002 0 41";
        let (local, remote) = ("[::1]:40000".parse().unwrap(), "[::1]:8080".parse().unwrap());
        assert_eq!(user_of(six, local, remote), Some(1002));
    }

    #[test]
    fn a_line_that_is_none_names_nobody() {
        let any = "127.0.0.1:1".parse().unwrap();
        for line in
            ["", "1:", "1: 0100007F:0001 0100007F:0001", "1: é:1 é:1 01 0 0 0 1", "1: 0:1 0:1 01"]
        {
            assert_eq!(user_of(line, any, any), None);
        }
    }

    #[tokio::test]
    async fn both_ends_of_a_local_connection_are_of_this_user() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // a host may have no IPv6
            let Ok(listener) = TcpListener::bind(address).await else { continue };
            let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (server, _) = listener.accept().await.unwrap();
            check(&client).await.unwrap();
            check(&server).await.unwrap();

            let someone = current_user() + 1;
            let found = check_for(&server, someone).await;
            assert!(matches!(found, Err(SameUserError::Other { ours, .. }) if ours == someone));
        }
    }

    #[tokio::test]
    async fn a_closed_end_is_nobodys() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        drop(client);
        assert!(matches!(check(&server).await, Err(SameUserError::Unknown { .. })));
    }
}
