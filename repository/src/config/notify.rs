//! The receivers of the daemon's alerts: `[notify.NAME]` tables.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{
    Secret, file,
    keys::{self, Place},
    parse_duration, secret_file,
};
use crate::{Error, Result};

/// The interval of a heartbeat if the key `interval` is missing.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(60);
/// The shortest interval of a heartbeat and of reminders.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// The values of `severity`.
const SEVERITIES: [&str; 2] = ["critical", "warning"];

/// The kind of receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NotifyKind {
    /// Mail by SMTP.
    Email,
    /// A request at each interval while the daemon works, and no alerts. The receiver raises an
    /// alarm when the requests stop.
    Heartbeat,
    /// `PagerDuty`'s events API, version 2.
    Pagerduty,
    /// Slack's incoming webhook, or a compatible service.
    Slack,
    /// A JSON document by POST.
    Webhook,
}

/// The encryption of an SMTP connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SmtpTls {
    /// TLS from the first byte, port 465.
    Implicit,
    /// None, for a relay on this host.
    None,
    /// TLS after STARTTLS, port 587.
    #[default]
    Starttls,
}

#[derive(Clone, Debug, Deserialize)]
struct NotifyTable {
    #[serde(rename = "type")]
    kind: NotifyKind,
    certificate_authority: Option<PathBuf>,
    url: Option<String>,
    url_file: Option<PathBuf>,
    routing_key: Option<String>,
    routing_key_file: Option<PathBuf>,
    smtp: Option<String>,
    #[serde(default)]
    tls: SmtpTls,
    user: Option<String>,
    password: Option<String>,
    password_file: Option<PathBuf>,
    from: Option<String>,
    #[serde(default)]
    to: Vec<String>,
    #[serde(default)]
    severity: Vec<String>,
    remind_after: Option<String>,
    daily_summary: Option<String>,
    interval: Option<String>,
}

/// A receiver of alerts, resolved. Its `Debug` prints no secret.
#[derive(Clone, Debug)]
pub struct NotifyTarget {
    /// The table's name.
    pub name: String,
    /// The kind of receiver.
    pub kind: NotifyKind,
    /// The address of a webhook, which is as secret as a password.
    pub url: Secret,
    /// `PagerDuty`'s key.
    pub routing_key: Secret,
    /// The certificate authority of the receiver, PEM. Default: the system's.
    pub certificate_authority: Option<PathBuf>,
    /// `host:port` of the mail server.
    pub smtp: String,
    /// The encryption of the connection to it.
    pub tls: SmtpTls,
    /// The user for the login. Empty for no login.
    pub user: String,
    /// The password of `user`.
    pub password: Secret,
    /// The sender.
    pub from: String,
    /// The receivers.
    pub to: Vec<String>,
    /// The severities of the alerts that are sent. An empty list means all.
    pub severity: Vec<String>,
    /// The time after which an alert that still fires is sent again. Default: never.
    pub remind_after: Option<Duration>,
    /// The time of day in UTC, counted from midnight, at which a mail target receives a summary of
    /// every cluster. Default: no summary.
    pub daily_summary: Option<Duration>,
    /// The interval of a heartbeat. Default: 1 min.
    pub interval: Duration,
}

impl NotifyTarget {
    /// Returns true if alerts are sent to this target.
    #[must_use]
    pub fn takes_alerts(&self) -> bool {
        self.kind != NotifyKind::Heartbeat
    }
}

pub(super) fn resolve(tables: BTreeMap<String, toml::Value>) -> Result<Vec<NotifyTarget>> {
    tables
        .into_iter()
        .map(|(name, value)| {
            if let toml::Value::Table(table) = &value {
                unknown_key(&name, table)?;
            }
            let table: NotifyTable = value.try_into().map_err(|error: toml::de::Error| {
                Error::config(format!("[notify.{name}]: {}", error.message()))
            })?;
            target(name, table)
        })
        .collect()
}

fn unknown_key(name: &str, table: &toml::Table) -> Result<()> {
    for key in table.keys() {
        let known = keys::names(Place::Notify);
        if !known.contains(&key.as_str()) {
            let place = format!(" in [notify.{name}]");
            return Err(file::unknown(key, &place, &known));
        }
    }
    Ok(())
}

