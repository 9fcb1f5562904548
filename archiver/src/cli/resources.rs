//! Refuses to start where the limits on memory or threads are too low. An allocation or a thread
//! that fails later aborts the process without a word.

use std::{sync::mpsc, thread};

use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};

const MIB: u64 = 1 << 20;
/// The address space of a command, and of each cluster of the daemon: measured with `ulimit -v`,
/// rounded up. Most of it is stacks and reserved memory that is never used.
const COMMAND_BYTES: u64 = 384 * MIB;
const DAEMON_BYTES: u64 = 768 * MIB;
const CLUSTER_BYTES: u64 = 128 * MIB;
/// The threads of a command, and of each cluster of the daemon.
const COMMAND_THREADS: usize = 12;
const CLUSTER_THREADS: usize = 4;
/// The stack of a thread that only proves that it can be started.
const PROBE_STACK_BYTES: usize = 64 << 10;

/// Checks the limits for a command that opens repositories.
///
/// # Errors
/// [`Error::Usage`] that names the limit and the remedy.
pub(super) fn require_for_command() -> Result<()> {
    require(COMMAND_BYTES, COMMAND_THREADS)
}

/// Checks the limits for a daemon with this number of clusters.
///
/// # Errors
/// [`Error::Usage`] that names the limit and the remedy.
pub(super) fn require_for_daemon(clusters: usize) -> Result<()> {
    let further = clusters.saturating_sub(1);
    let bytes = DAEMON_BYTES + CLUSTER_BYTES * further as u64;
    require(bytes, COMMAND_THREADS + CLUSTER_THREADS * clusters)
}

fn require(bytes: u64, threads: usize) -> Result<()> {
    if let Some(limit) = getrlimit(Resource::As).current
        && limit < bytes
    {
        return Err(Error::Usage {
            message: format!(
                "the limit on address space (`ulimit -v`) is {} MiB, and this command needs {} MiB, of which it uses a part: \
                 run it with `ulimit -v unlimited`, or set LimitAS=infinity in its service",
                limit / MIB,
                bytes / MIB
            ),
        });
    }
    let started = startable(threads);
    if started < threads {
        return Err(Error::Usage {
            message: format!(
                "only {started} of the {threads} threads that this command needs can be started: raise the limit on \
                 processes (`ulimit -u`, LimitNPROC= and TasksMax= of its service, pids.max of its container)"
            ),
        });
    }
    Ok(())
}

/// Returns how many of this number of threads can run at the same time.
fn startable(threads: usize) -> usize {
    let mut waiting = Vec::new();
    for _ in 0..threads {
        let (end, ended) = mpsc::channel::<()>();
        let builder = thread::Builder::new().stack_size(PROBE_STACK_BYTES);
        match builder.spawn(move || ended.recv().is_ok()) {
            Ok(thread) => waiting.push((end, thread)),
            Err(_) => break,
        }
    }
    let started = waiting.len();
    for (end, thread) in waiting {
        drop(end);
        drop(thread.join());
    }
    started
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_this_process_suffice() {
        assert_eq!(startable(20), 20);
        assert!(require_for_command().is_ok() && require_for_daemon(3).is_ok());
        let refused = require(u64::MAX, 1).map_err(|error| error.to_string());
        let limited = getrlimit(Resource::As).current.is_some();
        assert_eq!(refused.is_err(), limited, "{refused:?}");
    }
}
