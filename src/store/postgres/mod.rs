//! PostgreSQL: one database for any number of programs.
//!
//! - [`load`] and [`flush`]: rows of a batch into and out of the archive's workspace.
//! - [`accounts`], [`secrets`], [`archive`], [`coverage`], [`quarantine`], [`outbox`], [`history`]: the traits, one file each, SQL in
//!   full beside its method. [`reading`]: the words for statements that stand once for all databases, in `store::reading` and
//!   `store::browse`.
//! - [`mod@inspect`]: a look that changes nothing. [`schema`], [`full_text`]: the schema, roles and rights. [`mod@column`]: how values stand in columns.
//! - [`wake_up`]: `LISTEN`, for new rows of the queue and for leases.
//! - [`leases`], [`fence`]: which node holds which account, and that it alone writes about it.
//!
//! The database may restart, be out of reach, or take no writes for a while. A transaction that fails for such a reason is
//! done again, soon by the writer itself, later by whoever asked for it; nothing is acknowledged before. Each transaction
//! writes its number into the writer's row of `writers`. If the answer to a `COMMIT` is lost, that row tells what became
//! of it: reading it waits for the lock that an unfinished transaction still holds.

mod accounts;
mod archive;
mod column;
mod coverage;
mod fence;
mod flush;
mod full_text;
mod history;
mod inspect;
mod leases;
mod load;
mod outbox;
mod quarantine;
mod reading;
mod retention;
mod schema;
mod secrets;
mod wake_up;

use std::{
    collections::BTreeSet,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

pub(super) use self::inspect::inspect;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, PgPool, Postgres, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio_util::sync::CancellationToken;

use self::{column::Time, fence::Fence, leases::LeaseKeeper, wake_up::Notices};
use super::{
    Leases, Role, StoreError, StoreSettings,
    known_accounts::KnownAccounts,
    trouble::failed,
    writer::{Dialect, UnplacedCall, Waiting, Writer},
};
use crate::{
    archive::{Changes, Keys, Workspace, workspace::RuleSettings},
    identifiers::AccountId,
};

/// How long a connection may take to come about, and how long a reader waits for its turn.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Statements kept prepared on a connection: all there are, with room.
const PREPARED_STATEMENTS: usize = 256;

/// The store in a PostgreSQL database.
pub(super) struct PostgresStore {
    writer: Writer<PostgresDialect>,
    readers: PgPool,
    rules: RuleSettings,
    known_accounts: KnownAccounts,
    /// `cluster.node_id` of a server; a tool leaves no trace.
    node: Option<String>,
    fence: Fence,
    /// A server's leases.
    keeper: Option<LeaseKeeper>,
    /// See [`PostgresDialect`].
    writer_id: String,
    has_written: Arc<AtomicBool>,
    /// Ends the listener.
    closed: CancellationToken,
}

/// What the writer needs of PostgreSQL.
#[derive(Debug)]
pub(super) struct PostgresDialect {
    /// Key of the writer's row in `writers`: a UUID, which needs no quoting.
    writer: String,
    /// There may be such a row.
    has_written: Arc<AtomicBool>,
    fence: Fence,
}

impl Dialect for PostgresDialect {
    type Database = Postgres;
    // Serialization failures and connections that died while they were idle; longer outages are for the callers.
    const RETRY_AFTER: &'static [Duration] = &[Duration::ZERO, Duration::from_millis(200)];
    const TAKE_TURN: Option<&'static str> = Some("SELECT ucwa_relay_last_ids()");
    const HURRY: Option<&'static str> = Some("SET LOCAL lock_timeout = '10ms'");
    const IS_WHOLE: Option<&'static str> = Some("SELECT");
    const FORGET_PLANS: Option<&'static str> = Some("DISCARD PLANS");
    const TRANSACTION_LIMIT: Duration = Duration::from_mins(1);

    type Fence = Fence;

    fn fence(&self) -> Fence {
        self.fence.clone()
    }

    async fn refused(
        fence: &Fence,
        connection: &mut PgConnection,
        presented: &BTreeSet<(AccountId, i64)>,
    ) -> Result<BTreeSet<(AccountId, i64)>, sqlx::Error> {
        fence.refused(connection, presented).await
    }

    async fn held(
        fence: &Fence,
        connection: &mut PgConnection,
    ) -> Result<Option<Vec<AccountId>>, sqlx::Error> {
        fence.held(connection).await
    }

    async fn begin<'c>(
        &self,
        connection: &'c mut PgConnection,
        number: i64,
    ) -> Result<Transaction<'c, Postgres>, sqlx::Error> {
        self.has_written.store(true, Ordering::Relaxed);
        // One round trip; and a database that takes no writes says so before any work is done.
        connection
            .begin_with(AssertSqlSafe(format!(
                "BEGIN; INSERT INTO writers (writer, number) VALUES ('{}', {number})
                        ON CONFLICT (writer) DO UPDATE SET number = excluded.number, written_at = now()",
                self.writer
            )))
            .await
    }

    async fn execute(connection: &mut PgConnection, statement: &'static str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(statement).execute(connection).await.map(drop)
    }

    /// The row is locked until the transaction in question has ended, so the answer is final. The first transaction of a
    /// writer inserts it, which nobody sees and only another insert waits for.
    async fn was_stored(&self, pool: &PgPool, number: i64) -> Result<bool, sqlx::Error> {
        let stored: i64 = sqlx::query_scalar(
            "INSERT INTO writers (writer, number) VALUES ($1, 0)
             ON CONFLICT (writer) DO UPDATE SET number = writers.number
             RETURNING number",
        )
        .bind(&self.writer)
        .fetch_one(pool)
        .await?;
        Ok(stored == number)
    }

    async fn load(
        connection: &mut PgConnection,
        keys: &Keys,
        rules: RuleSettings,
    ) -> Result<Workspace, sqlx::Error> {
        load::workspace(connection, keys, rules).await
    }

    async fn load_waiting(
        connection: &mut PgConnection,
        rules: RuleSettings,
        which: Waiting<'_>,
    ) -> Result<Workspace, sqlx::Error> {
        load::waiting_messages(connection, rules, which).await
    }

    async fn load_unplaced(
        connection: &mut PgConnection,
        which: Waiting<'_>,
    ) -> Result<Vec<UnplacedCall>, sqlx::Error> {
        load::unplaced_calls(connection, which).await
    }

    async fn flush(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), sqlx::Error> {
        flush::flush(connection, changes).await
    }

    /// [`wake_up`] tells.
    async fn changed(&mut self, _: &PgPool) -> Result<bool, sqlx::Error> {
        Ok(false)
    }
}

