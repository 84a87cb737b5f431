//! HTTP as UCWA wants it: no redirects, no cookies, no referer, bounded bodies, deadlines that fit a parked GET.
//!
//! [`HttpClients`] is shared by all accounts. Commands go through one client. Parked GETs go through others, each for
//! a limited number of accounts: over HTTP/2 a server lets a client park about 100 requests on its one connection and
//! leaves the rest waiting without a word. What signs in a connection gets a client of its own
//! ([`HttpClients::one_connection`]): on a shared one it would sign in everybody else, too.

use std::{
    error::Error,
    fmt, io,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::{
    Client, Method,
    header::{
        ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue,
        LOCATION, RETRY_AFTER, WARNING, WWW_AUTHENTICATE,
    },
};
use url::Url;

use super::{
    certificates::CertificateLog,
    challenge::{self, Challenges},
    connect_once::ConnectOnce,
    connecting::Connecting,
    error::{TOKEN_INVALID, UcwaError, WEB_TICKET_INVALID, http_date, parse_retry_after},
    model::Resource,
    trust::host_of,
    xml,
};
use crate::metrics;

/// Sent with every request.
const USER_AGENT: &str = concat!("ucwa-relay/", env!("CARGO_PKG_VERSION"));
/// Media type of UCWA's XML.
pub(super) const UCWA_XML: &str = "application/vnd.microsoft.com.ucwa+xml";
/// Discovery answers JSON unless asked for XML.
const ACCEPT_UCWA: &str = "application/vnd.microsoft.com.ucwa+xml, application/xml;q=0.9";
/// Parked GETs per client. Servers allow about 100 streams on an HTTP/2 connection.
const POLLS_PER_CLIENT: usize = 50;
/// Connections of the commands' client that are kept while nothing goes over them, for its idle time: as many as there
/// may be sends at once, or a burst would make connections all the time.
const IDLE_CONNECTIONS: usize = 512;
/// Largest event-channel response that is read, in bytes.
const EVENTS_LIMIT: usize = 16 << 20;
/// Largest other answer that is read, in bytes.
const BODY_LIMIT: usize = 4 << 20;

const DIAGNOSTICS: HeaderName = HeaderName::from_static("x-ms-diagnostics");
const SERVER_FQDN: HeaderName = HeaderName::from_static("x-ms-server-fqdn");

/// How to talk HTTP.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Certificate authorities beside the system's, as PEM.
    pub extra_ca_pem: Option<Vec<u8>>,
    /// Deadline of a command, from connecting to the last byte.
    pub request_timeout: Duration,
    /// How much longer than its `timeout` a parked GET is waited for.
    pub poll_margin: Duration,
    /// Deadline of TCP and TLS handshakes.
    pub connect_timeout: Duration,
    /// Plain http to loopback addresses is allowed. Proxies named by the environment are not used then.
    pub allow_http: bool,
}

/// The HTTP clients of the process, shared by all accounts; cheap to clone.
#[derive(Clone)]
pub struct HttpClients {
    shared: Arc<Shared>,
}

struct Shared {
    settings: HttpSettings,
    authorities: Vec<reqwest::Certificate>,
    /// Where the certificates that servers show are noted, if anywhere.
    certificates: Option<CertificateLog>,
    commands: CountedClient,
    polls: Mutex<Vec<Arc<PollClient>>>,
}

/// A client that knows whether it is making a connection.
#[derive(Clone)]
struct CountedClient {
    client: Client,
    connecting: Connecting,
}

struct PollClient {
    counted: CountedClient,
    accounts: AtomicUsize,
}

impl fmt::Debug for HttpClients {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HttpClients").finish_non_exhaustive()
    }
}

impl HttpClients {
    /// Prepares TLS and the client for commands.
    ///
    /// # Errors
    /// [`UcwaError::Setup`] if the extra authorities can't be read, or the system has none and none are given.
    pub fn new(settings: &HttpSettings) -> Result<Self, UcwaError> {
        Self::build(settings, None)
    }

