//! `wal-archiver push PATH`: `archive_command`. Works alone, with or without a daemon.
//!
//! Invariant: exit 0 means that the bytes are in the repository and were read back; the same bytes again are 0 again, other
//! bytes under the same name are 1 and nothing is overwritten. Never above 125: PostgreSQL would take that for a crash.

use std::{
    fs,
    path::{Path, PathBuf},
};

use repository::{ClusterIdentity, Repository, config::ClusterSettings};
use wal_format::{
    Branch, Lsn, ObjectKey, PgTimestamp, SealedHeader, SealedReader, SealedWriter, SegmentName,
    SegmentNo, SegmentSummary, TimelineHistory, TimelineId, WalFileName, WalIdentity, WalIndexer,
};

use crate::{
    error::{Error, Result},
    pipeline::archive::put_wal,
    spool::{long_header_identity, primed_indexer},
};

pub(super) fn push(settings: &ClusterSettings, path: &Path) -> Result<()> {
    // Every refusal is exit 1: PostgreSQL keeps the file and asks again.
    Push {
        settings,
        path,
        repository: Repository::open(&settings.repository, &settings.name)?,
    }
    .push()
}

struct Push<'a> {
    settings: &'a ClusterSettings,
    path: &'a Path,
    repository: Repository,
}