fn target(name: String, table: NotifyTable) -> Result<NotifyTarget> {
    let required = |what: &str| Error::config(format!("[notify.{name}] needs {what}"));
    let default_url = (table.kind == NotifyKind::Pagerduty)
        .then(|| "https://events.pagerduty.com/v2/enqueue".to_owned());
    let url = secret(table.url, ("url_file", table.url_file))?.or(default_url.map(Secret::from));
    let routing_key = secret(
        table.routing_key,
        ("routing_key_file", table.routing_key_file),
    )?;
    match table.kind {
        NotifyKind::Webhook | NotifyKind::Slack | NotifyKind::Heartbeat if url.is_none() => {
            return Err(required("url or url_file"));
        }
        NotifyKind::Pagerduty if routing_key.is_none() => {
            return Err(required("routing_key or routing_key_file"));
        }
        NotifyKind::Email
            if table.smtp.is_none() || table.from.is_none() || table.to.is_empty() =>
        {
            return Err(required("smtp = \"host:port\", from and to = [\"…\"]"));
        }
        _ => {}
    }
    let only = |key: &str, kind: NotifyKind, is_set: bool| match table.kind == kind || !is_set {
        true => Ok(()),
        false => Err(Error::config(format!(
            "[notify.{name}]: {key} is for type = \"{}\" only",
            format!("{kind:?}").to_lowercase()
        ))),
    };
    only("interval", NotifyKind::Heartbeat, table.interval.is_some())?;
    only(
        "daily_summary",
        NotifyKind::Email,
        table.daily_summary.is_some(),
    )?;
    if let Some(unknown) = table
        .severity
        .iter()
        .find(|text| !SEVERITIES.contains(&&***text))
    {
        return Err(Error::config(format!(
            "[notify.{name}]: severity has \"{unknown}\"; write [\"critical\"], [\"warning\"] or leave it out \
             for both"
        )));
    }
    let span = |key: &str, text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => match parse_duration(key, text)? {
            span if span < INTERVAL_MIN => Err(Error::config(format!(
                "[notify.{name}]: {key} = \"{text}\" is shorter than {INTERVAL_MIN:?}"
            ))),
            span => Ok(Some(span)),
        },
    };
    let remind_after = span("remind_after", &table.remind_after)?;
    let interval = span("interval", &table.interval)?.unwrap_or(HEARTBEAT_INTERVAL);
    let daily_summary = table.daily_summary.as_deref().map(|text| {
        time_of_day(text).ok_or_else(|| {
            Error::config(format!(
                "[notify.{name}]: daily_summary = \"{text}\" is not a time of day; write \"07:00\" (UTC)"
            ))
        })
    });
    let daily_summary = daily_summary.transpose()?;
    // A control character could end the SMTP line that contains the text.
    let texts = table.to.iter().chain(&table.from).chain(&table.user);
    if texts.flat_map(|text| text.chars()).any(char::is_control) {
        return Err(required("addresses without control characters"));
    }
    Ok(NotifyTarget {
        kind: table.kind,
        url: url.unwrap_or_default(),
        routing_key: routing_key.unwrap_or_default(),
        certificate_authority: table.certificate_authority,
        smtp: table.smtp.unwrap_or_default(),
        tls: table.tls,
        user: table.user.unwrap_or_default(),
        password: secret(table.password, ("password_file", table.password_file))?
            .unwrap_or_default(),
        from: table.from.unwrap_or_default(),
        to: table.to,
        severity: table.severity,
        remind_after,
        daily_summary,
        interval,
        name,
    })
}

/// Returns the time since midnight of a text `HH:MM`; `None` for any other text.
fn time_of_day(text: &str) -> Option<Duration> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str, limit: u64| {
        let number: u64 = text.parse().ok()?;
        (text.len() == 2 && number < limit).then_some(number)
    };
    let minutes = number(hours, 24)? * 60 + number(minutes, 60)?;
    Some(Duration::from_secs(minutes * 60))
}

fn secret(text: Option<String>, (key, file): (&str, Option<PathBuf>)) -> Result<Option<Secret>> {
    match (text, file) {
        (Some(text), _) => Ok(Some(text.into())),
        (None, Some(path)) => {
            let text = secret_file::read(key, &path)?;
            Ok(Some(text.trim().to_owned().into()))
        }
        (None, None) => Ok(None),
    }
}
