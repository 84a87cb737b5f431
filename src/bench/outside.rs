//! The database as any other program sees it: plain SQL on a connection of its own, in words that both databases speak.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

/// Which database is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Database {
    /// A file in a temporary folder, or in this one.
    Sqlite(Option<PathBuf>),
    /// A server, by the URL of a database whose user may create others; and how the names of those begin that this run
    /// makes.
    Postgres { url: String, prefix: String },
}

impl Database {
    /// How it is called in the report.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Sqlite(_) => "SQLite",
            Self::Postgres { .. } => "PostgreSQL",
        }
    }

    /// A PostgreSQL server.
    pub(super) fn on_server(url: String) -> Self {
        let run = uuid::Uuid::new_v4().simple().to_string();
        Self::Postgres { url, prefix: format!("ucwa_relay_bench_{}", &run[..8]) }
    }

    /// Removes whatever this run has made and not removed, as after an error.
    pub(super) async fn clean_up(&self) -> anyhow::Result<()> {
        let Self::Postgres { url, prefix } = self else { return Ok(()) };
        let mut connection = PgConnection::connect(url).await?;
        let left: Vec<String> =
            sqlx::query_scalar("SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1)")
                .bind(prefix)
                .fetch_all(&mut connection)
                .await?;
        for name in left {
            drop_database(&mut connection, &name).await?;
        }
        Ok(connection.close().await?)
    }
}

/// An empty database of one measurement, gone with it.
pub(super) enum Place {
    Sqlite(TempDir),
    Postgres { url: String, server: String, name: String },
}

impl Place {
    /// Where there is nothing yet.
    pub(super) async fn new(database: &Database) -> anyhow::Result<Self> {
        match database {
            Database::Sqlite(None) => Ok(Self::Sqlite(tempfile::tempdir()?)),
            Database::Sqlite(Some(folder)) => {
                let made = tempfile::tempdir_in(folder);
                Ok(Self::Sqlite(made.with_context(|| format!("in the folder {}", folder.display()))?))
            }
            Database::Postgres { url: server, prefix } => {
                let name = format!("{prefix}_{}", uuid::Uuid::new_v4().simple());
                let mut connection = PgConnection::connect(server)
                    .await
                    .context("the PostgreSQL of --postgres can't be reached")?;
                sqlx::query(AssertSqlSafe(format!(
                    "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'"
                )))
                .execute(&mut connection)
                .await
                .context("the user of --postgres can't create a database; give it CREATEDB")?;
                connection.close().await?;
                let mut url: url::Url = server.parse().context("--postgres is no URL")?;
                url.set_path(&name);
                Ok(Self::Postgres { url: url.into(), server: server.clone(), name })
            }
        }
    }

    /// For `database.url`.
    pub(super) fn url(&self) -> String {
        match self {
            Self::Sqlite(folder) => format!("sqlite://{}", file(folder).display()),
            Self::Postgres { url, .. } => url.clone(),
        }
    }

    /// A connection as another program has it.
    pub(super) async fn connect(&self) -> anyhow::Result<Outside> {
        Outside::connect(&self.url()).await
    }

    /// Takes the database away; a folder goes by itself.
    pub(super) async fn remove(self) -> anyhow::Result<()> {
        if let Self::Postgres { server, name, .. } = self {
            let mut connection = PgConnection::connect(&server).await?;
            drop_database(&mut connection, &name).await?;
            connection.close().await?;
        }
        Ok(())
    }
}

async fn drop_database(connection: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    sqlx::query(AssertSqlSafe(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")))
        .execute(connection)
        .await
        .with_context(|| format!("the database {name} is left behind"))?;
    Ok(())
}

fn file(folder: &TempDir) -> PathBuf {
    folder.path().join("bench.db")
}

/// A plain connection.
pub(super) enum Outside {
    Sqlite(Box<SqliteConnection>),
    Postgres(Box<PgConnection>),
}

impl Outside {
    /// To the database of a `database.url`; waits its turn for a minute.
    pub(super) async fn connect(url: &str) -> anyhow::Result<Self> {
        if !url.starts_with("sqlite:") {
            return Ok(Self::Postgres(Box::new(PgConnection::connect(url).await?)));
        }
        let options: SqliteConnectOptions = url.parse()?;
        let options = options.create_if_missing(true).busy_timeout(Duration::from_secs(60));
        Ok(Self::Sqlite(Box::new(SqliteConnection::connect_with(&options).await?)))
    }

    /// Does a statement.
    pub(super) async fn run(&mut self, statement: &str) -> anyhow::Result<()> {
        let query = AssertSqlSafe(statement.to_owned());
        match self {
            Self::Sqlite(connection) => sqlx::query(query).execute(connection.as_mut()).await.map(drop)?,
            Self::Postgres(connection) => sqlx::query(query).execute(connection.as_mut()).await.map(drop)?,
        }
        Ok(())
    }

    /// One number.
    pub(super) async fn number(&mut self, question: &str) -> anyhow::Result<i64> {
        let query = AssertSqlSafe(question.to_owned());
        Ok(match self {
            Self::Sqlite(connection) => sqlx::query_scalar(query).fetch_one(connection.as_mut()).await?,
            Self::Postgres(connection) => sqlx::query_scalar(query).fetch_one(connection.as_mut()).await?,
        })
    }

    /// One text.
    pub(super) async fn text(&mut self, question: &str) -> anyhow::Result<String> {
        let query = AssertSqlSafe(question.to_owned());
        Ok(match self {
            Self::Sqlite(connection) => sqlx::query_scalar(query).fetch_one(connection.as_mut()).await?,
            Self::Postgres(connection) => sqlx::query_scalar(query).fetch_one(connection.as_mut()).await?,
        })
    }

    /// Puts a row into the outbox, as the smallest use does.
    pub(super) async fn insert(&mut self, account: &str, recipient: &str, body: &str) -> anyhow::Result<()> {
        const INSERT: &str = "INSERT INTO outbox (account, recipients, body) VALUES ($1, $2, $3)";
        match self {
            Self::Sqlite(connection) => {
                let query = sqlx::query(INSERT).bind(account).bind(recipient).bind(body);
                query.execute(connection.as_mut()).await.map(drop)?;
            }
            Self::Postgres(connection) => {
                let query = sqlx::query(INSERT).bind(account).bind(recipient).bind(body);
                query.execute(connection.as_mut()).await.map(drop)?;
            }
        }
        Ok(())
    }

    /// Puts `rows` rows for each of `destinations` correspondents of each account from `first` to `last` into the outbox, in
    /// one statement, the destinations in turn. Bodies are `NAME account destination row`.
    pub(super) async fn insert_many(
        &mut self,
        name: &str,
        (first, last): (usize, usize),
        destinations: usize,
        rows: usize,
    ) -> anyhow::Result<()> {
        self.run(&format!(
            "INSERT INTO outbox (account, recipients, body)
             WITH RECURSIVE
             d (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM d WHERE i < {destinations}),
             n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
             SELECT a.sip_uri, 'silent.' || d.i || '@fabrikam.example', '{name} ' || a.id || ' ' || d.i || ' ' || n.i
               FROM accounts a CROSS JOIN d CROSS JOIN n
              WHERE a.sip_uri BETWEEN '{}' AND '{}'
              ORDER BY n.i, d.i, a.id",
            super::stage::account(first),
            super::stage::account(last),
        ))
        .await
    }
}
