//! The queue: admission of new rows and claims in one transaction, and what users do with rows.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::{AssertSqlSafe, QueryBuilder, Row, Sqlite, SqliteConnection, sqlite::SqliteRow};

use super::{
    SqliteStore,
    column::{optional_time_text, time_text},
    flush::for_each,
};
use crate::{
    identifiers::{AccountId, ConversationId, OperationId, OutboxId, SipUri},
    outbox::admission::{
        ADMITTED_AT_ONCE, ADMITTED_OF_ACCOUNT, Admitted, EXPIRED_AT_ONCE, GivenTime, Lookup,
        NamedConversation, Refusal, Submission, admit, more_may_wait,
    },
    store::{
        ClaimSettings, ClaimedSend, NOT_FOLLOWED, NewOutboxRow, OutboxAttempt, OutboxFilter, OutboxRow,
        OutboxState, OutboxStore, ShapeCell, StoreError, UnsettledSend,
        columns::Columns,
        rows::{self, allowed_before},
        trouble::{failed, is_duplicate},
    },
};

/// New rows, the oldest of each account: accounts share what is looked at, so that a burst of one of them holds up nobody
/// else's row. Accounts are found by jumping from one to the next in the index.
const NEW_ROWS: &str = "
    WITH RECURSIVE
    spellings (account) AS (
        SELECT (SELECT min(o.account) FROM outbox o INDEXED BY outbox_new
                 WHERE o.state = 'queued' AND o.destination IS NULL)
        UNION ALL
        SELECT (SELECT min(o.account) FROM outbox o INDEXED BY outbox_new
                 WHERE o.state = 'queued' AND o.destination IS NULL AND o.account > w.account)
          FROM spellings w
         WHERE w.account IS NOT NULL
    ),
    accounts (account) AS MATERIALIZED (
        SELECT w.account FROM spellings w WHERE w.account IS NOT NULL LIMIT ?1
    )
    SELECT k.value
      FROM accounts a
     CROSS JOIN json_each((SELECT json_group_array(r.id)
                             FROM (SELECT n.id FROM outbox n INDEXED BY outbox_new
                                    WHERE n.state = 'queued' AND n.destination IS NULL AND n.account = a.account
                                    ORDER BY n.id
                                    LIMIT (SELECT min(?1 / count(*), ?2) FROM accounts)) r)) k
     ORDER BY k.value";

/// What was written into a new row.
const SUBMISSION: &str = "
    SELECT o.id, o.account, o.recipients, o.body, o.content_type, o.subject, o.importance, o.conversation_id,
           o.thread_id, o.send_after, strftime('%Y-%m-%dT%H:%M:%fZ', o.send_after) AS send_after_read,
           o.expires_at, strftime('%Y-%m-%dT%H:%M:%fZ', o.expires_at) AS expires_at_read, o.correlation,
           o.idempotency_key
      FROM outbox o
     WHERE o.id = ?";

/// What a claim hands out, for rows `o`; `href` is of the conversation that the user gave, if it is open in the account's
/// session.
const CLAIMED: &str = "o.id, o.account_id, o.destination, o.operation_id, o.recipients, o.given_conversation_id, o.body,
                       o.content_type, o.subject, o.importance, o.thread_id, o.attempts, o.max_attempts, o.expires_at,
                       o.created_at, o.claimed_at, o.possible_duplicate,
                       (SELECT c.href FROM conversations c
                         WHERE c.id = o.given_conversation_id AND c.account_id = o.account_id AND c.ended_at IS NULL
                           AND c.session_id = (SELECT s.id FROM sessions s
                                                WHERE s.account_id = o.account_id AND s.ended_at IS NULL)) AS href";

/// Whether an event since the claim of a row may be of it and was never read: see [`crate::store::UnsettledSend`].
const EVENTS_MISSED: &str = "(EXISTS (SELECT 1 FROM gaps g
                                       WHERE g.account_id = o.account_id AND g.to_at >= o.claimed_at
                                         AND g.reason <> ?2)
                           OR EXISTS (SELECT 1 FROM event_quarantine q
                                       WHERE q.account_id = o.account_id AND q.received_at >= o.claimed_at
                                         AND q.resolved_at IS NULL AND q.cursor IS NOT NULL AND q.sender IS NULL)
                           OR EXISTS (SELECT 1 FROM invitations i
                                       WHERE i.account_id = o.account_id AND i.started_at >= o.claimed_at
                                         AND i.session_id = (SELECT s.id FROM sessions s
                                                              WHERE s.account_id = o.account_id AND s.ended_at IS NULL)
                                         AND i.kind = 'messaging' AND i.direction IS NOT 'incoming'
                                         AND i.operation_id IS NULL AND i.conversation_id IS NULL
                                         AND i.awaiting IS NULL))";

