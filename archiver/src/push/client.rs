//! The side that PostgreSQL starts: asks the daemon, and does the work itself where none answers.
//!
//! Invariant: it believes a daemon only about the very file that it opened, and falls back on itself whenever the daemon
//! is not there, is busy with another version, or dies before its answer.

use std::{
    fs, io,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use repository::config::ClusterSettings;
use wal_format::SegmentName;

use super::{
    WalFile,
    message::{Answer, FILES_MAX, Request, receive_answer, send_request},
    push_alone,
    server::socket_path,
};
use crate::error::{Error, Result};

/// A daemon that has not answered by then has met something that it does not know; PostgreSQL must not wait for it for good.
const PATIENCE: Duration = Duration::from_secs(300);

/// Pushes one file, through the daemon where one listens.
///
/// # Errors
/// As [`push_alone`].
pub fn push(settings: &ClusterSettings, path: &Path) -> Result<()> {
    match ask(settings, path) {
        Ok(Answer::Archived) => Ok(()),
        Ok(Answer::Failed { problem }) => Err(Error::Push {
            path: path.to_path_buf(),
            problem,
        }),
        Err(error) => {
            tracing::debug!(%error, "no daemon answers; pushing alone");
            push_alone(settings, path)
        }
    }
}

fn ask(settings: &ClusterSettings, path: &Path) -> io::Result<Answer> {
    let mut socket = UnixStream::connect(socket_path(settings))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let path = std::path::absolute(path)?;
    let mut paths = vec![path.clone()];
    paths.extend(waiting(&path));
    let files: Vec<(PathBuf, WalFile)> = paths
        .into_iter()
        .filter_map(|path| Some((path.clone(), WalFile::open(&path).ok()?)))
        .collect();
    if files.first().is_none_or(|(first, _)| *first != path) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let descriptors: Vec<_> = files.iter().map(|(_, file)| file.file.as_fd()).collect();
    let request = Request {
        paths: files.iter().map(|(path, _)| path.clone()).collect(),
    };
    send_request(&mut socket, &request, &descriptors)?;
    receive_answer(&socket)
}

/// The segments that PostgreSQL will push next: those behind `path` that it has marked.
fn waiting(path: &Path) -> Vec<PathBuf> {
    let (Some(directory), Some(name)) = (path.parent(), segment_name(path)) else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir(directory.join("archive_status")) else {
        return Vec::new();
    };
    let mut names: Vec<SegmentName> = entries
        .flatten()
        .filter_map(|entry| {
            let mark = entry.file_name();
            mark.to_str()?.strip_suffix(".ready")?.parse().ok()
        })
        .filter(|waiting: &SegmentName| waiting.timeline == name.timeline && *waiting > name)
        .collect();
    names.sort();
    names.truncate(FILES_MAX - 1);
    names
        .into_iter()
        .map(|name| directory.join(name.to_string()))
        .collect()
}

fn segment_name(path: &Path) -> Option<SegmentName> {
    path.file_name()?.to_str()?.parse().ok()
}
