//! How the stories of devices reach one: a real device where there is any, else the emulated driver, which says nothing about
//! real drivers but runs every line above one.
//!
//! | variable | meaning |
//! |---|---|
//! | `LONGSHORE_TEST_CUDA=device` | there has to be a real device; nothing is emulated |
//! | `LONGSHORE_BIN` | the program, where it is not where it was built |

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(missing_docs, missing_debug_implementations, reason = "test code")]
#![allow(dead_code, unreachable_pub, reason = "each story uses its part of this file")]

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use longshore_emulator::{Options, emulated, library_dir};
use longshore_kernels::cuda::driver;
use longshore_nccl::{Nccl, NcclError};
use serde_json::Value;

/// A way to a device.
#[derive(Clone, Copy)]
pub struct Cuda {
    /// The emulated driver; `None`: a real one.
    emulator: Option<&'static Path>,
}

impl Cuda {
    /// `None`, said aloud, where there is neither a device nor a compiler for the emulated driver.
    pub fn find() -> Option<Self> {
        if env::var_os("LONGSHORE_TEST_CUDA").is_some_and(|how| how == "device") {
            driver::probe().expect("a device is asked for");
            return Some(Self { emulator: None });
        }
        match driver::probe() {
            Ok(driver) if driver.devices > 0 => Some(Self { emulator: None }),
            _ => library_dir(env!("CARGO_TARGET_TMPDIR"))
                .map(|library| Self { emulator: Some(library) }),
        }
    }

    pub fn is_emulated(self) -> bool {
        self.emulator.is_some()
    }

    /// Whether there is NCCL as well.
    pub fn nccl(self) -> Result<(), NcclError> {
        if self.is_emulated() { Ok(()) } else { Nccl::load().map(|_| ()) }
    }

    /// Where only the emulated driver can do what a story wants; says aloud where it is not at hand.
    pub fn emulated() -> Option<Self> {
        let cuda = Self::find()?;
        if !cuda.is_emulated() {
            eprintln!("ignored: a real device does not fail when asked to");
        }
        cuda.is_emulated().then_some(cuda)
    }

    /// `command` in an environment with the device.
    pub fn with(self, command: &mut Command, options: &Options) {
        if let Some(library) = self.emulator {
            emulated(command, library, options);
        }
    }

    /// The program, with the device.
    pub fn longshore(self, options: &Options) -> Command {
        let mut command = Command::new(program());
        self.with(&mut command, options);
        command
    }

    /// Runs this test again in a process that has the device; returns whether this is that process.
    pub fn is_inside(self, test: &str, options: &Options) -> bool {
        const INSIDE: &str = "LONGSHORE_TEST_INSIDE";
        if !self.is_emulated() || env::var_os(INSIDE).is_some_and(|inside| inside == test) {
            return true;
        }
        let mut again = Command::new(env::current_exe().unwrap());
        self.with(&mut again, options);
        let ran = again.args([test, "--exact", "--nocapture"]).env(INSIDE, test).output().unwrap();
        let told = [&ran.stdout[..], &ran.stderr[..]].concat();
        let told = String::from_utf8_lossy(&told);
        assert!(ran.status.success() && told.contains("1 passed"), "{told}");
        false
    }
}

pub fn program() -> PathBuf {
    env::var_os("LONGSHORE_BIN")
        .map_or_else(|| env!("CARGO_BIN_EXE_longshore").into(), PathBuf::from)
}

/// The JSON of a command that must succeed.
pub fn json(command: &mut Command) -> Value {
    let ran = command.output().unwrap();
    let complaint = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{command:?}: {complaint}");
    serde_json::from_slice(&ran.stdout).unwrap()
}

/// The one line of a command that must fail, and its exit code.
pub fn refusal(command: &mut Command) -> (String, i32) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let line = String::from_utf8(stderr).unwrap();
    assert!(!status.success(), "{command:?}: {}", String::from_utf8_lossy(&stdout));
    assert_eq!(line.trim_end().lines().count(), 1, "{command:?}: {line}");
    (line.trim_end().to_owned(), status.code().expect("it exits"))
}
