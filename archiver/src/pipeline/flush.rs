//! Stage 2b: fsyncs and renames on a separate thread, so that during a catch-up the writer fills
//! the next segment while the last one is made durable.
//!
//! Jobs run in order. Invariant: a failed fsync is never retried, and nothing after it is reported.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Instant,
};

use wal_format::Lsn;

use super::{archive::Archive, failure::Failure, seal::Backlog};
use crate::{
    core::event::Event,
    error::{Error, Result},
    spool::{open_segment::OpenSegment, writer::CompletedSegment},
};

/// The number of segments that may wait for their fsync. Two keep the disk busy; more would only be
/// dirty pages in memory.
const JOBS_MAX: usize = 2;

enum Job {
    Finish(Box<CompletedSegment>),
    Sync {
        open: OpenSegment,
        start_lsn: Lsn,
        end_lsn: Lsn,
    },
    Settle(SyncSender<()>),
}

/// The handle of the thread. Dropping it lets the thread finish its jobs and end.
#[derive(Debug)]
pub struct Flusher {
    jobs: Option<SyncSender<Job>>,
    pending: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no more threads.
    pub fn start(
        archive: Arc<Archive>,
        backlog: Arc<Backlog>,
        failure: Arc<Failure>,
    ) -> Result<Self> {
        let (jobs, queue) = sync_channel(JOBS_MAX);
        let pending = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&pending);
        let thread = std::thread::Builder::new()
            .name("flush".to_owned())
            .spawn(move || {
                work(&queue, &left, &failure, |job| {
                    perform(job, &archive, &backlog)
                });
            })
            .map_err(Error::no_thread("flush"))?;
        Ok(Self {
            jobs: Some(jobs),
            pending,
            thread: Some(thread),
        })
    }

    /// Makes a complete segment durable and hands it on. Waits while the disk is slow.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`] after a failure, which the thread has raised.
    pub fn finish(&self, segment: CompletedSegment) -> Result<()> {
        self.submit(Job::Finish(Box::new(segment)))
    }

    /// Makes the open segment durable up to `end_lsn`.
    ///
    /// # Errors
    /// As [`Flusher::finish`].
    pub fn sync(&self, open: OpenSegment, start_lsn: Lsn, end_lsn: Lsn) -> Result<()> {
        self.submit(Job::Sync {
            open,
            start_lsn,
            end_lsn,
        })
    }

    /// Returns true if the thread has no job.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    /// Waits until all earlier jobs are done.
    ///
    /// # Errors
    /// As [`Flusher::finish`].
    pub fn settle(&self) -> Result<()> {
        let (done, wait) = sync_channel(1);
        self.submit(Job::Settle(done))?;
        wait.recv().map_err(|_| stopped())
    }

    fn submit(&self, job: Job) -> Result<()> {
        self.pending.fetch_add(1, Ordering::AcqRel);
        let jobs = self
            .jobs
            .as_ref()
            .expect("BUG: the flusher is used after its end");
        jobs.send(job).map_err(|_| stopped())
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the flush thread panicked");
        }
    }
}

fn stopped() -> Error {
    Error::ThreadStopped {
        name: "flush",
        reason: "see the error before".to_owned(),
    }
}

/// Performs the jobs until one fails.
fn work(
    queue: &Receiver<Job>,
    pending: &AtomicUsize,
    failure: &Failure,
    perform: impl Fn(Job) -> Result<()>,
) {
    while let Ok(job) = queue.recv() {
        if let Err(error) = perform(job) {
            // The job stays pending. Linux reports a failed write to one fsync of an open file
            // only, so an fsync by the connection's thread, which comes when this thread is idle,
            // would succeed, and WAL that is not on the disk would be acknowledged.
            failure.raise(error);
            return;
        }
        pending.fetch_sub(1, Ordering::AcqRel);
    }
}

fn perform(job: Job, archive: &Archive, backlog: &Backlog) -> Result<()> {
    let began = Instant::now();
    let outcome = match job {
        Job::Finish(segment) => {
            let number = segment.file.segment();
            let done = segment.file.finish();
            if done.is_ok() {
                let end = number.end_lsn(archive.identity().segment_size);
                let summary = Some((segment.summary, segment.proven));
                backlog.push(segment.branch, number, Some(end), summary);
            }
            done
        }
        Job::Sync {
            open,
            start_lsn,
            end_lsn,
        } => {
            let done = open.sync();
            if done.is_ok() {
                archive.progress().on(Event::Synced {
                    segment_start: start_lsn,
                    end_lsn,
                });
            }
            done
        }
        Job::Settle(done) => {
            // The receiver is gone only when the whole archive ends.
            let _gone = done.send(());
            return Ok(());
        }
    };
    archive.status().flushed(began.elapsed());
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failed_job_the_thread_is_never_idle_again() {
        let (jobs, queue) = sync_channel(JOBS_MAX);
        let flusher = Flusher {
            jobs: Some(jobs),
            pending: Arc::default(),
            thread: None,
        };
        let failure = Failure::default();
        let (done, _wait) = sync_channel(1);
        flusher.submit(Job::Settle(done)).expect("there is room");
        work(&queue, &flusher.pending, &failure, |_| {
            Err(Error::SpoolFull)
        });
        drop(queue);
        assert!(!flusher.is_idle());
        assert!(failure.take().is_some());
        assert!(flusher.settle().is_err());
        assert!(!flusher.is_idle());
    }
}
