//! The events of a cluster ([`Events`]), newest last. Their number is bounded, and they are kept
//! across restarts as JSON lines in the spool's directory.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use wal_format::PgTimestamp;

/// The number of events kept.
pub const EVENTS_MAX: usize = 500;

/// An event of a cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The number of the event. It grows by one within a cluster.
    pub id: u64,
    /// The time at which it was noticed.
    pub time: PgTimestamp,
    /// `state`, `alert`, `resolved`, `timeline`, `failover`, `backup`, `drill`, `expire` or
    /// `verify`.
    pub kind: String,
    /// `info`, `warning` or `critical`.
    pub severity: String,
    /// The message for users.
    pub message: String,
}

/// The events of one cluster.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    kept: VecDeque<Event>,
    file: Option<File>,
    /// The number of lines in the file. It is rewritten when this is twice the number of events
    /// kept.
    lines: usize,
}

impl Events {
    /// Reads the file at `path`. Lines that cannot be parsed, for example a torn last one, are
    /// ignored.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let content = fs::read_to_string(path).unwrap_or_default();
        let kept: VecDeque<Event> = content
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let mut events = Self {
            path: path.to_owned(),
            lines: content.lines().count(),
            kept,
            file: None,
        };
        if !content.is_empty() && !content.ends_with('\n') {
            events.lines = EVENTS_MAX * 2;
        }
        events.trim();
        events
    }

    /// Adds an event at the current time, and appends it to the file.
    pub fn add(&mut self, kind: &str, severity: &str, message: &str) -> Event {
        let event = Event {
            id: self.kept.back().map_or(1, |last| last.id + 1),
            time: PgTimestamp::from_jiff(jiff::Timestamp::now()),
            kind: kind.to_owned(),
            severity: severity.to_owned(),
            message: message.to_owned(),
        };
        self.kept.push_back(event.clone());
        self.lines += 1;
        if self.trim() {
            return event;
        }
        if self.file.is_none() {
            self.file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&self.path)
                .ok();
        }
        if let (Some(file), Ok(line)) = (&mut self.file, serde_json::to_string(&event)) {
            // An error is ignored: a full disk must not stop the dashboard.
            drop(writeln!(file, "{line}"));
        }
        event
    }

    /// Returns the events with an id greater than `after`, oldest first.
    #[must_use]
    pub fn after(&self, after: u64) -> Vec<Event> {
        self.kept
            .iter()
            .filter(|event| event.id > after)
            .cloned()
            .collect()
    }

    /// Drops the oldest events, and rewrites the file when it has twice as many lines as events are
    /// kept. Returns whether it was rewritten.
    fn trim(&mut self) -> bool {
        while self.kept.len() > EVENTS_MAX {
            self.kept.pop_front();
        }
        if self.lines < EVENTS_MAX * 2 {
            return false;
        }
        let lines: String = self
            .kept
            .iter()
            .filter_map(|event| serde_json::to_string(event).ok())
            .map(|line| line + "\n")
            .collect();
        self.file = None;
        self.lines = self.kept.len();
        fs::write(&self.path, lines).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_bounded_and_survive_a_restart() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("events");
        let mut events = Events::open(&path);
        for number in 0..EVENTS_MAX * 3 {
            events.add("state", "info", &format!("number {number}"));
        }
        drop(events);
        let mut file = OpenOptions::new().append(true).open(&path).expect("a file");
        write!(file, "{{\"id\":7").expect("a torn line");
        let mut events = Events::open(&path);
        let kept = events.after(0);
        assert_eq!(kept.len(), EVENTS_MAX);
        assert_eq!(
            kept.last().map(|event| event.id),
            Some(EVENTS_MAX as u64 * 3)
        );
        events.add("state", "info", "after the torn line");
        assert_eq!(Events::open(&path).after(kept[EVENTS_MAX - 1].id).len(), 1);
        let lines = fs::read_to_string(&path).expect("a file").lines().count();
        assert!(lines <= EVENTS_MAX * 2, "{lines}");
    }
}
