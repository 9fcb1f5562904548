//! [`KnownArchive`]: this host's record of the archive that it writes to. Because of it, the host
//! never begins a new archive without an operator's command.
//!
//! `{spool}/{cluster}/repository.json` names the places of the archive and the objects by which
//! each place is recognised. It is written when a cluster's name is claimed there. A spool of an
//! earlier version has no such file; then its WAL, its position and the catalog show that there was
//! an archive. Invariant: a known place is written to only while it contains one of those objects.
//! A host that cannot write the record, and has no other evidence of its archive, writes nothing.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use wal_format::{ObjectKey, SystemIdentifier};

use crate::{
    Error, Repository, Result,
    config::{ClusterSettings, RepositoryPlace},
    durable,
    store::{ENCRYPTED_SUFFIX, Pin, Witness},
};

const RECORD_FILE: &str = "repository.json";
/// The version of the record that this build writes.
const RECORD_FORMAT_VERSION: u32 = 1;
/// The size of the file that proves that the record can be written.
const PROBE_BYTES: usize = 4096;
/// The text for an unknown system identifier in a message.
const UNKNOWN_SYSTEM: &str = "N";

/// The content of `repository.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// The format version, 1.
    format_version: u32,
    /// The system identifier of the cluster that was last claimed.
    system_identifier: SystemIdentifier,
    /// The objects by which each place is recognised. The key is the place's URL.
    places: BTreeMap<String, Vec<Witness>>,
}

impl Record {
    /// Reads the record. `None` when there is none or it cannot be read.
    fn read(path: &Path) -> Option<Self> {
        let content = match fs::read(path) {
            Ok(content) => content,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::debug!(%error, path = %path.display(), "the record of the repository cannot be read");
                }
                return None;
            }
        };
        let record: Option<Self> = serde_json::from_slice(&content).ok();
        record.filter(|record| record.format_version == RECORD_FORMAT_VERSION)
    }
}

/// A place in the record of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordedPlace {
    /// The file with the record.
    path: PathBuf,
    /// The URL of the place.
    url: String,
}

impl RecordedPlace {
    /// Reads the objects by which the place is recognised now. `None` if the record does not name
    /// the place or names another system identifier.
    pub(crate) fn witnesses(&self, system: &str) -> Option<Vec<Witness>> {
        let mut record = Record::read(&self.path)?;
        if record.system_identifier.to_string() != system {
            return None;
        }
        record.places.remove(&self.url)
    }
}

/// This host's memory of a cluster's archive.
#[derive(Clone, Debug)]
pub(crate) struct KnownArchive {
    /// `{spool}/{cluster}`.
    directory: PathBuf,
    catalog: PathBuf,
    /// True for one of several places, which may be new. A single place may not.
    is_one_of_several: bool,
    /// True if the operator begins a new archive: the record and other evidence are then ignored.
    is_forgotten: bool,
}

impl KnownArchive {
    fn of(settings: &ClusterSettings) -> Self {
        Self {
            directory: settings.spool.join(settings.name.as_str()),
            catalog: settings.catalog.clone(),
            is_one_of_several: false,
            is_forgotten: false,
        }
    }

    /// Reads the record. `None` when there is none or it cannot be read.
    fn record(&self) -> Option<Record> {
        Record::read(&self.directory.join(RECORD_FILE))
    }

    fn place(&self, url: &str) -> RecordedPlace {
        RecordedPlace {
            path: self.directory.join(RECORD_FILE),
            url: url.to_owned(),
        }
    }

    pub(crate) fn pin(&self, url: &str) -> Option<Pin> {
        if self.is_forgotten {
            return None;
        }
        let record = self.record()?;
        Some(Pin {
            witnesses: record.places.get(url)?.clone(),
            system: record.system_identifier.to_string(),
            record: Some(self.place(url)),
        })
    }

    /// Returns the evidence that this host had an archive, with its system identifier if known.
    fn trace(&self) -> Option<(String, String)> {
        if let Some(record) = self.record() {
            let places: Vec<&str> = record.places.keys().map(String::as_str).collect();
            let problem = format!("this host archived to {}", places.join(", "));
            return Some((record.system_identifier.to_string(), problem));
        }
        let spool = self.directory.display();
        for name in [RECORD_FILE, "position.json"] {
            if self.directory.join(name).exists() {
                let problem = format!("{spool}/{name} shows that this host had an archive");
                return Some((UNKNOWN_SYSTEM.to_owned(), problem));
            }
        }
        let systems = fs::read_dir(self.directory.join("wal")).ok();
        let system = systems.and_then(|mut systems| systems.find_map(io::Result::ok));
        if let Some(system) = system {
            let problem = format!("the spool {spool} holds WAL of an archive");
            return Some((system.file_name().to_string_lossy().into_owned(), problem));
        }
        self.catalog.join("CURRENT").is_file().then(|| {
            let problem = format!("{} is the catalog of an archive", self.catalog.display());
            (UNKNOWN_SYSTEM.to_owned(), problem)
        })
    }

