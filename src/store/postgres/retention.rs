//! What retention needs of PostgreSQL.

use sqlx::{PgConnection, postgres::PgRow};

use super::{PostgresDialect, PostgresStore, reading};
use crate::store::{
    retention::Retaining,
    selection::{Dialect, Statement},
    writer::Writer,
};

impl Retaining for PostgresStore {
    type Writes = PostgresDialect;
    const HOLDS_STAND_STILL: Option<&'static str> = Some("LOCK TABLE holds IN SHARE MODE NOWAIT");

    fn writer(&self) -> &Writer<PostgresDialect> {
        &self.writer
    }

    fn words() -> Box<dyn Dialect> {
        Box::new(reading::PostgresDialect { is_indexed: false })
    }

    async fn rows_within(
        connection: &mut PgConnection,
        statement: Statement,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        reading::bound(&statement).fetch_all(connection).await
    }
}
