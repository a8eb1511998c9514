//! A session on an operating-system thread of its own, so that heartbeats go on while everything else is stuck.
//!
//! A rank whose runtime is starved by readers, or blocked in a driver's call, is slow but alive, and must not be taken for
//! dead. Its counters are atomics that the heartbeat reads without asking anyone.

use std::{future::Future, io, pin::pin, thread};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::TcpStream,
    runtime,
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::timeout,
};

use crate::link::{
    cable::Cable,
    session::{self, Beat, Ended, LinkError, OUTGOING_MAX, Overrun, Timing},
};

/// Messages that may wait for the application. As many as may wait to be sent: whoever lets more pile up than a whole load
/// has is not coming back for them.
pub const INCOMING_MAX: usize = OUTGOING_MAX;

/// The application's end of a session that runs elsewhere. Dropping it sends what is queued, says goodbye and ends the
/// session, at the latest after the timing's `silent_after`; only [`LinkThread::end`] waits for it.
#[derive(Debug)]
pub struct LinkThread<Out> {
    outgoing: mpsc::Sender<Out>,
    ended: oneshot::Receiver<Result<Ended, LinkError>>,
    /// Its drop is what the thread waits for.
    _alive: oneshot::Sender<()>,
}

/// The session has ended; [`LinkThread::end`] says how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the link has ended")]
pub struct Gone;

/// Starts the session of `stream`, whose handshake is done. Messages come out of the receiver, `None` once the session has ended.
///
/// # Errors
/// The thread, its runtime or the stream's registration with it failed.
pub fn spawn<Out, In>(
    stream: TcpStream,
    beat: impl Fn() -> Beat + Send + 'static,
    timing: Timing,
) -> io::Result<(LinkThread<Out>, mpsc::Receiver<In>)>
where
    Out: Serialize + Send + 'static,
    In: DeserializeOwned + Send + 'static,
{
    // the stream is registered with the runtime that made it, and that one may be the one to get stuck
    let stream = stream.into_std()?;
    let runtime = runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let stream = {
        let _context = runtime.enter();
        TcpStream::from_std(stream)?
    };

    let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
    let (taker, incoming) = mpsc::channel(INCOMING_MAX);
    let (tell, ended) = oneshot::channel();
    let (alive, dropped) = oneshot::channel::<()>();
    let open = taker.clone();
    thread::Builder::new().name("longshore-link".to_owned()).spawn(move || {
        let take = move |message| match taker.try_send(message) {
            Err(TrySendError::Full(_)) => Err(Overrun { waiting: INCOMING_MAX }),
            // nobody listens any more, which does not keep anyone from speaking
            Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
        };
        let session = session::run(Cable::new(stream), queue, take, beat, |_| {}, timing);
        let end = runtime.block_on(until_dropped(session, dropped, timing));
        // nobody may want to know
        let _ = tell.send(end);
        // last, so that whoever hears of the end by it finds that nothing can be sent either
        drop(open);
    })?;
    Ok((LinkThread { outgoing, ended, _alive: alive }, incoming))
}

/// Runs `session`, and not for long once its handle is dropped: a last write may never be taken.
async fn until_dropped(
    session: impl Future<Output = Result<Ended, LinkError>>,
    dropped: oneshot::Receiver<()>,
    timing: Timing,
) -> Result<Ended, LinkError> {
    let mut session = pin!(session);
    tokio::select! {
        ended = &mut session => return ended,
        _ = dropped => {}
    }
    let after = timing.silent_after;
    timeout(after, session).await.unwrap_or(Err(LinkError::Unanswered { after }))
}

impl<Out> LinkThread<Out> {
    /// Queues a message, once there is room.
    ///
    /// # Errors
    /// The session has ended.
    ///
    /// # Cancel safety
    /// A message whose future is dropped is not sent.
    pub async fn send(&self, message: Out) -> Result<(), Gone> {
        self.outgoing.send(message).await.map_err(|_| Gone)
    }

    /// [`LinkThread::send`] for threads outside of any runtime.
    ///
    /// # Errors
    /// The session has ended.
    ///
    /// # Panics
    /// When called within a runtime.
    pub fn blocking_send(&self, message: Out) -> Result<(), Gone> {
        self.outgoing.blocking_send(message).map_err(|_| Gone)
    }

    /// Sends what is queued, says goodbye, and waits for the end; or tells how the session had ended before.
    ///
    /// # Errors
    /// The session failed.
    pub async fn end(self) -> Result<Ended, LinkError> {
        let Self { outgoing, ended, _alive: alive } = self;
        drop((outgoing, alive));
        ended.await.unwrap_or(Err(LinkError::Panicked))
    }
}

#[cfg(test)]
mod tests;
