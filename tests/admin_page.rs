//! The admin page: what it shows on either database, whom it lets in, and how it is in a real browser.

mod support;

use std::{net::TcpListener, time::Duration};

use reqwest::{
    StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, LOCATION, RETRY_AFTER, SET_COOKIE},
    redirect::Policy,
};
use serde_json::{Value, json};
use support::{
    Relay, Simulate,
    browser::{Browser, Look},
    eventually,
    sql::{Kind, Sql},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";
const TOKEN: &str = "a-token-that-nobody-guesses";

/// What must never run, wherever a stranger writes it.
const ATTACK: &str = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>'\"&";

on_both_databases!("multi_thread":
    pages_show_what_is_archived,
    pages_go_on_where_the_last_one_ended,
    rows_of_the_outbox_are_written_and_changed,
    programs_read_what_pages_show,
    programs_queue_messages_and_change_rows,
);

// ------------------------------------------------------------------------------------------------ support

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// A relay with an admin page.
struct Scene {
    relay: Relay,
    simulator: Simulate,
    base: String,
    http: reqwest::Client,
}

struct Answer {
    status: StatusCode,
    headers: reqwest::header::HeaderMap,
    text: String,
}

impl Answer {
    fn location(&self) -> &str {
        self.headers.get(LOCATION).expect("it leads elsewhere").to_str().expect("an address")
    }
}

impl Scene {
    async fn new(kind: Kind, admin: &str) -> Self {
        let simulator = Simulate::start(&["--accounts", "2"]);
        let port = free_port();
        let more = format!("[admin]\nlisten = \"127.0.0.1:{port}\"\n{admin}");
        let mut relay = Relay::configure_on(kind, &simulator, &more).await;
        std::fs::write(relay.folder.path().join("token"), format!("{TOKEN}\n")).expect("written");
        relay.add_account(ALICE, "simulated");
        relay.start();
        relay.account_state(ALICE, "online").await;
        let http = reqwest::Client::builder().redirect(Policy::none()).build().expect("a client");
        let scene = Self { relay, simulator, base: format!("http://127.0.0.1:{port}"), http };
        eventually("the listener answers", async || {
            scene.http.get(format!("{}/healthz", scene.base)).send().await.ok()
        })
        .await;
        scene
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let answer = request.send().await.expect("the page answers");
        let (status, headers) = (answer.status(), answer.headers().clone());
        Answer { status, headers, text: answer.text().await.expect("in full") }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(self.http.get(format!("{}{path}", self.base))).await
    }

    /// A page that has to be there.
    async fn page(&self, path: &str) -> String {
        let answer = self.get(path).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        answer.text
    }

    async fn post(&self, path: &str, form: &[(&str, &str)]) -> Answer {
        self.send(self.http.post(format!("{}{path}", self.base)).form(form)).await
    }

    async fn csrf(&self) -> String {
        hidden(&self.page("/outbox/new").await, "csrf")
    }
}

/// The value of a hidden field.
fn hidden(page: &str, name: &str) -> String {
    let (_, rest) = page.split_once(&format!("name=\"{name}\" value=\"")).expect("the field is there");
    rest.split('"').next().expect("a value").to_owned()
}

/// The words of a page, without its markup.
fn words(page: &str) -> String {
    const MARKUP: [(&str, &str); 5] =
        [("&#39;", "'"), ("&#60;", "<"), ("&#62;", ">"), ("&#34;", "\""), ("&#38;", "&")];
    let mut text = String::new();
    let mut rest = page;
    while let Some((before, tag)) = rest.split_once('<') {
        text.push_str(before);
        rest = tag.split_once('>').map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    for (escaped, plain) in MARKUP {
        text = text.replace(escaped, plain);
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A conversation as the archive would have it, with people who come and go. Gives its id.
async fn conversation(sql: &mut Sql, subject: &str, name: &str) -> String {
    sql.run(&format!(
        "INSERT INTO conversations (account_id, subject, direction, state, multiparty, started_at, ended_at)
         SELECT id, {}, 'incoming', 'Disconnected', '1', '2026-03-01T10:00:00.000Z', '2026-03-02T11:00:00.000Z'
           FROM accounts WHERE sip_uri = '{ALICE}'",
        quoted(subject)
    ))
    .await
    .expect("a conversation");
    let id = sql.rows("SELECT max(id) FROM conversations").await.remove(0);
    for (uri, who, joined, left) in [
        ("sip:carol@fabrikam.example", name, "10:00:01", "'2026-03-02T10:30:00.000Z'"),
        ("sip:dave@fabrikam.example", "Dave Fisher", "10:05:00", "NULL"),
    ] {
        sql.run(&format!(
            "INSERT INTO participants (account_id, conversation_id, sip_uri, display_name, is_local, joined_at, left_at)
             SELECT account_id, id, '{uri}', {}, '0', '2026-03-01T{joined}.000Z', {left}
               FROM conversations WHERE id = {id}",
            quoted(who)
        ))
        .await
        .expect("a participant");
    }
    id
}

/// A message of a conversation. Gives its id.
async fn message(
    sql: &mut Sql,
    conversation: &str,
    at: &str,
    from: Option<&str>,
    body: &str,
    html: Option<&str>,
) -> String {
    let (direction, uri, name) = match from {
        Some(name) => ("incoming", "sip:carol@fabrikam.example", name),
        None => ("outgoing", ALICE, "User 0001"),
    };
    sql.run(&format!(
        "INSERT INTO messages (account_id, conversation_id, direction, sender_uri, sender_name, body, body_html, sent_at,
                               archived_at, status, source)
         SELECT account_id, id, '{direction}', '{uri}', {}, {}, {}, '{at}', '{at}', 'delivered', 'event'
           FROM conversations WHERE id = {conversation}",
        quoted(name),
        quoted(body),
        html.map_or("NULL".to_owned(), quoted),
    ))
    .await
    .expect("a message");
    sql.index_texts().await;
    sql.rows("SELECT max(id) FROM messages").await.remove(0)
}

async fn accesses(sql: &mut Sql) -> Vec<String> {
    sql.rows("SELECT action, account, query FROM access_log ORDER BY id").await
}

// ------------------------------------------------------------------------------------------------ what it shows

async fn pages_show_what_is_archived(kind: Kind) {
    let mut scene = Scene::new(kind, "").await;
    let mut sql = scene.relay.connect().await;
    let talk = conversation(&mut sql, &format!("Subject {ATTACK}"), &format!("Carol {ATTACK}")).await;
    let plain = message(
        &mut sql,
        &talk,
        "2026-03-01T10:01:00.000Z",
        Some("Carol"),
        &format!("The budget {ATTACK}"),
        None,
    )
    .await;
    let html = "<b>Bold budget</b><img src=\"https://evil.example/x.png\"><script>window.pwned=1</script>";
    message(&mut sql, &talk, "2026-03-02T10:02:00.000Z", None, "Bold budget", Some(html)).await;
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body) VALUES ('nobody@contoso.example', 'sip:x@y.example', {})",
        quoted(ATTACK)
    ))
    .await
    .expect("a row that is refused");
    eventually("the row is refused", async || {
        (sql.count("outbox WHERE state = 'failed'").await == 1).then_some(())
    })
    .await;

    let overview = scene.page("/").await;
    let said = words(&overview);
    assert!(said.contains("Worth a look") && said.contains("1 ● online"), "{said}");
    assert!(said.contains("Last hour") && overview.contains("<svg class=\"flow\""), "{overview}");
    assert!(said.contains("of nobody@contoso.example"), "{said}");

    let accounts = scene.page("/accounts?q=USER0001&state=online").await;
    assert!(words(&accounts).contains(ALICE), "{accounts}");
    assert!(words(&scene.page("/accounts?q=nobody").await).contains("No account fits"));
    assert!(words(&scene.page("/accounts?state=stalled").await).contains("No account fits"));
    let account = scene.page(&format!("/accounts/{ALICE}?days=1")).await;
    assert!(
        account.contains("class=\"followed\"") && account.contains("In the last day: followed for"),
        "{account}"
    );

    assert_eq!(accesses(&mut sql).await, Vec::<String>::new());
    let list = scene.page("/conversations?with=carol@fabrikam.example").await;
    assert!(words(&list).contains("carol@fabrikam.example, dave@fabrikam.example"), "{list}");
    assert!(
        words(&scene.page("/conversations?with=erin@fabrikam.example").await)
            .contains("No conversation fits")
    );
    let transcript = scene.page(&format!("/conversations/{talk}")).await;
    let said = words(&transcript);
    for piece in [
        "2026-03-01",
        &format!("Carol {ATTACK} joined"),
        &format!("The budget {ATTACK}"),
        "Dave Fisher joined",
        "2026-03-02",
        "Bold budget",
        "left",
    ] {
        assert!(said.contains(piece), "{piece} in {said}");
    }
    assert!(
        transcript.contains("<b>Bold budget</b>") && !transcript.contains("evil.example"),
        "{transcript}"
    );
    assert!(!transcript.contains("<script>window") && !transcript.contains("<img src=x"), "{transcript}");

    let found = scene.page("/search?q=budg+%22the+budget%22").await;
    assert!(found.contains("<mark>The budget</mark>") && !found.contains("Bold"), "{found}");
    assert!(found.contains(&format!("/conversations/{talk}?at={plain}#m{plain}")), "{found}");
    assert!(scene.page("/search?q=budget").await.contains("Bold <mark>budget</mark>"));
    assert!(words(&scene.page("/search?q=nothing").await).contains("No message fits"));
    let mistake = words(&scene.page("/search?q=form:bob").await);
    assert!(mistake.contains("at character 1") && mistake.contains("from:"), "{mistake}");
    assert!(scene.page("/search?q=budget+-bold").await.contains("<mark>budget</mark>"));
    assert!(!scene.page("/search?q=budget+-bold").await.contains("Bold"));
    let attack = scene.page("/search?q=%3Cscript%3Ealert").await;
    assert!(!attack.contains("<script>alert") && attack.contains("&#60;script&#62;alert"), "{attack}");

    let row = sql.rows("SELECT max(id) FROM outbox").await.remove(0);
    assert!(!scene.page("/outbox?state=failed").await.contains("pwned"), "a list shows no text");
    assert!(words(&scene.page(&format!("/outbox/{row}")).await).contains(ATTACK));

    let alice = ALICE;
    assert_eq!(
        accesses(&mut sql).await,
        [
            "conversations||with=sip:carol@fabrikam.example".to_owned(),
            "conversations||with=sip:erin@fabrikam.example".to_owned(),
            format!("conversation|{alice}|conversation={talk}"),
            "search||q=budg \"the budget\"".to_owned(),
            "search||q=budget".to_owned(),
            "search||q=nothing".to_owned(),
            "search||q=budget -bold".to_owned(),
            "search||q=budget -bold".to_owned(),
            "search||q=<script>alert".to_owned(),
            format!("outbox show|sip:nobody@contoso.example|id={row}"),
        ]
    );
    let actors = sql.rows("SELECT DISTINCT actor FROM access_log").await;
    assert_eq!(actors.len(), 1);
    assert!(actors[0].starts_with("admin page (") && actors[0].ends_with(", 127.0.0.1)"), "{actors:?}");

    what_can_not_be_shown_is_said(&scene, &mut sql, &talk).await;
    assert!(scene.relay.server().terminate());
}

