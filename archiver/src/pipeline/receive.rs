//! Stages 1 and 4: reads the replication stream and acknowledges durable WAL to PostgreSQL.
//!
//! It runs on the connection's own thread ([`crate::primary::line`]), which compares, writes,
//! fsyncs and acknowledges the received WAL without another thread. During a catch-up it hands
//! messages to the spool thread instead. If the spool thread has no room for a message, that
//! message is held, no further one is read, and status updates continue. Invariant: the server
//! receives a status at least every `status_interval` (from [`super::voice`] when this thread is
//! blocked), and `flush` never passes WAL that is not durable in the class the user chose. `apply`
//! is never reported.

use std::{
    future::ready,
    sync::Arc,
    time::{Duration, Instant},
};

use replication::{StreamMessage, WalReceiver};
use status::{cluster_status::ClusterStatus, rpo::tiers::Seen};
use tokio::{
    sync::{mpsc::error::TrySendError, watch},
    time::MissedTickBehavior,
};
use wal_format::{Branch, Lsn};

use super::{
    command::{Command, Received},
    failure::Failure,
    server_shutdown::{EndRequests, StreamRelease},
    voice::Voice,
    write::Intake,
};
use crate::{
    core::{progress::Acknowledgement, shutdown::Shutdown},
    error::{Error, Result},
};

/// The time without a message after which a reply is requested from the server.
const PING_AFTER: Duration = Duration::from_secs(10);
/// The time without a message, in spite of a request, after which the connection counts as dead. A
/// half-open TCP connection reports no error.
const SILENT_MAX: Duration = Duration::from_secs(30);
/// The interval at which the silence is checked.
const SILENCE_POLL: Duration = Duration::from_secs(1);
/// The time without WAL after which the buffers of a burst are freed: up to 10 MiB for each
/// cluster.
const QUIET_AFTER: Duration = Duration::from_secs(10);
/// The maximum size of one group. It bounds the latency of a commit under load.
const GROUP_BYTES_MAX: u64 = 2 << 20;

/// A stream with an end LSN also ends when no WAL arrived for this long: the other server has no
/// more.
const EXHAUSTED_AFTER: Duration = Duration::from_secs(3);

/// The reason why a stream ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The server has sent everything of this timeline.
    Timeline,
    /// The server shuts down and has sent everything.
    ServerClosed,
    /// The server shuts down and waits for WAL that is not durable here. The connection is closed
    /// so that the server can stop.
    ServerStops,
    /// We were asked to stop.
    Shutdown,
    /// All requested WAL has arrived.
    Reached,
    /// The server has removed the WAL that was to be compared, but perhaps not the WAL after it.
    /// The stream is retried at once.
    NoOverlap,
}

/// The parts that a stream needs in addition to the connection.
#[derive(Debug)]
pub struct Receive {
    /// The destination of the WAL.
    pub intake: Intake,
    /// The status of the cluster.
    pub status: Arc<ClusterStatus>,
    /// The positions that may be acknowledged.
    pub acknowledgements: watch::Receiver<Acknowledgement>,
    /// The branch that is streamed.
    pub branch: Branch,
    /// The errors of other threads, which end the stream.
    pub failure: Arc<Failure>,
    /// The status reporter.
    pub voice: Arc<Voice>,
    /// Ends the stream of a server that shuts down while the stream is not read.
    pub release: Arc<StreamRelease>,
    /// The LSN at which the stream is to end.
    pub until: Lsn,
    /// The maximum interval between two status updates to the server.
    pub status_interval: Duration,
}

/// The progress of a stream.
#[derive(Debug)]
struct Course {
    /// A message that the spool thread had no room for.
    held: Option<Command>,
    /// The time of the server's last message, as far as we were reading.
    heard: Instant,
    /// The time at which WAL last arrived.
    fed: Instant,
    /// Bytes taken on this thread that are not settled yet.
    group: u64,
    /// True if WAL was taken on this thread and is not settled yet, even if `group` is 0.
    unsettled: bool,
    /// The server's requests for a reply.
    requests: EndRequests,
    /// The positions that may be reported; marked as seen once reported.
    acknowledgements: watch::Receiver<Acknowledgement>,
}

