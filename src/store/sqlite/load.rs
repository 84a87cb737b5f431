//! Rows of a batch, from the database into the archive's workspace: one query per table, whatever the batch's size.
//!
//! Keys travel as one JSON array per query (`json_each`), so the statements are the same for every batch and stay
//! prepared. `CROSS JOIN` keeps SQLite's planner from turning the look-ups round.

use serde::Serialize;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use super::column::{
    direction, invitation_action, invitation_kind, lossy_text, optional_time, optional_user_time,
    optional_word, outbox_state, some_lossy_text, time, time_text, undecodable, word,
};
use crate::{
    archive::{
        Keys, Workspace,
        keys::ResourceKey,
        row::{
            AttemptRow, Awaiting, ChainHead, ConversationRow, InvitationRow, MessageRow, MessageSource,
            MessageStatus, OutboxSend, ParticipantRow, SessionRow,
        },
        workspace::{Counters, RuleSettings},
    },
    identifiers::{AccountId, ConversationId, MessageId, OperationId, OutboxId, SessionId, SipUri},
};

/// Everything that commits with these keys may read or change.
pub(super) async fn workspace(
    connection: &mut SqliteConnection,
    keys: &Keys,
    rules: RuleSettings,
) -> Result<Workspace, sqlx::Error> {
    let mut workspace = Workspace::new(rules, counters(connection).await?);
    sessions(connection, &mut workspace, keys).await?;
    conversations(connection, &mut workspace, keys).await?;
    invitations(connection, &mut workspace, keys).await?;
    participants(connection, &mut workspace, keys).await?;
    logged(connection, &mut workspace, keys).await?;
    outbox(connection, &mut workspace, keys).await?;
    conversations_by_id(connection, &mut workspace).await?;
    messages(connection, &mut workspace, keys).await?;
    sends_of_messages(connection, &mut workspace).await?;
    missing_senders(connection, &mut workspace).await?;
    Ok(workspace)
}

/// An empty workspace with the highest ids given out, deleted rows included.
pub(super) async fn counters(connection: &mut SqliteConnection) -> Result<Counters, sqlx::Error> {
    let rows = sqlx::query("SELECT name, seq FROM sqlite_sequence").fetch_all(connection).await?;
    let mut counters = Counters::default();
    for row in rows {
        let seq: i64 = row.try_get("seq")?;
        match row.try_get::<&str, _>("name")? {
            "conversations" => counters.conversations = seq,
            "participants" => counters.participants = seq,
            "invitations" => counters.invitations = seq,
            "messages" => counters.messages = seq,
            _ => {}
        }
    }
    Ok(counters)
}

/// A list of keys as a query takes it.
pub(super) fn json(keys: &impl Serialize) -> Result<String, sqlx::Error> {
    serde_json::to_string(keys).map_err(|error| sqlx::Error::Encode(error.into()))
}

fn resource_keys<'a>(keys: impl IntoIterator<Item = &'a ResourceKey>) -> Result<String, sqlx::Error> {
    let triples: Vec<(i64, i64, &str)> =
        keys.into_iter().map(|key| (key.account.0, key.session.0, key.href.as_str())).collect();
    json(&triples)
}

async fn sessions(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if keys.sessions.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = keys.sessions.iter().map(|(_, session)| session.0).collect();
    let rows = sqlx::query(
        "SELECT s.id, s.account_id, s.event_cursor, s.last_ack_at, s.ended_at, a.sip_uri,
                coalesce(h.seq, 0) AS chain_seq, h.hash AS chain_hash
           FROM json_each(?1) k
          CROSS JOIN sessions s ON s.id = k.value
           JOIN accounts a ON a.id = s.account_id
           LEFT JOIN chain_heads h ON h.account_id = s.account_id",
    )
    .bind(json(&ids)?)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_chain_head(chain_head(&row)?);
        workspace.load_session(SessionRow {
            id: SessionId(row.try_get("id")?),
            account: AccountId(row.try_get("account_id")?),
            account_uri: uri(&row, "sip_uri")?,
            event_cursor: row.try_get("event_cursor")?,
            last_ack_at: optional_time(&row, "last_ack_at")?,
            ended_at: optional_time(&row, "ended_at")?,
        });
    }
    Ok(())
}

