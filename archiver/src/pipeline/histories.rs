//! Stores history files again that the repository has lost: from the spool at startup, and from the
//! server at each start of a stream. The server may have the last copy, and it removes the files
//! eventually.
//!
//! Invariant: the stream never waits here for a request to the repository.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use repository::Repository;
use wal_format::{Branch, Lsn, ObjectKey, WalIdentity};

use super::{Pipeline, archive::Archive};
use crate::{blocking::blocking, core::start::ServerBranch, error::Result, spool::Spool};

/// Stores the history files that the spool has and the repository lacks. Returns their number.
pub(super) fn put_back(
    spool: &Spool,
    repository: &Repository,
    identity: &WalIdentity,
) -> Result<usize> {
    let mut files = Vec::new();
    for spooled in spool.branches(identity)? {
        if let Some(content) = spooled.history()? {
            files.push((spooled.branch(), Bytes::from(content)));
        }
    }
    store_missing(repository, identity, &files, "the spool")
}

/// Adopts the history files of the server's path that the catalog lacks, and starts to store those
/// that the repository lacks.
pub(super) async fn take_from_server(pipeline: &Pipeline, path: &[ServerBranch]) -> Result<()> {
    let files: Vec<(Branch, Bytes)> = path
        .iter()
        .filter_map(|on| Some((on.branch, on.history.clone()?)))
        .collect();
    if files.is_empty() {
        return Ok(());
    }
    let archive = Arc::clone(pipeline.archive());
    let archived = blocking(move || archive.adopt_histories(files)).await?;
    if archived.is_empty() || pipeline.archive().is_away() {
        return Ok(());
    }
    let archive = Arc::clone(pipeline.archive());
    let stored = blocking(move || archive.store_missing_histories(&archived));
    tokio::spawn(async move {
        if let Err(error) = stored.await {
            tracing::warn!(
                event = "history_not_put_back", %error,
                "a history file may be missing in the repository; the next stream tries again"
            );
        }
    });
    Ok(())
}

impl Archive {
    /// Returns the files whose timelines are archived, and enters each in the catalog. Without its
    /// history file, a timeline with stored WAL would be treated as one of which nothing is held.
    fn adopt_histories(&self, files: Vec<(Branch, Bytes)>) -> Result<Vec<(Branch, Bytes)>> {
        let known: BTreeSet<Branch> = self
            .catalog()
            .branches()?
            .into_iter()
            .map(|(branch, ..)| branch)
            .collect();
        let backups = self.catalog().backups()?;
        let mut archived = Vec::new();
        for (branch, content) in files {
            if !known.contains(&branch) {
                let has_backup = backups.iter().any(|backup| backup.branch == branch);
                let ranges = self.catalog().ranges(branch, Lsn::ZERO, Lsn::MAX)?;
                if ranges.is_empty() && !has_backup {
                    // This timeline gets its history file before its first WAL.
                    continue;
                }
                self.catalog().put_branch(branch, Some(&content))?;
            }
            archived.push((branch, content));
        }
        Ok(archived)
    }

    /// Stores each history file again of which the repository has lost a copy. The content comes
    /// from the catalog. Costs two listings if any timeline has a history file.
    ///
    /// # Errors
    /// [`crate::error::Error::Repository`].
    pub(super) fn put_back_histories(&self) -> Result<()> {
        let branches = self.catalog().branches()?.into_iter();
        let files: Vec<(Branch, Bytes)> = branches
            .filter(|(_, history, _)| history.is_some())
            .map(|(branch, _, content)| (branch, content))
            .collect();
        if files.is_empty() {
            return Ok(());
        }
        let system = self.identity().system_identifier;
        let copies = self.repository().history_copies(system)?;
        for (branch, content) in files {
            let left = copies.get(&branch).copied().unwrap_or_default();
            if left >= 2 {
                continue;
            }
            self.repository().put_history(system, branch, &content)?;
            let key = ObjectKey::History(system, branch);
            let message = format!(
                "{key}: {} of the two copies of this history file had been lost; it was stored again",
                2 - left
            );
            tracing::error!(event = "history_put_back", cluster = %self.cluster.cluster, "{message}");
            self.status().note(|facts| facts.repaired.push(message));
        }
        Ok(())
    }

    fn store_missing_histories(&self, files: &[(Branch, Bytes)]) -> Result<()> {
        // One run at a time: threads must not accumulate while a store does not answer.
        let Ok(_alone) = self.putting_back.try_lock() else {
            return Ok(());
        };
        self.check_before_put()?;
        store_missing(self.repository(), self.identity(), files, "the server")?;
        Ok(())
    }
}

/// Stores each file of which one of the two copies is missing, or of which neither copy is intact.
/// Returns the number of stored files.
fn store_missing(
    repository: &Repository,
    identity: &WalIdentity,
    files: &[(Branch, Bytes)],
    source: &str,
) -> Result<usize> {
    if files.is_empty() {
        return Ok(0);
    }
    let system = identity.system_identifier;
    let copies = repository.history_copies(system)?;
    let mut count = 0;
    for (branch, content) in files {
        let is_whole = copies.get(branch).is_some_and(|copies| *copies >= 2);
        let is_lost = |error: repository::Error| !error.is_transient();
        if is_whole && !repository.history(system, *branch).is_err_and(is_lost) {
            continue;
        }
        tracing::info!(
            event = "history_put_back", %branch, source,
            "a history file is stored, which the repository lacks"
        );
        repository.put_history(system, *branch, content)?;
        count += 1;
    }
    Ok(count)
}