impl Receive {
    /// Streams until the end.
    ///
    /// # Errors
    /// Those of the connection, or the error that a stage raised.
    pub async fn run(
        self,
        receiver: &mut WalReceiver,
        shutdown: &mut Shutdown,
    ) -> Result<StreamEnd> {
        let mut timer = tokio::time::interval(self.status_interval);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silence = tokio::time::interval(SILENCE_POLL);
        silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = Instant::now();
        let mut pinged = now;
        let mut course = Course {
            held: None,
            heard: now,
            fed: now,
            group: 0,
            unsettled: false,
            requests: EndRequests::default(),
            acknowledgements: self.acknowledgements.clone(),
        };
        loop {
            if course.unsettled {
                // Messages that arrived meanwhile belong to the same group.
                let next = if course.group < GROUP_BYTES_MAX {
                    tokio::select! {
                        biased;
                        message = receiver.next() => Some(message?),
                        () = ready(()) => None,
                    }
                } else {
                    None
                };
                if let Some(message) = next {
                    if let Some(end) = self.on_message(message, &mut course).await? {
                        return Ok(end);
                    }
                    continue;
                }
                if self.settle(&mut course).await? {
                    timer.reset();
                }
            }
            if course.held.is_none() {
                self.release.reads();
            }
            tokio::select! {
                biased;
                error = self.failure.raised() => return Err(error),
                () = shutdown.requested() => return Ok(StreamEnd::Shutdown),
                () = self.release.released() => return Ok(StreamEnd::ServerStops),
                () = until(course.requests.due()) => {
                    self.voice.say(false).await?;
                    course.requests.answered(Instant::now());
                }
                Ok(()) = course.acknowledgements.changed() => {
                    course.acknowledgements.mark_unchanged();
                    self.voice.say(false).await?;
                }
                _ = timer.tick() => self.voice.say(false).await?,
                _ = silence.tick(), if course.held.is_none() => {
                    if course.fed.elapsed() > QUIET_AFTER {
                        receiver.free_buffers();
                    }
                    let silent = course.heard.elapsed();
                    if silent > SILENT_MAX {
                        return Err(Error::Silent { seconds: silent.as_secs() });
                    }
                    if silent > PING_AFTER && pinged.elapsed() > PING_AFTER {
                        pinged = Instant::now();
                        self.voice.say(true).await?;
                    }
                    if self.until < Lsn::MAX && course.fed.elapsed() >= EXHAUSTED_AFTER {
                        return Ok(StreamEnd::Reached);
                    }
                }
                room = self.intake.room(), if course.held.is_some() => {
                    let room = room.map_err(|_| spool_stopped())?;
                    if let Some(command) = course.held.take() {
                        self.intake.hand_over_late(room, command);
                    }
                    course.heard = Instant::now();
                }
                message = receiver.next(), if course.held.is_none() => {
                    if let Some(end) = self.on_message(message?, &mut course).await? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    /// Makes the WAL taken on this thread durable and acknowledges it at once. Returns whether
    /// there was anything to acknowledge.
    async fn settle(&self, course: &mut Course) -> Result<bool> {
        self.intake.settle()?;
        (course.unsettled, course.group) = (false, 0);
        let is_news = course.acknowledgements.has_changed().unwrap_or(false);
        if is_news {
            course.acknowledgements.mark_unchanged();
            self.voice.say(false).await?;
        }
        self.intake.cut_tail_if_due()?;
        // The time that our own disk took does not count as the server's silence.
        course.heard = Instant::now();
        Ok(is_news)
    }

    async fn on_message(
        &self,
        message: StreamMessage,
        course: &mut Course,
    ) -> Result<Option<StreamEnd>> {
        course.heard = Instant::now();
        self.release.does_not_read();
        match message {
            StreamMessage::XLogData {
                start_lsn,
                wal_end,
                send_time,
                data,
            } => {
                let length = data.len() as u64;
                ClusterStatus::count(&self.status.wal_received_bytes, length);
                self.status.heard(Some(Seen::Streamed {
                    branch: self.branch,
                    flush_lsn: wal_end,
                }));
                course.fed = course.heard;
                let received = Received {
                    start_lsn,
                    wal_end,
                    send_time,
                    data,
                };
                match self.intake.take(received)? {
                    None => {
                        course.group += length;
                        course.unsettled = true;
                    }
                    Some(received) => {
                        if course.unsettled {
                            self.settle(course).await?;
                        }
                        match self.intake.hand_over(received) {
                            Ok(()) => {}
                            Err(TrySendError::Full(command)) => course.held = Some(command),
                            Err(TrySendError::Closed(_)) => return Err(spool_stopped()),
                        }
                    }
                }
                let reached = start_lsn.add(length) >= self.until && course.held.is_none();
                Ok(reached.then_some(StreamEnd::Reached))
            }
            StreamMessage::Keepalive {
                reply_requested, ..
            } => {
                self.status.heard(None);
                if reply_requested {
                    if course.requests.asked(course.heard) {
                        self.voice.say(false).await?;
                        course.requests.answered(Instant::now());
                    } else if course.requests.is_overdue(course.heard) {
                        self.release
                            .log("it did not reach the repository or the disk in time");
                        return Ok(Some(StreamEnd::ServerStops));
                    }
                }
                Ok(None)
            }
            StreamMessage::EndOfTimeline => Ok(Some(StreamEnd::Timeline)),
            StreamMessage::ServerClosed => Ok(Some(StreamEnd::ServerClosed)),
        }
    }
}

/// Waits until this moment; without one, forever.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

fn spool_stopped() -> Error {
    Error::ThreadStopped {
        name: "spool",
        reason: "see the error before".to_owned(),
    }
}

/// Returns the maximum interval between status updates for a server's `wal_sender_timeout`. The
/// server closes the connection after that timeout and requests a reply at half of it. A quarter
/// allows for one lost update. The interval is at most the ten seconds of `pg_receivewal`.
#[must_use]
pub fn status_interval(wal_sender_timeout: Option<Duration>) -> Duration {
    const MAX: Duration = Duration::from_secs(10);
    const MIN: Duration = Duration::from_millis(10);
    match wal_sender_timeout {
        Some(timeout) if !timeout.is_zero() => (timeout / 4).clamp(MIN, MAX),
        _ => MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::parse_duration;

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
