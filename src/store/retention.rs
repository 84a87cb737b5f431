//! Retention and legal hold: which messages are old enough to go, which a hold keeps, and the removal itself.
//!
//! It is written once for all databases, as [`reading`](super::reading) is. What removes works in small batches, each of
//! which is a transaction of the writer's that stands for itself: in it the account's days and the holds are read, texts
//! and names removed, tombstones written, and the run's own row says how far it is. So a hold that was answered for is never
//! passed over, a crash leaves whole batches behind, and whoever lost the run to another process removes nothing more.
//!
//! A hold is about whole conversations: of an account, or of those in which an address took part, said something, invited,
//! was invited or was written to. Addresses stay when texts go, so that this can be told of them later, too.

use std::{collections::BTreeSet, sync::Arc};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::{
    ChainedMessage, StoreError,
    columns::Columns,
    reading::{CHAINED, Readable, chained},
    selection::{self, Sql, Statement, Value},
    trouble::{failed, is_duplicate},
    writer::{Connection, Dialect, Writer},
};
use crate::{
    archive::text::{serialize_optional_time, serialize_time, to_milliseconds},
    identifiers::{AccountId, ConversationId, MessageId, SipUri},
};

/// A run that was not heard of for so long has ended with its process.
const SILENCE: SignedDuration = SignedDuration::from_mins(2);

/// States in which a row of the queue says nothing more. One that is uncertain may be decided on later, but its text is
/// archived, and goes with the archive's.
const FINISHED: &str = "('sent', 'delivered', 'failed', 'expired', 'cancelled', 'uncertain')";

/// How long messages are kept where their account does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// `retention.default_days`; 0: for ever.
    pub default_days: u32,
    /// When the run, or the question, began.
    pub now: Timestamp,
}

impl Policy {
    /// How many days an account's messages are kept; none: for ever.
    pub fn days(&self, of_account: Option<i64>) -> Option<i64> {
        Some(of_account.unwrap_or(i64::from(self.default_days))).filter(|&days| days > 0)
    }

    /// What was sent before this goes; none: nothing does.
    pub fn before(&self, of_account: Option<i64>) -> Option<Timestamp> {
        let kept = SignedDuration::from_hours(self.days(of_account)?.saturating_mul(24).min(1_000_000_000));
        Some(to_milliseconds(self.now.checked_sub(kept).unwrap_or(Timestamp::MIN)))
    }
}

/// An account that has or had an archive, removed ones too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedAccount {
    /// Row id.
    pub id: AccountId,
    /// `sip_uri`.
    pub uri: String,
    /// `retention_days`.
    pub days: Option<i64>,
}

/// A row of `holds`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hold {
    /// `id`.
    pub id: i64,
    /// SIP URI of the account; none: all accounts.
    pub account: Option<String>,
    /// Only conversations with this address; none: all conversations.
    pub with_uri: Option<String>,
    /// Why.
    pub reason: String,
    /// Who asked for it.
    pub created_by: String,
    /// When it was written.
    #[serde(serialize_with = "serialize_time")]
    pub created_at: Timestamp,
    /// When it ended; none: it is in force.
    #[serde(serialize_with = "serialize_optional_time")]
    pub released_at: Option<Timestamp>,
    /// Who ended it.
    pub released_by: Option<String>,
}

/// What `hold add` writes.
#[derive(Debug, Clone)]
pub struct NewHold {
    /// None: all accounts.
    pub account: Option<AccountId>,
    /// None: all conversations.
    pub with_uri: Option<SipUri>,
    /// Why.
    pub reason: String,
    /// Who asks for it.
    pub created_by: String,
}

/// Messages that one hold keeps though they are old enough to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeptByHold {
    /// `holds.id`.
    pub hold: i64,
    /// How many.
    pub messages: i64,
}

/// What of an account goes, or went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Due {
    /// Messages whose text goes.
    pub messages: i64,
    /// When the oldest of them was sent.
    #[serde(serialize_with = "serialize_optional_time")]
    pub oldest: Option<Timestamp>,
    /// When the newest of them was sent.
    #[serde(serialize_with = "serialize_optional_time")]
    pub newest: Option<Timestamp>,
    /// Conversations that are over and of which no text is left: their subject and names go.
    pub conversations: i64,
    /// Payloads of the quarantine that go.
    pub payloads: i64,
    /// What stays, and by which hold; what two holds keep is counted for both.
    pub kept: Vec<KeptByHold>,
}

/// Makes the tombstone of a message that is purged at a time.
pub type Signer = Arc<dyn Fn(&ChainedMessage, Timestamp) -> String + Send + Sync>;

