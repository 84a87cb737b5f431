//! What a batch changed, from the archive's workspace into the database: one statement per table, its rows as one array
//! per column, so that the statements are the same for every batch and stay prepared. The keys of an update stand there
//! twice, the second time as an array to look up: however small the planner takes a table for, it does not read all of it.

use jiff::Timestamp;
use sqlx::PgConnection;

use super::column::{Time, optional_text, optional_time, text};
use crate::{
    archive::{
        Changes,
        fact::{Direction, InvitationAction},
        row::{
            AttemptRow, Awaiting, ChainHead, ConversationRow, InvitationRow, MessageRow, OutboxSend,
            ParticipantRow, QuarantineRow, SessionRow, TypingRow,
        },
    },
    identifiers::{AccountId, MessageId},
};

/// Writes everything, and tells listeners of messages that are archived now.
pub(super) async fn flush(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), sqlx::Error> {
    last_ids(connection, changes).await?;
    // Texts that turned out to be others' give their hrefs free first.
    deleted_messages(connection, changes.deleted_messages).await?;
    conversations(connection, &changes.conversations).await?;
    participants(connection, &changes.participants).await?;
    messages(connection, &changes.messages).await?;
    invitations(connection, &changes.invitations).await?;
    outbox(connection, &changes.outbox).await?;
    attempts(connection, &changes.attempts).await?;
    typing(connection, changes.typing).await?;
    quarantine(connection, changes.quarantine).await?;
    chain_heads(connection, &changes.chain_heads).await?;
    sessions(connection, &changes.sessions).await?;
    last_events(connection, &changes.last_events).await?;
    announce(connection, &changes.archived).await
}

/// One column of many rows.
fn column<'a, R, V>(rows: &'a [R], value: impl Fn(&'a R) -> V) -> Vec<V> {
    rows.iter().map(value).collect()
}

fn awaits(fetch: bool) -> Option<&'static str> {
    fetch.then_some("fetch")
}

/// The sequences go on behind the ids that the rules gave out.
async fn last_ids(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), sqlx::Error> {
    let highest = |ids: Option<i64>| ids.unwrap_or(0);
    let ids = [
        highest(changes.conversations.last().map(|row| row.id.0)),
        highest(changes.participants.last().map(|row| row.id)),
        highest(changes.invitations.last().map(|row| row.id)),
        highest(changes.messages.last().map(|row| row.id.0)),
    ];
    if ids == [0; 4] {
        return Ok(());
    }
    sqlx::query(
        "SELECT setval(k.name::regclass, k.id)
           FROM unnest(ARRAY['conversations_id_seq', 'participants_id_seq', 'invitations_id_seq', 'messages_id_seq'],
                       $1::bigint[]) AS k (name, id)
          WHERE k.id > coalesce(pg_sequence_last_value(k.name::regclass), 0)",
    )
    .bind(ids.as_slice())
    .execute(connection)
    .await
    .map(drop)
}

async fn deleted_messages(connection: &mut PgConnection, ids: &[MessageId]) -> Result<(), sqlx::Error> {
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query("DELETE FROM messages WHERE id = ANY ($1::bigint[]) AND chain_seq IS NULL")
        .bind(column(ids, |id| id.0))
        .execute(connection)
        .await
        .map(drop)
}

/// `NOTIFY ucwa_relay_messages`, sent by the server when the transaction is durable.
async fn announce(
    connection: &mut PgConnection,
    messages: &[(AccountId, MessageId)],
) -> Result<(), sqlx::Error> {
    if messages.is_empty() {
        return Ok(());
    }
    sqlx::query(
        r#"SELECT pg_notify('ucwa_relay_messages',
                            '{"account_id":' || k.account_id || ',"message_id":' || k.message_id || '}')
             FROM unnest($1::bigint[], $2::bigint[]) AS k (account_id, message_id)"#,
    )
    .bind(column(messages, |(account, _)| account.0))
    .bind(column(messages, |(_, message)| message.0))
    .execute(connection)
    .await
    .map(drop)
}

