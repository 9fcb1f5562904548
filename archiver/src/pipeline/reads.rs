//! Reads the WAL that the archive holds: from the spool or the repository, of a branch or of the
//! branch that it forked from.
//!
//! Invariant: nothing is changed here, and everything that is returned was verified.

use std::{fs::File, io, sync::PoisonError};

use repository::WalRange;
use wal_format::{
    Branch, Lsn, ObjectKey, SealedReader, SegmentNo, TimelineHistory, TimelineId, TransactionEnd,
    WalIndexer,
};

use super::archive::Archive;
use crate::{
    error::{Error, Result},
    spool::before::Before,
};

/// The reason why a segment could not be copied into a file.
enum Unheld {
    Sealed(Error),
    Disk(io::Error),
}

impl From<io::Error> for Unheld {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// More zeros than the record of a commit ends with.
const ZEROS_OF_A_RECORD: usize = 64;

impl Archive {
    /// Returns the WAL of the tails that the repository holds of an open segment, from its start,
    /// without a gap.
    ///
    /// # Errors
    /// [`Error::Repository`], [`intake::Error::Sealed`].
    pub fn read_tails(&self, branch: Branch, segment: SegmentNo) -> Result<Vec<u8>> {
        let start = segment.start_lsn(self.identity().segment_size);
        let tails = self.tails_of(branch, segment);
        let mut wal = Vec::new();
        for tail in tails {
            let end = start.add(wal.len() as u64);
            if tail.start_lsn > end {
                break;
            }
            if tail.end_lsn <= end {
                continue;
            }
            let bytes = self.read_object(&tail.key(&self.cluster))?;
            let known = usize::try_from(end.bytes_since(tail.start_lsn)).unwrap_or(usize::MAX);
            wal.extend_from_slice(bytes.get(known..).unwrap_or_default());
        }
        Ok(wal)
    }

    /// Returns the end of the WAL that [`Archive::read_tails`] would return, without reading it.
    pub(super) fn tail_end(&self, branch: Branch, segment: SegmentNo) -> Lsn {
        let start = segment.start_lsn(self.identity().segment_size);
        let tails = self.tails_of(branch, segment);
        tails.iter().fold(start, |end, tail| {
            if tail.start_lsn > end {
                end
            } else {
                end.max(tail.end_lsn)
            }
        })
    }

    fn tails_of(&self, branch: Branch, segment: SegmentNo) -> Vec<WalRange> {
        let known = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tails = known.get(&(branch, segment)).cloned().unwrap_or_default();
        drop(known);
        tails.sort_by_key(|tail| tail.start_lsn);
        tails
    }

    /// Returns the WAL bytes of a sealed object, all verified.
    ///
    /// # Errors
    /// [`Error::Repository`], [`intake::Error::Sealed`].
    pub fn read_object(&self, key: &ObjectKey) -> Result<Vec<u8>> {
        let object = self.repository().get(key)?;
        let mut wal = Vec::new();
        SealedReader::open(&object)
            .and_then(|reader| reader.read_all(&mut wal))
            .map_err(|source| {
                Error::Wal(intake::Error::Sealed {
                    object: key.to_string(),
                    source,
                })
            })?;
        Ok(wal)
    }

