//! Watches the processes of one attempt until none is left.

use std::time::Duration;

use tokio::{
    signal::unix::Signal,
    time::{Instant, sleep_until},
};

use super::{
    children::Children,
    ending::{Gone, first_failed},
    signals::Signals,
};

/// What is done to those that are left, one step after the other: a signal, and how long it may take.
type Step = (Option<i32>, Duration);

/// The end of all hope: a process in an uninterruptible wait does not even die of this.
const KILL: Step = (Some(libc::SIGKILL), Duration::from_secs(10));

/// After a failure the others usually learn of it themselves, and end with a line that says so.
const FAILED: [Step; 3] =
    [(None, Duration::from_secs(1)), (Some(libc::SIGTERM), Duration::from_secs(2)), KILL];

/// After the launcher was told to end.
const TOLD: Duration = Duration::from_secs(5);

/// The processes of one attempt and all that may happen to them.
#[derive(Debug)]
pub(super) struct Supervisor<'a> {
    pub(super) children: Children,
    /// Comes when a process has ended.
    pub(super) ended: &'a mut Signal,
    /// Tell the launcher to end.
    pub(super) signals: &'a mut Signals,
    /// The first that failed.
    pub(super) first_failed: Option<Gone>,
}

/// Why a wait was over.
enum Waited {
    /// For what was waited for has happened.
    Reached,
    TimeUp,
    /// The launcher was told to end.
    Told(i32),
}

impl Supervisor<'_> {
    /// Until one process has failed, or all have ended. Returns the signal that told the launcher to end, if one did.
    pub(super) async fn until_one_fails(&mut self) -> Option<i32> {
        let one_failed = |this: &Self| this.children.all_gone() || this.first_failed.is_some();
        match self.wait(one_failed, None).await {
            Waited::Told(signal) => Some(signal),
            _ => None,
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
            match self.wait(|this| this.children.all_gone(), Some(*patience)).await {
                Waited::Reached => return None,
                Waited::TimeUp => {}
                Waited::Told(signal) => return Some(signal),
            }
        }
        for (rank, pid) in self.children.running() {
            tracing::error!(
                "rank {rank} (process {pid}) was killed and is still there: it hangs in the system"
            );
        }
        None
    }

    async fn wait(
        &mut self,
        reached: impl Fn(&Self) -> bool,
        patience: Option<Duration>,
    ) -> Waited {
        let deadline = patience.map(|patience| Instant::now() + patience);
        loop {
            let found = first_failed(self.children.look());
            self.first_failed = self.first_failed.or(found);
            if reached(self) {
                return Waited::Reached;
            }
            tokio::select! {
                _ = self.ended.recv() => {}
                signal = self.signals.next() => return Waited::Told(signal),
                () = until(deadline) => return Waited::TimeUp,
            }
        }
    }
}

/// Waits for `deadline`, or for ever.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
