//! How many messages the store takes in a second, beside the rate at which the very same rows go into the very same
//! tables by bare inserts.
//!
//! The store is this process's own, so nothing but the store is measured: many accounts at once commit one message
//! after the other, each with its cursor, as event channels do. Afterwards the rows are put aside, the tables are
//! emptied, and the rows are inserted again, many in a statement that is a transaction.

use anyhow::Context as _;
use futures_util::future::try_join_all;
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use super::{
    outside::{Database, Outside, Place},
    report::{Figure, Goal},
    stage::account,
};
use crate::{
    archive::fact::{
        ArchiveCommit, Content, ConversationFact, Direction, Fact, MessageFact, OperationStatus,
        ParticipantChange, ParticipantDetails, ParticipantFact, Person, Phase,
    },
    config::Config,
    identifiers::{AccountId, SessionId},
    store::{self, Auth, NewAccount, Role, SecretSource, SharedStore},
};

/// How many rows a bare statement inserts.
const BARE_BATCH: usize = 1000;
const NODE: &str = "bench";
const LEASE_TTL_S: u32 = 3600;

/// What is committed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// Accounts that commit at the same time.
    pub(super) accounts: usize,
    /// Messages of each.
    pub(super) messages: usize,
}

struct Member {
    account: AccountId,
    session: SessionId,
    conversation: String,
    writer: String,
}

/// Accounts that have messages to archive, and the store that takes them.
pub struct Archivists {
    store: SharedStore,
    members: Vec<Member>,
    /// The next message of each.
    next: usize,
}

/// Messages in a second, and as a share of bare inserts.
pub(super) async fn rate(database: &Database, extent: Extent) -> anyhow::Result<Vec<Figure>> {
    let place = Place::new(database).await?;
    let mut archivists = Archivists::sign_in(&place.url(), extent.accounts).await?;
    // The first ones prepare statements.
    let warm_up = extent.messages.div_ceil(10);
    archivists.archive(warm_up).await?;
    let mut outside = place.connect().await?;
    let warm = outside.number("SELECT max(id) FROM messages").await?;
    let began = Instant::now();
    archivists.archive(extent.messages).await?;
    let took = began.elapsed().as_secs_f64();
    archivists.close().await;
    let stored = outside.number("SELECT count(*) FROM messages WHERE chain_seq IS NOT NULL").await?;
    let all = extent.accounts * (extent.messages + warm_up);
    anyhow::ensure!(usize::try_from(stored)? == all, "{stored} of {all} messages are chained");
    let bare = insert_again(database, &mut outside, warm).await?;
    place.remove().await?;

    #[expect(clippy::cast_precision_loss, reason = "a number of messages")]
    let rate = (extent.accounts * extent.messages) as f64 / took;
    let figure = |name: &str, value, unit| Figure::new(name, value, unit).on(database.name());
    Ok(vec![
        figure("messages archived in a second", rate, "messages/s"),
        figure("the same as a share of bare inserts", rate / bare, "share")
            .beside(bare, format!("of the same rows a second, {BARE_BATCH} in a transaction"))
            .shall(Goal::AtLeast(0.5)),
    ])
}

impl Archivists {
    /// So many accounts of an empty database, each in a conversation.
    ///
    /// # Errors
    /// The database can't be opened, or refuses something.
    pub async fn sign_in(url: &str, accounts: usize) -> anyhow::Result<Self> {
        let mut config = Config::default();
        url.clone_into(&mut config.database.url);
        NODE.clone_into(&mut config.cluster.node_id);
        // Nobody renews the leases meanwhile.
        config.cluster.lease_ttl_s = LEASE_TTL_S;
        let store = store::connect(&config.store_settings(), Role::Server).await?;
        let added = (1..=accounts).map(async |number| {
            let name = account(number);
            let account = NewAccount {
                sip_uri: name.parse()?,
                username: name,
                auth: Auth::Password,
                secret: SecretSource::Missing,
                invitations: None,
            };
            store.add_account(&account).await.map_err(anyhow::Error::from)
        });
        let accounts = try_join_all(added).await?;
        if let Some(cluster) = store.cluster() {
            cluster.renew_leases().await?;
            cluster.acquire_leases(usize::MAX).await?;
        }
        let begun = accounts.into_iter().enumerate().map(async |(number, account)| {
            let application = format!("/ucwa/oauth/v1/applications/{number}");
            let session = store.begin_session(account, &application, "/events?ack=1", "").await?;
            let member = Member {
                account,
                session: session.id,
                conversation: format!("{application}/communication/conversations/1"),
                writer: format!("sip:writer.{number}@fabrikam.example"),
            };
            member.commit(&store, 2, member.begins()).await?;
            anyhow::Ok(member)
        });
        let members = try_join_all(begun).await?;
        Ok(Self { store, members, next: 3 })
    }

