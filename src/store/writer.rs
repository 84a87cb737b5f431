//! The one task that writes, whatever the dialect.
//!
//! Callers put requests into a bounded queue. The writer takes what waits, does all of it in one transaction that is
//! synchronised to disk once, and answers each caller only afterwards. A lone request is not kept waiting; only after a
//! batch with company does the writer wait a moment for more. Facts of all accounts in a batch share one load, one pass
//! of the rules and one flush; if the database refuses that, each commit is done alone, so that only the offender gets
//! the error. Other requests are jobs that run one after the other, each undone by itself if it fails.
//!
//! If the database itself is in trouble (busy, full, unreadable), the whole batch is undone and everybody gets
//! [`StoreError::Unavailable`]: nothing was stored, and the same call may be made again. If only some row can't be had,
//! because another program's transaction holds it, only those whose parts need it get that error.
//!
//! Where several servers share the database, commits about accounts that this one does not hold any more get
//! [`StoreError::Fenced`], judged in the transaction itself; the other commits of the batch are not touched by that.
//!
//! A panic in a commit's rules or in a job is the end of that part and of nothing else: it is undone and its caller gets
//! [`StoreError::Refused`]. Should the task end all the same without being asked to, [`Writer::broken`] tells.
//!
//! A dialect may say that trouble passes quickly ([`Dialect::RETRY_AFTER`]): then the batch is done again before anybody is
//! told. And it may lose the answer to a `COMMIT`: then the writer finds out what became of the transaction by its number
//! ([`Dialect::was_stored`]), however long that takes, before it answers anybody. So no request is ever done twice.
//!
//! Between batches the writer looks for changes by other processes where only it can ([`Dialect::changed`]), and settles
//! messages that have waited long enough.

use std::{any::Any, collections::BTreeSet, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use jiff::Timestamp;
use sqlx::{Connection as _, Database, Pool, Transaction, pool::PoolConnection};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    health::Health,
    trouble::{failed, is_of_single_rows},
};
use crate::{
    archive::{
        Changes, Keys, PATIENCE, Workspace,
        fact::{ArchiveCommit, Direction, Fact, SendFact, SendOutcome},
        row::MessageSource,
        workspace::RuleSettings,
    },
    identifiers::{AccountId, OperationId, OutboxId, SessionId},
    metrics,
    store::{CommitOutcome, StoreError},
};

/// A dialect's connection.
pub(super) type Connection<D> = <<D as Dialect>::Database as Database>::Connection;

/// Which messages to settle.
#[derive(Debug, Clone, Copy)]
pub(super) enum Waiting<'a> {
    /// Repetition, receipt or any event did not come in time; of these accounts, or of all.
    ArchivedBefore(Timestamp, Option<&'a [AccountId]>),
    /// The session ends.
    OfSession(SessionId),
}

/// A call with text that was accepted, and of which no event told.
#[derive(Debug)]
pub(super) struct UnplacedCall {
    /// The row.
    pub(super) outbox: OutboxId,
    /// Its attempt.
    pub(super) operation_id: OperationId,
    /// Whose.
    pub(super) account: AccountId,
    /// In which application.
    pub(super) session: SessionId,
    /// The invitation.
    pub(super) href: String,
}

