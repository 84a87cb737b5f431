//! What a batch changed, from the archive's workspace into the database: one statement per table and chunk of rows.
//!
//! Rows go in chunks of fixed sizes, so that there are few different statements and they stay prepared.

use jiff::Timestamp;
use sqlx::{
    AssertSqlSafe, Encode, QueryBuilder, Sqlite, SqliteConnection, Type,
    query::Query,
    query_builder::Separated,
    sqlite::{SqliteArguments, SqliteRow},
};

use super::{
    column::{optional_time_text, time_text},
    full_text,
    load::json,
};
use crate::{
    archive::{
        Changes,
        row::{
            AttemptRow, ConversationRow, InvitationRow, MessageRow, OutboxSend, ParticipantRow,
            QuarantineRow, SessionRow, TypingRow,
        },
    },
    identifiers::AccountId,
    query::pattern,
};

/// Rows per statement: the largest that fits, then smaller ones for the rest.
const CHUNKS: [usize; 4] = [64, 16, 4, 1];

/// Writes everything.
pub(super) async fn flush(
    connection: &mut SqliteConnection,
    changes: &Changes<'_>,
) -> Result<(), sqlx::Error> {
    // Texts that turned out to be others' give their hrefs free first.
    for id in changes.deleted_messages {
        sqlx::query("DELETE FROM messages WHERE id = ?1 AND chain_seq IS NULL")
            .bind(id.0)
            .execute(&mut *connection)
            .await?;
    }
    conversations(connection, &changes.conversations).await?;
    participants(connection, &changes.participants).await?;
    messages(connection, &changes.messages).await?;
    texts(connection, &changes.texts).await?;
    invitations(connection, &changes.invitations).await?;
    outbox(connection, &changes.outbox).await?;
    attempts(connection, &changes.attempts).await?;
    typing(connection, changes.typing).await?;
    quarantine(connection, changes.quarantine).await?;
    chain_heads(connection, changes).await?;
    sessions(connection, &changes.sessions).await?;
    last_events(connection, &changes.last_events).await
}

/// `head` (…) VALUES rows `tail`, in chunks.
pub(super) async fn in_chunks<R>(
    connection: &mut SqliteConnection,
    rows: &[R],
    head: &'static str,
    tail: &'static str,
    bind: impl Fn(&mut Values<'_, '_>, &R),
) -> Result<(), sqlx::Error> {
    let mut rest = rows;
    for size in CHUNKS {
        while rest.len() >= size {
            let (chunk, others) = rest.split_at(size);
            rest = others;
            let mut statement = QueryBuilder::<Sqlite>::new(head);
            statement.push_values(chunk, |mut values, row| bind(&mut Values(&mut values), row));
            statement.push(tail);
            statement.build().execute(&mut *connection).await?;
        }
    }
    Ok(())
}

/// Does `statement` for each row, many of them at a time, and gives the rows it returns. What is known by its id is read and
/// changed this way where it must not cost more as the table grows: a list of ids that is joined is left to the planner,
/// which reads the whole table if somebody had statistics taken while there was little in it. They stay as they were then.
pub(super) async fn for_each<R>(
    connection: &mut SqliteConnection,
    rows: &[R],
    statement: &str,
    bind: impl for<'q> Fn(Query<'q, Sqlite, SqliteArguments>, &R) -> Query<'q, Sqlite, SqliteArguments>,
) -> Result<Vec<SqliteRow>, sqlx::Error> {
    let mut returned = Vec::new();
    let mut rest = rows;
    for size in CHUNKS {
        while rest.len() >= size {
            let (chunk, others) = rest.split_at(size);
            rest = others;
            let query = sqlx::query(AssertSqlSafe(vec![statement; size].join(";\n")));
            returned.extend(chunk.iter().fold(query, &bind).fetch_all(&mut *connection).await?);
        }
    }
    Ok(returned)
}

/// Values of one row, in the order of its columns.
pub(super) struct Values<'a, 'b>(&'a mut Separated<'b, Sqlite, &'static str>);

impl Values<'_, '_> {
    pub(super) fn put<'v, T: 'v + Encode<'v, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> &mut Self {
        self.0.push_bind(value);
        self
    }
}

fn awaits(fetch: bool) -> Option<&'static str> {
    fetch.then_some("fetch")
}

