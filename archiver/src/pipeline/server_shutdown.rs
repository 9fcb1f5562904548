//! Lets a server stop although not all of its WAL is durable here yet.
//!
//! At a shutdown a walsender ends by itself only when the flush position that it was sent is the
//! end of the WAL (`WalSndDone` in `walsender.c`). While the repository is away with `acknowledge =
//! "remote"`, or the spool is full, that position does not come, and the server would wait without
//! limit. After [`RELEASE_AFTER`] the archiver closes the connection instead: the walsender ends,
//! the slot keeps the WAL, and the next stream resumes from the last true position. Invariant:
//! nothing is reported here; a position that is not durable in the chosen class is never sent.
//!
//! A shutdown is detected in one of two ways:
//!
//! - While the archiver reads the stream, the walsender requests replies although the previous
//!   request was just answered ([`EndRequests`]). Only a walsender that waits for its end does so.
//! - While the archiver does not read the stream, because the spool is full or a disk hangs, the
//!   server refuses new connections with 57P03 ([`ClusterStatus::refused_since`]). The SQL poll
//!   sees this. The refusal precedes authentication, so it does not matter whether the role may use
//!   SQL. In a smart shutdown other clients may still be connected then. The archiver does not wait
//!   for them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use status::cluster_status::ClusterStatus;
use tokio::{sync::Notify, task::JoinSet};

use super::voice::Voice;
use crate::core::progress::Progress;

/// The time for which a server that shuts down may wait for WAL to become durable. A working store
/// takes less than a second for the last tail. A service manager kills PostgreSQL after 30 to 90
/// seconds.
pub(super) const RELEASE_AFTER: Duration = Duration::from_secs(5);
/// The interval at which a stream that is not read is checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Timeout of the Terminate message: a server that does not read gets none.
const CLOSE_MAX: Duration = Duration::from_secs(1);
/// A request within this time after the previous answer is a repeated one. A walsender that streams
/// requests a reply only after half of `wal_sender_timeout` without a message from us.
const REPEATED_WITHIN: Duration = Duration::from_secs(1);
/// Pause before a repeated request is answered. Without it both sides would send messages as fast
/// as they can.
const ANSWER_PAUSE: Duration = Duration::from_millis(100);

/// The requests for a reply in one stream.
#[derive(Debug, Default)]
pub(super) struct EndRequests {
    /// The time at which the last request was answered.
    answered: Option<Instant>,
    /// The time of the first request in the current series of repeated requests.
    repeated_since: Option<Instant>,
    /// The time at which the open request is to be answered.
    due: Option<Instant>,
}

impl EndRequests {
    /// Notes a request. Returns true if the reply must be sent at once, else it is due at
    /// [`EndRequests::due`].
    pub(super) fn asked(&mut self, now: Instant) -> bool {
        let repeated = self
            .answered
            .is_some_and(|answered| now.duration_since(answered) < REPEATED_WITHIN);
        if !repeated {
            self.repeated_since = None;
            return true;
        }
        self.repeated_since.get_or_insert(now);
        self.due = Some(now + ANSWER_PAUSE);
        false
    }

    /// Notes that the reply was sent.
    pub(super) fn answered(&mut self, now: Instant) {
        self.answered = Some(now);
        self.due = None;
    }

    /// The time at which a reply is due. `None` without an open request.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Returns true if the server has waited too long for the end of its WAL to become durable.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.repeated_since
            .is_some_and(|since| now.duration_since(since) >= RELEASE_AFTER)
    }
}

/// Closes the connection of a stream that is not read when its server shuts down.
#[derive(Debug)]
pub struct StreamRelease {
    voice: Arc<Voice>,
    status: Arc<ClusterStatus>,
    progress: Arc<Progress>,
    began: Instant,
    /// The time at which the stream's thread stopped reading: milliseconds after `began`, plus one.
    /// 0 while it reads.
    unread_since: AtomicU64,
    released: Notify,
}

