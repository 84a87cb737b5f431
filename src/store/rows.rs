//! Rows of every table, read by the names of their columns, whatever the dialect.

use crate::{
    archive::{
        chain,
        fact::{Direction, Fetch, FetchedResource, InvitationAction, InvitationKind},
        row::{
            AttemptRow, Awaiting, ChainHead, ConversationRow, InvitationRow, MessageRow, MessageSource,
            MessageStatus, OutboxSend, ParticipantRow, SessionRow,
        },
    },
    identifiers::{AccountId, ConversationId, MessageId, OperationId, OutboxId, SessionId},
    outbox::admission::{self, Refusal},
};

use super::{
    Account, AccountOverview, AccountState, AttentionReason, Auth, Backfill, ClaimedSend, FollowedSession,
    Gap, HistoryRow, InvitationPolicy, KnownConversation, KnownStay, OpenConversation, OutboxAttempt,
    OutboxRow, OutboxState, QuarantineEntry, QuarantinedPayload, SecretSource, Session, ShapeCell,
    UnsettledSend,
    columns::{Columns, undecodable},
    writer::UnplacedCall,
};

/// What an [`Account`] is read from.
pub(super) const ACCOUNT_COLUMNS: &str = "id, sip_uri, username, auth, secret_sealed, secret_ref, display_name, enabled, \
                                          invitations, retention_days, updated_at";

// ------------------------------------------------------------------------------------------------ words

pub(super) fn direction(text: &str) -> Option<Direction> {
    [Direction::Incoming, Direction::Outgoing].into_iter().find(|known| known.as_str() == text)
}

fn invitation_kind(text: &str) -> Option<InvitationKind> {
    [InvitationKind::Messaging, InvitationKind::OnlineMeeting, InvitationKind::Participant]
        .into_iter()
        .find(|known| known.as_str() == text)
}

fn invitation_action(text: &str) -> Option<InvitationAction> {
    [InvitationAction::Accepted, InvitationAction::Declined, InvitationAction::Ignored]
        .into_iter()
        .find(|known| known.as_str() == text)
}

pub(super) fn outbox_state(text: &str) -> Option<OutboxState> {
    OutboxState::ALL.into_iter().find(|known| known.as_str() == text)
}

// ------------------------------------------------------------------------------------------------ archive

/// From a row of `sessions` with `sip_uri`.
pub(super) fn session_row(row: &impl Columns) -> Result<SessionRow, sqlx::Error> {
    Ok(SessionRow {
        id: SessionId(row.integer("id")?),
        account: AccountId(row.integer("account_id")?),
        account_uri: row.uri("sip_uri")?,
        event_cursor: row.optional_text("event_cursor")?,
        last_ack_at: row.optional_time("last_ack_at")?,
        ended_at: row.optional_time("ended_at")?,
    })
}

/// From a row with `account_id`, `sip_uri`, `head_seq` and `head_hash`, which are NULL before the first message.
pub(super) fn chain_head(row: &impl Columns) -> Result<ChainHead, sqlx::Error> {
    Ok(ChainHead {
        account: AccountId(row.integer("account_id")?),
        account_uri: row.uri("sip_uri")?,
        seq: row.optional_integer("head_seq")?.unwrap_or(0),
        hash: row.optional_text("head_hash")?.unwrap_or_else(|| chain::GENESIS.to_owned()),
    })
}

pub(super) fn conversation(row: &impl Columns) -> Result<ConversationRow, sqlx::Error> {
    Ok(ConversationRow {
        id: ConversationId(row.integer("id")?),
        account: AccountId(row.integer("account_id")?),
        session: row.optional_integer("session_id")?.map(SessionId),
        href: row.optional_text("href")?,
        thread_id: row.optional_text("thread_id")?,
        subject: row.optional_text("subject")?,
        importance: row.optional_text("importance")?,
        direction: row.optional_word("direction", direction)?,
        state: row.optional_text("state")?,
        multiparty: row.flag("multiparty")?,
        online_meeting_uri: row.optional_text("online_meeting_uri")?,
        started_at: row.time("started_at")?,
        connected_at: row.optional_time("connected_at")?,
        ended_at: row.optional_time("ended_at")?,
        end_code: row.optional_text("end_code")?,
        end_subcode: row.optional_text("end_subcode")?,
        awaiting_fetch: row.optional_text("awaiting")?.is_some(),
        continued_in: row.optional_integer("continued_in")?.map(ConversationId),
        first_message_href: row.optional_text("first_message_href")?,
        purged_at: row.optional_user_time("purged_at")?,
    })
}

