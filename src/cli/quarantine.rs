//! `quarantine`: payloads that were not understood, and another try with this program.

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    actor,
    open::{IfMissing, with_store},
    output::{self, Format, Table, optional_time, time},
};
use crate::{
    archive::{fact::ArchiveCommit, fact::EventSender, replay::replay as read_again},
    config::Config,
    identifiers::SipUri,
    store::{QuarantineEntry, QuarantineFilter, QuarantinedPayload, Store},
};

/// Rows that `replay --all` takes up at most; what is left over is taken up by the next call.
const ALL: i64 = 100_000;

/// `quarantine ...`.
#[derive(Debug, Subcommand)]
pub enum QuarantineCommand {
    /// Payloads that were not understood, newest first
    List(ListOptions),
    /// One payload as it came, with control characters made visible
    Show {
        /// Row of `event_quarantine`
        #[arg(value_name = "ID")]
        id: i64,
        /// How to print: table or json
        #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
        format: Format,
    },
    /// Read payloads again with this program, and archive what it understands now
    Replay(ReplayOptions),
}

/// `quarantine list`.
#[derive(Debug, Args)]
pub struct ListOptions {
    /// Only of this account
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// Those that were understood since, too
    #[arg(long)]
    all: bool,
    /// At most so many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..))]
    limit: i64,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// `quarantine replay`.
#[derive(Debug, Args)]
pub struct ReplayOptions {
    /// Rows of `event_quarantine`
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<i64>,
    /// Every payload that is not understood yet
    #[arg(long)]
    all: bool,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// Does what `quarantine ...` says.
pub(super) async fn quarantine(config: &Config, command: QuarantineCommand) -> anyhow::Result<()> {
    with_store(config, IfMissing::Refuse, async |store| match command {
        QuarantineCommand::List(options) => list(store, options).await,
        QuarantineCommand::Show { id, format } => show(store, id, format).await,
        QuarantineCommand::Replay(options) => replay(store, options).await,
    })
    .await
}

async fn list(store: &dyn Store, options: ListOptions) -> anyhow::Result<()> {
    let ListOptions { account, all, limit, format } = options;
    let entries = store.quarantine_entries(&QuarantineFilter { account, resolved: all, limit }).await?;
    if format == Format::Json {
        return output::json_array(&entries);
    }
    let mut table = Table::new(["id", "received", "account", "bytes", "resolved", "reason"]);
    for entry in entries {
        table.row([
            entry.id.to_string(),
            time(entry.received_at),
            entry.account,
            entry.payload_bytes.to_string(),
            optional_time(entry.resolved_at),
            match entry.purged_at {
                Some(at) => format!("{} [purged at {}]", entry.reason, time(at)),
                None => entry.reason,
            },
        ]);
    }
    table.print("nothing is in the quarantine")
}

/// What `quarantine show --format json` prints.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    entry: QuarantineEntry,
    sender: Option<EventSender>,
    payload: String,
}

async fn show(store: &dyn Store, id: i64, format: Format) -> anyhow::Result<()> {
    let QuarantinedPayload { entry, payload, sender, .. } = existing(store, id).await?;
    // A payload may be somebody's message.
    let account: Option<SipUri> = entry.account.parse().ok();
    store.record_access(&actor::name(), "quarantine show", account.as_ref(), &format!("id={id}")).await?;
    if format == Format::Json {
        return output::json_line(&Shown { entry, sender, payload });
    }
    let mut table = Table::new(["property", "value"]);
    for (name, value) in [
        ("id", entry.id.to_string()),
        ("account", entry.account),
        ("received", time(entry.received_at)),
        ("reason", entry.reason),
        ("sender", sender.map(|sender| format!("{} {}", sender.rel, sender.href)).unwrap_or_default()),
        ("resolved", optional_time(entry.resolved_at)),
        ("purged", optional_time(entry.purged_at)),
    ] {
        table.property(name, value);
    }
    table.print("")?;
    output::line("")?;
    output::line(&visible(&payload))
}

/// Line ends and tabs as they are; every other control character as its picture, so that it controls nothing.
fn visible(payload: &str) -> String {
    payload
        .chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            '\0'..='\u{1f}' => char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{fffd}'),
            '\u{7f}' => '\u{2421}',
            // Controls of the upper half, and what turns the direction of writing round.
            '\u{80}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            other => other,
        })
        .collect()
}

