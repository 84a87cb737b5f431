//! What an auditor does with the built program: search, hand over, prove. The archive is written by SQL with digests
//! that are computed here from the documented form, so that the program is not its own witness.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use sha2::{Digest, Sha256};
use support::sql::{Kind, Place};
use ucwa_relay::{
    config::Config,
    store::{self, Role},
};

const PATIENCE: Duration = Duration::from_secs(60);
const ALICE: &str = "sip:alice@contoso.com";
const CAROL: &str = "sip:carol@contoso.com";

struct Archive {
    folder: tempfile::TempDir,
    place: Place,
    runtime: tokio::runtime::Runtime,
}

#[derive(Debug)]
struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Outcome {
    #[track_caller]
    fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    #[track_caller]
    fn failed(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        for part in words {
            assert!(self.stderr.contains(part) || self.stdout.contains(part), "without {part:?}: {self:?}");
        }
        self
    }

    #[track_caller]
    fn lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[track_caller]
    fn bodies(self) -> Vec<String> {
        let lines = self.succeeded().lines();
        lines.iter().map(|line| line["body"].as_str().unwrap().to_owned()).collect()
    }
}

fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A message to be written.
#[derive(Clone)]
struct Said {
    account: i64,
    conversation: i64,
    sender: &'static str,
    name: Option<&'static str>,
    body: String,
    html: Option<String>,
    sent_at: String,
    status: &'static str,
}

fn said(account: i64, body: &str) -> Said {
    let sender = if account == 1 { "sip:bob@contoso.com" } else { "sip:dave@contoso.com" };
    Said {
        account,
        conversation: account,
        sender,
        name: (account == 1).then_some("Bob Müller"),
        body: body.to_owned(),
        html: None,
        sent_at: "2026-03-01T12:00:05.000Z".to_owned(),
        status: "delivered",
    }
}

