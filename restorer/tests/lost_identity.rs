//! The cluster's identity is lost, and the primary with it: whatever is left of its two copies,
//! everything is restored.

use std::{fs, path::PathBuf};

use testbed::{programs::succeed, restored::Restored};

use crate::support::{Archived, query, said, servers};

const ROWS: &str = "SELECT count(*) FROM load";

struct Scene {
    archived: Archived,
    bin: PathBuf,
}

impl Scene {
    fn copies(&self) -> [PathBuf; 2] {
        let repository = self.archived.place.path().join("repository/main");
        ["epoch", "epoch-copy"].map(|folder| repository.join(folder).join("00000001.json"))
    }

    /// The exit code of `wal-archiver`, and what it said.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut program = self.archived.place.program("wal-archiver").expect("built");
        let output = program.args(arguments).output().expect("it runs");
        let (out, error) = said(&output);
        (output.status.code(), format!("{out}\n{error}"))
    }

    /// Repairs the identity from what is left, and finds both copies again.
    fn repair(&self, from: &str) {
        let (code, said) = self.run(&["verify"]);
        assert_eq!(code, Some(4), "{said}");
        assert!(said.contains("00000001.json"), "{said}");
        let (code, said) = self.run(&["verify", "--repair"]);
        assert_eq!(code, Some(0), "{said}");
        assert!(
            said.contains(&format!("was repaired from {from}")),
            "{said}"
        );
        let [first, second] = self.copies().map(|path| fs::read(path).expect("a copy"));
        assert_eq!(first, second);
    }
}

#[test]
fn an_archive_without_its_identity_is_restored_and_repaired() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.backup();
    archived.sql("CREATE TABLE load AS SELECT n, repeat('x', 700) FROM generate_series(1, 6000) n");
    archived.finish();
    archived.cluster.stop().expect("the primary is lost");
    let scene = Scene { archived, bin };
    let [first, second] = scene.copies();
    let stored = fs::read(&first).expect("a copy");
    assert_eq!(fs::read(&second).expect("a copy"), stored);

    fs::remove_file(&second).expect("it goes");
    scene.repair("epoch/00000001.json");
    fs::write(&first, "{ garbled").expect("it is garbled");
    scene.repair("epoch-copy/00000001.json");
    assert_eq!(fs::read(&first).expect("a copy"), stored);

    for garbled in [true, false] {
        for copy in scene.copies() {
            fs::remove_file(&copy).expect("it goes");
            if garbled {
                fs::write(&copy, "{ garbled").expect("it is garbled");
            }
        }
        let mut list = scene.archived.pitr_restore();
        let output = list.args(["list", "--json"]).output().expect("it runs");
        let (listing, warning) = said(&output);
        assert!(output.status.success(), "{warning}");
        assert!(warning.contains("derived from sealed objects"), "{warning}");
        assert!(listing.contains("\"usable\": true"), "{listing}");
        for command in [["catalog", "rebuild"].as_slice(), &["status"]] {
            let (code, said) = scene.run(command);
            assert_eq!(code, Some(0), "{said}");
        }
        if !garbled {
            let restored = Restored::start::<&str>(&scene.archived.place, &scene.bin, &[]);
            let restored = restored.expect("everything");
            assert_eq!(query(&restored.conninfo(), ROWS), "6000");
        }
        scene.repair("what sealed objects say");
    }

    // An archive of an earlier build has it once: the next start writes the other copy.
    fs::remove_file(&second).expect("it goes");
    let primary = scene.archived.cluster.conninfo();
    let mut daemon = scene
        .archived
        .place
        .spawn(&primary, "127.0.0.1:0")
        .expect("it starts");
    daemon
        .wait_for(|log| log.contains("epoch_copy_written"))
        .expect("the copy is written");
    daemon.stop().expect("it stops");
    assert_eq!(
        fs::read(&second).expect("a copy"),
        fs::read(&first).expect("a copy")
    );
    let mut verify = scene.archived.place.program("wal-archiver").expect("built");
    succeed(verify.args(["verify", "--deep"])).expect("nothing is missing");
}
