//! Base backups and WAL objects that the last `wal-archiver verify` found damaged or missing. The
//! plan of a restore does not use them, and the window does not contain them.
//!
//! An object of which another repository of the same archive has an intact copy is not lost. A
//! result is valid for the time of the verification: [`Repository::wal_problem`] checks a WAL
//! object again.

use std::collections::{BTreeMap, BTreeSet};

use wal_format::{
    BackupId, BackupInfo, ObjectKey, Outcome, OutcomeKind, SealedReader, SystemIdentifier,
    WalIdentity, WalIndexer,
};

use crate::{Error, Repository, Result};

/// The damage of a backup or of a WAL object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The damaged object.
    pub object: String,
    /// The damage.
    pub problem: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.object, self.problem)
    }
}

/// The damaged backups of an archive, by name.
pub type DamagedBackups = BTreeMap<BackupId, Damage>;

/// The damaged WAL objects of an archive. A plan treats their WAL as missing.
pub type DamagedWal = BTreeMap<ObjectKey, Damage>;

impl Repository {
    /// Returns the backups and the WAL objects that the last verification found damaged.
    ///
    /// # Errors
    /// Those of [`Repository::newest_outcome`].
    pub fn known_damage(&self, system: SystemIdentifier) -> Result<(DamagedBackups, DamagedWal)> {
        let Some(verdict) = self.newest_outcome(system, OutcomeKind::Verify, |_| true)? else {
            return Ok((DamagedBackups::new(), DamagedWal::new()));
        };
        let places = self.place_urls();
        let backups = damaged_backups(&verdict, &places);
        Ok((backups, damaged_wal(&verdict, &places)))
    }

    /// Returns the backups of which an object is missing or has another length, by one listing.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn incomplete_backups(
        &self,
        system: SystemIdentifier,
        backups: &[BackupInfo],
    ) -> Result<DamagedBackups> {
        let listed: BTreeMap<ObjectKey, u64> = self
            .list(&format!("{system}/backup/"))?
            .into_iter()
            .collect();
        let damage =
            |backup: &BackupInfo| Some((backup.id.clone(), incomplete_part(backup, &listed)?));
        Ok(backups.iter().filter_map(damage).collect())
    }

    /// Reads a WAL object and decodes it. Returns its problem; `None` if the object is intact or no
    /// longer exists.
    ///
    /// # Errors
    /// Those of [`Repository::get`].
    pub fn wal_problem(&self, key: &ObjectKey, wal: WalIdentity) -> Result<Option<String>> {
        let object = match self.get(key) {
            Ok(object) => object,
            Err(Error::Damaged { problem, .. }) => return Ok(Some(problem)),
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut content = Vec::new();
        let reader = SealedReader::open(&object);
        let reader = reader.and_then(|reader| reader.read_all(&mut content).map(|_| reader));
        let reader = match reader {
            Ok(reader) => reader,
            Err(error) => return Ok(Some(error.to_string())),
        };
        let header = reader.header();
        if header.key() != *key {
            return Ok(Some(format!("it holds {}", header.key())));
        }
        // A tail may begin inside a page, which cannot be decoded without the WAL before it.
        if !header.is_whole_segment() {
            return Ok(None);
        }
        let mut indexer = WalIndexer::new(wal, header.start_lsn, None);
        if let Err(error) = indexer.push(&content) {
            return Ok(Some(error.to_string()));
        }
        let stored = &reader.summary().transactions;
        let decoded = indexer.take_summary().transactions;
        let missing = decoded.iter().find(|end| !stored.contains(end));
        Ok(missing.map(|end| format!("its summary lacks the transaction end at {}", end.lsn)))
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

/// Returns the first object of a backup that is missing among `listed`, the keys and lengths of
/// stored objects, or has another length there.
#[must_use]
pub fn incomplete_part(backup: &BackupInfo, listed: &BTreeMap<ObjectKey, u64>) -> Option<Damage> {
    let parts = backup.slices.iter();
    let parts = parts.map(|slice| (backup.slice_key(slice), slice.stored_bytes));
    let mut parts = parts.chain([(backup.manifest_key(), backup.manifest_bytes)]);
    parts.find_map(|(key, bytes)| {
        let problem = match listed.get(&key) {
            None => "it is missing".to_owned(),
            Some(found) if *found != bytes => format!("it has {found} bytes instead of {bytes}"),
            Some(_) => return None,
        };
        let object = key.to_string();
        Some(Damage { object, problem })
    })
}

/// Returns the backups that a verification found damaged in each of `places`.
#[must_use]
pub fn damaged_backups(verdict: &Outcome, places: &[String]) -> DamagedBackups {
    let mut damaged = DamagedBackups::new();
    for (key, damage) in damaged_objects(verdict, places) {
        if let ObjectKey::BackupInfo(_, id)
        | ObjectKey::BackupManifest(_, id)
        | ObjectKey::BackupSlice(_, id, ..) = key
        {
            damaged.entry(id).or_insert(damage);
        }
    }
    damaged
}

/// Returns the WAL objects that a verification found damaged in each of `places`.
#[must_use]
pub fn damaged_wal(verdict: &Outcome, places: &[String]) -> DamagedWal {
    let mut damaged = damaged_objects(verdict, places);
    damaged.retain(|key, _| matches!(key, ObjectKey::Segment(..) | ObjectKey::Tail(..)));
    damaged
}

/// Returns the objects that a verification found damaged in each of `places`. Each entry of
/// `verdict.damaged` is `KEY: PROBLEM`, or `URL: KEY: PROBLEM` if several repositories were
/// verified.
fn damaged_objects(verdict: &Outcome, places: &[String]) -> BTreeMap<ObjectKey, Damage> {
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
    found.retain(|_, (holders, _)| {
        // A verification that examined one repository names no place, so that the others of several
        // may have the object intact.
        let is_alone = places.len() == 1 && holders.contains("");
        let has_it = |place: &String| !holders.contains(place.as_str());
        is_alone || !places.iter().any(has_it)
    });
    let damage = |(key, (_, problem)): (ObjectKey, (BTreeSet<&str>, &str))| {
        let damage = Damage {
            object: key.to_string(),
            problem: format!("{problem} (`wal-archiver verify` at {})", verdict.finished),
        };
        (key, damage)
    };
    found.into_iter().map(damage).collect()
}

#[cfg(test)]
mod tests {
    use wal_format::PgTimestamp;

    use super::*;

    const ID: &str = "20261130T081705Z-8316";

    fn verdict(problems: &[&str]) -> Outcome {
        let problems: Vec<String> = problems.iter().map(|one| (*one).to_owned()).collect();
        let (id, at) = (ID.parse().expect("a name"), PgTimestamp(0));
        Outcome {
            damaged: problems,
            ..Outcome::new(OutcomeKind::Verify, id, at, at, false, String::new())
        }
    }

    fn places(urls: &[&str]) -> Vec<String> {
        urls.iter().map(|one| (*one).to_owned()).collect()
    }

    fn found(problems: &[&str], urls: &[&str]) -> Vec<(String, String)> {
        damaged_backups(&verdict(problems), &places(urls))
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
        let of_wal = |urls: &[&str]| {
            let damaged = damaged_wal(&verdict(&[wal, &problem, "key 1 is lost"]), &places(urls));
            damaged.into_keys().collect::<Vec<_>>()
        };
        let (segment, _) = wal.split_once(": ").expect("a key and a problem");
        assert_eq!(of_wal(&[here]), [segment.parse().expect("a key")]);
        assert_eq!(of_wal(&[here, there]), [], "the other may have it intact");
    }
}
