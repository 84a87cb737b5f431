//! Sessions, gaps, and what an account needs to know when it takes up its work again. Facts go through
//! [`crate::store::writer`].

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, Row};

use super::{
    PostgresDialect, PostgresStore,
    column::{Time, text},
    flush::flush,
    load::waiting_messages,
};
use crate::{
    archive::{
        RESUME,
        fact::{ArchiveCommit, Fetch},
        workspace::RuleSettings,
    },
    identifiers::{AccountId, ConversationId, SessionId},
    store::{
        ArchiveStore, CommitOutcome, KnownConversation, KnownStay, OpenConversation, Session, StoreError,
        columns::Columns,
        rows,
        trouble::failed,
        writer::{Brought, Waiting, archive_unplaced, count_archived, settle_overdue, store_facts},
    },
};

/// Ends a session with everything that is open in it.
async fn end(
    connection: &mut PgConnection,
    rules: RuleSettings,
    session: SessionId,
    reason: &str,
    now: Timestamp,
) -> Result<(), StoreError> {
    let failed = failed("ending a session");
    archive_unplaced::<PostgresDialect>(connection, rules, Waiting::OfSession(session)).await?;
    let mut workspace =
        waiting_messages(connection, rules, Waiting::OfSession(session)).await.map_err(&failed)?;
    workspace.settle_session(session);
    flush(connection, &workspace.changes()).await.map_err(&failed)?;
    let at = Time(now);
    let account = account_of(connection, session).await.map_err(&failed)?;
    for statement in [
        "UPDATE participants SET left_at = coalesce(left_at, $3), awaiting = NULL
          WHERE account_id = $1 AND session_id = $2 AND (left_at IS NULL OR awaiting IS NOT NULL)",
        "UPDATE invitations SET awaiting = NULL
          WHERE account_id = $1 AND session_id = $2 AND awaiting IS NOT NULL",
        "UPDATE conversations SET ended_at = $3, state = 'Disconnected', awaiting = NULL
          WHERE account_id = $1 AND session_id = $2 AND ended_at IS NULL",
    ] {
        sqlx::query(statement)
            .bind(account.0)
            .bind(session.0)
            .bind(at)
            .execute(&mut *connection)
            .await
            .map_err(&failed)?;
    }
    sqlx::query("UPDATE sessions SET ended_at = $2, end_reason = $3 WHERE id = $1 AND ended_at IS NULL")
        .bind(session.0)
        .bind(at)
        .bind(reason)
        .execute(connection)
        .await
        .map_err(&failed)
        .map(drop)
}

/// Gives up the sends of an account that are under way. `again_after`: when those that are sent again may be, at the
/// earliest.
async fn abandon_sends(
    connection: &mut PgConnection,
    rules: RuleSettings,
    account: AccountId,
    why: &str,
    again_after: Option<Timestamp>,
) -> Result<u64, StoreError> {
    let failed = failed("giving up unsettled sends");
    let error = format!("nobody can tell whether the server took it: {why}");
    let now = Time(Timestamp::now());
    sqlx::query(
        "UPDATE outbox_attempts
            SET outcome = 'uncertain', finished_at = $2, detail = $3
          WHERE finished_at IS NULL
            AND operation_id IN (SELECT operation_id FROM outbox WHERE account_id = $1 AND state = 'sending')",
    )
    .bind(account.0)
    .bind(now)
    .bind(&error)
    .execute(&mut *connection)
    .await
    .map_err(&failed)?;
    let done = sqlx::query(
        "UPDATE outbox
            SET state = CASE WHEN $4 AND attempts < coalesce(max_attempts, $5) THEN 'queued' ELSE 'uncertain' END,
                next_attempt_at = CASE WHEN $4 AND attempts < coalesce(max_attempts, $5) THEN $6::timestamptz END,
                finished_at = CASE WHEN $4 AND attempts < coalesce(max_attempts, $5) THEN NULL ELSE $2 END,
                possible_duplicate = CASE WHEN $4 AND attempts < coalesce(max_attempts, $5)
                                          THEN TRUE ELSE possible_duplicate END,
                last_code = NULL, last_subcode = NULL,
                last_error = CASE WHEN $4 AND attempts < coalesce(max_attempts, $5)
                                  THEN $3::text || '; sent again, so the recipient may get it twice' ELSE $3 END,
                updated_at = $2, revision = revision + 1
          WHERE account_id = $1 AND state = 'sending'",
    )
    .bind(account.0)
    .bind(now)
    .bind(&error)
    .bind(rules.retry_uncertain)
    .bind(rules.max_attempts)
    .bind(again_after.map(Time))
    .execute(connection)
    .await
    .map_err(&failed)?;
    Ok(done.rows_affected())
}

