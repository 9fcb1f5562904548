//! The recovery of a copy that `--start` runs. Until it has ended and was compared with the plan,
//! the same command may restore again.
//!
//! Invariant: a data directory is emptied only if its restore recorded that it starts the server,
//! no server runs in it, and no server of it was open for writing: recovery has not ended, or no
//! server has run since the restore stopped the one that was not compared with the plan.

use std::{fs, io, path::Path};

use repository::durable;
use rustix::{
    io::Errno,
    process::{Pid, test_kill_process},
};
use serde::{Deserialize, Serialize};
use wal_format::{ControlFile, control_file::CONTROL_FILE_BYTES};

use super::{
    CONTROL, claims,
    owned::is_at,
    place::real,
    tree::{Tree, read_small},
};
use crate::{Error, RestorePlan, Result, isolation::recovery_is_pending};

/// The file that exists until the end of recovery was compared with the plan.
const UNPROVED: &str = "RECOVERY_INCOMPLETE";
/// The maximum length of this file in bytes.
const UNPROVED_BYTES_MAX: u64 = 64 << 10;

/// The content of [`UNPROVED`].
#[derive(Debug, Default, Serialize, Deserialize)]
struct Unproved {
    /// An explanation for a person who opens the file.
    note: String,
    /// The content of `pg_control` in hexadecimal when the restore stopped the server. A server
    /// changes it when it starts. `None` if the restore did not stop the server.
    stopped: Option<String>,
}

/// Records that the caller starts the server of a copy that is complete.
pub(super) fn begin(tree: &Tree) -> Result<()> {
    tree.replace(UNPROVED, &content(None))
}

/// Records that the server, which was not compared with the plan, was stopped.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn stopped(directory: &Path) -> Result<()> {
    if !is_unproved(directory) {
        return Ok(());
    }
    let content = content(control(directory).map(hex::encode));
    durable::replace(&directory.join(UNPROVED), &content).map_err(Error::local)
}

fn content(stopped: Option<String>) -> Vec<u8> {
    let note = "The recovery of this restore was not compared with its plan. Run the same command \
                again.";
    let unproved = Unproved {
        note: note.to_owned(),
        stopped,
    };
    serde_json::to_vec_pretty(&unproved).unwrap_or_default()
}

/// Records that recovery was compared with the plan, or that the operator accepts the copy. After
/// the end of recovery, releases the claims of the copy.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn proved(directory: &Path) -> Result<()> {
    durable::remove(&directory.join(UNPROVED)).map_err(Error::local)?;
    ended(directory);
    Ok(())
}

/// Releases the claims of a copy if its recovery has ended and no restore still has to compare it
/// with the plan.
pub(crate) fn ended(directory: &Path) {
    if !recovery_is_pending(directory) && !is_unproved(directory) {
        claims::release_all(directory);
    }
}

/// Returns true if the recovery of the copy was not compared with the plan.
pub(super) fn is_unproved(directory: &Path) -> bool {
    fs::symlink_metadata(directory.join(UNPROVED)).is_ok()
}

/// Returns true if the recovery of a restore into `directory` was interrupted, so that the same
/// command may restore again. A copy of that directory elsewhere is not such a restore.
pub(super) fn was_interrupted(directory: &Path) -> bool {
    let path = directory.join(UNPROVED);
    let Ok(file) = fs::File::open(&path) else {
        return false;
    };
    let Some(plan) = claims::plan_in(directory) else {
        return false;
    };
    if !plan
        .claim
        .as_ref()
        .is_some_and(|owner| is_at(owner, directory))
    {
        return false;
    }
    let json = read_small(file, &path, UNPROVED_BYTES_MAX).unwrap_or_default();
    let unproved: Unproved = serde_json::from_slice(&json).unwrap_or_default();
    let control = control(directory);
    let stopped = unproved
        .stopped
        .and_then(|stopped| hex::decode(stopped).ok());
    let untouched = stopped.is_some() && stopped == control;
    untouched || (directory.join("recovery.signal").exists() && is_of_plan(control, &plan))
}

/// Returns true if the newest checkpoint is on a timeline of the plan: a server that was promoted
/// is on a new one.
fn is_of_plan(control: Option<Vec<u8>>, plan: &RestorePlan) -> bool {
    let control = control.and_then(|control| ControlFile::parse(&control).ok());
    control.is_some_and(|control| {
        let mut path = plan.path.iter();
        path.any(|part| part.branch.timeline == control.checkpoint.timeline)
    })
}

fn control(directory: &Path) -> Option<Vec<u8>> {
    let path = directory.join(CONTROL);
    let file = fs::File::open(&path).ok()?;
    read_small(file, &path, CONTROL_FILE_BYTES as u64).ok()
}

/// Refuses a directory in which a server or one of its processes runs. After the postmaster was
/// killed, the startup process waits for its `restore_command`, and PostgreSQL refuses to start
/// (`PGSharedMemoryCreate` in `sysv_shmem.c`).
///
/// # Errors
/// [`Error::Usage`] names the processes.
pub(super) fn refuse_running(directory: &Path) -> Result<()> {
    let shown = directory.display();
    let path = directory.join("postmaster.pid");
    let content = match fs::read_to_string(&path) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let number = content.lines().next().unwrap_or_default().trim();
    let postmaster = number.parse().ok().and_then(Pid::from_raw);
    if postmaster.is_some_and(|process| runs_in(process, directory)) {
        return Err(Error::usage(format!(
            "the server of a restore that was interrupted runs in {shown} (process {number}); stop it with pg_ctl -D {shown} \
             -m immediate stop, and run the same command again"
        )));
    }
    let left = processes_in(directory);
    if left.is_empty() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "processes of a server that was killed still run in {shown}; end them with kill -9 {}, and run the same command again",
        left.join(" ")
    )))
}

/// Returns false if the process does not exist, or works in another directory than a server of
/// `directory` does (`ChangeToDataDir`): its number was used again.
fn runs_in(process: Pid, directory: &Path) -> bool {
    if test_kill_process(process) == Err(Errno::SRCH) {
        return false;
    }
    match fs::read_link(format!("/proc/{}/cwd", process.as_raw_nonzero())) {
        Ok(working) => real(&working) == real(directory),
        // A process that has ended and was not waited for has no directory.
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Returns the server processes that work in `directory`.
fn processes_in(directory: &Path) -> Vec<String> {
    let directory = real(directory);
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let working = entries.filter(|entry| {
        let of_process = |name: &str| entry.path().join(name);
        let is_server = fs::read_to_string(of_process("comm"))
            .is_ok_and(|name| name.trim() == "postgres" || name.trim() == "postmaster");
        is_server && fs::read_link(of_process("cwd")).is_ok_and(|working| working == directory)
    });
    working
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}
