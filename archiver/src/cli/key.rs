//! `wal-archiver key new`, `key check`, `key rewrap` and `key encrypt`: the keys of an encrypted
//! repository.
//!
//! If a key is lost, the archive is lost. A new key is therefore shown only once, together with the
//! advice to keep a copy elsewhere.

use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use repository::{
    Repository,
    config::{ClusterSettings, RepositoryPlace, Settings},
    encryption::Key,
    store::{EncryptedStore, EncryptionState},
};
use wal_format::OutcomeKind;

use super::{output, places::unknown};
use crate::{
    error::{Error, Result},
    upkeep::outcomes,
};

/// The number of encrypted objects between two lines of progress.
const PROGRESS_OBJECTS: usize = 500;

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
        let began = jiff::Timestamp::now();
        let wrapped = store.rewrap()?;
        if wrapped > 0 {
            let said = format!("{wrapped} wrapped keys were added to {place}");
            outcomes::record(cluster, OutcomeKind::Key, began, Ok(&said));
        }
        output::line(&format!(
            "cluster {}: {wrapped} wrapped keys were added to {place}; no object changed",
            cluster.name
        ));
        Ok(())
    })
}

/// Encrypts the archives that are still plain. Can be killed at any moment and run again.
pub(super) fn encrypt(settings: &Settings) -> Result<()> {
    let mut has_key = false;
    let mut unfinished = Vec::new();
    for cluster in &settings.clusters {
        for place in cluster.repository.each() {
            let Some(store) = Repository::encrypted(&place, &cluster.name)? else {
                continue;
            };
            has_key = true;
            if store.encryption_state()? == EncryptionState::Encrypted {
                output::line(&format!(
                    "cluster {}: {place} is encrypted already",
                    cluster.name
                ));
                continue;
            }
            let began = jiff::Timestamp::now();
            let encrypted = encrypt_place(cluster, &place, &store);
            let result = match &encrypted {
                Ok(Encrypted::Whole(count)) => Ok(format!(
                    "{count} objects in {place} were encrypted, and no plain one is left"
                )),
                Ok(Encrypted::Part(problem)) => Err(problem.clone()),
                Err(error) => Err(format!("{place}: {error}")),
            };
            let result = result.as_deref().map_err(String::as_str);
            outcomes::record(cluster, OutcomeKind::Key, began, result);
            if let Encrypted::Part(problem) = encrypted? {
                unfinished.push(problem);
            }
        }
    }
    match (has_key, unfinished.is_empty()) {
        (false, _) => Err(no_key()),
        (true, true) => Ok(()),
        (true, false) => Err(Error::StillPlain {
            problem: unfinished.join("; "),
        }),
    }
}

/// The result of encrypting an archive.
enum Encrypted {
    /// No plain object is left. The number of the objects that were encrypted.
    Whole(usize),
    /// The reason why plain objects are left.
    Part(String),
}

/// Encrypts a cluster in one place.
fn encrypt_place(
    cluster: &ClusterSettings,
    place: &RepositoryPlace,
    store: &EncryptedStore,
) -> Result<Encrypted> {
    let name = &cluster.name;
    match store.encryption_state()? {
        EncryptionState::Empty => return Err(unknown(cluster, &place.to_string())),
        EncryptionState::Plain => {
            // Refuses a place that is not the repository any more.
            let mut plain = place.clone();
            plain.encryption = None;
            if Repository::open_known_place(cluster, &plain)?
                .identity()?
                .is_none()
            {
                return Err(unknown(cluster, &place.to_string()));
            }
        }
        EncryptionState::Converting | EncryptionState::Encrypted => {}
    }
    store.begin_conversion()?;
    // Records the encrypted identity, by which this host recognises the place from now on.
    if Repository::open_known_place(cluster, place)?
        .identity()?
        .is_none()
    {
        return Err(unknown(cluster, &place.to_string()));
    }
    output::line(&format!(
        "cluster {name}: new objects in {place} are encrypted from now on. Start the daemon, and the servers that fetch WAL, \
         again with this configuration: without the key they stop, and lose nothing"
    ));
    let conversion = store.convert(&|done, total| {
        if done.is_multiple_of(PROGRESS_OBJECTS) {
            output::line(&format!("cluster {name}: {done} of {total} objects"));
        }
    })?;
    for object in &conversion.foreign {
        output::line(&format!(
            "cluster {name}: {object} in {place} is not part of the archive and is left as it is"
        ));
    }
    if conversion.is_done {
        output::line(&format!(
            "cluster {name}: {} objects were encrypted, and no plain one is left in {place}",
            conversion.encrypted
        ));
        return Ok(Encrypted::Whole(conversion.encrypted));
    }
    for object in &conversion.locked {
        output::line(&format!(
            "cluster {name}: {object} in {place} is locked and stays plain too"
        ));
    }
    let until = match conversion.locked_until {
        Some(until) => {
            format!("not finished until {until}: run `wal-archiver key encrypt` again then")
        }
        None => "not finished: run `wal-archiver key encrypt` again when the locks have ended"
            .to_owned(),
    };
    Ok(Encrypted::Part(format!(
        "{} plain objects of cluster {name} in {place} are locked against deletion, and their encrypted form is stored \
         too; {until}",
        conversion.locked.len()
    )))
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
    Err(no_key())
}

fn no_key() -> Error {
    Error::Usage {
        message: "no key is configured: set encryption_key_file, encryption_key_env or encryption_key_command"
            .to_owned(),
    }
}
