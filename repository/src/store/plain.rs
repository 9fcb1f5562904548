//! The methods of a store without abilities of its own, and macros with all of them.

use std::ops::ControlFlow;

pub use bytes::Bytes;

use super::{LockOutcome, ObjectStore, PutOutcome, Witness};
use crate::{Error, Result};

/// Stores an object and reads it back.
///
/// # Errors
/// As [`ObjectStore::put_proved`].
pub fn put_and_read_back(store: &dyn ObjectStore, key: &str, body: &[u8]) -> Result<PutOutcome> {
    let outcome = store.put_if_absent(key, body)?;
    if outcome == PutOutcome::Created && store.get(key)? != body {
        return Err(Error::Damaged {
            key: key.to_owned(),
            url: store.url(),
            problem: "what was put there is not what is there".to_owned(),
        });
    }
    Ok(outcome)
}

/// Returns the folders below a prefix from a listing of every object below it.
///
/// # Errors
/// As [`ObjectStore::list`].
pub fn folders_of_list(store: &dyn ObjectStore, prefix: &str) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    store.list(prefix, &mut |object| {
        let below = object.key.strip_prefix(prefix);
        if let Some((name, _)) = below.and_then(|below| below.split_once('/'))
            && names.last().is_none_or(|last| last != name)
        {
            names.push(name.to_owned());
        }
        ControlFlow::Continue(())
    })?;
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// Returns the witness for an object that is read.
///
/// # Errors
/// As [`ObjectStore::get`].
pub fn witness_of(key: &str, stored: Result<Bytes>) -> Result<Option<Witness>> {
    match stored {
        Ok(stored) => Ok(Some(Witness::new(key, &stored))),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Refuses to lock an object.
///
/// # Errors
/// [`Error::Config`], always.
pub fn cannot_lock(store: &dyn ObjectStore, key: &str) -> Result<LockOutcome> {
    Err(Error::config(format!(
        "{key} in {} cannot be locked: only a bucket with Object Lock can",
        store.url()
    )))
}

/// The methods of a store that has no cheaper way to prove an object, no locks, and no place that
/// could be exchanged.
#[doc(hidden)]
#[macro_export]
macro_rules! plain_store_methods {
    () => {
        fn put_proved(&self, key: &str, body: &[u8]) -> $crate::Result<$crate::store::PutOutcome> {
            $crate::store::plain::put_and_read_back(self, key, body)
        }

        fn holds(&self, key: &str, body: &[u8]) -> $crate::Result<bool> {
            Ok($crate::store::ObjectStore::get(self, key)? == body)
        }

        fn get_sound(
            &self,
            key: &str,
            _sound: &dyn Fn(&$crate::store::plain::Bytes) -> bool,
        ) -> $crate::Result<$crate::store::plain::Bytes> {
            $crate::store::ObjectStore::get(self, key)
        }

        fn folders(&self, prefix: &str) -> $crate::Result<Vec<String>> {
            $crate::store::plain::folders_of_list(self, prefix)
        }

        fn lock(
            &self,
            key: &str,
            _span: $crate::store::LockSpan,
        ) -> $crate::Result<$crate::store::LockOutcome> {
            $crate::store::plain::cannot_lock(self, key)
        }

        $crate::unpinned_store_methods!();
    };
}

/// The methods of a store whose place cannot be exchanged or is checked by a store around it.
#[doc(hidden)]
#[macro_export]
macro_rules! unpinned_store_methods {
    () => {
        fn exists(&self) -> $crate::Result<bool> {
            Ok(true)
        }

        fn create_place(&self) -> $crate::Result<()> {
            Ok(())
        }

        fn witness(&self, key: &str) -> $crate::Result<Option<$crate::store::Witness>> {
            $crate::store::plain::witness_of(key, $crate::store::ObjectStore::get(self, key))
        }

        fn expect_new(&self) {}

        fn pin(&self, _pin: $crate::store::Pin) {}

        fn confirm(&self) -> $crate::Result<()> {
            Ok(())
        }

        fn confirm_free(&self) -> $crate::Result<()> {
            Ok(())
        }

        fn put_back_keys(&self) -> $crate::Result<Vec<String>> {
            Ok(Vec::new())
        }
    };
}
