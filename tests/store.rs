//! What every dialect of the store promises, written against its traits. An outside connection plays the programs and
//! people who use plain SQL.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use jiff::{Timestamp, ToSpan};
use support::{
    PATIENCE,
    archive::{
        Database, NODE, Online, TALK, accepted, bob, bob_joined, claim_settings, conversation, invitation,
        link, message, message_fact, new_account, our_message, retry_at, row, settings, time_from_now, uri,
    },
    sql::{Kind, Sql},
    take_leases,
};
use tracing::field::{Field, Visit};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
};
use ucwa_relay::{
    archive::{
        chain,
        fact::{
            ArchiveCommit, Content, ConversationEnded, ConversationFact, Direction, EventSender, Fact,
            FailureReason, Fetch, FetchedResource, InvitationFact, InvitationKind, LoggedConversation,
            LoggedMessage, MessageFact, OperationStatus, Person, Phase, Quarantined, SendOutcome, TypingFact,
            Unfetchable,
        },
    },
    identifiers::{AccountId, ConversationId, OperationId, OutboxId},
    store::{
        AccountState, Allowance, Allowances, ClaimSettings, ClaimedSend, HistoryFilter, InvitationPolicy,
        NOT_FOLLOWED, NewAccount, NewOutboxRow, OutboxFilter, OutboxState, QuarantineFilter, Role,
        SecretSource, SharedStore, StoreError, StoreSettings, connect, migrate,
    },
};

mod support;

/// What a program writes that thinks in Latin-1: "café".
const LATIN_1: &str = "CAST(X'636166E9' AS TEXT)";

// ------------------------------------------------------------------------------------------------ support

/// From now on the database refuses messages with this text.
async fn refuse_messages(outside: &mut Sql, text: &str) {
    let statements: &[&str] = match outside {
        Sql::Sqlite(_) => &["CREATE TRIGGER poison BEFORE INSERT ON messages WHEN NEW.body = 'TEXT'
                             BEGIN SELECT RAISE(ABORT, 'poison'); END"],
        Sql::Postgres(_) => &[
            "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'poison'; END $$",
            "CREATE TRIGGER poison BEFORE INSERT ON messages FOR EACH ROW WHEN (NEW.body = 'TEXT')
             EXECUTE FUNCTION poison()",
        ],
    };
    for statement in statements {
        outside.run(&statement.replace("TEXT", text)).await.unwrap();
    }
}

async fn texts(store: &SharedStore) -> Vec<String> {
    let filter = HistoryFilter { limit: 1000, ..HistoryFilter::default() };
    store.history(&filter).await.unwrap().into_iter().map(|row| row.body).collect()
}

// ------------------------------------------------------------------------------------------------ accounts

async fn an_account_lives_in_the_database(kind: Kind) {
    let database = Database::new(kind).await;
    let store = &database.store;
    let id = store.add_account(&new_account("alice")).await.unwrap();
    take_leases(store).await;
    let again = store.add_account(&new_account("alice")).await.unwrap_err();
    assert!(matches!(&again, StoreError::AlreadyExists(words) if words.contains("sip:alice@contoso.com")));

    let added = store.account(&uri("alice")).await.unwrap().unwrap();
    assert_eq!((added.id, added.enabled, added.display_name.as_deref()), (id, true, None));
    store.set_display_name(id, "Alice").await.unwrap();
    let named = store.account(&uri("alice")).await.unwrap().unwrap();
    assert_eq!(named.display_name.as_deref(), Some("Alice"));
    assert_eq!(named.updated_at, added.updated_at, "no person changed it");

    assert_eq!(store.declare_account(&new_account("alice")).await.unwrap(), id);
    assert_eq!(store.account(&uri("alice")).await.unwrap().unwrap(), named, "nothing differs");
    let declared = NewAccount { invitations: Some(InvitationPolicy::Decline), ..new_account("alice") };
    store.declare_account(&declared).await.unwrap();
    let declared = store.account(&uri("alice")).await.unwrap().unwrap();
    assert_eq!(declared.invitations, Some(InvitationPolicy::Decline));

    store.set_secret(id, &SecretSource::Sealed(vec![1, 2])).await.unwrap();
    store.set_enabled(id, false).await.unwrap();
    let changed = store.account(&uri("alice")).await.unwrap().unwrap();
    assert_eq!((changed.secret, changed.enabled), (SecretSource::Sealed(vec![1, 2]), false));

    store.remove_account(id).await.unwrap();
    assert_eq!(store.accounts().await.unwrap(), []);
    assert!(store.account_overview(None).await.unwrap().is_empty());
    assert_eq!(store.add_account(&new_account("alice")).await.unwrap(), id, "its archive is its own again");
    assert!(store.account(&uri("alice")).await.unwrap().unwrap().enabled);
}

#[tokio::test]
async fn a_row_of_accounts_that_cannot_be_read_stops_no_other() {
    let mut database = Database::new(Kind::Sqlite).await;
    database.store.add_account(&new_account("alice")).await.unwrap();
    let bob = database.store.add_account(&new_account("bob")).await.unwrap();
    let names = async |database: &Database| -> Vec<String> {
        database
            .store
            .accounts()
            .await
            .unwrap()
            .iter()
            .map(|account| account.sip_uri.address().to_owned())
            .collect()
    };
    assert_eq!(names(&database).await, ["alice@contoso.com", "bob@contoso.com"]);
    let mut outside = database.outside().await;
    outside
        .run(&format!(
            "INSERT INTO accounts (sip_uri, username, display_name, updated_at) VALUES
                 ('sip:@x', 'x', NULL, '2026'),
                 ('sip:alice@contoso.com ', 'twice', NULL, '2026'),
                 ('sip:' || {LATIN_1} || '@contoso.com', 'x', NULL, '2026'),
                 ('sip:carol@contoso.com', {LATIN_1}, NULL, '2026'),
                 ('sip:dave@contoso.com', 'dave', {LATIN_1}, 'yesterday')"
        ))
        .await
        .unwrap();
    let readable = ["alice@contoso.com", "bob@contoso.com", "dave@contoso.com"];
    assert_eq!(names(&database).await, readable);
    assert_eq!(names(&database).await, readable);
    let shown = "SELECT id, state, detail LIKE 'sip_uri %correct%', detail LIKE 'username %correct%'
                   FROM accounts JOIN account_status ON account_id = id ORDER BY id";
    let attention = outside.rows(shown).await;
    assert_eq!(
        attention,
        ["3|needs_attention|1|0", "4|needs_attention|1|0", "5|needs_attention|1|0", "6|needs_attention|0|1"]
    );

    // Who was readable goes on with what was read last, but can be disabled and removed.
    outside.run(&format!("UPDATE accounts SET username = {LATIN_1} WHERE id = {bob}")).await.unwrap();
    assert_eq!(names(&database).await, readable);
    let account = database.store.accounts().await.unwrap().remove(1);
    assert_eq!((account.id, account.username.as_str(), account.enabled), (bob, "CONTOSO\\bob", true));
    assert!(database.store.account(&uri("bob")).await.is_err(), "who asks for it by name is told");
    let overview = database.store.account_overview(Some(&uri("bob"))).await.unwrap().remove(0);
    assert_eq!(overview.state, "needs_attention");
    assert!(overview.detail.unwrap().starts_with("username can't be read"));
    assert_eq!(database.store.account_overview(None).await.unwrap().len(), 7);
    database.store.set_enabled(bob, false).await.unwrap();
    assert!(!database.store.accounts().await.unwrap()[1].enabled);
    database.store.remove_account(bob).await.unwrap();
    assert_eq!(names(&database).await, ["alice@contoso.com", "dave@contoso.com"]);

    outside.run("UPDATE accounts SET username = 'carol' WHERE id = 6").await.unwrap();
    assert_eq!(names(&database).await, ["alice@contoso.com", "carol@contoso.com", "dave@contoso.com"]);
    database.reopen().await;
    assert_eq!(names(&database).await.len(), 3);
}

async fn a_change_by_plain_sql_moves_updated_at(kind: Kind) {
    let database = Database::new(kind).await;
    database.store.add_account(&new_account("alice")).await.unwrap();
    let mut outside = database.outside().await;
    outside.run("UPDATE accounts SET updated_at = '2020-01-01T00:00:00.000Z'").await.unwrap();
    outside.run("UPDATE accounts SET enabled = FALSE").await.unwrap();
    assert_eq!(outside.count("accounts WHERE updated_at > '2026-01-01'").await, 1);
}

async fn the_overview_tells_what_an_account_is_doing(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    alice.events("/events?ack=2", vec![conversation(), message(1, "Hi")]).await;
    database.store.record_restart(alice.account).await.unwrap();
    database
        .store
        .enqueue(&NewOutboxRow { account: "alice@contoso.com".into(), ..row("x@y.z") })
        .await
        .unwrap();
    let overview = database.store.account_overview(Some(&uri("alice"))).await.unwrap().remove(0);
    assert_eq!((overview.state.as_str(), overview.node_id.as_deref()), ("online", Some(NODE)));
    assert_eq!((overview.messages_today, overview.queued), (1, 1));
    assert!(overview.last_event_at.is_some() && overview.since.is_some());

    database.reopen().await;
    let overview = database.store.account_overview(None).await.unwrap().remove(0);
    assert_eq!(overview.state, "stopped", "a server's end is the end of its accounts' work");
}

// ------------------------------------------------------------------------------------------------ sessions

async fn a_session_is_resumed_and_a_new_one_ends_it(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let endpoint = database.store.endpoint_id(alice.account).await.unwrap();
    assert_eq!(alice.session.endpoint_id, endpoint);
    alice.events("/events?ack=2", vec![conversation(), bob_joined(), invitation()]).await;
    database.reopen().await;
    let store = &database.store;
    let resumed = store.open_session(alice.account).await.unwrap().unwrap();
    assert_eq!(resumed.id, alice.session.id);
    assert_eq!(resumed.event_cursor.as_deref(), Some("/events?ack=2"));

    let open = store.open_conversations(alice.account, resumed.id).await.unwrap();
    assert_eq!(open.len(), 1);
    assert_eq!(open[0].remote_uri.as_deref(), Some("sip:bob@contoso.com"));
    assert_eq!(open[0].thread_id.as_deref(), Some("thread"));

    let later = Timestamp::now() + 1.hour();
    store.record_followed(&[resumed.id], Timestamp::now() - 1.hour()).await.unwrap();
    store.record_gap(alice.account, resumed.id, later, "the server said resume").await.unwrap();
    let next = store
        .begin_session(alice.account, "/applications/2", "/e", "the application was gone")
        .await
        .unwrap();
    assert_eq!(next.endpoint_id, endpoint);
    let mut outside = database.outside().await;
    assert_eq!(
        outside.rows("SELECT end_reason FROM sessions ORDER BY id").await,
        ["the application was gone", ""]
    );
    assert_eq!(outside.count("participants WHERE left_at IS NULL").await, 0);
    assert_eq!(outside.count("conversations WHERE ended_at IS NULL").await, 0);
    assert_eq!(outside.count("messages WHERE chain_seq = 1").await, 1, "its open text is settled");
    assert_eq!(
        outside.rows("SELECT account, reason, backfilled FROM coverage_gaps").await,
        ["sip:alice@contoso.com|the server said resume|0"],
        "the time until `later` is accounted for"
    );
    assert!(store.open_conversations(alice.account, resumed.id).await.unwrap().is_empty());
}

async fn a_resume_ends_what_was_open_in_the_commit_that_moves_the_cursor(kind: Kind) {
    let database = Database::new(kind).await;
    let (store, alice) = (&database.store, database.online("alice").await);
    alice.events("/events?ack=2", vec![conversation(), bob_joined()]).await;
    for recipient in ["bob@contoso.com", "carol@contoso.com"] {
        store.enqueue(&row(recipient)).await.unwrap();
    }
    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 2);
    let now = Timestamp::now();
    let commit = alice.commit_of(Some("/events?ack=7"), vec![message(5, "with it")]);
    for _ in 0..2 {
        store
            .resume(commit.clone(), "/events?ack=2", now - 1.minute(), "the server said resume")
            .await
            .unwrap();
    }
    let mut outside = database.outside().await;
    assert_eq!(outside.rows("SELECT reason FROM coverage_gaps").await, ["the server said resume"]);
    assert_eq!(
        outside.rows("SELECT end_code FROM conversations WHERE ended_at IS NOT NULL").await,
        ["resume"]
    );
    assert_eq!(outside.count("participants WHERE left_at IS NULL").await, 0);
    assert_eq!(outside.count("backfills").await, 1);
    assert_eq!(texts(store).await, ["with it"]);
    let session = store.open_session(alice.account).await.unwrap().unwrap();
    assert_eq!((session.id, session.event_cursor.as_deref()), (alice.session.id, Some("/events?ack=7")));
    assert_eq!(outside.count("outbox WHERE state = 'uncertain' AND last_error LIKE '%resume%'").await, 2);

    // What never left goes back, and a refusal that comes late is believed.
    store.release_claim(&claimed[0]).await.unwrap();
    alice.send_fact(&claimed[1], retry_at(now)).await;
    assert_eq!(
        outside.rows("SELECT state, attempts, finished_at IS NULL FROM outbox ORDER BY id").await,
        ["queued|0|1", "queued|1|1"]
    );
    let known = store.conversation(alice.account, ConversationId(1)).await.unwrap().unwrap();
    assert_eq!(known.remote_uri.as_deref(), Some("sip:bob@contoso.com"));
    assert_eq!((known.thread_id.as_deref(), known.multiparty), (Some("thread"), false));
    assert_eq!(store.conversation(alice.account, ConversationId(9)).await.unwrap(), None);
}

