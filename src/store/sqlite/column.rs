//! How values stand in SQLite columns, and what the driver's errors mean for callers.

use jiff::Timestamp;
use sqlx::{Row, sqlite::SqliteRow};

use crate::{
    archive::fact::{Direction, InvitationAction, InvitationKind},
    store::{OutboxState, StoreError},
};

pub(super) use crate::archive::text::iso_milliseconds as time_text;

/// As [`time_text`], for columns that may be NULL.
pub(super) fn optional_time_text(instant: Option<Timestamp>) -> Option<String> {
    instant.map(time_text)
}

/// Reads a timestamp column that the service writes.
pub(super) fn time(row: &SqliteRow, column: &str) -> Result<Timestamp, sqlx::Error> {
    optional_time(row, column)?.ok_or_else(|| undecodable(column, "it is NULL"))
}

/// Reads a timestamp column that may be NULL.
pub(super) fn optional_time(row: &SqliteRow, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
    row.try_get::<Option<String>, _>(column)?
        .map(|text| text.parse().map_err(|error| undecodable(column, error)))
        .transpose()
}

/// Reads text that any program may have written. SQLite does not look whether it is UTF-8; what is not is replaced by
/// U+FFFD, so that one such value never makes a whole result unreadable.
pub(super) fn lossy_text(row: &SqliteRow, column: &str) -> Result<Option<String>, sqlx::Error> {
    Ok(row
        .try_get_unchecked::<Option<Vec<u8>>, _>(column)?
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// As [`lossy_text`], for columns that are never NULL.
pub(super) fn some_lossy_text(row: &SqliteRow, column: &str) -> Result<String, sqlx::Error> {
    Ok(lossy_text(row, column)?.unwrap_or_default())
}

/// Reads text that has to be as it was written; fails if it is not UTF-8.
pub(super) fn exact_text(row: &SqliteRow, column: &str) -> Result<Option<String>, sqlx::Error> {
    row.try_get(column)
}

/// Reads a timestamp that a user may have written; what cannot be read is the beginning of time.
pub(super) fn user_time(row: &SqliteRow, column: &str) -> Result<Timestamp, sqlx::Error> {
    Ok(optional_user_time(row, column)?.unwrap_or(Timestamp::UNIX_EPOCH))
}

/// Reads a timestamp that may be NULL from a table that users write; what cannot be read counts as NULL.
pub(super) fn optional_user_time(row: &SqliteRow, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
    Ok(lossy_text(row, column)?.and_then(|text| text.parse().ok()))
}

/// The column holds what this program does not write.
pub(super) fn undecodable(
    column: &str,
    problem: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: problem.into() }
}

/// Reads an enumeration by a function that knows its words.
pub(super) fn word<T>(
    row: &SqliteRow,
    column: &str,
    known: impl FnOnce(&str) -> Option<T>,
) -> Result<T, sqlx::Error> {
    let text: String = row.try_get(column)?;
    known(&text).ok_or_else(|| undecodable(column, format!("{text:?} is unknown")))
}

/// As [`word`], for columns that may be NULL.
pub(super) fn optional_word<T>(
    row: &SqliteRow,
    column: &str,
    known: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, sqlx::Error> {
    match row.try_get::<Option<String>, _>(column)? {
        None => Ok(None),
        Some(text) => {
            known(&text).map(Some).ok_or_else(|| undecodable(column, format!("{text:?} is unknown")))
        }
    }
}

/// `direction`.
pub(super) fn direction(text: &str) -> Option<Direction> {
    [Direction::Incoming, Direction::Outgoing].into_iter().find(|known| known.as_str() == text)
}

/// `invitations.kind`.
pub(super) fn invitation_kind(text: &str) -> Option<InvitationKind> {
    [InvitationKind::Messaging, InvitationKind::OnlineMeeting, InvitationKind::Participant]
        .into_iter()
        .find(|known| known.as_str() == text)
}

/// `invitations.action`.
pub(super) fn invitation_action(text: &str) -> Option<InvitationAction> {
    [InvitationAction::Accepted, InvitationAction::Declined, InvitationAction::Ignored]
        .into_iter()
        .find(|known| known.as_str() == text)
}

/// `outbox.state`.
pub(super) fn outbox_state(text: &str) -> Option<OutboxState> {
    OutboxState::ALL.into_iter().find(|known| known.as_str() == text)
}

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

/// Primary result code of `sqlite3.h`.
fn result_code(error: &sqlx::Error) -> Option<i64> {
    let code = error.as_database_error()?.code()?.parse::<i64>().ok()?;
    Some(code & 0xff)
}

/// Another program held a lock for longer than we wait.
fn is_locked(error: &sqlx::Error) -> bool {
    /// BUSY.
    const BUSY: i64 = 5;
    result_code(error) == Some(BUSY)
}

/// Trouble with the database and not with what was asked of it.
fn is_passing(error: &sqlx::Error) -> bool {
    /// Primary result codes of `sqlite3.h`: PERM, LOCKED, NOMEM, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL,
    /// NOTADB.
    const PASSING: [i64; 10] = [3, 6, 7, 8, 10, 11, 13, 14, 15, 26];
    match error {
        sqlx::Error::Database(_) => result_code(error).is_some_and(|code| PASSING.contains(&code)),
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        _ => false,
    }
}

/// Whether a constraint of this kind refused the statement: some row is there already.
pub(super) fn is_duplicate(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}
