//! Rows of the archive tables as the rules see them. Field names are the column names of the contract.

use jiff::Timestamp;

use crate::{
    archive::fact::{
        Direction, EventSender, FailureReason, InvitationAction, InvitationKind, OperationStatus,
    },
    identifiers::{AccountId, ConversationId, MessageId, OperationId, OutboxId, SessionId, SipUri},
    store::OutboxState,
};

/// `sessions`, as far as commits read and change it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRow {
    /// `id`.
    pub id: SessionId,
    /// `account_id`.
    pub account: AccountId,
    /// `accounts.sip_uri`, for the hash chain and our own messages.
    pub account_uri: SipUri,
    /// `event_cursor`.
    pub event_cursor: Option<String>,
    /// `last_ack_at`.
    pub last_ack_at: Option<Timestamp>,
    /// `ended_at`.
    pub ended_at: Option<Timestamp>,
}

/// `chain_heads`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainHead {
    /// `account_id`.
    pub account: AccountId,
    /// `accounts.sip_uri`, which goes into every content hash.
    pub account_uri: SipUri,
    /// Number of the newest chained message, 0 before the first.
    pub seq: i64,
    /// Its `chain_hash`.
    pub hash: String,
}

/// `conversations`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConversationRow {
    /// `id`.
    pub id: ConversationId,
    /// `account_id`.
    pub account: AccountId,
    /// `session_id`.
    pub session: Option<SessionId>,
    /// `href`; none while only an invitation without a conversation link spoke of it.
    pub href: Option<String>,
    /// `thread_id`.
    pub thread_id: Option<String>,
    /// `subject`.
    pub subject: Option<String>,
    /// `importance`.
    pub importance: Option<String>,
    /// `direction`.
    pub direction: Option<Direction>,
    /// `state`.
    pub state: Option<String>,
    /// `multiparty`.
    pub multiparty: bool,
    /// `online_meeting_uri`.
    pub online_meeting_uri: Option<String>,
    /// `started_at`.
    pub started_at: Timestamp,
    /// `connected_at`.
    pub connected_at: Option<Timestamp>,
    /// `ended_at`.
    pub ended_at: Option<Timestamp>,
    /// `end_code`.
    pub end_code: Option<String>,
    /// `end_subcode`.
    pub end_subcode: Option<String>,
    /// `awaiting`: only a link came so far.
    pub awaiting_fetch: bool,
    /// `continued_in`: the conversation that was derived from it, in which the talk went on.
    pub continued_in: Option<ConversationId>,
    /// `first_message_href`: the first incoming message event, which may repeat the invitation's text.
    pub first_message_href: Option<String>,
    /// `purged_at`: when subject and names were removed.
    pub purged_at: Option<Timestamp>,
}

/// `participants`: one stay of one person in one conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParticipantRow {
    /// `id`.
    pub id: i64,
    /// `account_id`.
    pub account: AccountId,
    /// `conversation_id`.
    pub conversation: ConversationId,
    /// `session_id`.
    pub session: Option<SessionId>,
    /// `href`.
    pub href: Option<String>,
    /// `sip_uri`.
    pub sip_uri: Option<String>,
    /// `display_name`.
    pub display_name: Option<String>,
    /// `role`.
    pub role: Option<String>,
    /// `source_network`.
    pub source_network: Option<String>,
    /// `is_local`.
    pub is_local: bool,
    /// `joined_at`; none if only the leaving was seen.
    pub joined_at: Option<Timestamp>,
    /// `left_at`.
    pub left_at: Option<Timestamp>,
    /// `awaiting`: only a link came so far.
    pub awaiting_fetch: bool,
}