/// A response with `resume`; see [`ArchiveStore::resume`].
async fn resume(
    connection: &mut PgConnection,
    rules: RuleSettings,
    commit: &ArchiveCommit,
    asked: &str,
    followed_until: Timestamp,
    why: &str,
) -> Result<(CommitOutcome, Brought), StoreError> {
    let failed = failed("resuming a session");
    let ArchiveCommit { account, session, received_at, .. } = *commit;
    let cursor: Option<String> =
        sqlx::query_scalar("SELECT event_cursor FROM sessions WHERE account_id = $1 AND id = $2")
            .bind(account.0)
            .bind(session.0)
            .fetch_one(&mut *connection)
            .await
            .map_err(&failed)?;
    // The same response again: what it ended may be open anew. The server may resume where it was asked.
    let is_new = cursor.as_deref() == Some(asked) || cursor != commit.cursor;
    if is_new {
        insert_gap(connection, account, session, followed_until, received_at, why).await?;
        // Before the facts, which tell what goes on.
        sqlx::query(
            "UPDATE participants SET left_at = $3 WHERE account_id = $1 AND session_id = $2 AND left_at IS NULL",
        )
        .bind(account.0)
        .bind(session.0)
        .bind(Time(received_at))
        .execute(&mut *connection)
        .await
        .map_err(&failed)?;
        sqlx::query(
            "UPDATE conversations SET ended_at = $3, state = 'Disconnected', end_code = $4, end_subcode = NULL
              WHERE account_id = $1 AND session_id = $2 AND ended_at IS NULL",
        )
        .bind(account.0)
        .bind(session.0)
        .bind(Time(received_at))
        .bind(RESUME)
        .execute(&mut *connection)
        .await
        .map_err(&failed)?;
    }
    let mut stored = store_facts::<PostgresDialect>(connection, rules, &[commit]).await?;
    let outcome = stored.outcomes.pop().unwrap_or_else(|| Ok(CommitOutcome::default()))?;
    if is_new {
        // After the facts, which may tell of some. The answer of a request that is out may still come.
        let again_after = rules.retry.next_attempt(received_at, 1, 1.0);
        let abandoned = abandon_sends(connection, rules, account, why, Some(again_after)).await?;
        if abandoned > 0 {
            tracing::warn!(
                account.id = account.0,
                abandoned,
                "rows of the outbox were being sent; no event will tell what became of them"
            );
        }
    }
    Ok((outcome, stored.messages))
}

async fn account_of(connection: &mut PgConnection, session: SessionId) -> Result<AccountId, sqlx::Error> {
    sqlx::query_scalar("SELECT account_id FROM sessions WHERE id = $1")
        .bind(session.0)
        .fetch_one(connection)
        .await
        .map(AccountId)
}

