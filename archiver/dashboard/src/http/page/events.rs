//! The events, newest first, under a heading for each day. A link chooses the kinds that are shown.

use maud::{Markup, html};
use status::units;

use super::{
    alerts::displayed,
    format::{day, details, time_of_day},
    view::{Shown, View},
};
use crate::monitor::events::Event;

/// The maximum number of rows. The API has all events.
const ROWS_MAX: usize = 40;

pub(super) fn render(view: &View<'_>) -> Markup {
    let events = view.cluster.events().after(0);
    let newest = events.iter().rev();
    let newest = newest.filter(|event| view.shown.has(&event.kind));
    let newest: Vec<_> = newest.take(ROWS_MAX).collect();
    html! {
        section class="card" id="events" data-live aria-labelledby="events-title" {
            div class="card-head" {
                h2 id="events-title" { "Events" }
                nav class="ranges" aria-label="Kinds of events" {
                    @for shown in Shown::ALL {
                        @let current = (shown == view.shown).then_some("true");
                        a href={ "?events=" (shown.name()) "#events" } aria-current=[current] {
                            (shown.title())
                        }
                    }
                }
            }
            @if newest.is_empty() {
                p class="empty" { "Nothing of this kind has happened." }
            } @else {
                (log(&newest, &displayed(view.report)))
            }
        }
    }
}

/// Renders the events. Shortens the texts that the page shows in full elsewhere.
fn log(newest: &[&Event], displayed: &[&str]) -> Markup {
    html! {
        div class="scroll" tabindex="0" role="group" aria-labelledby="events-title" {
            table class="log" {
                thead {
                    tr {
                        th scope="col" { "Time, UTC" }
                        th scope="col" { "Kind" }
                        th scope="col" { "What happened" }
                    }
                }
                tbody {
                    @for of_day in newest.chunk_by(|one, next| day(one.time) == day(next.time)) {
                        tr class="day" {
                            th scope="rowgroup" colspan="3" { (day(of_day[0].time)) }
                        }
                        @for event in of_day {
                            tr class=(event.severity) {
                                td { (time_of_day(event.time)) }
                                td { (event.kind) }
                                td { (details(&units::shorten(&event.message, displayed))) }
                            }
                        }
                    }
                }
            }
        }
    }
}
