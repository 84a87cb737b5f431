//! The client of one account: every UCWA request that the relay makes.
//!
//! Each request carries the token of its own origin and only goes to trusted origins. A refused token is renewed once
//! and the request repeated once, which is safe because it was not executed. Nothing else is repeated here: whether a
//! request may be made again is its owner's decision ([`UcwaError::action`], [`UcwaError::was_sent`]).

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::{Method, header::HeaderValue};
use secrecy::SecretString;
use url::{Origin, Url, form_urlencoded};

use super::{
    application::{Application, NewApplication},
    data_uri,
    error::UcwaError,
    http::{Call, HttpClients, Parked, PollLease, Reply},
    model::{EventBatch, Reason, Resource},
    observe::{Exchange, Observation, Observer},
    token::OriginTokens,
    trust::{Trust, resolve_within},
    xml::{self, Input, ParseError},
};
use crate::identifiers::{OperationId, SipUri};

/// How long a server holds a parked GET that never named a `timeout`.
const DEFAULT_POLL_TIMEOUT: Duration = Duration::from_mins(3);
/// How often a creation that meets one in progress (409 `AlreadyExists`) is made again.
const CREATION_RETRIES: usize = 3;

/// How an account proves to the token service who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignInMethod {
    /// The grant `password`: the token service is given user name and password.
    Password,
    /// The grant `urn:microsoft.rtc:windows` on a connection that NTLM (version 2) signs in.
    Ntlm,
}

impl SignInMethod {
    /// As challenges and token services spell it.
    pub(super) fn grant(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::Ntlm => "urn:microsoft.rtc:windows",
        }
    }

    /// For sentences: what the operator set, and what it asks the server for.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Password => "auth = password (grant password)",
            Self::Ntlm => "auth = ntlm (grant urn:microsoft.rtc:windows)",
        }
    }
}

/// Whose client, and how it signs in.
#[derive(Debug, Clone)]
pub struct SignInSettings {
    /// The account; its domain is where discovery begins.
    pub sip_uri: SipUri,
    /// What the token service takes: `user@ad-domain` or `DOMAIN\user`.
    pub username: String,
    /// What is done with user name and password.
    pub method: SignInMethod,
    /// Replaces both discovery addresses.
    pub discovery_url: Option<Url>,
    /// Domains that discovery may lead to, beside the account's own.
    pub trusted_domains: Vec<String>,
    /// Plain http to loopback addresses is allowed.
    pub allow_http: bool,
}

/// Parameters of the event channel, which the server remembers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventParameters {
    /// How long events of low priority may be held back; 5 s to 1,800 s.
    pub low: Duration,
    /// The same for medium priority; 5 s to 1,800 s.
    pub medium: Duration,
    /// How long a GET without events is held; 180 s to 1,800 s.
    pub timeout: Duration,
    /// Against another parked GET of the same application the higher one wins; 0 is not sent.
    pub priority: u32,
}

/// What a parked GET brought.
#[derive(Debug)]
pub struct PollAnswer {
    /// The body as text; what was not UTF-8 is replaced.
    pub body: String,
    /// The body read; the byte ranges of its events are those of `body`.
    pub batch: Result<EventBatch, ParseError>,
}

/// Input of the resource `startMessaging`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingInvitation {
    /// New for each invitation; the events about it carry it.
    pub operation_id: OperationId,
    /// SIP URI of who is invited.
    pub to: String,
    /// At most 250 characters.
    pub subject: Option<String>,
    /// `Normal`, `Urgent` or `Emergency`.
    pub importance: String,
    /// Ties conversations together; at most 250 characters.
    pub thread_id: Option<String>,
    /// First text, plain.
    pub message: Option<String>,
}

/// Input of the resource `startOnlineMeeting`, for a meeting of the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMeeting {
    /// New for each meeting; the events about its invitation carry it.
    pub operation_id: OperationId,
    /// At most 250 characters.
    pub subject: Option<String>,
    /// `Normal`, `Urgent` or `Emergency`.
    pub importance: String,
    /// Ties conversations together; at most 250 characters.
    pub thread_id: Option<String>,
}

/// Whether the client may still make requests.
pub type Permit = Arc<dyn Fn() -> bool + Send + Sync>;

