//! The check of one account's chain, message by message, in the memory of a few digests.

use std::collections::BTreeSet;

use super::{CheckedChain, Difference, tombstone};
use crate::{
    archive::chain::{GENESIS, link},
    identifiers::MessageId,
    store::{ChainedMessage, Head},
};

/// Broken links that are looked at together, to tell what was moved from what stands after it.
const LOOKED_AT_TOGETHER: usize = 32;

/// Whether numbers may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completeness {
    /// All messages of the account.
    Whole,
    /// What a filter left of them.
    Part,
}

/// Checks the messages of one account in the order of their chain.
#[derive(Debug)]
pub struct ChainCheck {
    account: String,
    completeness: Completeness,
    sealed: Option<Head>,
    /// Whose tombstones are believed; empty: anybody's.
    trusted: BTreeSet<String>,
    last: Option<Last>,
    broken: Vec<Broken>,
    differences: Vec<Difference>,
    checked: CheckedChain,
}

/// The message before.
#[derive(Debug)]
struct Last {
    seq: i64,
    message: Option<MessageId>,
    /// What the next message's hash may follow from: the digest in the row, and the one it should have.
    hashes: Vec<String>,
    stored: String,
}

/// A message whose hash does not follow from the one before.
#[derive(Debug)]
struct Broken {
    message: MessageId,
    seq: i64,
    place: Option<String>,
    before: Vec<String>,
    content_hash: String,
    chain_hash: String,
    previous: Option<MessageId>,
}

impl ChainCheck {
    /// For one account; `sealed` is its head in a seal.
    pub fn new(account: &str, completeness: Completeness, sealed: Option<Head>) -> Self {
        let checked = CheckedChain {
            account: account.to_owned(),
            messages: 0,
            purged: 0,
            tombstone_keys: BTreeSet::new(),
            last_seq: 0,
            sealed_to: sealed.as_ref().map(|head| head.seq),
            differences: 0,
        };
        Self {
            account: account.to_owned(),
            completeness,
            sealed,
            trusted: BTreeSet::new(),
            last: None,
            broken: Vec::new(),
            differences: Vec::new(),
            checked,
        }
    }

    /// Believes only tombstones that one of these public keys signed; without any, those of every key, which the report
    /// names.
    #[must_use]
    pub fn trusting(mut self, keys: &BTreeSet<String>) -> Self {
        self.trusted.clone_from(keys);
        self
    }

    /// What is amiss with a message that calls itself purged.
    fn purged(&mut self, message: &ChainedMessage) -> Option<String> {
        self.checked.purged += 1;
        match tombstone::check(message) {
            Err(problem) => Some(problem.to_string()),
            Ok(key) => {
                let is_trusted = self.trusted.is_empty() || self.trusted.contains(&key);
                let problem = (!is_trusted).then(|| {
                    format!("its tombstone was signed by the key {key}, which is not the known one")
                });
                self.checked.tombstone_keys.insert(key);
                problem
            }
        }
    }