async fn last_events(
    connection: &mut PgConnection,
    events: &[(AccountId, Timestamp)],
) -> Result<(), sqlx::Error> {
    if events.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "UPDATE account_status x SET last_event_at = k.at
           FROM unnest($1::bigint[], $2::timestamptz[]) AS k (account_id, at)
          WHERE x.account_id = k.account_id AND x.account_id = ANY ($1)",
    )
    .bind(column(events, |(account, _)| account.0))
    .bind(column(events, |(_, at)| Time(*at)))
    .execute(connection)
    .await
    .map(drop)
}

/// As JSON.
fn sender(row: &QuarantineRow) -> Option<String> {
    serde_json::to_string(row.sender.as_ref()?).ok().map(|json| text(&json).into_owned())
}

async fn sessions(connection: &mut PgConnection, rows: &[&SessionRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "UPDATE sessions x
            SET event_cursor = k.event_cursor, last_ack_at = k.last_ack_at
           FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::timestamptz[])
                AS k (account_id, id, event_cursor, last_ack_at)
          WHERE x.account_id = k.account_id AND x.id = k.id AND x.id = ANY ($2)",
    )
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.id.0))
    .bind(column(rows, |row| optional_text(row.event_cursor.as_deref())))
    .bind(column(rows, |row| optional_time(row.last_ack_at)))
    .execute(connection)
    .await
    .map(drop)
}

async fn chain_heads(connection: &mut PgConnection, rows: &[&ChainHead]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO chain_heads (account_id, seq, hash)
         SELECT *
           FROM unnest($1::bigint[], $2::bigint[], $3::text[])
         ON CONFLICT (account_id) DO UPDATE SET seq = excluded.seq, hash = excluded.hash",
    )
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.seq))
    .bind(column(rows, |row| row.hash.as_str()))
    .execute(connection)
    .await
    .map(drop)
}

async fn conversations(connection: &mut PgConnection, rows: &[&ConversationRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO conversations (id, account_id, session_id, href, thread_id, subject, importance, direction, state,
              multiparty, online_meeting_uri, started_at, connected_at, ended_at, end_code,
              end_subcode, awaiting, first_message_href, continued_in, purged_at)
         SELECT *
           FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[],
                $7::text[], $8::text[], $9::text[], $10::boolean[], $11::text[], $12::timestamptz[],
                $13::timestamptz[], $14::timestamptz[], $15::text[], $16::text[], $17::text[],
                $18::text[], $19::bigint[], $20::timestamptz[])
         ON CONFLICT (account_id, id) DO UPDATE
            SET href = excluded.href, thread_id = excluded.thread_id, subject = excluded.subject,
            importance = excluded.importance, direction = excluded.direction, state =
            excluded.state, multiparty = excluded.multiparty, online_meeting_uri =
            excluded.online_meeting_uri, connected_at = excluded.connected_at, ended_at =
            excluded.ended_at, end_code = excluded.end_code, end_subcode = excluded.end_subcode,
            awaiting = excluded.awaiting, first_message_href = excluded.first_message_href,
            continued_in = excluded.continued_in, purged_at = excluded.purged_at",
    )
    .bind(column(rows, |row| row.id.0))
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.session.map(|id| id.0)))
    .bind(column(rows, |row| optional_text(row.href.as_deref())))
    .bind(column(rows, |row| optional_text(row.thread_id.as_deref())))
    .bind(column(rows, |row| optional_text(row.subject.as_deref())))
    .bind(column(rows, |row| optional_text(row.importance.as_deref())))
    .bind(column(rows, |row| row.direction.map(Direction::as_str)))
    .bind(column(rows, |row| optional_text(row.state.as_deref())))
    .bind(column(rows, |row| row.multiparty))
    .bind(column(rows, |row| optional_text(row.online_meeting_uri.as_deref())))
    .bind(column(rows, |row| Time(row.started_at)))
    .bind(column(rows, |row| optional_time(row.connected_at)))
    .bind(column(rows, |row| optional_time(row.ended_at)))
    .bind(column(rows, |row| optional_text(row.end_code.as_deref())))
    .bind(column(rows, |row| optional_text(row.end_subcode.as_deref())))
    .bind(column(rows, |row| awaits(row.awaiting_fetch)))
    .bind(column(rows, |row| optional_text(row.first_message_href.as_deref())))
    .bind(column(rows, |row| row.continued_in.map(|id| id.0)))
    .bind(column(rows, |row| optional_time(row.purged_at)))
    .execute(connection)
    .await
    .map(drop)
}

