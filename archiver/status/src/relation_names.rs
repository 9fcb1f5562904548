//! [`RelationNames`]: the names of the server's tables by their files, for the removals that the
//! WAL reports by file numbers only.
//!
//! The names are read from the server's catalogs while the tables exist, and are kept for some time
//! after a file is gone.
//! Invariant: a name is returned only on the timeline on which the server was last seen to have the
//! file, because another timeline may use the number for another table.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};
use wal_format::{Lsn, RelationFile, SystemIdentifier, TimelineId};

mod describe;

/// The number of files of existing tables whose names are kept.
pub const FILES_MAX: usize = 20_000;
/// The number of removed files whose names are kept.
const REMOVED_MAX: usize = 4_000;

/// A file of a table, an index, or a TOAST table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedFile {
    /// The OID of the table.
    pub table: u32,
    /// The schema and the name of the table.
    pub name: String,
    /// True for the table itself, false for one of its indexes or its TOAST table.
    pub is_table: bool,
}

/// The tables of a database, as read from its catalogs.
#[derive(Debug)]
pub struct ReadDatabase {
    /// The name of the database.
    pub name: String,
    /// The server's timeline.
    pub timeline: TimelineId,
    /// The server's position before the catalogs were read.
    pub lsn: Lsn,
    /// The table of each file number.
    pub files: BTreeMap<u32, NamedFile>,
    /// True if these are all files of the database's tables.
    pub is_complete: bool,
}

/// A file that a later reading no longer found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RemovedFile {
    file: NamedFile,
    /// The timeline of the last reading that found the file.
    timeline: TimelineId,
    /// True if the table still existed, with another file.
    table_exists: bool,
    /// The position of the complete reading that no longer found the file. `None` if the reading
    /// was not complete, or was of another timeline.
    missed: Option<Lsn>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Database {
    name: String,
    /// The timeline of the last reading. `None` once the database is dropped.
    timeline: Option<TimelineId>,
    files: BTreeMap<u32, NamedFile>,
    removed: BTreeMap<u32, RemovedFile>,
}

/// The names of the tables of one server.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RelationNames {
    system: Option<SystemIdentifier>,
    databases: BTreeMap<u32, Database>,
    /// The removed files, oldest first: database and file.
    order: VecDeque<(u32, u32)>,
}

/// Files that a commit removed.
#[derive(Clone, Copy, Debug)]
pub struct Removal<'a> {
    /// The transaction.
    pub xid: u32,
    /// The timeline of the commit.
    pub timeline: TimelineId,
    /// The position of the commit.
    pub lsn: Lsn,
    /// The removed files.
    pub files: &'a [RelationFile],
}

/// The fate of a removed file, or of its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// The table was dropped.
    Dropped,
    /// The table has another file.
    Rewritten,
    /// It is not known yet, or not provable.
    Undecided,
}

impl RelationNames {
    /// Returns the stored names if they are those of this server, otherwise no names.
    #[must_use]
    pub fn of_system(stored: Self, system: SystemIdentifier) -> Self {
        let is_same = stored.is_of(system);
        let mut names = if is_same { stored } else { Self::default() };
        names.system = Some(system);
        names.limit();
        names
    }

    /// Returns true if the names are those of this server.
    #[must_use]
    pub fn is_of(&self, system: SystemIdentifier) -> bool {
        self.system == Some(system)
    }

    /// Records the tables of a database. Returns whether anything changed that a restart must know.
    pub fn learn(&mut self, oid: u32, mut read: ReadDatabase) -> bool {
        let others = self.databases.iter().filter(|(known, _)| **known != oid);
        let used: usize = others.map(|(_, database)| database.files.len()).sum();
        while used + read.files.len() > FILES_MAX && read.files.pop_first().is_some() {
            read.is_complete = false;
        }
        let database = self.databases.entry(oid).or_default();
        let known_on = database.timeline.replace(read.timeline);
        let is_same = database.files == read.files && database.name == read.name;
        if is_same && known_on == Some(read.timeline) {
            return false;
        }
        database.name = read.name;
        let before = std::mem::replace(&mut database.files, read.files);
        let tables: BTreeSet<u32> = database.files.values().map(|file| file.table).collect();
        let is_proof = read.is_complete && known_on == Some(read.timeline);
        let missed = is_proof.then_some(read.lsn);
        let Some(timeline) = known_on else {
            return true;
        };
        for (number, file) in before {
            if database.files.contains_key(&number) {
                continue;
            }
            let removed = RemovedFile {
                table_exists: tables.contains(&file.table),
                file,
                timeline,
                missed,
            };
            database.removed.insert(number, removed);
            self.order.push_back((oid, number));
        }
        self.limit();
        true
    }

    /// Records which databases the server still has. The names of a dropped database are kept like
    /// those of removed files. Returns whether anything changed that a restart must know.
    pub fn retain(&mut self, existing: &BTreeSet<u32>) -> bool {
        let mut is_changed = false;
        for (oid, database) in &mut self.databases {
            let Some(timeline) = database.timeline.take_if(|_| !existing.contains(oid)) else {
                continue;
            };
            is_changed = true;
            for (number, file) in std::mem::take(&mut database.files) {
                let removed = RemovedFile {
                    file,
                    timeline,
                    table_exists: false,
                    missed: None,
                };
                database.removed.insert(number, removed);
                self.order.push_back((*oid, number));
            }
        }
        self.limit();
        is_changed
    }

    /// Removes the oldest removed files above the limit, and dropped databases without any.
    fn limit(&mut self) {
        while self.order.len() > REMOVED_MAX
            && let Some((oid, number)) = self.order.pop_front()
        {
            if let Some(database) = self.databases.get_mut(&oid) {
                database.removed.remove(&number);
            }
        }
        self.databases
            .retain(|_, database| database.timeline.is_some() || !database.removed.is_empty());
    }

    /// Returns the databases of which a new reading may show what happened to a known table.
    #[must_use]
    pub fn to_read_again(&self, removal: Removal<'_>) -> BTreeSet<u32> {
        let is_open = |file: &&RelationFile| {
            let database = self.databases.get(&file.database);
            database.is_some_and(|database| {
                database.timeline == Some(removal.timeline)
                    && database.files.contains_key(&file.relation)
            })
        };
        let files = removal.files.iter().filter(is_open);
        files.map(|file| file.database).collect()
    }

    /// Returns the database's name, the table, and what happened to it. `None` if the name is not
    /// known. `removals` are the databases and positions of all known removals.
    fn find(
        &self,
        removal: Removal<'_>,
        file: RelationFile,
        removals: &BTreeSet<(u32, Lsn)>,
    ) -> Option<(&str, &NamedFile, Fate)> {
        let database = self.databases.get(&file.database)?;
        if let Some(named) = database.files.get(&file.relation) {
            let is_of_timeline = database.timeline == Some(removal.timeline);
            return is_of_timeline.then_some((&database.name, named, Fate::Undecided));
        }
        let removed = database.removed.get(&file.relation)?;
        if removed.timeline != removal.timeline {
            return None;
        }
        let fate = match removed.missed {
            Some(_) if removed.table_exists => Fate::Rewritten,
            // A table that was rewritten and then dropped before the reading is gone too.
            Some(missed) if missed > removal.lsn => {
                let next = removal.lsn.add(1);
                let mut later = removals.range((file.database, next)..(file.database, missed));
                match later.next() {
                    Some(_) => Fate::Undecided,
                    None => Fate::Dropped,
                }
            }
            _ => Fate::Undecided,
        };
        Some((&database.name, &removed.file, fate))
    }
}

#[cfg(test)]
mod tests;
