//! One account's event channel: GET, commit, GET.
//!
//! Following the `next` link of a response acknowledges it, and the server drops what is not fetched within about 30
//! seconds. So between a response and the next GET there is exactly one thing: the commit of everything the response
//! carried together with the new cursor (guarantees G1, G2). The account works on a batch while the next GET is
//! already parked; it can hold up the channel by at most one batch.
//!
//! A `resume` or a `resync` is another link to follow and no new beginning: the channel goes on, and tells the account
//! that what it knew to be open may not be ([`Continuity`]).
//!
//! Owned by [`super::actor::AccountActor`], to whom it sends [`EventsCommitted`] after each commit and
//! [`ChannelExited`] once at its end. It knows of conversations nothing.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use actix::prelude::*;
use jiff::Timestamp;
use tokio::{sync::Notify, time::Instant};
use tracing::{Instrument as _, Span};
use url::Url;

use crate::{
    account::{
        backfill::BackfillHints,
        backoff::Backoff,
        channel_state::{Answer, ChannelEnd, ChannelState, Step},
    },
    archive::{
        fact::{ArchiveCommit, Fact, Quarantined},
        interpret::interpret_batch,
    },
    identifiers::{AccountId, SessionId},
    metrics::{self, QuarantineReason, Reconnect},
    store::{AttentionReason, CommitOutcome, SharedStore, StoreError},
    traces,
    ucwa::{Continuation, EventBatch, EventParameters, PollAnswer, UcwaClient, UcwaError, xml},
};

/// Longest time between a response and the next GET that is still well within the server's 30 seconds.
const SLOW_COMMIT: Duration = Duration::from_secs(5);

/// So long after a response the server has forgotten what came meanwhile.
const SERVER_FORGETS: Duration = Duration::from_secs(30);

/// How long a GET has to be on a connection before its silence counts: what the server had to tell would have come by
/// then.
pub(super) const SILENCE_COUNTS_AFTER: Duration = Duration::from_secs(5);

/// The same for a GET that repeats a failed one: a gateway that can't reach the server is silent for so long.
const SILENCE_COUNTS_AFTER_FAILURE: Duration = Duration::from_secs(60);

/// How long a GET that was begun on demand is left alone: longer than its silence takes to count.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(15);

/// Why a `resume` leaves a gap.
const RESUMED: &str = "the server asked to resume: it lost track of what was followed";

/// How a channel is doing, for whoever has to judge it from outside.
#[derive(Debug)]
pub struct ChannelHealth {
    continuity: AtomicU64,
    answered_at_ms: AtomicI64,
    parked_at_ms: AtomicI64,
    heard: Mutex<Heard>,
    repoll: Notify,
}

/// How much of what the server told is in the archive.
#[derive(Debug, Default)]
struct Heard {
    /// When the last GET was begun.
    begun: Option<Instant>,
    /// When the cursor was asked first: an answer to a repeated GET may be the one that was lost, and no newer.
    first_begun: Option<Instant>,
    /// When somebody last had the parked GET dropped.
    asked_again: Option<Instant>,
    /// Since when that GET has been on a connection.
    on_connection: Option<Instant>,
    /// The last GET failed and none was answered since.
    failing: bool,
    /// When the cursor was asked first whose answer is being stored.
    storing: Option<Instant>,
    /// What the server told of before this is stored, except what was only linked.
    stored_until: Option<Instant>,
    /// What is still being read of what events only linked: by number, what `stored_until` was before.
    reading: BTreeMap<u64, Option<Instant>>,
    last_reading: u64,
}

/// While it lives, something that events only linked has not been read.
#[derive(Debug)]
pub struct Reading {
    health: Arc<ChannelHealth>,
    number: u64,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.health.heard().reading.remove(&self.number);
    }
}

impl Default for ChannelHealth {
    fn default() -> Self {
        Self {
            continuity: AtomicU64::new(0),
            answered_at_ms: AtomicI64::new(Timestamp::now().as_millisecond()),
            parked_at_ms: AtomicI64::new(0),
            heard: Mutex::default(),
            repoll: Notify::new(),
        }
    }
}