impl Push<'_> {
    fn push(&self) -> Result<()> {
        let name = self
            .path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| self.refuse("is no WAL file name; PostgreSQL passes %p"))?;
        let content = fs::read(self.path).map_err(Error::io("read", self.path))?;
        match name {
            WalFileName::Segment(name) => self.segment(name, &content),
            WalFileName::Partial(name) => self.partial(name, &content),
            WalFileName::History(timeline) => self.history(timeline, &content),
            WalFileName::Backup(..) => self.backup_history(&content),
        }
    }

    fn segment(&self, name: SegmentName, wal: &[u8]) -> Result<()> {
        let (identity, segment) = self.identify(name, wal)?;
        let branch = self.branch(&identity, name.timeline)?;
        let (summary, end) = self.index(&identity, branch, segment, wal)?;
        let size = identity.segment_size;
        if end != segment.end_lsn(size) {
            return Err(self.refuse(&format!("is a segment cut short at {end}")));
        }
        let header = SealedHeader::of_segment(
            identity.system_identifier,
            identity.version,
            branch,
            size,
            segment,
        );
        self.put(&header, wal, &summary)
    }

    /// The last segment of a timeline that a promotion left: kept as a tail, up to its last valid record.
    fn partial(&self, name: SegmentName, wal: &[u8]) -> Result<()> {
        let (identity, segment) = self.identify(name, wal)?;
        let branch = self.branch(&identity, name.timeline)?;
        let size = identity.segment_size;
        let start = segment.start_lsn(size);
        let sealed = ObjectKey::Segment(identity.system_identifier, branch, name);
        let (summary, end) = self.index_prefix(&identity, branch, segment, wal)?;
        if let Some(held) = self.stored_whole(&sealed)? {
            let valid = usize::try_from(end.bytes_since(start)).unwrap_or(usize::MAX);
            return self.compare(branch, start, &wal[..valid.min(wal.len())], &held);
        }
        if end == start {
            return Err(self.refuse("holds no valid record"));
        }
        let header = SealedHeader {
            system_identifier: identity.system_identifier,
            version: identity.version,
            branch,
            segment_size: size,
            start_lsn: start,
            // Valid to its last byte it is the whole segment, whatever it is called.
            end_lsn: end,
        };
        let valid = usize::try_from(end.bytes_since(start)).unwrap_or(usize::MAX);
        self.put(&header, &wal[..valid.min(wal.len())], &summary)
    }

    fn history(&self, timeline: TimelineId, content: &[u8]) -> Result<()> {
        TimelineHistory::parse(timeline, content)
            .map_err(|error| self.refuse(&error.to_string()))?;
        let identity = match self.repository.identity()? {
            Some(identity) => identity,
            None => self.claim(&self.neighbour()?.ok_or_else(|| {
                self.refuse("names no system identifier, and neither the repository nor a segment beside it does")
            })?)?,
        };
        let branch = Branch::of_history(timeline, content);
        self.repository
            .put_history(identity.system_identifier, branch, content)?;
        Ok(())
    }

    /// `SEGMENT.OFFSET.backup` describes a backup that another tool took; a backup of ours carries its own description, and
    /// a restore never asks for it. It is checked for what it claims to be, and PostgreSQL may go on.
    fn backup_history(&self, content: &[u8]) -> Result<()> {
        if !content.starts_with(b"START WAL LOCATION: ") {
            return Err(self.refuse("is no backup history file"));
        }
        tracing::info!(
            file = %self.path.display(),
            "a backup history file of another tool's backup is not kept: Tidemark's restores do not use it"
        );
        Ok(())
    }

    fn put(&self, header: &SealedHeader, wal: &[u8], summary: &SegmentSummary) -> Result<()> {
        let key = header.key();
        let broken = |source| Error::Sealed {
            object: key.to_string(),
            source,
        };
        let mut writer =
            SealedWriter::new(*header, self.settings.compression_level).map_err(broken)?;
        writer.push(wal).map_err(broken)?;
        let object = writer.finish(summary, None).map_err(broken)?;
        let read = |bytes: &mut [u8], offset: u64| {
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            let part = wal
                .get(from..)
                .and_then(|rest| rest.get(..bytes.len()))
                .ok_or_else(|| self.refuse("is shorter than the archived one"))?;
            bytes.copy_from_slice(part);
            Ok(())
        };
        put_wal(&self.repository, header, &object, "the pushed file", &read)
            .map_err(|error| self.differs(error))?;
        Ok(())
    }

    /// Checks that the file is what its name says.
    fn identify(&self, name: SegmentName, wal: &[u8]) -> Result<(WalIdentity, SegmentNo)> {
        let identity = long_header_identity(wal).ok_or_else(|| {
            self.refuse("does not begin with the header of a WAL segment of PostgreSQL 13 to 18")
        })?;
        let size = identity.segment_size;
        if wal.len() != size.len() {
            return Err(self.refuse(&format!(
                "has {} bytes, a segment of this cluster has {}",
                wal.len(),
                size.bytes()
            )));
        }
        let segment = name
            .segment(size)
            .ok_or_else(|| self.refuse("has a name that does not fit its segment size"))?;
        self.claim(&identity)?;
        Ok((identity, segment))
    }

    fn claim(&self, identity: &WalIdentity) -> Result<ClusterIdentity> {
        Ok(self.repository.claim(&ClusterIdentity {
            format_version: 1,
            cluster: self.settings.name.clone(),
            system_identifier: identity.system_identifier,
            postgresql_major: identity.version,
            wal_segment_size: identity.segment_size,
            created: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        })?)
    }

    /// Whose WAL lies beside the file.
    fn neighbour(&self) -> Result<Option<WalIdentity>> {
        let directory = self.directory();
        let entries = fs::read_dir(&directory).map_err(Error::io("list", &directory))?;
        for entry in entries.flatten() {
            let is_segment = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.parse::<SegmentName>().is_ok());
            if is_segment && let Ok(wal) = fs::read(entry.path()) {
                let identity = long_header_identity(&wal);
                if identity.is_some() {
                    return Ok(identity);
                }
            }
        }
        Ok(None)
    }

    /// The branch of a timeline: named by the history file beside the segment, or the only one the repository knows.
    fn branch(&self, identity: &WalIdentity, timeline: TimelineId) -> Result<Branch> {
        if timeline == TimelineId::FIRST {
            return Ok(Branch::FIRST);
        }
        let history = self
            .directory()
            .join(wal_format::layout::history_file_name(timeline));
        if let Ok(content) = fs::read(&history) {
            let branch = Branch::of_history(timeline, &content);
            // A branch's history goes first: without it its WAL can not be placed.
            self.repository
                .put_history(identity.system_identifier, branch, &content)?;
            return Ok(branch);
        }
        let known: Vec<Branch> = self
            .repository
            .histories(identity.system_identifier)?
            .into_iter()
            .map(|(branch, _)| branch)
            .filter(|branch| branch.timeline == timeline)
            .collect();
        match known.as_slice() {
            [branch] => Ok(*branch),
            _ => Err(self.refuse(&format!(
                "is of timeline {timeline}, whose history file is neither beside it nor (once) in the repository; push {} first",
                history.display()
            ))),
        }
    }

    /// Decodes every record.
    fn index(
        &self,
        identity: &WalIdentity,
        branch: Branch,
        segment: SegmentNo,
        wal: &[u8],
    ) -> Result<(SegmentSummary, Lsn)> {
        let mut indexer = self.indexer(identity, branch, segment)?;
        indexer
            .push(wal)
            .map_err(|source| Error::Decode { branch, source })?;
        Ok((indexer.take_summary(), indexer.position()))
    }

    /// Decodes up to the last valid record.
    fn index_prefix(
        &self,
        identity: &WalIdentity,
        branch: Branch,
        segment: SegmentNo,
        wal: &[u8],
    ) -> Result<(SegmentSummary, Lsn)> {
        const PAGE: usize = 8192;
        let start = segment.start_lsn(identity.segment_size);
        let mut probe = self.indexer(identity, branch, segment)?;
        for page in wal.chunks(PAGE) {
            if probe.push(page).is_err() {
                break;
            }
        }
        let end = probe.valid_end_lsn().max(start);
        let valid = usize::try_from(end.bytes_since(start)).unwrap_or(usize::MAX);
        let (summary, _) = self.index(identity, branch, segment, &wal[..valid.min(wal.len())])?;
        Ok((summary, end))
    }

    fn indexer(
        &self,
        identity: &WalIdentity,
        branch: Branch,
        segment: SegmentNo,
    ) -> Result<WalIndexer> {
        primed_indexer(identity, segment, |earlier| {
            let name = SegmentName::new(branch.timeline, earlier, identity.segment_size);
            self.stored_whole(&ObjectKey::Segment(
                identity.system_identifier,
                branch,
                name,
            ))
        })
    }

    fn stored_whole(&self, key: &ObjectKey) -> Result<Option<Vec<u8>>> {
        if self.repository.head(key)?.is_none() {
            return Ok(None);
        }
        let object = self.repository.get(key)?;
        let mut wal = Vec::new();
        SealedReader::open(&object)
            .and_then(|reader| reader.read_all(&mut wal))
            .map_err(|source| Error::Sealed {
                object: key.to_string(),
                source,
            })?;
        Ok(Some(wal))
    }

    fn compare(&self, branch: Branch, start: Lsn, new: &[u8], held: &[u8]) -> Result<()> {
        match new.iter().zip(held).position(|(new, held)| new != held) {
            None => Ok(()),
            Some(index) => Err(self.differs(Error::Divergence {
                branch,
                lsn: start.add(index as u64),
                from: "the pushed file",
                ours: self.repository.url(),
            })),
        }
    }

    /// Other bytes under an archived name are exit 1 here, by contract.
    fn differs(&self, error: Error) -> Error {
        match error {
            Error::Divergence { .. } => self.refuse(&error.to_string()),
            other => other,
        }
    }

    fn directory(&self) -> PathBuf {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        }
    }

    fn refuse(&self, problem: &str) -> Error {
        Error::Push {
            path: self.path.to_path_buf(),
            problem: problem.to_owned(),
        }
    }
}
