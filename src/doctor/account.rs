//! Signs an account in as the server would, step by step, and leaves nothing behind.
//!
//! An account may be signed in at several endpoints at once, and a further one disturbs nobody, with two exceptions: a
//! server that has too many applications of one user ends the oldest of them, and an endpoint that is available may be
//! called. So the application that a relay has already is only read, if it is there and available: it proves the same.
//! Otherwise the doctor makes one of its own, makes it available for the moment in which it reads its links, and deletes
//! it. Its endpoint id is this node's and the account's, always the same and never the relay's: what an interrupted
//! check left behind is found and deleted by the next one, or expires by itself.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::{Answer, Outcome, Step, Subject, local};
use crate::{
    account::{gate::SignInGate, sign_in::method_of},
    config::Config,
    secrets,
    store::{ClockReading, SharedStore},
    ucwa::{
        Application, CertificateLog, Exchange, HttpClients, HttpSettings, NewApplication, Observation,
        ShownCertificate, SignInSettings, SignInStep, UcwaClient, UcwaError, Url,
    },
};

/// A certificate that ends sooner is told of.
const DAYS_AHEAD: i64 = 21;

/// What a name server may take.
const NAMES_WITHIN: Duration = Duration::from_secs(10);

/// Everything about one account, in order.
pub(super) async fn look(
    config: &Config,
    http: &HttpSettings,
    store: Option<&SharedStore>,
    gate: &SignInGate,
    subject: Subject,
) -> Vec<Step> {
    let mut look = Look { config, store, subject, steps: Vec::new() };
    let _turn = gate.enter().await;
    // Each part says what it found; the next one needs it.
    if let Some(client) = look.client(http).await {
        look.names().await;
        if let Some(applications) = look.sign_in(&client).await {
            look.application(&client.client, &applications).await;
        }
    }
    look.steps
}

struct Look<'a> {
    config: &'a Config,
    store: Option<&'a SharedStore>,
    subject: Subject,
    steps: Vec<Step>,
}

/// A client, and what it tells.
struct Watched {
    client: UcwaClient,
    observed: Arc<Mutex<Vec<(Timestamp, Observation)>>>,
    certificates: CertificateLog,
}

