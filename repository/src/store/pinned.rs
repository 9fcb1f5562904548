//! [`PinnedStore`]: a store that writes only while the place contains one of its witnesses. The
//! bucket of that name may have been emptied, or may be another bucket.
//!
//! A check is a GET. Before a tail, of which there are many, the store checks at most once per
//! [`CHECK_INTERVAL`]; before any other object it checks always. Invariant: what was put before
//! [`ObjectStore::confirm`] succeeded is in the right place. Code that removes the last other copy
//! calls `confirm` first.

use std::{
    ops::{ControlFlow, Range},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{LockOutcome, LockSpan, ObjectMeta, ObjectStore, Pin, PutOutcome, Witness};
#[cfg(doc)]
use crate::Error;
use crate::Result;

/// The time for which a check counts: tails may go to a wrong bucket for this long.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// A store together with the objects by which it is recognised.
#[derive(Debug)]
pub struct PinnedStore<S> {
    store: S,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pin: Option<Pin>,
    /// The time of the last check. `None` before the first check and after a check that failed.
    confirmed: Option<Instant>,
}

impl<S: ObjectStore> PinnedStore<S> {
    /// Wraps a store, not pinned yet.
    pub fn new(store: S) -> Self {
        Self {
            store,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the place unless the last check is recent.
    fn check(&self) -> Result<()> {
        let confirmed = self.state().confirmed;
        if confirmed.is_some_and(|confirmed| confirmed.elapsed() < CHECK_INTERVAL) {
            return Ok(());
        }
        self.confirm()
    }

    /// Checks the place before an object is put.
    fn check_for(&self, key: &str) -> Result<()> {
        // `{cluster}/{system identifier}/tail/...`
        if key.split('/').nth(2) == Some("tail") {
            self.check()
        } else {
            self.confirm()
        }
    }

    /// Passes an answer on. An answer "absent" counts only if the place is the right one.
    fn absent_here<T>(&self, answer: Result<T>) -> Result<T> {
        if answer.as_ref().is_err_and(crate::Error::is_not_found) {
            self.check()?;
        }
        answer
    }
}

impl<S: ObjectStore> ObjectStore for PinnedStore<S> {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.check_for(key)?;
        self.store.put_if_absent(key, body)
    }

    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.check_for(key)?;
        self.store.put_proved(key, body)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.absent_here(self.store.get(key))
    }

    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        self.absent_here(self.store.holds(key, body))
    }

    fn get_sound(&self, key: &str, sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        self.absent_here(self.store.get_sound(key, sound))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.absent_here(self.store.get_range(key, range))
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        let found = self.store.head(key)?;
        if found.is_none() {
            self.check()?;
        }
        Ok(found)
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        self.check()?;
        self.store.list(prefix, visit)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.check()?;
        self.store.delete(key)
    }

    fn lock(&self, key: &str, span: LockSpan) -> Result<LockOutcome> {
        self.check()?;
        self.store.lock(key, span)
    }

    fn ready_to_write(&self) -> Result<()> {
        self.check()?;
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

    fn pin(&self, pin: Pin) {
        *self.state() = State {
            pin: Some(pin),
            confirmed: None,
        };
    }

    fn confirm(&self) -> Result<()> {
        let Some(pin) = self.state().pin.clone() else {
            return Ok(());
        };
        let asked = Instant::now();
        let checked = pin.check(&self.url(), |key| match self.store.get(key) {
            Ok(stored) => Ok(Some(stored)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        });
        self.state().confirmed = checked.is_ok().then_some(asked);
        checked
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        self.check()?;
        self.store.folders(prefix)
    }

    fn expect_new(&self) {
        self.store.expect_new();
    }

    /// A check costs a request.
    fn confirm_free(&self) -> Result<()> {
        Ok(())
    }

    fn put_back_keys(&self) -> Result<Vec<String>> {
        self.store.put_back_keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, store::LocalStore};

    #[test]
    fn another_place_behind_the_same_name_takes_nothing_once_it_is_checked() {
        let directory = tempfile::tempdir().expect("a directory");
        let local = LocalStore::open(directory.path()).expect("a store");
        let store = PinnedStore::new(local);
        store.put_if_absent("main/epoch/1", b"one").expect("a put");
        let witness = store.witness("main/epoch/1").expect("an answer");
        store.pin(Pin {
            witnesses: vec![witness.expect("it is there")],
            system: "7".to_owned(),
            record: None,
        });
        store.put_if_absent("main/a", b"a").expect("a put");
        store.confirm().expect("it is the place");

        store.delete("main/epoch/1").expect("emptied");
        let error = store.confirm().expect_err("it was emptied");
        assert!(matches!(error, Error::Gone { .. }), "{error}");
        let error = store.put_if_absent("main/b", b"b").expect_err("no put");
        assert!(error.is_gone(), "{error}");
        store.get("main/b").expect_err("nothing was written");
        let error = store.get("main/c").expect_err("absent proves nothing here");
        assert!(error.is_gone(), "{error}");
        store.store.put_if_absent("main/epoch/1", b"two").expect("");
        assert!(store.confirm().expect_err("another archive").is_gone());
        store.store.delete("main/epoch/1").expect("it goes");
        store.store.put_if_absent("main/epoch/1", b"one").expect("");
        store.put_if_absent("main/b", b"b").expect("it is back");
    }
    /// A store that damages its first `damaged` reads, each in a different way.
    #[derive(Debug)]
    struct Noisy {
        store: LocalStore,
        damaged: Mutex<u8>,
    }

    impl Noisy {
        fn read(&self, key: &str) -> Result<Option<Bytes>> {
            let mut stored = self.store.get(key)?.to_vec();
            let mut damaged = self.damaged.lock().expect("no panic");
            if *damaged > 0 {
                stored[0] ^= *damaged;
                *damaged -= 1;
            }
            Ok(Some(stored.into()))
        }
    }

    #[test]
    fn bytes_that_were_changed_on_their_way_are_not_another_archive() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = LocalStore::open(directory.path()).expect("a store");
        store.put_if_absent("main/epoch/1", b"one").expect("a put");
        let witness = store.witness("main/epoch/1").expect("an answer");
        let pin = Pin {
            witnesses: vec![witness.expect("it is there")],
            system: "7".to_owned(),
            record: None,
        };
        let noisy = |damaged| Noisy {
            store: LocalStore::open(directory.path()).expect("a store"),
            damaged: Mutex::new(damaged),
        };
        for (damaged, is_recognised) in [(0, true), (1, true), (2, false)] {
            let store = noisy(damaged);
            match pin.check("s3://b", |key| store.read(key)) {
                Ok(()) => assert!(is_recognised, "{damaged}"),
                Err(error) => assert!(!is_recognised && !error.is_gone(), "{damaged}: {error}"),
            }
        }
    }
}
