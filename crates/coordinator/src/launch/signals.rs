//! The signals that end the launcher.

use std::{future::poll_fn, io, mem, ptr, task::Poll};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What ends a launcher: Ctrl-C, Ctrl-\, `kill`, a closed terminal.
const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP];

/// Those of them that this process is to heed.
#[derive(Debug)]
pub(crate) struct Signals(Vec<(i32, Signal)>);

impl Signals {
    /// Listens from now on, in place of what the signals did before. A launcher under `nohup` goes on when the terminal
    /// is closed. Of the other signals it does not count that they are ignored: a script does so to whatever it starts
    /// with `&`, and to pass them on is what a launcher is for.
    pub(crate) fn listen() -> io::Result<Self> {
        let heeded = |number: &i32| *number != libc::SIGHUP || !is_ignored(*number);
        let heeded = ENDING.into_iter().filter(heeded);
        let listen = |number| Ok((number, signal(SignalKind::from_raw(number))?));
        Ok(Self(heeded.map(listen).collect::<io::Result<_>>()?))
    }

    /// The next one that comes, or came since.
    ///
    /// # Cancel safety
    /// A signal that was not returned is returned by the next call.
    pub(crate) async fn next(&mut self) -> i32 {
        poll_fn(|context| {
            for (number, stream) in &mut self.0 {
                if stream.poll_recv(context).is_ready() {
                    return Poll::Ready(*number);
                }
            }
            Poll::Pending
        })
        .await
    }
}

fn is_ignored(number: i32) -> bool {
    // SAFETY: all zeroes is a value of this plain structure
    let mut found: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: with a null second argument the call only writes to `found`, which outlives it
    let asked = unsafe { libc::sigaction(number, ptr::null(), &raw mut found) };
    asked == 0 && found.sa_sigaction == libc::SIG_IGN
}