impl PostgresStore {
    pub(super) async fn connect(settings: &StoreSettings, role: Role) -> Result<Self, StoreError> {
        let options = options(&settings.url)?;
        let shown = shown(&options);
        let reached = |error| cannot_open(&shown, error);
        let mut first = PgConnection::connect_with(&options).await.map_err(reached)?;
        schema::bring_up_to_date(&mut first, &shown).await?;
        let (mut notices, mut keeper) = (None, None);
        if role == Role::Server {
            keeper = Some(LeaseKeeper::begin(&options, &shown, &settings.node, settings.lease_ttl).await?);
            notices = Some(Notices::connect(&options).await.map_err(failed("starting"))?);
            full_text::arrange(&mut first, settings.full_text).await?;
            begin_service(&mut first, &settings.node).await?;
        }
        first.close().await.map_err(failed("opening it"))?;
        let pool = |connections: u32| {
            PgPoolOptions::new()
                .min_connections(0)
                .max_connections(connections)
                .acquire_timeout(CONNECT_TIMEOUT)
                .test_before_acquire(false)
        };
        // A process that hangs, or is stopped, in a transaction keeps its locks until then: all writers wait for some of
        // them, and another node for its leases.
        let patience = format!("{}ms", (settings.lease_ttl / 2).min(Duration::from_secs(60)).as_millis());
        // It looks rows up by keys, whatever the statistics of a young table say; it does not wait long for a user's open
        // transaction, since everybody waits with it; and nobody waits long for a process that hangs. A plan that is
        // forbidden and taken all the same, as for a sequence, counts as so expensive that it would be compiled each time.
        let writing = pool(1).connect_lazy_with(options.clone().options([
            ("enable_seqscan", "off"),
            ("enable_hashjoin", "off"),
            ("enable_mergejoin", "off"),
            ("jit", "off"),
            ("lock_timeout", "2s"),
            ("idle_in_transaction_session_timeout", patience.as_str()),
        ]));
        // A page is found sooner than further processes are started to look for it, and whoever reads leaves the others
        // the database's processors.
        let reading = pool(settings.max_connections.max(1)).test_before_acquire(true).connect_lazy_with(
            options.clone().options([
                ("default_transaction_read_only", "on"),
                ("statement_timeout", "5min"),
                ("max_parallel_workers_per_gather", "0"),
            ]),
        );
        let writer_id = uuid::Uuid::new_v4().to_string();
        let node = (role == Role::Server).then(|| settings.node.clone());
        let leases = keeper.as_ref().map_or_else(Leases::of_everything, LeaseKeeper::leases);
        let fence = Fence { node: node.clone(), leases };
        let has_written = Arc::default();
        let writer = Writer::start(
            PostgresDialect {
                writer: writer_id.clone(),
                has_written: Arc::clone(&has_written),
                fence: fence.clone(),
            },
            writing,
            settings.commit_interval,
            settings.rules,
            false,
            role == Role::Server,
        );
        let closed = CancellationToken::new();
        if let (Some(notices), Some(keeper)) = (notices, &keeper) {
            let wakes = wake_up::Wakes { due: writer.wakes(), leases: keeper.changed() };
            tokio::spawn(wake_up::listen(notices, options, wakes, closed.clone()));
        }
        Ok(Self {
            writer,
            readers: reading,
            rules: settings.rules,
            known_accounts: KnownAccounts::default(),
            node,
            fence,
            keeper,
            writer_id,
            has_written,
            closed,
        })
    }
}

