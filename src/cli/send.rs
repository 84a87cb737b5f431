//! `send`: puts a row into the queue as any program could, and follows it if asked to.

use std::{
    io::{self, IsTerminal, Read},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use tokio::time::{Instant, sleep};

use super::{
    account::existing,
    failure::UsageError,
    open::{IfMissing, with_store},
    output::{self, Format},
};
use crate::{
    config::{Config, parse_duration},
    identifiers::{OutboxId, SipUri},
    store::{NewOutboxRow, OutboxRow, OutboxState, Store},
};

/// How often a row is looked at while it is followed: one indexed read each time.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A row that is `sent` is watched so much longer for the report of its delivery.
const DELIVERY_REPORT: Duration = Duration::from_secs(5);
/// A row that is still `queued` after this gets an explanation.
const EXPLAIN_AFTER: Duration = Duration::from_secs(3);

/// `send`.
#[derive(Debug, Args)]
pub struct SendOptions {
    /// Account that sends
    #[arg(long, value_name = "URI")]
    from: SipUri,
    /// Who gets it; several make one group conversation
    #[arg(long, value_name = "URI[,URI]", required = true, value_delimiter = ',')]
    to: Vec<SipUri>,
    /// Subject of the conversation
    #[arg(long)]
    subject: Option<String>,
    /// The text is HTML
    #[arg(long)]
    html: bool,
    /// How important it is
    #[arg(long, value_parser = ["Normal", "Urgent", "Emergency"])]
    importance: Option<String>,
    /// Refuse a second row of this account with the same key
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Follow the row to its final state; exit code 1 unless it is sent
    #[arg(long)]
    wait: bool,
    /// Stop waiting after so long (the row stays in the queue)
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
    /// What to say; read from stdin, without the end of its last line, if it is - or left out
    text: Option<String>,
}

/// Queues the message.
pub(super) async fn send(config: &Config, options: SendOptions) -> anyhow::Result<()> {
    let body = body(options.text.as_deref())?;
    let recipients: Vec<&str> = options.to.iter().map(SipUri::as_str).collect();
    let row = NewOutboxRow {
        account: options.from.to_string(),
        recipients: recipients.join(";"),
        body,
        content_type: options.html.then(|| "text/html".into()),
        subject: options.subject,
        importance: options.importance,
        idempotency_key: options.idempotency_key,
    };
    with_store(config, IfMissing::Refuse, async |store| {
        let account = existing(store, &options.from).await?;
        if !account.enabled {
            eprintln!("{} is disabled: the message waits until it is enabled", account.sip_uri);
        }
        let id = store.enqueue(&row).await.context("cannot queue the message")?;
        if options.wait {
            let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
            return follow(store, id, &options.from, options.format, deadline).await;
        }
        match options.format {
            Format::Table => {
                output::line(&format!("queued as row {id}; `ucwa-relay outbox show {id}` tells its story"))
            }
            Format::Json => output::json_line(&serde_json::json!({ "id": id, "state": OutboxState::Queued })),
        }
    })
    .await
}

fn body(text: Option<&str>) -> anyhow::Result<String> {
    let body = match text {
        Some(text) if text != "-" => text.to_owned(),
        None if io::stdin().is_terminal() => {
            return Err(UsageError(
                "there is no text to send; give it as the last argument, or by stdin".into(),
            )
            .into());
        }
        _ => {
            let mut body = String::new();
            io::stdin().lock().read_to_string(&mut body).context("cannot read the text from stdin")?;
            // The end of the last line, which `echo` and editors add, is no part of what is said.
            let text =
                body.strip_suffix('\n').map_or(body.as_str(), |text| text.strip_suffix('\r').unwrap_or(text));
            text.to_owned()
        }
    };
    if body.trim().is_empty() {
        return Err(UsageError("the text is empty; there is nothing to send".into()).into());
    }
    Ok(body)
}

/// Prints each state of the row until it is final.
async fn follow(
    store: &dyn Store,
    id: OutboxId,
    account: &SipUri,
    format: Format,
    deadline: Option<Instant>,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut explained = false;
    let mut sent_at = None;
    let mut told = None;
    loop {
        let (row, _) =
            store.outbox_row(id).await?.ok_or_else(|| anyhow!("row {id} is gone: somebody deleted it"))?;
        let now = (row.state, row.attempts, row.last_error.clone());
        if told.as_ref() != Some(&now) {
            tell(&row, format)?;
            told = Some(now);
        }
        let sent_for =
            (row.state == OutboxState::Sent).then(|| sent_at.get_or_insert_with(Instant::now).elapsed());
        let is_over = sent_for.map_or(row.state.is_final(), |sent_for| sent_for >= DELIVERY_REPORT);
        if is_over {
            return conclude(&row);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            if row.state == OutboxState::Sent {
                return Ok(());
            }
            bail!(
                "row {id} is still {}; it stays in the queue, `ucwa-relay outbox show {id}`",
                row.state.as_str()
            );
        }
        if !explained && row.state == OutboxState::Queued && started.elapsed() >= EXPLAIN_AFTER {
            explain(store, account).await?;
            explained = true;
        }
        sleep(LOOK_AGAIN).await;
    }
}

fn tell(row: &OutboxRow, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return output::json_line(row);
    }
    let mut text = format!("row {} is {}", row.id, row.state.as_str());
    if row.state == OutboxState::Sending {
        text = format!("{text} (attempt {})", row.attempts);
    }
    if let Some(error) = &row.last_error {
        text = format!("{text}: {}", output::on_one_line(error));
    }
    output::line(&text)
}

fn conclude(row: &OutboxRow) -> anyhow::Result<()> {
    if matches!(row.state, OutboxState::Sent | OutboxState::Delivered) {
        return Ok(());
    }
    let why = row
        .last_error
        .as_deref()
        .map(|error| format!(": {}", output::on_one_line(error)))
        .unwrap_or_default();
    bail!("the message was not sent; row {} is {}{why}", row.id, row.state.as_str())
}

/// Says on stderr why nothing happens.
async fn explain(store: &dyn Store, account: &SipUri) -> anyhow::Result<()> {
    let overview = store.account_overview(Some(account)).await?.into_iter().next();
    let (state, detail) =
        overview.map_or(("stopped".into(), None), |overview| (overview.state, overview.detail));
    match (state.as_str(), detail) {
        ("online", _) => (),
        (state, Some(detail)) => {
            eprintln!("still waiting: {account} is {state}: {}", output::on_one_line(&detail));
        }
        ("stopped", None) => eprintln!("still waiting: {account} is stopped; is `ucwa-relay run` running?"),
        (state, None) => eprintln!("still waiting: {account} is {state}"),
    }
    Ok(())
}
