//! What an account's event channel and its own requests tell the archive, in the archive's words.
//!
//! A [`Fact`] knows neither XML nor SQL. [`crate::archive::interpret`] makes facts from event batches and fetched
//! resources, the account's actors make them from answers to their own requests, and the store commits them, all
//! facts of one [`ArchiveCommit`] and the event-channel cursor in one transaction (guarantees G1 and G2).
//!
//! Hrefs are kept as the server gave them: they name a resource within one application, so the store looks them up
//! together with the session.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::identifiers::{AccountId, OperationId, OutboxId, SessionId};

/// Everything that one transaction stores for one account.
#[derive(Debug, Clone)]
pub struct ArchiveCommit {
    /// Whose facts these are.
    pub account: AccountId,
    /// The UCWA application in which the hrefs of the facts mean something.
    pub session: SessionId,
    /// Fencing epoch under which the account is held; a store with leases refuses any other (G10).
    pub epoch: i64,
    /// The event-channel link to ask next: the `next`, `resume` or `resync` href of the batch. `None` if the facts
    /// did not come from the event channel.
    pub cursor: Option<String>,
    /// When the batch or answer was received, by this machine's clock.
    pub received_at: Timestamp,
    /// In document order; they are applied in this order.
    pub facts: Vec<Fact>,
}

/// One thing that became known.
#[derive(Debug, Clone, PartialEq)]
pub enum Fact {
    /// A conversation exists or changed (resource `conversation`).
    Conversation(ConversationFact),
    /// A conversation ended for us (`deleted conversation`), or was found gone.
    ConversationEnded(ConversationEnded),
    /// An invitation started, changed or completed.
    Invitation(InvitationFact),
    /// We answered an incoming invitation.
    InvitationAnswered(InvitationAnswered),
    /// Somebody joined, changed or left a conversation (resource `participant`, without `in`).
    Participant(ParticipantFact),
    /// Somebody began to type (resource `participant`, added to `typingParticipants`).
    Typing(TypingFact),
    /// A message in a conversation (resource `message`).
    Message(MessageFact),
    /// A resource that an event only linked could not be fetched: it is gone, or the server refuses it.
    Unfetchable(Unfetchable),
    /// A request for an outbox row was answered.
    Send(SendFact),
    /// What the server's conversation log has of one conversation.
    Logged(LoggedConversation),
    /// A payload that was not understood; kept in `event_quarantine`.
    Quarantined(Quarantined),
}

/// `status` of a completed operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationStatus {
    /// `Success`, `Succeeded`.
    Success,
    /// `Failure`, `Failed`.
    Failure,
}

/// Where an operation resource (invitation, message) is in its life: the name of its event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// `started`, or a resource that was fetched and is not finished.
    Started,
    /// `updated`.
    Updated,
    /// `completed`.
    Completed,
}

/// `direction`, stored as `incoming` and `outgoing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From somebody else to the account.
    Incoming,
    /// From the account.
    Outgoing,
}

impl Direction {
    /// As the column `direction` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Incoming => "incoming",
            Self::Outgoing => "outgoing",
        }
    }
}

/// UCWA's own words for why something failed (`<reason>`): `code` and `subcode` verbatim, `message` for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureReason {
    /// For instance `RemoteFailure`.
    pub code: Option<String>,
    /// For instance `Declined`.
    pub subcode: Option<String>,
    /// The server's sentence, in the server's language.
    pub message: Option<String>,
}

/// State of a conversation as far as one event or resource told it; `None` leaves what is known alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConversationFact {
    /// Identity within the application.
    pub href: String,
    /// UCWA `ConversationState`, verbatim (`Connected`).
    pub state: Option<String>,
    /// The one id that survives the application.
    pub thread_id: Option<String>,
    /// May be empty.
    pub subject: Option<String>,
    /// `Normal`, `Urgent`, `Emergency`, verbatim.
    pub importance: Option<String>,
    /// Known from the invitation that opened it, or from the state `Incoming`.
    pub direction: Option<Direction>,
    /// More than two people, or a conference.
    pub multiparty: Option<bool>,
    /// `onlineMeetingUri` of a conference.
    pub online_meeting_uri: Option<String>,
    /// The event carried no resource: it has to be fetched.
    pub link_only: bool,
}

