//! The ranks' own connections, from rank 0 to each of the others, and what they compute together over them.
//!
//! How they come about is the same for whatever a server has instead:
//!
//! 1. Rank 0 listens, and tells the others by [`Rank::all_gather`] on which port, and a token. Only ranks that longshore has
//!    let in hear it.
//! 2. The others connect, and prove by the token that they were told.
//! 3. [`Rank::barrier`]: all have connected, or one was lost, and nobody waits for it.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use longshore::{Place, Rank, Secret};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Failure, math::add, model::Group};

/// All ranks, seen from one of them.
#[derive(Debug)]
pub(crate) struct Ranks {
    rank: usize,
    size: usize,
    /// On rank 0 to all others, in their order; elsewhere to rank 0.
    connections: Vec<Connection>,
}

impl Ranks {
    /// Connects the ranks of a group that is loaded. Every rank calls it.
    pub(crate) fn meet(rank: &mut Rank) -> Result<Self, Failure> {
        let place = rank.place().clone();
        let (own, size) = (place.rank as usize, place.world_size as usize);
        let connections = match own {
            0 => invite(rank, &place)?,
            _ => vec![follow_invitation(rank, &place)?],
        };
        Ok(Self { rank: own, size, connections })
    }

    /// Rank 0 tells all others something.
    pub(crate) fn tell(&mut self, word: &impl Serialize) -> io::Result<()> {
        let word = serde_json::to_vec(word)?;
        self.connections.iter_mut().try_for_each(|other| other.send(&word))
    }

    /// What rank 0 tells next.
    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        Ok(serde_json::from_slice(&self.first().receive()?)?)
    }

    fn first(&mut self) -> &mut Connection {
        &mut self.connections[0]
    }
}

/// Rank 0's address as others reach it.
fn host(place: &Place) -> &str {
    if place.one_host() { "127.0.0.1" } else { &place.master }
}

/// Rank 0: has all others connect.
fn invite(rank: &mut Rank, place: &Place) -> Result<Vec<Connection>, Failure> {
    let listener = TcpListener::bind((host(place), 0))?;
    let token = Secret::random_text()?;
    let port = listener.local_addr()?.port();
    rank.all_gather(format!("{port} {token}").into_bytes())?;
    rank.barrier()?;
    // all have connected, so accepting waits for nobody
    let mut connections: Vec<Option<Connection>> = (1..place.world_size).map(|_| None).collect();
    while connections.iter().any(Option::is_none) {
        let (stream, _) = listener.accept()?;
        // a stranger is left alone
        let Ok(number) = greeting(&stream, &token) else { continue };
        if let Some(slot) = number.checked_sub(1).and_then(|i| connections.get_mut(i)) {
            *slot = Some(Connection::new(number, stream)?);
        }
    }
    Ok(connections.into_iter().flatten().collect())
}

/// The others: connect to rank 0.
fn follow_invitation(rank: &mut Rank, place: &Place) -> Result<Connection, Failure> {
    let told = rank.all_gather(Vec::new())?;
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "rank 0 did not say where it is");
    let told = std::str::from_utf8(&told[0]).ok().and_then(|text| text.split_once(' '));
    let (port, token) = told.ok_or_else(invalid)?;
    let port: u16 = port.parse().map_err(|_| invalid())?;
    let stream = TcpStream::connect((host(place), port)).map_err(|e| named(0, e))?;
    (&stream).write_all(&[&place.rank.to_le_bytes()[..], token.as_bytes()].concat())?;
    rank.barrier()?;
    Ok(Connection::new(0, stream)?)
}

/// Which rank has connected; an error for whoever does not know the token.
fn greeting(mut stream: &TcpStream, token: &str) -> io::Result<usize> {
    // a stranger that says nothing
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut number = [0; 4];
    stream.read_exact(&mut number)?;
    let mut said = vec![0; token.len()];
    stream.read_exact(&mut said)?;
    stream.set_read_timeout(None)?;
    match said == token.as_bytes() {
        true => Ok(u32::from_le_bytes(number) as usize),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// A connection to another rank: frames of a length (`u32`) and so many bytes. Its errors name the rank.
#[derive(Debug)]
struct Connection {
    to: usize,
    stream: TcpStream,
}

impl Connection {
    fn new(to: usize, stream: TcpStream) -> io::Result<Self> {
        // a step is many small messages, each of which is waited for
        stream.set_nodelay(true)?;
        Ok(Self { to, stream })
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = (bytes.len() as u32).to_le_bytes();
        let sent = self.stream.write_all(&[&length, bytes].concat());
        sent.map_err(|e| named(self.to, e))
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut read = || {
            let mut length = [0; 4];
            self.stream.read_exact(&mut length)?;
            let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
            self.stream.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|e| named(self.to, e))
    }

    fn send_numbers(&mut self, numbers: &[f32]) -> io::Result<()> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.send(&bytes)
    }

    fn receive_numbers(&mut self) -> io::Result<Vec<f32>> {
        let bytes = self.receive()?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
    }
}

fn named(rank: usize, e: io::Error) -> io::Error {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    let what = match e.kind() {
        UnexpectedEof | ConnectionReset | BrokenPipe => "it is gone".to_owned(),
        _ => e.to_string(),
    };
    io::Error::new(e.kind(), format!("rank {rank}: {what}"))
}

/// Rank 0 does the sums, always in the order of ranks: the same to the bit every time, and everywhere.
impl Group for Ranks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&mut self, x: &mut [f32]) -> io::Result<()> {
        if self.rank > 0 {
            self.first().send_numbers(x)?;
            x.copy_from_slice(&self.first().receive_numbers()?);
            return Ok(());
        }
        for other in &mut self.connections {
            add(x, &other.receive_numbers()?);
        }
        self.connections.iter_mut().try_for_each(|other| other.send_numbers(x))
    }

    fn all_gather(&mut self, part: &[f32]) -> io::Result<Vec<f32>> {
        if self.rank > 0 {
            self.first().send_numbers(part)?;
            return self.first().receive_numbers();
        }
        let mut all = part.to_vec();
        for other in &mut self.connections {
            all.extend(other.receive_numbers()?);
        }
        self.connections.iter_mut().try_for_each(|other| other.send_numbers(&all))?;
        Ok(all)
    }
}

/// A group of one.
#[derive(Debug)]
pub(crate) struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&mut self, _: &mut [f32]) -> io::Result<()> {
        Ok(())
    }

    fn all_gather(&mut self, part: &[f32]) -> io::Result<Vec<f32>> {
        Ok(part.to_vec())
    }
}
