//! One conversation as this account sees it: what can be said in it now, and the actor that says it.
//!
//! The account reads the event channel and keeps each [`ConversationView`] up to date; the [`ConversationActor`] sends
//! what the outbox hands it, one message at a time, so that order holds and an unknown outcome has only one candidate
//! (guarantees G5, G6). It ends an idle conversation, and stops when the server says that the conversation is gone;
//! what it has not begun to send goes back to the account.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use actix::prelude::*;
use jiff::Timestamp;
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};

use crate::{
    account::delivery::{Delivery, DeliveryContext},
    archive::{fact::FailureReason, retry::Healing},
    identifiers::{OperationId, OutboxId, SipUri},
    store::{ClaimedSend, SettledSend},
    ucwa::Resource,
};

/// How far an invitation to this conversation has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum InvitationProgress {
    /// There is none, or it is long past.
    #[default]
    None,
    /// Out, and not answered.
    Ringing,
    /// Answered with success.
    Accepted,
    /// Answered otherwise.
    Failed(FailureReason),
}

/// Resource `messaging`: what can be said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MessagingView {
    /// Its address.
    pub href: String,
    /// `Connected` in any case.
    pub connected: bool,
    /// `Disconnected` in any case.
    pub disconnected: bool,
    /// Link `sendMessage`; there only while it may be used.
    pub send_message: Option<String>,
    /// Link `stopMessaging`.
    pub stop_messaging: Option<String>,
    /// Link `addMessaging`.
    pub add_messaging: Option<String>,
    /// `negotiatedMessageFormats` has `Html`.
    pub html: bool,
}

impl MessagingView {
    /// Reads the resource; links that are absent are not allowed now.
    pub fn read(href: &str, resource: &Resource) -> Self {
        let state = resource.property("state").unwrap_or_default();
        let link = |rel: &str| resource.link(rel).map(|link| link.href.clone());
        Self {
            href: href.to_owned(),
            connected: state.eq_ignore_ascii_case("Connected"),
            disconnected: state.eq_ignore_ascii_case("Disconnected"),
            send_message: link("sendMessage"),
            stop_messaging: link("stopMessaging"),
            add_messaging: link("addMessaging"),
            html: resource
                .property_list("negotiatedMessageFormats")
                .is_some_and(|formats| formats.iter().any(|format| format.eq_ignore_ascii_case("Html"))),
        }
    }
}

/// How far the recipients of a group row are together in a conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gathering {
    /// They were not invited, but for the one with whom the conversation began.
    #[default]
    NotBegun,
    /// It is a meeting that this account started for them, and they were not invited: nobody else is in it.
    Meeting,
    /// They were invited; later rows find them there.
    Assembled,
}

/// A recipient of a group who could not be brought into its conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreached {
    /// Who.
    pub uri: SipUri,
    /// A sentence.
    pub why: String,
    /// Whether they may be there later.
    pub healing: Healing,
    /// How often they were invited in vain, one time after the other.
    pub tries: i64,
    /// When a later row may invite them again.
    pub again_at: Timestamp,
}

/// What the event channel told about a conversation, as far as sending depends on it.
#[derive(Debug, Clone)]
pub struct ConversationView {
    /// Address; `None` until the server has made it.
    pub href: Option<String>,
    /// Thread.
    pub thread_id: Option<String>,
    /// Link `messaging` of the conversation, for asking when no event tells.
    pub messaging_href: Option<String>,
    /// The IM leg.
    pub messaging: Option<MessagingView>,
    /// Link `addParticipant`.
    pub add_participant: Option<String>,
    /// The invitation that opens it.
    pub invitation: InvitationProgress,
    /// More than two people, or a conference: not the place for what is meant for one.
    pub multiparty: bool,
    /// Its `state`, verbatim.
    pub state: Option<String>,
    /// How far it is the conversation of a group row.
    pub gathering: Gathering,
    /// Who of them could not be brought in, and why.
    pub not_reached: Vec<Unreached>,
    /// How far invitations of ours to it have come, of this account or of others, as far as events told of them.
    pub told: HashMap<OperationId, InvitationProgress>,
    /// It is over.
    pub ended: bool,
    /// When something was last said in it.
    pub last_activity: Instant,
}

impl Default for ConversationView {
    fn default() -> Self {
        Self {
            href: None,
            thread_id: None,
            messaging_href: None,
            messaging: None,
            add_participant: None,
            invitation: InvitationProgress::None,
            multiparty: false,
            state: None,
            gathering: Gathering::default(),
            not_reached: Vec::new(),
            told: HashMap::new(),
            ended: false,
            last_activity: Instant::now(),
        }
    }
}

