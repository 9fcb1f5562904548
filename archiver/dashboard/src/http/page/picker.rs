//! The section "Restore to": the user selects a time on the strip or types it, sees the nearest
//! commits, and copies the command. It does not restore anything.

use maud::{Markup, html};
use status::locate::Located;
use wal_format::PgTimestamp;

use super::{
    format::{bytes, code, duration, instant},
    strip::Axis,
    view::View,
};
use crate::http::api::restore_command;

pub(super) fn render(view: &View<'_>) -> Markup {
    let axis = Axis::of(view);
    let (from, to) = axis.map_or((0, 0), |axis| {
        let second = |time: PgTimestamp| time.to_jiff().map_or(0, jiff::Timestamp::as_second);
        (second(axis.from), second(axis.to))
    });
    let picked = view.picked.as_ref();
    let time = picked.and_then(|picked| picked.time.as_ref().ok());
    let value = time.map_or(to, |time| time.as_second());
    let field = picked.map_or("", |picked| picked.text.as_str());
    html! {
        section class="card picker" id="picker" aria-labelledby="picker-title" {
            h2 id="picker-title" { "Restore to …" }
            form method="get" action="#picker" id="pick" {
                label for="at" {
                    "Instant: a time in UTC or with an offset, a line of the server's log, or "
                    code { "10 min ago" }
                }
                input id="at" name="at" type="text" value=(field)
                    placeholder="2026-11-21 10:00:00+00" autocomplete="off" spellcheck="false"
                    required;
                button { "Show the plan" }
            }
            div class="slider" hidden {
                label for="when" {
                    "Or on the strip: arrow keys move it, Enter shows the plan"
                }
                input id="when" type="range" min=(from) max=(to) step="1" value=(value)
                    disabled[axis.is_none()];
            }
            div id="picked" role="status" aria-live="polite" { (answer(view)) }
        }
    }
}

/// Renders what the picked text leads to.
fn answer(view: &View<'_>) -> Markup {
    let Some(picked) = &view.picked else {
        return html! {
            p class="empty" {
                "Choose an instant. The plan and the command appear here; nothing is changed."
            }
        };
    };
    let time = match &picked.time {
        Ok(time) => *time,
        Err(error) => return html! { p class="error" { (error) } },
    };
    html! {
        p class="chosen" data-second=(time.as_second()) {
            (instant(PgTimestamp::from_jiff(time)))
            span class="local" {}
        }
        @match &picked.located {
            Err(error) => p class="error" { (error) },
            Ok(located) => (found(view, located)),
        }
    }
}

fn found(view: &View<'_>, located: &Located) -> Markup {
    let Some(flags) = &located.flags else {
        return refused(view, located);
    };
    html! {
        dl class="commits" {
            @for (term, commit) in [
                ("Last commit kept", &located.before),
                ("First commit dropped", &located.after),
            ] {
                div {
                    dt { (term) }
                    dd {
                        @if let Some(commit) = commit {
                            (instant(commit.time)) " · transaction " (commit.xid)
                            " · LSN " (commit.lsn) " · timeline " (commit.timeline)
                        } @else {
                            "none that the restore replays"
                        }
                    }
                }
            }
            @if let Some(plan) = plan(view, located) {
                div { dt { "Plan" } dd { (plan) } }
            }
        }
        div class="command" {
            pre tabindex="0" id="command" { (restore_command(view.cluster, flags)) }
            button type="button" id="copy" hidden { "Copy" }
        }
        p class="hint" {
            "Restores into a new directory. Add " code { "--dry-run" }
            " to see the whole plan first."
        }
    }
}

/// Describes the restore: the base backup, the WAL to replay, and the duration if it was measured.
fn plan(view: &View<'_>, located: &Located) -> Option<String> {
    let chosen = located.chosen.as_ref()?;
    let wal = chosen.wal_bytes;
    let rto = &view.report.rto;
    let time = rto.fetch_bytes_per_second.zip(rto.replay_bytes_per_second);
    let time = time.map(|(fetch, replay)| {
        let seconds = chosen.backup_bytes as f64 / fetch + wal as f64 / replay;
        format!(
            "; about {} to fetch and replay (estimate)",
            duration(seconds)
        )
    });
    Some(format!(
        "base backup {} ({}), then {} of WAL{}",
        chosen.backup,
        bytes(Some(chosen.backup_bytes)),
        bytes(Some(wal)),
        time.unwrap_or_default()
    ))
}

/// Renders the reason why no restore leads to the instant, and the nearest instants that can be
/// restored.
fn refused(view: &View<'_>, located: &Located) -> Markup {
    let refusal = located.refusal.as_deref();
    let refusal = refusal.unwrap_or("the reason is not known");
    html! {
        p class="error" { "This instant cannot be restored: " (code(refusal)) "." }
        @for near in &located.nearest {
            p class="hint" { "Nearest: " (instant(near.time)) }
            div class="command" {
                pre tabindex="0" { (restore_command(view.cluster, &near.flags)) }
            }
        }
    }
}
