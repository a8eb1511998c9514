//! Ranks that are cut off from storage or from each other on demand, to see what comes of it; in release builds too, without
//! privileges.
//!
//! With `LONGSHORE_CUTS=DIRECTORY` in its environment each rank process makes a named pipe there, `rank-RANK.PID`, by which no
//! other process is meant, and does what is written to it, a line each: `storage` (its reads of weights fail from now on),
//! `storage:hang` (they never end), `network` (nothing is said to other ranks or heard from them over sockets). Nothing is mended
//! again. [`chaos`](crate::chaos) does this; by hand it is `echo network > DIRECTORY/rank-1.4711`.
//!
//! A thread waits at the pipe. Without the variable there is neither pipe nor thread; what a cut consists of is said in
//! [`longshore_rank::cut`].

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
};

use longshore_rank::cut::Cut;
use tracing::warn;

use crate::place::Place;

/// The environment variable that names the directory.
pub const CUTS_VARIABLE: &str = "LONGSHORE_CUTS";

/// The process of a rank begins: makes its pipe if one is asked for.
pub(crate) fn listen(place: &Place) {
    let Some(dir) = std::env::var_os(CUTS_VARIABLE).filter(|dir| !dir.is_empty()) else { return };
    let path = pipe(Path::new(&dir), place.rank, std::process::id());
    match make_pipe(&path).and_then(|pipe| follow(place.rank, pipe)) {
        Ok(()) => {}
        // this process is another group's rank as well, and listens already
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => warn!("{CUTS_VARIABLE}: {}: {e}", path.display()),
    }
}

/// Has the process `pid` of `rank` cut off; `false`: it does not listen.
///
/// # Errors
/// Its pipe cannot be written to.
pub(crate) fn make(dir: &Path, rank: u32, pid: u32, cut: Cut) -> io::Result<bool> {
    let path = pipe(dir, rank, pid);
    // without anybody at its other end a pipe is not opened in this way, rather than waited at
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut pipe = match opened {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(false),
        opened => opened?,
    };
    pipe.write_all(format!("{cut}\n").as_bytes())?;
    Ok(true)
}

fn pipe(dir: &Path, rank: u32, pid: u32) -> PathBuf {
    dir.join(format!("rank-{rank}.{pid}"))
}

fn make_pipe(path: &Path) -> io::Result<File> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the name is a C string that outlives the call
    if unsafe { libc::mkfifo(name.as_ptr(), 0o600) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // open for writing too, it is not at its end when whoever wrote to it has gone
    OpenOptions::new().read(true).write(true).open(path)
}

fn follow(rank: u32, pipe: File) -> io::Result<()> {
    let cut_off = move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            match line.parse::<Cut>() {
                Ok(cut) => {
                    warn!("rank {rank} is cut off: {cut}, as {CUTS_VARIABLE} was told");
                    cut.make();
                }
                Err(()) => warn!("{CUTS_VARIABLE}: {line} is nothing that can be cut"),
            }
        }
    };
    thread::Builder::new().name("longshore-cuts".to_owned()).spawn(cut_off).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_that_nobody_listens_at_is_not_written_to() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!make(dir.path(), 1, 7, Cut::Storage).unwrap());
        let pipe = make_pipe(&pipe(dir.path(), 1, 7)).unwrap();
        assert!(make(dir.path(), 1, 7, Cut::Storage).unwrap());
        assert!(make(dir.path(), 1, 7, Cut::Network).unwrap());
        assert!(!make(dir.path(), 1, 8, Cut::Storage).unwrap(), "another process of the rank");
        let mut lines = BufReader::new(pipe).lines();
        assert_eq!(lines.next().unwrap().unwrap().parse(), Ok(Cut::Storage));
        assert_eq!(lines.next().unwrap().unwrap().parse(), Ok(Cut::Network));
        drop(lines);
        assert!(!make(dir.path(), 1, 7, Cut::Storage).unwrap());
    }
}
