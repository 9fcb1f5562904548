//! Standard output: the only place that writes to it. Errors go to standard error.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is the program's output"
)]

use std::path::Path;

use repository::ExitKind;
use serde::Serialize;
use wal_format::TransactionEnd;

use crate::{
    Error, RestorePlan, Result,
    list::Listing,
    plan::{PreparedTransaction, print_path},
    tablespaces::ReplayedTablespace,
    unfinished::RemovedFiles,
};

/// Commits of a failover that are shown to people; `--json` has more.
const LOST_COMMITS_SHOWN_MAX: usize = 100;

pub(super) fn line(text: &str) {
    println!("{text}");
}

pub(super) fn error(text: &str) {
    eprintln!("pitr-restore: {text}");
}

/// A report on the progress, which is no part of the answer.
pub(super) fn note(text: &str) {
    eprintln!("pitr-restore: {text}");
}

/// A path as a shell takes it.
pub(super) fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-:=@+,".contains(c);
    if text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::io("write", "standard output")(error.into()))?;
    println!("{text}");
    Ok(())
}

/// Prints the document of a refusal.
pub(super) fn refusal(kind: ExitKind, message: &str) {
    println!("{:#}", kind.document(message));
}

pub(super) fn plan(plan: &RestorePlan) {
    println!("backup        {} ({})", plan.backup, plan.reason);
    for one in &plan.not_chosen {
        println!("not chosen    {}: {}", one.backup, one.reason);
    }
    println!("timelines     {}", print_path(&plan.path));
    println!("redo from     {}", plan.start_lsn);
    println!("stop          {}", plan.stop);
    if let Some(asked) = plan.moved_from {
        println!(
            "              instead of {asked}: the same rows, before the effects of a DROP that commits later"
        );
    }
    if let Some(kept) = &plan.last_kept {
        println!("last kept     {}", transaction(kept));
    }
    if let Some(dropped) = &plan.first_dropped {
        println!("first dropped {}", transaction(dropped));
    }
    if let Some(unproved) = &plan.unproved {
        let until = match unproved.proved {
            Some(time) => format!("after {time}"),
            None => "by any time of the server".to_owned(),
        };
        println!(
            "not proved    {until}: the target is later, and what was committed in between, if anything, is not archived"
        );
    }
    if plan.late_commit_count > 0 {
        println!(
            "lost in time  {} commit(s) lie behind the stop although their time is not after the target:",
            plan.late_commit_count
        );
        for end in &plan.late_commits {
            println!("              {}", transaction(end));
        }
    }
    for tablespace in &plan.tablespaces {
        println!("tablespace    {}", replayed(tablespace));
    }
    for prepared in &plan.in_doubt {
        println!("in doubt      {}", in_doubt(prepared));
    }
    for removed in &plan.removed {
        println!("removed       {}", removed_files(removed));
    }
    println!("backup bytes  {}", plan.backup_bytes);
    println!("WAL bytes     {}", plan.wal_bytes);
    println!("to fetch      {} bytes", plan.fetch_bytes);
    println!("unpacked      {} bytes", plan.unpacked_bytes);
    for system in &plan.file_systems {
        let reused = match system.reused_bytes {
            0 => String::new(),
            bytes => format!(", {bytes} used by what is there now"),
        };
        println!(
            "space         {} bytes needed, {} free{reused}: {}",
            system.needed_bytes,
            system.free_bytes,
            system.names()
        );
    }
    println!(
        "estimate      {} s ({})",
        plan.estimated_seconds, plan.estimate_basis
    );
}

fn transaction(end: &TransactionEnd) -> String {
    let kind = if end.kind.is_commit() {
        "commit"
    } else {
        "abort"
    };
    format!(
        "{kind} of transaction {} at {} ({})",
        end.xid, end.lsn, end.time
    )
}

fn replayed(tablespace: &ReplayedTablespace) -> String {
    let place = match &tablespace.directory {
        None => "inside of the data directory".to_owned(),
        Some(directory) if directory.as_os_str() == tablespace.location.as_str() => {
            format!("in {}", directory.display())
        }
        Some(directory) => format!(
            "in {} instead of {}",
            directory.display(),
            tablespace.location
        ),
    };
    let dropped = tablespace
        .dropped
        .map_or_else(String::new, |lsn| format!(", dropped at {lsn}"));
    format!(
        "{} is created by the replay at {} {place}{dropped}",
        tablespace.oid, tablespace.lsn
    )
}

fn in_doubt(prepared: &PreparedTransaction) -> String {
    let name = match &prepared.gid {
        Some(gid) => format!("'{gid}'"),
        None => "a name that lies before the archive".to_owned(),
    };
    let since = prepared
        .time
        .map_or_else(String::new, |time| format!(" since {time}"));
    format!(
        "prepared transaction {}, {name}{since}: end it with COMMIT PREPARED or ROLLBACK PREPARED",
        prepared.xid
    )
}