async fn participants(connection: &mut PgConnection, rows: &[&ParticipantRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO participants (id, account_id, conversation_id, session_id, href, sip_uri, display_name, role,
              source_network, is_local, joined_at, left_at, awaiting)
         SELECT *
           FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
                $7::text[], $8::text[], $9::text[], $10::boolean[], $11::timestamptz[],
                $12::timestamptz[], $13::text[])
         ON CONFLICT (account_id, id) DO UPDATE
            SET sip_uri = excluded.sip_uri, display_name = excluded.display_name, role = excluded.role,
            source_network = excluded.source_network, is_local = excluded.is_local, joined_at =
            excluded.joined_at, left_at = excluded.left_at, awaiting = excluded.awaiting",
    )
    .bind(column(rows, |row| row.id))
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.conversation.0))
    .bind(column(rows, |row| row.session.map(|id| id.0)))
    .bind(column(rows, |row| optional_text(row.href.as_deref())))
    .bind(column(rows, |row| optional_text(row.sip_uri.as_deref())))
    .bind(column(rows, |row| optional_text(row.display_name.as_deref())))
    .bind(column(rows, |row| optional_text(row.role.as_deref())))
    .bind(column(rows, |row| optional_text(row.source_network.as_deref())))
    .bind(column(rows, |row| row.is_local))
    .bind(column(rows, |row| optional_time(row.joined_at)))
    .bind(column(rows, |row| optional_time(row.left_at)))
    .bind(column(rows, |row| awaits(row.awaiting_fetch)))
    .execute(connection)
    .await
    .map(drop)
}

async fn messages(connection: &mut PgConnection, rows: &[&MessageRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO messages (id, account_id, conversation_id, session_id, direction, sender_uri, sender_name,
              content_type, body, body_html, sent_at, archived_at, status, code, subcode, reason,
              failed_recipients, operation_id, outbox_id, correlation, source, href, chain_seq,
              content_hash, chain_hash, awaiting, sender_href)
         SELECT *
           FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
                $7::text[], $8::text[], $9::text[], $10::text[], $11::timestamptz[],
                $12::timestamptz[], $13::text[], $14::text[], $15::text[], $16::text[], $17::text[],
                $18::text[], $19::bigint[], $20::text[], $21::text[], $22::text[], $23::bigint[],
                $24::text[], $25::text[], $26::text[], $27::text[])
         ON CONFLICT (account_id, id) DO UPDATE
            SET conversation_id = excluded.conversation_id, direction = excluded.direction, sender_uri =
            excluded.sender_uri, sender_name = excluded.sender_name, content_type =
            excluded.content_type, body = excluded.body, body_html = excluded.body_html, sent_at =
            excluded.sent_at, status = excluded.status, code = excluded.code, subcode =
            excluded.subcode, reason = excluded.reason, failed_recipients =
            excluded.failed_recipients, operation_id = excluded.operation_id, outbox_id =
            excluded.outbox_id, correlation = excluded.correlation, source = excluded.source, href =
            excluded.href, chain_seq = excluded.chain_seq, content_hash = excluded.content_hash,
            chain_hash = excluded.chain_hash, awaiting = excluded.awaiting, sender_href =
            excluded.sender_href",
    )
    .bind(column(rows, |row| row.id.0))
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.conversation.0))
    .bind(column(rows, |row| row.session.map(|id| id.0)))
    .bind(column(rows, |row| row.direction.as_str()))
    .bind(column(rows, |row| optional_text(row.sender_uri.as_deref())))
    .bind(column(rows, |row| optional_text(row.sender_name.as_deref())))
    .bind(column(rows, |row| text(&row.content_type)))
    .bind(column(rows, |row| text(&row.body)))
    .bind(column(rows, |row| optional_text(row.body_html.as_deref())))
    .bind(column(rows, |row| Time(row.sent_at)))
    .bind(column(rows, |row| Time(row.archived_at)))
    .bind(column(rows, |row| row.status.as_str()))
    .bind(column(rows, |row| optional_text(row.code.as_deref())))
    .bind(column(rows, |row| optional_text(row.subcode.as_deref())))
    .bind(column(rows, |row| optional_text(row.reason.as_deref())))
    .bind(column(rows, |row| optional_text(row.failed_recipients.as_deref())))
    .bind(column(rows, |row| optional_text(row.operation_id.as_ref().map(|id| id.0.as_str()))))
    .bind(column(rows, |row| row.outbox.map(|id| id.0)))
    .bind(column(rows, |row| optional_text(row.correlation.as_deref())))
    .bind(column(rows, |row| row.source.as_str()))
    .bind(column(rows, |row| optional_text(row.href.as_deref())))
    .bind(column(rows, |row| row.chain_seq))
    .bind(column(rows, |row| optional_text(row.content_hash.as_deref())))
    .bind(column(rows, |row| optional_text(row.chain_hash.as_deref())))
    .bind(column(rows, |row| row.awaiting.map(Awaiting::as_str)))
    .bind(column(rows, |row| optional_text(row.sender_href.as_deref())))
    .execute(connection)
    .await
    .map(drop)
}

