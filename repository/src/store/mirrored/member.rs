//! One place among several: its queue, its thread, and how it is.
//!
//! Nothing is kept in memory for a place that is away: it fails at once, and is brought into step when it is back.

use std::{
    collections::VecDeque,
    io::ErrorKind,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::step;
use crate::{Error, ObjectStore, PutOutcome, Result};

/// What a place answers to a job.
pub(super) type Reply<T> = Result<T>;

/// What a place is to do, in order.
#[derive(Debug)]
pub(super) enum Job {
    Put(String, Bytes, Sender<Reply<PutOutcome>>),
    Delete(String, Sender<Reply<()>>),
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Put(_, body, _) => body.len(),
            Self::Delete(..) => 0,
        }
    }
}

/// Bodies that wait for one place; beyond it the place counts as away and catches up from another.
const QUEUE_BYTES_MAX: usize = 256 << 20;
/// First and longest pause before a place that failed is asked again.
const AWAY_MIN: Duration = Duration::from_millis(500);
const AWAY_MAX: Duration = Duration::from_secs(30);
/// The interval at which places are compared though none was away: another program's backup may be
/// in one only.
const COMPARE_EVERY: Duration = Duration::from_secs(24 * 3600);

/// How a place is.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MemberState {
    /// Where it is.
    pub url: String,
    /// Objects that wait for it.
    pub queued_objects: usize,
    /// Their bytes.
    pub queued_bytes: usize,
    /// True if it lacks what another one has, as far as is known.
    pub behind: bool,
    /// For how long the oldest of what it lacks has waited, in seconds; 0 when it is in step.
    pub lag_seconds: f64,
    /// Why it is passed over, if it is.
    pub error: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    /// Each with the time at which it was given.
    queue: VecDeque<(Instant, Job)>,
    queued_bytes: usize,
    /// Since when what is worked on has waited.
    working: Option<Instant>,
    /// Not to be asked before, and why.
    away: Option<(Instant, String)>,
    /// With `away`: the system identifier and the problem where it is another place than before.
    gone: Option<(String, String)>,
    pause: Duration,
    /// Since when it lacks something that is not in its queue.
    behind: Option<Instant>,
    in_step: bool,
    compared: Option<Instant>,
    finishing: bool,
}

impl State {
    fn fall_behind(&mut self) {
        self.behind.get_or_insert_with(Instant::now);
    }

