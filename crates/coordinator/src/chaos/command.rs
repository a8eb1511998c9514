//! The command of one run: started, ended, and what it has printed.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use serde_json::Value;

use crate::{cuts::CUTS_VARIABLE, error::LoadError, events::EVENTS_VARIABLE};

/// The files of one run; removed with this unless they are kept.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) events: PathBuf,
    /// Where its ranks listen for what they are to be cut off from.
    pub(super) cuts: PathBuf,
    stdout: PathBuf,
    stderr: PathBuf,
    kept: bool,
}

impl Files {
    pub(super) fn new(dir: &Path, name: &str) -> Self {
        let [events, cuts, stdout, stderr] =
            ["events", "cuts", "stdout", "stderr"].map(|kind| dir.join(format!("{name}.{kind}")));
        Self { events, cuts, stdout, stderr, kept: false }
    }

    /// What the command has printed.
    pub(super) fn printed(&self) -> Printed {
        let text = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let (stdout, stderr) = (text(&self.stdout), text(&self.stderr));
        Printed::of(&stdout.unwrap_or_default(), &stderr.unwrap_or_default())
    }

    pub(super) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // nothing is in it that tells anything
        let _ = fs::remove_dir_all(&self.cuts);
        if self.kept {
            return;
        }
        for path in [&self.events, &self.stdout, &self.stderr] {
            // one that was never written need not be removed
            let _ = fs::remove_file(path);
        }
    }
}

/// What matters of what a command has printed.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Printed {
    /// Over all parameters of all ranks: of longshore's report, in JSON or as text.
    pub(super) digest: Option<String>,
    /// Of the report in JSON: weight bytes asked of storage, by those that were lost too.
    pub(super) read_bytes: Option<u64>,
    /// The last line on stderr.
    pub(super) last_line: String,
}

impl Printed {
    fn of(stdout: &str, stderr: &str) -> Self {
        let report = report_in(stdout);
        let number = |name| report.as_ref().and_then(|report| report[name].as_u64());
        let line = stdout.lines().filter_map(|line| line.strip_prefix("digest ")).next_back();
        let digest = report.as_ref().and_then(|report| report["digest"].as_str()).or(line);
        let read_bytes = number("storage_bytes_read");
        let last_line = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        Self {
            digest: digest.map(|digest| digest.trim().to_owned()),
            read_bytes: read_bytes.map(|bytes| bytes + number("lost_bytes_read").unwrap_or(0)),
            last_line: last_line.trim_start_matches("longshore: ").to_owned(),
        }
    }
}

/// The last JSON document that begins a line, among whatever else is printed.
fn report_in(stdout: &str) -> Option<Value> {
    let starts = stdout.rmatch_indices('{').map(|(at, _)| at);
    let mut starts = starts.filter(|at| *at == 0 || stdout.as_bytes()[at - 1] == b'\n');
    starts.find_map(|at| {
        let mut values = serde_json::Deserializer::from_str(&stdout[at..]).into_iter();
        values.next()?.ok()
    })
}

/// A command that runs, and what it started in its process group.
#[derive(Debug)]
pub(super) struct Running(Child);

impl Running {
    /// Starts the command with its events and output going to `files`.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(command: &[OsString], files: &Files) -> Result<Self, LoadError> {
        let create = |path: &Path| {
            let failed =
                |source| LoadError::Io { path: path.into(), action: "creating it", source };
            File::create(path).map_err(failed)
        };
        let (stdout, stderr) = (create(&files.stdout)?, create(&files.stderr)?);
        fs::create_dir(&files.cuts).map_err(|source| LoadError::Io {
            path: files.cuts.clone(),
            action: "creating it",
            source,
        })?;
        let (program, arguments) = command.split_first().ok_or_else(|| LoadError::Option {
            option: "chaos",
            reason: "expected a command to start".into(),
        })?;
        let mut starting = Command::new(program);
        starting.args(arguments);
        starting.env(EVENTS_VARIABLE, &files.events).env(CUTS_VARIABLE, &files.cuts);
        starting.stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0);
        // SAFETY: between fork and exec only a system call is made that may be made there; nothing is allocated
        unsafe { starting.pre_exec(end_with_parent) };
        let program = program.to_string_lossy().into_owned();
        starting.spawn().map(Self).map_err(|source| LoadError::Start { program, source })
    }

    /// How it ended, once it has.
    pub(super) fn ended(&mut self) -> Option<Exit> {
        // one that cannot be asked about was waited for, which nobody else does
        let status = self.0.try_wait().ok()??;
        Some(Exit::of(status))
    }

    /// Sends a signal to it and to what it started.
    pub(super) fn signal(&mut self, signal: i32) {
        let Ok(pid) = i32::try_from(self.0.id()) else { return };
        if matches!(self.0.try_wait(), Ok(None)) {
            // SAFETY: takes numbers; the process has not been waited for, so they are still its own
            unsafe { libc::kill(-pid, signal) };
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // nothing runs on if a run is left early
        self.signal(libc::SIGKILL);
        let _ = self.0.wait();
    }
}

/// The command is told to end when this process does.
fn end_with_parent() -> io::Result<()> {
    // SAFETY: takes numbers and changes nothing but this process's own setting
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as libc::c_ulong) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    fn of(status: ExitStatus) -> Self {
        match status.signal() {
            Some(signal) => Exit::Signal(signal),
            None => Exit::Code(status.code().unwrap_or(1)),
        }
    }

    /// As a shell has it.
    pub(super) fn code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 + signal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_found_among_other_output() {
        let json =
            "{\n \"digest\": \"abc\",\n \"storage_bytes_read\": 7, \"lost_bytes_read\": 2}\n";
        let stdout = format!("{{not json\nready {{x}}\n{json}bye\n");
        let printed = Printed::of(&stdout, "one\nlongshore: no\n\n");
        let wanted =
            Printed { digest: Some("abc".into()), read_bytes: Some(9), last_line: "no".into() };
        assert_eq!(printed, wanted);
        let table = Printed::of("ready after 1 s\ndigest 0f\n", "");
        assert_eq!((table.digest.as_deref(), table.read_bytes), (Some("0f"), None));
        assert_eq!(Printed::of("", ""), Printed::default());
    }
}
