//! What the server counts and times, as Prometheus reads it at `/metrics`.
//!
//! Every metric has one function here, which fixes its name and its labels: labels come from short fixed lists, so that
//! no SIP URI, message text, token or address can ever become one. Without [`install`] (every command but the servers)
//! the functions do nothing.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::{
    archive::{fact::Direction, is_listed_rel},
    store::{AccountState, Due, OutboxState},
    ucwa::{EventBatch, EventKind},
};

/// Gauge: accounts of this node by state.
pub const ACCOUNTS: &str = "ucwa_relay_accounts";
/// Counter: events committed, by the resource they tell of and what happened to it.
pub const EVENTS: &str = "ucwa_relay_events_total";
/// Counter: rows that came into `messages`.
pub const MESSAGES_ARCHIVED: &str = "ucwa_relay_messages_archived_total";
/// Gauge: rows of `outbox` by state.
pub const OUTBOX_ROWS: &str = "ucwa_relay_outbox_rows";
/// Gauge: seconds for which the oldest row that could be sent by now has waited; 0 if none waits.
pub const OUTBOX_OLDEST: &str = "ucwa_relay_outbox_oldest_seconds";
/// Gauge: 1 while the database answers and takes what is written, else 0.
pub const DATABASE_UP: &str = "ucwa_relay_database_up";
/// Histogram: seconds from the insert of a row to its acceptance by the server.
pub const OUTBOX_LATENCY: &str = "ucwa_relay_outbox_latency_seconds";
/// Histogram: seconds that the writer took for one transaction.
pub const COMMIT_SECONDS: &str = "ucwa_relay_commit_seconds";
/// Histogram: rows that one transaction wrote.
pub const COMMIT_ROWS: &str = "ucwa_relay_commit_rows";
/// Counter: HTTP requests by UCWA operation and status.
pub const REQUESTS: &str = "ucwa_relay_requests_total";
/// Histogram: seconds of HTTP requests, without the parked ones.
pub const REQUEST_SECONDS: &str = "ucwa_relay_request_seconds";
/// Counter: times that an event channel had to be begun anew.
pub const RECONNECTS: &str = "ucwa_relay_reconnects_total";
/// Counter: actors that ended unexpectedly and were begun anew.
pub const RESTARTS: &str = "ucwa_relay_restarts_total";
/// Counter: payloads put into `event_quarantine`.
pub const QUARANTINED: &str = "ucwa_relay_quarantined_total";
/// Counter: what was removed by its age.
pub const PURGED: &str = "ucwa_relay_purged_total";
/// Gauge, always 1: which build runs.
pub const BUILD_INFO: &str = "ucwa_relay_build_info";

/// Seconds, from a commit on a fast disk to a command on a dying server.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Rows of one transaction.
const ROWS: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];

/// Why an event channel was begun anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconnect {
    /// Network, proxy or server trouble.
    Error,
    /// The server asked for `resync`.
    Resync,
    /// The server asked to `resume`.
    Resume,
    /// The server no longer knew the application.
    ApplicationLost,
}

impl Reconnect {
    const ALL: [Self; 4] = [Self::Error, Self::Resync, Self::Resume, Self::ApplicationLost];

    fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Resync => "resync",
            Self::Resume => "resume",
            Self::ApplicationLost => "application_lost",
        }
    }
}

/// An actor that a parent begins anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restarted {
    /// One signed-in account.
    Account,
    /// Its event channel.
    EventChannel,
    /// One of its conversations.
    Conversation,
}

impl Restarted {
    const ALL: [Self; 3] = [Self::Account, Self::EventChannel, Self::Conversation];

    fn as_str(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::EventChannel => "event_channel",
            Self::Conversation => "conversation",
        }
    }
}

/// What a payload was quarantined for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuarantineReason {
    /// A whole response that could not be read.
    Response,
    /// An event that the reference does not list, or one whose content could not be decoded.
    Event,
    /// A response that broke the interpreter.
    Interpreter,
    /// What was read could not be stored.
    Database,
}

impl QuarantineReason {
    const ALL: [Self; 4] = [Self::Response, Self::Event, Self::Interpreter, Self::Database];

    fn as_str(self) -> &'static str {
        match self {
            Self::Response => "response",
            Self::Event => "event",
            Self::Interpreter => "interpreter",
            Self::Database => "database",
        }
    }
}

/// Starts counting in this process; the handle writes what was counted. A second call gives the same handle.
///
/// # Errors
/// If the process has a recorder of other origin.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = INSTALLED.get() {
        return Ok(handle.clone());
    }
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Full(COMMIT_ROWS.to_owned()), &ROWS)?
        .install_recorder()?;
    describe();
    begin_at_zero();
    Ok(INSTALLED.get_or_init(|| handle).clone())
}

fn describe() {
    describe_gauge!(ACCOUNTS, "Accounts of this node by state, as in account_status");
    describe_counter!(EVENTS, "Events committed; rel: the resource (other: none that the reference lists)");
    describe_counter!(MESSAGES_ARCHIVED, "Rows that came into the table messages");
    describe_gauge!(OUTBOX_ROWS, "Rows of the table outbox by state");
    describe_gauge!(
        OUTBOX_OLDEST,
        Unit::Seconds,
        "For how long the oldest row that could be sent by now has waited; 0 if none waits"
    );
    describe_gauge!(DATABASE_UP, "1 while the database answers and takes what is written, else 0");
    describe_histogram!(
        OUTBOX_LATENCY,
        Unit::Seconds,
        "From the insert of a row to its acceptance by the server"
    );
    describe_histogram!(COMMIT_SECONDS, Unit::Seconds, "Duration of one transaction of the writer");
    describe_histogram!(COMMIT_ROWS, "Rows of the archive that one transaction of the writer wrote");
    describe_counter!(
        REQUESTS,
        "HTTP requests; status: the HTTP status, or timeout, tls, too_large, network"
    );
    describe_histogram!(REQUEST_SECONDS, Unit::Seconds, "Duration of HTTP requests, without the parked ones");
    describe_counter!(
        RECONNECTS,
        "Times that an event channel had to be begun anew, or its request repeated"
    );
    describe_counter!(RESTARTS, "Actors that ended unexpectedly and were begun anew");
    describe_counter!(QUARANTINED, "Payloads put into the table event_quarantine");
    describe_counter!(PURGED, "What retention removed; what: messages, conversations, payloads");
    describe_gauge!(BUILD_INFO, "Always 1; the label says which version runs");
}

