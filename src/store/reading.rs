//! Reading the archive at length: pages of what a query fits, and streams for export and verification.
//!
//! It is written once for all databases: a dialect brings its words ([`Dialect`]) and how a statement is read.
//!
//! Every method gives one page in a fixed order and is called again with the last row's key (never with an offset), so
//! that reading millions of messages takes the memory of a page, and new messages shift nothing.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{
    HistoryFilter, HistoryRow, StoreError,
    columns::Columns,
    rows,
    selection::{Dialect, Sql, Statement},
    trouble::failed,
};
use crate::{
    archive::chain,
    identifiers::{AccountId, ConversationId, MessageId},
    query::Query,
};

/// Which messages of those that fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Page {
    /// Those that were sent last; of those sent at the same time, those archived last.
    Newest,
    /// In the same order, the ones before this place.
    Before(Place),
    /// By id, which is the order in which they were archived: the oldest ones with a larger id.
    After(MessageId),
}

/// Where a message stands among all: by time, then by id. Other messages that come don't shift it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `sent_at` as the database compares it.
    sent_at_key: String,
    id: MessageId,
}

/// An account that has or had an archive: removed ones are there too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedAccount {
    /// Row id.
    pub id: AccountId,
    /// `sip_uri`.
    pub uri: String,
}

/// A row of `chain_heads`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// `seq`: number of the newest chained message.
    pub seq: i64,
    /// `hash`: its `chain_hash`.
    pub hash: String,
}

/// A chained message as its row has it: what is hashed, in the texts that are hashed, and the digests. Texts that are
/// not UTF-8 have U+FFFD in them, so they fit no digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainedMessage {
    /// `id`.
    pub message_id: MessageId,
    /// `chain_seq`.
    pub chain_seq: i64,
    /// `accounts.sip_uri`.
    pub account: String,
    /// `conversation_id`.
    pub conversation_id: ConversationId,
    /// `direction`.
    pub direction: String,
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
    /// `sent_at`, in UTC with milliseconds and `Z`; what is not archived so (by PostgreSQL: what is finer than a
    /// millisecond) is shown as it is, and fits no digest.
    pub sent_at: String,
    /// `operation_id`.
    pub operation_id: Option<String>,
    /// `outbox_id`.
    pub outbox_id: Option<i64>,
    /// `correlation`.
    pub correlation: Option<String>,
    /// `content_hash`.
    pub content_hash: Option<String>,
    /// `chain_hash`.
    pub chain_hash: Option<String>,
    /// `purged_at`, as `sent_at`.
    pub purged_at: Option<String>,
    /// `tombstone`: who removed its text, and that it was so; see [`crate::evidence::tombstone`].
    pub tombstone: Option<String>,
}

impl ChainedMessage {
    /// What `content_hash` has to be.
    pub fn computed_hash(&self) -> String {
        chain::digest(&chain::canonical([
            Some(&self.account),
            Some(&self.conversation_id.to_string()),
            Some(&self.direction),
            self.sender_uri.as_deref(),
            self.sender_name.as_deref(),
            Some(&self.content_type),
            Some(&self.body),
            self.body_html.as_deref(),
            Some(&self.sent_at),
            self.operation_id.as_deref(),
            self.outbox_id.map(|id| id.to_string()).as_deref(),
            self.correlation.as_deref(),
        ]))
    }
}

/// A chained message with what else is known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ArchivedMessage {
    /// The row.
    #[serde(flatten)]
    pub message: ChainedMessage,
    /// SIP URIs joined by `;`.
    pub recipients: Option<String>,
    /// `conversations.thread_id`.
    pub thread_id: Option<String>,
    /// `conversations.subject`.
    pub subject: Option<String>,
    /// `pending`, `delivered`, `failed`.
    pub status: String,
    /// UCWA's word.
    pub code: Option<String>,
    /// UCWA's word.
    pub subcode: Option<String>,
    /// A sentence.
    pub reason: Option<String>,
    /// SIP URIs joined by `;`.
    pub failed_recipients: Option<String>,
    /// `invitation`, `event`, `conversation_log`.
    pub source: String,
    /// When it was archived, by our clock.
    pub archived_at: String,
    /// `sent_at` as the database compares it, for [`ExportOrder::Conversation`].
    #[serde(skip)]
    pub sent_at_key: String,
}

