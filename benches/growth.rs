//! How the archive behaves as it grows: fills it through the store's own writer, and prints as Markdown how fast it takes
//! messages when empty and when full, how long reading takes, the plans of the statements, and the space it needs.
//!
//! ```sh
//! cargo bench --bench growth -- --messages 10000000 --accounts 1000 --database postgres --folder /var/tmp
//! ```
//!
//! Without arguments the archive stays small, so that it is a trial of the program and no measurement. Each database is
//! a new one in a folder of its own, removed at the end; PostgreSQL is started from the installed programs.

#![allow(clippy::cast_precision_loss, reason = "figures for people")]

#[path = "../tests/support/postgres.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod postgres;

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use futures_util::{StreamExt, TryStreamExt, future::try_join_all, stream};
use jiff::{SignedDuration, Timestamp};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use ucwa_relay::{
    archive::fact::{
        ArchiveCommit, Content, ConversationEnded, ConversationFact, Direction, Fact, MessageFact,
        OperationStatus, ParticipantChange, ParticipantDetails, ParticipantFact, Person, Phase,
    },
    config::Config,
    identifiers::{AccountId, SessionId, SipUri},
    query::{Condition, Query},
    store::{Auth, HistoryFilter, NewAccount, Page, Role, SecretSource, SharedStore, StoreSettings, connect},
};

/// Measures how the archive behaves as it grows.
#[derive(Debug, Parser)]
struct Options {
    /// Messages in the archive when it counts as full
    #[arg(long, default_value_t = 20_000)]
    messages: u64,
    /// Accounts they are of
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
    accounts: u64,
    /// Messages of each round in which the rate of inserting is measured
    #[arg(long, default_value_t = 1_000)]
    sample: u64,
    /// Only this database
    #[arg(long, value_enum)]
    database: Option<Kind>,
    /// Where the databases are made; by default the temporary folder
    #[arg(long)]
    folder: Option<PathBuf>,
    /// The full archive's file (`SQLite`) or its server's folder (PostgreSQL): filled if it is not there, and stays for other
    /// runs with the same numbers
    #[arg(long, requires = "database")]
    keep: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Sqlite,
    Postgres,
}

// ------------------------------------------------------------------------------------------------ what is archived

/// Messages of a conversation.
const TALK: u64 = 20;
/// People whom an account talks to.
const CORRESPONDENTS: u64 = 50;
/// Commits under way at once, as if so many accounts had news.
const COMMITS: usize = 512;
/// Words there are; the first ones are the most frequent.
const WORDS: u64 = 20_000;
/// Time that the archive covers.
const COVERED: SignedDuration = SignedDuration::from_hours(24 * 365);

/// The same numbers each time (a step of splitmix64).
fn scattered(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A word by its rank: three syllables, no two words alike.
fn word(rank: u64) -> String {
    const ONSETS: [&str; 14] = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"];
    const VOWELS: [&str; 2] = ["a", "o"];
    let mut rest = rank;
    let mut word = String::new();
    for _ in 0..3 {
        let (onset, vowel) = (rest % 14, rest / 14 % 2);
        rest /= 28;
        word.push_str(ONSETS[usize::try_from(onset).unwrap_or(0)]);
        word.push_str(VOWELS[usize::try_from(vowel).unwrap_or(0)]);
    }
    word
}

/// Twelve words, few of them frequent and most of them rare.
fn text(number: u64) -> String {
    let mut text = String::new();
    for place in 0..12 {
        let chance = (scattered(number * 12 + place) >> 11) as f64 / (1_u64 << 53) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "smaller than WORDS")]
        let rank = (chance.powi(4) * WORDS as f64) as u64;
        text.push_str(if place == 0 { "" } else { " " });
        text.push_str(&word(rank));
    }
    text
}

fn account_uri(number: u64) -> SipUri {
    format!("user{number}@contoso.com").parse().expect("it is a SIP URI")
}