    /// Checks that the record can be written, before the first write to a place that only the
    /// record protects.
    fn probe(&self) -> Result<()> {
        durable::create_dir_all(&self.directory)?;
        let failed = |error| Error::store("write", self.directory.join(RECORD_FILE))(error);
        let mut file = tempfile::Builder::new()
            .prefix(".tidemark-")
            .tempfile_in(&self.directory)
            .map_err(failed)?;
        file.write_all(&[0; PROBE_BYTES]).map_err(failed)
    }

    /// Passes on the outcome of writing the record. A failure is logged only, if other evidence of
    /// the archive prevents this host from beginning a new one without an operator's command.
    fn noted(&self, url: &str, outcome: Result<()>) -> Result<()> {
        let error = match outcome {
            Err(Error::Store { source, .. }) => source,
            outcome => return outcome,
        };
        if !self.is_forgotten && self.trace().is_some() {
            tracing::warn!(
                event = "repository_not_remembered", repository = url, %error,
                "the record of the repository cannot be written to the spool"
            );
            return Ok(());
        }
        Err(Error::NotRemembered {
            url: url.to_owned(),
            path: self.directory.join(RECORD_FILE),
            source: error,
        })
    }

    /// Adds a place to the record.
    fn note(&self, url: &str, system: SystemIdentifier, witnesses: Vec<Witness>) -> Result<()> {
        let mut places = self
            .record()
            .map(|record| record.places)
            .unwrap_or_default();
        places.insert(url.to_owned(), witnesses);
        let record = Record {
            format_version: RECORD_FORMAT_VERSION,
            system_identifier: system,
            places,
        };
        durable::create_dir_all(&self.directory)?;
        let content = serde_json::to_vec_pretty(&record).unwrap_or_default();
        durable::replace(&self.directory.join(RECORD_FILE), &content)
    }
}

impl Repository {
    /// Opens the repository of a cluster's settings as the one that this host knows. Nothing is
    /// written to another place. If this host had an archive, a place without objects of the
    /// cluster is [`Error::Gone`].
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn open_known(settings: &ClusterSettings) -> Result<Self> {
        Self::open_known_place(settings, &settings.repository)
    }

