//! SQLite's words for reading the archive.

use async_trait::async_trait;
use sqlx::{
    AssertSqlSafe, Sqlite,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

use super::{SqliteStore, column::time_text, full_text};
use crate::{
    query::pattern,
    store::{
        reading::Readable,
        selection::{Dialect, Sql, Statement, Value},
    },
};

/// SQLite's words.
pub(super) struct SqliteDialect {
    /// There is a full-text index, and it folds as this program does.
    pub(super) is_indexed: bool,
}

/// A text that is none makes every expression fail. There is none in a statement, as long as nobody put one into the
/// archive by hand; then its message takes this place.
const UNREADABLE: &str = "m.id IN ()";

/// What SQLite's error is then: `SQLITE_CONSTRAINT_FUNCTION`.
const IS_NO_TEXT: &str = "1043";

impl Dialect for SqliteDialect {
    fn placeholder(&self, number: usize) -> String {
        format!("?{number}")
    }

    fn by_index(&self, index: &str) -> String {
        format!(" INDEXED BY {index}")
    }

    /// Ids are no index to it.
    fn by_ids(&self) -> &'static str {
        " NOT INDEXED"
    }

    /// Its planner keeps the order of tables that are joined so.
    fn join_to_each(&self) -> &'static str {
        " CROSS JOIN "
    }

    fn by_code_points(&self) -> &'static str {
        ""
    }

    fn day(&self, column: &str) -> String {
        format!("substr({column}, 1, 10)")
    }

    fn minute(&self, column: &str) -> String {
        format!("unixepoch(substr({column}, 1, 16)) / 60")
    }

    fn is_time(&self, column: &str) -> String {
        format!("{column} LIKE '____-__-__T__:__:%'")
    }

    fn is_like(&self) -> &'static str {
        " LIKE "
    }

    fn time_as_text(&self, column: &str) -> String {
        column.to_owned()
    }

    fn time_from_text(&self, placeholder: &str) -> String {
        placeholder.to_owned()
    }

    fn now(&self) -> &'static str {
        "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
    }

    fn narrows(&self, text: &str) -> bool {
        self.is_indexed && full_text::candidates(text).is_some()
    }

    fn has_text(&self, sql: &mut Sql<'_>, text: &str) {
        sql.push("CASE WHEN ")
            .push(UNREADABLE)
            .push(" THEN FALSE ELSE m.body REGEXP ")
            .bind_text(pattern::expression(text))
            .push(" END");
    }

    fn finds_text(&self, sql: &mut Sql<'_>, text: &str) {
        if let Some(words) = full_text::candidates(text).filter(|_| self.is_indexed) {
            sql.push("m.id IN (SELECT f.rowid FROM messages_fts f WHERE f.messages_fts MATCH ")
                .bind_text(words)
                .push(") AND ");
        }
        self.has_text(sql, text);
    }
}

#[async_trait]
impl Readable for SqliteStore {
    type Row = SqliteRow;

    async fn dialect(&self, with_text: bool) -> Result<Box<dyn Dialect>, sqlx::Error> {
        let is_indexed = with_text && full_text::is_there(&self.readers).await?;
        Ok(Box::new(SqliteDialect { is_indexed }))
    }

    async fn select(&self, statement: Statement) -> Result<Vec<SqliteRow>, sqlx::Error> {
        match self.rows(&statement.text, &statement.values).await {
            Err(sqlx::Error::Database(error))
                if error.code().is_some_and(|code| code == IS_NO_TEXT)
                    && statement.text.contains(UNREADABLE) =>
            {
                let readable = self.without_unreadable(&statement.text).await?;
                self.rows(&readable, &statement.values).await
            }
            result => result,
        }
    }

    fn misses_index(&self, error: &sqlx::Error) -> bool {
        matches!(error, sqlx::Error::Database(error) if error.message().contains(full_text::IS_GONE))
    }
}

/// A statement with its values.
pub(super) fn bound(text: &str, values: &[Value]) -> Query<'static, Sqlite, SqliteArguments> {
    values.iter().fold(sqlx::query(AssertSqlSafe(text.to_owned())), |statement, value| match value {
        Value::Text(text) => statement.bind(text.clone()),
        Value::Integer(number) => statement.bind(*number),
        Value::Time(at) => statement.bind(time_text(*at)),
        Value::Bytes(bytes) => statement.bind(bytes.clone()),
    })
}

impl SqliteStore {
    async fn rows(&self, text: &str, values: &[Value]) -> Result<Vec<SqliteRow>, sqlx::Error> {
        bound(text, values).fetch_all(&self.readers).await
    }

    /// The statement for an archive in which some texts are none. Looks at every text, a page at a time; `verify` names
    /// these messages.
    async fn without_unreadable(&self, text: &str) -> Result<String, sqlx::Error> {
        let mut unreadable: Vec<String> = Vec::new();
        let mut last = 0;
        loop {
            let page: Vec<(i64, Vec<u8>)> = sqlx::query_as(
                "SELECT id, CAST(body AS BLOB) FROM messages WHERE id > ?1 ORDER BY id LIMIT 1000",
            )
            .bind(last)
            .fetch_all(&self.readers)
            .await?;
            let Some(&(newest, _)) = page.last() else { break };
            last = newest;
            let none = page.iter().filter(|(_, body)| std::str::from_utf8(body).is_err());
            unreadable.extend(none.map(|(id, _)| id.to_string()));
        }
        Ok(text.replace(UNREADABLE, &format!("m.id IN ({})", unreadable.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use sqlx::SqlitePool;

    use super::*;
    use crate::{
        config::Config,
        query::{Condition, Query},
        store::{HistoryRow, Page, ReadingStore, Role, StoreError},
    };

    /// Whose index goes as soon as somebody has seen that it is there.
    struct Dropping(SqliteStore, SqlitePool);

    #[async_trait]
    impl Readable for Dropping {
        type Row = SqliteRow;

        async fn dialect(&self, with_text: bool) -> Result<Box<dyn Dialect>, sqlx::Error> {
            let dialect = self.0.dialect(with_text).await;
            full_text::arrange(&self.1, false).await.unwrap();
            dialect
        }

        async fn select(&self, statement: Statement) -> Result<Vec<SqliteRow>, sqlx::Error> {
            self.0.select(statement).await
        }

        fn misses_index(&self, error: &sqlx::Error) -> bool {
            self.0.misses_index(error)
        }
    }

    #[tokio::test]
    async fn an_index_that_is_dropped_meanwhile_is_done_without() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.database.url = format!("sqlite://{}", folder.path().join("archive.db").display());
        let store = SqliteStore::connect(&config.store_settings(), Role::Server).await.unwrap();
        let outside = SqlitePool::connect(&config.database.url).await.unwrap();
        let store = Dropping(store, outside);
        let query = Query::default().and(Condition::Text("tea".to_owned()));
        let found: Result<Vec<HistoryRow>, StoreError> = store.messages(&query, Page::Newest, 10).await;
        assert!(found.unwrap().is_empty());
    }
}