    /// Everybody commits so many messages, one after the other.
    ///
    /// # Errors
    /// The store refuses a message.
    pub async fn archive(&mut self, messages: usize) -> anyhow::Result<()> {
        let numbers = self.next..self.next + messages;
        self.next = numbers.end;
        let commits = self.members.iter().map(async |member| {
            for number in numbers.clone() {
                member.commit(&self.store, number, vec![member.says(number)]).await?;
            }
            anyhow::Ok(())
        });
        try_join_all(commits).await.map(drop)
    }

    /// Lets the database go.
    pub async fn close(self) {
        self.store.close().await;
    }
}

impl Member {
    async fn commit(&self, store: &SharedStore, cursor: usize, facts: Vec<Fact>) -> anyhow::Result<()> {
        let commit = ArchiveCommit {
            account: self.account,
            session: self.session,
            epoch: store.leases().epoch(self.account).context("the account is not held")?,
            cursor: Some(format!("/events?ack={cursor}")),
            received_at: Timestamp::now(),
            facts,
        };
        store.commit(commit).await?;
        Ok(())
    }

    fn begins(&self) -> Vec<Fact> {
        let conversation = ConversationFact {
            href: self.conversation.clone(),
            state: Some("Connected".to_owned()),
            thread_id: Some(format!("thread {}", self.account)),
            ..ConversationFact::default()
        };
        let joined = ParticipantFact {
            role: None,
            href: self.participant(),
            conversation_href: self.conversation.clone(),
            change: ParticipantChange::Joined,
            title: None,
            details: Some(ParticipantDetails {
                uri: Some(self.writer.clone()),
                ..ParticipantDetails::default()
            }),
            is_local: false,
        };
        vec![Fact::Conversation(conversation), Fact::Participant(joined)]
    }

    fn participant(&self) -> String {
        format!("{}/participants/{}", self.conversation, self.writer)
    }

    fn says(&self, number: usize) -> Fact {
        Fact::Message(MessageFact {
            conversation_href: self.conversation.clone(),
            href: format!("{}/messaging/messages/{number}", self.conversation),
            phase: Phase::Completed,
            direction: Some(Direction::Incoming),
            sender: Some(Person {
                contact_uri: None,
                href: Some(self.participant()),
                name: Some("A Writer".to_owned()),
                uri: Some(self.writer.clone()),
            }),
            content: Content {
                plain: Some(format!("Shall we meet at {}:00 in room {number}?", number % 24)),
                html: None,
            },
            sent_at: Some(Timestamp::now() - SignedDuration::from_secs(1)),
            unreadable_time: None,
            status: Some(OperationStatus::Success),
            reason: None,
            operation_id: None,
            failed_recipients: Vec::new(),
            link_only: false,
        })
    }
}

/// Inserts the messages after the one with id `after` again, into tables that hold the others; gives rows in a second.
async fn insert_again(database: &Database, outside: &mut Outside, after: i64) -> anyhow::Result<f64> {
    outside.run("CREATE TABLE bench_messages AS SELECT * FROM messages").await?;
    outside.run("CREATE UNIQUE INDEX bench_messages_id ON bench_messages (id)").await?;
    outside.run(&format!("DELETE FROM messages WHERE id > {after}")).await?;
    let last = outside.number("SELECT max(id) FROM bench_messages").await?;
    let batch = i64::try_from(BARE_BATCH)?;
    let mut inserted = 0;
    let began = Instant::now();
    for first in (after..last).step_by(BARE_BATCH) {
        let rows = format!("FROM bench_messages WHERE id > {first} AND id <= {}", first + batch);
        outside.run("BEGIN").await?;
        outside.run(&format!("INSERT INTO messages SELECT * {rows}")).await?;
        // PostgreSQL's index of words belongs to the table.
        if matches!(database, Database::Sqlite(_)) {
            outside.run(&format!("INSERT INTO messages_fts (rowid, body) SELECT id, body {rows}")).await?;
        }
        outside.run("COMMIT").await?;
        inserted += (last - first).min(batch);
    }
    #[expect(clippy::cast_precision_loss, reason = "a number of rows")]
    let inserted = inserted as f64;
    Ok(inserted / began.elapsed().as_secs_f64())
}
