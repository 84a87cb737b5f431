//! `/healthz`, `/readyz`, `/metrics`: for whoever watches the server by program.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use jiff::Timestamp;
use serde::Serialize;
use tokio::{sync::Mutex, time::timeout};

use super::{AdminState, viewer};
use crate::{
    metrics::{forget_outbox, set_accounts, set_database_up, set_outbox_oldest, set_outbox_rows},
    store::{AccountState, OutboxState, Store, StoreError},
};

/// How long the database may take before it counts as unreachable.
const DATABASE_WITHIN: Duration = Duration::from_secs(3);
/// For how long it counts what the last look at the database showed: anybody may ask for it, and each look writes.
const LOOK_COUNTS_FOR: Duration = Duration::from_secs(1);
/// How many accounts `/readyz` gives reasons for.
const REASONS: usize = 100;

/// The process answers; nothing else is looked at, so that trouble elsewhere never gets it killed.
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Answer of `/readyz`.
#[derive(Debug, Serialize)]
struct Readiness {
    ready: bool,
    database: Database,
    /// Accounts of this node by state.
    accounts: BTreeMap<&'static str, usize>,
    /// Accounts that are not online, with the reason; only for who may see it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<Reason>,
}

#[derive(Debug, Serialize)]
struct Database {
    /// It can be read. It may still take nothing, as `problem` then says.
    reachable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct Reason {
    account_id: i64,
    state: &'static str,
    detail: Option<String>,
}

/// Ready (200) while the database answers and takes what is written; 503 with the reason otherwise. Accounts in trouble are told with their
/// reasons but do not make the server unready: it works on them by itself. Nobody is refused for a wrong token, nor after many
/// of them: a probe has to learn how the server is, and reasons are for who carries the right one.
pub(super) async fn readyz(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    let Seen { reachable, problem } = state.database.look(state.store.as_ref()).await;
    let states = state.states.all();
    let mut accounts = BTreeMap::new();
    for published in states.values() {
        *accounts.entry(published.state.as_str()).or_default() += 1;
    }
    let may_see = viewer::carries_token(&state, &headers, peer).unwrap_or(false);
    let reasons = states
        .iter()
        .filter(|(_, published)| may_see && published.state != AccountState::Online)
        .take(REASONS)
        .map(|(account, published)| Reason {
            account_id: account.0,
            state: published.state.as_str(),
            detail: published.detail.clone(),
        })
        .collect();
    let ready = problem.is_none();
    let readiness = Readiness {
        ready,
        database: Database { reachable, problem: problem.filter(|_| may_see) },
        accounts,
        reasons,
    };
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness)).into_response()
}

/// What a look at the database showed.
#[derive(Debug, Clone)]
struct Seen {
    reachable: bool,
    problem: Option<String>,
}

/// The last look at the database. Who asks meanwhile waits for it and makes none of their own.
#[derive(Debug, Default)]
pub(super) struct DatabaseLook(Mutex<Option<(Instant, Seen)>>);

impl DatabaseLook {
    async fn look(&self, store: &dyn Store) -> Seen {
        let mut last = self.0.lock().await;
        if let Some((at, seen)) = &*last
            && at.elapsed() < LOOK_COUNTS_FOR
        {
            return seen.clone();
        }
        let (reachable, problem) = look_at_database(store).await;
        let seen = Seen { reachable, problem };
        *last = Some((Instant::now(), seen.clone()));
        seen
    }
}

/// Whether the database can be read, and what is wrong with it.
async fn look_at_database(store: &dyn Store) -> (bool, Option<String>) {
    let look = async {
        store.ping().await.map_err(|error| (false, crate::error_chain(&error)))?;
        // What accounts have to store says more than an attempt that needs no room on the disk.
        store.problem().map_or(Ok(()), |problem| Err((true, problem)))?;
        store.takes_writes().await.map_err(|error| (true, crate::error_chain(&error)))
    };
    match timeout(DATABASE_WITHIN, look).await {
        Ok(Ok(())) => (true, None),
        Ok(Err((reachable, problem))) => (reachable, Some(problem)),
        Err(_) => {
            let unknown = || format!("no answer within {} s", DATABASE_WITHIN.as_secs());
            (false, Some(store.problem().unwrap_or_else(unknown)))
        }
    }
}

/// Prometheus' text format. Gauges are taken at this moment; while the database does not answer, those of the outbox are
/// `NaN`, which no comparison holds for.
pub(super) async fn metrics(State(state): State<AdminState>) -> Response {
    let states = state.states.all();
    for account_state in AccountState::ALL {
        set_accounts(
            account_state,
            states.values().filter(|published| published.state == account_state).count(),
        );
    }
    let Seen { reachable, problem } = state.database.look(state.store.as_ref()).await;
    set_database_up(problem.is_none());
    let measured = if reachable { measure_outbox(state.store.as_ref()).await } else { Err(None) };
    if let Err(problem) = measured {
        forget_outbox();
        if let Some(problem) = problem {
            tracing::warn!(error = %problem, "the outbox could not be measured for /metrics");
        }
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.render())
        .into_response()
}

/// Sets the gauges of the outbox; the error is for the log.
async fn measure_outbox(store: &dyn Store) -> Result<(), Option<String>> {
    let now = Timestamp::now();
    let measure =
        async { Ok::<_, StoreError>((store.outbox_counts().await?, store.oldest_waiting(now).await?)) };
    let (counts, oldest) = timeout(DATABASE_WITHIN, measure)
        .await
        .map_err(|_| Some(format!("no answer within {} s", DATABASE_WITHIN.as_secs())))?
        .map_err(|error| Some(crate::error_chain(&error)))?;
    for outbox_state in OutboxState::ALL {
        set_outbox_rows(outbox_state, counts.get(outbox_state.as_str()).copied().unwrap_or(0));
    }
    // Programs' clocks may be ahead of ours: such a row has waited for no time yet.
    let waited = oldest.map(|oldest| Duration::try_from(now.duration_since(oldest)).unwrap_or_default());
    set_outbox_oldest(waited.unwrap_or_default());
    Ok(())
}