async fn sessions(connection: &mut SqliteConnection, rows: &[&SessionRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let values: Vec<_> =
        rows.iter().map(|row| (row.id.0, &row.event_cursor, optional_time_text(row.last_ack_at))).collect();
    sqlx::query(
        "UPDATE sessions
            SET event_cursor = json_extract(k.value, '$[1]'), last_ack_at = json_extract(k.value, '$[2]')
           FROM json_each(?1) k
          WHERE sessions.id = json_extract(k.value, '$[0]')",
    )
    .bind(json(&values)?)
    .execute(connection)
    .await
    .map(drop)
}

async fn last_events(
    connection: &mut SqliteConnection,
    events: &[(AccountId, Timestamp)],
) -> Result<(), sqlx::Error> {
    if events.is_empty() {
        return Ok(());
    }
    let values: Vec<_> = events.iter().map(|(account, at)| (account.0, time_text(*at))).collect();
    sqlx::query(
        "UPDATE account_status
            SET last_event_at = json_extract(k.value, '$[1]')
           FROM json_each(?1) k
          WHERE account_status.account_id = json_extract(k.value, '$[0]')",
    )
    .bind(json(&values)?)
    .execute(connection)
    .await
    .map(drop)
}

async fn chain_heads(connection: &mut SqliteConnection, changes: &Changes<'_>) -> Result<(), sqlx::Error> {
    in_chunks(
        connection,
        &changes.chain_heads,
        "INSERT INTO chain_heads (account_id, seq, hash) ",
        " ON CONFLICT (account_id) DO UPDATE SET seq = excluded.seq, hash = excluded.hash",
        |values, row| {
            values.put(row.account.0).put(row.seq).put(row.hash.clone());
        },
    )
    .await
}

async fn conversations(
    connection: &mut SqliteConnection,
    rows: &[&ConversationRow],
) -> Result<(), sqlx::Error> {
    in_chunks(
        connection,
        rows,
        "INSERT INTO conversations (id, account_id, session_id, href, thread_id, subject, importance, direction, state,
             multiparty, online_meeting_uri, started_at, connected_at, ended_at, end_code, end_subcode, awaiting,
             first_message_href, continued_in, purged_at) ",
        " ON CONFLICT (id) DO UPDATE SET href = excluded.href, thread_id = excluded.thread_id,
             subject = excluded.subject, importance = excluded.importance, direction = excluded.direction,
             state = excluded.state, multiparty = excluded.multiparty,
             online_meeting_uri = excluded.online_meeting_uri, connected_at = excluded.connected_at,
             ended_at = excluded.ended_at, end_code = excluded.end_code, end_subcode = excluded.end_subcode,
             awaiting = excluded.awaiting, first_message_href = excluded.first_message_href,
             continued_in = excluded.continued_in, purged_at = excluded.purged_at",
        |values, row| {
            values
                .put(row.id.0)
                .put(row.account.0)
                .put(row.session.map(|id| id.0))
                .put(row.href.clone())
                .put(row.thread_id.clone())
                .put(row.subject.clone())
                .put(row.importance.clone())
                .put(row.direction.map(crate::archive::fact::Direction::as_str))
                .put(row.state.clone())
                .put(row.multiparty)
                .put(row.online_meeting_uri.clone())
                .put(time_text(row.started_at))
                .put(optional_time_text(row.connected_at))
                .put(optional_time_text(row.ended_at))
                .put(row.end_code.clone())
                .put(row.end_subcode.clone())
                .put(awaits(row.awaiting_fetch))
                .put(row.first_message_href.clone())
                .put(row.continued_in.map(|id| id.0))
                .put(optional_time_text(row.purged_at));
        },
    )
    .await
}

async fn participants(
    connection: &mut SqliteConnection,
    rows: &[&ParticipantRow],
) -> Result<(), sqlx::Error> {
    in_chunks(
        connection,
        rows,
        "INSERT INTO participants (id, account_id, conversation_id, session_id, href, sip_uri, display_name, role,
             source_network, is_local, joined_at, left_at, awaiting) ",
        " ON CONFLICT (id) DO UPDATE SET sip_uri = excluded.sip_uri, display_name = excluded.display_name,
             role = excluded.role, source_network = excluded.source_network, is_local = excluded.is_local,
             joined_at = excluded.joined_at, left_at = excluded.left_at, awaiting = excluded.awaiting",
        |values, row| {
            values
                .put(row.id)
                .put(row.account.0)
                .put(row.conversation.0)
                .put(row.session.map(|id| id.0))
                .put(row.href.clone())
                .put(row.sip_uri.clone())
                .put(row.display_name.clone())
                .put(row.role.clone())
                .put(row.source_network.clone())
                .put(row.is_local)
                .put(optional_time_text(row.joined_at))
                .put(optional_time_text(row.left_at))
                .put(awaits(row.awaiting_fetch));
        },
    )
    .await
}

