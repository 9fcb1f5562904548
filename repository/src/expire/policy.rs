//! [`RetentionPolicy`]: what to keep in one repository, and its description in a sentence.

use std::{fmt, time::Duration};

use wal_format::BackupId;

/// A retention policy. Without one everything is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// Every moment of this duration can be restored.
    pub window: Duration,
    /// The number of days with a backup of which the last backup is kept, by its end in UTC.
    pub daily: u32,
    /// The same for weeks (Monday to Sunday).
    pub weekly: u32,
    /// The same for months.
    pub monthly: u32,
    /// The number of newest backups that stay at any age.
    pub backups_min: u32,
    /// Backups that stay until the setting no longer names them.
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

/// Formats a duration as the configuration writes it.
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
