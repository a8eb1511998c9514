//! Ranks that are processes of their own, on one host or several, under whatever launcher.
//!
//! ```text
//!  rank 0's process                                     another rank's process
//!  ┌───────────────────────────────┐                    ┌──────────────────────┐
//!  │ hosting: listener, supervisor │                    │                      │
//!  │   remote(0)    remote(1) ─────┼── control link ────┼─► member             │
//!  │      └─ link ─► member        │                    │     └─ rank actor    │
//!  │                   └─ rank ════╪══ bytes (join) ════╪═══════════┘          │
//!  └───────────────────────────────┘                    └──────────────────────┘
//! ```
//!
//! Every process plans on its own from the same source; the plan's hash is compared before the first byte. The coordinator
//! deals with all ranks in the same way, its own process's included. Weights never pass through the control link.

pub(crate) mod holder;
mod hosting;
mod join;
pub(crate) mod member;
pub(crate) mod message;
pub(crate) mod remote;

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    slice,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use longshore_rank::{
    collective::segment::Form,
    params::{Home, ReadyParams},
    protocol::{Generation, Progress, RankReport},
};
use ractor::{Actor, ActorRef};
use tokio::sync::oneshot;

pub use self::join::Transport;
use self::{
    holder::Holder,
    hosting::{Hosting, HostingArguments},
    join::HostJoin,
    member::{Member, MemberArguments, MemberMessage},
    message::Piece,
};
use crate::{
    coordination::{Loaded, Recovery},
    error::LoadError,
    events,
    link::{
        connect::{Connected, connect},
        handshake::{Credentials, Purpose, Terms},
        listen::{ListenError, Listener, Tried},
        session::Timing,
    },
    load::{Prepared, check_unchanged, given_back},
    place::Place,
    report::Lost,
};

/// What becomes of a group that has lost a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLoss {
    /// It waits for the process that is started in the lost one's place.
    #[default]
    Wait,
    /// It goes on with fewer ranks, where the model can be split so.
    Shrink,
    /// It ends at once.
    Fail,
}

/// How a group of processes is held together.
#[derive(Debug, Clone, Copy)]
pub struct GroupOptions {
    /// How bytes pass between ranks.
    pub transport: Transport,
    /// From one heartbeat of a rank to the next.
    pub beat_every: Duration,
    /// A rank that was not heard of for so long is lost.
    pub silent_after: Duration,
    /// A rank that has work in hand and does not get on for so long has failed.
    pub stuck_after: Duration,
    /// How long ranks may take to join.
    pub join_limit: Duration,
    /// What becomes of the group when a rank is lost.
    pub on_loss: OnLoss,
    /// How many lost ranks are replaced, all ranks together.
    pub max_restarts: u32,
}

impl GroupOptions {
    /// What follows a loss.
    pub(crate) fn recovery(&self) -> Recovery {
        let replacements_max = match self.on_loss {
            OnLoss::Wait | OnLoss::Shrink => self.max_restarts,
            OnLoss::Fail => 0,
        };
        // the coordinator is in rank 0's process
        Recovery { replacements_max, join_limit: self.join_limit, own_rank: Some(0) }
    }

    /// With another limit to silence, and heartbeats to go with it.
    pub(crate) fn with_silent_after(self, silent_after: Duration) -> Self {
        Self { silent_after, beat_every: silent_after / BEATS_PER_SILENCE, ..self }
    }
}

/// What a time limit may be.
pub(crate) const TIME_LIMITS: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(86_400);

/// Ten missed heartbeats are not load but a hang.
const BEATS_PER_SILENCE: u32 = 10;

impl Default for GroupOptions {
    fn default() -> Self {
        let Timing { beat_every, silent_after } = Timing::default();
        Self {
            transport: Transport::Auto,
            beat_every,
            silent_after,
            stuck_after: STUCK_AFTER,
            join_limit: Duration::from_secs(120),
            on_loss: OnLoss::default(),
            max_restarts: MAX_RESTARTS,
        }
    }
}

/// A process or a host may be lost in the course of a load; what is lost again and again is not mended by one more.
pub const MAX_RESTARTS: u32 = 3;