/// Accounts and conversations that new rows speak of.
#[derive(Debug, Default)]
struct Known {
    accounts: HashMap<String, AccountId>,
    conversations: HashMap<ConversationId, NamedConversation>,
}

impl Lookup for Known {
    fn account(&self, uri: &SipUri) -> Option<AccountId> {
        self.accounts.get(uri.as_str()).copied()
    }

    fn conversation(&self, id: ConversationId) -> Option<NamedConversation> {
        self.conversations.get(&id).cloned()
    }
}

/// Looks at rows that no claim has seen, or that a user has changed. Returns whether more may be waiting.
async fn admit_new_rows(
    connection: &mut SqliteConnection,
    now: Timestamp,
    settings: &ClaimSettings,
) -> Result<bool, sqlx::Error> {
    let ids: Vec<i64> = sqlx::query_scalar(NEW_ROWS)
        .bind(ADMITTED_AT_ONCE)
        .bind(ADMITTED_OF_ACCOUNT)
        .fetch_all(&mut *connection)
        .await?;
    if ids.is_empty() {
        return Ok(false);
    }
    let rows = for_each(connection, &ids, SUBMISSION, |query, id| query.bind(*id)).await?;
    let mut submissions = Vec::with_capacity(rows.len());
    for row in &rows {
        let looked_at = match submission(row) {
            Ok(submission) => (submission, None),
            // Of what cannot be read only the account matters, which may well be readable.
            Err(error) => {
                let account = row.some_lossy_text("account")?;
                (Submission { account, ..Submission::default() }, Some(rows::unreadable_send(error)?))
            }
        };
        submissions.push((OutboxId(row.try_get("id")?), looked_at));
    }
    let known = known(connection, submissions.iter().map(|(_, (submission, _))| submission)).await?;
    let more = more_may_wait(submissions.iter().map(|(_, (submission, _))| submission.account.as_str()));
    let mut admitted = Vec::new();
    for (id, (submission, unreadable)) in submissions {
        let decided = match unreadable {
            Some(refusal) => Err(refusal),
            None => admit(&submission, &known, settings.max_body_bytes, now),
        };
        match decided {
            Ok(row) => admitted.push((id, row)),
            Err(refusal) => {
                let account = submission.account.parse().ok().and_then(|uri| known.account(&uri));
                refuse(connection, id, account, &refusal, now).await?;
            }
        }
    }
    write_admitted(connection, &admitted).await?;
    Ok(more)
}

async fn write_admitted(
    connection: &mut SqliteConnection,
    rows: &[(OutboxId, Admitted)],
) -> Result<(), sqlx::Error> {
    for_each(
        connection,
        rows,
        "UPDATE outbox
            SET account_id = ?, destination = ?, given_conversation_id = conversation_id, send_after = ?, expires_at = ?,
                revision = revision + 1
          WHERE id = ?",
        |query, (id, row)| {
            query
                .bind(row.account.0)
                .bind(row.destination.clone())
                .bind(optional_time_text(row.send_after))
                .bind(optional_time_text(row.expires_at))
                .bind(id.0)
        },
    )
    .await
    .map(drop)
}

fn submission(row: &SqliteRow) -> Result<Submission, sqlx::Error> {
    // Not needed here; but what is admitted must be readable in full.
    for column in ["correlation", "idempotency_key"] {
        row.optional_text(column)?;
    }
    let given_time = |given: &str, read: &str| -> Result<GivenTime, sqlx::Error> {
        let Some(text) = row.try_get::<Option<String>, _>(given)? else {
            return Ok(GivenTime::Absent);
        };
        let read: Option<String> = row.try_get(read)?;
        Ok(read.and_then(|read| read.parse().ok()).map_or(GivenTime::Unreadable(text), GivenTime::At))
    };
    Ok(Submission {
        account: row.try_get("account")?,
        recipients: row.try_get("recipients")?,
        body: row.try_get("body")?,
        content_type: row.try_get("content_type")?,
        subject: row.try_get("subject")?,
        importance: row.try_get("importance")?,
        conversation: row.try_get::<Option<i64>, _>("conversation_id")?.map(ConversationId),
        thread_id: row.try_get("thread_id")?,
        send_after: given_time("send_after", "send_after_read")?,
        expires_at: given_time("expires_at", "expires_at_read")?,
    })
}

