//! Retention: the `keep_*` keys of a cluster, and of each of several repositories.
//!
//! Without `keep_window` everything is kept forever. A repository's own keys replace those of the
//! cluster, key by key.

use std::time::Duration;

use serde::Deserialize;
use wal_format::BackupId;

use super::parse_duration;
use crate::{Error, Result, expire::RetentionPolicy};

/// Default of `keep_backups_min`. With 2, one backup may turn out to be damaged.
const BACKUPS_MIN_DEFAULT: u32 = 2;
/// The maximum number of periods. More would be a mistake: nobody has so many backups.
const PERIODS_MAX: u32 = 10_000;

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct KeepTable {
    keep_backups: Option<Vec<BackupId>>,
    keep_backups_min: Option<u32>,
    keep_daily: Option<u32>,
    keep_everything: Option<bool>,
    keep_monthly: Option<u32>,
    keep_weekly: Option<u32>,
    keep_window: Option<String>,
}

impl KeepTable {
    /// Returns this table's keys, and those of `below` where this table has none. A window in this
    /// table overrides `keep_everything` in `below`.
    pub(super) fn over(&self, below: &Self) -> Self {
        let everything = self.keep_window.as_ref().map(|_| false);
        Self {
            keep_backups: self.keep_backups.clone().or(below.keep_backups.clone()),
            keep_backups_min: self.keep_backups_min.or(below.keep_backups_min),
            keep_daily: self.keep_daily.or(below.keep_daily),
            keep_everything: self
                .keep_everything
                .or(everything)
                .or(below.keep_everything),
            keep_monthly: self.keep_monthly.or(below.keep_monthly),
            keep_weekly: self.keep_weekly.or(below.keep_weekly),
            keep_window: self.keep_window.clone().or(below.keep_window.clone()),
        }
    }

    /// Returns the policy, or `None` if everything is kept.
    pub(super) fn resolve(&self) -> Result<Option<RetentionPolicy>> {
        let count = |key: &str, value: Option<u32>, default| match value.unwrap_or(default) {
            count @ 0..=PERIODS_MAX => Ok(count),
            count => Err(Error::config(format!(
                "{key} = {count} is more than {PERIODS_MAX}"
            ))),
        };
        let policy = RetentionPolicy {
            window: match &self.keep_window {
                Some(text) => parse_duration("keep_window", text)?,
                None => Duration::ZERO,
            },
            daily: count("keep_daily", self.keep_daily, 0)?,
            weekly: count("keep_weekly", self.keep_weekly, 0)?,
            monthly: count("keep_monthly", self.keep_monthly, 0)?,
            backups_min: match self.keep_backups_min.unwrap_or(BACKUPS_MIN_DEFAULT) {
                0 => {
                    return Err(Error::config(
                        "keep_backups_min = 0 would keep no backup; the least is 1",
                    ));
                }
                count => count,
            },
            pinned: self.keep_backups.clone().unwrap_or_default(),
        };
        if self.keep_everything == Some(true) {
            return Ok(None);
        }
        let others = [
            self.keep_daily,
            self.keep_weekly,
            self.keep_monthly,
            self.keep_backups_min,
        ];
        match self.keep_window {
            Some(_) => Ok(Some(policy)),
            None if others.iter().any(Option::is_some) => Err(Error::config(
                "keep_daily, keep_weekly, keep_monthly and keep_backups_min say which backups outlive the window, and there \
                 is no keep_window: write for how long every moment stays restorable, keep_window = \"7d\"",
            )),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CommonArgs, file::ConfigFile};

    fn settings(text: &str) -> Result<crate::config::ClusterSettings> {
        let file = ConfigFile::parse(text)?;
        let settings = crate::config::Settings::from_file(&CommonArgs::default(), &file)?;
        settings.cluster().cloned()
    }

    #[test]
    fn without_a_window_everything_is_kept() {
        let cluster = settings("repository = 'file:///r'").expect("valid");
        assert_eq!(cluster.repository.retention, None);
        let pinned = "repository = 'file:///r'\nkeep_backups = ['20261121T101500Z-9f3c']";
        assert_eq!(settings(pinned).expect("valid").repository.retention, None);
        let error = settings("repository = 'file:///r'\nkeep_daily = 7").expect_err("no window");
        assert!(
            error.to_string().contains("keep_window = \"7d\""),
            "{error}"
        );
        let error = settings("repository = 'file:///r'\nkeep_windows = '7d'").expect_err("a typo");
        assert!(
            error.to_string().contains("did you mean \"keep_window\""),
            "{error}"
        );
        let none = "repository = 'file:///r'\nkeep_window = '7d'\nkeep_backups_min = 0";
        assert!(settings(none).is_err());
    }

    #[test]
    fn a_repository_keeps_longer_than_its_cluster() {
        let cluster = settings(
            "repository = 'file:///r'\nkeep_window = '7d'\nkeep_daily = 7\nexpire_grace = '2d'\n\
             [cluster.main]\nkeep_window = '14d'\n\
             repositories = [{ url = 'file:///b', keep_window = '90d', keep_monthly = 12 }, \
                             { url = 'file:///c', keep_everything = true }, { url = 'file:///d' }]",
        );
        let places = cluster.expect("valid").repository.each();
        let words: Vec<String> = places
            .iter()
            .map(|place| {
                place
                    .retention
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string)
            })
            .collect();
        let fewest = "never fewer than 2 backups";
        let plain = format!(
            "every moment of the last 14d; 7 daily, 0 weekly, 0 monthly backups (UTC); {fewest}"
        );
        assert_eq!(words[0], plain);
        assert_eq!(
            words[1],
            format!(
                "every moment of the last 90d; 7 daily, 0 weekly, 12 monthly backups (UTC); {fewest}"
            )
        );
        assert_eq!((&words[2], &words[3]), (&String::new(), &plain));
    }
}
