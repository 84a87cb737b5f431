//! The one task that writes.
//!
//! Callers put requests into a bounded queue. The writer takes what waits, does all of it in one transaction that is
//! synchronised to disk once, and answers each caller only afterwards. A lone request is not kept waiting; only after a
//! batch with company does the writer wait a moment for more. Facts of all accounts in a batch share one load, one pass
//! of the rules and one flush; if the database refuses that, each commit is done alone, so that only the offender gets
//! the error. Other requests are jobs that run one after the other, each undone by itself if it fails.
//!
//! If the database itself is in trouble (busy, full, unreadable), the whole batch is undone and everybody gets
//! [`StoreError::Unavailable`]: nothing was stored, and the same call may be made again.
//!
//! A panic in a commit's rules or in a job is the end of that part and of nothing else: it is undone and its caller gets
//! [`StoreError::Refused`]. Should the task end all the same without being asked to, [`Writer::broken`] tells.
//!
//! Between batches the writer asks SQLite whether another process has changed the file (`PRAGMA data_version`, which on
//! this connection counts exactly that), and settles messages that have waited long enough.

use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use jiff::Timestamp;
use sqlx::{Connection, Sqlite, SqliteConnection, SqlitePool, Transaction, pool::PoolConnection};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{archive, column::failed, flush::flush, load};
use crate::{
    archive::{Keys, fact::ArchiveCommit, workspace::RuleSettings},
    store::{CommitOutcome, StoreError},
};

/// Requests that may wait; the next caller waits for room.
const QUEUE: usize = 1024;

/// Requests joined into one transaction.
const BATCH: usize = 512;

/// How often the file is looked at for changes by other processes.
const WATCH_EVERY: Duration = Duration::from_millis(20);

/// How often overdue messages are settled.
const SETTLE_EVERY: Duration = Duration::from_secs(15);

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Request {
    Archive { commit: ArchiveCommit, reply: Reply<CommitOutcome> },
    Job(Box<dyn Job>),
    Close(oneshot::Sender<()>),
}

/// Work on the open transaction, with its answer kept until the commit.
trait Job: Send {
    fn run<'a>(&'a mut self, connection: &'a mut SqliteConnection) -> BoxFuture<'a, Result<(), StoreError>>;
    /// Answers the caller: with what `run` brought if the transaction is durable.
    fn answer(self: Box<Self>, outcome: Result<(), StoreError>);
    /// The queue may have something to send afterwards.
    fn wakes(&self) -> bool;
}

struct Task<T, F> {
    work: Option<F>,
    result: Option<T>,
    reply: Reply<T>,
    wakes: bool,
}

impl<T, F> Job for Task<T, F>
where
    T: Send,
    F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, StoreError>> + Send,
{
    fn run<'a>(&'a mut self, connection: &'a mut SqliteConnection) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            if let Some(work) = self.work.take() {
                self.result = Some(work(connection).await?);
            }
            Ok(())
        })
    }

    fn answer(self: Box<Self>, outcome: Result<(), StoreError>) {
        let answer = match (outcome, self.result) {
            (Ok(()), Some(result)) => Ok(result),
            (Ok(()), None) => Err(StoreError::Closing),
            (Err(error), _) => Err(error),
        };
        // A caller that went away does not want to know.
        let _ = self.reply.send(answer);
    }

    fn wakes(&self) -> bool {
        self.wakes
    }
}

/// Handle of the writer's task.
#[derive(Debug)]
pub(super) struct Writer {
    requests: mpsc::Sender<Request>,
    /// Rows of the queue may be due.
    due: Arc<Notify>,
    /// The task has ended and nobody had asked it to.
    broken: CancellationToken,
}

