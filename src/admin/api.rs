//! `/api/v1`: what the page shows and does, as JSON for programs.
//!
//! The same guards, the same statements and the same notes in `access_log` as the page has. Lists are read by the key of
//! the last item, which each answer gives as `next`. Errors are problem details (RFC 9457), times RFC 3339 in UTC.

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Request, State},
    http::{StatusCode, header, request::Parts},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    AdminState,
    page::{PageError, address, cut, cut_front, filled, limit, outbox},
    viewer::{self, Viewer},
};
use crate::{
    identifiers::{ConversationId, MessageId, OutboxId, SipUri},
    query::{self, Condition, Person},
    store::{
        AccountState, AccountsFilter, ConversationsFilter, NewOutboxRow, OutboxFilter, OutboxRow,
        OutboxState, Page, StoreError, TranscriptPage,
    },
};

/// Items of a list where nobody says how many, and at most.
const ITEMS: usize = 50;
const MOST_ITEMS: usize = 500;
/// Terms of one search.
const MOST_TERMS: usize = 20;
/// Stays of a conversation that are told.
const STAYS: i64 = 2000;

/// An error as a program wants it.
pub(super) struct Problem(pub(super) PageError);

impl<E: Into<PageError>> From<E> for Problem {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.0.status();
        if status.is_server_error() {
            tracing::warn!(error = %crate::error_chain(&self.0), "a request to /api/v1 could not be answered");
        }
        let detail = match &self.0 {
            PageError::Store(_) => crate::error_chain(&self.0),
            error => error.to_string(),
        };
        let problem = json!({ "title": self.0.title(), "status": status.as_u16(), "detail": detail });
        let kind = [(header::CONTENT_TYPE, "application/problem+json")];
        (status, self.0.headers(), kind, problem.to_string()).into_response()
    }
}

/// What stands behind `?`: a parameter that nobody knows is an error, since what it was to do is not done.
struct Query<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(asked)) => Ok(Self(asked)),
            Err(rejection) => Err(PageError::BadRequest(rejection.body_text()).into()),
        }
    }
}

/// The number that the path names.
struct NumberOfPath(i64);

impl<S: Send + Sync> FromRequestParts<S> for NumberOfPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(number)) => Ok(Self(number)),
            Err(_) => Err(PageError::NotFound("There is none of that number.".to_owned()).into()),
        }
    }
}

/// What was sent along, as JSON.
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        // It was read already, up to the longest that is taken, when it was looked at who sends it.
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|rejection| PageError::Unprocessable(rejection.body_text()))?;
        serde_json::from_slice(&body)
            .map(Self)
            .map_err(|error| PageError::Unprocessable(format!("This can't be read: {error}.")).into())
    }
}

type Answer = Result<Response, Problem>;

/// A list, and with what to ask for what follows.
#[derive(Debug, Serialize)]
struct Items<T, K> {
    items: Vec<T>,
    /// Of the parameter that the resource pages by; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<K>,
}

fn answer(value: &impl Serialize) -> Response {
    Json(value).into_response()
}

/// Takes the row off that only told whether more follow, and gives the list its key.
fn items<T: Serialize, K: Serialize>(mut found: Vec<T>, size: usize, key: impl Fn(&T) -> K) -> Response {
    let more = cut(&mut found, size);
    let next = found.last().filter(|_| more).map(key);
    answer(&Items { items: found, next })
}

fn size(asked: Option<usize>) -> Result<usize, PageError> {
    match asked.unwrap_or(ITEMS) {
        size @ 1..=MOST_ITEMS => Ok(size),
        _ => Err(PageError::BadRequest(format!("limit is a number from 1 to {MOST_ITEMS}."))),
    }
}

/// One of a few words.
fn word<T>(
    name: &str,
    given: Option<String>,
    known: impl IntoIterator<Item = T>,
    text: impl Fn(&T) -> &'static str,
) -> Result<Option<T>, PageError> {
    let Some(given) = filled(given) else { return Ok(None) };
    let found = known.into_iter().find(|one| text(one) == given);
    found.map(Some).ok_or_else(|| PageError::BadRequest(format!("{name}: there is no such word: {given:?}.")))
}

