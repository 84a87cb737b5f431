//! `account`: the accounts of the relay. They live in the database; a running server picks changes up.

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand, builder::PossibleValuesParser, builder::TypedValueParser};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    failure::UsageError,
    open::{IfMissing, with_store},
    output::{self, Format, Table, optional_time},
    password::PasswordOptions,
};
use crate::{
    config::Config,
    identifiers::SipUri,
    secrets::{Sealer, rotation},
    store::{Account, AccountOverview, Auth, InvitationPolicy, NewAccount, SecretSource, Store},
};

/// `account ...`.
#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// All accounts and what they are doing
    List {
        /// How to print: table or json
        #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
        format: Format,
    },
    /// Add an account
    Add(AddOptions),
    /// Give an account a new password
    SetPassword {
        /// SIP address
        #[arg(value_name = "URI")]
        account: SipUri,
        /// Where the password comes from.
        #[command(flatten)]
        password: PasswordOptions,
    },
    /// Let the server sign an account in
    Enable {
        /// SIP address
        #[arg(value_name = "URI")]
        account: SipUri,
    },
    /// Let the server sign an account out and leave it alone
    Disable {
        /// SIP address
        #[arg(value_name = "URI")]
        account: SipUri,
    },
    /// Take an account out of service and forget its password; its archive stays
    Remove {
        /// SIP address
        #[arg(value_name = "URI")]
        account: SipUri,
    },
    /// Seal all passwords with a new key; running servers go on
    Reseal(ResealOptions),
    /// All about one account
    Show {
        /// SIP address
        #[arg(value_name = "URI")]
        account: SipUri,
        /// How to print: table or json
        #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
        format: Format,
    },
}

/// `account add`.
#[derive(Debug, Args)]
pub struct AddOptions {
    /// SIP address, like sip:alice@contoso.com
    #[arg(value_name = "URI")]
    account: SipUri,
    /// What Active Directory takes: user@ad-domain or DOMAIN\user [default: the address without sip:]
    #[arg(long, value_name = "NAME")]
    username: Option<String>,
    /// How the account signs in; kerberos and aad are refused by this version
    #[arg(long, default_value = "password", value_parser = auth_parser())]
    auth: Auth,
    /// What to do with invitations [default: as relay.invitations says]
    #[arg(long, value_parser = invitations_parser())]
    invitations: Option<InvitationPolicy>,
    #[command(flatten)]
    password: PasswordOptions,
}

/// `account reseal`.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct ResealOptions {
    /// Only put a new key into the key file, to be copied to the machines of other servers before the passwords are
    /// resealed
    #[arg(long)]
    prepare: bool,
    /// The other servers read the very same key file, and not copies of it
    #[arg(long)]
    shared: bool,
}

fn auth_parser() -> impl TypedValueParser<Value = Auth> {
    PossibleValuesParser::new(["password", "ntlm", "kerberos", "aad"]).try_map(from_word)
}

fn invitations_parser() -> impl TypedValueParser<Value = InvitationPolicy> {
    PossibleValuesParser::new(["accept", "decline", "ignore"]).try_map(from_word)
}

/// The value that the database spells with this word.
fn from_word<T: serde::de::DeserializeOwned>(word: String) -> serde_json::Result<T> {
    serde_json::from_value(serde_json::Value::String(word))
}

/// The word with which the database spells a value.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Does what `account ...` says.
pub(super) async fn account(config: &Config, command: AccountCommand) -> anyhow::Result<()> {
    match command {
        AccountCommand::List { format } => {
            with_store(config, IfMissing::Refuse, async |store| list(store, format).await).await
        }
        AccountCommand::Show { account, format } => {
            with_store(config, IfMissing::Refuse, async |store| show(store, &account, format).await).await
        }
        AccountCommand::Add(options) => add(config, options).await,
        AccountCommand::SetPassword { account, password } => {
            with_store(config, IfMissing::Refuse, async |store| {
                let known = existing(store, &account).await?;
                let given = password.secret_source(&account, config)?;
                store.set_secret(known.id, &given.source).await?;
                output::line(&format!("the password of {account} is changed"))
            })
            .await
        }
        AccountCommand::Reseal(options) => reseal(config, &options).await,
        AccountCommand::Enable { account } => set_enabled(config, &account, true).await,
        AccountCommand::Disable { account } => set_enabled(config, &account, false).await,
        AccountCommand::Remove { account } => {
            with_store(config, IfMissing::Refuse, async |store| {
                store.remove_account(existing(store, &account).await?.id).await?;
                output::line(&format!("removed {account}; its archive stays"))
            })
            .await
        }
    }
}

