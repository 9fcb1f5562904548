//! Follows a server: finds the common history, and streams timeline after timeline until the
//! connection ends.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use replication::{self, ConnInfo, NextTimeline, ReplicationStart};
use repository::config::Acknowledge;
use status::cluster_status::ServerPath;
use wal_format::{Branch, Lsn, TimelineHistory, TimelineId};

use super::{
    Pipeline, fork, histories,
    receive::{Receive, StreamEnd, status_interval},
    server_shutdown::StreamRelease,
    voice::Voice,
};
use crate::{
    core::{
        shutdown::Shutdown,
        start::{ServerBranch, ServerState, StartPlan, plan_start},
    },
    error::{Error, Result},
    primary::{Source, parse_history},
};

/// Limit on how long a stop keeps the connection up until the repository holds the WAL that is
/// still to be acknowledged to the server.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);

/// The purpose of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Follows the server permanently, with a slot that retains its WAL for us.
    Follow,
    /// Fetches WAL that another server lost, up to this LSN, without leaving a trace.
    Heal(Lsn),
}

impl Source {
    /// Returns the server's path of timelines to its current one, with their history files.
    pub(super) async fn path(&mut self, pipeline: &Pipeline) -> Result<Vec<ServerBranch>> {
        let current = self.system.timeline;
        let mut path = Vec::new();
        let mut history = None;
        if current != TimelineId::FIRST {
            let content = self.client.timeline_history(current).await?;
            history = Some(parse_history(current, &content)?);
            let spans = history.iter().flat_map(TimelineHistory::spans);
            for ancestor in spans.filter(|span| span.timeline != current) {
                let branch = self.ancestor(ancestor.timeline, &content, pipeline).await?;
                path.push(ServerBranch {
                    switch_lsn: ancestor.to,
                    ..branch
                });
            }
            path.push(ServerBranch {
                branch: Branch::of_history(current, &content),
                history: Some(content),
                switch_lsn: Lsn::MAX,
            });
        }
        if history.is_none() {
            path.push(ServerBranch {
                branch: Branch::FIRST,
                history: None,
                switch_lsn: Lsn::MAX,
            });
        }
        Ok(path)
    }

    /// Returns the branch of an ancestor. The server need not have its history file: a base backup
    /// has only that of its own timeline, and an archive only those of its own WAL. Then our copy
    /// identifies the branch, if it agrees, or the descendant's file, which begins with it.
    async fn ancestor(
        &mut self,
        timeline: TimelineId,
        descendant: &Bytes,
        pipeline: &Pipeline,
    ) -> Result<ServerBranch> {
        if timeline == TimelineId::FIRST {
            return Ok(ServerBranch {
                branch: Branch::FIRST,
                history: None,
                switch_lsn: Lsn::MAX,
            });
        }
        let (branch, content) = match self.client.timeline_history(timeline).await {
            Ok(content) => (Branch::of_history(timeline, &content), content),
            Err(error) => {
                tracing::debug!(event = "ancestor_history_missing", %timeline, %error, "the server lacks a history file");
                let known = pipeline.known_history(timeline, descendant).await?;
                let begins = || {
                    let file = TimelineHistory::file_of_ancestor(descendant, timeline)?;
                    let file = Bytes::copy_from_slice(file);
                    Some((Branch::of_history(timeline, &file), file))
                };
                known.or_else(begins).ok_or(error)?
            }
        };
        Ok(ServerBranch {
            branch,
            history: Some(content),
            switch_lsn: Lsn::MAX,
        })
    }

    /// Ensures that the slot exists. Returns the LSN from which it retains WAL.
    pub(super) async fn slot(&mut self, name: &str, cluster: &str) -> Result<Option<Lsn>> {
        let mut slot = self.client.slot(name).await?;
        if slot
            .as_ref()
            .is_some_and(|slot| slot.wal_status.as_deref() == Some("lost"))
        {
            tracing::warn!(
                cluster,
                slot = name,
                "the replication slot was invalidated by the server; it protects nothing any more and is created again"
            );
            self.client.drop_slot(name).await?;
            slot = None;
        }
        if slot.is_none() {
            tracing::info!(cluster, slot = name, "creating the replication slot");
            self.client.create_slot(name, true).await?;
            slot = self.client.slot(name).await?;
        }
        Ok(slot.and_then(|slot| slot.restart_lsn))
    }

