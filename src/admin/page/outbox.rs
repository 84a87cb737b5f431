//! `/outbox`: what is to be sent, and what users may do about it: write, hold, release, cancel, send again.
//!
//! Everything is done as any other program does it in SQL, so the database refuses what is not allowed. A form that was
//! taken is answered with a redirect: loading the page again repeats nothing.

use askama::Template;
use axum::{
    Extension, Form,
    extract::{Path, State},
    http::StatusCode,
    response::{Html, IntoResponse, Redirect, Response},
};
use serde::Deserialize;

use super::{
    AdminState, Asked, Badge, Choice, Number, PageError, Shell, When,
    accounts::account_link,
    address, cut, filled, html, limit, link,
    live::{self, Have, Live},
};
use crate::{
    admin::viewer::Viewer,
    identifiers::{OutboxId, SipUri},
    outbox::admission,
    store::{AccountsFilter, NewOutboxRow, OutboxAttempt, OutboxFilter, OutboxRow, OutboxState, StoreError},
};

/// Rows of a page.
const PAGE: usize = 50;
/// Accounts that the form suggests.
const SUGGESTED: i64 = 200;

/// What a user may do with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Hold,
    Release,
    Cancel,
    Retry,
}

impl Change {
    const ALL: [Self; 4] = [Self::Hold, Self::Release, Self::Cancel, Self::Retry];

    fn word(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Release => "release",
            Self::Cancel => "cancel",
            Self::Retry => "retry",
        }
    }

    /// What is said when it is done.
    fn done(self) -> &'static str {
        match self {
            Self::Hold => "The message is held until it is released.",
            Self::Release => "The message is queued again.",
            Self::Cancel => "The message is cancelled.",
            Self::Retry => "The message is queued again, from the start.",
        }
    }

    fn new_state(self) -> OutboxState {
        match self {
            Self::Hold => OutboxState::Held,
            Self::Cancel => OutboxState::Cancelled,
            Self::Release | Self::Retry => OutboxState::Queued,
        }
    }

    /// Whether a row in this state has a button for it.
    fn is_offered(self, state: OutboxState) -> bool {
        use OutboxState::{Expired, Failed, Held, Queued, Uncertain};
        match self {
            Self::Hold => state == Queued,
            Self::Release => state == Held,
            Self::Cancel => matches!(state, Queued | Held),
            Self::Retry => matches!(state, Failed | Expired | Uncertain),
        }
    }
}

/// What is said on the page after a form was taken.
fn notice(word: Option<&str>) -> Option<&'static str> {
    match word? {
        "queued" => Some("The message is queued. This page follows what becomes of it."),
        word => Change::ALL.into_iter().find(|change| change.word() == word).map(Change::done),
    }
}

/// What is asked of the list.
#[derive(Debug, Clone, Default, Deserialize)]
pub(in crate::admin) struct ListQuery {
    account: Option<String>,
    state: Option<String>,
    before: Option<i64>,
    done: Option<String>,
}

/// The same, understood.
#[derive(Debug, Clone)]
struct Asks {
    account: Option<SipUri>,
    state: Option<OutboxState>,
    before: Option<OutboxId>,
}

impl ListQuery {
    fn understood(&self) -> Result<Asks, PageError> {
        let state = match filled(self.state.clone()) {
            None => None,
            Some(word) => {
                Some(OutboxState::ALL.into_iter().find(|known| known.as_str() == word).ok_or_else(|| {
                    PageError::BadRequest("There is no such state of a message.".to_owned())
                })?)
            }
        };
        Ok(Asks { account: address(self.account.clone())?, state, before: self.before.map(OutboxId) })
    }
}

impl Asks {
    fn parts(&self, before: Option<OutboxId>) -> [(&'static str, Option<String>); 3] {
        [
            ("account", self.account.as_ref().map(ToString::to_string)),
            ("state", self.state.map(|state| state.as_str().to_owned())),
            ("before", before.map(|id| id.to_string())),
        ]
    }

    fn link(&self, before: Option<OutboxId>) -> String {
        link("/outbox", &self.parts(before))
    }
}

struct RowLine {
    id: OutboxId,
    badge: Badge,
    account: String,
    recipients: String,
    created: When,
    attempts: i64,
    next: Option<When>,
    error: Option<String>,
    changes: Vec<&'static str>,
}

fn recipients(row: &OutboxRow) -> String {
    row.recipients
        .clone()
        .filter(|recipients| !recipients.trim().is_empty())
        .or_else(|| row.conversation_id.map(|id| format!("conversation {id}")))
        .unwrap_or_default()
}

fn changes(state: OutboxState) -> Vec<&'static str> {
    Change::ALL.into_iter().filter(|change| change.is_offered(state)).map(Change::word).collect()
}

