//! Scripted correspondents: everybody who is not an account. The start of the local part decides what one does.
//!
//! | address begins with | behaviour |
//! | --- | --- |
//! | `declines` | refuses every call: `Declined` |
//! | `busy` | refuses every call: `Busy` |
//! | `dnd` | refuses every call: `DoNotDisturb` |
//! | `absent` | lets it ring: `Timeout` after the ring time |
//! | `unreachable` | refuses every call: `Unreachable` |
//! | `unknown` | the call fails later: `DestinationNotFound` |
//! | `missing`, `nobody` | does not exist: the request is answered 404 `DestinationNotFound` |
//! | `derives` | answers each call in a conversation of its own: `DerivedConversation`, with links to it |
//! | `deaf` | accepts, and no message reaches it: each fails and names it as `failedDeliveryParticipant` |
//! | `leaves` | accepts, and leaves after the first message |
//! | `pauses` | accepts, and closes messaging after the first message; the conversation goes on |
//! | `html` | accepts, and answers each message in HTML |
//! | `echo` | accepts, and says each message back |
//! | `silent` | accepts, and never says anything |
//! | anything else | accepts, and answers some messages (`answer_share`) |

use std::{sync::Arc, time::Duration};

use super::{
    application::address_of,
    conversation::{self, Conversation, DECLINED, Text},
    payload::Reason,
    server::Server,
    traffic,
};

/// What a correspondent does with a call.
pub(crate) enum PickUp {
    Accept,
    Refuse(Reason),
    LetItRing,
    Derive,
}

/// How a correspondent behaves; see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Script {
    Ordinary,
    Declines,
    Busy,
    DoNotDisturb,
    Absent,
    Unreachable,
    Unknown,
    Derives,
    Deaf,
    Leaves,
    Pauses,
    Html,
    Echo,
    Silent,
    /// Another device of an account. No address begins with it.
    Device,
}

const PREFIXES: [(&str, Script); 13] = [
    ("declines", Script::Declines),
    ("busy", Script::Busy),
    ("dnd", Script::DoNotDisturb),
    ("absent", Script::Absent),
    ("unreachable", Script::Unreachable),
    ("unknown", Script::Unknown),
    ("derives", Script::Derives),
    ("deaf", Script::Deaf),
    ("leaves", Script::Leaves),
    ("pauses", Script::Pauses),
    ("html", Script::Html),
    ("echo", Script::Echo),
    ("silent", Script::Silent),
];

const FIRST_NAMES: [&str; 12] =
    ["lene", "tosh", "sara", "adriana", "johan", "mika", "nadia", "oleg", "priya", "ruth", "samir", "yael"];
const LAST_NAMES: [&str; 12] = [
    "aaling", "barry", "costa", "davis", "eklund", "fischer", "giorgi", "haddad", "ito", "jensen", "kovacs",
    "levi",
];

/// Addresses of correspondents that a search finds and the traffic uses.
pub(crate) fn directory(domain: &str) -> Vec<String> {
    let people = FIRST_NAMES.iter().flat_map(|first| LAST_NAMES.iter().map(move |last| (first, last)));
    people.map(|(first, last)| format!("sip:{first}.{last}@{domain}")).collect()
}

fn local_part(uri: &str) -> String {
    address_of(uri).split('@').next().unwrap_or_default().to_lowercase()
}

/// Whether nobody has this address.
pub(crate) fn is_missing(uri: &str) -> bool {
    let local = local_part(uri);
    local.starts_with("missing") || local.starts_with("nobody")
}

impl Script {
    pub(crate) fn of(uri: &str) -> Self {
        let local = local_part(uri);
        let known = PREFIXES.into_iter().find(|(prefix, _)| local.starts_with(prefix));
        known.map_or(Self::Ordinary, |(_, script)| script)
    }

    pub(crate) fn pick_up(self) -> PickUp {
        let refuse = |subcode, message| PickUp::Refuse(Reason { code: "RemoteFailure", subcode, message });
        match self {
            Self::Declines => PickUp::Refuse(DECLINED),
            Self::Busy => refuse("Busy", "The person is busy."),
            Self::DoNotDisturb => refuse("DoNotDisturb", "The person does not want to be disturbed."),
            Self::Unreachable => refuse("Unreachable", "The person cannot be reached."),
            Self::Unknown => refuse("DestinationNotFound", "There is no such person."),
            Self::Absent => PickUp::LetItRing,
            Self::Derives => PickUp::Derive,
            _ => PickUp::Accept,
        }
    }

    /// Whether messages reach it.
    pub(crate) fn hears(self) -> bool {
        self != Self::Deaf
    }

    pub(crate) fn reads_html(self) -> bool {
        self != Self::Silent
    }
}

/// A correspondent has been told `text`; whatever it does about it, it does later. Takes no lock.
pub(crate) fn react(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    seat: usize,
    script: Script,
    text: &Text,
) {
    let (least, most) = server.settings.answer_delay;
    let delay = server.dice.between(least, most);
    let this = Arc::clone(conversation);
    let answer = match script {
        Script::Leaves => {
            server.timers.after_scripted(delay, move |server| conversation::depart(server, &this, seat));
            return;
        }
        Script::Pauses => {
            server.timers.after_scripted(delay, move |server| {
                conversation::close_messaging(server, &this);
            });
            return;
        }
        Script::Echo => text.clone(),
        Script::Html => traffic::html_text(server),
        Script::Ordinary if server.dice.chance(server.settings.answer_share) => traffic::any_text(server),
        _ => return,
    };
    if script == Script::Ordinary && server.dice.chance(0.2) {
        let typing = Arc::clone(conversation);
        server.timers.after_scripted(delay / 2, move |_| conversation::show_typing(&typing, seat, true));
        let typing = Arc::clone(conversation);
        let end = delay.saturating_sub(Duration::from_millis(1));
        server.timers.after_scripted(end, move |_| conversation::show_typing(&typing, seat, false));
    }
    // An echo keeps its order whatever the dice say: all of them take the same time.
    let delay = if script == Script::Echo { least } else { delay };
    server.timers.after_scripted(delay, move |server| {
        conversation::say(server, &this, seat, &answer);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_of_the_address_decides() {
        assert_eq!(Script::of("sip:declines.always@contoso.com"), Script::Declines);
        assert_eq!(Script::of("sip:ECHO7@contoso.com"), Script::Echo);
        assert_eq!(Script::of("sip:lene@contoso.com"), Script::Ordinary);
        assert!(is_missing("sip:nobody@contoso.com"));
        assert!(!is_missing("sip:lene@nobody.com"));
        let directory = directory("contoso.com");
        assert!(directory.iter().all(|uri| Script::of(uri) == Script::Ordinary && !is_missing(uri)));
    }
}
