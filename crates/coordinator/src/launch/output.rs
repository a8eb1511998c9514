//! Passes on what the ranks write, apart from the supervision: a reader of the launcher's stderr that does not read may
//! stop the output, not the launcher.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use tokio::{
    net::unix::pipe,
    runtime,
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use super::lines::{Cut, Lines};

/// Read at once from one stream, before the others have their turn.
const READ_BYTES: usize = 16 << 10;

/// The most that a pipe can hold (`/proc/sys/fs/pipe-max-size`): what ended processes may have left in one.
const PIPE_BYTES_MAX: usize = 1 << 20;

/// Between two tries where stderr takes no more; a rank that shares it may have made it one that does not block.
const RETRY: Duration = Duration::from_millis(1);

/// One stream of one rank.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) pipe: OwnedFd,
    pub(super) lines: Lines,
}

/// A thread that passes on what comes.
#[derive(Debug)]
pub(super) struct Output {
    writers_gone: watch::Sender<bool>,
    /// Until the end: what the launcher says itself.
    notes: Option<mpsc::UnboundedSender<String>>,
    done: oneshot::Receiver<()>,
    held: Arc<OnceLock<Vec<u8>>>,
}

impl Output {
    /// Starts to pass on what comes by `streams`, to the launcher's stderr.
    pub(super) fn start(streams: Vec<Stream>) -> io::Result<Self> {
        let (writers_gone, gone) = watch::channel(false);
        // a launcher says a line or two
        let (notes, said) = mpsc::unbounded_channel();
        let (finished, done) = oneshot::channel();
        let held: Arc<OnceLock<Vec<u8>>> = Arc::default();
        let first = Arc::clone(&held);
        let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
        let run = move || {
            runtime.block_on(forward_all(streams, said, &gone, &first));
            // nobody waits any more if the launcher has given up on the output
            let _ = finished.send(());
        };
        thread::Builder::new().name("output".into()).spawn(run)?;
        Ok(Self { writers_gone, notes: Some(notes), done, held })
    }

    /// Logs `text` between what the ranks write, without waiting until it is written.
    pub(super) fn note(&self, text: String) {
        if let Some(notes) = &self.notes {
            // without the thread nothing can be said
            let _ = notes.send(text);
        }
    }

    /// Waits until all that the ranks wrote is passed on; they must have ended. What a process outside their groups
    /// still writes is not waited for.
    ///
    /// # Cancel safety
    /// May be dropped; the thread then goes on by itself.
    pub(super) async fn finish(&mut self) {
        self.writers_gone.send_replace(true);
        self.notes = None;
        // an error says that the thread is gone
        let _ = (&mut self.done).await;
    }

    /// The first line that was held back.
    pub(super) fn held(&self) -> Option<&[u8]> {
        self.held.get().map(Vec::as_slice)
    }
}

async fn forward_all(
    streams: Vec<Stream>,
    mut notes: mpsc::UnboundedReceiver<String>,
    gone: &watch::Receiver<bool>,
    held: &Arc<OnceLock<Vec<u8>>>,
) {
    let mut tasks = JoinSet::new();
    for stream in streams {
        tasks.spawn(forward(stream, gone.clone(), Arc::clone(held)));
    }
    while let Some(text) = notes.recv().await {
        tracing::info!("{text}");
    }
    while tasks.join_next().await.is_some() {}
}

async fn forward(stream: Stream, mut gone: watch::Receiver<bool>, held: Arc<OnceLock<Vec<u8>>>) {
    let Stream { pipe, mut lines } = stream;
    let Ok(pipe) = pipe::Receiver::from_owned_fd(pipe) else { return };
    let mut buffer = vec![0; READ_BYTES];
    loop {
        tokio::select! {
            ready = pipe.readable() => if ready.is_err() { break },
            _ = gone.wait_for(|gone| *gone) => break,
        }
        match pipe.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => pass_on(lines.feed(&buffer[..count]), &held),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        tokio::task::yield_now().await;
    }
    if let Ok(pipe) = pipe.into_nonblocking_fd() {
        drain(File::from(pipe), &mut buffer, |bytes| pass_on(lines.feed(bytes), &held));
    }
    pass_on(lines.finish(), &held);
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

fn pass_on(cut: Cut, held: &OnceLock<Vec<u8>>) {
    if let Some(line) = cut.held {
        // the first of all ranks is kept
        let _ = held.set(line);
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