impl Look<'_> {
    fn say(&mut self, step: Step) {
        self.steps.push(Step { account: Some(self.subject.sip_uri.to_string()), ..step });
    }

    /// The password, and a client that has it.
    async fn client(&mut self, http: &HttpSettings) -> Option<Watched> {
        let began = Instant::now();
        let subject = self.subject.clone();
        let method = match method_of(&subject.sip_uri, subject.auth) {
            Ok(method) => method,
            Err(failure) => {
                let found = failure.sentence();
                self.say(Step::new("password", Outcome::Failed, began.elapsed(), found));
                return None;
            }
        };
        let key_file = self.config.key_file();
        let (uri, source) = (subject.sip_uri.clone(), subject.secret.clone());
        let resolved = tokio::task::spawn_blocking(move || secrets::resolve(&uri, &source, &key_file)).await;
        let password = match resolved {
            Ok(Ok(password)) => password,
            Ok(Err(error)) => {
                let found = crate::error_chain(&error);
                self.say(Step::new("password", Outcome::Failed, began.elapsed(), found));
                return None;
            }
            Err(_) => {
                let found = "reading it was interrupted";
                self.say(Step::new("password", Outcome::Failed, began.elapsed(), found));
                return None;
            }
        };
        let found = format!("there is one; {} signs in by {}", subject.username, subject.auth.as_str());
        self.say(Step::new("password", Outcome::Ok, began.elapsed(), found));
        let certificates = CertificateLog::default();
        let clients = match HttpClients::recording(http, &certificates) {
            Ok(clients) => clients,
            Err(error) => {
                self.say(failed("connection", began.elapsed(), &error));
                return None;
            }
        };
        let observed = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&observed);
        let settings = SignInSettings {
            sip_uri: subject.sip_uri,
            username: subject.username,
            method,
            discovery_url: self.config.server.discovery_url.clone(),
            trusted_domains: self.config.server.trusted_domains.clone(),
            allow_http: self.config.server.allow_http,
        };
        let note = move |observation| {
            notes.lock().unwrap_or_else(PoisonError::into_inner).push((Timestamp::now(), observation));
        };
        let client = UcwaClient::observed(&clients, settings, password, Arc::new(note));
        Some(Watched { client, observed, certificates })
    }

    /// Where the names lead at which discovery begins.
    async fn names(&mut self) {
        let hosts = match &self.config.server.discovery_url {
            Some(url) => vec![url.host_str().unwrap_or_default().to_owned()],
            None => ["lyncdiscoverinternal", "lyncdiscover"]
                .map(|name| format!("{name}.{}", self.subject.sip_uri.domain()))
                .to_vec(),
        };
        let mut steps = Vec::new();
        for host in hosts {
            let host = host.trim_matches(['[', ']']).to_owned();
            if host.parse::<IpAddr>().is_ok() {
                continue;
            }
            let began = Instant::now();
            let asking = tokio::time::timeout(NAMES_WITHIN, tokio::net::lookup_host((host.as_str(), 443)));
            let answer = asking.await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
            let (outcome, found) = match answer {
                Ok(addresses) => {
                    let mut addresses: Vec<String> =
                        addresses.map(|address| address.ip().to_string()).collect();
                    addresses.dedup();
                    (Outcome::Ok, format!("{host} is {}", addresses.join(", ")))
                }
                Err(error) => (Outcome::Warning, format!("{host} has no address: {error}")),
            };
            steps.push(Step::new("name", outcome, began.elapsed(), found));
        }
        // Inside one name is known, outside the other: one is enough.
        let any = steps.iter().any(|step| step.outcome == Outcome::Ok);
        for mut step in steps {
            if step.outcome == Outcome::Warning {
                step.outcome = if any { Outcome::Ok } else { Outcome::Warning };
                if !any {
                    step = step.advise(
                        "let DNS know lyncdiscover or lyncdiscoverinternal of the SIP domain, or set \
                         server.discovery_url; behind a proxy only the proxy has to know them",
                    );
                }
            }
            self.say(step);
        }
    }

    /// Discovery, challenge and token. Gives where applications are created.
    async fn sign_in(&mut self, watched: &Watched) -> Option<Url> {
        let reached = Mutex::new(SignInStep::Discovery);
        let progress = |step| *reached.lock().unwrap_or_else(PoisonError::into_inner) = step;
        let began = Instant::now();
        let signed_in = watched.client.sign_in(&progress).await;
        let took = began.elapsed();
        let reached = *reached.lock().unwrap_or_else(PoisonError::into_inner);
        self.tell(watched, signed_in.as_ref().err().map(|error| (reached, took, error)));
        signed_in.ok().map(|signed_in| signed_in.applications)
    }

    /// What was observed, as steps, and the failure that ended it, if one did.
    fn tell(&mut self, watched: &Watched, failure: Option<(SignInStep, Duration, &UcwaError)>) {
        let observed = std::mem::take(&mut *watched.observed.lock().unwrap_or_else(PoisonError::into_inner));
        let certificates = watched.certificates.shown();
        let found_user = observed.iter().any(|(_, observation)| {
            matches!(observation, Observation::Exchange(exchange) if exchange.resource == "user")
        });
        let mut clock: Option<ClockReading> = None;
        let mut last = Duration::ZERO;
        let mut answer = None;
        let mut certificates_told = Vec::new();
        for (at, observation) in &observed {
            match observation {
                Observation::Exchange(exchange) => {
                    last = exchange.took;
                    answer = Some(answer_in(exchange));
                    let reading = exchange.date.and_then(|date| server_clock(*at, exchange.took, date));
                    clock = match (clock, reading) {
                        (Some(known), Some(new)) if new.uncertainty < known.uncertainty => Some(new),
                        (None, new) => new,
                        (known, _) => known,
                    };
                    if exchange.resource == "autodiscover" {
                        let step = self.discovery_step(exchange, found_user);
                        self.say(step);
                    }
                    for certificate in &certificates {
                        if exchange.address.contains(&certificate.server)
                            && !certificates_told.contains(certificate)
                        {
                            certificates_told.push(certificate.clone());
                            self.say(certificate_step(certificate, Timestamp::now()));
                        }
                    }
                    if exchange.resource == "user" && exchange.status == Some(200) {
                        let found = format!("GET {} answered 200", exchange.address);
                        self.say(answered("user", exchange, Outcome::Ok, found));
                    }
                }
                Observation::Challenge { from, service, grants } => {
                    let grants = grants
                        .as_ref()
                        .map_or_else(|| "none that it names".to_owned(), |grants| grants.join(", "));
                    let found =
                        format!("{from} wants a token of {service}, which takes the grants: {grants}");
                    self.say(Step::new("challenge", Outcome::Ok, last, found));
                }
                Observation::Token { host, grant, lifetime } => {
                    let found = format!(
                        "issued for {host} by the grant {grant}, for {} min",
                        lifetime.as_secs() / 60
                    );
                    self.say(Step::new("token", Outcome::Ok, last, found));
                }
            }
        }
        for certificate in certificates.iter().filter(|shown| !certificates_told.contains(shown)) {
            self.say(certificate_step(certificate, Timestamp::now()));
        }
        if let Some(reading) = clock {
            self.say(local::clock_of("the server's", reading));
        }
        if let Some((reached, took, error)) = failure {
            let step = match reached {
                SignInStep::Discovery => "discovery",
                SignInStep::Challenge => "challenge",
                SignInStep::Token => "token",
                SignInStep::User => "user",
                SignInStep::Application => "application",
            };
            let mut step = failed(step, if observed.len() > 1 { last } else { took }, error);
            // What the server said of a sign-in that it refuses is not part of the error.
            step.answer = step.answer.or_else(|| answer.filter(|_| reached != SignInStep::Discovery));
            self.say(step);
        }
    }

    /// One address of discovery. `found_user`: some address led to the server, and that is enough.
    fn discovery_step(&self, exchange: &Exchange, found_user: bool) -> Step {
        let Exchange { method, address, status, problem, .. } = exchange;
        let why = self.why_trusted(address);
        match (status, problem) {
            (Some(status), None) => {
                let found = format!("{method} {address} ({why}) answered {status}");
                answered("discovery", exchange, Outcome::Ok, found)
            }
            (_, problem) => {
                let words = problem.as_ref().map(|problem| crate::error_chain(problem)).unwrap_or_default();
                let found = format!("{method} {address} ({why}): {words}");
                let (outcome, found) = if found_user {
                    (Outcome::Ok, format!("{found}; another address answered, which is enough"))
                } else {
                    (Outcome::Failed, found)
                };
                answered("discovery", exchange, outcome, found)
            }
        }
    }

    /// Why requests go to this address at all.
    fn why_trusted(&self, address: &str) -> &'static str {
        let Ok(url) = Url::parse(address) else { return "not an address" };
        let server = &self.config.server;
        if server.discovery_url.as_ref().is_some_and(|configured| configured.origin() == url.origin()) {
            return "as server.discovery_url says";
        }
        let domain = self.subject.sip_uri.domain().to_lowercase();
        let host = url.host_str().unwrap_or_default();
        let below =
            host == domain || host.strip_suffix(domain.as_str()).is_some_and(|front| front.ends_with('.'));
        if below { "trusted: of the SIP domain" } else { "trusted: in server.trusted_domains" }
    }

    /// The application that the relay has, or one of our own.
    async fn application(&mut self, client: &UcwaClient, applications: &Url) {
        if let Some(application) = self.application_of_the_relay(client).await {
            self.capabilities(client, &application).await;
            return;
        }
        let new = NewApplication {
            culture: self.config.relay.culture.clone(),
            endpoint_id: endpoint_id(&self.config.cluster.node_id, self.subject.sip_uri.as_str()),
            user_agent: concat!("ucwa-relay/", env!("CARGO_PKG_VERSION"), " check").to_owned(),
        };
        let began = Instant::now();
        let application = match client.create_application(applications, &new).await {
            Ok((application, existed)) => {
                let found = format!(
                    "POST {} answered {}",
                    without_query(applications),
                    if existed { "200: what an earlier check left behind" } else { "201" }
                );
                self.say(Step::new("application", Outcome::Ok, began.elapsed(), found));
                application
            }
            Err(error) => {
                self.say(failed("application", began.elapsed(), &error));
                return;
            }
        };
        let application = self.make_available(client, application).await;
        self.capabilities(client, &application).await;
        let began = Instant::now();
        match client.delete_application(&application.href).await {
            Ok(()) => {
                let found = "the doctor's application is deleted";
                self.say(Step::new("sign-out", Outcome::Ok, began.elapsed(), found));
            }
            Err(error) => {
                let mut step = failed("sign-out", began.elapsed(), &error);
                step.outcome = Outcome::Warning;
                self.say(step.advise(
                    "nothing: the server lets the doctor's application expire within minutes, and the next check takes \
                     it up",
                ));
            }
        }
    }

    /// The application that a relay on this database has open, if the server knows it and it is available: then there
    /// is nothing to try.
    async fn application_of_the_relay(&mut self, client: &UcwaClient) -> Option<Application> {
        let (store, id) = (self.store?, self.subject.id?);
        let began = Instant::now();
        let session = match store.open_session(id).await {
            Ok(session) => session?,
            Err(error) => {
                let found =
                    format!("whether the relay has one can't be read: {}", crate::error_chain(&error));
                self.say(Step::new("application", Outcome::Warning, began.elapsed(), found));
                return None;
            }
        };
        let href = Url::parse(&session.application_href).ok()?;
        let began = Instant::now();
        match client.application(&href).await {
            Ok(application) if application.make_me_available().is_none() => {
                let found =
                    "the relay's own answered 200 and is available; it was read, and no other one was made";
                self.say(Step::new("application", Outcome::Ok, began.elapsed(), found));
                Some(application)
            }
            Ok(_) => {
                let found = "the relay's own answered 200 and is not available; another one is tried";
                self.say(Step::new("application", Outcome::Ok, began.elapsed(), found));
                None
            }
            Err(error) => {
                let found = format!("the relay's own is gone, another one is tried: {error}");
                self.say(Step::new("application", Outcome::Ok, began.elapsed(), found));
                None
            }
        }
    }

    /// Publishes presence as the server does, and reads the links that this brings.
    async fn make_available(&mut self, client: &UcwaClient, application: Application) -> Application {
        let Some(link) = application.make_me_available() else {
            let found = "the server does not offer it: the application is available already, or may not be";
            self.say(Step::new("availability", Outcome::Ok, Duration::ZERO, found));
            return application;
        };
        let began = Instant::now();
        let presence = self.config.relay.presence.as_str();
        if let Err(error) = client.make_me_available(&link, presence).await {
            self.say(failed("availability", began.elapsed(), &error));
            return application;
        }
        let found = format!("makeMeAvailable as {presence} was accepted");
        self.say(Step::new("availability", Outcome::Ok, began.elapsed(), found));
        let began = Instant::now();
        match client.application(&application.href).await {
            Ok(read) => read,
            Err(error) => {
                self.say(failed("application", began.elapsed(), &error));
                application
            }
        }
    }

    /// What the account may do, by the links that are there, and by its policies.
    async fn capabilities(&mut self, client: &UcwaClient, application: &Application) {
        let links = [
            ("startMessaging", application.start_messaging().is_some()),
            ("conversations", application.conversations().is_some()),
            ("reportMyActivity", application.report_my_activity().is_some()),
            ("events", application.events.is_some()),
            ("conversationLogs", application.conversation_logs().is_some()),
            (
                "search",
                application.resource.embedded("people").is_some_and(|people| people.link("search").is_some()),
            ),
        ];
        let named = |there: bool| -> Vec<&str> {
            links.iter().filter(|(_, is_there)| *is_there == there).map(|(name, _)| *name).collect()
        };
        let (there, missing) = (named(true), named(false));
        let mut found = format!("there are {}", there.join(", "));
        if !missing.is_empty() {
            found.push_str("; missing: ");
            found.push_str(&missing.join(", "));
        }
        let lacks = |name: &str| missing.contains(&name);
        let step = |outcome| Step::new("links", outcome, Duration::ZERO, found.clone());
        self.say(if ["startMessaging", "conversations", "events"].into_iter().any(lacks) {
            step(Outcome::Failed).advise(
                "policies of the server keep this user from instant messages: look at the user's client and conferencing \
                 policies",
            )
        } else if lacks("reportMyActivity") {
            step(Outcome::Warning)
                .advise("the application is not available: the server may end it, and nobody can call the account")
        } else if lacks("conversationLogs") {
            step(Outcome::Warning).advise(
                "the server keeps no conversation logs for this user, so what is said while the relay is not signed in \
                 can't be read later: give the user an Exchange mailbox that the server can reach",
            )
        } else {
            step(Outcome::Ok)
        });
        let Some(link) = application.resource.link("policies") else { return };
        let began = Instant::now();
        let read = match client.resolve(&link.href) {
            Ok(url) => client.get(&url).await,
            Err(error) => Err(error),
        };
        match read {
            Ok(policies) => {
                const TOLD: [&str; 5] = [
                    "htmlMessaging",
                    "messagingUrls",
                    "saveMessagingHistory",
                    "conversationHistory",
                    "messageArchiving",
                ];
                let told: Vec<String> = TOLD
                    .iter()
                    .filter_map(|name| Some(format!("{name} {}", short(policies.property(name)?))))
                    .collect();
                self.say(Step::new("policies", Outcome::Ok, began.elapsed(), told.join(", ")));
            }
            Err(error) => {
                let mut step = failed("policies", began.elapsed(), &error);
                step.outcome = Outcome::Warning;
                self.say(step);
            }
        }
    }
}