impl RowLine {
    fn new(row: OutboxRow) -> Self {
        Self {
            badge: Badge::of_row(row.state),
            recipients: recipients(&row).replace("sip:", ""),
            account: row.account.trim_start_matches("sip:").to_owned(),
            created: When::new(row.created_at),
            attempts: row.attempts,
            next: row.next_attempt_at.filter(|_| row.state == OutboxState::Queued).map(When::new),
            error: row.last_error,
            changes: changes(row.state),
            id: row.id,
        }
    }
}

#[derive(Template)]
#[template(path = "outbox_live.html")]
struct Rows {
    lines: Vec<RowLine>,
    csrf: String,
    /// Where a button leads back to.
    back: String,
    newest: Option<String>,
    older: Option<String>,
    filtered: bool,
}

async fn rows(state: &AdminState, viewer: &Viewer, asks: &Asks) -> Result<Rows, PageError> {
    let filter = OutboxFilter {
        account: asks.account.clone(),
        state: asks.state,
        before: asks.before,
        limit: limit(PAGE),
    };
    let mut found = state.ask(state.store.outbox_rows(&filter)).await?;
    let more = cut(&mut found, PAGE);
    let older = found.last().filter(|_| more).map(|last| asks.link(Some(last.id)));
    Ok(Rows {
        older,
        newest: asks.before.map(|_| asks.link(None)),
        filtered: asks.account.is_some() || asks.state.is_some(),
        lines: found.into_iter().map(RowLine::new).collect(),
        csrf: viewer.csrf.clone(),
        back: asks.link(asks.before),
    })
}

#[derive(Template)]
#[template(path = "outbox.html")]
struct OutboxPage {
    shell: Shell,
    account: String,
    states: Vec<Choice>,
    compose: String,
    live: Live,
}

/// `GET /outbox`. What was written stands on a row's own page only.
pub(in crate::admin) async fn list(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Asked(asked): Asked<ListQuery>,
) -> Result<Response, PageError> {
    let asks = asked.understood()?;
    let rows = rows(&state, &viewer, &asks).await?.render()?;
    let mut shell = Shell::new("Outbox", "/outbox", &viewer);
    shell.notice = notice(asked.done.as_deref());
    html(&OutboxPage {
        shell,
        states: OutboxState::ALL
            .into_iter()
            .map(|known| Choice {
                value: known.as_str(),
                label: known.as_str().to_owned(),
                chosen: asks.state == Some(known),
            })
            .collect(),
        compose: link("/outbox/new", &[("account", asks.account.as_ref().map(ToString::to_string))]),
        live: Live::new(rows, "/outbox/live", &asks.parts(asks.before)),
        account: asks.account.map(|account| account.to_string()).unwrap_or_default(),
    })
}

/// `GET /outbox/live`.
pub(in crate::admin) async fn follow(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Asked(asked): Asked<ListQuery>,
    Asked(have): Asked<Have>,
) -> Result<Response, PageError> {
    let asks = asked.understood()?;
    live::follow(&state.clone(), &viewer.clone(), have, move |_| {
        let (state, viewer, asks) = (state.clone(), viewer.clone(), asks.clone());
        async move { Ok(rows(&state, &viewer, &asks).await?.render()?) }
    })
}

/// What is asked of a row's page.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct Done {
    done: Option<String>,
}

struct AttemptLine {
    attempt: i64,
    node: String,
    started: When,
    finished: Option<When>,
    outcome: String,
    answer: String,
    detail: String,
}

