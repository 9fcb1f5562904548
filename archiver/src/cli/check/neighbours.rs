//! The checks of what others do to the archive: a second daemon on the slot, the server's own
//! archiver, files of other users.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use replication::ReplicationClient;
use repository::{ExitKind, access::user_name, config::ClusterSettings};
use serde_json::Value;

use super::Report;
use crate::{error::Result, spool};

/// The number of files that are examined below a directory. More would make `check` slow in a
/// repository of years.
const FILES_MAX: usize = 20_000;

/// Returns the holder of an active slot if it is not the daemon of these settings: its application
/// name and address, or `another process` if the role may not see them.
///
/// The daemon of these settings answers over HTTP and says whether it streams; one that does not
/// answer holds the lock of the spool on this host.
pub(super) async fn other_holder(
    sql: &mut ReplicationClient,
    cluster: &ClusterSettings,
    reports: &[Value],
) -> Result<Option<String>> {
    let ours = reports
        .iter()
        .find(|report| report["cluster"] == cluster.name.as_str());
    let directory = cluster.spool.join(cluster.name.as_str());
    let is_ours = match ours {
        Some(report) => report["source"]["stream_connected"] != false,
        None => spool::is_locked(&directory),
    };
    if is_ours {
        return Ok(None);
    }
    let quoted = cluster.slot.replace('\'', "''");
    let rows = sql
        .query(&format!(
            "SELECT coalesce(nullif(application_name, ''), 'another process') || coalesce(' from ' || client_addr::text, '') \
             FROM pg_catalog.pg_replication_slots LEFT JOIN pg_catalog.pg_stat_replication ON pid = active_pid \
             WHERE slot_name = '{quoted}' AND active"
        ))
        .await?;
    Ok(rows.into_iter().next().map(|row| {
        let holder = row.into_iter().next().flatten();
        holder.unwrap_or_else(|| "another process".to_owned())
    }))
}

/// Checks the server's `archive_command` or `archive_library`. While it fails, the server keeps all
/// WAL until its disk is full.
pub(super) async fn archiver(sql: &mut ReplicationClient, report: &mut Report) -> Result<()> {
    let rows = sql
        .query(
            "SELECT current_setting('archive_mode'), failed_count::text, coalesce(last_failed_wal, ''), \
             coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false)::text, \
             coalesce(last_failed_time::text, '') FROM pg_catalog.pg_stat_archiver",
        )
        .await?;
    let field = |at: usize| rows.first().and_then(|row| row.get(at)).cloned().flatten();
    let text = |at: usize| field(at).unwrap_or_default();
    if text(0) == "off" {
        return Ok(());
    }
    let what = "server's archiver";
    if text(3) == "true" {
        let found = format!(
            "archive_command failed for {} at {} ({} failures), and the server keeps all WAL until it succeeds; the reason \
             is in the server's log. Correct archive_command, or set archive_mode = off and restart the server",
            text(2),
            text(4),
            text(1)
        );
        report.fail(what, &found, ExitKind::Failed);
    } else {
        report.ok(what, "its last attempt succeeded, or there was none");
    }
    Ok(())
}

/// Checks that the owner of the repository and of the spool may read each file there. A command
/// that another user ran may have left files that stop the daemon.
pub(super) fn foreign_files(cluster: &ClusterSettings, report: &mut Report) {
    let places = cluster.repository.each();
    let folders = places.iter().filter_map(|place| place.url.folder());
    let folders = folders.map(|folder| ("repository's files", folder.join(cluster.name.as_str())));
    let spool = cluster.spool.join(cluster.name.as_str());
    for (what, directory) in folders.chain([("spool's files", spool)]) {
        let Ok(found) = fs::metadata(&directory) else {
            continue;
        };
        let owner = found.uid();
        let mut closed = Vec::new();
        let mut examined = 0;
        collect_closed(&directory, (owner, found.gid()), &mut examined, &mut closed);
        let Some((path, uid)) = closed.first() else {
            continue;
        };
        let name = user_name(owner);
        let text = format!(
            "{} cannot be used by {name}, the owner of {}: for example {} belongs to {}; run `chown -R {name} {}` as root",
            match closed.len() {
                1 => "1 file".to_owned(),
                files => format!("{files} files"),
            },
            directory.display(),
            path.display(),
            user_name(*uid),
            directory.display()
        );
        report.fail(what, &text, ExitKind::Failed);
    }
}

/// Checks that a configured group shares the directories that exist, and what is below them.
pub(super) fn shared(cluster: &ClusterSettings, report: &mut Report) {
    let places = cluster.repository.each();
    let folders = places.iter().filter_map(|place| {
        let access = place.access.as_ref()?;
        Some(("repository_group", place.url.folder()?, access))
    });
    let spool = cluster.spool_access.as_ref();
    let spool = spool.map(|access| ("spool_group", cluster.spool.as_path(), access));
    for (what, directory, access) in folders.chain(spool) {
        let difference = access.difference(directory);
        let difference = difference.and_then(|found| match found {
            None => {
                let below = directory.join(cluster.name.as_str());
                access.difference_below(&below, &[&cluster.catalog, &below.join(spool::LOCK_FILE)])
            }
            found => Ok(found),
        });
        match difference {
            Ok(None) => report.ok(what, &format!("{} shares it", access.group)),
            Ok(Some(difference)) => report.fail(what, &difference, ExitKind::Usage),
            Err(error) => report.fail_with(what, &error.into()),
        }
    }
}

/// Collects the files below `directory` that `owner` (user and group) may not read.
fn collect_closed(
    directory: &Path,
    owner: (u32, u32),
    examined: &mut usize,
    closed: &mut Vec<(PathBuf, u32)>,
) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        *examined += 1;
        if *examined > FILES_MAX {
            return;
        }
        let Ok(found) = entry.metadata() else {
            continue;
        };
        let by_group = found.gid() == owner.1 && found.mode() & 0o040 != 0;
        let by_all = found.mode() & 0o004 != 0;
        if found.uid() != owner.0 && owner.0 != 0 && !by_group && !by_all {
            closed.push((entry.path(), found.uid()));
        } else if found.is_dir() {
            collect_closed(&entry.path(), owner, examined, closed);
        }
    }
}
