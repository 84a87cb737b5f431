//! Rows of a batch, from the database into the archive's workspace: one query per table, whatever the batch's size.
//!
//! Keys travel as arrays, so the statements are the same for every batch and stay prepared. They are planned when a table
//! may still be empty and used when it is long; so what belongs to a key is asked for by a subquery of its own
//! (`LATERAL … OFFSET 0`), which leaves the planner no choice but to look each key up.

use sqlx::{PgConnection, postgres::PgRow};

use super::column::{Time, text};
use crate::{
    archive::{
        Keys, Workspace,
        keys::ResourceKey,
        workspace::{Counters, RuleSettings},
    },
    identifiers::{AccountId, SessionId},
    store::{
        columns::Columns,
        rows,
        writer::{UnplacedCall, Waiting},
    },
};

/// Everything that commits with these keys may read or change. From here on until the transaction ends no other writer
/// gives out ids.
pub(super) async fn workspace(
    connection: &mut PgConnection,
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

/// The highest ids given out, deleted rows included; no other writer gives out any until the transaction ends.
async fn counters(connection: &mut PgConnection) -> Result<Counters, sqlx::Error> {
    let row =
        sqlx::query("SELECT conversations, participants, invitations, messages FROM ucwa_relay_last_ids()")
            .fetch_one(connection)
            .await?;
    Ok(Counters {
        conversations: row.integer("conversations")?,
        participants: row.integer("participants")?,
        invitations: row.integer("invitations")?,
        messages: row.integer("messages")?,
    })
}

/// Resource keys as three arrays.
struct Resources {
    accounts: Vec<i64>,
    sessions: Vec<i64>,
    hrefs: Vec<String>,
}

impl Resources {
    fn new<'a>(keys: impl IntoIterator<Item = (AccountId, SessionId, &'a str)>) -> Self {
        let mut resources = Self { accounts: Vec::new(), sessions: Vec::new(), hrefs: Vec::new() };
        for (account, session, href) in keys {
            resources.accounts.push(account.0);
            resources.sessions.push(session.0);
            resources.hrefs.push(text(href).into_owned());
        }
        resources
    }

    fn of<'a>(keys: impl IntoIterator<Item = &'a ResourceKey>) -> Self {
        Self::new(keys.into_iter().map(|key| (key.account, key.session, key.href.as_str())))
    }

    /// Runs a query whose first three parameters are the arrays; nothing to ask for is no query.
    async fn rows(
        &self,
        connection: &mut PgConnection,
        sql: &'static str,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        if self.accounts.is_empty() {
            return Ok(Vec::new());
        }
        sqlx::query(sql)
            .bind(&self.accounts)
            .bind(&self.sessions)
            .bind(&self.hrefs)
            .fetch_all(connection)
            .await
    }
}

async fn sessions(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if keys.sessions.is_empty() {
        return Ok(());
    }
    let (accounts, sessions): (Vec<i64>, Vec<i64>) =
        keys.sessions.iter().map(|(account, session)| (account.0, session.0)).unzip();
    let found = sqlx::query(
        "SELECT s.id, s.account_id, s.event_cursor, s.last_ack_at, s.ended_at, a.sip_uri,
                h.seq AS head_seq, h.hash AS head_hash
           FROM unnest($1::bigint[], $2::bigint[]) AS k (account_id, id)
          CROSS JOIN LATERAL (SELECT * FROM sessions s WHERE s.account_id = k.account_id AND s.id = k.id OFFSET 0) s
          CROSS JOIN LATERAL (SELECT a.sip_uri FROM accounts a WHERE a.id = k.account_id OFFSET 0) a
           LEFT JOIN LATERAL (SELECT h.seq, h.hash FROM chain_heads h WHERE h.account_id = k.account_id OFFSET 0) h
             ON TRUE",
    )
    .bind(accounts)
    .bind(sessions)
    .fetch_all(connection)
    .await?;
    for row in found {
        workspace.load_chain_head(rows::chain_head(&row)?);
        workspace.load_session(rows::session_row(&row)?);
    }
    Ok(())
}

