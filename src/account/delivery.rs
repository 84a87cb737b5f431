//! One attempt to send one outbox row, from the committed operation id to a committed outcome.
//!
//! The row is `sending` and its operation id is durable before this begins. Every way out of here commits a
//! [`SendFact`] or leaves the row to what the event stream already settled. A request whose answer was lost is never
//! repeated blindly (G5): the event stream is asked first, and only a channel that missed nothing may say "not
//! accepted".

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, timeout},
};
use tracing::Instrument as _;
use url::Url;

use crate::{
    account::{
        AccountSettings,
        actor::commit_facts,
        backoff::Backoff,
        conversation::{
            ConversationView, DeliveryEnd, Gathering, InvitationProgress, MessagingView, SharedView,
            Unreached,
        },
        event_channel::{ChannelHealth, SILENCE_COUNTS_AFTER},
    },
    archive::{
        fact::{ArchiveCommit, ConversationEnded, Fact, FailureReason, SaidIn, SendFact, SendOutcome},
        retry::{Healing, classify_invitation_failure, describe_invitation_failure, is_for_want_of_room},
    },
    identifiers::{AccountId, OperationId, SessionId, SipUri},
    metrics,
    store::{ClaimedSend, KnownStay, SettledSend, SharedStore, StoreError},
    traces,
    ucwa::{Action, NewMeeting, OutgoingInvitation, Resource, UcwaClient, UcwaError, html::plain_from_html},
};

/// How long a conversation may take to become ready for the message: the ring time and what goes before and after it.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How long to wait for an event before asking `messaging` itself.
const ASK_AFTER: Duration = Duration::from_secs(5);
/// How often the event channel is looked at while an outcome is open.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How often the archive is asked who somebody is, while that is being read.
const READ_EVERY: Duration = Duration::from_millis(100);
/// So close together, sends whose answers were lost have the event channel asked once.
const AT_THE_SAME_TIME: Duration = Duration::from_secs(1);
/// How long to wait before somebody is invited or a conversation is left once more, unless the server asks for another time;
/// and at most.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
const AGAIN_AT_MOST: Duration = Duration::from_secs(15);
/// How often somebody is invited while the server is too busy.
const INVITED_AT_MOST: u32 = 3;
/// The longest time an outcome stays open before it is called uncertain.
const SETTLE_AT_MOST: Duration = Duration::from_secs(180);

/// What all deliveries of one life of an account share.
pub struct DeliveryContext {
    /// The database.
    pub store: SharedStore,
    /// Signed in.
    pub client: UcwaClient,
    /// Sending account.
    pub account: AccountId,
    /// The application.
    pub session: SessionId,
    /// Under which lease.
    pub epoch: i64,
    /// Link `startMessaging` of `communication`; absent if the server does not allow it.
    pub start_messaging: Option<Url>,
    /// Link `startOnlineMeeting` of `communication`; absent if the server does not allow it.
    pub start_online_meeting: Option<Url>,
    /// The server did not let a conversation of two become that of a group: groups get a meeting from their beginning.
    pub groups_meet: AtomicBool,
    /// The server has not refused to begin a meeting.
    pub may_meet: AtomicBool,
    /// For judging whether silence means anything.
    pub channel: Arc<ChannelHealth>,
    /// Configuration.
    pub settings: Arc<AccountSettings>,
}

/// The operation id of an invitation that carries no text, derived from that of the row, so that its events find the
/// conversation while the row's own id stays with the message. `number` is that of the recipient.
pub fn call_operation_id(row: &OperationId, number: usize) -> OperationId {
    OperationId(if number == 0 { format!("{row}-call") } else { format!("{row}-call{number}") })
}

/// With whom of the recipients of a group its conversation begins: the first who is not known to be out of reach.
pub fn first_to_call(recipients: &[SipUri], not_reached: &[Unreached]) -> Option<usize> {
    recipients.iter().position(|uri| not_reached.iter().all(|unreached| unreached.uri != *uri))
}

/// The operation ids with which the meeting of a group is started, and its messaging added.
pub fn meeting_operation_ids(row: &OperationId) -> [OperationId; 2] {
    [OperationId(format!("{row}-meet")), OperationId(format!("{row}-meetcall"))]
}

/// `in_meeting` keeps an invitation to a meeting apart from that to the conversation which could not grow.
fn participant_operation_id(row: &OperationId, number: usize, in_meeting: bool) -> OperationId {
    OperationId(if in_meeting { format!("{row}-m{number}") } else { format!("{row}-p{number}") })
}

/// One attempt.
pub struct Delivery {
    context: Arc<DeliveryContext>,
    view: SharedView,
    destination: Vec<SipUri>,
    send: ClaimedSend,
    settled: oneshot::Receiver<SettledSend>,
    gave_up: bool,
    /// Number of the recipient who is being called.
    calling: Option<usize>,
    /// Whoever is missing from the group was invited, or had not to be.
    is_gathered: bool,
    /// The server would not begin a conversation because the account has too many.
    lacks_room: bool,
    /// Address of the invitation that is out.
    invitation: Option<String>,
}

/// What was so before a request went out whose answer may be lost.
struct Before {
    /// See [`ChannelHealth::continuity`]; `None` if events are known to have been missed since.
    continuity: Option<u64>,
    /// By this machine's clock.
    at: Timestamp,
    said_in: SaidIn,
}

impl Before {
    fn now(context: &DeliveryContext, said_in: SaidIn) -> Self {
        Self { continuity: Some(context.channel.continuity()), at: Timestamp::now(), said_in }
    }
}

/// How an attempt ended.
enum Attempt {
    /// To be committed.
    Outcome(SendOutcome),
    /// The event stream settled it and the row knows.
    Settled,
    /// Nothing was asked of the server: the row goes back unsent and uncounted.
    Release,
    /// The server did not take it because a conversation of its thread is open.
    ThreadTaken,
    /// The conversation of a group came to nothing, before the text was sent; another one may not. These recipients can't
    /// be had.
    BeginAnew(Vec<Unreached>),
}

impl Attempt {
    /// For traces.
    fn word(&self) -> &'static str {
        match self {
            Self::Outcome(SendOutcome::MessageAccepted { .. } | SendOutcome::InvitationAccepted { .. }) => {
                "accepted"
            }
            Self::Outcome(SendOutcome::RetryAt { .. }) => "later",
            Self::Outcome(SendOutcome::Refused { .. }) => "failed",
            Self::Outcome(SendOutcome::Uncertain { .. }) => "uncertain",
            Self::Outcome(SendOutcome::Unheard { .. }) => "unheard",
            Self::Outcome(SendOutcome::NotReached { .. }) => "noted",
            Self::Settled => "settled",
            Self::Release => "released",
            Self::ThreadTaken => "thread_taken",
            Self::BeginAnew(_) => "begun_anew",
        }
    }
}

/// What the state of the conversation asks for.
enum Move {
    Say { send_message: String, html: bool },
    AddMessaging(String),
    Start,
    Wait,
}

/// What is to end.
#[derive(Clone, Copy)]
enum Ending {
    /// By leaving it.
    Conversation,
    /// By its link `cancel`.
    Invitation,
}

/// What came of reading a resource.
enum Asked {
    Told(Box<Resource>),
    /// The server has it no longer.
    Gone,
    /// It did not say.
    InVain,
}

