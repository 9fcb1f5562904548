//! A connection: framed messages both ways, and the handshake.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    },
    message::frontend,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::{ConnInfo, ConnectionMode, Error, Result, error::ServerReport};

/// Room kept for reading: a few of the largest WAL messages (128 KiB each) per system call.
const READ_BYTES: usize = 512 << 10;
/// No message is longer; more is not PostgreSQL.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

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

impl Reader {
    /// The next message. Cancel-safe: what was read stays in the buffer.
    pub(super) async fn next(&mut self) -> Result<Message> {
        loop {
            if let Some(message) = self.buffered()? {
                return Ok(message);
            }
            self.buffer.reserve(READ_BYTES);
            let read = self.stream.read_buf(&mut self.buffer).await;
            let place = || self.place.clone();
            match read {
                Ok(0) => return Err(Error::Closed { place: place() }),
                Ok(_) => {}
                Err(source) => {
                    return Err(Error::Io {
                        place: place(),
                        source,
                    });
                }
            }
        }
    }

    fn buffered(&mut self) -> Result<Option<Message>> {
        let Some(header) = self.buffer.first_chunk::<5>() else {
            return Ok(None);
        };
        let [tag, length @ ..] = *header;
        let length = u32::from_be_bytes(length) as usize;
        if !(4..MESSAGE_BYTES_MAX).contains(&length) {
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
            let text = String::from_utf8_lossy(text).into_owned();
            match kind {
                b"V" => report.severity = text,
                b"C" => report.code = text,
                b"M" => report.message = text,
                b"D" => report.detail = text,
                b"H" => report.hint = text,
                _ => {}
            }
        }
        Error::Server {
            place: self.place.clone(),
            report: Box::new(report),
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
        sent.map_err(|source| Error::Io {
            place: self.place.clone(),
            source,
        })
    }

    /// Puts a message together by hand.
    pub(super) fn put(&mut self, tag: u8, body: &[u8]) {
        self.buffer.put_u8(tag);
        let length = u32::try_from(body.len() + 4).expect("BUG: our messages are short");
        self.buffer.put_u32(length);
        self.buffer.put_slice(body);
    }

    fn encode(
        &mut self,
        place: &str,
        encode: impl FnOnce(&mut BytesMut) -> std::io::Result<()>,
    ) -> Result<()> {
        encode(&mut self.buffer).map_err(|source| Error::Io {
            place: place.to_owned(),
            source,
        })
    }

    /// A simple query.
    pub(super) async fn query(&mut self, sql: &str) -> Result<()> {
        let place = self.place.clone();
        self.encode(&place, |buffer| frontend::query(sql, buffer))?;
        self.flush().await
    }
}

/// Connects and authenticates; the parameters that the server reported.
pub(super) async fn connect(
    info: &ConnInfo,
    mode: ConnectionMode,
) -> Result<(Reader, Writer, Vec<(String, String)>)> {
    let place = info.place();
    let failed = |source| Error::Connect {
        place: place.clone(),
        source,
    };
    let (host, port) = (info.host(), info.port()?);
    let (stream, sink): (
        Box<dyn AsyncRead + Send + Unpin>,
        Box<dyn AsyncWrite + Send + Unpin>,
    ) = if host.starts_with('/') {
        let path = format!("{host}/.s.PGSQL.{port}");
        let (read, write) = UnixStream::connect(path)
            .await
            .map_err(failed)?
            .into_split();
        (Box::new(read), Box::new(write))
    } else {
        let stream = TcpStream::connect((host, port)).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let (read, write) = stream.into_split();
        (Box::new(read), Box::new(write))
    };
    let mut reader = Reader {
        stream,
        buffer: BytesMut::new(),
        place: place.clone(),
    };
    let mut writer = Writer {
        stream: sink,
        buffer: BytesMut::new(),
        place,
    };
    let user = info.user();
    let mut parameters = vec![
        ("user", user.as_str()),
        ("application_name", info.application_name()),
        ("client_encoding", "UTF8"),
    ];
    parameters.push(match mode {
        ConnectionMode::Physical => ("replication", "true"),
        // An ordinary session: a walsender would count against max_wal_senders and show up as a second standby.
        ConnectionMode::Sql => ("database", info.dbname()),
    });
    let place = writer.place.clone();
    writer.encode(&place, |buffer| {
        frontend::startup_message(parameters, buffer)
    })?;
    writer.flush().await?;
    authenticate(&mut reader, &mut writer, info, &user).await?;
    let mut reported = Vec::new();
    loop {
        let message = reader.next().await?;
        match message.tag {
            b'S' => {
                let mut texts = message.body.split(|byte| *byte == 0);
                let mut text =
                    || String::from_utf8_lossy(texts.next().unwrap_or_default()).into_owned();
                reported.push((text(), text()));
            }
            b'E' => return Err(reader.refusal(&message.body)),
            b'Z' => return Ok((reader, writer, reported)),
            _ => {}
        }
    }
}

async fn authenticate(
    reader: &mut Reader,
    writer: &mut Writer,
    info: &ConnInfo,
    user: &str,
) -> Result<()> {
    let password = || {
        info.password().ok_or_else(|| Error::ConnInfo {
            problem: format!(
                "PostgreSQL at {} asks for a password for \"{user}\"; set PGPASSWORD or write it in the password file",
                info.place()
            ),
        })
    };
    let mut scram: Option<ScramSha256> = None;
    loop {
        let message = reader.answer().await?;
        if message.tag != b'R' {
            return Err(
                reader.unexpected(format!("'{}' while authenticating", message.tag as char))
            );
        }
        let mut body = message.body;
        if body.len() < 4 {
            return Err(reader.unexpected("a short authentication request".to_owned()));
        }
        let kind = body.get_u32();
        let place = writer.place.clone();
        let wrong = |source: std::io::Error| Error::Protocol {
            place: place.clone(),
            what: format!("a wrong SCRAM message: {source}; check the password"),
        };
        match kind {
            0 => return Ok(()),
            3 => {
                let password = password()?;
                writer.encode(&place, |buffer| {
                    frontend::password_message(password.as_bytes(), buffer)
                })?;
            }
            5 => {
                let salt = *body
                    .first_chunk::<4>()
                    .ok_or_else(|| reader.unexpected("a short salt".to_owned()))?;
                let hash = md5_hash(user.as_bytes(), password()?.as_bytes(), salt);
                writer.encode(&place, |buffer| {
                    frontend::password_message(hash.as_bytes(), buffer)
                })?;
            }
            10 => {
                let offered = body
                    .split(|byte| *byte == 0)
                    .any(|name| name == SCRAM_SHA_256.as_bytes());
                if !offered {
                    return Err(reader.unexpected("no authentication that is known".to_owned()));
                }
                let exchange =
                    ScramSha256::new(password()?.as_bytes(), ChannelBinding::unsupported());
                writer.encode(&place, |buffer| {
                    frontend::sasl_initial_response(SCRAM_SHA_256, exchange.message(), buffer)
                })?;
                scram = Some(exchange);
            }
            11 => {
                let exchange = scram
                    .as_mut()
                    .ok_or_else(|| reader.unexpected("SASL out of order".to_owned()))?;
                exchange.update(&body).map_err(wrong)?;
                writer.encode(&place, |buffer| {
                    frontend::sasl_response(exchange.message(), buffer)
                })?;
            }
            12 => {
                let exchange = scram
                    .as_mut()
                    .ok_or_else(|| reader.unexpected("SASL out of order".to_owned()))?;
                exchange.finish(&body).map_err(wrong)?;
                continue;
            }
            other => {
                return Err(reader.unexpected(format!(
                    "authentication method {other}, which is not supported"
                )));
            }
        }
        writer.flush().await?;
    }
}
