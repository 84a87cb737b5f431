//! The control API on a port of its own, for tests, the demo and people with `curl`.
//!
//! | request | does |
//! | --- | --- |
//! | `GET /ledger` | the whole ledger |
//! | `GET /counters` | the ledger's numbers, the traffic's, how often each kind of fault has struck, and whether the simulator is quiet |
//! | `GET /accounts` | each account with its applications, whether a GET is parked, and its conversations |
//! | `POST /call` `{"from","to_account","text"?,"html"?,"subject"?,"elsewhere"?}` | a correspondent calls: `{"conversation"}`; 409 if the account takes no messages; with `"elsewhere":true` another device of the account answers, however quick an application is, and `POST /say` with the account as `from` is what it writes |
//! | `POST /meet` `{"from","to_account","others"?:[..],"subject"?,"lobby"?,"after"?}` | a correspondent invites to an online meeting, with `"after"` on the thread of that conversation: `{"conversation"}` |
//! | `POST /join` `{"conversation","who"}` | a correspondent joins; a conversation of two becomes a conference |
//! | `POST /role` `{"conversation","who","leader"}` | a correspondent becomes a leader of the conference, or an attendee |
//! | `POST /wait` `{"conversation","who"}` | a correspondent comes into the lobby of the conference |
//! | `POST /lobby` `{"conversation","admit","who"?}` | the account that waits in the meeting's lobby, or the correspondent `"who"`, is let in or turned away |
//! | `POST /say` `{"conversation","text"?,"html"?,"from"?,"data_uri"?,"time_stamp"?}` | the correspondent writes: `{"serials"}`; 409 if it cannot; `"data_uri"` is the plain text's link and `"time_stamp"` the message's time, both as they are |
//! | `POST /type` `{"conversation","from"?,"types"?}` | the correspondent begins to type, or stops with `"types":false` |
//! | `POST /leave` `{"conversation","from"?}` | the correspondent leaves |
//! | `POST /close-messaging` `{"conversation"}` | messaging closes, the conversation goes on |
//! | `POST /traffic` `{"running"?,"messages_per_second"?}` | starts, stops or changes the traffic |
//! | `POST /forget-application` `{"account"}` | the server forgets the account's applications |
//! | `POST /expire-tokens` `{"account"}` | the account's tokens are valid no longer |
//! | `POST /fault` | switches a fault on: `{"id"}`; see below |
//! | `GET /faults` | every fault with its `id`, how often it has `struck`, and how often it will yet (`remaining`) |
//! | `DELETE /faults`, `DELETE /faults?id=N` | switches all of them off, or one |
//! | `POST /chaos` `{"running"?,"seed"?,"faults_per_second"?}` | starts or stops faults at random, each of which an account survives by itself; the same seed makes the same sequence of faults |
//! | `GET /requests` | for each account and operation how many `requests` came, how many `too_early` (before a `Retry-After` was over), and how many `at_once` |
//! | `DELETE /requests` | counts anew |
//! | `GET /logs?account=A` | the conversation logs of an account, the oldest first |
//! | `POST /settings` `{"token_lifetime_ms"?,"application_expiry_ms"?,"link_only_share"?,"early_event_share"?,"started_share"?,"escalation"?,"discovery_redirect"?:{"location","status"?},"user_redirect"?,"conversation_logs"?,"log_delay_ms"?,"missed_calls_logged"?,"password_sign_in"?,"windows_sign_in"?}` | changes settings from now on and answers as `GET /settings`; an empty location switches a redirect off; `escalation` says whether a conversation of two can become a conference: `offered`, `absent` (no `addParticipant` link), `refused` (409) or `failing` (`EscalationFailed`); `windows_sign_in` is `off`, `ntlm`, `negotiate` or `kerberos` |
//! | `GET /settings` | what `POST /settings` can change, as it is now |
//!
//! Bodies are JSON. A request that cannot be carried out is answered with `{"error"}`.
//!
//! # Faults
//!
//! A fault is one flat object: `{"account"?, "operation"?, "fault", "count"?, "share"?, "skip"?, ...}`. Without
//! `account` it concerns all of them, without `operation` every request. It strikes `count` times; once where neither
//! `count` nor `share` is given; with a `share` alone without end, in that share of the requests, by the seed. The first
//! `skip` requests pass.
//!
//! `operation` is one of `any`, `discovery`, `user`, `token`, `ntlmNegotiate`, `ntlmAuthenticate`, `applications`, `application`, `makeMeAvailable`,
//! `reportMyActivity`, `events`, `batch`, `startMessaging`, `startOnlineMeeting`, `addMessaging`, `addParticipant`, `accept`, `decline`,
//! `invitation`, `sendMessage`, `stopMessaging`, `messaging`, `participant`, `message`, `conversation`,
//! `leaveConversation`, `conversations`, `conversationLogs`, `people`, `other`.
//!
//! | `fault` | with | what happens |
//! | --- | --- | --- |
//! | `cut_before`, `cut_after`, `cut_midway` | | the connection ends before the request is carried out; after that; in the middle of the answer's body |
//! | `delay`, `delay_after` | `ms` | the request waits before it is carried out; its answer waits |
//! | `expired_token` | | 401 with the challenge; the token is valid no longer |
//! | `status` | `status`, `subcode`?, `body`? (`ucwa`, `html`, `empty`, `oauth`), `retry_after`?, `retry_after_as_date`?, `challenge`?, `diagnostics`?, `executed`? | any other answer; with `executed` after the request was carried out |
//! | `pget_replaced` | | 409 `PGetReplaced` |
//! | `application_not_found`, `inactive_application_expired`, `too_many_applications` | `keep`? | 404 or 410; the application ends unless `keep` |
//! | `redirect` | `location`, `status`? | 302 or another |
//! | `truncated_xml`, `malformed_xml`, `invalid_utf8`, `doctype`, `endless_body` | | the answer's body is spoilt |
//! | `huge_body` | `bytes`? | the answer's body is valid and long, 32 MiB by default |
//! | `wrong_content_type` | `content_type`? | the answer says it is something else, `text/html` by default |
//! | `resync`, `no_link` | | `events`: 200 with `resync` and no events; a package without a link to go on with |
//! | `resume` | `lose_conversations`? | `events`: what no package holds yet is lost (the ledger says `expired`) |
//! | `unknown_things`, `link_only`, `odd_order`, `aggregate` | | `events`: the next package that can show it does |
//! | `early_events` | | an operation's events come before its answer |
//!
//! What is carried out counts in the ledger although its answer is lost; a package whose answer was lost or spoilt is
//! not acknowledged and comes again byte by byte. A parked GET on `events` is struck as soon as the fault is switched
//! on, unless the fault waits for an answer.

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    CallRequest, ChaosSettings, Fault, LedgerSnapshot, MeetingRequest, Saying, SettingsChange, Simulator,
};

