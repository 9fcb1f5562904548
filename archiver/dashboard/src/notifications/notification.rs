//! [`Notification`]: an alert for a receiver, and the [`Links`] that it contains.

use repository::config::Settings;
use status::alert::{Alert, Severity};
use wal_format::{PgTimestamp, SystemIdentifier};

/// The name of the alert in a test notification.
const TEST_ALERT: &str = "PitrTest";

/// The addresses and the host name that a notification contains.
#[derive(Clone, Debug, Default)]
pub struct Links {
    /// The configured address of the page, `http_public_url`, without a slash at its end. `None`:
    /// nobody knows under which address a reader reaches the page, so no link to it is sent.
    pub page: Option<String>,
    /// The address of the document with the runbooks. The alert's name is appended as a fragment.
    pub runbook: Option<String>,
    /// The name of this host.
    pub host: String,
}

impl Links {
    /// Derives the links from the settings.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = match host.trim() {
            "" => "localhost".to_owned(),
            host => host.to_owned(),
        };
        let page = settings.http_access.public_url.clone();
        let of_page = page.as_ref().map(|page| format!("{page}/runbook"));
        Self {
            runbook: settings.runbook_url.clone().or(of_page),
            page,
            host,
        }
    }

    pub(super) fn cluster(&self, name: &str) -> Option<String> {
        let page = self.page.as_ref()?;
        Some(format!("{page}/clusters/{name}"))
    }

    /// Returns the link to the page of the notification's cluster. A test concerns no cluster and
    /// links to the page itself.
    pub(super) fn page_of(&self, notification: &Notification) -> Option<String> {
        match notification.alert.name {
            TEST_ALERT => self.page.as_ref().map(|page| format!("{page}/")),
            _ => self.cluster(&notification.cluster),
        }
    }

    /// Returns the link to the runbook of the notification's alert. A test has no runbook of its
    /// own.
    pub(super) fn runbook_of(&self, notification: &Notification) -> Option<String> {
        let runbook = self.runbook.as_ref()?;
        Some(match notification.alert.name {
            TEST_ALERT => runbook.clone(),
            alert => format!("{runbook}#{alert}"),
        })
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
                name: TEST_ALERT,
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
