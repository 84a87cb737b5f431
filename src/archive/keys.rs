//! Which rows a batch of facts mentions, so that a dialect loads them with one query per table, however many accounts
//! the batch is from.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

use crate::{
    archive::fact::{
        ArchiveCommit, Direction, Fact, FetchedResource, InvitationFact, MessageFact, ParticipantFact,
        Person, SaidIn, SendOutcome,
    },
    archive::rules::{LATE_INVITATION, PATIENCE},
    archive::text::is_plausible,
    identifiers::{AccountId, OperationId, OutboxId, SessionId},
};

/// How far the server's clock and ours may be apart.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_mins(15);

/// A resource's identity: hrefs mean something only within one application.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceKey {
    /// Owner of the session.
    pub account: AccountId,
    /// The application.
    pub session: SessionId,
    /// As the server gave it.
    pub href: String,
}

/// What a conversation log, or a send that nothing was heard of, is compared with: the account's messages of this thread (or of conversations whose thread
/// is not known) that were sent in this time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoggedKey {
    /// Whose log.
    pub account: AccountId,
    /// `None`: the log does not say; then all conversations matter.
    pub thread_id: Option<String>,
    /// Earliest `sent_at` that can be the same message.
    pub from: Timestamp,
    /// Latest one.
    pub to: Timestamp,
}

/// What the facts mention. Rows that hang on these (open texts of a conversation, attempts of an outbox row) are
/// loaded along with them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keys {
    /// Sessions, each with its account's chain head.
    pub sessions: BTreeSet<(AccountId, SessionId)>,
    /// Conversations, each with its messages that are not settled or not matched.
    pub conversations: BTreeSet<ResourceKey>,
    /// Conversations of which every open stay matters: they end, or a message of ours is to be matched.
    pub rosters: BTreeSet<ResourceKey>,
    /// Invitations, each with its message.
    pub invitations: BTreeSet<ResourceKey>,
    /// Participants: all stays.
    pub participants: BTreeSet<ResourceKey>,
    /// Messages by href.
    pub messages: BTreeSet<ResourceKey>,
    /// Operation ids: messages, invitations, and outbox rows through their attempts.
    pub operations: BTreeSet<(AccountId, OperationId)>,
    /// Outbox rows, each with its message.
    pub outbox: BTreeSet<OutboxId>,
    /// Accounts whose rows in state `sending` matter.
    pub sending: BTreeSet<AccountId>,
    /// Accounts whose rows matter of which nobody could tell whether the server took them.
    pub in_doubt: BTreeSet<AccountId>,
    /// Threads that conversation logs speak of: all conversations of each with their participants, and its messages; and
    /// times in which an event may have spoken of a send.
    pub logged: BTreeSet<LoggedKey>,
}

impl Keys {
    /// Everything that these commits mention.
    pub fn of<'a>(commits: impl IntoIterator<Item = &'a ArchiveCommit>) -> Self {
        let mut keys = Self::default();
        for commit in commits {
            keys.sessions.insert((commit.account, commit.session));
            let mut mentioned = Mentioned { keys: &mut keys, commit };
            for fact in &commit.facts {
                mentioned.fact(fact);
            }
        }
        keys
    }
}

struct Mentioned<'a> {
    keys: &'a mut Keys,
    commit: &'a ArchiveCommit,
}

