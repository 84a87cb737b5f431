//! Payloads that were not understood are kept as they came (G8).

use sha2::{Digest, Sha256};

use crate::archive::{Workspace, fact::Quarantined, row::QuarantineRow, text::storable, workspace::Applying};

impl Workspace {
    /// `occurrence` counts equal payloads of one batch, so that each is kept once however often the batch comes.
    pub(in crate::archive) fn apply_quarantined(
        &mut self,
        applying: &Applying,
        fact: &Quarantined,
        cursor: Option<&str>,
        occurrence: i64,
    ) {
        self.quarantine.push(QuarantineRow {
            account: applying.account,
            session: Some(applying.session),
            received_at: applying.at,
            reason: storable(&fact.reason).into_owned(),
            payload: storable(&fact.payload).into_owned(),
            cursor: cursor.map(ToOwned::to_owned),
            payload_sha256: hex::encode(Sha256::digest(&fact.payload)),
            occurrence,
            sender: fact.sender.clone(),
        });
    }
}