/// A read of 2 MiB that takes longer will not come back: networked storage retries within seconds.
pub const STUCK_AFTER: Duration = Duration::from_secs(60);

/// The generation of a first load.
const FIRST_GENERATION: Generation = 1;

/// Where ranks come to join: on rank 0 a bound address, elsewhere nothing. Opened before anything that takes time, so that
/// ranks which are ready sooner wait at it instead of knocking again and again.
#[derive(Debug)]
pub(crate) struct Door(Option<TcpListener>);

impl Door {
    /// Binds the first address of `place` that can be had, on rank 0.
    ///
    /// # Errors
    /// None can be had.
    pub(crate) fn open(place: &Place) -> Result<Self, LoadError> {
        events::open(place);
        if place.rank > 0 {
            return Ok(Self(None));
        }
        let failed = |e: Box<dyn std::error::Error + Send + Sync>| LoadError::Meet(e);
        let mut tried = Tried::default();
        for candidate in place.listen_candidates().map_err(|e| failed(e.into()))? {
            match TcpListener::bind(candidate) {
                Ok(listener) => return Ok(Self(Some(listener))),
                Err(why) => tried.0.push((candidate, why)),
            }
        }
        Err(failed(ListenError::Taken(tried).into()))
    }
}

/// A rank process whose group is complete.
#[derive(Debug)]
pub(crate) struct Joined {
    /// On rank 0, what each rank did.
    pub(crate) reports: Option<Vec<RankReport>>,
    /// The last generation: that in which all became complete, unless a reload has failed since.
    pub(crate) generation: Generation,
    /// On rank 0, what was lost on the way.
    pub(crate) lost: Lost,
    /// From the opening of the files until every rank was ready.
    pub(crate) seconds: f64,
    /// The address by which other hosts reach this one.
    address: IpAddr,
    member: ActorRef<MemberMessage>,
    hosting: Option<Hosting>,
}

/// Joins the group that `place` names and loads `prepared`, which is what `source` names, with it; returns when every rank
/// is complete.
///
/// On rank 0, `progress` shows how each rank gets on, as of its last heartbeat.
///
/// # Errors
/// On rank 0 the first failure of any rank; elsewhere that of this process, or that the coordinator has ended the load.
pub(crate) async fn load(
    place: &Place,
    door: Door,
    source: &str,
    prepared: Prepared,
    options: &GroupOptions,
    progress: Vec<Arc<Progress>>,
) -> Result<Holder, LoadError> {
    let prepared = Arc::new(prepared);
    let (params, joined) = match door.0 {
        None => load_as_guest(place, &prepared, options).await?,
        Some(listener) => load_as_host(listener, place, &prepared, options, progress).await?,
    };
    given_back(slice::from_ref(&params)).await;
    Ok(Holder::new(place, source, options, &prepared, params, joined))
}

async fn load_as_guest(
    place: &Place,
    prepared: &Arc<Prepared>,
    options: &GroupOptions,
) -> Result<(ReadyParams, Joined), LoadError> {
    let started = Instant::now();
    let Taking { member, address, released } = join(place, prepared, options, None).await?;
    let (params, generation) = wait(released).await?;
    let seconds = started.elapsed().as_secs_f64();
    let (reports, lost, hosting) = (None, Lost::default(), None);
    Ok((params, Joined { reports, generation, lost, seconds, address, member, hosting }))
}

async fn load_as_host(
    listener: TcpListener,
    place: &Place,
    prepared: &Arc<Prepared>,
    options: &GroupOptions,
    progress: Vec<Arc<Progress>>,
) -> Result<(ReadyParams, Joined), LoadError> {
    let started = Instant::now();
    let hosting = host(listener, place, prepared, options, progress).await?;
    match host_and_join(place, prepared, options, &hosting).await {
        Ok((member, address, params, Loaded { ranks, generation, lost })) => {
            let seconds = prepared.opening_seconds + started.elapsed().as_secs_f64();
            let reports = Some(ranks.into_iter().map(|(_, report)| report).collect());
            let hosting = Some(hosting);
            Ok((params, Joined { reports, generation, lost, seconds, address, member, hosting }))
        }
        Err(e @ LoadError::Replaced { .. }) => {
            hosting.vanish().await;
            Err(e)
        }
        Err(e) => {
            hosting.end().await;
            Err(e)
        }
    }
}