async fn messages(connection: &mut SqliteConnection, rows: &[&MessageRow]) -> Result<(), sqlx::Error> {
    in_chunks(
        connection,
        rows,
        "INSERT INTO messages (id, account_id, conversation_id, session_id, direction, sender_uri, sender_name,
             content_type, body, body_html, sent_at, archived_at, status, code, subcode, reason, failed_recipients,
             operation_id, outbox_id, correlation, source, href, chain_seq, content_hash, chain_hash, awaiting,
             sender_href) ",
        " ON CONFLICT (id) DO UPDATE SET conversation_id = excluded.conversation_id, direction = excluded.direction,
             sender_uri = excluded.sender_uri, sender_name = excluded.sender_name,
             content_type = excluded.content_type, body = excluded.body, body_html = excluded.body_html,
             sent_at = excluded.sent_at, status = excluded.status, code = excluded.code, subcode = excluded.subcode,
             reason = excluded.reason, failed_recipients = excluded.failed_recipients,
             operation_id = excluded.operation_id, outbox_id = excluded.outbox_id,
             correlation = excluded.correlation, source = excluded.source, href = excluded.href,
             chain_seq = excluded.chain_seq, content_hash = excluded.content_hash,
             chain_hash = excluded.chain_hash, awaiting = excluded.awaiting, sender_href = excluded.sender_href",
        |values, row| {
            values
                .put(row.id.0)
                .put(row.account.0)
                .put(row.conversation.0)
                .put(row.session.map(|id| id.0))
                .put(row.direction.as_str())
                .put(row.sender_uri.clone())
                .put(row.sender_name.clone())
                .put(row.content_type.clone())
                .put(row.body.clone())
                .put(row.body_html.clone())
                .put(time_text(row.sent_at))
                .put(time_text(row.archived_at))
                .put(row.status.as_str())
                .put(row.code.clone())
                .put(row.subcode.clone())
                .put(row.reason.clone())
                .put(row.failed_recipients.clone())
                .put(row.operation_id.as_ref().map(|id| id.0.clone()))
                .put(row.outbox.map(|id| id.0))
                .put(row.correlation.clone())
                .put(row.source.as_str())
                .put(row.href.clone())
                .put(row.chain_seq)
                .put(row.content_hash.clone())
                .put(row.chain_hash.clone())
                .put(row.awaiting.map(crate::archive::row::Awaiting::as_str))
                .put(row.sender_href.clone());
        },
    )
    .await
}

/// The words of new and changed texts, if there is an index of them.
async fn texts(connection: &mut SqliteConnection, rows: &[&MessageRow]) -> Result<(), sqlx::Error> {
    if rows.is_empty() || !full_text::is_kept(connection).await? {
        return Ok(());
    }
    let words = rows.iter().map(|row| (row.id.0, pattern::indexed(&row.body)));
    let texts: Vec<(i64, String)> = words.filter(|(_, words)| !words.is_empty()).collect();
    full_text::add(connection, &texts).await
}

