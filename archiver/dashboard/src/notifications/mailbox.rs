//! [`Mailbox`]: which alerts of one cluster each receiver was told of, and which notifications wait
//! for it.
//!
//! The record is `{spool}/{cluster}/history/notifications.json`. It is replaced durably at each
//! change, so that a restart neither repeats an alert that still fires nor forgets to report its
//! end. If the file cannot be read, alerts that still fire are sent again, and the end of an alert
//! that no longer fires is not reported.
//! Invariant: for each receiver and alert, only the newest state waits.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use repository::{config::NotifyTarget, durable};
use serde::{Deserialize, Serialize};
use status::{alert::Alert, alerts};
use wal_format::{ClusterName, PgTimestamp, SystemIdentifier};

use super::notification::Notification;

/// The time for which a notification is retried.
const RETRY_MAX_MICROS: i64 = 86_400 * 1_000_000;

/// An alert as the file stores it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct StoredAlert {
    name: String,
    summary: String,
    since: PgTimestamp,
}

impl StoredAlert {
    fn new(alert: &Alert) -> Self {
        Self {
            name: alert.name.to_owned(),
            summary: alert.summary.clone(),
            since: alert.since,
        }
    }

    /// Returns the alert. `None` if this version does not have it.
    fn alert(&self) -> Option<Alert> {
        let rule = alerts::rule(&self.name)?;
        Some(Alert {
            name: rule.name,
            severity: rule.severity,
            summary: self.summary.clone(),
            runbook: rule.runbook,
            since: self.since,
        })
    }
}

/// The state of one alert at one receiver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    alert: StoredAlert,
    system_identifier: Option<SystemIdentifier>,
    /// The time at which the alert ended. `None` while it fires.
    ended: Option<PgTimestamp>,
    /// The time since which this state waits for delivery. `None` after it was delivered or given
    /// up.
    queued: Option<PgTimestamp>,
    /// The time at which the receiver last accepted this alert as firing. `None` if it has not.
    told: Option<PgTimestamp>,
    /// Increases with each new state, so that a delivery is not recorded for a newer state.
    #[serde(default)]
    number: u64,
    #[serde(skip)]
    attempts: u32,
}

impl Entry {
    fn queue(&mut self, now: PgTimestamp) {
        self.queued = Some(now);
        self.attempts = 0;
        self.number += 1;
    }
}

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct State {
    /// The alerts that fire.
    #[serde(default)]
    standing: Vec<StoredAlert>,
    /// The earliest start of the archive's restorable window that was seen.
    #[serde(default)]
    earliest: Option<Earliest>,
    /// The entries, by receiver and alert.
    #[serde(default)]
    receivers: BTreeMap<String, BTreeMap<String, Entry>>,
}

impl State {
    /// Drops alerts that this version does not have.
    fn with_known_alerts(mut self) -> Self {
        let is_known = |name: &str| alerts::rule(name).is_some();
        self.standing.retain(|alert| is_known(&alert.name));
        for entries in self.receivers.values_mut() {
            entries.retain(|name, entry| *name == entry.alert.name && is_known(name));
        }
        self
    }
}

/// The earliest start of an archive's restorable window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Earliest {
    /// The repository and the system identifier. Another archive has an earliest start of its own.
    archive: String,
    time: PgTimestamp,
}

/// The notifications of one cluster.
#[derive(Debug)]
pub(crate) struct Mailbox {
    cluster: ClusterName,
    path: PathBuf,
    state: Mutex<State>,
    /// The state that was last written. Locked while a newer one is written.
    written: Mutex<State>,
}

/// The notification that one receiver must get next.
#[derive(Clone, Debug)]
pub(super) struct Due {
    pub(super) notification: Notification,
    pub(super) attempts: u32,
    pub(super) queued: PgTimestamp,
    number: u64,
}

impl Mailbox {
    /// Reads the record of an earlier run in `directory`.
    pub(crate) fn open(cluster: ClusterName, directory: &Path) -> Self {
        let path = directory.join("notifications.json");
        let state = match std::fs::read(&path) {
            Ok(content) => serde_json::from_slice(&content).unwrap_or_else(|error| {
                tracing::warn!(
                    path = %path.display(), %error,
                    "the record of sent notifications is damaged; standing alerts are sent again"
                );
                State::default()
            }),
            Err(_) => State::default(),
        };
        let state = state.with_known_alerts();
        Self {
            cluster,
            path,
            written: Mutex::new(state.clone()),
            state: Mutex::new(state),
        }
    }

    /// Returns the alerts that fire. After [`Mailbox::open`], these are the alerts that fired when
    /// an earlier run last wrote the record.
    pub(crate) fn standing(&self) -> Vec<Alert> {
        let state = lock(&self.state);
        state
            .standing
            .iter()
            .filter_map(StoredAlert::alert)
            .collect()
    }

    /// Records the start of the restorable window of `archive`, and returns the earliest start that
    /// was recorded for it.
    pub(crate) fn earliest(
        &self,
        archive: &str,
        earliest: Option<PgTimestamp>,
    ) -> Option<PgTimestamp> {
        let mut state = lock(&self.state);
        let known = state.earliest.as_ref();
        let known = known.filter(|known| known.archive == archive);
        let time = known
            .map(|known| known.time)
            .into_iter()
            .chain(earliest)
            .min()?;
        state.earliest = Some(Earliest {
            archive: archive.to_owned(),
            time,
        });
        Some(time)
    }

