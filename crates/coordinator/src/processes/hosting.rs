//! The coordinator of a group of processes: in rank 0's process, reached by every rank over its control link, rank 0 included.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use longshore_rank::protocol::{Generation, PlanName, Progress};
use ractor::{Actor, ActorRef};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};
use tracing::warn;

use crate::{
    coordination::{Loaded, Outcome, Recovery},
    error::LoadError,
    link::{
        handshake::Purpose,
        listen::{Admitted, Listener},
        session::Timing,
    },
    processes::{member::Gathered, remote::RemoteArguments},
    supervisor::{Supervisor, SupervisorArguments, SupervisorMessage},
};

/// What the coordinator is started with.
#[derive(Debug)]
pub(crate) struct HostingArguments {
    pub(crate) listener: Listener,
    pub(crate) plan: PlanName,
    /// Each rank's counters, to be kept up to date.
    pub(crate) progress: Vec<Arc<Progress>>,
    /// How many of the first ranks hold parameters.
    pub(crate) holders: u32,
    /// As [`SupervisorArguments::before`].
    pub(crate) before: (Vec<LoadError>, u64),
    pub(crate) timing: Timing,
    /// How long ranks may take to join, and what follows a loss.
    pub(crate) recovery: Recovery,
    /// How long a rank may have work in hand without getting on.
    pub(crate) stuck_after: Duration,
}

/// A running coordinator.
#[derive(Debug)]
pub(crate) struct Hosting {
    supervisor: ActorRef<SupervisorMessage>,
    ended: JoinHandle<()>,
    door: JoinHandle<()>,
    gathered: mpsc::Receiver<Gathered>,
    /// Why nothing will be gathered any more.
    over: Option<String>,
    /// The longest that the ranks are waited for once nothing is left to be said.
    end_limit: Duration,
    silent_after: Duration,
    /// Where it listens.
    pub(crate) address: SocketAddr,
}

/// How long ranks are waited for at the end of a load.
const END_LIMIT: Duration = Duration::from_secs(2);

impl Hosting {
    pub(crate) async fn start(arguments: HostingArguments) -> Result<Self, LoadError> {
        let HostingArguments { listener, plan, progress, timing, recovery, stuck_after, .. } =
            arguments;
        // one for a result, one for the news that a rank was lost
        let (tell_gathered, gathered) = mpsc::channel(2);
        let start = SupervisorArguments {
            world_size: progress.len() as u32,
            holders: arguments.holders,
            before: arguments.before,
            ranks: Vec::new(),
            stuck_after,
            recovery,
            admissions: Some(listener.admissions()),
            gathered: tell_gathered,
        };
        let (supervisor, ended) = Actor::spawn(None, Supervisor, start)
            .await
            .map_err(|e| LoadError::Runtime(e.to_string()))?;
        let address = listener.address();
        let (admitted, arriving) = mpsc::channel(progress.len());
        let silent_after = timing.silent_after;
        let join = Joining { plan, progress, timing };
        let door = tokio::spawn({
            let supervisor = supervisor.clone();
            async move {
                tokio::select! {
                    () = listener.run(admitted) => {}
                    () = join.admit(arriving, supervisor) => {}
                }
            }
        });
        let end_limit = END_LIMIT;
        Ok(Self { supervisor, ended, door, gathered, over: None, end_limit, silent_after, address })
    }

    /// Carries a load through on all ranks, and returns when every one is complete.
    ///
    /// # Errors
    /// The first failure of any rank.
    pub(crate) async fn load(&self, generation: Generation) -> Outcome {
        self.ask(|done| SupervisorMessage::Load { generation, done }).await
    }

    /// Carries another load through, into what the ranks hold: all are prepared to begin it.
    ///
    /// # Errors
    /// The first failure of any rank.
    pub(crate) async fn load_again(&self, plan: PlanName) -> Result<Loaded, LoadError> {
        // a reload is answered at once when a rank is lost
        self.ask(|done| SupervisorMessage::LoadAgain { plan, done }).await?.complete()
    }

    /// Tells all ranks that the group goes on as another one, which is met at the same door: this one is closed first.
    pub(crate) async fn shrink(&mut self, ranks: Vec<u32>) {
        self.door.abort();
        // it has ended or was aborted: closed in either case
        let _ = (&mut self.door).await;
        // whoever is not lost by then has heard of it
        self.end_limit = END_LIMIT.max(self.silent_after);
        // an actor that is gone has nobody to tell
        let _ = self.supervisor.cast(SupervisorMessage::Shrink(ranks));
    }

    async fn ask(
        &self,
        message: impl FnOnce(oneshot::Sender<Outcome>) -> SupervisorMessage,
    ) -> Outcome {
        let (done, outcome) = oneshot::channel();
        let gone = || LoadError::Runtime("the coordinator's actor has ended".into());
        self.supervisor.cast(message(done)).map_err(|_| gone())?;
        outcome.await.map_err(|_| gone())?
    }

    /// What every rank has contributed, in the order of ranks, when all have.
    ///
    /// # Errors
    /// A rank was lost, now or before; or, for a reload, one does not answer.
    pub(crate) async fn gathered(&mut self) -> Gathered {
        if let Some(why) = &self.over {
            return Err(LoadError::GroupEnded { why: why.clone() });
        }
        let gone = || LoadError::Runtime("the coordinator's actor has ended".into());
        let gathered = self.gathered.recv().await.ok_or_else(gone)?;
        match &gathered {
            // the next round may fare better
            Ok(_) | Err(LoadError::NoAnswer { .. }) => {}
            Err(over) => self.over = Some(over.line()),
        }
        gathered
    }

    /// Goes without a word: the ranks go on, and look for another coordinator.
    pub(crate) async fn vanish(self) {
        self.door.abort();
        self.supervisor.kill();
        // an actor that does not end is left to the end of the process
        let _ = timeout(END_LIMIT, self.ended).await;
    }

    /// Says goodbye to all ranks.
    pub(crate) async fn end(self) {
        // an actor that is gone has said it
        let _ = self.supervisor.cast(SupervisorMessage::End);
        // whoever does not answer is left to whoever started it
        let _ = timeout(self.end_limit, self.ended).await;
        self.supervisor.stop(None);
        self.door.abort();
    }
}

/// Lets ranks in.
struct Joining {
    plan: PlanName,
    progress: Vec<Arc<Progress>>,
    timing: Timing,
}

impl Joining {
    /// Hands every rank that joins to the supervisor; goes on after all have, so that strangers are seen and refused.
    async fn admit(
        self,
        mut arriving: mpsc::Receiver<Admitted>,
        supervisor: ActorRef<SupervisorMessage>,
    ) {
        while let Some(admitted) = arriving.recv().await {
            self.join(admitted, &supervisor);
        }
    }

    fn join(&self, admitted: Admitted, supervisor: &ActorRef<SupervisorMessage>) {
        let Admitted { joined, stream, address } = admitted;
        let rank = joined.rank;
        if joined.purpose != Purpose::Control {
            return warn!("rank {rank} at {address} brought bytes to the coordinator: ignored");
        }
        let Some(progress) = self.progress.get(rank as usize) else { return };
        let (progress, plan, timing) = (Arc::clone(progress), self.plan, self.timing);
        let process = joined.process;
        let rank = RemoteArguments { rank, process, stream, timing, progress, plan };
        // as above
        let _ = supervisor.cast(SupervisorMessage::Joined(rank));
    }
}
