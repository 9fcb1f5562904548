//! Claims on the directories of tablespaces.
//!
//! A restore chooses the directory of a tablespace when it plans. PostgreSQL uses it much later,
//! when the replay creates the tablespace. A claim is a file in that directory with the random
//! token of the restore. It tells another restore, and this one when it runs again, which restore
//! owns the directory. PostgreSQL tolerates the file: it only looks for the directory of its own
//! version (`create_tablespace_directories` in `tablespace.c`), and a base backup leaves the file
//! out.
//!
//! Invariant: a directory that contains more than a claim belongs to a restore only if the claim
//! has its token and says that the restore created the rest.

use std::{
    collections::BTreeMap,
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, ErrorKind, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    MARKER, PLAN_FILE,
    place::MARKER_BYTES_MAX,
    tree::{Tree, read_small},
};
use crate::{Error, RestorePlan, Result};

/// The name of a claim in a tablespace's directory.
const CLAIM: &str = "tidemark_claim.json";
/// The prefix of files that are being written.
const UNFINISHED: &str = ".tidemark-";
/// The maximum length of a claim in bytes.
const CLAIM_BYTES_MAX: u64 = 64 << 10;

/// The restore that owns directories. It is stored in the plan and in the marker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// A random token.
    pub token: String,
    /// The data directory.
    pub directory: PathBuf,
}

impl Owner {
    /// Creates the owner for a new restore into `directory`.
    pub(super) fn new(directory: &Path) -> Self {
        // The keys of a `RandomState` are random.
        let number = || RandomState::new().build_hasher().finish();
        Self {
            token: format!("{:016x}{:016x}", number(), number()),
            directory: directory.to_owned(),
        }
    }
}

/// The content of a claim.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    /// An explanation for a person who opens the file.
    note: String,
    owner: Owner,
    /// True if the restore created everything else in the directory.
    made: bool,
}

/// The state of a directory for a tablespace.
#[derive(Debug)]
enum Found {
    /// The directory is missing or empty.
    Nothing,
    /// It contains only the claim of a restore whose recovery has not ended.
    Claimed(Owner),
    /// It contains only a claim whose restore no longer exists.
    Abandoned,
    /// It contains files.
    InUse,
}

/// Returns true if a tablespace may get the directory: it is missing or empty, or has only the
/// claim of a restore that no longer exists.
pub(crate) fn is_free(directory: &Path) -> Result<bool> {
    Ok(matches!(
        look(directory)?,
        Found::Nothing | Found::Abandoned
    ))
}

/// Returns the reason why a tablespace cannot get the directory, as the predicate of a sentence;
/// `None` if it can.
pub(crate) fn in_use(directory: &Path) -> Option<String> {
    match look(directory) {
        Ok(Found::Nothing | Found::Abandoned) => None,
        Ok(Found::Claimed(owner)) => Some(format!(
            "is claimed by the restore into {}, whose recovery has not ended",
            owner.directory.display()
        )),
        Ok(Found::InUse) => Some("exists here and is not empty".to_owned()),
        Err(error) => Some(format!("cannot be read ({error})")),
    }
}

/// Returns true if the directory has a claim with this token and contains nothing that the restore
/// did not create.
pub(crate) fn is_of(directory: &Path, token: &str) -> bool {
    let Ok(Some(claim)) = read(directory) else {
        return false;
    };
    claim.owner.token == token && (claim.made || !holds_more(directory).unwrap_or(true))
}

/// Claims an existing directory. `made` states that the restore creates everything else in it.
pub(super) fn claim(directory: &Path, owner: &Owner, made: bool) -> Result<()> {
    let claim = Claim {
        note: "A restore of pitr-restore has chosen this directory for a tablespace. The file is removed when its \
               recovery has ended."
            .to_owned(),
        owner: owner.clone(),
        made,
    };
    let path = directory.join(CLAIM);
    let json = serde_json::to_vec_pretty(&claim)
        .map_err(|error| Error::io("write", &path)(error.into()))?;
    if is_of_token(directory, &owner.token) {
        return Tree::open(directory, &BTreeMap::new())?.replace(CLAIM, &json);
    }
    if read(directory)?.is_some_and(|found| !is_live(&found.owner)) {
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    let written = || -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(directory)?;
        file.write_all(&json)?;
        file.as_file().sync_all()?;
        // Atomic, and fails if another restore claimed the directory first.
        file.persist_noclobber(&path).map_err(|error| error.error)?;
        fs::File::open(directory)?.sync_all()
    };
    match written() {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(refusal(directory)),
        done => done.map_err(Error::io("write", path)),
    }
}