async fn invitations(connection: &mut PgConnection, rows: &[&InvitationRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO invitations (id, account_id, conversation_id, session_id, href, kind, direction, state,
              operation_id, thread_id, subject, importance, from_uri, from_name, to_uri, message_id,
              action, started_at, finished_at, code, subcode, reason, awaiting)
         SELECT *
           FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
                $7::text[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[],
                $13::text[], $14::text[], $15::text[], $16::bigint[], $17::text[],
                $18::timestamptz[], $19::timestamptz[], $20::text[], $21::text[], $22::text[],
                $23::text[])
         ON CONFLICT (account_id, id) DO UPDATE
            SET conversation_id = excluded.conversation_id, kind = excluded.kind, direction =
            excluded.direction, state = excluded.state, operation_id = excluded.operation_id,
            thread_id = excluded.thread_id, subject = excluded.subject, importance =
            excluded.importance, from_uri = excluded.from_uri, from_name = excluded.from_name,
            to_uri = excluded.to_uri, message_id = excluded.message_id, action = excluded.action,
            finished_at = excluded.finished_at, code = excluded.code, subcode = excluded.subcode,
            reason = excluded.reason, awaiting = excluded.awaiting",
    )
    .bind(column(rows, |row| row.id))
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.conversation.map(|id| id.0)))
    .bind(column(rows, |row| row.session.map(|id| id.0)))
    .bind(column(rows, |row| optional_text(row.href.as_deref())))
    .bind(column(rows, |row| row.kind.as_str()))
    .bind(column(rows, |row| row.direction.map(Direction::as_str)))
    .bind(column(rows, |row| optional_text(row.state.as_deref())))
    .bind(column(rows, |row| optional_text(row.operation_id.as_ref().map(|id| id.0.as_str()))))
    .bind(column(rows, |row| optional_text(row.thread_id.as_deref())))
    .bind(column(rows, |row| optional_text(row.subject.as_deref())))
    .bind(column(rows, |row| optional_text(row.importance.as_deref())))
    .bind(column(rows, |row| optional_text(row.from_uri.as_deref())))
    .bind(column(rows, |row| optional_text(row.from_name.as_deref())))
    .bind(column(rows, |row| optional_text(row.to_uri.as_deref())))
    .bind(column(rows, |row| row.message.map(|id| id.0)))
    .bind(column(rows, |row| row.action.map(InvitationAction::as_str)))
    .bind(column(rows, |row| Time(row.started_at)))
    .bind(column(rows, |row| optional_time(row.finished_at)))
    .bind(column(rows, |row| optional_text(row.code.as_deref())))
    .bind(column(rows, |row| optional_text(row.subcode.as_deref())))
    .bind(column(rows, |row| optional_text(row.reason.as_deref())))
    .bind(column(rows, |row| awaits(row.awaiting_fetch)))
    .execute(connection)
    .await
    .map(drop)
}

