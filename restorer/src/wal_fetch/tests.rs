//! A segment that is sealed while it is fetched.

use std::{
    ops::{ControlFlow, Range},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use repository::{
    ClusterIdentity, ObjectMeta, ObjectStore, PutOutcome, Repository, store::LocalStore,
};
use wal_format::{
    FrameCompressor, PgTimestamp, PgVersion, SealedHeader, SegmentSummary, SystemIdentifier,
    sealed::seal,
};

use super::*;

const SYSTEM: SystemIdentifier = SystemIdentifier(7);
const SEGMENT_BYTES: u64 = 1 << 20;

/// Objects to store and names to remove after the next listing of tails.
type Sealing = (Vec<(String, Bytes)>, Vec<String>);

/// A store in which a segment is sealed right after its tails were listed.
#[derive(Debug)]
struct SealingStore {
    store: LocalStore,
    sealing: Mutex<Option<Sealing>>,
}

impl ObjectStore for SealingStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> repository::Result<PutOutcome> {
        self.store.put_if_absent(key, body)
    }
    fn get(&self, key: &str) -> repository::Result<Bytes> {
        self.store.get(key)
    }
    fn get_range(&self, key: &str, range: Range<u64>) -> repository::Result<Bytes> {
        self.store.get_range(key, range)
    }
    fn head(&self, key: &str) -> repository::Result<Option<ObjectMeta>> {
        self.store.head(key)
    }
    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> repository::Result<()> {
        self.store.list(prefix, visit)?;
        if prefix.contains("/tail/")
            && let Some((stored, removed)) = self.sealing.lock().expect("a lock").take()
        {
            for (key, body) in stored {
                self.store.put_if_absent(&key, &body)?;
            }
            for key in removed {
                self.store.delete(&key)?;
            }
        }
        Ok(())
    }
    fn delete(&self, key: &str) -> repository::Result<()> {
        self.store.delete(key)
    }
    fn ready_to_write(&self) -> repository::Result<()> {
        Ok(())
    }
    fn url(&self) -> String {
        self.store.url()
    }

    repository::plain_store_methods!();
}

/// Returns an object with the WAL of `[from, to)` of segment 1, of which each byte is `fill`.
fn object(from: u64, to: u64, fill: u8) -> (SealedHeader, Bytes) {
    let start_lsn = Lsn(SEGMENT_BYTES);
    let header = SealedHeader {
        system_identifier: SYSTEM,
        version: PgVersion::V17,
        branch: Branch::FIRST,
        segment_size: SegmentSize::new(SEGMENT_BYTES).expect("a size"),
        start_lsn: start_lsn.add(from),
        end_lsn: start_lsn.add(to),
    };
    let wal = vec![fill; usize::try_from(to - from).expect("it fits")];
    let mut compressor = FrameCompressor::new(1).expect("a compressor");
    let summary = SegmentSummary::default();
    let object = seal(&mut compressor, header, &wal, &summary, None).expect("it seals");
    (header, object.into())
}

#[test]
fn a_segment_that_is_sealed_between_the_listing_and_the_read_of_its_tails_is_delivered() {
    let (header, sealed) = object(0, SEGMENT_BYTES, 2);
    let name = header.segment_name();
    let tails: Vec<(ObjectKey, Bytes)> = [(0, 8192), (8192, 16384)]
        .into_iter()
        .map(|(from, to)| {
            let (header, tail) = object(from, to, 1);
            let (start, end) = (header.start_lsn, header.end_lsn);
            (
                ObjectKey::Tail(SYSTEM, Branch::FIRST, name, start, end),
                tail,
            )
        })
        .collect();
    // All tails are gone, or the listing itself lacked the last one or the first one.
    for (listed, read) in [
        (&tails[..], 0),
        (&tails[..1], 1),
        (&tails[1..], 0),
        (&[], 0),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Arc::new(SealingStore {
            store: LocalStore::open(directory.path()).expect("a store"),
            sealing: Mutex::new(None),
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
            wal_segment_size: header.segment_size,
            created: PgTimestamp(0),
        };
        repository.claim(&identity).expect("the name is free");
        for (key, tail) in listed {
            repository.put(key, tail).expect("it is stored");
        }
        let of_cluster = |key: &ObjectKey| format!("main/{key}");
        let removed = listed.iter().skip(read).map(|(key, _)| of_cluster(key));
        let stored = (of_cluster(&header.key()), sealed.clone());
        *store.sealing.lock().expect("a lock") = Some((vec![stored], removed.collect()));

        let destination = directory.path().join("delivered");
        let fetched = wal_fetch(&repository, None, &name.to_string(), &destination);
        assert_eq!(fetched.expect("an answer"), Fetched::Delivered);
        assert!(
            store.sealing.lock().expect("a lock").is_none(),
            "nothing was listed"
        );
        let content = fs::read(&destination).expect("a file");
        assert_eq!(content.len() as u64, SEGMENT_BYTES);
        assert!(
            content.iter().all(|byte| *byte == 2),
            "{} tails",
            listed.len()
        );
    }
}