pub(super) fn invitation(row: &impl Columns) -> Result<InvitationRow, sqlx::Error> {
    Ok(InvitationRow {
        id: row.integer("id")?,
        account: AccountId(row.integer("account_id")?),
        conversation: row.optional_integer("conversation_id")?.map(ConversationId),
        session: row.optional_integer("session_id")?.map(SessionId),
        href: row.optional_text("href")?,
        kind: row.word("kind", invitation_kind)?,
        direction: row.optional_word("direction", direction)?,
        state: row.optional_text("state")?,
        operation_id: row.optional_text("operation_id")?.map(OperationId),
        thread_id: row.optional_text("thread_id")?,
        subject: row.optional_text("subject")?,
        importance: row.optional_text("importance")?,
        from_uri: row.optional_text("from_uri")?,
        from_name: row.optional_text("from_name")?,
        to_uri: row.optional_text("to_uri")?,
        message: row.optional_integer("message_id")?.map(MessageId),
        action: row.optional_word("action", invitation_action)?,
        started_at: row.time("started_at")?,
        finished_at: row.optional_time("finished_at")?,
        code: row.optional_text("code")?,
        subcode: row.optional_text("subcode")?,
        reason: row.optional_text("reason")?,
        awaiting_fetch: row.optional_text("awaiting")?.is_some(),
    })
}

pub(super) fn participant(row: &impl Columns) -> Result<ParticipantRow, sqlx::Error> {
    Ok(ParticipantRow {
        id: row.integer("id")?,
        account: AccountId(row.integer("account_id")?),
        conversation: ConversationId(row.integer("conversation_id")?),
        session: row.optional_integer("session_id")?.map(SessionId),
        href: row.optional_text("href")?,
        sip_uri: row.optional_text("sip_uri")?,
        display_name: row.optional_text("display_name")?,
        role: row.optional_text("role")?,
        source_network: row.optional_text("source_network")?,
        is_local: row.flag("is_local")?,
        joined_at: row.optional_time("joined_at")?,
        left_at: row.optional_time("left_at")?,
        awaiting_fetch: row.optional_text("awaiting")?.is_some(),
    })
}

pub(super) fn message(row: &impl Columns) -> Result<MessageRow, sqlx::Error> {
    Ok(MessageRow {
        id: MessageId(row.integer("id")?),
        account: AccountId(row.integer("account_id")?),
        conversation: ConversationId(row.integer("conversation_id")?),
        session: row.optional_integer("session_id")?.map(SessionId),
        direction: row.word("direction", direction)?,
        sender_uri: row.optional_text("sender_uri")?,
        sender_name: row.optional_text("sender_name")?,
        content_type: row.text("content_type")?,
        body: row.text("body")?,
        body_html: row.optional_text("body_html")?,
        sent_at: row.time("sent_at")?,
        archived_at: row.time("archived_at")?,
        status: row.word("status", |text| {
            [MessageStatus::Pending, MessageStatus::Delivered, MessageStatus::Failed]
                .into_iter()
                .find(|known| known.as_str() == text)
        })?,
        code: row.optional_text("code")?,
        subcode: row.optional_text("subcode")?,
        reason: row.optional_text("reason")?,
        failed_recipients: row.optional_text("failed_recipients")?,
        operation_id: row.optional_text("operation_id")?.map(OperationId),
        outbox: row.optional_integer("outbox_id")?.map(OutboxId),
        correlation: row.optional_text("correlation")?,
        source: row.word("source", |text| {
            [MessageSource::Invitation, MessageSource::Event, MessageSource::ConversationLog]
                .into_iter()
                .find(|known| known.as_str() == text)
        })?,
        href: row.optional_text("href")?,
        chain_seq: row.optional_integer("chain_seq")?,
        content_hash: row.optional_text("content_hash")?,
        chain_hash: row.optional_text("chain_hash")?,
        awaiting: row.optional_word("awaiting", |text| {
            [Awaiting::Fetch, Awaiting::Sender, Awaiting::Copy, Awaiting::Receipt]
                .into_iter()
                .find(|known| known.as_str() == text)
        })?,
        sender_href: row.optional_text("sender_href")?,
        is_purged: row.optional_user_time("purged_at")?.is_some(),
    })
}

