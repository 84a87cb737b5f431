//! What was removed by its age stays removed, whatever is told of it again: an event that comes twice, a name that comes
//! late, a log that is read once more.

use std::collections::HashSet;

use crate::{archive::Workspace, identifiers::ConversationId};

impl Workspace {
    /// Takes texts and names back that facts have put on purged rows. A purged conversation in which a message is archived
    /// after all is kept again, with its names, as long as that message.
    pub(in crate::archive) fn keep_purged(&mut self) {
        for place in self.messages.places() {
            if self.messages.get(place).is_purged {
                let row = self.messages.get_mut(place);
                row.body.clear();
                row.body_html = None;
                row.sender_name = None;
                row.correlation = None;
                row.reason = None;
            }
        }
        let mut purged: HashSet<ConversationId> = HashSet::new();
        for place in self.conversations.places() {
            let row = self.conversations.get(place);
            if row.purged_at.is_none() {
                continue;
            }
            let id = row.id;
            let has_text = self.messages.of_conversation(id).into_iter().any(|message| {
                let message = self.messages.get(message);
                !message.is_purged
            });
            let row = self.conversations.get_mut(place);
            if has_text {
                row.purged_at = None;
            } else {
                row.subject = None;
                purged.insert(id);
            }
        }
        if purged.is_empty() {
            return;
        }
        for place in self.participants.places() {
            if purged.contains(&self.participants.get(place).conversation) {
                self.participants.get_mut(place).display_name = None;
            }
        }
        for place in self.invitations.places() {
            if self.invitations.get(place).conversation.is_some_and(|id| purged.contains(&id)) {
                let row = self.invitations.get_mut(place);
                row.subject = None;
                row.from_name = None;
                row.reason = None;
            }
        }
    }
}
