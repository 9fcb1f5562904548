//! Base backups of which the last `wal-archiver verify` found an object damaged or missing. A
//! restore's plan does not choose them, and the window does not begin with them.
//!
//! An object that another repository of the same archive has intact is not lost.

use std::collections::{BTreeMap, BTreeSet};

use wal_format::{BackupId, ObjectKey, Outcome, OutcomeKind, SystemIdentifier};

use crate::{Repository, Result};

/// The damage of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The damaged object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.object, self.problem)
    }
}

/// The damaged backups of an archive, by name.
pub type DamagedBackups = BTreeMap<BackupId, Damage>;

impl Repository {
    /// The backups that the last verification found damaged.
    ///
    /// # Errors
    /// As [`Repository::newest_outcome`].
    pub fn damaged_backups(&self, system: SystemIdentifier) -> Result<DamagedBackups> {
        let verdict = self.newest_outcome(system, OutcomeKind::Verify, |_| true)?;
        let damaged = verdict.map(|verdict| damaged_backups(&verdict, &self.place_urls()));
        Ok(damaged.unwrap_or_default())
    }

    /// The address of each place.
    #[must_use]
    pub fn place_urls(&self) -> Vec<String> {
        let mut urls: Vec<String> = self.places().into_iter().map(|place| place.url).collect();
        if urls.is_empty() {
            urls.push(self.url());
        }
        urls
    }
}

/// The backups that a verification found damaged in each of `places`. Its problems are
/// `KEY: PROBLEM`, and where it examined several repositories `URL: KEY: PROBLEM`.
#[must_use]
pub fn damaged_backups(verdict: &Outcome, places: &[String]) -> DamagedBackups {
    let mut found: BTreeMap<ObjectKey, (BTreeSet<&str>, &str)> = BTreeMap::new();
    for text in &verdict.damaged {
        let mut parts = text.splitn(3, ": ");
        let first = parts.next().unwrap_or_default();
        let (place, key) = match first.parse::<ObjectKey>() {
            Ok(key) => ("", Some(key)),
            Err(_) => (first, parts.next().and_then(|key| key.parse().ok())),
        };
        let Some(key) = key else { continue };
        let printed = key.to_string();
        let problem = text
            .split_once(printed.as_str())
            .map_or("", |(_, rest)| rest);
        let known = found.entry(key).or_default();
        known.0.insert(place);
        known.1 = problem.trim_start_matches(": ");
    }
    let mut damaged = DamagedBackups::new();
    for (key, (holders, problem)) in found {
        let (ObjectKey::BackupInfo(_, id)
        | ObjectKey::BackupManifest(_, id)
        | ObjectKey::BackupSlice(_, id, ..)) = &key
        else {
            continue;
        };
        // A verification that examined one repository names no place, so that the others of several
        // may have the object intact.
        let is_alone = places.len() == 1 && holders.contains("");
        let has_it = |place: &String| !holders.contains(place.as_str());
        if !is_alone && places.iter().any(has_it) {
            continue;
        }
        damaged.entry(id.clone()).or_insert_with(|| Damage {
            object: key.to_string(),
            problem: format!("{problem} (`wal-archiver verify` at {})", verdict.finished),
        });
    }
    damaged
}

#[cfg(test)]
mod tests {
    use wal_format::PgTimestamp;

    use super::*;

    const ID: &str = "20261130T081705Z-8316";

    fn found(problems: &[&str], places: &[&str]) -> Vec<(String, String)> {
        let problems: Vec<String> = problems.iter().map(|one| (*one).to_owned()).collect();
        let places: Vec<String> = places.iter().map(|one| (*one).to_owned()).collect();
        let verdict = Outcome {
            format_version: 1,
            kind: OutcomeKind::Verify,
            id: ID.parse().expect("a name"),
            started: PgTimestamp(0),
            finished: PgTimestamp(0),
            passed: false,
            message: String::new(),
            backup: None,
            rto_seconds: None,
            fetched_bytes: None,
            fetch_seconds: None,
            replayed_bytes: None,
            replay_seconds: None,
            loss_seconds: None,
            damaged: problems,
        };
        damaged_backups(&verdict, &places)
            .into_iter()
            .map(|(id, damage)| (id.to_string(), damage.object))
            .collect()
    }

    #[test]
    fn a_backup_is_damaged_where_no_repository_has_its_object_intact() {
        let slice = format!("7/backup/{ID}/base.000002.tar.zst");
        let problem = format!("{slice}: it is damaged: SHA-256 00, recorded 11");
        let expected = vec![(ID.to_owned(), slice)];
        let (here, there) = ("file:///one", "s3://two/prefix");
        assert_eq!(found(&[&problem], &[here]), expected);
        assert_eq!(found(&[&problem], &[here, there]), []);
        let one = format!("{here}: {problem}");
        let two = format!("{there}: {problem}");
        assert_eq!(found(&[&one], &[here, there]), []);
        assert_eq!(found(&[&one], &[there]), [], "only the intact one is used");
        assert_eq!(found(&[&one], &[here]), expected);
        assert_eq!(found(&[&one, &two], &[here, there]), expected);
        let other = format!("{there}: 7/backup/{ID}/backup_manifest: it is missing");
        let each_has_one = found(&[&one, &other], &[here, there]);
        assert_eq!(each_has_one, []);
        let wal = "7/wal/00000001/00000000/00000001000000000000000E.zst: it is damaged";
        assert_eq!(found(&[wal, "key 1 is lost"], &[here]), []);
    }
}
