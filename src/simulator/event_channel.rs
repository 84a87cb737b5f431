//! The event channel of one application: packages of events in order, each kept until it is acknowledged.
//!
//! A GET with `ack=N` acknowledges every package before N and asks for package N. Package N is formed when events
//! are due, or empty when the time is up, and from then on it is given again, unchanged, to every GET that asks for
//! it, until a GET asks for the package after it. A connection that drops acknowledges nothing. A GET that asks for
//! any other package is told by `resync` where to go on. One GET is parked at a time: the newer replaces the older.
//!
//! A package can also say `resume` in place of `next`: what was in no package before it is lost. It happens on
//! request only, like the other liberties that [`twist`] takes with a package while it is formed.
//!
//! The channel lives inside its application's lock; what must happen outside that lock (telling the writers of
//! messages that they were fetched) is handed back to the caller.

use std::{sync::Arc, time::Duration};

use hyper::{Method, StatusCode};
use tokio::{sync::Notify, time::Instant};

use super::{
    application::Application,
    conversation::{self, Receipt},
    fault::{FaultKind, Faults, Operation},
    payload::{EventPackage, Failure, Link, Reason, Resource},
    server::{Exchange, Outcome, Server, reply},
};

/// An event's type, which is its element name in XML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventKind {
    Added,
    Updated,
    Deleted,
    Started,
    Completed,
    /// A type that no reference lists.
    Unheard,
}

impl EventKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Updated => "updated",
            Self::Deleted => "deleted",
            Self::Started => "started",
            Self::Completed => "completed",
            Self::Unheard => "transfigured",
        }
    }
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Success,
    Failure,
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Success => "Success",
            Self::Failure => "Failure",
        }
    }
}

/// How soon an event releases the parked GET.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Priority {
    High,
    Medium,
}

/// A message that an event carries, for the books.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    /// Its entry in the ledger.
    pub(crate) serial: u64,
    /// Who wants to know that it was fetched.
    pub(crate) receipt: Option<Receipt>,
    /// Whether it is lost when it is not fetched in time; an invitation has its own time limit.
    pub(crate) expires: bool,
}

/// One event.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) sender: Link,
    pub(crate) kind: EventKind,
    pub(crate) target: Link,
    /// The collection that the target joined or left.
    pub(crate) within: Option<Link>,
    pub(crate) status: Option<Status>,
    pub(crate) reason: Option<Reason>,
    /// The resource as it was; absent where the event only links it.
    pub(crate) resource: Option<Resource>,
    pub(crate) priority: Priority,
    pub(crate) delivery: Option<Delivery>,
}

impl Event {
    pub(crate) fn new(sender: Link, kind: EventKind, target: Link) -> Self {
        Self {
            sender,
            kind,
            target,
            within: None,
            status: None,
            reason: None,
            resource: None,
            priority: Priority::High,
            delivery: None,
        }
    }

    pub(crate) fn within(self, place: Link) -> Self {
        Self { within: Some(place), ..self }
    }

    pub(crate) fn status(self, status: Status) -> Self {
        Self { status: Some(status), ..self }
    }

    pub(crate) fn reason(self, reason: Option<Reason>) -> Self {
        Self { reason, ..self }
    }

    pub(crate) fn resource(self, resource: Resource) -> Self {
        Self { resource: Some(resource), ..self }
    }

    pub(crate) fn medium(self) -> Self {
        Self { priority: Priority::Medium, ..self }
    }

    pub(crate) fn delivery(self, delivery: Delivery) -> Self {
        Self { delivery: Some(delivery), ..self }
    }
}

/// What a client last asked of the channel; the server remembers it.
#[derive(Debug, Clone, Copy)]
struct Parameters {
    low: Duration,
    medium: Duration,
    timeout: Option<Duration>,
    priority: u64,
}

struct Parked {
    ticket: u64,
    priority: u64,
    wake: Arc<Notify>,
}

/// Events that were given together, and go on being given until they are acknowledged.
#[derive(Debug)]
struct Package {
    events: Vec<Event>,
    /// `next` or `resume`.
    onward: &'static str,
    /// Whether it holds elements that no reference lists.
    strange: bool,
}

/// See the module.
pub(crate) struct Channel {
    /// The number of the package that the next GET should ask for.
    current: u64,
    /// Package `current`, once it is formed.
    package: Option<Package>,
    waiting: Vec<(Instant, Event)>,
    parked: Option<Parked>,
    last_ticket: u64,
    parameters: Parameters,
    /// When a GET was last parked or answered.
    pub(crate) last_seen: Instant,
}

