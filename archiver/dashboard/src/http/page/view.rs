//! [`View`]: the content of the page of one cluster.

use std::sync::Arc;

use jiff::Timestamp;
use status::{details::Details, locate::Located, report::ClusterReport};
use wal_format::PgTimestamp;

use crate::monitor::Watched;

/// The content of the page of one cluster.
pub(in crate::http) struct View<'a> {
    pub(in crate::http) report: &'a ClusterReport,
    pub(in crate::http) cluster: &'a Watched,
    pub(in crate::http) details: Arc<Details>,
    pub(in crate::http) range: Range,
    /// The text of the picker and what it leads to. `None` if nothing was picked.
    pub(in crate::http) picked: Option<Picked>,
    /// The part of the strip that is shown. `None` for all of it.
    pub(in crate::http) zoom: Option<(PgTimestamp, PgTimestamp)>,
    /// The kind of events that are shown.
    pub(in crate::http) shown: Shown,
    pub(in crate::http) of_fleet: bool,
    pub(in crate::http) guarded: bool,
    /// True if the client may send a test notification.
    pub(in crate::http) may_test: bool,
    /// True if a test notification was sent a moment ago.
    pub(in crate::http) tested: bool,
}

/// A choice of the picker.
pub(in crate::http) struct Picked {
    /// The text as it was typed.
    pub(in crate::http) text: String,
    /// The instant, or the reason why the text names none.
    pub(in crate::http) time: Result<Timestamp, String>,
    /// The restore to that instant.
    pub(in crate::http) located: Result<Located, String>,
}

/// The time range of the charts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Range {
    Minutes15,
    Hours24,
    Days30,
}

impl Range {
    pub(super) const ALL: [Self; 3] = [Self::Minutes15, Self::Hours24, Self::Days30];

    pub(in crate::http) fn of(text: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|range| range.name() == text)
            .unwrap_or(Self::Minutes15)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Minutes15 => "15m",
            Self::Hours24 => "24h",
            Self::Days30 => "30d",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Minutes15 => "15 min",
            Self::Hours24 => "24 h",
            Self::Days30 => "30 d",
        }
    }

    pub(super) fn seconds(self) -> u64 {
        match self {
            Self::Minutes15 => 900,
            Self::Hours24 => 86_400,
            Self::Days30 => 30 * 86_400,
        }
    }
}

/// The kinds of events that are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Shown {
    All,
    Alerts,
    States,
    Runs,
}

impl Shown {
    pub(super) const ALL: [Self; 4] = [Self::All, Self::Alerts, Self::States, Self::Runs];

    pub(in crate::http) fn of(text: &str) -> Self {
        let mut all = Self::ALL.into_iter();
        all.find(|one| one.name() == text).unwrap_or(Self::All)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Alerts => "alerts",
            Self::States => "states",
            Self::Runs => "runs",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::All => "All",
            Self::Alerts => "Alerts",
            Self::States => "States",
            Self::Runs => "Backups and runs",
        }
    }

    pub(super) fn has(self, kind: &str) -> bool {
        match self {
            Self::All => true,
            Self::Alerts => matches!(kind, "alert" | "resolved"),
            Self::States => matches!(kind, "state" | "timeline" | "failover" | "repair"),
            Self::Runs => matches!(kind, "backup" | "drill" | "expire" | "verify"),
        }
    }
}
