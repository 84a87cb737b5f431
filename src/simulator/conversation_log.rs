//! Conversation logs: what the mailbox of an account keeps of its conversations, whoever answered them.
//!
//! While a conversation goes on, its hub keeps a [`Draft`] for each account in it; some time after its end the
//! draft becomes a [`Log`] of the account, and its applications are told by `missedItems`. Nothing is kept unless
//! [`SimulatorSettings::conversation_logs`](super::SimulatorSettings::conversation_logs) is on.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use hyper::{Method, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    application::{Account, Application, address_of, display_name},
    conversation::{Hub, Text},
    event_channel::{Event, EventKind},
    leg::data_uri,
    payload::{Failure, Link, Resource, Value},
    server::{Exchange, Outcome, Server, no_content},
};

/// A message as the log of one account has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedMessage {
    /// SIP URI of the writer, which may be the account itself.
    pub from: String,
    /// Plain text, if any.
    pub text: Option<String>,
    /// HTML, if any.
    pub html: Option<String>,
    /// `timeStamp`.
    pub time: Timestamp,
    /// Its entry in the ledger, if an application of the account delivered or sent it.
    pub serial: Option<u64>,
}

/// A log of one account.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, read by name in JSON")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Its id, the last part of its address.
    pub id: String,
    /// SIP URI of the account.
    pub account: String,
    /// The simulator's own id of the conversation.
    pub conversation: String,
    /// `threadId` of the conversation.
    pub thread_id: String,
    /// `subject` of the conversation.
    pub subject: String,
    /// Whether somebody called the account.
    pub incoming: bool,
    /// Whether nobody answered for the account.
    pub missed: bool,
    /// Whether more than two were in it.
    pub conference: bool,
    /// When it was delivered to the mailbox.
    pub creation_time: Timestamp,
    /// SIP URIs of the others.
    pub recipients: Vec<String>,
    /// Its messages, the oldest first.
    pub messages: Vec<LoggedMessage>,
    /// Whether a client has marked it as read.
    pub read: bool,
}

/// What is known of a conversation for one account while it goes on.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    incoming: bool,
    answered: bool,
    messages: Vec<LoggedMessage>,
}

struct Log {
    entry: LogEntry,
    read: AtomicBool,
}

/// The logs of one account, the oldest first.
#[derive(Default)]
pub(crate) struct Logs(Mutex<Vec<Arc<Log>>>);

impl Logs {
    fn all(&self) -> MutexGuard<'_, Vec<Arc<Log>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn entries(&self) -> Vec<LogEntry> {
        let all = self.all();
        all.iter().map(|log| LogEntry { read: log.read.load(SeqCst), ..log.entry.clone() }).collect()
    }

    fn find(&self, id: &str) -> Option<Arc<Log>> {
        self.all().iter().find(|log| log.entry.id == id).cloned()
    }
}

/// A message for the log.
pub(crate) struct Line<'a> {
    pub(crate) from: &'a str,
    pub(crate) text: Text,
    pub(crate) time: Timestamp,
    pub(crate) serial: Option<u64>,
}

impl Hub {
    /// Notes a message for the log of `uri`, if that is an account and logs are kept.
    pub(crate) fn note(
        &mut self,
        server: &Server,
        uri: &str,
        incoming: bool,
        answered: bool,
        line: Line<'_>,
    ) {
        if !server.accounts.contains_key(uri) || !server.now().conversation_logs {
            return;
        }
        let draft =
            self.drafts.entry(uri.to_owned()).or_insert_with(|| Draft { incoming, ..Draft::default() });
        draft.answered |= answered;
        draft.messages.push(LoggedMessage {
            from: line.from.to_owned(),
            text: line.text.plain,
            html: line.text.html,
            time: line.time,
            serial: line.serial,
        });
    }
}