async fn the_time_between_two_sessions_is_a_gap(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    outside.run("UPDATE sessions SET last_ack_at = '2026-01-01T00:00:00.000Z'").await.unwrap();
    database.store.end_session(alice.account, alice.session.id, "disabled").await.unwrap();
    assert!(database.store.open_session(alice.account).await.unwrap().is_none());
    database.store.begin_session(alice.account, "/applications/2", "/e", "unused").await.unwrap();
    assert_eq!(
        outside.rows("SELECT from_at, reason FROM coverage_gaps").await,
        ["2026-01-01T00:00:00.000Z|disabled"]
    );
}

// ------------------------------------------------------------------------------------------------ coverage

fn at(minute: i64) -> Timestamp {
    "2026-11-22T10:00:00Z".parse::<Timestamp>().unwrap() + minute.minutes()
}

async fn a_gap_asks_for_its_backfill_until_the_schedule_ends(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let session = alice.session.id;
    let reason = "the database was away";
    database.store.record_stretch(alice.account, session, at(0), at(4), reason).await.unwrap();
    database.store.record_stretch(alice.account, session, at(5), at(5), "nothing").await.unwrap();
    let wanted = database.store.backfills(alice.account).await.unwrap();
    assert_eq!(wanted.len(), 1, "an empty stretch is no gap");
    assert!(wanted[0].open_gap && wanted[0].runs == 0 && wanted[0].from == at(0));

    let impossible = "the server offers no logs";
    database.store.backfill_impossible(alice.account, impossible).await.unwrap();
    let mut outside = database.outside().await;
    let gaps = "SELECT from_at, to_at, reason, backfilled, detail FROM coverage_gaps";
    let stretch = "2026-11-22T10:00:00.000Z|2026-11-22T10:04:00.000Z|the database was away";
    assert_eq!(outside.rows(gaps).await, [format!("{stretch}|0|{impossible}")]);

    database.store.backfilled(wanted[0].id, at(6), Some(at(11))).await.unwrap();
    assert_eq!(outside.rows(gaps).await, [format!("{stretch}|1|")]);
    assert_eq!(outside.rows("SELECT backfilled_until FROM sessions").await, ["2026-11-22T10:04:00.000Z"]);
    database.reopen().await;
    let again = database.store.backfills(alice.account).await.unwrap();
    assert_eq!((again[0].first_at, again[0].due_at, again[0].runs), (Some(at(6)), at(11), 1));
    assert!(!again[0].open_gap);
    database.store.backfilled(again[0].id, at(200), None).await.unwrap();
    assert!(database.store.backfills(alice.account).await.unwrap().is_empty());
    assert_eq!(outside.rows(gaps).await, [format!("{stretch}|1|")], "the gap itself stays");
}

async fn hints_of_an_account_are_one_wish_that_begins_anew(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.store.request_backfill(alice.account, at(10), at(11)).await.unwrap();
    let first = database.store.backfills(alice.account).await.unwrap().remove(0);
    assert!(!first.open_gap);
    database.store.backfilled(first.id, at(12), Some(at(17))).await.unwrap();
    database.store.request_backfill(alice.account, at(20), at(21)).await.unwrap();
    let wanted = database.store.backfills(alice.account).await.unwrap();
    let [hint] = wanted.as_slice() else { panic!("{wanted:?}") };
    assert_eq!((hint.from, hint.due_at, hint.runs, hint.first_at), (at(10), at(21), 0, None));
    database.store.request_backfill(alice.account, at(600), at(601)).await.unwrap();
    let hint = database.store.backfills(alice.account).await.unwrap().remove(0);
    assert_eq!(hint.from, at(600 - 180), "what is long past has been read often enough");
}

async fn coverage_tells_sessions_and_gaps_by_account(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.online("bob").await;
    let mut outside = database.outside().await;
    let hour = "started_at = '2026-11-22T10:00:00.000Z', last_ack_at = '2026-11-22T11:00:00.000Z'";
    outside.run(&format!("UPDATE sessions SET {hour}")).await.unwrap();
    database.store.record_stretch(alice.account, alice.session.id, at(10), at(20), "resume").await.unwrap();
    assert_eq!(database.store.coverage(None).await.unwrap().len(), 2);
    let coverage = database.store.coverage(Some(&uri("alice"))).await.unwrap().remove(0);
    assert_eq!(coverage.account, "sip:alice@contoso.com");
    assert_eq!((coverage.sessions[0].from, coverage.sessions[0].to), (at(0), at(60)));
    assert!(coverage.sessions[0].open);
    assert_eq!((coverage.gaps[0].from, coverage.gaps[0].to), (at(10), at(20)));
}

fn log(thread: &str, texts: &[(i64, &str)]) -> Fact {
    let bob = Person { href: None, ..bob() };
    Fact::Logged(LoggedConversation {
        href: "/logs/1".to_owned(),
        thread_id: Some(thread.to_owned()),
        direction: Some(Direction::Incoming),
        people: vec![bob.clone()],
        messages: texts
            .iter()
            .map(|(second, text)| LoggedMessage {
                sent_at: at(0) + second.seconds(),
                direction: Direction::Incoming,
                sender: Some(bob.clone()),
                content: Content { plain: Some((*text).to_owned()), html: None },
            })
            .collect(),
        ..LoggedConversation::default()
    })
}

/// Another session is another application: its addresses mean nothing in the old one, the thread does.
async fn a_log_adds_what_no_session_has_archived_however_often_it_is_read(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let conversation = Fact::Conversation(ConversationFact {
        href: TALK.to_owned(),
        thread_id: Some("t".to_owned()),
        ..ConversationFact::default()
    });
    let message = Fact::Message(MessageFact {
        unreadable_time: None,
        conversation_href: TALK.to_owned(),
        href: "/messages/1".to_owned(),
        phase: Phase::Completed,
        direction: Some(Direction::Incoming),
        sender: Some(bob()),
        content: Content { plain: Some("archived".to_owned()), html: None },
        sent_at: Some(at(0)),
        status: Some(OperationStatus::Success),
        reason: None,
        operation_id: None,
        failed_recipients: Vec::new(),
        link_only: false,
    });
    alice.events("/events?ack=2", vec![conversation, message]).await;
    let session = database.store.begin_session(alice.account, "/applications/2", "/e", "gone").await.unwrap();
    let later = Online { store: database.store.clone(), account: alice.account, session };
    for _ in 0..2 {
        later.answer(log("t", &[(2, "archived "), (60, "missed"), (62, "missed")])).await;
        later.answer(log("u", &[(30, "elsewhere")])).await;
    }
    let mut outside = database.outside().await;
    let columns = "thread_id, body, source, status, sender, recipients";
    let logged = |thread: &str, body: &str| {
        format!("{thread}|{body}|conversation_log|delivered|sip:bob@contoso.com|sip:alice@contoso.com")
    };
    assert_eq!(
        outside.rows(&format!("SELECT {columns} FROM message_history ORDER BY message_id")).await,
        [
            "t|archived|event|delivered|sip:bob@contoso.com|sip:alice@contoso.com".to_owned(),
            logged("t", "missed"),
            logged("t", "missed"),
            logged("u", "elsewhere"),
        ]
    );
    assert_eq!(outside.count("messages WHERE chain_seq IS NULL").await, 0);
    assert_eq!(outside.count("conversations").await, 2);
}

// ------------------------------------------------------------------------------------------------ quarantine

async fn quarantined_payloads_are_listed_shown_and_resolved(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let sender = EventSender { rel: "conversation".to_owned(), href: TALK.to_owned() };
    let event = Quarantined { sender: Some(sender.clone()), ..Quarantined::new("odd", "<x t=\"\u{fc}\"/>") };
    alice.answer(Fact::Quarantined(event)).await;
    database.store.quarantine(alice.account, None, "unreadable", "<html>").await.unwrap();
    let all = QuarantineFilter { account: Some(uri("alice")), resolved: false, limit: 10 };
    let listed = database.store.quarantine_entries(&all).await.unwrap();
    let told: Vec<_> =
        listed.iter().map(|entry| (entry.id, entry.reason.as_str(), entry.payload_bytes)).collect();
    assert_eq!(told, [(2, "unreadable", 6), (1, "odd", 11)]);
    let shown = database.store.quarantined(1).await.unwrap().unwrap();
    assert_eq!((shown.payload.as_str(), shown.sender), ("<x t=\"\u{fc}\"/>", Some(sender)));
    assert_eq!((shown.account, shown.session), (alice.account, Some(alice.session.id)));
    assert!(database.store.quarantined(3).await.unwrap().is_none());

    database.store.mark_resolved(1, at(0)).await.unwrap();
    database.store.mark_resolved(1, at(9)).await.unwrap();
    assert_eq!(database.store.quarantine_entries(&all).await.unwrap().len(), 1);
    let listed =
        database.store.quarantine_entries(&QuarantineFilter { resolved: true, ..all }).await.unwrap();
    assert_eq!(listed[1].resolved_at, Some(at(0)), "the first time counts");
}

