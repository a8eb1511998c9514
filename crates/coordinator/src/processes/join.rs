//! Joins one rank process with the others: shared memory on one host, TCP between hosts, or NCCL between devices.

use std::{
    collections::HashSet,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use longshore_kernels::cuda::driver::Device;
use longshore_models::have::Have;
use longshore_nccl::{Nccl, UniqueId, Version};
use longshore_rank::{
    collective::{
        Collective, CollectiveError, Kind, Operation,
        host::{HostCollective, Route},
        nccl::{self, NcclCollective},
        segment::{Form, Segment},
    },
    error::RankError,
    protocol::{Endpoint, Generation, Join, LoadPlan, NcclOffer, PlanName},
};
use tokio::{sync::mpsc, time::timeout_at};

use crate::{
    error::{LoadError, line},
    fence::host_identity,
    link::{
        connect::{Connected, connect},
        handshake::{Credentials, Purpose, Terms},
        listen::{Admitted, Listener},
        tcp::into_blocking,
    },
    place::Place,
    plan::{Plan, plan_hash},
    secret,
};

/// How bytes pass between rank processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// NCCL where every rank has a device of its own, else as [`Transport::Host`].
    #[default]
    Auto,
    /// Shared memory where ranks are on one host, TCP elsewhere.
    Host,
    /// TCP everywhere.
    Tcp,
    /// NCCL between devices, which ranks may share. Where they do, each process needs an `NCCL_HOSTID` of its own.
    Nccl,
}

/// How long ranks that have announced themselves may take to reach each other.
const JOIN_LIMIT: Duration = Duration::from_secs(30);

/// Joins this process.
#[derive(Debug)]
pub(crate) struct HostJoin {
    pub(crate) place: Place,
    pub(crate) transport: Transport,
    /// The address by which other hosts reach this one.
    pub(crate) address: IpAddr,
    pub(crate) form: Form,
    /// Slots to receive into, for each connection.
    pub(crate) receive_slots: u32,
    /// What an exchange over NCCL would set aside, and where; `None`: there is no device, no room, or nothing to exchange.
    pub(crate) nccl: Option<(nccl::Form, Arc<Device>)>,
    /// The whole load.
    pub(crate) plan: Plan,
    /// The larger group that this one is what is left of.
    pub(crate) former: Option<FormerRanks>,
    pub(crate) announced: Mutex<Option<Announced>>,
}

/// A larger group, of which some ranks are left.
#[derive(Debug, Clone)]
pub(crate) struct FormerRanks {
    /// What it was to load.
    pub(crate) plan: Plan,
    /// The number there of each that is left, in their order.
    pub(crate) ranks: Vec<u32>,
}

/// What was announced last.
#[derive(Debug)]
pub(crate) struct Announced {
    generation: Generation,
    segment: Arc<Segment>,
    listener: std::net::TcpListener,
}

impl Join for HostJoin {
    fn announce(&self, generation: Generation) -> Result<Endpoint, RankError> {
        let failed =
            |action| move |e: io::Error| CollectiveError::System { action, what: e.to_string() };
        let token = secret::random().map_err(failed("making shared memory"))?;
        let segment = Segment::create(self.form, token)?;
        // bound now, so that whoever has the roster finds it; nobody connects where all are on one host
        let listener = std::net::TcpListener::bind((self.address, 0))
            .map_err(failed("listening for other ranks"))?;
        let address = listener.local_addr().map_err(failed("listening for other ranks"))?;
        let host = match self.transport {
            Transport::Auto | Transport::Host | Transport::Nccl => {
                host_identity().map_err(failed("asking which host this is"))?
            }
            Transport::Tcp => format!("rank {} alone", self.place.rank),
        };
        let nccl = self.nccl_offer()?;
        let endpoint = Endpoint { host, segment: segment.handle(), address, nccl };
        let announced = Announced { generation, segment, listener };
        *self.announced.lock().unwrap_or_else(PoisonError::into_inner) = Some(announced);
        Ok(endpoint)
    }

    fn plan(&self, have: &[Have]) -> Result<(Arc<LoadPlan>, PlanName), RankError> {
        let failed = |e: LoadError| RankError::Rest(e.line());
        let load = match &self.former {
            Some(FormerRanks { plan, ranks }) => self.plan.after(plan, ranks, have).map(Arc::new),
            None => self.plan.left(have),
        };
        let load = load.map_err(failed)?;
        let name = plan_hash(&load);
        Ok((load, name))
    }

