//! Checks before the first byte is written that each part belongs to this backup.
//!
//! The SHA-256 of a slice is compared when the slice is fetched for the extraction. The checks here
//! need no fetch of the data.

use std::collections::BTreeMap;

use repository::{Damage, Repository, incomplete_part};
use wal_format::{BackupInfo, ControlFile, ObjectKey, SlicePart};

use super::{Access, CONTROL, extract};
use crate::{Error, Result};

/// Compares a listing of a backup's objects with its description: each object exists and has the
/// recorded length.
///
/// # Errors
/// [`Error::Damaged`] names the first object that does not match.
pub(crate) fn check_parts(repository: &Repository, backup: &BackupInfo) -> Result<()> {
    let prefix = format!("{}/backup/{}/", backup.system_identifier, backup.id);
    let listed: BTreeMap<ObjectKey, u64> = repository.list(&prefix)?.into_iter().collect();
    match incomplete_part(backup, &listed) {
        Some(Damage { object, problem }) => Err(Error::Damaged {
            object,
            problem: format!("{problem} in {}", repository.url()),
        }),
        None => Ok(()),
    }
}

/// Compares `backup_label` and `tablespace_map` with the description. PostgreSQL sends them first,
/// so usually one slice has to be read. Returns the access to the cluster's files: `backup_label`
/// has the mode of a file that the server creates (`sendFileWithContent` in `basebackup.c`).
pub(super) fn check_label(repository: &Repository, backup: &BackupInfo) -> Result<Access> {
    let mut access = Access::Owner;
    let mut label: Option<Vec<u8>> = None;
    let mut map: Option<Vec<u8>> = None;
    for slice in backup.label_slices() {
        let raw = extract::fetch(repository, backup, slice)?;
        let mut ended = false;
        extract::for_each_part(backup, slice, &raw, &mut |part| {
            if let SlicePart::File {
                path,
                content,
                mode,
                offset,
                ..
            } = part
            {
                if path == "backup_label" && offset == 0 {
                    access = Access::of_file(mode);
                }
                match path.as_str() {
                    "backup_label" => label.get_or_insert_default().extend_from_slice(content),
                    "tablespace_map" => map.get_or_insert_default().extend_from_slice(content),
                    _ => ended = true,
                }
            }
            Ok(())
        })?;
        if ended {
            let label = label.unwrap_or_default();
            return backup
                .check_label(&label, map.as_deref())
                .map(|()| access)
                .map_err(|problem| extract::damaged(backup, slice, problem));
        }
    }
    Err(Error::Damaged {
        object: format!("backup {}", backup.id),
        problem: "it holds no backup_label".to_owned(),
    })
}

/// Refuses the `pg_control` of another cluster.
pub(super) fn check_control(backup: &BackupInfo, control: &[u8]) -> Result<()> {
    let problem = match ControlFile::parse(control) {
        Ok(control) if control.system_identifier == backup.system_identifier => return Ok(()),
        Ok(control) => format!(
            "it is of system {}, the backup of system {}",
            control.system_identifier, backup.system_identifier
        ),
        Err(error) => error.to_string(),
    };
    Err(Error::Damaged {
        object: format!("{CONTROL} of backup {}", backup.id),
        problem,
    })
}
