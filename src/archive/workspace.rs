//! The rows that one batch of commits is about, in memory, and what the batch changed.
//!
//! A dialect loads what [`super::Keys`] names into a workspace, [`Workspace::apply`] puts each commit's facts on it in
//! order, and [`Workspace::changes`] says what to write. So the rules stand once, need no database to be tested, and a
//! batch costs one round trip per table, however many accounts it is from.
//!
//! Applying never fails half way: [`Workspace::check`] refuses a commit that cannot be applied before anything changed.

use std::{collections::HashMap, hash::Hash};

use jiff::Timestamp;

use crate::{
    archive::{
        fact::{ArchiveCommit, Fact, Fetch, FetchedResource},
        retry::RetryPolicy,
        row::{
            AttemptRow, Awaiting, ChainHead, ConversationRow, InvitationRow, MessageRow, OutboxSend,
            ParticipantRow, QuarantineRow, SessionRow, TypingRow,
        },
        text::to_milliseconds,
    },
    identifiers::{AccountId, ConversationId, MessageId, OperationId, OutboxId, SessionId, SipUri},
    store::{CommitOutcome, SettledSend},
};

/// Makes plain text from HTML; given by whoever opens the store, so that the rules need no HTML parser.
pub type PlainFromHtml = fn(&str) -> String;

/// What the rules depend on; given by whoever opens the store.
#[derive(Debug, Clone, Copy)]
pub struct RuleSettings {
    /// Derives the plain text of messages of which only HTML is known.
    pub plain_from_html: PlainFromHtml,
    /// When an outbox row whose invitation failed for now is tried again (`outbox.retry_base`, `outbox.retry_max`).
    pub retry: RetryPolicy,
    /// `outbox.max_attempts`, for rows without a limit of their own.
    pub max_attempts: i64,
    /// `outbox.uncertain` is `retry`.
    pub retry_uncertain: bool,
    /// `archive.typing`: keep who typed when.
    pub typing: bool,
}

/// The highest id that each table has given out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Of `conversations`.
    pub conversations: i64,
    /// Of `participants`.
    pub participants: i64,
    /// Of `invitations`.
    pub invitations: i64,
    /// Of `messages`.
    pub messages: i64,
}

/// Why a commit cannot be applied at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("session {session} of account {account} is not in the database")]
pub struct UnknownSession {
    account: AccountId,
    session: SessionId,
}

/// Rows to write, each list in ascending order of id.
#[derive(Debug, Default)]
pub struct Changes<'a> {
    /// Changed rows of `sessions`.
    pub sessions: Vec<&'a SessionRow>,
    /// Changed rows of `chain_heads`.
    pub chain_heads: Vec<&'a ChainHead>,
    /// New and changed rows.
    pub conversations: Vec<&'a ConversationRow>,
    /// New and changed rows.
    pub participants: Vec<&'a ParticipantRow>,
    /// New and changed rows.
    pub messages: Vec<&'a MessageRow>,
    /// Those of them whose text is new or another one.
    pub texts: Vec<&'a MessageRow>,
    /// Rows that turned out to be another one said twice; never chained ones.
    pub deleted_messages: &'a [MessageId],
    /// New and changed rows.
    pub invitations: Vec<&'a InvitationRow>,
    /// Changed rows.
    pub outbox: Vec<&'a OutboxSend>,
    /// Changed rows.
    pub attempts: Vec<&'a AttemptRow>,
    /// Rows to add.
    pub typing: &'a [TypingRow],
    /// Rows to add unless they are there.
    pub quarantine: &'a [QuarantineRow],
    /// Accounts whose event channel brought something, with when.
    pub last_events: Vec<(AccountId, Timestamp)>,
    /// Messages whose text is here since this batch, for those who listen for them; they are in `messages`, too.
    pub archived: Vec<(AccountId, MessageId)>,
}

impl Changes<'_> {
    /// Rows that are written or deleted.
    pub fn rows(&self) -> usize {
        self.sessions.len()
            + self.chain_heads.len()
            + self.conversations.len()
            + self.participants.len()
            + self.messages.len()
            + self.deleted_messages.len()
            + self.invitations.len()
            + self.outbox.len()
            + self.attempts.len()
            + self.typing.len()
            + self.quarantine.len()
            + self.last_events.len()
    }

    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        self.rows() == 0
    }
}

// ------------------------------------------------------------------------------------------ tables in memory

