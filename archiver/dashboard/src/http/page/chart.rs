//! Charts of RPO and throughput over 15 minutes, 24 hours and 30 days: the maximum of each bucket,
//! and the RPO target.

use std::fmt::Write as _;

use super::{
    format::{amount, duration, escape},
    view::{Range, View},
};
use crate::{clock::unix_second, monitor::series::Point};

const WIDTH: f64 = 600.0;
const HEIGHT: f64 = 130.0;
const BUCKETS: usize = 180;

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let _ = draw(out, view);
}

fn draw(out: &mut String, view: &View<'_>) -> std::fmt::Result {
    out.push_str(
        "<nav class=\"ranges\" aria-label=\"Time range of the charts\" id=\"ranges\" data-live>",
    );
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
    let time = Times {
        from,
        step: view.range.seconds() as f64 / BUCKETS as f64,
    };
    let rpo = query("rpo_remote");
    let target = view.report.rpo_target_seconds;
    let scale = Scale::of(&[&rpo], target * 1.5, &SECONDS);
    let words = greatest(&rpo).map_or_else(
        || "nothing recorded yet".to_owned(),
        |max| {
            format!(
                "greatest {}, target {}",
                duration(max),
                short(&duration(target))
            )
        },
    );
    let rpo_figure = Figure {
        title: "RPO",
        words: scale.describe(words, &[&rpo], duration),
        unit: "s",
        ticks: scale.ticks(duration),
        series: &[("RPO", &rpo)],
        target: Some((
            scale.y(target),
            format!("target {}", short(&duration(target))),
        )),
    };
    figure(out, view.range, time, &rpo_figure, &|out| {
        area(out, "area rpo", &rpo, scale)?;
        let y = scale.y(target);
        write!(
            out,
            "<line class=\"target\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
        )
    })?;
    let (received, stored) = (
        query("received_bytes_per_second"),
        query("stored_bytes_per_second"),
    );
    let scale = Scale::of(&[&received, &stored], 1024.0, &BYTES);
    let rate = |value: f64| format!("{}/s", amount(value));
    let words = match (greatest(&received), greatest(&stored)) {
        (Some(received), Some(stored)) => format!(
            "greatest {} received (filled), {} stored (line)",
            rate(received),
            rate(stored)
        ),
        _ => "nothing recorded yet".to_owned(),
    };
    let throughput = Figure {
        title: "WAL throughput",
        words: scale.describe(words, &[&received, &stored], rate),
        unit: "B/s",
        ticks: scale.ticks(rate),
        series: &[("received", &received), ("stored", &stored)],
        target: None,
    };
    figure(out, view.range, time, &throughput, &|out| {
        area(out, "area received", &received, scale)?;
        line(out, &stored, scale)
    })?;
    out.push_str("</div>");
    Ok(())
}

/// The times of the buckets.
#[derive(Clone, Copy)]
struct Times {
    /// The Unix time of the first bucket, in seconds.
    from: u64,
    /// The width of a bucket, in seconds.
    step: f64,
}

/// Round values of a scale, ascending within one decade or one factor of 1024.
const SECONDS: [f64; 12] = [
    1.0, 2.0, 4.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 600.0, 1200.0, 3600.0,
];
const BYTES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// The vertical scale of a chart, from 0 to a round value. A short burst that is far above
/// everything else is cut off at the top, so that the rest stays readable.
#[derive(Clone, Copy)]
struct Scale {
    top: f64,
}

impl Scale {
    /// Returns a scale whose top is a round value of at least `least`.
    fn of(series: &[&[Point]], least: f64, round: &[f64]) -> Self {
        let points = series.iter().flat_map(|points| points.iter());
        let mut known: Vec<f64> = points
            .filter_map(|point| point.max.map(f64::from))
            .collect();
        known.sort_by(f64::total_cmp);
        let greatest = known.last().copied().unwrap_or_default();
        let usual = known
            .get(known.len() * 19 / 20)
            .copied()
            .unwrap_or_default();
        let is_burst = greatest > 4.0 * usual.max(least);
        let need = if is_burst {
            2.0 * usual
        } else {
            greatest * 1.05
        };
        let need = need.max(least);
        let factor = if round.len() == BYTES.len() {
            1024.0
        } else {
            3600.0
        };
        let mut unit = 1.0;
        while need > unit * factor {
            unit *= factor;
        }
        let mut fitting = round.iter().map(|step| step * unit);
        let top = fitting.find(|top| *top >= need).unwrap_or(unit * factor);
        Self { top }
    }

    fn y(self, value: f64) -> f64 {
        HEIGHT - (value / self.top).min(1.0) * HEIGHT
    }

    /// Returns the labels of the top, the middle and the bottom.
    fn ticks(self, format: impl Fn(f64) -> String) -> [String; 3] {
        let tick = |value| short(&format(value));
        [tick(self.top), tick(self.top / 2.0), "0".to_owned()]
    }

    /// Adds to the description that values are cut off, if some are.
    fn describe(
        self,
        words: String,
        series: &[&[Point]],
        format: impl Fn(f64) -> String,
    ) -> String {
        let is_cut = series
            .iter()
            .filter_map(|points| greatest(points))
            .any(|value| value > self.top);
        if is_cut {
            format!("{words}; cut off above {}", short(&format(self.top)))
        } else {
            words
        }
    }
}

/// Returns a number with its unit without a fraction that is 0.
fn short(text: &str) -> String {
    text.replacen(".0 ", " ", 1)
}

