//! Communicators: commands to the thread that owns one, answers from it, and the abort.

use std::{
    fmt,
    sync::{
        Arc,
        mpsc::{
            Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, channel,
            sync_channel,
        },
    },
    thread,
    time::Duration,
};

use crate::{
    error::{NcclError, Stuck},
    group::{Group, Stream},
    library::{Nccl, UniqueId},
    owner::{Command, Deadline, Owner, Shared},
};

/// Commands that wait for the owner: an exchange keeps a few groups in flight, never this many.
const WAITING_MAX: usize = 64;
/// How long after its limit a command may still be answered, before the owner is taken to hang.
const GRACE: Duration = Duration::from_secs(1);
/// How long a communicator that is dropped is waited for.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// A rank's place in a communicator that is to be.
#[derive(Debug, Clone, Copy)]
pub struct Membership {
    /// Names the communicator; the same on all ranks.
    pub id: UniqueId,
    /// This rank.
    pub rank: u32,
    /// How many ranks there are.
    pub world_size: u32,
    /// At most so many thread blocks per operation (`maxCTAs`); `None`: as many as NCCL likes.
    ///
    /// Ranks that share a GPU need a few each, as all of them have to run at the same time.
    pub max_ctas: Option<u32>,
}

/// What is known of a communicator once all ranks have joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connected {
    /// The device NCCL uses: the CUDA ordinal of what was made current on its thread.
    pub cuda_device: i32,
}

/// One rank's end of a communicator.
///
/// To give up a stream or device memory of its operations is to wait for them: where they never end, because a rank is
/// lost, the communicator has to be aborted before (and dropped before, where nobody aborts it by hand). After [`Stuck`]
/// nothing of the device is given up any more.
///
/// # Drop
/// A communicator that is neither finished nor aborted is aborted, and waited for as long as five seconds. A thread
/// that hangs is left behind; then, whoever cares calls [`Communicator::abort`] instead, and ends the process.
#[derive(Debug)]
pub struct Communicator {
    world_size: u32,
    shared: Arc<Shared>,
    commands: SyncSender<Command>,
}

impl Communicator {
    /// Starts to join a communicator, from a thread of its own. All ranks have to join within `limit`.
    ///
    /// `bind` is called on that thread first, and makes the device current there; what it returns is kept until the
    /// communicator is gone. `notify` is called whenever something may be had from a [`Pending`] or
    /// [`Communicator::failure`], from that thread: it must not wait.
    ///
    /// # Errors
    /// The rank is none of the group, or there is no thread to be had. What NCCL says comes with the [`Pending`].
    pub fn connect<K: 'static, E: fmt::Display + 'static>(
        nccl: &'static Nccl,
        membership: Membership,
        limit: Duration,
        bind: impl FnOnce() -> Result<K, E> + Send + 'static,
        notify: impl Fn() + Send + 'static,
    ) -> Result<(Self, Pending<Connected>), NcclError> {
        let Membership { rank, world_size, max_ctas, .. } = membership;
        let fits = i32::try_from(world_size).is_ok()
            && max_ctas.is_none_or(|ctas| (1..1 << 16).contains(&ctas));
        if rank >= world_size || !fits {
            let what = format!(
                "no communicator for rank {rank} of {world_size} with {max_ctas:?} thread blocks"
            );
            return Err(NcclError::Invalid { what });
        }
        let shared = Arc::new(Shared::new());
        let deadline = Deadline::after(limit);
        let (commands, obeyed) = sync_channel(WAITING_MAX);
        let (connected, answer) = channel();
        let owner =
            Owner { nccl, membership, shared: Arc::clone(&shared), notify: Box::new(notify) };
        thread::Builder::new()
            .name(format!("nccl-{rank}"))
            .spawn(move || owner.run(bind, deadline, &connected, &obeyed))
            .map_err(|error| NcclError::NoThread { reason: error.to_string() })?;
        let pending = Pending { answer, shared: Arc::clone(&shared), deadline };
        Ok((Self { world_size, shared, commands }, pending))
    }

