//! Looks at a row that a user put into `outbox` and decides, without a database, whether it can ever be sent.
//!
//! A row that can be sent is *admitted*: it gets the account's id and a destination, and rows with the same destination
//! leave one after the other (G6). A row that cannot is refused with a code for programs and a sentence for people; it
//! never holds up another row.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::{
    archive::text::to_milliseconds,
    identifiers::{AccountId, ConversationId, SipUri},
};

/// New rows looked at in one transaction, which the accounts share; more follow in the next, so that nobody waits long
/// for it.
pub(crate) const ADMITTED_AT_ONCE: i64 = 200;

/// So many of them may be of one account, whose burst everybody else's rows wait for in each transaction.
pub(crate) const ADMITTED_OF_ACCOUNT: i64 = 50;

/// Rows that waited too long, expired in one transaction: whatever else is written waits no longer than that takes.
pub(crate) const EXPIRED_AT_ONCE: i64 = 500;

/// Whether some account used up its share of what is [admitted at once](ADMITTED_AT_ONCE), told from the accounts of the rows
/// that were found.
pub(crate) fn more_may_wait<'a>(accounts: impl Iterator<Item = &'a str>) -> bool {
    let mut found: BTreeMap<&str, i64> = BTreeMap::new();
    for account in accounts {
        *found.entry(account).or_default() += 1;
    }
    let accounts = i64::try_from(found.len()).unwrap_or(i64::MAX).max(1);
    let share = (ADMITTED_AT_ONCE / accounts).min(ADMITTED_OF_ACCOUNT);
    found.values().any(|count| *count >= share)
}

/// Longest subject and thread id that a server takes, in UTF-16 units (protocol 18.4).
const MAX_UNITS: usize = 250;

/// `last_code` of a row whose conversation is not with its recipients.
pub const OTHER_RECIPIENTS: &str = "OtherRecipients";

/// Values of `importance` that UCWA knows.
const IMPORTANCE: [&str; 3] = ["Normal", "Urgent", "Emergency"];

/// A time that a user wrote: databases understand more than one form of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum GivenTime {
    /// The column is NULL.
    #[default]
    Absent,
    /// The database understood it.
    At(Timestamp),
    /// The database did not; as given.
    Unreadable(String),
}

/// What a user wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Submission {
    /// `account`.
    pub account: String,
    /// `recipients`.
    pub recipients: Option<String>,
    /// `body`.
    pub body: String,
    /// `content_type`.
    pub content_type: String,
    /// `subject`.
    pub subject: Option<String>,
    /// `importance`.
    pub importance: String,
    /// `conversation_id`.
    pub conversation: Option<ConversationId>,
    /// `thread_id`.
    pub thread_id: Option<String>,
    /// `send_after`.
    pub send_after: GivenTime,
    /// `expires_at`.
    pub expires_at: GivenTime,
}

/// What admission needs to know of the database.
pub trait Lookup {
    /// The account with this address, unless it was removed.
    fn account(&self, uri: &SipUri) -> Option<AccountId>;
    /// The conversation with this id, whoever's it is.
    fn conversation(&self, id: ConversationId) -> Option<NamedConversation>;
}

/// What is known of a conversation that a row names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedConversation {
    /// Whose it is.
    pub account: AccountId,
    /// The other party, if it is with one person alone.
    pub with: Option<SipUri>,
    /// Something can be said in it: it goes on in the account's session.
    pub open: bool,
}

/// A row that can be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// `account_id`.
    pub account: AccountId,
    /// `destination`: the recipient, several ones sorted and joined by `;`, or `conversation:ID`.
    pub destination: String,
    /// In the order given, each once.
    pub recipients: Vec<SipUri>,
    /// `text/plain` or `text/html`.
    pub content_type: &'static str,
    /// As UCWA spells it.
    pub importance: &'static str,
    /// Not to be sent before.
    pub send_after: Option<Timestamp>,
    /// Not to be sent at or after.
    pub expires_at: Option<Timestamp>,
}

/// A row that cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `last_code`.
    pub code: &'static str,
    /// `last_error`.
    pub sentence: String,
    /// It came too late (`expired`) and is not wrong (`failed`).
    pub expired: bool,
}

