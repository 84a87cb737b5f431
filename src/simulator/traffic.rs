//! Lively traffic for the demo and the benchmark: correspondents call accounts, write, leave and call again.
//!
//! One task serves all accounts. It picks an account that takes messages, and either writes in a conversation that
//! it has open there, ends it, or starts a new one. Each text to an account counts as one message of the rate.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, time::Instant};

use super::{
    conversation::{self, CANCELED, Conversation, ConversationPhase, TIMEOUT, Text},
    correspondent,
    server::Server,
};

/// How lively the traffic is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrafficSettings {
    /// Messages that correspondents write to accounts, in all, per second.
    pub messages_per_second: f64,
    /// Conversations that the traffic keeps open with one account at most.
    pub conversations_per_account: usize,
    /// Messages of one conversation before its correspondent leaves, on average.
    pub messages_per_conversation: usize,
    /// Share of calls that the caller withdraws while it rings.
    pub withdrawn_share: f64,
}

impl Default for TrafficSettings {
    fn default() -> Self {
        Self {
            messages_per_second: 5.0,
            conversations_per_account: 3,
            messages_per_conversation: 8,
            withdrawn_share: 0.01,
        }
    }
}

/// The traffic of one simulator, running or not.
pub(crate) struct Traffic {
    settings: Mutex<TrafficSettings>,
    running: AtomicBool,
    changed: Notify,
    written: AtomicU64,
}

impl Traffic {
    pub(crate) fn new(settings: Option<&TrafficSettings>) -> Self {
        Self {
            settings: Mutex::new(settings.cloned().unwrap_or_default()),
            running: AtomicBool::new(settings.is_some()),
            changed: Notify::new(),
            written: AtomicU64::new(0),
        }
    }

    fn settings(&self) -> TrafficSettings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn start(&self, settings: Option<TrafficSettings>) {
        if let Some(settings) = settings {
            *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
        }
        self.running.store(true, SeqCst);
        self.changed.notify_one();
    }

    pub(crate) fn set_rate(&self, messages_per_second: f64) {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).messages_per_second =
            messages_per_second;
        self.changed.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.running.store(false, SeqCst);
        self.changed.notify_one();
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(SeqCst)
    }

    /// Messages written by the traffic so far.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(SeqCst)
    }

    /// Makes traffic until the task is dropped.
    pub(crate) async fn run(server: Arc<Server>) {
        let mut open: HashMap<usize, Vec<OpenConversation>> = HashMap::new();
        let mut due = Instant::now();
        loop {
            let traffic = &server.traffic;
            let settings = traffic.settings();
            if !traffic.is_running() || settings.messages_per_second <= 0.0 {
                traffic.changed.notified().await;
                due = Instant::now();
                continue;
            }
            let pause = Duration::from_secs_f64((1.0 / settings.messages_per_second).min(60.0));
            let now = Instant::now();
            if due > now {
                tokio::select! {
                    () = tokio::time::sleep_until(due) => {}
                    () = traffic.changed.notified() => continue,
                }
            } else if now.duration_since(due) > Duration::from_secs(1) {
                // Behind by too much to catch up: a busy machine gets less, not a burst.
                due = now;
            }
            due += pause;
            if step(&server, &settings, &mut open) {
                traffic.written.fetch_add(1, SeqCst);
            }
            tokio::task::consume_budget().await;
        }
    }
}

/// A conversation that the traffic has with an account.
struct OpenConversation {
    conversation: Arc<Conversation>,
    remaining: usize,
}

