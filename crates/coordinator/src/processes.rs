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
//! Where a group that has lost ranks goes on without them, the ranks that are left say goodbye and meet again at the same door, as a
//! group of fewer: new numbers, another plan, and what each had at first to take bytes from.
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
    fault::{self, Point},
    params::{Home, ReadyParams},
    protocol::{Former, Generation, Progress, RankReport},
};
use ractor::{Actor, ActorRef};
use tokio::{sync::oneshot, time::timeout};
use tracing::warn;

pub use self::join::Transport;
use self::{
    holder::{Holder, QUIET_AFTER},
    hosting::{Hosting, HostingArguments},
    join::{FormerRanks, HostJoin},
    member::{End, Member, MemberArguments, MemberMessage},
    message::Piece,
};
use crate::{
    coordination::{LoadEnd, Loaded, Recovery, Shrunk},
    cuts,
    error::LoadError,
    events,
    link::{
        connect::{Connected, connect},
        handshake::{Credentials, Purpose, Terms},
        listen::{ListenError, Listener, Tried},
        session::Timing,
    },
    load::{Prepared, check_unchanged, given_back, prepare_process},
    place::Place,
    report::Lost,
};

/// What becomes of a group that has lost a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLoss {
    /// It waits for the process that is started in the lost one's place.
    #[default]
    Wait,
    /// It goes on with fewer ranks, over as many of which the model is split as it can be; not without rank 0, whose process
    /// coordinates.
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
        let (own_rank, shrinks) = (Some(0), self.on_loss == OnLoss::Shrink);
        Recovery { replacements_max, join_limit: self.join_limit, own_rank, shrinks }
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
        // before anyone is told of this process
        cuts::listen(place);
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
    /// Checkpoint bytes that were in place on this rank before the load, and so were not read for it.
    pub(crate) kept_bytes: u64,
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
/// On rank 0 the first failure of any rank; elsewhere that of this process, or that the coordinator has ended the load, or
/// that the group went on with so few ranks that this one has no part of the model.
pub(crate) async fn load(
    place: &Place,
    door: Door,
    source: &str,
    prepared: Prepared,
    options: &GroupOptions,
    progress: Vec<Arc<Progress>>,
) -> Result<Holder, LoadError> {
    let own: Arc<Progress> = Arc::default();
    events::watch(&own);
    let (place, prepared) = (place.clone(), Arc::new(prepared));
    let began = (Instant::now(), prepared.opening_seconds);
    let (options, before) = (*options, None);
    let mut attempt = Attempt { place, options, prepared, began, progress, own, before };
    loop {
        let ended = match &door.0 {
            None => attempt.as_guest().await?,
            Some(listener) => attempt.as_host(listener).await?,
        };
        match ended {
            AttemptEnd::Complete(params, joined) => {
                return attempt.complete(source, params, joined).await;
            }
            AttemptEnd::Shrunk(shrunk, former) => {
                attempt = attempt.with_fewer(shrunk, former).await?;
            }
        }
    }
}

/// How an attempt has ended on this rank.
enum AttemptEnd {
    /// Every rank is complete.
    Complete(ReadyParams, Joined),
    /// The load goes on with fewer ranks; what this one had. Ranks but rank 0 know only which they are.
    Shrunk(Shrunk, Option<Former>),
}

/// A load, in the group of those that are left.
struct Attempt {
    place: Place,
    options: GroupOptions,
    prepared: Arc<Prepared>,
    /// When the first group began, and the seconds that its files had taken to be opened.
    began: (Instant, f64),
    /// On rank 0, of each rank.
    progress: Vec<Arc<Progress>>,
    /// Of this one.
    own: Arc<Progress>,
    /// The larger group that the first ranks were lost of.
    before: Option<Before>,
}

struct Before {
    ranks: FormerRanks,
    former: Option<Arc<Former>>,
    losses: Vec<LoadError>,
    lost_bytes_read: u64,
    generation: Generation,
}

