use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use wal_format::{
    Branch, ClusterName, PgTimestamp, PgVersion, SealedHeader, SealedWriter, SegmentNo,
    SegmentSize, SegmentSummary,
};

use super::*;
use crate::{ObjectMeta, ObjectStore, store::LocalStore};

fn identity(system: u64, major: u16) -> ClusterIdentity {
    ClusterIdentity {
        format_version: 1,
        cluster: "main".parse::<ClusterName>().expect("a name"),
        system_identifier: SystemIdentifier(system),
        postgresql_major: PgVersion::try_from(major).expect("a version"),
        wal_segment_size: SegmentSize::DEFAULT,
        created: PgTimestamp(0),
    }
}

#[test]
fn claims_at_once_leave_two_copies_that_agree() {
    for _ in 0..50 {
        let directory = tempfile::tempdir().expect("a directory");
        let claims = 6;
        let start = std::sync::Barrier::new(claims);
        let agreed: Vec<ClusterIdentity> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..claims)
                .map(|number| {
                    let (root, start) = (directory.path(), &start);
                    scope.spawn(move || {
                        let mut cluster = identity(7, 17);
                        cluster.created = PgTimestamp(i64::try_from(number).expect("small"));
                        let repository = repository(root);
                        start.wait();
                        repository.claim(&cluster).expect("the same cluster")
                    })
                })
                .collect();
            let claimed = threads.into_iter().map(|thread| thread.join());
            claimed.map(|claimed| claimed.expect("no panic")).collect()
        });
        assert!(agreed.iter().all(|known| *known == agreed[0]), "{agreed:?}");
        let cluster = directory.path().join("main");
        let copies = ["epoch", "epoch-copy"].map(|folder| cluster.join(folder));
        let [first, second] = copies.map(|copy| fs::read(copy.join("00000001.json")));
        assert_eq!(first.expect("a copy"), second.expect("a copy"));
    }
}

#[test]
fn a_new_epoch_takes_the_name_and_the_old_one_stays_readable() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = LocalStore::open(directory.path()).expect("a store");
    let repository = Repository::with_store(Arc::new(store), "main".parse().expect("a name"));
    let (old, new) = (identity(1, 14), identity(2, 17));
    assert_eq!(repository.claim(&old).expect("the first"), old);
    let error = repository.claim(&new).expect_err("another cluster");
    assert!(error.to_string().contains("epoch begin"), "{error}");
    assert_eq!(repository.begin_epoch(&old, &new).expect("begun"), 2);
    assert_eq!(repository.begin_epoch(&old, &new).expect("again"), 2);
    assert_eq!(repository.claim(&new).expect("the newest"), new);
    repository.claim(&old).expect_err("it had its time");
    let error = repository.begin_epoch(&old, &identity(3, 17));
    error.expect_err("somebody was faster");
    let past = repository.of_system(SystemIdentifier(1)).expect("known");
    assert_eq!(past.identity().expect("readable"), Some(old));
    let error = repository.of_system(SystemIdentifier(9)).expect_err("none");
    assert!(error.to_string().contains("it has 1, 2"), "{error}");
}

/// Returns whether a listing leaves out a key.
type Hidden = fn(&str) -> bool;

/// A store whose listings leave out what is there.
#[derive(Debug)]
struct HidingStore {
    store: LocalStore,
    hidden: Hidden,
}

impl ObjectStore for HidingStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.store.put_if_absent(key, body)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.store.get(key)
    }

    fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> Result<Bytes> {
        self.store.get_range(key, range)
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.store.head(key)
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        self.store.list(prefix, &mut |object| {
            if (self.hidden)(&object.key) {
                return ControlFlow::Continue(());
            }
            visit(object)
        })
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.store.delete(key)
    }

    fn ready_to_write(&self) -> Result<()> {
        self.store.ready_to_write()
    }

    fn url(&self) -> String {
        self.store.url()
    }

    crate::plain_store_methods!();
}

fn repository(root: &Path) -> Repository {
    let store = LocalStore::open(root).expect("a store");
    Repository::with_store(Arc::new(store), "main".parse().expect("a name"))
}

