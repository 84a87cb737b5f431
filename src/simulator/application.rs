//! Accounts and their applications: creation, resumption and end; the resources `application`, `me`,
//! `communication` and `policies`.
//!
//! An [`Application`] owns everything that one client sees: its availability, its event channel and its view of
//! each conversation, all behind one lock. Locks are taken in the order conversation, account, application; what
//! needs another application's lock happens after this one is released.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hyper::{
    Method, StatusCode,
    header::{self, HeaderValue},
};
use tokio::time::Instant;

use super::{
    SimulatorSettings,
    conversation::{self, Conversation},
    conversation_log::Logs,
    event_channel::{Channel, Event, EventKind},
    leg::{Invitation, Leg},
    payload::{Failure, Input, Link, Resource},
    server::{Exchange, Outcome, Server, no_content},
};

/// One user of the simulated server.
pub(crate) struct Account {
    /// `sip:user0001@domain`, in lower case.
    pub(crate) uri: String,
    pub(crate) name: String,
    pub(crate) password: String,
    applications: Mutex<Vec<Arc<Application>>>,
    pub(crate) logs: Logs,
}

impl Account {
    fn new(address: &str, password: &str) -> Arc<Self> {
        let uri = format!("sip:{}", address.to_lowercase());
        let name = display_name(&uri);
        Arc::new(Self {
            uri,
            name,
            password: password.to_owned(),
            applications: Mutex::default(),
            logs: Logs::default(),
        })
    }

    fn applications(&self) -> MutexGuard<'_, Vec<Arc<Application>>> {
        self.applications.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn living_applications(&self) -> Vec<Arc<Application>> {
        self.applications().clone()
    }

    /// The newest application that takes instant messages.
    pub(crate) fn reachable(&self) -> Option<Arc<Application>> {
        let applications = self.applications();
        applications.iter().rev().find(|application| application.lock().takes_messages()).cloned()
    }
}

/// All accounts that the settings name.
pub(crate) fn accounts_of(settings: &SimulatorSettings) -> Vec<Arc<Account>> {
    let with_domain = |name: &str| {
        let name = name.strip_prefix("sip:").unwrap_or(name);
        if name.contains('@') { name.to_owned() } else { format!("{name}@{}", settings.domain) }
    };
    let named =
        settings.named_accounts.iter().map(|(name, password)| Account::new(&with_domain(name), password));
    let numbered = (1..=settings.accounts)
        .map(|number| Account::new(&with_domain(&format!("user{number:04}")), &settings.password));
    named.chain(numbered).collect()
}

/// A person's name as the directory has it: `sip:lene.aaling@contoso.com` is "Lene Aaling".
pub(crate) fn display_name(uri: &str) -> String {
    let address = address_of(uri);
    let local = address.split('@').next().unwrap_or_default();
    let mut name = String::new();
    let mut previous = ' ';
    for character in local.chars() {
        if matches!(character, '.' | '_' | '-') {
            name.push(' ');
            previous = ' ';
            continue;
        }
        if character.is_ascii_digit() && previous.is_alphabetic() {
            name.push(' ');
        }
        if previous == ' ' {
            name.extend(character.to_uppercase());
        } else {
            name.push(character);
        }
        previous = character;
    }
    name
}

/// The URI without its scheme.
pub(crate) fn address_of(uri: &str) -> &str {
    uri.split_once(':').map_or(uri, |(_, address)| address)
}

/// What an application id leads to.
#[derive(Clone)]
pub(crate) enum Registration {
    Alive(Arc<Application>),
    Gone(Box<Failure>),
}

/// What makes two creations the same application.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    culture: String,
    endpoint_id: String,
    kind: Option<String>,
    user_agent: String,
}

/// One client of one account.
pub(crate) struct Application {
    pub(crate) id: String,
    pub(crate) account: Arc<Account>,
    identity: Identity,
    meeting: String,
    state: Mutex<ApplicationState>,
}

/// What changes in an application.
pub(crate) struct ApplicationState {
    gone: Option<Box<Failure>>,
    /// Set by `makeMeAvailable`.
    availability: Option<String>,
    activity: Option<String>,
    note: String,
    location: String,
    modalities: Vec<String>,
    formats: Vec<String>,
    settings: Vec<(String, String)>,
    etag: String,
    random_property: String,
    /// Whether conversation logs were kept when the application was created.
    logs: bool,
    pub(crate) channel: Channel,
    pub(crate) legs: HashMap<String, Leg>,
    pub(crate) invitations: HashMap<String, Invitation>,
}