async fn invitations(connection: &mut SqliteConnection, rows: &[&InvitationRow]) -> Result<(), sqlx::Error> {
    in_chunks(
        connection,
        rows,
        "INSERT INTO invitations (id, account_id, conversation_id, session_id, href, kind, direction, state,
             operation_id, thread_id, subject, importance, from_uri, from_name, to_uri, message_id, action, started_at,
             finished_at, code, subcode, reason, awaiting) ",
        " ON CONFLICT (id) DO UPDATE SET conversation_id = excluded.conversation_id, kind = excluded.kind,
             direction = excluded.direction, state = excluded.state, operation_id = excluded.operation_id,
             thread_id = excluded.thread_id, subject = excluded.subject, importance = excluded.importance,
             from_uri = excluded.from_uri, from_name = excluded.from_name, to_uri = excluded.to_uri,
             message_id = excluded.message_id, action = excluded.action, finished_at = excluded.finished_at,
             code = excluded.code, subcode = excluded.subcode, reason = excluded.reason, awaiting = excluded.awaiting",
        |values, row| {
            values
                .put(row.id)
                .put(row.account.0)
                .put(row.conversation.map(|id| id.0))
                .put(row.session.map(|id| id.0))
                .put(row.href.clone())
                .put(row.kind.as_str())
                .put(row.direction.map(crate::archive::fact::Direction::as_str))
                .put(row.state.clone())
                .put(row.operation_id.as_ref().map(|id| id.0.clone()))
                .put(row.thread_id.clone())
                .put(row.subject.clone())
                .put(row.importance.clone())
                .put(row.from_uri.clone())
                .put(row.from_name.clone())
                .put(row.to_uri.clone())
                .put(row.message.map(|id| id.0))
                .put(row.action.map(crate::archive::fact::InvitationAction::as_str))
                .put(time_text(row.started_at))
                .put(optional_time_text(row.finished_at))
                .put(row.code.clone())
                .put(row.subcode.clone())
                .put(row.reason.clone())
                .put(awaits(row.awaiting_fetch));
        },
    )
    .await
}

async fn typing(connection: &mut SqliteConnection, rows: &[TypingRow]) -> Result<(), sqlx::Error> {
    in_chunks(
        connection,
        rows,
        "INSERT INTO typing (account_id, conversation_id, participant_id, at) ",
        "",
        |values, row| {
            values.put(row.account.0).put(row.conversation.0).put(row.participant).put(time_text(row.at));
        },
    )
    .await
}

async fn quarantine(connection: &mut SqliteConnection, rows: &[QuarantineRow]) -> Result<(), sqlx::Error> {
    in_chunks(
        connection,
        rows,
        "INSERT INTO event_quarantine (account_id, session_id, received_at, reason, payload, cursor, payload_sha256,
             occurrence, sender) ",
        " ON CONFLICT (account_id, session_id, cursor, payload_sha256, occurrence) WHERE cursor IS NOT NULL DO NOTHING",
        |values, row| {
            values
                .put(row.account.0)
                .put(row.session.map(|id| id.0))
                .put(time_text(row.received_at))
                .put(row.reason.clone())
                .put(row.payload.clone())
                .put(row.cursor.clone())
                .put(row.payload_sha256.clone())
                .put(row.occurrence)
                .put(row.sender.as_ref().and_then(|sender| json(sender).ok()));
        },
    )
    .await
}

async fn outbox(connection: &mut SqliteConnection, rows: &[&OutboxSend]) -> Result<(), sqlx::Error> {
    for_each(
        connection,
        rows,
        "UPDATE outbox
            SET state = ?, conversation_id = ?, message_id = ?, next_attempt_at = ?, last_code = ?, last_subcode = ?,
                last_error = ?, sent_at = ?, finished_at = ?, possible_duplicate = ?,
                updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), revision = revision + 1
          WHERE id = ?",
        |query, row| {
            query
                .bind(row.state.as_str())
                .bind(row.conversation.map(|id| id.0))
                .bind(row.message.map(|id| id.0))
                .bind(optional_time_text(row.next_attempt_at))
                .bind(row.last_code.clone())
                .bind(row.last_subcode.clone())
                .bind(row.last_error.clone())
                .bind(optional_time_text(row.sent_at))
                .bind(optional_time_text(row.finished_at))
                .bind(row.possible_duplicate)
                .bind(row.id.0)
        },
    )
    .await
    .map(drop)
}

async fn attempts(connection: &mut SqliteConnection, rows: &[&AttemptRow]) -> Result<(), sqlx::Error> {
    for_each(
        connection,
        rows,
        "UPDATE outbox_attempts
            SET finished_at = ?, outcome = ?, http_status = ?, code = ?, subcode = ?, detail = ?
          WHERE id = ?",
        |query, row| {
            query
                .bind(optional_time_text(row.finished_at))
                .bind(row.outcome.clone())
                .bind(row.http_status)
                .bind(row.code.clone())
                .bind(row.subcode.clone())
                .bind(row.detail.clone())
                .bind(row.id)
        },
    )
    .await
    .map(drop)
}
