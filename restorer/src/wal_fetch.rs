//! `restore_command = 'pitr-restore wal-fetch %f %p'`: delivers one file, or reports by its exit
//! code why it cannot.
//!
//! Invariant: exit 1 means *proved absent*: the repository answered and does not have the file,
//! whatever the plan says about it. PostgreSQL interprets 1 as the end of the archive and may
//! promote, or as a free timeline number (`findNewestTimeLine` in `timeline.c`). An unreachable
//! store, a damaged object and a gap in the WAL therefore give 255, which stops a recovery so that
//! it can be resumed. A plan decides between two timelines with the same number, and which WAL has
//! to exist.

use std::{
    fs,
    io::{self, Read as _, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use repository::{ClusterIdentity, ExitKind, Repository};
use wal_format::{
    Branch, Lsn, ObjectKey, SealedReader, SegmentName, SegmentNo, SegmentSize, TimelineId,
    WalFileName, sealed::SealedError,
};

use crate::{
    Error, RestorePlan, Result,
    execute::Access,
    tablespaces::{admit, refuse_foreign},
};

mod ancestors;
mod objects;
mod writers;

pub(crate) use objects::read;
use objects::{assemble, damaged, open};
use writers::{Changed, Ending};

/// The time for which requests to a failing store are retried before 255 stops the recovery: longer
/// than a store needs to restart or to fail over.
const PATIENCE: Duration = Duration::from_secs(150);
/// The file name that PostgreSQL passes as `%p` for a segment.
const ASKED_BY_POSTGRESQL: &str = "RECOVERYXLOG";
/// The pauses between the attempts, which double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The file is at the destination, complete; PostgreSQL makes it durable.
    Delivered,
    /// The file is proved to be absent from the archive.
    Absent,
}

/// The plan and the server for which a segment is fetched.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked<'a> {
    /// The plan of the restore.
    pub(crate) plan: Option<&'a RestorePlan>,
    /// The data directory of the server that requests it; `None` if no server does.
    pub(crate) data: Option<&'a Path>,
}

impl<'a> Asked<'a> {
    /// Describes a recovery with a plan.
    pub(crate) fn by(plan: &'a RestorePlan) -> Self {
        Self {
            plan: Some(plan),
            data: None,
        }
    }

    /// Returns true if recovery needs no WAL of a branch from `end` on: it stops before, or enters
    /// the next timeline there.
    fn needs_nothing_from(self, branch: Branch, end: Lsn) -> bool {
        let Some(plan) = self.plan else {
            return false;
        };
        let part = plan.path.iter().find(|part| part.branch == branch);
        match part {
            Some(part) if plan.path.last() == Some(part) => plan.wal_end_lsn <= end,
            Some(part) => part.to <= end,
            None => false,
        }
    }

    /// Checks the creations of tablespaces in an object before its WAL is delivered. Returns the
    /// LSN at which the delivered WAL has to end, if it has to.
    fn admit(self, object: &SealedReader<'_>) -> Result<Option<Lsn>> {
        match (self.plan, self.data) {
            (Some(plan), data) => admit(plan, object.header().branch, object.summary(), data),
            (None, Some(data)) => refuse_foreign(object.summary(), data).map(|()| None),
            (None, None) => Ok(None),
        }
    }
}

/// Delivers `name` to `destination`.
///
/// # Errors
/// Any error that prevents an answer, after retries.
pub fn wal_fetch(
    repository: &Repository,
    plan: Option<&RestorePlan>,
    name: &str,
    destination: &Path,
) -> Result<Fetched> {
    patiently(name, || deliver(repository, plan, name, destination))
}

