//! A look at a PostgreSQL database that changes nothing.

use std::time::Instant;

use jiff::Timestamp;
use sqlx::{Connection as _, PgConnection, Row};

use super::{CONNECT_TIMEOUT, cannot_open, options, schema, shown};
use crate::store::{
    StoreError, StoreSettings,
    inspect::{ClockReading, Connections, Inspection, SchemaVersion},
    trouble::failed,
};

/// A server's connections besides its readers: the writer, the leases' keeper, and who listens to notices.
const BESIDES_READERS: i64 = 3;

/// Looks at the database of `settings.url`.
pub(in crate::store) async fn inspect(settings: &StoreSettings) -> Result<Inspection, StoreError> {
    let options = options(&settings.url)?;
    let shown = shown(&options);
    let connecting = tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&options));
    let mut connection = connecting
        .await
        .unwrap_or_else(|_| Err(sqlx::Error::PoolTimedOut))
        .map_err(|error| cannot_open(&shown, error))?;
    let looked = look(&mut connection, settings).await;
    // What was found does not depend on it.
    let _ = connection.close().await;
    looked
}

async fn look(connection: &mut PgConnection, settings: &StoreSettings) -> Result<Inspection, StoreError> {
    let failed = failed("looking at it");
    let version: String =
        sqlx::query_scalar("SHOW server_version").fetch_one(&mut *connection).await.map_err(&failed)?;
    let asked = Timestamp::now();
    let microseconds: i64 =
        sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
            .fetch_one(&mut *connection)
            .await
            .map_err(&failed)?;
    let answered = Timestamp::now();
    let clock = Timestamp::from_microsecond(microseconds)
        .ok()
        .map(|theirs| ClockReading::new(asked, theirs, answered));
    // -1 stands for no limit of the role's or the database's own.
    let row = sqlx::query(
        "SELECT (SELECT count(*) FROM pg_stat_activity
                  WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()) AS open,
                least(current_setting('max_connections')::bigint
                      - CASE WHEN rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::bigint END,
                      nullif(rolconnlimit, -1)::bigint, nullif(datconnlimit, -1)::bigint) AS most
           FROM pg_roles, pg_database
          WHERE rolname = current_user AND datname = current_database()",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(&failed)?;
    let connections = Connections {
        open: row.try_get("open").map_err(&failed)?,
        limit: row.try_get("most").map_err(&failed)?,
        wanted: i64::from(settings.max_connections) + BESIDES_READERS,
    };
    let schema = SchemaVersion::new(schema::applied(connection).await?, schema::MIGRATIONS.len());
    let began = Instant::now();
    let writable = if schema.fits() { Some(try_to_write(connection).await) } else { None };
    let writing_took = began.elapsed();
    let product = format!("PostgreSQL {version}");
    Ok(Inspection { product, schema, writable, writing_took, clock, connections: Some(connections) })
}

/// Inserts a row and withdraws it.
async fn try_to_write(connection: &mut PgConnection) -> Result<(), StoreError> {
    let failed = failed("a trial row");
    let mut transaction = connection.begin().await.map_err(&failed)?;
    sqlx::query("INSERT INTO writers (writer, number) VALUES ($1, 0)")
        .bind(uuid::Uuid::new_v4().to_string())
        .execute(&mut *transaction)
        .await
        .map_err(&failed)?;
    transaction.rollback().await.map_err(&failed)
}
