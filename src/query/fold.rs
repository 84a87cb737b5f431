//! What counts as the same letter when a text is looked for, where a word begins, and where a text was found.
//!
//! Upper and lower case are the same, and so are a Latin letter with and without its accents, whether they are one
//! character or several. Other scripts keep their marks, which there make other letters. `ß` is not `ss`. Any white space
//! is the same as any other, however much of it.
//!
//! A word or phrase is found where it stands at the beginning of a word; the rest of the word may follow. Scripts that
//! put no spaces between words ([`UNSPACED`]) have no such beginnings: there, and for signs, any place will do.
//!
//! What divides words is a list of its own ([`SEPARATORS`]) and not the Unicode version's, because databases know other
//! versions than this program, and all have to agree.

use std::{
    collections::BTreeMap,
    ops::{Range, RangeInclusive},
    sync::LazyLock,
};

use unicode_normalization::UnicodeNormalization;

/// Accents that are characters of their own. They count for nothing.
pub const MARKS: RangeInclusive<char> = '\u{300}'..='\u{36f}';

/// White space, controls, punctuation and symbols: what is no part of a word. Joiners, which stand within words, are not
/// among them.
pub const SEPARATORS: [RangeInclusive<char>; 58] = [
    '\u{1}'..='/',
    ':'..='@',
    '['..='`',
    '{'..='\u{a9}',
    '\u{ab}'..='\u{b4}',
    '\u{b6}'..='\u{b9}',
    '\u{bb}'..='\u{bf}',
    '\u{d7}'..='\u{d7}',
    '\u{f7}'..='\u{f7}',
    '\u{37e}'..='\u{37e}',
    '\u{387}'..='\u{387}',
    '\u{55a}'..='\u{55f}',
    '\u{589}'..='\u{58a}',
    '\u{5be}'..='\u{5be}',
    '\u{5c0}'..='\u{5c0}',
    '\u{5c3}'..='\u{5c3}',
    '\u{5c6}'..='\u{5c6}',
    '\u{5f3}'..='\u{5f4}',
    '\u{60c}'..='\u{60d}',
    '\u{61b}'..='\u{61f}',
    '\u{66a}'..='\u{66d}',
    '\u{6d4}'..='\u{6d4}',
    '\u{700}'..='\u{70d}',
    '\u{964}'..='\u{965}',
    '\u{970}'..='\u{970}',
    '\u{10fb}'..='\u{10fb}',
    '\u{1360}'..='\u{1368}',
    '\u{1400}'..='\u{1400}',
    '\u{166d}'..='\u{166e}',
    '\u{1680}'..='\u{1680}',
    '\u{169b}'..='\u{169c}',
    '\u{16eb}'..='\u{16ed}',
    '\u{1800}'..='\u{180a}',
    '\u{2000}'..='\u{200b}',
    '\u{200e}'..='\u{206f}',
    '\u{20a0}'..='\u{20cf}',
    '\u{2190}'..='\u{245f}',
    '\u{2500}'..='\u{2bff}',
    '\u{2e00}'..='\u{2e2e}',
    '\u{2e30}'..='\u{2e7f}',
    '\u{2ff0}'..='\u{3004}',
    '\u{3008}'..='\u{3020}',
    '\u{3030}'..='\u{3030}',
    '\u{303d}'..='\u{303f}',
    '\u{fd3e}'..='\u{fd3f}',
    '\u{fe00}'..='\u{fe19}',
    '\u{fe30}'..='\u{fe6f}',
    '\u{feff}'..='\u{feff}',
    '\u{ff01}'..='\u{ff0f}',
    '\u{ff1a}'..='\u{ff20}',
    '\u{ff3b}'..='\u{ff40}',
    '\u{ff5b}'..='\u{ff65}',
    '\u{ffe0}'..='\u{fffd}',
    '\u{10100}'..='\u{10102}',
    '\u{1d000}'..='\u{1d1ff}',
    '\u{1f000}'..='\u{1f0ff}',
    '\u{1f18a}'..='\u{1fbef}',
    '\u{e0000}'..='\u{e0fff}',
];

/// Scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Tai, Balinese, Javanese, Yi, Chinese,
/// Japanese; and Korean, where a word is found inside a longer one.
pub const UNSPACED: [RangeInclusive<char>; 20] = [
    '\u{e00}'..='\u{109f}',
    '\u{1100}'..='\u{11ff}',
    '\u{1780}'..='\u{17ff}',
    '\u{1950}'..='\u{19df}',
    '\u{1a20}'..='\u{1aaf}',
    '\u{1b00}'..='\u{1b7f}',
    '\u{3005}'..='\u{3007}',
    '\u{3021}'..='\u{302f}',
    '\u{3031}'..='\u{303c}',
    '\u{3040}'..='\u{318f}',
    '\u{31a0}'..='\u{31bf}',
    '\u{31f0}'..='\u{31ff}',
    '\u{3400}'..='\u{a4cf}',
    '\u{a960}'..='\u{a9ff}',
    '\u{aa60}'..='\u{aa7f}',
    '\u{ac00}'..='\u{d7ff}',
    '\u{f900}'..='\u{faff}',
    '\u{ff66}'..='\u{ffdc}',
    '\u{1b000}'..='\u{1b2ff}',
    '\u{20000}'..='\u{3ffff}',
];

/// Where Unicode has Latin letters with accents.
const LATIN: [RangeInclusive<char>; 2] = ['A'..='\u{24f}', '\u{1e00}'..='\u{1eff}'];

/// Beyond it every character is the same as itself only.
const LAST_WITH_CASE: char = '\u{1ffff}';

/// The characters of each letter that has more than one, by the letter.
static ALIKE: LazyLock<BTreeMap<char, Vec<char>>> = LazyLock::new(|| {
    let mut alike: BTreeMap<char, Vec<char>> = BTreeMap::new();
    for c in '\0'..=LAST_WITH_CASE {
        if let Some(letter) = fold(c).filter(|&letter| letter != c) {
            alike.entry(letter).or_insert_with(|| vec![letter]).push(c);
        }
    }
    for characters in alike.values_mut() {
        characters.sort_unstable();
    }
    alike
});

/// The letter that a character counts as; none for marks.
pub fn fold(c: char) -> Option<char> {
    if MARKS.contains(&c) {
        return None;
    }
    if c.is_whitespace() {
        return Some(' ');
    }
    let lower = c.to_lowercase().next().unwrap_or(c);
    let plain = if is_among(&LATIN, lower) { std::iter::once(lower).nfd().next() } else { None };
    Some(match plain.unwrap_or(lower) {
        // The small sigma of a word's end has no capital of its own.
        'ς' => 'σ',
        letter => letter,
    })
}

/// The letters of a text as they are compared: without marks, white space as one space.
pub fn folded(text: &str) -> String {
    letters(text).into_iter().map(|(_, letter)| letter).collect()
}

/// Every character that counts as this letter, in ascending order.
pub fn alike(letter: char) -> Vec<char> {
    ALIKE.get(&letter).cloned().unwrap_or_else(|| vec![letter])
}

/// Every character that is not its own letter, with its letter; marks are not among them.
pub fn differing() -> impl Iterator<Item = (char, char)> {
    ALIKE.iter().flat_map(|(&letter, characters)| {
        characters.iter().filter(move |&&c| c != letter).map(move |&c| (c, letter))
    })
}

/// Whether the character is no part of a word.
pub fn is_separator(c: char) -> bool {
    is_among(&SEPARATORS, c)
}

/// Whether the character's script puts no spaces between words.
pub fn is_unspaced(c: char) -> bool {
    is_among(&UNSPACED, c)
}

/// Whether what begins with this letter is found only where a word begins.
pub fn begins_a_word(letter: char) -> bool {
    !is_separator(letter) && !is_unspaced(letter)
}

/// Where `needle` stands in `text`, as byte ranges that do not overlap.
pub fn find(text: &str, needle: &str) -> Vec<Range<usize>> {
    let needle: Vec<char> = folded(needle).chars().collect();
    let Some(&first) = needle.first() else {
        return Vec::new();
    };
    let letters = letters(text);
    let is_beginning = |at: usize| !begins_a_word(first) || at == 0 || !begins_a_word(letters[at - 1].1);
    let mut found = Vec::new();
    let mut at = 0;
    while at + needle.len() <= letters.len() {
        let stands_here = letters[at..at + needle.len()].iter().map(|(_, letter)| letter).eq(&needle);
        if !stands_here || !is_beginning(at) {
            at += 1;
            continue;
        }
        let start = letters[at].0;
        at += needle.len();
        found.push(start..letters.get(at).map_or(text.len(), |&(offset, _)| offset));
    }
    found
}