impl AttemptLine {
    fn new(attempt: OutboxAttempt) -> Self {
        let words = [attempt.http_status.map(|status| status.to_string()), attempt.code, attempt.subcode];
        Self {
            attempt: attempt.attempt,
            node: attempt.node.unwrap_or_default(),
            started: When::new(attempt.started_at),
            finished: attempt.finished_at.map(When::new),
            outcome: attempt.outcome.unwrap_or_default(),
            answer: words.into_iter().flatten().collect::<Vec<_>>().join(" "),
            detail: attempt.detail.unwrap_or_default(),
        }
    }
}

#[derive(Template)]
#[template(path = "outbox_row_live.html")]
struct RowPart {
    id: OutboxId,
    badge: Badge,
    error: Option<String>,
    uncertain: bool,
    changes: Vec<&'static str>,
    csrf: String,
    back: String,
    account: String,
    account_link: Option<String>,
    recipients: String,
    subject: Option<String>,
    body: String,
    properties: Vec<(&'static str, String)>,
    conversation: Option<String>,
    attempts: Vec<AttemptLine>,
}

impl RowPart {
    fn new(row: OutboxRow, attempts: Vec<OutboxAttempt>, viewer: &Viewer) -> Self {
        let when = |at: Option<jiff::Timestamp>| {
            at.map(|at| {
                let at = When::new(at);
                format!("{} {} UTC", at.day, at.time)
            })
        };
        let properties = [
            ("Created", when(Some(row.created_at))),
            ("Next attempt", when(row.next_attempt_at.filter(|_| row.state == OutboxState::Queued))),
            ("Not before", row.send_after.clone()),
            ("Expires", row.expires_at.clone()),
            ("Sent", when(row.sent_at)),
            ("Finished", when(row.finished_at)),
            ("Importance", Some(row.importance.clone())),
            ("Content type", Some(row.content_type.clone())),
            ("Priority", Some(row.priority.to_string())),
            ("Correlation", row.correlation.clone()),
            ("Idempotency key", row.idempotency_key.clone()),
            ("Operation", row.operation_id.as_ref().map(ToString::to_string)),
            ("Code", row.last_code.clone()),
            ("Subcode", row.last_subcode.clone()),
        ];
        Self {
            id: row.id,
            badge: Badge::of_row(row.state),
            error: row.last_error.clone().filter(|_| row.state != OutboxState::Delivered),
            uncertain: row.state == OutboxState::Uncertain,
            changes: changes(row.state),
            csrf: viewer.csrf.clone(),
            back: format!("/outbox/{}", row.id),
            account_link: row.account.parse().ok().map(|uri: SipUri| account_link(uri.as_str())),
            recipients: recipients(&row),
            conversation: row.conversation_id.map(|id| match row.message_id {
                Some(message) => format!("/conversations/{id}?at={message}#m{message}"),
                None => format!("/conversations/{id}"),
            }),
            account: row.account,
            subject: row.subject,
            body: row.body,
            properties: properties
                .into_iter()
                .filter_map(|(name, value)| Some((name, value.filter(|value| !value.is_empty())?)))
                .collect(),
            attempts: attempts.into_iter().map(AttemptLine::new).collect(),
        }
    }
}

#[derive(Template)]
#[template(path = "outbox_row.html")]
struct RowPage {
    shell: Shell,
    id: OutboxId,
    live: Live,
}

/// A row with its attempts.
pub(in crate::admin) async fn row(
    state: &AdminState,
    id: OutboxId,
) -> Result<(OutboxRow, Vec<OutboxAttempt>), PageError> {
    state
        .ask(state.store.outbox_row(id))
        .await?
        .ok_or_else(|| PageError::NotFound("There is no such message in the outbox.".to_owned()))
}

async fn noted_row(
    state: &AdminState,
    viewer: &Viewer,
    id: OutboxId,
    how: &str,
) -> Result<RowPart, PageError> {
    let found = row(state, id).await?;
    let account = found.0.account.parse().ok();
    state.note(viewer, "outbox show", account.as_ref(), &format!("id={id}{how}")).await?;
    Ok(RowPart::new(found.0, found.1, viewer))
}

/// `GET /outbox/{id}`.
pub(in crate::admin) async fn detail(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Number(id): Number,
    Asked(asked): Asked<Done>,
) -> Result<Response, PageError> {
    let part = noted_row(&state, &viewer, OutboxId(id), "").await?.render()?;
    let mut shell = Shell::new(format!("Message {id}"), "/outbox", &viewer);
    shell.notice = notice(asked.done.as_deref());
    html(&RowPage { shell, id: OutboxId(id), live: Live::new(part, &format!("/outbox/{id}/live"), &[]) })
}

/// `GET /outbox/{id}/live`.
pub(in crate::admin) async fn follow_row(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Number(id): Number,
    Asked(have): Asked<Have>,
) -> Result<Response, PageError> {
    live::follow(&state.clone(), &viewer.clone(), have, move |reason| {
        let (state, viewer) = (state.clone(), viewer.clone());
        async move {
            let part = match reason {
                live::Reason::Send => noted_row(&state, &viewer, OutboxId(id), " live").await?,
                live::Reason::Compare => {
                    let (row, attempts) = row(&state, OutboxId(id)).await?;
                    RowPart::new(row, attempts, &viewer)
                }
            };
            Ok(part.render()?)
        }
    })
}

/// The form behind a button.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct ChangeForm {
    back: Option<String>,
}

