//! A stream that neither gives nor takes anything, and is never closed, once this process is cut off from the other ranks
//! ([`longshore_rank::cut`]): as with a pulled cable, the other side hears nothing, not even that nobody is there.

use std::{
    future::pending,
    io,
    mem::forget,
    pin::Pin,
    task::{Context, Poll, ready},
};

use longshore_rank::cut::network_is_cut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream to another process.
#[derive(Debug)]
pub(crate) struct Cable<S>(Option<S>);

/// Goes on unless this process is cut off: then nothing that is begun ends by itself.
pub(crate) async fn pass() {
    if network_is_cut() {
        pending::<()>().await;
    }
}

impl<S: Unpin> Cable<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self(Some(stream))
    }

    pub(crate) fn stream(&self) -> &S {
        self.0.as_ref().expect("the stream is only taken by what consumes or drops this")
    }

    pub(crate) fn into_stream(mut self) -> S {
        self.0.take().expect("the stream is only taken by what consumes or drops this")
    }

    /// The stream, unless the process is cut off: then whoever waits for more is left waiting.
    fn whole(&mut self) -> Poll<Pin<&mut S>> {
        match &mut self.0 {
            Some(stream) if !network_is_cut() => Poll::Ready(Pin::new(stream)),
            _ => Poll::Pending,
        }
    }
}

impl<S> Drop for Cable<S> {
    fn drop(&mut self) {
        if network_is_cut() {
            // closing it would be heard
            forget(self.0.take());
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Cable<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.whole()).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cable<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.whole()).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.whole()).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.whole()).poll_shutdown(context)
    }
}
