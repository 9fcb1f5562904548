//! A hole or a damaged object behind the stop of a restore. A plan that is accepted is restored; a
//! plan of which the WAL at the stop cannot be read is refused before the copy.

use std::{
    fs,
    path::{Path, PathBuf},
};

use testbed::{programs::succeed, restored::Restored};

use wal_format::Lsn;

use crate::support::{Archived, end_lsn, files_below, long, query, said, servers, wait_until};

/// The rows of the table, as text.
const ROWS: &str = "SELECT coalesce(string_agg(n::text, ',' ORDER BY n), '') FROM rows";

/// The expected result of a restore.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// These rows.
    Rows(&'static str),
    /// The plan is refused with this exit code. With 4, it names the damaged object.
    Refused(i32),
}
use Expected::{Refused, Rows};

/// The number of targets that are restored after damage. The others are only planned, except in the
/// long tier.
const RESTORED: usize = 2;

/// A target: options, and the expected results with a hole and with damage.
type Case<'a> = (Vec<&'a str>, Expected, Expected);

fn objects(archived: &Archived, kind: &str) -> Vec<PathBuf> {
    let mut all = files_below(&archived.place.path().join("repository"));
    all.retain(|path| path.to_string_lossy().contains(&format!("/{kind}/")));
    all
}

/// Returns the tail that contains the byte before `lsn`.
fn tail_before(archived: &Archived, lsn: Lsn) -> Option<PathBuf> {
    let mut tails = objects(archived, "tail").into_iter();
    tails.find(|tail| {
        let name = tail.file_stem().expect("a name").to_string_lossy();
        let (from, to) = name.split_once('-').expect("a range");
        let parse = |text| Lsn(u64::from_str_radix(text, 16).expect("an LSN"));
        parse(from) < lsn && lsn <= parse(to)
    })
}

/// Removes and then damages an object, and restores to each target.
fn restore_without(archived: &Archived, bin: &Path, lost: &Path, cases: &[Case<'_>]) {
    let whole = fs::read(lost).expect("an object");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (what, content) in [("a hole", None), ("damage", Some(flipped))] {
        fs::remove_file(lost).expect("it is there");
        if let Some(content) = &content {
            fs::write(lost, content).expect("written");
        }
        for (index, (target, with_hole, with_damage)) in cases.iter().enumerate() {
            let expected = content.as_ref().map_or(*with_hole, |_| *with_damage);
            let is_restored = long() || (content.is_some() && index < RESTORED);
            let case = format!("{what}, {target:?}, {}", lost.display());
            match expected {
                Rows(_) if !is_restored => {
                    let mut plan = archived.pitr_restore();
                    succeed(plan.arg("--dry-run").args(target))
                        .unwrap_or_else(|error| panic!("{case}: {error:#}"));
                }
                Rows(rows) => {
                    let copy = Restored::start(&archived.place, bin, target)
                        .unwrap_or_else(|error| panic!("{case}: {error:#}"));
                    assert_eq!(query(&copy.conninfo(), ROWS), rows, "{case}");
                }
                Refused(code) => {
                    let directory = archived.place.path().join("refused");
                    let mut restore = archived.pitr_restore();
                    restore.args(target).arg("--target-dir").arg(&directory);
                    let output = restore.output().expect("it runs");
                    assert_eq!(
                        output.status.code(),
                        Some(code),
                        "{case}: {:?}",
                        said(&output)
                    );
                    assert!(
                        !directory.exists(),
                        "{case}: it was refused after the copy began"
                    );
                    let name = lost.file_name().expect("a name").to_string_lossy();
                    let is_named = said(&output).1.contains(&*name);
                    assert!(is_named || code != 4, "{case}: {:?}", said(&output));
                }
            }
        }
        fs::write(lost, &whole).expect("written");
    }
}

#[test]
fn what_is_before_a_hole_or_damage_is_restored_or_refused_before_the_copy() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE rows (n int)");
    archived.backup();
    let conninfo = archived.cluster.conninfo();
    let (mut begins, mut lsns, mut xids, mut times) = (vec![], vec![], vec![], vec![]);
    let mut end = end_lsn(&conninfo);
    for n in 1..=4 {
        begins.push(end);
        let insert = format!("INSERT INTO rows VALUES ({n}) RETURNING pg_current_xact_id()::text");
        xids.push(archived.sql(&insert));
        lsns.push(archived.sql("SELECT pg_current_wal_flush_lsn()"));
        archived.sql(&format!("SELECT pg_create_restore_point('after {n}')"));
        // Everything is stored before the next commit, so that no tail has WAL of two commits.
        end = end_lsn(&conninfo);
        wait_until("the commit is stored", || {
            tail_before(&archived, end).is_some()
        });
        times.push(archived.sql("SELECT clock_timestamp()"));
    }
    archived.finish();

    let at_second: Vec<Case<'_>> = vec![
        (vec!["--target-immediate"], Rows(""), Rows("")),
        (vec!["--target-lsn", &lsns[1]], Rows("1,2"), Rows("1,2")),
        (vec!["--target-xid", &xids[1]], Rows("1,2"), Rows("1,2")),
        (vec!["--target-name", "after 2"], Rows("1,2"), Rows("1,2")),
        // The first commit after the first one is intact.
        (vec!["--target-time", &times[0]], Rows("1"), Rows("1")),
    ];
    let third = tail_before(&archived, begins[2].add(1)).expect("a tail");
    let mut with_tail = at_second.clone();
    with_tail.extend([
        // The commit that proves the target time is lost.
        (
            vec!["--target-time", times[1].as_str()],
            Refused(3),
            Refused(4),
        ),
        (vec!["--target-xid", &xids[2]], Refused(3), Refused(4)),
        (vec!["--target-lsn", &lsns[2]], Refused(3), Refused(4)),
        (vec!["--target-name", "after 3"], Refused(3), Refused(4)),
        (vec![], Refused(3), Refused(4)),
    ]);
    restore_without(&archived, &bin, &third, &with_tail);

    // Two sealed segments follow: of the stop, and a later one.
    let sealed_before = objects(&archived, "wal").len();
    archived.follow(&conninfo);
    for n in 5..=6 {
        archived.sql("SELECT pg_switch_wal()");
        archived.sql(&format!("INSERT INTO rows VALUES ({n})"));
    }
    end_lsn(&conninfo);
    wait_until("both segments are sealed", || {
        objects(&archived, "wal").len() >= sealed_before + 2
            && objects(&archived, "tail").len() == 1
    });
    archived.finish();
    let sealed = objects(&archived, "wal").split_off(sealed_before);
    restore_without(&archived, &bin, &sealed[1], &at_second);
    let of_stop: Vec<Case<'_>> = at_second
        .iter()
        .map(|(target, ..)| match target.as_slice() {
            ["--target-immediate"] => (target.clone(), Rows(""), Rows("")),
            // The segment has one frame.
            _ => (target.clone(), Refused(3), Refused(4)),
        })
        .collect();
    restore_without(&archived, &bin, &sealed[0], &of_stop);
}
