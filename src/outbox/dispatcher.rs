//! Takes due rows out of the queue and hands each to its account.
//!
//! One task for all accounts: it waits until the queue may have changed, claims the first due row of every destination
//! that has none under way, and gives each to the account's actor. It never waits for an account: a row that an
//! account can't take now goes back unsent.

use std::{sync::Arc, time::Duration};

use actix::prelude::SendError;
use futures_util::future::join_all;
use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    account::{Directory, actor::Relay, backoff::Backoff, delivery::release_claim},
    outbox::pace::Paces,
    store::{ClaimSettings, ClaimedSend, SharedStore},
};

/// The dispatcher's surroundings.
pub struct Dispatcher {
    /// The database.
    pub store: SharedStore,
    /// Who is signed in.
    pub directory: Directory,
    /// How rows are claimed; its allowances come from `paces`.
    pub claim: ClaimSettings,
    /// `outbox.per_account_rate`.
    pub paces: Paces,
    /// `outbox.poll_ms`: the safety net under the change notices.
    pub poll: Duration,
}

impl Dispatcher {
    /// Runs until `stop` is cancelled. What is claimed by then is handed out; nothing more is claimed.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        while !stop.is_cancelled() {
            let now = Instant::now();
            self.claim.allowances = self.paces.allowances(now);
            let claimed = match self.store.claim_due(Timestamp::now(), &self.claim).await {
                Ok(claimed) => {
                    backoff.reset();
                    self.paces.count(&claimed, now);
                    claimed
                }
                Err(error) => {
                    if error.is_told_by_store() {
                        tracing::debug!(error = %crate::error_chain(&error), "the queue can't be read now");
                    } else {
                        tracing::warn!(error = %crate::error_chain(&error), "the queue can't be read; trying again");
                    }
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(backoff.next_delay()) => continue,
                    }
                }
            };
            let full = i64::try_from(claimed.len()).unwrap_or(i64::MAX) >= self.claim.limit;
            let refused = self.hand_out(claimed).await;
            if refused > 0 {
                // Whoever could not take a row now needs a moment; the other accounts' rows wait no longer than that.
                tokio::time::sleep(Duration::from_millis(50)).await;
            } else if !full {
                let wait = self.until_next_due().await;
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = next_turn(&self.paces) => {}
                    () = self.store.outbox_changed(wait) => {}
                }
            }
        }
    }

    /// How long to wait at most: until a row that waits for a time is due.
    async fn until_next_due(&self) -> Duration {
        let now = Timestamp::now();
        match self.store.next_due(now).await {
            Ok(Some(due)) => Duration::try_from(due.duration_since(now))
                .unwrap_or_default()
                .clamp(Duration::from_millis(5), self.poll.max(Duration::from_millis(5))),
            Ok(None) => self.poll,
            Err(error) => {
                tracing::debug!(error = %crate::error_chain(&error), "the next due time is not known");
                self.poll
            }
        }
    }

    /// Returns how many rows could not be handed out and were given back.
    async fn hand_out(&mut self, claimed: Vec<ClaimedSend>) -> usize {
        let mut refused = Vec::new();
        for send in claimed {
            let account = send.account;
            let refusal = match self.directory.get(account) {
                Some(online) => online.address.try_send(Relay(send)).err().map(SendError::into_inner),
                None => Some(Relay(send)),
            };
            if let Some(Relay(send)) = refusal {
                self.paces.uncount(account);
                refused.push(send);
            }
        }
        let results = join_all(refused.iter().map(|send| self.store.release_claim(send))).await;
        let number = refused.len();
        for (send, result) in refused.into_iter().zip(results) {
            if result.is_err() {
                let store = Arc::clone(&self.store);
                tokio::spawn(async move { release_claim(&store, &send).await });
            }
        }
        number
    }
}

/// Returns when an account whose rows wait for `outbox.per_account_rate` may send some.
async fn next_turn(paces: &Paces) {
    match paces.next_turn() {
        Some(turn) => sleep_until(turn).await,
        None => std::future::pending().await,
    }
}

/// Starts the dispatcher on the current tokio runtime.
pub fn start(dispatcher: Dispatcher, stop: CancellationToken) -> tokio::task::JoinHandle<()> {
    tokio::spawn(dispatcher.run(stop))
}