/// How far the removal of one account's messages is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Messages, after the one that was sent then and has this id.
    Messages(Option<(String, MessageId)>),
    /// Conversations, after the one that ended then and has this id.
    Conversations(Option<(String, ConversationId)>),
    /// Payloads of the quarantine, and invitations that led to no conversation.
    Others,
}

/// One batch of a run.
#[derive(Clone)]
pub struct PurgeBatch {
    /// `retention_runs.id`.
    pub run: i64,
    /// Whose.
    pub account: AccountId,
    /// How old is too old.
    pub policy: Policy,
    /// Where to go on.
    pub stage: Stage,
    /// Rows to look at.
    pub limit: i64,
    /// Makes the tombstones.
    pub signer: Signer,
}

/// What a batch removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// What went; `kept` is not filled.
    pub gone: Due,
    /// Where the next batch goes on; none: this account is done.
    pub next: Option<Stage>,
}

/// Retention and legal hold.
#[async_trait]
pub trait RetentionStore: Send + Sync {
    /// Holds in force, and on request those that were released, by id.
    async fn holds(&self, released: bool) -> Result<Vec<Hold>, StoreError>;
    /// Adds a hold; from its answer on nothing that it is about is purged.
    async fn add_hold(&self, hold: &NewHold) -> Result<i64, StoreError>;
    /// Ends a hold; false if there is none in force with this id.
    async fn release_hold(&self, id: i64, by: &str) -> Result<bool, StoreError>;
    /// Every account that has a row, by URI.
    async fn retained_accounts(&self) -> Result<Vec<RetainedAccount>, StoreError>;
    /// What of an account would go that is older than `before`.
    async fn due(&self, account: AccountId, before: Timestamp) -> Result<Due, StoreError>;
    /// What of an account holds keep though it is older than `before`.
    async fn kept(&self, account: AccountId, before: Timestamp) -> Result<Vec<KeptByHold>, StoreError>;
    /// When the last run began that came to its end.
    async fn last_run(&self) -> Result<Option<Timestamp>, StoreError>;
    /// Whose key signed the newest tombstones, in hexadecimal.
    async fn last_signer(&self) -> Result<Option<String>, StoreError>;
    /// Begins a run of this node. `replaces_own`: no other process goes by the node's name and `by`, so a run of theirs that
    /// has not ended was interrupted. [`StoreError::AlreadyExists`] if another run is under way.
    async fn begin_run(
        &self,
        by: &str,
        node: &str,
        public_key: &str,
        replaces_own: bool,
    ) -> Result<i64, StoreError>;
    /// Does one batch. [`StoreError::AlreadyExists`] if the run was taken for interrupted and another began.
    async fn purge(&self, batch: PurgeBatch) -> Result<Batch, StoreError>;
    /// Ends a run: `done`, `stopped` or `failed`.
    async fn end_run(&self, run: i64, outcome: &'static str) -> Result<(), StoreError>;
}

// ------------------------------------------------------------------------------------------------ statements

/// A database that retention works on.
pub(super) trait Retaining: Readable + 'static {
    /// Its writer's dialect.
    type Writes: Dialect;
    /// Makes holds stand still until the transaction ends, or fails at once: who adds one waits until it is judged.
    const HOLDS_STAND_STILL: Option<&'static str>;
    /// The one that writes.
    fn writer(&self) -> &Writer<Self::Writes>;
    /// Its words, where no text is looked for.
    fn words() -> Box<dyn selection::Dialect>;
    /// All rows that a statement gives within a transaction.
    fn rows_within(
        connection: &mut Connection<Self::Writes>,
        statement: Statement,
    ) -> impl Future<Output = Result<Vec<Self::Row>, sqlx::Error>> + Send;
}