/// The routes; `state` is that of the listener.
pub(super) fn router(state: &AdminState) -> Router<AdminState> {
    Router::new()
        .route("/overview", get(overview))
        .route("/accounts", get(accounts))
        .route("/accounts/{uri}", get(account))
        .route("/accounts/{uri}/coverage", get(coverage))
        .route("/conversations", get(conversations))
        .route("/conversations/{id}", get(conversation))
        .route("/conversations/{id}/messages", get(messages))
        .route("/search", get(search))
        .route("/outbox", get(rows).post(queue))
        .route("/outbox/{id}", get(row))
        .route("/outbox/{id}/{change}", post(change))
        .fallback(async || {
            Problem(PageError::NotFound("There is no such resource; docs/api.md lists them.".to_owned()))
        })
        .layer(middleware::from_fn_with_state(state.clone(), viewer::require_program))
}

/// `GET /overview`: what the page tells at one glance.
async fn overview(State(state): State<AdminState>) -> Response {
    answer(&*state.snapshot().await)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountsQuery {
    /// In the address or the name.
    q: Option<String>,
    state: Option<String>,
    after: Option<String>,
    limit: Option<usize>,
}

/// `GET /accounts`, by address.
async fn accounts(State(state): State<AdminState>, Query(asked): Query<AccountsQuery>) -> Answer {
    let size = size(asked.limit)?;
    let filter = AccountsFilter {
        text: filled(asked.q),
        state: word("state", asked.state, AccountState::ALL, |known| known.as_str())?,
        after: filled(asked.after),
        limit: limit(size),
    };
    let found = state.ask(state.store.accounts_page(&filter)).await?;
    Ok(items(found, size, |account| account.account.clone()))
}

/// An account's address from a path, in whatever spelling.
fn account_of_path(uri: &str) -> Result<SipUri, PageError> {
    uri.parse().map_err(|_| no_account())
}

fn no_account() -> PageError {
    PageError::NotFound("There is no such account.".to_owned())
}

/// `GET /accounts/{uri}`.
async fn account(State(state): State<AdminState>, Path(uri): Path<String>) -> Answer {
    let uri = account_of_path(&uri)?;
    let found = state.ask(state.store.account_overview(Some(&uri))).await?.pop().ok_or_else(no_account)?;
    Ok(answer(&found))
}

/// `GET /accounts/{uri}/coverage`: the stretches in which it was followed and was not, oldest first.
async fn coverage(State(state): State<AdminState>, Path(uri): Path<String>) -> Answer {
    let uri = account_of_path(&uri)?;
    state.ask(state.store.account_overview(Some(&uri))).await?.pop().ok_or_else(no_account)?;
    let now = Timestamp::now();
    let found = state.ask(state.store.coverage(Some(&uri))).await?;
    let stretches: Vec<_> = found.into_iter().flat_map(|coverage| coverage.stretches(now)).collect();
    Ok(answer(&Items::<_, ()> { items: stretches, next: None }))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConversationsQuery {
    account: Option<String>,
    with: Option<String>,
    before: Option<i64>,
    limit: Option<usize>,
}

/// What was asked, for `access_log`.
fn in_words(parts: &[(&str, Option<String>)]) -> String {
    let parts: Vec<String> =
        parts.iter().filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?))).collect();
    parts.join(" ")
}

/// `GET /conversations`, newest first.
async fn conversations(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Query(asked): Query<ConversationsQuery>,
) -> Answer {
    let size = size(asked.limit)?;
    let (account, with) = (address(asked.account)?, address(asked.with)?);
    let words = in_words(&[
        ("with", with.as_ref().map(ToString::to_string)),
        ("before", asked.before.map(|id| id.to_string())),
    ]);
    state.note(&viewer, "conversations", account.as_ref(), &words).await?;
    let filter =
        ConversationsFilter { account, with, before: asked.before.map(ConversationId), limit: limit(size) };
    let found = state.ask(state.store.conversations_page(&filter)).await?;
    Ok(items(found, size, |conversation| conversation.conversation_id))
}