impl Archive {
    /// Two accounts: alice talks with bob in conversation 1 and with several in 3, carol with dave in 2.
    fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let place = runtime.block_on(Place::new(kind));
        let archive = Self { folder, place, runtime };
        archive.run(&["init"]).succeeded();
        archive.serve(true);
        archive.sql(
            "INSERT INTO accounts (id, sip_uri, username) VALUES (1, 'sip:alice@contoso.com', 'a'),
                    (2, 'sip:carol@contoso.com', 'c');
             INSERT INTO conversations (id, account_id, thread_id, subject, importance, multiparty, started_at, ended_at)
             VALUES (1, 1, 'thread-1', 'Lunch – größe', 'Urgent', FALSE, '2026-03-01T12:00:00.000Z', NULL),
                    (2, 2, NULL, NULL, NULL, FALSE, '2026-03-01T12:00:00.000Z', NULL),
                    (3, 1, 'thread-1', NULL, 'Normal', TRUE, '2026-03-01T12:00:00.000Z', '2026-03-01T13:00:00.000Z');
             INSERT INTO participants (account_id, conversation_id, sip_uri, display_name, is_local, joined_at, left_at)
             VALUES (1, 1, 'sip:bob@contoso.com', 'Bob Müller', FALSE, '2026-03-01T12:00:01.000Z', '2026-03-01T12:30:00.000Z'),
                    (1, 1, 'sip:alice@contoso.com', 'Alice', TRUE, '2026-03-01T12:00:00.000Z', NULL),
                    (2, 2, 'sip:dave@contoso.com', 'Dave', FALSE, '2026-03-01T12:00:00.000Z', NULL),
                    (1, 3, 'sip:erin@contoso.com', 'Erin <x>', FALSE, '2026-03-01T12:00:00.000Z', NULL),
                    (1, 3, 'sip:alice@contoso.com', 'Alice', TRUE, '2026-03-01T12:00:00.000Z', NULL);
             INSERT INTO sessions (account_id, application_href, endpoint_id, started_at, last_ack_at, ended_at, end_reason)
             VALUES (1, '/a', 'e', '2026-03-01T10:00:00.000Z', '2026-03-01T14:00:00.000Z', '2026-03-01T14:00:00.000Z', 'over');
             INSERT INTO gaps (account_id, from_at, to_at, reason, recorded_at)
             VALUES (1, '2026-03-01T11:00:00.000Z', '2026-03-01T11:00:30.000Z', 'resume', '2026-03-01T11:00:31.000Z');",
        );
        archive
    }

    /// A server comes and goes; it arranges the full-text index.
    fn serve(&self, full_text: bool) {
        self.runtime.block_on(async {
            let config = Config::load(Some(&self.path("ucwa-relay.toml"))).unwrap();
            let mut settings = config.store_settings();
            settings.url = self.place.url();
            settings.full_text = full_text;
            store::connect(&settings, Role::Server).await.unwrap().close().await;
        });
    }

    /// With some messages of both accounts.
    fn with_messages(kind: Kind) -> Self {
        let archive = Self::new(kind);
        let texts = ["one", "two", "three", "four", "five", "six"];
        let messages: Vec<Said> =
            texts.iter().flat_map(|text| [said(1, text), said(2, &format!("carol {text}"))]).collect();
        archive.write(&messages);
        archive
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Statements that another program makes, divided by semicolons.
    fn sql(&self, statements: &str) {
        self.runtime.block_on(async { self.place.connect().await.run_all(statements).await.unwrap() });
    }

    /// Rows as `a|b|c`, NULL as nothing.
    fn rows(&self, query: &str) -> Vec<String> {
        self.runtime.block_on(async { self.place.connect().await.rows(query).await })
    }

    /// Chains messages as the documentation says.
    fn write(&self, messages: &[Said]) {
        let mut heads: BTreeMap<i64, (i64, String)> = self
            .rows("SELECT account_id, seq, hash FROM chain_heads")
            .iter()
            .map(|row| {
                let [account, seq, hash] = row.split('|').collect::<Vec<_>>().try_into().unwrap();
                (account.parse().unwrap(), (seq.parse().unwrap(), hash.to_owned()))
            })
            .collect();
        let mut sql = "BEGIN;\n".to_owned();
        for message in messages {
            let account = if message.account == 1 { ALICE } else { CAROL };
            let direction = if message.sender == account { "outgoing" } else { "incoming" };
            let field =
                |text: Option<&str>| text.map_or("-;".to_owned(), |text| format!("{}:{text};", text.len()));
            let canonical: String = [
                Some("ucwa-relay/1"),
                Some(account),
                Some(&message.conversation.to_string()),
                Some(direction),
                Some(message.sender),
                message.name,
                Some("text/plain"),
                Some(&message.body),
                message.html.as_deref(),
                Some(&message.sent_at),
                None,
                None,
                None,
            ]
            .map(field)
            .concat();
            let (seq, head) = heads.entry(message.account).or_insert_with(|| (0, "0".repeat(64)));
            *seq += 1;
            let content = digest(&canonical);
            *head = digest(&format!("{head}\n{seq}\n{content}"));
            let optional = |text: Option<&str>| text.map_or("NULL".to_owned(), quoted);
            writeln!(
                sql,
                "INSERT INTO messages (account_id, conversation_id, direction, sender_uri, sender_name, body, body_html,
                        sent_at, archived_at, status, source, chain_seq, content_hash, chain_hash)
                 VALUES ({}, {}, '{direction}', {}, {}, {}, {}, '{}', '2026-03-01T12:00:06.000Z', '{}', 'event', {seq},
                         '{content}', '{head}');",
                message.account,
                message.conversation,
                quoted(message.sender),
                optional(message.name),
                quoted(&message.body),
                optional(message.html.as_deref()),
                message.sent_at,
                message.status,
            )
            .unwrap();
        }
        for (account, (seq, head)) in heads {
            writeln!(
                sql,
                "INSERT INTO chain_heads (account_id, seq, hash) VALUES ({account}, {seq}, '{head}')
                 ON CONFLICT (account_id) DO UPDATE SET seq = excluded.seq, hash = excluded.hash;"
            )
            .unwrap();
        }
        self.sql(&(sql + "COMMIT;"));
        // SQLite's index knows the words of what a server wrote; of others' rows when it is made anew.
        if matches!(self.place, Place::Sqlite(_)) {
            self.serve(false);
            self.serve(true);
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ucwa-relay"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("UCWA_RELAY") {
                command.env_remove(name);
            }
        }
        command.env("UCWA_RELAY__DATABASE__URL", self.place.url());
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        outcome(&mut self.command(arguments))
    }

    fn search(&self, arguments: &[&str]) -> Vec<String> {
        self.run(&[&["search", "--format", "jsonl"], arguments].concat()).bodies()
    }

    fn export(&self, format: &str, folder: &str, more: &[&str]) -> Outcome {
        self.run(&[&["export", "--format", format, "--out", folder], more].concat())
    }

    fn manifest(&self, folder: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path(folder).join("manifest.json")).unwrap()).unwrap()
    }
}

fn outcome(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Every file of a folder with its content's digest.
fn files(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                found.insert(name, hex::encode(Sha256::digest(fs::read(path).unwrap())));
            }
        }
    }
    found
}

/// Whether a file name has this extension.
fn is(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|found| found == extension)
}

// ------------------------------------------------------------------------------------------------ search