/// The letters with the offset at which each begins.
fn letters(text: &str) -> Vec<(usize, char)> {
    let mut letters: Vec<(usize, char)> = Vec::with_capacity(text.len());
    for (offset, c) in text.char_indices() {
        let Some(letter) = fold(c) else { continue };
        if letter != ' ' || letters.last().is_none_or(|&(_, before)| before != ' ') {
            letters.push((offset, letter));
        }
    }
    letters
}

/// The ranges are in ascending order.
fn is_among(ranges: &[RangeInclusive<char>], c: char) -> bool {
    let place = ranges.partition_point(|range| *range.end() < c);
    ranges.get(place).is_some_and(|range| *range.start() <= c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_accents_make_no_difference() {
        for (one, other) in [
            ("Café", "CAFE"),
            ("cafe\u{301}", "café"),
            ("ĐÂU", "đau"),
            ("ΑΒΓ", "αβγ"),
            ("ΟΔΟΣ", "οδος"),
            ("İstanbul", "istanbul"),
            ("\u{212b}", "a"),
            ("a \r\n\u{a0}b", "A B"),
        ] {
            assert_eq!(folded(one), folded(other), "{one} {other}");
        }
        assert_ne!(folded("が"), folded("か"), "another letter, not an accent");
        assert_ne!(folded("straße"), folded("strasse"));
    }

    #[test]
    fn a_text_is_found_at_the_beginning_of_words() {
        for (text, needle, expected) in [
            ("明日の会議は CAFE\u{301}s, cafés", "café", &["CAFE\u{301}", "café"][..]),
            ("明日の会議は10時", "会議", &["会議"]),
            ("明日の会議は10時", "10", &["10"]),
            ("aaa aa", "aa", &["aa", "aa"]),
            ("the budget", "budg", &["budg"]),
            ("the budget", "udget", &[]),
            ("pre\u{301}budget", "budget", &[]),
            ("file_budget (budget) 😀budget \u{301}budget", "budget", &["budget"; 4]),
            ("at\u{a0}\r\n four", "at four", &["at\u{a0}\r\n four"]),
            ("a[x] 100%", "[x]", &["[x]"]),
            ("a[x] 100%", "%", &["%"]),
            ("שלום עולם", "עולם", &["עולם"]),
            ("می\u{200c}خواهم", "خواهم", &[]),
            ("", "a", &[]),
            ("a", "", &[]),
            ("a", "\u{301}", &[]),
        ] {
            let found: Vec<&str> = find(text, needle).into_iter().map(|range| &text[range]).collect();
            assert_eq!(found, expected, "{needle} in {text}");
        }
    }

    #[test]
    fn alike_letters_are_listed() {
        let alike = alike('e');
        assert!(['e', 'E', 'é', 'Ê', 'ế'].iter().all(|c| alike.contains(c)), "{alike:?}");
        assert!(super::alike('k').contains(&'\u{212a}'));
        assert!(super::alike(' ').contains(&'\u{2003}'));
        assert_eq!(super::alike('会'), ['会']);
        assert_eq!(super::alike('*'), ['*']);
    }

    #[test]
    fn every_character_is_one_kind_of_thing() {
        for c in '\0'..=char::MAX {
            let letter = fold(c);
            assert_eq!(letter.is_none(), MARKS.contains(&c), "{c:?}");
            let letter = letter.unwrap_or(c);
            assert!(letter == c || c <= LAST_WITH_CASE, "{c:?}");
            assert_eq!(fold(letter).unwrap_or(letter), letter, "{c:?}");
            assert_eq!(
                (is_separator(c), is_unspaced(c)),
                (is_separator(letter), is_unspaced(letter)),
                "{c:?}"
            );
            assert!(
                !(is_separator(c) && (is_unspaced(c) || c.is_alphabetic() || MARKS.contains(&c))),
                "{c:?}"
            );
            let divides = c.is_whitespace() || c.is_control() || c.is_ascii_punctuation();
            assert!(is_separator(c) || !divides || c == '\0', "{c:?}");
        }
    }

    #[test]
    fn lists_are_in_order() {
        for list in [&SEPARATORS[..], &UNSPACED] {
            assert!(list.is_sorted_by(|one, next| one.start() <= one.end() && one.end() < next.start()));
        }
    }
}
