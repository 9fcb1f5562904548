//! Every kind of target: the plan, PostgreSQL's log and the restored rows must all agree with
//! PostgreSQL's own `pg_waldump` of the primary's WAL, where commits raced and their times are not
//! in WAL order.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use postgres::Client;
use serde_json::Value;
use testbed::{
    restored::Restored,
    waldump::{Kind, TransactionRecord, records, transaction_ends},
    workload::{Begun, Mix},
};
use wal_format::{Lsn, PgTimestamp};

use crate::support::{Archived, Chance, long, said, servers};

/// The number of commits that must have an earlier time than a predecessor.
const INVERSIONS_MIN: usize = 3;
/// Opens the restored server for writing.
const PROMOTE: &str = "--target-action=promote";
/// The maximum duration of the load until there are enough such commits.
const LOAD_MAX: Duration = Duration::from_secs(40);

/// The point where recovery must stop, according to the oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Before(Lsn),
    After(Lsn),
}

impl Stop {
    fn replays(self, lsn: Lsn) -> bool {
        match self {
            Self::Before(stop) => lsn < stop,
            Self::After(stop) => lsn <= stop,
        }
    }

    /// The plan's notation.
    fn json(self) -> Value {
        match self {
            Self::Before(lsn) => serde_json::json!({"stop": "before", "lsn": lsn.to_string()}),
            Self::After(lsn) => serde_json::json!({"stop": "after", "lsn": lsn.to_string()}),
        }
    }

    /// The notation in PostgreSQL's log.
    fn logged(self) -> String {
        match self {
            Self::Before(lsn) => format!("before WAL location (LSN) \"{lsn}\""),
            Self::After(lsn) => format!("after WAL location (LSN) \"{lsn}\""),
        }
    }
}

struct Scene {
    archived: Archived,
    bin: std::path::PathBuf,
    begun: BTreeMap<u32, Begun>,
    /// Every transaction record since before the backup.
    all: Vec<TransactionRecord>,
    /// The LSN where redo starts, and the LSN where the backup is consistent.
    start_lsn: Lsn,
    stop_lsn: Lsn,
    end_lsn: Lsn,
}

impl Scene {
    fn make(bin: &Path) -> Self {
        // With tiny WAL buffers, commits that have already taken their time wait for their place in
        // the WAL.
        let mut archived = Archived::start(bin, "synchronous_commit = off\nwal_buffers = 64kB\n");
        let origin = archived.end_lsn();
        let conninfo = archived.cluster.conninfo();
        let mix = Mix::start(&conninfo, 16).expect("clients");
        sleep(Duration::from_millis(500));
        archived.sql(
            "BEGIN; INSERT INTO done VALUES (0, 9); PREPARE TRANSACTION 'older than the backup'",
        );
        archived.sql("CHECKPOINT");
        archived.backup();
        archived.sql("SELECT pg_create_restore_point('here')");
        let began = Instant::now();
        let all = loop {
            sleep(Duration::from_secs(2));
            let so_far = archived.end_lsn();
            let all = transaction_ends(&archived.cluster, origin, so_far).expect("pg_waldump");
            if inverted(&all).len() >= INVERSIONS_MIN || began.elapsed() > LOAD_MAX {
                break all;
            }
        };
        assert!(
            inverted(&all).len() >= INVERSIONS_MIN,
            "{} records and no race: this load tests nothing",
            all.len()
        );
        archived.sql("SELECT pg_create_restore_point('here')");
        sleep(Duration::from_millis(300));
        let begun = mix.finish().expect("the clients worked");
        let end_lsn = archived.finish();
        let all = transaction_ends(&archived.cluster, origin, end_lsn).expect("pg_waldump");
        let listing = archived.listing();
        let lsn = |name: &str| {
            let text = listing["backups"][0][name].as_str();
            text.and_then(|text| text.parse().ok()).expect("an LSN")
        };
        Self {
            start_lsn: lsn("start_lsn"),
            stop_lsn: lsn("stop_lsn"),
            bin: bin.to_owned(),
            begun: begun.into_iter().map(|one| (one.xid, one)).collect(),
            archived,
            all,
            end_lsn,
        }
    }

    /// Returns the ends at which a recovery from the backup may stop.
    fn ends(&self) -> Vec<&TransactionRecord> {
        let behind =
            |record: &&TransactionRecord| record.kind.is_end() && record.lsn >= self.start_lsn;
        self.all.iter().filter(behind).collect()
    }

