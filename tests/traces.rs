//! Traces by OpenTelemetry: what a collector gets, and that nobody depends on it.

mod support;

use std::{
    future::{Ready, ready},
    net::TcpListener,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst},
    },
};

use axum::{Router, body::Bytes, extract::State, http::StatusCode, routing::post};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{Span, status::StatusCode as SpanStatus},
};
use prost::Message as _;
use support::{Relay, Simulate, eventually};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";
const IN_TROUBLE: &str = "the collector of traces takes none";

/// A collector that keeps what it is sent, or refuses it.
#[derive(Clone)]
struct Collector {
    answer: Arc<AtomicU16>,
    asked: Arc<AtomicUsize>,
    kept: Arc<Mutex<Vec<(Resource, Span)>>>,
}

impl Collector {
    async fn start(answer: u16) -> (Self, String) {
        let collector = Self { answer: Arc::new(answer.into()), asked: Arc::default(), kept: Arc::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it has an address"));
        let router = Router::new().route("/v1/traces", post(Self::take)).with_state(collector.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (collector, url)
    }

    fn take(State(collector): State<Self>, body: Bytes) -> Ready<StatusCode> {
        collector.asked.fetch_add(1, SeqCst);
        let answer = StatusCode::from_u16(collector.answer.load(SeqCst)).expect("a status");
        if answer.is_success() {
            let request = ExportTraceServiceRequest::decode(body).expect("OTLP in protobuf");
            let mut kept = collector.kept.lock().expect("nobody panics with it");
            for resource in request.resource_spans {
                let of = resource.resource.expect("who sends is said");
                let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                kept.extend(spans.map(|span| (of.clone(), span)));
            }
        }
        ready(answer)
    }

    fn spans(&self, name: &str) -> Vec<Span> {
        let kept = self.kept.lock().expect("nobody panics with it");
        kept.iter().map(|(_, span)| span).filter(|span| span.name == name).cloned().collect()
    }
}

fn text_of(attributes: &[KeyValue], key: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == key);
    match found.and_then(|attribute| attribute.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{key} is {other:?} of {attributes:?}"),
    }
}

/// A relay that sends its spans there, and soon.
fn relay(simulator: &Simulate, endpoint: &str) -> Relay {
    let more =
        format!("[telemetry]\nlog = \"warn,ucwa_relay::traces=info\"\notlp_endpoint = \"{endpoint}\"\n");
    let mut relay = Relay::configure(simulator, &more);
    relay.add_account(ALICE, "simulated");
    relay.start_through(&["env"], &[("OTEL_BSP_SCHEDULE_DELAY", "100")]);
    relay
}

fn send(relay: &Relay, text: &str) {
    relay.tool_ok(&["send", "--from", ALICE, "--to", "sip:friend@fabrikam.example", "--wait", text]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_what_was_done_and_nothing_that_was_said() {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let (collector, endpoint) = Collector::start(200).await;
    let mut relay = relay(&simulator, &endpoint);
    relay.account_state(ALICE, "online").await;
    relay.add_account(BOB, "wrong");
    relay.account_state(BOB, "needs_attention").await;
    simulator.call("silent.dana@fabrikam.example", ALICE, "comes in").await;
    send(&relay, "goes out");
    assert!(relay.server().terminate());
    // The last spans are sent before the process ends.
    assert!(!collector.spans("event_round").is_empty());

    let signed_in = collector.spans("sign_in");
    let is_failed = |span: &Span| {
        span.status.as_ref().is_some_and(|status| status.code == i32::from(SpanStatus::Error as u8))
    };
    assert_eq!((signed_in.len(), signed_in.iter().filter(|span| is_failed(span)).count()), (2, 1));
    let [sent] = collector.spans("send").try_into().expect("one row was sent");
    assert_eq!(text_of(&sent.attributes, "outbox.id"), "1");
    assert_eq!(text_of(&sent.attributes, "attempt"), "1");
    assert_eq!(text_of(&sent.attributes, "outcome"), "accepted");
    assert_eq!(text_of(&sent.attributes, "account.id"), text_of(&signed_in[0].attributes, "account.id"));
    assert!(sent.parent_span_id.is_empty() && !is_failed(&sent));
    let rounds = collector.spans("event_round");
    let commits = collector.spans("commit");
    assert!(!commits.is_empty());
    for commit in commits {
        let round = rounds.iter().find(|round| round.span_id == commit.parent_span_id);
        let round = round.expect("it belongs to a round");
        assert_eq!(round.trace_id, commit.trace_id);
        assert!(round.start_time_unix_nano <= commit.start_time_unix_nano);
        assert!(commit.end_time_unix_nano <= round.end_time_unix_nano);
    }
    assert!(rounds.iter().any(|round| text_of(&round.attributes, "events") != "0"));

    for (resource, span) in collector.kept.lock().expect("nobody panics with it").iter() {
        assert_eq!(text_of(&resource.attributes, "service.name"), "ucwa-relay");
        assert!(["sign_in", "event_round", "commit", "send"].contains(&span.name.as_str()), "{}", span.name);
        let all = format!("{span:?}");
        for secret in ["sip:", "contoso", "fabrikam", "comes in", "goes out", "cwt=", "simulated"] {
            assert!(!all.contains(secret), "{secret} in {all}");
        }
    }
    let log = relay.server().stderr();
    assert!(!log.contains("event_round") && !log.contains(IN_TROUBLE), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_refuses_is_told_of_once_until_it_takes_spans_again() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let (collector, endpoint) = Collector::start(503).await;
    let mut relay = relay(&simulator, &endpoint);
    relay.account_state(ALICE, "online").await;
    for number in 1..=3 {
        let before = collector.asked.load(SeqCst);
        send(&relay, &format!("row {number}"));
        eventually("the collector is asked again", async || {
            (collector.asked.load(SeqCst) > before).then_some(())
        })
        .await;
    }
    collector.answer.store(200, SeqCst);
    send(&relay, "row 4");
    eventually("it gets spans", async || (!collector.spans("send").is_empty()).then_some(())).await;
    assert!(relay.server().terminate());
    let log = relay.server().stderr();
    assert_eq!(log.matches(IN_TROUBLE).count(), 1, "{log}");
    assert!(log.contains("it answered 503"), "{log}");
    assert_eq!(log.matches("the collector of traces takes them again").count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_not_there_harms_nothing() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("an address");
    let mut relay = relay(&simulator, &format!("http://{closed}/key-of-the-collector"));
    relay.account_state(ALICE, "online").await;
    simulator.call("silent.dana@fabrikam.example", ALICE, "comes in").await;
    send(&relay, "goes out");
    eventually("the call is archived", async || {
        relay.tool_ok(&["history"]).contains("comes in").then_some(())
    })
    .await;
    assert!(relay.server().terminate());
    let log = relay.server().stderr();
    assert_eq!(log.matches(IN_TROUBLE).count(), 1, "{log}");
    assert!(!log.contains("key-of-the-collector"), "{log}");
}
