//! Rooms: who is in a conversation, who says what there, and what a message can be, from the simulated server's events
//! to the rows and views of the database. The whole program against the simulator's ledger.

mod support;

use serde_json::{Value, json};
use sqlx::{Row, SqlitePool};
use support::{Relay, Simulate, count, eventually};
use ucwa_relay::simulator::IncomingEntry;

const ALICE: &str = "sip:user0001@contoso.example";
const PASSWORD: &str = "simulated";
const LENE: &str = "sip:silent.lene@fabrikam.example";
const TOSH: &str = "sip:silent.tosh@fabrikam.example";
const SARA: &str = "sip:silent.sara@fabrikam.example";

/// One account that is online.
async fn online(configuration: &str) -> (Simulate, Relay, SqlitePool) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, configuration);
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    let pool = relay.sql().await;
    (simulator, relay, pool)
}

async fn done(simulator: &Simulate, path: &str, request: &Value) -> Value {
    let answer = simulator.post(path, request).await;
    assert!(answer.get("error").is_none(), "{path} {request} was answered {answer}");
    answer
}

/// Says something as soon as the account hears it.
async fn say(simulator: &Simulate, request: &Value) {
    eventually(&format!("the account hears {request}"), async || {
        let answer = simulator.post("/say", request).await;
        answer["serials"].as_array().is_some_and(|serials| !serials.is_empty()).then_some(())
    })
    .await;
}

async fn from(simulator: &Simulate, conversation: &str, who: &str, text: &str) {
    say(simulator, &json!({ "conversation": conversation, "from": who, "text": text })).await;
}

async fn rows(pool: &SqlitePool, sql: &'static str) -> Vec<String> {
    sqlx::query(sql).fetch_all(pool).await.expect("the query runs").iter().map(|row| row.get(0)).collect()
}

