//! [`Log`]: PostgreSQL's log of a recovery, read as it grows, and the events in it.
//!
//! The server writes it in English and at the level "warning", which includes LOG, ERROR and FATAL.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read},
    path::Path,
};

use wal_format::{Lsn, SegmentName, SegmentSize};

/// The number of lines before an error that are searched for its reason.
const BEFORE_MAX: usize = 6;
/// The maximum number of characters of a message that are repeated.
const MESSAGE_MAX: usize = 600;
/// Parts of the message of `CheckRequiredParameterValues` in each version. Later versions put
/// quotation marks around the setting.
const MINIMAL: [&str; 2] = ["WAL was generated with ", "wal_level=minimal"];
/// Parts of the log lines that precede a FATAL and give its reason.
const REASONS: [&str; 4] = ["could not", "invalid", "unrecognized", "syntax error"];
/// The levels of the lines that explain the message before them.
const EXPLAINS: [&str; 3] = ["DETAIL:", "HINT:", "CONTEXT:"];

/// The log of one start.
#[derive(Debug)]
pub(super) struct Log {
    file: File,
    segment_size: SegmentSize,
    /// The bytes of an incomplete line.
    partial: Vec<u8>,
    before: VecDeque<String>,
    /// The events so far.
    pub(super) seen: Events,
    /// The number of bytes that were read.
    pub(super) bytes: u64,
}

/// The events in a log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Events {
    /// The place where recovery stopped, after "recovery stopping".
    pub(super) stopping: Option<String>,
    /// True if recovery pauses at its end.
    pub(super) paused_at_end: bool,
    /// True if recovery pauses anywhere.
    pub(super) paused: bool,
    /// True if the new timeline has begun.
    pub(super) complete: bool,
    /// True if connections are accepted.
    pub(super) ready: bool,
    /// True if the server shuts down at the target.
    pub(super) shutdown_at_target: bool,
    /// A setting that is lower than the primary's, in PostgreSQL's words.
    pub(super) lower_setting: Option<String>,
    /// True if PostgreSQL waits indefinitely because of `lower_setting`.
    pub(super) insufficient: bool,
    /// The number of restarts after the crash of a server process.
    pub(super) crashes: u32,
    /// The first of these crashes, in PostgreSQL's words.
    pub(super) crash: Option<String>,
    /// PostgreSQL's warning (13) or error that the WAL was written with `wal_level = minimal`.
    pub(super) minimal: Option<String>,
    /// The first ERROR, FATAL or PANIC, with the lines that explain it.
    pub(super) first_error: Option<String>,
    /// The end of WAL that is known to be replayed.
    pub(super) replayed: Option<Lsn>,
    /// The segment that `restore_command` delivered last.
    pub(super) delivered: Option<SegmentName>,
    /// The last message.
    pub(super) last: Option<String>,
    /// True if the next details belong to `first_error`.
    explains: bool,
}