fn search_finds_what_was_meant(kind: Kind) {
    let archive = Archive::new(kind);
    let html = Said { html: Some("<b>Budget</b> report".into()), ..said(1, "Budget report") };
    let old = Said { sent_at: "2025-01-01T00:00:00.000Z".into(), ..said(1, "old budget") };
    let meeting = Said {
        conversation: 3,
        sender: "sip:erin@contoso.com",
        name: Some("Erin <x>"),
        ..said(1, "draft budget")
    };
    let mine = Said { sender: ALICE, name: None, ..said(1, "my budget") };
    archive.write(&[
        said(1, "Treffen im CAFE\u{301} um zehn"),
        said(1, "明日の会議は10時です"),
        said(1, "ok, né?"),
        html,
        old,
        meeting,
        mine,
        said(2, "carol's budget 100% \"quoted\" [x]"),
    ]);
    let cases: [(&[&str], &[&str]); 25] = [
        (&["cafe"], &["Treffen im CAFE\u{301} um zehn"]),
        (&["CAFÉ", "treffen"], &["Treffen im CAFE\u{301} um zehn"]),
        (&["会議"], &["明日の会議は10時です"]),
        (&["会議は10"], &["明日の会議は10時です"]),
        (&["NE"], &["ok, né?"]),
        (&["\"im café\""], &["Treffen im CAFE\u{301} um zehn"]),
        (&["\"café im\""], &[]),
        (&["budget", "-draft", "-my", "account:alice"], &["old budget", "Budget report"]),
        (&["budget", "from:erin"], &["draft budget"]),
        (&["from:\"Erin <x>\""], &["draft budget"]),
        (&["from:erin,alice@contoso.com"], &["draft budget", "my budget"]),
        (&["budget", "with:erin@contoso.com"], &["draft budget"]),
        (&["budget", "with:\"Erin <x>\""], &["draft budget"]),
        (&["budget", "with:erin,dave@contoso.com"], &["draft budget", "carol's budget 100% \"quoted\" [x]"]),
        (&["budget", "-with:bob", "-account:carol"], &["draft budget"]),
        (&["has:html"], &["Budget report"]),
        (&["budget", "before:2026-01-01"], &["old budget"]),
        (
            &["budget", "after:2026-01-01", "account:carol@contoso.com"],
            &["carol's budget 100% \"quoted\" [x]"],
        ),
        (&["budget", "--account", "carol@contoso.com"], &["carol's budget 100% \"quoted\" [x]"]),
        (&["100%"], &["carol's budget 100% \"quoted\" [x]"]),
        (&["[x]"], &["carol's budget 100% \"quoted\" [x]"]),
        (&["CAROL'S"], &["carol's budget 100% \"quoted\" [x]"]),
        (&["arol"], &[]),
        (&["%"], &["carol's budget 100% \"quoted\" [x]"]),
        (&["budg_t"], &[]),
    ];
    for indexed in [true, false] {
        archive.serve(indexed);
        for (query, expected) in cases {
            assert_eq!(archive.search(query), expected, "{query:?}, indexed: {indexed}");
        }
    }
    let everything = archive.run(&["history", "-budget", "--format", "jsonl"]).bodies();
    assert_eq!(everything.len(), 3, "{everything:?}");
}

fn a_query_that_makes_no_sense_is_answered_with_its_place(kind: Kind) {
    let archive = Archive::with_messages(kind);
    archive
        .run(&["search", "one \"two"])
        .failed(2, &["at character 5", "never closed", "  one \"two\n      ^"]);
    archive.run(&["search", "form:bob"]).failed(2, &["at character 1", "there is no field form:", "from:"]);
    archive.run(&["search"]).failed(2, &["<QUERY>"]);
    archive.run(&["search", " "]).failed(2, &["nothing to look for"]);
    archive
        .run(&["history", "--account", "nobody@contoso.com"])
        .failed(1, &["no account sip:nobody@contoso.com"]);
    archive.run(&["history", "--after", "4711"]).failed(1, &["no message 4711", "page before"]);
    archive.run(&["search", "one", "account:nobody"]).failed(1, &["no account nobody", "account list"]);
    let read = archive.rows("SELECT action FROM access_log WHERE query NOT LIKE '%--after%'");
    assert!(read.is_empty(), "{read:?}");
}

fn pages_do_not_shift_and_every_read_is_noted(kind: Kind) {
    let archive = Archive::with_messages(kind);
    archive.write(&[said(1, "ten")]);
    let page = |after: Option<&str>| {
        let mut arguments = vec!["--limit", "2", "account:alice", "t"];
        arguments.extend(after.into_iter().flat_map(|after| ["--after", after]));
        archive.run(&[&["search", "--format", "jsonl"], &arguments[..]].concat()).succeeded().lines()
    };
    let newest = page(None);
    assert_eq!(newest.iter().map(|row| &row["body"]).collect::<Vec<_>>(), ["three", "ten"]);
    // What is said later does not shift the pages, and what is archived late stands where it was said.
    let long_ago = Said { sent_at: "2025-01-01T00:00:00.000Z".into(), ..said(1, "told late") };
    archive.write(&[said(1, "more"), long_ago]);
    let older = page(Some(&newest[0]["message_id"].to_string()));
    assert_eq!(older.iter().map(|row| &row["body"]).collect::<Vec<_>>(), ["told late", "two"]);
    assert!(page(Some(&older[0]["message_id"].to_string())).is_empty());

    let csv =
        archive.run(&["history", "--account", ALICE, "--limit", "1", "--format", "csv"]).succeeded().stdout;
    let lines: Vec<&str> = csv.split("\r\n").collect();
    assert!(lines[0].starts_with("message_id,account,sent_at,") && lines[1].contains(",more,"), "{csv}");
    let json = archive.run(&["history", "--limit", "1", "--format", "json"]).succeeded();
    assert_eq!(serde_json::from_str::<Value>(&json.stdout).unwrap()[0]["body"], "more");

    assert_eq!(
        archive.rows("SELECT action, account, query FROM access_log ORDER BY id"),
        [
            "search||account:alice t --limit=2",
            "search||account:alice t --after=5 --limit=2",
            "search||account:alice t --after=15 --limit=2",
            "history|sip:alice@contoso.com|account:sip:alice@contoso.com --limit=1",
            "history||--limit=1",
        ]
    );
}

