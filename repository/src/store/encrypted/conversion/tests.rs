//! A conversion that ends after any number of operations, and concurrent readers.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use wal_format::{Branch, SegmentName, SegmentNo, SegmentSize, SystemIdentifier, TimelineId};

use super::*;
use crate::{ObjectMeta, ObjectStore, encryption::KeyRing, store::LocalStore};

const KEY: &str = "1111111111111111111111111111111111111111111111111111111111111111";
const SEGMENTS: u64 = 40;

/// A folder in which only a number of changes succeed.
#[derive(Debug)]
struct Limited {
    inner: LocalStore,
    left: AtomicUsize,
    /// True if the plain form of a segment is locked.
    has_locks: bool,
}

impl Limited {
    fn change(&self) -> Result<()> {
        let left = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            });
        left.map(drop).map_err(|_| Error::config("killed"))
    }
}

impl ObjectStore for Limited {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.change()?;
        self.inner.put_if_absent(key, body)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.inner.get(key)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.inner.get_range(key, range)
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.inner.head(key)
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        self.inner.list(prefix, visit)
    }

    fn delete(&self, key: &str) -> Result<()> {
        if self.has_locks && key.ends_with(".zst") {
            return Err(Error::Locked {
                key: key.to_owned(),
                url: self.url(),
                problem: "a test".to_owned(),
            });
        }
        self.change()?;
        self.inner.delete(key)
    }

    fn ready_to_write(&self) -> Result<()> {
        self.inner.ready_to_write()
    }

    fn url(&self) -> String {
        self.inner.url()
    }

    crate::plain_store_methods!();
}

fn open(folder: &Path, changes: usize, has_locks: bool) -> EncryptedStore {
    let inner = LocalStore::open(folder).expect("a folder");
    let left = AtomicUsize::new(changes);
    let limited = Limited {
        inner,
        left,
        has_locks,
    };
    let ring = KeyRing::parse(KEY).expect("a key");
    EncryptedStore::new(Arc::new(limited), "main", Arc::new(ring))
}

fn unlimited(folder: &Path) -> EncryptedStore {
    open(folder, usize::MAX, false)
}

fn content(key: &str) -> Vec<u8> {
    key.bytes().cycle().take(100_000).collect()
}

/// Fills a folder with a plain archive, and returns the names of its objects.
fn plain_archive(folder: &Path) -> Vec<String> {
    let store = LocalStore::open(folder).expect("a folder");
    let size = SegmentSize::new(16 << 20).expect("a size");
    let segments = (1..=SEGMENTS).map(|number| {
        let name = SegmentName::new(TimelineId::FIRST, SegmentNo(number), size);
        ObjectKey::Segment(SystemIdentifier(7), Branch::FIRST, name)
    });
    let epochs = [ObjectKey::Epoch(1), ObjectKey::EpochCopy(1)];
    let mut names: Vec<String> = epochs
        .into_iter()
        .chain(segments)
        .map(|key| format!("main/{key}"))
        .collect();
    names.sort_unstable();
    for name in &names {
        store.put_if_absent(name, &content(name)).expect("a put");
    }
    names
}

fn assert_whole(store: &EncryptedStore, names: &[String]) {
    let mut listed = Vec::new();
    let list = store.list("main/", &mut |object| {
        listed.push(object.key);
        ControlFlow::Continue(())
    });
    list.expect("it lists");
    assert_eq!(listed, names);
    for name in names {
        let content = content(name);
        assert_eq!(store.get(name).expect("a get"), content, "{name}");
        let part = store.get_range(name, 70_000..70_005).expect("a range");
        assert_eq!(part, content[70_000..70_005], "{name}");
        let head = store.head(name).expect("a head").expect("it is there");
        assert_eq!(head.size, 100_000, "{name}");
        let again = store.put_if_absent(name, b"other").expect("an answer");
        assert_eq!(again, PutOutcome::AlreadyExists, "{name}");
    }
}

fn finish(store: &EncryptedStore) -> Result<Conversion> {
    store.begin_conversion()?;
    store.convert(&|_, _| {})
}

