//! [`Notification`]: an alert for a receiver, and the [`Links`] that it contains.

use std::net::SocketAddr;

use repository::config::Settings;
use status::alert::{Alert, Severity};
use wal_format::{PgTimestamp, SystemIdentifier};

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

    pub(super) fn cluster(&self, name: &str) -> String {
        format!("{}/clusters/{name}", self.page)
    }

    pub(super) fn runbook(&self, alert: &str) -> String {
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
