//! The tiles with the numbers of a cluster. Each has at most two notes, and a neutral colour while
//! its number is unknown.

use maud::{Markup, html};
use status::report::ClusterReport;

use super::{
    format::{bytes, duration, instant, seconds, span},
    view::View,
};

/// The colour of a tile.
#[derive(Clone, Copy)]
enum Tone {
    Plain,
    Bad,
    Unknown,
}

struct Tile {
    id: &'static str,
    term: &'static str,
    value: Markup,
    notes: Vec<Markup>,
    tone: Tone,
}

pub(super) fn render(view: &View<'_>) -> Markup {
    let report = view.report;
    let tiles = [
        rpo(report),
        rto(report),
        window(report),
        lag(report),
        drill(report),
    ];
    html! {
        dl class="tiles" id="tiles" data-live {
            @for tile in tiles {
                @let tone = match tile.tone {
                    Tone::Plain => "",
                    Tone::Bad => " bad",
                    Tone::Unknown => " unknown",
                };
                div class={ "tile" (tone) } id={ "tile-" (tile.id) } {
                    dt { (tile.term) }
                    dd {
                        b class="value" { (tile.value) }
                        span class="notes" { @for note in tile.notes { span { (note) } } }
                    }
                }
            }
        }
    }
}

fn rpo(report: &ClusterReport) -> Tile {
    let rpo = report.durable.remote.rpo_seconds;
    Tile {
        id: "rpo",
        term: "RPO now",
        value: html! { (seconds(rpo)) },
        notes: vec![
            html! { "target " (duration(report.rpo_target_seconds)) },
            html! { "greatest in 24 h " (seconds(report.rpo_max_24h_seconds)) },
        ],
        tone: match rpo {
            None => Tone::Unknown,
            Some(rpo) if rpo > report.rpo_target_seconds => Tone::Bad,
            Some(_) => Tone::Plain,
        },
    }
}

fn rto(report: &ClusterReport) -> Tile {
    let rto = &report.rto;
    let (value, tone) = match (rto.estimate_seconds, rto.target_seconds) {
        (None, _) => (html! { "not measured" }, Tone::Unknown),
        (Some(estimate), target) => (
            html! { (duration(estimate)) " " small { "estimate" } },
            match target {
                Some(target) if estimate > target => Tone::Bad,
                _ => Tone::Plain,
            },
        ),
    };
    let measured = match rto.measured_seconds {
        Some(measured) => html! { "measured by the last drill " (duration(measured)) },
        None => html! { "no drill has run yet" },
    };
    let target = match rto.target_seconds {
        Some(target) => html! { "target " (duration(target)) },
        None => html! { "no target is set (" code { "rto_target" } ")" },
    };
    Tile {
        id: "rto",
        term: "RTO now",
        value,
        notes: vec![target, measured],
        tone,
    }
}

fn window(report: &ClusterReport) -> Tile {
    let tile = |value: &str, notes: Vec<Markup>, tone| Tile {
        id: "window",
        term: "Restorable",
        value: html! { (value) },
        notes,
        tone,
    };
    let window = &report.window;
    let bad = window.refusal.is_some() || window.gaps.is_some_and(|gaps| gaps > 0);
    let tone = if bad { Tone::Bad } else { Tone::Plain };
    match (window.earliest, window.latest) {
        (Some(earliest), Some(latest)) => {
            let gaps = match window.gaps {
                Some(0) => "no gap".to_owned(),
                Some(1) => "1 gap".to_owned(),
                Some(gaps) => format!("{gaps} gaps"),
                None => "gaps unknown".to_owned(),
            };
            let notes = vec![
                html! { "from " (instant(earliest)) },
                html! { "to " (instant(latest)) ", " (gaps) },
            ];
            tile(&duration(span(latest, earliest)), notes, tone)
        }
        (Some(_), None) => {
            let note = html! { "for the first commit after the backup" };
            tile("waiting", vec![note], Tone::Unknown)
        }
        _ if report.last_backup.is_some() && window.refusal.is_some() => {
            let note = html! { "the reason is above" };
            tile("nothing", vec![note], Tone::Bad)
        }
        _ if report.last_backup.is_some() || !report.looked => {
            tile("unknown", vec![html! { "not known yet" }], Tone::Unknown)
        }
        _ => {
            let note = html! { "run " code { "wal-archiver backup" } };
            tile("none yet", vec![note], Tone::Bad)
        }
    }
}

fn lag(report: &ClusterReport) -> Tile {
    let (local, remote) = (&report.durable.local, &report.durable.remote);
    Tile {
        id: "lag",
        term: "Lag",
        value: html! { (bytes(remote.lag_bytes)) },
        notes: vec![
            html! { "this host " (bytes(local.lag_bytes)) },
            html! { "queue " (bytes(Some(report.counters.upload_queue_bytes))) },
        ],
        tone: match remote.lag_bytes {
            None => Tone::Unknown,
            Some(_) => Tone::Plain,
        },
    }
}

fn drill(report: &ClusterReport) -> Tile {
    let (value, notes, tone) = match &report.last_drill {
        None => (
            "none yet",
            vec![html! { "no restore is proved" }],
            Tone::Unknown,
        ),
        Some(drill) => {
            let (value, tone) = match drill.passed {
                true => ("✓ passed", Tone::Plain),
                false => ("✖ failed", Tone::Bad),
            };
            let ago = seconds(Some(span(report.as_of, drill.finished)));
            let notes = vec![
                html! { (ago) " ago" },
                html! { "lost " (seconds(drill.loss_seconds)) },
            ];
            (value, notes, tone)
        }
    };
    Tile {
        id: "drill",
        term: "Last drill",
        value: html! { (value) },
        notes,
        tone,
    }
}