/// Counters that have not counted yet are 0, not absent: an alert on their rate sees the first one.
fn begin_at_zero() {
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    for reason in Reconnect::ALL {
        counter!(RECONNECTS, "reason" => reason.as_str()).absolute(0);
    }
    for actor in Restarted::ALL {
        counter!(RESTARTS, "actor" => actor.as_str()).absolute(0);
    }
    for reason in QuarantineReason::ALL {
        counter!(QUARANTINED, "reason" => reason.as_str()).absolute(0);
    }
    count_purged(&Due::default());
    for direction in [Direction::Incoming, Direction::Outgoing] {
        for source in ["invitation", "event", "conversation_log"] {
            counter!(MESSAGES_ARCHIVED, "direction" => direction.as_str(), "source" => source).absolute(0);
        }
    }
}

/// How many accounts of this node are in a state.
pub fn set_accounts(state: AccountState, count: usize) {
    #[expect(clippy::cast_precision_loss, reason = "no machine holds so many accounts")]
    gauge!(ACCOUNTS, "state" => state.as_str()).set(count as f64);
}

/// How many rows of `outbox` are in a state.
pub fn set_outbox_rows(state: OutboxState, count: i64) {
    #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 rows")]
    gauge!(OUTBOX_ROWS, "state" => state.as_str()).set(count as f64);
}

/// For how long the oldest row that could be sent by now has waited.
pub fn set_outbox_oldest(waited: Duration) {
    gauge!(OUTBOX_OLDEST).set(waited.as_secs_f64());
}

/// What stands in `outbox` can't be asked at present: its gauges have no value, instead of one that may be long past.
pub fn forget_outbox() {
    for state in OutboxState::ALL {
        gauge!(OUTBOX_ROWS, "state" => state.as_str()).set(f64::NAN);
    }
    gauge!(OUTBOX_OLDEST).set(f64::NAN);
}

/// Whether the database answers and takes what is written.
pub fn set_database_up(up: bool) {
    gauge!(DATABASE_UP).set(if up { 1.0 } else { 0.0 });
}

/// Events were committed.
pub(crate) fn count_events(batch: &EventBatch) {
    for event in batch.senders.iter().flat_map(|sender| &sender.events) {
        let kind = match event.kind {
            EventKind::Added => "added",
            EventKind::Updated => "updated",
            EventKind::Deleted => "deleted",
            EventKind::Started => "started",
            EventKind::Completed => "completed",
            EventKind::Unknown(_) => "other",
        };
        let rel = if is_listed_rel(&event.rel) { event.rel.clone() } else { "other".to_owned() };
        counter!(EVENTS, "rel" => rel, "type" => kind).increment(1);
    }
}

/// A row came into `messages`.
pub(crate) fn count_archived(direction: Direction, source: &'static str) {
    counter!(MESSAGES_ARCHIVED, "direction" => direction.as_str(), "source" => source).increment(1);
}

/// The writer committed a transaction.
pub(crate) fn time_commit(duration: Duration, rows: usize) {
    histogram!(COMMIT_SECONDS).record(duration.as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "a transaction has a bounded number of rows")]
    histogram!(COMMIT_ROWS).record(rows as f64);
}

/// The server accepted a row of `outbox` so long after its insert.
pub(crate) fn time_outbox(latency: Duration) {
    histogram!(OUTBOX_LATENCY).record(latency.as_secs_f64());
}

/// An HTTP request ended. `operation` is the UCWA resource asked, `status` the HTTP status or what went wrong; parked
/// requests have no duration, since the server decides how long it holds them.
pub(crate) fn count_request(operation: &'static str, status: &str, duration: Option<Duration>) {
    counter!(REQUESTS, "operation" => operation, "status" => status.to_owned()).increment(1);
    if let Some(duration) = duration {
        histogram!(REQUEST_SECONDS, "operation" => operation).record(duration.as_secs_f64());
    }
}

/// An event channel was begun anew.
pub(crate) fn count_reconnect(reason: Reconnect) {
    counter!(RECONNECTS, "reason" => reason.as_str()).increment(1);
}

/// An actor was begun anew after an unexpected end.
pub(crate) fn count_restart(actor: Restarted) {
    counter!(RESTARTS, "actor" => actor.as_str()).increment(1);
}

/// A payload was put into `event_quarantine`.
pub(crate) fn count_quarantined(reason: QuarantineReason) {
    counter!(QUARANTINED, "reason" => reason.as_str()).increment(1);
}

/// Single events of a response that was committed were quarantined.
pub(crate) fn count_quarantined_events(count: usize) {
    counter!(QUARANTINED, "reason" => QuarantineReason::Event.as_str()).increment(count as u64);
}

/// Retention removed something.
pub(crate) fn count_purged(gone: &Due) {
    for (what, count) in
        [("messages", gone.messages), ("conversations", gone.conversations), ("payloads", gone.payloads)]
    {
        counter!(PURGED, "what" => what).increment(count.unsigned_abs());
    }
}
