//! Proving that the archive is as it was written (guarantee G11).
//!
//! [`chain`] checks the messages of one account as they stream by, wherever they come from; [`database`] feeds it from
//! the store, `export::verify` from an export. [`seal`] signs the heads of all chains, so that a later check
//! does not have to trust the database for them, and [`tombstone`] signs what a purge leaves. The canonical form is documented at [`crate::archive::chain`].

pub mod chain;
pub mod database;
pub mod seal;
pub mod tombstone;

use std::{collections::BTreeSet, fmt};

use serde::Serialize;

use crate::identifiers::MessageId;

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// SIP URI; empty where it concerns no account.
    pub account: String,
    /// Place in the chain.
    pub chain_seq: Option<i64>,
    /// The row.
    pub message_id: Option<MessageId>,
    /// Where it was read: file and line of an export.
    pub place: Option<String>,
    /// What differs, in words; never text of a message.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.account.is_empty() {
            parts.push(self.account.clone());
        }
        parts.extend(self.chain_seq.map(|seq| format!("chain_seq {seq}")));
        parts.extend(self.message_id.map(|id| format!("message {id}")));
        parts.extend(self.place.clone());
        write!(formatter, "{}: {}", parts.join(", "), self.what)
    }
}

/// What was found intact, account by account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckedChain {
    /// SIP URI.
    pub account: String,
    /// Messages looked at.
    pub messages: u64,
    /// Those of them whose content was purged, so that only their place in the chain can be proven.
    pub purged: u64,
    /// The public keys by which their tombstones are signed, in hexadecimal.
    pub tombstone_keys: BTreeSet<String>,
    /// Number of the last one.
    pub last_seq: i64,
    /// Whether a seal was compared.
    pub sealed_to: Option<i64>,
    /// How many differences were found.
    pub differences: u64,
}
