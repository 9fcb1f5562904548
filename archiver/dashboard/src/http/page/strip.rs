//! The window strip: one row per timeline, with archived WAL, gaps and their causes, backups,
//! drills, switches, restore points and removals. The shapes differ, so that it is readable without
//! colours. A table has the same content as text.

use std::{collections::BTreeMap, fmt::Write as _};

use status::details::MarkKind;
use wal_format::{OutcomeKind, PgTimestamp, TimelineId};

use super::{
    format::{duration, escape, instant, span, text},
    view::View,
};

/// The heights of a row and of the axis, in pixels.
const ROW: u32 = 46;
const AXIS: u32 = 22;
/// The maximum number of rows, for the newest timelines.
const ROWS_MAX: usize = 8;
/// The shortest part of the strip that is shown.
const ZOOM_MICROS_MIN: i64 = 10_000_000;
/// The maximum number of lines in the table.
const WORDS_MAX: usize = 60;

/// The time range of the strip.
#[derive(Clone, Copy)]
pub(super) struct Axis {
    pub(super) from: PgTimestamp,
    pub(super) to: PgTimestamp,
}

impl Axis {
    /// Returns the part that the operator chose, or all of it.
    pub(super) fn of(view: &View<'_>) -> Option<Self> {
        let all = Self::all(view)?;
        let Some((from, to)) = view.zoom else {
            return Some(all);
        };
        let (from, to) = (from.max(all.from), to.min(all.to));
        let is_wide = to.micros_since(from) >= ZOOM_MICROS_MIN;
        Some(if is_wide { Self { from, to } } else { all })
    }

    /// Returns the range from the first known commit or backup to now.
    fn all(view: &View<'_>) -> Option<Self> {
        let ranges = view.details.ranges.iter().filter_map(|range| range.from);
        let backups = view.details.backups.iter().map(|backup| backup.started);
        let from = ranges.chain(backups).min()?;
        let to = view.report.as_of;
        // At least a minute, so that the strip of a new archive has a width.
        (from < to).then(|| Self {
            from: from.min(PgTimestamp(to.0 - 60_000_000)),
            to,
        })
    }

    /// Returns the position of a time, in percent of the width.
    fn place(self, time: PgTimestamp) -> f64 {
        (span(time, self.from) / span(self.to, self.from) * 100.0).clamp(0.0, 100.0)
    }

    fn contains(self, time: PgTimestamp) -> bool {
        (self.from..=self.to).contains(&time)
    }

    /// Returns true if a range of times overlaps this one.
    fn overlaps(self, from: PgTimestamp, to: PgTimestamp) -> bool {
        from <= self.to && to >= self.from
    }
}

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let _ = draw(out, view);
}

fn draw(out: &mut String, view: &View<'_>) -> std::fmt::Result {
    out.push_str(
        "<section class=\"card\" aria-labelledby=\"strip-title\"><div class=\"card-head\"><h2 id=\"strip-title\">Restorable window</h2>",
    );
    zoom(out, view)?;
    out.push_str("</div>");
    let Some(axis) = Axis::of(view) else {
        out.push_str(
            "<p class=\"empty\" id=\"strip\" data-live>Nothing is archived yet, or the catalog was not looked at since the \
             start. The first commit appears here within seconds.</p></section>",
        );
        return Ok(());
    };
    let rows = rows(view);
    let height = (0..).zip(&rows).last().map_or(0, |(last, _)| last + 1) * ROW + AXIS;
    write!(
        out,
        "<div class=\"strip-frame\"><div id=\"strip\" data-live data-from=\"{}\" data-to=\"{}\">\
         <svg class=\"strip\" width=\"100%\" height=\"{height}\" role=\"img\" aria-label=\"{}\">{DEFINITIONS}",
        axis.from,
        axis.to,
        escape(&summary(view, axis)),
    )?;
    for (number, timeline) in (0..).zip(&rows) {
        row(out, view, axis, *timeline, number * ROW)?;
    }
    retention_edge(out, view, axis, height)?;
    ticks(out, axis, height)?;
    out.push_str(
        "</svg></div><div id=\"cursor\" aria-hidden=\"true\" hidden></div></div>\
         <p id=\"strip-readout\" class=\"readout\" role=\"status\" hidden></p>",
    );
    legend(out);
    words(out, view)?;
    out.push_str("</section>");
    Ok(())
}

