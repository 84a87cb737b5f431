//! A text that is looked for means the same on both databases, with and without their full-text indexes: what
//! `fold::find` says, which is also what is highlighted.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::{fmt::Write, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use support::sql::{Kind, Place, Sql};
use ucwa_relay::{
    archive::{retry::RetryPolicy, workspace::RuleSettings},
    identifiers::SipUri,
    query::{Condition, Person, Query, Term, fold},
    store::{self, Page, Role, SharedStore, StoreSettings},
};

/// What texts are made of: words, their beginnings and variants, other scripts, signs, and whatever means something to
/// some expression or database.
const PIECES: [&str; 96] = [
    "budget",
    "Budg",
    "BUDGET",
    "bu",
    "b",
    "e",
    "E",
    "é",
    "É",
    "e\u{301}",
    "e\u{363}",
    "ế",
    "e\u{302}\u{301}",
    "cafe",
    "CAFÉ",
    "ß",
    "ẞ",
    "ss",
    "ſ",
    "k",
    "\u{212a}",
    "\u{212b}",
    "å",
    "i",
    "I",
    "İ",
    "ı",
    "σ",
    "Σ",
    "ς",
    "Я",
    "я",
    "й",
    "и",
    "ა",
    "Ა",
    "Ꭰ",
    "ꭰ",
    "ﬁ",
    "Ａ",
    "ａ",
    "が",
    "か",
    "か\u{3099}",
    "会議",
    "会",
    "議は",
    "明日の",
    "々",
    "一",
    "한국",
    "국",
    "พรุ่ง",
    "รุ่",
    "བོད",
    "မြန်",
    "שלום",
    "ש\u{5bc}\u{5b8}",
    "سلام",
    "می\u{200c}خواهم",
    "\u{200f}",
    "\u{200d}",
    "😀",
    "👩\u{200d}💻",
    "❤\u{fe0f}",
    "🇩🇪",
    " ",
    "  ",
    "\t",
    "\r\n",
    "\u{a0}",
    "\u{3000}",
    "\u{200b}",
    ".",
    "*",
    "+",
    "?",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "|",
    "^",
    "$",
    "\\",
    "\\u0041",
    "'",
    "\"",
    "%",
    "_",
    "-",
    "@contoso.com",
    "https://x/",
    "100%",
];

