//! Payloads that were not understood.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;

use super::StoreError;
use crate::{
    archive::fact::EventSender,
    identifiers::{AccountId, SessionId, SipUri},
};

/// Which rows of `event_quarantine`.
#[derive(Debug, Clone, Default)]
pub struct QuarantineFilter {
    /// Only of this account.
    pub account: Option<SipUri>,
    /// Those that were understood since, too.
    pub resolved: bool,
    /// At most so many, newest first.
    pub limit: i64,
}

/// A row of `event_quarantine` without its payload, which is content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QuarantineEntry {
    /// `id`.
    pub id: i64,
    /// SIP URI.
    pub account: String,
    /// `received_at`.
    pub received_at: Timestamp,
    /// What was not understood.
    pub reason: String,
    /// Length of the payload.
    pub payload_bytes: i64,
    /// `resolved_at`.
    pub resolved_at: Option<Timestamp>,
    /// `purged_at`: when the payload was removed by its age.
    pub purged_at: Option<Timestamp>,
}

/// A row of `event_quarantine` with its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantinedPayload {
    /// What a list says of it.
    pub entry: QuarantineEntry,
    /// Whose channel it came from.
    pub account: AccountId,
    /// The application in which its addresses mean something.
    pub session: Option<SessionId>,
    /// The raw event or response.
    pub payload: String,
    /// Whose event it is, if it is one.
    pub sender: Option<EventSender>,
}

/// Looking into the quarantine.
#[async_trait]
pub trait QuarantineStore: Send + Sync {
    /// Rows for people.
    async fn quarantine_entries(&self, filter: &QuarantineFilter)
    -> Result<Vec<QuarantineEntry>, StoreError>;
    /// One row with its payload.
    async fn quarantined(&self, id: i64) -> Result<Option<QuarantinedPayload>, StoreError>;
    /// Notes that a payload is understood now.
    async fn mark_resolved(&self, id: i64, at: Timestamp) -> Result<(), StoreError>;
}