/// What another site puts into its own page is not read here, so that nobody stands in `access_log` for it.
async fn other_sites_read_nothing_in_somebodys_name(scene: &Scene, sql: &mut Sql, talk: &str) {
    let before = accesses(sql).await;
    for path in [format!("/conversations/{talk}"), format!("/api/v1/conversations/{talk}/messages")] {
        let picture = scene
            .http
            .get(format!("{}{path}", scene.base))
            .header("sec-fetch-site", "cross-site")
            .header("sec-fetch-mode", "no-cors")
            .header("sec-fetch-dest", "image");
        let refused = scene.send(picture).await;
        assert_eq!(refused.status, 403, "{}", refused.text);
    }
    assert_eq!(accesses(sql).await, before);
}

/// Without a note of who reads, without a part of the database, and where there is nothing.
async fn what_can_not_be_shown_is_said(scene: &Scene, sql: &mut Sql, talk: &str) {
    other_sites_read_nothing_in_somebodys_name(scene, sql, talk).await;
    // Who can't be noted sees nothing.
    sql.run("ALTER TABLE access_log RENAME TO gone").await.expect("renamed");
    let refused = scene.get(&format!("/conversations/{talk}")).await;
    assert_eq!(refused.status, 503);
    assert!(!refused.text.contains("budget"), "{}", refused.text);
    sql.run("ALTER TABLE gone RENAME TO access_log").await.expect("renamed");

    // What can't be known is said, and what is known is shown.
    sql.run("ALTER TABLE event_quarantine RENAME TO gone").await.expect("renamed");
    eventually("the overview says that the database has trouble", async || {
        let said = words(&scene.page("/").await);
        let trouble = said.contains("the database does not answer") && said.contains("1 ● online");
        trouble.then_some(())
    })
    .await;
    sql.run("ALTER TABLE gone RENAME TO event_quarantine").await.expect("renamed");

    for (path, status) in [
        ("/conversations/999999", 404),
        ("/conversations/x", 404),
        ("/conversations/1?before=x", 400),
        ("/conversations?account=nonsense", 400),
        ("/accounts/nonsense", 404),
        ("/accounts/sip:stranger@contoso.example", 404),
        ("/accounts?state=x", 400),
        ("/outbox/999999", 404),
        ("/outbox?state=x", 400),
        ("/outbox?before=9999999999999999999999", 400),
        ("/nothing", 404),
    ] {
        let answer = scene.get(path).await;
        assert_eq!(answer.status.as_u16(), status, "{path}");
        assert_eq!(
            answer.headers.get(CACHE_CONTROL).map(reqwest::header::HeaderValue::as_bytes),
            Some(&b"no-store"[..]),
            "{path}"
        );
    }
}

