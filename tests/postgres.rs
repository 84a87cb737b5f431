//! What only PostgreSQL promises, and what happens to the store when PostgreSQL is in trouble.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use jiff::Timestamp;
use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgListener};
use support::{
    postgres::{OwnServer, PostgresDatabase, rows},
    take_leases,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use ucwa_relay::{
    archive::{
        fact::{
            ArchiveCommit, Content, ConversationFact, Direction, Fact, MessageFact, OperationStatus, Person,
            Phase, SendFact, SendOutcome,
        },
        retry::RetryPolicy,
        workspace::RuleSettings,
    },
    identifiers::{AccountId, SipUri},
    store::{
        AccountState, Allowances, Auth, ClaimSettings, NewAccount, NewOutboxRow, OutboxState, Role,
        SecretSource, Session, SharedStore, StoreError, StoreSettings, connect,
    },
};

const NODE: &str = "node-1";
const TALK: &str = "/conversations/7";
/// Longest time that anything may take; a healthy run needs a fraction of it.
const PATIENCE: Duration = Duration::from_secs(120);

// ------------------------------------------------------------------------------------------------ support

fn settings(url: &str) -> StoreSettings {
    StoreSettings {
        url: url.to_owned(),
        max_connections: 2,
        commit_interval: Duration::from_millis(2),
        full_text: true,
        node: NODE.to_owned(),
        lease_ttl: Duration::from_secs(3600),
        rules: RuleSettings {
            plain_from_html: str::to_owned,
            retry: RetryPolicy { base: Duration::from_secs(30), cap: Duration::from_secs(600) },
            max_attempts: 5,
            retry_uncertain: false,
            typing: false,
        },
    }
}

async fn serve(url: &str) -> SharedStore {
    connect(&settings(url), Role::Server).await.unwrap()
}

fn uri(name: &str) -> SipUri {
    format!("{name}@contoso.com").parse().unwrap()
}

struct Online {
    store: SharedStore,
    account: AccountId,
    session: Session,
}

impl Online {
    async fn new(store: &SharedStore, name: &str) -> Self {
        let account = NewAccount {
            sip_uri: uri(name),
            username: name.to_owned(),
            auth: Auth::Password,
            secret: SecretSource::Missing,
            invitations: None,
        };
        let account = store.add_account(&account).await.unwrap();
        take_leases(store).await;
        let session = store.begin_session(account, "/applications/1", "/e?ack=1", "").await.unwrap();
        store.record_state(account, AccountState::Online, None, NODE).await.unwrap();
        Self { store: store.clone(), account, session }
    }

    fn commit_of(&self, ack: u32, facts: Vec<Fact>) -> ArchiveCommit {
        ArchiveCommit {
            account: self.account,
            session: self.session.id,
            epoch: self.store.leases().epoch(self.account).unwrap(),
            cursor: Some(format!("/e?ack={ack}")),
            received_at: Timestamp::now(),
            facts,
        }
    }

    async fn commit(&self, ack: u32, facts: Vec<Fact>) -> Result<(), StoreError> {
        self.store.commit(self.commit_of(ack, facts)).await.map(drop)
    }

    /// As an event channel does: again until the database takes it.
    async fn commit_until_stored(&self, ack: u32, facts: Vec<Fact>) {
        let deadline = Instant::now() + PATIENCE;
        let commit = self.commit_of(ack, facts);
        while let Err(error) = self.store.commit(commit.clone()).await {
            assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
            assert!(Instant::now() < deadline, "not stored in time: {error:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn conversation() -> Fact {
    Fact::Conversation(ConversationFact { href: TALK.to_owned(), ..ConversationFact::default() })
}

fn message(number: u32, text: &str) -> Fact {
    Fact::Message(MessageFact {
        conversation_href: TALK.to_owned(),
        href: format!("{TALK}/messages/{number}"),
        phase: Phase::Completed,
        direction: Some(Direction::Incoming),
        sender: Some(Person {
            href: None,
            uri: Some("sip:bob@contoso.com".to_owned()),
            name: Some("Bob".to_owned()),
            contact_uri: None,
        }),
        content: Content { plain: Some(text.to_owned()), html: None },
        sent_at: Some(Timestamp::now()),
        status: Some(OperationStatus::Success),
        reason: None,
        operation_id: None,
        failed_recipients: Vec::new(),
        link_only: false,
        unreadable_time: None,
    })
}

fn link(number: u32) -> Fact {
    let Fact::Message(message) = message(number, "") else { unreachable!("it is a message") };
    Fact::Message(MessageFact {
        direction: None,
        sender: None,
        content: Content::default(),
        status: None,
        phase: Phase::Started,
        link_only: true,
        ..message
    })
}

fn to_bob() -> NewOutboxRow {
    NewOutboxRow {
        account: "alice@contoso.com".to_owned(),
        recipients: "bob@contoso.com".to_owned(),
        body: "Deploy finished".to_owned(),
        ..NewOutboxRow::default()
    }
}

fn claiming() -> ClaimSettings {
    ClaimSettings {
        node: NODE.to_owned(),
        max_attempts: 3,
        max_body_bytes: 1000,
        limit: 100,
        allowances: Allowances::UNLIMITED,
    }
}

async fn run(connection: &mut PgConnection, sql: &str) -> Result<(), String> {
    let query = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
    query.execute(connection).await.map(drop).map_err(|error| error.to_string())
}

async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

// ------------------------------------------------------------------------------------------------ schema

/// What docs/scaling.md tells Citus: every table is spread by account, copied to every machine, or stays in one place.
fn spread() -> (Vec<String>, Vec<String>, Vec<String>) {
    let documentation = include_str!("../docs/scaling.md");
    let named = |call: &str| -> Vec<String> {
        documentation
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("SELECT {call}('"))?.split('\'').next())
            .map(ToOwned::to_owned)
            .collect()
    };
    let kept = documentation.lines().find_map(|line| line.strip_prefix("-- stay in one place: ")).unwrap();
    let kept = kept.split(", ").map(ToOwned::to_owned).collect();
    (named("create_distributed_table"), named("create_reference_table"), kept)
}

#[tokio::test]
async fn nothing_stands_in_the_way_of_spreading_the_archive_by_account() {
    let database = PostgresDatabase::new().await;
    serve(database.url()).await.close().await;
    let mut sql = database.connect().await;
    let (distributed, reference, local) = spread();
    let mut classified: Vec<_> = [distributed.as_slice(), &reference, &local].concat();
    classified.sort();
    let tables = "SELECT relname::text FROM pg_class
                   WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace ORDER BY relname COLLATE \"C\"";
    assert_eq!(rows(&mut sql, tables).await, classified, "every table is one of the three");
    let list = |tables: &[String]| format!("('{}')", tables.join("', '"));
    let (distributed, reference) = (list(&distributed), list(&reference));
    let columns = |table: &str, numbers: &str| {
        format!(
            "ARRAY(SELECT a.attname::text FROM unnest({numbers}) WITH ORDINALITY AS n (number, place)
                     JOIN pg_attribute a ON a.attrelid = {table} AND a.attnum = n.number ORDER BY n.place)"
        )
    };
    // Every primary and unique key of a table that is spread begins with the account.
    let unique = format!(
        "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class t ON t.oid = i.indrelid
          WHERE (i.indisunique OR i.indisexclusion) AND t.relname IN {distributed} AND ({})[1] <> 'account_id'",
        columns("i.indrelid", "i.indkey::smallint[]")
    );
    assert_eq!(rows(&mut sql, &unique).await, [""; 0]);
    // A foreign key leads from one such table to another and carries the account on both sides in the same place, or to a
    // table that every machine has; none leads into or out of what stays in one place.
    let (from, to) = (columns("k.conrelid", "k.conkey"), columns("k.confrelid", "k.confkey"));
    let foreign = format!(
        "SELECT k.conrelid::regclass || '.' || k.conname FROM pg_constraint k
           JOIN pg_class f ON f.oid = k.conrelid JOIN pg_class t ON t.oid = k.confrelid
          WHERE k.contype = 'f' AND (f.relname IN {distributed} OR t.relname IN {distributed})
            AND NOT (f.relname IN {distributed} AND t.relname IN {reference} AND NOT k.condeferrable)
            AND NOT (f.relname IN {distributed} AND t.relname IN {distributed} AND ({from})[1] = 'account_id'
                     AND ({to})[1] = 'account_id' AND NOT k.condeferrable)"
    );
    assert_eq!(rows(&mut sql, &foreign).await, [""; 0]);
    // Citus spreads no table that has a trigger.
    let triggers = format!(
        "SELECT t.relname || '.' || g.tgname FROM pg_trigger g JOIN pg_class t ON t.oid = g.tgrelid
          WHERE NOT g.tgisinternal AND t.relname IN {distributed}"
    );
    assert_eq!(rows(&mut sql, &triggers).await, [""; 0]);
    let some = format!(
        "SELECT count(*) > 5 FROM pg_constraint k JOIN pg_class f ON f.oid = k.conrelid
          WHERE k.contype = 'f' AND f.relname IN {distributed}"
    );
    assert_eq!(rows(&mut sql, &some).await, ["1"], "there are foreign keys to look at");
}

#[tokio::test]
async fn both_schemas_have_the_same_tables_and_columns() {
    let database = PostgresDatabase::new().await;
    serve(database.url()).await.close().await;
    let mut theirs = rows(
        &mut database.connect().await,
        "SELECT table_name || '.' || column_name FROM information_schema.columns
          WHERE table_schema = 'public' AND table_name <> '_sqlx_migrations'
            AND (table_name, column_name) <> ('outbox', 'inserted_by') AND table_name <> 'writers'",
    )
    .await;
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("relay.db").display());
    connect(&StoreSettings { full_text: false, ..settings(&url) }, Role::Server).await.unwrap().close().await;
    let mut sqlite = sqlx::SqliteConnection::connect(&url).await.unwrap();
    let mut ours: Vec<String> = sqlx::query_scalar(
        "SELECT t.name || '.' || c.name FROM sqlite_schema t JOIN pragma_table_info(t.name) c
          WHERE t.type IN ('table', 'view') AND t.name NOT LIKE 'sqlite_%' AND t.name <> '_sqlx_migrations'",
    )
    .fetch_all(&mut sqlite)
    .await
    .unwrap();
    ours.sort();
    theirs.sort();
    assert_eq!(ours, theirs);
}