/// Stores a sealed segment of this cluster.
fn put_segment(repository: &Repository, of: &ClusterIdentity) {
    let header = SealedHeader::of_segment(
        of.system_identifier,
        of.postgresql_major,
        Branch::FIRST,
        of.wal_segment_size,
        SegmentNo(3),
    );
    let mut writer = SealedWriter::new(header, 1).expect("a writer");
    let wal = vec![0; of.wal_segment_size.len()];
    writer.push(&wal).expect("it has room");
    let summary = SegmentSummary::default();
    let proven = Some(PgTimestamp(7));
    let object = writer.finish(&summary, proven).expect("whole");
    repository
        .put(&header.key(), &object)
        .expect("it is stored");
}

fn small(system: u64, major: u16) -> ClusterIdentity {
    ClusterIdentity {
        wal_segment_size: SegmentSize::new(1 << 20).expect("a size"),
        created: PgTimestamp(7),
        ..identity(system, major)
    }
}

fn file(root: &Path, key: &ObjectKey) -> PathBuf {
    root.join(format!("main/{key}"))
}

#[test]
fn each_copy_of_an_epoch_is_enough_and_a_start_writes_the_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let (root, cluster) = (directory.path(), small(1, 14));
    repository(root).claim(&cluster).expect("the first");
    let [first, second] = Epoch::keys(1).map(|key| file(root, &key));
    let content = fs::read(&first).expect("a copy");
    assert_eq!(fs::read(&second).expect("the other copy"), content);
    for lost in [&first, &second] {
        fs::remove_file(lost).expect("it goes");
        let known = repository(root).identity().expect("it is read");
        assert_eq!(known.as_ref(), Some(&cluster));
        repository(root).claim(&cluster).expect("a start");
        assert_eq!(fs::read(lost).expect("it is back"), content);
        // A damaged copy is read over, and stays for `verify --repair`.
        fs::remove_file(lost).expect("it goes");
        fs::write(lost, "garbled").expect("it is garbled");
        let known = repository(root).claim(&cluster).expect("a start");
        assert_eq!(known, cluster);
        assert_eq!(fs::read(lost).expect("a file"), b"garbled");
        fs::remove_file(lost).expect("it goes");
        fs::write(lost, &content).expect("it is put back");
    }
}

#[test]
fn an_identity_that_is_lost_is_derived_from_sealed_objects_and_written_again() {
    for garbled in [false, true] {
        let directory = tempfile::tempdir().expect("a directory");
        let (root, cluster) = (directory.path(), small(9, 17));
        repository(root).claim(&cluster).expect("the first");
        put_segment(&repository(root), &cluster);
        // Neither another folder nor one without an intact object says anything.
        fs::create_dir_all(root.join("main/77/wal/00000001/00000000")).expect("a folder");
        fs::write(root.join("main/77/wal/00000001/00000000/x.zst"), "x").expect("a file");
        for key in Epoch::keys(1) {
            let path = file(root, &key);
            fs::remove_file(&path).expect("it goes");
            if garbled {
                fs::write(&path, "{}").expect("it is garbled");
            }
        }
        let found = repository(root).read_epochs().expect("it is read");
        assert!(
            found.unnamed.is_empty() && found.lost.is_empty(),
            "{found:?}"
        );
        assert!(found.known[0].is_derived(), "{found:?}");
        let known = repository(root).identity_to_restore().expect("it is read");
        assert_eq!(known.as_ref(), Some(&cluster));
        let error = repository(root)
            .claim(&identity(8, 17))
            .expect_err("another");
        assert!(error.is_mismatch(), "{error}");
        assert_eq!(repository(root).claim(&cluster).expect("a start"), cluster);
        let found = repository(root).read_epochs().expect("it is read");
        assert_eq!(found.known[0].is_derived(), garbled);
        assert_eq!(found.known[0].identity, cluster);
    }
}

