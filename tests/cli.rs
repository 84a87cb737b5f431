//! The built program as people meet it: what it prints, where, and with which exit code.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::Value;
use support::{
    postgres::PostgresDatabase,
    sql::{Kind, Sql},
};

mod support;

/// A folder of its own in which the program runs.
struct Place {
    folder: tempfile::TempDir,
    /// The database, if it is not a file in the folder.
    postgres: Option<PostgresDatabase>,
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

    /// Ended with `code` and said on stderr all of `words`, and nothing that only programmers read.
    #[track_caller]
    fn failed(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        for part in words {
            assert!(self.stderr.contains(part), "without {part:?}: {self:?}");
        }
        for part in ["panicked", "Some(", "Err(", "Error {"] {
            assert!(!self.stderr.contains(part), "{part:?}: {self:?}");
        }
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    fn json_lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Place {
    fn empty() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), postgres: None }
    }

    /// With a configuration and an empty database.
    fn initialised(kind: Kind) -> Self {
        let mut place = Self::empty();
        if kind == Kind::Postgres {
            place.postgres = Some(wait_for(PostgresDatabase::new()));
        }
        match &place.postgres {
            Some(database) => place.run(&["init", "--database", database.url()]).succeeded(),
            None => place.run(&["init"]).succeeded(),
        };
        place
    }

    /// Another program's connection to the database.
    async fn connect(&self) -> Sql {
        use sqlx::{Connection, SqliteConnection};
        if let Some(database) = &self.postgres {
            return Sql::Postgres(Box::new(database.connect().await));
        }
        let url = format!("sqlite://{}", self.path("ucwa-relay.db").display());
        Sql::Sqlite(Box::new(SqliteConnection::connect(&url).await.unwrap()))
    }

    /// With two accounts.
    fn with_accounts(kind: Kind) -> Self {
        let place = Self::initialised(kind);
        for account in ["alice@contoso.com", "bob@contoso.com"] {
            place
                .run_with(&["account", "add", account, "--password-stdin"], "geheim-4711\n", &[])
                .succeeded();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        self.run_with(arguments, "", &[])
    }

    fn run_with(&self, arguments: &[&str], stdin: &str, variables: &[(&str, &str)]) -> Outcome {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ucwa-relay"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("UCWA_RELAY") {
                command.env_remove(name);
            }
        }
        let mut child = command
            .args(arguments)
            .current_dir(self.folder.path())
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A program that refuses its arguments does not read.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn wait_for<T>(work: impl Future<Output = T>) -> T {
    work.await
}

on_both_databases!(
    an_account_is_added_changed_and_removed,
    a_password_is_never_an_argument_and_never_shown,
    a_key_that_others_can_read_is_refused,
    a_row_is_queued_held_released_and_cancelled,
    several_rows_are_changed_as_far_as_they_allow_it,
    sending_needs_an_account_and_a_key_is_used_once,
    reading_an_empty_archive_is_no_error_and_is_noted,
    an_account_that_nobody_knows_has_no_history,
    what_was_archived_of_a_removed_account_can_be_read,
    a_text_from_stdin_comes_without_the_end_of_its_last_line_and_otherwise_as_it_is,
    only_sip_addresses_are_accounts,
    payloads_that_were_not_understood_are_listed_shown_and_read_again,
);

#[test]
fn usage_errors_end_with_2_and_help_with_0() {
    let place = Place::empty();
    let help = place.run(&["--help"]).succeeded();
    for command in [
        "run", "demo", "simulate", "init", "migrate", "check", "account", "send", "outbox", "history",
        "decode",
    ] {
        assert!(help.stdout.contains(&format!("\n  {command} ")), "{command}: {help:?}");
    }
    place.run(&["--version"]).succeeded();
    place.run(&[]).failed(2, &["Usage"]);
    place.run(&["acount"]).failed(2, &["account"]);
    place.run(&["account", "add", "alice"]).failed(2, &["is not a SIP address", "sip:alice@contoso.com"]);
    place.run(&["outbox", "show", "first"]).failed(2, &["<ID>"]);
    place.run(&["history", "--since", "someday"]).failed(2, &["--since", "2026-03-01"]);
    place.run(&["send", "--from", "a@b.c", "--to", "b@b.c", "  "]).failed(2, &["the text is empty"]);
}

