//! What a driver's errors mean for callers.

use sqlx::{postgres::PgDatabaseError, sqlite::SqliteError};

use super::StoreError;

/// Sorts a driver's error by what the caller can do about it.
pub(super) fn failed(operation: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| {
        if is_locked(&source) {
            StoreError::Locked { operation, source }
        } else if is_passing(&source) {
            StoreError::Unavailable { operation, source }
        } else {
            StoreError::Refused { operation, source }
        }
    }
}

/// Trouble with the database and not with what was asked of it.
pub(super) fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            if let Some(error) = error.try_downcast_ref::<PgDatabaseError>() {
                postgres_is_in_trouble(error.code())
            } else if let Some(error) = error.try_downcast_ref::<SqliteError>() {
                sqlite_is_in_trouble(error)
            } else {
                false
            }
        }
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        _ => false,
    }
}

/// Passing trouble that lies with single rows: PostgreSQL did not give a lock in time that another program's transaction
/// holds. What does not touch those rows can be done.
pub(super) fn is_of_single_rows(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
        .is_some_and(|error| error.code() == "55P03")
}

/// Another program held SQLite's lock for longer than we wait: `BUSY` of `sqlite3.h`.
fn is_locked(error: &sqlx::Error) -> bool {
    const BUSY: i64 = 5;
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<SqliteError>())
        .is_some_and(|error| sqlite_result_code(error) == Some(BUSY))
}

/// Primary result code of `sqlite3.h`.
fn sqlite_result_code(error: &SqliteError) -> Option<i64> {
    let code: i64 = sqlx::error::DatabaseError::code(error)?.parse().ok()?;
    Some(code & 0xff)
}

/// Primary result codes of `sqlite3.h`: PERM, LOCKED, NOMEM, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL,
/// NOTADB.
fn sqlite_is_in_trouble(error: &SqliteError) -> bool {
    const PASSING: [i64; 10] = [3, 6, 7, 8, 10, 11, 13, 14, 15, 26];
    sqlite_result_code(error).is_some_and(|code| PASSING.contains(&code))
}

/// By PostgreSQL's table of error codes (its manual's appendix A).
fn postgres_is_in_trouble(code: &str) -> bool {
    /// Connection, wrong password, missing database, transaction rolled back for others' sake, out of resources, system.
    const CLASSES: [&str; 6] = ["08", "28", "3D", "40", "53", "58"];
    /// Read-only, transaction timed out, a lock was not given, statement timed out, shut down (4), internal errors (3).
    const CODES: [&str; 12] = [
        "25006", "25P03", "55P03", "57014", "57P01", "57P02", "57P03", "57P05", "XX000", "XX001", "XX002",
        "25P04",
    ];
    CLASSES.iter().any(|class| code.starts_with(class)) || CODES.contains(&code)
}

/// Whether a constraint of this kind refused the statement: some row is there already.
pub(super) fn is_duplicate(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}