/// Whom an account talks to in this conversation. Everybody is known to several accounts.
fn correspondent(account: u64, talk: u64, accounts: u64) -> String {
    let friend = scattered(account << 32 | talk) % CORRESPONDENTS;
    format!("sip:person{}@fabrikam.com", (account * 7 + friend * 13) % (accounts * 5))
}

/// One of the accounts, as its actor has it.
#[derive(Debug, Clone, Copy)]
struct Member {
    number: u64,
    account: AccountId,
    session: SessionId,
    accounts: u64,
}

impl Member {
    fn talk_href(&self, talk: u64) -> String {
        format!("/ucwa/v1/applications/{:x}/communication/conversations/{talk:x}", self.session.0)
    }

    fn begins(&self, talk: u64) -> [Fact; 2] {
        let (conversation, uri) = (self.talk_href(talk), correspondent(self.number, talk, self.accounts));
        let begun = ConversationFact {
            href: conversation.clone(),
            state: Some("Connected".to_owned()),
            thread_id: Some(format!("AdTh{:016x}", scattered(self.number << 32 | talk))),
            subject: Some(word(scattered(talk) % WORDS)),
            ..ConversationFact::default()
        };
        let joined = ParticipantFact {
            role: None,
            href: format!("{conversation}/participants/{uri}"),
            conversation_href: conversation,
            change: ParticipantChange::Joined,
            title: None,
            details: Some(ParticipantDetails { uri: Some(uri), ..ParticipantDetails::default() }),
            is_local: false,
        };
        [Fact::Conversation(begun), Fact::Participant(joined)]
    }

    fn says(&self, talk: u64, number: u64, at: Timestamp) -> Fact {
        let conversation_href = self.talk_href(talk);
        let uri = correspondent(self.number, talk, self.accounts);
        let incoming = number.is_multiple_of(2);
        Fact::Message(MessageFact {
            href: format!("{conversation_href}/messaging/messages/{number:x}"),
            phase: Phase::Completed,
            direction: Some(if incoming { Direction::Incoming } else { Direction::Outgoing }),
            sender: incoming.then(|| Person {
                contact_uri: None,
                href: Some(format!("{conversation_href}/participants/{uri}")),
                name: Some(uri.clone()),
                uri: Some(uri),
            }),
            content: Content { plain: Some(text(self.number << 32 | number)), html: None },
            sent_at: Some(at),
            unreadable_time: None,
            status: Some(OperationStatus::Success),
            reason: None,
            operation_id: None,
            failed_recipients: Vec::new(),
            link_only: false,
            conversation_href,
        })
    }

    fn ends(&self, talk: u64) -> Fact {
        Fact::ConversationEnded(ConversationEnded { href: self.talk_href(talk), reason: None })
    }