/// Understands `postgres://user@host/database` with libpq's options; the environment and `~/.pgpass` give what is missing.
fn options(url: &str) -> Result<PgConnectOptions, StoreError> {
    let refuse = |problem: String| StoreError::Url { url: super::without_password(url), problem };
    let parsed = url::Url::parse(url).map_err(|error| refuse(error.to_string()))?;
    if parsed.path().len() < 2 {
        return Err(refuse("the database is missing; write postgres://USER@HOST/DATABASE".to_owned()));
    }
    // The driver's own words may repeat the URL, and the password with it.
    let options = PgConnectOptions::from_str(url).map_err(|_| {
        refuse(
            "its host or an option is not understood; write postgres://USER@HOST:PORT/DATABASE?sslmode=verify-full"
                .to_owned(),
        )
    })?;
    let named = options.get_application_name().is_some();
    let options = if named { options } else { options.application_name("ucwa-relay") };
    Ok(options.statement_cache_capacity(PREPARED_STATEMENTS))
}

/// Where it is, for people.
fn shown(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or_else(|| options.get_username());
    match options.get_socket() {
        Some(socket) => format!("{database} at {}", socket.display()),
        None => format!("{database} at {}:{}", options.get_host(), options.get_port()),
    }
}

/// What to do about a database that can't be opened.
fn cannot_open(shown: &str, error: sqlx::Error) -> StoreError {
    let advice = match error.as_database_error().and_then(|error| error.code().map(String::from)).as_deref() {
        Some("3D000") => "create it with: createdb --encoding UTF8 --template template0 DATABASE",
        Some("28P01") => "the password is wrong: give it by PGPASSWORD or ~/.pgpass",
        Some(code) if code.starts_with("28") => {
            "there is no such role, or pg_hba.conf does not let it in: create it with createuser, or correct database.url"
        }
        Some("53300") => "all its connections are taken: end some, or raise max_connections of the server",
        Some("57P03") => "it is starting or stopping: try again in a moment",
        Some(_) => "its log says more",
        None => "is the server running there, and does it take connections from here?",
    };
    StoreError::CannotOpen { database: shown.to_owned(), advice, source: error }
}