/// From a row with `account_id`, `sip_uri`, `chain_seq` and `chain_hash`.
fn chain_head(row: &SqliteRow) -> Result<ChainHead, sqlx::Error> {
    Ok(ChainHead {
        account: AccountId(row.try_get("account_id")?),
        account_uri: uri(row, "sip_uri")?,
        seq: row.try_get("chain_seq")?,
        hash: row
            .try_get::<Option<String>, _>("chain_hash")?
            .unwrap_or_else(|| crate::archive::chain::GENESIS.to_owned()),
    })
}

pub(super) fn uri(row: &SqliteRow, column: &str) -> Result<SipUri, sqlx::Error> {
    row.try_get::<&str, _>(column)?.parse().map_err(|error| undecodable(column, error))
}

async fn conversations(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if keys.conversations.is_empty() {
        return Ok(());
    }
    let rows = sqlx::query(
        "SELECT c.*
           FROM json_each(?1) k
          CROSS JOIN conversations c
             ON c.account_id = json_extract(k.value, '$[0]') AND c.session_id = json_extract(k.value, '$[1]')
            AND c.href = json_extract(k.value, '$[2]')",
    )
    .bind(resource_keys(&keys.conversations)?)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_conversation(conversation(&row)?);
    }
    Ok(())
}

/// Conversations that other rows speak of by id.
async fn conversations_by_id(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
) -> Result<(), sqlx::Error> {
    let ids = workspace.missing_conversations();
    if ids.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = ids.into_iter().map(|id| id.0).collect();
    let rows = sqlx::query("SELECT c.* FROM json_each(?1) k CROSS JOIN conversations c ON c.id = k.value")
        .bind(json(&ids)?)
        .fetch_all(connection)
        .await?;
    for row in rows {
        workspace.load_conversation(conversation(&row)?);
    }
    Ok(())
}

fn conversation(row: &SqliteRow) -> Result<ConversationRow, sqlx::Error> {
    Ok(ConversationRow {
        id: ConversationId(row.try_get("id")?),
        account: AccountId(row.try_get("account_id")?),
        session: row.try_get::<Option<i64>, _>("session_id")?.map(SessionId),
        href: row.try_get("href")?,
        thread_id: row.try_get("thread_id")?,
        subject: row.try_get("subject")?,
        importance: row.try_get("importance")?,
        direction: optional_word(row, "direction", direction)?,
        state: row.try_get("state")?,
        multiparty: row.try_get("multiparty")?,
        online_meeting_uri: row.try_get("online_meeting_uri")?,
        started_at: time(row, "started_at")?,
        connected_at: optional_time(row, "connected_at")?,
        ended_at: optional_time(row, "ended_at")?,
        end_code: row.try_get("end_code")?,
        end_subcode: row.try_get("end_subcode")?,
        awaiting_fetch: row.try_get::<Option<&str>, _>("awaiting")?.is_some(),
        continued_in: row.try_get::<Option<i64>, _>("continued_in")?.map(ConversationId),
        first_message_href: row.try_get("first_message_href")?,
    })
}

async fn invitations(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if !keys.invitations.is_empty() {
        let rows = sqlx::query(
            "SELECT i.*
               FROM json_each(?1) k
              CROSS JOIN invitations i
                 ON i.account_id = json_extract(k.value, '$[0]') AND i.session_id = json_extract(k.value, '$[1]')
                AND i.href = json_extract(k.value, '$[2]')",
        )
        .bind(resource_keys(&keys.invitations)?)
        .fetch_all(&mut *connection)
        .await?;
        for row in rows {
            workspace.load_invitation(invitation(&row)?);
        }
    }
    if !keys.operations.is_empty() {
        let rows = sqlx::query(
            "SELECT i.*
               FROM json_each(?1) k
              CROSS JOIN invitations i
                 ON i.account_id = json_extract(k.value, '$[0]') AND i.operation_id = json_extract(k.value, '$[1]')",
        )
        .bind(json(&keys.operations)?)
        .fetch_all(connection)
        .await?;
        for row in rows {
            workspace.load_invitation(invitation(&row)?);
        }
    }
    Ok(())
}

