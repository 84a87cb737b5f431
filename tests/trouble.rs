//! The whole program with a database in trouble: it acknowledges nothing that is not stored, loses nothing, says what is
//! wrong in `/readyz` and once in its log, and goes on by itself.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::{net::TcpListener, process::Command, time::Duration};

use serde_json::Value;
use support::{
    Relay, Simulate, eventually, eventually_within,
    postgres::{OwnServer, PostgresDatabase},
    sql::{Kind, Sql},
};
use ucwa_relay::simulator::IncomingState;

const ALICE: &str = "sip:user0001@contoso.example";
const DANA: &str = "silent.dana@fabrikam.example";
/// What the log says when trouble begins, and when it is over.
const BEGINS: &str = "the database takes nothing";
const IS_OVER: &str = "the database takes what is written again";

/// An account that is signed in and in a conversation.
struct Scene {
    simulator: Simulate,
    relay: Relay,
    readyz: String,
    call: String,
}

impl Scene {
    async fn on(kind: Kind, more: &str) -> Self {
        Self::with(more, async |simulator, more| Relay::configure_on(kind, simulator, more).await).await
    }

    async fn with(more: &str, configure: impl AsyncFnOnce(&Simulate, &str) -> Relay) -> Self {
        let simulator = Simulate::start(&["--accounts", "1"]);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let more = format!("[admin]\nlisten = \"127.0.0.1:{port}\"\n{more}");
        let mut relay = configure(&simulator, &more).await;
        relay.add_account(ALICE, "simulated");
        relay.start();
        relay.account_state(ALICE, "online").await;
        let call = simulator.call(DANA, ALICE, "one").await;
        let scene = Self { simulator, relay, readyz: format!("http://127.0.0.1:{port}/readyz"), call };
        scene.is_archived("one").await;
        scene.is_ready().await;
        scene
    }

    async fn ask(&self) -> Option<(u16, Value)> {
        let answer = reqwest::get(&self.readyz).await.ok()?;
        let status = answer.status().as_u16();
        Some((status, serde_json::from_str(&answer.text().await.ok()?).expect("JSON")))
    }

    async fn is_ready(&self) {
        eventually("it is ready", async || self.ask().await.filter(|(status, _)| *status == 200)).await;
    }

    /// `/readyz` says so, with one of these words.
    async fn is_in_trouble(&self, words: &[&str]) {
        let mut told = String::new();
        let seen = eventually_within(Duration::from_secs(60), "it says what is wrong", async || {
            let (status, answer) = self.ask().await?;
            let problem = answer["database"]["problem"].as_str().unwrap_or_default();
            problem.clone_into(&mut told);
            (status == 503 && words.iter().any(|word| problem.contains(word))).then(|| answer.clone())
        });
        let answer = seen.await;
        assert_eq!(answer["ready"], false, "{answer}");
        // Where the database can't be asked, what was last known of the outbox is not told as if it were so now.
        let unknown = if answer["database"]["reachable"] == true { " 0" } else { " NaN" };
        let queued = format!("ucwa_relay_outbox_rows{{state=\"queued\"}}{unknown}\n");
        let waits = format!("ucwa_relay_outbox_oldest_seconds{unknown}\n");
        eventually("metrics say so, too", async || {
            let metrics =
                reqwest::get(self.readyz.replace("/readyz", "/metrics")).await.ok()?.text().await.ok()?;
            let told = ["ucwa_relay_database_up 0\n", &queued, &waits];
            told.iter().all(|line| metrics.contains(*line)).then_some(())
        })
        .await;
    }

    async fn is_archived(&self, text: &str) {
        let mut sql = self.relay.connect().await;
        let query = format!(
            "SELECT count(*) FROM messages WHERE replace(replace(body, chr(13), ''), chr(10), '') = '{text}'"
        );
        let query = match sql {
            Sql::Sqlite(_) => query.replace("chr(", "char("),
            Sql::Postgres(_) => query,
        };
        eventually(&format!("{text:?} is archived"), async || {
            (sql.rows(&query).await == ["1"]).then_some(())
        })
        .await;
    }

    async fn say(&self, text: &str) {
        self.simulator.say(&self.call, text).await;
    }

    async fn is_acknowledged(&self, text: &str) -> bool {
        let ledger = self.simulator.ledger().await;
        let entry = ledger.incoming.into_iter().find(|entry| entry.text.as_deref() == Some(text));
        let entry = entry.expect("it was said");
        entry.package_acknowledged || entry.state == IncomingState::Acknowledged
    }

