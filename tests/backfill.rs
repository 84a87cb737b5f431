//! Reading conversation logs over real sockets, against a small scripted server, into a real database.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use jiff::{Timestamp, ToSpan};
use secrecy::SecretString;
use support::{
    sql::{Kind, Place},
    take_leases,
};
use tokio::net::TcpListener;
use ucwa_relay::{
    account::{
        AccountSettings,
        backfill::{self, BackfillHints},
        delivery::DeliveryContext,
        event_channel::ChannelHealth,
    },
    archive::{retry::RetryPolicy, workspace::RuleSettings},
    identifiers::SipUri,
    store::{
        self, Auth, Gap, HistoryFilter, HistoryRow, InvitationPolicy, NewAccount, Role, SecretSource,
        StoreSettings,
    },
    ucwa::{
        Application, EventParameters, HttpClients, HttpSettings, NewApplication, SignInMethod,
        SignInSettings, UcwaClient, Url,
    },
};

const NAMESPACE: &str = "http://schemas.microsoft.com/rtc/2012/03/ucwa";
/// A condition that has not come true by then never will.
const PATIENCE: Duration = Duration::from_secs(120);

// ------------------------------------------------------------------------------------------------ the server

type Requests = Arc<Mutex<Vec<String>>>;

fn resource(rel: &str, href: &str, inside: &str) -> String {
    format!("<resource rel=\"{rel}\" href=\"{href}\" xmlns=\"{NAMESPACE}\">{inside}</resource>")
}

fn link(rel: &str, href: &str) -> String {
    format!("<link rel=\"{rel}\" href=\"{href}\"/>")
}

fn property(name: &str, value: &str) -> String {
    format!("<property name=\"{name}\">{value}</property>")
}

fn log(href: &str, thread: &str, created: Timestamp) -> String {
    let bob = resource(
        "conversationLogRecipient",
        "/r/1",
        &(link("contact", "/people/7")
            + &property("displayName", "Bob")
            + &property("sipUri", "bob@contoso.test")),
    );
    let inside = link("conversationLogTranscripts", &format!("{href}/transcripts"))
        + &link("markAsRead", &format!("{href}/markAsRead"))
        + &property("creationTime", &created.to_string())
        + &property("direction", "Incoming")
        + &property("threadId", thread)
        + &bob;
    resource("conversationLog", href, &inside)
}

fn transcript(at: Timestamp, who: &str, text: &str) -> String {
    let said =
        resource("messageTranscript", "/said", &link("plainMessage", &format!("data:text/plain,{text}")));
    resource(
        "conversationLogTranscript",
        "/t",
        &(link(who, "/people/7") + &property("timeStamp", &at.to_string()) + &said),
    )
}

/// Serves sign-in, and what `special` answers: a status and a body.
async fn serve(special: impl Fn(&str) -> Option<(u16, String)> + Send + Sync + 'static) -> (Url, Requests) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let requests = Requests::default();
    let (root, seen, special) =
        (Url::parse(&format!("{base}/root")).unwrap(), Arc::clone(&requests), Arc::new(special));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (base, seen, special) = (base.clone(), Arc::clone(&seen), Arc::clone(&special));
            let service = service_fn(move |request: Request<Incoming>| {
                let path = request.uri().path_and_query().unwrap().to_string();
                seen.lock().unwrap().push(format!("{} {path}", request.method()));
                let authorized = request.headers().contains_key("authorization");
                let answer = special(&path).unwrap_or_else(|| standard(&path));
                let mut response =
                    Response::builder().header("content-type", "application/vnd.microsoft.com.ucwa+xml");
                response = if path == "/root" || path == "/token" || authorized {
                    if path == "/token" {
                        response = Response::builder().header("content-type", "application/json");
                    }
                    response.status(answer.0)
                } else {
                    response.status(401).header(
                        "www-authenticate",
                        format!("MsRtcOAuth href=\"{base}/token\",grant_type=\"urn:microsoft.rtc:windows,password\""),
                    )
                };
                std::future::ready(Ok::<_, Infallible>(
                    response.body(Full::new(Bytes::from(answer.1))).unwrap(),
                ))
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), service));
        }
    });
    (root, requests)
}

fn standard(path: &str) -> (u16, String) {
    match path {
        "/root" => (200, resource("root", "/root", &link("user", "/user"))),
        "/token" => {
            (200, "{\"access_token\":\"cwt=1\",\"expires_in\":28800,\"token_type\":\"Bearer\"}".to_owned())
        }
        "/user" => (200, resource("user", "/user", &link("applications", "/applications"))),
        "/applications" | "/applications/1" => (200, application("")),
        _ => (404, format!("<reason xmlns=\"{NAMESPACE}\"><code>NotFound</code></reason>")),
    }
}

fn application(logs: &str) -> String {
    let inside =
        link("events", "/events?ack=1") + &resource("me", "/me", "") + &resource("communication", "/c", logs);
    resource("application", "/applications/1", &inside)
}

// ------------------------------------------------------------------------------------------------ the account

