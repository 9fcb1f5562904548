//! A removal that was decided is completed after every interruption. The tests use a store that
//! fails at each deletion in turn, a store that deletes nothing, two hosts that decide at the same
//! time, and concurrent readers.

use std::{
    collections::BTreeMap,
    ops::{ControlFlow, Range},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use wal_format::{
    BackupId, BackupInfo, BackupKind, BackupSlice, Branch, FrameCompressor, Lsn, ObjectKey,
    PgTimestamp, PgVersion, SealedHeader, SegmentSize, SegmentSummary, SystemIdentifier,
    TransactionEnd, TransactionEndKind, layout::BackupArchive, sealed::seal,
};

use catalog::Catalog;
use repository::expire::{
    ExpirePlan, Holding, RetentionPolicy, Swept, due, mark, plan_expire, sweep,
};
use repository::{
    ClusterIdentity, Error, ExpiredSet, ObjectMeta, ObjectStore, PutOutcome, Repository, Result,
    store::LocalStore,
};

const SYSTEM: SystemIdentifier = SystemIdentifier(7);
const HOUR: i64 = 3_600_000_000;
const NOW: PgTimestamp = PgTimestamp(1000 * HOUR);

/// A store that deletes `deletions` objects. After that it fails, or reports that objects are
/// locked.
#[derive(Debug)]
struct Moody {
    store: LocalStore,
    deletions: AtomicUsize,
    locks: bool,
    asked: AtomicUsize,
}

impl ObjectStore for Moody {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.store.put_if_absent(key, body)
    }
    fn get(&self, key: &str) -> Result<Bytes> {
        self.store.get(key)
    }
    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
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
        self.store.list(prefix, visit)
    }
    fn delete(&self, key: &str) -> Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let left = self
            .deletions
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        let (key_, url) = (key.to_owned(), self.url());
        match (left, self.locks) {
            (Ok(_), _) => self.store.delete(key),
            (Err(_), true) => Err(Error::Locked {
                key: key_,
                url,
                problem: "AccessDenied".to_owned(),
            }),
            (Err(_), false) => Err(Error::S3 {
                action: "delete",
                key: key_,
                url,
                problem: "killed".to_owned(),
                transient: true,
            }),
        }
    }
    fn ready_to_write(&self) -> Result<()> {
        Ok(())
    }
    fn url(&self) -> String {
        self.store.url()
    }

    repository::plain_store_methods!();
}

struct Scene {
    _directory: tempfile::TempDir,
    store: Arc<Moody>,
    repository: Repository,
    identity: ClusterIdentity,
}

fn id(number: u64) -> BackupId {
    format!("20260101T000000Z-{number:04x}")
        .parse()
        .expect("a name")
}

