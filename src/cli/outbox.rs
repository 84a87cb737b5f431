//! `outbox`: looking into the queue, and the changes of state that users may make.

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand, builder::PossibleValuesParser, builder::TypedValueParser};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    actor,
    failure::UsageError,
    open::{IfMissing, with_store},
    outbox_shape::{ShapeOptions, shape},
    output::{self, Format, Table, optional_time, time},
};
use crate::{
    config::Config,
    identifiers::{OutboxId, SipUri},
    outbox::pruning,
    store::{OutboxAttempt, OutboxFilter, OutboxRow, OutboxState, Store},
};

/// `outbox ...`.
#[derive(Debug, Subcommand)]
pub enum OutboxCommand {
    /// Rows of the queue, newest first
    List(ListOptions),
    /// All about one row, and its story in order
    Show {
        /// Row
        #[arg(value_name = "ID", value_parser = outbox_id)]
        id: OutboxId,
        /// How to print: table or json
        #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
        format: Format,
    },
    /// Withdraw rows that are queued or held
    Cancel(Rows),
    /// Queue rows again that failed, expired or are uncertain
    Retry(Rows),
    /// Leave queued rows alone until they are released
    Hold(Rows),
    /// Let held rows go on
    Release(Rows),
    /// Remove finished rows; what was said stays in the archive
    Purge {
        /// Only what was finished so many days ago; without it: as the configuration keeps them
        #[arg(long, value_name = "DAYS")]
        days: Option<u32>,
    },
    /// How many rows wait, by age and destination
    Shape(ShapeOptions),
}

/// `outbox list`.
#[derive(Debug, Args)]
pub struct ListOptions {
    /// Only of this account
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// Only in this state
    #[arg(long, value_parser = state_parser())]
    state: Option<OutboxState>,
    /// At most so many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..))]
    limit: i64,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// Which rows.
#[derive(Debug, Args)]
pub struct Rows {
    /// Rows
    #[arg(value_name = "ID", required = true, value_parser = outbox_id)]
    ids: Vec<OutboxId>,
}

fn outbox_id(text: &str) -> Result<OutboxId, std::num::ParseIntError> {
    text.parse().map(OutboxId)
}

pub(super) fn state_parser() -> impl TypedValueParser<Value = OutboxState> {
    PossibleValuesParser::new(OutboxState::ALL.map(OutboxState::as_str)).map(|word| {
        let known = OutboxState::ALL.into_iter().find(|state| state.as_str() == word);
        known.expect("clap lets only the words of these states through")
    })
}

/// A change of state that users may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Cancel,
    Retry,
    Hold,
    Release,
}

impl Change {
    fn new_state(self) -> OutboxState {
        match self {
            Self::Cancel => OutboxState::Cancelled,
            Self::Hold => OutboxState::Held,
            Self::Retry | Self::Release => OutboxState::Queued,
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Cancel => "cancelled",
            Self::Retry => "queued again",
            Self::Hold => "held",
            Self::Release => "released",
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Cancel => "cancelled",
            Self::Retry => "retried",
            Self::Hold => "held",
            Self::Release => "released",
        }
    }

    /// Why a row in this state does not allow the change; `None` if it does.
    fn objection(self, state: OutboxState) -> Option<&'static str> {
        use OutboxState::{Cancelled, Delivered, Expired, Failed, Held, Queued, Sending, Sent, Uncertain};
        match (self, state) {
            (Self::Cancel, Queued | Held)
            | (Self::Hold, Queued)
            | (Self::Release, Held)
            | (Self::Retry, Failed | Expired | Uncertain) => None,
            (Self::Cancel | Self::Hold | Self::Retry, Sending) => Some("its request is already under way"),
            (_, Sent | Delivered) => Some("the server has it already"),
            (_, Cancelled) => Some("it was withdrawn; queue the message anew"),
            (Self::Cancel, Uncertain) => Some("the server may have it already"),
            (Self::Cancel, Failed | Expired) => Some("it will not be sent anyway"),
            (Self::Retry, Held) => Some("let it go on with `ucwa-relay outbox release`"),
            (Self::Hold, Held) => Some("there is nothing to do"),
            (Self::Hold | Self::Release, Failed | Expired | Uncertain) => {
                Some("queue it again with `ucwa-relay outbox retry`")
            }
            (Self::Retry | Self::Release, Queued) | (Self::Release, Sending) => {
                Some("there is nothing to wait for")
            }
        }
    }
}

