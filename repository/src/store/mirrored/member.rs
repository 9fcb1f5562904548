//! One place of several: its queue, its thread and its state.
//!
//! Nothing is kept in memory for a place that is away: its jobs fail at once, and it is
//! synchronized when it is back.

use std::{
    collections::VecDeque,
    io::ErrorKind,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::step;
use crate::{Error, ObjectStore, PutOutcome, Result, store::observed};

/// The answer of a place to a job.
#[derive(Debug)]
pub(super) struct Reply<T> {
    /// True if the place is known to lack other objects.
    pub(super) lags: bool,
    pub(super) outcome: Result<T>,
}

impl<T> Reply<T> {
    fn refused(error: Error) -> Self {
        Self {
            lags: true,
            outcome: Err(error),
        }
    }
}

/// A job of a place. Jobs are executed in order.
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

/// The maximum size of the bodies in the queue of one place. Beyond it, jobs fail at once, and the
/// place gets the objects from another place later.
const QUEUE_BYTES_MAX: usize = 256 << 20;
/// The first and the longest pause before a place that failed is tried again.
const AWAY_MIN: Duration = Duration::from_millis(500);
const AWAY_MAX: Duration = Duration::from_secs(30);
/// The time for which a place that held an older state of the archive is reported at least.
const OLDER_SHOWN: Duration = Duration::from_secs(60);
/// The interval at which places are compared even if none was away: a backup of another program may
/// be in one place only.
const COMPARE_EVERY: Duration = Duration::from_secs(24 * 3600);

/// The state of a place.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MemberState {
    /// The location of the place.
    pub url: String,
    /// Objects in the queue, including the one that is being written.
    pub queued_objects: usize,
    /// Bytes of these objects.
    pub queued_bytes: usize,
    /// True if the place is known to lack objects that another place has, or has not been compared
    /// yet.
    pub behind: bool,
    /// The age of the oldest object that the place lacks, in seconds; 0 when it is synchronized.
    pub lag_seconds: f64,
    /// The reason why the place is skipped, or the time for which it has not answered; `None` if
    /// neither applies.
    pub error: Option<String>,
    /// The reason why the place counts as an older state of the archive, for example an old copy.
    pub older: Option<String>,
}

impl MemberState {
    /// Returns what an operator has to know of the place. `None` if nothing is wrong.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.error.as_deref().or(self.older.as_deref())
    }
}

#[derive(Debug, Default)]
struct State {
    /// Each job with the time at which it was given.
    queue: VecDeque<(Instant, Job)>,
    queued_bytes: usize,
    /// The time at which the job that is being executed was given.
    working: Option<Instant>,
    /// The time at which the current job of the queue was started, and its size in bytes.
    asked: Option<(Instant, usize)>,
    /// The time before which the place is not tried again, and the reason.
    away: Option<(Instant, String)>,
    /// With `away`: the system identifier and the problem, if the place is no longer the same as
    /// before.
    gone: Option<(String, String)>,
    pause: Duration,
    /// The time since which the place lacks an object that is not in its queue, or may lack one
    /// because it was not compared.
    behind: Option<Instant>,
    /// The number of objects that the place did not take since it was last complete.
    missed: u64,
    /// The newest object that the place lacked when it was last found to hold an older state of
    /// the archive, and the time.
    older: Option<(Instant, String)>,
    in_step: bool,
    compared: Option<Instant>,
    /// After a comparison that was not complete: the time of the next one, and the pause before it.
    again: Option<(Instant, Duration)>,
    finishing: bool,
}

impl State {
    fn fall_behind(&mut self) {
        self.behind.get_or_insert_with(Instant::now);
    }

    fn miss(&mut self) {
        self.missed += 1;
        self.fall_behind();
    }

    /// Returns the reason why the place counted as an older state of the archive. It stays for
    /// [`OLDER_SHOWN`]: another place may fill it within a moment, and an operator has to know that
    /// a wrong disk is mounted.
    fn older(&self) -> Option<String> {
        let (found, key) = self.older.as_ref()?;
        (self.behind.is_some() || found.elapsed() < OLDER_SHOWN).then(|| {
            format!(
                "it held an older state of the archive, without {key}, and is filled from another \
                 repository: check that the right disk or bucket is there"
            )
        })
    }