/// `invitations`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvitationRow {
    /// `id`.
    pub id: i64,
    /// `account_id`.
    pub account: AccountId,
    /// `conversation_id`.
    pub conversation: Option<ConversationId>,
    /// `session_id`.
    pub session: Option<SessionId>,
    /// `href`.
    pub href: Option<String>,
    /// `kind`.
    pub kind: InvitationKind,
    /// `direction`.
    pub direction: Option<Direction>,
    /// `state`.
    pub state: Option<String>,
    /// `operation_id`.
    pub operation_id: Option<OperationId>,
    /// `thread_id`.
    pub thread_id: Option<String>,
    /// `subject`.
    pub subject: Option<String>,
    /// `importance`.
    pub importance: Option<String>,
    /// `from_uri`.
    pub from_uri: Option<String>,
    /// `from_name`.
    pub from_name: Option<String>,
    /// `to_uri`.
    pub to_uri: Option<String>,
    /// `message_id`: its text.
    pub message: Option<MessageId>,
    /// `action`.
    pub action: Option<InvitationAction>,
    /// `started_at`.
    pub started_at: Timestamp,
    /// `finished_at`.
    pub finished_at: Option<Timestamp>,
    /// `code`.
    pub code: Option<String>,
    /// `subcode`.
    pub subcode: Option<String>,
    /// `reason`.
    pub reason: Option<String>,
    /// `awaiting`: only a link came so far.
    pub awaiting_fetch: bool,
}

/// Why a message is not chained yet (`messages.awaiting`). A row without one is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaiting {
    /// Only a link came: its text is being fetched.
    Fetch,
    /// The text is here, but the sender's address comes with a participant that is being fetched.
    Sender,
    /// An invitation's text, whose repetition as the conversation's first message may bring time and HTML.
    Copy,
    /// Our own message, for which the server's time or its outcome is still to come.
    Receipt,
}

impl Awaiting {
    /// As the column `awaiting` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Sender => "sender",
            Self::Copy => "copy",
            Self::Receipt => "receipt",
        }
    }
}

/// `messages.status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageStatus {
    /// Under way.
    Pending,
    /// Arrived.
    Delivered,
    /// Did not arrive.
    Failed,
}

impl MessageStatus {
    /// As the column `status` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
        }
    }
}

/// `messages.source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageSource {
    /// Text of an invitation that was never repeated as a message.
    Invitation,
    /// A message event, or our own request.
    Event,
    /// Backfilled.
    ConversationLog,
}

impl MessageSource {
    /// As the column `source` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invitation => "invitation",
            Self::Event => "event",
            Self::ConversationLog => "conversation_log",
        }
    }
}

/// `messages`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MessageRow {
    /// `id`.
    pub id: MessageId,
    /// `account_id`.
    pub account: AccountId,
    /// `conversation_id`.
    pub conversation: ConversationId,
    /// `session_id`.
    pub session: Option<SessionId>,
    /// `direction`.
    pub direction: Direction,
    /// `sender_uri`.
    pub sender_uri: Option<String>,
    /// `sender_name`.
    pub sender_name: Option<String>,
    /// `content_type`.
    pub content_type: String,
    /// `body`.
    pub body: String,
    /// `body_html`.
    pub body_html: Option<String>,
    /// `sent_at`.
    pub sent_at: Timestamp,
    /// `archived_at`.
    pub archived_at: Timestamp,
    /// `status`.
    pub status: MessageStatus,
    /// `code`.
    pub code: Option<String>,
    /// `subcode`.
    pub subcode: Option<String>,
    /// `reason`.
    pub reason: Option<String>,
    /// `failed_recipients`.
    pub failed_recipients: Option<String>,
    /// `operation_id`.
    pub operation_id: Option<OperationId>,
    /// `outbox_id`.
    pub outbox: Option<OutboxId>,
    /// `correlation`.
    pub correlation: Option<String>,
    /// `source`.
    pub source: MessageSource,
    /// `href`.
    pub href: Option<String>,
    /// `chain_seq`.
    pub chain_seq: Option<i64>,
    /// `content_hash`.
    pub content_hash: Option<String>,
    /// `chain_hash`.
    pub chain_hash: Option<String>,
    /// `awaiting`.
    pub awaiting: Option<Awaiting>,
    /// `sender_href`.
    pub sender_href: Option<String>,
    /// `purged_at` is set: the text was removed by its age and must not come back.
    pub is_purged: bool,
}

impl MessageRow {
    /// Chained rows keep their content for ever.
    pub fn is_chained(&self) -> bool {
        self.chain_seq.is_some()
    }

