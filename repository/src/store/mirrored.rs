//! [`MirroredStore`]: the same objects in several places, each with its own queue.
//!
//! A put goes to every place at once. It returns when one place has the object, or all, depending
//! on `repositories_required`. A place that is unreachable ("away") is skipped and synchronized
//! later, object by object, from a place that has the objects ([`step`]). Invariant: each place
//! executes its jobs in the order in which they were given, so no place loses a tail before it has
//! the tail's segment. An object is proved absent only if every place answered and none has it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{ControlFlow, Range},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use bytes::Bytes;

use self::member::{Job, Member, Reply};
use super::{LockOutcome, LockSpan, ObjectMeta, ObjectStore, Pin, PutOutcome, Witness, plain};
use crate::{Error, Result, config::Required};

mod member;
mod step;
#[cfg(test)]
mod tests;

pub use member::MemberState;

/// The time that a program waits at its end for places that are still being written to.
const FLUSH_MAX: Duration = Duration::from_secs(600);

/// Several stores that act as one.
#[derive(Debug)]
pub struct MirroredStore {
    members: Vec<Arc<Member>>,
    required: Required,
}

impl MirroredStore {
    /// Creates the store. `stores` begins with the nearest; all keys begin with `cluster`.
    ///
    /// # Errors
    /// [`Error::Config`] when the system has no more threads.
    pub fn new(
        stores: Vec<Arc<dyn ObjectStore>>,
        cluster: &str,
        required: Required,
    ) -> Result<Self> {
        let members: Vec<Arc<Member>> = stores
            .into_iter()
            .map(|store| Arc::new(Member::new(store)))
            .collect();
        for (at, member) in members.iter().enumerate() {
            let others: Vec<Arc<dyn ObjectStore>> = (members.iter().enumerate())
                .filter(|(other, _)| *other != at)
                .map(|(_, other)| Arc::clone(&other.store))
                .collect();
            let (member, root) = (Arc::clone(member), format!("{cluster}/"));
            thread::Builder::new()
                .name(format!("mirror-{at}"))
                .spawn(move || member.work(&others, &root))
                .map_err(|error| Error::config(format!("start a thread for a mirror: {error}")))?;
        }
        Ok(Self { members, required })
    }

    /// Synchronizes every place with the others from now on: at once, every day, and whenever it
    /// was away.
    pub fn keep_in_step(&self) {
        for member in &self.members {
            member.keep_in_step();
        }
    }

    /// Asks each place that answers for an object that was stored. A place that lacks it holds an
    /// older state, for example an old copy: it is behind, and is compared with the others at once.
    pub fn check_each(&self, key: &str) {
        for member in &self.members {
            member.check(key);
        }
    }

    /// Returns the state of each place.
    #[must_use]
    pub fn states(&self) -> Vec<MemberState> {
        self.members.iter().map(|member| member.state()).collect()
    }

    /// Returns true if a place answers, and each one that does is known to lack objects.
    #[must_use]
    pub fn only_lags(&self) -> bool {
        let mut here = self
            .members
            .iter()
            .filter(|member| !member.is_away())
            .peekable();
        here.peek().is_some() && here.all(|member| member.lags())
    }

