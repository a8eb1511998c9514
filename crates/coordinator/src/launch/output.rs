//! Passes on what the ranks write, apart from the supervision: a reader of the launcher's stderr that does not read may
//! stop the output, not the launcher.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{
    net::unix::pipe,
    runtime,
    sync::{mpsc, oneshot, watch},
    task::{self, JoinSet},
};

use super::{
    ending::Held,
    lines::{Cut, Lines},
};
use crate::error::one_line;

/// Read at once from one stream, before the others have their turn.
const READ_BYTES: usize = 16 << 10;

/// The most that a pipe can hold (`/proc/sys/fs/pipe-max-size`): what ended processes may have left in one.
const PIPE_BYTES_MAX: usize = 1 << 20;

/// Between two tries where stderr takes no more; a rank that shares it may have made it one that does not block.
const RETRY: Duration = Duration::from_millis(1);

/// A thread that passes on what comes, to the launcher's stderr.
#[derive(Debug)]
pub(super) struct Output {
    /// Until the end: what there is to do.
    tasks: Option<mpsc::UnboundedSender<Task>>,
    /// By process: what tells its streams that it has ended.
    processes: HashMap<usize, watch::Sender<bool>>,
    done: oneshot::Receiver<()>,
    held: HeldLines,
}

/// The first final line of each process, in the order in which they came.
type HeldLines = Arc<Mutex<Vec<Held>>>;

#[derive(Debug)]
enum Task {
    Read(Stream),
    Say(Note),
}

/// One stream of one process.
#[derive(Debug)]
struct Stream {
    process: usize,
    pipe: OwnedFd,
    lines: Lines,
    /// The process has ended: what it left in the pipe is all.
    ended: watch::Receiver<bool>,
}

/// What the launcher says itself.
#[derive(Debug)]
enum Note {
    Plain(String),
    /// The end of a process, once all that it wrote is passed on; its final line stands between the two.
    Of {
        process: usize,
        end: String,
        what: String,
    },
}

impl Output {
    /// Starts the thread.
    pub(super) fn start() -> io::Result<Self> {
        // two streams of each process that is started, and a line for each that ends
        let (tasks, to_do) = mpsc::unbounded_channel();
        let (finished, done) = oneshot::channel();
        let held = HeldLines::default();
        let own = Arc::clone(&held);
        let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
        let run = move || {
            runtime.block_on(carry_out(to_do, &own));
            // nobody waits any more if the launcher has given up on the output
            let _ = finished.send(());
        };
        thread::Builder::new().name("output".into()).spawn(run)?;
        Ok(Self { tasks: Some(tasks), processes: HashMap::new(), done, held })
    }

    /// Passes on what `process` writes to `pipe`.
    pub(super) fn read(&mut self, process: usize, pipe: OwnedFd, lines: Lines) {
        let sender = self.processes.entry(process).or_insert_with(|| watch::channel(false).0);
        let ended = sender.subscribe();
        self.send(Task::Read(Stream { process, pipe, lines, ended }));
    }

    /// What `process` has left in its pipes is all. What others still write there is not waited for.
    pub(super) fn ended(&mut self, process: usize) {
        if let Some(sender) = self.processes.remove(&process) {
            sender.send_replace(true);
        }
    }

    /// Logs `text` between what the ranks write, without waiting until it is written.
    pub(super) fn note(&self, text: String) {
        self.send(Task::Say(Note::Plain(text)));
    }

    /// Warns that `process` has come to an `end` and `what` follows from it, once all that it wrote is passed on; it must
    /// have [ended](Output::ended).
    pub(super) fn note_of(&self, process: usize, end: String, what: String) {
        self.send(Task::Say(Note::Of { process, end, what }));
    }

    /// Waits until all that the ranks wrote is passed on; they must have ended. What a process outside their groups
    /// still writes is not waited for.
    ///
    /// # Cancel safety
    /// May be dropped; the thread then goes on by itself.
    pub(super) async fn finish(&mut self) {
        for (_, sender) in self.processes.drain() {
            sender.send_replace(true);
        }
        self.tasks = None;
        // an error says that the thread is gone
        let _ = (&mut self.done).await;
    }

