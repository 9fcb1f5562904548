//! Observes the server and the archive, for the status. The supervisor starts it.
//!
//! Modules in reading order: [`server`] polls the server, [`names`] reads the names of its tables,
//! [`catalog`] reads the catalog, [`window`] draws what it holds, [`removals`] describes removed
//! tables, [`restorable`] judges what can be restored, by the rules of the restorer's plan,
//! [`locate`] finds the restore to an instant. [`current`] is the archive that is observed.

mod catalog;
pub(crate) mod current;
mod damage;
mod locate;
mod names;
mod queries;
mod removals;
mod restorable;
pub(crate) mod server;
mod window;

use std::sync::Arc;

use tokio::task::JoinHandle;

use self::{
    catalog::{look, watch_place},
    current::CurrentArchive,
};
use crate::pipeline::archive::Archive;

/// Starts the periodic checks of an archive. `current` shows the archive after the first one.
pub(crate) fn start(archive: &Arc<Archive>, current: &Arc<CurrentArchive>) -> Vec<JoinHandle<()>> {
    vec![
        tokio::spawn(look(Arc::clone(archive), Arc::clone(current))),
        tokio::spawn(watch_place(Arc::clone(archive))),
    ]
}