/// `GET /conversations/{id}`, with who was there when.
async fn conversation(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    NumberOfPath(id): NumberOfPath,
) -> Answer {
    let id = ConversationId(id);
    let found = state.ask(state.store.conversation_summary(id)).await?.ok_or_else(no_conversation)?;
    state
        .note(
            &viewer,
            "conversation",
            found.account.parse().ok().as_ref(),
            &format!("conversation={id} people"),
        )
        .await?;
    let stays = state.ask(state.store.stays(id, STAYS)).await?;
    Ok(answer(&json!({ "conversation": found, "participants": stays })))
}

fn no_conversation() -> PageError {
    PageError::NotFound("There is no such conversation.".to_owned())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MessagesQuery {
    before: Option<i64>,
    after: Option<i64>,
    limit: Option<usize>,
}

/// `GET /conversations/{id}/messages`, in the order in which they were sent: the newest ones, those before, or those after a
/// message. `previous` and `next` are what to give `before` and `after`.
async fn messages(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    NumberOfPath(id): NumberOfPath,
    Query(asked): Query<MessagesQuery>,
) -> Answer {
    let (id, size) = (ConversationId(id), size(asked.limit)?);
    let page = match (asked.before, asked.after) {
        (Some(_), Some(_)) => {
            return Err(PageError::BadRequest("Give before or after, not both.".to_owned()).into());
        }
        (Some(before), None) => TranscriptPage::Before(MessageId(before)),
        (None, Some(after)) => TranscriptPage::After(MessageId(after)),
        (None, None) => TranscriptPage::Newest,
    };
    let summary = state.ask(state.store.conversation_summary(id)).await?.ok_or_else(no_conversation)?;
    let words = in_words(&[
        ("conversation", Some(id.to_string())),
        ("before", asked.before.map(|id| id.to_string())),
        ("after", asked.after.map(|id| id.to_string())),
    ]);
    state.note(&viewer, "conversation", summary.account.parse().ok().as_ref(), &words).await?;
    let mut found = state.ask(state.store.transcript(id, page, limit(size))).await?;
    let forward = matches!(page, TranscriptPage::After(_));
    let more = if forward { cut(&mut found, size) } else { cut_front(&mut found, size) };
    let (first, last) =
        (found.first().map(|message| message.message_id), found.last().map(|message| message.message_id));
    let previous = first.filter(|_| forward || more);
    let next = last.filter(|_| if forward { more } else { asked.before.is_some() });
    Ok(answer(&json!({ "items": found, "previous": previous, "next": next })))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SearchQuery {
    q: Option<String>,
    account: Option<String>,
    before: Option<i64>,
    limit: Option<usize>,
}

/// `GET /search`: messages that fit a query of the commands' language, newest first.
async fn search(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Query(asked): Query<SearchQuery>,
) -> Answer {
    let size = size(asked.limit)?;
    let account = address(asked.account)?;
    let q = filled(asked.q).ok_or_else(|| {
        PageError::BadRequest("Give what to look for as q; docs/compliance.md tells how.".to_owned())
    })?;
    let query =
        query::parse(&q, Timestamp::now()).map_err(|error| PageError::BadRequest(error.to_string()))?;
    if query.terms.is_empty() || query.terms.len() > MOST_TERMS {
        let words = format!("A search takes 1 to {MOST_TERMS} words and conditions.");
        return Err(PageError::BadRequest(words).into());
    }
    let words = in_words(&[("q", Some(q)), ("before", asked.before.map(|id| id.to_string()))]);
    state.note(&viewer, "search", account.as_ref(), &words).await?;
    let page = match asked.before {
        Some(id) => Page::Before(
            state
                .ask(state.store.place(MessageId(id)))
                .await?
                .ok_or_else(|| PageError::NotFound(format!("before: there is no message {id}.")))?,
        ),
        None => Page::Newest,
    };
    let query = query.and_if(account.map(|account| Condition::Account(vec![Person::Address(account)])));
    let mut found = state.ask(state.store.messages(&query, page, limit(size))).await?;
    found.reverse();
    Ok(items(found, size, |message| message.message_id))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RowsQuery {
    account: Option<String>,
    state: Option<String>,
    before: Option<i64>,
    limit: Option<usize>,
}

/// A row of a list: what was written is told by the row's own resource only, which is noted.
fn without_text(row: &OutboxRow) -> Result<Value, PageError> {
    let mut value = serde_json::to_value(row).map_err(|error| PageError::Unprocessable(error.to_string()))?;
    if let Some(fields) = value.as_object_mut() {
        fields.remove("body");
        fields.remove("subject");
    }
    Ok(value)
}

/// `GET /outbox`, newest first, without texts.
async fn rows(State(state): State<AdminState>, Query(asked): Query<RowsQuery>) -> Answer {
    let size = size(asked.limit)?;
    let filter = OutboxFilter {
        account: address(asked.account)?,
        state: word("state", asked.state, OutboxState::ALL, |known| known.as_str())?,
        before: asked.before.map(OutboxId),
        limit: limit(size),
    };
    let mut found = state.ask(state.store.outbox_rows(&filter)).await?;
    let more = cut(&mut found, size);
    let next = found.last().filter(|_| more).map(|row| row.id);
    let items = found.iter().map(without_text).collect::<Result<Vec<_>, _>>()?;
    Ok(answer(&Items { items, next }))
}

/// `GET /outbox/{id}`: the row and its attempts.
async fn row(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    NumberOfPath(id): NumberOfPath,
) -> Answer {
    let (found, attempts) = outbox::row(&state, OutboxId(id)).await?;
    state.note(&viewer, "outbox show", found.account.parse().ok().as_ref(), &format!("id={id}")).await?;
    Ok(answer(&json!({ "row": found, "attempts": attempts })))
}

/// What is to be sent, with the names of the table's columns.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewRow {
    account: String,
    #[serde(default)]
    recipients: String,
    body: String,
    content_type: Option<String>,
    subject: Option<String>,
    importance: Option<String>,
    idempotency_key: Option<String>,
}

/// `POST /outbox`: 201 with the row's address; 409 if the key was used before.
async fn queue(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Body(new): Body<NewRow>,
) -> Answer {
    let problems = outbox::Problems::of(&state, &new.account, &new.recipients, &new.body).await?.sentences();
    if !problems.is_empty() {
        return Err(PageError::Unprocessable(problems.join(" ")).into());
    }
    let row = NewOutboxRow {
        account: new.account,
        recipients: new.recipients,
        body: new.body,
        content_type: new.content_type,
        subject: new.subject,
        importance: new.importance,
        idempotency_key: new.idempotency_key,
    };
    let id = state.ask(state.store.enqueue(&row)).await.map_err(|error| match error {
        PageError::Store(StoreError::AlreadyExists(_)) => PageError::Conflict(
            "A message with this idempotency_key was queued for this account already; nothing was done."
                .to_owned(),
        ),
        error => error,
    })?;
    tracing::info!(outbox.id = id.0, actor = viewer.actor, "row {id} was queued by /api/v1");
    let (row, _) = outbox::row(&state, id).await?;
    let address = [(header::LOCATION, format!("/api/v1/outbox/{id}"))];
    Ok((StatusCode::CREATED, address, Json(without_text(&row)?)).into_response())
}

/// `POST /outbox/{id}/{change}`: `hold`, `release`, `cancel` or `retry`; 409 if the row's state leaves nothing to do.
async fn change(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Path((id, word)): Path<(String, String)>,
) -> Answer {
    let id = OutboxId(
        id.parse().map_err(|_| PageError::NotFound("There is no such message in the outbox.".to_owned()))?,
    );
    outbox::make_change(&state, &viewer, id, &word).await?;
    let (row, _) = outbox::row(&state, id).await?;
    Ok(answer(&without_text(&row)?))
}
