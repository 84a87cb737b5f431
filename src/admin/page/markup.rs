//! What becomes of texts that strangers wrote before anybody's browser sees them.

use std::{
    collections::{HashMap, HashSet},
    sync::LazyLock,
};

use ammonia::Builder;

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

/// The words that somebody typed; what stands in quotes is one.
pub(super) fn words(typed: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (number, part) in typed.split('"').enumerate() {
        if number % 2 == 1 {
            words.push(part.trim().to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// One letter in lower case, so that both texts keep their places.
fn lower(c: char) -> char {
    let mut lower = c.to_lowercase();
    match (lower.next(), lower.next()) {
        (Some(lower), None) => lower,
        _ => c,
    }
}

/// A text around the first of the words in it, each of them marked.
pub(super) fn highlighted(text: &str, words: &[String]) -> Vec<Piece> {
    let letters: Vec<char> = text.chars().collect();
    let folded: Vec<char> = letters.iter().copied().map(lower).collect();
    let mut found = vec![false; letters.len()];
    let mut first = None;
    for word in words {
        let word: Vec<char> = word.chars().map(lower).collect();
        if word.is_empty() || word.len() > folded.len() {
            continue;
        }
        for at in 0..=folded.len() - word.len() {
            if folded[at..].starts_with(&word) {
                found[at..at + word.len()].fill(true);
                first = Some(first.map_or(at, |first: usize| first.min(at)));
            }
        }
    }
    let begin = first.unwrap_or(0).saturating_sub(AROUND);
    let end = letters.len().min(first.unwrap_or(0) + 2 * AROUND);
    let mut pieces: Vec<Piece> = Vec::new();
    for at in begin..end {
        match pieces.last_mut() {
            Some(piece) if piece.found == found[at] => piece.text.push(letters[at]),
            _ => pieces.push(Piece { text: letters[at].to_string(), found: found[at] }),
        }
    }
    let dots = || Piece { text: "…".to_owned(), found: false };
    if begin > 0 {
        pieces.insert(0, dots());
    }
    if end < letters.len() {
        pieces.push(dots());
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

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
        highlighted(text, &words(typed))
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
        assert_eq!(shown("aaa", "aa"), "[aaa]");
        assert_eq!(shown("short", "longer than the text"), "short");
        assert_eq!(shown("", "x"), "");
    }

    #[test]
    fn a_long_text_is_shown_around_the_first_place() {
        let text = format!("{}needle{}", "a".repeat(1000), "b".repeat(1000));
        let shown = shown(&text, "needle");
        assert!(shown.starts_with("…a") && shown.ends_with("b…") && shown.contains("[needle]"));
        assert!(shown.chars().count() < 500);
    }
}