// ------------------------------------------------------------------------------------------------ archive

async fn who_typed_and_where_a_talk_went_on_is_stored_once(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let typing = Fact::Typing(TypingFact { conversation_href: TALK.to_owned(), who: bob() });
    let Fact::Invitation(derived) = invitation() else { unreachable!() };
    let derived = Fact::Invitation(InvitationFact {
        phase: Phase::Completed,
        status: Some(OperationStatus::Failure),
        derived_conversation_href: Some("/conversations/next".to_owned()),
        ..derived
    });
    // As many others in between that the two conversations are written by different statements.
    let others = (0..100).map(|number| {
        Fact::Conversation(ConversationFact {
            href: format!("/others/{number}"),
            ..ConversationFact::default()
        })
    });
    let facts: Vec<Fact> =
        [conversation(), bob_joined(), typing].into_iter().chain(others).chain([derived]).collect();
    let commit = alice.commit_of(Some("/events?ack=2"), facts);
    alice.store.commit(commit.clone()).await.unwrap();
    database.reopen().await;
    database.store.commit(database.anew(commit)).await.unwrap();
    let mut outside = database.outside().await;
    assert_eq!(
        outside
            .rows(
                "SELECT c.href, p.sip_uri, t.at = p.joined_at FROM typing t
                   JOIN participants p ON p.id = t.participant_id JOIN conversations c ON c.id = t.conversation_id"
            )
            .await,
        [format!("{TALK}|sip:bob@contoso.com|1")]
    );
    assert_eq!(
        outside
            .rows("SELECT d.href FROM conversation_summary s JOIN conversations d ON d.id = s.continued_in")
            .await,
        ["/conversations/next"]
    );
}

async fn what_was_committed_and_not_acknowledged_comes_again_and_changes_nothing(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let facts = vec![
        invitation(),
        conversation(),
        bob_joined(),
        message(1, "Hungry?"),
        link(2),
        message(3, "Now?"),
        Fact::Quarantined(Quarantined::new("odd", "<x/>")),
    ];
    let commit = alice.commit_of(Some("/events?ack=2"), facts);
    let first = alice.store.commit(commit.clone()).await.unwrap();
    let dump = async |database: &Database| {
        let mut outside = database.outside().await;
        let mut dump = Vec::new();
        for (table, columns) in [
            ("messages", "id, href, body, status, chain_hash, awaiting"),
            ("conversations", "id, href, state, started_at, ended_at, connected_at"),
            ("participants", "id, href, sip_uri, joined_at, left_at, display_name"),
            ("invitations", "id, href, state, message_id, subject, from_uri"),
            ("event_quarantine", "id, payload, reason, received_at, cursor"),
            ("sessions", "id, event_cursor"),
            ("chain_heads", "account_id, seq, hash"),
        ] {
            dump.extend(outside.rows(&format!("SELECT {columns} FROM {table} ORDER BY 1")).await);
        }
        dump
    };
    let before = dump(&database).await;
    assert_eq!(before.len(), 9);

    // The process died before it could acknowledge.
    database.reopen().await;
    let again = database.store.commit(database.anew(commit)).await.unwrap();
    assert_eq!(dump(&database).await, before);
    assert_eq!(again.fetches, first.fetches);
    assert_eq!(again.fetches.len(), 1);
    assert_eq!(first.fetches[0].resource, FetchedResource::Message);
    // The call was not answered before the process died: it is looked at again, too.
    let unfetched = database.store.unfetched(alice.account, alice.session.id).await.unwrap();
    assert_eq!(unfetched[0], first.fetches[0]);
    assert_eq!(unfetched[1].resource, FetchedResource::Invitation(InvitationKind::Messaging));
    assert_eq!(unfetched.len(), 2);
}

async fn many_accounts_commit_together_and_only_the_offender_fails(kind: Kind) {
    let database = Database::new(kind).await;
    let mut outside = database.outside().await;
    refuse_messages(&mut outside, "poison").await;
    let mut accounts = Vec::new();
    for number in 0..20 {
        accounts.push(database.online(&format!("user{number}")).await);
    }
    let foreign =
        ArchiveCommit { account: accounts[0].account, ..accounts[1].commit_of(None, vec![message(9, "x")]) };
    let mut commits: Vec<_> = accounts
        .iter()
        .enumerate()
        .map(|(number, account)| {
            let text = if number == 7 { "poison" } else { "Hi" };
            account.commit_of(Some("/events?ack=2"), vec![conversation(), message(1, text)])
        })
        .collect();
    commits.push(foreign);
    let outcomes = join_all(commits.into_iter().map(|commit| database.store.commit(commit))).await;
    for (number, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.is_err(), number == 7 || number == 20, "{number}: {outcome:?}");
    }
    assert!(matches!(outcomes[7], Err(StoreError::Refused { .. })));
    assert_eq!(outside.count("messages").await, 19);
    assert_eq!(outside.count("messages WHERE chain_seq = 1").await, 19);
    let cursor = database.store.open_session(accounts[7].account).await.unwrap().unwrap().event_cursor;
    assert_eq!(cursor.as_deref(), Some("/events?ack=1"), "nothing of the refused commit is there");
}

async fn a_panic_in_the_rules_undoes_one_commit_and_no_other(kind: Kind) {
    let database = Database::new(kind).await;
    let mut online = Vec::new();
    for number in 0..10 {
        let account = database.online(&format!("user{number}")).await;
        account.events("/e2", vec![conversation()]).await;
        online.push(account);
    }
    for round in 3..6 {
        let commits = online.iter().enumerate().map(|(number, account)| {
            let mut facts = vec![message(round, "before")];
            if number == 4 {
                let content = Content { plain: None, html: Some("<bomb>".to_owned()) };
                facts.push(Fact::Message(MessageFact { content, ..message_fact(round + 100, "") }));
            }
            account.store.commit(account.commit_of(Some(&format!("/e{round}")), facts))
        });
        let outcomes = join_all(commits).await;
        for (number, outcome) in outcomes.iter().enumerate() {
            match outcome {
                Ok(_) => assert_ne!(number, 4),
                Err(error) => {
                    assert!(
                        number == 4 && matches!(error, StoreError::Refused { .. }),
                        "{number}: {error:?}"
                    );
                }
            }
        }
    }
    assert_eq!(texts(&database.store).await.len(), 27, "of the commit that panicked nothing is there");
    let spoilt = &online[4];
    database
        .store
        .quarantine(spoilt.account, Some(spoilt.session.id), "it panicked", "<bomb>")
        .await
        .unwrap();
    spoilt.events("/e6", vec![message(9, "after")]).await;
    assert_eq!(texts(&database.store).await.len(), 28);
    let broken = tokio::time::timeout(Duration::from_millis(10), database.store.broken()).await;
    assert!(broken.is_err(), "the writer goes on");
}

async fn the_chain_runs_through_everything_and_its_head_is_kept(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    for batch in 0..5u32 {
        let facts = (0..40).map(|number| message(batch * 40 + number, &format!("text {number}"))).collect();
        alice.events(&format!("/events?ack={}", batch + 2), facts).await;
    }
    let mut outside = database.outside().await;
    let rows = outside
        .rows(
            "SELECT chain_seq, content_hash, chain_hash, conversation_id, sender_uri, sender_name, content_type, body,
                    body_html, sent_at, operation_id, outbox_id, correlation
               FROM messages
              ORDER BY chain_seq",
        )
        .await;
    assert_eq!(rows.len(), 200);
    let mut head = chain::GENESIS.to_owned();
    for (seq, row) in (1i64..).zip(&rows) {
        let columns: Vec<Option<&str>> =
            row.split('|').map(|value| Some(value).filter(|value| !value.is_empty())).collect();
        let content = chain::Content {
            account: "sip:alice@contoso.com",
            conversation: ConversationId(columns[3].unwrap().parse().unwrap()),
            direction: Direction::Incoming,
            sender_uri: columns[4],
            sender_name: columns[5],
            content_type: columns[6].unwrap(),
            body: columns[7].unwrap(),
            body_html: columns[8],
            sent_at: columns[9].unwrap().parse().unwrap(),
            operation_id: columns[10],
            outbox: columns[11].map(|id| OutboxId(id.parse().unwrap())),
            correlation: columns[12],
        };
        assert_eq!(columns[0].unwrap(), seq.to_string());
        assert_eq!(columns[1].unwrap(), content.hash());
        head = chain::link(&head, seq, &content.hash());
        assert_eq!(columns[2].unwrap(), head);
    }
    assert_eq!(outside.rows("SELECT seq, hash FROM chain_heads").await, [format!("200|{head}")]);
}

async fn a_text_that_is_not_repeated_is_settled_after_its_time(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    alice.events("/events?ack=2", vec![invitation()]).await;
    let mut outside = database.outside().await;
    database.store.settle_overdue(Timestamp::now()).await.unwrap();
    assert_eq!(outside.count("messages WHERE awaiting = 'copy'").await, 1);
    database.store.settle_overdue(Timestamp::now() + 61.seconds()).await.unwrap();
    assert_eq!(outside.rows("SELECT awaiting, source, chain_seq FROM messages").await, ["|invitation|1"]);
    alice.events("/events?ack=3", vec![message(1, "Hungry?\r\n")]).await;
    assert_eq!(outside.rows("SELECT source, body, chain_seq FROM messages").await, ["event|Hungry?|1"]);
}

async fn the_text_of_a_call_whose_events_never_came_is_archived_all_the_same(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    let called = |number: u32| SendOutcome::InvitationAccepted {
        invitation_href: Some(format!("/invitations/{number}")),
    };
    let rows = "SELECT direction, body, source, outbox_id, chain_seq IS NOT NULL FROM messages ORDER BY id";
    for (recipient, number) in [("bob@contoso.com", 1), ("carol@contoso.com", 2)] {
        database.store.enqueue(&row(recipient)).await.unwrap();
        let send = database.claim().await.remove(0);
        alice.send_fact(&send, called(number)).await;
        if number == 1 {
            database.store.settle_overdue(Timestamp::now()).await.unwrap();
            assert_eq!(outside.count("messages").await, 0, "its events may come");
            for _ in 0..2 {
                database.store.settle_overdue(Timestamp::now() + 61.seconds()).await.unwrap();
            }
            assert_eq!(outside.count("messages").await, 1);
        }
    }
    database.store.end_session(alice.account, alice.session.id, "the application was gone").await.unwrap();
    assert_eq!(
        outside.rows(rows).await,
        ["outgoing|Deploy finished|event|1|1", "outgoing|Deploy finished|event|2|1"]
    );
    assert_eq!(outside.rows("SELECT state FROM outbox").await, ["sent", "sent"], "nobody told more");
    assert_eq!(outside.count("conversations WHERE ended_at IS NULL").await, 0);
    // To whom it was said outlives the row of the queue.
    outside.run("DELETE FROM outbox WHERE state = 'sent'").await.unwrap();
    assert_eq!(
        outside.rows("SELECT recipients FROM message_history ORDER BY message_id").await,
        ["sip:bob@contoso.com", "sip:carol@contoso.com"]
    );
}