    /// Looks at the next message. `place` is where it was read.
    pub fn message(&mut self, message: &ChainedMessage, place: Option<&str>) {
        self.checked.messages += 1;
        let seq = message.chain_seq;
        let differ = |what: String| Difference {
            account: message.account.clone(),
            chain_seq: Some(seq),
            message_id: Some(message.message_id),
            place: place.map(ToOwned::to_owned),
            what,
        };
        if message.account != self.account {
            self.differences.push(differ(format!("it is among the messages of {}", self.account)));
        }
        let (last_seq, previous) = self.last.as_ref().map_or((0, None), |last| (last.seq, last.message));
        if seq <= last_seq {
            self.differences
                .push(differ(format!("it stands after number {last_seq} of the chain: repeated or moved")));
            return;
        }
        let follows = seq == last_seq + 1;
        if !follows && self.completeness == Completeness::Whole {
            self.missing(last_seq + 1, seq - 1);
        }
        self.checked.last_seq = seq;

        let stored = message.content_hash.clone().unwrap_or_default();
        let chain_hash = message.chain_hash.clone().unwrap_or_default();
        // A purge empties the texts, keeps the digests and signs them.
        let computed = if message.purged_at.is_some() {
            let problem = self.purged(message);
            self.differences.extend(problem.map(differ));
            stored.clone()
        } else {
            if message.tombstone.is_some() {
                self.differences.push(differ(
                    "it has a tombstone and is not purged: purged_at was emptied, or its text was put back"
                        .to_owned(),
                ));
            }
            message.computed_hash()
        };
        let before = match &self.last {
            _ if !follows => Vec::new(),
            None => vec![GENESIS.to_owned()],
            Some(last) => last.hashes.clone(),
        };
        let fits = |content: &str| before.iter().any(|before| link(before, seq, content) == chain_hash);
        // Where the message before is not here, nothing can be said about the link.
        let (fits_stored, fits_computed) =
            if before.is_empty() { (true, false) } else { (fits(&stored), fits(&computed)) };
        if computed != stored {
            self.differences.push(differ(if fits_computed {
                "content_hash was changed; the content is as it was chained".to_owned()
            } else {
                "its content no longer fits content_hash: one of conversation_id, direction, sender_uri, sender_name, \
                 content_type, body, body_html, sent_at, operation_id, outbox_id, correlation or the account's address \
                 was changed"
                    .to_owned()
            }));
        }
        if !fits_stored && !fits_computed {
            self.broken.push(Broken {
                message: message.message_id,
                seq,
                place: place.map(ToOwned::to_owned),
                before: before.clone(),
                content_hash: stored.clone(),
                chain_hash: chain_hash.clone(),
                previous,
            });
            if self.broken.len() >= LOOKED_AT_TOGETHER {
                self.explain_broken();
            }
        }
        if let Some(sealed) = &self.sealed
            && sealed.seq == seq
            && sealed.hash != chain_hash
        {
            self.differences.push(differ(
                "the seal has another chain_hash here: this message or one before it was changed since"
                    .to_owned(),
            ));
        }
        let mut hashes = vec![chain_hash.clone()];
        hashes.extend(before.iter().map(|before| link(before, seq, &stored)));
        hashes.truncate(3);
        self.last = Some(Last { seq, message: Some(message.message_id), hashes, stored: chain_hash });
    }

    /// Compares the end of the chain with where `noted_in` has it; `None` if there is no such note.
    pub fn end_at(&mut self, head: Option<&Head>, noted_in: &str) {
        let (seq, stored) = self.last.as_ref().map_or((0, GENESIS), |last| (last.seq, last.stored.as_str()));
        let message_id = self.last.as_ref().and_then(|last| last.message);
        let differ = |what: String| Difference {
            account: self.account.clone(),
            chain_seq: Some(seq),
            message_id,
            place: None,
            what,
        };
        match head {
            None if seq > 0 => self.differences.push(differ(format!("its head is missing in {noted_in}"))),
            None => (),
            Some(head) if head.seq > seq => self.missing(seq + 1, head.seq),
            Some(head) if head.seq < seq => self.differences.push(differ(format!(
                "{noted_in} ends at number {}: messages were inserted behind it, or {noted_in} was changed",
                head.seq
            ))),
            Some(head) if head.hash != stored => self.differences.push(differ(format!(
                "{noted_in} has another hash than the newest message: one of the two was changed"
            ))),
            Some(_) => (),
        }
    }

    /// What is amiss so far; the caller takes it now and then, so that it does not pile up.
    pub fn take_differences(&mut self) -> Vec<Difference> {
        self.checked.differences += self.differences.len() as u64;
        std::mem::take(&mut self.differences)
    }

