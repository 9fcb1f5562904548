//! One of several repositories is not in its place: what is read from the others names it, because
//! it may hold what they lack.

use std::{fs, path::Path, process::Output};

use testbed::{cluster::Cluster, place::Place, programs::succeed};

use crate::support::{SETTINGS, end_lsn, query, said, servers, wait_archived, wait_until};

/// Removes the tails of a repository, or the newest sealed segment if it has none.
fn remove_newest(repository: &Path) {
    let objects = |kind: &str| {
        let systems = fs::read_dir(repository.join("main")).expect("an archive");
        let systems = systems.flatten().map(|system| system.path().join(kind));
        let objects = systems.filter_map(|folder| fs::read_dir(folder).ok());
        let objects = objects.flatten().flatten().map(|object| object.path());
        let mut objects: Vec<_> = objects.collect();
        objects.sort();
        objects
    };
    let mut newest = objects("tail");
    if newest.is_empty() {
        newest.extend(objects("wal").pop());
    }
    assert!(!newest.is_empty(), "nothing was archived");
    for object in newest {
        match object.is_dir() {
            true => fs::remove_dir_all(object).expect("a folder"),
            false => fs::remove_file(object).expect("an object"),
        }
    }
}

fn said_with_code(output: &Output) -> (Option<i32>, String) {
    let (out, error) = said(output);
    (output.status.code(), format!("{out}{error}"))
}

#[test]
fn a_repository_that_is_not_mounted_is_named_by_every_answer_that_does_without_it() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, SETTINGS).expect("a server");
    let place = Place::with_settings("repositories = [{ url = 'file://{place}/second' }]\n");
    let place = place.expect("a place");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("an archiver");
    let mut backup = place.program("wal-archiver").expect("built");
    succeed(backup.args(["--conninfo", &cluster.conninfo(), "backup"])).expect("a backup");
    query(&cluster.conninfo(), "CREATE TABLE words (word text)");
    wait_archived(&cluster.conninfo(), end_lsn(&cluster.conninfo()));
    let [near, far] = ["repository", "second"].map(|name| place.path().join(name));
    let backups = |root: &Path| {
        let systems = fs::read_dir(root.join("main")).into_iter().flatten();
        systems
            .flatten()
            .filter_map(|system| fs::read_dir(system.path().join("backup")).ok())
            .flatten()
            .count()
    };
    wait_until("both repositories have the backup", || {
        backups(&near) == 1 && backups(&far) == 1
    });
    daemon.stop().expect("it stops");

    let unseen = |arguments: &[&str]| {
        let mut restore = place.program("pitr-restore").expect("built");
        let output = restore.args(arguments).output().expect("it runs");
        let (told, warning) = said(&output);
        assert!(output.status.success(), "{arguments:?}: {warning}");
        let answer: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        let unseen = answer["unseen_repositories"].clone();
        let unseen = unseen.as_array().cloned().unwrap_or_default();
        (unseen, warning)
    };
    let url = format!("file://{}", near.display());
    let aside = place.path().join("aside");
    for problem in [
        "",
        "there is no such folder",
        "holds nothing of cluster main",
    ] {
        for arguments in [["--dry-run", "--json"], ["list", "--json"]] {
            let (unseen, warning) = unseen(&arguments);
            let warned = warning.contains(&format!("warning: nothing of {url} is seen"));
            assert_eq!(warned, !problem.is_empty(), "{warning}");
            assert_eq!(unseen.len(), usize::from(warned), "{unseen:?}");
            for place in unseen {
                assert_eq!(place["repository"], url.as_str());
                let told = place["problem"].as_str().expect("a text");
                assert!(told.contains(problem), "{told}");
                assert!(warning.contains(told), "{warning}");
            }
        }
        if !aside.exists() {
            repository::durable::rename(&near, &aside).expect("unmounted");
        } else if !near.exists() {
            fs::create_dir(&near).expect("a mount point");
        }
    }
    // The place that is there lacks the newest WAL that this host archived: its newest state is not
    // that of the archive.
    let exchanged = aside.with_extension("far");
    fs::remove_dir(&near).expect("nothing is mounted");
    repository::durable::rename(&aside, &near).expect("mounted");
    repository::durable::rename(&far, &exchanged).expect("unmounted");
    remove_newest(&near);
    let restore = |arguments: &[&str]| {
        let mut restore = place.program("pitr-restore").expect("built");
        said_with_code(&restore.args(arguments).output().expect("it runs"))
    };
    let (code, told) = restore(&["--dry-run"]);
    assert_eq!(code, Some(3), "{told}");
    assert!(told.contains("this host archived WAL up to"), "{told}");
    assert!(told.contains("nothing of file://"), "{told}");
    let (code, told) = restore(&["list", "--json"]);
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("this host archived WAL up to"), "{told}");
    let (code, told) = restore(&["--dry-run", "--force"]);
    assert_eq!(code, Some(0), "{told}");

    // With nothing in either place, the spool of this host still knows that there was an archive.
    repository::durable::rename(&near, &aside).expect("unmounted");
    fs::create_dir(&near).expect("a mount point");
    fs::create_dir(&far).expect("a mount point");
    for arguments in [["--dry-run", "--json"], ["list", "--json"]] {
        let mut restore = place.program("pitr-restore").expect("built");
        let output = restore.args(arguments).output().expect("it runs");
        let (told, warning) = said(&output);
        assert_eq!(output.status.code(), Some(5), "{told}{warning}");
        let advice = "Only if that archive cannot be brought back";
        assert!(
            told.contains(advice) || warning.contains(advice),
            "{told}{warning}"
        );
    }
}
