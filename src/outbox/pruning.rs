//! Removes finished rows from the queue when they have been kept long enough (`outbox.keep_finished_days`).
//!
//! One task of a running server looks at its start and once an hour. While the database can't be written it tries again
//! at the next hour: nothing waits for this. On a database of several servers each may prune; a row goes once.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use crate::store::{SharedStore, Store, StoreError};

/// Rows removed in one transaction: archiving waits no longer than that takes.
const AT_ONCE: i64 = 500;
/// How often there is something to do, roughly: servers that started together need not prune together.
const EVERY: Duration = Duration::from_hours(1);

/// The moment before which a finished row has been kept for `days`.
pub fn kept_since(now: Timestamp, days: u32) -> Timestamp {
    now.checked_sub(SignedDuration::from_hours(24 * i64::from(days))).unwrap_or(Timestamp::MIN)
}

/// Removes every row that was finished before `before`, a few at a time, and returns how many.
///
/// # Errors
/// The database can't be written; what is removed by then stays so.
pub async fn prune(store: &dyn Store, before: Timestamp) -> Result<u64, StoreError> {
    let mut removed = 0;
    loop {
        let now_removed = store.purge_outbox(before, AT_ONCE).await?;
        removed += now_removed;
        if now_removed < AT_ONCE.unsigned_abs() {
            return Ok(removed);
        }
    }
}

/// Prunes until `stop` is cancelled; an orderly stop does not wait for what is still to be removed. `days` is
/// `outbox.keep_finished_days`; 0 keeps everything.
pub async fn run(store: SharedStore, days: u32, stop: CancellationToken) {
    if days == 0 {
        return;
    }
    loop {
        let pruning = prune(store.as_ref(), kept_since(Timestamp::now(), days));
        // A batch that is under way is finished by the store.
        let Some(pruned) = stop.run_until_cancelled(pruning).await else {
            return;
        };
        match pruned {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, days, "finished rows of the outbox were removed"),
            Err(error) => {
                tracing::warn!(error = %crate::error_chain(&error), "the outbox can't be pruned; trying again later");
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY.mul_f64(0.9 + 0.2 * rand::random::<f64>())) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_back_from_now_and_never_fail() {
        let now: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
        assert_eq!(kept_since(now, 2).to_string(), "2026-11-20T10:00:00Z");
        assert_eq!(kept_since(now, u32::MAX), Timestamp::MIN);
    }
}