impl Scene {
    /// Creates sixteen segments, an hour each, and a backup in every fourth.
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Arc::new(Moody {
            store: LocalStore::open(directory.path()).expect("a store"),
            deletions: AtomicUsize::new(usize::MAX),
            locks: false,
            asked: AtomicUsize::new(0),
        });
        let repository = Repository::with_store(
            Arc::clone(&store) as Arc<dyn ObjectStore>,
            "main".parse().expect("a name"),
        );
        let identity = ClusterIdentity {
            format_version: 1,
            cluster: "main".parse().expect("a name"),
            system_identifier: SYSTEM,
            postgresql_major: PgVersion::V17,
            wal_segment_size: SegmentSize::new(1 << 20).expect("a size"),
            created: PgTimestamp(0),
        };
        repository.claim(&identity).expect("the name is free");
        let scene = Self {
            _directory: directory,
            store,
            repository,
            identity,
        };
        (1..17).for_each(|number| scene.segment(number));
        (0..4).for_each(|number| scene.backup(number));
        scene
    }

    fn locking() -> Self {
        let scene = Self::new();
        let root = scene._directory.path().to_owned();
        let store = Arc::new(Moody {
            store: LocalStore::open(&root).expect("a store"),
            deletions: AtomicUsize::new(0),
            locks: true,
            asked: AtomicUsize::new(0),
        });
        let repository = Repository::with_store(
            Arc::clone(&store) as Arc<dyn ObjectStore>,
            "main".parse().expect("a name"),
        );
        Self {
            store,
            repository,
            ..scene
        }
    }

    fn time(number: u64) -> PgTimestamp {
        PgTimestamp((980 + i64::try_from(number).expect("small")) * HOUR)
    }

    fn segment(&self, number: u64) {
        let start_lsn = Lsn(number << 20);
        let header = SealedHeader {
            system_identifier: SYSTEM,
            version: PgVersion::V17,
            branch: Branch::FIRST,
            segment_size: self.identity.wal_segment_size,
            start_lsn,
            end_lsn: start_lsn.add(1 << 20),
        };
        let summary = SegmentSummary {
            record_count: 1,
            transactions: vec![TransactionEnd {
                lsn: start_lsn.add(64),
                xid: 700,
                time: Self::time(number),
                kind: TransactionEndKind::Commit,
            }],
            ..SegmentSummary::default()
        };
        let mut compressor = FrameCompressor::new(1).expect("a compressor");
        let object = seal(&mut compressor, header, &vec![0; 1 << 20], &summary, None);
        let object = object.expect("it seals");
        self.repository
            .put(&header.key(), &object)
            .expect("it is new");
    }

    fn backup(&self, number: u64) {
        let start_lsn = Lsn(((1 + number * 4) << 20) + 100);
        let slice = BackupSlice {
            archive: BackupArchive::Base,
            number: 1,
            raw_bytes: 5,
            stored_bytes: 5,
            sha256: "0".repeat(64),
            continues: None,
        };
        let info = BackupInfo {
            format_version: 1,
            id: id(number),
            label: String::new(),
            kind: BackupKind::Full,
            system_identifier: SYSTEM,
            postgresql_major: PgVersion::V17,
            server_version: "17.0".to_owned(),
            branch: Branch::FIRST,
            start_lsn,
            checkpoint_lsn: start_lsn,
            stop_lsn: start_lsn.add(1000),
            started: Self::time(1 + number * 4),
            finished: Self::time(1 + number * 4),
            from_standby: false,
            tablespaces: Vec::new(),
            raw_bytes: 5,
            stored_bytes: 5,
            slices: vec![slice.clone()],
            manifest_sha256: "0".repeat(64),
            manifest_bytes: 2,
            backup_label_sha256: None,
            tablespace_map_sha256: None,
            warnings: Vec::new(),
        };
        let json = info.to_json().expect("JSON");
        for (key, body) in [
            (info.slice_key(&slice), &b"slice"[..]),
            (info.manifest_key(), b"{}"),
            (info.key(), &json),
        ] {
            self.repository.put(&key, body).expect("it is new");
        }
    }

    fn plan(&self) -> (ExpiredSet, ExpirePlan) {
        let expired = self.repository.expired(SYSTEM).expect("records");
        let catalog = Catalog::open_for_restore(None, &self.repository).expect("a catalog");
        // The window needs the last backup and the one before.
        let times = (PgTimestamp(NOW.0 - 9 * HOUR), NOW);
        let holding = Holding::read(&self.repository, &self.identity, &catalog, times, &expired);
        let policy = RetentionPolicy {
            window: Duration::from_secs(9 * 3600),
            daily: 0,
            weekly: 0,
            monthly: 0,
            backups_min: 1,
            pinned: vec![id(0)],
        };
        let holding = holding.expect("a holding");
        let plan = plan_expire(&holding, &policy, NOW, Duration::from_secs(86_400));
        (expired, plan.expect("a plan"))
    }

    fn mark(&self, number: u64) -> bool {
        let (expired, plan) = self.plan();
        let record = (id(number), NOW, "a policy".to_owned());
        let marked = mark(&self.repository, SYSTEM, &plan, &expired, record);
        marked.expect("it writes").is_some()
    }

    fn sweep(&self, number: u64) -> Result<Swept> {
        let expired = self.repository.expired(SYSTEM)?;
        let due = due(&expired, Duration::ZERO, NOW);
        let name = (id(number), NOW);
        sweep(
            &self.repository,
            &self.identity,
            (&expired, &due),
            name,
            false,
        )
    }

    fn objects(&self, folder: &str) -> Vec<String> {
        let listed = self.repository.list(&format!("{SYSTEM}/{folder}/"));
        let listed = listed.expect("a listing");
        listed.into_iter().map(|(key, _)| key.to_string()).collect()
    }

    /// Returns the backups that a reader sees, and whether each has its WAL.
    fn reader(&self) -> Vec<(String, bool)> {
        let catalog = Catalog::open_for_restore(None, &self.repository).expect("a catalog");
        let seen = |backup: BackupInfo| {
            let end = catalog.contiguous_end(Branch::FIRST, backup.start_lsn.align_down(1 << 20));
            let parts = [backup.manifest_key(), backup.slice_key(&backup.slices[0])];
            let there = |key: &ObjectKey| self.repository.head(key).expect("an answer").is_some();
            let whole = end.expect("an end") >= backup.stop_lsn && parts.iter().all(there);
            (backup.id.as_str()[17..].to_owned(), whole)
        };
        catalog
            .backups()
            .expect("backups")
            .into_iter()
            .map(seen)
            .collect()
    }
}