/// The doctor's endpoint id for an account on this node, in the form of a UUID.
fn endpoint_id(node: &str, sip_uri: &str) -> String {
    let mut hash = Sha256::new();
    for part in ["ucwa-relay check", node, sip_uri] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

/// The server's clock by an answer's header `Date`, which is cut to whole seconds.
fn server_clock(answered: Timestamp, took: Duration, date: Timestamp) -> Option<ClockReading> {
    const HALF_A_SECOND: Duration = Duration::from_millis(500);
    let reading =
        ClockReading::new(answered.checked_sub(took).ok()?, date.checked_add(HALF_A_SECOND).ok()?, answered);
    Some(ClockReading { uncertainty: reading.uncertainty + HALF_A_SECOND, ..reading })
}

fn without_query(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_query(None);
    shown.into()
}

/// A server's word, cut.
fn short(word: &str) -> String {
    word.chars().filter(|c| !c.is_control()).take(40).collect()
}

fn answered(step: &'static str, exchange: &Exchange, outcome: Outcome, found: String) -> Step {
    Step { answer: Some(answer_in(exchange)), ..Step::new(step, outcome, exchange.took, found) }
}

fn answer_in(exchange: &Exchange) -> Answer {
    let answer = exchange.problem.as_ref().map(answer_of).unwrap_or_default();
    Answer { status: exchange.status, ..answer }
}

/// A step that ended in an error.
fn failed(step: &'static str, took: Duration, error: &UcwaError) -> Step {
    let answer = Some(answer_of(error)).filter(|answer| *answer != Answer::default());
    let step = Step { answer, ..Step::new(step, Outcome::Failed, took, crate::error_chain(error)) };
    match advice(error) {
        Some(advice) => step.advise(advice),
        None => step,
    }
}

fn answer_of(error: &UcwaError) -> Answer {
    let reason = error.reason();
    let (status, diagnostics) = match error {
        UcwaError::Status { status, diagnostics, .. } => (Some(*status), *diagnostics),
        UcwaError::TokenService { status, .. } | UcwaError::NoChallenge { status, .. } => {
            (Some(*status), None)
        }
        _ => (None, None),
    };
    Answer {
        status,
        code: reason.and_then(|reason| reason.code.as_deref()).map(short),
        subcode: error.subcode().map(short),
        diagnostics,
    }
}

/// What to do, where the error's own words do not say it.
fn advice(error: &UcwaError) -> Option<&'static str> {
    Some(match error {
        UcwaError::CredentialsRefused { .. } => {
            "a wrong password, an unknown user name and an account that is locked, expired or disabled look the same from \
             outside: look at the account in Active Directory, correct --username or set the password with `ucwa-relay \
             account set-password`. Every check with a wrong password counts towards a lock-out"
        }
        UcwaError::DiscoveryFailed { attention: false, .. } => {
            "look whether these names lead to the server from this machine, or set server.discovery_url"
        }
        UcwaError::Network { .. } | UcwaError::Timeout { .. } => {
            "look whether the server runs, and whether a firewall or a proxy (HTTPS_PROXY) stands between"
        }
        UcwaError::Tls { .. } | UcwaError::DiscoveryFailed { .. } => {
            "if the certificate is of an authority of your own, name that in server.ca_file; if it is for other names or \
             has ended, renew it on the server"
        }
        UcwaError::Untrusted { .. } => {
            "if the host belongs to your servers, add its domain to server.trusted_domains; if not, somebody answers in \
             the server's place, and no password was sent there"
        }
        UcwaError::NotUcwa { .. } => {
            "look which machine this address leads to: a proxy or a sign-in page answered"
        }
        UcwaError::TokenService { status: 403, .. } => {
            "the server does not let this account sign in: look whether it is enabled for Skype for Business"
        }
        UcwaError::Status { status: 403, .. } => {
            "the server's policies forbid it for this user: look whether the account is enabled for Skype for Business, and \
             at its mobility and external access policies (EnableMobility, EnableOutsideAccess)"
        }
        UcwaError::Status { status: 410, .. } if error.subcode() == Some("TooManyApplications") => {
            "this user is signed in at too many places; end some, or wait until they expire"
        }
        UcwaError::Status { status: 404, .. } => {
            "the web application is not there: it may be restarting, or the address may be wrong"
        }
        UcwaError::Status { status: 429 | 500..=599, .. } | UcwaError::TokenService { .. } => {
            "the server is in trouble or under load: try again; if it lasts, its event log and the web services of the \
             front end say more"
        }
        UcwaError::Incomplete { .. } => {
            "look whether the account is enabled for Skype for Business on this server"
        }
        _ => return None,
    })
}

