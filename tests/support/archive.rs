//! A database with a server's store on it, as the store's own tests need it: accounts that are online, facts of one talk,
//! and rows of the queue.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::time::Duration;

use jiff::Timestamp;
use ucwa_relay::{
    archive::{
        fact::{
            ArchiveCommit, Content, ConversationFact, Direction, Fact, FailureReason, InvitationFact,
            InvitationKind, MessageFact, OperationStatus, ParticipantChange, ParticipantDetails,
            ParticipantFact, Person, Phase, SendFact, SendOutcome,
        },
        retry::RetryPolicy,
        workspace::RuleSettings,
    },
    identifiers::{AccountId, OutboxId, SipUri},
    store::{
        AccountState, Allowances, Auth, ClaimSettings, ClaimedSend, CommitOutcome, NewAccount, NewOutboxRow,
        OutboxState, Role, SecretSource, Session, SharedStore, StoreSettings, connect,
    },
};

use super::{
    sql::{Kind, Place, Sql},
    take_leases,
};

/// The server's name.
pub(crate) const NODE: &str = "node-1";
/// The conversation that facts speak of.
pub(crate) const TALK: &str = "/conversations/7";

/// A database of its own, with a server on it.
pub(crate) struct Database {
    pub(crate) place: Place,
    pub(crate) store: SharedStore,
}

pub(crate) fn settings(url: String) -> StoreSettings {
    StoreSettings {
        url,
        max_connections: 2,
        commit_interval: Duration::from_millis(2),
        full_text: true,
        node: NODE.to_owned(),
        lease_ttl: Duration::from_secs(3600),
        rules: RuleSettings {
            plain_from_html: |html| {
                assert!(!html.contains("<bomb>"), "an HTML parser's bug");
                html.replace("<b>", "").replace("</b>", "")
            },
            retry: RetryPolicy { base: Duration::from_secs(30), cap: Duration::from_secs(600) },
            max_attempts: 5,
            retry_uncertain: false,
            typing: true,
        },
    }
}

impl Database {
    pub(crate) async fn new(kind: Kind) -> Self {
        let place = Place::new(kind).await;
        let store = connect(&settings(place.url()), Role::Server).await.unwrap();
        Self { place, store }
    }

    pub(crate) fn settings(&self) -> StoreSettings {
        settings(self.place.url())
    }

    /// As after a restart of the program.
    pub(crate) async fn reopen(&mut self) {
        self.store.close().await;
        self.store = connect(&self.settings(), Role::Server).await.unwrap();
        take_leases(&self.store).await;
    }

    /// The same commit by the server that runs now.
    pub(crate) fn anew(&self, commit: ArchiveCommit) -> ArchiveCommit {
        ArchiveCommit { epoch: self.store.leases().epoch(commit.account).unwrap(), ..commit }
    }

    /// A connection as another program has it.
    pub(crate) async fn outside(&self) -> Sql {
        self.place.connect().await
    }

    /// An account that is online here, with a session.
    pub(crate) async fn online(&self, name: &str) -> Online {
        let account = self.store.add_account(&new_account(name)).await.unwrap();
        take_leases(&self.store).await;
        let session =
            self.store.begin_session(account, "/applications/1", "/events?ack=1", "").await.unwrap();
        self.store.record_state(account, AccountState::Online, None, NODE).await.unwrap();
        Online { store: self.store.clone(), account, session }
    }

    pub(crate) async fn claim(&self) -> Vec<ClaimedSend> {
        self.claim_at(Timestamp::now()).await
    }

    pub(crate) async fn claim_at(&self, now: Timestamp) -> Vec<ClaimedSend> {
        self.store.claim_due(now, &claim_settings()).await.unwrap()
    }

    pub(crate) async fn state(&self, id: i64) -> (OutboxState, Option<String>) {
        let (row, _) = self.store.outbox_row(OutboxId(id)).await.unwrap().unwrap();
        (row.state, row.last_code)
    }
}

pub(crate) fn claim_settings() -> ClaimSettings {
    ClaimSettings {
        node: NODE.to_owned(),
        max_attempts: 3,
        max_body_bytes: 1000,
        limit: 100,
        allowances: Allowances::UNLIMITED,
    }
}

pub(crate) fn uri(name: &str) -> SipUri {
    format!("{name}@contoso.com").parse().unwrap()
}

pub(crate) fn new_account(name: &str) -> NewAccount {
    NewAccount {
        sip_uri: uri(name),
        username: format!("CONTOSO\\{name}"),
        auth: Auth::Password,
        secret: SecretSource::Reference("env:PASSWORD".to_owned()),
        invitations: None,
    }
}

/// As SQL writes it.
pub(crate) fn time_from_now(span: jiff::Span) -> String {
    format!("'{}'", (Timestamp::now() + span).strftime("%Y-%m-%d %H:%M:%SZ"))
}

