//! [`Retrying`]: a store that retries transient failures, with growing pauses, jitter and a budget.
//!
//! Only failures that may disappear without intervention are retried ([`Error::is_transient`]). A
//! refusal is returned at once. All users of the store share the budget: while the store is down,
//! requests fail early instead of queueing retries.

use std::{
    hash::{BuildHasher, RandomState},
    ops::{ControlFlow, Range},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use bytes::Bytes;

use super::{LockOutcome, LockSpan, ObjectMeta, ObjectStore, Pin, PutOutcome, Witness};
#[cfg(doc)]
use crate::Error;
use crate::Result;

/// The time that the user of a store waits for it to recover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patience {
    /// Five attempts, about one second: for callers that retry themselves or have another store to
    /// ask.
    #[default]
    Short,
    /// Twelve attempts, up to half a minute: longer than a store needs to restart. For a restore,
    /// which would otherwise have to start again.
    Long,
}

/// The number and pace of retries.
#[derive(Debug)]
pub struct RetryPolicy {
    /// The attempts per request, including the first.
    pub attempts_max: u32,
    /// The first pause. Each further pause is twice as long.
    pub pause_min: Duration,
    /// The longest pause.
    pub pause_max: Duration,
    /// The retries that are left. Every success adds one.
    budget: AtomicU32,
    budget_max: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Patience::Short.into()
    }
}

impl From<Patience> for RetryPolicy {
    fn from(patience: Patience) -> Self {
        let attempts_max = match patience {
            Patience::Short => 5,
            Patience::Long => 12,
        };
        let pause_min = Duration::from_millis(100);
        Self::new(attempts_max, pause_min, Duration::from_secs(5), 100)
    }
}

impl RetryPolicy {
    /// Creates a policy with a full budget.
    #[must_use]
    pub fn new(attempts_max: u32, pause_min: Duration, pause_max: Duration, budget: u32) -> Self {
        Self {
            attempts_max,
            pause_min,
            pause_max,
            budget: AtomicU32::new(budget),
            budget_max: budget,
        }
    }

    /// Runs `request` until it succeeds, is refused, or the attempts or the budget are used up.
    ///
    /// # Errors
    /// The error of the last attempt.
    pub fn run<T>(&self, mut request: impl FnMut() -> Result<T>) -> Result<T> {
        for attempt in 1.. {
            match request() {
                Err(error) if error.is_transient() => {
                    if attempt >= self.attempts_max || !self.spend() {
                        return Err(error);
                    }
                    let pause = self.pause(attempt);
                    tracing::debug!(%error, attempt, ?pause, "a request failed and is tried again");
                    thread::sleep(pause);
                }
                outcome => {
                    if outcome.is_ok() {
                        self.refund();
                    }
                    return outcome;
                }
            }
        }
        unreachable!("BUG: the last attempt returns")
    }

