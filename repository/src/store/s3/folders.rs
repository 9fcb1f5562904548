//! The names of one level of a bucket, by a listing with a delimiter: a request for a thousand
//! names, not for a thousand objects.

use std::collections::BTreeSet;

use super::{
    RequestKind, S3Store,
    errors::{Action, Failure},
    is_sound_key,
};
use crate::Result;

impl S3Store {
    /// As [`ObjectStore::folders`](super::ObjectStore::folders).
    pub(super) fn common_prefixes(&self, prefix: &str) -> Result<Vec<String>> {
        let full_prefix = self.place(prefix);
        let mut names = BTreeSet::new();
        let mut token = None;
        loop {
            let list = self
                .client()
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(&full_prefix)
                .delimiter("/")
                .set_continuation_token(token);
            let page = self
                .request(RequestKind::List, list.send())
                .map_err(|failure| self.failed(Action::List, prefix, failure))?;
            for found in page.common_prefixes() {
                let name = found
                    .prefix()
                    .and_then(|name| name.strip_prefix(&full_prefix));
                let name = name.and_then(|name| name.strip_suffix('/'));
                names.extend(name.filter(|name| is_sound_key(name)).map(str::to_owned));
            }
            token = page.next_continuation_token().map(str::to_owned);
            if page.is_truncated() != Some(true) {
                return Ok(names.into_iter().collect());
            }
            if token.is_none() {
                let failure = Failure::refused("the store's listing breaks off");
                return Err(self.failed(Action::List, prefix, failure));
            }
        }
    }
}