/// Adds a condition: a hold in force is about the conversation `c`; about it alone is `only`, if given.
fn is_held(sql: &mut Sql<'_>, only: Option<i64>) {
    sql.push(
        "EXISTS (SELECT 1 FROM holds k JOIN accounts w ON w.id = c.account_id
                  WHERE k.released_at IS NULL AND (k.account_id IS NULL OR k.account_id = c.account_id)",
    );
    if let Some(id) = only {
        sql.push(" AND k.id = ").bind_integer(id);
    }
    sql.push(
        " AND (k.with_uri IS NULL OR k.with_uri = w.sip_uri
               OR EXISTS (SELECT 1 FROM participants p",
    )
    .by_index("participants_of_conversation")
    .push(
        " WHERE p.account_id = c.account_id AND p.conversation_id = c.id AND p.sip_uri = k.with_uri)
               OR EXISTS (SELECT 1 FROM invitations i",
    )
    .by_index("invitations_of_conversation")
    .push(
        " WHERE i.account_id = c.account_id AND i.conversation_id = c.id
                             AND (i.from_uri = k.with_uri OR i.to_uri = k.with_uri))
               OR EXISTS (SELECT 1 FROM messages s",
    )
    .by_index("messages_of_conversation")
    .push(
        " LEFT JOIN outbox o ON o.id = s.outbox_id
                           WHERE s.account_id = c.account_id AND s.conversation_id = c.id
                             AND (s.sender_uri = k.with_uri OR ",
    )
    .push(&names("s.failed_recipients"))
    .push(" OR ")
    .push(&names("o.destination"))
    .push("))))");
}

/// A condition: the addresses of a column, joined by semicolons, have the hold's among them.
fn names(column: &str) -> String {
    format!("replace(';' || {column} || ';', ';' || k.with_uri || ';', '') <> ';' || {column} || ';'")
}

/// Adds a condition: the payload of a quarantine or an invitation can't be told from what a hold is about.
fn no_hold_on(sql: &mut Sql<'_>, account: AccountId) {
    sql.push(
        "NOT EXISTS (SELECT 1 FROM holds k WHERE k.released_at IS NULL AND (k.account_id IS NULL OR k.account_id = ",
    )
    .bind_integer(account.0)
    .push("))");
}

/// Adds ` FROM ... WHERE`: messages of an account that are old enough and still have their text. Only what is settled:
/// the others wait for something that makes them what they are.
fn from_old_messages(sql: &mut Sql<'_>, account: AccountId, before: Timestamp) {
    sql.push(" FROM messages m")
        .by_index("messages_kept")
        .push(" JOIN accounts a ON a.id = m.account_id WHERE m.account_id = ")
        .bind_integer(account.0)
        .push(" AND m.purged_at IS NULL AND m.chain_seq IS NOT NULL AND m.sent_at < ")
        .bind(Value::Time(before));
}

/// Adds ` FROM ... WHERE`: conversations of an account that ended long enough ago and in which every text is gone.
/// `going`: or goes now.
fn from_old_conversations(sql: &mut Sql<'_>, account: AccountId, before: Timestamp, going: bool) {
    sql.push(" FROM conversations c")
        .by_index("conversations_kept")
        .push(" WHERE c.account_id = ")
        .bind_integer(account.0)
        .push(" AND c.purged_at IS NULL AND c.ended_at < ")
        .bind(Value::Time(before))
        .push(" AND NOT EXISTS (SELECT 1 FROM messages s")
        .by_index("messages_of_conversation")
        .push(" WHERE s.account_id = c.account_id AND s.conversation_id = c.id AND s.purged_at IS NULL");
    if going {
        sql.push(" AND (s.chain_seq IS NULL OR s.sent_at >= ").bind(Value::Time(before)).push(")");
    }
    sql.push(")");
}

/// Adds ` FROM ... WHERE`: quarantined payloads of an account that are old enough, unless some hold may be about them.
fn from_old_payloads(sql: &mut Sql<'_>, account: AccountId, before: Timestamp) {
    sql.push(" FROM event_quarantine q WHERE q.account_id = ")
        .bind_integer(account.0)
        .push(" AND q.purged_at IS NULL AND q.received_at < ")
        .bind(Value::Time(before))
        .push(" AND ");
    no_hold_on(sql, account);
}

/// A batch at work: the transaction, and what is needed in it.
struct Work<'c, S: Retaining> {
    connection: &'c mut Connection<S::Writes>,
    words: Box<dyn selection::Dialect>,
    account: AccountId,
    limit: i64,
    before: Timestamp,
    /// `purged_at` of everything that goes now.
    at: Timestamp,
    gone: Due,
}

impl<S: Retaining> Work<'_, S> {
    async fn rows(&mut self, statement: Statement) -> Result<Vec<S::Row>, sqlx::Error> {
        S::rows_within(self.connection, statement).await
    }

    fn is_full(&self, rows: usize) -> bool {
        i64::try_from(rows).is_ok_and(|rows| rows >= self.limit)
    }

    /// Those of the conversations that a hold is about.
    async fn held(&mut self, ids: BTreeSet<ConversationId>) -> Result<BTreeSet<ConversationId>, sqlx::Error> {
        if ids.is_empty() {
            return Ok(BTreeSet::new());
        }
        let mut sql = Sql::new(&*self.words, "SELECT c.id FROM conversations c WHERE c.account_id = ");
        sql.bind_integer(self.account.0)
            .push(" AND c.id")
            .is_one_of(ids.into_iter().map(|id| id.0))
            .push(" AND ");
        is_held(&mut sql, None);
        let statement = sql.finish();
        self.rows(statement).await?.iter().map(|row| Ok(ConversationId(row.integer("id")?))).collect()
    }

    async fn messages(
        &mut self,
        after: Option<&(String, MessageId)>,
        signer: &Signer,
    ) -> Result<Stage, sqlx::Error> {
        let mut sql = Sql::new(&*self.words, "SELECT ");
        sql.push(CHAINED).push(", ").push(&self.words.time_as_text("m.sent_at")).push(" AS sent_at_key");
        from_old_messages(&mut sql, self.account, self.before);
        if let Some((sent_at, id)) = after {
            sql.push(" AND (m.sent_at, m.id) > (")
                .bind_time_text(sent_at)
                .push(", ")
                .bind_integer(id.0)
                .push(")");
        }
        sql.push(" ORDER BY m.sent_at, m.id LIMIT ").bind_integer(self.limit);
        let statement = sql.finish();
        let found = self.rows(statement).await?;
        let messages: Vec<ChainedMessage> = found.iter().map(chained).collect::<Result<_, _>>()?;
        let held = self.held(messages.iter().map(|message| message.conversation_id).collect()).await?;
        let going: Vec<&ChainedMessage> =
            messages.iter().filter(|message| !held.contains(&message.conversation_id)).collect();
        if let (Some(first), Some(last)) = (going.first(), going.last()) {
            // A time that a hand has spoilt is no time; the message goes all the same.
            self.gone.oldest = first.sent_at.parse().ok();
            self.gone.newest = last.sent_at.parse().ok();
            self.bury(&going, signer).await?;
        }
        match (found.last(), messages.last()) {
            (Some(row), Some(last)) if self.is_full(found.len()) => {
                Ok(Stage::Messages(Some((row.some_lossy_text("sent_at_key")?, last.message_id))))
            }
            _ => Ok(Stage::Conversations(None)),
        }
    }

    /// Removes the texts of messages, also where the queue has them, and puts tombstones in their place.
    async fn bury(&mut self, going: &[&ChainedMessage], signer: &Signer) -> Result<(), sqlx::Error> {
        let ids = || going.iter().map(|message| message.message_id.0);
        let mut sql = Sql::new(
            &*self.words,
            "UPDATE messages SET body = '', body_html = NULL, sender_name = NULL, correlation = NULL, reason = NULL,
                                 purged_at = ",
        );
        sql.bind(Value::Time(self.at)).push(", tombstone = CASE id");
        for message in going {
            sql.push(" WHEN ")
                .bind_integer(message.message_id.0)
                .push(" THEN ")
                .bind_text(signer(message, self.at));
        }
        sql.push(" END WHERE account_id = ").bind_integer(self.account.0).push(" AND id").is_one_of(ids());
        let statement = sql.finish();
        self.rows(statement).await?;
        self.gone.messages += i64::try_from(going.len()).unwrap_or(i64::MAX);

        let queued: BTreeSet<i64> = going.iter().filter_map(|message| message.outbox_id).collect();
        if queued.is_empty() {
            return Ok(());
        }
        let mut sql = Sql::new(
            &*self.words,
            "UPDATE outbox SET body = '', subject = NULL, correlation = NULL, last_error = NULL, revision = revision + 1
              WHERE id",
        );
        sql.is_one_of(queued).push(" AND state IN ").push(FINISHED).push(" RETURNING id");
        let statement = sql.finish();
        let emptied: Vec<i64> =
            self.rows(statement).await?.iter().map(|row| row.integer("id")).collect::<Result<_, _>>()?;
        if !emptied.is_empty() {
            let mut sql = Sql::new(&*self.words, "UPDATE outbox_attempts SET detail = NULL WHERE outbox_id");
            sql.is_one_of(emptied);
            let statement = sql.finish();
            self.rows(statement).await?;
        }
        Ok(())
    }

    async fn conversations(
        &mut self,
        after: Option<&(String, ConversationId)>,
    ) -> Result<Stage, sqlx::Error> {
        let mut sql = Sql::new(&*self.words, "SELECT c.id, ");
        sql.push(&self.words.time_as_text("c.ended_at")).push(" AS ended_at_key");
        from_old_conversations(&mut sql, self.account, self.before, false);
        if let Some((ended_at, id)) = after {
            sql.push(" AND (c.ended_at, c.id) > (")
                .bind_time_text(ended_at)
                .push(", ")
                .bind_integer(id.0)
                .push(")");
        }
        sql.push(" ORDER BY c.ended_at, c.id LIMIT ").bind_integer(self.limit);
        let statement = sql.finish();
        let found = self.rows(statement).await?;
        let ids: Vec<ConversationId> =
            found.iter().map(|row| row.integer("id").map(ConversationId)).collect::<Result<_, _>>()?;
        let held = self.held(ids.iter().copied().collect()).await?;
        let going: Vec<i64> = ids.iter().filter(|id| !held.contains(id)).map(|id| id.0).collect();
        if !going.is_empty() {
            for names in [
                "UPDATE participants SET display_name = NULL WHERE account_id = ",
                "UPDATE invitations SET subject = NULL, from_name = NULL, reason = NULL WHERE account_id = ",
            ] {
                let mut sql = Sql::new(&*self.words, names);
                sql.bind_integer(self.account.0)
                    .push(" AND conversation_id")
                    .is_one_of(going.iter().copied());
                let statement = sql.finish();
                self.rows(statement).await?;
            }
            let mut sql = Sql::new(&*self.words, "UPDATE conversations SET subject = NULL, purged_at = ");
            sql.bind(Value::Time(self.at))
                .push(" WHERE account_id = ")
                .bind_integer(self.account.0)
                .push(" AND id")
                .is_one_of(going.iter().copied());
            let statement = sql.finish();
            self.rows(statement).await?;
        }
        self.gone.conversations += i64::try_from(going.len()).unwrap_or(i64::MAX);
        match (found.last(), ids.last()) {
            (Some(row), Some(&last)) if self.is_full(found.len()) => {
                Ok(Stage::Conversations(Some((row.some_lossy_text("ended_at_key")?, last))))
            }
            _ => Ok(Stage::Others),
        }
    }

    async fn others(&mut self) -> Result<Option<Stage>, sqlx::Error> {
        let mut sql = Sql::new(&*self.words, "UPDATE event_quarantine SET payload = '', purged_at = ");
        sql.bind(Value::Time(self.at))
            .push(", resolved_at = coalesce(resolved_at, ")
            .bind(Value::Time(self.at))
            .push(") WHERE account_id = ")
            .bind_integer(self.account.0)
            .push(" AND id IN (SELECT q.id");
        from_old_payloads(&mut sql, self.account, self.before);
        sql.push(" ORDER BY q.id LIMIT ").bind_integer(self.limit).push(") RETURNING id");
        let statement = sql.finish();
        let payloads = self.rows(statement).await?.len();
        self.gone.payloads += i64::try_from(payloads).unwrap_or(i64::MAX);

        let mut sql = Sql::new(
            &*self.words,
            "UPDATE invitations SET subject = NULL, from_name = NULL, reason = NULL WHERE account_id = ",
        );
        sql.bind_integer(self.account.0)
            .push(" AND id IN (SELECT i.id FROM invitations i")
            .by_index("invitations_of_conversation")
            .push(" WHERE i.account_id = ")
            .bind_integer(self.account.0)
            .push(
                " AND i.conversation_id IS NULL
                  AND (i.subject IS NOT NULL OR i.from_name IS NOT NULL OR i.reason IS NOT NULL) AND i.started_at < ",
            )
            .bind(Value::Time(self.before))
            .push(" AND ");
        no_hold_on(&mut sql, self.account);
        sql.push(" LIMIT ").bind_integer(self.limit).push(") RETURNING id");
        let statement = sql.finish();
        let invitations = self.rows(statement).await?.len();
        let more = self.is_full(payloads) || self.is_full(invitations);
        Ok(more.then_some(Stage::Others))
    }
}

/// One batch within the writer's transaction.
async fn purge_within<S: Retaining>(
    connection: &mut Connection<S::Writes>,
    batch: &PurgeBatch,
) -> Result<Batch, StoreError> {
    let failed = failed("purging messages");
    // Whoever stores facts has read the rows that it will write: not between a reading and a writing of those.
    for statement in [S::Writes::TAKE_TURN, S::HOLDS_STAND_STILL].into_iter().flatten() {
        S::Writes::execute(connection, statement).await.map_err(&failed)?;
    }
    let words = S::words();
    let mut sql = Sql::new(&*words, "SELECT a.retention_days FROM accounts a WHERE a.id = ");
    sql.bind_integer(batch.account.0);
    let account = S::rows_within(connection, sql.finish()).await.map_err(&failed)?;
    let days = account.first().map(|row| row.optional_integer("retention_days")).transpose();
    let days = days.map_err(&failed)?;
    // Somebody may have changed since what the run began with.
    let before = days.and_then(|days| batch.policy.before(days));
    let done = match before {
        None => Batch { gone: Due::default(), next: None },
        Some(before) => {
            let mut work = Work::<S> {
                connection,
                words: S::words(),
                account: batch.account,
                limit: batch.limit,
                before,
                at: to_milliseconds(Timestamp::now()),
                gone: Due::default(),
            };
            let next = match &batch.stage {
                Stage::Messages(after) => work.messages(after.as_ref(), &batch.signer).await.map(Some),
                Stage::Conversations(after) => work.conversations(after.as_ref()).await.map(Some),
                Stage::Others => work.others().await,
            };
            Batch { next: next.map_err(&failed)?, gone: work.gone }
        }
    };
    let mut sql = Sql::new(&*words, "UPDATE retention_runs SET heartbeat_at = ");
    sql.push(words.now())
        .push(", messages = messages + ")
        .bind_integer(done.gone.messages)
        .push(", conversations = conversations + ")
        .bind_integer(done.gone.conversations)
        .push(", payloads = payloads + ")
        .bind_integer(done.gone.payloads)
        .push(" WHERE id = ")
        .bind_integer(batch.run)
        .push(" AND finished_at IS NULL RETURNING id");
    if S::rows_within(connection, sql.finish()).await.map_err(&failed)?.is_empty() {
        return Err(StoreError::AlreadyExists(
            "this run was not heard of for two minutes and was taken for interrupted; another one goes on with it"
                .to_owned(),
        ));
    }
    Ok(done)
}

async fn begin_within<S: Retaining>(
    connection: &mut Connection<S::Writes>,
    by: &str,
    node: &str,
    public_key: &str,
    replaces_own: bool,
) -> Result<i64, StoreError> {
    let failed = failed("beginning to purge");
    let words = S::words();
    let mut sql = Sql::new(&*words, "SELECT r.id, r.started_by, r.node, r.started_at, r.heartbeat_at, ");
    sql.push(words.now()).push(" AS now FROM retention_runs r WHERE r.finished_at IS NULL");
    for row in S::rows_within(connection, sql.finish()).await.map_err(&failed)? {
        let (other, at) = (
            row.some_lossy_text("started_by").map_err(&failed)?,
            row.some_lossy_text("node").map_err(&failed)?,
        );
        let heard = row.time("heartbeat_at").map_err(&failed)?;
        let silent = row.time("now").map_err(&failed)?.duration_since(heard) > SILENCE;
        let is_own = replaces_own && other == by && at == node;
        if !silent && !is_own {
            return Err(under_way(&format!("by {other} on {at}")));
        }
        let mut sql = Sql::new(&*words, "UPDATE retention_runs SET outcome = 'interrupted', finished_at = ");
        sql.push(words.now()).push(" WHERE id = ").bind_integer(row.integer("id").map_err(&failed)?);
        S::rows_within(connection, sql.finish()).await.map_err(&failed)?;
    }
    let mut sql = Sql::new(
        &*words,
        "INSERT INTO retention_runs (started_by, node, public_key, started_at, heartbeat_at) VALUES (",
    );
    sql.bind_text(by).push(", ").bind_text(node).push(", ").bind_text(public_key);
    sql.push(", ").push(words.now()).push(", ").push(words.now()).push(") RETURNING id");
    match S::rows_within(connection, sql.finish()).await {
        Ok(rows) => match rows.first() {
            Some(row) => row.integer("id").map_err(&failed),
            None => Err(failed(sqlx::Error::RowNotFound)),
        },
        // Another node's run was not to be seen yet.
        Err(error) if is_duplicate(&error) => Err(under_way("elsewhere")),
        Err(error) => Err(failed(error)),
    }
}

fn under_way(where_: &str) -> StoreError {
    StoreError::AlreadyExists(format!(
        "messages are being purged already, {where_}; wait until that run is over (one whose process is gone counts as \
         interrupted after two minutes)"
    ))
}

/// Does one statement in a transaction of the writer's, and gives how many rows it returns and the id in the first.
async fn write<S: Retaining>(
    store: &S,
    operation: &'static str,
    statement: Statement,
) -> Result<Option<i64>, StoreError> {
    let statement = Arc::new(statement);
    store
        .writer()
        .run(operation, false, move |connection| -> BoxFuture<'_, _> {
            Box::pin(async move {
                let failed = failed(operation);
                let statement = Statement { text: statement.text.clone(), values: statement.values.clone() };
                let rows = S::rows_within(connection, statement).await.map_err(&failed)?;
                rows.first().map(|row| row.integer("id")).transpose().map_err(&failed)
            })
        })
        .await
}