/// What an error of a request that carried the text means for the row.
enum Problem {
    /// Certainly not executed.
    NotAccepted,
    /// Will never be.
    Refused,
    /// The link or the conversation is gone; certainly not executed.
    LinkGone,
    /// Nobody knows.
    Unknown,
    /// The account is not this node's any more: nothing was sent.
    NotOurs,
}

impl Delivery {
    /// An attempt that begins when it is [`Delivery::run`].
    pub fn new(
        context: Arc<DeliveryContext>,
        view: SharedView,
        destination: Vec<SipUri>,
        send: ClaimedSend,
        settled: oneshot::Receiver<SettledSend>,
    ) -> Self {
        Self {
            context,
            view,
            destination,
            send,
            settled,
            gave_up: false,
            calling: None,
            is_gathered: false,
            lacks_room: false,
            invitation: None,
        }
    }

    /// Sends and commits the outcome. Does not return before the outcome is durable, unless the store is closing or
    /// the account is held elsewhere, or there is none yet, because the row is to be said in another conversation.
    pub async fn run(mut self) -> DeliveryEnd {
        let trace = traces::send(self.send.account, self.send.outbox, self.send.attempt);
        let attempt = self.attempt().instrument(trace.clone()).await;
        traces::ended(&trace, attempt.word());
        drop(trace);
        // A call whose outcome is not known, or a conversation that did not become ready, must not hold up what comes
        // next: that gets a conversation of its own.
        if self.gave_up {
            self.view.send_modify(|view| view.ended = true);
        }
        let end = match attempt {
            Attempt::ThreadTaken => DeliveryEnd::ThreadTaken,
            Attempt::BeginAnew(unreached) => DeliveryEnd::BeginAnew(unreached),
            Attempt::Settled => DeliveryEnd::Done,
            Attempt::Release => {
                release_claim(&self.context.store, &self.send).await;
                DeliveryEnd::Done
            }
            Attempt::Outcome(outcome) => {
                self.commit(outcome).await;
                if self.lacks_room { DeliveryEnd::NoRoom } else { DeliveryEnd::Done }
            }
        };
        self.view.send_modify(|view| view.last_activity = Instant::now());
        end
    }

    async fn commit(&self, outcome: SendOutcome) {
        if let SendOutcome::MessageAccepted { .. } | SendOutcome::InvitationAccepted { .. } = &outcome
            && let Ok(latency) = Duration::try_from(Timestamp::now().duration_since(self.send.created_at))
        {
            metrics::time_outbox(latency);
        }
        let fact =
            SendFact { outbox: self.send.outbox, operation_id: self.send.operation_id.clone(), outcome };
        commit_send(&self.context, fact).await;
    }

    async fn attempt(&mut self) -> Attempt {
        let deadline = Instant::now() + READY_WITHIN;
        let mut view = self.view.subscribe();
        // What became of an earlier call says nothing about this row.
        self.view.send_if_modified(|view| {
            let stale = matches!(view.invitation, InvitationProgress::Failed(_));
            if stale {
                view.invitation = InvitationProgress::None;
            }
            stale
        });
        let mut asked_messaging = false;
        let mut link_was_gone = false;
        // A call brings the messaging along, a meeting does not.
        let (mut called, mut asked_for_messaging) = (false, false);
        let is_group = self.send.recipients.len() > 1;
        loop {
            let now = view.borrow_and_update().clone();
            if let InvitationProgress::Failed(reason) = &now.invitation {
                return if called { self.call_failed(&now, reason) } else { Attempt::Release };
            }
            if now.ended {
                return if called { self.ended_unsaid() } else { Attempt::Release };
            }
            // The queue says of what is given back that it expired.
            if self.send.expires_at.is_some_and(|expires_at| expires_at <= Timestamp::now()) {
                if now.gathering == Gathering::Meeting || self.calling.is_some() {
                    self.gave_up = true;
                    self.leave().await;
                }
                return Attempt::Release;
            }
            // It grew since the row was handed over.
            if now.multiparty && self.is_for_one() {
                return Attempt::Release;
            }
            match Self::next_move(&now, called, asked_for_messaging) {
                Move::Say { send_message, html } => {
                    if is_group && now.gathering != Gathering::Assembled {
                        match self.gather(&now, &mut view, deadline).await {
                            Some(attempt) => return attempt,
                            None => continue,
                        }
                    }
                    if now.gathering == Gathering::Assembled && !self.is_gathered {
                        match self.gather_again(&now, &mut view).await {
                            Some(attempt) => return attempt,
                            None => continue,
                        }
                    }
                    match self.say(&now, &send_message, html).await {
                        Ok(attempt) => return attempt,
                        Err(error) if link_was_gone => {
                            self.gave_up = true;
                            return self.not_accepted(&error);
                        }
                        Err(_) => {
                            link_was_gone = true;
                            self.ask_messaging(&now).await;
                        }
                    }
                }
                Move::AddMessaging(link) => match self.add_messaging(&link).await {
                    Ok(Some(attempt)) => return attempt,
                    Ok(None) => (called, asked_for_messaging) = (true, true),
                    Err(attempt) => return attempt,
                },
                Move::Start => match self.start().await {
                    Ok(Some(attempt)) => return attempt,
                    Ok(None) => {
                        (called, asked_for_messaging) =
                            (true, self.view.borrow().gathering != Gathering::Meeting);
                    }
                    Err(attempt) => return attempt,
                },
                Move::Wait => {
                    let patience = if asked_messaging { READY_WITHIN } else { ASK_AFTER };
                    let until = deadline.min(Instant::now() + patience);
                    match tokio::time::timeout_at(until, view.changed()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return Attempt::Release,
                        Err(_) if Instant::now() >= deadline => return self.not_ready_in_time(&now).await,
                        Err(_) => {
                            asked_messaging = true;
                            self.ask_messaging(&now).await;
                        }
                    }
                }
            }
        }
    }

    fn next_move(view: &ConversationView, called: bool, asked_for_messaging: bool) -> Move {
        if let Some(messaging) = &view.messaging {
            if let Some(send_message) = &messaging.send_message {
                return Move::Say { send_message: send_message.clone(), html: messaging.html };
            }
            if let Some(add) = &messaging.add_messaging
                && messaging.disconnected
                && !asked_for_messaging
                && view.invitation != InvitationProgress::Ringing
            {
                return Move::AddMessaging(add.clone());
            }
        }
        if view.href.is_none() && view.invitation == InvitationProgress::None && !called {
            return Move::Start;
        }
        Move::Wait
    }

    /// Whether the text can travel with an invitation: it takes plain text only, and a group gets it once all are in, also
    /// one that the row names by its conversation.
    fn text_for_invitation(&self) -> Option<String> {
        let is_for_many = self.send.recipients.len() > 1 || self.view.borrow().multiparty;
        (!is_for_many && !self.is_html()).then(|| self.send.body.clone())
    }

    fn is_html(&self) -> bool {
        self.send.content_type.eq_ignore_ascii_case("text/html")
    }

