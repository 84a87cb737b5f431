//! `/conversations`, and `/conversations/{id}`: what people said to each other. Both are noted in `access_log`.

use std::collections::BTreeMap;

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use super::{
    AdminState, Asked, Badge, Number, PageError, Shell, When,
    accounts::account_link,
    address, cut, cut_front, html, limit, link,
    live::{self, Have, Live, Reason},
    markup::sanitised,
};
use crate::{
    admin::viewer::Viewer,
    archive::fact::Direction,
    identifiers::{ConversationId, MessageId, OutboxId, SipUri},
    store::{ConversationSummary, ConversationsFilter, ParticipantStay, TranscriptMessage, TranscriptPage},
};

/// Conversations of a page.
const PAGE: usize = 50;
/// Messages of a page.
const MESSAGES: usize = 100;
/// Messages before the one that is jumped to.
const BEFORE: usize = 15;
/// Stays of a conversation that are looked at.
const STAYS: i64 = 2000;
/// People named in a list.
const NAMED: usize = 4;
/// Messages of one person within this time stand together.
const TOGETHER: SignedDuration = SignedDuration::from_mins(5);

/// What is asked of the list.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct ListQuery {
    account: Option<String>,
    with: Option<String>,
    before: Option<i64>,
}

struct ConversationLine {
    id: ConversationId,
    account: String,
    people: Vec<String>,
    others: usize,
    subject: Option<String>,
    messages: i64,
    started: When,
    last: Option<When>,
    open: bool,
}

/// The address without its scheme.
fn short(uri: &str) -> &str {
    uri.split_once(':').map_or(uri, |(_, address)| address)
}

/// Everybody but the account.
fn others(summary: &ConversationSummary) -> Vec<String> {
    summary
        .participants
        .iter()
        .flat_map(|participants| participants.split(';'))
        .filter(|uri| *uri != summary.account)
        .map(|uri| short(uri).to_owned())
        .collect()
}

impl ConversationLine {
    fn new(summary: ConversationSummary) -> Self {
        let mut people = others(&summary);
        let rest = people.len().saturating_sub(NAMED);
        people.truncate(NAMED);
        Self {
            id: summary.conversation_id,
            account: short(&summary.account).to_owned(),
            people,
            others: rest,
            subject: summary.subject,
            messages: summary.message_count,
            started: When::new(summary.started_at),
            last: summary.last_message_at.map(When::new),
            open: summary.ended_at.is_none(),
        }
    }
}

#[derive(Template)]
#[template(path = "conversations.html")]
struct ConversationsPage {
    shell: Shell,
    account: String,
    with: String,
    conversations: Vec<ConversationLine>,
    newest: Option<String>,
    older: Option<String>,
    filtered: bool,
}

/// `GET /conversations`.
pub(in crate::admin) async fn list(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Asked(asked): Asked<ListQuery>,
) -> Result<Response, PageError> {
    let (account, with) = (address(asked.account)?, address(asked.with)?);
    let before = asked.before.map(ConversationId);
    let words = [with.as_ref().map(|with| format!("with={with}")), before.map(|id| format!("before={id}"))];
    let words = words.into_iter().flatten().collect::<Vec<_>>().join(" ");
    state.note(&viewer, "conversations", account.as_ref(), &words).await?;
    let filter =
        ConversationsFilter { account: account.clone(), with: with.clone(), before, limit: limit(PAGE) };
    let mut found = state.ask(state.store.conversations_page(&filter)).await?;
    let more = cut(&mut found, PAGE);
    let text = |uri: &Option<SipUri>| uri.as_ref().map(ToString::to_string);
    let here = |before: Option<ConversationId>| {
        let before = before.map(|id| id.to_string());
        link("/conversations", &[("account", text(&account)), ("with", text(&with)), ("before", before)])
    };
    let older = found.last().filter(|_| more).map(|last| here(Some(last.conversation_id)));
    html(&ConversationsPage {
        shell: Shell::new("Conversations", "/conversations", &viewer),
        older,
        newest: before.map(|_| here(None)),
        filtered: account.is_some() || with.is_some(),
        account: text(&account).unwrap_or_default(),
        with: text(&with).unwrap_or_default(),
        conversations: found.into_iter().map(ConversationLine::new).collect(),
    })
}

