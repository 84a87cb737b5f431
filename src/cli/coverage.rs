//! `coverage`: when each account was followed, and when not.

use clap::Args;
use jiff::Timestamp;

use super::{
    open::{IfMissing, with_store},
    output::{self, Format, Table, optional_time, time},
};
use crate::{
    config::Config,
    identifiers::SipUri,
    store::{AccountCoverage, Stretch},
};

/// `coverage`.
#[derive(Debug, Args)]
pub struct CoverageOptions {
    /// Only of this account
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// Prints the stretches of all accounts, or of one.
pub(super) async fn coverage(config: &Config, options: CoverageOptions) -> anyhow::Result<()> {
    with_store(config, IfMissing::Refuse, async |store| {
        if let Some(uri) = &options.account
            && store.account(uri).await?.is_none()
            && store.coverage(Some(uri)).await?.is_empty()
        {
            anyhow::bail!("there is no account {uri}; `ucwa-relay account list` shows them");
        }
        let now = Timestamp::now();
        let stretches: Vec<Stretch> = store
            .coverage(options.account.as_ref())
            .await?
            .into_iter()
            .flat_map(|account| AccountCoverage::stretches(account, now))
            .collect();
        if options.format == Format::Json {
            return output::json_array(&stretches);
        }
        let mut table = Table::new(["account", "followed", "from", "to", "backfilled", "reason"]);
        for stretch in stretches {
            let reason =
                [stretch.reason, stretch.detail].into_iter().flatten().collect::<Vec<_>>().join("; ");
            table.row([
                stretch.account,
                yes_or_no(stretch.followed).into(),
                time(stretch.from_at),
                optional_time(stretch.to_at),
                stretch.backfilled.map(yes_or_no).unwrap_or_default().into(),
                reason,
            ]);
        }
        table.print("no account has been followed yet")
    })
    .await
}

fn yes_or_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}
