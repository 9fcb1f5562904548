//! Numbers and times as text for users, and the only function that escapes HTML.

use wal_format::PgTimestamp;

pub(super) use crate::report::words::{amount, bytes, duration, seconds, span};

/// Escapes text for use in HTML text and attributes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Escapes text, and marks parts in backquotes as code.
pub(super) fn code(text: &str) -> String {
    let parts = escape(text);
    let mut html = String::new();
    for (number, part) in parts.split('`').enumerate() {
        if number % 2 == 1 {
            html += &format!("<code>{part}</code>");
        } else {
            html += part;
        }
    }
    html
}

/// Renders a time element: UTC to the second. The script adds the local time on hover.
pub(super) fn instant(time: PgTimestamp) -> String {
    let text = time.to_jiff().map_or_else(
        || "unknown".to_owned(),
        |time| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
    );
    format!("<time datetime=\"{time}\">{text}</time>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_set_and_nothing_gets_through() {
        assert_eq!(
            code("run `a <b>` & go"),
            "run <code>a &lt;b&gt;</code> &amp; go"
        );
    }
}