/// Does to a row what the word says.
///
/// # Errors
/// If there is no such row or no such word, or the row is not in a state that allows it.
pub(in crate::admin) async fn make_change(
    state: &AdminState,
    viewer: &Viewer,
    id: OutboxId,
    word: &str,
) -> Result<(), PageError> {
    let change = Change::ALL
        .into_iter()
        .find(|change| change.word() == word)
        .ok_or_else(|| PageError::NotFound("There is no such page.".to_owned()))?;
    let before = row(state, id).await?.0.state;
    // The database alone would let `release` do what `retry` does.
    let done =
        change.is_offered(before) && state.ask(state.store.set_outbox_state(id, change.new_state())).await?;
    if !done {
        let now = row(state, id).await?.0.state;
        return Err(PageError::Conflict(format!(
            "Message {id} is {} now, which leaves nothing to {word}.",
            now.as_str(),
        )));
    }
    tracing::info!(
        outbox.id = id.0,
        actor = viewer.actor,
        "row {id} of the outbox was changed on the admin page: {word}"
    );
    Ok(())
}

/// `POST /outbox/{id}/{change}`.
pub(in crate::admin) async fn change(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Path((id, word)): Path<(i64, String)>,
    Form(form): Form<ChangeForm>,
) -> Result<Response, PageError> {
    let id = OutboxId(id);
    make_change(&state, &viewer, id, &word).await?;
    let back = form
        .back
        .filter(|back| back == "/outbox" || back.starts_with("/outbox?") || *back == format!("/outbox/{id}"));
    let back = back.unwrap_or_else(|| format!("/outbox/{id}"));
    let sign = if back.contains('?') { '&' } else { '?' };
    Ok(Redirect::to(&format!("{back}{sign}done={word}")).into_response())
}

/// What the form begins with.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct ComposeQuery {
    account: Option<String>,
    to: Option<String>,
}

/// A message as somebody typed it.
#[derive(Default, Deserialize)]
pub(in crate::admin) struct Composed {
    #[serde(default)]
    account: String,
    #[serde(default)]
    recipients: String,
    #[serde(default)]
    subject: String,
    #[serde(default)]
    importance: String,
    #[serde(default)]
    body: String,
    /// Of this form, so that sending it twice queues one message.
    #[serde(default)]
    key: String,
}

/// What is wrong with what was typed.
#[derive(Default)]
pub(in crate::admin) struct Problems {
    account: Option<String>,
    recipients: Option<String>,
    body: Option<String>,
    other: Option<String>,
}

impl Problems {
    /// Looks at what is to be sent, so that whoever wrote it learns at once what the queue would say later.
    pub(in crate::admin) async fn of(
        state: &AdminState,
        account: &str,
        recipients: &str,
        body: &str,
    ) -> Result<Self, PageError> {
        let mut problems = Self::default();
        match account.parse::<SipUri>() {
            Err(error) => problems.account = Some(error.to_string()),
            Ok(uri) => {
                if state.ask(state.store.account(&uri)).await?.is_none() {
                    problems.account = Some(format!("There is no account {uri}."));
                }
            }
        }
        match admission::recipients(recipients) {
            Err(refusal) => problems.recipients = Some(refusal.sentence),
            Ok(recipients) if recipients.is_empty() => {
                problems.recipients =
                    Some("Give at least one SIP address, like sip:bob@contoso.com.".to_owned());
            }
            Ok(_) => {}
        }
        if body.trim().is_empty() {
            problems.body = Some("Write something: an empty message is not sent.".to_owned());
        }
        Ok(problems)
    }

