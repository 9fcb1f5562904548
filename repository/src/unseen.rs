//! [`UnseenPlace`]: a place of a cluster with several repositories of which a reader sees nothing.
//!
//! An unmounted folder looks empty. Objects that only this place holds are not seen, so a restore
//! from the others may end earlier than the archive does.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::{Repository, Result};

/// A place that shows nothing of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnseenPlace {
    /// Its URL.
    pub repository: String,
    /// The reason.
    pub problem: String,
}

impl UnseenPlace {
    /// A folder that does not exist.
    #[must_use]
    pub fn missing_folder(repository: String) -> Self {
        let problem = "there is no such folder (not mounted?)".to_owned();
        Self {
            repository,
            problem,
        }
    }

    /// The warning, with the remedy.
    #[must_use]
    pub fn warning(&self) -> String {
        let Self {
            repository,
            problem,
        } = self;
        format!(
            "warning: nothing of {repository} is seen: {problem}. WAL and backups that only this repository holds are \
             missing here, and a restore may end too early. Mount it or bring it back; if it is lost for good, remove it \
             from the settings"
        )
    }
}

impl Repository {
    /// Asks each of several places for an object of the cluster. Returns the places that have none
    /// or do not answer, if another place has one.
    #[must_use]
    pub fn unseen_places(&self) -> Vec<UnseenPlace> {
        let places = self.each_place();
        let mut unseen = Vec::new();
        for place in &places {
            let problem = match place.holds_any() {
                Ok(true) => continue,
                Ok(false) => format!(
                    "it holds nothing of cluster {} (not mounted or emptied?)",
                    place.cluster()
                ),
                Err(error) => error.to_string(),
            };
            unseen.push(UnseenPlace {
                repository: place.url(),
                problem,
            });
        }
        if unseen.len() == places.len() {
            unseen.clear();
        }
        unseen
    }

    /// Returns true if there is any object of the cluster.
    fn holds_any(&self) -> Result<bool> {
        let mut found = false;
        self.store()
            .list(&format!("{}/", self.cluster()), &mut |_| {
                found = true;
                ControlFlow::Break(())
            })?;
        Ok(found)
    }
}
