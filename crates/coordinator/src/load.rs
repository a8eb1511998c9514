//! The whole load on one screen: open the files, check the memory, run the ranks, collect what they hold.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use longshore_kernels::{cuda::driver::Device, host::cast::cast};
use longshore_models::{
    Dtype,
    byte_range::ByteRange,
    checkpoint::{Checkpoint, TensorId},
    have::Kept,
};
use longshore_rank::{
    collective::nccl,
    device::Form,
    params::{Home, ParamMemory, ReadyParams},
    protocol::{Generation, LoadPlan, Progress, RankReport, Work},
    staging::DIRECT_ALIGNMENT,
    storage::{CheckpointSource, FileIdentity, IoChoice},
    stream::slab_bytes,
};
use ractor::Actor;
use tokio::sync::{mpsc, oneshot};
use tracing::info;

use crate::{
    coordination::Recovery,
    device::{self, DeviceChoice},
    error::LoadError,
    group::Group,
    origin::Origin,
    place::Place,
    plan::Plan,
    processes::{STUCK_AFTER, Transport},
    report::bytes_text,
    supervisor::{Member, Supervisor, SupervisorArguments, SupervisorMessage},
    verify::{Verified, verify},
};

/// How a planned load is carried out.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Through the page cache or past it.
    pub io: IoChoice,
    /// Reads in flight per rank; `None`: what storage and cores suggest.
    pub concurrency: Option<usize>,
    /// A rank that has work in hand and does not get on for so long has failed.
    pub stuck_after: Duration,
    /// Where parameters live.
    pub device: DeviceChoice,
    /// Whether every weight file is verified first against what its source publishes.
    pub verify: bool,
}

impl Default for RunOptions {
    /// What the command line has by default, with parameters in the host's memory.
    fn default() -> Self {
        let (io, device) = (IoChoice::Auto, DeviceChoice::Cpu);
        Self { io, concurrency: None, stuck_after: STUCK_AFTER, device, verify: false }
    }
}

/// The counters of a load's ranks, to be watched while it runs.
pub fn progress_of(plan: &Plan) -> Vec<Arc<Progress>> {
    plan.load.reads.iter().map(|_| Arc::default()).collect()
}

/// A plan whose files are open; nothing has been read of the weights.
#[derive(Debug)]
pub struct Prepared {
    pub(crate) plan: Plan,
    pub(crate) options: RunOptions,
    /// What looked odd in the values that validation reads.
    pub(crate) warnings: Vec<String>,
    /// Which files were verified, where that was asked for.
    pub(crate) verified: Option<Verified>,
    sources: Arc<Vec<CheckpointSource>>,
    /// When these were opened, or the first of them that were read for this load.
    pub(crate) opened: SystemTime,
    concurrency: usize,
    /// Where the parameters of each rank of this process live.
    pub(crate) homes: Vec<Home>,
    pinned_slabs: u32,
    device_form: Form,
    nccl_form: Option<nccl::Form>,
    /// What the ranks exchange through, where they are processes.
    pub(crate) exchange_staging: Option<ExchangeStaging>,
    pub(crate) opening_seconds: f64,
}

impl Prepared {
    /// What each rank does.
    pub(crate) fn work(&self) -> Arc<Work> {
        Arc::new(Work {
            plan: Arc::clone(&self.plan.load),
            sources: Arc::clone(&self.sources),
            concurrency: self.concurrency,
            pinned_slabs: self.pinned_slabs,
            device_form: self.device_form,
        })
    }

    /// Of which some was read since `opened`.
    pub(crate) fn since(self, opened: SystemTime) -> Self {
        Self { opened, ..self }
    }

    /// What stays in memory of which all else is `changed`.
    pub(crate) fn kept(&self, changed: &[bool]) -> Arc<Kept> {
        let kept = self.plan.kept(changed);
        if !kept.is_empty() {
            let (bytes, of) = (bytes_text(kept.bytes), bytes_text(self.plan.needed_bytes));
            info!("{bytes} of {of} are in place already: their files are the same");
        }
        Arc::new(kept)
    }

    /// What this process's rank would bring to an exchange over NCCL, and where.
    pub(crate) fn nccl(&self) -> Option<(nccl::Form, Arc<Device>)> {
        match (self.nccl_form, self.homes.first()) {
            (Some(form), Some(Home::Device(device))) => Some((form, Arc::clone(device))),
            _ => None,
        }
    }
}

