//! The control API on a port of its own, for tests, the demo and people with `curl`.
//!
//! | request | does |
//! | --- | --- |
//! | `GET /ledger` | the whole ledger |
//! | `GET /counters` | the ledger's numbers, the traffic's, and whether the simulator is quiet |
//! | `GET /accounts` | each account with its applications, whether a GET is parked, and its conversations |
//! | `POST /call` `{"from","to_account","text"?,"html"?,"subject"?}` | a correspondent calls: `{"conversation"}`; 409 if the account takes no messages |
//! | `POST /say` `{"conversation","text"?,"html"?,"from"?}` | the correspondent writes: `{"serials"}`; 409 if it cannot |
//! | `POST /leave` `{"conversation","from"?}` | the correspondent leaves |
//! | `POST /close-messaging` `{"conversation"}` | messaging closes, the conversation goes on |
//! | `POST /traffic` `{"running"?,"messages_per_second"?}` | starts, stops or changes the traffic |
//! | `POST /forget-application` `{"account"}` | the server forgets the account's applications |
//! | `POST /expire-tokens` `{"account"}` | the account's tokens are valid no longer |
//!
//! Bodies are JSON. A request that cannot be carried out is answered with `{"error"}`.

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{CallRequest, LedgerSnapshot, Simulator};

#[derive(Deserialize)]
struct SayRequest {
    conversation: String,
    from: Option<String>,
    text: Option<String>,
    html: Option<String>,
}

#[derive(Deserialize)]
struct ConversationRequest {
    conversation: String,
    from: Option<String>,
}

#[derive(Deserialize)]
struct TrafficRequest {
    running: Option<bool>,
    messages_per_second: Option<f64>,
}

#[derive(Deserialize)]
struct AccountRequest {
    account: String,
}

fn refuse(error: &super::Refused) -> Response {
    (StatusCode::CONFLICT, Json(json!({ "error": error.to_string() }))).into_response()
}

fn done<T: Serialize>(result: Result<T, super::Refused>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => refuse(&error),
    }
}

/// The control API of one simulator.
pub(crate) fn router(simulator: Simulator) -> Router {
    Router::new()
        .route("/ledger", get(ledger))
        .route("/counters", get(counters))
        .route("/accounts", get(accounts))
        .route("/call", post(call))
        .route("/say", post(say))
        .route("/leave", post(leave))
        .route("/close-messaging", post(close_messaging))
        .route("/traffic", post(traffic))
        .route("/forget-application", post(forget_application))
        .route("/expire-tokens", post(expire_tokens))
        .with_state(simulator)
}

async fn ledger(State(simulator): State<Simulator>) -> Json<LedgerSnapshot> {
    Json(simulator.ledger())
}

async fn counters(State(simulator): State<Simulator>) -> Response {
    Json(json!({
        "ledger": simulator.counters(),
        "traffic_running": simulator.traffic_is_running(),
        "traffic_written": simulator.traffic_written(),
        "quiet": simulator.is_quiet(),
    }))
    .into_response()
}

async fn accounts(State(simulator): State<Simulator>) -> Response {
    Json(simulator.accounts()).into_response()
}

async fn call(State(simulator): State<Simulator>, Json(request): Json<CallRequest>) -> Response {
    done(simulator.call(request).await.map(|conversation| json!({ "conversation": conversation })))
}

async fn say(State(simulator): State<Simulator>, Json(request): Json<SayRequest>) -> Response {
    let SayRequest { conversation, from, text, html } = request;
    let said = simulator.say_from(&conversation, from.as_deref(), text.as_deref(), html.as_deref());
    done(said.map(|serials| json!({ "serials": serials })))
}

async fn leave(State(simulator): State<Simulator>, Json(request): Json<ConversationRequest>) -> Response {
    done(simulator.leave_from(&request.conversation, request.from.as_deref()).map(|()| json!({})))
}

async fn close_messaging(
    State(simulator): State<Simulator>,
    Json(request): Json<ConversationRequest>,
) -> Response {
    done(simulator.close_messaging(&request.conversation).map(|()| json!({})))
}

async fn traffic(State(simulator): State<Simulator>, Json(request): Json<TrafficRequest>) -> Response {
    if let Some(rate) = request.messages_per_second {
        simulator.set_traffic_rate(rate);
    }
    match request.running {
        Some(true) => simulator.start_traffic(None),
        Some(false) => simulator.stop_traffic(),
        None => {}
    }
    Json(json!({ "running": simulator.traffic_is_running() })).into_response()
}

async fn forget_application(
    State(simulator): State<Simulator>,
    Json(request): Json<AccountRequest>,
) -> Response {
    done(simulator.forget_application(&request.account).map(|count| json!({ "forgotten": count })))
}

async fn expire_tokens(State(simulator): State<Simulator>, Json(request): Json<AccountRequest>) -> Response {
    done(simulator.expire_tokens(&request.account).map(|()| json!({})))
}
