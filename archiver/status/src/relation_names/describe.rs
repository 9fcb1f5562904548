//! The description of a removal for users.

use std::collections::{BTreeMap, BTreeSet};

use wal_format::{Lsn, RelationFile, summary::DROPPED_RELATIONS_MAX};

use super::{Fate, RelationNames, Removal};

/// The number of tables that one description names.
const NAMED_MAX: usize = 3;

impl RelationNames {
    /// Describes a removal: the tables whose names are known with what happened to them, and the
    /// number of other files. `removals` are the databases and positions of all known removals.
    #[must_use]
    pub fn describe(&self, removal: Removal<'_>, removals: &BTreeSet<(u32, Lsn)>) -> String {
        let mut tables: BTreeMap<(Fate, &str), BTreeSet<&str>> = BTreeMap::new();
        let mut parts: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        let mut removed_tables = BTreeSet::new();
        let mut unknown = Vec::new();
        let found: Vec<_> = removal
            .files
            .iter()
            .map(|file| (file, self.find(removal, *file, removals)))
            .collect();
        for (file, found) in &found {
            match found {
                Some((database, named, fate)) if named.is_table => {
                    removed_tables.insert((file.database, named.table));
                    tables
                        .entry((*fate, database))
                        .or_default()
                        .insert(&named.name);
                }
                Some(_) => {}
                None => unknown.push(**file),
            }
        }
        // The files of indexes and of the TOAST table go with their table, or alone in a rebuild.
        for (file, found) in &found {
            if let Some((database, named, _)) = found
                && !removed_tables.contains(&(file.database, named.table))
            {
                parts.entry(database).or_default().insert(&named.name);
            }
        }
        let mut texts: Vec<String> = Vec::new();
        for ((fate, database), names) in &tables {
            let noun = if names.len() == 1 { "table" } else { "tables" };
            let fate = match fate {
                Fate::Dropped => "dropped",
                Fate::Rewritten => "truncated or rewritten",
                Fate::Undecided => "dropped, truncated or rewritten",
            };
            let names = list(names);
            texts.push(format!("{noun} {fate}: {names} (database {database})"));
        }
        for (database, names) in &parts {
            let names = list(names);
            texts.push(format!(
                "index of {names} dropped or rebuilt (database {database})"
            ));
        }
        texts.extend(describe_unknown(&unknown));
        if removal.files.len() >= DROPPED_RELATIONS_MAX {
            texts.push("more files are not listed in the archive's summary".to_owned());
        }
        let xid = removal.xid;
        let text = texts.join("; ");
        format!("{text}; `pitr-restore locate --xid {xid}` shows the transaction")
    }
}

/// Describes files without a known name.
fn describe_unknown(files: &[RelationFile]) -> Option<String> {
    let first = files.first()?;
    let (number, database) = (first.relation, first.database);
    Some(match files.len() {
        1 => format!(
            "a table or an index was dropped, truncated or rewritten (file {number} in database \
             {database}, name not known)"
        ),
        count => format!(
            "{count} files of tables or indexes were removed (file {number} in database \
             {database} and others, names not known)"
        ),
    })
}

/// Lists the first names and the number of the others.
fn list(names: &BTreeSet<&str>) -> String {
    let listed: Vec<&str> = names.iter().take(NAMED_MAX).copied().collect();
    let listed = listed.join(", ");
    match names.len().saturating_sub(NAMED_MAX) {
        0 => listed,
        more => format!("{listed} and {more} more"),
    }
}
