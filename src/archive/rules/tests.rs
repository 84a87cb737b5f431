//! The rules, without a database: a ledger in memory keeps what each commit leaves behind.

use std::{collections::BTreeMap, time::Duration};

use jiff::{SignedDuration, Timestamp, ToSpan};

use crate::{
    archive::{
        Workspace, chain,
        fact::{
            ArchiveCommit, Content, ConversationEnded, ConversationFact, Direction, Fact, FailureReason,
            Fetch, FetchedResource, InvitationFact, InvitationKind, LoggedConversation, LoggedMessage,
            MessageFact, OperationStatus, ParticipantChange, ParticipantDetails, ParticipantFact, Person,
            Phase, Quarantined, SaidIn, SendFact, SendOutcome, TypingFact, Unfetchable,
        },
        retry::RetryPolicy,
        row::{
            AttemptRow, Awaiting, ChainHead, ConversationRow, InvitationRow, MessageRow, MessageSource,
            MessageStatus, OutboxSend, ParticipantRow, QuarantineRow, SessionRow, TypingRow,
        },
        workspace::{Counters, RuleSettings},
    },
    identifiers::{AccountId, ConversationId, MessageId, OperationId, OutboxId, SessionId},
    store::{CommitOutcome, OutboxState},
};

const ALICE: AccountId = AccountId(1);
const SESSION: SessionId = SessionId(1);
const TALK: &str = "/conversations/7";
const BOB: &str = "/conversations/7/participants/bob";

fn start() -> Timestamp {
    "2026-11-22T10:00:00Z".parse().unwrap()
}

/// What a database would keep.
#[derive(Debug, Clone, PartialEq)]
struct Ledger {
    session: SessionRow,
    head: ChainHead,
    conversations: BTreeMap<ConversationId, ConversationRow>,
    participants: BTreeMap<i64, ParticipantRow>,
    invitations: BTreeMap<i64, InvitationRow>,
    messages: BTreeMap<MessageId, MessageRow>,
    outbox: BTreeMap<OutboxId, OutboxSend>,
    attempts: BTreeMap<i64, AttemptRow>,
    typing: Vec<TypingRow>,
    quarantine: Vec<QuarantineRow>,
    counters: Counters,
    now: Timestamp,
    batch: u32,
}

impl Ledger {
    fn new() -> Self {
        let account_uri: crate::identifiers::SipUri = "sip:alice@contoso.com".parse().unwrap();
        Self {
            session: SessionRow {
                id: SESSION,
                account: ALICE,
                account_uri: account_uri.clone(),
                event_cursor: None,
                last_ack_at: None,
                ended_at: None,
            },
            head: ChainHead { account: ALICE, account_uri, seq: 0, hash: chain::GENESIS.to_owned() },
            conversations: BTreeMap::new(),
            participants: BTreeMap::new(),
            invitations: BTreeMap::new(),
            messages: BTreeMap::new(),
            outbox: BTreeMap::new(),
            attempts: BTreeMap::new(),
            typing: Vec::new(),
            quarantine: Vec::new(),
            counters: Counters::default(),
            now: start(),
            batch: 0,
        }
    }

    fn workspace(&self) -> Workspace {
        let mut workspace = Workspace::new(
            RuleSettings {
                plain_from_html: |html| html.replace("<b>", "").replace("</b>", ""),
                retry: RetryPolicy { base: Duration::from_secs(30), cap: Duration::from_secs(600) },
                max_attempts: 3,
                retry_uncertain: false,
                typing: true,
            },
            self.counters,
        );
        workspace.load_session(self.session.clone());
        workspace.load_chain_head(self.head.clone());
        self.conversations.values().cloned().for_each(|row| workspace.load_conversation(row));
        self.participants.values().cloned().for_each(|row| workspace.load_participant(row));
        self.invitations.values().cloned().for_each(|row| workspace.load_invitation(row));
        self.messages.values().cloned().for_each(|row| workspace.load_message(row));
        self.outbox.values().cloned().for_each(|row| workspace.load_outbox(row));
        self.attempts.values().cloned().for_each(|row| workspace.load_attempt(row));
        workspace
    }

    fn keep(&mut self, workspace: &Workspace) {
        let changes = workspace.changes();
        for id in changes.deleted_messages {
            self.messages.remove(id);
        }
        for row in changes.sessions {
            self.session = row.clone();
        }
        for row in changes.chain_heads {
            self.head = row.clone();
        }
        self.conversations.extend(changes.conversations.into_iter().map(|row| (row.id, row.clone())));
        self.participants.extend(changes.participants.into_iter().map(|row| (row.id, row.clone())));
        self.invitations.extend(changes.invitations.into_iter().map(|row| (row.id, row.clone())));
        self.messages.extend(changes.messages.into_iter().map(|row| (row.id, row.clone())));
        self.outbox.extend(changes.outbox.into_iter().map(|row| (row.id, row.clone())));
        self.attempts.extend(changes.attempts.into_iter().map(|row| (row.id, row.clone())));
        self.typing.extend_from_slice(changes.typing);
        for row in changes.quarantine {
            let same = |other: &QuarantineRow| {
                other.cursor.is_some()
                    && (&other.cursor, &other.payload_sha256, other.occurrence)
                        == (&row.cursor, &row.payload_sha256, row.occurrence)
            };
            if !self.quarantine.iter().any(same) {
                self.quarantine.push(row.clone());
            }
        }
        let highest = |known: i64, ids: Option<i64>| known.max(ids.unwrap_or(0));
        self.counters.conversations =
            highest(self.counters.conversations, self.conversations.keys().last().map(|id| id.0));
        self.counters.participants =
            highest(self.counters.participants, self.participants.keys().last().copied());
        self.counters.invitations =
            highest(self.counters.invitations, self.invitations.keys().last().copied());
        self.counters.messages = highest(self.counters.messages, self.messages.keys().last().map(|id| id.0));
    }

    fn apply(&mut self, cursor: Option<String>, facts: Vec<Fact>) -> CommitOutcome {
        let commit = ArchiveCommit {
            account: ALICE,
            session: SESSION,
            epoch: 0,
            cursor,
            received_at: self.now,
            facts,
        };
        let mut workspace = self.workspace();
        workspace.check(&commit).unwrap();
        let outcome = workspace.apply(&commit, self.now);
        self.keep(&workspace);
        outcome
    }

    /// Commits a batch from the event channel, and once more as after a crash before the acknowledgement: the second
    /// time must change nothing.
    fn events(&mut self, facts: Vec<Fact>) -> CommitOutcome {
        self.batch += 1;
        let cursor = Some(format!("/events?ack={}", self.batch));
        let outcome = self.apply(cursor.clone(), facts.clone());
        let once = self.clone();
        self.later(1);
        self.apply(cursor, facts);
        self.now = once.now;
        let mut again = self.clone();
        again.session.last_ack_at = once.session.last_ack_at;
        pretty_assert_same(&once, &again);
        *self = once;
        outcome
    }

    /// Commits what did not come from the event channel.
    fn answer(&mut self, fact: Fact) -> CommitOutcome {
        self.apply(None, vec![fact])
    }

    fn later(&mut self, seconds: i64) {
        self.now += seconds.seconds();
    }

    fn settle_overdue(&mut self) {
        let mut workspace = self.workspace();
        workspace.settle_overdue(self.now);
        self.keep(&workspace);
    }

    /// A row of the queue whose first attempt, `op-ID-1`, is under way.
    fn sending(&mut self, id: i64, destination: &str, body: &str) -> OperationId {
        self.outbox.insert(
            OutboxId(id),
            OutboxSend {
                id: OutboxId(id),
                account: ALICE,
                destination: destination.to_owned(),
                body: body.to_owned(),
                content_type: "text/plain".to_owned(),
                correlation: Some(format!("ticket {id}")),
                given_conversation: None,
                conversation: None,
                state: OutboxState::Queued,
                operation_id: None,
                attempts: 0,
                max_attempts: Some(1),
                message: None,
                next_attempt_at: None,
                last_code: None,
                last_subcode: None,
                last_error: None,
                possible_duplicate: false,
                claimed_at: None,
                sent_at: None,
                finished_at: None,
            },
        );
        self.claim(id)
    }

    /// Another attempt.
    fn claim(&mut self, id: i64) -> OperationId {
        let number = self.attempts.len() + 1;
        let operation = OperationId(format!("op-{id}-{number}"));
        let row = self.outbox.get_mut(&OutboxId(id)).unwrap();
        row.state = OutboxState::Sending;
        row.attempts += 1;
        row.operation_id = Some(operation.clone());
        row.next_attempt_at = None;
        row.claimed_at = Some(self.now);
        let attempt = i64::try_from(number).unwrap();
        self.attempts.insert(
            attempt,
            AttemptRow {
                id: attempt,
                outbox: OutboxId(id),
                operation_id: operation.clone(),
                finished_at: None,
                outcome: None,
                http_status: None,
                code: None,
                subcode: None,
                detail: None,
            },
        );
        operation
    }

    fn texts(&self) -> Vec<&str> {
        self.messages.values().map(|message| message.body.as_str()).collect()
    }

    fn only_message(&self) -> &MessageRow {
        assert_eq!(self.messages.len(), 1, "{:?}", self.messages);
        self.messages.values().next().unwrap()
    }

    fn row(&self, id: i64) -> &OutboxSend {
        &self.outbox[&OutboxId(id)]
    }

    /// Every chained message continues the chain; returns how many there are.
    fn check_chain(&self) -> i64 {
        let mut chained: Vec<&MessageRow> =
            self.messages.values().filter(|message| message.is_chained()).collect();
        chained.sort_by_key(|message| message.chain_seq);
        let mut hash = chain::GENESIS.to_owned();
        for (number, message) in (1..).zip(&chained) {
            assert_eq!(message.chain_seq, Some(number));
            assert_eq!(message.awaiting, None);
            let content = chain::Content {
                account: "sip:alice@contoso.com",
                conversation: message.conversation,
                direction: message.direction,
                sender_uri: message.sender_uri.as_deref(),
                sender_name: message.sender_name.as_deref(),
                content_type: &message.content_type,
                body: &message.body,
                body_html: message.body_html.as_deref(),
                sent_at: message.sent_at,
                operation_id: message.operation_id.as_ref().map(|id| id.0.as_str()),
                outbox: message.outbox,
                correlation: message.correlation.as_deref(),
            }
            .hash();
            assert_eq!(message.content_hash.as_ref(), Some(&content));
            hash = chain::link(&hash, number, &content);
            assert_eq!(message.chain_hash.as_ref(), Some(&hash));
        }
        assert_eq!((self.head.seq, &self.head.hash), (i64::try_from(chained.len()).unwrap(), &hash));
        self.head.seq
    }
}