/// What is asked of a transcript: at most one of these.
#[derive(Debug, Default, Deserialize)]
pub(in crate::admin) struct TranscriptQuery {
    /// The messages before this one.
    before: Option<i64>,
    /// The messages after this one.
    after: Option<i64>,
    /// The messages around this one.
    at: Option<i64>,
}

impl TranscriptQuery {
    fn in_words(&self, id: ConversationId) -> String {
        let parts = [("before", self.before), ("after", self.after), ("at", self.at)];
        let parts = parts.into_iter().filter_map(|(name, id)| Some(format!(" {name}={}", id?)));
        format!("conversation={id}{}", parts.collect::<String>())
    }

    fn is_newest(&self) -> bool {
        self.before.is_none() && self.after.is_none() && self.at.is_none()
    }
}

/// What there is to read of a message.
enum Body {
    Text(String),
    /// Sanitised.
    Html(String),
    Purged,
}

/// A message as it is drawn.
struct Said {
    id: MessageId,
    outgoing: bool,
    /// Named only where somebody begins to speak.
    sender: Option<String>,
    body: Body,
    at: When,
    status: Option<Badge>,
    reason: Option<String>,
    from_log: bool,
    outbox: Option<OutboxId>,
    aimed_at: bool,
}

/// One line of a transcript.
enum Line {
    Day(String),
    Moved { words: String, at: When },
    Said(Box<Said>),
}

fn name(name: Option<&String>, uri: Option<&String>) -> String {
    name.filter(|name| !name.trim().is_empty())
        .cloned()
        .or_else(|| uri.map(|uri| short(uri).to_owned()))
        .unwrap_or_else(|| "somebody".to_owned())
}

/// Messages with those who came and went between them.
fn lines(
    messages: Vec<TranscriptMessage>,
    stays: &[ParticipantStay],
    (from, to): (Option<Timestamp>, Option<Timestamp>),
    aimed_at: Option<MessageId>,
) -> Vec<Line> {
    let mut moves: BTreeMap<Timestamp, Vec<String>> = BTreeMap::new();
    let within = |at: &Timestamp| from.is_none_or(|from| *at >= from) && to.is_none_or(|to| *at < to);
    for stay in stays {
        let who = name(stay.display_name.as_ref(), stay.sip_uri.as_ref());
        for (at, did) in [(stay.joined_at, "joined"), (stay.left_at, "left")] {
            if let Some(at) = at.filter(within) {
                moves.entry(at).or_default().push(format!("{who} {did}"));
            }
        }
    }
    let mut lines = Vec::new();
    let mut day = String::new();
    let mut speaker: Option<(String, Timestamp)> = None;
    let mut moves = moves.into_iter().peekable();
    let mut begin_day = |lines: &mut Vec<Line>, at: &When| {
        if day != at.day {
            day.clone_from(&at.day);
            lines.push(Line::Day(at.day.clone()));
            return true;
        }
        false
    };
    for message in messages {
        while let Some((at, all)) = moves.next_if(|(at, _)| *at <= message.sent_at) {
            begin_day(&mut lines, &When::new(at));
            lines.extend(all.into_iter().map(|words| Line::Moved { words, at: When::new(at) }));
            speaker = None;
        }
        let at = When::new(message.sent_at);
        if begin_day(&mut lines, &at) {
            speaker = None;
        }
        let who = name(message.sender_name.as_ref(), message.sender.as_ref());
        let goes_on = speaker
            .take()
            .is_some_and(|(before, since)| before == who && message.sent_at.duration_since(since) < TOGETHER);
        speaker = Some((who.clone(), message.sent_at));
        let status = match message.status.as_str() {
            "failed" => Some(Badge { word: "failed".to_owned(), sign: "▲", tone: "bad" }),
            "pending" => Some(Badge { word: "pending".to_owned(), sign: "◔", tone: "busy" }),
            _ => None,
        };
        lines.push(Line::Said(Box::new(Said {
            id: message.message_id,
            outgoing: message.direction == Direction::Outgoing,
            sender: (!goes_on).then_some(who),
            body: match (message.purged_at, message.body_html) {
                (Some(_), _) => Body::Purged,
                (None, Some(html)) => Body::Html(sanitised(&html)),
                (None, None) => Body::Text(message.body),
            },
            at,
            status,
            reason: message.reason,
            from_log: message.source == "conversation_log",
            outbox: message.outbox_id,
            aimed_at: aimed_at == Some(message.message_id),
        })));
    }
    for (at, all) in moves {
        begin_day(&mut lines, &When::new(at));
        lines.extend(all.into_iter().map(|words| Line::Moved { words, at: When::new(at) }));
    }
    lines
}