    /// Gives every place the same job. Waits for the first success or for all places, depending on
    /// `required`. With `whole`, the success of a place that is known to lack other objects counts
    /// only if no place fails.
    fn write<T: Copy>(
        &self,
        whole: bool,
        job: impl Fn(mpsc::Sender<Reply<T>>) -> Job,
    ) -> Result<T> {
        let (sender, replies) = mpsc::channel();
        for member in &self.members {
            member.give(job(sender.clone()));
        }
        drop(sender);
        let mut first_error = None;
        let mut done = None;
        // The channel ends when every place has answered.
        for reply in replies {
            match reply.outcome {
                Ok(outcome) if self.required == Required::Any && !(whole && reply.lags) => {
                    return Ok(outcome);
                }
                Ok(outcome) => done = Some(outcome),
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        match (first_error, done) {
            (None, Some(outcome)) => Ok(outcome),
            (Some(error), _) => Err(error),
            (None, None) => Err(Error::config("the threads of the repositories have ended")),
        }
    }

    /// Returns the places in the order in which they are queried: places that are away or do not
    /// answer come last.
    fn in_order(&self) -> impl Iterator<Item = &Arc<Member>> {
        let all = self.members.iter();
        let (last, first): (Vec<_>, Vec<_>) = all.partition(|member| member.is_last_choice());
        first.into_iter().chain(last)
    }

    /// Returns the first answer that is not "absent". Returns `None` only if every place proved the
    /// object absent.
    fn read<T>(&self, read: impl Fn(&dyn ObjectStore) -> Result<Option<T>>) -> Result<Option<T>> {
        let mut failed = None;
        for member in self.in_order() {
            match read(&*member.store) {
                Ok(Some(answer)) => {
                    member.answered();
                    return Ok(Some(answer));
                }
                Ok(None) => member.lacks(),
                Err(error) if error.is_not_found() => member.lacks(),
                Err(error) => {
                    tracing::warn!(repository = %member.store.url(), %error, "this repository failed; reading from the next one");
                    member.failed(&error);
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    fn all_away(&self) -> Error {
        let mut refusals = self
            .members
            .iter()
            .filter_map(|one| one.refusal("reach", ""));
        refusals.next().unwrap_or_else(|| self.absent(""))
    }

    fn absent(&self, key: &str) -> Error {
        Error::NotFound {
            key: key.to_owned(),
            url: self.url(),
        }
    }
}

/// Returns true if an object contains WAL: a place that lacks other WAL does not prove that the WAL
/// is stored without a gap.
fn is_wal(key: &str) -> bool {
    // The cluster and the system identifier come first.
    matches!(key.split('/').nth(2), Some("wal" | "tail"))
}

impl ObjectStore for MirroredStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let body = Bytes::copy_from_slice(body);
        self.write(is_wal(key), |reply| {
            Job::Put(key.to_owned(), body.clone(), reply)
        })
    }

    /// Each place proves its own copy, so a plain put is enough.
    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.put_if_absent(key, body)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.get_sound(key, &|_| true)
    }

    fn get_sound(&self, key: &str, sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        let unsound = std::cell::RefCell::new(None);
        let found = self.read(|store| {
            let bytes = store.get_sound(key, sound)?;
            if sound(&bytes) {
                return Ok(Some(bytes));
            }
            tracing::error!(key, repository = %store.url(), "a damaged object; run `wal-archiver verify --repair`");
            unsound.borrow_mut().get_or_insert(bytes);
            Ok(None)
        });
        match (found, unsound.into_inner()) {
            // Either an intact copy, or a damaged one because no place has an intact copy; the
            // caller detects the damage.
            (Ok(Some(bytes)), _) | (_, Some(bytes)) => Ok(bytes),
            (Ok(None), None) => Err(self.absent(key)),
            (Err(error), None) => Err(error),
        }
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read(|store| store.get_range(key, range.clone()).map(Some))?
            .ok_or_else(|| self.absent(key))
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.read(|store| store.head(key))
    }

    /// Lists the objects that at least one place has. If a place cannot be listed, only the objects
    /// that no other place has are left out.
    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut objects: BTreeMap<String, ObjectMeta> = BTreeMap::new();
        let mut failed = None;
        let mut answered = false;
        for member in &self.members {
            let listed = member.store.list(prefix, &mut |object| {
                objects.entry(object.key.clone()).or_insert(object);
                ControlFlow::Continue(())
            });
            match listed {
                Ok(()) => answered = true,
                Err(error) => {
                    tracing::warn!(
                        repository = %member.store.url(), %error,
                        "a repository cannot be listed: what it alone has is not seen"
                    );
                    member.failed(&error);
                    failed.get_or_insert(error);
                }
            }
        }
        if let (Some(error), false) = (failed, answered) {
            return Err(error);
        }
        for object in objects.into_values() {
            if visit(object).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Returns the names that at least one place has. Like [`ObjectStore::list`], skips a place
    /// that fails.
    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let mut names = BTreeSet::new();
        let (mut failed, mut answered) = (None, false);
        for member in &self.members {
            match member.store.folders(prefix) {
                Ok(found) => {
                    answered = true;
                    names.extend(found);
                }
                Err(error) => {
                    member.failed(&error);
                    failed.get_or_insert(error);
                }
            }
        }
        match failed {
            Some(error) if !answered => Err(error),
            _ => Ok(names.into_iter().collect()),
        }
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.write(false, |reply| Job::Delete(key.to_owned(), reply))
    }

    fn ready_to_write(&self) -> Result<()> {
        self.members
            .iter()
            .try_for_each(|member| member.store.ready_to_write())
    }

    fn url(&self) -> String {
        let urls: Vec<String> = self.members.iter().map(|one| one.store.url()).collect();
        urls.join(" and ")
    }

    fn exists(&self) -> Result<bool> {
        let mut failed = None;
        for member in &self.members {
            match member.store.exists() {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(false), Err)
    }

    /// Checks that every place that is not away is the right one. A place that fails the check
    /// counts as away from then on.
    fn confirm(&self) -> Result<()> {
        let mut outcome = None;
        for member in self.members.iter().filter(|member| !member.is_away()) {
            match (member.confirm(false), &outcome) {
                (Ok(()), None) => outcome = Some(Ok(())),
                (Err(error), None | Some(Ok(()))) => outcome = Some(Err(error)),
                (_, Some(_)) => {}
            }
        }
        outcome.unwrap_or_else(|| Err(self.all_away()))
    }

    fn confirm_free(&self) -> Result<()> {
        let here = |member: &&Arc<Member>| !member.is_away() && member.confirm(true).is_ok();
        if self.members.iter().filter(here).count() > 0 {
            return Ok(());
        }
        Err(self.all_away())
    }

    fn put_back_keys(&self) -> Result<Vec<String>> {
        let mut lost = Vec::new();
        for member in self.members.iter().filter(|member| !member.is_away()) {
            match member.store.put_back_keys() {
                // The next round asks it again.
                Err(error) if error.is_transient() => {}
                of_member => lost.extend(of_member?),
            }
        }
        Ok(lost)
    }

    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        Ok(self.get(key)? == body)
    }

    /// Each place is locked by itself.
    fn lock(&self, key: &str, _span: LockSpan) -> Result<LockOutcome> {
        plain::cannot_lock(self, key)
    }

    /// Each place is created by itself.
    fn create_place(&self) -> Result<()> {
        Ok(())
    }

    fn witness(&self, key: &str) -> Result<Option<Witness>> {
        plain::witness_of(key, self.get(key))
    }

    /// Each place learns it by itself.
    fn expect_new(&self) {}

    /// Each place is pinned by itself.
    fn pin(&self, _pin: Pin) {}
}

impl Drop for MirroredStore {
    /// Waits for the queues: with `Any`, a backup that is complete in one place may still be on its
    /// way to another when its command ends.
    fn drop(&mut self) {
        for member in &self.members {
            member.finish(FLUSH_MAX);
        }
    }
}