pub(crate) struct Online {
    pub(crate) store: SharedStore,
    pub(crate) account: AccountId,
    pub(crate) session: Session,
}

impl Online {
    pub(crate) fn commit_of(&self, cursor: Option<&str>, facts: Vec<Fact>) -> ArchiveCommit {
        ArchiveCommit {
            account: self.account,
            session: self.session.id,
            epoch: self.store.leases().epoch(self.account).unwrap(),
            cursor: cursor.map(ToOwned::to_owned),
            received_at: Timestamp::now(),
            facts,
        }
    }

    pub(crate) async fn events(&self, cursor: &str, facts: Vec<Fact>) -> CommitOutcome {
        self.store.commit(self.commit_of(Some(cursor), facts)).await.unwrap()
    }

    pub(crate) async fn answer(&self, fact: Fact) -> CommitOutcome {
        self.store.commit(self.commit_of(None, vec![fact])).await.unwrap()
    }

    pub(crate) async fn send_fact(&self, send: &ClaimedSend, outcome: SendOutcome) {
        let fact = SendFact { outbox: send.outbox, operation_id: send.operation_id.clone(), outcome };
        self.answer(Fact::Send(fact)).await;
    }
}

pub(crate) fn bob() -> Person {
    Person {
        contact_uri: None,
        href: Some(format!("{TALK}/participants/bob")),
        uri: Some("sip:bob@contoso.com".to_owned()),
        name: Some("Bob".to_owned()),
    }
}

pub(crate) fn bob_joined() -> Fact {
    Fact::Participant(ParticipantFact {
        role: None,
        conversation_href: TALK.to_owned(),
        href: format!("{TALK}/participants/bob"),
        change: ParticipantChange::Joined,
        title: Some("Bob".to_owned()),
        details: Some(ParticipantDetails {
            uri: Some("sip:bob@contoso.com".to_owned()),
            ..ParticipantDetails::default()
        }),
        is_local: false,
    })
}

pub(crate) fn conversation() -> Fact {
    Fact::Conversation(ConversationFact {
        href: TALK.to_owned(),
        state: Some("Connected".to_owned()),
        thread_id: Some("thread".to_owned()),
        subject: Some("Lunch".to_owned()),
        ..ConversationFact::default()
    })
}

pub(crate) fn message_fact(number: u32, text: &str) -> MessageFact {
    MessageFact {
        unreadable_time: None,
        conversation_href: TALK.to_owned(),
        href: format!("{TALK}/messages/{number}"),
        phase: Phase::Completed,
        direction: Some(Direction::Incoming),
        sender: Some(bob()),
        content: Content { plain: Some(text.to_owned()), html: None },
        sent_at: Some(Timestamp::now()),
        status: Some(OperationStatus::Success),
        reason: None,
        operation_id: None,
        failed_recipients: Vec::new(),
        link_only: false,
    }
}

pub(crate) fn message(number: u32, text: &str) -> Fact {
    Fact::Message(message_fact(number, text))
}

pub(crate) fn link(number: u32) -> Fact {
    Fact::Message(MessageFact {
        direction: None,
        sender: None,
        content: Content::default(),
        status: None,
        phase: Phase::Started,
        link_only: true,
        ..message_fact(number, "")
    })
}

pub(crate) fn invitation() -> Fact {
    Fact::Invitation(InvitationFact {
        derived_conversation_href: None,
        href: "/invitations/1".to_owned(),
        kind: InvitationKind::Messaging,
        phase: Phase::Started,
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
    })
}

pub(crate) fn accepted(number: u32) -> SendOutcome {
    SendOutcome::MessageAccepted {
        conversation_href: TALK.to_owned(),
        message_href: Some(format!("{TALK}/messages/{number}")),
        as_plain: false,
        not_reached: Vec::new(),
    }
}

pub(crate) fn our_message(number: u32) -> Fact {
    Fact::Message(MessageFact {
        direction: Some(Direction::Outgoing),
        sender: None,
        content: Content::default(),
        ..message_fact(number, "")
    })
}

pub(crate) fn retry_at(at: Timestamp) -> SendOutcome {
    SendOutcome::RetryAt {
        at,
        reason: FailureReason { code: Some("ServiceFailure".into()), ..FailureReason::default() },
        http_status: Some(503),
        error: "the server is busy".to_owned(),
    }
}

/// A row as a program inserts it.
pub(crate) fn row(recipients: &str) -> NewOutboxRow {
    NewOutboxRow {
        account: "Alice@Contoso.com".to_owned(),
        recipients: recipients.to_owned(),
        body: "Deploy finished".to_owned(),
        ..NewOutboxRow::default()
    }
}