impl Log {
    pub(super) fn open(path: &Path, segment_size: SegmentSize) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
            segment_size,
            partial: Vec::new(),
            before: VecDeque::new(),
            seen: Events::default(),
            bytes: 0,
        })
    }

    /// Reads what PostgreSQL wrote since the last call.
    pub(super) fn read(&mut self) -> io::Result<()> {
        let mut bytes = std::mem::take(&mut self.partial);
        let read = self.file.read_to_end(&mut bytes)?;
        self.bytes = self.bytes.saturating_add(read as u64);
        let mut lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
        let partial = lines.pop().unwrap_or_default().to_vec();
        for line in lines {
            self.line(&String::from_utf8_lossy(line));
        }
        self.partial = partial;
        Ok(())
    }

    fn line(&mut self, line: &str) {
        let seen = &mut self.seen;
        let message = message(line);
        if let Some((_, place)) = message.split_once("recovery stopping") {
            seen.stopping.get_or_insert_with(|| place.trim().to_owned());
        }
        seen.paused_at_end |= message.contains("pausing at the end of recovery");
        seen.paused |= message.contains("recovery has paused");
        seen.complete |= message.contains("archive recovery complete");
        seen.ready |= message.contains("database system is ready to accept connections");
        seen.shutdown_at_target |= message.contains("shutdown at recovery target");
        seen.insufficient |= message.contains("because of insufficient parameter settings");
        if message.contains("is a lower setting than on the primary server") {
            seen.lower_setting.get_or_insert_with(|| message.to_owned());
        }
        if message.contains("all server processes terminated; reinitializing") {
            seen.crashes = seen.crashes.saturating_add(1);
        }
        if message.contains(") was terminated by signal")
            || message.contains(") exited with exit code")
        {
            seen.crash.get_or_insert_with(|| message.to_owned());
        }
        if MINIMAL.iter().all(|words| message.contains(words)) {
            seen.minimal.get_or_insert_with(|| message.to_owned());
        }
        if let Some(name) = quoted_after(message, "restored log file ")
            && let Ok(name) = name.parse::<SegmentName>()
            && let Some(segment) = name.segment(self.segment_size)
        {
            seen.delivered = Some(name);
            // PostgreSQL asks for a segment when it has replayed everything before it.
            let start = segment.start_lsn(self.segment_size);
            seen.replayed = seen.replayed.max(Some(start));
        }
        if message.contains("redo in progress")
            && let Some((_, lsn)) = message.split_once("current LSN: ")
        {
            seen.replayed = seen.replayed.max(lsn.trim().parse().ok());
        }
        let is_error = ["ERROR:", "FATAL:", "PANIC:"]
            .iter()
            .any(|word| line.contains(word))
            // PostgreSQL rejects a client during startup.
            && !message.starts_with("the database system is");
        let explains = explains(line);
        match &mut seen.first_error {
            None if is_error => {
                // An explanation belongs to the message before it.
                let mut is_reason = false;
                let reasons = self.before.iter().filter(|line| {
                    if !self::explains(line) {
                        is_reason = gives_reason(line);
                    }
                    is_reason
                });
                let mut parts: Vec<&str> = reasons.map(|line| self::message(line)).collect();
                parts.push(message);
                let mut said = parts.join("; ");
                if let Some((end, _)) = said.char_indices().nth(MESSAGE_MAX) {
                    said.truncate(end);
                }
                seen.first_error = Some(said);
                seen.explains = true;
            }
            Some(said) if seen.explains && explains && said.len() < MESSAGE_MAX => {
                said.push_str("; ");
                said.push_str(message);
            }
            _ => seen.explains = false,
        }
        if !line.trim().is_empty() {
            seen.last = Some(message.chars().take(MESSAGE_MAX).collect());
            self.before.push_back(line.to_owned());
            if self.before.len() > BEFORE_MAX {
                self.before.pop_front();
            }
        }
    }
}

/// Returns a line without its prefix and its level.
fn message(line: &str) -> &str {
    let levels = [
        "LOG:", "WARNING:", "ERROR:", "FATAL:", "PANIC:", "HINT:", "DETAIL:", "CONTEXT:",
    ];
    let after = levels.iter().filter_map(|level| line.split_once(level));
    let first = after.min_by_key(|(before, _)| before.len());
    first.map_or(line, |(_, after)| after).trim()
}

fn explains(line: &str) -> bool {
    EXPLAINS.iter().any(|level| line.contains(level))
}

fn gives_reason(line: &str) -> bool {
    REASONS.iter().any(|reason| line.contains(reason))
        && !line.contains("invalid record length")
        && !line.contains("invalid magic number")
}