    async fn commit(&self, store: &SharedStore, at: Timestamp, facts: Vec<Fact>) -> anyhow::Result<()> {
        let commit = ArchiveCommit {
            account: self.account,
            session: self.session,
            epoch: store.leases().epoch(self.account).context("the account is not held")?,
            cursor: Some(format!("/events?ack={}", at.as_millisecond())),
            received_at: at,
            facts,
        };
        store.commit(commit).await?;
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------ where it is archived

/// A database of its own; it goes when this goes, if it is not kept.
enum Place {
    Sqlite(TempDir),
    Kept(PathBuf),
    Postgres(Arc<postgres::OwnServer>, postgres::PostgresDatabase),
}

impl Place {
    async fn new(kind: Kind, folder: &Path, keep: Option<&Path>) -> anyhow::Result<Self> {
        // As an administrator would set a server of this size; it waits for the disk at every commit.
        const SERVER: [&str; 4] =
            ["-c shared_buffers=2GB", "-c max_wal_size=4GB", "-c work_mem=16MB", "-c random_page_cost=1.1"];
        Ok(match (kind, keep) {
            (Kind::Sqlite, Some(file)) => Self::Kept(file.to_owned()),
            (Kind::Sqlite, None) => Self::Sqlite(TempDir::new_in(folder)?),
            (Kind::Postgres, Some(folder)) => {
                let server = postgres::OwnServer::start_kept_in(folder, &SERVER);
                let database = postgres::PostgresDatabase::kept_on(&server.admin_url(), "archive").await;
                Self::Postgres(Arc::new(server), database)
            }
            (Kind::Postgres, None) => {
                let server = postgres::OwnServer::start_in(folder, &SERVER);
                let database = postgres::PostgresDatabase::on(&server.admin_url()).await;
                Self::Postgres(Arc::new(server), database)
            }
        })
    }

    /// Another one, empty, on the same disk and the same server.
    async fn beside(&self, folder: &Path) -> anyhow::Result<Self> {
        Ok(match self {
            Self::Sqlite(_) | Self::Kept(_) => Self::Sqlite(TempDir::new_in(folder)?),
            Self::Postgres(server, _) => {
                let database = postgres::PostgresDatabase::on(&server.admin_url()).await;
                Self::Postgres(Arc::clone(server), database)
            }
        })
    }

    fn url(&self) -> String {
        match self {
            Self::Sqlite(folder) => format!("sqlite://{}", folder.path().join("relay.db").display()),
            Self::Kept(file) => format!("sqlite://{}", file.display()),
            Self::Postgres(_, database) => database.url().to_owned(),
        }
    }

    /// Brings the statistics to where the database's own upkeep has them after some time.
    async fn settle(&self) -> anyhow::Result<()> {
        if let Self::Postgres(_, database) = self {
            let mut connection = database.connect().await;
            sqlx::query("VACUUM (ANALYZE)").execute(&mut connection).await?;
            sqlx::query("CHECKPOINT").execute(&mut connection).await?;
        }
        Ok(())
    }

    /// Bytes of the whole, and of its larger parts.
    async fn sizes(&self) -> anyhow::Result<(u64, Vec<(String, u64)>)> {
        match self {
            Self::Sqlite(folder) => {
                let mut total = 0;
                for entry in std::fs::read_dir(folder.path())? {
                    total += entry?.metadata()?.len();
                }
                Ok((total, Vec::new()))
            }
            Self::Kept(file) => Ok((std::fs::metadata(file)?.len(), Vec::new())),
            Self::Postgres(_, database) => {
                let mut connection = database.connect().await;
                let total: i64 = sqlx::query_scalar("SELECT pg_database_size(current_database())")
                    .fetch_one(&mut connection)
                    .await?;
                let parts = sqlx::query(
                    "SELECT relname::text, pg_table_size(oid) FROM pg_class
                      WHERE relkind IN ('r', 'i') AND relnamespace = 'public'::regnamespace
                      ORDER BY 2 DESC LIMIT 16",
                )
                .fetch_all(&mut connection)
                .await?
                .iter()
                .map(|row| (row.get(0), row.get::<i64, _>(1).unsigned_abs()))
                .collect();
                Ok((total.unsigned_abs(), parts))
            }
        }
    }
}

/// The configuration's defaults, except that leases last as long as filling may.
fn settings(url: String) -> StoreSettings {
    let mut config = Config::default();
    config.database.url = url;
    StoreSettings { lease_ttl: Duration::from_hours(48), ..config.store_settings() }
}

async fn sign_in(store: &SharedStore, accounts: u64) -> anyhow::Result<Vec<Member>> {
    let ids = try_join_all((0..accounts).map(async |number| {
        let account = NewAccount {
            sip_uri: account_uri(number),
            username: format!("user{number}"),
            auth: Auth::Password,
            secret: SecretSource::Missing,
            invitations: None,
        };
        match store.account(&account.sip_uri).await? {
            Some(there) => Ok((number, there.id)),
            None => store.add_account(&account).await.map(|account| (number, account)),
        }
    }))
    .await?;
    if let Some(cluster) = store.cluster() {
        cluster.renew_leases().await?;
        cluster.acquire_leases(usize::MAX).await?;
    }
    let members = ids.into_iter().map(async |(number, account)| {
        let session = store.begin_session(account, "/ucwa/v1/applications/1", "/events?ack=1", "").await?;
        anyhow::Ok(Member { number, account, session: session.id, accounts })
    });
    try_join_all(members).await
}

// ------------------------------------------------------------------------------------------------ measuring

/// Fills the archive, a whole conversation in a commit, from conversation `first` of each account on.
async fn fill(store: &SharedStore, members: &[Member], talks: std::ops::Range<u64>) -> anyhow::Result<()> {
    let begin = Timestamp::now() - COVERED;
    let step = COVERED / i32::try_from(talks.end.max(1)).unwrap_or(i32::MAX);
    let started = Instant::now();
    let (first, last) = (talks.start, talks.end);
    for talk in talks {
        let at = begin + step * i32::try_from(talk).unwrap_or(i32::MAX);
        stream::iter(members)
            .map(anyhow::Ok)
            .try_for_each_concurrent(COMMITS, async |member| {
                let mut facts = Vec::from(member.begins(talk));
                for place in 0..TALK {
                    let sent_at = at + SignedDuration::from_secs(i64::try_from(place * 20)?);
                    facts.push(member.says(talk, talk * TALK + place, sent_at));
                }
                facts.push(member.ends(talk));
                member.commit(store, at, facts).await
            })
            .await?;
        if talk % 10 == 9 || talk + 1 == last {
            let done = (talk + 1 - first) * TALK * members.len() as u64;
            eprintln!(
                "{done} of {} messages, {:.0} in a second",
                (last - first) * TALK * members.len() as u64,
                done as f64 / started.elapsed().as_secs_f64()
            );
        }
    }
    Ok(())
}

/// Messages in a second, each in a commit of its own as an event channel brings it, of all accounts in turn.
async fn insert_rate(store: &SharedStore, members: &[Member], talk: u64, sample: u64) -> anyhow::Result<f64> {
    let now = Timestamp::now();
    try_join_all(members.iter().map(|member| member.commit(store, now, member.begins(talk).into()))).await?;
    let started = Instant::now();
    stream::iter(0..sample)
        .map(anyhow::Ok)
        .try_for_each_concurrent(COMMITS, async |number| {
            let member = &members[usize::try_from(number % members.len() as u64)?];
            let at = now + SignedDuration::from_millis(i64::try_from(number)?);
            member.commit(store, at, vec![member.says(talk, talk * TALK + number, at)]).await
        })
        .await?;
    let rate = sample as f64 / started.elapsed().as_secs_f64();
    try_join_all(members.iter().map(|member| member.commit(store, now, vec![member.ends(talk)]))).await?;
    Ok(rate)
}

/// Rounds of inserting that count.
const ROUNDS: u64 = 3;

/// How fast the full archive takes messages, and how fast an empty one does on the same disk and the same server: turn by
/// turn, so that whatever else the machine does slows both; the median of the rounds of each. The first round of each
/// does not count: it brings the pages into memory, as a server that runs has them.
async fn insert_rates(
    full: (&SharedStore, &[Member]),
    empty: (&SharedStore, &[Member]),
    talks: u64,
    sample: u64,
) -> anyhow::Result<(f64, f64)> {
    let (mut into_full, mut into_empty) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        // Conversations of a number of their own, above all that filling makes.
        let talk = talks + 1 + round * (sample + 1);
        let rates = (
            insert_rate(full.0, full.1, talk, sample).await?,
            insert_rate(empty.0, empty.1, talk, sample).await?,
        );
        eprintln!(
            "round {round}: {:.0} messages in a second into the full archive, {:.0} into the empty one",
            rates.0, rates.1
        );
        if round > 0 {
            into_full.push(rates.0);
            into_empty.push(rates.1);
        }
    }
    Ok((told(into_full).0, told(into_empty).0))
}

/// Statements that the store has run, as the driver tells.
#[derive(Debug, Clone, Default)]
struct Statements(Arc<Mutex<Vec<String>>>);

impl Statements {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: tracing::Subscriber> Layer<S> for Statements {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
            fn record_str(&mut self, field: &Field, value: &str) {
                let is_statement = field.name() == "db.statement" && !value.is_empty();
                if is_statement || (field.name() == "summary" && self.0.is_empty()) {
                    value.clone_into(&mut self.0);
                }
            }
        }
        if event.metadata().target() == "sqlx::query" {
            let mut text = Text(String::new());
            event.record(&mut text);
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text.0);
        }
    }
}