#[derive(Template)]
#[template(path = "transcript_live.html")]
struct Transcript {
    open: bool,
    ended: Option<When>,
    messages: i64,
    lines: Vec<Line>,
    older: Option<String>,
    newer: Option<String>,
}

/// Everything of a page of a transcript.
async fn transcript(
    state: &AdminState,
    summary: &ConversationSummary,
    asked: &TranscriptQuery,
) -> Result<Transcript, PageError> {
    let (id, store) = (summary.conversation_id, &state.store);
    let read = async |page, count| state.ask(store.transcript(id, page, limit(count))).await;
    let (mut messages, has_older, has_newer);
    if let Some(at) = asked.at.map(MessageId) {
        messages = read(TranscriptPage::Before(at), BEFORE).await?;
        has_older = cut_front(&mut messages, BEFORE);
        let mut rest = read(TranscriptPage::From(at), MESSAGES - BEFORE).await?;
        if rest.is_empty() {
            return Err(PageError::NotFound("This conversation has no such message.".to_owned()));
        }
        has_newer = cut(&mut rest, MESSAGES - BEFORE);
        messages.append(&mut rest);
    } else if let Some(after) = asked.after.map(MessageId) {
        messages = read(TranscriptPage::After(after), MESSAGES).await?;
        has_newer = cut(&mut messages, MESSAGES);
        has_older = true;
    } else {
        let page = match asked.before {
            Some(before) => TranscriptPage::Before(MessageId(before)),
            None => TranscriptPage::Newest,
        };
        messages = read(page, MESSAGES).await?;
        has_older = cut_front(&mut messages, MESSAGES);
        has_newer = asked.before.is_some();
    }
    let stays = state.ask(store.stays(id, STAYS)).await?;
    let (first, last) = (
        messages.first().map(|m| (m.message_id, m.sent_at)),
        messages.last().map(|m| (m.message_id, m.sent_at)),
    );
    let path = format!("/conversations/{id}");
    let neighbour = |name: &'static str, message: Option<(MessageId, Timestamp)>, there: bool| {
        message.filter(|_| there).map(|(id, _)| link(&path, &[(name, Some(id.to_string()))]))
    };
    let window =
        (first.filter(|_| has_older).map(|(_, at)| at), last.filter(|_| has_newer).map(|(_, at)| at));
    Ok(Transcript {
        open: summary.ended_at.is_none(),
        ended: summary.ended_at.map(When::new),
        messages: summary.message_count,
        older: neighbour("before", first, has_older),
        newer: neighbour("after", last, has_newer),
        lines: lines(messages, &stays, window, asked.at.map(MessageId)),
    })
}

#[derive(Template)]
#[template(path = "transcript.html")]
struct TranscriptPageView {
    shell: Shell,
    heading: String,
    account: String,
    account_link: String,
    people: Vec<String>,
    subject: Option<String>,
    started: When,
    multiparty: bool,
    continued_in: Option<ConversationId>,
    answer: String,
    /// Only the newest page goes on.
    live: Option<Live>,
    html: String,
}

async fn summary(state: &AdminState, id: i64) -> Result<ConversationSummary, PageError> {
    state
        .ask(state.store.conversation_summary(ConversationId(id)))
        .await?
        .ok_or_else(|| PageError::NotFound("There is no such conversation.".to_owned()))
}

