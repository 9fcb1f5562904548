//! Two timelines, then a third with the number of the second: every state of each is reached, and a
//! target on another timeline is refused with the reason.

use std::{collections::BTreeSet, path::PathBuf};

use testbed::{programs::succeed, restored::Restored};

use crate::support::{Archived, query, said, servers};

/// The words in a server's table, in order.
const WORDS: &str = "SELECT string_agg(word, ' ' ORDER BY word) FROM words";
const NOW: &str =
    "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";

struct Scene {
    archived: Archived,
    bin: PathBuf,
}

impl Scene {
    fn restore(&self, arguments: &[&str]) -> Restored {
        Restored::start(&self.archived.place, &self.bin, arguments)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error:?}"))
    }

    fn assert_words(&self, arguments: &[&str], expected: &str) {
        let restored = self.restore(arguments);
        assert_eq!(
            query(&restored.conninfo(), WORDS),
            expected,
            "{arguments:?}"
        );
    }

    fn assert_refused(&self, arguments: &[&str], code: i32, reason: &str) {
        let mut command = self.archived.pitr_restore();
        let done = command.arg("--dry-run").args(arguments).output();
        let done = done.expect("it runs");
        let (_, error) = said(&done);
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(reason), "{arguments:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{arguments:?}: {error}");
    }

    /// Writes a word. Returns the time after it.
    fn write(&self, conninfo: &str, word: &str) -> String {
        query(conninfo, &format!("INSERT INTO words VALUES ('{word}')"));
        let now = query(conninfo, NOW);
        // The next commit must have a later time.
        query(conninfo, "SELECT pg_sleep(0.002)");
        now
    }
}

