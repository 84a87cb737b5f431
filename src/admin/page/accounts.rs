//! `/accounts`, and `/accounts/{uri}`: who is signed in, and when each account was followed.

use askama::Template;
use axum::{
    Extension,
    extract::{Path, State},
    response::Response,
};
use jiff::Timestamp;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::{
    AdminState, Asked, Badge, Choice, PageError, Shell, When,
    chart::{self, Timeline},
    cut, filled, html, limit, link,
};
use crate::{
    admin::viewer::Viewer,
    identifiers::SipUri,
    store::{Account, AccountOverview, AccountState, AccountsFilter, StoreError, Stretch},
};

/// Accounts of a page.
const PAGE: usize = 50;
/// Stretches of a list.
const STRETCHES: usize = 50;
/// Timelines that can be chosen, in days.
const DAYS: [i64; 3] = [1, 7, 30];
/// What an address may have in a path as it is.
const IN_PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b':').remove(b'@').remove(b'.').remove(b'-').remove(b'_');

/// The page of an account.
pub(super) fn account_link(uri: &str) -> String {
    format!("/accounts/{}", utf8_percent_encode(uri, IN_PATH))
}

/// What is asked of the list.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct ListQuery {
    q: Option<String>,
    state: Option<String>,
    after: Option<String>,
}

struct AccountLine {
    uri: String,
    link: String,
    badge: Badge,
    since: Option<When>,
    detail: Option<String>,
    messages_today: i64,
    queued: i64,
    node: Option<String>,
    restarts: i64,
    last_event_at: Option<When>,
}

impl AccountLine {
    fn new(overview: AccountOverview) -> Self {
        Self {
            link: account_link(&overview.account),
            badge: Badge::of_account(&overview.state),
            since: overview.since.map(When::new),
            detail: overview.detail,
            messages_today: overview.messages_today,
            queued: overview.queued,
            node: overview.node_id,
            restarts: overview.restarts,
            last_event_at: overview.last_event_at.map(When::new),
            uri: overview.account,
        }
    }
}

#[derive(Template)]
#[template(path = "accounts.html")]
struct AccountsPage {
    shell: Shell,
    q: String,
    states: Vec<Choice>,
    accounts: Vec<AccountLine>,
    first: Option<String>,
    next: Option<String>,
    filtered: bool,
}

/// `GET /accounts`.
pub(in crate::admin) async fn list(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Asked(asked): Asked<ListQuery>,
) -> Result<Response, PageError> {
    let text = filled(asked.q);
    let chosen = match filled(asked.state) {
        None => None,
        Some(word) => Some(
            AccountState::ALL
                .into_iter()
                .find(|known| known.as_str() == word)
                .ok_or_else(|| PageError::BadRequest("There is no such state of an account.".to_owned()))?,
        ),
    };
    let after = filled(asked.after);
    let filter =
        AccountsFilter { text: text.clone(), state: chosen, after: after.clone(), limit: limit(PAGE) };
    let mut found = state.ask(state.store.accounts_page(&filter)).await?;
    let more = cut(&mut found, PAGE);
    let here = |after: Option<String>| {
        let word = chosen.map(|chosen| chosen.as_str().to_owned());
        link("/accounts", &[("q", text.clone()), ("state", word), ("after", after)])
    };
    let next = found.last().filter(|_| more).map(|last| here(Some(last.account.clone())));
    html(&AccountsPage {
        shell: Shell::new("Accounts", "/accounts", &viewer),
        first: after.map(|_| here(None)),
        next,
        filtered: text.is_some() || chosen.is_some(),
        q: text.unwrap_or_default(),
        states: AccountState::ALL
            .into_iter()
            .map(|known| Choice {
                value: known.as_str(),
                label: known.as_str().replace('_', " "),
                chosen: chosen == Some(known),
            })
            .collect(),
        accounts: found.into_iter().map(AccountLine::new).collect(),
    })
}

/// What is asked of one account's page.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct DetailQuery {
    days: Option<i64>,
}

struct StretchLine {
    kind: &'static str,
    word: &'static str,
    from: When,
    to: Option<When>,
    why: String,
}

impl StretchLine {
    fn new(stretch: Stretch) -> Self {
        let (kind, word) = chart::kind(&stretch);
        Self {
            kind,
            word,
            from: When::new(stretch.from_at),
            to: stretch.to_at.map(When::new),
            why: [stretch.reason, stretch.detail].into_iter().flatten().collect::<Vec<_>>().join("; "),
        }
    }
}

struct Span {
    days: i64,
    link: String,
    chosen: bool,
}

#[derive(Template)]
#[template(path = "account.html")]
struct AccountPage {
    shell: Shell,
    line: AccountLine,
    account: Option<Account>,
    timeline: Timeline,
    days: Vec<Span>,
    stretches: Vec<StretchLine>,
    conversations: String,
    outbox: String,
    compose: String,
}

/// `GET /accounts/{uri}`.
pub(in crate::admin) async fn detail(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Path(uri): Path<String>,
    Asked(asked): Asked<DetailQuery>,
) -> Result<Response, PageError> {
    let missing = || PageError::NotFound("There is no such account.".to_owned());
    let uri: SipUri = uri.parse().map_err(|_| missing())?;
    let days = asked.days.unwrap_or(7);
    if !DAYS.contains(&days) {
        return Err(PageError::BadRequest("A timeline shows 1, 7 or 30 days.".to_owned()));
    }
    let store = &state.store;
    let overview = state.ask(store.account_overview(Some(&uri))).await?.pop().ok_or_else(missing)?;
    // A row that a user has spoilt is told of in the overview.
    let account = match state.ask(store.account(&uri)).await {
        Ok(account) => account,
        Err(PageError::Store(StoreError::Refused { .. })) => None,
        Err(error) => return Err(error),
    };
    let now = Timestamp::now();
    let mut stretches = state
        .ask(store.coverage(Some(&uri)))
        .await?
        .into_iter()
        .flat_map(|coverage| coverage.stretches(now))
        .collect::<Vec<_>>();
    let timeline = Timeline::new(&stretches, now, days);
    stretches.reverse();
    stretches.truncate(STRETCHES);
    let of_account = |path: &str, name: &str| link(path, &[(name, Some(uri.to_string()))]);
    html(&AccountPage {
        shell: Shell::new(uri.address(), "/accounts", &viewer),
        line: AccountLine::new(overview),
        account,
        timeline,
        days: DAYS
            .into_iter()
            .map(|known| Span {
                days: known,
                link: format!("{}?days={known}", account_link(uri.as_str())),
                chosen: known == days,
            })
            .collect(),
        stretches: stretches.into_iter().map(StretchLine::new).collect(),
        conversations: of_account("/conversations", "account"),
        outbox: of_account("/outbox", "account"),
        compose: of_account("/outbox/new", "account"),
    })
}
