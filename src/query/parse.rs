//! From what a person typed to a [`Query`], or to where it can't be understood and what would be right.

use jiff::Timestamp;

use super::{Condition, Person, Query, Term, fold, when};

/// Longest text that can be looked for, in characters.
const MAX_TEXT: usize = 200;
const FIELDS: [&str; 6] = ["from", "with", "account", "after", "before", "has"];
/// The typed one, and the one that typesetters and [`crate::cli`] use.
const MINUS: [char; 2] = ['-', '\u{2212}'];
const QUOTES: [char; 3] = ['"', '“', '„'];
const CLOSING_QUOTES: [char; 3] = ['"', '”', '“'];

/// What is wrong with a query, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the query can't be understood at character {position}: {problem}\n  {query}\n  {}^", " ".repeat(position - 1))]
pub struct QuerySyntaxError {
    /// From 1, in characters.
    pub position: usize,
    /// What is wrong there and what would be right.
    pub problem: String,
    query: String,
}

/// Reads a query. `now` is what times like `2h` are counted from.
pub fn parse(text: &str, now: Timestamp) -> Result<Query, QuerySyntaxError> {
    let mut reader = Reader { text, characters: text.char_indices().collect(), at: 0, now };
    let mut query = Query::default();
    while let Some(term) = reader.term()? {
        query.terms.push(term);
    }
    Ok(query)
}

/// Whether a text looked for can be written without quotation marks.
pub(super) fn is_bare_word(text: &str) -> bool {
    !text.contains(char::is_whitespace)
        && !text.starts_with(MINUS)
        && !text.starts_with(QUOTES)
        && field_of(text).is_none()
}

/// The letters before a colon that make a word a field: not those of an address (`https://`).
fn field_of(word: &str) -> Option<&str> {
    let (name, rest) = word.split_once(':')?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphabetic());
    (is_name && !rest.starts_with("//")).then_some(name)
}

struct Reader<'a> {
    text: &'a str,
    characters: Vec<(usize, char)>,
    at: usize,
    now: Timestamp,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<char> {
        self.characters.get(self.at).map(|&(_, c)| c)
    }

    fn offset(&self, place: usize) -> usize {
        self.characters.get(place).map_or(self.text.len(), |&(offset, _)| offset)
    }

    fn refuse(&self, place: usize, problem: impl Into<String>) -> QuerySyntaxError {
        // One line, so that the caret stands below its character.
        let query = self.text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        QuerySyntaxError { position: place + 1, problem: problem.into(), query }
    }

    fn term(&mut self) -> Result<Option<Term>, QuerySyntaxError> {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
        let start = self.at;
        let negated = self.peek().is_some_and(|c| MINUS.contains(&c));
        if negated {
            self.at += 1;
        }
        match self.peek() {
            None if !negated => return Ok(None),
            Some(c) if !(c.is_whitespace() || negated && MINUS.contains(&c)) => (),
            _ => {
                return Err(self.refuse(
                    start,
                    "a minus needs the word that messages must not have right behind it: -draft; to look for the \
                     minus itself, write \"-\"",
                ));
            }
        }
        let condition = self.condition()?;
        Ok(Some(Term { negated, condition }))
    }

    fn condition(&mut self) -> Result<Condition, QuerySyntaxError> {
        let start = self.at;
        if self.peek().is_some_and(|c| QUOTES.contains(&c)) {
            let text = self.quoted()?;
            return self.looked_for(start, text);
        }
        let rest = &self.text[self.offset(start)..];
        let word = rest.split(char::is_whitespace).next().unwrap_or_default();
        let Some(name) = field_of(word) else {
            let word = self.word();
            return self.looked_for(start, word);
        };
        self.at += name.len() + 1;
        let field = name.to_ascii_lowercase();
        if !FIELDS.contains(&field.as_str()) {
            return Err(self.refuse(
                start,
                format!(
                    "there is no field {name}: (there are {}:); to look for the text, write \"{word}\"",
                    FIELDS.join(":, ")
                ),
            ));
        }
        let value_at = self.at;
        let value =
            if self.peek().is_some_and(|c| QUOTES.contains(&c)) { self.quoted()? } else { self.word() };
        if value.trim().is_empty() {
            return Err(self.refuse(value_at, format!("{field}: needs {} right behind it", example(&field))));
        }
        self.field(&field, value, value_at)
    }

    fn looked_for(&self, start: usize, text: &str) -> Result<Condition, QuerySyntaxError> {
        let text = text.trim();
        if fold::folded(text).trim().is_empty() {
            return Err(self.refuse(start, "there is nothing between the quotation marks to look for"));
        }
        if text.chars().count() > MAX_TEXT {
            return Err(self.refuse(
                start,
                format!("this is too long to look for; write a part of it, at most {MAX_TEXT} characters"),
            ));
        }
        Ok(Condition::Text(text.to_owned()))
    }

    fn field(&self, field: &str, value: &str, at: usize) -> Result<Condition, QuerySyntaxError> {
        let time = || when::parse_at(value, self.now).map_err(|problem| self.refuse(at, problem));
        Ok(match field {
            "from" => Condition::From(self.people(value, at)?),
            "with" => Condition::With(self.people(value, at)?),
            "account" => Condition::Account(self.people(value, at)?),
            "after" => Condition::After(time()?),
            "before" => Condition::Before(time()?),
            _ if value.eq_ignore_ascii_case("html") => Condition::HasHtml,
            _ => return Err(self.refuse(at, "only has:html can be asked")),
        })
    }

    fn people(&self, value: &str, at: usize) -> Result<Vec<Person>, QuerySyntaxError> {
        value
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(|name| {
                if name.contains('@') {
                    name.parse().map(Person::Address).map_err(|error| self.refuse(at, format!("{error}")))
                } else {
                    Ok(Person::Name(name.to_owned()))
                }
            })
            .collect::<Result<Vec<_>, _>>()
            .and_then(|people| {
                if people.is_empty() { Err(self.refuse(at, "there is no name in it")) } else { Ok(people) }
            })
    }

    /// Up to the next white space.
    fn word(&mut self) -> &'a str {
        let start = self.at;
        while self.peek().is_some_and(|c| !c.is_whitespace()) {
            self.at += 1;
        }
        &self.text[self.offset(start)..self.offset(self.at)]
    }

    /// What stands between quotation marks.
    fn quoted(&mut self) -> Result<&'a str, QuerySyntaxError> {
        let opening = self.at;
        self.at += 1;
        let start = self.at;
        while let Some(c) = self.peek() {
            if CLOSING_QUOTES.contains(&c) {
                let text = &self.text[self.offset(start)..self.offset(self.at)];
                self.at += 1;
                return Ok(text);
            }
            self.at += 1;
        }
        Err(self
            .refuse(opening, "this quotation mark is never closed; write another one where the text ends"))
    }
}