#[test]
fn every_timeline_is_reached_and_no_other_is_mixed_in() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut scene = Scene {
        archived: Archived::start(&bin, ""),
        bin,
    };
    let primary = scene.archived.cluster.conninfo();
    scene.archived.sql("CREATE TABLE words (word text)");
    scene.archived.backup();
    let after_a = scene.write(&primary, "a");
    scene.write(&primary, "b");
    scene.archived.sql("SELECT pg_create_restore_point('fork')");
    let before_c = query(&primary, NOW);
    let after_c = scene.write(&primary, "c1");
    scene
        .archived
        .sql("SELECT pg_create_restore_point('only on 1')");
    scene.write(&primary, "d1");
    // Timeline 2 will have fewer transactions, so that it lacks the number of the last one.
    let mut only_on_first = String::new();
    for _ in 0..20 {
        only_on_first = scene.archived.sql("SELECT pg_current_xact_id()");
    }
    scene.archived.finish();

    // Timeline 2 leaves timeline 1 at the restore point. A second server is promoted before the
    // first one's history is archived, and takes the same number.
    let second = scene.restore(&["--target-name=fork", "--target-action=promote"]);
    let time_a = format!("--target-time={after_a}");
    let other = scene.restore(&["--target-timeline=1", &time_a, "--target-action=promote"]);
    scene.archived.follow(&second.conninfo());
    assert_eq!(query(&second.conninfo(), WORDS), "a b");
    scene.write(&second.conninfo(), "c2");
    query(
        &second.conninfo(),
        "SELECT pg_create_restore_point('only on 2')",
    );
    scene.write(&second.conninfo(), "d2");
    let mut backup = scene.archived.place.program("wal-archiver").expect("built");
    backup.args(["--conninfo", &second.conninfo(), "backup"]);
    succeed(&mut backup).expect("a backup of timeline 2");
    scene.write(&second.conninfo(), "e2");
    scene.archived.finish_at(&second.conninfo());
    let listing = scene.archived.listing();
    // By timeline, since backups that began within one second are not listed in the order of their
    // beginning.
    let on = |timeline: &str| {
        let backups = listing["backups"].as_array().expect("backups").iter();
        let is_on = |backup: &&serde_json::Value| {
            let branch = backup["branch"].as_str();
            branch.is_some_and(|branch| branch.starts_with(timeline))
        };
        let found = backups.clone().find(is_on);
        found
            .and_then(|backup| backup["id"].as_str())
            .expect("one of each")
    };
    let (on_first, on_second) = (on("00000001"), on("00000002"));

    // The newest is the default; both timelines to their ends; before the fork by either.
    let on_first_backup = format!("--backup={on_first}");
    scene.assert_words(&[], "a b c2 d2 e2");
    scene.assert_words(
        &["--target-timeline=latest", &on_first_backup],
        "a b c2 d2 e2",
    );
    scene.assert_words(
        &["--target-timeline=2", "--target-name=only on 2"],
        "a b c2",
    );
    scene.assert_words(&["--target-timeline=1"], "a b c1 d1");
    scene.assert_words(
        &["--target-timeline=1", "--target-name=only on 1"],
        "a b c1",
    );
    let time_c = format!("--target-time={after_c}");
    scene.assert_words(&["--target-timeline=2", &time_a], "a");
    scene.assert_words(&["--target-timeline=1", &time_a], "a");
    scene.assert_words(&["--target-timeline=1", &time_c], "a b c1");
    // At that time timeline 2 had only the commits that timeline 1 had before the fork.
    scene.assert_words(&["--target-timeline=2", &time_c], "a b");
    scene.assert_words(
        &["--target-timeline=1", &format!("--target-time={before_c}")],
        "a b",
    );

    scene.assert_refused(&["--target-timeline=3"], 3, "timeline 3 is not archived");
    scene.assert_refused(
        &["--target-timeline=2", "--target-name=only on 1"],
        3,
        "\"only on 1\" is not in the archive of timeline 00000001 ",
    );
    // What only an abandoned timeline has is named with the option that reaches it.
    let on_first = "timeline 00000001 has it: restore to it with --target-timeline 1";
    scene.assert_refused(&["--target-name=only on 1"], 3, on_first);
    scene.assert_refused(&[&format!("--target-xid={only_on_first}")], 3, on_first);
    scene.assert_refused(
        &["--target-timeline=1", "--target-name=only on 2"],
        3,
        "\"only on 2\" is not in the archive of timeline 00000001 ",
    );
    let on_second_backup = format!("--backup={on_second}");
    scene.assert_refused(
        &["--target-timeline=1", &on_second_backup],
        3,
        "was taken on timeline 00000002-",
    );

    // A plan reaches each shown time, also at the end of the timeline that the server left.
    assert!(scene.archived.plan_shown_times() > 2);

    // A second timeline 2, unrelated to the first: the number alone is refused, the branch is
    // accepted.
    drop(second);
    std::fs::remove_dir_all(scene.archived.place.path().join("spool")).expect("the spool");
    scene.archived.follow(&other.conninfo());
    scene.write(&other.conninfo(), "c3");
    scene.archived.finish_at(&other.conninfo());
    scene.assert_refused(&["--target-timeline=2"], 2, "names several histories");
    let listing = scene.archived.listing();
    let windows = listing["windows"].as_array().expect("windows").iter();
    let branches: Vec<&str> = windows
        .filter_map(|window| window["branch"].as_str())
        .filter(|branch| branch.starts_with("00000002"))
        .collect();
    assert_eq!(branches.len(), 2, "{listing}");
    // The options that the listing prints are accepted.
    let mut list = scene.archived.pitr_restore();
    let listed = succeed(list.arg("list")).expect("a listing");
    let printed = listed.split("--target-timeline ").skip(1);
    let printed: BTreeSet<&str> = printed
        .filter_map(|rest| rest.split_whitespace().next())
        .collect();
    assert!(
        printed.is_superset(&branches.iter().copied().collect()),
        "{listed}"
    );
    for option in printed {
        let mut plan = scene.archived.pitr_restore();
        plan.args(["--dry-run", "--target-timeline", option]);
        succeed(&mut plan).unwrap_or_else(|error| panic!("{error}: {listed}"));
    }
    let mut found = Vec::new();
    for branch in branches {
        let restored = scene.restore(&[&format!("--target-timeline={branch}")]);
        found.push(query(&restored.conninfo(), WORDS));
    }
    found.sort();
    assert_eq!(found, ["a b c2 d2 e2", "a c3"]);
}