    /// Streams until the connection ends or the supervisor requests a stop. Calls `followed` before
    /// the first byte if the server is followed permanently: it is the right one, and it has our
    /// slot.
    ///
    /// # Errors
    /// Any [`Error`]; the caller decides which ones are retried.
    pub async fn stream(
        mut self,
        pipeline: &Pipeline,
        purpose: Purpose,
        followed: impl FnOnce(&ConnInfo),
        shutdown: &mut Shutdown,
    ) -> Result<StreamEnd> {
        let archive = pipeline.archive();
        let settings = archive.settings();
        let cluster = settings.name.as_str();
        let size = archive.identity().segment_size;
        let path = self.path(pipeline).await?;
        if purpose == Purpose::Follow {
            // Before the positions are read: WAL of a timeline without its history file does not
            // count as held.
            histories::take_from_server(pipeline, &path).await?;
        }
        let held = pipeline.held().await?;
        let mut server = ServerState {
            path,
            flush_lsn: self.system.flush_lsn,
            slot_restart_lsn: None,
        };
        if !held.is_empty() {
            // A server of another cluster is refused before anything is changed on it.
            plan_start(&server, &held, size)?;
        }
        let follows = purpose == Purpose::Follow;
        let slot_restart_lsn = if follows {
            self.slot(&settings.slot, cluster).await?
        } else {
            None
        };
        server.slot_restart_lsn = slot_restart_lsn;
        let plan = plan_start(&server, &held, size)?;
        if follows {
            archive.status().follow(ServerPath::of(
                server.path.iter().map(|on| (on.branch, on.history.clone())),
            ));
            fork::note(pipeline, &server.path).await?;
        }
        if follows {
            followed(self.client.conninfo());
        }
        let mut floor = slot_restart_lsn.unwrap_or(Lsn::ZERO);
        let mut client = self.client;
        let line = self
            .line
            .as_ref()
            .expect("BUG: a stream needs a connection that was made for one");
        let mut plan = plan;
        loop {
            let StartPlan {
                branch, start_lsn, ..
            } = plan;
            let taken_up = pipeline
                .spool()
                .take_up(branch.branch, branch.history.clone(), start_lsn)
                .await?;
            let forgone = pipeline.forgone_overlap() == Some(taken_up.resume_lsn);
            let start_lsn = if forgone {
                taken_up.resume_lsn
            } else {
                taken_up.compare_lsn
            };
            let timeline = branch.branch.timeline;
            let started = client
                .start_replication(
                    follows.then_some(settings.slot.as_str()),
                    start_lsn,
                    timeline,
                )
                .await;
            let started = match started {
                Err(error) if error.is_wal_removed() && start_lsn < taken_up.resume_lsn => {
                    return Ok(pipeline.forgo_overlap(taken_up.resume_lsn));
                }
                started => started.map_err(|error| gap(error, timeline, start_lsn))?,
            };
            let (next_client, next) = match started {
                ReplicationStart::EndOfTimeline(client, next) => (client, next),
                ReplicationStart::Streaming(mut receiver, sender) => {
                    pipeline.begin(start_lsn).await?;
                    let (on, held) = (branch.branch, taken_up.durable_lsn);
                    // Each attempt to close a gap begins with a stream, so the line is not logged
                    // as information.
                    if archive.status().facts().gap.is_some() {
                        tracing::debug!(cluster, branch = %on, from = %start_lsn, %held, "streaming");
                    } else {
                        tracing::info!(cluster, branch = %on, from = %start_lsn, %held, "streaming");
                    }
                    if follows {
                        archive.status().note(|facts| {
                            facts.connected = true;
                            if facts.repository_error == facts.stream_error {
                                facts.repository_error = None;
                            }
                            facts.stream_error = None;
                            facts.broken = None;
                            facts.slot = Some(settings.slot.clone());
                        });
                    }
                    let acknowledgements = archive.progress().acknowledgements();
                    let voice = Voice::new(sender, acknowledgements, floor);
                    let status_interval = status_interval(self.wal_sender_timeout);
                    let alive = voice.keep_alive(status_interval);
                    archive.status().refuses(false);
                    let release = StreamRelease::new(
                        Arc::clone(&voice),
                        Arc::clone(archive.status()),
                        Arc::clone(archive.progress()),
                    );
                    let releasing = follows.then(|| release.watch());
                    let receive = Receive {
                        intake: pipeline.spool().intake(),
                        status: Arc::clone(archive.status()),
                        acknowledgements: archive.progress().acknowledgements(),
                        branch: branch.branch,
                        failure: Arc::clone(pipeline.failure()),
                        voice: Arc::clone(&voice),
                        release,
                        until: match purpose {
                            Purpose::Follow => Lsn::MAX,
                            Purpose::Heal(until) => until,
                        },
                        status_interval,
                    };
                    let mut asked = shutdown.clone();
                    let work = async move {
                        let end = receive.run(&mut receiver, &mut asked).await;
                        (receiver, end)
                    };
                    let mut streaming = std::pin::pin!(line.run(work));
                    let (receiver, end) = tokio::select! {
                        outcome = &mut streaming => outcome?,
                        () = shutdown.requested() => {
                            // The writer may be blocked waiting for disk space. This is the only
                            // place that wakes it.
                            pipeline.spool().give_up_waiting();
                            streaming.await?
                        }
                    };
                    if let Err(Error::Replication(error)) = &end
                        && error.is_wal_removed()
                        && start_lsn < taken_up.resume_lsn
                    {
                        return Ok(pipeline.forgo_overlap(taken_up.resume_lsn));
                    }
                    let end = end.map_err(|error| match pipeline.failure().take() {
                        // Report the other thread's error: this one is only its consequence.
                        Some(first) => first,
                        None => match error {
                            Error::Replication(error) => gap(error, timeline, start_lsn),
                            other => other,
                        },
                    })?;
                    if end == StreamEnd::ServerStops {
                        // The spool may stay full for long. It is not waited for, so that the
                        // server does not wait for us.
                        if let Err(error) = voice.say(false).await {
                            tracing::debug!(%error, "the last status found no listener");
                        }
                        voice.close().await;
                        return Ok(end);
                    }
                    // Received WAL is made durable and reported before anything else happens to the
                    // connection.
                    pipeline.spool().drain().await?;
                    if let Some(error) = pipeline.failure().take() {
                        return Err(error);
                    }
                    let waits_for_remote = archive.settings().acknowledge == Acknowledge::Remote;
                    if end == StreamEnd::Shutdown && waits_for_remote {
                        // Commits may wait for WAL that is in transit to the repository.
                        let progress = archive.progress();
                        let flushed = progress.positions().flushed();
                        let mut said = progress.acknowledgements();
                        let all = said.wait_for(|said| said.flush.lsn() >= flushed);
                        drop(tokio::time::timeout(HAND_OVER_MAX, all).await);
                    }
                    // A server that shuts down waits for this status. The server may be gone
                    // already, which is not an error.
                    if let Err(error) = voice.say(false).await {
                        tracing::debug!(%error, "the last status found no listener");
                    }
                    drop((alive, releasing));
                    let Some(sender) = voice.end().await else {
                        return Ok(StreamEnd::ServerStops);
                    };
                    if end != StreamEnd::Timeline {
                        sender.close().await;
                        return Ok(end);
                    }
                    receiver.finish_timeline(sender).await?
                }
            };
            let Some(NextTimeline {
                timeline: next,
                start_lsn: switch_lsn,
            }) = next
            else {
                return Ok(StreamEnd::ServerClosed);
            };
            client = next_client;
            let content = client.timeline_history(next).await?;
            parse_history(next, &content)?;
            tracing::info!(cluster, timeline = %next, at = %switch_lsn, "the server changed its timeline");
            floor = floor.max(switch_lsn);
            let next = ServerBranch {
                branch: Branch::of_history(next, &content),
                history: Some(content),
                switch_lsn: Lsn::MAX,
            };
            if follows {
                let known = archive.status().facts().server_path.unwrap_or_default();
                archive
                    .status()
                    .follow(known.extended(next.branch, next.history.clone()));
                // A standby that was promoted at a recovery target had sent more WAL than it
                // replayed.
                let left = ServerBranch {
                    switch_lsn,
                    ..branch
                };
                fork::note(pipeline, &[left, next.clone()]).await?;
            }
            plan = StartPlan {
                branch: next,
                start_lsn: switch_lsn.align_down(size.bytes()),
            };
        }
    }
}

fn gap(error: replication::Error, timeline: TimelineId, from: Lsn) -> Error {
    if error.is_wal_removed() {
        Error::Gap {
            timeline,
            from,
            message: error.to_string(),
        }
    } else {
        error.into()
    }
}
