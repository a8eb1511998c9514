//! A load onto ranks that are processes, of which this is one.

use std::sync::Arc;

use longshore_rank::{
    params::ReadyParams,
    protocol::{Generation, Progress},
};
use tokio::task::JoinHandle;

use super::{
    Load, Params, RankProgress,
    threads::{Background, progress},
};
use crate::{
    error::LoadError,
    load::{prepare_process, progress_of},
    place::Place,
    plan::Plan,
    processes::{self, Door, holder::Holder},
    report::{Done, RanksAs, Report},
};

impl Load {
    /// Plans, opens the files, and starts loading this process's rank together with all others, each of which does the same.
    ///
    /// ```no_run
    /// use longshore::{Load, Place};
    ///
    /// // in every process that torchrun, srun, Kubernetes or `longshore launch` has started
    /// let rank = Load::from("/models/Qwen3-8B").join(Place::from_env()?)?.wait()?;
    /// let down = rank.params()?.get("model.layers.0.mlp.down_proj.weight");
    /// # Ok::<(), longshore::LoadError>(())
    /// ```
    ///
    /// The same processes may load another model while they hold this one, with the same place: one load after the other, in
    /// the same order on all. Each takes one of the place's ports for as long as its ranks stay in touch.
    ///
    /// # Errors
    /// The source cannot be loaded with these options, or not on this host; or rank 0 finds no port to listen on.
    pub fn join(self, place: Place) -> Result<Joining, LoadError> {
        let ranks = self.tensor_parallel.unwrap_or(place.world_size);
        if ranks != place.world_size {
            let reason = format!("{ranks}, but the group has {} processes", place.world_size);
            return Err(LoadError::Option { option: "tensor_parallel", reason });
        }
        let door = Door::open(&place)?;
        let plan = self.planned(ranks)?;
        let prepared = prepare_process(&plan, &self.run, &place, self.group.transport)?;
        let runtime = Background::start()?;
        let (counters, group) = (progress_of(&plan), self.group);
        let progress = counters.clone();
        let joining = {
            let (place, source) = (place.clone(), self.source.clone());
            async move { processes::load(&place, door, &source, prepared, &group, counters).await }
        };
        let complete = runtime.spawn(joining);
        // a reload plans for as many, and then for those that are left
        let load = Self { tensor_parallel: Some(ranks), ..self };
        Ok(Joining { load, place, plan, progress, complete, runtime })
    }
}

/// A load that this process takes part in. Dropping it ends this rank, and with it the load.
#[derive(Debug)]
pub struct Joining {
    load: Load,
    place: Place,
    plan: Plan,
    progress: Vec<Arc<Progress>>,
    complete: JoinHandle<Result<Holder, LoadError>>,
    runtime: Background,
}

impl Joining {
    /// What the load does, on all ranks.
    pub fn plan(&self) -> Report {
        Report::forecast(&self.plan, &self.load.source, RanksAs::Processes)
    }

    /// On rank 0, how each rank is getting on, as of its last heartbeat; nothing elsewhere.
    pub fn progress(&self) -> Vec<RankProgress> {
        match self.place.rank {
            0 => progress(&self.plan, &self.progress),
            _ => Vec::new(),
        }
    }

    /// Waits until every parameter of every rank is complete, on all hosts.
    ///
    /// Blocks; in asynchronous code call it where that is allowed (`spawn_blocking`).
    ///
    /// # Errors
    /// On rank 0 the first failure of any rank; elsewhere that of this process, or [`LoadError::GroupEnded`] with what the
    /// coordinator says. Nothing is handed out. Of a group that went on with fewer ranks ([`Load::on_loss`]) those that have no
    /// part of the model end with [`LoadError::NotNeeded`], for which an exit code of 0 is right.
    ///
    /// # Panics
    /// When called within a runtime's own thread.
    pub fn wait(self) -> Result<Rank, LoadError> {
        let Self { load, complete, runtime, .. } = self;
        let ended = |e: tokio::task::JoinError| LoadError::Runtime(e.to_string());
        let holder = runtime.block_on(complete).map_err(ended)??;
        Ok(Rank { load, holder, runtime })
    }
}

/// This process's rank, complete like all others of its group.
///
/// It stays in touch with them until it is dropped or [left](Rank::leave), so that they can wait for each other
/// ([`Rank::barrier`]) and tell each other how to connect ([`Rank::all_gather`]). That a rank was lost is learned from these
/// two; a server's own connections tell it afterwards.
#[derive(Debug)]
pub struct Rank {
    load: Load,
    holder: Holder,
    runtime: Background,
}