/// What a GET is to do, decided when it arrives and each time it wakes.
enum Step {
    Give(u64),
    Wait(Instant),
    Replaced,
}

impl Channel {
    pub(crate) fn new() -> Self {
        Self {
            current: 1,
            package: None,
            waiting: Vec::new(),
            parked: None,
            last_ticket: 0,
            parameters: Parameters {
                low: Duration::from_secs(15),
                medium: Duration::from_secs(5),
                timeout: None,
                priority: 0,
            },
            last_seen: Instant::now(),
        }
    }

    pub(crate) fn is_parked(&self) -> bool {
        self.parked.is_some()
    }

    /// The number that the `events` link of the application names.
    pub(crate) fn current(&self) -> u64 {
        self.current
    }

    pub(crate) fn push(&mut self, event: Event) {
        let delay = match event.priority {
            Priority::High => Duration::ZERO,
            Priority::Medium => self.parameters.medium,
        };
        self.waiting.push((Instant::now() + delay, event));
        self.wake();
    }

    /// Makes the parked GET look again.
    pub(crate) fn wake(&self) {
        if let Some(parked) = &self.parked {
            parked.wake.notify_one();
        }
    }

    /// Takes the events of a message that was not fetched in time out of the channel; none, if it was fetched.
    pub(crate) fn take_unfetched(&mut self, serial: u64) -> Vec<Delivery> {
        let mut taken = Vec::new();
        self.waiting.retain(|(_, event)| match &event.delivery {
            Some(delivery) if delivery.expires && delivery.serial == serial => {
                taken.push(delivery.clone());
                false
            }
            _ => true,
        });
        taken
    }

    /// Everything that was not acknowledged, when the application ends.
    pub(crate) fn abandon(&mut self) -> Vec<Delivery> {
        self.wake();
        let waiting = std::mem::take(&mut self.waiting).into_iter().map(|(_, event)| event);
        let formed = self.package.take().map(|package| package.events).unwrap_or_default();
        formed.into_iter().chain(waiting).filter_map(|event| event.delivery).collect()
    }

    /// A GET asks for package `ack`. Gives the messages that it acknowledges by doing so, or where to resync to.
    fn acknowledge(&mut self, ack: u64) -> Result<Vec<u64>, u64> {
        if ack == self.current {
            return Ok(Vec::new());
        }
        if ack == self.current + 1
            && let Some(package) = self.package.take()
        {
            self.current += 1;
            let acknowledged = package.events.iter().filter_map(|event| event.delivery.as_ref());
            return Ok(acknowledged.map(|delivery| delivery.serial).collect());
        }
        Err(self.current)
    }

    /// Forms package `current` of everything that waits. Gives the receipts of the messages in it.
    fn form(&mut self, twisted: Twisted<'_>) -> Vec<Receipt> {
        let mut events: Vec<Event> = self.waiting.drain(..).map(|(_, event)| event).collect();
        let strange = twist(&mut events, twisted);
        let receipts = events
            .iter_mut()
            .filter_map(|event| event.delivery.as_mut())
            .filter_map(|delivery| delivery.receipt.take())
            .collect();
        self.package = Some(Package { events, onward: "next", strange });
        receipts
    }

    /// Loses every event that is in no package yet; the next package says so. Gives the messages among them.
    fn resume(&mut self) -> Vec<Delivery> {
        self.package = Some(Package { events: Vec::new(), onward: "resume", strange: false });
        std::mem::take(&mut self.waiting).into_iter().filter_map(|(_, event)| event.delivery).collect()
    }

    fn step(
        &mut self,
        ticket: u64,
        until: Instant,
        receipts: &mut Vec<Receipt>,
        twisted: Twisted<'_>,
    ) -> Step {
        if self.parked.as_ref().is_none_or(|parked| parked.ticket != ticket) {
            return Step::Replaced;
        }
        if self.package.is_some() {
            return Step::Give(self.current);
        }
        let now = Instant::now();
        let due = self.waiting.iter().map(|(due, _)| *due).min();
        if due.is_some_and(|due| due <= now) {
            receipts.append(&mut self.form(twisted));
            return Step::Give(self.current);
        }
        if until <= now {
            // Usually empty; what still waits for its delay comes along.
            receipts.append(&mut self.form(twisted));
            return Step::Give(self.current);
        }
        Step::Wait(due.map_or(until, |due| due.min(until)))
    }
}

/// Whether a fault that changes a package strikes now.
type Twisted<'a> = &'a dyn Fn(&FaultKind) -> bool;

