//! The signals that end a restore while its server recovers.
//!
//! The server runs in its own process group, so a signal to the caller's group, for example Ctrl-C,
//! does not reach it. Until recovery has ended, this program therefore stops the server when a
//! signal arrives. Otherwise a copy that was not compared with the plan would continue and accept
//! connections. A further signal kills a server that does not stop at once.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU32, Ordering},
        mpsc::{self as threads, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::{POLL, SILENCE_MAX};
use crate::{Error, Result};

/// The handled signals, with their names and numbers: from Ctrl-C, from `kill`, and from the end of
/// a terminal.
const SIGNALS: [(&str, i32); 3] = [("SIGINT", 2), ("SIGTERM", 15), ("SIGHUP", 1)];

/// A handler of these signals. It works from its creation until this program ends.
#[derive(Debug, Default)]
pub(crate) struct Interrupt(Arc<Caught>);

/// The signals that arrived.
#[derive(Debug, Default)]
struct Caught {
    /// The number of the first signal; 0 if none has arrived.
    first: AtomicI32,
    /// The number of signals.
    count: AtomicU32,
}

impl Interrupt {
    /// Installs the handler for each of [`SIGNALS`] that this program does not ignore. `nohup`
    /// makes it ignore SIGHUP.
    ///
    /// # Errors
    /// [`Error::Io`] if the operating system refuses the handler.
    pub(crate) fn catch() -> Result<Self> {
        let failed = || Error::io("catch the signals of", "this program");
        let interrupt = Self::default();
        let caught = Arc::clone(&interrupt.0);
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed())?;
        let (sender, mut receiver) = mpsc::channel(1);
        let ignored = ignored();
        let wanted = SIGNALS
            .iter()
            .filter(|(_, number)| !is_in(ignored, *number));
        for (_, number) in wanted {
            let mut stream = {
                let _context = runtime.enter();
                signal(SignalKind::from_raw(*number)).map_err(failed())?
            };
            let sender = sender.clone();
            let number = *number;
            runtime.spawn(async move {
                while stream.recv().await.is_some() {
                    // If the channel is full, another signal is about to be counted.
                    let _is_sent = sender.try_send(number);
                }
            });
        }
        drop(sender);
        let watch = move || {
            while let Some(number) = runtime.block_on(receiver.recv()) {
                // Count first: whoever sees `first` has its signal in `count`.
                caught.count.fetch_add(1, Ordering::SeqCst);
                let first = &caught.first;
                let _later = first.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst);
            }
        };
        let name = "signals".to_owned();
        let watcher = thread::Builder::new().name(name).spawn(watch);
        watcher.map(|_| interrupt).map_err(failed())
    }

    /// Returns the number of signals that have arrived.
    pub(crate) fn count(&self) -> u32 {
        self.0.count.load(Ordering::SeqCst)
    }

    /// Fails if a signal has arrived.
    ///
    /// # Errors
    /// [`Error::Interrupted`] with the first signal.
    pub(crate) fn check(&self) -> Result<()> {
        match self.seen() {
            Some(signal) => Err(Error::Interrupted { signal }),
            None => Ok(()),
        }
    }

    /// Runs `work`, which may wait for a file or the repository, on a thread of its own, and waits
    /// for its end or a signal.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if a signal arrives first; the errors of `work`.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.check()?;
        let (sender, receiver) = threads::channel();
        let name = "after recovery".to_owned();
        let spawned = thread::Builder::new().name(name).spawn(move || {
            // Without a receiver, a signal has ended the wait.
            let _is_received = sender.send(work());
        });
        spawned.map_err(Error::io("start a thread of", "this program"))?;
        loop {
            match receiver.recv_timeout(POLL) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Timeout) => self.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = std::io::Error::other("a thread ended without a result");
                    return Err(Error::io("run", "this program")(ended));
                }
            }
        }
    }

    /// Runs `work` on a thread of its own, and waits for its end. Calls `slow` once if that takes
    /// longer than [`SILENCE_MAX`]. Returns `None` at the time limit; the thread is left alone
    /// then, and ends with the server that it waits for.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn within<T: Send + 'static>(
        &self,
        limit: Duration,
        slow: &dyn Fn(),
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>> {
        let mut is_reported = false;
        let (sender, receiver) = threads::channel();
        let began = Instant::now();
        thread::spawn(move || {
            // Without a receiver, the limit or a signal has ended the wait.
            let _is_received = sender.send(work());
        });
        loop {
            match receiver.recv_timeout(POLL) {
                Ok(outcome) => return Ok(Some(outcome)),
                Err(RecvTimeoutError::Timeout) => {
                    self.check()?;
                    let waited = began.elapsed();
                    if waited >= limit {
                        return Ok(None);
                    }
                    if waited >= SILENCE_MAX && !is_reported {
                        is_reported = true;
                        slow();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = std::io::Error::other("a thread ended without a result");
                    return Err(Error::io("run", "this program")(ended));
                }
            }
        }
    }

    /// Returns the name of the first signal that arrived; `None` if none has arrived.
    fn seen(&self) -> Option<&'static str> {
        let seen = self.0.first.load(Ordering::SeqCst);
        let found = SIGNALS.iter().find(|(_, number)| *number == seen);
        found.map(|(name, _)| *name)
    }
}

/// Returns the mask of the signals that this program ignores, from `/proc/self/status`; 0 if it is
/// unknown.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or_default()
}

fn is_in(set: u64, number: i32) -> bool {
    set >> (number - 1) & 1 == 1
}