fn invitation(row: &SqliteRow) -> Result<InvitationRow, sqlx::Error> {
    Ok(InvitationRow {
        id: row.try_get("id")?,
        account: AccountId(row.try_get("account_id")?),
        conversation: row.try_get::<Option<i64>, _>("conversation_id")?.map(ConversationId),
        session: row.try_get::<Option<i64>, _>("session_id")?.map(SessionId),
        href: row.try_get("href")?,
        kind: word(row, "kind", invitation_kind)?,
        direction: optional_word(row, "direction", direction)?,
        state: row.try_get("state")?,
        operation_id: row.try_get::<Option<String>, _>("operation_id")?.map(OperationId),
        thread_id: row.try_get("thread_id")?,
        subject: row.try_get("subject")?,
        importance: row.try_get("importance")?,
        from_uri: row.try_get("from_uri")?,
        from_name: row.try_get("from_name")?,
        to_uri: row.try_get("to_uri")?,
        message: row.try_get::<Option<i64>, _>("message_id")?.map(MessageId),
        action: optional_word(row, "action", invitation_action)?,
        started_at: time(row, "started_at")?,
        finished_at: optional_time(row, "finished_at")?,
        code: row.try_get("code")?,
        subcode: row.try_get("subcode")?,
        reason: row.try_get("reason")?,
        awaiting_fetch: row.try_get::<Option<&str>, _>("awaiting")?.is_some(),
    })
}

async fn participants(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if !keys.participants.is_empty() {
        participants_by_href(connection, workspace, &resource_keys(&keys.participants)?).await?;
    }
    if keys.rosters.is_empty() {
        return Ok(());
    }
    let rows = sqlx::query(
        "SELECT p.*
           FROM json_each(?1) k
          CROSS JOIN conversations c
             ON c.account_id = json_extract(k.value, '$[0]') AND c.session_id = json_extract(k.value, '$[1]')
            AND c.href = json_extract(k.value, '$[2]')
          CROSS JOIN participants p ON p.account_id = c.account_id AND p.conversation_id = c.id
          WHERE p.left_at IS NULL",
    )
    .bind(resource_keys(&keys.rosters)?)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_participant(participant(&row)?);
    }
    Ok(())
}

async fn participants_by_href(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &str,
) -> Result<(), sqlx::Error> {
    let rows = sqlx::query(
        "SELECT p.*
           FROM json_each(?1) k
          CROSS JOIN participants p
             ON p.account_id = json_extract(k.value, '$[0]') AND p.session_id = json_extract(k.value, '$[1]')
            AND p.href = json_extract(k.value, '$[2]')",
    )
    .bind(keys)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_participant(participant(&row)?);
    }
    Ok(())
}

/// Participants whose fetch decides whether a waiting message is settled.
pub(super) async fn missing_senders(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
) -> Result<(), sqlx::Error> {
    let senders = workspace.missing_senders();
    if senders.is_empty() {
        return Ok(());
    }
    participants_by_href(connection, workspace, &json(&senders)?).await
}

