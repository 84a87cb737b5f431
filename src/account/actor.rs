//! One signed-in account: owns its event channel and its conversations, and does for them what needs the whole view.
//!
//! It signs in, starts the channel, takes up what an earlier life left open, answers invitations, keeps each
//! conversation's view up to date from the events, fetches what events only linked, hands outbox rows to the right
//! conversation and reports activity. Whatever ends it is told to the supervisor exactly once ([`AccountExited`]).

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use actix::prelude::*;
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::{sync::oneshot, time::Instant};
use tracing::Instrument as _;
use url::Url;

use crate::{
    account::{
        AccountEnvironment, Online,
        backfill::{self, BackfillHints},
        backoff::Backoff,
        channel_state::ChannelEnd,
        conversation::{
            ConversationActor, ConversationExited, ConversationView, Deliver, DeliveryEnd, DeliveryFinished,
            Gathering, InvitationProgress, MessagingView, SharedView, StopConversation, Unreached,
            shared_view,
        },
        delivery::{
            DeliveryContext, call_operation_id, commit_send, first_to_call, meeting_operation_ids,
            release_claim, settle_left_over,
        },
        event_channel::{
            ChannelExited, ChannelHealth, Continuity, EventChannel, EventsCommitted, Follow, Reading,
            StopChannel,
        },
        sign_in::{SignInFailure, SignedIn, describe_end, sign_in},
        take_up::{Open, TakenUp, learn_open, take_up},
    },
    archive::{
        fact::{
            ArchiveCommit, Fact, FailureReason, Fetch, FetchedResource, InvitationAction, InvitationAnswered,
            InvitationKind, SendFact, SendOutcome, Unfetchable,
        },
        interpret::interpret_fetched,
        retry::is_for_want_of_room,
    },
    identifiers::{ConversationId, OperationId, OutboxId, SipUri},
    metrics::{self, Reconnect, Restarted},
    outbox::admission::{OTHER_RECIPIENTS, destination_key, other_recipients},
    store::{
        Account, AccountState, AttentionReason, ClaimedSend, CommitOutcome, InvitationPolicy, SettledSend,
        StoreError,
    },
    traces,
    ucwa::{Event, EventKind, Resource, Sender, SignInStep, UcwaClient, UcwaError},
};

/// Requests that fetch linked resources of one account, at most so many at once.
const FETCHES_AT_ONCE: usize = 4;
/// How often a linked resource is asked for before it counts as unfetchable.
const FETCH_ATTEMPTS: u32 = 6;
/// An activity report is due every four minutes; three leave room for a repetition.
const REPORT_EVERY: Duration = Duration::from_secs(180);
/// How often the messaging of a conference is asked for before it is left alone until its link has gone and come back.
const MESSAGING_ATTEMPTS: u32 = 5;
/// Messaging that is gone, or that could not be added, is looked at again after this.
const MESSAGING_GRACE: Duration = Duration::from_secs(2);
/// How long an invitation can be answered: the server lets it ring for about 30 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(25);
/// How long the answers of requests that are out are waited for when the application is gone: they say that nothing was
/// accepted, which nobody could tell afterwards.
const HEAR_ANSWERS_WITHIN: Duration = Duration::from_secs(3);
/// How long a stopping account waits for sends that are out.
const FINISH_SENDS_WITHIN: Duration = Duration::from_secs(10);

/// Why a life of an account ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// Its supervisor asked for it.
    Requested,
    /// Something temporary, in words; not before the given time.
    Temporary(String, Option<Duration>),
    /// The UCWA application is lost or has to be taken up anew, in words.
    SessionLost(String),
    /// An operator has to do something, in words; by itself again after the time, if there is one.
    NeedsAttention(AttentionReason, String, Option<Duration>),
    /// It or one of its children panicked.
    Panicked,
    /// Another node holds it.
    Fenced,
}

/// Sent by an [`AccountActor`] to its supervisor exactly once, whatever ended it.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AccountExited {
    /// Which account.
    pub account: crate::identifiers::AccountId,
    /// Which of its lives.
    pub life: u64,
    /// Why.
    pub reason: ExitReason,
    /// How long it was signed in.
    pub online_for: Duration,
}

/// Sent by the supervisor: finish what is being sent, then end. With a reason, sign out for good: the UCWA
/// application is deleted and the session ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopAccount {
    /// Why the account is signed out for good; `None` leaves the application for the next start.
    pub sign_out: Option<String>,
}

/// Sent by the supervisor: the account is not this node's any more. End at once and touch nothing: whoever holds the
/// account now goes on with its application, and settles what was being sent.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AbandonAccount;

/// Sent by the dispatcher: send this claimed row. If the account is gone, the dispatcher gives the row back.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Relay(pub ClaimedSend);

/// Sent by the account's own fetches.
#[derive(Message)]
#[rtype(result = "()")]
struct Fetched {
    fetch: Fetch,
    resource: Option<Resource>,
    outcome: CommitOutcome,
    /// Of what it was fetched for, and of what it links in turn.
    reading: Arc<Reading>,
}

#[derive(Message)]
#[rtype(result = "()")]
struct SignInProgressed(SignInStep);

/// A row that somebody is busy with.
struct Handed {
    send: ClaimedSend,
    /// When somebody began with it, or somewhat before.
    at: Timestamp,
    /// What [`ChannelHealth::continuity`] was then.
    continuity: Option<u64>,
    /// The conversation that has it; none while it is only being settled.
    conversation: Option<u64>,
    /// Tells whoever is busy with it that the event stream settled it.
    tell: Option<oneshot::Sender<SettledSend>>,
}

struct Conversation {
    address: Addr<ConversationActor>,
    view: SharedView,
    href: Option<String>,
    destination: Option<String>,
    /// The IM leg was connected before.
    had_messaging: bool,
    /// How often messaging was asked for since it was last there.
    asked_for_messaging: u32,
    /// It is being asked for, or will be looked at again soon.
    asking_for_messaging: bool,
}

impl Conversation {
    /// Which of several to give up first: one of two, of which nothing is missed since the other side may call again; of
    /// those, the one in which nothing was said for the longest time.
    fn worth(&self) -> (bool, Instant) {
        let view = self.view.borrow();
        (view.is_conference(), view.last_activity)
    }
}

/// What exists only while the account is signed in.
struct Live {
    client: UcwaClient,
    session: crate::identifiers::SessionId,
    channel: Addr<EventChannel>,
    health: Arc<ChannelHealth>,
    application: Url,
    report_my_activity: Option<Url>,
    context: Arc<DeliveryContext>,
    conversation_logs: Option<Url>,
    backfill: Arc<BackfillHints>,
}

/// See the module's documentation.
pub struct AccountActor {
    environment: AccountEnvironment,
    account: Account,
    life: u64,
    epoch: i64,
    supervisor: Recipient<AccountExited>,
    live: Option<Live>,
    conversations: HashMap<u64, Conversation>,
    next_conversation: u64,
    by_href: HashMap<String, u64>,
    by_destination: HashMap<String, u64>,
    /// Which conversation made an operation.
    operations: HashMap<OperationId, u64>,
    /// Rows that were handed to a conversation or are being settled.
    handed: HashMap<OutboxId, Handed>,
    /// What is open on the server is being learnt, for which time of this life.
    learning: Option<u64>,
    learnt: u64,
    /// Rows that wait for it, so that open conversations are used.
    held_back: VecDeque<ClaimedSend>,
    /// Rows whose thread the server has open, somewhere.
    looked_for: HashSet<OutboxId>,
    /// Which conversation an invitation belongs to.
    invitations: HashMap<String, u64>,
    /// How invitations ended that nobody knows yet, since their resource is being fetched.
    unread_ends: HashMap<String, InvitationProgress>,
    /// Incoming invitations that were answered, so that each is answered once.
    answered: HashSet<String>,
    /// Invitations whose resource was asked for the link that its event did not carry.
    looked_for_link: HashSet<String>,
    /// Conversations that are over: what comes late about one does not bring it back.
    ended: HashSet<String>,
    exit: ExitReason,
    stopping: Option<StopAccount>,
    /// The application is gone; the life ends with the last answer.
    leaving: bool,
    finishing: bool,
    online_since: Option<Instant>,
    span: tracing::Span,
}

impl AccountActor {
    /// A life of an account, number `life`, under the lease with this epoch.
    pub fn new(
        environment: AccountEnvironment,
        account: Account,
        life: u64,
        epoch: i64,
        supervisor: Recipient<AccountExited>,
    ) -> Self {
        let span = tracing::info_span!("account", account.id = account.id.0);
        Self {
            environment,
            account,
            life,
            epoch,
            supervisor,
            live: None,
            conversations: HashMap::new(),
            next_conversation: 0,
            by_href: HashMap::new(),
            by_destination: HashMap::new(),
            operations: HashMap::new(),
            handed: HashMap::new(),
            learning: None,
            learnt: 0,
            held_back: VecDeque::new(),
            looked_for: HashSet::new(),
            invitations: HashMap::new(),
            unread_ends: HashMap::new(),
            answered: HashSet::new(),
            looked_for_link: HashSet::new(),
            ended: HashSet::new(),
            exit: ExitReason::Requested,
            stopping: None,
            leaving: false,
            finishing: false,
            online_since: None,
            span,
        }
    }