async fn known(
    connection: &mut SqliteConnection,
    submissions: impl Iterator<Item = &Submission> + Clone,
) -> Result<Known, sqlx::Error> {
    let json = |value: serde_json::Value| value.to_string();
    let mut uris: Vec<String> = submissions
        .clone()
        .filter_map(|submission| submission.account.parse::<SipUri>().ok())
        .map(|uri| uri.to_string())
        .collect();
    uris.sort_unstable();
    uris.dedup();
    let mut known = Known::default();
    let accounts = sqlx::query(
        "SELECT a.id, a.sip_uri
           FROM json_each(?1) k CROSS JOIN accounts a ON a.sip_uri = k.value
          WHERE a.removed_at IS NULL",
    )
    .bind(json(uris.into()))
    .fetch_all(&mut *connection)
    .await?;
    for row in accounts {
        known.accounts.insert(row.try_get("sip_uri")?, AccountId(row.try_get("id")?));
    }
    let mut ids: Vec<i64> =
        submissions.filter_map(|submission| submission.conversation).map(|id| id.0).collect();
    if ids.is_empty() {
        return Ok(known);
    }
    ids.sort_unstable();
    ids.dedup();
    let conversations = sqlx::query(
        "SELECT c.id, c.account_id, c.multiparty,
                coalesce(c.href IS NOT NULL AND c.ended_at IS NULL
                         AND c.session_id = (SELECT s.id FROM sessions s
                                              WHERE s.account_id = c.account_id AND s.ended_at IS NULL), FALSE) AS open,
                coalesce(
                    (SELECT group_concat(uri, ';') FROM (
                        SELECT DISTINCT p.sip_uri AS uri FROM participants p INDEXED BY participants_of_conversation
                         WHERE p.account_id = c.account_id AND p.conversation_id = c.id AND p.is_local = 0
                           AND p.sip_uri IS NOT NULL AND p.sip_uri <> a.sip_uri)),
                    (SELECT CASE i.direction WHEN 'incoming' THEN i.from_uri ELSE i.to_uri END FROM invitations i
                      WHERE i.account_id = c.account_id AND i.conversation_id = c.id AND i.kind = 'messaging'
                      ORDER BY i.id LIMIT 1)) AS remote
           FROM json_each(?1) k
          CROSS JOIN conversations c ON c.id = k.value
           JOIN accounts a ON a.id = c.account_id",
    )
    .bind(json(ids.into()))
    .fetch_all(connection)
    .await?;
    for row in conversations {
        let remote = row.lossy_text("remote")?;
        let only = remote.filter(|remote| !remote.contains(';')).and_then(|remote| remote.parse().ok());
        let conversation = NamedConversation {
            account: AccountId(row.try_get("account_id")?),
            with: if row.flag("multiparty")? { None } else { only },
            open: row.flag("open")?,
        };
        known.conversations.insert(ConversationId(row.try_get("id")?), conversation);
    }
    Ok(known)
}

async fn refuse(
    connection: &mut SqliteConnection,
    id: OutboxId,
    account: Option<AccountId>,
    refusal: &Refusal,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    let state = if refusal.expired { OutboxState::Expired } else { OutboxState::Failed };
    sqlx::query(
        "UPDATE outbox
            SET state = ?2, account_id = ?3, given_conversation_id = conversation_id, last_code = ?4,
                last_subcode = NULL, last_error = ?5, finished_at = ?6, updated_at = ?6, revision = revision + 1
          WHERE id = ?1",
    )
    .bind(id.0)
    .bind(state.as_str())
    .bind(account.map(|id| id.0))
    .bind(refusal.code)
    .bind(&refusal.sentence)
    .bind(time_text(now))
    .execute(connection)
    .await
    .map(drop)
}

/// Rows that waited too long, those first that should have left first, and no more than others can wait for. Returns whether
/// more may be there.
async fn expire(connection: &mut SqliteConnection, now: Timestamp) -> Result<bool, sqlx::Error> {
    let late: Vec<i64> = sqlx::query_scalar(
        "SELECT o.id FROM outbox o INDEXED BY outbox_expiring
          WHERE o.state = 'queued' AND o.expires_at IS NOT NULL AND o.destination IS NOT NULL AND o.expires_at <= ?1
          ORDER BY o.expires_at
          LIMIT ?2",
    )
    .bind(time_text(now))
    .bind(EXPIRED_AT_ONCE)
    .fetch_all(&mut *connection)
    .await?;
    expire_late(connection, &late, now).await?;
    Ok(i64::try_from(late.len()).unwrap_or(i64::MAX) >= EXPIRED_AT_ONCE)
}

/// Expires those of these rows that waited too long, and returns them.
async fn expire_late(
    connection: &mut SqliteConnection,
    rows: &[i64],
    now: Timestamp,
) -> Result<BTreeSet<i64>, sqlx::Error> {
    let expired = for_each(
        connection,
        rows,
        "UPDATE outbox
            SET state = 'expired', last_code = 'Expired', last_subcode = NULL,
                last_error = 'it was to be sent before ' || expires_at || coalesce('; ' || last_error, ''),
                finished_at = ?, updated_at = ?, revision = revision + 1
          WHERE id = ? AND expires_at <= ?
         RETURNING id",
        |query, id| {
            let now = time_text(now);
            query.bind(now.clone()).bind(now.clone()).bind(*id).bind(now)
        },
    )
    .await?;
    expired.iter().map(|row| row.try_get("id")).collect()
}

