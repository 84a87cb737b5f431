//! A [`Query`] as SQL over `messages m`, for every dialect: a dialect gives only what differs.

use jiff::Timestamp;

use crate::{
    identifiers::SipUri,
    query::{Condition, Person, Query, Term},
};

/// What is bound to a placeholder. Nothing of it is for a log: there may be sealed passwords in it.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// A text.
    Text(String),
    /// An integer.
    Integer(i64),
    /// An instant, bound as the dialect keeps it.
    Time(Timestamp),
    /// Bytes.
    Bytes(Vec<u8>),
}

/// What differs between databases.
pub(super) trait Dialect: Send + Sync {
    /// The placeholder of a value, from 1.
    fn placeholder(&self, number: usize) -> String;
    /// Tells the planner which index to walk through, right after the table's alias, where the dialect knows how to.
    fn by_index(&self, index: &str) -> String;
    /// Tells the planner, right after the table's alias, to look rows up by the ids that another index gives.
    fn by_ids(&self) -> &'static str;
    /// Joins the table that follows, of which rows are looked up for each row of the one before.
    fn join_to_each(&self) -> &'static str;
    /// How texts are put in the order of their code points.
    fn by_code_points(&self) -> &'static str;
    /// The day in UTC of a column with a time: `2026-03-01`.
    fn day(&self, column: &str) -> String;
    /// The minute of a column with a time, since 1970.
    fn minute(&self, column: &str) -> String;
    /// A condition that is true where such a column has a time in it, and not a text that is none.
    fn is_time(&self, column: &str) -> String;
    /// Compares a text with a pattern, whatever its case; `ESCAPE` may follow the pattern.
    fn is_like(&self) -> &'static str;
    /// A column with a time as a text from which [`Dialect::time_from_text`] makes exactly the same time.
    fn time_as_text(&self, column: &str) -> String;
    /// A placeholder of such a text, as a time.
    fn time_from_text(&self, placeholder: &str) -> String;
    /// The time at which a statement is done, by the database's clock where it has one.
    fn now(&self) -> &'static str;
    /// Whether an index tells which messages may have this text in them.
    fn narrows(&self, text: &str) -> bool;
    /// Adds a condition that is true where `m.body` has this text in it, as [`crate::query::fold::find`] does.
    fn has_text(&self, sql: &mut Sql<'_>, text: &str);
    /// The same condition, which asks that index first, if it [narrows](Dialect::narrows).
    fn finds_text(&self, sql: &mut Sql<'_>, text: &str);
}

/// A finished statement.
#[derive(Clone)]
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
        self.and_fits_apart_from_text(query);
        for term in query.terms.iter().filter(|term| term.is_of_text()) {
            // An index does not tell what is not in a text.
            if let Term { negated: false, condition: Condition::Text(text) } = term {
                let dialect = self.dialect;
                dialect.finds_text(self.push(" AND ("), text);
                self.push(")");
            } else {
                self.and(term, query);
            }
        }
        self
    }

    /// Adds ` AND ...` for each term that is not of texts.
    pub(super) fn and_fits_apart_from_text(&mut self, query: &Query) -> &mut Self {
        for term in query.terms.iter().filter(|term| !term.is_of_text()) {
            self.and(term, query);
        }
        self
    }

    /// Adds ` AND ...` for each term that is of texts, without an index.
    pub(super) fn and_has_texts(&mut self, query: &Query) -> &mut Self {
        for term in query.terms.iter().filter(|term| term.is_of_text()) {
            self.and(term, query);
        }
        self
    }

    fn and(&mut self, Term { negated, condition }: &Term, query: &Query) {
        // What is NULL does not fit, so its contrary does.
        self.push(if *negated { " AND NOT coalesce((" } else { " AND (" });
        self.condition(condition, query.only_account());
        self.push(if *negated { "), FALSE)" } else { ")" });
    }

    /// `account`: no other account's messages are asked for, so that what has to be looked up is looked up there.
    fn condition(&mut self, condition: &Condition, account: Option<&SipUri>) {
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
            Condition::With(people) => self.is_with(people, account),
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

    /// A message is from one of these, or in a conversation that one of them took part in or was invited to. The other way
    /// round, to look at each message's conversation, would read all messages for a person seldom heard of.
    fn is_with(&mut self, people: &[Person], account: Option<&SipUri>) {
        self.push("m.id IN (");
        for (number, person) in people.iter().enumerate() {
            self.push(if number == 0 { "" } else { " UNION " });
            self.of_person("messages s", "messages_sender", person, account, |sql| {
                sql.is("s.sender_uri", person);
            });
            self.push(" UNION ");
            self.of_person("participants p", "participants_uri", person, account, |sql| {
                sql.is("p.sip_uri", person);
                if let Person::Name(name) = person {
                    sql.push(" OR p.display_name = ").bind_text(name);
                }
            });
            self.push(" UNION ");
            self.of_person("invitations i", "invitations_to", person, account, |sql| {
                sql.is("i.to_uri", person);
            });
        }
        self.push(")");
    }

    /// Adds a SELECT of the ids of all messages in conversations of which `table` has a row of the person; of the rows
    /// themselves, if it is the table of messages.
    fn of_person(
        &mut self,
        table: &str,
        index: &str,
        person: &Person,
        account: Option<&SipUri>,
        is_of: impl FnOnce(&mut Self),
    ) {
        let alias = table.rsplit(' ').next().unwrap_or(table);
        self.push("SELECT s.id FROM ").push(table);
        // There is no index of parts of an address.
        if matches!(person, Person::Address(_)) {
            self.by_index(index);
        }
        if alias != "s" {
            self.push(self.dialect.join_to_each()).push(&format!(
                "messages s ON s.account_id = {alias}.account_id AND s.conversation_id = {alias}.conversation_id"
            ));
        }
        self.push(" WHERE (");
        is_of(self);
        self.push(")");
        if let Some(account) = account {
            self.push(&format!(" AND {alias}.account_id = (SELECT a.id FROM accounts a WHERE a.sip_uri = "))
                .bind_text(account.as_str())
                .push(")");
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
