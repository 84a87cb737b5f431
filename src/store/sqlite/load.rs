//! Rows of a batch, from the database into the archive's workspace: one query per table, whatever the batch's size.
//!
//! Keys travel as one JSON array per query (`json_each`), so the statements are the same for every batch and stay
//! prepared. `CROSS JOIN` keeps SQLite's planner from turning the look-ups round.

use serde::Serialize;
use sqlx::{Row, SqliteConnection};

use super::column::time_text;
use crate::{
    archive::{
        Keys, Workspace,
        keys::ResourceKey,
        workspace::{Counters, RuleSettings},
    },
    store::{
        rows,
        writer::{UnplacedCall, Waiting},
    },
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
                h.seq AS head_seq, h.hash AS head_hash
           FROM json_each(?1) k
          CROSS JOIN sessions s ON s.id = k.value
           JOIN accounts a ON a.id = s.account_id
           LEFT JOIN chain_heads h ON h.account_id = s.account_id",
    )
    .bind(json(&ids)?)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_chain_head(rows::chain_head(&row)?);
        workspace.load_session(rows::session_row(&row)?);
    }
    Ok(())
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
        workspace.load_conversation(rows::conversation(&row)?);
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
        workspace.load_conversation(rows::conversation(&row)?);
    }
    Ok(())
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
            workspace.load_invitation(rows::invitation(&row)?);
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
            workspace.load_invitation(rows::invitation(&row)?);
        }
    }
    Ok(())
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
        workspace.load_participant(rows::participant(&row)?);
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
        workspace.load_participant(rows::participant(&row)?);
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
        workspace.load_conversation(rows::conversation(&row)?);
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
        workspace.load_participant(rows::participant(&row)?);
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
        workspace.load_conversation(rows::conversation(&row)?);
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
        workspace.load_message(rows::message(&row)?);
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
            workspace.load_outbox(rows::outbox_send(&row)?);
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
            workspace.load_outbox(rows::outbox_send(&row)?);
        }
        let rows = sqlx::query(
            "SELECT t.id, t.outbox_id, t.operation_id, t.finished_at, t.outcome, t.http_status, t.code, t.subcode,
                    t.detail
               FROM json_each(?1) k
              CROSS JOIN outbox o INDEXED BY outbox_sending ON o.account_id = k.value AND o.state = 'sending'
              CROSS JOIN outbox_attempts t ON t.operation_id = o.operation_id",
        )
        .bind(&accounts)
        .fetch_all(&mut *connection)
        .await?;
        for row in rows {
            workspace.load_attempt(rows::attempt(&row)?);
        }
    }
    sends_in_doubt(connection, workspace, keys).await
}

/// Rows of which nobody could tell whether the server took them, and those that it took and of which it has told nothing
/// more, with the attempts in question.
async fn sends_in_doubt(
    connection: &mut SqliteConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if keys.in_doubt.is_empty() {
        return Ok(());
    }
    let accounts = json(&keys.in_doubt.iter().map(|id| id.0).collect::<Vec<_>>())?;
    let rows = sqlx::query(
        "SELECT o.*
           FROM json_each(?1) k
          CROSS JOIN outbox o INDEXED BY outbox_in_doubt
             ON o.account_id = k.value AND (o.state = 'uncertain' OR o.possible_duplicate = 1)
          WHERE o.state IN ('uncertain', 'queued') AND o.destination IS NOT NULL
          UNION ALL
         SELECT o.*
           FROM json_each(?1) k
          CROSS JOIN outbox o INDEXED BY outbox_unplaced
             ON o.account_id = k.value AND o.state = 'sent' AND o.message_id IS NULL",
    )
    .bind(&accounts)
    .fetch_all(&mut *connection)
    .await?;
    for row in rows {
        workspace.load_outbox(rows::outbox_send(&row)?);
    }
    let rows = sqlx::query(
        "SELECT t.id, t.outbox_id, t.operation_id, t.finished_at, t.outcome, t.http_status, t.code, t.subcode, t.detail
           FROM json_each(?1) k
          CROSS JOIN outbox o INDEXED BY outbox_in_doubt
             ON o.account_id = k.value AND (o.state = 'uncertain' OR o.possible_duplicate = 1)
          CROSS JOIN outbox_attempts t ON t.outbox_id = o.id
          WHERE o.state IN ('uncertain', 'queued') AND t.outcome = 'uncertain'
          UNION ALL
         SELECT t.id, t.outbox_id, t.operation_id, t.finished_at, t.outcome, t.http_status, t.code, t.subcode, t.detail
           FROM json_each(?1) k
          CROSS JOIN outbox o INDEXED BY outbox_unplaced
             ON o.account_id = k.value AND o.state = 'sent' AND o.message_id IS NULL
          CROSS JOIN outbox_attempts t ON t.outbox_id = o.id AND t.operation_id = o.operation_id",
    )
    .bind(&accounts)
    .fetch_all(connection)
    .await?;
    for row in rows {
        workspace.load_attempt(rows::attempt(&row)?);
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
        workspace.load_attempt(rows::attempt(&row)?);
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
        workspace.load_outbox(rows::outbox_send(&row)?);
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
            workspace.load_message(rows::message(&row)?);
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
            workspace.load_message(rows::message(&row)?);
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
            workspace.load_message(rows::message(&row)?);
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
            workspace.load_message(rows::message(&row)?);
        }
    }
    Ok(())
}

/// Messages that wait, with what settling them needs: those whose time is over, or all of a session that ends.
pub(super) async fn waiting_messages(
    connection: &mut SqliteConnection,
    rules: RuleSettings,
    which: Waiting<'_>,
) -> Result<Workspace, sqlx::Error> {
    let mut workspace = Workspace::new(rules, counters(connection).await?);
    let rows = match which {
        Waiting::ArchivedBefore(until, _) => {
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
                // For the sake of the order the planner would walk through all messages.
                "SELECT m.*, a.sip_uri, h.seq AS head_seq, h.hash AS head_hash
                   FROM messages m INDEXED BY messages_awaiting
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
        if let Some((head, message)) = rows::waiting_message(&row) {
            workspace.load_chain_head(head);
            workspace.load_message(message);
        }
    }
    missing_senders(connection, &mut workspace).await?;
    Ok(workspace)
}

/// See [`Dialect::load_unplaced`](crate::store::writer::Dialect::load_unplaced).
pub(super) async fn unplaced_calls(
    connection: &mut SqliteConnection,
    which: Waiting<'_>,
) -> Result<Vec<UnplacedCall>, sqlx::Error> {
    let (session, before) = match which {
        Waiting::OfSession(session) => (Some(session.0), None),
        Waiting::ArchivedBefore(before, _) => (None, Some(time_text(before))),
    };
    let rows = sqlx::query(
        "SELECT o.id AS outbox_id, o.operation_id, o.account_id, i.session_id, i.href
           FROM outbox o INDEXED BY outbox_unplaced
           JOIN invitations i ON i.account_id = o.account_id AND i.operation_id = o.operation_id
          WHERE o.state = 'sent' AND o.message_id IS NULL
            AND i.conversation_id IS NULL AND i.href IS NOT NULL AND i.session_id IS NOT NULL
            AND (?1 IS NULL OR i.session_id = ?1) AND (?2 IS NULL OR o.sent_at < ?2)
          ORDER BY o.id",
    )
    .bind(session)
    .bind(before)
    .fetch_all(connection)
    .await?;
    rows.iter().map(rows::unplaced_call).collect()
}