impl ApplicationState {
    fn new(server: &Server) -> Self {
        Self {
            gone: None,
            availability: None,
            activity: None,
            note: String::new(),
            location: String::new(),
            modalities: Vec::new(),
            formats: vec!["Plain".to_owned()],
            settings: Vec::new(),
            etag: new_etag(server),
            random_property: uuid_of(server),
            logs: server.now().conversation_logs,
            channel: Channel::new(),
            legs: HashMap::new(),
            invitations: HashMap::new(),
        }
    }

    /// Fails as every address of an application that has ended does.
    pub(crate) fn alive(&self) -> Result<(), Failure> {
        self.gone.as_deref().map_or(Ok(()), |failure| Err(failure.clone()))
    }

    pub(crate) fn is_available(&self) -> bool {
        self.availability.is_some()
    }

    fn takes_messages(&self) -> bool {
        self.gone.is_none() && self.is_available() && self.modalities.iter().any(|known| known == "Messaging")
    }

    pub(crate) fn reads_html(&self) -> bool {
        self.formats.iter().any(|format| format == "Html")
    }

    /// The conversation as this application sees it, if it goes on.
    pub(crate) fn leg(&self, id: &str) -> Result<&Leg, Failure> {
        self.legs.get(id).filter(|leg| !leg.ended).ok_or_else(Failure::conversation_not_found)
    }
}

/// `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx` from the seed.
pub(crate) fn uuid_of(server: &Server) -> String {
    let high = u128::from(server.dice.number());
    uuid::Uuid::from_u128(high << 64 | u128::from(server.dice.number())).to_string()
}

fn new_etag(server: &Server) -> String {
    (server.dice.number() >> 32).to_string()
}

