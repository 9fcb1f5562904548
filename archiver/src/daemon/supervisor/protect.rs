//! Protects the primary from its own slot when the spool is full and the slot retains too much WAL,
//! if that is configured (`when_full`).
//!
//! Steps: stop the stream -> drop the slot -> wait for space -> continue. Invariant: the stages
//! continue to upload the spool's WAL. The light is red from the decision until the stream runs
//! again, and stays red if WAL was lost by then.

use std::time::Duration;

use replication::ConnInfo;
use repository::config::ClusterSettings;
use status::cluster_status::ClusterStatus;

use super::{retry::RETRY_MIN, state::Supervisor};
use crate::{
    core::shutdown::Shutdown,
    error::{Error, Result},
    pipeline::{receive::StreamEnd, room::endangers_primary},
    primary::Source,
};

/// The interval at which the archiver checks whether the primary has to be protected, and whether
/// there is space again.
const ROOM_POLL: Duration = Duration::from_millis(500);

impl Supervisor {
    /// Gives up the WAL that the slot retains on the primary, and waits until there is space to
    /// continue. If PostgreSQL has removed WAL by then, the gap is closed like any other.
    pub(super) async fn protect_primary(
        &mut self,
        why: &str,
        shutdown: &mut Shutdown,
    ) -> Result<StreamEnd> {
        let pipeline = self
            .pipeline
            .as_ref()
            .expect("BUG: a stream was up, so the stages run");
        let (settings, archive) = (&self.settings, pipeline.archive());
        let words = format!(
            "the spool is full and {why}: the slot was given up to protect the primary (when_full = \"protect-primary\"). \
             WAL that PostgreSQL removes before there is room again is lost to the archive"
        );
        tracing::error!(cluster = %settings.name, "{words}");
        self.status.note(|facts| {
            facts.connected = false;
            facts.broken = Some(words);
        });
        archive.room().give_up(true);
        pipeline.spool().drain().await?;
        match pipeline.failure().take() {
            None | Some(Error::SpoolFull) => {}
            Some(error) => return Err(error),
        }
        let mut dropped = false;
        loop {
            if !dropped {
                match drop_slot(&self.conninfo, settings).await {
                    Ok(()) => {
                        dropped = true;
                        tracing::warn!(cluster = %settings.name, slot = settings.slot, "the slot is dropped");
                    }
                    Err(error) => {
                        tracing::warn!(cluster = %settings.name, %error, "the slot cannot be dropped yet");
                    }
                }
            } else if archive.room().is_free_again(settings, archive.progress()) {
                break;
            }
            if !shutdown.sleep(ROOM_POLL).await {
                return Ok(StreamEnd::Shutdown);
            }
        }
        tracing::info!(cluster = %settings.name, "there is room again; going on");
        archive.room().give_up(false);
        self.status.note(|facts| facts.spool_full = None);
        self.gave_up = true;
        self.retry = RETRY_MIN;
        Ok(StreamEnd::Reached)
    }
}

/// Waits until the primary has to be protected from its slot. Returns the reason.
pub(super) async fn endangered(settings: &ClusterSettings, status: &ClusterStatus) -> String {
    loop {
        if let Some(why) = endangers_primary(settings, &status.facts()) {
            return why;
        }
        tokio::time::sleep(ROOM_POLL).await;
    }
}

async fn drop_slot(conninfo: &ConnInfo, settings: &ClusterSettings) -> Result<()> {
    let (source, _) = Source::connect(conninfo, &settings.name).await?;
    let mut client = source.into_client();
    if client.slot(&settings.slot).await?.is_some() {
        client.drop_slot(&settings.slot).await?;
    }
    client.close().await;
    Ok(())
}
