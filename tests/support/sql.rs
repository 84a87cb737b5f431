//! What any other program says to the database, whichever it is.

use std::str::FromStr;

use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row, SqliteConnection,
    sqlite::SqliteConnectOptions,
};
use tempfile::TempDir;

use super::postgres::{self, PostgresDatabase};

/// Which database a test is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// Where a database is; it goes when this goes.
pub(crate) enum Place {
    Sqlite(TempDir),
    Postgres(PostgresDatabase),
}

impl Place {
    /// Where there is no database yet.
    pub(crate) async fn new(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => Self::Sqlite(tempfile::tempdir().expect("a temporary folder")),
            Kind::Postgres => Self::Postgres(PostgresDatabase::new().await),
        }
    }

    /// For `database.url`.
    pub(crate) fn url(&self) -> String {
        match self {
            Self::Sqlite(directory) => format!("sqlite://{}", directory.path().join("relay.db").display()),
            Self::Postgres(database) => database.url().to_owned(),
        }
    }

    /// A plain connection, as another program has it.
    pub(crate) async fn connect(&self) -> Sql {
        match self {
            Self::Sqlite(_) => {
                // A test that looks at statements means those of the program.
                let options =
                    SqliteConnectOptions::from_str(&self.url()).expect("a URL").disable_statement_logging();
                let connection = options.connect().await.expect("the file opens");
                Sql::Sqlite(Box::new(connection))
            }
            Self::Postgres(database) => Sql::Postgres(Box::new(database.connect().await)),
        }
    }
}

/// A plain connection.
pub(crate) enum Sql {
    Sqlite(Box<SqliteConnection>),
    Postgres(Box<PgConnection>),
}

impl Sql {
    /// Does a statement; gives the number of rows, or what the database said.
    pub(crate) async fn run(&mut self, sql: &str) -> Result<u64, String> {
        let query = AssertSqlSafe(sql.to_owned());
        match self {
            Self::Sqlite(connection) => {
                sqlx::query(query).execute(connection.as_mut()).await.map(|done| done.rows_affected())
            }
            Self::Postgres(connection) => {
                sqlx::query(query).execute(connection.as_mut()).await.map(|done| done.rows_affected())
            }
        }
        .map_err(|error| error.to_string())
    }

    /// Lets go of the database. One that is dropped does so a little later.
    pub(crate) async fn close(self) {
        match self {
            Self::Sqlite(connection) => connection.close().await,
            Self::Postgres(connection) => connection.close().await,
        }
        .expect("the connection closes");
    }

    /// Does several statements, divided by semicolons.
    pub(crate) async fn run_all(&mut self, sql: &str) -> Result<(), String> {
        let script = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        match self {
            Self::Sqlite(connection) => script.execute(connection.as_mut()).await.map(drop),
            Self::Postgres(connection) => script.execute(connection.as_mut()).await.map(drop),
        }
        .map_err(|error| error.to_string())
    }

    /// Rows as `a|b|c`, NULL as nothing.
    pub(crate) async fn rows(&mut self, sql: &str) -> Vec<String> {
        let connection = match self {
            Self::Sqlite(connection) => connection,
            Self::Postgres(connection) => return postgres::rows(connection, sql).await,
        };
        sqlx::query(AssertSqlSafe(sql.to_owned()))
            .fetch_all(connection.as_mut())
            .await
            .expect("the query runs")
            .iter()
            .map(|row| {
                (0..row.len())
                    .map(|column| {
                        let value: Option<String> = row.try_get_unchecked(column).expect("as text");
                        value.unwrap_or_default()
                    })
                    .collect::<Vec<_>>()
                    .join("|")
            })
            .collect()
    }

    /// How many rows `SELECT count(*) FROM sql` counts.
    /// SQLite's index knows the words of what the relay wrote. This adds texts that a test wrote, as they stand: that will do
    /// for words with spaces between them.
    pub(crate) async fn index_texts(&mut self) {
        if matches!(self, Self::Sqlite(_)) {
            self.run(
                "INSERT INTO messages_fts (rowid, body)
                 SELECT id, body FROM messages WHERE id NOT IN (SELECT id FROM messages_fts_docsize)",
            )
            .await
            .expect("there is an index");
        }
    }

    pub(crate) async fn count(&mut self, sql: &str) -> i64 {
        self.rows(&format!("SELECT count(*) FROM {sql}")).await[0].parse().expect("a number")
    }
}

/// Makes each of these functions, which take a [`Kind`], a test on either database; with a flavour of the runtime they
/// are asynchronous.
#[macro_export]
macro_rules! on_both_databases {
    ($($test:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[test]
            fn $test() {
                super::$test(super::Kind::Sqlite);
            })*
        }

        mod on_postgres {
            $(#[test]
            fn $test() {
                super::$test(super::Kind::Postgres);
            })*
        }
    };
    ($flavor:literal: $($test:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test(flavor = $flavor)]
            async fn $test() {
                Box::pin(super::$test(super::Kind::Sqlite)).await;
            })*
        }

        mod on_postgres {
            $(#[tokio::test(flavor = $flavor)]
            async fn $test() {
                Box::pin(super::$test(super::Kind::Postgres)).await;
            })*
        }
    };
}