#[tokio::test]
async fn readers_read_everything_and_senders_their_own_rows() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    alice.commit(2, vec![conversation(), message(1, "Hi")]).await.unwrap();
    store.enqueue(&to_bob()).await.unwrap();
    let mut owner = database.connect().await;
    let mut users = Vec::new();
    for role in ["ucwa_relay_reader", "ucwa_relay_sender", "ucwa_relay_sender"] {
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        run(&mut owner, &format!("CREATE ROLE {name} LOGIN PASSWORD 'x' IN ROLE {role}")).await.unwrap();
        let mut url: url::Url = database.url().parse().unwrap();
        url.set_username(&name).unwrap();
        url.set_password(Some("x")).unwrap();
        users.push((name, PgConnection::connect(url.as_str()).await.unwrap()));
    }
    let [(_, reader), (_, sender), (_, other)] = users.as_mut_slice() else {
        unreachable!("there are three")
    };

    assert_eq!(rows(reader, "SELECT body FROM message_history").await, ["Hi"]);
    assert_eq!(rows(reader, "SELECT body FROM outbox").await, ["Deploy finished"]);
    assert_eq!(rows(reader, "SELECT sip_uri FROM accounts").await, ["sip:alice@contoso.com"]);
    for refused in
        ["SELECT secret_sealed FROM accounts", "DELETE FROM messages", "INSERT INTO outbox DEFAULT VALUES"]
    {
        assert!(run(reader, refused).await.unwrap_err().contains("permission denied"), "{refused}");
    }

    let insert = "INSERT INTO outbox (account, recipients, body) VALUES ('alice@contoso.com', 'carol@contoso.com', 'mine')";
    let returned = rows(sender, &format!("{insert} RETURNING state")).await;
    assert_eq!(returned, ["queued"]);
    assert_eq!(rows(sender, "SELECT body FROM outbox").await, ["mine"]);
    assert_eq!(rows(other, "SELECT body FROM outbox").await, [""; 0]);
    for refused in [
        "SELECT 1 FROM messages",
        "INSERT INTO outbox (account, body, inserted_by) VALUES ('a', 'b', 'somebody')",
        "INSERT INTO outbox (account, body, operation_id) VALUES ('a', 'b', 'c')",
        "UPDATE outbox SET attempts = 0",
        "UPDATE outbox SET revision = 7, state = 'sent'",
        "DELETE FROM outbox",
    ] {
        assert!(run(sender, refused).await.unwrap_err().contains("permission denied"), "{refused}");
    }
    // Its own rows a sender may hold, release, withdraw and correct, as far as their state allows; nobody else's.
    for (change, state) in [
        ("state = 'held'", "held"),
        ("state = 'queued', recipients = 'dan@contoso.com'", "queued"),
        ("state = 'cancelled'", "cancelled"),
    ] {
        assert_eq!(run(other, &format!("UPDATE outbox SET {change}")).await, Ok(()));
        run(sender, &format!("UPDATE outbox SET {change}")).await.unwrap();
        assert_eq!(rows(sender, "SELECT state FROM outbox").await, [state]);
    }
    let refused = run(sender, "UPDATE outbox SET state = 'delivered'").await.unwrap_err();
    assert!(refused.contains("set by the service"), "{refused}");
    run(sender, insert).await.unwrap();
    let claimed = store.claim_due(Timestamp::now(), &claiming()).await.unwrap();
    assert_eq!(claimed.len(), 2, "the service sees all of them");
    for (name, connection) in users {
        connection.close().await.unwrap();
        run(&mut owner, &format!("DROP ROLE {name}")).await.unwrap();
    }
}

