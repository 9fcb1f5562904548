//! The results of drills, backups and verifications: small objects that any host may store in the
//! repository ([`crate::audit`] stores them). The archiver's dashboard, retention and a restore's
//! plan read them.

use std::{collections::BTreeMap, path::PathBuf};

use bytes::Bytes;
use wal_format::{BackupId, ObjectKey, Outcome, OutcomeKind, PgTimestamp, SystemIdentifier};

use crate::{Damage, Error, Repository, Result, config::ClusterSettings};

/// The number of outcomes of a kind that are kept in memory: a trend of months, bounded.
pub const OUTCOMES_MAX: usize = 100;
/// The kinds that the dashboard reads. The others are read by the audit trail only.
const REPORTED: [OutcomeKind; 5] = [
    OutcomeKind::Backup,
    OutcomeKind::Drill,
    OutcomeKind::Expire,
    OutcomeKind::Restore,
    OutcomeKind::Verify,
];
/// The number of outcomes that a search for the newest of a kind reads.
const NEWEST_MAX: usize = 10;

/// Returns the file in the spool's directory that changes with each backup and outcome of this
/// host. The daemon reads the repository when it changes.
#[must_use]
pub fn outcome_mark(settings: &ClusterSettings) -> PathBuf {
    settings
        .spool
        .join(settings.name.as_str())
        .join("newest-backup")
}

/// Returns the file in the spool's directory to which the daemon copies the content of
/// [`outcome_mark`] after it has read the repository because of it.
#[must_use]
pub fn outcome_seen(settings: &ClusterSettings) -> PathBuf {
    settings
        .spool
        .join(settings.name.as_str())
        .join("newest-backup-seen")
}

/// Returns a name from the time at which an operation began: the second, and 65536ths of it in
/// hexadecimal. Names are in the order of the times, because the newest of a kind is the last by
/// name.
#[must_use]
pub fn outcome_name(began: jiff::Timestamp) -> Option<BackupId> {
    let nanoseconds = i64::from(began.subsec_nanosecond()).max(0);
    let part = nanoseconds * 0x1_0000 / 1_000_000_000;
    format!("{}-{part:04x}", began.strftime("%Y%m%dT%H%M%SZ"))
        .parse()
        .ok()
}

/// Returns the time from which [`outcome_name`] made a name, to a 65536th of a second. `None` for a
/// name that it did not make.
#[must_use]
pub fn outcome_time(name: &BackupId) -> Option<jiff::Timestamp> {
    let (second, part) = name.as_str().rsplit_once('-')?;
    let second = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", second).ok()?;
    let second = jiff::tz::TimeZone::UTC.to_timestamp(second).ok()?;
    let part = i64::from_str_radix(part, 16).ok()?;
    // Rounded up, so that the name of this time is the same one.
    let nanoseconds = (part * 1_000_000_000 + 0xFFFF) / 0x1_0000;
    second
        .checked_add(jiff::SignedDuration::from_nanos(nanoseconds))
        .ok()
}

/// The difference between the clocks of two hosts that is tolerated.
const CLOCKS_DIFFER_MICROS: i64 = 60_000_000;

/// Returns true for an outcome with a time of the future, which a host with a wrong clock can
/// record. It does not count: it would hide every later outcome.
fn is_of_future(outcome: &Outcome) -> bool {
    let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
    outcome.finished.0 > now.0.saturating_add(CLOCKS_DIFFER_MICROS)
}

pub(crate) fn parse(json: &Bytes) -> std::result::Result<Outcome, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// The newest outcomes of each kind.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    known: BTreeMap<(OutcomeKind, BackupId), Outcome>,
    /// The problems of objects that cannot be parsed.
    unreadable: BTreeMap<(OutcomeKind, BackupId), String>,
    is_read: bool,
}

impl Outcomes {
    /// Returns the outcomes that can be parsed, without those of the future.
    pub fn iter(&self) -> impl Iterator<Item = &Outcome> {
        self.known.values().filter(|outcome| !is_of_future(outcome))
    }

    /// Returns true once the outcomes were read from the repository.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.is_read
    }

    /// Returns the kinds whose newest outcome cannot be parsed, with the object and its problem.
    /// Nobody knows how the newest operation of such a kind ended.
    #[must_use]
    pub fn unreadable_newest(&self) -> BTreeMap<OutcomeKind, String> {
        let mut newest = BTreeMap::new();
        for ((kind, id), problem) in &self.unreadable {
            if !self
                .iter()
                .any(|known| known.kind == *kind && known.id > *id)
            {
                let remedy = format!("run the {kind} again, or remove the object");
                newest.insert(*kind, format!("{problem}; {remedy}"));
            }
        }
        newest
    }
}