#[test]
fn configuration_errors_end_with_2_and_name_file_key_and_remedy() {
    let place = Place::empty();
    place.run(&["--config", "none.toml", "account", "list"]).failed(2, &["none.toml", "ucwa-relay init"]);

    place.write("ucwa-relay.toml", "[server]\npol_timeout = '3m'\n");
    let words = ["ucwa-relay.toml", "server.pol_timeout", "did you mean poll_timeout?"];
    place.run(&["account", "list"]).failed(2, &words);

    let plain = "[[accounts]]\nsip_uri = 'a@x.y'\npassword = 'geheim-4711'\n";
    let plain = place.write("other.toml", plain).display().to_string();
    let refused =
        place.run(&["--config", &plain, "run"]).failed(2, &["other.toml", "accounts[0].password", "env = "]);
    assert!(!refused.stderr.contains("geheim"), "{refused:?}");

    place.write("ucwa-relay.toml", "");
    let variable = ("UCWA_RELAY__OUTBOX__POLL_MS", "often");
    place.run_with(&["account", "list"], "", &[variable]).failed(2, &[variable.0, "outbox.poll_ms"]);

    place.write(
        "ucwa-relay.toml",
        "[[accounts]]\nsip_uri = 'a@x.y'\npassword = { env = 'UCWA_RELAY_TEST_UNSET' }\n",
    );
    place.run(&["run"]).failed(2, &["ucwa-relay.toml", "accounts[0].password", "UCWA_RELAY_TEST_UNSET"]);
}

#[test]
fn errors_can_be_read_by_programs() {
    let outcome = Place::empty().run(&["--log-format", "json", "--config", "none.toml", "account", "list"]);
    assert_eq!(outcome.code, Some(2));
    let error: Value = serde_json::from_str(outcome.stderr.trim()).unwrap();
    assert!(error["error"].as_str().unwrap().contains("none.toml"), "{error}");
}

#[test]
fn completions_need_no_configuration() {
    let place = Place::empty();
    place.write("ucwa-relay.toml", "broken = ");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = place.run(&["completions", shell]).succeeded().stdout;
        assert!(script.contains("ucwa-relay") && script.contains("set-password"), "{shell}");
    }
}

const RESPONSE: &str = r#"<?xml version="1.0" encoding="utf-8"?>
<events href="/ucwa/oauth/v1/applications/7/events?ack=3" xmlns="http://schemas.microsoft.com/rtc/2012/03/ucwa">
  <link rel="next" href="/ucwa/oauth/v1/applications/7/events?ack=4" />
  <sender rel="conversation" href="/ucwa/oauth/v1/applications/7/communication/conversations/c1">
    <completed rel="message" href="/ucwa/oauth/v1/applications/7/communication/conversations/c1/messaging/messages/1" status="Success">
      <resource rel="message" href="/ucwa/oauth/v1/applications/7/communication/conversations/c1/messaging/messages/1">
        <link rel="plainMessage" href="data:text/plain;charset=utf-8,Tea+at+four%3f" />
        <property name="direction">Incoming</property>
        <property name="timeStamp">2026-03-01T12:00:05.123Z</property>
      </resource>
    </completed>
  </sender>
  <sender rel="communication" href="/ucwa/oauth/v1/applications/7/communication">
    <deleted rel="conversation" href="/ucwa/oauth/v1/applications/7/communication/conversations/c1" />
  </sender>
</events>
"#;

#[test]
fn decode_prints_one_object_for_each_event_in_order() {
    let place = Place::empty();
    let file = place.write("response.xml", RESPONSE).display().to_string();
    let from_file = place.run(&["decode", &file]).succeeded();
    let from_stdin = place.run_with(&["decode"], RESPONSE, &[]).succeeded();
    assert_eq!(from_file.stdout, from_stdin.stdout);

    let events = from_file.json_lines();
    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!((&events[0]["type"], &events[0]["rel"]), (&"completed".into(), &"message".into()));
    assert_eq!(events[0]["status"], "Success");
    assert!(events[0].to_string().contains("Tea at four?"), "{}", events[0]);
    assert_eq!((&events[1]["type"], &events[1]["rel"]), (&"deleted".into(), &"conversation".into()));
    assert!(events[1]["href"].as_str().unwrap().ends_with("/conversations/c1"));

    place.run(&["decode", "none.xml"]).failed(1, &["none.xml"]);
    place.run_with(&["decode"], "<events", &[]).failed(1, &["stdin is no event-channel response"]);
}