impl Writer {
    /// Starts the task. `watches`: look for changes by other processes; `settles`: settle overdue messages.
    pub(super) fn start(
        pool: SqlitePool,
        commit_interval: Duration,
        rules: RuleSettings,
        watches: bool,
        settles: bool,
    ) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        let due = Arc::new(Notify::new());
        let task = WriterTask {
            pool,
            queue,
            commit_interval,
            rules,
            due: Arc::clone(&due),
            data_version: None,
            last_batch: 0,
        };
        let broken = CancellationToken::new();
        let tell = broken.clone();
        tokio::spawn(async move {
            if let Err(panic) = AssertUnwindSafe(task.run(watches, settles)).catch_unwind().await {
                let panic = panic_text(panic.as_ref());
                tracing::error!(panic, "the database's writer has ended; nothing can be stored any more");
                tell.cancel();
            }
        });
        Self { requests, due, broken }
    }

    /// Stores facts.
    pub(super) async fn archive(&self, commit: ArchiveCommit) -> Result<CommitOutcome, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Archive { commit, reply }).await.map_err(|_| StoreError::Closing)?;
        answer.await.map_err(|_| StoreError::Closing)?
    }

    /// Does `work` in the next transaction. `wakes`: afterwards rows of the queue may be due.
    pub(super) async fn run<T, F>(
        &self,
        operation: &'static str,
        wakes: bool,
        work: F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, StoreError>> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let task = Task { work: Some(work), result: None, reply, wakes };
        self.requests.send(Request::Job(Box::new(task))).await.map_err(|_| StoreError::Closing)?;
        let answer = answer.await.map_err(|_| StoreError::Closing)?;
        if let Err(error) = &answer {
            tracing::debug!(operation, %error, "a request to the database failed");
        }
        answer
    }

    /// Returns when rows of the queue may be due.
    pub(super) async fn due(&self) {
        self.due.notified().await;
    }

    /// Returns if the task has ended although nobody had asked it to.
    pub(super) async fn broken(&self) {
        self.broken.cancelled().await;
    }

    /// Rows of the queue may be due.
    pub(super) fn wake(&self) {
        self.due.notify_one();
    }

    /// Does what waits, and ends.
    pub(super) async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        if self.requests.send(Request::Close(reply)).await.is_ok() {
            let _ = closed.await;
        }
    }
}

struct WriterTask {
    pool: SqlitePool,
    queue: mpsc::Receiver<Request>,
    commit_interval: Duration,
    rules: RuleSettings,
    due: Arc<Notify>,
    data_version: Option<i64>,
    /// Size of the last batch: company is waited for only where there was some.
    last_batch: usize,
}

/// What became of the requests of a batch, before the commit.
struct Batch {
    commits: Vec<(ArchiveCommit, Reply<CommitOutcome>)>,
    jobs: Vec<Box<dyn Job>>,
}

/// Outcomes of a batch, to be told after the commit.
struct Done {
    commits: Vec<Result<CommitOutcome, StoreError>>,
    jobs: Vec<Result<(), StoreError>>,
    wakes: bool,
}

impl WriterTask {
    async fn run(mut self, watches: bool, settles: bool) {
        self.look_for_changes().await;
        let mut watch = interval(WATCH_EVERY);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut settle = interval(SETTLE_EVERY);
        settle.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked_at = Instant::now();
        loop {
            tokio::select! {
                biased;
                request = self.queue.recv() => {
                    let Some(request) = request else { break };
                    if let Some(closed) = self.batch_from(request).await {
                        self.queue.close();
                        self.pool.close().await;
                        let _ = closed.send(());
                        return;
                    }
                    if watches && looked_at.elapsed() >= WATCH_EVERY {
                        self.look_for_changes().await;
                        looked_at = Instant::now();
                    }
                }
                _ = watch.tick(), if watches => {
                    self.look_for_changes().await;
                    looked_at = Instant::now();
                }
                _ = settle.tick(), if settles => {
                    if let Err(error) = contained("settling messages", self.settle()).await {
                        tracing::warn!(error = %error_text(&error), "could not settle overdue messages");
                    }
                }
            }
        }
        self.pool.close().await;
    }

    /// Collects company for a request and does the batch. Who asked for the writer's end is handed back.
    async fn batch_from(&mut self, first: Request) -> Option<oneshot::Sender<()>> {
        let mut batch = Batch { commits: Vec::new(), jobs: Vec::new() };
        let mut closing = None;
        let mut take = |request: Request, batch: &mut Batch| match request {
            Request::Archive { commit, reply } => batch.commits.push((commit, reply)),
            Request::Job(job) => batch.jobs.push(job),
            Request::Close(reply) => closing = Some(reply),
        };
        take(first, &mut batch);
        let mut count = 1;
        while count < BATCH
            && let Ok(request) = self.queue.try_recv()
        {
            take(request, &mut batch);
            count += 1;
        }
        if self.last_batch > 1 && count < self.last_batch {
            let until = Instant::now() + self.commit_interval;
            while count < self.last_batch.min(BATCH)
                && let Ok(Some(request)) = timeout_at(until, self.queue.recv()).await
            {
                take(request, &mut batch);
                count += 1;
            }
        }
        self.last_batch = count;
        if !(batch.commits.is_empty() && batch.jobs.is_empty()) {
            self.commit(batch).await;
        }
        closing
    }