    /// Calls the recipient. `Ok(None)`: a call without the text is ringing, or a meeting for the group begins; the text
    /// follows once it is answered.
    async fn start(&mut self) -> Result<Option<Attempt>, Attempt> {
        if self.destination.len() > 1
            && self.context.groups_meet.load(Ordering::Relaxed)
            && let Some(start_online_meeting) = self.context.start_online_meeting.clone()
        {
            return self.start_meeting(&start_online_meeting).await;
        }
        let Some(start_messaging) = self.context.start_messaging.clone() else {
            return Err(Self::refused(
                None,
                None,
                FailureReason::default(),
                "the server does not let this account start conversations (no startMessaging link)"
                    .to_owned(),
            ));
        };
        let number = first_to_call(&self.destination, &self.view.borrow().not_reached);
        let Some((number, to)) = number.map(|number| (number, self.destination[number].clone())) else {
            return Err(Self::refused(
                None,
                None,
                FailureReason::default(),
                "the conversation has ended and the row names no recipients to start a new one".to_owned(),
            ));
        };
        let message = self.text_for_invitation();
        let operation_id = if message.is_some() {
            self.send.operation_id.clone()
        } else {
            call_operation_id(&self.send.operation_id, number)
        };
        self.calling = Some(number);
        let invitation = OutgoingInvitation {
            operation_id: operation_id.clone(),
            to: to.to_string(),
            subject: self.send.subject.clone(),
            importance: self.send.importance.clone(),
            thread_id: self
                .send
                .thread_id
                .clone()
                .or_else(|| self.view.borrow().thread_id.clone())
                .or_else(|| Some(uuid::Uuid::new_v4().simple().to_string())),
            message: message.clone(),
        };
        let before = Before::now(&self.context, SaidIn::NewConversation);
        self.view.send_modify(|view| view.invitation = InvitationProgress::Ringing);
        let answer = self.context.client.start_messaging(&start_messaging, &invitation).await;
        self.invitation_answered(answer, problem_of_invitation, &operation_id, message.is_some(), before)
            .await
    }

    /// Begins a meeting of nobody yet, for a group.
    async fn start_meeting(&mut self, start_online_meeting: &Url) -> Result<Option<Attempt>, Attempt> {
        let [operation_id, _] = meeting_operation_ids(&self.send.operation_id);
        let thread_id = self.send.thread_id.clone();
        let meeting = NewMeeting {
            operation_id: operation_id.clone(),
            subject: self.send.subject.clone(),
            importance: self.send.importance.clone(),
            thread_id: thread_id.or_else(|| Some(uuid::Uuid::new_v4().simple().to_string())),
        };
        let before = Before::now(&self.context, SaidIn::NewConversation);
        self.view.send_modify(|view| {
            view.gathering = Gathering::Meeting;
            view.invitation = InvitationProgress::Ringing;
        });
        let answer = self.context.client.start_online_meeting(start_online_meeting, &meeting).await;
        if let Err(error) = &answer
            && matches!(problem_of_invitation(error), Problem::Refused)
        {
            tracing::warn!(
                outbox.id = self.send.outbox.0,
                error = %crate::error_chain(error),
                "the server does not let this account begin online meetings; groups get conversations of two that grow, \
                 as far as they do"
            );
            self.context.may_meet.store(false, Ordering::Relaxed);
            self.context.groups_meet.store(false, Ordering::Relaxed);
            self.gave_up = true;
            return Err(Attempt::BeginAnew(self.view.borrow().not_reached.clone()));
        }
        self.invitation_answered(answer, problem_of_invitation, &operation_id, false, before).await
    }

    /// Opens the IM leg of a conversation that has none.
    async fn add_messaging(&mut self, link: &str) -> Result<Option<Attempt>, Attempt> {
        let Ok(link) = self.context.client.resolve(link) else { return Err(Attempt::Release) };
        let message = self.text_for_invitation();
        let operation_id = if message.is_some() {
            self.send.operation_id.clone()
        } else if self.view.borrow().gathering == Gathering::Meeting {
            let [_, operation_id] = meeting_operation_ids(&self.send.operation_id);
            operation_id
        } else {
            call_operation_id(&self.send.operation_id, 0)
        };
        let said_in = self.view.borrow().href.clone().map_or(SaidIn::Unknown, SaidIn::Conversation);
        let before = Before::now(&self.context, said_in);
        self.view.send_modify(|view| view.invitation = InvitationProgress::Ringing);
        let answer = self.context.client.add_messaging(&link, &operation_id, message.as_deref()).await;
        if let Err(error) = &answer
            && message.is_none()
            && error.subcode() == Some("AlreadyExists")
        {
            // The account asked for it too, before it knew whose conversation it is.
            return Ok(None);
        }
        self.invitation_answered(answer, problem_in_conversation, &operation_id, message.is_some(), before)
            .await
    }

    async fn invitation_answered(
        &mut self,
        answer: Result<Option<String>, UcwaError>,
        problem_of: fn(&UcwaError) -> Problem,
        operation_id: &OperationId,
        carries_text: bool,
        before: Before,
    ) -> Result<Option<Attempt>, Attempt> {
        match answer {
            Ok(location) if carries_text => {
                Ok(Some(Attempt::Outcome(SendOutcome::InvitationAccepted { invitation_href: location })))
            }
            Ok(location) => {
                self.invitation = location;
                Ok(None)
            }
            Err(error) => {
                self.lacks_room |= is_for_want_of_room(error.subcode());
                let mut problem = problem_of(&error);
                if !carries_text && matches!(problem, Problem::Unknown) {
                    // What an invitation of which nothing was told is for may have come of it.
                    let connected = |view: &ConversationView| {
                        view.messaging.as_ref().is_some_and(|messaging| messaging.connected)
                    };
                    match self.hear_of(operation_id, before.continuity, &error, connected).await {
                        // Without the text nothing can be doubled: where nobody can tell, what is there to see decides.
                        Word::Told | Word::NotToBeHad(_) => return Ok(None),
                        Word::Silence => problem = Problem::NotAccepted,
                    }
                }
                if !matches!(problem, Problem::Unknown) {
                    self.view.send_modify(|view| {
                        if view.invitation == InvitationProgress::Ringing {
                            view.invitation = InvitationProgress::None;
                        }
                    });
                }
                if error.subcode() == Some("ThreadIdAlreadyExists") {
                    self.gave_up = true;
                    return Err(Attempt::ThreadTaken);
                }
                match problem {
                    Problem::NotOurs => Err(Attempt::Release),
                    Problem::Refused => {
                        let why = crate::error_chain(&error);
                        let healing = Healing::Permanent;
                        Err(self
                            .not_reached(
                                healing,
                                why,
                                error.retry_after(),
                                error.status(),
                                &reason_of(&error),
                            )
                            .unwrap_or_else(|| Self::refused_by(None, &error)))
                    }
                    Problem::NotAccepted => Err(self.not_accepted(&error)),
                    // The next attempt goes by what is read now: another link, or a new conversation.
                    Problem::LinkGone => {
                        let view = self.view.borrow().clone();
                        self.ask_messaging(&view).await;
                        Err(self.not_accepted(&error))
                    }
                    Problem::Unknown => Err(self.settle(&error, before).await),
                }
            }
        }
    }