    /// Updates the receivers' entries to match the alerts that fire. Returns true if a notification
    /// waits now that did not wait before.
    ///
    /// `is_inhibited` returns true for an alert that has the same cause as another one. No
    /// notification begins for such an alert.
    pub(crate) fn reconcile(
        &self,
        targets: &[NotifyTarget],
        system_identifier: Option<SystemIdentifier>,
        firing: &[Alert],
        is_inhibited: impl Fn(&str) -> bool,
        now: PgTimestamp,
    ) -> bool {
        let mut state = lock(&self.state);
        state.standing = firing.iter().map(StoredAlert::new).collect();
        let is_known = |name: &String| targets.iter().any(|target| target.name == *name);
        state.receivers.retain(|name, _| is_known(name));
        let mut waits = false;
        for target in targets.iter().filter(|target| target.takes_alerts()) {
            let entries = state.receivers.entry(target.name.clone()).or_default();
            for alert in firing {
                match entries.get_mut(alert.name) {
                    Some(entry) if entry.ended.is_some() => {
                        // The alert fires again before its end was delivered. A receiver that was
                        // told that it fires needs no new notification.
                        entry.ended = None;
                        if entry.told.is_some() {
                            entry.queued = None;
                            entry.number += 1;
                        } else {
                            entry.alert = StoredAlert::new(alert);
                            entry.queue(now);
                            waits = true;
                        }
                    }
                    Some(entry) => {
                        let is_due =
                            entry
                                .told
                                .zip(target.remind_after)
                                .is_some_and(|(told, after)| {
                                    entry.queued.is_none()
                                        && now.micros_since(told) >= micros(after)
                                });
                        if is_due {
                            entry.alert.summary.clone_from(&alert.summary);
                            entry.queue(now);
                            waits = true;
                        }
                    }
                    None if is_inhibited(alert.name)
                        || !target.severity.is_empty()
                            && !target.severity.contains(&alert.severity.name().to_owned()) => {}
                    None => {
                        let entry = Entry {
                            alert: StoredAlert::new(alert),
                            system_identifier,
                            ended: None,
                            queued: Some(now),
                            told: None,
                            number: 0,
                            attempts: 0,
                        };
                        entries.insert(alert.name.to_owned(), entry);
                        waits = true;
                    }
                }
            }
            entries.retain(|name, entry| {
                if entry.ended.is_some() || firing.iter().any(|alert| alert.name == name) {
                    return true;
                }
                if entry.told.is_none() && entry.queued.is_none() {
                    return false;
                }
                entry.ended = Some(now);
                entry.queue(now);
                waits = true;
                true
            });
        }
        waits
    }

    /// Returns the notification that `receiver` must get next: the one with the fewest attempts, so
    /// that a refused notification does not delay the others, and among these the oldest. Gives up
    /// notifications that have waited for more than a day.
    pub(super) fn due(&self, receiver: &str, now: PgTimestamp) -> Option<Due> {
        let mut state = lock(&self.state);
        let entries = state.receivers.get_mut(receiver)?;
        entries.retain(|name, entry| {
            let is_old = |queued| now.micros_since(queued) > RETRY_MAX_MICROS;
            if !entry.queued.is_some_and(is_old) {
                return true;
            }
            tracing::error!(
                target = receiver,
                alert = name.as_str(),
                "this notification could not be delivered for a day and is given up"
            );
            entry.queued = None;
            entry.ended.is_none()
        });
        let waiting = entries
            .values()
            .filter_map(|entry| Some((entry, entry.queued?)));
        let (entry, queued) = waiting.min_by_key(|(entry, queued)| (entry.attempts, *queued))?;
        Some(Due {
            notification: Notification {
                cluster: self.cluster.to_string(),
                system_identifier: entry.system_identifier,
                alert: entry.alert.alert()?,
                ended: entry.ended,
                is_reminder: entry.ended.is_none() && entry.told.is_some(),
            },
            attempts: entry.attempts,
            queued,
            number: entry.number,
        })
    }

    /// Returns true if the receiver was told that the alert fires.
    #[cfg(test)]
    pub(super) fn is_told(&self, receiver: &str, alert: &str) -> bool {
        let state = lock(&self.state);
        let entry = state.receivers.get(receiver);
        let entry = entry.and_then(|entries| entries.get(alert));
        entry.is_some_and(|entry| entry.told.is_some() && entry.queued.is_none())
    }

    /// Records the outcome of an attempt to deliver.
    pub(super) fn attempted(&self, receiver: &str, due: &Due, delivered: bool, now: PgTimestamp) {
        let mut state = lock(&self.state);
        let Some(entries) = state.receivers.get_mut(receiver) else {
            return;
        };
        let name = due.notification.alert.name;
        let Some(entry) = entries.get_mut(name) else {
            return;
        };
        let is_newest = entry.number == due.number;
        if !delivered {
            entry.attempts += u32::from(is_newest);
            return;
        }
        if due.notification.ended.is_none() {
            entry.told = Some(now);
        }
        if is_newest {
            entry.queued = None;
            if entry.ended.is_some() {
                entries.remove(name);
            }
        } else if due.notification.ended.is_some() {
            // The receiver was told the end. If the alert fires again, the receiver must be told
            // that too.
            entry.told = None;
            if entry.ended.is_none() && entry.queued.is_none() {
                entry.queue(now);
            }
        }
    }

    /// Writes the state durably if it has changed. A failure is logged, and the next call tries
    /// again.
    pub(crate) fn write(&self) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let state = lock(&self.state).clone();
        if state == *written {
            return;
        }
        let new = self.path.with_extension("json.new");
        let outcome = serde_json::to_vec(&state)
            .map_err(std::io::Error::other)
            .and_then(|content| {
                let mut file = File::create(&new)?;
                file.write_all(&content)?;
                file.sync_all()
            })
            .and_then(|()| durable::rename(&new, &self.path).map_err(std::io::Error::other));
        match outcome {
            Ok(()) => *written = state,
            Err(error) => {
                tracing::debug!(path = %self.path.display(), %error, "the record of sent notifications is not written");
            }
        }
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