    async fn commit(&mut self, mut batch: Batch) {
        match self.transaction(&mut batch).await {
            Ok(done) => {
                if done.wakes {
                    self.due.notify_one();
                }
                for ((_, reply), outcome) in batch.commits.into_iter().zip(done.commits) {
                    let _ = reply.send(outcome);
                }
                for (job, outcome) in batch.jobs.into_iter().zip(done.jobs) {
                    job.answer(outcome);
                }
            }
            Err(error) => {
                tracing::warn!(error = %error_text(&error), "the database did not take a transaction");
                for (_, reply) in batch.commits {
                    let _ = reply.send(Err(same_trouble(&error)));
                }
                for job in batch.jobs {
                    job.answer(Err(same_trouble(&error)));
                }
            }
        }
    }

    /// Does a batch in one transaction. An error means that nothing of it was stored.
    async fn transaction(&mut self, batch: &mut Batch) -> Result<Done, StoreError> {
        let failed = failed("committing");
        let mut connection = self.pool.acquire().await.map_err(&failed)?;
        let done = self.on_connection(&mut connection, batch).await;
        if done.is_err() {
            // SQLite may have ended the transaction by itself: do not guess, begin with a new connection.
            discard(connection).await;
        }
        done
    }

    async fn on_connection(
        &self,
        connection: &mut PoolConnection<Sqlite>,
        batch: &mut Batch,
    ) -> Result<Done, StoreError> {
        let failed = failed("committing");
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        let mut done = Done { commits: Vec::new(), jobs: Vec::new(), wakes: false };
        let commits: Vec<&ArchiveCommit> = batch.commits.iter().map(|(commit, _)| commit).collect();
        self.archive(&mut transaction, &commits, &mut done).await?;
        for job in &mut batch.jobs {
            savepoint(&mut transaction).await?;
            let outcome = contained("a request", job.run(&mut transaction)).await;
            release(&mut transaction, &outcome).await?;
            done.wakes |= job.wakes();
            done.jobs.push(outcome);
        }
        transaction.commit().await.map_err(&failed)?;
        Ok(done)
    }

    async fn archive(
        &self,
        transaction: &mut Transaction<'_, Sqlite>,
        commits: &[&ArchiveCommit],
        done: &mut Done,
    ) -> Result<(), StoreError> {
        if commits.is_empty() {
            return Ok(());
        }
        savepoint(transaction).await?;
        let together = contained("storing facts", self.archive_together(transaction, commits, done)).await;
        release(transaction, &together).await?;
        if together.is_ok() {
            return Ok(());
        }
        // Somebody's part was refused: each alone, so that only the offender fails.
        done.commits.clear();
        for commit in commits {
            savepoint(transaction).await?;
            let alone = contained("storing facts", self.archive_together(transaction, &[commit], done)).await;
            release(transaction, &alone).await?;
            if let Err(error) = alone {
                done.commits.push(Err(error));
            }
        }
        Ok(())
    }

    async fn archive_together(
        &self,
        connection: &mut SqliteConnection,
        commits: &[&ArchiveCommit],
        done: &mut Done,
    ) -> Result<(), StoreError> {
        let failed = failed("storing facts");
        let keys = Keys::of(commits.iter().copied());
        let mut workspace = load::workspace(connection, &keys, self.rules).await.map_err(&failed)?;
        let now = Timestamp::now();
        let mut outcomes = Vec::with_capacity(commits.len());
        for commit in commits {
            outcomes.push(match workspace.check(commit) {
                Ok(()) => Ok(workspace.apply(commit, now.max(commit.received_at))),
                Err(unknown) => Err(StoreError::Refused {
                    operation: "storing facts",
                    source: sqlx::Error::Protocol(unknown.to_string()),
                }),
            });
        }
        let changes = workspace.changes();
        flush(connection, &changes).await.map_err(&failed)?;
        done.wakes |= !changes.outbox.is_empty();
        done.commits.extend(outcomes);
        Ok(())
    }

    async fn look_for_changes(&mut self) {
        let version = match self.pool.acquire().await {
            Ok(mut connection) => {
                sqlx::query_scalar::<_, i64>("PRAGMA data_version").fetch_one(&mut *connection).await
            }
            Err(error) => Err(error),
        };
        match version {
            Ok(version) => {
                let changed = self.data_version.is_some_and(|known| known != version);
                self.data_version = Some(version);
                if changed {
                    self.due.notify_one();
                }
            }
            // The next transaction says more about it.
            Err(error) => tracing::debug!(%error, "could not look for changes"),
        }
    }

