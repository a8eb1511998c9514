//! A proven stream → messages both ways until it ends, and why it did.
//!
//! Reading and writing go on side by side: a write that blocks hides no silence, and a flood that comes in delays no
//! heartbeat. What a session knows of the other side is when its last byte came, so a long message on a slow line is
//! life too. That a process lives does not mean that it gets on: the heartbeat's counters tell that, to whoever supervises.
//!
//! A goodbye is the last thing said. Whoever sent one then listens until the other side closes: closing first, with bytes
//! unread, would make the kernel drop what is still under way to the other side.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, split},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};
use tokio_util::codec::{FramedRead, FramedWrite};

use crate::link::{
    frame::{FRAME_MAX, FrameCodec, FrameError},
    handshake::is_close,
    wire::{self, WireError},
};

/// Messages that may wait to be sent. Counted rather than weighed: a load has a handful per rank, of which only the plan
/// is large, and that one is sent once.
pub const OUTGOING_MAX: usize = 64;

/// How a rank is getting on, sent with every heartbeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// Grows with whatever gets done; a rank that does not wait and whose number stands still is stuck.
    pub progress: u64,
    /// Bytes read, from storage or from what its host has kept of it.
    pub read_bytes: u64,
    /// Those of them that were kept.
    pub cached_bytes: u64,
    /// Bytes received from other ranks.
    pub received_bytes: u64,
    /// Bytes sent to other ranks.
    pub sent_bytes: u64,
    /// What it is doing, in the numbering of whoever sends it.
    pub phase: u8,
    /// Whether it waits for someone else.
    pub waiting: bool,
}

/// When to be heard, and when to give the other side up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// From one heartbeat to the next.
    pub beat_every: Duration,
    /// Nothing at all for so long: the other side hangs, or its host is gone.
    pub silent_after: Duration,
}

impl Default for Timing {
    /// Two beats a second; ten missed ones are not load but a hang.
    fn default() -> Self {
        Self { beat_every: Duration::from_millis(500), silent_after: Duration::from_secs(5) }
    }
}

/// How a session ended as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// This side had nothing more to say; everything queued was sent, and the other side closed after it.
    ByeSent,
    /// The other side had nothing more to say; all it said was delivered before. What this side had queued is not sent.
    ByeReceived,
}

/// How a session ended otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The other side's process is gone.
    #[error("the connection was {}", if *.reset { "reset" } else { "closed without a goodbye" })]
    Closed {
        /// Whether it broke, rather than ended.
        reset: bool,
    },
    /// The other side is there and says nothing, or its host is gone.
    #[error("nothing was heard for {after:?}")]
    Silent {
        /// How long.
        after: Duration,
    },
    /// The other side neither took the goodbye nor closed.
    #[error("the connection was not closed within {after:?} of the goodbye")]
    Unanswered {
        /// How long it was given.
        after: Duration,
    },
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// A frame is too long, in either direction.
    #[error("a message does not fit the link")]
    Frame(#[source] FrameError),
    /// A message cannot be understood, or not be encoded.
    #[error("a message cannot be put on the link or taken from it")]
    Wire(#[source] WireError),
    /// Messages came and nobody took them.
    #[error("{waiting} messages wait for the application, which takes none")]
    Overrun {
        /// How many.
        waiting: usize,
    },
    /// The thread of the session ended without a result.
    #[error("the link's thread panicked")]
    Panicked,
}

/// The application has no room for another message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overrun {
    /// How many wait.
    pub waiting: usize,
}

/// What a frame of a session holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Packet<M> {
    /// A message.
    Message(M),
    /// A heartbeat.
    Beat(Beat),
    /// Nothing more will come.
    Bye,
}

/// Sends what comes out of `outgoing` and a heartbeat from time to time, hands what arrives to `incoming` and `on_beat`,
/// until one side says goodbye (this one as soon as `outgoing` is closed and empty) or the link fails.
///
/// `incoming` and `on_beat` must not block; an `incoming` without room ends the session.
///
/// # Errors
/// The connection was closed, broke or fell silent; a message was too long or not to be understood; nobody took the messages.
///
/// # Cancel safety
/// Dropping the future drops the stream; the other side sees it closed.
pub async fn run<S, Out, In>(
    stream: S,
    outgoing: mpsc::Receiver<Out>,
    incoming: impl FnMut(In) -> Result<(), Overrun>,
    beat: impl Fn() -> Beat,
    on_beat: impl FnMut(Beat),
    timing: Timing,
) -> Result<Ended, LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    Out: Serialize,
    In: DeserializeOwned,
{
    let (reader, writer) = split(stream);
    let reading = read_all(Heard::new(reader), incoming, on_beat, timing.silent_after);
    let writing = write_all(writer, outgoing, beat, timing.beat_every);
    conclude(reading, writing, timing.silent_after).await
}

