//! Section `relay`: how accounts behave once they are signed in, and how fast they sign in.

use std::{num::NonZeroU32, time::Duration};

use serde::Deserialize;

use super::{
    error::Findings,
    values::{self, check_range},
};
use crate::store::InvitationPolicy;

/// Section `relay`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RelaySection {
    /// Sign-ins under way at the same time.
    pub accounts_online_at_once: NonZeroU32,
    /// Sign-ins begun in a second.
    pub sign_in_rate: NonZeroU32,
    /// What to do with incoming invitations, unless the account says otherwise.
    pub invitations: InvitationPolicy,
    /// Availability published at sign-in.
    pub presence: Presence,
    /// Conversations in which nothing was said for so long are ended.
    #[serde(deserialize_with = "values::duration")]
    pub idle_conversation: Duration,
    /// Language in which the server words its messages (`culture` of the application).
    pub culture: String,
}

/// UCWA `signInAs` of `makeMeAvailable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Presence {
    /// Available.
    Online,
    /// Busy.
    Busy,
    /// Do not disturb: the server turns invitations away.
    DoNotDisturb,
    /// Be right back.
    BeRightBack,
    /// Away.
    Away,
    /// Off work.
    Offwork,
}

impl Presence {
    /// As UCWA spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "Online",
            Self::Busy => "Busy",
            Self::DoNotDisturb => "DoNotDisturb",
            Self::BeRightBack => "BeRightBack",
            Self::Away => "Away",
            Self::Offwork => "Offwork",
        }
    }
}

impl Default for RelaySection {
    fn default() -> Self {
        Self {
            accounts_online_at_once: NonZeroU32::new(20).expect("20 is not 0"),
            sign_in_rate: NonZeroU32::new(10).expect("10 is not 0"),
            invitations: InvitationPolicy::Accept,
            presence: Presence::Online,
            idle_conversation: Duration::from_mins(30),
            culture: "en-US".into(),
        }
    }
}

impl RelaySection {
    pub(super) fn validate(&self, findings: &mut Findings) {
        check_range(
            findings,
            "relay.idle_conversation",
            self.idle_conversation,
            Duration::from_secs(1)..=Duration::from_hours(168),
            "1s and 168h",
        );
        let mut parts = self.culture.split('-');
        let language = parts.next().is_some_and(|part| {
            (2..=3).contains(&part.len()) && part.chars().all(|c| c.is_ascii_alphabetic())
        });
        let rest = parts
            .all(|part| (2..=8).contains(&part.len()) && part.chars().all(|c| c.is_ascii_alphanumeric()));
        findings.check(language && rest, "relay.culture", "is not a language tag; write it like \"en-US\"");
    }
}
