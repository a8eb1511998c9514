//! The plan of a load: placement and assignment, with what they will cost. Data; made once, then trusted.

mod check;
mod hash;
mod kept;

pub(crate) use self::{hash::plan_hash, kept::changed};

use std::sync::Arc;

use longshore_models::{
    arch::Model, byte_range::ByteRange, checkpoint::Checkpoint, dtype::elem_bytes,
    error::PlanError, have::Have, options::ModelOptions, parallel::Parallel, placement::Placement,
};
use longshore_rank::{
    protocol::{LoadPlan, PlanName, Read, ReadFrom},
    scatter::tensors_in,
    storage::FileIdentity,
    stream::slab_bytes,
};

use crate::{
    assignment::{Assignment, FormerGroup, Policy, assign, assign_over, assign_rest},
    discover::Discovered,
    error::LoadError,
    origin::Origin,
};

/// Whether ranks pass bytes to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Exchange {
    /// Whichever the cost model prefers.
    #[default]
    Auto,
    /// Each byte is read once.
    On,
    /// Each rank reads all that it needs.
    Off,
}

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub struct PlanOptions {
    /// Tensor-parallel size.
    pub tp: u32,
    /// Expert-parallel size.
    pub ep: u32,
    /// Which part of the model, finished for which kernels.
    pub model: ModelOptions,
    /// Whether ranks exchange bytes.
    pub exchange: Exchange,
    /// Staging memory that a rank may hold, in bytes.
    pub memory_limit: u64,
    /// The longest read, in bytes; `None`: [`READ_BYTES`] or [`REMOTE_READ_BYTES`], or less where the memory limit wants it.
    pub read_bytes: Option<u64>,
}

impl Default for PlanOptions {
    /// One rank, everything else as the command line has it by default.
    fn default() -> Self {
        Self {
            tp: 1,
            ep: 1,
            model: ModelOptions::default(),
            exchange: Exchange::Auto,
            memory_limit: MEMORY_LIMIT,
            read_bytes: None,
        }
    }
}

/// The longest read by default. 2 MiB keep one virtual disk busy with 16 in flight (2.40 GB/s; 8 MiB × 4: 2.24), and a
/// slab of it stays in a core's cache between the read and the copy.
pub const READ_BYTES: u64 = 2 << 20;

/// The same, where each request takes a while to be answered: 8 MiB keep what a request costs below a tenth of what it brings
/// (some 30 ms at 100 MB/s, what one connection to an object store gives). Source: the part sizes of today's clients, 8 MiB
/// in AWS's CRT and Run:ai's streamer.
pub const REMOTE_READ_BYTES: u64 = 8 << 20;

/// Staging memory of a rank by default.
pub const MEMORY_LIMIT: u64 = 512 << 20;

/// The least `--memory-limit` that can work: one slab of the smallest read.
pub const MEMORY_LIMIT_MIN: u64 = 128 << 10;

/// Without exchange: gaps up to this length are read through. A read costs about as much as 64 KiB of bandwidth.
const GAP_BYTES: u64 = 64 << 10;

/// What a rank that replaces another reads through between the runs of a row-parallel weight: a block of a disk, which is
/// read whole in any case.
const ROW_GAP_BYTES: u64 = 4 << 10;

/// The same, where each request takes a while to be answered: the time that a request costs brings some 3 MB (see
/// [`REMOTE_READ_BYTES`]), but what is read through also takes bandwidth from others.
const REMOTE_ROW_GAP_BYTES: u64 = 1 << 20;

/// What one rank will do. Sizes in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RankForecast {
    /// Weight bytes that it will ask of storage.
    pub storage_bytes: u64,
    /// Reads that it will issue.
    pub reads: u64,
    /// Bytes that it will receive from other ranks.
    pub received_bytes: u64,
    /// Bytes that it will hand to other ranks.
    pub sent_bytes: u64,
}

/// A checked plan; cheap to clone.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where the checkpoint's files are.
    pub origin: Origin,
    /// What its files were when they were planned for; a load reads no others.
    pub identities: Arc<Vec<FileIdentity>>,
    /// The model.
    pub model: Model,
    /// What the ranks agree on.
    pub load: Arc<LoadPlan>,
    /// What each rank will do.
    pub forecast: Vec<RankForecast>,
    /// Checkpoint bytes that any rank needs, each counted once.
    pub needed_bytes: u64,
    /// Bytes of headers that were read.
    pub header_bytes: u64,
    /// Exchange rounds.
    pub rounds: u32,
    /// Why exchange is on or off.
    pub exchange_reason: String,
    /// Staging memory that a rank may hold.
    pub memory_limit: u64,
}

