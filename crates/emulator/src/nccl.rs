//! What the emulated NCCL is like for a process.

use std::process::Command;

/// How the emulated `libnccl.so.2` behaves beside the driver's [`crate::Options`], whose seed, delays and log it
/// shares. The defaults refuse and lose nothing.
#[derive(Debug, Clone, Default)]
pub struct NcclOptions {
    /// Calls that fail, as `function=…`: `ncclSend:3=ncclSystemError` is the third send, `ncclGroupEnd:2+=…` each end
    /// of a group from the second on, `ncclCommAbort:1=hang` an abort that never returns.
    pub fail: Vec<String>,
    /// A lost rank makes communicators fail with `ncclRemoteError` where something is exchanged with it, as it does
    /// when ranks are connected by sockets; or else all such exchanges go on for ever, as they do by shared memory.
    pub lost_rank_fails: bool,
    /// The host that the process seems to be on (`NCCL_HOSTID`), if not the one it is on.
    pub host_id: Option<String>,
}

/// Tells the process of `command`, which [`crate::emulated`] has set up, the options; it finds NCCL as it finds the
/// driver.
pub fn emulated_nccl(command: &mut Command, options: &NcclOptions) {
    command.env("EMULATED_NCCL_FAIL", options.fail.join(","));
    command.env("EMULATED_NCCL_LOST_RANK", if options.lost_rank_fails { "error" } else { "hang" });
    match &options.host_id {
        Some(host) => command.env("NCCL_HOSTID", host),
        None => command.env_remove("NCCL_HOSTID"),
    };
}
