//! `retention` and `hold`: what goes by its age, and what is kept all the same.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    actor,
    failure::UsageError,
    open::{IfMissing, with_store},
    output::{self, Format, Table, optional_time, time},
};
use crate::{
    config::Config,
    evidence::tombstone::public_key,
    identifiers::{AccountId, SipUri},
    relay::wait_for_signal,
    retention::{AccountReport, Purger, is_limited, preview, signing_key},
    store::{NewHold, Policy, Store},
};

/// `retention ...`.
#[derive(Debug, Subcommand)]
pub enum RetentionCommand {
    /// Remove the text of messages that were kept long enough; a running server does so once a day
    Run(RunOptions),
}

/// `retention run`.
#[derive(Debug, Args)]
#[command(
    after_help = "How long messages are kept is said by retention.default_days and accounts.retention_days; what a\n\
                        hold is about stays. Times, hashes and addresses stay, signed, so that `verify` still passes."
)]
pub struct RunOptions {
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// The key that signs what is left [default: ucwa-relay.seal.key beside the key that seals passwords]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// `hold ...`.
#[derive(Debug, Subcommand)]
pub enum HoldCommand {
    /// Keep the messages of an account, or with somebody, however old they get
    Add(AddOptions),
    /// Show the holds in force
    List(ListOptions),
    /// End a hold; what is too old goes with the next run
    Release {
        /// As `hold list` shows it
        #[arg(value_name = "ID")]
        id: i64,
    },
}

/// `hold add`.
#[derive(Debug, Args)]
pub struct AddOptions {
    /// Only of this account; without it of all, those that come later too
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// Only conversations in which this person took part, or to which they were invited
    #[arg(long, value_name = "URI")]
    with: Option<SipUri>,
    /// Why; it is shown to everybody who lists holds
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// `hold list`.
#[derive(Debug, Args)]
pub struct ListOptions {
    /// Those that were released, too
    #[arg(long)]
    all: bool,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// What `retention run --format json` prints.
#[derive(Debug, Serialize)]
struct Printed<'a> {
    dry_run: bool,
    /// It was interrupted; the next run goes on.
    stopped: bool,
    accounts: &'a [AccountReport],
}

/// Does what `retention ...` says.
pub(super) async fn retention(config: &Config, command: RetentionCommand) -> anyhow::Result<()> {
    let RetentionCommand::Run(options) = command;
    let policy = Policy { default_days: config.retention.default_days, now: Timestamp::now() };
    with_store(config, IfMissing::Refuse, async |store| {
        if options.dry_run {
            let accounts = preview(store, policy).await?;
            return print(&accounts, true, false, options.format);
        }
        if !is_limited(store, policy).await? {
            return print(&[], false, false, options.format);
        }
        let key_file = options.key.unwrap_or_else(|| config.seal_key_file());
        let (key, is_new) = signing_key(store, &key_file).await?;
        if is_new {
            eprintln!(
                "created the key {} (public half: {}); keep a copy of it, and its public half elsewhere",
                key_file.display(),
                public_key(&key)
            );
        }
        let by = actor::name();
        let purger =
            Purger { store, policy, by: &by, node: &config.cluster.node_id, key: &key, replaces_own: false };
        let stop = CancellationToken::new();
        let mut running = std::pin::pin!(purger.run(&stop));
        let report = tokio::select! {
            report = &mut running => report?,
            signal = wait_for_signal() => {
                signal?;
                stop.cancel();
                running.await?
            }
        };
        print(&report.accounts, false, report.stopped, options.format)?;
        if report.stopped {
            bail!("interrupted; what was purged stays so, and the next run goes on with the rest");
        }
        Ok(())
    })
    .await
}

fn print(accounts: &[AccountReport], dry_run: bool, stopped: bool, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return output::json_line(&Printed { dry_run, stopped, accounts });
    }
    let mut table = Table::new([
        "account",
        "days",
        "sent before",
        if dry_run { "would go" } else { "purged" },
        "oldest",
        "newest",
        "conversations",
        "payloads",
        "kept by holds",
    ]);
    for AccountReport { account, days, before, due } in accounts {
        let kept = due.kept.iter().map(|kept| format!("{} by hold {}", kept.messages, kept.hold));
        table.row([
            account.clone(),
            days.to_string(),
            time(*before),
            due.messages.to_string(),
            optional_time(due.oldest),
            optional_time(due.newest),
            due.conversations.to_string(),
            due.payloads.to_string(),
            kept.collect::<Vec<_>>().join(", "),
        ]);
    }
    table.print(
        "every account's messages are kept for ever; see retention.default_days and accounts.retention_days",
    )
}

/// Does what `hold ...` says.
pub(super) async fn hold(config: &Config, command: HoldCommand) -> anyhow::Result<()> {
    with_store(config, IfMissing::Refuse, async |store| match command {
        HoldCommand::Add(options) => add(store, options).await,
        HoldCommand::List(options) => list(store, &options).await,
        HoldCommand::Release { id } => release(store, id).await,
    })
    .await
}

async fn add(store: &dyn Store, options: AddOptions) -> anyhow::Result<()> {
    if options.reason.trim().is_empty() {
        let words = "--reason is empty; whoever finds this hold later has to know why it is there";
        return Err(UsageError(words.into()).into());
    }
    let account = match &options.account {
        Some(uri) => Some(account_of(store, uri).await?),
        None => None,
    };
    let id = store
        .add_hold(&NewHold {
            account,
            with_uri: options.with,
            reason: options.reason,
            created_by: actor::name(),
        })
        .await?;
    let holds = store.holds(false).await?;
    let hold = holds.into_iter().find(|hold| hold.id == id).context("the hold was released at once")?;
    if options.format == Format::Json {
        return output::json_line(&hold);
    }
    let whose = hold.account.unwrap_or_else(|| "all accounts".to_owned());
    let with = hold.with_uri.map(|uri| format!(" with {uri}")).unwrap_or_default();
    output::line(&format!("hold {id} is in force: messages of {whose}{with} are kept"))
}

/// Removed accounts have an archive, too.
async fn account_of(store: &dyn Store, uri: &SipUri) -> anyhow::Result<AccountId> {
    let accounts = store.retained_accounts().await?;
    let found = accounts.into_iter().find(|account| account.uri == uri.as_str());
    Ok(found.with_context(|| format!("there is no account {uri}; `ucwa-relay account list` shows them"))?.id)
}

async fn list(store: &dyn Store, options: &ListOptions) -> anyhow::Result<()> {
    let holds = store.holds(options.all).await?;
    if options.format == Format::Json {
        return output::json_array(&holds);
    }
    let mut table =
        Table::new(["id", "account", "with", "reason", "added by", "added at", "released by", "released at"]);
    for hold in holds {
        table.row([
            hold.id.to_string(),
            hold.account.unwrap_or_else(|| "all".to_owned()),
            hold.with_uri.unwrap_or_else(|| "all".to_owned()),
            hold.reason,
            hold.created_by,
            time(hold.created_at),
            hold.released_by.unwrap_or_default(),
            optional_time(hold.released_at),
        ]);
    }
    table.print("no hold is in force")
}

async fn release(store: &dyn Store, id: i64) -> anyhow::Result<()> {
    if store.release_hold(id, &actor::name()).await? {
        return output::line(&format!(
            "hold {id} is released; what it kept and is too old goes with the next run"
        ));
    }
    let known = store.holds(true).await?;
    match known.iter().find(|hold| hold.id == id).and_then(|hold| hold.released_at) {
        Some(at) => bail!("hold {id} was released at {} already", time(at)),
        None => bail!("there is no hold {id}; `ucwa-relay hold list` shows them"),
    }
}