impl Plan {
    /// Plans a load of `discovered`.
    ///
    /// # Errors
    /// Whatever makes a complete and correct load impossible; see [`Placement::new`].
    pub fn new(discovered: Discovered, options: &PlanOptions) -> Result<Self, LoadError> {
        let header_bytes = discovered.header_bytes();
        let Discovered { origin, config, hf_quant_config, checkpoint, identities } = discovered;
        let refused = |source| LoadError::Plan { path: origin.shown().into(), source };
        let parallel = Parallel::new(options.tp, options.ep).map_err(refused)?;
        let model = Model::new(config, hf_quant_config.as_ref(), options.model).map_err(refused)?;
        let placement = Placement::new(&model, &checkpoint, parallel).map_err(refused)?;
        let remote = origin.is_remote();
        let read_bytes = read_bytes(options, remote)?;
        let needed_bytes = placement.needed_bytes(&checkpoint);
        let (exchange, exchange_reason) =
            choose_exchange(options.exchange, remote, &placement, &checkpoint, read_bytes);
        let Assignment { reads, rounds, settled } =
            assign(&placement, &checkpoint, &policy(exchange, read_bytes, remote));
        let load = LoadPlan {
            checkpoint: Arc::new(checkpoint),
            placement: Arc::new(placement),
            reads,
            settled,
            exchange,
            read_bytes_max: read_bytes,
        };
        check_needed(&load, needed_bytes).map_err(refused)?;
        Ok(Self {
            forecast: forecast(&load),
            origin,
            identities: Arc::new(identities),
            model,
            load: Arc::new(load),
            needed_bytes,
            header_bytes,
            rounds,
            exchange_reason,
            memory_limit: options.memory_limit,
        })
    }

    /// The plan of the next attempt at this load, of which each rank has some already (in order, one for each).
    ///
    /// # Errors
    /// What a rank has cuts an element, or is not told of every rank.
    pub fn rest(&self, have: &[Have]) -> Result<LoadPlan, LoadError> {
        let refused = |source| LoadError::Plan { path: self.origin.shown().into(), source };
        let LoadPlan { checkpoint, placement, exchange, read_bytes_max, .. } = &*self.load;
        check_have(checkpoint, have, placement.parallel.tp() as usize).map_err(refused)?;
        let policy = policy(*exchange, *read_bytes_max, self.origin.is_remote());
        let rest = assign_rest(placement, checkpoint, &policy, have);
        let load = self.assigned(Arc::clone(placement), rest);
        check::check_reads(&load, have, None).map_err(refused)?;
        Ok(load)
    }

    /// The plan of the same checkpoint for the ranks that are left of this plan's group: as many of the first as the model can
    /// be split over hold it, the others hold nothing.
    ///
    /// # Errors
    /// The last size that was tried cannot be planned either.
    pub fn for_fewer(&self, ranks: u32) -> Result<Self, LoadError> {
        let parallel = self.placement().parallel;
        let mut tp = ranks.min(parallel.tp());
        loop {
            // experts stay in groups as far as these are of whole ranks
            let ep = (1..=parallel.ep()).rev().find(|ep| tp % ep == 0 && parallel.ep() % ep == 0);
            match self.of_size(tp, ep.unwrap_or(1), ranks as usize) {
                Err(_) if tp > 1 => tp -= 1,
                planned => return planned,
            }
        }
    }

    /// The same plan in a group of only those ranks that hold parameters.
    pub(crate) fn without_idle(&self) -> Self {
        let holders = self.placement().parallel.tp() as usize;
        if self.load.reads.len() == holders {
            return self.clone();
        }
        let Self { load, forecast, .. } = self.clone();
        let assignment = Assignment {
            reads: load.reads[..holders].to_vec(),
            rounds: self.rounds,
            settled: load.settled.clone(),
        };
        let load = self.assigned(Arc::clone(&load.placement), assignment);
        let forecast = forecast[..holders].to_vec();
        Self { load: Arc::new(load), forecast, ..self.clone() }
    }

