//! Messages of PostgreSQL's protocol 3 from the server's side: client messages and the answers to
//! them.
//!
//! Invariant: a length announced by a client is checked against a bound before memory is allocated
//! for it.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The maximum size of a startup packet, which holds a few names (`MAX_STARTUP_PACKET_LENGTH`).
const STARTUP_BYTES_MAX: usize = 10_000;
/// The operations that a connection's byte stream must support.
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Socket for S {}

/// The maximum size of a client message. Commands and status updates are short.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

#[derive(Clone, Copy, Debug)]
pub(super) enum Type {
    Text,
    Int8,
}

impl Type {
    fn oid(self) -> (u32, i16) {
        match self {
            Self::Text => (25, -1),
            Self::Int8 => (20, 8),
        }
    }
}

#[derive(Debug)]
pub(super) struct Message {
    pub(super) tag: u8,
    pub(super) body: Bytes,
}

fn malformed(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem.to_owned())
}

/// Reads a packet without a tag. Returns its code and the rest.
pub(super) async fn read_startup(
    socket: &mut (impl AsyncRead + Unpin),
) -> io::Result<(u32, Bytes)> {
    let length = socket.read_u32().await? as usize;
    if !(8..=STARTUP_BYTES_MAX).contains(&length) {
        return Err(malformed("a start-up packet of an impossible length"));
    }
    let code = socket.read_u32().await?;
    let mut body = vec![0; length - 8];
    socket.read_exact(&mut body).await?;
    Ok((code, body.into()))
}

pub(super) async fn read_message(socket: &mut (impl AsyncRead + Unpin)) -> io::Result<Message> {
    let tag = socket.read_u8().await?;
    let length = socket.read_u32().await? as usize;
    if !(4..=MESSAGE_BYTES_MAX).contains(&length) {
        return Err(malformed("a message of an impossible length"));
    }
    let mut body = vec![0; length - 4];
    socket.read_exact(&mut body).await?;
    Ok(Message {
        tag,
        body: body.into(),
    })
}

/// Messages that are buffered for the client.
#[derive(Debug, Default)]
pub(super) struct Answer {
    buffer: BytesMut,
}

impl Answer {
    pub(super) fn message(&mut self, tag: u8, fill: impl FnOnce(&mut BytesMut)) -> &mut Self {
        self.buffer.put_u8(tag);
        let at = self.buffer.len();
        self.buffer.put_u32(0);
        fill(&mut self.buffer);
        let length = u32::try_from(self.buffer.len() - at).unwrap_or(u32::MAX);
        if let Some(field) = self.buffer.get_mut(at..at + 4) {
            field.copy_from_slice(&length.to_be_bytes());
        }
        self
    }

    pub(super) fn authentication(&mut self, kind: u32, data: &[u8]) -> &mut Self {
        self.message(b'R', |out| {
            out.put_u32(kind);
            out.put_slice(data);
        })
    }

    pub(super) fn parameter(&mut self, name: &str, value: &str) -> &mut Self {
        self.message(b'S', |out| {
            text(out, name);
            text(out, value);
        })
    }

    pub(super) fn ready(&mut self) -> &mut Self {
        self.message(b'Z', |out| out.put_u8(b'I'))
    }

    pub(super) fn complete(&mut self, command: &str) -> &mut Self {
        self.message(b'C', |out| text(out, command))
    }

    pub(super) fn columns(&mut self, columns: &[(&str, Type)]) -> &mut Self {
        self.message(b'T', |out| {
            out.put_u16(u16::try_from(columns.len()).unwrap_or(u16::MAX));
            for (name, kind) in columns {
                text(out, name);
                let (oid, size) = kind.oid();
                out.put_u32(0);
                out.put_u16(0);
                out.put_u32(oid);
                out.put_i16(size);
                out.put_i32(-1);
                out.put_u16(0);
            }
        })
    }

    pub(super) fn row(&mut self, values: &[Option<&[u8]>]) -> &mut Self {
        self.message(b'D', |out| {
            out.put_u16(u16::try_from(values.len()).unwrap_or(u16::MAX));
            for value in values {
                match value {
                    Some(value) => {
                        out.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
                        out.put_slice(value);
                    }
                    None => out.put_i32(-1),
                }
            }
        })
    }

    pub(super) fn error(&mut self, severity: &str, code: &str, message: &str) -> &mut Self {
        self.message(b'E', |out| {
            for (field, value) in [
                (b'S', severity),
                (b'V', severity),
                (b'C', code),
                (b'M', message),
            ] {
                out.put_u8(field);
                text(out, value);
            }
            out.put_u8(0);
        })
    }

    pub(super) async fn send(&mut self, socket: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        socket.write_all(&self.buffer).await?;
        self.buffer.clear();
        socket.flush().await
    }
}

fn text(out: &mut BytesMut, value: &str) {
    // A zero byte would terminate the text early and shift everything after it.
    out.extend(value.bytes().filter(|byte| *byte != 0));
    out.put_u8(0);
}