    /// The answer to an invitation without the text was lost: asks the events of it. `or` says what else shows that the
    /// server took it.
    async fn hear_of(
        &self,
        operation_id: &OperationId,
        continuity: Option<u64>,
        error: &UcwaError,
        or: impl Fn(&ConversationView) -> bool,
    ) -> Word {
        tracing::warn!(
            outbox.id = self.send.outbox.0,
            operation.id = %operation_id,
            error = %crate::error_chain(error),
            "the answer to an invitation was lost; the event stream will tell what became of it"
        );
        let mut view = self.view.subscribe();
        let told = async {
            let told =
                |view: &ConversationView| view.ended || view.told.contains_key(operation_id) || or(view);
            let told = view.wait_for(told).await;
            if told.is_err() {
                std::future::pending::<()>().await;
            }
        };
        hear(&self.context, told, continuity, self.context.settings.settle_after).await
    }

    /// What is meant for one person is not said where others listen, unless the row names that conversation.
    fn is_for_one(&self) -> bool {
        let is_named = self.send.conversation.as_ref().is_some_and(|(_, open)| open.is_some());
        self.send.recipients.len() < 2 && !is_named
    }

    /// The conversation that this attempt began is over before anything was said in it, and nobody says why: the server lost
    /// track of it, or ended it. That tells nothing of the recipients.
    fn ended_unsaid(&mut self) -> Attempt {
        self.gave_up = true;
        let error = "the conversation ended before anything was said in it".to_owned();
        self.retry_or_fail(self.next_attempt_at(None), None, FailureReason::default(), error)
    }

    /// Nothing could be said in all the time that there is. What this attempt began is ended, or the recipient would wait in
    /// it; a group begins with the next one, if it was the answer that did not come.
    async fn not_ready_in_time(&mut self, view: &ConversationView) -> Attempt {
        self.gave_up = true;
        if view.gathering == Gathering::Meeting || self.calling.is_some() {
            self.leave().await;
        }
        let answered = view.messaging.as_ref().is_some_and(|messaging| messaging.connected)
            || view.invitation == InvitationProgress::Accepted;
        let reason = FailureReason::default();
        if !answered
            && let Some(attempt) =
                self.not_reached(Healing::Temporary, "did not answer in time".to_owned(), None, None, &reason)
        {
            return attempt;
        }
        let error = "the conversation did not become ready for messages in time".to_owned();
        self.retry_or_fail(self.next_attempt_at(None), None, reason, error)
    }

    /// The call without the text failed.
    fn call_failed(&mut self, view: &ConversationView, reason: &FailureReason) -> Attempt {
        let error = describe_invitation_failure(reason);
        let healing = classify_invitation_failure(reason);
        // A conference that goes on without its messaging tells nothing of a recipient, nor does what the server has too
        // much of.
        let subcode = reason.subcode.as_deref();
        let about_us = is_for_want_of_room(subcode) || subcode == Some("ThreadIdAlreadyExists");
        if !view.is_conference()
            && !about_us
            && let Some(attempt) = self.not_reached(healing, error.clone(), None, None, reason)
        {
            return attempt;
        }
        match healing {
            Healing::Temporary => self.retry_or_fail(self.next_attempt_at(None), None, reason.clone(), error),
            Healing::Permanent => Self::refused(None, None, reason.clone(), error),
        }
    }

    /// The recipient with whom the conversation of a group was to begin can't be had: it begins with the next one; with
    /// none left, the row comes to nothing. `None` if the row is not for a group.
    fn not_reached(
        &mut self,
        healing: Healing,
        why: String,
        asked: Option<Duration>,
        http_status: Option<u16>,
        reason: &FailureReason,
    ) -> Option<Attempt> {
        let uri = self.destination.get(self.calling?).filter(|_| self.destination.len() > 1)?.clone();
        self.gave_up = true;
        let mut unreached = self.view.borrow().not_reached.clone();
        unreached.push(self.unreached(uri, why, healing, asked));
        if first_to_call(&self.destination, &unreached).is_some() {
            return Some(Attempt::BeginAnew(unreached));
        }
        Some(self.nobody_reached(&unreached, http_status, reason))
    }

    /// Somebody who was called or invited in vain. `asked` is how long the server wants to be left alone.
    fn unreached(&self, uri: SipUri, why: String, healing: Healing, asked: Option<Duration>) -> Unreached {
        let known =
            self.view.borrow().not_reached.iter().find(|known| known.uri == uri).map(|known| known.tries);
        let tries = known.unwrap_or(0) + 1;
        let again_at = next_time(&self.context, tries, asked);
        Unreached { uri, why, healing, tries, again_at }
    }

    /// No recipient of a group can be had. Whoever may come later is not called before the server wants to hear of them.
    fn nobody_reached(
        &self,
        unreached: &[Unreached],
        http_status: Option<u16>,
        reason: &FailureReason,
    ) -> Attempt {
        let words: Vec<String> = unreached.iter().map(|one| format!("{} ({})", one.uri, one.why)).collect();
        let error = format!("nobody could be reached: {}", words.join(", "));
        let may_come = unreached.iter().filter(|one| one.healing == Healing::Temporary);
        if let Some(again_at) = may_come.map(|one| one.again_at).max() {
            let at = self.next_attempt_at(None).max(again_at);
            self.retry_or_fail(at, http_status, reason.clone(), error)
        } else {
            Self::refused(None, http_status, reason.clone(), error)
        }
    }

    /// Ends what was to become the conversation of a group, or leaves it: nothing is said in it. Where no event has told
    /// of it yet, the invitation is withdrawn, so that nobody answers it.
    async fn leave(&self) {
        let known = self.view.borrow().href.clone();
        let left = match (known, &self.invitation) {
            (Some(href), _) => self.ask_to_end(&href, Ending::Conversation).await,
            (None, Some(invitation)) => match self.read(invitation).await {
                Asked::Told(resource) => match (resource.link("cancel"), resource.link("conversation")) {
                    (Some(cancel), _) => self.ask_to_end(&cancel.href, Ending::Invitation).await,
                    (None, Some(conversation)) => {
                        self.ask_to_end(&conversation.href, Ending::Conversation).await
                    }
                    (None, None) => Ok(()),
                },
                Asked::Gone | Asked::InVain => Ok(()),
            },
            (None, None) => Ok(()),
        };
        if let Err(error) = left
            && !matches!(error.status(), Some(404 | 410))
        {
            tracing::warn!(
                outbox.id = self.send.outbox.0,
                error = %crate::error_chain(&error),
                "a conversation in which nothing was said could not be ended"
            );
        }
    }

    /// Asks the server to end something, once more where it could not hear or do it.
    async fn ask_to_end(&self, href: &str, ending: Ending) -> Result<(), UcwaError> {
        let url = self.context.client.resolve(href)?;
        let ask = async || match ending {
            Ending::Conversation => self.context.client.delete(&url).await,
            Ending::Invitation => self.context.client.post_empty(&url).await,
        };
        match ask().await {
            // Whoever has left already is told so.
            Err(error) if error.is_transport() || matches!(error.status(), Some(429 | 500..)) => {
                tokio::time::sleep(error.retry_after().unwrap_or(AGAIN_AFTER).min(AGAIN_AT_MOST)).await;
                ask().await
            }
            left => left,
        }
    }

    /// Whether a meeting can take the place of this conversation: only of one that this attempt began with a call without
    /// the text, so that nothing was said in it.
    fn may_meet_instead(&self, view: &ConversationView) -> bool {
        self.calling.is_some()
            && self.destination.len() > 1
            && self.context.start_online_meeting.is_some()
            && self.context.may_meet.load(Ordering::Relaxed)
            // It may have been called a conference while the server tried.
            && !view.is_conference()
            && !view.ended
    }

