//! `START_REPLICATION`: sends WAL and reads status updates, until the timeline ends or the client
//! disconnects.
//!
//! The order of messages is that of `walsender.c`: `CopyBoth`, data and keepalives, `CopyDone` from
//! either side, on a finished timeline the result set that names its successor, and two
//! completions.
//! Invariant: a record is split across messages only at the end of a page. A client's status
//! updates change nothing here, because the archive keeps all WAL.

use std::{
    io,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BufMut;
use tokio::io::{AsyncRead, AsyncWrite};
use wal_format::{Lsn, PgTimestamp, TimelineId};

use super::{
    Shared,
    refusal::Refusal,
    source::{Place, Source, WalReader},
    wire::{Answer, Message, Type, read_message},
};
use crate::blocking::blocking;

/// Corresponds to `MAX_SEND_SIZE` in `walsender.c`.
const SEND_BYTES_MAX: usize = 128 << 10;
/// The size of a WAL page (`XLOG_BLCKSZ`).
const PAGE_BYTES: u64 = 8192;
/// The interval at which new WAL is polled for.
const POLL: Duration = Duration::from_millis(20);
/// The interval of keepalives to an idle client, and the time that it may stay silent, like
/// `wal_sender_timeout`.
const KEEPALIVE: Duration = Duration::from_secs(10);
const SILENCE_MAX: Duration = Duration::from_secs(60);

struct Stream<'a> {
    shared: &'a Shared,
    source: Source,
    place: Place,
    timeline: TimelineId,
    reader: WalReader,
    sent: Lsn,
    copy_done: bool,
    heard: Instant,
    asked: Instant,
}

/// Streams WAL. An inner error is sent to the client, an outer error ends the connection.
pub(super) async fn run(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    shared: &Shared,
    answer: &mut Answer,
    start: Lsn,
    timeline: Option<TimelineId>,
) -> io::Result<Result<(), Refusal>> {
    let mut stream = match Stream::open(shared, start, timeline).await {
        Ok(stream) => stream,
        Err(refusal) => return Ok(Err(refusal)),
    };
    // If the timeline ends at the requested start, there is nothing to copy.
    if stream.place.next.is_none_or(|(switch, _)| switch != start) {
        answer.message(b'W', |out| out.put_slice(&[0, 0, 0]));
        answer.send(writer).await?;
        if let Err(refusal) = stream.copy(reader, writer, answer).await? {
            return Ok(Err(refusal));
        }
    }
    if let Some((switch, successor)) = stream.place.next {
        next_timeline(answer, successor.timeline, switch);
    }
    answer.complete("START_STREAMING");
    answer.complete("START_REPLICATION");
    Ok(Ok(()))
}

/// Appends the result set that follows a timeline's last byte: the next timeline and its start.
fn next_timeline(answer: &mut Answer, timeline: TimelineId, start: Lsn) {
    answer.columns(&[("next_tli", Type::Int8), ("next_tli_startpos", Type::Text)]);
    let (timeline, start) = (timeline.get().to_string(), start.to_string());
    answer.row(&[Some(timeline.as_bytes()), Some(start.as_bytes())]);
}

impl<'a> Stream<'a> {
    async fn open(
        shared: &'a Shared,
        start: Lsn,
        timeline: Option<TimelineId>,
    ) -> Result<Self, Refusal> {
        let source = Source::open(shared).await?;
        let timeline = timeline.unwrap_or(source.timeline());
        let place = source.place(shared, timeline).await?;
        if let Some((switch, _)) = place.next
            && switch < start
        {
            let words = format!(
                "requested starting point {start} on timeline {timeline} is not in this archive's history, which forked from it at {switch}"
            );
            return Err(Refusal::new("58P01", words));
        }
        if place.next.is_none() && source.end() < start {
            let words = format!(
                "requested starting point {start} is ahead of the WAL flush position of this archive {}",
                source.end()
            );
            return Err(Refusal::new("XX000", words));
        }
        Ok(Self {
            reader: WalReader::new(&source, place),
            shared,
            source,
            place,
            timeline,
            sent: start,
            copy_done: false,
            heard: Instant::now(),
            asked: Instant::now(),
        })
    }