    /// Like [`Repository::open_known`], for one of the cluster's places.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn open_known_place(settings: &ClusterSettings, place: &RepositoryPlace) -> Result<Self> {
        let mut known = KnownArchive::of(settings);
        known.is_one_of_several = *place != settings.repository;
        Self::recognised(&known, || Self::open(place, &settings.name))
    }

    /// Like [`Repository::open_known`], for a repository that is one folder without keys; returns
    /// `None` for any other place. A program that calls only this function does not link the client
    /// of a bucket, which starts slowly.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn open_known_plain_folder(settings: &ClusterSettings) -> Result<Option<Self>> {
        let open = || Self::open_plain_folder(&settings.repository, &settings.name);
        if open()?.is_none() {
            return Ok(None);
        }
        let known = KnownArchive::of(settings);
        let opened = Self::recognised(&known, || {
            open()?.ok_or_else(|| Error::Config {
                message: format!("{} is not a plain folder", settings.repository.url),
            })
        });
        opened.map(Some)
    }

    /// Opens a place and pins it to the objects by which this host recognises it. If all of these
    /// objects are lost, a sealed segment of the same system identifier still proves that it is the
    /// archive; the next claim, or a repair, writes the objects again. A tail proves nothing,
    /// because an emptied bucket accepts tails until the next check.
    fn recognised(known: &KnownArchive, open: impl Fn() -> Result<Self>) -> Result<Self> {
        let opened = open()?.remembering(known);
        if !matches!(opened.confirm(), Err(Error::Gone { .. })) {
            return Ok(opened);
        }
        let bare = open()?;
        match (bare.newest_epoch(), known.record()) {
            (Ok(Some(found)), Some(record))
                if found.is_derived()
                    && found.identity.system_identifier == record.system_identifier
                    && bare.holds_segment_of(record.system_identifier)? =>
            {
                let mut known = known.clone();
                known.is_forgotten = true;
                Ok(bare.remembering(&known))
            }
            // The archive was encrypted since. Only an owner of the key can write this epoch.
            (Ok(Some(found)), Some(record))
                if found.identity.system_identifier == record.system_identifier
                    && bare.is_encrypted_since(known)? =>
            {
                let mut known = known.clone();
                known.is_forgotten = true;
                let system = record.system_identifier;
                let opened = bare.remembering(&known);
                opened.remember(system)?;
                Ok(opened)
            }
            _ => Ok(opened),
        }
    }

    /// Returns true if the identity is encrypted, and this host recorded one that was not.
    fn is_encrypted_since(&self, known: &KnownArchive) -> Result<bool> {
        let is_encrypted = |witness: &Witness| witness.key.ends_with(ENCRYPTED_SUFFIX);
        let Some(recorded) = known.pin(&self.url()) else {
            return Ok(false);
        };
        if recorded.witnesses.iter().any(is_encrypted) {
            return Ok(false);
        }
        for folder in ["epoch/", "epoch-copy/"] {
            for (key, _) in self.list(folder)? {
                if self
                    .witness(&key)?
                    .is_some_and(|found| is_encrypted(&found))
                {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Opens the repository of a cluster's settings without regard to this host's record. The next
    /// [`Repository::claim`] begins an archive in each place that has none, and records these
    /// places as the known ones. Only an operator's command calls this.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn open_anew(settings: &ClusterSettings) -> Result<Self> {
        let mut known = KnownArchive::of(settings);
        known.is_forgotten = true;
        Ok(Self::open(&settings.repository, &settings.name)?.remembering(&known))
    }

    /// Returns the error of a repository that holds nothing of the cluster although this host
    /// had an archive. `None` if this host knows of none, or cannot read its spool.
    #[must_use]
    pub fn gone(&self, settings: &ClusterSettings) -> Option<Error> {
        let (system, trace) = KnownArchive::of(settings).trace()?;
        Some(self.lost(system, &trace))
    }

    fn lost(&self, system: String, trace: &str) -> Error {
        Error::Gone {
            url: self.url(),
            system,
            problem: format!(
                "it holds nothing of cluster {}, and {trace}",
                self.cluster()
            ),
        }
    }

    /// Fails for a place without objects of the cluster when this host had an archive.
    pub(crate) fn must_be_new(&self) -> Result<()> {
        let Some(known) = self.known() else {
            return Ok(());
        };
        if known.is_forgotten || known.is_one_of_several {
            return Ok(());
        }
        match known.trace() {
            None => Ok(()),
            Some((system, trace)) => Err(self.lost(system, &trace)),
        }
    }

    /// Checks that this host can record the place, before an archive begins in it.
    pub(crate) fn ready_to_remember(&self) -> Result<()> {
        match self.known() {
            Some(known) if known.pin(&self.url()).is_none() => {
                known.noted(&self.url(), known.probe())
            }
            _ => Ok(()),
        }
    }

    /// Pins and records a place that was claimed, or whose identity was written again with other
    /// bytes.
    ///
    /// # Errors
    /// [`Error::NotRemembered`]; [`Error::Store`], [`Error::S3`].
    pub fn remember(&self, system: SystemIdentifier) -> Result<()> {
        let Some(known) = self.known() else {
            return Ok(());
        };
        if known.pin(&self.url()).is_some() {
            return Ok(());
        }
        let mut witnesses = Vec::new();
        for folder in ["epoch/", "epoch-copy/"] {
            for (key, _) in self.list(folder)? {
                if let ObjectKey::Epoch(_) | ObjectKey::EpochCopy(_) = key {
                    witnesses.extend(self.witness(&key)?);
                }
            }
        }
        self.pin(Pin {
            witnesses: witnesses.clone(),
            system: system.to_string(),
            record: Some(known.place(&self.url())),
        });
        known.noted(&self.url(), known.note(&self.url(), system, witnesses))
    }
}

/// Pins each place of a mirror on its own.
pub(crate) fn each_known(places: Vec<Repository>, known: &KnownArchive) -> Vec<Repository> {
    let mut known = known.clone();
    known.is_one_of_several = true;
    let known = Arc::new(known);
    places
        .into_iter()
        .map(|place| place.with_known(&known))
        .collect()
}

#[cfg(test)]
mod tests {
    use wal_format::{ClusterName, PgTimestamp, PgVersion, SegmentSize};

    use super::*;
    use crate::{
        ClusterIdentity,
        config::{CommonArgs, Settings},
    };

    fn settings(directory: &Path, more: &str) -> ClusterSettings {
        let path = directory.join("tidemark.toml");
        let place = directory.display();
        let text = format!("repository = 'file://{place}/r'\nspool = '{place}/spool'\n{more}");
        fs::write(&path, text).expect("a configuration");
        let args = CommonArgs {
            config: Some(path),
            ..CommonArgs::default()
        };
        let settings = Settings::resolve(&args).expect("it resolves");
        settings.cluster().expect("one").clone()
    }

    fn identity(system: u64) -> ClusterIdentity {
        ClusterIdentity {
            format_version: 1,
            cluster: "main".parse::<ClusterName>().expect("a name"),
            system_identifier: SystemIdentifier(system),
            postgresql_major: PgVersion::try_from(17_u16).expect("a version"),
            wal_segment_size: SegmentSize::DEFAULT,
            created: PgTimestamp(i64::try_from(system).expect("small")),
        }
    }

    #[test]
    fn an_archive_that_was_there_is_not_begun_again_before_the_operator_says_so() {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = settings(directory.path(), "");
        let root = directory.path().join("r");
        let open = || Repository::open_known(&settings).expect("it opens");
        assert_eq!(open().identity().expect("nothing yet"), None);
        assert!(!root.exists(), "opening creates nothing");
        open().claim(&identity(1)).expect("the first archive");
        let aside = directory.path().join("aside");
        durable::rename(&root, &aside).expect("unmounted");
        for there in [false, true] {
            if there {
                fs::create_dir(&root).expect("a mount point");
            }
            let error = open().claim(&identity(1)).expect_err("it is not there");
            assert!(error.is_gone(), "{error}");
            assert!(
                error
                    .to_string()
                    .contains("epoch begin --system-identifier 1`")
            );
            assert!(open().identity().expect_err("not there").is_gone());
            assert!(!root.join("main").exists());
        }
        fs::remove_dir(&root).expect("it goes");
        durable::rename(&aside, &root).expect("mounted");
        open().claim(&identity(1)).expect("it is back");

        durable::rename(&root, &aside).expect("unmounted");
        let fresh = Repository::open_anew(&settings).expect("it opens");
        fresh.claim(&identity(1)).expect("the operator says so");
        open().claim(&identity(1)).expect("it is known now");
        fs::remove_dir_all(&root).expect("it goes");
        durable::rename(&aside, &root).expect("the old one");
        open().claim(&identity(1)).expect("the same bytes");
        fs::remove_dir_all(&root).expect("it goes");
        let other = ClusterIdentity {
            created: PgTimestamp(9),
            ..identity(1)
        };
        let stranger = Repository::open(&settings.repository, &settings.name).expect("it opens");
        stranger.claim(&other).expect("another archive");
        assert!(open().claim(&identity(1)).expect_err("another").is_gone());
    }

    /// Creates settings with a spool in which nothing can be written, even by root.
    fn without_a_spool(directory: &Path, more: &str) -> ClusterSettings {
        fs::write(directory.join("spool"), "").expect("a file in the place of the spool");
        settings(directory, more)
    }

    #[test]
    fn a_host_that_cannot_remember_its_repository_begins_no_archive() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = |name: &str| directory.path().join(name);
        let second = format!("[[repositories]]\nurl = 'file://{}'\n", root("s").display());
        for more in ["", &second] {
            let settings = without_a_spool(directory.path(), more);
            let error = Repository::open_known(&settings)
                .and_then(|repository| repository.claim(&identity(1)))
                .expect_err("nothing protects the archive");
            assert!(matches!(error, Error::NotRemembered { .. }), "{error}");
            assert_eq!(error.exit_kind(), crate::ExitKind::Usage);
            for part in ["spool/main", "repository.json", "`--spool DIR`"] {
                assert!(error.to_string().contains(part), "{error}");
            }
            assert!(!root("r").exists() && !root("s").exists());
        }
        // Another host's archive, which this host does not know yet.
        let settings = without_a_spool(directory.path(), "");
        let other = Repository::open(&settings.repository, &settings.name).expect("it opens");
        fs::create_dir(root("r")).expect("a folder");
        other.claim(&identity(1)).expect("another host's archive");
        let error = Repository::open_known(&settings)
            .and_then(|repository| repository.claim(&identity(1)))
            .expect_err("it would not be recognised after an unmount");
        assert!(matches!(error, Error::NotRemembered { .. }), "{error}");
    }

    #[test]
    fn a_host_that_knew_its_archive_goes_on_when_the_record_cannot_be_written() {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = without_a_spool(directory.path(), "");
        let settings = ClusterSettings {
            catalog: directory.path().join("catalog"),
            ..settings
        };
        let other = Repository::open(&settings.repository, &settings.name).expect("it opens");
        fs::create_dir(directory.path().join("r")).expect("a folder");
        other.claim(&identity(1)).expect("the archive");
        fs::create_dir(&settings.catalog).expect("a directory");
        fs::write(settings.catalog.join("CURRENT"), "").expect("a trace");
        let open = || Repository::open_known(&settings).expect("it opens");
        open().claim(&identity(1)).expect("an unmount is noticed");
        let fresh = Repository::open_anew(&settings).expect("it opens");
        let error = fresh.claim(&identity(1)).expect_err("the old record stays");
        assert!(matches!(error, Error::NotRemembered { .. }), "{error}");
    }

    #[test]
    fn an_identity_that_a_command_wrote_again_is_recognised_by_a_running_process() {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = settings(directory.path(), "");
        let running = Repository::open_known(&settings).expect("it opens");
        running.claim(&identity(1)).expect("the first archive");
        let write_again = |identity: &ClusterIdentity| {
            for key in [ObjectKey::Epoch(1), ObjectKey::EpochCopy(1)] {
                let path = directory.path().join(format!("r/main/{key}"));
                fs::remove_file(path).expect("it is lost");
            }
            assert!(running.confirm().expect_err("it is lost").is_gone());
            let repaired = Repository::open_anew(&settings).expect("it opens");
            repaired.claim(identity).expect("it is written again");
        };
        write_again(&ClusterIdentity {
            created: PgTimestamp(9),
            ..identity(1)
        });
        running.confirm().expect("the record has the new bytes");
        let tail = ObjectKey::Epoch(2);
        running
            .create(&tail, &identity(1))
            .expect("it takes objects");
        fs::remove_file(directory.path().join("r/main/epoch/00000002.json")).expect("it goes");
        write_again(&identity(2));
        let error = running.confirm().expect_err("another system identifier");
        assert!(error.is_gone(), "{error}");
    }

    #[test]
    fn a_spool_of_an_earlier_version_shows_that_there_was_an_archive() {
        for trace in [
            "main/position.json",
            "main/wal/77/00000001",
            "main/catalog/CURRENT",
        ] {
            let directory = tempfile::tempdir().expect("a directory");
            let settings = settings(directory.path(), "");
            let path = settings.spool.join(trace);
            fs::create_dir_all(path.parent().expect("a directory")).expect("it is made");
            fs::write(&path, "{}").expect("a trace");
            let repository = Repository::open_known(&settings).expect("it opens");
            let error = repository.claim(&identity(77)).expect_err(trace);
            assert!(error.is_gone(), "{error}");
        }
    }

    #[test]
    fn several_new_places_of_which_one_does_not_exist_yet_are_begun() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = |name: &str| directory.path().join(name);
        fs::create_dir(root("r")).expect("an empty folder");
        let second = format!("[[repositories]]\nurl = 'file://{}'\n", root("s").display());
        let both = settings(directory.path(), &second);
        let open = || Repository::open_known(&both).expect("it opens");
        assert_eq!(open().identity().expect("nothing yet"), None);
        assert!(!root("s").exists(), "asking creates nothing");
        open().claim(&identity(1)).expect("the first archive");
        for name in ["r", "s"] {
            assert!(root(name).join("main/epoch/00000001.json").is_file());
        }
    }

    #[test]
    fn of_several_places_a_new_one_is_filled_and_one_that_went_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = |name: &str| directory.path().join(name);
        let first = settings(directory.path(), "");
        let open = |settings: &ClusterSettings| Repository::open_known(settings).expect("opens");
        open(&first).claim(&identity(1)).expect("the first place");
        let second = format!("[[repositories]]\nurl = 'file://{}'\n", root("s").display());
        let both = settings(directory.path(), &second);
        open(&both).claim(&identity(1)).expect("a new place");
        assert!(root("s/main/epoch/00000001.json").is_file());
        durable::rename(&root("s"), &root("aside")).expect("unmounted");
        fs::create_dir(root("s")).expect("a mount point");
        let repository = open(&both);
        repository.claim(&identity(1)).expect("the other is there");
        let key = ObjectKey::Epoch(2);
        repository.create(&key, &identity(2)).expect("in one place");
        drop(repository);
        assert_eq!(fs::read_dir(root("s")).expect("it lists").count(), 0);
        durable::rename(&root("r"), &root("aside-too")).expect("unmounted");
        let error = open(&both).claim(&identity(1)).expect_err("both are away");
        assert!(error.is_gone(), "{error}");
        assert!(!root("r").exists());
    }
}