fn following_shows_what_fits_as_it_comes(kind: Kind) {
    let archive = Archive::with_messages(kind);
    let mut command = archive.command(&[
        "history",
        "tea",
        "--follow",
        "--format",
        "jsonl",
        "--account",
        "alice@contoso.com",
    ]);
    let mut follower = command.stdout(Stdio::piped()).spawn().map(Running).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let stdout = follower.0.stdout.take().unwrap();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            let _ = sender.send(line.unwrap());
        }
    });
    // What it reads is noted before the first look, so what is written afterwards is new to it.
    archive.wait_for("the follower to look", || !archive.rows("SELECT actor FROM access_log").is_empty());
    archive.write(&[said(1, "coffee"), said(2, "tea with carol"), said(1, "TEA?")]);
    let line: Value = serde_json::from_str(&receiver.recv_timeout(PATIENCE).unwrap()).unwrap();
    assert_eq!(line["body"], "TEA?");
    // Also what was said long ago and is archived only now.
    let long_ago = Said { sent_at: "2025-01-01T00:00:00.000Z".into(), ..said(1, "old tea") };
    archive.write(&[said(1, "more coffee"), long_ago]);
    let line: Value = serde_json::from_str(&receiver.recv_timeout(PATIENCE).unwrap()).unwrap();
    assert_eq!(line["body"], "old tea");
}

/// A process that ends with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Archive {
    fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            self.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(5)).await });
        }
    }
}

// ------------------------------------------------------------------------------------------------ verify, seal

/// What `verify` says of each difference: place in the chain, message, words.
fn differences(outcome: &Outcome) -> Vec<(Value, Value, String)> {
    let report: Value = serde_json::from_str(outcome.stdout.lines().next().unwrap()).unwrap();
    assert_eq!(report["intact"], report["differences"].as_array().unwrap().is_empty());
    report["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            assert!(one["account"] == ALICE, "{one}");
            (one["chain_seq"].clone(), one["message_id"].clone(), one["what"].as_str().unwrap().to_owned())
        })
        .collect()
}

