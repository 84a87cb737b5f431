//! `seal` and `verify`: whether the archive is as it was written. Who verified the database is noted in `access_log`.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::bail;
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    actor,
    open::{IfMissing, with_store},
    output::{self, Format, Table},
};
use crate::{
    config::Config,
    evidence::{
        CheckedChain, Difference, database,
        seal::{Seal, known_public_key, load_or_create_key},
    },
    export,
    identifiers::SipUri,
    query::Person,
};

/// `verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code 0: nothing differs; 1: something does. A seal proves that nothing before it was changed,\n\
                        if it was kept where nobody who can write the database can write."
)]
pub struct VerifyOptions {
    /// Only of this account
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// Check this export instead of the database
    #[arg(long, value_name = "DIR")]
    export: Option<PathBuf>,
    /// Compare with this seal, too
    #[arg(long, value_name = "FILE")]
    seal: Option<PathBuf>,
    /// The key that must have signed the seal, and the tombstones of purged messages, as `seal` printed it; may be given
    /// several times if there were several [default for tombstones: that of ucwa-relay.seal.key, if it is here]
    #[arg(long, value_name = "HEX")]
    public_key: Vec<String>,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// `seal`.
#[derive(Debug, Args)]
pub struct SealOptions {
    /// Where to write the seal; a file that is there is not overwritten
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The key that signs; made if it is not there [default: ucwa-relay.seal.key beside the key that seals passwords]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// What `verify --format json` prints.
#[derive(Debug, Serialize)]
struct Report {
    intact: bool,
    chains: Vec<CheckedChain>,
    /// Files of the export.
    files: Option<u64>,
    differences: Vec<Difference>,
    /// There were more, which are only counted.
    not_listed: u64,
}

/// Differences that are listed; who rewrote a whole chain makes one for each message.
const LISTED: usize = 1000;

impl Report {
    fn add(&mut self, difference: Difference, format: Format) -> anyhow::Result<()> {
        self.intact = false;
        if self.differences.len() >= LISTED {
            self.not_listed += 1;
            return Ok(());
        }
        if format == Format::Table {
            output::line(&output::harmless(&difference.to_string()))?;
        }
        self.differences.push(difference);
        Ok(())
    }
}

/// Checks and tells.
pub(super) async fn verify(config: &Config, options: VerifyOptions) -> anyhow::Result<()> {
    let VerifyOptions { account, export, seal, public_key, format } = options;
    let noted = seal.as_ref().map(|path| format!("--seal={}", path.display())).unwrap_or_default();
    let given: BTreeSet<String> = public_key.iter().map(|key| key.trim().to_ascii_lowercase()).collect();
    let seal = seal.map(|path| Seal::read(&path, &given)).transpose()?;
    let own = if given.is_empty() { known_public_key(&config.seal_key_file())? } else { None };
    let trusted: BTreeSet<String> = given.iter().cloned().chain(own).collect();
    let only = account.clone().map(Person::Address);
    let mut report =
        Report { intact: true, chains: Vec::new(), files: None, differences: Vec::new(), not_listed: 0 };
    match export {
        Some(folder) => {
            let checked =
                export::verify::verify(&folder, only.as_ref(), seal.as_ref(), &trusted, |difference| {
                    report.add(difference, format)
                })?;
            report.files = Some(checked.files);
            report.chains = checked.chains;
        }
        None => {
            with_store(config, IfMissing::Refuse, async |store| {
                if let Some(person @ Person::Address(uri)) = &only
                    && !store.archived_accounts().await?.iter().any(|account| person.is_account(&account.uri))
                    && seal.as_ref().is_none_or(|seal| seal.head(uri.as_str()).is_none())
                {
                    bail!("there is no account {uri}; `ucwa-relay account list` shows them");
                }
                store.record_access(&actor::name(), "verify", account.as_ref(), &noted).await?;
                report.chains =
                    database::verify(store, only.as_ref(), seal.as_ref(), &trusted, |difference| {
                        report.add(difference, format)
                    })
                    .await?;
                Ok(())
            })
            .await?;
        }
    }
    if trusted.is_empty() {
        tell_of_signers(&report);
    }
    conclude(&report, seal.as_ref(), !given.is_empty(), format)
}

/// Nobody said whose tombstones are to be believed: whoever looks has to know.
fn tell_of_signers(report: &Report) {
    let purged: u64 = report.chains.iter().map(|chain| chain.purged).sum();
    let keys: BTreeSet<&str> =
        report.chains.iter().flat_map(|chain| &chain.tombstone_keys).map(String::as_str).collect();
    if !keys.is_empty() {
        eprintln!(
            "the tombstones of {purged} purged messages were signed with {}; make sure that this is yours, or give it \
             with --public-key",
            keys.into_iter().map(|key| format!("the key {key}")).collect::<Vec<_>>().join(" and ")
        );
    }
}

fn conclude(report: &Report, seal: Option<&Seal>, key_is_known: bool, format: Format) -> anyhow::Result<()> {
    let found = report.differences.len() as u64 + report.not_listed;
    if format == Format::Json {
        output::json_line(report)?;
    } else {
        if report.not_listed > 0 {
            output::line(&format!("... and {} more", report.not_listed))?;
        }
        let mut table = Table::new(["account", "messages", "purged", "last", "sealed to", "differences"]);
        for chain in &report.chains {
            table.row([
                chain.account.clone(),
                chain.messages.to_string(),
                chain.purged.to_string(),
                chain.last_seq.to_string(),
                chain.sealed_to.map(|seq| seq.to_string()).unwrap_or_default(),
                chain.differences.to_string(),
            ]);
        }
        table.print("there are no messages")?;
    }
    if let (Some(seal), false) = (seal, key_is_known) {
        eprintln!(
            "the seal of {} was signed with the key {}; make sure that this is yours, or give it with --public-key",
            seal.created_at, seal.public_key
        );
    }
    if found > 0 {
        bail!(
            "{found} {} found: this is not what was archived",
            if found == 1 { "difference" } else { "differences" }
        );
    }
    if format == Format::Table
        && let Some(files) = report.files
    {
        output::line(&format!("all {files} files are as the manifest says"))?;
    }
    Ok(())
}

/// Signs the heads of all chains.
pub(super) async fn seal(config: &Config, options: SealOptions) -> anyhow::Result<()> {
    let key_file = options.key.unwrap_or_else(|| config.seal_key_file());
    with_store(config, IfMissing::Refuse, async |store| {
        let (key, new) = load_or_create_key(&key_file)?;
        let seal = Seal::of(store, &key, Timestamp::now()).await?;
        seal.write(&options.out)?;
        if new {
            eprintln!("created the key {}; keep a copy of it, and its public half elsewhere", key_file.display());
        }
        if options.format == Format::Json {
            return output::json_line(&seal);
        }
        output::line(&format!(
            "sealed {} chains in {}; keep it where nobody who can write the database can write\npublic key: {}",
            seal.heads.len(),
            options.out.display(),
            seal.public_key
        ))
    })
    .await
}