    /// The server does not let this conversation of two grow: the group gets a meeting, as do those that follow.
    /// Who has refused to come is not asked again.
    async fn meet_instead(&mut self, why: &str, refused: Vec<Unreached>) -> Attempt {
        tracing::info!(
            outbox.id = self.send.outbox.0,
            why,
            "the server does not let conversations grow into groups; groups get online meetings"
        );
        self.context.groups_meet.store(true, Ordering::Relaxed);
        self.leave().await;
        self.gave_up = true;
        let refused = refused.into_iter().filter(|one| one.healing == Healing::Permanent);
        Attempt::BeginAnew(self.view.borrow().not_reached.iter().cloned().chain(refused).collect())
    }

    /// Numbers of the recipients of a group who are still to be invited. In a conversation that we began is the one with
    /// whom we did, in a meeting that we began nobody; who is in one that the row names, the server says.
    fn missing_from(&self, view: &ConversationView) -> Vec<usize> {
        let begun_with = (view.gathering != Gathering::Meeting
            && (self.calling.is_some() || self.send.conversation.is_none()))
        .then(|| first_to_call(&self.send.recipients, &view.not_reached))
        .flatten();
        let unreached = |uri: &SipUri| view.not_reached.iter().any(|unreached| unreached.uri == *uri);
        (0..self.send.recipients.len())
            .filter(|number| Some(*number) != begun_with && !unreached(&self.send.recipients[*number]))
            .collect()
    }

    /// The group is as complete as it will be for this row: of those who were `invited`, these were `not_reached`.
    fn assembled(&mut self, invited: &[usize], not_reached: Vec<Unreached>) {
        self.is_gathered = true;
        let invited: Vec<&SipUri> = invited.iter().map(|number| &self.send.recipients[*number]).collect();
        self.view.send_modify(|view| {
            view.gathering = Gathering::Assembled;
            view.multiparty = true;
            view.not_reached.retain(|known| !invited.contains(&&known.uri));
            view.not_reached.extend(not_reached);
        });
    }

    /// Brings those into a group that is there who are missing from it: whoever has left, and whoever could not be had
    /// when they were last invited and may come by now. What it returns ends the attempt.
    async fn gather_again(
        &mut self,
        now: &ConversationView,
        view: &mut watch::Receiver<ConversationView>,
    ) -> Option<Attempt> {
        let stays = match self.stays(now).await {
            Ok(stays) => stays,
            Err(error) => {
                let error = format!("who is in the group could not be read: {}", crate::error_chain(&error));
                return Some(self.retry_or_fail(
                    self.next_attempt_at(None),
                    None,
                    FailureReason::default(),
                    error,
                ));
            }
        };
        let is_there = |uri: &SipUri| {
            let is = |stay: &KnownStay| {
                stay.uri.as_ref().is_some_and(|known| known.eq_ignore_ascii_case(uri.as_str()))
            };
            stays.iter().any(|stay| stay.present && is(stay))
        };
        // Somebody may have come by themselves.
        self.view.send_if_modified(|view| {
            let known = view.not_reached.len();
            view.not_reached.retain(|unreached| !is_there(&unreached.uri));
            view.not_reached.len() != known
        });
        self.is_gathered = true;
        if self.send.recipients.len() < 2 {
            return None;
        }
        let unreached = self.view.borrow().not_reached.clone();
        let may_be_invited = |uri: &SipUri| {
            unreached.iter().find(|unreached| unreached.uri == *uri).is_none_or(|unreached| {
                unreached.healing == Healing::Temporary && unreached.again_at <= Timestamp::now()
            })
        };
        let missing: Vec<usize> = (0..self.send.recipients.len())
            .filter(|number| !is_there(&self.send.recipients[*number]))
            .filter(|number| may_be_invited(&self.send.recipients[*number]))
            .collect();
        if !missing.is_empty() {
            if now.add_participant.is_none() {
                self.ask_conversation(now).await;
            }
            let link = self.view.borrow().add_participant.clone();
            if let Some(link) = link {
                if let Some(attempt) = self.invite_all(missing, now, &link, view).await {
                    return Some(attempt);
                }
            } else {
                let why = "the server lets nobody be invited to this conversation (no addParticipant link)";
                let unreached = missing
                    .iter()
                    .map(|number| self.send.recipients[*number].clone())
                    .map(|uri| self.unreached(uri, why.to_owned(), Healing::Temporary, None))
                    .collect();
                self.assembled(&missing, unreached);
            }
        }
        let unreached = self.view.borrow().not_reached.clone();
        let is_out_of_reach = |uri: &SipUri| unreached.iter().any(|unreached| unreached.uri == *uri);
        self.send
            .recipients
            .iter()
            .all(is_out_of_reach)
            .then(|| self.nobody_reached(&unreached, None, &FailureReason::default()))
    }

    /// Who is in the conversation, and who was; of whoever has just come it may have to be read who they are.
    async fn stays(&self, view: &ConversationView) -> Result<Vec<KnownStay>, StoreError> {
        let Some(href) = &view.href else { return Ok(Vec::new()) };
        let until = Instant::now() + ASK_AFTER;
        loop {
            let stays =
                self.context.store.known_stays(self.context.account, self.context.session, href).await?;
            let is_known = stays.iter().all(|stay| !stay.present || !stay.being_read);
            if is_known || Instant::now() >= until {
                return Ok(stays);
            }
            tokio::time::sleep(READ_EVERY).await;
        }
    }

    /// Does the next thing there is to do before a group can be spoken to. What it returns ends the attempt.
    async fn gather(
        &mut self,
        now: &ConversationView,
        view: &mut watch::Receiver<ConversationView>,
        deadline: Instant,
    ) -> Option<Attempt> {
        if self.missing_from(now).is_empty() {
            self.assembled(&[], Vec::new());
            return None;
        }
        if let Some(link) = &now.add_participant {
            return self.invite_all(self.missing_from(now), now, link, view).await;
        }
        let connected = now.state.as_ref().is_some_and(|state| state.eq_ignore_ascii_case("Connected"));
        if connected && self.may_meet_instead(now) {
            // What an event said may be older than the conversation's being connected.
            let is_told = self.ask_conversation(now).await;
            let told = self.view.borrow().clone();
            if is_told && told.add_participant.is_none() && self.may_meet_instead(&told) {
                return Some(self.meet_instead("there is no addParticipant link", Vec::new()).await);
            }
            if is_told || told.ended {
                return None;
            }
        }
        if Instant::now() >= deadline {
            if !self.ask_conversation(now).await {
                return Some(self.not_ready_in_time(now).await);
            }
            if self.view.borrow().add_participant.is_some() {
                return None;
            }
            return Some(Self::refused(
                now.href.clone(),
                None,
                FailureReason::default(),
                "the server does not let this conversation grow into a group (no addParticipant link)"
                    .to_owned(),
            ));
        }
        // The link comes with the conversation's own event, in whatever order.
        let until = deadline.min(Instant::now() + ASK_AFTER);
        if tokio::time::timeout_at(until, view.changed()).await.is_err() {
            self.ask_conversation(now).await;
        }
        None
    }