/// A message that waits, with its account's chain head. One that cannot be read is left out, such as one of an account
/// whose address a user has spoilt by plain SQL: that account's messages wait until it is mended.
pub(super) fn waiting_message(row: &impl Columns) -> Option<(ChainHead, MessageRow)> {
    let read = || Ok::<_, sqlx::Error>((chain_head(row)?, message(row)?));
    read().map_err(|error| tracing::debug!(%error, "a waiting message can't be settled yet")).ok()
}

// ------------------------------------------------------------------------------------------------ sessions

pub(super) fn session(row: &impl Columns) -> Result<Session, sqlx::Error> {
    Ok(Session {
        id: SessionId(row.integer("id")?),
        application_href: row.text("application_href")?,
        endpoint_id: row.text("endpoint_id")?,
        event_cursor: row.optional_text("event_cursor")?,
    })
}

/// From `urgency` (0 message, 1 invitation, 2 conversation, 3 participant), `kind`, `href` and `conversation_href`.
pub(super) fn fetch(row: &impl Columns) -> Result<Fetch, sqlx::Error> {
    Ok(Fetch {
        resource: match row.integer("urgency")? {
            0 => FetchedResource::Message,
            1 => FetchedResource::Invitation(row.word("kind", invitation_kind)?),
            2 => FetchedResource::Conversation,
            _ => FetchedResource::Participant,
        },
        href: row.text("href")?,
        conversation_href: row.optional_text("conversation_href")?,
    })
}

/// From a row of `conversations` with `remote`: everybody else's addresses, joined by `;`.
pub(super) fn unplaced_call(row: &impl Columns) -> Result<UnplacedCall, sqlx::Error> {
    Ok(UnplacedCall {
        outbox: OutboxId(row.integer("outbox_id")?),
        operation_id: OperationId(row.text("operation_id")?),
        account: AccountId(row.integer("account_id")?),
        session: SessionId(row.integer("session_id")?),
        href: row.text("href")?,
        sent_at: row.time("sent_at")?,
    })
}

pub(super) fn known_conversation(row: &impl Columns) -> Result<KnownConversation, sqlx::Error> {
    Ok(KnownConversation {
        remote_uri: row.optional_text("remote")?.filter(|remote| !remote.contains(';')),
        multiparty: row.flag("multiparty")?,
        thread_id: row.optional_text("thread_id")?,
        subject: row.optional_text("subject")?,
    })
}

pub(super) fn known_stay(row: &impl Columns) -> Result<KnownStay, sqlx::Error> {
    Ok(KnownStay {
        uri: row.optional_text("sip_uri")?,
        present: row.flag("present")?,
        being_read: row.flag("being_read")?,
    })
}

pub(super) fn open_conversation(row: &impl Columns) -> Result<OpenConversation, sqlx::Error> {
    let remote = row.optional_text("remote")?;
    Ok(OpenConversation {
        id: ConversationId(row.integer("id")?),
        href: row.text("href")?,
        remote_uri: remote.filter(|remote| !remote.contains(';')),
        multiparty: row.flag("multiparty")?,
        thread_id: row.optional_text("thread_id")?,
        group: row.optional_text("group_of_rows")?,
    })
}

// ------------------------------------------------------------------------------------------------ coverage

/// From a row of `backfills` with `open_gap`.
pub(super) fn backfill(row: &impl Columns) -> Result<Backfill, sqlx::Error> {
    Ok(Backfill {
        id: row.integer("id")?,
        open_gap: row.flag("open_gap")?,
        from: row.time("from_at")?,
        due_at: row.time("due_at")?,
        first_at: row.optional_time("first_at")?,
        runs: row.integer("runs")?,
    })
}

pub(super) fn followed_session(row: &impl Columns) -> Result<FollowedSession, sqlx::Error> {
    let from = row.time("started_at")?;
    Ok(FollowedSession {
        from,
        to: row.optional_time("last_ack_at")?.unwrap_or(from),
        open: row.optional_time("ended_at")?.is_none(),
        end_reason: row.optional_text("end_reason")?,
    })
}

pub(super) fn gap(row: &impl Columns) -> Result<Gap, sqlx::Error> {
    Ok(Gap {
        from: row.time("from_at")?,
        to: row.time("to_at")?,
        reason: row.text("reason")?,
        backfilled: row.flag("backfilled")?,
        detail: row.optional_text("detail")?,
    })
}

// ------------------------------------------------------------------------------------------------ quarantine