/// A stretch that was not followed, unless it is empty, and the wish to backfill it.
pub(super) async fn insert_gap(
    connection: &mut PgConnection,
    account: AccountId,
    session: SessionId,
    from: Timestamp,
    to: Timestamp,
    reason: &str,
) -> Result<(), StoreError> {
    if from >= to {
        return Ok(());
    }
    let failed = failed("recording a gap");
    let now = Time(Timestamp::now());
    let gap: i64 = sqlx::query_scalar(
        "INSERT INTO gaps (account_id, session_id, from_at, to_at, reason, recorded_at)
         VALUES ($1, $2, $3, $4, $5, $6)
         RETURNING id",
    )
    .bind(account.0)
    .bind(session.0)
    .bind(Time(from))
    .bind(Time(to))
    .bind(reason)
    .bind(now)
    .fetch_one(&mut *connection)
    .await
    .map_err(&failed)?;
    // The server's logs may know what was said.
    sqlx::query("INSERT INTO backfills (account_id, gap_id, from_at, due_at) VALUES ($1, $2, $3, $4)")
        .bind(account.0)
        .bind(gap)
        .bind(Time(from))
        .bind(now)
        .execute(connection)
        .await
        .map_err(&failed)
        .map(drop)
}

async fn endpoint_id(connection: &mut PgConnection, account: AccountId) -> Result<String, StoreError> {
    sqlx::query_scalar(
        "UPDATE accounts SET endpoint_id = coalesce(endpoint_id, $2) WHERE id = $1 RETURNING endpoint_id",
    )
    .bind(account.0)
    .bind(uuid::Uuid::new_v4().to_string())
    .fetch_one(connection)
    .await
    .map_err(failed("giving an account its endpoint id"))
}

#[async_trait]
impl ArchiveStore for PostgresStore {
    async fn endpoint_id(&self, account: AccountId) -> Result<String, StoreError> {
        let known: Option<Option<String>> =
            sqlx::query_scalar("SELECT endpoint_id FROM accounts WHERE id = $1")
                .bind(account.0)
                .fetch_optional(&self.readers)
                .await
                .map_err(failed("reading an endpoint id"))?;
        if let Some(Some(known)) = known {
            return Ok(known);
        }
        self.run_for(account, "giving an account its endpoint id", false, move |connection| {
            Box::pin(endpoint_id(connection, account))
        })
        .await
    }

    async fn open_session(&self, account: AccountId) -> Result<Option<Session>, StoreError> {
        let failed = failed("reading the open session");
        sqlx::query(
            "SELECT id, application_href, endpoint_id, event_cursor
               FROM sessions
              WHERE account_id = $1 AND ended_at IS NULL",
        )
        .bind(account.0)
        .fetch_optional(&self.readers)
        .await
        .map_err(&failed)?
        .map(|row| rows::session(&row).map_err(&failed))
        .transpose()
    }

    async fn abandon_sends(&self, account: AccountId, why: &str) -> Result<u64, StoreError> {
        let (rules, why) = (self.rules, text(why).into_owned());
        self.run_for(account, "giving up unsettled sends", true, move |connection| {
            Box::pin(async move { abandon_sends(connection, rules, account, &why, None).await })
        })
        .await
    }

    async fn resume(
        &self,
        commit: ArchiveCommit,
        asked: &str,
        followed_until: Timestamp,
        why: &str,
    ) -> Result<CommitOutcome, StoreError> {
        let (rules, why) = (self.rules, text(why).into_owned());
        let asked = asked.to_owned();
        let (fence, epoch) = (self.fence.clone(), self.fence.epoch(commit.account)?.map(|_| commit.epoch));
        let (outcome, brought) = self
            .writer
            .run("resuming a session", true, move |connection| {
                Box::pin(async move {
                    fence.judge(connection, commit.account, epoch).await?;
                    resume(connection, rules, &commit, &asked, followed_until, &why).await
                })
            })
            .await?;
        count_archived(&brought);
        Ok(outcome)
    }