    fn publish(&self, state: AccountState, detail: Option<String>) {
        self.environment.states.post(self.account.id, state, detail);
    }

    fn end(&mut self, reason: ExitReason, ctx: &mut Context<Self>) {
        self.exit = reason;
        ctx.stop();
    }

    /// Spawns a future that belongs to this life and logs with the account.
    fn spawn(&self, future: impl Future<Output = ()> + 'static, ctx: &mut Context<Self>) {
        ctx.spawn(tracing::Instrument::instrument(future, self.span.clone()).into_actor(self));
    }

    fn signed_in(&mut self, result: Result<SignedIn, SignInFailure>, ctx: &mut Context<Self>) {
        if let Some(stop) = &self.stopping {
            self.stop_at_sign_in(stop.sign_out.clone(), result.ok(), ctx);
            return;
        }
        let signed_in = match result {
            Ok(signed_in) => signed_in,
            Err(SignInFailure::Temporary(sentence, after)) => {
                self.end(ExitReason::Temporary(sentence, after), ctx);
                return;
            }
            Err(SignInFailure::Attention(why, sentence, after)) => {
                self.end(ExitReason::NeedsAttention(why, sentence, after), ctx);
                return;
            }
        };
        let SignedIn { client, session, application, cursor, resumed } = signed_in;
        let health = Arc::new(ChannelHealth::default());
        let context = Arc::new(DeliveryContext {
            store: Arc::clone(&self.environment.store),
            client: client.clone(),
            account: self.account.id,
            session: session.id,
            epoch: self.epoch,
            start_messaging: application.start_messaging(),
            start_online_meeting: application.start_online_meeting(),
            groups_meet: AtomicBool::new(false),
            may_meet: AtomicBool::new(true),
            channel: Arc::clone(&health),
            settings: Arc::clone(&self.environment.settings),
        });
        let backfill = Arc::new(BackfillHints::default());
        let channel = EventChannel::new(
            Follow {
                client: client.clone(),
                store: Arc::clone(&self.environment.store),
                account: self.account.id,
                session: session.id,
                epoch: self.epoch,
                application: application.href.clone(),
                cursor,
                parameters: self.environment.settings.poll.clone(),
                health: Arc::clone(&health),
                backfill: Arc::clone(&backfill),
            },
            ctx.address().recipient(),
            ctx.address().recipient(),
        )
        .start();
        self.live = Some(Live {
            client: client.clone(),
            session: session.id,
            channel,
            health,
            application: application.href.clone(),
            report_my_activity: application.report_my_activity(),
            context: Arc::clone(&context),
            conversation_logs: application.conversation_logs(),
            backfill,
        });
        if let Some(name) = application.display_name()
            && self.account.display_name.as_ref() != Some(&name)
        {
            let (store, account) = (Arc::clone(&self.environment.store), self.account.id);
            self.spawn(
                async move {
                    if let Err(error) = store.set_display_name(account, &name).await {
                        tracing::warn!(error = %crate::error_chain(&error), "the display name could not be stored");
                    }
                },
                ctx,
            );
        }
        Self::report_activity_later(ctx);
        // What an earlier life left open is taken up before new rows are claimed, so that its conversations are used.
        let conversations = application.conversations();
        let take_up = async move {
            if !resumed {
                return TakenUp::default();
            }
            take_up(&context, conversations).await
        };
        ctx.spawn(
            tracing::Instrument::instrument(take_up, self.span.clone())
                .into_actor(self)
                .map(|taken_up, account, ctx| account.took_up(taken_up, ctx)),
        );
    }

    /// The account was disabled while it signed in: ends what the sign-in found or made.
    fn stop_at_sign_in(
        &mut self,
        sign_out: Option<String>,
        signed_in: Option<SignedIn>,
        ctx: &mut Context<Self>,
    ) {
        self.finishing = true;
        let (store, account) = (Arc::clone(&self.environment.store), self.account.id);
        let ending = async move {
            let Some(reason) = sign_out else { return };
            if let Some(signed_in) = signed_in
                && let Err(error) = signed_in.client.delete_application(&signed_in.application.href).await
            {
                // The server expires it by itself.
                tracing::debug!(error = %crate::error_chain(&error), "the application could not be deleted");
            }
            end_open_session(&store, account, &reason).await;
        };
        ctx.spawn(
            tracing::Instrument::instrument(ending, self.span.clone())
                .into_actor(self)
                .map(|(), _, ctx| ctx.stop()),
        );
    }

    fn took_up(&mut self, taken_up: TakenUp, ctx: &mut Context<Self>) {
        if self.stopping.is_some() {
            // What was found stays in the database for the next life.
            return;
        }
        self.go_on_with(taken_up.open, ctx);
        for left_over in taken_up.unsettled {
            let continuity = (!left_over.events_missed).then_some(0);
            self.settle_left_over(left_over.send, left_over.claimed_at, continuity, ctx);
        }
        let Some(live) = &self.live else { return };
        self.environment.directory.enter(
            self.account.id,
            Online { address: ctx.address(), channel: Arc::clone(&live.health), session: live.session },
        );
        self.online_since = Some(Instant::now());
        let reading = backfill::run(
            Arc::clone(&live.context),
            live.application.clone(),
            live.conversation_logs.clone(),
            Arc::clone(&live.backfill),
        );
        self.spawn(reading, ctx);
        self.publish(AccountState::Online, None);
        self.span.in_scope(|| tracing::info!("signed in"));
    }

    /// The server lost track of what this application followed: whatever was open has ended. Each conversation's actor
    /// ends when what it has under way is answered; what it has not begun goes back to the queue.
    fn forget_conversations(&mut self, ctx: &mut Context<Self>) {
        // What nobody has begun never left.
        for send in self.unbegun() {
            self.give_back(send, ctx);
        }
        self.by_href.clear();
        self.by_destination.clear();
        self.operations.clear();
        self.invitations.clear();
        self.unread_ends.clear();
        for conversation in self.conversations.values() {
            conversation.view.send_modify(|view| view.ended = true);
        }
    }

    /// Takes the claimed rows that wait until it is known what is open.
    fn unbegun(&mut self) -> Vec<ClaimedSend> {
        self.held_back.drain(..).collect()
    }

    /// Asks the server what is open, in the same application and without holding up its event channel.
    fn learn_what_is_open(&mut self, ctx: &mut Context<Self>) {
        let Some(live) = &self.live else { return };
        self.learnt += 1;
        let number = self.learnt;
        self.learning = Some(number);
        let (context, application) = (Arc::clone(&live.context), live.application.clone());
        let learning = async move { learn_open(&context, &application).await };
        ctx.spawn(
            tracing::Instrument::instrument(learning, self.span.clone())
                .into_actor(self)
                .map(move |open, account, ctx| account.learnt_what_is_open(number, open, ctx)),
        );
    }

    fn learnt_what_is_open(&mut self, number: u64, open: Open, ctx: &mut Context<Self>) {
        if self.learning != Some(number) {
            // The server lost track once more meanwhile.
            return;
        }
        self.learning = None;
        if self.stopping.is_none() {
            self.go_on_with(open, ctx);
        }
        for outbox in std::mem::take(&mut self.looked_for) {
            if let Some(handed) = self.handed.remove(&outbox) {
                self.relay_in_thread(handed.send, ctx);
            }
        }
        for send in std::mem::take(&mut self.held_back) {
            self.relay(send, ctx);
        }
    }

    /// The server would not begin a conversation because one of this thread is open: says the row in that, if it is with
    /// the same people.
    fn relay_in_thread(&mut self, mut send: ClaimedSend, ctx: &mut Context<Self>) {
        let Some(live) = self.live.as_ref().filter(|_| self.stopping.is_none()) else {
            self.give_back(send, ctx);
            return;
        };
        if let Some(number) = self.conversation_of_thread(&send) {
            self.hand_over(number, send, ctx);
            return;
        }
        if matches!(send.conversation.take(), Some((_, None))) {
            // Only we wanted to go on with the thread of a conversation that is over.
            send.thread_id = None;
            self.relay_now(send, ctx);
            return;
        }
        let reason = FailureReason {
            code: Some("Conflict".to_owned()),
            subcode: Some("ThreadIdAlreadyExists".to_owned()),
            message: None,
        };
        let error = format!(
            "the server has a conversation of thread {} open, and none with only {} was found: leave thread_id out, or \
             name that conversation by conversation_id",
            send.thread_id.take().unwrap_or_default(),
            destination_key(&send.recipients),
        );
        self.refuse(Arc::clone(&live.context), send, reason, error, ctx);
    }

