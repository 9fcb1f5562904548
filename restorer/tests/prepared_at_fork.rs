//! A transaction that is prepared in the segment in which a later timeline begins.
//!
//! Until replay reaches the fork, PostgreSQL reads the state of a prepared transaction from the
//! segment of the earlier timeline (`XLogReadDetermineTimeline` in `xlogutils.c`), although the
//! archive delivered the later timeline's copy of it. The long tier runs the oldest version too.

use std::{fs, path::Path};

use testbed::{programs::command, restored::Restored};

use crate::support::{Archived, long, oldest_and_newest, query, wait_until};

const PREPARED: &str = "SELECT string_agg(gid, ' ' ORDER BY gid) FROM pg_prepared_xacts";
const ROWS: &str = "SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows";

/// Restores to the end of the newest timeline.
fn restore(archived: &Archived, bin: &Path, action: &str) -> Restored {
    Restored::start(&archived.place, bin, &[format!("--target-action={action}")])
        .unwrap_or_else(|error| panic!("{action}: {error:?}"))
}

/// Prepares a transaction that writes `n`.
fn prepare(conninfo: &str, n: u32) {
    query(
        conninfo,
        &format!("BEGIN; INSERT INTO rows VALUES ({n}); PREPARE TRANSACTION 'n{n}'"),
    );
}

fn restart(copy: &Restored, bin: &Path) {
    let mut pg_ctl = command(&bin.join("pg_ctl")).expect("pg_ctl");
    pg_ctl.env("LD_LIBRARY_PATH", bin.join("../lib"));
    pg_ctl.arg("-D").arg(copy.data()).arg("-l");
    pg_ctl.arg(copy.data().join("../log"));
    let restart = pg_ctl.args(["-m", "fast", "-w", "restart"]);
    // A server that keeps the output of `pg_ctl` open would block a caller that reads it.
    let status = restart.stdout(std::process::Stdio::null()).status();
    let log = fs::read_to_string(copy.data().join("../log"));
    assert!(status.expect("it runs").success(), "{log:?}");
}

#[test]
fn a_transaction_that_is_prepared_right_before_two_forks_is_kept() {
    let mut servers = oldest_and_newest();
    if !long() && servers.len() > 1 {
        servers.drain(..servers.len() - 1);
    }
    for (major, bin) in servers {
        eprintln!("PostgreSQL {major}");
        let mut archived = Archived::start(&bin, "");
        archived.sql("CREATE TABLE rows (n int)");
        archived.backup();
        archived.sql("SELECT pg_switch_wal()");
        let first = archived.cluster.conninfo();
        prepare(&first, 1);
        archived.sql("INSERT INTO rows VALUES (2)");
        archived.finish();
        let segment = "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 9)";
        let fork = archived.sql(segment);
        // Timelines 2 and 3 begin in this segment. Each server ends its recovery with a shutdown
        // checkpoint, at whose replay a server with hot standby reads all prepared transactions.
        for n in [3, 5] {
            let server = restore(&archived, &bin, "promote");
            let conninfo = server.conninfo();
            prepare(&conninfo, n);
            query(&conninfo, &format!("INSERT INTO rows VALUES ({})", n + 1));
            assert_eq!(query(&conninfo, segment), fork);
            archived.follow(&conninfo);
            archived.finish_at(&conninfo);
        }
        // Each of the two servers above was promoted, as with `promote` here.
        let actions = if long() {
            vec!["promote", "pause"]
        } else {
            vec!["pause"]
        };
        for action in actions {
            let copy = restore(&archived, &bin, action);
            let sql = |sql: &str| query(&copy.conninfo(), sql);
            assert_eq!(sql(ROWS), "2 4 6", "{action}");
            if action == "pause" {
                restart(&copy, &bin);
                let paused = "SELECT pg_is_wal_replay_paused()";
                wait_until("it pauses again", || sql(paused) == "t");
                assert_eq!(sql(ROWS), "2 4 6");
                sql("SELECT pg_promote()");
            }
            assert_eq!(sql(PREPARED), "n1 n3 n5", "{action}");
            sql("COMMIT PREPARED 'n1'");
            sql("CHECKPOINT");
            restart(&copy, &bin);
            sql("COMMIT PREPARED 'n3'");
            sql("COMMIT PREPARED 'n5'");
            assert_eq!(sql(ROWS), "1 2 3 4 5 6", "{action}");
            let own = sql("SELECT timeline_id FROM pg_control_checkpoint()");
            assert_eq!(own, "4", "{action}");
        }
    }
}
