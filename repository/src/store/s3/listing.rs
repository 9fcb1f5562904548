//! Listings of a bucket, page by page.
//!
//! Invariant: a listing that is not proved to be complete is an error, because what a listing does
//! not name counts as absent. A listing always ends: a continuation token that comes a second time
//! is an error.

use std::{
    collections::{BTreeSet, HashSet},
    hash::Hash,
};

use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;

use super::{
    ObjectMeta, RequestKind, S3Store,
    errors::{Action, Failure},
    is_sound_key,
};
use crate::{Error, Result};

/// The markers of all pages of a listing so far: a marker that comes again ends the listing.
#[derive(Debug)]
pub(super) struct Pages<M> {
    seen: HashSet<M>,
}

impl<M: Clone + Eq + Hash> Pages<M> {
    pub(super) fn new() -> Self {
        Self {
            seen: HashSet::new(),
        }
    }

    /// Returns the marker of the next page, or `None` after the last page.
    pub(super) fn next(
        &mut self,
        is_truncated: Option<bool>,
        marker: Option<M>,
    ) -> std::result::Result<Option<M>, Failure> {
        match (is_truncated, marker) {
            (Some(false), _) => Ok(None),
            // S3 always states this. An answer that does not state it is another document or is
            // truncated.
            (None, _) => Err(Failure::refused(
                "the store's listing does not say whether it is complete",
            )),
            (Some(true), None) => Err(Failure::refused(
                "the store's listing stops before its end and does not say where it continues",
            )),
            (Some(true), Some(marker)) if self.seen.insert(marker.clone()) => Ok(Some(marker)),
            (Some(true), Some(_)) => Err(Failure::refused(
                "the store's listing repeats itself: it gives the same continuation token twice",
            )),
        }
    }
}

/// Refuses a page that names fewer entries than it announces, or a part of an entry.
fn complete(page: &ListObjectsV2Output, prefix: &str) -> std::result::Result<(), Failure> {
    let named = page.contents().len() + page.common_prefixes().len();
    let announced = page
        .key_count()
        .and_then(|count| usize::try_from(count).ok());
    if announced.is_some_and(|announced| announced > named) {
        return Err(Failure::refused(
            "the store's listing names fewer objects than it announces",
        ));
    }
    let mut objects = page.contents().iter();
    let mut folders = page.common_prefixes().iter();
    let is_cut = objects.any(|object| object.key().is_none() || object.size().is_none())
        || folders.any(|folder| {
            let name = folder.prefix().and_then(|name| name.strip_prefix(prefix));
            !name.is_some_and(|name| name.len() > 1 && name.ends_with('/'))
        });
    if is_cut {
        return Err(Failure::refused(
            "the store's listing ends inside of an entry",
        ));
    }
    Ok(())
}

impl S3Store {
    /// Gives every page of a listing to `visit`.
    fn pages(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        mut visit: impl FnMut(&ListObjectsV2Output),
    ) -> Result<()> {
        let full_prefix = self.place(prefix);
        let failed = |failure| -> Error { self.failed(Action::List, prefix, failure) };
        let mut pages = Pages::new();
        let mut token = None;
        loop {
            let list = self
                .client()
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(&full_prefix)
                .set_delimiter(delimiter.map(str::to_owned))
                .set_continuation_token(token);
            let page = self
                .request(RequestKind::List, list.send())
                .map_err(failed)?;
            complete(&page, &full_prefix).map_err(failed)?;
            visit(&page);
            let marker = page.next_continuation_token().map(str::to_owned);
            token = pages.next(page.is_truncated(), marker).map_err(failed)?;
            if token.is_none() {
                return Ok(());
            }
        }
    }

    /// Returns every object whose key begins with `prefix`, in the order of the keys: not every
    /// store lists in this order (SeaweedFS lists folder by folder).
    pub(super) fn objects(&self, prefix: &str) -> Result<Vec<ObjectMeta>> {
        let root = self.place("");
        let mut objects = Vec::new();
        self.pages(prefix, None, |page| {
            for object in page.contents() {
                let key = object.key().and_then(|key| key.strip_prefix(&root));
                if let (Some(key), Some(size)) = (key, object.size())
                    && is_sound_key(key)
                {
                    objects.push(ObjectMeta {
                        key: key.to_owned(),
                        size: u64::try_from(size).unwrap_or(0),
                    });
                }
            }
        })?;
        objects.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        Ok(objects)
    }

    /// Returns the names of one level, by a listing with a delimiter: a request for a thousand
    /// names, not for a thousand objects. As [`ObjectStore::folders`](super::ObjectStore::folders).
    pub(super) fn common_prefixes(&self, prefix: &str) -> Result<Vec<String>> {
        let full_prefix = self.place(prefix);
        let mut names = BTreeSet::new();
        self.pages(prefix, Some("/"), |page| {
            for found in page.common_prefixes() {
                let name = found
                    .prefix()
                    .and_then(|name| name.strip_prefix(&full_prefix));
                let name = name.and_then(|name| name.strip_suffix('/'));
                names.extend(name.filter(|name| is_sound_key(name)).map(str::to_owned));
            }
        })?;
        Ok(names.into_iter().collect())
    }
}
