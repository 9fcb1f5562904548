//! `wal-archiver key new`, `key check` and `key rewrap`: the keys of an encrypted repository.
//!
//! If a key is lost, the archive is lost. A new key is therefore shown only once, together with the
//! advice to keep a copy elsewhere.

use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use repository::{
    Repository,
    config::{ClusterSettings, RepositoryPlace, Settings},
    encryption::Key,
    store::EncryptedStore,
};

use super::{output, places::unknown};
use crate::error::{Error, Result};

pub(super) fn new(path: Option<&Path>) -> Result<()> {
    let (key, line) = Key::generate()?;
    let Some(path) = path else {
        output::line(&line);
        return Ok(());
    };
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Error::Usage {
                message: format!(
                    "{} exists already and may hold the only key of an archive: it stays as it is; name another file",
                    path.display()
                ),
            },
            _ => Error::io("create", path)(error),
        })?;
    file.write_all(format!("{}\n", line.as_str()).as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(Error::io("write", path))?;
    output::line(&format!(
        "key {} is in {}; keep a copy away from this host and from the repository: without it the archive is lost",
        key.id,
        path.display()
    ));
    Ok(())
}

pub(super) fn check(settings: &Settings) -> Result<()> {
    each(settings, |cluster, place, store| {
        store.check_keys()?;
        output::line(&format!(
            "cluster {}: the configured keys open everything in {place}",
            cluster.name
        ));
        Ok(())
    })
}

pub(super) fn rewrap(settings: &Settings) -> Result<()> {
    each(settings, |cluster, place, store| {
        let wrapped = store.rewrap()?;
        output::line(&format!(
            "cluster {}: {wrapped} wrapped keys were added to {place}; no object changed",
            cluster.name
        ));
        Ok(())
    })
}

/// Calls `act` for every encrypted repository of every cluster. Fails if there is none.
fn each(
    settings: &Settings,
    act: impl Fn(&ClusterSettings, &RepositoryPlace, &EncryptedStore) -> Result<()>,
) -> Result<()> {
    let mut encrypted = false;
    let mut unreachable = None;
    for cluster in &settings.clusters {
        for place in cluster.repository.each() {
            // Refuses a place that is not the repository any more, because a new data key would be
            // written there.
            let opened = Repository::open_known_place(cluster, &place);
            match opened.and_then(|opened| opened.identity()) {
                Ok(Some(_)) => {}
                Ok(None) => return Err(unknown(cluster, &place.to_string())),
                // A place that is offline does not block the others.
                Err(error) if error.is_transient() => {
                    encrypted = true;
                    output::error_line(&format!(
                        "cluster {}: {place} was passed over: {error}",
                        cluster.name
                    ));
                    unreachable.get_or_insert(error);
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            match Repository::encrypted(&place, &cluster.name)? {
                Some(store) => {
                    encrypted = true;
                    act(cluster, &place, &store)?;
                }
                None => output::line(&format!(
                    "cluster {}: {place} is not encrypted",
                    cluster.name
                )),
            }
        }
    }
    if let Some(error) = unreachable {
        return Err(error.into());
    }
    if encrypted {
        return Ok(());
    }
    Err(Error::Usage {
        message: "no key is configured: set encryption_key_file, encryption_key_env or encryption_key_command"
            .to_owned(),
    })
}