    /// As [`Self::new`], and notes the certificate that each server shows, trusted or not.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn recording(settings: &HttpSettings, certificates: &CertificateLog) -> Result<Self, UcwaError> {
        Self::build(settings, Some(certificates.clone()))
    }

    fn build(settings: &HttpSettings, certificates: Option<CertificateLog>) -> Result<Self, UcwaError> {
        // An error means that the process has a provider already, which is what is wanted.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authorities = match &settings.extra_ca_pem {
            None => Vec::new(),
            Some(pem) => match reqwest::Certificate::from_pem_bundle(pem) {
                Ok(authorities) if !authorities.is_empty() => authorities,
                Ok(_) => return Err(setup("server.ca_file holds no certificate in PEM form")),
                Err(problem) => {
                    return Err(setup(&format!(
                        "server.ca_file can't be read: {}",
                        crate::error_chain(&problem)
                    )));
                }
            },
        };
        let commands = build_counted(settings, &authorities, certificates.as_ref())?;
        let shared = Shared {
            settings: settings.clone(),
            authorities,
            certificates,
            commands,
            polls: Mutex::new(Vec::new()),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A place among the parked GETs for one account, given back on drop.
    pub(super) fn lease_poll_client(&self) -> PollLease {
        let mut polls = self.shared.polls.lock().unwrap_or_else(PoisonError::into_inner);
        let free =
            polls.iter().find(|poll| poll.accounts.load(Ordering::Relaxed) < POLLS_PER_CLIENT).cloned();
        let poll = free.unwrap_or_else(|| {
            // Building succeeded once with the same settings. If the system's certificates are gone since, sharing
            // a client is better than no event channel.
            let shared = &self.shared;
            let counted = build_counted(&shared.settings, &shared.authorities, shared.certificates.as_ref())
                .unwrap_or_else(|_| self.shared.commands.clone());
            let poll = Arc::new(PollClient { counted, accounts: AtomicUsize::new(0) });
            polls.push(Arc::clone(&poll));
            poll
        });
        poll.accounts.fetch_add(1, Ordering::Relaxed);
        PollLease { poll }
    }

    /// A client whose requests all go over one connection, by HTTP/1.1. The connection ends with it.
    ///
    /// # Errors
    /// [`UcwaError::Setup`], as for [`Self::new`].
    pub(super) fn one_connection(&self) -> Result<OneConnection, UcwaError> {
        let Shared { settings, authorities, certificates, .. } = &*self.shared;
        let client = build(settings, authorities, certificates.as_ref(), &Connections::One)?;
        Ok(OneConnection { client, timeout: settings.request_timeout })
    }

    /// Makes one request and reads its answer, whatever the status.
    ///
    /// # Errors
    /// [`UcwaError::Network`], [`UcwaError::Timeout`], [`UcwaError::Tls`], [`UcwaError::TooLarge`].
    pub(super) async fn execute(
        &self,
        call: &Call<'_>,
        bearer: Option<&HeaderValue>,
    ) -> Result<Reply, UcwaError> {
        counted(call, pin!(self.exchange(call, bearer))).await
    }

    async fn exchange(&self, call: &Call<'_>, bearer: Option<&HeaderValue>) -> Result<Reply, UcwaError> {
        let settings = &self.shared.settings;
        let Some(Parked { lease, held, on_connection }) = &call.parked else {
            return exchange(&self.shared.commands.client, settings.request_timeout, call, bearer).await;
        };
        let CountedClient { client, connecting } = &lease.poll.counted;
        let exchanging = pin!(exchange(client, *held + settings.poll_margin, call, bearer));
        let answer = connecting.while_on_connection(exchanging, || on_connection(true)).await;
        on_connection(false);
        answer
    }
}

/// A client with one connection, which no other client uses.
pub(super) struct OneConnection {
    client: Client,
    timeout: Duration,
}

