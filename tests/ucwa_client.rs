//! The UCWA client over real sockets, against small scripted servers that record every request.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::{future::join_all, stream};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    HeaderMap, Request, Response,
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use secrecy::SecretString;
use tokio::{io::AsyncReadExt, net::TcpListener, sync::Barrier};
use ucwa_relay::{
    identifiers::OperationId,
    ucwa::{
        Action, EventParameters, HttpClients, HttpSettings, NewApplication, NewMeeting, OutgoingInvitation,
        SignInMethod, SignInSettings, SignInStep, SignedIn, UcwaClient, UcwaError, Url,
    },
};

const NAMESPACE: &str = "http://schemas.microsoft.com/rtc/2012/03/ucwa";
const PASSWORD: &str = "a&b+c%=\u{fc}";

// ------------------------------------------------------------------------------------------------ the server

/// A request as a server saw it.
#[derive(Debug, Clone)]
struct Seen {
    method: String,
    path: String,
    headers: HeaderMap,
    body: String,
}

impl Seen {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.path.split('?').next() == Some(path)
    }

    fn has_token(&self, token: &str) -> bool {
        self.header("authorization") == Some(&format!("Bearer {token}"))
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The connection ends in the middle of the body.
    broken: bool,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), broken: false }
    }

    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    fn body(mut self, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self.header("content-type", content_type)
    }

    fn xml(status: u16, xml: &str) -> Self {
        Self::new(status).body("application/vnd.microsoft.com.ucwa+xml; charset=utf-8", xml)
    }

    fn reason(status: u16, subcode: &str) -> Self {
        let body =
            format!("<reason xmlns=\"{NAMESPACE}\"><code>X</code><subcode>{subcode}</subcode></reason>");
        Self::new(status).body("application/xml", body)
    }

    fn html(status: u16) -> Self {
        Self::new(status).body("text/html", "<html>IIS</html>")
    }

    fn challenge(status: u16, service: &str) -> Self {
        Self::html(status)
            .header("www-authenticate", "Bearer trusted_issuers=\"\", client_id=\"0004\"")
            .header(
                "www-authenticate",
                &format!("MsRtcOAuth href=\"{service}\",grant_type=\"urn:microsoft.rtc:windows,password\""),
            )
    }

    fn token(token: &str, expires_in: u32) -> Self {
        let body =
            format!("{{\"access_token\":\"{token}\",\"expires_in\":{expires_in},\"token_type\":\"Bearer\"}}");
        Self::new(200).body("application/json", body)
    }
}

fn resource(rel: &str, href: &str, inside: &str) -> String {
    format!("<resource rel=\"{rel}\" href=\"{href}\" xmlns=\"{NAMESPACE}\">{inside}</resource>")
}

fn link(rel: &str, href: &str) -> String {
    format!("<link rel=\"{rel}\" href=\"{href}\"/>")
}

/// A listening socket that is not served yet, so that servers can know of each other.
struct Bound {
    listener: TcpListener,
    base: String,
}

impl Bound {
    async fn bind() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        Self { listener, base }
    }

    fn serve<F, A>(self, script: F) -> Server
    where
        F: Fn(Seen) -> A + Send + Sync + 'static,
        A: Future<Output = Answer> + Send + 'static,
    {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (listener, recorded, script) = (self.listener, Arc::clone(&seen), Arc::new(script));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (recorded, script) = (Arc::clone(&recorded), Arc::clone(&script));
                let service =
                    service_fn(move |request| answer(request, Arc::clone(&recorded), Arc::clone(&script)));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), service));
            }
        });
        Server { base: self.base, seen }
    }

    fn serve_now(self, script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Server {
        self.serve(move |seen| std::future::ready(script(&seen)))
    }
}

async fn answer<F, A>(
    request: Request<Incoming>,
    recorded: Arc<Mutex<Vec<Seen>>>,
    script: Arc<F>,
) -> Result<Response<BoxBody<Bytes, std::io::Error>>, Infallible>
where
    F: Fn(Seen) -> A,
    A: Future<Output = Answer>,
{
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let seen = Seen {
        method: head.method.to_string(),
        path: head.uri.path_and_query().unwrap().to_string(),
        headers: head.headers,
        body: String::from_utf8(body.to_vec()).unwrap(),
    };
    recorded.lock().unwrap().push(seen.clone());
    let answer = script(seen).await;
    let mut response = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        response = response.header(name, value);
    }
    let body = if answer.broken {
        let pieces = [Ok(Frame::data(Bytes::from(answer.body))), Err(std::io::Error::other("cut off"))];
        StreamBody::new(stream::iter(pieces)).boxed()
    } else {
        Full::new(Bytes::from(answer.body)).map_err(|never| match never {}).boxed()
    };
    Ok(response.body(body).unwrap())
}

struct Server {
    base: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn url(&self, path: &str) -> Url {
        Url::parse(&format!("{}{path}", self.base)).unwrap()
    }