#[tokio::test]
async fn text_is_found_without_case_accents_and_spaces() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    let facts =
        vec![conversation(), message(1, "Grüße aus Köln"), message(2, "会議は明日です"), message(3, "พรุ่งนี้")];
    alice.commit(2, facts).await.unwrap();
    let mut sql = database.connect().await;
    run(&mut sql, "SET enable_seqscan = off").await.unwrap();
    for (words, found) in [
        ("koln", "1"),
        ("köl GRU", "1"),
        ("öln", ""),
        ("GRÜSSE", ""),
        ("GRÜẞE", "1"),
        ("明日", "2"),
        ("明後", ""),
        ("พรุ่ง", "3"),
    ] {
        let query =
            format!("SELECT id FROM messages WHERE ucwa_relay_search(body) @@ ucwa_relay_query('{words}')");
        assert_eq!(rows(&mut sql, &query).await.join(","), found, "{words}");
        let plan = rows(&mut sql, &format!("EXPLAIN {query}")).await.join("\n");
        assert!(plan.contains("messages_fts"), "{plan}");
    }
    // As autovacuum does it.
    let mut vacuum = database.connect().await;
    run(&mut vacuum, "SET search_path = ''").await.unwrap();
    run(&mut vacuum, "ANALYZE public.messages").await.unwrap();
    store.close().await;
    let without = StoreSettings { full_text: false, ..settings(database.url()) };
    connect(&without, Role::Server).await.unwrap().close().await;
    assert_eq!(rows(&mut sql, "SELECT to_regclass('messages_fts') IS NULL").await, ["1"]);
    serve(database.url()).await.close().await;
    assert_eq!(rows(&mut sql, "SELECT to_regclass('messages_fts') IS NULL").await, ["0"]);
}

