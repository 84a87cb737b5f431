//! Notices of new rows in the queue and of leases: `LISTEN ucwa_relay_outbox`, `ucwa_relay_leases` on a connection of its
//! own.
//!
//! A notice that is lost costs one poll and nothing else. So a lost connection is made again and everybody looks at once; and a connection over which nothing comes is asked now and then, because a peer that vanished does not
//! say so.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::leases;
use crate::account::backoff::Backoff;

const CHANNEL: &str = "ucwa_relay_outbox";

/// A connection that was silent for so long is asked whether it is still there.
const ASK_AFTER: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Whom notices wake.
pub(super) struct Wakes {
    /// Rows of the queue may be due.
    pub(super) due: Arc<Notify>,
    /// Leases may be free, or nodes come or gone.
    pub(super) leases: Arc<Notify>,
}

impl Wakes {
    fn all(&self) {
        self.due.notify_one();
        self.leases.notify_one();
    }
}

/// The listener's connection.
pub(super) struct Notices(PgListener);

impl Notices {
    pub(super) async fn connect(options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .acquire_timeout(super::CONNECT_TIMEOUT)
            .connect_with(options.clone().application_name("ucwa-relay listener"))
            .await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen_all([CHANNEL, leases::CHANNEL]).await?;
        Ok(Self(listener))
    }

    /// Follows the connection until it is lost.
    async fn follow(&mut self, wakes: &Wakes) -> sqlx::Error {
        // What came while nobody listened.
        wakes.all();
        loop {
            match timeout(ASK_AFTER, self.0.try_recv()).await {
                Ok(Ok(Some(notice))) if notice.channel() == leases::CHANNEL => wakes.leases.notify_one(),
                Ok(Ok(Some(_))) => wakes.due.notify_one(),
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

/// Wakes whoever waits for notices until `closed`.
pub(super) async fn listen(
    first: Notices,
    options: PgConnectOptions,
    wakes: Wakes,
    closed: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    let (mut notices, mut told) = (Some(first), false);
    loop {
        let connected = async {
            if let Some(first) = notices.take() {
                return Ok(first);
            }
            let again = Notices::connect(&options).await?;
            tracing::info!("notices of new rows arrive again");
            Ok(again)
        };
        let lost = async {
            match connected.await {
                Ok(mut connection) => {
                    backoff.reset();
                    told = false;
                    connection.follow(&wakes).await
                }
                Err(error) => error,
            }
        };
        let error = tokio::select! {
            () = closed.cancelled() => return,
            error = lost => error,
        };
        if std::mem::replace(&mut told, true) {
            tracing::debug!(%error, "notices of new rows still don't arrive");
        } else {
            tracing::warn!(%error, "notices of new rows don't arrive; the queue is polled until they do again");
        }
        tokio::select! {
            () = closed.cancelled() => return,
            () = sleep(backoff.next_delay()) => {}
        }
    }
}