type Released = (ActorRef<MemberMessage>, IpAddr, ReadyParams, Loaded);

/// Rank 0: carries the load through on all ranks, and takes part in it.
async fn host_and_join(
    place: &Place,
    prepared: &Arc<Prepared>,
    options: &GroupOptions,
    hosting: &Hosting,
) -> Result<Released, LoadError> {
    // of a load that fails the coordinator knows the first cause, this rank only what it was told
    let joined = join(place, prepared, options, Some(hosting));
    let (joined, loaded) = tokio::try_join!(joined, hosting.load(FIRST_GENERATION))?;
    let Taking { member, address, released } = joined;
    let (params, _) = wait(released).await?;
    Ok((member, address, params, loaded))
}

async fn wait(released: oneshot::Receiver<member::Released>) -> member::Released {
    released.await.map_err(|_| LoadError::Runtime("the rank's actor has ended".into()))?
}

/// Starts the coordinator, in rank 0's process.
async fn host(
    listener: TcpListener,
    place: &Place,
    prepared: &Prepared,
    options: &GroupOptions,
    progress: Vec<Arc<Progress>>,
) -> Result<Hosting, LoadError> {
    let terms = Terms::new(place.secret.clone(), place.world_size, place.attempt);
    let listener = Listener::from_std(listener, terms).map_err(|e| LoadError::Meet(e.into()))?;
    Hosting::start(HostingArguments {
        listener,
        plan: prepared.plan.hash(),
        progress,
        timing: timing(options),
        recovery: options.recovery(),
        stuck_after: options.stuck_after,
    })
    .await
}

fn timing(options: &GroupOptions) -> Timing {
    Timing { beat_every: options.beat_every, silent_after: options.silent_after }
}

/// A rank that takes part in a load.
struct Taking {
    member: ActorRef<MemberMessage>,
    /// The address by which other hosts reach this one.
    address: IpAddr,
    released: oneshot::Receiver<member::Released>,
}

/// Connects this rank to the coordinator.
async fn join(
    place: &Place,
    prepared: &Arc<Prepared>,
    options: &GroupOptions,
    hosting: Option<&Hosting>,
) -> Result<Taking, LoadError> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| LoadError::Meet(e);
    let way = Way { place: place.clone(), limit: options.join_limit };
    let coordinator = way.meet_at(hosting.map(|hosting| hosting.address)).await?;
    let address = coordinator.stream.local_addr().map_err(|e| failed(e.into()))?.ip();
    events::emit(events::What::Joined);
    let progress: Arc<Progress> = Arc::default();
    events::watch(&progress);
    let (released, outcome) = oneshot::channel();
    let checked = Arc::clone(prepared);
    let start = MemberArguments {
        rank: place.rank,
        coordinator,
        timing: timing(options),
        progress,
        work: prepared.work(),
        home: prepared.homes.first().cloned().unwrap_or(Home::Host),
        join: Arc::new(host_join(place, prepared, options, address)?),
        plan: prepared.plan.hash(),
        check_at_end: Box::new(move || check_unchanged(&checked)),
        way: (hosting.is_none() && options.recovery().replacements_max > 0).then_some(way),
        released,
    };
    let (member, _) =
        Actor::spawn(None, Member, start).await.map_err(|e| LoadError::Runtime(e.to_string()))?;
    Ok(Taking { member, address, released: outcome })
}

/// The way to the coordinator, from a rank that is to meet it.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    place: Place,
    limit: Duration,
}

impl Way {
    /// Connects to whoever is the coordinator now; waits for it.
    ///
    /// # Errors
    /// There is none in time, or it lets this rank not in.
    pub(crate) async fn meet(&self) -> Result<Connected, LoadError> {
        self.meet_at(None).await
    }

