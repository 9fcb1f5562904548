//! The section "Restore to": the user selects a time on the strip or types it, sees the nearest
//! commits, and copies the command. It does not restore anything.

use std::fmt::Write as _;

use status::locate::Located;
use wal_format::PgTimestamp;

use super::{
    format::{bytes, code, duration, escape, instant},
    strip::Axis,
    view::View,
};
use crate::http::api::restore_command;

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let axis = Axis::of(view);
    let (from, to) = axis.map_or((0, 0), |axis| {
        let second = |time: PgTimestamp| time.to_jiff().map_or(0, jiff::Timestamp::as_second);
        (second(axis.from), second(axis.to))
    });
    let picked = view.picked.as_ref();
    let time = picked.and_then(|picked| picked.time.as_ref().ok());
    let value = time.map_or(to, |time| time.as_second());
    let field = picked.map_or("", |picked| picked.text.as_str());
    let disabled = if axis.is_none() { " disabled" } else { "" };
    let _ = write!(
        out,
        "<section class=\"card picker\" id=\"picker\" aria-labelledby=\"picker-title\"><h2 id=\"picker-title\">Restore to …</h2>\
         <form method=\"get\" action=\"#picker\" id=\"pick\"><label for=\"at\">Instant: a time in UTC or with an offset, a line of the \
         server's log, or <code>10 min ago</code></label>\
         <input id=\"at\" name=\"at\" type=\"text\" value=\"{}\" placeholder=\"2026-11-21 10:00:00+00\" autocomplete=\"off\" spellcheck=\"false\" required>\
         <button>Show the plan</button></form>\
         <div class=\"slider\" hidden><label for=\"when\">Or on the strip: arrow keys move it, Enter shows the plan</label>\
         <input id=\"when\" type=\"range\" min=\"{from}\" max=\"{to}\" step=\"1\" value=\"{value}\"{disabled}></div>\
         <div id=\"picked\" role=\"status\" aria-live=\"polite\">",
        escape(field)
    );
    answer(out, view);
    out.push_str("</div></section>");
}

/// Renders what the picked text leads to.
pub(super) fn answer(out: &mut String, view: &View<'_>) {
    let Some(picked) = &view.picked else {
        out.push_str(
            "<p class=\"empty\">Choose an instant. The plan and the command appear here; nothing is changed.</p>",
        );
        return;
    };
    let time = match &picked.time {
        Ok(time) => *time,
        Err(error) => {
            let _ = write!(out, "<p class=\"error\">{}</p>", escape(error));
            return;
        }
    };
    let _ = write!(
        out,
        "<p class=\"chosen\" data-second=\"{}\">{}<span class=\"local\"></span></p>",
        time.as_second(),
        instant(PgTimestamp::from_jiff(time))
    );
    match &picked.located {
        Err(error) => {
            let _ = write!(out, "<p class=\"error\">{}</p>", escape(error));
        }
        Ok(located) => found(out, view, located),
    }
}

fn found(out: &mut String, view: &View<'_>, located: &Located) {
    let Some(flags) = &located.flags else {
        return refused(out, view, located);
    };
    out.push_str("<dl class=\"commits\">");
    for (term, commit) in [
        ("Last commit kept", &located.before),
        ("First commit dropped", &located.after),
    ] {
        let text = commit.as_ref().map_or_else(
            || "none that the restore replays".to_owned(),
            |commit| {
                let time = instant(commit.time);
                format!(
                    "{time} · transaction {} · LSN {} · timeline {}",
                    commit.xid, commit.lsn, commit.timeline
                )
            },
        );
        let _ = write!(out, "<div><dt>{term}</dt><dd>{text}</dd></div>");
    }
    if let Some(plan) = plan(view, located) {
        let _ = write!(out, "<div><dt>Plan</dt><dd>{plan}</dd></div>");
    }
    out.push_str("</dl>");
    let _ = write!(
        out,
        "<div class=\"command\"><pre tabindex=\"0\" id=\"command\">{}</pre><button type=\"button\" id=\"copy\" hidden>Copy</button></div>\
         <p class=\"hint\">Restores into a new directory. Add <code>--dry-run</code> to see the whole plan first.</p>",
        escape(&restore_command(view.cluster, flags))
    );
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

/// Writes the reason why no restore leads to the instant, and the nearest instants that can be
/// restored.
fn refused(out: &mut String, view: &View<'_>, located: &Located) {
    let refusal = located
        .refusal
        .as_deref()
        .unwrap_or("the reason is not known");
    let _ = write!(
        out,
        "<p class=\"error\">This instant cannot be restored: {}.</p>",
        code(refusal)
    );
    for near in &located.nearest {
        let _ = write!(
            out,
            "<p class=\"hint\">Nearest: {}</p><div class=\"command\"><pre tabindex=\"0\">{}</pre></div>",
            instant(near.time),
            escape(&restore_command(view.cluster, &near.flags))
        );
    }
}