async fn pages_go_on_where_the_last_one_ended(kind: Kind) {
    let mut scene = Scene::new(kind, "").await;
    let mut sql = scene.relay.connect().await;
    let talk = conversation(&mut sql, "Long", "Carol").await;
    // Two of each second: the time alone does not tell them apart.
    for number in 0..230 {
        let at = format!("2026-03-01T12:{:02}:{:02}.000Z", number / 2 / 60, number / 2 % 60);
        message(&mut sql, &talk, &at, Some("Carol"), &format!("word{number:03}"), None).await;
    }
    for number in 0..60 {
        conversation(&mut sql, &format!("Other{number:02}"), "Erin").await;
        sql.run(&format!(
            "INSERT INTO outbox (account, body, state) VALUES ('{ALICE}', 'x{number}', 'held')"
        ))
        .await
        .expect("a row");
        sql.run(&format!(
            "INSERT INTO accounts (sip_uri, username, enabled) VALUES ('sip:many{number:02}@contoso.example', 'x', '0')"
        ))
        .await
        .expect("an account");
    }
    // What every page of a kind shows, page after page.
    let walk = async |from: String, next: &str, what: &str, length: usize| {
        let mut seen = Vec::new();
        let mut path = Some(from);
        while let Some(page) = path {
            let page = scene.page(&page).await;
            seen.push(
                page.match_indices(what).map(|(at, _)| page[at..at + length].to_owned()).collect::<Vec<_>>(),
            );
            path = page.split_once(&format!("rel=\"{next}\"")).map(|(before, _)| {
                let (_, link) = before.rsplit_once("href=\"").expect("a link");
                link.split('"').next().expect("an address").replace("&#38;", "&")
            });
        }
        seen
    };
    let counts = |pages: &[Vec<String>]| pages.iter().map(Vec::len).collect::<Vec<_>>();
    let all =
        |range: std::ops::Range<usize>| range.map(|number| format!("word{number:03}")).collect::<Vec<_>>();

    let back = walk(format!("/conversations/{talk}"), "prev", "word", 7).await;
    assert_eq!(counts(&back), [100, 100, 30]);
    assert_eq!(back.iter().rev().flatten().cloned().collect::<Vec<_>>(), all(0..230));
    let ids = sql.rows("SELECT id FROM messages ORDER BY id").await;
    let forth = walk(format!("/conversations/{talk}?at={}", ids[20]), "next", "word", 7).await;
    assert_eq!(forth.concat(), all(5..230));
    let first = walk(format!("/conversations/{talk}?at={}", ids[0]), "next", "word", 7).await;
    assert_eq!(first.concat(), all(0..230));

    let found =
        walk("/search?q=word&account=user0001@contoso.example".to_owned(), "next", "<mark>word</mark>", 20)
            .await;
    assert_eq!(counts(&found), [50, 50, 50, 50, 30]);
    assert_eq!(found[0][0], "<mark>word</mark>229");
    assert_eq!(found[4][29], "<mark>word</mark>000");

    let talks = walk(format!("/conversations?account={ALICE}"), "next", "Other", 7).await;
    assert_eq!(counts(&talks), [50, 10]);
    let rows = walk(format!("/outbox?state=held&account={ALICE}"), "next", "id=\"row-", 8).await;
    assert_eq!(counts(&rows), [50, 10]);
    let accounts = walk("/accounts?q=MANY".to_owned(), "next", "<th scope=\"row\">", 15).await;
    assert_eq!(counts(&accounts), [50, 10]);
    assert!(scene.relay.server().terminate());
}

// ------------------------------------------------------------------------------------------------ what it does

async fn rows_of_the_outbox_are_written_and_changed(kind: Kind) {
    let mut scene = Scene::new(kind, "").await;
    let mut sql = scene.relay.connect().await;
    let csrf = scene.csrf().await;
    let form = |account, to, body, key| {
        [("csrf", csrf.as_str()), ("account", account), ("recipients", to), ("body", body), ("key", key)]
    };
    for (account, to, body, problem) in [
        ("nonsense", "sip:friend@fabrikam.example", "x", "is not a SIP address"),
        ("sip:stranger@contoso.example", "sip:friend@fabrikam.example", "x", "There is no account"),
        (ALICE, "", "x", "at least one SIP address"),
        (ALICE, "sip:friend@fabrikam.example; nonsense", "x", "recipients:"),
        (ALICE, "sip:friend@fabrikam.example", " ", "an empty message"),
    ] {
        let answer = scene.post("/outbox", &form(account, to, body, "k")).await;
        assert_eq!(answer.status, 422, "{problem}");
        assert!(answer.text.contains(problem) && answer.text.contains("aria-invalid"), "{}", answer.text);
        assert_eq!(hidden(&answer.text, "key"), "k");
    }
    assert_eq!(sql.count("outbox").await, 0);

    let good = form(ALICE, "sip:friend@fabrikam.example", "one\r\ntwo", "key-1");
    let queued = scene.post("/outbox", &good).await;
    assert_eq!(queued.status, 303, "{}", queued.text);
    let row = queued.location().trim_start_matches("/outbox/").split('?').next().expect("an id").to_owned();
    assert!(scene.page(queued.location()).await.contains("The message is queued."));
    let again = scene.post("/outbox", &good).await;
    assert_eq!(again.status, 422);
    assert!(again.text.contains("was queued already"), "{}", again.text);
    eventually("the message is delivered", async || {
        let page = scene.page(&format!("/outbox/{row}")).await;
        words(&page).contains("delivered").then_some(())
    })
    .await;
    assert_eq!(sql.rows(&format!("SELECT body FROM outbox WHERE id = {row}")).await, ["one\ntwo"]);

    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body, state) VALUES ('{ALICE}', 'sip:friend@fabrikam.example', 'held', 'held')"
    ))
    .await
    .expect("a row");
    let held = sql.rows("SELECT max(id) FROM outbox").await.remove(0);
    let state = async |sql: &mut Sql| {
        sql.rows(&format!("SELECT state FROM outbox WHERE id = {held}")).await.remove(0)
    };
    let change = async |word: &str, back: &str| {
        scene.post(&format!("/outbox/{held}/{word}"), &[("csrf", csrf.as_str()), ("back", back)]).await
    };
    // A state that the row is not in, a change that is none, and a way back that is not ours.
    assert_eq!(change("retry", "").await.status, 409);
    assert_eq!(change("hold", "").await.status, 409);
    assert_eq!(change("delete", "").await.status, 404);
    assert_eq!(state(&mut sql).await, "held");
    let cancelled = change("cancel", "https://evil.example/").await;
    assert_eq!(
        (cancelled.status.as_u16(), cancelled.location()),
        (303, &*format!("/outbox/{held}?done=cancel"))
    );
    assert_eq!(state(&mut sql).await, "cancelled");
    let late = change("cancel", "").await;
    assert!(late.status == 409 && late.text.contains("is cancelled now"), "{}", late.text);
    sql.run("INSERT INTO outbox (account, recipients, body) VALUES ('stranger@contoso.example', 'sip:x@y.example', 'x')")
    .await
    .expect("a row");
    let failed = sql.rows("SELECT max(id) FROM outbox").await.remove(0);
    eventually("the row is refused", async || {
        (sql.count("outbox WHERE state = 'failed'").await == 1).then_some(())
    })
    .await;
    sql.run(&format!("UPDATE outbox SET account = '{ALICE}', recipients = 'sip:friend@fabrikam.example' WHERE id = {failed}"))
        .await
        .expect("corrected");
    let back = "/outbox?state=failed";
    let retried =
        scene.post(&format!("/outbox/{failed}/retry"), &[("csrf", csrf.as_str()), ("back", back)]).await;
    assert_eq!(retried.location(), "/outbox?state=failed&done=retry");
    eventually("the corrected row is delivered", async || {
        (sql.count(&format!("outbox WHERE id = {failed} AND state = 'delivered'")).await == 1).then_some(())
    })
    .await;

    a_row_that_waits_is_held_and_released(&scene, &mut sql, &csrf).await;
    forged_forms_do_nothing(&scene, &mut sql, &csrf).await;
    assert!(scene.relay.server().terminate());
}

/// By the forms that the row's own page shows, one after the other, until it is sent.
async fn a_row_that_waits_is_held_and_released(scene: &Scene, sql: &mut Sql, csrf: &str) {
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body, send_after)
         VALUES ('{ALICE}', 'sip:friend@fabrikam.example', 'later', '2099-01-01T00:00:00Z')"
    ))
    .await
    .expect("a row");
    let row = sql.rows("SELECT max(id) FROM outbox").await.remove(0);
    for (word, state, says) in [("hold", "held", "is held until"), ("release", "queued", "is queued again")] {
        let action = format!("/outbox/{row}/{word}");
        let page = scene.page(&format!("/outbox/{row}")).await;
        assert!(page.contains(&format!("action=\"{action}\"")), "{word} in {page}");
        let done = scene.post(&action, &[("csrf", csrf), ("back", &format!("/outbox/{row}"))]).await;
        assert_eq!((done.status.as_u16(), done.location()), (303, &*format!("/outbox/{row}?done={word}")));
        assert_eq!(sql.rows(&format!("SELECT state FROM outbox WHERE id = {row}")).await, [state]);
        assert!(words(&scene.page(done.location()).await).contains(says), "{word}");
    }
    sql.run(&format!("UPDATE outbox SET send_after = '2020-01-01T00:00:00Z' WHERE id = {row}"))
        .await
        .expect("brought forward");
    eventually("what was released is delivered", async || {
        (sql.count(&format!("outbox WHERE id = {row} AND state = 'delivered'")).await == 1).then_some(())
    })
    .await;
}