impl ChannelHealth {
    /// The last GET ended in an error and none has succeeded since.
    pub fn is_failing(&self) -> bool {
        self.heard().failing
    }

    /// Changes whenever the server may have forgotten events: while it stays the same, nothing was missed.
    pub fn continuity(&self) -> u64 {
        self.continuity.load(Ordering::Relaxed)
    }

    /// When the channel last completed a rounds.
    pub fn answered_at(&self) -> Timestamp {
        Timestamp::from_millisecond(self.answered_at_ms.load(Ordering::Relaxed))
            .unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// When the GET that is out now was begun, to the millisecond.
    pub fn parked_at(&self) -> Timestamp {
        Timestamp::from_millisecond(self.parked_at_ms.load(Ordering::Relaxed))
            .unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// Some event can no longer be read: silence about an operation proves nothing from now on.
    pub fn lose_continuity(&self) {
        self.continuity.fetch_add(1, Ordering::Relaxed);
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What events only linked is to be read: as long as the result lives, what it tells is not known yet.
    pub fn begin_reading(self: &Arc<Self>) -> Arc<Reading> {
        let mut heard = self.heard();
        heard.last_reading += 1;
        let (number, until) = (heard.last_reading, heard.stored_until);
        heard.reading.insert(number, until);
        Arc::new(Reading { health: Arc::clone(self), number })
    }

    fn parked(&self, at: Instant) {
        let mut heard = self.heard();
        heard.begun = Some(at);
        heard.first_begun.get_or_insert(at);
        heard.on_connection = None;
        heard.storing = None;
    }

    /// The GET that is out is on a connection since then, or no longer.
    fn on_connection(&self, since: Option<Instant>) {
        self.heard().on_connection = since;
    }

    fn answered(&self) {
        let mut heard = self.heard();
        heard.storing = heard.first_begun;
        heard.on_connection = None;
        heard.failing = false;
    }

    fn unanswered(&self) {
        let mut heard = self.heard();
        heard.on_connection = None;
        heard.failing = true;
    }

    /// The answer is stored with the cursor that follows, so long after it came. `false` if the server may have
    /// forgotten events meanwhile.
    fn stored(&self, unparked: Duration) -> bool {
        let remembered = unparked <= SERVER_FORGETS;
        if !remembered {
            self.lose_continuity();
        }
        let mut heard = self.heard();
        heard.first_begun = None;
        if let Some(begun) = heard.storing.take() {
            heard.stored_until = Some(begun);
        }
        remembered
    }

    /// Whatever the server had to tell before this is in the archive; `None` while that is nothing.
    ///
    /// An answer counts from when its cursor was asked first, since it holds all that there was to tell by then; a GET
    /// that has been on a connection for a while counts as an answer that there is nothing to tell. One that waits for its
    /// token or its connection has asked nobody yet, and one that repeats a failure may be held by whoever failed. In
    /// lively traffic it moves along, though some answer is being stored at almost any time.
    pub fn heard_all_until(&self, now: Instant) -> Option<Instant> {
        let heard = self.heard();
        let counts_after = if heard.failing { SILENCE_COUNTS_AFTER_FAILURE } else { SILENCE_COUNTS_AFTER };
        let silent = heard.on_connection.is_some_and(|since| now.duration_since(since) >= counts_after);
        let until = if silent { Some(now) } else { heard.stored_until };
        heard.reading.values().fold(until, |until, unread| until.min(*unread))
    }

    /// Whether a GET was begun since then: it is on a connection that works, or fails.
    pub fn asked_since(&self, since: Instant) -> bool {
        self.heard().begun.is_some_and(|begun| begun >= since)
    }

    /// Drops the parked GET, if it was begun before, and asks the same address again on another connection. Harmless,
    /// since nothing is acknowledged by it; it finds out whether a silent channel is a dead one.
    ///
    /// Whoever needs it calls it until [`ChannelHealth::asked_since`]: a GET is left alone for a while, or many who come
    /// one after the other would never let it be silent.
    pub fn ask_again(&self, since: Instant, now: Instant) {
        let mut heard = self.heard();
        let asked = heard.begun.is_some_and(|begun| begun >= since);
        if asked || heard.asked_again.is_some_and(|last| now.duration_since(last) < ASK_AGAIN_EVERY) {
            return;
        }
        heard.asked_again = Some(now);
        drop(heard);
        self.repoll.notify_one();
    }
}

/// Sent by an [`EventChannel`] to its account after each commit, in order. The account handles it while the next GET
/// is parked. If it is lost with a dying account, the next life takes up what is open from the database.
#[derive(Message)]
#[rtype(result = "()")]
pub struct EventsCommitted {
    /// What the server said.
    pub batch: EventBatch,
    /// What the store found to be done.
    pub outcome: CommitOutcome,
    /// How it follows on what was committed before.
    pub continuity: Continuity,
    /// Given up once everything is read that the batch only linked.
    pub reading: Option<Arc<Reading>>,
}

/// How a batch follows on the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuity {
    /// Nothing came between them.
    Unbroken,
    /// The server asked for `resync`: our link was wrong.
    Resynchronised,
    /// The server said `resume`: events were lost, and what was open has ended in the database.
    Resumed,
}

/// Sent by an [`EventChannel`] to its account exactly once, whatever ended it.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ChannelExited(pub ChannelEnd);

/// Sent by the account: stop without acknowledging anything more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopChannel;

/// What a channel needs to follow one application.
pub struct Follow {
    /// Signed in.
    pub client: UcwaClient,
    /// The database.
    pub store: SharedStore,
    /// Whose channel.
    pub account: AccountId,
    /// Of which application.
    pub session: SessionId,
    /// Under which lease.
    pub epoch: i64,
    /// The application, for its `events` link.
    pub application: Url,
    /// The committed cursor.
    pub cursor: Url,
    /// Sent with the first GET.
    pub parameters: EventParameters,
    /// Shared with whoever judges the channel.
    pub health: Arc<ChannelHealth>,
    /// Told when a gap was recorded.
    pub backfill: Arc<BackfillHints>,
}

/// The actor: its whole work is one future.
pub struct EventChannel {
    follow: Option<Follow>,
    account: Recipient<EventsCommitted>,
    exited: Recipient<ChannelExited>,
    end: ChannelEnd,
}

impl EventChannel {
    /// A channel that begins when the actor is started.
    pub fn new(
        follow: Follow,
        account: Recipient<EventsCommitted>,
        exited: Recipient<ChannelExited>,
    ) -> Self {
        Self { follow: Some(follow), account, exited, end: ChannelEnd::Requested }
    }
}

impl Actor for EventChannel {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let Some(follow) = self.follow.take() else {
            ctx.stop();
            return;
        };
        let account = self.account.clone();
        ctx.spawn(run(follow, account).into_actor(self).map(|end, channel, ctx| {
            channel.end = end;
            ctx.stop();
        }));
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        let end = if std::thread::panicking() { ChannelEnd::Panicked } else { self.end.clone() };
        self.exited.do_send(ChannelExited(end));
    }
}

impl Handler<StopChannel> for EventChannel {
    type Result = ();