impl Refusal {
    fn because(code: &'static str, sentence: impl Into<String>) -> Self {
        Self { code, sentence: sentence.into(), expired: false }
    }

    /// `expires_at` has passed.
    pub fn expired(at: Timestamp) -> Self {
        Self { code: "Expired", sentence: format!("it was to be sent before {at:.3}"), expired: true }
    }
}

/// Decides about one row.
///
/// # Errors
/// The row can never be sent, or is too late; the refusal says why.
pub fn admit(
    row: &Submission,
    lookup: &impl Lookup,
    max_body_bytes: usize,
    now: Timestamp,
) -> Result<Admitted, Refusal> {
    let sender: SipUri = row
        .account
        .parse()
        .map_err(|invalid| Refusal::because("MalformedAccount", format!("account: {invalid}")))?;
    let account = lookup.account(&sender).ok_or_else(|| {
        Refusal::because(
            "UnknownAccount",
            format!("there is no account {sender}; `ucwa-relay account list` names those there are"),
        )
    })?;
    let recipients = recipients(row.recipients.as_deref().unwrap_or_default())?;
    if row.body.trim().is_empty() {
        return Err(Refusal::because("EmptyBody", "the body is empty"));
    }
    if row.body.len() > max_body_bytes {
        return Err(Refusal::because(
            "BodyTooLarge",
            format!("the body has {} bytes; {max_body_bytes} are allowed", row.body.len()),
        ));
    }
    let content_type = content_type(&row.content_type).ok_or_else(|| {
        Refusal::because(
            "UnknownContentType",
            format!("content_type {:?} is neither text/plain nor text/html", row.content_type),
        )
    })?;
    let importance = importance(&row.importance).ok_or_else(|| {
        Refusal::because(
            "UnknownImportance",
            format!("importance {:?} is none of Normal, Urgent, Emergency", row.importance),
        )
    })?;
    short_enough("subject", "SubjectTooLong", row.subject.as_deref())?;
    short_enough("thread_id", "ThreadIdTooLong", row.thread_id.as_deref())?;
    let send_after = time("send_after", &row.send_after)?;
    let expires_at = time("expires_at", &row.expires_at)?;
    if let Some(at) = expires_at.filter(|&at| at <= now) {
        return Err(Refusal::expired(at));
    }
    let destination = destination(row.conversation, account, &sender, &recipients, lookup)?;
    Ok(Admitted { account, destination, recipients, content_type, importance, send_after, expires_at })
}

/// Reads `recipients`: SIP addresses separated by `;`, in any case, with or without scheme; each once.
///
/// # Errors
/// One of them is not an address.
pub fn recipients(text: &str) -> Result<Vec<SipUri>, Refusal> {
    let mut known = BTreeSet::new();
    let mut recipients = Vec::new();
    for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
        let uri: SipUri = part
            .parse()
            .map_err(|invalid| Refusal::because("MalformedRecipient", format!("recipients: {invalid}")))?;
        if known.insert(uri.clone()) {
            recipients.push(uri);
        }
    }
    Ok(recipients)
}

/// `text/plain` or `text/html` in any case and with any parameters; both are always sent as UTF-8.
pub fn content_type(text: &str) -> Option<&'static str> {
    let kind = text.split(';').next().unwrap_or_default().trim();
    ["text/plain", "text/html"].into_iter().find(|known| known.eq_ignore_ascii_case(kind))
}

/// `Normal`, `Urgent` or `Emergency` in any case.
pub fn importance(text: &str) -> Option<&'static str> {
    IMPORTANCE.into_iter().find(|known| known.eq_ignore_ascii_case(text.trim()))
}

fn short_enough(column: &str, code: &'static str, text: Option<&str>) -> Result<(), Refusal> {
    let units = text.map_or(0, |text| text.encode_utf16().count());
    if units > MAX_UNITS {
        return Err(Refusal::because(
            code,
            format!("the {column} has {units} characters; the server takes {MAX_UNITS}"),
        ));
    }
    Ok(())
}

fn time(column: &str, given: &GivenTime) -> Result<Option<Timestamp>, Refusal> {
    match given {
        GivenTime::Absent => Ok(None),
        GivenTime::At(at) => Ok(Some(to_milliseconds(*at))),
        GivenTime::Unreadable(text) => Err(Refusal::because(
            "MalformedTime",
            format!("{column} {text:?} is not a time; write it like 2026-11-22T16:41:07Z"),
        )),
    }
}

