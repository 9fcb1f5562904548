//! [`Pusher`]: checks and stores one file of `pg_wal`, in any process.
//!
//! Invariant: success means that the bytes are in the repository and were read back. Pushing the
//! same bytes again succeeds. Other bytes under the same name are an error, and nothing is
//! overwritten.

mod prime;
mod side_by_side;
mod spooled;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use repository::{ClusterIdentity, Loss, LossRecord, Repository, config::ClusterSettings};
use wal_format::{
    Branch, Lsn, ObjectKey, PgTimestamp, SealedHeader, SegmentName, SegmentNo, SegmentSummary,
    SystemIdentifier, TimelineHistory, TimelineId, WalFileName, WalIdentity, WalIndexer,
    page::{LONG_HEADER_BYTES, PageHeader},
};

use crate::{
    error::{Error, Result},
    stored::{WalSource, compare_wal, put_wal, seal_range},
};

/// The number of bytes that are read from a file at once.
const READ_BYTES: usize = 1 << 20;

/// The problem of a segment to which nothing was written yet.
pub const NO_RECORD: &str = "holds no valid record";

/// Pushes one file without a daemon.
///
/// # Errors
/// As [`Pusher::push`]. PostgreSQL then keeps the file and retries.
pub fn push_alone(settings: &ClusterSettings, repository: &Repository, path: &Path) -> Result<()> {
    let file = WalFile::open(path)?;
    // PostgreSQL removes a segment that was pushed, and in an older copy of the repository it would
    // be missing.
    let record = LossRecord::of(settings);
    record.check_newest(repository)?;
    Pusher {
        settings,
        repository,
        spool_counts: false,
    }
    .push(&file, &mut None)?;
    // The place may have been exchanged meanwhile.
    record.check_newest(repository)?;
    Ok(())
}

/// An open file of `pg_wal`. It is read by its descriptor, which the daemon may have received from
/// another user's process.
#[derive(Debug)]
pub struct WalFile {
    path: PathBuf,
    file: File,
    length: u64,
}

impl WalFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        Self::of(path.to_owned(), file)
    }

    /// Uses a file that was already opened under `path`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn of(path: PathBuf, file: File) -> Result<Self> {
        let length = file.metadata().map_err(Error::io("read", &path))?.len();
        Ok(Self { path, file, length })
    }

    fn name(&self) -> Result<WalFileName> {
        self.path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| self.refuse("is no WAL file name; PostgreSQL passes %p"))
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(Error::io("read", &self.path))
    }

    /// Reads the whole file. For small files, and for files whose valid end must be found.
    fn read(&self) -> Result<Vec<u8>> {
        let length = usize::try_from(self.length)
            .map_err(|_| self.refuse("does not fit into this machine's memory"))?;
        let mut content = vec![0; length];
        self.read_at(&mut content, 0)?;
        Ok(content)
    }

    /// Returns the identity in the first page, or `None` if that is not a valid long page header.
    fn identity(&self) -> Result<Option<WalIdentity>> {
        let length = usize::try_from(self.length).unwrap_or(LONG_HEADER_BYTES);
        let mut header = [0; LONG_HEADER_BYTES];
        self.read_at(&mut header[..length.min(LONG_HEADER_BYTES)], 0)?;
        Ok(PageHeader::parse(&header).and_then(|header| header.identity()))
    }

    /// Returns the file as the WAL that an object must contain.
    fn source(&self) -> WalSource<'_> {
        WalSource {
            file: &self.file,
            path: &self.path,
            offset: 0,
            from: "the pushed file",
        }
    }

    /// Passes the first `length` bytes to `take`, piece by piece.
    fn pieces(&self, length: u64, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; READ_BYTES];
        let mut offset = 0;
        while offset < length {
            let count = usize::try_from(length - offset)
                .unwrap_or(READ_BYTES)
                .min(READ_BYTES);
            self.read_at(&mut buffer[..count], offset)?;
            take(&buffer[..count])?;
            offset += count as u64;
        }
        Ok(())
    }

    fn directory(&self) -> PathBuf {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        }
    }

    fn refuse(&self, problem: &str) -> Error {
        Error::Refused {
            path: self.path.clone(),
            problem: problem.to_owned(),
        }
    }
}

/// A decoder at the end of the previous segment, ready for segment `next`.
#[derive(Debug)]
pub struct Running {
    branch: Branch,
    next: SegmentNo,
    indexer: WalIndexer,
}

/// A segment whose records were all checked, ready to be stored.
#[derive(Debug)]
pub struct Checked {
    header: SealedHeader,
    summary: SegmentSummary,
}