fn settings(place: &Place, full_text: bool) -> StoreSettings {
    StoreSettings {
        url: place.url(),
        max_connections: 1,
        commit_interval: Duration::from_millis(2),
        full_text,
        node: "node-1".to_owned(),
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

/// A tool's view of the archive, after a server has arranged the index.
async fn open(place: &Place, full_text: bool) -> SharedStore {
    store::connect(&settings(place, full_text), Role::Server).await.unwrap().close().await;
    store::connect(&settings(place, full_text), Role::Tool).await.unwrap()
}

/// A message a second, of two accounts in turn; the time is told in minutes, so that many have the same.
async fn write(sql: &mut Sql, texts: &[String]) {
    sql.run(
        "INSERT INTO accounts (id, sip_uri, username)
         VALUES (1, 'sip:alice@contoso.com', 'a'), (2, 'sip:carol@contoso.com', 'c')",
    )
    .await
    .unwrap();
    sql.run(
        "INSERT INTO conversations (id, account_id, started_at)
         VALUES (1, 1, '2026-03-01T12:00:00.000Z'), (2, 2, '2026-03-01T12:00:00.000Z')",
    )
    .await
    .unwrap();
    let begin: Timestamp = "2026-03-01T12:00:00Z".parse().unwrap();
    for (page, some) in texts.chunks(1000).enumerate() {
        let mut insert =
            "INSERT INTO messages (id, account_id, conversation_id, direction, body, sent_at, archived_at, \
                          status, source) VALUES "
                .to_owned();
        for (number, text) in some.iter().enumerate() {
            let (id, account) = (page * 1000 + number, number % 2 + 1);
            let sent_at = begin + SignedDuration::from_mins(i64::try_from(id).unwrap() / 60);
            write!(
                insert,
                "{}({id}, {account}, {account}, 'incoming', '{}', '{sent_at:.3}', '{sent_at:.3}', 'delivered', 'event')",
                if number == 0 { "" } else { ", " },
                text.replace('\'', "''")
            )
            .unwrap();
        }
        sql.run(&insert).await.unwrap();
    }
}

async fn found(store: &SharedStore, text: &str, negated: bool) -> Vec<usize> {
    let query = Query { terms: vec![Term { negated, condition: Condition::Text(text.to_owned()) }] };
    // They stand in the order of their ids.
    let rows = store.messages(&query, Page::Newest, 10_000).await.unwrap();
    rows.iter().map(|row| usize::try_from(row.message_id.0).unwrap()).collect()
}

/// As people vary what they read: other case, other spaces, a part of it.
fn variant(random: &mut StdRng, text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let from = random.random_range(0..=characters.len());
    let to = random.random_range(from..=characters.len().min(from + 12));
    characters[from..to]
        .iter()
        .flat_map(|&c| match random.random_range(0..8) {
            0 => c.to_uppercase().collect::<Vec<char>>(),
            1 => c.to_lowercase().collect(),
            2 => vec![c, '\u{301}'],
            3 if c.is_whitespace() => vec!['\u{2003}', ' '],
            _ => vec![c],
        })
        .collect()
}

async fn every_database_finds_what_is_highlighted(kind: Kind) {
    let mut random = StdRng::seed_from_u64(8);
    let mut texts: Vec<String> = (0..300)
        .map(|_| (0..random.random_range(0..9)).map(|_| *PIECES.choose(&mut random).unwrap()).collect())
        .collect();
    texts.extend([
        "x ".repeat(50_001) + "budget at the end",
        "会".repeat(3000) + "議",
        "é".repeat(700) + " budget",
    ]);
    let mut needles: Vec<String> = PIECES.iter().map(|&piece| piece.to_owned()).collect();
    for _ in 0..150 {
        let text = texts[..300].choose(&mut random).unwrap().clone();
        needles.push(variant(&mut random, &text));
    }
    needles.extend(["E".repeat(200), "budget at the END".to_owned(), "会".repeat(100)]);
    needles.retain(|needle| !fold::folded(needle).trim().is_empty());
    assert!(needles.len() > 150, "{}", needles.len());

    let place = Place::new(kind).await;
    store::migrate(&settings(&place, false)).await.unwrap();
    write(&mut place.connect().await, &texts).await;
    let expected: Vec<Vec<usize>> = needles
        .iter()
        .map(|needle| (0..texts.len()).filter(|&id| !fold::find(&texts[id], needle).is_empty()).collect())
        .collect();
    let hits: usize = expected.iter().map(Vec::len).sum();
    assert!(hits > needles.len() * 4, "the needles are from the texts: {hits}");
    for full_text in [true, false] {
        let store = open(&place, full_text).await;
        for (needle, expected) in needles.iter().zip(&expected) {
            let found_here = found(&store, needle, false).await;
            let of = |ids: &[usize], others: &[usize]| -> Vec<String> {
                let only = ids.iter().filter(|id| !others.contains(id));
                only.map(|&id| format!("{id}: {:?}", texts[id].chars().take(80).collect::<String>()))
                    .collect()
            };
            assert!(
                found_here == *expected,
                "{needle:?}, full text: {full_text}: missing {:?}, not meant {:?}",
                of(expected, &found_here),
                of(&found_here, expected)
            );
        }
        let mut all = found(&store, "budget", false).await;
        all.extend(found(&store, "budget", true).await);
        all.sort_unstable();
        assert!(all.into_iter().eq(0..texts.len()), "what does not fit is the rest");
        store.close().await;
    }
}

/// However frequent a word is, and wherever it was said: the newest ones are found, and then those before.
async fn pages_have_the_newest_of_frequent_and_of_rare_words(kind: Kind) {
    const MESSAGES: usize = 9_000;
    let words = |id: usize| {
        [
            (true, "always"),
            (id.is_multiple_of(3), "often"),
            (id.is_multiple_of(37), "sometimes"),
            (id.is_multiple_of(400), "seldom"),
            (id.is_multiple_of(2999), "rare"),
            (id < 300, "once"),
            (id >= MESSAGES - 30 || id.is_multiple_of(1000), "lately"),
            ((4_000..4_100).contains(&id), "between"),
        ]
    };
    let texts: Vec<String> = (0..MESSAGES)
        .map(|id| words(id).iter().filter(|(is, _)| *is).map(|(_, word)| *word).collect::<Vec<_>>().join(" "))
        .collect();
    let place = Place::new(kind).await;
    store::migrate(&settings(&place, false)).await.unwrap();
    write(&mut place.connect().await, &texts).await;
    let alice: SipUri = "sip:alice@contoso.com".parse().unwrap();
    for full_text in [true, false] {
        let store = open(&place, full_text).await;
        for (number, (_, word)) in words(0).iter().enumerate() {
            for only_alice in [false, true] {
                let mut expected: Vec<usize> =
                    (0..MESSAGES).filter(|&id| words(id)[number].0 && !(only_alice && id % 2 == 1)).collect();
                let mut query = Query::default().and(Condition::Text((*word).to_owned()));
                if only_alice {
                    query = query.and(Condition::Account(vec![Person::Address(alice.clone())]));
                }
                let mut page = Page::Newest;
                for round in 0..4 {
                    let rows = store.messages(&query, page, 40).await.unwrap();
                    let ids: Vec<usize> =
                        rows.iter().map(|row| usize::try_from(row.message_id.0).unwrap()).collect();
                    let wanted = expected.split_off(expected.len().saturating_sub(40));
                    assert_eq!(
                        ids, wanted,
                        "{word}, only alice: {only_alice}, full text: {full_text}, page {round}"
                    );
                    let Some(first) = rows.first() else { break };
                    page = Page::Before(store.place(first.message_id).await.unwrap().unwrap());
                }
            }
        }
        store.close().await;
    }
}

#[tokio::test]
async fn sqlite_asks_the_index_and_survives_what_is_no_text() {
    let place = Place::new(Kind::Sqlite).await;
    store::migrate(&settings(&place, false)).await.unwrap();
    let mut sql = place.connect().await;
    let texts = ["the budget", "budget\u{363}ary", "Budget", "other"].map(ToOwned::to_owned);
    write(&mut sql, &texts).await;
    let store = open(&place, true).await;
    sql.run("UPDATE messages SET body = CAST(X'62756467657420ff' AS TEXT) WHERE id = 2").await.unwrap();
    assert_eq!(found(&store, "budget", false).await, [0, 1]);
    assert_eq!(found(&store, "budget", true).await, [2, 3]);
    // What the index does not tell is not looked at.
    sql.run("INSERT INTO messages_fts (messages_fts) VALUES ('delete-all')").await.unwrap();
    assert_eq!(found(&store, "budget", false).await, [0; 0]);
    store.close().await;
    // An index that was made otherwise is made anew, and what it had besides goes.
    sql.run("CREATE INDEX messages_fts_besides ON messages (id) WHERE body LIKE '%x%'").await.unwrap();
    sql.run("DROP TRIGGER messages_fts_update").await.unwrap();
    let store = open(&place, true).await;
    assert_eq!(found(&store, "budget", false).await, [0, 1]);
    assert_eq!(sql.rows("SELECT name FROM sqlite_schema WHERE name = 'messages_fts_besides'").await, [""; 0]);
    store.close().await;
}

#[tokio::test]
async fn postgresql_makes_an_index_anew_that_folds_otherwise() {
    let place = Place::new(Kind::Postgres).await;
    store::migrate(&settings(&place, false)).await.unwrap();
    let mut sql = place.connect().await;
    write(&mut sql, &["the budget".to_owned()]).await;
    open(&place, true).await.close().await;
    let index = "SELECT oid::bigint FROM pg_class WHERE relname = 'messages_fts'";
    let first = sql.rows(index).await;
    open(&place, true).await.close().await;
    assert_eq!(sql.rows(index).await, first, "it stays as long as nothing changes");
    sql.run(
        "CREATE OR REPLACE FUNCTION ucwa_relay_words(body text) RETURNS text[] LANGUAGE sql IMMUTABLE STRICT
         AS 'SELECT ARRAY[''none'']'",
    )
    .await
    .unwrap();
    let tool = store::connect(&settings(&place, true), Role::Tool).await.unwrap();
    assert_eq!(found(&tool, "budget", false).await, [0], "another program's index is not believed");
    tool.close().await;
    let store = open(&place, true).await;
    assert_ne!(sql.rows(index).await, first);
    assert_eq!(found(&store, "budget", false).await, [0]);
    store.close().await;
}

on_both_databases!(
    "current_thread":
    every_database_finds_what_is_highlighted,
    pages_have_the_newest_of_frequent_and_of_rare_words,
);