    /// PostgreSQL's `recoveryStopsBefore` for a time.
    fn stop_of_time(&self, time: PgTimestamp, inclusive: bool) -> Option<Stop> {
        let ends = self.ends();
        let later = |end: &&&TransactionRecord| end.time > time || (!inclusive && end.time == time);
        ends.iter().find(later).map(|end| Stop::Before(end.lsn))
    }

    fn restore(&self, arguments: &[&str]) -> Restored {
        Restored::start(&self.archived.place, &self.bin, arguments)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error:?}"))
    }

    /// Restores and checks that plan, PostgreSQL and content agree with the oracle.
    fn prove(&self, arguments: &[&str], expected: Stop) -> Value {
        let restored = self.restore(arguments);
        let plan = restored.report["plan"].clone();
        assert_eq!(plan["stop"], expected.json(), "{arguments:?}");
        assert_eq!(restored.stopped(), expected.logged(), "{arguments:?}");
        let mut client = restored.connect().expect("the restored server answers");
        let context = format!("{arguments:?}, {expected:?}");
        assert_eq!(
            rows(&mut client),
            self.committed(expected),
            "transactions, {context}"
        );
        let in_doubt = self.in_doubt(expected);
        let planned = plan["in_doubt"].as_array().expect("a list").iter();
        let planned: BTreeSet<(u32, String)> = planned
            .map(|one| {
                let xid = one["xid"].as_u64().and_then(|xid| xid.try_into().ok());
                let gid = one["gid"].as_str().expect("its PREPARE is archived");
                (xid.expect("an xid"), gid.to_owned())
            })
            .collect();
        assert_eq!(planned, in_doubt, "transactions in doubt, {context}");
        // A server in recovery does not show them.
        if arguments.contains(&PROMOTE) {
            assert_eq!(prepared(&mut client), in_doubt, "prepared, {context}");
        }
        plan
    }

    /// Returns the client transactions whose commit is replayed.
    fn committed(&self, stop: Stop) -> BTreeSet<u32> {
        let kept = |record: &&TransactionRecord| {
            record.kind.is_commit()
                && stop.replays(record.lsn)
                && self.begun.contains_key(&record.xid)
        };
        self.all
            .iter()
            .filter(kept)
            .map(|record| record.xid)
            .collect()
    }

    /// Returns the prepared transactions that did not end before the stop.
    fn in_doubt(&self, stop: Stop) -> BTreeSet<(u32, String)> {
        let mut open = BTreeMap::new();
        for record in self.all.iter().filter(|record| stop.replays(record.lsn)) {
            match (&record.gid, record.kind) {
                (Some(gid), _) => {
                    open.insert(record.xid, gid.clone());
                }
                (None, Kind::CommitPrepared | Kind::AbortPrepared) => {
                    open.remove(&record.xid);
                }
                _ => {}
            }
        }
        open.into_iter().collect()
    }
}

fn rows(client: &mut Client) -> BTreeSet<u32> {
    let rows = client.query("SELECT DISTINCT xid FROM done WHERE part = 0", &[]);
    let xid = |row: &postgres::Row| u32::try_from(row.get::<_, i64>(0)).expect("an xid");
    rows.expect("table done").iter().map(xid).collect()
}

fn prepared(client: &mut Client) -> BTreeSet<(u32, String)> {
    let rows = client.query(
        "SELECT transaction::text::bigint, gid FROM pg_prepared_xacts",
        &[],
    );
    let one = |row: &postgres::Row| {
        let xid = u32::try_from(row.get::<_, i64>(0)).expect("an xid");
        (xid, row.get(1))
    };
    rows.expect("pg_prepared_xacts").iter().map(one).collect()
}

/// Returns the ends with an earlier time than an end that precedes them in the WAL.
fn inverted(all: &[TransactionRecord]) -> Vec<&TransactionRecord> {
    let mut greatest = PgTimestamp(i64::MIN);
    let mut found = Vec::new();
    for record in all.iter().filter(|record| record.kind.is_end()) {
        if record.time < greatest {
            found.push(record);
        }
        greatest = greatest.max(record.time);
    }
    found
}

fn moved(time: PgTimestamp, microseconds: i64) -> PgTimestamp {
    PgTimestamp(time.0 + microseconds)
}