    fn join(
        &self,
        generation: Generation,
        roster: &[Endpoint],
    ) -> Result<Arc<dyn Collective>, RankError> {
        let Some(Announced { segment, listener, .. }) = self.announced_in(generation) else {
            let what = format!("generation {generation} was not announced");
            return Err(CollectiveError::Operation { what }.into());
        };
        if roster.len() != self.place.world_size as usize {
            let (ranks, expected) = (roster.len(), self.place.world_size);
            let what = format!("{ranks} ranks are to be joined, the group has {expected}");
            return Err(CollectiveError::Operation { what }.into());
        }
        if let Some(agreed) = self.over_nccl(roster)? {
            return self.join_over_nccl(&agreed);
        }
        let own = &roster[self.place.rank as usize];
        let mut routes: Vec<Option<Route>> = Vec::with_capacity(roster.len());
        for (rank, endpoint) in roster.iter().enumerate() {
            routes.push(if rank == self.place.rank as usize {
                Some(Route::Here)
            } else if endpoint.host == own.host {
                Some(Route::SharedMemory(open_segment(rank as u32, endpoint)?))
            } else {
                None
            });
        }
        let streams = match routes.iter().any(Option::is_none) {
            true => self.connect_all(listener, roster, &routes)?,
            false => Vec::new(),
        };
        for (rank, stream) in streams {
            routes[rank as usize] = Some(Route::Tcp(stream));
        }
        let routes: Option<Vec<Route>> = routes.into_iter().collect();
        let missing = || CollectiveError::Operation { what: "a rank has no route".to_owned() };
        let collective = HostCollective::new(
            self.place.rank,
            segment,
            routes.ok_or_else(missing)?,
            self.receive_slots,
        )?;
        pass_barrier(&collective)?;
        Ok(Arc::new(collective))
    }
}

/// An exchange over NCCL that all ranks can take part in; what each of them makes of the same roster.
#[derive(Debug, PartialEq, Eq)]
struct Agreed {
    id: UniqueId,
    /// Ranks share devices.
    shared: bool,
}

impl HostJoin {
    /// Takes what was announced in `generation`; what a later one has announced is not for whoever comes late.
    fn announced_in(&self, generation: Generation) -> Option<Announced> {
        let mut announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        announced.take_if(|announced| announced.generation == generation)
    }

    /// What this rank brings to an exchange over NCCL; nothing where that is not to be.
    fn nccl_offer(&self) -> Result<Option<NcclOffer>, RankError> {
        let wanted = matches!(self.transport, Transport::Auto | Transport::Nccl);
        let Some((_, device)) = self.nccl.as_ref().filter(|_| wanted) else { return Ok(None) };
        let offer = Nccl::load().and_then(|nccl| {
            let id = match self.place.rank {
                0 => Some(nccl.unique_id()?.0.to_vec()),
                _ => None,
            };
            Ok(NcclOffer { device: device.uuid(), version: nccl.version().0, id })
        });
        match offer {
            Ok(offer) => Ok(Some(offer)),
            Err(e) if self.transport == Transport::Nccl => {
                Err(CollectiveError::System { action: "using NCCL", what: e.to_string() }.into())
            }
            Err(e) => {
                self.say_without(&e);
                Ok(None)
            }
        }
    }

    /// Says why NCCL is not used: of all ranks, one does.
    fn say_without(&self, why: &dyn fmt::Display) {
        match self.place.rank {
            0 => tracing::warn!("ranks exchange through host memory: {why}"),
            _ => tracing::debug!("no exchange over NCCL: {why}"),
        }
    }

    /// Whether all ranks exchange over NCCL.
    fn over_nccl(&self, roster: &[Endpoint]) -> Result<Option<Agreed>, CollectiveError> {
        // a rank that has to and cannot was refused before, so nothing is exchanged
        if self.nccl.is_none() {
            return Ok(None);
        }
        match agree(roster) {
            Ok(agreed) if self.transport == Transport::Auto && agreed.shared => Ok(None),
            Ok(agreed) => Ok(Some(agreed)),
            Err(what) if self.transport == Transport::Nccl => {
                Err(CollectiveError::System { action: "using NCCL", what })
            }
            Err(what) => {
                // whoever has offered nothing has said why
                if roster[self.place.rank as usize].nccl.is_some() {
                    self.say_without(&what);
                }
                Ok(None)
            }
        }
    }