/// Messages of one account by `chain_seq`: larger than `after`, up to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainRange {
    /// Not this one.
    pub after: i64,
    /// This one too.
    pub to: i64,
}

/// In which order messages are exported, and the last one that was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportOrder {
    /// By `chain_seq`; the range's `after` says where to go on.
    Chain,
    /// By conversation, time and id; the time is [`ArchivedMessage::sent_at_key`].
    Conversation(Option<(ConversationId, String, MessageId)>),
}

/// A conversation with who took part in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConversationDetails {
    /// `id`.
    pub id: ConversationId,
    /// `thread_id`.
    pub thread_id: Option<String>,
    /// `subject`.
    pub subject: Option<String>,
    /// `importance`.
    pub importance: Option<String>,
    /// More than two people, or a conference.
    pub multiparty: bool,
    /// `started_at`.
    pub started_at: String,
    /// `ended_at`.
    pub ended_at: Option<String>,
    /// By the time they joined.
    pub stays: Vec<Stay>,
}

/// A row of `participants`: one stay of one person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stay {
    /// `sip_uri`.
    pub sip_uri: Option<String>,
    /// `display_name`.
    pub display_name: Option<String>,
    /// `role`.
    pub role: Option<String>,
    /// `is_local`: the account itself.
    pub is_local: bool,
    /// `joined_at`.
    pub joined_at: Option<String>,
    /// `left_at`.
    pub left_at: Option<String>,
}

/// What one account's archive has of one day (UTC).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DayCount {
    /// `2026-03-01`.
    pub day: String,
    /// Messages that came.
    pub incoming: i64,
    /// Messages that were sent.
    pub outgoing: i64,
    /// Those of the sent ones that failed.
    pub failed: i64,
}

/// Reading at length.
#[async_trait]
pub trait ReadingStore: Send + Sync {
    /// One page of the messages that fit, in the page's order, the oldest first.
    async fn messages(&self, query: &Query, page: Page, limit: i64) -> Result<Vec<HistoryRow>, StoreError>;
    /// The same by a filter.
    async fn history(&self, filter: &HistoryFilter) -> Result<Vec<HistoryRow>, StoreError> {
        self.messages(&filter.query(), filter.page(), filter.limit).await
    }
    /// Where a message stands; none if there is no such message.
    async fn place(&self, id: MessageId) -> Result<Option<Place>, StoreError>;
    /// The message that was archived last.
    async fn newest_message(&self) -> Result<Option<MessageId>, StoreError>;
    /// Every account that has a row, by URI.
    async fn archived_accounts(&self) -> Result<Vec<ArchivedAccount>, StoreError>;
    /// Head of the account's chain as `chain_heads` has it.
    async fn chain_head(&self, account: AccountId) -> Result<Option<Head>, StoreError>;
    /// Chained messages of an account after a number, in the order of the chain.
    async fn chained(
        &self,
        account: AccountId,
        after: i64,
        limit: i64,
    ) -> Result<Vec<ChainedMessage>, StoreError>;
    /// Messages of an account that are settled and yet not chained, with a larger id, in ascending order of id. The
    /// relay itself leaves none.
    async fn unchained(
        &self,
        account: AccountId,
        after: MessageId,
        limit: i64,
    ) -> Result<Vec<MessageId>, StoreError>;
    /// One page of an account's chained messages that fit, for export.
    async fn export_page(
        &self,
        account: AccountId,
        query: &Query,
        range: ChainRange,
        order: &ExportOrder,
        limit: i64,
    ) -> Result<Vec<ArchivedMessage>, StoreError>;
    /// These conversations, by id.
    async fn conversation_details(
        &self,
        account: AccountId,
        ids: &[ConversationId],
    ) -> Result<Vec<ConversationDetails>, StoreError>;
    /// How many messages that fit the account has on each day, up to a number of its chain.
    async fn day_counts(
        &self,
        account: AccountId,
        query: &Query,
        to: i64,
    ) -> Result<Vec<DayCount>, StoreError>;
}

// ------------------------------------------------------------------------------------------------ statements

