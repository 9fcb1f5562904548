//! [`MirroredStore`]: the same objects in several places, each with a queue of its own.
//!
//! A put goes to every place at once and returns when one has it, or all, as
//! `repositories_required` says; a place that is away is passed over and brought into step later,
//! object by object, from one that has them ([`step`]). Invariant: each place gets what it gets in
//! the order in which it was given, so no place loses a tail before it has its segment; and what
//! one place cannot show proves nothing absent.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{ControlFlow, Range},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use bytes::Bytes;

use self::member::{Job, Member, Reply};
use super::{ObjectMeta, ObjectStore, PutOutcome};
use crate::{Error, Result, config::Required};

mod member;
mod step;
#[cfg(test)]
mod tests;

pub use member::MemberState;

/// The time for which the end of a program waits for places that are still being written to.
const FLUSH_MAX: Duration = Duration::from_secs(600);

/// Several stores as one.
#[derive(Debug)]
pub struct MirroredStore {
    members: Vec<Arc<Member>>,
    required: Required,
}

impl MirroredStore {
    /// Takes the stores, the nearest first, with what every key of ours begins with.
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

    /// From now on every place is brought into step with the others: at once, and whenever it was away.
    pub fn keep_in_step(&self) {
        for member in &self.members {
            member.keep_in_step();
        }
    }

    /// How each place is.
    #[must_use]
    pub fn states(&self) -> Vec<MemberState> {
        self.members.iter().map(|member| member.state()).collect()
    }

    /// Gives every place the same job; waits as long as the setting wants.
    fn write<T: Copy>(&self, job: impl Fn(mpsc::Sender<Reply<T>>) -> Job) -> Result<T> {
        let (sender, replies) = mpsc::channel();
        for member in &self.members {
            member.give(job(sender.clone()));
        }
        drop(sender);
        let mut first_error = None;
        let mut done = None;
        // The channel ends when every place has answered.
        for reply in replies {
            match reply {
                Ok(outcome) if self.required == Required::Any => return Ok(outcome),
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

    /// The places in the order in which they are asked: those that are away last.
    fn in_order(&self) -> impl Iterator<Item = &Arc<Member>> {
        let here = self.members.iter().filter(|member| !member.is_away());
        here.chain(self.members.iter().filter(|member| member.is_away()))
    }

    /// The first answer that is one. Absent is only what every place says is absent.
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
                    tracing::warn!(repository = %member.store.url(), %error, "asking the next repository");
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

impl ObjectStore for MirroredStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let body = Bytes::copy_from_slice(body);
        self.write(|reply| Job::Put(key.to_owned(), body.clone(), reply))
    }

    /// Each place proves what it got by itself.
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
            // Sound, or damaged wherever it is: the caller says how.
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

    /// What any place has. A place that is away hides only what nobody else has.
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
                        "a repository can not be listed: what it alone has is not seen"
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

    /// The names that any place has, as [`ObjectStore::list`] has its objects.
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
        self.write(|reply| Job::Delete(key.to_owned(), reply))
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

    /// Every place that is not away is the right one. One that is not is passed over from now on.
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
}

impl Drop for MirroredStore {
    /// A backup is not done in one place when its command ends because it is in another.
    fn drop(&mut self) {
        for member in &self.members {
            member.finish(FLUSH_MAX);
        }
    }
}
