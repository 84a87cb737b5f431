//! What becomes of texts that strangers wrote before anybody's browser sees them.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::LazyLock,
};

use ammonia::Builder;

use crate::query::{Query, fold};

/// Letters shown around the first place that was found.
const AROUND: usize = 160;

/// What is left of a message's HTML: how the text is laid out, and links to the web and to mail. Nothing that loads, runs,
/// styles, or names anything of the page.
static SANITISER: LazyLock<Builder<'static>> = LazyLock::new(|| {
    let mut builder = Builder::empty();
    builder
        .tags(HashSet::from([
            "a",
            "b",
            "blockquote",
            "br",
            "code",
            "div",
            "em",
            "h1",
            "h2",
            "h3",
            "h4",
            "hr",
            "i",
            "li",
            "ol",
            "p",
            "pre",
            "s",
            "span",
            "strong",
            "sub",
            "sup",
            "table",
            "tbody",
            "td",
            "th",
            "thead",
            "tr",
            "u",
            "ul",
        ]))
        .clean_content_tags(HashSet::from([
            "script", "style", "title", "noscript", "svg", "math", "template",
        ]))
        .tag_attributes(HashMap::from([("a", HashSet::from(["href"]))]))
        .url_schemes(HashSet::from(["http", "https", "mailto"]))
        .url_relative(ammonia::UrlRelative::Deny)
        .link_rel(Some("noopener noreferrer nofollow"));
    builder
});

/// HTML that may stand in a page.
pub(super) fn sanitised(html: &str) -> String {
    SANITISER.clean(html).to_string()
}

/// A piece of a text, with whether it is one of the words that were looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) found: bool,
}

/// A text around the first place in it that fits, each of them marked.
pub(super) fn highlighted(text: &str, query: &Query) -> Vec<Piece> {
    let mut found: Vec<Range<usize>> = query.texts().flat_map(|needle| fold::find(text, needle)).collect();
    found.sort_unstable_by_key(|range| range.start);
    let first = found.first().map_or(0, |range| range.start);
    let begin = text[..first].char_indices().rev().nth(AROUND - 1).map_or(0, |(at, _)| at);
    let end = text[first..].char_indices().nth(2 * AROUND).map_or(text.len(), |(at, _)| first + at);
    let mut pieces: Vec<Piece> = Vec::new();
    let mut put = |range: Range<usize>, found: bool| {
        if let Some(text) = text.get(range).filter(|text| !text.is_empty()) {
            pieces.push(Piece { text: text.to_owned(), found });
        }
    };
    let mut at = begin;
    for range in found {
        // Words may overlap, as two beginnings of one word do.
        let range = range.start.max(at)..range.end.min(end);
        if range.start < range.end {
            put(at..range.start, false);
            at = range.end;
            put(range, true);
        }
    }
    put(at..end, false);
    let dots = || Piece { text: "…".to_owned(), found: false };
    if begin > 0 {
        pieces.insert(0, dots());
    }
    if end < text.len() {
        pieces.push(dots());
    }
    pieces
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::query;

    #[test]
    fn of_html_only_the_layout_stays() {
        for (html, left) in [
            ("<b>bold</b> and <i>slanted</i>", "<b>bold</b> and <i>slanted</i>"),
            ("<script>alert(1)</script>text", "text"),
            ("<img src=x onerror=alert(1)>text", "text"),
            ("<p style=\"position:fixed\" class=\"bar\" id=\"main\" onclick=\"x()\">text</p>", "<p>text</p>"),
            ("<svg onload=alert(1)><a>in it</a></svg>text", "text"),
            ("<form action=/outbox><input name=csrf>text</form>", "text"),
            ("<iframe src=//evil.example></iframe><link rel=stylesheet href=//evil.example>text", "text"),
            ("<a href=\"javascript:alert(1)\">link</a>", "<a rel=\"noopener noreferrer nofollow\">link</a>"),
            ("<a href=\"/outbox/1/cancel\">link</a>", "<a rel=\"noopener noreferrer nofollow\">link</a>"),
            (
                "<a href=\"https://contoso.com/\" target=_top>link</a>",
                "<a href=\"https://contoso.com/\" rel=\"noopener noreferrer nofollow\">link</a>",
            ),
        ] {
            assert_eq!(sanitised(html), left, "{html}");
        }
    }

    fn shown(text: &str, typed: &str) -> String {
        highlighted(text, &query::parse(typed, Timestamp::now()).unwrap())
            .into_iter()
            .map(|piece| if piece.found { format!("[{}]", piece.text) } else { piece.text })
            .collect()
    }

    #[test]
    fn what_was_looked_for_is_marked() {
        assert_eq!(shown("The Budget of the budgets", "budget OF"), "The [Budget] [of] the [budget]s");
        assert_eq!(shown("one two three", "\"two three\""), "one [two three]");
        assert_eq!(shown("明日の会議は十時", "会議"), "明日の[会議]は十時");
        assert_eq!(shown("İstanbul ß", "ß"), "İstanbul [ß]");
        assert_eq!(shown("Café CAFE", "cafe"), "[Café] [CAFE]");
        assert_eq!(shown("budget", "budg bud"), "[budg]et");
        assert_eq!(shown("budget", "bud budg"), "[bud][g]et");
        assert_eq!(shown("tea for two", "tea -coffee from:bob"), "[tea] for two");
        assert_eq!(shown("short", "longer than the text"), "short");
        assert_eq!(shown("", "x"), "");
    }

    #[test]
    fn a_long_text_is_shown_around_the_first_place() {
        let text = format!("{} needle{}", "ä".repeat(1000), "b".repeat(1000));
        let shown = shown(&text, "needle");
        assert!(shown.starts_with("…ä") && shown.ends_with("b…") && shown.contains("[needle]"));
        assert!(shown.chars().count() < 500);
    }
}