/// Does what `outbox ...` says.
pub(super) async fn outbox(config: &Config, command: OutboxCommand) -> anyhow::Result<()> {
    with_store(config, IfMissing::Refuse, async |store| match command {
        OutboxCommand::List(options) => list(store, options).await,
        OutboxCommand::Show { id, format } => show(store, id, format).await,
        OutboxCommand::Cancel(rows) => change(store, &rows.ids, Change::Cancel).await,
        OutboxCommand::Retry(rows) => change(store, &rows.ids, Change::Retry).await,
        OutboxCommand::Hold(rows) => change(store, &rows.ids, Change::Hold).await,
        OutboxCommand::Release(rows) => change(store, &rows.ids, Change::Release).await,
        OutboxCommand::Purge { days } => purge(store, days, config.outbox.keep_finished_days).await,
        OutboxCommand::Shape(options) => shape(store, options).await,
    })
    .await
}

async fn list(store: &dyn Store, options: ListOptions) -> anyhow::Result<()> {
    let ListOptions { account, state, limit, format } = options;
    if format == Format::Json {
        // Only this form shows what was written; the table does not.
        store.record_access(&actor::name(), "outbox list", account.as_ref(), "").await?;
    }
    let rows = store.outbox_rows(&OutboxFilter { account, state, limit, before: None }).await?;
    if format == Format::Json {
        return output::json_array(&rows);
    }
    let mut table = Table::new([
        "id",
        "state",
        "account",
        "recipients",
        "created",
        "attempts",
        "next attempt",
        "last error",
    ]);
    for row in rows {
        table.row([
            row.id.to_string(),
            row.state.as_str().into(),
            row.account,
            recipients(row.recipients, row.conversation_id),
            time(row.created_at),
            row.attempts.to_string(),
            if row.state == OutboxState::Queued { optional_time(row.next_attempt_at) } else { String::new() },
            row.last_error.unwrap_or_default(),
        ]);
    }
    table.print("no such rows in the outbox")
}

async fn purge(store: &dyn Store, days: Option<u32>, kept: u32) -> anyhow::Result<()> {
    let days = match (days, kept) {
        (Some(days), _) => days,
        (None, 0) => {
            return Err(UsageError(
                "outbox.keep_finished_days keeps finished rows for ever; say with --days which to remove"
                    .into(),
            )
            .into());
        }
        (None, kept) => kept,
    };
    let removed = pruning::prune(store, pruning::kept_since(Timestamp::now(), days)).await?;
    output::line(&format!("{removed} rows that were finished more than {days} days ago are removed"))
}

fn recipients(given: Option<String>, conversation: Option<crate::identifiers::ConversationId>) -> String {
    given
        .filter(|recipients| !recipients.is_empty())
        .or_else(|| conversation.map(|id| format!("conversation {id}")))
        .unwrap_or_default()
}

/// What `outbox show --format json` prints.
#[derive(Debug, Serialize)]
struct Story {
    #[serde(flatten)]
    row: OutboxRow,
    attempt_log: Vec<OutboxAttempt>,
}