    /// Something is said that the database does not take: `/readyz` and the log say why, and nothing is acknowledged.
    async fn holds_back(&mut self, words: &[&str]) {
        self.say("held").await;
        eventually("the log says it", async || self.said(BEGINS).eq(&1).then_some(())).await;
        self.is_in_trouble(words).await;
        assert!(!self.is_acknowledged("held").await, "it is not stored");
    }

    /// How often the server's log has these words.
    fn said(&mut self, words: &str) -> usize {
        self.relay.server().stderr().matches(words).count()
    }

    /// After the database is well: what was held back is stored once and acknowledged, and sending works.
    async fn goes_on(mut self) {
        self.is_archived("held").await;
        eventually("it is acknowledged", async || self.is_acknowledged("held").await.then_some(())).await;
        self.say("after").await;
        self.is_archived("after").await;
        self.is_ready().await;
        let mut sql = self.relay.connect().await;
        sql.run(&format!(
            "INSERT INTO outbox (account, recipients, body) VALUES ('{ALICE}', 'echo.erin@fabrikam.example', 'out')"
        ))
        .await
        .unwrap();
        eventually("what was queued is delivered", async || {
            (sql.rows("SELECT state FROM outbox").await == ["delivered"]).then_some(())
        })
        .await;
        eventually("ledger and database agree", async || {
            self.relay.reckon(&self.simulator).await.is_clean().then_some(())
        })
        .await;
        let log = self.relay.server().stderr();
        assert_eq!((self.said(BEGINS), self.said(IS_OVER)), (1, 1), "{log}");
        let is_loud = |line: &&str| {
            (line.contains(" WARN ") || line.contains(" ERROR ")) && line.contains(" ucwa_relay::")
        };
        let loud = log.lines().filter(is_loud).count();
        assert!(loud <= 10, "{loud} warnings:\n{log}");
        assert!(self.relay.server().runs());
    }
}

/// A role that, unlike the administrator's, obeys limits; and a database of its own.
async fn limited(server: &OwnServer) -> (PostgresDatabase, Sql) {
    let database = PostgresDatabase::on(&server.admin_url()).await;
    let mut admin = Sql::Postgres(Box::new(database.connect().await));
    admin.run("CREATE ROLE relay LOGIN CREATEROLE").await.unwrap();
    let name = admin.rows("SELECT current_database()::text").await.remove(0);
    admin.run(&format!("ALTER DATABASE {name} OWNER TO relay")).await.unwrap();
    admin.run("ALTER SCHEMA public OWNER TO relay").await.unwrap();
    (database.of_user("relay"), admin)
}

const END_SESSIONS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'relay'";