#[tokio::test]
async fn an_account_that_cannot_be_read_stops_no_other() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    Online::new(&store, "alice").await;
    let mut sql = database.connect().await;
    run(
        &mut sql,
        "INSERT INTO accounts (sip_uri, username) VALUES ('sip:@x', 'x'), ('sip:alice@contoso.com ', 'y')",
    )
    .await
    .unwrap();
    take_leases(&store).await;
    assert_eq!(store.accounts().await.unwrap().len(), 1);
    let shown = "SELECT state, detail LIKE 'sip_uri %correct%' FROM account_status ORDER BY account_id";
    assert_eq!(rows(&mut sql, shown).await[1..], ["needs_attention|1", "needs_attention|1"]);
}

// ------------------------------------------------------------------------------------------------ notices

#[tokio::test]
async fn every_message_is_announced_when_its_text_is_there() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    let mut listener = PgListener::connect(database.url()).await.unwrap();
    listener.listen("ucwa_relay_messages").await.unwrap();
    alice.commit(2, vec![conversation(), link(1), message(2, "two")]).await.unwrap();
    alice.commit(3, vec![message(3, "three")]).await.unwrap();
    alice.commit(3, vec![message(3, "three")]).await.unwrap();
    alice.commit(4, vec![message(1, "one")]).await.unwrap();
    for id in [2, 3, 1] {
        let notice = tokio::time::timeout(PATIENCE, listener.recv()).await.unwrap().unwrap();
        assert_eq!(notice.payload(), format!("{{\"account_id\":1,\"message_id\":{id}}}"));
    }
}

#[tokio::test]
async fn a_statement_of_a_user_is_one_notice_and_the_services_are_none() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    Online::new(&store, "alice").await;
    let mut listener = PgListener::connect(database.url()).await.unwrap();
    listener.listen("ucwa_relay_outbox").await.unwrap();
    let mut sql = database.connect().await;
    let insert = "INSERT INTO outbox (account, recipients, body)
                  SELECT 'alice@contoso.com', 'bob@contoso.com', 'text ' || n FROM generate_series(1, 50) n";
    run(&mut sql, insert).await.unwrap();
    assert_eq!(store.claim_due(Timestamp::now(), &claiming()).await.unwrap().len(), 1);
    run(&mut sql, "UPDATE outbox SET state = 'held' WHERE state = 'queued'").await.unwrap();
    run(&mut sql, "UPDATE outbox SET state = 'queued' WHERE state = 'held'").await.unwrap();
    run(&mut sql, "NOTIFY ucwa_relay_outbox, 'end'").await.unwrap();
    let mut notices = Vec::new();
    while notices.last().is_none_or(|last| last != "end") {
        let notice = tokio::time::timeout(PATIENCE, listener.recv()).await.unwrap().unwrap();
        notices.push(notice.payload().to_owned());
    }
    assert_eq!(notices, ["", "", "end"]);
}

/// The planner knows nothing of a young table, and little of one into which a burst has just been inserted.
#[tokio::test]
async fn a_claim_reads_the_heads_of_the_queue_and_not_the_queue() {
    const ROWS: i64 = 10_000;
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    let mut sql = database.connect().await;
    run(&mut sql, "ALTER TABLE outbox SET (autovacuum_enabled = off)").await.unwrap();
    let insert = format!(
        "INSERT INTO outbox (account, recipients, body)
         SELECT 'alice@contoso.com', 'bob' || n % 50 || '@contoso.com', 'text' FROM generate_series(1, {ROWS}) n"
    );
    run(&mut sql, &insert).await.unwrap();
    while !rows(&mut sql, "SELECT id FROM outbox WHERE destination IS NULL LIMIT 1").await.is_empty() {
        store.claim_due(Timestamp::now(), &claiming()).await.unwrap();
    }
    run(&mut sql, "UPDATE outbox SET state = 'delivered', revision = revision + 1 WHERE state = 'sending'")
        .await
        .unwrap();
    store.close().await;
    sql.close().await.unwrap();
    let before = outbox_entries_read(&database).await;

    let store = serve(database.url()).await;
    take_leases(&store).await;
    store.record_state(alice.account, AccountState::Online, None, NODE).await.unwrap();
    assert_eq!(store.claim_due(Timestamp::now(), &claiming()).await.unwrap().len(), 50);
    store.close().await;
    let read = outbox_entries_read(&database).await - before;
    assert!(read < ROWS / 2, "{read} entries were read for 50 of {ROWS} rows");
}

