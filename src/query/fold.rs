//! What counts as the same letter when a text is looked for, and where it was found.
//!
//! Upper and lower case are the same, and so are a Latin letter with and without its accents, whether they are one
//! character or several. Other scripts keep their marks, which there make other letters. `ß` is not `ss`.

use std::ops::Range;

use unicode_normalization::{UnicodeNormalization, char::is_combining_mark};

/// The letters of a text as they are compared.
pub fn folded(text: &str) -> impl Iterator<Item = char> {
    text.chars().flat_map(fold)
}

/// Where `needle` stands in `text`, as byte ranges that do not overlap.
pub fn find(text: &str, needle: &str) -> Vec<Range<usize>> {
    let needle: Vec<char> = folded(needle).collect();
    let letters: Vec<(usize, char)> =
        text.char_indices().flat_map(|(offset, c)| fold(c).map(move |folded| (offset, folded))).collect();
    let mut found = Vec::new();
    let mut at = 0;
    while !needle.is_empty() && at + needle.len() <= letters.len() {
        if !letters[at..at + needle.len()].iter().map(|(_, c)| c).eq(&needle) {
            at += 1;
            continue;
        }
        let start = letters[at].0;
        at += needle.len();
        found.push(start..letters.get(at).map_or(text.len(), |&(offset, _)| offset));
    }
    found
}

/// Every character that counts as the same as this one, for databases that compare exactly.
pub fn alike(c: char) -> Vec<char> {
    let wanted: Vec<char> = fold(c).collect();
    let mut alike: Vec<char> =
        LATIN.into_iter().flatten().filter(|&other| fold(other).eq(wanted.iter().copied())).collect();
    alike.extend(c.to_lowercase().chain(c.to_uppercase()).chain([c]));
    alike.sort_unstable();
    alike.dedup();
    alike
}

/// Where Unicode has Latin letters with accents.
const LATIN: [std::ops::RangeInclusive<char>; 2] = ['A'..='\u{24f}', '\u{1e00}'..='\u{1eff}'];

fn fold(c: char) -> impl Iterator<Item = char> {
    let plain = if is_combining_mark(c) && c < '\u{370}' {
        None
    } else if LATIN.iter().any(|letters| letters.contains(&c)) {
        std::iter::once(c).nfd().next()
    } else {
        Some(c)
    };
    plain.into_iter().flat_map(char::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_accents_make_no_difference() {
        for (one, other) in [("Café", "CAFE"), ("cafe\u{301}", "café"), ("ĐÂU", "đau"), ("ΑΒΓ", "αβγ")]
        {
            assert!(folded(one).eq(folded(other)), "{one} {other}");
        }
        assert!(!folded("が").eq(folded("か")), "another letter, not an accent");
        assert!(!folded("straße").eq(folded("strasse")));
    }

    #[test]
    fn a_text_is_found_where_it_stands() {
        let text = "明日の会議は CAFE\u{301}s, cafés";
        let found: Vec<&str> = find(text, "café").into_iter().map(|range| &text[range]).collect();
        assert_eq!(found, ["CAFE\u{301}", "café"]);
        assert_eq!(find(text, "会議").len(), 1);
        assert_eq!(find("aaa", "aa").len(), 1, "they do not overlap");
        assert!(find("", "a").is_empty() && find("a", "").is_empty());
    }

    #[test]
    fn alike_letters_are_listed() {
        let alike = alike('e');
        assert!(['e', 'E', 'é', 'Ê', 'ế'].iter().all(|c| alike.contains(c)), "{alike:?}");
        assert_eq!(super::alike('会'), ['会']);
        assert_eq!(super::alike('*'), ['*']);
    }
}
