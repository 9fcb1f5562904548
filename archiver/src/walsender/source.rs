//! Reads the WAL to send from the spool, from a sealed segment, or from the tails of an open
//! segment.
//!
//! Invariant: WAL that is not durable here is never read. A timeline is read only up to the point
//! where its successor begins.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use wal_format::{
    Branch, Lsn, ObjectKey, SealedReader, SegmentNo, SegmentSize, SystemIdentifier,
    TimelineHistory, TimelineId,
};

use super::{Shared, refusal::Refusal};
use crate::{
    blocking::blocking,
    core::progress::Progress,
    error::{Error, Result},
    observe::current::CurrentArchive,
    pipeline::archive::Archive,
};

/// The number of bytes decompressed at once: one frame of a sealed segment.
const CHUNK_BYTES: u64 = 1 << 20;

/// The WAL that can be streamed now.
#[derive(Clone, Debug)]
pub(super) struct Source {
    system: SystemIdentifier,
    size: SegmentSize,
    branch: Branch,
    history: Option<TimelineHistory>,
    end: Lsn,
}

/// One timeline of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    branch: Branch,
    /// The end of this timeline and the branch that follows it. `None` for the timeline that is
    /// being archived now.
    pub(super) next: Option<(Lsn, Branch)>,
}

impl Source {
    /// Reads the current state of the archive.
    pub(super) async fn open(shared: &Shared) -> std::result::Result<Self, Refusal> {
        let (archive, progress) = (Arc::clone(&shared.archive), Arc::clone(&shared.progress));
        let source = blocking(move || Self::look(&archive, &progress)).await?;
        source.ok_or_else(|| {
            let words = "the archive does not know yet whose WAL it holds; try again".to_owned();
            Refusal::new("57P03", words)
        })
    }

    fn look(archive: &CurrentArchive, progress: &Progress) -> Result<Option<Self>> {
        let Some(archive) = archive.get() else {
            return Ok(None);
        };
        let positions = progress.positions();
        let (branch, end) = if positions.flushed() > Lsn::ZERO {
            (positions.branch(), positions.flushed())
        } else {
            // No server has connected since the start. WAL that was archived earlier can still be
            // streamed to its end.
            let held = archive.held()?;
            let Some(newest) = held.iter().max_by_key(|one| one.branch.timeline) else {
                return Ok(None);
            };
            (newest.branch, newest.end_lsn)
        };
        let identity = archive.identity();
        Ok(Some(Self {
            system: identity.system_identifier,
            size: identity.segment_size,
            branch,
            history: archive.history(branch)?,
            end,
        }))
    }

    pub(super) fn system(&self) -> SystemIdentifier {
        self.system
    }

    pub(super) fn timeline(&self) -> TimelineId {
        self.branch.timeline
    }

    pub(super) fn segment_size(&self) -> SegmentSize {
        self.size
    }

    /// The end of the WAL that is durable here.
    pub(super) fn end(&self) -> Lsn {
        self.end
    }

    /// Returns the current end, or `None` when another branch is being archived by now.
    pub(super) fn end_now(&self, progress: &Progress) -> Option<Lsn> {
        let positions = progress.positions();
        if positions.flushed() == Lsn::ZERO {
            return Some(self.end);
        }
        (positions.branch() == self.branch).then(|| positions.flushed().max(self.end))
    }

    /// Returns the history file of a timeline on the path to the current one.
    pub(super) async fn history(
        &self,
        shared: &Shared,
        timeline: TimelineId,
    ) -> std::result::Result<Vec<u8>, Refusal> {
        let (source, archive) = (self.clone(), Arc::clone(&shared.archive));
        let found = blocking(move || {
            let Some(archive) = archive.get() else {
                return Ok(None);
            };
            let Some(branch) = source.branch_of(&archive, timeline)? else {
                return Ok(None);
            };
            if let Some(content) = archive.branch_spool(branch).history()? {
                return Ok(Some(content));
            }
            match archive.repository().history(source.system, branch) {
                Ok(content) => Ok(Some(content.to_vec())),
                Err(error) if error.is_not_found() => Ok(None),
                Err(error) => Err(error.into()),
            }
        });
        found.await?.ok_or_else(|| {
            let name = wal_format::layout::history_file_name(timeline);
            Refusal::new("58P01", format!("the archive holds no file \"{name}\""))
        })
    }

    /// Returns a timeline on the path to the current one.
    pub(super) async fn place(
        &self,
        shared: &Shared,
        timeline: TimelineId,
    ) -> std::result::Result<Place, Refusal> {
        let (source, archive) = (self.clone(), Arc::clone(&shared.archive));
        let found = blocking(move || match archive.get() {
            Some(archive) => source.find(&archive, timeline),
            None => Ok(None),
        });
        found.await?.ok_or_else(|| {
            let words = format!("requested timeline {timeline} is not in this archive's history");
            Refusal::new("58P01", words)
        })
    }

    fn find(&self, archive: &Archive, timeline: TimelineId) -> Result<Option<Place>> {
        let Some(branch) = self.branch_of(archive, timeline)? else {
            return Ok(None);
        };
        let Some(history) = self.history.as_ref().filter(|_| branch != self.branch) else {
            return Ok(Some(Place { branch, next: None }));
        };
        let mut spans = history.spans().into_iter();
        let Some(left) = spans.find(|span| span.timeline == timeline) else {
            return Ok(None);
        };
        let successor = spans.next().map_or(self.timeline(), |span| span.timeline);
        let successor = self.branch_of(archive, successor)?;
        Ok(successor.map(|successor| Place {
            branch,
            next: Some((left.to, successor)),
        }))
    }