/// Place in the chain, message, words.
type Told = (Value, Value, &'static str);

fn every_tampering_is_found_and_named(kind: Kind) {
    // Alice's messages have the ids 1, 3, 5, 7, 9, 11.
    let cases: [(&str, &[Told]); 14] = [
        ("UPDATE messages SET body = 'never' WHERE id = 5", &[(3.into(), 5.into(), "no longer fits content_hash")]),
        ("UPDATE messages SET body_html = '<p>' WHERE id = 5", &[(3.into(), 5.into(), "no longer fits")]),
        ("UPDATE messages SET sender_uri = 'sip:eve@contoso.com' WHERE id = 5", &[(3.into(), 5.into(), "sender_uri")]),
        // As little as each database can tell.
        (
            if kind == Kind::Sqlite {
                "UPDATE messages SET sent_at = '2026-03-01T12:00:05Z' WHERE id = 5"
            } else {
                "UPDATE messages SET sent_at = '2026-03-01T12:00:05.000001Z' WHERE id = 5"
            },
            &[(3.into(), 5.into(), "sent_at")],
        ),
        ("DELETE FROM messages WHERE id = 5", &[(3.into(), Value::Null, "is missing")]),
        ("DELETE FROM messages WHERE id IN (9, 11)", &[(5.into(), Value::Null, "5 to 6 are missing")]),
        (
            "INSERT INTO messages (account_id, conversation_id, direction, body, sent_at, archived_at, status, source)
             VALUES (1, 1, 'incoming', 'forged', '2026-03-01T12:00:05.000Z', '2026-03-01T12:00:06.000Z', 'delivered', 'event')",
            &[(Value::Null, 13.into(), "not in the chain")],
        ),
        (
            "INSERT INTO messages (account_id, conversation_id, direction, body, sent_at, archived_at, status, source,
                                   chain_seq, content_hash, chain_hash)
             VALUES (1, 1, 'incoming', 'forged', '2026-03-01T12:00:05.000Z', '2026-03-01T12:00:06.000Z', 'delivered', 'event', 7, 'x',
                     'y')",
            &[
                (7.into(), 13.into(), "no longer fits"),
                (7.into(), 13.into(), "chain_heads ends at number 6"),
                (7.into(), 13.into(), "does not follow from message 11"),
            ],
        ),
        (
            "UPDATE messages SET chain_seq = 99 WHERE id = 3; UPDATE messages SET chain_seq = 2 WHERE id = 9;
             UPDATE messages SET chain_seq = 5 WHERE id = 3",
            &[(2.into(), 9.into(), "chained as number 5"), (5.into(), 3.into(), "chained as number 2")],
        ),
        (
            "UPDATE messages SET body = (SELECT body FROM messages WHERE id = 3) WHERE id = 5",
            &[(3.into(), 5.into(), "no longer fits")],
        ),
        ("UPDATE chain_heads SET hash = 'x' WHERE account_id = 1", &[(6.into(), 11.into(), "chain_heads has another hash")]),
        ("DELETE FROM chain_heads WHERE account_id = 1", &[(6.into(), 11.into(), "missing in chain_heads")]),
        ("UPDATE messages SET content_hash = 'x' WHERE id = 5", &[(3.into(), 5.into(), "content_hash was changed")]),
        (
            "UPDATE messages SET body = 'never', content_hash = '@' WHERE id = 5",
            &[(3.into(), 5.into(), "does not follow from message 3")],
        ),
    ];
    let archive = Archive::with_messages(kind);
    archive.run(&["verify"]).succeeded();
    assert_eq!(archive.rows("SELECT action, account, query FROM access_log"), ["verify||"]);
    for (tampering, expected) in cases {
        let archive = Archive::with_messages(kind);
        // A content_hash computed anew, without the chain.
        let anew = digest(
            "12:ucwa-relay/1;21:sip:alice@contoso.com;1:1;8:incoming;19:sip:bob@contoso.com;11:Bob Müller;\
             10:text/plain;5:never;-;24:2026-03-01T12:00:05.000Z;-;-;-;",
        );
        archive.sql(&tampering.replace('@', if tampering.contains("'@'") { &anew } else { "@" }));
        let found =
            archive.run(&["verify", "--format", "json"]).failed(1, &["this is not what was archived"]);
        let found = differences(&found);
        assert_eq!(found.len(), expected.len(), "{tampering}: {found:#?}");
        for ((seq, id, what), (expected_seq, expected_id, words)) in found.iter().zip(expected) {
            assert_eq!((seq, id), (expected_seq, expected_id), "{tampering}: {found:#?}");
            assert!(what.contains(words), "{tampering}: {found:#?}");
        }
        archive.run(&["verify"]).failed(1, &[ALICE]);
        archive.run(&["verify", "--account", CAROL]).succeeded();
    }
    Archive::new(kind).run(&["verify", "--account", "nobody@contoso.com"]).failed(1, &["no account"]);
}

fn a_seal_proves_what_was_before_it(kind: Kind) {
    let archive = Archive::with_messages(kind);
    let sealed = archive.run(&["seal", "--out", "seal.json"]).succeeded();
    let public = sealed.stdout.lines().last().unwrap().strip_prefix("public key: ").unwrap().to_owned();
    archive.run(&["seal", "--out", "seal.json"]).failed(1, &["never overwritten"]);
    archive.write(&[said(1, "later")]);
    let verify = ["verify", "--seal", "seal.json", "--public-key", &public];
    archive.run(&verify).succeeded();
    let noted = archive.rows("SELECT action, query FROM access_log ORDER BY id");
    assert_eq!(noted.last().map(String::as_str), Some("verify|--seal=seal.json"));
    archive.run(&["verify", "--seal", "seal.json"]).succeeded().failed(0, &[&public, "--public-key"]);
    archive
        .run(&["verify", "--seal", "seal.json", "--public-key", &"0".repeat(64)])
        .failed(1, &["signed with the key"]);

    archive.export("jsonl", "out", &[]).succeeded();
    archive.run(&["verify", "--export", "out", "--seal", "seal.json"]).succeeded();

    // The whole chain written anew, without what nobody shall know: only the seal knows.
    archive.sql("DELETE FROM messages WHERE account_id = 1; DELETE FROM chain_heads WHERE account_id = 1;");
    archive.write(&["one", "two", "nothing", "four", "five", "six", "later"].map(|text| said(1, text)));
    archive.run(&["verify"]).succeeded();
    archive.run(&verify).failed(1, &["chain_seq 6", "the seal has another chain_hash"]);
    archive.export("jsonl", "out2", &[]).succeeded();
    archive.run(&["verify", "--export", "out2", "--seal", "seal.json"]).failed(1, &["the seal has another"]);

    let text = fs::read_to_string(archive.path("seal.json")).unwrap();
    fs::write(archive.path("seal.json"), text.replace("\"seq\": 6", "\"seq\": 5")).unwrap();
    archive.run(&verify).failed(1, &["changed after it was made"]);
}

// ------------------------------------------------------------------------------------------------ export