/// Runs both halves, and says how the whole ended.
async fn conclude(
    reading: impl Future<Output = Result<(), LinkError>>,
    writing: impl Future<Output = Result<(), LinkError>>,
    patience: Duration,
) -> Result<Ended, LinkError> {
    tokio::pin!(reading);
    let wrote = tokio::select! {
        // what was heard counts first; in order, as everything here, so that a simulation repeats
        biased;
        read = &mut reading => return read.map(|()| Ended::ByeReceived),
        wrote = writing => wrote,
    };
    let rest = timeout(patience, reading).await;
    match (wrote, rest) {
        (Ok(()), Ok(Ok(()) | Err(LinkError::Closed { reset: false }))) => Ok(Ended::ByeSent),
        (Ok(()), Ok(Err(other))) => Err(other),
        (Ok(()), Err(_)) => Err(LinkError::Unanswered { after: patience }),
        // a stream that takes nothing more may still hold the goodbye of the one that closed it
        (Err(_), Ok(Ok(()))) => Ok(Ended::ByeReceived),
        (Err(cause), _) => Err(cause),
    }
}

/// Reads until the other side's goodbye.
async fn read_all<R, In>(
    reader: Heard<R>,
    mut incoming: impl FnMut(In) -> Result<(), Overrun>,
    mut on_beat: impl FnMut(Beat),
    silent_after: Duration,
) -> Result<(), LinkError>
where
    R: AsyncRead + Unpin,
    In: DeserializeOwned,
{
    let mut frames = FramedRead::new(reader, FrameCodec::new(FRAME_MAX));
    loop {
        let frame = next_frame(&mut frames, silent_after).await?;
        match wire::decode(&frame).map_err(LinkError::Wire)? {
            Packet::Message(message) => {
                incoming(message).map_err(|Overrun { waiting }| LinkError::Overrun { waiting })?
            }
            Packet::Beat(beat) => on_beat(beat),
            Packet::Bye => return Ok(()),
        }
    }
}

async fn next_frame<R: AsyncRead + Unpin>(
    frames: &mut FramedRead<Heard<R>, FrameCodec>,
    silent_after: Duration,
) -> Result<Bytes, LinkError> {
    loop {
        let given_up = frames.get_ref().at + silent_after;
        match timeout_at(given_up, frames.next()).await {
            Ok(Some(frame)) => return frame.map_err(broken),
            Ok(None) => return Err(LinkError::Closed { reset: false }),
            // part of a frame came meanwhile
            Err(_) if frames.get_ref().at + silent_after > given_up => {}
            Err(_) => return Err(LinkError::Silent { after: silent_after }),
        }
    }
}

/// Writes until the application has nothing more to say, then says goodbye.
async fn write_all<W, Out>(
    writer: W,
    mut outgoing: mpsc::Receiver<Out>,
    beat: impl Fn() -> Beat,
    beat_every: Duration,
) -> Result<(), LinkError>
where
    W: AsyncWrite + Unpin,
    Out: Serialize,
{
    let mut frames = FramedWrite::new(writer, FrameCodec::new(FRAME_MAX));
    let mut beats = interval(beat_every);
    // beats that a blocked write held up are worth no more than the next one
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let packet = tokio::select! {
            // a message is a sign of life as well
            biased;
            message = outgoing.recv() => message.map_or(Packet::Bye, Packet::Message),
            _ = beats.tick() => Packet::Beat(beat()),
        };
        let bye = matches!(packet, Packet::Bye);
        let frame = wire::encode(&packet).map_err(LinkError::Wire)?;
        frames.send(frame).await.map_err(broken)?;
        if bye {
            return frames.close().await.map_err(broken);
        }
    }
}

fn broken(error: FrameError) -> LinkError {
    match error {
        FrameError::Io(e) if is_close(&e) => LinkError::Closed { reset: true },
        FrameError::Io(e) => LinkError::Io(e),
        FrameError::Cut { .. } => LinkError::Closed { reset: false },
        oversize @ FrameError::Oversize { .. } => LinkError::Frame(oversize),
    }
}

/// A reader that remembers when its last byte came.
#[derive(Debug)]
struct Heard<R> {
    reader: R,
    at: Instant,
}

impl<R> Heard<R> {
    fn new(reader: R) -> Self {
        Self { reader, at: Instant::now() }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Heard<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.reader).poll_read(context, buffer));
        if buffer.filled().len() > before {
            self.at = Instant::now();
        }
        Poll::Ready(read)
    }
}

#[cfg(test)]
mod tests;