/// `GET /conversations/{id}`.
pub(in crate::admin) async fn detail(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Number(id): Number,
    Asked(asked): Asked<TranscriptQuery>,
) -> Result<Response, PageError> {
    let summary = summary(&state, id).await?;
    let account = summary.account.parse().ok();
    let words = asked.in_words(summary.conversation_id);
    state.note(&viewer, "conversation", account.as_ref(), &words).await?;
    let html_part = transcript(&state, &summary, &asked).await?.render()?;
    let people = others(&summary);
    let heading = match people.as_slice() {
        [] => "Conversation".to_owned(),
        [one] => one.clone(),
        [one, rest @ ..] => format!("{one} and {} more", rest.len()),
    };
    let live =
        asked.is_newest().then(|| Live::new(html_part.clone(), &format!("/conversations/{id}/live"), &[]));
    html(&TranscriptPageView {
        shell: Shell::new(format!("Conversation with {heading}"), "/conversations", &viewer),
        heading,
        account: short(&summary.account).to_owned(),
        account_link: account_link(&summary.account),
        subject: summary.subject.clone().filter(|subject| !subject.trim().is_empty()),
        started: When::new(summary.started_at),
        multiparty: summary.multiparty,
        continued_in: summary.continued_in,
        answer: link(
            "/outbox/new",
            &[
                ("account", Some(summary.account.clone())),
                ("to", (!people.is_empty()).then(|| people.join("; "))),
            ],
        ),
        people,
        live,
        html: html_part,
    })
}

/// `GET /conversations/{id}/live`.
pub(in crate::admin) async fn follow(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Number(id): Number,
    Asked(have): Asked<Have>,
) -> Result<Response, PageError> {
    live::follow(&state.clone(), &viewer.clone(), have, move |reason| {
        let (state, viewer) = (state.clone(), viewer.clone());
        async move {
            let summary = summary(&state, id).await?;
            let asked = TranscriptQuery::default();
            if reason == Reason::Send {
                let words = format!("{} live", asked.in_words(summary.conversation_id));
                state.note(&viewer, "conversation", summary.account.parse().ok().as_ref(), &words).await?;
            }
            Ok(transcript(&state, &summary, &asked).await?.render()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minute: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minute)
    }

    fn message(id: i64, minute: i64, sender: &str) -> TranscriptMessage {
        TranscriptMessage {
            message_id: MessageId(id),
            direction: Direction::Incoming,
            sender: Some(format!("sip:{sender}@contoso.com")),
            sender_name: Some(sender.to_owned()),
            body: "text".to_owned(),
            body_html: None,
            sent_at: at(minute),
            status: "delivered".to_owned(),
            reason: None,
            source: "event".to_owned(),
            outbox_id: None,
            purged_at: None,
        }
    }

    fn stay(name: &str, joined: i64, left: Option<i64>) -> ParticipantStay {
        ParticipantStay {
            sip_uri: None,
            display_name: Some(name.to_owned()),
            is_local: false,
            joined_at: Some(at(joined)),
            left_at: left.map(at),
        }
    }

    fn drawn(lines: Vec<Line>) -> Vec<String> {
        lines
            .into_iter()
            .map(|line| match line {
                Line::Day(day) => day,
                Line::Moved { words, .. } => words,
                Line::Said(said) => format!("{}#{}", said.sender.unwrap_or_default(), said.id),
            })
            .collect()
    }

    #[test]
    fn who_comes_and_goes_stands_between_the_messages() {
        let messages = vec![
            message(1, 10, "ann"),
            message(2, 11, "ann"),
            message(3, 13, "ann"),
            message(4, 60, "ann"),
            message(5, 1500, "bob"),
        ];
        let stays = [stay("bob", 12, Some(70)), stay("ann", 5, None)];
        assert_eq!(
            drawn(lines(messages, &stays, (None, None), None)),
            [
                "1970-01-01",
                "ann joined",
                "ann#1",
                "#2",
                "bob joined",
                "ann#3",
                "ann#4",
                "bob left",
                "1970-01-02",
                "bob#5"
            ]
        );
    }

    #[test]
    fn a_page_in_the_middle_has_only_the_moves_of_its_time() {
        let stays = [stay("bob", 5, Some(70)), stay("ann", 15, None)];
        let page = vec![message(1, 10, "ann"), message(2, 20, "ann")];
        assert_eq!(
            drawn(lines(page, &stays, (Some(at(10)), Some(at(20))), None)),
            ["1970-01-01", "ann#1", "ann joined", "ann#2"]
        );
    }
}