fn pretty_assert_same(once: &Ledger, again: &Ledger) {
    assert_eq!(once.conversations, again.conversations, "conversations changed when delivered again");
    assert_eq!(once.participants, again.participants, "participants changed when delivered again");
    assert_eq!(once.invitations, again.invitations, "invitations changed when delivered again");
    assert_eq!(once.messages, again.messages, "messages changed when delivered again");
    assert_eq!(once.outbox, again.outbox, "outbox changed when delivered again");
    assert_eq!(once.attempts, again.attempts, "attempts changed when delivered again");
    assert_eq!(once.quarantine, again.quarantine, "quarantine changed when delivered again");
    assert_eq!(once, again);
}

// ------------------------------------------------------------------------------------------------ facts

fn conversation(state: &str) -> Fact {
    Fact::Conversation(ConversationFact {
        href: TALK.to_owned(),
        state: Some(state.to_owned()),
        ..ConversationFact::default()
    })
}

fn ended() -> Fact {
    Fact::ConversationEnded(ConversationEnded { href: TALK.to_owned(), reason: None })
}

fn bob() -> Person {
    Person {
        contact_uri: None,
        href: Some(BOB.to_owned()),
        uri: Some("sip:bob@contoso.com".to_owned()),
        name: Some("Bob".to_owned()),
    }
}

fn bob_by_link() -> Person {
    Person { href: Some(BOB.to_owned()), name: Some("Bob".to_owned()), ..Person::default() }
}

fn participant(change: ParticipantChange, uri: Option<&str>) -> Fact {
    Fact::Participant(ParticipantFact {
        role: None,
        conversation_href: TALK.to_owned(),
        href: BOB.to_owned(),
        change,
        title: Some("Bob".to_owned()),
        details: uri
            .map(|uri| ParticipantDetails { uri: Some(uri.to_owned()), ..ParticipantDetails::default() }),
        is_local: false,
    })
}

fn invitation_fact(phase: Phase) -> InvitationFact {
    InvitationFact {
        derived_conversation_href: None,
        href: "/invitations/1".to_owned(),
        kind: InvitationKind::Messaging,
        phase,
        direction: Some(Direction::Incoming),
        state: Some("Connecting".to_owned()),
        operation_id: None,
        thread_id: Some("thread".to_owned()),
        subject: Some("Lunch".to_owned()),
        importance: Some("Normal".to_owned()),
        from: Some(bob()),
        to_uri: Some("sip:alice@contoso.com".to_owned()),
        conversation_href: Some(TALK.to_owned()),
        content: Content { plain: Some("Hungry?".to_owned()), html: None },
        status: None,
        reason: None,
        online_meeting_uri: None,
        link_only: false,
    }
}

fn invitation(phase: Phase) -> Fact {
    Fact::Invitation(invitation_fact(phase))
}

fn invitation_over(status: OperationStatus) -> Fact {
    let reason = (status == OperationStatus::Failure).then(declined);
    Fact::Invitation(InvitationFact {
        status: Some(status),
        reason,
        content: Content::default(),
        from: None,
        ..invitation_fact(Phase::Completed)
    })
}

fn our_invitation(operation: &OperationId, phase: Phase, status: Option<OperationStatus>) -> Fact {
    Fact::Invitation(InvitationFact {
        href: "/invitations/9".to_owned(),
        direction: Some(Direction::Outgoing),
        operation_id: Some(operation.clone()),
        from: None,
        to_uri: Some("sip:bob@contoso.com".to_owned()),
        content: Content::default(),
        status,
        reason: (status == Some(OperationStatus::Failure)).then(declined),
        ..invitation_fact(phase)
    })
}

fn declined() -> FailureReason {
    FailureReason { code: Some("RemoteFailure".into()), subcode: Some("Declined".into()), message: None }
}

fn message_fact(number: u32, plain: &str) -> MessageFact {
    MessageFact {
        unreadable_time: None,
        conversation_href: TALK.to_owned(),
        href: format!("{TALK}/messages/{number}"),
        phase: Phase::Completed,
        direction: Some(Direction::Incoming),
        sender: Some(bob()),
        content: Content { plain: Some(plain.to_owned()), html: None },
        sent_at: Some(start() + i64::from(number).seconds()),
        status: Some(OperationStatus::Success),
        reason: None,
        operation_id: None,
        failed_recipients: Vec::new(),
        link_only: false,
    }
}

fn message(number: u32, plain: &str) -> Fact {
    Fact::Message(message_fact(number, plain))
}

fn our_message_fact(number: u32) -> MessageFact {
    MessageFact {
        direction: Some(Direction::Outgoing),
        sender: None,
        content: Content::default(),
        ..message_fact(number, "")
    }
}

fn our_message(number: u32) -> Fact {
    Fact::Message(our_message_fact(number))
}

fn message_link(number: u32) -> Fact {
    Fact::Message(MessageFact {
        direction: None,
        sender: None,
        content: Content::default(),
        sent_at: None,
        status: None,
        phase: Phase::Started,
        link_only: true,
        ..message_fact(number, "")
    })
}

fn send(id: i64, operation: &OperationId, outcome: SendOutcome) -> Fact {
    Fact::Send(SendFact { outbox: OutboxId(id), operation_id: operation.clone(), outcome })
}

fn accepted(number: Option<u32>) -> SendOutcome {
    SendOutcome::MessageAccepted {
        conversation_href: TALK.to_owned(),
        message_href: number.map(|number| format!("{TALK}/messages/{number}")),
        as_plain: false,
        not_reached: Vec::new(),
    }
}

fn retry(ledger: &Ledger) -> SendOutcome {
    SendOutcome::RetryAt {
        at: ledger.now + 30.seconds(),
        reason: declined(),
        http_status: Some(503),
        error: "the server is busy".to_owned(),
    }
}

fn fetch(resource: FetchedResource, href: &str) -> Fetch {
    let conversation_href = (resource != FetchedResource::Conversation).then(|| TALK.to_owned());
    Fetch { resource, href: href.to_owned(), conversation_href }
}

// ------------------------------------------------------------------------------------------------ conversations

#[test]
fn a_conversation_is_described_step_by_step_and_ends_once() {
    let mut ledger = Ledger::new();
    ledger.events(vec![conversation("Incoming")]);
    ledger.later(2);
    ledger.events(vec![conversation("Connected")]);
    let row = ledger.conversations.values().next().unwrap();
    assert_eq!(row.started_at, start());
    assert_eq!(row.connected_at, Some(start() + 2.seconds()));
    ledger.later(2);
    ledger.events(vec![Fact::ConversationEnded(ConversationEnded {
        href: TALK.to_owned(),
        reason: Some(declined()),
    })]);
    ledger.later(2);
    ledger.events(vec![conversation("Connected")]);
    let row = ledger.conversations.values().next().unwrap();
    assert_eq!(row.state.as_deref(), Some("Disconnected"));
    assert_eq!(row.ended_at, Some(start() + 4.seconds()));
    assert_eq!(
        (row.end_code.as_deref(), row.end_subcode.as_deref()),
        (Some("RemoteFailure"), Some("Declined"))
    );
}

#[test]
fn a_conversation_that_was_only_linked_is_fetched() {
    let mut ledger = Ledger::new();
    let link = ConversationFact { href: TALK.to_owned(), link_only: true, ..ConversationFact::default() };
    let outcome = ledger.events(vec![Fact::Conversation(link.clone())]);
    assert_eq!(outcome.fetches, [fetch(FetchedResource::Conversation, TALK)]);
    ledger.answer(conversation("Connected"));
    assert!(!ledger.conversations.values().next().unwrap().awaiting_fetch);
    let outcome = ledger.events(vec![Fact::Conversation(link)]);
    assert_eq!(
        outcome.fetches,
        [fetch(FetchedResource::Conversation, TALK)],
        "only the resource says what changed"
    );
}

// ------------------------------------------------------------------------------------------------ participants

#[test]
fn leaving_and_joining_again_are_two_stays() {
    let mut ledger = Ledger::new();
    let uri = Some("sip:bob@contoso.com");
    ledger.events(vec![participant(ParticipantChange::Joined, uri)]);
    ledger.events(vec![participant(ParticipantChange::Joined, uri)]);
    assert_eq!(ledger.participants.len(), 1, "an open stay is the same stay");
    ledger.later(5);
    ledger.events(vec![participant(ParticipantChange::Left, None)]);
    ledger.later(5);
    let outcome = ledger.events(vec![participant(ParticipantChange::Joined, None)]);
    assert_eq!(outcome.fetches, [], "the address is known from before");
    let stays: Vec<_> = ledger.participants.values().map(|stay| (stay.joined_at, stay.left_at)).collect();
    let at = |seconds: i64| Some(start() + seconds.seconds());
    assert_eq!(stays, [(at(0), at(5)), (at(10), None)]);
    ledger.later(5);
    ledger.events(vec![ended()]);
    assert!(ledger.participants.values().all(|stay| stay.left_at.is_some()));
}

#[test]
fn joining_and_leaving_in_one_batch_is_one_stay_however_often_it_comes() {
    let mut ledger = Ledger::new();
    // `events` delivers it twice.
    ledger.events(vec![
        participant(ParticipantChange::Joined, Some("sip:bob@contoso.com")),
        participant(ParticipantChange::Left, None),
    ]);
    assert_eq!(ledger.participants.len(), 1);
}

#[test]
fn a_linked_participant_is_fetched_once_and_leaving_makes_it_pointless() {
    let mut ledger = Ledger::new();
    let outcome = ledger.events(vec![participant(ParticipantChange::Joined, None)]);
    assert_eq!(outcome.fetches, [fetch(FetchedResource::Participant, BOB)]);
    ledger.answer(participant(ParticipantChange::Updated, Some("sip:bob@contoso.com")));
    let stay = ledger.participants.values().next().unwrap();
    assert_eq!(stay.sip_uri.as_deref(), Some("sip:bob@contoso.com"));
    assert_eq!(ledger.events(vec![participant(ParticipantChange::Updated, None)]).fetches, []);

    let mut ledger = Ledger::new();
    let outcome = ledger.events(vec![
        participant(ParticipantChange::Joined, None),
        participant(ParticipantChange::Left, None),
    ]);
    assert_eq!(outcome.fetches, []);
}

