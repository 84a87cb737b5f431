//! A text that is looked for, as databases look for it: an expression that decides, and words that choose candidates.
//!
//! The expression says the same as [`fold::find`]; it is written in what PostgreSQL's and Rust's regular expressions have
//! in common, every character as an escape. An index only saves a database from trying it on every text.

use std::{fmt::Write, ops::RangeInclusive};

use super::fold;

/// A word of a text that is looked for, folded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// Its letters; a single one in scripts without spaces.
    pub letters: String,
    /// More letters may follow.
    pub is_open: bool,
}

/// A regular expression that is found in texts which have `text` in them.
pub fn expression(text: &str) -> String {
    let folded = fold::folded(text);
    let marks = class(std::iter::once(fold::MARKS), "*");
    let mut pattern = String::new();
    if folded.chars().next().is_some_and(fold::begins_a_word) {
        let before = class(fold::SEPARATORS.into_iter().chain(fold::UNSPACED), "");
        let _infallible = write!(pattern, "(?:^|{before}){marks}");
    }
    for letter in folded.chars() {
        let alike = fold::alike(letter);
        pattern.push_str(&class(ranges(&alike), ""));
        if letter == ' ' {
            pattern.push_str(&class(ranges(&alike).into_iter().chain([fold::MARKS]), "*"));
        } else {
            pattern.push_str(&marks);
        }
    }
    pattern
}

/// The words that a text has in it if `text` is found there. None if that has only signs.
pub fn words(text: &str) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    let mut goes_on = false;
    for letter in fold::folded(text).chars() {
        let is_letter = fold::begins_a_word(letter);
        if let Some(word) = words.last_mut().filter(|_| goes_on) {
            if is_letter {
                word.letters.push(letter);
            } else {
                word.is_open = false;
            }
        }
        let is_in_word = is_letter && goes_on;
        if !(is_in_word || fold::is_separator(letter)) {
            words.push(Word { letters: letter.into(), is_open: is_letter });
        }
        goes_on = is_letter;
    }
    words
}

/// A text as an index of words takes it: its [words], with spaces between them.
pub fn indexed(text: &str) -> String {
    let words: Vec<String> = words(text).into_iter().map(|word| word.letters).collect();
    words.join(" ")
}

/// A bracket expression with these characters.
pub fn class(ranges: impl IntoIterator<Item = RangeInclusive<char>>, times: &str) -> String {
    let mut class = "[".to_owned();
    for range in ranges {
        class.push_str(&escaped(*range.start()));
        if range.start() != range.end() {
            class.push('-');
            class.push_str(&escaped(*range.end()));
        }
    }
    class + "]" + times
}

/// The same characters as ranges; they have to be in ascending order.
pub fn ranges(characters: &[char]) -> Vec<RangeInclusive<char>> {
    let mut ranges: Vec<RangeInclusive<char>> = Vec::new();
    for &c in characters {
        match ranges.last_mut() {
            Some(range) if u32::from(*range.end()) + 1 == u32::from(c) => *range = *range.start()..=c,
            _ => ranges.push(c..=c),
        }
    }
    ranges
}

fn escaped(c: char) -> String {
    let code = u32::from(c);
    if code > 0xffff { format!("\\U{code:08x}") } else { format!("\\u{code:04x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        let shown: Vec<String> =
            words(text).into_iter().map(|word| word.letters + if word.is_open { "*" } else { "" }).collect();
        shown.join(" ")
    }

    #[test]
    fn words_are_told_apart_and_only_the_last_may_go_on() {
        for (text, expected) in [
            ("Budg", "budg*"),
            ("quarterly BUDG", "quarterly budg*"),
            ("quarterly budget.", "quarterly budget"),
            ("https://contoso.com/a", "https contoso com a*"),
            ("明日の会議は10時", "明 日 の 会 議 は 10 時"),
            ("né", "ne*"),
            ("a-b", "a b*"),
            ("%😀", ""),
        ] {
            assert_eq!(shown(text), expected, "{text}");
        }
    }

    #[test]
    fn expressions_are_made_of_escapes() {
        let of = |text| expression(text).replace("[\\u0300-\\u036f]*", "~");
        assert_eq!(of("会*"), "[\\u4f1a]~[\\u002a]~");
        let word = of("e");
        assert!(
            word.starts_with("(?:^|[\\u0001-\\u002f") && word.contains(")~[\\u0045\\u0065\\u00c8-"),
            "{word}"
        );
        assert_eq!(ranges(&['a', 'b', 'c', 'x']), ['a'..='c', 'x'..='x']);
    }
}