#[test]
fn postgresql_stops_where_the_plan_says() {
    for (major, bin) in servers() {
        eprintln!("PostgreSQL {major}");
        let scene = Scene::make(&bin);
        the_ledger_agrees_with_the_wal(&scene);
        times(&scene);
        positions(&scene);
        transactions_and_names(&scene);
        the_end_and_consistency(&scene);
    }
}

/// Checks the oracle itself: `pg_waldump` agrees with what clients and the server remember of
/// commits.
fn the_ledger_agrees_with_the_wal(scene: &Scene) {
    let commits: BTreeMap<u32, PgTimestamp> = scene
        .all
        .iter()
        .filter(|record| record.kind.is_commit())
        .map(|record| (record.xid, record.time))
        .collect();
    for one in scene.begun.values() {
        assert_eq!(commits.contains_key(&one.xid), one.committed, "{one:?}");
    }
    let mut client = scene.archived.cluster.connect().expect("the primary");
    let rows = client.query(
        "SELECT x::text, (extract(epoch FROM pg_xact_commit_timestamp(x::text::xid)) * 1000000)::bigint - 946684800000000 \
         FROM (SELECT DISTINCT xid AS x FROM done WHERE part = 0 AND xid > 0) AS every",
        &[],
    );
    let rows = rows.expect("commit timestamps");
    assert!(rows.len() > 100, "{} transactions only", rows.len());
    for row in rows {
        let xid: u32 = row.get::<_, &str>(0).parse().expect("an xid");
        let time = PgTimestamp(row.get(1));
        assert_eq!(commits.get(&xid), Some(&time), "transaction {xid}");
    }
}

fn times(scene: &Scene) {
    let mut chance = Chance::new();
    let behind: Vec<&TransactionRecord> = scene
        .ends()
        .into_iter()
        .filter(|end| end.lsn >= scene.stop_lsn)
        .collect();
    let races: Vec<&TransactionRecord> = inverted(&scene.all)
        .into_iter()
        .filter(|end| end.lsn >= scene.stop_lsn)
        .collect();
    eprintln!(
        "{} transaction records, {} ends behind the backup, {} of them out of order",
        scene.all.len(),
        behind.len(),
        races.len()
    );
    let (mut tested, mut late) = (0, 0);
    let wanted = if long() { 50 } else { 8 };
    while tested < wanted {
        let race = tested % 2 == 0 && !races.is_empty();
        let end = if race {
            races[chance.below(races.len())]
        } else {
            behind[chance.below(behind.len())]
        };
        let between = i64::try_from(chance.below(2000)).expect("small");
        let time = moved(end.time, [0, -1, 1, 0, between][chance.below(5)]);
        let inclusive = chance.below(2) == 0;
        // A backup is not consistent before its end. Targets after the last end are covered by
        // another test.
        let Some(Stop::Before(lsn)) = scene.stop_of_time(time, inclusive) else {
            continue;
        };
        if lsn < scene.stop_lsn {
            continue;
        }
        let time_argument = format!("--target-time={time}");
        let mut arguments = vec![time_argument.as_str()];
        if !inclusive {
            arguments.push("--target-exclusive");
        }
        if tested % 4 < 2 {
            arguments.push(PROMOTE);
        }
        let plan = scene.prove(&arguments, Stop::Before(lsn));
        let in_time = |end: &&&TransactionRecord| {
            let stops = end.time > time || (!inclusive && end.time == time);
            end.lsn > lsn && end.kind.is_commit() && !stops
        };
        let lost = behind.iter().filter(in_time).count();
        assert_eq!(plan["late_commit_count"], lost, "{arguments:?}");
        late += lost;
        tested += 1;
    }
    eprintln!("{tested} times, {late} commits in time but behind the stop");
}

fn positions(scene: &Scene) {
    let starts = records(&scene.archived.cluster, scene.stop_lsn, scene.end_lsn);
    let starts = starts.expect("pg_waldump");
    let mut chance = Chance::new();
    for turn in 0..if long() { 12 } else { 2 } {
        let at = 1 + chance.below(starts.len() - 2);
        // Exactly at a record, and inside the previous record.
        let asked = if turn % 2 == 0 {
            starts[at]
        } else {
            Lsn(starts[at - 1].0 + 1)
        };
        let flag = format!("--target-lsn={asked}");
        if turn % 4 < 2 {
            scene.prove(&[&flag], Stop::After(starts[at]));
        } else {
            scene.prove(&[&flag, "--target-exclusive"], Stop::Before(starts[at]));
        }
    }
}