    fn branch_of(&self, archive: &Archive, timeline: TimelineId) -> Result<Option<Branch>> {
        if timeline == self.branch.timeline {
            return Ok(Some(self.branch));
        }
        match &self.history {
            Some(history) if history.names(timeline) => archive.ancestor(history, timeline),
            _ => Ok(None),
        }
    }
}

/// Reads one timeline's WAL in ascending order.
#[derive(Debug)]
pub(super) struct WalReader {
    place: Place,
    size: SegmentSize,
    held: Option<(SegmentNo, Held)>,
}

/// A segment that is being read.
#[derive(Debug)]
enum Held {
    /// A file of the spool. The open file stays readable when it is renamed or removed.
    File(File),
    Object {
        key: ObjectKey,
        object: Bytes,
        chunk: (Lsn, Vec<u8>),
    },
    Tails(Vec<u8>),
}

impl WalReader {
    pub(super) fn new(source: &Source, place: Place) -> Self {
        Self {
            place,
            size: source.size,
            held: None,
        }
    }

    /// Reads up to `most` bytes of `[from, to)`. Returns `None` if the archive does not have the
    /// byte at `from`.
    pub(super) fn read(
        &mut self,
        archive: &Archive,
        from: Lsn,
        to: Lsn,
        most: usize,
    ) -> Result<Option<Vec<u8>>> {
        let segment = self.size.segment_of(from);
        let end = segment.end_lsn(self.size).min(to);
        let wanted = usize::try_from(end.bytes_since(from))
            .unwrap_or(most)
            .min(most);
        if let Some((number, held)) = &mut self.held
            && *number == segment
            && let Some(wal) = held.read(segment.start_lsn(self.size), from, wanted)?
        {
            return Ok(Some(wal));
        }
        self.held = None;
        let switched = self.place.next.filter(|(switch, _)| {
            // The successor's file of this segment begins with a copy of this WAL.
            *switch <= segment.end_lsn(self.size)
        });
        let branches = [Some(self.place.branch), switched.map(|(_, branch)| branch)];
        for branch in branches.into_iter().flatten() {
            for held in candidates(archive, branch, segment) {
                let mut held = held?;
                if let Some(wal) = held.read(segment.start_lsn(self.size), from, wanted)? {
                    self.held = Some((segment, held));
                    return Ok(Some(wal));
                }
            }
        }
        Ok(None)
    }
}

/// Returns the places that may hold a segment, the fastest first. Each place is searched only when
/// it is needed.
fn candidates(
    archive: &Archive,
    branch: Branch,
    segment: SegmentNo,
) -> impl Iterator<Item = Result<Held>> {
    let spool = archive.branch_spool(branch);
    let files = [spool.path(segment), spool.partial_path(segment)];
    let files = files
        .into_iter()
        .filter_map(|path| File::open(path).ok())
        .map(|file| Ok(Held::File(file)));
    let system = archive.identity().system_identifier;
    let key = ObjectKey::Segment(system, branch, spool.name(segment));
    let object = std::iter::once_with(move || match archive.repository().get(&key) {
        Ok(object) => Some(Ok(Held::Object {
            key,
            object,
            chunk: (Lsn::ZERO, Vec::new()),
        })),
        Err(error) if error.is_not_found() => None,
        Err(error) => Some(Err(error.into())),
    });
    let tails = std::iter::once_with(move || archive.read_tails(branch, segment).map(Held::Tails));
    files.chain(object.flatten()).chain(tails)
}

impl Held {
    fn read(&mut self, start: Lsn, from: Lsn, wanted: usize) -> Result<Option<Vec<u8>>> {
        let slice = |wal: &[u8], first: Lsn| {
            let at = usize::try_from(from.bytes_since(first)).ok()?;
            let found = wal.get(at..).filter(|found| !found.is_empty())?;
            Some(found[..wanted.min(found.len())].to_vec())
        };
        Ok(match self {
            Self::File(file) => {
                let mut wal = vec![0; wanted];
                let read = file.read_at(&mut wal, from.bytes_since(start));
                let read = read.map_err(Error::io("read", "the spool"))?;
                wal.truncate(read);
                (!wal.is_empty()).then_some(wal)
            }
            Self::Tails(wal) => slice(wal, start),
            Self::Object { key, object, chunk } => {
                let (first, wal) = chunk;
                if from < *first || from >= first.add(wal.len() as u64) {
                    let damaged = |source| {
                        Error::Wal(intake::Error::Sealed {
                            object: key.to_string(),
                            source,
                        })
                    };
                    let reader = SealedReader::open(object).map_err(damaged)?;
                    let end = reader.header().end_lsn;
                    let begin = from.align_down(CHUNK_BYTES).max(reader.header().start_lsn);
                    let bytes = begin.add(CHUNK_BYTES).min(end).bytes_since(begin);
                    let bytes = usize::try_from(bytes).unwrap_or_default();
                    *chunk = (begin, reader.read_at(begin, bytes).map_err(damaged)?);
                }
                slice(&chunk.1, chunk.0)
            }
        })
    }
}