/// Writes one message somewhere. False if no account takes any.
fn step(
    server: &Arc<Server>,
    settings: &TrafficSettings,
    open: &mut HashMap<usize, Vec<OpenConversation>>,
) -> bool {
    for _ in 0..16 {
        let index = server.dice.below(server.account_list.len());
        let Some(account) = server.account_list.get(index) else { return false };
        if account.reachable().is_none() {
            continue;
        }
        let conversations = open.entry(index).or_default();
        conversations.retain(|open| open.conversation.phase() != ConversationPhase::Ended);
        let connected: Vec<usize> = (0..conversations.len())
            .filter(|which| conversations[*which].conversation.phase() == ConversationPhase::Connected)
            .collect();
        let may_call = conversations.len() < settings.conversations_per_account.max(1);
        if !connected.is_empty() && (!may_call || server.dice.chance(0.85)) {
            let which = connected[server.dice.below(connected.len())];
            if conversations[which].remaining == 0 {
                let ended = conversations.swap_remove(which);
                conversation::depart(server, &ended.conversation, 0);
                continue;
            }
            conversations[which].remaining -= 1;
            let said = conversation::say(server, &conversations[which].conversation, 0, &any_text(server));
            if said.is_some_and(|said| !said.serials.is_empty()) {
                return true;
            }
        } else if may_call {
            let people = correspondent::directory(&server.settings.domain);
            let caller = &people[server.dice.below(people.len())];
            let subject = if server.dice.chance(0.3) { "Status & plans <draft>" } else { "" };
            let text = any_text(server);
            let call =
                conversation::call_from_script(server, caller, &account.uri, Some(text), subject, false);
            let Some(conversation) = call else { continue };
            if server.dice.chance(settings.withdrawn_share) {
                let this = Arc::clone(&conversation);
                server.timers.after_scripted(Duration::from_millis(20), move |server| {
                    conversation::fail(server, &this, 1, TIMEOUT, CANCELED);
                });
            }
            let average = settings.messages_per_conversation.max(1);
            let remaining = server.dice.below(2 * average);
            conversations.push(OpenConversation { conversation, remaining });
            return true;
        }
    }
    false
}

const PLAIN: [&str; 16] = [
    "Are you there?",
    "The build is green again.",
    "100% sure? 1+1=2 & 2+2=4",
    "C:\\temp\\a;b,c \"quoted\" <tag> 'x' #1",
    "Können wir um 15:30 über die Größe sprechen?",
    "\u{1f600}\u{1f44d}\u{1f3fd} \u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467}",
    "\u{5e9}\u{5dc}\u{5d5}\u{5dd}, \u{5de}\u{5d4} \u{5e9}\u{5dc}\u{5d5}\u{5de}\u{5da}?",
    "\u{645}\u{631}\u{62d}\u{628}\u{627} (tomorrow)",
    "e\u{301}te\u{301} cafe\u{301} \u{1112}\u{1161}\u{11ab}",
    "\u{65e5}\u{672c}\u{8a9e}\u{306e}\u{30c6}\u{30b9}\u{30c8}",
    "https://intranet.contoso.com/a?b=c&d=%20e+f",
    "first line\r\nsecond line\r\n\r\nfourth line",
    "a,b,,c; data:text/plain,nested",
    "  spaces around  ",
    "%2b is not + and %% is %",
    "&amp; stays &amp;",
];

const HTML: [&str; 4] = [
    "<span style=\"margin-bottom:0pt;font-size:10pt;line-height:normal;\">Hello!</span>",
    "<div>one</div><div>two &amp; three</div>",
    "<span>see <a href=\"https://intranet.contoso.com/?a=1&amp;b=2\">the plan</a> + <b>more</b></span>",
    "<div dir=\"rtl\">\u{5e9}\u{5dc}\u{5d5}\u{5dd} \u{1f600}</div>",
];

/// A text that is unlike the others, so that nobody can take two messages for one.
pub(crate) fn any_text(server: &Server) -> Text {
    if server.dice.chance(0.15) {
        return html_text(server);
    }
    let mut plain = format!("{} [{:08x}]", PLAIN[server.dice.below(PLAIN.len())], server.dice.number() >> 32);
    if server.dice.chance(0.03) {
        plain = plain.repeat(1 + 2000 / plain.len());
    }
    if server.dice.chance(0.5) {
        plain.push_str("\r\n");
    }
    Text { plain: Some(plain), ..Text::default() }
}

/// A text in HTML; sometimes the plain text comes along.
pub(crate) fn html_text(server: &Server) -> Text {
    let body = HTML[server.dice.below(HTML.len())];
    let html = format!("{body}<i>[{:08x}]</i>", server.dice.number() >> 32);
    Text { html: Some(html), ..Text::default() }
}
