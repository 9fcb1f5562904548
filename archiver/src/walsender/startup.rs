//! The start of a connection: TLS if it is configured, the startup packet, the password, the
//! parameters.
//!
//! Invariant: nothing about the cluster is revealed before the password has been verified.

use std::{collections::BTreeMap, io, time::Duration};

use bytes::Bytes;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use super::{
    Shared, scram, session,
    wire::{Answer, Socket, read_message, read_startup},
};

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
/// Corresponds to PostgreSQL's `authentication_timeout`.
const STARTUP_MAX: Duration = Duration::from_secs(60);

/// The parameters of a startup packet.
struct Client {
    user: String,
    application: String,
    is_replication: bool,
}

pub(super) async fn serve(
    mut socket: TcpStream,
    shared: &Shared,
    has_room: bool,
    peer: &str,
) -> io::Result<()> {
    let (code, body) = loop {
        let (code, body) = in_time(read_startup(&mut socket)).await?;
        match code {
            CANCEL_REQUEST => return Ok(()),
            GSSENC_REQUEST => socket.write_all(b"N").await?,
            SSL_REQUEST => match &shared.tls {
                Some(acceptor) => {
                    socket.write_all(b"S").await?;
                    let mut socket = in_time(acceptor.accept(socket)).await?;
                    let (code, body) = in_time(read_startup(&mut socket)).await?;
                    return begin(socket, shared, code, &body, has_room, peer).await;
                }
                None => socket.write_all(b"N").await?,
            },
            _ => break (code, body),
        }
    };
    if shared.tls.is_some() && shared.settings.requires_tls() {
        let words =
            "this archive speaks to other hosts over TLS only; use sslmode=require or better";
        return refuse(&mut socket, "28000", words).await;
    }
    begin(socket, shared, code, &body, has_room, peer).await
}

async fn begin(
    mut socket: impl Socket,
    shared: &Shared,
    code: u32,
    body: &Bytes,
    has_room: bool,
    peer: &str,
) -> io::Result<()> {
    if code >> 16 != 3 {
        return refuse(&mut socket, "0A000", "only protocol 3 is spoken").await;
    }
    if !has_room {
        return refuse(&mut socket, "53300", "too many standbys at once").await;
    }
    let Some(client) = client(body) else {
        return refuse(&mut socket, "08P01", "the start-up packet is malformed").await;
    };
    let mut answer = Answer::default();
    if code & 0xffff != 0 {
        // Newer minor protocol versions are negotiated down to 3.0.
        answer.message(b'v', |out| out.extend_from_slice(&[0, 3, 0, 0, 0, 0, 0, 0]));
    }
    if let Some(verifier) = &shared.verifier {
        let proved = in_time(prove(&mut socket, verifier, &mut answer)).await?;
        if !proved || client.user != shared.settings.user {
            tracing::warn!(
                cluster = shared.cluster,
                peer,
                "a standby's password was refused"
            );
            let words = format!(
                "password authentication failed for user \"{}\"",
                client.user
            );
            return refuse(&mut socket, "28P01", &words).await;
        }
    }
    if !client.is_replication {
        let words = "this is an archive and no database: it only streams WAL (replication=true)";
        return refuse(&mut socket, "0A000", words).await;
    }
    answer.authentication(0, b"");
    let facts = shared.status.facts();
    let version = facts
        .server_version
        .or_else(|| {
            let archive = shared.archive.get()?;
            Some(format!("{}.0", archive.identity().version.major()))
        })
        .unwrap_or_else(|| "13.0".to_owned());
    for (name, value) in [
        ("server_version", version.as_str()),
        ("server_encoding", "UTF8"),
        ("client_encoding", "UTF8"),
        ("integer_datetimes", "on"),
        ("standard_conforming_strings", "on"),
        ("DateStyle", "ISO"),
        ("TimeZone", "UTC"),
        ("application_name", client.application.as_str()),
    ] {
        answer.parameter(name, value);
    }
    answer.message(b'K', |out| out.extend_from_slice(&[0; 8]));
    answer.ready();
    answer.send(&mut socket).await?;
    tracing::info!(
        cluster = shared.cluster,
        peer,
        application = client.application,
        "a standby is connected"
    );
    session::serve(socket, shared).await
}

/// Runs the SASL exchange. Returns whether the client knows the password.
async fn prove(
    socket: &mut impl Socket,
    verifier: &scram::Verifier,
    answer: &mut Answer,
) -> io::Result<bool> {
    let mechanisms = format!("{}\0\0", scram::MECHANISM);
    answer.authentication(10, mechanisms.as_bytes());
    answer.send(socket).await?;
    let message = read_message(socket).await?;
    // The mechanism's name, a length, the client's first message.
    let first = message
        .body
        .strip_prefix(scram::MECHANISM.as_bytes())
        .and_then(|rest| rest.strip_prefix(b"\0"))
        .and_then(|rest| rest.get(4..))
        .and_then(|first| std::str::from_utf8(first).ok());
    let begun = first.and_then(|first| verifier.begin(first));
    let Some((exchange, words)) = begun.filter(|_| message.tag == b'p') else {
        return Ok(false);
    };
    answer.authentication(11, words.as_bytes());
    answer.send(socket).await?;
    let message = read_message(socket).await?;
    let last = std::str::from_utf8(&message.body).ok();
    let proof = last.and_then(|last| verifier.finish(&exchange, last));
    let Some(proof) = proof.filter(|_| message.tag == b'p') else {
        return Ok(false);
    };
    answer.authentication(12, proof.as_bytes());
    Ok(true)
}

async fn refuse(socket: &mut impl Socket, code: &str, words: &str) -> io::Result<()> {
    Answer::default()
        .error("FATAL", code, words)
        .send(socket)
        .await?;
    Err(io::Error::other(words.to_owned()))
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(STARTUP_MAX, work)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Parses names and values, each terminated by a zero byte, with one more zero byte at the end.
fn client(body: &[u8]) -> Option<Client> {
    let text = std::str::from_utf8(body).ok()?.strip_suffix("\0\0")?;
    let mut words = text.split('\0');
    let mut given = BTreeMap::new();
    while let (Some(name), Some(value)) = (words.next(), words.next()) {
        given.insert(name, value);
    }
    Some(Client {
        user: (*given.get("user")?).to_owned(),
        application: (*given.get("application_name").unwrap_or(&"")).to_owned(),
        // `replication=database` is for SQL and logical decoding, which the archive does not offer.
        is_replication: given
            .get("replication")
            .is_some_and(|value| matches!(*value, "true" | "on" | "yes" | "1" | "t")),
    })
}
