//! A connection: framed messages in both directions, and the simple query.

use std::{collections::VecDeque, fmt, io, mem};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Error, Result, error::ServerReport};

/// The size of a read buffer: a few of the largest WAL messages (128 KiB each) per system call.
const READ_BYTES: usize = 512 << 10;
/// The minimum free space in a buffer. With less, the next buffer is used.
const ROOM_BYTES_MIN: usize = 64 << 10;
/// The number of buffers kept for reuse while their messages are still in use: newly allocated
/// memory costs a page fault every 4 KiB. Equals the number of messages that the pipeline holds
/// during a catch-up.
const SPENT_BUFFERS_MAX: usize = 20;
/// The maximum length of a message. PostgreSQL never sends a longer one.
const MESSAGE_BYTES_MAX: usize = 1 << 30;
/// The maximum length of a message before authentication, so that an unknown server cannot fill our
/// memory.
const STRANGER_BYTES_MAX: usize = 64 << 10;

/// A bidirectional byte stream: a socket, TLS over a socket, or a pipe in a test.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// A row of a query result.
pub(super) type Row = Vec<Option<Bytes>>;

#[derive(Debug)]
pub(super) struct Message {
    pub(super) tag: u8,
    pub(super) body: Bytes,
}

/// The reading half.
pub(super) struct Reader {
    stream: Box<dyn AsyncRead + Send + Unpin>,
    buffer: BytesMut,
    /// Used buffers, oldest first. A buffer is free again when the last message in it is dropped.
    spent: VecDeque<BytesMut>,
    message_bytes_max: usize,
    /// The TLS version, if the connection is encrypted.
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

/// Splits a stream to a server that has not authenticated us yet.
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

/// Runs a command. Reads until the server is ready for the next command, also after an error. An
/// error after rows is an error.
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
                if error.is_final() {
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
    /// Permits long messages. Called after authentication.
    pub(super) fn trust(&mut self) {
        self.message_bytes_max = MESSAGE_BYTES_MAX;
    }

    /// The TLS version, if the connection is encrypted.
    pub(super) fn encryption(&self) -> Option<&'static str> {
        self.encryption
    }

    /// Returns the next message. Cancel-safe: bytes that were read stay in the buffer.
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

    /// Provides free space to read into: in this buffer, in a reusable one, or in a new one.
    fn make_room(&mut self) {
        let room = self.buffer.capacity().saturating_sub(self.buffer.len());
        if room >= ROOM_BYTES_MIN {
            return;
        }
        // A message that is larger than a buffer gets a buffer that holds it completely.
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

    /// Frees the buffers that are kept for the next burst.
    pub(super) fn free_buffers(&mut self) {
        self.spent = VecDeque::new();
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

    /// Returns the next message that is neither a notice nor a parameter status. An error response
    /// is returned as an error.
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
                // The severity again, never translated.
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

    /// Splits a `DataRow` into columns, which must fill it exactly.
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
    /// Sends the content of the buffer.
    pub(super) async fn flush(&mut self) -> Result<()> {
        let sent = async {
            self.stream.write_all(&self.buffer).await?;
            self.stream.flush().await
        }
        .await;
        self.buffer.clear();
        sent.map_err(|source| Error::of_io(&self.place, source))
    }

    /// Sends Terminate, since a server logs a message when a connection ends without it. The
    /// connection may have ended already.
    pub(super) async fn close(mut self) {
        self.put(b'X', &[]);
        if self.flush().await.is_ok() {
            drop(self.stream.shutdown().await);
        }
    }

    /// Appends a message with the given tag and body.
    pub(super) fn put(&mut self, tag: u8, body: &[u8]) {
        self.buffer.put_u8(tag);
        let length = u32::try_from(body.len() + 4).expect("BUG: our messages are short");
        self.buffer.put_u32(length);
        self.buffer.put_slice(body);
    }

    /// Appends a message with `postgres-protocol`, which refuses values that the protocol cannot
    /// represent.
    pub(super) fn encode(
        &mut self,
        encode: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> Result<()> {
        encode(&mut self.buffer).map_err(|source| Error::of_io(&self.place, source))
    }

    pub(super) async fn query(&mut self, sql: &str) -> Result<()> {
        self.encode(|buffer| frontend::query(sql, buffer))?;
        self.flush().await
    }
}

/// Returns a column as text.
pub(super) fn text(row: &[Option<Bytes>], at: usize) -> Option<String> {
    let value = row.get(at)?.as_ref()?;
    Some(String::from_utf8_lossy(value).into_owned())
}

/// Formats a server's text for one log line, without control characters that a terminal would
/// interpret.
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