/// The first row that is due, or waited too long, of every free destination of every account that is enabled and online here,
/// as many as the account may send: who may send less than waits goes on after the destination at which the last claim stopped. Destinations are found
/// by jumping from one to the next in the index, so the cost grows with the number of destinations and not with the queue.
/// Accounts take turns when there are more rows than `limit`.
async fn due_heads(
    connection: &mut SqliteConnection,
    now: Timestamp,
    settings: &ClaimSettings,
) -> Result<Vec<i64>, sqlx::Error> {
    let others = settings.allowances.others.iter();
    let allowances: Vec<_> = others.map(|other| (other.account.0, other.rows, &other.after)).collect();
    let allowances = serde_json::to_string(&allowances).map_err(|error| sqlx::Error::Encode(error.into()))?;
    sqlx::query_scalar(
        "WITH RECURSIVE
         allowances (account_id, allowed, after) AS MATERIALIZED (
             SELECT json_extract(k.value, '$[0]'), json_extract(k.value, '$[1]'), json_extract(k.value, '$[2]')
               FROM json_each(?4) k
         ),
         waiting (account_id) AS (
             SELECT (SELECT min(o.account_id) FROM outbox o INDEXED BY outbox_queued
                      WHERE o.state = 'queued' AND o.destination IS NOT NULL)
             UNION ALL
             SELECT (SELECT min(o.account_id) FROM outbox o INDEXED BY outbox_queued
                      WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id > w.account_id)
               FROM waiting w
              WHERE w.account_id IS NOT NULL
         ),
         destinations (account_id, destination) AS (
             SELECT w.account_id,
                    (SELECT min(o.destination) FROM outbox o INDEXED BY outbox_queued
                      WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id = w.account_id)
               FROM waiting w
               JOIN account_status s ON s.account_id = w.account_id
               JOIN accounts b ON b.id = w.account_id AND b.enabled
              WHERE s.state = 'online' AND s.node_id = ?1
                AND coalesce((SELECT a.allowed FROM allowances a WHERE a.account_id = w.account_id), ?5) > 0
             UNION ALL
             SELECT d.account_id,
                    (SELECT min(o.destination) FROM outbox o INDEXED BY outbox_queued
                      WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id = d.account_id
                        AND o.destination > d.destination)
               FROM destinations d
              WHERE d.destination IS NOT NULL
         ),
         heads (account_id, destination, id) AS MATERIALIZED (
             SELECT d.account_id, d.destination,
                    (SELECT o.id FROM outbox o INDEXED BY outbox_queued
                      WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id = d.account_id
                        AND o.destination = d.destination AND (o.send_after IS NULL OR o.send_after <= ?2)
                      ORDER BY o.priority, o.id
                      LIMIT 1)
               FROM destinations d
              WHERE d.destination IS NOT NULL
                AND NOT EXISTS (SELECT 1 FROM outbox s INDEXED BY outbox_sending
                                 WHERE s.state = 'sending' AND s.account_id = d.account_id
                                   AND s.destination = d.destination)
         ),
         due (account_id, destination, id, priority) AS MATERIALIZED (
             SELECT h.account_id, h.destination, h.id, (SELECT o.priority FROM outbox o WHERE o.id = h.id)
               FROM heads h
              WHERE h.id IS NOT NULL
                AND (SELECT coalesce(o.next_attempt_at, '') <= ?2 OR coalesce(o.expires_at <= ?2, FALSE) FROM outbox o
                      WHERE o.id = h.id)
         ),
         turns (id, priority, turn, allowed) AS (
             SELECT d.id, d.priority,
                    row_number() OVER (PARTITION BY d.account_id
                                       ORDER BY d.priority, d.destination <= a.after,
                                                CASE WHEN a.after IS NOT NULL THEN d.destination END, d.id),
                    coalesce(a.allowed, ?5)
               FROM due d
               LEFT JOIN allowances a ON a.account_id = d.account_id
         )
         SELECT t.id
           FROM turns t
          WHERE t.turn <= t.allowed
          ORDER BY t.turn, t.priority, t.id
          LIMIT ?3",
    )
    .bind(&settings.node)
    .bind(time_text(now))
    .bind(settings.limit)
    .bind(allowances)
    .bind(settings.allowances.each)
    .fetch_all(connection)
    .await
}

/// What a claim brought.
#[derive(Debug, Default)]
struct Claimed {
    sends: Vec<ClaimedSend>,
    /// Rows that turned out to be unreadable and have failed; others may stand behind them.
    refused: usize,
}

