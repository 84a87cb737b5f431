//! Gaps, backfills and coverage.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use sqlx::Row;

use super::{
    PostgresStore,
    archive::insert_gap,
    column::{Time, text},
};
use crate::{
    identifiers::{AccountId, SessionId, SipUri},
    store::{AccountCoverage, Backfill, CoverageStore, StoreError, rows, trouble::failed},
};

/// A hint that is older than this has been followed as often as it deserves, whatever hints came since.
const HINT_LASTS: SignedDuration = SignedDuration::from_hours(3);

#[async_trait]
impl CoverageStore for PostgresStore {
    async fn record_stretch(
        &self,
        account: AccountId,
        session: SessionId,
        from: Timestamp,
        to: Timestamp,
        reason: &str,
    ) -> Result<(), StoreError> {
        let reason = text(reason).into_owned();
        self.run_for(account, "recording a gap", false, move |connection| {
            Box::pin(async move { insert_gap(connection, account, session, from, to, &reason).await })
        })
        .await
    }

    async fn backfills(&self, account: AccountId) -> Result<Vec<Backfill>, StoreError> {
        let failed = failed("reading what is to be backfilled");
        sqlx::query(
            "SELECT b.id, b.from_at, b.due_at, b.first_at, b.runs, NOT coalesce(g.backfilled, true) AS open_gap
               FROM backfills b LEFT JOIN gaps g ON g.account_id = b.account_id AND g.id = b.gap_id
              WHERE b.account_id = $1
              ORDER BY b.due_at, b.id",
        )
        .bind(account.0)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| rows::backfill(row).map_err(&failed))
        .collect()
    }

    async fn request_backfill(
        &self,
        account: AccountId,
        from: Timestamp,
        due_at: Timestamp,
    ) -> Result<(), StoreError> {
        self.run_for(account, "asking for a backfill", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "INSERT INTO backfills (account_id, from_at, due_at) VALUES ($1, $2, $3)
                         ON CONFLICT (account_id) WHERE gap_id IS NULL DO UPDATE
                            SET from_at = greatest(least(backfills.from_at, excluded.from_at), $4), due_at = excluded.due_at,
                                first_at = NULL, runs = 0",
                    )
                    .bind(account.0)
                    .bind(Time(from))
                    .bind(Time(due_at))
                    .bind(Time(from.checked_sub(HINT_LASTS).unwrap_or(from)))
                    .execute(connection)
                    .await
                    .map_err(failed("asking for a backfill"))
                    .map(drop)
                })
            })
            .await
    }

    async fn backfilled(
        &self,
        backfill: i64,
        at: Timestamp,
        next: Option<Timestamp>,
    ) -> Result<(), StoreError> {
        let fence = self.fence.clone();
        self.writer
            .run("noting a backfill", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("noting a backfill");
                    let account: Option<i64> = sqlx::query_scalar("SELECT account_id FROM backfills WHERE id = $1")
                        .bind(backfill)
                        .fetch_optional(&mut *connection)
                        .await
                        .map_err(&failed)?;
                    if let Some(account) = account.map(AccountId) {
                        fence.judge(connection, account, fence.epoch(account)?).await?;
                    }
                    sqlx::query(
                        "UPDATE gaps SET backfilled = true, detail = NULL
                           FROM backfills b
                          WHERE b.id = $1 AND gaps.account_id = b.account_id AND gaps.id = b.gap_id
                            AND NOT gaps.backfilled",
                    )
                    .bind(backfill)
                    .execute(&mut *connection)
                    .await
                    .map_err(&failed)?;
                    sqlx::query(
                        "UPDATE sessions SET backfilled_until = greatest(backfilled_until, g.to_at)
                           FROM backfills b JOIN gaps g ON g.account_id = b.account_id AND g.id = b.gap_id
                          WHERE b.id = $1 AND sessions.account_id = g.account_id AND sessions.id = g.session_id",
                    )
                    .bind(backfill)
                    .execute(&mut *connection)
                    .await
                    .map_err(&failed)?;
                    let query = match next {
                        Some(next) => sqlx::query(
                            "UPDATE backfills SET runs = runs + 1, first_at = coalesce(first_at, $2), due_at = $3
                              WHERE id = $1",
                        )
                        .bind(backfill)
                        .bind(Time(at))
                        .bind(Time(next)),
                        None => sqlx::query("DELETE FROM backfills WHERE id = $1").bind(backfill),
                    };
                    query.execute(connection).await.map_err(&failed).map(drop)
                })
            })
            .await
    }

    async fn backfill_impossible(&self, account: AccountId, detail: &str) -> Result<(), StoreError> {
        let detail = text(detail).into_owned();
        self.run_for(account, "noting that a gap stays", false, move |connection| {
            Box::pin(async move {
                sqlx::query(
                    "UPDATE gaps SET detail = $2
                          WHERE account_id = $1 AND NOT backfilled AND detail IS DISTINCT FROM $2",
                )
                .bind(account.0)
                .bind(detail)
                .execute(connection)
                .await
                .map_err(failed("noting that a gap stays"))
                .map(drop)
            })
        })
        .await
    }

    async fn coverage(&self, account: Option<&SipUri>) -> Result<Vec<AccountCoverage>, StoreError> {
        let failed = failed("reading the coverage");
        let mut accounts: BTreeMap<String, AccountCoverage> = BTreeMap::new();
        let sessions = sqlx::query(
            "SELECT a.sip_uri, s.started_at, s.last_ack_at, s.ended_at, s.end_reason
               FROM sessions s JOIN accounts a ON a.id = s.account_id
              WHERE $1::text IS NULL OR a.sip_uri = $1
              ORDER BY s.account_id, s.id",
        )
        .bind(account.map(SipUri::as_str))
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        for row in &sessions {
            let uri: String = row.try_get("sip_uri").map_err(&failed)?;
            accounts
                .entry(uri.clone())
                .or_insert_with(|| AccountCoverage { account: uri, sessions: Vec::new(), gaps: Vec::new() })
                .sessions
                .push(rows::followed_session(row).map_err(&failed)?);
        }
        let gaps = sqlx::query(
            "SELECT account, from_at, to_at, reason, backfilled, detail
               FROM coverage_gaps
              WHERE $1::text IS NULL OR account = $1
              ORDER BY from_at, to_at",
        )
        .bind(account.map(SipUri::as_str))
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        for row in &gaps {
            let uri: &str = row.try_get("account").map_err(&failed)?;
            if let Some(account) = accounts.get_mut(uri) {
                account.gaps.push(rows::gap(row).map_err(&failed)?);
            }
        }
        Ok(accounts.into_values().collect())
    }
}
