//! An encrypted archive that contains a known text, which must not be found without the key. Shared
//! by the encryption tests for a folder and for a bucket.

use anyhow::Result;
use postgres::Client;

use crate::{cluster::Cluster, place::Place};

/// The key, in hexadecimal.
pub const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
/// Another key.
pub const OTHER: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";
/// A text in the table, in its name, and in the label of the backup.
pub const MARKER: &str = "swordfish_4711";
/// Texts in unencrypted objects.
pub const PLAIN: [&[u8]; 5] = [
    MARKER.as_bytes(),
    b"system_identifier",
    b"backup_label",
    b"TIDEMARK",
    b"TMSUMMRY",
];
/// The final number of rows in the table.
pub const ROWS: i64 = 50_000;

/// Returns the setting that names the keys, one per line.
#[must_use]
pub fn key_setting(keys: &str) -> String {
    format!("encryption_key_command = \"printf '{keys}'\"")
}

/// Writes the text that must not be found, before and after a base backup.
///
/// # Errors
/// The message of the server or of the backup.
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

/// Returns the number of rows.
///
/// # Errors
/// The server's message.
pub fn rows(client: &mut Client) -> Result<i64> {
    let row = client.query_one(&format!("SELECT count(*) FROM {MARKER}"), &[])?;
    Ok(row.try_get(0)?)
}