/// The conversation is over: its drafts become logs after the delay that the settings say.
pub(crate) fn deliver_later(server: &Arc<Server>, conversation: &str, hub: &mut Hub) {
    let people: Vec<String> = hub.seats.iter().map(|seat| seat.uri.clone()).collect();
    for (uri, draft) in std::mem::take(&mut hub.drafts) {
        let entry = LogEntry {
            id: server.dice.hex(),
            conversation: conversation.to_owned(),
            thread_id: hub.thread_id.clone(),
            subject: hub.subject.clone(),
            incoming: draft.incoming,
            missed: !draft.answered,
            conference: hub.conference,
            creation_time: Timestamp::now(),
            recipients: people.iter().filter(|other| **other != uri).cloned().collect(),
            messages: draft.messages,
            read: false,
            account: uri,
        };
        let delay = server.now().log_delay;
        server.timers.after(delay, move |server| deliver(server, entry));
    }
}

fn deliver(server: &Arc<Server>, entry: LogEntry) {
    let Some(account) = server.accounts.get(&entry.account) else { return };
    let entry = LogEntry { creation_time: Timestamp::now(), ..entry };
    account.logs.all().push(Arc::new(Log { entry, read: AtomicBool::new(false) }));
    for application in account.living_applications() {
        let href = format!("{}/communication/missedItems", application.href());
        let target = Link::new("missedItems", href);
        let event = Event::new(application.communication_sender(), EventKind::Updated, target);
        application.lock().channel.push(event);
    }
}

/// `communication/missedItems`.
pub(crate) fn missed_items(server: &Server, application: &Application, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::GET)?;
    require_logs(server)?;
    let logs = application.account.logs.entries();
    let missed = logs.iter().filter(|log| log.missed).count();
    let unread = logs.iter().filter(|log| log.missed && !log.read).count();
    let resource = Resource::new("missedItems", format!("{}/communication/missedItems", application.href()))
        .property("conversationLogsCount", logs.len().to_string())
        .property("conversationLogsNotifications", "Enabled")
        .property("missedConversationsCount", missed.to_string())
        .property("unreadMissedConversationsCount", unread.to_string())
        .property("unreadVoicemailsCount", "0")
        .property("voiceMailsCount", "0");
    Ok(exchange.resource(StatusCode::OK, &resource))
}

fn require_logs(server: &Server) -> Result<(), Failure> {
    if server.now().conversation_logs { Ok(()) } else { Err(Failure::not_found()) }
}

/// `communication/conversationLogs` and what is below it.
pub(crate) fn conversation_logs(
    server: &Server,
    application: &Application,
    exchange: &Exchange,
    path: &[&str],
) -> Outcome {
    require_logs(server)?;
    let base = format!("{}/communication/conversationLogs", application.href());
    let logs = &application.account.logs;
    if path.is_empty() {
        exchange.only(&Method::GET)?;
        let limit = match exchange.query("limit").map(str::parse::<usize>) {
            None => usize::MAX,
            Some(Ok(limit)) if limit > 0 => limit,
            Some(_) => return Err(Failure::parameter("limit", "The value is out of range.")),
        };
        let mut resource = Resource::new("conversationLogs", &base);
        let link_only_share = server.now().link_only_share;
        for log in logs.all().iter().rev().take(limit) {
            resource = if server.dice.chance(link_only_share) {
                let link = Link::new("conversationLog", format!("{base}/{}", log.entry.id));
                resource.list_links([link])
            } else {
                resource.embed(log.resource(application, &base).in_list())
            };
        }
        return Ok(exchange.resource(StatusCode::OK, &resource));
    }
    let log = logs.find(path[0]).ok_or_else(Failure::not_found)?;
    let href = format!("{base}/{}", log.entry.id);
    match &path[1..] {
        [] => match exchange.method {
            Method::GET => Ok(exchange.resource(StatusCode::OK, &log.resource(application, &base))),
            Method::DELETE => {
                logs.all().retain(|known| known.entry.id != log.entry.id);
                Ok(no_content())
            }
            _ => Err(Failure::method_not_allowed("GET, DELETE")),
        },
        ["markAsRead"] => {
            exchange.only(&Method::POST)?;
            log.read.store(true, SeqCst);
            Ok(no_content())
        }
        ["conversationLogTranscripts", rest @ ..] => {
            exchange.only(&Method::GET)?;
            let first = match rest {
                [] => 0,
                ["next"] => exchange
                    .query("from")
                    .and_then(|text| text.parse::<usize>().ok())
                    .ok_or_else(Failure::not_found)?,
                [number] => {
                    let number: usize = number.parse().map_err(|_| Failure::not_found())?;
                    let message = log.entry.messages.get(number).ok_or_else(Failure::not_found)?;
                    let resource = transcript(server, application, &href, number, message);
                    return Ok(exchange.resource(StatusCode::OK, &resource));
                }
                _ => return Err(Failure::not_found()),
            };
            let page = server.settings.log_page.max(1);
            let messages = log.entry.messages.iter().enumerate().skip(first).take(page);
            let mut page_of: Vec<Resource> = messages
                .map(|(number, message)| transcript(server, application, &href, number, message).in_list())
                .collect();
            // No order is promised: every other page has its last message first.
            if (first / page) % 2 == 1 {
                page_of.reverse();
            }
            let transcripts = format!("{href}/conversationLogTranscripts");
            let mut resource = if first == 0 {
                Resource::new("conversationLogTranscripts", &transcripts)
            } else {
                Resource::new("nextConversationLogTranscripts", format!("{transcripts}/next?from={first}"))
            };
            if first + page < log.entry.messages.len() {
                let next = format!("{transcripts}/next?from={}", first + page);
                resource = resource.link("nextConversationLogTranscripts", next);
            }
            let resource = page_of.into_iter().fold(resource, Resource::embed);
            Ok(exchange.resource(StatusCode::OK, &resource))
        }
        _ => Err(Failure::not_found()),
    }
}

