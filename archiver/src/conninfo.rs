//! The connection settings of a cluster.

use replication::{ConnInfo, Result};
use repository::config::ClusterSettings;

/// Returns the connection settings of a cluster's `conninfo`, with its `application_name`.
///
/// # Errors
/// Those of [`ConnInfo::parse`].
pub(crate) fn of_cluster(settings: &ClusterSettings) -> Result<ConnInfo> {
    let conninfo = ConnInfo::parse(&settings.conninfo)?;
    Ok(conninfo.with_application_name(&settings.application_name))
}
