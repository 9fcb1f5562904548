//! Stages 1 and 4: reads the replication stream, and tells PostgreSQL how far our copy is safe.
//!
//! One task does both and waits for nothing but the socket: a message that the spool has no room for is held, no further
//! one is read, and the status goes on. Invariant: the server hears from us at least every `status_interval`, and `flush`
//! never passes WAL that is not durable in the class the user chose. `apply` is never reported.

use std::time::{Duration, Instant};

use tokio::{
    sync::mpsc::{Sender, error::TrySendError},
    time::MissedTickBehavior,
};
use wal_format::Lsn;

use super::{failure::Failure, progress::Acknowledgement, write::Command};
use crate::{
    cluster_status::ClusterStatus,
    error::{Error, Result},
    flushed_lsn::FlushedLsn,
    replication::{StatusSender, StatusUpdate, StreamMessage, WalReceiver},
    shutdown::Shutdown,
};

/// After this long without a message the server is asked for one.
const PING_AFTER: Duration = Duration::from_secs(10);
/// After this long without one, although asked, the connection counts as dead: a half-open TCP connection says nothing.
const SILENT_MAX: Duration = Duration::from_secs(30);

/// A stream that has an end ends as well when no WAL came for this long: the other server has no more.
const EXHAUSTED_AFTER: Duration = Duration::from_secs(3);

/// Why a stream ended in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The server has sent everything of this timeline.
    Timeline,
    /// The server shuts down and has sent everything.
    ServerClosed,
    /// We were asked to stop.
    Shutdown,
    /// All that was wanted is here.
    Reached,
}

/// What the task needs beside the connection.
#[derive(Debug)]
pub struct Receive<'a> {
    /// Where WAL goes.
    pub commands: &'a Sender<Command>,
    /// What is known of the cluster.
    pub status: &'a ClusterStatus,
    /// What may stop the stream from behind.
    pub failure: &'a Failure,
    /// Flush LSNs before this were said already, in an earlier stream: they are not said again.
    pub floor: Lsn,
    /// Where the stream is to end.
    pub until: Lsn,
    /// How often the server hears from us at least.
    pub status_interval: Duration,
}

impl Receive<'_> {
    /// Streams until the end.
    ///
    /// # Errors
    /// The connection's, or what a stage raised.
    pub async fn run(
        &self,
        receiver: &mut WalReceiver,
        sender: &mut StatusSender,
        shutdown: &mut Shutdown,
    ) -> Result<StreamEnd> {
        let mut acknowledgements = self.status.progress().acknowledgements();
        let mut timer = tokio::time::interval(self.status_interval);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut fed = Instant::now();
        let mut exhausted = tokio::time::interval(EXHAUSTED_AFTER);
        let mut held: Option<Command> = None;
        loop {
            tokio::select! {
                biased;
                error = self.failure.raised() => return Err(error),
                () = shutdown.requested() => return Ok(StreamEnd::Shutdown),
                Ok(()) = acknowledgements.changed() => {
                    let now = *acknowledgements.borrow_and_update();
                    self.report(sender, now, false).await?;
                }
                _ = timer.tick() => {
                    let silent = heard.elapsed();
                    if held.is_none() && silent > SILENT_MAX {
                        return Err(Error::Silent { seconds: silent.as_secs() });
                    }
                    let now = *acknowledgements.borrow_and_update();
                    self.report(sender, now, silent > PING_AFTER).await?;
                }
                _ = exhausted.tick(), if self.until < Lsn::MAX && held.is_none() => {
                    if fed.elapsed() >= EXHAUSTED_AFTER {
                        return Ok(StreamEnd::Reached);
                    }
                }
                room = self.commands.reserve(), if held.is_some() => {
                    let room = room.map_err(|_| spool_stopped())?;
                    if let Some(command) = held.take() {
                        room.send(command);
                    }
                    heard = Instant::now();
                }
                message = receiver.next(), if held.is_none() => {
                    heard = Instant::now();
                    match message? {
                        StreamMessage::XLogData { start_lsn, wal_end, send_time, data } => {
                            ClusterStatus::count(
                                &self.status.wal_received_bytes,
                                data.len() as u64,
                            );
                            self.status.heard(Some(wal_end));
                            fed = heard;
                            let end = start_lsn.add(data.len() as u64);
                            let command = Command::Data { start_lsn, wal_end, send_time, data };
                            match self.commands.try_send(command) {
                                Ok(()) => {}
                                Err(TrySendError::Full(command)) => held = Some(command),
                                Err(TrySendError::Closed(_)) => return Err(spool_stopped()),
                            }
                            if end >= self.until && held.is_none() {
                                return Ok(StreamEnd::Reached);
                            }
                        }
                        StreamMessage::Keepalive { reply_requested, .. } => {
                            self.status.heard(None);
                            if reply_requested {
                                let now = *acknowledgements.borrow_and_update();
                                self.report(sender, now, false).await?;
                            }
                        }
                        StreamMessage::EndOfTimeline => return Ok(StreamEnd::Timeline),
                        StreamMessage::ServerClosed => return Ok(StreamEnd::ServerClosed),
                    }
                }
            }
        }
    }

    /// Says how far we are.
    async fn report(
        &self,
        sender: &mut StatusSender,
        now: Acknowledgement,
        reply_requested: bool,
    ) -> Result<()> {
        // 0/0 tells the server nothing. A smaller position than before would move its slot back.
        let flush = if now.flush.lsn() < self.floor {
            FlushedLsn::proved(Lsn::ZERO)
        } else {
            now.flush
        };
        sender
            .send(StatusUpdate {
                write: now.write,
                flush,
                reply_requested,
            })
            .await?;
        Ok(())
    }
}

fn spool_stopped() -> Error {
    Error::ThreadStopped {
        name: "spool",
        reason: "see the error before".to_owned(),
    }
}

/// How often the server has to hear from us, given its `wal_sender_timeout`: it hangs up after that long, and asks at half
/// of it. A quarter leaves room for one lost moment; at most the ten seconds of `pg_receivewal`.
#[must_use]
pub fn status_interval(wal_sender_timeout: Option<Duration>) -> Duration {
    const MAX: Duration = Duration::from_secs(10);
    const MIN: Duration = Duration::from_millis(10);
    match wal_sender_timeout {
        Some(timeout) if !timeout.is_zero() => (timeout / 4).clamp(MIN, MAX),
        _ => MAX,
    }
}

/// Reads a duration as `SHOW` prints it: `1min`, `500ms`, `0`.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let milliseconds: u64 = match unit {
        "" | "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(milliseconds).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_hears_from_us_well_within_its_timeout() {
        for (shown, milliseconds) in [
            ("1min", 10_000),
            ("0", 10_000),
            ("2s", 500),
            ("1ms", 10),
            ("12h", 10_000),
        ] {
            let interval = status_interval(parse_duration(shown));
            assert_eq!(interval, Duration::from_millis(milliseconds), "{shown}");
        }
        assert_eq!(parse_duration("soon"), None);
        assert_eq!(parse_duration(""), None);
    }
}