/// A log read while the events may still come, and one read after the application is gone.
async fn a_log_tells_of_a_call_whose_events_never_came_what_is_archived_once(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    let log_of = |name: &str| {
        let person = |name: &str| Person {
            contact_uri: None,
            href: None,
            uri: Some(format!("sip:{name}@contoso.com")),
            name: Some(name.to_owned()),
        };
        Fact::Logged(LoggedConversation {
            href: format!("/logs/{name}"),
            thread_id: Some(format!("thread of {name}")),
            people: vec![person(name), person("alice")],
            messages: vec![LoggedMessage {
                sent_at: Timestamp::now(),
                direction: Direction::Outgoing,
                sender: Some(person("alice")),
                content: Content { plain: Some("Deploy finished".to_owned()), html: None },
            }],
            ..LoggedConversation::default()
        })
    };
    for (recipient, number) in [("bob@contoso.com", 1), ("carol@contoso.com", 2)] {
        database.store.enqueue(&row(recipient)).await.unwrap();
        let send = database.claim().await.remove(0);
        let called =
            SendOutcome::InvitationAccepted { invitation_href: Some(format!("/invitations/{number}")) };
        alice.send_fact(&send, called).await;
    }
    alice.answer(log_of("bob")).await;
    database.store.end_session(alice.account, alice.session.id, "the application was gone").await.unwrap();
    let session =
        database.store.begin_session(alice.account, "/applications/2", "/events?ack=1", "").await.unwrap();
    let alice = Online { session, ..alice };
    for _ in 0..2 {
        alice.answer(log_of("bob")).await;
        alice.answer(log_of("carol")).await;
    }
    database.store.settle_overdue(Timestamp::now() + 61.seconds()).await.unwrap();
    assert_eq!(
        outside.rows("SELECT direction, body, outbox_id FROM messages ORDER BY outbox_id").await,
        ["outgoing|Deploy finished|1", "outgoing|Deploy finished|2"]
    );
}

/// However late it is archived, so that what a log tells of it later is known to be the same.
async fn the_text_of_a_call_without_events_is_dated_when_it_was_accepted(kind: Kind) {
    for by_end_of_session in [true, false] {
        let database = Database::new(kind).await;
        let alice = database.online("alice").await;
        let mut outside = database.outside().await;
        database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
        let send = database.claim().await.remove(0);
        let called = SendOutcome::InvitationAccepted { invitation_href: Some("/invitations/1".to_owned()) };
        alice.send_fact(&send, called).await;
        let accepted_at = Timestamp::now() - 20.minutes();
        outside
            .run(&format!("UPDATE outbox SET sent_at = '{accepted_at:.3}', revision = revision + 1"))
            .await
            .unwrap();
        let alice = if by_end_of_session {
            let begin = database.store.begin_session(alice.account, "/applications/2", "/events?ack=1", "");
            Online { session: begin.await.unwrap(), ..alice }
        } else {
            database.store.settle_overdue(Timestamp::now() + 61.seconds()).await.unwrap();
            alice
        };
        let dated = [format!("Deploy finished|{accepted_at:.3}")];
        assert_eq!(outside.rows("SELECT body, sent_at FROM messages").await, dated);

        let bob = Person {
            contact_uri: None,
            href: None,
            uri: Some("sip:bob@contoso.com".to_owned()),
            name: Some("bob".to_owned()),
        };
        let logged = LoggedMessage {
            sent_at: accepted_at + 300.milliseconds(),
            direction: Direction::Outgoing,
            sender: None,
            content: Content { plain: Some("Deploy finished".to_owned()), html: None },
        };
        let log = LoggedConversation {
            href: "/logs/bob".to_owned(),
            thread_id: Some("thread of bob".to_owned()),
            people: vec![bob],
            messages: vec![logged],
            ..LoggedConversation::default()
        };
        alice.answer(Fact::Logged(log)).await;
        database.store.settle_overdue(Timestamp::now() + 61.seconds()).await.unwrap();
        assert_eq!(outside.rows("SELECT body, sent_at FROM messages").await, dated);
    }
}

async fn the_text_of_a_call_that_can_not_be_read_is_archived_when_it_was_accepted(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    let send = database.claim().await.remove(0);
    let href = "/invitations/1".to_owned();
    alice.send_fact(&send, SendOutcome::InvitationAccepted { invitation_href: Some(href.clone()) }).await;
    let linked = |phase, status| {
        Fact::Invitation(InvitationFact {
            href: href.clone(),
            kind: InvitationKind::Messaging,
            phase,
            direction: None,
            state: None,
            operation_id: None,
            conversation_href: None,
            derived_conversation_href: None,
            thread_id: None,
            subject: None,
            importance: None,
            from: None,
            to_uri: None,
            online_meeting_uri: None,
            content: Content::default(),
            status,
            reason: None,
            link_only: true,
        })
    };
    alice.events("/events?ack=2", vec![linked(Phase::Started, None)]).await;
    alice.events("/events?ack=3", vec![linked(Phase::Completed, Some(OperationStatus::Success))]).await;
    let fetch = Fetch {
        resource: FetchedResource::Invitation(InvitationKind::Messaging),
        href: href.clone(),
        conversation_href: None,
    };
    alice.answer(Fact::Unfetchable(Unfetchable { fetch, why: "404".to_owned() })).await;
    assert_eq!(
        outside.rows("SELECT body, status, outbox_id, chain_seq FROM messages").await,
        ["Deploy finished|delivered|1|1"]
    );
    assert_eq!(outside.rows("SELECT state, message_id FROM outbox").await, ["delivered|1"]);
    outside.run("DELETE FROM outbox").await.unwrap();
    assert_eq!(outside.rows("SELECT recipients FROM message_history").await, ["sip:bob@contoso.com"]);
}

/// Of a call whose event only links it, a log may tell before the link turns out to lead nowhere.
async fn a_log_that_is_read_before_a_call_can_not_be_read_leads_to_one_message(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    let send = database.claim().await.remove(0);
    let href = "/invitations/1".to_owned();
    alice.send_fact(&send, SendOutcome::InvitationAccepted { invitation_href: Some(href.clone()) }).await;
    let linked = |phase, status| {
        Fact::Invitation(InvitationFact {
            href: href.clone(),
            kind: InvitationKind::Messaging,
            phase,
            direction: None,
            state: None,
            operation_id: None,
            conversation_href: None,
            derived_conversation_href: None,
            thread_id: None,
            subject: None,
            importance: None,
            from: None,
            to_uri: None,
            online_meeting_uri: None,
            content: Content::default(),
            status,
            reason: None,
            link_only: true,
        })
    };
    alice.events("/events?ack=2", vec![linked(Phase::Started, None)]).await;
    alice.events("/events?ack=3", vec![linked(Phase::Completed, Some(OperationStatus::Success))]).await;
    let bob = Person {
        contact_uri: None,
        href: None,
        uri: Some("sip:bob@contoso.com".to_owned()),
        name: Some("bob".to_owned()),
    };
    let logged = LoggedMessage {
        sent_at: Timestamp::now(),
        direction: Direction::Outgoing,
        sender: None,
        content: Content { plain: Some("Deploy finished".to_owned()), html: None },
    };
    let log = LoggedConversation {
        href: "/logs/bob".to_owned(),
        thread_id: Some("thread of bob".to_owned()),
        people: vec![bob],
        messages: vec![logged],
        ..LoggedConversation::default()
    };
    alice.answer(Fact::Logged(log)).await;
    let fetch = Fetch {
        resource: FetchedResource::Invitation(InvitationKind::Messaging),
        href: href.clone(),
        conversation_href: None,
    };
    alice.answer(Fact::Unfetchable(Unfetchable { fetch, why: "404".to_owned() })).await;
    database.store.settle_overdue(Timestamp::now() + 61.seconds()).await.unwrap();
    assert_eq!(
        outside.rows("SELECT body, status, outbox_id FROM messages").await,
        ["Deploy finished|delivered|1"]
    );
    assert_eq!(outside.rows("SELECT state FROM outbox").await, ["delivered"]);
}

async fn a_spoilt_account_leaves_the_others_messages_settled(kind: Kind) {
    let database = Database::new(kind).await;
    let mut outside = database.outside().await;
    for name in ["alice", "carol"] {
        database.online(name).await.events("/events?ack=2", vec![invitation()]).await;
    }
    outside.run("UPDATE accounts SET sip_uri = 'sip:@x' WHERE id = 1").await.unwrap();
    let later = Timestamp::now() + 61.seconds();
    database.store.settle_overdue(later).await.unwrap();
    assert_eq!(outside.rows("SELECT account_id, awaiting FROM messages ORDER BY 1").await, ["1|copy", "2|"]);
    outside.run("UPDATE accounts SET sip_uri = 'sip:alice@contoso.com' WHERE id = 1").await.unwrap();
    database.store.settle_overdue(later).await.unwrap();
    assert_eq!(outside.count("messages WHERE chain_seq = 1").await, 2);
}

async fn ids_of_removed_rows_are_not_given_again(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    alice.events("/events?ack=2", vec![invitation(), link(1)]).await;
    // The link turns out to be the invitation's text: its row goes.
    alice.answer(message(1, "Hungry?")).await;
    alice.events("/events?ack=3", vec![message(2, "Now?")]).await;
    let mut outside = database.outside().await;
    assert_eq!(outside.rows("SELECT id, body FROM messages ORDER BY id").await, ["1|Hungry?", "3|Now?"]);
}

async fn payloads_are_quarantined_outside_a_batch_too(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.store.quarantine(alice.account, Some(alice.session.id), "odd", "<a/>").await.unwrap();
    database.store.quarantine(alice.account, None, "odd", "<a/>").await.unwrap();
    assert_eq!(database.outside().await.count("event_quarantine WHERE resolved_at IS NULL").await, 2);
}

