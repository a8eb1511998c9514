//! One rank of a load: reads its assignment, places the bytes in its own and other ranks' parameters, finishes them.
//!
//! | stage | modules | in → out |
//! |---|---|---|
//! | words shared with the coordinator | [`protocol`] | commands down, events up, each with its generation |
//! | memory | [`region`], [`params`], [`staging`] | placement → addresses that never change |
//! | storage | [`storage`] | file and range → bytes |
//! | streaming | [`stream`], [`scatter`] | assignment → bytes in parameters |
//! | devices | [`device`] | bytes in pinned memory → bytes in parameters on a device |
//! | exchange between processes | [`collective`], `exchange` | bytes of one rank → parameters of others |
//! | tensors as they are stored | [`tensor_stream`] | wanted tensors → each with its bytes, in staging memory |
//! | post-processing | `post_process` | complete parameters → derived ones |
//! | the actor | [`state`], [`actor`] | events → decisions → effects |
//! | disturbance on purpose | [`fault`], [`cut`] | what was asked for → a rank that fails, hangs or is cut off |
//!
//! Invariants:
//!
//! * RNK-1: a byte of a parameter is written by one span only. The placement proves it; so ranks of one process may
//!   write into each other's parameters without locks.
//! * RNK-2: a parameter is read (post-processed, handed out) only after all its bytes have landed.
//! * RNK-3: staging memory stays within its limit and is back at zero when a load ends, whichever way it ends.
//! * RNK-4: a message of another generation changes nothing.
//! * RNK-5: parameters are written again (a reload) only by whoever owns their memory alone: no worker of an earlier
//!   attempt and no reader is left. What a reload keeps nobody writes: its bytes count as landed, its steps as done.
//! * RNK-6: a worker's post-processing works on at most 128 rows of a matrix beside the parameters.
//! * RNK-7: what a rank says that it has, has landed in its parameters; its group's load neither loses it nor reads it again.

pub mod actor;
pub mod collective;
pub mod cut;
pub mod device;
pub mod error;
mod exchange;
pub mod fault;
mod lender;
pub mod params;
pub mod post_process;
pub mod protocol;
pub mod region;
pub mod scatter;
pub mod staging;
pub mod state;
pub mod storage;
pub mod stream;
pub mod tensor_stream;