    /// The plan of the same checkpoint for `tp` ranks, in a group of more.
    fn of_size(&self, tp: u32, ep: u32, group: usize) -> Result<Self, LoadError> {
        let refused = |source| LoadError::Plan { path: self.origin.shown().into(), source };
        let LoadPlan { checkpoint, exchange, read_bytes_max, .. } = &*self.load;
        let parallel = Parallel::new(tp, ep).map_err(refused)?;
        let placement = Placement::new(&self.model, checkpoint, parallel).map_err(refused)?;
        let policy = policy(*exchange, *read_bytes_max, self.origin.is_remote());
        let assignment = assign(&placement, checkpoint, &policy).over(group);
        let rounds = assignment.rounds;
        let load = self.assigned(Arc::new(placement), assignment);
        check_needed(&load, self.needed_bytes).map_err(refused)?;
        Ok(Self { forecast: forecast(&load), load: Arc::new(load), rounds, ..self.clone() })
    }

    /// The plan of the load of this smaller group, whose ranks had `have` (in order, one for each) in a former one, where their
    /// numbers were `ranks` and they loaded by `former`.
    ///
    /// # Errors
    /// What a rank had cuts an element, or is not told of every rank.
    pub fn after(
        &self,
        former: &Plan,
        ranks: &[u32],
        have: &[Have],
    ) -> Result<LoadPlan, LoadError> {
        let refused = |source| LoadError::Plan { path: self.origin.shown().into(), source };
        let LoadPlan { checkpoint, placement, exchange, read_bytes_max, .. } = &*self.load;
        check_have(checkpoint, have, ranks.len()).map_err(refused)?;
        let had = FormerGroup::new(former.placement(), ranks, have);
        let policy = policy(*exchange, *read_bytes_max, self.origin.is_remote());
        let over = assign_over(placement, checkpoint, &policy, &had);
        let load = self.assigned(Arc::clone(placement), over);
        let nothing = vec![Have::default(); placement.parallel.tp() as usize];
        check::check_reads(&load, &nothing, Some(&had)).map_err(refused)?;
        Ok(load)
    }

    /// Other reads of the same files.
    fn assigned(&self, placement: Arc<Placement>, assignment: Assignment) -> LoadPlan {
        let LoadPlan { checkpoint, exchange, read_bytes_max, .. } = &*self.load;
        let Assignment { reads, settled, .. } = assignment;
        LoadPlan {
            checkpoint: Arc::clone(checkpoint),
            placement,
            reads,
            settled,
            exchange: *exchange,
            read_bytes_max: *read_bytes_max,
        }
    }

    /// [`Plan::rest`], which is this plan itself where no rank has anything.
    ///
    /// # Errors
    /// As that.
    pub(crate) fn left(&self, have: &[Have]) -> Result<Arc<LoadPlan>, LoadError> {
        if have.iter().all(Have::is_empty) {
            return Ok(Arc::clone(&self.load));
        }
        self.rest(have).map(Arc::new)
    }

    /// What ranks that plan on their own have to agree on.
    pub(crate) fn hash(&self) -> PlanName {
        plan_hash(&self.load)
    }

    /// Where each byte belongs.
    pub fn placement(&self) -> &Placement {
        &self.load.placement
    }

    /// The checkpoint's headers.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.load.checkpoint
    }

    /// Slabs that fit into the memory limit.
    pub fn slabs_max(&self) -> u64 {
        (self.memory_limit / slab_bytes(self.load.read_bytes_max)).max(1)
    }
}

fn read_bytes(options: &PlanOptions, remote: bool) -> Result<u64, LoadError> {
    if options.memory_limit < MEMORY_LIMIT_MIN {
        let reason =
            format!("{} bytes; at least {MEMORY_LIMIT_MIN} are needed", options.memory_limit);
        return Err(LoadError::Option { option: "--memory-limit", reason });
    }
    let wanted = options.read_bytes.unwrap_or(if remote { REMOTE_READ_BYTES } else { READ_BYTES });
    // room for a handful of slabs where the limit allows it, for one in any case
    let fits = (options.memory_limit / 4).max(MEMORY_LIMIT_MIN / 2);
    let fits = (1 << fits.ilog2()).min(options.memory_limit - slab_bytes(0));
    Ok(wanted.min(fits))
}

fn policy(exchange: bool, read_bytes: u64, remote: bool) -> Policy {
    let row_gap_bytes = if remote { REMOTE_ROW_GAP_BYTES } else { ROW_GAP_BYTES };
    Policy { exchange, read_bytes, gap_bytes: GAP_BYTES, row_gap_bytes }
}

