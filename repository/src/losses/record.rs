//! [`LossRecord`]: the losses of a cluster's archive, in the spool.
//!
//! The daemon writes `{spool}/{cluster}/losses.json` when it finds that the repository lacks
//! objects, before the catalog removes their entries. `catalog rebuild` does the same while no
//! daemon has the catalog open. `wal-archiver verify --accept-loss` writes `accepted_losses.json`.
//! Each file has one writer at a time, so no change is lost.
//!
//! Invariant: a loss stays in the first file until its objects are back or it is in the second
//! file. An acceptance ends when its objects are back: the first file then lists them as returned.
//! A file that cannot be parsed is set aside, and [`LossRecord::problem`] reports it until an
//! operator removes it. A file of a newer version is reported too, and is never replaced.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use wal_format::PgTimestamp;

use super::{Known, Loss, Missing};
use crate::{Error, Result, config::ClusterSettings, durable};

const FOUND_FILE: &str = "losses.json";
const ACCEPTED_FILE: &str = "accepted_losses.json";
/// The suffix of a file that could not be parsed.
const DAMAGED_SUFFIX: &str = "damaged";
/// The version of both files.
const FORMAT_VERSION: u32 = 1;

/// A loss and the time at which it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundLoss {
    /// The missing objects.
    #[serde(flatten)]
    pub loss: Loss,
    /// The time, by this host's clock.
    pub found: PgTimestamp,
}

/// A loss that an operator has accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Acceptance {
    #[serde(flatten)]
    loss: Loss,
    /// The time, by this host's clock. `None` in a file of an earlier version.
    #[serde(default)]
    accepted: Option<PgTimestamp>,
}

/// Objects that were back after their loss had been accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Returned {
    #[serde(flatten)]
    loss: Loss,
    /// The time of the acceptance that is over.
    accepted: Option<PgTimestamp>,
}

/// The content of `losses.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Found {
    /// Always [`FORMAT_VERSION`].
    format_version: u32,
    losses: Vec<FoundLoss>,
    #[serde(default)]
    returned: Vec<Returned>,
    /// The objects that a place that is away may hold and that every other place lacks.
    #[serde(default)]
    unproved: Vec<Loss>,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            format_version: FORMAT_VERSION,
            losses: Vec::new(),
            returned: Vec::new(),
            unproved: Vec::new(),
        }
    }
}

/// The content of `accepted_losses.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Accepted {
    /// Always [`FORMAT_VERSION`].
    format_version: u32,
    losses: Vec<Acceptance>,
}

impl Default for Accepted {
    fn default() -> Self {
        Self {
            format_version: FORMAT_VERSION,
            losses: Vec::new(),
        }
    }
}

/// The content of a file, or the reason why it cannot be used.
type Content<T> = std::result::Result<T, Unusable>;

/// The reason why the content of a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unusable {
    /// The file cannot be parsed.
    Damaged(String),
    /// A newer version of this program has written the file. The value is the format version.
    Newer(u32),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged(problem) => f.write_str(problem),
            Self::Newer(version) => write!(
                f,
                "its format version {version} is newer than {FORMAT_VERSION}, which this program \
                 writes: use the newer version of Tidemark that wrote it"
            ),
        }
    }
}

/// The format version of any of the files.
#[derive(Deserialize)]
struct Version {
    format_version: u32,
}

/// The content of the record at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedLosses {
    /// The losses that no operator has accepted, as [`LossRecord::open`].
    pub open: Vec<FoundLoss>,
    /// The losses that an operator has accepted and whose objects are not back.
    pub accepted: Vec<Loss>,
    /// The number of losses that an operator has ever accepted. `None` if the record cannot be
    /// read: then both lists are empty.
    pub acceptances: Option<usize>,
    /// The files that cannot be used, as [`LossRecord::problem`].
    pub problem: Option<String>,
}