fn kept() -> Vec<(String, bool)> {
    ["0000", "0001", "0002", "0003"]
        .into_iter()
        .filter(|name| *name != "0001")
        .map(|name| (name.to_owned(), true))
        .collect()
}

#[test]
fn a_sweep_that_is_cut_off_anywhere_goes_on_and_readers_see_only_what_is_whole() {
    let clean = Scene::new();
    assert!(clean.mark(0x10));
    let swept = clean.sweep(0x11).expect("a sweep");
    // The three objects of a backup, and the WAL between that of the pinned backup and that of the
    // next kept backup.
    assert_eq!((swept.objects, swept.locked), (3 + 7, 0));
    assert_eq!(clean.objects("wal").len(), 9);
    assert_eq!(clean.objects("expired").len(), 1);
    assert_eq!(clean.reader(), kept());
    assert!(clean.plan().1.is_empty(), "nothing is left to do");
    for cut in 0..=swept.objects + 1 {
        let scene = Scene::new();
        assert!(scene.mark(0x10));
        assert_eq!(scene.reader(), kept(), "marked, cut {cut}");
        scene.store.deletions.store(cut, Ordering::SeqCst);
        let outcome = scene.sweep(0x11);
        assert_eq!(
            outcome.is_ok(),
            cut > swept.objects,
            "cut {cut}: {outcome:?}"
        );
        assert_eq!(scene.reader(), kept(), "cut {cut}");
        scene.store.deletions.store(usize::MAX, Ordering::SeqCst);
        scene.sweep(0x12).expect("it goes on");
        assert_eq!(scene.objects("wal"), clean.objects("wal"), "cut {cut}");
        assert_eq!(
            scene.objects("backup"),
            clean.objects("backup"),
            "cut {cut}"
        );
        assert_eq!(scene.objects("expired").len(), 1, "cut {cut}");
        let expired = scene.repository.expired(SYSTEM).expect("records");
        assert!(expired.records()[0].swept.is_some() && expired.backups().contains(&id(1)));
        assert_eq!(scene.reader(), kept());
    }
}

#[test]
fn before_the_grace_is_over_every_object_is_there() {
    let scene = Scene::new();
    let before = (scene.objects("wal"), scene.objects("backup"));
    assert!(scene.mark(0x10));
    let expired = scene.repository.expired(SYSTEM).expect("records");
    let later = |hours: i64| PgTimestamp(NOW.0 + hours * HOUR);
    let day = Duration::from_secs(86_400);
    let young = due(&expired, day, later(23));
    let name = (id(0x11), NOW);
    let (place, identity) = (&scene.repository, &scene.identity);
    let swept = sweep(place, identity, (&expired, &young), name, false).expect("a sweep");
    assert_eq!(swept, Swept::default());
    assert_eq!((scene.objects("wal"), scene.objects("backup")), before);
    assert!(!due(&expired, day, later(24)).is_empty());
    // Removing the record undoes the expiry.
    place
        .delete(&expired.records()[0].key(SYSTEM))
        .expect("it goes");
    assert_eq!(scene.reader().len(), 4);
}