/// A database that is read in one of the dialects.
#[async_trait]
pub(super) trait Readable: Send + Sync {
    /// What it gives.
    type Row: Columns + Send + Sync;
    /// Its words. `with_text`: texts will be looked for, so it matters whether there is an index of them.
    async fn dialect(&self, with_text: bool) -> Result<Box<dyn Dialect>, sqlx::Error>;
    /// All rows of a statement.
    async fn select(&self, statement: Statement) -> Result<Vec<Self::Row>, sqlx::Error>;
    /// Whether the statement failed because the index of texts is gone that was there when its words were chosen. A server
    /// drops it, or makes it anew, when it starts.
    fn misses_index(&self, error: &sqlx::Error) -> bool;
}

/// What a [`ChainedMessage`] is read from; `m` is `messages`, `a` is `accounts`.
pub(super) const CHAINED: &str = "m.id, m.chain_seq, a.sip_uri, m.conversation_id, m.direction, m.sender_uri, m.sender_name, \
                       m.content_type, m.body, m.body_html, m.sent_at, m.operation_id, m.outbox_id, m.correlation, \
                       m.content_hash, m.chain_hash, m.purged_at, m.tombstone";

/// What is read of the messages whose ids follow: the ids first, from the table, so that the view's sub-queries run for the
/// chosen rows only; and only the conditions that are given, so that each has its index.
const SHOWN: &str = "SELECT h.* FROM message_history h WHERE h.message_id IN (";

/// How many of the newest messages are looked through before an index of texts is asked.
const LOOKED_AT: i64 = 1000;

/// What is found so often among them is frequent: the index is asked within a time only.
const FREQUENT: usize = 2;

/// What is found so often among them is found sooner by looking through the messages before, of which a page needs at most
/// `limit / 5` thousand and mostly half as many, than by an index that tells of the whole archive.
const VERY_FREQUENT: usize = 5;

/// The newest messages that fit.
struct Newest<'q> {
    dialect: &'q dyn Dialect,
    query: &'q Query,
    before: Option<&'q Place>,
    limit: i64,
}

impl<'q> Newest<'q> {
    /// By walking through the messages in their order.
    fn in_order(&self) -> Sql<'q> {
        let mut sql = Sql::new(self.dialect, SHOWN);
        sql.push("SELECT m.id FROM messages m WHERE TRUE").and_fits(self.query);
        self.last_page(sql)
    }

    /// Those among the last `count` messages that fit apart from their text.
    fn among_the_last(&self, count: i64) -> Sql<'q> {
        let mut sql = Sql::new(self.dialect, SHOWN);
        sql.push("SELECT m.id FROM (SELECT m.id, m.sent_at, m.body FROM messages m WHERE TRUE")
            .and_fits_apart_from_text(self.query);
        self.and_before(&mut sql);
        sql.push(" ORDER BY m.sent_at DESC, m.id DESC LIMIT ")
            .bind_integer(count)
            .push(") m WHERE TRUE")
            .and_has_texts(self.query);
        self.last_page(sql)
    }

    /// When the message that fits apart from its text, and has `count` such ones after it, was sent.
    fn nth(&self, count: i64) -> Sql<'q> {
        let mut sql = Sql::new(self.dialect, "SELECT ");
        sql.push(&self.dialect.time_as_text("m.sent_at"))
            .push(" AS sent_at_key FROM messages m WHERE TRUE")
            .and_fits_apart_from_text(self.query);
        self.and_before(&mut sql);
        sql.push(" ORDER BY m.sent_at DESC, m.id DESC LIMIT 1 OFFSET ").bind_integer(count);
        sql
    }

    /// By the index of texts, all that fit before they are put in order: with the order in view a planner that takes the
    /// words for frequent walks through the archive from its end and takes text after text apart. `since`: only those that
    /// were sent then or later.
    fn by_words(&self, since: Option<&str>) -> Sql<'q> {
        let mut sql = Sql::new(self.dialect, SHOWN);
        sql.push("WITH found AS MATERIALIZED (SELECT m.id, m.sent_at FROM messages m");
        match since {
            // What the words are found in is compared with a range of time before any message is read.
            Some(_) if self.query.only_account().is_some() => sql.by_index("messages_sent"),
            Some(_) => sql.by_index("messages_sent_by_all"),
            None => sql.push(self.dialect.by_ids()),
        };
        sql.push(" WHERE TRUE");
        if let Some(since) = since {
            sql.push(" AND m.sent_at >= ").bind_time_text(since);
        }
        sql.and_fits(self.query).push(") SELECT m.id FROM found m WHERE TRUE");
        self.last_page(sql)
    }

    fn and_before(&self, sql: &mut Sql<'q>) {
        if let Some(place) = self.before {
            sql.push(" AND (m.sent_at, m.id) < (")
                .bind_time_text(&place.sent_at_key)
                .push(", ")
                .bind_integer(place.id.0)
                .push(")");
        }
    }

    /// The end of a statement: of what it has found so far the last page, the oldest first.
    fn last_page(&self, mut sql: Sql<'q>) -> Sql<'q> {
        self.and_before(&mut sql);
        sql.push(" ORDER BY m.sent_at DESC, m.id DESC LIMIT ")
            .bind_integer(self.limit)
            .push(") ORDER BY h.sent_at, h.message_id");
        sql
    }
}

