//! The doctor: looks at everything that `run` needs, in the order in which `run` needs it, and says what is wrong and
//! what to do about it.
//!
//! `local` looks at this machine and the database, `account` signs an account in with the client that the server
//! uses, and takes care to leave nothing behind. Each look is a [`Step`]; what it says may be shown to anybody: steps are
//! made of names, addresses without queries, and what servers answered, never of passwords, tokens or message text.

mod account;
mod local;

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use serde::Serialize;

use crate::{
    account::gate::SignInGate,
    config::{Config, ConfigError},
    identifiers::{AccountId, SipUri},
    store::{self, Account, Auth, Role, SecretSource, SharedStore},
};

/// How many accounts are looked at at the same time; how many begin in a second is for `relay.sign_in_rate`.
const AT_ONCE: usize = 8;

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It works, but somebody should look at it.
    Warning,
    /// It does not work.
    Failed,
    /// It could not, or did not have to, be looked at.
    Skipped,
}

/// One look at one thing.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// SIP URI, if it is about an account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// What was looked at.
    pub step: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took.
    #[serde(rename = "took_ms", serialize_with = "in_milliseconds")]
    pub took: Duration,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// What the UCWA server answered, if it is about an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<Answer>,
}

/// An answer of a UCWA server, as far as decisions go by it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// HTTP status.
    pub status: Option<u16>,
    /// UCWA's word.
    pub code: Option<String>,
    /// UCWA's word.
    pub subcode: Option<String>,
    /// Number in `X-Ms-diagnostics`.
    pub diagnostics: Option<u32>,
}

fn in_milliseconds<S: serde::Serializer>(took: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(took.as_millis()).unwrap_or(u64::MAX))
}

impl Step {
    fn new(step: &'static str, outcome: Outcome, took: Duration, found: impl Into<String>) -> Self {
        Self { account: None, step, outcome, took, found: found.into(), advice: None, answer: None }
    }

    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// What is to be looked at.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Only this account; otherwise all that are enabled.
    pub account: Option<SipUri>,
}

/// Why nothing could be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// No account has this address, neither in the database nor in the configuration.
    #[error(
        "there is no account {0}; `ucwa-relay account list` shows all, `ucwa-relay account add {0}` adds it"
    )]
    NoSuchAccount(SipUri),
}

/// An account as the server would sign it in.
#[derive(Debug, Clone)]
struct Subject {
    /// `None`: it is only declared in the configuration so far.
    id: Option<AccountId>,
    sip_uri: SipUri,
    username: String,
    auth: Auth,
    secret: SecretSource,
    enabled: bool,
}

impl From<Account> for Subject {
    fn from(account: Account) -> Self {
        let Account { id, sip_uri, username, auth, secret, enabled, .. } = account;
        Self { id: Some(id), sip_uri, username, auth, secret, enabled }
    }
}

/// Looks at everything; `tell` hears of each step when it is done, in order.
///
/// # Errors
/// [`CheckError`] if there is no such account. What is found is no error but a step.
pub async fn examine(config: &Config, scope: &Scope, tell: &mut dyn FnMut(Step)) -> Result<(), CheckError> {
    tell(local::configuration(config));
    if let Some(step) = local::secrets(config) {
        tell(step);
    }
    let (store, steps) = look_at_database(config).await;
    let subjects = match &store {
        Some(store) => subjects(config, store).await,
        None => Ok(declared(config, Vec::new())),
    };
    let (subjects, unreadable) = match subjects {
        Ok(subjects) => (subjects, None),
        Err(error) => (declared(config, Vec::new()), Some(error)),
    };
    // The key comes before the database in the order of a start, but which passwords it has to open, only that tells.
    tell(local::key_file(config, &subjects));
    steps.into_iter().for_each(&mut *tell);
    if let Some(error) = unreadable {
        let found = format!("the accounts can't be read: {}", crate::error_chain(&error));
        tell(Step::new("accounts", Outcome::Failed, Duration::ZERO, found));
    }
    let enabled = subjects.iter().filter(|subject| subject.enabled).count();
    tell(local::descriptors(config, enabled));
    tell(local::admin(config).await);
    let outcome = examine_accounts(config, scope, store.as_ref(), subjects, tell).await;
    if let Some(store) = store {
        store.close().await;
    }
    outcome
}

