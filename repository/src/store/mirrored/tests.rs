//! Two folders as one repository: a place that fails delays no caller and catches up later, and a
//! damaged object is read from the other place.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use super::*;
use crate::store::{LocalStore, testing::conformance};

/// A folder that is away while `away` is set.
#[derive(Debug)]
struct Flaky {
    store: LocalStore,
    away: Arc<AtomicBool>,
}

impl Flaky {
    fn here(&self) -> Result<&LocalStore> {
        if self.away.load(Ordering::SeqCst) {
            return Err(Error::S3 {
                action: "ask",
                key: String::new(),
                url: self.store.url(),
                problem: "no route".to_owned(),
                transient: true,
            });
        }
        Ok(&self.store)
    }
}

impl ObjectStore for Flaky {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.here()?.put_if_absent(key, body)
    }
    fn get(&self, key: &str) -> Result<Bytes> {
        self.here()?.get(key)
    }
    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.here()?.get_range(key, range)
    }
    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.here()?.head(key)
    }
    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        self.here()?.list(prefix, visit)
    }
    fn delete(&self, key: &str) -> Result<()> {
        self.here()?.delete(key)
    }
    fn ready_to_write(&self) -> Result<()> {
        self.here()?.ready_to_write()
    }
    fn url(&self) -> String {
        self.store.url()
    }

    crate::plain_store_methods!();
}

fn pair(directory: &Path, required: Required) -> (MirroredStore, [Arc<AtomicBool>; 2]) {
    let away = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let stores = ["a", "b"].into_iter().zip(&away).map(|(name, away)| {
        let store = LocalStore::open(&directory.join(name)).expect("a folder");
        let away = Arc::clone(away);
        Arc::new(Flaky { store, away }) as Arc<dyn ObjectStore>
    });
    let store = MirroredStore::new(stores.collect(), "main", required).expect("it opens");
    (store, away)
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

const SEGMENT: &str = "main/7/wal/00000001/00000000/000000010000000000000001.zst";
const TAIL: &str =
    "main/7/tail/00000001/000000010000000000000001/0000000001000000-0000000001002000.zst";

#[test]
fn several_stores_are_a_store() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, _) = pair(directory.path(), Required::All);
    let store: Arc<dyn ObjectStore> = Arc::new(store);
    conformance(&store, 0);
}

#[test]
fn a_place_that_is_away_holds_up_nobody_and_catches_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, [first, second]) = pair(directory.path(), Required::Any);
    store.keep_in_step();
    let is_in = |place: &str, key: &str| directory.path().join(place).join(key).exists();
    for (away, place) in [(&second, "b"), (&first, "a")] {
        away.store(true, Ordering::SeqCst);
        let segment = SEGMENT
            .replace("0001.zst", &format!("000{place}.zst").to_uppercase())
            .replace(".ZST", ".zst");
        let epoch = format!("main/epoch/0000000{}.json", u8::from(place == "a") + 1);
        for key in [&segment, &epoch] {
            store.put_if_absent(key, b"wal").expect("one is enough");
            assert_eq!(store.get(key).expect("a get"), &b"wal"[..]);
        }
        assert!(!is_in(place, &segment));
        wait_for("it is known", || {
            let states = store.states();
            states
                .iter()
                .any(|state| state.behind && state.lag_seconds > 0.0)
        });
        let absent = store.get("main/nothing").expect_err("it is nowhere");
        assert!(
            !absent.is_not_found(),
            "what a place that is away has is not known: {absent}"
        );
        away.store(false, Ordering::SeqCst);
        wait_for("it catches up", || {
            is_in(place, &segment) && is_in(place, &epoch)
        });
        wait_for("nothing is behind", || {
            store
                .states()
                .iter()
                .all(|state| !state.behind && state.error.is_none() && state.lag_seconds == 0.0)
        });
        let absent = store.get("main/nothing").expect_err("it is nowhere");
        assert!(absent.is_not_found());
    }
}

#[test]
fn a_place_that_missed_an_object_is_behind_until_it_was_compared() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, [first, second]) = pair(directory.path(), Required::Any);
    store.keep_in_step();
    wait_for("both are compared", || {
        store.states().iter().all(|state| !state.behind)
    });
    second.store(true, Ordering::SeqCst);
    store.put_if_absent(SEGMENT, b"wal").expect("one is enough");
    wait_for("the second place missed it", || store.states()[1].behind);
    first.store(true, Ordering::SeqCst);
    second.store(false, Ordering::SeqCst);
    wait_for("the second place answers", || {
        store.states()[1].error.is_none()
    });
    assert!(store.states()[1].behind, "nothing could be compared");
    // It takes objects meanwhile, and does not prove WAL alone.
    let later = SEGMENT.replace("0001.zst", "0002.zst");
    store
        .put_if_absent(&later, b"more")
        .expect_err("it lacks other WAL");
    assert!(directory.path().join("b").join(&later).exists());
    first.store(false, Ordering::SeqCst);
    wait_for("each place has both", || {
        let states = store.states();
        let has = |place: &str, key: &str| directory.path().join(place).join(key).exists();
        states.iter().all(|state| !state.behind)
            && ["a", "b"]
                .iter()
                .all(|place| has(place, SEGMENT) && has(place, &later))
    });
}

