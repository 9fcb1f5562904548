//! Drills that the daemon starts by `drill_schedule`. The schedule is yearly and the last drill was
//! years ago, so that a run is due at the start of the daemon.

use std::{env, fs, os::unix::fs::chown, path::Path};

use repository::{
    Repository,
    config::{RepositoryPlace, RepositoryUrl},
};
use serde_json::Value;
use testbed::{
    place::Daemon,
    programs::{ours, succeed},
};
use wal_format::{Outcome, OutcomeKind, PgTimestamp};

use crate::{
    drill::{HANGING, Scene, servers_below},
    support::{files_below, servers, wait_until},
};

/// Records a drill of the year 2025.
fn record_an_old_drill(root: &Path) {
    let url: RepositoryUrl = format!("file://{}/repository", root.display())
        .parse()
        .expect("a URL");
    let place = RepositoryPlace::from(url);
    let repository = Repository::open(&place, &"main".parse().expect("a name"));
    let repository = repository.expect("a repository");
    let identity = repository
        .identity()
        .expect("it is read")
        .expect("it is claimed");
    let time = PgTimestamp::from_jiff("2025-03-01T03:00:00Z".parse().expect("a time"));
    let id = "20250301T030000Z-0000".parse().expect("a name");
    let outcome = Outcome::new(OutcomeKind::Drill, id, time, time, true, "old".to_owned());
    repository
        .put_outcome(identity.system_identifier, &outcome)
        .expect("it is stored");
    // The daemon of another user has to read and write there.
    let Some((user, group)) = testbed::programs::server_user().expect("a user") else {
        return;
    };
    for path in files_below(&root.join("repository")) {
        if path.to_string_lossy().contains("/outcome/") {
            for owned in path.ancestors().take(3) {
                chown(owned, Some(user), Some(group)).expect("chown");
            }
        }
    }
}

#[test]
fn the_daemon_drills_by_schedule_and_shows_a_drill_without_a_result() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut scene = Scene::make(&bin, "");
    let root = scene.archived.place.path().to_owned();
    record_an_old_drill(&root);
    let reports = root.join("reports");
    let schedule = format!(
        "drill_schedule = '0 3 1 1 *'\ndrill_scratch = '{}'\ndrill_report_dir = '{}'\n",
        scene.base.path().display(),
        reports.display()
    );
    let path = |directories: &[&Path]| {
        let mut all: Vec<_> = directories.iter().map(|path| path.to_path_buf()).collect();
        all.extend(env::split_paths("/usr/bin:/bin"));
        env::join_paths(all)
            .expect("a path")
            .into_string()
            .expect("UTF-8")
    };
    let libraries = bin.join("../lib").display().to_string();
    let start = |scene: &mut Scene, path: String| -> Daemon {
        scene
            .archived
            .place
            .set_environment(&[("PATH", path), ("LD_LIBRARY_PATH", libraries.clone())]);
        let cluster = &scene.archived.cluster;
        let daemon = scene.archived.place.daemon(cluster, "127.0.0.1:0");
        daemon.expect("an archiver")
    };
    let report = |scene: &Scene, daemon: &Daemon| -> Value {
        let address = daemon
            .address()
            .expect("a log")
            .expect("an address")
            .to_string();
        let mut status = scene
            .archived
            .place
            .program("wal-archiver")
            .expect("it is built");
        let said = succeed(status.args(["status", "--json", "--http", &address]));
        let said: Value = serde_json::from_str(&said.expect("a status")).expect("JSON");
        said[0].clone()
    };

    // The tests keep pitr-restore in another directory than wal-archiver.
    scene.configure(&schedule);
    let daemon = start(&mut scene, path(&[&bin]));
    wait_until("the alert fires", || {
        let alerts = report(&scene, &daemon)["alerts"].to_string();
        alerts.contains("PitrDrillWithoutResult")
            && alerts.contains("install it next to wal-archiver")
    });
    let drills = report(&scene, &daemon)["drill_schedule"].clone();
    let error = drills["last_error"].as_str().expect("an error");
    assert!(
        error.contains("pitr-restore was found neither in "),
        "{error}"
    );
    daemon.stop().expect("it stops");
    assert_eq!(scene.recorded().len(), 1);

    // A stop of the daemon ends the drill, which removes its copy.
    let restorer = ours("pitr-restore").expect("it is built");
    let complete = path(&[restorer.parent().expect("a directory"), &bin]);
    scene.configure(&format!("{schedule}{HANGING}"));
    let daemon = start(&mut scene, complete.clone());
    wait_until("the server of the drill runs", || {
        servers_below(scene.base.path()) > 0
    });
    let drills = report(&scene, &daemon)["drill_schedule"].clone();
    assert!(drills["running_since"].is_string(), "{drills}");
    daemon.stop().expect("it stops");
    scene.assert_clean();
    assert_eq!(scene.recorded().len(), 1, "a stopped drill is no result");

    scene.configure(&schedule);
    let mut daemon = start(&mut scene, complete);
    daemon
        .wait_for(|log| log.contains("scheduled_drill_done"))
        .expect("a result");
    wait_until("the alert is over and the next run is known", || {
        let report = report(&scene, &daemon);
        let next = report["drill_schedule"]["next_run"].to_string();
        next.contains("-01-01T03:00:00")
            && report["last_drill"]["passed"] == true
            && !report["alerts"]
                .to_string()
                .contains("PitrDrillWithoutResult")
    });
    daemon.stop().expect("it stops");
    let recorded = scene.recorded();
    assert_eq!(recorded.len(), 2);
    assert!(
        recorded.iter().all(|drill| drill["passed"] == true),
        "{recorded:?}"
    );
    assert_eq!(
        fs::read_dir(&reports).expect("reports").count(),
        2,
        "Markdown and JSON"
    );
    scene.assert_clean();
}