    fn join_over_nccl(&self, agreed: &Agreed) -> Result<Arc<dyn Collective>, RankError> {
        let Some((form, device)) = &self.nccl else {
            let what = "ranks agreed on NCCL without this one".to_owned();
            return Err(CollectiveError::Operation { what }.into());
        };
        let Agreed { id, shared } = *agreed;
        let rank = self.place.rank;
        let collective = NcclCollective::connect(rank, *form, device, id, shared, JOIN_LIMIT)?;
        pass_barrier(&collective)?;
        Ok(Arc::new(collective))
    }

    /// Connections to all ranks that have no route: the higher rank of two connects.
    fn connect_all(
        &self,
        listener: std::net::TcpListener,
        roster: &[Endpoint],
        routes: &[Option<Route>],
    ) -> Result<Vec<(u32, std::net::TcpStream)>, RankError> {
        let failed = |e: io::Error| CollectiveError::System {
            action: "connecting to other hosts",
            what: e.to_string(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(failed)?;
        let distant = |ranks: std::ops::Range<usize>| {
            ranks.filter(|&r| routes[r].is_none()).map(|r| r as u32).collect::<Vec<u32>>()
        };
        let own = self.place.rank as usize;
        let (lower, higher) = (distant(0..own), distant(own + 1..roster.len()));
        let deadline = tokio::time::Instant::now() + JOIN_LIMIT;
        runtime.block_on(async {
            let accepting = self.accept(listener, &higher, deadline);
            let connecting = async {
                let mut streams = Vec::with_capacity(lower.len());
                for &rank in &lower {
                    let address = roster[rank as usize].address;
                    streams.push((rank, self.connect_to(rank, address, deadline).await?));
                }
                Ok::<_, CollectiveError>(streams)
            };
            let (accepted, connected) = tokio::try_join!(accepting, connecting)?;
            Ok(accepted.into_iter().chain(connected).collect())
        })
    }

    async fn connect_to(
        &self,
        rank: u32,
        address: SocketAddr,
        deadline: tokio::time::Instant,
    ) -> Result<std::net::TcpStream, CollectiveError> {
        let failed = |what: String| CollectiveError::Connection { with: rank, what };
        let Place { rank: own, world_size, attempt, ref secret, .. } = self.place;
        let credentials = Credentials::new(secret.clone(), own, world_size, attempt, Purpose::Data);
        let Connected { stream, .. } =
            connect(&[address], &credentials, deadline).await.map_err(|e| failed(line(&e)))?;
        into_blocking(stream).map_err(|e| failed(e.to_string()))
    }

    /// Takes the connections of `expected`.
    async fn accept(
        &self,
        listener: std::net::TcpListener,
        expected: &[u32],
        deadline: tokio::time::Instant,
    ) -> Result<Vec<(u32, std::net::TcpStream)>, CollectiveError> {
        let mut streams: Vec<(u32, std::net::TcpStream)> = Vec::with_capacity(expected.len());
        if expected.is_empty() {
            return Ok(streams);
        }
        let system = |what: String| CollectiveError::System { action: "listening for ranks", what };
        let Place { world_size, attempt, ref secret, .. } = self.place;
        let terms = Terms::new(secret.clone(), world_size, attempt);
        let listener = Listener::from_std(listener, terms).map_err(|e| system(line(&e)))?;
        let (admitted, mut arriving) = mpsc::channel(expected.len());
        let taking = async {
            while streams.len() < expected.len() {
                let Ok(Some(Admitted { joined, stream, .. })) =
                    timeout_at(deadline, arriving.recv()).await
                else {
                    let came = |rank: &u32| streams.iter().any(|(r, _)| r == rank);
                    let with = expected.iter().find(|r| !came(r)).copied().unwrap_or(0);
                    let what = format!("it did not connect within {JOIN_LIMIT:?}");
                    return Err(CollectiveError::Connection { with, what });
                };
                if joined.purpose == Purpose::Data && expected.contains(&joined.rank) {
                    let stream = into_blocking(stream).map_err(|e| system(e.to_string()))?;
                    streams.push((joined.rank, stream));
                }
            }
            Ok(streams)
        };
        tokio::select! {
            taken = taking => taken,
            () = listener.run(admitted) => Err(system("the listener ended".to_owned())),
        }
    }
}

/// Whether ranks with these ends can exchange over NCCL, or why not.
fn agree(roster: &[Endpoint]) -> Result<Agreed, String> {
    let offers: Vec<&NcclOffer> = roster.iter().filter_map(|end| end.nccl.as_ref()).collect();
    let first = match offers.first() {
        Some(first) if roster.len() == offers.len() => first,
        _ => {
            let missing = roster.iter().position(|end| end.nccl.is_none()).unwrap_or(0);
            return Err(format!("rank {missing} cannot take part"));
        }
    };
    if let Some(other) = offers.iter().position(|offer| offer.version != first.version) {
        let (a, b) = (Version(first.version), Version(offers[other].version));
        return Err(format!("rank 0 has version {a}, rank {other} has {b}"));
    }
    let id: Option<[u8; 128]> = first.id.as_deref().and_then(|id| id.try_into().ok());
    let id = UniqueId(id.ok_or("rank 0 has no name for the communicator")?);
    let devices: HashSet<[u8; 16]> = offers.iter().map(|offer| offer.device).collect();
    Ok(Agreed { id, shared: devices.len() < offers.len() })
}

/// Opens the memory of a rank of this host. A kernel that has been hardened may forbid it.
fn open_segment(rank: u32, endpoint: &Endpoint) -> Result<Arc<Segment>, CollectiveError> {
    Segment::open(&endpoint.segment).map_err(|e| CollectiveError::Connection {
        with: rank,
        what: format!("{}; --transport tcp does without shared memory", line(&e)),
    })
}

/// Waits until every rank has joined: from here on all paths are known to work.
fn pass_barrier(collective: &dyn Collective) -> Result<(), CollectiveError> {
    let deadline = Instant::now() + JOIN_LIMIT;
    collective.start(Operation { kind: Kind::Barrier, data: None })?;
    let mut passed = 1;
    loop {
        passed += collective.arrivals()?.len();
        if passed == collective.world_size() as usize {
            return Ok(());
        }
        if Instant::now() > deadline {
            let what = format!("only {passed} ranks could be reached within {JOIN_LIMIT:?}");
            return Err(CollectiveError::System { action: "joining", what });
        }
        collective.wait(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, thread};

    use super::*;
    use crate::{discover::discover, plan::PlanOptions, synth::Synth};

    fn joining(rank: u32, plan: &Plan) -> Arc<HostJoin> {
        Arc::new(HostJoin {
            place: Place::new(rank, 2, "127.0.0.1", 29500).unwrap(),
            transport: Transport::Auto,
            address: Ipv4Addr::LOCALHOST.into(),
            form: Form { world_size: 2, slots: 2, slot_bytes: 4096 },
            receive_slots: 1,
            nccl: None,
            plan: plan.clone(),
            former: None,
            announced: Mutex::default(),
        })
    }

    /// A rank that is lost while the others join leaves them waiting for it there; the generation that follows neither waits for
    /// that nor loses what it has announced to it.
    #[test]
    fn a_generation_is_joined_while_an_older_one_is_still_waited_for() {
        let scratch = tempfile::tempdir().unwrap();
        Synth::new("llama", "bf16").write(scratch.path()).unwrap();
        let options = PlanOptions { tp: 2, ..PlanOptions::default() };
        let plan = Plan::new(discover(scratch.path()).unwrap(), &options).unwrap();
        let (one, other) = (joining(0, &plan), joining(1, &plan));
        let roster = [one.announce(1).unwrap(), other.announce(1).unwrap()];
        let waiting = {
            let (one, roster) = (Arc::clone(&one), roster.clone());
            thread::spawn(move || one.join(1, &roster).map(|_| ()))
        };
        while one.announced.lock().unwrap().is_some() {
            thread::yield_now();
        }
        let began = Instant::now();
        let next = [one.announce(2).unwrap(), other.announce(2).unwrap()];
        // one that is late even for this
        assert!(one.join(1, &roster).is_err());
        let joined = {
            let (one, next) = (Arc::clone(&one), next.clone());
            thread::spawn(move || one.join(2, &next).map(|_| ()))
        };
        other.join(2, &next).unwrap();
        joined.join().unwrap().unwrap();
        assert!(began.elapsed() < JOIN_LIMIT / 2, "{:?}", began.elapsed());
        // it goes with what it waits for
        drop(waiting);
    }
}