/// The record of the objects that a cluster's repository has lost.
#[derive(Clone, Debug)]
pub struct LossRecord {
    pub(super) directory: PathBuf,
}

impl LossRecord {
    /// Returns the record of the cluster with these settings.
    #[must_use]
    pub fn of(settings: &ClusterSettings) -> Self {
        Self::below(&settings.spool.join(settings.name.as_str()))
    }

    /// Returns the record in `directory`, which is `{spool}/{cluster}`.
    #[must_use]
    pub fn below(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Returns the losses that were found and that no operator has accepted. Losses in a file that
    /// cannot be parsed are unknown, and no loss in such a file counts as accepted:
    /// [`LossRecord::problem`] reports both.
    ///
    /// # Errors
    /// [`Error::Store`] if a file cannot be read.
    pub fn open(&self) -> Result<Vec<FoundLoss>> {
        let found = self.found()?;
        let accepted = self.accepted_before(&found)?;
        let still_open = found.losses.into_iter().flat_map(|found| {
            let left = accepted.left_of(&found.loss);
            left.into_iter().map(move |loss| FoundLoss {
                loss,
                found: found.found,
            })
        });
        Ok(still_open.collect())
    }

    /// Returns the content of both files. Without files, it reads nothing else. A file that cannot
    /// be read is a [`RecordedLosses::problem`].
    #[must_use]
    pub fn snapshot(&self) -> RecordedLosses {
        let read = || -> Result<RecordedLosses> {
            Ok(RecordedLosses {
                open: self.open()?,
                accepted: self.accepted()?,
                acceptances: Some(self.acceptances()?),
                problem: None,
            })
        };
        let is_file = |file: &&str| {
            let path = self.directory.join(file);
            path.exists() || set_aside(&path).exists()
        };
        if [FOUND_FILE, ACCEPTED_FILE].iter().any(is_file) {
            let problem = self.problem();
            let recorded = read().unwrap_or_default();
            return RecordedLosses {
                problem,
                ..recorded
            };
        }
        RecordedLosses {
            acceptances: Some(0),
            ..RecordedLosses::default()
        }
    }

    /// Returns every recorded loss whose objects are not back, accepted or not.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn all(&self) -> Result<Vec<Loss>> {
        let mut all: Vec<Loss> = self.open()?.into_iter().map(|found| found.loss).collect();
        all.extend(self.accepted()?);
        Ok(all)
    }

