//! Messages that were kept long enough go, what a hold is about stays, and the chain still proves itself.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    sync::Arc,
};

use jiff::{Timestamp, ToSpan};
use serde_json::Value;
use support::{
    Relay, Simulate,
    archive::{Database, NODE, Online, settings, uri},
    eventually,
    sql::{Kind, Place},
};
use ucwa_relay::{
    archive::fact::{
        ArchiveCommit, Content, ConversationEnded, ConversationFact, Direction, Fact, LoggedConversation,
        LoggedMessage, MessageFact, OperationStatus, ParticipantChange, ParticipantDetails, ParticipantFact,
        Person, Phase, SendFact, SendOutcome,
    },
    store::{NewHold, NewOutboxRow, Policy, PurgeBatch, Role, Stage, StoreError, connect},
};

/// What no row of any table may hold any more; nobody is called so and nothing else says it.
const SECRET: &str = "Zwetschgendatschi";

struct Scene {
    database: Database,
    alice: Online,
    folder: tempfile::TempDir,
}

fn days_ago(days: i64) -> Timestamp {
    let at = Timestamp::now() - (days * 24).hours();
    Timestamp::from_millisecond(at.as_millisecond()).unwrap()
}

fn person(name: &str) -> Person {
    Person {
        contact_uri: None,
        href: Some(format!("/people/{name}")),
        uri: Some(format!("sip:{name}@contoso.com")),
        name: Some(format!("{name} Muster")),
    }
}

fn message(name: &str, number: u32, at: Timestamp, text: &str) -> MessageFact {
    MessageFact {
        unreadable_time: None,
        conversation_href: format!("/conversations/{name}"),
        href: format!("/conversations/{name}/messages/{number}"),
        phase: Phase::Completed,
        direction: Some(Direction::Incoming),
        sender: Some(person(name)),
        content: Content { plain: Some(text.to_owned()), html: Some(format!("<b>{text}</b>")) },
        sent_at: Some(at),
        status: Some(OperationStatus::Success),
        reason: None,
        operation_id: None,
        failed_recipients: Vec::new(),
        link_only: false,
    }
}

/// A talk that is over, as events told of it.
fn talk(alice: &Online, name: &str, at: Timestamp, texts: &[&str]) -> ArchiveCommit {
    let href = format!("/conversations/{name}");
    let with = person(name);
    let mut facts = vec![
        Fact::Conversation(ConversationFact {
            href: href.clone(),
            state: Some("Connected".to_owned()),
            thread_id: Some(format!("thread-{name}")),
            subject: Some(format!("Subject of {name}")),
            ..ConversationFact::default()
        }),
        Fact::Participant(ParticipantFact {
            role: None,
            conversation_href: href.clone(),
            href: format!("/people/{name}"),
            change: ParticipantChange::Joined,
            title: with.name.clone(),
            details: Some(ParticipantDetails { uri: with.uri.clone(), ..ParticipantDetails::default() }),
            is_local: false,
        }),
    ];
    facts.extend(
        (0..).zip(texts).map(|(number, text)| {
            Fact::Message(message(name, number, at + i64::from(number).minutes(), text))
        }),
    );
    facts.push(Fact::ConversationEnded(ConversationEnded { href, reason: None }));
    ArchiveCommit { received_at: at, ..alice.commit_of(Some(&format!("/events?{name}")), facts) }
}

impl Scene {
    async fn new(kind: Kind) -> Self {
        let database = Database::new(kind).await;
        let alice = database.online("alice").await;
        let folder = tempfile::tempdir().unwrap();
        Self { database, alice, folder }
    }

    async fn talked(&self, name: &str, days: i64, texts: &[&str]) {
        let commit = talk(&self.alice, name, days_ago(days), texts);
        self.database.store.commit(commit).await.unwrap();
    }

    fn tool(&self, arguments: &[&str]) -> Output {
        let url = self.database.place.url();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ucwa-relay"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .env("UCWA_RELAY__DATABASE__URL", url)
            .env("UCWA_RELAY__SECRETS__KEY_FILE", self.folder.path().join("ucwa-relay.key"))
            .env("UCWA_RELAY__RETENTION__DEFAULT_DAYS", "30");
        command.output().unwrap()
    }

