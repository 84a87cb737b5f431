//! HTML: files that a browser opens without a network, conversation by conversation.

use std::{fmt::Write, path::Path};

use super::{
    OutFile, eml, file_name_of,
    journal::Position,
    run::{Finished, Layout},
    transcript::{self, escaped},
};
use crate::{
    identifiers::ConversationId,
    store::{ArchivedMessage, ConversationDetails},
};

/// A file ends with the conversation in which it comes to this many messages...
const ENOUGH: u64 = 2000;
/// ...or in the middle of one that goes on for ever.
const AT_MOST: u64 = 10_000;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}\
h2{border-top:1px solid #ccc;padding-top:1rem}h3{font-size:1rem;color:#555}ul{color:#555;font-size:.9rem}\
.m{margin:.4rem 0;padding:.3rem .6rem;border-left:3px solid #8aa;overflow-wrap:anywhere}.outgoing{border-color:#5a7}\
.m time{color:#777;font-size:.85rem;margin-right:.5rem}.failed{border-color:#c33}.failed em{color:#c33}";

/// Pages of one account.
pub(super) struct Pages {
    account: String,
    query: String,
    file: Option<OutFile>,
    /// Conversation and day of the last message, and where to go on after it.
    last: Option<(ConversationId, String, Position)>,
}

impl Pages {
    pub(super) fn new(account: &str, query: &str) -> Self {
        Self { account: account.to_owned(), query: query.to_owned(), file: None, last: None }
    }

    fn begin(&self, folder: &Path) -> anyhow::Result<OutFile> {
        let mut file = OutFile::create(folder)?;
        let asked = if self.query.is_empty() {
            String::new()
        } else {
            format!("<p>Only what fits: <code>{}</code></p>\n", escaped(&self.query))
        };
        let account = escaped(&self.account);
        file.write(
            format!(
                "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
                 <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
                 <meta name=\"referrer\" content=\"no-referrer\">\n\
                 <title>Messages of {account}</title>\n<style>{STYLE}</style></head><body>\n\
                 <h1>Messages of {account}</h1>\n{asked}<p>Times are UTC.</p>\n"
            )
            .as_bytes(),
        )?;
        Ok(file)
    }
}

fn heading(message: &ArchivedMessage, conversation: Option<&ConversationDetails>) -> String {
    let subject = conversation.and_then(|conversation| conversation.subject.as_deref()).unwrap_or_default();
    let mut heading =
        format!("<h2>Conversation {} {}</h2>\n<ul>\n", message.message.conversation_id, escaped(subject));
    if let Some(conversation) = conversation {
        let importance = conversation.importance.as_deref().unwrap_or("Normal");
        let ended = conversation.ended_at.as_deref().map(|at| format!(", ended {at}")).unwrap_or_default();
        let _infallible = writeln!(
            heading,
            "<li>started {}{}, importance {}</li>",
            escaped(&conversation.started_at),
            escaped(&ended),
            escaped(importance)
        );
        for stay in transcript::stays(conversation) {
            let _infallible = writeln!(heading, "<li>{}</li>", escaped(&stay));
        }
    }
    heading + "</ul>\n"
}

fn entry(message: &ArchivedMessage) -> String {
    let failure = transcript::failure(message);
    let direction = if message.message.direction == "outgoing" { "outgoing" } else { "incoming" };
    format!(
        "<div class=\"m {direction}{}\"><time>{}</time><b>{}</b><div>{}</div>{}</div>\n",
        if failure.is_some() { " failed" } else { "" },
        escaped(message.message.sent_at.get(11..).unwrap_or(&message.message.sent_at)),
        escaped(&transcript::sender(message)),
        transcript::html(message),
        failure.map(|failure| format!("<em>{}</em>", escaped(&failure))).unwrap_or_default(),
    )
}

impl Layout for Pages {
    fn message(
        &mut self,
        folder: &Path,
        message: ArchivedMessage,
        conversation: Option<&ConversationDetails>,
    ) -> anyhow::Result<Option<Finished>> {
        let id = message.message.conversation_id;
        let written = self.file.as_ref().map_or(0, |file| file.span.messages);
        let is_other = self.last.as_ref().is_none_or(|(last, ..)| *last != id);
        let finished =
            if written >= AT_MOST || (written >= ENOUGH && is_other) { self.finish(folder)? } else { None };
        let day = eml::day(&message).to_owned();
        let mut piece = String::new();
        let begins = self.file.is_none() || is_other;
        if begins {
            piece.push_str(&heading(&message, conversation));
        }
        if begins || self.last.as_ref().is_none_or(|(_, last, _)| *last != day) {
            let _infallible = writeln!(piece, "<h3>{}</h3>", escaped(&day));
        }
        piece.push_str(&entry(&message));
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.begin(folder)?,
        };
        file.write(piece.as_bytes())?;
        file.span.add(&message.message);
        self.file = Some(file);
        let position = Position::Conversation(id, message.sent_at_key.clone(), message.message.message_id);
        self.last = Some((id, day, position));
        Ok(finished)
    }

    fn finish(&mut self, folder: &Path) -> anyhow::Result<Option<Finished>> {
        let (Some(mut file), Some((conversation, _, position))) = (self.file.take(), self.last.clone())
        else {
            return Ok(None);
        };
        file.write(b"</body></html>\n")?;
        let account = file_name_of(&self.account);
        // The smallest number in it is in no other file.
        let name = format!("{account}/{account}_m{:010}_c{conversation}.html", file.span.first_seq());
        Ok(Some((file.finish(folder, name, &self.account)?, position)))
    }
}
