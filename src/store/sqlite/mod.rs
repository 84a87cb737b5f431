//! SQLite: one file, one server at a time.
//!
//! - [`load`] and [`flush`]: rows of a batch into and out of the archive's workspace.
//! - [`accounts`], [`secrets`], [`archive`], [`coverage`], [`quarantine`], [`outbox`], [`history`]: the traits, one file each, SQL in
//!   full beside its method. [`reading`]: the words for statements that stand once for all databases, in `store::reading` and
//!   `store::browse`.
//! - [`mod@inspect`]: a look that changes nothing. [`migrations`], [`full_text`]: the schema. [`mod@column`]: how values stand in columns.
//!
//! The file is in WAL mode with `synchronous=FULL`: readers never wait for the writer, and what was answered is on disk.
//! A server holds an operating-system lock on `FILE.lock` for its life; tools write beside it, through transactions that
//! take the write lock at once, so that they wait for each other and never fail half way.

mod accounts;
mod archive;
mod column;
mod coverage;
mod flush;
mod full_text;
mod history;
mod inspect;
mod load;
mod migrations;
mod outbox;
mod quarantine;
mod reading;
mod retention;
mod secrets;

use std::{
    collections::BTreeSet,
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

pub(super) use self::inspect::inspect;

use jiff::Timestamp;
use sqlx::{
    Connection as _, Pool, Sqlite, SqliteConnection, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use super::{
    ClusterStore, LeaseStore, Leases, Role, StoreError, StoreSettings,
    known_accounts::KnownAccounts,
    trouble::failed,
    writer::{Dialect, UnplacedCall, Waiting, Writer},
};
use crate::{
    archive::{Changes, Keys, Workspace, workspace::RuleSettings},
    identifiers::AccountId,
};

/// How long a statement waits for another process's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Statements kept prepared on a connection: all there are, with room.
const PREPARED_STATEMENTS: usize = 256;

/// The store on a SQLite file.
pub(super) struct SqliteStore {
    writer: Writer<SqliteDialect>,
    readers: SqlitePool,
    rules: RuleSettings,
    known_accounts: KnownAccounts,
    /// Says what a server does at its end; a tool leaves no trace.
    server: Option<ServerHold>,
}

/// What makes this process the server.
#[derive(Debug)]
struct ServerHold {
    node: String,
    /// Held until the store is closed or the process ends, however it ends.
    lock: Mutex<Option<File>>,
}

/// Where the database is.
#[derive(Debug, PartialEq, Eq)]
enum Location {
    /// Only in tests: gone with the last connection.
    Memory,
    File(PathBuf),
}

/// What the writer needs of SQLite.
#[derive(Debug, Default)]
pub(super) struct SqliteDialect {
    /// What `PRAGMA data_version` said last; on the writer's connection it counts the other processes' changes.
    data_version: Option<i64>,
}

impl Dialect for SqliteDialect {
    type Database = Sqlite;
    // There is one server: the lock on the file sees to that.
    type Fence = ();
    // The driver has waited for locks; a full disk is not emptied within moments.
    const RETRY_AFTER: &'static [Duration] = &[];
    // Beginning has taken it.
    const TAKE_TURN: Option<&'static str> = None;
    const HURRY: Option<&'static str> = None;
    const IS_WHOLE: Option<&'static str> = None;
    const FORGET_PLANS: Option<&'static str> = None;
    // A file answers or fails.
    const TRANSACTION_LIMIT: Duration = Duration::from_hours(1);

    fn fence(&self) {}

    async fn refused(
        (): &(),
        _: &mut SqliteConnection,
        _: &BTreeSet<(AccountId, i64)>,
    ) -> Result<BTreeSet<(AccountId, i64)>, sqlx::Error> {
        Ok(BTreeSet::new())
    }

    async fn held((): &(), _: &mut SqliteConnection) -> Result<Option<Vec<AccountId>>, sqlx::Error> {
        Ok(None)
    }

    async fn begin<'c>(
        &self,
        connection: &'c mut SqliteConnection,
        _: i64,
    ) -> Result<Transaction<'c, Sqlite>, sqlx::Error> {
        connection.begin_with("BEGIN IMMEDIATE").await
    }

    async fn execute(connection: &mut SqliteConnection, statement: &'static str) -> Result<(), sqlx::Error> {
        sqlx::query(statement).execute(connection).await.map(drop)
    }

    /// A `COMMIT` that fails has stored nothing.
    async fn was_stored(&self, _: &Pool<Sqlite>, _: i64) -> Result<bool, sqlx::Error> {
        Ok(false)
    }

    async fn load(
        connection: &mut SqliteConnection,
        keys: &Keys,
        rules: RuleSettings,
    ) -> Result<Workspace, sqlx::Error> {
        load::workspace(connection, keys, rules).await
    }

    async fn load_waiting(
        connection: &mut SqliteConnection,
        rules: RuleSettings,
        which: Waiting<'_>,
    ) -> Result<Workspace, sqlx::Error> {
        load::waiting_messages(connection, rules, which).await
    }

    async fn load_unplaced(
        connection: &mut SqliteConnection,
        which: Waiting<'_>,
    ) -> Result<Vec<UnplacedCall>, sqlx::Error> {
        load::unplaced_calls(connection, which).await
    }

    async fn flush(connection: &mut SqliteConnection, changes: &Changes<'_>) -> Result<(), sqlx::Error> {
        flush::flush(connection, changes).await
    }

    async fn changed(&mut self, pool: &Pool<Sqlite>) -> Result<bool, sqlx::Error> {
        let mut connection = pool.acquire().await?;
        let version = sqlx::query_scalar("PRAGMA data_version").fetch_one(&mut *connection).await?;
        Ok(self.data_version.replace(version).is_some_and(|known| known != version))
    }
}

