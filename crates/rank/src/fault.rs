//! Faults on demand, for tests of what happens when a rank fails. Only debug builds have them.
//!
//! `LONGSHORE_FAULT=rank=1,read=3,do=hang` makes rank 1 hang at its read number 3. `do` is one of `hang`, `slow` (one
//! second for every read from there on), `panic`, `error` and `exit`.

use crate::error::RankError;

/// The environment variable that asks for a fault.
pub const FAULT_VARIABLE: &str = "LONGSHORE_FAULT";

#[cfg(debug_assertions)]
mod on_demand {
    use std::{io, sync::OnceLock, time::Duration};

    use super::FAULT_VARIABLE;
    use crate::error::RankError;

    #[derive(Debug)]
    struct Fault {
        rank: u32,
        read: usize,
        what: String,
    }

    fn wanted() -> Option<&'static Fault> {
        static WANTED: OnceLock<Option<Fault>> = OnceLock::new();
        let parse = || {
            let text = std::env::var(FAULT_VARIABLE).ok()?;
            let value = |key: &str| {
                let mut parts = text.split(',').filter_map(|part| part.split_once('='));
                parts.find(|(k, _)| *k == key).map(|(_, v)| v.to_owned())
            };
            let (rank, read) = (value("rank")?.parse().ok()?, value("read")?.parse().ok()?);
            Some(Fault { rank, read, what: value("do")? })
        };
        WANTED.get_or_init(parse).as_ref()
    }

    #[expect(clippy::panic, reason = "it is what was asked for")]
    pub(super) fn at_read(rank: u32, number: usize) -> Result<(), RankError> {
        let Some(fault) = wanted().filter(|f| f.rank == rank && number >= f.read) else {
            return Ok(());
        };
        match fault.what.as_str() {
            "slow" => std::thread::sleep(Duration::from_secs(1)),
            _ if number > fault.read => {}
            "hang" => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            "panic" => panic!("a fault that was asked for"),
            "exit" => std::process::exit(3),
            _ => {
                let source = io::Error::other("a fault that was asked for");
                let (file, offset, bytes) = ("fault".to_owned(), 0, 0);
                return Err(RankError::Read { file, offset, bytes, source });
            }
        }
        Ok(())
    }
}

/// The fault that was asked for at read `number` of `rank`, if any.
///
/// # Errors
/// One was asked for.
pub(crate) fn at_read(rank: u32, number: usize) -> Result<(), RankError> {
    #[cfg(debug_assertions)]
    on_demand::at_read(rank, number)?;
    let _ = (rank, number);
    Ok(())
}