    /// All of them, in sentences.
    pub(in crate::admin) fn sentences(self) -> Vec<String> {
        [self.account, self.recipients, self.body, self.other].into_iter().flatten().collect()
    }

    fn any(&self) -> bool {
        self.account.is_some() || self.recipients.is_some() || self.body.is_some() || self.other.is_some()
    }
}

#[derive(Template)]
#[template(path = "compose.html")]
struct ComposePage {
    shell: Shell,
    form: Composed,
    problems: Problems,
    importances: Vec<Choice>,
    accounts: Vec<String>,
}

impl ComposePage {
    async fn new(
        state: &AdminState,
        viewer: &Viewer,
        form: Composed,
        problems: Problems,
    ) -> Result<Self, PageError> {
        let filter = AccountsFilter { limit: SUGGESTED, ..AccountsFilter::default() };
        let accounts = state.ask(state.store.accounts_page(&filter)).await?;
        Ok(Self {
            shell: Shell::new("New message", "/outbox", viewer),
            importances: ["Normal", "Urgent", "Emergency"]
                .into_iter()
                .map(|word| Choice { value: word, label: word.to_owned(), chosen: form.importance == word })
                .collect(),
            form,
            problems,
            accounts: accounts.into_iter().map(|account| account.account).collect(),
        })
    }
}

/// `GET /outbox/new`.
pub(in crate::admin) async fn compose(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Asked(asked): Asked<ComposeQuery>,
) -> Result<Response, PageError> {
    let form = Composed {
        account: filled(asked.account).unwrap_or_default(),
        recipients: filled(asked.to).unwrap_or_default(),
        key: format!("admin-page-{}", uuid::Uuid::new_v4()),
        ..Composed::default()
    };
    html(&ComposePage::new(&state, &viewer, form, Problems::default()).await?)
}

/// `POST /outbox`.
pub(in crate::admin) async fn queue(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Form(form): Form<Composed>,
) -> Result<Response, PageError> {
    let mut problems = Problems::of(&state, &form.account, &form.recipients, &form.body).await?;
    if !problems.any() {
        let text = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
        let row = NewOutboxRow {
            account: form.account.trim().to_owned(),
            recipients: form.recipients.clone(),
            // Browsers end lines with CR LF in forms (HTML standard, "constructing the entry list").
            body: form.body.replace("\r\n", "\n"),
            content_type: None,
            subject: text(&form.subject),
            importance: text(&form.importance),
            idempotency_key: text(&form.key),
        };
        match state.ask(state.store.enqueue(&row)).await {
            Ok(id) => {
                tracing::info!(
                    outbox.id = id.0,
                    actor = viewer.actor,
                    "row {id} was queued on the admin page"
                );
                return Ok(Redirect::to(&format!("/outbox/{id}?done=queued")).into_response());
            }
            Err(PageError::Store(StoreError::AlreadyExists(_))) => {
                problems.other = Some(
                    "This message was queued already, when the form was sent before. The outbox shows it."
                        .to_owned(),
                );
            }
            Err(error) => return Err(error),
        }
    }
    let page = ComposePage::new(&state, &viewer, form, problems).await?;
    Ok((StatusCode::UNPROCESSABLE_ENTITY, Html(page.render()?)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the contract lets users change, and nothing else.
    #[test]
    fn buttons_are_what_users_may_do() {
        for state in OutboxState::ALL {
            let expected: &[&str] = match state {
                OutboxState::Queued => &["hold", "cancel"],
                OutboxState::Held => &["release", "cancel"],
                OutboxState::Failed | OutboxState::Expired | OutboxState::Uncertain => &["retry"],
                _ => &[],
            };
            assert_eq!(changes(state), expected, "{state:?}");
        }
    }

    #[test]
    fn only_known_words_make_a_notice() {
        assert!(notice(Some("cancel")).is_some());
        assert_eq!(notice(Some("<script>")), None);
        assert_eq!(notice(None), None);
    }
}
