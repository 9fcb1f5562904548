//! The part of the replication grammar that physical replication uses (`repl_gram.y`).
//!
//! Keywords are case-insensitive, names are bare or in double quotes. An unknown command is an
//! error for the client.

use wal_format::{Lsn, TimelineId};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    IdentifySystem,
    Show(String),
    TimelineHistory(TimelineId),
    StartReplication {
        start: Lsn,
        timeline: Option<TimelineId>,
    },
    /// Accepted and ignored: the archive keeps all WAL, so a slot has no effect.
    CreateSlot {
        name: String,
    },
    ReadSlot,
    DropSlot,
    /// An empty query.
    Empty,
}

/// Parses a command. Returns the reason if the text is not a valid command.
pub(super) fn parse(text: &str) -> Result<Command, String> {
    let text = text.trim().trim_end_matches(';').trim_end();
    let mut words = Words { rest: text };
    let Some(first) = words.next() else {
        return Ok(Command::Empty);
    };
    let unknown = || format!("the archive does not know the command \"{text}\"");
    Ok(match first.to_ascii_uppercase().as_str() {
        "IDENTIFY_SYSTEM" => Command::IdentifySystem,
        "SHOW" => Command::Show(words.name().ok_or_else(unknown)?),
        "TIMELINE_HISTORY" => Command::TimelineHistory(words.timeline().ok_or_else(unknown)?),
        "START_REPLICATION" => {
            let mut word = words.next().ok_or_else(unknown)?;
            if word.eq_ignore_ascii_case("SLOT") {
                words.name().ok_or_else(unknown)?;
                word = words.next().ok_or_else(unknown)?;
            }
            if word.eq_ignore_ascii_case("LOGICAL") {
                return Err(
                    "an archive of WAL decodes nothing: only physical replication".to_owned(),
                );
            }
            if word.eq_ignore_ascii_case("PHYSICAL") {
                word = words.next().ok_or_else(unknown)?;
            }
            let start = word.parse().map_err(|_| unknown())?;
            let timeline = match words.next() {
                Some(word) if word.eq_ignore_ascii_case("TIMELINE") => {
                    Some(words.timeline().ok_or_else(unknown)?)
                }
                Some(_) => return Err(unknown()),
                None => None,
            };
            Command::StartReplication { start, timeline }
        }
        "CREATE_REPLICATION_SLOT" => {
            let name = words.name().ok_or_else(unknown)?;
            let is_physical = std::iter::from_fn(|| words.next())
                .any(|word| word.eq_ignore_ascii_case("PHYSICAL"));
            if !is_physical {
                return Err("an archive of WAL has no logical slots".to_owned());
            }
            Command::CreateSlot { name }
        }
        "READ_REPLICATION_SLOT" => Command::ReadSlot,
        "DROP_REPLICATION_SLOT" => Command::DropSlot,
        _ => return Err(unknown()),
    })
}

struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn next(&mut self) -> Option<&'a str> {
        let rest = self.rest.trim_start();
        let end = match rest.strip_prefix('"') {
            Some(quoted) => quoted.find('"')? + 2,
            None => rest.find(char::is_whitespace).unwrap_or(rest.len()),
        };
        let (word, rest) = rest.split_at_checked(end)?;
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }

    fn name(&mut self) -> Option<String> {
        Some(self.next()?.trim_matches('"').to_owned())
    }

    fn timeline(&mut self) -> Option<TimelineId> {
        TimelineId::new(self.next()?.parse().ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stock_clients_send_is_understood() {
        let timeline = |number| TimelineId::new(number).expect("a timeline");
        let start = Lsn(0x3_0000_0000);
        for (text, command) in [
            ("IDENTIFY_SYSTEM", Command::IdentifySystem),
            (
                "SHOW wal_segment_size",
                Command::Show("wal_segment_size".to_owned()),
            ),
            ("TIMELINE_HISTORY 3", Command::TimelineHistory(timeline(3))),
            (
                "START_REPLICATION 3/0 TIMELINE 2",
                Command::StartReplication {
                    start,
                    timeline: Some(timeline(2)),
                },
            ),
            (
                "start_replication slot \"a b\" physical 3/0;",
                Command::StartReplication {
                    start,
                    timeline: None,
                },
            ),
            (
                "CREATE_REPLICATION_SLOT \"pg_walreceiver_7\" TEMPORARY PHYSICAL RESERVE_WAL",
                Command::CreateSlot {
                    name: "pg_walreceiver_7".to_owned(),
                },
            ),
            (" ; ", Command::Empty),
        ] {
            assert_eq!(parse(text), Ok(command), "{text}");
        }
        for text in [
            "SELECT 1",
            "START_REPLICATION",
            "START_REPLICATION SLOT x LOGICAL 0/0",
            "START_REPLICATION nowhere",
            "START_REPLICATION 0/0 TIMELINE 0",
            "START_REPLICATION SLOT \"open 0/0",
            "CREATE_REPLICATION_SLOT x LOGICAL y",
            "TIMELINE_HISTORY",
            "BASE_BACKUP",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
