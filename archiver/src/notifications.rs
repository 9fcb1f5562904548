//! Sends alerts without Prometheus: webhook, Slack, `PagerDuty`, mail. Also sends a heartbeat,
//! whose absence shows that the archiver itself is gone.
//!
//! Each second, the monitor reports which alerts fire. The `mailbox` derives from this which
//! notifications each receiver must still get, and the `notifier` delivers them.

mod client;
mod mailbox;
mod message;
mod notifier;
mod smtp;

use std::{net::SocketAddr, time::Duration};

use repository::config::{NotifyKind, NotifyTarget, Settings};
use wal_format::{PgTimestamp, SystemIdentifier};

pub(crate) use self::mailbox::Mailbox;
pub use self::notifier::Notifier;
use status::alert::{Alert, Severity};

/// The maximum duration of an attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);

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

/// The addresses and the host name that a notification contains.
#[derive(Clone, Debug, Default)]
pub struct Links {
    /// The address of the page without a slash at its end.
    pub page: String,
    /// The address of the document with the runbooks. The alert's name is appended as a fragment.
    pub runbook: String,
    /// The name of this host.
    pub host: String,
}

impl Links {
    /// Derives the links from the settings of a daemon that serves HTTP on `address`.
    #[must_use]
    pub fn new(settings: &Settings, address: SocketAddr) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = match host.trim() {
            "" => "localhost".to_owned(),
            host => host.to_owned(),
        };
        let scheme = match settings.http_access.tls {
            Some(_) => "https",
            None => "http",
        };
        let page = settings.http_access.public_url.clone().unwrap_or_else(|| {
            if address.ip().is_unspecified() {
                format!("{scheme}://{host}:{}", address.port())
            } else {
                format!("{scheme}://{address}")
            }
        });
        let runbook = settings.runbook_url.clone();
        Self {
            runbook: runbook.unwrap_or_else(|| format!("{page}/runbook")),
            page,
            host,
        }
    }

    fn cluster(&self, name: &str) -> String {
        format!("{}/clusters/{name}", self.page)
    }

    fn runbook(&self, alert: &str) -> String {
        format!("{}#{alert}", self.runbook)
    }
}

/// A notification.
#[derive(Clone, Debug)]
pub struct Notification {
    /// The cluster.
    pub cluster: String,
    /// The cluster's system identifier. `None` if the server was never seen.
    pub system_identifier: Option<SystemIdentifier>,
    /// The alert.
    pub alert: Alert,
    /// The time at which the alert ended. `None` while it fires.
    pub ended: Option<PgTimestamp>,
    /// True if this alert was already delivered to the receiver as firing.
    pub is_reminder: bool,
}

impl Notification {
    /// Creates a test notification, which fires. The caller may send its end too.
    #[must_use]
    pub fn test() -> Self {
        Self {
            cluster: "test".to_owned(),
            system_identifier: None,
            alert: Alert {
                name: "PitrTest",
                severity: Severity::Warning,
                summary: "This is a test of the notifications. Nothing is wrong.".to_owned(),
                runbook: "Nothing is to be done.",
                since: PgTimestamp::from_jiff(jiff::Timestamp::now()),
            },
            ended: None,
            is_reminder: false,
        }
    }

    /// Returns true if the alert fires, and false if it has ended.
    #[must_use]
    pub fn fires(&self) -> bool {
        self.ended.is_none()
    }

    /// Returns the key by which a receiver groups the notifications of one alert. Two archivers
    /// that use one receiver and one name for a cluster have different keys.
    #[must_use]
    pub fn key(&self, host: &str) -> String {
        let system = self.system_identifier;
        let system = system.map_or_else(|| "unknown".to_owned(), |system| system.to_string());
        format!(
            "tidemark/{host}/{system}/{}/{}",
            self.cluster, self.alert.name
        )
    }
}

/// Sends a notification to one target, without retries.
///
/// # Errors
/// [`NotifyError`].
pub async fn send(
    target: &NotifyTarget,
    notification: &Notification,
    links: &Links,
) -> Result<(), NotifyError> {
    let sending = async {
        match target.kind {
            NotifyKind::Webhook => {
                client::post(target, &message::webhook(notification, links)).await
            }
            NotifyKind::Slack => client::post(target, &message::slack(notification, links)).await,
            NotifyKind::Pagerduty => {
                let key = target.routing_key.reveal();
                client::post(target, &message::pagerduty(notification, links, key)).await
            }
            NotifyKind::Email => {
                let (subject, text) = message::mail(notification, links);
                smtp::send(target, &subject, &text).await
            }
            NotifyKind::Heartbeat => client::post(target, &message::heartbeat(links)).await,
        }
    };
    within_limit(sending).await
}

/// Sends a test notification to one target, and then its end, so that no incident stays open at the
/// receiver.
///
/// # Errors
/// [`NotifyError`].
pub async fn test(target: &NotifyTarget, links: &Links) -> Result<(), NotifyError> {
    let mut notification = Notification::test();
    send(target, &notification, links).await?;
    notification.ended = Some(notification.alert.since);
    send(target, &notification, links).await
}

/// Sends a daily summary to a mail target, without retries.
async fn send_summary(target: &NotifyTarget, subject: &str, text: &str) -> Result<(), NotifyError> {
    within_limit(smtp::send(target, subject, text)).await
}

async fn within_limit(
    sending: impl Future<Output = Result<(), NotifyError>>,
) -> Result<(), NotifyError> {
    tokio::time::timeout(ATTEMPT_TIMEOUT, sending)
        .await
        .unwrap_or(Err(NotifyError::Timeout))
}

#[cfg(test)]
mod tests;