#[test]
fn a_role_says_who_is_there_but_not_who_they_are() {
    let listed = |role| {
        let Fact::Participant(fact) = participant(ParticipantChange::Joined, None) else { unreachable!() };
        Fact::Participant(ParticipantFact { role: Some(role), ..fact })
    };
    let mut ledger = Ledger::new();
    let outcome = ledger.events(vec![participant(ParticipantChange::Joined, None), listed("Attendee")]);
    assert_eq!(outcome.fetches, [fetch(FetchedResource::Participant, BOB)], "the role is no address");
    ledger.answer(participant(ParticipantChange::Updated, Some("sip:bob@contoso.com")));
    ledger.events(vec![listed("Leader")]);
    let stay = ledger.participants.values().next().unwrap();
    assert_eq!(
        (stay.role.as_deref(), stay.sip_uri.as_deref()),
        (Some("Leader"), Some("sip:bob@contoso.com"))
    );
    assert_eq!(ledger.participants.len(), 1);
    // In odd order: the list first, then the participant.
    ledger.events(vec![participant(ParticipantChange::Left, None)]);
    ledger.events(vec![listed("Attendee"), participant(ParticipantChange::Joined, None)]);
    let roles: Vec<_> = ledger.participants.values().map(|stay| stay.role.as_deref().unwrap()).collect();
    assert_eq!(roles, ["Leader", "Attendee"]);
}

#[test]
fn who_waits_in_the_lobby_is_not_there_yet_or_not_any_more() {
    let mut ledger = Ledger::new();
    ledger.events(vec![participant(ParticipantChange::Waits, None)]);
    assert!(ledger.participants.is_empty() && ledger.conversations.is_empty());
    ledger.events(vec![participant(ParticipantChange::Joined, Some("sip:bob@contoso.com"))]);
    ledger.later(5);
    ledger.events(vec![participant(ParticipantChange::Waits, None)]);
    assert_eq!(ledger.participants[&1].left_at, Some(start() + 5.seconds()));
    ledger.events(vec![participant(ParticipantChange::Joined, None)]);
    assert_eq!(ledger.participants.len(), 2);
}

#[test]
fn typing_is_kept_once_and_tells_of_nobody_new() {
    let typing = || Fact::Typing(TypingFact { conversation_href: TALK.to_owned(), who: bob_by_link() });
    let mut ledger = Ledger::new();
    ledger.events(vec![participant(ParticipantChange::Joined, Some("sip:bob@contoso.com"))]);
    ledger.later(2);
    ledger.events(vec![typing()]);
    ledger.later(2);
    ledger.events(vec![typing()]);
    let at: Vec<_> = ledger.typing.iter().map(|row| (row.participant, row.at)).collect();
    assert_eq!(
        at,
        [(1, start() + 2.seconds()), (1, start() + 4.seconds())],
        "each once, though each came twice"
    );
    assert_eq!(ledger.participants.len(), 1);
}

#[test]
fn the_local_participant_is_the_account() {
    let mut ledger = Ledger::new();
    let outcome = ledger.events(vec![Fact::Participant(ParticipantFact {
        role: None,
        conversation_href: TALK.to_owned(),
        href: "/conversations/7/localParticipant".to_owned(),
        change: ParticipantChange::Joined,
        title: None,
        details: None,
        is_local: true,
    })]);
    assert_eq!(outcome.fetches, []);
    let stay = ledger.participants.values().next().unwrap();
    assert_eq!((stay.is_local, stay.sip_uri.as_deref()), (true, Some("sip:alice@contoso.com")));
}

// ------------------------------------------------------------------------------------------------ incoming

#[test]
fn an_incoming_message_is_stored_once_and_chained_at_once() {
    let mut ledger = Ledger::new();
    ledger.events(vec![message(1, "Hi"), message(2, "there")]);
    assert_eq!(ledger.texts(), ["Hi", "there"]);
    let row = ledger.messages.values().next().unwrap();
    assert_eq!(row.sender_uri.as_deref(), Some("sip:bob@contoso.com"));
    assert_eq!(row.status, MessageStatus::Delivered);
    assert_eq!(row.sent_at, start() + 1.seconds());
    assert_eq!(ledger.check_chain(), 2);
    assert_eq!(ledger.participants.len(), 1, "the sender is in the conversation");
}

#[test]
fn started_and_completed_are_one_message() {
    let mut ledger = Ledger::new();
    let started = MessageFact { phase: Phase::Started, status: None, ..message_fact(1, "Hi") };
    ledger.events(vec![Fact::Message(started)]);
    assert_eq!(ledger.only_message().status, MessageStatus::Pending);
    ledger.events(vec![Fact::Message(MessageFact {
        status: Some(OperationStatus::Failure),
        reason: Some(declined()),
        ..message_fact(1, "Hi")
    })]);
    let row = ledger.only_message();
    assert_eq!((row.status, row.subcode.as_deref()), (MessageStatus::Failed, Some("Declined")));
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn a_message_announced_without_text_gets_it_later() {
    let mut ledger = Ledger::new();
    let started = MessageFact {
        phase: Phase::Started,
        status: None,
        content: Content::default(),
        ..message_fact(1, "")
    };
    ledger.events(vec![Fact::Message(started)]);
    assert_eq!(ledger.check_chain(), 0);
    ledger.events(vec![message(1, "Hi")]);
    assert_eq!(ledger.texts(), ["Hi"]);
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn a_message_announced_without_text_is_fetched_when_its_end_is_only_linked() {
    let without_text = || {
        Fact::Message(MessageFact {
            content: Content::default(),
            phase: Phase::Started,
            ..message_fact(1, "")
        })
    };
    let mut ledger = Ledger::new();
    assert_eq!(ledger.events(vec![without_text()]).fetches, []);
    let completed = Fact::Message(MessageFact {
        content: Content::default(),
        sender: None,
        link_only: true,
        ..message_fact(1, "")
    });
    let href = format!("{TALK}/messages/1");
    assert_eq!(ledger.events(vec![completed]).fetches, [fetch(FetchedResource::Message, &href)]);
    // Read too early: nothing is asked again and again.
    assert_eq!(ledger.answer(without_text()).fetches, []);
    ledger.answer(message(1, "Hi"));
    assert_eq!(ledger.only_message().body, "Hi");
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn html_without_plain_text_is_kept_and_made_readable() {
    let mut ledger = Ledger::new();
    let content = Content { plain: None, html: Some("<b>Hi</b>\0".to_owned()) };
    ledger.events(vec![Fact::Message(MessageFact { content, ..message_fact(1, "") })]);
    let row = ledger.only_message();
    assert_eq!(row.body, "Hi\u{2400}");
    assert_eq!(row.body_html.as_deref(), Some("<b>Hi</b>\u{2400}"));
    assert_eq!(row.content_type, "text/html");
}

#[test]
fn a_linked_message_is_fetched_first_and_then_settled() {
    let mut ledger = Ledger::new();
    let outcome = ledger.events(vec![
        participant(ParticipantChange::Joined, None),
        message_link(1),
        message(2, "second"),
    ]);
    let href = format!("{TALK}/messages/1");
    // The second message named Bob's address, so nobody has to ask for it.
    assert_eq!(outcome.fetches, [fetch(FetchedResource::Message, &href)]);
    assert_eq!(ledger.check_chain(), 1);
    ledger.answer(message(1, "first"));
    assert_eq!(ledger.texts(), ["first", "second"]);
    assert_eq!(ledger.check_chain(), 2);
    assert_eq!(ledger.events(vec![message_link(1)]).fetches, []);
}

#[test]
fn a_message_that_cannot_be_fetched_says_why() {
    let mut ledger = Ledger::new();
    ledger.events(vec![message_link(1)]);
    ledger.answer(Fact::Unfetchable(Unfetchable {
        fetch: fetch(FetchedResource::Message, &format!("{TALK}/messages/1")),
        why: "the server has forgotten it (404)".to_owned(),
    }));
    let row = ledger.only_message();
    assert_eq!((row.body.as_str(), row.awaiting), ("", None));
    assert_eq!(row.reason.as_deref(), Some("the server has forgotten it (404)"));
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn a_message_waits_for_its_sender_or_for_the_news_that_nobody_knows_him() {
    let from_link = || Fact::Message(MessageFact { sender: Some(bob_by_link()), ..message_fact(1, "Hi") });
    let mut ledger = Ledger::new();
    let outcome = ledger.events(vec![from_link()]);
    assert_eq!(outcome.fetches, [fetch(FetchedResource::Participant, BOB)]);
    assert_eq!(ledger.only_message().awaiting, Some(Awaiting::Sender));
    let mut unknown = ledger.clone();

    ledger.answer(participant(ParticipantChange::Updated, Some("sip:bob@contoso.com")));
    assert_eq!(ledger.only_message().sender_uri.as_deref(), Some("sip:bob@contoso.com"));
    assert_eq!(ledger.check_chain(), 1);

    unknown.answer(Fact::Unfetchable(Unfetchable {
        fetch: fetch(FetchedResource::Participant, BOB),
        why: "404".to_owned(),
    }));
    assert_eq!(unknown.only_message().sender_uri, None);
    assert_eq!(unknown.only_message().sender_name.as_deref(), Some("Bob"));
    assert_eq!(unknown.check_chain(), 1);
}

#[test]
fn who_left_before_the_message_came_is_known_by_the_contact() {
    let contact = Person { contact_uri: Some("sip:bob@contoso.com".to_owned()), ..bob_by_link() };
    let said = || Fact::Message(MessageFact { sender: Some(contact.clone()), ..message_fact(1, "Bye") });
    let gone = Fact::Unfetchable(Unfetchable {
        fetch: fetch(FetchedResource::Participant, BOB),
        why: "404".to_owned(),
    });
    for before in [
        vec![],
        vec![participant(ParticipantChange::Left, None)],
        vec![participant(ParticipantChange::Joined, None), participant(ParticipantChange::Left, None)],
    ] {
        let mut ledger = Ledger::new();
        ledger.events(before);
        let fetches = ledger.events(vec![said()]).fetches;
        if !fetches.is_empty() {
            assert_eq!(ledger.only_message().awaiting, Some(Awaiting::Sender));
            ledger.answer(gone.clone());
        }
        assert_eq!(ledger.only_message().sender_uri.as_deref(), Some("sip:bob@contoso.com"));
        assert_eq!(ledger.participants[&1].sip_uri.as_deref(), Some("sip:bob@contoso.com"));
        assert_eq!(ledger.check_chain(), 1);
    }
    // What the participant says of themselves is better.
    let mut ledger = Ledger::new();
    ledger.events(vec![said()]);
    ledger.answer(participant(ParticipantChange::Updated, Some("sip:robert@contoso.com")));
    assert_eq!(ledger.only_message().sender_uri.as_deref(), Some("sip:robert@contoso.com"));
}

#[test]
fn a_time_that_can_not_be_right_is_told_and_not_taken() {
    let dated = |number, sent_at: Option<&str>, unreadable: Option<&str>| {
        Fact::Message(MessageFact {
            sent_at: sent_at.map(|sent_at| sent_at.parse().unwrap()),
            unreadable_time: unreadable.map(str::to_owned),
            ..message_fact(number, "when?")
        })
    };
    let mut ledger = Ledger::new();
    ledger.events(vec![
        dated(1, Some("0001-01-01T00:00:00Z"), None),
        dated(2, Some("9999-12-30T22:00:00Z"), None),
        dated(3, Some("-009999-01-02T01:59:59Z"), None),
        dated(4, None, Some("9999-12-31T23:59:59.9999999Z")),
        dated(5, Some("2026-11-22T18:00:00Z"), None),
    ]);
    let rows: Vec<_> = ledger.messages.values().collect();
    for row in &rows[..4] {
        assert_eq!(row.sent_at, start(), "{row:?}");
        assert!(row.reason.as_ref().unwrap().contains("99") || row.reason.as_ref().unwrap().contains("0001"));
        assert_eq!(row.status, MessageStatus::Delivered);
    }
    assert_eq!((rows[4].sent_at, &rows[4].reason), ("2026-11-22T18:00:00Z".parse().unwrap(), &None));
    assert_eq!(ledger.check_chain(), 5);
}

// ------------------------------------------------------------------------------------------------ 12.5

#[test]
fn the_invitations_text_and_its_repetition_are_one_message() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started), conversation("Incoming")]);
    let row = ledger.only_message();
    assert_eq!((row.source, row.status), (MessageSource::Invitation, MessageStatus::Delivered));
    assert_eq!((row.awaiting, row.href.as_deref()), (Some(Awaiting::Copy), None));
    let id = row.id;
    ledger.later(3);
    ledger.events(vec![invitation_over(OperationStatus::Success)]);
    let copy = Content { plain: Some("Hungry?\r\n".into()), html: Some("<b>Hungry?</b>".into()) };
    ledger.events(vec![
        Fact::Message(MessageFact { content: copy, ..message_fact(1, "") }),
        message(2, "Hungry?"),
    ]);
    assert_eq!(ledger.texts(), ["Hungry?", "Hungry?"], "said again, it is another message");
    let row = &ledger.messages[&id];
    assert_eq!((row.source, row.awaiting), (MessageSource::Event, None));
    assert_eq!(row.body_html.as_deref(), Some("<b>Hungry?</b>"));
    assert_eq!(row.sent_at, start() + 1.seconds());
    assert_eq!(ledger.check_chain(), 2);
    let invitation = ledger.invitations.values().next().unwrap();
    assert_eq!(invitation.message, Some(id));
    assert_eq!(invitation.finished_at, Some(start() + 3.seconds()));
}

