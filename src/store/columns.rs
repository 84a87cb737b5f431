//! How values are read from a row, whatever the dialect.

use jiff::Timestamp;

use crate::identifiers::SipUri;

/// The columns of one row, by name. Errors are [`sqlx::Error::ColumnDecode`] where the column holds what this program
/// does not write.
pub(super) trait Columns {
    /// A number that may be NULL.
    fn optional_integer(&self, column: &str) -> Result<Option<i64>, sqlx::Error>;
    /// Yes or no.
    fn flag(&self, column: &str) -> Result<bool, sqlx::Error>;
    /// Text that has to be as it was written, or NULL.
    fn optional_text(&self, column: &str) -> Result<Option<String>, sqlx::Error>;
    /// Text that any program may have written, or NULL: what is no text is made readable, so that one such value never
    /// makes a whole result unreadable.
    fn lossy_text(&self, column: &str) -> Result<Option<String>, sqlx::Error>;
    /// Bytes, or NULL.
    fn optional_bytes(&self, column: &str) -> Result<Option<Vec<u8>>, sqlx::Error>;
    /// A time that the service writes, or NULL.
    fn optional_time(&self, column: &str) -> Result<Option<Timestamp>, sqlx::Error>;
    /// A time from a table that users write, or NULL; what cannot be read counts as NULL.
    fn optional_user_time(&self, column: &str) -> Result<Option<Timestamp>, sqlx::Error>;
    /// A time as a user wrote it, for people.
    fn shown_time(&self, column: &str) -> Result<Option<String>, sqlx::Error>;

    /// A time that is hashed: as [`Columns::shown_time`], but nothing of it is left out.
    fn exact_time(&self, column: &str) -> Result<Option<String>, sqlx::Error>;

    /// A number.
    fn integer(&self, column: &str) -> Result<i64, sqlx::Error> {
        self.optional_integer(column)?.ok_or_else(|| is_null(column))
    }

    /// Text that has to be as it was written.
    fn text(&self, column: &str) -> Result<String, sqlx::Error> {
        self.optional_text(column)?.ok_or_else(|| is_null(column))
    }

    /// As [`Columns::lossy_text`], for columns that are never NULL.
    fn some_lossy_text(&self, column: &str) -> Result<String, sqlx::Error> {
        Ok(self.lossy_text(column)?.unwrap_or_default())
    }

    /// A time that the service writes.
    fn time(&self, column: &str) -> Result<Timestamp, sqlx::Error> {
        self.optional_time(column)?.ok_or_else(|| is_null(column))
    }

    /// A time that a user may have written; what cannot be read is the beginning of time.
    fn user_time(&self, column: &str) -> Result<Timestamp, sqlx::Error> {
        Ok(self.optional_user_time(column)?.unwrap_or(Timestamp::UNIX_EPOCH))
    }

    /// An enumeration, by a function that knows its words.
    fn word<T>(&self, column: &str, known: impl FnOnce(&str) -> Option<T>) -> Result<T, sqlx::Error> {
        self.optional_word(column, known)?.ok_or_else(|| is_null(column))
    }

    /// As [`Columns::word`], for columns that may be NULL.
    fn optional_word<T>(
        &self,
        column: &str,
        known: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, sqlx::Error> {
        let Some(text) = self.optional_text(column)? else {
            return Ok(None);
        };
        known(&text).map(Some).ok_or_else(|| undecodable(column, format!("{text:?} is unknown")))
    }

    /// A SIP URI.
    fn uri(&self, column: &str) -> Result<SipUri, sqlx::Error> {
        self.text(column)?.parse().map_err(|error| undecodable(column, error))
    }
}

/// The column holds what this program does not write.
pub(super) fn undecodable(
    column: &str,
    problem: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: problem.into() }
}

fn is_null(column: &str) -> sqlx::Error {
    undecodable(column, "it is NULL")
}
