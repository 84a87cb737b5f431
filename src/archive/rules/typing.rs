//! Who typed when, if `archive.typing` asks for it (protocol 13).

use crate::archive::{Workspace, fact::TypingFact, row::TypingRow, workspace::Applying};

impl Workspace {
    pub(in crate::archive) fn apply_typing(&mut self, applying: &mut Applying, fact: &TypingFact) {
        // A row has no key from the server: a batch that comes again must not count again.
        if !self.settings.typing || applying.redelivered {
            return;
        }
        let conversation = self.mention_conversation(applying, &fact.conversation_href);
        let Some(participant) = self.mention_participant(applying, conversation, &fact.who) else {
            return;
        };
        let stay = self.participants.get(participant);
        self.typing.push(TypingRow {
            account: applying.account,
            conversation: stay.conversation,
            participant: stay.id,
            at: applying.at,
        });
    }
}
