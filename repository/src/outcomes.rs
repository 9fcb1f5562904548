//! The results of drills, backups and verifications: small objects that any host may store in the
//! repository. The archiver's dashboard, retention and a restore's plan read them.

use std::collections::BTreeMap;

use bytes::Bytes;
use wal_format::{BackupId, ObjectKey, Outcome, OutcomeKind, SystemIdentifier};

use crate::{Error, Repository, Result};

/// The number of outcomes of a kind that are kept in memory: a trend of months, bounded.
pub const OUTCOMES_MAX: usize = 100;
/// The number of outcomes that a search for the newest of a kind reads.
const NEWEST_MAX: usize = 10;

fn parse(json: &Bytes) -> std::result::Result<Outcome, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

impl Repository {
    /// Records the result of an operation.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`]; [`Error::Conflict`] when another outcome has this name.
    pub fn put_outcome(&self, system: SystemIdentifier, outcome: &Outcome) -> Result<()> {
        let key = outcome.key(system);
        let json = serde_json::to_vec_pretty(outcome).map_err(|error| Error::Damaged {
            key: key.to_string(),
            url: self.url(),
            problem: error.to_string(),
        })?;
        self.put(&key, &json).map(|_| ())
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
                Ok(outcome) if wanted(&outcome) => return Ok(Some(outcome)),
                Ok(_) => {}
                Err(damage) => {
                    tracing::warn!(event = "outcome_unreadable", %damage, "an outcome is skipped");
                }
            }
        }
        Ok(None)
    }

    /// Adds new outcomes to `known`, and removes all but the newest of each kind. An outcome that
    /// does not parse is skipped with a warning: a newer version may have written it.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn add_outcomes(
        &self,
        system: SystemIdentifier,
        known: &mut BTreeMap<(OutcomeKind, BackupId), Outcome>,
    ) -> Result<()> {
        let mut listed: BTreeMap<OutcomeKind, Vec<BackupId>> = BTreeMap::new();
        for (key, _) in self.list(&format!("{system}/outcome/"))? {
            if let ObjectKey::Outcome(_, kind, id) = key {
                listed.entry(kind).or_default().push(id);
            }
        }
        for (kind, ids) in &listed {
            for id in ids.iter().rev().take(OUTCOMES_MAX) {
                if known.contains_key(&(*kind, id.clone())) {
                    continue;
                }
                let key = ObjectKey::Outcome(system, *kind, id.clone());
                match self.read_small(&key, parse)? {
                    Ok(outcome) => {
                        known.insert((*kind, id.clone()), outcome);
                    }
                    Err(damage) => {
                        tracing::warn!(event = "outcome_unreadable", %damage, "an outcome is skipped");
                    }
                }
            }
        }
        known.retain(|(kind, id), _| {
            let newest = listed.get(kind).map_or(&[][..], Vec::as_slice);
            let from = newest.len().saturating_sub(OUTCOMES_MAX);
            newest[from..].contains(id)
        });
        Ok(())
    }
}