#[test]
fn init_makes_a_place_to_start_from_and_overwrites_nothing() {
    let place = Place::empty();
    let told = place.run(&["init"]).succeeded();
    for name in ["ucwa-relay.toml", "ucwa-relay.db", "ucwa-relay.key"] {
        assert!(place.path(name).exists(), "{name}");
        assert!(told.stdout.contains(name), "{told:?}");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(place.path("ucwa-relay.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let archive = std::fs::metadata(place.path("ucwa-relay.db")).unwrap().permissions().mode();
        assert_eq!(archive & 0o007, 0, "what people say is not for everybody on the machine");
    }
    place.run(&["init"]).failed(2, &["ucwa-relay.toml is there already"]);
    place.run(&["migrate"]).succeeded();

    let refused = place.run(&["--config", "b.toml", "init", "--database", "mysql://h/d"]);
    refused.failed(2, &["b.toml", "database.url"]);
    assert!(!place.path("b.toml").exists());
}

#[test]
fn tools_that_read_make_no_database() {
    let place = Place::empty();
    for arguments in [&["account", "list"][..], &["outbox", "list"], &["history"]] {
        place.run(arguments).failed(1, &["there is no database", "ucwa-relay.db", "ucwa-relay init"]);
    }
    assert!(!place.path("ucwa-relay.db").exists());
}

fn an_account_is_added_changed_and_removed(kind: Kind) {
    let place = Place::initialised(kind);
    let add = ["account", "add", "SIP:Alice@Contoso.com", "--username", r"CONTOSO\alice", "--password-stdin"];
    place.run_with(&add, "geheim-4711\n", &[]).succeeded();
    place.run_with(&add, "geheim-4711\n", &[]).failed(1, &["sip:alice@contoso.com is there already"]);
    let file = place.write("password", "geheim-4711\n").display().to_string();
    place
        .run(&["account", "add", "bob@contoso.com", "--password-file", &file, "--invitations", "decline"])
        .succeeded();
    place
        .run(&[
            "account",
            "add",
            "eve@contoso.com",
            "--password-ref",
            &format!("file:{file}"),
            "--auth",
            "ntlm",
        ])
        .succeeded();

    let list = place.run(&["account", "list", "--format", "json"]).succeeded().json();
    let told: Vec<[&str; 4]> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|row| ["account", "username", "auth", "state"].map(|name| row[name].as_str().unwrap()))
        .collect();
    assert_eq!(
        told,
        [
            ["sip:alice@contoso.com", r"CONTOSO\alice", "password", "stopped"],
            ["sip:bob@contoso.com", "bob@contoso.com", "password", "stopped"],
            ["sip:eve@contoso.com", "eve@contoso.com", "ntlm", "stopped"],
        ]
    );
    assert_eq!((&list[0]["password"], &list[0]["enabled"]), (&"sealed".into(), &true.into()));
    assert_eq!(list[1]["invitations"], "decline");
    assert_eq!(list[2]["password"], format!("file:{file}"));

    place.run(&["account", "disable", "alice@contoso.com"]).succeeded();
    let shown = place.run(&["account", "show", "alice@contoso.com", "--format", "json"]).succeeded().json();
    assert_eq!(shown["enabled"], false);
    place.run(&["account", "enable", "alice@contoso.com"]).succeeded();
    place
        .run(&["account", "set-password", "alice@contoso.com", "--password-env", "ALICE_PASSWORD"])
        .succeeded();
    let shown = place.run(&["account", "show", "alice@contoso.com"]).succeeded().stdout;
    assert!(shown.contains("enabled\tyes\n") && shown.contains("password\tenv:ALICE_PASSWORD\n"), "{shown}");

    place.run(&["account", "remove", "alice@contoso.com"]).succeeded();
    place
        .run(&["account", "show", "alice@contoso.com"])
        .failed(1, &["no account sip:alice@contoso.com", "account list"]);
    let left = place.run(&["account", "list"]).succeeded().stdout;
    assert!(!left.contains("alice") && left.lines().count() == 3, "{left}");
}

#[test]
fn an_account_that_cannot_be_read_is_listed_with_what_to_do() {
    let place = Place::with_accounts(Kind::Sqlite);
    write_rows(&place, "UPDATE accounts SET username = CAST(X'636166E9' AS TEXT) WHERE id = 1");
    write_rows(&place, "INSERT INTO accounts (sip_uri, username) VALUES ('sip:@x', 'x')");
    let list = place.run(&["account", "list"]).succeeded().stdout;
    let lines: Vec<&str> = list.lines().collect();
    assert!(lines[1].starts_with("sip:@x\tneeds_attention") && lines[1].contains("sip_uri can't"), "{list}");
    assert!(lines[2].contains("alice") && lines[2].contains("username can't"), "{list}");
    assert!(lines[3].contains("bob") && lines[3].contains("stopped"), "{list}");
    let list = place.run(&["account", "list", "--format", "json"]).succeeded().json();
    assert!(list[0]["username"].is_null() && list[2]["username"] == "bob@contoso.com", "{list}");
    place.run(&["account", "show", "alice@contoso.com"]).failed(1, &["username"]);
}

fn a_password_is_never_an_argument_and_never_shown(kind: Kind) {
    let place = Place::initialised(kind);
    let add = |more: &[&str], stdin: &str| {
        place.run_with(&[&["account", "add", "alice@contoso.com"], more].concat(), stdin, &[])
    };
    add(&["--password", "geheim-4711"], "").failed(2, &["--password"]);
    add(&[], "").failed(2, &["--password-stdin", "--password-file"]);
    add(&["--password-stdin", "--password-env", "X"], "").failed(2, &["cannot be used with"]);
    add(&["--password-stdin"], "\n").failed(1, &["the password in stdin is empty"]);
    add(&["--password-stdin"], "geheim-4711\nmore\n").failed(1, &["more than one line"]);
    add(&["--password-ref", "geheim-4711"], "").failed(2, &["env:NAME, file:PATH or credential:NAME"]);
    add(&["--password-file", "none"], "").failed(1, &["none"]);
    assert_eq!(place.run(&["account", "list", "--format", "json"]).succeeded().json(), Value::Array(vec![]));

    add(&["--password-stdin"], "geheim-4711\n").succeeded();
    let kept = match kind {
        Kind::Sqlite => ["ucwa-relay.db", "ucwa-relay.db-wal"]
            .iter()
            .flat_map(|name| std::fs::read(place.path(name)).unwrap_or_default())
            .collect(),
        Kind::Postgres => {
            let row = "SELECT encode(secret_sealed, 'escape') || a::text FROM accounts a";
            wait_for(async { place.connect().await.rows(row).await }).concat().into_bytes()
        }
    };
    assert!(kept.windows(5).any(|window| window == b"alice"), "the row is there");
    assert!(!kept.windows(6).any(|window| window == b"geheim"), "the password is there in clear");
}

fn a_key_that_others_can_read_is_refused(kind: Kind) {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::initialised(kind);
    std::fs::set_permissions(place.path("ucwa-relay.key"), PermissionsExt::from_mode(0o644)).unwrap();
    let add = ["account", "add", "alice@contoso.com", "--password-stdin"];
    place
        .run_with(&add, "geheim-4711", &[])
        .failed(1, &["sip:alice@contoso.com", "ucwa-relay.key", "chmod 600"]);
}

fn a_row_is_queued_held_released_and_cancelled(kind: Kind) {
    let place = Place::with_accounts(kind);
    let send = ["send", "--from", "alice@contoso.com", "--to", "Carol@Contoso.com,dave@contoso.com"];
    let queued =
        place.run(&[&send[..], &["--subject", "Tea", "--format", "json", "at four?"]].concat()).succeeded();
    let id = queued.json()["id"].as_i64().unwrap();
    assert_eq!(queued.json()["state"], "queued");
    let id = id.to_string();

    let row = place.run(&["outbox", "show", &id, "--format", "json"]).succeeded().json();
    for (name, value) in [
        ("account", "sip:alice@contoso.com"),
        ("recipients", "sip:carol@contoso.com;sip:dave@contoso.com"),
        ("body", "at four?"),
        ("content_type", "text/plain"),
        ("subject", "Tea"),
        ("importance", "Normal"),
        ("state", "queued"),
    ] {
        assert_eq!(row[name], value, "{name}");
    }

    place.run(&["outbox", "retry", &id]).failed(1, &["is queued and cannot be retried"]);
    place.run(&["outbox", "hold", &id]).succeeded();
    place.run(&["outbox", "retry", &id]).failed(1, &["is held", "outbox release"]);
    place.run(&["outbox", "release", &id]).succeeded();
    place.run(&["outbox", "cancel", &id]).succeeded();
    place
        .run(&["outbox", "cancel", &id])
        .failed(1, &[&format!("row {id} is cancelled and cannot be cancelled")]);
    place.run(&["outbox", "cancel", "4711"]).failed(1, &["there is no row 4711"]);

    let list = place.run(&["outbox", "list"]).succeeded().stdout;
    assert!(
        list.lines().nth(1).unwrap().starts_with(&format!("{id}\tcancelled\tsip:alice@contoso.com\t")),
        "{list}"
    );
    let of_bob =
        place.run(&["outbox", "list", "--account", "bob@contoso.com", "--format", "json"]).succeeded().json();
    assert_eq!(of_bob, Value::Array(vec![]));
    assert_eq!(place.run(&["outbox", "list", "--state", "queued"]).succeeded().stdout.lines().count(), 1);
}

fn several_rows_are_changed_as_far_as_they_allow_it(kind: Kind) {
    let place = Place::with_accounts(kind);
    let send = |text: &str| {
        let arguments =
            ["send", "--from", "alice@contoso.com", "--to", "bob@contoso.com", "--format", "json"];
        place.run_with(&arguments, text, &[]).succeeded().json()["id"].to_string()
    };
    let (first, second) = (send("one"), send("two"));
    place.run(&["outbox", "hold", &second]).succeeded();
    let outcome = place.run(&["outbox", "release", &first, &second, "4711"]);
    let outcome = outcome.failed(1, &[&format!("row {first} is queued"), "there is no row 4711"]);
    assert_eq!(outcome.stdout, format!("row {second} is released\n"));
}

fn sending_needs_an_account_and_a_key_is_used_once(kind: Kind) {
    let place = Place::with_accounts(kind);
    let send = |from: &str, more: &[&str]| {
        place.run(&[&["send", "--from", from, "--to", "bob@contoso.com", "hello"], more].concat())
    };
    send("nobody@contoso.com", &[]).failed(1, &["no account sip:nobody@contoso.com"]);
    send("alice@contoso.com", &["--idempotency-key", "k1"]).succeeded();
    send("alice@contoso.com", &["--idempotency-key", "k1"]).failed(1, &["cannot queue the message"]);
    send("alice@contoso.com", &["--wait", "--timeout", "300ms"]).failed(1, &["is still queued"]);
}

fn reading_an_empty_archive_is_no_error_and_is_noted(kind: Kind) {
    let place = Place::with_accounts(kind);
    let json = ["history", "--account", "alice@contoso.com", "--since", "2h", "--format", "json"];
    assert_eq!(place.run(&json).succeeded().json(), Value::Array(vec![]));
    assert_eq!(place.run(&["history", "--with", "bob@contoso.com"]).succeeded().stdout.lines().count(), 1);
    place
        .run(&["history", "--since", "2026-03-02", "--until", "2026-03-01"])
        .failed(2, &["--since", "--until"]);

    let noted = access_log(&place);
    assert_eq!(noted.len(), 2, "{noted:?}");
    let [actor, action, account, query] = &noted[0];
    assert!(!actor.is_empty());
    assert_eq!((action.as_str(), account.as_str()), ("history", "sip:alice@contoso.com"));
    assert!(query.contains("after:2"), "{query}");
}

fn an_account_that_nobody_knows_has_no_history(kind: Kind) {
    let place = Place::with_accounts(kind);
    for more in [&[][..], &["--follow"]] {
        place
            .run(&[&["history", "--account", "nobody@contoso.com"], more].concat())
            .failed(1, &["no account sip:nobody@contoso.com", "account list"]);
    }
    assert_eq!(access_log(&place).len(), 0, "nothing was read");
}

fn what_was_archived_of_a_removed_account_can_be_read(kind: Kind) {
    let place = Place::with_accounts(kind);
    write_rows(
        &place,
        "INSERT INTO conversations (account_id, direction, state, started_at) VALUES (1, 'incoming', 'connected', '2026-03-01T12:00:00.000Z');
         INSERT INTO messages (account_id, conversation_id, direction, body, content_type, status, source, sent_at, archived_at)
         VALUES (1, 1, 'incoming', 'still here', 'text/plain', 'delivered', 'event', '2026-03-01T12:00:00.000Z', '2026-03-01T12:00:00.000Z')",
    );
    place.run(&["account", "remove", "alice@contoso.com"]).succeeded();
    let history = place.run(&["history", "--account", "alice@contoso.com", "--format", "json"]).succeeded();
    assert_eq!(history.json()[0]["body"], "still here");
}

fn a_text_from_stdin_comes_without_the_end_of_its_last_line_and_otherwise_as_it_is(kind: Kind) {
    let place = Place::with_accounts(kind);
    for (number, (text, body)) in
        [("hi\n", "hi"), ("hi\r\n", "hi"), ("hi", "hi"), ("hi\n\n", "hi\n"), ("\n hi \r", "\n hi \r")]
            .into_iter()
            .enumerate()
    {
        let send = ["send", "--from", "alice@contoso.com", "--to", "bob@contoso.com", "-"];
        place.run_with(&send, text, &[]).succeeded();
        let row = place.run(&["outbox", "show", &(number + 1).to_string(), "--format", "json"]).succeeded();
        assert_eq!(row.json()["body"], body, "{text:?}");
    }
}

#[test]
fn a_locked_database_is_told_from_a_broken_one() {
    let place = Place::with_accounts(Kind::Sqlite);
    let outcome = while_locked(&place, || {
        place.run(&["send", "--from", "alice@contoso.com", "--to", "bob@contoso.com", "hello"])
    });
    outcome.failed(1, &["the database is locked by another program", "try again"]);
    place.run(&["send", "--from", "alice@contoso.com", "--to", "bob@contoso.com", "hello"]).succeeded();
}

fn only_sip_addresses_are_accounts(kind: Kind) {
    let place = Place::with_accounts(kind);
    for uri in ["sipx:carol@contoso.com", "carol@contoso.com", "sip:carol", "SIP:carol@contoso.com"] {
        let refused = try_sql(&place, "INSERT INTO accounts (sip_uri, username) VALUES (?, 'c')", uri);
        assert!(refused.is_err_and(|words| words.to_lowercase().contains("check constraint")), "{uri}");
    }
    for uri in ["sip:carol@contoso.com", "sips:dave@contoso.com", "sip:sipho@contoso.com"] {
        try_sql(&place, "INSERT INTO accounts (sip_uri, username) VALUES (?, 'c')", uri).unwrap();
    }
    // A name that begins like the scheme is a name.
    try_sql(
        &place,
        "INSERT INTO outbox (account, recipients, body) VALUES (?, 'bob@contoso.com', 'x')",
        "Sipho@contoso.com",
    )
    .unwrap();
    let rows =
        place.run(&["outbox", "list", "--account", "sipho@contoso.com", "--format", "json"]).succeeded();
    assert_eq!(rows.json().as_array().unwrap().len(), 1, "{rows:?}");
    let queued = "SELECT queued FROM account_overview WHERE account = 'sip:sipho@contoso.com'";
    assert_eq!(wait_for(async { place.connect().await.rows(queued).await }), ["1"]);
}

fn payloads_that_were_not_understood_are_listed_shown_and_read_again(kind: Kind) {
    let place = Place::with_accounts(kind);
    assert_eq!(place.run(&["quarantine", "list"]).succeeded().stdout.lines().count(), 1);
    write_rows(
        &place,
        "INSERT INTO sessions (account_id, application_href, endpoint_id, started_at, last_ack_at)
              SELECT id, '/a', 'e', '2026-03-01T10:00:00.000Z', '2026-03-01T12:00:00.000Z' FROM accounts
               WHERE sip_uri = 'sip:alice@contoso.com';
         INSERT INTO event_quarantine (account_id, session_id, received_at, reason, payload, payload_sha256, sender)
              SELECT account_id, id, '2026-03-01T11:00:00.000Z', 'odd',
                     '<completed rel=\"message\" href=\"/m\" status=\"Success\"><resource rel=\"message\" href=\"/m\">' ||
                     '<link rel=\"plainMessage\" href=\"data:,under\u{1b}stood\"/>' ||
                     '<property name=\"direction\">Incoming</property></resource></completed>',
                     '', '{\"rel\":\"conversation\",\"href\":\"/talk\"}' FROM sessions;
         INSERT INTO event_quarantine (account_id, received_at, reason, payload, payload_sha256)
              SELECT account_id, '2026-03-01T11:00:00.000Z', 'html', '<html>', '' FROM sessions;
         INSERT INTO gaps (account_id, session_id, from_at, to_at, reason, recorded_at, detail)
              SELECT account_id, id, '2026-03-01T10:30:00.000Z', '2026-03-01T10:40:00.000Z', 'resume', '2026-03-01T10:40:00.000Z', 'no logs'
                FROM sessions;",
    );
    let listed = place.run(&["quarantine", "list", "--account", "alice@contoso.com", "--format", "json"]);
    assert_eq!(listed.succeeded().json().as_array().unwrap().len(), 2);
    let shown = place.run(&["quarantine", "show", "1"]).succeeded().stdout;
    assert!(shown.contains("data:,under\u{241b}stood") && shown.contains("conversation /talk"), "{shown:?}");
    place.run(&["quarantine", "show", "9"]).failed(1, &["no payload 9"]);
    place.run(&["quarantine", "replay"]).failed(2, &["<ID>"]);

    place.run(&["quarantine", "replay", "2"]).failed(1, &["stay in the quarantine"]);
    let replayed = place.run(&["quarantine", "replay", "--all", "--format", "json"]).succeeded().json();
    assert_eq!((&replayed[0]["id"], &replayed[0]["understood"]), (&1.into(), &true.into()), "{replayed}");
    assert_eq!((&replayed[1]["id"], &replayed[1]["understood"]), (&2.into(), &false.into()));
    assert_eq!(place.run(&["quarantine", "list", "--format", "json"]).json().as_array().unwrap().len(), 1);
    let archived = place.run(&["history", "--format", "json"]).succeeded().json();
    assert_eq!(archived[0]["body"], "under\u{1b}stood");
    let actions: Vec<_> = access_log(&place).into_iter().map(|[_, action, ..]| action).collect();
    assert_eq!(actions, ["quarantine show", "history"]);

    let coverage =
        place.run(&["coverage", "--account", "alice@contoso.com", "--format", "json"]).succeeded().json();
    let followed: Vec<_> = coverage.as_array().unwrap().iter().map(|row| row["followed"].as_bool()).collect();
    assert_eq!(followed, [Some(true), Some(false), Some(true), Some(false)], "{coverage}");
    assert_eq!((&coverage[1]["backfilled"], &coverage[1]["detail"]), (&false.into(), &"no logs".into()));
    assert_eq!(place.run(&["coverage"]).succeeded().stdout.lines().count(), 5);
    place.run(&["coverage", "--account", "nobody@contoso.com"]).failed(1, &["no account"]);
}

/// Statements as another program does them; no text among them has a semicolon.
fn write_rows(place: &Place, statements: &str) {
    wait_for(async {
        let mut connection = place.connect().await;
        for statement in statements.split(';').filter(|statement| !statement.trim().is_empty()) {
            connection.run(statement).await.unwrap();
        }
    });
}

/// Who did what with which account, and what was asked.
fn access_log(place: &Place) -> Vec<[String; 4]> {
    let query = "SELECT actor, action, account, query FROM access_log ORDER BY id";
    let rows = wait_for(async { place.connect().await.rows(query).await });
    let columns = |row: String| row.splitn(4, '|').map(ToOwned::to_owned).collect::<Vec<_>>();
    rows.into_iter().map(|row| columns(row).try_into().unwrap()).collect()
}

/// One statement with a value in place of `?`; what the database says if it refuses.
fn try_sql(place: &Place, statement: &str, value: &str) -> Result<(), String> {
    let statement = statement.replace('?', &format!("'{value}'"));
    wait_for(async { place.connect().await.run(&statement).await.map(drop) })
}

/// Does something while another program has begun to write and does not end.
#[tokio::main(flavor = "current_thread")]
async fn while_locked(place: &Place, work: impl FnOnce() -> Outcome) -> Outcome {
    use sqlx::{Connection, SqliteConnection};
    let url = format!("sqlite://{}", place.path("ucwa-relay.db").display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await.unwrap();
    let outcome = work();
    sqlx::query("ROLLBACK").execute(&mut connection).await.unwrap();
    outcome
}