    /// Takes over what was found open.
    fn go_on_with(&mut self, open: Open, ctx: &mut Context<Self>) {
        for href in open.gone {
            if let Some(conversation) = self.known_conversation(&href) {
                conversation.view.send_modify(|view| view.ended = true);
            }
            self.ended.insert(href);
        }
        for found in open.conversations {
            let Some(number) = self.conversation_by_href(&found.href, ctx) else { continue };
            if let Some(conversation) = self.conversations.get(&number) {
                // Events that came meanwhile are newer than what was read.
                conversation.view.send_modify(|view| {
                    view.thread_id = view.thread_id.take().or(found.view.thread_id);
                    view.messaging_href = view.messaging_href.take().or(found.view.messaging_href);
                    view.messaging = view.messaging.take().or(found.view.messaging);
                    view.add_participant = view.add_participant.take().or(found.view.add_participant);
                    view.multiparty |= found.view.multiparty || found.multiparty;
                    view.state = view.state.take().or(found.view.state);
                });
            }
            // What we began for somebody, perhaps a group that is being called together, stays theirs.
            let is_theirs = self
                .conversations
                .get(&number)
                .is_some_and(|conversation| conversation.destination.is_some());
            if is_theirs {
                continue;
            }
            if let Some(group) = found.group {
                // Rows look who of them is there.
                if let Some(conversation) = self.conversations.get(&number) {
                    conversation.view.send_modify(|view| {
                        view.gathering = Gathering::Assembled;
                        view.multiparty = true;
                    });
                }
                self.serve_destination(number, &group);
            } else if let Some(remote) = found.remote.filter(|_| !found.multiparty) {
                self.serve_destination(number, &remote);
            }
        }
        self.fetch(open.unfetched, None, ctx);
        self.hear_conferences(ctx);
    }

    fn settle_left_over(
        &mut self,
        send: ClaimedSend,
        claimed_at: Timestamp,
        continuity: Option<u64>,
        ctx: &mut Context<Self>,
    ) {
        let Some(live) = &self.live else { return };
        let (tell, settled) = oneshot::channel();
        self.handed.insert(
            send.outbox,
            Handed { send: send.clone(), at: claimed_at, continuity, conversation: None, tell: Some(tell) },
        );
        let (outbox, context) = (send.outbox, Arc::clone(&live.context));
        let operation_id = send.operation_id.clone();
        ctx.spawn(
            tracing::Instrument::instrument(
                settle_left_over(context, send, claimed_at, continuity, settled),
                self.span.clone(),
            )
            .into_actor(self)
            .map(move |(), account, ctx| account.delivery_finished(outbox, &operation_id, ctx)),
        );
    }

    // ------------------------------------------------------------------------------------------ events

    fn observe(&mut self, sender: &Sender, event: &Event, ctx: &mut Context<Self>) {
        match (event.rel.as_str(), &event.resource) {
            ("messagingInvitation" | "onlineMeetingInvitation", resource) => {
                let kind = if event.rel == "messagingInvitation" {
                    InvitationKind::Messaging
                } else {
                    InvitationKind::OnlineMeeting
                };
                match resource {
                    Some(resource) => {
                        let progress = invitation_progress(Some(event), resource);
                        self.see_invitation(kind, &event.href, progress, resource, ctx);
                    }
                    None => self.see_invitation_end(event, ctx),
                }
            }
            ("participantInvitation", Some(resource)) if is_incoming(resource) => {
                let progress = invitation_progress(Some(event), resource);
                self.see_invitation(InvitationKind::Participant, &event.href, progress, resource, ctx);
            }
            ("participantInvitation", Some(resource)) => {
                self.see_participant_invitation(invitation_progress(Some(event), resource), resource);
            }
            ("participantInvitation", None) => self.see_invitation_end(event, ctx),
            ("conversation", _) if event.kind == EventKind::Deleted => {
                if let Some(conversation) = self.known_conversation(&event.href) {
                    conversation.view.send_modify(|view| view.ended = true);
                }
                self.ended.insert(event.href.clone());
            }
            ("conversation", Some(resource)) => self.see_conversation(&event.href, resource, ctx),
            ("messaging", Some(resource)) if sender.rel == "conversation" => {
                let messaging = MessagingView::read(&event.href, resource);
                self.see_messaging(&sender.href, messaging, ctx);
            }
            ("messaging", None) if sender.rel == "conversation" => {
                self.read_messaging(sender.href.clone(), &event.href, ctx);
            }
            ("message", _) => {
                if let Some(conversation) = self.known_conversation(&sender.href) {
                    conversation.view.send_modify(|view| view.last_activity = Instant::now());
                }
            }
            _ => {}
        }
    }

    fn see_conversation(&mut self, href: &str, resource: &Resource, ctx: &mut Context<Self>) {
        let Some(number) = self.conversation_by_href(href, ctx) else { return };
        let Some(conversation) = self.conversations.get_mut(&number) else { return };
        conversation.view.send_modify(|view| view.read_conversation(href, resource));
        // What is meant for one person is not said where others listen.
        let multiparty = conversation.view.borrow().multiparty;
        if multiparty
            && let Some(destination) = conversation.destination.take_if(|known| !known.contains(';'))
        {
            self.by_destination.retain(|known, other| *known != destination || *other != number);
        }
    }

    fn see_messaging(&mut self, conversation_href: &str, messaging: MessagingView, ctx: &mut Context<Self>) {
        let Some(number) = self.conversation_by_href(conversation_href, ctx) else { return };
        if let Some(conversation) = self.conversations.get_mut(&number) {
            conversation.had_messaging |= messaging.connected;
            conversation.view.send_modify(|view| {
                if messaging.connected && view.invitation == InvitationProgress::Ringing {
                    view.invitation = InvitationProgress::Accepted;
                }
                view.messaging_href = Some(messaging.href.clone());
                view.messaging = Some(messaging);
            });
        }
    }

    /// A `messaging` event that only links: ask what it says.
    fn read_messaging(&mut self, conversation_href: String, href: &str, ctx: &mut Context<Self>) {
        let Some(live) = &self.live else { return };
        let (client, href) = (live.client.clone(), href.to_owned());
        let read = async move {
            let url = client.resolve(&href)?;
            client.get(&url).await.map(|resource| MessagingView::read(&href, &resource))
        };
        ctx.spawn(read.into_actor(self).map(move |read: Result<_, UcwaError>, account, ctx| match read {
            Ok(messaging) => {
                account.see_messaging(&conversation_href, messaging, ctx);
                account.hear_conferences(ctx);
            }
            Err(error) => {
                tracing::debug!(error = %crate::error_chain(&error), "messaging could not be read");
            }
        }));
    }

    /// An invitation with its resource, from an event or fetched after one.
    fn see_invitation(
        &mut self,
        kind: InvitationKind,
        href: &str,
        progress: InvitationProgress,
        resource: &Resource,
        ctx: &mut Context<Self>,
    ) {
        let incoming = is_incoming(resource);
        self.learn_of_thread(&progress, ctx);
        if !incoming {
            self.make_room_if_refused(&progress, ctx);
        }
        let conversation = resource.link("conversation").map(|link| link.href.clone());
        let operation_id = resource.property("operationId").map(|id| OperationId(id.to_owned()));
        let number = if incoming {
            conversation.as_ref().and_then(|conversation| self.conversation_by_href(conversation, ctx))
        } else {
            let number =
                operation_id.as_ref().and_then(|operation_id| self.operations.get(operation_id).copied());
            if let (Some(number), Some(conversation)) = (number, &conversation) {
                self.bind(number, conversation);
            }
            number
        };
        if incoming {
            if progress == InvitationProgress::Ringing {
                self.answer_invitation(kind, href, resource, ctx);
            } else {
                self.answered.remove(href);
                self.looked_for_link.remove(href);
            }
            let caller = resource
                .embedded("from")
                .and_then(|from| from.property("uri"))
                .and_then(|uri| uri.parse::<SipUri>().ok());
            if let (Some(number), Some(caller)) = (number, caller)
                && kind == InvitationKind::Messaging
                && self.policy() == InvitationPolicy::Accept
                && !matches!(progress, InvitationProgress::Failed(_))
            {
                self.serve_destination(number, caller.as_str());
            }
        }
        let Some(number) = number else { return };
        self.invitations.insert(href.to_owned(), number);
        let derived = match &progress {
            InvitationProgress::Failed(_) => resource.link("derivedConversation"),
            _ => None,
        };
        let mut destination = None;
        if let Some(conversation) = self.conversations.get(&number) {
            conversation.view.send_modify(|view| {
                if let Some(link) = resource.link("messaging") {
                    view.messaging_href.get_or_insert_with(|| link.href.clone());
                }
                if let Some(operation_id) = operation_id.filter(|_| !incoming) {
                    view.hear_of(operation_id, progress.clone());
                }
                view.see_invitation(progress);
            });
            destination.clone_from(&conversation.destination);
        }
        // The talk goes on elsewhere: what is said to the same person from now on is said there (protocol 11.3).
        if let (Some(derived), Some(destination)) = (derived, destination)
            && let Some(next) = self.conversation_by_href(&derived.href, ctx)
            && self.conversations.get(&next).is_some_and(|next| !next.view.borrow().multiparty)
        {
            self.serve_destination(next, &destination);
        }
    }

    /// An invitation of ours failed because its thread has an open conversation: the next attempt is to find that.
    fn learn_of_thread(&mut self, progress: &InvitationProgress, ctx: &mut Context<Self>) {
        let InvitationProgress::Failed(reason) = progress else { return };
        if reason.subcode.as_deref() == Some("ThreadIdAlreadyExists") && self.learning.is_none() {
            self.learn_what_is_open(ctx);
        }
    }

