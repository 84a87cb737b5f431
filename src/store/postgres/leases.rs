//! Nodes and leases.
//!
//! All of it goes over one connection that holds an advisory lock of the node's name as long as it lives: that a renewal
//! succeeded means that no other process goes by this name. If the connection is lost it is made again at the next call,
//! and the lock with it; meanwhile leases run out. Every time that is compared is the database's.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{Mutex, Notify},
    time::{Instant, sleep, timeout},
};

use super::PostgresStore;
use crate::{
    identifiers::AccountId,
    store::{
        StoreError,
        columns::Columns,
        leases::{Cluster, ClusterStore, Deadline, LeaseStore, Leases},
        trouble::failed,
    },
};

/// With the node's name, the advisory lock of the one process that goes by it.
const NODE_LOCK: i64 = 6_076_142_301_170_133;

/// How long a server that died without a word may be remembered by the database.
const PREDECESSOR_GOES_WITHIN: Duration = Duration::from_secs(3);

/// No statement takes longer, or a third of a lease's time if that is less: then there is time to try another connection.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Raised when leases were released or a node comes or goes.
pub(super) const CHANNEL: &str = "ucwa_relay_leases";

/// The connection, and what is held by it.
pub(super) struct LeaseKeeper {
    node: String,
    ttl: Duration,
    leases: Leases,
    options: PgConnectOptions,
    shown: String,
    connection: Mutex<Option<PgConnection>>,
    /// Told by the listener.
    changed: Arc<Notify>,
}

impl LeaseKeeper {
    /// Connects for a server that starts.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another process goes by the node's name.
    pub(super) async fn begin(
        options: &PgConnectOptions,
        shown: &str,
        node: &str,
        ttl: Duration,
    ) -> Result<Self, StoreError> {
        // A peer that vanished is noticed soon, so that its node can be started elsewhere.
        let options = options.clone().application_name("ucwa-relay leases").options([
            ("tcp_keepalives_idle", "5"),
            ("tcp_keepalives_interval", "2"),
            ("tcp_keepalives_count", "3"),
        ]);
        let keeper = Self {
            node: node.to_owned(),
            ttl,
            leases: Leases::among_others(),
            options,
            shown: shown.to_owned(),
            connection: Mutex::new(None),
            changed: Arc::default(),
        };
        let deadline = Instant::now() + PREDECESSOR_GOES_WITHIN;
        let connection = loop {
            match keeper.connect().await {
                Err(StoreError::InUse(_)) if Instant::now() < deadline => {
                    sleep(Duration::from_millis(100)).await;
                }
                connected => break connected?,
            }
        };
        *keeper.connection.lock().await = Some(connection);
        Ok(keeper)
    }

    pub(super) fn leases(&self) -> Leases {
        self.leases.clone()
    }

    pub(super) fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }

    async fn connect(&self) -> Result<PgConnection, StoreError> {
        let failed = failed("connecting for leases");
        let mut connection = PgConnection::connect_with(&self.options).await.map_err(&failed)?;
        let locked: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock(hashtextextended($1, $2))")
            .bind(&self.node)
            .bind(NODE_LOCK)
            .fetch_one(&mut connection)
            .await
            .map_err(&failed)?;
        if locked {
            return Ok(connection);
        }
        Err(StoreError::InUse(format!(
            "the database {} cannot be served as node {}: another ucwa-relay server of that name is running on it; stop \
             that one, or give each server a cluster.node_id of its own",
            self.shown, self.node
        )))
    }

    /// Does something on the connection. One that failed, or that does not answer while there is time to try another, is
    /// given up.
    async fn with<T: Send>(
        &self,
        operation: &'static str,
        work: impl for<'c> FnOnce(&'c mut PgConnection) -> BoxFuture<'c, Result<T, sqlx::Error>> + Send,
    ) -> Result<T, StoreError> {
        let mut kept = self.connection.lock().await;
        let limit = ANSWERS_WITHIN.min(self.ttl / 3);
        let done = timeout(limit, async {
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            let done = work(&mut connection).await.map_err(failed(operation))?;
            Ok((connection, done))
        });
        let (connection, done) = done.await.unwrap_or_else(|_| {
            let words = format!("no answer within {} ms", limit.as_millis());
            Err(failed(operation)(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words))))
        })?;
        *kept = Some(connection);
        Ok(done)
    }

    /// An orderly end: whatever is still held is free at once, and so is the node's name.
    pub(super) async fn end(&self) {
        self.leases.release_all("the server was stopped");
        if let Err(error) = self.release_leases().await {
            tracing::warn!(error = %crate::error_chain(&error), "leases were not released; they run out");
        }
        if let Some(connection) = self.connection.lock().await.take()
            && let Err(error) = connection.close().await
        {
            tracing::debug!(%error, "closing the connection of the leases");
        }
    }
}

impl LeaseStore for PostgresStore {
    fn leases(&self) -> Leases {
        self.fence.leases.clone()
    }

