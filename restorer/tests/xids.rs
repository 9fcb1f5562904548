//! Transactions by their number, on a server whose epoch is not 0: one that was prepared with so
//! many subtransactions that its commit record is longer than 256 KiB, in every notation.

use serde_json::Value;
use testbed::{cluster::Cluster, programs::succeed, restored::Restored};

use crate::support::{Archived, SETTINGS, oldest_and_newest, query, said};

/// Four bytes each in the commit record.
const SUBTRANSACTIONS: u32 = 70_000;
const EPOCH: u64 = 3;

/// Prepares and commits the transaction. Returns its number as PostgreSQL prints it.
fn commit_prepared(archived: &Archived) -> u64 {
    let mut client = archived.cluster.connect().expect("a connection");
    client.batch_execute("BEGIN").expect("begin");
    let xid = "SELECT pg_current_xact_id()::text";
    let xid: String = client.query_one(xid, &[]).expect("its number").get(0);
    client
        .batch_execute(&format!(
            "DO $$ BEGIN FOR n IN 1..{SUBTRANSACTIONS} LOOP \
                 BEGIN INSERT INTO rows VALUES (n); \
                 EXCEPTION WHEN division_by_zero THEN NULL; END; \
             END LOOP; END $$; \
             DROP TABLE dropped; PREPARE TRANSACTION 'long'"
        ))
        .expect("it is prepared");
    for sql in ["COMMIT PREPARED 'long'", "INSERT INTO rows VALUES (0)"] {
        client.batch_execute(sql).expect(sql);
    }
    xid.parse().expect("a number")
}

#[test]
fn a_prepared_transaction_with_a_long_commit_record_is_found_by_every_notation() {
    for (_, bin) in oldest_and_newest() {
        let settings = format!("{SETTINGS}max_locks_per_transaction = 1000\n");
        let cluster = Cluster::start(&bin, 1, &settings).expect("a server");
        cluster.stop().expect("it stops");
        let mut resetwal = cluster.program("pg_resetwal").expect("pg_resetwal");
        succeed(resetwal.arg(format!("-e{EPOCH}")).arg(cluster.data())).expect("an epoch");
        cluster.start_again().expect("it starts");
        let mut archived = Archived::of(cluster);
        archived.sql("CREATE TABLE rows (n int); CREATE TABLE dropped (n int)");
        archived.backup();
        let xid = commit_prepared(&archived);
        assert_eq!(xid >> 32, EPOCH);
        let lower = xid & 0xFFFF_FFFF;
        archived.finish();

        let stop = |target: &str| {
            let mut restore = archived.pitr_restore();
            restore.args(["--dry-run", "--json", "--target-xid", target]);
            let plan: Value = serde_json::from_str(&succeed(&mut restore).expect("a plan"))
                .expect("a JSON document");
            assert_eq!(plan["in_doubt"], serde_json::json!([]), "{target}");
            assert_eq!(plan["last_kept"]["xid"], lower, "{target}");
            assert_eq!(plan["last_kept"]["kind"], "commit_prepared", "{target}");
            plan["stop"].clone()
        };
        let expected = stop(&xid.to_string());
        for notation in [
            format!("{lower}"),
            format!("{lower:#x}"),
            format!("{xid:#x}"),
        ] {
            assert_eq!(stop(&notation), expected, "{notation}");
        }
        // The same lower half in another epoch is another transaction.
        for (other, code) in [
            (lower | (EPOCH + 1) << 32, 3),
            (lower | (EPOCH - 1) << 32, 3),
            (0, 2),
        ] {
            let mut restore = archived.pitr_restore();
            restore.args(["--dry-run", "--target-xid", &other.to_string()]);
            let output = restore.output().expect("it runs");
            assert_eq!(output.status.code(), Some(code), "{:?}", said(&output));
        }

        let restored = Restored::start(&archived.place, &bin, &[format!("--target-xid={xid}")]);
        let restored = restored.expect("a restore");
        let state = "SELECT count(*) || ' ' || min(n) || ' ' \
                     || coalesce(to_regclass('dropped')::text, 'gone') || ' ' \
                     || (SELECT count(*) FROM pg_prepared_xacts) FROM rows";
        let state = query(&restored.conninfo(), state);
        assert_eq!(state, format!("{SUBTRANSACTIONS} 1 gone 0"));

        let located = |question: &[&str]| -> Value {
            let mut locate = archived.pitr_restore();
            let said = succeed(locate.args(["locate", "--json"]).args(question));
            let found: Value = serde_json::from_str(&said.expect("an answer")).expect("JSON");
            let transactions = found["transactions"].as_array().expect("a list");
            assert_eq!(transactions.len(), 1, "{found:#}");
            assert_eq!(transactions[0]["xid"], lower, "{found:#}");
            transactions[0].clone()
        };
        located(&["--dropped", "dropped"]);
        let one = located(&["--xid", &format!("{xid:#x}")]);
        assert_eq!(one["rows"][0]["inserted"], SUBTRANSACTIONS, "{one:#}");
    }
}
