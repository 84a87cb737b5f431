//! The full-text index over `messages.body`: a GIN index over PostgreSQL's own `tsvector`, kept while
//! `archive.full_text` is set.
//!
//! What it holds is made by `ucwa_relay_search` of the schema, which needs no extension: case and accents are folded by
//! `normalize`, and scripts without spaces are indexed by the character, so that a phrase finds any run of them. Words are
//! found whole or, with `:*`, by their beginning.

use sqlx::{PgConnection, Row};

use crate::store::{StoreError, trouble::failed};

/// Advisory lock of the one server that arranges the index.
const LOCK: i64 = 6_076_142_301_170_134;

/// Makes or drops the index, as the configuration says; an archive that is there already is indexed while others write. Of
/// nodes that start together one does it, the others go on: whoever waited would be waited for by the index. The lock goes
/// with the connection.
pub(super) async fn arrange(connection: &mut PgConnection, wanted: bool) -> Result<(), StoreError> {
    let failed = failed("arranging the full-text index");
    let is_ours: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
        .bind(LOCK)
        .fetch_one(&mut *connection)
        .await
        .map_err(&failed)?;
    if !is_ours {
        return Ok(());
    }
    let index = sqlx::query(
        "SELECT i.indisvalid AS is_valid FROM pg_index i WHERE i.indexrelid = to_regclass('messages_fts')",
    )
    .fetch_optional(&mut *connection)
    .await
    .map_err(&failed)?;
    let is_valid: Option<bool> = index.map(|row| row.try_get("is_valid")).transpose().map_err(&failed)?;
    // One that is not valid was being made when its server ended.
    if is_valid == Some(false) || (is_valid.is_some() && !wanted) {
        sqlx::query("DROP INDEX CONCURRENTLY IF EXISTS messages_fts")
            .execute(&mut *connection)
            .await
            .map_err(&failed)?;
    }
    if wanted && is_valid != Some(true) {
        sqlx::query(
            "CREATE INDEX CONCURRENTLY IF NOT EXISTS messages_fts ON messages USING gin (ucwa_relay_search(body))",
        )
        .execute(connection)
        .await
        .map_err(&failed)?;
    }
    Ok(())
}
