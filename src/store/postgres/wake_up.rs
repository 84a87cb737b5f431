//! Notices of new rows in the queue: `LISTEN ucwa_relay_outbox` on a connection of its own.
//!
//! A notice that is lost costs one poll of the queue and nothing else. So a lost connection is made again and the queue is
//! looked at once; and a connection over which nothing comes is asked now and then, because a peer that vanished does not
//! say so.

use std::{sync::Arc, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::account::backoff::Backoff;

const CHANNEL: &str = "ucwa_relay_outbox";

/// A connection that was silent for so long is asked whether it is still there.
const ASK_AFTER: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Wakes `due` at every notice until `closed`.
pub(super) async fn listen(options: PgConnectOptions, due: Arc<Notify>, closed: CancellationToken) {
    let options = options.application_name("ucwa-relay listener");
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    loop {
        let ended = tokio::select! {
            () = closed.cancelled() => return,
            Err(ended) = follow(&options, &due, &mut backoff) => ended,
        };
        tracing::warn!(error = %ended, "notices of new rows don't arrive; the queue is polled until they do again");
        tokio::select! {
            () = closed.cancelled() => return,
            () = sleep(backoff.next_delay()) => {}
        }
    }
}

/// Follows one connection until it is lost.
async fn follow(
    options: &PgConnectOptions,
    due: &Notify,
    backoff: &mut Backoff,
) -> Result<std::convert::Infallible, sqlx::Error> {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .idle_timeout(None)
        .max_lifetime(None)
        .acquire_timeout(super::CONNECT_TIMEOUT)
        .connect_with(options.clone())
        .await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.eager_reconnect(false);
    listener.listen(CHANNEL).await?;
    if backoff.failures() > 0 {
        tracing::info!("notices of new rows arrive again");
    }
    backoff.reset();
    // What came while nobody listened.
    due.notify_one();
    loop {
        match timeout(ASK_AFTER, listener.try_recv()).await {
            Ok(Ok(Some(_))) => due.notify_one(),
            Ok(Ok(None)) => {
                return Err(sqlx::Error::Io(std::io::Error::new(
                    std::io::ErrorKind::ConnectionAborted,
                    "the connection was lost",
                )));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let asked = sqlx::query("SELECT 1").execute(&mut listener);
                timeout(ANSWER_WITHIN, asked).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
            }
        }
    }
}
