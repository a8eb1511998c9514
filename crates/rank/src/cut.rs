//! A rank's process that is cut off from storage or from the other ranks while it lives: what a broken disk or a pulled cable
//! does, without privileges, so that it can be tried anywhere.
//!
//! Nothing is cut unless somebody asks for it with [`Cut::make`], and nothing mends it again. Where nothing is cut, a read and a
//! message cost one relaxed load each.
//!
//! * Storage: no weights are read any more, from wherever they come. A read that is under way counts as one that failed, or
//!   never ends. What is read before weights (headers, configuration) is not concerned.
//! * Network: nothing is said to other ranks or heard from them over sockets, neither over connections that there are nor over
//!   new ones, and none is closed. What passes through shared memory, or between devices, goes on: there is no cable in it.

use std::{
    fmt, io,
    str::FromStr,
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
    thread,
};

/// What a process is cut off from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Storage: reads fail.
    Storage,
    /// Storage: reads never end.
    StorageHangs,
    /// The other ranks.
    Network,
}

const WHOLE: u8 = 0;
const FAILS: u8 = 1;
const HANGS: u8 = 2;

// a process is one rank; a cut changes nothing that others would have to see in order, so everything here is relaxed
static STORAGE: AtomicU8 = AtomicU8::new(WHOLE);
static NETWORK: AtomicBool = AtomicBool::new(false);

impl Cut {
    /// All of them.
    pub const ALL: [Cut; 3] = [Cut::Storage, Cut::StorageHangs, Cut::Network];

    /// Cuts this process off, for good.
    pub fn make(self) {
        match self {
            Cut::Storage => STORAGE.store(FAILS, Ordering::Relaxed),
            Cut::StorageHangs => STORAGE.store(HANGS, Ordering::Relaxed),
            Cut::Network => NETWORK.store(true, Ordering::Relaxed),
        }
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cut::Storage => "storage",
            Cut::StorageHangs => "storage:hang",
            Cut::Network => "network",
        })
    }
}

impl FromStr for Cut {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Cut::ALL.into_iter().find(|cut| cut.to_string() == text).ok_or(())
    }
}

/// Whether this process is cut off from the other ranks.
pub fn network_is_cut() -> bool {
    NETWORK.load(Ordering::Relaxed)
}

/// Goes on unless this process is cut off from the other ranks.
pub(crate) fn pass_network() {
    if network_is_cut() {
        hang();
    }
}

/// Goes on unless this process is cut off from storage.
///
/// # Errors
/// It is, as a broken disk has it.
pub(crate) fn pass_storage() -> io::Result<()> {
    match STORAGE.load(Ordering::Relaxed) {
        WHOLE => Ok(()),
        FAILS => Err(io::Error::from_raw_os_error(libc::EIO)),
        _ => hang(),
    }
}

fn hang() -> ! {
    loop {
        thread::park();
    }
}
