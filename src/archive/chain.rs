//! The hash chain that makes the archive tamper-evident (guarantee G11).
//!
//! Every message gets, once it is settled, the next number of its account's chain (`chain_seq`, from 1) and two
//! SHA-256 digests in lower-case hexadecimal:
//!
//! - `content_hash` over what never changes about a message, in this canonical form: the fields below, in this order,
//!   each written as `-;` if it is NULL, else as its length in UTF-8 bytes, a colon, the text itself and a semicolon
//!   (`5:hello;`). The length makes it impossible to move text from one field into the next.
//! - `chain_hash` over the previous message's `chain_hash` (64 zeros before the first one), a line feed, `chain_seq`
//!   in decimal, a line feed and `content_hash`.
//!
//! | # | field | as |
//! | --- | --- | --- |
//! | 1 | version | the text `ucwa-relay/1` |
//! | 2 | account | `accounts.sip_uri` |
//! | 3 | `conversation_id` | decimal |
//! | 4 | `direction` | |
//! | 5 | `sender_uri` | |
//! | 6 | `sender_name` | |
//! | 7 | `content_type` | |
//! | 8 | `body` | |
//! | 9 | `body_html` | |
//! | 10 | `sent_at` | `2026-11-22T16:41:07.123Z`: UTC, milliseconds, `Z` |
//! | 11 | `operation_id` | |
//! | 12 | `outbox_id` | decimal |
//! | 13 | `correlation` | |
//!
//! What may still change afterwards is not hashed: delivery status and its reason, the server's href, the source and
//! `purged_at`. The head of each chain is kept in `chain_heads`, in the same transaction as the message, so that the
//! newest messages cannot be removed unnoticed either. A purge empties the texts, keeps the digests and signs what is left
//! ([`crate::evidence::tombstone`]).
//!
//! A message is settled as soon as the fields above are known: see [`crate::archive::row::Awaiting`].

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::{archive::fact::Direction, identifiers::ConversationId, identifiers::OutboxId};

/// `chain_hash` before an account's first message.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// First field of the canonical form.
const VERSION: &str = "ucwa-relay/1";

/// The fields of a message that never change once it is chained.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    /// SIP URI of the account.
    pub account: &'a str,
    /// `conversation_id`.
    pub conversation: ConversationId,
    /// `direction`.
    pub direction: Direction,
    /// `sender_uri`.
    pub sender_uri: Option<&'a str>,
    /// `sender_name`.
    pub sender_name: Option<&'a str>,
    /// `content_type`.
    pub content_type: &'a str,
    /// `body`.
    pub body: &'a str,
    /// `body_html`.
    pub body_html: Option<&'a str>,
    /// `sent_at`.
    pub sent_at: Timestamp,
    /// `operation_id`.
    pub operation_id: Option<&'a str>,
    /// `outbox_id`.
    pub outbox: Option<OutboxId>,
    /// `correlation`.
    pub correlation: Option<&'a str>,
}

impl Content<'_> {
    /// The canonical form that `content_hash` digests.
    pub fn canonical(&self) -> String {
        canonical([
            Some(self.account),
            Some(&self.conversation.to_string()),
            Some(self.direction.as_str()),
            self.sender_uri,
            self.sender_name,
            Some(self.content_type),
            Some(self.body),
            self.body_html,
            Some(&format!("{:.3}", self.sent_at)),
            self.operation_id,
            self.outbox.map(|id| id.to_string()).as_deref(),
            self.correlation,
        ])
    }

    /// `content_hash`.
    pub fn hash(&self) -> String {
        digest(&self.canonical())
    }
}

/// The canonical form of fields 2 to 13 of the table above.
pub fn canonical(fields: [Option<&str>; 12]) -> String {
    canonical_as(VERSION, fields)
}

/// A canonical form of any fields behind the name of what they are.
pub(crate) fn canonical_as<const N: usize>(version: &str, fields: [Option<&str>; N]) -> String {
    let length: usize = fields.iter().flatten().map(|text| text.len() + 8).sum();
    let mut canonical = String::with_capacity(length + 32);
    for field in std::iter::once(Some(version)).chain(fields) {
        match field {
            None => canonical.push_str("-;"),
            Some(text) => {
                canonical.push_str(&text.len().to_string());
                canonical.push(':');
                canonical.push_str(text);
                canonical.push(';');
            }
        }
    }
    canonical
}

/// SHA-256 in lower-case hexadecimal.
pub fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

/// `chain_hash` of the message with number `seq` and `content_hash`, after `previous`.
pub fn link(previous: &str, seq: i64, content_hash: &str) -> String {
    digest(&format!("{previous}\n{seq}\n{content_hash}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Content<'static> {
        Content {
            account: "sip:alice@contoso.com",
            conversation: ConversationId(7),
            direction: Direction::Incoming,
            sender_uri: Some("sip:bob@contoso.com"),
            sender_name: None,
            content_type: "text/plain",
            body: "grüße",
            body_html: None,
            sent_at: "2026-11-22T16:41:07.5Z".parse().unwrap(),
            operation_id: None,
            outbox: None,
            correlation: None,
        }
    }

    /// The worked example of the documentation; the digests were computed with `sha256sum`.
    #[test]
    fn the_worked_example() {
        let content = example();
        assert_eq!(
            content.canonical(),
            "12:ucwa-relay/1;21:sip:alice@contoso.com;1:7;8:incoming;19:sip:bob@contoso.com;-;10:text/plain;\
             7:grüße;-;24:2026-11-22T16:41:07.500Z;-;-;-;"
        );
        assert_eq!(content.hash(), "66aff89d36e6e5efd678a94337e7207d230473799efa6899409dc4ecb640f95b");
        assert_eq!(
            link(GENESIS, 1, &content.hash()),
            "e2bcf75199cc8a517423982f6490bab114497e44f764a565579d4f65cf301b72"
        );
    }

    #[test]
    fn text_cannot_move_between_fields() {
        let whole = Content { body: "a", body_html: Some("b"), ..example() };
        let moved = Content { body: "ab", body_html: Some(""), ..example() };
        let absent = Content { body: "ab", body_html: None, ..example() };
        assert_ne!(whole.hash(), moved.hash());
        assert_ne!(moved.hash(), absent.hash());
    }
}
