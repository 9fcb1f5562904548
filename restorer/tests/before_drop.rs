//! A stop right before a DROP: the table can be read while the copy pauses there, and a database
//! has its files. What cannot be avoided is named with the way out.

use std::process::Stdio;

use postgres::Client;
use serde_json::Value;
use testbed::{
    programs::{directory, succeed},
    restored::Restored,
};

use crate::support::{Archived, oldest_and_newest, query, said};

/// A paused copy answers within this time, or a lock is in the way.
const READ: &str = "SET statement_timeout = '20s'; SET lock_timeout = '20s'";
const BLOCKED: &str = "SET statement_timeout = '500ms'";

/// Runs statements in one transaction. Returns its ID.
fn transaction(archived: &Archived, sql: &str) -> String {
    archived.sql(&format!("BEGIN; {sql}; SELECT txid_current(); COMMIT"))
}

fn before(xid: &str) -> [String; 2] {
    [
        format!("--target-xid={xid}"),
        "--target-exclusive".to_owned(),
    ]
}

fn count(copy: &Restored, limit: &str, table: &str) -> Result<String, postgres::Error> {
    let mut client = copy.connect().expect("the copy answers");
    client.batch_execute(limit).expect("a limit");
    let rows = client.query_one(&format!("SELECT count(*)::text FROM {table}"), &[])?;
    Ok(rows.get(0))
}

fn planned(archived: &Archived, target: &[String], action: &str) -> Value {
    let mut plan = archived.pitr_restore();
    plan.args(["--dry-run", "--json", "--target-action", action]);
    let said = succeed(plan.args(target)).expect("a plan");
    serde_json::from_str(&said).expect("JSON")
}

/// The names of the tables that a plan calls locked.
fn locked(plan: &Value) -> Vec<&str> {
    let locks = plan["locks"].as_array().expect("a list").iter();
    let mut names: Vec<&str> = locks.filter_map(|lock| lock["name"].as_str()).collect();
    names.sort_unstable();
    names
}

#[test]
fn right_before_a_drop_everything_is_there_and_can_be_read() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let mut archived = Archived::start(&bin, "");
        for table in ["first", "second", "third", "fourth", "busy"] {
            archived.sql(&format!("CREATE TABLE {table} AS SELECT 1 AS n"));
        }
        archived.sql("CREATE DATABASE gone");
        let gone = archived.cluster.conninfo().replace("=postgres", "=gone");
        let gone = gone.replace("user=gone", "user=postgres");
        query(
            &gone,
            "CREATE TABLE inside AS SELECT generate_series(1, 100)",
        );
        archived.backup();

        archived.sql("INSERT INTO first VALUES (2)");
        let table = transaction(&archived, "DROP TABLE first");
        archived.sql("INSERT INTO second VALUES (2)");
        let truncated = transaction(&archived, "SAVEPOINT s; TRUNCATE second; RELEASE s");
        query(&gone, "INSERT INTO inside VALUES (0)");
        let next: u64 = archived
            .sql("SELECT txid_current()")
            .parse()
            .expect("a transaction");
        archived.sql("DROP DATABASE gone");
        let database = (next + 1).to_string();

        // A lock that was taken before the last kept commit, and one of a prepared transaction.
        archived.sql("BEGIN; LOCK TABLE fourth; PREPARE TRANSACTION 'held'");
        let mut holder: Client = archived.cluster.connect().expect("a client");
        holder
            .batch_execute("BEGIN; LOCK TABLE busy; INSERT INTO busy VALUES (2)")
            .expect("a lock");
        let kept = transaction(&archived, "INSERT INTO third VALUES (2)");
        holder.batch_execute("COMMIT").expect("it commits");
        drop(holder);
        archived.sql("BEGIN; INSERT INTO third VALUES (3); PREPARE TRANSACTION 'late'");
        let third = transaction(&archived, "DROP TABLE busy");
        archived.sql("ROLLBACK PREPARED 'held'");
        archived.sql("ROLLBACK PREPARED 'late'");
        archived.finish();

        let restore = |arguments: &[String]| {
            Restored::start(&archived.place, &bin, arguments)
                .unwrap_or_else(|error| panic!("{arguments:?}: {error:?}"))
        };
        let paused = |arguments: &[String]| {
            let pause = ["--target-action=pause".to_owned()];
            restore(&[arguments, &pause].concat())
        };
        for (xid, table) in [(&table, "first"), (&truncated, "second")] {
            let copy = paused(&before(xid));
            let plan = &copy.report["plan"];
            assert_eq!(plan["moved_from"]["stop"], "before", "{plan}");
            assert_eq!(plan["stop"]["lsn"], plan["last_kept"]["lsn"], "{plan}");
            assert_eq!(locked(plan), Vec::<&str>::new());
            assert_eq!(
                count(&copy, READ, table).expect("it is read"),
                "2",
                "{table}"
            );
        }
        // Opened at once, the lock is released and the stop is the one that was asked for.
        let plan = planned(&archived, &before(&table), "promote");
        assert!(plan["moved_from"].is_null(), "{plan}");
        assert_eq!(plan["stop"]["stop"], "before", "{plan}");

        let copy = restore(&before(&database));
        assert_eq!(copy.report["plan"]["moved_from"]["stop"], "before");
        let inside = copy.conninfo().replace("dbname=postgres", "dbname=gone");
        assert_eq!(query(&inside, "SELECT count(*) FROM inside"), "101");
        drop(copy);

        let copy = paused(&[format!("--target-xid={kept}")]);
        let plan = &copy.report["plan"];
        assert!(plan["moved_from"].is_null(), "{plan}");
        assert_eq!(locked(plan), ["public.busy", "public.fourth"]);
        assert_eq!(count(&copy, READ, "third").expect("it is read"), "2");
        count(&copy, BLOCKED, "busy").expect_err("it is locked");
        drop(copy);
        // Another prepared transaction would be lost on the way back to the last commit.
        let plan = planned(&archived, &before(&third), "pause");
        assert!(plan["moved_from"].is_null(), "{plan}");
        assert_eq!(locked(&plan), ["public.busy", "public.fourth"]);

        the_way_out_is_told(&archived, &kept);
    }
}

fn the_way_out_is_told(archived: &Archived, kept: &str) {
    let target = directory().expect("a directory");
    let mut restore = archived.pitr_restore();
    restore.arg(format!("--target-xid={kept}"));
    restore.arg("--target-dir").arg(target.path().join("data"));
    let done = restore.stdin(Stdio::null()).output().expect("it runs");
    let (report, error) = said(&done);
    assert!(done.status.success(), "{error}");
    for part in [
        "locked        public.busy, by transaction",
        "a query of it waits; open the copy for writing",
        "locked        public.fourth, by transaction",
        "then ROLLBACK PREPARED 'held'",
    ] {
        assert!(report.contains(part), "{part}: {report}");
    }
}