/// A burst of one account must not make looking at its new rows dearer, and with it everybody's transactions.
#[tokio::test]
async fn an_admission_reads_what_it_admits_and_not_the_queue() {
    const ROWS: i64 = 40_000;
    const ACCOUNTS: i64 = 20;
    const CLAIMS: i64 = 10;
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let mut online = Vec::new();
    for account in 0..ACCOUNTS {
        online.push(Online::new(&store, &format!("somebody.of.accounting.{account}")).await);
    }
    let mut sql = database.connect().await;
    // What the planner knows is from when the queue was empty.
    run(&mut sql, "ALTER TABLE outbox SET (autovacuum_enabled = off); ANALYZE outbox").await.unwrap();
    let insert = format!(
        "INSERT INTO outbox (account, recipients, body)
         SELECT 'somebody.of.accounting.' || n % {ACCOUNTS} || '@contoso.com', 'bob' || n % 5 || '@contoso.com', 'text'
           FROM generate_series(1, {ROWS}) n"
    );
    run(&mut sql, &insert).await.unwrap();
    store.close().await;
    sql.close().await.unwrap();
    let before = outbox_entries_read(&database).await;

    let store = serve(database.url()).await;
    take_leases(&store).await;
    for account in &online {
        store.record_state(account.account, AccountState::Online, None, NODE).await.unwrap();
    }
    for _ in 0..CLAIMS {
        store.claim_due(Timestamp::now(), &claiming()).await.unwrap();
    }
    store.close().await;
    let read = outbox_entries_read(&database).await - before;
    let mut sql = database.connect().await;
    let admitted = rows(&mut sql, "SELECT id FROM outbox WHERE destination IS NOT NULL").await;
    assert_eq!(admitted.len(), usize::try_from(CLAIMS).unwrap() * 200);
    assert!(read < ROWS, "{read} entries were read for {} of {ROWS} rows", admitted.len());
}

/// Entries of indexes and rows of the table that were read of the queue. A backend may keep what it has read to itself
/// until it ends, so the store and every connection of the test have to be closed, and none is kept open here.
async fn outbox_entries_read(database: &PostgresDatabase) -> i64 {
    let mut sql = database.connect().await;
    let backends = "SELECT pid::text || ' ' || query FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid()
                       AND backend_type = 'client backend'";
    eventually("every other connection is closed", async || {
        rows(&mut sql, backends).await.is_empty().then_some(())
    })
    .await;
    let read = "SELECT (sum(idx_tup_read) + (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'outbox'))::bigint
                  FROM pg_stat_user_indexes WHERE relname = 'outbox'";
    let read = rows(&mut sql, read).await[0].parse().unwrap();
    sql.close().await.unwrap();
    read
}

#[tokio::test]
async fn a_listener_that_is_cut_off_listens_again() {
    const LISTENERS: &str = "SELECT pid::text FROM pg_stat_activity
                              WHERE application_name = 'ucwa-relay listener' AND datname = current_database()
                                AND query LIKE 'LISTEN %'";
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let mut sql = database.connect().await;
    let first = eventually("it listens", async || rows(&mut sql, LISTENERS).await.pop()).await;
    run(&mut sql, &format!("SELECT pg_terminate_backend({first})")).await.unwrap();
    eventually("it listens again", async || {
        rows(&mut sql, LISTENERS).await.pop().filter(|listener| *listener != first)
    })
    .await;
    // It wakes whoever waits once by itself, for what came meanwhile.
    while tokio::time::timeout(Duration::from_millis(500), store.outbox_changed(PATIENCE)).await.is_ok() {}
    let insert = "INSERT INTO outbox (account, recipients, body) VALUES ('a@b.c', 'd@e.f', 'x')";
    run(&mut sql, insert).await.unwrap();
    tokio::time::timeout(PATIENCE, store.outbox_changed(PATIENCE * 2)).await.unwrap();
}

// ------------------------------------------------------------------------------------------------ trouble

#[tokio::test]
async fn a_nul_spoils_no_batch() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    let carol = Online::new(&store, "carol").await;
    store.set_display_name(alice.account, "A\0lice").await.unwrap();
    let outcomes = join_all([
        alice.commit(2, vec![conversation(), message(1, "a\0b")]),
        carol.commit(2, vec![conversation(), message(1, "c")]),
    ])
    .await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let mut bodies = rows(&mut database.connect().await, "SELECT body FROM messages").await;
    bodies.sort();
    assert_eq!(bodies[1], "c");
    assert!(
        bodies[0].starts_with('a') && bodies[0].ends_with('b') && bodies[0].chars().count() == 3,
        "{bodies:?}"
    );
}