/// Storage costs at least as much per byte as handing it on within a host, so `auto` compares bytes read alone.
fn choose_exchange(
    choice: Exchange,
    remote: bool,
    placement: &Placement,
    checkpoint: &Checkpoint,
    read_bytes: u64,
) -> (bool, String) {
    match choice {
        Exchange::On => (true, "asked for".into()),
        Exchange::Off => (false, "asked for".into()),
        Exchange::Auto if placement.parallel.tp() == 1 => {
            (true, "one rank: nothing to pass on".into())
        }
        Exchange::Auto if remote => (true, "each byte is fetched once".into()),
        Exchange::Auto => {
            let needed_bytes = placement.needed_bytes(checkpoint);
            let alone = assign(placement, checkpoint, &policy(false, read_bytes, remote));
            let bytes: u64 = alone.reads.iter().flatten().map(|r| r.range.len()).sum();
            let reason = format!("{needed_bytes} bytes to read with exchange, {bytes} without");
            (needed_bytes <= bytes, reason)
        }
    }
}

/// What a rank says that it has may be any numbers: it has to be of whole elements, which alone can be converted.
fn check_have(checkpoint: &Checkpoint, have: &[Have], ranks: usize) -> Result<(), PlanError> {
    let wrong = |what, found| Err(PlanError::Inconsistent { what, found });
    if have.len() != ranks {
        return wrong("what ranks have".into(), format!("of {} ranks of {ranks}", have.len()));
    }
    for (rank, have) in have.iter().enumerate() {
        for (file, ranges) in have.files() {
            let mut ends = ranges.ranges().iter().flat_map(|range| [range.start, range.end]);
            if let Some(end) = ends.find(|end| cuts_element(checkpoint, file, *end)) {
                let found = format!("its byte {end} of file {file} is within an element");
                return wrong(format!("what rank {rank} has"), found);
            }
        }
    }
    Ok(())
}

fn cuts_element(checkpoint: &Checkpoint, file: u32, at: u64) -> bool {
    let Some(before) = at.checked_sub(1) else { return false };
    let mut tensors = checkpoint.tensors_in(file, ByteRange::new(before, at));
    tensors.next().is_some_and(|(tensor, within, _)| {
        within.end % elem_bytes(checkpoint.tensors[tensor as usize].dtype) != 0
    })
}

/// With exchange the reads of a first load cover the needed bytes, each once. A violation is a bug of ours.
fn check_needed(load: &LoadPlan, needed_bytes: u64) -> Result<(), PlanError> {
    if !load.exchange {
        return Ok(());
    }
    let mut all: Vec<&Read> = load.reads.iter().flatten().collect();
    all.sort_by_key(|r| (r.file, r.range.start));
    let overlap =
        all.windows(2).any(|w| w[0].file == w[1].file && w[0].range.end > w[1].range.start);
    let bytes: u64 = all.iter().map(|r| r.range.len()).sum();
    if overlap || bytes != needed_bytes {
        let found = format!("reads cover {bytes} of {needed_bytes} bytes, overlap: {overlap}");
        return Err(PlanError::Inconsistent { what: "the assignment".into(), found });
    }
    Ok(())
}

/// How many bytes each rank of a load will read from storage.
pub fn storage_bytes(load: &LoadPlan) -> Vec<u64> {
    let bytes = |reads: &Vec<Read>| {
        let stored = reads.iter().filter(|read| read.from == ReadFrom::Storage);
        stored.map(|read| read.range.len()).sum()
    };
    load.reads.iter().map(bytes).collect()
}

fn forecast(load: &LoadPlan) -> Vec<RankForecast> {
    let mut forecast = vec![RankForecast::default(); load.reads.len()];
    for (reader, reads) in load.reads.iter().enumerate() {
        for read in reads {
            if read.from == ReadFrom::Storage {
                forecast[reader].storage_bytes += read.range.len();
                forecast[reader].reads += 1;
            }
            if read.round.is_none() {
                continue;
            }
            for (tensor, within, _) in tensors_in(&load.checkpoint, read.file, read.range) {
                load.placement.spans(
                    tensor,
                    within,
                    |r| r != reader as u32 && load.takes(r, read),
                    |span| {
                        forecast[reader].sent_bytes += span.source_bytes();
                        forecast[span.rank as usize].received_bytes += span.source_bytes();
                    },
                );
            }
        }
    }
    forecast
}
