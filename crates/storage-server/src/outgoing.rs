//! The body of a response: bytes of an object or of a text, sent as the actions of rules have it.

use std::fs::File;
use std::future::{Future, pending};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, sleep_until};

use crate::connection::{Connection, PIECE_BYTES_MAX};
use crate::content::Body;
use crate::fault::Action;
use crate::log::Entry;

/// The most bytes that are read at once, where they have to be.
const CHUNK_BYTES: u64 = 256 << 10;

/// What happens at a position of the body.
#[derive(Debug)]
enum Step {
    Stall(Option<Duration>),
    Reset,
    Truncate,
}

/// The body of a response.
pub(crate) struct Outgoing {
    source: Body,
    /// What is left of the source.
    range: Range<u64>,
    sent: u64,
    /// What happens where, the next one last.
    steps: Vec<(u64, Step)>,
    /// The positions of wrong bytes.
    corrupt: Vec<u64>,
    trickle: Option<(u64, u64, Duration)>,
    bytes_per_second: Option<u64>,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
    /// What ends the body once the waiting is over.
    ending: Option<Ending>,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    connection: Arc<Connection>,
    entry: Entry,
}

#[derive(Clone, Copy)]
enum Ending {
    Reset,
    Truncate,
}

impl Outgoing {
    pub(crate) fn new(
        source: Body,
        range: Range<u64>,
        actions: &[Action],
        connection: &Arc<Connection>,
        entry: Entry,
    ) -> Self {
        let mut body = Self {
            source,
            sent: 0,
            steps: Vec::new(),
            corrupt: Vec::new(),
            trickle: None,
            bytes_per_second: None,
            waiting: None,
            ending: None,
            reading: None,
            connection: Arc::clone(connection),
            entry,
            range: range.clone(),
        };
        for action in actions {
            match *action {
                Action::Stall { at: Some(at), duration } => {
                    body.steps.push((at.resolve(&range), Step::Stall(duration)));
                }
                Action::Reset { at: Some(at) } => {
                    body.steps.push((at.resolve(&range), Step::Reset));
                }
                Action::Truncate { at } => body.steps.push((at.resolve(&range), Step::Truncate)),
                Action::Corrupt { at } => body.corrupt.push(at.resolve(&range)),
                Action::Trickle { at, bytes, interval } => {
                    body.trickle = Some((at.resolve(&range), bytes.max(1), interval));
                }
                Action::Bandwidth(rate) => {
                    let slowest = body.bytes_per_second.map_or(rate, |other| other.min(rate));
                    body.bytes_per_second = Some(slowest);
                }
                _ => {}
            }
        }
        body.steps.sort_by_key(|(position, _)| std::cmp::Reverse(*position));
        body
    }

    fn wait(&mut self, future: impl Future<Output = ()> + Send + Sync + 'static) {
        self.waiting = Some(Box::pin(future));
    }

    /// Begins what happens at the current position.
    fn begin(&mut self, step: Step) {
        match step {
            Step::Stall(Some(duration)) => self.wait(sleep(duration)),
            Step::Stall(None) => self.wait(pending()),
            Step::Reset => {
                self.ending = Some(Ending::Reset);
                self.wait(Arc::clone(&self.connection).delivered());
            }
            Step::Truncate => {
                self.ending = Some(Ending::Truncate);
                self.wait(Arc::clone(&self.connection).delivered());
            }
        }
    }

    /// How many bytes are sent next.
    fn chunk_bytes(&self) -> u64 {
        let mut bytes = PIECE_BYTES_MAX.min(self.range.end - self.range.start);
        if let Some((position, _)) = self.steps.last() {
            bytes = bytes.min(position - self.sent);
        }
        match self.trickle {
            Some((from, ..)) if self.sent < from => bytes = bytes.min(from - self.sent),
            Some((_, at_once, _)) => bytes = bytes.min(at_once),
            None => {}
        }
        // 10 ms of the bandwidth, but not less than a packet
        self.bytes_per_second.map_or(bytes, |rate| bytes.min((rate / 100).max(1460)))
    }

    /// The next bytes, counted and made wrong where they are to be.
    fn send(&mut self, bytes: Bytes) -> Bytes {
        let length = bytes.len() as u64;
        let mut bytes = bytes;
        for &position in &self.corrupt {
            if (self.sent..self.sent + length).contains(&position) {
                let mut wrong = bytes.to_vec();
                wrong[(position - self.sent) as usize] ^= 0x10;
                bytes = wrong.into();
            }
        }
        self.range.start += length;
        self.entry.sent(length);
        if let Some(rate) = self.bytes_per_second {
            let until = self.connection.paced(length, rate);
            self.wait(sleep_until(until));
        }
        if let Some((from, _, interval)) = self.trickle
            && self.sent >= from
        {
            self.wait(sleep(interval));
        }
        self.sent += length;
        bytes
    }
}

impl HttpBody for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        loop {
            if let Some(waiting) = &mut this.waiting {
                ready!(waiting.as_mut().poll(context));
                this.waiting = None;
            }
            match this.ending {
                Some(Ending::Reset) => {
                    this.connection.reset_when_closed();
                    return Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into())));
                }
                Some(Ending::Truncate) => {
                    return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
                }
                None => {}
            }
            if let Some(reading) = &mut this.reading {
                let bytes = ready!(Pin::new(reading).poll(context)).map_err(io::Error::other)??;
                this.reading = None;
                let bytes = this.send(bytes);
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if let Some((_, step)) = this.steps.pop_if(|(position, _)| *position == this.sent) {
                this.begin(step);
                continue;
            }
            let (start, length) = (this.range.start, this.chunk_bytes());
            if length == 0 {
                return Poll::Ready(None);
            }
            let bytes = match &this.source {
                Body::Memory(bytes) => bytes.slice(start as usize..(start + length) as usize),
                Body::File(file) if this.corrupt.is_empty() && is_cached(file, start, length)? => {
                    this.connection.piece(file, start, length)
                }
                Body::File(file) => {
                    let (file, length) = (Arc::clone(file), length.min(CHUNK_BYTES));
                    this.reading = Some(spawn_blocking(move || read(&file, start, length)));
                    continue;
                }
            };
            let bytes = this.send(bytes);
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.range.is_empty() && self.steps.is_empty() && self.ending.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.range.end - self.range.start)
    }
}

/// Whether the first and the last of these bytes are in the page cache, so that sending them is not likely to wait for
/// a disk. File systems that cannot tell have nothing to wait for.
fn is_cached(file: &File, offset: u64, length: u64) -> io::Result<bool> {
    Ok(is_byte_cached(file, offset)? && is_byte_cached(file, offset + length - 1)?)
}

fn is_byte_cached(file: &File, offset: u64) -> io::Result<bool> {
    let mut byte = 0u8;
    let vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the vector is that of `byte`, which lives until after the call
    let count = unsafe { libc::preadv2(file.as_raw_fd(), &vector, 1, offset, libc::RWF_NOWAIT) };
    if count >= 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Ok(false),
        Some(libc::EOPNOTSUPP) => Ok(true),
        _ => Err(error),
    }
}

/// Reads at least one byte.
fn read(file: &File, offset: u64, length: u64) -> io::Result<Bytes> {
    let mut bytes = vec![0; length as usize];
    let count = file.read_at(&mut bytes, offset)?;
    if count == 0 {
        // the file has become shorter: what was promised cannot be sent
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(count);
    Ok(bytes.into())
}
