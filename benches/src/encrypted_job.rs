//! An archive that is encrypted, with a text in it that nobody without the key may find: what the tests of encryption in a
//! folder and in a bucket have in common.

use anyhow::Result;
use postgres::Client;

use crate::{cluster::Cluster, main_job::Place};

/// The key, in hexadecimal.
pub const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
/// Another one.
pub const OTHER: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";
/// In the table, its name, and the label of the backup.
pub const MARKER: &str = "swordfish_4711";
/// What stands in objects that are not encrypted.
pub const PLAIN: [&[u8]; 5] = [
    MARKER.as_bytes(),
    b"system_identifier",
    b"backup_label",
    b"TIDEMARK",
    b"TMSUMMRY",
];
/// Of the table in the end.
pub const ROWS: i64 = 50_000;

/// The setting that names keys, each on a line of its own.
#[must_use]
pub fn key_setting(keys: &str) -> String {
    format!("encryption_key_command = \"printf '{keys}'\"")
}

/// Writes what must not be found, before a base backup and after it; every commit is where it was acknowledged from.
///
/// # Errors
/// What the server or the backup said.
pub fn fill(cluster: &Cluster, place: &Place) -> Result<()> {
    cluster.wait_for_standbys("tidemark")?;
    let mut client = cluster.connect()?;
    client.batch_execute(&format!(
        "CREATE TABLE {MARKER} AS SELECT '{MARKER}' || n AS t FROM generate_series(1, 20000) n"
    ))?;
    place.back_up(&cluster.conninfo(), &["--label", MARKER])?;
    client.batch_execute(&format!(
        "INSERT INTO {MARKER} SELECT 'later' FROM generate_series(1, 30000)"
    ))?;
    Ok(())
}

/// How many rows are there.
///
/// # Errors
/// What the server said.
pub fn rows(client: &mut Client) -> Result<i64> {
    let row = client.query_one(&format!("SELECT count(*) FROM {MARKER}"), &[])?;
    Ok(row.try_get(0)?)
}
