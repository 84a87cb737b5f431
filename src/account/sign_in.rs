//! From an account's row to a followed UCWA application: discovery, token, application, availability.
//!
//! A stored application is resumed where it was (guarantee G3); only if the server no longer knows it is a new one
//! created, and the `sessions` row of the old one says why.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use secrecy::SecretString;
use url::Url;

use crate::{
    account::{AccountEnvironment, channel_state::ChannelEnd},
    identifiers::SipUri,
    secrets::{self, SecretError},
    store::{Account, AttentionReason, Auth, NOT_FOLLOWED, Session, StoreError},
    ucwa::{
        Action, Application, NewApplication, SignInMethod, SignInSettings, SignInStep, UcwaClient, UcwaError,
    },
};

/// A signed-in account.
pub struct SignedIn {
    /// With tokens.
    pub client: UcwaClient,
    /// The row that stands for the application.
    pub session: Session,
    /// After it was made available, with its links.
    pub application: Application,
    /// Where the event channel begins.
    pub cursor: Url,
    /// The application existed before: conversations may be open.
    pub resumed: bool,
}

/// Pause before something is tried again that an operator should look at.
const SLOW_RETRY: Duration = Duration::from_secs(15 * 60);

/// Why an account is not signed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignInFailure {
    /// Try again by ourselves, not before the server's `Retry-After`, if it gave one.
    Temporary(String, Option<Duration>),
    /// An operator has to do something; try again by ourselves after the time, if there is one.
    Attention(AttentionReason, String, Option<Duration>),
}

impl From<StoreError> for SignInFailure {
    fn from(error: StoreError) -> Self {
        Self::Temporary(crate::error_chain(&error), None)
    }
}

impl From<UcwaError> for SignInFailure {
    fn from(error: UcwaError) -> Self {
        let words = crate::error_chain(&error);
        match error.action() {
            // Repeated wrong passwords lock an account in the directory; a policy or a certificate may be mended
            // without anybody telling us.
            Action::StopAccount if error.is_credentials_refused() => {
                Self::Attention(reason_of(&error), words, None)
            }
            Action::StopAccount => Self::Attention(reason_of(&error), words, Some(SLOW_RETRY)),
            _ => Self::Temporary(words, error.retry_after()),
        }
    }
}

/// Under which heading of the run-book an error stands that ends an account's life.
pub(super) fn reason_of(error: &UcwaError) -> AttentionReason {
    match error {
        UcwaError::CredentialsRefused { .. } => AttentionReason::PasswordRefused,
        UcwaError::PassiveSignInWanted { .. }
        | UcwaError::GrantNotOffered { .. }
        | UcwaError::NtlmNotOffered { .. } => AttentionReason::SignInMethod,
        UcwaError::TokenService { .. } | UcwaError::SecondTokenRefused { .. } => {
            AttentionReason::TokenRefused
        }
        UcwaError::DiscoveryFailed { .. } => AttentionReason::ServerNotFound,
        UcwaError::Tls { .. } | UcwaError::Setup { .. } => AttentionReason::Certificate,
        UcwaError::Untrusted { .. } | UcwaError::Insecure { .. } => AttentionReason::UntrustedAddress,
        UcwaError::Status { .. } if error.subcode() == Some("TooManyApplications") => {
            AttentionReason::TooManyApplications
        }
        _ => AttentionReason::Policy,
    }
}

impl From<SecretError> for SignInFailure {
    fn from(error: SecretError) -> Self {
        Self::Attention(AttentionReason::PasswordUnavailable, crate::error_chain(&error), None)
    }
}

impl SignInFailure {
    /// How an account's end is told to its supervisor.
    pub fn sentence(&self) -> &str {
        match self {
            Self::Temporary(sentence, _) | Self::Attention(_, sentence, _) => sentence,
        }
    }
}

/// Signs in. `progress` hears of each step. `epoch` is that of the account's lease; once it is over, the client makes no
/// more requests.
pub async fn sign_in(
    environment: &AccountEnvironment,
    account: &Account,
    epoch: i64,
    progress: Arc<dyn Fn(SignInStep) + Send + Sync>,
) -> Result<SignedIn, SignInFailure> {
    let settings = &environment.settings;
    let method = method_of(&account.sip_uri, account.auth)?;
    let _permit = environment.gate.enter().await;
    let password = read_password(environment, account).await?;
    let (leases, id) = (environment.store.leases(), account.id);
    let client = UcwaClient::with_permit(
        &environment.clients,
        SignInSettings {
            sip_uri: account.sip_uri.clone(),
            username: account.username.clone(),
            method,
            discovery_url: settings.discovery_url.clone(),
            trusted_domains: settings.trusted_domains.clone(),
            allow_http: settings.allow_http,
        },
        password,
        Arc::new(move || leases.holds(id, epoch)),
    );
    let signed_in = client.sign_in(&*progress).await?;
    progress(SignInStep::Application);
    let (session, application, resumed) = match environment.store.open_session(account.id).await? {
        Some(session) => match resume(&client, &session).await? {
            Resumed::Application(application) => {
                // Before the channel is followed again, which would make the session look followed until now.
                environment.store.record_gap(account.id, session.id, Timestamp::now(), NOT_FOLLOWED).await?;
                (session, *application, true)
            }
            Resumed::Gone(reason) => {
                create(environment, account, &client, &signed_in.applications, &reason).await?
            }
        },
        None => create(environment, account, &client, &signed_in.applications, "").await?,
    };
    let application = make_available(&client, application, &settings.presence).await?;
    let cursor = match &session.event_cursor {
        Some(cursor) => client.resolve(cursor)?,
        None => application.events.clone().ok_or_else(|| {
            SignInFailure::Temporary("the application resource has no events link".to_owned(), None)
        })?,
    };
    Ok(SignedIn { client, session, application, cursor, resumed })
}

