//! What people said, for people: as plain text and as HTML that runs nothing and loads nothing.

use std::{borrow::Cow, fmt::Write, panic::catch_unwind, sync::LazyLock};

use ammonia::{Builder, UrlRelative};

use crate::{
    store::{ArchivedMessage, ConversationDetails, Stay},
    ucwa::html::is_of_bearable_size,
};

/// Lets through how text looks, and links; no picture, because a picture tells its server who looked at it and when.
static SANITISER: LazyLock<Builder<'static>> = LazyLock::new(|| {
    let mut builder = Builder::default();
    builder
        .rm_tags(["img", "map", "area", "picture", "figure"])
        .url_schemes(["http", "https", "mailto", "sip", "sips", "tel"].into())
        .url_relative(UrlRelative::Deny)
        .link_rel(Some("noopener noreferrer nofollow"));
    builder
});

/// A text as HTML shows it.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 8);
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(c),
            // HTML has no way to write other control characters.
            _ if c.is_control() => escaped.push('\u{fffd}'),
            _ => escaped.push(c),
        }
    }
    escaped
}

/// The name of who wrote a message, with the address where both are known.
pub(super) fn sender(message: &ArchivedMessage) -> String {
    person(message.message.sender_name.as_deref(), message.message.sender_uri.as_deref())
}

fn person(name: Option<&str>, uri: Option<&str>) -> String {
    match (name.filter(|name| !name.trim().is_empty()), uri) {
        (Some(name), Some(uri)) => format!("{name} <{uri}>"),
        (Some(name), None) => name.to_owned(),
        (None, Some(uri)) => uri.to_owned(),
        (None, None) => "(unknown sender)".to_owned(),
    }
}

/// The plain text, or what stands in its place.
pub(super) fn text(message: &ArchivedMessage) -> Cow<'_, str> {
    match &message.message.purged_at {
        Some(at) => Cow::Owned(format!("[purged at {at}]")),
        None => Cow::Borrowed(&message.message.body),
    }
}

/// The text as a piece of HTML: what came as HTML sanitised, anything else with its line ends.
pub(super) fn html(message: &ArchivedMessage) -> String {
    let sanitised = message
        .message
        .body_html
        .as_deref()
        .filter(|html| message.message.purged_at.is_none() && is_of_bearable_size(html))
        .and_then(|html| catch_unwind(|| SANITISER.clean(html).to_string()).ok());
    match sanitised {
        Some(html) => html,
        None => escaped(&text(message)).replace('\n', "<br>\n"),
    }
}

/// Whether it arrived, where it did not.
pub(super) fn failure(message: &ArchivedMessage) -> Option<String> {
    (message.status == "failed").then(|| {
        let words = [&message.code, &message.subcode, &message.reason, &message.failed_recipients];
        let words: Vec<&str> = words.into_iter().flatten().map(String::as_str).collect();
        format!("not delivered{}{}", if words.is_empty() { "" } else { ": " }, words.join(", "))
    })
}

/// Who took part, one stay a line.
pub(super) fn stays(conversation: &ConversationDetails) -> Vec<String> {
    conversation.stays.iter().map(stay).collect()
}

fn stay(stay: &Stay) -> String {
    let mut line = person(stay.display_name.as_deref(), stay.sip_uri.as_deref());
    if stay.is_local {
        line.push_str(" (this account)");
    }
    for (what, at) in [("joined", &stay.joined_at), ("left", &stay.left_at)] {
        if let Some(at) = at {
            let _infallible = write!(line, ", {what} {at}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_runs_or_loads_gets_through() {
        let html = "<p onclick=x()>Hi <b>you</b><img src=https://evil/x.gif><script>x()</script>\
                    <a href=javascript:x()>a</a><a href=https://ok/>b</a><style>p{}</style><svg/onload=x()>";
        let clean = SANITISER.clean(html).to_string();
        for part in ["onclick", "img", "evil", "script", "style", "svg"] {
            assert!(!clean.contains(part), "{part}: {clean}");
        }
        assert!(clean.contains("<b>you</b>") && clean.contains("href=\"https://ok/\""), "{clean}");
        assert_eq!(escaped("<a href=\"'&\u{1b}\n"), "&lt;a href=&quot;&#39;&amp;\u{fffd}\n");
    }
}
