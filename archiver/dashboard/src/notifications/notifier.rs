//! [`Notifier`]: delivers the notifications that wait in the mailboxes, with one task per receiver.
//!
//! A receiver that does not answer is retried with growing pauses for a day. Meanwhile, only the
//! newest state of each alert waits for it. A slow receiver does not delay the others.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use repository::config::{NotifyKind, NotifyTarget};
use status::{alert::Alert, report::ClusterReport};
use tokio::sync::Notify;
use wal_format::{ClusterName, PgTimestamp, SystemIdentifier};

use super::{
    deliver::{send, send_summary},
    mailbox::Mailbox,
    message,
    notification::{Links, Notification},
};
use crate::clock::unix_second;

/// The first pause after a failed attempt. Each further pause is twice as long, up to
/// [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// A monitor that finishes no round for longer than this is stuck. Then no heartbeat is sent.
const STUCK_AFTER_SECONDS: u64 = 60;
/// The maximum number of attempts per daily summary. The pauses between them grow to [`PAUSE_MAX`].
const SUMMARY_ATTEMPTS_MAX: u32 = 100;

/// Sends alerts to every receiver.
#[derive(Debug)]
pub struct Notifier {
    targets: Vec<NotifyTarget>,
    links: Links,
    mailboxes: Mutex<BTreeMap<ClusterName, Arc<Mailbox>>>,
    wake: Vec<Notify>,
    /// The Unix time in seconds at which the monitor last finished a round.
    beat: AtomicU64,
}

impl Notifier {
    /// Creates the notifier of `targets` and starts a task for each of them.
    #[must_use]
    pub fn start(targets: Vec<NotifyTarget>, links: Links) -> Arc<Self> {
        let notifier = Arc::new(Self {
            wake: targets.iter().map(|_| Notify::new()).collect(),
            targets,
            links,
            mailboxes: Mutex::default(),
            beat: AtomicU64::new(unix_second()),
        });
        for (at, target) in notifier.targets.iter().enumerate() {
            let notifier = Arc::clone(&notifier);
            if target.kind == NotifyKind::Heartbeat {
                tokio::spawn(async move { notifier.beat_for_ever(at).await });
            } else {
                tokio::spawn(async move { notifier.deliver_for_ever(at).await });
            }
        }
        notifier
    }

    /// Opens the mailbox of a cluster, and wakes the receivers' tasks to deliver what waits there.
    pub(crate) fn open(&self, cluster: &ClusterName, directory: &Path) -> Arc<Mailbox> {
        let mailbox = Arc::new(Mailbox::open(cluster.clone(), directory));
        let mut mailboxes = self.mailboxes();
        mailboxes.insert(cluster.clone(), Arc::clone(&mailbox));
        drop(mailboxes);
        self.wake_all();
        mailbox
    }

    /// Updates a cluster's mailbox to match the alerts that fire. Writes it to the disk.
    pub(crate) fn update(
        &self,
        mailbox: &Mailbox,
        system_identifier: Option<SystemIdentifier>,
        firing: &[Alert],
        is_inhibited: impl Fn(&str) -> bool,
    ) {
        let waits = mailbox.reconcile(
            &self.targets,
            system_identifier,
            firing,
            is_inhibited,
            now(),
        );
        // Wake the receivers before the write: a disk that hangs must not delay the notification
        // about it. A crash before the write sends again what was already delivered, and loses
        // nothing.
        if waits {
            self.wake_all();
        }
        mailbox.write();
    }

    /// Returns true if a receiver is configured.
    pub(crate) fn has_receivers(&self) -> bool {
        !self.targets.is_empty()
    }