    /// An invitation of ours failed because the account has too many conversations: the next attempt is to find room.
    fn make_room_if_refused(&self, progress: &InvitationProgress, ctx: &mut Context<Self>) {
        if let InvitationProgress::Failed(reason) = progress
            && is_for_want_of_room(reason.subcode.as_deref())
        {
            self.make_room(ctx);
        }
    }

    /// The server lets this account have no more conversations: leaves one that nobody needs now.
    fn make_room(&self, ctx: &mut Context<Self>) {
        let Some(live) = &self.live else { return };
        let busy: HashSet<u64> = self.handed.values().filter_map(|handed| handed.conversation).collect();
        let can_go = |(number, conversation): &(&u64, &Conversation)| {
            let view = conversation.view.borrow();
            let rings = view.invitation == InvitationProgress::Ringing;
            !busy.contains(*number) && !view.ended && !rings && view.href.is_some()
        };
        let idlest = self.conversations.iter().filter(can_go);
        let Some((_, conversation)) =
            idlest.min_by_key(|(number, conversation)| (conversation.worth(), **number))
        else {
            tracing::warn!(
                "the server lets this account have no more conversations, and all of them are in use"
            );
            return;
        };
        let Some(href) = conversation.view.borrow().href.clone() else { return };
        let idle = conversation.view.borrow().last_activity.elapsed();
        tracing::info!(
            idle_seconds = idle.as_secs(),
            "the server lets this account have no more conversations; the one that was idle for the longest time is left"
        );
        // Rows for the same people begin another one from now on.
        conversation.view.send_modify(|view| view.ended = true);
        let client = live.client.clone();
        let leaving = async move {
            let left = match client.resolve(&href) {
                Ok(url) => client.delete(&url).await,
                Err(error) => Err(error),
            };
            if let Err(error) = left {
                tracing::warn!(error = %crate::error_chain(&error), "an idle conversation could not be left");
            }
        };
        self.spawn(leaving, ctx);
    }

    /// An invitation event without its resource: enough to know that it ended. Whom it concerns may only be known once the
    /// resource is read; why it failed, only the event says.
    fn see_invitation_end(&mut self, event: &Event, ctx: &mut Context<Self>) {
        if event.kind != EventKind::Completed {
            return;
        }
        self.answered.remove(&event.href);
        self.looked_for_link.remove(&event.href);
        let progress = invitation_progress(Some(event), &Resource::default());
        let Some(number) = self.invitations.remove(&event.href) else {
            self.unread_ends.insert(event.href.clone(), progress);
            return;
        };
        self.make_room_if_refused(&progress, ctx);
        if let Some(conversation) = self.conversations.get(&number) {
            conversation.view.send_modify(|view| view.see_invitation(progress));
        }
    }

    /// Somebody whom this account brings into a group: from an event, or fetched after one.
    fn see_participant_invitation(&mut self, progress: InvitationProgress, resource: &Resource) {
        let Some(operation_id) = resource.property("operationId") else { return };
        let Some(conversation) =
            resource.link("conversation").and_then(|link| self.known_conversation(&link.href))
        else {
            return;
        };
        conversation.view.send_modify(|view| view.hear_of(OperationId(operation_id.to_owned()), progress));
    }

    /// In a conference everybody adds messaging for themselves: what is said in one that this account is in is only
    /// told to it afterwards (protocol 14).
    fn hear_conferences(&mut self, ctx: &mut Context<Self>) {
        if self.stopping.is_some() || self.policy() != InvitationPolicy::Accept {
            return;
        }
        let deaf: Vec<u64> = self
            .conversations
            .iter_mut()
            .filter_map(|(number, conversation)| {
                let view = conversation.view.borrow();
                // Connected, or not to be had: what comes after that is another matter.
                if view.messaging.as_ref().is_some_and(|messaging| messaging.add_messaging.is_none()) {
                    conversation.asked_for_messaging = 0;
                }
                let lacks = view.lacks_messaging()
                    && !conversation.asking_for_messaging
                    && conversation.asked_for_messaging < MESSAGING_ATTEMPTS;
                lacks.then_some(*number)
            })
            .collect();
        for number in deaf {
            let Some(conversation) = self.conversations.get_mut(&number) else { continue };
            let offered = conversation
                .view
                .borrow()
                .messaging
                .as_ref()
                .is_some_and(|messaging| messaging.add_messaging.is_some());
            conversation.asking_for_messaging = true;
            if offered && conversation.asked_for_messaging == 0 && !conversation.had_messaging {
                self.add_messaging(number, ctx);
            } else {
                // Messaging that is rebuilt when a talk of two grows is gone for a moment only.
                ctx.run_later(MESSAGING_GRACE, move |account, ctx| account.add_messaging(number, ctx));
            }
        }
    }

    /// Asks for the messaging of a conference, unless it has come by itself.
    fn add_messaging(&mut self, number: u64, ctx: &mut Context<Self>) {
        let (Some(live), Some(conversation)) = (&self.live, self.conversations.get_mut(&number)) else {
            return;
        };
        conversation.asking_for_messaging = false;
        let view = conversation.view.borrow().clone();
        if !view.lacks_messaging() {
            return;
        }
        conversation.asked_for_messaging += 1;
        let Some(link) = view.messaging.as_ref().and_then(|messaging| messaging.add_messaging.clone()) else {
            // No event told of its link.
            if let (Some(href), Some(messaging)) = (view.href, view.messaging_href) {
                self.read_messaging(href, &messaging, ctx);
            }
            return;
        };
        conversation.asking_for_messaging = true;
        conversation.view.send_modify(|view| view.invitation = InvitationProgress::Ringing);
        let operation_id = OperationId(uuid::Uuid::new_v4().to_string());
        self.operations.insert(operation_id.clone(), number);
        let client = live.client.clone();
        let adding = async move {
            let url = client.resolve(&link)?;
            client.add_messaging(&url, &operation_id, None).await
        };
        ctx.spawn(tracing::Instrument::instrument(adding, self.span.clone()).into_actor(self).map(
            move |answer: Result<_, UcwaError>, account, ctx| {
                let Some(conversation) = account.conversations.get_mut(&number) else { return };
                conversation.asking_for_messaging = false;
                let Err(error) = answer else { return };
                tracing::warn!(error = %crate::error_chain(&error), "the messaging of a conference could not be added");
                conversation.view.send_modify(|view| {
                    if view.invitation == InvitationProgress::Ringing {
                        view.invitation = InvitationProgress::None;
                    }
                });
                account.hear_conferences(ctx);
            },
        ));
    }

    fn policy(&self) -> InvitationPolicy {
        self.account.invitations.unwrap_or(self.environment.settings.invitations)
    }

    /// Accepts, declines or ignores, once; from the event itself, since the server waits about 30 seconds.
    fn answer_invitation(
        &mut self,
        kind: InvitationKind,
        href: &str,
        resource: &Resource,
        ctx: &mut Context<Self>,
    ) {
        let Some(live) = &self.live else { return };
        let (rel, action) = match self.policy() {
            InvitationPolicy::Accept => ("accept", InvitationAction::Accepted),
            InvitationPolicy::Decline => ("decline", InvitationAction::Declined),
            InvitationPolicy::Ignore => ("accept", InvitationAction::Ignored),
        };
        // `answer` is what UCWA 1.0 calls it. Without the link it is not ours to answer.
        let link =
            resource.link(rel).or_else(|| (rel == "accept").then(|| resource.link("answer")).flatten());
        let link = link.map(|link| link.href.clone());
        // A later event of a call may have lost its links; the resource itself is asked for them once.
        let first_look = self.looked_for_link.insert(href.to_owned());
        if (link.is_none() && !first_look) || self.answered.contains(href) {
            return;
        }
        if link.is_some() {
            self.answered.insert(href.to_owned());
        }
        let (client, context, href) = (live.client.clone(), Arc::clone(&live.context), href.to_owned());
        let answer = async move {
            let Some(link) = (match link {
                Some(link) => Some(link),
                None => read_answer_link(&client, &href, rel).await,
            }) else {
                return;
            };
            if action != InvitationAction::Ignored
                && let Err(error) = follow_answer(&client, &link, action).await
            {
                // Missed, answered elsewhere or gone: the invitation's completion will tell.
                tracing::warn!(?kind, error = %crate::error_chain(&error), "an invitation could not be answered");
                return;
            }
            commit_facts(&context, vec![Fact::InvitationAnswered(InvitationAnswered { href, action })]).await;
        };
        self.spawn(answer, ctx);
    }

    // ------------------------------------------------------------------------------------------ conversations

    fn known_conversation(&self, href: &str) -> Option<&Conversation> {
        self.conversations.get(self.by_href.get(href)?)
    }

