//! File descriptors: the process's limit, the number that the configured clusters need, and which
//! of them may start.
//!
//! The daemon raises the soft limit to the hard limit at its start. If that is too small, as many
//! clusters start as fit. Each other cluster reports this and starts when another one has ended or
//! the limit was raised. Invariant: a cluster that starts does not take the descriptors of one that
//! streams. The numbers are estimates, so a missing descriptor is also retried everywhere
//! (`Error::is_out_of_resources`).

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use status::cluster_status::ClusterStatus;

use crate::core::shutdown::Shutdown;

/// Descriptors of the process itself: standard streams, runtime, signals, HTTP with a few clients,
/// requests to a store.
pub(crate) const PROCESS: u64 = 48;
/// Descriptors of one cluster that streams: 24 were counted in a daemon with 30 clusters and folder
/// repositories, just after segments were sealed, with small catalogs. A catalog with a history
/// has more tables open.
const CLUSTER: u64 = 26 + catalog::OPEN_TABLES_MAX;
/// Descriptors of a configured cluster, also of one that waits: the two files of its history.
const HISTORY: u64 = 2;
/// The interval at which a cluster that waits for descriptors tries again.
const RETRY: Duration = Duration::from_secs(1);
/// A limit that no process reaches, for "unlimited".
const UNLIMITED: u64 = u64::MAX;

/// The limits on open files of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    /// The one in force.
    pub(crate) soft: u64,
    /// The limit to which the process may raise it.
    pub(crate) hard: u64,
}

impl Limit {
    /// The limits as they are now.
    pub(crate) fn now() -> Self {
        let limit = getrlimit(Resource::Nofile);
        Self {
            soft: limit.current.unwrap_or(UNLIMITED),
            hard: limit.maximum.unwrap_or(UNLIMITED),
        }
    }

    /// Raises the soft limit to the hard one. Returns the limits that are in force then.
    pub(crate) fn raise() -> Self {
        let before = getrlimit(Resource::Nofile);
        let wanted = Rlimit {
            current: before.maximum,
            maximum: before.maximum,
        };
        if before.current != before.maximum
            && let Err(error) = setrlimit(Resource::Nofile, wanted)
        {
            tracing::warn!(%error, "the limit on open files cannot be raised to the hard limit");
        }
        Self::now()
    }

    /// The number of clusters that fit if `configured` are known. At least one: it may need less
    /// than estimated.
    fn clusters_max(self, configured: usize) -> usize {
        let taken = PROCESS.saturating_add(count(configured).saturating_mul(HISTORY));
        let clusters = self.soft.saturating_sub(taken) / CLUSTER;
        usize::try_from(clusters).unwrap_or(usize::MAX).max(1)
    }
}

/// The number of descriptors that a daemon with so many clusters needs.
pub(crate) fn needed(clusters: usize) -> u64 {
    PROCESS.saturating_add(count(clusters).saturating_mul(CLUSTER + HISTORY))
}

/// The number of descriptors that each cluster adds.
pub(crate) fn needed_by_cluster() -> u64 {
    needed(1) - PROCESS
}

fn count(clusters: usize) -> u64 {
    u64::try_from(clusters).unwrap_or(u64::MAX)
}

/// Returns true if hardly any descriptor is left, so that an error of the moment may come from
/// that.
pub(crate) fn are_short() -> bool {
    let limit = Limit::now().soft;
    // Counting takes one itself.
    let used = std::fs::read_dir("/proc/self/fd").map_or(u64::MAX, |entries| {
        u64::try_from(entries.count()).unwrap_or(u64::MAX)
    });
    used.saturating_add(CLUSTER) > limit
}

/// The clusters that have started, counted against the limit.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    configured: AtomicUsize,
    started: AtomicUsize,
}

/// The place of a cluster that has started, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Descriptors>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.started.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Descriptors {
    /// Raises the limit for `clusters` that are configured, and warns when they do not fit.
    pub(crate) fn raise_limit(&self, clusters: usize) {
        self.configured.store(clusters, Ordering::Release);
        let limit = Limit::raise();
        let needed = needed(clusters);
        if needed > limit.soft {
            tracing::warn!(
                event = "descriptors_short",
                clusters,
                needed,
                limit = limit.soft,
                starting = limit.clusters_max(clusters),
                "the limit on open files is too small for all clusters: raise LimitNOFILE= of the service, or the hard limit \
                 of `ulimit -n`; the clusters that do not fit wait"
            );
        } else {
            tracing::info!(clusters, needed, limit = limit.soft, "file descriptors");
        }
    }

    /// Waits until there are descriptors for one more cluster. `None` when the daemon stops.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        status: &ClusterStatus,
        shutdown: &mut Shutdown,
    ) -> Option<Place> {
        let mut logged = false;
        loop {
            // An operator may have raised the limit of the running process meanwhile.
            let limit = Limit::raise();
            let clusters_max = limit.clusters_max(self.configured.load(Ordering::Acquire));
            let taken = self
                .started
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |started| {
                    (started < clusters_max).then_some(started + 1)
                });
            if taken.is_ok() {
                if logged {
                    tracing::info!(cluster = %status.cluster(), "there are file descriptors now; starting");
                    status.note(|facts| facts.stream_error = None);
                }
                return Some(Place(Arc::clone(self)));
            }
            let message = format!(
                "not started: the limit on open files is {}, which is enough for {clusters_max} clusters of about {CLUSTER} \
                 each, and those run; raise LimitNOFILE= of the service, or the hard limit of `ulimit -n`, or move clusters \
                 to another daemon",
                limit.soft
            );
            if !logged {
                logged = true;
                tracing::error!(event = "descriptors_short", cluster = %status.cluster(), "{message}");
            }
            status.beat();
            status.note(|facts| facts.stream_error = Some(message));
            if !shutdown.sleep(RETRY).await {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::daemon::descriptors::*;

    #[test]
    fn what_is_needed_fits() {
        for clusters in [1, 2, 30, 100] {
            let soft = needed(clusters);
            let limit = Limit { soft, hard: soft };
            assert_eq!(limit.clusters_max(clusters), clusters);
        }
        let tiny = Limit { soft: 20, hard: 20 };
        assert_eq!(tiny.clusters_max(2), 1);
        let unlimited = Limit {
            soft: UNLIMITED,
            hard: UNLIMITED,
        };
        assert!(unlimited.clusters_max(100) > 1_000_000);
    }
}