impl Mentioned<'_> {
    fn key(&self, href: &str) -> ResourceKey {
        ResourceKey { account: self.commit.account, session: self.commit.session, href: href.to_owned() }
    }

    fn conversation(&mut self, href: &str) {
        let key = self.key(href);
        self.keys.conversations.insert(key);
    }

    fn roster(&mut self, href: &str) {
        let key = self.key(href);
        self.keys.conversations.insert(key.clone());
        self.keys.rosters.insert(key);
    }

    fn participant(&mut self, href: &str) {
        let key = self.key(href);
        self.keys.participants.insert(key);
    }

    fn person(&mut self, person: Option<&Person>) {
        if let Some(href) = person.and_then(|person| person.href.as_deref()) {
            self.participant(href);
        }
    }

    fn invitation(&mut self, href: &str) {
        let key = self.key(href);
        self.keys.invitations.insert(key);
    }

    /// An invitation with the conversation that goes by its address, in which its text is archived if no other is known.
    fn call(&mut self, href: &str) {
        self.invitation(href);
        self.conversation(href);
    }

    fn message(&mut self, href: &str) {
        let key = self.key(href);
        self.keys.messages.insert(key);
    }

    fn operation(&mut self, operation: Option<&OperationId>) {
        if let Some(operation) = operation {
            self.keys.operations.insert((self.commit.account, operation.clone()));
        }
    }

    fn fact(&mut self, fact: &Fact) {
        match fact {
            Fact::Conversation(fact) => self.conversation(&fact.href),
            Fact::ConversationEnded(fact) => self.roster(&fact.href),
            Fact::Invitation(fact) => self.invitation_fact(fact),
            Fact::InvitationAnswered(fact) => self.invitation(&fact.href),
            Fact::Participant(fact) => self.participant_fact(fact),
            Fact::Typing(fact) => {
                self.conversation(&fact.conversation_href);
                self.person(Some(&fact.who));
            }
            Fact::Message(fact) => self.message_fact(fact),
            Fact::Unfetchable(fact) => {
                if let Some(conversation) = &fact.fetch.conversation_href {
                    self.conversation(conversation);
                }
                match fact.fetch.resource {
                    FetchedResource::Message => self.message(&fact.fetch.href),
                    FetchedResource::Invitation(_) => self.call(&fact.fetch.href),
                    FetchedResource::Conversation => self.conversation(&fact.fetch.href),
                    FetchedResource::Participant => self.participant(&fact.fetch.href),
                }
            }
            Fact::Send(fact) => {
                self.keys.outbox.insert(fact.outbox);
                self.operation(Some(&fact.operation_id));
                match &fact.outcome {
                    SendOutcome::MessageAccepted { conversation_href, message_href, .. } => {
                        self.conversation(conversation_href);
                        if let Some(href) = message_href {
                            self.message(href);
                        }
                    }
                    SendOutcome::InvitationAccepted { invitation_href } => {
                        if let Some(href) = invitation_href {
                            self.call(href);
                        }
                    }
                    SendOutcome::Refused { conversation_href, .. } => {
                        if let Some(href) = conversation_href {
                            self.conversation(href);
                        }
                    }
                    SendOutcome::Unheard { since, said_in, .. } => {
                        if let SaidIn::Conversation(href) = said_in {
                            self.conversation(href);
                        }
                        let until = self.commit.received_at;
                        self.keys.logged.insert(LoggedKey {
                            account: self.commit.account,
                            thread_id: None,
                            from: since.checked_sub(CLOCKS_DIFFER).unwrap_or(*since),
                            to: until.checked_add(CLOCKS_DIFFER).unwrap_or(until),
                        });
                    }
                    SendOutcome::NotReached { .. }
                    | SendOutcome::RetryAt { .. }
                    | SendOutcome::Uncertain { .. } => {}
                }
            }
            Fact::Logged(fact) => {
                let received_at = self.commit.received_at;
                let times = || {
                    let times = fact.messages.iter().map(|message| message.sent_at);
                    times.filter(move |&sent_at| is_plausible(sent_at, received_at))
                };
                if let (Some(first), Some(last)) = (times().min(), times().max()) {
                    self.keys.logged.insert(LoggedKey {
                        account: self.commit.account,
                        thread_id: fact.thread_id.clone(),
                        from: first.checked_sub(PATIENCE).unwrap_or(first),
                        to: last.checked_add(LATE_INVITATION).unwrap_or(last),
                    });
                    self.keys.sending.insert(self.commit.account);
                    self.keys.in_doubt.insert(self.commit.account);
                }
            }
            Fact::Quarantined(_) => {}
        }
    }

    fn invitation_fact(&mut self, fact: &InvitationFact) {
        match fact.conversation_href {
            Some(_) => self.invitation(&fact.href),
            None => self.call(&fact.href),
        }
        self.operation(fact.operation_id.as_ref());
        self.person(fact.from.as_ref());
        if let Some(href) = &fact.derived_conversation_href {
            self.conversation(href);
        }
        if let Some(href) = &fact.conversation_href {
            self.conversation(href);
        }
    }

    fn participant_fact(&mut self, fact: &ParticipantFact) {
        self.conversation(&fact.conversation_href);
        self.participant(&fact.href);
    }

    fn message_fact(&mut self, fact: &MessageFact) {
        self.message(&fact.href);
        self.operation(fact.operation_id.as_ref());
        self.person(fact.sender.as_ref());
        for person in &fact.failed_recipients {
            self.person(Some(person));
        }
        if fact.direction == Some(Direction::Outgoing) {
            self.roster(&fact.conversation_href);
            self.keys.sending.insert(self.commit.account);
        } else {
            self.conversation(&fact.conversation_href);
        }
    }
}