impl Rank {
    /// Its parameters.
    ///
    /// # Errors
    /// A reload failed and could not be undone: the rank is not ready until another reload succeeds.
    pub fn params(&self) -> Result<Params<'_>, LoadError> {
        self.holder.params().map(Params)
    }

    /// Where it stands; in a smaller group than it joined, where that has lost ranks and was to go on without them
    /// ([`Load::on_loss`]).
    pub fn place(&self) -> &Place {
        self.holder.place()
    }

    /// The checkpoint that it holds, as it was named; changes only when a reload has succeeded on every rank.
    pub fn source(&self) -> &str {
        self.holder.source()
    }

    /// Counts the attempts at filling the group; the same on all ranks when a load or a reload has ended.
    pub fn generation(&self) -> Generation {
        self.holder.generation()
    }

    /// Loads another checkpoint into the same parameters, at the same addresses, on all ranks or on none. All of them call it,
    /// with the same source.
    ///
    /// First every rank makes sure that it can load it (headers, shapes, the same parameters, every file open and whole), then
    /// all write, and each returns when every one is complete. Whatever fails, no two ranks are ready with different weights.
    /// Files that are the same are not read again, and what is made of nothing else is not written ([`Report::kept_bytes`]).
    ///
    /// All have to call it within the [`progress_timeout`](crate::Load::progress_timeout) of each other: a rank that does not answer
    /// for so long is named, and the reload ends on all of them, for itself as well when it calls.
    ///
    /// Whoever looks at parameters borrows the rank, so nobody looks while they are written:
    ///
    /// ```compile_fail,E0502
    /// # use longshore::{Load, Place};
    /// # let mut rank = Load::from("/models/A").join(Place::from_env()?)?.wait()?;
    /// let params = rank.params()?;
    /// rank.reload("/models/B")?;
    /// let down = params.get("model.layers.0.mlp.down_proj.weight");
    /// # Ok::<(), longshore::LoadError>(())
    /// ```
    ///
    /// What was [handed over](crate::handover) to others is another matter; its module says what they have to do.
    ///
    /// # Errors
    /// * [`LoadError::NotReloaded`]: a rank cannot load it, was lost or does not answer, before the first write. The weights are untouched.
    /// * [`LoadError::Reload`]: it failed while writing. It says whether the old weights are back; if not,
    ///   [`Rank::params`] refuses until another reload succeeds.
    ///
    /// After the loss of a rank or of rank 0 nothing that takes all ranks is possible any more, another reload included: start
    /// the processes again.
    ///
    /// # Panics
    /// When called within a runtime's own thread.
    pub fn reload(&mut self, source: impl Into<String>) -> Result<(), LoadError> {
        let load = Load { source: source.into(), ..self.load.clone() };
        // of a source that this rank cannot plan the others have to learn
        let ranks = load.tensor_parallel.unwrap_or(self.holder.place().world_size);
        let planned = load.planned(ranks);
        self.runtime.block_on(self.holder.reload(&load.source, planned))?;
        self.load = load;
        Ok(())
    }

    /// On rank 0, what the load did on all ranks.
    pub fn report(&self) -> Option<Report> {
        let load = self.holder.load();
        let reports = load.reports.as_deref()?;
        let (warnings, generation) = (self.holder.warnings.as_slice(), load.generation);
        let (ranks_as, peak_rss_bytes) = (RanksAs::Processes, None);
        // of the others' shares nothing is known here but that they were verified
        let verified = None;
        let (lost, kept_bytes) = (load.lost, load.kept_bytes);
        let done = Done {
            reports,
            warnings,
            verified,
            kept_bytes,
            generation,
            lost,
            ranks_as,
            peak_rss_bytes,
        };
        let mut report = Report::of_load(self.holder.plan(), self.holder.source(), &done);
        report.seconds = Some(load.seconds);
        Some(report)
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// A rank or the coordinator was lost.
    ///
    /// # Panics
    /// When called within a runtime's own thread.
    pub fn barrier(&mut self) -> Result<(), LoadError> {
        self.all_gather(Vec::new()).map(|_| ())
    }

    /// Waits until every rank has contributed a piece, and returns all pieces on every rank, in the order of ranks.
    ///
    /// For what the ranks of a server have to tell each other before they serve (where to connect to, an NCCL identifier),
    /// not for weights: all pieces together have room in 1 MiB, so each in 1 MiB divided by the number of ranks. They may
    /// differ in length. All ranks call it, and [`barrier`](Rank::barrier), in the same order.
    ///
    /// ```no_run
    /// # use longshore::{Load, Place};
    /// # let mut rank = Load::from("synth:llama-bf16").join(Place::from_env()?)?.wait()?;
    /// // rank 0 tells the others where it listens
    /// let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    /// let own = listener.local_addr().expect("it is bound").to_string();
    /// let all = rank.all_gather(own.into_bytes())?;
    /// let first = std::str::from_utf8(&all[0]).expect("an address");
    /// # Ok::<(), longshore::LoadError>(())
    /// ```
    ///
    /// # Errors
    /// The piece is too long, or a rank or the coordinator was lost; nothing is gathered from then on.
    ///
    /// # Panics
    /// When called within a runtime's own thread.
    pub fn all_gather(&mut self, piece: Vec<u8>) -> Result<Vec<Vec<u8>>, LoadError> {
        let (ranks, length) = (self.holder.place().world_size, piece.len());
        let limit = PIECES_BYTES_MAX / ranks as usize;
        if length > limit {
            let reason = format!("a piece of {length} bytes, at most {limit} with {ranks} ranks");
            return Err(LoadError::Option { option: "all_gather", reason });
        }
        self.runtime.block_on(self.holder.joined().all_gather(piece))
    }

    /// Says goodbye to the group, and gives the parameters out for good, at the addresses that they have. When all ranks do
    /// so, the load leaves no trace but them.
    ///
    /// Nobody can wait for a rank that has left, so it is the last that all have in common. Rank 0 waits until the others
    /// have heard it, for two seconds at most.
    ///
    /// # Errors
    /// As [`Rank::params`].
    ///
    /// # Panics
    /// When called within a runtime's own thread.
    pub fn leave(self) -> Result<OwnParams, LoadError> {
        let Self { holder, runtime, .. } = self;
        runtime.block_on(holder.leave()).map(OwnParams)
    }
}

/// Every rank is sent as much, in one frame of its control link, which has room for 16 times that.
const PIECES_BYTES_MAX: usize = 1 << 20;

/// The parameters of a rank that has left its group.
#[derive(Debug)]
pub struct OwnParams(ReadyParams);

impl OwnParams {
    /// The parameters.
    pub fn params(&self) -> Params<'_> {
        Params(&self.0)
    }
}