async fn show(store: &dyn Store, id: OutboxId, format: Format) -> anyhow::Result<()> {
    store.record_access(&actor::name(), "outbox show", None, &format!("id={id}")).await?;
    let (row, attempts) = existing(store, id).await?;
    if format == Format::Json {
        return output::json_line(&Story { row, attempt_log: attempts });
    }
    let chapters = story(&row, &attempts);
    let mut table = Table::new(["property", "value"]);
    for (name, value) in [
        ("id", row.id.to_string()),
        ("state", row.state.as_str().into()),
        ("account", row.account),
        ("recipients", row.recipients.unwrap_or_default()),
        ("conversation", row.conversation_id.map(|id| id.to_string()).unwrap_or_default()),
        ("subject", row.subject.unwrap_or_default()),
        ("importance", row.importance),
        ("content type", row.content_type),
        ("body", row.body),
        ("thread", row.thread_id.unwrap_or_default()),
        ("priority", row.priority.to_string()),
        ("send after", row.send_after.unwrap_or_default()),
        ("expires", row.expires_at.unwrap_or_default()),
        (
            "attempts",
            row.max_attempts
                .map_or_else(|| row.attempts.to_string(), |limit| format!("{} of {limit}", row.attempts)),
        ),
        ("idempotency key", row.idempotency_key.unwrap_or_default()),
        ("correlation", row.correlation.unwrap_or_default()),
        ("created", time(row.created_at)),
        ("next attempt", optional_time(row.next_attempt_at)),
        ("sent", optional_time(row.sent_at)),
        ("finished", optional_time(row.finished_at)),
        ("message", row.message_id.map(|id| id.to_string()).unwrap_or_default()),
        ("last code", [row.last_code, row.last_subcode].into_iter().flatten().collect::<Vec<_>>().join(" ")),
        ("last error", row.last_error.unwrap_or_default()),
        (
            "duplicate",
            if row.possible_duplicate {
                "possible: it was sent again though the server may have taken it before".to_owned()
            } else {
                String::new()
            },
        ),
    ] {
        table.property(name, value);
    }
    table.print("")?;
    output::line("")?;
    let mut table = Table::new(["at", "what happened", "code", "detail"]);
    for chapter in chapters {
        table.row([time(chapter.at), chapter.what, chapter.code, chapter.detail]);
    }
    table.print("")
}

/// Something that happened to a row.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chapter {
    at: Timestamp,
    what: String,
    code: String,
    detail: String,
}

impl Chapter {
    fn new(at: Timestamp, what: impl Into<String>) -> Self {
        Self { at, what: what.into(), code: String::new(), detail: String::new() }
    }
}

/// What happened to a row and what will, in order.
fn story(row: &OutboxRow, attempts: &[OutboxAttempt]) -> Vec<Chapter> {
    let mut chapters = vec![Chapter::new(row.created_at, "put into the queue")];
    for attempt in attempts {
        let number = attempt.attempt;
        let node = attempt.node.as_deref().map(|node| format!(" by {node}")).unwrap_or_default();
        chapters.push(Chapter::new(attempt.started_at, format!("attempt {number} begun{node}")));
        let (Some(at), Some(outcome)) = (attempt.finished_at, &attempt.outcome) else { continue };
        let what = match outcome.as_str() {
            "queued" => format!("attempt {number} came to nothing; the row waits for the next"),
            "sent" => format!("attempt {number}: the server accepted it"),
            "delivered" => format!("attempt {number}: the server reported its delivery"),
            "failed" => format!("attempt {number} failed"),
            "uncertain" => format!("attempt {number}: nobody can tell whether the server took it"),
            other => format!("attempt {number}: {other}"),
        };
        let status = attempt.http_status.map(|status| status.to_string());
        let code = [status.as_ref(), attempt.code.as_ref(), attempt.subcode.as_ref()];
        chapters.push(Chapter {
            code: code.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" "),
            detail: attempt.detail.clone().unwrap_or_default(),
            ..Chapter::new(at, what)
        });
    }
    if let Some(at) = row.finished_at {
        let code = [row.last_code.as_deref(), row.last_subcode.as_deref()];
        chapters.push(Chapter {
            code: code.into_iter().flatten().collect::<Vec<_>>().join(" "),
            detail: row.last_error.clone().unwrap_or_default(),
            ..Chapter::new(at, format!("the row is {}", row.state.as_str()))
        });
    }
    if let Some(at) = row.next_attempt_at.filter(|_| row.state == OutboxState::Queued) {
        chapters.push(Chapter::new(at, "next attempt, at the earliest"));
    }
    // Of what happened at the same moment, what was written down first came first.
    // A claim begins before the database sees it, so a row may be put into the queue after the beginning of its claim.
    chapters[1..].sort_by_key(|chapter| chapter.at);
    chapters
}

async fn existing(store: &dyn Store, id: OutboxId) -> anyhow::Result<(OutboxRow, Vec<OutboxAttempt>)> {
    store.outbox_row(id).await?.ok_or_else(|| {
        anyhow!("there is no row {id} in the outbox; `ucwa-relay outbox list` shows the newest")
    })
}