    /// The lines that were held back.
    pub(super) fn held(&self) -> Vec<Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn send(&self, task: Task) {
        if let Some(tasks) = &self.tasks {
            // without the thread nothing can be passed on
            let _ = tasks.send(task);
        }
    }
}

async fn carry_out(mut to_do: mpsc::UnboundedReceiver<Task>, held: &HeldLines) {
    let mut forwarding = JoinSet::new();
    let mut read: HashMap<task::Id, usize> = HashMap::new();
    let mut notes: Vec<Note> = Vec::new();
    let mut more = true;
    while more || !forwarding.is_empty() {
        tokio::select! {
            task = to_do.recv(), if more => match task {
                None => more = false,
                Some(Task::Say(note)) => notes.push(note),
                Some(Task::Read(stream)) => {
                    let process = stream.process;
                    let task = forwarding.spawn(forward(stream, Arc::clone(held)));
                    read.insert(task.id(), process);
                }
            },
            Some(done) = forwarding.join_next_with_id() => {
                read.remove(&done.map_or_else(|e| e.id(), |(id, ())| id));
            }
        }
        for note in notes.extract_if(.., |note| note.is_ready(&read)) {
            note.say(held);
        }
    }
}

impl Note {
    /// Whether nothing more comes of the process that it is about; `read` are the streams that are being read.
    fn is_ready(&self, read: &HashMap<task::Id, usize>) -> bool {
        match self {
            Note::Plain(_) => true,
            Note::Of { process, .. } => read.values().all(|other| other != process),
        }
    }

    fn say(self, held: &HeldLines) {
        match self {
            Note::Plain(text) => tracing::info!("{text}"),
            Note::Of { process, end, what } => {
                let held = held.lock().unwrap_or_else(PoisonError::into_inner);
                let line = held.iter().find(|held| held.process == process);
                let line =
                    line.map(|held| format!(": {}", one_line(&held.text()))).unwrap_or_default();
                tracing::warn!("{end}{line}; {what}");
            }
        }
    }
}

async fn forward(stream: Stream, held: HeldLines) {
    let Stream { process, pipe, mut lines, mut ended } = stream;
    let Ok(pipe) = pipe::Receiver::from_owned_fd(pipe) else { return };
    let mut buffer = vec![0; READ_BYTES];
    loop {
        tokio::select! {
            ready = pipe.readable() => if ready.is_err() { break },
            _ = ended.wait_for(|ended| *ended) => break,
        }
        match pipe.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => pass_on(lines.feed(&buffer[..count]), process, &held),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        tokio::task::yield_now().await;
    }
    if let Ok(pipe) = pipe.into_nonblocking_fd() {
        drain(File::from(pipe), &mut buffer, |bytes| pass_on(lines.feed(bytes), process, &held));
    }
    pass_on(lines.finish(), process, &held);
}

/// Takes what is in the pipe; no more than it can hold, as somebody else may go on writing.
fn drain(mut pipe: File, buffer: &mut [u8], mut take: impl FnMut(&[u8])) {
    let mut taken = 0;
    while taken < PIPE_BYTES_MAX {
        match pipe.read(buffer) {
            Ok(count @ 1..) => {
                taken += count;
                take(&buffer[..count]);
            }
            // at its end, or empty
            _ => return,
        }
    }
}

fn pass_on(cut: Cut, process: usize, held: &HeldLines) {
    if let Some(line) = cut.held {
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        // of each process the first
        if held.iter().all(|other| other.process != process) {
            held.push(Held { process, line });
        }
    }
    if !cut.forward.is_empty() {
        write_whole(&cut.forward);
    }
}

/// Writes whole lines to stderr. Where that is gone they are dropped, so that no rank waits for a reader.
fn write_whole(mut bytes: &[u8]) {
    let mut stderr = io::stderr().lock();
    while !bytes.is_empty() {
        match stderr.write(bytes) {
            Ok(count @ 1..) => bytes = &bytes[count..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY),
            _ => return,
        }
    }
}