/// What the account's row asks for, if this program does it.
pub(crate) fn method_of(sip_uri: &SipUri, auth: Auth) -> Result<SignInMethod, SignInFailure> {
    let instead = match auth {
        Auth::Password => return Ok(SignInMethod::Password),
        Auth::Ntlm => return Ok(SignInMethod::Ntlm),
        Auth::Kerberos => {
            "there is no Kerberos in this version; set it to ntlm, which the same grant of the server takes, or to \
             password"
        }
        Auth::Aad => {
            "this version signs in at Skype for Business Server only, not at Azure AD; for an account that is homed \
             on the server set it to password or ntlm"
        }
    };
    let words = format!("auth of {sip_uri} is {}: {instead}", auth.as_str());
    Err(SignInFailure::Attention(AttentionReason::SignInMethod, words, None))
}

async fn read_password(
    environment: &AccountEnvironment,
    account: &Account,
) -> Result<SecretString, SignInFailure> {
    match resolve(environment, account).await? {
        // The row was read before this account's turn came; meanwhile the password may have been sealed with a new key.
        Err(error @ SecretError::Unsealable { .. }) => {
            match environment.store.account(&account.sip_uri).await? {
                Some(now) if now.secret != account.secret => Ok(resolve(environment, &now).await??),
                _ => Err(error.into()),
            }
        }
        password => Ok(password?),
    }
}

async fn resolve(
    environment: &AccountEnvironment,
    account: &Account,
) -> Result<Result<SecretString, SecretError>, SignInFailure> {
    let (uri, secret) = (account.sip_uri.clone(), account.secret.clone());
    let key_file = Arc::clone(&environment.key_file);
    tokio::task::spawn_blocking(move || secrets::resolve(&uri, &secret, &key_file))
        .await
        .map_err(|_| SignInFailure::Temporary("reading the password was interrupted".to_owned(), None))
}

enum Resumed {
    Application(Box<Application>),
    Gone(String),
}

async fn resume(client: &UcwaClient, session: &Session) -> Result<Resumed, SignInFailure> {
    let Ok(href) = Url::parse(&session.application_href) else {
        return Ok(Resumed::Gone("the stored address of the application can't be read".to_owned()));
    };
    match client.application(&href).await {
        Ok(application) => Ok(Resumed::Application(Box::new(application))),
        Err(error) if matches!(error.status(), Some(404 | 410)) => {
            Ok(Resumed::Gone(format!("the server no longer knows the application: {error}")))
        }
        // The stored application lies on an origin that sign-in did not lead to this time: the account moved.
        Err(error @ UcwaError::Untrusted { .. }) => {
            Ok(Resumed::Gone(format!("the account was moved to another pool: {error}")))
        }
        Err(error) => Err(error.into()),
    }
}

async fn create(
    environment: &AccountEnvironment,
    account: &Account,
    client: &UcwaClient,
    applications: &Url,
    reason_for_previous: &str,
) -> Result<(Session, Application, bool), SignInFailure> {
    let endpoint_id = environment.store.endpoint_id(account.id).await?;
    let request = NewApplication {
        culture: environment.settings.culture.clone(),
        endpoint_id,
        user_agent: concat!("ucwa-relay/", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    let (application, existed) = client.create_application(applications, &request).await?;
    let events = application
        .events
        .clone()
        .ok_or_else(|| SignInFailure::Temporary("the new application has no events link".to_owned(), None))?;
    // The events of an earlier application never come again.
    let why = if reason_for_previous.is_empty() { "the account was signed out" } else { reason_for_previous };
    let abandoned = environment.store.abandon_sends(account.id, why).await?;
    if abandoned > 0 {
        tracing::warn!(abandoned, "rows of the outbox were being sent; nobody can tell what became of them");
    }
    let session = environment
        .store
        .begin_session(account.id, application.href.as_str(), events.as_str(), reason_for_previous)
        .await?;
    tracing::info!(session.id = session.id.0, existed, "a UCWA application was created");
    Ok((session, application, existed))
}

/// Publishes presence, without which no invitation comes in, and reads the links that this brings.
async fn make_available(
    client: &UcwaClient,
    application: Application,
    presence: &str,
) -> Result<Application, SignInFailure> {
    let Some(link) = application.make_me_available() else { return Ok(application) };
    client.make_me_available(&link, presence).await?;
    Ok(client.application(&application.href).await?)
}

/// Tells the sentence of a channel's end, for the operator.
pub fn describe_end(end: &ChannelEnd) -> String {
    match end {
        ChannelEnd::Requested => "the event channel was stopped".to_owned(),
        ChannelEnd::Panicked => "the event channel panicked; please report it".to_owned(),
        ChannelEnd::ApplicationLost(sentence)
        | ChannelEnd::Rediscover(sentence)
        | ChannelEnd::Attention(_, sentence, _) => sentence.clone(),
        ChannelEnd::Fenced => "another node holds the account now".to_owned(),
    }
}