/// What a [`Table`] needs to know of a row.
pub(super) trait Row: Clone + PartialEq {
    /// Type of the primary key.
    type Id: Copy + Ord + Hash;
    /// Primary key.
    fn id(&self) -> Self::Id;
    /// Identity within the application, if it has one.
    fn resource(&self) -> Option<(SessionId, &str)> {
        None
    }
    /// The conversation it belongs to.
    fn conversation(&self) -> Option<ConversationId> {
        None
    }
    /// The operation it answers to.
    fn operation(&self) -> Option<&OperationId> {
        None
    }
}

#[derive(Debug)]
struct Tracked<R> {
    original: Option<R>,
    current: R,
    deleted: bool,
}

/// Rows of one table with the look-ups that the rules need. Rows are named by their place, which never changes.
#[derive(Debug)]
pub(super) struct Table<R: Row> {
    rows: Vec<Tracked<R>>,
    by_id: HashMap<R::Id, usize>,
    by_resource: HashMap<SessionId, HashMap<String, usize>>,
    by_conversation: HashMap<ConversationId, Vec<usize>>,
    by_operation: HashMap<OperationId, usize>,
}

impl<R: Row> Default for Table<R> {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            by_id: HashMap::new(),
            by_resource: HashMap::new(),
            by_conversation: HashMap::new(),
            by_operation: HashMap::new(),
        }
    }
}

impl<R: Row> Table<R> {
    /// A row as the database has it. A row that is here already is left alone.
    pub(super) fn load(&mut self, row: R) {
        if !self.by_id.contains_key(&row.id()) {
            self.add(Tracked { original: Some(row.clone()), current: row, deleted: false });
        }
    }

    /// A new row.
    pub(super) fn insert(&mut self, row: R) -> usize {
        self.add(Tracked { original: None, current: row, deleted: false })
    }

    fn add(&mut self, tracked: Tracked<R>) -> usize {
        let place = self.rows.len();
        self.by_id.insert(tracked.current.id(), place);
        if let Some(conversation) = tracked.current.conversation() {
            self.by_conversation.entry(conversation).or_default().push(place);
        }
        self.rows.push(tracked);
        self.index(place);
        place
    }

    /// Makes a row that got an href or an operation id findable by it. Of several stays of one href the latest is found.
    pub(super) fn index(&mut self, place: usize) {
        let row = &self.rows[place].current;
        if let Some((session, href)) = row.resource() {
            let of_session = self.by_resource.entry(session).or_default();
            let newest = of_session.get(href).is_none_or(|&other| self.rows[other].current.id() < row.id());
            if newest {
                of_session.insert(href.to_owned(), place);
            }
        }
        if let Some(operation) = row.operation() {
            self.by_operation.insert(operation.clone(), place);
        }
    }

    /// Notes that a row now belongs to another conversation.
    pub(super) fn moved(&mut self, place: usize, from: ConversationId) {
        if let Some(places) = self.by_conversation.get_mut(&from) {
            places.retain(|&other| other != place);
        }
        if let Some(conversation) = self.rows[place].current.conversation() {
            self.by_conversation.entry(conversation).or_default().push(place);
        }
    }

    /// Takes a row out.
    pub(super) fn remove(&mut self, place: usize) {
        let tracked = &mut self.rows[place];
        tracked.deleted = true;
        self.by_id.remove(&tracked.current.id());
        if let Some((session, href)) = tracked.current.resource()
            && let Some(of_session) = self.by_resource.get_mut(&session)
            && of_session.get(href) == Some(&place)
        {
            of_session.remove(href);
        }
        if let Some(operation) = tracked.current.operation()
            && self.by_operation.get(operation) == Some(&place)
        {
            self.by_operation.remove(operation);
        }
        if let Some(places) = tracked
            .current
            .conversation()
            .and_then(|conversation| self.by_conversation.get_mut(&conversation))
        {
            places.retain(|&other| other != place);
        }
    }

    /// Takes back [`Table::remove`].
    pub(super) fn restore(&mut self, place: usize) {
        let tracked = &mut self.rows[place];
        tracked.deleted = false;
        self.by_id.insert(tracked.current.id(), place);
        if let Some(conversation) = tracked.current.conversation() {
            self.by_conversation.entry(conversation).or_default().push(place);
        }
        self.index(place);
    }

    pub(super) fn get(&self, place: usize) -> &R {
        &self.rows[place].current
    }

    pub(super) fn get_mut(&mut self, place: usize) -> &mut R {
        &mut self.rows[place].current
    }

