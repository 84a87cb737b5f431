//! A [`Query`] as SQL over `messages m`, for every dialect: a dialect gives only what differs.

use jiff::Timestamp;

use crate::{
    identifiers::SipUri,
    query::{Condition, Person, Query, Term},
};

/// What is bound to a placeholder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// A text.
    Text(String),
    /// An integer.
    Integer(i64),
    /// An instant, bound as the dialect keeps it.
    Time(Timestamp),
}

/// What differs between databases.
pub(super) trait Dialect: Send + Sync {
    /// The placeholder of a value, from 1.
    fn placeholder(&self, number: usize) -> String;
    /// Tells the planner which index to walk through, right after the table's alias, where the dialect knows how to.
    fn by_index(&self, index: &str) -> String;
    /// How texts are put in the order of their code points.
    fn by_code_points(&self) -> &'static str;
    /// The day in UTC of a column with a time: `2026-03-01`.
    fn day(&self, column: &str) -> String;
    /// A column with a time as a text from which [`Dialect::time_from_text`] makes exactly the same time.
    fn time_as_text(&self, column: &str) -> String;
    /// A placeholder of such a text, as a time.
    fn time_from_text(&self, placeholder: &str) -> String;
    /// Adds a condition that is true where `m.body` has this text in it, as [`crate::query::fold::find`] does.
    fn has_text(&self, sql: &mut Sql<'_>, text: &str);
}

/// A finished statement.
#[derive(Debug)]
pub(super) struct Statement {
    /// Literals and placeholders only; what people typed is among the values.
    pub(super) text: String,
    pub(super) values: Vec<Value>,
}

/// A statement that is being written, with its values.
pub(super) struct Sql<'d> {
    dialect: &'d dyn Dialect,
    text: String,
    values: Vec<Value>,
}

impl<'d> Sql<'d> {
    pub(super) fn new(dialect: &'d dyn Dialect, text: &str) -> Self {
        Self { dialect, text: text.to_owned(), values: Vec::new() }
    }

    pub(super) fn push(&mut self, text: &str) -> &mut Self {
        self.text.push_str(text);
        self
    }

    /// Adds a placeholder and its value.
    pub(super) fn bind(&mut self, value: Value) -> &mut Self {
        self.values.push(value);
        self.text.push_str(&self.dialect.placeholder(self.values.len()));
        self
    }

    pub(super) fn bind_text(&mut self, text: impl Into<String>) -> &mut Self {
        self.bind(Value::Text(text.into()))
    }

    pub(super) fn bind_integer(&mut self, number: i64) -> &mut Self {
        self.bind(Value::Integer(number))
    }

    /// Adds a placeholder with a time that [`Dialect::time_as_text`] gave.
    pub(super) fn bind_time_text(&mut self, text: &str) -> &mut Self {
        self.values.push(Value::Text(text.to_owned()));
        let placeholder = self.dialect.placeholder(self.values.len());
        let time = self.dialect.time_from_text(&placeholder);
        self.push(&time)
    }

    /// Adds ` IN (...)` with the ids.
    pub(super) fn is_one_of(&mut self, ids: impl IntoIterator<Item = i64>) -> &mut Self {
        self.push(" IN (");
        for (number, id) in ids.into_iter().enumerate() {
            self.push(if number == 0 { "" } else { ", " }).bind_integer(id);
        }
        self.push(")")
    }

    pub(super) fn finish(self) -> Statement {
        Statement { text: self.text, values: self.values }
    }

    pub(super) fn by_index(&mut self, index: &str) -> &mut Self {
        let hint = self.dialect.by_index(index);
        self.push(&hint)
    }

    /// Adds ` AND ...` for each term.
    pub(super) fn and_fits(&mut self, query: &Query) -> &mut Self {
        for Term { negated, condition } in &query.terms {
            // What is NULL does not fit, so its contrary does.
            self.push(if *negated { " AND NOT coalesce((" } else { " AND (" });
            self.condition(condition);
            self.push(if *negated { "), FALSE)" } else { ")" });
        }
        self
    }

    fn condition(&mut self, condition: &Condition) {
        match condition {
            Condition::Text(text) => {
                let dialect = self.dialect;
                dialect.has_text(self, text);
            }
            Condition::From(people) => self.any(people, |sql, person| {
                sql.is("m.sender_uri", person);
                if let Person::Name(name) = person {
                    sql.push(" OR m.sender_name = ").bind_text(name);
                }
            }),
            Condition::With(people) => self.any(people, |sql, person| {
                sql.is("m.sender_uri", person);
                sql.push(" OR EXISTS (SELECT 1 FROM participants p")
                    .by_index("participants_of_conversation")
                    .push(" WHERE p.account_id = m.account_id AND p.conversation_id = m.conversation_id AND (");
                sql.is("p.sip_uri", person);
                if let Person::Name(name) = person {
                    sql.push(" OR p.display_name = ").bind_text(name);
                }
                sql.push(
                    ")) OR EXISTS (SELECT 1 FROM invitations i
                                    WHERE i.account_id = m.account_id AND i.conversation_id = m.conversation_id AND (",
                );
                sql.is("i.to_uri", person);
                sql.push("))");
            }),
            // One account is one value, so that its part of an index has the order that is asked for.
            Condition::Account(people) if matches!(people.as_slice(), [Person::Address(_)]) => {
                self.push("m.account_id = (SELECT a.id FROM accounts a WHERE ");
                self.any(people, |sql, person| sql.is("a.sip_uri", person));
                self.push(")");
            }
            Condition::Account(people) => {
                self.push("m.account_id IN (SELECT a.id FROM accounts a WHERE ");
                self.any(people, |sql, person| sql.is("a.sip_uri", person));
                self.push(")");
            }
            Condition::After(at) => {
                self.push("m.sent_at >= ").bind(Value::Time(*at));
            }
            Condition::Before(at) => {
                self.push("m.sent_at < ").bind(Value::Time(*at));
            }
            Condition::HasHtml => {
                self.push("m.body_html IS NOT NULL");
            }
        }
    }

    fn any(&mut self, people: &[Person], mut one: impl FnMut(&mut Self, &Person)) {
        for (number, person) in people.iter().enumerate() {
            self.push(if number == 0 { "(" } else { " OR (" });
            one(self, person);
            self.push(")");
        }
    }

    /// The column holds the person's URI.
    fn is(&mut self, column: &str, person: &Person) {
        match person {
            Person::Address(uri) => self.push(column).push(" = ").bind_text(SipUri::as_str(uri)),
            // Not by LIKE, which some databases do without regard to case.
            Person::Name(name) => {
                for (number, scheme) in ["sip:", "sips:"].into_iter().enumerate() {
                    let beginning = format!("{scheme}{}@", name.to_lowercase());
                    let length = i64::try_from(beginning.chars().count()).unwrap_or(i64::MAX);
                    self.push(if number == 0 { "substr(" } else { " OR substr(" })
                        .push(column)
                        .push(&format!(", 1, {length}) = "))
                        .bind_text(beginning);
                }
                self
            }
        };
    }
}
