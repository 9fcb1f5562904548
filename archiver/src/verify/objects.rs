//! Reads every object whole and checks it by the sums, names and digests that it has.

use std::collections::BTreeSet;

use bytes::Bytes;
use wal_format::{
    BackupId, BackupInfo, BackupNote, Branch, FailoverLoss, ObjectKey, Outcome, SealedReader,
    TimelineHistory, WalIndexer, checked_json,
};

use super::{Verifier, backup::BackupCheck};
use crate::error::Result;

impl Verifier {
    /// Reads every object whole; returns how many there are.
    pub(super) fn objects(&mut self) -> Result<usize> {
        let system = self.wal.system_identifier;
        let mut objects = self.repository.list(&format!("{system}/"))?;
        // Results of earlier operations are only parsed: no restore needs them. Objects that wait
        // for their removal are not verified.
        for (key, _) in &objects {
            if matches!(key, ObjectKey::Outcome(..))
                && let Err(problem) = self.outcome(key)
            {
                self.unreadable.push(format!("{key}: {problem}"));
            }
        }
        let expired = self.repository.expired(system)?;
        objects.retain(|(key, _)| {
            !matches!(key, ObjectKey::Outcome(..)) && !expired.hides(key, self.wal.segment_size)
        });
        self.undescribed = undescribed(&objects);
        for (key, _) in &objects {
            match key {
                ObjectKey::Segment(..) | ObjectKey::Tail(..) => self.wal_object(key)?,
                ObjectKey::BackupInfo(_, id) => self.backup(id)?,
                ObjectKey::History(_, branch) => self.history(*branch, key)?,
                ObjectKey::HistoryCopy(_, branch) => {
                    let first = ObjectKey::History(system, *branch);
                    if self.repository.head(&first)?.is_none() {
                        self.problem(&first, "the first of its two copies is missing");
                    }
                }
                ObjectKey::Gap(..) => {
                    if let Some(content) = self.read(key)? {
                        match checked_json::from_slice(&content) {
                            Ok(gap) => self.gaps.push(gap),
                            Err(error) => self.problem(key, &error.to_string()),
                        }
                    }
                }
                ObjectKey::FailoverLoss(..) => {
                    if let Some(content) = self.read(key)?
                        && let Err(error) = checked_json::from_slice::<FailoverLoss>(&content)
                    {
                        self.problem(key, &error.to_string());
                    }
                }
                ObjectKey::BackupNote(..) => {
                    if let Some(content) = self.read(key)?
                        && let Err(error) = checked_json::from_slice::<BackupNote>(&content)
                    {
                        self.problem(key, &error.to_string());
                    }
                }
                ObjectKey::Expired(..) => {
                    if let Some(content) = self.read(key)?
                        && let Err(error) =
                            checked_json::from_slice::<wal_format::Expired>(&content)
                    {
                        self.problem(key, &error.to_string());
                    }
                }
                // Checked with their backup; the identity before anything.
                ObjectKey::BackupSlice(..)
                | ObjectKey::BackupManifest(..)
                | ObjectKey::Outcome(..)
                | ObjectKey::Epoch(_)
                | ObjectKey::EpochCopy(_) => {}
            }
        }
        Ok(objects.len())
    }

    /// Returns the problem of a recorded result, with the remedy. Only a damaged one has to be
    /// removed: a request may fail for a time.
    fn outcome(&self, key: &ObjectKey) -> Result<(), String> {
        let problem = match self.repository.get(key) {
            // Another host removed it after it was listed.
            Err(error) if error.is_not_found() => return Ok(()),
            Err(repository::Error::Damaged { problem, .. }) => problem,
            Err(error) => return Err(format!("this result could not be read: {error}")),
            Ok(content) => match serde_json::from_slice::<Outcome>(&content) {
                Ok(_) => return Ok(()),
                Err(error) => error.to_string(),
            },
        };
        Err(format!(
            "{problem}; this result is ignored, no restore needs it. Remove the object"
        ))
    }