#[test]
fn all_of_it_in_one_batch_is_one_message_too() {
    let mut ledger = Ledger::new();
    ledger.events(vec![
        invitation(Phase::Started),
        invitation(Phase::Updated),
        invitation_over(OperationStatus::Success),
        message(1, "Hungry?"),
        ended(),
    ]);
    assert_eq!(ledger.only_message().source, MessageSource::Event);
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn a_repetition_that_was_only_linked_is_one_message_too() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started), message_link(1)]);
    assert_eq!(ledger.messages.len(), 2);
    ledger.answer(message(1, "Hungry?"));
    assert_eq!(ledger.only_message().href.as_deref(), Some("/conversations/7/messages/1"));
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn another_first_message_is_no_repetition_and_settles_the_text() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started)]);
    ledger.events(vec![message(1, "Are you there?"), message(2, "Hungry?")]);
    assert_eq!(ledger.texts(), ["Hungry?", "Are you there?", "Hungry?"]);
    assert_eq!(ledger.check_chain(), 3);
}

#[test]
fn text_that_is_never_accepted_here_keeps_its_source() {
    for over in [vec![invitation_over(OperationStatus::Failure)], vec![ended()]] {
        let mut ledger = Ledger::new();
        ledger.events(vec![invitation(Phase::Started)]);
        assert_eq!(ledger.check_chain(), 0);
        ledger.events(over);
        assert_eq!(ledger.only_message().source, MessageSource::Invitation);
        assert_eq!(ledger.check_chain(), 1);
    }
}

#[test]
fn after_a_minute_the_text_is_settled_and_a_late_repetition_still_finds_it() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started)]);
    ledger.later(59);
    ledger.settle_overdue();
    assert_eq!(ledger.check_chain(), 0);
    ledger.later(1);
    ledger.settle_overdue();
    assert_eq!(ledger.check_chain(), 1);
    // We were away for an hour; by the server's clock it was said at once.
    ledger.later(3600);
    ledger.events(vec![message(1, "Hungry?")]);
    assert_eq!(ledger.only_message().href.as_deref(), Some("/conversations/7/messages/1"));
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn an_equal_text_long_afterwards_is_another_message() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started)]);
    ledger.later(120);
    let late = MessageFact { sent_at: Some(ledger.now), ..message_fact(1, "Hungry?") };
    ledger.events(vec![Fact::Message(late)]);
    assert_eq!(ledger.texts(), ["Hungry?", "Hungry?"]);
}

#[test]
fn text_without_a_conversation_is_kept_and_finds_it_later() {
    let mut ledger = Ledger::new();
    let lonely = InvitationFact { conversation_href: None, ..invitation_fact(Phase::Started) };
    ledger.events(vec![Fact::Invitation(lonely)]);
    assert_eq!(ledger.texts(), ["Hungry?"]);
    ledger.events(vec![invitation(Phase::Updated), message(1, "Hungry?")]);
    assert_eq!(ledger.conversations.len(), 1);
    assert_eq!(ledger.only_message().source, MessageSource::Event);
}

#[test]
fn the_talk_that_goes_on_elsewhere_says_where() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started), conversation("Connecting")]);
    let over = Fact::Invitation(InvitationFact {
        status: Some(OperationStatus::Failure),
        reason: Some(FailureReason {
            subcode: Some("DerivedConversation".into()),
            ..FailureReason::default()
        }),
        derived_conversation_href: Some("/conversations/8".to_owned()),
        ..invitation_fact(Phase::Completed)
    });
    ledger.events(vec![over, ended()]);
    let rows: Vec<_> = ledger.conversations.values().collect();
    assert_eq!(rows[0].continued_in, Some(rows[1].id));
    assert_eq!(rows[0].end_subcode.as_deref(), Some("DerivedConversation"));
    assert_eq!((rows[1].href.as_deref(), rows[1].ended_at), (Some("/conversations/8"), None));
    assert_eq!(rows[1].thread_id.as_deref(), Some("thread"));
    assert_eq!(rows[1].subject.as_deref(), Some("Lunch"));
    assert_eq!(ledger.texts(), ["Hungry?"]);
}

#[test]
fn a_conference_does_not_end_with_the_messaging_that_was_asked_for() {
    let mut ledger = Ledger::new();
    ledger.events(vec![Fact::Conversation(ConversationFact {
        href: TALK.to_owned(),
        state: Some("Conferenced".to_owned()),
        multiparty: Some(true),
        ..ConversationFact::default()
    })]);
    let failed =
        our_invitation(&OperationId("add".to_owned()), Phase::Completed, Some(OperationStatus::Failure));
    ledger.events(vec![failed]);
    let row = ledger.conversations.values().next().unwrap();
    assert_eq!((&row.end_subcode, row.ended_at), (&None, None));
    assert_eq!(ledger.invitations[&1].subcode.as_deref(), Some("Declined"));
}

#[test]
fn a_linked_invitation_is_fetched_and_then_brings_its_text() {
    let mut ledger = Ledger::new();
    let link = InvitationFact {
        link_only: true,
        content: Content::default(),
        direction: None,
        from: None,
        conversation_href: None,
        ..invitation_fact(Phase::Started)
    };
    let outcome = ledger.events(vec![Fact::Invitation(link)]);
    assert_eq!(outcome.fetches.len(), 1);
    assert_eq!(outcome.fetches[0].resource, FetchedResource::Invitation(InvitationKind::Messaging));
    ledger.answer(invitation(Phase::Started));
    assert_eq!(ledger.texts(), ["Hungry?"]);
    assert!(!ledger.invitations.values().next().unwrap().awaiting_fetch);
}

// ------------------------------------------------------------------------------------------------ outgoing

#[test]
fn the_event_after_the_201() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.answer(send(5, &operation, accepted(Some(1))));
    assert_eq!(ledger.row(5).state, OutboxState::Sent);
    assert_eq!(ledger.only_message().status, MessageStatus::Pending);
    assert_eq!(ledger.check_chain(), 0, "the server's time is still to come");
    let outcome = ledger.events(vec![our_message(1)]);
    assert_eq!(outcome.settled[0].state, OutboxState::Delivered);
    delivered_once(&ledger, &operation);
}

#[test]
fn the_event_before_the_201_by_operation_id() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    let event = MessageFact { operation_id: Some(operation.clone()), ..our_message_fact(1) };
    ledger.events(vec![Fact::Message(event)]);
    delivered_once(&ledger, &operation);
    ledger.answer(send(5, &operation, accepted(Some(1))));
    delivered_once(&ledger, &operation);
}

#[test]
fn the_event_before_the_201_without_operation_id() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.sending(6, "sip:carol@contoso.com", "To somebody else");
    ledger.events(vec![participant(ParticipantChange::Joined, Some("sip:bob@contoso.com"))]);
    ledger.events(vec![our_message(1)]);
    delivered_once(&ledger, &operation);
    ledger.answer(send(5, &operation, accepted(Some(1))));
    delivered_once(&ledger, &operation);
    assert_eq!(ledger.row(6).state, OutboxState::Sending);
}

