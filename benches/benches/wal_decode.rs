//! The rate at which one core decodes real WAL: every page and record checked, every CRC computed.
//!
//! `cargo bench --workspace --bench wal_decode`. The WAL is pgbench's on the newest PostgreSQL that
//! is installed: the load, which is full pages and large records, and the transactions, which are
//! small records.

use std::{fs, hint::black_box, path::Path};

use anyhow::{Context, Result};
use criterion::{Criterion, Throughput};
use testbed::{cluster::Cluster, programs::succeed, tools::servers};
use wal_format::{PgVersion, SegmentName, SegmentSize, SystemIdentifier, WalIdentity, WalIndexer};

const SEGMENT_MIB: u32 = 16;
/// Bytes of WAL that the replication protocol carries in one message (`MAX_SEND_SIZE` in
/// `walsender.c`).
const MESSAGE_BYTES: usize = 128 << 10;

/// Complete segments of one server, in order, with the number of the first.
struct Wal {
    identity: WalIdentity,
    first: SegmentName,
    bytes: Vec<u8>,
}

/// WAL of pgbench: its load, or only its transactions.
fn pgbench(major: u16, bin: &Path, transactions: bool) -> Result<Wal> {
    let settings = "fsync = off\nautovacuum = off\nwal_keep_size = 2GB\nfull_page_writes = off\n\
                    shared_buffers = 256MB\n";
    let settings = if transactions {
        settings.to_owned()
    } else {
        settings.replace("full_page_writes = off", "full_page_writes = on")
    };
    let cluster = Cluster::start(bin, SEGMENT_MIB, &settings)?;
    let mut client = cluster.connect()?;
    let run = |arguments: &[&str]| -> Result<String> {
        let mut pgbench = cluster.program("pgbench")?;
        pgbench.arg("-h").arg(cluster.socket_directory());
        pgbench.args(["-U", "postgres", "-p", &testbed::cluster::PORT.to_string()]);
        succeed(pgbench.args(arguments).arg("postgres"))
    };
    run(&["-i", "-q", "-s", "5"])?;
    let mut from = None;
    if transactions {
        let row = client.query_one(
            "select pg_walfile_name(pg_switch_wal()), pg_current_wal_lsn()::text",
            &[],
        )?;
        from = Some(row.get::<_, String>(0));
        run(&["-n", "-c", "2", "-t", "60000"])?;
    }
    let last: String = client
        .query_one("select pg_walfile_name(pg_switch_wal())", &[])?
        .get(0);
    let mut names: Vec<_> = fs::read_dir(cluster.data().join("pg_wal"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.len() == 24 && *name <= last && from.as_ref().is_none_or(|f| name > f))
        .collect();
    names.sort();
    let first = names.first().context("no segment is complete")?;
    let first = match first.parse()? {
        wal_format::WalFileName::Segment(name) => name,
        other => anyhow::bail!("{other:?} is no segment"),
    };
    let mut bytes = Vec::new();
    for name in names {
        bytes.extend(fs::read(cluster.data().join("pg_wal").join(name))?);
    }
    let system_identifier: i64 = client
        .query_one("select system_identifier from pg_control_system()", &[])?
        .get(0);
    let identity = WalIdentity {
        version: PgVersion::try_from(major)?,
        system_identifier: SystemIdentifier(system_identifier.cast_unsigned()),
        segment_size: SegmentSize::new(u64::from(SEGMENT_MIB) << 20)?,
    };
    Ok(Wal {
        identity,
        first,
        bytes,
    })
}

fn indexer(wal: &Wal) -> Result<u64> {
    let size = wal.identity.segment_size;
    let segment = wal.first.segment(size).context("a segment's name")?;
    let mut indexer = WalIndexer::new(wal.identity, segment.start_lsn(size), None);
    for message in wal.bytes.chunks(MESSAGE_BYTES) {
        indexer.push(message)?;
    }
    Ok(indexer.take_summary().record_count)
}

fn main() -> Result<()> {
    let Some((major, bin)) = servers().pop() else {
        eprintln!("no PostgreSQL is installed; `make install-tools` installs it");
        return Ok(());
    };
    let mut criterion = Criterion::default().configure_from_args();
    for (name, transactions) in [("load", false), ("transactions", true)] {
        let wal = pgbench(major, &bin, transactions)?;
        let records = indexer(&wal)?;
        eprintln!(
            "PostgreSQL {major}, {name}: {} MiB, {records} records",
            wal.bytes.len() >> 20
        );
        let mut group = criterion.benchmark_group("wal_decode");
        group.sample_size(20);
        group.throughput(Throughput::Bytes(wal.bytes.len() as u64));
        group.bench_function(format!("summary/{name}"), |bencher| {
            bencher.iter(|| black_box(indexer(black_box(&wal))));
        });
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}