async fn claim(
    connection: &mut SqliteConnection,
    heads: Vec<i64>,
    now: Timestamp,
    settings: &ClaimSettings,
) -> Result<Claimed, sqlx::Error> {
    let mut claimed = Claimed::default();
    if heads.is_empty() {
        return Ok(claimed);
    }
    let claims: Vec<(i64, String)> = heads.into_iter().map(|id| (id, OperationId::random().0)).collect();
    for_each(
        connection,
        &claims,
        "UPDATE outbox
            SET state = 'sending', attempts = min(attempts, 999999999) + 1, operation_id = ?, next_attempt_at = NULL,
                claimed_by = ?, claimed_at = ?, updated_at = ?, revision = revision + 1
          WHERE id = ?",
        |query, (id, operation_id)| {
            let now = time_text(now);
            query.bind(operation_id.clone()).bind(settings.node.clone()).bind(now.clone()).bind(now).bind(*id)
        },
    )
    .await?;
    for_each(
        connection,
        &claims,
        "INSERT INTO outbox_attempts (outbox_id, attempt, node, started_at, operation_id)
         SELECT ?, coalesce(max(t.attempt), 0) + 1, ?, ?, ?
           FROM outbox_attempts t INDEXED BY outbox_attempts_of_row
          WHERE t.outbox_id = ?",
        |query, (id, operation_id)| {
            let query = query.bind(*id).bind(settings.node.clone()).bind(time_text(now));
            query.bind(operation_id.clone()).bind(*id)
        },
    )
    .await?;
    let rows = for_each(
        connection,
        &claims,
        &format!("SELECT {CLAIMED} FROM outbox o WHERE o.id = ?"),
        |query, (id, _)| query.bind(*id),
    )
    .await?;
    for row in &rows {
        match rows::claimed_send(row, settings.max_attempts) {
            Ok(send) => claimed.sends.push(send),
            Err(error) => {
                let refusal = rows::unreadable_send(error)?;
                refuse_claimed(connection, OutboxId(row.try_get("id")?), &refusal, now).await?;
                claimed.refused += 1;
            }
        }
    }
    Ok(claimed)
}