async fn history_is_filtered_and_followed(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let carol = database.online("carol").await;
    alice
        .events("/e2", vec![conversation(), message(1, "one"), message(2, "two"), message(3, "three")])
        .await;
    carol.events("/e2", vec![conversation(), message(1, "for carol")]).await;
    let store = &database.store;
    let history = async |filter: HistoryFilter| {
        let rows = store.history(&HistoryFilter { limit: filter.limit.max(2), ..filter }).await.unwrap();
        rows.into_iter().map(|row| row.body).collect::<Vec<_>>()
    };
    let of = |name: &str| HistoryFilter { account: Some(uri(name)), ..HistoryFilter::default() };
    assert_eq!(history(of("alice")).await, ["two", "three"], "the newest ones, in order");
    assert_eq!(history(of("carol")).await, ["for carol"]);
    assert_eq!(history(of("nobody")).await, [""; 0]);
    let after = Some(ucwa_relay::identifiers::MessageId(1));
    assert_eq!(history(HistoryFilter { after, ..of("alice") }).await, ["two", "three"]);
    let with = HistoryFilter { with: Some(uri("bob")), limit: 10, ..HistoryFilter::default() };
    assert_eq!(history(with).await.len(), 4);
    let with = HistoryFilter { with: Some(uri("dave")), ..HistoryFilter::default() };
    assert_eq!(history(with).await.len(), 0);
    let until = HistoryFilter { until: Some(Timestamp::now() - 1.hour()), ..HistoryFilter::default() };
    assert_eq!(history(until).await.len(), 0);
    store.record_access("root", "history", Some(&uri("alice")), "with:bob").await.unwrap();
    store.ping().await.unwrap();
    assert_eq!(database.outside().await.count("access_log").await, 1);
}

async fn the_views_read_well(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    alice.events("/e2", vec![conversation(), bob_joined(), message(1, "Hungry?")]).await;
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    let send = database.claim().await.remove(0);
    alice.send_fact(&send, accepted(2)).await;
    alice.events("/e3", vec![our_message(2)]).await;
    let mut outside = database.outside().await;
    assert_eq!(
        outside
            .rows(
                "SELECT account, direction, sender, sender_name, recipients, thread_id, subject, body, status, source
                   FROM message_history ORDER BY message_id"
            )
            .await,
        [
            "sip:alice@contoso.com|incoming|sip:bob@contoso.com|Bob|sip:alice@contoso.com|thread|Lunch|Hungry?\
             |delivered|event",
            "sip:alice@contoso.com|outgoing|sip:alice@contoso.com||sip:bob@contoso.com|thread|Lunch|Deploy finished\
             |delivered|event",
        ]
    );
    assert_eq!(
        outside.rows("SELECT account, participants, message_count, state FROM conversation_summary").await,
        ["sip:alice@contoso.com|sip:bob@contoso.com|2|Connected"]
    );
    assert_eq!(
        outside.rows("SELECT account, state, count FROM outbox_status").await,
        ["sip:alice@contoso.com|delivered|1"]
    );
    assert_eq!(outside.rows("SELECT sent_at FROM message_history").await[0].len(), 24);
}

// ------------------------------------------------------------------------------------------------ outbox

async fn three_columns_are_enough_and_are_noticed_at_once(kind: Kind) {
    let database = Database::new(kind).await;
    database.online("alice").await;
    assert!(database.claim().await.is_empty());
    let mut outside = database.outside().await;
    // What happened before the watch began may be reported once.
    database.store.outbox_changed(Duration::from_millis(1)).await;
    let store = database.store.clone();
    let noticed = tokio::spawn(async move { store.outbox_changed(2 * PATIENCE).await });
    outside
        .run(
            "INSERT INTO outbox (account, recipients, body)
             VALUES ('sip:alice@contoso.com', 'sip:bob@contoso.com', 'Deploy finished')",
        )
        .await
        .unwrap();
    tokio::time::timeout(PATIENCE, noticed).await.expect("noticed long before the safety net").unwrap();
    let send = database.claim().await.remove(0);
    assert_eq!(send.recipients, [uri("bob")]);
    assert_eq!(
        (send.content_type.as_str(), send.importance.as_str(), send.attempt),
        ("text/plain", "Normal", 1)
    );
    assert_eq!(send.max_attempts, 3);
    assert!(Timestamp::now().duration_since(send.created_at).as_secs() < 60);
    assert!(send.operation_id.0.len() <= 50);
}

async fn a_destination_is_served_in_order_one_at_a_time(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    outside
        .run(
            "INSERT INTO outbox (account, recipients, body, priority) VALUES
                 ('sip:alice@contoso.com', 'bob@contoso.com', 'third', 100),
                 ('sip:alice@contoso.com', 'SIP:BOB@contoso.com', 'first', 1),
                 ('sip:alice@contoso.com', 'carol@contoso.com', 'to carol', 100),
                 ('sip:alice@contoso.com', 'bob@contoso.com', 'second', 50)",
        )
        .await
        .unwrap();
    let bodies = |claimed: &[ClaimedSend]| claimed.iter().map(|send| send.body.clone()).collect::<Vec<_>>();
    let claimed = database.claim().await;
    assert_eq!(bodies(&claimed), ["first", "to carol"]);
    assert!(database.claim().await.is_empty(), "one at a time");

    // The first one has to wait for its next attempt: nothing overtakes it.
    let soon = Timestamp::now() + 30.seconds();
    alice.send_fact(&claimed[0], retry_at(soon)).await;
    assert!(database.claim().await.is_empty());
    assert_eq!(
        database.store.next_due(Timestamp::now()).await.unwrap().unwrap().as_second(),
        soon.as_second()
    );
    let again = database.claim_at(soon + 1.seconds()).await;
    assert_eq!((bodies(&again), again[0].attempt), (vec!["first".to_owned()], 2));
    assert_ne!(again[0].operation_id, claimed[0].operation_id);
    alice.send_fact(&again[0], accepted(1)).await;
    assert_eq!(bodies(&database.claim().await), ["second"]);
    let (row, attempts) = database.store.outbox_row(again[0].outbox).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts), (OutboxState::Sent, 2));
    let outcomes: Vec<_> = attempts.iter().map(|attempt| attempt.outcome.as_deref().unwrap()).collect();
    assert_eq!(outcomes, ["queued", "sent"]);
    assert_eq!(attempts[0].http_status, Some(503));
}

async fn rows_wait_for_their_time_their_account_and_their_node(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    outside
        .run(&format!(
            "INSERT INTO outbox (account, recipients, body, send_after) VALUES
                 ('alice@contoso.com', 'bob@contoso.com', 'tomorrow', {}),
                 ('alice@contoso.com', 'bob@contoso.com', 'now', NULL)",
            time_from_now(24.hours())
        ))
        .await
        .unwrap();
    database.store.record_state(alice.account, AccountState::BackingOff, None, NODE).await.unwrap();
    assert!(database.claim().await.is_empty());
    database.store.record_state(alice.account, AccountState::Online, None, "another node").await.unwrap();
    assert!(database.claim().await.is_empty());
    database.store.record_state(alice.account, AccountState::Online, None, NODE).await.unwrap();
    let claimed = database.claim().await;
    assert_eq!(claimed[0].body, "now");
    alice.send_fact(&claimed[0], accepted(1)).await;
    let tomorrow = database.store.next_due(Timestamp::now()).await.unwrap().unwrap();
    assert!(tomorrow > Timestamp::now() + 23.hours());
    assert!(database.claim().await.is_empty());
    assert_eq!(database.claim_at(tomorrow).await[0].body, "tomorrow");
}

async fn accounts_take_turns_when_there_is_too_much(kind: Kind) {
    let database = Database::new(kind).await;
    database.online("alice").await;
    database.online("carol").await;
    for number in 0..20 {
        database.store.enqueue(&row(&format!("user{number}@contoso.com"))).await.unwrap();
    }
    let late = NewOutboxRow { account: "carol@contoso.com".into(), ..row("bob@contoso.com") };
    database.store.enqueue(&late).await.unwrap();
    let limited = ClaimSettings { limit: 2, ..claim_settings() };
    let claimed = database.store.claim_due(Timestamp::now(), &limited).await.unwrap();
    let accounts: Vec<_> = claimed.iter().map(|send| send.account.0).collect();
    assert_eq!(accounts, [1, 2]);
}

/// From the moment on at which it is disabled, not only when its actor hears of it.
async fn rows_of_a_disabled_account_wait(kind: Kind) {
    let database = Database::new(kind).await;
    database.online("alice").await;
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    let mut outside = database.outside().await;
    outside.run("UPDATE accounts SET enabled = FALSE WHERE sip_uri = 'sip:alice@contoso.com'").await.unwrap();
    assert_eq!(database.store.claim_due(Timestamp::now(), &claim_settings()).await.unwrap().len(), 0);
    assert_eq!(database.state(1).await.0, OutboxState::Queued);
    outside.run("UPDATE accounts SET enabled = TRUE").await.unwrap();
    assert_eq!(database.store.claim_due(Timestamp::now(), &claim_settings()).await.unwrap().len(), 1);
}

async fn an_account_may_claim_only_so_much_and_its_destinations_take_turns(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let carol = database.online("carol").await;
    for to in ["a", "a", "a", "b", "c", "d"] {
        database.store.enqueue(&row(&format!("{to}@contoso.com"))).await.unwrap();
    }
    let urgent = "INSERT INTO outbox (account, recipients, body, priority)
                  VALUES ('alice@contoso.com', 'a@contoso.com', 'urgent', 1)";
    let late = NewOutboxRow { account: "carol@contoso.com".into(), ..row("bob@contoso.com") };
    database.store.enqueue(&late).await.unwrap();
    let claim = async |rows: i64, after: Option<&str>| {
        let own = Allowance { account: alice.account, rows, after: after.map(str::to_owned) };
        let allowances = Allowances { each: 1, others: vec![own] };
        let settings = ClaimSettings { allowances, ..claim_settings() };
        let claimed = database.store.claim_due(Timestamp::now(), &settings).await.unwrap();
        claimed.into_iter().map(|send| (send.account, send.destination.clone(), send)).collect::<Vec<_>>()
    };
    let to = |claimed: &[(AccountId, String, ClaimedSend)]| {
        claimed.iter().map(|(_, destination, _)| destination.clone()).collect::<Vec<_>>()
    };

    // Who may claim nothing is passed over; the others have what each may.
    let claimed = claim(0, None).await;
    assert_eq!((claimed.len(), claimed[0].0), (1, carol.account));
    let first = claim(2, None).await;
    assert_eq!(to(&first), ["sip:a@contoso.com", "sip:b@contoso.com"]);
    for (number, (_, _, send)) in (1..).zip(&first) {
        alice.send_fact(send, accepted(number)).await;
    }
    // The next row to the first destination comes after those that have not had their turn.
    let second = claim(3, Some("sip:b@contoso.com")).await;
    assert_eq!(to(&second), ["sip:c@contoso.com", "sip:d@contoso.com", "sip:a@contoso.com"]);
    for (number, (_, _, send)) in (11..).zip(&second) {
        alice.send_fact(send, accepted(number)).await;
    }
    // What is urgent goes before anything else.
    database.outside().await.run(urgent).await.unwrap();
    let third = claim(1, Some("sip:a@contoso.com")).await;
    assert_eq!(third[0].2.body, "urgent");
    assert_eq!(database.state(3).await.0, OutboxState::Queued);
}