/// A server's start: its row in `nodes`, and no state left over from a predecessor that could not say goodbye.
async fn begin_service(connection: &mut PgConnection, node: &str) -> Result<(), StoreError> {
    let failed = failed("starting");
    let mut transaction = connection.begin().await.map_err(&failed)?;
    let now = Time(Timestamp::now());
    // Heartbeats are compared with the database's clock.
    sqlx::query(
        "INSERT INTO nodes (node_id, version, started_at, heartbeat_at, stopped_at) VALUES ($1, $2, now(), now(), NULL)
         ON CONFLICT (node_id) DO UPDATE SET version = excluded.version, started_at = excluded.started_at,
                                             heartbeat_at = excluded.heartbeat_at, stopped_at = NULL",
    )
    .bind(node)
    .bind(env!("CARGO_PKG_VERSION"))
    .execute(&mut *transaction)
    .await
    .map_err(&failed)?;
    sqlx::query("SELECT pg_notify($1, $2)")
        .bind(leases::CHANNEL)
        .bind(node)
        .execute(&mut *transaction)
        .await
        .map_err(&failed)?;
    sqlx::query(
        "UPDATE account_status SET state = 'stopped', detail = 'the server was not running', since = $1, node_id = NULL
          WHERE state <> 'stopped' AND (node_id IS NULL OR node_id = $2)",
    )
    .bind(now)
    .bind(node)
    .execute(&mut *transaction)
    .await
    .map_err(&failed)?;
    // Of writers that ended without a word.
    sqlx::query("DELETE FROM writers WHERE written_at < now() - interval '7 days'")
        .execute(&mut *transaction)
        .await
        .map_err(&failed)?;
    transaction.commit().await.map_err(&failed)
}

impl PostgresStore {
    /// Does `work` about an account in the next transaction, if this node holds the account.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if it does not.
    async fn run_for<T, F>(
        &self,
        account: AccountId,
        operation: &'static str,
        wakes: bool,
        work: F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, StoreError>>
            + Clone
            + Send
            + 'static,
    {
        let (fence, epoch) = (self.fence.clone(), self.fence.epoch(account)?);
        self.writer
            .run(operation, wakes, move |connection| {
                Box::pin(async move {
                    fence.judge(connection, account, epoch).await?;
                    work(connection).await
                })
            })
            .await
    }

    /// An orderly end: what a server says of its accounts, and the writer's row.
    async fn end_service(&self) {
        let node = self.node.clone();
        if node.is_none() && !self.has_written.load(Ordering::Relaxed) {
            return;
        }
        let writer_id = self.writer_id.clone();
        let words = self
            .writer
            .run("stopping", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("stopping");
                    let now = Time(Timestamp::now());
                    sqlx::query("DELETE FROM writers WHERE writer = $1")
                        .bind(writer_id)
                        .execute(&mut *connection)
                        .await
                        .map_err(&failed)?;
                    let Some(node) = node else {
                        return Ok(());
                    };
                    sqlx::query("UPDATE nodes SET heartbeat_at = now(), stopped_at = now() WHERE node_id = $1")
                        .bind(&node)
                        .execute(&mut *connection)
                        .await
                        .map_err(&failed)?;
                    sqlx::query(
                        "UPDATE account_status SET state = 'stopped', detail = 'the server was stopped', since = $1,
                                                   node_id = NULL
                          WHERE state <> 'stopped' AND (node_id IS NULL OR node_id = $2)",
                    )
                    .bind(now)
                    .bind(node)
                    .execute(connection)
                    .await
                    .map_err(failed)
                    .map(drop)
                })
            });
        // A database that is away does not keep the program from ending.
        match tokio::time::timeout(CONNECT_TIMEOUT, words).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "could not note the end of the server in the database"),
            Err(_) => tracing::warn!("could not note the end of the server in the database in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_understood_or_refused_without_the_password() {
        let understood = options("postgres://relay:geheim@db:5433/archive?sslmode=verify-full").unwrap();
        assert_eq!(shown(&understood), "archive at db:5433");
        assert_eq!(understood.get_application_name(), Some("ucwa-relay"));
        for (url, word) in [
            ("postgres://relay:geheim@db", "database is missing"),
            ("postgres://relay:geheim@db/archive?sslmode=perhaps", "sslmode"),
        ] {
            let refused = options(url).unwrap_err().to_string();
            assert!(refused.contains(word) && !refused.contains("geheim"), "{refused}");
        }
    }
}