#[async_trait]
impl<S: Retaining> RetentionStore for S {
    async fn holds(&self, released: bool) -> Result<Vec<Hold>, StoreError> {
        let failed = failed("reading holds");
        let words = S::words();
        let mut sql = Sql::new(
            &*words,
            "SELECT k.id, a.sip_uri, k.with_uri, k.reason, k.created_by, k.created_at, k.released_at, k.released_by
               FROM holds k LEFT JOIN accounts a ON a.id = k.account_id",
        );
        if !released {
            sql.push(" WHERE k.released_at IS NULL");
        }
        sql.push(" ORDER BY k.id");
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.iter().map(|row| hold(row).map_err(&failed)).collect()
    }

    async fn add_hold(&self, hold: &NewHold) -> Result<i64, StoreError> {
        let words = S::words();
        let mut sql =
            Sql::new(&*words, "INSERT INTO holds (account_id, with_uri, reason, created_by) VALUES (");
        match hold.account {
            Some(account) => sql.bind_integer(account.0),
            None => sql.push("NULL"),
        };
        match &hold.with_uri {
            Some(uri) => sql.push(", ").bind_text(uri.as_str()),
            None => sql.push(", NULL"),
        };
        sql.push(", ").bind_text(&*hold.reason).push(", ").bind_text(&*hold.created_by);
        sql.push(") RETURNING id");
        let statement = sql.finish();
        let added = write(self, "adding a hold", statement).await?;
        added.ok_or_else(|| failed("adding a hold")(sqlx::Error::RowNotFound))
    }