/// What another site makes a browser send.
async fn forged_forms_do_nothing(scene: &Scene, sql: &mut Sql, csrf: &str) {
    let post = |path: &str| scene.http.post(format!("{}{path}", scene.base));
    let bodies = [("csrf", csrf), ("account", ALICE), ("recipients", "sip:x@y.example"), ("body", "forged")];
    for forged in [
        post("/outbox").form(&bodies[1..]),
        post("/outbox").form(&[("csrf", "0000")]),
        post("/outbox").form(&bodies).header("origin", "https://evil.example"),
        post("/outbox").form(&bodies).header("origin", "null"),
        post("/outbox").form(&bodies).header("sec-fetch-site", "cross-site"),
    ] {
        assert_eq!(scene.send(forged).await.status, 403);
    }
    let foreign = scene.send(post("/outbox").form(&bodies).header("host", "evil.example")).await;
    assert_eq!(foreign.status, 421);
    assert_eq!(sql.count("outbox WHERE body = 'forged'").await, 0);
    for path in ["/", "/search", "/outbox/1/cancel"] {
        let answer = scene.send(scene.http.delete(format!("{}{path}", scene.base))).await;
        assert!([403, 405].contains(&answer.status.as_u16()), "{path}: {}", answer.status);
    }
    assert_eq!(scene.get("/outbox/1/cancel").await.status, 405);
    // Last, since the connection ends with it.
    let long = "x".repeat(2 * 1024 * 1024);
    assert_eq!(scene.post("/outbox", &[("csrf", csrf), ("body", &long)]).await.status, 413);
}

// ------------------------------------------------------------------------------------------------ who is let in