    async fn copy(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
        answer: &mut Answer,
    ) -> io::Result<Result<(), Refusal>> {
        let mut news = self.shared.progress.acknowledgements();
        loop {
            // Reads one message of the client at a time, and sends WAL while waiting for it.
            let mut incoming = pin!(read_message(&mut *reader));
            let message = loop {
                let sent = match self.send(answer).await {
                    Ok(sent) => sent,
                    Err(refusal) => return Ok(Err(refusal)),
                };
                answer.send(writer).await?;
                let pause = if sent { Duration::ZERO } else { POLL };
                tokio::select! {
                    biased;
                    message = &mut incoming => break message?,
                    () = tokio::time::sleep(pause), if !sent => {}
                    _ = news.changed(), if !sent => {}
                    () = std::future::ready(()), if sent => {}
                }
                if self.heard.elapsed() > SILENCE_MAX {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                if self.asked.elapsed() > KEEPALIVE {
                    self.keepalive(answer, true);
                }
            };
            self.heard = Instant::now();
            match message.tag {
                b'd' if wants_reply(&message) => self.keepalive(answer, false),
                b'd' => {}
                b'c' => {
                    if !self.copy_done {
                        answer.message(b'c', |_| {});
                    }
                    return Ok(Ok(()));
                }
                b'X' => return Err(io::ErrorKind::UnexpectedEof.into()),
                b'f' => {
                    return Ok(Err(Refusal::new(
                        "57014",
                        "the client gave the copy up".to_owned(),
                    )));
                }
                _ => {
                    let words = "unexpected message during a copy".to_owned();
                    return Ok(Err(Refusal::new("08P01", words)));
                }
            }
        }
    }

    /// Appends the next WAL message. Returns whether there was WAL to send.
    async fn send(&mut self, answer: &mut Answer) -> Result<bool, Refusal> {
        if self.copy_done {
            return Ok(false);
        }
        let limit = self.limit().await?;
        if self.sent >= limit {
            if self.place.next.is_some() {
                answer.message(b'c', |_| {});
                self.copy_done = true;
            }
            return Ok(false);
        }
        let (from, archive) = (self.sent, Arc::clone(&self.shared.archive));
        let mut wal_reader =
            std::mem::replace(&mut self.reader, WalReader::new(&self.source, self.place));
        let (wal_reader, wal) = blocking(move || {
            let Some(archive) = archive.get() else {
                return Ok((wal_reader, None));
            };
            let wal = wal_reader.read(&archive, from, limit, SEND_BYTES_MAX)?;
            Ok((wal_reader, wal))
        })
        .await?;
        self.reader = wal_reader;
        let Some(mut wal) = wal else {
            let name = wal_format::SegmentName::new(
                self.timeline,
                self.source.segment_size().segment_of(from),
                self.source.segment_size(),
            );
            let words = format!("requested WAL segment {name} is not in the archive");
            return Err(Refusal::new("58P01", words));
        };
        let end = from.add(wal.len() as u64);
        let whole = end.align_down(PAGE_BYTES);
        if end < limit && whole > from {
            wal.truncate(usize::try_from(whole.bytes_since(from)).unwrap_or(wal.len()));
        }
        answer.message(b'd', |out| {
            out.put_u8(b'w');
            out.put_u64(from.0);
            out.put_u64(limit.0);
            out.put_i64(now());
            out.put_slice(&wal);
        });
        self.sent = from.add(wal.len() as u64);
        Ok(true)
    }

    /// Returns the LSN up to which this timeline can be sent now. Detects that the timeline has
    /// ended.
    async fn limit(&mut self) -> Result<Lsn, Refusal> {
        if let Some((switch, _)) = self.place.next {
            return Ok(switch);
        }
        if let Some(end) = self.source.end_now(&self.shared.progress) {
            return Ok(end);
        }
        self.source = Source::open(self.shared).await?;
        self.place = self.source.place(self.shared, self.timeline).await?;
        self.reader = WalReader::new(&self.source, self.place);
        Ok(match self.place.next {
            Some((switch, _)) => switch,
            None => self.source.end(),
        })
    }

    fn keepalive(&mut self, answer: &mut Answer, reply: bool) {
        if reply {
            self.asked = Instant::now();
        }
        if self.copy_done {
            return;
        }
        answer.message(b'd', |out| {
            out.put_u8(b'k');
            out.put_u64(self.sent.0);
            out.put_i64(now());
            out.put_u8(u8::from(reply));
        });
    }
}

/// Returns whether a status update requests a reply, which its last byte says.
fn wants_reply(message: &Message) -> bool {
    message.body.first() == Some(&b'r') && message.body.last() == Some(&1)
}

fn now() -> i64 {
    PgTimestamp::from_jiff(jiff::Timestamp::now()).0
}