    #[track_caller]
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.tool(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, arguments: &[&str], words: &[&str]) {
        let output = self.tool(arguments);
        let told = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        assert!(!output.status.success(), "{arguments:?}: {told}");
        for part in words {
            assert!(told.contains(part), "without {part:?}: {told}");
        }
    }

    /// What `retention run` says of alice.
    #[track_caller]
    fn retention(&self, more: &[&str]) -> Value {
        let told = self.done(&[&["retention", "run", "--format", "json"], more].concat());
        let mut told: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["dry_run"], more.contains(&"--dry-run"));
        let mut alice = told["accounts"][0].take();
        assert_eq!(alice["account"], "sip:alice@contoso.com");
        // It is told by the clock of each run.
        alice.as_object_mut().unwrap().remove("before").unwrap();
        alice
    }

    async fn rows(&self, query: &str) -> Vec<String> {
        self.database.outside().await.rows(query).await
    }

    async fn sql(&self, statement: &str) {
        self.database.outside().await.run(statement).await.unwrap();
    }

    /// The tables in which the word stands, whatever their columns.
    async fn tables_with(&self, word: &str) -> Vec<String> {
        let mut outside = self.database.outside().await;
        let (tables, all) = match &self.database.place {
            Place::Sqlite(_) => (
                "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'
                    AND name NOT LIKE 'messages_fts%' AND name NOT IN ('accounts', '_sqlx_migrations') ORDER BY name",
                "*",
            ),
            Place::Postgres(_) => (
                "SELECT relname::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
                  ORDER BY relname",
                "t::text",
            ),
        };
        let mut found = Vec::new();
        // What somebody asked for is no copy of what was said.
        for table in outside.rows(tables).await.into_iter().filter(|table| table != "access_log") {
            let rows = outside.rows(&format!("SELECT {all} FROM {table} t")).await;
            if rows.iter().any(|row| row.contains(word)) {
                found.push(table);
            }
        }
        found
    }

    fn search(&self, words: &str) -> usize {
        self.done(&["search", "--format", "jsonl", words]).lines().count()
    }
}

/// A message of our own, which the queue has, too.
async fn we_said(scene: &Scene) {
    let row = NewOutboxRow {
        account: "alice@contoso.com".to_owned(),
        recipients: "bob@contoso.com".to_owned(),
        body: format!("our {SECRET}"),
        subject: Some(SECRET.to_owned()),
        ..NewOutboxRow::default()
    };
    let store = &scene.database.store;
    store.enqueue(&row).await.unwrap();
    let send = scene.database.claim().await.remove(0);
    let sent_at = days_ago(99);
    let href = "/conversations/bob/messages/ours".to_owned();
    let accepted = SendFact {
        outbox: send.outbox,
        operation_id: send.operation_id.clone(),
        outcome: SendOutcome::MessageAccepted {
            conversation_href: "/conversations/bob".to_owned(),
            message_href: Some(href.clone()),
            as_plain: false,
            not_reached: Vec::new(),
        },
    };
    let completed = MessageFact {
        href,
        direction: Some(Direction::Outgoing),
        sender: None,
        content: Content::default(),
        sent_at: Some(sent_at),
        ..message("bob", 9, sent_at, "")
    };
    let facts = vec![Fact::Send(accepted), Fact::Message(completed)];
    let commit = ArchiveCommit { received_at: sent_at, ..scene.alice.commit_of(None, facts) };
    store.commit(commit).await.unwrap();
}

