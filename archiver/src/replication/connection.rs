//! A connection: framed messages both ways, and the simple query.

use std::{collections::VecDeque, fmt, io, mem};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Error, Result, error::ServerReport};

/// A buffer for reading: a few of the largest WAL messages (128 KiB each) per system call.
const READ_BYTES: usize = 512 << 10;
/// With less room than this left in a buffer the next one is taken.
const ROOM_BYTES_MIN: usize = 64 << 10;
/// Buffers whose messages are still on their way, kept to be used again: fresh memory costs a page fault every 4 KiB.
/// As many as the pipeline holds messages of a catch-up.
const SPENT_BUFFERS_MAX: usize = 20;
/// No message is longer; more is not PostgreSQL.
const MESSAGE_BYTES_MAX: usize = 1 << 30;
/// No message is longer before we know who is there: a stranger must not fill our memory.
const STRANGER_BYTES_MAX: usize = 64 << 10;

/// Both directions at once: a socket, TLS over one, or a test's pipe.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// A row of an answer.
pub(super) type Row = Vec<Option<Bytes>>;

/// One framed message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) tag: u8,
    pub(super) body: Bytes,
}

/// The reading half.
pub(super) struct Reader {
    stream: Box<dyn AsyncRead + Send + Unpin>,
    buffer: BytesMut,
    /// Oldest first; one is free again when the last message in it is dropped.
    spent: VecDeque<BytesMut>,
    message_bytes_max: usize,
    /// The version of TLS, when it is encrypted.
    encryption: Option<&'static str>,
    place: String,
}

/// The writing half.
pub(super) struct Writer {
    stream: Box<dyn AsyncWrite + Send + Unpin>,
    pub(super) buffer: BytesMut,
    place: String,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

/// The halves of a stream to a server that has not authenticated us yet.
pub(super) fn halves(
    stream: impl Duplex + 'static,
    encryption: Option<&'static str>,
    place: &str,
) -> (Reader, Writer) {
    let (stream, sink) = tokio::io::split(stream);
    let reader = Reader {
        stream: Box::new(stream),
        buffer: BytesMut::new(),
        spent: VecDeque::new(),
        message_bytes_max: STRANGER_BYTES_MAX,
        encryption,
        place: place.to_owned(),
    };
    let writer = Writer {
        stream: Box::new(sink),
        buffer: BytesMut::new(),
        place: place.to_owned(),
    };
    (reader, writer)
}

/// Runs a command; an error is returned only when the server is ready for the next one. An error after rows is an error.
pub(super) async fn rows(
    reader: &mut Reader,
    writer: &mut Writer,
    command: &str,
) -> Result<Vec<Row>> {
    writer.query(command).await?;
    let mut rows = Vec::new();
    let mut refused = None;
    loop {
        let message = reader.next().await?;
        match message.tag {
            b'D' => rows.push(reader.row(message.body)?),
            b'E' => {
                let error = reader.refusal(&message.body);
                if error.is_last_word() {
                    return Err(error);
                }
                refused = refused.or(Some(error));
            }
            b'Z' => return refused.map_or(Ok(rows), Err),
            b'T' | b'C' | b'I' | b'N' | b'S' | b'A' => {}
            other => {
                return Err(reader.unexpected(format!("'{}' to a query", other.escape_ascii())));
            }
        }
    }
}

impl Reader {
    /// The server knows us; its messages may be long now.
    pub(super) fn trust(&mut self) {
        self.message_bytes_max = MESSAGE_BYTES_MAX;
    }

    /// The version of TLS, when it is encrypted.
    pub(super) fn encryption(&self) -> Option<&'static str> {
        self.encryption
    }

