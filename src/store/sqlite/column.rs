//! How values stand in SQLite columns.

use jiff::Timestamp;
use sqlx::{Row, sqlite::SqliteRow};

use crate::store::columns::{Columns, undecodable};

pub(super) use crate::archive::text::iso_milliseconds as time_text;

/// As [`time_text`], for columns that may be NULL.
pub(super) fn optional_time_text(instant: Option<Timestamp>) -> Option<String> {
    instant.map(time_text)
}

impl Columns for SqliteRow {
    fn optional_integer(&self, column: &str) -> Result<Option<i64>, sqlx::Error> {
        self.try_get(column)
    }

    fn flag(&self, column: &str) -> Result<bool, sqlx::Error> {
        self.try_get(column)
    }

    fn optional_text(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        self.try_get(column)
    }

    /// SQLite does not look whether text is UTF-8; what is not is replaced by U+FFFD.
    fn lossy_text(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        Ok(self
            .try_get_unchecked::<Option<Vec<u8>>, _>(column)?
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn optional_bytes(&self, column: &str) -> Result<Option<Vec<u8>>, sqlx::Error> {
        self.try_get(column)
    }

    fn optional_time(&self, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
        self.optional_text(column)?
            .map(|text| text.parse().map_err(|error| undecodable(column, error)))
            .transpose()
    }

    fn optional_user_time(&self, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
        Ok(self.lossy_text(column)?.and_then(|text| text.parse().ok()))
    }

    fn shown_time(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        self.lossy_text(column)
    }

    fn exact_time(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        self.lossy_text(column)
    }
}
