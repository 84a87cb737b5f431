//! What people ask the archive: one syntax for `history`, `search` and `export`, on either database.
//!
//! A query is a list of terms divided by white space; a message fits if it fits all of them.
//!
//! | term | fits messages |
//! | --- | --- |
//! | `budget` | whose text has a word that begins so |
//! | `"quarterly budget"` | whose text has these words one after the other; the last may go on |
//! | `from:bob@contoso.com`, `from:bob`, `from:"Bob Example"` | whose sender has this address, this name before the `@`, or this display name |
//! | `with:carol` | that are from or to this person, or in a conversation with them |
//! | `account:alice` | of this account's archive |
//! | `after:2026-03-01`, `before:yesterday` | sent at this time or later; before this time; see [`when`] |
//! | `has:html` | that came with HTML |
//! | `-budget`, `-from:bob` | that do not fit the term |
//!
//! `from:a,b` fits either. Case and accents of Latin letters make no difference, and languages which put no spaces
//! between words lose nothing: [`fold`] says what is the same letter and where a word begins.
//!
//! This module knows no database: [`parse()`] gives a [`Query`], `store` renders it as SQL; [`pattern`] is what all
//! databases understand of a text that is looked for.

pub mod fold;
mod parse;
pub mod pattern;
pub mod when;

use std::fmt;

use jiff::Timestamp;

pub use self::parse::{QuerySyntaxError, parse};
use crate::{archive::text::iso_milliseconds, identifiers::SipUri};

/// What messages have to fit: all of the terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query {
    /// In the order given.
    pub terms: Vec<Term>,
}

/// One condition or its contrary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    /// Messages must not fit the condition.
    pub negated: bool,
    /// What is asked.
    pub condition: Condition,
}

/// One thing that can be asked of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Its text has this at the beginning of a word.
    Text(String),
    /// One of these wrote it.
    From(Vec<Person>),
    /// One of these wrote it, got it, or took part in the conversation.
    With(Vec<Person>),
    /// It is in the archive of one of these accounts.
    Account(Vec<Person>),
    /// Sent at this time or later.
    After(Timestamp),
    /// Sent before this time.
    Before(Timestamp),
    /// It came with HTML.
    HasHtml,
}

/// How a query names somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Person {
    /// By the whole address.
    Address(SipUri),
    /// By what stands before the `@`, or by the display name.
    Name(String),
}

impl Query {
    /// Asks for one more thing.
    #[must_use]
    pub fn and(mut self, condition: Condition) -> Self {
        self.terms.push(Term { negated: false, condition });
        self
    }

    /// As [`Query::and`], if there is a condition.
    #[must_use]
    pub fn and_if(self, condition: Option<Condition>) -> Self {
        match condition {
            Some(condition) => self.and(condition),
            None => self,
        }
    }

    /// The texts that a fitting message has, for showing where.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.terms.iter().filter(|term| !term.negated).filter_map(|term| match &term.condition {
            Condition::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// Whether it asks for nothing but texts, time, and the archive of one account.
    pub fn is_of_text_and_time(&self) -> bool {
        self.terms.iter().all(|term| match &term.condition {
            Condition::Text(_) | Condition::After(_) | Condition::Before(_) => true,
            Condition::Account(people) => !term.negated && matches!(people.as_slice(), [Person::Address(_)]),
            Condition::From(_) | Condition::With(_) | Condition::HasHtml => false,
        })
    }

    /// Everybody who is named as an account.
    pub fn accounts(&self) -> impl Iterator<Item = &Person> {
        self.terms
            .iter()
            .filter_map(|term| match &term.condition {
                Condition::Account(people) => Some(people),
                _ => None,
            })
            .flatten()
    }

    /// The one account whose archive is asked for, if the query is so narrow.
    pub fn only_account(&self) -> Option<&SipUri> {
        self.terms.iter().find_map(|term| match &term.condition {
            Condition::Account(people) if !term.negated => match people.as_slice() {
                [Person::Address(uri)] => Some(uri),
                _ => None,
            },
            _ => None,
        })
    }
}

impl Term {
    /// Whether it asks what stands in a message's text.
    pub fn is_of_text(&self) -> bool {
        matches!(self.condition, Condition::Text(_))
    }
}

impl Person {
    /// Whether an account with this URI is meant.
    pub fn is_account(&self, uri: &str) -> bool {
        match self {
            Self::Address(address) => address.as_str() == uri,
            Self::Name(name) => uri
                .split_once(':')
                .and_then(|(_, address)| address.rsplit_once('@'))
                .is_some_and(|(user, _)| user == name.to_lowercase()),
        }
    }
}

/// As it can be typed again; times are absolute.
impl fmt::Display for Query {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, term) in self.terms.iter().enumerate() {
            if number > 0 {
                formatter.write_str(" ")?;
            }
            if term.negated {
                formatter.write_str("-")?;
            }
            match &term.condition {
                Condition::Text(text) if parse::is_bare_word(text) => formatter.write_str(text)?,
                Condition::Text(text) => write!(formatter, "\"{text}\"")?,
                Condition::From(people) => write_people(formatter, "from", people)?,
                Condition::With(people) => write_people(formatter, "with", people)?,
                Condition::Account(people) => write_people(formatter, "account", people)?,
                Condition::After(at) => write!(formatter, "after:{}", iso_milliseconds(*at))?,
                Condition::Before(at) => write!(formatter, "before:{}", iso_milliseconds(*at))?,
                Condition::HasHtml => formatter.write_str("has:html")?,
            }
        }
        Ok(())
    }
}

fn write_people(formatter: &mut fmt::Formatter<'_>, field: &str, people: &[Person]) -> fmt::Result {
    let people: Vec<&str> = people
        .iter()
        .map(|person| match person {
            Person::Address(uri) => uri.as_str(),
            Person::Name(name) => name.as_str(),
        })
        .collect();
    let people = people.join(",");
    if people.contains(char::is_whitespace) {
        write!(formatter, "{field}:\"{people}\"")
    } else {
        write!(formatter, "{field}:{people}")
    }
}