    fn handle(&mut self, _: StopChannel, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

type Dispatch = Pin<Box<dyn Future<Output = Result<(), MailboxError>>>>;

/// What is kept from one round to the next.
struct Rounds {
    state: ChannelState,
    /// For the next GET's query.
    parameters: Option<EventParameters>,
    /// The account's work on the last batch, done while the next GET is parked.
    dispatch: Dispatch,
    /// Until when everything that the server told is stored.
    followed_until: Timestamp,
}

async fn run(mut follow: Follow, account: Recipient<EventsCommitted>) -> ChannelEnd {
    let mut rounds = Rounds {
        state: ChannelState::default(),
        parameters: Some(follow.parameters.clone()),
        dispatch: nothing(),
        followed_until: follow.health.answered_at(),
    };
    loop {
        let trace = traces::event_round(follow.account);
        let (polled, dispatched) =
            futures_util::join!(poll(&follow, rounds.parameters.as_ref()), rounds.dispatch.as_mut());
        rounds.dispatch = nothing();
        if dispatched.is_err() {
            return ChannelEnd::Requested;
        }
        let Some(polled) = polled else { continue };
        // Of its own, since this future is as large as its largest part, and it mostly waits for an answer.
        if let Err(end) = Box::pin(follow.take(&mut rounds, polled, trace, &account)).await {
            return end;
        }
    }
}

fn nothing() -> Dispatch {
    Box::pin(std::future::ready(Ok(())))
}

/// What came of storing an answer.
struct Stored {
    outcome: CommitOutcome,
    /// Of what is still to be fetched.
    reading: Option<Arc<Reading>>,
}

fn tell(
    account: &Recipient<EventsCommitted>,
    batch: EventBatch,
    Stored { outcome, reading }: Stored,
    continuity: Continuity,
) -> Dispatch {
    Box::pin(account.send(EventsCommitted { batch, outcome, continuity, reading }))
}

/// One GET. `None` if somebody asked to begin it again.
async fn poll(
    follow: &Follow,
    parameters: Option<&EventParameters>,
) -> Option<Result<PollAnswer, UcwaError>> {
    follow.health.parked(Instant::now());
    follow.health.parked_at_ms.store(Timestamp::now().as_millisecond(), Ordering::Relaxed);
    let on_connection = |is: bool| follow.health.on_connection(is.then(Instant::now));
    tokio::select! {
        answer = follow.client.poll_events(&follow.cursor, parameters, &on_connection) => Some(answer),
        () = follow.health.repoll.notified() => None,
    }
}

impl Follow {
    /// Does what an answer asks for, up to where the next GET may leave.
    async fn take(
        &mut self,
        rounds: &mut Rounds,
        polled: Result<PollAnswer, UcwaError>,
        trace: Span,
        account: &Recipient<EventsCommitted>,
    ) -> Result<(), ChannelEnd> {
        let received_at = Instant::now();
        let step = {
            let answer = match &polled {
                Ok(PollAnswer { batch: Ok(batch), .. }) => Answer::Batch(&batch.continuation),
                Ok(PollAnswer { body, .. }) => Answer::Unreadable(xml::lenient_next_href(body)),
                Err(error) => Answer::Failed(error),
            };
            rounds.state.decide(&answer, received_at)
        };
        self.note_answer(&polled, &rounds.state, &trace);
        let answered_at = self.health.answered_at();
        tracing::trace!(?step, "event channel");
        match (step, polled) {
            (Step::Commit { cursor }, Ok(PollAnswer { body, batch: Ok(batch), .. })) => {
                let stored = self.commit(&cursor, &batch, &body, received_at).instrument(trace).await?;
                rounds.dispatch = tell(account, batch, stored, Continuity::Unbroken);
                rounds.followed_until = answered_at;
                rounds.parameters = None;
            }
            (Step::CommitAndResume { cursor }, Ok(PollAnswer { body, batch: Ok(batch), .. })) => {
                metrics::count_reconnect(Reconnect::Resume);
                self.health.lose_continuity();
                tracing::warn!(
                    "the server asked to resume; its link is followed, and what is open is learnt anew"
                );
                let storing =
                    self.store_batch(&cursor, &batch, &body, received_at, Some(rounds.followed_until));
                let stored = storing.instrument(trace).await?;
                rounds.dispatch = tell(account, batch, stored, Continuity::Resumed);
                rounds.followed_until = answered_at;
                self.backfill.gap_recorded();
                rounds.parameters = Some(self.parameters.clone());
            }
            (Step::Resynchronise { cursor }, Ok(PollAnswer { body, batch: Ok(batch), .. })) => {
                self.health.lose_continuity();
                metrics::count_reconnect(Reconnect::Resync);
                tracing::warn!("the server asked for resync; its link is taken");
                let stored = self.commit(&cursor, &batch, &body, received_at).instrument(trace).await?;
                rounds.dispatch = tell(account, batch, stored, Continuity::Resynchronised);
                rounds.followed_until = answered_at;
            }
            (Step::QuarantineAndRepeat, Ok(answer)) => {
                self.quarantine(&answer, None).await?;
            }
            (Step::QuarantineAndCommit { cursor }, Ok(answer)) => {
                self.health.lose_continuity();
                self.note_unread(rounds.followed_until).await?;
                self.quarantine(&answer, Some(&cursor)).await?;
                rounds.followed_until = answered_at;
            }
            (Step::ReadApplication { delay }, polled) => {
                if let Ok(answer) = &polled {
                    self.quarantine_if_useless(answer).await?;
                }
                tokio::time::sleep(delay).await;
                match self.read_application().await {
                    Ok(()) => {
                        self.health.lose_continuity();
                        rounds.parameters = Some(self.parameters.clone());
                    }
                    Err(Some(end)) => return Err(end),
                    Err(None) => {}
                }
            }
            (Step::Repeat { delay }, _) => tokio::time::sleep(delay).await,
            (Step::End(end), _) => return Err(end),
            // `decide` answers each kind of answer with a step that fits it.
            (step, _) => {
                return Err(ChannelEnd::Rediscover(format!(
                    "the event channel took a step that does not fit: {step:?}"
                )));
            }
        }
        Ok(())
    }

    fn note_answer(&self, polled: &Result<PollAnswer, UcwaError>, state: &ChannelState, trace: &Span) {
        match polled {
            Ok(PollAnswer { batch: Ok(batch), .. }) => traces::brought(trace, batch),
            _ => traces::failed(trace),
        }
        match polled {
            Ok(_) => {
                self.health.answered();
                self.health.answered_at_ms.store(Timestamp::now().as_millisecond(), Ordering::Relaxed);
            }
            Err(error) => {
                self.health.unanswered();
                metrics::count_reconnect(Reconnect::Error);
                tracing::warn!(
                    failures_in_a_row = state.failures_in_a_row(),
                    error = %crate::error_chain(error),
                    "the event channel was not answered"
                );
            }
        }
    }

    /// Stores what a batch carries with the cursor, however long the database takes; until then nothing is
    /// acknowledged.
    async fn commit(
        &mut self,
        cursor: &str,
        batch: &EventBatch,
        body: &str,
        received_at: Instant,
    ) -> Result<Stored, ChannelEnd> {
        self.store_batch(cursor, batch, body, received_at, None).await
    }

    async fn store_batch(
        &mut self,
        cursor: &str,
        batch: &EventBatch,
        body: &str,
        received_at: Instant,
        resumed_since: Option<Timestamp>,
    ) -> Result<Stored, ChannelEnd> {
        let facts = self.interpret(batch, body);
        let unlisted = facts.iter().filter(|fact| matches!(fact, Fact::Quarantined(_))).count();
        let stored = self.store(cursor, facts, body, received_at, resumed_since).await?;
        metrics::count_events(batch);
        metrics::count_quarantined_events(unlisted);
        Ok(stored)
    }

    /// A payload that breaks the interpreter must not break the account again and again.
    fn interpret(&self, batch: &EventBatch, body: &str) -> Vec<Fact> {
        std::panic::catch_unwind(AssertUnwindSafe(|| interpret_batch(batch, body))).unwrap_or_else(|_| {
            self.health.lose_continuity();
            metrics::count_quarantined(QuarantineReason::Interpreter);
            tracing::error!("an event-channel response could not be interpreted; it is in event_quarantine");
            vec![Fact::Quarantined(Quarantined::new(
                "the response broke the interpreter; please report it",
                body,
            ))]
        })
    }

    /// With `resumed_since` the response said `resume`, and the channel had been followed until then.
    async fn store(
        &mut self,
        cursor: &str,
        facts: Vec<Fact>,
        body: &str,
        received_at: Instant,
        resumed_since: Option<Timestamp>,
    ) -> Result<Stored, ChannelEnd> {
        let next = match self.client.resolve(cursor) {
            Ok(next) => next,
            Err(error) => {
                return Err(ChannelEnd::Attention(
                    AttentionReason::UntrustedAddress,
                    format!("the event channel's next link leads elsewhere: {error}"),
                    Some(Duration::from_secs(300)),
                ));
            }
        };
        let mut commit = ArchiveCommit {
            account: self.account,
            session: self.session,
            epoch: self.epoch,
            cursor: Some(next.to_string()),
            received_at: Timestamp::now(),
            facts,
        };
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let trace = traces::commit(commit.facts.len());
            let stored = match resumed_since {
                Some(since) => self.store.resume(commit.clone(), self.cursor.as_str(), since, RESUMED).await,
                None => self.store.commit(commit.clone()).await,
            };
            if stored.is_err() {
                traces::failed(&trace);
            }
            drop(trace);
            match stored {
                Ok(outcome) => {
                    let unparked = received_at.elapsed();
                    if unparked > SLOW_COMMIT {
                        tracing::warn!(
                            unparked_ms = unparked.as_millis(),
                            "the database took so long that the server may have dropped messages"
                        );
                    }
                    self.cursor = next;
                    let reading = (!outcome.fetches.is_empty()).then(|| self.health.begin_reading());
                    if !self.health.stored(unparked) {
                        let reason = "the database was away, so that nothing could be acknowledged";
                        self.record_gap(commit.received_at, reason).await;
                    }
                    return Ok(Stored { outcome, reading });
                }
                Err(StoreError::Fenced(_)) => return Err(ChannelEnd::Fenced),
                Err(StoreError::Closing) => {
                    return Err(ChannelEnd::Rediscover("the database was closed".to_owned()));
                }
                Err(error @ StoreError::Refused { .. }) if backoff.failures() < 3 => {
                    tracing::error!(error = %crate::error_chain(&error), "the database refused a batch of events");
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                Err(error @ StoreError::Refused { .. }) if backoff.failures() > 6 => {
                    return Err(ChannelEnd::Attention(
                        AttentionReason::DatabaseRefuses,
                        format!(
                            "the database refuses everything about this account: {}",
                            crate::error_chain(&error)
                        ),
                        Some(Duration::from_secs(300)),
                    ));
                }
                Err(error @ StoreError::Refused { .. }) => {
                    tracing::error!(
                        error = %crate::error_chain(&error),
                        "the database refuses a batch of events; its raw text goes to event_quarantine"
                    );
                    self.health.lose_continuity();
                    metrics::count_quarantined(QuarantineReason::Database);
                    commit.facts = vec![Fact::Quarantined(Quarantined::new(
                        format!("the database refused what was read from it: {}", crate::error_chain(&error)),
                        body,
                    ))];
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                Err(error) if error.is_told_by_store() => {
                    // Every account would say the same again and again.
                    tracing::debug!(
                        error = %crate::error_chain(&error),
                        "events can't be stored; nothing is acknowledged until they are"
                    );
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                Err(error) => {
                    tracing::warn!(
                        error = %crate::error_chain(&error),
                        "events can't be stored; nothing is acknowledged until they are"
                    );
                    tokio::time::sleep(backoff.next_delay()).await;
                }
            }
        }
    }

    /// Records that the channel was not followed since `from`.
    async fn record_gap(&self, from: Timestamp, reason: &str) {
        let recorded =
            self.store.record_stretch(self.account, self.session, from, Timestamp::now(), reason).await;
        if let Err(error) = recorded {
            tracing::warn!(error = %crate::error_chain(&error), "a gap could not be recorded");
        }
        self.backfill.gap_recorded();
    }

    /// Keeps a response that can't be read; with a cursor, passes over it.
    async fn quarantine(&mut self, answer: &PollAnswer, cursor: Option<&str>) -> Result<(), ChannelEnd> {
        let reason = match &answer.batch {
            Err(problem) => format!("the event-channel response can't be read: {problem}"),
            Ok(_) => "the event-channel response has no link to go on with".to_owned(),
        };
        tracing::error!(%reason, "a response went to event_quarantine");
        metrics::count_quarantined(QuarantineReason::Response);
        if let Some(cursor) = cursor {
            let facts = vec![Fact::Quarantined(Quarantined::new(reason, answer.body.as_str()))];
            self.store(cursor, facts, &answer.body, Instant::now(), None).await.map(drop)
        } else {
            // The same response comes again; if this one can't be written down, that one will.
            if let Err(error) =
                self.store.quarantine(self.account, Some(self.session), &reason, &answer.body).await
            {
                tracing::warn!(error = %crate::error_chain(&error), "event_quarantine could not be written");
            }
            Ok(())
        }
    }

    /// Before a response that can't be read is acknowledged: what it told is a gap, which conversation logs may fill.
    /// Of one that is too long the rest is not even in quarantine.
    async fn note_unread(&self, followed_until: Timestamp) -> Result<(), ChannelEnd> {
        const WHY: &str =
            "the server's answer could not be read; it is in event_quarantine as far as it was received";
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let now = Timestamp::now();
            match self.store.record_stretch(self.account, self.session, followed_until, now, WHY).await {
                Ok(()) => {
                    self.backfill.gap_recorded();
                    return Ok(());
                }
                Err(StoreError::Fenced(_)) => return Err(ChannelEnd::Fenced),
                Err(StoreError::Closing) => {
                    return Err(ChannelEnd::Rediscover("the database was closed".to_owned()));
                }
                Err(error) => {
                    tracing::warn!(error = %crate::error_chain(&error), "a gap can't be noted; trying again");
                    tokio::time::sleep(backoff.next_delay()).await;
                }
            }
        }
    }

    /// Keeps a response from which there is no way on.
    async fn quarantine_if_useless(&mut self, answer: &PollAnswer) -> Result<(), ChannelEnd> {
        match &answer.batch {
            Ok(batch) if batch.continuation != Continuation::Missing => Ok(()),
            _ => self.quarantine(answer, None).await,
        }
    }

    /// Takes the `events` link of the application as the cursor. `Err(None)`: not now, ask the old one again.
    async fn read_application(&mut self) -> Result<(), Option<ChannelEnd>> {
        match self.client.application(&self.application).await {
            Ok(application) => match application.events {
                Some(events) => {
                    self.cursor = events;
                    Ok(())
                }
                None => Err(Some(ChannelEnd::ApplicationLost(
                    "the application has no events link any more".to_owned(),
                ))),
            },
            Err(error) if matches!(error.status(), Some(404 | 410)) => Err(Some(
                ChannelEnd::ApplicationLost(format!("the server no longer knows the application: {error}")),
            )),
            Err(error) => {
                tracing::warn!(error = %crate::error_chain(&error), "the application can't be read");
                Err(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(100);

    #[test]
    fn in_lively_traffic_what_was_heard_moves_along_though_some_answer_is_always_being_stored() {
        let health = ChannelHealth::default();
        let began = Instant::now();
        let mut at = began;
        for _ in 0..100 {
            health.parked(at);
            health.answered();
            // Whenever somebody looks, the last answer is on its way into the archive.
            assert_eq!(health.heard_all_until(at + MOMENT), (at > began).then(|| at - MOMENT));
            assert!(health.stored(MOMENT));
            at += MOMENT;
        }
        health.parked(at);
        health.unanswered();
        assert_eq!(health.heard_all_until(at + SILENCE_COUNTS_AFTER), Some(at - MOMENT), "nobody answers");
    }

    #[test]
    fn a_get_that_has_asked_nobody_is_not_silence() {
        let health = ChannelHealth::default();
        let mut at = Instant::now();
        for _ in 0..3 {
            health.parked(at);
            at += 2 * SILENCE_COUNTS_AFTER_FAILURE;
            assert_eq!(health.heard_all_until(at), None, "it renews its token or connects");
            health.unanswered();
            assert_eq!(health.heard_all_until(at), None);
        }
        health.parked(at);
        health.on_connection(Some(at));
        health.on_connection(None);
        let late = at + SILENCE_COUNTS_AFTER_FAILURE;
        assert_eq!(health.heard_all_until(late), None, "its token was refused and is being renewed");
    }

    #[test]
    fn after_a_failure_silence_has_to_last_longer_until_a_get_is_answered() {
        let health = ChannelHealth::default();
        let at = Instant::now();
        health.parked(at);
        health.unanswered();
        health.parked(at);
        health.on_connection(Some(at));
        assert_eq!(health.heard_all_until(at + SILENCE_COUNTS_AFTER_FAILURE - MOMENT), None);
        let now = at + SILENCE_COUNTS_AFTER_FAILURE;
        assert_eq!(health.heard_all_until(now), Some(now));
        health.answered();
        assert!(health.stored(MOMENT));
        health.parked(now);
        health.on_connection(Some(now));
        let now = now + SILENCE_COUNTS_AFTER;
        assert_eq!(health.heard_all_until(now), Some(now));
    }

    #[test]
    fn silence_counts_once_a_get_has_been_on_a_connection_for_a_while() {
        let health = ChannelHealth::default();
        let at = Instant::now();
        health.parked(at);
        health.on_connection(Some(at));
        assert_eq!(health.heard_all_until(at + SILENCE_COUNTS_AFTER - MOMENT), None);
        let now = at + SILENCE_COUNTS_AFTER;
        assert_eq!(health.heard_all_until(now), Some(now));
    }

    #[test]
    fn what_was_only_linked_is_heard_once_all_of_it_is_read() {
        let health = Arc::new(ChannelHealth::default());
        let at = Instant::now();
        health.parked(at);
        health.answered();
        let linked = health.begin_reading();
        assert!(health.stored(MOMENT));
        let next = at + MOMENT;
        health.parked(next);
        health.on_connection(Some(next));
        let late = next + SILENCE_COUNTS_AFTER;
        assert_eq!(health.heard_all_until(late), None, "nothing was heard before the answer that linked");
        let linked_in_turn = Arc::clone(&linked);
        drop(linked);
        assert_eq!(health.heard_all_until(late), None);
        drop(linked_in_turn);
        assert_eq!(health.heard_all_until(late), Some(late));
    }

    #[test]
    fn an_answer_to_a_repeated_get_counts_from_the_first() {
        let health = ChannelHealth::default();
        let first = Instant::now();
        let mut at = first;
        health.parked(at);
        for _ in 0..2 {
            at += SILENCE_COUNTS_AFTER;
            health.unanswered();
            health.parked(at);
        }
        // It may be the package that was lost with the first GET's connection.
        health.answered();
        assert!(health.stored(MOMENT));
        assert_eq!(health.heard_all_until(at), Some(first));
        health.parked(at + MOMENT);
        health.answered();
        assert!(health.stored(MOMENT));
        assert_eq!(health.heard_all_until(at + MOMENT), Some(at + MOMENT), "another cursor");
    }

    #[test]
    fn what_is_not_acknowledged_in_time_breaks_continuity() {
        let health = ChannelHealth::default();
        let whole = health.continuity();
        health.parked(Instant::now());
        health.answered();
        assert!(health.stored(SERVER_FORGETS));
        assert_eq!(health.continuity(), whole);
        assert!(!health.stored(SERVER_FORGETS + MOMENT));
        assert_ne!(health.continuity(), whole);
    }

    fn asks_again(health: &ChannelHealth, since: Instant, now: Instant) -> bool {
        health.ask_again(since, now);
        let asks = health.repoll.notified().now_or_never().is_some();
        if asks {
            health.parked(now);
        }
        asks
    }

    #[test]
    fn a_get_that_was_begun_since_is_not_asked_again() {
        let health = ChannelHealth::default();
        let at = Instant::now();
        health.parked(at);
        assert!(!asks_again(&health, at, at + MOMENT));
        assert!(health.asked_since(at));
        assert!(!health.asked_since(at + MOMENT));
        assert!(asks_again(&health, at + MOMENT, at + MOMENT));
        assert!(health.asked_since(at + MOMENT));
    }

    #[test]
    fn many_who_ask_one_after_the_other_leave_the_get_time_to_be_silent() {
        let health = ChannelHealth::default();
        let at = Instant::now();
        health.parked(at);
        let mut asked = Vec::new();
        for second in 1..=30 {
            let now = at + Duration::from_secs(second);
            if asks_again(&health, now, now) {
                asked.push(second);
            }
        }
        assert_eq!(asked, [1, 16]);
    }
}