    /// [`Way::meet`], where it is known where it listens on this host.
    async fn meet_at(&self, here: Option<SocketAddr>) -> Result<Connected, LoadError> {
        let deadline = tokio::time::Instant::now() + self.limit;
        let candidates = resolve(&self.place, deadline).await;
        let mut candidates = candidates.map_err(|e| LoadError::Meet(e.into()))?;
        if let Some(here) = here {
            // by the name that others use, so that this rank's address is one that they can reach; on the port that was had
            candidates.retain(|c| c.port() == here.port());
            candidates.push(here);
        }
        let Place { rank, world_size, attempt, ref secret, .. } = self.place;
        let credentials =
            Credentials::new(secret.clone(), rank, world_size, attempt, Purpose::Control);
        connect(&candidates, &credentials, deadline).await.map_err(LoadError::Join)
    }
}

/// Where rank 0 may be met. Its host may get its name only when its process starts, as in Kubernetes: asked again until then.
async fn resolve(
    place: &Place,
    deadline: tokio::time::Instant,
) -> std::io::Result<Vec<std::net::SocketAddr>> {
    loop {
        let asked = place.clone();
        // the system's resolver blocks
        let answer = tokio::task::spawn_blocking(move || asked.candidates()).await;
        match answer.map_err(std::io::Error::other)? {
            Ok(candidates) => return Ok(candidates),
            Err(e) if tokio::time::Instant::now() + RESOLVE_AGAIN >= deadline => return Err(e),
            Err(_) => tokio::time::sleep(RESOLVE_AGAIN).await,
        }
    }
}

/// From one question for rank 0's address to the next.
const RESOLVE_AGAIN: Duration = Duration::from_secs(1);

fn host_join(
    place: &Place,
    prepared: &Prepared,
    options: &GroupOptions,
    address: IpAddr,
) -> Result<HostJoin, LoadError> {
    let Some(staging) = prepared.exchange_staging else {
        let why = "the load was not prepared for ranks that are processes".to_owned();
        return Err(LoadError::Runtime(why));
    };
    Ok(HostJoin {
        place: place.clone(),
        transport: options.transport,
        address,
        form: Form {
            world_size: place.world_size,
            slots: staging.slots,
            slot_bytes: staging.slot_bytes,
        },
        receive_slots: staging.receive_slots,
        nccl: prepared.nccl(),
        plan: prepared.plan.clone(),
        announced: Mutex::default(),
    })
}

impl Joined {
    /// Waits until every rank has contributed a piece; on rank 0 returns them all, in the order of ranks.
    ///
    /// # Errors
    /// A rank or the coordinator was lost.
    pub(crate) async fn gather(
        &mut self,
        piece: Vec<u8>,
    ) -> Result<Option<Vec<Vec<u8>>>, LoadError> {
        let pieces = self.contribute(piece, false).await?;
        Ok(self.hosting.is_some().then_some(pieces))
    }

    /// Waits until every rank has contributed a piece, and returns them all, in the order of ranks. For small ones: each
    /// goes over every rank's control link.
    ///
    /// # Errors
    /// A rank or the coordinator was lost.
    pub(crate) async fn all_gather(&mut self, piece: Vec<u8>) -> member::Gathered {
        // rank 0's process has them anyway
        let wants_all = self.hosting.is_none();
        self.contribute(piece, wants_all).await
    }

    async fn contribute(&mut self, bytes: Vec<u8>, wants_all: bool) -> member::Gathered {
        let gone = || LoadError::Runtime("the rank's actor has ended".into());
        let (done, contributed) = oneshot::channel();
        let piece = Piece { bytes, wants_all };
        self.member.cast(MemberMessage::Contribute(piece, done)).map_err(|_| gone())?;
        match &mut self.hosting {
            Some(hosting) => hosting.gathered().await,
            None => contributed.await.map_err(|_| gone())?,
        }
    }

    /// Says goodbye.
    pub(crate) async fn end(self) {
        events::ended(None);
        let (done, ended) = oneshot::channel();
        if self.member.cast(MemberMessage::End(done)).is_ok() {
            // an actor that is gone has said it
            let _ = ended.await;
        }
        if let Some(hosting) = self.hosting {
            hosting.end().await;
        }
    }
}