#[tokio::test(flavor = "multi_thread")]
async fn with_a_token_people_sign_in_by_name() {
    let mut scene = Scene::new(Kind::Sqlite, "token_file = \"token\"\n").await;
    let mut sql = scene.relay.connect().await;
    let talk = conversation(&mut sql, "Secret", "Carol").await;
    let path = format!("/conversations/{talk}");

    let asked =
        scene.send(scene.http.get(format!("{}{path}", scene.base)).header("accept", "text/html")).await;
    assert_eq!(
        (asked.status.as_u16(), asked.location()),
        (303, &*format!("/sign-in?next=%2Fconversations%2F{talk}"))
    );
    assert_eq!(scene.get("/live").await.status, 401);
    assert_eq!(scene.post("/outbox", &[("body", "x")]).await.status, 401);
    assert!(scene.page(asked.location()).await.contains(&format!("value=\"{path}\"")));

    let sign_in = async |token: &str, name: &str, next: &str| {
        scene.post("/sign-in", &[("token", token), ("name", name), ("next", next)]).await
    };
    assert_eq!(sign_in(TOKEN, " ", &path).await.status, 422);
    let wrong = sign_in("another-token-of-that-length", "Ann", &path).await;
    assert_eq!(wrong.status, 401);
    assert!(wrong.text.contains("That is not the token") && !wrong.headers.contains_key(SET_COOKIE));
    let foreign = scene
        .send(
            scene
                .http
                .post(format!("{}/sign-in", scene.base))
                .header("origin", "https://evil.example")
                .form(&[("token", TOKEN), ("name", "Ann")]),
        )
        .await;
    assert_eq!(foreign.status, 403);
    let right = sign_in(TOKEN, "Ann <Admin>", "//evil.example").await;
    assert_eq!((right.status.as_u16(), right.location()), (303, "/"));
    let cookie = right.headers[SET_COOKIE].to_str().expect("a cookie").to_owned();
    for part in ["HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"] {
        assert!(cookie.contains(part), "{part} in {cookie}");
    }
    assert!(!cookie.contains(TOKEN));
    let cookie = cookie.split(';').next().expect("a pair").to_owned();
    let with = |request: reqwest::RequestBuilder| request.header("cookie", &cookie);
    let page = scene.send(with(scene.http.get(format!("{}{path}", scene.base)))).await;
    assert_eq!(page.status, 200);
    assert!(page.text.contains("Ann &#60;Admin&#62;"), "{}", page.text);
    let actor = sql.rows("SELECT actor FROM access_log").await;
    assert_eq!(actor, ["admin page (Ann <Admin>, 127.0.0.1)"]);

    // A cookie alone changes nothing, and ends with its session; so does what is followed live.
    assert_eq!(scene.send(with(scene.http.post(format!("{}/sign-out", scene.base)))).await.status, 403);
    let mut live =
        with(scene.http.get(format!("{}{path}/live", scene.base))).send().await.expect("an answer");
    assert_eq!(live.status(), 200);
    let csrf = hidden(&page.text, "csrf");
    let out =
        scene.send(with(scene.http.post(format!("{}/sign-out", scene.base)).form(&[("csrf", &csrf)]))).await;
    assert_eq!((out.status.as_u16(), out.location()), (303, "/sign-in"));
    let ended = tokio::time::timeout(Duration::from_secs(60), async {
        while live.chunk().await.expect("it ends in order").is_some() {}
    });
    ended.await.expect("the live page ends with its session");
    assert_eq!(scene.send(with(scene.http.get(format!("{}{path}", scene.base)))).await.status, 401);

    // Programs carry the token itself.
    let bearer = |token: &str| scene.http.get(format!("{}{path}", scene.base)).bearer_auth(token);
    assert_eq!(scene.send(bearer(TOKEN)).await.status, 200);
    assert_eq!(
        sql.rows("SELECT actor FROM access_log ORDER BY id DESC LIMIT 1").await,
        ["admin page (bearer token, 127.0.0.1)"]
    );

    // Who guesses has to wait, even with the right token then.
    for _ in 0..4 {
        assert_eq!(sign_in("another-token-of-that-length", "Ann", "/").await.status, 401);
    }
    let waits = sign_in(TOKEN, "Ann", "/").await;
    assert_eq!(waits.status, 429);
    assert!(waits.headers.contains_key(RETRY_AFTER));
    let server = scene.relay.server();
    assert!(server.terminate());
    assert!(!server.stderr().contains(TOKEN));
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_proxy_that_speaks_tls_the_cookie_is_for_tls_only() {
    let mut scene =
        Scene::new(Kind::Sqlite, "token_file = \"token\"\nnames = [\"relay.contoso.example\"]\n").await;
    // As a proxy passes on what a browser asks it over TLS.
    let proxied = |request: reqwest::RequestBuilder| {
        request
            .header("host", "relay.contoso.example")
            .header("x-forwarded-proto", "https")
            .header("accept", "text/html")
    };
    let form = [("token", TOKEN), ("name", "Ann")];
    let signed_in = proxied(scene.http.post(format!("{}/sign-in", scene.base)).form(&form))
        .header("origin", "https://relay.contoso.example");
    let signed_in = scene.send(signed_in).await;
    assert_eq!(signed_in.status, 303, "{}", signed_in.text);
    let cookie = signed_in.headers[SET_COOKIE].to_str().expect("a cookie").to_owned();
    assert!(cookie.starts_with("__Host-") && cookie.ends_with("; Secure"), "{cookie}");
    let pair = cookie.split(';').next().expect("a pair").to_owned();
    let page = proxied(scene.http.get(format!("{}/outbox", scene.base))).header("cookie", &pair);
    assert_eq!(scene.send(page).await.status, 200);
    // Over plain HTTP it is none: nobody who can only speak that puts one under its name.
    let plain = scene.http.get(format!("{}/outbox", scene.base)).header("cookie", &pair);
    assert_eq!(scene.send(plain).await.status, 401);
    assert!(scene.relay.server().terminate());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_and_says_nothing_leaves_room_for_others_and_is_let_go() {
    let mut scene = Scene::new(Kind::Sqlite, "token_file = \"token\"\n").await;
    let address = scene.base.trim_start_matches("http://").to_owned();
    let mut silent = Vec::new();
    for _ in 0..150 {
        silent.push(TcpStream::connect(&address).await.expect("the system takes it"));
    }
    // Another address of this machine, as if it were another machine.
    let elsewhere =
        reqwest::Client::builder().local_address("127.0.0.2".parse().ok()).build().expect("a client");
    let healthy = elsewhere.get(format!("{}/healthz", scene.base)).send().await.expect("it answers others");
    assert_eq!(healthy.status(), 200);

    // What is begun and not ended: the body of a form, by somebody whom nobody knows.
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.3:0".parse().expect("an address")).expect("another address");
    let mut slow = socket.connect(address.parse().expect("an address")).await.expect("it connects");
    let begun = "POST /sign-in HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\
                 content-type: application/x-www-form-urlencoded\r\n\r\ntoken=";
    slow.write_all(begun.as_bytes()).await.expect("sent");
    let mut answer = vec![0; 12];
    tokio::time::timeout(Duration::from_secs(120), slow.read_exact(&mut answer))
        .await
        .expect("it is not waited for without an end")
        .expect("an answer");
    assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 408");

    let all_closed = async {
        for connection in &mut silent {
            // Closed in order, or with a reset where it was never looked at.
            assert_eq!(connection.read(&mut [0]).await.unwrap_or(0), 0);
        }
    };
    tokio::time::timeout(Duration::from_secs(120), all_closed)
        .await
        .expect("nobody is kept who says nothing");
    eventually("there is room again", async || {
        scene.http.get(format!("{}/healthz", scene.base)).send().await.ok()
    })
    .await;
    let server = scene.relay.server();
    assert!(server.terminate());
    assert_eq!(server.stderr().matches("closes further").count(), 1, "it is said, once");
}

#[tokio::test(flavor = "multi_thread")]
async fn live_pages_are_bounded_and_hold_nothing_up() {
    let mut scene = Scene::new(Kind::Sqlite, "").await;
    let mut sql = scene.relay.connect().await;
    let live =
        async || scene.http.get(format!("{}/outbox/live", scene.base)).send().await.expect("an answer");
    let mut followed = Vec::new();
    for _ in 0..32 {
        let answer = live().await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        followed.push(answer);
    }
    assert_eq!(live().await.status(), 503);
    scene.page("/outbox").await;

    // What is followed is told, in one line of JSON; nobody else has to read for that.
    sql.run(&format!("INSERT INTO outbox (account, recipients, body, state) VALUES ('{ALICE}', 'sip:x@y.example', 'x', 'held')"))
        .await
        .expect("a row");
    let mut told = String::new();
    while !told.contains("x@y.example") {
        let piece = followed[0].chunk().await.expect("it goes on").expect("it has no end");
        told.push_str(std::str::from_utf8(&piece).expect("in UTF-8"));
    }
    assert!(told.contains("event: page\ndata: \""), "{told}");

    followed.truncate(31);
    eventually("who went away made room", async || (live().await.status() == 200).then_some(())).await;
    assert!(scene.relay.server().terminate(), "those who follow do not hold up the end");
}

// ------------------------------------------------------------------------------------------------ in a browser

/// Pages with everything on them, for pictures and for attacks.
async fn furnish(scene: &Scene, sql: &mut Sql) -> String {
    let talk = conversation(sql, &format!("Subject {ATTACK}"), &format!("Carol {ATTACK}")).await;
    for (at, from, body) in [
        (
            "2026-03-01T10:01:00.000Z",
            Some("Carol Danvers"),
            "Good morning! Did the quarterly budget go out yesterday?",
        ),
        ("2026-03-01T10:01:20.000Z", Some("Carol Danvers"), "Finance asked me twice now."),
        (
            "2026-03-01T10:02:10.000Z",
            None,
            "It did, at six. I'll send you the figures with the comments of the board.",
        ),
        ("2026-03-01T10:06:00.000Z", Some("Dave Fisher"), "השרת חזר לפעול. נדבר על התקציב 😀"),
        ("2026-03-02T10:01:00.000Z", Some(ATTACK), ATTACK),
    ] {
        message(sql, &talk, at, from, body, None).await;
    }
    let html = format!(
        "<p>The <b>budget</b> in short:</p><ul><li>travel: <i>less</i></li><li>people: more</li></ul>\
         <a href=\"javascript:window.pwned=1\">click</a>{ATTACK}<style>body{{display:none}}</style>"
    );
    message(sql, &talk, "2026-03-02T10:02:00.000Z", None, "The budget in short", Some(&html)).await;
    for (hours, kind) in [(30, "'1'"), (55, "'0'")] {
        sql.run(&format!(
            "INSERT INTO gaps (account_id, session_id, from_at, to_at, reason, backfilled, recorded_at)
             SELECT account_id, id, '{}', '{}', 'the server was not reached', {kind}, '{}'
               FROM sessions ORDER BY id LIMIT 1",
            hours_ago(hours),
            hours_ago(hours - 7),
            hours_ago(0)
        ))
        .await
        .expect("a gap");
    }
    sql.run(&format!("UPDATE sessions SET started_at = '{}'", hours_ago(100)))
        .await
        .expect("an older session");
    let other = conversation(sql, "In passing", "Carol Danvers").await;
    for minutes in 0..50 {
        for count in 0..(minutes * 7 % 5) {
            let from = (count % 3 > 0).then_some("Carol Danvers");
            message(sql, &other, &minutes_ago(minutes), from, "A word in passing", None).await;
        }
    }
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, subject, body) VALUES ('stranger@contoso.example', 'sip:x@y.example', {0}, {0})",
        quoted(ATTACK)
    ))
    .await
    .expect("a row");
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body, state)
         VALUES ('{ALICE}', 'sip:friend@fabrikam.example', 'It can wait.', 'held')"
    ))
    .await
    .expect("a row");
    eventually("the row is refused", async || {
        (sql.count("outbox WHERE state = 'failed'").await == 1).then_some(())
    })
    .await;
    scene.relay.add_account(BOB, "wrong");
    scene.relay.account_state(BOB, "needs_attention").await;
    talk
}

fn minutes_ago(minutes: i64) -> String {
    let at = jiff::Timestamp::now() - jiff::SignedDuration::from_mins(minutes);
    format!("{at:.3}")
}

