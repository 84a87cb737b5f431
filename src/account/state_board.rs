//! Publishes what each account is doing in `account_status`, in order, without any actor waiting for the database.
//!
//! Actors post; one task writes. Only the newest state of an account matters, so what piles up behind a slow database
//! is at most one state for each account.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::sync::mpsc;

use crate::{
    account::backoff::Backoff,
    identifiers::AccountId,
    store::{AccountState, SharedStore, StoreError},
};

/// What an account is doing, with a sentence for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedState {
    /// The state.
    pub state: AccountState,
    /// Why, and what happens next or what to do.
    pub detail: Option<String>,
}

/// Where actors post; cheap to clone.
#[derive(Debug, Clone)]
pub struct StateBoard {
    posts: mpsc::UnboundedSender<(AccountId, Option<PublishedState>)>,
    current: CurrentStates,
}

/// The latest state of every account that this process has looked after, whether or not the database has it yet;
/// cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct CurrentStates(Arc<RwLock<BTreeMap<AccountId, PublishedState>>>);

impl CurrentStates {
    /// All of them, as they are now.
    pub fn all(&self) -> BTreeMap<AccountId, PublishedState> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl StateBoard {
    /// Starts the writing task, which ends when the last clone of the board is dropped. Must run within a tokio
    /// runtime.
    pub fn start(store: SharedStore, node: String) -> (Self, tokio::task::JoinHandle<()>) {
        let (posts, inbox) = mpsc::unbounded_channel();
        (Self { posts, current: CurrentStates::default() }, tokio::spawn(write_states(inbox, store, node)))
    }

    /// Posts a state; the latest one wins.
    pub fn post(&self, account: AccountId, state: AccountState, detail: Option<String>) {
        let published = PublishedState { state, detail };
        self.current.0.write().unwrap_or_else(PoisonError::into_inner).insert(account, published.clone());
        // The receiver only goes away at shutdown, when nobody reads states any more.
        let _ = self.posts.send((account, Some(published)));
    }

    /// The account is another node's from now on: what it does is not ours to tell.
    pub fn forget(&self, account: AccountId) {
        self.current.0.write().unwrap_or_else(PoisonError::into_inner).remove(&account);
        let _ = self.posts.send((account, None));
    }

    /// For whoever shows the states; does not keep the board's task going.
    pub fn current(&self) -> CurrentStates {
        self.current.clone()
    }
}

async fn write_states(
    mut inbox: mpsc::UnboundedReceiver<(AccountId, Option<PublishedState>)>,
    store: SharedStore,
    node: String,
) {
    let mut written: HashMap<AccountId, PublishedState> = HashMap::new();
    // Claims of the outbox depend on these states: what could not be written is written later.
    let mut waiting: BTreeMap<AccountId, PublishedState> = BTreeMap::new();
    let mut received = Vec::new();
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    let mut open = true;
    while open || !waiting.is_empty() {
        let retry = tokio::time::sleep(backoff.next_delay());
        tokio::select! {
            count = inbox.recv_many(&mut received, 1024), if open => open = count > 0,
            () = retry, if !waiting.is_empty() => {}
        }
        for (account, published) in received.drain(..) {
            if let Some(state) = published {
                waiting.insert(account, state);
            } else {
                waiting.remove(&account);
                // Others write now: should it come back, nothing is known of what stands there.
                written.remove(&account);
            }
        }
        waiting.retain(|account, state| written.get(account) != Some(state));
        let changed: Vec<_> = std::mem::take(&mut waiting).into_iter().collect();
        let results = join_all(changed.iter().map(|(account, published)| {
            store.record_state(*account, published.state, published.detail.as_deref(), &node)
        }))
        .await;
        let mut closing = false;
        for ((account, state), result) in changed.into_iter().zip(results) {
            match result {
                Ok(()) => {
                    backoff.reset();
                    written.insert(account, state);
                }
                // Whoever holds the account writes what it does.
                Err(StoreError::Fenced(_)) => {
                    written.remove(&account);
                }
                Err(error) => {
                    if !error.is_told_by_store() {
                        tracing::warn!(
                            account.id = account.0,
                            state = state.state.as_str(),
                            error = %crate::error_chain(&error),
                            "the account's state could not be written to account_status"
                        );
                    }
                    closing |= matches!(error, StoreError::Closing);
                    waiting.insert(account, state);
                }
            }
        }
        if closing {
            return;
        }
        if waiting.is_empty() {
            backoff.reset();
        }
    }
}
