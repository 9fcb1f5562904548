//! [`Removals`]: the files that commits removed, for the marks on the strip. Their tables are named
//! as far as the names are known.

use std::collections::{BTreeMap, BTreeSet};

use status::{cluster_status::ClusterStatus, details::Mark, relation_names::Removal};
use wal_format::{Lsn, PgTimestamp, RelationFile};

/// The age up to which a removal asks for a new reading of the names.
const ASKS_MICROS: i64 = 600 * 1_000_000;

/// A transaction and the files that its commit removed.
#[derive(Debug)]
struct Removed {
    xid: u32,
    files: Vec<RelationFile>,
}

/// The removals among the marks, by time and position.
#[derive(Debug, Default)]
pub(super) struct Removals(BTreeMap<(PgTimestamp, Lsn), Removed>);

impl Removals {
    /// Adds a removal.
    pub(super) fn add(&mut self, key: (PgTimestamp, Lsn), xid: u32, files: &[RelationFile]) {
        let files = files.to_vec();
        self.0.insert(key, Removed { xid, files });
    }

    /// Sets the texts of the marks of all removals, and forgets removals without a mark. Asks for a
    /// new reading of the names if one may show what happened.
    pub(super) fn describe(
        &mut self,
        marks: &mut BTreeMap<(PgTimestamp, Lsn), Mark>,
        status: &ClusterStatus,
    ) {
        self.0.retain(|key, _| marks.contains_key(key));
        let positions: BTreeSet<(u32, Lsn)> = self
            .0
            .iter()
            .flat_map(|((_, lsn), removed)| removed.files.iter().map(|file| (file.database, *lsn)))
            .collect();
        let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
        let names = status.relation_names();
        let mut asked = BTreeSet::new();
        for (key, removed) in &self.0 {
            let Some(mark) = marks.get_mut(key) else {
                continue;
            };
            let removal = Removal {
                xid: removed.xid,
                timeline: mark.timeline,
                lsn: key.1,
                files: &removed.files,
            };
            mark.text = names.describe(removal, &positions);
            if now.micros_since(key.0).abs() < ASKS_MICROS {
                asked.append(&mut names.to_read_again(removal));
            }
        }
        drop(names);
        status.names_asked().append(&mut asked);
    }
}