/// What is asked, of the store as `history` and `search` ask it.
struct Question(Query);

impl Question {
    async fn ask(&self, store: &SharedStore) -> anyhow::Result<usize> {
        Ok(store.messages(&self.0, Page::Newest, LIMIT).await?.len())
    }
}

/// Stands in the statement that reads messages.
const HISTORY: &str = "FROM message_history";

/// As many as `history` prints if it is not told otherwise.
const LIMIT: i64 = 100;

fn questions(options: &Options, talks: u64) -> Vec<(&'static str, Vec<Question>)> {
    let some = |count: u64| (0..5).map(move |number| scattered(number) % count);
    let history = |filter: HistoryFilter| Question(filter.query());
    let has = |text: String| Question(Query::default().and(Condition::Text(text)));
    let talks = talks.max(1);
    let person = |number: u64| {
        let account = number % options.accounts;
        correspondent(account, number % talks, options.accounts).parse().ok()
    };
    let day = |number: u64| {
        let since =
            Timestamp::now() - COVERED + SignedDuration::from_hours(24 * i64::try_from(number).unwrap_or(0));
        (Some(since), Some(since + SignedDuration::from_hours(24)))
    };
    let mut questions: Vec<(&'static str, Vec<Question>)> = vec![
        (
            "history of one account",
            some(options.accounts)
                .map(|number| {
                    history(HistoryFilter { account: Some(account_uri(number)), ..HistoryFilter::default() })
                })
                .collect(),
        ),
        (
            "history of one correspondent",
            some(1 << 20)
                .map(|number| history(HistoryFilter { with: person(number), ..HistoryFilter::default() }))
                .collect(),
        ),
        (
            "history of one correspondent with one account",
            some(1 << 20)
                .map(|number| {
                    let account = Some(account_uri(number % options.accounts));
                    history(HistoryFilter { account, with: person(number), ..HistoryFilter::default() })
                })
                .collect(),
        ),
        (
            "history of one day",
            some(360)
                .map(|number| {
                    let (since, until) = day(number);
                    history(HistoryFilter { since, until, ..HistoryFilter::default() })
                })
                .collect(),
        ),
        (
            "history of one day of one account",
            some(360)
                .map(|number| {
                    let (since, until) = day(number);
                    let account = Some(account_uri(number % options.accounts));
                    history(HistoryFilter { account, since, until, ..HistoryFilter::default() })
                })
                .collect(),
        ),
    ];
    for (name, rank) in [
        ("full text: a word in 0.025 % of the messages", WORDS / 2),
        ("full text: a word in 0.1 % of the messages", WORDS / 13),
        ("full text: a word in 1 % of the messages", WORDS / 300),
    ] {
        questions.push((name, (0..5).map(|number| has(word(rank + number))).collect()));
    }
    questions.push((
        "full text: two words in a row",
        some(1 << 30)
            .map(|number| {
                let said = text(((number % options.accounts) << 32) | (number % (talks * TALK)));
                has(said.split(' ').skip(3).take(2).collect::<Vec<_>>().join(" "))
            })
            .collect(),
    ));
    questions
}

