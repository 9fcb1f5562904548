//! The events, newest first, under a heading for each day. A link chooses the kinds that are shown.

use std::fmt::Write as _;

use status::units;

use super::{
    alerts::displayed,
    format::{day, details, escape, time_of_day},
    view::{Shown, View},
};

/// The maximum number of rows. The API has all events.
const ROWS_MAX: usize = 40;

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let _ = draw(out, view);
}

fn draw(out: &mut String, view: &View<'_>) -> std::fmt::Result {
    out.push_str(
        "<section class=\"card\" id=\"events\" data-live aria-labelledby=\"events-title\">\
         <div class=\"card-head\"><h2 id=\"events-title\">Events</h2>\
         <nav class=\"ranges\" aria-label=\"Kinds of events\">",
    );
    for shown in Shown::ALL {
        let current = if shown == view.shown {
            " aria-current=\"true\""
        } else {
            ""
        };
        write!(
            out,
            "<a href=\"?events={}#events\"{current}>{}</a>",
            shown.name(),
            shown.title()
        )?;
    }
    out.push_str("</nav></div>");
    let events = view.cluster.events().after(0);
    let newest = events
        .iter()
        .rev()
        .filter(|event| view.shown.has(&event.kind));
    let newest: Vec<_> = newest.take(ROWS_MAX).collect();
    if newest.is_empty() {
        out.push_str("<p class=\"empty\">Nothing of this kind has happened.</p></section>");
        return Ok(());
    }
    out.push_str(
        "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-labelledby=\"events-title\"><table class=\"log\">\
         <thead><tr><th scope=\"col\">Time, UTC</th><th scope=\"col\">Kind</th>\
         <th scope=\"col\">What happened</th></tr></thead><tbody>",
    );
    let displayed = displayed(view.report);
    let mut heading = String::new();
    for event in newest {
        let of_event = day(event.time);
        if heading != of_event {
            heading = of_event;
            write!(
                out,
                "<tr class=\"day\"><th scope=\"rowgroup\" colspan=\"3\">{heading}</th></tr>"
            )?;
        }
        write!(
            out,
            "<tr class=\"{}\"><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&event.severity),
            time_of_day(event.time),
            escape(&event.kind),
            details(&units::shorten(&event.message, &displayed))
        )?;
    }
    out.push_str("</tbody></table></div></section>");
    Ok(())
}