/// Operations over NCCL that may be under way at a time: one that is packed, one on the wire, two that are placed.
const NCCL_DEPTH: u32 = 4;

/// What an exchange over NCCL sets aside, as deep as `room` bytes of device memory allow.
fn nccl_form(staging: ExchangeStaging, world_size: u32, room: u64) -> Option<nccl::Form> {
    let form = |depth| nccl_form_of(staging, world_size, depth);
    (1..=NCCL_DEPTH).rev().map(form).find(|form| form.device_bytes() <= room)
}

fn nccl_form_of(staging: ExchangeStaging, world_size: u32, depth: u32) -> nccl::Form {
    let ExchangeStaging { slots, slot_bytes, .. } = staging;
    nccl::Form { world_size, slots, slot_bytes, depth }
}

/// The memory that a rank process passes bytes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExchangeStaging {
    /// Slots that it sends from.
    pub(crate) slots: u32,
    /// Bytes of a slot: one read.
    pub(crate) slot_bytes: u64,
    /// Slots that it receives into, for each connection to another host.
    pub(crate) receive_slots: u32,
    /// What all of them take.
    pub(crate) bytes: u64,
}

/// Opens the files of `plan` and makes sure that the host has the memory for it, with all ranks in this process.
///
/// # Errors
/// A file cannot be opened or is not the one that was planned for, or memory is short.
pub fn prepare(plan: &Plan, options: &RunOptions) -> Result<Prepared, LoadError> {
    prepare_into(plan, options, plan.placement().parameter_bytes())
}

/// [`prepare`], for ranks that have to allocate `parameter_bytes` each (0: their memory is there already).
pub(crate) fn prepare_into(
    plan: &Plan,
    options: &RunOptions,
    parameter_bytes: u64,
) -> Result<Prepared, LoadError> {
    let ranks = plan.load.reads.len() as u32;
    let homes = device::homes(options.device, 0..ranks, ranks)?;
    let here = Here { ranks, first: 0, homes, held: parameter_bytes == 0, nccl: false };
    prepare_ranks(plan, options, here, |_, _| Ok(None))
}

/// [`prepare`], for the one rank that this process is.
pub(crate) fn prepare_process(
    plan: &Plan,
    options: &RunOptions,
    place: &Place,
    transport: Transport,
) -> Result<Prepared, LoadError> {
    prepare_process_into(plan, options, place, transport, false)
}

/// [`prepare_process`], where the parameters may have their memory already.
pub(crate) fn prepare_process_into(
    plan: &Plan,
    options: &RunOptions,
    place: &Place,
    transport: Transport,
    held: bool,
) -> Result<Prepared, LoadError> {
    let here = place.local_world_size.unwrap_or(1);
    let distant = match transport {
        Transport::Auto | Transport::Host | Transport::Nccl => {
            place.world_size.saturating_sub(here)
        }
        Transport::Tcp => place.world_size - 1,
    };
    let local = place.local_rank;
    let homes = device::homes(options.device, [local], here.max(local + 1))?;
    // whether ranks share devices is known once all have said which theirs are
    let nccl = matches!(transport, Transport::Auto | Transport::Nccl);
    let here = Here { ranks: here, first: place.rank, homes, held, nccl };
    let prepared = prepare_ranks(plan, options, here, |concurrency, slabs| {
        exchange_staging(plan, concurrency, slabs, distant).map(Some)
    })?;
    if transport == Transport::Nccl {
        refuse_without_nccl(&prepared)?;
    }
    Ok(prepared)
}

/// Refuses an exchange over NCCL that is asked for where there is something to exchange, but nothing to do it with.
fn refuse_without_nccl(prepared: &Prepared) -> Result<(), LoadError> {
    let plan = &prepared.plan;
    let refused = |option, reason| Err(LoadError::Option { option, reason });
    match (prepared.homes.first(), prepared.nccl_form, prepared.exchange_staging) {
        (Some(Home::Host), ..) => {
            let reason = "parameters live in the host's memory; --device cuda puts them on devices";
            refused("--transport nccl", reason.into())
        }
        (_, None, Some(staging)) if plan.rounds > 0 => {
            let slab = slab_bytes(plan.load.read_bytes_max);
            let least = nccl_form_of(staging, plan.load.reads.len() as u32, 1).device_bytes()
                + Form::within(plan.memory_limit, 1, slab).device_bytes();
            let reason = format!(
                "{} bytes; NCCL between {} ranks needs {least} (reads of {} bytes)",
                plan.memory_limit,
                plan.load.reads.len(),
                plan.load.read_bytes_max,
            );
            refused("--memory-limit", reason)
        }
        _ => Ok(()),
    }
}

