//! A CUDA driver on the host, for tests: a program that drives a device runs on it as it is, without one.
//!
//! The driver is a shared library, `libcuda.so.1`, in C++ (`cpp/`), with the kernels of `crates/kernels/cu` compiled
//! into it for the host. A C++ compiler makes it when a test first asks; a process finds it by `LD_LIBRARY_PATH`.
//!
//! | module | from | to |
//! |---|---|---|
//! | [`library_dir`] | `cpp/*`, `cu/*`, `nccl/*` | a directory of `libcuda.so.1` and `libnccl.so.2`, one per build tree |
//! | [`emulated`] | [`Options`] | a command whose process finds the libraries and is told the options |
//! | [`emulated_nccl`] | [`NcclOptions`] | the same, for what only NCCL is told |
//! | [`log`] | the log of such processes | operations with their times, allocations |
//! | [`Kernels`] | the library | single launches on host memory, for tests of the kernels themselves |
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use longshore_emulator::{Options, emulated, library_dir};
//!
//! // in a test: library_dir(env!("CARGO_TARGET_TMPDIR"))
//! let Some(library) = library_dir("target/tmp") else { return Ok(()) };
//! let mut command = std::process::Command::new("a-program-that-uses-cuda");
//! emulated(&mut command, library, &Options { seed: 7, ..Options::default() });
//! assert!(command.status()?.success());
//! # Ok(())
//! # }
//! ```
//!
//! In `cpp/`, `api_*.cpp` are the driver's functions, each of which begins with a `Call` (`call.*`); `stream.*` is
//! where operations wait and run, `memory.*` whose memory is whose, `faults.*` what becomes of a bad access,
//! `settings.*` what [`Options`] decide. `device.hpp` is what of CUDA C++ the kernels use, for the host.
//!
//! # What it shows
//!
//! That a program keeps the rules of the driver's interface. Rules that a device happens to forgive are enforced:
//!
//! - A stream is a thread; what is queued runs later: with a [`Options::seed`] at random times, with
//!   [`Options::late_us`] as late as it may. An event is complete once its stream has come to it. Nothing orders
//!   streams but events, waits, and the null stream.
//! - Copies read and write pinned host memory when the stream gets to them. Pageable memory is read during the call;
//!   the copy to the device still comes later, for the synchronous calls too. With a seed, the target holds garbage
//!   meanwhile.
//! - Device memory starts as garbage and is out of reach for threads of the program, and of kernels of other devices
//!   without peer access, where the processor has protection keys. Around each allocation nothing may be touched
//!   (beyond) or written (within 256 bytes); freed addresses stay out of reach and are not used again.
//! - Host memory that is unregistered or freed while queued operations use it, memory that is freed while another
//!   process has it open, and writes around allocations end the process, with a line on stderr.
//! - Kernels are the sources of `crates/kernels/cu`; a launch needs PTX that declares them with the same parameters. An
//!   access out of bounds or misaligned loses the context, as on a device: each later call fails with the same error.
//! - Wrong handles, addresses and threads are answered as the driver does, with a line on stderr.
//!
//! # What it does not show
//!
//! Anything about real drivers, compilers and devices: that PTX compiles, what hardware does with races, caches and
//! memory models, or how long anything takes. Stricter or simpler than real ones: only primary contexts, one process's
//! memory does not count against another's, grids have one dimension, contexts that are lost stay lost. Not noticed:
//! kernels that follow an address in a table into host memory (addresses among their parameters are checked), and host
//! memory that goes back to an allocator while it is registered.
//!
//! # NCCL
//!
//! `libnccl.so.2` (`nccl/`) joins processes of one host through sockets; what a group moves is moved by an operation of
//! its stream. It is non-blocking where it is asked to be, and then always: joining waits for every rank, the first
//! group with a rank for that rank's first, and only what is ready is on a stream. Two ranks on a device are refused
//! unless their hosts differ. Operations with a rank that is gone never end, until the communicator is aborted. Sizes
//! that do not fit together, memory that is no allocation, two threads in a communicator, and one that is used after
//! its end, end the process, with a line on stderr. It is simpler than a real one in all else: it reduces nothing,
//! splits no communicators, and a group has one stream.

mod command;
mod kernels;
mod library;
pub mod log;
mod nccl;

pub use command::{Options, emulated};
pub use kernels::{Kernels, Ran, Turns};
pub use library::library_dir;
pub use nccl::{NcclOptions, emulated_nccl};