fn hours_ago(hours: i64) -> String {
    minutes_ago(60 * hours)
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_browser_every_page_reads_well_and_runs_nothing_strange() {
    let mut scene = Scene::new(Kind::Sqlite, "").await;
    let mut sql = scene.relay.connect().await;
    let talk = furnish(&scene, &mut sql).await;
    let row = sql.rows("SELECT id FROM outbox WHERE state = 'failed'").await.remove(0);
    let browser = Browser::start().await;
    let pages = [
        ("overview", "/".to_owned(), "Something is wrong"),
        ("accounts", "/accounts".to_owned(), BOB),
        ("account", format!("/accounts/{ALICE}"), "gap, backfilled"),
        ("conversations", "/conversations".to_owned(), "carol@fabrikam.example"),
        ("transcript", format!("/conversations/{talk}"), "Dave Fisher joined"),
        ("search", "/search?q=budget".to_owned(), "quarterly budget"),
        ("outbox", "/outbox".to_owned(), "held"),
        ("outbox-row", format!("/outbox/{row}"), "There is no"),
        ("compose", format!("/outbox/new?account={ALICE}"), "Queue it"),
        ("not-found", "/nothing".to_owned(), "Not found"),
    ];
    for (name, path, says) in pages {
        let url = format!("{}{path}", scene.base);
        browser.scripts(false).await;
        browser.open(&url).await;
        let words = browser.text().await;
        assert!(words.to_lowercase().contains(&says.to_lowercase()), "{name} without scripts: {words}");
        browser.scripts(true).await;
        for (look, suffix) in [
            (Look::Light, ""),
            (Look::Dark, "-dark"),
            (Look::Tablet, "-tablet"),
            (Look::Phone, "-phone"),
            (Look::DarkPhone, "-phone-dark"),
        ] {
            browser.look(look).await;
            browser.open(&url).await;
            browser.photograph(&format!("{name}{suffix}")).await;
            assert_eq!(browser.witnessed().await, Vec::<String>::new(), "{name}{suffix}");
            assert!(browser.ask("window.pwned").await.is_null(), "{name}{suffix} ran what a stranger wrote");
            let overflow = browser
                .ask(
                    "Math.max(...[document.documentElement, ...document.querySelectorAll('.card')]
                         .map((box) => box.scrollWidth - box.clientWidth))",
                )
                .await;
            assert_eq!(overflow, 0, "{name}{suffix} is wider than its place");
            let barriers = browser.barriers().await;
            assert!(barriers.is_empty(), "{name}{suffix}: {barriers:#?}");
        }
        browser.look(Look::Light).await;
    }
    // Those who look for barriers and broken rules find them where there are some.
    browser
        .ask(
            "new Promise((seen) => {
                 document.addEventListener('securitypolicyviolation', () => setTimeout(seen));
                 document.body.append(Object.assign(new Image(), { src: 'https://evil.example/x.png' }));
             })",
        )
        .await;
    assert!(browser.witnessed().await.iter().any(|seen| seen.starts_with("policy: img-src")));
    assert!(browser.barriers().await.iter().any(|found| found.starts_with("image-alt")));
    // The attack is there to be read.
    browser.open(&format!("{}/conversations/{talk}?at={}", scene.base, attack_message(&mut sql).await)).await;
    assert!(browser.text().await.contains(ATTACK));
    assert!(browser.ask("window.pwned").await.is_null());
    drop(browser);
    assert!(scene.relay.server().terminate());
}

async fn attack_message(sql: &mut Sql) -> String {
    sql.rows(&format!("SELECT id FROM messages WHERE body = {}", quoted(ATTACK))).await.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_browser_pages_follow_what_happens_and_forms_work() {
    let mut scene = Scene::new(Kind::Sqlite, "token_file = \"token\"\n").await;
    let mut sql = scene.relay.connect().await;
    let browser = Browser::start().await;
    let base = scene.base.clone();

    browser.open(&format!("{base}/outbox")).await;
    browser.says("Your name").await;
    browser.photograph("sign-in").await;
    assert_eq!(browser.barriers().await, Vec::<String>::new());
    browser.fill("#name", "Ann").await;
    browser.fill("#token", "not the right one at all").await;
    browser.click("main button").await;
    browser.says("That is not the token").await;
    browser.fill("#token", TOKEN).await;
    browser.click("main button").await;
    browser.says("Nothing was ever put into the outbox").await;
    assert_eq!(browser.url().await, format!("{base}/outbox"));

    // A row that another program queues appears, and its button works, without the page being loaded again.
    browser.says("Live").await;
    browser.ask("window.same = true").await;
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body, state) VALUES ('{ALICE}', 'sip:friend@fabrikam.example', 'x', 'held')"
    ))
    .await
    .expect("a row");
    browser.says("friend@fabrikam.example").await;
    assert_eq!(browser.ask("window.same").await, true);
    browser.click("button[id^=release-]").await;
    browser.says("The message is queued again").await;
    browser.says("delivered").await;

    // A message written here; then the other side answers, and the transcript shows it.
    browser.open(&format!("{base}/outbox/new?account={ALICE}")).await;
    browser.fill("#recipients", "nonsense").await;
    browser.fill("#body", "Hello from the page").await;
    browser.click("main button").await;
    browser.says("recipients:").await;
    browser.photograph("compose-problem").await;
    assert_eq!(browser.barriers().await, Vec::<String>::new());
    browser.fill("#recipients", "sip:friend@fabrikam.example").await;
    browser.click("main button").await;
    browser.says("delivered").await;

    let call = scene.simulator.call("silent.dana@fabrikam.example", ALICE, "first words").await;
    let id = eventually("the call is archived", async || {
        sql.rows("SELECT conversation_id FROM messages WHERE body = 'first words'").await.pop()
    })
    .await;
    browser.open(&format!("{base}/conversations/{id}")).await;
    browser.says("first words").await;
    browser.says("Live").await;
    browser.ask("window.same = true").await;
    scene.simulator.say(&call, "and more words").await;
    browser.says("and more words").await;
    assert_eq!(browser.ask("window.same").await, true);
    let noted = sql
        .rows(&format!("SELECT query FROM access_log WHERE query LIKE 'conversation={id}%' ORDER BY id"))
        .await;
    assert_eq!(noted[0], format!("conversation={id}"));
    assert!(
        noted.len() >= 2 && noted[1..].iter().all(|query| *query == format!("conversation={id} live")),
        "{noted:?}"
    );

    // Paused, it stands still; followed again, it catches up.
    browser.click(".live-bar button").await;
    browser.says("Paused").await;
    scene.simulator.say(&call, "while it paused").await;
    eventually("it is archived", async || {
        (sql.count("messages WHERE body = 'while it paused'").await == 1).then_some(())
    })
    .await;
    assert!(!browser.text().await.contains("while it paused"));
    browser.click(".live-bar button").await;
    browser.says("while it paused").await;
    assert_eq!(browser.witnessed().await, Vec::<String>::new());

    // The end of the server is told; live pages do not hold it up.
    assert!(scene.relay.server().terminate());
    browser.says("Not up to date").await;
}

/// What has the focus, in words, and whether it can be seen that it has.
const FOCUSED: &str = "(() => {
    const here = document.activeElement;
    const style = getComputedStyle(here);
    const box = here.getBoundingClientRect();
    const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 && box.width > 0 && box.height > 0
        && box.top >= parseFloat(style.outlineWidth) && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth;
    const name = here === document.body ? '' : here.id || here.getAttribute('aria-label') || here.innerText.trim()
        || here.getAttribute('href') || here.tagName;
    return [name, seen];
})()";