/// Renders the links that choose the part of the strip.
fn zoom(out: &mut String, view: &View<'_>) -> std::fmt::Result {
    let (Some(all), Some(now)) = (Axis::all(view), Axis::of(view)) else {
        return Ok(());
    };
    let width = now.to.micros_since(now.from);
    let centre = now.from.0 + width / 2;
    let is_whole = (now.from, now.to) == (all.from, all.to);
    out.push_str(
        "<nav class=\"ranges zoom\" aria-label=\"Part of the strip\" id=\"zoom\" data-live>",
    );
    let steps = [
        (
            "+",
            "Zoom in",
            centre - width / 4,
            centre + width / 4,
            width / 2 >= ZOOM_MICROS_MIN,
        ),
        ("−", "Zoom out", centre - width, centre + width, !is_whole),
        (
            "←",
            "Earlier",
            now.from.0 - width / 2,
            now.to.0 - width / 2,
            now.from > all.from,
        ),
        (
            "→",
            "Later",
            now.from.0 + width / 2,
            now.to.0 + width / 2,
            now.to < all.to,
        ),
    ];
    for (text, name, from, to, _) in steps.into_iter().filter(|step| step.4) {
        // A step beyond an end stops there.
        let beyond = (all.from.0 - from).max(0) - (to - all.to.0).max(0);
        let is_move = name == "Earlier" || name == "Later";
        let (from, to) = match is_move {
            true => (from + beyond, to + beyond),
            false => (from, to),
        };
        let (from, to) = (
            PgTimestamp(from.max(all.from.0)),
            PgTimestamp(to.min(all.to.0)),
        );
        write!(
            out,
            "<a href=\"?from={from}&amp;to={to}#strip-title\" aria-label=\"{name}\">{text}</a>"
        )?;
    }
    if !is_whole {
        out.push_str("<a href=\"?#strip-title\">All</a>");
    }
    out.push_str("</nav>");
    Ok(())
}

/// Renders the time before which retention may remove what is stored.
fn retention_edge(out: &mut String, view: &View<'_>, axis: Axis, height: u32) -> std::fmt::Result {
    let policy = view.cluster.settings().repository.retention.as_ref();
    let Some(window) = policy
        .map(|policy| policy.window)
        .filter(|window| !window.is_zero())
    else {
        return Ok(());
    };
    let window = i64::try_from(window.as_micros()).unwrap_or(i64::MAX);
    let edge = PgTimestamp(view.report.as_of.0.saturating_sub(window));
    if !axis.contains(edge) {
        return Ok(());
    }
    let place = axis.place(edge);
    let (anchor, dx) = if place > 70.0 {
        ("end", -5)
    } else {
        ("start", 5)
    };
    write!(
        out,
        "<line class=\"edge\" x1=\"{place:.3}%\" x2=\"{place:.3}%\" y1=\"0\" y2=\"{}\">\
         <title>Retention edge {edge}: what is needed only for older times may be removed</title></line>\
         <text class=\"row-name\" x=\"{place:.3}%\" dx=\"{dx}\" y=\"11\" text-anchor=\"{anchor}\">keep_window</text>",
        height - AXIS
    )
}

const DEFINITIONS: &str = "<defs><pattern id=\"hatch\" width=\"7\" height=\"7\" patternUnits=\"userSpaceOnUse\" \
    patternTransform=\"rotate(45)\"><rect width=\"7\" height=\"7\" class=\"gap-ground\"/>\
    <line x1=\"0\" y1=\"0\" x2=\"0\" y2=\"7\" class=\"gap-line\"/></pattern>\
    <symbol id=\"m-backup\" overflow=\"visible\"><rect x=\"-5\" y=\"-5\" width=\"10\" height=\"10\" rx=\"2\"/></symbol>\
    <symbol id=\"m-drill\" overflow=\"visible\"><path d=\"M0-7 7 0 0 7-7 0z\"/></symbol>\
    <symbol id=\"m-failed\" overflow=\"visible\"><path d=\"M-5-5 5 5M5-5-5 5\"/></symbol>\
    <symbol id=\"m-point\" overflow=\"visible\"><path d=\"M0 7V-7L8-3.5 0 0\"/></symbol>\
    <symbol id=\"m-removal\" overflow=\"visible\"><path d=\"M-5-4H5L0 5z\"/></symbol>\
    <symbol id=\"m-switch\" overflow=\"visible\"><path d=\"M0-14V14M-4-8 4-14M-4-14 4-8\"/></symbol></defs>";

fn rows(view: &View<'_>) -> Vec<TimelineId> {
    let mut rows: Vec<TimelineId> = view
        .details
        .ranges
        .iter()
        .map(|range| range.timeline)
        .collect();
    rows.extend(view.details.backups.iter().map(|backup| backup.timeline));
    rows.sort();
    rows.dedup();
    let surplus = rows.len().saturating_sub(ROWS_MAX);
    rows.drain(..surplus);
    rows
}