    fn cluster(&self) -> Option<&dyn ClusterStore> {
        self.keeper.as_ref().map(|keeper| keeper as &dyn ClusterStore)
    }
}

#[async_trait]
impl ClusterStore for LeaseKeeper {
    fn lease_ttl(&self) -> Duration {
        self.ttl
    }

    async fn renew_leases(&self) -> Result<Cluster, StoreError> {
        let (node, ttl_s, known) = (self.node.clone(), self.ttl.as_secs_f64(), self.leases.known());
        let (accounts, epochs): (Vec<i64>, Vec<i64>) =
            known.iter().map(|(account, epoch)| (account.0, *epoch)).unzip();
        // Before the database looks at its clock.
        let until = Deadline::after(self.ttl);
        let (renewed, cluster) = self
            .with("renewing leases", move |connection| {
                Box::pin(async move {
                    let renewed = renew(connection, &node, ttl_s, &accounts, &epochs).await?;
                    tend(connection, &node, &accounts).await?;
                    Ok((renewed, cluster(connection, &node, ttl_s).await?))
                })
            })
            .await?;
        for (account, epoch) in known {
            if renewed.contains(&account) {
                self.leases.extend(account, epoch, until);
            } else if self.leases.lose(account, epoch) {
                tracing::warn!(account.id = account.0, epoch, "another node has taken the account");
            }
        }
        Ok(cluster)
    }

    async fn acquire_leases(&self, at_most: usize) -> Result<usize, StoreError> {
        let (node, ttl_s) = (self.node.clone(), self.ttl.as_secs_f64());
        let known: Vec<i64> = self.leases.known().iter().map(|(account, _)| account.0).collect();
        let limit = i64::try_from(at_most).unwrap_or(i64::MAX);
        let until = Deadline::after(self.ttl);
        let taken = self
            .with("taking leases", move |connection| {
                Box::pin(async move {
                    // Whoever takes others at this moment is passed by. A lease under this name that this process does not
                    // know is an earlier process's, or its own whose answer was lost.
                    sqlx::query(
                        "WITH free AS (
                             SELECT l.account_id
                               FROM account_leases l JOIN accounts a ON a.id = l.account_id
                              WHERE a.enabled AND a.removed_at IS NULL
                                AND (l.node_id IS NULL OR l.expires_at <= now()
                                     OR (l.node_id = $1 AND l.account_id <> ALL ($3::bigint[])))
                                AND l.account_id <> ALL ($3::bigint[])
                              ORDER BY l.node_id IS NOT DISTINCT FROM $1 DESC, l.expires_at, l.account_id
                              LIMIT $4
                                FOR UPDATE OF l SKIP LOCKED)
                         UPDATE account_leases l
                            SET node_id = $1, epoch = l.epoch + 1, expires_at = now() + make_interval(secs => $2)
                           FROM free
                          WHERE l.account_id = free.account_id
                         RETURNING l.account_id, l.epoch",
                    )
                    .bind(node)
                    .bind(ttl_s)
                    .bind(known)
                    .bind(limit)
                    .fetch_all(connection)
                    .await?
                    .iter()
                    .map(|row| Ok((AccountId(row.integer("account_id")?), row.integer("epoch")?)))
                    .collect::<Result<Vec<(AccountId, i64)>, sqlx::Error>>()
                })
            })
            .await?;
        for (account, epoch) in &taken {
            self.leases.take(*account, *epoch, until);
        }
        Ok(taken.len())
    }

    async fn release_leases(&self) -> Result<usize, StoreError> {
        let releases = self.leases.to_release();
        if releases.is_empty() {
            return Ok(0);
        }
        let node = self.node.clone();
        let accounts: Vec<i64> = releases.iter().map(|release| release.account.0).collect();
        let epochs: Vec<i64> = releases.iter().map(|release| release.epoch).collect();
        let words: Vec<String> = releases.iter().map(|release| release.why.clone()).collect();
        // What this node still has in a transaction ends first: the epoch rises.
        self.with("releasing leases", move |connection| {
            Box::pin(async move {
                sqlx::query(
                    "WITH released AS (
                         UPDATE account_leases l
                            SET node_id = NULL, epoch = l.epoch + 1, expires_at = now()
                           FROM unnest($2::bigint[], $3::bigint[], $4::text[]) AS k (account_id, epoch, why)
                          WHERE l.account_id = k.account_id AND l.epoch = k.epoch AND l.node_id = $1
                         RETURNING l.account_id, k.why),
                     told AS (
                         UPDATE account_status s
                            SET since = CASE WHEN s.state = 'stopped' THEN s.since
                                             ELSE date_trunc('milliseconds', now()) END,
                                state = 'stopped', detail = r.why, node_id = NULL
                           FROM released r
                          WHERE s.account_id = r.account_id)
                     SELECT pg_notify($5, $1) WHERE EXISTS (SELECT FROM released)",
                )
                .bind(node)
                .bind(accounts)
                .bind(epochs)
                .bind(words)
                .bind(CHANNEL)
                .execute(connection)
                .await
                .map(drop)
            })
        })
        .await?;
        for release in &releases {
            self.leases.lose(release.account, release.epoch);
        }
        Ok(releases.len())
    }

    async fn retire_node(&self) -> Result<(), StoreError> {
        let node = self.node.clone();
        self.with("retiring", move |connection| {
            Box::pin(async move {
                sqlx::query(
                    "WITH retired AS (UPDATE nodes SET stopped_at = date_trunc('milliseconds', now()) WHERE node_id = $1)
                     SELECT pg_notify($2, $1)",
                )
                .bind(node)
                .bind(CHANNEL)
                .execute(connection)
                .await
                .map(drop)
            })
        })
        .await
    }

    async fn leases_changed(&self) {
        self.changed.notified().await;
    }
}