struct Account {
    context: Arc<DeliveryContext>,
    application: Application,
    _place: Place,
}

async fn signed_in(root: Url, kind: Kind) -> Account {
    let place = Place::new(kind).await;
    let settings = StoreSettings {
        url: place.url(),
        max_connections: 2,
        commit_interval: Duration::from_millis(2),
        full_text: false,
        node: "node".to_owned(),
        lease_ttl: Duration::from_secs(3600),
        rules: RuleSettings {
            retry_uncertain: false,
            typing: false,
            plain_from_html: str::to_owned,
            retry: RetryPolicy { base: Duration::from_secs(1), cap: Duration::from_secs(1) },
            max_attempts: 1,
        },
    };
    let store = store::connect(&settings, Role::Server).await.unwrap();
    let sip_uri: SipUri = "sip:alice@contoso.test".parse().unwrap();
    let account = NewAccount {
        sip_uri: sip_uri.clone(),
        username: "alice".to_owned(),
        auth: Auth::Password,
        secret: SecretSource::Missing,
        invitations: None,
    };
    let account = store.add_account(&account).await.unwrap();
    take_leases(&store).await;
    let session = store.begin_session(account, "/applications/1", "/events?ack=1", "").await.unwrap();
    let http = HttpSettings {
        extra_ca_pem: None,
        request_timeout: Duration::from_secs(20),
        poll_margin: Duration::from_secs(20),
        connect_timeout: Duration::from_secs(10),
        allow_http: true,
    };
    let sign_in = SignInSettings {
        sip_uri,
        username: "alice".to_owned(),
        method: SignInMethod::Password,
        discovery_url: Some(root.clone()),
        trusted_domains: Vec::new(),
        allow_http: true,
    };
    let client = UcwaClient::new(&HttpClients::new(&http).unwrap(), sign_in, SecretString::from("geheim"));
    let applications = client.sign_in(&|_| {}).await.unwrap().applications;
    let request = NewApplication {
        culture: "en-US".to_owned(),
        endpoint_id: "e".to_owned(),
        user_agent: "test".to_owned(),
    };
    let (application, _) = client.create_application(&applications, &request).await.unwrap();
    let settings = AccountSettings {
        discovery_url: Some(root),
        trusted_domains: Vec::new(),
        allow_http: true,
        round: Duration::from_secs(210),
        poll: EventParameters {
            low: Duration::from_secs(5),
            medium: Duration::from_secs(5),
            timeout: Duration::from_secs(180),
            priority: 0,
        },
        culture: "en-US".to_owned(),
        presence: "Online".to_owned(),
        invitations: InvitationPolicy::Accept,
        idle_conversation: Duration::from_secs(60),
        settle_after: Duration::from_secs(60),
        retry_uncertain: false,
        max_attempts: 1,
        retry: RetryPolicy { base: Duration::from_secs(1), cap: Duration::from_secs(1) },
        node: "node".to_owned(),
    };
    let epoch = store.leases().epoch(account).unwrap();
    let context = Arc::new(DeliveryContext {
        store,
        client,
        account,
        session: session.id,
        epoch,
        start_messaging: None,
        start_online_meeting: None,
        groups_meet: AtomicBool::new(false),
        may_meet: AtomicBool::new(true),
        channel: Arc::new(ChannelHealth::default()),
        settings: Arc::new(settings),
    });
    Account { context, application, _place: place }
}

impl Account {
    async fn record_gap(&self, from: Timestamp, to: Timestamp) {
        let Account { context, .. } = self;
        context.store.record_stretch(context.account, context.session, from, to, "a test").await.unwrap();
    }

    async fn gaps(&self) -> Vec<Gap> {
        self.context.store.coverage(None).await.unwrap().remove(0).gaps
    }

    async fn history(&self) -> Vec<HistoryRow> {
        self.context.store.history(&HistoryFilter { limit: 100, ..HistoryFilter::default() }).await.unwrap()
    }

