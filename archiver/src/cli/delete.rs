//! `wal-archiver backup delete ID`: prints the moments that can no longer be restored without a
//! backup, then deletes it.

use jiff::Timestamp;
use repository::{ExitKind, config::ClusterSettings};
use wal_format::BackupId;

use super::output;
use crate::{
    error::{Error, Result},
    upkeep::expire::{
        self,
        delete::{Deletion, decide},
    },
};

pub(super) fn delete(
    settings: &ClusterSettings,
    id: &BackupId,
    force: bool,
    dry_run: bool,
) -> Result<()> {
    let now = Timestamp::now();
    let deletions = decide(settings, id, now)?;
    let mut objections = Vec::new();
    for Deletion {
        place,
        windows,
        objection,
    } in &deletions
    {
        let place = format!("cluster {}: {place}", settings.name);
        for window in windows {
            let lost = format!("can no longer be restored without {id} ");
            output::line(&format!("{place}: {}", output::window(window, &lost)));
        }
        if windows.is_empty() {
            output::line(&format!("{place}: no moment is lost without {id}"));
        }
        if let Some(objection) = objection {
            output::line(&format!("{place}: {objection}"));
            objections.push(objection);
        }
    }
    if dry_run {
        output::line("nothing was changed");
        return Ok(());
    }
    if !objections.is_empty() && !force {
        return Err(Error::Expire {
            problem: format!(
                "backup {id} was not deleted, for the reason above; add --force to delete it and lose what is named"
            ),
            kind: ExitKind::Failed,
        });
    }
    for Deletion { place, .. } in &deletions {
        let from = expire::delete::delete(settings, place, id, now, force)?;
        output::line(&format!(
            "cluster {}: {place}: backup {id} counts as absent from now on. `wal-archiver expire` removes it after {}; until \
             then `wal-archiver expire --undo` brings it back",
            settings.name,
            expire::time(from)
        ));
    }
    Ok(())
}
