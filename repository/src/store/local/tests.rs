use std::sync::Arc;

use super::*;
use crate::store::testing::conformance;

#[test]
fn the_folder_passes_the_conformance_suite() {
    let directory = tempfile::tempdir().expect("a directory");
    let store: Arc<dyn ObjectStore> =
        Arc::new(LocalStore::open(directory.path()).expect("a store"));
    conformance(&store, 20);
    // The conformance suite has removed the only object below it; the directory is still there.
    assert!(directory.path().join("c/d").is_dir());
    assert_eq!(store.folders("c/").expect("it lists"), Vec::<String>::new());
}

#[test]
fn only_regular_files_are_objects() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = LocalStore::open(directory.path()).expect("a store");
    let path = |name: &str| directory.path().join(name);
    let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), fifo, mode, 0).expect("a FIFO");
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).expect("a socket");
    fs::create_dir(path("directory")).expect("a directory");
    std::os::unix::fs::symlink("/dev/zero", path("device")).expect("a link");
    for key in ["fifo", "socket", "directory", "device"] {
        for error in [
            store.get(key).expect_err(key),
            store.get_range(key, 0..1).expect_err(key),
            store.holds(key, b"x").expect_err(key),
        ] {
            assert!(matches!(error, Error::Damaged { .. }), "{key}: {error}");
        }
    }
}

fn pinned(root: &Path) -> LocalStore {
    let store = LocalStore::open(root).expect("a store");
    store.put_if_absent("main/epoch/1", b"one").expect("a put");
    let witness = store.witness("main/epoch/1").expect("an answer");
    store.pin(Pin {
        witnesses: vec![witness.expect("it is there")],
        system: "7".to_owned(),
        record: None,
    });
    store
}

#[test]
fn another_folder_in_the_same_place_takes_nothing_and_proves_nothing_absent() {
    let directory = tempfile::tempdir().expect("a directory");
    let (root, aside) = (directory.path().join("r"), directory.path().join("aside"));
    let store = pinned(&root);
    store.put_if_absent("main/a", b"a").expect("a put");
    durable::rename(&root, &aside).expect("it goes");
    let refused = |store: &LocalStore| {
        let error = store.put_if_absent("main/b", b"b").expect_err("no put");
        assert!(error.is_gone(), "{error}");
        assert!(store.get("main/c").expect_err("no get").is_gone());
        assert!(store.head("main/c").expect_err("no head").is_gone());
        let listed = store.list("main/", &mut |_| ControlFlow::Continue(()));
        assert!(listed.expect_err("no listing").is_gone());
        assert!(store.folders("main/").expect_err("no folders").is_gone());
        assert!(store.delete("main/a").expect_err("no removal").is_gone());
    };
    refused(&store);
    assert!(!root.exists(), "nothing creates it");
    fs::create_dir(&root).expect("a mount point");
    refused(&store);
    assert_eq!(fs::read_dir(&root).expect("it lists").count(), 0);
    fs::remove_dir(&root).expect("it goes");
    durable::rename(&aside, &root).expect("it is back");
    let outcome = store.put_if_absent("main/b", b"b").expect("a put");
    assert_eq!(outcome, PutOutcome::Created);
}

#[test]
fn what_was_written_while_the_folder_went_does_not_count() {
    let directory = tempfile::tempdir().expect("a directory");
    let (root, aside) = (directory.path().join("r"), directory.path().join("aside"));
    let store = pinned(&root);
    let folder = Entered::open(&store).expect("it is there");
    durable::rename(&root, &aside).expect("it goes");
    fs::create_dir(&root).expect("a mount point");
    folder.create_parent("main/x/y").expect("in the old one");
    assert!(aside.join("main/x").is_dir());
    assert!(folder.leave().expect_err("it is hidden").is_gone());
    assert_eq!(fs::read_dir(&root).expect("it lists").count(), 0);
}