impl Application {
    pub(crate) fn lock(&self) -> MutexGuard<'_, ApplicationState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn href(&self) -> String {
        format!("/ucwa/oauth/v1/applications/{}", self.id)
    }

    fn application_resource(&self, state: &ApplicationState) -> Resource {
        let base = self.href();
        let mut resource = Resource::new("application", &base)
            .property("culture", self.identity.culture.as_str())
            .property("userAgent", self.identity.user_agent.as_str());
        if let Some(kind) = &self.identity.kind {
            resource = resource.property("type", kind.as_str());
        }
        resource
            .link("policies", format!("{base}/policies"))
            .link("batch", format!("{base}/batch"))
            .link("events", format!("{base}/events?ack={}", state.channel.current()))
            .embed(self.me_resource(state))
            .embed(self.people_resource())
            .embed(self.online_meetings_resource())
            .embed(self.communication_resource(state))
    }

    fn me_resource(&self, state: &ApplicationState) -> Resource {
        let base = self.href();
        let address = address_of(&self.account.uri);
        let mut me = Resource::new("me", format!("{base}/me"))
            .property("name", self.account.name.as_str())
            .property("uri", self.account.uri.as_str());
        if state.is_available() {
            me = me.property("emailAddresses", vec![address.to_owned()]);
            for (rel, path) in [
                ("note", "note"),
                ("presence", "presence"),
                ("location", "location"),
                ("reportMyActivity", "reportMyActivity"),
            ] {
                me = me.link(rel, format!("{base}/me/{path}"));
            }
        } else {
            me = me.link("makeMeAvailable", format!("{base}/me/makeMeAvailable"));
        }
        me.link("callForwardingSettings", format!("{base}/me/callForwardingSettings"))
            .link("phones", format!("{base}/me/phones"))
            .link("photo", format!("{base}/photos/{address}"))
    }

    pub(crate) fn people_resource(&self) -> Resource {
        let people = format!("{}/people", self.href());
        let mut resource = Resource::new("people", &people);
        for (rel, path) in [
            ("presenceSubscriptions", "presenceSubscriptions"),
            ("subscribedContacts", "subscribedContacts"),
            ("presenceSubscriptionMemberships", "presenceSubscriptionMemberships"),
            ("myGroups", "groups"),
            ("myGroupMemberships", "groupMemberships"),
            ("myContacts", "contacts"),
            ("myPrivacyRelationships", "privacyRelationships"),
            ("myContactsAndGroupsSubscription", "contactsAndGroupsSubscription"),
            ("search", "search"),
        ] {
            resource = resource.link(rel, format!("{people}/{path}"));
        }
        resource
    }

    pub(crate) fn online_meetings_resource(&self) -> Resource {
        let meetings = format!("{}/onlineMeetings", self.href());
        let mut resource = Resource::new("onlineMeetings", &meetings);
        for (rel, path) in [
            ("myOnlineMeetings", "myOnlineMeetings"),
            ("onlineMeetingDefaultValues", "defaultValues"),
            ("onlineMeetingEligibleValues", "eligibleValues"),
            ("onlineMeetingInvitationCustomization", "customInvitation"),
            ("onlineMeetingPolicies", "policies"),
            ("phoneDialInInformation", "phoneDialInInformation"),
        ] {
            resource = resource.link(rel, format!("{meetings}/{path}"));
        }
        resource.link("myAssignedOnlineMeeting", format!("{meetings}/myOnlineMeetings/{}", self.meeting))
    }

    fn communication_resource(&self, state: &ApplicationState) -> Resource {
        let communication = format!("{}/communication", self.href());
        let mut resource = Resource::new("communication", &communication)
            .property(state.random_property.clone(), "please pass this in a PUT request");
        for (name, value) in &state.settings {
            resource = resource.property(name.clone(), value.as_str());
        }
        resource
            .property("supportedModalities", state.modalities.clone())
            .property("supportedMessageFormats", state.formats.clone())
            .links(
                state
                    .logs
                    .then(|| Link::new("conversationLogs", format!("{communication}/conversationLogs"))),
            )
            .links(state.logs.then(|| Link::new("missedItems", format!("{communication}/missedItems"))))
            .link("conversations", format!("{communication}/conversations?filter=active"))
            .link("startMessaging", format!("{communication}/messagingInvitations"))
            .link(
                "startOnlineMeeting",
                format!("{communication}/onlineMeetingInvitations?onlineMeetingUri=adhoc"),
            )
            .link("joinOnlineMeeting", format!("{communication}/onlineMeetingInvitations"))
            .etag(state.etag.as_str())
    }

    /// The sender of events about conversations and invitations.
    pub(crate) fn communication_sender(&self) -> Link {
        Link::new("communication", format!("{}/communication", self.href()))
    }

    fn push_me(&self, state: &mut ApplicationState, kind: EventKind, rel: &'static str) {
        let me = format!("{}/me", self.href());
        let href = if rel == "me" { me.clone() } else { format!("{me}/{rel}") };
        state.channel.push(Event::new(Link::new("me", me), kind, Link::new(rel, href)).medium());
    }

    fn push_communication(&self, state: &mut ApplicationState) {
        let sender = self.communication_sender();
        let event = Event::new(sender.clone(), EventKind::Updated, sender);
        let event = event.resource(self.communication_resource(state)).medium();
        state.channel.push(event);
    }
}

/// POST on `applications`.
pub(crate) fn create(server: &Arc<Server>, account: &Arc<Account>, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::POST)?;
    let input = Input::read(&exchange.headers, &exchange.body)?;
    let identity = Identity {
        culture: input.required("culture", 100)?.to_owned(),
        endpoint_id: input.required("endpointId", 100)?.to_owned(),
        kind: input.optional("type", 100)?.map(str::to_owned),
        user_agent: input.required("userAgent", 100)?.to_owned(),
    };
    input.optional("instanceId", 100)?;
    let mut applications = account.applications();
    let existing = applications.iter().find(|application| application.identity == identity).cloned();
    if let Some(application) = existing {
        let mut state = application.lock();
        state.channel.last_seen = Instant::now();
        let resource = application.application_resource(&state);
        return Ok(exchange.resource(StatusCode::OK, &resource));
    }
    let application = Arc::new(Application {
        id: format!("10{:010}", server.dice.number() % 10_000_000_000),
        account: Arc::clone(account),
        identity,
        meeting: server.dice.hex()[..8].to_uppercase(),
        state: Mutex::new(ApplicationState::new(server)),
    });
    applications.push(Arc::clone(&application));
    let surplus =
        (applications.len() > server.settings.applications_per_account).then(|| applications.remove(0));
    drop(applications);
    let registration = Registration::Alive(Arc::clone(&application));
    let mut registrations = server.applications.write().unwrap_or_else(PoisonError::into_inner);
    registrations.insert(application.id.clone(), registration);
    drop(registrations);
    if let Some(oldest) = surplus {
        let failure = Failure::new(StatusCode::GONE, "TooManyApplications", "Too many applications.");
        end(server, &oldest, failure);
    }
    let mut answer =
        exchange.resource(StatusCode::CREATED, &application.application_resource(&application.lock()));
    let headers = answer.headers_mut();
    if let Ok(etag) = HeaderValue::from_str(&format!("\"{}\"", new_etag(server))) {
        headers.insert(header::ETAG, etag);
    }
    let cookie = format!("cwt_ucwa=AAEB{}; path={}/photos; HttpOnly", server.dice.hex(), application.href());
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        headers.insert(header::SET_COOKIE, cookie);
    }
    Ok(answer)
}