async fn add(config: &Config, options: AddOptions) -> anyhow::Result<()> {
    let AddOptions { account, username, auth, invitations, password } = options;
    let username = username.unwrap_or_else(|| account.address().to_owned());
    if username.trim().is_empty() {
        return Err(UsageError("--username is empty; leave it out to use the address".into()).into());
    }
    with_store(config, IfMissing::Create, async |store| {
        if store.account(&account).await?.is_some() {
            bail!(
                "{account} is there already; change it with `ucwa-relay account set-password`, `enable` or `disable`"
            );
        }
        let given = password.secret_source(&account, config)?;
        let secret = given.source.clone();
        let new = NewAccount { sip_uri: account.clone(), username: username.clone(), auth, secret, invitations };
        store.add_account(&new).await?;
        output::line(&format!("added {account}, which signs in as {username}"))
    })
    .await
}

async fn reseal(config: &Config, options: &ResealOptions) -> anyhow::Result<()> {
    let key_file = config.key_file();
    let shown = key_file.display();
    if options.prepare {
        let added = rotation::prepare(&key_file)?;
        let found = if added { "has a new key besides the old one" } else { "has a new key already" };
        return output::line(&format!(
            "{shown} {found}; copy the file to the machines of the other servers, then run `ucwa-relay account reseal`"
        ));
    }
    with_store(config, IfMissing::Refuse, async |store| {
        let others = store.other_nodes(&config.cluster.node_id).await?;
        let prepared = Sealer::load(&key_file)?.keys() > 1;
        if !others.is_empty() && !options.shared && !prepared {
            bail!(
                "other servers run on this database: {}. If they read the very same key file, add --shared. If they have \
                 copies of it, use `ucwa-relay account reseal --prepare` first, copy the file to them, and then reseal",
                others.join(", ")
            );
        }
        let rotation::Rotated { resealed, resumed } = rotation::rotate(&key_file, store).await?;
        if resumed {
            eprintln!("went on with the new key that {shown} had already");
        }
        if !others.is_empty() && !options.shared {
            eprintln!("copy {shown} to the machines of the other servers once more: the old key is gone from it");
        }
        output::line(&format!(
            "resealed {resealed} passwords with the new key in {shown}; back it up. Older copies of the database need the \
             old key file"
        ))
    })
    .await
}

async fn set_enabled(config: &Config, account: &SipUri, enabled: bool) -> anyhow::Result<()> {
    with_store(config, IfMissing::Refuse, async |store| {
        let known = existing(store, account).await?;
        let word = if enabled { "enabled" } else { "disabled" };
        if known.enabled == enabled {
            return output::line(&format!("{account} is {word} already"));
        }
        store.set_enabled(known.id, enabled).await?;
        output::line(&format!("{account} is {word}"))
    })
    .await
}

/// The account, or an error that says how to find or add it.
pub(super) async fn existing(store: &dyn Store, account: &SipUri) -> anyhow::Result<Account> {
    store.account(account).await?.ok_or_else(|| {
        anyhow!(
            "there is no account {account}; `ucwa-relay account list` shows all, `ucwa-relay account add {account}` \
             adds it"
        )
    })
}

/// An account with what it is doing, as `--format json` prints it. What its row says is missing if it cannot be read.
#[derive(Debug, Serialize)]
struct AccountLine {
    account: String,
    username: Option<String>,
    auth: Option<Auth>,
    /// `sealed`, `env:NAME`, `file:PATH`, `credential:NAME` or `none`.
    password: Option<String>,
    enabled: Option<bool>,
    display_name: Option<String>,
    invitations: Option<InvitationPolicy>,
    retention_days: Option<i64>,
    updated_at: Option<Timestamp>,
    state: String,
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    since: Option<Timestamp>,
    detail: Option<String>,
    messages_today: i64,
    queued: i64,
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    last_event_at: Option<Timestamp>,
    node_id: Option<String>,
    restarts: i64,
}

