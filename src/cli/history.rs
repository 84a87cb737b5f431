//! `history` and `search`: read the archive, and follow it. Each read is noted in `access_log`.
//!
//! Both take the same query and the same options. A page is the newest messages that fit, by the time they were sent and,
//! of the same time, by id; `--after` goes on with older ones from the first message of the page before, whatever has come
//! since. Who follows gets new ones in the order in which they are archived, by id.

use std::{
    fmt::Write,
    io::{self, IsTerminal},
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use jiff::Timestamp;
use tokio::time::sleep;

use super::{
    actor,
    failure::UsageError,
    open::{IfMissing, with_store},
    output::{self, Highlight, RowFormat, Table, on_one_line, time},
};
use crate::{
    archive::fact::Direction,
    config::Config,
    export::csv,
    identifiers::{MessageId, SipUri},
    query::{self, Condition, Person, Query, when},
    store::{HistoryRow, Page, Store},
};

/// How often the archive is looked at while it is followed: one read by primary key each time.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// Rows taken at once while following.
const PAGE: i64 = 1000;

/// `history`.
#[derive(Debug, Args)]
pub struct HistoryOptions {
    /// Only what fits: words, "phrases", -word, from:, with:, account:, after:, before:, has:html
    #[arg(value_name = "QUERY")]
    query: Vec<String>,
    #[command(flatten)]
    filters: FilterOptions,
    #[command(flatten)]
    listing: ListingOptions,
}

/// `search`.
#[derive(Debug, Args)]
#[command(
    after_help = "All terms have to fit. A text is found where a word begins with it; case and accents do not count.\n\
                        Examples:\n  \
                        ucwa-relay search invoice from:bob after:2026-03-01\n  \
                        ucwa-relay search '\"quarterly budget\" -draft has:html'"
)]
pub struct SearchOptions {
    /// What to look for: words, "phrases", -word, from:, with:, account:, after:, before:, has:html
    #[arg(value_name = "QUERY", required = true)]
    query: Vec<String>,
    #[command(flatten)]
    filters: FilterOptions,
    #[command(flatten)]
    listing: ListingOptions,
}

/// Filters that are options; each has its term in the query language, too.
#[derive(Debug, Args)]
pub(super) struct FilterOptions {
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
}

/// What of it to show, and how.
#[derive(Debug, Args)]
struct ListingOptions {
    /// At most so many, the newest ones
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(0..))]
    limit: i64,
    /// The next page: messages older than the one with this id, the first of the page before
    #[arg(long, value_name = "ID", conflicts_with = "follow")]
    after: Option<i64>,
    /// Go on with each new message until interrupted
    #[arg(long, conflicts_with = "until")]
    follow: bool,
    /// How to print: table, jsonl (one object a line), json (an array; with --follow as jsonl) or csv
    #[arg(long, value_enum, default_value_t = RowFormat::Table, hide_possible_values = true)]
    format: RowFormat,
}

impl FilterOptions {
    /// Everything that is asked for: the words and the options.
    pub(super) fn query(&self, words: &[String]) -> anyhow::Result<Query> {
        if let (Some(since), Some(until)) = (self.since, self.until)
            && since >= until
        {
            return Err(
                UsageError("--since is not before --until; no message can be in between".into()).into()
            );
        }
        let person = |uri: &SipUri| vec![Person::Address(uri.clone())];
        Ok(query::parse(&words.join(" "), Timestamp::now())
            .map_err(|error| UsageError(error.to_string()))?
            .and_if(self.account.as_ref().map(|uri| Condition::Account(person(uri))))
            .and_if(self.with.as_ref().map(|uri| Condition::With(person(uri))))
            .and_if(self.since.map(Condition::After))
            .and_if(self.until.map(Condition::Before)))
    }
}

/// Fails for an account that has never been there: an empty result would look like an empty archive.
pub(super) async fn ensure_accounts(store: &dyn Store, query: &Query) -> anyhow::Result<()> {
    if query.accounts().next().is_none() {
        return Ok(());
    }
    let known = store.archived_accounts().await?;
    for person in query.accounts() {
        if !known.iter().any(|account| person.is_account(&account.uri)) {
            let name = match person {
                Person::Address(uri) => uri.as_str(),
                Person::Name(name) => name,
            };
            anyhow::bail!("there is no account {name}; `ucwa-relay account list` shows them");
        }
    }
    Ok(())
}

/// Prints what the archive has.
pub(super) async fn history(config: &Config, options: HistoryOptions) -> anyhow::Result<()> {
    let query = options.filters.query(&options.query)?;
    read(config, "history", &query, &options.listing).await
}

