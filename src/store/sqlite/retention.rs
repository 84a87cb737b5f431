//! What retention needs of SQLite.

use sqlx::{SqliteConnection, sqlite::SqliteRow};

use super::{SqliteDialect, SqliteStore, reading};
use crate::store::{
    retention::Retaining,
    selection::{Dialect, Statement},
    writer::Writer,
};

impl Retaining for SqliteStore {
    type Writes = SqliteDialect;
    // Transactions that write take turns.
    const HOLDS_STAND_STILL: Option<&'static str> = None;

    fn writer(&self) -> &Writer<SqliteDialect> {
        &self.writer
    }

    fn words() -> Box<dyn Dialect> {
        Box::new(reading::SqliteDialect { is_indexed: false })
    }

    async fn rows_within(
        connection: &mut SqliteConnection,
        statement: Statement,
    ) -> Result<Vec<SqliteRow>, sqlx::Error> {
        reading::bound(&statement.text, &statement.values).fetch_all(connection).await
    }
}
