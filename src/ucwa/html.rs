//! A readable plain rendition of an HTML message, for where only HTML came and for conversations that take no HTML.
//!
//! Block ends become line ends, entities their characters, tags go, links keep their text. No line is wrapped.

use std::panic::catch_unwind;

use html2text::{
    config,
    render::{TaggedLine, TextDecorator},
};

/// Lines are not wrapped: no message is wider than this.
const WIDTH: usize = 1_000_000;
/// HTML nested deeper than this is not rendered but stripped of its tags.
const MAX_DEPTH: usize = 200;
/// Longer HTML is stripped of its tags, too: no message that a person wrote is so long.
const MAX_BYTES: usize = 1024 * 1024;

/// The text that a person would read. Never fails: what can't be rendered has its tags taken out.
pub fn plain_from_html(html: &str) -> String {
    if !is_of_bearable_size(html) {
        return strip_tags(html);
    }
    rendered_by(html, |html| {
        config::with_decorator(PlainText).allow_width_overflow().string_from_read(html.as_bytes(), WIDTH).ok()
    })
}

/// Whether a parser may be let loose on it.
pub(crate) fn is_of_bearable_size(html: &str) -> bool {
    html.len() <= MAX_BYTES && nesting(html) <= MAX_DEPTH
}

/// Also a panic of the renderer, on what a stranger wrote, costs no more than the layout.
fn rendered_by(html: &str, render: fn(&str) -> Option<String>) -> String {
    match catch_unwind(|| render(html)) {
        Ok(Some(text)) => tidy(&text),
        Ok(None) | Err(_) => strip_tags(html),
    }
}

/// An upper bound of how deep elements are nested, cheap enough to be asked of any hostile text.
fn nesting(html: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0_usize);
    for piece in html.split('<').skip(1) {
        match piece.bytes().next() {
            Some(b'/') => depth = depth.saturating_sub(1),
            Some(byte) if byte.is_ascii_alphabetic() => {
                let void = ["br", "img", "hr", "input", "meta", "link", "wbr"].iter().any(|name| {
                    piece.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
                        && !piece[name.len()..].starts_with(|c: char| c.is_ascii_alphanumeric())
                });
                if !void && !piece.split('>').next().unwrap_or_default().ends_with('/') {
                    depth += 1;
                    deepest = deepest.max(depth);
                }
            }
            _ => {}
        }
    }
    deepest
}

fn strip_tags(html: &str) -> String {
    let mut text = String::with_capacity(html.len());
    let mut inside = false;
    for c in html.chars() {
        match c {
            '<' => inside = true,
            '>' if inside => inside = false,
            c if !inside => text.push(c),
            _ => {}
        }
    }
    let unescaped = quick_xml::escape::unescape(&text).map(std::borrow::Cow::into_owned);
    tidy(&unescaped.unwrap_or(text))
}

/// No-break spaces as spaces, no white space at line ends, no empty lines around the text.
fn tidy(text: &str) -> String {
    let lines: Vec<String> =
        text.lines().map(|line| line.replace('\u{a0}', " ").trim_end().to_owned()).collect();
    lines.join("\n").trim_matches('\n').to_owned()
}

/// Adds nothing: neither Markdown's signs nor footnotes.
#[derive(Debug, Clone)]
struct PlainText;

impl TextDecorator for PlainText {
    type Annotation = ();

    fn decorate_link_start(&mut self, _url: &str) -> (String, Self::Annotation) {
        (String::new(), ())
    }
    fn decorate_link_end(&mut self) -> String {
        String::new()
    }
    fn decorate_em_start(&self) -> (String, Self::Annotation) {
        (String::new(), ())
    }
    fn decorate_em_end(&self) -> String {
        String::new()
    }
    fn decorate_strong_start(&self) -> (String, Self::Annotation) {
        (String::new(), ())
    }
    fn decorate_strong_end(&self) -> String {
        String::new()
    }
    fn decorate_strikeout_start(&self) -> (String, Self::Annotation) {
        (String::new(), ())
    }
    fn decorate_strikeout_end(&self) -> String {
        String::new()
    }
    fn decorate_code_start(&self) -> (String, Self::Annotation) {
        (String::new(), ())
    }
    fn decorate_code_end(&self) -> String {
        String::new()
    }
    fn decorate_preformat_first(&self) -> Self::Annotation {}
    fn decorate_preformat_cont(&self) -> Self::Annotation {}
    fn decorate_image(&mut self, _src: &str, title: &str) -> (String, Self::Annotation) {
        (title.to_owned(), ())
    }
    fn header_prefix(&self, _level: usize) -> String {
        String::new()
    }
    fn quote_prefix(&self) -> String {
        "> ".to_owned()
    }
    fn unordered_item_prefix(&self) -> String {
        "- ".to_owned()
    }
    fn ordered_item_prefix(&self, number: i64) -> String {
        format!("{number}. ")
    }
    fn make_subblock_decorator(&self) -> Self {
        self.clone()
    }
    fn finalise(&mut self, _links: Vec<String>) -> Vec<TaggedLine<()>> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_makes_it_panic(
            text in any::<String>(),
            pieces in prop::collection::vec(
                prop::sample::select(vec![
                    "<div>", "</div>", "<b", "<table><tr><td>", "</table>", "<br/>", "&nbsp;", "&#0;", "&#xD800;",
                    "<!--", "-->", "<a href=\"", "\">", "<li>", "word", "<pre>", "\0", "שלום",
                ]),
                0..24,
            ),
        ) {
            plain_from_html(&text);
            plain_from_html(&pieces.concat());
        }
    }

    #[test]
    fn what_clients_write_becomes_what_people_read() {
        for (html, text) in [
            ("<span style=\"font-size:10pt\">Hello!</span>", "Hello!"),
            ("<div>one</div><div>two</div>", "one\ntwo"),
            ("one<br>two<br/>three", "one\ntwo\nthree"),
            ("a &amp; b &lt;c&gt; &#x1F600; &nbsp;d", "a & b <c> \u{1F600}  d"),
            ("see <a href=\"https://x.example/y\">the page</a>", "see the page"),
            ("<b>bold</b> <i>it</i> <strike>no</strike> <code>x</code>", "bold it no x"),
            ("<ul><li>one</li><li>two</li></ul>", "- one\n- two"),
            ("<script>alert(1)</script>left", "left"),
            ("", ""),
            ("plain", "plain"),
            ("<p dir=\"rtl\">שלום</p>", "שלום"),
        ] {
            assert_eq!(plain_from_html(html), text, "{html}");
        }
        let long = "word ".repeat(400);
        assert_eq!(plain_from_html(&long), long.trim_end());
    }

    #[test]
    fn hostile_nesting_is_stripped_and_not_rendered() {
        let deep = format!("{}text{}", "<div>".repeat(100_000), "</div>".repeat(100_000));
        assert_eq!(plain_from_html(&deep), "text");
        let unclosed = format!("{}text", "<b>".repeat(100_000));
        assert_eq!(plain_from_html(&unclosed), "text");
    }

    #[test]
    fn a_renderer_that_fails_or_panics_costs_only_the_layout() {
        assert_eq!(rendered_by("<p>one <b>two</b></p>", |_| None), "one two");
        assert_eq!(rendered_by("<p>one <b>two</b></p>", |_| panic!("a bug")), "one two");
    }
}