/// From a row of `event_quarantine` with `sip_uri` and `payload_bytes`.
pub(super) fn quarantine_entry(row: &impl Columns) -> Result<QuarantineEntry, sqlx::Error> {
    Ok(QuarantineEntry {
        id: row.integer("id")?,
        account: row.text("sip_uri")?,
        received_at: row.time("received_at")?,
        reason: row.text("reason")?,
        payload_bytes: row.integer("payload_bytes")?,
        resolved_at: row.optional_time("resolved_at")?,
        purged_at: row.optional_user_time("purged_at")?,
    })
}

pub(super) fn quarantined_payload(row: &impl Columns) -> Result<QuarantinedPayload, sqlx::Error> {
    Ok(QuarantinedPayload {
        entry: quarantine_entry(row)?,
        account: AccountId(row.integer("account_id")?),
        session: row.optional_integer("session_id")?.map(SessionId),
        payload: row.text("payload")?,
        sender: row
            .optional_text("sender")?
            .map(|sender| serde_json::from_str(&sender).map_err(|error| undecodable("sender", error)))
            .transpose()?,
    })
}

// ------------------------------------------------------------------------------------------------ history

/// A row of the view.
pub(super) fn history_row(row: &impl Columns) -> Result<HistoryRow, sqlx::Error> {
    Ok(HistoryRow {
        message_id: MessageId(row.integer("message_id")?),
        account: row.some_lossy_text("account")?,
        sent_at: row.user_time("sent_at")?,
        direction: row.word("direction", direction)?,
        sender: row.lossy_text("sender")?,
        sender_name: row.lossy_text("sender_name")?,
        recipients: row.lossy_text("recipients")?,
        conversation_id: ConversationId(row.integer("conversation_id")?),
        thread_id: row.lossy_text("thread_id")?,
        subject: row.lossy_text("subject")?,
        body: row.some_lossy_text("body")?,
        status: row.some_lossy_text("status")?,
        source: row.some_lossy_text("source")?,
        purged_at: row.optional_user_time("purged_at")?,
    })
}

// ------------------------------------------------------------------------------------------------ outbox

/// A row of which users write a part, and may do so while it is on its way: nothing in it may stop an account's facts.
pub(super) fn outbox_send(row: &impl Columns) -> Result<OutboxSend, sqlx::Error> {
    Ok(OutboxSend {
        id: OutboxId(row.integer("id")?),
        account: AccountId(row.integer("account_id")?),
        destination: row.some_lossy_text("destination")?,
        body: row.some_lossy_text("body")?,
        content_type: row.some_lossy_text("content_type")?,
        correlation: row.lossy_text("correlation")?,
        given_conversation: row.optional_integer("given_conversation_id")?.map(ConversationId),
        conversation: row.optional_integer("conversation_id")?.map(ConversationId),
        state: row.word("state", outbox_state)?,
        operation_id: row.lossy_text("operation_id")?.map(OperationId),
        attempts: row.integer("attempts")?,
        max_attempts: row.optional_integer("max_attempts")?,
        message: row.optional_integer("message_id")?.map(MessageId),
        next_attempt_at: row.optional_user_time("next_attempt_at")?,
        last_code: row.lossy_text("last_code")?,
        last_subcode: row.lossy_text("last_subcode")?,
        last_error: row.lossy_text("last_error")?,
        possible_duplicate: row.flag("possible_duplicate")?,
        claimed_at: row.optional_user_time("claimed_at")?,
        sent_at: row.optional_user_time("sent_at")?,
        finished_at: row.optional_user_time("finished_at")?,
    })
}

pub(super) fn attempt(row: &impl Columns) -> Result<AttemptRow, sqlx::Error> {
    Ok(AttemptRow {
        id: row.integer("id")?,
        outbox: OutboxId(row.integer("outbox_id")?),
        operation_id: OperationId(row.text("operation_id")?),
        finished_at: row.optional_time("finished_at")?,
        outcome: row.optional_text("outcome")?,
        http_status: row.optional_integer("http_status")?,
        code: row.optional_text("code")?,
        subcode: row.optional_text("subcode")?,
        detail: row.optional_text("detail")?,
    })
}

/// From a row of `outbox` with `href` of the conversation that the user gave, if it is open. Fails if a value can't be
/// read exactly.
pub(super) fn claimed_send(
    row: &impl Columns,
    default_max_attempts: i64,
) -> Result<ClaimedSend, sqlx::Error> {
    send(row, default_max_attempts, |column| row.optional_text(column))
}