/// Asks SQLite for plans; PostgreSQL's server writes those of all statements into its log.
struct Planner(Option<SqliteConnection>);

impl Planner {
    async fn new(place: &Place) -> anyhow::Result<Self> {
        Ok(Self(match place {
            Place::Sqlite(_) | Place::Kept(_) => {
                let options = SqliteConnectOptions::from_str(&place.url())?.with_regexp();
                Some(SqliteConnection::connect_with(&options).await?)
            }
            Place::Postgres(..) => None,
        }))
    }

    /// How the database goes about a statement.
    async fn plan(&mut self, statement: &str) -> anyhow::Result<Vec<String>> {
        let Some(connection) = &mut self.0 else { return Ok(Vec::new()) };
        let rows = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}")))
            .fetch_all(connection)
            .await?;
        let mut depths = std::collections::BTreeMap::from([(0_i64, 0_usize)]);
        Ok(rows
            .iter()
            .map(|row| {
                let depth = depths.get(&row.get("parent")).copied().unwrap_or(0);
                depths.insert(row.get("id"), depth + 1);
                format!("{}{}", "  ".repeat(depth), row.get::<String, _>("detail"))
            })
            .collect())
    }
}

/// Milliseconds; the median and the longest.
fn told(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times.get(times.len() / 2).copied().unwrap_or(0.0), times.last().copied().unwrap_or(0.0))
}