impl OneConnection {
    /// Makes one request and reads its answer to the end, so that the next one finds the connection free.
    ///
    /// # Errors
    /// As [`HttpClients::execute`]; [`UcwaError::Network`] with nothing sent if the connection was closed since the
    /// last request.
    pub(super) async fn execute(
        &self,
        call: &Call<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Reply, UcwaError> {
        counted(call, pin!(exchange(&self.client, self.timeout, call, authorization))).await
    }
}

/// Counts and times a request.
async fn counted(
    call: &Call<'_>,
    exchange: impl Future<Output = Result<Reply, UcwaError>>,
) -> Result<Reply, UcwaError> {
    let began = Instant::now();
    let exchanged = exchange.await;
    let took = call.parked.is_none().then(|| began.elapsed());
    match &exchanged {
        Ok(reply) => metrics::count_request(call.resource, &reply.status.to_string(), took),
        Err(error) => metrics::count_request(call.resource, error.without_status(), took),
    }
    exchanged
}

async fn exchange(
    client: &Client,
    timeout: Duration,
    call: &Call<'_>,
    authorization: Option<&HeaderValue>,
) -> Result<Reply, UcwaError> {
    let mut request =
        client.request(call.method.clone(), call.url.clone()).timeout(timeout).header(ACCEPT, call.accept);
    if let Some(authorization) = authorization {
        request = request.header(AUTHORIZATION, authorization.clone());
    }
    match &call.body {
        Some((content_type, text)) => {
            request = request.header(CONTENT_TYPE, content_type).body(text.clone());
        }
        // IIS answers 411 to a POST without a length.
        None if call.method == Method::POST => request = request.header(CONTENT_LENGTH, "0").body(""),
        None => {}
    }
    let host = host_of(&call.url);
    let failed = |error: reqwest::Error| describe_failure(error, call.resource, &host);
    let mut response = request.send().await.map_err(failed)?;
    let status = response.status().as_u16();
    let headers = std::mem::take(response.headers_mut());
    let limit = if call.parked.is_some() { EVENTS_LIMIT } else { BODY_LIMIT };
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > limit => {
                if call.parked.is_some() && status == 200 {
                    // What was read goes to quarantine as the torn response it is; a response that is always
                    // refused would block the channel for ever.
                    body.extend_from_slice(&chunk[..limit - body.len()]);
                    break;
                }
                if call.body_matters(status) {
                    return Err(UcwaError::TooLarge { resource: call.resource, limit });
                }
                body.clear();
                break;
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => break,
            Err(error) if call.body_matters(status) => return Err(failed(error)),
            // The status says all that is needed.
            Err(_) => {
                body.clear();
                break;
            }
        }
    }
    let reply = Reply { resource: call.resource, host, status, headers, body };
    if status >= 400 {
        tracing::debug!(
            resource = reply.resource,
            status,
            host = %reply.host,
            diagnostics = reply.header(&DIAGNOSTICS).as_deref(),
            server_fqdn = reply.header(&SERVER_FQDN).as_deref(),
            warning = reply.header(&WARNING).as_deref(),
            "the server refused a request"
        );
    }
    Ok(reply)
}

fn setup(problem: &str) -> UcwaError {
    UcwaError::Setup { problem: problem.to_owned() }
}

/// How many connections a client opens.
enum Connections {
    Many(Connecting),
    One,
}

fn build_counted(
    settings: &HttpSettings,
    authorities: &[reqwest::Certificate],
    certificates: Option<&CertificateLog>,
) -> Result<CountedClient, UcwaError> {
    let connecting = Connecting::default();
    let client = build(settings, authorities, certificates, &Connections::Many(connecting.clone()))?;
    Ok(CountedClient { client, connecting })
}