/// The ranks that share this host, as far as is known here.
struct Here {
    /// How many there are, those in other processes included.
    ranks: u32,
    /// The first that is in this process.
    first: u32,
    /// Where those of this process live.
    homes: Vec<Home>,
    /// Their parameters have their memory already.
    held: bool,
    /// They may exchange over NCCL.
    nccl: bool,
}

fn prepare_ranks(
    plan: &Plan,
    options: &RunOptions,
    here: Here,
    exchange: impl FnOnce(&mut usize, &mut u64) -> Result<Option<ExchangeStaging>, LoadError>,
) -> Result<Prepared, LoadError> {
    let (started, opened) = (Instant::now(), SystemTime::now());
    let share = (here.first as usize, plan.load.reads.len() / here.homes.len().max(1));
    let sources = open_sources(&plan.origin, plan.checkpoint(), &plan.identities, options.io)?;
    let mut concurrency = concurrency(plan, options, &sources, here.ranks);
    let on_device = here.homes.iter().any(|home| matches!(home, Home::Device(_)));
    // on the way to a device, bytes stay in a slab for longer than their read takes
    let mut slabs_per_read = if on_device { 2 } else { 1 };
    let exchange_staging = exchange(&mut concurrency, &mut slabs_per_read)?;
    let slabs = (concurrency as u64 * slabs_per_read).min(plan.slabs_max());
    let slab = slab_bytes(plan.load.read_bytes_max);
    let staging_bytes = slabs * slab + exchange_staging.map_or(0, |s| s.bytes);
    let host_parameters = match here.held || on_device {
        true => 0,
        false => plan.placement().parameter_bytes(),
    };
    check_host_memory(here.ranks, host_parameters, staging_bytes)?;
    let Here { first, homes, held, nccl, .. } = here;
    let nccl = nccl && on_device && plan.rounds > 0;
    let nccl_form = exchange_staging.filter(|_| nccl).and_then(|staging| {
        let one_slab = Form::within(plan.memory_limit, 1, slab).device_bytes();
        let room = plan.memory_limit.saturating_sub(one_slab);
        nccl_form(staging, plan.load.reads.len() as u32, room)
    });
    let for_nccl = nccl_form.map_or(0, |form| form.device_bytes());
    let device_form = Form::within(plan.memory_limit - for_nccl, slabs as u32, slab);
    let on_device = device_form.device_bytes() + for_nccl;
    device::check_memory(&homes, first, plan.placement(), on_device, held)?;
    let verified = match options.verify {
        true => Some(verify(&plan.origin, &sources, share)?),
        false => None,
    };
    Ok(Prepared {
        warnings: discarded_scalars(plan, &sources)?,
        verified,
        plan: plan.clone(),
        options: *options,
        sources: Arc::new(sources),
        opened,
        concurrency,
        homes,
        pinned_slabs: slabs as u32,
        device_form,
        nccl_form,
        exchange_staging,
        opening_seconds: started.elapsed().as_secs_f64(),
    })
}

/// Slots beyond one for each read in flight: what was read waits in them until the others have taken it.
const SLOTS_AHEAD: u64 = 4;

