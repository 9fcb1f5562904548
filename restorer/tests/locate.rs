//! `locate`: an event is found by time, by transaction and by name, and the printed flags restore
//! to just before it.

use std::path::PathBuf;

use serde_json::Value;
use testbed::{programs::succeed, restored::Restored};

use crate::support::{Archived, query, said, servers};

const XID: &str = "SELECT pg_current_xact_id()::text";
const NOW: &str =
    "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";

struct Scene {
    archived: Archived,
    bin: PathBuf,
}

impl Scene {
    /// Runs statements in one transaction. Returns its ID.
    fn transaction(&self, statements: &str) -> u64 {
        let mut client = self.archived.cluster.connect().expect("a connection");
        client.batch_execute("BEGIN").expect("begin");
        let xid: String = client.query_one(XID, &[]).expect("its number").get(0);
        client.batch_execute(statements).expect(statements);
        client.batch_execute("COMMIT").expect("commit");
        xid.parse().expect("a number")
    }

    fn locate(&self, arguments: &[&str]) -> Value {
        let mut locate = self.archived.pitr_restore();
        let said = succeed(locate.args(["locate", "--json"]).args(arguments)).expect("an answer");
        serde_json::from_str(&said).expect("JSON")
    }

    /// Returns the single transaction that is found.
    fn located(&self, arguments: &[&str], xid: u64) -> Value {
        let found = self.locate(arguments);
        let transactions = found["transactions"].as_array().expect("a list");
        let numbers: Vec<&Value> = transactions.iter().map(|one| &one["xid"]).collect();
        assert_eq!(numbers, [xid], "{found:#}");
        transactions[0].clone()
    }

    /// Returns a query's result after a restore to just before the found transaction.
    fn just_before(&self, located: &Value, sql: &str) -> String {
        let flags = located["just_before"].as_str().expect("it is restorable");
        let arguments: Vec<&str> = flags.split(' ').collect();
        let restored = Restored::start(&self.archived.place, &self.bin, &arguments);
        let restored = restored.unwrap_or_else(|error| panic!("{flags}: {error:?}"));
        query(&restored.conninfo(), sql)
    }
}

fn names(list: &Value) -> Vec<&str> {
    let relations = list.as_array().expect("a list").iter();
    relations.filter_map(|one| one["name"].as_str()).collect()
}

