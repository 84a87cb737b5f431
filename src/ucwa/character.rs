//! Characters that a payload can carry and a text in a database cannot.
//!
//! Whatever the server sends passes through here once, on its way out of XML, JSON or a data URI, so that both databases
//! hold the same: NUL stands as U+2400 (SYMBOL FOR NUL), because PostgreSQL has no NUL, and half a surrogate pair as
//! U+FFFD, because UTF-8 has none. Every other control character is kept as it came.

use std::borrow::Cow;

/// A text as both databases can hold it.
pub fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "\u{2400}")) } else { Cow::Borrowed(text) }
}

/// A text with character references, put together piece by piece.
///
/// XML forbids references to NUL, to most control characters and to surrogates; servers write them all the same where
/// somebody's name or subject has such a character, and a message is not lost for it.
#[derive(Debug, Default)]
pub(super) struct Unescaped {
    text: String,
    /// The first half of a surrogate pair, whose second half may follow.
    half: Option<u16>,
}

impl Unescaped {
    pub(super) fn push_str(&mut self, piece: &str) {
        if !piece.is_empty() {
            self.end_pair();
            self.text.push_str(&storable(piece));
        }
    }

    /// Adds what the reference `&name;` stands for. False if there is no such entity or number.
    pub(super) fn push_reference(&mut self, name: &str) -> bool {
        let Some(number) = name.strip_prefix('#') else {
            let Some(value) = quick_xml::escape::resolve_predefined_entity(name) else { return false };
            self.push_str(value);
            return true;
        };
        let (digits, radix) = number.strip_prefix('x').map_or((number, 10), |digits| (digits, 16));
        if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
            return false;
        }
        // Digits only: what does not fit is no character.
        let code = u32::from_str_radix(digits, radix).unwrap_or(u32::MAX);
        match (u16::try_from(code), self.half) {
            (Ok(half @ 0xD800..=0xDBFF), _) => {
                self.end_pair();
                self.half = Some(half);
            }
            (Ok(second @ 0xDC00..=0xDFFF), Some(first)) => {
                self.half = None;
                self.text.extend(char::decode_utf16([first, second]).map(|half| half.unwrap_or('\u{fffd}')));
            }
            _ => {
                self.end_pair();
                let character = char::from_u32(code).unwrap_or('\u{fffd}');
                self.text.push(if character == '\0' { '\u{2400}' } else { character });
            }
        }
        true
    }

    fn end_pair(&mut self) {
        if self.half.take().is_some() {
            self.text.push('\u{fffd}');
        }
    }

    pub(super) fn finish(mut self) -> String {
        self.end_pair();
        self.text
    }
}

/// Resolves the references of an attribute's value. `None` if one of them means nothing.
pub(super) fn unescape(value: &str) -> Option<String> {
    let mut unescaped = Unescaped::default();
    let mut pieces = value.split('&');
    let white_space = |piece: &str| piece.replace(['\t', '\r', '\n'], " ");
    unescaped.push_str(&white_space(pieces.next().unwrap_or_default()));
    for piece in pieces {
        let (name, rest) = piece.split_once(';')?;
        if !unescaped.push_reference(name) {
            return None;
        }
        unescaped.push_str(&white_space(rest));
    }
    Some(unescaped.finish())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_nul_is_stored_as_its_symbol() {
        assert_eq!(storable("a\0b"), "a\u{2400}b");
        assert_eq!(storable("a\u{1}b"), "a\u{1}b");
    }

    #[test]
    fn references_that_xml_forbids_are_read_as_far_as_they_mean_something() {
        for (value, text) in [
            ("a&#0;b", "a\u{2400}b"),
            ("a&#x1;b&#x1F;", "a\u{1}b\u{1f}"),
            ("&#xD83D;&#xDE00;!", "\u{1F600}!"),
            ("&#xD83D;!", "\u{fffd}!"),
            ("&#xDE00;&#xD83D;", "\u{fffd}\u{fffd}"),
            ("&#xD83D;&#xD83D;&#xDE00;", "\u{fffd}\u{1F600}"),
            ("&#x110000;&#99999999999999;", "\u{fffd}\u{fffd}"),
            ("&lt;&amp;&#65;&#x42;", "<&AB"),
            ("one\ntwo", "one two"),
        ] {
            assert_eq!(unescape(value).as_deref(), Some(text), "{value}");
        }
        for value in ["&", "&amp", "&nbsp;", "&#;", "&#x;", "&#-1;", "&#+1;", "&#xg;"] {
            assert_eq!(unescape(value), None, "{value}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic_and_no_nul_gets_through(value in "(&#x?[0-9a-fA-F]{0,9};|&[a-z]{0,4};?|.|\\PC){0,20}") {
            prop_assert!(!unescape(&value).unwrap_or_default().contains('\0'));
        }

        #[test]
        fn what_was_escaped_by_number_is_read_back(text in any::<String>()) {
            let escaped: String = text.chars().fold(String::new(), |escaped, c| format!("{escaped}&#{};", c as u32));
            prop_assert_eq!(unescape(&escaped), Some(storable(&text).into_owned()));
        }

        #[test]
        fn what_was_escaped_by_utf16_unit_is_read_back(text in any::<String>()) {
            let escaped: String = text.encode_utf16().fold(String::new(), |escaped, unit| format!("{escaped}&#x{unit:X};"));
            prop_assert_eq!(unescape(&escaped), Some(storable(&text).into_owned()));
        }
    }
}