#[test]
fn an_event_that_nobody_can_place_waits_for_its_201() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    let other = ledger.sending(6, "sip:carol@contoso.com", "Other");
    // Nobody knows yet who is in the conversation, and two rows are in flight.
    ledger.events(vec![our_message(1)]);
    assert_eq!(ledger.texts(), [""]);
    assert_eq!(ledger.check_chain(), 0);
    for number in [Some(1), None] {
        let mut ledger = ledger.clone();
        ledger.answer(send(5, &operation, accepted(number)));
        delivered_once(&ledger, &operation);
        ledger.answer(send(6, &other, accepted(Some(2))));
        ledger.events(vec![our_message(2)]);
        assert_eq!(ledger.texts(), ["Done", "Other"]);
        assert_eq!(ledger.check_chain(), 2);
    }
}

/// The delivery report of a message, of which the event only linked the resource.
fn report_link(number: u32) -> Fact {
    Fact::Message(MessageFact {
        direction: None,
        sent_at: None,
        link_only: true,
        content: Content::default(),
        sender: None,
        ..message_fact(number, "")
    })
}

fn unfetchable(number: u32) -> Fact {
    Fact::Unfetchable(Unfetchable {
        fetch: fetch(FetchedResource::Message, &format!("{TALK}/messages/{number}")),
        why: "the conversation has ended (404)".to_owned(),
    })
}

#[test]
fn a_report_that_comes_while_the_resource_is_read_is_kept() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.events(vec![message_link(1)]);
    ledger.events(vec![report_link(1)]);
    // Read before the report, stored after it.
    ledger.answer(Fact::Message(MessageFact {
        operation_id: Some(operation.clone()),
        status: None,
        phase: Phase::Started,
        ..our_message_fact(1)
    }));
    delivered_once(&ledger, &operation);
}

#[test]
fn a_report_of_a_message_that_could_not_be_read_is_of_the_answer_with_its_address() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.events(vec![message_link(1), report_link(1)]);
    ledger.answer(unfetchable(1));
    ledger.answer(send(5, &operation, accepted(Some(1))));
    assert_eq!(ledger.row(5).state, OutboxState::Delivered);
    assert_eq!(ledger.texts(), ["", "Done"]);
    assert!(ledger.messages.values().all(|row| row.status == MessageStatus::Delivered));
}

#[test]
fn a_message_that_cannot_be_read_may_be_of_the_send_whose_answer_was_lost() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.events(vec![conversation("Connected"), message_link(1), report_link(1)]);
    let talk = || SaidIn::Conversation(TALK.to_owned());
    for readable in [true, false] {
        if !readable {
            ledger.answer(unfetchable(1));
        }
        let mut ledger = ledger.clone();
        ledger.answer(send(5, &operation, unheard(&ledger, start(), talk())));
        assert_eq!(ledger.row(5).state, OutboxState::Uncertain, "readable: {readable}");
    }
}

/// The answer to a request made at `since` was lost, and no event bears its operation id.
fn unheard(ledger: &Ledger, since: Timestamp, said_in: SaidIn) -> SendOutcome {
    SendOutcome::Unheard {
        since,
        said_in,
        silent: Box::new(retry(ledger)),
        doubtful: Box::new(SendOutcome::Uncertain { error: "nobody can tell".to_owned(), again_at: None }),
    }
}

#[test]
fn an_event_that_nobody_can_place_may_be_of_the_send_whose_answer_was_lost() {
    let mut ledger = Ledger::new();
    ledger.events(vec![conversation("Connected")]);
    ledger.later(60);
    let before = ledger.now;
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.sending(6, "sip:carol@contoso.com", "Other");
    ledger.later(1);
    ledger.events(vec![our_message(1)]);
    ledger.later(90);
    // The patience of the unplaced message does not matter.
    ledger.settle_overdue();
    let state = |ledger: &Ledger, since, said_in| {
        let mut ledger = ledger.clone();
        ledger.answer(send(5, &operation, unheard(&ledger, since, said_in)));
        ledger.row(5).state
    };
    let talk = || SaidIn::Conversation(TALK.to_owned());
    assert_eq!(state(&ledger, before, talk()), OutboxState::Uncertain);
    assert_eq!(state(&ledger, before, SaidIn::Unknown), OutboxState::Uncertain);
    // What came before the request, or elsewhere, is of something else.
    assert_eq!(state(&ledger, before + 2.seconds(), talk()), OutboxState::Queued);
    assert_eq!(state(&ledger, before, SaidIn::Conversation("/conversations/8".into())), OutboxState::Queued);
    assert_eq!(state(&ledger, before, SaidIn::NewConversation), OutboxState::Queued);

    let mut claimed = Ledger::new();
    claimed.events(vec![conversation("Connected")]);
    let operation = claimed.sending(5, "sip:bob@contoso.com", "Done");
    let other = claimed.sending(6, "sip:carol@contoso.com", "Other");
    claimed.events(vec![our_message(1)]);
    claimed.answer(send(6, &other, accepted(Some(1))));
    claimed.answer(send(5, &operation, unheard(&claimed, start(), talk())));
    assert_eq!(claimed.row(5).state, OutboxState::Queued, "the event was another row's");
}

#[test]
fn a_conversation_that_ended_with_a_resume_opens_again_if_the_server_has_it_still() {
    let mut ledger = Ledger::new();
    ledger.events(vec![
        conversation("Connected"),
        participant(ParticipantChange::Joined, Some("sip:bob@contoso.com")),
    ]);
    let id = *ledger.conversations.keys().next().unwrap();
    let end = |ledger: &mut Ledger, code: &str| {
        let at = ledger.now;
        let row = ledger.conversations.get_mut(&id).unwrap();
        (row.ended_at, row.end_code) = (Some(at), Some(code.to_owned()));
        ledger.participants.values_mut().for_each(|stay| stay.left_at = Some(at));
    };
    end(&mut ledger, "resume");
    ledger.events(vec![conversation("Disconnected")]);
    assert!(ledger.conversations[&id].ended_at.is_some());
    let mut gone = ledger.clone();
    ledger.events(vec![conversation("Connected"), participant(ParticipantChange::Joined, None)]);
    let row = &ledger.conversations[&id];
    assert_eq!((row.ended_at, row.end_code.as_deref()), (None, None));
    let stays: Vec<_> =
        ledger.participants.values().map(|stay| (stay.left_at, stay.sip_uri.as_deref())).collect();
    assert_eq!(stays.len(), 2, "another stay of the same person");
    assert!(stays[0].0.is_some() && stays[1] == (None, Some("sip:bob@contoso.com")), "{stays:?}");

    // One that has ended otherwise stays ended.
    gone.later(5);
    gone.events(vec![ended(), conversation("Connected")]);
    let row = &gone.conversations[&id];
    assert_eq!((row.ended_at, row.end_code.as_deref()), (Some(gone.now), None));
}

#[test]
fn an_event_that_was_settled_unclaimed_stands_in_nobodys_way() {
    let mut ledger = Ledger::new();
    ledger.events(vec![our_message(1)]);
    ledger.later(60);
    ledger.settle_overdue();
    assert_eq!(ledger.check_chain(), 1);
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    let event = MessageFact { operation_id: Some(operation.clone()), ..our_message_fact(1) };
    ledger.events(vec![Fact::Message(event)]);
    ledger.answer(send(5, &operation, accepted(Some(1))));
    assert_eq!(ledger.row(5).state, OutboxState::Delivered);
    assert_eq!(ledger.texts(), ["", "Done"]);
    let hrefs = ledger.messages.values().filter(|row| row.href.is_some()).count();
    assert_eq!(hrefs, 1, "an href names one row");
    assert_eq!(ledger.check_chain(), 2);
}

fn delivered_once(ledger: &Ledger, operation: &OperationId) {
    let row = ledger.only_message();
    assert_eq!((row.body.as_str(), row.status), ("Done", MessageStatus::Delivered));
    assert_eq!(row.sender_uri.as_deref(), Some("sip:alice@contoso.com"));
    assert_eq!(row.operation_id.as_ref(), Some(operation));
    assert_eq!((row.outbox, row.correlation.as_deref()), (Some(OutboxId(5)), Some("ticket 5")));
    assert_eq!(row.sent_at, start() + 1.seconds());
    assert_eq!(row.href.as_deref(), Some("/conversations/7/messages/1"));
    assert_eq!(ledger.check_chain(), 1);
    let send = ledger.row(5);
    assert_eq!((send.state, send.message), (OutboxState::Delivered, Some(row.id)));
    assert_eq!(send.conversation, Some(row.conversation));
    let attempt = ledger.attempts.values().find(|attempt| &attempt.operation_id == operation).unwrap();
    assert_eq!(attempt.outcome.as_deref(), Some("delivered"));
}

#[test]
fn two_sends_without_location_are_reported_in_order() {
    let mut ledger = Ledger::new();
    let first = ledger.sending(5, "sip:bob@contoso.com", "one");
    ledger.answer(send(5, &first, accepted(None)));
    let second = ledger.sending(6, "sip:bob@contoso.com", "two");
    ledger.events(vec![our_message(1)]);
    assert_eq!(ledger.row(5).state, OutboxState::Delivered);
    assert_eq!(ledger.row(6).state, OutboxState::Sending);
    ledger.events(vec![our_message(2)]);
    assert_eq!(ledger.row(6).state, OutboxState::Delivered);
    ledger.answer(send(6, &second, accepted(None)));
    assert_eq!(ledger.texts(), ["one", "two"]);
    assert_eq!(ledger.check_chain(), 2);
}

