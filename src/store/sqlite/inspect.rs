//! A look at a SQLite file that changes nothing.

use std::time::Instant;

use jiff::Timestamp;
use sqlx::{Connection as _, Row, SqliteConnection, sqlite::SqliteConnectOptions};

use super::{BUSY_TIMEOUT, Location, column::time_text, locate, migrations};
use crate::store::{
    StoreError, StoreSettings,
    inspect::{Inspection, SchemaVersion},
    trouble::failed,
};

/// What to do about a file that can't be opened.
const ADVICE: &str = "does it exist, and may this user read it and write to its directory?";

/// Looks at the file of `settings.url`.
pub(in crate::store) async fn inspect(settings: &StoreSettings) -> Result<Inspection, StoreError> {
    let options = SqliteConnectOptions::new().busy_timeout(BUSY_TIMEOUT);
    let options = match locate(&settings.url)? {
        Location::Memory => options.in_memory(true),
        Location::File(path) => options.filename(path).create_if_missing(false),
    };
    let mut connection = SqliteConnection::connect_with(&options).await.map_err(|source| {
        StoreError::CannotOpen { database: settings.url.clone(), advice: ADVICE, source }
    })?;
    let looked = look(&mut connection, &settings.node).await;
    // What was found does not depend on it.
    let _ = connection.close().await;
    looked
}

async fn look(connection: &mut SqliteConnection, node: &str) -> Result<Inspection, StoreError> {
    let failed_to_look = failed("looking at it");
    let version: String = sqlx::query_scalar("SELECT sqlite_version()")
        .fetch_one(&mut *connection)
        .await
        .map_err(&failed_to_look)?;
    let has_schema = sqlx::query("SELECT 1 FROM sqlite_schema WHERE name = '_sqlx_migrations'")
        .fetch_optional(&mut *connection)
        .await
        .map_err(&failed_to_look)?
        .is_some();
    let applied: Option<i64> = if has_schema {
        sqlx::query("SELECT max(version) FROM _sqlx_migrations WHERE success")
            .fetch_one(&mut *connection)
            .await
            .and_then(|row| row.try_get(0))
            .map_err(&failed_to_look)?
    } else {
        None
    };
    let schema = SchemaVersion::new(applied, migrations::MIGRATIONS.len());
    let began = Instant::now();
    let writable = if schema.fits() { Some(try_to_write(connection, node).await) } else { None };
    let writing_took = began.elapsed();
    Ok(Inspection {
        product: format!("SQLite {version}"),
        schema,
        writable,
        writing_took,
        clock: None,
        connections: None,
    })
}

/// Inserts a row and withdraws it.
async fn try_to_write(connection: &mut SqliteConnection, node: &str) -> Result<(), StoreError> {
    let failed = failed("a trial row");
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
    let now = time_text(Timestamp::now());
    sqlx::query("INSERT INTO nodes (node_id, version, started_at, heartbeat_at) VALUES (?1, ?2, ?3, ?3)")
        .bind(format!("check of {node} {}", uuid::Uuid::new_v4()))
        .bind(env!("CARGO_PKG_VERSION"))
        .bind(now)
        .execute(&mut *transaction)
        .await
        .map_err(&failed)?;
    transaction.rollback().await.map_err(&failed)
}