async fn a_purge_leaves_nothing_but_signed_tombstones(kind: Kind) {
    let scene = Scene::new(kind).await;
    scene.talked("bob", 100, &[SECRET, "lunch Zwetschgendatschi again"]).await;
    scene.talked("carol", 1, &["fresh"]).await;
    we_said(&scene).await;
    let store = &scene.database.store;
    store.quarantine(scene.alice.account, None, "odd", &format!("<x>{SECRET}</x>")).await.unwrap();
    scene.sql(&format!("UPDATE event_quarantine SET received_at = '{:.3}'", days_ago(90))).await;
    scene.done(&["verify"]);
    assert_eq!(scene.search(SECRET), 3);

    let dry = scene.retention(&["--dry-run"]);
    assert_eq!(
        (&dry["messages"], &dry["conversations"], &dry["payloads"]),
        (&3.into(), &1.into(), &1.into())
    );
    assert_eq!(scene.search(SECRET), 3, "a dry run changes nothing");
    assert_eq!(scene.retention(&[]), dry);
    let again = scene.retention(&[]);
    assert_eq!(
        (&again["messages"], &again["conversations"], &again["payloads"]),
        (&0.into(), &0.into(), &0.into())
    );

    for gone in [SECRET, "bob Muster", "Subject of bob"] {
        assert_eq!(scene.tables_with(gone).await, [""; 0], "{gone}");
    }
    assert_eq!(scene.tables_with("carol Muster").await, ["messages", "participants"]);
    assert_eq!(scene.tables_with("sip:bob@contoso.com").await, ["messages", "outbox", "participants"]);
    assert_eq!((scene.search(SECRET), scene.search("fresh")), (0, 1));
    let history = scene.done(&["history"]);
    assert_eq!(history.matches("[purged at ").count(), 3, "{history}");
    assert!(scene.done(&["quarantine", "list", "--all"]).contains("[purged at "));
    scene.refused(&["quarantine", "replay", "1"], &["it was kept long enough and purged at"]);
    scene.done(&["verify"]);

    // Everybody who gets an export sees the same, and can check it without this program.
    for format in ["jsonl", "csv", "html", "eml"] {
        scene.done(&["export", "--format", format, "--out", format]);
        scene.done(&["verify", "--export", format]);
        let text = texts(&scene.folder.path().join(format));
        assert!(text.contains("purged") && !text.contains("bob Muster"), "{format}: {text}");
    }
    let document = include_str!("../docs/evidence.md");
    let program = document.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    let lines = files(&scene.folder.path().join("jsonl/alice@contoso.com")).remove(0);
    let checked = Command::new("python3").args(["-c", program]).arg(&lines).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let exported = fs::read_to_string(&lines).unwrap();

    // What a hand erases is no purge, neither here nor in an export.
    let purged_at = scene.rows("SELECT max(purged_at) FROM messages").await.remove(0);
    let forge = format!(
        "UPDATE messages SET body = '', body_html = NULL, sender_name = NULL, purged_at = '{purged_at}',
                tombstone = (SELECT max(o.tombstone) FROM messages o) WHERE purged_at IS NULL"
    );
    scene.sql("UPDATE messages SET sender_uri = 'sip:eve@contoso.com' WHERE chain_seq = 1").await;
    scene.refused(&["verify"], &["chain_seq 1", "signature of its tombstone does not fit"]);
    scene.sql("UPDATE messages SET sender_uri = 'sip:bob@contoso.com' WHERE chain_seq = 1").await;
    scene.done(&["verify"]);
    scene.sql(&forge).await;
    scene.refused(&["verify"], &["1 difference", "signature of its tombstone does not fit"]);
    scene.sql("UPDATE messages SET tombstone = NULL WHERE chain_seq = 3").await;
    scene.refused(&["verify"], &["chain_seq 3", "erased by hand"]);
    fs::write(&lines, exported.replacen("\"tombstone\":\"", "\"tombstone\":\"00", 1)).unwrap();
    scene.refused(&["verify", "--export", "jsonl"], &["line 1", "tombstone is malformed"]);

    // Who signs with a key of their own is not believed by whoever knows the right one.
    fs::write(&lines, &exported).unwrap();
    scene.done(&["verify", "--export", "jsonl"]);
    let key = scene.folder.path().join("ucwa-relay.seal.key");
    let known = scene.rows("SELECT public_key FROM retention_runs WHERE messages > 0").await.remove(0);
    fs::remove_file(&key).unwrap();
    let stranger = scene.tool(&["verify", "--export", "jsonl"]);
    assert!(
        stranger.status.success() && String::from_utf8_lossy(&stranger.stderr).contains(&known),
        "{stranger:?}"
    );
    scene.refused(&["retention", "run"], &["is missing", &known]);
    scene.done(&["seal", "--out", "seal.json"]);
    scene.refused(&["verify", "--export", "jsonl"], &["line 1", "not the known one"]);
    scene.done(&["verify", "--export", "jsonl", "--public-key", &known]);
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Everything that stands in the files of a folder, attachments of mails in what they are written in.
fn texts(folder: &Path) -> String {
    files(folder)
        .iter()
        .map(|path| {
            if path.is_dir() {
                texts(path)
            } else {
                String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()
            }
        })
        .collect()
}

async fn what_a_hold_is_about_stays_until_it_is_released(kind: Kind) {
    let scene = Scene::new(kind).await;
    scene.talked("bob", 100, &["one", "two"]).await;
    scene.talked("carol", 90, &["three"]).await;
    let hold = |arguments: &[&str]| -> i64 {
        let told =
            scene.done(&[&["hold", "add", "--format", "json", "--reason", "case 7"], arguments].concat());
        serde_json::from_str::<Value>(&told).unwrap()["id"].as_i64().unwrap()
    };
    let release = |id: i64| scene.done(&["hold", "release", &id.to_string()]);
    let kept = |id: i64, messages: i64| serde_json::json!([{ "hold": id, "messages": messages }]);

    let all = hold(&["--account", "alice@contoso.com"]);
    store_quarantine(&scene).await;
    let dry = scene.retention(&["--dry-run"]);
    assert_eq!(
        (&dry["messages"], &dry["conversations"], &dry["payloads"], &dry["kept"]),
        (&0.into(), &0.into(), &0.into(), &kept(all, 3))
    );
    assert_eq!(scene.retention(&[]), dry);
    release(all);

    // In whatever way the address came into the conversation.
    let carol = hold(&["--with", "Carol@contoso.com"]);
    scene.sql("UPDATE participants SET sip_uri = NULL WHERE sip_uri = 'sip:carol@contoso.com'").await;
    let dry = scene.retention(&["--dry-run"]);
    assert_eq!(
        (&dry["messages"], &dry["conversations"], &dry["kept"]),
        (&2.into(), &1.into(), &kept(carol, 1))
    );
    assert_eq!(scene.retention(&[]), dry);
    assert_eq!(scene.rows("SELECT body FROM messages ORDER BY id").await, ["", "", "three"]);
    scene.done(&["verify"]);

    let listed: Value = serde_json::from_str(&scene.done(&["hold", "list", "--format", "json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(
        (&listed[0]["with_uri"], &listed[0]["reason"]),
        (&"sip:carol@contoso.com".into(), &"case 7".into())
    );
    assert!(!listed[0]["created_by"].as_str().unwrap().is_empty());
    release(carol);
    let listed: Value =
        serde_json::from_str(&scene.done(&["hold", "list", "--all", "--format", "json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert!(listed.as_array().unwrap().iter().all(|hold| hold["released_by"] == hold["created_by"]));
    scene.refused(&["hold", "release", &carol.to_string()], &["was released at"]);
    scene.refused(&["hold", "release", "99"], &["there is no hold 99"]);
    scene.refused(&["hold", "add", "--reason", " "], &["--reason is empty"]);
    scene.refused(
        &["hold", "add", "--reason", "x", "--account", "nobody@contoso.com"],
        &["there is no account"],
    );

    assert_eq!(scene.retention(&[])["messages"], 1);
    // The account's own days win over the default, and 0 is for ever.
    scene.talked("dave", 40, &["four"]).await;
    scene.sql("UPDATE accounts SET retention_days = 50").await;
    assert_eq!(scene.retention(&[])["messages"], 0);
    scene.sql("UPDATE accounts SET retention_days = 0").await;
    fs::remove_file(scene.folder.path().join("ucwa-relay.seal.key")).unwrap();
    assert!(scene.done(&["retention", "run", "--format", "json"]).contains("\"accounts\":[]"));
    scene.sql("UPDATE accounts SET retention_days = 39").await;
    scene.refused(&["retention", "run"], &["ucwa-relay.seal.key is missing"]);
    scene.done(&["seal", "--out", "seal.json"]);
    assert_eq!(scene.retention(&[])["messages"], 1);
}

async fn store_quarantine(scene: &Scene) {
    scene.database.store.quarantine(scene.alice.account, None, "odd", "<x/>").await.unwrap();
    scene.sql(&format!("UPDATE event_quarantine SET received_at = '{:.3}'", days_ago(90))).await;
}

fn batch(scene: &Scene, run: i64, stage: Stage, limit: i64) -> PurgeBatch {
    PurgeBatch {
        run,
        account: scene.alice.account,
        policy: Policy { default_days: 30, now: Timestamp::now() },
        stage,
        limit,
        signer: Arc::new(|_, _| "signed".to_owned()),
    }
}

async fn a_hold_that_is_added_while_messages_are_purged_is_heeded(kind: Kind) {
    let scene = Scene::new(kind).await;
    scene.talked("bob", 100, &["one", "two", "three", "four"]).await;
    let store = &scene.database.store;
    let run = store.begin_run("somebody", NODE, "key", false).await.unwrap();
    let first = store.purge(batch(&scene, run, Stage::Messages(None), 2)).await.unwrap();
    assert_eq!(first.gone.messages, 2);
    let hold = |with: &str| NewHold {
        account: None,
        with_uri: Some(uri(with)),
        reason: "case".to_owned(),
        created_by: "somebody".to_owned(),
    };
    if kind == Kind::Postgres {
        // One that is being written is waited for: whoever writes it was first.
        let mut writing = scene.database.outside().await;
        let insert =
            "INSERT INTO holds (with_uri, reason, created_by) VALUES ('sip:erin@contoso.com', 'x', 'y')";
        writing.run("BEGIN").await.unwrap();
        writing.run(insert).await.unwrap();
        let waits = store.purge(batch(&scene, run, first.next.clone().unwrap(), 2)).await;
        assert!(matches!(waits, Err(StoreError::Unavailable { .. })), "{waits:?}");
        writing.run("ROLLBACK").await.unwrap();
    }
    let id = store.add_hold(&hold("bob")).await.unwrap();
    let second = store.purge(batch(&scene, run, first.next.clone().unwrap(), 2)).await.unwrap();
    assert_eq!(second.gone.messages, 0);
    assert!(store.release_hold(id, "somebody").await.unwrap());
    let again = store.purge(batch(&scene, run, first.next.unwrap(), 2)).await.unwrap();
    assert_eq!(again.gone.messages, 2);
    assert_eq!(scene.rows("SELECT messages FROM retention_runs").await, ["4"]);
}

/// The process is gone after a batch: what it has done stands, nobody waits for it for ever, and it can't come back.
async fn a_run_that_is_interrupted_is_gone_on_with(kind: Kind) {
    let scene = Scene::new(kind).await;
    scene.talked("bob", 100, &["one", "two", "three"]).await;
    let store = &scene.database.store;
    let run = store.begin_run("schedule", NODE, "key", false).await.unwrap();
    store.purge(batch(&scene, run, Stage::Messages(None), 2)).await.unwrap();
    assert_eq!(scene.rows("SELECT body FROM messages ORDER BY id").await, ["", "", "three"]);
    scene.done(&["seal", "--out", "seal.json"]);
    scene.refused(&["retention", "run"], &["being purged already, by schedule on node-1"]);

    // The server that was begun anew knows that its own run is over.
    let anew = store.begin_run("schedule", NODE, "key", true).await.unwrap();
    let lost = store.purge(batch(&scene, run, Stage::Messages(None), 2)).await;
    assert!(matches!(lost, Err(StoreError::AlreadyExists(_))), "{lost:?}");
    assert_eq!(scene.rows("SELECT body FROM messages ORDER BY id").await, ["", "", "three"]);
    // Anybody else does after a while.
    scene.refused(&["retention", "run"], &["being purged already"]);
    let silent = Timestamp::now() - 3.minutes();
    scene.sql(&format!("UPDATE retention_runs SET heartbeat_at = '{silent:.3}' WHERE id = {anew}")).await;
    assert_eq!(scene.retention(&[])["messages"], 1);
    assert_eq!(
        scene.rows("SELECT outcome, messages FROM retention_runs ORDER BY id").await,
        ["interrupted|2", "interrupted|0", "done|1"]
    );
}

/// Events that come twice, names that come late, a log that is read again.
async fn what_was_purged_does_not_come_back(kind: Kind) {
    let scene = Scene::new(kind).await;
    let at = days_ago(100);
    let texts = [SECRET, "and Zwetschgendatschi once more"];
    let commit = talk(&scene.alice, "bob", at, &texts);
    let store = &scene.database.store;
    store.commit(commit.clone()).await.unwrap();
    assert_eq!(scene.retention(&[])["messages"], 2);
    let before = scene.rows("SELECT id, tombstone, chain_hash FROM messages ORDER BY id").await;

    store.commit(commit).await.unwrap();
    // The same events under another cursor, as after a resync.
    let again = talk(&scene.alice, "bob", at, &texts);
    store.commit(ArchiveCommit { cursor: Some("/events?again".to_owned()), ..again }).await.unwrap();
    let with = Person { href: None, ..person("bob") };
    let logged = |minute: i64, text: &str| LoggedMessage {
        sent_at: at + minute.minutes() + 1.second(),
        direction: Direction::Incoming,
        sender: Some(with.clone()),
        content: Content { plain: Some(text.to_owned()), html: None },
    };
    for _ in 0..2 {
        let log = LoggedConversation {
            href: "/logs/1".to_owned(),
            thread_id: Some("thread-bob".to_owned()),
            subject: Some("Subject of bob".to_owned()),
            direction: Some(Direction::Incoming),
            people: vec![with.clone()],
            messages: vec![logged(0, texts[0]), logged(1, texts[1])],
            ..LoggedConversation::default()
        };
        scene.alice.answer(Fact::Logged(log)).await;
    }
    assert_eq!(scene.rows("SELECT id, tombstone, chain_hash FROM messages ORDER BY id").await, before);
    for gone in [SECRET, "bob Muster", "Subject of bob"] {
        assert_eq!(scene.tables_with(gone).await, [""; 0], "{gone}");
    }
    assert_eq!(scene.search(SECRET), 0);
    scene.done(&["verify"]);

    // What was missed an hour later is no message that was purged.
    let log = LoggedConversation {
        href: "/logs/1".to_owned(),
        thread_id: Some("thread-bob".to_owned()),
        people: vec![with.clone()],
        messages: vec![logged(0, texts[0]), logged(1, texts[1]), logged(60, "missed")],
        ..LoggedConversation::default()
    };
    scene.alice.answer(Fact::Logged(log)).await;
    assert_eq!(scene.rows("SELECT body FROM messages ORDER BY id").await, ["", "", "missed"]);
    scene.done(&["verify"]);
    assert_eq!(scene.retention(&[])["messages"], 1);
    assert_eq!(scene.tables_with("bob Muster").await, [""; 0]);
}

/// It listens for signals from then on.
async fn answers(relay: &mut Relay) {
    eventually("it answers", async || {
        relay.server().stderr().contains("the admin listener answers").then_some(())
    })
    .await;
}

async fn a_running_server_purges_by_itself(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "[retention]\ndefault_days = 30\n").await;
    relay.tool_ok(&["migrate"]);
    let store = connect(&settings(relay.url()), Role::Server).await.unwrap();
    let account = store.add_account(&support::archive::new_account("alice")).await.unwrap();
    support::take_leases(&store).await;
    let session = store.begin_session(account, "/applications/1", "/events?ack=1", "").await.unwrap();
    let alice = Online { store: store.clone(), account, session };
    store.commit(talk(&alice, "bob", days_ago(100), &["one", "two"])).await.unwrap();
    store.commit(talk(&alice, "carol", days_ago(1), &["three"])).await.unwrap();
    drop(alice);
    store.close().await;

    relay.start();
    let mut sql = relay.connect().await;
    eventually("the run is over", async || {
        let done = sql.rows("SELECT messages FROM retention_runs WHERE outcome = 'done'").await;
        (done == ["2"]).then_some(())
    })
    .await;
    assert_eq!(sql.rows("SELECT body FROM messages ORDER BY id").await, ["", "", "three"]);
    assert_eq!(sql.rows("SELECT started_by FROM retention_runs").await, ["schedule"]);
    relay.tool_ok(&["verify"]);
    answers(&mut relay).await;
    eventually("the log tells of it", async || {
        let told = relay.server().stderr();
        (told.contains("messages were purged by their age") && told.contains("retention was looked after"))
            .then_some(())
    })
    .await;
    assert!(relay.server().terminate(), "{}", relay.server().stderr());

    // It is a day before the next one is due, whoever did this one.
    sql.run("UPDATE accounts SET retention_days = 1").await.unwrap();
    relay.start();
    // It looks first of all, and ends in order only after that.
    answers(&mut relay).await;
    assert!(relay.server().terminate(), "{}", relay.server().stderr());
    assert_eq!(sql.rows("SELECT count(*) FROM retention_runs").await, ["1"]);
    sql.close().await;
}

on_both_databases!(
    "multi_thread":
    a_purge_leaves_nothing_but_signed_tombstones,
    what_a_hold_is_about_stays_until_it_is_released,
    a_hold_that_is_added_while_messages_are_purged_is_heeded,
    a_run_that_is_interrupted_is_gone_on_with,
    what_was_purged_does_not_come_back,
    a_running_server_purges_by_itself,
);
