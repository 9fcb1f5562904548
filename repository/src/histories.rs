//! The timelines' history files: each is stored twice, and a timeline whose file is lost is an
//! error, never a shorter past.
//!
//! WAL and backups name their timeline together with a digest of its history file ([`Branch`]). So
//! a listing of them proves which history files must exist, and the digest proves whether a file is
//! the right one. Invariant: a timeline of which anything is archived is either known with its
//! history or reported as lost.

use std::collections::BTreeMap;

use bytes::Bytes;
use wal_format::{Branch, ObjectKey, SystemIdentifier, TimelineId};

use crate::{Error, Repository, Result, sound::is_history};

mod rebuild;
#[cfg(test)]
mod tests;

/// The timelines of a cluster of which something is archived.
#[derive(Clone, Debug, Default)]
pub struct Histories {
    /// Timelines with their history files, each checked against the digest in its name.
    pub known: Vec<(Branch, Bytes)>,
    /// Timelines of which something is archived, and no intact history file.
    pub lost: Vec<LostHistory>,
}

/// A timeline whose history file is lost: the way to it is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostHistory {
    /// The timeline.
    pub branch: Branch,
    /// The objects that prove that the timeline exists.
    pub evidence: String,
    /// The state of the file.
    pub problem: String,
}

impl LostHistory {
    /// The key of the file's first copy.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::History(system, self.branch)
    }
}

/// The file, the proof that it existed, and the remedies.
impl std::fmt::Display for LostHistory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the history file of timeline {} {}, and {} proves that the timeline exists; without the file no restore can \
             follow it. `wal-archiver verify --repair` takes it from another repository, or rebuilds it from what the \
             archive says of the timeline; `wal-archiver run` on a server of this timeline stores it again",
            self.branch.timeline, self.problem, self.evidence
        )
    }
}

