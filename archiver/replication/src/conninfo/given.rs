//! [`Given`]: typed values of a connection string.

use std::time::Duration;

use super::{
    super::Result,
    parse::{Values, problem},
};

/// Typed access to the values. An empty value means the default, as in libpq.
pub(super) struct Given<'a>(pub(super) &'a Values);

impl<'a> Given<'a> {
    pub(super) fn text(&self, keyword: &str) -> Option<&'a str> {
        let value = self.0.get(keyword)?;
        (!value.is_empty()).then_some(value)
    }

    /// Parses a number. Negative numbers mean 0, as in libpq.
    pub(super) fn number(&self, keyword: &str) -> Result<Option<u32>> {
        let Some(text) = self.0.get(keyword) else {
            return Ok(None);
        };
        let number: i32 = text
            .trim()
            .parse()
            .map_err(|_| problem(format!("{keyword} is no number")))?;
        Ok(Some(u32::try_from(number).unwrap_or(0)))
    }

    pub(super) fn seconds(&self, keyword: &str) -> Result<Option<Duration>> {
        let seconds = self.number(keyword)?.filter(|seconds| *seconds > 0);
        Ok(seconds.map(|seconds| Duration::from_secs(seconds.into())))
    }

    pub(super) fn choice<T: Copy>(
        &self,
        keyword: &str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T> {
        // An empty value is not one of the choices, as in libpq.
        let Some(text) = self.0.get(keyword) else {
            return Ok(default);
        };
        choices
            .iter()
            .find_map(|(name, choice)| (*name == text).then_some(*choice))
            .ok_or_else(|| {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                problem(format!(
                    "{keyword} has a value that is none of {}",
                    names.join(", ")
                ))
            })
    }
}