    fn start_conversation(
        &mut self,
        href: Option<String>,
        destination: Vec<SipUri>,
        ctx: &mut Context<Self>,
    ) -> Option<u64> {
        let live = self.live.as_ref()?;
        self.next_conversation += 1;
        let number = self.next_conversation;
        let view = shared_view(ConversationView { href: href.clone(), ..ConversationView::default() });
        let address = ConversationActor::new(
            number,
            destination,
            Arc::clone(&view),
            Arc::clone(&live.context),
            ctx.address().recipient(),
            ctx.address().recipient(),
        )
        .start();
        if let Some(href) = &href {
            self.by_href.insert(href.clone(), number);
        }
        self.conversations.insert(
            number,
            Conversation {
                address,
                view,
                href,
                destination: None,
                had_messaging: false,
                asked_for_messaging: 0,
                asking_for_messaging: false,
            },
        );
        Some(number)
    }

    /// The conversation at this address; a new actor if events tell of it for the first time.
    /// None if it is over.
    fn conversation_by_href(&mut self, href: &str, ctx: &mut Context<Self>) -> Option<u64> {
        if let Some(number) = self.by_href.get(href) {
            return Some(*number);
        }
        if self.ended.contains(href) {
            return None;
        }
        self.start_conversation(Some(href.to_owned()), Vec::new(), ctx)
    }

    /// This conversation is with these people: from now on rows for them go into it, unless another serves them already.
    fn serve_destination(&mut self, number: u64, destination: &str) {
        let taken = self
            .by_destination
            .get(destination)
            .and_then(|other| self.conversations.get(other))
            .is_some_and(|other| !other.view.borrow().ended);
        if let Some(conversation) = self.conversations.get_mut(&number) {
            conversation.destination = Some(destination.to_owned());
            if !taken {
                self.by_destination.insert(destination.to_owned(), number);
            }
        }
    }

    /// The server told which conversation an invitation of ours opened.
    fn bind(&mut self, number: u64, href: &str) {
        let known = self.by_href.get(href).copied();
        if known == Some(number) || !self.conversations.contains_key(&number) {
            return;
        }
        // Events spoke of it before the invitation's own event: the queue's actor goes on with what they told.
        if let Some(told) = known.and_then(|known| self.conversations.remove(&known).zip(Some(known))) {
            self.go_on_for(told, number);
        }
        self.by_href.insert(href.to_owned(), number);
        if let Some(conversation) = self.conversations.get_mut(&number) {
            conversation.href = Some(href.to_owned());
            conversation.view.send_modify(|view| view.href = Some(href.to_owned()));
        }
    }

    /// Conversation `number` takes the place of another one, which events had told of under the same address, with all that
    /// was asked for that.
    fn go_on_for(&mut self, (other, replaced): (Conversation, u64), number: u64) {
        let told = other.view.borrow().clone();
        if let Some(conversation) = self.conversations.get_mut(&number) {
            conversation.had_messaging |= other.had_messaging;
            conversation.asked_for_messaging += other.asked_for_messaging;
            conversation.view.send_modify(|view| {
                view.thread_id = told.thread_id.or(view.thread_id.take());
                view.messaging_href = told.messaging_href.or(view.messaging_href.take());
                view.messaging = told.messaging.or(view.messaging.take());
                view.add_participant = told.add_participant.or(view.add_participant.take());
                view.multiparty |= told.multiparty;
                view.state = told.state.or(view.state.take());
                view.told.extend(told.told);
                view.ended = told.ended;
            });
        }
        for known in self.operations.values_mut().chain(self.invitations.values_mut()) {
            if *known == replaced {
                *known = number;
            }
        }
        other.address.do_send(StopConversation);
    }

    // ------------------------------------------------------------------------------------------ sending

    fn relay(&mut self, send: ClaimedSend, ctx: &mut Context<Self>) {
        if self.live.is_none() || self.leaving || self.stopping.is_some() {
            self.give_back(send, ctx);
            return;
        }
        if self.learning.is_some() {
            self.held_back.push_back(send);
            return;
        }
        self.relay_now(send, ctx);
    }

    fn relay_now(&mut self, send: ClaimedSend, ctx: &mut Context<Self>) {
        // It may have waited here; the queue says of what is given back that it expired.
        let expired = send.expires_at.is_some_and(|expires_at| expires_at <= Timestamp::now());
        let Some(live) = self.live.as_ref().filter(|_| !expired) else {
            self.give_back(send, ctx);
            return;
        };
        if let Some((id, None)) = send.conversation {
            self.relay_after_the_end(id, Arc::clone(&live.context), send, ctx);
            return;
        }
        if let Some(error) = self.wrong_people(&send) {
            self.refuse(Arc::clone(&live.context), send, for_others(), error, ctx);
            return;
        }
        let Some(number) = self.choose_conversation(&send, ctx) else {
            self.give_back(send, ctx);
            return;
        };
        self.hand_over(number, send, ctx);
    }

    /// The row names a conversation that is over: goes on with its thread, if it was with one person.
    fn relay_after_the_end(
        &self,
        id: ConversationId,
        context: Arc<DeliveryContext>,
        mut send: ClaimedSend,
        ctx: &mut Context<Self>,
    ) {
        let account = self.account.id;
        let read = async move { (context.store.conversation(account, id).await, context) };
        ctx.spawn(read.into_actor(self).map(move |(read, context), account, ctx| {
            let known = match read {
                Ok(known) => known,
                Err(error) => {
                    tracing::warn!(error = %crate::error_chain(&error), "a conversation can't be read; its row waits");
                    account.give_back(send, ctx);
                    return;
                }
            };
            let known = known.filter(|known| !known.multiparty);
            let remote = known.as_ref().and_then(|known| known.remote_uri.as_ref()?.parse::<SipUri>().ok());
            if send.recipients.is_empty() {
                let Some(remote) = &remote else {
                    let error = format!(
                        "conversation {id} has ended and was not with one person alone; name recipients to start a new one"
                    );
                    account.refuse(context, send, FailureReason::default(), error, ctx);
                    return;
                };
                send.recipients.push(remote.clone());
            }
            if let Some(remote) = remote.as_ref().filter(|remote| send.recipients != [(*remote).clone()]) {
                let error = other_recipients(id, remote.as_str(), &send.recipients);
                account.refuse(context, send, for_others(), error, ctx);
                return;
            }
            if send.destination != destination_key(&send.recipients) {
                // It was open when the row was looked at. The rows for these people have an order of their own.
                account.give_back(send, ctx);
                return;
            }
            if let Some(known) = known.filter(|_| remote.is_some()) {
                send.thread_id = send.thread_id.or(known.thread_id);
                send.subject = send.subject.or(known.subject);
            }
            match account.choose_conversation(&send, ctx) {
                Some(number) => account.hand_over(number, send, ctx),
                None => account.give_back(send, ctx),
            }
        }));
    }

    /// Lets a conversation say a row.
    fn hand_over(&mut self, number: u64, send: ClaimedSend, ctx: &mut Context<Self>) {
        let (tell, settled) = oneshot::channel();
        let continuity = self.live.as_ref().map(|live| live.health.continuity());
        self.handed.insert(
            send.outbox,
            Handed {
                send: send.clone(),
                at: Timestamp::now(),
                continuity,
                conversation: Some(number),
                tell: Some(tell),
            },
        );
        self.operations.insert(send.operation_id.clone(), number);
        // Calls of an earlier conversation of this attempt stay its own.
        let first = self.conversations.get(&number).and_then(|conversation| {
            first_to_call(&send.recipients, &conversation.view.borrow().not_reached)
        });
        for called in [Some(0), first].into_iter().flatten() {
            self.operations.entry(call_operation_id(&send.operation_id, called)).or_insert(number);
        }
        if send.recipients.len() > 1 {
            for operation_id in meeting_operation_ids(&send.operation_id) {
                self.operations.insert(operation_id, number);
            }
        }
        let deliver = Deliver { send, settled };
        let refused = match self.conversations.get(&number) {
            Some(conversation) => conversation.address.try_send(deliver).err().map(SendError::into_inner),
            None => Some(deliver),
        };
        if let Some(Deliver { send, .. }) = refused {
            self.handed.remove(&send.outbox);
            self.give_back(send, ctx);
        }
    }

    /// Fails a row that can't be sent as it is.
    fn refuse(
        &self,
        context: Arc<DeliveryContext>,
        send: ClaimedSend,
        reason: FailureReason,
        error: String,
        ctx: &mut Context<Self>,
    ) {
        let fact = SendFact {
            outbox: send.outbox,
            operation_id: send.operation_id,
            outcome: SendOutcome::Refused { conversation_href: None, reason, http_status: None, error },
        };
        self.spawn(async move { commit_send(&context, fact).await }, ctx);
    }

    /// A row may name a conversation and recipients; where they are known to differ, it must not reach the wrong ones.
    fn wrong_people(&self, send: &ClaimedSend) -> Option<String> {
        let (id, href) = send.conversation.as_ref()?;
        let with = self.known_conversation(href.as_ref()?)?.destination.as_ref()?;
        (!send.recipients.is_empty() && *with != destination_key(&send.recipients))
            .then(|| other_recipients(*id, with, &send.recipients))
    }

    fn is_open(&self, number: u64) -> bool {
        self.conversations.get(&number).is_some_and(|conversation| !conversation.view.borrow().ended)
    }

