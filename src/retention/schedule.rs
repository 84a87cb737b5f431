//! The schedule of a running server: a run when the last one began a day ago, whoever did that one.
//!
//! It looks when the server starts and every few minutes from then on, so that a run is due at about the same time each
//! day; who wants another hour does a run by hand at that hour. Where several servers share a database, the first to
//! look does it. While nothing is to be removed by any rule, it does nothing and makes no key.

use std::{path::PathBuf, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use super::{Purger, Report, is_limited, signing_key};
use crate::store::{Policy, SharedStore, StoreError};

/// How long after the beginning of one run the next is due.
const EVERY: SignedDuration = SignedDuration::from_hours(24);
/// How often is looked, roughly: servers that started together need not look together.
const LOOKS_EVERY: Duration = Duration::from_mins(5);
/// How long nothing is tried after a run that failed.
const AFTER_FAILURE: Duration = Duration::from_hours(1);
/// `retention_runs.started_by` of the schedule.
const SCHEDULE: &str = "schedule";

/// What the schedule needs to know.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// `retention.default_days`.
    pub default_days: u32,
    /// `cluster.node_id`.
    pub node: String,
    /// The key that signs tombstones.
    pub key_file: PathBuf,
}

impl Schedule {
    /// Keeps to the schedule until `stop` is cancelled; an orderly stop waits for no more than one batch.
    pub async fn keep(self, store: SharedStore, stop: CancellationToken) {
        loop {
            let pause = match self.look(&store, &stop).await {
                Ok(()) => LOOKS_EVERY,
                Err(error) => {
                    tracing::warn!(error = %format!("{error:#}"), "messages can't be purged; trying again in an hour");
                    AFTER_FAILURE
                }
            };
            let pause = pause.mul_f64(0.9 + 0.2 * rand::random::<f64>());
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    async fn look(&self, store: &SharedStore, stop: &CancellationToken) -> anyhow::Result<()> {
        let store = store.as_ref();
        let now = Timestamp::now();
        if store.last_run().await?.is_some_and(|last| now.duration_since(last) < EVERY) {
            return Ok(());
        }
        let policy = Policy { default_days: self.default_days, now };
        if !is_limited(store, policy).await? {
            return Ok(());
        }
        let (key, is_new) = signing_key(store, &self.key_file).await?;
        if is_new {
            tracing::warn!(
                file = %self.key_file.display(),
                public_key = super::tombstone::public_key(&key),
                "made the key that signs what is left of purged messages; keep a copy of it, and its public half elsewhere"
            );
        }
        let purger = Purger { store, policy, by: SCHEDULE, node: &self.node, key: &key, replaces_own: true };
        match purger.run(stop).await {
            Ok(report) => tell(&report),
            Err(error) if matches!(error.downcast_ref(), Some(StoreError::AlreadyExists(_))) => {
                tracing::debug!(%error, "somebody else purges messages");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn tell(report: &Report) {
    for account in &report.accounts {
        let due = &account.due;
        if due.messages + due.conversations + due.payloads > 0 || !due.kept.is_empty() {
            tracing::info!(
                account = account.account,
                messages = due.messages,
                conversations = due.conversations,
                payloads = due.payloads,
                kept_by_holds = due.kept.iter().map(|kept| kept.messages).sum::<i64>(),
                days = account.days,
                "messages were purged by their age"
            );
        }
    }
    tracing::info!(
        messages = report.messages(),
        accounts = report.accounts.len(),
        stopped = report.stopped,
        "retention was looked after"
    );
}