/// By id, so that who follows the archive looks at what is new, which is little; the index would tell of all there is.
fn archived_after<'q>(dialect: &'q dyn Dialect, query: &'q Query, id: MessageId, limit: i64) -> Sql<'q> {
    let mut sql = Sql::new(dialect, SHOWN);
    sql.push("SELECT m.id FROM messages m WHERE TRUE")
        .and_fits(query)
        .push(" AND m.id > ")
        .bind_integer(id.0)
        .push(" ORDER BY m.id LIMIT ")
        .bind_integer(limit)
        .push(") ORDER BY h.message_id");
    sql
}

/// The newest messages that fit, if their text is so frequent that they are among the newest of all. The index tells of
/// every message that has a word, and those in millions of messages are asked for most; so the last messages tell
/// first how far back one has to look.
async fn frequent<S: Readable>(
    store: &S,
    newest: &Newest<'_>,
) -> Result<Option<Vec<HistoryRow>>, sqlx::Error> {
    let wanted = usize::try_from(newest.limit).unwrap_or(usize::MAX);
    let rows = history_rows(store, newest.among_the_last(LOOKED_AT)).await?;
    if rows.len() >= wanted {
        return Ok(Some(rows));
    }
    if rows.len() < FREQUENT {
        return Ok(None);
    }
    // Where so many of them should be, twice over.
    let reach = LOOKED_AT.saturating_mul(newest.limit) / i64::try_from(rows.len()).unwrap_or(i64::MAX) * 2;
    if rows.len() >= VERY_FREQUENT {
        let rows = history_rows(store, newest.among_the_last(reach)).await?;
        return Ok((rows.len() >= wanted).then_some(rows));
    }
    let found = store.select(newest.nth(reach).finish()).await?;
    let Some(row) = found.first() else { return Ok(None) };
    let since = row.some_lossy_text("sent_at_key")?;
    let rows = history_rows(store, newest.by_words(Some(&since))).await?;
    Ok((rows.len() >= wanted).then_some(rows))
}

async fn history_rows<S: Readable>(store: &S, sql: Sql<'_>) -> Result<Vec<HistoryRow>, sqlx::Error> {
    store.select(sql.finish()).await?.iter().map(rows::history_row).collect()
}

/// A page of the messages that a query finds; `by_index`: with the index of texts, if there is one.
async fn found<S: Readable>(
    store: &S,
    query: &Query,
    page: &Page,
    limit: i64,
    by_index: bool,
) -> Result<Vec<HistoryRow>, sqlx::Error> {
    let dialect = store.dialect(by_index).await?;
    let before = match page {
        Page::After(id) => return history_rows(store, archived_after(&*dialect, query, *id, limit)).await,
        Page::Before(place) => Some(place),
        Page::Newest => None,
    };
    let newest = Newest { dialect: &*dialect, query, before, limit };
    if !query.texts().any(|text| dialect.narrows(text)) {
        return history_rows(store, newest.in_order()).await;
    }
    if query.is_of_text_and_time()
        && let Some(rows) = frequent(store, &newest).await?
    {
        return Ok(rows);
    }
    history_rows(store, newest.by_words(None)).await
}