/// Ends an application: from now on each of its addresses answers `failure`.
///
/// What it had not acknowledged is lost for it, and it leaves its conversations.
pub(crate) fn end(server: &Arc<Server>, application: &Arc<Application>, failure: Failure) {
    application.account.applications().retain(|known| !Arc::ptr_eq(known, application));
    let mut registrations = server.applications.write().unwrap_or_else(PoisonError::into_inner);
    registrations.insert(application.id.clone(), Registration::Gone(Box::new(failure.clone())));
    drop(registrations);
    let (deliveries, conversations): (Vec<_>, Vec<Arc<Conversation>>) = {
        let mut state = application.lock();
        if state.gone.is_some() {
            return;
        }
        state.gone = Some(Box::new(failure));
        state.invitations.clear();
        let legs = state.legs.drain().filter(|(_, leg)| !leg.ended);
        let conversations = legs.map(|(_, leg)| leg.conversation).collect();
        (state.channel.abandon(), conversations)
    };
    for delivery in deliveries {
        server.ledger.expire(delivery.serial);
        if let Some(receipt) = delivery.receipt {
            receipt.settle(server, false);
        }
    }
    for conversation in conversations {
        conversation::application_left(server, &conversation, application);
    }
}

/// Ends every application whose client has not been seen for too long, again and again.
pub(crate) fn sweep(server: &Arc<Server>) {
    let limit = server.now().application_expiry;
    let living: Vec<Arc<Application>> = {
        let registrations = server.applications.read().unwrap_or_else(PoisonError::into_inner);
        let living = registrations.values().filter_map(|registration| match registration {
            Registration::Alive(application) => Some(Arc::clone(application)),
            Registration::Gone(_) => None,
        });
        living.collect()
    };
    for application in living {
        let idle = {
            let state = application.lock();
            !state.channel.is_parked() && state.channel.last_seen.elapsed() > limit
        };
        if idle {
            end(server, &application, Failure::application_not_found());
        }
    }
    // Often enough for a limit that was lowered meanwhile.
    let pause = (limit / 4).clamp(Duration::from_millis(20), Duration::from_millis(500));
    server.timers.after(pause, sweep);
}

/// GET and DELETE on the application.
pub(crate) fn resource(server: &Arc<Server>, application: &Arc<Application>, exchange: &Exchange) -> Outcome {
    match exchange.method {
        Method::GET => {
            let state = application.lock();
            Ok(exchange.resource(StatusCode::OK, &application.application_resource(&state)))
        }
        Method::DELETE => {
            end(server, application, Failure::application_not_found());
            Ok(no_content())
        }
        _ => Err(Failure::method_not_allowed("GET, DELETE")),
    }
}

pub(crate) fn policies(application: &Application, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::GET)?;
    let mut policies = Resource::new("policies", format!("{}/policies", application.href()));
    for (name, value) in [
        ("callLogArchiving", "Disabled"),
        ("emoticons", "Enabled"),
        ("exchangeUnifiedMessaging", "Disabled"),
        ("htmlMessaging", "Enabled"),
        ("logging", "Enabled"),
        ("loggingLevel", "Light"),
        ("messageArchiving", "Disabled"),
        ("messagingUrls", "Enabled"),
        ("photos", "Disabled"),
        ("saveMessagingHistory", "Disabled"),
        ("telephonyMode", "None"),
    ] {
        policies = policies.property(name, value);
    }
    Ok(exchange.resource(StatusCode::OK, &policies))
}

const AVAILABILITIES: [&str; 6] = ["Online", "Busy", "DoNotDisturb", "BeRightBack", "Away", "Offwork"];