    fn lag(&self) -> Duration {
        let oldest = self.queue.front().map(|(given, _)| *given);
        let since = [self.behind, self.working, oldest].into_iter().flatten();
        since.min().map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// One place.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) store: Arc<dyn ObjectStore>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Member {
    pub(super) fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self {
            store,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_away(&self) -> bool {
        self.lock().away.is_some()
    }

    pub(super) fn keep_in_step(&self) {
        let mut state = self.lock();
        state.in_step = true;
        state.fall_behind();
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn state(&self) -> MemberState {
        let state = self.lock();
        MemberState {
            url: self.store.url(),
            queued_objects: state.queue.len() + usize::from(state.working.is_some()),
            queued_bytes: state.queued_bytes,
            behind: state.behind.is_some(),
            lag_seconds: state.lag().as_secs_f64(),
            error: state.away.as_ref().map(|(_, error)| error.clone()),
        }
    }

    pub(super) fn answered(&self) {
        let mut state = self.lock();
        state.away = None;
        state.pause = Duration::ZERO;
    }

    /// Somebody asked it for what it does not have; whether another has it is seen when they are compared.
    pub(super) fn lacks(&self) {
        tracing::debug!(repository = %self.store.url(), "an object is not in this repository");
    }

    /// What failed: away, when that passes by itself; a refusal concerns one object.
    pub(super) fn failed(&self, error: &Error) {
        // A wrong name or range is the asker's fault, and a short object is one object's.
        let of_one = matches!(error, Error::Store { source, .. }
            if matches!(source.kind(), ErrorKind::InvalidInput | ErrorKind::UnexpectedEof));
        if of_one || !error.is_transient() {
            return;
        }
        let mut state = self.lock();
        state.pause = (state.pause * 2).clamp(AWAY_MIN, AWAY_MAX);
        state.away = Some((Instant::now() + state.pause, error.to_string()));
        state.gone = match error {
            Error::Gone {
                system, problem, ..
            } => Some((system.clone(), problem.clone())),
            _ => None,
        };
    }

    /// The error of whatever is asked of it while it is away; `None` while it is not.
    pub(super) fn refusal(&self, action: &'static str, key: &str) -> Option<Error> {
        let state = self.lock();
        let (_, problem) = state.away.as_ref()?;
        let (url, gone) = (self.store.url(), state.gone.as_ref());
        Some(refusal(action, key.to_owned(), url, problem, gone))
    }

    /// Adds a job, or answers it at once when the place is away.
    pub(super) fn give(&self, job: Job) {
        let mut state = self.lock();
        let full = state.queued_bytes.saturating_add(job.bytes()) > QUEUE_BYTES_MAX
            && !state.queue.is_empty();
        let problem = match &state.away {
            Some((_, error)) => Some((error.clone(), state.gone.clone())),
            None if full => Some(("too much waits for it".to_owned(), None)),
            None => None,
        };
        if let Some((problem, gone)) = problem {
            state.fall_behind();
            drop(state);
            self.changed.notify_all();
            return refuse(job, &self.store.url(), &problem, gone.as_ref());
        }
        state.queued_bytes += job.bytes();
        state.queue.push_back((Instant::now(), job));
        drop(state);
        self.changed.notify_all();
    }

    /// Lets the thread end when nothing is left; waits for that.
    pub(super) fn finish(&self, patience: Duration) {
        let mut state = self.lock();
        state.finishing = true;
        self.changed.notify_all();
        let waiting = |state: &mut State| !state.queue.is_empty() || state.working.is_some();
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, patience, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() || (state.behind.is_some() && !state.in_step) {
            tracing::warn!(
                repository = %self.store.url(),
                "this repository does not have everything; `wal-archiver run` or `verify --repair` brings it into step"
            );
        }
    }

    /// The thread: jobs in order, and between them catching up from `others`.
    pub(super) fn work(&self, others: &[Arc<dyn ObjectStore>], root: &str) {
        loop {
            let mut state = self.lock();
            if let Some((given, job)) = state.queue.pop_front() {
                state.working = Some(given);
                drop(state);
                let bytes = job.bytes();
                self.act(job);
                let mut state = self.lock();
                state.working = None;
                state.queued_bytes -= bytes;
                drop(state);
                self.changed.notify_all();
                continue;
            }
            if state.finishing {
                return;
            }
            let now = Instant::now();
            let old = state
                .compared
                .is_some_and(|compared| now.duration_since(compared) > COMPARE_EVERY);
            let ready = state.away.as_ref().is_none_or(|(until, _)| *until <= now);
            if state.in_step && ready && (state.behind.is_some() || old) {
                state.compared = Some(now);
                drop(state);
                self.catch_up(others, root);
                continue;
            }
            if ready && state.away.is_some() && !state.in_step {
                // A program that does not keep places in step: the next job finds out whether it is back.
                state.away = None;
            }
            let until = state.away.as_ref().map_or(AWAY_MAX, |(until, _)| {
                until
                    .saturating_duration_since(now)
                    .max(Duration::from_millis(10))
            });
            drop(self.changed.wait_timeout(state, until));
        }
    }

    fn act(&self, job: Job) {
        match job {
            Job::Put(key, body, reply) => {
                let outcome = self.put(&key, &body);
                self.note(outcome.as_ref().err());
                // Whoever needs one place only may have gone on already.
                drop(reply.send(outcome));
            }
            Job::Delete(key, reply) => {
                let outcome = self.store.delete(&key);
                self.note(outcome.as_ref().err());
                drop(reply.send(outcome));
            }
        }
    }

    /// The caller reads back what it put in the first place that has it; that this one has it is proved here.
    fn put(&self, key: &str, body: &Bytes) -> Result<PutOutcome> {
        self.store.put_proved(key, body)
    }

    /// Checks that it is the right place; `free` only where that costs no request.
    pub(super) fn confirm(&self, free: bool) -> Result<()> {
        let outcome = if free {
            self.store.confirm_free()
        } else {
            self.store.confirm()
        };
        if let Err(error) = &outcome {
            self.note(Some(error));
        }
        outcome
    }

    fn note(&self, error: Option<&Error>) {
        match error {
            None => self.answered(),
            Some(error) if error.is_object_locked() => {}
            Some(error) => {
                tracing::warn!(repository = %self.store.url(), %error, "this repository falls behind");
                self.failed(error);
                self.lock().fall_behind();
            }
        }
    }

    fn catch_up(&self, others: &[Arc<dyn ObjectStore>], root: &str) {
        let busy = || {
            let state = self.lock();
            state.finishing
        };
        match step::catch_up(&*self.store, others, root, &busy) {
            Ok(report) => {
                let mut state = self.lock();
                state.away = None;
                state.pause = Duration::ZERO;
                if report.complete {
                    state.behind = None;
                }
                drop(state);
                if report.copied + report.removed > 0 {
                    tracing::info!(
                        repository = %self.store.url(), copied = report.copied, removed = report.removed,
                        "this repository is in step again"
                    );
                }
                if !report.complete {
                    self.failed(&report.why(&self.store.url()));
                }
            }
            Err(error) => {
                tracing::warn!(repository = %self.store.url(), %error, "this repository is behind and can not catch up yet");
                self.failed(&error);
                let mut state = self.lock();
                if state.away.is_none() {
                    state.away = Some((Instant::now() + AWAY_MAX, error.to_string()));
                }
            }
        }
    }
}

fn refuse(job: Job, url: &str, problem: &str, gone: Option<&(String, String)>) {
    let error = |action, key| refusal(action, key, url.to_owned(), problem, gone);
    match job {
        Job::Put(key, _, reply) => drop(reply.send(Err(error("put", key)))),
        Job::Delete(key, reply) => drop(reply.send(Err(error("delete", key)))),
    }
}

fn refusal(
    action: &'static str,
    key: String,
    url: String,
    problem: &str,
    gone: Option<&(String, String)>,
) -> Error {
    match gone {
        Some((system, problem)) => Error::Gone {
            url,
            system: system.clone(),
            problem: problem.clone(),
        },
        None => Error::S3 {
            action,
            key,
            url,
            problem: format!("passed over: {problem}"),
            transient: true,
        },
    }
}
