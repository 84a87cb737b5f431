//! The queue: admission of new rows and claims in one transaction, and what users do with rows.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, QueryBuilder, Row, postgres::PgRow};

use super::{
    PostgresStore,
    column::{Time, optional_time},
};
use crate::{
    identifiers::{AccountId, ConversationId, OutboxId, SipUri},
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
/// else's row. Accounts are found by jumping from one to the next in the index, as for [`CLAIM`]. They are named by the
/// expression that only this index has: by the column alone the planner may take the one that counts an account's rows, and
/// then reads all that wait.
const NEW_ROWS: &str = "
    WITH RECURSIVE
    spellings (account) AS (
        SELECT (SELECT min(o.account || '') FROM outbox o WHERE o.state = 'queued' AND o.destination IS NULL)
        UNION ALL
        SELECT (SELECT min(o.account || '') FROM outbox o
                 WHERE o.state = 'queued' AND o.destination IS NULL AND o.account || '' > w.account)
          FROM spellings w
         WHERE w.account IS NOT NULL
    ),
    accounts (account) AS MATERIALIZED (
        SELECT w.account FROM spellings w WHERE w.account IS NOT NULL LIMIT $1
    ),
    chosen (id) AS (
        SELECT r.id
          FROM accounts a
         CROSS JOIN LATERAL (SELECT o.id FROM outbox o
                              WHERE o.state = 'queued' AND o.destination IS NULL AND o.account || '' = a.account
                              ORDER BY o.id
                              LIMIT (SELECT least($1 / count(*), $2) FROM accounts)) r
    )
    SELECT o.id, o.account, o.recipients, o.body, o.content_type, o.subject, o.importance, o.conversation_id,
           o.thread_id, o.send_after, o.expires_at
      FROM outbox o
     WHERE o.id = ANY (ARRAY(SELECT c.id FROM chosen c)) AND coalesce(o.state, '') = 'queued' AND o.destination IS NULL
     ORDER BY o.id
       FOR UPDATE OF o SKIP LOCKED";

/// What a claim hands out, for rows `o` with `c` the conversation the user gave, if it is open.
const CLAIMED: &str = "o.id, o.account_id, o.destination, o.operation_id, o.recipients, o.given_conversation_id, c.href, o.body,
                       o.content_type, o.subject, o.importance, o.thread_id, o.attempts, o.max_attempts, o.expires_at,
                       o.created_at, o.claimed_at, o.possible_duplicate";

/// Whether an event since the claim of a row may be of it and was never read: see [`crate::store::UnsettledSend`].
const EVENTS_MISSED: &str = "(EXISTS (SELECT 1 FROM gaps g
                                       WHERE g.account_id = o.account_id AND g.to_at >= o.claimed_at
                                         AND g.reason <> $2)
                           OR EXISTS (SELECT 1 FROM event_quarantine q
                                       WHERE q.account_id = o.account_id AND q.received_at >= o.claimed_at
                                         AND q.resolved_at IS NULL AND q.cursor IS NOT NULL AND q.sender IS NULL)
                           OR EXISTS (SELECT 1 FROM invitations i
                                       WHERE i.account_id = o.account_id AND i.started_at >= o.claimed_at
                                         AND i.session_id = (SELECT s.id FROM sessions s
                                                              WHERE s.account_id = o.account_id AND s.ended_at IS NULL)
                                         AND i.kind = 'messaging' AND i.direction IS DISTINCT FROM 'incoming'
                                         AND i.operation_id IS NULL AND i.conversation_id IS NULL
                                         AND i.awaiting IS NULL))";

