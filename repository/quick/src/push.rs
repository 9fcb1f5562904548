//! The client side of `push`, which PostgreSQL starts: asks the daemon, and leaves the work to the
//! full program if no daemon answers.
//!
//! Invariant: a daemon's answer counts only for the file that this process opened. If the daemon
//! does not run, has another version or ends before its answer, the full program does the work.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand};
use repository::{
    config::{ClusterSettings, CommonArgs, Settings},
    outcome_mark, outcome_seen,
};
use wal_format::SegmentName;

use crate::message::{Answer, FILES_MAX, Request, receive_answer, send_request};

/// The time after which a daemon is considered stuck. PostgreSQL must not wait for it forever.
const PATIENCE: Duration = Duration::from_secs(300);

/// The part of the command line that matters here. The full program parses and explains everything
/// else.
#[derive(Debug, Parser)]
#[command(
    name = "wal-archiver",
    disable_help_flag = true,
    disable_help_subcommand = true
)]
struct Line {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Push { path: PathBuf },
}

/// The longest path of a socket, in bytes: `sun_path` in `unix(7)` without its final zero.
const SOCKET_PATH_MAX: usize = 107;

/// Returns the path of the daemon's socket for these settings.
#[must_use]
pub fn socket_path(settings: &ClusterSettings) -> PathBuf {
    settings.spool.join(format!("{}.push", settings.name))
}

/// An address of the socket that `bind` and `connect` accept, however long the path of the spool
/// is.
#[derive(Debug)]
pub struct SocketAddress {
    /// The path to bind or to connect to, while this value lives.
    pub path: PathBuf,
    /// The spool. A longer path is replaced by one through this handle.
    _spool: Option<File>,
}

impl SocketAddress {
    /// Returns the address of a cluster's socket.
    ///
    /// # Errors
    /// Those of opening the spool, if its path is long.
    pub fn of(settings: &ClusterSettings) -> io::Result<Self> {
        let path = socket_path(settings);
        if path.as_os_str().len() <= SOCKET_PATH_MAX {
            return Ok(Self { path, _spool: None });
        }
        let spool = File::open(&settings.spool)?;
        let handle = spool.as_raw_fd();
        let path = PathBuf::from(format!("/proc/self/fd/{handle}/{}.push", settings.name));
        Ok(Self {
            path,
            _spool: Some(spool),
        })
    }
}

/// The time for which a command waits until the daemon has seen its result.
const SEEN_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval at which a command checks that.
const SEEN_INTERVAL: Duration = Duration::from_millis(20);

/// Waits until the daemon of this host has read the results of commands that ended on this host, so
/// that a `status` after a `backup` shows the backup. Returns at once if no daemon runs, and after
/// 5 s in any case.
pub fn wait_for_daemon(settings: &ClusterSettings) {
    let end = Instant::now() + SEEN_TIMEOUT;
    let has_daemon = || {
        let address = SocketAddress::of(settings);
        address.is_ok_and(|address| UnixStream::connect(&address.path).is_ok())
    };
    let (mark, seen) = (outcome_mark(settings), outcome_seen(settings));
    while let Ok(wanted) = fs::read(&mark)
        && fs::read(&seen).ok() != Some(wanted)
        && Instant::now() < end
        && has_daemon()
    {
        std::thread::sleep(SEEN_INTERVAL);
    }
}

/// The result of examining this process's command line.
#[derive(Debug)]
pub enum Asked {
    /// A push that the daemon answered: archived, or the reason why not.
    Answered(Result<(), String>),
    /// A push, but no daemon answers.
    Alone(Box<ClusterSettings>, PathBuf),
    /// Another command.
    Other,
}

/// Environment for a process that compresses one segment and ends. By default glibc requests each
/// large buffer from the kernel, which clears it page by page, and returns it afterwards; that took
/// a tenth of a push. glibc reads this variable when a process starts.
pub const MEMORY: [(&str, &str); 1] = [(
    "GLIBC_TUNABLES",
    "glibc.malloc.mmap_threshold=67108864:glibc.malloc.trim_threshold=268435456:glibc.malloc.hugetlb=1",
)];

/// Asks the daemon if this process was started for a push.
#[must_use]
pub fn asked() -> Asked {
    let Ok(Line {
        common,
        command: Command::Push { path },
    }) = Line::try_parse()
    else {
        return Asked::Other;
    };
    let Ok(settings) = Settings::resolve_for_storage(&common) else {
        return Asked::Other;
    };
    let Ok(cluster) = settings.cluster() else {
        return Asked::Other;
    };
    match ask(cluster, &path) {
        Ok(Answer::Archived) => Asked::Answered(Ok(())),
        Ok(Answer::Failed { problem }) => {
            Asked::Answered(Err(format!("{}: {problem}", path.display())))
        }
        Err(_) => Asked::Alone(Box::new(cluster.clone()), path),
    }
}

fn ask(settings: &ClusterSettings, path: &Path) -> io::Result<Answer> {
    let address = SocketAddress::of(settings)?;
    let mut socket = UnixStream::connect(&address.path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let path = std::path::absolute(path)?;
    let mut paths = vec![path.clone()];
    paths.extend(waiting(&path));
    let files: Vec<(PathBuf, File)> = paths
        .into_iter()
        .filter_map(|path| Some((path.clone(), File::open(&path).ok()?)))
        .collect();
    if files.first().is_none_or(|(first, _)| *first != path) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let descriptors: Vec<_> = files.iter().map(|(_, file)| file.as_fd()).collect();
    let request = Request {
        paths: files.iter().map(|(path, _)| path.clone()).collect(),
    };
    send_request(&mut socket, &request, &descriptors)?;
    receive_answer(&socket)
}

/// Returns the segments that PostgreSQL will push next: those after `path` that are marked as
/// ready.
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_is_reached_whatever_the_length_of_the_path_of_its_spool() {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["short".to_owned(), "long".repeat(30)] {
            let spool = directory.path().join(name);
            fs::create_dir(&spool).expect("a directory");
            let arguments = CommonArgs {
                repository: Some("file:///absent".parse().expect("a URL")),
                spool: Some(spool),
                ..CommonArgs::default()
            };
            let settings = Settings::resolve(&arguments).expect("settings");
            let cluster = settings.cluster().expect("a cluster");
            let address = SocketAddress::of(cluster).expect("an address");
            let listener = UnixListener::bind(&address.path).expect("it is bound");
            drop(address);
            assert!(socket_path(cluster).exists());
            let address = SocketAddress::of(cluster).expect("an address");
            UnixStream::connect(&address.path).expect("it is reached");
            drop(listener);
        }
    }
}
