//! [`Room`]: decides whether the spool may grow. A spool at its limit, or on a full disk, stops the
//! stream but not the archiver. The server keeps the WAL, the keepalives continue with the true
//! flush position, and the stream continues when there is space.
//!
//! Invariant: nothing is discarded here. Waiting threads are released only at shutdown or when the
//! supervisor gives up the primary's WAL.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use repository::config::{ClusterSettings, WhenFull};
use status::{
    cluster_status::{ClusterStatus, Facts},
    report::SlotReport,
};
use wal_format::SegmentSize;

use crate::core::progress::Progress;

/// The interval at which a full spool is checked again.
const ROOM_RETRY: Duration = Duration::from_millis(200);
/// With `max_slot_wal_keep_size` set: one part in this many must be left, because PostgreSQL itself
/// removes the slot's WAL at the limit.
const SAFE_PART_MIN: u64 = 10;

/// The space that is left for WAL that the repository does not hold.
#[derive(Debug)]
pub struct Room {
    limit: Option<u64>,
    segment_size: u64,
    given_up: AtomicBool,
}

impl Room {
    /// Builds the limit from the settings. It is never less than two segments: the open one and one
    /// in transit.
    #[must_use]
    pub fn new(settings: &ClusterSettings, segment_size: SegmentSize) -> Self {
        let segment_size = segment_size.bytes();
        Self {
            limit: settings
                .spool_limit_bytes
                .map(|limit| limit.max(segment_size.saturating_mul(2))),
            segment_size,
            given_up: AtomicBool::new(false),
        }
    }

    /// Returns true if the WAL waiting for the repository has reached the limit.
    #[must_use]
    pub fn is_at_limit(&self, progress: &Progress) -> bool {
        self.limit
            .is_some_and(|limit| progress.waiting_bytes() >= limit)
    }

    /// Returns true if, after a shortage, a segment fits again both on the disk and below the
    /// limit.
    #[must_use]
    pub fn is_free_again(&self, settings: &ClusterSettings, progress: &Progress) -> bool {
        let free = rustix::fs::statvfs(settings.spool.as_path())
            .map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
        let waiting = progress.waiting_bytes();
        free >= self.segment_size.saturating_mul(2) && waiting <= self.segment_size
    }

    /// Waits a moment. Returns false if there is no reason to wait any longer.
    pub fn wait(&self, stop: &AtomicBool, status: &ClusterStatus, progress: &Progress) -> bool {
        let at_limit = self.is_at_limit(progress);
        let newly = status.facts().spool_full.is_none();
        if newly {
            let which = if at_limit {
                "spool is at its limit"
            } else {
                "spool's disk is full"
            };
            tracing::error!(
                cluster = %status.cluster(),
                "the {which}; waiting for space, nothing is lost meanwhile: the slot keeps the WAL on the primary"
            );
        }
        status.note(|facts| {
            facts.spool_full = Some(if at_limit {
                "the spool is at its limit (spool_limit_bytes)"
            } else {
                "the spool's disk is full; free space on it"
            });
        });
        std::thread::sleep(ROOM_RETRY);
        !stop.load(Ordering::Acquire) && !self.given_up.load(Ordering::Acquire)
    }

    /// Releases all waiting threads, or lets threads wait again.
    pub fn give_up(&self, given_up: bool) {
        self.given_up.store(given_up, Ordering::Release);
    }
}

/// Returns the reason why the primary has to be protected from its own slot now. `None` if it does
/// not have to be, or if that is not configured.
#[must_use]
pub fn endangers_primary(settings: &ClusterSettings, facts: &Facts) -> Option<String> {
    if settings.when_full != WhenFull::ProtectPrimary || facts.spool_full.is_none() {
        return None;
    }
    let slot = facts.slot_report.as_ref()?;
    let kept = slot.retained_bytes?;
    if kept > settings.primary_wal_max_bytes {
        return Some(format!(
            "the slot kept {kept} bytes of WAL on the primary, more than primary_wal_max_bytes = {}",
            settings.primary_wal_max_bytes
        ));
    }
    if is_nearly_lost(slot) {
        return Some(format!(
            "PostgreSQL was about to remove the {kept} bytes of WAL that the slot kept (max_slot_wal_keep_size)"
        ));
    }
    None
}

/// Returns true if less than a tenth of the WAL that the slot may retain is left.
fn is_nearly_lost(slot: &SlotReport) -> bool {
    match (slot.retained_bytes, slot.safe_wal_bytes) {
        (Some(kept), Some(safe)) => safe < kept.saturating_add(safe) / SAFE_PART_MIN,
        _ => slot.wal_status.as_deref() == Some("unreserved"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> ClusterSettings {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), format!("repository = 'file:///r'\n{text}")).expect("a file");
        let args = repository::config::CommonArgs {
            config: Some(file.path().to_owned()),
            ..Default::default()
        };
        let settings = repository::config::Settings::resolve(&args).expect("it resolves");
        settings.cluster().expect("one").clone()
    }

    fn facts(full: bool, kept: u64, safe: Option<u64>) -> Facts {
        Facts {
            spool_full: full.then_some("full"),
            slot_report: Some(SlotReport {
                name: "s".to_owned(),
                active: true,
                wal_status: Some("reserved".to_owned()),
                retained_bytes: Some(kept),
                safe_wal_bytes: safe,
                full_in_seconds: None,
            }),
            ..Facts::default()
        }
    }

    #[test]
    fn only_a_full_spool_and_a_slot_that_keeps_too_much_endanger_the_primary() {
        const MIB: u64 = 1 << 20;
        let protect = settings("when_full = 'protect-primary'\nprimary_wal_max_bytes = 10485760");
        let says = |facts: &Facts| endangers_primary(&protect, facts).is_some();
        assert!(says(&facts(true, 11 * MIB, None)));
        assert!(!says(&facts(true, 9 * MIB, None)));
        assert!(!says(&facts(false, 11 * MIB, None)), "it takes WAL");
        assert!(says(&facts(true, 9 * MIB, Some(MIB / 2))));
        assert!(!says(&facts(true, 5 * MIB, Some(5 * MIB))));
        let archive = settings("");
        let endangered = facts(true, u64::MAX, Some(0));
        assert_eq!(endangers_primary(&archive, &endangered), None);
    }
}
