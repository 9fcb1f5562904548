//! Charts of RPO and throughput over 15 minutes, 24 hours and 30 days: the maximum of each bucket,
//! and the RPO target.

use std::fmt::Write as _;

use super::{
    View,
    format::{amount, duration, escape},
};
use crate::monitor::{series::Point, unix_second};

/// The time range of the charts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Range {
    Minutes15,
    Hours24,
    Days30,
}

impl Range {
    const ALL: [Self; 3] = [Self::Minutes15, Self::Hours24, Self::Days30];

    pub(in crate::http) fn of(text: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|range| range.name() == text)
            .unwrap_or(Self::Minutes15)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Minutes15 => "15m",
            Self::Hours24 => "24h",
            Self::Days30 => "30d",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Minutes15 => "15 min",
            Self::Hours24 => "24 h",
            Self::Days30 => "30 d",
        }
    }

    fn seconds(self) -> u64 {
        match self {
            Self::Minutes15 => 900,
            Self::Hours24 => 86_400,
            Self::Days30 => 30 * 86_400,
        }
    }
}

const WIDTH: f64 = 600.0;
const HEIGHT: f64 = 130.0;
const BUCKETS: usize = 180;

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let _ = draw(out, view);
}

fn draw(out: &mut String, view: &View<'_>) -> std::fmt::Result {
    out.push_str("<nav class=\"ranges\" aria-label=\"Time range of the charts\" id=\"ranges\">");
    for range in Range::ALL {
        let current = if range == view.range {
            " aria-current=\"true\""
        } else {
            ""
        };
        write!(
            out,
            "<a href=\"?range={}#charts\"{current}>{}</a>",
            range.name(),
            range.title()
        )?;
    }
    out.push_str("</nav><div class=\"pair\" id=\"charts\" data-live>");
    let to = unix_second() + 1;
    let from = to - view.range.seconds();
    let query = |metric: &str| {
        let series = view.cluster.series();
        series.query(metric, from, to, BUCKETS).unwrap_or_default()
    };
    let rpo = query("rpo_remote");
    let target = view.report.rpo_target_seconds;
    let top = greatest(&rpo).unwrap_or_default().max(target) * 1.15;
    let words = greatest(&rpo).map_or_else(
        || "nothing recorded yet".to_owned(),
        |max| format!("greatest {}, target {}", duration(max), duration(target)),
    );
    figure(out, "RPO", view.range, &words, &duration(top), &|out| {
        area(out, "area rpo", &rpo, top)?;
        let y = HEIGHT - target / top * HEIGHT;
        write!(
            out,
            "<line class=\"target\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
        )
    })?;
    let (received, stored) = (
        query("received_bytes_per_second"),
        query("stored_bytes_per_second"),
    );
    let peak = greatest(&received)
        .into_iter()
        .chain(greatest(&stored))
        .fold(1024.0, f64::max);
    let top = peak * 1.15;
    let words = match (greatest(&received), greatest(&stored)) {
        (Some(received), Some(stored)) => format!(
            "greatest {}/s received (filled), {}/s stored (line)",
            amount(received),
            amount(stored)
        ),
        _ => "nothing recorded yet".to_owned(),
    };
    figure(
        out,
        "WAL throughput",
        view.range,
        &words,
        &format!("{}/s", amount(top)),
        &|out| {
            area(out, "area received", &received, top)?;
            line(out, &stored, top)
        },
    )?;
    out.push_str("</div>");
    Ok(())
}

fn figure(
    out: &mut String,
    title: &str,
    range: Range,
    words: &str,
    top: &str,
    content: &dyn Fn(&mut String) -> std::fmt::Result,
) -> std::fmt::Result {
    write!(
        out,
        "<figure class=\"card\"><figcaption><h2>{title}</h2><span>last {}, maximum per bucket: {}</span></figcaption>\
         <div class=\"plot\"><span class=\"top\" aria-hidden=\"true\">{top}</span>\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{title}, {}\">",
        range.title(),
        escape(words),
        escape(words)
    )?;
    content(out)?;
    write!(
        out,
        "</svg><span class=\"axis\" aria-hidden=\"true\"><span>{} ago</span><span>now</span></span></div></figure>",
        range.title()
    )
}

fn greatest(points: &[Point]) -> Option<f64> {
    let known = points.iter().filter_map(|point| point.max);
    known.reduce(f32::max).map(f64::from)
}

/// Returns runs of known buckets as steps. An unknown bucket is a hole, not zero.
fn runs(points: &[Point], top: f64) -> Vec<Vec<(f64, f64)>> {
    let width = WIDTH / points.len().max(1) as f64;
    let mut runs = vec![Vec::new()];
    for (number, point) in points.iter().enumerate() {
        match point.max {
            Some(value) => {
                let (x, y) = (
                    number as f64 * width,
                    HEIGHT - f64::from(value) / top * HEIGHT,
                );
                if let Some(run) = runs.last_mut() {
                    run.extend([(x, y), (x + width, y)]);
                }
            }
            None => runs.push(Vec::new()),
        }
    }
    runs.retain(|run| !run.is_empty());
    runs
}

fn area(out: &mut String, class: &str, points: &[Point], top: f64) -> std::fmt::Result {
    for run in runs(points, top) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            continue;
        };
        write!(out, "<path class=\"{class}\" d=\"M{:.1} {HEIGHT}", first.0)?;
        for (x, y) in &run {
            write!(out, "L{x:.1} {y:.1}")?;
        }
        write!(out, "L{:.1} {HEIGHT}Z\"/>", last.0)?;
    }
    Ok(())
}

fn line(out: &mut String, points: &[Point], top: f64) -> std::fmt::Result {
    for run in runs(points, top) {
        out.push_str("<path class=\"line\" d=\"");
        for (number, (x, y)) in run.iter().enumerate() {
            let command = if number == 0 { 'M' } else { 'L' };
            write!(out, "{command}{x:.1} {y:.1}")?;
        }
        out.push_str("\"/>");
    }
    Ok(())
}