fn example(field: &str) -> &'static str {
    match field {
        "after" | "before" => "a time (2026-03-01, 2026-03-01T12:00Z, 2h, yesterday)",
        "has" => "html",
        _ => "an address (bob@contoso.com) or a name (bob)",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn now() -> Timestamp {
        "2026-03-02T10:30:00Z".parse().unwrap()
    }

    fn read(text: &str) -> String {
        parse(text, now()).unwrap().to_string()
    }

    #[test]
    fn every_term_is_understood() {
        let query = parse(
            r#"budget "quarterly  plan" -draft from:Bob@Contoso.com with:carol,"x -account:alice after:2h before:2026-03-02 has:HTML -"no way""#,
            now(),
        )
        .unwrap();
        let expected = [
            (false, Condition::Text("budget".into())),
            (false, Condition::Text("quarterly  plan".into())),
            (true, Condition::Text("draft".into())),
            (false, Condition::From(vec![Person::Address("bob@contoso.com".parse().unwrap())])),
            (false, Condition::With(vec![Person::Name("carol".into()), Person::Name("\"x".into())])),
            (true, Condition::Account(vec![Person::Name("alice".into())])),
            (false, Condition::After("2026-03-02T08:30:00Z".parse().unwrap())),
            (false, Condition::Before("2026-03-02T00:00:00Z".parse().unwrap())),
            (false, Condition::HasHtml),
            (true, Condition::Text("no way".into())),
        ];
        let expected = expected.map(|(negated, condition)| Term { negated, condition });
        assert_eq!(query.terms, expected);
    }

    #[test]
    fn what_looks_like_a_field_or_a_minus_may_be_a_word() {
        for (text, shown) in [
            ("https://contoso.com/a?b", "https://contoso.com/a?b"),
            ("10:30", "10:30"),
            ("e-mail", "e-mail"),
            ("会議", "会議"),
            ("“smart quotes”", "\"smart quotes\""),
            ("\"from:bob\"", "\"from:bob\""),
            ("\"-1\"", "\"-1\""),
            ("FROM:bob", "from:bob"),
            ("\u{2212}draft", "-draft"),
            ("from:\"Bob Example\"", "from:\"Bob Example\""),
            ("  ", ""),
        ] {
            assert_eq!(read(text), shown, "{text}");
        }
    }

    #[test]
    fn an_error_tells_the_place_and_what_would_be_right() {
        for (text, position, words) in [
            ("hello \"wor ld", 7, "never closed"),
            ("hello - world", 7, "-draft"),
            ("hello --world", 7, "-draft"),
            ("übel form:bob", 6, "there is no field form: (there are from:,"),
            ("from: bob", 6, "bob@contoso.com"),
            ("from:bob@", 6, "is not a SIP address"),
            ("a after:someday", 9, "2026-03-01"),
            ("has:pictures", 5, "has:html"),
            ("\"\"", 1, "nothing"),
            ("with:,", 6, "no name"),
        ] {
            let error = parse(text, now()).unwrap_err();
            assert_eq!(error.position, position, "{text}: {error}");
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let shown = parse("hello \"wor ld", now()).unwrap_err().to_string();
        assert!(shown.ends_with("\n  hello \"wor ld\n        ^"), "{shown}");
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser_and_what_is_shown_means_the_same(text in "[ a-z\"“”„:@,\\-é会]{0,24}") {
            if let Ok(query) = parse(&text, now()) {
                prop_assert_eq!(parse(&query.to_string(), now()).unwrap(), query);
            }
        }
    }
}
