//! Charts of RPO and throughput over 15 minutes, 24 hours and 30 days: the maximum of each bucket,
//! and the RPO target.

use std::fmt::Write as _;

use maud::{Markup, html};

use super::{
    format::{amount, duration},
    view::{Range, View},
};
use crate::{clock::unix_second, monitor::series::Point};

const WIDTH: f64 = 600.0;
const HEIGHT: f64 = 130.0;
const BUCKETS: usize = 180;

pub(super) fn render(view: &View<'_>) -> Markup {
    let to = unix_second() + 1;
    let from = to - view.range.seconds();
    let query = |metric: &str| {
        let series = view.cluster.series();
        series.query(metric, from, to, BUCKETS).unwrap_or_default()
    };
    let times = Times {
        from,
        step: view.range.seconds() as f64 / BUCKETS as f64,
    };
    let rpo = rpo(&query("rpo_remote"), view.report.rpo_target_seconds);
    let throughput = throughput(
        &query("received_bytes_per_second"),
        &query("stored_bytes_per_second"),
    );
    html! {
        nav class="ranges" aria-label="Time range of the charts" id="ranges" data-live {
            @for range in Range::ALL {
                @let current = (range == view.range).then_some("true");
                a href={ "?range=" (range.name()) "#charts" } aria-current=[current] {
                    (range.title())
                }
            }
        }
        div class="pair" id="charts" data-live {
            (rpo.render(view.range, times))
            (throughput.render(view.range, times))
        }
    }
}

/// Returns the chart of the RPO, with a line for its target.
fn rpo(points: &[Point], target: f64) -> Figure {
    let scale = Scale::of(&[points], target * 1.5, &SECONDS);
    let target_text = short(&duration(target));
    let words = greatest(points).map_or_else(
        || "nothing recorded yet".to_owned(),
        |max| format!("greatest {}, target {target_text}", duration(max)),
    );
    let y = format!("{:.1}", scale.y(target));
    Figure {
        title: "RPO",
        words: scale.describe(words, &[points], duration),
        unit: "s",
        ticks: scale.ticks(duration),
        series: vec![values("RPO", points)],
        target: Some((scale.y(target), format!("target {target_text}"))),
        shapes: html! {
            (area("area rpo", points, scale))
            line class="target" x1="0" x2=(WIDTH) y1=(y) y2=(y) {}
        },
    }
}

/// Returns the chart of the WAL that was received and that was stored.
fn throughput(received: &[Point], stored: &[Point]) -> Figure {
    let scale = Scale::of(&[received, stored], 1024.0, &BYTES);
    let rate = |value: f64| format!("{}/s", amount(value));
    let words = match (greatest(received), greatest(stored)) {
        (Some(received), Some(stored)) => format!(
            "greatest {} received (filled), {} stored (line)",
            rate(received),
            rate(stored)
        ),
        _ => "nothing recorded yet".to_owned(),
    };
    Figure {
        title: "WAL throughput",
        words: scale.describe(words, &[received, stored], rate),
        unit: "B/s",
        ticks: scale.ticks(rate),
        series: vec![values("received", received), values("stored", stored)],
        target: None,
        shapes: html! { (area("area received", received, scale)) (line(stored, scale)) },
    }
}

/// Returns a series as the script reads it.
fn values(name: &str, points: &[Point]) -> serde_json::Value {
    let values: Vec<_> = points.iter().map(|point| point.max).collect();
    serde_json::json!({ "name": name, "values": values })
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

/// The texts, the values and the shapes of a chart.
struct Figure {
    title: &'static str,
    words: String,
    unit: &'static str,
    ticks: [String; 3],
    series: Vec<serde_json::Value>,
    /// The height and the label of the line of the target.
    target: Option<(f64, String)>,
    shapes: Markup,
}

impl Figure {
    fn render(&self, range: Range, times: Times) -> Markup {
        let (title, words) = (self.title, &self.words);
        let data = serde_json::json!({
            "from": times.from, "step": times.step, "unit": self.unit, "series": self.series,
        });
        html! {
            figure class="card" {
                figcaption {
                    h2 { (title) }
                    span { "Last " (range.title()) ": " (words) }
                }
                p class="readout" role="status" aria-live="polite" {}
                div class="plot" tabindex="0" role="group" data-chart=(data)
                    aria-label={ (title) ": arrow keys read the values" } {
                    span class="scale" aria-hidden="true" {
                        @for tick in &self.ticks { span { (tick) } }
                    }
                    svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } preserveAspectRatio="none"
                        role="img" aria-label={ (title) ", " (words) } {
                        (self.shapes)
                        line class="reader" x1="0" x2="0" y1="0" y2=(HEIGHT)
                            visibility="hidden" {}
                    }
                    @if let Some((y, label)) = &self.target {
                        @let share = (y / HEIGHT * 100.0).clamp(9.0, 100.0);
                        svg class="labels" aria-hidden="true" {
                            text x="100%" y=(format!("{share:.1}%")) dy="-4" text-anchor="end" {
                                (label)
                            }
                        }
                    }
                    span class="axis" aria-hidden="true" {
                        @for number in 0..=3 { span { (axis_time(range, times, number)) } }
                    }
                }
            }
        }
    }
}

/// Returns the text of one of the four times below a chart.
fn axis_time(range: Range, times: Times, number: u64) -> String {
    let pattern = match range {
        Range::Minutes15 | Range::Hours24 if number == 3 => "%H:%MZ",
        Range::Minutes15 | Range::Hours24 => "%H:%M",
        Range::Days30 => "%m-%d",
    };
    let second = i64::try_from(times.from + range.seconds() * number / 3);
    let time = second
        .ok()
        .and_then(|second| jiff::Timestamp::from_second(second).ok());
    time.map_or_else(String::new, |time| time.strftime(pattern).to_string())
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

fn area(class: &str, points: &[Point], scale: Scale) -> Markup {
    let path = |run: &[(f64, f64)]| {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            return String::new();
        };
        let mut path = format!("M{:.1} {HEIGHT}", first.0);
        for (x, y) in run {
            // Writing to a String does not fail.
            let _ = write!(path, "L{x:.1} {y:.1}");
        }
        let _ = write!(path, "L{:.1} {HEIGHT}Z", last.0);
        path
    };
    html! { @for run in runs(points, scale) { path class=(class) d=(path(&run)) {} } }
}

fn line(points: &[Point], scale: Scale) -> Markup {
    let path = |run: &[(f64, f64)]| {
        let mut path = String::new();
        for (number, (x, y)) in run.iter().enumerate() {
            let command = if number == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{command}{x:.1} {y:.1}");
        }
        path
    };
    html! { @for run in runs(points, scale) { path class="line" d=(path(&run)) {} } }
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