impl SqliteStore {
    pub(super) async fn connect(settings: &StoreSettings, role: Role) -> Result<Self, StoreError> {
        let location = locate(&settings.url)?;
        let lock = match (&location, role) {
            (Location::File(path), Role::Server) => Some(lock(path)?),
            _ => None,
        };
        let (writing, reading) = open(&location, settings.max_connections.max(1)).await?;
        migrations::run(&writing).await?;
        let server = match role {
            Role::Tool => None,
            Role::Server => {
                full_text::arrange(&writing, settings.full_text).await?;
                begin_service(&writing, &settings.node).await?;
                Some(ServerHold { node: settings.node.clone(), lock: Mutex::new(lock) })
            }
        };
        let watched = location != Location::Memory;
        let writer = Writer::start(
            SqliteDialect::default(),
            writing,
            settings.commit_interval,
            settings.rules,
            watched && role == Role::Server,
            role == Role::Server,
        );
        Ok(Self {
            writer,
            readers: reading,
            rules: settings.rules,
            known_accounts: KnownAccounts::default(),
            server,
        })
    }
}

/// Understands `sqlite://relative.db`, `sqlite:///absolute.db` and `sqlite::memory:`.
fn locate(url: &str) -> Result<Location, StoreError> {
    let refuse =
        |problem: &str| StoreError::Url { url: super::without_password(url), problem: problem.to_owned() };
    if url == "sqlite::memory:" {
        return Ok(Location::Memory);
    }
    let Some(path) = url.strip_prefix("sqlite://") else {
        return Err(refuse(
            "write sqlite://relative.db, sqlite:///absolute/path.db or postgres://USER@HOST/DATABASE",
        ));
    };
    if path.is_empty() || path.ends_with('/') {
        return Err(refuse(
            "the file name is missing; write sqlite://relative.db or sqlite:///absolute/path.db",
        ));
    }
    if path.contains('?') {
        return Err(refuse("options after ? are not supported; leave them out"));
    }
    let path = PathBuf::from(path);
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty())
        && !directory.is_dir()
    {
        return Err(refuse(&format!("the directory {} does not exist; create it", directory.display())));
    }
    Ok(Location::File(path))
}

fn lock(path: &Path) -> Result<File, StoreError> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let in_use = |problem: String| {
        StoreError::InUse(format!("the database {} cannot be served: {problem}", path.display()))
    };
    let file =
        File::options().create(true).write(true).truncate(false).open(&lock_path).map_err(|error| {
            in_use(format!("its lock file {} cannot be opened: {error}", Path::new(&lock_path).display()))
        })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(in_use(
            "another ucwa-relay server is running on it; stop that one, or give this one a database of its own \
             (SQLite takes one server; several nodes need PostgreSQL)"
                .to_owned(),
        )),
        Err(TryLockError::Error(error)) => Err(in_use(format!("its lock file cannot be locked: {error}"))),
    }
}

/// Creates the file, if it is missing, so that users who are neither its owner nor of its group can't read what people
/// said; what SQLite puts beside it gets the same mode.
fn create_private(path: &Path) -> std::io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o660);
    match options.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        created => created.map(drop),
    }
}