/// Shares the staging memory of a rank process out: slabs for its reads in flight, slots to receive into for each of `distant`
/// ranks, and slots to send from; reads in flight become fewer where that is the only way.
fn exchange_staging(
    plan: &Plan,
    concurrency: &mut usize,
    slabs_per_read: &mut u64,
    distant: u32,
) -> Result<ExchangeStaging, LoadError> {
    let slab = slab_bytes(plan.load.read_bytes_max);
    let slot_bytes = plan.load.read_bytes_max.next_multiple_of(DIRECT_ALIGNMENT);
    let left = |in_flight: u64, slabs_per_read: u64, receive_slots: u64| {
        let taken =
            in_flight * slabs_per_read * slab + u64::from(distant) * receive_slots * slot_bytes;
        plan.memory_limit.checked_sub(taken).map(|left| left / slot_bytes)
    };
    let most = *slabs_per_read;
    let shares = (1..=*concurrency as u64).rev().flat_map(|in_flight| {
        [(most, 2), (most, 1), (1, 2), (1, 1)].map(|(slabs, receive)| (in_flight, slabs, receive))
    });
    for (in_flight, slabs, receive_slots) in shares {
        let wanted = in_flight + SLOTS_AHEAD;
        match left(in_flight, slabs, receive_slots) {
            // half of what is wanted keeps reads going; less is taken only where there is no other way
            Some(slots) if slots >= wanted.div_ceil(2) || (in_flight == 1 && slots > 0) => {
                (*concurrency, *slabs_per_read) = (in_flight as usize, slabs);
                let slots = slots.min(wanted);
                let bytes = (slots + u64::from(distant) * receive_slots) * slot_bytes;
                let (slots, receive_slots) = (slots as u32, receive_slots as u32);
                return Ok(ExchangeStaging { slots, slot_bytes, receive_slots, bytes });
            }
            _ => {}
        }
    }
    let needed = slab + (u64::from(distant) + 1) * slot_bytes;
    let reason = format!(
        "{} bytes; ranks that are processes need {needed} (reads of {} bytes, {distant} ranks reached by TCP)",
        plan.memory_limit, plan.load.read_bytes_max
    );
    Err(LoadError::Option { option: "--memory-limit", reason })
}

/// Runs a prepared load, with all ranks as actors of this process.
///
/// Returns only when every parameter of every rank is complete. `progress` comes from [`progress_of`].
///
/// # Errors
/// The first failure of any rank; all ranks are stopped and nothing is handed out.
///
/// # Cancel safety
/// Dropping the future lets the ranks go on until they are done; their memory is freed then.
pub async fn run(prepared: Prepared, progress: Vec<Arc<Progress>>) -> Result<Group, LoadError> {
    let finished = attempt(&prepared, FIRST_GENERATION, None, progress).await?;
    given_back(&finished.ranks).await;
    Ok(Group::new(prepared, finished))
}

/// The generation of a first load.
const FIRST_GENERATION: Generation = 1;

/// What one attempt at a load ended with.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) ranks: Vec<ReadyParams>,
    pub(crate) reports: Vec<RankReport>,
    pub(crate) generation: Generation,
    pub(crate) seconds: f64,
}

/// Memory that is loaded into again.
#[derive(Debug)]
pub(crate) struct Reuse {
    /// Of each rank.
    pub(crate) memory: Vec<Arc<ParamMemory>>,
    /// What of it is not written.
    pub(crate) kept: Arc<Kept>,
    /// How all else is.
    pub(crate) left: Arc<LoadPlan>,
}

/// One attempt at a load: into new memory, or into `reuse` in place.
pub(crate) async fn attempt(
    prepared: &Prepared,
    generation: Generation,
    reuse: Option<Reuse>,
    progress: Vec<Arc<Progress>>,
) -> Result<Finished, LoadError> {
    let started = Instant::now();
    let mut work = prepared.work();
    if let Some(Reuse { left, .. }) = &reuse {
        work = Arc::new(Work { plan: Arc::clone(left), ..(*work).clone() });
    }
    let kept = reuse.as_ref().map_or_else(Arc::default, |reuse| Arc::clone(&reuse.kept));
    let member = |(rank, progress): (usize, Arc<Progress>)| Member::Here {
        work: Arc::clone(&work),
        home: prepared.homes[rank].clone(),
        reuse: reuse.as_ref().map(|reuse| Arc::clone(&reuse.memory[rank])),
        kept: Arc::clone(&kept),
        progress,
    };
    let ranks: Vec<Member> = progress.into_iter().enumerate().map(member).collect();
    // threads of one process have nothing to gather
    let (gathered, _) = mpsc::channel(1);
    let arguments = SupervisorArguments {
        world_size: ranks.len() as u32,
        holders: ranks.len() as u32,
        ranks,
        stuck_after: prepared.options.stuck_after,
        recovery: Recovery::NONE,
        before: (Vec::new(), 0),
        admissions: None,
        gathered,
    };
    let (supervisor, handle) = Actor::spawn(None, Supervisor, arguments)
        .await
        .map_err(|e| LoadError::Runtime(e.to_string()))?;
    let (done, outcome) = oneshot::channel();
    // an actor that is gone drops `done`
    let _ = supervisor.cast(SupervisorMessage::Load { generation, done });
    let outcome = outcome.await.map_err(|e| LoadError::Runtime(e.to_string()));
    let seconds = prepared.opening_seconds + started.elapsed().as_secs_f64();
    // the actors have nothing left to do; only their mailboxes go away here
    supervisor.stop(None);
    handle.await.map_err(|e| LoadError::Runtime(e.to_string()))?;
    drop((work, reuse));
    let (ranks, reports): (Vec<Option<ReadyParams>>, _) =
        outcome??.complete()?.ranks.into_iter().unzip();
    check_unchanged(prepared)?;
    let missing = || LoadError::Runtime("a rank's parameters are in another process".into());
    let ranks = ranks.into_iter().collect::<Option<Vec<_>>>().ok_or_else(missing)?;
    Ok(Finished { ranks, reports, generation, seconds })
}