/// Gives the accounts whose leases are still this node's under the epochs given.
async fn renew(
    connection: &mut PgConnection,
    node: &str,
    ttl_s: f64,
    accounts: &[i64],
    epochs: &[i64],
) -> Result<Vec<AccountId>, sqlx::Error> {
    sqlx::query(
        "INSERT INTO nodes (node_id, version, started_at, heartbeat_at) VALUES ($1, $2, now(), now())
         ON CONFLICT (node_id) DO UPDATE SET heartbeat_at = excluded.heartbeat_at",
    )
    .bind(node)
    .bind(env!("CARGO_PKG_VERSION"))
    .execute(&mut *connection)
    .await?;
    let renewed: Vec<i64> = sqlx::query_scalar(
        "UPDATE account_leases l
            SET expires_at = now() + make_interval(secs => $2)
           FROM unnest($3::bigint[], $4::bigint[]) AS k (account_id, epoch)
          WHERE l.account_id = k.account_id AND l.epoch = k.epoch AND l.node_id = $1
         RETURNING l.account_id",
    )
    .bind(node)
    .bind(ttl_s)
    .bind(accounts)
    .bind(epochs)
    .fetch_all(connection)
    .await?;
    Ok(renewed.into_iter().map(AccountId).collect())
}

/// Keeps the tables as they should be: a lease for every account, none of a disabled account whose node is gone, and no
/// memory of nodes that have been away for long.
async fn tend(connection: &mut PgConnection, node: &str, known: &[i64]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO account_leases (account_id, epoch, expires_at)
         SELECT a.id, 0, now() FROM accounts a
          WHERE a.enabled AND a.removed_at IS NULL
            AND NOT EXISTS (SELECT FROM account_leases l WHERE l.account_id = a.id)
         ON CONFLICT (account_id) DO NOTHING",
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query(
        "WITH idle AS (
             SELECT l.account_id
               FROM account_leases l JOIN accounts a ON a.id = l.account_id
              WHERE (NOT a.enabled OR a.removed_at IS NOT NULL) AND l.node_id IS NOT NULL
                AND (l.expires_at <= now() OR l.node_id = $1) AND l.account_id <> ALL ($2::bigint[])
                FOR UPDATE OF l SKIP LOCKED),
         freed AS (
             UPDATE account_leases l SET node_id = NULL, epoch = l.epoch + 1, expires_at = now()
               FROM idle WHERE l.account_id = idle.account_id)
         UPDATE account_status s
            SET state = 'stopped', detail = 'the account is disabled', since = date_trunc('milliseconds', now()),
                node_id = NULL
           FROM idle
          WHERE s.account_id = idle.account_id AND s.state <> 'stopped'",
    )
    .bind(node)
    .bind(known)
    .execute(&mut *connection)
    .await?;
    sqlx::query("DELETE FROM nodes WHERE node_id <> $1 AND heartbeat_at < now() - interval '7 days'")
        .bind(node)
        .execute(connection)
        .await
        .map(drop)
}

async fn cluster(connection: &mut PgConnection, node: &str, ttl_s: f64) -> Result<Cluster, sqlx::Error> {
    let row = sqlx::query(
        "SELECT (SELECT count(*) FROM accounts WHERE enabled AND removed_at IS NULL) AS accounts,
                (SELECT count(*) FROM nodes
                  WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => $1)) AS nodes,
                (SELECT ceil(extract(epoch FROM min(expires_at) - now()) * 1000)::bigint FROM account_leases
                  WHERE node_id <> $2 AND expires_at > now()) AS first_ends_in_ms",
    )
    .bind(ttl_s)
    .bind(node)
    .fetch_one(connection)
    .await?;
    let count = |column| Ok::<_, sqlx::Error>(usize::try_from(row.integer(column)?).unwrap_or(0));
    let first_ends_in = row
        .optional_integer("first_ends_in_ms")?
        .and_then(|milliseconds| u64::try_from(milliseconds).ok())
        .map(Duration::from_millis);
    Ok(Cluster { accounts: count("accounts")?, nodes: count("nodes")?, first_ends_in })
}