impl Attempt {
    async fn as_guest(&self) -> Result<AttemptEnd, LoadError> {
        let Taking { member, address, released } = self.join(None).await?;
        match wait(released).await? {
            End::Complete(params, generation) => {
                let joined = Joined {
                    reports: None,
                    generation,
                    lost: Lost::default(),
                    kept_bytes: 0,
                    seconds: self.seconds(),
                    address,
                    member,
                    hosting: None,
                };
                Ok(AttemptEnd::Complete(params, joined))
            }
            End::Shrunk { ranks, former } => {
                end_member(&member).await;
                let (losses, lost_bytes_read, generation) = (Vec::new(), 0, 0);
                let shrunk = Shrunk { ranks, generation, losses, lost_bytes_read };
                Ok(AttemptEnd::Shrunk(shrunk, former))
            }
        }
    }

    async fn as_host(&mut self, listener: &TcpListener) -> Result<AttemptEnd, LoadError> {
        // whoever knocks while one group gives way to the next is let in by that one
        let listener = listener.try_clone().map_err(|e| LoadError::Meet(e.into()))?;
        let mut hosting = self.host(listener).await?;
        match self.host_and_join(&hosting).await {
            Ok((taking, LoadEnd::Complete(loaded))) => {
                let Taking { member, address, released } = taking;
                let params = match wait(released).await {
                    Ok(End::Complete(params, _)) => params,
                    // its own link has broken in between
                    other => {
                        hosting.end().await;
                        let changed = || LoadError::Runtime("a complete group has changed".into());
                        return Err(other.err().unwrap_or_else(changed));
                    }
                };
                let Loaded { ranks, generation, mut lost } = loaded;
                let mut reports: Vec<RankReport> =
                    ranks.into_iter().map(|(_, report)| report).collect();
                // those that only handed on are no part of what follows
                let handed_on = reports.split_off(self.holders() as usize);
                lost.bytes_read += handed_on.iter().map(|r| r.storage_bytes_read).sum::<u64>();
                let joined = Joined {
                    reports: Some(reports),
                    generation,
                    lost,
                    kept_bytes: 0,
                    seconds: self.seconds(),
                    address,
                    member,
                    hosting: Some(hosting),
                };
                Ok(AttemptEnd::Complete(params, joined))
            }
            Ok((taking, LoadEnd::Shrunk(shrunk))) => {
                hosting.shrink(shrunk.ranks.clone()).await;
                let ended = timeout(QUIET_AFTER, wait(taking.released)).await;
                end_member(&taking.member).await;
                hosting.end().await;
                let hangs = |_| LoadError::Runtime("a read of rank 0 hangs".into());
                match ended.map_err(hangs)?? {
                    End::Shrunk { former, .. } => Ok(AttemptEnd::Shrunk(shrunk, former)),
                    End::Complete(..) => {
                        Err(LoadError::Runtime("a group that was to shrink is complete".into()))
                    }
                }
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

    /// Rank 0: carries the load through on all ranks, and takes part in it.
    async fn host_and_join(&self, hosting: &Hosting) -> Result<(Taking, LoadEnd), LoadError> {
        let first = self.before.as_ref().map_or(FIRST_GENERATION, |before| before.generation + 1);
        // of a load that fails the coordinator knows the first cause, this rank only what it was told
        tokio::try_join!(self.join(Some(hosting)), hosting.load(first))
    }

    /// From the opening of the first group's files until now.
    fn seconds(&self) -> f64 {
        let (began, opening_seconds) = self.began;
        opening_seconds + began.elapsed().as_secs_f64()
    }

    /// How many of the first ranks hold parameters.
    fn holders(&self) -> u32 {
        self.prepared.plan.placement().parallel.tp()
    }

    /// The same load with those that are left, planned for them.
    async fn with_fewer(self, shrunk: Shrunk, former: Option<Former>) -> Result<Self, LoadError> {
        let Self { place, options, prepared, began, progress, own, before } = self;
        let Shrunk { ranks, generation, losses, lost_bytes_read } = shrunk;
        let Some(rank) = ranks.iter().position(|rank| *rank == place.rank) else {
            return Err(LoadError::Replaced { why: "the group goes on without this rank".into() });
        };
        let place = Place { rank: rank as u32, world_size: ranks.len() as u32, ..place };
        let before = match before {
            None => {
                let (plan, former) = (prepared.plan.clone(), former.map(Arc::new));
                let ranks = FormerRanks { plan, ranks };
                Before { ranks, former, losses, lost_bytes_read, generation }
            }
            // what the ranks had at first is worth more than what they made of it since: each of those left has some of that
            Some(Before { ranks: first, former, .. }) => {
                let number = |rank: &u32| first.ranks.get(*rank as usize).copied();
                let Some(numbers) = ranks.iter().map(number).collect() else {
                    return Err(LoadError::Runtime("ranks are left that there were not".into()));
                };
                let ranks = FormerRanks { ranks: numbers, ..first };
                Before { ranks, former, losses, lost_bytes_read, generation }
            }
        };
        let (planned_at, transport) = (place.clone(), options.transport);
        let planning = tokio::task::spawn_blocking(move || {
            let plan = before.ranks.plan.for_fewer(planned_at.world_size)?;
            let opened = prepared.opened;
            let prepared = prepare_process(&plan, &prepared.options, &planned_at, transport)?;
            // some of what the ranks had was read then
            Ok::<_, LoadError>((before, prepared.since(opened)))
        });
        let (before, prepared) =
            planning.await.map_err(|e| LoadError::Runtime(e.to_string()))??;
        let parallel = prepared.plan.placement().parallel;
        if place.rank == 0 {
            let (tp, left) = (parallel.tp(), place.world_size);
            warn!("{left} ranks are left; the load goes on with tp {tp}");
        }
        let progress: Vec<Arc<Progress>> =
            progress.into_iter().take(place.world_size as usize).collect();
        progress.iter().for_each(|progress| progress.begin_again());
        let (prepared, before) = (Arc::new(prepared), Some(before));
        Ok(Self { place, options, prepared, began, progress, own, before })
    }

    /// Hands the parameters out.
    async fn complete(
        self,
        source: &str,
        params: ReadyParams,
        joined: Joined,
    ) -> Result<Holder, LoadError> {
        let (holders, left) = (self.holders(), self.place.world_size);
        let Self { place, options, prepared, before, .. } = self;
        drop(before);
        if place.rank >= holders {
            joined.end().await;
            return Err(LoadError::NotNeeded { left, tp: holders });
        }
        given_back(slice::from_ref(&params)).await;
        fault::at_point(place.rank, joined.generation, Point::Released);
        let place = Place { world_size: holders, ..place };
        Ok(Holder::new(&place, source, &options, &prepared, params, joined))
    }

    /// Starts the coordinator, in rank 0's process.
    async fn host(&mut self, listener: TcpListener) -> Result<Hosting, LoadError> {
        let Self { place, options, prepared, .. } = self;
        let terms = Terms::new(place.secret.clone(), place.world_size, place.attempt);
        let listener =
            Listener::from_std(listener, terms).map_err(|e| LoadError::Meet(e.into()))?;
        let mut recovery = options.recovery();
        let mut losses = (Vec::new(), 0);
        if let Some(before) = &mut self.before {
            // those that are left were there a moment ago
            recovery.join_limit = recovery.join_limit.min(options.silent_after + REGROUP_LIMIT);
            losses = (std::mem::take(&mut before.losses), before.lost_bytes_read);
        }
        let (plan, progress) = (prepared.plan.hash(), self.progress.clone());
        let (timing, stuck_after) = (timing(options), options.stuck_after);
        let (holders, before) = (self.holders(), losses);
        Hosting::start(HostingArguments {
            listener,
            plan,
            progress,
            holders,
            before,
            timing,
            recovery,
            stuck_after,
        })
        .await
    }

    /// Connects this rank to the coordinator.
    async fn join(&self, hosting: Option<&Hosting>) -> Result<Taking, LoadError> {
        let Self { place, options, prepared, own, before, .. } = self;
        let failed = |e: Box<dyn std::error::Error + Send + Sync>| LoadError::Meet(e);
        let way = Way { place: place.clone(), limit: options.join_limit };
        let coordinator = way.meet_at(hosting.map(|hosting| hosting.address)).await?;
        let address = coordinator.stream.local_addr().map_err(|e| failed(e.into()))?.ip();
        events::emit(events::What::Joined);
        let (released, outcome) = oneshot::channel();
        let checked = Arc::clone(prepared);
        let ranks = before.as_ref().map(|before| before.ranks.clone());
        let recovery = options.recovery();
        let is_replaced = recovery.replacements_max > 0 && !recovery.shrinks;
        let start = MemberArguments {
            rank: place.rank,
            coordinator,
            timing: timing(options),
            progress: Arc::clone(own),
            work: prepared.work(),
            home: prepared.homes.first().cloned().unwrap_or(Home::Host),
            former: before.as_ref().and_then(|before| before.former.clone()),
            join: Arc::new(host_join(place, prepared, options, address, ranks)?),
            plan: prepared.plan.hash(),
            check_at_end: Box::new(move || check_unchanged(&checked)),
            way: (hosting.is_none() && is_replaced).then_some(way),
            released,
        };
        let (member, _) = Actor::spawn(None, Member, start)
            .await
            .map_err(|e| LoadError::Runtime(e.to_string()))?;
        Ok(Taking { member, address, released: outcome })
    }
}

/// How long the ranks that are left of a group may take to plan for fewer and to join, beyond what it takes to notice that one
/// of them is lost as well.
const REGROUP_LIMIT: Duration = Duration::from_secs(20);

async fn wait(released: oneshot::Receiver<member::Released>) -> member::Released {
    released.await.map_err(|_| LoadError::Runtime("the rank's actor has ended".into()))?
}

/// Has a rank say goodbye to its coordinator.
async fn end_member(member: &ActorRef<MemberMessage>) {
    let (done, ended) = oneshot::channel();
    if member.cast(MemberMessage::End(done)).is_ok() {
        // an actor that is gone has said it
        let _ = ended.await;
    }
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
    former: Option<FormerRanks>,
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
        former,
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
        let pieces = self.contribute(piece, false, false).await?;
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
        self.contribute(piece, wants_all, false).await
    }

    /// [`Joined::all_gather`] as part of a reload: a rank that does not take part for too long ends it, on all.
    ///
    /// # Errors
    /// As there; or a rank does not answer, and all are told so.
    pub(crate) async fn all_gather_in_reload(&mut self, piece: Vec<u8>) -> member::Gathered {
        let wants_all = self.hosting.is_none();
        self.contribute(piece, wants_all, true).await
    }

    async fn contribute(
        &mut self,
        bytes: Vec<u8>,
        wants_all: bool,
        in_reload: bool,
    ) -> member::Gathered {
        let gone = || LoadError::Runtime("the rank's actor has ended".into());
        let (done, contributed) = oneshot::channel();
        let piece = Piece { bytes, wants_all, in_reload };
        self.member.cast(MemberMessage::Contribute(piece, done)).map_err(|_| gone())?;
        match &mut self.hosting {
            Some(hosting) => hosting.gathered().await,
            None => contributed.await.map_err(|_| gone())?,
        }
    }

    /// Says goodbye.
    pub(crate) async fn end(self) {
        events::ended(None);
        end_member(&self.member).await;
        if let Some(hosting) = self.hosting {
            hosting.end().await;
        }
    }
}