/// `me` and what is below it.
pub(crate) fn me(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    path: &[&str],
) -> Outcome {
    let base = format!("{}/me", application.href());
    match path {
        [] => {
            exchange.only(&Method::GET)?;
            Ok(exchange.resource(StatusCode::OK, &application.me_resource(&application.lock())))
        }
        ["makeMeAvailable"] => make_me_available(server, application, exchange),
        ["reportMyActivity"] => {
            exchange.only(&Method::POST)?;
            require_availability(&application.lock())?;
            Ok(no_content())
        }
        ["presence"] => {
            let mut state = application.lock();
            require_availability(&state)?;
            match exchange.method {
                Method::GET => {
                    let availability = state.availability.clone().unwrap_or_default();
                    let activity = state.activity.clone().unwrap_or_else(|| availability.clone());
                    let presence = Resource::new("presence", format!("{base}/presence"))
                        .property("activity", activity)
                        .property("availability", availability);
                    Ok(exchange.resource(StatusCode::OK, &presence))
                }
                Method::POST => {
                    let input = Input::read(&exchange.headers, &exchange.body)?;
                    let availability = input.required("availability", 100)?;
                    state.availability = Some(availability_named(availability)?.to_owned());
                    state.activity = input.optional("activity", 100)?.map(str::to_owned);
                    application.push_me(&mut state, EventKind::Updated, "presence");
                    Ok(no_content())
                }
                _ => Err(Failure::method_not_allowed("GET, POST")),
            }
        }
        ["note"] => {
            let mut state = application.lock();
            require_availability(&state)?;
            match exchange.method {
                Method::GET => {
                    let note = Resource::new("note", format!("{base}/note"))
                        .property("message", state.note.as_str())
                        .property("type", "Personal");
                    Ok(exchange.resource(StatusCode::OK, &note))
                }
                Method::POST => {
                    let input = Input::read(&exchange.headers, &exchange.body)?;
                    input.text("message").unwrap_or_default().clone_into(&mut state.note);
                    application.push_me(&mut state, EventKind::Updated, "note");
                    Ok(no_content())
                }
                _ => Err(Failure::method_not_allowed("GET, POST")),
            }
        }
        ["location"] => {
            let mut state = application.lock();
            require_availability(&state)?;
            match exchange.method {
                Method::GET => {
                    let location = Resource::new("location", format!("{base}/location"))
                        .property("location", state.location.as_str());
                    Ok(exchange.resource(StatusCode::OK, &location))
                }
                Method::POST => {
                    let input = Input::read(&exchange.headers, &exchange.body)?;
                    input.text("location").unwrap_or_default().clone_into(&mut state.location);
                    application.push_me(&mut state, EventKind::Updated, "location");
                    Ok(no_content())
                }
                _ => Err(Failure::method_not_allowed("GET, POST")),
            }
        }
        ["phones"] => {
            exchange.only(&Method::GET)?;
            Ok(exchange.resource(StatusCode::OK, &Resource::new("phones", format!("{base}/phones"))))
        }
        ["callForwardingSettings"] => {
            exchange.only(&Method::GET)?;
            let settings = Resource::new("callForwardingSettings", format!("{base}/callForwardingSettings"))
                .property("activePeriod", "Always")
                .property("activeSetting", "None");
            Ok(exchange.resource(StatusCode::OK, &settings))
        }
        _ => Err(Failure::not_found()),
    }
}

fn require_availability(state: &ApplicationState) -> Result<(), Failure> {
    if state.is_available() {
        Ok(())
    } else {
        Err(Failure::conflict("MakeMeAvailableRequired", "makeMeAvailable is required first."))
    }
}

fn availability_named(text: &str) -> Result<&'static str, Failure> {
    let known = AVAILABILITIES.into_iter().find(|name| name.eq_ignore_ascii_case(text));
    known.ok_or_else(|| Failure::parameter("availability", "The value is not an availability."))
}

fn message_formats(items: &[String]) -> Result<Vec<String>, Failure> {
    let mut formats = Vec::new();
    for item in items {
        let known = ["Plain", "Html"].into_iter().find(|name| name.eq_ignore_ascii_case(item));
        let known = known.ok_or_else(|| {
            Failure::parameter("supportedMessageFormats", "The value is not a message format.")
        })?;
        formats.push(known.to_owned());
    }
    if formats.is_empty() {
        formats.push("Plain".to_owned());
    }
    Ok(formats)
}