async fn typing(connection: &mut PgConnection, rows: &[TypingRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO typing (account_id, conversation_id, participant_id, at)
         SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::timestamptz[])",
    )
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.conversation.0))
    .bind(column(rows, |row| row.participant))
    .bind(column(rows, |row| Time(row.at)))
    .execute(connection)
    .await
    .map(drop)
}

async fn quarantine(connection: &mut PgConnection, rows: &[QuarantineRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO event_quarantine (account_id, session_id, received_at, reason, payload, cursor, payload_sha256,
              occurrence, sender)
         SELECT *
           FROM unnest($1::bigint[], $2::bigint[], $3::timestamptz[], $4::text[], $5::text[], $6::text[],
                $7::text[], $8::bigint[], $9::text[])
         ON CONFLICT (account_id, session_id, cursor, payload_sha256, occurrence) WHERE cursor IS NOT NULL DO NOTHING",
    )
    .bind(column(rows, |row| row.account.0))
    .bind(column(rows, |row| row.session.map(|id| id.0)))
    .bind(column(rows, |row| Time(row.received_at)))
    .bind(column(rows, |row| text(&row.reason)))
    .bind(column(rows, |row| text(&row.payload)))
    .bind(column(rows, |row| optional_text(row.cursor.as_deref())))
    .bind(column(rows, |row| row.payload_sha256.as_str()))
    .bind(column(rows, |row| row.occurrence))
    .bind(column(rows, sender))
    .execute(connection)
    .await
    .map(drop)
}

async fn outbox(connection: &mut PgConnection, rows: &[&OutboxSend]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "UPDATE outbox x
            SET state = k.state, conversation_id = k.conversation_id, message_id = k.message_id,
                next_attempt_at = k.next_attempt_at, last_code = k.last_code, last_subcode =
                k.last_subcode, last_error = k.last_error, sent_at = k.sent_at, finished_at =
                k.finished_at, possible_duplicate = k.possible_duplicate,
                updated_at = date_trunc('milliseconds', clock_timestamp()), revision = x.revision + 1
           FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[], $5::timestamptz[], $6::text[],
                $7::text[], $8::text[], $9::timestamptz[], $10::timestamptz[], $11::boolean[])
                AS k (id, state, conversation_id, message_id, next_attempt_at, last_code,
                      last_subcode, last_error, sent_at, finished_at, possible_duplicate)
          WHERE x.id = k.id AND x.id = ANY ($1)",
    )
    .bind(column(rows, |row| row.id.0))
    .bind(column(rows, |row| row.state.as_str()))
    .bind(column(rows, |row| row.conversation.map(|id| id.0)))
    .bind(column(rows, |row| row.message.map(|id| id.0)))
    .bind(column(rows, |row| optional_time(row.next_attempt_at)))
    .bind(column(rows, |row| optional_text(row.last_code.as_deref())))
    .bind(column(rows, |row| optional_text(row.last_subcode.as_deref())))
    .bind(column(rows, |row| optional_text(row.last_error.as_deref())))
    .bind(column(rows, |row| optional_time(row.sent_at)))
    .bind(column(rows, |row| optional_time(row.finished_at)))
    .bind(column(rows, |row| row.possible_duplicate))
    .execute(connection)
    .await
    .map(drop)
}

async fn attempts(connection: &mut PgConnection, rows: &[&AttemptRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "UPDATE outbox_attempts x
            SET finished_at = k.finished_at, outcome = k.outcome, http_status = k.http_status, code
                = k.code, subcode = k.subcode, detail = k.detail
           FROM unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::bigint[], $5::text[], $6::text[],
                $7::text[])
                AS k (id, finished_at, outcome, http_status, code, subcode, detail)
          WHERE x.id = k.id AND x.id = ANY ($1)",
    )
    .bind(column(rows, |row| row.id))
    .bind(column(rows, |row| optional_time(row.finished_at)))
    .bind(column(rows, |row| optional_text(row.outcome.as_deref())))
    .bind(column(rows, |row| row.http_status))
    .bind(column(rows, |row| optional_text(row.code.as_deref())))
    .bind(column(rows, |row| optional_text(row.subcode.as_deref())))
    .bind(column(rows, |row| optional_text(row.detail.as_deref())))
    .execute(connection)
    .await
    .map(drop)
}