    /// What is meant for one person is said to that person alone.
    fn fits(&self, number: u64, send: &ClaimedSend) -> bool {
        let for_group = send.recipients.len() > 1;
        self.is_open(number)
            && self
                .conversations
                .get(&number)
                .is_some_and(|conversation| for_group || !conversation.view.borrow().multiparty)
    }

    /// The open conversation of the row's thread with the same people. A thread is not a conversation: several may share
    /// one.
    fn conversation_of_thread(&self, send: &ClaimedSend) -> Option<u64> {
        let thread = send.thread_id.as_ref()?;
        let destination = destination_key(&send.recipients);
        self.conversations.iter().find_map(|(number, conversation)| {
            let same_people = conversation.destination.as_ref() == Some(&destination);
            let same_thread = conversation.view.borrow().thread_id.as_ref() == Some(thread);
            (same_people && same_thread && self.fits(*number, send)).then_some(*number)
        })
    }

    /// An open conversation with the recipients, or a new one.
    fn choose_conversation(&mut self, send: &ClaimedSend, ctx: &mut Context<Self>) -> Option<u64> {
        if let Some((_, Some(href))) = &send.conversation {
            if let Some(number) = self.by_href.get(href).copied().filter(|number| self.is_open(*number)) {
                return Some(number);
            }
            return self.start_conversation(Some(href.clone()), send.recipients.clone(), ctx);
        }
        let destination = destination_key(&send.recipients);
        if let Some(number) = self.conversation_of_thread(send) {
            return Some(number);
        }
        // A row that names another thread is not said in this one.
        let other_thread = |number: &u64| {
            let conversation = self.conversations.get(number);
            let known = conversation.and_then(|conversation| conversation.view.borrow().thread_id.clone());
            send.thread_id.is_some() && known.is_some() && known != send.thread_id
        };
        let open = self.by_destination.get(&destination).copied();
        if let Some(number) = open.filter(|number| self.fits(*number, send) && !other_thread(number)) {
            return Some(number);
        }
        let number = self.start_conversation(None, send.recipients.clone(), ctx)?;
        self.by_destination.remove(&destination);
        self.serve_destination(number, &destination);
        Some(number)
    }

    fn give_back(&self, send: ClaimedSend, ctx: &mut Context<Self>) {
        let store = Arc::clone(&self.environment.store);
        self.spawn(async move { release_claim(&store, &send).await }, ctx);
    }

    /// The conversation of a group came to nothing before anything was said in it: begins another one.
    fn relay_anew(
        &mut self,
        outbox: OutboxId,
        operation_id: &OperationId,
        unreached: Vec<Unreached>,
        ctx: &mut Context<Self>,
    ) {
        let Some(send) = self
            .handed
            .get(&outbox)
            .filter(|handed| handed.send.operation_id == *operation_id)
            .map(|handed| handed.send.clone())
        else {
            return;
        };
        let goes_on = self.stopping.is_none() && !self.leaving;
        let number = goes_on.then(|| self.start_conversation(None, send.recipients.clone(), ctx)).flatten();
        let Some(number) = number else {
            self.give_back(send, ctx);
            self.delivery_finished(outbox, operation_id, ctx);
            return;
        };
        if let Some(conversation) = self.conversations.get(&number) {
            conversation.view.send_modify(|view| view.not_reached = unreached);
        }
        let destination = destination_key(&send.recipients);
        self.by_destination.remove(&destination);
        self.serve_destination(number, &destination);
        self.hand_over(number, send, ctx);
    }

    fn delivery_finished(&mut self, outbox: OutboxId, operation_id: &OperationId, ctx: &mut Context<Self>) {
        let recipients = self.handed.get(&outbox).map_or(1, |handed| handed.send.recipients.len());
        if self.handed.get(&outbox).is_some_and(|handed| handed.send.operation_id == *operation_id) {
            self.handed.remove(&outbox);
        }
        // Events of a call that is still ringing have to find their conversation; nothing else needs the ids.
        let ringing =
            self.operations.get(operation_id).and_then(|number| self.conversations.get(number)).is_some_and(
                |conversation| conversation.view.borrow().invitation == InvitationProgress::Ringing,
            );
        if !ringing {
            self.operations.remove(operation_id);
            for called in 0..recipients.max(1) {
                self.operations.remove(&call_operation_id(operation_id, called));
            }
            for meeting in meeting_operation_ids(operation_id) {
                self.operations.remove(&meeting);
            }
        }
        if self.handed.is_empty() {
            if self.stopping.is_some() {
                self.finish_stopping(ctx);
            } else if self.leaving {
                ctx.stop();
            }
        }
    }

    fn tell_settled(&mut self, settled: Vec<SettledSend>) {
        for send in settled {
            let tell = self
                .handed
                .get_mut(&send.outbox)
                .filter(|handed| handed.send.operation_id == send.operation_id)
                .and_then(|handed| handed.tell.take());
            if let Some(tell) = tell {
                // A delivery that already knows has dropped its end.
                let _ = tell.send(send);
            }
        }
    }

    // ------------------------------------------------------------------------------------------ fetching

    /// Reads what was only linked; `reading` says that it is not known yet.
    fn fetch(&mut self, fetches: Vec<Fetch>, reading: Option<Arc<Reading>>, ctx: &mut Context<Self>) {
        let Some(live) = &self.live else { return };
        if fetches.is_empty() {
            return;
        }
        let reading = reading.unwrap_or_else(|| live.health.begin_reading());
        let (context, account) = (Arc::clone(&live.context), ctx.address());
        let fetching = async move {
            futures_util::stream::iter(fetches)
                .for_each_concurrent(FETCHES_AT_ONCE, |fetch| {
                    let (context, account, reading) =
                        (Arc::clone(&context), account.clone(), Arc::clone(&reading));
                    async move {
                        if let Some(fetched) = fetch_one(&context, fetch, reading).await {
                            // The account may be ending; what was fetched is committed already.
                            let _ = account.send(fetched).await;
                        }
                    }
                })
                .await;
        };
        self.spawn(fetching, ctx);
    }

    // ------------------------------------------------------------------------------------------ staying signed in

    fn report_activity_later(ctx: &mut Context<Self>) {
        let jittered = REPORT_EVERY.mul_f64(1.0 - 0.1 * rand::random::<f64>());
        ctx.run_later(jittered, |account, ctx| {
            account.report_activity(ctx);
            Self::report_activity_later(ctx);
        });
    }

    fn report_activity(&mut self, ctx: &mut Context<Self>) {
        let Some(live) = &self.live else { return };
        // While the server is in trouble a report is skipped, not queued.
        if live.health.is_failing() {
            return;
        }
        let (client, application, link) =
            (live.client.clone(), live.application.clone(), live.report_my_activity.clone());
        let presence = self.environment.settings.presence.clone();
        let report = async move { report_activity(&client, &application, link, &presence).await };
        ctx.spawn(report.into_actor(self).map(|link, account, _| {
            if let (Some(live), Some(link)) = (account.live.as_mut(), link) {
                live.report_my_activity = Some(link);
            }
        }));
    }

    fn finish_stopping(&mut self, ctx: &mut Context<Self>) {
        if self.finishing {
            return;
        }
        self.finishing = true;
        self.exit = ExitReason::Requested;
        let sign_out = self.stopping.as_ref().and_then(|stop| stop.sign_out.clone());
        let target = self.live.as_ref().map(|live| {
            live.channel.do_send(StopChannel);
            (live.client.clone(), live.application.clone(), live.session)
        });
        let waiting = self.unbegun();
        let (store, account) = (Arc::clone(&self.environment.store), self.account.id);
        let signing_out = async move {
            for send in waiting {
                release_claim(&store, &send).await;
            }
            let Some((reason, (client, application, session))) = sign_out.zip(target) else { return };
            if let Err(error) = client.delete_application(&application).await {
                // The server expires it by itself.
                tracing::debug!(error = %crate::error_chain(&error), "the application could not be deleted");
            }
            if let Err(error) = store.end_session(account, session, &reason).await {
                tracing::warn!(error = %crate::error_chain(&error), "the session's end could not be stored");
            }
        };
        ctx.spawn(
            tracing::Instrument::instrument(signing_out, self.span.clone())
                .into_actor(self)
                .map(|(), _, ctx| ctx.stop()),
        );
    }
}

/// Ends the session of an account that is signed out for good.
pub(super) async fn end_open_session(
    store: &crate::store::SharedStore,
    account: crate::identifiers::AccountId,
    reason: &str,
) {
    let ended = async {
        match store.open_session(account).await? {
            Some(session) => store.end_session(account, session.id, reason).await,
            None => Ok(()),
        }
    };
    if let Err(error) = ended.await {
        tracing::warn!(account.id = account.0, error = %crate::error_chain(&error), "the session's end could not be stored");
    }
}