impl Repository {
    /// Returns the newest verification.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it cannot be parsed; [`Error::Store`], [`Error::S3`].
    pub fn newest_verification(&self, system: SystemIdentifier) -> Result<Option<Outcome>> {
        let listed = self.list(&format!("{system}/outcome/{}/", OutcomeKind::Verify))?;
        let damaged = |damage: Damage| Error::Damaged {
            key: damage.object,
            url: self.url(),
            problem: format!(
                "{}; what this verification found is not known: run `wal-archiver verify` again",
                damage.problem
            ),
        };
        for (key, _) in listed.iter().rev() {
            let outcome = self.read_small(key, parse)?.map_err(damaged)?;
            if !is_of_future(&outcome) {
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    /// Returns the newest outcome of a kind that is `wanted`, if it is among the last few. An
    /// outcome that does not parse is skipped with a warning: a newer version may have written it.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn newest_outcome(
        &self,
        system: SystemIdentifier,
        kind: OutcomeKind,
        wanted: impl Fn(&Outcome) -> bool,
    ) -> Result<Option<Outcome>> {
        let listed = self.list(&format!("{system}/outcome/{kind}/"))?;
        for (key, _) in listed.iter().rev().take(NEWEST_MAX) {
            match self.read_small(key, parse)? {
                Ok(outcome) if wanted(&outcome) && !is_of_future(&outcome) => {
                    return Ok(Some(outcome));
                }
                Ok(_) => {}
                Err(damage) => {
                    tracing::warn!(event = "outcome_unreadable", %damage, "an outcome is skipped");
                }
            }
        }
        Ok(None)
    }

    /// Adds new outcomes of the reported kinds to `outcomes`, and removes all but the newest of
    /// each kind. An outcome that does not parse is logged once: a newer version may have written
    /// it.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn add_outcomes(&self, system: SystemIdentifier, outcomes: &mut Outcomes) -> Result<()> {
        let Outcomes {
            known,
            unreadable,
            is_read,
        } = outcomes;
        let mut listed: BTreeMap<OutcomeKind, Vec<BackupId>> = BTreeMap::new();
        for (key, _) in self.list(&format!("{system}/outcome/"))? {
            if let ObjectKey::Outcome(_, kind, id) = key
                && REPORTED.contains(&kind)
            {
                listed.entry(kind).or_default().push(id);
            }
        }
        for (kind, ids) in &listed {
            for id in ids.iter().rev().take(OUTCOMES_MAX) {
                let place = (*kind, id.clone());
                if known.contains_key(&place) {
                    continue;
                }
                let key = ObjectKey::Outcome(system, *kind, id.clone());
                match self.read_small(&key, parse)? {
                    Ok(outcome) => {
                        unreadable.remove(&place);
                        known.insert(place, outcome);
                    }
                    Err(damage) => {
                        let problem = damage.to_string();
                        if unreadable.insert(place, problem).is_none() {
                            tracing::warn!(
                                event = "outcome_unreadable", %damage, "an outcome is skipped"
                            );
                        }
                    }
                }
            }
        }
        let is_kept = |(kind, id): &(OutcomeKind, BackupId)| {
            let newest = listed.get(kind).map_or(&[][..], Vec::as_slice);
            let from = newest.len().saturating_sub(OUTCOMES_MAX);
            newest[from..].contains(id)
        };
        known.retain(|place, _| is_kept(place));
        unreadable.retain(|place, _| is_kept(place));
        *is_read = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::LocalStore;

    #[test]
    fn a_name_gives_the_time_from_which_it_was_made() {
        for text in [
            "2026-11-30T02:00:00Z",
            "2026-11-30T02:00:00.999999999Z",
            "1970-01-01T00:00:00.5Z",
        ] {
            let began: jiff::Timestamp = text.parse().expect(text);
            let name = outcome_name(began).expect(text);
            let time = outcome_time(&name).expect(text);
            assert_eq!(outcome_name(time), Some(name), "{text}");
            let error = time.duration_since(began).abs();
            assert!(
                error < jiff::SignedDuration::from_micros(16),
                "{text}: {time}"
            );
        }
    }

    /// A host with a wrong clock can record such a result. It must not hide the later ones.
    #[test]
    fn a_result_of_the_future_does_not_count() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Arc::new(LocalStore::open(directory.path()).expect("a folder"));
        let repository = Repository::with_store(store, "main".parse().expect("a name"));
        let system = SystemIdentifier(7);
        let now = jiff::Timestamp::now();
        for (minutes, passed) in [(-1, false), (10, true)] {
            let at = now + jiff::SignedDuration::from_mins(minutes);
            let time = PgTimestamp::from_jiff(at);
            let id = outcome_name(at).expect("a name");
            let kind = OutcomeKind::Verify;
            let outcome = Outcome::new(kind, id, time, time, passed, String::new());
            repository.put_outcome(system, &outcome).expect("a put");
        }
        let failed = |outcome: Option<Outcome>| assert!(!outcome.expect("an outcome").passed);
        failed(repository.newest_verification(system).expect("it reads"));
        let newest = repository.newest_outcome(system, OutcomeKind::Verify, |_| true);
        failed(newest.expect("it reads"));
        let mut outcomes = Outcomes::default();
        repository
            .add_outcomes(system, &mut outcomes)
            .expect("it reads");
        assert_eq!(outcomes.iter().count(), 1);
    }

    #[test]
    fn names_of_one_second_are_in_the_order_of_their_times() {
        let names: Vec<BackupId> = [0, 1_000, 20_000, 500_000, 999_999]
            .map(|micros| 1_700_000_000_000_000 + micros)
            .map(|micros| jiff::Timestamp::from_microsecond(micros).expect("a time"))
            .map(|time| outcome_name(time).expect("a name"))
            .to_vec();
        assert!(names.is_sorted(), "{names:?}");
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }
}
