//! Tombstones: what stands in the place of a message whose text was removed by its age.
//!
//! A purge empties the text and leaves what proves the message's place: without the text nobody can compute
//! `content_hash` any more, so whoever can write the database could erase a text by hand and call it purged. That is why
//! a purge signs (Ed25519, RFC 8032) what it leaves, with the key of [seals](super::seal). Signed is the digest's canonical
//! form (see [`crate::archive::chain`]) of these fields:
//!
//! | # | field |
//! | --- | --- |
//! | 1 | the text `ucwa-relay-tombstone/1` |
//! | 2 | account |
//! | 3 | `conversation_id` |
//! | 4 | `direction` |
//! | 5 | `sender_uri` |
//! | 6 | `content_type` |
//! | 7 | `sent_at` |
//! | 8 | `operation_id` |
//! | 9 | `outbox_id` |
//! | 10 | `chain_seq` |
//! | 11 | `content_hash` |
//! | 12 | `chain_hash` |
//! | 13 | `purged_at`, as `sent_at` |
//!
//! `messages.tombstone` holds the public key and the signature, both in hexadecimal, divided by a colon.

use anyhow::{Context, ensure};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use jiff::Timestamp;

use super::seal::bytes;
use crate::{
    archive::{chain::canonical_as, text::iso_milliseconds},
    store::ChainedMessage,
};

/// First field of what is signed.
const VERSION: &str = "ucwa-relay-tombstone/1";

fn signed_text(message: &ChainedMessage, purged_at: &str) -> String {
    canonical_as(
        VERSION,
        [
            Some(message.account.as_str()),
            Some(&message.conversation_id.to_string()),
            Some(&message.direction),
            message.sender_uri.as_deref(),
            Some(&message.content_type),
            Some(&message.sent_at),
            message.operation_id.as_deref(),
            message.outbox_id.map(|id| id.to_string()).as_deref(),
            Some(&message.chain_seq.to_string()),
            message.content_hash.as_deref(),
            message.chain_hash.as_deref(),
            Some(purged_at),
        ],
    )
}

/// The public half of a key, as it stands in tombstones and seals.
pub fn public_key(key: &SigningKey) -> String {
    hex::encode(key.verifying_key().as_bytes())
}

/// What a purge leaves in `messages.tombstone`.
pub fn sign(key: &SigningKey, message: &ChainedMessage, purged_at: Timestamp) -> String {
    let signature = key.sign(signed_text(message, &iso_milliseconds(purged_at)).as_bytes());
    format!("{}:{}", public_key(key), hex::encode(signature.to_bytes()))
}

/// Whether a purged message is what a purge left; gives the key that signed.
///
/// # Errors
/// In words: there is text, or no tombstone, or the signature is of something else.
pub fn check(message: &ChainedMessage) -> anyhow::Result<String> {
    let purged_at = message.purged_at.as_deref().context("purged_at is not set")?;
    let is_empty = message.body.is_empty()
        && message.body_html.is_none()
        && message.sender_name.is_none()
        && message.correlation.is_none();
    ensure!(is_empty, "purged_at is set, yet there is text");
    let tombstone = message.tombstone.as_deref().context(
        "purged_at is set, but no tombstone is there: the text was erased by hand and not by a purge",
    )?;
    let (key, signature) = tombstone.split_once(':').context("its tombstone is malformed")?;
    let public: [u8; 32] = bytes(key).context("the key of its tombstone is malformed")?;
    let public = VerifyingKey::from_bytes(&public).context("the key of its tombstone is no key")?;
    let signature: [u8; 64] = bytes(signature).context("the signature of its tombstone is malformed")?;
    public
        .verify_strict(signed_text(message, purged_at).as_bytes(), &Signature::from_bytes(&signature))
        .ok()
        .context(
            "the signature of its tombstone does not fit: this message was changed after it was purged, or \
             it was never purged",
        )?;
    Ok(key.to_ascii_lowercase())
}