fn row(
    out: &mut String,
    view: &View<'_>,
    axis: Axis,
    timeline: TimelineId,
    top: u32,
) -> std::fmt::Result {
    let details = &view.details;
    let middle = top + ROW / 2 + 4;
    write!(
        out,
        "<rect class=\"ground\" x=\"0\" y=\"{}\" width=\"100%\" height=\"18\" rx=\"4\"/>",
        middle - 9
    )?;
    let newest = details.ranges.iter().map(|range| range.timeline).max();
    let mut bar = |class: &str, from: PgTimestamp, to: PgTimestamp, title: &str| {
        if !axis.overlaps(from, to) {
            return Ok(());
        }
        let (start, end) = (axis.place(from), axis.place(to));
        write!(
            out,
            "<rect class=\"{class}\" x=\"{start:.3}%\" y=\"{}\" width=\"{:.3}%\" height=\"18\" rx=\"4\"><title>{title}</title></rect>",
            middle - 9,
            (end - start).max(0.4),
        )
    };
    for range in details
        .ranges
        .iter()
        .filter(|range| range.timeline == timeline)
    {
        if let (Some(from), Some(to)) = (range.from, range.to) {
            let (start, end) = (range.start_lsn, range.end_lsn);
            let title =
                format!("WAL {start} to {end}, of which only the marked part can be restored");
            bar("kept", from, to, &title)?;
        }
    }
    let last = details.restorable.iter().rfind(|range| range.by_default);
    for range in details
        .restorable
        .iter()
        .filter(|range| range.timeline == timeline)
    {
        let (Some(from), Some(mut to)) = (range.from, range.to) else {
            continue;
        };
        // The newest range extends to the last time up to which the repository proves that nothing
        // is missing.
        let is_last =
            last.is_some_and(|last| (last.branch, last.end_lsn) == (range.branch, range.end_lsn));
        if newest == Some(timeline)
            && is_last
            && let Some(latest) = view.report.window.latest
        {
            to = to.max(latest);
        }
        let title = format!("Restorable: WAL {} to {}", range.start_lsn, range.end_lsn);
        bar("held", from, to, &title)?;
    }
    for gap in details
        .gaps
        .iter()
        .filter(|gap| gap.branch.timeline == timeline)
    {
        let (after, before) = (
            gap.after.unwrap_or(axis.from),
            gap.before.unwrap_or(axis.to),
        );
        if !axis.overlaps(after, before) {
            continue;
        }
        let start = gap.after.map_or(0.0, |time| axis.place(time));
        let end = gap.before.map_or(100.0, |time| axis.place(time));
        write!(
            out,
            "<rect class=\"gap\" x=\"{start:.3}%\" y=\"{}\" width=\"{:.3}%\" height=\"22\"><title>Gap {} to {}: {}</title></rect>",
            middle - 11,
            (end - start).max(0.8),
            gap.from_lsn,
            gap.to_lsn,
            escape(&gap.cause)
        )?;
    }
    let mut put = |symbol: &str, time: PgTimestamp, y: u32, title: &str| {
        if !axis.contains(time) {
            return;
        }
        let _ = write!(
            out,
            "<use class=\"{symbol}\" href=\"#{symbol}\" x=\"{:.3}%\" y=\"{y}\"><title>{}, {}</title></use>",
            axis.place(time),
            escape(title),
            text(time, "%Y-%m-%d %H:%M:%SZ")
        );
    };
    for backup in details
        .backups
        .iter()
        .filter(|backup| backup.timeline == timeline)
    {
        put(
            "m-backup",
            backup.finished,
            middle,
            &format!("Base backup {}", backup.id),
        );
    }
    for mark in details
        .marks
        .iter()
        .filter(|mark| mark.timeline == timeline)
    {
        let (symbol, y) = match mark.kind {
            MarkKind::RestorePoint => ("m-point", middle - 15),
            MarkKind::Removal => ("m-removal", middle - 16),
            MarkKind::Switch => ("m-switch", middle),
        };
        put(symbol, mark.time, y, &mark.text.replace('`', ""));
    }
    if newest == Some(timeline) {
        for drill in details.of_kind(OutcomeKind::Drill) {
            let (symbol, how) = if drill.passed {
                ("m-drill", "passed")
            } else {
                ("m-failed", "failed")
            };
            put(
                symbol,
                drill.finished,
                middle,
                &format!("Drill {how}: {}", drill.message),
            );
        }
    }
    write!(
        out,
        "<text class=\"row-name\" x=\"0\" y=\"{}\">Timeline {timeline}</text>",
        top + 11
    )
}