/// The end of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConversationEnded {
    /// Identity within the application.
    pub href: String,
    /// The last reason that was heard, if any.
    pub reason: Option<FailureReason>,
}

/// `invitations.kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InvitationKind {
    /// `messagingInvitation`.
    Messaging,
    /// `onlineMeetingInvitation`.
    OnlineMeeting,
    /// `participantInvitation`.
    Participant,
}

impl InvitationKind {
    /// As the column `kind` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Messaging => "messaging",
            Self::OnlineMeeting => "online_meeting",
            Self::Participant => "participant",
        }
    }
}

/// A person as an embedded or linked participant names them. Any part may be missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Person {
    /// The participant's href, if the person came as a participant.
    pub href: Option<String>,
    /// Lower-case URI with scheme.
    pub uri: Option<String>,
    /// Display name; never an empty text.
    pub name: Option<String>,
    /// Lower-case URI from the person's contact, for where the participant can't be asked any more.
    pub contact_uri: Option<String>,
}

/// Text as it came: either, both or none of the two.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    /// `text/plain`, decoded.
    pub plain: Option<String>,
    /// `text/html`, decoded, unsanitised.
    pub html: Option<String>,
}

impl Content {
    /// No text at all.
    pub fn is_empty(&self) -> bool {
        self.plain.is_none() && self.html.is_none()
    }
}

/// An invitation as far as one event or resource told it; `None` leaves what is known alone.
#[derive(Debug, Clone, PartialEq)]
pub struct InvitationFact {
    /// Identity within the application.
    pub href: String,
    /// Which kind of invitation.
    pub kind: InvitationKind,
    /// Event name.
    pub phase: Phase,
    /// `Incoming` or `Outgoing`.
    pub direction: Option<Direction>,
    /// UCWA `state`, verbatim.
    pub state: Option<String>,
    /// The creator's id, only on what this application started.
    pub operation_id: Option<OperationId>,
    /// Thread of the conversation it opens.
    pub thread_id: Option<String>,
    /// May be empty.
    pub subject: Option<String>,
    /// Verbatim.
    pub importance: Option<String>,
    /// Who invites.
    pub from: Option<Person>,
    /// Who is invited, lower-case URI.
    pub to_uri: Option<String>,
    /// The conversation it belongs to.
    pub conversation_href: Option<String>,
    /// `message`: the first text.
    pub content: Content,
    /// On `completed`.
    pub status: Option<OperationStatus>,
    /// On a failure.
    pub reason: Option<FailureReason>,
    /// `onlineMeetingUri` of an invitation to a conference.
    pub online_meeting_uri: Option<String>,
    /// `derivedConversation`: where the talk goes on instead.
    pub derived_conversation_href: Option<String>,
    /// The event carried no resource: it has to be fetched.
    pub link_only: bool,
}

/// What the account did with an incoming invitation (`invitations.action`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvitationAnswered {
    /// Identity within the application.
    pub href: String,
    /// `accepted`, `declined` or `ignored`.
    pub action: InvitationAction,
}

/// `invitations.action`, and the setting `relay.invitations`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum InvitationAction {
    /// The `accept` link was followed.
    Accepted,
    /// The `decline` link was followed with reason `Local`.
    Declined,
    /// Left to the person's other clients.
    Ignored,
}

impl InvitationAction {
    /// As the column `action` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Declined => "declined",
            Self::Ignored => "ignored",
        }
    }
}

/// A membership change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParticipantFact {
    /// The conversation (the event's sender, or the resource's `conversation` link).
    pub conversation_href: String,
    /// Identity within the application.
    pub href: String,
    /// Joined, changed or left.
    pub change: ParticipantChange,
    /// Name from the event's `title`; never an empty text.
    pub title: Option<String>,
    /// From an embedded or fetched resource.
    pub details: Option<ParticipantDetails>,
    /// `Attendee` or `Leader`, from the list that they were added to.
    pub role: Option<&'static str>,
    /// `localParticipant`: the account itself.
    pub is_local: bool,
}

