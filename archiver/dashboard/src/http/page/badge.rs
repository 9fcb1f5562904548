//! The badge of a state.

use maud::{Markup, html};
use status::state::State;

/// Returns the shape and the word of a state, so that it is recognizable without colours.
pub(in crate::http) fn badge(state: State) -> (&'static str, &'static str) {
    match state {
        State::Ok => ("●", "OK"),
        State::Degraded => ("▲", "DEGRADED"),
        State::AtRisk => ("◆", "AT RISK"),
        State::Broken => ("✖", "BROKEN"),
        State::Unknown => ("?", "UNKNOWN"),
    }
}

pub(super) fn badge_html(state: State) -> Markup {
    let (shape, word) = badge(state);
    html! {
        span class={ "badge " (state.name()) } { span aria-hidden="true" { (shape) } " " (word) }
    }
}
