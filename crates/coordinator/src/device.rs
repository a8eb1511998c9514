//! Where parameters live: which device is whose, and whether there is room on it.

use std::collections::BTreeMap;

use longshore_kernels::cuda::driver::{self, CudaError, Device};
use longshore_models::placement::Placement;
use longshore_rank::{
    params::{Home, memory_bytes},
    post_process::device::workspace_bytes,
};
use tracing::{debug, warn};

use crate::{error::LoadError, report::bytes_text};

/// What the user says about where parameters live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// On a device where each rank of the host has one of its own, else in the host's memory.
    Auto,
    /// In the host's memory.
    #[default]
    Cpu,
    /// On devices: a rank's is that of its number on the host, counted round where there are fewer.
    Cuda,
}

impl DeviceChoice {
    /// The word for what is meant on this host, where `ranks` ranks are.
    pub(crate) fn name(self, ranks: u32) -> &'static str {
        match self {
            DeviceChoice::Cuda => "cuda",
            DeviceChoice::Auto if devices_for(ranks).is_ok() => "cuda",
            DeviceChoice::Auto | DeviceChoice::Cpu => "cpu",
        }
    }
}

/// Devices for `ranks` ranks of this host, one for each.
fn devices_for(ranks: u32) -> Result<u32, String> {
    match driver::probe() {
        Ok(driver) if driver.devices >= ranks.max(1) => Ok(driver.devices),
        Ok(driver) => Err(format!("{} devices for {ranks} ranks", driver.devices)),
        Err(e) => Err(e.to_string()),
    }
}

/// Refuses devices that are asked for and cannot be had.
///
/// # Errors
/// Why they cannot.
pub(crate) fn refuse_unusable(choice: DeviceChoice) -> Result<(), LoadError> {
    match choice {
        DeviceChoice::Cuda => devices().map(|_| ()),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(()),
    }
}

/// Whether `ranks` ranks of this host share devices.
pub(crate) fn are_shared(choice: DeviceChoice, ranks: u32) -> bool {
    choice == DeviceChoice::Cuda && driver::probe().is_ok_and(|driver| driver.devices < ranks)
}

fn refusal(e: &CudaError) -> LoadError {
    LoadError::Option { option: "--device cuda", reason: e.to_string() }
}

/// Of devices that were chosen for the user, who may not know of them.
fn refusal_of(choice: DeviceChoice, e: &CudaError) -> LoadError {
    match choice {
        DeviceChoice::Auto => {
            let reason = format!("{e}; --device cpu does without");
            LoadError::Option { option: "default --device cuda", reason }
        }
        DeviceChoice::Cpu | DeviceChoice::Cuda => refusal(e),
    }
}

/// The devices that are visible, at least one.
fn devices() -> Result<u32, LoadError> {
    match driver::probe().map_err(|e| refusal(&e))?.devices {
        0 => Err(refusal(&CudaError::NoDevice { ordinal: 0, found: 0 })),
        devices => Ok(devices),
    }
}

/// Where the parameters of the host's ranks `locals` live, of `ranks` ranks of this host in all.
///
/// # Errors
/// Devices are asked for and cannot be had.
pub(crate) fn homes(
    choice: DeviceChoice,
    locals: impl IntoIterator<Item = u32>,
    ranks: u32,
) -> Result<Vec<Home>, LoadError> {
    let mut locals = locals.into_iter().peekable();
    let devices = match choice {
        DeviceChoice::Cpu => return Ok(locals.map(|_| Home::Host).collect()),
        DeviceChoice::Auto => match devices_for(ranks) {
            Ok(devices) => devices,
            Err(why) => {
                debug!("parameters live in host memory: {why}");
                return Ok(locals.map(|_| Home::Host).collect());
            }
        },
        DeviceChoice::Cuda => {
            let devices = devices()?;
            // once on this host
            if devices < ranks && locals.peek() == Some(&0) {
                warn!("{ranks} ranks of this host, and {devices} device(s) visible");
            }
            devices
        }
    };
    let open = |local: u32| {
        let device = Device::open(local % devices).map_err(|e| refusal_of(choice, &e))?;
        // the driver compiles them here, once, rather than in the middle of the load
        device.load_all().map_err(|e| refusal_of(choice, &e))?;
        Ok(Home::Device(device))
    };
    locals.map(open).collect()
}

/// Refuses up front what devices cannot hold: each rank's parameters (`held`: they are there already), `staging_bytes`, and
/// the workspace of its largest finish.
///
/// # Errors
/// A device's memory is short, or cannot be asked for.
pub(crate) fn check_memory(
    homes: &[Home],
    first_rank: u32,
    placement: &Placement,
    staging_bytes: u64,
    held: bool,
) -> Result<(), LoadError> {
    let parameters = if held { 0 } else { memory_bytes(placement) };
    let mut needed_on: BTreeMap<u32, u64> = BTreeMap::new();
    for (rank, home) in (first_rank..).zip(homes) {
        let Home::Device(device) = home else { continue };
        let own = parameters + staging_bytes + workspace_bytes(placement, device.geometry());
        let needed = needed_on.entry(device.ordinal()).or_default();
        *needed += own;
        let free = device.memory().map_err(|e| refusal(&e))?.free;
        if *needed > free {
            return Err(LoadError::DeviceMemory {
                rank,
                device: device.ordinal(),
                needed: bytes_text(own),
                others: (*needed > own).then(|| bytes_text(*needed - own)),
                free: bytes_text(free),
            });
        }
    }
    Ok(())
}
