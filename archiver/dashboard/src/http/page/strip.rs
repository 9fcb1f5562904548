//! The window strip: one row per timeline, with archived WAL, gaps and their causes, backups,
//! drills, switches, restore points and removals. The shapes differ, so that it is readable without
//! colours. A table has the same content as text.

use maud::{Markup, html};
use status::details::MarkKind;
use wal_format::{OutcomeKind, PgTimestamp, TimelineId};

use super::{
    format::{code, duration, instant, span, text},
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

pub(super) fn render(view: &View<'_>) -> Markup {
    html! {
        section class="card" aria-labelledby="strip-title" {
            div class="card-head" {
                h2 id="strip-title" { "Restorable window" }
                (zoom(view))
            }
            @if let Some(axis) = Axis::of(view) {
                (strip(view, axis))
                (legend())
                (words(view))
            } @else {
                p class="empty" id="strip" data-live {
                    "Nothing is archived yet, or the catalog was not looked at since the start. "
                    "The first commit appears here within seconds."
                }
            }
        }
    }
}

fn strip(view: &View<'_>, axis: Axis) -> Markup {
    let rows = rows(view);
    let height = (0..).zip(&rows).last().map_or(0, |(last, _)| last + 1) * ROW + AXIS;
    html! {
        div class="strip-frame" {
            div id="strip" data-live data-from=(axis.from) data-to=(axis.to) {
                svg class="strip" width="100%" height=(height) role="img"
                    aria-label=(summary(view, axis)) {
                    (definitions())
                    @for (number, timeline) in (0..).zip(&rows) {
                        (row(view, axis, *timeline, number * ROW))
                    }
                    (retention_edge(view, axis, height))
                    (ticks(axis, height))
                }
            }
            div id="cursor" aria-hidden="true" hidden {}
        }
        p id="strip-readout" class="readout" role="status" hidden {}
    }
}

/// Renders the links that choose the part of the strip.
fn zoom(view: &View<'_>) -> Markup {
    let (Some(all), Some(now)) = (Axis::all(view), Axis::of(view)) else {
        return html! {};
    };
    let is_whole = (now.from, now.to) == (all.from, all.to);
    html! {
        nav class="ranges zoom" aria-label="Part of the strip" id="zoom" data-live {
            @for (text, name, part) in steps(all, now) {
                a href={ "?from=" (part.from) "&to=" (part.to) "#strip-title" } aria-label=(name) {
                    (text)
                }
            }
            @if !is_whole { a href="?#strip-title" { "All" } }
        }
    }
}

/// Returns the possible steps from the part `now` of `all`, each with its sign and its name. A step
/// beyond an end stops there.
fn steps(all: Axis, now: Axis) -> Vec<(&'static str, &'static str, Axis)> {
    let width = now.to.micros_since(now.from);
    let centre = now.from.0 + width / 2;
    let part = |from: i64, to: i64| Axis {
        from: PgTimestamp(from.max(all.from.0)),
        to: PgTimestamp(to.min(all.to.0)),
    };
    // A move keeps its width.
    let moved = |by: i64| {
        let (from, to) = (now.from.0 + by, now.to.0 + by);
        let beyond = (all.from.0 - from).max(0) - (to - all.to.0).max(0);
        part(from + beyond, to + beyond)
    };
    let is_whole = (now.from, now.to) == (all.from, all.to);
    let mut steps = Vec::new();
    if width / 2 >= ZOOM_MICROS_MIN {
        steps.push(("+", "Zoom in", part(centre - width / 4, centre + width / 4)));
    }
    if !is_whole {
        steps.push(("−", "Zoom out", part(centre - width, centre + width)));
    }
    if now.from > all.from {
        steps.push(("←", "Earlier", moved(-width / 2)));
    }
    if now.to < all.to {
        steps.push(("→", "Later", moved(width / 2)));
    }
    steps
}

/// Renders the time before which retention may remove what is stored.
fn retention_edge(view: &View<'_>, axis: Axis, height: u32) -> Markup {
    let policy = view.cluster.settings().repository.retention.as_ref();
    let window = policy.map(|policy| policy.window);
    let Some(window) = window.filter(|window| !window.is_zero()) else {
        return html! {};
    };
    let window = i64::try_from(window.as_micros()).unwrap_or(i64::MAX);
    let edge = PgTimestamp(view.report.as_of.0.saturating_sub(window));
    if !axis.contains(edge) {
        return html! {};
    }
    let place = axis.place(edge);
    let (anchor, dx) = if place > 70.0 {
        ("end", "-5")
    } else {
        ("start", "5")
    };
    let x = percent(place);
    html! {
        line class="edge" x1=(x) x2=(x) y1="0" y2=(height - AXIS) {
            title {
                "Retention edge " (edge) ": what is needed only for older times may be removed"
            }
        }
        text class="row-name" x=(x) dx=(dx) y="11" text-anchor=(anchor) { "keep_window" }
    }
}

fn percent(place: f64) -> String {
    format!("{place:.3}%")
}

/// Renders the definitions of the shapes.
fn definitions() -> Markup {
    html! {
        defs {
            pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse"
                patternTransform="rotate(45)" {
                rect width="7" height="7" class="gap-ground" {}
                line x1="0" y1="0" x2="0" y2="7" class="gap-line" {}
            }
            symbol id="m-backup" overflow="visible" {
                rect x="-5" y="-5" width="10" height="10" rx="2" {}
            }
            @for (id, path) in [
                ("m-drill", "M0-7 7 0 0 7-7 0z"),
                ("m-failed", "M-5-5 5 5M5-5-5 5"),
                ("m-point", "M0 7V-7L8-3.5 0 0"),
                ("m-removal", "M-5-4H5L0 5z"),
                ("m-switch", "M0-14V14M-4-8 4-14M-4-14 4-8"),
            ] {
                symbol id=(id) overflow="visible" { path d=(path) {} }
            }
        }
    }
}

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

/// Renders the row of a timeline at a height.
fn row(view: &View<'_>, axis: Axis, timeline: TimelineId, top: u32) -> Markup {
    let middle = top + ROW / 2 + 4;
    html! {
        rect class="ground" x="0" y=(middle - 9) width="100%" height="18" rx="4" {}
        (bars(view, axis, timeline, middle))
        (gaps(view, axis, timeline, middle))
        (marks(view, axis, timeline, middle))
        text class="row-name" x="0" y=(top + 11) { "Timeline " (timeline) }
    }
}

/// Renders the archived WAL of a timeline, and over it what can be restored.
fn bars(view: &View<'_>, axis: Axis, timeline: TimelineId, middle: u32) -> Markup {
    let details = &view.details;
    let bar = |class: &str, from: PgTimestamp, to: PgTimestamp, title: &str| {
        let (start, end) = (axis.place(from), axis.place(to));
        html! {
            @if axis.overlaps(from, to) {
                rect class=(class) x=(percent(start)) y=(middle - 9)
                    width=(percent((end - start).max(0.4))) height="18" rx="4" {
                    title { (title) }
                }
            }
        }
    };
    let archived = details.ranges.iter();
    let archived = archived.filter(|range| range.timeline == timeline);
    let archived = archived.filter_map(|range| {
        let (from, to) = range.from.zip(range.to)?;
        let (start, end) = (range.start_lsn, range.end_lsn);
        let title = format!("WAL {start} to {end}, of which only the marked part can be restored");
        Some(bar("kept", from, to, &title))
    });
    let newest = details.ranges.iter().map(|range| range.timeline).max();
    let last = details.restorable.iter().rfind(|range| range.by_default);
    let restorable = details.restorable.iter();
    let restorable = restorable.filter(|range| range.timeline == timeline);
    let restorable = restorable.filter_map(|range| {
        let (from, mut to) = range.from.zip(range.to)?;
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
        Some(bar("held", from, to, &title))
    });
    html! {
        @for bar in archived { (bar) }
        @for bar in restorable { (bar) }
    }
}

fn gaps(view: &View<'_>, axis: Axis, timeline: TimelineId, middle: u32) -> Markup {
    let gaps = view.details.gaps.iter();
    let gaps = gaps
        .filter(|gap| gap.branch.timeline == timeline)
        .filter(|gap| {
            let (after, before) = (
                gap.after.unwrap_or(axis.from),
                gap.before.unwrap_or(axis.to),
            );
            axis.overlaps(after, before)
        });
    html! {
        @for gap in gaps {
            @let start = gap.after.map_or(0.0, |time| axis.place(time));
            @let end = gap.before.map_or(100.0, |time| axis.place(time));
            rect class="gap" x=(percent(start)) y=(middle - 11)
                width=(percent((end - start).max(0.8))) height="22" {
                title { "Gap " (gap.from_lsn) " to " (gap.to_lsn) ": " (gap.cause) }
            }
        }
    }
}

/// Renders the backups, the marks and, on the newest timeline, the drills.
fn marks(view: &View<'_>, axis: Axis, timeline: TimelineId, middle: u32) -> Markup {
    let details = &view.details;
    let put = |symbol: &str, time: PgTimestamp, y: u32, title: &str| {
        html! {
            @if axis.contains(time) {
                use class=(symbol) href={ "#" (symbol) } x=(percent(axis.place(time))) y=(y) {
                    title { (title) ", " (text(time, "%Y-%m-%d %H:%M:%SZ")) }
                }
            }
        }
    };
    let backups = details.backups.iter();
    let backups = backups.filter(|backup| backup.timeline == timeline);
    let marks = details.marks.iter();
    let marks = marks.filter(|mark| mark.timeline == timeline);
    let newest = details.ranges.iter().map(|range| range.timeline).max();
    let drills = details.of_kind(OutcomeKind::Drill);
    let drills = drills.filter(|_| newest == Some(timeline));
    html! {
        @for backup in backups {
            (put("m-backup", backup.finished, middle, &format!("Base backup {}", backup.id)))
        }
        @for mark in marks {
            @let (symbol, y) = match mark.kind {
                MarkKind::RestorePoint => ("m-point", middle - 15),
                MarkKind::Removal => ("m-removal", middle - 16),
                MarkKind::Switch => ("m-switch", middle),
            };
            (put(symbol, mark.time, y, &mark.text.replace('`', "")))
        }
        @for drill in drills {
            @let (symbol, how) = match drill.passed {
                true => ("m-drill", "passed"),
                false => ("m-failed", "failed"),
            };
            (put(symbol, drill.finished, middle, &format!("Drill {how}: {}", drill.message)))
        }
    }
}

/// Renders four times along the bottom.
fn ticks(axis: Axis, height: u32) -> Markup {
    let whole = span(axis.to, axis.from);
    let pattern = if whole > 3.0 * 86_400.0 {
        "%m-%d"
    } else if whole > 600.0 {
        "%H:%M"
    } else {
        "%H:%M:%S"
    };
    let third = axis.to.micros_since(axis.from) / 3;
    html! {
        @for (number, anchor) in (0..).zip(["start", "middle", "middle", "end"]) {
            @let time = PgTimestamp(axis.from.0 + third * number);
            text class="tick" x=(percent(axis.place(time))) y=(height - 4) text-anchor=(anchor) {
                (text(time, pattern))
            }
        }
    }
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

fn legend() -> Markup {
    html! {
        ul class="legend" aria-label="Shapes of the strip" {
            @for (class, text) in [
                ("held", "restorable"),
                ("kept", "archived, not restorable"),
                ("gap", "gap"),
            ] {
                li {
                    svg width="18" height="18" aria-hidden="true" {
                        rect class=(class) x="1" y="2" width="16" height="14" {}
                    }
                    (text)
                }
            }
            @for (symbol, half, text) in [
                ("m-backup", 9, "base backup"),
                ("m-drill", 9, "drill passed"),
                ("m-failed", 9, "drill failed"),
                ("m-switch", 16, "timeline switch"),
                ("m-point", 9, "restore point"),
                ("m-removal", 9, "DROP, TRUNCATE or rewrite"),
            ] {
                @let whole = 2 * half;
                li {
                    svg width="18" height="18" aria-hidden="true"
                        viewBox={ "-" (half) " -" (half) " " (whole) " " (whole) } {
                        use class=(symbol) href={ "#" (symbol) } {}
                    }
                    (text)
                }
            }
        }
    }
}

/// Renders the strip's content as a table, newest first.
fn words(view: &View<'_>) -> Markup {
    html! {
        details class="words" {
            summary { "The strip in words" }
            table id="strip-words" data-live {
                thead { tr { th scope="col" { "Time" } th scope="col" { "What" } } }
                tbody {
                    @for (time, text) in lines(view).iter().rev().take(WORDS_MAX) {
                        tr { td { (instant(*time)) } td { (text) } }
                    }
                }
            }
        }
    }
}

/// Returns what the strip shows, in the order of time.
fn lines(view: &View<'_>) -> Vec<(PgTimestamp, Markup)> {
    let details = &view.details;
    let gaps = details.gaps.iter().filter_map(|gap| {
        let text = html! {
            strong { "Gap" } " on timeline " (gap.branch.timeline) ": WAL " (gap.from_lsn) " to "
            (gap.to_lsn) "; " (code(&gap.cause))
        };
        Some((gap.after.or(gap.before)?, text))
    });
    let losses = details.failover_losses.iter();
    let losses = losses.map(|loss| (loss.found, html! { strong { "Failover" } ": " (loss) }));
    let backups = details.backups.iter();
    let backups = backups.map(|backup| (backup.finished, html! { "Base backup " (backup.id) }));
    let drills = details.of_kind(OutcomeKind::Drill).map(|drill| {
        let how = if drill.passed { "passed" } else { "failed" };
        (
            drill.finished,
            html! { "Drill " (how) ": " (drill.message) },
        )
    });
    let marks = details.marks.iter();
    let marks = marks.map(|mark| {
        let text = html! { (code(&mark.text)) " (LSN " (mark.lsn) ")" };
        (mark.time, text)
    });
    let lines = gaps.chain(losses).chain(backups).chain(drills).chain(marks);
    let mut lines: Vec<_> = lines.collect();
    lines.sort_by_key(|(time, _)| *time);
    lines
}
