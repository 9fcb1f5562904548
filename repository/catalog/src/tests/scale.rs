//! A catalog of very many segments: the requests, the time and the memory of a rebuild.
//!
//! With `TIDEMARK_LONG=1` there are a million segments. Time, memory and requests are printed.

use std::{
    collections::BTreeMap,
    ops::{ControlFlow, Range},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use repository::{ExpiredSet, ObjectMeta, PutOutcome, expire::Holding};

use super::*;

/// The number of commits in each segment.
const COMMITS: u64 = 20;
/// Offsets in a footer: of the copy of the header, and of fields in it (`FORMAT.md`).
const HEADER_AT: usize = 16;
const LSNS_AT: usize = HEADER_AT + 40;
const HEADER_CRC_AT: usize = HEADER_AT + 64;

fn small() -> SegmentSize {
    SegmentSize::new(1 << 20).expect("a size")
}

/// A bucket that generates segments when they are read, and counts the requests.
#[derive(Debug)]
struct Generated {
    segments: u64,
    template: Vec<u8>,
    footer_bytes: usize,
    others: Mutex<BTreeMap<String, Vec<u8>>>,
    gets: AtomicU64,
    ranges: AtomicU64,
    range_bytes: AtomicU64,
    lists: AtomicU64,
}

fn header(number: u64) -> SealedHeader {
    SealedHeader {
        system_identifier: identity().system_identifier,
        version: identity().postgresql_major,
        branch: Branch::FIRST,
        segment_size: small(),
        start_lsn: SegmentNo(number).start_lsn(small()),
        end_lsn: SegmentNo(number).end_lsn(small()),
    }
}

impl Generated {
    fn new(segments: u64) -> Self {
        let header = header(1);
        let start = header.start_lsn;
        let commit = |number: u64| TransactionEnd {
            lsn: start.add(64 * number),
            xid: u32::try_from(700 + number).expect("small"),
            time: PgTimestamp(1000),
            kind: TransactionEndKind::Commit,
        };
        let summary = SegmentSummary {
            record_count: 1000,
            first_record_lsn: Some(start.add(64)),
            last_record_lsn: Some(start.add(64 * COMMITS)),
            last_record_end_lsn: Some(start.add(64 * COMMITS + 64)),
            transactions: (1..=COMMITS).map(commit).collect(),
            ..SegmentSummary::default()
        };
        let wal = vec![0; usize::try_from(small().bytes()).expect("it fits")];
        let mut compressor = FrameCompressor::new(1).expect("a compressor");
        let template = seal(&mut compressor, header, &wal, &summary, None).expect("it seals");
        let trailer = template.len() - 24;
        let footer_bytes =
            u32::from_le_bytes(template[trailer..trailer + 4].try_into().expect("4"));
        Self {
            segments,
            footer_bytes: usize::try_from(footer_bytes).expect("small"),
            template,
            others: Mutex::default(),
            gets: AtomicU64::new(0),
            ranges: AtomicU64::new(0),
            range_bytes: AtomicU64::new(0),
            lists: AtomicU64::new(0),
        }
    }

    /// Returns the template for another position in the WAL: the header's copy in the footer and
    /// two checksums are replaced.
    fn object(&self, number: u64) -> Vec<u8> {
        let mut object = self.template.clone();
        let header = header(number);
        let at = object.len() - self.footer_bytes;
        let footer = &mut object[at..];
        footer[LSNS_AT..LSNS_AT + 8].copy_from_slice(&header.start_lsn.0.to_le_bytes());
        footer[LSNS_AT + 8..LSNS_AT + 16].copy_from_slice(&header.end_lsn.0.to_le_bytes());
        let crc = crc32fast::hash(&footer[HEADER_AT..HEADER_CRC_AT]);
        footer[HEADER_CRC_AT..HEADER_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        let crc_at = footer.len() - 12;
        let crc = crc32fast::hash(&footer[..crc_at]);
        footer[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        object
    }

    fn number(&self, key: &str) -> Option<u64> {
        let key = key.strip_prefix("main/")?.parse().ok()?;
        match key {
            ObjectKey::Segment(_, _, name) => name.segment(small()).map(|segment| segment.0),
            _ => None,
        }
    }
}

impl ObjectStore for Generated {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let mut others = self.others.lock().expect("no panic");
        if others.contains_key(key) {
            return Ok(PutOutcome::AlreadyExists);
        }
        others.insert(key.to_owned(), body.to_vec());
        Ok(PutOutcome::Created)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        if self.number(key).is_some() {
            self.gets.fetch_add(1, Ordering::Relaxed);
        }
        let others = self.others.lock().expect("no panic");
        others
            .get(key)
            .map(|body| body.clone().into())
            .ok_or_else(|| Error::NotFound {
                key: key.to_owned(),
                url: self.url(),
            })
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.ranges.fetch_add(1, Ordering::Relaxed);
        self.range_bytes
            .fetch_add(range.end - range.start, Ordering::Relaxed);
        let number = self.number(key).expect("only segments are read by ranges");
        let place = |at: u64| usize::try_from(at).expect("small");
        let object = self.object(number);
        Ok(Bytes::copy_from_slice(
            &object[place(range.start)..place(range.end)],
        ))
    }

    fn head(&self, _: &str) -> Result<Option<ObjectMeta>> {
        panic!("a rebuild looks at no object")
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        let others = self.others.lock().expect("no panic").clone();
        for (key, body) in others
            .into_iter()
            .filter(|(key, _)| key.starts_with(prefix))
        {
            let size = body.len() as u64;
            if visit(ObjectMeta { key, size }).is_break() {
                return Ok(());
            }
        }
        if prefix.ends_with("/wal/") {
            for number in 1..=self.segments {
                let key = format!("main/{}", header(number).key());
                let size = self.template.len() as u64;
                if visit(ObjectMeta { key, size }).is_break() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn delete(&self, _: &str) -> Result<()> {
        panic!("a rebuild deletes nothing")
    }

    fn ready_to_write(&self) -> Result<()> {
        Ok(())
    }

    fn url(&self) -> String {
        "generated:".to_owned()
    }

    repository::plain_store_methods!();
}

/// Returns the peak memory of this process in MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.expect("a number") / 1024
}

#[test]
fn a_rebuild_reads_summaries_and_never_a_segment() {
    let segments = if testbed::is_long() { 1_000_000 } else { 5_000 };
    let store = Arc::new(Generated::new(segments));
    let repository = Repository::with_store(
        Arc::clone(&store) as Arc<dyn ObjectStore>,
        "main".parse().expect("a name"),
    );
    let identity = ClusterIdentity {
        wal_segment_size: small(),
        ..identity()
    };
    repository.claim(&identity).expect("the name is free");
    let lists = store.lists.load(Ordering::Relaxed);
    let directory = tempfile::tempdir().expect("a directory");
    let catalog = Catalog::open(directory.path(), &identity).expect("a catalog");
    let (began, before) = (Instant::now(), peak_mib());
    let report = catalog.refresh(&repository).expect("it refreshes");
    let took = began.elapsed();
    assert_eq!(report.damaged, []);
    assert_eq!(report.added as u64, segments);
    let first = header(1).start_lsn;
    let end = catalog.contiguous_end(Branch::FIRST, first);
    assert_eq!(end.expect("an end"), header(segments).end_lsn);

    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(count(&store.gets), 0, "no segment is read whole");
    assert_eq!(count(&store.ranges), segments, "one request each");
    assert!(count(&store.lists) - lists <= 6, "and a listing per kind");
    eprintln!(
        "{segments} segments: rebuilt in {:.1} s, {} ranges of {} bytes, {} listings, memory {} to {} MiB",
        took.as_secs_f64(),
        count(&store.ranges),
        count(&store.range_bytes) / segments,
        count(&store.lists) - lists,
        before,
        peak_mib()
    );
    // Retention needs names only: it reads nothing again that the catalog contains, and keeps
    // nothing in memory per segment.
    let (began, before) = (Instant::now(), peak_mib());
    let times = (PgTimestamp(2000), PgTimestamp(3000));
    let holding = Holding::read(
        &repository,
        &identity,
        &catalog,
        times,
        &ExpiredSet::default(),
    );
    let holding = holding.expect("it reads");
    assert_eq!(count(&store.ranges), segments);
    let branch = &holding.branches[0];
    assert_eq!(branch.wal.iter().count(), 1);
    assert_eq!((branch.young_from, branch.is_dated), (None, true));
    // The kernel counts memory per processor and approximately, so a later peak may be a page
    // lower.
    let grown = peak_mib().saturating_sub(before);
    eprintln!(
        "held: {:.1} s, {grown} MiB more",
        began.elapsed().as_secs_f64()
    );
    assert!(grown < 64, "{grown} MiB");
    // Objects that the catalog contains are not read again.
    let again = catalog.refresh(&repository).expect("it refreshes");
    assert_eq!((again.added, again.removed), (0, 0));
    assert_eq!(count(&store.ranges), segments);
}