/// Runs `attempt` and retries it on transient errors of the store, for at most `PATIENCE`. A denied
/// permission is not retried, because only an operator can change it.
/// `restore_command` makes all its requests to the store through this function, because PostgreSQL
/// does not retry. `name` is for the log.
///
/// # Errors
/// The error of the last attempt.
pub fn patiently<T>(name: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let mut pause = FIRST_PAUSE;
    let began = Instant::now();
    loop {
        match attempt() {
            Err(Error::Repository(error))
                if error.is_transient() && !error.is_denied() && began.elapsed() < PATIENCE =>
            {
                tracing::warn!(%error, "fetching {name} failed and is tried again");
                thread::sleep(pause);
                pause = (pause * 2).min(LAST_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

/// Checks whether `name` can be delivered, without delivering it. After a recovery that failed,
/// this finds the reason as a typed error.
///
/// # Errors
/// The errors of a fetch.
pub fn probe(repository: &Repository, plan: &RestorePlan, name: &str) -> Result<()> {
    content(repository, Asked::by(plan), name, &mut io::sink()).map(drop)
}

/// Returns the identity of the archived cluster.
pub(crate) fn identity(repository: &Repository) -> Result<ClusterIdentity> {
    repository.identity()?.ok_or_else(|| {
        Error::usage(format!(
            "{} holds nothing of cluster {}",
            repository.url(),
            repository.cluster()
        ))
    })
}

/// Writes the content of `name`. Returns false when it is proved absent. After an error, `out` may
/// contain a part of the content.
fn content(
    repository: &Repository,
    asked: Asked<'_>,
    name: &str,
    out: &mut dyn Write,
) -> Result<bool> {
    let name: WalFileName = name
        .parse()
        .map_err(|error| Error::usage(format!("{error}")))?;
    let identity = identity(repository)?;
    match name {
        WalFileName::Segment(name) => segment(repository, &identity, asked, name, out),
        WalFileName::History(timeline) => {
            let system = identity.system_identifier;
            if asked.plan.is_some() && planned(asked.plan, timeline).is_none() {
                // The recovery does not follow this timeline: PostgreSQL looks for a free number,
                // and any history file proves that this one is taken. If the history file of this
                // number is lost, the number is not free either, and the result is an error.
                let branches = repository.branches_of(system, timeline)?;
                let Some(branch) = branches.first() else {
                    return Ok(false);
                };
                write(out, &repository.history(system, *branch)?)?;
                return Ok(true);
            }
            let found = branch_of(repository, &identity, asked.plan, timeline)?;
            let Some(branch) = found.filter(|branch| branch.digest != [0; 4]) else {
                return Ok(false);
            };
            let history = repository.history(system, branch)?;
            write(out, &history)?;
            Ok(true)
        }
        // No repository has files with these names: `push` stores the WAL of a `.partial` file as
        // WAL, and nothing of a `.backup` file.
        WalFileName::Partial(_) | WalFileName::Backup(..) => Ok(false),
    }
}

fn write(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes)
        .map_err(Error::io("write", "the delivered file"))
}

fn deliver(
    repository: &Repository,
    plan: Option<&RestorePlan>,
    name: &str,
    destination: &Path,
) -> Result<Fetched> {
    // Deliver the whole file or nothing. PostgreSQL fsyncs the file before it uses it
    // (`durable_rename` in `KeepFileRestoredFromArchive`), and removes a file that a crash left
    // under this name before it asks.
    let beside = match destination.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mode = Access::of_directory(beside).file_mode();
    let mut file = tempfile::Builder::new()
        .prefix(".tidemark-")
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(beside)
        .map_err(Error::io("create a file in", beside))?;
    let asked = Asked {
        plan,
        data: if destination.file_name() == Some(ASKED_BY_POSTGRESQL.as_ref()) {
            // The destination is in `pg_wal`, and `pg_wal` is in the data directory, where
            // PostgreSQL runs its commands.
            beside.parent()
        } else {
            None
        },
    };
    if !content(repository, asked, name, file.as_file_mut())? {
        return Ok(Fetched::Absent);
    }
    if asked.data.is_some()
        && let Ok(name) = name.parse::<SegmentName>()
    {
        ancestors::place(beside, name, file.path())?;
    }
    file.persist(destination)
        .map_err(|error| Error::io("replace", destination)(error.error))?;
    Ok(Fetched::Delivered)
}

/// Returns the branch on the plan's path with this timeline number.
fn planned(plan: Option<&RestorePlan>, timeline: TimelineId) -> Option<Branch> {
    let mut parts = plan?.path.iter();
    let part = parts.find(|part| part.branch.timeline == timeline);
    part.map(|part| part.branch)
}

/// Returns the branch of a timeline number: the plan's, else the only one with that number in the
/// repository.
fn branch_of(
    repository: &Repository,
    identity: &ClusterIdentity,
    plan: Option<&RestorePlan>,
    timeline: TimelineId,
) -> Result<Option<Branch>> {
    if let Some(branch) = planned(plan, timeline) {
        return Ok(Some(branch));
    }
    if timeline == TimelineId::FIRST {
        return Ok(Some(Branch::FIRST));
    }
    // WAL without its history file gives an error here: the timeline is archived, but its branch is
    // unknown.
    let branches = repository.branches_of(identity.system_identifier, timeline)?;
    match branches.as_slice() {
        [] => Ok(None),
        [branch] => Ok(Some(*branch)),
        _ => Err(Error::usage(format!(
            "timeline {timeline} names several histories in the archive, and no restore plan names one of them; choose one \
             with pitr-restore --target-timeline"
        ))),
    }
}

/// Writes a sealed segment for the server in `data`. Returns false when the segment is not sealed.
pub(crate) fn sealed(
    repository: &Repository,
    identity: &ClusterIdentity,
    data: Option<&Path>,
    name: SegmentName,
    out: &mut dyn Write,
) -> Result<bool> {
    let branch = branch_of(repository, identity, None, name.timeline)?;
    match branch {
        Some(branch) => {
            let asked = Asked { plan: None, data };
            sealed_of(repository, identity, asked, branch, name, out)
        }
        None => Ok(false),
    }
}

fn sealed_of(
    repository: &Repository,
    identity: &ClusterIdentity,
    asked: Asked<'_>,
    branch: Branch,
    name: SegmentName,
    out: &mut dyn Write,
) -> Result<bool> {
    let key = ObjectKey::Segment(identity.system_identifier, branch, name);
    let object = match repository.get(&key) {
        Ok(object) => object,
        Err(error) if error.is_not_found() => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let reader = open(&key, &object)?;
    let end = asked.admit(&reader)?;
    let (held, size) = (
        reader.header().raw_bytes(),
        identity.wal_segment_size.bytes(),
    );
    if held != size {
        let problem = format!("it holds {held} bytes of WAL instead of {size}");
        return Err(damaged(&key, problem));
    }
    let broken = |error: SealedError| damaged(&key, error.to_string());
    // Write frame by frame: one megabyte stays in the processor's cache between decompression and
    // write.
    let mut frames = reader.frames().map_err(broken)?;
    let mut ending = Ending {
        out,
        at: reader.header().start_lsn,
        end: end.unwrap_or(Lsn::MAX),
    };
    while let Some(frame) = frames.next() {
        let error = match frame {
            Ok((_, wal)) => {
                write(&mut ending, wal)?;
                continue;
            }
            Err(error) => broken(error),
        };
        if !asked.needs_nothing_from(branch, ending.at) {
            return Err(error);
        }
        passed_over(&error, ending.at);
        let rest = size.saturating_sub(ending.at.bytes_since(reader.header().start_lsn));
        let mut zeros = io::repeat(0).take(rest);
        io::copy(&mut zeros, &mut ending).map_err(Error::io("write", "the delivered file"))?;
        break;
    }
    Ok(true)
}

/// Writes a segment, sealed or open, with the plan's changes. Returns false when the segment is
/// proved absent.
pub(crate) fn segment(
    repository: &Repository,
    identity: &ClusterIdentity,
    asked: Asked<'_>,
    name: SegmentName,
    out: &mut dyn Write,
) -> Result<bool> {
    let number = name.segment(identity.wal_segment_size);
    let found = match (asked.plan, number) {
        (Some(plan), Some(number)) if !plan.wal_changes.is_empty() => {
            let mut changed = Changed {
                out,
                at: number.start_lsn(identity.wal_segment_size),
                changes: &plan.wal_changes,
            };
            archived_segment(repository, identity, asked, name, &mut changed)
        }
        _ => archived_segment(repository, identity, asked, name, out),
    };
    match found {
        // PostgreSQL 15 and later prefetch the segment after the stop, and end at an error.
        Err(error) if is_lost(&error) && is_after(asked.plan, name, identity) => {
            tracing::warn!(
                event = "unneeded_wal_lost", %error,
                "{name} is damaged or incomplete; the recovery stops before it and does not need it"
            );
            Ok(false)
        }
        found => found,
    }
}

/// Returns true for WAL that is damaged or has a hole.
fn is_lost(error: &Error) -> bool {
    error.is_damage() || matches!(error, Error::Wal { .. })
}

fn is_not_found(error: &Error) -> bool {
    matches!(error, Error::Repository(error) if error.is_not_found())
}

fn passed_over(error: &Error, end: Lsn) {
    tracing::warn!(
        event = "unneeded_wal_lost", %error,
        "WAL from {end} on is damaged or missing; the recovery stops before it and does not need it"
    );
}

/// Returns true if a segment begins at or after the end of the WAL that the plan needs, on the
/// plan's last timeline.
fn is_after(plan: Option<&RestorePlan>, name: SegmentName, identity: &ClusterIdentity) -> bool {
    let size = identity.wal_segment_size;
    let (Some(plan), Some(number)) = (plan, name.segment(size)) else {
        return false;
    };
    let last = plan.path.last().map(|part| part.branch.timeline);
    last == Some(name.timeline) && number.start_lsn(size) >= plan.wal_end_lsn
}

/// Writes a segment as it is archived. Returns false when it is proved absent.
fn archived_segment(
    repository: &Repository,
    identity: &ClusterIdentity,
    asked: Asked<'_>,
    name: SegmentName,
    out: &mut dyn Write,
) -> Result<bool> {
    let plan = asked.plan;
    let Some(branch) = branch_of(repository, identity, plan, name.timeline)? else {
        return Ok(false);
    };
    let size = identity.wal_segment_size;
    let Some(number) = name.segment(size) else {
        return Ok(false);
    };
    let system = identity.system_identifier;
    let start_lsn = number.start_lsn(size);
    // If the plan's last timeline ends in this segment, the next timeline has a copy of the
    // segment, which may contain more WAL.
    let forked = plan.filter(|plan| {
        let last = plan.path.last().filter(|part| part.branch == branch);
        last.is_some_and(|last| begins_in(number, size, last.to))
    });
    let open = if let Some(plan) = forked {
        let own = held(repository, identity, asked, branch, name);
        longest(own, size, || {
            copy_of_later(repository, identity, asked, plan, number)
        })?
    } else if sealed_of(repository, identity, asked, branch, name, out)? {
        return Ok(true);
    } else {
        let enough = |end| asked.needs_nothing_from(branch, end);
        open_segment(repository, identity, asked, branch, name, enough)?
    };
    if let Some(mut wal) = open {
        // Fill the rest of an open segment with zeros, which PostgreSQL reads as the end of WAL.
        wal.resize(size.len(), 0);
        write(out, &wal)?;
        return Ok(true);
    }
    // The plan's path needs no WAL of a timeline before the segment in which the path enters it.
    // The segment in which the path leaves a timeline is read from the next timeline.
    let part = plan.and_then(|plan| plan.path.iter().find(|part| part.branch == branch));
    if let (Some(plan), Some(part)) = (plan, part) {
        let is_last = plan.path.last() == Some(part);
        let needed = start_lsn < plan.wal_end_lsn
            && number.end_lsn(size) > plan.start_lsn.max(part.from)
            && (is_last || start_lsn.add(size.bytes()) <= part.to);
        if needed {
            return Err(missing(
                start_lsn,
                "the plan needs it, but it is not in the archive",
            ));
        }
        return Ok(false);
    }
    // A gap must never look like the end of the archive. It is a gap if any later WAL is archived.
    let later = |key: &ObjectKey| match key {
        ObjectKey::Segment(_, _, found) | ObjectKey::Tail(_, _, found, _, _) => *found > name,
        _ => false,
    };
    for folder in ["wal", "tail"] {
        if repository
            .list(&format!("{system}/{folder}/{branch}/"))?
            .iter()
            .any(|(key, _)| later(key))
        {
            return Err(missing(
                start_lsn,
                "later WAL is archived, so this is a gap and not the end",
            ));
        }
    }
    Ok(false)
}

/// Returns WAL of the plan's last timeline from the copy at the start of the segment in which a
/// later timeline begins. After a failover, this copy may be the only archived WAL of that segment.
fn copy_of_later(
    repository: &Repository,
    identity: &ClusterIdentity,
    asked: Asked<'_>,
    plan: &RestorePlan,
    number: SegmentNo,
) -> Result<Option<Vec<u8>>> {
    let size = identity.wal_segment_size;
    let start_lsn = number.start_lsn(size);
    let Some(switch_lsn) = plan.path.last().map(|part| part.to) else {
        return Ok(None);
    };
    let begins_here = |from: Lsn| begins_in(number, size, from);
    let wanted = usize::try_from(switch_lsn.bytes_since(start_lsn)).unwrap_or(usize::MAX);
    for part in plan.later.iter().filter(|part| begins_here(part.from)) {
        let name = SegmentName::new(part.branch.timeline, number, size);
        let mut wal = Vec::new();
        if !sealed_of(repository, identity, asked, part.branch, name, &mut wal)? {
            let enough = |end| switch_lsn <= end;
            wal = open_segment(repository, identity, asked, part.branch, name, enough)?
                .unwrap_or_default();
        }
        if wal.len() >= wanted {
            wal.truncate(wanted);
            return Ok(Some(wal));
        }
    }
    Ok(None)
}

/// Returns the archived part of a segment on a branch: the sealed segment, else its tails.
fn held(
    repository: &Repository,
    identity: &ClusterIdentity,
    asked: Asked<'_>,
    branch: Branch,
    name: SegmentName,
) -> Result<Option<Vec<u8>>> {
    let mut wal = Vec::new();
    if sealed_of(repository, identity, asked, branch, name, &mut wal)? {
        return Ok(Some(wal));
    }
    let enough = |end| asked.needs_nothing_from(branch, end);
    open_segment(repository, identity, asked, branch, name, enough)
}

/// Returns the WAL of a segment that was not sealed when it was looked for: its tails, or all of it
/// if it was sealed meanwhile. Sealing removes the tails, in any order, so a listing may lack some
/// of them and still look like an open segment.
fn open_segment(
    repository: &Repository,
    identity: &ClusterIdentity,
    asked: Asked<'_>,
    branch: Branch,
    name: SegmentName,
    enough: impl Fn(Lsn) -> bool,
) -> Result<Option<Vec<u8>>> {
    let Some(number) = name.segment(identity.wal_segment_size) else {
        return Ok(None);
    };
    let place = (name, number.start_lsn(identity.wal_segment_size));
    let system = identity.system_identifier;
    let assembled = match assemble(repository, system, branch, place, asked, enough) {
        Err(error) if !is_lost(&error) && !is_not_found(&error) => return Err(error),
        assembled => assembled,
    };
    let mut wal = Vec::new();
    if sealed_of(repository, identity, asked, branch, name, &mut wal)? {
        return Ok(Some(wal));
    }
    assembled
}

/// Returns the WAL of a segment. Returns its copy instead if the segment is damaged or the copy is
/// longer.
fn longest(
    own: Result<Option<Vec<u8>>>,
    size: SegmentSize,
    copy: impl FnOnce() -> Result<Option<Vec<u8>>>,
) -> Result<Option<Vec<u8>>> {
    let length = |wal: &Option<Vec<u8>>| wal.as_ref().map_or(0, Vec::len);
    match own {
        Err(error) if matches!(error.exit_kind(), ExitKind::Integrity) => match copy()? {
            Some(copy) => {
                tracing::warn!(%error, "the copy of the next timeline is delivered instead");
                Ok(Some(copy))
            }
            None => Err(error),
        },
        Ok(own) if length(&own) < size.len() => {
            let copy = copy()?;
            Ok(if length(&copy) > length(&own) {
                copy
            } else {
                own
            })
        }
        own => own,
    }
}

/// Returns true if a timeline that begins at `from` may have a copy of this segment.
fn begins_in(number: SegmentNo, size: SegmentSize, from: Lsn) -> bool {
    number.start_lsn(size) < from && from <= number.end_lsn(size)
}

fn missing(lsn: Lsn, problem: &str) -> Error {
    Error::Wal {
        lsn,
        problem: problem.to_owned(),
    }
}

#[cfg(test)]
mod tests;