    /// Returns the losses that an operator has accepted and whose objects are not back.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn accepted(&self) -> Result<Vec<Loss>> {
        let accepted = self.accepted_file()?;
        let found = self.found()?;
        Ok(accepted
            .losses
            .iter()
            .flat_map(|acceptance| left_of(acceptance, &found))
            .collect())
    }

    /// Returns the number of losses that an operator has ever accepted.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn acceptances(&self) -> Result<usize> {
        Ok(self.accepted_file()?.losses.len())
    }

    /// Returns true if an operator has accepted the whole loss.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn is_accepted(&self, loss: &Loss) -> Result<bool> {
        Ok(Known::new(self.accepted()?).left_of(loss).is_empty())
    }

    /// Returns `missing` without the losses that an operator has accepted.
    ///
    /// # Errors
    /// Those of [`LossRecord::open`].
    pub fn without_accepted(&self, missing: &Missing) -> Result<Missing> {
        let accepted = Known::new(self.accepted()?);
        let losses = missing.losses.iter();
        let newest = missing.newest.clone();
        Ok(Missing {
            losses: losses.flat_map(|loss| accepted.left_of(loss)).collect(),
            newest: newest.filter(|newest| !accepted.left_of(newest).is_empty()),
        })
    }

    /// Returns the files that cannot be parsed, with the remedy. `None` if there are none: then the
    /// record is complete.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let files = [FOUND_FILE, ACCEPTED_FILE];
        let mut is_newer = false;
        let problems = files.iter().filter_map(|file| {
            let path = self.directory.join(file);
            let aside = set_aside(&path);
            match self.unusable(file) {
                Ok(Some(problem)) => {
                    is_newer |= matches!(problem, Unusable::Newer(_));
                    Some(format!("{}: {problem}", path.display()))
                }
                Err(error) => Some(error.to_string()),
                Ok(None) => aside
                    .exists()
                    .then(|| format!("{}: it was damaged", aside.display())),
            }
        });
        let problems: Vec<String> = problems.collect();
        let remedy = match is_newer {
            true => "",
            false => {
                ". Run `wal-archiver verify --deep`, and remove the file when everything is there"
            }
        };
        (!problems.is_empty()).then(|| {
            format!(
                "the record of lost objects cannot be read, so objects may be missing in the \
                 repository without being named: {}{remedy}",
                problems.join("; ")
            )
        })
    }

    /// Checks that this program may replace both files.
    ///
    /// # Errors
    /// [`Error::Config`] if a newer version of this program has written a file.
    pub fn check_version(&self) -> Result<()> {
        for file in [FOUND_FILE, ACCEPTED_FILE] {
            self.damage(file)?;
        }
        Ok(())
    }

    /// Adds losses durably. A loss that is recorded already keeps its time.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn add(&self, losses: &[Loss]) -> Result<()> {
        let mut found = self.found()?;
        let known = found.losses.iter().map(|found| found.loss.clone());
        let known = Known::new(known.collect());
        let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
        let new: Vec<FoundLoss> = losses
            .iter()
            .flat_map(|loss| known.left_of(loss))
            .map(|loss| FoundLoss { loss, found: now })
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        found.losses.extend(new);
        self.write(FOUND_FILE, &found)
    }

    /// Returns the objects that a place that was away may hold and that every other place lacked.
    ///
    /// # Errors
    /// [`Error::Store`] if the file cannot be read.
    pub fn unproved(&self) -> Result<Vec<Loss>> {
        Ok(self.found()?.unproved)
    }

    /// Adds such objects durably.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn add_unproved(&self, losses: &[Loss]) -> Result<()> {
        let mut found = self.found()?;
        let known = Known::new(found.unproved.clone());
        let new = losses.iter().flat_map(|loss| known.left_of(loss));
        let new: Vec<Loss> = new.collect();
        if new.is_empty() {
            return Ok(());
        }
        found.unproved.extend(new);
        self.write(FOUND_FILE, &found)
    }

    /// Forgets these objects, because all places have answered.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn end_unproved(&self) -> Result<()> {
        let mut found = self.found()?;
        if found.unproved.is_empty() {
            return Ok(());
        }
        found.unproved.clear();
        self.write(FOUND_FILE, &found)
    }

    /// Replaces each loss that was found with the result of `left`, which returns the part that is
    /// still missing. Ends the acceptance of each part that is not missing any more.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn keep(&self, left: impl Fn(&Loss) -> Result<Vec<Loss>>) -> Result<()> {
        let before = self.found()?;
        let mut found = Found {
            losses: Vec::new(),
            ..before.clone()
        };
        for known in &before.losses {
            let time = known.found;
            let left = left(&known.loss)?.into_iter();
            found
                .losses
                .extend(left.map(|loss| FoundLoss { loss, found: time }));
        }
        for acceptance in self.accepted_file()?.losses {
            for loss in left_of(&acceptance, &before) {
                let missing = Known::new(left(&loss)?);
                let back = missing.left_of(&loss).into_iter();
                found.returned.extend(back.map(|loss| Returned {
                    loss,
                    accepted: acceptance.accepted,
                }));
            }
        }
        if before == found {
            return Ok(());
        }
        self.write(FOUND_FILE, &found)
    }

    /// Records losses durably as accepted. They are no longer reported.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn accept(&self, losses: &[Loss]) -> Result<()> {
        let known = Known::new(self.accepted()?);
        let mut file = self.accepted_file()?;
        let accepted = Some(PgTimestamp::from_jiff(jiff::Timestamp::now()));
        let new = losses.iter().flat_map(|loss| known.left_of(loss));
        file.losses
            .extend(new.map(|loss| Acceptance { loss, accepted }));
        self.write(ACCEPTED_FILE, &file)
    }

    /// Removes all files. Used when a new archive begins in this spool.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn forget(&self) -> Result<()> {
        for file in [FOUND_FILE, ACCEPTED_FILE] {
            let path = self.directory.join(file);
            durable::remove(&path)?;
            durable::remove(&set_aside(&path))?;
        }
        durable::remove(&self.newest_file())
    }

    fn found(&self) -> Result<Found> {
        Ok(read(&self.directory.join(FOUND_FILE))?.unwrap_or_default())
    }

    fn accepted_file(&self) -> Result<Accepted> {
        Ok(read(&self.directory.join(ACCEPTED_FILE))?.unwrap_or_default())
    }

    /// Returns the reason why a file cannot be used. `None` if it can, or if there is none.
    fn unusable(&self, file: &str) -> Result<Option<Unusable>> {
        let path = self.directory.join(file);
        Ok(match file {
            FOUND_FILE => read::<Found>(&path)?.err(),
            _ => read::<Accepted>(&path)?.err(),
        })
    }

    /// Returns the damage of a file that is about to be replaced. `None` if it is intact, or if
    /// there is none.
    ///
    /// # Errors
    /// [`Error::Config`] if the file has a newer format version: replacing it would lose what it
    /// says.
    fn damage(&self, file: &str) -> Result<Option<String>> {
        match self.unusable(file)? {
            Some(newer @ Unusable::Newer(_)) => {
                let path = self.directory.join(file);
                let path = path.display();
                Err(Error::config(format!("{path} is not replaced: {newer}")))
            }
            Some(Unusable::Damaged(problem)) => Ok(Some(problem)),
            None => Ok(None),
        }
    }

    /// Returns what an operator has accepted, given the content of the other file.
    fn accepted_before(&self, found: &Found) -> Result<Known> {
        let accepted = self.accepted_file()?.losses;
        let left = accepted.iter().flat_map(|one| left_of(one, found));
        Ok(Known::new(left.collect()))
    }

    /// Replaces a file durably. A file that cannot be parsed is kept under another name first.
    fn write(&self, file: &str, content: &impl Serialize) -> Result<()> {
        durable::create_dir_all(&self.directory)?;
        let path = self.directory.join(file);
        if let Some(problem) = self.damage(file)? {
            let aside = set_aside(&path);
            tracing::error!(
                event = "losses_unreadable", path = %path.display(), aside = %aside.display(), problem,
                "the record of lost objects cannot be read and is set aside"
            );
            durable::rename(&path, &aside)?;
        }
        let content = serde_json::to_vec_pretty(content);
        let content =
            content.map_err(|error| Error::store("write", &path)(io::Error::other(error)))?;
        durable::replace(&path, &content)
    }
}

