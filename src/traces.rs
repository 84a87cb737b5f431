//! Traces for OpenTelemetry (`telemetry.otlp_endpoint`): one span for each sign-in, round of an event channel, commit of
//! such a round, and attempt to send a row, over OTLP as protobuf in HTTP.
//!
//! Spans bear ids of accounts and rows, counts and outcomes: never an address, a text or a token. They have a target of
//! their own, so that the log does not show them, and what else is traced in the process (libraries, the spans of the log)
//! does not leave it. Without an endpoint they cost one comparison each.
//!
//! Spans are gathered and sent by a thread of the SDK, which has a runtime of its own for it: a collector that is slow or
//! away holds up nobody. What it does not take is dropped, and the log says so once, until it takes spans again.
//!
//! Source: OpenTelemetry Protocol, section "OTLP/HTTP".

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use async_trait::async_trait;
use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracerProvider, Tracer},
};
use tokio::runtime::Runtime;
use tracing::{Metadata, Span};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::registry::LookupSpan;
use url::Url;

use crate::{
    identifiers::{AccountId, OutboxId},
    ucwa::EventBatch,
};

/// What marks a span as one of these.
const TARGET: &str = "ucwa_relay::traces";
/// How long a collector may take for one delivery.
const SEND_WITHIN: Duration = Duration::from_secs(10);
/// How long the last delivery may take when the server stops.
const FLUSH_WITHIN: Duration = Duration::from_secs(5);

/// One life of an account signs in.
pub(crate) fn sign_in(account: AccountId) -> Span {
    tracing::info_span!(
        target: TARGET, parent: None, "sign_in",
        account.id = account.0, otel.status_code = tracing::field::Empty
    )
}

/// A round of an event channel, from the request to the commit of what it brought.
pub(crate) fn event_round(account: AccountId) -> Span {
    tracing::info_span!(
        target: TARGET, parent: None, "event_round", otel.kind = "client",
        account.id = account.0, events = tracing::field::Empty, otel.status_code = tracing::field::Empty
    )
}

/// What a round brought.
pub(crate) fn brought(round: &Span, batch: &EventBatch) {
    if !round.is_disabled() {
        let events: usize = batch.senders.iter().map(|sender| sender.events.len()).sum();
        round.record("events", events);
    }
}

/// The commit of what a round brought, within the span of the round.
pub(crate) fn commit(facts: usize) -> Span {
    tracing::info_span!(target: TARGET, "commit", facts, otel.status_code = tracing::field::Empty)
}

/// An attempt to send a row of `outbox`.
pub(crate) fn send(account: AccountId, outbox: OutboxId, attempt: i64) -> Span {
    tracing::info_span!(
        target: TARGET, parent: None, "send", otel.kind = "client",
        account.id = account.0, outbox.id = outbox.0, attempt,
        outcome = tracing::field::Empty, otel.status_code = tracing::field::Empty
    )
}

/// How an attempt ended, in a word.
pub(crate) fn ended(send: &Span, outcome: &'static str) {
    send.record("outcome", outcome);
    if matches!(outcome, "failed" | "uncertain") {
        failed(send);
    }
}

/// It did not end well.
pub(crate) fn failed(span: &Span) {
    span.record("otel.status_code", "ERROR");
}

/// Whether this is a span that goes to a collector, and is none of the log's.
pub fn is_trace(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.target() == TARGET
}

/// What sends spans to a collector.
pub struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// Begins to send to a collector, without asking whether there is one.
    ///
    /// # Errors
    /// If the process can't have one more thread or socket, or the address can't be sent to.
    pub fn start(endpoint: &Url, node: &str) -> anyhow::Result<Self> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Collector::new(endpoint.clone())?)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(traces_url(endpoint))
            .with_timeout(SEND_WITHIN)
            .build()
            .context("telemetry.otlp_endpoint can't be sent to")?;
        let resource = Resource::builder()
            .with_service_name("ucwa-relay")
            .with_attributes([
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", node.to_owned()),
            ])
            .build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { provider })
    }

    /// What takes spans from the program.
    pub fn layer<S>(&self) -> OpenTelemetryLayer<S, Tracer>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span>,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("ucwa-relay"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
    }

    /// Sends what is left, for a few seconds at most, and ends.
    pub fn finish(self) {
        // What could not be sent was told by the collector's side already.
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_WITHIN) {
            tracing::debug!(%error, "the last spans were not taken");
        }
    }
}

/// `…/v1/traces` beneath the endpoint, as the specification of the exporter has it.
fn traces_url(endpoint: &Url) -> String {
    format!("{}/v1/traces", endpoint.as_str().trim_end_matches('/'))
}

/// Carries what the SDK has encoded. Used by the SDK's thread only, which waits for it.
struct Collector {
    endpoint: Url,
    runtime: Runtime,
    http: reqwest::Client,
    /// The last delivery failed, and the log says so.
    in_trouble: AtomicBool,
}

impl fmt::Debug for Collector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Collector").finish_non_exhaustive()
    }
}

impl Collector {
    fn new(endpoint: Url) -> anyhow::Result<Self> {
        // An error means that the process has a provider already, which is what is wanted.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let http = reqwest::Client::builder()
            .timeout(SEND_WITHIN)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .context("no HTTP client for telemetry.otlp_endpoint")?;
        Ok(Self { endpoint, runtime, http, in_trouble: AtomicBool::new(false) })
    }

    async fn carry(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        // An address may have a key of the collector in it, which is not for the log.
        let answer = self.http.execute(request.try_into()?).await.map_err(reqwest::Error::without_url)?;
        let status = answer.status();
        let mut response = Response::new(answer.bytes().await.map_err(reqwest::Error::without_url)?);
        *response.status_mut() = status;
        Ok(response)
    }

    /// Says once that spans are lost, and once that they are not any more.
    fn tell(&self, problem: Option<&str>) {
        let was = self.in_trouble.swap(problem.is_some(), Ordering::Relaxed);
        match problem {
            Some(problem) if !was => tracing::warn!(
                endpoint = %self.endpoint.origin().ascii_serialization(),
                problem,
                "the collector of traces takes none, so they are dropped; nothing else waits for it"
            ),
            None if was => tracing::info!("the collector of traces takes them again"),
            _ => {}
        }
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        // The thread that asks has no runtime, and nothing else to do.
        let answered = self.runtime.block_on(self.carry(request));
        match &answered {
            Ok(response) if response.status().is_success() => self.tell(None),
            Ok(response) => self.tell(Some(&format!("it answered {}", response.status()))),
            Err(error) => self.tell(Some(&crate::error_chain(error.as_ref()))),
        }
        answered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_go_beneath_the_endpoint() {
        for endpoint in ["http://127.0.0.1:4318", "http://127.0.0.1:4318/"] {
            assert_eq!(traces_url(&endpoint.parse().unwrap()), "http://127.0.0.1:4318/v1/traces");
        }
        let beneath = "https://collector.example/otlp/".parse().unwrap();
        assert_eq!(traces_url(&beneath), "https://collector.example/otlp/v1/traces");
    }
}
