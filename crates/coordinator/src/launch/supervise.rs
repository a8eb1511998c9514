//! Waits for what happens to the processes of a group, and ends them.

use std::time::Duration;

use tokio::{
    signal::unix::Signal,
    time::{Instant, sleep_until},
};

use super::{children::Children, ending::Gone, signals::Signals};

/// What is done to those that are left, one step after the other: a signal, and how long it may take.
type Step = (Option<i32>, Duration);

/// The end of all hope: a process in an uninterruptible wait does not even die of this.
const KILL: Step = (Some(libc::SIGKILL), Duration::from_secs(10));

/// After a failure the others usually learn of it themselves, and end with a line that says so.
const FAILED: [Step; 3] =
    [(None, Duration::from_secs(1)), (Some(libc::SIGTERM), Duration::from_secs(2)), KILL];

/// After the launcher was told to end.
const TOLD: Duration = Duration::from_secs(5);

/// The processes of a group and all that may happen to them.
#[derive(Debug)]
pub(super) struct Supervisor<'a> {
    pub(super) children: Children,
    /// Comes when a process has ended.
    pub(super) ended: &'a mut Signal,
    /// Tell the launcher to end.
    pub(super) signals: &'a mut Signals,
}

/// Why a wait was over.
#[derive(Debug)]
pub(super) enum Happened {
    /// These processes have ended.
    Ended(Vec<Gone>),
    /// It was time.
    TimeUp,
    /// The launcher was told to end.
    Told(i32),
}

impl Supervisor<'_> {
    /// Waits until something happens, until `deadline` if there is one.
    pub(super) async fn next(&mut self, deadline: Option<Instant>) -> Happened {
        loop {
            let found = self.children.look();
            if !found.is_empty() {
                return Happened::Ended(found.to_vec());
            }
            tokio::select! {
                _ = self.ended.recv() => {}
                signal = self.signals.next() => return Happened::Told(signal),
                () = until(deadline) => return Happened::TimeUp,
            }
        }
    }

    /// Ends what is left: passes on the signal that `told` the launcher to end, or what tells it so meanwhile, which is
    /// returned.
    pub(super) async fn end_all(&mut self, told: Option<i32>) -> Option<i32> {
        let told = match told {
            Some(signal) => Some(signal),
            None => self.end(&FAILED).await,
        };
        if let Some(signal) = told {
            // who says it twice means it
            if self.end(&[(Some(signal), TOLD), KILL]).await.is_some() {
                self.kill().await;
            }
        }
        told
    }

    /// Kills all that are left.
    pub(super) async fn kill(&mut self) {
        while self.end(&[KILL]).await.is_some() {}
    }

    /// Takes `steps` until none is left. Returns the signal that told the launcher to end, and cut them short.
    async fn end(&mut self, steps: &[Step]) -> Option<i32> {
        for (signal, patience) in steps {
            if let Some(signal) = signal {
                self.children.signal(*signal);
            }
            let deadline = Instant::now() + *patience;
            while !self.children.all_gone() {
                match self.next(Some(deadline)).await {
                    Happened::Ended(_) => {}
                    Happened::TimeUp => break,
                    Happened::Told(signal) => return Some(signal),
                }
            }
        }
        for (rank, pid) in self.children.running() {
            tracing::error!(
                "rank {rank} (process {pid}) was killed and is still there: it hangs in the system"
            );
        }
        None
    }
}

/// Waits for `deadline`, or for ever.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