#[test]
fn a_report_that_some_of_a_group_did_not_get_the_message_names_them() {
    // Whom the row is for; the report; the state of row and message, and what the row says.
    type Case = (&'static str, FailureReason, Vec<Person>, OutboxState, MessageStatus, &'static str);
    let carol = || Person { uri: Some("sip:carol@contoso.com".into()), ..Person::default() };
    let timeout = || FailureReason { subcode: Some("Timeout".to_owned()), ..declined() };
    let group = "sip:bob@contoso.com;sip:carol@contoso.com";
    let cases: [Case; 7] = [
        (
            group,
            declined(),
            vec![carol()],
            OutboxState::Delivered,
            MessageStatus::Delivered,
            "not delivered to sip:carol@contoso.com",
        ),
        (
            group,
            timeout(),
            vec![carol()],
            OutboxState::Delivered,
            MessageStatus::Delivered,
            "not delivered to sip:carol@contoso.com",
        ),
        (
            group,
            declined(),
            vec![bob(), Person { name: Some("Carol".into()), ..Person::default() }],
            OutboxState::Failed,
            MessageStatus::Failed,
            "not delivered to sip:bob@contoso.com;Carol",
        ),
        (
            group,
            timeout(),
            vec![bob(), carol()],
            OutboxState::Queued,
            MessageStatus::Failed,
            "did not answer",
        ),
        // Some may have it.
        (group, timeout(), Vec::new(), OutboxState::Failed, MessageStatus::Failed, "did not answer"),
        (
            "sip:bob@contoso.com",
            timeout(),
            vec![bob()],
            OutboxState::Queued,
            MessageStatus::Failed,
            "did not answer",
        ),
        (
            "sip:bob@contoso.com",
            declined(),
            Vec::new(),
            OutboxState::Failed,
            MessageStatus::Failed,
            "declined",
        ),
    ];
    for (number, (to, reason, named, state, status, words)) in cases.into_iter().enumerate() {
        for report_first in [false, true] {
            let place = format!("case {number}, report first: {report_first}");
            let mut ledger = Ledger::new();
            let operation = ledger.sending(5, to, "Done");
            ledger.outbox.get_mut(&OutboxId(5)).unwrap().max_attempts = Some(2);
            // Another row that may be meant, so that an event without an operation id is nobody's at first.
            ledger.sending(6, to, "Other");
            let answer = send(5, &operation, accepted(Some(1)));
            let report = Fact::Message(MessageFact {
                status: Some(OperationStatus::Failure),
                reason: Some(reason.clone()),
                failed_recipients: named.clone(),
                operation_id: None,
                ..our_message_fact(1)
            });
            if report_first {
                ledger.events(vec![report]);
                ledger.answer(answer);
            } else {
                ledger.answer(answer);
                ledger.events(vec![report]);
            }
            let row = ledger.row(5);
            let error = row.last_error.clone().unwrap_or_default();
            assert_eq!(row.state, state, "{place}: {error}");
            assert!(error.contains(words), "{place}: {error}");
            let message = ledger.only_message();
            assert_eq!(message.status, status, "{place}");
            let names = message.failed_recipients.as_deref().map_or(0, |names| names.split(';').count());
            assert_eq!(names, named.len(), "{place}");
        }
    }
}

#[test]
fn whom_a_report_that_only_links_did_not_reach_is_read() {
    for (report_first, readable) in [(false, true), (true, true), (false, false), (true, false)] {
        let place = format!("report first: {report_first}, readable: {readable}");
        let mut ledger = Ledger::new();
        let operation = ledger.sending(5, "sip:bob@contoso.com;sip:carol@contoso.com", "Done");
        ledger.sending(6, "sip:bob@contoso.com;sip:carol@contoso.com", "Other");
        let linked = Fact::Message(MessageFact {
            direction: None,
            sent_at: None,
            status: Some(OperationStatus::Failure),
            reason: Some(declined()),
            link_only: true,
            ..our_message_fact(1)
        });
        let answer = send(5, &operation, accepted(Some(1)));
        if report_first {
            ledger.events(vec![linked]);
            ledger.answer(answer);
        } else {
            ledger.answer(answer);
            assert_eq!(ledger.events(vec![linked]).fetches.len(), 1, "{place}");
        }
        assert_eq!(ledger.row(5).state, OutboxState::Sent, "{place}: nothing is known of the others yet");
        if readable {
            ledger.answer(Fact::Message(MessageFact {
                status: Some(OperationStatus::Failure),
                reason: None,
                failed_recipients: vec![bob()],
                ..our_message_fact(1)
            }));
            let row = ledger.row(5);
            assert_eq!(row.state, OutboxState::Delivered, "{place}");
            assert_eq!(row.last_error.as_deref(), Some("not delivered to sip:bob@contoso.com"), "{place}");
        } else {
            ledger.answer(unfetchable(1));
            let row = ledger.row(5);
            assert_eq!(
                (row.state, row.last_subcode.as_deref()),
                (OutboxState::Failed, Some("Declined")),
                "{place}"
            );
        }
        ledger.check_chain();
    }
}

#[test]
fn who_was_not_brought_in_and_to_whom_nothing_was_delivered_are_both_named() {
    for report_first in [false, true] {
        let mut ledger = Ledger::new();
        let operation = ledger.sending(5, "sip:bob@contoso.com;sip:carol@contoso.com", "Done");
        let not_reached = vec![("sip:carol@contoso.com".to_owned(), "declined".to_owned())];
        let answer = SendOutcome::MessageAccepted {
            conversation_href: TALK.to_owned(),
            message_href: Some(format!("{TALK}/messages/1")),
            as_plain: false,
            not_reached,
        };
        let report = Fact::Message(MessageFact {
            status: Some(OperationStatus::Success),
            operation_id: Some(operation.clone()),
            failed_recipients: vec![bob()],
            ..our_message_fact(1)
        });
        if report_first {
            ledger.events(vec![report]);
            ledger.answer(send(5, &operation, answer));
        } else {
            ledger.answer(send(5, &operation, answer));
            ledger.events(vec![report]);
        }
        let named = ledger.only_message().failed_recipients.clone().unwrap();
        let mut named: Vec<&str> = named.split(';').collect();
        named.sort_unstable();
        assert_eq!(named, ["sip:bob@contoso.com", "sip:carol@contoso.com"], "{report_first}");
        let row = ledger.row(5);
        assert_eq!(row.state, OutboxState::Delivered, "{report_first}");
        assert_eq!(
            row.last_error.as_deref(),
            Some("not reached: sip:carol@contoso.com (declined); not delivered to sip:bob@contoso.com"),
            "{report_first}"
        );
    }
}

#[test]
fn a_receipt_that_never_comes_does_not_hold_the_chain_up() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.answer(send(5, &operation, accepted(Some(1))));
    ledger.later(60);
    ledger.settle_overdue();
    assert_eq!(ledger.check_chain(), 1);
    ledger.events(vec![our_message(1)]);
    let row = ledger.only_message();
    assert_eq!((row.status, row.sent_at), (MessageStatus::Delivered, start()), "chained content stays");
    assert_eq!(ledger.row(5).state, OutboxState::Delivered);
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn our_invitation_carries_the_row_whichever_comes_first() {
    let href = Some("/invitations/9".to_owned());
    for event_first in [true, false] {
        let mut ledger = Ledger::new();
        let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
        let created = send(5, &operation, SendOutcome::InvitationAccepted { invitation_href: href.clone() });
        let started = our_invitation(&operation, Phase::Started, None);
        if event_first {
            let outcome = ledger.events(vec![started]);
            assert_eq!(outcome.settled[0].state, OutboxState::Sent);
            ledger.answer(created);
        } else {
            ledger.answer(created);
            assert_eq!((ledger.row(5).state, ledger.messages.len()), (OutboxState::Sent, 0));
            ledger.events(vec![started]);
        }
        let row = ledger.only_message();
        assert_eq!((row.status, row.source), (MessageStatus::Pending, MessageSource::Invitation));
        assert_eq!(ledger.row(5).conversation, Some(row.conversation));
        ledger.events(vec![our_invitation(&operation, Phase::Completed, Some(OperationStatus::Success))]);
        assert_eq!(ledger.only_message().status, MessageStatus::Delivered);
        assert_eq!(ledger.row(5).state, OutboxState::Delivered);
        assert_eq!(ledger.invitations.len(), 1);
        assert_eq!(ledger.check_chain(), 1);
    }
}

#[test]
fn a_declined_invitation_fails_the_row_whatever_an_older_answer_says() {
    let mut ledger = Ledger::new();
    let first = ledger.sending(5, "sip:bob@contoso.com", "Done");
    let events = vec![
        our_invitation(&first, Phase::Started, None),
        our_invitation(&first, Phase::Completed, Some(OperationStatus::Failure)),
        ended(),
    ];
    let outcome = ledger.events(events);
    assert_eq!(outcome.settled.len(), 1);
    assert_eq!(outcome.settled[0].state, OutboxState::Failed);
    assert_eq!(ledger.row(5).last_subcode.as_deref(), Some("Declined"));
    assert_eq!(ledger.only_message().status, MessageStatus::Failed);
    let conversation = ledger.conversations.values().next().unwrap();
    assert_eq!(conversation.end_subcode.as_deref(), Some("Declined"));

    ledger.answer(send(5, &first, retry(&ledger)));
    assert_eq!(ledger.row(5).state, OutboxState::Failed, "who declined is not called again");
    assert_eq!(ledger.only_message().status, MessageStatus::Failed);
    assert_eq!(ledger.attempts[&1].outcome.as_deref(), Some("failed"));
}

#[test]
fn a_linked_invitation_whose_answer_came_first_is_fetched() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    let href = Some("/invitations/9".to_owned());
    ledger.answer(send(5, &operation, SendOutcome::InvitationAccepted { invitation_href: href }));
    let Fact::Invitation(known) = our_invitation(&operation, Phase::Started, None) else { unreachable!() };
    let linked = InvitationFact {
        direction: None,
        state: None,
        operation_id: None,
        thread_id: None,
        subject: None,
        importance: None,
        to_uri: None,
        conversation_href: None,
        link_only: true,
        ..known
    };
    let outcome = ledger.events(vec![Fact::Invitation(linked)]);
    assert_eq!(outcome.fetches.len(), 1, "only the resource names the conversation");
    assert_eq!(outcome.fetches[0].href, "/invitations/9");
    ledger.answer(our_invitation(&operation, Phase::Updated, None));
    assert_eq!(ledger.only_message().outbox, Some(OutboxId(5)));
}

/// An event of our invitation that only links it.
fn our_invitation_link(operation: &OperationId, phase: Phase, status: Option<OperationStatus>) -> Fact {
    let Fact::Invitation(known) = our_invitation(operation, phase, status) else { unreachable!() };
    Fact::Invitation(InvitationFact {
        direction: None,
        state: None,
        operation_id: None,
        thread_id: None,
        subject: None,
        importance: None,
        to_uri: None,
        conversation_href: None,
        link_only: true,
        ..known
    })
}