impl AccountLine {
    fn new(account: Account, overview: Option<AccountOverview>) -> Self {
        let overview = overview.unwrap_or_else(|| AccountOverview {
            account: account.sip_uri.to_string(),
            state: "stopped".into(),
            since: None,
            detail: None,
            messages_today: 0,
            queued: 0,
            last_event_at: None,
            node_id: None,
            restarts: 0,
        });
        Self {
            username: Some(account.username),
            auth: Some(account.auth),
            password: Some(match account.secret {
                SecretSource::Sealed(_) => "sealed".into(),
                SecretSource::Reference(reference) => reference,
                SecretSource::Missing => "none".into(),
            }),
            enabled: Some(account.enabled),
            display_name: account.display_name,
            invitations: account.invitations,
            retention_days: account.retention_days,
            updated_at: Some(account.updated_at),
            ..Self::unreadable(overview)
        }
    }

    /// What is known of an account whose row cannot be read; the detail says why.
    fn unreadable(overview: AccountOverview) -> Self {
        Self {
            account: overview.account,
            username: None,
            auth: None,
            password: None,
            enabled: None,
            display_name: None,
            invitations: None,
            retention_days: None,
            updated_at: None,
            state: overview.state,
            since: overview.since,
            detail: overview.detail,
            messages_today: overview.messages_today,
            queued: overview.queued,
            last_event_at: overview.last_event_at,
            node_id: overview.node_id,
            restarts: overview.restarts,
        }
    }

    /// The state, in which a disabled account stands out.
    fn shown_state(&self) -> String {
        if self.enabled == Some(false) { "disabled".into() } else { self.state.clone() }
    }
}

async fn list(store: &dyn Store, format: Format) -> anyhow::Result<()> {
    let mut overviews = store.account_overview(None).await?;
    let mut lines = Vec::new();
    for account in store.accounts().await? {
        let at = overviews.iter().position(|overview| overview.account == account.sip_uri.as_str());
        lines.push(AccountLine::new(account, at.map(|at| overviews.swap_remove(at))));
    }
    lines.extend(overviews.into_iter().map(AccountLine::unreadable));
    lines.sort_by(|one, other| one.account.cmp(&other.account));
    if format == Format::Json {
        return output::json_array(&lines);
    }
    let mut table =
        Table::new(["account", "state", "since", "signs in as", "today", "queued", "last event", "detail"]);
    for line in lines {
        table.row([
            line.account.clone(),
            line.shown_state(),
            optional_time(line.since),
            line.username.unwrap_or_default(),
            line.messages_today.to_string(),
            line.queued.to_string(),
            optional_time(line.last_event_at),
            line.detail.unwrap_or_default(),
        ]);
    }
    table.print("no accounts yet; add one with `ucwa-relay account add sip:alice@contoso.com`")
}

async fn show(store: &dyn Store, account: &SipUri, format: Format) -> anyhow::Result<()> {
    let known = existing(store, account).await?;
    let overview = store.account_overview(Some(account)).await?.into_iter().next();
    let line = AccountLine::new(known, overview);
    if format == Format::Json {
        return output::json_line(&line);
    }
    let mut table = Table::new(["property", "value"]);
    for (name, value) in [
        ("account", line.account.clone()),
        ("name", line.display_name.clone().unwrap_or_default()),
        ("signs in as", line.username.clone().unwrap_or_default()),
        ("auth", line.auth.as_ref().map(word).unwrap_or_default()),
        ("password", line.password.clone().unwrap_or_default()),
        ("enabled", if line.enabled == Some(true) { "yes" } else { "no" }.into()),
        (
            "invitations",
            line.invitations.map_or_else(|| "as relay.invitations says".into(), |policy| word(&policy)),
        ),
        (
            "retention",
            line.retention_days
                .map_or_else(|| "as retention.default_days says".into(), |days| format!("{days} days")),
        ),
        ("changed", optional_time(line.updated_at)),
        ("state", line.shown_state()),
        ("since", optional_time(line.since)),
        ("detail", line.detail.clone().unwrap_or_default()),
        ("messages today", line.messages_today.to_string()),
        ("queued", line.queued.to_string()),
        ("last event", optional_time(line.last_event_at)),
        ("node", line.node_id.clone().unwrap_or_default()),
        ("restarts", line.restarts.to_string()),
    ] {
        table.property(name, value);
    }
    table.print("")
}