/// Prints what was looked for.
pub(super) async fn search(config: &Config, options: SearchOptions) -> anyhow::Result<()> {
    let query = options.filters.query(&options.query)?;
    if query.terms.is_empty() {
        return Err(
            UsageError("there is nothing to look for; write a word, or see `search --help`".into()).into()
        );
    }
    read(config, "search", &query, &options.listing).await
}

async fn read(config: &Config, action: &str, query: &Query, listing: &ListingOptions) -> anyhow::Result<()> {
    with_store(config, IfMissing::Refuse, async |store| {
        ensure_accounts(store, query).await?;
        let noted = listing.in_words(query);
        store.record_access(&actor::name(), action, query.only_account(), &noted).await?;
        if listing.follow { follow(store, query, listing).await } else { print(store, query, listing).await }
    })
    .await
}

impl ListingOptions {
    /// For `access_log`.
    fn in_words(&self, query: &Query) -> String {
        let mut words = query.to_string();
        for (name, value) in [
            ("follow", self.follow.then(|| "true".to_owned())),
            ("after", self.after.map(|id| id.to_string())),
            ("limit", Some(self.limit.to_string())),
        ] {
            if let Some(value) = value {
                if !words.is_empty() {
                    words.push(' ');
                }
                let _infallible = write!(words, "--{name}={value}");
            }
        }
        words
    }

    async fn page(&self, store: &dyn Store) -> anyhow::Result<Page> {
        let Some(id) = self.after else { return Ok(Page::Newest) };
        let place = store.place(MessageId(id)).await?;
        place.map(Page::Before).with_context(|| {
            format!("there is no message {id}; --after takes the id of the first message of the page before")
        })
    }
}

async fn print(store: &dyn Store, query: &Query, listing: &ListingOptions) -> anyhow::Result<()> {
    let rows = store.messages(query, listing.page(store).await?, listing.limit).await?;
    match listing.format {
        RowFormat::Json => return output::json_array(&rows),
        RowFormat::Jsonl => return rows.iter().try_for_each(output::json_line),
        RowFormat::Csv => return output::bytes(&csv::document(csv::HISTORY, rows.iter().map(csv::history))?),
        RowFormat::Table => (),
    }
    // A page that is full has older ones before it, as far as can be seen.
    let older =
        rows.first().filter(|_| i64::try_from(rows.len()) == Ok(listing.limit)).map(|row| row.message_id);
    let highlight = Highlight::on_terminal(query);
    let mut table = Table::new(["id", "sent at", "account", "", "with", "body", "status"]);
    for row in rows {
        table.row([
            row.message_id.to_string(),
            time(row.sent_at),
            row.account.clone(),
            arrow(row.direction).into(),
            other_party(&row),
            highlight.mark(&row.shown_body()),
            row.status,
        ]);
    }
    table.print_highlighted("no such messages in the archive", &highlight)?;
    if let Some(older) = older
        && io::stdout().is_terminal()
    {
        eprintln!("older ones: --after {older}");
    }
    Ok(())
}

async fn follow(store: &dyn Store, query: &Query, listing: &ListingOptions) -> anyhow::Result<()> {
    let mut last = store.newest_message().await?.unwrap_or(MessageId(0));
    let highlight = Highlight::on_terminal(query);
    if listing.format == RowFormat::Csv {
        output::bytes(&csv::document(csv::HISTORY, std::iter::empty())?)?;
    }
    if listing.limit > 0 {
        for row in store.messages(query, Page::Newest, listing.limit).await? {
            last = last.max(row.message_id);
            print_line(&row, listing.format, &highlight)?;
        }
    }
    loop {
        let newest = store.newest_message().await?;
        let rows = store.messages(query, Page::After(last), PAGE).await?;
        for row in &rows {
            last = last.max(row.message_id);
            print_line(row, listing.format, &highlight)?;
        }
        if i64::try_from(rows.len()) != Ok(PAGE) {
            // What does not fit is not looked at again.
            last = newest.map_or(last, |newest| last.max(newest));
            sleep(LOOK_AGAIN).await;
        }
    }
}

fn print_line(row: &HistoryRow, format: RowFormat, highlight: &Highlight) -> anyhow::Result<()> {
    match format {
        RowFormat::Json | RowFormat::Jsonl => output::json_line(row),
        RowFormat::Csv => output::bytes(&csv::record(&csv::history(row))?),
        RowFormat::Table => output::line(&highlight.show(&format!(
            "{}  {} {} {}  {}",
            time(row.sent_at),
            row.account,
            arrow(row.direction),
            on_one_line(&other_party(row)),
            on_one_line(&highlight.mark(&row.shown_body()))
        ))),
    }
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