    pub(super) fn by_id(&self, id: R::Id) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    pub(super) fn by_resource(&self, session: SessionId, href: &str) -> Option<usize> {
        self.by_resource.get(&session)?.get(href).copied()
    }

    pub(super) fn by_operation(&self, operation: &OperationId) -> Option<usize> {
        self.by_operation.get(operation).copied()
    }

    /// Places of a conversation's rows, as far as they are loaded, in the order of their ids.
    pub(super) fn of_conversation(&self, conversation: ConversationId) -> Vec<usize> {
        let mut places = self.by_conversation.get(&conversation).cloned().unwrap_or_default();
        places.sort_by_key(|&place| self.rows[place].current.id());
        places
    }

    /// Places of all rows in the order of their ids.
    pub(super) fn places(&self) -> Vec<usize> {
        let mut places: Vec<usize> =
            (0..self.rows.len()).filter(|&place| !self.rows[place].deleted).collect();
        places.sort_by_key(|&place| self.rows[place].current.id());
        places
    }

    /// All rows, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &R> {
        self.rows.iter().filter(|tracked| !tracked.deleted).map(|tracked| &tracked.current)
    }

    fn changed(&self) -> Vec<&R> {
        let mut changed: Vec<&R> = self
            .rows
            .iter()
            .filter(|tracked| !tracked.deleted && tracked.original.as_ref() != Some(&tracked.current))
            .map(|tracked| &tracked.current)
            .collect();
        changed.sort_by_key(|row| row.id());
        changed
    }

    /// Rows for which `is` holds now and did not hold in the database.
    fn became(&self, is: impl Fn(&R) -> bool) -> Vec<&R> {
        let mut rows: Vec<&R> = self
            .rows
            .iter()
            .filter(|tracked| !tracked.deleted && is(&tracked.current))
            .filter(|tracked| tracked.original.as_ref().is_none_or(|original| !is(original)))
            .map(|tracked| &tracked.current)
            .collect();
        rows.sort_by_key(|row| row.id());
        rows
    }

    /// Rows in which a part is otherwise than in the database, or that the database does not have yet.
    fn differing_in<P: PartialEq + ?Sized>(&self, part: impl Fn(&R) -> &P) -> Vec<&R> {
        let mut rows: Vec<&R> = self
            .rows
            .iter()
            .filter(|tracked| !tracked.deleted)
            .filter(|tracked| {
                tracked.original.as_ref().is_none_or(|original| part(original) != part(&tracked.current))
            })
            .map(|tracked| &tracked.current)
            .collect();
        rows.sort_by_key(|row| row.id());
        rows
    }

    /// Rows that the database does not have yet.
    fn new_rows(&self) -> impl Iterator<Item = &R> {
        self.rows
            .iter()
            .filter(|tracked| !tracked.deleted && tracked.original.is_none())
            .map(|tracked| &tracked.current)
    }

    /// Whether the database has it.
    fn is_stored(&self, place: usize) -> bool {
        self.rows[place].original.is_some()
    }
}

impl Row for SessionRow {
    type Id = SessionId;
    fn id(&self) -> SessionId {
        self.id
    }
}

impl Row for ChainHead {
    type Id = AccountId;
    fn id(&self) -> AccountId {
        self.account
    }
}

impl Row for ConversationRow {
    type Id = ConversationId;
    fn id(&self) -> ConversationId {
        self.id
    }
    fn resource(&self) -> Option<(SessionId, &str)> {
        self.session.zip(self.href.as_deref())
    }
}

impl Row for ParticipantRow {
    type Id = i64;
    fn id(&self) -> i64 {
        self.id
    }
    fn resource(&self) -> Option<(SessionId, &str)> {
        self.session.zip(self.href.as_deref())
    }
    fn conversation(&self) -> Option<ConversationId> {
        Some(self.conversation)
    }
}

impl Row for InvitationRow {
    type Id = i64;
    fn id(&self) -> i64 {
        self.id
    }
    fn resource(&self) -> Option<(SessionId, &str)> {
        self.session.zip(self.href.as_deref())
    }
}

impl Row for MessageRow {
    type Id = MessageId;
    fn id(&self) -> MessageId {
        self.id
    }
    fn resource(&self) -> Option<(SessionId, &str)> {
        self.session.zip(self.href.as_deref())
    }
    fn conversation(&self) -> Option<ConversationId> {
        Some(self.conversation)
    }
    fn operation(&self) -> Option<&OperationId> {
        self.operation_id.as_ref()
    }
}