async fn conversations(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    let found = Resources::of(&keys.conversations)
        .rows(
            connection,
            "SELECT c.*
               FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS k (account_id, session_id, href)
              CROSS JOIN LATERAL
                    (SELECT * FROM conversations c
                      WHERE c.account_id = k.account_id AND c.session_id = k.session_id AND c.href = k.href
                     OFFSET 0) c",
        )
        .await?;
    for row in found {
        workspace.load_conversation(rows::conversation(&row)?);
    }
    Ok(())
}

/// Conversations that other rows speak of by id.
async fn conversations_by_id(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
) -> Result<(), sqlx::Error> {
    let ids: Vec<i64> = workspace.missing_conversations().into_iter().map(|id| id.0).collect();
    if ids.is_empty() {
        return Ok(());
    }
    let found = sqlx::query("SELECT c.* FROM conversations c WHERE c.id = ANY ($1::bigint[])")
        .bind(ids)
        .fetch_all(connection)
        .await?;
    for row in found {
        workspace.load_conversation(rows::conversation(&row)?);
    }
    Ok(())
}

async fn invitations(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    let mut found = Resources::of(&keys.invitations)
        .rows(
            connection,
            "SELECT i.*
               FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS k (account_id, session_id, href)
              CROSS JOIN LATERAL
                    (SELECT * FROM invitations i
                      WHERE i.account_id = k.account_id AND i.session_id = k.session_id AND i.href = k.href
                     OFFSET 0) i",
        )
        .await?;
    if !keys.operations.is_empty() {
        let (accounts, operations) = operation_keys(&keys.operations);
        found.extend(
            sqlx::query(
                "SELECT i.*
                   FROM unnest($1::bigint[], $2::text[]) AS k (account_id, operation_id)
                  CROSS JOIN LATERAL
                        (SELECT * FROM invitations i
                          WHERE i.account_id = k.account_id AND i.operation_id = k.operation_id
                         OFFSET 0) i",
            )
            .bind(accounts)
            .bind(operations)
            .fetch_all(connection)
            .await?,
        );
    }
    for row in found {
        workspace.load_invitation(rows::invitation(&row)?);
    }
    Ok(())
}

fn operation_keys<'a>(
    keys: impl IntoIterator<Item = &'a (AccountId, crate::identifiers::OperationId)>,
) -> (Vec<i64>, Vec<String>) {
    keys.into_iter().map(|(account, operation)| (account.0, text(&operation.0).into_owned())).unzip()
}

async fn participants(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    participants_by_href(connection, workspace, Resources::of(&keys.participants)).await?;
    let found = Resources::of(&keys.rosters)
        .rows(
            connection,
            "SELECT p.*
               FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS k (account_id, session_id, href)
              CROSS JOIN LATERAL
                    (SELECT * FROM conversations c
                      WHERE c.account_id = k.account_id AND c.session_id = k.session_id AND c.href = k.href
                     OFFSET 0) c
              CROSS JOIN LATERAL
                    (SELECT * FROM participants p
                      WHERE p.account_id = c.account_id AND p.conversation_id = c.id AND p.left_at IS NULL
                     OFFSET 0) p",
        )
        .await?;
    for row in found {
        workspace.load_participant(rows::participant(&row)?);
    }
    Ok(())
}

async fn participants_by_href(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: Resources,
) -> Result<(), sqlx::Error> {
    let found = keys
        .rows(
            connection,
            "SELECT p.*
               FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS k (account_id, session_id, href)
              CROSS JOIN LATERAL
                    (SELECT * FROM participants p
                      WHERE p.account_id = k.account_id AND p.session_id = k.session_id AND p.href = k.href
                     OFFSET 0) p",
        )
        .await?;
    for row in found {
        workspace.load_participant(rows::participant(&row)?);
    }
    Ok(())
}