    /// An object; `None` when the store itself sees its damage or does not have it, which is a
    /// problem, and when it was replaced since it was listed, which is not.
    fn read(&mut self, key: &ObjectKey) -> Result<Option<Bytes>> {
        match self.repository.get(key) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(repository::Error::Damaged { problem, .. }) => {
                self.problem(key, &problem);
                Ok(None)
            }
            // Replaced since it was listed.
            Err(error)
                if error.is_not_found()
                    && matches!(key, ObjectKey::Tail(..) | ObjectKey::Expired(..)) =>
            {
                Ok(None)
            }
            Err(error) if error.is_not_found() => {
                self.problem(key, "it is listed, and the store does not have it");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn wal_object(&mut self, key: &ObjectKey) -> Result<()> {
        if let Some(object) = self.read(key)?
            && let Some(problem) = self.wal_problem(key, &object)
        {
            self.problem(key, &problem);
        }
        Ok(())
    }

    fn wal_problem(&mut self, key: &ObjectKey, object: &[u8]) -> Option<String> {
        let mut wal = Vec::new();
        let reader = match SealedReader::open(object) {
            Ok(reader) => reader,
            Err(error) => return Some(error.to_string()),
        };
        if let Err(error) = reader.read_all(&mut wal) {
            return Some(error.to_string());
        }
        let header = reader.header();
        if header.key() != *key {
            return Some(format!("it holds {}", header.key()));
        }
        if !self.deep {
            return None;
        }
        let whole = header.is_whole_segment();
        let mut indexer = match self.indexers.remove(&header.branch) {
            Some(indexer) if whole && indexer.position() == header.start_lsn => indexer,
            // A tail in the middle of a page, or in the unused zeros after a segment switch, cannot
            // be decoded alone; its frames were checked.
            _ if !whole && (header.start_lsn.page_offset() != 0 || is_unused(&wal)) => {
                return None;
            }
            _ => WalIndexer::new(self.wal, header.start_lsn, None),
        };
        if let Err(error) = indexer.push(&wal) {
            return Some(error.to_string());
        }
        let decoded = indexer.take_summary();
        let stored = reader.summary();
        let missing = decoded
            .transactions
            .iter()
            .find(|transaction| !stored.transactions.contains(transaction));
        if whole {
            self.indexers.insert(header.branch, indexer);
        }
        missing.map(|transaction| {
            format!(
                "its summary lacks the transaction end at {}",
                transaction.lsn
            )
        })
    }

    fn history(&mut self, branch: Branch, key: &ObjectKey) -> Result<()> {
        let copy = ObjectKey::HistoryCopy(self.wal.system_identifier, branch);
        for key in [key, &copy] {
            if *key == copy && self.repository.head(key)?.is_none() {
                self.problem(key, "the second of its two copies is missing");
            } else if let Some(content) = self.read(key)? {
                if Branch::of_history(branch.timeline, &content) != branch {
                    self.problem(key, "its content is not what its name says");
                } else if let Err(error) = TimelineHistory::parse(branch.timeline, &content) {
                    self.problem(key, &error.to_string());
                }
            }
        }
        Ok(())
    }

    pub(super) fn backup(&mut self, id: &BackupId) -> Result<()> {
        let system = self.wal.system_identifier;
        let key = ObjectKey::BackupInfo(system, id.clone());
        let Some(content) = self.read(&key)? else {
            return Ok(());
        };
        let info = match BackupInfo::parse_of(&key, &content) {
            Ok(info) => info,
            Err(error) => {
                self.problem(&key, &format!("it cannot be used: {error}"));
                return Ok(());
            }
        };
        let mut check = BackupCheck::new(&info);
        for (key, sha256) in check.parts() {
            if self.repository.head(&key)?.is_none() {
                self.problem(&key, "it is missing");
                continue;
            }
            let Some(body) = self.read(&key)? else {
                continue;
            };
            if let Some(problem) = check.problem(&key, &sha256, &body) {
                self.problem(&key, &problem);
            }
        }
        Ok(())
    }
}

/// Backups of which there are objects and no description.
fn undescribed(objects: &[(ObjectKey, u64)]) -> Vec<BackupId> {
    let (mut described, mut found) = (BTreeSet::new(), BTreeSet::new());
    for (key, _) in objects {
        match key {
            ObjectKey::BackupInfo(_, id) => {
                described.insert(id);
            }
            ObjectKey::BackupSlice(_, id, ..) | ObjectKey::BackupManifest(_, id) => {
                found.insert(id);
            }
            _ => {}
        }
    }
    found
        .difference(&described)
        .map(|id| (*id).clone())
        .collect()
}

/// Returns true if WAL begins with a page of zeros, which PostgreSQL leaves after a segment switch.
fn is_unused(wal: &[u8]) -> bool {
    let page = usize::try_from(wal_format::lsn::PAGE_SIZE).unwrap_or(usize::MAX);
    wal.iter().take(page).all(|byte| *byte == 0)
}