#[tokio::test]
async fn a_transaction_that_is_cut_off_at_its_commit_is_done_again() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    let mut sql = database.connect().await;
    // A sequence counts whatever becomes of the transaction: only the first one is cut off.
    run(
        &mut sql,
        "CREATE SEQUENCE cuts;
         CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF nextval('cuts') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
             RETURN NULL;
         END $$;
         CREATE CONSTRAINT TRIGGER cut AFTER INSERT ON messages DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION cut()",
    )
    .await
    .unwrap();
    alice.commit(2, vec![conversation(), message(1, "Hi")]).await.unwrap();
    let cuts = rows(&mut sql, "SELECT last_value FROM cuts").await;
    assert_eq!(cuts, ["2"], "the first commit was cut off and the second was not");
    assert_eq!(rows(&mut sql, "SELECT body, chain_seq FROM messages").await, ["Hi|1"]);
}

/// Passes bytes on until it is told to swallow the answer to the next COMMIT and to hang up.
async fn proxy_to(server: String, swallows: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (server, swallows) = (server.clone(), Arc::clone(&swallows));
            tokio::spawn(async move {
                let mut server = TcpStream::connect(server).await.unwrap();
                let (mut asked, mut answered) = (vec![0; 65536], vec![0; 65536]);
                let mut committing = false;
                loop {
                    tokio::select! {
                        Ok(count @ 1..) = client.read(&mut asked) => {
                            let is_commit = asked[..count].windows(6).any(|bytes| bytes == b"COMMIT");
                            committing |= is_commit && swallows.swap(false, Ordering::SeqCst);
                            server.write_all(&asked[..count]).await.unwrap();
                        }
                        Ok(count @ 1..) = server.read(&mut answered) => {
                            // The transaction is durable; nobody will hear of it.
                            if committing || client.write_all(&answered[..count]).await.is_err() {
                                return;
                            }
                        }
                        else => return,
                    }
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_not_done_twice() {
    let database = PostgresDatabase::new().await;
    let mut url: url::Url = database.url().parse().unwrap();
    let server = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5432));
    let swallows = Arc::new(AtomicBool::new(false));
    url.set_port(Some(proxy_to(server, Arc::clone(&swallows)).await)).unwrap();
    let store = serve(url.as_str()).await;
    let alice = Online::new(&store, "alice").await;
    let mut sql = database.connect().await;

    // Neither has a key that would tell a repetition.
    swallows.store(true, Ordering::SeqCst);
    let id = store.enqueue(&to_bob()).await.unwrap();
    assert!(!swallows.load(Ordering::SeqCst), "an answer was lost");
    assert_eq!(rows(&mut sql, "SELECT id, state FROM outbox").await, [format!("{}|queued", id.0)]);
    swallows.store(true, Ordering::SeqCst);
    let claimed = store.claim_due(Timestamp::now(), &claiming()).await.unwrap();
    assert!(!swallows.load(Ordering::SeqCst), "an answer was lost");
    assert_eq!((claimed.len(), claimed[0].attempt), (1, 1), "who asked gets what was claimed");
    assert_eq!(rows(&mut sql, "SELECT attempts, state FROM outbox").await, ["1|sending"]);

    swallows.store(true, Ordering::SeqCst);
    alice.commit(2, vec![conversation(), message(1, "Hi")]).await.unwrap();
    assert!(!swallows.load(Ordering::SeqCst), "an answer was lost");
    assert_eq!(rows(&mut sql, "SELECT body, chain_seq FROM messages").await, ["Hi|1"]);
}

#[tokio::test]
async fn a_database_that_takes_no_writes_holds_back_and_goes_on() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    let mut sql = database.connect().await;
    let name = rows(&mut sql, "SELECT current_database()::text").await.remove(0);
    let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
    for (read_only, taken) in [("on", false), ("off", true)] {
        let set = format!("ALTER DATABASE {name} SET default_transaction_read_only = {read_only}");
        run(&mut sql, &set).await.unwrap();
        run(&mut sql, others).await.unwrap();
        let outcome = alice.commit(2, vec![conversation(), message(1, "Hi")]).await;
        match outcome {
            Ok(()) => assert!(taken),
            Err(error) => assert!(!taken && matches!(error, StoreError::Unavailable { .. }), "{error:?}"),
        }
        assert_eq!(rows(&mut sql, "SELECT count(*) FROM messages").await, [i32::from(taken).to_string()]);
    }
}

#[tokio::test]
async fn a_users_open_transaction_holds_up_no_other_account() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    // So many that nobody's transaction would end in time if each of them waited for the user by itself.
    let mut held_up = Vec::new();
    for number in 0..40 {
        let name = format!("sender{number}");
        held_up.push(Online::new(&store, &name).await);
        store.enqueue(&NewOutboxRow { account: uri(&name).to_string(), ..to_bob() }).await.unwrap();
    }
    let carol = Online::new(&store, "carol").await;
    assert_eq!(store.claim_due(Timestamp::now(), &claiming()).await.unwrap().len(), held_up.len());
    let mut sql = database.connect().await;
    run(&mut sql, "BEGIN; UPDATE outbox SET correlation = 'mine'").await.unwrap();
    // A message of their own may be what the queue is sending.
    let Fact::Message(ours) = message(1, "Deploy finished") else { unreachable!("it is a message") };
    let ours = Fact::Message(MessageFact { direction: Some(Direction::Outgoing), sender: None, ..ours });
    let sending = held_up.iter().map(|account| account.commit(2, vec![conversation(), ours.clone()]));
    let (outcomes, bystander) =
        futures_util::join!(join_all(sending), carol.commit(2, vec![conversation(), message(1, "Hi")]));
    for outcome in &outcomes {
        assert!(matches!(outcome, Err(StoreError::Unavailable { .. })), "{outcome:?}");
    }
    assert!(bystander.is_ok(), "{bystander:?}");
    run(&mut sql, "COMMIT").await.unwrap();
    for account in &held_up {
        account.commit(2, vec![conversation(), ours.clone()]).await.unwrap();
    }
    assert_eq!(rows(&mut sql, "SELECT count(*) FROM messages").await, ["41"]);
}