    async fn release_hold(&self, id: i64, by: &str) -> Result<bool, StoreError> {
        let words = S::words();
        let mut sql = Sql::new(&*words, "UPDATE holds SET released_at = ");
        sql.push(words.now()).push(", released_by = ").bind_text(by);
        sql.push(" WHERE id = ").bind_integer(id).push(" AND released_at IS NULL RETURNING id");
        let statement = sql.finish();
        Ok(write(self, "releasing a hold", statement).await?.is_some())
    }

    async fn retained_accounts(&self) -> Result<Vec<RetainedAccount>, StoreError> {
        let failed = failed("reading how long messages are kept");
        let words = S::words();
        let sql = Sql::new(&*words, "SELECT a.id, a.sip_uri, a.retention_days FROM accounts a ORDER BY a.id");
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found
            .iter()
            .map(|row| {
                Ok(RetainedAccount {
                    id: AccountId(row.integer("id")?),
                    uri: row.some_lossy_text("sip_uri")?,
                    days: row.optional_integer("retention_days")?,
                })
            })
            .collect::<Result<_, sqlx::Error>>()
            .map_err(failed)
    }

    async fn due(&self, account: AccountId, before: Timestamp) -> Result<Due, StoreError> {
        let failed = failed("looking what is old enough to be purged");
        let words = S::words();
        let mut sql =
            Sql::new(&*words, "SELECT count(*) AS n, min(m.sent_at) AS oldest, max(m.sent_at) AS newest");
        from_old_messages(&mut sql, account, before);
        sql.push(" AND m.conversation_id NOT IN (SELECT c.id FROM conversations c WHERE c.account_id = ")
            .bind_integer(account.0)
            .push(" AND ");
        is_held(&mut sql, None);
        sql.push(")");
        let messages = self.select(sql.finish()).await.map_err(&failed)?;

        let mut sql = Sql::new(&*words, "SELECT count(*) AS n");
        from_old_conversations(&mut sql, account, before, true);
        sql.push(" AND NOT ");
        is_held(&mut sql, None);
        let conversations = self.select(sql.finish()).await.map_err(&failed)?;

        let mut sql = Sql::new(&*words, "SELECT count(*) AS n");
        from_old_payloads(&mut sql, account, before);
        let payloads = self.select(sql.finish()).await.map_err(&failed)?;

        let count = |rows: &[S::Row]| rows.first().map_or(Ok(0), |row| row.integer("n"));
        let time = |column| messages.first().map(|row| row.optional_user_time(column)).transpose();
        Ok(Due {
            messages: count(&messages).map_err(&failed)?,
            oldest: time("oldest").map_err(&failed)?.flatten(),
            newest: time("newest").map_err(&failed)?.flatten(),
            conversations: count(&conversations).map_err(&failed)?,
            payloads: count(&payloads).map_err(&failed)?,
            kept: self.kept(account, before).await?,
        })
    }