#[test]
fn sealed_wal_that_no_epoch_names_is_never_passed_over() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let (old, new) = (small(1 << 32, 14), small(2 << 32, 17));
    let repository = repository(root);
    repository.claim(&old).expect("the first");
    put_segment(&repository, &old);
    repository.begin_epoch(&old, &new).expect("begun");
    put_segment(&repository, &new);
    let [first, second] = [1, 2].map(|number| Epoch::keys(number).map(|key| file(root, &key)));

    // An older epoch has one place only.
    for path in &first {
        fs::remove_file(path).expect("it goes");
    }
    let epochs = repository.epochs().expect("they are read");
    assert_eq!(epochs, [(1, old.clone()), (2, new.clone())]);
    let past = repository.of_system(old.system_identifier).expect("known");
    assert_eq!(past.identity().expect("readable"), Some(old.clone()));

    // The newest one may be another cluster's.
    repository.heal_epoch(&repository.read_epochs().expect("read").known[0]);
    for path in &second {
        fs::remove_file(path).expect("it goes");
    }
    assert_eq!(repository.identity().expect("readable"), Some(old.clone()));
    let error = repository.identity_to_restore().expect_err("which one?");
    assert!(error.to_string().contains("--system"), "{error}");
    let chosen = repository.of_system(new.system_identifier).expect("chosen");
    assert_eq!(
        chosen.identity_to_restore().expect("readable"),
        Some(new.clone())
    );
    assert_eq!(repository.begin_epoch(&old, &new).expect("begun again"), 2);
    assert_eq!(
        repository.identity_to_restore().expect("readable"),
        Some(new)
    );
}

#[test]
fn an_epoch_that_the_listing_hides_is_read_and_one_that_it_invents_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let cluster = small(9, 17);
    repository(directory.path())
        .claim(&cluster)
        .expect("the first");
    let hiding = |hidden: Hidden| {
        let store = LocalStore::open(directory.path()).expect("a store");
        let store = HidingStore { store, hidden };
        Repository::with_store(Arc::new(store), "main".parse().expect("a name"))
    };
    for hidden in [
        (|key| key.contains("/epoch")) as Hidden,
        |key| key.contains("/epoch/"),
        |key| key.contains("/epoch-copy/"),
    ] {
        let known = hiding(hidden).claim(&cluster).expect("a start");
        assert_eq!(known, cluster);
    }
}

/// Earlier builds wrote it without a sum, and only once.
#[test]
fn an_epoch_of_an_earlier_build_is_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = file(directory.path(), &ObjectKey::Epoch(1));
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    for fixture in [
        &include_bytes!("fixtures/epoch-1-without-sum.json")[..],
        include_bytes!("fixtures/epoch-1.json"),
    ] {
        fs::write(&path, fixture).expect("an epoch");
        let known = repository(directory.path()).identity().expect("it is read");
        assert_eq!(known, Some(small(7_432_188_851_234_567_890, 17)));
        drop(fs::remove_file(file(
            directory.path(),
            &ObjectKey::EpochCopy(1),
        )));
    }
    // A newer format is not taken for damage, which would be derived.
    let newer = String::from_utf8_lossy(include_bytes!("fixtures/epoch-1-without-sum.json"))
        .replace("\"format_version\": 1", "\"format_version\": 2");
    fs::write(&path, newer).expect("an epoch");
    let error = repository(directory.path()).identity().expect_err("newer");
    assert!(error.to_string().contains("newer Tidemark"), "{error}");
}

#[test]
fn a_damaged_newest_epoch_without_objects_leaves_the_chosen_one_readable() {
    let directory = tempfile::tempdir().expect("a directory");
    let one = small(1, 17);
    let repository = repository(directory.path());
    repository.claim(&one).expect("claimed");
    put_segment(&repository, &one);
    let stray = file(directory.path(), &ObjectKey::Epoch(2));
    fs::write(stray, "hello").expect("another program wrote it");
    let error = repository.identity().expect_err("the newest is damaged");
    let error = error.to_string();
    for part in ["epoch/00000002.json", "remove both", "--system 1"] {
        assert!(error.contains(part), "{error}");
    }
    let chosen = repository
        .of_system(SystemIdentifier(1))
        .expect("it is there");
    assert_eq!(chosen.identity().expect("it reads"), Some(one));
}
