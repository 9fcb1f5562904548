//! `wal-archiver import DIR [--compare]`: imports another tool's WAL and prints the result for each
//! file that was not imported.

use std::path::Path;

use repository::config::ClusterSettings;

use super::output;
use crate::{
    error::{Error, Result},
    import::{Fate, import},
};

pub(super) fn run(settings: &ClusterSettings, directory: &Path, compare: bool) -> Result<()> {
    let count = import(settings, directory, compare, &|path, fate| match fate {
        Fate::Imported | Fate::Same => {}
        Fate::Missing => output::line(&format!("missing   {}", path.display())),
        Fate::Differs(problem) => {
            output::line(&format!("differs   {}: {problem}", path.display()));
        }
        Fate::Refused(problem) => {
            output::line(&format!("refused   {}: {problem}", path.display()));
        }
    })?;
    if compare {
        output::line(&format!(
            "{} segments are the same, {} are missing in {}, {} differ, {} cannot be read",
            count.same, count.missing, settings.repository, count.differing, count.refused
        ));
    } else {
        output::line(&format!(
            "{} files imported, {} were there, {} differ, {} refused",
            count.imported, count.same, count.differing, count.refused
        ));
    }
    if count.differing > 0 {
        return Err(Error::Verify {
            problems: usize::try_from(count.differing).unwrap_or(usize::MAX),
        });
    }
    if count.refused > 0 {
        return Err(Error::Wal(intake::Error::Refused {
            path: directory.to_owned(),
            problem: format!("{} files were refused", count.refused),
        }));
    }
    Ok(())
}