impl Repository {
    /// Stores a history file twice: without it a restore would read "no parents". A copy that is
    /// damaged is replaced, since the digest in its name proves that `content` is what belongs
    /// there.
    ///
    /// # Errors
    /// As [`Repository::put`].
    pub fn put_history(
        &self,
        system: SystemIdentifier,
        branch: Branch,
        content: &[u8],
    ) -> Result<()> {
        let keys = [
            ObjectKey::History(system, branch),
            ObjectKey::HistoryCopy(system, branch),
        ];
        let mut locked = Vec::new();
        for key in keys {
            match self.put(&key, content) {
                Err(Error::Conflict { .. } | Error::Damaged { .. })
                    if is_history(branch, content) =>
                {
                    tracing::error!(
                        event = "history_copy_damaged", %key, repository = %self.url(),
                        "a copy of a history file is damaged and is written again"
                    );
                    match self.delete(&key) {
                        Err(error @ Error::Locked { .. }) => locked.push(error),
                        outcome => {
                            outcome?;
                            self.put(&key, content)?;
                        }
                    }
                }
                outcome => {
                    outcome?;
                }
            }
        }
        // One intact copy is enough to go on; `verify` names the other.
        match (locked.len(), locked.pop()) {
            (2.., Some(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// Every history file, each checked against the digest in its name; a lost or damaged one is
    /// taken from its copy.
    ///
    /// # Errors
    /// [`Error::Damaged`] when a timeline is archived and neither copy of its history file is
    /// intact.
    pub fn histories(&self, system: SystemIdentifier) -> Result<Vec<(Branch, Bytes)>> {
        let histories = self.read_histories(system)?;
        match histories.lost.first() {
            Some(lost) => Err(self.lost_history(system, lost)),
            None => Ok(histories.known),
        }
    }

    /// The branches of a timeline's number.
    ///
    /// # Errors
    /// [`Error::Damaged`] when a timeline of this number is archived and its history file is lost.
    pub fn branches_of(
        &self,
        system: SystemIdentifier,
        timeline: TimelineId,
    ) -> Result<Vec<Branch>> {
        let mut histories = self.read_histories(system)?;
        let is_it = |branch: Branch| branch.timeline == timeline;
        histories.known.retain(|(branch, _)| is_it(*branch));
        match histories.lost.iter().find(|lost| is_it(lost.branch)) {
            Some(lost) => Err(self.lost_history(system, lost)),
            None => Ok(histories.known.into_iter().map(|known| known.0).collect()),
        }
    }

    /// The error for a reader that needs a history file that is lost.
    #[must_use]
    pub fn lost_history(&self, system: SystemIdentifier, lost: &LostHistory) -> Error {
        self.damaged(&lost.key(system), lost.to_string())
    }

    /// The history files, and the timelines with archived WAL whose file is lost.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn read_histories(&self, system: SystemIdentifier) -> Result<Histories> {
        // The WAL first: a history file is always stored before the first WAL of its timeline.
        let mut folders = Vec::new();
        for kind in ["wal", "tail"] {
            for name in self.folders(&format!("{system}/{kind}/"))? {
                if let Ok(branch) = name.parse::<Branch>() {
                    folders.push((branch, format!("{system}/{kind}/{name}/")));
                }
            }
        }
        let copies = self.history_copies(system)?;
        let mut evidence = BTreeMap::new();
        for (branch, prefix) in folders {
            let is_known = branch.digest == [0; 4] || copies.contains_key(&branch);
            // An empty or foreign folder proves nothing.
            if !is_known
                && !evidence.contains_key(&branch)
                && let Some((key, _)) = self.list(&prefix)?.first()
            {
                evidence.insert(branch, key.to_string());
            }
        }
        self.histories_with(system, &copies, &evidence)
    }

    /// The history files, and the timelines among those of `evidence` whose file is lost. The
    /// evidence must have been listed before this call: a history file is stored before the first
    /// WAL of its timeline.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn histories_of(
        &self,
        system: SystemIdentifier,
        evidence: &BTreeMap<Branch, String>,
    ) -> Result<Histories> {
        self.histories_with(system, &self.history_copies(system)?, evidence)
    }

    fn histories_with(
        &self,
        system: SystemIdentifier,
        copies: &BTreeMap<Branch, u8>,
        evidence: &BTreeMap<Branch, String>,
    ) -> Result<Histories> {
        let mut histories = Histories::default();
        let listed = copies.keys().map(|branch| (*branch, true));
        let hidden = evidence
            .keys()
            .filter(|branch| !copies.contains_key(branch));
        let hidden = hidden.map(|branch| (*branch, false));
        for (branch, is_listed) in listed.chain(hidden) {
            if branch.digest == [0; 4] {
                continue;
            }
            let problem = match self.history(system, branch) {
                Ok(content) if is_listed => {
                    histories.known.push((branch, content));
                    continue;
                }
                Ok(_) => {
                    "can be read, but the store's listing does not show it, so the listing is not complete"
                        .to_owned()
                }
                Err(Error::NotFound { .. }) if is_listed => {
                    "is listed, but the store has neither of its copies".to_owned()
                }
                Err(Error::NotFound { .. }) => "is missing in both copies".to_owned(),
                Err(Error::Damaged { problem, .. }) => format!("is damaged in both copies ({problem})"),
                Err(error) => return Err(error),
            };
            let evidence = evidence.get(&branch).cloned();
            let name = || ObjectKey::History(system, branch).to_string();
            histories.lost.push(LostHistory {
                branch,
                evidence: evidence.unwrap_or_else(name),
                problem,
            });
        }
        Ok(histories)
    }

    /// The number of copies of each history file, intact or not.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn history_copies(&self, system: SystemIdentifier) -> Result<BTreeMap<Branch, u8>> {
        let mut copies = BTreeMap::new();
        for folder in ["history", "history-copy"] {
            for (key, _) in self.list(&format!("{system}/{folder}/"))? {
                if let ObjectKey::History(_, branch) | ObjectKey::HistoryCopy(_, branch) = key {
                    *copies.entry(branch).or_default() += 1;
                }
            }
        }
        Ok(copies)
    }

    /// One history file, from the first copy that is intact.
    ///
    /// # Errors
    /// [`Error::NotFound`] when neither copy exists, [`Error::Damaged`] when none is intact.
    pub fn history(&self, system: SystemIdentifier, branch: Branch) -> Result<Bytes> {
        let keys = [
            ObjectKey::History(system, branch),
            ObjectKey::HistoryCopy(system, branch),
        ];
        let mut missing = None;
        let mut damaged = None;
        for key in &keys {
            match self.get(key) {
                Ok(content) if is_history(branch, &content) => return Ok(content),
                Ok(_) => {
                    tracing::error!(
                        event = "history_copy_damaged", %key,
                        "a copy of a history file is damaged; the other one is used"
                    );
                    damaged = Some(self.damaged(key, "it is not what was stored".to_owned()));
                }
                Err(error @ Error::NotFound { .. }) => missing = Some(error),
                Err(error @ Error::Damaged { .. }) => damaged = Some(error),
                Err(error) => return Err(error),
            }
        }
        let error = damaged.or(missing);
        Err(error.unwrap_or_else(|| self.damaged(&keys[0], "unreadable".to_owned())))
    }
}