    /// Reads what the archive holds of a segment, from the spool or the repository, of the branch
    /// itself or of the branch that it forked from. Callers use it to find the start of a record
    /// that began in the previous segment, so an unreadable segment is reported as `None`.
    pub fn read_segment(&self, branch: Branch, segment: SegmentNo) -> Result<Option<Vec<u8>>> {
        for branch in self.lineage_at(branch, segment)? {
            if let Some(bytes) = self.read_on(branch, segment)? {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// As [`Archive::read_segment`], but only of this branch.
    pub(super) fn read_on(&self, branch: Branch, segment: SegmentNo) -> Result<Option<Vec<u8>>> {
        if let Some(bytes) = self.branch_spool(branch).read(segment)? {
            return Ok(Some(bytes));
        }
        match self.sealed_key(branch, segment)? {
            Some(key) => self.read_object(&key).map(Some),
            None => Ok(None),
        }
    }

    /// The key of a sealed segment that the repository has.
    fn sealed_key(&self, branch: Branch, segment: SegmentNo) -> Result<Option<ObjectKey>> {
        let name = self.branch_spool(branch).name(segment);
        let key = ObjectKey::Segment(self.identity().system_identifier, branch, name);
        // A segment leaves the spool only if no record continues past its end. The file of a
        // segment that is still needed is therefore in the spool.
        if self.is_away() {
            return Ok(None);
        }
        match self.repository().head(&key) {
            Ok(found) => Ok(found.map(|_| key)),
            // One of several repositories is away: what the others lack counts as not held.
            Err(error) if error.is_transient() && self.repository().is_partly_away() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Copies what the archive holds of a segment of this branch to a file. Only the stored
    /// (compressed) form is held in memory, never all of the WAL.
    ///
    /// # Errors
    /// [`Error::Repository`], [`intake::Error::Sealed`], [`Error::Io`].
    pub(super) fn hold_segment(
        &self,
        branch: Branch,
        segment: SegmentNo,
    ) -> Result<Option<Before>> {
        let spool = self.branch_spool(branch);
        let path = spool.path(segment);
        match File::open(&path) {
            Ok(file) => {
                return Before::of_file(file)
                    .map(Some)
                    .map_err(Error::io("stat", path));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("open", path)(error)),
        }
        let Some(key) = self.sealed_key(branch, segment)? else {
            return Ok(None);
        };
        let object = self.repository().get(&key)?;
        let damaged = |source| {
            Error::Wal(intake::Error::Sealed {
                object: key.to_string(),
                source,
            })
        };
        let directory = spool.directory();
        let held = Before::of_pieces(directory, |file| {
            let reader = SealedReader::open(&object).map_err(|e| Unheld::Sealed(damaged(e)))?;
            let mut frames = reader.frames().map_err(|e| Unheld::Sealed(damaged(e)))?;
            while let Some(frame) = frames.next() {
                let (_, wal) = frame.map_err(|e| Unheld::Sealed(damaged(e)))?;
                file.write_all(wal)?;
            }
            Ok(())
        });
        held.map(Some).map_err(|error| match error {
            Unheld::Sealed(error) => error,
            Unheld::Disk(error) => Error::io("write a file in", directory)(error),
        })
    }

    /// Returns the transactions that committed in a range of a branch, in LSN order. `None` if some
    /// of its WAL cannot be read now.
    ///
    /// # Errors
    /// [`Error::Repository`], [`Error::Io`].
    pub fn commits(
        &self,
        branch: Branch,
        from: Lsn,
        to: Lsn,
    ) -> Result<Option<Vec<TransactionEnd>>> {
        let size = self.identity().segment_size;
        let mut segment = size.segment_of(from);
        let mut indexer = WalIndexer::primed(self.identity(), segment, |earlier| {
            self.read_segment(branch, earlier)
        })?;
        while segment.start_lsn(size) < to {
            let needed = to.min(segment.end_lsn(size));
            let has = |bytes: &[u8]| segment.start_lsn(size).add(bytes.len() as u64) >= needed;
            let mut bytes = self.read_segment(branch, segment)?.unwrap_or_default();
            if !has(&bytes) {
                // A torn spool may hold less than the repository received.
                let tails = self.read_tails(branch, segment)?;
                if tails.len() > bytes.len() {
                    bytes = tails;
                }
            }
            if !has(&bytes) {
                return Ok(None);
            }
            // The WAL may end inside a record. Zeros at the end of that record look the same in the
            // spool as the unwritten zeros after it, so stop here.
            if indexer.push(&bytes).is_err() {
                break;
            }
            if bytes.len() < size.len() {
                let zeros = [0; ZEROS_OF_A_RECORD];
                if let Err(error) = indexer.push(&zeros) {
                    tracing::debug!(%error, "the WAL ends here");
                }
                break;
            }
            segment = segment.next();
        }
        let mut ends = indexer.take_summary().transactions;
        ends.retain(|end| end.kind.is_commit() && from <= end.lsn && end.lsn < to);
        Ok(Some(ends))
    }

    /// Returns the branch. For a segment that ends before the branch began, also returns the
    /// ancestor that holds the segment.
    fn lineage_at(&self, branch: Branch, segment: SegmentNo) -> Result<Vec<Branch>> {
        let mut lineage = vec![branch];
        let Some(history) = self.history(branch)? else {
            return Ok(lineage);
        };
        let end = segment.end_lsn(self.identity().segment_size);
        let holder = history.timeline_at(Lsn(end.0.saturating_sub(1)));
        if holder == branch.timeline {
            return Ok(lineage);
        }
        lineage.extend(self.ancestor(&history, holder)?);
        Ok(lineage)
    }

    /// Returns the branch of an ancestor: the branch of that timeline whose own history agrees with
    /// the descendant's.
    pub(crate) fn ancestor(
        &self,
        history: &TimelineHistory,
        timeline: TimelineId,
    ) -> Result<Option<Branch>> {
        if timeline == TimelineId::FIRST {
            return Ok(Some(Branch::FIRST));
        }
        for (branch, known, _) in self.catalog().branches()? {
            let agrees = known.is_some_and(|known| {
                known.ancestors.len() < history.ancestors.len()
                    && history.ancestors.starts_with(&known.ancestors)
            });
            if branch.timeline == timeline && agrees {
                return Ok(Some(branch));
            }
        }
        Ok(None)
    }

    /// Returns the history of a branch, from the spool or the catalog.
    pub(crate) fn history(&self, branch: Branch) -> Result<Option<TimelineHistory>> {
        let parse = |content: &[u8]| TimelineHistory::parse(branch.timeline, content).ok();
        if let Some(content) = self.branch_spool(branch).history()? {
            return Ok(parse(&content));
        }
        Ok(self
            .catalog()
            .branches()?
            .into_iter()
            .find(|(known, _, _)| *known == branch)
            .and_then(|(_, history, _)| history))
    }
}
