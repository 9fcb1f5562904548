//! `wal-archiver backup`: takes a base backup now. Shows a progress bar on a terminal, and log
//! lines elsewhere.

use std::{
    io::IsTerminal,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use repository::config::ClusterSettings;

use super::{interrupt, output, runtime};
use crate::{
    base_backup::{self, Progress},
    error::Result,
};

/// The interval between two log lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub(super) fn backup(settings: &ClusterSettings, label: &str, json: bool) -> Result<()> {
    let taken = take(settings, label, json);
    if let Err(error) = &taken
        && json
    {
        output::json(&error.exit_kind().document(&error.to_string()));
    }
    taken
}

fn take(settings: &ClusterSettings, label: &str, json: bool) -> Result<()> {
    let runtime = runtime()?;
    let began = Instant::now();
    let bar = if std::io::stderr().is_terminal() {
        ProgressBar::new(0)
    } else {
        ProgressBar::hidden()
    };
    let template = "{msg} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let last = Mutex::new(Instant::now());
    let is_told = AtomicBool::new(false);
    let progress = |progress: Progress| match progress {
        Progress::Checkpoint => {
            bar.set_message("waiting for the checkpoint");
            tracing::info!("waiting for the server's checkpoint");
        }
        Progress::WaitingForRestartpoint => {
            bar.set_message("waiting for a restartpoint");
            tracing::info!(
                event = "restartpoint_awaited",
                "the standby has no restartpoint on its timeline yet; waiting for it. CHECKPOINT on the primary ends this"
            );
        }
        Progress::WaitingForOtherBackup => {
            bar.set_message("waiting for another backup");
            if !is_told.swap(true, Ordering::Relaxed) {
                tracing::info!(
                    event = "other_backup_awaited",
                    "another base backup of this server runs; this one begins after it"
                );
            }
        }
        Progress::WaitingForArchiver => {
            bar.set_message("waiting for the archiver");
            tracing::info!(
                event = "archiver_awaited",
                "no archiver streams from the server yet; the backup waits a few seconds for `wal-archiver run`"
            );
        }
        Progress::Copying { done, total } => {
            bar.set_message("copying");
            bar.set_length(total.max(done));
            bar.set_position(done);
            if let Ok(mut last) = last.lock()
                && last.elapsed() >= LINE_INTERVAL
            {
                *last = Instant::now();
                tracing::info!(done, total, "copying");
            }
        }
        Progress::WaitingForWal(stop_lsn) => {
            bar.set_message("waiting for the WAL");
            tracing::info!(%stop_lsn, "the data is stored; waiting until the WAL up to the stop LSN is in the repository");
        }
        Progress::WalIsLate {
            stop_lsn,
            seconds_max,
        } => {
            bar.suspend(|| {
                output::error_line(&format!(
                    "the WAL up to {stop_lsn} is not in the repository yet. Does `wal-archiver run` archive this server \
                     into this repository? `wal-archiver status` shows it. The backup waits for {seconds_max} s in all, \
                     and can be interrupted: it is listed only when it is complete"
                ));
            });
        }
    };
    let stop = interrupt::request()?;
    let info = runtime.block_on(base_backup::take(settings, label, &progress, stop))?;
    bar.finish_and_clear();
    if json {
        output::json(&serde_json::json!({
            "cluster": settings.name,
            "repository": settings.repository.to_string(),
            "id": info.id,
            "label": info.label,
            "branch": info.branch,
            "start_lsn": info.start_lsn,
            "stop_lsn": info.stop_lsn,
            "started": info.started,
            "finished": info.finished,
            "raw_bytes": info.raw_bytes,
            "stored_bytes": info.stored_bytes,
            "seconds": began.elapsed().as_secs_f64(),
            "warnings": info.warnings,
        }));
        return Ok(());
    }
    output::line(&format!(
        "backup {} done: {} bytes in {} stored bytes, WAL {} to {}, {:.1} s",
        info.id,
        info.raw_bytes,
        info.stored_bytes,
        info.start_lsn,
        info.stop_lsn,
        began.elapsed().as_secs_f64()
    ));
    for warning in &info.warnings {
        output::line(&format!("the server's warning: {warning}"));
    }
    Ok(())
}
