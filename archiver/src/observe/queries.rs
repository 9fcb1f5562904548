//! The answers of the archive to the dashboard's queries.

use dashboard::monitor::queries::ArchiveQueries;
use repository::store::MemberState;
use status::locate::Located;
use wal_format::PgTimestamp;

use super::{current::CurrentArchive, locate};

impl ArchiveQueries for CurrentArchive {
    fn places(&self) -> Vec<MemberState> {
        let archive = self.get();
        archive.map_or_else(Vec::new, |archive| archive.repository().places())
    }

    fn locate(&self, time: PgTimestamp) -> Result<Located, String> {
        let archive = self.get();
        let archive = archive.ok_or("the archive is not open yet; ask again in a moment")?;
        locate::locate(&archive, time).map_err(|error| error.to_string())
    }
}