    /// Ends the check: the rest of what is amiss, and the account's line for the report.
    pub fn finish(mut self) -> (Vec<Difference>, CheckedChain) {
        self.explain_broken();
        let last_seq = self.last.as_ref().map_or(0, |last| last.seq);
        if let Some(sealed) = &self.sealed
            && sealed.seq > last_seq
            && self.completeness == Completeness::Whole
        {
            self.differences.push(Difference {
                account: self.account.clone(),
                chain_seq: Some(sealed.seq),
                message_id: None,
                place: None,
                what: format!("the seal goes up to here, but the chain ends at number {last_seq}"),
            });
        }
        let rest = self.take_differences();
        (rest, self.checked)
    }

    fn missing(&mut self, from: i64, to: i64) {
        let what = if from == to {
            "the message is missing: it was removed".to_owned()
        } else {
            format!("the messages {from} to {to} are missing: they were removed")
        };
        self.differences.push(Difference {
            account: self.account.clone(),
            chain_seq: Some(from),
            message_id: None,
            place: None,
            what,
        });
    }

    /// Tells of each broken link whether its message was moved, and spares those that only follow a moved one.
    fn explain_broken(&mut self) {
        let broken = std::mem::take(&mut self.broken);
        let before: Vec<&str> = broken
            .iter()
            .flat_map(|one| one.before.iter().chain([&one.chain_hash]))
            .map(String::as_str)
            .collect();
        // Where a message belongs, if it is one of the places in question.
        let home = |one: &Broken| {
            broken.iter().map(|place| place.seq).find(|&seq| {
                before.iter().any(|before| link(before, seq, &one.content_hash) == one.chain_hash)
            })
        };
        let homes: Vec<Option<i64>> = broken.iter().map(home).collect();
        for (one, home) in broken.iter().zip(homes) {
            let what = match home {
                // It stands where it was chained, behind a message that was moved away.
                Some(seq) if seq == one.seq => continue,
                Some(seq) => format!("it was moved: it was chained as number {seq}"),
                None => format!(
                    "chain_hash does not follow from {}: this message or that one was replaced together with its \
                     content_hash, or one was inserted, removed or moved here",
                    one.previous.map_or_else(|| "the beginning".to_owned(), |id| format!("message {id}")),
                ),
            };
            self.differences.push(Difference {
                account: self.account.clone(),
                chain_seq: Some(one.seq),
                message_id: Some(one.message),
                place: one.place.clone(),
                what,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;
    use crate::identifiers::ConversationId;

    type Change = fn(&mut Vec<ChainedMessage>);

    const ACCOUNT: &str = "sip:alice@contoso.com";

    fn chain(count: i64) -> Vec<ChainedMessage> {
        let mut before = GENESIS.to_owned();
        (1..=count)
            .map(|seq| {
                let mut message = ChainedMessage {
                    message_id: MessageId(seq + 100),
                    chain_seq: seq,
                    account: ACCOUNT.into(),
                    conversation_id: ConversationId(1),
                    direction: "incoming".into(),
                    sender_uri: Some("sip:bob@contoso.com".into()),
                    sender_name: None,
                    content_type: "text/plain".into(),
                    body: format!("text {seq}"),
                    body_html: None,
                    sent_at: "2026-03-01T12:00:05.000Z".into(),
                    operation_id: None,
                    outbox_id: None,
                    correlation: None,
                    content_hash: None,
                    chain_hash: None,
                    purged_at: None,
                    tombstone: None,
                };
                let content = message.computed_hash();
                before = link(&before, seq, &content);
                message.content_hash = Some(content);
                message.chain_hash = Some(before.clone());
                message
            })
            .collect()
    }

    fn head(chain: &[ChainedMessage]) -> Head {
        let last = chain.last().unwrap();
        Head { seq: last.chain_seq, hash: last.chain_hash.clone().unwrap() }
    }

    /// What is told of each message: its id, and words.
    fn told(messages: &[ChainedMessage], head: &Head, sealed: Option<Head>) -> Vec<(i64, String)> {
        let mut check = ChainCheck::new(ACCOUNT, Completeness::Whole, sealed);
        let mut messages = messages.to_vec();
        messages.sort_by_key(|message| message.chain_seq);
        for message in &messages {
            check.message(message, None);
        }
        check.end_at(Some(head), "chain_heads");
        let (differences, checked) = check.finish();
        assert_eq!(checked.differences, differences.len() as u64);
        differences
            .into_iter()
            .map(|difference| (difference.chain_seq.unwrap_or_default(), difference.what))
            .collect()
    }

    #[track_caller]
    fn assert_told(messages: &[ChainedMessage], head: &Head, expected: &[(i64, &str)]) {
        let told = told(messages, head, None);
        assert_eq!(told.len(), expected.len(), "{told:#?}");
        for ((seq, what), (expected_seq, words)) in told.iter().zip(expected) {
            assert_eq!(seq, expected_seq, "{told:#?}");
            assert!(what.contains(words), "{words}: {told:#?}");
        }
    }

    #[test]
    fn an_untouched_chain_is_intact() {
        let chain = chain(5);
        assert_told(&chain, &head(&chain), &[]);
        assert_told(&[], &Head { seq: 0, hash: GENESIS.into() }, &[]);
    }

    #[test]
    fn each_change_names_its_message_and_no_other() {
        let intact = chain(6);
        let head = head(&intact);
        let cases: [(Change, &[(i64, &str)]); 13] = [
            (|chain| chain[2].body.push('!'), &[(3, "content no longer fits")]),
            (|chain| chain[2].sender_uri = None, &[(3, "content no longer fits")]),
            (|chain| chain[2].sent_at = "2026-03-01T12:00:05Z".into(), &[(3, "content no longer fits")]),
            (|chain| chain[2].content_hash = Some("0".into()), &[(3, "content_hash was changed")]),
            (|chain| chain[2].chain_hash = Some("0".into()), &[(3, "does not follow")]),
            (
                |chain| {
                    chain[2].body.push('!');
                    chain[2].content_hash = Some(chain[2].computed_hash());
                },
                &[(3, "does not follow")],
            ),
            (
                |chain| {
                    chain[2].body.push('!');
                    let content = chain[2].computed_hash();
                    chain[2].chain_hash = Some(link(chain[1].chain_hash.as_ref().unwrap(), 3, &content));
                    chain[2].content_hash = Some(content);
                },
                &[(4, "message 103")],
            ),
            (|chain| drop(chain.remove(2)), &[(3, "the message is missing")]),
            (|chain| chain.truncate(3), &[(4, "4 to 6 are missing")]),
            (
                |chain| {
                    chain[1].chain_seq = 3;
                    chain[2].chain_seq = 2;
                },
                &[(2, "chained as number 3"), (3, "chained as number 2")],
            ),
            (
                |chain| {
                    chain[1].chain_seq = 5;
                    chain[4].chain_seq = 2;
                },
                &[(2, "chained as number 5"), (5, "chained as number 2")],
            ),
            (
                |chain| {
                    let mut forged = chain[5].clone();
                    forged.chain_seq = 7;
                    forged.message_id = MessageId(999);
                    forged.chain_hash =
                        Some(link(chain[5].chain_hash.as_ref().unwrap(), 7, &forged.computed_hash()));
                    chain.push(forged);
                },
                &[(7, "chain_heads ends at number 6")],
            ),
            (
                |chain| chain[2].purged_at = Some("2026-03-02T00:00:00.000Z".into()),
                &[(3, "yet there is text")],
            ),
        ];
        for (change, expected) in cases {
            let mut changed = intact.clone();
            change(&mut changed);
            assert_told(&changed, &head, expected);
        }
    }

    const PURGED_AT: &str = "2026-03-02T00:00:00.000Z";

    fn purge(message: &mut ChainedMessage, key: &SigningKey) {
        message.body.clear();
        message.tombstone = Some(tombstone::sign(key, message, PURGED_AT.parse().unwrap()));
        message.purged_at = Some(PURGED_AT.into());
    }

    #[test]
    fn a_purged_message_keeps_its_place() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let mut chain = chain(3);
        let head = head(&chain);
        purge(&mut chain[1], &key);
        assert_told(&chain, &head, &[]);

        for trusted in [tombstone::public_key(&key), tombstone::public_key(&SigningKey::from_bytes(&[8; 32]))]
        {
            let keys = BTreeSet::from([trusted.clone()]);
            let mut check = ChainCheck::new(ACCOUNT, Completeness::Whole, None).trusting(&keys);
            for message in &chain {
                check.message(message, None);
            }
            let (differences, checked) = check.finish();
            assert_eq!(differences.is_empty(), trusted == tombstone::public_key(&key), "{differences:?}");
            assert_eq!((checked.purged, checked.tombstone_keys.len()), (1, 1));
        }
    }

    #[test]
    fn a_tombstone_is_good_only_for_what_was_purged() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let mut chain = chain(4);
        let head = head(&chain);
        purge(&mut chain[1], &key);
        let cases: [(Change, &str); 9] = [
            (|chain| chain[1].tombstone = None, "erased by hand"),
            (|chain| chain[1].tombstone = Some("00".into()), "malformed"),
            (|chain| chain[1].sender_uri = Some("sip:eve@contoso.com".into()), "does not fit"),
            (|chain| chain[1].sent_at = "2026-03-01T12:00:06.000Z".into(), "does not fit"),
            (|chain| chain[1].purged_at = Some("2026-03-03T00:00:00.000Z".into()), "does not fit"),
            (|chain| chain[1].sender_name = Some("Eve".into()), "yet there is text"),
            (|chain| chain[1].correlation = Some(String::new()), "yet there is text"),
            (|chain| chain[1].purged_at = None, "has a tombstone and is not purged"),
            (
                |chain| chain[1].tombstone = chain[1].tombstone.as_ref().map(|text| text.replace(':', "")),
                "malformed",
            ),
        ];
        for (change, words) in cases {
            let mut changed = chain.clone();
            change(&mut changed);
            let told = told(&changed, &head, None);
            assert!(told.iter().any(|(seq, what)| *seq == 2 && what.contains(words)), "{words}: {told:?}");
            assert!(told.iter().all(|(seq, _)| *seq == 2), "{told:?}");
        }
        // That of another message.
        chain[2].body.clear();
        chain[2].purged_at = chain[1].purged_at.clone();
        chain[2].tombstone = chain[1].tombstone.clone();
        assert_told(&chain, &head, &[(3, "does not fit")]);
    }

    #[test]
    fn an_edited_head_is_noticed() {
        let chain = chain(3);
        assert_told(
            &chain,
            &Head { hash: "0".into(), ..head(&chain) },
            &[(3, "chain_heads has another hash")],
        );
        assert_told(&chain, &Head { seq: 2, ..head(&chain) }, &[(3, "chain_heads ends at number 2")]);
    }

    #[test]
    fn a_chain_that_was_written_anew_does_not_fit_its_seal() {
        let sealed = head(&chain(3));
        let anew = |count: i64, changed: i64| {
            let mut before = GENESIS.to_owned();
            let mut chain = chain(count);
            for message in &mut chain {
                if message.chain_seq == changed {
                    message.body.push('!');
                }
                let content = message.computed_hash();
                before = link(&before, message.chain_seq, &content);
                message.content_hash = Some(content);
                message.chain_hash = Some(before.clone());
            }
            chain
        };
        for (chain, expected) in [
            (anew(5, 2), Some("another chain_hash")),
            (anew(2, 9), Some("the chain ends at number 2")),
            (anew(5, 4), None),
        ] {
            let told = told(&chain, &head(&chain), Some(sealed.clone()));
            assert_eq!(told.len(), usize::from(expected.is_some()), "{told:?}");
            assert!(expected.is_none_or(|words| told[0].0 == 3 && told[0].1.contains(words)), "{told:?}");
        }
    }
}