fn an_outsider_checks_an_export_with_the_documented_lines(kind: Kind) {
    let archive = Archive::new(kind);
    let odd =
        Said { html: Some("<p>\u{2028}</p>".into()), ..said(1, "line\u{2028}two\r\nthree \u{1f600} \"x\"") };
    archive.write(&[said(1, "one"), odd, said(2, "other"), said(1, "three")]);
    archive.export("jsonl", "out", &[]).succeeded();
    archive.run(&["verify", "--export", "out"]).succeeded();

    let document = include_str!("../docs/evidence.md");
    let program = document.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    fs::write(archive.path("check.py"), program).unwrap();
    let check = || {
        let mut arguments = vec![archive.path("check.py").display().to_string()];
        let lines = files(&archive.path("out")).into_keys().filter(|name| is(name, "jsonl"));
        arguments.extend(lines.map(|name| archive.path("out").join(name).display().to_string()));
        outcome(Command::new("python3").args(arguments))
    };
    let told = check().succeeded().stdout;
    let manifest = archive.manifest("out");
    for (number, count) in [(0, 3), (1, 1)] {
        let entry = &manifest["accounts"][number];
        assert_eq!((&entry["messages"], &entry["first"]["chain_seq"]), (&count.into(), &1.into()));
        let head = entry["last"]["chain_hash"].as_str().unwrap();
        assert!(
            told.contains(&format!("{}: {count} messages, head {head}", entry["account"].as_str().unwrap())),
            "{told}"
        );
    }
    assert_eq!(manifest["accounts"][0]["coverage"][1]["reason"], "resume");

    let path = archive.path("out/alice@contoso.com/alice@contoso.com_0000000001-0000000003.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"three\"", "\"four\"")).unwrap();
    check().failed(1, &["sip:alice@contoso.com differs at 3"]);
    archive
        .run(&["verify", "--export", "out"])
        .failed(1, &["line 3", "chain_seq 3, message 4", "the file was changed"]);
    let swapped: Vec<&str> = text.lines().collect();
    fs::write(&path, [swapped[0], swapped[2], swapped[1], ""].join("\n")).unwrap();
    archive.run(&["verify", "--export", "out"]).failed(1, &["line 3", "repeated or moved"]);
}

fn a_damaged_missing_or_strange_file_is_found_in_every_format(kind: Kind) {
    let archive = Archive::with_messages(kind);
    for format in ["eml", "jsonl", "csv", "html"] {
        archive.export(format, format, &["--report", "json"]).succeeded();
        archive.run(&["verify", "--export", format]).succeeded();
        let folder = archive.path(format);
        let name = files(&folder).into_keys().find(|name| name.contains("alice")).unwrap();
        let content = fs::read(folder.join(&name)).unwrap();
        let mut damaged = content.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        fs::write(folder.join(&name), damaged).unwrap();
        archive.run(&["verify", "--export", format]).failed(1, &[&name, "the file was changed"]);
        fs::remove_file(folder.join(&name)).unwrap();
        archive.run(&["verify", "--export", format]).failed(1, &[&name, "the file is missing"]);
        fs::write(folder.join(&name), content).unwrap();
        fs::write(folder.join("more"), "").unwrap();
        archive.run(&["verify", "--export", format]).failed(1, &["more", "does not know this file"]);
        fs::remove_file(folder.join("more")).unwrap();
        archive.run(&["verify", "--export", format]).succeeded();
        archive.export(format, format, &["from:bob"]).failed(1, &["an export of something else"]);
    }
    archive.export("csv", ".", &[]).failed(1, &["is not empty"]);
    archive.run(&["verify", "--export", "."]).failed(1, &["holds no manifest.json"]);
    let noted = archive.rows("SELECT action, account, query FROM access_log ORDER BY id");
    assert!(noted[0].starts_with("export||") && noted[0].contains("--out="), "{noted:?}");
}

fn later_runs_bring_what_is_new_in_files_of_their_own(kind: Kind) {
    let archive = Archive::with_messages(kind);
    for format in ["eml", "jsonl", "csv", "html"] {
        let count = archive.manifest_count(format);
        archive.export(format, format, &[]).succeeded();
        let before = files(&archive.path(format));
        archive.export(format, format, &[]).succeeded().failed(0, &["0 messages in 0 new files"]);
        archive.write(&[said(1, "new"), said(1, "newer")]);
        archive.export(format, format, &[]).succeeded().failed(0, &["2 messages in 1 new files"]);
        let after = files(&archive.path(format));
        for (name, digest) in
            before.iter().filter(|(name, _)| !["manifest.json", "daily-summary.csv"].contains(&&***name))
        {
            assert_eq!(after.get(name), Some(digest), "{name}");
        }
        assert_eq!(after.len(), before.len() + 1);
        archive.run(&["verify", "--export", format]).succeeded();
        let manifest = archive.manifest(format);
        assert_eq!(manifest["runs"], 3);
        assert!(manifest["messages"].as_u64().unwrap() > count);
    }
}

impl Archive {
    /// Messages that an export into a folder already has.
    fn manifest_count(&self, folder: &str) -> u64 {
        if self.path(folder).exists() { self.manifest(folder)["messages"].as_u64().unwrap() } else { 0 }
    }
}

