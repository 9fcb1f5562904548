//! Names the damaged pages that the server found during a base backup: file, block and relation.

use replication::{ConnInfo, ConnectionMode, ReplicationClient};

/// The maximum number of pages that are named.
const PAGES_MAX: usize = 20;
/// The OIDs of `pg_default` and `pg_global` (`pg_tablespace.dat`).
const PG_DEFAULT: u32 = 1663;
const PG_GLOBAL: u32 = 1664;

/// A page that failed its checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Page {
    /// The path below the data directory.
    file: String,
    /// The number of the block in the file.
    block: u32,
}

impl Page {
    /// Reads the server's warning about a page (`sendFile` in `basebackup.c`). `None` for another
    /// warning. The order of the file and the block is the same in every translation.
    fn of_warning(warning: &str) -> Option<Self> {
        let mut quoted = warning.splitn(3, '"');
        let (_, file, rest) = (quoted.next()?, quoted.next()?, quoted.next()?);
        let digits = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
        let end = digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len());
        // The number of failures in a file is a warning of its own, which names no checksums.
        let has_checksums = digits[end..].chars().any(|c| c.is_ascii_digit());
        Some(Self {
            file: file.trim_start_matches("./").to_owned(),
            block: digits[..end].parse().ok().filter(|_| has_checksums)?,
        })
    }

    /// Returns the tablespace, the database and the file number of the relation. `None` for a file
    /// of another form.
    fn relation(&self) -> Option<(u32, u32, u32)> {
        let parts: Vec<&str> = self.file.split('/').collect();
        let (tablespace, database, file) = match *parts.as_slice() {
            ["base", database, file] => (PG_DEFAULT, database.parse().ok()?, file),
            ["global", file] => (PG_GLOBAL, 0, file),
            ["pg_tblspc", tablespace, _, database, file] => {
                (tablespace.parse().ok()?, database.parse().ok()?, file)
            }
            _ => return None,
        };
        let end = file.find(['.', '_']).unwrap_or(file.len());
        Some((tablespace, database, file[..end].parse().ok()?))
    }
}

/// Describes the damaged pages. Without any, returns the server's error.
pub(super) async fn describe(
    conninfo: &ConnInfo,
    error: &replication::Error,
    warnings: &[String],
) -> String {
    let pages: Vec<Page> = warnings
        .iter()
        .filter_map(|text| Page::of_warning(text))
        .collect();
    if pages.is_empty() {
        return error.to_string();
    }
    let mut described = Vec::new();
    for page in pages.iter().take(PAGES_MAX) {
        let relation = match page.relation() {
            Some(relation) => relation_name(conninfo, relation).await,
            None => None,
        };
        let relation = relation.unwrap_or_else(|| "relation unknown".to_owned());
        described.push(format!(
            "file {}, block {} ({relation})",
            page.file, page.block
        ));
    }
    if pages.len() > PAGES_MAX {
        described.push(format!("and {} more", pages.len() - PAGES_MAX));
    }
    described.join("; ")
}

/// Returns the name of a relation and of its database. `None` if the server does not say it.
async fn relation_name(
    conninfo: &ConnInfo,
    (tablespace, database, file): (u32, u32, u32),
) -> Option<String> {
    let name = format!("SELECT datname FROM pg_catalog.pg_database WHERE oid = {database}");
    let database = match database {
        0 => conninfo.dbname().to_owned(),
        _ => ask(conninfo, &name).await?,
    };
    let sql =
        format!("SELECT pg_catalog.pg_filenode_relation({tablespace}, {file})::regclass::text");
    let relation = ask(&conninfo.clone().with_database(&database), &sql).await?;
    Some(match tablespace {
        PG_GLOBAL => format!("relation {relation}"),
        _ => format!("relation {relation} of database {database}"),
    })
}

/// Returns the only value that a query returns.
async fn ask(conninfo: &ConnInfo, sql: &str) -> Option<String> {
    let asked = async {
        let mut client = ReplicationClient::connect(conninfo, ConnectionMode::Sql).await?;
        let rows = client.query(sql).await?;
        client.close().await;
        Ok::<_, replication::Error>(rows)
    };
    match asked.await {
        Ok(rows) => rows.into_iter().flatten().flatten().next(),
        Err(error) => {
            tracing::debug!(%error, "the relation of a damaged page is not known");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_and_its_relation_are_read_from_the_warning() {
        let page = |warning: &str| {
            let page = Page::of_warning(warning)?;
            let relation = page.relation();
            Some((page.file, page.block, relation))
        };
        assert_eq!(
            page(
                "checksum verification failed in file \"./base/5/16384.2_vm\", block 7: calculated 1A2B but expected 77"
            ),
            Some(("base/5/16384.2_vm".to_owned(), 7, Some((1663, 5, 16384))))
        );
        assert_eq!(
            page(
                "checksum verification failed in file \"./global/1262\", block 0: calculated 1 but expected 2"
            ),
            Some(("global/1262".to_owned(), 0, Some((1664, 0, 1262))))
        );
        assert_eq!(
            page(
                "checksum verification failed in file \"./pg_tblspc/16390/PG_17_202406281/5/16400\", block 12: calculated \
                 1 but expected 2"
            ),
            Some((
                "pg_tblspc/16390/PG_17_202406281/5/16400".to_owned(),
                12,
                Some((16390, 5, 16400))
            ))
        );
        for other in [
            "file \"./base/5/16384\" has a total of 2 checksum verification failures",
            "skipping special file \"./fifo\"",
            "2 total checksum verification failures",
        ] {
            assert_eq!(page(other), None, "{other}");
        }
    }
}
