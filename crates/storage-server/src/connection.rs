//! A connection: what of its socket the bodies of its responses need.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::log::Log;

/// What stands in, among the bytes that hyper hands to the socket, for pieces of files that go from the page cache to
/// the socket without being read: its address tells, its content is never sent. It is what lets a benchmark share a
/// machine with the server: 0.07 CPU seconds per GB instead of 0.28 with reads of 256 KiB.
static STAND_IN: [u8; PIECE_BYTES_MAX as usize] = [0; PIECE_BYTES_MAX as usize];

/// The most bytes of a file that are sent at once.
pub(crate) const PIECE_BYTES_MAX: u64 = 1 << 20;

/// A piece of a file.
#[derive(Debug)]
struct Piece {
    file: Arc<File>,
    offset: u64,
    length: usize,
}

fn is_stand_in(bytes: &[u8]) -> bool {
    STAND_IN.as_ptr_range().contains(&bytes.as_ptr()) && !bytes.is_empty()
}

/// What a connection and its responses share.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) number: u64,
    log: Arc<Log>,
    socket: RawFd,
    /// How often everything that was written had been handed to the kernel.
    flushes: AtomicU64,
    /// Whether the socket is gone, or is about to be: its descriptor may be another one's.
    closed: AtomicBool,
    reset: AtomicBool,
    /// Pieces of files, in the order of their stand-ins among the bytes that are to be written.
    pieces: Mutex<VecDeque<Piece>>,
    /// Until when what was sent takes, at the bandwidth that the connection is given.
    busy_until: Mutex<Option<Instant>>,
}

impl Connection {
    /// The state of a socket, and the socket as hyper is to see it.
    pub(crate) fn new(stream: TcpStream, log: &Arc<Log>) -> (Arc<Self>, Socket) {
        let connection = Arc::new(Self {
            number: log.connected(),
            log: Arc::clone(log),
            socket: stream.as_raw_fd(),
            flushes: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            pieces: Mutex::default(),
            busy_until: Mutex::new(None),
        });
        (Arc::clone(&connection), Socket { stream, connection })
    }

    /// Closes with RST instead of FIN when the socket is dropped.
    pub(crate) fn reset_when_closed(&self) {
        self.reset.store(true, SeqCst);
    }

    /// Returns once the other side's kernel has everything that was to be sent before the call, or after 10 seconds.
    pub(crate) async fn delivered(self: Arc<Self>) {
        let flushes = self.flushes.load(SeqCst);
        for _ in 0..10_000 {
            sleep(Duration::from_millis(1)).await;
            if self.flushes.load(SeqCst) > flushes && self.unacknowledged_bytes() == 0 {
                return;
            }
        }
    }

    /// What the other side's kernel has not acknowledged.
    fn unacknowledged_bytes(&self) -> libc::c_int {
        let mut bytes = 0;
        if !self.closed.load(SeqCst) {
            // SAFETY: the descriptor is open: `closed` is set before the socket is dropped, by the task that is here
            unsafe { libc::ioctl(self.socket, libc::TIOCOUTQ, &mut bytes) };
        }
        bytes
    }

    /// What stands in for a piece of a file; it has to be written next to everything that was to be written before.
    pub(crate) fn piece(&self, file: &Arc<File>, offset: u64, length: u64) -> Bytes {
        let length = length as usize;
        let piece = Piece { file: Arc::clone(file), offset, length };
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner).push_back(piece);
        Bytes::from_static(&STAND_IN[..length])
    }

    /// Sends bytes of the piece that is next.
    fn send_piece(&self) -> io::Result<usize> {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = pieces.front_mut().ok_or(io::ErrorKind::InvalidData)?;
        let mut offset = libc::off_t::try_from(piece.offset).map_err(io::Error::other)?;
        let file = piece.file.as_raw_fd();
        // SAFETY: both descriptors are open: the piece has the file, the caller the socket; `offset` outlives the call
        let sent = unsafe { libc::sendfile(self.socket, file, &mut offset, piece.length) };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        if sent == 0 {
            // the file has become shorter: what was promised cannot be sent
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        piece.offset += sent as u64;
        piece.length -= sent;
        if piece.length == 0 {
            pieces.pop_front();
        }
        Ok(sent)
    }

    /// When the connection may send again, if it sends so many bytes at so many per second now.
    pub(crate) fn paced(&self, bytes: u64, bytes_per_second: u64) -> Instant {
        let mut busy_until = self.busy_until.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let takes = Duration::from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64);
        // what was not used in 20 ms is lost
        let from = busy_until.unwrap_or(now).max(now - Duration::from_millis(20));
        *busy_until.insert(from + takes)
    }
}

/// The socket of a connection.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
}

impl Socket {
    fn poll_send_piece(&self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(context))?;
            let sent = self.stream.try_io(Interest::WRITABLE, || self.connection.send_piece());
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if is_stand_in(bytes) {
            return self.poll_send_piece(context);
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match buffers.iter().position(|buffer| is_stand_in(buffer)) {
            Some(0) => self.poll_send_piece(context),
            Some(end) => Pin::new(&mut self.stream).poll_write_vectored(context, &buffers[..end]),
            None => Pin::new(&mut self.stream).poll_write_vectored(context, buffers),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Called once everything that was to be written has been.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.flushes.fetch_add(1, SeqCst);
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.connection.closed.store(true, SeqCst);
        if self.connection.reset.load(SeqCst) {
            let _ = self.stream.set_zero_linger();
        }
        self.connection.log.disconnected();
    }
}