/// Participants whose fetch decides whether a waiting message is settled.
async fn missing_senders(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
) -> Result<(), sqlx::Error> {
    let senders = workspace.missing_senders();
    let keys =
        Resources::new(senders.iter().map(|(account, session, href)| (*account, *session, href.as_str())));
    participants_by_href(connection, workspace, keys).await
}

/// What conversation logs are compared with.
async fn logged(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if keys.logged.is_empty() {
        return Ok(());
    }
    let accounts: Vec<i64> = keys.logged.iter().map(|key| key.account.0).collect();
    let threads: Vec<Option<String>> =
        keys.logged.iter().map(|key| key.thread_id.as_deref().map(|id| text(id).into_owned())).collect();
    let from: Vec<Time> = keys.logged.iter().map(|key| Time(key.from)).collect();
    let to: Vec<Time> = keys.logged.iter().map(|key| Time(key.to)).collect();
    let mut conversations = sqlx::query(
        "SELECT c.*
           FROM unnest($1::bigint[], $2::text[]) AS k (account_id, thread_id)
          CROSS JOIN LATERAL
                (SELECT * FROM conversations c WHERE c.account_id = k.account_id AND c.thread_id = k.thread_id
                 OFFSET 0) c",
    )
    .bind(&accounts)
    .bind(&threads)
    .fetch_all(&mut *connection)
    .await?;
    let participants = sqlx::query(
        "SELECT p.*
           FROM unnest($1::bigint[], $2::text[]) AS k (account_id, thread_id)
          CROSS JOIN LATERAL
                (SELECT * FROM conversations c WHERE c.account_id = k.account_id AND c.thread_id = k.thread_id
                 OFFSET 0) c
          CROSS JOIN LATERAL
                (SELECT * FROM participants p WHERE p.account_id = c.account_id AND p.conversation_id = c.id
                 OFFSET 0) p",
    )
    .bind(&accounts)
    .bind(&threads)
    .fetch_all(&mut *connection)
    .await?;
    for row in participants {
        workspace.load_participant(rows::participant(&row)?);
    }
    conversations.extend(
        sqlx::query(
            "SELECT DISTINCT ON (c.id) c.*
               FROM unnest($1::bigint[], $2::text[], $3::timestamptz[], $4::timestamptz[])
                    AS k (account_id, thread_id, from_at, to_at)
              CROSS JOIN LATERAL
                    (SELECT m.account_id, m.conversation_id FROM messages m
                      WHERE m.account_id = k.account_id AND m.sent_at BETWEEN k.from_at AND k.to_at
                     OFFSET 0) m
              CROSS JOIN LATERAL
                    (SELECT * FROM conversations c WHERE c.account_id = m.account_id AND c.id = m.conversation_id
                     OFFSET 0) c
              WHERE c.thread_id IS NULL OR k.thread_id IS NULL",
        )
        .bind(&accounts)
        .bind(&threads)
        .bind(&from)
        .bind(&to)
        .fetch_all(&mut *connection)
        .await?,
    );
    for row in conversations {
        workspace.load_conversation(rows::conversation(&row)?);
    }
    let messages = sqlx::query(
        "SELECT m.*
           FROM unnest($1::bigint[], $2::text[], $3::timestamptz[], $4::timestamptz[])
                AS k (account_id, thread_id, from_at, to_at)
          CROSS JOIN LATERAL
                (SELECT * FROM messages m
                  WHERE m.account_id = k.account_id AND m.sent_at BETWEEN k.from_at AND k.to_at
                 OFFSET 0) m
          CROSS JOIN LATERAL
                (SELECT c.thread_id FROM conversations c WHERE c.account_id = m.account_id AND c.id = m.conversation_id
                 OFFSET 0) c
          WHERE c.thread_id IS NULL OR k.thread_id IS NULL OR c.thread_id = k.thread_id",
    )
    .bind(&accounts)
    .bind(&threads)
    .bind(&from)
    .bind(&to)
    .fetch_all(connection)
    .await?;
    for row in messages {
        workspace.load_message(rows::message(&row)?);
    }
    Ok(())
}