impl ConversationView {
    /// Takes over how far its invitation is.
    pub fn see_invitation(&mut self, progress: InvitationProgress) {
        // A call that failed leaves no conversation, whether or not the server says so in an event of its own; a
        // conference goes on without the messaging that was asked for.
        if matches!(progress, InvitationProgress::Failed(_))
            && !self.is_conference()
            && !self.messaging.as_ref().is_some_and(|messaging| messaging.connected)
        {
            self.ended = true;
        }
        // Events of one invitation may be merged and fetched late; what is answered does not ring again.
        if progress != InvitationProgress::Ringing || self.invitation == InvitationProgress::None {
            self.invitation = progress;
        }
    }

    /// Takes over what an event told of an invitation of ours.
    pub fn hear_of(&mut self, operation_id: OperationId, progress: InvitationProgress) {
        let known = self.told.entry(operation_id).or_default();
        if progress != InvitationProgress::Ringing || *known == InvitationProgress::None {
            *known = progress;
        }
    }

    /// An event told of this invitation, and of what came of it.
    pub fn has_come_to_an_end(&self, operation_id: &OperationId) -> bool {
        self.told.get(operation_id).is_some_and(|progress| *progress != InvitationProgress::Ringing)
    }

    /// Takes over what a `conversation` resource says.
    pub fn read_conversation(&mut self, href: &str, resource: &Resource) {
        self.href = Some(href.to_owned());
        if let Some(thread) = resource.property("threadId").filter(|thread| !thread.is_empty()) {
            self.thread_id = Some(thread.to_owned());
        }
        if let Some(messaging) = resource.embedded("messaging") {
            self.messaging_href = Some(messaging.href.clone());
            self.messaging = Some(MessagingView::read(&messaging.href, messaging));
        } else if let Some(link) = resource.link("messaging") {
            self.messaging_href = Some(link.href.clone());
        }
        self.add_participant = resource.link("addParticipant").map(|link| link.href.clone());
        let state = resource.property("state").unwrap_or_default();
        let conference =
            ["Conferencing", "Conferenced", "InLobby"].iter().any(|word| state.eq_ignore_ascii_case(word));
        let crowd = resource
            .property("participantCount")
            .and_then(|count| count.trim().parse::<u32>().ok())
            .is_some_and(|count| count > 2);
        self.multiparty |= conference || crowd;
        if !state.is_empty() {
            self.state = Some(state.to_owned());
        }
    }

    /// The account is in a conference.
    pub fn is_conference(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.eq_ignore_ascii_case("Conferenced"))
    }

    /// A conference goes on, and nothing that is said in it is told here.
    pub fn lacks_messaging(&self) -> bool {
        let silent = self.messaging.as_ref().is_none_or(|messaging| {
            !messaging.connected && messaging.disconnected && messaging.add_messaging.is_some()
        });
        // In a meeting for a group, whoever began it adds the messaging.
        let is_being_made = self.gathering == Gathering::Meeting;
        let rings = self.invitation == InvitationProgress::Ringing;
        self.is_conference() && !self.ended && !rings && !is_being_made && silent
    }
}

/// A view that the account writes and the conversation's deliveries wait on.
pub type SharedView = Arc<watch::Sender<ConversationView>>;

/// A fresh view.
pub fn shared_view(view: ConversationView) -> SharedView {
    Arc::new(watch::Sender::new(view))
}

/// Sent by the account: send this row. `settled` answers if the event stream settles it. If the conversation stops
/// first, [`ConversationExited`] tells whether it was begun.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Deliver {
    /// What to send.
    pub send: ClaimedSend,
    /// Answered by the account when a commit settled the row.
    pub settled: oneshot::Receiver<SettledSend>,
}

/// How far a delivery brought its row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeliveryEnd {
    /// What became of it is committed.
    Done,
    /// So it is, and the server would not begin a conversation because the account has too many.
    NoRoom,
    /// The server has a conversation of its thread open, in which it is to be said.
    ThreadTaken,
    /// Nothing was said, and the conversation that was to become that of a group is over: it is to begin anew, without these
    /// recipients, who can't be had.
    BeginAnew(Vec<Unreached>),
}

/// Sent to the account when a delivery came to its end, whatever it was.
#[derive(Message)]
#[rtype(result = "()")]
pub struct DeliveryFinished {
    /// The row.
    pub outbox: OutboxId,
    /// The attempt.
    pub operation_id: OperationId,
    /// Whether there is more to do.
    pub end: DeliveryEnd,
}

/// Sent by a [`ConversationActor`] to its account exactly once.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ConversationExited {
    /// Number that the account gave it.
    pub number: u64,
    /// Row that was being sent: what became of it has to be settled.
    pub in_flight: Option<OutboxId>,
    /// It ended by a panic.
    pub panicked: bool,
}

