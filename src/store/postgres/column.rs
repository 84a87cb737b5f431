//! How values stand in PostgreSQL columns and parameters.

use std::borrow::Cow;

use jiff::{SignedDuration, Timestamp};
use sqlx::{
    Decode, Encode, Postgres, Row, Type, ValueRef,
    encode::IsNull,
    error::BoxDynError,
    postgres::{PgArgumentBuffer, PgHasArrayType, PgRow, PgTypeInfo, PgValueFormat, PgValueRef, types::Oid},
};

use crate::{
    archive::text::{iso_milliseconds, storable, to_milliseconds},
    store::columns::Columns,
};

/// Where PostgreSQL's binary `timestamptz` counts its microseconds from: 2000-01-01, in seconds of the Unix epoch.
const EPOCH_SECONDS: i64 = 946_684_800;

/// The earliest finite `timestamptz`; ours may be earlier.
const EARLIEST: i64 = -211_813_488_000_000_000;

/// A `timestamptz`, in whole milliseconds when it is written. Infinity is read as the last instant there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time(pub(super) Timestamp);

/// As a nullable parameter.
pub(super) fn optional_time(instant: Option<Timestamp>) -> Option<Time> {
    instant.map(Time)
}

impl Type<Postgres> for Time {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(1184))
    }
}

impl PgHasArrayType for Time {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(1185))
    }
}

impl Encode<'_, Postgres> for Time {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        let microseconds = to_milliseconds(self.0).as_microsecond() - EPOCH_SECONDS * 1_000_000;
        Encode::<Postgres>::encode_by_ref(&microseconds.max(EARLIEST), buffer)
    }
}

impl<'r> Decode<'r, Postgres> for Time {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        if value.format() == PgValueFormat::Text {
            return Ok(Self(value.as_str()?.parse()?));
        }
        let microseconds = <i64 as Decode<Postgres>>::decode(value)?;
        let since_epoch = SignedDuration::from_micros(microseconds)
            .saturating_add(SignedDuration::from_secs(EPOCH_SECONDS));
        Ok(Self(Timestamp::from_duration(since_epoch).unwrap_or(if microseconds < 0 {
            Timestamp::MIN
        } else {
            Timestamp::MAX
        })))
    }
}

/// Text as a parameter: PostgreSQL takes no NUL, and one text must not spoil a statement with many rows.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    storable(text)
}

/// As [`text`], for what may be NULL.
pub(super) fn optional_text(text: Option<&str>) -> Option<Cow<'_, str>> {
    text.map(storable)
}

impl Columns for PgRow {
    fn optional_integer(&self, column: &str) -> Result<Option<i64>, sqlx::Error> {
        self.try_get(column)
    }

    fn flag(&self, column: &str) -> Result<bool, sqlx::Error> {
        self.try_get(column)
    }

    fn optional_text(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        self.try_get(column)
    }

    /// PostgreSQL takes no text that is none.
    fn lossy_text(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        self.try_get(column)
    }

    fn optional_bytes(&self, column: &str) -> Result<Option<Vec<u8>>, sqlx::Error> {
        self.try_get(column)
    }

    fn optional_time(&self, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
        Ok(self.try_get::<Option<Time>, _>(column)?.map(|time| time.0))
    }

    fn optional_user_time(&self, column: &str) -> Result<Option<Timestamp>, sqlx::Error> {
        self.optional_time(column)
    }

    fn shown_time(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        if self.try_get_raw(column)?.is_null() {
            return Ok(None);
        }
        Ok(self.optional_time(column)?.map(iso_milliseconds))
    }

    fn exact_time(&self, column: &str) -> Result<Option<String>, sqlx::Error> {
        Ok(self.optional_time(column)?.map(|time| {
            if to_milliseconds(time) == time { iso_milliseconds(time) } else { time.to_string() }
        }))
    }
}