fn participant(row: &SqliteRow) -> Result<ParticipantRow, sqlx::Error> {
    Ok(ParticipantRow {
        id: row.try_get("id")?,
        account: AccountId(row.try_get("account_id")?),
        conversation: ConversationId(row.try_get("conversation_id")?),
        session: row.try_get::<Option<i64>, _>("session_id")?.map(SessionId),
        href: row.try_get("href")?,
        sip_uri: row.try_get("sip_uri")?,
        display_name: row.try_get("display_name")?,
        role: row.try_get("role")?,
        source_network: row.try_get("source_network")?,
        is_local: row.try_get("is_local")?,
        joined_at: optional_time(row, "joined_at")?,
        left_at: optional_time(row, "left_at")?,
        awaiting_fetch: row.try_get::<Option<&str>, _>("awaiting")?.is_some(),
    })
}

/// What conversation logs are compared with.
async fn logged(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if keys.logged.is_empty() {
        return Ok(());
    }
    let threads: Vec<_> = keys
        .logged
        .iter()
        .map(|key| (key.account.0, &key.thread_id, time_text(key.from), time_text(key.to)))
        .collect();
    let threads = json(&threads)?;
    let rows = sqlx::query(
        "SELECT c.*
           FROM json_each(?1) k
          CROSS JOIN conversations c INDEXED BY conversations_thread
             ON c.account_id = json_extract(k.value, '$[0]') AND c.thread_id = json_extract(k.value, '$[1]')",
    )
    .bind(&threads)
    .fetch_all(&mut *connection)
    .await?;
    for row in rows {
        workspace.load_conversation(conversation(&row)?);
    }
    let rows = sqlx::query(
        "SELECT p.*
           FROM json_each(?1) k
          CROSS JOIN conversations c INDEXED BY conversations_thread
             ON c.account_id = json_extract(k.value, '$[0]') AND c.thread_id = json_extract(k.value, '$[1]')
          CROSS JOIN participants p INDEXED BY participants_of_conversation
             ON p.account_id = c.account_id AND p.conversation_id = c.id",
    )
    .bind(&threads)
    .fetch_all(&mut *connection)
    .await?;
    for row in rows {
        workspace.load_participant(participant(&row)?);
    }
    let rows = sqlx::query(
        "SELECT DISTINCT c.*
           FROM json_each(?1) k
          CROSS JOIN messages m INDEXED BY messages_sent
             ON m.account_id = json_extract(k.value, '$[0]')
            AND m.sent_at BETWEEN json_extract(k.value, '$[2]') AND json_extract(k.value, '$[3]')
          CROSS JOIN conversations c ON c.id = m.conversation_id
          WHERE c.thread_id IS NULL OR json_extract(k.value, '$[1]') IS NULL",
    )
    .bind(&threads)
    .fetch_all(&mut *connection)
    .await?;
    for row in rows {
        workspace.load_conversation(conversation(&row)?);
    }
    let rows = sqlx::query(
        "SELECT m.*
           FROM json_each(?1) k
          CROSS JOIN messages m INDEXED BY messages_sent
             ON m.account_id = json_extract(k.value, '$[0]')
            AND m.sent_at BETWEEN json_extract(k.value, '$[2]') AND json_extract(k.value, '$[3]')
          CROSS JOIN conversations c ON c.id = m.conversation_id
          WHERE c.thread_id IS NULL OR json_extract(k.value, '$[1]') IS NULL
             OR c.thread_id = json_extract(k.value, '$[1]')",
    )
    .bind(&threads)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_message(message(&row)?);
    }
    Ok(())
}