/// As [`claimed_send`], for what is on its way already: it is read as well as it can be.
pub(super) fn unsettled_send(row: &impl Columns) -> Result<UnsettledSend, sqlx::Error> {
    let send = send(row, i64::MAX, |column| row.lossy_text(column))?;
    let claimed_at = row.optional_user_time("claimed_at")?.unwrap_or(send.created_at);
    Ok(UnsettledSend { claimed_at, events_missed: row.flag("events_missed")?, send })
}

fn send(
    row: &impl Columns,
    default_max_attempts: i64,
    text: impl Fn(&str) -> Result<Option<String>, sqlx::Error>,
) -> Result<ClaimedSend, sqlx::Error> {
    let content_type = text("content_type")?.unwrap_or_default();
    let importance = text("importance")?.unwrap_or_default();
    Ok(ClaimedSend {
        outbox: OutboxId(row.integer("id")?),
        account: AccountId(row.integer("account_id")?),
        destination: text("destination")?.unwrap_or_default(),
        operation_id: OperationId(text("operation_id")?.unwrap_or_default()),
        // Admission has read them before; a row that was changed since is looked at again first.
        recipients: admission::recipients(&text("recipients")?.unwrap_or_default()).unwrap_or_default(),
        conversation: match row.optional_integer("given_conversation_id")? {
            Some(id) => Some((ConversationId(id), text("href")?)),
            None => None,
        },
        body: text("body")?.unwrap_or_default(),
        content_type: admission::content_type(&content_type).unwrap_or("text/plain").to_owned(),
        subject: text("subject")?,
        importance: admission::importance(&importance).unwrap_or("Normal").to_owned(),
        thread_id: text("thread_id")?,
        attempt: row.integer("attempts")?,
        max_attempts: row.optional_integer("max_attempts")?.unwrap_or(default_max_attempts),
        expires_at: row.optional_user_time("expires_at")?,
        created_at: row.user_time("created_at")?,
        possible_duplicate: row.flag("possible_duplicate")?,
    })
}

pub(super) fn outbox_row(row: &impl Columns) -> Result<OutboxRow, sqlx::Error> {
    Ok(OutboxRow {
        id: OutboxId(row.integer("id")?),
        account: row.some_lossy_text("account")?,
        recipients: row.lossy_text("recipients")?,
        body: row.some_lossy_text("body")?,
        content_type: row.some_lossy_text("content_type")?,
        subject: row.lossy_text("subject")?,
        importance: row.some_lossy_text("importance")?,
        conversation_id: row.optional_integer("conversation_id")?.map(ConversationId),
        thread_id: row.lossy_text("thread_id")?,
        priority: row.integer("priority")?,
        send_after: row.shown_time("send_after")?,
        expires_at: row.shown_time("expires_at")?,
        max_attempts: row.optional_integer("max_attempts")?,
        idempotency_key: row.lossy_text("idempotency_key")?,
        correlation: row.lossy_text("correlation")?,
        state: row.word("state", outbox_state)?,
        attempts: row.integer("attempts")?,
        next_attempt_at: row.optional_user_time("next_attempt_at")?,
        operation_id: row.lossy_text("operation_id")?.map(OperationId),
        message_id: row.optional_integer("message_id")?.map(MessageId),
        last_code: row.lossy_text("last_code")?,
        last_subcode: row.lossy_text("last_subcode")?,
        last_error: row.lossy_text("last_error")?,
        possible_duplicate: row.flag("possible_duplicate")?,
        created_at: row.user_time("created_at")?,
        sent_at: row.optional_user_time("sent_at")?,
        finished_at: row.optional_user_time("finished_at")?,
    })
}

pub(super) fn shape_cell(row: &impl Columns) -> Result<ShapeCell, sqlx::Error> {
    Ok(ShapeCell {
        account: row.some_lossy_text("account")?,
        destination: row.some_lossy_text("destination")?,
        age: usize::try_from(row.integer("age")?).unwrap_or(0),
        count: row.integer("count")?,
    })
}

pub(super) fn outbox_attempt(row: &impl Columns) -> Result<OutboxAttempt, sqlx::Error> {
    Ok(OutboxAttempt {
        attempt: row.integer("attempt")?,
        node: row.lossy_text("node")?,
        started_at: row.user_time("started_at")?,
        finished_at: row.optional_user_time("finished_at")?,
        outcome: row.lossy_text("outcome")?,
        http_status: row.optional_integer("http_status")?,
        code: row.lossy_text("code")?,
        subcode: row.lossy_text("subcode")?,
        detail: row.lossy_text("detail")?,
    })
}