/// What the writer needs of a dialect: rows of a batch in and out, and how transactions begin and end.
pub(super) trait Dialect: Send + Sync + 'static {
    /// The driver.
    type Database: Database;
    /// After passing trouble a batch is done again so many times, each time after such a while, before its callers are told.
    const RETRY_AFTER: &'static [Duration];
    /// Said before facts are stored: takes what all writers of the database take turns for. A part that is undone does not
    /// give it back, and whoever has to wait for it too long does so with the whole batch.
    const TAKE_TURN: Option<&'static str>;
    /// Said within a transaction once a part of it has waited in vain for a row: the others do not wait as long, since
    /// everybody waits with them.
    const HURRY: Option<&'static str>;
    /// Said before a `COMMIT`, and refused in a transaction of which a statement has failed: there the database answers the
    /// `COMMIT` well and undoes everything.
    const IS_WHOLE: Option<&'static str>;
    /// Makes the database forget how it goes about the statements that are kept prepared. It decided that when the tables
    /// were smaller, perhaps empty.
    const FORGET_PLANS: Option<&'static str>;
    /// No transaction takes longer, unless the database is out of reach and nobody says so.
    const TRANSACTION_LIMIT: Duration;

    /// Knows which accounts this process may write about, where several share the database.
    type Fence: Clone + Send + Sync + 'static;

    /// See [`Dialect::Fence`].
    fn fence(&self) -> Self::Fence;
    /// Which of these accounts this process does not hold under the epoch given. The others stay its own until the
    /// transaction ends.
    fn refused(
        fence: &Self::Fence,
        connection: &mut Connection<Self>,
        presented: &BTreeSet<(AccountId, i64)>,
    ) -> impl Future<Output = Result<BTreeSet<(AccountId, i64)>, sqlx::Error>> + Send;
    /// The accounts that this process holds, which stay its own until the transaction ends; `None`: all there are.
    fn held(
        fence: &Self::Fence,
        connection: &mut Connection<Self>,
    ) -> impl Future<Output = Result<Option<Vec<AccountId>>, sqlx::Error>> + Send;
    /// Begins a transaction that writes. `number` is never used again by this writer.
    fn begin<'c>(
        &self,
        connection: &'c mut Connection<Self>,
        number: i64,
    ) -> impl Future<Output = Result<Transaction<'c, Self::Database>, sqlx::Error>> + Send;
    /// Does a statement without parameters.
    fn execute(
        connection: &mut Connection<Self>,
        statement: &'static str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
    /// Whether the transaction with this number is durable, asked after its `COMMIT` was not answered well. An error
    /// means that nobody can tell yet.
    fn was_stored(
        &self,
        pool: &Pool<Self::Database>,
        number: i64,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;
    /// Everything that commits with these keys may read or change.
    fn load(
        connection: &mut Connection<Self>,
        keys: &Keys,
        rules: RuleSettings,
    ) -> impl Future<Output = Result<Workspace, sqlx::Error>> + Send;
    /// Messages that wait, with what settling them needs.
    fn load_waiting(
        connection: &mut Connection<Self>,
        rules: RuleSettings,
        which: Waiting<'_>,
    ) -> impl Future<Output = Result<Workspace, sqlx::Error>> + Send;
    /// Rows of the queue whose call the server accepted and whose events never came: no conversation is known of them.
    fn load_unplaced(
        connection: &mut Connection<Self>,
        which: Waiting<'_>,
    ) -> impl Future<Output = Result<Vec<UnplacedCall>, sqlx::Error>> + Send;
    /// Writes what a batch changed.
    fn flush(
        connection: &mut Connection<Self>,
        changes: &Changes<'_>,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
    /// Whether another process has changed the database since this was asked last; only asked where the writer watches.
    fn changed(
        &mut self,
        pool: &Pool<Self::Database>,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;
}

/// Settles what has waited long enough, of the accounts that this process holds.
pub(super) async fn settle_overdue<D: Dialect>(
    connection: &mut Connection<D>,
    fence: &D::Fence,
    rules: RuleSettings,
    now: Timestamp,
) -> Result<(), StoreError> {
    let failed = failed("settling messages");
    let held = D::held(fence, connection).await.map_err(&failed)?;
    let overdue = Waiting::ArchivedBefore(now - PATIENCE, held.as_deref());
    archive_unplaced::<D>(connection, rules, overdue, now).await?;
    let mut workspace = D::load_waiting(connection, rules, overdue).await.map_err(&failed)?;
    workspace.settle_overdue(now);
    D::flush(connection, &workspace.changes()).await.map_err(&failed)
}

/// The text of a call is archived in the conversation that the call's events name. Where the server accepted the call and
/// its events never came (their application is gone, or they were in a response that nobody can read), the text is
/// archived in a conversation of its own, which goes by the address of the call.
pub(super) async fn archive_unplaced<D: Dialect>(
    connection: &mut Connection<D>,
    rules: RuleSettings,
    which: Waiting<'_>,
    now: Timestamp,
) -> Result<(), StoreError> {
    let failed = failed("archiving accepted calls");
    let commits: Vec<ArchiveCommit> = D::load_unplaced(connection, which)
        .await
        .map_err(&failed)?
        .into_iter()
        .map(|call| ArchiveCommit {
            account: call.account,
            session: call.session,
            epoch: 0,
            cursor: None,
            received_at: now,
            facts: vec![Fact::Send(SendFact {
                outbox: call.outbox,
                operation_id: call.operation_id,
                outcome: SendOutcome::MessageAccepted {
                    conversation_href: call.href,
                    message_href: None,
                    as_plain: false,
                    not_reached: Vec::new(),
                },
            })],
        })
        .collect();
    if commits.is_empty() {
        return Ok(());
    }
    let stored = store_facts::<D>(connection, rules, &commits.iter().collect::<Vec<_>>()).await?;
    stored.outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))
}

/// Requests that may wait; the next caller waits for room.
const QUEUE: usize = 1024;

/// Requests joined into one transaction.
const BATCH: usize = 512;

/// How often is looked for changes by other processes.
const WATCH_EVERY: Duration = Duration::from_millis(20);

/// Trouble that passes quickly is told by the database within this time.
const PASSES_WITHIN: Duration = Duration::from_secs(3);

/// How long may be looked for the reason why there is no connection.
const ASKS_WHY_FOR: Duration = Duration::from_secs(3);

/// Plans are forgotten when as much was written as before they were made, this much at first, and now and then as long as
/// anything is written.
const PLANS_LAST_FOR_ROWS: usize = 256;
const PLANS_LAST_FOR: Duration = Duration::from_secs(60);

/// How often overdue messages are settled.
const SETTLE_EVERY: Duration = Duration::from_secs(15);

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Request<D: Dialect> {
    Archive { commit: ArchiveCommit, reply: Reply<CommitOutcome> },
    Job(Box<dyn Job<D>>),
    Close(oneshot::Sender<()>),
}

/// Work on the open transaction, with its answer kept until the commit.
trait Job<D: Dialect>: Send {
    /// May be called again after the transaction has failed.
    fn run<'a>(&'a mut self, connection: &'a mut Connection<D>) -> BoxFuture<'a, Result<(), StoreError>>;
    /// Answers the caller: with what `run` brought if the transaction is durable.
    fn answer(self: Box<Self>, outcome: Result<(), StoreError>);
    /// The queue may have something to send afterwards.
    fn wakes(&self) -> bool;
}

struct Task<T, F> {
    work: F,
    result: Option<T>,
    reply: Reply<T>,
    wakes: bool,
}

impl<D, T, F> Job<D> for Task<T, F>
where
    D: Dialect,
    T: Send,
    F: for<'c> FnOnce(&'c mut Connection<D>) -> BoxFuture<'c, Result<T, StoreError>> + Clone + Send,
{
    fn run<'a>(&'a mut self, connection: &'a mut Connection<D>) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            self.result = None;
            let work = self.work.clone();
            self.result = Some(work(connection).await?);
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

/// The writer's own job.
struct Settling<D: Dialect> {
    rules: RuleSettings,
    fence: D::Fence,
}

impl<D: Dialect> Job<D> for Settling<D> {
    fn run<'a>(&'a mut self, connection: &'a mut Connection<D>) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(settle_overdue::<D>(connection, &self.fence, self.rules, Timestamp::now()))
    }

    fn answer(self: Box<Self>, _: Result<(), StoreError>) {}

    fn wakes(&self) -> bool {
        false
    }
}

