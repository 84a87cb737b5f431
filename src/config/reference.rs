//! Every key as people read about it: `config/default.toml` says what a key is for and what it is unless somebody sets
//! it, the structs say which keys there are and what each takes.
//!
//! Whoever adds a key to a struct and not to the file is told by a test, and the other way round; `docs/configuration.md`
//! and the manual page are made of what stands here.

use super::load::{expected_values, keys_by_section};

/// The file whose comments are the reference.
pub(super) const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// One `[section]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionReference {
    /// `database`; `accounts` for the table that may stand there several times.
    pub name: &'static str,
    /// What stands above the section in the file; usually nothing.
    pub meaning: String,
    /// In the file's order.
    pub keys: Vec<KeyReference>,
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyReference {
    /// Without its section.
    pub name: &'static str,
    /// What it is for, in sentences; says units, limits and what happens without it.
    pub meaning: String,
    /// What it takes: `a whole number`, `one of "hold", "retry"`.
    pub values: String,
    /// As TOML writes it. `None`: no fixed default, the meaning tells what happens without the key.
    pub default: Option<String>,
    /// As TOML writes them, of keys without a fixed default.
    pub examples: Vec<String>,
}

/// Reads the reference out of `config/default.toml`: comments above a key are about it, and a key that is commented out
/// is one without a fixed default.
pub fn reference() -> Vec<SectionReference> {
    let known = keys_by_section();
    let mut sections: Vec<SectionReference> = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in DEFAULT_TOML.lines() {
        let is_comment = line.starts_with('#');
        let text = line.trim_start_matches(['#', ' ']);
        if text.is_empty() {
            comment.clear();
            continue;
        }
        let heading = text.strip_prefix('[').map(|name| name.trim_matches(['[', ']']));
        if let Some((name, _)) = known.iter().find(|(name, _)| heading == Some(*name)) {
            sections.push(SectionReference { name, meaning: comment.join(" "), keys: Vec::new() });
            comment.clear();
            continue;
        }
        let assignment = sections.last_mut().and_then(|section| {
            let (name, value) = text.split_once(" = ")?;
            let (_, keys) = known.iter().find(|(known, _)| *known == section.name)?;
            Some((keys.iter().find(|key| **key == name)?, value.to_owned(), section))
        });
        let Some((name, value, section)) = assignment else {
            comment.push(text);
            continue;
        };
        if let Some(key) = section.keys.iter_mut().find(|key| key.name == *name) {
            key.examples.push(value);
            continue;
        }
        section.keys.push(KeyReference {
            name,
            meaning: std::mem::take(&mut comment).join(" "),
            values: expected_values(section.name, name),
            default: (!is_comment).then(|| value.clone()),
            examples: if is_comment { vec![value] } else { Vec::new() },
        });
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_structs_is_told_about_and_says_what_it_takes() {
        let told: Vec<(&str, Vec<&str>)> = reference()
            .iter()
            .map(|section| (section.name, section.keys.iter().map(|key| key.name).collect()))
            .collect();
        let sorted = |keys: &[&'static str]| {
            let mut keys = keys.to_vec();
            keys.sort_unstable();
            keys
        };
        let mut told: Vec<_> = told.into_iter().map(|(section, keys)| (section, sorted(&keys))).collect();
        let mut known: Vec<_> =
            keys_by_section().into_iter().map(|(section, keys)| (section, sorted(keys))).collect();
        told.sort_unstable();
        known.sort_unstable();
        assert_eq!(told, known);
        for section in reference() {
            for key in &section.keys {
                assert!(key.meaning.ends_with('.'), "{}.{} has no sentence: {key:?}", section.name, key.name);
                assert!(!key.values.is_empty(), "{}.{} takes nothing", section.name, key.name);
            }
        }
    }

    #[test]
    fn what_a_key_takes_is_told_in_words() {
        let sections = reference();
        let values = |section: &str, name: &str| {
            let section = sections.iter().find(|known| known.name == section).unwrap();
            section.keys.iter().find(|key| key.name == name).unwrap().values.clone()
        };
        assert_eq!(values("outbox", "uncertain"), "one of `\"hold\"`, `\"retry\"`");
        assert_eq!(values("outbox", "poll_ms"), "a whole number");
        assert_eq!(values("outbox", "max_attempts"), "a whole number above 0");
        assert_eq!(values("archive", "typing"), "true or false");
        assert_eq!(values("admin", "token_file"), "a path");
        assert_eq!(values("admin", "names"), "a list of texts");
        assert_eq!(values("accounts", "password"), "a table with one of `env`, `file`, `credential`");
    }
}