fn a_part_of_the_archive_is_exported_and_checked(kind: Kind) {
    let archive = Archive::with_messages(kind);
    archive.export("jsonl", "out", &["-three", "account:alice"]).succeeded();
    archive.run(&["verify", "--export", "out"]).succeeded();
    let manifest = archive.manifest("out");
    assert_eq!((&manifest["messages"], &manifest["whole_chains"]), (&5.into(), &false.into()));
    assert_eq!(manifest["query"], "-three account:alice");
    let summary = fs::read_to_string(archive.path("out/daily-summary.csv")).unwrap();
    assert!(summary.contains("sip:alice@contoso.com,2026-03-01,5,0,0,2,"), "{summary}");
    assert!(!summary.contains("carol"), "{summary}");
}

const READ_MAIL: &str = r#"
import email, email.policy, json, sys
def read(path):
    mail = email.message_from_binary_file(open(path, "rb"), policy=email.policy.default)
    assert not mail.defects, mail.defects
    plain, html = (mail.get_body((kind,)).get_content() for kind in ("plain", "html"))
    return {"path": path, "plain": plain, "html": html, "importance": mail["Importance"], "subject": mail["Subject"],
            "from": [str(a) for a in mail["From"].addresses], "to": sorted(a.addr_spec for a in mail["To"].addresses),
            "date": mail["Date"].datetime.isoformat(), "id": mail["Message-ID"], "references": mail["References"],
            "parts": [part.get_content_type() for part in mail.walk()], "chain": mail["X-Ucwa-Relay-Chain"]}
for path in sys.argv[1:]:
    print(json.dumps(read(path)))
"#;