/// Handle of the writer's task.
pub(super) struct Writer<D: Dialect> {
    requests: mpsc::Sender<Request<D>>,
    /// Rows of the queue may be due.
    due: Arc<Notify>,
    /// The task has ended and nobody had asked it to.
    broken: CancellationToken,
    /// Somebody waits for the writer's end: it does not wait for the database any more.
    closing: CancellationToken,
    health: Arc<Health>,
}

impl<D: Dialect> Writer<D> {
    /// Starts the task. `watches`: look for changes by other processes; `settles`: settle overdue messages.
    pub(super) fn start(
        dialect: D,
        pool: Pool<D::Database>,
        commit_interval: Duration,
        rules: RuleSettings,
        watches: bool,
        settles: bool,
    ) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        let due = Arc::new(Notify::new());
        let closing = CancellationToken::new();
        let health = Arc::<Health>::default();
        let task = WriterTask {
            dialect,
            pool,
            queue,
            commit_interval,
            rules,
            due: Arc::clone(&due),
            closing: closing.clone(),
            health: Arc::clone(&health),
            transactions: 0,
            last_batch: 0,
            plans: Plans::made_now(),
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
        Self { requests, due, broken, closing, health }
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
        F: for<'c> FnOnce(&'c mut Connection<D>) -> BoxFuture<'c, Result<T, StoreError>>
            + Clone
            + Send
            + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let task = Task { work, result: None, reply, wakes };
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