async fn measure(kind: Kind, options: &Options, statements: &Statements) -> anyhow::Result<String> {
    let folder = options.folder.clone().unwrap_or_else(std::env::temp_dir);
    let keep = options.keep.as_deref();
    let is_filled = keep.is_some_and(Path::exists);
    let place = Place::new(kind, &folder, keep).await?;
    let mut store = connect(&settings(place.url()), Role::Server).await?;
    let members = sign_in(&store, options.accounts).await?;
    let talks = options.messages / TALK / options.accounts;
    if !is_filled {
        fill(&store, &members, 0..talks).await?;
    }
    place.settle().await?;
    let beside = place.beside(&folder).await?;
    let fresh = connect(&settings(beside.url()), Role::Server).await?;
    let newcomers = sign_in(&fresh, options.accounts).await?;
    let (full, empty) = insert_rates((&store, &members), (&fresh, &newcomers), talks, options.sample).await?;
    fresh.close().await;
    drop(beside);
    let mut report = String::new();
    let stored = options.sample * (ROUNDS + 1) + talks * TALK * options.accounts;
    writeln!(report, "\n## {kind:?}: {stored} messages of {} accounts\n", options.accounts)?;
    writeln!(
        report,
        "| inserting, each message in a commit of its own | messages in a second |\n| --- | ---: |"
    )?;
    writeln!(report, "| into the empty archive | {empty:.0} |\n| into the full archive | {full:.0} |")?;
    writeln!(report, "| ratio | {:.2} |\n", full / empty)?;

    writeln!(
        report,
        "| reading {LIMIT} rows | rows | median ms | longest ms |\n| --- | ---: | ---: | ---: |"
    )?;
    for (name, questions) in questions(options, talks) {
        let (mut times, mut rows) = (Vec::new(), BTreeSet::new());
        for question in &questions {
            // Once to have everything in memory.
            question.ask(&store).await?;
            for _ in 0..4 {
                let started = Instant::now();
                rows.insert(question.ask(&store).await?);
                times.push(started.elapsed().as_secs_f64() * 1000.0);
            }
        }
        let (median, longest) = told(times);
        let (fewest, most) = (rows.first().copied().unwrap_or(0), rows.last().copied().unwrap_or(0));
        writeln!(report, "| {name} | {fewest} to {most} | {median:.1} | {longest:.1} |")?;
        eprintln!("{name}: {median:.1} ms");
    }
    let mut plans = String::new();
    let mut sql = Planner::new(&place).await?;
    if let Place::Postgres(_, database) = &place {
        // The server logs the plans of the very statements that the store runs.
        store.close().await;
        explain_everything(&mut database.connect().await).await?;
        store = connect(&settings(place.url()), Role::Tool).await?;
    }
    for (name, questions) in questions(options, talks) {
        questions[0].ask(&store).await?;
        let before = place.log_length()?;
        statements.take();
        questions[0].ask(&store).await?;
        writeln!(plans, "\n### {name}\n\n```text")?;
        for line in place.logged_plan(before)? {
            writeln!(plans, "{line}")?;
        }
        // Not of what was asked before, whether there is an index of texts.
        for statement in statements.take().iter().filter(|statement| statement.contains(HISTORY)) {
            for line in sql.plan(statement).await? {
                writeln!(plans, "{line}")?;
            }
        }
        writeln!(plans, "```")?;
    }
    store.close().await;
    let (total, parts) = place.sizes().await?;
    writeln!(
        report,
        "\n{:.2} GB in all, {:.0} MB for a million messages.\n",
        total as f64 / 1e9,
        total as f64 / stored as f64
    )?;
    for (part, bytes) in parts {
        writeln!(report, "- {part}: {:.0} MB", bytes as f64 / 1e6)?;
    }
    Ok(report + &plans)
}