/// The client of one account; cheap to clone.
#[derive(Clone)]
pub struct UcwaClient {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub http: HttpClients,
    pub settings: SignInSettings,
    pub password: SecretString,
    pub trust: Trust,
    observer: Option<Observer>,
    poll_lease: PollLease,
    permit: Permit,
    tokens: Mutex<HashMap<Origin, Arc<OriginTokens>>>,
    refused: AtomicBool,
    /// What relative links are resolved against: the application, or where it is going to be created.
    base: Mutex<Option<Url>>,
    /// As last sent, in seconds.
    poll_timeout_s: AtomicU64,
}

impl fmt::Debug for UcwaClient {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("UcwaClient")
            .field("account", &self.inner.settings.sip_uri)
            .finish_non_exhaustive()
    }
}

impl Inner {
    pub(super) fn credentials_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    pub(super) fn remember_refused_credentials(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Makes a request and tells the observer, if there is one.
    pub(super) async fn execute(
        &self,
        call: &Call<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Reply, UcwaError> {
        self.watched(call, self.http.execute(call, authorization)).await
    }

    /// Tells the observer what came of a request.
    pub(super) async fn watched(
        &self,
        call: &Call<'_>,
        exchange: impl Future<Output = Result<Reply, UcwaError>>,
    ) -> Result<Reply, UcwaError> {
        let began = Instant::now();
        let outcome = exchange.await;
        self.observe(|| Observation::Exchange(Exchange::new(call, began.elapsed(), &outcome)));
        outcome
    }

    /// Tells the observer, if there is one.
    pub(super) fn observe(&self, observation: impl FnOnce() -> Observation) {
        if let Some(observer) = &self.observer {
            observer(observation());
        }
    }

    pub(super) fn set_base(&self, base: &Url) {
        *self.base.lock().unwrap_or_else(PoisonError::into_inner) = Some(base.clone());
    }
}

impl UcwaClient {
    /// A client that has not signed in yet. It takes a place among the parked GETs until its last clone is dropped.
    pub fn new(clients: &HttpClients, settings: SignInSettings, password: SecretString) -> Self {
        Self::with_permit(clients, settings, password, Arc::new(|| true))
    }

    /// As [`Self::new`]. `permit` is asked right before each request to a resource; once it says no, the request is not made
    /// ([`UcwaError::NotPermitted`]).
    pub fn with_permit(
        clients: &HttpClients,
        settings: SignInSettings,
        password: SecretString,
        permit: Permit,
    ) -> Self {
        Self::build(clients, settings, password, permit, None)
    }

    /// As [`Self::new`]. `observer` is told of each request and what the sign-in finds on its way.
    pub fn observed(
        clients: &HttpClients,
        settings: SignInSettings,
        password: SecretString,
        observer: Observer,
    ) -> Self {
        Self::build(clients, settings, password, Arc::new(|| true), Some(observer))
    }

    fn build(
        clients: &HttpClients,
        settings: SignInSettings,
        password: SecretString,
        permit: Permit,
        observer: Option<Observer>,
    ) -> Self {
        let inner = Inner {
            http: clients.clone(),
            trust: Trust::new(&settings),
            settings,
            password,
            observer,
            poll_lease: clients.lease_poll_client(),
            permit,
            tokens: Mutex::new(HashMap::new()),
            refused: AtomicBool::new(false),
            base: Mutex::new(None),
            poll_timeout_s: AtomicU64::new(DEFAULT_POLL_TIMEOUT.as_secs()),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Creates the application, or finds the existing one (resource `applications`, POST). Tells whether it existed
    /// (200): then conversations may be open in it.
    ///
    /// A creation in progress (409 `AlreadyExists`) is waited for, up to three times a few seconds.
    ///
    /// # Errors
    /// [`UcwaError::Status`]: 403 if policies forbid such clients, 410 `TooManyApplications`, 410 `CannotRedirect`.
    pub async fn create_application(
        &self,
        applications: &Url,
        new: &NewApplication,
    ) -> Result<(Application, bool), UcwaError> {
        let input = Input {
            properties: vec![
                ("culture", new.culture.clone()),
                ("endpointId", new.endpoint_id.clone()),
                ("userAgent", new.user_agent.clone()),
            ],
            ..Input::default()
        };
        let call = Call::post_input("applications", applications.clone(), &input);
        let mut retries = 0;
        let reply = loop {
            match self.authorized(&call).await?.success() {
                Ok(reply) => break reply,
                Err(error)
                    if error.status() == Some(409)
                        && error.subcode() == Some("AlreadyExists")
                        && retries < CREATION_RETRIES =>
                {
                    retries += 1;
                    tokio::time::sleep(Duration::from_secs_f64(2.0 + 3.0 * rand::random::<f64>())).await;
                }
                Err(error) => return Err(error),
            }
        };
        let (existed, location) = (reply.status == 200, reply.location());
        let mut resource = reply.resource()?;
        if resource.href.is_empty() {
            let what = "its own address";
            resource.href = location.ok_or(UcwaError::Incomplete { resource: "application", what })?;
        }
        Ok((self.read_application(applications, resource).await?, existed))
    }

    /// Reads the application (resource `application`, GET), and `me` and `communication` if they are only linked.
    ///
    /// # Errors
    /// [`UcwaError::Untrusted`] if sign-in did not lead to its origin; [`UcwaError::Status`] 404
    /// `ApplicationNotFound` or 410 if the server no longer knows it.
    pub async fn application(&self, href: &Url) -> Result<Application, UcwaError> {
        let resource = self.authorized(&Call::get("application", href.clone())).await?.resource()?;
        self.read_application(href, resource).await
    }

    async fn read_application(&self, requested: &Url, resource: Resource) -> Result<Application, UcwaError> {
        let mut application = Application::read(requested, resource)?;
        for part in ["me", "communication"] {
            if application.resource.embedded(part).is_some() {
                continue;
            }
            let Some(link) = application.resource.link(part) else { continue };
            let url = resolve_within(&application.href, &link.href)?;
            match self.authorized(&Call::get("application", url)).await?.resource() {
                Ok(mut read) => {
                    part.clone_into(&mut read.rel);
                    application.resource.embedded.push(read);
                }
                // Not the application is missing, but what policies or a race took out of it.
                Err(error)
                    if matches!(error.status(), Some(403 | 404))
                        && error.reason().is_some()
                        && error.subcode() != Some("ApplicationNotFound") =>
                {
                    tracing::warn!(part, %error, "a part of the application can't be read");
                }
                Err(error) => return Err(error),
            }
        }
        self.inner.set_base(&application.href);
        Ok(application)
    }

    /// Signs out (resource `application`, DELETE).
    ///
    /// # Errors
    /// Any; they may be ignored, the server expires the application by itself.
    pub async fn delete_application(&self, href: &Url) -> Result<(), UcwaError> {
        self.command(&Call { method: Method::DELETE, ..Call::get("application", href.clone()) })
            .await
            .map(drop)
    }

    /// Publishes presence, so that invitations come in (resource `makeMeAvailable`, POST). `sign_in_as` is one of
    /// `Online`, `Busy`, `DoNotDisturb`, `BeRightBack`, `Away`, `Offwork`. Being available already is a success.
    ///
    /// # Errors
    /// [`UcwaError::Status`] 403 if messaging is not allowed; also when the server answers 201 and leaves it out.
    pub async fn make_me_available(&self, href: &Url, sign_in_as: &str) -> Result<(), UcwaError> {
        let input = Input {
            properties: vec![("signInAs", sign_in_as.to_owned())],
            property_lists: vec![
                ("supportedMessageFormats", vec!["Plain".to_owned(), "Html".to_owned()]),
                ("supportedModalities", vec!["Messaging".to_owned()]),
            ],
            ..Input::default()
        };
        match self.command(&Call::post_input("makeMeAvailable", href.clone(), &input)).await {
            Ok(reply) if reply.status == 201 && queued_without_messaging(&reply.text()) => {
                Err(UcwaError::Status {
                    resource: "makeMeAvailable",
                    status: 403,
                    reason: Some(Box::new(Reason {
                        code: Some("Forbidden".to_owned()),
                        message: Some("the server accepted the sign-in without messaging".to_owned()),
                        ..Reason::default()
                    })),
                    retry_after: None,
                    challenge: false,
                    diagnostics: None,
                })
            }
            Ok(_) => Ok(()),
            Err(error) if error.status() == Some(409) && error.subcode() == Some("AlreadyExists") => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Says that the user is there (resource `reportMyActivity`, POST); wanted at least every four minutes.
    ///
    /// # Errors
    /// [`UcwaError::Status`] 409 `MakeMeAvailableRequired` if the availability was lost.
    pub async fn report_my_activity(&self, href: &Url) -> Result<(), UcwaError> {
        self.command(&Call::post("reportMyActivity", href.clone())).await.map(drop)
    }

    /// Waits for events (resource `events`, GET).
    ///
    /// `href` is the committed cursor, unchanged: its `ack` acknowledges everything before. `parameters` go into its
    /// query on the first GET, after `resume` and on a new application; the server remembers them. Every 200 is an
    /// answer, also one whose body can't be read. `on_connection` is told `true` once the GET is on a connection with its
    /// token, so that the server's silence means something, and `false` when it was answered or failed.
    ///
    /// # Errors
    /// [`UcwaError::Timeout`] after `timeout` and the margin of [`super::HttpSettings`]; [`UcwaError::Status`] 404
    /// `ApplicationNotFound` when the application is gone, 409 `PGetReplaced` when another GET took over.
    pub async fn poll_events(
        &self,
        href: &Url,
        parameters: Option<&EventParameters>,
        on_connection: &(dyn Fn(bool) + Sync),
    ) -> Result<PollAnswer, UcwaError> {
        let mut url = href.clone();
        if let Some(parameters) = parameters {
            self.inner.poll_timeout_s.store(parameters.timeout.as_secs(), Ordering::Relaxed);
            let mut pairs = vec![
                ("low", parameters.low.as_secs().to_string()),
                ("medium", parameters.medium.as_secs().to_string()),
                ("timeout", parameters.timeout.as_secs().to_string()),
            ];
            if parameters.priority > 0 {
                pairs.push(("priority", parameters.priority.to_string()));
            }
            set_query(&mut url, &pairs);
        }
        let held = Duration::from_secs(self.inner.poll_timeout_s.load(Ordering::Relaxed));
        let parked = Parked { lease: &self.inner.poll_lease, held, on_connection };
        let call = Call { parked: Some(parked), ..Call::get("events", url) };
        let reply = self.authorized(&call).await?;
        if !(200..300).contains(&reply.status) {
            return Err(reply.refusal());
        }
        let body = reply.text();
        let batch = xml::parse_events(&body);
        // A page of a proxy says nothing about events: that is a failed request, not a response to keep.
        if batch.is_err() && reply.is_html() {
            return Err(reply.not_ucwa());
        }
        Ok(PollAnswer { body, batch })
    }

    /// Reads a resource (GET).
    ///
    /// # Errors
    /// [`UcwaError::Status`] 404 if it is gone, a normal race.
    pub async fn get(&self, href: &Url) -> Result<Resource, UcwaError> {
        self.authorized(&Call::get("resource", href.clone())).await?.resource()
    }

    /// Follows a link that takes no input (POST): `accept`, `stopMessaging`, `cancel`.
    ///
    /// # Errors
    /// [`UcwaError::Status`] 404 or 410 if the operation is over.
    pub async fn post_empty(&self, href: &Url) -> Result<(), UcwaError> {
        self.command(&Call::post("operation", href.clone())).await.map(drop)
    }

    /// Declines an invitation at this endpoint only, so that the user's own client still rings (resource `decline`,
    /// POST).
    ///
    /// # Errors
    /// Like [`Self::post_empty`].
    pub async fn decline(&self, href: &Url) -> Result<(), UcwaError> {
        let input = Input { properties: vec![("reason", "Local".to_owned())], ..Input::default() };
        self.command(&Call::post_input("decline", href.clone(), &input)).await.map(drop)
    }

    /// Ends or leaves what the address stands for (DELETE).
    ///
    /// # Errors
    /// [`UcwaError::Status`] 404 if it is gone already.
    pub async fn delete(&self, href: &Url) -> Result<(), UcwaError> {
        self.command(&Call { method: Method::DELETE, ..Call::get("resource", href.clone()) }).await.map(drop)
    }

    /// Invites somebody to a conversation (resource `startMessaging`, POST). Returns the invitation's address as the
    /// server gave it; its events may come before the answer.
    ///
    /// # Errors
    /// [`UcwaError::Status`]: 403 not allowed, 404 `DestinationNotFound`, 409 `ThreadIdAlreadyExists`. If
    /// [`UcwaError::was_sent`] and there is no status, the outcome is unknown.
    pub async fn start_messaging(
        &self,
        href: &Url,
        invitation: &OutgoingInvitation,
    ) -> Result<Option<String>, UcwaError> {
        let mut properties = vec![
            ("operationId", invitation.operation_id.0.clone()),
            ("to", invitation.to.clone()),
            ("importance", invitation.importance.clone()),
        ];
        properties.extend(invitation.subject.clone().map(|subject| ("subject", subject)));
        properties.extend(invitation.thread_id.clone().map(|thread_id| ("threadId", thread_id)));
        let input =
            Input { properties, links: message_link(invitation.message.as_deref()), ..Input::default() };
        self.create("startMessaging", href, &input).await
    }

    /// Starts an online meeting that this account is in and nobody else yet (resource `startOnlineMeeting`, POST). Returns
    /// the address of the `onlineMeetingInvitation` as the server gave it; its events tell the conversation, which has no
    /// messaging before that is added.
    ///
    /// # Errors
    /// Like [`Self::start_messaging`].
    pub async fn start_online_meeting(
        &self,
        href: &Url,
        meeting: &NewMeeting,
    ) -> Result<Option<String>, UcwaError> {
        let mut properties =
            vec![("operationId", meeting.operation_id.0.clone()), ("importance", meeting.importance.clone())];
        properties.extend(meeting.subject.clone().map(|subject| ("subject", subject)));
        properties.extend(meeting.thread_id.clone().map(|thread_id| ("threadId", thread_id)));
        self.create("startOnlineMeeting", href, &Input { properties, ..Input::default() }).await
    }

    /// Opens the instant messages of a conversation that has none (resource `addMessaging`, POST). Returns the
    /// invitation's address as the server gave it.
    ///
    /// # Errors
    /// Like [`Self::start_messaging`].
    pub async fn add_messaging(
        &self,
        href: &Url,
        operation_id: &OperationId,
        message: Option<&str>,
    ) -> Result<Option<String>, UcwaError> {
        let input = Input {
            properties: vec![("operationId", operation_id.0.clone())],
            links: message_link(message),
            ..Input::default()
        };
        self.create("addMessaging", href, &input).await
    }

    /// Invites one more person to a conversation (resource `addParticipant`, POST). Returns the address of the
    /// `participantInvitation` as the server gave it.
    ///
    /// # Errors
    /// Like [`Self::start_messaging`].
    pub async fn add_participant(
        &self,
        href: &Url,
        operation_id: &OperationId,
        to: &str,
    ) -> Result<Option<String>, UcwaError> {
        let input = Input {
            properties: vec![("operationId", operation_id.0.clone()), ("to", to.to_owned())],
            ..Input::default()
        };
        self.create("addParticipant", href, &input).await
    }

    /// Says something in a connected conversation (resource `sendMessage`, POST of the bare text). `content_type` is
    /// `text/plain`, or `text/html` where it was negotiated. Returns the message's address as the server gave it.
    ///
    /// The charset is named; a server that refuses it (415) is asked once more without.
    ///
    /// # Errors
    /// [`UcwaError::Status`]: 400, 413, 415 concern the text; 404, 409, 410 the conversation. If
    /// [`UcwaError::was_sent`] and there is no status, the outcome is unknown.
    pub async fn send_message(
        &self,
        href: &Url,
        operation_id: &OperationId,
        content_type: &str,
        body: &str,
    ) -> Result<Option<String>, UcwaError> {
        let mut url = href.clone();
        set_query(&mut url, &[("operationId", operation_id.0.clone())]);
        let mut call = Call::post("sendMessage", url);
        call.body = Some((format!("{content_type}; charset=utf-8"), body.to_owned()));
        match self.command(&call).await {
            Err(error) if error.status() == Some(415) => {
                call.body = Some((content_type.to_owned(), body.to_owned()));
                self.command(&call).await.map(|reply| reply.location())
            }
            answer => answer.map(|reply| reply.location()),
        }
    }

    /// The address that a link of the application stands for.
    ///
    /// # Errors
    /// [`UcwaError::Untrusted`] for another origin than the application's, [`UcwaError::BadLink`] for no address at
    /// all, or a relative one before sign-in.
    pub fn resolve(&self, href: &str) -> Result<Url, UcwaError> {
        let base = self.inner.base.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(base) = base else {
            return Err(UcwaError::BadLink { problem: "the account is not signed in".to_owned() });
        };
        resolve_within(&base, href)
    }

    // -------------------------------------------------------------------------------------------- machinery

    async fn create(
        &self,
        resource: &'static str,
        href: &Url,
        input: &Input,
    ) -> Result<Option<String>, UcwaError> {
        self.command(&Call::post_input(resource, href.clone(), input)).await.map(|reply| reply.location())
    }

    async fn command(&self, call: &Call<'_>) -> Result<Reply, UcwaError> {
        self.authorized(call).await?.success()
    }

    /// Makes a request with its origin's token, a second time with a renewed one if the first is refused.
    pub(super) async fn authorized(&self, call: &Call<'_>) -> Result<Reply, UcwaError> {
        self.inner.trust.require(&call.url)?;
        let token = self.token_for(&call.url).await.map_err(UcwaError::before_the_request)?;
        self.require_permit(call)?;
        let reply = self.inner.execute(call, Some(&token.bearer)).await?;
        if !reply.refuses_token() {
            return Ok(reply);
        }
        // Seldom, so its memory is not part of every request's.
        let again = async {
            let renewed = self.token_after_refusal(&call.url, &token, &reply).await;
            let renewed = renewed.map_err(UcwaError::before_the_request)?;
            self.require_permit(call)?;
            self.inner.execute(call, Some(&renewed.bearer)).await
        };
        Box::pin(again).await
    }

    fn require_permit(&self, call: &Call<'_>) -> Result<(), UcwaError> {
        if (self.inner.permit)() { Ok(()) } else { Err(UcwaError::NotPermitted { resource: call.resource }) }
    }

    /// The tokens of a URL's origin.
    pub(super) fn origin_tokens(&self, url: &Url) -> Arc<OriginTokens> {
        let mut tokens = self.inner.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(tokens.entry(url.origin()).or_default())
    }
}

/// The first text of an invitation, as the link that servers take it from.
fn message_link(message: Option<&str>) -> Vec<(&'static str, String)> {
    message.map(|text| ("message", data_uri::encode_plain(text))).into_iter().collect()
}

/// Sets query parameters; those of the server stay as they are, byte for byte, except for the same names.
fn set_query(url: &mut Url, pairs: &[(&str, String)]) {
    let mut query: Vec<String> = url
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|part| {
            let name = part.split('=').next().unwrap_or_default();
            !part.is_empty() && !pairs.iter().any(|(own, _)| own.eq_ignore_ascii_case(name))
        })
        .map(str::to_owned)
        .collect();
    query.push(form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish());
    url.set_query(Some(&query.join("&")));
}

/// The answer 201 of `makeMeAvailable` lists what was accepted; what was denied is missing without a word.
fn queued_without_messaging(body: &str) -> bool {
    body.contains("operationsQueued") && !body.to_ascii_lowercase().contains("messaging")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_parameters_replace_their_namesakes_and_leave_the_rest_alone() {
        let mut url = Url::parse("https://a.test/events?ack=1&x=a%2fb+c&Timeout=5&low=1").unwrap();
        set_query(&mut url, &[("low", "15".to_owned()), ("timeout", "180".to_owned())]);
        assert_eq!(url.as_str(), "https://a.test/events?ack=1&x=a%2fb+c&low=15&timeout=180");
        let mut bare = Url::parse("https://a.test/messages").unwrap();
        set_query(&mut bare, &[("operationId", "a b".to_owned())]);
        assert_eq!(bare.as_str(), "https://a.test/messages?operationId=a+b");
    }

    #[test]
    fn a_queued_sign_in_without_messaging_is_seen() {
        assert!(queued_without_messaging("<operationsQueued><operations/></operationsQueued>"));
        assert!(!queued_without_messaging(
            "<operationsQueued><operation>Messaging</operation></operationsQueued>"
        ));
        assert!(!queued_without_messaging(""));
    }
}