    /// For whoever else learns that rows of the queue may be due.
    pub(super) fn wakes(&self) -> Arc<Notify> {
        Arc::clone(&self.due)
    }

    /// Returns if the task has ended although nobody had asked it to.
    pub(super) async fn broken(&self) {
        self.broken.cancelled().await;
    }

    /// What keeps the database from taking what is written, in words.
    pub(super) fn problem(&self) -> Option<String> {
        self.health.problem()
    }

    /// Rows of the queue may be due.
    pub(super) fn wake(&self) {
        self.due.notify_one();
    }

    /// Does what waits, and ends.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        let (reply, closed) = oneshot::channel();
        if self.requests.send(Request::Close(reply)).await.is_ok() {
            let _ = closed.await;
        }
    }
}

struct WriterTask<D: Dialect> {
    dialect: D,
    pool: Pool<D::Database>,
    queue: mpsc::Receiver<Request<D>>,
    commit_interval: Duration,
    rules: RuleSettings,
    due: Arc<Notify>,
    closing: CancellationToken,
    health: Arc<Health>,
    /// Transactions begun so far: the number of the latest.
    transactions: i64,
    /// Size of the last batch: company is waited for only where there was some.
    last_batch: usize,
    plans: Plans,
}

/// When the database's plans are out of date.
#[derive(Debug)]
struct Plans {
    made_at: Instant,
    /// Rows and requests since the start, and how many they were when the plans were made.
    written: usize,
    written_before: usize,
}

impl Plans {
    fn made_now() -> Self {
        Self { made_at: Instant::now(), written: 0, written_before: 0 }
    }

    /// Whether it is time for new ones, which is taken as done then.
    fn are_outdated(&mut self, now: Instant) -> bool {
        let since = self.written - self.written_before;
        let outdated = since >= self.written_before.max(PLANS_LAST_FOR_ROWS)
            || (since > 0 && now.duration_since(self.made_at) >= PLANS_LAST_FOR);
        if outdated {
            (self.made_at, self.written_before) = (now, self.written);
        }
        outdated
    }
}

/// What became of the requests of a batch, before the commit.
struct Batch<D: Dialect> {
    commits: Vec<(ArchiveCommit, Reply<CommitOutcome>)>,
    jobs: Vec<Box<dyn Job<D>>>,
}

/// Outcomes of a batch, to be told after the commit.
#[derive(Default)]
struct Done {
    commits: Vec<Result<CommitOutcome, StoreError>>,
    jobs: Vec<Result<(), StoreError>>,
    wakes: bool,
    /// Rows that the commits changed.
    rows: usize,
    /// What the commits brought into `messages`.
    messages: Brought,
}

/// How a transaction ended.
enum Ended {
    Stored(Done),
    /// Nothing of it was stored.
    Undone(StoreError),
    /// The `COMMIT` was not answered well; with what is to be told if it is durable all the same.
    Unknown(sqlx::Error, Done),
}

/// A part of a batch was refused.
struct Spoilt {
    /// It had waited in vain for a row.
    by_waiting: bool,
}

/// Whether the parts of a batch are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    Together,
    Apart,
}