/// Checks and stores files of one cluster.
#[derive(Clone, Copy, Debug)]
pub struct Pusher<'a> {
    /// The cluster's settings.
    pub settings: &'a ClusterSettings,
    /// Its repository.
    pub repository: &'a Repository,
    /// True if a complete segment in the spool counts as archived. Allowed only while a daemon
    /// uploads the spool, and only with `acknowledge = "local"`.
    pub spool_counts: bool,
}

/// The result of the checks before the records of a file are decoded.
#[derive(Debug)]
pub enum Looked {
    /// The file is archived: it was compared completely, or it contains nothing to be archived.
    Archived,
    /// A segment that is new.
    New(NewSegment),
}

/// A segment that is not archived yet, and its identity.
#[derive(Clone, Copy, Debug)]
pub struct NewSegment {
    identity: WalIdentity,
    segment: SegmentNo,
    header: SealedHeader,
}

impl NewSegment {
    /// Checks the records of the next piece.
    fn check(&self, indexer: &mut WalIndexer, piece: &[u8]) -> Result<()> {
        let branch = self.header.branch;
        indexer
            .push(piece)
            .map_err(|source| Error::Decode { branch, source })
    }

    /// Completes the check after the last piece.
    fn checked(
        self,
        file: &WalFile,
        mut indexer: WalIndexer,
        running: &mut Option<Running>,
    ) -> Result<Checked> {
        let header = self.header;
        let summary = indexer.take_summary();
        if indexer.position() != header.end_lsn {
            return Err(file.refuse(&format!("is a segment cut short at {}", indexer.position())));
        }
        *running = Some(Running {
            branch: header.branch,
            next: self.segment.next(),
            indexer,
        });
        Ok(Checked { header, summary })
    }
}