/// Changes each row that allows it and says what became of each.
async fn change(store: &dyn Store, ids: &[OutboxId], change: Change) -> anyhow::Result<()> {
    let mut refusals = Vec::new();
    for &id in ids {
        match change_one(store, id, change).await {
            Ok(()) => output::line(&format!("row {id} is {}", change.done()))?,
            Err(error) => refusals.push(error),
        }
    }
    let Some(last) = refusals.pop() else { return Ok(()) };
    for refusal in refusals {
        eprintln!("error: {refusal:#}");
    }
    Err(last)
}

async fn change_one(store: &dyn Store, id: OutboxId, change: Change) -> anyhow::Result<()> {
    let (row, _) = existing(store, id).await?;
    if let Some(objection) = change.objection(row.state) {
        bail!("row {id} is {} and cannot be {}: {objection}", row.state.as_str(), change.verb());
    }
    if !store.set_outbox_state(id, change.new_state()).await? {
        let state = existing(store, id).await?.0.state;
        bail!("row {id} has just become {} and cannot be {} any more", state.as_str(), change.verb());
    }
    if row.state == OutboxState::Uncertain {
        eprintln!("the server may have taken row {id} before: it may arrive twice");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_story_is_told_in_order() {
        let at = |second: i64| Timestamp::from_second(1_800_000_000 + second).unwrap();
        let attempt = |attempt, started: i64, finished: Option<i64>, outcome: Option<&str>| OutboxAttempt {
            attempt,
            node: Some("one".to_owned()),
            started_at: at(started),
            finished_at: finished.map(at),
            outcome: outcome.map(str::to_owned),
            http_status: outcome.and(Some(503)),
            code: None,
            subcode: None,
            detail: outcome.map(|_| "the server is busy".to_owned()),
        };
        let row = OutboxRow {
            id: OutboxId(7),
            account: "alice@contoso.com".to_owned(),
            recipients: None,
            body: "x".to_owned(),
            content_type: "text/plain".to_owned(),
            subject: None,
            importance: "Normal".to_owned(),
            conversation_id: None,
            thread_id: None,
            priority: 100,
            send_after: None,
            expires_at: None,
            max_attempts: None,
            idempotency_key: None,
            correlation: None,
            state: OutboxState::Queued,
            attempts: 1,
            next_attempt_at: Some(at(30)),
            operation_id: None,
            message_id: None,
            last_code: None,
            last_subcode: None,
            last_error: None,
            possible_duplicate: false,
            created_at: at(0),
            sent_at: None,
            finished_at: None,
        };
        let told = |row: &OutboxRow, attempts: &[OutboxAttempt]| {
            story(row, attempts).into_iter().map(|chapter| chapter.what).collect::<Vec<_>>()
        };
        let first = attempt(1, 1, Some(2), Some("queued"));
        assert_eq!(
            told(&row, std::slice::from_ref(&first)),
            [
                "put into the queue",
                "attempt 1 begun by one",
                "attempt 1 came to nothing; the row waits for the next",
                "next attempt, at the earliest",
            ]
        );
        assert_eq!(story(&row, std::slice::from_ref(&first))[2].code, "503");
        let seen_at_once = OutboxRow { created_at: at(2), ..row.clone() };
        assert_eq!(told(&seen_at_once, std::slice::from_ref(&first))[0], "put into the queue");
        let over = OutboxRow {
            state: OutboxState::Delivered,
            next_attempt_at: None,
            finished_at: Some(at(41)),
            ..row
        };
        assert_eq!(
            told(&over, &[first, attempt(2, 40, Some(41), Some("delivered"))])[3..],
            ["attempt 2 begun by one", "attempt 2: the server reported its delivery", "the row is delivered",]
        );
    }

    /// What the contract lets users change, and nothing else.
    #[test]
    fn only_the_changes_of_the_contract_are_allowed() {
        use OutboxState::{Expired, Failed, Held, Queued, Uncertain};
        for (change, allowed) in [
            (Change::Cancel, &[Queued, Held][..]),
            (Change::Hold, &[Queued]),
            (Change::Release, &[Held]),
            (Change::Retry, &[Failed, Expired, Uncertain]),
        ] {
            for state in OutboxState::ALL {
                assert_eq!(
                    change.objection(state).is_none(),
                    allowed.contains(&state),
                    "{change:?} {state:?}"
                );
            }
        }
    }
}