async fn what_cannot_be_sent_fails_with_words_and_blocks_nothing(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let carol = database.online("carol").await;
    carol.events("/e2", vec![conversation()]).await;
    database.store.set_enabled(alice.account, true).await.unwrap();
    let mut outside = database.outside().await;
    let cases = [
        (
            "'nobody@contoso.com', 'bob@contoso.com', 'x', 'text/plain', 'Normal', NULL, NULL",
            "UnknownAccount",
        ),
        ("'alice', 'bob@contoso.com', 'x', 'text/plain', 'Normal', NULL, NULL", "MalformedAccount"),
        ("'alice@contoso.com', 'bob', 'x', 'text/plain', 'Normal', NULL, NULL", "MalformedRecipient"),
        ("'alice@contoso.com', NULL, 'x', 'text/plain', 'Normal', NULL, NULL", "NoRecipient"),
        ("'alice@contoso.com', 'bob@contoso.com', ' ', 'text/plain', 'Normal', NULL, NULL", "EmptyBody"),
        (
            "'alice@contoso.com', 'bob@contoso.com', 'LONG', 'text/plain', 'Normal', NULL, NULL",
            "BodyTooLarge",
        ),
        (
            "'alice@contoso.com', 'bob@contoso.com', 'x', 'text/rtf', 'Normal', NULL, NULL",
            "UnknownContentType",
        ),
        ("'alice@contoso.com', 'bob@contoso.com', 'x', 'text/plain', 'Low', NULL, NULL", "UnknownImportance"),
        ("'alice@contoso.com', NULL, 'x', 'text/plain', 'Normal', 1, NULL", "UnknownConversation"),
        (
            "'alice@contoso.com', 'bob@contoso.com', 'x', 'text/plain', 'Normal', NULL, '2020-01-01'",
            "Expired",
        ),
        (
            "'alice@contoso.com', 'bob@contoso.com', 'good', 'Text/HTML; charset=utf-8', 'urgent', NULL, NULL",
            "",
        ),
        (
            "'alice@contoso.com', 'bob@contoso.com', 'x', 'text/plain', 'Normal', NULL, 'soon'",
            "MalformedTime",
        ),
    ];
    for (values, code) in &cases {
        let values = values.replace("LONG", &"0".repeat(1200));
        let inserted = outside
            .run(&format!(
                "INSERT INTO outbox (account, recipients, body, content_type, importance, conversation_id, expires_at)
                 VALUES ({values})"
            ))
            .await;
        // A column that takes nothing but times needs no service to refuse it.
        assert_eq!(inserted.is_err(), kind == Kind::Postgres && *code == "MalformedTime", "{values}");
    }
    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 1);
    assert_eq!((claimed[0].content_type.as_str(), claimed[0].importance.as_str()), ("text/html", "Urgent"));
    for (id, (values, code)) in (1..).zip(&cases) {
        if kind == Kind::Postgres && *code == "MalformedTime" {
            continue;
        }
        let (state, last_code) = database.state(id).await;
        let expected = match *code {
            "" => OutboxState::Sending,
            "Expired" => OutboxState::Expired,
            _ => OutboxState::Failed,
        };
        assert_eq!((state, last_code.as_deref().unwrap_or_default()), (expected, *code), "{values}");
    }
    assert_eq!(outside.count("outbox WHERE state = 'failed' AND last_error IS NULL").await, 0);
    assert_eq!(outside.count("outbox WHERE state IN ('failed', 'expired') AND finished_at IS NULL").await, 0);
}

#[tokio::test]
async fn a_row_that_is_no_text_is_refused_and_holds_up_no_other() {
    let database = Database::new(Kind::Sqlite).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    let columns = [
        "account",
        "recipients",
        "body",
        "content_type",
        "subject",
        "importance",
        "thread_id",
        "send_after",
        "expires_at",
        "correlation",
        "idempotency_key",
    ];
    for column in columns {
        outside
            .run(
                "INSERT INTO outbox (account, recipients, body, state)
                 VALUES ('alice@contoso.com', 'bob@contoso.com', 'x', 'held')",
            )
            .await
            .unwrap();
        outside
            .run(&format!("UPDATE outbox SET {column} = {LATIN_1}, state = 'queued' WHERE state = 'held'"))
            .await
            .unwrap();
    }
    outside
        .run("INSERT INTO outbox (account, recipients, body) VALUES ('alice@contoso.com', 5, 'to a number')")
        .await
        .unwrap();
    outside
        .run(
            "INSERT INTO outbox (account, recipients, body, subject)
             VALUES ('alice@contoso.com', 'bob@contoso.com', 42, 7)",
        )
        .await
        .unwrap();
    let blob = "INSERT INTO outbox (account, recipients, body) VALUES ('alice@contoso.com', 'x@y.z', X'00')";
    assert!(outside.run(blob).await.is_err(), "the column takes no BLOB");

    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 1);
    assert_eq!((claimed[0].body.as_str(), claimed[0].subject.as_deref()), ("42", Some("7")));
    for (id, column) in (1..).zip(columns) {
        let (row, _) = database.store.outbox_row(OutboxId(id)).await.unwrap().unwrap();
        assert_eq!(
            (row.state, row.last_code.as_deref()),
            (OutboxState::Failed, Some("Unreadable")),
            "{column}"
        );
        let sentence = row.last_error.unwrap();
        assert!(sentence.starts_with(column) && sentence.contains("UTF-8"), "{sentence}");
        assert!(row.finished_at.is_some());
    }
    assert_eq!(database.state(12).await.1.as_deref(), Some("MalformedRecipient"));
    let everything = OutboxFilter { limit: 100, ..OutboxFilter::default() };
    let rows = database.store.outbox_rows(&everything).await.unwrap();
    assert_eq!(rows.len(), 13);
    assert_eq!(rows[10].body, "caf\u{fffd}");
    assert_eq!(
        outside.count("outbox WHERE account_id IS NULL AND state = 'failed'").await,
        1,
        "whose is known"
    );

    // Corrected as the sentence says, it goes its way.
    alice.send_fact(&claimed[0], accepted(1)).await;
    outside.run("UPDATE outbox SET body = 'café', state = 'queued' WHERE id = 3").await.unwrap();
    assert_eq!(database.claim().await[0].body, "café");
}

#[tokio::test]
async fn a_row_that_is_spoilt_on_its_way_holds_up_no_other() {
    let mut database = Database::new(Kind::Sqlite).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    for friend in ["bob", "carol", "dave", "erin", "erin"] {
        database.store.enqueue(&row(&format!("{friend}@contoso.com"))).await.unwrap();
    }
    database.store.record_state(alice.account, AccountState::BackingOff, None, NODE).await.unwrap();
    assert!(database.claim().await.is_empty(), "admitted and not claimed");
    for change in [
        format!("correlation = {LATIN_1}, last_error = {LATIN_1}, created_at = {LATIN_1} WHERE id = 1"),
        "attempts = 9223372036854775807 WHERE id = 3".to_owned(),
        // As the service writes, so that the row is not looked at again.
        format!("body = {LATIN_1}, revision = revision + 1 WHERE id = 4"),
    ] {
        outside.run(&format!("UPDATE outbox SET {change}")).await.unwrap();
    }
    database.store.record_state(alice.account, AccountState::Online, None, NODE).await.unwrap();
    let claimed = database.claim().await;
    assert_eq!(claimed.iter().map(|send| send.outbox.0).collect::<Vec<_>>(), [1, 2, 3]);
    let (spoilt, attempts) = database.store.outbox_row(OutboxId(4)).await.unwrap().unwrap();
    assert_eq!((spoilt.state, spoilt.last_code.as_deref()), (OutboxState::Failed, Some("Unreadable")));
    assert_eq!(attempts[0].outcome.as_deref(), Some("failed"));
    assert_eq!(database.claim().await[0].outbox.0, 5, "who stood behind it is next");

    outside
        .run(&format!("UPDATE outbox SET body = {LATIN_1}, thread_id = {LATIN_1} WHERE id = 2"))
        .await
        .unwrap();
    database.reopen().await;
    let unsettled = database.store.unsettled_sends(alice.account).await.unwrap();
    assert_eq!(unsettled.len(), 4);
    assert_eq!(unsettled[1].send.body, "caf\u{fffd}");
    let alice = Online { store: database.store.clone(), ..alice };
    alice.send_fact(&claimed[0], accepted(1)).await;
    assert_eq!(database.state(1).await.0, OutboxState::Sent);
    assert_eq!(texts(&database.store).await.len(), 1);
    outside.run(&format!("UPDATE messages SET sender_name = {LATIN_1}")).await.unwrap();
    assert_eq!(texts(&database.store).await.len(), 1);
}

async fn what_was_missed_of_a_send_is_known_to_the_next_life(kind: Kind) {
    let database = Database::new(kind).await;
    let missed = async |online: &Online| {
        let unsettled = database.store.unsettled_sends(online.account).await.unwrap();
        assert_eq!(unsettled.len(), 1);
        unsettled[0].events_missed
    };
    let unreadable = || Fact::Quarantined(Quarantined::new("can't be read", "<events"));
    let Fact::Invitation(invitation_fact) = invitation() else { unreachable!() };
    let invitation_by_link = |number: u32| InvitationFact {
        href: format!("/invitations/{number}"),
        direction: None,
        state: None,
        thread_id: None,
        from: None,
        to_uri: None,
        conversation_href: None,
        content: Content::default(),
        link_only: true,
        ..invitation_fact.clone()
    };
    let in_vain = |number: u32| {
        Fact::Unfetchable(Unfetchable {
            fetch: Fetch {
                resource: FetchedResource::Invitation(InvitationKind::Messaging),
                href: format!("/invitations/{number}"),
                conversation_href: None,
            },
            why: "404".to_owned(),
        })
    };
    let mut accounts = Vec::new();
    for name in ["alice", "bob", "carol"] {
        let online = database.online(name).await;
        // What was missed before the claim is of something else.
        let since = Timestamp::now() - 1.hour();
        database
            .store
            .record_stretch(online.account, online.session.id, since, since + 1.minute(), "away")
            .await
            .unwrap();
        for (cursor, fact) in [
            (Some("/events?ack=2"), unreadable()),
            (Some("/events?ack=3"), Fact::Invitation(invitation_by_link(1))),
            (None, in_vain(1)),
        ] {
            let commit = ArchiveCommit { received_at: since, ..online.commit_of(cursor, vec![fact]) };
            database.store.commit(commit).await.unwrap();
        }
        let to_erin = NewOutboxRow { account: uri(name).to_string(), ..row("erin@contoso.com") };
        database.store.enqueue(&to_erin).await.unwrap();
        accounts.push(online);
    }
    assert_eq!(database.claim().await.len(), 3);
    for online in &accounts {
        // A plain restart; an event that was understood but for its kind; a body of a log; a call from somebody.
        let (account, session) = (online.account, online.session.id);
        database
            .store
            .record_gap(account, session, Timestamp::now() + 1.second(), NOT_FOLLOWED)
            .await
            .unwrap();
        let sender = EventSender { rel: "me".to_owned(), href: "/me".to_owned() };
        let odd = Quarantined { sender: Some(sender), ..Quarantined::new("odd", "<odd/>") };
        online.events("/events?ack=4", vec![Fact::Quarantined(odd), invitation()]).await;
        online.answer(unreadable()).await;
        assert!(!missed(online).await);
    }
    let [alice, bob, carol] = accounts.try_into().ok().unwrap();

    let (from, to) = (Timestamp::now(), Timestamp::now() + 1.second());
    database
        .store
        .record_stretch(alice.account, alice.session.id, from, to, "the database was away")
        .await
        .unwrap();
    assert!(missed(&alice).await);

    bob.events("/events?ack=5", vec![unreadable()]).await;
    assert!(missed(&bob).await);

    carol.events("/events?ack=5", vec![Fact::Invitation(invitation_by_link(2))]).await;
    assert!(!missed(&carol).await, "it is still to be read");
    carol.answer(in_vain(2)).await;
    assert!(missed(&carol).await);
}

