//! Faults on demand, for tests of what happens when a rank fails. Only debug builds have them.
//!
//! `LONGSHORE_FAULT=rank=1,read=3,do=hang` makes rank 1 hang at its read number 3; `at=prepared` in the place of `read`, when
//! it comes to that [`Point`]. `do` is one of `hang`, `slow` (every read from there on takes `ms` milliseconds more, 1000 if it
//! does not say), `panic`, `error`, `exit`, `kill` and `stop` (SIGKILL, SIGSTOP). `rank=all` means every rank. With
//! `generation=2` it happens in that generation only, which is a first reload where nothing was lost. Several faults are
//! apart by semicolons. A process that was started again (`LONGSHORE_RESTARTS` is set and not 0)
//! has no more faults, unless `again=1` is there too.

use crate::{error::RankError, protocol::Generation};

/// The environment variable that asks for a fault.
pub const FAULT_VARIABLE: &str = "LONGSHORE_FAULT";

/// How often this process was started again, as its launcher tells it.
pub const RESTARTS_VARIABLE: &str = "LONGSHORE_RESTARTS";

/// What a rank comes to on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// It has told the coordinator that it has memory.
    Allocated,
    /// It has told that it is joined with the others.
    Prepared,
    /// It was told to begin.
    Started,
    /// Its own reads are done.
    Read,
    /// It has told that it is complete.
    Ready,
    /// It knows that every rank is complete; what follows is its own affair, and what is gathered of all.
    Released,
    /// It has looked through what is to be reloaded, and tells nobody yet.
    Validated,
    /// It knows that every rank can load it, and tells nobody yet.
    Agreed,
    /// It has begun to write, and tells nobody yet.
    BegunAgain,
}

impl Point {
    /// Those of every load, in their order.
    pub const ALL: [Point; 5] =
        [Point::Allocated, Point::Prepared, Point::Started, Point::Read, Point::Ready];

    /// What a reload comes to before these, in its order.
    pub const BEFORE_RELOAD: [Point; 3] = [Point::Validated, Point::Agreed, Point::BegunAgain];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Point::Allocated => "allocated",
            Point::Prepared => "prepared",
            Point::Started => "started",
            Point::Read => "read",
            Point::Ready => "ready",
            Point::Released => "released",
            Point::Validated => "validated",
            Point::Agreed => "agreed",
            Point::BegunAgain => "begun-again",
        }
    }
}

#[cfg(debug_assertions)]
mod on_demand {
    use std::{io, sync::OnceLock, time::Duration};

    use super::{FAULT_VARIABLE, Point, RESTARTS_VARIABLE};
    use crate::{error::RankError, protocol::Generation};

    #[derive(Debug)]
    struct Fault {
        /// `None`: all of them.
        rank: Option<u32>,
        /// `None`: whichever it is.
        generation: Option<Generation>,
        read: Option<usize>,
        at: Option<String>,
        what: String,
        pause: Duration,
    }

    fn wanted(rank: u32, generation: Generation) -> impl Iterator<Item = &'static Fault> {
        static WANTED: OnceLock<Vec<Fault>> = OnceLock::new();
        let all = WANTED.get_or_init(|| {
            let text = std::env::var(FAULT_VARIABLE).unwrap_or_default();
            let again = std::env::var(RESTARTS_VARIABLE).is_ok_and(|count| count != "0");
            text.split(';').filter_map(|text| Fault::parse(text, again)).collect()
        });
        let is_meant = move |fault: &&Fault| {
            fault.rank.is_none_or(|wanted| wanted == rank)
                && fault.generation.is_none_or(|wanted| wanted == generation)
        };
        all.iter().filter(is_meant)
    }

    pub(super) fn at_read(
        rank: u32,
        generation: Generation,
        number: usize,
    ) -> Result<(), RankError> {
        for fault in wanted(rank, generation) {
            match fault.read {
                Some(read) if fault.what == "slow" && number >= read => {
                    std::thread::sleep(fault.pause);
                }
                Some(read) if number == read => fault.happen()?,
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn at_point(rank: u32, generation: Generation, point: Point) {
        let wanted = wanted(rank, generation);
        for fault in wanted.filter(|fault| fault.at.as_deref() == Some(point.name())) {
            // between two points there is no one to take an error
            let _ = fault.happen();
        }
    }

    impl Fault {
        fn parse(text: &str, again: bool) -> Option<Self> {
            let value = |key: &str| {
                let mut parts = text.split(',').filter_map(|part| part.split_once('='));
                parts.find(|(k, _)| *k == key).map(|(_, v)| v.to_owned())
            };
            if again && value("again").is_none() {
                return None;
            }
            let rank = value("rank")?;
            let millis = value("ms").and_then(|ms| ms.parse().ok()).unwrap_or(1000);
            Some(Self {
                rank: if rank == "all" { None } else { Some(rank.parse().ok()?) },
                generation: value("generation").and_then(|number| number.parse().ok()),
                read: value("read").and_then(|number| number.parse().ok()),
                at: value("at"),
                what: value("do")?,
                pause: Duration::from_millis(millis),
            })
        }

        #[expect(clippy::panic, reason = "it is what was asked for")]
        fn happen(&self) -> Result<(), RankError> {
            match self.what.as_str() {
                "hang" => loop {
                    std::thread::sleep(Duration::from_secs(3600));
                },
                "panic" => panic!("a fault that was asked for"),
                "exit" => std::process::exit(3),
                "kill" => raise(libc::SIGKILL),
                "stop" => raise(libc::SIGSTOP),
                _ => {
                    let source = io::Error::other("a fault that was asked for");
                    let (file, offset, bytes) = ("fault".to_owned(), 0, 0);
                    return Err(RankError::Read { file, offset, bytes, source });
                }
            }
            Ok(())
        }
    }

    fn raise(signal: i32) {
        // SAFETY: takes numbers; the signal is for this process
        unsafe { libc::kill(libc::getpid(), signal) };
    }
}

/// The fault that was asked for at read `number` of `rank`, if any.
///
/// # Errors
/// One was asked for.
pub(crate) fn at_read(rank: u32, generation: Generation, number: usize) -> Result<(), RankError> {
    #[cfg(debug_assertions)]
    on_demand::at_read(rank, generation, number)?;
    let _ = (rank, generation, number);
    Ok(())
}

/// The fault that was asked for when `rank` comes to `point`, if any.
pub fn at_point(rank: u32, generation: Generation, point: Point) {
    #[cfg(debug_assertions)]
    on_demand::at_point(rank, generation, point);
    let _ = (rank, generation, point);
}
