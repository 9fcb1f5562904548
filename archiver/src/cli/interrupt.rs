//! SIGINT and SIGTERM while a command runs: one line says what is left and how to go on, and the
//! exit code is 1.

use std::thread;

use repository::ExitKind;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use super::output;
use crate::{
    core::shutdown::Shutdown,
    error::{Error, Result},
};

/// Ends the process at a signal. `left` says what the command leaves and how to go on. For commands
/// that may stop between any two operations, because each object is stored or removed as a whole.
pub(super) fn end_with(left: &'static str, json: bool) -> Result<()> {
    on_signal(move |name| {
        let text = format!("stopped by {name}: {left}");
        if json {
            output::json(&ExitKind::Failed.document(&text));
        }
        output::error_line(&text);
        end()
    })
}

/// Returns a request to stop that the first signal makes. A second signal ends the process at once.
pub(super) fn request() -> Result<Shutdown> {
    let (request, shutdown) = Shutdown::new();
    on_signal(move |name| {
        if request.is_requested() {
            output::error_line(&format!(
                "stopped by a second {name}: what this command stored may be left; `wal-archiver backup list` shows whether the \
                 backup was completed"
            ));
            end();
        }
        output::error_line(&format!(
            "stopping because of {name}; a second one ends at once"
        ));
        request.request();
    })?;
    Ok(shutdown)
}

/// Calls `act` with the name of each signal.
fn on_signal(act: impl Fn(&str) + Send + 'static) -> Result<()> {
    let failed = || Error::io("catch the signals of", "wal-archiver");
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed())?;
    let (mut interrupts, mut terminations) = {
        let _context = runtime.enter();
        (
            signal(SignalKind::interrupt()).map_err(failed())?,
            signal(SignalKind::terminate()).map_err(failed())?,
        )
    };
    let watch = move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    Some(()) = interrupts.recv() => act("SIGINT"),
                    Some(()) = terminations.recv() => act("SIGTERM"),
                    else => return,
                }
            }
        });
    };
    let named = thread::Builder::new().name("signals".to_owned());
    named.spawn(watch).map(drop).map_err(failed())
}

#[expect(
    clippy::exit,
    reason = "the command's threads may wait for a store that does not answer"
)]
fn end() -> ! {
    std::process::exit(i32::from(ExitKind::Failed as u8))
}