/// Rows of the queue are locked: users may change them at any time.
async fn outbox(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    let operations = keys.operations.iter().map(|(_, operation)| text(&operation.0).into_owned()).collect();
    sends_by_operation(connection, workspace, operations).await?;
    if !keys.outbox.is_empty() {
        let ids: Vec<i64> = keys.outbox.iter().map(|id| id.0).collect();
        let found = sqlx::query(
            "SELECT o.* FROM outbox o WHERE o.id = ANY ($1::bigint[]) AND o.account_id IS NOT NULL
              ORDER BY o.id FOR UPDATE",
        )
        .bind(ids)
        .fetch_all(&mut *connection)
        .await?;
        for row in found {
            workspace.load_outbox(rows::outbox_send(&row)?);
        }
    }
    if !keys.sending.is_empty() {
        let accounts: Vec<i64> = keys.sending.iter().map(|id| id.0).collect();
        let found = sqlx::query(
            "SELECT o.* FROM outbox o WHERE o.account_id = ANY ($1::bigint[]) AND o.state = 'sending'
              ORDER BY o.id FOR UPDATE",
        )
        .bind(&accounts)
        .fetch_all(&mut *connection)
        .await?;
        for row in found {
            workspace.load_outbox(rows::outbox_send(&row)?);
        }
        let found = sqlx::query(
            "SELECT t.*
               FROM outbox o
              CROSS JOIN LATERAL
                    (SELECT * FROM outbox_attempts t WHERE t.operation_id = o.operation_id OFFSET 0) t
              WHERE o.account_id = ANY ($1::bigint[]) AND o.state = 'sending'",
        )
        .bind(&accounts)
        .fetch_all(&mut *connection)
        .await?;
        for row in found {
            workspace.load_attempt(rows::attempt(&row)?);
        }
    }
    sends_in_doubt(connection, workspace, keys).await
}

/// Rows of which nobody could tell whether the server took them, and those that it took and of which it has told nothing
/// more, with the attempts in question.
async fn sends_in_doubt(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    if keys.in_doubt.is_empty() {
        return Ok(());
    }
    let accounts: Vec<i64> = keys.in_doubt.iter().map(|id| id.0).collect();
    for (rows_of, attempts_of) in [
        (
            "SELECT o.* FROM outbox o
              WHERE o.account_id = ANY ($1::bigint[]) AND (o.state = 'uncertain' OR o.possible_duplicate)
                AND o.state IN ('uncertain', 'queued') AND o.destination IS NOT NULL
              ORDER BY o.id FOR UPDATE",
            "SELECT t.*
               FROM outbox o
               JOIN outbox_attempts t ON t.outbox_id = o.id
              WHERE o.account_id = ANY ($1::bigint[]) AND (o.state = 'uncertain' OR o.possible_duplicate)
                AND o.state IN ('uncertain', 'queued') AND t.outcome = 'uncertain'",
        ),
        (
            "SELECT o.* FROM outbox o
              WHERE o.account_id = ANY ($1::bigint[]) AND o.state = 'sent' AND o.message_id IS NULL
              ORDER BY o.id FOR UPDATE",
            "SELECT t.*
               FROM outbox o
               JOIN outbox_attempts t ON t.outbox_id = o.id AND t.operation_id = o.operation_id
              WHERE o.account_id = ANY ($1::bigint[]) AND o.state = 'sent' AND o.message_id IS NULL",
        ),
    ] {
        for row in sqlx::query(rows_of).bind(&accounts).fetch_all(&mut *connection).await? {
            workspace.load_outbox(rows::outbox_send(&row)?);
        }
        for row in sqlx::query(attempts_of).bind(&accounts).fetch_all(&mut *connection).await? {
            workspace.load_attempt(rows::attempt(&row)?);
        }
    }
    Ok(())
}