/// The texts and the values of a chart.
struct Figure<'a> {
    title: &'static str,
    words: String,
    unit: &'static str,
    ticks: [String; 3],
    series: &'a [(&'static str, &'a [Point])],
    /// The height and the label of the line of the target.
    target: Option<(f64, String)>,
}

fn figure(
    out: &mut String,
    range: Range,
    time: Times,
    figure: &Figure<'_>,
    content: &dyn Fn(&mut String) -> std::fmt::Result,
) -> std::fmt::Result {
    let title = figure.title;
    let series: Vec<_> = figure
        .series
        .iter()
        .map(|(name, points)| {
            let values: Vec<_> = points.iter().map(|point| point.max).collect();
            serde_json::json!({ "name": name, "values": values })
        })
        .collect();
    let data = serde_json::json!({
        "from": time.from, "step": time.step, "unit": figure.unit, "series": series,
    });
    write!(
        out,
        "<figure class=\"card\"><figcaption><h2>{title}</h2><span>Last {}: {}</span></figcaption>\
         <p class=\"readout\" role=\"status\" aria-live=\"polite\"></p>\
         <div class=\"plot\" tabindex=\"0\" role=\"group\" aria-label=\"{title}: arrow keys read the values\" data-chart=\"{}\">\
         <span class=\"scale\" aria-hidden=\"true\"><span>{}</span><span>{}</span><span>{}</span></span>\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{title}, {}\">",
        range.title(),
        escape(&figure.words),
        escape(&data.to_string()),
        figure.ticks[0],
        figure.ticks[1],
        figure.ticks[2],
        escape(&figure.words)
    )?;
    content(out)?;
    out.push_str("<line class=\"reader\" x1=\"0\" x2=\"0\" y1=\"0\" y2=\"130\" visibility=\"hidden\"/></svg>");
    if let Some((y, label)) = &figure.target {
        let share = (y / HEIGHT * 100.0).clamp(9.0, 100.0);
        write!(
            out,
            "<svg class=\"labels\" aria-hidden=\"true\"><text x=\"100%\" y=\"{share:.1}%\" dy=\"-4\" text-anchor=\"end\">{}</text></svg>",
            escape(label)
        )?;
    }
    out.push_str("<span class=\"axis\" aria-hidden=\"true\">");
    let pattern = match range {
        Range::Minutes15 | Range::Hours24 => "%H:%M",
        Range::Days30 => "%m-%d",
    };
    for number in 0..=3_u64 {
        let second = time.from + range.seconds() * number / 3;
        let at = i64::try_from(second)
            .ok()
            .and_then(|at| jiff::Timestamp::from_second(at).ok());
        let text = at.map_or_else(String::new, |at| at.strftime(pattern).to_string());
        let zone = if number == 3 && range != Range::Days30 {
            "Z"
        } else {
            ""
        };
        write!(out, "<span>{text}{zone}</span>")?;
    }
    out.push_str("</span></div></figure>");
    Ok(())
}

fn greatest(points: &[Point]) -> Option<f64> {
    let known = points.iter().filter_map(|point| point.max);
    known.reduce(f32::max).map(f64::from)
}

/// Returns runs of known buckets as steps. An unknown bucket is a hole, not zero.
fn runs(points: &[Point], scale: Scale) -> Vec<Vec<(f64, f64)>> {
    let width = WIDTH / points.len().max(1) as f64;
    let mut runs = vec![Vec::new()];
    for (number, point) in points.iter().enumerate() {
        match point.max {
            Some(value) => {
                let (x, y) = (number as f64 * width, scale.y(f64::from(value)));
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

fn area(out: &mut String, class: &str, points: &[Point], scale: Scale) -> std::fmt::Result {
    for run in runs(points, scale) {
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

fn line(out: &mut String, points: &[Point], scale: Scale) -> std::fmt::Result {
    for run in runs(points, scale) {
        out.push_str("<path class=\"line\" d=\"");
        for (number, (x, y)) in run.iter().enumerate() {
            let command = if number == 0 { 'M' } else { 'L' };
            write!(out, "{command}{x:.1} {y:.1}")?;
        }
        out.push_str("\"/>");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: &[f32]) -> Vec<Point> {
        let values = values.iter().enumerate();
        values
            .map(|(number, value)| Point {
                time: number as u64,
                max: Some(*value),
            })
            .collect()
    }

    #[test]
    fn a_scale_ends_at_a_round_value_and_cuts_bursts() {
        let steady = points(&[3.0; 40]);
        assert_eq!(
            Scale::of(&[&steady], 7.5, &SECONDS).ticks(duration),
            ["10 s", "5 s", "0"]
        );
        let mut burst = points(&[3.0; 40]);
        burst[7].max = Some(5000.0);
        let scale = Scale::of(&[&burst], 7.5, &SECONDS);
        assert_eq!(scale.ticks(duration)[0], "10 s");
        assert_eq!(scale.y(5000.0), 0.0);
        let words = scale.describe("greatest 83 min".to_owned(), &[&burst], duration);
        assert_eq!(words, "greatest 83 min; cut off above 10 s");
        // A rise that lasts is not a burst.
        let high = points(&[5000.0; 40]);
        assert_eq!(Scale::of(&[&high], 7.5, &SECONDS).ticks(duration)[0], "2 h");
        let empty = Scale::of(&[&[]], 1024.0, &BYTES);
        assert_eq!(empty.ticks(amount), ["1 KiB", "512 B", "0"]);
    }
}