    /// Returns the time for which the place has not answered, if it exceeds the limit.
    fn hangs(&self, now: Instant) -> Option<Duration> {
        observed::silence(now, self.asked?)
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

    /// Returns true if the place is known to lack objects.
    pub(super) fn lags(&self) -> bool {
        self.lock().missed > 0
    }

    /// Returns true if other places are queried before this place: it is away or does not answer.
    pub(super) fn is_last_choice(&self) -> bool {
        let state = self.lock();
        state.away.is_some() || state.hangs(Instant::now()).is_some()
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
            older: state.older(),
            error: match (&state.away, state.hangs(Instant::now())) {
                (Some((_, error)), _) => Some(error.clone()),
                (None, Some(silent)) => {
                    let seconds = silent.as_secs();
                    Some(format!("it has not answered a request for {seconds} s"))
                }
                (None, None) => None,
            },
        }
    }

    pub(super) fn answered(&self) {
        let mut state = self.lock();
        state.away = None;
        state.pause = Duration::ZERO;
    }

    /// Compares this place with the others at once if it lacks an object. A place that is away or
    /// has jobs left may lack it only for now.
    pub(super) fn check(&self, key: &str) {
        let is_settled = |state: &State| {
            state.away.is_none()
                && state.behind.is_none()
                && state.working.is_none()
                && state.queue.is_empty()
        };
        if !is_settled(&self.lock()) || !matches!(self.store.head(key), Ok(None)) {
            return;
        }
        let mut state = self.lock();
        if is_settled(&state) {
            tracing::warn!(
                event = "place_lacks_newest", repository = %self.store.url(), key,
                "this repository lacks the newest segment, and is filled from the others"
            );
            state.older = Some((Instant::now(), key.to_owned()));
            state.miss();
            drop(state);
            self.changed.notify_all();
        }
    }

    /// A reader requested an object that the place does not have. The next comparison finds out
    /// whether another place has it.
    pub(super) fn lacks(&self) {
        tracing::debug!(repository = %self.store.url(), "an object is not in this repository");
    }

    /// Marks the place as away after a transient error. A refusal concerns one object only.
    pub(super) fn failed(&self, error: &Error) {
        // An invalid name or range is the caller's mistake, and a short object concerns only that
        // object.
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

    /// Returns the error for every request while the place is away; `None` while it is not.
    pub(super) fn refusal(&self, action: &'static str, key: &str) -> Option<Error> {
        let state = self.lock();
        let (_, problem) = state.away.as_ref()?;
        let (url, gone) = (self.store.url(), state.gone.as_ref());
        Some(refusal(action, key.to_owned(), url, problem, gone))
    }

    /// Adds a job. Fails it at once when the place is away or its queue is full.
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
            state.miss();
            drop(state);
            self.changed.notify_all();
            return refuse(job, &self.store.url(), &problem, gone.as_ref());
        }
        state.queued_bytes += job.bytes();
        state.queue.push_back((Instant::now(), job));
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until the queue is empty, then lets the thread end.
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