/// As `EXPLAIN (ANALYZE, BUFFERS)` for every statement of later sessions, into the server's log.
async fn explain_everything(connection: &mut PgConnection) -> anyhow::Result<()> {
    let name: String =
        sqlx::query_scalar("SELECT current_database()::text").fetch_one(&mut *connection).await?;
    for setting in [
        "session_preload_libraries = 'auto_explain'",
        "auto_explain.log_min_duration = 0",
        "auto_explain.log_analyze = on",
        "auto_explain.log_buffers = on",
    ] {
        let statement = AssertSqlSafe(format!("ALTER DATABASE {name} SET {setting}"));
        sqlx::raw_sql(statement).execute(&mut *connection).await?;
    }
    Ok(())
}

impl Place {
    fn log(&self) -> Option<PathBuf> {
        match self {
            Self::Sqlite(_) | Self::Kept(_) => None,
            Self::Postgres(server, _) => Some(server.log()),
        }
    }

    fn log_length(&self) -> anyhow::Result<usize> {
        self.log().map_or(Ok(0), |log| Ok(std::fs::read(log)?.len()))
    }

    /// The plan that PostgreSQL has logged since of the statement that reads history, without its text.
    fn logged_plan(&self, since: usize) -> anyhow::Result<Vec<String>> {
        let Some(log) = self.log() else { return Ok(Vec::new()) };
        let logged = std::fs::read(log)?;
        let text = String::from_utf8_lossy(logged.get(since..).unwrap_or_default()).into_owned();
        // The planner's own questions are logged too: the longest is what was asked.
        let lines: Vec<&str> = text.lines().collect();
        let plans = lines.split(|line| !line.starts_with('\t'));
        let plans = plans.filter_map(|logged| {
            logged.iter().position(|line| line.contains("(cost=")).map(|at| &logged[at..])
        });
        let longest = plans.max_by_key(|plan| plan.len()).unwrap_or_default();
        Ok(longest.iter().map(|line| line.trim_start_matches('\t').to_owned()).collect())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let statements = Statements::default();
    let filter = tracing_subscriber::EnvFilter::new("off,sqlx::query=debug");
    tracing::subscriber::set_global_default(
        tracing_subscriber::registry().with(statements.clone().with_filter(filter)),
    )
    .context("watching the statements")?;
    for kind in [Kind::Sqlite, Kind::Postgres] {
        if options.database.is_none_or(|only| only == kind) {
            println!("{}", measure(kind, &options, &statements).await?);
        }
    }
    Ok(())
}