/// Messages that are larger than any client reads can be said, too.
const LARGEST_REQUEST: usize = 64 * 1024 * 1024;

#[derive(Deserialize)]
struct CallBody {
    #[serde(flatten)]
    call: CallRequest,
    #[serde(default)]
    elsewhere: bool,
}

#[derive(Deserialize)]
struct MemberRequest {
    conversation: String,
    who: String,
    #[serde(default)]
    leader: bool,
}

#[derive(Deserialize)]
struct LobbyRequest {
    conversation: String,
    admit: bool,
    who: Option<String>,
}

#[derive(Deserialize)]
struct SayRequest {
    conversation: String,
    #[serde(flatten)]
    saying: Saying,
}

#[derive(Deserialize)]
struct TypeRequest {
    conversation: String,
    from: Option<String>,
    types: Option<bool>,
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
struct ChaosRequest {
    running: Option<bool>,
    #[serde(flatten)]
    settings: ChaosSettings,
}

#[derive(Deserialize)]
struct AccountRequest {
    account: String,
}

#[derive(Deserialize)]
struct FaultQuery {
    id: Option<u64>,
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
        .route("/chaos", post(chaos))
        .route("/requests", get(requests).delete(reset_requests))
        .route("/forget-application", post(forget_application))
        .route("/expire-tokens", post(expire_tokens))
        .route("/meet", post(meet))
        .route("/join", post(join))
        .route("/role", post(role))
        .route("/wait", post(wait))
        .route("/lobby", post(lobby))
        .route("/type", post(show_typing))
        .route("/logs", get(logs))
        .route("/settings", get(settings).post(change_settings))
        .route("/fault", post(inject))
        .route("/faults", get(faults).delete(clear_faults))
        .layer(DefaultBodyLimit::max(LARGEST_REQUEST))
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
        "faults_struck": simulator.faults_struck(),
        "quiet": simulator.is_quiet(),
    }))
    .into_response()
}

async fn accounts(State(simulator): State<Simulator>) -> Response {
    Json(simulator.accounts()).into_response()
}