/// Waits until a query gives these lines.
async fn shows(pool: &SqlitePool, sql: &'static str, expected: &[&str]) {
    let deadline = std::time::Instant::now() + support::PATIENCE;
    loop {
        let found = rows(pool, sql).await;
        if found == expected {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{sql}\n gives {found:#?}\n and not {expected:#?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Waits until every message to the account is settled in the archive, in the ledger's order, with the ledger's
/// sender, text and thread.
async fn ledger_is_archived(simulator: &Simulate, pool: &SqlitePool) {
    let told = |entry: &IncomingEntry| {
        let text = entry.text.as_deref().unwrap_or_default();
        format!("{}: {} [{}]", entry.correspondent, text.trim(), entry.thread_id)
    };
    let expected: Vec<String> = simulator.ledger().await.incoming.iter().map(told).collect();
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    shows(
        pool,
        "SELECT coalesce(h.sender, '?') || ': ' || trim(h.body, char(13) || char(10) || ' ') || ' [' || h.thread_id || ']' \
         FROM message_history h JOIN messages m ON m.id = h.message_id \
         WHERE h.direction = 'incoming' AND m.chain_seq IS NOT NULL ORDER BY h.message_id",
        &expected,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_meeting_is_followed_from_its_lobby_to_its_end() {
    for link_only_share in [0.0, 1.0] {
        let (simulator, _relay, pool) = online("[archive]\ntyping = true").await;
        done(&simulator, "/settings", &json!({ "link_only_share": link_only_share })).await;
        let request = json!({
            "from": LENE, "to_account": ALICE, "others": [TOSH], "subject": "Plan\0\u{1} B", "lobby": true
        });
        let meeting = done(&simulator, "/meet", &request).await["conversation"].as_str().unwrap().to_owned();
        let on = |more: Value| {
            let mut request = json!({ "conversation": meeting });
            request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            request
        };
        shows(&pool, "SELECT state || ' ' || multiparty FROM conversations", &["InLobby 1"]).await;
        done(&simulator, "/lobby", &on(json!({ "admit": true }))).await;
        // Nobody asks the account to add messaging: it does so to hear what is said.
        from(&simulator, &meeting, LENE, "welcome").await;
        from(&simulator, &meeting, TOSH, "hello").await;
        done(&simulator, "/wait", &on(json!({ "who": SARA }))).await;
        done(&simulator, "/type", &on(json!({ "from": TOSH }))).await;
        shows(
            &pool,
            "SELECT p.sip_uri FROM typing t JOIN participants p ON p.id = t.participant_id",
            &[TOSH],
        )
        .await;
        assert_eq!(count(&pool, "SELECT count(*) FROM participants WHERE href LIKE '%sara%'").await, 0);
        done(&simulator, "/lobby", &on(json!({ "who": SARA, "admit": true }))).await;
        from(&simulator, &meeting, SARA, "may I?").await;
        done(&simulator, "/role", &on(json!({ "who": SARA, "leader": true }))).await;
        from(&simulator, &meeting, TOSH, "bye").await;
        done(&simulator, "/leave", &on(json!({ "from": TOSH }))).await;
        from(&simulator, &meeting, SARA, "he left").await;
        done(&simulator, "/join", &on(json!({ "who": TOSH }))).await;
        from(&simulator, &meeting, TOSH, "back again").await;
        ledger_is_archived(&simulator, &pool).await;
        shows(
            &pool,
            "SELECT sip_uri || ' ' || coalesce(role, '-') || iif(left_at IS NULL, '', ' left') FROM participants \
             WHERE is_local = 0 ORDER BY sip_uri, id",
            &[
                &format!("{LENE} Leader"),
                &format!("{SARA} Leader"),
                &format!("{TOSH} Attendee left"),
                &format!("{TOSH} Attendee"),
            ],
        )
        .await;
        shows(
            &pool,
            "SELECT subject || '|' || direction || '|' || state || '|' || multiparty || '|' \
             || (online_meeting_uri LIKE '%:conf:focus:%') FROM conversations",
            &["Plan\u{2400}\u{1} B|incoming|Conferenced|1|1"],
        )
        .await;
        shows(
            &pool,
            "SELECT kind || ' ' || direction || ' ' || coalesce(action, '-') || ' ' || state FROM invitations ORDER BY id",
            &["online_meeting incoming accepted Connected", "messaging outgoing - Connected"],
        )
        .await;
        for who in [LENE, SARA, TOSH] {
            done(&simulator, "/leave", &on(json!({ "from": who }))).await;
            if simulator.post("/say", &on(json!({ "text": "?" }))).await.get("error").is_some() {
                break;
            }
        }
        shows(&pool, "SELECT 'open' FROM conversations WHERE ended_at IS NULL", &[]).await;
        assert_eq!(count(&pool, "SELECT count(*) FROM participants WHERE left_at IS NULL").await, 0);
        assert_eq!(count(&pool, "SELECT count(*) FROM event_quarantine").await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_meeting_is_heard_though_its_messaging_is_refused_at_first_and_the_server_dies() {
    let (simulator, mut relay, pool) = online("").await;
    let refuse = json!({ "operation": "addMessaging", "fault": "status", "status": 503, "count": 2 });
    done(&simulator, "/fault", &refuse).await;
    let request = json!({ "from": LENE, "to_account": ALICE, "subject": "one" });
    let meeting = done(&simulator, "/meet", &request).await["conversation"].as_str().unwrap().to_owned();
    from(&simulator, &meeting, LENE, "after two refusals").await;

    // Killed after it has joined and before it could ask for the messaging again.
    let refuse = json!({ "operation": "addMessaging", "fault": "status", "status": 503, "share": 1.0 });
    done(&simulator, "/fault", &refuse).await;
    let request = json!({ "from": SARA, "to_account": ALICE, "subject": "two" });
    let meeting = done(&simulator, "/meet", &request).await["conversation"].as_str().unwrap().to_owned();
    eventually("the messaging is refused", async || {
        let faults = simulator.get("/faults").await;
        faults
            .as_array()?
            .iter()
            .any(|fault| fault["share"] == 1.0 && fault["struck"].as_u64() > Some(0))
            .then_some(())
    })
    .await;
    relay.server().kill();
    assert_eq!(
        simulator.post("/say", &json!({ "conversation": meeting, "text": "?" })).await["serials"],
        json!([])
    );
    simulator.delete("/faults").await;
    relay.start();
    from(&simulator, &meeting, SARA, "after the restart").await;
    ledger_is_archived(&simulator, &pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_talk_of_two_that_grows_stays_one_conversation_with_the_right_senders() {
    for link_only_share in [0.0, 1.0] {
        let (simulator, relay, pool) = online("[relay]\nidle_conversation = \"1s\"").await;
        done(&simulator, "/settings", &json!({ "link_only_share": link_only_share })).await;
        let talk = simulator.call(LENE, ALICE, "just us").await;
        from(&simulator, &talk, LENE, "let us ask Sara").await;
        done(&simulator, "/join", &json!({ "conversation": talk, "who": SARA })).await;
        // Gone before anybody can ask who it was.
        done(&simulator, "/join", &json!({ "conversation": talk, "who": TOSH })).await;
        from(&simulator, &talk, TOSH, "wrong room").await;
        done(&simulator, "/leave", &json!({ "conversation": talk, "from": TOSH })).await;
        from(&simulator, &talk, SARA, "here I am").await;
        from(&simulator, &talk, LENE, "good").await;
        ledger_is_archived(&simulator, &pool).await;
        shows(
            &pool,
            "SELECT state || ' ' || multiparty || ' ' || participants FROM conversation_summary",
            &[&format!("Conferenced 1 {LENE};{SARA};{TOSH};{ALICE}")],
        )
        .await;
        let id: i64 = sqlx::query_scalar("SELECT id FROM conversations").fetch_one(&pool).await.unwrap();
        sqlx::query("INSERT INTO outbox (account, conversation_id, body) VALUES (?, ?, 'to all')")
            .bind(ALICE)
            .bind(id)
            .execute(&pool)
            .await
            .unwrap();
        shows(&pool, "SELECT state FROM outbox", &["delivered"]).await;
        let mut heard = simulator.ledger().await.outgoing[0].to.clone();
        heard.sort();
        assert_eq!(heard, [LENE, SARA]);
        // A conference is not left because it is idle, so nothing of it is missed.
        assert_eq!(count(&pool, "SELECT count(*) FROM conversations WHERE ended_at IS NOT NULL").await, 0);
        let reckoning = relay.reckon(&simulator).await;
        assert!(reckoning.is_clean(), "{reckoning:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invitations_are_answered_as_the_accounts_row_says() {
    let (simulator, _relay, pool) = online("[relay]\ninvitations = \"decline\"").await;
    // A row that changes while the server runs is followed; without one, what the configuration says holds.
    for (row, action) in [
        (None, "declined"),
        (Some("ignore"), "ignored"),
        (Some("accept"), "accepted"),
        (Some("decline"), "declined"),
    ] {
        sqlx::query("UPDATE accounts SET invitations = ?").bind(row).execute(&pool).await.unwrap();
        for path in ["/call", "/meet"] {
            eventually(&format!("{path} is {action}"), async || {
                let kind = if path == "/call" { "messaging" } else { "online_meeting" };
                let known = count(&pool, "SELECT coalesce(max(id), 0) FROM invitations").await;
                let request = json!({ "from": LENE, "to_account": ALICE, "subject": "s", "text": "hello" });
                let conversation = simulator.post(path, &request).await["conversation"].as_str()?.to_owned();
                // What came while the account signed in anew may be missed.
                let answered: String = eventually("the invitation is answered or missed", async || {
                    sqlx::query_scalar(
                        "SELECT coalesce(action, 'missed') FROM invitations \
                         WHERE id > ? AND kind = ? AND direction = 'incoming' \
                           AND (action IS NOT NULL OR finished_at IS NOT NULL)",
                    )
                    .bind(known)
                    .bind(kind)
                    .fetch_optional(&pool)
                    .await
                    .unwrap()
                })
                .await;
                simulator.post("/leave", &json!({ "conversation": conversation })).await;
                (answered == action).then_some(())
            })
            .await;
        }
    }
    shows(
        &pool,
        "SELECT DISTINCT kind || ' ' || action FROM invitations WHERE direction = 'incoming' ORDER BY 1",
        &[
            "messaging accepted",
            "messaging declined",
            "messaging ignored",
            "online_meeting accepted",
            "online_meeting declined",
            "online_meeting ignored",
        ],
    )
    .await;
    assert_eq!(
        count(&pool, "SELECT count(*) FROM invitations WHERE kind = 'messaging' AND direction = 'incoming' AND message_id IS NULL").await,
        0,
        "what was not accepted is archived, too"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archive_shows_where_a_talk_went_on() {
    let (simulator, _relay, pool) = online("").await;
    let insert =
        "INSERT INTO outbox (account, recipients, body) VALUES (?, 'derives.lene@fabrikam.example', ?)";
    sqlx::query(insert).bind(ALICE).bind("are you there?").execute(&pool).await.unwrap();
    shows(
        &pool,
        "SELECT o.state || ' ' || o.last_subcode || ' ' || (d.thread_id = c.thread_id) || ' ' || (d.ended_at IS NULL) \
         FROM outbox o JOIN conversations c ON c.id = o.conversation_id JOIN conversations d ON d.id = c.continued_in",
        &["failed DerivedConversation 1 1"],
    )
    .await;
    sqlx::query(insert).bind(ALICE).bind("then here").execute(&pool).await.unwrap();
    shows(
        &pool,
        "SELECT o.state || ' ' || (c.continued_in IS NULL) || ' ' || (o.conversation_id IN (SELECT continued_in FROM conversations)) \
         FROM outbox o JOIN conversations c ON c.id = o.conversation_id WHERE o.body = 'then here'",
        &["delivered 1 1"],
    )
    .await;
    // A meeting on the same thread is found by it.
    let talk = simulator.call(LENE, ALICE, "shall we meet?").await;
    from(&simulator, &talk, LENE, "now").await;
    let request = json!({ "from": LENE, "to_account": ALICE, "subject": "met", "after": talk });
    let meeting = done(&simulator, "/meet", &request).await["conversation"].as_str().unwrap().to_owned();
    from(&simulator, &meeting, LENE, "welcome").await;
    ledger_is_archived(&simulator, &pool).await;
    assert_eq!(
        count(
            &pool,
            "SELECT count(*) FROM conversations c JOIN conversations m ON m.thread_id = c.thread_id \
             WHERE m.online_meeting_uri IS NOT NULL AND c.online_meeting_uri IS NULL"
        )
        .await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_message_names_whom_it_did_not_reach() {
    let (simulator, _relay, pool) = online("").await;
    sqlx::query("INSERT INTO outbox (account, recipients, body) VALUES (?, ?, 'all of you')")
        .bind(ALICE)
        .bind(format!("{LENE};deaf.hans@fabrikam.example"))
        .execute(&pool)
        .await
        .unwrap();
    shows(
        &pool,
        "SELECT m.status || ' ' || m.failed_recipients || ' ' || o.state || ' ' || o.last_error \
         FROM messages m JOIN outbox o ON o.message_id = m.id",
        &["delivered sip:deaf.hans@fabrikam.example delivered not delivered to sip:deaf.hans@fabrikam.example"],
    )
    .await;
    assert_eq!(simulator.ledger().await.outgoing.len(), 1);
    shows(
        &pool,
        "SELECT kind || ' ' || to_uri || ' ' || state || ' ' || (action IS NULL) FROM invitations ORDER BY id",
        &[
            &format!("messaging {LENE} Connected 1"),
            "participant sip:deaf.hans@fabrikam.example Connected 1",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_message_is_made_of_it_is_archived_or_quarantined() {
    for (link_only_share, started_share) in [(0.0, 0.0), (1.0, 1.0)] {
        let (simulator, relay, pool) = online("").await;
        done(
            &simulator,
            "/settings",
            &json!({ "link_only_share": link_only_share, "started_share": started_share }),
        )
        .await;
        let talk = simulator.call("sip:html.dana@fabrikam.example", ALICE, "begin").await;
        let utf16 = "data:text/plain;charset=utf-16le;base64,6QAgAD3YAN4=";
        let long = "long ".repeat(12_000);
        for said in [
            json!({ "html": "<div>one</div><div>&amp; <b>two</b></div>" }),
            json!({ "text": "both", "html": "<i>both</i>" }),
            json!({ "text": "é 😀", "data_uri": utf16 }),
            json!({ "text": "café", "data_uri": "data:text/plain;charset=\"ISO-8859-1\",caf%e9" }),
            json!({ "text": "a+b c", "data_uri": "DATA:text/plain;charset=utf-8;base64,YSti IGM" }),
            json!({ "text": "a\0b\u{1}\u{7}c" }),
            json!({ "text": "half \u{fffd}", "data_uri": "data:text/plain;charset=utf-16be;base64,AGgAYQBsAGYAINg9" }),
            json!({ "text": "bad \u{fffd}\u{fffd}", "data_uri": "data:text/plain;charset=utf-8,bad+%ff%fe" }),
            json!({ "text": "early", "time_stamp": "0001-01-01T00:00:00Z" }),
            json!({ "text": "late", "time_stamp": "9999-12-31T23:59:59.9999999Z" }),
            json!({ "text": "never", "time_stamp": "the day before\u{0}" }),
            json!({ "text": "", "data_uri": "data:text/plain;base64,@@@" }),
            json!({ "text": long }),
            json!({ "text": "end" }),
        ] {
            let mut request = json!({ "conversation": talk });
            request.as_object_mut().unwrap().extend(said.as_object().unwrap().clone());
            say(&simulator, &request).await;
        }
        let long = long.trim_end();
        shows(
            &pool,
            "SELECT rtrim(body, char(13) || char(10) || ' ') || '|' || coalesce(body_html, '') FROM messages \
             WHERE chain_seq IS NOT NULL ORDER BY id",
            &[
                "begin|",
                "one\n& two|<div>one</div><div>&amp; <b>two</b></div>",
                "both|<i>both</i>",
                "é 😀|",
                "café|",
                "a+b c|",
                "a\u{2400}b\u{1}\u{7}c|",
                "half \u{fffd}|",
                "bad \u{fffd}\u{fffd}|",
                "early|",
                "late|",
                "never|",
                "|",
                &format!("{long}|"),
                "end|",
            ],
        )
        .await;
        shows(
            &pool,
            "SELECT body || ' ' || (abs(julianday(sent_at) - julianday('now')) < 1) || ' ' || (reason LIKE '%dated%') \
             FROM messages WHERE reason IS NOT NULL ORDER BY id",
            &["early 1 1", "late 1 1", "never 1 1"],
        )
        .await;
        assert!(
            count(&pool, "SELECT count(*) FROM event_quarantine WHERE reason LIKE '%base64%'").await >= 1
        );
        assert_eq!(
            count(&pool, "SELECT count(*) FROM event_quarantine WHERE reason NOT LIKE '%base64%'").await,
            0
        );
        assert_eq!(count(&pool, "SELECT count(*) FROM messages WHERE status <> 'delivered'").await, 0);
        let found = relay.tool_ok(&["history", "--format", "json"]);
        assert!(found.contains("café"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_larger_than_any_answer_may_be_does_not_stop_the_channel() {
    let (simulator, _relay, pool) = online("").await;
    done(&simulator, "/settings", &json!({ "link_only_share": 0.0, "started_share": 0.0 })).await;
    let talk = simulator.call(LENE, ALICE, "begin").await;
    from(&simulator, &talk, LENE, "small").await;
    shows(&pool, "SELECT 'there' FROM messages WHERE body LIKE 'small%'", &["there"]).await;
    let request = json!({ "conversation": talk, "text": "x".repeat(17 * 1024 * 1024) });
    done(&simulator, "/say", &request).await;
    // What was received of it is kept, and what the same answer may have told besides is a gap that everybody sees.
    let gaps = "SELECT reason FROM coverage_gaps WHERE reason LIKE '%event_quarantine%'";
    eventually("the gap is shown", async || (rows(&pool, gaps).await.len() == 1).then_some(())).await;
    shows(
        &pool,
        "SELECT DISTINCT 'kept' FROM event_quarantine WHERE payload LIKE '%plainMessage%'",
        &["kept"],
    )
    .await;
    from(&simulator, &talk, LENE, "after it").await;
    shows(&pool, "SELECT 'there' FROM messages WHERE body LIKE 'after it%'", &["there"]).await;
}
