//! Tablespaces outside of the data directory, behind a link, and in place: each is restored to its
//! mapped directory, and never over existing files.

use std::{
    fs,
    os::unix::fs::{chown, symlink},
    path::Path,
    process::{Command, Output},
};

use testbed::{
    programs::{directory, server_user},
    restored::Restored,
};

use crate::support::{Archived, query, said, servers};

const ROWS: &str = "SELECT (SELECT count(*) FROM one) || ' ' || (SELECT count(*) FROM two) || ' ' \
    || (SELECT count(*) FROM three)";

#[test]
fn each_goes_where_it_is_mapped_and_nothing_is_overwritten() {
    let Some((major, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    let places = directory().expect("a directory");
    let own = |name: &str| {
        let path = places.path().join(name);
        fs::create_dir(&path).expect("a place");
        if let Some((user, group)) = server_user().expect("the servers' user") {
            chown(&path, Some(user), Some(group)).expect("chown");
        }
        path
    };
    let (first, behind) = (own("first"), own("behind"));
    let link = places.path().join("link");
    symlink(&behind, &link).expect("a link");
    archived.sql(&format!(
        "CREATE TABLESPACE one LOCATION '{}'",
        first.display()
    ));
    archived.sql(&format!(
        "CREATE TABLESPACE two LOCATION '{}'",
        link.display()
    ));
    // In-place tablespaces are only meant for tests, and 15 omits their files from a base backup
    // with a tablespace map.
    let in_place = major >= 16;
    let mut three = "";
    if in_place {
        query(
            &archived.cluster.conninfo(),
            "ALTER SYSTEM SET allow_in_place_tablespaces = on",
        );
        archived.sql("SELECT pg_reload_conf()");
        archived.sql("CREATE TABLESPACE three LOCATION ''");
        three = "TABLESPACE three";
    }
    archived.sql(&format!(
        "CREATE TABLE one (n int) TABLESPACE one; CREATE TABLE two (n int) TABLESPACE two; \
         CREATE TABLE three (n int) {three}; INSERT INTO one SELECT generate_series(1, 20000); \
         INSERT INTO two SELECT generate_series(1, 3000); INSERT INTO three SELECT generate_series(1, 500)"
    ));
    archived.backup();
    archived.sql(
        "INSERT INTO one VALUES (0); INSERT INTO two VALUES (0); INSERT INTO three VALUES (0)",
    );
    archived.finish();

    // At their old locations, which still exist: nothing is overwritten, and nothing is begun.
    let target = directory().expect("a directory");
    let restore = |arguments: &[&str]| {
        let mut command = Restored::command(&archived.place, &bin, target.path(), arguments)
            .expect("it is built");
        output(&mut command)
    };
    let refused = |arguments: &[&str], reason: &str| {
        let done = restore(arguments);
        let (_, error) = said(&done);
        assert_eq!(done.status.code(), Some(2), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(reason), "{error}");
        assert!(!target.path().join("data").exists(), "{error}");
    };
    refused(&[], "is not empty");
    let map = |old: &Path, new: &Path| {
        format!("--tablespace-mapping={}={}", old.display(), new.display())
    };
    let (new_one, new_two) = (target.path().join("one"), target.path().join("two"));
    let (one, two) = (map(&first, &new_one), map(&link, &new_two));
    refused(&[&one], "is not empty");
    refused(
        &[&one, &map(&link, &new_one)],
        "is there; give it another place",
    );
    let inside = target.path().join("data/two");
    refused(
        &[&one, &map(&link, &inside)],
        "is there; give it another place",
    );
    refused(&[&one, &map(&behind, &new_two)], "has no tablespace at");
    refused(&[&one, &map(&link, Path::new("two"))], "is not absolute");
    let spelled = format!(
        "--tablespace-mapping={}/={}",
        first.display(),
        new_two.display()
    );
    let both = format!(
        "is mapped to {} and to {}",
        new_one.display(),
        new_two.display()
    );
    refused(&[&one, &spelled], &both);
    assert_eq!(fs::read_dir(target.path()).expect("it lists").count(), 0);

    let done = restore(&[&one, &two]);
    let (report, error) = said(&done);
    assert!(done.status.success(), "{error}");
    let report = serde_json::from_str(&report).expect("JSON");
    let restored = Restored::adopt(target, &bin, report);
    assert_eq!(query(&restored.conninfo(), ROWS), "20001 3001 501");
    assert_eq!(query(&archived.cluster.conninfo(), ROWS), "20001 3001 501");
    let location = "SELECT string_agg(pg_tablespace_location(oid), ' ' ORDER BY spcname) FROM pg_tablespace \
                    WHERE spcname IN ('one', 'two')";
    let expected = format!("{} {}", new_one.display(), new_two.display());
    assert_eq!(query(&restored.conninfo(), location), expected);
    if in_place {
        let links = fs::read_dir(restored.data().join("pg_tblspc")).expect("it lists");
        let folders = links
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        assert_eq!(folders.count(), 1, "the in-place one is a directory");
    }
}

fn output(command: &mut Command) -> Output {
    command.output().expect("it runs")
}
