//! Programs and queries with a time limit, which a signal ends.

use std::{
    io::Read,
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{Error, Result, start::Interrupt};

/// The interval at which a program is polled.
const POLL: Duration = Duration::from_millis(50);
/// The bytes of each output of a program that are kept.
const OUTPUT_BYTES_MAX: u64 = 64 << 10;

/// A program that has ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// The status; `None` if the time limit ended it.
    pub(super) status: Option<ExitStatus>,
    pub(super) output: String,
    pub(super) errors: String,
}

impl Ended {
    pub(super) fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// Returns the reason of a failure: the time limit, the first error or the first output.
    pub(super) fn reason(&self, limit: Duration) -> String {
        const SHOWN_MAX: usize = 600;
        let Some(status) = self.status else {
            return format!("it ran longer than its limit of {} s", limit.as_secs());
        };
        let lines = |text: &str| -> String {
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let text = lines.take(3).collect::<Vec<_>>().join("; ");
            text.chars().take(SHOWN_MAX).collect()
        };
        let found = [&self.errors, &self.output].map(|text| lines(text));
        let found = found.into_iter().find(|text| !text.is_empty());
        found.unwrap_or_else(|| status.to_string())
    }
}

/// Runs a program and waits for its end. Kills it at the time limit and after a signal.
///
/// # Errors
/// [`Error::Interrupted`]; [`Error::Io`] if it cannot be started.
pub(super) fn run(command: &mut Command, limit: Duration, interrupt: &Interrupt) -> Result<Ended> {
    let program = command.get_program().to_owned();
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::io("start", &program))?;
    let output = child.stdout.take().map(read);
    let errors = child.stderr.take().map(read);
    let status = wait(&mut child, limit, interrupt);
    let text = |reader: Option<thread::JoinHandle<String>>| {
        reader
            .and_then(|reader| reader.join().ok())
            .unwrap_or_default()
    };
    let (output, errors) = (text(output), text(errors));
    Ok(Ended {
        status: status?,
        output,
        errors,
    })
}

fn wait(child: &mut Child, limit: Duration, interrupt: &Interrupt) -> Result<Option<ExitStatus>> {
    let began = Instant::now();
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(Some(status)),
            Ok(None) if began.elapsed() >= limit => break Ok(None),
            Ok(None) => {}
            Err(error) => break Err(Error::io("wait for", "a program of the drill")(error)),
        }
        if let Err(error) = interrupt.check() {
            break Err(error);
        }
        thread::sleep(POLL);
    };
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::warn!(%error, "a program of the drill did not end");
    }
    ended
}

/// Reads an output to its end, and keeps the begin of it.
fn read(from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut kept = Vec::new();
        let mut from = from;
        let read = from.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut kept);
        let rest = std::io::copy(&mut from, &mut std::io::sink());
        if let Err(error) = read.and(rest) {
            tracing::debug!(%error, "an output of a program was not read");
        }
        String::from_utf8_lossy(&kept).into_owned()
    })
}