fn transactions_and_names(scene: &Scene) {
    let behind = |kind: Kind| {
        let found = scene
            .all
            .iter()
            .rfind(|record| record.kind == kind && record.lsn >= scene.stop_lsn);
        found.unwrap_or_else(|| panic!("the load holds no {kind:?}"))
    };
    let kinds: &[Kind] = if long() {
        &[
            Kind::Commit,
            Kind::Abort,
            Kind::CommitPrepared,
            Kind::AbortPrepared,
        ]
    } else {
        &[Kind::CommitPrepared]
    };
    for kind in kinds {
        let end = behind(*kind);
        let flag = format!("--target-xid={}", end.xid);
        scene.prove(&[&flag], Stop::After(end.lsn));
        scene.prove(
            &[&flag, "--target-exclusive", PROMOTE],
            Stop::Before(end.lsn),
        );
    }
    // The name exists twice: both are named, and the LSN of either selects it.
    let listing = scene.archived.listing();
    let points = listing["restore_points"].as_array().expect("a list");
    let named = points.iter().filter(|point| point["name"] == "here");
    let lsns: Vec<Lsn> = named
        .map(|point| point["lsn"].as_str().and_then(|lsn| lsn.parse().ok()))
        .collect::<Option<_>>()
        .expect("LSNs");
    assert_eq!(lsns.len(), 2, "{points:?}");
    let mut refused = scene.archived.pitr_restore();
    let refused = refused.args(["--dry-run", "--target-name=here"]).output();
    let refused = refused.expect("it runs");
    let (_, error) = said(&refused);
    assert_eq!(refused.status.code(), Some(3), "{error}");
    for point in points {
        let (lsn, time) = (point["lsn"].as_str(), point["time"].as_str());
        for part in [lsn.expect("an LSN"), time.expect("a time"), "--at-lsn"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    let at = format!("--at-lsn={}", lsns[1]);
    scene.prove(&["--target-name=here", &at], Stop::After(lsns[1]));
}

fn the_end_and_consistency(scene: &Scene) {
    let all = records(&scene.archived.cluster, scene.stop_lsn, scene.end_lsn);
    let last = *all.expect("pg_waldump").last().expect("a record");
    let restored = scene.restore(&[]);
    // The server itself may have written a record after the last known one.
    let lsn = restored.report["plan"]["stop"]["lsn"].as_str();
    let lsn: Lsn = lsn.and_then(|lsn| lsn.parse().ok()).expect("an LSN");
    assert!(lsn >= last, "stopped at {lsn}, the last record is {last}");
    let mut client = restored.connect().expect("the restored server answers");
    assert_eq!(rows(&mut client), scene.committed(Stop::After(lsn)));
    assert_eq!(prepared(&mut client), scene.in_doubt(Stop::After(lsn)));
    // It was promoted: it accepts writes, and transactions in doubt can be ended.
    for (_, gid) in scene.in_doubt(Stop::After(lsn)) {
        let sql = format!("COMMIT PREPARED '{gid}'");
        client.batch_execute(&sql).expect("it is writable");
    }
    drop(client);
    // As soon as the backup is consistent: after the last record that ends at its end.
    let until = records(&scene.archived.cluster, scene.start_lsn, scene.stop_lsn);
    let until = *until.expect("pg_waldump").last().expect("a record");
    let plan = scene.prove(&["--target-immediate"], Stop::After(until));
    for (name, is_it) in [("last_kept", true), ("first_dropped", false)] {
        let lsn = plan[name]["lsn"].as_str().and_then(|lsn| lsn.parse().ok());
        let lsn: Lsn = lsn.unwrap_or_else(|| panic!("no {name} in {plan:#}"));
        assert_eq!(Stop::After(until).replays(lsn), is_it, "{name} in {plan:#}");
        let mut ends = scene.all.iter().filter(|end| end.kind.is_end());
        assert!(ends.any(|end| end.lsn == lsn), "{name} in {plan:#}");
    }

    let beyond = moved(scene.ends().last().expect("an end").time, 3_600_000_000);
    let mut refused = scene.archived.pitr_restore();
    let refused = refused
        .args(["--dry-run", &format!("--target-time={beyond}")])
        .output();
    let refused = refused.expect("it runs");
    let (_, error) = said(&refused);
    assert_eq!(refused.status.code(), Some(3), "{error}");
    assert!(error.contains("beyond the archive"), "{error}");
}