    /// Invites somebody to the conversation, again where the server was too busy for a moment.
    async fn invite(&self, link: &str, operation_id: &OperationId, uri: &SipUri) -> Result<(), UcwaError> {
        let mut attempts = 1;
        loop {
            match self.invite_once(link, operation_id, uri).await {
                Err(error) if attempts < INVITED_AT_MOST && matches!(error.status(), Some(429 | 503)) => {
                    let wait = error.retry_after().unwrap_or(AGAIN_AFTER);
                    if wait > AGAIN_AT_MOST {
                        return Err(error);
                    }
                    attempts += 1;
                    tokio::time::sleep(wait).await;
                }
                answer => return answer,
            }
        }
    }

    /// Where the answer is lost, the events would have told of the invitation, and did not, it is made once more.
    async fn invite_once(
        &self,
        link: &str,
        operation_id: &OperationId,
        uri: &SipUri,
    ) -> Result<(), UcwaError> {
        let url = self.context.client.resolve(link)?;
        let continuity = Some(self.context.channel.continuity());
        match self.context.client.add_participant(&url, operation_id, uri.as_str()).await {
            Ok(_) => Ok(()),
            Err(error) if matches!(problem_of_invitation(&error), Problem::Unknown) => {
                match self.hear_of(operation_id, continuity, &error, |_| false).await {
                    Word::Silence => {
                        self.context.client.add_participant(&url, operation_id, uri.as_str()).await.map(drop)
                    }
                    Word::Told | Word::NotToBeHad(_) => Ok(()),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Brings recipients of a group in, and waits until each has joined or failed. Who could not be brought in is noted in
    /// the view; the others get the message. What it returns ends the attempt.
    async fn invite_all(
        &mut self,
        missing: Vec<usize>,
        now: &ConversationView,
        link: &str,
        view: &mut watch::Receiver<ConversationView>,
    ) -> Option<Attempt> {
        let in_meeting = now.gathering == Gathering::Meeting;
        let (mut anybody, mut last_reason) = (false, FailureReason::default());
        let mut pending = Vec::new();
        let mut not_reached = Vec::new();
        for number in missing.iter().copied() {
            let uri = &self.send.recipients[number];
            let operation_id = participant_operation_id(&self.send.operation_id, number, in_meeting);
            match self.invite(link, &operation_id, uri).await {
                Ok(()) => pending.push((operation_id, uri.clone())),
                Err(error) if error.subcode() == Some("AlreadyExists") => anybody = true,
                Err(error) if pending.is_empty() && refuses_growth(&error) && self.may_meet_instead(now) => {
                    return Some(self.meet_instead(&crate::error_chain(&error), not_reached).await);
                }
                Err(error) => {
                    last_reason = reason_of(&error);
                    tracing::warn!(
                        outbox.id = self.send.outbox.0,
                        error = %crate::error_chain(&error),
                        "a recipient could not be invited to the group"
                    );
                    let healing = match problem_in_conversation(&error) {
                        Problem::NotOurs => return Some(Attempt::Release),
                        Problem::Refused => Healing::Permanent,
                        Problem::NotAccepted | Problem::LinkGone | Problem::Unknown => Healing::Temporary,
                    };
                    let why = crate::error_chain(&error);
                    not_reached.push(self.unreached(uri.clone(), why, healing, error.retry_after()));
                }
            }
        }
        {
            let all = view.wait_for(|view| {
                view.ended || pending.iter().all(|(operation_id, _)| view.has_come_to_an_end(operation_id))
            });
            // Who has not answered after the ring time will not.
            let _ = timeout(Duration::from_secs(40), all).await;
        }
        let told = view.borrow().clone();
        let mut failed_to_grow = Vec::new();
        for (operation_id, uri) in pending {
            let unreached = match told.told.get(&operation_id) {
                Some(InvitationProgress::Accepted) => {
                    anybody = true;
                    continue;
                }
                Some(InvitationProgress::Failed(reason)) => {
                    last_reason = reason.clone();
                    let (why, healing) =
                        (describe_invitation_failure(reason), classify_invitation_failure(reason));
                    let unreached = self.unreached(uri, why, healing, None);
                    // That says nothing of whoever was invited.
                    if reason.subcode.as_deref() == Some("EscalationFailed") {
                        failed_to_grow.push(unreached);
                        continue;
                    }
                    unreached
                }
                Some(InvitationProgress::None | InvitationProgress::Ringing) | None => {
                    self.unreached(uri, "did not answer in time".to_owned(), Healing::Temporary, None)
                }
            };
            not_reached.push(unreached);
        }
        if !failed_to_grow.is_empty() && !anybody && self.may_meet_instead(&told) {
            return Some(self.meet_instead("EscalationFailed", not_reached).await);
        }
        not_reached.append(&mut failed_to_grow);
        if in_meeting && !anybody {
            self.leave().await;
            self.gave_up = true;
            let unreached = [now.not_reached.clone(), not_reached].concat();
            return Some(self.nobody_reached(&unreached, None, &last_reason));
        }
        self.assembled(&missing, not_reached);
        None
    }

    /// Posts the text. `Err`: the link is gone, nothing was executed.
    async fn say(&mut self, view: &ConversationView, link: &str, html: bool) -> Result<Attempt, UcwaError> {
        let url = self.context.client.resolve(link)?;
        let (content_type, body) = if self.is_html() && html {
            ("text/html", self.send.body.clone())
        } else if self.is_html() {
            ("text/plain", plain_from_html(&self.send.body))
        } else {
            ("text/plain", self.send.body.clone())
        };
        let conversation_href = view.href.clone();
        let said_in = conversation_href.clone().map_or(SaidIn::Unknown, SaidIn::Conversation);
        let not_reached: Vec<(String, String)> =
            view.not_reached.iter().map(|one| (one.uri.to_string(), one.why.clone())).collect();
        // Who is missing must be known whatever becomes of the answer, and of this process.
        self.note_not_reached(&not_reached).await;
        let before = Before::now(&self.context, said_in);
        match self.context.client.send_message(&url, &self.send.operation_id, content_type, &body).await {
            Ok(location) => Ok(Attempt::Outcome(SendOutcome::MessageAccepted {
                conversation_href: conversation_href.unwrap_or_default(),
                message_href: location,
                as_plain: self.is_html() && content_type == "text/plain",
                not_reached,
            })),
            Err(error) => match problem_of_message(&error) {
                Problem::NotOurs => Ok(Attempt::Release),
                Problem::NotAccepted => Ok(self.not_accepted(&error)),
                Problem::Refused => Ok(Self::refused_by(conversation_href, &error)),
                Problem::LinkGone => Err(error),
                Problem::Unknown => {
                    let attempt = self.settle(&error, before).await;
                    if matches!(attempt, Attempt::Settled) {
                        // The message is there now, and the answer that would have told this is not.
                        self.note_not_reached(&not_reached).await;
                    }
                    Ok(attempt)
                }
            },
        }
    }

    async fn note_not_reached(&self, not_reached: &[(String, String)]) {
        if !not_reached.is_empty() {
            self.commit(SendOutcome::NotReached { not_reached: not_reached.to_vec() }).await;
        }
    }

    /// Reads `messaging` because no event told what can be said; where that is not known or gone, as the conversation now
    /// has it.
    async fn ask_messaging(&self, view: &ConversationView) {
        let known = view.messaging.as_ref().map(|messaging| messaging.href.clone());
        if let Some(href) = known.or_else(|| view.messaging_href.clone()) {
            match self.read(&href).await {
                Asked::Told(resource) => {
                    let messaging = MessagingView::read(&href, &resource);
                    self.view.send_modify(|view| view.messaging = Some(messaging));
                    return;
                }
                Asked::InVain => return,
                Asked::Gone => self.view.send_modify(|view| view.messaging = None),
            }
        }
        self.ask_conversation(view).await;
        let now = self.view.borrow().clone();
        if let Some(href) = now.messaging_href.filter(|_| now.messaging.is_none() && !now.ended)
            && let Asked::Told(resource) = self.read(&href).await
        {
            let messaging = MessagingView::read(&href, &resource);
            self.view.send_modify(|view| view.messaging = Some(messaging));
        }
    }

    /// Reads the conversation because no event told of it. One that is gone is over, also for whoever names it in the
    /// queue. Whether the server said what it is like.
    async fn ask_conversation(&self, view: &ConversationView) -> bool {
        let Some(href) = &view.href else { return false };
        match self.read(href).await {
            Asked::Told(resource) => {
                self.view.send_modify(|view| view.read_conversation(href, &resource));
                return true;
            }
            Asked::Gone => {
                let ended = ConversationEnded { href: href.clone(), reason: None };
                commit_facts(&self.context, vec![Fact::ConversationEnded(ended)]).await;
                self.view.send_modify(|view| view.ended = true);
            }
            Asked::InVain => {}
        }
        false
    }

    /// Reads a resource of the conversation.
    async fn read(&self, href: &str) -> Asked {
        let answer = match self.context.client.resolve(href) {
            Ok(url) => self.context.client.get(&url).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(resource) => Asked::Told(Box::new(resource)),
            // Without UCWA's own words it may be an application pool that is just restarting.
            Err(error)
                if matches!(error.status(), Some(404 | 410))
                    && error.reason().is_some()
                    && error.action() != Action::RecreateApplication =>
            {
                Asked::Gone
            }
            Err(error) => {
                tracing::debug!(error = %crate::error_chain(&error), "the conversation can't be read");
                Asked::InVain
            }
        }
    }

    /// The answer was lost. Waits for the event stream to tell; see the module's documentation.
    async fn settle(&mut self, error: &UcwaError, before: Before) -> Attempt {
        let wait = self.context.settings.settle_after;
        tracing::warn!(
            outbox.id = self.send.outbox.0,
            operation.id = %self.send.operation_id,
            error = %crate::error_chain(error),
            "the answer to a send was lost; the event stream will tell what became of it"
        );
        let why = crate::error_chain(error);
        let attempt = settle(&self.context, &self.send, &mut self.settled, before, wait, &why).await;
        let connected = self.view.borrow().messaging.as_ref().is_some_and(|messaging| messaging.connected);
        self.gave_up = !connected && !matches!(attempt, Attempt::Settled);
        attempt
    }

    fn next_attempt_at(&self, asked: Option<Duration>) -> Timestamp {
        next_attempt_at(&self.context, &self.send, asked)
    }

    fn not_accepted(&self, error: &UcwaError) -> Attempt {
        self.retry_or_fail(
            self.next_attempt_at(error.retry_after()),
            error.status(),
            reason_of(error),
            crate::error_chain(error),
        )
    }

    fn retry_or_fail(
        &self,
        at: Timestamp,
        http_status: Option<u16>,
        reason: FailureReason,
        error: String,
    ) -> Attempt {
        Attempt::Outcome(retry_or_fail(&self.send, at, http_status, reason, error))
    }

    fn refused_by(conversation_href: Option<String>, error: &UcwaError) -> Attempt {
        Self::refused(conversation_href, error.status(), reason_of(error), crate::error_chain(error))
    }

    fn refused(
        conversation_href: Option<String>,
        http_status: Option<u16>,
        reason: FailureReason,
        error: String,
    ) -> Attempt {
        Attempt::Outcome(SendOutcome::Refused { conversation_href, reason, http_status, error })
    }
}

fn next_attempt_at(context: &DeliveryContext, send: &ClaimedSend, asked: Option<Duration>) -> Timestamp {
    next_time(context, send.attempt, asked)
}

/// When what was tried in vain so often may be tried again. `asked` is how long the server wants to be left alone.
fn next_time(context: &DeliveryContext, tries: i64, asked: Option<Duration>) -> Timestamp {
    let now = Timestamp::now();
    let ours = context.settings.retry.next_attempt(now, tries, rand::random());
    let theirs = asked.and_then(|asked| now.checked_add(SignedDuration::try_from(asked).ok()?).ok());
    theirs.map_or(ours, |theirs| theirs.max(ours))
}

fn retry_or_fail(
    send: &ClaimedSend,
    at: Timestamp,
    http_status: Option<u16>,
    reason: FailureReason,
    error: String,
) -> SendOutcome {
    if send.attempt >= send.max_attempts {
        return SendOutcome::Refused {
            conversation_href: None,
            reason,
            http_status,
            error: format!("given up after {} attempts; the last one: {error}", send.attempt),
        };
    }
    SendOutcome::RetryAt { at, reason, http_status, error }
}

/// Commits what became of a send, however long the database takes.
pub(super) async fn commit_send(context: &DeliveryContext, fact: SendFact) {
    let outbox = fact.outbox;
    let commit = ArchiveCommit {
        account: context.account,
        session: context.session,
        epoch: context.epoch,
        cursor: None,
        received_at: Timestamp::now(),
        facts: vec![Fact::Send(fact)],
    };
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        match context.store.commit(commit.clone()).await {
            Ok(_) => return,
            Err(error @ (StoreError::Fenced(_) | StoreError::Closing)) => {
                tracing::warn!(
                    outbox.id = outbox.0,
                    error = %crate::error_chain(&error),
                    "the outcome of a send is left to whoever takes up the account"
                );
                return;
            }
            Err(error @ StoreError::Refused { .. }) if backoff.failures() >= 3 => {
                tracing::error!(
                    outbox.id = outbox.0,
                    error = %crate::error_chain(&error),
                    "the database refuses the outcome of a send; the row stays as it is until the next start"
                );
                return;
            }
            Err(error) => {
                tracing::error!(
                    outbox.id = outbox.0,
                    error = %crate::error_chain(&error),
                    "the outcome of a send could not be stored; trying again"
                );
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}

/// Gives a row back that was claimed and not begun, however long the database takes. If another node holds the account
/// by now, it finds out what became of the row.
pub(crate) async fn release_claim(store: &SharedStore, send: &ClaimedSend) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    while let Err(error) = store.release_claim(send).await {
        if matches!(error, StoreError::Closing | StoreError::Refused { .. } | StoreError::Fenced(_)) {
            tracing::warn!(outbox.id = send.outbox.0, error = %crate::error_chain(&error), "a row stays claimed");
            return;
        }
        tracing::warn!(outbox.id = send.outbox.0, error = %crate::error_chain(&error), "a claimed row is given back later");
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

/// Settles a row that was `sending` when the last process or life, or its conversation, ended. `continuity` is that of
/// the channel when the row was handed over: 0, the beginning, for a row of an earlier life, and `None` for one whose
/// events may have been passed over in that life.
pub(super) async fn settle_left_over(
    context: Arc<DeliveryContext>,
    send: ClaimedSend,
    claimed_at: Timestamp,
    continuity: Option<u64>,
    mut settled: oneshot::Receiver<SettledSend>,
) {
    let before = Before { continuity, at: claimed_at, said_in: SaidIn::Unknown };
    let wait = context.settings.settle_after;
    let why = "the program ended before the server's answer was stored";
    match settle(&context, &send, &mut settled, before, wait, why).await {
        Attempt::Outcome(outcome) => {
            commit_send(&context, SendFact { outbox: send.outbox, operation_id: send.operation_id, outcome })
                .await;
        }
        Attempt::Settled | Attempt::Release | Attempt::ThreadTaken | Attempt::BeginAnew(_) => {}
    }
}

/// What the events say of a request whose answer was lost.
enum Word {
    /// They told of it.
    Told,
    /// The channel missed nothing and tells of no such operation: the server did not take it.
    Silence,
    /// Nobody can tell, and why.
    NotToBeHad(&'static str),
}

/// Waits until the event stream tells of an operation, or has had its time to. `continuity` is that of the channel before
/// the request, `None` if events are known to have been missed since.
async fn hear(
    context: &DeliveryContext,
    told: impl Future<Output = ()>,
    continuity: Option<u64>,
    wait: Duration,
) -> Word {
    let began = Instant::now();
    tokio::pin!(told);
    if timeout(wait / 2, told.as_mut()).await.is_ok() {
        return Word::Told;
    }
    // A half-open connection would keep the event for itself: ask anew, then listen for as long again.
    let asked_again_at = Instant::now();
    // Those who ask at the same time share a GET, though it may be begun between them.
    let anew = asked_again_at.checked_sub(AT_THE_SAME_TIME).unwrap_or(asked_again_at);
    loop {
        context.channel.ask_again(anew, Instant::now());
        if timeout(LOOK_EVERY, told.as_mut()).await.is_ok() {
            return Word::Told;
        }
        if asked_again_at.elapsed() < wait / 2 {
            continue;
        }
        // Before the continuity: whatever broke it did so before its answer counted as heard.
        let heard_all_until = context.channel.heard_all_until(Instant::now());
        if continuity != Some(context.channel.continuity()) {
            return Word::NotToBeHad("events may have been missed since it was sent");
        }
        // A GET that was begun since would have brought the event, or still waits for it.
        if context.channel.asked_since(anew) && heard_all_until >= Some(asked_again_at + SILENCE_COUNTS_AFTER)
        {
            return Word::Silence;
        }
        if began.elapsed() > SETTLE_AT_MOST {
            return Word::NotToBeHad("the event channel can't be read");
        }
    }
}

async fn settle(
    context: &DeliveryContext,
    send: &ClaimedSend,
    settled: &mut oneshot::Receiver<SettledSend>,
    before: Before,
    wait: Duration,
    why: &str,
) -> Attempt {
    // Whoever could tell has gone: then there is only time to wait for.
    let told = async {
        if settled.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    match hear(context, told, before.continuity, wait).await {
        Word::Told => Attempt::Settled,
        Word::NotToBeHad(because) => Attempt::Outcome(uncertain(context, send, because, why)),
        // Unless an event without an id was of it.
        Word::Silence => {
            let silent = retry_or_fail(
                send,
                Timestamp::now(),
                None,
                FailureReason::default(),
                format!("not accepted by the server: {why}"),
            );
            let because = "the server told of a message from this account that nobody can place";
            Attempt::Outcome(SendOutcome::Unheard {
                since: before.at,
                said_in: before.said_in,
                silent: Box::new(silent),
                doubtful: Box::new(uncertain(context, send, because, why)),
            })
        }
    }
}

fn uncertain(context: &DeliveryContext, send: &ClaimedSend, because: &str, why: &str) -> SendOutcome {
    let error = format!("nobody can tell whether the server took it: {why}, and {because}");
    // Not at once: what is known now is all there is, and a conversation log may yet tell.
    let again_at = context.settings.retry_uncertain.then(|| next_attempt_at(context, send, None));
    SendOutcome::Uncertain { error, again_at }
}

fn reason_of(error: &UcwaError) -> FailureReason {
    error.reason().map_or_else(FailureReason::default, |reason| FailureReason {
        code: reason.code.clone(),
        subcode: reason.subcode.clone(),
        message: reason.message.clone(),
    })
}

/// `addParticipant` is refused for the conversation's sake: nothing is said of the one who was to be added.
fn refuses_growth(error: &UcwaError) -> bool {
    matches!(error.status(), Some(403 | 405 | 409))
        && matches!(error.subcode().unwrap_or("None"), "None" | "EscalationFailed")
}

/// The application is gone, whatever was asked of it.
fn is_about_the_application(subcode: &str) -> bool {
    matches!(subcode, "ApplicationNotFound" | "InactiveApplicationExpired" | "TooManyApplications")
}

/// `sendMessage` (protocol: answers of section "Send in a connected conversation").
fn problem_of_message(error: &UcwaError) -> Problem {
    match (error.status(), error.subcode().unwrap_or("None")) {
        (Some(400 | 405 | 413 | 415), _) => Problem::Refused,
        (Some(404 | 410), subcode) if is_about_the_application(subcode) => Problem::NotAccepted,
        (Some(401 | 429 | 503), _) => Problem::NotAccepted,
        (Some(403 | 404 | 409 | 410), _) => Problem::LinkGone,
        (Some(_), _) => Problem::Unknown,
        (None, _) if error.was_sent() => Problem::Unknown,
        (None, _) if matches!(error, UcwaError::NotPermitted { .. }) => Problem::NotOurs,
        (None, _) => Problem::NotAccepted,
    }
}

/// `addMessaging` and `addParticipant` are asked of a conversation: whatever is not found there is that or its messaging,
/// unless the answer says that it is the recipient.
fn problem_in_conversation(error: &UcwaError) -> Problem {
    match (error.status(), error.subcode().unwrap_or("None")) {
        (Some(404 | 410), subcode)
            if error.reason().is_some()
                && subcode != "DestinationNotFound"
                && !is_about_the_application(subcode) =>
        {
            Problem::LinkGone
        }
        _ => problem_of_invitation(error),
    }
}

/// `startMessaging`, and what `addMessaging` has in common with it.
fn problem_of_invitation(error: &UcwaError) -> Problem {
    match (error.status(), error.subcode().unwrap_or("None")) {
        (Some(404), subcode) if is_about_the_application(subcode) => Problem::NotAccepted,
        (Some(400..500), subcode) if is_for_want_of_room(Some(subcode)) => Problem::NotAccepted,
        // Not UCWA's words: the web application is restarting, and knows nobody.
        (Some(404), _) if error.reason().is_none() => Problem::NotAccepted,
        (Some(401 | 409 | 410 | 429 | 503), _) => Problem::NotAccepted,
        (Some(500), "CallbackChannelError") => Problem::NotAccepted,
        (Some(400 | 403 | 404 | 405 | 413 | 415), _) => Problem::Refused,
        (Some(_), _) => Problem::Unknown,
        (None, _) if error.was_sent() => Problem::Unknown,
        (None, _) if matches!(error, UcwaError::NotPermitted { .. }) => Problem::NotOurs,
        (None, _) => Problem::NotAccepted,
    }
}
