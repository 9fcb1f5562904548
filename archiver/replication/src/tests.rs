//! Tests with a scripted server at the other end of a pipe, which sends messages that a real server
//! never or very rarely sends.

use bytes::{BufMut, Bytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use wal_format::{Lsn, TimelineId};

use super::{
    BackupMessage, BaseBackupOptions, ConnInfo, ConnectionMode, Error, NextTimeline,
    ReplicationClient, ReplicationStart, Result,
    connect::{Attempt, request_tls},
    connection::halves,
    conninfo::{SslMode, TargetSession},
};

mod bytes_of_strangers;

const PIPE_BYTES: usize = 1 << 20;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![tag];
    message.put_u32(u32::try_from(body.len() + 4).expect("short"));
    message.extend(body);
    message
}

fn row(columns: &[Option<&str>]) -> Vec<u8> {
    let mut body = Vec::new();
    body.put_u16(u16::try_from(columns.len()).expect("few"));
    for column in columns {
        match column {
            None => body.put_i32(-1),
            Some(text) => {
                body.put_i32(i32::try_from(text.len()).expect("short"));
                body.put_slice(text.as_bytes());
            }
        }
    }
    message(b'D', &body)
}

fn error(code: &str, text: &str) -> Vec<u8> {
    let body = format!("SERROR\0VERROR\0C{code}\0M{text}\0\0");
    message(b'E', body.as_bytes())
}

fn auth(kind: u32, rest: &[u8]) -> Vec<u8> {
    message(b'R', &[&kind.to_be_bytes()[..], rest].concat())
}

fn parameter(name: &str, value: &str) -> Vec<u8> {
    message(b'S', format!("{name}\0{value}\0").as_bytes())
}

fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

/// The first messages of a server that requires no authentication.
fn welcome(version: &str) -> Vec<u8> {
    [auth(0, b""), parameter("server_version", version), ready()].concat()
}

fn conninfo(text: &str) -> ConnInfo {
    let text = format!("host=db user=me password=S3CRET {text}");
    ConnInfo::parse(&text).expect("it parses")
}

/// Connects to a server that sends this and then closes the connection, regardless of what it
/// receives.
async fn greet(
    said: &[u8],
    text: &str,
    target: TargetSession,
) -> (Result<ReplicationClient>, Vec<u8>) {
    let (ours, mut theirs) = duplex(PIPE_BYTES);
    theirs.write_all(said).await.expect("there is room");
    theirs.shutdown().await.expect("it closes");
    let info = conninfo(text);
    let attempt = Attempt {
        info: &info,
        mode: ConnectionMode::Physical,
        host: &info.hosts()[0],
        target,
    };
    let outcome = attempt.greet(ours, false).await;
    let outcome = outcome.map(|connection| {
        ReplicationClient::from_parts(
            connection.reader,
            connection.writer,
            connection.version,
            info.clone(),
        )
    });
    let mut heard = Vec::new();
    if outcome.is_err() {
        theirs.read_to_end(&mut heard).await.expect("it is closed");
    } else {
        // The server continues to read.
        tokio::spawn(
            async move { drop(tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await) },
        );
    }
    (outcome, heard)
}

/// A client of a server that sends this after its welcome.
async fn client(said: &[u8]) -> ReplicationClient {
    let all = [&welcome("17.2")[..], said].concat();
    let (outcome, _) = greet(&all, "", TargetSession::Any).await;
    outcome.expect("it is let in")
}

async fn refusal(said: &[u8], text: &str) -> (Error, Vec<u8>) {
    let (outcome, heard) = greet(said, text, TargetSession::Any).await;
    let refused = outcome.expect_err("it is refused");
    assert!(!refused.to_string().contains("S3CRET"), "{refused}");
    (refused, heard)
}

#[tokio::test]
async fn a_server_is_let_in_or_refused_by_its_version() {
    let (outcome, _) = greet(&welcome("14.1 (Debian)"), "", TargetSession::Any).await;
    assert_eq!(outcome.expect("it is let in").server_version().num, 140_001);
    for old in ["12.22", "9.6.24"] {
        let (refused, _) = refusal(&welcome(old), "").await;
        let text = refused.to_string();
        assert!(
            matches!(refused, Error::ServerTooOld { .. }) && text.contains(old),
            "{text}"
        );
        assert!(refused.is_usage());
    }
    let (refused, _) = refusal(&[auth(0, b""), ready()].concat(), "").await;
    assert!(refused.to_string().contains("server_version"), "{refused}");
}