impl Pusher<'_> {
    /// Pushes one file. A decoder in `running` saves the search for the start of a record that
    /// began before the segment.
    ///
    /// # Errors
    /// [`Error::Refused`] and [`Error::Decode`] when the file is not what its name says,
    /// [`Error::Differs`] when other bytes are archived under its name.
    pub fn push(&self, file: &WalFile, running: &mut Option<Running>) -> Result<()> {
        match self.look(file)? {
            Looked::Archived => Ok(()),
            Looked::New(new) => {
                let (checked, object) = self.check_and_seal(file, new, running)?;
                self.put(file, &checked.header, &object)
            }
        }
    }

    /// Does what [`Pusher::push`] does, but does not store a new segment. Returns `None` if the
    /// file is archived.
    ///
    /// # Errors
    /// As [`Pusher::push`].
    pub fn check(&self, file: &WalFile, running: &mut Option<Running>) -> Result<Option<Checked>> {
        match self.look(file)? {
            Looked::Archived => Ok(None),
            Looked::New(new) => self.decode(file, new, running).map(Some),
        }
    }

    /// Compares a segment with the object of the same name. Completes the push of any other file.
    ///
    /// # Errors
    /// As [`Pusher::push`].
    pub fn look(&self, file: &WalFile) -> Result<Looked> {
        match file.name()? {
            WalFileName::Segment(name) => return self.segment(file, name),
            WalFileName::Partial(name) => self.partial(file, name)?,
            WalFileName::History(timeline) => self.history(file, timeline)?,
            WalFileName::Backup(..) => backup_history(file)?,
        }
        Ok(Looked::Archived)
    }

    /// Compresses a segment, stores it, reads it back and compares.
    ///
    /// # Errors
    /// As [`Pusher::push`].
    pub fn store(&self, file: &WalFile, checked: &Checked) -> Result<()> {
        let header = &checked.header;
        let level = self.settings.compression_level;
        let object = seal_range(level, *header, &checked.summary, None, &file.source())?;
        self.put(file, header, &object)
    }

    fn put(&self, file: &WalFile, header: &SealedHeader, object: &[u8]) -> Result<()> {
        put_wal(self.repository, header, object, &file.source())
            .map_err(|error| differs(file, error))?;
        if header.is_whole_segment() {
            LossRecord::of(self.settings).note_newest(&Loss::Wal {
                system: header.system_identifier,
                segment_size: header.segment_size,
                branch: header.branch,
                from_lsn: header.start_lsn,
                to_lsn: header.end_lsn,
            });
        }
        Ok(())
    }

    fn segment(&self, file: &WalFile, name: SegmentName) -> Result<Looked> {
        let (identity, segment) = self.identify(file, name)?;
        let branch = self.branch(file, &identity, name.timeline)?;
        let size = identity.segment_size;
        let header = SealedHeader::of_segment(
            identity.system_identifier,
            identity.version,
            branch,
            size,
            segment,
        );
        // The stream may have archived the segment, or it is pushed again. If the bytes are equal,
        // its records need not be checked again.
        if self.spool_counts && self.is_spooled(file, &header, name)? {
            return Ok(Looked::Archived);
        }
        if let Some(object) = self.stored(&header.key())? {
            compare(file, &header, &object)?;
            self.repository.confirm()?;
            return Ok(Looked::Archived);
        }
        Ok(Looked::New(NewSegment {
            identity,
            segment,
            header,
        }))
    }

    /// Checks every record of a segment. A decoder in `running` saves the search for the start of a
    /// record that began before the segment.
    ///
    /// # Errors
    /// As [`Pusher::push`].
    pub fn decode(
        &self,
        file: &WalFile,
        new: NewSegment,
        running: &mut Option<Running>,
    ) -> Result<Checked> {
        let mut indexer = self.decoder(file, new, running)?;
        file.pieces(new.header.raw_bytes(), |piece| {
            new.check(&mut indexer, piece)
        })?;
        new.checked(file, indexer, running)
    }

    /// Returns a decoder at the start of the segment.
    fn decoder(
        &self,
        file: &WalFile,
        new: NewSegment,
        running: &mut Option<Running>,
    ) -> Result<WalIndexer> {
        let (branch, segment) = (new.header.branch, new.segment);
        match running.take() {
            Some(running) if running.branch == branch && running.next == segment => {
                Ok(running.indexer)
            }
            _ => self.indexer(file, &new.identity, branch, segment),
        }
    }

    /// Stores the last segment of a timeline that a promotion ended, as a tail up to its last valid
    /// record.
    fn partial(&self, file: &WalFile, name: SegmentName) -> Result<()> {
        let (identity, segment) = self.identify(file, name)?;
        let branch = self.branch(file, &identity, name.timeline)?;
        let size = identity.segment_size;
        let start = segment.start_lsn(size);
        let sealed = SealedHeader::of_segment(
            identity.system_identifier,
            identity.version,
            branch,
            size,
            segment,
        );
        let wal = file.read()?;
        let end = self.valid_end(file, &identity, branch, segment, &wal)?;
        if end == start {
            return Err(file.refuse(NO_RECORD));
        }
        let header = SealedHeader {
            start_lsn: start,
            // If the file is valid up to its last byte, this is the whole segment, despite the
            // name.
            end_lsn: end,
            ..sealed
        };
        if let Some(object) = self.stored(&sealed.key())? {
            return compare(file, &header, &object);
        }
        let valid = usize::try_from(end.bytes_since(start)).unwrap_or(usize::MAX);
        let mut indexer = self.indexer(file, &identity, branch, segment)?;
        indexer
            .push(&wal[..valid.min(wal.len())])
            .map_err(|source| Error::Decode { branch, source })?;
        let summary = indexer.take_summary();
        self.store(file, &Checked { header, summary })
    }

    fn history(&self, file: &WalFile, timeline: TimelineId) -> Result<()> {
        let content = file.read()?;
        TimelineHistory::parse(timeline, &content)
            .map_err(|error| file.refuse(&error.to_string()))?;
        let identity = match self.repository.identity()? {
            Some(identity) => identity,
            None => self.claim(&neighbour(file)?.ok_or_else(|| {
                file.refuse("names no system identifier, and neither the repository nor a segment next to it does")
            })?)?,
        };
        self.put_history(file, identity.system_identifier, timeline, &content)?;
        Ok(())
    }

    /// Stores a history file, unless the repository has this timeline with another history:
    /// PostgreSQL has one file of this name, and its other bytes belong to a server that took the
    /// same number.
    fn put_history(
        &self,
        file: &WalFile,
        system: SystemIdentifier,
        timeline: TimelineId,
        content: &[u8],
    ) -> Result<Branch> {
        let branch = Branch::of_history(timeline, content);
        let others = self.other_histories(system, branch)?;
        if !others.is_empty() {
            return Err(Error::Differs {
                path: file.path.clone(),
                problem: format!(
                    "timeline {timeline} is archived with another history, as {}, and the file of \
                     this server makes it {branch}: another server took the same number. Nothing was \
                     stored. Archive this server under another --cluster, or restore it with \
                     pitr-restore, which takes a number that is free",
                    others.join(", ")
                ),
            });
        }
        self.repository.put_history(system, branch, content)?;
        Ok(branch)
    }

    /// Returns the archived branches with the number of `branch` that differ from it. Empty if
    /// `branch` is archived already, or if its history file was lost and is restored by this push.
    fn other_histories(&self, system: SystemIdentifier, branch: Branch) -> Result<Vec<String>> {
        let key = ObjectKey::History(system, branch);
        if self.repository.head(&key)?.is_some() {
            return Ok(Vec::new());
        }
        let histories = self.repository.read_histories(system)?;
        let lost = histories.lost.iter().map(|lost| lost.branch);
        let known = histories.known.iter().map(|known| known.0).chain(lost);
        let same: Vec<Branch> = known
            .filter(|known| known.timeline == branch.timeline)
            .collect();
        if same.contains(&branch) {
            return Ok(Vec::new());
        }
        Ok(same.iter().map(ToString::to_string).collect())
    }

    /// Checks that the file is a segment with this name, and claims the cluster's name for its
    /// system.
    fn identify(&self, file: &WalFile, name: SegmentName) -> Result<(WalIdentity, SegmentNo)> {
        let identity = file.identity()?.ok_or_else(|| {
            file.refuse("does not begin with the header of a WAL segment of PostgreSQL 13 to 18")
        })?;
        let size = identity.segment_size;
        if file.length != size.bytes() {
            return Err(file.refuse(&format!(
                "has {} bytes, a segment of this cluster has {}",
                file.length,
                size.bytes()
            )));
        }
        let segment = name
            .segment(size)
            .ok_or_else(|| file.refuse("has a name that does not fit its segment size"))?;
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

    /// Returns the branch of a timeline: that of the history file next to the segment, or else the
    /// only branch with this number in the repository.
    fn branch(
        &self,
        file: &WalFile,
        identity: &WalIdentity,
        timeline: TimelineId,
    ) -> Result<Branch> {
        if timeline == TimelineId::FIRST {
            return Ok(Branch::FIRST);
        }
        let history = file
            .directory()
            .join(wal_format::layout::history_file_name(timeline));
        if let Ok(content) = fs::read(&history) {
            // Store a branch's history first: without it, its WAL belongs to no known branch.
            return self.put_history(file, identity.system_identifier, timeline, &content);
        }
        let known = self
            .repository
            .branches_of(identity.system_identifier, timeline)?;
        match known.as_slice() {
            [branch] => Ok(*branch),
            _ => Err(file.refuse(&format!(
                "is of timeline {timeline}, whose history file is neither next to it nor (once) in the repository; push {} first",
                history.display()
            ))),
        }
    }

    /// Returns the end of the last valid record of a segment that is not full.
    fn valid_end(
        &self,
        file: &WalFile,
        identity: &WalIdentity,
        branch: Branch,
        segment: SegmentNo,
        wal: &[u8],
    ) -> Result<Lsn> {
        const PAGE: usize = 8192;
        let mut probe = self.indexer(file, identity, branch, segment)?;
        for page in wal.chunks(PAGE) {
            if probe.push(page).is_err() {
                break;
            }
        }
        Ok(probe
            .valid_end_lsn()
            .max(segment.start_lsn(identity.segment_size)))
    }

    fn stored(&self, key: &ObjectKey) -> Result<Option<bytes::Bytes>> {
        match self.repository.get(key) {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Compares the file with the archived object for the range of `header`.
fn compare(file: &WalFile, header: &SealedHeader, object: &[u8]) -> Result<()> {
    let name = header.key().to_string();
    compare_wal(object, &name, header, &file.source()).map_err(|error| differs(file, error))
}

/// Converts the error: for a push, other bytes under an archived name are exit code 1.
fn differs(file: &WalFile, error: Error) -> Error {
    match error {
        Error::Divergence { .. } => Error::Differs {
            path: file.path.clone(),
            problem: error.to_string(),
        },
        other => other,
    }
}

/// Checks `SEGMENT.OFFSET.backup`, which describes a backup that another tool took. It is not
/// stored: our backups contain their own description, and a restore never requests the file.
fn backup_history(file: &WalFile) -> Result<()> {
    if !file.read()?.starts_with(b"START WAL LOCATION: ") {
        return Err(file.refuse("is no backup history file"));
    }
    tracing::info!(
        file = %file.path.display(),
        "a backup history file of another tool's backup is not kept: Tidemark's restores do not use it"
    );
    Ok(())
}

/// Returns the identity of a segment in the directory of the file.
fn neighbour(file: &WalFile) -> Result<Option<WalIdentity>> {
    let directory = file.directory();
    let entries = fs::read_dir(&directory).map_err(Error::io("list", &directory))?;
    for entry in entries.flatten() {
        let is_segment = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.parse::<SegmentName>().is_ok());
        if is_segment
            && let Ok(segment) = WalFile::open(&entry.path())
            && let Ok(identity @ Some(_)) = segment.identity()
        {
            return Ok(identity);
        }
    }
    Ok(None)
}
