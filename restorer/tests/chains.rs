//! Random targets over chains of promotions: restored servers are archived again, under the same
//! cluster name or under a new one, and restored again. The plan, PostgreSQL's log and the rows
//! agree for each target.
//!
//! The long tier tests 200 targets. The seed is printed.

use std::path::{Path, PathBuf};

use testbed::restored::Restored;

use crate::support::{Archived, Chance, long, query, servers};

const NUMBERS: &str = "SELECT coalesce(string_agg(n::text, ' ' ORDER BY n), '') FROM rows";
const PROMOTE: &str = "--target-action=promote";

/// A committed row, and the moments around its commit.
#[derive(Clone, Debug)]
struct Entry {
    n: u32,
    xid: String,
    /// After its commit, and before the next one.
    time: String,
    lsn: String,
    /// True if the restore point that follows it is on the line.
    is_named: bool,
}

/// A timeline of one cluster name, with the rows of those that it descends from.
#[derive(Clone, Debug)]
struct Line {
    cluster: String,
    timeline: u32,
    entries: Vec<Entry>,
    /// The first entry that was committed after the oldest backup on the way to this timeline.
    reachable: usize,
}

impl Line {
    /// The rows after the first `count` entries.
    fn rows(&self, count: usize) -> String {
        let rows: Vec<String> = self.entries[..count]
            .iter()
            .map(|entry| entry.n.to_string())
            .collect();
        rows.join(" ")
    }
}

/// A target, and the number of a line's entries that it keeps.
struct Target {
    arguments: Vec<String>,
    kept: usize,
    /// False if the stop is before the restore point that follows the last entry.
    keeps_name: bool,
}

struct Chain {
    archived: Archived,
    bin: PathBuf,
    chance: Chance,
    lines: Vec<Line>,
    next: u32,
}

impl Chain {
    fn start(bin: &Path) -> Self {
        let chance = Chance::new();
        let mut archived = Archived::start(bin, "");
        archived.place.use_cluster("main");
        archived.sql("CREATE TABLE rows (n int)");
        Self {
            archived,
            bin: bin.to_owned(),
            chance,
            lines: Vec::new(),
            next: 1,
        }
    }

    /// Archives the server at `conninfo`, which has the rows of `line`, until it has some rows
    /// more.
    fn live(&mut self, conninfo: &str, mut line: Line, must_back_up: bool) {
        let count = 4 + self.chance.below(4);
        let mut backup_at: Vec<usize> = Vec::new();
        if must_back_up {
            backup_at.push(0);
        }
        if self.chance.below(2) == 0 {
            backup_at.push(self.chance.below(count));
        }
        for written in 0..count {
            if backup_at.contains(&written) {
                let place = &self.archived.place;
                place.back_up(conninfo, &[]).expect("a backup");
                line.reachable = line.reachable.min(line.entries.len());
            }
            let entry = self.write(conninfo);
            line.entries.push(entry);
        }
        self.archived.finish_at(conninfo);
        eprintln!(
            "{} {}: {} entries, reachable from {}",
            line.cluster,
            line.timeline,
            line.entries.len(),
            line.reachable
        );
        self.lines.push(line);
    }

    /// Writes the next number in one of several ways.
    fn write(&mut self, conninfo: &str) -> Entry {
        let n = self.next;
        self.next += 1;
        let insert = format!("INSERT INTO rows VALUES ({n}) RETURNING xmin::text");
        let garbage = "INSERT INTO rows VALUES (-1)";
        let xid = match self.chance.below(6) {
            0 => query(
                conninfo,
                &format!("BEGIN; {insert}; SAVEPOINT s; {garbage}; ROLLBACK TO s; COMMIT"),
            ),
            1 => {
                query(conninfo, &format!("BEGIN; {garbage}; ROLLBACK"));
                query(conninfo, &insert)
            }
            2 => {
                let prepare = format!("BEGIN; {insert}; PREPARE TRANSACTION 'n{n}'");
                let xid = query(conninfo, &prepare);
                query(conninfo, &format!("COMMIT PREPARED 'n{n}'"));
                xid
            }
            3 => {
                query(conninfo, "SELECT pg_switch_wal()");
                query(conninfo, &insert)
            }
            4 => {
                query(conninfo, &format!("CREATE TABLE t{n} AS SELECT 1 AS one"));
                query(conninfo, &format!("DROP TABLE t{n}"));
                query(conninfo, &insert)
            }
            _ => query(conninfo, &insert),
        };
        let lsn = query(conninfo, "SELECT pg_current_wal_insert_lsn()");
        let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', \
                   'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
        let time = query(conninfo, now);
        query(
            conninfo,
            &format!("SELECT pg_create_restore_point('after {n}')"),
        );
        query(conninfo, "SELECT pg_sleep(0.002)");
        Entry {
            n,
            xid,
            time,
            lsn,
            is_named: true,
        }
    }

