//! Runs `pitr-restore` as a child process that gives way to everything else on the host.

use std::{
    env,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    thread,
    time::Duration,
};

use quick::whole;
use rustix::process::{Pid, Signal, kill_process, nice};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    runtime::Handle,
    sync::oneshot,
};

use crate::core::shutdown::Shutdown;

/// The name of the program.
const PROGRAM: &str = "pitr-restore";
/// Added to the priority of the daemon: the child, its threads and the server that it starts get
/// what the host does not need otherwise. The kernel derives the priority of their I/O from it.
const NICE: i32 = 19;
/// The child and its server are the first that the kernel ends when memory runs out.
const OOM_SCORE: &str = "1000";
/// The time in which the child removes its copy after SIGTERM. What it leaves after that, the next
/// drill removes.
const STOP_MAX: Duration = Duration::from_secs(10);
/// The number of bytes and of lines at the end of the messages that are kept.
const MESSAGE_BYTES_MAX: usize = 4096;
const MESSAGE_LINES_MAX: usize = 3;
/// Variables by which a program reports to systemd. The server of a drill must not report for the
/// daemon.
const OF_SYSTEMD: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

/// A program that has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    /// The last lines of its messages.
    pub(super) message: String,
}

/// Finds `pitr-restore` next to this program, or else in PATH.
///
/// # Errors
/// The places that were searched, and the remedy.
pub(super) fn find() -> Result<PathBuf, String> {
    let this = whole::called().map_err(|error| format!("this program's own path: {error}"))?;
    let next = this.with_file_name(PROGRAM);
    if next.is_file() {
        return Ok(next);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = env::split_paths(&path).map(|directory| directory.join(PROGRAM));
    places.find(|program| program.is_file()).ok_or_else(|| {
        format!(
            "{PROGRAM} was found neither in {} nor in PATH: install it next to wal-archiver",
            next.parent().unwrap_or(Path::new("/")).display()
        )
    })
}

/// Runs a program to its end. At a requested stop it gets SIGTERM, and SIGKILL after [`STOP_MAX`].
///
/// # Errors
/// When it cannot be started.
pub(super) async fn run(
    program: PathBuf,
    arguments: Vec<OsString>,
    mut stop: Shutdown,
) -> io::Result<Ended> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    for name in OF_SYSTEMD {
        command.env_remove(name);
    }
    let mut child = spawn_nicely(command).await?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let file = format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero());
        if let Err(error) = tokio::fs::write(&file, OOM_SCORE).await {
            tracing::debug!(%error, file, "the drill may keep its memory when memory runs out");
        }
    }
    let errors = child.stderr.take();
    let message = tokio::spawn(async move {
        match errors {
            Some(errors) => last_lines(errors).await,
            None => String::new(),
        }
    });
    let status = match stop.until(child.wait()).await {
        Some(status) => status?,
        None => end(&mut child, pid).await?,
    };
    // A process that the child left behind may keep the pipe open.
    let message = tokio::time::timeout(STOP_MAX, message).await;
    Ok(Ended {
        status,
        message: message.ok().and_then(Result::ok).unwrap_or_default(),
    })
}

/// Starts a program from a thread of low priority, which the child inherits: no moment passes in
/// which it has the daemon's.
async fn spawn_nicely(mut command: Command) -> io::Result<Child> {
    let runtime = Handle::current();
    let (started, starting) = oneshot::channel();
    thread::Builder::new()
        .name("drill".to_owned())
        .spawn(move || {
            // On Linux, the priority belongs to the thread.
            if let Err(error) = nice(NICE) {
                tracing::debug!(%error, "the drill has the priority of the daemon");
            }
            let _runtime = runtime.enter();
            drop(started.send(command.spawn()));
        })?;
    starting
        .await
        .map_err(|_| io::Error::other("the thread that starts it has ended"))?
}

async fn end(child: &mut Child, pid: Option<Pid>) -> io::Result<ExitStatus> {
    // The child has not been waited for, so its number cannot belong to another process.
    if let Some(pid) = pid {
        kill_process(pid, Signal::TERM)?;
    }
    if let Ok(status) = tokio::time::timeout(STOP_MAX, child.wait()).await {
        return status;
    }
    child.kill().await?;
    child.wait().await
}

/// Reads to the end, and returns the last lines.
async fn last_lines(mut errors: impl AsyncRead + Unpin) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = errors.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..count]);
        let excess = kept.len().saturating_sub(MESSAGE_BYTES_MAX);
        kept.drain(..excess);
    }
    let text = String::from_utf8_lossy(&kept);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut lines: Vec<&str> = lines.rev().take(MESSAGE_LINES_MAX).collect();
    lines.reverse();
    repository::printable(&lines.join("; ")).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (PathBuf, Vec<OsString>) {
        ("/bin/sh".into(), vec!["-c".into(), script.into()])
    }

    #[tokio::test]
    async fn a_child_has_a_low_priority_and_its_last_messages_are_kept() {
        let (program, arguments) = shell("seq 1 9000 >&2; nice >&2; exit 5");
        let ended = run(program, arguments, Shutdown::never()).await;
        let ended = ended.expect("it runs");
        assert_eq!(ended.status.code(), Some(5));
        assert_eq!(ended.message, "8999; 9000; 19");
        let missing = run("/no/such/program".into(), Vec::new(), Shutdown::never()).await;
        assert_eq!(
            missing.map(drop).map_err(|error| error.kind()),
            Err(io::ErrorKind::NotFound)
        );
    }

    #[tokio::test]
    async fn a_stop_ends_the_child() {
        let (stop, stopped) = Shutdown::new();
        let (program, arguments) =
            shell("trap 'echo ended >&2; exit 3' TERM; kill -TERM $$; sleep 60");
        let ended = run(program, arguments, stopped.clone())
            .await
            .expect("it runs");
        assert_eq!(
            (ended.status.code(), ended.message.as_str()),
            (Some(3), "ended")
        );
        stop.request();
        let (program, arguments) = shell("exec sleep 60");
        let ended = run(program, arguments, stopped).await.expect("it runs");
        assert_eq!(ended.status.code(), None, "{ended:?}");
    }
}