    /// The next message. Cancel-safe: what was read stays in the buffer.
    pub(super) async fn next(&mut self) -> Result<Message> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(message);
            }
            self.make_room();
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => {
                    return Err(Error::of_io(
                        &self.place,
                        io::ErrorKind::UnexpectedEof.into(),
                    ));
                }
                Ok(_) => {}
                Err(source) => return Err(Error::of_io(&self.place, source)),
            }
        }
    }

    /// Makes room to read into: in this buffer, in one that is free again, or in a new one.
    fn make_room(&mut self) {
        let room = self.buffer.capacity().saturating_sub(self.buffer.len());
        if room >= ROOM_BYTES_MIN {
            return;
        }
        // A message that is larger than a buffer gets one that holds it whole.
        let wanted = READ_BYTES.max(self.buffer.len() * 2);
        let free = self
            .spent
            .front_mut()
            .is_some_and(|oldest| oldest.try_reclaim(wanted));
        let reused = if free { self.spent.pop_front() } else { None };
        let mut next = reused.unwrap_or_else(|| BytesMut::with_capacity(wanted));
        next.extend_from_slice(&self.buffer);
        let mut spent = mem::replace(&mut self.buffer, next);
        if self.spent.len() < SPENT_BUFFERS_MAX {
            spent.clear();
            self.spent.push_back(spent);
        }
    }

    fn buffered(&mut self) -> Result<Option<Message>> {
        let Some(header) = self.buffer.first_chunk::<5>() else {
            return Ok(None);
        };
        let [tag, length @ ..] = *header;
        let length = u32::from_be_bytes(length) as usize;
        if !(4..self.message_bytes_max).contains(&length) {
            return Err(self.unexpected(format!("a message of {length} bytes")));
        }
        if self.buffer.len() < length + 1 {
            return Ok(None);
        }
        let mut message = self.buffer.split_to(length + 1);
        message.advance(5);
        Ok(Some(Message {
            tag,
            body: message.freeze(),
        }))
    }

    /// The next message that is not a notice or a parameter; an error response is an error.
    pub(super) async fn answer(&mut self) -> Result<Message> {
        loop {
            let message = self.next().await?;
            match message.tag {
                b'N' | b'S' | b'A' => {}
                b'E' => return Err(self.refusal(&message.body)),
                _ => return Ok(message),
            }
        }
    }

    pub(super) fn refusal(&self, body: &[u8]) -> Error {
        let mut report = ServerReport::default();
        for field in body
            .split(|byte| *byte == 0)
            .filter(|field| !field.is_empty())
        {
            let (kind, text) = field.split_at(1);
            let text = one_line(text);
            match kind {
                b"S" if report.severity.is_empty() => report.severity = text,
                // The same word, never translated.
                b"V" => report.severity = text,
                b"C" => report.code = text,
                b"M" => report.message = text,
                b"D" => report.detail = text,
                b"H" => report.hint = text,
                b"R" => report.routine = text,
                _ => {}
            }
        }
        Error::Server {
            place: self.place.clone(),
            report: Box::new(report),
        }
    }

    /// The columns of a `DataRow`, which must fill it exactly.
    pub(super) fn row(&self, mut body: Bytes) -> Result<Row> {
        let wrong = || self.unexpected("a malformed row".to_owned());
        let columns = body.try_get_u16().map_err(|_| wrong())?;
        let mut row = Vec::new();
        for _ in 0..columns {
            let length = body.try_get_i32().map_err(|_| wrong())?;
            row.push(match usize::try_from(length) {
                Ok(length) if length <= body.len() => Some(body.split_to(length)),
                Err(_) if length == -1 => None,
                _ => return Err(wrong()),
            });
        }
        if body.is_empty() {
            Ok(row)
        } else {
            Err(wrong())
        }
    }

    pub(super) fn unexpected(&self, what: String) -> Error {
        Error::Protocol {
            place: self.place.clone(),
            what,
        }
    }
}

impl Writer {
    /// Sends what is in the buffer.
    pub(super) async fn flush(&mut self) -> Result<()> {
        let sent = async {
            self.stream.write_all(&self.buffer).await?;
            self.stream.flush().await
        }
        .await;
        self.buffer.clear();
        sent.map_err(|source| Error::of_io(&self.place, source))
    }

    /// Says good-bye: a server that sees a connection just end writes a line into its log. It may be gone already.
    pub(super) async fn close(mut self) {
        self.put(b'X', &[]);
        if self.flush().await.is_ok() {
            drop(self.stream.shutdown().await);
        }
    }

    /// Puts a message together by hand.
    pub(super) fn put(&mut self, tag: u8, body: &[u8]) {
        self.buffer.put_u8(tag);
        let length = u32::try_from(body.len() + 4).expect("BUG: our messages are short");
        self.buffer.put_u32(length);
        self.buffer.put_slice(body);
    }

    /// Puts a message together with `postgres-protocol`, which refuses what the wire can not carry.
    pub(super) fn encode(
        &mut self,
        encode: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> Result<()> {
        encode(&mut self.buffer).map_err(|source| Error::of_io(&self.place, source))
    }

    /// A simple query.
    pub(super) async fn query(&mut self, sql: &str) -> Result<()> {
        self.encode(|buffer| frontend::query(sql, buffer))?;
        self.flush().await
    }
}

/// A column as text.
pub(super) fn text(row: &[Option<Bytes>], at: usize) -> Option<String> {
    let value = row.get(at)?.as_ref()?;
    Some(String::from_utf8_lossy(value).into_owned())
}

/// A server's words on one line of a log, and without anything that a terminal would obey.
fn one_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .chars()
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .collect()
}