#[test]
fn a_conversion_that_ends_at_any_change_is_readable_and_goes_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let names = plain_archive(directory.path());
    let readable = unlimited(directory.path());
    let refused = readable.get("main/epoch/00000001.json");
    assert!(refused.is_err(), "no conversion has begun");
    let listed = readable.list("main/epoch", &mut |_| ControlFlow::Break(()));
    let said = listed.expect_err("it is plain").to_string();
    assert!(said.contains("`wal-archiver key encrypt`"), "{said}");
    let mut runs = 0;
    // Each run makes a few changes more than the one before, and then ends.
    loop {
        let ended = finish(&open(directory.path(), runs, false));
        let state = unlimited(directory.path()).encryption_state();
        let state = state.expect("a state");
        if state == EncryptionState::Plain {
            let listed =
                unlimited(directory.path()).list("main/epoch", &mut |_| ControlFlow::Break(()));
            listed.expect_err("a data key alone encrypts nothing");
        } else {
            assert_whole(&unlimited(directory.path()), &names);
        }
        if let Ok(done) = ended {
            assert!(done.is_done && state == EncryptionState::Encrypted);
            break;
        }
        runs += 1;
    }
    assert!(runs > 10, "{runs}");
    let (plain, foreign) = readable.plain_names().expect("it lists");
    assert!(
        plain.is_empty() && foreign.is_empty(),
        "{plain:?} {foreign:?}"
    );
    // From now on a plain object is an object of another program.
    let raw = LocalStore::open(directory.path()).expect("a folder");
    let stray = names[0].replace("01.zst", "FF.zst");
    raw.put_if_absent(&stray, b"forged").expect("a put");
    let store = unlimited(directory.path());
    assert!(store.get(&stray).expect_err("it is ignored").is_not_found());
    assert_eq!(store.plain_objects().expect("it lists"), [stray]);
}

/// A second record that another program wrote must not hide the objects that are still plain.
#[test]
fn a_forged_end_of_a_conversion_hides_nothing_and_ends_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let names = plain_archive(directory.path());
    let begun = unlimited(directory.path());
    begun.begin_conversion().expect("it begins");
    let raw = LocalStore::open(directory.path()).expect("a folder");
    let done = format!("main/{DONE}");
    raw.put_if_absent(&done, b"forged").expect("a put");
    let store = unlimited(directory.path());
    assert_whole(&store, &names);
    store.check_keys().expect("the keys are there");
    assert_whole(&store, &names);
    let state = store.encryption_state().expect("a state");
    assert_eq!(state, EncryptionState::Converting);
    let error = store.convert(&|_, _| {}).expect_err("it does not end");
    assert!(error.to_string().contains("not authentic"), "{error}");
    raw.delete(&done).expect("it is removed");
    assert!(finish(&store).expect("it ends").is_done);
    assert_whole(&unlimited(directory.path()), &names);
}

#[test]
fn objects_are_readable_at_every_moment_of_a_conversion() {
    let directory = tempfile::tempdir().expect("a directory");
    let names = plain_archive(directory.path());
    let converting = unlimited(directory.path());
    converting.begin_conversion().expect("it begins");
    let (reader, is_over) = (unlimited(directory.path()), AtomicBool::new(false));
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut rounds = 0;
            while !is_over.load(Ordering::Relaxed) || rounds == 0 {
                assert_whole(&reader, &names);
                rounds += 1;
            }
        });
        let done = converting.convert(&|_, _| {});
        is_over.store(true, Ordering::Relaxed);
        assert!(done.expect("it ends").is_done);
        reading.join().expect("every object was there");
    });
    assert_whole(&reader, &names);
}

#[test]
fn locked_objects_are_counted_and_a_forged_record_opens_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let names = plain_archive(directory.path());
    let locked = open(directory.path(), usize::MAX, true);
    let ended = finish(&locked).expect("the rest is encrypted");
    assert!(!ended.is_done && ended.locked_until.is_none());
    assert_eq!(ended.locked.len() as u64, SEGMENTS);
    assert_whole(&unlimited(directory.path()), &names);
    // The locks have ended.
    let ended = finish(&unlimited(directory.path())).expect("it ends");
    assert!(ended.is_done && ended.encrypted as u64 == SEGMENTS);
    assert_whole(&unlimited(directory.path()), &names);

    let raw = LocalStore::open(directory.path()).expect("a folder");
    raw.delete(&format!("main/{DONE}"))
        .expect("a forger removes it");
    raw.put_if_absent(&format!("main/{BEGUN}"), b"forged")
        .expect("a put");
    let stray = names[0].replace("0001", "0002");
    raw.put_if_absent(&stray, b"forged").expect("a put");
    let store = unlimited(directory.path());
    assert!(store.get(&stray).expect_err("it is ignored").is_not_found());
}