/// Goes through the page with the key Tab from its beginning: what gets the focus, in this order, until it comes to its end.
/// Whoever looks sees each time where they are.
async fn tabbed(browser: &Browser) -> Vec<String> {
    let mut names = Vec::new();
    while names.len() < 100 {
        browser.press("Tab").await;
        let focused = browser.ask(FOCUSED).await;
        let name = focused[0].as_str().expect("a name").to_owned();
        if name.is_empty() || (names.len() > 1 && names[0] == name) {
            return names;
        }
        assert_eq!(focused[1], true, "{name} has the focus and does not show it");
        names.push(name);
    }
    panic!("the key Tab leads round and round: {names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_browser_the_keyboard_is_enough() {
    let mut scene = Scene::new(Kind::Sqlite, "token_file = \"token\"\n").await;
    let mut sql = scene.relay.connect().await;
    let browser = Browser::start().await;
    let base = scene.base.clone();

    // In: name, token, Enter.
    browser.open(&format!("{base}/outbox")).await;
    browser.says("Your name").await;
    let door = tabbed(&browser).await;
    let of_door: Vec<&str> = door.iter().map(String::as_str).filter(|name| *name != "ucwa-relay").collect();
    assert_eq!(of_door, ["To the content", "name", "token", "Sign in"]);
    browser.ask("document.querySelector('#name').focus()").await;
    browser.types("Ann").await;
    browser.press("Tab").await;
    browser.types(TOKEN).await;
    browser.press("Enter").await;
    browser.says("Nothing was ever put into the outbox").await;

    // The order of what is read, the skip link first; it leads past the navigation.
    browser.open(&format!("{base}/outbox")).await;
    browser.says("Live").await;
    let order = tabbed(&browser).await;
    let top = [
        "To the content",
        "ucwa-relay",
        "Overview",
        "Accounts",
        "Conversations",
        "Search",
        "Outbox",
        "Sign out",
    ];
    assert_eq!(order[..top.len()], top, "{order:?}");
    browser.open(&format!("{base}/outbox")).await;
    browser.says("Live").await;
    browser.press("Tab").await;
    assert_eq!(browser.ask(FOCUSED).await, json!(["To the content", true]));
    browser.photograph("keyboard-skip").await;
    browser.press("Enter").await;
    assert_eq!(browser.ask("document.activeElement.id").await, "main");
    browser.press("Tab").await;
    let first = browser.ask(FOCUSED).await;
    assert!(
        order[top.len()..].iter().any(|name| first[0] == **name),
        "{first} behind the navigation: {order:?}"
    );

    // A message, written and queued without a hand on the mouse; a mistake leads back to its field.
    browser.open(&format!("{base}/outbox/new")).await;
    browser.ask("document.querySelector('#account').focus()").await;
    browser.types(ALICE).await;
    for (field, text) in
        [("recipients", "nonsense"), ("subject", ""), ("importance", ""), ("body", "Written with keys")]
    {
        browser.press("Tab").await;
        assert_eq!(browser.ask("document.activeElement.id").await, field);
        browser.types(text).await;
    }
    browser.press("Tab").await;
    browser.press("Enter").await;
    browser.says("recipients:").await;
    browser.fill("#recipients", "sip:friend@fabrikam.example").await;
    browser.press("Enter").await;
    browser.says("delivered").await;

    // A button of a row, in a list that changes meanwhile: the focus stays where it is.
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body, state) VALUES ('{ALICE}', 'sip:friend@fabrikam.example', 'x', 'held')"
    ))
    .await
    .expect("a row");
    let row = sql.rows("SELECT max(id) FROM outbox").await.remove(0);
    browser.open(&format!("{base}/outbox")).await;
    browser.says("Live").await;
    browser.ask(&format!("document.querySelector('#release-{row}').focus()")).await;
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body, state) VALUES ('{ALICE}', 'sip:another@fabrikam.example', 'x', 'held')"
    ))
    .await
    .expect("another row");
    browser.says("another@fabrikam.example").await;
    assert_eq!(browser.ask("document.activeElement.id").await, format!("release-{row}"));
    browser.press("Enter").await;
    eventually("the row was released by a key and is delivered", async || {
        (sql.count(&format!("outbox WHERE id = {row} AND state = 'delivered'")).await == 1).then_some(())
    })
    .await;
    assert_eq!(browser.witnessed().await, Vec::<String>::new());
    drop(browser);
    assert!(scene.relay.server().terminate());
}

// ------------------------------------------------------------------------------------------------ /api/v1

impl Scene {
    /// What a resource of the interface for programs says.
    async fn json(&self, path: &str) -> Value {
        let answer = self.get(&format!("/api/v1{path}")).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        serde_json::from_str(&answer.text).expect("JSON")
    }

    async fn post_json(&self, path: &str, body: &Value) -> Answer {
        self.send(as_json(self.http.post(format!("{}/api/v1{path}", self.base)), body)).await
    }
}

fn as_json(request: reqwest::RequestBuilder, body: &Value) -> reqwest::RequestBuilder {
    request.header(CONTENT_TYPE, "application/json").body(body.to_string())
}

/// The status and the sentence of a problem.
fn problem(answer: &Answer) -> (u16, String) {
    assert_eq!(answer.headers[CONTENT_TYPE], "application/problem+json", "{}", answer.text);
    let problem: Value = serde_json::from_str(&answer.text).expect("JSON");
    assert_eq!(problem["status"], answer.status.as_u16());
    (answer.status.as_u16(), problem["detail"].as_str().expect("a sentence").to_owned())
}

async fn programs_read_what_pages_show(kind: Kind) {
    let mut scene = Scene::new(kind, "").await;
    let mut sql = scene.relay.connect().await;
    let talk = conversation(&mut sql, "Budget", "Carol").await;
    for number in 0..7 {
        let at = format!("2026-03-01T12:00:{number:02}.000Z");
        message(&mut sql, &talk, &at, Some("Carol"), &format!("word {number}"), None).await;
    }
    sql.run(&format!("INSERT INTO outbox (account, body, state) VALUES ('{ALICE}', 'unsaid', 'held')"))
        .await
        .expect("a row");

    let overview = scene.json("/overview").await;
    assert_eq!((&overview["accounts"]["online"], &overview["outbox"]["held"]), (&json!(1), &json!(1)));
    assert_eq!(overview["last_hour"].as_array().map(Vec::len), Some(60));
    let accounts = scene.json("/accounts?q=USER0001&state=online").await;
    assert_eq!((&accounts["items"][0]["account"], &accounts["next"]), (&json!(ALICE), &Value::Null));
    assert_eq!(scene.json("/accounts/USER0001@contoso.example").await["state"], "online");
    let coverage = scene.json(&format!("/accounts/{ALICE}/coverage")).await;
    assert_eq!(coverage["items"][0]["followed"], true, "{coverage}");
    let rows = scene.json("/outbox?state=held").await;
    let row = rows["items"][0]["id"].as_i64().expect("a number");
    assert_eq!(rows["items"][0]["body"], Value::Null, "texts stand in a row's own resource only");

    assert_eq!(accesses(&mut sql).await, Vec::<String>::new());
    let talks = scene.json(&format!("/conversations?account={ALICE}&with=carol@fabrikam.example")).await;
    assert_eq!(talks["items"][0]["message_count"], 7);
    let people = scene.json(&format!("/conversations/{talk}")).await;
    assert_eq!(people["conversation"]["subject"], "Budget");
    assert!(people["participants"].as_array().is_some_and(|people| people.len() >= 2), "{people}");
    assert_eq!(scene.json(&format!("/outbox/{row}")).await["row"]["body"], "unsaid");

    // From the newest back, and from the oldest forth, each message once.
    let texts = |page: &Value| -> Vec<String> {
        let items = page["items"].as_array().expect("a list");
        items.iter().map(|item| item["body"].as_str().expect("a text").to_owned()).collect()
    };
    let all: Vec<String> = (0..7).map(|number| format!("word {number}")).collect();
    let (mut back, mut path) = (Vec::new(), Some(format!("/conversations/{talk}/messages?limit=3")));
    let mut oldest = 0;
    while let Some(next) = path {
        let page = scene.json(&next).await;
        oldest = page["items"][0]["message_id"].as_i64().expect("a number");
        back.splice(0..0, texts(&page));
        path =
            page["previous"].as_i64().map(|id| format!("/conversations/{talk}/messages?limit=3&before={id}"));
    }
    assert_eq!(back, all);
    let mut forth = Vec::new();
    let mut path = Some(format!("/conversations/{talk}/messages?limit=2&after={oldest}"));
    while let Some(next) = path {
        let page = scene.json(&next).await;
        forth.extend(texts(&page));
        path = page["next"].as_i64().map(|id| format!("/conversations/{talk}/messages?limit=2&after={id}"));
    }
    assert_eq!(forth, all[1..]);
    let (mut found, mut path) = (Vec::new(), Some("/search?q=word&limit=3".to_owned()));
    while let Some(next) = path {
        let page = scene.json(&next).await;
        found.extend(texts(&page));
        path = page["next"].as_i64().map(|id| format!("/search?q=word&limit=3&before={id}"));
    }
    found.reverse();
    assert_eq!(found, all);
    let noted = accesses(&mut sql).await.join("\n");
    for read in ["with=sip:carol@fabrikam.example", "people", "limit", &format!("id={row}"), "q=word"] {
        assert_eq!(noted.contains(read), read != "limit", "{read} in {noted}");
    }

    for (path, status, words) in [
        ("/nothing", 404, "docs/api.md"),
        ("/accounts/nobody@contoso.example", 404, "no such account"),
        ("/accounts?state=tired", 400, "tired"),
        ("/accounts?colour=blue", 400, "colour"),
        ("/outbox?limit=0", 400, "1 to 500"),
        ("/outbox?limit=501", 400, "1 to 500"),
        ("/outbox?before=x", 400, "before"),
        ("/outbox/999999", 404, "no such message"),
        ("/conversations/x", 404, "number"),
        ("/conversations/999999/messages", 404, "no such conversation"),
        ("/search", 400, "as q"),
        ("/search?q=form:bob", 400, "from:"),
        ("/search?q=word&before=999999", 404, "no message 999999"),
    ] {
        let (answered, sentence) = problem(&scene.get(&format!("/api/v1{path}")).await);
        assert_eq!(answered, status, "{path}: {sentence}");
        assert!(sentence.contains(words), "{path}: {sentence}");
    }
    let both = format!("/api/v1/conversations/{talk}/messages?before=1&after=1");
    assert_eq!(problem(&scene.get(&both).await).0, 400);
    let foreign = scene.http.get(format!("{}/api/v1/overview", scene.base)).header("host", "evil.example");
    assert_eq!(scene.send(foreign).await.status, 421);
    assert!(scene.relay.server().terminate());
}