/// Whoever does not wait long for rows waits for the turn all the same.
#[tokio::test]
async fn another_servers_turn_beside_a_users_open_transaction_holds_up_nobody() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let alice = Online::new(&store, "alice").await;
    let carol = Online::new(&store, "carol").await;
    store.enqueue(&NewOutboxRow { account: uri("alice").to_string(), ..to_bob() }).await.unwrap();
    assert_eq!(store.claim_due(Timestamp::now(), &claiming()).await.unwrap().len(), 1);
    let mut sql = database.connect().await;
    run(&mut sql, "BEGIN; UPDATE outbox SET correlation = 'mine'").await.unwrap();
    let mut other = database.connect().await;
    let other_server = tokio::spawn(async move {
        loop {
            run(&mut other, "SELECT ucwa_relay_last_ids(), pg_sleep(0.1)").await.unwrap();
        }
    });
    let Fact::Message(ours) = message(1, "Deploy finished") else { unreachable!("it is a message") };
    let ours = Fact::Message(MessageFact { direction: Some(Direction::Outgoing), sender: None, ..ours });
    let (held_up, bystander) = futures_util::join!(
        alice.commit(2, vec![conversation(), ours]),
        carol.commit(2, vec![conversation(), message(1, "Hi")])
    );
    other_server.abort();
    assert!(matches!(held_up, Err(StoreError::Unavailable { .. })), "{held_up:?}");
    assert!(bystander.is_ok(), "{bystander:?}");
}