fn build(
    settings: &HttpSettings,
    authorities: &[reqwest::Certificate],
    certificates: Option<&CertificateLog>,
    connections: &Connections,
) -> Result<Client, UcwaError> {
    let builder = || {
        let builder = Client::builder()
            .user_agent(USER_AGENT)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .https_only(!settings.allow_http)
            .connect_timeout(settings.connect_timeout)
            // IIS closes idle connections after two minutes; a POST must not meet one that is just closing.
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .http2_keep_alive_timeout(Duration::from_secs(20))
            // Challenges were seen with folded lines.
            .http1_allow_obsolete_multiline_headers_in_responses(true);
        let builder = match connections {
            Connections::Many(connecting) => builder.connector_layer(connecting.clone()),
            Connections::One => builder.http1_only().connector_layer(ConnectOnce::default()),
        };
        if settings.allow_http { builder.no_proxy() } else { builder }
    };
    let protocols: &[&[u8]] = match connections {
        Connections::Many(_) => &[b"h2", b"http/1.1"],
        Connections::One => &[b"http/1.1"],
    };
    let recording = certificates.map(|log| log.tls(settings.extra_ca_pem.as_deref(), protocols));
    let built = match recording {
        Some(Ok(tls)) => builder().tls_backend_preconfigured(tls).build(),
        // What it lacks is said below, as without notes.
        Some(Err(_)) | None => builder().tls_certs_merge(authorities.iter().cloned()).build(),
    };
    match built {
        Ok(client) => Ok(client),
        // A machine without any certificate authority can still talk to itself over http.
        Err(_) if settings.allow_http => builder()
            .tls_certs_only(authorities.iter().cloned())
            .build()
            .map_err(|problem| setup(&format!("HTTP can't be set up: {}", crate::error_chain(&problem)))),
        Err(problem) => Err(setup(&format!(
            "HTTPS can't be set up: {}; install the system's certificate authorities (ca-certificates)",
            crate::error_chain(&problem)
        ))),
    }
}

/// One account's place among the parked GETs.
pub(super) struct PollLease {
    poll: Arc<PollClient>,
}

impl Drop for PollLease {
    fn drop(&mut self) {
        self.poll.accounts.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One request.
pub(super) struct Call<'a> {
    /// UCWA resource, for sentences and decisions.
    pub resource: &'static str,
    pub method: Method,
    pub url: Url,
    pub accept: &'static str,
    /// Media type and text.
    pub body: Option<(String, String)>,
    /// For a parked GET.
    pub parked: Option<Parked<'a>>,
}

/// How a parked GET is made.
pub(super) struct Parked<'a> {
    /// Its client.
    pub lease: &'a PollLease,
    /// How long the server may hold it.
    pub held: Duration,
    /// Told `true` once it is on a connection, `false` when it was answered or failed.
    pub on_connection: &'a (dyn Fn(bool) + Sync),
}

impl Call<'_> {
    /// A GET of UCWA's XML.
    pub(super) fn get(resource: &'static str, url: Url) -> Self {
        Self { resource, method: Method::GET, url, accept: ACCEPT_UCWA, body: None, parked: None }
    }

    /// A POST without a body.
    pub(super) fn post(resource: &'static str, url: Url) -> Self {
        Self { method: Method::POST, ..Self::get(resource, url) }
    }

    /// A POST of an input.
    pub(super) fn post_input(resource: &'static str, url: Url, input: &xml::Input) -> Self {
        Self { body: Some((UCWA_XML.to_owned(), xml::write_input(input))), ..Self::post(resource, url) }
    }

    /// The body of a command's answer tells nothing that its head does not: only documents are waited for.
    fn body_matters(&self, status: u16) -> bool {
        status == 200
            || (status < 300 && matches!(self.resource, "applications" | "events" | "makeMeAvailable"))
    }
}

/// An answer with its body.
pub(super) struct Reply {
    pub resource: &'static str,
    pub host: String,
    pub status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    /// What the `WWW-Authenticate` headers ask for.
    pub(super) fn challenges(&self) -> Challenges {
        let values: Vec<_> = self
            .headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .collect();
        challenge::parse(values.iter().map(String::as_str))
    }

    /// The token was not accepted: a renewed one may be. Such a request was not executed.
    pub(super) fn refuses_token(&self) -> bool {
        match self.status {
            401 => true,
            403 => self.diagnostics() == Some(TOKEN_INVALID) || self.challenges().oauth.is_some(),
            500 => self.diagnostics() == Some(WEB_TICKET_INVALID) || self.challenges().oauth.is_some(),
            _ => false,
        }
    }