impl Log {
    fn resource(&self, application: &Application, base: &str) -> Resource {
        let LogEntry { id, thread_id, subject, incoming, missed, conference, .. } = &self.entry;
        let href = format!("{base}/{id}");
        let preview = self.entry.messages.first();
        let preview = preview.and_then(|message| message.text.as_ref().or(message.html.as_ref()));
        let preview: String = preview.map(|text| text.chars().take(20).collect()).unwrap_or_default();
        let mut resource = Resource::new("conversationLog", &href)
            .property("creationTime", Value::Time(self.entry.creation_time))
            .property("direction", if *incoming { "Incoming" } else { "Outgoing" })
            .property("importance", "Normal")
            .property("modalities", vec!["Messaging".to_owned()])
            .property("previewMessage", preview)
            .property("status", if *missed { "Missed" } else { "Archived" })
            .property("subject", subject.as_str())
            .property("threadId", thread_id.as_str())
            .property("totalRecipientsCount", self.entry.recipients.len().to_string())
            .property("type", if *conference { "ConferenceLog" } else { "MessageLog" })
            .link("continueMessaging", format!("{href}/continueMessaging"))
            .link("conversationLogTranscripts", format!("{href}/conversationLogTranscripts"))
            .link("markAsRead", format!("{href}/markAsRead"));
        // Servers show the first of many only.
        for (index, uri) in self.entry.recipients.iter().take(3).enumerate() {
            let contact = format!("{}/people/{}", application.href(), address_of(uri));
            let recipient = Resource::new("conversationLogRecipient", format!("{href}/recipients/{index}"))
                .property("displayName", display_name(uri))
                .property("sipUri", uri.as_str())
                .link("contact", contact);
            resource = resource.embed(recipient.in_list());
        }
        resource
    }
}

fn transcript(
    server: &Server,
    application: &Application,
    log: &str,
    number: usize,
    message: &LoggedMessage,
) -> Resource {
    let href = format!("{log}/conversationLogTranscripts/{number}");
    let mut text = Resource::new("messageTranscript", format!("{href}/messageTranscript"));
    if let Some(html) = &message.html {
        text = text.link("htmlMessage", data_uri(server, "text/html", html));
    }
    if let Some(plain) = &message.text {
        text = text.link("plainMessage", data_uri(server, "text/plain", plain));
    }
    let Account { uri, .. } = &*application.account;
    let base = application.href();
    let resource =
        Resource::new("conversationLogTranscript", href).property("timeStamp", Value::Time(message.time));
    let resource = if message.from == *uri {
        resource.link("me", format!("{base}/me"))
    } else {
        resource.link("contact", format!("{base}/people/{}", address_of(&message.from)))
    };
    resource.embed(text)
}