    /// A random target on a line.
    fn target(&mut self, line: &Line) -> Target {
        let at = line.reachable + self.chance.below(line.entries.len() - line.reachable);
        let entry = &line.entries[at];
        let is_last = at + 1 == line.entries.len();
        let xid = format!("--target-xid={}", entry.xid);
        let (flags, kept) = match self.chance.below(6) {
            0 => (vec![xid], at + 1),
            1 => (vec![xid, "--target-exclusive".to_owned()], at),
            2 if entry.is_named => (vec![format!("--target-name=after {}", entry.n)], at + 1),
            3 => (vec![format!("--target-lsn={}", entry.lsn)], at + 1),
            4 => (Vec::new(), line.entries.len()),
            // After the last commit nothing proves the time.
            _ if is_last => (vec![xid], at + 1),
            _ => (vec![format!("--target-time={}", entry.time)], at + 1),
        };
        let mut arguments = vec![format!("--target-timeline={}", line.timeline)];
        arguments.extend(flags);
        let ends_at_commit =
            |flag: &String| flag.starts_with("--target-xid") || flag.starts_with("--target-lsn");
        let is_exclusive = arguments.iter().any(|flag| flag == "--target-exclusive");
        Target {
            keeps_name: is_exclusive || !arguments.iter().any(ends_at_commit),
            arguments,
            kept,
        }
    }

    /// Restores to a target, and compares the plan, PostgreSQL's log and the rows.
    fn prove(&mut self, line: &Line, target: &Target, action: &str) -> Restored {
        self.archived.place.use_cluster(&line.cluster);
        let mut arguments = target.arguments.clone();
        arguments.push(action.to_owned());
        let context = format!("{} {arguments:?}", line.cluster);
        let restored = Restored::start(&self.archived.place, &self.bin, &arguments)
            .unwrap_or_else(|error| panic!("{context}: {error:?}"));
        let stop = &restored.report["plan"]["stop"];
        let lsn = stop["lsn"].as_str().unwrap_or_default();
        let side = stop["stop"].as_str().unwrap_or_default();
        let planned = format!("{side} WAL location (LSN) \"{lsn}\"");
        assert_eq!(restored.stopped(), planned, "{context}");
        let rows = query(&restored.conninfo(), NUMBERS);
        assert_eq!(rows, line.rows(target.kept), "{context}");
        restored
    }

    /// Promotes a random target of a random line, and archives that server as `generation`.
    fn promote(&mut self, generation: usize, under_new_name: bool) {
        let at = self.chance.below(self.lines.len());
        let line = self.lines[at].clone();
        let target = self.target(&line);
        let restored = self.prove(&line, &target, PROMOTE);
        let conninfo = restored.conninfo();
        let file = query(&conninfo, "SELECT pg_walfile_name(pg_current_wal_lsn())");
        let timeline = u32::from_str_radix(&file[..8], 16).expect("a timeline");
        let taken = |one: &Line| one.cluster == line.cluster && one.timeline == timeline;
        assert!(
            !self.lines.iter().any(taken),
            "timeline {timeline} is taken"
        );
        let mut entries = line.entries[..target.kept].to_vec();
        if let Some(last) = entries.last_mut().filter(|_| !target.keeps_name) {
            last.is_named = false;
        }
        let new = if under_new_name {
            Line {
                cluster: format!("generation{generation}"),
                timeline,
                reachable: entries.len(),
                entries,
            }
        } else {
            Line {
                timeline,
                entries,
                ..line
            }
        };
        self.archived.place.use_cluster(&new.cluster);
        self.archived.follow(&conninfo);
        self.live(&conninfo, new, under_new_name);
    }
}

#[test]
fn every_target_of_a_chain_of_promotions_is_reached() {
    let servers = servers();
    let targets = if long() { 200 } else { 8 };
    for (major, bin) in &servers {
        eprintln!("PostgreSQL {major}");
        let mut chain = Chain::start(bin);
        let conninfo = chain.archived.cluster.conninfo();
        let first = Line {
            cluster: "main".to_owned(),
            timeline: 1,
            entries: Vec::new(),
            reachable: 0,
        };
        chain.live(&conninfo, first, true);
        // In the short tier one of each: promoted, archived again as itself and as another cluster.
        let names: &[bool] = if long() {
            &[false, false, true, false, true, false, false]
        } else {
            &[false, true]
        };
        for (generation, under_new_name) in names.iter().enumerate() {
            chain.promote(generation, *under_new_name);
        }
        for turn in 0..targets / servers.len() {
            let at = chain.chance.below(chain.lines.len());
            let line = chain.lines[at].clone();
            let target = chain.target(&line);
            let action = if turn % 4 == 0 {
                "--target-action=pause"
            } else {
                PROMOTE
            };
            drop(chain.prove(&line, &target, action));
        }
    }
}