fn destination(
    conversation: Option<ConversationId>,
    account: AccountId,
    sender: &SipUri,
    recipients: &[SipUri],
    lookup: &impl Lookup,
) -> Result<String, Refusal> {
    if let Some(id) = conversation {
        let Some(conversation) = lookup.conversation(id).filter(|known| known.account == account) else {
            return Err(Refusal::because(
                "UnknownConversation",
                format!("conversation_id {id} is no conversation of {sender}"),
            ));
        };
        return match conversation.with {
            // The same person reached by address must not overtake. For whom an open one is, its account knows best.
            Some(with) if conversation.open || recipients.is_empty() || recipients == [with.clone()] => {
                Ok(with.to_string())
            }
            Some(with) => {
                Err(Refusal::because(OTHER_RECIPIENTS, other_recipients(id, with.as_str(), recipients)))
            }
            // A group that is over is called together anew, if the row names its people: among the other rows for them.
            None if !conversation.open && !recipients.is_empty() => Ok(destination_key(recipients)),
            None => Ok(format!("conversation:{id}")),
        };
    }
    if recipients.is_empty() {
        return Err(Refusal::because(
            "NoRecipient",
            "there is no recipient: give recipients, or conversation_id to answer in a conversation",
        ));
    }
    Ok(destination_key(recipients))
}

/// What rows for the same people have in common: their addresses, sorted and joined by `;`.
pub fn destination_key(recipients: &[SipUri]) -> String {
    let sorted: BTreeSet<&str> = recipients.iter().map(SipUri::as_str).collect();
    sorted.into_iter().collect::<Vec<_>>().join(";")
}