#[async_trait]
impl<S: Readable> ReadingStore for S {
    async fn messages(&self, query: &Query, page: Page, limit: i64) -> Result<Vec<HistoryRow>, StoreError> {
        // Who follows the archive looks at what is new, which is little; the index would tell of all there is.
        let by_index = query.texts().next().is_some() && !matches!(page, Page::After(_));
        let found = match found(self, query, &page, limit, by_index).await {
            Err(error) if by_index && self.misses_index(&error) => {
                found(self, query, &page, limit, false).await
            }
            found => found,
        };
        found.map_err(failed("reading history"))
    }

    async fn place(&self, id: MessageId) -> Result<Option<Place>, StoreError> {
        let failed = failed("looking a message up");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let mut sql = Sql::new(&*dialect, "SELECT ");
        sql.push(&dialect.time_as_text("m.sent_at"))
            .push(" AS sent_at_key FROM messages m WHERE m.id = ")
            .bind_integer(id.0);
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        let place = |row: &S::Row| Ok(Place { sent_at_key: row.some_lossy_text("sent_at_key")?, id });
        found.first().map(place).transpose().map_err(failed)
    }

    async fn newest_message(&self) -> Result<Option<MessageId>, StoreError> {
        let failed = failed("looking for the newest message");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let sql = Sql::new(&*dialect, "SELECT m.id FROM messages m ORDER BY m.id DESC LIMIT 1");
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.first().map(|row| row.integer("id").map(MessageId)).transpose().map_err(failed)
    }

    async fn archived_accounts(&self) -> Result<Vec<ArchivedAccount>, StoreError> {
        let failed = failed("reading which accounts there are");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let mut sql = Sql::new(&*dialect, "SELECT a.id, a.sip_uri FROM accounts a ORDER BY a.sip_uri");
        sql.push(dialect.by_code_points());
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.iter().map(|row| account(row).map_err(&failed)).collect()
    }

    async fn chain_head(&self, account: AccountId) -> Result<Option<Head>, StoreError> {
        let failed = failed("reading the head of a chain");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let mut sql = Sql::new(&*dialect, "SELECT seq, hash FROM chain_heads WHERE account_id = ");
        sql.bind_integer(account.0);
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.first().map(|row| head(row).map_err(&failed)).transpose()
    }

    async fn chained(
        &self,
        account: AccountId,
        after: i64,
        limit: i64,
    ) -> Result<Vec<ChainedMessage>, StoreError> {
        let failed = failed("reading a chain");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let mut sql = Sql::new(&*dialect, "SELECT ");
        sql.push(CHAINED)
            .push(" FROM messages m JOIN accounts a ON a.id = m.account_id WHERE m.account_id = ")
            .bind_integer(account.0)
            .push(" AND m.chain_seq > ")
            .bind_integer(after)
            .push(" ORDER BY m.chain_seq LIMIT ")
            .bind_integer(limit);
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.iter().map(|row| chained(row).map_err(&failed)).collect()
    }

    async fn unchained(
        &self,
        account: AccountId,
        after: MessageId,
        limit: i64,
    ) -> Result<Vec<MessageId>, StoreError> {
        let failed = failed("looking for messages that are not chained");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        // By the chain's index, which has those without a number on one side.
        let mut sql = Sql::new(&*dialect, "SELECT m.id FROM messages m");
        sql.by_index("messages_chain")
            .push(" WHERE m.account_id = ")
            .bind_integer(account.0)
            .push(" AND m.chain_seq IS NULL AND m.awaiting IS NULL AND m.id > ")
            .bind_integer(after.0)
            .push(" ORDER BY m.id LIMIT ")
            .bind_integer(limit);
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.iter().map(|row| row.integer("id").map(MessageId).map_err(&failed)).collect()
    }

