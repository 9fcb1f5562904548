//! Standard output, which only this module writes to. Errors go to standard error. A reader that
//! closes its end of the pipe (`| head`) is not an error.

use std::{
    io::{Write, stderr, stdout},
    path::Path,
};

use repository::{ExitKind, printable};
use serde::Serialize;
use wal_format::TransactionEnd;

use crate::{
    Error, RestorePlan, Result,
    list::Listing,
    plan::{LeftOut, PreparedTransaction, print_path, timeline_option},
    shell,
    tablespaces::ReplayedTablespace,
    unfinished::RemovedFiles,
};

/// Writes one line.
macro_rules! say {
    ($to:expr, $($text:tt)*) => {
        drop(writeln!($to, "{}", printable(&format!($($text)*))))
    };
}

/// The maximum number of commits lost by a failover that the text output shows; `--json` has more.
const LOST_COMMITS_SHOWN_MAX: usize = 100;

pub(super) fn line(text: &str) {
    say!(stdout(), "{text}");
}

/// Prints an error, which may have several lines, to standard error.
pub(super) fn error(text: &str) {
    let lines: Vec<_> = text.split('\n').map(printable).collect();
    drop(writeln!(stderr(), "pitr-restore: {}", lines.join("\n")));
}

/// Prints a progress report, which is not part of the result, to standard error.
pub(super) fn note(text: &str) {
    say!(stderr(), "pitr-restore: {text}");
}

/// Returns a path quoted for a shell.
pub(super) fn shell_word(path: &Path) -> String {
    shell::quoted(&path.display().to_string())
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::io("write", "standard output")(error.into()))?;
    drop(writeln!(stdout(), "{text}"));
    Ok(())
}

/// Prints the document of a refusal.
pub(super) fn refusal(kind: ExitKind, message: &str) {
    drop(writeln!(stdout(), "{:#}", kind.document(message)));
}

