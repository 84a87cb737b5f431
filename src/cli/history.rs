//! `history`: reads the archive, and follows it. Each read is noted in `access_log`.

use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use tokio::time::sleep;

use super::{
    actor,
    failure::UsageError,
    open::{IfMissing, with_store},
    output::{self, Format, Table, on_one_line, time},
    when,
};
use crate::{
    archive::fact::Direction,
    config::Config,
    identifiers::{MessageId, SipUri},
    store::{HistoryFilter, HistoryRow, Store},
};

/// How often the archive is looked at while it is followed: one read by primary key each time.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// Rows taken at once while following.
const PAGE: i64 = 1000;

/// `history`.
#[derive(Debug, Args)]
pub struct HistoryOptions {
    /// Only of this account
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// Only from or to this person
    #[arg(long, value_name = "URI")]
    with: Option<SipUri>,
    /// Sent at this time or later: 2026-03-01, 2026-03-01T12:00Z, 2h, yesterday
    #[arg(long, value_name = "TIME", value_parser = when::parse)]
    since: Option<Timestamp>,
    /// Sent before this time
    #[arg(long, value_name = "TIME", value_parser = when::parse)]
    until: Option<Timestamp>,
    /// Only the newest ones
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(0..))]
    limit: i64,
    /// Go on with each new message until interrupted
    #[arg(long, conflicts_with = "until")]
    follow: bool,
    /// How to print: table or json, which with --follow is one object a line
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

impl HistoryOptions {
    fn filter(&self) -> HistoryFilter {
        HistoryFilter {
            account: self.account.clone(),
            with: self.with.clone(),
            since: self.since,
            until: self.until,
            after: None,
            limit: self.limit,
        }
    }

    /// For `access_log`.
    fn in_words(&self) -> String {
        let mut words = Vec::new();
        let mut add =
            |name: &str, value: Option<String>| words.extend(value.map(|value| format!("{name}={value}")));
        add("with", self.with.as_ref().map(ToString::to_string));
        add("since", self.since.map(|at| at.to_string()));
        add("until", self.until.map(|at| at.to_string()));
        add("follow", self.follow.then(|| "true".into()));
        add("limit", Some(self.limit.to_string()));
        words.join(" ")
    }
}

/// Prints what the archive has.
pub(super) async fn history(config: &Config, options: HistoryOptions) -> anyhow::Result<()> {
    if let (Some(since), Some(until)) = (options.since, options.until)
        && since >= until
    {
        return Err(UsageError("--since is not before --until; no message can be in between".into()).into());
    }
    with_store(config, IfMissing::Refuse, async |store| {
        if let Some(account) = &options.account {
            archived(store, account).await?;
        }
        store.record_access(&actor::name(), "history", options.account.as_ref(), &options.in_words()).await?;
        if options.follow { follow(store, &options).await } else { print(store, &options).await }
    })
    .await
}

/// Refuses an account that nothing is known of. One that was removed has an archive still.
async fn archived(store: &dyn Store, account: &SipUri) -> anyhow::Result<()> {
    if store.account(account).await?.is_some() {
        return Ok(());
    }
    let filter = HistoryFilter { account: Some(account.clone()), limit: 1, ..HistoryFilter::default() };
    anyhow::ensure!(
        !store.history(&filter).await?.is_empty(),
        "there is no account {account}, and nothing is archived of it; `ucwa-relay account list` shows all"
    );
    Ok(())
}

async fn print(store: &dyn Store, options: &HistoryOptions) -> anyhow::Result<()> {
    let rows = store.history(&options.filter()).await?;
    if options.format == Format::Json {
        return output::json_array(&rows);
    }
    let mut table = Table::new(["id", "sent at", "account", "", "with", "body", "status"]);
    for row in rows {
        table.row([
            row.message_id.to_string(),
            time(row.sent_at),
            row.account.clone(),
            arrow(row.direction).into(),
            other_party(&row),
            row.body,
            row.status,
        ]);
    }
    table.print("no such messages in the archive")
}

async fn follow(store: &dyn Store, options: &HistoryOptions) -> anyhow::Result<()> {
    // With a limit of 0 nothing old is printed, but the place to go on from has to be known.
    let newest = store.history(&HistoryFilter { limit: 1, ..HistoryFilter::default() }).await?;
    let mut last = newest.last().map_or(MessageId(0), |row| row.message_id);
    if options.limit > 0 {
        for row in store.history(&options.filter()).await? {
            last = last.max(row.message_id);
            print_line(&row, options.format)?;
        }
    }
    loop {
        let filter = HistoryFilter { after: Some(last), limit: PAGE, ..options.filter() };
        let rows = store.history(&filter).await?;
        for row in &rows {
            last = last.max(row.message_id);
            print_line(row, options.format)?;
        }
        if rows.is_empty() {
            sleep(LOOK_AGAIN).await;
        }
    }
}

fn print_line(row: &HistoryRow, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return output::json_line(row);
    }
    output::line(&format!(
        "{}  {} {} {}  {}",
        time(row.sent_at),
        row.account,
        arrow(row.direction),
        other_party(row),
        on_one_line(&row.body)
    ))
}

fn arrow(direction: Direction) -> &'static str {
    match direction {
        Direction::Incoming => "<-",
        Direction::Outgoing => "->",
    }
}

/// Who wrote it, or to whom it went.
fn other_party(row: &HistoryRow) -> String {
    match row.direction {
        Direction::Incoming => row.sender.clone().or_else(|| row.sender_name.clone()).unwrap_or_default(),
        Direction::Outgoing => row.recipients.clone().unwrap_or_default(),
    }
}
