//! The signals that end a restore while its server recovers.
//!
//! The server runs in its own process group, so a signal to the caller's group, for example Ctrl-C,
//! does not reach it. Until recovery has ended, this program therefore stops the server when a
//! signal arrives. Otherwise a copy that was not compared with the plan would continue and accept
//! connections.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    thread,
};

use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{Error, Result};

/// The handled signals, with their names and numbers: from Ctrl-C, from `kill`, and from the end of
/// a terminal.
const SIGNALS: [(&str, i32); 3] = [("SIGINT", 2), ("SIGTERM", 15), ("SIGHUP", 1)];

/// A handler of these signals. It works from its creation until this program ends.
#[derive(Debug)]
pub(super) struct Interrupt(Arc<AtomicI32>);

impl Interrupt {
    /// Installs the handler for each of [`SIGNALS`] that this program does not ignore. `nohup`
    /// makes it ignore SIGHUP.
    ///
    /// # Errors
    /// [`Error::Io`] if the operating system refuses the handler.
    pub(super) fn catch() -> Result<Self> {
        let failed = || Error::io("catch the signals of", "this program");
        let caught = Arc::new(AtomicI32::new(0));
        let seen = Arc::clone(&caught);
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
                if stream.recv().await.is_some() {
                    let _is_first = sender.try_send(number);
                }
            });
        }
        drop(sender);
        let watch = move || {
            if let Some(number) = runtime.block_on(receiver.recv()) {
                seen.store(number, Ordering::Relaxed);
            }
        };
        let name = "signals".to_owned();
        let watcher = thread::Builder::new().name(name).spawn(watch);
        watcher.map(|_| Self(caught)).map_err(failed())
    }

    /// Returns the name of the first signal that arrived; `None` if none has arrived.
    pub(super) fn seen(&self) -> Option<&'static str> {
        let seen = self.0.load(Ordering::Relaxed);
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