pub(super) fn plan(plan: &RestorePlan) {
    say!(stdout(), "backup        {} ({})", plan.backup, plan.reason);
    for one in &plan.not_chosen {
        say!(stdout(), "not chosen    {}: {}", one.backup, one.reason);
    }
    say!(stdout(), "timelines     {}", print_path(&plan.path));
    say!(stdout(), "redo from     {}", plan.start_lsn);
    say!(stdout(), "stop          {}", plan.stop);
    if let Some(asked) = plan.moved_from {
        say!(
            stdout(),
            "              instead of {asked}: the same rows, before the effects of a DROP that commits later"
        );
    }
    if let Some(kept) = &plan.last_kept {
        say!(stdout(), "last kept     {}", transaction(kept));
    }
    if let Some(dropped) = &plan.first_dropped {
        say!(stdout(), "first dropped {}", transaction(dropped));
    }
    if let Some(unproved) = &plan.unproved {
        let until = match unproved.proved {
            Some(time) => format!("after {time}"),
            None => "by any time of the server".to_owned(),
        };
        say!(
            stdout(),
            "not proved    {until}: the target is later, and what was committed in between, if \
             anything, is not archived"
        );
    }
    if plan.late_commit_count > 0 {
        say!(
            stdout(),
            "lost in time  {} commit(s) lie behind the stop although their time is not after the target:",
            plan.late_commit_count
        );
        for end in &plan.late_commits {
            say!(stdout(), "              {}", transaction(end));
        }
    }
    for one in &plan.left_out {
        say!(stdout(), "left out      {}", left_out(one));
    }
    for tablespace in &plan.tablespaces {
        say!(stdout(), "tablespace    {}", replayed(tablespace));
    }
    for prepared in &plan.in_doubt {
        say!(stdout(), "in doubt      {}", in_doubt(prepared));
    }
    for removed in &plan.removed {
        say!(stdout(), "removed       {}", removed_files(removed));
    }
    say!(stdout(), "backup bytes  {}", plan.backup_bytes);
    say!(stdout(), "WAL bytes     {}", plan.wal_bytes);
    say!(stdout(), "to fetch      {} bytes", plan.fetch_bytes);
    say!(stdout(), "unpacked      {} bytes", plan.unpacked_bytes);
    for system in &plan.file_systems {
        let reused = match system.reused_bytes {
            0 => String::new(),
            bytes => format!(", {bytes} used by what is there now"),
        };
        say!(
            stdout(),
            "space         {} bytes needed, {} free{reused}: {}",
            system.needed_bytes,
            system.free_bytes,
            system.names()
        );
    }
    say!(
        stdout(),
        "estimate      {} s ({})",
        plan.estimated_seconds,
        plan.estimate_basis
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

fn left_out(one: &LeftOut) -> String {
    let option = format!("--target-timeline {}", one.target_timeline);
    match one.commits {
        Some(commits) => format!(
            "{commits} commit(s) up to this time are on timeline {}, which this plan does not follow; the last is the {}: \
             {option} keeps them",
            one.branch,
            transaction(&one.last)
        ),
        None => format!(
            "the transaction also exists on timeline {}, as the {}: {option} restores to that one",
            one.branch,
            transaction(&one.last)
        ),
    }
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
    let since = prepared
        .time
        .map_or_else(String::new, |time| format!(" since {time}"));
    format!(
        "prepared transaction {}{since}: end it with COMMIT PREPARED or ROLLBACK PREPARED",
        prepared.named()
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
        say!(
            stdout(),
            "system identifiers of the cluster, one after the other"
        );
        for epoch in &listing.epochs {
            let how = if epoch.listed {
                "listed below".to_owned()
            } else {
                format!(
                    "see and restore it with --system {}",
                    epoch.system_identifier
                )
            };
            say!(
                stdout(),
                "  {}  PostgreSQL {}  since {}  {} backups  {how}",
                epoch.system_identifier,
                epoch.postgresql_major,
                epoch.since,
                epoch.backups.len()
            );
        }
    }
    say!(stdout(), "backups");
    for one in &listing.backups {
        let usable = match &one.damage {
            None if one.usable => String::new(),
            None => "  NOT USABLE: its WAL is missing".to_owned(),
            Some(damage) => format!("  NOT USABLE: it is damaged: {damage}"),
        };
        say!(
            stdout(),
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
    say!(stdout(), "WAL without a gap");
    for window in &listing.windows {
        let time = |time: Option<wal_format::PgTimestamp>| {
            time.map_or_else(|| "no commit".to_owned(), |time| time.to_string())
        };
        let restorable = if window.restorable {
            "restorable"
        } else {
            "no backup leads to it"
        };
        say!(
            stdout(),
            "  timeline {}  {} to {}  {} to {}  {restorable}",
            window.branch,
            window.start_lsn,
            window.end_lsn,
            time(window.first_time),
            time(window.last_time)
        );
    }
    say!(stdout(), "restorable");
    for one in &listing.restorable {
        let time = |time: Option<wal_format::PgTimestamp>, none: &str| {
            time.map_or_else(|| none.to_owned(), |time| time.to_string())
        };
        let how = if one.by_default {
            String::new()
        } else {
            format!("  with --target-timeline {}", one.target_timeline)
        };
        say!(
            stdout(),
            "  timeline {}  {} to {}  {} to {}  from backup {}{how}",
            one.branch,
            one.start_lsn,
            one.end_lsn,
            time(
                one.first_time,
                one.last_time.map_or("no commit", |_| "the fork")
            ),
            time(one.last_time, "no commit"),
            one.backup
        );
    }
    if let Some(refusal) = &listing.refusal {
        say!(
            stdout(),
            "REFUSED  a restore of the newest state: {refusal}"
        );
    }
    for gap in &listing.gaps {
        say!(
            stdout(),
            "GAP  timeline {}  {} to {}",
            gap.branch,
            gap.start_lsn,
            gap.end_lsn
        );
    }
    for minimal in &listing.minimal_wal {
        let end = minimal.end_lsn;
        say!(
            stdout(),
            "MINIMAL  timeline {}  {} to {}  written with wal_level = minimal, so no earlier backup leads over it",
            minimal.branch,
            minimal.start_lsn,
            end.map_or_else(|| "its end".to_owned(), |end| end.to_string())
        );
    }
    for loss in &listing.failover_losses {
        say!(stdout(), "FAILOVER  {loss}");
        for commit in loss.listed.iter().take(LOST_COMMITS_SHOWN_MAX) {
            say!(
                stdout(),
                "  lost  transaction {}  {}  {}",
                commit.xid,
                commit.lsn,
                commit.time
            );
        }
        let shown = LOST_COMMITS_SHOWN_MAX.min(loss.listed.len()) as u64;
        if loss.commits > shown {
            let listed = loss.listed.len();
            say!(
                stdout(),
                "  and {} more; --json lists the first {listed}",
                loss.commits - shown
            );
        }
        if loss.commits > 0 {
            say!(
                stdout(),
                "  to see their rows, restore with --target-timeline {}",
                timeline_option(listing.timelines.iter().copied(), loss.branch)
            );
        }
    }
    for window in &listing.expired {
        let time = |time: Option<wal_format::PgTimestamp>| {
            time.map_or_else(|| "?".to_owned(), |time| time.to_string())
        };
        say!(
            stdout(),
            "expired  timeline {}  {} to {}  {} to {}",
            window.branch,
            window.from_lsn,
            window.to_lsn,
            time(window.from),
            time(window.to)
        );
    }
    for one in &listing.damaged {
        say!(stdout(), "DAMAGED  {}  {}", one.object, one.problem);
    }
    for point in &listing.restore_points {
        say!(
            stdout(),
            "restore point  {}  timeline {}  {}  {}",
            point.name,
            point.branch,
            point.lsn,
            point.time
        );
    }
}
