//! PostgreSQL's words for reading the archive.

use async_trait::async_trait;
use sqlx::{
    AssertSqlSafe, Postgres,
    postgres::{PgArguments, PgRow},
    query::Query,
};

use super::{PostgresStore, column, column::Time, full_text};
use crate::{
    query::pattern,
    store::{
        reading::Readable,
        selection::{Dialect, Sql, Statement, Value},
    },
};

/// PostgreSQL's words.
pub(super) struct PostgresDialect {
    /// There is a full-text index, and it folds as this program does.
    pub(super) is_indexed: bool,
}

impl Dialect for PostgresDialect {
    fn placeholder(&self, number: usize) -> String {
        format!("${number}")
    }

    /// Its planner finds them.
    fn by_index(&self, _: &str) -> String {
        String::new()
    }

    fn by_ids(&self) -> &'static str {
        ""
    }

    fn join_to_each(&self) -> &'static str {
        " JOIN "
    }

    fn by_code_points(&self) -> &'static str {
        " COLLATE \"C\""
    }

    fn day(&self, column: &str) -> String {
        format!("to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD')")
    }

    fn minute(&self, column: &str) -> String {
        format!("floor(extract(epoch FROM {column}) / 60)::bigint")
    }

    /// Its type holds nothing else.
    fn is_time(&self, _: &str) -> String {
        "TRUE".to_owned()
    }

    fn is_like(&self) -> &'static str {
        " ILIKE "
    }

    fn time_as_text(&self, column: &str) -> String {
        format!("{column}::text")
    }

    fn time_from_text(&self, placeholder: &str) -> String {
        format!("{placeholder}::timestamptz")
    }

    fn now(&self) -> &'static str {
        "date_trunc('milliseconds', clock_timestamp())"
    }

    fn narrows(&self, text: &str) -> bool {
        self.is_indexed && full_text::candidates(text).is_some()
    }

    fn has_text(&self, sql: &mut Sql<'_>, text: &str) {
        sql.push("m.body ~ ").bind_text(pattern::expression(text));
    }

    fn finds_text(&self, sql: &mut Sql<'_>, text: &str) {
        let Some(query) = full_text::candidates(text).filter(|_| self.is_indexed) else {
            return self.has_text(sql, text);
        };
        sql.push("ucwa_relay_search(m.body) @@ ").bind_text(query).push("::tsquery AND ");
        if full_text::decides(text) {
            sql.push("CASE WHEN ").push(full_text::IS_WHOLE).push(" THEN TRUE ELSE ");
            self.has_text(sql, text);
            sql.push(" END");
        } else {
            self.has_text(sql, text);
        }
    }
}

#[async_trait]
impl Readable for PostgresStore {
    type Row = PgRow;

    async fn dialect(&self, with_text: bool) -> Result<Box<dyn Dialect>, sqlx::Error> {
        let is_indexed = with_text && full_text::is_there(&self.readers).await?;
        Ok(Box::new(PostgresDialect { is_indexed }))
    }

    async fn select(&self, statement: Statement) -> Result<Vec<PgRow>, sqlx::Error> {
        bound(&statement).fetch_all(&self.readers).await
    }

    /// Its statements ask functions, which stay; whether there is an index is the planner's affair.
    fn misses_index(&self, _: &sqlx::Error) -> bool {
        false
    }
}

/// A statement with its values.
pub(super) fn bound(statement: &Statement) -> Query<'_, Postgres, PgArguments> {
    let query = sqlx::query::<Postgres>(AssertSqlSafe(statement.text.clone()));
    statement.values.iter().fold(query, |query, value| match value {
        Value::Text(text) => query.bind(column::text(text)),
        Value::Integer(number) => query.bind(*number),
        Value::Time(at) => query.bind(Time(*at)),
        Value::Bytes(bytes) => query.bind(bytes.as_slice()),
    })
}
