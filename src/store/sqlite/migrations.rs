//! The schema of a SQLite file, brought up to date at every start.

use std::borrow::Cow;

use sqlx::{
    SqlSafeStr, SqlitePool,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use crate::store::{StoreError, trouble::failed};

/// Every migration there ever was, in order: number, name, text. A published one is never changed.
const MIGRATIONS: [(i64, &str, &str); 1] =
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
    outcome.map_err(|error| match error {
        MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _) => {
            failed("bringing the schema up to date")(source)
        }
        MigrateError::VersionMissing(version) => StoreError::Schema {
            problem: format!(
                "a newer ucwa-relay has brought it to version {version}, this one knows {newest}; install the newer \
                 program, or restore a copy of the database from before",
                newest = MIGRATIONS.len()
            ),
        },
        MigrateError::VersionMismatch(version) => StoreError::Schema {
            problem: format!(
                "version {version} of the schema was applied with another text; the database was made by a build \
                 that was never released, or was altered: restore a copy, or start with a new file"
            ),
        },
        other => StoreError::Schema { problem: other.to_string() },
    })
}