    /// The body as text; what is not UTF-8 is replaced.
    pub(super) fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.body);
        text.strip_prefix('\u{feff}').map_or_else(|| text.as_ref().to_owned(), str::to_owned)
    }

    /// The header `Location`, as given.
    pub(super) fn location(&self) -> Option<String> {
        self.header(&LOCATION).filter(|location| !location.is_empty())
    }

    /// The header `Retry-After`.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        parse_retry_after(&self.header(&RETRY_AFTER)?, self.header(&DATE).as_deref())
    }

    /// The header `Date`.
    pub(super) fn date(&self) -> Option<jiff::Timestamp> {
        http_date(&self.header(&DATE)?)
    }

    /// Refuses everything that is not 2xx, and a 200 from something that is not UCWA.
    pub(super) fn success(self) -> Result<Self, UcwaError> {
        if !(200..300).contains(&self.status) {
            return Err(self.refusal());
        }
        if self.status == 200 && self.is_html() && !self.body.is_empty() {
            return Err(self.not_ucwa());
        }
        Ok(self)
    }

    /// Reads the body of a success.
    pub(super) fn resource(self) -> Result<Resource, UcwaError> {
        let reply = self.success()?;
        let text = reply.text();
        xml::parse_resource(&text).map_err(|source| {
            if reply.is_xml() || text.trim_start().starts_with("<?xml") {
                UcwaError::Malformed { resource: reply.resource, source: Arc::new(source) }
            } else {
                reply.not_ucwa()
            }
        })
    }

    /// The error that a refusal is.
    pub(super) fn refusal(&self) -> UcwaError {
        let reason = if self.is_html() { None } else { xml::parse_reason(&self.text()).ok().map(Box::new) };
        UcwaError::Status {
            resource: self.resource,
            status: self.status,
            reason,
            retry_after: self.retry_after(),
            challenge: self.challenges().oauth.is_some(),
            diagnostics: self.diagnostics(),
        }
    }

    pub(super) fn not_ucwa(&self) -> UcwaError {
        let content_type = self.media_type();
        let content_type =
            if content_type.is_empty() { "a document without a type".to_owned() } else { content_type };
        UcwaError::NotUcwa { resource: self.resource, content_type }
    }

    pub(super) fn is_html(&self) -> bool {
        let media_type = self.media_type();
        media_type == "text/html" || media_type == "application/xhtml+xml"
    }

    fn is_xml(&self) -> bool {
        let media_type = self.media_type();
        media_type.ends_with("+xml") || media_type.ends_with("/xml")
    }

    /// `Content-Type` without parameters, lower case.
    fn media_type(&self) -> String {
        let value = self.header(&CONTENT_TYPE).unwrap_or_default();
        super::error::printable(value.split(';').next().unwrap_or_default().trim(), 60).to_ascii_lowercase()
    }

    /// The number that `X-Ms-diagnostics` begins with.
    fn diagnostics(&self) -> Option<u32> {
        self.header(&DIAGNOSTICS)?.split(';').next()?.trim().parse().ok()
    }

    fn header(&self, name: &HeaderName) -> Option<String> {
        self.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).trim().to_owned())
    }
}

/// Tells apart what was certainly not sent, what took too long, and what TLS refused.
fn describe_failure(error: reqwest::Error, resource: &'static str, host: &str) -> UcwaError {
    let host = host.to_owned();
    let sent = !(error.is_connect() || error.is_builder());
    if error.is_timeout() {
        return UcwaError::Timeout { resource, host, sent };
    }
    let is_tls = is_tls_failure(&error);
    let source = Arc::new(error.without_url());
    if is_tls && !sent {
        return UcwaError::Tls { resource, host, source };
    }
    UcwaError::Network { resource, host, sent, source }
}