impl StreamRelease {
    /// Creates the release of a stream that begins.
    #[must_use]
    pub fn new(
        voice: Arc<Voice>,
        status: Arc<ClusterStatus>,
        progress: Arc<Progress>,
    ) -> Arc<Self> {
        Arc::new(Self {
            voice,
            status,
            progress,
            began: Instant::now(),
            unread_since: AtomicU64::new(0),
            released: Notify::new(),
        })
    }

    /// Notes that the stream's thread waits for the next message.
    pub(super) fn reads(&self) {
        self.unread_since.store(0, Ordering::Relaxed);
    }

    /// Notes that the stream's thread does not read now.
    pub(super) fn does_not_read(&self) {
        if self.unread_since.load(Ordering::Relaxed) == 0 {
            let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
            self.unread_since.store(now + 1, Ordering::Relaxed);
        }
    }

    /// Waits until the connection was closed.
    pub(super) async fn released(&self) {
        self.released.notified().await;
    }

    /// Closes the connection when that is due. Stops when the returned set is dropped.
    #[must_use]
    pub fn watch(self: &Arc<Self>) -> JoinSet<()> {
        let release = Arc::clone(self);
        let mut watching = JoinSet::new();
        watching.spawn(async move {
            while !release.is_due() {
                tokio::time::sleep(CHECK_INTERVAL).await;
            }
            release.log("the spool takes no more WAL");
            let closed = tokio::time::timeout(CLOSE_MAX, release.voice.close());
            drop(closed.await);
            release.released.notify_one();
        });
        watching
    }

    fn is_due(&self) -> bool {
        let refused = self.status.refused_since();
        let unread = match self.unread_since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => self
                .began
                .elapsed()
                .saturating_sub(Duration::from_millis(since)),
        };
        unread >= RELEASE_AFTER && refused.is_some_and(|since| since.elapsed() >= RELEASE_AFTER)
    }

    /// Logs that the connection is closed, and why.
    pub(super) fn log(&self, why: &str) {
        let flush_lsn = self.progress.acknowledgements().borrow().flush.lsn();
        tracing::warn!(
            event = "server_shutdown_released",
            cluster = %self.status.cluster(),
            durable = %flush_lsn,
            "the server shuts down and waits for WAL that is not durable here: {why}. The connection is closed, so that the \
             server can stop. Nothing is lost: the slot keeps the WAL, and the stream resumes from the durable position when \
             the server is back"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers requests that arrive at the interval `every` for the time `long`. Returns true if
    /// the server was released.
    fn answers(every: Duration, long: Duration) -> bool {
        let (mut requests, began) = (EndRequests::default(), Instant::now());
        let mut now = began;
        while now < began + long {
            if requests.asked(now) {
                requests.answered(now);
            } else if requests.is_overdue(now) {
                return true;
            } else if let Some(due) = requests.due() {
                now = due;
                requests.answered(now);
            }
            now += every;
        }
        false
    }

    #[test]
    fn only_a_server_that_asks_again_at_once_waits_for_its_end() {
        let minutes = Duration::from_secs(600);
        assert!(answers(Duration::from_micros(20), minutes));
        assert!(answers(Duration::from_millis(300), minutes), "a long way");
        // Half of a wal_sender_timeout of 2 s.
        assert!(!answers(Duration::from_secs(1), minutes));
        assert!(!answers(Duration::from_secs(30), minutes));
        assert!(!answers(Duration::from_micros(20), RELEASE_AFTER / 2));
    }

    #[test]
    fn requests_that_stop_are_forgotten() {
        let (mut requests, now) = (EndRequests::default(), Instant::now());
        assert!(requests.asked(now));
        requests.answered(now);
        assert!(!requests.asked(now + Duration::from_millis(1)));
        requests.answered(now + ANSWER_PAUSE);
        assert!(requests.asked(now + RELEASE_AFTER));
        assert!(!requests.is_overdue(now + RELEASE_AFTER));
    }
}