async fn call(State(simulator): State<Simulator>, Json(request): Json<CallBody>) -> Response {
    let called = if request.elsewhere {
        simulator.call_answered_elsewhere(&request.call)
    } else {
        simulator.call(request.call).await
    };
    done(called.map(|conversation| json!({ "conversation": conversation })))
}

async fn logs(State(simulator): State<Simulator>, Query(query): Query<AccountRequest>) -> Response {
    done(simulator.conversation_logs(&query.account))
}

async fn say(State(simulator): State<Simulator>, Json(request): Json<SayRequest>) -> Response {
    let said = simulator.say_as(&request.conversation, &request.saying);
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

async fn chaos(State(simulator): State<Simulator>, Json(request): Json<ChaosRequest>) -> Response {
    if request.running.unwrap_or(true) {
        simulator.start_chaos(request.settings);
    } else {
        simulator.stop_chaos();
    }
    Json(json!({ "running": simulator.chaos_is_running() })).into_response()
}

async fn requests(State(simulator): State<Simulator>) -> Response {
    Json(simulator.requests()).into_response()
}

async fn reset_requests(State(simulator): State<Simulator>) -> Response {
    simulator.reset_requests();
    Json(json!({})).into_response()
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

/// What a fault can say; a misspelt name would make it strike more than it should.
const FAULT_FIELDS: [&str; 20] = [
    "account",
    "operation",
    "fault",
    "count",
    "share",
    "skip",
    "ms",
    "status",
    "subcode",
    "body",
    "retry_after",
    "retry_after_as_date",
    "challenge",
    "diagnostics",
    "executed",
    "keep",
    "location",
    "bytes",
    "content_type",
    "lose_conversations",
];

fn read_fault(value: serde_json::Value) -> Result<Fault, String> {
    let names = value.as_object().into_iter().flat_map(serde_json::Map::keys);
    for name in names {
        if !FAULT_FIELDS.contains(&name.as_str()) {
            return Err(format!("a fault has no field {name}"));
        }
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}

async fn inject(State(simulator): State<Simulator>, Json(value): Json<serde_json::Value>) -> Response {
    match read_fault(value) {
        Ok(fault) => done(simulator.inject(fault).map(|id| json!({ "id": id }))),
        Err(error) => (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response(),
    }
}

async fn faults(State(simulator): State<Simulator>) -> Response {
    Json(simulator.faults()).into_response()
}

async fn clear_faults(State(simulator): State<Simulator>, Query(query): Query<FaultQuery>) -> Response {
    simulator.clear_faults(query.id);
    Json(json!({})).into_response()
}

async fn settings(State(simulator): State<Simulator>) -> Json<SettingsChange> {
    Json(simulator.changeable_settings())
}

async fn change_settings(
    State(simulator): State<Simulator>,
    Json(change): Json<SettingsChange>,
) -> Json<SettingsChange> {
    simulator.change_settings(change);
    Json(simulator.changeable_settings())
}

async fn meet(State(simulator): State<Simulator>, Json(request): Json<MeetingRequest>) -> Response {
    done(simulator.meet(&request).map(|conversation| json!({ "conversation": conversation })))
}

async fn join(State(simulator): State<Simulator>, Json(request): Json<MemberRequest>) -> Response {
    done(simulator.join(&request.conversation, &request.who).map(|()| json!({})))
}

async fn role(State(simulator): State<Simulator>, Json(request): Json<MemberRequest>) -> Response {
    let MemberRequest { conversation, who, leader } = request;
    done(simulator.change_role(&conversation, &who, leader).map(|()| json!({})))
}

async fn lobby(State(simulator): State<Simulator>, Json(request): Json<LobbyRequest>) -> Response {
    let LobbyRequest { conversation, admit, who } = request;
    let settled = match who {
        Some(who) => simulator.settle_visitor(&conversation, &who, admit),
        None => simulator.settle_lobby(&conversation, admit),
    };
    done(settled.map(|()| json!({})))
}

async fn wait(State(simulator): State<Simulator>, Json(request): Json<MemberRequest>) -> Response {
    done(simulator.wait_in_lobby(&request.conversation, &request.who).map(|()| json!({})))
}

async fn show_typing(State(simulator): State<Simulator>, Json(request): Json<TypeRequest>) -> Response {
    let TypeRequest { conversation, from, types } = request;
    done(simulator.show_typing(&conversation, from.as_deref(), types.unwrap_or(true)).map(|()| json!({})))
}
