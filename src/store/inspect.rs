//! A look at the database that changes nothing: for whoever wants to know why it does not work.
//!
//! [`super::connect`] creates what is missing and brings the schema up to date; this does neither.

use std::time::Duration;

use jiff::Timestamp;

use super::{StoreError, StoreSettings, postgres, sqlite};

/// What was found.
#[derive(Debug)]
pub struct Inspection {
    /// The database program with its version.
    pub product: String,
    /// How the schema fits this program.
    pub schema: SchemaVersion,
    /// Whether it takes what is written: a row was inserted and withdrawn. `None` without a schema that fits.
    pub writable: Option<Result<(), StoreError>>,
    /// How long that took.
    pub writing_took: Duration,
    /// The database's clock, where it has one of its own.
    pub clock: Option<ClockReading>,
    /// Its connections, where they are limited.
    pub connections: Option<Connections>,
}

/// How a database's schema fits this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchemaVersion {
    /// The newest version that was applied; `None`: the database is empty.
    pub applied: Option<i64>,
    /// The newest one that this program knows.
    pub known: i64,
}

impl SchemaVersion {
    pub(super) fn new(applied: Option<i64>, known: usize) -> Self {
        Self { applied, known: i64::try_from(known).unwrap_or(i64::MAX) }
    }

    /// It is the one that this program works with.
    pub fn fits(self) -> bool {
        self.applied == Some(self.known)
    }
}

/// What another clock said.
#[derive(Debug, Clone, Copy)]
pub struct ClockReading {
    /// Its time.
    pub theirs: Timestamp,
    /// Ours, half way between question and answer.
    pub ours: Timestamp,
    /// How far the comparison may be off: half the time that the answer took.
    pub uncertainty: Duration,
}

impl ClockReading {
    /// From the times at which the question left and the answer came.
    pub fn new(asked: Timestamp, theirs: Timestamp, answered: Timestamp) -> Self {
        let half = answered.duration_since(asked).unsigned_abs() / 2;
        Self { theirs, ours: asked.checked_add(half).unwrap_or(answered), uncertainty: half }
    }
}

/// Connections of a database server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    /// Open now, by whomever, this one not counted.
    pub open: i64,
    /// How many this user may have there at most.
    pub limit: i64,
    /// How many a server with these settings opens.
    pub wanted: i64,
}

/// Looks at the database that `settings.url` names. Nothing is created, migrated or left in it.
///
/// # Errors
/// [`StoreError::Url`] for a URL that is not understood; [`StoreError::CannotOpen`], [`StoreError::Unavailable`] or
/// [`StoreError::Refused`] if the database can't be opened or read.
pub async fn inspect(settings: &StoreSettings) -> Result<Inspection, StoreError> {
    if super::is_postgres(&settings.url) {
        postgres::inspect(settings).await
    } else {
        sqlite::inspect(settings).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_read_half_way_between_question_and_answer() {
        let at = |milliseconds| Timestamp::from_millisecond(milliseconds).unwrap();
        let reading = ClockReading::new(at(1000), at(5000), at(1400));
        assert_eq!((reading.ours, reading.uncertainty), (at(1200), Duration::from_millis(200)));
    }
}