    fn all(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn requests(&self, method: &str, path: &str) -> Vec<Seen> {
        self.all().into_iter().filter(|seen| seen.is(method, path)).collect()
    }

    fn only(&self, method: &str, path: &str) -> Seen {
        let mut all = self.requests(method, path);
        assert_eq!(all.len(), 1, "{method} {path}: {all:#?}");
        all.remove(0)
    }
}

/// What a healthy server answers: one host for discovery, tokens and applications. Each token is valid for `validity`
/// seconds and named `cwt=1`, `cwt=2` ... in the order of their issue; `accepts` says which are taken.
fn healthy(base: &str, seen: &Seen, issued: &AtomicUsize, accepts: &dyn Fn(&str) -> bool) -> Answer {
    let token = seen.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
    match (seen.method.as_str(), seen.path.split('?').next().unwrap()) {
        ("GET", "/root") => Answer::xml(200, &resource("root", "/root", &link("user", "/user"))),
        ("POST", "/token") => {
            Answer::token(&format!("cwt={}", issued.fetch_add(1, Ordering::SeqCst) + 1), 28800)
        }
        _ if !token.is_some_and(accepts) => Answer::challenge(401, &format!("{base}/token")),
        ("GET", "/user") => {
            Answer::xml(200, &resource("user", "/user", &link("applications", "/applications")))
        }
        ("POST", "/applications") => Answer::xml(201, &application()),
        ("GET", "/applications/1") => Answer::xml(200, &application()),
        ("GET", "/communication") => {
            let links =
                format!("{}{}", link("startMessaging", "/start"), link("conversations", "/conversations"));
            Answer::xml(200, &resource("communication", "/communication", &links))
        }
        ("GET", "/thing") => Answer::xml(200, &resource("thing", "/thing", "")),
        ("POST", "/messages") => Answer::new(201).header("location", "/messages/7"),
        ("POST", _) => Answer::new(204),
        _ => Answer::reason(404, "ResourceNotFound"),
    }
}

fn application() -> String {
    let me = format!(
        "<resource rel=\"me\" href=\"/me\">{}<property name=\"name\">Alice</property></resource>",
        link("makeMeAvailable", "/available")
    );
    let inside =
        format!("{}{me}{}", link("events", "/events?ack=1"), link("communication", "/communication"));
    resource("application", "/applications/1", &inside)
}

async fn healthy_with(special: impl Fn(&Seen, &str) -> Option<Answer> + Send + Sync + 'static) -> Server {
    let bound = Bound::bind().await;
    let (base, issued) = (bound.base.clone(), AtomicUsize::new(0));
    bound.serve_now(move |seen| {
        special(seen, &base).unwrap_or_else(|| healthy(&base, seen, &issued, &|_| true))
    })
}

// ------------------------------------------------------------------------------------------------ the client

fn clients(poll_margin: Duration) -> HttpClients {
    HttpClients::new(&HttpSettings {
        extra_ca_pem: None,
        request_timeout: Duration::from_secs(20),
        poll_margin,
        connect_timeout: Duration::from_secs(10),
        allow_http: true,
    })
    .unwrap()
}

fn client_of(discovery_url: Url, trusted: &[&str]) -> UcwaClient {
    client_with(SignInMethod::Password, discovery_url, trusted)
}

fn client_with(method: SignInMethod, discovery_url: Url, trusted: &[&str]) -> UcwaClient {
    client_polling(method, discovery_url, trusted, Duration::from_secs(20))
}

fn client_polling(
    method: SignInMethod,
    discovery_url: Url,
    trusted: &[&str],
    poll_margin: Duration,
) -> UcwaClient {
    let settings = settings_of(method, discovery_url, trusted);
    UcwaClient::new(&clients(poll_margin), settings, SecretString::from(PASSWORD))
}

fn settings_of(method: SignInMethod, discovery_url: Url, trusted: &[&str]) -> SignInSettings {
    SignInSettings {
        sip_uri: "sip:alice@contoso.test".parse().unwrap(),
        username: "CONTOSO\\alice".to_owned(),
        method,
        discovery_url: Some(discovery_url),
        trusted_domains: trusted.iter().map(|domain| (*domain).to_owned()).collect(),
        allow_http: true,
    }
}

async fn sign_in(server: &Server, trusted: &[&str]) -> (UcwaClient, Result<SignedIn, UcwaError>) {
    let client = client_of(server.url("/root"), trusted);
    let result = client.sign_in(&|_| {}).await;
    (client, result)
}

async fn signed_in(server: &Server) -> UcwaClient {
    let (client, result) = sign_in(server, &[]).await;
    result.unwrap();
    client
}

fn assert_untrusted(result: Result<SignedIn, UcwaError>, host: &str) {
    match result {
        Err(error @ UcwaError::Untrusted { .. }) => {
            let sentence = error.to_string();
            assert!(sentence.contains(host.trim_start_matches("http://")), "{sentence}");
            assert!(sentence.contains("server.trusted_domains"), "{sentence}");
            assert_eq!(error.action(), Action::StopAccount);
        }
        other => panic!("{other:?}"),
    }
}

fn assert_nothing_secret(server: &Server) {
    for seen in server.all() {
        assert_eq!(seen.header("authorization"), None, "{seen:?}");
        assert!(!seen.body.contains("password"), "{seen:?}");
    }
}

// ------------------------------------------------------------------------------------------------- sign-in

#[tokio::test]
async fn signing_in_asks_for_the_challenge_then_a_token_then_the_user() {
    let server = healthy_with(|_, _| None).await;
    let client = client_of(server.url("/root"), &[]);
    let steps = Mutex::new(Vec::new());
    let found = client.sign_in(&|step| steps.lock().unwrap().push(step)).await.unwrap();

    assert_eq!(found, SignedIn { user: server.url("/user"), applications: server.url("/applications") });
    assert_eq!(
        *steps.lock().unwrap(),
        [SignInStep::Discovery, SignInStep::Challenge, SignInStep::Token, SignInStep::User]
    );
    let all = server.all();
    let order: Vec<_> = all.iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect();
    assert_eq!(order, ["GET /root", "GET /user", "POST /token", "GET /user"]);
    for seen in &all {
        for unwanted in ["cookie", "referer", "x-ms-origin"] {
            assert_eq!(seen.header(unwanted), None, "{seen:?}");
        }
        assert!(seen.header("user-agent").unwrap().starts_with("ucwa-relay/"), "{seen:?}");
    }
    for unauthenticated in &all[..3] {
        assert_eq!(unauthenticated.header("authorization"), None, "{unauthenticated:?}");
    }
    assert!(all[3].has_token("cwt=1"));
    assert_eq!(
        all[0].header("accept"),
        Some("application/vnd.microsoft.com.ucwa+xml, application/xml;q=0.9")
    );
    assert_eq!(all[2].header("accept"), Some("application/json"));
    assert_eq!(all[2].header("content-type"), Some("application/x-www-form-urlencoded;charset=UTF-8"));
    assert_eq!(all[2].body, "grant_type=password&username=CONTOSO%5Calice&password=a%26b%2Bc%25%3D%C3%BC");
    assert!(!format!("{client:?}").contains("a&b"), "the password must not be printed");
}

#[tokio::test]
async fn a_redirect_link_and_a_redirect_status_lead_on_to_another_root() {
    let server = healthy_with(|seen, _| match seen.path.as_str() {
        "/root" => Some(Answer::new(302).header("location", "/root/a")),
        "/root/a" => Some(Answer::xml(200, &resource("root", "/root/a", &link("redirect", "/root/b")))),
        "/root/b" => Some(Answer::xml(200, &resource("root", "/root/b", &link("user", "/user")))),
        _ => None,
    })
    .await;
    let (_, found) = sign_in(&server, &[]).await;
    assert_eq!(found.unwrap().user, server.url("/user"));
}

#[tokio::test]
async fn an_account_that_is_homed_elsewhere_is_followed_with_a_token_of_its_own() {
    let home = healthy_with(|_, _| None).await;
    let elsewhere = home.url("/root").to_string();
    let first = healthy_with(move |seen, _| {
        (seen.is("GET", "/user") && seen.header("authorization").is_some())
            .then(|| Answer::xml(200, &resource("user", "/user", &link("redirect", &elsewhere))))
    })
    .await;
    let (_, found) = sign_in(&first, &["127.0.0.1"]).await;
    assert_eq!(found.unwrap(), SignedIn { user: home.url("/user"), applications: home.url("/applications") });
    assert_eq!(home.requests("GET", "/root")[0].header("authorization"), None);
    assert_eq!(home.requests("POST", "/token").len(), 1);
}

#[tokio::test]
async fn redirects_in_a_loop_or_too_many_end_discovery() {
    let looping = healthy_with(|seen, _| match seen.path.as_str() {
        "/root" => Some(Answer::xml(200, &resource("root", "/root", &link("redirect", "/again")))),
        "/again" => Some(Answer::new(307).header("location", "/root")),
        _ => None,
    })
    .await;
    let (_, result) = sign_in(&looping, &[]).await;
    assert!(result.unwrap_err().to_string().contains("loop"));
    assert_eq!(looping.all().len(), 2);

    let endless =
        healthy_with(|seen, _| Some(Answer::new(302).header("location", &format!("{}x", seen.path)))).await;
    let (_, result) = sign_in(&endless, &[]).await;
    let error = result.unwrap_err();
    assert!(matches!(error, UcwaError::DiscoveryFailed { .. }), "{error}");
    assert_eq!(endless.all().len(), 6, "the root and five redirects");
}

#[tokio::test]
async fn what_is_not_ucwa_fails_discovery_with_its_reason() {
    let portal = healthy_with(|_, _| Some(Answer::html(200))).await;
    let (_, result) = sign_in(&portal, &[]).await;
    assert!(matches!(result, Err(UcwaError::NotUcwa { .. })));
    let down = healthy_with(|_, _| Some(Answer::html(503).header("retry-after", "7"))).await;
    let error = sign_in(&down, &[]).await.1.unwrap_err();
    assert_eq!((error.status(), error.retry_after()), (Some(503), Some(Duration::from_secs(7))));
}

#[tokio::test]
async fn without_a_configured_address_both_discovery_hosts_are_asked_and_told() {
    let settings = SignInSettings {
        // Never resolved to anything but this machine, where nobody serves HTTPS for it.
        sip_uri: "sip:alice@nobody.localhost".parse().unwrap(),
        username: "alice".to_owned(),
        method: SignInMethod::Password,
        discovery_url: None,
        trusted_domains: Vec::new(),
        allow_http: false,
    };
    let client = UcwaClient::new(&clients(Duration::from_secs(20)), settings, SecretString::from(PASSWORD));
    match client.sign_in(&|_| {}).await.unwrap_err() {
        UcwaError::DiscoveryFailed { attempts, .. } => {
            let hosts: Vec<_> = attempts.iter().map(|(host, _)| host.as_str()).collect();
            assert_eq!(hosts, ["lyncdiscoverinternal.nobody.localhost", "lyncdiscover.nobody.localhost"]);
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_foreign_host_is_refused_and_hears_nothing() {
    let foreign = healthy_with(|_, _| None).await;
    for step in ["redirect link", "redirect status", "user link"] {
        let target = foreign.url("/root").to_string();
        let server = healthy_with(move |seen, _| {
            (seen.path == "/root").then(|| match step {
                "redirect link" => Answer::xml(200, &resource("root", "/root", &link("redirect", &target))),
                "redirect status" => Answer::new(302).header("location", &target),
                _ => Answer::xml(200, &resource("root", "/root", &link("user", &target))),
            })
        })
        .await;
        assert_untrusted(sign_in(&server, &[]).await.1, &foreign.base);
    }
    let target = foreign.url("/token").to_string();
    let server =
        healthy_with(move |seen, _| seen.is("GET", "/user").then(|| Answer::challenge(401, &target))).await;
    assert_untrusted(sign_in(&server, &[]).await.1, &foreign.base);
    let target = foreign.url("/root").to_string();
    let server = healthy_with(move |seen, _| {
        (seen.is("GET", "/user") && seen.header("authorization").is_some())
            .then(|| Answer::xml(200, &resource("user", "/user", &link("redirect", &target))))
    })
    .await;
    assert_untrusted(sign_in(&server, &[]).await.1, &foreign.base);
    assert!(foreign.all().is_empty(), "{:#?}", foreign.all());
}

#[tokio::test]
async fn a_pool_that_the_user_names_gets_no_password_and_no_token_unless_its_host_is_trusted() {
    for gives_challenge in [true, false] {
        let bound = Bound::bind().await;
        let service = format!("{}/token", bound.base);
        let pool = bound.serve_now(move |_| {
            if gives_challenge { Answer::challenge(401, &service) } else { Answer::html(401) }
        });
        let applications = pool.url("/applications").to_string();
        let server = naming_applications(&applications).await;
        assert_untrusted(sign_in(&server, &[]).await.1, &pool.base);
        assert_nothing_secret(&pool);
    }
}

async fn naming_applications(applications: &str) -> Server {
    let applications = applications.to_owned();
    healthy_with(move |seen, _| {
        (seen.is("GET", "/user") && seen.header("authorization").is_some())
            .then(|| Answer::xml(200, &resource("user", "/user", &link("applications", &applications))))
    })
    .await
}

#[tokio::test]
async fn a_pool_on_another_origin_gets_a_second_token() {
    let bound = Bound::bind().await;
    let (service, issued) = (format!("{}/token", bound.base), AtomicUsize::new(1));
    let base = bound.base.clone();
    let pool = bound.serve_now(move |seen| {
        if seen.is("POST", "/token") {
            return healthy(&base, seen, &issued, &|_| true);
        }
        match seen.header("authorization") {
            None => Answer::challenge(401, &service),
            Some("Bearer cwt=2") => healthy(&base, seen, &issued, &|_| true),
            Some(_) => Answer::challenge(403, &service).header("x-ms-diagnostics", "28055;source=\"fe1\""),
        }
    });
    let server = naming_applications(pool.url("/applications").as_str()).await;
    let (client, found) = sign_in(&server, &["127.0.0.1"]).await;
    let found = found.unwrap();
    assert_eq!(found.applications, pool.url("/applications"));
    let (application, existed) =
        client.create_application(&found.applications, &new_application()).await.unwrap();
    assert!(!existed);
    assert_eq!(application.href, pool.url("/applications/1"));
    assert!(pool.all().iter().all(|seen| !seen.has_token("cwt=1")), "a token belongs to its own origin");
    assert!(server.all().iter().all(|seen| !seen.has_token("cwt=2")), "a token belongs to its own origin");
    assert!(pool.only("POST", "/token").header("authorization").is_none());
}

#[tokio::test]
async fn a_pool_without_a_challenge_is_tried_once_with_the_first_token() {
    for accepts in [true, false] {
        let pool = Bound::bind().await.serve_now(move |seen| match seen.header("authorization") {
            Some(_) if accepts => Answer::new(405),
            _ => Answer::html(401),
        });
        let server = naming_applications(pool.url("/applications").as_str()).await;
        let (_, found) = sign_in(&server, &["127.0.0.1"]).await;
        let tried = pool.requests("GET", "/applications");
        assert_eq!(tried.len(), 2, "{tried:#?}");
        assert!(tried[0].header("authorization").is_none() && tried[1].has_token("cwt=1"));
        match found {
            Ok(_) => assert!(accepts),
            Err(error) => {
                assert!(!accepts);
                assert!(matches!(error, UcwaError::SecondTokenRefused { .. }), "{error}");
                assert_eq!(error.action(), Action::StopAccount);
            }
        }
    }
}

#[tokio::test]
async fn refused_credentials_are_sent_once_and_never_again() {
    let server = healthy_with(|seen, _| {
        seen.is("POST", "/token")
            .then(|| Answer::new(400).body("application/json", "{\"error\":\"invalid_grant\"}"))
    })
    .await;
    let client = client_of(server.url("/root"), &[]);
    for _ in 0..3 {
        let error = client.sign_in(&|_| {}).await.unwrap_err();
        assert!(error.is_credentials_refused(), "{error}");
        assert!(!error.was_sent() && error.status().is_none() && !error.is_transport());
        assert_eq!(error.action(), Action::StopAccount);
        assert!(!format!("{error} {error:?}").contains("a&b"), "{error:?}");
    }
    assert_eq!(server.requests("POST", "/token").len(), 1);
}

#[tokio::test]
async fn a_challenge_that_offers_no_password_or_nothing_is_told_apart() {
    let windows = healthy_with(|seen, base| {
        let header = format!("MsRtcOAuth href={base}/token,grant_type=\"urn:microsoft.rtc:windows\"");
        seen.is("GET", "/user").then(|| Answer::html(401).header("www-authenticate", &header))
    })
    .await;
    let error = sign_in(&windows, &[]).await.1.unwrap_err();
    assert!(error.to_string().contains("urn:microsoft.rtc:windows"), "{error}");
    assert_eq!(error.action(), Action::StopAccount);
    assert!(windows.requests("POST", "/token").is_empty());

    let silent = healthy_with(|seen, _| seen.is("GET", "/user").then(|| Answer::html(401))).await;
    let error = sign_in(&silent, &[]).await.1.unwrap_err();
    assert!(matches!(error, UcwaError::NoChallenge { .. }), "{error}");
    assert_eq!(error.action(), Action::RepeatAsIs);
}

// ------------------------------------------------------------------------------------------------- tokens

/// A challenge of NTLM: `CHALLENGE_MESSAGE` of MS-NLMP 4.2.4.3.
const NTLM_CHALLENGE: &str = "TlRMTVNTUAACAAAADAAMADgAAAAzgoriASNFZ4mrze8AAAAAAAAAACQAJABEAAAABgBwFwAAAA9TAGUAcgB2\
    AGUAcgACAAwARABvAG0AYQBpAG4AAQAMAFMAZQByAHYAZQByAAAAAAA=";

/// The number of the NTLM message that a request bears.
fn ntlm_message(seen: &Seen) -> Option<u8> {
    let text = seen.header("authorization")?.strip_prefix("NTLM ")?;
    STANDARD.decode(text).unwrap().get(8).copied()
}

/// A server whose token service answers the first message of NTLM with a challenge, and the second as is said.
async fn ntlm_server(to_first: fn() -> Answer, to_second: fn() -> Answer) -> Server {
    healthy_with(move |seen, _| {
        seen.is("POST", "/token").then(|| match ntlm_message(seen) {
            None => {
                Answer::html(401).header("www-authenticate", "Negotiate").header("www-authenticate", "NTLM")
            }
            Some(1) => to_first(),
            Some(_) => to_second(),
        })
    })
    .await
}

fn ntlm_challenge() -> Answer {
    Answer::html(401).header("www-authenticate", &format!("NTLM {NTLM_CHALLENGE}"))
}

async fn ntlm_sign_in(server: &Server) -> (UcwaClient, Result<SignedIn, UcwaError>) {
    let client = client_with(SignInMethod::Ntlm, server.url("/root"), &[]);
    let result = client.sign_in(&|_| {}).await;
    (client, result)
}

#[tokio::test]
async fn a_windows_sign_in_proves_the_password_without_sending_it() {
    let server = ntlm_server(ntlm_challenge, || Answer::token("cwt=1", 28800)).await;
    let (client, result) = ntlm_sign_in(&server).await;
    result.unwrap();
    let asked = server.requests("POST", "/token");
    assert_eq!(asked.iter().map(ntlm_message).collect::<Vec<_>>(), [None, Some(1), Some(3)]);
    for seen in &asked {
        assert_eq!(seen.body, "grant_type=urn%3Amicrosoft.rtc%3Awindows");
    }
    for seen in server.all() {
        assert!(
            seen.is("POST", "/token") || ntlm_message(&seen).is_none(),
            "only the token service: {seen:?}"
        );
    }
    assert!(server.requests("GET", "/user").iter().any(|seen| seen.has_token("cwt=1")));
    client.get(&server.url("/thing")).await.unwrap();
    assert!(server.only("GET", "/thing").has_token("cwt=1"));
}

#[tokio::test]
async fn a_refused_proof_is_given_once_and_never_again() {
    let server =
        ntlm_server(ntlm_challenge, || Answer::html(401).header("www-authenticate", "Negotiate, NTLM")).await;
    let (client, result) = ntlm_sign_in(&server).await;
    let error = result.unwrap_err();
    assert!(error.is_credentials_refused(), "{error}");
    let again = client.sign_in(&|_| {}).await.unwrap_err();
    assert!(again.is_credentials_refused(), "{again}");
    assert_eq!(server.requests("POST", "/token").len(), 3, "one handshake");
}

#[tokio::test]
async fn an_answer_to_a_challenge_goes_on_its_connection_or_nowhere() {
    let server = ntlm_server(
        || ntlm_challenge().header("connection", "close"),
        || panic!("the connection of the challenge is closed"),
    )
    .await;
    let error = ntlm_sign_in(&server).await.1.unwrap_err();
    assert!(!error.is_credentials_refused(), "{error}");
    assert_eq!(error.action(), Action::RepeatAsIs, "{error}");
    let sentence = ucwa_relay::error_chain(&error);
    assert!(sentence.contains("closed in the middle of its sign-in"), "{sentence}");
    assert_eq!(server.requests("POST", "/token").len(), 2);
}

#[tokio::test]
async fn a_handshake_that_leads_nowhere_says_why() {
    for (to_first, action, words) in [
        (
            (|| Answer::html(401).header("www-authenticate", "Negotiate")) as fn() -> Answer,
            Action::StopAccount,
            "allow NTLM there",
        ),
        (
            || Answer::html(401).header("www-authenticate", "NTLM TlRMTVNTUAACAAAA"),
            Action::RepeatAsIs,
            "can't be read",
        ),
        (|| Answer::html(407).header("proxy-authenticate", "NTLM"), Action::RepeatAsIs, "proxy"),
        (|| Answer::html(403), Action::StopAccount, "403"),
        (|| Answer::html(503).header("retry-after", "7"), Action::Wait, "503"),
    ] {
        let server = ntlm_server(to_first, || panic!("no answer to a challenge is due")).await;
        let error = ntlm_sign_in(&server).await.1.unwrap_err();
        assert_eq!(error.action(), action, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(server.all().iter().all(|seen| seen.header("proxy-authorization").is_none()));
    }
    for (offered, words) in
        [("Kerberos", "kerberos"), ("Basic realm=\"x\"", "basic"), ("", "nothing that it names")]
    {
        let server = healthy_with(move |seen, _| {
            seen.is("POST", "/token").then(|| Answer::html(401).header("www-authenticate", offered))
        })
        .await;
        let error = ntlm_sign_in(&server).await.1.unwrap_err();
        assert!(matches!(error, UcwaError::NtlmNotOffered { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(server.only("POST", "/token").header("authorization"), None);
    }
}

#[tokio::test]
async fn the_windows_grant_is_not_proved_where_it_is_not_offered_or_not_trusted() {
    let without = healthy_with(|seen, base| {
        let header = format!("MsRtcOAuth href=\"{base}/token\",grant_type=\"password\"");
        seen.is("GET", "/user").then(|| Answer::html(401).header("www-authenticate", &header))
    })
    .await;
    let error = ntlm_sign_in(&without).await.1.unwrap_err();
    assert!(matches!(error, UcwaError::GrantNotOffered { .. }), "{error}");
    assert!(
        error.to_string().contains("offers password, the account is configured for auth = ntlm"),
        "{error}"
    );
    assert!(without.requests("POST", "/token").is_empty());

    let foreign = Bound::bind().await.serve_now(|_| ntlm_challenge());
    let service = format!("{}/token", foreign.base);
    let leading =
        healthy_with(move |seen, _| seen.is("GET", "/user").then(|| Answer::challenge(401, &service))).await;
    assert_untrusted(ntlm_sign_in(&leading).await.1, &foreign.base);
    assert!(foreign.all().is_empty());

    // A token service that sends its visitors on is not followed.
    let elsewhere = Bound::bind().await.serve_now(|_| ntlm_challenge());
    let target = format!("{}/token", elsewhere.base);
    let redirecting = healthy_with(move |seen, _| {
        seen.is("POST", "/token").then(|| Answer::html(302).header("location", &target))
    })
    .await;
    let error = ntlm_sign_in(&redirecting).await.1.unwrap_err();
    assert_eq!(error.action(), Action::RepeatAsIs, "{error}");
    assert!(elsewhere.all().is_empty());
}

#[tokio::test]
async fn a_refused_token_is_renewed_once_for_all_who_used_it() {
    const WAITING: usize = 8;
    let bound = Bound::bind().await;
    let (base, issued) = (bound.base.clone(), Arc::new(AtomicUsize::new(0)));
    let together = Arc::new(Barrier::new(WAITING));
    let server = bound.serve(move |seen| {
        let (base, issued, together) = (base.clone(), Arc::clone(&issued), Arc::clone(&together));
        async move {
            let is_stale = seen.is("GET", "/thing") && seen.has_token("cwt=1");
            if is_stale {
                // All have sent the old token before any of them learns that it is refused.
                together.wait().await;
            }
            healthy(&base, &seen, &issued, &|_| !is_stale)
        }
    });
    let client = signed_in(&server).await;
    let thing = server.url("/thing");
    for read in join_all((0..WAITING).map(|_| client.get(&thing))).await {
        assert_eq!(read.unwrap().rel, "thing");
    }
    assert_eq!(server.requests("POST", "/token").len(), 2, "the first and one renewal");
    let things = server.requests("GET", "/thing");
    assert_eq!(things.iter().filter(|seen| seen.has_token("cwt=2")).count(), WAITING);
    assert_eq!(things.len(), 2 * WAITING);
}

#[tokio::test]
async fn a_token_is_renewed_ahead_of_its_end() {
    let issued = AtomicUsize::new(0);
    let server = healthy_with(move |seen, _| {
        seen.is("POST", "/token").then(|| match issued.fetch_add(1, Ordering::SeqCst) {
            0 => Answer::token("cwt=1", 1),
            later => Answer::token(&format!("cwt={}", later + 1), 28800),
        })
    })
    .await;
    let client = signed_in(&server).await;
    let thing = server.url("/thing");
    let renewed = async {
        while !server.requests("GET", "/thing").iter().any(|seen| seen.has_token("cwt=2")) {
            join_all((0..4).map(|_| client.get(&thing))).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap();
    assert_eq!(server.requests("POST", "/token").len(), 2, "those who wait share the renewal");
}

#[tokio::test]
async fn a_challenge_on_403_and_500_and_known_diagnostics_count_as_a_refused_token() {
    for (status, diagnostics) in [(403, None), (500, None), (403, Some("28055;x")), (500, Some("28032;x"))] {
        let server = healthy_with(move |seen, base| {
            (seen.is("GET", "/thing") && seen.has_token("cwt=1")).then(|| match diagnostics {
                None => Answer::challenge(status, &format!("{base}/token")),
                Some(diagnostics) => Answer::html(status).header("x-ms-diagnostics", diagnostics),
            })
        })
        .await;
        let client = signed_in(&server).await;
        assert_eq!(client.get(&server.url("/thing")).await.unwrap().rel, "thing", "{status} {diagnostics:?}");
        assert_eq!(server.requests("POST", "/token").len(), 2);
    }
}

#[tokio::test]
async fn a_second_refusal_is_an_error() {
    let server = healthy_with(|seen, base| {
        seen.is("GET", "/thing").then(|| Answer::challenge(401, &format!("{base}/token")))
    })
    .await;
    let client = signed_in(&server).await;
    let error = client.get(&server.url("/thing")).await.unwrap_err();
    assert_eq!((error.status(), error.action()), (Some(401), Action::RenewToken));
    assert_eq!(server.requests("GET", "/thing").len(), 2);
    assert_eq!(server.requests("POST", "/token").len(), 2);
}

#[tokio::test]
async fn trouble_at_the_token_service_leaves_the_request_unsent() {
    let issued = AtomicUsize::new(0);
    let server = healthy_with(move |seen, base| {
        if seen.is("POST", "/token") && issued.fetch_add(1, Ordering::SeqCst) > 0 {
            return Some(Answer::html(503).header("retry-after", "3"));
        }
        seen.is("POST", "/messages").then(|| Answer::challenge(401, &format!("{base}/token")))
    })
    .await;
    let client = signed_in(&server).await;
    let error = say(&client, &server).await.unwrap_err();
    assert!(!error.was_sent(), "{error:?}");
    assert_eq!((error.status(), error.action()), (None, Action::Wait));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(3)));
}

// ------------------------------------------------------------------------------------------------- requests

fn new_application() -> NewApplication {
    NewApplication {
        culture: "en-US".to_owned(),
        endpoint_id: "endpoint & 1".to_owned(),
        user_agent: "ucwa-relay/test".to_owned(),
    }
}

async fn say(client: &UcwaClient, server: &Server) -> Result<Option<String>, UcwaError> {
    let operation = OperationId("op 1".to_owned());
    client
        .send_message(
            &server.url("/messages?sessionContext=a%2fb"),
            &operation,
            "text/plain",
            "Gr\u{fc}\u{df}e <&",
        )
        .await
}

#[tokio::test]
async fn an_application_is_created_with_what_it_only_links() {
    let server = healthy_with(|_, _| None).await;
    let client = signed_in(&server).await;
    let (application, existed) =
        client.create_application(&server.url("/applications"), &new_application()).await.unwrap();
    assert!(!existed);
    assert_eq!(application.href, server.url("/applications/1"));
    assert_eq!(application.events, Some(server.url("/events?ack=1")));
    assert_eq!(application.make_me_available(), Some(server.url("/available")));
    assert_eq!(application.start_messaging(), Some(server.url("/start")));
    assert_eq!(application.conversations(), Some(server.url("/conversations")));
    assert_eq!(application.display_name().as_deref(), Some("Alice"));
    let post = server.only("POST", "/applications");
    assert_eq!(post.header("content-type"), Some("application/vnd.microsoft.com.ucwa+xml"));
    for part in ["name=\"culture\">en-US<", "name=\"endpointId\">endpoint &amp; 1<", "name=\"userAgent\""] {
        assert!(post.body.contains(part), "{}", post.body);
    }
    assert_eq!(client.resolve("/x?y=1").unwrap(), server.url("/x?y=1"));
    assert!(matches!(client.resolve("http://127.0.0.1:1/x"), Err(UcwaError::Untrusted { .. })));
}

#[tokio::test]
async fn an_existing_application_is_told() {
    let server = healthy_with(|seen, _| {
        seen.is("POST", "/applications").then(|| Answer::xml(200, &application_whole()))
    })
    .await;
    let client = signed_in(&server).await;
    let (_, existed) =
        client.create_application(&server.url("/applications"), &new_application()).await.unwrap();
    assert!(existed);
}

fn application_whole() -> String {
    resource("application", "/applications/1", "<resource rel=\"me\" href=\"/me\"/>")
}

#[tokio::test]
async fn a_part_that_is_not_there_does_not_make_the_application_unreadable() {
    let server = healthy_with(|seen, _| {
        seen.is("GET", "/communication").then(|| Answer::reason(404, "ResourceNotFound"))
    })
    .await;
    let client = signed_in(&server).await;
    let application = client.application(&server.url("/applications/1")).await.unwrap();
    assert_eq!(application.start_messaging(), None);
    assert!(application.make_me_available().is_some());
}

#[tokio::test]
async fn an_application_on_an_origin_that_sign_in_did_not_lead_to_is_refused() {
    let (server, foreign) = (healthy_with(|_, _| None).await, healthy_with(|_, _| None).await);
    let client = signed_in(&server).await;
    let error = client.application(&foreign.url("/applications/1")).await.unwrap_err();
    assert!(matches!(error, UcwaError::Untrusted { .. }), "{error}");
    assert!(foreign.all().is_empty());
}

#[tokio::test]
async fn making_available_twice_succeeds_and_without_messaging_fails() {
    let second = Answer::reason(409, "AlreadyExists");
    let queued = "<operationsQueued><operations><operation/></operations></operationsQueued>";
    for (answer, status) in [
        (second, None),
        (Answer::new(204), None),
        (Answer::new(201).body("application/xml", queued), Some(403)),
        (Answer::reason(403, "None"), Some(403)),
    ] {
        let answer = Mutex::new(Some(answer));
        let server = healthy_with(move |seen, _| {
            seen.is("POST", "/available").then(|| answer.lock().unwrap().take().unwrap())
        })
        .await;
        let client = signed_in(&server).await;
        let made = client.make_me_available(&server.url("/available"), "Online").await;
        assert_eq!(made.as_ref().err().and_then(UcwaError::status), status);
        assert!(made.err().is_none_or(|error| error.action() == Action::StopAccount));
        let post = server.only("POST", "/available");
        for part in
            ["name=\"signInAs\">Online<", "<item>Plain</item><item>Html</item>", "<item>Messaging</item>"]
        {
            assert!(post.body.contains(part), "{}", post.body);
        }
    }
}

#[tokio::test]
async fn a_post_without_input_has_a_length_and_no_body() {
    let server = healthy_with(|_, _| None).await;
    let client = signed_in(&server).await;
    client.report_my_activity(&server.url("/activity")).await.unwrap();
    client.post_empty(&server.url("/accept?sessionContext=1")).await.unwrap();
    for path in ["/activity", "/accept"] {
        let post = server.only("POST", path);
        assert_eq!((post.header("content-length"), post.header("transfer-encoding")), (Some("0"), None));
        assert_eq!((post.header("content-type"), post.body.as_str()), (None, ""));
    }
    client.decline(&server.url("/decline")).await.unwrap();
    assert!(server.only("POST", "/decline").body.contains("<property name=\"reason\">Local</property>"));
}

#[tokio::test]
async fn invitations_carry_their_text_as_a_data_uri() {
    let server = healthy_with(|seen, _| {
        (seen.method == "POST" && seen.path.starts_with("/start"))
            .then(|| Answer::new(201).header("location", "/invitations/5"))
    })
    .await;
    let client = signed_in(&server).await;
    let invitation = OutgoingInvitation {
        operation_id: OperationId("op-1".to_owned()),
        to: "sip:bob@contoso.test".to_owned(),
        subject: Some("A & B".to_owned()),
        importance: "Urgent".to_owned(),
        thread_id: Some("t1".to_owned()),
        message: Some("Hi, \"50%\"".to_owned()),
    };
    let location = client.start_messaging(&server.url("/start"), &invitation).await.unwrap();
    assert_eq!(location.as_deref(), Some("/invitations/5"));
    let body = server.only("POST", "/start").body;
    for part in [
        "name=\"operationId\">op-1<",
        "name=\"to\">sip:bob@contoso.test<",
        "name=\"importance\">Urgent<",
        "name=\"subject\">A &amp; B<",
        "name=\"threadId\">t1<",
        "<link rel=\"message\" href=\"data:text/plain;charset=utf-8,Hi%2C%20%2250%25%22\"",
    ] {
        assert!(body.contains(part), "{part}: {body}");
    }
    let meeting = NewMeeting {
        operation_id: OperationId("op-3".to_owned()),
        subject: Some("C & D".to_owned()),
        importance: "Normal".to_owned(),
        thread_id: Some("t2".to_owned()),
    };
    client.start_online_meeting(&server.url("/meet?onlineMeetingUri=adhoc"), &meeting).await.unwrap();
    let started = server.only("POST", "/meet");
    assert_eq!(started.path, "/meet?onlineMeetingUri=adhoc");
    let body = started.body;
    for part in
        ["\"operationId\">op-3<", "\"importance\">Normal<", "\"subject\">C &amp; D<", "\"threadId\">t2<"]
    {
        assert!(body.contains(part), "{part}: {body}");
    }
    let operation = OperationId("op-2".to_owned());
    assert_eq!(client.add_messaging(&server.url("/add"), &operation, None).await.unwrap(), None);
    assert!(!server.only("POST", "/add").body.contains("<link"));
    client.add_participant(&server.url("/more"), &operation, "sip:carol@contoso.test").await.unwrap();
    assert!(server.only("POST", "/more").body.contains("name=\"to\">sip:carol@contoso.test<"));
}

#[tokio::test]
async fn a_message_is_sent_as_bare_text_and_without_a_charset_if_that_is_refused() {
    let server = healthy_with(|seen, _| {
        (seen.is("POST", "/messages") && seen.header("content-type")?.contains("charset"))
            .then(|| Answer::html(415))
    })
    .await;
    let client = signed_in(&server).await;
    assert_eq!(say(&client, &server).await.unwrap().as_deref(), Some("/messages/7"));
    let posts = server.requests("POST", "/messages");
    let types: Vec<_> = posts.iter().map(|post| post.header("content-type").unwrap()).collect();
    assert_eq!(types, ["text/plain; charset=utf-8", "text/plain"]);
    for post in posts {
        assert_eq!(post.path, "/messages?sessionContext=a%2fb&operationId=op+1");
        assert_eq!(post.body, "Gr\u{fc}\u{df}e <&");
    }
}

#[tokio::test]
async fn no_request_is_made_once_the_permit_is_withdrawn_not_even_a_second_time() {
    let permitted = Arc::new(AtomicBool::new(true));
    let withdraws = Arc::clone(&permitted);
    let server = healthy_with(move |seen, _| {
        seen.is("POST", "/messages").then(|| {
            withdraws.store(false, Ordering::SeqCst);
            Answer::html(415)
        })
    })
    .await;
    let settings = settings_of(SignInMethod::Password, server.url("/root"), &[]);
    let permit = Arc::clone(&permitted);
    let client = UcwaClient::with_permit(
        &clients(Duration::from_secs(20)),
        settings,
        SecretString::from(PASSWORD),
        Arc::new(move || permit.load(Ordering::SeqCst)),
    );
    client.sign_in(&|_| {}).await.unwrap();
    // The second try, without the charset, is not made any more.
    let error = say(&client, &server).await.unwrap_err();
    assert!(matches!(error, UcwaError::NotPermitted { resource: "sendMessage" }), "{error:?}");
    assert!(!error.was_sent());
    assert_eq!(server.requests("POST", "/messages").len(), 1);
    let polled = client.poll_events(&server.url("/events?ack=2"), None, &|_| ()).await.unwrap_err();
    assert!(matches!(polled, UcwaError::NotPermitted { .. }), "{polled:?}");
    assert_eq!(server.requests("GET", "/events").len(), 0);
}

#[tokio::test]
async fn a_refused_charset_is_tried_without_only_once() {
    let server = healthy_with(|seen, _| seen.is("POST", "/messages").then(|| Answer::html(415))).await;
    let client = signed_in(&server).await;
    let error = say(&client, &server).await.unwrap_err();
    assert_eq!((error.status(), error.action()), (Some(415), Action::FailThisOperation));
    assert_eq!(server.requests("POST", "/messages").len(), 2);
}

#[tokio::test]
async fn a_redirect_is_not_followed_with_a_token() {
    let foreign = healthy_with(|_, _| None).await;
    let target = foreign.url("/messages").to_string();
    let server = healthy_with(move |seen, _| {
        seen.is("POST", "/messages").then(|| Answer::new(307).header("location", &target))
    })
    .await;
    let client = signed_in(&server).await;
    let error = say(&client, &server).await.unwrap_err();
    assert_eq!((error.status(), error.action()), (Some(307), Action::Rediscover));
    assert!(foreign.all().is_empty());
}

#[tokio::test]
async fn a_poll_sends_its_parameters_and_keeps_the_servers() {
    let events = format!(
        "<events href=\"/events?ack=1\" xmlns=\"{NAMESPACE}\">{}</events>",
        link("next", "/events?ack=2")
    );
    let server =
        healthy_with(move |seen, _| seen.is("GET", "/events").then(|| Answer::xml(200, &events))).await;
    let client = signed_in(&server).await;
    let parameters = EventParameters {
        low: Duration::from_secs(15),
        medium: Duration::from_secs(5),
        timeout: Duration::from_mins(3),
        priority: 0,
    };
    let answer = client
        .poll_events(&server.url("/events?ack=1&timeout=900"), Some(&parameters), &|_| ())
        .await
        .unwrap();
    assert!(answer.batch.is_ok() && answer.body.contains("ack=2"));
    client.poll_events(&server.url("/events?ack=2"), None, &|_| ()).await.unwrap();
    let paths: Vec<_> = server.requests("GET", "/events").into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths, ["/events?ack=1&low=15&medium=5&timeout=180", "/events?ack=2"]);
}

#[tokio::test]
async fn a_poll_hands_out_what_it_can_not_read_and_refusals_as_errors() {
    let answers = Mutex::new(vec![
        Answer::reason(409, "PGetReplaced"),
        Answer::html(200),
        Answer::new(200).body("application/xml", b"<events \xff".to_vec()),
    ]);
    let server = healthy_with(move |seen, _| {
        seen.is("GET", "/events").then(|| answers.lock().unwrap().pop().unwrap())
    })
    .await;
    let client = signed_in(&server).await;
    let events = server.url("/events?ack=1");
    let torn = client.poll_events(&events, None, &|_| ()).await.unwrap();
    assert!(torn.batch.is_err());
    assert_eq!(torn.body, "<events \u{fffd}");
    let page = client.poll_events(&events, None, &|_| ()).await.unwrap_err();
    assert!(matches!(page, UcwaError::NotUcwa { .. }), "a proxy's page is no answer of the channel: {page}");
    let error = client.poll_events(&events, None, &|_| ()).await.unwrap_err();
    assert_eq!((error.status(), error.subcode()), (Some(409), Some("PGetReplaced")));
}

#[tokio::test]
async fn a_poll_on_which_nothing_comes_is_given_up_after_its_time_and_can_be_asked_again() {
    let bound = Bound::bind().await;
    let (base, issued, polls) = (bound.base.clone(), AtomicUsize::new(0), AtomicUsize::new(0));
    let events = format!(
        "<events href=\"/events?ack=1\" xmlns=\"{NAMESPACE}\">{}</events>",
        link("next", "/events?ack=2")
    );
    let server = bound.serve(move |seen| {
        let answer = match seen.is("GET", "/events").then(|| polls.fetch_add(1, Ordering::SeqCst)) {
            // The connection stays, and nothing comes.
            Some(0) => None,
            Some(_) => Some(Answer::xml(200, &events)),
            None => Some(healthy(&base, &seen, &issued, &|_| true)),
        };
        async move {
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        }
    });
    let client = client_polling(SignInMethod::Password, server.url("/root"), &[], Duration::from_millis(500));
    client.sign_in(&|_| {}).await.unwrap();
    let parameters = EventParameters {
        low: Duration::from_secs(15),
        medium: Duration::from_secs(5),
        timeout: Duration::from_secs(1),
        priority: 0,
    };
    let cursor = server.url("/events?ack=1");
    let told = Mutex::new(Vec::new());
    let tell = |is_on_connection| told.lock().unwrap().push(is_on_connection);
    let silent = client.poll_events(&cursor, Some(&parameters), &tell).await.unwrap_err();
    assert_eq!(*told.lock().unwrap(), [true, false], "the server had the GET");
    assert!(matches!(silent, UcwaError::Timeout { sent: true, .. }), "{silent:?}");
    assert_eq!(silent.action(), Action::RepeatAsIs);
    let answer = client.poll_events(&cursor, Some(&parameters), &|_| ()).await.unwrap();
    assert!(answer.batch.is_ok());
    let paths: Vec<_> = server.requests("GET", "/events").into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths[0], paths[1], "the same is asked again");
}

#[tokio::test]
async fn an_answer_without_end_is_not_read() {
    let server = healthy_with(|seen, _| {
        seen.is("GET", "/thing").then(|| Answer::new(200).body("application/xml", vec![b' '; (4 << 20) + 1]))
    })
    .await;
    let client = signed_in(&server).await;
    let error = client.get(&server.url("/thing")).await.unwrap_err();
    assert!(matches!(error, UcwaError::TooLarge { limit: 4_194_304, .. }), "{error}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_a_transport_error_after_sending() {
    let broken = |seen: &Seen| {
        (seen.is("GET", "/thing") || seen.is("GET", "/events"))
            .then(|| Answer { broken: true, ..Answer::xml(200, "<resource rel=\"thing\"") })
    };
    let server = healthy_with(move |seen, _| broken(seen)).await;
    let client = signed_in(&server).await;
    let read = client.get(&server.url("/thing?secret=1")).await.unwrap_err();
    let polled = client.poll_events(&server.url("/events?ack=1"), None, &|_| ()).await.unwrap_err();
    for error in [read, polled] {
        assert!(error.is_transport() && error.was_sent(), "{error:?}");
        assert_eq!((error.status(), error.action()), (None, Action::RepeatAsIs));
        assert!(!ucwa_relay::error_chain(&error).contains("secret"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_goes_away_was_sent_to_or_not() {
    // The request is read and never answered.
    let bound = Bound::bind().await;
    let root = Url::parse(&format!("{}/root?secret=1", bound.base)).unwrap();
    let listener = bound.listener;
    let hanging_up = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 1024];
        assert!(socket.read(&mut buffer).await.unwrap() > 0);
        drop((socket, listener));
    });
    let client = client_of(root, &[]);
    let hung_up = client.sign_in(&|_| {}).await.unwrap_err();
    hanging_up.await.unwrap();
    assert!(hung_up.is_transport() && hung_up.was_sent(), "{hung_up:?}");
    // Now nobody listens there.
    let refused = client.sign_in(&|_| {}).await.unwrap_err();
    assert!(refused.is_transport() && !refused.was_sent(), "{refused:?}");
    for error in [hung_up, refused] {
        let sentence = ucwa_relay::error_chain(&error);
        assert!(sentence.contains("127.0.0.1") && !sentence.contains("secret"), "{sentence}");
    }
}

#[tokio::test]
async fn a_failed_tls_handshake_is_recognised() {
    let server = healthy_with(|_, _| None).await;
    let mut root = server.url("/root");
    root.set_scheme("https").unwrap();
    let error = client_of(root, &[]).sign_in(&|_| {}).await.unwrap_err();
    assert!(matches!(error, UcwaError::Tls { .. }), "{error:?}");
    assert!(error.is_transport() && !error.was_sent());
    assert_eq!(error.action(), Action::StopAccount);
}
