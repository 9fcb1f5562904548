//! Compares the decoder with `pg_waldump`: every record of a mixed workload, on every installed
//! PostgreSQL.
//!
//! `TIDEMARK_LONG=1` makes the workload ten times longer.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail, ensure};
use postgres::Client;
use testbed::{
    cluster::{Cluster, PORT},
    programs::succeed,
    tools::servers_or_skip,
};
use wal_format::{
    Lsn, PgVersion, SegmentName, SegmentSize, SegmentSummary, SystemIdentifier, WalEvent,
    WalFileName, WalIdentity,
};

#[path = "../../../wal-format/tests/main/waldump.rs"]
mod waldump;

use waldump::Line;

const SETTINGS: &str = "fsync = off\nwal_level = logical\nmax_prepared_transactions = 10\n\
     track_commit_timestamp = on\nwal_keep_size = 2GB\nautovacuum_naptime = 1s\n\
     max_replication_slots = 10\nshared_buffers = 32MB\n";

/// Every index type, and many operations on a table.
const TABLES: &str = "
    create table things (id int primary key, n int, words tsvector, area box, span int4range, name text, list int[]);
    create index on things using btree (n, name);
    create index on things using hash (n);
    create index on things using gin (words);
    create index on things using gin (list);
    create index on things using gist (area);
    create index on things using gist (span);
    create index on things using spgist (name);
    create index on things using brin (n);
    create unlogged table volatile (id int primary key);
    create sequence numbers cache 1;
    create materialized view summary as select count(*) from things;
    create table parts (id int, n int) partition by range (id);
    create table parts_low partition of parts for values from (0) to (1000);
    create table parts_high partition of parts for values from (1000) to (1000000);
    create table wide (id int, content text);
    alter table wide alter content set storage external;
";

const FUNCTION: &str = "
    create function subtransactions(many int) returns void language plpgsql as $$
    begin
        for i in 1..many loop
            begin
                insert into parts values (i, i);
                if i % 3 = 0 then raise exception 'undone'; end if;
            exception when raise_exception then null;
            end;
        end loop;
    end $$;
";

/// The changes of one round; `@` is the number of the round.
const ROUND: &str = "
    insert into things select i, i % 100, to_tsvector('simple', 'word' || i % 50 || ' and ' || i),
        box(point(i, i % 17), point(i + 5, i % 17 + 3)), int4range(i, i + 10), repeat(md5(i::text), 2), array[i, i % 7]
        from generate_series(@ * 1000, @ * 1000 + 600) i;
    update things set n = n + 1, area = box(point(n, n), point(n + 1, n + 2)) where id % 5 = 0 and id >= @ * 1000;
    delete from things where id % 7 = 0;
    select nextval('numbers') from generate_series(1, 50);
    insert into wide values (@, repeat(md5('@'), 2000));
    update wide set content = content || 'x';
    select subtransactions(120);
    begin; insert into parts values (@, 1); savepoint a; insert into parts values (2, 2); savepoint b; delete from parts
        where id = 2; rollback to a; insert into parts values (2000, 3); release a; commit;
    begin; delete from things; rollback;
    begin; insert into parts values (7, @); prepare transaction 'kept @'; commit prepared 'kept @';
    begin; insert into parts values (8, @); savepoint a; delete from parts; create table doomed (id int);
        prepare transaction 'dropped @'; rollback prepared 'dropped @';
    select pg_logical_emit_message(true, 'test', 'in a transaction');
    select pg_logical_emit_message(false, 'test', repeat('outside of one ', 3000));
    select pg_create_restore_point('round @');
    select lo_unlink(lo_from_bytea(0, repeat('large', 3000)::bytea));
    select lo_from_bytea(0, repeat('object', 300)::bytea);
    create table short_lived as select i, md5(i::text) from generate_series(1, 500) i;
    create index on short_lived (md5); truncate short_lived; insert into short_lived values (1, 'x'); drop table short_lived;
    create table rewritten (id int, note text); insert into rewritten select i, 'a' from generate_series(1, 300) i;
    alter table rewritten alter id type bigint; cluster things using things_pkey; drop table rewritten;
    insert into volatile select i from generate_series(@ * 100, @ * 100 + 99) i;
    refresh materialized view summary; reindex table things; analyze things;
    begin; select count(*) from (select id from things for share) x; commit;
    create role someone; grant select on things to someone; revoke select on things from someone; drop role someone;
    vacuum things; vacuum full parts_low;