#[tokio::test]
async fn authentication_out_of_order_is_refused() {
    let sasl = auth(10, b"SCRAM-SHA-256\0\0");
    for (said, expected) in [
        (
            [sasl.clone(), welcome("17.2")].concat(),
            "before SCRAM had proved",
        ),
        (auth(11, b"r=x"), "out of order"),
        (auth(12, b"v=x"), "out of order"),
        (
            [sasl.clone(), auth(12, b"v=x")].concat(),
            "check the password",
        ),
        ([sasl, auth(11, b"nonsense")].concat(), "check the password"),
        (
            auth(10, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"),
            "without TLS",
        ),
        (auth(10, b"OAUTHBEARER\0\0"), "SCRAM-SHA-256"),
        (auth(7, b""), "GSSAPI"),
        (auth(99, b""), "unknown"),
        (auth(5, b"ab"), "short salt"),
        (message(b'R', b"ab"), "short authentication"),
        (message(b'Z', b"I"), "'Z' while authenticating"),
        (Vec::new(), "closed the connection"),
    ] {
        let (refused, _) = refusal(&said, "").await;
        assert!(
            refused.to_string().contains(expected),
            "{expected}: {refused}"
        );
    }
}

#[tokio::test]
async fn nothing_secret_is_sent_to_a_server_that_asks_for_what_is_forbidden() {
    for (said, text) in [
        (auth(3, b""), "require_auth=scram-sha-256"),
        (auth(3, b""), "require_auth=!password"),
        (auth(5, b"salt"), "require_auth=scram-sha-256,none"),
        (auth(10, b"SCRAM-SHA-256\0\0"), "require_auth=md5"),
        (welcome("17.2"), "require_auth=scram-sha-256"),
        (auth(3, b""), "channel_binding=require"),
        (auth(10, b"SCRAM-SHA-256\0\0"), "channel_binding=require"),
        (welcome("17.2"), "channel_binding=require"),
    ] {
        let (refused, heard) = refusal(&said, text).await;
        assert!(matches!(refused, Error::Auth { .. }), "{text}: {refused}");
        // The startup message has no type byte, and no message with a type byte followed it.
        let startup = usize::from(heard[3]) + 256 * usize::from(heard[2]);
        assert_eq!(heard.len(), startup, "{text}");
    }
}

#[tokio::test]
async fn the_answer_to_the_request_for_tls_is_one_byte() {
    let answer = async |said: &[u8], mode| {
        let (mut ours, mut theirs) = duplex(64);
        theirs.write_all(said).await.expect("there is room");
        theirs.shutdown().await.expect("it closes");
        let outcome = request_tls(&mut ours, "db:5432", mode).await;
        let mut heard = [0; 8];
        theirs.read_exact(&mut heard).await.expect("a request");
        assert_eq!(heard, [0, 0, 0, 8, 4, 210, 22, 47]);
        outcome.map_err(|error| error.to_string())
    };
    assert_eq!(answer(b"S", SslMode::VerifyFull).await, Ok(true));
    assert_eq!(answer(b"N", SslMode::Prefer).await, Ok(false));
    for (said, mode, expected) in [
        (&b"N"[..], SslMode::Require, "does not support TLS"),
        (b"SR", SslMode::Prefer, "tampering"),
        (b"NR", SslMode::Prefer, "tampering"),
        (b"E\0\0\0\x0fMS3CRET\0\0", SslMode::Prefer, "error"),
        (b"HTTP/1.1 400", SslMode::Prefer, "is this its port"),
        (b"", SslMode::Prefer, "closed"),
    ] {
        let error = answer(said, mode).await.expect_err("it is refused");
        assert!(
            error.contains(expected) && !error.contains("S3CRET"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_server_that_is_not_what_was_asked_for_is_passed_over() {
    let says = |standby: &str, read_only: &str| {
        [
            auth(0, b""),
            parameter("server_version", "17.2"),
            parameter("in_hot_standby", standby),
            parameter("default_transaction_read_only", read_only),
            ready(),
        ]
        .concat()
    };
    use TargetSession::{Any, Primary, ReadOnly, ReadWrite, Standby};
    for (standby, read_only, fits) in [
        ("off", "off", vec![Any, ReadWrite, Primary]),
        ("off", "on", vec![Any, ReadOnly, Primary]),
        ("on", "off", vec![Any, ReadOnly, Standby]),
    ] {
        for target in [Any, ReadWrite, ReadOnly, Primary, Standby] {
            let (outcome, _) = greet(&says(standby, read_only), "", target).await;
            assert_eq!(
                outcome.is_ok(),
                fits.contains(&target),
                "{target:?} {standby} {read_only}"
            );
            if let Err(error) = outcome {
                assert!(error.concerns_one_host(), "{error}");
            }
        }
    }
    // Version 13 reports neither. A session that is read-only without a reason runs on a standby.
    let off = [row(&[Some("off")]), ready()].concat();
    let on = [row(&[Some("on")]), ready()].concat();
    let said = [welcome("13.9"), off, on].concat();
    let (outcome, _) = greet(&said, "", Standby).await;
    assert!(outcome.is_ok(), "{outcome:?}");
}

#[tokio::test]
async fn an_error_after_rows_is_an_error_and_the_next_command_works() {
    let said = [
        message(b'T', &[0, 0]),
        row(&[Some("1"), None]),
        error("57014", "canceled"),
        ready(),
        message(b'T', &[0, 0]),
        row(&[Some("2"), None]),
        message(b'C', b"SELECT 1\0"),
        ready(),
    ]
    .concat();
    let mut client = client(&said).await;
    let refused = client.query("SELECT").await.expect_err("it was canceled");
    assert!(refused.to_string().contains("57014"), "{refused}");
    let rows = client.query("SELECT").await.expect("the next one works");
    assert_eq!(rows, [[Some("2".to_owned()), None]]);
}

#[tokio::test]
async fn malformed_rows_are_refused() {
    for body in [
        &b""[..],
        b"\0",
        b"\0\x01",
        b"\0\x01\0\0\0\x05ab",
        b"\0\x01\xff\xff\xff\xfe",
        b"\0\0x",
    ] {
        let mut client = client(&[message(b'D', body), ready()].concat()).await;
        let refused = client.query("SELECT").await.expect_err("it is no row");
        assert!(
            matches!(refused, Error::Protocol { .. }),
            "{body:?}: {refused}"
        );
    }
    let mut client = client(&message(b'x', b"")).await;
    assert!(client.query("SELECT").await.is_err());
}

async fn start(said: &[u8]) -> Result<ReplicationStart> {
    let timeline = TimelineId::new(1).expect("a timeline");
    client(said)
        .await
        .start_replication(None, Lsn(0x500_0000), timeline)
        .await
}

#[tokio::test]
async fn a_start_at_the_switch_point_is_the_end_of_the_timeline() {
    let said = [
        message(b'T', &[0, 0]),
        row(&[Some("7"), Some("0/5000000")]),
        message(b'C', b"START_STREAMING\0"),
        message(b'C', b"START_REPLICATION\0"),
        ready(),
        row(&[Some("after")]),
        ready(),
    ]
    .concat();
    let Ok(ReplicationStart::EndOfTimeline(mut client, next)) = start(&said).await else {
        panic!("it is the end");
    };
    let expected = NextTimeline {
        timeline: TimelineId::new(7).expect("a timeline"),
        start_lsn: Lsn(0x500_0000),
    };
    assert_eq!(next, Some(expected));
    assert!(
        client.query("SHOW x").await.is_ok(),
        "the connection goes on"
    );
    for nonsense in [
        row(&[Some("0"), Some("0/1")]),
        row(&[Some("2")]),
        row(&[None, None]),
    ] {
        let said = [message(b'T', &[0, 0]), nonsense, ready()].concat();
        assert!(matches!(start(&said).await, Err(Error::Protocol { .. })));
    }
    assert!(matches!(
        start(&message(b'H', b"")).await,
        Err(Error::Protocol { .. })
    ));
    assert!(
        matches!(start(&error("55006", "is active for PID 7")).await, Err(error) if error.is_slot_in_use())
    );
}

#[tokio::test]
async fn a_backup_without_its_stop_position_is_no_backup() {
    let begin = [
        message(b'T', &[0, 0]),
        row(&[Some("0/2000028"), Some("1")]),
        message(b'C', b"SELECT\0"),
        message(b'T', &[0, 0]),
        row(&[None, None, Some("1")]),
        message(b'C', b"SELECT\0"),
        message(b'H', &[0, 0, 0]),
        message(b'd', b"nbase.tar\0\0"),
        message(b'd', b"dbytes"),
        message(b'd', b"m"),
        message(b'd', b"dmanifest"),
        message(b'c', b""),
        message(b'C', b"COPY\0"),
    ]
    .concat();
    let stop = [message(b'T', &[0, 0]), row(&[Some("0/2000100"), Some("1")])].concat();
    let run = async |rest: &[u8]| {
        let client = client(&[&begin[..], rest].concat()).await;
        let mut stream = client.base_backup(&BaseBackupOptions::default()).await?;
        loop {
            if stream.next().await? == BackupMessage::Done {
                return Ok(());
            }
        }
    };
    let whole = [&stop[..], &message(b'C', b"BASE_BACKUP\0"), &ready()].concat();
    run(&whole).await.expect("a whole one is done");
    let refused: Error = run(&ready()).await.expect_err("no stop");
    assert!(
        refused.to_string().contains("without a stop position"),
        "{refused}"
    );
    let checksums = [
        &stop[..],
        &error("XX001", "checksum verification failure"),
        &ready(),
    ]
    .concat();
    let refused: Error = run(&checksums).await.expect_err("after its stop");
    assert!(refused.to_string().contains("XX001"), "{refused}");
    let refused: Error = run(&stop).await.expect_err("the connection ends");
    assert!(refused.is_unreachable(), "{refused}");
}

#[tokio::test]
async fn a_stranger_can_not_fill_the_memory() {
    let (refused, _) = refusal(b"R\x3f\xff\xff\xff", "").await;
    assert!(refused.to_string().contains("a message of"), "{refused}");
    // Authenticated servers send long messages.
    let long = "x".repeat(200 << 10);
    let mut client = client(&[row(&[Some(&long)]), ready()].concat()).await;
    assert_eq!(
        client.query("SELECT").await.expect("it is taken")[0][0].as_deref(),
        Some(&*long)
    );
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime")
}

#[test]
fn what_a_server_says_stays_on_one_line_and_moves_no_cursor() {
    let (reader, _) = runtime().block_on(async {
        let (ours, _) = duplex(1);
        halves(ours, None, "db:5432")
    });
    let body = b"SERROR\0VERROR\0CXX000\0Mone\ntwo\x1b[2J\0Dthree\r\nfour\0\0";
    let shown = reader.refusal(body).to_string();
    assert!(
        shown.contains("one two [2J") && shown.contains("three  four"),
        "{shown}"
    );
    assert!(!shown.contains(char::is_control), "{shown:?}");
}

#[test]
fn remedies_are_told_for_what_administrators_meet() {
    let check = |code: &str, text: &str, exit: u8, remedy: &str| {
        let (mut reader, _) = runtime().block_on(async {
            let (ours, _) = duplex(1);
            halves(ours, None, "db:5432")
        });
        reader.trust();
        let body = Bytes::from(format!("SFATAL\0VFATAL\0C{code}\0M{text}\0\0"));
        let error = reader.refusal(&body);
        let shown = error.to_string();
        assert!(shown.contains(remedy) && shown.contains(text), "{shown}");
        assert!(!shown.contains('\n'), "one line: {shown}");
        assert_eq!(error.is_usage(), exit == 2, "{shown}");
    };
    check(
        "28P01",
        "password authentication failed",
        2,
        "check the password",
    );
    check(
        "28000",
        "no pg_hba.conf entry for replication connection",
        2,
        "pg_hba.conf needs a line",
    );
    check(
        "28000",
        "role \"x\" does not exist",
        2,
        "`CREATE ROLE \"x\" LOGIN REPLICATION`",
    );
    check(
        "28000",
        "role \"x\" is not permitted to log in",
        2,
        "`ALTER ROLE \"x\" LOGIN REPLICATION`",
    );
    check(
        "28000",
        "connection requires a valid client certificate",
        2,
        "sslcert",
    );
    check("3D000", "database \"x\" does not exist", 2, "dbname");
    check(
        "42501",
        "permission denied to start WAL sender",
        2,
        "REPLICATION attribute",
    );
    check(
        "42501",
        "could not open file \"./base/5/16400\": Permission denied",
        2,
        "give the user who runs PostgreSQL access",
    );
    check(
        "42704",
        "replication slot \"s\" does not exist",
        2,
        "creates it again",
    );
    check(
        "53300",
        "number of requested standby connections exceeds \"max_wal_senders\" (currently 0)",
        2,
        "wal_level = replica",
    );
    check(
        "53300",
        "die Anzahl angeforderter Standby-Verbindungen ist höher als max_wal_senders (aktuell 0)",
        2,
        "wal_level = replica",
    );
    check(
        "53300",
        "number of requested standby connections exceeds \"max_wal_senders\" (currently 10)",
        5,
        "raise max_wal_senders",
    );
    check(
        "53300",
        "sorry, too many clients already",
        5,
        "max_connections",
    );
    check(
        "53400",
        "all replication slots are in use",
        5,
        "max_replication_slots",
    );
    check(
        "55000",
        "cannot use a logical replication slot for physical replication",
        2,
        "another one as slot",
    );
    check(
        "55000",
        "replication slots can only be used if \"wal_level\" >= \"replica\"",
        2,
        "wal_level = replica",
    );
    check(
        "55006",
        "replication slot \"s\" is active for PID 7",
        5,
        "pg_terminate_backend",
    );
    check(
        "57P03",
        "the database system is starting up",
        5,
        "tried again",
    );
}