async fn on_own_server(more: &str) -> (OwnServer, Sql, Scene) {
    let server = OwnServer::start();
    let (database, admin) = limited(&server).await;
    let scene =
        Scene::with(more, async |simulator, more| Relay::configure_in(database, simulator, more)).await;
    (server, admin, scene)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_for_several_leases_is_waited_for() {
    let (server, _, mut scene) = on_own_server("[cluster]\nlease_ttl_s = 5\n").await;
    scene.say("held").await;
    scene.is_archived("held").await;
    server.stop_immediately();
    scene.is_in_trouble(&["refused", "does not answer", "no answer"]).await;
    // The account's lease runs out, and its actors end.
    eventually("the account is let go", async || {
        scene.relay.server().stderr().contains("lease").then_some(())
    })
    .await;
    eventually("the log says it", async || scene.said(BEGINS).eq(&1).then_some(())).await;
    server.start_again();
    scene.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_is_waited_for() {
    let (server, _, mut scene) = on_own_server("").await;
    server.stop_immediately();
    scene.holds_back(&["refused", "does not answer", "no answer"]).await;
    server.start_again();
    scene.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_others_have_taken_are_waited_for() {
    let (_server, mut admin, mut scene) = on_own_server("").await;
    admin.run("ALTER ROLE relay CONNECTION LIMIT 0").await.unwrap();
    admin.run(END_SESSIONS).await.unwrap();
    scene.holds_back(&["too many connections"]).await;
    admin.run("ALTER ROLE relay CONNECTION LIMIT -1").await.unwrap();
    scene.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_may_only_be_read_is_waited_for() {
    let (_server, mut admin, mut scene) = on_own_server("").await;
    for sql in ["ALTER ROLE relay SET default_transaction_read_only = on", END_SESSIONS] {
        admin.run(sql).await.unwrap();
    }
    scene.holds_back(&["read-only transaction"]).await;
    for sql in ["ALTER ROLE relay RESET default_transaction_read_only", END_SESSIONS] {
        admin.run(sql).await.unwrap();
    }
    scene.goes_on().await;
}

/// As the server refuses to make a table's file longer; what fits into the pages there are is still taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_room_is_waited_for() {
    let (_server, mut admin, mut scene) = on_own_server("").await;
    for sql in [
        "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
         END $$",
        "CREATE TRIGGER no_room BEFORE INSERT ON messages FOR EACH STATEMENT EXECUTE FUNCTION no_room()",
    ] {
        admin.run(sql).await.unwrap();
    }
    scene.holds_back(&["No space left"]).await;
    admin.run("DROP TRIGGER no_room ON messages").await.unwrap();
    scene.goes_on().await;
}

/// The program's files may not grow any more, as on a full disk; then they may again.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_can_not_grow_is_waited_for() {
    let mut scene = Scene::with("", async |simulator, more| {
        let mut relay = Relay::configure_on(Kind::Sqlite, simulator, more).await;
        // That is an error for the server then, and not its end, as a service manager may have it.
        relay.in_shell_after("trap '' XFSZ");
        relay
    })
    .await;
    let limit = |scene: &mut Scene, bytes: &str| {
        let process = scene.relay.server().id().to_string();
        let done = Command::new("prlimit").args(["--pid", &process, &format!("--fsize={bytes}:")]).status();
        assert!(done.unwrap().success(), "prlimit belongs to util-linux");
    };
    limit(&mut scene, "4096");
    scene.holds_back(&["disk", "full"]).await;
    limit(&mut scene, "unlimited");
    scene.goes_on().await;
}

async fn a_schema_of_a_newer_program_is_refused(kind: Kind) {
    let mut scene = Scene::on(kind, "").await;
    assert!(scene.relay.server().terminate());
    let mut sql = scene.relay.connect().await;
    let newer = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
                 SELECT 999, 'newer', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1";
    sql.run(newer).await.unwrap();
    for command in [&["run"][..], &["history"], &["send", "--from", ALICE, "--to", DANA, "x"]] {
        let refused = scene.relay.tool(command);
        let words = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{words}");
        assert!(words.contains("newer ucwa-relay") && words.contains("999"), "{words}");
    }
    assert_eq!(sql.count("messages").await, 1, "nothing was touched");
    sql.run("DELETE FROM _sqlx_migrations WHERE version = 999").await.unwrap();
    scene.say("held").await;
    scene.relay.start();
    scene.is_archived("held").await;
}

on_both_databases! { "multi_thread": a_schema_of_a_newer_program_is_refused }

/// As after five power cuts, each in the thick of traffic both ways.
#[tokio::test(flavor = "multi_thread")]
async fn five_crashes_of_the_server_under_traffic_both_ways_lose_and_double_nothing() {
    let server = OwnServer::start();
    let database = PostgresDatabase::on(&server.admin_url()).await;
    let simulator = Simulate::start(&["--accounts", "6", "--rate", "20"]);
    let mut relay = Relay::configure_in(database, &simulator, "[outbox]\nsettle_after = \"6s\"\n");
    let accounts: Vec<String> =
        (1..=6).map(|number| format!("sip:user{number:04}@contoso.example")).collect();
    for account in &accounts {
        relay.add_account(account, "simulated");
    }
    relay.start();
    for account in &accounts {
        relay.account_state(account, "online").await;
    }
    let mut queued = 0;
    for _ in 0..5 {
        let mut sql = relay.connect().await;
        for account in &accounts {
            for recipient in ["echo.a", "silent.b"] {
                queued += 1;
                let row = format!(
                    "INSERT INTO outbox (account, recipients, body)
                     VALUES ('{account}', '{recipient}@fabrikam.example', 'row {queued}')"
                );
                sql.run(&row).await.unwrap();
            }
        }
        let before = sql.count("messages").await;
        eventually("messages go both ways", async || {
            let sent = sql.count("outbox WHERE state IN ('sent', 'delivered')").await;
            (sql.count("messages WHERE direction = 'incoming'").await > 0
                && sent > 0
                && sql.count("messages").await > before)
                .then_some(())
        })
        .await;
        server.stop_immediately();
        server.start_again();
    }
    for account in &accounts {
        relay.account_state(account, "online").await;
    }
    simulator.post("/traffic", &serde_json::json!({ "running": false })).await;
    let reckoning = eventually_within(Duration::from_secs(200), "ledger and database agree", async || {
        let quiet = simulator.get("/counters").await["quiet"].as_bool().unwrap_or(false);
        let reckoning = relay.reckon(&simulator).await;
        (quiet && reckoning.is_clean()).then_some(reckoning)
    })
    .await;
    assert_eq!(reckoning.relayed + reckoning.uncertain, queued, "{reckoning:?}");
    assert!(relay.server().runs());
}
