//! An authenticated connection: answers or refuses one simple query after the other.
//!
//! Invariant: an error answers only its own command. The connection continues, as PostgreSQL's
//! does.

use std::io;

use tokio::io::BufReader;
use wal_format::SegmentSize;

use super::{
    Shared,
    command::{self, Command},
    refusal::Refusal,
    source::Source,
    stream,
    wire::{Answer, Socket, Type, read_message},
};

pub(super) async fn serve(socket: impl Socket, shared: &Shared) -> io::Result<()> {
    let (reader, mut writer) = tokio::io::split(socket);
    let mut reader = BufReader::new(reader);
    let mut answer = Answer::default();
    loop {
        let message = read_message(&mut reader).await?;
        let text = match message.tag {
            b'Q' => message.body.strip_suffix(b"\0").unwrap_or(&message.body),
            b'X' => return Ok(()),
            // Messages of a stream that has ended already.
            b'd' | b'c' | b'f' => continue,
            _ => {
                answer.error(
                    "FATAL",
                    "08P01",
                    "only simple queries are understood by a walsender",
                );
                answer.send(&mut writer).await?;
                return Ok(());
            }
        };
        let text = String::from_utf8_lossy(text).into_owned();
        let outcome = match command::parse(&text) {
            Err(problem) => Err(Refusal::new("42601", problem)),
            Ok(Command::StartReplication { start, timeline }) => {
                stream::run(
                    &mut reader,
                    &mut writer,
                    shared,
                    &mut answer,
                    start,
                    timeline,
                )
                .await?
            }
            Ok(command) => reply(shared, &command, &mut answer).await,
        };
        if let Err(refusal) = outcome {
            answer.error("ERROR", refusal.code, &refusal.words);
        }
        answer.ready();
        answer.send(&mut writer).await?;
    }
}

async fn reply(shared: &Shared, command: &Command, answer: &mut Answer) -> Result<(), Refusal> {
    match command {
        Command::Empty => {
            answer.message(b'I', |_| {});
        }
        Command::IdentifySystem => {
            let source = Source::open(shared).await?;
            let (timeline, end) = (source.timeline().to_string(), source.end().to_string());
            answer.columns(&[
                ("systemid", Type::Text),
                ("timeline", Type::Int8),
                ("xlogpos", Type::Text),
                ("dbname", Type::Text),
            ]);
            answer.row(&[
                Some(source.system().to_string().as_bytes()),
                Some(timeline.as_bytes()),
                Some(end.as_bytes()),
                None,
            ]);
            answer.complete("IDENTIFY_SYSTEM");
        }
        Command::Show(name) => {
            let value = show(shared, name).await?;
            answer.columns(&[(name, Type::Text)]);
            answer.row(&[Some(value.as_bytes())]);
            answer.complete("SHOW");
        }
        Command::TimelineHistory(timeline) => {
            let content = Source::open(shared)
                .await?
                .history(shared, *timeline)
                .await?;
            let name = wal_format::layout::history_file_name(*timeline);
            answer.columns(&[("filename", Type::Text), ("content", Type::Text)]);
            answer.row(&[Some(name.as_bytes()), Some(&content)]);
            answer.complete("TIMELINE_HISTORY");
        }
        Command::CreateSlot { name } => {
            answer.columns(&[
                ("slot_name", Type::Text),
                ("consistent_point", Type::Text),
                ("snapshot_name", Type::Text),
                ("output_plugin", Type::Text),
            ]);
            answer.row(&[Some(name.as_bytes()), Some(b"0/0"), None, None]);
            answer.complete("CREATE_REPLICATION_SLOT");
        }
        Command::ReadSlot => {
            answer.columns(&[
                ("slot_type", Type::Text),
                ("restart_lsn", Type::Text),
                ("restart_tli", Type::Int8),
            ]);
            answer.row(&[Some(b"physical"), None, None]);
            answer.complete("READ_REPLICATION_SLOT");
        }
        Command::DropSlot => {
            answer.complete("DROP_REPLICATION_SLOT");
        }
        Command::StartReplication { .. } => {}
    }
    Ok(())
}

async fn show(shared: &Shared, name: &str) -> Result<String, Refusal> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "wal_segment_size" => size_text(Source::open(shared).await?.segment_size()),
        "data_directory_mode" => "0700".to_owned(),
        "integer_datetimes" | "in_hot_standby" | "transaction_read_only" => "on".to_owned(),
        "wal_level" => "replica".to_owned(),
        "server_version" => {
            let version = shared.status.facts().server_version;
            version.unwrap_or_else(|| "unknown".to_owned())
        }
        _ => {
            let words = format!("unrecognized configuration parameter \"{name}\"");
            return Err(Refusal::new("42704", words));
        }
    })
}

/// Formats a size as PostgreSQL formats a setting with the unit MB or GB.
fn size_text(size: SegmentSize) -> String {
    let megabytes = size.bytes() >> 20;
    if megabytes.is_multiple_of(1024) {
        format!("{}GB", megabytes >> 10)
    } else {
        format!("{megabytes}MB")
    }
}