async fn a_row_that_waited_too_long_expires(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.store.record_state(alice.account, AccountState::BackingOff, None, NODE).await.unwrap();
    let mut outside = database.outside().await;
    outside
        .run(&format!(
            "INSERT INTO outbox (account, recipients, body, expires_at)
             VALUES ('alice@contoso.com', 'bob@contoso.com', 'x', {})",
            time_from_now(1.hour())
        ))
        .await
        .unwrap();
    assert!(database.claim().await.is_empty());
    assert_eq!(database.state(1).await.0, OutboxState::Queued);
    let due = database.store.next_due(Timestamp::now()).await.unwrap().unwrap();
    database.claim_at(due).await;
    assert_eq!(database.state(1).await, (OutboxState::Expired, Some("Expired".to_owned())));
    // Queued again, it is no longer late.
    outside.run("UPDATE outbox SET state = 'queued'").await.unwrap();
    database.store.record_state(alice.account, AccountState::Online, None, NODE).await.unwrap();
    assert_eq!(database.claim_at(due + 1.hour()).await.len(), 1);
}

async fn users_change_states_that_are_theirs_and_no_others(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    for body in ["cancelled", "held", "sent"] {
        database.store.enqueue(&NewOutboxRow { body: body.into(), ..row("bob@contoso.com") }).await.unwrap();
    }
    outside.run("UPDATE outbox SET state = 'cancelled' WHERE id = 1").await.unwrap();
    assert!(database.store.set_outbox_state(OutboxId(2), OutboxState::Held).await.unwrap());
    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 1);
    assert_eq!(claimed[0].body, "sent");
    for state in ["cancelled", "held", "queued", "delivered"] {
        let refused =
            outside.run(&format!("UPDATE outbox SET state = '{state}' WHERE id = 3")).await.unwrap_err();
        assert!(refused.contains("outbox"), "{refused}");
    }
    assert!(!database.store.set_outbox_state(OutboxId(3), OutboxState::Cancelled).await.unwrap());
    alice.send_fact(&claimed[0], accepted(1)).await;
    assert!(outside.run("UPDATE outbox SET state = 'cancelled' WHERE id = 3").await.is_err());
    assert!(outside.run("UPDATE outbox SET state = 'queued' WHERE id = 1").await.is_err());
    assert!(
        outside.run("INSERT INTO outbox (account, body, state) VALUES ('a', 'b', 'sent')").await.is_err()
    );

    assert!(database.store.set_outbox_state(OutboxId(2), OutboxState::Queued).await.unwrap());
    assert_eq!(database.claim().await[0].body, "held");
    assert_eq!(
        outside.rows("SELECT state, finished_at IS NULL FROM outbox WHERE id = 1").await,
        ["cancelled|0"]
    );
    assert_eq!(database.store.outbox_counts().await.unwrap()["cancelled"], 1);
}

async fn a_failed_row_is_corrected_and_queued_again_by_plain_sql(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.store.enqueue(&row("bob")).await.unwrap();
    database.claim().await;
    assert_eq!(database.state(1).await.1.as_deref(), Some("MalformedRecipient"));
    let mut outside = database.outside().await;
    outside
        .run("UPDATE outbox SET recipients = 'bob@contoso.com', state = 'queued' WHERE id = 1")
        .await
        .unwrap();
    let first = database.claim().await.remove(0);
    let refused = SendOutcome::Refused {
        conversation_href: None,
        reason: FailureReason { code: Some("NotFound".into()), ..FailureReason::default() },
        http_status: Some(404),
        error: "there is no such user".to_owned(),
    };
    alice.send_fact(&first, refused).await;
    assert_eq!(database.state(1).await, (OutboxState::Failed, Some("NotFound".to_owned())));
    outside.run("UPDATE outbox SET state = 'queued' WHERE id = 1").await.unwrap();
    // A queued row that its user corrects is looked at again.
    outside.run("UPDATE outbox SET recipients = 'carol@contoso.com' WHERE id = 1").await.unwrap();
    let second = database.claim().await.remove(0);
    assert_eq!((second.attempt, second.recipients), (1, vec![uri("carol")]));
    let (_, attempts) = database.store.outbox_row(OutboxId(1)).await.unwrap().unwrap();
    assert_eq!(attempts.iter().map(|attempt| attempt.attempt).collect::<Vec<_>>(), [1, 2]);
}

async fn an_idempotency_key_counts_per_account(kind: Kind) {
    let database = Database::new(kind).await;
    let key = |account: &str| NewOutboxRow {
        account: account.to_owned(),
        idempotency_key: Some("build 17".to_owned()),
        ..row("bob@contoso.com")
    };
    database.store.enqueue(&key("alice@contoso.com")).await.unwrap();
    let refused = database.store.enqueue(&key("SIP:Alice@contoso.com")).await.unwrap_err();
    assert!(matches!(refused, StoreError::AlreadyExists(_)), "{refused}");
    database.store.enqueue(&key("carol@contoso.com")).await.unwrap();
    let filter = OutboxFilter {
        account: Some(uri("alice")),
        state: Some(OutboxState::Queued),
        limit: 10,
        ..OutboxFilter::default()
    };
    assert_eq!(database.store.outbox_rows(&filter).await.unwrap().len(), 1);
}

async fn a_send_survives_a_crash_and_a_claim_can_be_given_back(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.store.enqueue(&row("bob@contoso.com;carol@contoso.com")).await.unwrap();
    let claimed = database.claim().await.remove(0);
    database.reopen().await;
    let unsettled = database.store.unsettled_sends(alice.account).await.unwrap();
    assert_eq!(unsettled.len(), 1);
    assert_eq!(unsettled[0].send.operation_id, claimed.operation_id);
    assert_eq!(unsettled[0].send.recipients, claimed.recipients);
    database
        .store
        .release_claim(&ClaimedSend { operation_id: OperationId("another".into()), ..claimed.clone() })
        .await
        .unwrap();
    assert_eq!(database.state(1).await.0, OutboxState::Sending);
    database.store.release_claim(&claimed).await.unwrap();
    let (row, attempts) = database.store.outbox_row(OutboxId(1)).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, attempts.len()), (OutboxState::Queued, 0, 0));
}

async fn an_answer_goes_into_its_conversation_and_shares_the_order_of_its_party(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    alice.events("/e2", vec![conversation(), bob_joined()]).await;
    let mut outside = database.outside().await;
    outside
        .run("INSERT INTO outbox (account, conversation_id, body) VALUES ('alice@contoso.com', 1, 'answer')")
        .await
        .unwrap();
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 1);
    assert_eq!(claimed[0].conversation, Some((ConversationId(1), Some(TALK.to_owned()))));
    assert!(claimed[0].recipients.is_empty());
    alice.send_fact(&claimed[0], accepted(1)).await;
    alice
        .events("/e3", vec![Fact::ConversationEnded(ConversationEnded { href: TALK.into(), reason: None })])
        .await;
    outside
        .run("INSERT INTO outbox (account, conversation_id, body, priority) VALUES ('alice@contoso.com', 1, 'late', 1)")
        .await
        .unwrap();
    let claimed = database.claim().await;
    assert_eq!(claimed[0].conversation, Some((ConversationId(1), None)), "it is over");
}

async fn the_201_and_the_event_lead_to_one_message_in_either_order(kind: Kind) {
    for event_first in [true, false] {
        let database = Database::new(kind).await;
        let alice = database.online("alice").await;
        alice.events("/e2", vec![conversation(), bob_joined()]).await;
        database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
        let send = database.claim().await.remove(0);
        if event_first {
            let outcome = alice.events("/e3", vec![our_message(1)]).await;
            assert_eq!(outcome.settled.len(), 1);
            assert_eq!(outcome.settled[0].outbox, send.outbox);
            alice.send_fact(&send, accepted(1)).await;
        } else {
            alice.send_fact(&send, accepted(1)).await;
            alice.events("/e3", vec![our_message(1)]).await;
        }
        let mut outside = database.outside().await;
        assert_eq!(
            outside.rows("SELECT body, status, outbox_id, chain_seq FROM messages").await,
            ["Deploy finished|delivered|1|1"]
        );
        let (row, _) = database.store.outbox_row(send.outbox).await.unwrap().unwrap();
        assert_eq!((row.state, row.message_id.map(|id| id.0)), (OutboxState::Delivered, Some(1)));
        assert!(row.sent_at.is_some() && row.finished_at.is_some());
    }
}

async fn a_burst_is_admitted_in_parts_that_all_accounts_share(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.online("carol").await;
    let mut outside = database.outside().await;
    outside
        .run(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)
             INSERT INTO outbox (account, recipients, body)
             SELECT 'alice@contoso.com', 'bob@contoso.com', 'text ' || i FROM n",
        )
        .await
        .unwrap();
    outside.run("INSERT INTO outbox (account, recipients, body) VALUES ('carol@contoso.com', 'bob@contoso.com', 'behind')").await.unwrap();
    let mut claimed = database.claim().await;
    assert_eq!(claimed.iter().map(|send| send.body.as_str()).collect::<Vec<_>>(), ["text 1", "behind"]);
    let first = claimed.remove(0);
    // More new rows were left for the next time, and that is announced.
    let announced =
        tokio::time::timeout(Duration::from_secs(5), database.store.outbox_changed(Duration::from_mins(1)));
    assert!(announced.await.is_ok());
    let mut waiting = outside.count("outbox WHERE destination IS NULL").await;
    assert!(waiting > 0, "nothing was left");
    while waiting > 0 {
        assert!(database.claim().await.is_empty());
        let left = outside.count("outbox WHERE destination IS NULL").await;
        assert!(left < waiting, "{left} rows are left, as before");
        waiting = left;
    }
    alice.send_fact(&first, accepted(1)).await;
    assert_eq!(database.claim().await[0].body, "text 2");
}

// ------------------------------------------------------------------------------------------------ the file