    /// Reads logs until the gap satisfies `condition`.
    async fn reads_until(&self, condition: impl Fn(&Gap) -> bool) -> Gap {
        let run = backfill::run(
            Arc::clone(&self.context),
            self.application.href.clone(),
            self.application.conversation_logs(),
            Arc::new(BackfillHints::default()),
        );
        let deadline = Instant::now() + PATIENCE;
        let watch = async {
            loop {
                let gap = self.gaps().await.remove(0);
                if condition(&gap) {
                    return gap;
                }
                assert!(Instant::now() < deadline, "waited in vain: {gap:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = run => panic!("the backfill ended: {:?}", self.gaps().await),
            gap = watch => gap,
        }
    }
}

// ------------------------------------------------------------------------------------------------ tests

async fn a_gap_is_filled_from_every_page_of_every_log_as_soon_as_they_can_be_read(kind: Kind) {
    let from = Timestamp::now() - 1.hour();
    let tried = AtomicUsize::new(0);
    let (root, requests) = serve(move |path| {
        let answer = match path {
            "/applications" | "/applications/1" => application(&link("conversationLogs", "/logs?kind=%2B")),
            "/logs?kind=%2B&limit=100" if tried.fetch_add(1, Ordering::SeqCst) == 0 => {
                let reason = "<code>ServiceFailure</code><subcode>ExchangeTimeout</subcode>";
                return Some((500, format!("<reason xmlns=\"{NAMESPACE}\">{reason}</reason>")));
            }
            "/logs?kind=%2B&limit=100" => {
                let old = log("/logs/3", "old", from - 16.minutes());
                resource(
                    "conversationLogs",
                    "/logs",
                    &(link("conversationLog", "/logs/1") + &link("conversationLog", "/logs/2") + &old),
                )
            }
            "/logs/1" => log("/logs/1", "t", from - 14.minutes()),
            "/logs/1/transcripts" => resource(
                "conversationLogTranscripts",
                "/x",
                &(transcript(from + 9.seconds(), "me", "third")
                    + &transcript(from + 1.second(), "contact", "first")
                    + &link("nextConversationLogTranscripts", "/logs/1/more")),
            ),
            // The last page leads back to the first.
            "/logs/1/more" => resource(
                "nextConversationLogTranscripts",
                "/x",
                &(transcript(from + 5.seconds(), "contact", "second")
                    + &link("nextConversationLogTranscripts", "/logs/1/transcripts")),
            ),
            // `/logs/2` was deleted by its owner.
            _ => return None,
        };
        Some((200, answer))
    })
    .await;
    let account = signed_in(root, kind).await;
    account.record_gap(from, from + 10.minutes()).await;
    let gap = account.reads_until(|gap| gap.detail.is_some()).await;
    assert!(!gap.backfilled && gap.detail.as_deref().unwrap().contains("ExchangeTimeout"), "{gap:?}");
    let gap = account.reads_until(|gap| gap.backfilled).await;
    assert_eq!(gap.detail, None);
    let told: Vec<_> = account
        .history()
        .await
        .into_iter()
        .map(|row| (row.body, row.sender.unwrap(), row.source, row.thread_id.unwrap()))
        .collect();
    let row = |body: &str, sender: &str| {
        (body.to_owned(), format!("sip:{sender}@contoso.test"), "conversation_log".to_owned(), "t".to_owned())
    };
    assert_eq!(told, [row("first", "bob"), row("second", "bob"), row("third", "alice")]);
    let requests = requests.lock().unwrap().clone();
    assert!(requests.contains(&"GET /logs/2".to_owned()));
    assert!(!requests.iter().any(|request| request.contains("markAsRead") || request.contains("/logs/3/")));
    let written: Vec<_> = requests.iter().filter(|request| !request.starts_with("GET")).collect();
    assert_eq!(written, ["POST /token", "POST /applications"], "the mailbox is only read");
    let next = account.context.store.backfills(account.context.account).await.unwrap().remove(0);
    let minutes = next.due_at.duration_since(next.first_at.unwrap()).as_mins();
    assert_eq!((next.runs, minutes), (1, 5), "it is read again");
}

async fn a_server_without_logs_leaves_the_gap_visible(kind: Kind) {
    let (root, requests) = serve(|_| None).await;
    let account = signed_in(root, kind).await;
    account.record_gap(Timestamp::now() - 1.minute(), Timestamp::now()).await;
    let gap = account.reads_until(|gap| gap.detail.is_some()).await;
    assert!(!gap.backfilled && gap.detail.unwrap().contains("no conversation logs"));
    assert!(!requests.lock().unwrap().iter().any(|request| request.contains("logs")));
}

async fn a_mailbox_that_is_too_old_is_asked_once(kind: Kind) {
    let (root, requests) = serve(|path| match path {
        "/applications" | "/applications/1" => Some((200, application(&link("conversationLogs", "/logs")))),
        "/logs?limit=100" => {
            let reason = "<code>ServiceFailure</code><subcode>InvalidExchangeServerVersion</subcode>";
            Some((500, format!("<reason xmlns=\"{NAMESPACE}\">{reason}</reason>")))
        }
        _ => None,
    })
    .await;
    let account = signed_in(root, kind).await;
    account.record_gap(Timestamp::now() - 1.minute(), Timestamp::now()).await;
    let run = backfill::run(
        Arc::clone(&account.context),
        account.application.href.clone(),
        account.application.conversation_logs(),
        Arc::new(BackfillHints::default()),
    );
    tokio::time::timeout(PATIENCE, run).await.expect("it does not try again");
    let gap = account.gaps().await.remove(0);
    assert!(!gap.backfilled && gap.detail.unwrap().contains("Exchange Server without"));
    assert_eq!(requests.lock().unwrap().iter().filter(|request| request.contains("/logs")).count(), 1);
}

on_both_databases!(
    "current_thread":
    a_gap_is_filled_from_every_page_of_every_log_as_soon_as_they_can_be_read,
    a_server_without_logs_leaves_the_gap_visible,
    a_mailbox_that_is_too_old_is_asked_once,
);