async fn examine_accounts(
    config: &Config,
    scope: &Scope,
    store: Option<&SharedStore>,
    subjects: Vec<Subject>,
    tell: &mut dyn FnMut(Step),
) -> Result<(), CheckError> {
    let chosen: Vec<Subject> = match &scope.account {
        Some(uri) => {
            let named = subjects.into_iter().find(|subject| subject.sip_uri == *uri);
            match named {
                Some(named) => vec![named],
                // What the database knows could not be asked.
                None if store.is_none() => Vec::new(),
                None => return Err(CheckError::NoSuchAccount(uri.clone())),
            }
        }
        None => subjects.into_iter().filter(|subject| subject.enabled).collect(),
    };
    if chosen.is_empty() {
        let (found, advice) = if store.is_some() {
            ("no account is enabled", "add one with `ucwa-relay account add sip:alice@contoso.com`")
        } else {
            ("no account is known without the database", "mend what is said of the database above")
        };
        tell(Step::new("accounts", Outcome::Skipped, Duration::ZERO, found).advise(advice));
        return Ok(());
    }
    let http = match crate::relay::http_settings(config).await {
        Ok(http) => http,
        Err(error) => {
            tell(Step::new("accounts", Outcome::Failed, Duration::ZERO, format!("{error:#}")));
            return Ok(());
        }
    };
    let gate = SignInGate::new(AT_ONCE, f64::from(config.relay.sign_in_rate.get()));
    let looks = chosen.into_iter().map(|subject| account::look(config, &http, store, &gate, subject));
    let mut looks = stream::iter(looks).buffered(AT_ONCE);
    while let Some(steps) = looks.next().await {
        steps.into_iter().for_each(&mut *tell);
    }
    Ok(())
}

/// What would be signed in: the accounts of the database, over which a start merges those of the configuration.
async fn subjects(config: &Config, store: &SharedStore) -> Result<Vec<Subject>, store::StoreError> {
    let known = store.accounts().await?;
    Ok(declared(config, known.into_iter().map(Subject::from).collect()))
}

fn declared(config: &Config, mut subjects: Vec<Subject>) -> Vec<Subject> {
    for declared in &config.accounts {
        let new = declared.to_new_account();
        match subjects.iter_mut().find(|known| known.sip_uri == new.sip_uri) {
            Some(known) => {
                (known.username, known.auth) = (new.username, new.auth);
                if new.secret != SecretSource::Missing {
                    known.secret = new.secret;
                }
            }
            None => subjects.push(Subject {
                id: None,
                sip_uri: new.sip_uri,
                username: new.username,
                auth: new.auth,
                secret: new.secret,
                enabled: true,
            }),
        }
    }
    subjects
}

/// Looks at the database, and opens it if it is as the program needs it: opening another one would change it.
async fn look_at_database(config: &Config) -> (Option<SharedStore>, Vec<Step>) {
    let (mut steps, usable) = local::database(config).await;
    if !usable {
        return (None, steps);
    }
    let began = Instant::now();
    match store::connect(&config.store_settings(), Role::Tool).await {
        Ok(store) => (Some(store), steps),
        Err(error) => {
            let found = format!("it can't be opened: {}", crate::error_chain(&error));
            steps.push(Step::new("database", Outcome::Failed, began.elapsed(), found));
            (None, steps)
        }
    }
}

/// The step that stands for a configuration that can't be used: nothing else can be looked at.
pub fn unusable_configuration(error: &ConfigError) -> Step {
    Step::new("configuration", Outcome::Failed, Duration::ZERO, error.to_string())
}