async fn open(location: &Location, readers: u32) -> Result<(SqlitePool, SqlitePool), StoreError> {
    let unavailable = |source| match failed("opening it")(source) {
        StoreError::Refused { operation, source } => StoreError::Unavailable { operation, source },
        other => other,
    };
    let pool = |connections: u32| {
        SqlitePoolOptions::new()
            .min_connections(0)
            .max_connections(connections)
            .idle_timeout(None)
            .max_lifetime(None)
            .test_before_acquire(false)
    };
    let options = SqliteConnectOptions::new()
        .with_regexp()
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        .statement_cache_capacity(PREPARED_STATEMENTS)
        .pragma("temp_store", "MEMORY");
    match location {
        Location::Memory => {
            // Only one connection sees such a database, so the writer and the readers take turns on it.
            let shared = pool(1).connect_with(options.in_memory(true)).await.map_err(unavailable)?;
            Ok((shared.clone(), shared))
        }
        Location::File(path) => {
            create_private(path).map_err(|error| unavailable(error.into()))?;
            let options = options
                .filename(path)
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                // 64 MiB: in a large archive the messages of many accounts change pages of their own in each index, the same
                // ones again and again. A checkpoint writes each of them once, however often they were changed.
                .pragma("wal_autocheckpoint", "16000")
                // Those pages are kept: 64 MiB a connection, where 2 would be read anew from the system's memory.
                .pragma("cache_size", "-65536");
            let writing = pool(1).connect_with(options.clone()).await.map_err(unavailable)?;
            let reading = pool(readers).connect_lazy_with(options.pragma("query_only", "ON"));
            Ok((writing, reading))
        }
    }
}

/// A server's start: its row in `nodes`, and no state left over from a predecessor that could not say goodbye.
async fn begin_service(pool: &SqlitePool, node: &str) -> Result<(), StoreError> {
    let now = column::time_text(Timestamp::now());
    let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed("starting"))?;
    sqlx::query(
        "INSERT INTO nodes (node_id, version, started_at, heartbeat_at, stopped_at) VALUES (?1, ?2, ?3, ?3, NULL)
         ON CONFLICT (node_id) DO UPDATE SET version = excluded.version, started_at = excluded.started_at,
                                             heartbeat_at = excluded.heartbeat_at, stopped_at = NULL",
    )
    .bind(node)
    .bind(env!("CARGO_PKG_VERSION"))
    .bind(&now)
    .execute(&mut *transaction)
    .await
    .map_err(failed("starting"))?;
    sqlx::query(
        "UPDATE account_status SET state = 'stopped', detail = 'the server was not running', since = ?1, node_id = NULL
          WHERE state <> 'stopped'",
    )
    .bind(&now)
    .execute(&mut *transaction)
    .await
    .map_err(failed("starting"))?;
    transaction.commit().await.map_err(failed("starting"))
}

/// One server has the file to itself and holds all accounts: there is nothing to share and nobody to be fenced from.
impl LeaseStore for SqliteStore {
    fn leases(&self) -> Leases {
        Leases::of_everything()
    }

    fn cluster(&self) -> Option<&dyn ClusterStore> {
        None
    }
}

impl SqliteStore {
    /// Gives the file free for another server.
    fn unlock(&self) {
        if let Some(server) = &self.server {
            server.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// A server's orderly end.
    async fn end_service(&self) {
        let Some(server) = &self.server else {
            return;
        };
        let node = server.node.clone();
        let ended = self
            .writer
            .run("stopping", false, move |connection| {
                Box::pin(async move {
                    let now = column::time_text(Timestamp::now());
                    sqlx::query("UPDATE nodes SET heartbeat_at = ?2, stopped_at = ?2 WHERE node_id = ?1")
                        .bind(node)
                        .bind(&now)
                        .execute(&mut *connection)
                        .await
                        .map_err(failed("stopping"))?;
                    sqlx::query(
                        "UPDATE account_status SET state = 'stopped', detail = 'the server was stopped', since = ?1,
                                                   node_id = NULL
                          WHERE state <> 'stopped'",
                    )
                    .bind(&now)
                    .execute(connection)
                    .await
                    .map_err(failed("stopping"))?;
                    Ok(())
                })
            })
            .await;
        if let Err(error) = ended {
            tracing::warn!(%error, "could not note the end of the server in the database");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_file_or_are_refused_with_words() {
        assert_eq!(locate("sqlite://a.db").unwrap(), Location::File("a.db".into()));
        assert_eq!(locate("sqlite:///tmp/a.db").unwrap(), Location::File("/tmp/a.db".into()));
        assert_eq!(locate("sqlite::memory:").unwrap(), Location::Memory);
        for (url, word) in [
            ("mysql://x/y", "sqlite://relative.db"),
            ("sqlite://", "file name"),
            ("sqlite://no/such/directory/a.db", "does not exist"),
            ("sqlite://a.db?mode=ro", "options"),
            ("mysql://relay:secret@db/relay", "postgres://"),
        ] {
            let refused = locate(url).unwrap_err().to_string();
            assert!(refused.contains(word) && !refused.contains("secret"), "{refused}");
        }
    }
}