/// Attempts and outbox rows by operation id.
async fn sends_by_operation(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    operations: Vec<String>,
) -> Result<(), sqlx::Error> {
    if operations.is_empty() {
        return Ok(());
    }
    let found = sqlx::query("SELECT t.* FROM outbox_attempts t WHERE t.operation_id = ANY ($1::text[])")
        .bind(&operations)
        .fetch_all(&mut *connection)
        .await?;
    let mut ids = Vec::with_capacity(found.len());
    for row in found {
        ids.push(row.integer("outbox_id")?);
        workspace.load_attempt(rows::attempt(&row)?);
    }
    if ids.is_empty() {
        return Ok(());
    }
    let found = sqlx::query(
        "SELECT o.* FROM outbox o WHERE o.id = ANY ($1::bigint[]) AND o.account_id IS NOT NULL
          ORDER BY o.id FOR UPDATE",
    )
    .bind(ids)
    .fetch_all(connection)
    .await?;
    for row in found {
        workspace.load_outbox(rows::outbox_send(&row)?);
    }
    Ok(())
}

/// Outbox rows that loaded messages and invitations answer to, where the event itself names no operation.
async fn sends_of_messages(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
) -> Result<(), sqlx::Error> {
    let operations = workspace.missing_operations().into_iter().map(|operation| operation.0).collect();
    sends_by_operation(connection, workspace, operations).await
}

async fn messages(
    connection: &mut PgConnection,
    workspace: &mut Workspace,
    keys: &Keys,
) -> Result<(), sqlx::Error> {
    let mut found = Resources::of(&keys.messages)
        .rows(
            connection,
            "SELECT m.*
               FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS k (account_id, session_id, href)
              CROSS JOIN LATERAL
                    (SELECT * FROM messages m
                      WHERE m.account_id = k.account_id AND m.session_id = k.session_id AND m.href = k.href
                     OFFSET 0) m",
        )
        .await?;
    // Attempts of rows that are in flight may have said something under an id that no event names.
    let operations = workspace.operations();
    if !operations.is_empty() {
        let (accounts, operations) = operation_keys(&operations);
        found.extend(
            sqlx::query(
                "SELECT m.*
                   FROM unnest($1::bigint[], $2::text[]) AS k (account_id, operation_id)
                  CROSS JOIN LATERAL
                        (SELECT * FROM messages m
                          WHERE m.account_id = k.account_id AND m.operation_id = k.operation_id
                         OFFSET 0) m",
            )
            .bind(accounts)
            .bind(operations)
            .fetch_all(&mut *connection)
            .await?,
        );
    }
    let referenced: Vec<i64> = workspace.referenced_messages().into_iter().map(|id| id.0).collect();
    if !referenced.is_empty() {
        found.extend(
            sqlx::query("SELECT m.* FROM messages m WHERE m.id = ANY ($1::bigint[])")
                .bind(referenced)
                .fetch_all(&mut *connection)
                .await?,
        );
    }
    let conversations = workspace.conversation_keys();
    if !conversations.is_empty() {
        let (accounts, conversations): (Vec<i64>, Vec<i64>) =
            conversations.into_iter().map(|(account, conversation)| (account.0, conversation.0)).unzip();
        found.extend(
            sqlx::query(
                "SELECT m.*
                   FROM unnest($1::bigint[], $2::bigint[]) AS k (account_id, conversation_id)
                  CROSS JOIN LATERAL
                        (SELECT * FROM messages m
                          WHERE m.account_id = k.account_id AND m.conversation_id = k.conversation_id
                            AND (m.awaiting IS NOT NULL OR (m.href IS NULL AND m.source <> 'event'))
                            AND (m.source <> 'conversation_log' OR m.archived_at >= now() - interval '15 minutes')
                         OFFSET 0) m",
            )
            .bind(accounts)
            .bind(conversations)
            .fetch_all(connection)
            .await?,
        );
    }
    for row in found {
        workspace.load_message(rows::message(&row)?);
    }
    Ok(())
}

