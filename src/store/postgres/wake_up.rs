//! Notices of new rows in the queue: `LISTEN ucwa_relay_outbox` on a connection of its own.
//!
//! A notice that is lost costs one poll of the queue and nothing else. So a lost connection is made again and the queue is
//! looked at once; and a connection over which nothing comes is asked now and then, because a peer that vanished does not
//! say so.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    account::backoff::Backoff,
    store::{StoreError, trouble::failed},
};

const CHANNEL: &str = "ucwa_relay_outbox";

/// A connection that was silent for so long is asked whether it is still there.
const ASK_AFTER: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Advisory lock of the one server of a database.
const SERVER_LOCK: i64 = 6_076_142_301_170_133;

/// How long a server that died without a word may be remembered by the database.
const PREDECESSOR_GOES_WITHIN: Duration = Duration::from_secs(3);

/// The listener's connection. It also holds the lock that keeps a second server from being started by mistake.
pub(super) struct Notices(PgListener);

impl Notices {
    /// Connects for a server that starts.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another server is there.
    pub(super) async fn of_only_server(options: &PgConnectOptions, shown: &str) -> Result<Self, StoreError> {
        let failed = failed("starting");
        let mut notices = Self::connect(options).await.map_err(&failed)?;
        let deadline = Instant::now() + PREDECESSOR_GOES_WITHIN;
        while !notices.lock().await.map_err(&failed)? {
            if Instant::now() >= deadline {
                return Err(StoreError::InUse(format!(
                    "the database {shown} cannot be served: another ucwa-relay server is running on it; stop that one, \
                     or give this one a database of its own"
                )));
            }
            sleep(Duration::from_millis(100)).await;
        }
        Ok(notices)
    }

    async fn connect(options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .acquire_timeout(super::CONNECT_TIMEOUT)
            .connect_with(options.clone().application_name("ucwa-relay listener"))
            .await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen(CHANNEL).await?;
        Ok(Self(listener))
    }

    async fn lock(&mut self) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(SERVER_LOCK).fetch_one(&mut self.0).await
    }

    /// Follows the connection until it is lost.
    async fn follow(&mut self, due: &Notify) -> sqlx::Error {
        // What came while nobody listened.
        due.notify_one();
        loop {
            match timeout(ASK_AFTER, self.0.try_recv()).await {
                Ok(Ok(Some(_))) => due.notify_one(),
                Ok(Ok(None)) => {
                    let words = "the connection was lost";
                    return sqlx::Error::Io(std::io::Error::new(
                        std::io::ErrorKind::ConnectionAborted,
                        words,
                    ));
                }
                Ok(Err(error)) => return error,
                Err(_) => {
                    let asked = sqlx::query("SELECT 1").execute(&mut self.0);
                    if let Err(error) =
                        timeout(ANSWER_WITHIN, asked).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
                    {
                        return error;
                    }
                }
            }
        }
    }
}

/// Wakes `due` at every notice until `closed`.
pub(super) async fn listen(
    first: Notices,
    options: PgConnectOptions,
    due: Arc<Notify>,
    closed: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    let mut notices = Some(first);
    loop {
        let connected = async {
            if let Some(first) = notices.take() {
                return Ok(first);
            }
            let mut again = Notices::connect(&options).await?;
            if !again.lock().await? {
                tracing::warn!(
                    "the lock of this server is still held by its lost connection, or by another server"
                );
            }
            tracing::info!("notices of new rows arrive again");
            Ok(again)
        };
        let lost = async {
            match connected.await {
                Ok(mut connection) => {
                    backoff.reset();
                    connection.follow(&due).await
                }
                Err(error) => error,
            }
        };
        let error = tokio::select! {
            () = closed.cancelled() => return,
            error = lost => error,
        };
        tracing::warn!(%error, "notices of new rows don't arrive; the queue is polled until they do again");
        tokio::select! {
            () = closed.cancelled() => return,
            () = sleep(backoff.next_delay()) => {}
        }
    }
}
