//! Finds the identity of the WAL before any server is contacted: from the repository, or from the
//! spool while the repository does not answer.
//!
//! Invariant: nothing is sent to the repository until it has confirmed the cluster. After a start
//! without the repository, WAL is streamed to the spool on the basis of the spool's content alone.
//! As soon as the repository answers, the stages start again with its content.

use std::{
    io,
    ops::{ControlFlow, Range},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use repository::{
    ClusterIdentity, Error as StoreError, Loss, LossRecord, ObjectMeta, ObjectStore, PutOutcome,
    Repository, config::ClusterSettings,
};
use wal_format::PgTimestamp;

use crate::{
    blocking::blocking,
    error::{Error, Result},
    pipeline::archive::Away,
    spool::Spool,
};

/// The time for which the repository is waited for, if the spool also shows the identity.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// The interval at which an offline repository is queried again.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// The source of the identity.
pub(super) enum Known {
    /// There is none: nothing was ever archived.
    Nothing,
    /// The repository answered.
    Here(ClusterIdentity),
    /// The repository did not answer, for the reason given. The identity comes from the spool.
    Away(ClusterIdentity, Box<Away>, StoreError),
}

/// Queries the repository. If it does not answer, uses the spool.
///
/// # Errors
/// [`Error::SpoolSystemMismatch`] if the two contradict each other; [`Error::Repository`] if the
/// repository does not answer and the spool does not show the identity; [`Error::Io`].
pub(super) async fn ask(settings: &ClusterSettings, spool: &Arc<Spool>) -> Result<Known> {
    let local = Arc::clone(spool);
    let (spooled, record) = blocking(move || Ok((local.identity()?, local.record()?))).await?;
    let created = PgTimestamp::from_jiff(jiff::Timestamp::now());
    let spooled = spooled.map(|spooled| ClusterIdentity {
        format_version: 1,
        cluster: settings.name.clone(),
        system_identifier: spooled.system_identifier,
        postgresql_major: spooled.version,
        wal_segment_size: spooled.segment_size,
        created,
    });
    let knows = spooled
        .clone()
        .or_else(|| record.as_ref().map(|record| record.cluster.clone()));
    let asked = stored_identity(settings.clone());
    let answer = if knows.is_some() {
        let late = |_| Err(Error::Repository(absent("no answer within five seconds")));
        tokio::time::timeout(ANSWER_MAX, asked)
            .await
            .unwrap_or_else(late)
    } else {
        asked.await
    };
    match (answer, spooled) {
        (Ok(Some(known)), Some(spooled))
            if known.system_identifier != spooled.system_identifier =>
        {
            Err(Error::SpoolSystemMismatch {
                path: spool.directory().to_path_buf(),
                expected: known.system_identifier,
                found: spooled.system_identifier.to_string(),
            })
        }
        (Ok(Some(known)), _) => Ok(Known::Here(known)),
        (Ok(None), Some(spooled)) => Ok(Known::Here(spooled)),
        (Ok(None), None) => Ok(Known::Nothing),
        (Err(Error::Repository(error)), _) if error.is_answer() => {
            let Some(known) = knows else {
                return Err(error.into());
            };
            let record =
                record.filter(|record| record.cluster.system_identifier == known.system_identifier);
            let away = Away {
                record,
                ..Away::default()
            };
            Ok(Known::Away(known, Box::new(away), error))
        }
        (Err(error), _) => Err(error),
    }
}

/// Waits until an offline repository answers, and until it holds the segment that it lacked or the
/// loss of that segment is accepted.
pub(super) async fn answers(settings: &ClusterSettings, lacking: Option<&Loss>) {
    loop {
        tokio::time::sleep(ASK_AGAIN).await;
        if stored_identity(settings.clone()).await.is_ok() && !lacks(settings, lacking).await {
            return;
        }
    }
}

/// Returns true if a segment that the repository lacked is still missing and its loss is not
/// accepted. Also returns true while the repository does not answer.
pub(super) async fn lacks(settings: &ClusterSettings, lacking: Option<&Loss>) -> bool {
    let Some(loss) = lacking.cloned() else {
        return false;
    };
    let settings = settings.clone();
    let asked = blocking(move || {
        let repository = Repository::open_known(&settings)?;
        Ok(!repository.holds_lost(&loss)? && !LossRecord::of(&settings).is_accepted(&loss)?)
    });
    asked.await.unwrap_or(true)
}

async fn stored_identity(settings: ClusterSettings) -> Result<Option<ClusterIdentity>> {
    blocking(move || Ok(Repository::open_known(&settings)?.identity()?)).await
}

fn absent(why: &str) -> StoreError {
    StoreError::Store {
        action: "reach",
        path: "the repository".into(),
        source: io::Error::new(io::ErrorKind::TimedOut, why.to_owned()),
    }
}

/// Replaces a repository that did not answer. Every operation fails: an archiver that has not
/// verified the repository's cluster must not write to it.
#[derive(Debug)]
struct Absent {
    url: String,
}

/// Returns a repository whose operations all fail.
pub(super) fn absent_repository(settings: &ClusterSettings) -> Repository {
    let url = settings.repository.url.to_string();
    Repository::with_store(Arc::new(Absent { url }), settings.name.clone())
}

impl Absent {
    fn answer<T>(&self) -> repository::Result<T> {
        Err(StoreError::Store {
            action: "reach",
            path: self.url.clone().into(),
            source: io::Error::new(
                io::ErrorKind::NotConnected,
                "the repository has not answered since the start; WAL waits in the spool",
            ),
        })
    }
}

impl ObjectStore for Absent {
    fn put_if_absent(&self, _key: &str, _body: &[u8]) -> repository::Result<PutOutcome> {
        self.answer()
    }

    fn get(&self, _key: &str) -> repository::Result<Bytes> {
        self.answer()
    }

    fn get_range(&self, _key: &str, _range: Range<u64>) -> repository::Result<Bytes> {
        self.answer()
    }

    fn head(&self, _key: &str) -> repository::Result<Option<ObjectMeta>> {
        self.answer()
    }

    fn list(
        &self,
        _prefix: &str,
        _visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> repository::Result<()> {
        self.answer()
    }

    fn delete(&self, _key: &str) -> repository::Result<()> {
        self.answer()
    }

    fn ready_to_write(&self) -> repository::Result<()> {
        self.answer()
    }

    fn url(&self) -> String {
        self.url.clone()
    }

    repository::plain_store_methods!();
}