    /// Returns a random pause between zero and the doubled pause ("full jitter"), so that clients
    /// that failed together retry at different times.
    fn pause(&self, attempt: u32) -> Duration {
        let micros = u64::try_from(self.ceiling(attempt).as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(RandomState::new().hash_one(attempt) % micros.max(1))
    }

    fn ceiling(&self, attempt: u32) -> Duration {
        self.pause_min
            .saturating_mul(1 << (attempt - 1).min(16))
            .min(self.pause_max)
    }

    fn spend(&self) -> bool {
        let less = |left: u32| left.checked_sub(1);
        self.budget
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }

    fn refund(&self) {
        let more = |left: u32| (left < self.budget_max).then_some(left + 1);
        let _full = self
            .budget
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }
}

/// A store with a [`RetryPolicy`].
#[derive(Debug)]
pub struct Retrying<S> {
    store: S,
    policy: RetryPolicy,
}

impl<S: ObjectStore> Retrying<S> {
    /// Wraps a store with a policy.
    pub fn new(store: S, policy: RetryPolicy) -> Self {
        Self { store, policy }
    }
}

impl<S: ObjectStore> ObjectStore for Retrying<S> {
    /// If the reply to a put was lost, the retry finds the object. Callers compare it with theirs,
    /// as they do with an object that another process wrote.
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.policy.run(|| self.store.put_if_absent(key, body))
    }

    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.policy.run(|| self.store.put_proved(key, body))
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.policy.run(|| self.store.get(key))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.policy.run(|| self.store.get_range(key, range.clone()))
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.policy.run(|| self.store.head(key))
    }

    /// A listing that fails continues after the last visited key.
    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut last: Option<String> = None;
        self.policy.run(|| {
            self.store.list(prefix, &mut |object| {
                if last.as_ref().is_some_and(|last| object.key <= *last) {
                    return ControlFlow::Continue(());
                }
                last = Some(object.key.clone());
                visit(object)
            })
        })
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        self.policy.run(|| self.store.folders(prefix))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.policy.run(|| self.store.delete(key))
    }

    fn lock(&self, key: &str, span: LockSpan) -> Result<LockOutcome> {
        self.policy.run(|| self.store.lock(key, span))
    }

    fn ready_to_write(&self) -> Result<()> {
        self.policy.run(|| self.store.ready_to_write())
    }

    fn url(&self) -> String {
        self.store.url()
    }

    fn exists(&self) -> Result<bool> {
        self.store.exists()
    }

    fn create_place(&self) -> Result<()> {
        self.store.create_place()
    }

    fn witness(&self, key: &str) -> Result<Option<Witness>> {
        self.policy.run(|| self.store.witness(key))
    }

    fn pin(&self, pin: Pin) {
        self.store.pin(pin);
    }

    fn confirm(&self) -> Result<()> {
        self.policy.run(|| self.store.confirm())
    }

    fn confirm_free(&self) -> Result<()> {
        self.store.confirm_free()
    }

    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        self.policy.run(|| self.store.holds(key, body))
    }

    fn get_sound(&self, key: &str, sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        self.policy.run(|| self.store.get_sound(key, sound))
    }

    fn expect_new(&self) {
        self.store.expect_new();
    }

    fn put_back_keys(&self) -> Result<Vec<String>> {
        self.policy.run(|| self.store.put_back_keys())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn failure(transient: bool) -> Error {
        Error::S3 {
            action: "get",
            key: "k".to_owned(),
            url: "s3://b".to_owned(),
            problem: "SlowDown".to_owned(),
            transient,
        }
    }

    fn quick(attempts_max: u32, budget: u32) -> RetryPolicy {
        let pause = Duration::from_micros(10);
        RetryPolicy::new(attempts_max, pause, pause, budget)
    }

    #[test]
    fn what_fails_in_passing_is_asked_again() {
        let mut asked = 0;
        let outcome = quick(5, 10).run(|| {
            asked += 1;
            if asked < 4 {
                Err(failure(true))
            } else {
                Ok(asked)
            }
        });
        assert_eq!(outcome.expect("the fourth succeeds"), 4);
    }

    #[test]
    fn a_refusal_is_not_asked_again_and_attempts_are_bounded() {
        for (transient, expected) in [(false, 1), (true, 5)] {
            let mut asked = 0;
            let outcome: Result<()> = quick(5, 10).run(|| {
                asked += 1;
                Err(failure(transient))
            });
            assert!(outcome.is_err());
            assert_eq!(asked, expected, "transient: {transient}");
        }
    }

    #[test]
    fn the_budget_is_shared_and_successes_fill_it_again() {
        let policy = quick(5, 6);
        let mut asked = 0;
        let mut fail = || {
            let outcome: Result<()> = policy.run(|| {
                asked += 1;
                Err(failure(true))
            });
            assert!(outcome.is_err());
            std::mem::take(&mut asked)
        };
        assert_eq!([fail(), fail(), fail()], [5, 3, 1]);
        policy.run(|| Ok(())).expect("it succeeds");
        assert_eq!(policy.budget.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn patience_decides_how_long_a_store_is_waited_for() {
        for (patience, longest) in [(Patience::Short, 1), (Patience::Long, 31)] {
            let policy = RetryPolicy::from(patience);
            let ceilings = (1..policy.attempts_max).map(|attempt| policy.ceiling(attempt));
            let sum: Duration = ceilings.sum();
            assert_eq!(sum.as_secs(), longest, "{patience:?}");
        }
    }

    #[test]
    fn no_pause_is_longer_than_the_longest() {
        let policy = RetryPolicy::default();
        for attempt in 1..100 {
            assert!(policy.pause(attempt) <= policy.pause_max);
        }
    }
}