fn certificate_step(certificate: &ShownCertificate, now: Timestamp) -> Step {
    let ShownCertificate { server, subject, issuer, names, expires_at, refused } = certificate;
    let days = expires_at.map(|end| end.duration_since(now).as_hours().div_euclid(24));
    let ends = days.map_or_else(
        || "ends at an unknown time".to_owned(),
        |days| match days {
            ..0 => format!("ended {} days ago", -days),
            _ => format!("ends in {days} days"),
        },
    );
    let mut found =
        format!("{server} showed {subject}, signed by {issuer}, for {}; it {ends}", names.join(", "));
    let step = |outcome, found| Step::new("certificate", outcome, Duration::ZERO, found);
    if let Some(refused) = refused {
        found.push_str("; not trusted: ");
        found.push_str(refused);
        return step(Outcome::Failed, found).advise(
            "if it is of an authority of your own, name that in server.ca_file; if it is for other names or has ended, renew \
             it on the server",
        );
    }
    found.push_str("; trusted");
    if days.is_some_and(|days| days < DAYS_AHEAD) {
        return step(Outcome::Warning, found)
            .advise("renew it on the server before it ends: no account signs in then");
    }
    step(Outcome::Ok, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_id_is_of_its_account_and_node_and_always_the_same() {
        let id = endpoint_id("relay-1", "sip:a@contoso.test");
        assert_eq!(id, endpoint_id("relay-1", "sip:a@contoso.test"));
        assert_ne!(id, endpoint_id("relay-2", "sip:a@contoso.test"));
        assert_ne!(id, endpoint_id("relay-1", "sip:b@contoso.test"));
        assert!(uuid::Uuid::parse_str(&id).is_ok() && id.len() == 36);
    }

    #[test]
    fn a_certificate_is_told_of_before_it_ends() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let in_days = |days: i64| ShownCertificate {
            server: "pool.contoso.test".to_owned(),
            subject: "CN=pool".to_owned(),
            issuer: "CN=authority".to_owned(),
            names: vec!["pool.contoso.test".to_owned()],
            expires_at: Some(Timestamp::from_second(1_800_000_000 + days * 86_400).unwrap()),
            refused: None,
        };
        for (days, outcome, words) in [
            (90, Outcome::Ok, "ends in 90 days"),
            (20, Outcome::Warning, "ends in 20 days"),
            (-2, Outcome::Warning, "ended 2 days ago"),
        ] {
            let step = certificate_step(&in_days(days), now);
            assert_eq!(step.outcome, outcome, "{step:?}");
            assert!(step.found.contains(words), "{step:?}");
        }
        let refused = ShownCertificate { refused: Some("UnknownIssuer".to_owned()), ..in_days(90) };
        let step = certificate_step(&refused, now);
        assert_eq!(step.outcome, Outcome::Failed);
        assert!(step.found.contains("UnknownIssuer") && step.advice.unwrap().contains("server.ca_file"));
    }

    #[test]
    fn the_header_date_is_half_a_second_later_on_average() {
        let at = |milliseconds| Timestamp::from_millisecond(milliseconds).unwrap();
        let reading = server_clock(at(10_400), Duration::from_millis(400), at(10_000)).unwrap();
        assert_eq!((reading.ours, reading.theirs), (at(10_200), at(10_500)));
        assert_eq!(reading.uncertainty, Duration::from_millis(700));
    }
}