/// How far an invitation is, from its event and its resource; the event knows best.
fn invitation_progress(event: Option<&Event>, resource: &Resource) -> InvitationProgress {
    let status = event.and_then(|event| event.status.as_deref()).unwrap_or_default();
    let state = resource.property("state").unwrap_or_default();
    let is = |word: &str, words: &[&str]| words.iter().any(|known| word.eq_ignore_ascii_case(known));
    let completed = event.is_some_and(|event| event.kind == EventKind::Completed);
    if is(status, &["Failure", "Failed"])
        || (status.is_empty() && is(state, &["Failed", "Cancelled", "Canceled", "Declined", "Disconnected"]))
    {
        return InvitationProgress::Failed(event.and_then(|event| event.reason.as_ref()).map_or_else(
            FailureReason::default,
            |reason| FailureReason {
                code: reason.code.clone(),
                subcode: reason.subcode.clone(),
                message: reason.message.clone(),
            },
        ));
    }
    if completed || is(state, &["Connected", "Completed"]) {
        return InvitationProgress::Accepted;
    }
    InvitationProgress::Ringing
}

/// Why a row fails that names a conversation, and people with whom it is not.
fn for_others() -> FailureReason {
    FailureReason { code: Some(OTHER_RECIPIENTS.to_owned()), ..FailureReason::default() }
}

fn is_incoming(resource: &Resource) -> bool {
    resource.property("direction").is_some_and(|direction| direction.eq_ignore_ascii_case("Incoming"))
}

/// The link by which an invitation is answered; none if it is not ours to answer any more.
async fn read_answer_link(client: &UcwaClient, href: &str, rel: &str) -> Option<String> {
    let read = async { client.get(&client.resolve(href)?).await };
    match read.await {
        Ok(resource) => resource
            .link(rel)
            .or_else(|| (rel == "accept").then(|| resource.link("answer")).flatten())
            .map(|link| link.href.clone()),
        Err(error) => {
            tracing::debug!(error = %crate::error_chain(&error), "an invitation could not be read");
            None
        }
    }
}

async fn follow_answer(client: &UcwaClient, link: &str, action: InvitationAction) -> Result<(), UcwaError> {
    let url = client.resolve(link)?;
    let began = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(5));
    loop {
        let answer = match action {
            InvitationAction::Declined => client.decline(&url).await,
            _ => client.post_empty(&url).await,
        };
        let Err(error) = answer else { return Ok(()) };
        // Repeating is harmless: the second is refused if the first arrived.
        let passes = error.status().is_none_or(|status| status >= 500 || status == 429);
        let ours = backoff.next_delay();
        let delay = match &error {
            UcwaError::Status { retry_after: Some(asked), .. } => ours.max(*asked),
            _ => ours,
        };
        if !passes || began.elapsed() + delay >= ANSWER_WITHIN {
            return Err(error);
        }
        tracing::debug!(error = %crate::error_chain(&error), "an invitation's answer is repeated");
        tokio::time::sleep(delay).await;
    }
}

/// Reports activity; makes the account available again if the server says it is not. Returns the link to use from
/// now on.
async fn report_activity(
    client: &UcwaClient,
    application: &Url,
    link: Option<Url>,
    presence: &str,
) -> Option<Url> {
    let unavailable = match &link {
        Some(link) => match client.report_my_activity(link).await {
            Ok(()) => false,
            Err(error) if error.subcode() == Some("MakeMeAvailableRequired") => true,
            Err(error) => {
                tracing::warn!(error = %crate::error_chain(&error), "activity could not be reported");
                false
            }
        },
        None => true,
    };
    if !unavailable {
        return link;
    }
    let made_available = async {
        let read = client.application(application).await?;
        let Some(make_me_available) = read.make_me_available() else { return Ok(read.report_my_activity()) };
        client.make_me_available(&make_me_available, presence).await?;
        Ok::<_, UcwaError>(client.application(application).await?.report_my_activity())
    };
    match made_available.await {
        Ok(link) => link,
        Err(error) => {
            tracing::warn!(error = %crate::error_chain(&error), "the account could not be made available again");
            link
        }
    }
}

/// Commits facts that did not come from the event channel, however long the database takes.
pub(super) async fn commit_facts(context: &DeliveryContext, facts: Vec<Fact>) -> CommitOutcome {
    let commit = ArchiveCommit {
        account: context.account,
        session: context.session,
        epoch: context.epoch,
        cursor: None,
        received_at: Timestamp::now(),
        facts,
    };
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        match context.store.commit(commit.clone()).await {
            Ok(outcome) => return outcome,
            Err(error @ StoreError::Refused { .. }) => {
                tracing::error!(error = %crate::error_chain(&error), "facts are refused; they go to event_quarantine");
                let reason = format!("the database refused what was learnt: {}", crate::error_chain(&error));
                let payload = format!("{:?}", commit.facts);
                let quarantined =
                    context.store.quarantine(context.account, Some(context.session), &reason, &payload).await;
                if let Err(error) = quarantined {
                    tracing::error!(error = %crate::error_chain(&error), "event_quarantine could not be written");
                }
                return CommitOutcome::default();
            }
            Err(error @ (StoreError::Fenced(_) | StoreError::Closing)) => {
                tracing::error!(error = %crate::error_chain(&error), "facts could not be stored");
                return CommitOutcome::default();
            }
            Err(error) if error.is_told_by_store() => {
                tracing::debug!(error = %crate::error_chain(&error), "facts can't be stored now; trying again");
                tokio::time::sleep(backoff.next_delay()).await;
            }
            Err(error) => {
                tracing::warn!(error = %crate::error_chain(&error), "facts can't be stored now; trying again");
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}

/// Fetches one linked resource and commits what it says. `None`: left for the next life of the account.
async fn fetch_one(context: &DeliveryContext, fetch: Fetch, reading: Arc<Reading>) -> Option<Fetched> {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(15));
    loop {
        let answer = match context.client.resolve(&fetch.href) {
            Ok(url) => context.client.get(&url).await,
            Err(error) => Err(error),
        };
        let why = match answer {
            Ok(resource) => {
                let outcome = commit_facts(context, interpret_fetched(&fetch, &resource)).await;
                return Some(Fetched { fetch, resource: Some(resource), outcome, reading });
            }
            // The event channel finds the same and ends this life; the next one asks again or knows better.
            Err(error) if error.subcode() == Some("ApplicationNotFound") => return None,
            Err(error) => {
                // Without UCWA's own words it may be an application pool that is just restarting.
                let hopeless = error.reason().is_some()
                    && matches!(error.status(), Some(400..=499))
                    && !matches!(error.status(), Some(401 | 408 | 409 | 429));
                if !hopeless
                    && !matches!(error, UcwaError::Untrusted { .. })
                    && backoff.failures() + 1 < FETCH_ATTEMPTS
                {
                    let asked = error.retry_after();
                    tokio::time::sleep(asked.unwrap_or_else(|| backoff.next_delay())).await;
                    continue;
                }
                crate::error_chain(&error)
            }
        };
        tracing::warn!(href = %fetch.href, why, "a resource that an event only linked could not be fetched");
        if matches!(fetch.resource, FetchedResource::Message | FetchedResource::Invitation(_)) {
            context.channel.lose_continuity();
        }
        let fact = Fact::Unfetchable(Unfetchable { fetch: fetch.clone(), why });
        let outcome = commit_facts(context, vec![fact]).await;
        return Some(Fetched { fetch, resource: None, outcome, reading });
    }
}

impl Actor for AccountActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(256);
        self.publish(AccountState::Starting, None);
        let (environment, account, address) = (self.environment.clone(), self.account.clone(), ctx.address());
        let progress = Arc::new(move |step| address.do_send(SignInProgressed(step)));
        let epoch = self.epoch;
        let signing_in = async move {
            let trace = traces::sign_in(account.id);
            let result = sign_in(&environment, &account, epoch, progress).instrument(trace.clone()).await;
            if result.is_err() {
                traces::failed(&trace);
            }
            result
        };
        ctx.spawn(
            tracing::Instrument::instrument(signing_in, self.span.clone())
                .into_actor(self)
                .map(|result, account, ctx| account.signed_in(result, ctx)),
        );
    }

    /// Runs while unwinding too, so it must not panic.
    fn stopped(&mut self, _: &mut Self::Context) {
        self.environment.directory.leave(self.account.id);
        if let Some(live) = &self.live {
            live.channel.do_send(StopChannel);
        }
        for conversation in self.conversations.values() {
            conversation.address.do_send(StopConversation);
        }
        let unbegun = self.unbegun();
        if !unbegun.is_empty() && !std::thread::panicking() {
            // Beyond this life: the next one finds them in the queue, or settles what was not given back in time.
            let store = Arc::clone(&self.environment.store);
            actix_rt::spawn(async move {
                for send in unbegun {
                    release_claim(&store, &send).await;
                }
            });
        }
        let reason = if std::thread::panicking() { ExitReason::Panicked } else { self.exit.clone() };
        let online_for = self.online_since.map_or(Duration::ZERO, |since| since.elapsed());
        self.supervisor.do_send(AccountExited {
            account: self.account.id,
            life: self.life,
            reason,
            online_for,
        });
    }
}

impl Handler<SignInProgressed> for AccountActor {
    type Result = ();

    fn handle(&mut self, SignInProgressed(step): SignInProgressed, _: &mut Self::Context) {
        if self.live.is_none() {
            let state = match step {
                SignInStep::Discovery => AccountState::Discovering,
                _ => AccountState::SigningIn,
            };
            self.publish(state, None);
        }
    }
}