/// Returns the path under which a file that cannot be parsed is kept.
fn set_aside(path: &Path) -> PathBuf {
    path.with_extension(DAMAGED_SUFFIX)
}

/// Returns the part of an accepted loss whose objects were not back since.
fn left_of(acceptance: &Acceptance, found: &Found) -> Vec<Loss> {
    let returned = found.returned.iter();
    let returned = returned.filter(|returned| returned.accepted == acceptance.accepted);
    let returned = Known::new(returned.map(|returned| returned.loss.clone()).collect());
    returned.left_of(&acceptance.loss)
}

/// Reads a file. A file that does not exist is the default content.
fn read<T: DeserializeOwned + Default>(path: &Path) -> Result<Content<T>> {
    match fs::read(path) {
        Ok(content) => Ok(parse(&content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ok(T::default())),
        Err(error) => Err(Error::store("read", path)(error)),
    }
}

fn parse<T: DeserializeOwned>(content: &[u8]) -> Content<T> {
    // The version first: the fields of a newer version may be others.
    match serde_json::from_slice(content) {
        Ok(Version { format_version }) if format_version > FORMAT_VERSION => {
            Err(Unusable::Newer(format_version))
        }
        _ => serde_json::from_slice(content).map_err(|error| Unusable::Damaged(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use wal_format::{Branch, Lsn, SystemIdentifier};

    use super::{super::tests::wal, *};

    fn record() -> (tempfile::TempDir, LossRecord) {
        let directory = tempfile::tempdir().expect("a directory");
        let record = LossRecord::below(&directory.path().join("main"));
        (directory, record)
    }

    fn open(record: &LossRecord) -> Vec<Loss> {
        let open = record.open().expect("it reads").into_iter();
        open.map(|found| found.loss).collect()
    }

    #[test]
    fn a_loss_is_open_until_it_is_accepted_or_back() {
        let (_directory, record) = record();
        assert_eq!(open(&record), []);
        assert_eq!(record.snapshot().acceptances, Some(0));
        let backup = Loss::Backup {
            system: SystemIdentifier(7),
            id: "20261121T101500Z-9f3c".parse().expect("a name"),
            branch: Branch::FIRST,
            start_lsn: Lsn(1),
            stop_lsn: Lsn(2),
        };
        record.add(&[wal(2, 6), backup.clone()]).expect("it writes");
        record.add(&[wal(3, 7)]).expect("only the end is new");
        assert_eq!(open(&record), [wal(2, 6), backup.clone(), wal(6, 7)]);
        let missing = Missing {
            losses: vec![wal(2, 9)],
            newest: Some(wal(8, 9)),
        };
        record.accept(&[wal(4, 9)]).expect("it writes");
        assert_eq!(open(&record), [wal(2, 4), backup.clone()]);
        assert!(record.is_accepted(&wal(8, 9)).expect("it reads"));
        assert!(!record.is_accepted(&wal(2, 9)).expect("it reads"));
        let left = record.without_accepted(&missing).expect("it reads");
        let expected = Missing {
            losses: vec![wal(2, 4)],
            newest: None,
        };
        assert_eq!(left, expected);
        let keep = |loss: &Loss| {
            Ok(vec![loss.clone()]
                .into_iter()
                .filter(|one| *one != backup)
                .collect())
        };
        record.keep(keep).expect("it writes");
        assert_eq!(open(&record), [wal(2, 4)]);
        record.forget().expect("it goes");
        assert!(open(&record).is_empty() && record.accepted().expect("it reads").is_empty());
    }

    #[test]
    fn objects_that_a_place_that_is_away_may_hold_are_no_losses() {
        let (_directory, record) = record();
        record.add(&[wal(1, 2)]).expect("it writes");
        record.add_unproved(&[wal(2, 6)]).expect("it writes");
        record.add_unproved(&[wal(4, 8)]).expect("it writes");
        let unproved = || record.unproved().expect("it reads");
        assert_eq!(unproved(), [wal(2, 6), wal(6, 8)]);
        assert_eq!(open(&record), [wal(1, 2)]);
        record.keep(|_| Ok(Vec::new())).expect("it writes");
        assert_eq!(unproved(), [wal(2, 6), wal(6, 8)]);
        record.end_unproved().expect("it writes");
        assert_eq!(unproved(), []);
    }

    #[test]
    fn an_acceptance_ends_when_the_objects_are_back() {
        let (_directory, record) = record();
        record.add(&[wal(2, 6)]).expect("it writes");
        record.accept(&[wal(2, 6)]).expect("it writes");
        assert_eq!(open(&record), []);
        // The first two segments are back.
        record
            .keep(|loss| Ok(Known::new(vec![wal(2, 4)]).left_of(loss)))
            .expect("it writes");
        assert_eq!(record.accepted().expect("it reads"), [wal(4, 6)]);
        assert!(!record.is_accepted(&wal(3, 4)).expect("it reads"));
        // They are lost again, and the operator accepts that again.
        record.add(&[wal(2, 6)]).expect("it writes");
        assert_eq!(open(&record), [wal(2, 4)]);
        record.accept(&[wal(2, 4)]).expect("it writes");
        assert_eq!(open(&record), []);
        assert_eq!(record.acceptances().expect("it reads"), 2);
    }

    #[test]
    fn a_file_that_cannot_be_parsed_is_reported_and_set_aside() {
        let (directory, record) = record();
        record.add(&[wal(2, 3)]).expect("it writes");
        record.accept(&[wal(2, 3)]).expect("it writes");
        assert_eq!(record.problem(), None);
        for file in [FOUND_FILE, ACCEPTED_FILE] {
            for content in ["", "{\"format_version\": 1, \"losses\": ["] {
                let path = directory.path().join("main").join(file);
                let whole = fs::read(&path).expect("it reads");
                fs::write(&path, content).expect("it is torn");
                let problem = record.problem().expect("it is reported");
                assert!(problem.contains(file), "{problem}");
                // Nothing counts as accepted.
                let is_open = open(&record).contains(&wal(2, 3));
                assert_eq!(is_open, file == ACCEPTED_FILE);
                // A later loss is recorded, and the damage stays known.
                record.add(&[wal(8, 9)]).expect("it writes");
                record.accept(&[wal(9, 10)]).expect("it writes");
                assert!(open(&record).contains(&wal(8, 9)));
                let aside = path.with_extension(DAMAGED_SUFFIX);
                assert_eq!(fs::read_to_string(&aside).expect("it is kept"), content);
                let problem = record.problem().expect("it is reported");
                assert!(problem.contains(DAMAGED_SUFFIX), "{problem}");
                fs::remove_file(&aside).expect("it goes");
                assert_eq!(record.problem(), None);
                // It cannot even be read: nothing is known of the losses.
                fs::remove_file(&path).expect("it goes");
                fs::create_dir(&path).expect("a directory");
                let snapshot = record.snapshot();
                assert_eq!(snapshot.acceptances, None);
                assert!(
                    snapshot
                        .problem
                        .is_some_and(|problem| problem.contains(file))
                );
                fs::remove_dir(&path).expect("it goes");
                fs::write(&path, whole).expect("it is whole");
            }
        }
    }

    #[test]
    fn a_file_of_a_newer_version_is_reported_and_never_replaced() {
        let (directory, record) = record();
        record.add(&[wal(2, 3)]).expect("it writes");
        record.accept(&[wal(2, 3)]).expect("it writes");
        for file in [FOUND_FILE, ACCEPTED_FILE] {
            let path = directory.path().join("main").join(file);
            let ours = fs::read_to_string(&path).expect("it reads");
            let newer = ours.replace("\"format_version\": 1", "\"format_version\": 2");
            fs::write(&path, &newer).expect("it is written");
            let problem = record.problem().expect("it is reported");
            let said = format!("{file}: its format version 2 is newer than 1");
            assert!(problem.contains(&said), "{problem}");
            assert!(!problem.contains("remove"), "{problem}");
            record.check_version().expect_err("it is newer");
            // No loss of it is taken for open or accepted.
            let is_open = open(&record).contains(&wal(2, 3));
            assert_eq!(is_open, file == ACCEPTED_FILE);
            let written = match file {
                FOUND_FILE => record.add(&[wal(8, 9)]),
                _ => record.accept(&[wal(8, 9)]),
            };
            let error = written.expect_err("it is not replaced").to_string();
            assert!(error.contains("its format version 2 is newer"), "{error}");
            assert_eq!(fs::read_to_string(&path).expect("it stays"), newer);
            fs::write(&path, ours).expect("it is ours again");
            assert_eq!(record.problem(), None);
        }
    }
}