    async fn export_page(
        &self,
        account: AccountId,
        query: &Query,
        range: ChainRange,
        order: &ExportOrder,
        limit: i64,
    ) -> Result<Vec<ArchivedMessage>, StoreError> {
        let failed = failed("reading messages for an export");
        // A page walks along the account's messages; what an index told of all accounts would be asked for each page.
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let mut sql = Sql::new(&*dialect, "SELECT ");
        sql.push(CHAINED).push(", ").push(&dialect.time_as_text("m.sent_at")).push(
            " AS sent_at_key, h.recipients, h.thread_id, h.subject, m.status, m.code, m.subcode, m.reason,
                         m.failed_recipients, m.source, m.archived_at
                   FROM messages m JOIN accounts a ON a.id = m.account_id
                                   JOIN message_history h ON h.message_id = m.id
                  WHERE m.id IN (SELECT m.id FROM messages m",
        );
        // The index that has the order is named, so that a page never sorts all that would fit.
        let (index, by) = match order {
            ExportOrder::Chain => ("messages_chain", " ORDER BY m.chain_seq"),
            ExportOrder::Conversation(_) => {
                ("messages_of_conversation", " ORDER BY m.conversation_id, m.sent_at, m.id")
            }
        };
        sql.by_index(index)
            .push(" WHERE m.account_id = ")
            .bind_integer(account.0)
            .push(" AND m.chain_seq > ")
            .bind_integer(range.after)
            .push(" AND m.chain_seq <= ")
            .bind_integer(range.to);
        if let ExportOrder::Conversation(Some((conversation, sent_at, id))) = order {
            sql.push(" AND (m.conversation_id, m.sent_at, m.id) > (")
                .bind_integer(conversation.0)
                .push(", ")
                .bind_time_text(sent_at)
                .push(", ")
                .bind_integer(id.0)
                .push(")");
        }
        sql.and_fits(query).push(by).push(" LIMIT ").bind_integer(limit).push(")").push(by);
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.iter().map(|row| archived(row).map_err(&failed)).collect()
    }

    async fn conversation_details(
        &self,
        account: AccountId,
        ids: &[ConversationId],
    ) -> Result<Vec<ConversationDetails>, StoreError> {
        let failed = failed("reading conversations for an export");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let ids = ids.iter().map(|id| id.0);
        let mut sql = Sql::new(
            &*dialect,
            "SELECT c.id, c.thread_id, c.subject, c.importance, c.multiparty, c.started_at, c.ended_at
               FROM conversations c WHERE c.account_id = ",
        );
        sql.bind_integer(account.0).push(" AND c.id").is_one_of(ids.clone()).push(" ORDER BY c.id");
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        let mut conversations: Vec<ConversationDetails> =
            found.iter().map(|row| conversation(row).map_err(&failed)).collect::<Result<_, _>>()?;

        let mut sql = Sql::new(
            &*dialect,
            "SELECT p.conversation_id, p.sip_uri, p.display_name, p.role, p.is_local, p.joined_at, p.left_at
               FROM participants p",
        );
        sql.by_index("participants_of_conversation")
            .push(" WHERE p.account_id = ")
            .bind_integer(account.0)
            .push(" AND p.conversation_id")
            .is_one_of(ids)
            .push(" ORDER BY p.conversation_id, p.joined_at IS NULL, p.joined_at, p.id");
        for row in &self.select(sql.finish()).await.map_err(&failed)? {
            let id = ConversationId(row.integer("conversation_id").map_err(&failed)?);
            if let Ok(place) = conversations.binary_search_by_key(&id, |conversation| conversation.id) {
                conversations[place].stays.push(stay(row).map_err(&failed)?);
            }
        }
        Ok(conversations)
    }

    async fn day_counts(
        &self,
        account: AccountId,
        query: &Query,
        to: i64,
    ) -> Result<Vec<DayCount>, StoreError> {
        let failed = failed("counting messages by day");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let mut sql = Sql::new(&*dialect, "SELECT ");
        sql.push(&dialect.day("m.sent_at"))
            .push(
                " AS day,
                    count(*) FILTER (WHERE m.direction = 'incoming') AS incoming,
                    count(*) FILTER (WHERE m.direction = 'outgoing') AS outgoing,
                    count(*) FILTER (WHERE m.direction = 'outgoing' AND m.status = 'failed') AS failed
               FROM messages m",
            )
            .by_index("messages_sent")
            .push(" WHERE m.account_id = ")
            .bind_integer(account.0)
            .push(" AND m.chain_seq <= ")
            .bind_integer(to)
            .and_fits(query);
        sql.push(" GROUP BY 1 ORDER BY 1");
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.iter().map(|row| day_count(row).map_err(&failed)).collect()
    }
}

// ------------------------------------------------------------------------------------------------ rows

/// From a row of `accounts`.
fn account(row: &impl Columns) -> Result<ArchivedAccount, sqlx::Error> {
    Ok(ArchivedAccount { id: AccountId(row.integer("id")?), uri: row.some_lossy_text("sip_uri")? })
}

/// From a row of `chain_heads`.
fn head(row: &impl Columns) -> Result<Head, sqlx::Error> {
    Ok(Head { seq: row.integer("seq")?, hash: row.some_lossy_text("hash")? })
}

/// From a row with the columns of `messages` that are hashed, and `sip_uri`.
pub(super) fn chained(row: &impl Columns) -> Result<ChainedMessage, sqlx::Error> {
    Ok(ChainedMessage {
        message_id: MessageId(row.integer("id")?),
        chain_seq: row.integer("chain_seq")?,
        account: row.some_lossy_text("sip_uri")?,
        conversation_id: ConversationId(row.integer("conversation_id")?),
        direction: row.some_lossy_text("direction")?,
        sender_uri: row.lossy_text("sender_uri")?,
        sender_name: row.lossy_text("sender_name")?,
        content_type: row.some_lossy_text("content_type")?,
        body: row.some_lossy_text("body")?,
        body_html: row.lossy_text("body_html")?,
        sent_at: row.exact_time("sent_at")?.unwrap_or_default(),
        operation_id: row.lossy_text("operation_id")?,
        outbox_id: row.optional_integer("outbox_id")?,
        correlation: row.lossy_text("correlation")?,
        content_hash: row.lossy_text("content_hash")?,
        chain_hash: row.lossy_text("chain_hash")?,
        purged_at: row.exact_time("purged_at")?,
        tombstone: row.lossy_text("tombstone")?,
    })
}

/// From such a row with the further columns of `messages` and those of `message_history`.
fn archived(row: &impl Columns) -> Result<ArchivedMessage, sqlx::Error> {
    Ok(ArchivedMessage {
        message: chained(row)?,
        recipients: row.lossy_text("recipients")?,
        thread_id: row.lossy_text("thread_id")?,
        subject: row.lossy_text("subject")?,
        status: row.some_lossy_text("status")?,
        code: row.lossy_text("code")?,
        subcode: row.lossy_text("subcode")?,
        reason: row.lossy_text("reason")?,
        failed_recipients: row.lossy_text("failed_recipients")?,
        source: row.some_lossy_text("source")?,
        archived_at: row.shown_time("archived_at")?.unwrap_or_default(),
        sent_at_key: row.some_lossy_text("sent_at_key")?,
    })
}

/// From a row of `conversations`, without the stays.
fn conversation(row: &impl Columns) -> Result<ConversationDetails, sqlx::Error> {
    Ok(ConversationDetails {
        id: ConversationId(row.integer("id")?),
        thread_id: row.lossy_text("thread_id")?,
        subject: row.lossy_text("subject")?,
        importance: row.lossy_text("importance")?,
        multiparty: row.flag("multiparty")?,
        started_at: row.shown_time("started_at")?.unwrap_or_default(),
        ended_at: row.shown_time("ended_at")?,
        stays: Vec::new(),
    })
}

/// From a row of `participants`.
fn stay(row: &impl Columns) -> Result<Stay, sqlx::Error> {
    Ok(Stay {
        sip_uri: row.lossy_text("sip_uri")?,
        display_name: row.lossy_text("display_name")?,
        role: row.lossy_text("role")?,
        is_local: row.flag("is_local")?,
        joined_at: row.shown_time("joined_at")?,
        left_at: row.shown_time("left_at")?,
    })
}

/// From a row with the counts of a day.
fn day_count(row: &impl Columns) -> Result<DayCount, sqlx::Error> {
    Ok(DayCount {
        day: row.some_lossy_text("day")?,
        incoming: row.integer("incoming")?,
        outgoing: row.integer("outgoing")?,
        failed: row.integer("failed")?,
    })
}