";

/// Executes the statements one by one, because many of them cannot run in a transaction.
fn execute(client: &mut Client, statements: &str) -> Result<()> {
    let statements = statements.split(';').map(str::trim);
    for statement in statements.filter(|statement| !statement.is_empty()) {
        client
            .batch_execute(statement)
            .with_context(|| statement.to_owned())?;
    }
    Ok(())
}

fn pgbench(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let mut pgbench = cluster.program("pgbench")?;
    pgbench.arg("-h").arg(cluster.socket_directory());
    succeed(
        pgbench
            .args(["-U", "postgres", "-p", &PORT.to_string()])
            .args(arguments)
            .arg("postgres"),
    )
}

/// Returns the values of `wal_compression` that this build supports.
fn compressions(client: &mut Client, major: u16) -> Result<Vec<String>> {
    if major < 15 {
        return Ok(vec!["off".to_owned(), "on".to_owned()]);
    }
    let query = "select enumvals from pg_settings where name = 'wal_compression'";
    Ok(client.query_one(query, &[])?.get(0))
}

/// Runs the whole workload. The last WAL record is a segment switch; returns the name of its
/// segment.
fn work(cluster: &Cluster, major: u16, rounds: u32) -> Result<String> {
    let mut client = cluster.connect()?;
    client.batch_execute("set client_min_messages = error")?;
    pgbench(cluster, &["-i", "-q", "-s", "1"])?;
    execute(&mut client, TABLES)?;
    client.batch_execute(FUNCTION)?;
    let compressions = compressions(&mut client, major)?;
    eprintln!("PostgreSQL {major}: wal_compression {compressions:?}");
    for round in 0..rounds {
        for compression in &compressions {
            client.batch_execute(&format!(
                "set wal_compression = '{compression}'; checkpoint"
            ))?;
            execute(
                &mut client,
                "update things set n = n + 1 where id % 3 = 0; update wide set id = id + 1;",
            )?;
        }
        execute(&mut client, &ROUND.replace('@', &(round + 1).to_string()))?;
        if round % 4 == 1 {
            client.batch_execute("select pg_switch_wal()")?;
        }
    }
    // Writes page images that are not to be applied.
    execute(
        &mut client,
        "set wal_consistency_checking = 'all'; update things set n = n + 1 where id < 1500; reset wal_consistency_checking",
    )?;
    let transactions = (150 * rounds).to_string();
    pgbench(cluster, &["-n", "-c", "2", "-t", &transactions])?;
    execute(
        &mut client,
        "vacuum full pg_class; reindex system postgres; create database copy; drop database copy;
         select pg_replication_origin_create('elsewhere'); select pg_replication_origin_session_setup('elsewhere');
         begin; select pg_replication_origin_xact_setup('0/1234', now()); insert into parts values (9, 9); commit;
         select pg_replication_origin_session_reset(); select pg_replication_origin_drop('elsewhere')",
    )?;
    if major >= 15 {
        execute(
            &mut client,
            "create database copied strategy file_copy; drop database copied;
             set allow_in_place_tablespaces = on; create tablespace place location '';
             create table placed tablespace place as select 1; drop table placed; drop tablespace place",
        )?;
    }
    // Writes a record that spans several segments.
    execute(
        &mut client,
        "select pg_logical_emit_message(false, 'large', repeat('x', 2500000));
         create temp table gone (id int); checkpoint",
    )?;
    let last = client.query_one("select pg_walfile_name(pg_switch_wal())", &[])?;
    Ok(last.get(0))
}

