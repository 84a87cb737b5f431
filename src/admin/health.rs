//! `/healthz`, `/readyz`, `/metrics`: for whoever watches the server by program.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tokio::time::timeout;

use super::AdminState;
use crate::{
    metrics::{set_accounts, set_outbox_rows},
    store::{AccountState, OutboxState},
};

/// How long the database may take before it counts as unreachable.
const DATABASE_WITHIN: Duration = Duration::from_secs(3);
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

/// Ready (200) while the database answers; 503 with the reason otherwise. Accounts in trouble are told with their
/// reasons but do not make the server unready: it works on them by itself.
pub(super) async fn readyz(State(state): State<AdminState>, headers: HeaderMap) -> Response {
    let problem = match timeout(DATABASE_WITHIN, state.store.ping()).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(crate::error_chain(&error)),
        Err(_) => Some(format!("no answer within {} s", DATABASE_WITHIN.as_secs())),
    };
    let states = state.states.all();
    let mut accounts = BTreeMap::new();
    for published in states.values() {
        *accounts.entry(published.state.as_str()).or_default() += 1;
    }
    let may_see = state.guard.admits(&headers);
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
    let reachable = problem.is_none();
    let readiness = Readiness {
        ready: reachable,
        database: Database { reachable, problem: problem.filter(|_| may_see) },
        accounts,
        reasons,
    };
    let code = if reachable { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness)).into_response()
}

/// Prometheus' text format. Gauges are taken at this moment; without a database, those of the outbox are left out.
pub(super) async fn metrics(State(state): State<AdminState>) -> Response {
    let states = state.states.all();
    for account_state in AccountState::ALL {
        set_accounts(
            account_state,
            states.values().filter(|published| published.state == account_state).count(),
        );
    }
    match timeout(DATABASE_WITHIN, state.store.outbox_counts()).await {
        Ok(Ok(counts)) => {
            for outbox_state in OutboxState::ALL {
                set_outbox_rows(outbox_state, counts.get(outbox_state.as_str()).copied().unwrap_or(0));
            }
        }
        Ok(Err(error)) => {
            tracing::warn!(error = %crate::error_chain(&error), "rows of outbox could not be counted for /metrics");
        }
        Err(_) => tracing::warn!("rows of outbox could not be counted in time for /metrics"),
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.render())
        .into_response()
}