/// Joins the conversation that the user gave, if it is open in the account's session.
const GIVEN_CONVERSATION: &str = "LEFT JOIN LATERAL
                                         (SELECT c.href FROM conversations c
                                           WHERE c.id = o.given_conversation_id AND c.account_id = o.account_id
                                             AND c.ended_at IS NULL
                                             AND c.session_id = (SELECT s.id FROM sessions s
                                                                  WHERE s.account_id = o.account_id
                                                                    AND s.ended_at IS NULL)
                                          OFFSET 0) c
                                      ON TRUE";

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
    connection: &mut PgConnection,
    now: Timestamp,
    settings: &ClaimSettings,
) -> Result<bool, sqlx::Error> {
    let found = sqlx::query(NEW_ROWS)
        .bind(ADMITTED_AT_ONCE)
        .bind(ADMITTED_OF_ACCOUNT)
        .fetch_all(&mut *connection)
        .await?;
    if found.is_empty() {
        return Ok(false);
    }
    let mut submissions = Vec::with_capacity(found.len());
    for row in &found {
        submissions.push((OutboxId(row.integer("id")?), submission(row)?));
    }
    let known = known(connection, submissions.iter().map(|(_, submission)| submission)).await?;
    let (mut admitted, mut refused) = (Vec::new(), Vec::new());
    for (id, submission) in &submissions {
        match admit(submission, &known, settings.max_body_bytes, now) {
            Ok(row) => admitted.push((*id, row)),
            Err(refusal) => {
                let account = submission.account.parse().ok().and_then(|uri| known.account(&uri));
                refused.push((*id, account, refusal));
            }
        }
    }
    write_admitted(connection, &admitted).await?;
    write_refused(connection, &refused, now).await?;
    Ok(more_may_wait(submissions.iter().map(|(_, submission)| submission.account.as_str())))
}

async fn write_admitted(
    connection: &mut PgConnection,
    rows: &[(OutboxId, Admitted)],
) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "UPDATE outbox o
            SET account_id = k.account_id, destination = k.destination, given_conversation_id = o.conversation_id,
                send_after = k.send_after, expires_at = k.expires_at, revision = o.revision + 1
           FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::timestamptz[], $5::timestamptz[])
                AS k (id, account_id, destination, send_after, expires_at)
          WHERE o.id = k.id AND o.id = ANY ($1)",
    )
    .bind(rows.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, row)| row.account.0).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, row)| row.destination.as_str()).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, row)| optional_time(row.send_after)).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, row)| optional_time(row.expires_at)).collect::<Vec<_>>())
    .execute(connection)
    .await
    .map(drop)
}

async fn write_refused(
    connection: &mut PgConnection,
    rows: &[(OutboxId, Option<AccountId>, Refusal)],
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let states = rows.iter().map(|(_, _, refusal)| {
        if refusal.expired { OutboxState::Expired.as_str() } else { OutboxState::Failed.as_str() }
    });
    sqlx::query(
        "UPDATE outbox o
            SET state = k.state, account_id = k.account_id, given_conversation_id = o.conversation_id,
                last_code = k.code, last_subcode = NULL, last_error = k.sentence, finished_at = $6, updated_at = $6,
                revision = o.revision + 1
           FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::text[])
                AS k (id, account_id, state, code, sentence)
          WHERE o.id = k.id AND o.id = ANY ($1)",
    )
    .bind(rows.iter().map(|(id, _, _)| id.0).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, account, _)| account.map(|id| id.0)).collect::<Vec<_>>())
    .bind(states.collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, _, refusal)| refusal.code).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, _, refusal)| refusal.sentence.as_str()).collect::<Vec<_>>())
    .bind(Time(now))
    .execute(connection)
    .await
    .map(drop)
}

/// Any text that PostgreSQL takes can be read, and so can any time.
fn submission(row: &PgRow) -> Result<Submission, sqlx::Error> {
    let given_time = |column: &str| -> Result<GivenTime, sqlx::Error> {
        Ok(row.optional_time(column)?.map_or(GivenTime::Absent, GivenTime::At))
    };
    Ok(Submission {
        account: row.text("account")?,
        recipients: row.optional_text("recipients")?,
        body: row.text("body")?,
        content_type: row.text("content_type")?,
        subject: row.optional_text("subject")?,
        importance: row.text("importance")?,
        conversation: row.optional_integer("conversation_id")?.map(ConversationId),
        thread_id: row.optional_text("thread_id")?,
        send_after: given_time("send_after")?,
        expires_at: given_time("expires_at")?,
    })
}