    /// Sends a test notification and its end to every receiver, without retries. Returns false if
    /// no receiver is configured.
    pub(crate) fn send_test(self: &Arc<Self>) -> bool {
        for target in self.targets.iter().cloned() {
            let notifier = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = super::deliver::test(&target, &notifier.links).await {
                    tracing::warn!(target = target.name, %error, "notify: the test was not taken");
                }
            });
        }
        !self.targets.is_empty()
    }

    /// Records that the monitor finished a round at `second`, and sends the daily summaries whose
    /// time of day has passed since the previous round.
    pub(crate) fn finished_round(
        self: &Arc<Self>,
        second: u64,
        reports: impl Fn() -> Vec<ClusterReport>,
    ) {
        let before = self.beat.swap(second, Ordering::Relaxed);
        for target in &self.targets {
            let Some(at) = target.daily_summary else {
                continue;
            };
            if !is_crossed(before, second, at.as_secs()) {
                continue;
            }
            let (subject, text) = message::summary(&reports(), &self.links);
            let target = target.clone();
            tokio::spawn(async move {
                let mut pause = PAUSE_MIN;
                for _ in 0..SUMMARY_ATTEMPTS_MAX {
                    match send_summary(&target, &subject, &text).await {
                        Ok(()) => return,
                        Err(error) => {
                            tracing::warn!(target = target.name, %error, "send the daily summary");
                        }
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            });
        }
    }

    async fn deliver_for_ever(self: Arc<Self>, at: usize) {
        let target = &self.targets[at];
        let mut pause = PAUSE_MIN;
        loop {
            let mailboxes: Vec<_> = self.mailboxes().values().map(Arc::clone).collect();
            let due = mailboxes
                .iter()
                .filter_map(|mailbox| Some((mailbox, mailbox.due(&target.name, now())?)))
                .min_by_key(|(_, due)| (due.attempts, due.queued));
            let Some((mailbox, due)) = due else {
                // `notify_one` stores a permit, so a notification that was queued since the search
                // ends this wait at once.
                self.wake[at].notified().await;
                continue;
            };
            let sent = send(target, &due.notification, &self.links).await;
            mailbox.attempted(&target.name, &due, sent.is_ok(), now());
            let mailbox = Arc::clone(mailbox);
            // Not awaited: a disk that hangs must not delay notifications.
            drop(tokio::task::spawn_blocking(move || mailbox.write()));
            match sent {
                Ok(()) => pause = PAUSE_MIN,
                Err(error) => {
                    let alert = due.notification.alert.name;
                    tracing::warn!(target = target.name, alert, %error, "notify; it is retried");
                    // A newer notification is tried at once, because the receiver may refuse only
                    // this one.
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = self.wake[at].notified() => {}
                    }
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    async fn beat_for_ever(self: Arc<Self>, at: usize) {
        let target = &self.targets[at];
        let mut timer = tokio::time::interval(target.interval);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            timer.tick().await;
            let silent = unix_second().saturating_sub(self.beat.load(Ordering::Relaxed));
            if silent > STUCK_AFTER_SECONDS {
                tracing::error!(
                    target = target.name,
                    silent,
                    "the monitor is stuck; no heartbeat is sent"
                );
                continue;
            }
            if let Err(error) = send(target, &Notification::test(), &self.links).await {
                tracing::warn!(target = target.name, %error, "send the heartbeat");
            }
        }
    }

    fn wake_all(&self) {
        for wake in &self.wake {
            wake.notify_one();
        }
    }

    fn mailboxes(&self) -> std::sync::MutexGuard<'_, BTreeMap<ClusterName, Arc<Mailbox>>> {
        self.mailboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns true if the second `at` of a UTC day lies after `before` and not after `now`.
fn is_crossed(before: u64, now: u64, at: u64) -> bool {
    let days = |second: u64| (second + 86_400).saturating_sub(at) / 86_400;
    now > before && days(now) > days(before)
}

fn now() -> PgTimestamp {
    PgTimestamp::from_jiff(jiff::Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_day_is_crossed_once_a_day() {
        let (day, seven) = (86_400, 7 * 3600);
        let check = |before, now, expected| {
            assert_eq!(is_crossed(before, now, seven), expected, "{before} {now}");
        };
        check(20 * day + seven - 1, 20 * day + seven, true);
        check(20 * day + seven, 20 * day + seven + 1, false);
        check(20 * day, 20 * day + 5, false);
        check(20 * day + seven + 5, 21 * day + seven + 3, true);
        // The clock was set back.
        check(21 * day, 20 * day, false);
    }
}