async fn outbox(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    let operations: Vec<&str> = keys.operations.iter().map(|(_, operation)| operation.0.as_str()).collect();
    sends_by_operation(connection, workspace, &operations).await?;
    if !keys.outbox.is_empty() {
        let rows = sqlx::query(
            "SELECT o.* FROM json_each(?1) k CROSS JOIN outbox o ON o.id = k.value WHERE o.account_id IS NOT NULL",
        )
        .bind(json(&keys.outbox.iter().map(|id| id.0).collect::<Vec<_>>())?)
        .fetch_all(&mut *connection)
        .await?;
        for row in rows {
            workspace.load_outbox(outbox_send(&row)?);
        }
    }
    if !keys.sending.is_empty() {
        let accounts = json(&keys.sending.iter().map(|id| id.0).collect::<Vec<_>>())?;
        let rows = sqlx::query(
            "SELECT o.*
               FROM json_each(?1) k
              CROSS JOIN outbox o INDEXED BY outbox_sending ON o.account_id = k.value AND o.state = 'sending'",
        )
        .bind(&accounts)
        .fetch_all(&mut *connection)
        .await?;
        for row in rows {
            workspace.load_outbox(outbox_send(&row)?);
        }
        let rows = sqlx::query(
            "SELECT t.id, t.outbox_id, t.operation_id, t.finished_at, t.outcome, t.http_status, t.code, t.subcode,
                    t.detail
               FROM json_each(?1) k
              CROSS JOIN outbox o INDEXED BY outbox_sending ON o.account_id = k.value AND o.state = 'sending'
              CROSS JOIN outbox_attempts t ON t.operation_id = o.operation_id",
        )
        .bind(&accounts)
        .fetch_all(connection)
        .await?;
        for row in rows {
            workspace.load_attempt(attempt(&row)?);
        }
    }
    Ok(())
}

/// Attempts and outbox rows by operation id.
async fn sends_by_operation(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    operations: &[&str],
) -> Result<(), sqlx::Error> {
    if operations.is_empty() {
        return Ok(());
    }
    let operations = json(&operations)?;
    let rows = sqlx::query(
        "SELECT t.id, t.outbox_id, t.operation_id, t.finished_at, t.outcome, t.http_status, t.code, t.subcode, t.detail
           FROM json_each(?1) k CROSS JOIN outbox_attempts t ON t.operation_id = k.value",
    )
    .bind(&operations)
    .fetch_all(&mut *connection)
    .await?;
    for row in rows {
        workspace.load_attempt(attempt(&row)?);
    }
    let rows = sqlx::query(
        "SELECT o.*
           FROM json_each(?1) k
          CROSS JOIN outbox_attempts t ON t.operation_id = k.value
          CROSS JOIN outbox o ON o.id = t.outbox_id
          WHERE o.account_id IS NOT NULL",
    )
    .bind(&operations)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_outbox(outbox_send(&row)?);
    }
    Ok(())
}

/// Outbox rows that loaded messages and invitations answer to, where the event itself names no operation.
async fn sends_of_messages(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
) -> Result<(), sqlx::Error> {
    let operations = workspace.missing_operations();
    let operations: Vec<&str> = operations.iter().map(|operation| operation.0.as_str()).collect();
    sends_by_operation(connection, workspace, &operations).await
}

fn attempt(row: &SqliteRow) -> Result<AttemptRow, sqlx::Error> {
    Ok(AttemptRow {
        id: row.try_get("id")?,
        outbox: OutboxId(row.try_get("outbox_id")?),
        operation_id: OperationId(row.try_get("operation_id")?),
        finished_at: optional_time(row, "finished_at")?,
        outcome: row.try_get("outcome")?,
        http_status: row.try_get("http_status")?,
        code: row.try_get("code")?,
        subcode: row.try_get("subcode")?,
        detail: row.try_get("detail")?,
    })
}

/// A row of which users write a part, and may do so while it is on its way: nothing in it may stop an account's facts.
fn outbox_send(row: &SqliteRow) -> Result<OutboxSend, sqlx::Error> {
    Ok(OutboxSend {
        id: OutboxId(row.try_get("id")?),
        account: AccountId(row.try_get("account_id")?),
        destination: some_lossy_text(row, "destination")?,
        body: some_lossy_text(row, "body")?,
        content_type: some_lossy_text(row, "content_type")?,
        correlation: lossy_text(row, "correlation")?,
        given_conversation: row.try_get::<Option<i64>, _>("given_conversation_id")?.map(ConversationId),
        conversation: row.try_get::<Option<i64>, _>("conversation_id")?.map(ConversationId),
        state: word(row, "state", outbox_state)?,
        operation_id: lossy_text(row, "operation_id")?.map(OperationId),
        attempts: row.try_get("attempts")?,
        max_attempts: row.try_get("max_attempts")?,
        message: row.try_get::<Option<i64>, _>("message_id")?.map(MessageId),
        next_attempt_at: optional_user_time(row, "next_attempt_at")?,
        last_code: lossy_text(row, "last_code")?,
        last_subcode: lossy_text(row, "last_subcode")?,
        last_error: lossy_text(row, "last_error")?,
        claimed_at: optional_user_time(row, "claimed_at")?,
        sent_at: optional_user_time(row, "sent_at")?,
        finished_at: optional_user_time(row, "finished_at")?,
    })
}