/// Waits until nothing is left of a load but the parameters of `ranks`: whoever takes what memory a device has left finds
/// what was set aside for the load given back.
pub(crate) async fn given_back(ranks: &[ReadyParams]) {
    let deadline = Instant::now() + GIVEN_BACK_LIMIT;
    while !ranks.iter().all(ReadyParams::is_alone) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Threads that have nothing to do end at once; a communicator takes as long as NCCL lets it.
const GIVEN_BACK_LIMIT: Duration = Duration::from_secs(5);

/// The files are what they were when they were opened: bytes of a file that was written meanwhile may be half old, half
/// new.
pub(crate) fn check_unchanged(prepared: &Prepared) -> Result<(), LoadError> {
    match prepared.sources.iter().find(|source| source.has_changed()) {
        None => Ok(()),
        Some(source) => {
            let path = prepared.plan.origin.shown().join(&source.name);
            Err(LoadError::FileModified { path })
        }
    }
}

/// Reads the scalars that were discarded in favour of others and warns where the two differ (contract §2, "scalars"). A
/// few bytes for each layer, which no rank receives and which do not count as read.
fn discarded_scalars(plan: &Plan, sources: &[CheckpointSource]) -> Result<Vec<String>, LoadError> {
    let (checkpoint, discarded) = (plan.checkpoint(), &plan.placement().discarded);
    let values = scalars(plan, sources, discarded.iter().flat_map(|&(a, b)| [a, b]))?;
    let (mut count, mut first) = (0, None);
    for &(kept, discarded) in &plan.placement().discarded {
        let (a, b) = (values[&kept], values[&discarded]);
        if a.to_bits() != b.to_bits() {
            count += 1;
            let name = |id: u32| &checkpoint.tensors[id as usize].name;
            let (kept, discarded) = (name(kept), name(discarded));
            first.get_or_insert_with(|| format!("{discarded} is {b}, {kept} is {a}"));
        }
    }
    let text = |first| {
        format!("{count} scalars of fused layers differ and the first part's are used: {first}")
    };
    Ok(first.map(text).into_iter().collect())
}

/// Scalars that lie no further apart are read together. Writers put tensors of one type side by side, so those of a file are
/// few reads.
const SCALARS_APART: u64 = 64 << 10;

/// What is read together is no longer.
const SCALARS_TOGETHER: u64 = 4 << 20;

/// Reads of scalars at a time: where a request takes a while, many cost little more than one.
const SCALAR_READERS: usize = 16;

/// The values of scalar tensors.
fn scalars(
    plan: &Plan,
    sources: &[CheckpointSource],
    wanted: impl Iterator<Item = TensorId>,
) -> Result<HashMap<TensorId, f32>, LoadError> {
    let tensors = &plan.checkpoint().tensors;
    let place =
        |id: &TensorId| (tensors[*id as usize].file, tensors[*id as usize].file_range.start);
    let mut ids: Vec<TensorId> = wanted.collect();
    ids.sort_unstable_by_key(place);
    ids.dedup();
    let mut stretches: Vec<&[TensorId]> = Vec::new();
    let mut rest = &ids[..];
    while let Some(first) = rest.first() {
        let first = &tensors[*first as usize];
        let mut end = first.file_range.start;
        let together = rest.iter().take_while(|id| {
            let next = &tensors[**id as usize];
            let near = next.file == first.file
                && next.file_range.start <= end + SCALARS_APART
                && next.file_range.end <= first.file_range.start + SCALARS_TOGETHER;
            end = next.file_range.end;
            near
        });
        let (stretch, left) = rest.split_at(together.count().max(1));
        stretches.push(stretch);
        rest = left;
    }
    let next = AtomicUsize::new(0);
    let read = || -> Result<Vec<(TensorId, f32)>, LoadError> {
        let mut values = Vec::new();
        while let Some(stretch) = stretches.get(next.fetch_add(1, Ordering::Relaxed)) {
            read_scalars(plan, sources, stretch, &mut values)?;
        }
        Ok(values)
    };
    let readers = SCALAR_READERS.min(stretches.len());
    let panicked = |_| Err(LoadError::Runtime("a reader of scalars panicked".into()));
    let read: Result<Vec<_>, LoadError> = thread::scope(|scope| {
        let readers: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
        readers.into_iter().map(|reader| reader.join().unwrap_or_else(panicked)).collect()
    });
    Ok(read?.into_iter().flatten().collect())
}

/// Reads scalars that lie near each other in one file, in order.
fn read_scalars(
    plan: &Plan,
    sources: &[CheckpointSource],
    stretch: &[TensorId],
    values: &mut Vec<(TensorId, f32)>,
) -> Result<(), LoadError> {
    let tensor = |id: &TensorId| &plan.checkpoint().tensors[*id as usize];
    let (Some(first), Some(last)) = (stretch.first().map(tensor), stretch.last().map(tensor))
    else {
        return Ok(());
    };
    let range = ByteRange::new(first.file_range.start, last.file_range.end);
    let mut stored = vec![0; range.len() as usize];
    let source = &sources[first.file as usize];
    source.read_full(range, &mut stored).map_err(|e| {
        let (path, action) = (plan.origin.shown().join(&source.name), "reading a scalar");
        LoadError::Io { path, action, source: io::Error::other(e) }
    })?;
    for id in stretch {
        let at = tensor(id).file_range;
        let bytes = &stored[(at.start - range.start) as usize..(at.end - range.start) as usize];
        let mut single = [0; 4];
        if !cast(bytes, tensor(id).dtype, &mut single, Dtype::F32) {
            // the parameter is F32, so what no conversion is known for is F32 already
            single.copy_from_slice(bytes);
        }
        values.push((*id, f32::from_le_bytes(single)));
    }
    Ok(())
}

/// [`prepare`], then [`run`].
///
/// # Errors
/// As these two.
pub async fn load(
    plan: &Plan,
    options: &RunOptions,
    progress: Vec<Arc<Progress>>,
) -> Result<Group, LoadError> {
    run(prepare(plan, options)?, progress).await
}

/// Opens the files of `checkpoint`, which are those whose headers were read.
pub(crate) fn open_sources(
    origin: &Origin,
    checkpoint: &Checkpoint,
    identities: &[FileIdentity],
    io: IoChoice,
) -> Result<Vec<CheckpointSource>, LoadError> {
    let files = &checkpoint.files;
    let mut sources = Vec::with_capacity(files.len());
    for (file, planned) in files.iter().zip(identities) {
        let source = origin.open(&file.name, io, "opening")?;
        if !planned.is_still(&source.identity) {
            return Err(LoadError::FileChanged {
                path: origin.shown().join(&file.name),
                planned: planned.bytes,
                found: source.identity.bytes,
            });
        }
        sources.push(source);
    }
    let direct = sources.iter().filter(|s| s.mode.direct).count();
    if let Some(first) = sources.first() {
        info!(
            "{} files: {direct} read past the page cache, {} through it ({}: {}{})",
            sources.len(),
            sources.len() - direct,
            first.name,
            first.mode.reason,
            first
                .mode
                .resident
                .map(|r| format!(", {:.0} % resident", r * 100.0))
                .unwrap_or_default(),
        );
    }
    Ok(sources)
}

/// Requests to an object store, all ranks together: what one connection gives (some 100 MB/s) times this is more than most
/// networks carry. How many of them are under way is adapted below that.
const REMOTE_IN_FLIGHT: usize = 64;

/// Direct reads that keep a fast disk busy, all ranks together.
const DIRECT_IN_FLIGHT: usize = 16;

/// The most staging memory that a rank of `plan` takes unless it is told another number of reads in flight, in bytes:
/// every file read past the page cache; with `processes`, each rank one, all on this host.
pub fn staging_forecast(plan: &Plan, processes: bool) -> u64 {
    let mut in_flight =
        direct_in_flight(plan.load.reads.len()).min(plan.slabs_max() as usize).max(1);
    let slots = match processes {
        true => exchange_staging(plan, &mut in_flight, &mut 1, 0).ok(),
        false => None,
    };
    in_flight as u64 * slab_bytes(plan.load.read_bytes_max) + slots.map_or(0, |s| s.bytes)
}

fn direct_in_flight(ranks: usize) -> usize {
    (DIRECT_IN_FLIGHT / ranks).max(4)
}

/// Reads in flight per rank that the storage wants.
pub(crate) fn suggested_in_flight(sources: &[CheckpointSource], ranks: usize) -> usize {
    if sources.iter().any(CheckpointSource::is_remote) {
        return (REMOTE_IN_FLIGHT / ranks).max(4);
    }
    if sources.iter().any(|s| s.mode.direct) {
        return direct_in_flight(ranks);
    }
    // a buffered read is a copy by the CPU
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    (2 * cores / ranks).clamp(1, 16)
}

/// Reads in flight per rank: as many as were asked for or as the storage wants, within the staging memory.
fn concurrency(
    plan: &Plan,
    options: &RunOptions,
    sources: &[CheckpointSource],
    ranks_here: u32,
) -> usize {
    let suggested = suggested_in_flight(sources, ranks_here as usize);
    let count = options.concurrency.unwrap_or(suggested).max(1);
    count.min(plan.slabs_max() as usize)
}

/// Refuses up front what the host cannot hold: being killed halfway helps nobody. Bytes are those of each rank.
fn check_host_memory(
    ranks_here: u32,
    parameter_bytes: u64,
    staging_bytes: u64,
) -> Result<(), LoadError> {
    let ranks = u64::from(ranks_here);
    let parameters = ranks * parameter_bytes;
    let staging = ranks * staging_bytes;
    match available_memory() {
        Some(available) if parameters + staging > available => Err(LoadError::HostMemory {
            ranks: ranks as u32,
            needed: bytes_text(parameters + staging),
            parameters: bytes_text(parameters),
            staging: bytes_text(staging),
            available: bytes_text(available),
        }),
        _ => Ok(()),
    }
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{discover::discover, plan::PlanOptions, synth::Synth};

    /// The shares never exceed the limit; reads in flight give way to slots, and what cannot work is refused.
    #[test]
    fn staging_of_a_rank_process_is_shared_out_within_the_limit() {
        let scratch = tempfile::tempdir().unwrap();
        Synth::new("llama", "bf16").write(scratch.path()).unwrap();
        let mut refused = 0;
        for memory_limit in [128 << 10, 160 << 10, 200 << 10, 1 << 20, 16 << 20, 512 << 20] {
            let options = PlanOptions { tp: 2, memory_limit, ..PlanOptions::default() };
            let plan = Plan::new(discover(scratch.path()).unwrap(), &options).unwrap();
            for distant in [0, 1, 7, 63] {
                for asked in [1, 2, 16] {
                    let mut in_flight = asked;
                    let staging = exchange_staging(&plan, &mut in_flight, &mut 1, distant);
                    let Ok(staging) = staging else {
                        refused += 1;
                        continue;
                    };
                    let ExchangeStaging { slots, slot_bytes, receive_slots, bytes } = staging;
                    assert!((1..=asked).contains(&in_flight) && slots > 0 && receive_slots > 0);
                    let slabs = in_flight as u64 * slab_bytes(plan.load.read_bytes_max);
                    let received = u64::from(distant * receive_slots) * slot_bytes;
                    assert_eq!(bytes, received + u64::from(slots) * slot_bytes);
                    let all = slabs + bytes;
                    assert!(all <= memory_limit, "{memory_limit} {distant} {asked}: {all}");
                }
            }
        }
        assert!((10..60).contains(&refused), "{refused}");
    }
}
