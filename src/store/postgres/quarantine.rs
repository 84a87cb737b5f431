//! Payloads that were not understood.

use async_trait::async_trait;
use jiff::Timestamp;

use super::{PostgresStore, column::Time};
use crate::{
    identifiers::SipUri,
    store::{
        QuarantineEntry, QuarantineFilter, QuarantineStore, QuarantinedPayload, StoreError, rows,
        trouble::failed,
    },
};

#[async_trait]
impl QuarantineStore for PostgresStore {
    async fn quarantine_entries(
        &self,
        filter: &QuarantineFilter,
    ) -> Result<Vec<QuarantineEntry>, StoreError> {
        let failed = failed("listing the quarantine");
        sqlx::query(
            "SELECT q.id, a.sip_uri, q.received_at, q.reason, octet_length(q.payload)::bigint AS payload_bytes,
                    q.resolved_at, q.purged_at
               FROM event_quarantine q JOIN accounts a ON a.id = q.account_id
              WHERE ($1::text IS NULL OR a.sip_uri = $1) AND ($2 OR q.resolved_at IS NULL)
              ORDER BY q.id DESC
              LIMIT $3",
        )
        .bind(filter.account.as_ref().map(SipUri::as_str))
        .bind(filter.resolved)
        .bind(filter.limit)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| rows::quarantine_entry(row).map_err(&failed))
        .collect()
    }

    async fn quarantined(&self, id: i64) -> Result<Option<QuarantinedPayload>, StoreError> {
        let failed = failed("reading a quarantined payload");
        sqlx::query(
            "SELECT q.id, a.sip_uri, q.account_id, q.session_id, q.received_at, q.reason, q.payload, q.sender,
                    octet_length(q.payload)::bigint AS payload_bytes, q.resolved_at, q.purged_at
               FROM event_quarantine q JOIN accounts a ON a.id = q.account_id
              WHERE q.id = $1",
        )
        .bind(id)
        .fetch_optional(&self.readers)
        .await
        .map_err(&failed)?
        .map(|row| rows::quarantined_payload(&row).map_err(&failed))
        .transpose()
    }

    async fn mark_resolved(&self, id: i64, at: Timestamp) -> Result<(), StoreError> {
        self.writer
            .run("noting that a payload is understood", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "UPDATE event_quarantine SET resolved_at = coalesce(resolved_at, $2) WHERE id = $1",
                    )
                    .bind(id)
                    .bind(Time(at))
                    .execute(connection)
                    .await
                    .map_err(failed("noting that a payload is understood"))
                    .map(drop)
                })
            })
            .await
    }
}