/// Says that a row names a conversation with one person, and other people.
pub fn other_recipients(conversation: ConversationId, with: &str, recipients: &[SipUri]) -> String {
    let named = destination_key(recipients);
    format!("conversation {conversation} is with {with}, not with {named}: name only one of the two")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Contoso;

    impl Lookup for Contoso {
        fn account(&self, uri: &SipUri) -> Option<AccountId> {
            (uri.as_str() == "sip:alice@contoso.com").then_some(AccountId(1))
        }

        fn conversation(&self, id: ConversationId) -> Option<NamedConversation> {
            let with_bob = || Some("sip:bob@contoso.com".parse().unwrap());
            let (account, with, open) = match id.0 {
                7 => (1, with_bob(), true),
                8 => (1, None, true),
                9 => (2, None, true),
                17 => (1, with_bob(), false),
                18 => (1, None, false),
                _ => return None,
            };
            Some(NamedConversation { account: AccountId(account), with, open })
        }
    }

    fn row() -> Submission {
        Submission {
            account: "Alice@Contoso.com".to_owned(),
            recipients: Some("bob@contoso.com".to_owned()),
            body: "Deploy finished".to_owned(),
            content_type: "text/plain".to_owned(),
            importance: "Normal".to_owned(),
            ..Submission::default()
        }
    }

    fn now() -> Timestamp {
        "2026-11-22T10:00:00Z".parse().unwrap()
    }

    fn decide(row: &Submission) -> Result<Admitted, Refusal> {
        admit(row, &Contoso, 100, now())
    }

    #[test]
    fn recipients_may_be_written_in_many_ways_and_count_once() {
        let written = " BOB@contoso.com; sip:carol@contoso.com ;sip:Bob@Contoso.com;";
        let admitted = decide(&Submission { recipients: Some(written.to_owned()), ..row() }).unwrap();
        assert_eq!(admitted.account, AccountId(1));
        assert_eq!(admitted.destination, "sip:bob@contoso.com;sip:carol@contoso.com");
        assert_eq!(admitted.recipients.len(), 2);
        let turned = Submission { recipients: Some("carol@contoso.com;bob@contoso.com".to_owned()), ..row() };
        assert_eq!(decide(&turned).unwrap().destination, admitted.destination);
        assert_eq!(decide(&turned).unwrap().recipients[0].as_str(), "sip:carol@contoso.com");
    }

    #[test]
    fn a_conversation_is_a_destination_and_its_only_party_is_the_same_as_the_party() {
        let to = |conversation| Submission {
            recipients: None,
            conversation: Some(ConversationId(conversation)),
            ..row()
        };
        assert_eq!(decide(&to(7)).unwrap().destination, decide(&row()).unwrap().destination);
        assert_eq!(decide(&to(8)).unwrap().destination, "conversation:8");
        assert!(decide(&to(8)).unwrap().recipients.is_empty());
    }

    #[test]
    fn a_row_that_names_a_conversation_and_people_has_the_destination_at_which_it_arrives() {
        let to = |conversation, recipients: &str| {
            decide(&Submission {
                recipients: Some(recipients.to_owned()),
                conversation: Some(ConversationId(conversation)),
                ..row()
            })
        };
        for with_bob in [7, 17] {
            assert_eq!(to(with_bob, "Bob@contoso.com").unwrap().destination, "sip:bob@contoso.com");
        }
        for others in ["carol@contoso.com", "bob@contoso.com;carol@contoso.com"] {
            let refusal = to(17, others).unwrap_err();
            assert_eq!(refusal.code, "OtherRecipients");
            assert!(refusal.sentence.contains("sip:carol@contoso.com"), "{}", refusal.sentence);
        }
        let group = "carol@contoso.com;bob@contoso.com";
        assert_eq!(to(8, group).unwrap().destination, "conversation:8", "it is said in the open group");
        assert_eq!(to(18, group).unwrap().destination, "sip:bob@contoso.com;sip:carol@contoso.com");
        assert_eq!(to(18, "dan@contoso.com").unwrap().destination, "sip:dan@contoso.com");
        assert_eq!(to(18, "").unwrap().destination, "conversation:18", "it will be refused in its turn");
    }

    #[test]
    fn spelling_of_type_and_importance_does_not_matter() {
        let written = Submission {
            content_type: "Text/HTML; charset=utf-8".to_owned(),
            importance: "urgent".to_owned(),
            ..row()
        };
        let admitted = decide(&written).unwrap();
        assert_eq!((admitted.content_type, admitted.importance), ("text/html", "Urgent"));
    }

    #[test]
    fn what_can_never_be_sent_is_refused_with_words() {
        let cases: [(&str, Submission, &str); 13] = [
            ("MalformedAccount", Submission { account: "alice".into(), ..row() }, "no @"),
            ("UnknownAccount", Submission { account: "x@contoso.com".into(), ..row() }, "sip:x@contoso.com"),
            ("MalformedRecipient", Submission { recipients: Some("bob@x;bob".into()), ..row() }, "\"bob\""),
            ("NoRecipient", Submission { recipients: Some(" ; ".into()), ..row() }, "recipients"),
            ("EmptyBody", Submission { body: " \r\n".into(), ..row() }, "empty"),
            ("BodyTooLarge", Submission { body: "x".repeat(101), ..row() }, "101"),
            ("UnknownContentType", Submission { content_type: "text/rtf".into(), ..row() }, "text/rtf"),
            ("UnknownImportance", Submission { importance: "High".into(), ..row() }, "High"),
            ("SubjectTooLong", Submission { subject: Some("\u{1F600}".repeat(126)), ..row() }, "252"),
            ("ThreadIdTooLong", Submission { thread_id: Some("t".repeat(251)), ..row() }, "251"),
            ("UnknownConversation", Submission { conversation: Some(ConversationId(9)), ..row() }, "9"),
            (
                "MalformedTime",
                Submission { send_after: GivenTime::Unreadable("tomorrow".into()), ..row() },
                "tomorrow",
            ),
            ("Expired", Submission { expires_at: GivenTime::At(now()), ..row() }, "2026-11-22"),
        ];
        for (code, row, word) in cases {
            let refusal = decide(&row).unwrap_err();
            assert_eq!(refusal.code, code);
            assert!(refusal.sentence.contains(word), "{code}: {}", refusal.sentence);
            assert_eq!(refusal.expired, code == "Expired");
        }
    }

    #[test]
    fn limits_are_inclusive() {
        let row = Submission {
            body: "x".repeat(100),
            subject: Some("\u{1F600}".repeat(125)),
            thread_id: Some("t".repeat(250)),
            ..row()
        };
        assert!(decide(&row).is_ok());
    }
}