    /// Starts a group of operations on `stream`, after what is on the stream already.
    ///
    /// The answer says that they are on the stream, not that they have ended: that is the stream's to say. Until the
    /// answer is there, nothing that has to come after them may be put on the stream. The first group with a rank
    /// connects to it, and so waits for that rank to start its own.
    ///
    /// # Safety
    /// The stream, and all buffers of `group` as device memory of the communicator's device, stay there until the
    /// operations have ended or the communicator was aborted with success; until then nobody else writes to any of
    /// them, or reads what is received.
    ///
    /// # Errors
    /// An operation is none of this communicator's, or too many commands wait. What NCCL says comes with the
    /// [`Pending`]; after an error the communicator can only be aborted.
    pub unsafe fn group(
        &self,
        group: Group,
        stream: Stream,
        limit: Duration,
    ) -> Result<Pending<()>, NcclError> {
        group.check(self.world_size)?;
        let deadline = Deadline::after(limit);
        let (answer, pending) = self.pending(deadline);
        if group.is_empty() {
            let _ = answer.send(Ok(()));
            return Ok(pending);
        }
        self.tell(Command::Group { group, stream, deadline, answer })?;
        Ok(pending)
    }

    /// Ends a communicator whose operations have ended, together with all other ranks.
    ///
    /// # Errors
    /// Too many commands wait. What NCCL says comes with the [`Pending`]; after an error the communicator can only be
    /// aborted.
    pub fn finish(&self, limit: Duration) -> Result<Pending<()>, NcclError> {
        let deadline = Deadline::after(limit);
        let (answer, pending) = self.pending(deadline);
        self.tell(Command::Finish { deadline, answer })?;
        Ok(pending)
    }

    /// Why the communicator can only be aborted; `None` as long as nothing is known against it.
    ///
    /// A communicator is looked at many times a second, and so are the connections to other ranks, by NCCL. But NCCL
    /// need not notice that a rank is gone: whoever waits for a stream has a limit too.
    pub fn failure(&self) -> Option<NcclError> {
        self.shared.failure()
    }

    /// Ends all operations, wherever they are, and the communicator. Can be called at any time, from any thread.
    ///
    /// With success, the streams of its operations go on, their results are undefined, and their buffers are free
    /// again.
    ///
    /// # Errors
    /// The communicator's thread does not come back within `limit`: the process has to end.
    pub fn abort(&self, limit: Duration) -> Result<(), Stuck> {
        self.shared.set_abort();
        // where no more commands fit, the owner looks at the flag after the next one
        let _ = self.commands.try_send(Command::Look);
        match self.shared.wait_end(Deadline::after(limit)) {
            Some(end) => end.map_err(|error| Stuck::Refused { error }),
            None => {
                let (call, since) = self.shared.call();
                Err(Stuck::Hangs { call, since, waited: limit })
            }
        }
    }

    fn pending(&self, deadline: Deadline) -> (crate::owner::Answer<()>, Pending<()>) {
        let (answer, answered) = channel();
        (answer, Pending { answer: answered, shared: Arc::clone(&self.shared), deadline })
    }

    fn tell(&self, command: Command) -> Result<(), NcclError> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => NcclError::Busy { waiting: WAITING_MAX },
            TrySendError::Disconnected(_) => NcclError::Gone,
        })
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // nobody is left to be told
        let _ = self.abort(DROP_LIMIT);
    }
}

/// An answer that is still to come.
#[derive(Debug)]
pub struct Pending<T> {
    answer: Receiver<Result<T, NcclError>>,
    shared: Arc<Shared>,
    deadline: Deadline,
}

impl<T> Pending<T> {
    /// The answer, once; `None` as long as there is none.
    pub fn try_take(&mut self) -> Option<Result<T, NcclError>> {
        match self.answer.try_recv() {
            Ok(answer) => Some(answer),
            Err(TryRecvError::Disconnected) => Some(Err(NcclError::Gone)),
            Err(TryRecvError::Empty) => {
                let late = self.deadline.left(GRACE).is_some_and(|left| left.is_zero());
                late.then(|| Err(self.unresponsive()))
            }
        }
    }

    /// Waits for the answer, at most a second longer than the limit that was set for it.
    ///
    /// # Errors
    /// What NCCL says, that the limit has passed, or that NCCL hangs.
    pub fn wait(self) -> Result<T, NcclError> {
        let answer = match self.deadline.left(GRACE) {
            Some(left) => self.answer.recv_timeout(left),
            None => self.answer.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match answer {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Err(NcclError::Gone),
            Err(RecvTimeoutError::Timeout) => Err(self.unresponsive()),
        }
    }

    fn unresponsive(&self) -> NcclError {
        let (call, since) = self.shared.call();
        NcclError::Unresponsive { call, since }
    }
}
