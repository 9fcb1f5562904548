//! Opens the settings, the repository and the catalog that the options and the configuration name.

use std::path::{Path, PathBuf};

use catalog::Catalog;
use jiff::Timestamp;
use repository::{
    LossRecord, Repository, UnseenPlace,
    config::{ClusterSettings, RepositoryPlace, Settings},
    name_losses,
};
use wal_format::{ClusterName, SystemIdentifier};

use super::{Cli, output};
use crate::{Error, Result, inventory::Archive, target::parse_time};

/// Resolves the settings. With `--at`, every bucket is read as of that time, and folders, which
/// have no versions, are left out.
pub(super) fn resolve(cli: &Cli) -> Result<Settings> {
    let mut settings = Settings::resolve_for_storage(&cli.common)?;
    let Some(text) = &cli.at else {
        return Ok(settings);
    };
    let now = Timestamp::now();
    let at = parse_time(text, cli.restore.chosen.time_zone.as_deref(), now)?
        .to_jiff()
        .filter(|at| *at <= now)
        .ok_or_else(|| Error::usage(format!("--at \"{text}\" lies in the future")))?;
    for cluster in &mut settings.clusters {
        let mut places = cluster.repository.each();
        places.retain(|place| place.url.folder().is_none());
        for place in &mut places {
            place.as_of = Some(at);
        }
        if places.is_empty() {
            return Err(Error::usage(format!(
                "--at looks at the versions that a bucket keeps; {} is a folder",
                cluster.repository
            )));
        }
        let first = places.remove(0);
        cluster.repository = RepositoryPlace {
            others: places,
            required: cluster.repository.required,
            ..first
        };
    }
    Ok(settings)
}

/// Opens a repository for reading. A missing folder is an error and not a new repository. With
/// several places, one existing place is enough.
pub(super) fn open(
    place: &RepositoryPlace,
    cluster: &ClusterName,
    system: Option<SystemIdentifier>,
) -> Result<Repository> {
    let mut there = place.each();
    there.retain(|one| one.url.folder().is_none_or(Path::is_dir));
    let here = (!there.is_empty() && !place.others.is_empty()).then(|| RepositoryPlace {
        others: there.split_off(1),
        required: place.required,
        ..there.remove(0)
    });
    let place = here.as_ref().unwrap_or(place);
    if let Some(folder) = place.url.folder()
        && !folder.is_dir()
    {
        let missing = std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "there is no such folder; check --repository, and that it is mounted",
        );
        let action = "open the repository";
        let path = folder.to_owned();
        return Err(repository::Error::Store {
            action,
            path,
            source: missing,
        }
        .into());
    }
    let repository = Repository::open(place, cluster)?;
    Ok(match system {
        Some(system) => repository.of_system(system)?,
        None => repository,
    })
}

pub(super) fn archive(
    cluster: &ClusterSettings,
    system: Option<SystemIdentifier>,
) -> Result<Archive> {
    let repository = open(&cluster.repository, &cluster.name, system)?;
    // The catalog describes the present; ignore it with `--at`.
    let catalog = Some(cluster.catalog.as_path()).filter(|_| cluster.repository.as_of.is_none());
    let catalog = Catalog::open_for_restore(catalog, &repository).map_err(|error| match error {
        // This host knows whether there was an archive.
        repository::Error::Config { .. } if cluster.repository.as_of.is_none() => {
            repository.gone(cluster).unwrap_or(error)
        }
        error => error,
    })?;
    let mut archive = Archive::new(repository, catalog);
    let folders = cluster.repository.each();
    let missing = folders
        .iter()
        .filter(|place| place.url.folder().is_some_and(|folder| !folder.is_dir()))
        .map(|place| UnseenPlace::missing_folder(place.url.to_string()));
    archive.unseen.extend(missing);
    archive.unseen.extend(archive.repository.unseen_places());
    for place in &archive.unseen {
        output::note(&place.warning());
    }
    let missing = archive.catalog.missing_objects();
    if cluster.repository.as_of.is_none() && !missing.losses.is_empty() {
        let missing = missing.clone();
        // Without the record of this host, no loss counts as accepted.
        let unaccepted = LossRecord::of(cluster).without_accepted(&missing);
        archive.missing = unaccepted.unwrap_or(missing);
        // A place that is away may hold what is missing here, and is named already.
        let is_complete = archive.unseen.is_empty() && !archive.repository.is_partly_away();
        if is_complete && !archive.missing.losses.is_empty() {
            output::note(&format!(
                "warning: this host archived {}, which is not in {}. If a wrong disk is mounted or an older copy is in its \
                 place, bring the right one back",
                name_losses(&archive.missing.losses),
                archive.repository.url()
            ));
        }
    }
    Ok(archive)
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(Error::io("find", path))
}
