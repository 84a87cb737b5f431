//! The schema of a SQLite file, brought up to date at every start.

use std::borrow::Cow;

use sqlx::{
    SqlSafeStr, SqlitePool,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use crate::store::{StoreError, migrations::refused};

/// Every migration there ever was, in order: number, name, text. A published one is never changed.
pub(super) const MIGRATIONS: [(i64, &str, &str); 1] =
    [(1, "schema", include_str!("../../../migrations/sqlite/0001_schema.sql"))];

/// Applies what is missing.
pub(super) async fn run(pool: &SqlitePool) -> Result<(), StoreError> {
    let migrations = MIGRATIONS
        .into_iter()
        .map(|(version, name, sql)| {
            Migration::new(version, Cow::Borrowed(name), MigrationType::Simple, sql.into_sql_str(), false)
        })
        .collect();
    let migrator = Migrator::with_migrations(migrations);
    // Two processes may create a new file at once: the one that comes second finds everything done.
    let mut outcome = migrator.run(pool).await;
    for _ in 0..3 {
        if !matches!(outcome, Err(MigrateError::Execute(_) | MigrateError::ExecuteMigration(..))) {
            break;
        }
        outcome = migrator.run(pool).await;
    }
    outcome.map_err(|error| refused(error, MIGRATIONS.len()))
}
