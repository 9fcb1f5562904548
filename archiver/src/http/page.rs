//! `/`: the same facts for a person, rendered here so that it reads without JavaScript.

use std::fmt::Write as _;

use crate::report::{ClusterReport, State};

/// The page's style sheet, served beside it: the content security policy allows no inline style.
pub(super) const STYLE: &str = include_str!("style.css");

/// Renders the page. It asks the browser to load itself again every few seconds.
pub(super) fn render(reports: &[ClusterReport]) -> String {
    let mut body = String::new();
    for report in reports {
        // Writing to a String does not fail.
        let _ = cluster(&mut body, report);
    }
    if reports.is_empty() {
        body.push_str("<p>No cluster is configured.</p>");
    }
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"refresh\" content=\"2\"><title>Tidemark</title>\
         <link rel=\"stylesheet\" href=\"/style.css\"></head><body><main><h1>Tidemark</h1>{body}\
         <footer>Read only. <a href=\"/metrics\">Metrics</a> · <a href=\"/api/v1/clusters\">API</a>\
         </footer></main></body></html>"
    )
}

/// A state's word and shape: it is never told by colour alone.
fn badge(state: State) -> &'static str {
    match state {
        State::Ok => "● OK",
        State::Degraded => "▲ DEGRADED",
        State::AtRisk => "◆ AT RISK",
        State::Broken => "✖ BROKEN",
        State::Unknown => "? UNKNOWN",
    }
}

fn cluster(out: &mut String, report: &ClusterReport) -> std::fmt::Result {
    let unknown = || "unknown".to_owned();
    let seconds = |value: Option<f64>| value.map_or_else(unknown, |value| format!("{value:.1} s"));
    let bytes = |value: Option<u64>| value.map_or_else(unknown, human_bytes);
    let text = |value: Option<String>| value.map_or_else(unknown, |value| escape(&value));
    let (local, remote) = (&report.durable.local, &report.durable.remote);
    write!(
        out,
        "<section aria-labelledby=\"c-{name}\"><h2 id=\"c-{name}\">{name} <span class=\"badge {state}\">{badge}</span></h2>\
         <p class=\"sentence\">{sentence}</p><dl class=\"tiles\">",
        name = report.cluster,
        state = report.state.name(),
        badge = badge(report.state),
        sentence = escape(&sentence(report)),
    )?;
    let window = match (report.window.earliest, report.window.latest_commit) {
        (Some(earliest), Some(latest)) => format!("{earliest} → {latest}"),
        _ => "none yet: run <code>wal-archiver backup</code>".to_owned(),
    };
    let backup = report.last_backup.as_ref().map_or_else(
        || "none yet: run <code>wal-archiver backup</code>".to_owned(),
        |backup| format!("{} · {}", backup.id, human_bytes(backup.stored_bytes)),
    );
    let slot = report.slot.as_ref().map_or_else(unknown, |slot| {
        let status = slot.wal_status.as_deref().unwrap_or("unknown");
        let active = if slot.active { "active" } else { "not active" };
        format!(
            "{} ({active}, {status}), keeps {}",
            slot.name,
            bytes(slot.retained_bytes)
        )
    });
    for (term, value) in [
        ("RPO now", seconds(remote.rpo_seconds)),
        ("RPO target", format!("{:.1} s", report.rpo_target_seconds)),
        (
            "Local",
            format!(
                "{} behind {}",
                seconds(local.rpo_seconds),
                bytes(local.lag_bytes)
            ),
        ),
        (
            "Repository",
            format!(
                "{} behind {}",
                seconds(remote.rpo_seconds),
                bytes(remote.lag_bytes)
            ),
        ),
        ("Restorable", window),
        ("Last base backup", backup),
        ("Primary", text(report.source.server_version.clone())),
        (
            "Timeline",
            text(report.source.timeline.map(|timeline| timeline.to_string())),
        ),
        ("Slot", escape(&slot)),
        (
            "Flush LSN of the primary",
            text(report.source.flush_lsn.map(|lsn| lsn.to_string())),
        ),
        ("Flushed here", text(local.lsn.map(|lsn| lsn.to_string()))),
        (
            "In the repository",
            text(remote.lsn.map(|lsn| lsn.to_string())),
        ),
        ("Repository URL", escape(&report.repository)),
        ("As of", report.as_of.to_string()),
    ] {
        write!(out, "<div><dt>{term}</dt><dd>{value}</dd></div>")?;
    }
    out.push_str("</dl></section>");
    Ok(())
}

/// The page's first sentence: what is lost if the primary dies now.
pub(crate) fn sentence(report: &ClusterReport) -> String {
    let loss = match report.durable.remote.rpo_seconds {
        None => "What losing the primary now would lose is not known".to_owned(),
        Some(rpo) if report.state == State::Unknown => {
            format!("The primary was last proved safe {rpo:.1} s ago")
        }
        Some(0.0) => "Losing the primary now loses nothing that it had flushed".to_owned(),
        Some(rpo) => format!("Losing the primary now loses up to {rpo:.1} s"),
    };
    format!("{loss}. {}.", capitalised(&report.reason))
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}

fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "it is printed with one digit")]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