#[test]
fn what_was_done_is_found_and_the_flags_restore_to_just_before_it() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut scene = Scene {
        archived: Archived::start(&bin, ""),
        bin,
    };
    scene.archived.sql(
        "CREATE SCHEMA shop; CREATE TABLE shop.orders (n int PRIMARY KEY); CREATE TABLE kept (n int); \
         INSERT INTO shop.orders SELECT generate_series(1, 5000); INSERT INTO kept VALUES (1)",
    );
    scene.transaction("CREATE TABLE gone (n int)");
    let gone = scene.transaction("DROP TABLE gone");
    let early = scene.transaction("INSERT INTO kept VALUES (2)");
    scene.archived.backup();
    let before = scene.archived.sql(NOW);
    let small = scene.transaction("DELETE FROM shop.orders WHERE n > 4990");
    let large = scene.transaction(
        "DELETE FROM shop.orders WHERE n <= 2000; SAVEPOINT s; DELETE FROM shop.orders WHERE n <= 3000",
    );
    let truncated = scene.transaction("TRUNCATE kept");
    scene.transaction("CREATE TABLE made_later (n int); INSERT INTO made_later VALUES (7)");
    let dropped_later = scene.transaction("DROP TABLE made_later");
    let dropped = scene.transaction("DROP TABLE shop.orders");
    scene
        .archived
        .sql("BEGIN; CREATE TABLE never (n int); ROLLBACK");
    scene
        .archived
        .sql("SELECT pg_create_restore_point('after all that')");
    scene.archived.finish();

    // By name, with and without the schema; also a relation that the backup does not contain.
    for name in ["shop.orders", "orders"] {
        let found = scene.located(&["--dropped", name], dropped);
        let removed = names(&found["removed"]);
        assert!(
            removed.contains(&"shop.orders") && removed.contains(&"shop.orders_pkey"),
            "{found:#}"
        );
        assert_eq!(found["removed"][0]["database"], "postgres");
    }
    let found = scene.located(&["--dropped", "orders"], dropped);
    assert_eq!(
        scene.just_before(&found, "SELECT count(*) FROM shop.orders"),
        "1990"
    );
    let found = scene.located(&["--dropped", "made_later"], dropped_later);
    assert_eq!(scene.just_before(&found, "SELECT n FROM made_later"), "7");
    let found = scene.located(&["--dropped", "kept"], truncated);
    assert_eq!(scene.just_before(&found, "SELECT count(*) FROM kept"), "2");
    // By the number of its file, which is all that WAL itself contains.
    let file = found["removed"][0]["file"]["relation"].to_string();
    scene.located(&["--dropped", &file], truncated);

    // By transaction, including the work of its subtransactions.
    let xid = large.to_string();
    let found = scene.located(&["--xid", &xid], large);
    assert_eq!(found["rows"][0]["deleted"], 3000, "{found:#}");
    assert_eq!(
        names(&Value::Array(vec![found["rows"][0]["relation"].clone()])),
        ["shop.orders"]
    );
    assert_eq!(
        scene.just_before(&found, "SELECT count(*) FROM shop.orders"),
        "4990"
    );

    // By time: every notable transaction, and the nearest of the others.
    let around = scene.locate(&["--around", &before, "--within", "1 hour"]);
    let transactions = around["transactions"].as_array().expect("a list");
    let numbers: Vec<u64> = transactions
        .iter()
        .filter_map(|one| one["xid"].as_u64())
        .collect();
    for xid in [early, small, large, truncated, dropped_later, dropped] {
        assert!(numbers.contains(&xid), "{xid} is not in {numbers:?}");
    }
    assert!(numbers.is_sorted(), "in the order of the WAL: {numbers:?}");
    assert_eq!(around["restore_points"][0]["name"], "after all that");
    // A name comes from the newest backup before the event and the WAL after that backup, wherever
    // the span begins. Before the first backup there are only numbers, and a note says so.
    let removed_by = |xid: u64| {
        let mut found = transactions.iter().filter(|one| one["xid"] == xid);
        names(&found.next().expect("it was listed")["removed"])
    };
    assert!(removed_by(dropped).contains(&"shop.orders"), "{around:#}");
    assert_eq!(removed_by(dropped_later), ["public.made_later"]);
    assert!(removed_by(gone).is_empty(), "{around:#}");
    let notes = around["notes"].to_string();
    assert!(notes.contains("no backup ends before") && notes.contains("pg_filenode_relation"));
    // Every commit of the span is listed or counted.
    let few = ["--around", &before, "--within", "1 hour", "--limit", "1"];
    let all = ["--around", &before, "--within", "1 hour", "--limit", "1000"];
    let (few, all) = (scene.locate(&few), scene.locate(&all));
    let count = |found: &Value| found["transactions"].as_array().expect("a list").len() as u64;
    let omitted = |found: &Value, side: &str| found["omitted"][side].as_u64().expect("a number");
    assert_eq!((omitted(&all, "earlier"), omitted(&all, "later")), (0, 0));
    assert!(omitted(&few, "earlier") > 0, "{few:#}");
    let counted = count(&few) + omitted(&few, "earlier") + omitted(&few, "later");
    assert_eq!(counted, count(&all), "{few:#}");
    // A transaction that committed before the only backup cannot be undone with it.
    let first = transactions
        .iter()
        .find(|one| one["xid"] == early)
        .expect("it was listed");
    assert_eq!(first["just_before"], Value::Null, "{first:#}");
    let text = succeed(
        scene
            .archived
            .pitr_restore()
            .args(["locate", "--dropped", "orders"]),
    );
    let text = text.expect("an answer");
    assert!(
        text.contains("shop.orders in database postgres")
            && text.contains("just before: --target-timeline"),
        "{text}"
    );

    let mut around = scene.archived.pitr_restore();
    around.args([
        "locate", "--around", &before, "--within", "1 hour", "--limit", "1",
    ]);
    let text = succeed(&mut around).expect("an answer");
    assert!(
        text.contains("not listed; list more with --limit N"),
        "{text}"
    );

    for (arguments, code) in [
        (&["--dropped", "nothing_of_that_name"][..], 3),
        (&["--xid", "4000000000"], 3),
        (&["--around", "2020-01-01 00:00:00Z"], 3),
        (&["--around", "2020-01-01 00:00:00"], 2),
        (&["--around", "now", "--within", "a while"], 2),
        (&[], 2),
    ] {
        let output = scene
            .archived
            .pitr_restore()
            .arg("locate")
            .args(arguments)
            .output();
        let output = output.expect("it runs");
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {:?}",
            said(&output)
        );
    }
}