    async fn kept(&self, account: AccountId, before: Timestamp) -> Result<Vec<KeptByHold>, StoreError> {
        let failed = failed("looking what holds keep");
        let words = S::words();
        let mut kept = Vec::new();
        for hold in self.holds(false).await? {
            let mut sql = Sql::new(&*words, "SELECT count(*) AS n");
            from_old_messages(&mut sql, account, before);
            sql.push(" AND m.conversation_id IN (SELECT c.id FROM conversations c WHERE c.account_id = ")
                .bind_integer(account.0)
                .push(" AND ");
            is_held(&mut sql, Some(hold.id));
            sql.push(")");
            let found = self.select(sql.finish()).await.map_err(&failed)?;
            let messages = found.first().map_or(Ok(0), |row| row.integer("n")).map_err(&failed)?;
            if messages > 0 {
                kept.push(KeptByHold { hold: hold.id, messages });
            }
        }
        Ok(kept)
    }

    async fn last_run(&self) -> Result<Option<Timestamp>, StoreError> {
        let failed = failed("looking when messages were purged last");
        let words = S::words();
        let sql = Sql::new(
            &*words,
            "SELECT r.started_at FROM retention_runs r WHERE r.outcome = 'done' ORDER BY r.id DESC LIMIT 1",
        );
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.first().map(|row| row.time("started_at")).transpose().map_err(failed)
    }

