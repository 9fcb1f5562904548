//! [`ObservedStore`]: wraps a store and reports each request's duration and outcome to an observer.

use std::{
    collections::BTreeMap,
    fmt,
    ops::{ControlFlow, Range},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{LockOutcome, LockSpan, ObjectMeta, ObjectStore, Pin, PutOutcome, Witness};
use crate::{Error, Result};

/// Called for each request with its name (one of [`REQUESTS`]), its duration, and the kind of its
/// failure ([`Error::failure_kind`]). An absent object is not a failure.
pub type Observer = Arc<dyn Fn(&'static str, Duration, Option<&'static str>) + Send + Sync>;

/// The names of requests.
pub const REQUESTS: [&str; 5] = ["delete", "get", "head", "list", "put"];

/// A store counts as failing if it has not answered a put for this time, plus the time that a
/// transfer of the put's bytes takes at `RATE_MIN` bytes per second.
const ANSWER_MAX: Duration = Duration::from_secs(15);
const RATE_MIN: usize = 256 << 10;

/// Returns the time since `begun`, if it exceeds the limit for a request with this many bytes.
pub(super) fn silence(now: Instant, (begun, bytes): (Instant, usize)) -> Option<Duration> {
    let transfer = Duration::from_secs((bytes / RATE_MIN) as u64);
    let silent = now.saturating_duration_since(begun);
    (silent > ANSWER_MAX.saturating_add(transfer)).then_some(silent)
}

/// The puts that have not been answered yet. A put fails only after minutes, so a store that hangs
/// is noticed here first.
#[derive(Debug, Default)]
pub struct OpenPuts(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    last: u64,
    /// The beginning of each put and its bytes.
    puts: BTreeMap<u64, (Instant, usize)>,
}

impl OpenPuts {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, bytes: usize) -> u64 {
        let mut open = self.lock();
        open.last += 1;
        let number = open.last;
        open.puts.insert(number, (Instant::now(), bytes));
        number
    }

    /// Returns the time for which the store has not answered a put. `None` below the limit.
    #[must_use]
    pub fn silent_for(&self) -> Option<Duration> {
        let now = Instant::now();
        let open = self.lock();
        let silent = open.puts.values().filter_map(|put| silence(now, *put));
        silent.max()
    }
}

/// A store whose requests are observed.
pub struct ObservedStore {
    store: Arc<dyn ObjectStore>,
    observer: Observer,
    puts: Arc<OpenPuts>,
}

impl fmt::Debug for ObservedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

impl ObservedStore {
    /// Wraps a store.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, observer: Observer, puts: Arc<OpenPuts>) -> Self {
        Self {
            store,
            observer,
            puts,
        }
    }

    fn timed_put<T>(&self, bytes: usize, request: impl FnOnce() -> Result<T>) -> Result<T> {
        let number = self.puts.begin(bytes);
        let outcome = self.timed("put", request);
        self.puts.lock().puts.remove(&number);
        outcome
    }

    fn timed<T>(&self, op: &'static str, request: impl FnOnce() -> Result<T>) -> Result<T> {
        let began = Instant::now();
        let outcome = request();
        let failure = outcome.as_ref().err().and_then(Error::failure_kind);
        (self.observer)(op, began.elapsed(), failure);
        outcome
    }
}

impl ObjectStore for ObservedStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.timed_put(body.len(), || self.store.put_if_absent(key, body))
    }

    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.timed_put(body.len(), || self.store.put_proved(key, body))
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.timed("get", || self.store.get(key))
    }

    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        self.timed("get", || self.store.holds(key, body))
    }

    fn get_sound(&self, key: &str, sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        self.timed("get", || self.store.get_sound(key, sound))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.timed("get", || self.store.get_range(key, range))
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.timed("head", || self.store.head(key))
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        self.timed("list", || self.store.list(prefix, visit))
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        self.timed("list", || self.store.folders(prefix))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.timed("delete", || self.store.delete(key))
    }

    fn ready_to_write(&self) -> Result<()> {
        self.store.ready_to_write()
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
        self.store.witness(key)
    }

    fn expect_new(&self) {
        self.store.expect_new();
    }

    fn pin(&self, pin: Pin) {
        self.store.pin(pin);
    }

    fn confirm(&self) -> Result<()> {
        self.store.confirm()
    }

    fn confirm_free(&self) -> Result<()> {
        self.store.confirm_free()
    }

    fn put_back_keys(&self) -> Result<Vec<String>> {
        self.store.put_back_keys()
    }

    fn lock(&self, key: &str, span: LockSpan) -> Result<LockOutcome> {
        self.timed("put", || self.store.lock(key, span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LocalStore;

    #[test]
    fn each_request_is_told_and_absence_is_an_answer() {
        let directory = tempfile::tempdir().expect("a directory");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&seen);
        let puts = Arc::new(OpenPuts::default());
        let store = ObservedStore::new(
            Arc::new(LocalStore::open(directory.path()).expect("a store")),
            Arc::new(move |op, _, failure| {
                told.lock().expect("a list").push((op, failure));
            }),
            Arc::clone(&puts),
        );
        store.put_if_absent("a", b"1").expect("a put");
        assert!(store.get("b").is_err());
        // A key outside of the store is refused.
        assert!(store.get("../b").is_err());
        assert_eq!(
            *seen.lock().expect("a list"),
            [("put", None), ("get", None), ("get", Some("unreachable"))]
        );
        assert!(puts.lock().puts.is_empty());
    }

    #[test]
    fn a_put_without_an_answer_is_told_while_it_lasts() {
        let puts = OpenPuts::default();
        let past = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        puts.lock().puts.insert(1, (past(14).expect("a time"), 0));
        // A large body has more time.
        let large = (past(20).expect("a time"), 10 * RATE_MIN);
        puts.lock().puts.insert(2, large);
        assert_eq!(puts.silent_for(), None);
        puts.lock().puts.insert(3, (past(16).expect("a time"), 0));
        assert_eq!(puts.silent_for().expect("it hangs").as_secs(), 16);
    }
}