impl Handler<EventsCommitted> for AccountActor {
    type Result = ();

    fn handle(&mut self, committed: EventsCommitted, ctx: &mut Self::Context) {
        if committed.continuity == Continuity::Resumed {
            self.forget_conversations(ctx);
        }
        self.tell_settled(committed.outcome.settled);
        for sender in &committed.batch.senders {
            for event in &sender.events {
                self.observe(sender, event, ctx);
                if let Some(live) = self.live.as_ref().filter(|_| backfill::is_hint(event)) {
                    live.backfill.hint(Timestamp::now());
                }
            }
        }
        self.hear_conferences(ctx);
        self.fetch(committed.outcome.fetches, committed.reading, ctx);
        if committed.continuity != Continuity::Unbroken {
            self.learn_what_is_open(ctx);
        }
    }
}

impl Handler<Fetched> for AccountActor {
    type Result = ();

    fn handle(&mut self, fetched: Fetched, ctx: &mut Self::Context) {
        self.tell_settled(fetched.outcome.settled);
        let has_text =
            matches!(fetched.fetch.resource, FetchedResource::Message | FetchedResource::Invitation(_));
        if fetched.resource.is_none()
            && has_text
            && let Some(live) = &self.live
        {
            // The server's log may still have what it did not tell us.
            live.backfill.hint(Timestamp::now());
        }
        // Also of one that can't be read: nothing more will be known of it.
        let ended = self.unread_ends.remove(&fetched.fetch.href);
        if let Some(resource) = &fetched.resource {
            let progress = ended.unwrap_or_else(|| invitation_progress(None, resource));
            match fetched.fetch.resource {
                FetchedResource::Invitation(InvitationKind::Participant) if !is_incoming(resource) => {
                    self.see_participant_invitation(progress, resource);
                }
                FetchedResource::Invitation(kind) => {
                    self.see_invitation(kind, &fetched.fetch.href, progress, resource, ctx);
                }
                FetchedResource::Conversation => {
                    self.see_conversation(&fetched.fetch.href, resource, ctx);
                }
                FetchedResource::Participant | FetchedResource::Message => {}
            }
            self.hear_conferences(ctx);
        }
        self.fetch(fetched.outcome.fetches, Some(fetched.reading), ctx);
    }
}

impl Handler<ChannelExited> for AccountActor {
    type Result = ();

    fn handle(&mut self, ChannelExited(end): ChannelExited, ctx: &mut Self::Context) {
        if self.stopping.is_some() || matches!(end, ChannelEnd::Requested) {
            return;
        }
        match &end {
            ChannelEnd::Panicked => metrics::count_restart(Restarted::EventChannel),
            ChannelEnd::ApplicationLost(_) => metrics::count_reconnect(Reconnect::ApplicationLost),
            _ => {}
        }
        let sentence = describe_end(&end);
        let reason = match end {
            ChannelEnd::Panicked => ExitReason::Panicked,
            ChannelEnd::Fenced => ExitReason::Fenced,
            ChannelEnd::Attention(why, _, after) => ExitReason::NeedsAttention(why, sentence, after),
            ChannelEnd::Rediscover(_) => ExitReason::Temporary(sentence, None),
            ChannelEnd::ApplicationLost(_) | ChannelEnd::Requested if !self.handed.is_empty() => {
                self.environment.directory.leave(self.account.id);
                self.leaving = true;
                self.exit = ExitReason::SessionLost(sentence);
                ctx.run_later(HEAR_ANSWERS_WITHIN, |_, ctx| ctx.stop());
                return;
            }
            ChannelEnd::ApplicationLost(_) | ChannelEnd::Requested => ExitReason::SessionLost(sentence),
        };
        self.end(reason, ctx);
    }
}

impl Handler<Relay> for AccountActor {
    type Result = ();

    fn handle(&mut self, Relay(send): Relay, ctx: &mut Self::Context) {
        self.relay(send, ctx);
    }
}

impl Handler<DeliveryFinished> for AccountActor {
    type Result = ();

    fn handle(&mut self, finished: DeliveryFinished, ctx: &mut Self::Context) {
        let DeliveryFinished { outbox, operation_id, end } = finished;
        match end {
            DeliveryEnd::BeginAnew(unreached) => {
                self.relay_anew(outbox, &operation_id, unreached, ctx);
            }
            DeliveryEnd::ThreadTaken => match self.handed.get_mut(&outbox) {
                Some(handed) if handed.send.operation_id == operation_id => {
                    handed.conversation = None;
                    self.looked_for.insert(outbox);
                    if self.learning.is_none() {
                        self.learn_what_is_open(ctx);
                    }
                }
                _ => self.delivery_finished(outbox, &operation_id, ctx),
            },
            DeliveryEnd::NoRoom => {
                self.delivery_finished(outbox, &operation_id, ctx);
                self.make_room(ctx);
            }
            DeliveryEnd::Done => self.delivery_finished(outbox, &operation_id, ctx),
        }
    }
}

impl Handler<ConversationExited> for AccountActor {
    type Result = ();

    fn handle(&mut self, exited: ConversationExited, ctx: &mut Self::Context) {
        if let Some(conversation) = self.conversations.remove(&exited.number) {
            if let Some(href) = conversation.href {
                self.by_href.retain(|known, number| *known != href || *number != exited.number);
            }
            if let Some(destination) = conversation.destination
                && self.by_destination.get(&destination) == Some(&exited.number)
            {
                self.by_destination.remove(&destination);
            }
        }
        self.operations.retain(|_, number| *number != exited.number);
        self.invitations.retain(|_, number| *number != exited.number);
        let had: Vec<OutboxId> = self
            .handed
            .iter()
            .filter(|(_, handed)| handed.conversation == Some(exited.number))
            .map(|(outbox, _)| *outbox)
            .collect();
        for outbox in had {
            let Some(handed) = self.handed.remove(&outbox) else { continue };
            if exited.in_flight == Some(outbox) && !exited.panicked {
                self.settle_left_over(handed.send, handed.at, handed.continuity, ctx);
            } else if exited.in_flight != Some(outbox) {
                self.give_back(handed.send, ctx);
            }
        }
        if exited.panicked {
            metrics::count_restart(Restarted::Conversation);
            // A send may have been under way; a fresh life settles it.
            self.end(ExitReason::Panicked, ctx);
        }
    }
}

impl Handler<StopAccount> for AccountActor {
    type Result = ();

    fn handle(&mut self, stop: StopAccount, ctx: &mut Self::Context) {
        self.environment.directory.leave(self.account.id);
        self.stopping = Some(stop);
        if self.live.is_none() {
            // Signing in: nothing is out yet. To sign out, the sign-in is awaited, since only it leads to the
            // application that an earlier life left.
            if self.stopping.as_ref().is_some_and(|stop| stop.sign_out.is_none()) {
                ctx.stop();
            }
            return;
        }
        if self.handed.is_empty() {
            self.finish_stopping(ctx);
        } else {
            ctx.run_later(FINISH_SENDS_WITHIN, Self::finish_stopping);
        }
    }
}

impl Handler<AbandonAccount> for AccountActor {
    type Result = ();

    fn handle(&mut self, AbandonAccount: AbandonAccount, ctx: &mut Self::Context) {
        self.end(ExitReason::Fenced, ctx);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::ucwa::Link;

    /// Makes the account panic in a handler.
    #[derive(Message)]
    #[rtype(result = "()")]
    pub(in crate::account) struct Explode;

    /// Lets the account begin a meeting and hear of it as from events that only link: of the conversation first, for which
    /// it asks the messaging, then of both invitations at once. Says whether the conversation is still the meeting's.
    #[derive(Message)]
    #[rtype(result = "bool")]
    pub(in crate::account) struct HearOfMeetingLate;

    impl Handler<HearOfMeetingLate> for AccountActor {
        type Result = bool;

        fn handle(&mut self, _: HearOfMeetingLate, ctx: &mut Self::Context) -> bool {
            let href = "/conversations/late";
            let meeting = self.start_conversation(None, Vec::new(), ctx).expect("it is signed in");
            let heard_of = self.conversation_by_href(href, ctx).expect("it is not over");
            for (operation, number, kind) in [
                ("meeting", meeting, InvitationKind::OnlineMeeting),
                ("messaging", heard_of, InvitationKind::Messaging),
            ] {
                self.operations.insert(OperationId(operation.to_owned()), number);
                let resource = Resource {
                    properties: vec![("operationId".to_owned(), operation.to_owned())],
                    links: vec![Link {
                        rel: "conversation".to_owned(),
                        href: href.to_owned(),
                        ..Link::default()
                    }],
                    ..Resource::default()
                };
                let invitation = format!("/invitations/{operation}");
                self.see_invitation(kind, &invitation, InvitationProgress::Accepted, &resource, ctx);
            }
            self.by_href.get(href) == Some(&meeting) && self.conversations.contains_key(&meeting)
        }
    }

    impl Handler<Explode> for AccountActor {
        type Result = ();

        fn handle(&mut self, _: Explode, _: &mut Self::Context) {
            panic!("this account was told to explode");
        }
    }
}
