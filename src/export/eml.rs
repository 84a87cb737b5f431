//! Mail: one message (RFC 5322, MIME) for each conversation and day, as compliance archives take it in.
//!
//! `From` is who wrote the first message of the day, `To` everybody else who took part, `Date` the time of that first
//! message. The text and the HTML part hold the same: the participants with the times at which they joined and left, then
//! the messages. `Message-ID` follows from account, conversation, day and chain number, so the same export made again has
//! the same ids; all days of a thread refer to one id in `References`, by which mail programs show them together. What a
//! later run brings for the same day is a mail of its own. File names end in `_p2p` for two people and `_conf` for more.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::Path,
};

use jiff::Timestamp;
use mail_builder::{
    MessageBuilder,
    headers::{address::Address, content_type::ContentType, date::Date, raw::Raw, text::Text},
    mime::{BodyPart, MimePart},
};

use super::{
    OutFile, file_name_of,
    journal::Position,
    run::{Finished, Layout},
    transcript::{self, escaped},
};
use crate::{
    archive::chain::digest,
    store::{ArchivedMessage, ConversationDetails},
};

/// More than this becomes a mail of its own, so that a busy day takes no more memory than this, and a mail program
/// opens it.
const MESSAGES_PER_MAIL: usize = 2000;
const BYTES_PER_MAIL: usize = 4 * 1024 * 1024;

/// Mails of one account.
pub(super) struct Mails {
    account: String,
    conversation: Option<ConversationDetails>,
    messages: Vec<ArchivedMessage>,
    bytes: usize,
}

impl Mails {
    pub(super) fn new(account: &str) -> Self {
        Self { account: account.to_owned(), conversation: None, messages: Vec::new(), bytes: 0 }
    }

    fn belongs(&self, message: &ArchivedMessage) -> bool {
        self.messages.first().is_none_or(|first| {
            first.message.conversation_id == message.message.conversation_id
                && day(first) == day(message)
                && self.messages.len() < MESSAGES_PER_MAIL
                && self.bytes < BYTES_PER_MAIL
        })
    }
}

/// `2026-03-01`.
pub(super) fn day(message: &ArchivedMessage) -> &str {
    message.message.sent_at.get(..10).unwrap_or(&message.message.sent_at)
}

impl Layout for Mails {
    fn message(
        &mut self,
        folder: &Path,
        message: ArchivedMessage,
        conversation: Option<&ConversationDetails>,
    ) -> anyhow::Result<Option<Finished>> {
        let finished = if self.belongs(&message) { None } else { self.finish(folder)? };
        if self.messages.is_empty() {
            self.conversation = conversation.cloned();
        }
        self.bytes += message.message.body.len() + message.message.body_html.as_ref().map_or(0, String::len);
        self.messages.push(message);
        Ok(finished)
    }

    fn finish(&mut self, folder: &Path) -> anyhow::Result<Option<Finished>> {
        let messages = std::mem::take(&mut self.messages);
        self.bytes = 0;
        let (Some(first), Some(last)) = (messages.first(), messages.last()) else {
            return Ok(None);
        };
        let mut file = OutFile::create(folder)?;
        for message in &messages {
            file.span.add(&message.message);
        }
        let mail = Mail {
            account: &self.account,
            conversation: self.conversation.as_ref(),
            messages: &messages,
            first_seq: file.span.first_seq(),
            last_seq: file.span.last_seq(),
            last_hash: file.span.last.as_ref().map_or("", |link| &link.chain_hash),
        };
        let kind = if mail.is_conference() { "conf" } else { "p2p" };
        let (first_seq, mail) = (mail.first_seq, mail.build()?);
        file.write(&mail)?;
        let safe_day: String =
            day(first).chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
        let name = format!(
            "{}/{}/{safe_day}_c{}_m{}_{kind}.eml",
            file_name_of(&self.account),
            safe_day.get(..7).unwrap_or("unknown"),
            first.message.conversation_id,
            first_seq,
        );
        let position = Position::Conversation(
            last.message.conversation_id,
            last.sent_at_key.clone(),
            last.message.message_id,
        );
        Ok(Some((file.finish(folder, name, &self.account)?, position)))
    }
}

