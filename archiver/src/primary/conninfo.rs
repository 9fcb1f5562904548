//! The connection settings of a cluster.

use replication::{ConnInfo, Result};
use repository::config::ClusterSettings;

/// Returns the connection settings of a cluster's `conninfo`, with its `application_name`.
///
/// # Errors
/// Those of [`ConnInfo::parse`].
pub(crate) fn of_cluster(settings: &ClusterSettings) -> Result<ConnInfo> {
    of_server(&settings.conninfo, settings)
}

/// Returns the connection settings `conninfo` of any server of a cluster, with the cluster's
/// `application_name`.
///
/// # Errors
/// Those of [`ConnInfo::parse`].
pub(crate) fn of_server(conninfo: &str, settings: &ClusterSettings) -> Result<ConnInfo> {
    Ok(ConnInfo::parse(conninfo)?.with_application_name(&settings.application_name))
}