fn quoted_after<'a>(message: &'a str, words: &str) -> Option<&'a str> {
    let (_, rest) = message.split_once(words)?;
    rest.split('"').nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(text: &str) -> Events {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut log = Log::open(file.path(), SegmentSize::DEFAULT).expect("opened");
        // Write the text in two parts, split within a line.
        let (first, second) = text.split_at(text.len() / 2);
        std::fs::write(file.path(), first).expect("written");
        log.read().expect("read");
        let mut whole = std::fs::OpenOptions::new()
            .append(true)
            .open(file.path())
            .expect("opened");
        io::Write::write_all(&mut whole, second.as_bytes()).expect("written");
        log.read().expect("read");
        log.seen
    }

    #[test]
    fn the_first_error_comes_with_its_reason() {
        let text = "2026-11-30 03:47:28.426 UTC [1] LOG:  could not bind IPv4 address \"127.0.0.1\": Address already in use\n\
            2026-11-30 03:47:28.426 UTC [1] HINT:  Is another postmaster already running on port 5432?\n\
            2026-11-30 03:47:28.427 UTC [1] WARNING:  could not create listen socket for \"127.0.0.1\"\n\
            2026-11-30 03:47:28.427 UTC [1] FATAL:  could not create any TCP/IP sockets\n\
            2026-11-30 03:47:28.427 UTC [1] LOG:  database system is shut down\n\
            2026-11-30 03:47:28.427 UTC [1] FATAL:  another\n";
        let said = events(text).first_error.expect("an error");
        assert_eq!(
            said,
            "could not bind IPv4 address \"127.0.0.1\": Address already in use; Is another postmaster already running on \
             port 5432?; could not create listen socket for \"127.0.0.1\"; could not create any TCP/IP sockets"
        );
        let text = "x LOG:  could not open configuration file \"/x.conf\": No such file or directory\n\
            x FATAL:  configuration file \"/d/postgresql.conf\" contains errors\nx HINT:  h\n";
        let said = events(text).first_error.expect("an error");
        assert!(
            said.starts_with("could not open configuration file \"/x.conf\""),
            "{said}"
        );
        assert!(said.ends_with("contains errors; h"), "{said}");
        // The explanation of another message is none of this one.
        let text = "x LOG:  database system was interrupted while in recovery\n\
            x HINT:  If this has occurred more than once some data might be corrupted\n\
            x FATAL:  requested recovery stop point is before consistent recovery point\n";
        let said = events(text).first_error.expect("an error");
        assert!(said.starts_with("requested recovery stop point"), "{said}");
        let early = "x FATAL:  the database system is starting up\nx DETAIL:  d\n";
        assert_eq!(events(early).first_error, None);
    }

    #[test]
    fn the_warning_of_missing_changes_is_an_event() {
        let said = "WAL was generated with wal_level=minimal, data may be missing";
        let warned = format!("x WARNING:  {said}\nx HINT:  h\nx LOG:  redo done at 0/1\n");
        assert_eq!(events(&warned).minimal.as_deref(), Some(said));
        let said = "WAL was generated with \"wal_level=minimal\", cannot continue recovering";
        let seen = events(&format!("x FATAL:  {said}\nx DETAIL:  d\n"));
        assert_eq!(seen.minimal.as_deref(), Some(said));
        assert_eq!(events("x LOG:  restored log file\n").minimal, None);
    }

    #[test]
    fn a_recovery_is_followed() {
        let text = "x LOG:  restored log file \"000000010000000000000003\" from archive\n\
            x LOG:  redo starts at 0/3000028\n\
            x LOG:  restored log file \"000000010000000000000004\" from archive\n\
            x LOG:  redo in progress, elapsed time: 10.00 s, current LSN: 0/4A00000\n\
            x LOG:  recovery stopping before WAL location (LSN) \"0/4B00000\"\n\
            x LOG:  pausing at the end of recovery\nx LOG:  recovery has paused\n";
        let seen = events(text);
        assert_eq!(seen.replayed, Some(Lsn(0x4A0_0000)));
        assert_eq!(
            seen.stopping.as_deref(),
            Some("before WAL location (LSN) \"0/4B00000\"")
        );
        assert!(seen.paused_at_end && seen.paused && !seen.complete && !seen.ready);
        assert_eq!(
            seen.delivered.map(|name| name.to_string()).as_deref(),
            Some("000000010000000000000004")
        );
        assert_eq!(seen.last.as_deref(), Some("recovery has paused"));
        assert_eq!(seen.first_error, None);
    }
}
