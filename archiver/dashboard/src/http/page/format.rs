//! Numbers and times as text for users, and the only function that escapes HTML.

use wal_format::PgTimestamp;

pub(super) use status::units::{amount, bytes, duration, seconds, span, without_errno};

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

/// Renders a sentence without error numbers, and the whole text to unfold if it had one.
pub(super) fn details(text: &str) -> String {
    let plain = without_errno(text);
    if plain == text {
        return code(text);
    }
    format!(
        "{} <details class=\"raw\"><summary>Details</summary>{}</details>",
        code(&plain),
        code(text)
    )
}

/// Renders a time element: UTC to the second. The script adds the local time on hover.
pub(super) fn instant(time: PgTimestamp) -> String {
    let text = text(time, "%Y-%m-%d %H:%M:%SZ");
    format!("<time datetime=\"{time}\">{text}</time>")
}

/// Returns the UTC day of a time.
pub(super) fn day(time: PgTimestamp) -> String {
    text(time, "%A, %Y-%m-%d")
}

/// Renders a time element with the UTC time of day only.
pub(super) fn time_of_day(time: PgTimestamp) -> String {
    let text = text(time, "%H:%M:%SZ");
    format!("<time datetime=\"{time}\">{text}</time>")
}

/// Formats a time in UTC by a pattern of `strftime`.
pub(super) fn text(time: PgTimestamp, pattern: &str) -> String {
    time.to_jiff().map_or_else(
        || "unknown".to_owned(),
        |time| time.strftime(pattern).to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers_are_under_details() {
        assert_eq!(details("it is away."), "it is away.");
        let html = details("open <a>: Not found (os error 2).");
        assert!(
            html.starts_with("open &lt;a&gt;: Not found. <details"),
            "{html}"
        );
        assert!(html.contains("Not found (os error 2).</details>"), "{html}");
    }

    #[test]
    fn code_is_set_and_nothing_gets_through() {
        assert_eq!(
            code("run `a <b>` & go"),
            "run <code>a &lt;b&gt;</code> &amp; go"
        );
    }
}