/// Changes a package that is being formed as the faults ask for that can. True if it is to hold unknown elements.
fn twist(events: &mut Vec<Event>, twisted: Twisted<'_>) -> bool {
    if events.is_empty() {
        return false;
    }
    if has_repetitions(events) && twisted(&FaultKind::Aggregate) {
        aggregate(events);
    }
    if events.iter().any(Event::is_about_participants) && twisted(&FaultKind::OddOrder) {
        participants_first(events);
    }
    if events.iter().any(|event| event.resource.is_some()) && twisted(&FaultKind::LinkOnly) {
        for event in events.iter_mut() {
            event.resource = None;
        }
    }
    let strange = twisted(&FaultKind::UnknownThings);
    if strange {
        add_unknown_things(events);
    }
    strange
}

impl Event {
    fn is_about_participants(&self) -> bool {
        matches!(self.target.rel, "participant" | "localParticipant" | "participantMessaging")
    }

    /// Whether the two are about one thing, so that the later can stand for both.
    fn repeats(&self, earlier: &Self) -> bool {
        self.target.href == earlier.target.href
            && self.target.rel == earlier.target.rel
            && self.within == earlier.within
            && self.kind != EventKind::Deleted
            && earlier.kind != EventKind::Deleted
    }
}

fn has_repetitions(events: &[Event]) -> bool {
    (0..events.len()).any(|index| events[..index].iter().any(|earlier| events[index].repeats(earlier)))
}

/// Of several events about one thing the last remains: as `added` if one of them was, with the message of all.
fn aggregate(events: &mut Vec<Event>) {
    let mut merged: Vec<Event> = Vec::with_capacity(events.len());
    for mut event in events.drain(..) {
        if let Some(index) = merged.iter().position(|earlier| event.repeats(earlier)) {
            let earlier = merged.remove(index);
            if earlier.kind == EventKind::Added {
                event.kind = EventKind::Added;
            }
            event.resource = event.resource.or(earlier.resource);
            event.delivery = match (earlier.delivery, event.delivery) {
                // One of the two may know the writer who waits.
                (Some(first), Some(second)) => {
                    Some(Delivery { receipt: first.receipt.or(second.receipt), ..second })
                }
                (first, second) => second.or(first),
            };
            // A first event keeps its place, a message or an operation that completes comes where it completed.
            if event.kind == EventKind::Completed {
                merged.push(event);
            } else {
                merged.insert(index, event);
            }
        } else {
            merged.push(event);
        }
    }
    *events = merged;
}

/// Brings what concerns participants to the front, the last first; what concerns one of them keeps its order.
fn participants_first(events: &mut Vec<Event>) {
    let (participants, others): (Vec<Event>, Vec<Event>) =
        events.drain(..).partition(Event::is_about_participants);
    let mut by_target: Vec<Vec<Event>> = Vec::new();
    for event in participants {
        match by_target.iter_mut().find(|group| group[0].target.href == event.target.href) {
            Some(group) => group.push(event),
            None => by_target.push(vec![event]),
        }
    }
    events.extend(by_target.into_iter().rev().flatten());
    events.extend(others);
}

fn add_unknown_things(events: &mut Vec<Event>) {
    for event in events.iter_mut() {
        let resource = event.resource.take().map(|resource| {
            resource
                .property("phaseOfTheMoon", "waning")
                .property("tides", vec!["ebb".to_owned(), "flow".to_owned()])
                .link("observatory", "/observatory?a=1&b=2")
                .embed(Resource::new("telescope", "/telescope").property("aperture", "wide"))
        });
        event.resource = resource;
    }
    let sender = events[0].sender.clone();
    let unheard = Event::new(sender.clone(), EventKind::Unheard, sender.clone());
    let unknown_rel = Event::new(sender, EventKind::Added, Link::titled("comet", "/comets/1", "Halley"));
    let stranger = Link::new("observatory", "/observatory");
    let unknown_sender = Event::new(stranger, EventKind::Updated, Link::new("telescope", "/telescope"))
        .resource(Resource::new("telescope", "/telescope").property("aperture", "wide"));
    events.insert(events.len() / 2, unheard);
    events.insert(0, unknown_sender);
    events.push(unknown_rel);
}

/// Takes the GET out of the channel however it ends, a cut connection included.
struct Ticket {
    application: Arc<Application>,
    number: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.application.lock();
        if state.channel.parked.as_ref().is_some_and(|parked| parked.ticket == self.number) {
            state.channel.parked = None;
        }
        state.channel.last_seen = Instant::now();
    }
}

struct Asked {
    ack: Option<u64>,
    low: Option<Duration>,
    medium: Option<Duration>,
    timeout: Option<Duration>,
    priority: Option<u64>,
}