/// Returns the error for a directory that a tablespace cannot get.
pub(super) fn refusal(directory: &Path) -> Error {
    let why = in_use(directory).unwrap_or_else(|| "is in use".to_owned());
    Error::usage(format!(
        "{} {why}, and nothing in it is overwritten; put the tablespace elsewhere with --tablespace-mapping OLD=NEW, or remove \
         the directory if an earlier restore left it and no server uses it",
        directory.display()
    ))
}

/// Removes the claim with this token, if the directory has it. A claim that remains does not
/// disturb the server.
pub(super) fn release(directory: &Path, token: &str) {
    if is_of_token(directory, token)
        && let Err(error) = fs::remove_file(directory.join(CLAIM))
    {
        tracing::warn!(%error, "the claim in {} was not removed", directory.display());
    }
}

/// Removes the claims of the restored server in `data`, whose recovery has ended.
pub(super) fn release_all(data: &Path) {
    let Some(plan) = plan_in(data) else {
        return;
    };
    let Some(owner) = plan.claim else {
        return;
    };
    let replayed = plan.tablespaces.into_iter().filter_map(|one| one.directory);
    for directory in replayed.chain(super::owned::linked(data).into_values()) {
        release(&directory, &owner.token);
    }
}

/// Returns the plan that a restore left in a data directory.
pub(crate) fn plan_in(data: &Path) -> Option<RestorePlan> {
    let json = fs::read(data.join(PLAN_FILE)).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Returns true for the names of our files in a tablespace's directory.
pub(super) fn is_ours(name: &[u8]) -> bool {
    name == CLAIM.as_bytes()
        || name.starts_with(CLAIM.as_bytes())
        || name.starts_with(UNFINISHED.as_bytes())
}

/// Returns true for the name of a claim.
pub(super) fn is_claim(name: &[u8]) -> bool {
    name == CLAIM.as_bytes()
}

/// Returns true if the directory has a claim with this token, whatever else it contains.
pub(super) fn is_of_token(directory: &Path, token: &str) -> bool {
    let claim = read(directory).ok().flatten();
    claim.is_some_and(|claim| claim.owner.token == token)
}

fn look(directory: &Path) -> Result<Found> {
    if holds_more(directory)? {
        return Ok(Found::InUse);
    }
    Ok(match read(directory)? {
        None => Found::Nothing,
        Some(claim) if is_live(&claim.owner) => Found::Claimed(claim.owner),
        Some(_) => Found::Abandoned,
    })
}

/// Returns true if the directory contains anything except our own files.
pub(super) fn holds_more(directory: &Path) -> Result<bool> {
    let mut entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("list", directory)(error)),
    };
    Ok(entries.any(|entry| entry.map_or(true, |entry| !is_ours(entry.file_name().as_bytes()))))
}

fn read(directory: &Path) -> Result<Option<Claim>> {
    if !directory.is_dir() {
        return Ok(None);
    }
    let path = directory.join(CLAIM);
    let Some(file) = Tree::open(directory, &BTreeMap::new())?.read_if_there(CLAIM)? else {
        return Ok(None);
    };
    let json = read_small(file, &path, CLAIM_BYTES_MAX)?;
    serde_json::from_slice(&json).map(Some).map_err(|error| {
        Error::usage(format!(
            "{} is not a claim of this version ({error}); remove it if no restore uses its directory",
            path.display()
        ))
    })
}

/// Returns false only if the restore is known not to exist any more.
fn is_live(owner: &Owner) -> bool {
    #[derive(Deserialize)]
    struct Claimed {
        claim: Option<Owner>,
    }
    let has = |name: &str| {
        let path = owner.directory.join(name);
        match fs::File::open(&path) {
            Ok(file) => {
                let json = read_small(file, &path, MARKER_BYTES_MAX).ok();
                let claimed: Option<Claimed> =
                    json.and_then(|json| serde_json::from_slice(&json).ok());
                claimed.is_none_or(|claimed| {
                    claimed
                        .claim
                        .is_some_and(|claim| claim.token == owner.token)
                })
            }
            Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        }
    };
    has(MARKER) || has(PLAN_FILE)
}