#[test]
fn the_end_of_an_invitation_counts_though_whose_it_is_is_known_later() {
    let resource = |operation: &OperationId, state: &str| {
        let Fact::Invitation(known) = our_invitation(operation, Phase::Updated, None) else { unreachable!() };
        Fact::Invitation(InvitationFact { state: Some(state.to_owned()), ..known })
    };
    let href = || Some("/invitations/9".to_owned());
    for (status, row, message) in [
        (OperationStatus::Success, OutboxState::Delivered, MessageStatus::Delivered),
        (OperationStatus::Failure, OutboxState::Failed, MessageStatus::Failed),
    ] {
        let mut ledger = Ledger::new();
        let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
        ledger.events(vec![our_invitation_link(&operation, Phase::Started, None)]);
        ledger.events(vec![our_invitation_link(&operation, Phase::Completed, Some(status))]);
        let mut by_answer = ledger.clone();
        // The resource is read: before the end, or after it.
        for state in ["Connecting", "Connected"] {
            let mut ledger = ledger.clone();
            ledger.answer(resource(&operation, state));
            assert_eq!(ledger.row(5).state, row, "{state}");
            assert_eq!(ledger.only_message().status, message, "{state}");
        }
        // Or the answer to the request names it.
        by_answer.answer(send(5, &operation, SendOutcome::InvitationAccepted { invitation_href: href() }));
        let mut unreadable = by_answer.clone();
        by_answer.answer(resource(&operation, "Connecting"));
        assert_eq!((by_answer.row(5).state, by_answer.only_message().status), (row, message));
        unreadable.answer(Fact::Unfetchable(Unfetchable {
            fetch: fetch(FetchedResource::Invitation(InvitationKind::Messaging), "/invitations/9"),
            why: "404".to_owned(),
        }));
        assert_eq!(unreadable.row(5).state, row);
    }
}

#[test]
fn the_text_of_a_call_that_can_not_be_read_is_archived_when_the_call_was_accepted() {
    let created = |operation: &OperationId| {
        let invitation_href = Some("/invitations/9".to_owned());
        send(5, operation, SendOutcome::InvitationAccepted { invitation_href })
    };
    let unreadable = Fact::Unfetchable(Unfetchable {
        fetch: fetch(FetchedResource::Invitation(InvitationKind::Messaging), "/invitations/9"),
        why: "404".to_owned(),
    });
    for answer_first in [true, false] {
        let mut ledger = Ledger::new();
        let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
        if answer_first {
            ledger.answer(created(&operation));
        }
        ledger.events(vec![our_invitation_link(&operation, Phase::Started, None)]);
        ledger.events(vec![our_invitation_link(
            &operation,
            Phase::Completed,
            Some(OperationStatus::Success),
        )]);
        if !answer_first {
            ledger.answer(created(&operation));
        }
        assert_eq!((ledger.row(5).state, ledger.messages.len()), (OutboxState::Sent, 0));
        ledger.answer(unreadable.clone());
        assert_eq!(ledger.row(5).state, OutboxState::Delivered);
        let row = ledger.only_message();
        assert_eq!((row.body.as_str(), row.status), ("Done", MessageStatus::Delivered));
        assert_eq!(ledger.row(5).message, Some(row.id));
        let call = &ledger.invitations[&1];
        assert_eq!((call.conversation, call.message), (Some(row.conversation), Some(row.id)));
        assert_eq!(call.to_uri.as_deref(), Some("sip:bob@contoso.com"), "it says to whom, without the queue");
        assert_eq!(ledger.check_chain(), 1);
    }
}

#[test]
fn a_call_whose_text_stands_alone_says_to_whom_and_finds_its_conversation_later() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    let invitation_href = Some("/invitations/9".to_owned());
    ledger.answer(send(5, &operation, SendOutcome::InvitationAccepted { invitation_href }));
    // No event came within the patience of the archive.
    let alone = SendOutcome::MessageAccepted {
        conversation_href: "/invitations/9".to_owned(),
        message_href: None,
        as_plain: false,
        not_reached: Vec::new(),
    };
    ledger.answer(send(5, &operation, alone));
    let stand_in = ledger.only_message().conversation;
    assert_eq!(ledger.invitations[&1].conversation, Some(stand_in));
    // The conversation is told of after all, by itself or by the call.
    for known in [false, true] {
        let mut ledger = ledger.clone();
        if known {
            ledger.events(vec![conversation("Connected")]);
        }
        ledger.events(vec![our_invitation(&operation, Phase::Completed, Some(OperationStatus::Success))]);
        assert_eq!(ledger.row(5).state, OutboxState::Delivered);
        let row = ledger.only_message();
        assert_eq!(row.status, MessageStatus::Delivered);
        assert_eq!(ledger.row(5).conversation, Some(row.conversation));
        assert_eq!(ledger.conversations[&row.conversation].href.as_deref(), Some(TALK));
    }
    // Or its end is only linked.
    ledger.events(vec![our_invitation_link(&operation, Phase::Completed, Some(OperationStatus::Success))]);
    assert_eq!(ledger.row(5).state, OutboxState::Delivered);
    assert_eq!(ledger.only_message().status, MessageStatus::Delivered);
}

#[test]
fn who_was_not_there_is_called_again_later_until_the_last_attempt() {
    let mut ledger = Ledger::new();
    let first = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.outbox.get_mut(&OutboxId(5)).unwrap().max_attempts = Some(2);
    let missed = |operation: &OperationId, number: u32| {
        let Fact::Invitation(fact) =
            our_invitation(operation, Phase::Completed, Some(OperationStatus::Failure))
        else {
            unreachable!()
        };
        let reason = FailureReason {
            code: Some("RemoteFailure".into()),
            subcode: Some("Timeout".into()),
            message: None,
        };
        Fact::Invitation(InvitationFact {
            href: format!("/invitations/{number}"),
            reason: Some(reason),
            ..fact
        })
    };
    let outcome = ledger.events(vec![missed(&first, 1)]);
    assert_eq!(outcome.settled[0].state, OutboxState::Queued);
    let row = ledger.row(5);
    assert_eq!((row.state, row.last_subcode.as_deref()), (OutboxState::Queued, Some("Timeout")));
    let due = row.next_attempt_at.unwrap();
    assert!(due >= ledger.now + 15.seconds() && due <= ledger.now + 30.seconds(), "{due}");
    assert_eq!(ledger.messages.len(), 0, "nothing was said yet");
    assert_eq!(ledger.attempts[&1].outcome.as_deref(), Some("failed"));

    let second = ledger.claim(5);
    ledger.events(vec![missed(&second, 2)]);
    assert_eq!(ledger.row(5).state, OutboxState::Failed);
    assert!(ledger.row(5).last_error.as_ref().unwrap().contains("did not answer in time"));
}

#[test]
fn an_older_attempts_failure_changes_nothing_and_its_success_everything() {
    let mut ledger = Ledger::new();
    let first = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.answer(send(5, &first, retry(&ledger)));
    ledger.claim(5);
    let late = |status| {
        Fact::Message(MessageFact {
            operation_id: Some(first.clone()),
            status: Some(status),
            ..our_message_fact(1)
        })
    };
    let mut failed = ledger.clone();
    failed.events(vec![late(OperationStatus::Failure)]);
    assert_eq!(failed.row(5).state, OutboxState::Sending);

    ledger.events(vec![late(OperationStatus::Success)]);
    assert_eq!(ledger.row(5).state, OutboxState::Delivered);
    let second = ledger.row(5).operation_id.clone().unwrap();
    ledger.answer(send(5, &second, retry(&ledger)));
    assert_eq!(ledger.row(5).state, OutboxState::Delivered, "there is nothing to retry");
}

#[test]
fn an_uncertain_row_is_settled_by_a_late_event() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.answer(send(
        5,
        &operation,
        SendOutcome::Uncertain { error: "no answer".to_owned(), again_at: None },
    ));
    assert_eq!(ledger.row(5).state, OutboxState::Uncertain);
    let event = MessageFact { operation_id: Some(operation), ..our_message_fact(1) };
    ledger.events(vec![Fact::Message(event)]);
    assert_eq!(ledger.row(5).state, OutboxState::Delivered);
    assert_eq!(ledger.row(5).last_error, None);
}

#[test]
fn what_the_server_refuses_in_a_conversation_is_kept_as_failed() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.answer(send(
        5,
        &operation,
        SendOutcome::Refused {
            conversation_href: Some(TALK.to_owned()),
            reason: FailureReason { code: Some("EntityTooLarge".into()), ..FailureReason::default() },
            http_status: Some(413),
            error: "the message is too long".to_owned(),
        },
    ));
    let row = ledger.only_message();
    assert_eq!((row.status, row.outbox), (MessageStatus::Failed, Some(OutboxId(5))));
    assert_eq!(ledger.row(5).state, OutboxState::Failed);
    assert_eq!(ledger.row(5).last_error.as_deref(), Some("the message is too long"));
    assert_eq!(ledger.attempts[&1].http_status, Some(413));
    assert_eq!(ledger.check_chain(), 1);
}

#[test]
fn an_answer_for_another_accounts_row_is_ignored() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.outbox.get_mut(&OutboxId(5)).unwrap().account = AccountId(2);
    ledger.answer(send(5, &operation, accepted(Some(1))));
    assert_eq!(ledger.row(5).state, OutboxState::Sending);
    assert_eq!(ledger.messages.len(), 0);
}

// ------------------------------------------------------------------------------------------------ the rest

#[test]
fn the_end_of_a_session_settles_everything() {
    let mut ledger = Ledger::new();
    let operation = ledger.sending(5, "sip:bob@contoso.com", "Done");
    ledger.answer(send(5, &operation, accepted(Some(1))));
    ledger.events(vec![
        invitation(Phase::Started),
        message_link(2),
        Fact::Message(MessageFact {
            sender: Some(Person { href: Some("/carol".into()), ..Person::default() }),
            ..message_fact(3, "Hi")
        }),
    ]);
    let mut workspace = ledger.workspace();
    workspace.settle_session(SESSION);
    ledger.keep(&workspace);
    assert_eq!(ledger.check_chain(), 4);
    assert!(ledger.messages.values().any(|row| row.reason.is_some()));
}

