//! Sends alerts without Prometheus: webhook, Slack, `PagerDuty`, mail.
//!
//! The monitor passes an alert on once when it begins and once when it ends. A receiver that does
//! not answer is retried with growing pauses, one notification after the other, so that a resolve
//! never overtakes its alert.

mod client;
mod message;
mod smtp;

use std::time::Duration;

use repository::config::{NotifyKind, NotifyTarget};
use tokio::sync::mpsc;
use wal_format::PgTimestamp;

use crate::alerts::{Alert, Severity};

/// Attempts per notification, with pauses of 1, 2, 4, … s between them.
const ATTEMPTS_MAX: u32 = 6;
/// The maximum duration of an attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);
/// The maximum number of notifications that wait for one receiver.
const WAITING_MAX: usize = 64;

/// The reason why a notification could not be delivered. Never contains the secret part of an
/// address.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The address or the certificate authority is invalid.
    #[error("{0}")]
    Settings(String),
    /// A network error.
    #[error("{what}: {source}")]
    Io {
        /// The attempted operation.
        what: &'static str,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The receiver refused.
    #[error("{what} was refused: {answer}")]
    Refused {
        /// The refused operation.
        what: &'static str,
        /// The first line of the answer.
        answer: String,
    },
    /// The receiver did not answer in time.
    #[error("no answer within {ATTEMPT_TIMEOUT:?}")]
    Timeout,
}

/// A notification.
#[derive(Clone, Debug)]
pub struct Notification {
    /// The cluster.
    pub cluster: String,
    /// The alert.
    pub alert: Alert,
    /// True if the alert begins. Otherwise it has ended.
    pub fires: bool,
}

impl Notification {
    /// Creates the notification that an alert of a cluster begins or has ended.
    #[must_use]
    pub fn new(cluster: &str, alert: Alert, fires: bool) -> Self {
        Self {
            cluster: cluster.to_owned(),
            alert,
            fires,
        }
    }

    /// Creates the notification of `notify test`, which resolves itself.
    #[must_use]
    pub fn test() -> Self {
        let alert = Alert {
            name: "PitrTest",
            severity: Severity::Warning,
            summary: "This is a test of the notifications. Nothing is wrong.".to_owned(),
            runbook: "Nothing is to be done.",
            since: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        };
        Self::new("test", alert, true)
    }

    /// Returns the key by which the receiver joins notifications of the same alert.
    #[must_use]
    pub fn key(&self) -> String {
        format!("tidemark/{}/{}", self.cluster, self.alert.name)
    }
}

/// Delivers incoming notifications to every target until the sender is dropped. A slow target does
/// not delay the others.
pub async fn deliver(targets: Vec<NotifyTarget>, mut incoming: mpsc::Receiver<Notification>) {
    let queues: Vec<mpsc::Sender<Notification>> = targets
        .into_iter()
        .map(|target| {
            let (sender, mut queue) = mpsc::channel(WAITING_MAX);
            tokio::spawn(async move {
                while let Some(notification) = queue.recv().await {
                    insist(&target, &notification).await;
                }
            });
            sender
        })
        .collect();
    while let Some(notification) = incoming.recv().await {
        for queue in &queues {
            if queue.try_send(notification.clone()).is_err() {
                tracing::error!(
                    alert = notification.alert.name,
                    "a receiver of notifications is too slow; one is dropped"
                );
            }
        }
    }
}

async fn insist(target: &NotifyTarget, notification: &Notification) {
    let mut pause = Duration::from_secs(1);
    for attempt in 1..=ATTEMPTS_MAX {
        match send(target, notification).await {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!(target = target.name, alert = notification.alert.name, attempt, %error, "notify");
            }
        }
        if attempt < ATTEMPTS_MAX {
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }
    tracing::error!(
        target = target.name,
        alert = notification.alert.name,
        "nobody was told of this alert"
    );
}

/// Sends a notification to one target, without retries.
///
/// # Errors
/// [`NotifyError`].
pub async fn send(target: &NotifyTarget, notification: &Notification) -> Result<(), NotifyError> {
    let sending = async {
        match target.kind {
            NotifyKind::Webhook => client::post(target, &message::webhook(notification)).await,
            NotifyKind::Slack => client::post(target, &message::slack(notification)).await,
            NotifyKind::Pagerduty => {
                let key = target.routing_key.reveal();
                client::post(target, &message::pagerduty(notification, key)).await
            }
            NotifyKind::Email => smtp::send(target, notification).await,
        }
    };
    tokio::time::timeout(ATTEMPT_TIMEOUT, sending)
        .await
        .unwrap_or(Err(NotifyError::Timeout))
}

#[cfg(test)]
mod tests;