    /// An event only linked it, and it has not been read, or can't be: whose it is and what it says is not known.
    pub fn is_unread(&self) -> bool {
        let says_nothing = self.body.is_empty() && self.body_html.is_none() && self.sender_uri.is_none();
        self.awaiting == Some(Awaiting::Fetch) || says_nothing
    }
}

impl InvitationRow {
    /// How it ended, if it has: `completed` brings a status, and what is kept of that is the state with the codes.
    pub fn end(&self) -> Option<(OperationStatus, Option<FailureReason>)> {
        self.finished_at?;
        let state = self.state.as_deref().unwrap_or_default();
        if state.eq_ignore_ascii_case("Connected") {
            return Some((OperationStatus::Success, None));
        }
        let failed = state.eq_ignore_ascii_case("Failed") || self.code.is_some() || self.subcode.is_some();
        failed.then(|| {
            let reason = FailureReason {
                code: self.code.clone(),
                subcode: self.subcode.clone(),
                message: self.reason.clone(),
            };
            (OperationStatus::Failure, Some(reason))
        })
    }
}

/// `outbox`, as far as the archive's rules read and change it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxSend {
    /// `id`.
    pub id: OutboxId,
    /// `account_id`.
    pub account: AccountId,
    /// `destination`: rows with the same one leave in order.
    pub destination: String,
    /// `body`.
    pub body: String,
    /// `content_type`.
    pub content_type: String,
    /// `correlation`.
    pub correlation: Option<String>,
    /// `given_conversation_id`: as the user gave it.
    pub given_conversation: Option<ConversationId>,
    /// `conversation_id`.
    pub conversation: Option<ConversationId>,
    /// `state`.
    pub state: OutboxState,
    /// `operation_id` of the newest attempt.
    pub operation_id: Option<OperationId>,
    /// `attempts` begun.
    pub attempts: i64,
    /// `max_attempts`, if the user gave it.
    pub max_attempts: Option<i64>,
    /// `message_id`.
    pub message: Option<MessageId>,
    /// `next_attempt_at`.
    pub next_attempt_at: Option<Timestamp>,
    /// `last_code`.
    pub last_code: Option<String>,
    /// `last_subcode`.
    pub last_subcode: Option<String>,
    /// `last_error`.
    pub last_error: Option<String>,
    /// `possible_duplicate`: sent again though the server may have taken it before.
    pub possible_duplicate: bool,
    /// `claimed_at`.
    pub claimed_at: Option<Timestamp>,
    /// `sent_at`.
    pub sent_at: Option<Timestamp>,
    /// `finished_at`.
    pub finished_at: Option<Timestamp>,
}

/// `outbox_attempts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptRow {
    /// `id`.
    pub id: i64,
    /// `outbox_id`.
    pub outbox: OutboxId,
    /// `operation_id`.
    pub operation_id: OperationId,
    /// `finished_at`.
    pub finished_at: Option<Timestamp>,
    /// `outcome`: the state that the attempt led to.
    pub outcome: Option<String>,
    /// `http_status`.
    pub http_status: Option<i64>,
    /// `code`.
    pub code: Option<String>,
    /// `subcode`.
    pub subcode: Option<String>,
    /// `detail`.
    pub detail: Option<String>,
}

/// A new row of `typing`: somebody began to type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypingRow {
    /// `account_id`.
    pub account: AccountId,
    /// `conversation_id`.
    pub conversation: ConversationId,
    /// `participant_id`: their stay.
    pub participant: i64,
    /// `at`.
    pub at: Timestamp,
}

/// A new row of `event_quarantine`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantineRow {
    /// `account_id`.
    pub account: AccountId,
    /// `session_id`.
    pub session: Option<SessionId>,
    /// `received_at`.
    pub received_at: Timestamp,
    /// `reason`.
    pub reason: String,
    /// `payload`.
    pub payload: String,
    /// `cursor`: with the digest and the occurrence it tells a redelivered payload from a new one.
    pub cursor: Option<String>,
    /// `payload_sha256`.
    pub payload_sha256: String,
    /// `occurrence`: how many times the same payload stood before it in its batch.
    pub occurrence: i64,
    /// `sender`: whose event the payload is, as JSON.
    pub sender: Option<EventSender>,
}
