//! What the run-book says of backups: taken while the server runs, restored after a loss, and started again.

use std::{path::Path, process::Command};

use crate::support::{
    Relay, Simulate, eventually,
    sql::{Kind, Sql},
};

const ALICE: &str = "sip:user0001@contoso.example";
const DANA: &str = "silent.dana@fabrikam.example";
const FRIEND: &str = "sip:friend@fabrikam.example";

fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).output().expect("PostgreSQL's programs are installed");
    assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
}

/// As the run-book has it: the database while it runs, and the key.
async fn back_up(kind: Kind, relay: &Relay, to: &Path) {
    let file = to.join("backup").display().to_string();
    match kind {
        Kind::Sqlite => {
            let mut sql = relay.connect().await;
            sql.run(&format!("VACUUM INTO '{file}'")).await.unwrap();
            sql.close().await;
        }
        Kind::Postgres => run("pg_dump", &["--format=custom", "--file", &file, &relay.url()]),
    }
    std::fs::copy(key_of(relay), to.join("key")).unwrap();
}

fn key_of(relay: &Relay) -> std::path::PathBuf {
    relay.folder.path().join("ucwa-relay.key")
}

fn restore(kind: Kind, relay: &Relay, from: &Path) {
    match kind {
        Kind::Sqlite => {
            for rest in ["-wal", "-shm"] {
                // Gone already if the server was stopped in order.
                let _ = std::fs::remove_file(format!("{}{rest}", relay.database().display()));
            }
            std::fs::copy(from.join("backup"), relay.database()).unwrap();
        }
        Kind::Postgres => {
            let file = from.join("backup").display().to_string();
            run(
                "pg_restore",
                &["--clean", "--if-exists", "--single-transaction", "--dbname", &relay.url(), &file],
            );
        }
    }
    std::fs::copy(from.join("key"), key_of(relay)).unwrap();
}

async fn is_archived(sql: &mut Sql, body: &str) {
    eventually(&format!("{body:?} is archived once"), async || {
        let found = sql.count(&format!("messages WHERE body = '{body}'")).await;
        assert!(found <= 1, "{body:?} is archived twice");
        (found == 1).then_some(())
    })
    .await;
}

async fn a_backup_that_is_older_than_what_was_done_loses_and_doubles_nothing(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    simulator.post("/settings", &serde_json::json!({ "conversation_logs": true, "log_delay_ms": 0 })).await;
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, "simulated");
    relay.start();
    relay.account_state(ALICE, "online").await;
    simulator.call(DANA, ALICE, "before").await;
    let mut sql = relay.connect().await;
    is_archived(&mut sql, "before").await;
    let held = format!(
        "INSERT INTO outbox (account, recipients, body, send_after) VALUES ('{ALICE}', '{FRIEND}', 'only once', '2999-01-01T00:00:00.000Z')"
    );
    sql.run(&held).await.unwrap();

    let shelf = tempfile::tempdir().unwrap();
    back_up(kind, &relay, shelf.path()).await;

    // What the backup knows nothing of: something was heard, and the row was sent.
    let talk = simulator.call("silent.erin@fabrikam.example", ALICE, "after the backup").await;
    is_archived(&mut sql, "after the backup").await;
    simulator.post("/leave", &serde_json::json!({ "conversation": talk })).await;
    eventually("the server has logged the talk", async || {
        simulator
            .get(&format!("/logs?account={ALICE}"))
            .await
            .to_string()
            .contains("after the backup")
            .then_some(())
    })
    .await;
    sql.run("UPDATE outbox SET send_after = NULL").await.unwrap();
    eventually("the row is delivered", async || {
        (sql.rows("SELECT state FROM outbox").await == ["delivered"]).then_some(())
    })
    .await;
    relay.server().kill();
    // Whoever still has a SQLite file open writes into what is put in its place.
    sql.close().await;
    std::fs::write(key_of(&relay), "lost").unwrap();
    restore(kind, &relay, shelf.path());
    let mut sql = relay.connect().await;
    assert_eq!(sql.count("messages WHERE body = 'after the backup'").await, 0, "the backup is older");
    // The run-book's guard: what waits may have been sent since.
    assert_eq!(sql.run("UPDATE outbox SET send_after = NULL").await, Ok(1));
    assert_eq!(sql.run("UPDATE outbox SET state = 'held' WHERE state = 'queued'").await, Ok(1));

    relay.start();
    relay.account_state(ALICE, "online").await;
    simulator.call("silent.frank@fabrikam.example", ALICE, "after the restore").await;
    for body in ["before", "after the restore", "after the backup"] {
        is_archived(&mut sql, body).await;
    }
    assert!(sql.count("coverage_gaps").await >= 1, "the stretch since the backup is told");
    assert_eq!(sql.rows("SELECT state FROM outbox").await, ["held"]);
    let ledger = simulator.ledger().await;
    let sent: Vec<&str> = ledger.outgoing.iter().map(|entry| entry.text.as_str()).collect();
    assert_eq!(sent, ["only once"]);
    assert!(relay.server().terminate());
    relay.tool_ok(&["verify"]);
}

crate::on_both_databases! { "multi_thread": a_backup_that_is_older_than_what_was_done_loses_and_doubles_nothing }
