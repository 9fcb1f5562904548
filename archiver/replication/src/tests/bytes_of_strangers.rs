//! Random bytes in pieces of random size give the same messages and never a panic.

use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use wal_format::{Lsn, TimelineId};

use super::{
    super::{
        BackupMessage, BaseBackupOptions, ConnectionMode, ReplicationClient, ReplicationStart,
        ServerVersion, StreamMessage, connect::Attempt, connection::halves,
        conninfo::TargetSession,
    },
    PIPE_BYTES, conninfo, greet, message, runtime, welcome,
};

/// Returns all messages of a stream that arrives in pieces of at most `piece` bytes, and the error
/// that ends it.
async fn heard(said: Vec<u8>, piece: usize) -> (Vec<StreamMessage>, String) {
    let (ours, theirs) = duplex(piece);
    let mut said_all = message(b'W', &[0, 0, 0]);
    said_all.extend(said);
    let (mut discard, mut sink) = tokio::io::split(theirs);
    let server = tokio::spawn(async move {
        drop(sink.write_all(&said_all).await);
        drop(sink.shutdown().await);
    });
    let commands = tokio::spawn(async move {
        drop(tokio::io::copy(&mut discard, &mut tokio::io::sink()).await);
    });
    let outcome = stream_of(ours).await;
    server.abort();
    commands.abort();
    outcome
}

async fn stream_of(ours: DuplexStream) -> (Vec<StreamMessage>, String) {
    let (mut reader, writer) = halves(ours, None, "db:5432");
    reader.trust();
    let version = ServerVersion::of_parameter("17.2");
    let client = ReplicationClient::from_parts(reader, writer, version, conninfo(""));
    let timeline = TimelineId::new(1).expect("a timeline");
    let mut messages = Vec::new();
    let started = client
        .start_replication(None, Lsn(0x100_0000), timeline)
        .await;
    let mut receiver = match started {
        Ok(ReplicationStart::Streaming(receiver, _)) => receiver,
        Ok(ReplicationStart::EndOfTimeline(..)) => return (messages, "end".to_owned()),
        Err(error) => return (messages, error.to_string()),
    };
    loop {
        match receiver.next().await {
            Ok(message) => messages.push(message),
            Err(error) => return (messages, error.to_string()),
        }
    }
}

fn server_message() -> impl Strategy<Value = Vec<u8>> {
    let bytes = proptest::collection::vec(any::<u8>(), 0..80);
    prop_oneof![
        bytes.clone().prop_map(|data| {
            let mut body = vec![b'w'];
            body.extend([0; 24]);
            body.extend(data);
            message(b'd', &body)
        }),
        any::<[u8; 17]>().prop_map(|rest| message(b'd', &[&b"k"[..], &rest].concat())),
        bytes.clone().prop_map(|body| message(b'N', &body)),
        (any::<u8>(), bytes.clone()).prop_map(|(tag, body)| message(tag, &body)),
        bytes,
    ]
}

proptest! {
    #[test]
    fn messages_are_the_same_in_whatever_pieces_they_come(
        said in proptest::collection::vec(server_message(), 0..12),
        piece in 1_usize..40,
    ) {
        let said = said.concat();
        let (whole, pieces) = runtime().block_on(async {
            (heard(said.clone(), PIPE_BYTES).await, heard(said, piece).await)
        });
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn no_bytes_of_a_server_make_us_panic(
        said in proptest::collection::vec(server_message(), 0..8),
        welcomed in any::<bool>(),
        encrypted in any::<bool>(),
    ) {
        let mut all = if welcomed { welcome("17.2") } else { Vec::new() };
        all.extend(said.concat());
        runtime().block_on(async {
            if encrypted {
                let (ours, mut theirs) = duplex(PIPE_BYTES);
                theirs.write_all(&all).await.expect("there is room");
                drop(theirs);
                let info = conninfo("");
                let attempt = Attempt {
                    info: &info,
                    mode: ConnectionMode::Physical,
                    host: &info.hosts()[0],
                    target: TargetSession::Any,
                };
                assert!(attempt.greet(ours, true).await.is_err());
                return;
            }
            let (outcome, _) = greet(&all, "", TargetSession::Any).await;
            let Ok(client) = outcome else { return };
            let Ok(mut stream) = client.base_backup(&BaseBackupOptions::default()).await else {
                return;
            };
            while let Ok(message) = stream.next().await {
                if message == BackupMessage::Done {
                    break;
                }
            }
        });
    }
}