/// Fails a row that was just claimed, with its attempt.
async fn refuse_claimed(
    connection: &mut SqliteConnection,
    id: OutboxId,
    refusal: &Refusal,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    for statement in [
        "UPDATE outbox_attempts
            SET finished_at = ?4, outcome = 'failed', code = ?2, detail = ?3
          WHERE operation_id = (SELECT o.operation_id FROM outbox o WHERE o.id = ?1)",
        "UPDATE outbox
            SET state = 'failed', last_code = ?2, last_subcode = NULL, last_error = ?3, finished_at = ?4,
                updated_at = ?4, revision = revision + 1
          WHERE id = ?1",
    ] {
        sqlx::query(statement)
            .bind(id.0)
            .bind(refusal.code)
            .bind(&refusal.sentence)
            .bind(time_text(now))
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

#[async_trait]
impl OutboxStore for SqliteStore {
    async fn outbox_changed(&self, poll: Duration) {
        tokio::select! {
            () = self.writer.due() => {}
            () = tokio::time::sleep(poll) => {}
        }
    }

    async fn claim_due(
        &self,
        now: Timestamp,
        settings: &ClaimSettings,
    ) -> Result<Vec<ClaimedSend>, StoreError> {
        let settings = settings.clone();
        let (claimed, more) = self
            .writer
            .run("claiming rows of the outbox", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("claiming rows of the outbox");
                    let more = admit_new_rows(connection, now, &settings).await.map_err(&failed)?;
                    let late = expire(connection, now).await.map_err(&failed)?;
                    let mut heads = due_heads(connection, now, &settings).await.map_err(&failed)?;
                    if late {
                        let expired = expire_late(connection, &heads, now).await.map_err(&failed)?;
                        heads.retain(|id| !expired.contains(id));
                    }
                    let claimed = claim(connection, heads, now, &settings).await.map_err(&failed)?;
                    Ok((claimed.sends, more || late || claimed.refused > 0))
                })
            })
            .await?;
        if more {
            self.writer.wake();
        }
        Ok(claimed)
    }

    async fn next_due(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let failed = failed("looking for the next due row");
        let row = sqlx::query(
            "SELECT min(due) AS due FROM (
                 SELECT min(send_after) AS due FROM outbox INDEXED BY outbox_send_after
                  WHERE state = 'queued' AND send_after IS NOT NULL AND send_after > ?1 AND destination IS NOT NULL
                 UNION ALL
                 SELECT min(next_attempt_at) FROM outbox INDEXED BY outbox_next_attempt
                  WHERE state = 'queued' AND next_attempt_at IS NOT NULL AND next_attempt_at > ?1
                    AND destination IS NOT NULL
                 UNION ALL
                 SELECT min(expires_at) FROM outbox INDEXED BY outbox_expiring
                  WHERE state = 'queued' AND expires_at IS NOT NULL AND expires_at > ?1 AND destination IS NOT NULL)",
        )
        .bind(time_text(now))
        .fetch_one(&self.readers)
        .await
        .map_err(&failed)?;
        row.optional_user_time("due").map_err(&failed)
    }

    async fn unsettled_sends(&self, account: AccountId) -> Result<Vec<UnsettledSend>, StoreError> {
        let failed = failed("reading sends under way");
        let rows = sqlx::query(AssertSqlSafe(format!(
            "SELECT {CLAIMED}, {EVENTS_MISSED} AS events_missed
               FROM outbox o INDEXED BY outbox_sending
              WHERE o.state = 'sending' AND o.account_id = ?1
              ORDER BY o.id"
        )))
        .bind(account.0)
        .bind(NOT_FOLLOWED)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        rows.iter().map(rows::unsettled_send).collect::<Result<_, sqlx::Error>>().map_err(failed)
    }

    async fn release_claim(&self, send: &ClaimedSend) -> Result<(), StoreError> {
        let (outbox, operation_id) = (send.outbox, send.operation_id.0.clone());
        let possible_duplicate = send.possible_duplicate;
        self.writer
            .run("giving a claim back", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("giving a claim back");
                    let released = sqlx::query(
                        "UPDATE outbox
                            SET state = 'queued', attempts = max(attempts - 1, 0), operation_id = NULL, claimed_by = NULL,
                                claimed_at = NULL, next_attempt_at = NULL, finished_at = NULL,
                                last_error = CASE WHEN state = 'sending' THEN last_error END,
                                possible_duplicate = ?4, conversation_id = given_conversation_id,
                                destination = CASE WHEN given_conversation_id IS NULL THEN destination END,
                                updated_at = ?3, revision = revision + 1
                          WHERE id = ?1 AND operation_id = ?2 AND state IN ('sending', 'uncertain', 'queued')",
                    )
                    .bind(outbox.0)
                    .bind(&operation_id)
                    .bind(time_text(Timestamp::now()))
                    .bind(possible_duplicate)
                    .execute(&mut *connection)
                    .await
                    .map_err(&failed)?;
                    if released.rows_affected() > 0 {
                        sqlx::query("DELETE FROM outbox_attempts WHERE operation_id = ?1")
                            .bind(operation_id)
                            .execute(connection)
                            .await
                            .map_err(&failed)?;
                    }
                    Ok(())
                })
            })
            .await
    }

    async fn enqueue(&self, row: &NewOutboxRow) -> Result<OutboxId, StoreError> {
        let row = row.clone();
        self.writer
            .run("putting a row into the outbox", true, move |connection| {
                Box::pin(async move {
                    let inserted = sqlx::query_scalar(
                        "INSERT INTO outbox (account, recipients, body, content_type, subject, importance,
                                             idempotency_key)
                         VALUES (?1, ?2, ?3, coalesce(?4, 'text/plain'), ?5, coalesce(?6, 'Normal'), ?7)
                         RETURNING id",
                    )
                    .bind(&row.account)
                    .bind(&row.recipients)
                    .bind(&row.body)
                    .bind(&row.content_type)
                    .bind(&row.subject)
                    .bind(&row.importance)
                    .bind(&row.idempotency_key)
                    .fetch_one(connection)
                    .await;
                    match inserted {
                        Ok(id) => Ok(OutboxId(id)),
                        Err(error) if is_duplicate(&error) => Err(StoreError::AlreadyExists(format!(
                            "{} has a row with the idempotency key {:?} already",
                            row.account,
                            row.idempotency_key.unwrap_or_default()
                        ))),
                        Err(error) => Err(failed("putting a row into the outbox")(error)),
                    }
                })
            })
            .await
    }

    async fn outbox_rows(&self, filter: &OutboxFilter) -> Result<Vec<OutboxRow>, StoreError> {
        let failed = failed("listing the outbox");
        // Only the conditions that are given, so that each has its index.
        let mut query = QueryBuilder::<Sqlite>::new("SELECT o.* FROM outbox o WHERE 1");
        if let Some(account) = &filter.account {
            query
                .push(" AND (o.account_id = (SELECT a.id FROM accounts a WHERE a.sip_uri = ")
                .push_bind(account.as_str())
                .push(
                    ") OR (o.account_id IS NULL
                           AND CASE WHEN instr(o.account, ':') > 0 THEN lower(trim(o.account))
                                    ELSE 'sip:' || lower(trim(o.account)) END = ",
                )
                .push_bind(account.as_str())
                .push("))");
        }
        if let Some(state) = filter.state {
            query.push(" AND o.state = ").push_bind(state.as_str());
        }
        if let Some(before) = filter.before {
            query.push(" AND o.id < ").push_bind(before.0);
        }
        query.push(" ORDER BY o.id DESC LIMIT ").push_bind(filter.limit);
        let rows = query.build().fetch_all(&self.readers).await.map_err(&failed)?;
        rows.iter().map(|row| rows::outbox_row(row).map_err(&failed)).collect()
    }

    async fn outbox_row(&self, id: OutboxId) -> Result<Option<(OutboxRow, Vec<OutboxAttempt>)>, StoreError> {
        let failed = failed("reading a row of the outbox");
        let Some(row) = sqlx::query("SELECT * FROM outbox WHERE id = ?1")
            .bind(id.0)
            .fetch_optional(&self.readers)
            .await
            .map_err(&failed)?
        else {
            return Ok(None);
        };
        let attempts = sqlx::query("SELECT * FROM outbox_attempts WHERE outbox_id = ?1 ORDER BY id")
            .bind(id.0)
            .fetch_all(&self.readers)
            .await
            .map_err(&failed)?;
        let attempts =
            attempts.iter().map(rows::outbox_attempt).collect::<Result<_, _>>().map_err(&failed)?;
        Ok(Some((rows::outbox_row(&row).map_err(&failed)?, attempts)))
    }

    async fn set_outbox_state(&self, id: OutboxId, state: OutboxState) -> Result<bool, StoreError> {
        let before: Vec<&str> = allowed_before(state).iter().map(|state| state.as_str()).collect();
        let before = serde_json::Value::from(before).to_string();
        self.writer
            .run("changing a row's state", true, move |connection| {
                Box::pin(async move {
                    // As a user would: the triggers do the rest.
                    sqlx::query(
                        "UPDATE outbox SET state = ?2 WHERE id = ?1 AND state IN (SELECT value FROM json_each(?3))",
                    )
                    .bind(id.0)
                    .bind(state.as_str())
                    .bind(before)
                    .execute(connection)
                    .await
                    .map(|done| done.rows_affected() > 0)
                    .map_err(failed("changing a row's state"))
                })
            })
            .await
    }

    async fn outbox_counts(&self) -> Result<BTreeMap<String, i64>, StoreError> {
        let failed = failed("counting the outbox");
        sqlx::query("SELECT state, count(*) AS count FROM outbox GROUP BY state")
            .fetch_all(&self.readers)
            .await
            .map_err(&failed)?
            .iter()
            .map(|row| Ok((row.try_get("state")?, row.try_get("count")?)))
            .collect::<Result<_, sqlx::Error>>()
            .map_err(failed)
    }

    async fn outbox_shape(
        &self,
        states: &[OutboxState],
        times: &[Timestamp],
    ) -> Result<Vec<ShapeCell>, StoreError> {
        let failed = failed("looking at the shape of the outbox");
        let states: Vec<&str> = states.iter().map(|state| state.as_str()).collect();
        let times: Vec<String> = times.iter().map(|&time| time_text(time)).collect();
        sqlx::query(
            "SELECT coalesce((SELECT a.sip_uri FROM accounts a WHERE a.id = o.account_id), o.account) AS account,
                    coalesce(o.destination, nullif(o.recipients, ''), 'conversation:' || o.conversation_id, '')
                        AS destination,
                    (SELECT count(*) FROM json_each(?2) k WHERE k.value >= o.created_at) AS age,
                    count(*) AS count
               FROM json_each(?1) s
              CROSS JOIN outbox o INDEXED BY outbox_by_state ON o.state = s.value
              GROUP BY 1, 2, 3",
        )
        .bind(serde_json::Value::from(states).to_string())
        .bind(serde_json::Value::from(times).to_string())
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(rows::shape_cell)
        .collect::<Result<_, sqlx::Error>>()
        .map_err(failed)
    }

    async fn purge_outbox(&self, before: Timestamp, limit: i64) -> Result<u64, StoreError> {
        self.writer
            .run("pruning the outbox", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "DELETE FROM outbox
                          WHERE id IN (SELECT f.id FROM outbox f INDEXED BY outbox_finished
                                        WHERE f.state IN ('sent', 'delivered', 'failed', 'expired', 'cancelled')
                                          AND coalesce(f.finished_at, f.sent_at) < ?1
                                        ORDER BY coalesce(f.finished_at, f.sent_at)
                                        LIMIT ?2)",
                    )
                    .bind(time_text(before))
                    .bind(limit)
                    .execute(connection)
                    .await
                    .map(|done| done.rows_affected())
                    .map_err(failed("pruning the outbox"))
                })
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use sqlx::{
        Connection as _, SqlitePool,
        sqlite::{SqliteConnectOptions, SqlitePoolOptions},
    };

    use super::*;
    use crate::store::{Allowances, sqlite::migrations};

    const DESTINATIONS: i64 = 30;
    const FEW: i64 = 10;

    /// An empty queue of one account that is online.
    async fn queue() -> SqlitePool {
        let options = SqliteConnectOptions::new().in_memory(true).foreign_keys(true);
        let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
        migrations::run(&pool).await.unwrap();
        sqlx::raw_sql(
            "INSERT INTO accounts (sip_uri, username) VALUES ('sip:alice@contoso.com', 'alice');
             INSERT INTO account_status (account_id, state, since, node_id)
             VALUES (1, 'online', '2026-11-22T10:00:00.000Z', 'a')",
        )
        .execute(&pool)
        .await
        .unwrap();
        pool
    }

    /// Rows as the service leaves them behind.
    async fn finish_rows(pool: &SqlitePool, rows: i64) {
        sqlx::query(
            "INSERT INTO outbox (account, recipients, body, account_id, destination, finished_at)
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
             SELECT 'sip:alice@contoso.com', 'bob@contoso.com', 'x', 1, 'sip:bob@contoso.com', 'x' FROM n",
        )
        .bind(rows)
        .execute(pool)
        .await
        .unwrap();
        sqlx::raw_sql(
            "UPDATE outbox SET state = 'delivered', revision = 1 WHERE state = 'queued';
             INSERT INTO outbox_attempts (outbox_id, attempt, started_at, operation_id)
             SELECT id, 1, 'x', 'o' || id FROM outbox o WHERE o.id > (SELECT coalesce(max(outbox_id), 0) FROM outbox_attempts);
             INSERT INTO conversations (account_id, href, started_at, ended_at)
             SELECT account_id, 'c' || id, 'x', 'x' FROM outbox;",
        )
        .execute(pool)
        .await
        .unwrap();
    }

    /// Steps of SQLite's machine that it takes to look at new rows and to claim the first of each destination, twice.
    async fn steps_of_claims(pool: &SqlitePool) -> u64 {
        sqlx::query(
            "INSERT INTO outbox (account, recipients, body, send_after, expires_at)
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
             SELECT 'Alice@contoso.com', 'bob.' || (n.i % ?2) || '@contoso.com', 'x', '2026-11-22', '2027-11-22' FROM n",
        )
        .bind(3 * DESTINATIONS)
        .bind(DESTINATIONS)
        .execute(pool)
        .await
        .unwrap();
        let settings = ClaimSettings {
            node: "a".to_owned(),
            max_attempts: 5,
            max_body_bytes: 1000,
            limit: 2 * DESTINATIONS,
            allowances: Allowances::UNLIMITED,
        };
        let steps = Arc::new(AtomicU64::new(0));
        let mut connection = pool.acquire().await.unwrap();
        let counted = Arc::clone(&steps);
        connection.lock_handle().await.unwrap().set_progress_handler(1, move || {
            counted.fetch_add(1, Ordering::Relaxed);
            true
        });
        for second in 0..2 {
            let now: Timestamp = format!("2026-11-23T10:00:0{second}Z").parse().unwrap();
            let mut transaction = connection.begin().await.unwrap();
            admit_new_rows(&mut transaction, now, &settings).await.unwrap();
            expire(&mut transaction, now).await.unwrap();
            let heads = due_heads(&mut transaction, now, &settings).await.unwrap();
            let claimed = claim(&mut transaction, heads, now, &settings).await.unwrap();
            assert_eq!(claimed.sends.len(), usize::try_from(DESTINATIONS).unwrap());
            sqlx::query("UPDATE outbox INDEXED BY outbox_sending SET state = 'sent', revision = revision + 1 WHERE state = 'sending'")
                .execute(&mut *transaction)
                .await
                .unwrap();
            transaction.commit().await.unwrap();
        }
        connection.lock_handle().await.unwrap().remove_progress_handler();
        steps.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn finished_rows_cost_a_claim_nothing() {
        let beside_few = {
            let pool = queue().await;
            finish_rows(&pool, FEW).await;
            steps_of_claims(&pool).await
        };
        // Somebody may have had statistics taken at any time, and they stay as they were then.
        for analyzed_beside in [None, Some(1), Some(FEW), Some(20_000)] {
            let pool = queue().await;
            finish_rows(&pool, analyzed_beside.unwrap_or(FEW)).await;
            if analyzed_beside.is_some() {
                sqlx::query("ANALYZE").execute(&pool).await.unwrap();
            }
            finish_rows(&pool, 20_000).await;
            let beside_many = steps_of_claims(&pool).await;
            assert!(
                beside_many <= beside_few + beside_few / 100,
                "{beside_many} and {beside_few} steps, statistics beside {analyzed_beside:?}"
            );
        }
    }
}
