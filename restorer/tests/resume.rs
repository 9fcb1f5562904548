//! A restore that is killed or meets a full disk: the result never starts and never looks complete,
//! and running the same command again completes it.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::Instant,
};

use testbed::programs::{command, directory, succeed};

use crate::{
    scene::{MARKER, Scene, owned},
    support::{Chance, long, said},
};

#[test]
fn killed_at_any_moment_it_never_looks_done_and_is_finished_by_the_same_command() {
    let Some(scene) = Scene::make() else { return };
    let root = directory().expect("a directory");
    let began = Instant::now();
    succeed(&mut scene.restore(root.path())).expect("a restore");
    let whole = began.elapsed();
    scene.prove(root);
    eprintln!("a whole restore takes {whole:?}");

    let mut chance = Chance::new();
    let (mut unfinished, mut done) = (0, 0);
    let kills = if long() { 50 } else { 10 };
    let mut root = directory().expect("a directory");
    let foreign = scene.places.path().join("foreign");
    fs::create_dir(&foreign).expect("a directory");
    fs::write(foreign.join("precious"), "somebody's").expect("a file");
    for kill in 0..kills {
        let mut child = scene
            .restore(root.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it runs");
        let moment =
            whole.mul_f64(f64::from(u32::try_from(chance.below(1000)).expect("small")) / 1000.0);
        sleep(moment);
        child.kill().expect("kill -9");
        child.wait().expect("it is gone");
        let data = root.path().join("data");
        if data.join("global/pg_control").exists() {
            // Everything exists when pg_control does. Only the marker may remain.
            scene.verify(&data);
            done += 1;
        } else if data.join(MARKER).exists() {
            scene.assert_unfinished(&data);
            unfinished += 1;
            // A restore may empty only directories that it named itself, not those of the new
            // command line.
            let mut again = scene.archived.pitr_restore();
            again
                .arg("--target-dir")
                .arg(&data)
                .arg(scene.mapping(&foreign));
            let refused = again.output().expect("it runs");
            assert_eq!(refused.status.code(), Some(2), "{:?}", said(&refused));
            assert!(foreign.join("precious").exists());
        } else {
            let held = fs::read_dir(&data).map_or(0, Iterator::count);
            assert!(held <= 1, "{held} files without a marker");
        }
        let finished = data.join("global/pg_control").exists() && !data.join(MARKER).exists();
        if finished || kill % 3 == 2 || kill + 1 == kills {
            if finished {
                let refused = scene.restore(root.path()).output().expect("it runs");
                let (_, error) = said(&refused);
                assert_eq!(refused.status.code(), Some(2), "{error}");
                assert!(
                    error.contains("holds a restore that is complete"),
                    "{error}"
                );
            } else {
                succeed(&mut scene.restore(root.path())).expect("the same command finishes it");
            }
            scene.prove(root);
            root = directory().expect("a directory");
        }
    }
    eprintln!("{kills} kills: {unfinished} left it unfinished, {done} came when it was done");
    assert!(unfinished > 0, "no kill came while it was under way");
}

#[test]
fn a_full_disk_is_said_and_the_same_command_goes_on_when_there_is_room() {
    let Some(scene) = Scene::make() else { return };
    let root = directory().expect("a directory");
    let disk = owned(&root.path().join("disk"));
    let mounted = mount(&["-t", "tmpfs", "-o", "size=16M,mode=777", "tmpfs"], &disk);
    let mut restore = scene.restore(&disk);
    // The space is known to be too little: as if another program took it during the copy.
    restore.arg("--force");
    let output = if mounted {
        restore.output()
    } else {
        // Where mounting is impossible, limit the size of files instead.
        let mut limited = command(Path::new("/bin/sh")).expect("a shell");
        limited.args(["-c", "trap '' XFSZ; ulimit -f 2000; exec \"$@\"", "sh"]);
        limited.arg(restore.get_program()).args(restore.get_args());
        limited.output()
    };
    let output = output.expect("it runs");
    let (_, error) = said(&output);
    let outcome = std::panic::catch_unwind(|| {
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(
            error.contains("make room and run the same command again"),
            "{error}"
        );
        assert!(error.contains(&disk.display().to_string()), "{error}");
        scene.assert_unfinished(&disk.join("data"));
        assert!(
            !mounted || mount(&["-o", "remount,size=1G"], &disk),
            "a larger disk"
        );
        succeed(&mut scene.restore(&disk)).expect("the same command finishes it");
        scene.verify(&disk.join("data"));
        assert!(!disk.join("data").join(MARKER).exists());
    });
    if mounted {
        let unmounted = Command::new("umount").arg(&disk).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "umount");
    }
    outcome.expect("what was asserted above");
}

fn mount(arguments: &[&str], place: &Path) -> bool {
    let mut mount = Command::new("mount");
    let status = mount
        .args(arguments)
        .arg(place)
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}
