//! The section "Restore to": the user selects a time on the strip or types it, sees the nearest
//! commits, and copies the command. It does not restore anything.

use std::fmt::Write as _;

use super::{
    View,
    format::{code, escape, instant},
    strip::Axis,
};
use crate::{http::api::restore_command, pipeline::nearest::Located};

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let axis = Axis::of(view);
    let (from, to) = axis.map_or((0, 0), |axis| {
        let second =
            |time: wal_format::PgTimestamp| time.to_jiff().map_or(0, jiff::Timestamp::as_second);
        (second(axis.from), second(axis.to))
    });
    let picked = view.picked.as_ref().map(|(time, _)| *time);
    let value = picked.map_or(to, jiff::Timestamp::as_second);
    let field = jiff::Timestamp::from_second(value)
        .map(|time| time.strftime("%Y-%m-%dT%H:%M:%S").to_string())
        .unwrap_or_default();
    let disabled = if axis.is_none() { " disabled" } else { "" };
    let _ = write!(
        out,
        "<section class=\"card picker\" id=\"picker\" aria-labelledby=\"picker-title\"><h2 id=\"picker-title\">Restore to …</h2>\
         <div class=\"slider\" hidden><label for=\"when\">Instant on the strip: arrow keys move it, Page Up and Page Down \
         further, Enter looks</label>\
         <input id=\"when\" type=\"range\" min=\"{from}\" max=\"{to}\" step=\"1\" value=\"{value}\"{disabled}></div>\
         <form method=\"get\" action=\"#picker\" id=\"pick\"><label for=\"at\">Instant, UTC</label>\
         <input id=\"at\" name=\"at\" type=\"datetime-local\" step=\"1\" value=\"{field}\" required>\
         <button>Find commits</button></form>\
         <div id=\"picked\" role=\"status\" aria-live=\"polite\">"
    );
    match &view.picked {
        None => out.push_str(
            "<p class=\"empty\">Choose an instant. The nearest commits and the command appear here; nothing is changed.</p>",
        ),
        Some((_, Err(error))) => {
            let _ = write!(out, "<p class=\"error\">{}</p>", escape(error));
        }
        Some((_, Ok(located))) => found(out, view, located),
    }
    out.push_str("</div></section>");
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
    out.push_str("</dl>");
    let _ = write!(
        out,
        "<div class=\"command\"><pre tabindex=\"0\" id=\"command\">{}</pre><button type=\"button\" id=\"copy\" hidden>Copy</button></div>\
         <p class=\"hint\">Restores into a new directory. Add <code>--dry-run</code> to see the plan first.</p>",
        escape(&restore_command(view.cluster, flags))
    );
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