async fn a_second_server_is_refused_and_a_tool_is_not(kind: Kind) {
    let database = Database::new(kind).await;
    let refused = connect(&database.settings(), Role::Server).await.err().unwrap();
    assert!(
        matches!(&refused, StoreError::InUse(words) if words.contains("another ucwa-relay server")),
        "{refused}"
    );
    let tool = connect(&database.settings(), Role::Tool).await.unwrap();
    tool.add_account(&new_account("alice")).await.unwrap();
    tool.close().await;
    assert_eq!(database.store.accounts().await.unwrap().len(), 1);
    database.store.close().await;
    assert!(matches!(database.store.add_account(&new_account("bob")).await, Err(StoreError::Closing)));
    let next = connect(&database.settings(), Role::Server).await.unwrap();
    next.close().await;
    assert_eq!(database.outside().await.count("nodes WHERE stopped_at IS NOT NULL").await, 1);
}

async fn a_newer_schema_is_refused_with_what_to_do(kind: Kind) {
    let database = Database::new(kind).await;
    database.store.close().await;
    database
        .outside()
        .await
        .run(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             SELECT 999, 'future', TRUE, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
        )
        .await
        .unwrap();
    let refused = migrate(&database.settings()).await.unwrap_err().to_string();
    assert!(refused.contains("999") && refused.contains("newer"), "{refused}");
}

#[tokio::test]
async fn the_full_text_index_comes_and_goes_with_the_setting() {
    let mut database = Database::new(Kind::Sqlite).await;
    let alice = database.online("alice").await;
    alice.events("/e2", vec![message(1, "Grüße aus Köln"), message(2, "会議は明日です")]).await;
    let search = async |database: &Database, words: &str| {
        let mut outside = database.outside().await;
        outside.rows(&format!("SELECT rowid FROM messages_fts WHERE messages_fts MATCH '\"{words}\"'")).await
    };
    assert_eq!(search(&database, "koln").await, ["1"]);
    assert_eq!(search(&database, "aus Köln").await, ["1"], "SQLite folds what is asked for");
    assert_eq!(search(&database, "会 議 は").await, ["2"], "each such character is a word");
    alice.events("/e3", vec![link(3)]).await;
    alice.events("/e4", vec![message(3, "read later"), message(1, "Grüße aus Köln")]).await;
    assert_eq!(search(&database, "later").await, ["3"]);
    assert_eq!(search(&database, "aus Köln").await, ["1"], "what was said twice is there once");
    database.outside().await.run("UPDATE messages SET body = 'taken away' WHERE id = 3").await.unwrap();
    assert_eq!(search(&database, "later").await, [""; 0], "a text that is taken away leaves no word");
    database.store.close().await;
    let without = StoreSettings { full_text: false, ..database.settings() };
    connect(&without, Role::Server).await.unwrap().close().await;
    assert_eq!(database.outside().await.count("sqlite_schema WHERE name LIKE 'messages_fts%'").await, 0);
    database.reopen().await;
    assert_eq!(search(&database, "grusse").await, [""; 0]);
    assert_eq!(search(&database, "Grüße").await, ["1"], "what was there is indexed");
}

#[tokio::test]
async fn a_database_in_memory_serves_tests() {
    let store = connect(&settings("sqlite::memory:".to_owned()), Role::Server).await.unwrap();
    let account = store.add_account(&new_account("alice")).await.unwrap();
    let session = store.begin_session(account, "/a", "/e", "").await.unwrap();
    let alice = Online { store: store.clone(), account, session };
    alice.events("/e2", vec![message(1, "Hi")]).await;
    assert_eq!(texts(&store).await, ["Hi"]);
    store.close().await;
}

// ------------------------------------------------------------------------------------------------ plans

/// Statements that were run, as the driver tells.
#[derive(Clone, Default)]
struct Statements(Arc<Mutex<BTreeSet<String>>>);

impl<S: tracing::Subscriber> Layer<S> for Statements {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
            fn record_str(&mut self, field: &Field, value: &str) {
                // The driver shortens what fits on a line into the one and has the whole in the other.
                if (field.name() == "db.statement" && !value.is_empty())
                    || (field.name() == "summary" && self.0.is_empty())
                {
                    value.clone_into(&mut self.0);
                }
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().insert(text.0);
    }
}

/// Tables that grow as long as the relay runs.
const GROWING: [&str; 9] = [
    "conversations",
    "gaps",
    "invitations",
    "messages",
    "outbox",
    "outbox_attempts",
    "participants",
    "sessions",
    "typing",
];

/// The planner goes by what a statement says and not by how many rows there are, since nothing has counted them: so
/// what it does in a small archive it does in a large one.
#[tokio::test]
async fn sqlite_walks_through_no_table_that_grows_for_what_a_server_does() {
    let statements = Statements::default();
    let filter = tracing_subscriber::EnvFilter::new("off,sqlx::query=debug");
    tracing::subscriber::set_global_default(
        tracing_subscriber::registry().with(statements.clone().with_filter(filter)),
    )
    .unwrap();
    let kind = Kind::Sqlite;
    a_session_is_resumed_and_a_new_one_ends_it(kind).await;
    a_resume_ends_what_was_open_in_the_commit_that_moves_the_cursor(kind).await;
    a_gap_asks_for_its_backfill_until_the_schedule_ends(kind).await;
    hints_of_an_account_are_one_wish_that_begins_anew(kind).await;
    a_log_adds_what_no_session_has_archived_however_often_it_is_read(kind).await;
    who_typed_and_where_a_talk_went_on_is_stored_once(kind).await;
    what_was_committed_and_not_acknowledged_comes_again_and_changes_nothing(kind).await;
    a_text_that_is_not_repeated_is_settled_after_its_time(kind).await;
    the_text_of_a_call_whose_events_never_came_is_archived_all_the_same(kind).await;
    the_text_of_a_call_that_can_not_be_read_is_archived_when_it_was_accepted(kind).await;
    rows_wait_for_their_time_their_account_and_their_node(kind).await;
    what_cannot_be_sent_fails_with_words_and_blocks_nothing(kind).await;
    a_row_that_waited_too_long_expires(kind).await;
    what_was_missed_of_a_send_is_known_to_the_next_life(kind).await;
    a_failed_row_is_corrected_and_queued_again_by_plain_sql(kind).await;
    a_send_survives_a_crash_and_a_claim_can_be_given_back(kind).await;
    an_answer_goes_into_its_conversation_and_shares_the_order_of_its_party(kind).await;
    the_201_and_the_event_lead_to_one_message_in_either_order(kind).await;

    let statements = std::mem::take(&mut *statements.0.lock().unwrap());
    assert!(statements.len() > 60, "{}", statements.len());
    let database = Database::new(kind).await;
    let mut outside = database.outside().await;
    let partial = outside
        .rows("SELECT name FROM sqlite_schema WHERE type = 'index' AND sql LIKE '% WHERE %' ORDER BY name")
        .await;
    let mut walks = Vec::new();
    for statement in &statements {
        let words: Vec<&str> = statement.split_whitespace().collect();
        // Rows that are put in are looked for by nothing but foreign keys, and only while one of them is broken.
        let is_of_values = words[0] == "INSERT" && words.contains(&"VALUES");
        // What people read is looked for in another way.
        let is_for_people = ["message_history", "conversation_history", "outbox_status", "account_status"]
            .iter()
            .any(|view| words.contains(view));
        if is_of_values
            || is_for_people
            || !["SELECT", "INSERT", "UPDATE", "DELETE", "WITH"].contains(&words[0])
        {
            continue;
        }
        let grows = |name: &str| {
            let stands_for = |pair: &[&str]| GROWING.contains(&pair[0]) && pair[1].trim_matches(',') == name;
            GROWING.contains(&name) || words.windows(2).any(stands_for)
        };
        for step in outside.rows(&format!("EXPLAIN QUERY PLAN {statement}")).await {
            let detail = step.rsplit('|').next().unwrap();
            let Some(what) = detail.strip_prefix("SCAN ") else { continue };
            // An index of some of the rows is there to be walked through.
            let is_of_some = partial.iter().any(|index| detail.ends_with(&format!(" INDEX {index}")));
            if grows(what.split(' ').next().unwrap()) && !is_of_some {
                walks.push(format!("{detail}\n  {}", words.join(" ")));
            }
        }
    }
    assert!(walks.is_empty(), "{}", walks.join("\n"));
}

// ------------------------------------------------------------------------------------------------ on both databases

// Every promise above is kept by both dialects.
on_both_databases!(
    "current_thread":
    an_account_lives_in_the_database,
    a_change_by_plain_sql_moves_updated_at,
    the_overview_tells_what_an_account_is_doing,
    a_session_is_resumed_and_a_new_one_ends_it,
    a_resume_ends_what_was_open_in_the_commit_that_moves_the_cursor,
    the_time_between_two_sessions_is_a_gap,
    a_gap_asks_for_its_backfill_until_the_schedule_ends,
    hints_of_an_account_are_one_wish_that_begins_anew,
    coverage_tells_sessions_and_gaps_by_account,
    a_log_adds_what_no_session_has_archived_however_often_it_is_read,
    quarantined_payloads_are_listed_shown_and_resolved,
    who_typed_and_where_a_talk_went_on_is_stored_once,
    what_was_committed_and_not_acknowledged_comes_again_and_changes_nothing,
    many_accounts_commit_together_and_only_the_offender_fails,
    a_panic_in_the_rules_undoes_one_commit_and_no_other,
    the_chain_runs_through_everything_and_its_head_is_kept,
    a_text_that_is_not_repeated_is_settled_after_its_time,
    the_text_of_a_call_whose_events_never_came_is_archived_all_the_same,
    a_log_tells_of_a_call_whose_events_never_came_what_is_archived_once,
    the_text_of_a_call_without_events_is_dated_when_it_was_accepted,
    the_text_of_a_call_that_can_not_be_read_is_archived_when_it_was_accepted,
    a_log_that_is_read_before_a_call_can_not_be_read_leads_to_one_message,
    a_spoilt_account_leaves_the_others_messages_settled,
    ids_of_removed_rows_are_not_given_again,
    payloads_are_quarantined_outside_a_batch_too,
    history_is_filtered_and_followed,
    the_views_read_well,
    three_columns_are_enough_and_are_noticed_at_once,
    a_destination_is_served_in_order_one_at_a_time,
    rows_wait_for_their_time_their_account_and_their_node,
    accounts_take_turns_when_there_is_too_much,
    rows_of_a_disabled_account_wait,
    an_account_may_claim_only_so_much_and_its_destinations_take_turns,
    what_cannot_be_sent_fails_with_words_and_blocks_nothing,
    a_row_that_waited_too_long_expires,
    what_was_missed_of_a_send_is_known_to_the_next_life,
    users_change_states_that_are_theirs_and_no_others,
    a_failed_row_is_corrected_and_queued_again_by_plain_sql,
    an_idempotency_key_counts_per_account,
    a_send_survives_a_crash_and_a_claim_can_be_given_back,
    an_answer_goes_into_its_conversation_and_shares_the_order_of_its_party,
    the_201_and_the_event_lead_to_one_message_in_either_order,
    a_burst_is_admitted_in_parts_that_all_accounts_share,
    a_second_server_is_refused_and_a_tool_is_not,
    a_newer_schema_is_refused_with_what_to_do,
);
