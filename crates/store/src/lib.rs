//! Where a checkpoint lies that is not a local directory, and reading ranges of its files.
//!
//! ```text
//! text ─► Location ─► Store ─► ObjectInfo ─► Object ─► bytes in the caller's memory
//! ```
//!
//! | module         | takes                                  | gives                                                        |
//! |----------------|----------------------------------------|--------------------------------------------------------------|
//! | `location`     | what a user typed                      | bucket and prefix, or a model of the hub; or "that is a path" |
//! | `options`      | environment, defaults                  | limits, settings                                             |
//! | `source`       | a location, settings                   | names, identities, a stream of a range: one attempt each     |
//! | `reader`       | an object, a range, a buffer           | the buffer full, or an error: parts, retries, stalls, hedges |
//! | `flow`         | bytes, completions, refusals, the time | how many requests may be in flight                           |
//! | `store`        | all of these                           | calls that block, for many threads at once                   |
//!
//! Nothing here knows of models or ranks.
//!
//! # What holds
//!
//! * STO-1: a read fills its whole buffer with bytes of the one content that was looked at, or fails.
//! * STO-2: a byte that has arrived is not asked for again by a retry, and is copied once.
//! * STO-3: no wait is without limit: silence ends a request, `give_up_after` ends a part of a read.
//! * STO-4: at most 5 % of the range requests are hedges, and no request has two.
//! * STO-5: no message and no `Debug` holds a secret or a signed URL; a token goes to the host it was meant for only.

mod counters;
mod error;
mod failure;
mod flow;
mod http_date;
mod location;
mod object_info;
mod options;
mod reader;
mod runtime;
mod source;
mod store;
mod transport;

pub use counters::Counters;
pub use error::StoreError;
pub use location::{Location, Service};
pub use object_info::{Checksum, ChecksumAlgorithm, Identity, ObjectInfo};
pub use options::{Settings, StoreOptions};
pub use reader::ReadReport;
pub use source::hub::cache::hub_snapshot;
pub use store::{Object, Revalidated, Store};