fn mails_are_read_back_by_another_program(kind: Kind) {
    let archive = Archive::new(kind);
    let long = "ein sehr langer Satz mit Umlauten äöü ".repeat(60);
    let html = "<p onclick=\"x()\">hi <b>there</b><img src=\"https://spy/x.gif\"><script>boom()</script></p>";
    archive.write(&[
        said(1, "Grüße\nFrom a line that begins so\n.dot"),
        Said { html: Some(html.into()), ..said(1, "hi there") },
        Said { sender: ALICE, name: None, status: "failed", ..said(1, &long) },
        Said { sent_at: "2026-03-02T00:00:00.000Z".into(), ..said(1, "next day <script>") },
        Said { conversation: 3, sender: "sip:erin@contoso.com", name: Some("Erin <x>"), ..said(1, "to all") },
    ]);
    archive.export("eml", "out", &[]).succeeded();
    let folder = archive.path("out");
    let names: Vec<String> = files(&folder).into_keys().filter(|name| is(name, "eml")).collect();
    assert_eq!(
        names,
        [
            "alice@contoso.com/2026-03/2026-03-01_c1_m1_p2p.eml",
            "alice@contoso.com/2026-03/2026-03-01_c3_m5_conf.eml",
            "alice@contoso.com/2026-03/2026-03-02_c1_m4_p2p.eml",
        ]
    );
    fs::write(archive.path("read.py"), READ_MAIL).unwrap();
    let mut command = Command::new("python3");
    command.arg(archive.path("read.py")).args(names.iter().map(|name| folder.join(name)));
    let mails = outcome(&mut command).succeeded().lines();
    let [first, meeting, next] = mails.as_slice() else { panic!("{mails:?}") };

    assert_eq!(first["subject"], "Lunch – größe (2026-03-01)");
    assert_eq!(
        (&first["from"][0], &first["to"][0]),
        (&"Bob Müller <bob@contoso.com>".into(), &"alice@contoso.com".into())
    );
    assert_eq!((&first["date"], &first["importance"]), (&"2026-03-01T12:00:05+00:00".into(), &"high".into()));
    assert_eq!(first["parts"].to_string(), r#"["multipart/alternative","text/plain","text/html"]"#);
    assert_eq!(first["chain"], "1-3");
    let plain = first["plain"].as_str().unwrap().replace("\r\n", "\n");
    for part in [
        "Bob Müller <sip:bob@contoso.com>, joined 2026-03-01T12:00:01.000Z, left 2026-03-01T12:30:00.000Z",
        "[2026-03-01T12:00:05.000Z] Bob Müller <sip:bob@contoso.com>: Grüße\n    From a line that begins so\n    .dot\n",
        long.as_str(),
        "[not delivered]",
        "Importance: Urgent",
    ] {
        assert!(plain.contains(part), "{part}: {plain}");
    }
    let html = first["html"].as_str().unwrap();
    assert!(html.contains("hi <b>there</b>"), "{html}");
    for part in ["onclick", "spy", "boom"] {
        assert!(!html.contains(part), "{part}: {html}");
    }
    assert!(next["html"].as_str().unwrap().contains("next day &lt;script&gt;"));
    assert_eq!(next["importance"], "high");
    assert_eq!(
        (&meeting["from"][0], &meeting["importance"]),
        (&"\"Erin <x>\" <erin@contoso.com>".into(), &"normal".into())
    );
    // One thread, three ids; and the same ids when it is made again.
    assert!(
        mails.iter().all(|mail| mail["references"] == first["references"] && mail["references"].is_string())
    );
    let ids: std::collections::BTreeSet<&str> =
        mails.iter().map(|mail| mail["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 3);
    archive.export("eml", "again", &[]).succeeded();
    let (mut one, mut other) = (files(&folder), files(&archive.path("again")));
    assert!(one.remove("manifest.json").is_some() && other.remove("manifest.json").is_some());
    assert!(one.remove("daily-summary.csv").is_some() && other.remove("daily-summary.csv").is_some());
    assert_eq!(one, other);
}

fn html_shows_what_was_said_and_runs_nothing(kind: Kind) {
    let archive = Archive::new(kind);
    let html = "<i>hi</i><img src=https://spy/x.gif><script>boom()</script>";
    archive.write(&[
        said(1, "<script>alert(1)</script>\nline two"),
        Said { html: Some(html.into()), ..said(1, "hi") },
    ]);
    archive.sql("UPDATE messages SET body = '', body_html = NULL, purged_at = '2026-04-01T00:00:00.000Z' WHERE id = 2");
    archive.write(&[Said { html: Some(html.into()), ..said(1, "hi") }]);
    // By hand; tests/retention.rs has what a purge leaves.
    archive.run(&["verify"]).failed(1, &["chain_seq 2", "yet there is text"]);
    archive.export("html", "out", &[]).succeeded();
    let page =
        fs::read_to_string(archive.path("out/alice@contoso.com/alice@contoso.com_m0000000001_c1.html"))
            .unwrap();
    for part in [
        "&lt;script&gt;alert(1)&lt;/script&gt;<br>\nline two",
        "<i>hi</i>",
        "[purged at 2026-04-01T00:00:00.000Z]",
        "default-src 'none'",
        "Lunch – größe",
        "left 2026-03-01T12:30:00.000Z",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }
    for part in ["<script", "spy", "boom", "http://", "https://"] {
        assert!(!page.contains(part), "{part}: {page}");
    }
}

fn a_killed_export_goes_on_where_it_was(kind: Kind) {
    let archive = Archive::new(kind);
    // A conversation's day is a file, so there are many.
    let mut messages = Vec::new();
    for number in 0..5_000 {
        let day = format!(
            "{:04}-{:02}-{:02}",
            2010 + number / 3600 % 10,
            1 + number / 300 % 12,
            1 + number / 10 % 28
        );
        messages.push(Said { sent_at: format!("{day}T12:00:00.000Z"), ..said(1, &format!("text {number}")) });
    }
    archive.write(&messages);
    archive.export("eml", "whole", &[]).succeeded().failed(0, &["5000 messages"]);

    let mut export = archive.command(&["export", "--format", "eml", "--out", "killed"]);
    let mut export = export.stdout(Stdio::null()).spawn().map(Running).unwrap();
    let journal = archive.path("killed/export.journal");
    archive
        .wait_for("some files", || fs::read_to_string(&journal).is_ok_and(|text| text.lines().count() > 20));
    export.0.kill().unwrap();
    export.0.wait().unwrap();
    assert!(
        journal.exists() && !archive.path("killed/manifest.json").exists(),
        "it was killed before its end"
    );
    archive.run(&["verify", "--export", "killed"]).failed(1, &["was interrupted"]);
    let so_far = files(&archive.path("killed")).len();
    archive.export("eml", "killed", &[]).succeeded().failed(0, &["5000 messages", "going on"]);
    let (whole, killed) = (files(&archive.path("whole")), files(&archive.path("killed")));
    assert!(so_far < killed.len());
    let of = |files: &BTreeMap<String, String>| {
        files
            .iter()
            .filter(|(name, _)| is(name, "eml"))
            .map(|(n, d)| (n.clone(), d.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(of(&whole), of(&killed));
    archive.run(&["verify", "--export", "killed"]).succeeded();
    let entry = &archive.manifest("killed")["accounts"][0];
    assert_eq!((&entry["messages"], &entry["last"]["chain_seq"]), (&5_000.into(), &5_000.into()));
}

on_both_databases!(
    search_finds_what_was_meant,
    a_query_that_makes_no_sense_is_answered_with_its_place,
    pages_do_not_shift_and_every_read_is_noted,
    following_shows_what_fits_as_it_comes,
    every_tampering_is_found_and_named,
    a_seal_proves_what_was_before_it,
    an_outsider_checks_an_export_with_the_documented_lines,
    a_damaged_missing_or_strange_file_is_found_in_every_format,
    later_runs_bring_what_is_new_in_files_of_their_own,
    a_part_of_the_archive_is_exported_and_checked,
    mails_are_read_back_by_another_program,
    html_shows_what_was_said_and_runs_nothing,
    a_killed_export_goes_on_where_it_was,
);