impl Asked {
    fn read(exchange: &Exchange) -> Result<Self, Failure> {
        let seconds = |name: &'static str, least: u64| -> Result<Option<Duration>, Failure> {
            let Some(text) = exchange.query(name) else { return Ok(None) };
            match text.parse::<u64>() {
                Ok(value) if (least..=1800).contains(&value) => Ok(Some(Duration::from_secs(value))),
                _ => Err(Failure::parameter(name, "The value is out of range.")),
            }
        };
        let number = |name: &'static str| -> Result<Option<u64>, Failure> {
            let Some(text) = exchange.query(name) else { return Ok(None) };
            text.parse().map(Some).map_err(|_| Failure::parameter(name, "The value is not a number."))
        };
        Ok(Self {
            ack: number("ack")?,
            low: seconds("low", 5)?,
            medium: seconds("medium", 5)?,
            timeout: seconds("timeout", 180)?,
            priority: number("priority")?,
        })
    }
}

/// Answers a GET on `events`, as soon as there is something to say.
pub(crate) async fn get(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
) -> Outcome {
    if exchange.method != Method::GET {
        return Err(Failure::method_not_allowed("GET"));
    }
    let asked = Asked::read(exchange)?;
    let wake = Arc::new(Notify::new());
    let started = Instant::now();
    let (ticket, until, ack) = {
        let mut state = application.lock();
        state.alive()?;
        let channel = &mut state.channel;
        channel.last_seen = started;
        let ack = asked.ack.unwrap_or(channel.current);
        let acknowledged = match channel.acknowledge(ack) {
            Ok(serials) => serials,
            Err(expected) => {
                let onward = Link::new("resync", cursor(application, expected));
                return Ok(package_reply(application, exchange, ack, onward, &[], false));
            }
        };
        server.ledger.acknowledge(acknowledged);
        let parameters = &mut channel.parameters;
        parameters.low = asked.low.unwrap_or(parameters.low);
        parameters.medium = asked.medium.unwrap_or(parameters.medium);
        parameters.timeout = asked.timeout.or(parameters.timeout);
        parameters.priority = asked.priority.unwrap_or(parameters.priority);
        let (priority, timeout) = (parameters.priority, parameters.timeout);
        if let Some(parked) = &channel.parked {
            if parked.priority > priority {
                return Err(replaced());
            }
            parked.wake.notify_one();
        }
        channel.last_ticket += 1;
        let number = channel.last_ticket;
        channel.parked = Some(Parked { ticket: number, priority, wake: Arc::clone(&wake) });
        let patience = timeout.unwrap_or(server.settings.poll_timeout);
        let patience = server.settings.poll_timeout_limit.map_or(patience, |limit| patience.min(limit));
        (Ticket { application: Arc::clone(application), number }, started + patience, ack)
    };
    let twisted = |kind: &FaultKind| {
        let strikes = |other: &FaultKind| other == kind;
        Faults::claim_within(server, &application.account, Operation::Events, strikes).is_some()
    };
    loop {
        interrupt(server, application, ticket.number);
        let mut receipts = Vec::new();
        let step = {
            let mut state = application.lock();
            state.alive()?;
            match state.channel.step(ticket.number, until, &mut receipts, &twisted) {
                Step::Wait(moment) => Err(moment),
                Step::Replaced => return Err(replaced()),
                Step::Give(number) => {
                    let package = state.channel.package.as_ref();
                    let (onward, events, strange) = package.map_or(("next", &[][..], false), |package| {
                        (package.onward, package.events.as_slice(), package.strange)
                    });
                    let messages = events.iter().filter_map(|event| event.delivery.as_ref());
                    server.ledger.hand_over(messages.map(|delivery| delivery.serial));
                    let onward = Link::new(onward, cursor(application, number + 1));
                    Ok(package_reply(application, exchange, ack, onward, events, strange))
                }
            }
        };
        // Outside the lock, because the writer may be another application.
        for receipt in receipts {
            receipt.settle(server, true);
        }
        match step {
            Ok(answer) => return Ok(answer),
            Err(moment) => {
                tokio::select! {
                    () = wake.notified() => {}
                    () = tokio::time::sleep_until(moment) => {}
                }
            }
        }
    }
}