    /// The thread's loop: executes jobs in order, and synchronizes from `others` between them.
    pub(super) fn work(&self, others: &[Arc<dyn ObjectStore>], root: &str) {
        loop {
            let mut state = self.lock();
            if let Some((given, job)) = state.queue.pop_front() {
                let bytes = job.bytes();
                state.working = Some(given);
                state.asked = Some((Instant::now(), bytes));
                drop(state);
                self.act(job);
                let mut state = self.lock();
                state.working = None;
                state.asked = None;
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
            let again = state.again.map(|(at, _)| at);
            let due = match again {
                Some(at) => at <= now,
                None => state.behind.is_some() || old,
            };
            if state.in_step && ready && due {
                state.compared = Some(now);
                drop(state);
                self.catch_up(others, root);
                continue;
            }
            if ready && state.away.is_some() && !state.in_step {
                // This program does not synchronize places, so the next job finds out whether the
                // place is back.
                state.away = None;
            }
            let away = state.away.as_ref().map(|(until, _)| *until);
            let next = match away {
                Some(until) => Some(until.max(again.unwrap_or(until))),
                None => again,
            };
            let pause = next.map_or(AWAY_MAX, |at| {
                at.saturating_duration_since(now)
                    .max(Duration::from_millis(10))
            });
            drop(self.changed.wait_timeout(state, pause));
        }
    }

    fn act(&self, job: Job) {
        match job {
            Job::Put(key, body, reply) => {
                let outcome = self.put(&key, &body);
                self.note(outcome.as_ref().err());
                // A caller that requires one place only may no longer wait for this reply.
                let lags = self.lags();
                drop(reply.send(Reply { lags, outcome }));
            }
            Job::Delete(key, reply) => {
                let outcome = self.store.delete(&key);
                self.note(outcome.as_ref().err());
                let lags = self.lags();
                drop(reply.send(Reply { lags, outcome }));
            }
        }
    }

    /// The caller reads the object back from the first place that has it. This proves that this
    /// place has it, too.
    fn put(&self, key: &str, body: &Bytes) -> Result<PutOutcome> {
        self.store.put_proved(key, body)
    }

    /// Checks that this is the right place. With `free`, only where the check costs no request.
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
                tracing::warn!(repository = %self.store.url(), %error, "this repository failed and lags the others; it is brought up to date later");
                self.failed(error);
                self.lock().miss();
            }
        }
    }

    fn catch_up(&self, others: &[Arc<dyn ObjectStore>], root: &str) {
        let busy = || {
            let state = self.lock();
            state.finishing
        };
        let missed = self.lock().missed;
        match step::catch_up(&*self.store, others, root, &busy) {
            Ok(report) => {
                let mut state = self.lock();
                state.away = None;
                state.gone = None;
                state.pause = Duration::ZERO;
                // An object that was refused during the comparison may be in none of its listings.
                let is_unchanged = state.missed == missed;
                if report.is_complete() {
                    state.again = None;
                    if is_unchanged {
                        state.missed = 0;
                        state.behind = None;
                    }
                } else {
                    // Nothing is wrong with this place, so it continues to take objects.
                    let pause = state.again.map_or(Duration::ZERO, |(_, pause)| pause);
                    let pause = (pause * 2).clamp(AWAY_MIN, AWAY_MAX);
                    state.again = Some((Instant::now() + pause, pause));
                    // No object is known that it lacks: the other place is the one to report.
                    if state.missed == 0 && report.unread == 0 {
                        state.behind = None;
                    }
                }
                drop(state);
                if report.copied + report.removed > 0 {
                    tracing::info!(
                        repository = %self.store.url(), copied = report.copied, removed = report.removed,
                        is_complete = report.is_complete(), "objects were copied to this repository from the others"
                    );
                }
            }
            Err(error) => {
                tracing::warn!(repository = %self.store.url(), %error, "this repository is behind and cannot catch up yet");
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
        Job::Put(key, _, reply) => drop(reply.send(Reply::refused(error("put", key)))),
        Job::Delete(key, reply) => drop(reply.send(Reply::refused(error("delete", key)))),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_without_an_answer_hangs_after_a_time_that_grows_with_its_bytes() {
        let began = Instant::now();
        let seconds = |seconds| began + Duration::from_secs(seconds);
        let mut state = State::default();
        assert_eq!(state.hangs(seconds(60)), None, "nothing is asked");
        state.asked = Some((began, 0));
        assert_eq!(state.hangs(seconds(15)), None);
        assert_eq!(state.hangs(seconds(16)), Some(Duration::from_secs(16)));
        state.asked = Some((began, 64 << 20));
        assert_eq!(state.hangs(seconds(270)), None, "it may still be sent");
        assert!(state.hangs(seconds(272)).is_some());
    }
}