    async fn settle(&self) -> Result<(), StoreError> {
        let failed = failed("settling messages");
        let mut connection = self.pool.acquire().await.map_err(&failed)?;
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        archive::settle_overdue(&mut transaction, self.rules, Timestamp::now()).await?;
        transaction.commit().await.map_err(&failed)
    }
}

/// Turns a panic into a refusal. Whatever had been done until then is still to be undone.
async fn contained<T>(
    operation: &'static str,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    // What is behind the references is undone with the savepoint, or dropped with the batch.
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
        let panic = panic_text(panic.as_ref());
        tracing::error!(operation, panic, "a panic in a transaction; that part is undone");
        Err(StoreError::Refused { operation, source: sqlx::Error::Protocol(format!("it panicked: {panic}")) })
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a word")
}

async fn savepoint(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    sqlx::query("SAVEPOINT part").execute(connection).await.map_err(failed("committing")).map(drop)
}

/// Keeps or undoes what was done since [`savepoint`]. Trouble of the database itself undoes the whole transaction.
async fn release<T>(
    connection: &mut SqliteConnection,
    outcome: &Result<T, StoreError>,
) -> Result<(), StoreError> {
    match outcome {
        Ok(_) => {}
        Err(error @ (StoreError::Unavailable { .. } | StoreError::Locked { .. })) => {
            return Err(same_trouble(error));
        }
        Err(_) => {
            sqlx::query("ROLLBACK TO part").execute(&mut *connection).await.map_err(failed("committing"))?;
        }
    }
    sqlx::query("RELEASE part").execute(connection).await.map_err(failed("committing")).map(drop)
}

async fn discard(connection: PoolConnection<Sqlite>) {
    if let Err(error) = connection.detach().close().await {
        tracing::debug!(%error, "closing a connection after trouble");
    }
}

/// The trouble of a whole batch, told to one of those who were in it: nothing was stored.
fn same_trouble(error: &StoreError) -> StoreError {
    let source = sqlx::Error::Protocol(error_text(error));
    match error {
        StoreError::Locked { operation, .. } => StoreError::Locked { operation, source },
        StoreError::Unavailable { operation, .. } => StoreError::Unavailable { operation, source },
        _ => StoreError::Unavailable { operation: "committing", source },
    }
}

fn error_text(error: &StoreError) -> String {
    match error {
        StoreError::Unavailable { source, .. }
        | StoreError::Locked { source, .. }
        | StoreError::Refused { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::retry::RetryPolicy;

    const RULES: RuleSettings = RuleSettings {
        retry_uncertain: false,
        plain_from_html: ToOwned::to_owned,
        retry: RetryPolicy { base: Duration::from_secs(1), cap: Duration::from_secs(1) },
        max_attempts: 1,
    };

    /// Panics where nothing contains it: outside the transaction.
    struct Bomb;

    impl Job for Bomb {
        fn run<'a>(&'a mut self, _: &'a mut SqliteConnection) -> BoxFuture<'a, Result<(), StoreError>> {
            Box::pin(async { Ok(()) })
        }

        fn answer(self: Box<Self>, _: Result<(), StoreError>) {
            panic!("the test wants it");
        }

        fn wakes(&self) -> bool {
            false
        }
    }

    #[tokio::test]
    async fn a_writer_that_dies_tells_and_takes_nothing_more() {
        let pool = SqlitePool::connect("sqlite::memory:").await.unwrap();
        let writer = Writer::start(pool, Duration::ZERO, RULES, false, false);
        assert!(writer.run("a job", false, |_| Box::pin(async { Ok(1) })).await.is_ok());
        let panicking = writer.run("a job", false, |_| Box::pin(async { panic!("contained") }));
        let refused: StoreError = Result::<(), _>::unwrap_err(panicking.await);
        assert!(error_text(&refused).contains("contained"), "{refused:?}");
        assert!(writer.broken().now_or_never().is_none(), "one job's panic is no end");

        writer.requests.send(Request::Job(Box::new(Bomb))).await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), writer.broken()).await.unwrap();
        let refused = writer.run("a job", false, |_| Box::pin(async { Ok(()) })).await;
        assert!(matches!(refused, Err(StoreError::Closing)));
        writer.close().await;
    }

    #[tokio::test]
    async fn a_writer_that_is_closed_is_not_broken() {
        let pool = SqlitePool::connect("sqlite::memory:").await.unwrap();
        let writer = Writer::start(pool, Duration::ZERO, RULES, false, false);
        writer.close().await;
        tokio::task::yield_now().await;
        assert!(writer.broken().now_or_never().is_none());
    }
}
