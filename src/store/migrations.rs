//! What every dialect says of migrations that don't fit.

use sqlx::migrate::MigrateError;

use super::{StoreError, trouble::failed};

/// Why the schema could not be brought up to date, with what to do. `known`: the newest version this program knows.
pub(super) fn refused(error: MigrateError, known: usize) -> StoreError {
    match error {
        MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _) => {
            failed("bringing the schema up to date")(source)
        }
        MigrateError::VersionMissing(version) => StoreError::Schema {
            problem: format!(
                "a newer ucwa-relay has brought it to version {version}, this one knows {known}; install the newer \
                 program, or restore a copy of the database from before"
            ),
        },
        MigrateError::VersionMismatch(version) => StoreError::Schema {
            problem: format!(
                "version {version} of the schema was applied with another text; the database was made by a build \
                 that was never released, or was altered: restore a copy, or start with a new database"
            ),
        },
        other => StoreError::Schema { problem: other.to_string() },
    }
}
