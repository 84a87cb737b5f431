//! Which failures of a send heal by waiting, and how long to wait.
//!
//! Source: UCWA reference, `ErrorSubcode`; the reasons with which an invitation completes.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::archive::fact::FailureReason;

/// Delays between attempts of one outbox row (`outbox.retry_base`, `outbox.retry_max`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Longest delay before the second attempt.
    pub base: Duration,
    /// Longest delay at all.
    pub cap: Duration,
}

impl RetryPolicy {
    /// When the attempt after number `attempt` (from 1) may begin. `jitter` in 0..=1 spreads it over the second half of
    /// the exponential step.
    pub fn next_attempt(&self, now: Timestamp, attempt: i64, jitter: f64) -> Timestamp {
        let doublings = u32::try_from(attempt.saturating_sub(1)).unwrap_or(0).min(20);
        let step = self.base.saturating_mul(2_u32.saturating_pow(doublings)).min(self.cap);
        let delay = step.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
        now.saturating_add(SignedDuration::try_from(delay).unwrap_or(SignedDuration::MAX))
            .unwrap_or(Timestamp::MAX)
    }
}

/// Whether a UCWA subcode says that the account has more conversations than the server allows.
pub fn is_for_want_of_room(subcode: Option<&str>) -> bool {
    matches!(subcode, Some("TooManyConversations" | "LimitExceeded"))
}

/// What a failed invitation means for the row that caused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Healing {
    /// The recipient was not there or something was broken: try again later.
    Temporary,
    /// Trying again would not help, or would be rude: the recipient refused, or it can never work.
    Permanent,
}

/// Classifies the reason of an invitation's failure.
///
/// Who declines, is busy or does not want to be disturbed has answered: a program must not insist. Where the recipient
/// reacted on another device or the call was replaced, the text may have been seen; it is not sent twice.
pub fn classify_invitation_failure(reason: &FailureReason) -> Healing {
    let subcode = reason.subcode.as_deref().unwrap_or("None");
    match subcode {
        "Timeout"
        | "Missed"
        | "Unavailable"
        | "TemporarilyUnavailable"
        | "Unreachable"
        | "ServiceFailure"
        | "TooManyConversations"
        | "LimitExceeded"
        | "CallbackChannelError"
        // The next attempt finds the open conversation.
        | "ThreadIdAlreadyExists"
        | "ServiceTimeout"
        | "Expired" => Healing::Temporary,
        "None" => match reason.code.as_deref() {
            Some("ServiceFailure" | "Timeout" | "ServiceTimeout") => Healing::Temporary,
            _ => Healing::Permanent,
        },
        _ => Healing::Permanent,
    }
}

/// A sentence for `last_error` that says what the server's words mean.
pub fn describe_invitation_failure(reason: &FailureReason) -> String {
    let meaning = match reason.subcode.as_deref().unwrap_or("None") {
        "Declined" => "the recipient declined the conversation",
        "Busy" => "the recipient is busy",
        "DoNotDisturb" => "the recipient does not want to be disturbed",
        "NotAcceptable" => "the recipient's client does not take this kind of message",
        "Timeout" | "Missed" | "Expired" => "the recipient did not answer in time",
        "Unavailable" | "TemporarilyUnavailable" => "the recipient is not available",
        "Unreachable" => "the recipient can't be reached",
        "DestinationNotFound" => "there is no such recipient",
        "NotAllowed" => "the server's policy does not allow this conversation",
        "FederationRequired" => "the recipient's domain is not federated with this server",
        "ConnectedElsewhere" => "the recipient answered on another device",
        "Canceled" => "the invitation was withdrawn",
        "DerivedConversation" => "the recipient went on in another conversation",
        "ThreadIdAlreadyExists" => "a conversation with this thread is open already",
        "ServiceFailure" => "the server failed",
        "TooManyConversations" | "LimitExceeded" => "the account has too many conversations",
        _ => "the invitation failed",
    };
    match (&reason.code, &reason.subcode, &reason.message) {
        (_, _, Some(message)) if !message.trim().is_empty() => {
            format!("{meaning}; the server says: {}", message.trim())
        }
        (code, subcode, _) => format!(
            "{meaning} ({} / {})",
            code.as_deref().unwrap_or("no code"),
            subcode.as_deref().unwrap_or("no subcode")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_from_the_base_to_the_cap() {
        let policy = RetryPolicy { base: Duration::from_secs(30), cap: Duration::from_secs(100) };
        let now = Timestamp::UNIX_EPOCH;
        let seconds = |attempt, jitter| policy.next_attempt(now, attempt, jitter).as_second();
        assert_eq!([seconds(1, 1.0), seconds(2, 1.0), seconds(3, 1.0), seconds(60, 1.0)], [30, 60, 100, 100]);
        assert_eq!(seconds(1, 0.0), 15);
    }

    #[test]
    fn only_what_waiting_can_heal_is_tried_again() {
        let of = |code: &str, subcode: &str| {
            classify_invitation_failure(&FailureReason {
                code: Some(code.into()),
                subcode: Some(subcode.into()),
                message: None,
            })
        };
        for subcode in [
            "Timeout",
            "Missed",
            "Unavailable",
            "TemporarilyUnavailable",
            "Unreachable",
            "ServiceFailure",
            "ThreadIdAlreadyExists",
        ] {
            assert_eq!(of("RemoteFailure", subcode), Healing::Temporary, "{subcode}");
        }
        for subcode in
            ["Declined", "Busy", "DoNotDisturb", "DestinationNotFound", "NotAllowed", "ConnectedElsewhere"]
        {
            assert_eq!(of("RemoteFailure", subcode), Healing::Permanent, "{subcode}");
        }
        assert_eq!(of("ServiceFailure", "None"), Healing::Temporary);
        assert_eq!(of("RemoteFailure", "None"), Healing::Permanent);
    }
}