    async fn begin_session(
        &self,
        account: AccountId,
        application_href: &str,
        event_cursor: &str,
        reason_for_previous: &str,
    ) -> Result<Session, StoreError> {
        let (application_href, event_cursor) =
            (text(application_href).into_owned(), text(event_cursor).into_owned());
        let reason = text(reason_for_previous).into_owned();
        let rules = self.rules;
        self.run_for(account, "beginning a session", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("beginning a session");
                    let now = Timestamp::now();
                    let endpoint_id = endpoint_id(connection, account).await?;
                    let previous = sqlx::query(
                        "SELECT id, started_at, last_ack_at, ended_at, end_reason
                           FROM sessions
                          WHERE account_id = $1
                          ORDER BY id DESC
                          LIMIT 1",
                    )
                    .bind(account.0)
                    .fetch_optional(&mut *connection)
                    .await
                    .map_err(&failed)?;
                    if let Some(previous) = previous {
                        let id = SessionId(previous.try_get("id").map_err(&failed)?);
                        let ended_at = previous.optional_time("ended_at").map_err(&failed)?;
                        let end_reason: Option<String> = previous.try_get("end_reason").map_err(&failed)?;
                        let followed_until = previous.optional_time("last_ack_at")
                            .map_err(&failed)?
                            .unwrap_or(previous.time("started_at").map_err(&failed)?);
                        let reason = end_reason.unwrap_or(reason);
                        insert_gap(connection, account, id, followed_until, now, &reason).await?;
                        if ended_at.is_none() {
                            end(connection, rules, id, &reason, now).await?;
                        }
                    }
                    let id: i64 = sqlx::query_scalar(
                        "INSERT INTO sessions (account_id, application_href, endpoint_id, event_cursor, started_at,
                                               last_ack_at)
                         VALUES ($1, $2, $3, $4, $5, $5)
                         RETURNING id",
                    )
                    .bind(account.0)
                    .bind(&application_href)
                    .bind(&endpoint_id)
                    .bind(&event_cursor)
                    .bind(Time(now))
                    .fetch_one(connection)
                    .await
                    .map_err(&failed)?;
                    Ok(Session {
                        id: SessionId(id),
                        application_href,
                        endpoint_id,
                        event_cursor: Some(event_cursor),
                    })
                })
            })
            .await
    }

    async fn end_session(
        &self,
        account: AccountId,
        session: SessionId,
        reason: &str,
    ) -> Result<(), StoreError> {
        let reason = text(reason).into_owned();
        let rules = self.rules;
        self.run_for(account, "ending a session", false, move |connection| {
            Box::pin(async move { end(connection, rules, session, &reason, Timestamp::now()).await })
        })
        .await
    }

    async fn record_followed(&self, sessions: &[SessionId], at: Timestamp) -> Result<(), StoreError> {
        if sessions.is_empty() {
            return Ok(());
        }
        let (fence, ids) = (self.fence.clone(), sessions.iter().map(|id| id.0).collect::<Vec<_>>());
        let fenced = self
            .writer
            .run("noting followed sessions", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("noting followed sessions");
                    let held = fence.held(connection).await.map_err(&failed)?;
                    let held = held.map(|held| held.iter().map(|account| account.0).collect::<Vec<_>>());
                    sqlx::query(
                        "UPDATE sessions SET last_ack_at = $2
                          WHERE id = ANY ($1::bigint[]) AND (last_ack_at IS NULL OR last_ack_at < $2)
                            AND ($3::bigint[] IS NULL OR account_id = ANY ($3))",
                    )
                    .bind(&ids)
                    .bind(Time(at))
                    .bind(&held)
                    .execute(&mut *connection)
                    .await
                    .map_err(&failed)?;
                    sqlx::query_scalar::<_, i64>(
                        "SELECT account_id FROM sessions
                          WHERE id = ANY ($1::bigint[]) AND account_id <> ALL ($2::bigint[])
                          LIMIT 1",
                    )
                    .bind(&ids)
                    .bind(&held)
                    .fetch_optional(connection)
                    .await
                    .map_err(&failed)
                })
            })
            .await?;
        // The others' are noted.
        fenced.map_or(Ok(()), |account| Err(StoreError::Fenced(AccountId(account))))
    }

    async fn record_gap(
        &self,
        account: AccountId,
        session: SessionId,
        to: Timestamp,
        reason: &str,
    ) -> Result<(), StoreError> {
        let reason = text(reason).into_owned();
        self.run_for(account, "recording a gap", false, move |connection| {
            Box::pin(async move {
                let failed = failed("recording a gap");
                let row = sqlx::query(
                    "SELECT started_at, last_ack_at FROM sessions WHERE id = $1 AND account_id = $2",
                )
                .bind(session.0)
                .bind(account.0)
                .fetch_one(&mut *connection)
                .await
                .map_err(&failed)?;
                let from = row
                    .optional_time("last_ack_at")
                    .map_err(&failed)?
                    .unwrap_or(row.time("started_at").map_err(&failed)?);
                insert_gap(connection, account, session, from, to, &reason).await?;
                // What is recorded once is not recorded again.
                sqlx::query("UPDATE sessions SET last_ack_at = greatest(last_ack_at, $2) WHERE id = $1")
                    .bind(session.0)
                    .bind(Time(to))
                    .execute(connection)
                    .await
                    .map_err(&failed)
                    .map(drop)
            })
        })
        .await
    }

    async fn commit(&self, commit: ArchiveCommit) -> Result<CommitOutcome, StoreError> {
        self.writer.archive(commit).await
    }

    async fn unfetched(&self, account: AccountId, session: SessionId) -> Result<Vec<Fetch>, StoreError> {
        let failed = failed("reading what is still to be fetched");
        let rows = sqlx::query(
            "SELECT 0::bigint AS urgency, m.href, c.href AS conversation_href, NULL::text AS kind, m.id
               FROM messages m JOIN conversations c ON c.account_id = m.account_id AND c.id = m.conversation_id
              WHERE m.awaiting = 'fetch' AND m.account_id = $1 AND m.session_id = $2
             UNION ALL
             SELECT 1, i.href, c.href, i.kind, i.id
               FROM invitations i LEFT JOIN conversations c ON c.account_id = i.account_id AND c.id = i.conversation_id
              WHERE i.account_id = $1 AND i.session_id = $2
                AND (i.awaiting = 'fetch'
                     -- A call that rang when the last life ended may still be answered.
                     OR (i.direction = 'incoming' AND i.action IS NULL AND i.finished_at IS NULL
                         AND i.kind <> 'participant' AND i.started_at >= $3))
             UNION ALL
             SELECT 2, c.href, NULL, NULL, c.id
               FROM conversations c
              WHERE c.awaiting = 'fetch' AND c.account_id = $1 AND c.session_id = $2
             UNION ALL
             SELECT 3, p.href, c.href, NULL, p.id
               FROM participants p JOIN conversations c ON c.account_id = p.account_id AND c.id = p.conversation_id
              WHERE p.awaiting = 'fetch' AND p.account_id = $1 AND p.session_id = $2
              ORDER BY 1, 5",
        )
        .bind(account.0)
        .bind(session.0)
        .bind(Time(Timestamp::now() - SignedDuration::from_secs(60)))
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        rows.iter().map(|row| rows::fetch(row).map_err(&failed)).collect()
    }

    async fn open_conversations(
        &self,
        account: AccountId,
        session: SessionId,
    ) -> Result<Vec<OpenConversation>, StoreError> {
        let failed = failed("reading open conversations");
        let rows = sqlx::query(
            "SELECT c.id, c.href, c.multiparty, c.thread_id,
                    coalesce(
                        (SELECT string_agg(DISTINCT p.sip_uri, ';') FROM participants p
                          WHERE p.account_id = c.account_id AND p.conversation_id = c.id AND NOT p.is_local
                            AND p.left_at IS NULL AND p.sip_uri IS NOT NULL AND p.sip_uri <> a.sip_uri),
                        (SELECT CASE i.direction WHEN 'incoming' THEN i.from_uri ELSE i.to_uri END FROM invitations i
                          WHERE i.account_id = c.account_id AND i.conversation_id = c.id AND i.kind = 'messaging'
                          ORDER BY i.id LIMIT 1)) AS remote,
                    (SELECT o.destination FROM messages m
                       JOIN outbox o ON o.id = m.outbox_id
                      WHERE m.account_id = c.account_id AND m.conversation_id = c.id AND o.destination LIKE '%;%'
                      ORDER BY m.sent_at DESC LIMIT 1) AS group_of_rows
               FROM conversations c
               JOIN accounts a ON a.id = c.account_id
              WHERE c.account_id = $1 AND c.session_id = $2 AND c.ended_at IS NULL AND c.href IS NOT NULL
              ORDER BY c.id",
        )
        .bind(account.0)
        .bind(session.0)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        rows.iter().map(|row| rows::open_conversation(row).map_err(&failed)).collect()
    }

    async fn known_stays(
        &self,
        account: AccountId,
        session: SessionId,
        conversation_href: &str,
    ) -> Result<Vec<KnownStay>, StoreError> {
        let failed = failed("reading who is in a conversation");
        let rows = sqlx::query(
            "SELECT p.sip_uri, p.left_at IS NULL AS present, p.awaiting IS NOT NULL AS being_read
               FROM conversations c
               JOIN participants p ON p.account_id = c.account_id AND p.conversation_id = c.id
              WHERE c.account_id = $1 AND c.session_id = $2 AND c.href = $3 AND NOT p.is_local
              ORDER BY p.id",
        )
        .bind(account.0)
        .bind(session.0)
        .bind(conversation_href)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        rows.iter().map(|row| rows::known_stay(row).map_err(&failed)).collect()
    }

    async fn conversation(
        &self,
        account: AccountId,
        conversation: ConversationId,
    ) -> Result<Option<KnownConversation>, StoreError> {
        let failed = failed("reading a conversation");
        let row = sqlx::query(
            "SELECT c.multiparty, c.thread_id, c.subject,
                    coalesce(
                        (SELECT string_agg(DISTINCT p.sip_uri, ';') FROM participants p
                          WHERE p.account_id = c.account_id AND p.conversation_id = c.id AND NOT p.is_local
                            AND p.sip_uri IS NOT NULL AND p.sip_uri <> a.sip_uri),
                        (SELECT CASE i.direction WHEN 'incoming' THEN i.from_uri ELSE i.to_uri END FROM invitations i
                          WHERE i.account_id = c.account_id AND i.conversation_id = c.id AND i.kind = 'messaging'
                          ORDER BY i.id LIMIT 1)) AS remote
               FROM conversations c
               JOIN accounts a ON a.id = c.account_id
              WHERE c.account_id = $1 AND c.id = $2",
        )
        .bind(account.0)
        .bind(conversation.0)
        .fetch_optional(&self.readers)
        .await
        .map_err(&failed)?;
        row.map(|row| rows::known_conversation(&row).map_err(&failed)).transpose()
    }

    async fn settle_overdue(&self, now: Timestamp) -> Result<(), StoreError> {
        let (fence, rules) = (self.fence.clone(), self.rules);
        self.writer
            .run("settling messages", false, move |connection| {
                Box::pin(
                    async move { settle_overdue::<PostgresDialect>(connection, &fence, rules, now).await },
                )
            })
            .await
    }

    async fn quarantine(
        &self,
        account: AccountId,
        session: Option<SessionId>,
        reason: &str,
        payload: &str,
    ) -> Result<(), StoreError> {
        let digest = hex::encode(Sha256::digest(payload));
        let (reason, payload) = (text(reason).into_owned(), text(payload).into_owned());
        self.run_for(account, "quarantining a payload", false, move |connection| {
            Box::pin(async move {
                sqlx::query(
                    "INSERT INTO event_quarantine (account_id, session_id, received_at, reason, payload,
                                                       payload_sha256)
                         VALUES ($1, $2, $3, $4, $5, $6)",
                )
                .bind(account.0)
                .bind(session.map(|id| id.0))
                .bind(Time(Timestamp::now()))
                .bind(reason)
                .bind(payload)
                .bind(digest)
                .execute(connection)
                .await
                .map_err(failed("quarantining a payload"))
                .map(drop)
            })
        })
        .await
    }
}
