//! Decides when to fsync and when to cut a tail.
//!
//! Unless the server is ahead, everything that has arrived is fsynced before anything else happens
//! (natural group commit). During a catch-up fsyncs run concurrently with the writer, and no tail
//! is cut, because complete segments are being uploaded.
//! Invariant: a tail is cut only when no written byte waits for an fsync, and only one is in
//! progress.

use std::time::Duration;

use wal_format::Lsn;

use super::action::Action;

/// The distance to the server's flush LSN from which fsyncs are passed to the flusher instead of
/// awaited.
pub const CATCH_UP_BYTES: u64 = 4 << 20;
/// The number of bytes written after which an fsync is requested even if more WAL has arrived.
const UNSYNCED_BYTES_MAX: u64 = 16 << 20;

/// The settings for tails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PaceSettings {
    /// The maximum interval between two tails.
    pub tail_interval: Duration,
    /// The number of bytes after which a tail is cut in any case.
    pub tail_bytes: u64,
}

/// The state that decides about fsyncs and tails.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    settings: PaceSettings,
    written: Lsn,
    server: Lsn,
    /// Bytes in the open segment's file since its last fsync was requested.
    unsynced: u64,
    /// Bytes received since the last tail was passed on.
    uncut: u64,
    last_cut: Duration,
    tail_under_way: bool,
}

impl Pace {
    pub(super) fn new(settings: PaceSettings) -> Self {
        Self {
            settings,
            ..Self::default()
        }
    }

    pub(super) fn take_up(&mut self, written: Lsn) {
        self.written = written;
        self.server = written;
        self.unsynced = 0;
    }

    pub(super) fn on_written(&mut self, written: Lsn, server: Lsn, bytes: u64) -> Vec<Action> {
        self.written = written;
        self.server = server;
        // The bytes that completed a segment are already with the flusher. Counting all of them
        // requests at most one fsync too many.
        self.unsynced += bytes;
        self.uncut += bytes;
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            self.unsynced = 0;
            return vec![Action::HandOver];
        }
        Vec::new()
    }

    pub(super) fn on_completed(&mut self) {
        self.unsynced = 0;
    }

    pub(super) fn on_group(&mut self, flusher_idle: bool) -> Vec<Action> {
        if self.unsynced == 0 {
            return Vec::new();
        }
        if self.is_catching_up() {
            if !flusher_idle {
                return Vec::new();
            }
            self.unsynced = 0;
            return vec![Action::HandOver];
        }
        self.unsynced = 0;
        vec![Action::Sync]
    }

    pub(super) fn on_tick(&mut self, now: Duration, due: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        if due {
            if self.unsynced > 0 {
                self.unsynced = 0;
                actions.push(Action::Sync);
            }
        } else if self.is_catching_up() || self.unsynced > 0 {
            return actions;
        }
        let is_time = due
            || self.uncut >= self.settings.tail_bytes
            || now.saturating_sub(self.last_cut) >= self.settings.tail_interval;
        if is_time && !self.tail_under_way {
            actions.push(Action::CutTail);
        }
        actions
    }

    pub(super) fn on_tail_cut(&mut self, now: Duration) {
        self.last_cut = now;
        self.uncut = 0;
        self.tail_under_way = true;
    }

    pub(super) fn on_tail_done(&mut self) {
        self.tail_under_way = false;
    }

    pub(super) fn is_tail_free(&self) -> bool {
        !self.tail_under_way
    }

    pub(super) fn is_catching_up(&self) -> bool {
        self.server.bytes_since(self.written) > CATCH_UP_BYTES
    }
}