/// Messages that wait, with what settling them needs: those whose time is over, or all of a session that ends.
pub(super) async fn waiting_messages(
    connection: &mut PgConnection,
    rules: RuleSettings,
    which: Waiting<'_>,
) -> Result<Workspace, sqlx::Error> {
    let mut workspace = Workspace::new(rules, counters(connection).await?);
    let found = match which {
        Waiting::ArchivedBefore(until, accounts) => {
            sqlx::query(
                "SELECT m.*, a.sip_uri, h.seq AS head_seq, h.hash AS head_hash
                   FROM messages m
                   JOIN accounts a ON a.id = m.account_id
                   LEFT JOIN chain_heads h ON h.account_id = m.account_id
                  WHERE m.awaiting IN ('copy', 'receipt') AND m.archived_at <= $1
                    AND ($2::bigint[] IS NULL OR m.account_id = ANY ($2))
                  ORDER BY m.id
                  LIMIT 1000",
            )
            .bind(Time(until))
            .bind(ids(accounts))
            .fetch_all(&mut *connection)
            .await?
        }
        Waiting::OfSession(session) => {
            sqlx::query(
                "SELECT m.*, a.sip_uri, h.seq AS head_seq, h.hash AS head_hash
                   FROM sessions s
                   JOIN messages m ON m.account_id = s.account_id AND m.session_id = s.id
                   JOIN accounts a ON a.id = m.account_id
                   LEFT JOIN chain_heads h ON h.account_id = m.account_id
                  WHERE s.id = $1 AND m.awaiting IS NOT NULL
                  ORDER BY m.id",
            )
            .bind(session.0)
            .fetch_all(&mut *connection)
            .await?
        }
    };
    for row in found {
        if let Some((head, message)) = rows::waiting_message(&row) {
            workspace.load_chain_head(head);
            workspace.load_message(message);
        }
    }
    missing_senders(connection, &mut workspace).await?;
    Ok(workspace)
}

fn ids(accounts: Option<&[AccountId]>) -> Option<Vec<i64>> {
    accounts.map(|accounts| accounts.iter().map(|account| account.0).collect())
}

/// See [`Dialect::load_unplaced`](crate::store::writer::Dialect::load_unplaced).
pub(super) async fn unplaced_calls(
    connection: &mut PgConnection,
    which: Waiting<'_>,
) -> Result<Vec<UnplacedCall>, sqlx::Error> {
    let (session, before, accounts) = match which {
        Waiting::OfSession(session) => (Some(session.0), None, None),
        Waiting::ArchivedBefore(before, accounts) => (None, Some(Time(before)), accounts),
    };
    let rows = sqlx::query(
        "SELECT o.id AS outbox_id, o.operation_id, o.account_id, i.session_id, i.href
           FROM outbox o
           JOIN invitations i ON i.account_id = o.account_id AND i.operation_id = o.operation_id
          WHERE o.state = 'sent' AND o.message_id IS NULL
            AND i.conversation_id IS NULL AND i.href IS NOT NULL AND i.session_id IS NOT NULL
            AND ($1::bigint IS NULL OR i.session_id = $1) AND ($2::timestamptz IS NULL OR o.sent_at < $2)
            AND ($3::bigint[] IS NULL OR o.account_id = ANY ($3))
          ORDER BY o.id",
    )
    .bind(session)
    .bind(before)
    .bind(ids(accounts))
    .fetch_all(connection)
    .await?;
    rows.iter().map(rows::unplaced_call).collect()
}
