//! `wal-archiver notify test`: sends a test to every configured receiver, and prints whether each
//! accepted it.

use dashboard::notifications::{self, Links};
use repository::config::Settings;

use super::{output, runtime};
use crate::error::{Error, Result};

pub(super) fn test(settings: &Settings) -> Result<()> {
    if settings.notify.is_empty() {
        return Err(Error::Usage {
            message: "nobody is to be told: add a table [notify.NAME] to the configuration"
                .to_owned(),
        });
    }
    let links = Links::new(settings);
    let runtime = runtime()?;
    let mut failed = Vec::new();
    for target in &settings.notify {
        let sent = runtime.block_on(notifications::test(target, &links));
        match sent {
            Ok(()) => output::line(&format!("notify {}: told", target.name)),
            Err(error) => {
                output::line(&format!("notify {}: {error}", target.name));
                failed.push(target.name.as_str());
            }
        }
    }
    if links.page.is_none() {
        output::line(
            "no link to the page is sent: set http_public_url to the address at which readers reach it",
        );
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::NotNotified {
        targets: failed.join(", "),
    })
}