#[test]
fn equal_payloads_of_one_batch_are_each_kept_once() {
    let mut ledger = Ledger::new();
    let odd = || Fact::Quarantined(Quarantined::new("odd", "<x/>\0"));
    ledger.events(vec![odd(), odd()]);
    assert_eq!(ledger.quarantine.len(), 2);
    assert_eq!(ledger.quarantine[0].payload, "<x/>\u{2400}");
    ledger.events(vec![odd()]);
    assert_eq!(ledger.quarantine.len(), 3, "another batch is another event");
}

// ------------------------------------------------------------------------------------------------ logs

/// A log's message: seconds after the start, who, what.
fn logged_message(second: i64, sender: Option<&str>, plain: &str) -> LoggedMessage {
    LoggedMessage {
        sent_at: start() + second.seconds(),
        direction: if sender.is_some() { Direction::Incoming } else { Direction::Outgoing },
        sender: sender.map(|name| Person {
            contact_uri: None,
            href: None,
            uri: Some(format!("sip:{name}@contoso.com")),
            name: Some(name.to_owned()),
        }),
        content: Content { plain: Some(plain.to_owned()), html: None },
    }
}

fn log(thread: Option<&str>, messages: Vec<LoggedMessage>) -> Fact {
    Fact::Logged(LoggedConversation {
        href: "/logs/1".to_owned(),
        thread_id: thread.map(ToOwned::to_owned),
        subject: Some("Lunch".to_owned()),
        direction: Some(Direction::Incoming),
        people: vec![Person { href: None, ..bob() }],
        messages,
        ..LoggedConversation::default()
    })
}

impl Ledger {
    /// Reads a log, and again: the second time must change nothing.
    fn reads(&mut self, log: &Fact) {
        self.answer(log.clone());
        let once = self.clone();
        self.later(300);
        self.answer(log.clone());
        assert_eq!(once.messages, self.messages, "messages changed when the log was read again");
        assert_eq!(once.conversations, self.conversations);
        assert_eq!(once.participants, self.participants);
        assert_eq!(once.quarantine, self.quarantine);
        self.check_chain();
    }

    fn logged_texts(&self) -> Vec<&str> {
        self.messages
            .values()
            .filter(|row| row.source == MessageSource::ConversationLog)
            .map(|row| row.body.as_str())
            .collect()
    }
}

#[test]
fn a_conversation_that_nobody_followed_is_archived_from_its_log() {
    let mut ledger = Ledger::new();
    ledger.later(600);
    ledger.reads(&log(
        Some("t"),
        vec![logged_message(5, None, "gladly"), logged_message(1, Some("bob"), "lunch?")],
    ));
    assert_eq!(ledger.texts(), ["lunch?", "gladly"], "by time");
    let talk = ledger.conversations.values().next().unwrap();
    assert_eq!((talk.thread_id.as_deref(), talk.direction), (Some("t"), Some(Direction::Incoming)));
    assert_eq!((talk.started_at, talk.ended_at), (start() + 1.seconds(), Some(start() + 5.seconds())));
    let people: Vec<_> =
        ledger.participants.values().map(|stay| (stay.sip_uri.as_deref().unwrap(), stay.is_local)).collect();
    assert_eq!(people, [("sip:alice@contoso.com", true), ("sip:bob@contoso.com", false)]);
    let rows: Vec<_> = ledger.messages.values().collect();
    assert_eq!(rows[0].sender_uri.as_deref(), Some("sip:bob@contoso.com"));
    assert_eq!(rows[1].sender_uri.as_deref(), Some("sip:alice@contoso.com"));
    assert!(rows.iter().all(|row| row.status == MessageStatus::Delivered && row.is_chained()));
    assert_eq!(rows[0].source, MessageSource::ConversationLog);
    assert_eq!(ledger.check_chain(), 2);
}

#[test]
fn what_events_and_invitations_and_the_queue_archived_is_not_archived_again() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started), message(10, "same\r\n")]);
    ledger.events(vec![invitation_over(OperationStatus::Success)]);
    let operation = ledger.sending(1, "sip:bob@contoso.com", "from the queue");
    ledger.answer(send(1, &operation, accepted(Some(3))));
    ledger.later(90);
    ledger.settle_overdue();
    assert_eq!(ledger.messages.len(), 3);
    ledger.reads(&log(
        Some("thread"),
        vec![
            // The invitation's time is ours, and so is the queue's as long as no event told.
            logged_message(-20, Some("bob"), "Hungry?"),
            logged_message(11, Some("bob"), "same"),
            logged_message(30, None, "from  the queue"),
            logged_message(40, Some("bob"), "missed"),
        ],
    ));
    assert_eq!(ledger.logged_texts(), ["missed"]);
    assert_eq!(ledger.conversations.len(), 1, "it went into the conversation of the thread");
    assert_eq!(ledger.participants.len(), 1, "whose people are known");
}

#[test]
fn an_equal_text_stays_as_often_as_the_log_has_it() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started), message(2, "ok")]);
    ledger.reads(&log(
        Some("thread"),
        vec![
            logged_message(0, Some("bob"), "Hungry?"),
            logged_message(1, Some("bob"), "ok"),
            logged_message(2, Some("bob"), "ok"),
            logged_message(30, Some("bob"), "ok"),
            logged_message(2, None, "ok"),
        ],
    ));
    assert_eq!(ledger.logged_texts(), ["ok", "ok", "ok"], "one of bob's was there, alice's is another");
}

#[test]
fn another_thread_or_another_sender_is_another_message() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started), message(2, "ok")]);
    ledger.reads(&log(Some("other"), vec![logged_message(2, Some("bob"), "ok")]));
    assert_eq!(ledger.logged_texts(), ["ok"]);
    ledger.reads(&log(Some("thread"), vec![logged_message(2, Some("carol"), "ok")]));
    assert_eq!(ledger.logged_texts(), ["ok", "ok"]);
    let mut ledger = Ledger::new();
    // Of this conversation the thread never became known.
    ledger.events(vec![message(2, "ok")]);
    ledger.reads(&log(Some("thread"), vec![logged_message(2, Some("bob"), "ok")]));
    assert_eq!(ledger.logged_texts(), [""; 0]);
}

#[test]
fn a_log_without_a_thread_is_read_once_too() {
    let mut ledger = Ledger::new();
    ledger.reads(&log(None, vec![logged_message(1, Some("bob"), "a"), logged_message(2, None, "b")]));
    assert_eq!(ledger.logged_texts(), ["a", "b"]);
    assert_eq!(ledger.conversations.len(), 1);
}

#[test]
fn an_invitation_that_reached_us_late_is_the_logs_first_message() {
    let mut ledger = Ledger::new();
    ledger.later(1200);
    ledger.events(vec![invitation(Phase::Started), invitation_over(OperationStatus::Failure)]);
    ledger.reads(&log(
        Some("thread"),
        vec![logged_message(0, Some("bob"), "Hungry?"), logged_message(9, Some("bob"), "Hungry?")],
    ));
    assert_eq!(ledger.logged_texts(), ["Hungry?"], "the second is another one");
}

#[test]
fn an_event_that_comes_after_the_log_is_the_logs_message() {
    let mut ledger = Ledger::new();
    ledger.events(vec![invitation(Phase::Started), invitation_over(OperationStatus::Success)]);
    ledger.reads(&log(
        Some("thread"),
        vec![logged_message(3, Some("bob"), "late"), logged_message(4, None, "from another device")],
    ));
    let head = ledger.head.clone();
    let ours = MessageFact {
        content: Content { plain: Some("from another device".to_owned()), html: None },
        ..our_message_fact(4)
    };
    ledger.events(vec![message(3, "late"), Fact::Message(ours)]);
    assert_eq!(ledger.logged_texts(), ["late", "from another device"]);
    assert_eq!(ledger.messages.len(), 3);
    assert_eq!(ledger.head.seq, head.seq + 1, "only the invitation's text was settled by the event");
}

#[test]
fn what_is_under_way_is_left_to_the_next_reading() {
    let mut ledger = Ledger::new();
    ledger.events(vec![conversation("Connected"), message_link(1)]);
    ledger.sending(1, "sip:bob@contoso.com", "on its way");
    let log = log(
        Some("thread"),
        vec![logged_message(1, Some("bob"), "only linked"), logged_message(2, None, "on its way")],
    );
    ledger.answer(log.clone());
    assert_eq!(ledger.logged_texts(), [""; 0]);
    ledger.answer(Fact::Unfetchable(Unfetchable {
        fetch: fetch(FetchedResource::Message, &format!("{TALK}/messages/1")),
        why: "404".to_owned(),
    }));
    ledger.outbox.get_mut(&OutboxId(1)).unwrap().state = OutboxState::Uncertain;
    ledger.reads(&log);
    assert_eq!(ledger.logged_texts(), ["only linked", "on its way"]);
}

#[test]
fn parts_of_a_log_that_are_not_understood_are_kept_once() {
    let mut ledger = Ledger::new();
    let log = Fact::Logged(LoggedConversation {
        href: "/logs/1".to_owned(),
        unreadable: vec![Quarantined::new("odd", "data:x"), Quarantined::new("odd", "data:x")],
        ..LoggedConversation::default()
    });
    ledger.reads(&log);
    assert_eq!(ledger.quarantine.len(), 2);
    assert!(ledger.conversations.is_empty(), "a log without messages makes nothing");
}

#[test]
fn a_logged_message_with_a_time_that_can_not_be_right_is_kept_apart() {
    let mut ledger = Ledger::new();
    let misdated = LoggedMessage {
        sent_at: "0001-01-01T00:00:00Z".parse().unwrap(),
        ..logged_message(1, Some("bob"), "when?")
    };
    ledger.reads(&log(Some("thread"), vec![misdated, logged_message(2, Some("bob"), "now")]));
    assert_eq!(ledger.logged_texts(), ["now"]);
    let [kept] = ledger.quarantine.as_slice() else { panic!("{:?}", ledger.quarantine) };
    assert!(kept.reason.contains("0001-01-01") && kept.payload.contains("when?"), "{kept:?}");
}

#[test]
fn a_commit_for_a_foreign_session_is_refused() {
    let ledger = Ledger::new();
    let commit = ArchiveCommit {
        account: AccountId(2),
        session: SESSION,
        epoch: 0,
        cursor: None,
        received_at: start(),
        facts: Vec::new(),
    };
    assert!(ledger.workspace().check(&commit).is_err());
}

#[test]
fn patience_is_a_minute() {
    assert_eq!(super::PATIENCE, SignedDuration::from_secs(60));
}
