//! The objects of a segment: opened with a check of what they hold, and the tails of an open one
//! put together.

use repository::Repository;
use wal_format::{Branch, Lsn, ObjectKey, SealedReader, SegmentName, SystemIdentifier};

use super::{Asked, is_lost, missing, passed_over, writers::end_at};
use crate::{Error, Result};

/// Returns the bytes of an open segment from its start, assembled from its tails. At a hole or a
/// damaged tail it ends there, if the WAL before it is enough.
pub(super) fn assemble(
    repository: &Repository,
    system: SystemIdentifier,
    branch: Branch,
    (name, start_lsn): (SegmentName, Lsn),
    asked: Asked<'_>,
    enough: impl Fn(Lsn) -> bool,
) -> Result<Option<Vec<u8>>> {
    let mut tails = Vec::new();
    for (key, _) in repository.list(&format!("{system}/tail/{branch}/{name}/"))? {
        if let ObjectKey::Tail(_, _, _, start, end) = key {
            tails.push((start, std::cmp::Reverse(end), key));
        }
    }
    tails.sort_by_key(|(start, end, _)| (*start, *end));
    let mut wal = Vec::new();
    let mut wal_end = Lsn::MAX;
    for (start, end, key) in tails {
        let have = start_lsn.add(wal.len() as u64);
        if end.0 <= have {
            continue;
        }
        let piece = if start > have {
            let problem = "the tails of this segment do not follow one another";
            Err(missing(have, problem))
        } else {
            tail(repository, &key, asked)
        };
        let piece = match piece {
            Err(error) if !wal.is_empty() && is_lost(&error) && enough(have) => {
                passed_over(&error, have);
                break;
            }
            piece => piece,
        };
        let (piece, end) = piece?;
        if let Some(end) = end {
            wal_end = wal_end.min(end);
        }
        let known = usize::try_from(have.bytes_since(start)).unwrap_or(usize::MAX);
        wal.extend_from_slice(piece.get(known..).unwrap_or_default());
    }
    end_at(&mut wal, start_lsn, wal_end);
    Ok((!wal.is_empty()).then_some(wal))
}

/// Returns the WAL of a tail, and the LSN at which the delivered WAL has to end, if it has to.
fn tail(
    repository: &Repository,
    key: &ObjectKey,
    asked: Asked<'_>,
) -> Result<(Vec<u8>, Option<Lsn>)> {
    let object = repository.get(key)?;
    let end = asked.admit(&open(key, &object)?)?;
    let mut wal = Vec::new();
    read(key, &object, &mut wal)?;
    Ok((wal, end))
}

/// Reads the WAL of an object.
pub(crate) fn read(key: &ObjectKey, object: &[u8], wal: &mut Vec<u8>) -> Result<()> {
    open(key, object)?
        .read_all(wal)
        .map_err(|error| damaged(key, error.to_string()))
}

/// Opens an object after checking that it is the one that its name states. PostgreSQL would
/// interpret pages of another segment as the end of WAL.
pub(super) fn open<'a>(key: &ObjectKey, object: &'a [u8]) -> Result<SealedReader<'a>> {
    let reader = SealedReader::open(object).map_err(|error| damaged(key, error.to_string()))?;
    let header = reader.header();
    let (system, branch, name) = (
        header.system_identifier,
        header.branch,
        header.segment_name(),
    );
    let (start, end) = (header.start_lsn, header.end_lsn);
    let holds = match key {
        ObjectKey::Tail(..) => ObjectKey::Tail(system, branch, name, start, end),
        _ => ObjectKey::Segment(system, branch, name),
    };
    if holds != *key {
        return Err(damaged(key, format!("it holds {holds}")));
    }
    Ok(reader)
}

pub(super) fn damaged(key: &ObjectKey, problem: String) -> Error {
    Error::Damaged {
        object: key.to_string(),
        problem,
    }
}