impl Row for OutboxSend {
    type Id = OutboxId;
    fn id(&self) -> OutboxId {
        self.id
    }
}

impl Row for AttemptRow {
    type Id = i64;
    fn id(&self) -> i64 {
        self.id
    }
    fn operation(&self) -> Option<&OperationId> {
        Some(&self.operation_id)
    }
}

// ------------------------------------------------------------------------------------------------ workspace

/// See the module's description.
#[derive(Debug)]
pub struct Workspace {
    pub(super) plain_from_html: PlainFromHtml,
    pub(super) settings: RuleSettings,
    counters: Counters,
    pub(super) sessions: Table<SessionRow>,
    pub(super) chain_heads: Table<ChainHead>,
    pub(super) conversations: Table<ConversationRow>,
    pub(super) participants: Table<ParticipantRow>,
    pub(super) invitations: Table<InvitationRow>,
    pub(super) messages: Table<MessageRow>,
    deleted_messages: Vec<MessageId>,
    pub(super) outbox: Table<OutboxSend>,
    pub(super) attempts: Table<AttemptRow>,
    pub(super) typing: Vec<TypingRow>,
    pub(super) quarantine: Vec<QuarantineRow>,
    last_events: HashMap<AccountId, Timestamp>,
}

/// What is known about the commit that is being applied, and what it leads to.
#[derive(Debug)]
pub(super) struct Applying {
    pub(super) account: AccountId,
    pub(super) account_uri: SipUri,
    pub(super) session: SessionId,
    /// When the batch was received.
    pub(super) at: Timestamp,
    /// When it is stored.
    pub(super) now: Timestamp,
    /// The session's cursor stands where this commit would move it: the batch was stored before.
    pub(super) redelivered: bool,
    /// The session is over; what is new in it is over too.
    pub(super) session_ended_at: Option<Timestamp>,
    fetches: Vec<Fetch>,
    settled: Vec<SettledSend>,
}

impl Applying {
    /// Asks for a resource to be fetched after the commit.
    pub(super) fn fetch(&mut self, resource: FetchedResource, href: &str, conversation_href: Option<&str>) {
        let fetch = Fetch {
            resource,
            href: href.to_owned(),
            conversation_href: conversation_href.map(ToOwned::to_owned),
        };
        if !self.fetches.contains(&fetch) {
            self.fetches.push(fetch);
        }
    }

    /// Takes back a wish that a later fact of the same commit fulfilled.
    pub(super) fn fetched(&mut self, resource: FetchedResource, href: &str) {
        self.fetches.retain(|fetch| fetch.resource != resource || fetch.href != href);
    }

    /// Reports an outbox row whose state events changed; only its last state counts.
    pub(super) fn settled(&mut self, send: SettledSend) {
        self.settled.retain(|other| other.outbox != send.outbox);
        self.settled.push(send);
    }
}

/// How urgent a fetch is: the server forgets messages first.
pub fn urgency(resource: FetchedResource) -> u8 {
    match resource {
        FetchedResource::Message => 0,
        FetchedResource::Invitation(_) => 1,
        FetchedResource::Conversation => 2,
        FetchedResource::Participant => 3,
    }
}

impl Workspace {
    /// An empty workspace that gives out ids after `counters`.
    pub fn new(settings: RuleSettings, counters: Counters) -> Self {
        Self {
            plain_from_html: settings.plain_from_html,
            settings,
            counters,
            sessions: Table::default(),
            chain_heads: Table::default(),
            conversations: Table::default(),
            participants: Table::default(),
            invitations: Table::default(),
            messages: Table::default(),
            deleted_messages: Vec::new(),
            outbox: Table::default(),
            attempts: Table::default(),
            typing: Vec::new(),
            quarantine: Vec::new(),
            last_events: HashMap::new(),
        }
    }

    /// Loads a row as the database has it.
    pub fn load_session(&mut self, row: SessionRow) {
        self.sessions.load(row);
    }

    /// Loads a row as the database has it; needed for every account whose messages are loaded or made.
    pub fn load_chain_head(&mut self, row: ChainHead) {
        self.chain_heads.load(row);
    }

    /// Loads a row as the database has it.
    pub fn load_conversation(&mut self, row: ConversationRow) {
        self.conversations.load(row);
    }

    /// Loads a row as the database has it.
    pub fn load_participant(&mut self, row: ParticipantRow) {
        self.participants.load(row);
    }

    /// Loads a row as the database has it.
    pub fn load_invitation(&mut self, row: InvitationRow) {
        self.invitations.load(row);
    }