    async fn last_signer(&self) -> Result<Option<String>, StoreError> {
        let failed = failed("looking who signed tombstones last");
        let words = S::words();
        let sql = Sql::new(
            &*words,
            "SELECT r.public_key FROM retention_runs r WHERE r.messages > 0 ORDER BY r.id DESC LIMIT 1",
        );
        let found = self.select(sql.finish()).await.map_err(&failed)?;
        found.first().map(|row| row.some_lossy_text("public_key")).transpose().map_err(failed)
    }

    async fn begin_run(
        &self,
        by: &str,
        node: &str,
        public_key: &str,
        replaces_own: bool,
    ) -> Result<i64, StoreError> {
        let (by, node, public_key) = (by.to_owned(), node.to_owned(), public_key.to_owned());
        self.writer()
            .run("beginning to purge", false, move |connection| -> BoxFuture<'_, _> {
                Box::pin(
                    async move { begin_within::<S>(connection, &by, &node, &public_key, replaces_own).await },
                )
            })
            .await
    }

    async fn purge(&self, batch: PurgeBatch) -> Result<Batch, StoreError> {
        self.writer()
            .run("purging messages", false, move |connection| -> BoxFuture<'_, _> {
                Box::pin(async move { purge_within::<S>(connection, &batch).await })
            })
            .await
    }

    async fn end_run(&self, run: i64, outcome: &'static str) -> Result<(), StoreError> {
        let words = S::words();
        let mut sql = Sql::new(&*words, "UPDATE retention_runs SET finished_at = ");
        sql.push(words.now()).push(", outcome = ").bind_text(outcome);
        sql.push(" WHERE id = ").bind_integer(run).push(" AND finished_at IS NULL RETURNING id");
        let statement = sql.finish();
        write(self, "ending a purge", statement).await.map(drop)
    }
}

fn hold(row: &impl Columns) -> Result<Hold, sqlx::Error> {
    Ok(Hold {
        id: row.integer("id")?,
        account: row.lossy_text("sip_uri")?,
        with_uri: row.lossy_text("with_uri")?,
        reason: row.some_lossy_text("reason")?,
        created_by: row.some_lossy_text("created_by")?,
        created_at: row.user_time("created_at")?,
        released_at: row.optional_user_time("released_at")?,
        released_by: row.lossy_text("released_by")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_may_differ_from_the_default_and_zero_keeps_for_ever() {
        let now: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
        let policy = |default_days| Policy { default_days, now };
        let before = |default_days, of_account| {
            policy(default_days).before(of_account).map(|before| before.to_string())
        };
        assert_eq!(before(0, None), None);
        assert_eq!(before(2, None).as_deref(), Some("2026-11-20T10:00:00Z"));
        assert_eq!(before(2, Some(1)).as_deref(), Some("2026-11-21T10:00:00Z"));
        assert_eq!(before(2, Some(0)), None);
        assert_eq!(before(0, Some(i64::MAX)).as_deref(), Some(Timestamp::MIN.to_string().as_str()));
    }
}
