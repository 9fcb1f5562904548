//! `lock_days` and `lock_mode`: whether and how the daemon puts the objects that backups need under
//! Object Lock.
//!
//! Off by default: a lock costs a request for each object, and nobody can lift a lock in compliance
//! mode.

use std::time::Duration;

use serde::Deserialize;

use crate::{Error, Result, store::LockMode};

/// The maximum of `lock_days`. More would be a mistake that nobody can undo.
pub const LOCK_DAYS_MAX: u32 = 3660;

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct LockTable {
    lock_days: Option<u32>,
    lock_mode: Option<String>,
}

/// The settings with which the daemon locks the objects that backups need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockSettings {
    /// The number of days for which an object is locked, from each run of the daemon on.
    pub days: u32,
    /// The mode, which determines who may lift a lock.
    pub mode: LockMode,
}

impl LockSettings {
    /// Returns the duration of a lock that is set now.
    #[must_use]
    pub fn lasts(&self) -> Duration {
        Duration::from_secs(u64::from(self.days) * 86_400)
    }
}

impl LockTable {
    /// Returns the settings of a cluster, or `None` if nothing is locked.
    pub(super) fn resolve(&self, defaults: &Self) -> Result<Option<LockSettings>> {
        let mode = match self.lock_mode.as_deref().or(defaults.lock_mode.as_deref()) {
            None | Some("governance") => LockMode::Governance,
            Some("compliance") => LockMode::Compliance,
            Some(other) => {
                return Err(Error::config(format!(
                    "lock_mode = {other:?}: it is \"governance\" or \"compliance\""
                )));
            }
        };
        match self.lock_days.or(defaults.lock_days) {
            None => Ok(None),
            // Only a cluster that does not follow the default of all clusters writes 0.
            Some(0) if self.lock_days.is_some() && defaults.lock_days > Some(0) => Ok(None),
            Some(0) => Err(Error::config(
                "lock_days = 0 locks nothing; write 1 to 3660 days, or remove lock_days",
            )),
            Some(days @ 1..=LOCK_DAYS_MAX) => Ok(Some(LockSettings { days, mode })),
            Some(days) => Err(Error::config(format!(
                "lock_days = {days} is more than {LOCK_DAYS_MAX}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_locked_unless_it_is_said_and_mistakes_are_refused() {
        let table = |text: &str| -> LockTable { toml::from_str(text).expect("a table") };
        let resolve = |own: &str, top: &str| table(own).resolve(&table(top));
        assert_eq!(resolve("", "").expect("valid"), None);
        assert_eq!(
            resolve("lock_days = 0", "lock_days = 9").expect("valid"),
            None
        );
        let own = resolve("lock_mode = 'compliance'", "lock_days = 9");
        let expected = LockSettings {
            days: 9,
            mode: LockMode::Compliance,
        };
        assert_eq!(own.expect("valid"), Some(expected));
        for wrong in ["lock_days = 0", "lock_days = 3661", "lock_mode = 'none'"] {
            resolve(wrong, "").expect_err(wrong);
        }
    }
}