#[test]
fn a_place_that_was_exchanged_for_an_older_copy_is_filled_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, _) = pair(directory.path(), Required::All);
    store.keep_in_step();
    let later = SEGMENT.replace("0001.zst", "0002.zst");
    for key in [SEGMENT, &later] {
        store.put_if_absent(key, b"wal").expect("in both");
    }
    let in_step = || store.states().iter().all(|state| !state.behind);
    wait_for("both are compared", in_step);
    store.check_each(&later);
    assert!(in_step(), "both have it");
    let older = || store.states().into_iter().map(|state| state.older);
    assert_eq!(older().flatten().count(), 0);
    for key in [SEGMENT, &later] {
        fs::remove_file(directory.path().join("b").join(key)).expect("it goes");
    }
    store.check_each(&later);
    wait_for("it has both again", || {
        let has = |key: &str| directory.path().join("b").join(key).exists();
        in_step() && has(SEGMENT) && has(&later)
    });
    // The operator has to know of it, although it is filled already.
    let older: Vec<Option<String>> = older().collect();
    assert_eq!(older[0], None);
    let problem = older[1].as_deref().expect("it is named");
    assert!(problem.contains(&later), "{problem}");
}

#[test]
fn a_tail_goes_only_when_its_segment_is_there() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, [_, second]) = pair(directory.path(), Required::Any);
    store.put_if_absent(TAIL, b"tail").expect("a put");
    let tail = directory.path().join("b").join(TAIL);
    wait_for("both have the tail", || tail.exists());
    second.store(true, Ordering::SeqCst);
    store.put_if_absent(SEGMENT, b"segment").expect("a put");
    store.delete(TAIL).expect("a delete");
    assert!(tail.exists(), "it was away");
    second.store(false, Ordering::SeqCst);
    store.keep_in_step();
    wait_for("it catches up", || !tail.exists());
    assert!(directory.path().join("b").join(SEGMENT).exists());
    assert!(!directory.path().join("a").join(TAIL).exists());
}

#[test]
fn all_means_all() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, [_, second]) = pair(directory.path(), Required::All);
    second.store(true, Ordering::SeqCst);
    let refused = store
        .put_if_absent("main/x", b"x")
        .expect_err("one is away");
    assert!(refused.is_transient(), "{refused}");
    second.store(false, Ordering::SeqCst);
    wait_for("it is asked again", || {
        store.put_if_absent("main/x", b"x").is_ok()
    });
    assert!(directory.path().join("b/main/x").exists());
}

#[test]
fn a_damaged_object_is_read_from_the_other_place() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, _) = pair(directory.path(), Required::All);
    store.put_if_absent("main/x", b"sound").expect("a put");
    fs::write(directory.path().join("a/main/x"), b"wrong").expect("a file");
    let sound = |bytes: &Bytes| &bytes[..] == b"sound";
    assert_eq!(
        store.get_sound("main/x", &sound).expect("it"),
        &b"sound"[..]
    );
    fs::write(directory.path().join("b/main/x"), b"WRONG").expect("a file");
    let unsound = store.get_sound("main/x", &sound).expect("as it is");
    assert_eq!(unsound, &b"wrong"[..]);
    fs::remove_file(directory.path().join("a/main/x")).expect("a file");
    assert_eq!(store.get("main/x").expect("a get"), &b"WRONG"[..]);
}

#[test]
fn what_expired_in_one_place_is_not_brought_back_from_the_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, _) = pair(directory.path(), Required::All);
    let epoch = r#"{"format_version": 1, "cluster": "main", "system_identifier": "7", "postgresql_major": 17,
        "wal_segment_size": 16777216, "created": "2026-11-21T10:00:00Z"}"#;
    let record = r#"{"format_version": 1, "id": "20261121T101500Z-9f3c", "marked": "2026-11-21T10:15:00Z", "policy": "",
        "backups": [{"id": "20261101T101500Z-9f3c", "finished": "2026-11-01T10:15:00Z"}], "windows": [],
        "wal": [{"branch": "00000001", "from_lsn": "0/1000000", "to_lsn": "0/2000000"}]}"#;
    let old_backup = "main/7/backup/20261101T101500Z-9f3c/backup.json";
    let next = SEGMENT.replace("0001.zst", "0002.zst");
    let here = |place: &str, key: &str| directory.path().join(place).join(key);
    for (places, key, body) in [
        (&["a", "b"][..], "main/epoch/00000001.json", epoch),
        (&["a"], "main/7/expired/20261121T101500Z-9f3c.json", record),
        (&["b"], SEGMENT, "wal"),
        (&["b"], old_backup, "{}"),
        (&["b"], &next, "wal"),
    ] {
        for place in places {
            let path = here(place, key);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, body).expect("a file");
        }
    }
    store.keep_in_step();
    wait_for("the other place's own is copied", || {
        here("a", &next).exists()
    });
    wait_for("nothing is behind", || {
        store.states().iter().all(|state| !state.behind)
    });
    assert!(!here("a", SEGMENT).exists() && !here("a", old_backup).exists());
    assert!(here("b", SEGMENT).exists(), "the other keeps longer");
    assert!(!here("b", "main/7/expired").exists(), "each has its own");
}