/// Somebody began to type. That they stopped may never be told, so it is not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypingFact {
    /// The conversation (the event's sender).
    pub conversation_href: String,
    /// The participant: href and the event's `title`.
    pub who: Person,
}

/// Which event on a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParticipantChange {
    /// `added`, or added to `attendees` or `leaders`, in which only members are.
    Joined,
    /// `updated`, or the fetched resource of a known participant.
    Updated,
    /// `deleted`.
    Left,
    /// `added` to the `lobby`: not in the conversation yet, or not any more.
    Waits,
}

/// Properties of a `participant` resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParticipantDetails {
    /// Lower-case URI.
    pub uri: Option<String>,
    /// Display name.
    pub name: Option<String>,
    /// `Attendee`, `Leader`, verbatim.
    pub role: Option<String>,
    /// `SameEnterprise`, `Federated`, ..., verbatim.
    pub source_network: Option<String>,
}

/// A message as far as one event or resource told it.
#[derive(Debug, Clone, PartialEq)]
pub struct MessageFact {
    /// The conversation (the event's sender, or derived from the `messaging` link).
    pub conversation_href: String,
    /// Identity within the application.
    pub href: String,
    /// Event name.
    pub phase: Phase,
    /// `None` while only a link is known.
    pub direction: Option<Direction>,
    /// Sender: `participant` link with its title, or what else names them.
    pub sender: Option<Person>,
    /// Text; empty on the delivery report of our own message.
    pub content: Content,
    /// `timeStamp`, server clock.
    pub sent_at: Option<Timestamp>,
    /// `timeStamp` as it came, if it is no time.
    pub unreadable_time: Option<String>,
    /// On `completed`, or from the resource's `status`.
    pub status: Option<OperationStatus>,
    /// On a failure.
    pub reason: Option<FailureReason>,
    /// Ours, where the server repeats it.
    pub operation_id: Option<OperationId>,
    /// `failedDeliveryParticipant`: who was not reached in a group.
    pub failed_recipients: Vec<Person>,
    /// The event carried no resource: it has to be fetched.
    pub link_only: bool,
}

/// A linked resource that will never be seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfetchable {
    /// What was asked for.
    pub fetch: Fetch,
    /// A sentence for the archive: status and what it means.
    pub why: String,
}

/// A resource that an event only linked and that is fetched after the commit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fetch {
    /// Which kind of resource.
    pub resource: FetchedResource,
    /// Address, as the server gave it.
    pub href: String,
    /// The conversation it belongs to, where one is known.
    pub conversation_href: Option<String>,
}

/// Kinds of resources that events may only link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FetchedResource {
    /// `message`: at once, the server forgets it within about 30 s.
    Message,
    /// `messagingInvitation`, `onlineMeetingInvitation`, `participantInvitation`.
    Invitation(InvitationKind),
    /// `conversation`.
    Conversation,
    /// `participant` or `localParticipant`.
    Participant,
}

/// What became of a request that was made for an outbox row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendFact {
    /// The row.
    pub outbox: OutboxId,
    /// The id under which the request went out; a fact about an older attempt changes nothing.
    pub operation_id: OperationId,
    /// What happened.
    pub outcome: SendOutcome,
}