impl<D: Dialect> WriterTask<D> {
    async fn run(mut self, watches: bool, settles: bool) {
        self.look_for_changes().await;
        let mut watch = interval(WATCH_EVERY);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut settle = interval(SETTLE_EVERY);
        settle.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut looked_at, mut settled_at) = (Instant::now(), Instant::now());
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
                    if settles && settled_at.elapsed() >= SETTLE_EVERY {
                        self.settle().await;
                        settled_at = Instant::now();
                    }
                }
                _ = watch.tick(), if watches => {
                    self.look_for_changes().await;
                    looked_at = Instant::now();
                }
                _ = settle.tick(), if settles => {
                    self.settle().await;
                    settled_at = Instant::now();
                }
            }
        }
        self.pool.close().await;
    }

    /// Collects company for a request and does the batch. Who asked for the writer's end is handed back.
    async fn batch_from(&mut self, first: Request<D>) -> Option<oneshot::Sender<()>> {
        let mut batch = Batch { commits: Vec::new(), jobs: Vec::new() };
        let mut closing = None;
        let mut take = |request: Request<D>, batch: &mut Batch<D>| match request {
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

    async fn commit(&mut self, mut batch: Batch<D>) {
        let began = Instant::now();
        match self.with_patience(&mut batch).await {
            Ok(done) => {
                self.health.took(!done.commits.is_empty());
                self.plans.written = self.plans.written.saturating_add(done.rows + done.jobs.len());
                if !done.commits.is_empty() {
                    metrics::time_commit(began.elapsed(), done.rows);
                }
                count_archived(&done.messages);
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
                self.health.refused(error_text(&error));
                for (_, reply) in batch.commits {
                    let _ = reply.send(Err(same_trouble(&error)));
                }
                for job in batch.jobs {
                    job.answer(Err(same_trouble(&error)));
                }
            }
        }
    }

    /// Does a batch, again if trouble passes quickly. An error means that nothing of it was stored.
    async fn with_patience(&mut self, batch: &mut Batch<D>) -> Result<Done, StoreError> {
        for pause in D::RETRY_AFTER {
            let began = Instant::now();
            match self.transaction(batch).await {
                // What took long to fail does not pass quickly.
                Err(error) if !self.closing.is_cancelled() && began.elapsed() < PASSES_WITHIN => {
                    tracing::debug!(error = %error_text(&error), "a transaction failed; it is done again");
                    sleep(*pause).await;
                }
                done => return done,
            }
        }
        self.transaction(batch).await
    }

    /// Does a batch in one transaction. An error means that nothing of it was stored.
    async fn transaction(&mut self, batch: &mut Batch<D>) -> Result<Done, StoreError> {
        let failed = failed("committing");
        self.transactions += 1;
        let number = self.transactions;
        let mut connection = match self.pool.acquire().await {
            Ok(connection) => connection,
            Err(error) => return Err(failed(why_unreachable(&self.pool, error).await)),
        };
        let forget_plans = D::FORGET_PLANS.filter(|_| self.plans.are_outdated(Instant::now()));
        let done = match self.together(&mut connection, number, forget_plans, batch).await {
            Ok(done) => done,
            Err(spoilt) => self.apart(&mut connection, number, batch, &spoilt).await,
        };
        if matches!(done, Ended::Stored(_)) {
            drop(connection);
        } else {
            // The database may have ended the transaction by itself: do not guess, begin with a new connection.
            discard(connection).await;
        }
        match done {
            Ended::Stored(done) => Ok(done),
            Ended::Undone(error) => Err(error),
            Ended::Unknown(_, done) if self.was_stored(number).await => Ok(done),
            Ended::Unknown(error, _) => Err(failed(error)),
        }
    }

    /// Finds out what became of a transaction whose `COMMIT` was not answered well. Nobody else's request is served
    /// before, since none could be.
    async fn was_stored(&self, number: i64) -> bool {
        let mut pause = Duration::from_millis(50);
        loop {
            let problem = match in_time::<D, _>(self.dialect.was_stored(&self.pool, number)).await {
                Ok(stored) => return stored,
                Err(problem) => problem,
            };
            let problem = why_unreachable(&self.pool, problem).await;
            self.health.refused(problem.to_string());
            tokio::select! {
                // Callers are told to try again; whatever they send again has the same keys.
                () = self.closing.cancelled() => return false,
                () = sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
            }
        }
    }

    /// Does a batch as one part, since hardly ever is a part of one refused: keeping them apart costs, and on SQLite every
    /// page that is changed would be copied first.
    async fn together(
        &self,
        connection: &mut PoolConnection<D::Database>,
        number: i64,
        forget_plans: Option<&'static str>,
        batch: &mut Batch<D>,
    ) -> Result<Ended, Spoilt> {
        let run = async {
            if let Some(forget_plans) = forget_plans {
                D::execute(connection, forget_plans).await.map_err(failed("committing"))?;
            }
            let mut transaction =
                self.dialect.begin(connection, number).await.map_err(failed("committing"))?;
            let done = self.all_parts(&mut transaction, batch).await;
            Ok((transaction, done))
        };
        let (transaction, error) = match timeout(D::TRANSACTION_LIMIT, run).await {
            Err(_) => return Ok(Ended::Undone(failed("committing")(too_long::<D>()))),
            Ok(Err(error)) => return Ok(Ended::Undone(error)),
            Ok(Ok((transaction, Ok(done)))) => return Ok(committed::<D>(transaction, done).await),
            Ok(Ok((transaction, Err(error)))) => (transaction, error),
        };
        let Some(spoilt) = of_one_part(&error) else { return Ok(Ended::Undone(error)) };
        match in_time::<D, _>(transaction.rollback()).await {
            Ok(()) => Err(spoilt),
            Err(error) => Ok(Ended::Undone(failed("committing")(error))),
        }
    }

    /// Does every part of a batch; the first error is that of the whole.
    async fn all_parts(
        &self,
        transaction: &mut Transaction<'_, D::Database>,
        batch: &mut Batch<D>,
    ) -> Result<Done, StoreError> {
        let mut done = Done::default();
        let commits: Vec<&ArchiveCommit> = batch.commits.iter().map(|(commit, _)| commit).collect();
        self.archive(transaction, &commits, &mut done, Keep::Together).await?;
        for job in &mut batch.jobs {
            contained("a request", job.run(transaction)).await?;
            done.wakes |= job.wakes();
            done.jobs.push(Ok(()));
        }
        if let Some(is_whole) = D::IS_WHOLE {
            D::execute(transaction, is_whole).await.map_err(failed("committing"))?;
        }
        Ok(done)
    }

    /// Does a batch so that whoever's part is refused spoils nobody else's.
    async fn apart(
        &self,
        connection: &mut PoolConnection<D::Database>,
        number: i64,
        batch: &mut Batch<D>,
        spoilt: &Spoilt,
    ) -> Ended {
        let run = async {
            let mut transaction =
                self.dialect.begin(connection, number).await.map_err(failed("committing"))?;
            if let (true, Some(hurry)) = (spoilt.by_waiting, D::HURRY) {
                D::execute(&mut transaction, hurry).await.map_err(failed("committing"))?;
            }
            let mut done = Done::default();
            let commits: Vec<&ArchiveCommit> = batch.commits.iter().map(|(commit, _)| commit).collect();
            self.archive(&mut transaction, &commits, &mut done, Keep::Apart).await?;
            for job in &mut batch.jobs {
                savepoint::<D>(&mut transaction).await?;
                let outcome = contained("a request", job.run(&mut transaction)).await;
                release::<D, _>(&mut transaction, &outcome).await?;
                done.wakes |= job.wakes();
                done.jobs.push(outcome);
            }
            Ok((transaction, done))
        };
        match timeout(D::TRANSACTION_LIMIT, run).await {
            Err(_) => Ended::Undone(failed("committing")(too_long::<D>())),
            Ok(Err(error)) => Ended::Undone(error),
            Ok(Ok((transaction, done))) => committed::<D>(transaction, done).await,
        }
    }

    async fn archive(
        &self,
        transaction: &mut Transaction<'_, D::Database>,
        commits: &[&ArchiveCommit],
        done: &mut Done,
        keep: Keep,
    ) -> Result<(), StoreError> {
        let presented = commits.iter().map(|commit| (commit.account, commit.epoch)).collect();
        let refused = D::refused(&self.dialect.fence(), transaction, &presented)
            .await
            .map_err(failed("looking at the accounts' leases"))?;
        let is_refused = |commit: &ArchiveCommit| refused.contains(&(commit.account, commit.epoch));
        let admitted: Vec<&ArchiveCommit> =
            commits.iter().copied().filter(|commit| !is_refused(commit)).collect();
        self.archive_admitted(transaction, &admitted, done, keep).await?;
        let mut outcomes = std::mem::take(&mut done.commits).into_iter();
        for commit in commits {
            done.commits.extend(if is_refused(commit) {
                Some(Err(StoreError::Fenced(commit.account)))
            } else {
                outcomes.next()
            });
        }
        Ok(())
    }

    async fn archive_admitted(
        &self,
        transaction: &mut Transaction<'_, D::Database>,
        commits: &[&ArchiveCommit],
        done: &mut Done,
        keep: Keep,
    ) -> Result<(), StoreError> {
        if commits.is_empty() {
            return Ok(());
        }
        if let Some(take_turn) = D::TAKE_TURN {
            D::execute(transaction, take_turn).await.map_err(failed("storing facts"))?;
        }
        if keep == Keep::Together {
            return contained("storing facts", self.archive_together(transaction, commits, done)).await;
        }
        savepoint::<D>(transaction).await?;
        let together = contained("storing facts", self.archive_together(transaction, commits, done)).await;
        release::<D, _>(transaction, &together).await?;
        if together.is_ok() {
            return Ok(());
        }
        // Somebody's part was refused: each alone, so that only the offender fails.
        done.commits.clear();
        (done.rows, done.messages) = (0, Vec::new());
        for commit in commits {
            savepoint::<D>(transaction).await?;
            let alone = contained("storing facts", self.archive_together(transaction, &[commit], done)).await;
            release::<D, _>(transaction, &alone).await?;
            if let Err(error) = alone {
                done.commits.push(Err(error));
            }
        }
        Ok(())
    }

    async fn archive_together(
        &self,
        connection: &mut Connection<D>,
        commits: &[&ArchiveCommit],
        done: &mut Done,
    ) -> Result<(), StoreError> {
        let stored = store_facts::<D>(connection, self.rules, commits).await?;
        done.wakes |= stored.wakes;
        done.rows += stored.rows;
        done.messages.extend(stored.messages);
        done.commits.extend(stored.outcomes);
        Ok(())
    }

    async fn look_for_changes(&mut self) {
        match self.dialect.changed(&self.pool).await {
            Ok(true) => self.due.notify_one(),
            Ok(false) => {}
            // The next transaction says more about it.
            Err(error) => tracing::debug!(%error, "could not look for changes"),
        }
    }

    async fn settle(&mut self) {
        let settling = Settling::<D> { rules: self.rules, fence: self.dialect.fence() };
        let mut batch = Batch::<D> { commits: Vec::new(), jobs: vec![Box::new(settling)] };
        match self.with_patience(&mut batch).await {
            Ok(mut done) => {
                self.health.took(false);
                if let Some(Err(error)) = done.jobs.pop() {
                    tracing::warn!(error = %error_text(&error), "could not settle overdue messages");
                }
            }
            Err(error) => self.health.refused(error_text(&error)),
        }
    }
}

/// New messages, by what they are counted by.
pub(super) type Brought = Vec<(Direction, MessageSource)>;

/// Counts messages once their transaction is durable.
pub(super) fn count_archived(brought: &Brought) {
    for (direction, source) in brought {
        metrics::count_archived(*direction, source.as_str());
    }
}

/// What facts led to, before the transaction is durable.
pub(super) struct StoredFacts {
    /// For each commit: what is to be done, or why it was refused.
    pub(super) outcomes: Vec<Result<CommitOutcome, StoreError>>,
    /// Rows of the queue changed.
    pub(super) wakes: bool,
    /// Rows that were written.
    pub(super) rows: usize,
    /// What came into `messages`.
    pub(super) messages: Brought,
}

/// Applies the facts of commits in order and writes the rows that changed.
pub(super) async fn store_facts<D: Dialect>(
    connection: &mut Connection<D>,
    rules: RuleSettings,
    commits: &[&ArchiveCommit],
) -> Result<StoredFacts, StoreError> {
    let failed = failed("storing facts");
    let keys = Keys::of(commits.iter().copied());
    let mut workspace = D::load(connection, &keys, rules).await.map_err(&failed)?;
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
    D::flush(connection, &changes).await.map_err(&failed)?;
    Ok(StoredFacts {
        outcomes,
        wakes: !changes.outbox.is_empty(),
        rows: changes.rows(),
        messages: workspace.new_messages().map(|message| (message.direction, message.source)).collect(),
    })
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

/// Whether an error is that of one part of a batch; none if it is trouble of the database itself.
fn of_one_part(error: &StoreError) -> Option<Spoilt> {
    match error {
        StoreError::Unavailable { source, .. } if is_of_single_rows(source) => {
            Some(Spoilt { by_waiting: true })
        }
        StoreError::Unavailable { .. } | StoreError::Locked { .. } => None,
        _ => Some(Spoilt { by_waiting: false }),
    }
}

async fn committed<D: Dialect>(transaction: Transaction<'_, D::Database>, done: Done) -> Ended {
    match in_time::<D, _>(transaction.commit()).await {
        Ok(()) => Ended::Stored(done),
        Err(error) => Ended::Unknown(error, done),
    }
}

async fn savepoint<D: Dialect>(connection: &mut Connection<D>) -> Result<(), StoreError> {
    D::execute(connection, "SAVEPOINT part").await.map_err(failed("committing"))
}

/// Keeps or undoes what was done since [`savepoint`]. Trouble of the database itself undoes the whole transaction.
async fn release<D: Dialect, T>(
    connection: &mut Connection<D>,
    outcome: &Result<T, StoreError>,
) -> Result<(), StoreError> {
    if let Err(error) = outcome {
        let Some(spoilt) = of_one_part(error) else { return Err(same_trouble(error)) };
        D::execute(connection, "ROLLBACK TO SAVEPOINT part").await.map_err(failed("committing"))?;
        if let (true, Some(hurry)) = (spoilt.by_waiting, D::HURRY) {
            D::execute(connection, hurry).await.map_err(failed("committing"))?;
        }
    }
    D::execute(connection, "RELEASE SAVEPOINT part").await.map_err(failed("committing"))
}

async fn in_time<D: Dialect, T>(
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    timeout(D::TRANSACTION_LIMIT, work).await.unwrap_or_else(|_| Err(too_long::<D>()))
}

fn too_long<D: Dialect>() -> sqlx::Error {
    let words = format!("no answer within {} s", D::TRANSACTION_LIMIT.as_secs());
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words))
}