/// Lets a `resume` happen that was asked for: whatever is in no package yet is lost.
fn interrupt(server: &Arc<Server>, application: &Arc<Application>, ticket: u64) {
    let resumes = |kind: &FaultKind| matches!(kind, FaultKind::Resume { .. });
    let conversations: Vec<_> = {
        let state = application.lock();
        let ours = state.channel.parked.as_ref().is_some_and(|parked| parked.ticket == ticket);
        if !ours || state.channel.package.is_some() {
            return;
        }
        match Faults::claim_within(server, &application.account, Operation::Events, resumes) {
            Some(FaultKind::Resume { lose_conversations: true }) => {
                let legs = state.legs.values().filter(|leg| !leg.ended);
                legs.map(|leg| Arc::clone(&leg.conversation)).collect()
            }
            Some(_) => Vec::new(),
            None => return,
        }
    };
    for conversation in conversations {
        conversation::application_left(server, &conversation, application);
    }
    let lost = application.lock().channel.resume();
    for delivery in lost {
        server.ledger.expire(delivery.serial);
        if let Some(receipt) = delivery.receipt {
            receipt.settle(server, false);
        }
    }
}

/// Sends a GET back to the package that it should ask for, whatever it asked for.
pub(crate) fn resync(application: &Application, exchange: &Exchange) -> super::server::Reply {
    let expected = application.lock().channel.current;
    let ack = exchange.query("ack").and_then(|text| text.parse().ok()).unwrap_or(expected);
    let onward = Link::new("resync", cursor(application, expected));
    package_reply(application, exchange, ack, onward, &[], false)
}

pub(crate) fn replaced() -> Failure {
    Failure::conflict("PGetReplaced", "The pending GET was replaced by another.")
}

fn cursor(application: &Application, ack: u64) -> String {
    format!("{}/events?ack={ack}", application.href())
}

fn package_reply(
    application: &Application,
    exchange: &Exchange,
    ack: u64,
    onward: Link,
    events: &[Event],
    strange: bool,
) -> super::server::Reply {
    let package = EventPackage { href: cursor(application, ack), onward, events, strange };
    reply(StatusCode::OK, exchange.format.content_type, package.render(exchange.format))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u64) -> Event {
        let sender = Link::new("communication", "/communication");
        Event::new(sender, EventKind::Completed, Link::new("message", format!("/messages/{number}")))
            .delivery(Delivery { serial: number, receipt: None, expires: true })
    }

    /// What a GET would be given now, if anything.
    fn poll(channel: &mut Channel, ack: u64) -> Result<Option<usize>, u64> {
        channel.acknowledge(ack)?;
        channel.last_ticket += 1;
        let ticket = channel.last_ticket;
        channel.parked = Some(Parked { ticket, priority: 0, wake: Arc::default() });
        let step = channel.step(ticket, Instant::now() + Duration::from_mins(1), &mut Vec::new(), &|_| false);
        Ok(match step {
            Step::Give(_) => channel.package.as_ref().map(|package| package.events.len()),
            _ => None,
        })
    }

    #[test]
    fn a_package_is_given_unchanged_until_the_next_is_asked_for() {
        let mut channel = Channel::new();
        assert_eq!(poll(&mut channel, 1), Ok(None));
        channel.push(event(1));
        channel.push(event(2));
        assert_eq!(poll(&mut channel, 1), Ok(Some(2)));
        channel.push(event(3));
        assert_eq!(poll(&mut channel, 1), Ok(Some(2)));
        assert_eq!(channel.acknowledge(2), Ok(vec![1, 2]));
        assert_eq!(poll(&mut channel, 2), Ok(Some(1)));
    }

    #[test]
    fn any_other_number_is_sent_back_to_the_current_one() {
        let mut channel = Channel::new();
        assert_eq!(poll(&mut channel, 2), Err(1));
        channel.push(event(1));
        assert_eq!(poll(&mut channel, 1), Ok(Some(1)));
        assert_eq!(poll(&mut channel, 2), Ok(None));
        assert_eq!(poll(&mut channel, 1), Err(2));
        assert_eq!(poll(&mut channel, 99), Err(2));
    }

    #[test]
    fn only_a_message_in_no_package_can_run_out_of_time() {
        let mut channel = Channel::new();
        channel.push(event(1));
        assert_eq!(poll(&mut channel, 1), Ok(Some(1)));
        channel.push(event(2));
        assert!(channel.take_unfetched(1).is_empty());
        assert_eq!(channel.take_unfetched(2).len(), 1);
        assert_eq!(poll(&mut channel, 2), Ok(None));
    }

    #[test]
    fn an_event_of_less_urgency_waits_for_a_high_one() {
        let mut channel = Channel::new();
        channel.push(event(1).medium());
        assert_eq!(poll(&mut channel, 1), Ok(None));
        channel.push(event(2));
        assert_eq!(poll(&mut channel, 1), Ok(Some(2)));
    }
}
