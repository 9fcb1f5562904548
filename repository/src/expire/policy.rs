//! [`RetentionPolicy`]: what is to be kept in one repository, and how it is said in a sentence.

use std::{fmt, time::Duration};

use wal_format::BackupId;

/// What is kept. Where there is none, everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// Every moment of so long can be restored.
    pub window: Duration,
    /// Of so many days that have a backup, the last one each, by its end in UTC.
    pub daily: u32,
    /// Of so many weeks (Monday to Sunday).
    pub weekly: u32,
    /// Of so many months.
    pub monthly: u32,
    /// So many of the newest backups stay, whatever their age.
    pub backups_min: u32,
    /// These stay until the setting names them no more.
    pub pinned: Vec<BackupId>,
}

impl fmt::Display for RetentionPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "every moment of the last {}; {} daily, {} weekly, {} monthly backups (UTC); never fewer than {} backups",
            words(self.window),
            self.daily,
            self.weekly,
            self.monthly,
            self.backups_min
        )?;
        for (at, id) in self.pinned.iter().enumerate() {
            write!(f, "{}{id}", if at == 0 { "; and " } else { ", " })?;
        }
        Ok(())
    }
}

/// A duration as the configuration writes it.
fn words(duration: Duration) -> String {
    let millis = duration.as_millis();
    let units = [
        (86_400_000, "d"),
        (3_600_000, "h"),
        (60_000, "min"),
        (1000, "s"),
    ];
    let whole = units
        .iter()
        .find(|(unit, _)| millis >= *unit && millis.is_multiple_of(*unit));
    whole.map_or_else(
        || format!("{millis}ms"),
        |(unit, name)| format!("{}{name}", millis / unit),
    )
}