/// What a call without events said is archived the next time, and nobody else waits for that.
#[tokio::test]
async fn a_users_open_transaction_stops_no_settling() {
    let database = PostgresDatabase::new().await;
    let store = serve(database.url()).await;
    let mut sql = database.connect().await;
    for (number, name) in ["alice", "carol"].into_iter().enumerate() {
        let account = Online::new(&store, name).await;
        store.enqueue(&NewOutboxRow { account: uri(name).to_string(), ..to_bob() }).await.unwrap();
        let send = store.claim_due(Timestamp::now(), &claiming()).await.unwrap().remove(0);
        let called = SendFact {
            outbox: send.outbox,
            operation_id: send.operation_id,
            outcome: SendOutcome::InvitationAccepted {
                invitation_href: Some(format!("/invitations/{number}")),
            },
        };
        account.commit(2, vec![Fact::Send(called)]).await.unwrap();
    }
    let mut user = database.connect().await;
    run(&mut user, "BEGIN; UPDATE outbox SET correlation = 'mine' WHERE id = 1").await.unwrap();
    let later = Timestamp::now() + Duration::from_secs(61);
    store.settle_overdue(later).await.unwrap();
    assert_eq!(rows(&mut sql, "SELECT outbox_id FROM messages").await, ["2"]);
    run(&mut user, "ROLLBACK").await.unwrap();
    store.settle_overdue(later).await.unwrap();
    assert_eq!(rows(&mut sql, "SELECT outbox_id FROM messages ORDER BY 1").await, ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn crashes_of_the_server_under_load_lose_and_double_nothing() {
    const ACCOUNTS: u32 = 8;
    const CRASHES: usize = 5;
    let server = OwnServer::start();
    let database = PostgresDatabase::on(&server.admin_url()).await;
    let store = serve(database.url()).await;
    let mut accounts = Vec::new();
    for number in 0..ACCOUNTS {
        accounts.push(Online::new(&store, &format!("user{number}")).await);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let traffic: Vec<_> = accounts
        .into_iter()
        .map(|account| {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                let mut said = 0;
                while !stop.load(Ordering::Relaxed) {
                    said += 1;
                    account.commit_until_stored(said + 1, vec![message(said, &format!("text {said}"))]).await;
                }
                (account.account.0, said)
            })
        })
        .collect();
    for _ in 0..CRASHES {
        let before = eventually("messages arrive", async || {
            let mut sql = PgConnection::connect(database.url()).await.ok()?;
            Some(rows(&mut sql, "SELECT count(*) FROM messages").await.remove(0))
        })
        .await;
        eventually("more messages arrive", async || {
            let mut sql = PgConnection::connect(database.url()).await.ok()?;
            (rows(&mut sql, "SELECT count(*) FROM messages").await.remove(0) != before).then_some(())
        })
        .await;
        server.stop_immediately();
        server.start_again();
    }
    stop.store(true, Ordering::Relaxed);
    let mut expected = Vec::new();
    for account in join_all(traffic).await {
        let (account, said) = account.unwrap();
        expected.push(format!("{account}|{said}|{said}|{said}|{said}"));
    }
    let mut sql = database.connect().await;
    let stored = "SELECT m.account_id, count(*), count(DISTINCT m.body), max(m.chain_seq), max(h.seq)
                    FROM messages m JOIN chain_heads h ON h.account_id = m.account_id
                   GROUP BY m.account_id ORDER BY m.account_id";
    assert_eq!(rows(&mut sql, stored).await, expected);
    // Writing in the queue goes on, too.
    let id = store.enqueue(&to_bob()).await.unwrap();
    let (row, _) = store.outbox_row(id).await.unwrap().unwrap();
    assert_eq!(row.state, OutboxState::Queued);
    store.close().await;
}

#[tokio::test]
async fn a_database_that_cannot_be_opened_says_what_to_do() {
    let database = PostgresDatabase::new().await;
    let change = |change: &dyn Fn(&mut url::Url)| {
        let mut url: url::Url = database.url().parse().unwrap();
        url.set_password(Some("geheim")).unwrap();
        change(&mut url);
        url.to_string()
    };
    for (url, words) in [
        (change(&|url| url.set_path("nowhere")), "createdb"),
        (change(&|url| url.set_username("nobody_at_all").unwrap()), "createuser"),
        (change(&|url| url.set_port(Some(1)).unwrap()), "is the server running"),
    ] {
        let error = connect(&settings(&url), Role::Tool).await.err().unwrap();
        let told = ucwa_relay::error_chain(&error);
        assert!(told.contains(words) && !told.contains("geheim"), "{told}");
        assert!(!format!("{error:?}").contains("geheim"));
    }
}

// ------------------------------------------------------------------------------------------------ commands

#[tokio::test]
async fn every_command_works_on_it() {
    let database = PostgresDatabase::new().await;
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ucwa-relay"));
        let output = command.current_dir(folder.path()).args(arguments).output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {words}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["init", "--database", database.url()]);
    run(&["migrate"]);
    std::fs::write(folder.path().join("password"), "geheim").unwrap();
    run(&["account", "add", "alice@contoso.com", "--username", "alice", "--password-file", "password"]);
    assert!(run(&["account", "list"]).contains("sip:alice@contoso.com"));
    run(&["send", "--from", "alice@contoso.com", "--to", "bob@contoso.com", "Deploy finished"]);
    assert!(run(&["outbox", "list"]).contains("queued"));
    run(&["outbox", "cancel", "1"]);
    assert!(run(&["outbox", "show", "1"]).contains("cancelled"));
    assert!(run(&["outbox", "shape", "--state", "cancelled"]).starts_with("\tT\t5\t10\t20\t40"));
    assert!(run(&["outbox", "purge", "--days", "1"]).starts_with("0 rows"));
    run(&["history", "--account", "alice@contoso.com", "--with", "bob@contoso.com", "--since", "2026-01-01"]);
    run(&["coverage"]);
    run(&["quarantine", "list"]);
    run(&["account", "remove", "alice@contoso.com"]);
    let mut sql = database.connect().await;
    let left = "SELECT count(*) FROM writers";
    assert_eq!(rows(&mut sql, left).await, ["0"], "no command leaves its writer's row");
    let read = "SELECT action FROM access_log ORDER BY id";
    assert_eq!(rows(&mut sql, read).await.len(), 2, "reading a row and the history is noted");
}

#[tokio::test]
async fn the_demo_finds_nothing_lost_or_doubled() {
    let database = PostgresDatabase::new().await;
    let folder = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ucwa-relay"));
    let output = command
        .current_dir(folder.path())
        .args(["demo", "--accounts", "4", "--for", "8s", "--rate", "30", "--database", database.url()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("psql "), "{text}");
    let stored = rows(&mut database.connect().await, "SELECT count(*) > 100 FROM messages").await;
    assert_eq!(stored, ["1"]);
}
