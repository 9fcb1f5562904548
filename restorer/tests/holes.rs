//! A hole or a damaged object behind the stop of a restore. What a plan accepts is restored.

use std::{fs, path::PathBuf};

use testbed::restored::Restored;

use crate::support::{Archived, end_lsn, files_below, query, said, servers, wait_until};

fn tails(archived: &Archived) -> Vec<PathBuf> {
    let all = files_below(&archived.place.path().join("repository"));
    let mut tails: Vec<PathBuf> = all
        .into_iter()
        .filter(|path| path.to_string_lossy().contains("/tail/"))
        .collect();
    tails.sort();
    tails
}

#[test]
fn what_is_before_a_hole_or_damage_in_an_open_segment_is_restored() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE rows (n int)");
    archived.backup();
    let conninfo = archived.cluster.conninfo();
    // Each commit is stored before the next one, so that it has a tail of its own.
    let commits: Vec<_> = (1..=4)
        .map(|n| {
            let before = tails(&archived);
            archived.sql(&format!("INSERT INTO rows VALUES ({n})"));
            let lsn = archived.sql("SELECT pg_current_wal_flush_lsn()");
            // Its record follows the commit, so that recovery finds one at the target.
            end_lsn(&conninfo);
            let mut new = Vec::new();
            wait_until("the commit is stored", || {
                new = tails(&archived);
                new.retain(|tail| !before.contains(tail));
                !new.is_empty()
            });
            (lsn, new.pop().expect("a tail"))
        })
        .collect();
    archived.finish();

    let lost = &commits[2].1;
    let whole = fs::read(lost).expect("a tail");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let second = commits[1].0.clone();
    for (what, content) in [("a hole", None), ("damage", Some(flipped))] {
        fs::remove_file(lost).expect("it is there");
        if let Some(content) = content {
            fs::write(lost, content).expect("written");
        }
        // On 15 and later, PostgreSQL also asks for WAL after the stop.
        let mut targets = vec![(vec!["--target-lsn", second.as_str()], "1,2")];
        if what == "a hole" {
            targets.push((vec!["--target-immediate"], ""));
        }
        for (target, rows) in targets {
            let copy = Restored::start(&archived.place, &bin, &target)
                .unwrap_or_else(|error| panic!("{what}, {target:?}: {error:#}"));
            let found = query(
                &copy.conninfo(),
                "SELECT coalesce(string_agg(n::text, ',' ORDER BY n), '') FROM rows",
            );
            assert_eq!(found, rows, "{what}, {target:?}");
        }
        fs::write(lost, &whole).expect("written");
    }

    fs::remove_file(lost).expect("it is there");
    let mut latest = archived.pitr_restore();
    let directory = archived.place.path().join("latest");
    latest.args(["--dry-run", "--target-dir"]).arg(directory);
    let output = latest.output().expect("it runs");
    assert_eq!(output.status.code(), Some(3), "{:?}", said(&output));
}