/// Returns the complete segments up to `last`, oldest first.
fn segments(cluster: &Cluster, last: &str) -> Result<Vec<(SegmentName, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(cluster.data().join("pg_wal"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(WalFileName::Segment(segment)) = name.parse()
            && *name <= *last
        {
            found.push((segment, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Returns the output of `pg_waldump` for these segments.
fn printed(cluster: &Cluster, first: SegmentName, last: &str) -> Result<Vec<Line>> {
    let mut pg_waldump = cluster.program("pg_waldump")?;
    pg_waldump.env("TZ", "UTC").stderr(Stdio::inherit());
    pg_waldump.arg("-p").arg(cluster.data().join("pg_wal"));
    let text = succeed(pg_waldump.arg(first.to_string()).arg(last))?;
    let line = |text: &str| Line::parse(text).with_context(|| format!("pg_waldump printed {text}"));
    text.lines().map(line).collect()
}

/// WAL that both programs decoded with equal results.
struct Checked {
    identity: WalIdentity,
    start_lsn: Lsn,
    segments: Vec<Vec<u8>>,
    lines: Vec<Line>,
    summary: SegmentSummary,
    /// True if it has no prepared transaction or no full-page image.
    lacks_something: bool,
}

/// Decodes the segments up to `last` and compares the records with `pg_waldump`. With `all`, begins
/// with the first segment; otherwise decodes only `last`.
fn check(cluster: &Cluster, major: u16, last: &str, all: bool) -> Result<Checked> {
    let mut paths = segments(cluster, last)?;
    if !all {
        paths.drain(..paths.len().saturating_sub(1));
    }
    let (first, _) = paths.first().context("no segment is complete")?;
    let mut segments = Vec::new();
    for (_, path) in &paths {
        segments.push(fs::read(path)?);
    }
    let system_identifier: [u8; 8] = segments[0][24..32].try_into()?;
    let identity = WalIdentity {
        version: PgVersion::try_from(major)?,
        system_identifier: SystemIdentifier(u64::from_le_bytes(system_identifier)),
        segment_size: SegmentSize::new(segments[0].len() as u64)?,
    };
    let start_lsn = first
        .segment(identity.segment_size)
        .context("a segment's name")?
        .start_lsn(identity.segment_size);
    let pieces = segments.iter().flat_map(|segment| segment.chunks(100_000));
    let (lines, summary) = waldump::lines(identity, start_lsn, pieces)?;
    let theirs = printed(cluster, *first, last)?;
    for (ours, theirs) in lines.iter().zip(&theirs) {
        ensure!(
            ours == theirs,
            "at {} we say\n{ours:#?}\nand pg_waldump\n{theirs:#?}",
            theirs.lsn
        );
    }
    if lines.len() != theirs.len() {
        let end = theirs.last().or(lines.last());
        bail!(
            "{} records, pg_waldump {}; it ends at {end:?}",
            lines.len(),
            theirs.len()
        );
    }
    let count = |is: &dyn Fn(&Line) -> bool| theirs.iter().filter(|line| is(line)).count();
    let ends = count(&|line| line.end.is_some());
    let prepared = count(&|line| line.end.as_ref().is_some_and(|end| end.contains("PREPARE")));
    let images = count(&|line| line.blocks.contains("FPW"));
    eprintln!(
        "PostgreSQL {major}, segments of {} MiB: {} records in {} segments are the same; {ends} with a transaction's time, \
         {prepared} of prepared ones, {images} with full pages",
        segments[0].len() >> 20,
        lines.len(),
        segments.len(),
    );
    ensure!(
        summary.transactions.len() <= ends,
        "the summary knows a transaction's end that nobody else knows"
    );
    let lacks_something = prepared == 0 || images == 0;
    Ok(Checked {
        identity,
        start_lsn,
        segments,
        lines,
        summary,
        lacks_something,
    })
}

#[test]
fn every_record_is_the_one_that_pg_waldump_prints() {
    for (at, (major, bin)) in servers_or_skip().into_iter().enumerate() {
        let run = || {
            let cluster = Cluster::start(&bin, [1, 16][at % 2], SETTINGS)?;
            let last = work(&cluster, major, if testbed::is_long() { 20 } else { 2 })?;
            let checked = check(&cluster, major, &last, true)?;
            ensure!(!checked.lacks_something, "the workload lacks something");
            Ok::<_, anyhow::Error>(checked.lines.len())
        };
        let records = run().unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
        let least = if testbed::is_long() { 100_000 } else { 10_000 };
        assert!(records > least, "PostgreSQL {major}: {records} records");
    }
}

/// Writes rows until two pages of the segment are left, so that the next record continues in the
/// next segment.
const OVER_THE_END: &str = "
    do $$ begin
        loop
            insert into filler select g, repeat(md5(g::text), 20) from generate_series(1, 10) g;
            exit when (1 << 20) - (pg_current_wal_insert_lsn() - '0/0') % (1 << 20) < 16384;
        end loop;
    end $$;
";

/// Like PostgreSQL's `026_overwrite_contrecord.pl`: after a crash, the segment with the second half
/// of a record is missing.
fn overwrite_contrecord(major: u16, bin: &Path) -> Result<Checked> {
    let cluster = Cluster::start(bin, 1, &format!("{SETTINGS}autovacuum = off\n"))?;
    let mut client = cluster.connect()?;
    client.batch_execute("create table filler (a int, b text)")?;
    client.batch_execute(OVER_THE_END)?;
    client.batch_execute("select pg_logical_emit_message(true, 'x', repeat('xyzxz', 123456))")?;
    let name = "select pg_walfile_name(pg_current_wal_insert_lsn())";
    let gone: String = client.query_one(name, &[])?.get(0);
    drop(client);
    cluster.crash()?;
    fs::remove_file(cluster.data().join("pg_wal").join(gone))?;
    cluster.start_again()?;
    let mut client = cluster.connect()?;
    client.batch_execute("insert into filler values (1, 'after the crash')")?;
    let last: String = client
        .query_one("select pg_walfile_name(pg_switch_wal())", &[])?
        .get(0);
    check(&cluster, major, &last, true)
}

#[test]
fn a_record_that_a_crash_left_incomplete_is_skipped_as_postgresql_skips_it() {
    for (major, bin) in servers_or_skip() {
        let checked = overwrite_contrecord(major, &bin)
            .unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
        let overwritten =
            |event: &&(Lsn, WalEvent)| matches!(event.1, WalEvent::OverwrittenContrecord { .. });
        let found = checked.summary.events.iter().filter(overwritten).count();
        assert_eq!(found, 1, "PostgreSQL {major}");
    }
}

/// Creates the golden files of `wal-format/tests/fixtures` again, in the directory that
/// `TIDEMARK_FIXTURES` names.
#[test]
fn golden_files_are_made_on_request() {
    let Some(directory) = env::var_os("TIDEMARK_FIXTURES").map(PathBuf::from) else {
        return;
    };
    for (major, bin) in servers_or_skip() {
        make_fixture(&directory, major, &bin)
            .unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
    }
}

/// The length of a segment's part in a golden file.
const FIXTURE_BYTES: usize = 304 << 10;

fn make_fixture(directory: &Path, major: u16, bin: &Path) -> Result<()> {
    let cluster = Cluster::start(bin, 1, &format!("{SETTINGS}autovacuum = off\n"))?;
    let mut client = cluster.connect()?;
    client.batch_execute("set client_min_messages = error; set wal_compression = on")?;
    execute(&mut client, TABLES)?;
    client.batch_execute(FUNCTION)?;
    execute(&mut client, "select pg_switch_wal(); checkpoint")?;
    for compression in compressions(&mut client, major)? {
        client.batch_execute(&format!(
            "set wal_compression = '{compression}'; checkpoint"
        ))?;
        execute(
            &mut client,
            "insert into things (id, n) select coalesce(min(id), 0) - 1, 7 from things",
        )?;
    }
    let round = ROUND
        .replace('@', "0")
        .replace("+ 600", "+ 30")
        .replace("3000", "30");
    execute(&mut client, "set wal_compression = on")?;
    execute(
        &mut client,
        &round.replace("cluster things using things_pkey;", ""),
    )?;
    let last: String = client
        .query_one("select pg_walfile_name(pg_switch_wal())", &[])?
        .get(0);
    let checked = check(&cluster, major, &last, false)?;
    let excerpt = &checked.segments[0][..FIXTURE_BYTES.min(checked.segments[0].len())];
    let (lines, _) = waldump::lines(checked.identity, checked.start_lsn, [excerpt])?;
    ensure!(
        checked.lines.starts_with(&lines),
        "the front of the segment"
    );
    let mut pg_waldump = cluster.program("pg_waldump")?;
    pg_waldump
        .env("TZ", "UTC")
        .arg("-p")
        .arg(cluster.data().join("pg_wal"));
    let text = succeed(pg_waldump.arg(&last))?;
    let text: Vec<_> = text.lines().take(lines.len()).collect();
    fs::create_dir_all(directory)?;
    fs::write(directory.join(format!("pg{major}.wal")), excerpt)?;
    fs::write(
        directory.join(format!("pg{major}.waldump")),
        text.join("\n") + "\n",
    )?;
    Ok(())
}