async fn programs_queue_messages_and_change_rows(kind: Kind) {
    let mut scene = Scene::new(kind, "").await;
    let mut sql = scene.relay.connect().await;
    let good = json!({
        "account": ALICE, "recipients": "sip:friend@fabrikam.example", "body": "one\ntwo", "idempotency_key": "k-1",
    });
    for (change, status, words) in [
        (json!({ "account": "nonsense" }), 422, "not a SIP address"),
        (json!({ "account": "sip:stranger@contoso.example" }), 422, "no account"),
        (json!({ "recipients": "" }), 422, "at least one"),
        (json!({ "body": " " }), 422, "empty"),
        (json!({ "colour": "blue" }), 422, "colour"),
        (json!({ "body": 7 }), 422, "string"),
    ] {
        let mut bad = good.clone();
        let (bad_fields, change) =
            (bad.as_object_mut().expect("fields"), change.as_object().expect("fields"));
        bad_fields.extend(change.clone());
        let (answered, sentence) = problem(&scene.post_json("/outbox", &bad).await);
        assert_eq!(answered, status, "{bad}: {sentence}");
        assert!(sentence.contains(words), "{sentence}");
    }
    let to = format!("{}/api/v1/outbox", scene.base);
    let form = scene.send(scene.http.post(&to).form(&[("account", ALICE), ("body", "x")])).await;
    assert_eq!(problem(&form).0, 415, "no form of another site's page is taken");
    let foreign = as_json(scene.http.post(&to).header("origin", "https://evil.example"), &good);
    let foreign = scene.send(foreign).await;
    assert_eq!(problem(&foreign).0, 403);
    let long = json!({ "account": ALICE, "recipients": "a@b.example", "body": "x".repeat(1 << 20) });
    let (answered, sentence) = problem(&scene.post_json("/outbox", &long).await);
    assert!(answered == 413 && sentence.contains("longer than 1024 KiB"), "{sentence}");
    assert_eq!(sql.count("outbox").await, 0);

    let queued = scene.post_json("/outbox", &good).await;
    assert_eq!(queued.status, 201, "{}", queued.text);
    let path = queued.location().strip_prefix("/api/v1").expect("of this interface").to_owned();
    let row = eventually("the message is delivered", async || {
        let row = scene.json(&path).await;
        (row["row"]["state"] == "delivered").then_some(row)
    })
    .await;
    assert_eq!((&row["row"]["body"], &row["attempts"][0]["attempt"]), (&json!("one\ntwo"), &json!(1)));
    assert_eq!(problem(&scene.post_json("/outbox", &good).await).0, 409, "the key was used");
    assert_eq!(problem(&scene.post_json(&format!("{path}/cancel"), &json!({})).await).0, 409);

    sql.run(&format!("INSERT INTO outbox (account, body, state) VALUES ('{ALICE}', 'x', 'held')"))
        .await
        .expect("a row");
    let held = sql.rows("SELECT id FROM outbox WHERE state = 'held'").await.remove(0);
    assert_eq!(problem(&scene.post_json(&format!("/outbox/{held}/retry"), &json!({})).await).0, 409);
    assert_eq!(problem(&scene.post_json(&format!("/outbox/{held}/paint"), &json!({})).await).0, 404);
    let cancelled = scene.post_json(&format!("/outbox/{held}/cancel"), &json!({})).await;
    assert_eq!(cancelled.status, 200, "{}", cancelled.text);
    assert_eq!(sql.rows(&format!("SELECT state FROM outbox WHERE id = {held}")).await, ["cancelled"]);
    sql.run(&format!(
        "INSERT INTO outbox (account, recipients, body, send_after) VALUES ('{ALICE}', 'sip:friend@fabrikam.example', 'x', '2099-01-01T00:00:00Z')"
    ))
    .await
    .expect("a row");
    let waits = sql.rows("SELECT id FROM outbox WHERE state = 'queued'").await.remove(0);
    for (word, state) in [("hold", "held"), ("release", "queued"), ("cancel", "cancelled")] {
        let changed = scene.post_json(&format!("/outbox/{waits}/{word}"), &json!({})).await;
        let changed: Value = serde_json::from_str(&changed.text).expect("JSON");
        assert_eq!(changed["state"], state, "{word}");
    }
    assert!(scene.relay.server().terminate());
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_need_the_token_where_there_is_one() {
    let scene = Scene::new(Kind::Sqlite, "token_file = \"token\"\n").await;
    let ask =
        |token: &str| scene.http.get(format!("{}/api/v1/overview", scene.base)).bearer_auth(token.to_owned());
    assert_eq!(problem(&scene.get("/api/v1/overview").await).0, 401);
    assert_eq!(problem(&scene.send(ask("another-token-of-that-length")).await).0, 401);
    let answer = scene.send(ask(TOKEN)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(problem(&scene.post_json("/outbox", &json!({})).await).0, 401);

    // Who guesses has to wait, and learns it in the same form as everything else.
    for _ in 0..4 {
        assert_eq!(problem(&scene.send(ask("another-token-of-that-length")).await).0, 401);
    }
    let waits = scene.send(ask(TOKEN)).await;
    assert_eq!(problem(&waits).0, 429);
    assert!(waits.headers.contains_key(RETRY_AFTER));
}
