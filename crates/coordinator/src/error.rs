//! Why a load was refused or failed, the first cause first.

use std::{io, path::PathBuf, time::Duration};

use longshore_models::error::{CheckpointError, PlanError};
use longshore_rank::error::RankError;

use crate::{handover::IpcError, link::connect::ConnectError};

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The source is nothing that can be loaded.
    #[error("{given}: {reason}")]
    Source {
        /// What the user gave.
        given: String,
        /// Why it is not a checkpoint.
        reason: String,
    },
    /// Object storage, or the hub, refuses or does not answer.
    #[cfg(feature = "remote")]
    #[error(transparent)]
    Store(#[from] longshore_store::StoreError),
    /// A file could not be read or written.
    #[error("{}: {action} failed", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The parameters are complete, but could not be written to `--out`.
    #[error("{}: {action} failed", .path.display())]
    Output {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What a device holds could not be read back.
    #[error("reading the parameters of rank {rank} back failed")]
    ReadBack {
        /// The rank.
        rank: u32,
        /// Why.
        #[source]
        source: RankError,
    },
    /// Parameters cannot be shared with, or opened from, another process.
    #[error("the parameters of rank {rank} cannot be shared between processes")]
    Ipc {
        /// The rank that holds them.
        rank: u32,
        /// Why.
        #[source]
        source: IpcError,
    },
    /// A rank in another process could not write its file.
    #[error("rank {rank} could not write its output: {why}")]
    RankOutput {
        /// The first rank that could not.
        rank: u32,
        /// Its error and all causes.
        why: String,
    },
    /// The checkpoint is damaged.
    #[error("{}", .path.display())]
    Checkpoint {
        /// The checkpoint directory.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: CheckpointError,
    },
    /// Checkpoint, configuration and options do not go together.
    #[error("{}", .path.display())]
    Plan {
        /// The checkpoint directory.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: PlanError,
    },
    /// An option has a value that cannot be used.
    #[error("{option}: {reason}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not the one whose header was read.
    #[error("{}: was written since its header was read (it had {planned} bytes then, {found} now)", .path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
        /// Its length at planning time.
        planned: u64,
        /// Its length now.
        found: u64,
    },
    /// A file was written while it was being read, or since.
    #[error("{}: was written while or after it was read; the bytes may be a mix", .path.display())]
    FileModified {
        /// The file.
        path: PathBuf,
    },
    /// A tensor could not be handed out as it is stored.
    #[error("{}", .path.display())]
    Tensors {
        /// The checkpoint directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: RankError,
    },
    /// A reload failed after the first write.
    #[error("reload failed, {}", match .not_restored {
        None => format!("the weights of {} are back in place", .kept.display()),
        Some(why) => format!("the weights of {} could not be restored ({why}), the group is not ready", .kept.display()),
    })]
    Reload {
        /// The checkpoint that the group held before.
        kept: PathBuf,
        /// Why its weights are not back; `None`: they are.
        not_restored: Option<String>,
        /// Why the reload failed.
        #[source]
        source: Box<LoadError>,
    },
    /// A reload was refused, or came to nothing, before the first write.
    #[error("not reloaded, the weights of {} are untouched", .kept.display())]
    NotReloaded {
        /// The checkpoint that the group holds.
        kept: PathBuf,
        /// Why.
        #[source]
        source: Box<LoadError>,
    },
    /// What one rank of a group of processes cannot do, as all of them are told.
    #[error("rank {rank}: {why}")]
    OnRank {
        /// The first rank that cannot.
        rank: u32,
        /// Its error and all causes.
        why: String,
        /// Its exit code.
        code: u8,
    },
    /// Ranks were not told to reload the same.
    #[error("rank {rank} was told to reload another checkpoint than rank 0, or plans otherwise")]
    OtherReload {
        /// The first that differs from rank 0.
        rank: u32,
    },
    /// A group has no complete weights to hand out.
    #[error("the group is not ready: {why}")]
    NotReady {
        /// What happened.
        why: String,
    },
    /// The host has too little memory for what the plan needs.
    #[error(
        "{ranks} ranks need {needed} of host memory ({parameters} of parameters, {staging} of staging), {available} are available; use fewer ranks per host or a smaller --memory-limit"
    )]
    HostMemory {
        /// Ranks on this host.
        ranks: u32,
        /// What they need together.
        needed: String,
        /// Of that, parameters.
        parameters: String,
        /// Of that, staging.
        staging: String,
        /// What the host has.
        available: String,
    },
    /// A device has too little memory for what the plan needs.
    #[error(
        "rank {rank} needs {needed}{}, {free} are free on device {device}; use more ranks or a smaller --memory-limit",
        .others.as_ref().map(|o| format!(" beside {o} of other ranks")).unwrap_or_default()
    )]
    DeviceMemory {
        /// The first rank that has no room.
        rank: u32,
        /// Its device.
        device: u32,
        /// What it needs.
        needed: String,
        /// What ranks before it need on the same device.
        others: Option<String>,
        /// What is free there.
        free: String,
    },
    /// A rank gave up; the others were stopped.
    #[error("rank {rank} failed")]
    Rank {
        /// The first rank that failed.
        rank: u32,
        /// Its cause.
        #[source]
        source: RankError,
    },
    /// A file is not the one that its source published a digest of.
    #[error("{}: its SHA-256 is {found}, published is {expected}", .path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// What its bytes have.
        found: String,
        /// What was published.
        expected: String,
    },
    /// A rank's actor or process is gone, or was not heard of.
    #[error("rank {rank} was lost: {reason}")]
    RankLost {
        /// The rank.
        rank: u32,
        /// What the supervisor was told.
        reason: String,
    },
    /// A rank lives and does not get on.
    #[error(
        "rank {rank} is alive but has not got on for {after:?} ({phase}, {read_bytes} bytes read)"
    )]
    RankStuck {
        /// The rank.
        rank: u32,
        /// How long.
        after: Duration,
        /// What it was doing.
        phase: &'static str,
        /// Weight bytes that it had read from storage.
        read_bytes: u64,
    },
    /// A rank lives and does not take part in what all ranks do together.
    #[error("rank {rank} is alive but has not answered for {after:?}")]
    NoAnswer {
        /// The rank.
        rank: u32,
        /// How long it was waited for.
        after: Duration,
    },
    /// Ranks have not joined in time.
    #[error("{} of {world_size} ranks have not joined within {after:?}: {}", .missing.len(), numbers(.missing))]
    Missing {
        /// Those that have not.
        missing: Vec<u32>,
        /// Ranks of the group.
        world_size: u32,
        /// How long was waited.
        after: Duration,
    },
    /// More went wrong than could be mended.
    #[error("{first}{}", later.iter().map(|e| format!("; then {e}")).collect::<String>())]
    Losses {
        /// The first cause.
        first: String,
        /// Each later one, in turn.
        later: Vec<String>,
    },
    /// Two ranks made different plans of what is left of the same load: a bug of ours.
    #[error(
        "rank {rank} plans another rest of the load than rank 0 in generation {generation}; please report this"
    )]
    OtherPlan {
        /// The first that differs from rank 0.
        rank: u32,
        /// When.
        generation: u64,
    },
    /// The coordinator's process is gone, or was not heard of.
    #[error("the coordinator (rank 0) was lost: {reason}")]
    CoordinatorLost {
        /// What happened to the connection.
        reason: String,
    },
    /// The load goes on without this process, in whose place another one is waited for.
    #[error("{why}")]
    Replaced {
        /// Why.
        why: String,
    },
    /// The group went on with fewer ranks, and this one is none of those that the model was split over: it has handed on what it
    /// had, and ends well.
    #[error(
        "{left} ranks are left, and the model is split over {tp} of them: this one is not needed"
    )]
    NotNeeded {
        /// Ranks that are left.
        left: u32,
        /// Those that hold the model.
        tp: u32,
    },
    /// The coordinator has ended the load, and tells the cause itself.
    #[error("the coordinator ended the load: {why}")]
    GroupEnded {
        /// Why.
        why: String,
    },
    /// The address where ranks are to meet cannot be used.
    #[error("the ranks have nowhere to meet")]
    Meet(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// This rank could not join the others.
    #[error("this rank could not join the others")]
    Join(#[source] ConnectError),
    /// A command that was to be launched cannot be.
    #[error("{program}: cannot be started")]
    Start {
        /// The program, as it was given.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The runtime or the actor system could not be started.
    #[error("the runtime could not be started: {0}")]
    Runtime(String),
}

impl LoadError {
    /// The exit code of the command line: 2 for what the user can mend before any weight is read, 1 for a failed load.
    pub fn exit_code(&self) -> u8 {
        match self {
            LoadError::NotNeeded { .. } => 0,
            LoadError::Rank { source, .. } if source.is_refusal() => 2,
            LoadError::Tensors { source: RankError::TensorOverLimit { .. }, .. } => 2,
            LoadError::Join(ConnectError::Nobody(_)) => 1,
            #[cfg(feature = "remote")]
            LoadError::Store(e) if e.is_refusal() => 2,
            #[cfg(feature = "remote")]
            LoadError::Store(_) => 1,
            // what has begun to write and could not be mended has failed, whatever the first cause
            LoadError::Reload { not_restored: Some(_), .. } => 1,
            LoadError::Reload { source, .. } | LoadError::NotReloaded { source, .. } => {
                source.exit_code()
            }
            LoadError::OnRank { code, .. } => *code,
            LoadError::Rank { .. }
            | LoadError::RankLost { .. }
            | LoadError::RankStuck { .. }
            | LoadError::NoAnswer { .. }
            | LoadError::Missing { .. }
            | LoadError::Losses { .. }
            | LoadError::OtherPlan { .. }
            | LoadError::CoordinatorLost { .. }
            | LoadError::Replaced { .. }
            | LoadError::GroupEnded { .. }
            | LoadError::Tensors { .. }
            | LoadError::FileModified { .. }
            | LoadError::Output { .. }
            | LoadError::ReadBack { .. }
            | LoadError::Ipc { .. }
            | LoadError::RankOutput { .. }
            | LoadError::NotReady { .. }
            | LoadError::Runtime(_) => 1,
            LoadError::Io { .. }
            | LoadError::Digest { .. }
            | LoadError::FileChanged { .. }
            | LoadError::Source { .. }
            | LoadError::Checkpoint { .. }
            | LoadError::Plan { .. }
            | LoadError::Option { .. }
            | LoadError::OtherReload { .. }
            | LoadError::Meet(_)
            | LoadError::Join(_)
            | LoadError::Start { .. }
            | LoadError::HostMemory { .. }
            | LoadError::DeviceMemory { .. } => 2,
        }
    }

    /// The error and all its causes in one line.
    pub fn line(&self) -> String {
        line(self)
    }
}

/// `1, 2, 5`, the first few.
fn numbers(ranks: &[u32]) -> String {
    const SHOWN: usize = 16;
    let mut text: Vec<String> = ranks.iter().take(SHOWN).map(u32::to_string).collect();
    if ranks.len() > SHOWN {
        text.push("…".into());
    }
    text.join(", ")
}

/// `error` and all its causes in one line.
pub(crate) fn line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        line.push_str(": ");
        line.push_str(&e.to_string());
        cause = e.source();
    }
    one_line(&line)
}

/// The longest message: room for any name and shape that is meant seriously.
const LINE_CHARS_MAX: usize = 2000;

/// `text` on one line: control characters escaped (names come from files, and terminals obey them), cut where it is
/// longer than anyone reads.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for (i, c) in text.chars().enumerate() {
        match c {
            _ if i == LINE_CHARS_MAX => {
                line.push('…');
                break;
            }
            '\n' => line.push(' '),
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_of_printable_text() {
        assert_eq!(one_line("a\nb \u{1b}[31mé"), "a b \\u{1b}[31mé");
        assert_eq!(one_line(&"x".repeat(5000)).chars().count(), LINE_CHARS_MAX + 1);
    }
}