async fn discard<DB: Database>(connection: PoolConnection<DB>) {
    match timeout(Duration::from_secs(1), connection.detach().close()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "closing a connection after trouble"),
        Err(_) => tracing::debug!("a connection was left open after trouble"),
    }
}

/// A pool that got no connection in time keeps the reason to itself: one more attempt tells it.
async fn why_unreachable<DB: Database>(pool: &Pool<DB>, error: sqlx::Error) -> sqlx::Error {
    if !matches!(error, sqlx::Error::PoolTimedOut) {
        return error;
    }
    match timeout(ASKS_WHY_FOR, DB::Connection::connect_with(&pool.connect_options())).await {
        Ok(Err(reason)) => reason,
        Ok(Ok(connection)) => {
            if let Err(error) = connection.close().await {
                tracing::debug!(%error, "closing a connection that was only tried");
            }
            error
        }
        Err(_) => error,
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
    use sqlx::{SqliteConnection, SqlitePool};

    use super::*;
    use crate::{archive::retry::RetryPolicy, store::sqlite::SqliteDialect};

    const RULES: RuleSettings = RuleSettings {
        retry_uncertain: false,
        typing: false,
        plain_from_html: ToOwned::to_owned,
        retry: RetryPolicy { base: Duration::from_secs(1), cap: Duration::from_secs(1) },
        max_attempts: 1,
    };

    /// Panics where nothing contains it: outside the transaction.
    struct Bomb;

    impl Job<SqliteDialect> for Bomb {
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
        let writer = Writer::start(SqliteDialect::default(), pool, Duration::ZERO, RULES, false, false);
        assert!(writer.run("a job", false, |_| Box::pin(async { Ok(1) })).await.is_ok());
        let panicking = writer.run("a job", false, |_| Box::pin(async { panic!("contained") }));
        let refused: StoreError = Result::<(), _>::unwrap_err(panicking.await);
        assert!(error_text(&refused).contains("contained"), "{refused:?}");
        assert!(writer.broken().now_or_never().is_none(), "one job's panic is no end");

        writer.requests.send(Request::Job(Box::new(Bomb))).await.unwrap();
        timeout(Duration::from_secs(5), writer.broken()).await.unwrap();
        let refused = writer.run("a job", false, |_| Box::pin(async { Ok(()) })).await;
        assert!(matches!(refused, Err(StoreError::Closing)));
        writer.close().await;
    }

    #[test]
    fn plans_are_made_anew_as_tables_grow_and_now_and_then() {
        let mut plans = Plans::made_now();
        let now = plans.made_at;
        let mut renewed_at = Vec::new();
        for written in 1..=2000 {
            plans.written = written;
            if plans.are_outdated(now) {
                renewed_at.push(written);
            }
        }
        assert_eq!(renewed_at, [256, 512, 1024]);
        assert!(plans.are_outdated(now + PLANS_LAST_FOR));
        assert!(!plans.are_outdated(now + 3 * PLANS_LAST_FOR), "nothing was written since");
    }

    #[tokio::test]
    async fn a_writer_that_is_closed_is_not_broken() {
        let pool = SqlitePool::connect("sqlite::memory:").await.unwrap();
        let writer = Writer::start(SqliteDialect::default(), pool, Duration::ZERO, RULES, false, false);
        writer.close().await;
        tokio::task::yield_now().await;
        assert!(writer.broken().now_or_never().is_none());
    }
}