#[test]
fn a_store_that_lets_nothing_go_is_no_failure() {
    let scene = Scene::locking();
    assert!(scene.mark(0x10));
    let before = (scene.objects("wal"), scene.objects("backup"));
    let swept = scene.sweep(0x11).expect("no failure");
    assert_eq!((swept.objects, swept.locked), (0, 10));
    assert!(scene.store.asked.load(Ordering::SeqCst) <= 10);
    assert_eq!((scene.objects("wal"), scene.objects("backup")), before);
    assert_eq!(scene.reader(), kept(), "it counts as absent all the same");
    assert_eq!(scene.objects("expired").len(), 1, "and is tried again");
}

#[test]
fn of_two_that_decide_at_once_neither_acts() {
    let scene = Scene::new();
    let (seen, plan) = scene.plan();
    // Another archiver with another policy was faster.
    let mut other = plan.record(id(0x20), NOW, "another".to_owned());
    other.backups[0].id = id(2);
    let json = serde_json::to_vec(&other).expect("JSON");
    scene
        .repository
        .put(&other.key(SYSTEM), &json)
        .expect("it is new");
    let record = (id(0x10), NOW, "a policy".to_owned());
    let marked = mark(&scene.repository, SYSTEM, &plan, &seen, record).expect("it writes");
    assert_eq!(marked, None);
    assert_eq!(scene.objects("expired").len(), 1, "ours was taken back");
    // On the next attempt, the rest is enough.
    assert!(scene.mark(0x10) || scene.plan().1.is_empty());
    let reader = scene.reader();
    assert!(
        reader.iter().any(|(name, whole)| name == "0003" && *whole),
        "{reader:?}"
    );
}

/// Returns the number of requests of `open_for_restore` by kind, as an observed store names them.
fn requests(repository: &Repository, directory: Option<&Path>) -> BTreeMap<&'static str, usize> {
    let counts = Arc::new(Mutex::new(BTreeMap::new()));
    let counted = Arc::clone(&counts);
    let observed = repository.clone().observed(
        Arc::new(move |op, _, _| {
            *counted.lock().expect("a lock").entry(op).or_default() += 1;
        }),
        Arc::default(),
    );
    let catalog = Catalog::open_for_restore(directory, &observed).expect("a catalog");
    let backups = catalog.backups().expect("backups");
    let held = catalog.contiguous_end(Branch::FIRST, Lsn(12 << 20));
    assert_eq!((backups.len(), held.expect("an end")), (3, Lsn(17 << 20)));
    drop(observed);
    let counts = counts.lock().expect("a lock");
    counts.clone()
}

#[test]
fn a_restore_uses_the_catalog_of_an_archive_of_which_something_expired() {
    let scene = Scene::new();
    assert!(scene.mark(0x10));
    scene.sweep(0x11).expect("a sweep");
    let directory = tempfile::tempdir().expect("a directory");
    let catalog = Catalog::open(directory.path(), &scene.identity).expect("a catalog");
    catalog.refresh(&scene.repository).expect("it refreshes");
    assert!(!catalog.expired().expect("it is known").is_empty());
    // The archiver that owns the catalog may be running.
    let with = requests(&scene.repository, Some(directory.path()));
    drop(catalog);
    let without = requests(&scene.repository, None);
    // Nine segments and three backups are left.
    let read = |counts: &BTreeMap<&'static str, usize>| {
        let of = |op| counts.get(op).copied().unwrap_or_default();
        of("get") + of("get_range")
    };
    assert_eq!(read(&without) - read(&with), 9 + 3, "{with:?} {without:?}");
}
