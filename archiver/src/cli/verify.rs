//! `wal-archiver verify`: proves from the repository alone that every object is intact and that no
//! WAL is missing.

use repository::config::Settings;

use super::output;
use crate::{
    error::Result,
    verify::clusters::{VerifyOptions, verify_all},
};

pub(super) fn verify(settings: &Settings, options: &VerifyOptions) -> Result<()> {
    let mut documents = Vec::new();
    let outcome = verify_all(settings, options, &output::line, &mut documents);
    if options.json {
        match &outcome {
            Err(error) if documents.is_empty() => {
                output::json(&error.exit_kind().document(&error.to_string()));
            }
            _ => output::json(&documents),
        }
    }
    outcome
}