fn removed_files(removed: &RemovedFiles) -> String {
    format!(
        "{} {} has lost its files at the stop: transaction {} removes them at {} and commits the DROP later; to keep them \
         restore with --target-lsn {} --target-exclusive, or drop it in the copy too",
        removed.kind, removed.oid, removed.xid, removed.lsn, removed.lsn
    )
}

pub(super) fn listing(listing: &Listing) {
    if listing.epochs.len() > 1 {
        println!("system identifiers of the cluster, one after the other");
        for epoch in &listing.epochs {
            let how = if epoch.listed {
                "listed below".to_owned()
            } else {
                format!(
                    "see and restore it with --system {}",
                    epoch.system_identifier
                )
            };
            println!(
                "  {}  PostgreSQL {}  since {}  {} backups  {how}",
                epoch.system_identifier,
                epoch.postgresql_major,
                epoch.since,
                epoch.backups.len()
            );
        }
    }
    println!("backups");
    for one in &listing.backups {
        let usable = match &one.damage {
            None if one.usable => String::new(),
            None => "  NOT USABLE: its WAL is missing".to_owned(),
            Some(damage) => format!("  NOT USABLE: it is damaged: {damage}"),
        };
        println!(
            "  {}  {}  {} to {}  {} bytes  timeline {}  {}{usable}",
            one.id,
            one.finished,
            one.start_lsn,
            one.stop_lsn,
            one.stored_bytes,
            one.branch,
            one.label
        );
    }
    println!("WAL without a gap");
    for window in &listing.windows {
        let time = |time: Option<wal_format::PgTimestamp>| {
            time.map_or_else(|| "no commit".to_owned(), |time| time.to_string())
        };
        let restorable = if window.restorable {
            "restorable"
        } else {
            "no backup leads to it"
        };
        println!(
            "  timeline {}  {} to {}  {} to {}  {restorable}",
            window.branch,
            window.start_lsn,
            window.end_lsn,
            time(window.first_time),
            time(window.last_time)
        );
    }
    println!("restorable");
    for one in &listing.restorable {
        let time = |time: Option<wal_format::PgTimestamp>, none: &str| {
            time.map_or_else(|| none.to_owned(), |time| time.to_string())
        };
        let how = if one.by_default {
            String::new()
        } else {
            format!("  with --target-timeline {}", one.branch.timeline)
        };
        println!(
            "  timeline {}  {} to {}  {} to {}  from backup {}{how}",
            one.branch,
            one.start_lsn,
            one.end_lsn,
            time(one.first_time, "the fork"),
            time(one.last_time, "no commit"),
            one.backup
        );
    }
    if let Some(refusal) = &listing.refusal {
        println!("REFUSED  a restore of the newest state: {refusal}");
    }
    for gap in &listing.gaps {
        println!(
            "GAP  timeline {}  {} to {}",
            gap.branch, gap.start_lsn, gap.end_lsn
        );
    }
    for minimal in &listing.minimal_wal {
        let end = minimal.end_lsn;
        println!(
            "MINIMAL  timeline {}  {} to {}  written with wal_level = minimal, so no earlier backup leads over it",
            minimal.branch,
            minimal.start_lsn,
            end.map_or_else(|| "its end".to_owned(), |end| end.to_string())
        );
    }
    for loss in &listing.failover_losses {
        println!("FAILOVER  {loss}");
        for commit in loss.listed.iter().take(LOST_COMMITS_SHOWN_MAX) {
            println!(
                "  lost  transaction {}  {}  {}",
                commit.xid, commit.lsn, commit.time
            );
        }
        let shown = LOST_COMMITS_SHOWN_MAX.min(loss.listed.len()) as u64;
        if loss.commits > shown {
            let listed = loss.listed.len();
            println!(
                "  and {} more; --json lists the first {listed}",
                loss.commits - shown
            );
        }
        if loss.commits > 0 {
            println!(
                "  to see their rows, restore with --target-timeline {}",
                loss.branch.timeline
            );
        }
    }
    for window in &listing.expired {
        let time = |time: Option<wal_format::PgTimestamp>| {
            time.map_or_else(|| "?".to_owned(), |time| time.to_string())
        };
        println!(
            "expired  timeline {}  {} to {}  {} to {}",
            window.branch,
            window.from_lsn,
            window.to_lsn,
            time(window.from),
            time(window.to)
        );
    }
    for one in &listing.damaged {
        println!("DAMAGED  {}  {}", one.object, one.problem);
    }
    for point in &listing.restore_points {
        println!(
            "restore point  {}  timeline {}  {}  {}",
            point.name, point.branch, point.lsn, point.time
        );
    }
}
