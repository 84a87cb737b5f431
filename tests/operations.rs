//! What whoever runs the server sees of it from outside: health, metrics, and who is refused.

mod support;

use std::net::TcpListener;

use serde_json::Value;
use support::{Relay, Simulate, eventually};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

async fn get(url: &str, headers: &[(&str, &str)]) -> Option<(u16, reqwest::header::HeaderMap, String)> {
    let mut request = reqwest::Client::new().get(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.ok()?;
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    Some((status, headers, answer.text().await.ok()?))
}

async fn answered(url: &str, headers: &[(&str, &str)]) -> (u16, reqwest::header::HeaderMap, String) {
    eventually(&format!("{url} answers"), async || get(url, headers).await).await
}

/// The value of one sample line.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_tell_how_it_is() {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let port = free_port();
    let mut relay = Relay::configure(&simulator, &format!("[admin]\nlisten = \"127.0.0.1:{port}\"\n"));
    relay.add_account(ALICE, "simulated");
    relay.add_account(BOB, "wrong");
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.account_state(BOB, "needs_attention").await;
    simulator.call("silent.dana@fabrikam.example", ALICE, "counted").await;
    relay.tool_ok(&[
        "send",
        "--from",
        ALICE,
        "--to",
        "sip:friend@fabrikam.example",
        "--wait",
        "counted, too",
    ]);

    let base = format!("http://127.0.0.1:{port}");
    let (status, headers, text) = answered(&format!("{base}/healthz"), &[]).await;
    assert_eq!((status, text.as_str()), (200, "ok\n"));
    for name in ["content-security-policy", "x-content-type-options", "referrer-policy"] {
        assert!(headers.contains_key(name), "{name} is missing");
    }
    let (status, _, text) = answered(&format!("{base}/readyz"), &[]).await;
    let ready: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(status, 200, "{text}");
    assert_eq!(ready["accounts"], serde_json::json!({ "needs_attention": 1, "online": 1 }));
    assert!(
        ready["reasons"][0]["detail"].as_str().is_some_and(|detail| detail.contains("password")),
        "{text}"
    );

    let metrics = eventually("the call and the row are counted", async || {
        let (_, _, text) = get(&format!("{base}/metrics"), &[]).await?;
        let incoming =
            sample(&text, "ucwa_relay_messages_archived_total{direction=\"incoming\",source=\"invitation\"}");
        (incoming >= Some(1.0) && sample(&text, "ucwa_relay_outbox_latency_seconds_count") >= Some(1.0))
            .then_some(text)
    })
    .await;
    for (name, least) in [
        ("ucwa_relay_accounts{state=\"online\"}", 1.0),
        ("ucwa_relay_accounts{state=\"needs_attention\"}", 1.0),
        ("ucwa_relay_accounts{state=\"stalled\"}", 0.0),
        ("ucwa_relay_events_total{rel=\"messagingInvitation\",type=\"started\"}", 1.0),
        ("ucwa_relay_outbox_rows{state=\"queued\"}", 0.0),
        ("ucwa_relay_outbox_oldest_seconds", 0.0),
        ("ucwa_relay_database_up", 1.0),
        ("ucwa_relay_commit_seconds_count", 1.0),
        ("ucwa_relay_commit_rows_sum", 1.0),
        ("ucwa_relay_requests_total{operation=\"applications\",status=\"201\"}", 1.0),
        ("ucwa_relay_request_seconds_count{operation=\"startMessaging\"}", 1.0),
        ("ucwa_relay_reconnects_total{reason=\"resync\"}", 0.0),
        ("ucwa_relay_restarts_total{actor=\"account\"}", 0.0),
        ("ucwa_relay_quarantined_total{reason=\"event\"}", 0.0),
    ] {
        assert!(sample(&metrics, name).is_some_and(|value| value >= least), "{name} in\n{metrics}");
    }
    assert!(metrics.contains("ucwa_relay_build_info{version=\""), "{metrics}");
    for secret in ["sip:", "contoso", "counted", "cwt="] {
        let samples = metrics.lines().filter(|line| !line.starts_with('#'));
        assert!(samples.into_iter().all(|line| !line.contains(secret)), "{secret} in\n{metrics}");
    }

    let (status, _, _) = answered(&format!("{base}/metrics"), &[("host", "evil.example")]).await;
    assert_eq!(status, 421);
    let (status, _, _) =
        answered(&format!("{base}/healthz"), &[("host", &format!("localhost:{port}"))]).await;
    assert_eq!(status, 200);
    assert!(relay.server().terminate());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_token_and_a_certificate_it_is_for_those_who_have_the_token() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let port = free_port();
    let mut relay = Relay::configure(
        &simulator,
        &format!(
            "[admin]\nlisten = \"127.0.0.1:{port}\"\ntoken_file = \"token\"\ntls_cert_file = \"tls.crt\"\n\
             tls_key_file = \"tls.key\"\nnames = [\"relay.contoso.example\"]\n"
        ),
    );
    let authority = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let folder = relay.folder.path().to_owned();
    std::fs::write(folder.join("token"), "a-token-that-nobody-guesses\n").expect("written");
    std::fs::write(folder.join("tls.crt"), authority.cert.pem()).expect("written");
    std::fs::write(folder.join("tls.key"), authority.signing_key.serialize_pem()).expect("written");
    relay.start();

    let trusted = reqwest::Certificate::from_pem(authority.cert.pem().as_bytes()).expect("a certificate");
    let http = reqwest::Client::builder().tls_certs_only([trusted]).build().expect("a client");
    let ask = async |path: &str, token: Option<&str>| {
        let mut request = http.get(format!("https://localhost:{port}{path}"));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request.send().await.ok().map(|answer| answer.status().as_u16())
    };
    assert_eq!(eventually("healthz answers", async || ask("/healthz", None).await).await, 200);
    assert_eq!(ask("/readyz", None).await, Some(200));
    assert_eq!(ask("/metrics", None).await, Some(401));
    assert_eq!(ask("/metrics", Some("another-token-of-that-length")).await, Some(401));
    assert_eq!(ask("/metrics", Some("a-token-that-nobody-guesses")).await, Some(200));

    // Wrong tokens count wherever they are tried: who guesses has to wait, even with the right one then.
    for path in ["/readyz", "/readyz", "/metrics", "/metrics"] {
        let answered = if path == "/readyz" { 200 } else { 401 };
        assert_eq!(ask(path, Some("another-token-of-that-length")).await, Some(answered), "{path}");
    }
    for path in ["/metrics", "/outbox"] {
        assert_eq!(ask(path, Some("a-token-that-nobody-guesses")).await, Some(429), "{path}");
    }
    // Health is told to everybody, and asking without a token is no guess.
    assert_eq!(ask("/readyz", Some("a-token-that-nobody-guesses")).await, Some(200));
    assert_eq!(ask("/metrics", None).await, Some(401));
    let server = relay.server();
    assert!(server.terminate());
    assert!(!server.stderr().contains("a-token-that-nobody-guesses"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_taken_stops_no_account() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("it has an address");
    let mut relay = Relay::configure(&simulator, &format!("[admin]\nlisten = \"{address}\"\n"));
    relay.add_account(ALICE, "simulated");
    relay.start();
    relay.account_state(ALICE, "online").await;
    assert!(relay.server().stderr().contains("can't be listened on"), "{}", relay.server().stderr());
    drop(taken);
    let (status, _, _) = answered(&format!("http://{address}/healthz"), &[]).await;
    assert_eq!(status, 200);
}