async fn existing(store: &dyn Store, id: i64) -> anyhow::Result<QuarantinedPayload> {
    store.quarantined(id).await?.ok_or_else(|| {
        anyhow!(
            "there is no payload {id} in the quarantine; `ucwa-relay quarantine list --all` shows the newest"
        )
    })
}

/// What became of one payload.
#[derive(Debug, Serialize)]
struct Outcome {
    id: i64,
    understood: bool,
    /// What is still not understood.
    problem: Option<String>,
    /// Facts that it brought.
    facts: usize,
}

async fn replay(store: &dyn Store, options: ReplayOptions) -> anyhow::Result<()> {
    let ids = if options.all {
        let filter = QuarantineFilter { limit: ALL, ..QuarantineFilter::default() };
        // Oldest first: that is how they were said.
        store.quarantine_entries(&filter).await?.iter().rev().map(|entry| entry.id).collect()
    } else {
        options.ids
    };
    let mut outcomes = Vec::new();
    for id in ids {
        outcomes.push(replay_one(store, id).await?);
    }
    let left = outcomes.iter().filter(|outcome| !outcome.understood).count();
    if options.format == Format::Json {
        output::json_array(&outcomes)?;
    } else {
        let mut table = Table::new(["id", "understood", "facts", "problem"]);
        for outcome in outcomes {
            table.row([
                outcome.id.to_string(),
                if outcome.understood { "yes" } else { "no" }.into(),
                outcome.facts.to_string(),
                outcome.problem.unwrap_or_default(),
            ]);
        }
        table.print("nothing is in the quarantine")?;
    }
    if left > 0 && !options.all {
        bail!(
            "{left} of these payloads can't be understood by this program either; they stay in the quarantine"
        );
    }
    Ok(())
}

async fn replay_one(store: &dyn Store, id: i64) -> anyhow::Result<Outcome> {
    let quarantined = existing(store, id).await?;
    let account = quarantined.account;
    if let Some(at) = quarantined.entry.purged_at {
        let problem = format!("it was kept long enough and purged at {}", time(at));
        return Ok(Outcome { id, understood: false, problem: Some(problem), facts: 0 });
    }
    let facts = match read_again(&quarantined.payload, quarantined.sender.as_ref()) {
        Ok(facts) => facts,
        Err(problem) => return Ok(Outcome { id, understood: false, problem: Some(problem), facts: 0 }),
    };
    let open = store.open_session(account).await?.map(|session| session.id);
    let Some(session) = quarantined.session.or(open) else {
        let problem = "the account has no session to which it could belong".to_owned();
        return Ok(Outcome { id, understood: false, problem: Some(problem), facts: 0 });
    };
    let understood = facts.len();
    if understood > 0 {
        store
            .commit(ArchiveCommit {
                account,
                session,
                epoch: 0,
                cursor: None,
                received_at: quarantined.entry.received_at,
                facts,
            })
            .await?;
        if open != Some(session) {
            // Nothing more comes in a session that is over: what waits for something is settled as it is.
            store.end_session(account, session, "ended").await?;
        }
    }
    store.mark_resolved(id, Timestamp::now()).await?;
    Ok(Outcome { id, understood: true, problem: None, facts: understood })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_shown_and_not_obeyed() {
        assert_eq!(visible("a\u{1b}[31m\r\n\tb\u{9b}\u{7f}"), "a\u{241b}[31m\u{240d}\n\tb\u{fffd}\u{2421}");
    }
}