async fn known(
    connection: &mut PgConnection,
    submissions: impl Iterator<Item = &Submission> + Clone,
) -> Result<Known, sqlx::Error> {
    let uris: BTreeSet<String> = submissions
        .clone()
        .filter_map(|submission| submission.account.parse::<SipUri>().ok())
        .map(|uri| uri.to_string())
        .collect();
    let mut known = Known::default();
    let accounts = sqlx::query(
        "SELECT a.id, a.sip_uri FROM accounts a WHERE a.sip_uri = ANY ($1::text[]) AND a.removed_at IS NULL",
    )
    .bind(uris.into_iter().collect::<Vec<_>>())
    .fetch_all(&mut *connection)
    .await?;
    for row in accounts {
        known.accounts.insert(row.text("sip_uri")?, AccountId(row.integer("id")?));
    }
    let ids: BTreeSet<i64> =
        submissions.filter_map(|submission| submission.conversation).map(|id| id.0).collect();
    if ids.is_empty() {
        return Ok(known);
    }
    let conversations = sqlx::query(
        "SELECT c.id, c.account_id, c.multiparty,
                coalesce(c.href IS NOT NULL AND c.ended_at IS NULL
                         AND c.session_id = (SELECT s.id FROM sessions s
                                              WHERE s.account_id = c.account_id AND s.ended_at IS NULL), FALSE) AS open,
                coalesce(
                    (SELECT string_agg(DISTINCT p.sip_uri, ';') FROM participants p
                      WHERE p.account_id = c.account_id AND p.conversation_id = c.id AND NOT p.is_local
                        AND p.sip_uri IS NOT NULL AND p.sip_uri <> a.sip_uri),
                    (SELECT CASE i.direction WHEN 'incoming' THEN i.from_uri ELSE i.to_uri END FROM invitations i
                      WHERE i.account_id = c.account_id AND i.conversation_id = c.id AND i.kind = 'messaging'
                      ORDER BY i.id LIMIT 1)) AS remote
           FROM conversations c
           JOIN accounts a ON a.id = c.account_id
          WHERE c.id = ANY ($1::bigint[])",
    )
    .bind(ids.into_iter().collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    for row in conversations {
        let remote = row.optional_text("remote")?;
        let only = remote.filter(|remote| !remote.contains(';')).and_then(|remote| remote.parse().ok());
        let conversation = NamedConversation {
            account: AccountId(row.integer("account_id")?),
            with: if row.flag("multiparty")? { None } else { only },
            open: row.flag("open")?,
        };
        known.conversations.insert(ConversationId(row.integer("id")?), conversation);
    }
    Ok(known)
}

/// What becomes of a row `o` that waited too long, at `$2`.
const EXPIRED: &str = "
    state = 'expired', last_code = 'Expired', last_subcode = NULL,
    last_error = 'it was to be sent before '
                 || to_char(o.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')
                 || coalesce('; ' || o.last_error, ''),
    finished_at = $2, updated_at = $2, revision = o.revision + 1";

/// Rows that waited too long, those first that should have left first, and no more than others can wait for. One that its
/// user is changing right now expires later. Returns whether more may be there.
async fn expire(connection: &mut PgConnection, now: Timestamp) -> Result<bool, sqlx::Error> {
    let expired = sqlx::query(AssertSqlSafe(format!(
        "UPDATE outbox o
            SET {EXPIRED}
          WHERE o.id = ANY (ARRAY(SELECT e.id FROM outbox e
                                   WHERE e.state = 'queued' AND e.expires_at IS NOT NULL
                                     AND e.destination IS NOT NULL AND e.expires_at <= $2
                                   ORDER BY e.expires_at
                                   LIMIT $1
                                     FOR UPDATE SKIP LOCKED))"
    )))
    .bind(EXPIRED_AT_ONCE)
    .bind(Time(now))
    .execute(connection)
    .await?;
    Ok(expired.rows_affected() >= EXPIRED_AT_ONCE.unsigned_abs())
}

/// Claims the first due row of every free destination of every account that is enabled, online here and held by this node
/// ($4), and begins its attempt: as many as the account may send ($5 to $7, else $8). Who may send less than waits goes on
/// after the destination at which the last claim stopped.
/// Destinations are found by jumping from one to the next in the index, so the cost grows with the number of destinations
/// and not with the queue. Accounts take turns when there are more rows than `limit`. A destination whose first row is
/// being changed by its user is passed over. Where so many rows waited too long that some are still there, a first row that
/// did is locked to expire instead.
///
/// The statement is planned while the queue is short and kept for when it is long. So nothing of `outbox` is joined, which
/// would let the planner read all of it: what belongs to a destination comes from a subquery of its own, and rows that are
/// known by their ids are looked up by an array of them. Whether a row still waits is asked in a way that no other index
/// can answer.
const CLAIM: &str = "
    WITH RECURSIVE
    allowances (account_id, allowed, after) AS MATERIALIZED (
        SELECT * FROM unnest($5::bigint[], $6::bigint[], $7::text[])
    ),
    waiting (account_id) AS (
        SELECT (SELECT min(o.account_id) FROM outbox o WHERE o.state = 'queued' AND o.destination IS NOT NULL)
        UNION ALL
        SELECT (SELECT min(o.account_id) FROM outbox o
                 WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id > w.account_id)
          FROM waiting w
         WHERE w.account_id IS NOT NULL
    ),
    destinations (account_id, destination) AS (
        SELECT w.account_id,
               (SELECT min(o.destination) FROM outbox o
                 WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id = w.account_id)
          FROM waiting w
          JOIN account_status s ON s.account_id = w.account_id
          JOIN accounts b ON b.id = w.account_id AND b.enabled
         WHERE s.state = 'online' AND s.node_id = $1 AND ($4::bigint[] IS NULL OR w.account_id = ANY ($4))
           AND coalesce((SELECT a.allowed FROM allowances a WHERE a.account_id = w.account_id), $8) > 0
        UNION ALL
        SELECT d.account_id,
               (SELECT min(o.destination) FROM outbox o
                 WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id = d.account_id
                   AND o.destination > d.destination)
          FROM destinations d
         WHERE d.destination IS NOT NULL
    ),
    turns (id, priority, turn, allowed) AS (
        SELECT h.id, h.priority,
               row_number() OVER (PARTITION BY d.account_id
                                  ORDER BY h.priority, d.destination <= a.after,
                                           CASE WHEN a.after IS NOT NULL THEN d.destination END, h.id),
               coalesce(a.allowed, $8)
          FROM destinations d
          LEFT JOIN allowances a ON a.account_id = d.account_id
         CROSS JOIN LATERAL (SELECT o.id, o.priority, o.next_attempt_at, o.expires_at FROM outbox o
                              WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id = d.account_id
                                AND o.destination = d.destination AND (o.send_after IS NULL OR o.send_after <= $2)
                              ORDER BY o.priority, o.id
                              LIMIT 1) h
         WHERE d.destination IS NOT NULL
           AND (h.next_attempt_at IS NULL OR h.next_attempt_at <= $2 OR h.expires_at <= $2)
           AND (SELECT s.id FROM outbox s
                 WHERE s.state = 'sending' AND s.account_id = d.account_id AND s.destination = d.destination
                 LIMIT 1) IS NULL
    ),
    due (ids) AS (
        SELECT ARRAY(SELECT t.id FROM turns t WHERE t.turn <= t.allowed ORDER BY t.turn, t.priority, t.id LIMIT $3)
    ),
    locked (id, late) AS (
        SELECT o.id, coalesce(o.expires_at <= $2, FALSE)
          FROM outbox o
         WHERE o.id = ANY ((SELECT d.ids FROM due d)::bigint[])
           AND coalesce(o.state, '') = 'queued' AND o.destination IS NOT NULL
           FOR UPDATE OF o SKIP LOCKED
    ),
    claimed AS (
        UPDATE outbox o
           SET state = 'sending', attempts = least(o.attempts, 999999999) + 1,
               operation_id = gen_random_uuid()::text, next_attempt_at = NULL, claimed_by = $1, claimed_at = $2,
               updated_at = $2, revision = o.revision + 1
         WHERE o.id = ANY (ARRAY(SELECT l.id FROM locked l WHERE NOT l.late))
        RETURNING array_position((SELECT d.ids FROM due d), o.id) AS place, o.*
    ),
    attempts AS (
        INSERT INTO outbox_attempts (outbox_id, attempt, node, started_at, operation_id)
        SELECT k.id,
               (SELECT coalesce(max(t.attempt), 0) + 1 FROM outbox_attempts t WHERE t.outbox_id = k.id),
               $1, $2, k.operation_id
          FROM claimed k
    )";

#[async_trait]
impl OutboxStore for PostgresStore {
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
        let (fence, settings) = (self.fence.clone(), settings.clone());
        let (claimed, more) = self
            .writer
            .run("claiming rows of the outbox", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("claiming rows of the outbox");
                    let more = admit_new_rows(connection, now, &settings).await.map_err(&failed)?;
                    let late = expire(connection, now).await.map_err(&failed)?;
                    let held = fence.held_of_waiting(connection).await.map_err(&failed)?;
                    let others = &settings.allowances.others;
                    let sends = sqlx::query(AssertSqlSafe(format!(
                        "{CLAIM},
                         expired AS (
                             UPDATE outbox o
                                SET {EXPIRED}
                              WHERE o.id = ANY (ARRAY(SELECT l.id FROM locked l WHERE l.late))
                         )
                         SELECT {CLAIMED} FROM claimed o {GIVEN_CONVERSATION} ORDER BY o.place"
                    )))
                    .bind(&settings.node)
                    .bind(Time(now))
                    .bind(settings.limit)
                    .bind(held)
                    .bind(others.iter().map(|other| other.account.0).collect::<Vec<_>>())
                    .bind(others.iter().map(|other| other.rows).collect::<Vec<_>>())
                    .bind(others.iter().map(|other| other.after.as_deref()).collect::<Vec<_>>())
                    .bind(settings.allowances.each)
                    .fetch_all(connection)
                    .await
                    .map_err(&failed)?
                    .iter()
                    .map(|row| rows::claimed_send(row, settings.max_attempts).map_err(&failed))
                    .collect::<Result<Vec<_>, _>>()?;
                    Ok((sends, more || late))
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
                 SELECT min(send_after) AS due FROM outbox
                  WHERE state = 'queued' AND send_after IS NOT NULL AND send_after > $1 AND destination IS NOT NULL
                 UNION ALL
                 SELECT min(next_attempt_at) FROM outbox
                  WHERE state = 'queued' AND next_attempt_at IS NOT NULL AND next_attempt_at > $1
                    AND destination IS NOT NULL
                 UNION ALL
                 SELECT min(expires_at) FROM outbox
                  WHERE state = 'queued' AND expires_at IS NOT NULL AND expires_at > $1 AND destination IS NOT NULL) AS times",
        )
        .bind(Time(now))
        .fetch_one(&self.readers)
        .await
        .map_err(&failed)?;
        row.optional_user_time("due").map_err(&failed)
    }

    async fn unsettled_sends(&self, account: AccountId) -> Result<Vec<UnsettledSend>, StoreError> {
        let failed = failed("reading sends under way");
        let rows = sqlx::query(AssertSqlSafe(format!(
            "SELECT {CLAIMED}, {EVENTS_MISSED} AS events_missed
               FROM outbox o {GIVEN_CONVERSATION}
              WHERE o.state = 'sending' AND o.account_id = $1
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
        let (fence, outbox, operation_id) = (self.fence.clone(), send.outbox, send.operation_id.0.clone());
        let possible_duplicate = send.possible_duplicate;
        self.writer
            .run("giving a claim back", false, move |connection| {
                Box::pin(async move {
                    let failed = failed("giving a claim back");
                    let account: Option<Option<i64>> =
                        sqlx::query_scalar("SELECT account_id FROM outbox WHERE id = $1")
                            .bind(outbox.0)
                            .fetch_optional(&mut *connection)
                            .await
                            .map_err(&failed)?;
                    if let Some(account) = account.flatten().map(AccountId) {
                        fence.judge(connection, account, fence.epoch(account)?).await?;
                    }
                    let released = sqlx::query(
                        "UPDATE outbox
                            SET state = 'queued', attempts = greatest(attempts - 1, 0), operation_id = NULL, claimed_by = NULL,
                                claimed_at = NULL, next_attempt_at = NULL, finished_at = NULL,
                                last_error = CASE WHEN state = 'sending' THEN last_error END,
                                possible_duplicate = $4, conversation_id = given_conversation_id,
                                destination = CASE WHEN given_conversation_id IS NULL THEN destination END,
                                updated_at = $3, revision = revision + 1
                          WHERE id = $1 AND operation_id = $2 AND state IN ('sending', 'uncertain', 'queued')",
                    )
                    .bind(outbox.0)
                    .bind(&operation_id)
                    .bind(Time(Timestamp::now()))
                    .bind(possible_duplicate)
                    .execute(&mut *connection)
                    .await
                    .map_err(&failed)?;
                    if released.rows_affected() > 0 {
                        sqlx::query("DELETE FROM outbox_attempts WHERE operation_id = $1")
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
                         VALUES ($1, $2, $3, coalesce($4, 'text/plain'), $5, coalesce($6, 'Normal'), $7)
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
        let mut query = QueryBuilder::<Postgres>::new("SELECT o.* FROM outbox o WHERE true");
        if let Some(account) = &filter.account {
            query
                .push(" AND (o.account_id = (SELECT a.id FROM accounts a WHERE a.sip_uri = ")
                .push_bind(account.as_str())
                .push(
                    ") OR (o.account_id IS NULL
                           AND CASE WHEN strpos(o.account, ':') > 0 THEN lower(btrim(o.account))
                                    ELSE 'sip:' || lower(btrim(o.account)) END = ",
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
        let Some(row) = sqlx::query("SELECT * FROM outbox WHERE id = $1")
            .bind(id.0)
            .fetch_optional(&self.readers)
            .await
            .map_err(&failed)?
        else {
            return Ok(None);
        };
        let attempts = sqlx::query("SELECT * FROM outbox_attempts WHERE outbox_id = $1 ORDER BY id")
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
        self.writer
            .run("changing a row's state", true, move |connection| {
                Box::pin(async move {
                    // As a user would: the triggers do the rest.
                    sqlx::query("UPDATE outbox SET state = $2 WHERE id = $1 AND state = ANY ($3::text[])")
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
        let times: Vec<Time> = times.iter().map(|&time| Time(time)).collect();
        sqlx::query(
            "SELECT coalesce((SELECT a.sip_uri FROM accounts a WHERE a.id = o.account_id), o.account) AS account,
                    coalesce(o.destination, nullif(o.recipients, ''), 'conversation:' || o.conversation_id, '')
                        AS destination,
                    (SELECT count(*) FROM unnest($2::timestamptz[]) k WHERE k >= o.created_at) AS age,
                    count(*) AS count
               FROM outbox o
              WHERE o.state = ANY ($1::text[])
              GROUP BY 1, 2, 3",
        )
        .bind(states)
        .bind(times)
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
                    // Several servers may prune at once; a row that its user is changing stays for the next time.
                    sqlx::query(
                        "DELETE FROM outbox
                          WHERE id = ANY (ARRAY(SELECT f.id FROM outbox f
                                                 WHERE f.state IN ('sent', 'delivered', 'failed', 'expired', 'cancelled')
                                                   AND coalesce(f.finished_at, f.sent_at) < $1
                                                 ORDER BY coalesce(f.finished_at, f.sent_at)
                                                 LIMIT $2
                                                   FOR UPDATE SKIP LOCKED))",
                    )
                    .bind(Time(before))
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