/// One mail.
struct Mail<'a> {
    account: &'a str,
    conversation: Option<&'a ConversationDetails>,
    messages: &'a [ArchivedMessage],
    first_seq: i64,
    last_seq: i64,
    last_hash: &'a str,
}

impl Mail<'_> {
    fn is_conference(&self) -> bool {
        self.conversation.is_some_and(|conversation| conversation.multiparty) || self.people().len() > 2
    }

    /// Addresses of all who took part, with their names where they are known.
    fn people(&self) -> BTreeMap<&str, Option<&str>> {
        let mut people: BTreeMap<&str, Option<&str>> = BTreeMap::new();
        people.insert(self.account, None);
        let stays = self.conversation.iter().flat_map(|conversation| &conversation.stays);
        let stays = stays.map(|stay| (stay.sip_uri.as_deref(), stay.display_name.as_deref()));
        let senders = self
            .messages
            .iter()
            .map(|message| (message.message.sender_uri.as_deref(), message.message.sender_name.as_deref()));
        for (uri, name) in stays.chain(senders) {
            if let Some(uri) = uri {
                let known = people.entry(uri).or_default();
                *known = known.or(name);
            }
        }
        let recipients: BTreeSet<&str> =
            self.messages.iter().filter_map(|message| message.recipients.as_deref()).collect();
        for uri in recipients.into_iter().flat_map(|recipients| recipients.split(';')) {
            if !uri.is_empty() {
                people.entry(uri).or_default();
            }
        }
        people
    }

    fn build(&self) -> anyhow::Result<Vec<u8>> {
        let first = &self.messages[0];
        let day = day(first);
        let people = self.people();
        let from = first.message.sender_uri.as_deref().unwrap_or(self.account);
        let from_name = first.message.sender_name.as_deref().or_else(|| people.get(from).copied().flatten());
        let to: Vec<Address<'_>> = people
            .iter()
            .filter(|(uri, _)| people.len() == 1 || **uri != from)
            .map(|(uri, name)| address(uri, *name))
            .collect();
        let subject = self.conversation.and_then(|conversation| conversation.subject.as_deref());
        let subject = subject.map(one_line).filter(|subject| !subject.trim().is_empty());
        let subject = subject.unwrap_or_else(|| {
            let others: Vec<&str> = people
                .iter()
                .filter(|(uri, _)| **uri != self.account)
                .map(|(uri, name)| name.unwrap_or(uri))
                .collect();
            one_line(&format!("Conversation with {}", others.join(", ")))
        });
        let (text, html) = (self.text(), self.html());
        let boundary = format!("=_{}", &digest(&format!("{text}{html}"))[..40]);
        let body = MimePart::new(
            ContentType::new("multipart/alternative").attribute("boundary", boundary),
            BodyPart::Multipart(vec![
                MimePart::new(ContentType::new("text/plain").attribute("charset", "utf-8"), text),
                MimePart::new(ContentType::new("text/html").attribute("charset", "utf-8"), html),
            ]),
        );
        let host = host_of(self.account);
        let id = &digest(self.account)[..16];
        let thread = self.conversation.and_then(|conversation| conversation.thread_id.clone());
        let thread = thread.unwrap_or_else(|| format!("conversation {}", first.message.conversation_id));
        let thread = format!("thread-{}@{host}", &digest(&format!("{} {thread}", self.account))[..32]);
        let mut mail = MessageBuilder::new()
            .from(address(from, from_name))
            .to(Address::new_list(to))
            .subject(Text::new(format!("{subject} ({day})")))
            .date(Date::new(sent_at(first).as_second()))
            .message_id(format!("{day}.c{}.m{}.{id}@{host}", first.message.conversation_id, self.first_seq))
            .in_reply_to(thread.clone())
            .references(thread)
            .header("X-Ucwa-Relay-Account", Raw::new(one_line(self.account)))
            .header("X-Ucwa-Relay-Conversation", Raw::new(first.message.conversation_id.to_string()))
            .header("X-Ucwa-Relay-Messages", Raw::new(self.messages.len().to_string()))
            .header("X-Ucwa-Relay-Chain", Raw::new(format!("{}-{}", self.first_seq, self.last_seq)))
            .header("X-Ucwa-Relay-Last-Chain-Hash", Raw::new(one_line(self.last_hash)))
            .body(body);
        mail = match self.conversation.and_then(|conversation| conversation.importance.as_deref()) {
            Some("Urgent" | "Emergency") => {
                mail.header("Importance", Raw::new("high")).header("X-Priority", Raw::new("1"))
            }
            _ => mail.header("Importance", Raw::new("normal")),
        };
        Ok(mail.write_to_vec()?)
    }

    /// What is said above the messages, each with its name.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![("Account", self.account.to_owned())];
        if let Some(conversation) = self.conversation {
            facts.extend(conversation.subject.clone().map(|subject| ("Subject", subject)));
            facts.extend(conversation.importance.clone().map(|importance| ("Importance", importance)));
            facts.push(("Started", conversation.started_at.clone()));
            facts.extend(conversation.ended_at.clone().map(|at| ("Ended", at)));
        }
        facts
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in self.facts() {
            let _infallible = writeln!(text, "{name}: {}", one_line(&value));
        }
        text.push_str("\nParticipants:\n");
        for stay in self.conversation.map(transcript::stays).unwrap_or_default() {
            let _infallible = writeln!(text, "- {}", one_line(&stay));
        }
        text.push_str("\nMessages:\n");
        for message in self.messages {
            let _infallible = write!(
                text,
                "[{}] {}: {}",
                message.message.sent_at,
                one_line(&transcript::sender(message)),
                // Further lines stand to the right, so that none looks like another message.
                transcript::text(message).replace("\r\n", "\n").replace('\n', "\n    ")
            );
            if let Some(failure) = transcript::failure(message) {
                let _infallible = write!(text, " [{}]", one_line(&failure));
            }
            text.push('\n');
        }
        text
    }

    fn html(&self) -> String {
        let mut html =
            "<!doctype html>\n<html><head><meta charset=\"utf-8\"></head><body>\n<table>\n".to_owned();
        for (name, value) in self.facts() {
            let _infallible =
                writeln!(html, "<tr><th align=\"left\">{name}</th><td>{}</td></tr>", escaped(&value));
        }
        html.push_str("</table>\n<p>Participants:</p>\n<ul>\n");
        for stay in self.conversation.map(transcript::stays).unwrap_or_default() {
            let _infallible = writeln!(html, "<li>{}</li>", escaped(&stay));
        }
        html.push_str("</ul>\n<table>\n");
        for message in self.messages {
            let failure = transcript::failure(message)
                .map(|failure| format!("<br><em>{}</em>", escaped(&failure)))
                .unwrap_or_default();
            let _infallible = writeln!(
                html,
                "<tr valign=\"top\"><td>{}</td><td><b>{}</b></td><td>{}{failure}</td></tr>",
                escaped(&message.message.sent_at),
                escaped(&transcript::sender(message)),
                transcript::html(message),
            );
        }
        html.push_str("</table>\n</body></html>\n");
        html
    }
}

fn sent_at(message: &ArchivedMessage) -> Timestamp {
    message.message.sent_at.parse().unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A header's value: no character in it may end the header.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A SIP address as a mail address, which it is without its scheme.
fn address(uri: &str, name: Option<&str>) -> Address<'static> {
    let address = one_line(uri.split_once(':').map_or(uri, |(_, address)| address));
    Address::new_address(name.map(one_line), address)
}

/// Right side of ids: the account's domain, where it is one that mail knows.
fn host_of(account: &str) -> &str {
    let host = account.rsplit_once('@').map_or("", |(_, host)| host);
    let fits =
        !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte));
    if fits { host } else { "ucwa-relay.invalid" }
}
