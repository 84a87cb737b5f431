//! The parts that every message goes through, each alone: `cargo bench --bench micro`.
//!
//! Databases are new ones in a folder of their own; PostgreSQL is started from the installed programs. `cargo test --bench
//! micro` does everything once and measures nothing; the queue has fewer finished rows then.

#[path = "../tests/support/postgres.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod postgres;

use std::{
    env, fmt,
    sync::{LazyLock, Mutex, PoisonError},
};

use divan::{Bencher, black_box, counter::BytesCount, counter::ItemsCount};
use postgres::{OwnServer, PostgresDatabase};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use ucwa_relay::{
    bench::{Archivists, Queue},
    ucwa::{data_uri, json, xml},
};

/// Accounts that commit at the same time, which makes a batch of as many messages.
const ACCOUNTS: usize = 100;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
static SERVER: LazyLock<OwnServer> = LazyLock::new(|| OwnServer::start_in(&env::temp_dir(), &[]));

fn main() {
    divan::main();
}

// ------------------------------------------------------------------------------------------------ reading

const XML: &str = include_str!("../tests/fixtures/ucwa/events.conversation.xml");
const JSON: &str = include_str!("../tests/fixtures/ucwa/events.conversation.json");

#[divan::bench]
fn events_from_xml(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::of_str(XML)).bench(|| xml::parse_events(black_box(XML)));
}

#[divan::bench]
fn events_from_json(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::of_str(JSON)).bench(|| json::parse_events(black_box(JSON)));
}

#[divan::bench(args = [20, 2_000])]
fn text_from_a_data_uri(bencher: Bencher<'_, '_>, words: usize) {
    let uri = format!("data:text/plain;charset=utf-8,{}", "Gr%c3%bc%c3%9fe+".repeat(words));
    bencher.counter(BytesCount::of_str(&uri)).bench(|| data_uri::decode(black_box(&uri)));
}

// ------------------------------------------------------------------------------------------------ the store

#[derive(Debug, Clone, Copy)]
enum Kind {
    Sqlite,
    Postgres,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Sqlite => "SQLite",
            Self::Postgres => "PostgreSQL",
        })
    }
}

/// An empty database, gone with this.
enum Place {
    Sqlite(TempDir),
    Postgres(PostgresDatabase),
}

impl Place {
    fn new(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => Self::Sqlite(TempDir::new().expect("a temporary folder")),
            Kind::Postgres => Self::Postgres(RUNTIME.block_on(PostgresDatabase::on(&SERVER.admin_url()))),
        }
    }

    fn url(&self) -> String {
        match self {
            Self::Sqlite(folder) => format!("sqlite://{}", folder.path().join("micro.db").display()),
            Self::Postgres(database) => database.url().to_owned(),
        }
    }
}

#[divan::bench(args = [Kind::Sqlite, Kind::Postgres], sample_count = 50, sample_size = 1)]
fn a_batch_of_100_messages(bencher: Bencher<'_, '_>, kind: Kind) {
    let place = Place::new(kind);
    let archivists = RUNTIME.block_on(Archivists::sign_in(&place.url(), ACCOUNTS)).expect("accounts");
    let archivists = Mutex::new(archivists);
    bencher.counter(ItemsCount::new(ACCOUNTS)).bench(|| {
        let mut archivists = archivists.lock().unwrap_or_else(PoisonError::into_inner);
        RUNTIME.block_on(archivists.archive(1)).expect("the store takes messages");
    });
    RUNTIME.block_on(archivists.into_inner().unwrap_or_else(PoisonError::into_inner).close());
}

/// Rows that are finished.
const FEW: usize = 10;

/// A million, or enough to see that everything works.
fn many() -> usize {
    let asked = |for_what: &str| env::args().any(|argument| argument == for_what);
    // `cargo bench` says that it measures, `cargo test` says nothing.
    if asked("--bench") && !asked("--test") { 1_000_000 } else { 1_000 }
}

#[divan::bench(
    args = [(Kind::Sqlite, FEW), (Kind::Sqlite, many()), (Kind::Postgres, FEW), (Kind::Postgres, many())]
        .map(|(kind, finished)| Beside { kind, finished }),
    sample_count = 30,
    sample_size = 1
)]
fn claiming_100_rows_beside_finished_ones(bencher: Bencher<'_, '_>, beside: Beside) {
    let place = Place::new(beside.kind);
    let mut queue = RUNTIME.block_on(Queue::open(&place.url())).expect("a queue");
    RUNTIME.block_on(queue.finish_rows(beside.finished)).expect("finished rows");
    let queue = Mutex::new(queue);
    let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    bencher
        .counter(ItemsCount::new(100_usize))
        .with_inputs(|| {
            let mut queue = lock();
            RUNTIME.block_on(queue.finish_claimed()).expect("what was claimed before is finished");
            RUNTIME.block_on(queue.fill(1)).expect("rows to claim");
        })
        .bench_values(|()| RUNTIME.block_on(lock().claim()).expect("rows are claimed"));
    RUNTIME.block_on(queue.into_inner().unwrap_or_else(PoisonError::into_inner).close());
}

#[derive(Debug, Clone, Copy)]
struct Beside {
    kind: Kind,
    finished: usize,
}

impl fmt::Display for Beside {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}, {}", self.kind, self.finished)
    }
}