/// Outcomes of one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SendOutcome {
    /// The server answered 201 to `sendMessage`: the row is `sent`, the message stands in the archive.
    MessageAccepted {
        /// Conversation in which it was said.
        conversation_href: String,
        /// `Location` of the message, if the server gave one.
        message_href: Option<String>,
        /// HTML was sent as its plain rendition, because the conversation takes nothing else.
        as_plain: bool,
        /// Recipients of a group that could not be brought in, and why.
        not_reached: Vec<(String, String)>,
    },
    /// The text is about to be said to a group, or was, without these recipients, who could not be brought in, and why.
    NotReached {
        /// As in [`SendOutcome::MessageAccepted`].
        not_reached: Vec<(String, String)>,
    },
    /// The server answered 201 to `startMessaging` or `addMessaging`: the text travels with the invitation.
    InvitationAccepted {
        /// `Location` of the invitation, if the server gave one.
        invitation_href: Option<String>,
    },
    /// Not sent; the row waits in `queued` until `at` (it was certainly not accepted).
    RetryAt {
        /// Earliest next attempt.
        at: Timestamp,
        /// Server's words, if it gave any.
        reason: FailureReason,
        /// HTTP status, if there was an answer.
        http_status: Option<u16>,
        /// A sentence for `last_error`.
        error: String,
    },
    /// Not sent, and it never will be: the row is `failed`. If `conversation_href` is given, the refused message is
    /// kept in `messages` as `failed`.
    Refused {
        /// Conversation inside which the server refused it.
        conversation_href: Option<String>,
        /// Server's words, if it gave any.
        reason: FailureReason,
        /// HTTP status, if there was an answer.
        http_status: Option<u16>,
        /// A sentence for `last_error`.
        error: String,
    },
    /// Nobody can tell whether the server took it: the row is `uncertain`.
    Uncertain {
        /// A sentence for `last_error`.
        error: String,
        /// Where `outbox.uncertain` is `retry`: it is sent again then, and marked as a possible duplicate, unless this was
        /// its last attempt.
        again_at: Option<Timestamp>,
    },
    /// The answer was lost, and an event channel that missed nothing told of no such operation. That is no proof if it
    /// told of a message that no operation is known for.
    Unheard {
        /// When the request went out, or somewhat before, by this machine's clock.
        since: Timestamp,
        /// Where an event of it would be.
        said_in: SaidIn,
        /// What follows if no event can have been of it: the server did not take it.
        silent: Box<SendOutcome>,
        /// What follows if one can.
        doubtful: Box<SendOutcome>,
    },
}

/// In which conversation a request would have said something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SaidIn {
    /// In the one at this href.
    Conversation(String),
    /// In one that the request itself began.
    NewConversation,
    /// Nobody remembers.
    Unknown,
}

/// One `conversationLog` with its transcripts (protocol 16): what was said while nobody followed, or where somebody
/// else answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoggedConversation {
    /// Address of the log.
    pub href: String,
    /// The one id that it shares with what events told.
    pub thread_id: Option<String>,
    /// May be empty.
    pub subject: Option<String>,
    /// Verbatim.
    pub importance: Option<String>,
    /// Who began it.
    pub direction: Option<Direction>,
    /// More than two people, or a conference.
    pub multiparty: bool,
    /// `onlineMeetingUri` of a conference.
    pub online_meeting_uri: Option<String>,
    /// Everybody the log names but the account, as far as it names them.
    pub people: Vec<Person>,
    /// By time.
    pub messages: Vec<LoggedMessage>,
    /// Parts of it that could not be understood.
    pub unreadable: Vec<Quarantined>,
}

/// One message of a [`LoggedConversation`].
#[derive(Debug, Clone, PartialEq)]
pub struct LoggedMessage {
    /// `timeStamp`, server clock.
    pub sent_at: Timestamp,
    /// Whether the account or somebody else wrote it.
    pub direction: Direction,
    /// Who wrote it; `None` if it was the account.
    pub sender: Option<Person>,
    /// Never empty.
    pub content: Content,
}

/// A payload that was not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// A sentence: what could not be understood.
    pub reason: String,
    /// The raw event or response. Bytes that are not UTF-8 are replaced by U+FFFD.
    pub payload: String,
    /// Whose event it was, if the payload is one event: its raw text does not say.
    pub sender: Option<EventSender>,
}

impl Quarantined {
    /// A response, or anything else that stands for itself.
    pub fn new(reason: impl Into<String>, payload: impl Into<String>) -> Self {
        Self { reason: reason.into(), payload: payload.into(), sender: None }
    }
}

/// The `sender` element around an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventSender {
    /// Its type.
    pub rel: String,
    /// Its address.
    pub href: String,
}
