//! `/search`: messages that fit a [`query`]. Each search is noted in `access_log`.

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use jiff::Timestamp;
use serde::Deserialize;

use super::{
    AdminState, Asked, PageError, Shell, When, address, cut, filled, html, limit, link,
    markup::{self, Piece},
};
use crate::{
    admin::viewer::Viewer,
    archive::fact::Direction,
    identifiers::{ConversationId, MessageId},
    query::{self, Condition, Person, Query},
    store::{HistoryRow, Page},
};

/// Messages of a page.
const PAGE: usize = 50;
/// Terms of one search.
const MOST_TERMS: usize = 20;

/// What is asked.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct SearchQuery {
    q: Option<String>,
    account: Option<String>,
    before: Option<i64>,
}

struct Found {
    link: String,
    conversation: ConversationId,
    outgoing: bool,
    who: String,
    account: String,
    subject: Option<String>,
    at: When,
    pieces: Vec<Piece>,
}

impl Found {
    fn new(row: HistoryRow, query: &Query) -> Self {
        let outgoing = row.direction == Direction::Outgoing;
        let body = row.shown_body().into_owned();
        let other = if outgoing { row.recipients } else { row.sender_name.or(row.sender) };
        Self {
            link: format!("/conversations/{}?at={}#m{}", row.conversation_id, row.message_id, row.message_id),
            conversation: row.conversation_id,
            outgoing,
            who: other.unwrap_or_else(|| "somebody".to_owned()).replace("sip:", "").replace(';', ", "),
            account: row.account.trim_start_matches("sip:").to_owned(),
            subject: row.subject.filter(|subject| !subject.trim().is_empty()),
            at: When::new(row.sent_at),
            pieces: markup::highlighted(&body, query),
        }
    }
}

#[derive(Template)]
#[template(path = "search.html")]
struct SearchPage {
    shell: Shell,
    q: String,
    account: String,
    asked: bool,
    problem: Option<String>,
    found: Vec<Found>,
    newest: Option<String>,
    older: Option<String>,
}

/// `GET /search`.
pub(in crate::admin) async fn page(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Asked(asked): Asked<SearchQuery>,
) -> Result<Response, PageError> {
    let q = filled(asked.q).unwrap_or_default();
    let account = address(asked.account)?;
    let (query, problem) = match query::parse(&q, Timestamp::now()) {
        Ok(query) => (query, None),
        Err(error) => (Query::default(), Some(error.to_string())),
    };
    if query.terms.len() > MOST_TERMS {
        return Err(PageError::BadRequest(format!(
            "A search takes at most {MOST_TERMS} words and conditions."
        )));
    }
    let before = asked.before.map(MessageId);
    let mut found = Vec::new();
    if !query.terms.is_empty() {
        let paging = before.map_or_else(String::new, |id| format!(" before={id}"));
        state.note(&viewer, "search", account.as_ref(), &format!("q={q}{paging}")).await?;
        let page = match before {
            Some(id) => Page::Before(state.ask(state.store.place(id)).await?.ok_or_else(|| {
                PageError::NotFound(format!("There is no message {id}, which the page before ended with."))
            })?),
            None => Page::Newest,
        };
        let of_account = account.clone().map(|account| Condition::Account(vec![Person::Address(account)]));
        let narrowed = query.clone().and_if(of_account);
        found = state.ask(state.store.messages(&narrowed, page, limit(PAGE))).await?;
        found.reverse();
    }
    let more = cut(&mut found, PAGE);
    let account = account.map(|account| account.to_string());
    let here = |before: Option<MessageId>| {
        let before = before.map(|id| id.to_string());
        link("/search", &[("q", Some(q.clone())), ("account", account.clone()), ("before", before)])
    };
    let older = found.last().filter(|_| more).map(|last| here(Some(last.message_id)));
    html(&SearchPage {
        shell: Shell::new("Search", "/search", &viewer),
        older,
        newest: before.map(|_| here(None)),
        asked: !query.terms.is_empty(),
        problem,
        found: found.into_iter().map(|row| Found::new(row, &query)).collect(),
        account: account.clone().unwrap_or_default(),
        q: q.clone(),
    })
}