fn modalities(items: &[String]) -> Result<Vec<String>, Failure> {
    let mut modalities = Vec::new();
    for item in items {
        let known = [
            "Messaging",
            "PhoneAudio",
            "Audio",
            "Video",
            "AudioVideo",
            "ApplicationSharing",
            "PanoramicVideo",
        ]
        .into_iter()
        .find(|name| name.eq_ignore_ascii_case(item));
        match known {
            Some(known @ ("Messaging" | "PhoneAudio")) => modalities.push(known.to_owned()),
            Some(_) => {
                let message = "The modality is not allowed for this application.";
                return Err(Failure::new(StatusCode::FORBIDDEN, "None", message));
            }
            None => return Err(Failure::parameter("supportedModalities", "The value is not a modality.")),
        }
    }
    Ok(modalities)
}

fn make_me_available(server: &Arc<Server>, application: &Arc<Application>, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::POST)?;
    let input = Input::read(&exchange.headers, &exchange.body)?;
    let mut state = application.lock();
    state.alive()?;
    if state.is_available() {
        let message = "The requested resource already exists. Please wait and try again.";
        return Err(Failure::conflict("AlreadyExists", message));
    }
    let sign_in_as = availability_named(input.text("signInAs").unwrap_or("Online"))?;
    let formats = message_formats(input.list("supportedMessageFormats").unwrap_or_default())?;
    let modalities = modalities(input.list("supportedModalities").unwrap_or_default())?;
    state.availability = Some(sign_in_as.to_owned());
    state.formats = formats;
    state.modalities = modalities;
    state.etag = new_etag(server);
    application.push_me(&mut state, EventKind::Updated, "me");
    for rel in ["presence", "note", "location"] {
        application.push_me(&mut state, EventKind::Added, rel);
    }
    application.push_communication(&mut state);
    Ok(no_content())
}

/// GET and PUT on `communication`.
pub(crate) fn communication(server: &Server, application: &Application, exchange: &Exchange) -> Outcome {
    let mut state = application.lock();
    let etag = format!("\"{}\"", state.etag);
    let given = |name: header::HeaderName| exchange.headers.get(name).and_then(|value| value.to_str().ok());
    match exchange.method {
        Method::GET => {
            let mut answer = if given(header::IF_NONE_MATCH) == Some(etag.as_str()) {
                let mut answer = no_content();
                *answer.status_mut() = StatusCode::NOT_MODIFIED;
                answer
            } else {
                exchange.resource(StatusCode::OK, &application.communication_resource(&state))
            };
            if let Ok(value) = HeaderValue::from_str(&etag) {
                answer.headers_mut().insert(header::ETAG, value);
            }
            Ok(answer)
        }
        Method::PUT => {
            let Some(expected) = given(header::IF_MATCH) else {
                let status = StatusCode::PRECONDITION_REQUIRED;
                return Err(Failure::new(status, "None", "If-Match is required."));
            };
            if expected != etag && expected != "*" {
                let message = "The resource has changed meanwhile.";
                return Err(Failure::new(StatusCode::PRECONDITION_FAILED, "None", message));
            }
            let input = Input::read(&exchange.headers, &exchange.body)?;
            if !input.has(&state.random_property) {
                return Err(Failure::parameter(
                    "communication",
                    "A property is missing; send back every one.",
                ));
            }
            let formats = input.list("supportedMessageFormats").map(message_formats).transpose()?;
            let modalities = input.list("supportedModalities").map(modalities).transpose()?;
            for name in ["audioPreference", "conversationHistory", "phoneNumber", "publishEndpointLocation"] {
                if let Some(value) = input.text(name) {
                    state.settings.retain(|(known, _)| known != name);
                    state.settings.push((name.to_owned(), value.to_owned()));
                }
            }
            state.formats = formats.unwrap_or_else(|| state.formats.clone());
            state.modalities = modalities.unwrap_or_else(|| state.modalities.clone());
            state.etag = new_etag(server);
            application.push_communication(&mut state);
            Ok(no_content())
        }
        _ => Err(Failure::method_not_allowed("GET, PUT")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_addresses() {
        assert_eq!(display_name("sip:user0001@contoso.com"), "User 0001");
        assert_eq!(display_name("sip:lene.aaling@contoso.com"), "Lene Aaling");
        assert_eq!(display_name("alice"), "Alice");
    }
}