    /// Loads a row as the database has it.
    pub fn load_message(&mut self, row: MessageRow) {
        self.messages.load(row);
    }

    /// Loads a row as the database has it.
    pub fn load_outbox(&mut self, row: OutboxSend) {
        self.outbox.load(row);
    }

    /// Loads a row as the database has it.
    pub fn load_attempt(&mut self, row: AttemptRow) {
        self.attempts.load(row);
    }

    /// Conversations that are loaded or that loaded rows belong to.
    pub fn conversation_keys(&self) -> Vec<(AccountId, ConversationId)> {
        let mut keys: Vec<_> = self.conversations.iter().map(|row| (row.account, row.id)).collect();
        keys.extend(self.participants.iter().map(|row| (row.account, row.conversation)));
        keys.extend(self.invitations.iter().filter_map(|row| Some((row.account, row.conversation?))));
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Conversations that loaded invitations and participants belong to and that are not loaded.
    pub fn missing_conversations(&self) -> Vec<ConversationId> {
        let mut ids: Vec<_> = self.conversation_keys().into_iter().map(|(_, id)| id).collect();
        ids.retain(|&id| self.conversations.by_id(id).is_none());
        ids
    }

    /// Operation ids under which loaded outbox rows, attempts and invitations may have said something.
    pub fn operations(&self) -> Vec<(AccountId, OperationId)> {
        let mut operations: Vec<_> =
            self.outbox.iter().filter_map(|row| Some((row.account, row.operation_id.clone()?))).collect();
        operations.extend(self.attempts.iter().filter_map(|attempt| {
            let send = self.outbox.by_id(attempt.outbox)?;
            Some((self.outbox.get(send).account, attempt.operation_id.clone()))
        }));
        operations
            .extend(self.invitations.iter().filter_map(|row| Some((row.account, row.operation_id.clone()?))));
        operations.sort_unstable();
        operations.dedup();
        operations
    }

    /// Operation ids of loaded messages and invitations whose attempt is not loaded.
    pub fn missing_operations(&self) -> Vec<OperationId> {
        let mut operations: Vec<_> = self
            .messages
            .iter()
            .filter(|row| row.outbox.is_some())
            .filter_map(|row| row.operation_id.clone())
            .chain(self.invitations.iter().filter_map(|row| row.operation_id.clone()))
            .filter(|operation| self.attempts.by_operation(operation).is_none())
            .collect();
        operations.sort_unstable();
        operations.dedup();
        operations
    }

    /// Ids of messages that loaded invitations and outbox rows speak of.
    pub fn referenced_messages(&self) -> Vec<MessageId> {
        let mut ids: Vec<MessageId> = self.invitations.iter().filter_map(|row| row.message).collect();
        ids.extend(self.outbox.iter().filter_map(|row| row.message));
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Participants by whom loaded messages that are not settled were sent and who are not loaded yet.
    pub fn missing_senders(&self) -> Vec<(AccountId, SessionId, String)> {
        self.messages
            .iter()
            .filter(|message| {
                let unsettled = message.sender_uri.is_none() || message.awaiting == Some(Awaiting::Sender);
                !message.is_chained() && unsettled
            })
            .filter_map(|message| Some((message.account, message.session?, message.sender_href.clone()?)))
            .filter(|(_, session, href)| self.participants.by_resource(*session, href).is_none())
            .collect()
    }

    /// Refuses a commit that no row can carry.
    ///
    /// # Errors
    /// The session is unknown or another account's.
    pub fn check(&self, commit: &ArchiveCommit) -> Result<(), UnknownSession> {
        match self.sessions.by_id(commit.session) {
            Some(place) if self.sessions.get(place).account == commit.account => Ok(()),
            _ => Err(UnknownSession { account: commit.account, session: commit.session }),
        }
    }

    /// Puts the facts of a commit and its cursor on the rows. Call [`Workspace::check`] first: a commit that it refuses
    /// changes nothing here.
    pub fn apply(&mut self, commit: &ArchiveCommit, now: Timestamp) -> CommitOutcome {
        let Some(session_place) = self.sessions.by_id(commit.session) else {
            return CommitOutcome::default();
        };
        let session = self.sessions.get(session_place);
        let at = to_milliseconds(commit.received_at);
        let mut applying = Applying {
            account: commit.account,
            account_uri: session.account_uri.clone(),
            session: commit.session,
            at,
            now: to_milliseconds(now),
            redelivered: commit.cursor.is_some() && commit.cursor == session.event_cursor,
            session_ended_at: session.ended_at,
            fetches: Vec::new(),
            settled: Vec::new(),
        };
        let mut quarantined: HashMap<&str, i64> = HashMap::new();
        for fact in &commit.facts {
            match fact {
                Fact::Conversation(fact) => self.apply_conversation(&mut applying, fact),
                Fact::ConversationEnded(fact) => self.apply_conversation_ended(&mut applying, fact),
                Fact::Invitation(fact) => self.apply_invitation(&mut applying, fact),
                Fact::InvitationAnswered(fact) => self.apply_invitation_answered(&mut applying, fact),
                Fact::Participant(fact) => self.apply_participant(&mut applying, fact),
                Fact::Typing(fact) => self.apply_typing(&mut applying, fact),
                Fact::Message(fact) => self.apply_message(&mut applying, fact),
                Fact::Unfetchable(fact) => self.apply_unfetchable(&mut applying, fact),
                Fact::Send(fact) => self.apply_send(&mut applying, fact),
                Fact::Logged(fact) => self.apply_logged(&mut applying, fact),
                Fact::Quarantined(fact) => {
                    let occurrence = quarantined.entry(&fact.payload).or_insert(0);
                    self.apply_quarantined(&applying, fact, commit.cursor.as_deref(), *occurrence);
                    *occurrence += 1;
                }
            }
        }
        self.keep_purged();
        if let Some(cursor) = &commit.cursor {
            let session = self.sessions.get_mut(session_place);
            session.event_cursor = Some(cursor.clone());
            session.last_ack_at = session.last_ack_at.max(Some(at));
            if !commit.facts.is_empty() && !applying.redelivered {
                self.last_events.insert(commit.account, at);
            }
        }
        applying.fetches.sort_by_key(|fetch| urgency(fetch.resource));
        CommitOutcome { fetches: applying.fetches, settled: applying.settled }
    }

    /// What has to be written.
    pub fn changes(&self) -> Changes<'_> {
        let mut last_events: Vec<_> = self.last_events.iter().map(|(&account, &at)| (account, at)).collect();
        last_events.sort_unstable();
        let archived = self.messages.became(|message| message.awaiting != Some(Awaiting::Fetch));
        Changes {
            archived: archived.into_iter().map(|row| (row.account, row.id)).collect(),
            sessions: self.sessions.changed(),
            chain_heads: self.chain_heads.changed(),
            conversations: self.conversations.changed(),
            participants: self.participants.changed(),
            messages: self.messages.changed(),
            texts: self.messages.differing_in(|message| message.body.as_str()),
            deleted_messages: &self.deleted_messages,
            invitations: self.invitations.changed(),
            outbox: self.outbox.changed(),
            attempts: self.attempts.changed(),
            typing: &self.typing,
            quarantine: &self.quarantine,
            last_events,
        }
    }

    /// Messages that [`Workspace::changes`] brings into the archive.
    pub fn new_messages(&self) -> impl Iterator<Item = &MessageRow> {
        self.messages.new_rows()
    }

    pub(super) fn next_conversation_id(&mut self) -> ConversationId {
        self.counters.conversations += 1;
        ConversationId(self.counters.conversations)
    }

    pub(super) fn next_participant_id(&mut self) -> i64 {
        self.counters.participants += 1;
        self.counters.participants
    }

    pub(super) fn next_invitation_id(&mut self) -> i64 {
        self.counters.invitations += 1;
        self.counters.invitations
    }

    pub(super) fn next_message_id(&mut self) -> MessageId {
        self.counters.messages += 1;
        MessageId(self.counters.messages)
    }

    /// Takes out a message that turned out to be another row's. Only for rows that are not chained.
    pub(super) fn delete_message(&mut self, place: usize) {
        let id = self.messages.get(place).id;
        debug_assert!(!self.messages.get(place).is_chained(), "a chained message is never removed");
        for invitation in self.invitations.places() {
            if self.invitations.get(invitation).message == Some(id) {
                self.invitations.get_mut(invitation).message = None;
            }
        }
        if self.messages.is_stored(place) {
            self.deleted_messages.push(id);
        }
        self.messages.remove(place);
    }

    /// Takes back [`Workspace::delete_message`].
    pub(super) fn undelete_message(&mut self, place: usize) {
        let id = self.messages.get(place).id;
        self.deleted_messages.retain(|&other| other != id);
        self.messages.restore(place);
    }
}