/// Renders four times along the bottom.
fn ticks(out: &mut String, axis: Axis, height: u32) -> std::fmt::Result {
    let whole = span(axis.to, axis.from);
    let pattern = if whole > 3.0 * 86_400.0 {
        "%m-%d"
    } else if whole > 600.0 {
        "%H:%M"
    } else {
        "%H:%M:%S"
    };
    for number in 0..=3_i64 {
        let micros = axis.to.micros_since(axis.from) / 3 * number;
        let time = PgTimestamp(axis.from.0 + micros);
        let anchor = match number {
            0 => "start",
            3 => "end",
            _ => "middle",
        };
        let text = text(time, pattern);
        write!(
            out,
            "<text class=\"tick\" x=\"{:.2}%\" y=\"{}\" text-anchor=\"{anchor}\">{text}</text>",
            axis.place(time),
            height - 4
        )?;
    }
    Ok(())
}

fn summary(view: &View<'_>, axis: Axis) -> String {
    let details = &view.details;
    format!(
        "WAL of {} timeline(s) over {}; {} gap(s), {} base backup(s), {} drill(s). The table below says the same in words.",
        rows(view).len(),
        duration(span(axis.to, axis.from)),
        details.gaps.len(),
        details.backups.len(),
        details.of_kind(OutcomeKind::Drill).count()
    )
}

fn legend(out: &mut String) {
    out.push_str("<ul class=\"legend\" aria-label=\"Shapes of the strip\">");
    for (class, text) in [
        ("held", "restorable"),
        ("kept", "archived, not restorable"),
        ("gap", "gap"),
    ] {
        let _ = write!(
            out,
            "<li><svg width=\"18\" height=\"18\" aria-hidden=\"true\"><rect class=\"{class}\" x=\"1\" y=\"2\" width=\"16\" height=\"14\"/></svg>{text}</li>"
        );
    }
    for (symbol, half, text) in [
        ("m-backup", 9, "base backup"),
        ("m-drill", 9, "drill passed"),
        ("m-failed", 9, "drill failed"),
        ("m-switch", 16, "timeline switch"),
        ("m-point", 9, "restore point"),
        ("m-removal", 9, "DROP, TRUNCATE or rewrite"),
    ] {
        let _ = write!(
            out,
            "<li><svg width=\"18\" height=\"18\" viewBox=\"-{half} -{half} {whole} {whole}\" aria-hidden=\"true\"><use class=\"{symbol}\" href=\"#{symbol}\"/></svg>{text}</li>",
            whole = 2 * half
        );
    }
    out.push_str("</ul>");
}

/// Renders the strip's content as a table, newest first.
fn words(out: &mut String, view: &View<'_>) -> std::fmt::Result {
    let details = &view.details;
    let mut lines: BTreeMap<(PgTimestamp, usize), String> = BTreeMap::new();
    let mut add = |time: PgTimestamp, text: String| {
        let number = lines.len();
        lines.insert((time, number), text);
    };
    for gap in &details.gaps {
        if let Some(time) = gap.after.or(gap.before) {
            let text = format!(
                "<strong>Gap</strong> on timeline {}: WAL {} to {}; {}",
                gap.branch.timeline,
                gap.from_lsn,
                gap.to_lsn,
                super::format::code(&gap.cause)
            );
            add(time, text);
        }
    }
    for loss in &details.failover_losses {
        add(
            loss.found,
            format!("<strong>Failover</strong>: {}", escape(&loss.to_string())),
        );
    }
    for backup in &details.backups {
        add(backup.finished, format!("Base backup {}", backup.id));
    }
    for drill in details.of_kind(OutcomeKind::Drill) {
        let how = if drill.passed { "passed" } else { "failed" };
        add(
            drill.finished,
            format!("Drill {how}: {}", escape(&drill.message)),
        );
    }
    for mark in &details.marks {
        let text = super::format::code(&mark.text);
        add(mark.time, format!("{text} (LSN {})", mark.lsn));
    }
    out.push_str("<details class=\"words\"><summary>The strip in words</summary><table id=\"strip-words\" data-live>\
                  <thead><tr><th scope=\"col\">Time</th><th scope=\"col\">What</th></tr></thead><tbody>");
    for ((time, _), text) in lines.iter().rev().take(WORDS_MAX) {
        write!(out, "<tr><td>{}</td><td>{text}</td></tr>", instant(*time))?;
    }
    out.push_str("</tbody></table></details>");
    Ok(())
}