/// What a user is told of a row that holds something else than text. Errors that are not about a value pass through.
pub(super) fn unreadable_send(error: sqlx::Error) -> Result<Refusal, sqlx::Error> {
    let sqlx::Error::ColumnDecode { index, source } = error else {
        return Err(error);
    };
    Ok(Refusal {
        code: "Unreadable",
        sentence: format!(
            "{} can't be read ({source}); write it again as UTF-8 text and set the row's state to queued",
            index.trim_matches('"')
        ),
        expired: false,
    })
}

/// From which states a user may set `state`.
pub(super) fn allowed_before(state: OutboxState) -> &'static [OutboxState] {
    match state {
        OutboxState::Cancelled => &[OutboxState::Queued, OutboxState::Held],
        OutboxState::Held => &[OutboxState::Queued],
        OutboxState::Queued => {
            &[OutboxState::Held, OutboxState::Failed, OutboxState::Expired, OutboxState::Uncertain]
        }
        _ => &[],
    }
}

// ------------------------------------------------------------------------------------------------ accounts

pub(super) fn account(row: &impl Columns) -> Result<Account, sqlx::Error> {
    let sip_uri = row.uri("sip_uri")?;
    let stored = row.text("sip_uri")?;
    if sip_uri.as_str() != stored {
        // Two rows would be one account.
        return Err(undecodable("sip_uri", format!("{stored:?} has to be written as {sip_uri}")));
    }
    Ok(Account {
        id: AccountId(row.integer("id")?),
        sip_uri,
        username: row.text("username")?,
        auth: row.word("auth", |text| {
            [Auth::Password, Auth::Ntlm, Auth::Kerberos, Auth::Aad]
                .into_iter()
                .find(|auth| auth.as_str() == text)
        })?,
        secret: match (row.optional_bytes("secret_sealed")?, row.optional_text("secret_ref")?) {
            (_, Some(reference)) => SecretSource::Reference(reference),
            (Some(sealed), None) => SecretSource::Sealed(sealed),
            (None, None) => SecretSource::Missing,
        },
        display_name: row.lossy_text("display_name")?,
        enabled: row.flag("enabled")?,
        invitations: row.optional_word("invitations", |text| {
            [InvitationPolicy::Accept, InvitationPolicy::Decline, InvitationPolicy::Ignore]
                .into_iter()
                .find(|policy| policy.as_str() == text)
        })?,
        retention_days: row.optional_integer("retention_days")?,
        updated_at: row.user_time("updated_at")?,
    })
}

/// The columns `secret_sealed` and `secret_ref`.
pub(super) fn secret_columns(secret: &SecretSource) -> (Option<Vec<u8>>, Option<String>) {
    match secret {
        SecretSource::Reference(reference) => (None, Some(reference.clone())),
        SecretSource::Sealed(sealed) => (Some(sealed.clone()), None),
        SecretSource::Missing => (None, None),
    }
}

/// What a user is told of a row of `accounts` that cannot be read. Errors that are not about a value pass through.
pub(super) fn unreadable_account(error: sqlx::Error) -> Result<String, sqlx::Error> {
    match error {
        sqlx::Error::ColumnDecode { index, source } => Ok(format!(
            "{} can't be read ({source}); correct the account's row of the table accounts; see {} in docs/operations.md",
            index.trim_matches('"'),
            AttentionReason::UnreadableAccount.anchor()
        )),
        error => Err(error),
    }
}

/// From a row of the view with the account's own columns beside it.
pub(super) fn account_overview(row: &impl Columns) -> Result<AccountOverview, sqlx::Error> {
    let mut overview = AccountOverview {
        account: row.some_lossy_text("account")?,
        state: row.some_lossy_text("state")?,
        since: row.optional_user_time("since")?,
        detail: row.lossy_text("detail")?,
        messages_today: row.integer("messages_today")?,
        queued: row.integer("queued")?,
        last_event_at: row.optional_user_time("last_event_at")?,
        node_id: row.lossy_text("node_id")?,
        restarts: row.integer("restarts")?,
    };
    if let Err(error) = account(row) {
        // Also where no server has seen it yet; one that goes on with what it read before keeps its state.
        overview.detail = Some(unreadable_account(error)?);
        if overview.state == AccountState::Stopped.as_str() {
            AccountState::NeedsAttention.as_str().clone_into(&mut overview.state);
        }
    }
    Ok(overview)
}