fn is_tls_failure(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(current) = cause {
        if current.is::<rustls::Error>() {
            return true;
        }
        // What an I/O error wraps is not its source, but the wrapped error's source is.
        let wrapped = current.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if wrapped.is_some_and(|wrapped| is_tls_failure(wrapped)) {
            return true;
        }
        cause = current.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> HttpSettings {
        HttpSettings {
            extra_ca_pem: None,
            request_timeout: Duration::from_secs(5),
            poll_margin: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            allow_http: true,
        }
    }

    fn reply(status: u16, headers: &[(&'static str, &str)], body: &str) -> Reply {
        let headers = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect();
        Reply { resource: "me", host: "h".to_owned(), status, headers, body: body.as_bytes().to_vec() }
    }

    #[test]
    fn parked_requests_are_spread_and_places_are_given_back() {
        let clients = HttpClients::new(&settings()).unwrap();
        let mut leases: Vec<_> = (0..=POLLS_PER_CLIENT).map(|_| clients.lease_poll_client()).collect();
        assert_eq!(clients.shared.polls.lock().unwrap().len(), 2);
        assert!(!Arc::ptr_eq(&leases[0].poll, &leases[POLLS_PER_CLIENT].poll));
        leases.remove(0);
        leases.push(clients.lease_poll_client());
        assert_eq!(clients.shared.polls.lock().unwrap().len(), 2);
        assert!(Arc::ptr_eq(&leases[0].poll, &leases[POLLS_PER_CLIENT].poll));
    }

    #[test]
    fn unreadable_authorities_are_refused_with_the_setting() {
        let refused =
            HttpClients::new(&HttpSettings { extra_ca_pem: Some(b"no PEM".to_vec()), ..settings() })
                .unwrap_err();
        assert!(refused.to_string().contains("server.ca_file"), "{refused}");
    }

    #[test]
    fn a_refusal_keeps_what_decisions_go_by() {
        let body = "<reason xmlns=\"http://schemas.microsoft.com/rtc/2012/03/ucwa\"><code>Gone</code>\
                    <subcode>TooManyApplications</subcode></reason>";
        let error = reply(410, &[("content-type", "application/xml"), ("retry-after", "5")], body).refusal();
        assert_eq!((error.status(), error.subcode()), (Some(410), Some("TooManyApplications")));
        assert_eq!(error.retry_after(), Some(Duration::from_secs(5)));
        let html = reply(404, &[("content-type", "text/html; charset=utf-8")], body).refusal();
        assert_eq!((html.status(), html.subcode()), (Some(404), None), "HTML decides by its status only");
    }

    #[test]
    fn a_refused_token_is_known() {
        let oauth = ("www-authenticate", "MsRtcOAuth href=\"https://a.test/t\",grant_type=\"password\"");
        for (status, headers, refused) in [
            (401, vec![], true),
            (403, vec![oauth], true),
            (500, vec![oauth], true),
            (403, vec![("x-ms-diagnostics", "28055;source=\"fe1\";reason=\"x\"")], true),
            (500, vec![("x-ms-diagnostics", "28032;source=\"fe1\"")], true),
            (403, vec![("x-ms-diagnostics", "28070")], false),
            (403, vec![("www-authenticate", "Negotiate")], false),
            (404, vec![oauth], false),
        ] {
            assert_eq!(reply(status, &headers, "").refuses_token(), refused, "{status} {headers:?}");
        }
    }

    #[test]
    fn a_page_in_place_of_a_resource_is_told_apart_from_broken_xml() {
        let page =
            reply(200, &[("content-type", "text/html")], "<html>sign in</html>").resource().unwrap_err();
        assert!(matches!(page, UcwaError::NotUcwa { .. }), "{page}");
        let json = reply(200, &[("content-type", "application/json")], "{}").resource().unwrap_err();
        assert!(matches!(json, UcwaError::NotUcwa { .. }), "{json}");
        let broken = reply(200, &[("content-type", UCWA_XML)], "<resource rel=").resource().unwrap_err();
        assert!(matches!(broken, UcwaError::Malformed { .. }), "{broken}");
        let bom = "\u{feff}<resource rel=\"me\" href=\"/me\" xmlns=\"http://schemas.microsoft.com/rtc/2012/03/ucwa\"/>";
        assert_eq!(reply(200, &[], bom).resource().unwrap().href, "/me");
    }
}