/// Sent by the account when another actor took over this conversation, or the account ends.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopConversation;

/// Says what the outbox wants said, one message at a time.
pub struct ConversationActor {
    number: u64,
    destination: Vec<SipUri>,
    view: SharedView,
    context: Arc<DeliveryContext>,
    account: Recipient<ConversationExited>,
    finished: Recipient<DeliveryFinished>,
    idle_after: Duration,
    queue: VecDeque<Deliver>,
    in_flight: Option<OutboxId>,
}

impl ConversationActor {
    /// `destination` is whom to call if there is no conversation yet.
    pub fn new(
        number: u64,
        destination: Vec<SipUri>,
        view: SharedView,
        context: Arc<DeliveryContext>,
        account: Recipient<ConversationExited>,
        finished: Recipient<DeliveryFinished>,
    ) -> Self {
        let idle_after = context.settings.idle_conversation;
        Self {
            number,
            destination,
            view,
            context,
            account,
            finished,
            idle_after,
            queue: VecDeque::new(),
            in_flight: None,
        }
    }

    /// Stops when the conversation is over and nothing is being delivered.
    fn watch_for_the_end(&mut self, ctx: &mut Context<Self>) {
        let mut view = self.view.subscribe();
        let ended = async move { view.wait_for(|view| view.ended).await.map(drop) };
        ctx.spawn(ended.into_actor(self).map(|_, conversation, ctx| {
            if conversation.in_flight.is_none() {
                ctx.stop();
            }
        }));
    }

    fn deliver_next(&mut self, ctx: &mut Context<Self>) {
        if self.in_flight.is_some() {
            return;
        }
        if self.view.borrow().ended {
            ctx.stop();
            return;
        }
        let Some(Deliver { send, settled }) = self.queue.pop_front() else { return };
        let (outbox, operation_id) = (send.outbox, send.operation_id.clone());
        self.in_flight = Some(outbox);
        let delivery = Delivery::new(
            Arc::clone(&self.context),
            Arc::clone(&self.view),
            self.destination.clone(),
            send,
            settled,
        );
        ctx.spawn(delivery.run().into_actor(self).map(move |end, conversation, ctx| {
            conversation.in_flight = None;
            conversation.finished.do_send(DeliveryFinished { outbox, operation_id, end });
            // An invitation that failed leaves nothing to talk in: whatever comes next needs a new conversation.
            conversation.deliver_next(ctx);
        }));
    }

    /// Ends the conversation when nothing was said in it for [`Self::idle_after`], else looks again when that may be.
    fn end_if_idle(&mut self, ctx: &mut Context<Self>) {
        let (idle, stop) = {
            let view = self.view.borrow();
            let stop = view.messaging.as_ref().and_then(|messaging| messaging.stop_messaging.clone());
            (view.last_activity.elapsed(), stop)
        };
        // A conference is the others' as well: what is said in it after a pause would be missed.
        let busy = self.in_flight.is_some() || !self.queue.is_empty() || self.view.borrow().is_conference();
        if idle < self.idle_after || busy {
            let rest = if busy { self.idle_after } else { self.idle_after.saturating_sub(idle) };
            ctx.run_later(rest + Duration::from_millis(100), Self::end_if_idle);
            return;
        }
        if let Some(stop) = stop {
            let context = Arc::clone(&self.context);
            ctx.spawn(
                async move {
                    match context.client.resolve(&stop) {
                        Ok(stop) => context.client.post_empty(&stop).await,
                        Err(error) => Err(error),
                    }
                }
                .into_actor(self)
                .map(|result, conversation, _| {
                    if let Err(error) = result {
                        if matches!(error.status(), Some(404 | 410)) {
                            conversation.view.send_modify(|view| view.ended = true);
                        }
                        tracing::debug!(error = %crate::error_chain(&error), "an idle conversation could not be ended");
                    }
                }),
            );
        }
        ctx.run_later(self.idle_after, Self::end_if_idle);
    }
}

impl Actor for ConversationActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.watch_for_the_end(ctx);
        ctx.run_later(self.idle_after, Self::end_if_idle);
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.account.do_send(ConversationExited {
            number: self.number,
            in_flight: self.in_flight,
            panicked: std::thread::panicking(),
        });
    }
}

impl Handler<Deliver> for ConversationActor {
    type Result = ();

    fn handle(&mut self, deliver: Deliver, ctx: &mut Self::Context) {
        self.queue.push_back(deliver);
        self.deliver_next(ctx);
    }
}

impl Handler<StopConversation> for ConversationActor {
    type Result = ();

    fn handle(&mut self, _: StopConversation, ctx: &mut Self::Context) {
        ctx.stop();
    }
}