async fn messages(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if !keys.messages.is_empty() {
        let rows = sqlx::query(
            "SELECT m.*
               FROM json_each(?1) k
              CROSS JOIN messages m
                 ON m.account_id = json_extract(k.value, '$[0]') AND m.session_id = json_extract(k.value, '$[1]')
                AND m.href = json_extract(k.value, '$[2]')",
        )
        .bind(resource_keys(&keys.messages)?)
        .fetch_all(&mut *connection)
        .await?;
        for row in rows {
            workspace.load_message(message(&row)?);
        }
    }
    // Attempts of rows that are in flight may have said something under an id that no event names.
    let operations = workspace.operations();
    if !operations.is_empty() {
        let rows = sqlx::query(
            "SELECT m.*
               FROM json_each(?1) k
              CROSS JOIN messages m
                 ON m.account_id = json_extract(k.value, '$[0]') AND m.operation_id = json_extract(k.value, '$[1]')",
        )
        .bind(json(&operations)?)
        .fetch_all(&mut *connection)
        .await?;
        for row in rows {
            workspace.load_message(message(&row)?);
        }
    }
    let referenced = workspace.referenced_messages();
    if !referenced.is_empty() {
        let ids: Vec<i64> = referenced.into_iter().map(|id| id.0).collect();
        let rows = sqlx::query("SELECT m.* FROM json_each(?1) k CROSS JOIN messages m ON m.id = k.value")
            .bind(json(&ids)?)
            .fetch_all(&mut *connection)
            .await?;
        for row in rows {
            workspace.load_message(message(&row)?);
        }
    }
    let conversations = workspace.conversation_keys();
    if !conversations.is_empty() {
        let rows = sqlx::query(
            "SELECT m.*
               FROM json_each(?1) k
              CROSS JOIN messages m INDEXED BY messages_open
                 ON m.account_id = json_extract(k.value, '$[0]') AND m.conversation_id = json_extract(k.value, '$[1]')
              WHERE (m.awaiting IS NOT NULL OR (m.href IS NULL AND m.source <> 'event'))
                AND (m.source <> 'conversation_log'
                     OR m.archived_at >= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-15 minutes'))",
        )
        .bind(json(&conversations)?)
        .fetch_all(connection)
        .await?;
        for row in rows {
            workspace.load_message(message(&row)?);
        }
    }
    Ok(())
}

/// Messages that wait, with what settling them needs: those whose time is over, or all of a session that ends.
pub(super) async fn waiting_messages(
    connection: &mut SqliteConnection,
    rules: RuleSettings,
    which: Waiting,
) -> Result<Workspace, sqlx::Error> {
    let mut workspace = Workspace::new(rules, counters(connection).await?);
    let rows = match which {
        Waiting::ArchivedBefore(until) => {
            sqlx::query(
                "SELECT m.*, a.sip_uri, h.seq AS head_seq, h.hash AS head_hash
                   FROM messages m
                   JOIN accounts a ON a.id = m.account_id
                   LEFT JOIN chain_heads h ON h.account_id = m.account_id
                  WHERE m.awaiting IN ('copy', 'receipt') AND m.archived_at <= ?1
                  ORDER BY m.id
                  LIMIT 1000",
            )
            .bind(time_text(until))
            .fetch_all(&mut *connection)
            .await?
        }
        Waiting::OfSession(session) => {
            sqlx::query(
                "SELECT m.*, a.sip_uri, h.seq AS head_seq, h.hash AS head_hash
                   FROM messages m
                   JOIN accounts a ON a.id = m.account_id
                   LEFT JOIN chain_heads h ON h.account_id = m.account_id
                  WHERE m.awaiting IS NOT NULL AND m.session_id = ?1
                  ORDER BY m.id",
            )
            .bind(session.0)
            .fetch_all(&mut *connection)
            .await?
        }
    };
    for row in rows {
        match waiting_message(&row) {
            Ok((head, message)) => {
                workspace.load_chain_head(head);
                workspace.load_message(message);
            }
            // Such as an address that a user has spoilt by plain SQL: that account's messages wait until it is mended.
            Err(error) => tracing::debug!(%error, "a waiting message can't be settled yet"),
        }
    }
    missing_senders(connection, &mut workspace).await?;
    Ok(workspace)
}

fn waiting_message(row: &SqliteRow) -> Result<(ChainHead, MessageRow), sqlx::Error> {
    let head = ChainHead {
        account: AccountId(row.try_get("account_id")?),
        account_uri: uri(row, "sip_uri")?,
        seq: row.try_get::<Option<i64>, _>("head_seq")?.unwrap_or(0),
        hash: row
            .try_get::<Option<String>, _>("head_hash")?
            .unwrap_or_else(|| crate::archive::chain::GENESIS.to_owned()),
    };
    Ok((head, message(row)?))
}

/// Which messages to settle.
#[derive(Debug, Clone, Copy)]
pub(super) enum Waiting {
    /// Repetition or receipt did not come in time.
    ArchivedBefore(jiff::Timestamp),
    /// The session ends.
    OfSession(SessionId),
}

fn message(row: &SqliteRow) -> Result<MessageRow, sqlx::Error> {
    Ok(MessageRow {
        id: MessageId(row.try_get("id")?),
        account: AccountId(row.try_get("account_id")?),
        conversation: ConversationId(row.try_get("conversation_id")?),
        session: row.try_get::<Option<i64>, _>("session_id")?.map(SessionId),
        direction: word(row, "direction", direction)?,
        sender_uri: row.try_get("sender_uri")?,
        sender_name: row.try_get("sender_name")?,
        content_type: row.try_get("content_type")?,
        body: row.try_get("body")?,
        body_html: row.try_get("body_html")?,
        sent_at: time(row, "sent_at")?,
        archived_at: time(row, "archived_at")?,
        status: word(row, "status", |text| {
            [MessageStatus::Pending, MessageStatus::Delivered, MessageStatus::Failed]
                .into_iter()
                .find(|known| known.as_str() == text)
        })?,
        code: row.try_get("code")?,
        subcode: row.try_get("subcode")?,
        reason: row.try_get("reason")?,
        failed_recipients: row.try_get("failed_recipients")?,
        operation_id: row.try_get::<Option<String>, _>("operation_id")?.map(OperationId),
        outbox: row.try_get::<Option<i64>, _>("outbox_id")?.map(OutboxId),
        correlation: row.try_get("correlation")?,
        source: word(row, "source", |text| {
            [MessageSource::Invitation, MessageSource::Event, MessageSource::ConversationLog]
                .into_iter()
                .find(|known| known.as_str() == text)
        })?,
        href: row.try_get("href")?,
        chain_seq: row.try_get("chain_seq")?,
        content_hash: row.try_get("content_hash")?,
        chain_hash: row.try_get("chain_hash")?,
        awaiting: optional_word(row, "awaiting", |text| {
            [Awaiting::Fetch, Awaiting::Sender, Awaiting::Copy, Awaiting::Receipt]
                .into_iter()
                .find(|known| known.as_str() == text)
        })?,
        sender_href: row.try_get("sender_href")?,
    })
}
