//! The rules by which facts change rows, one file per subject, as methods of [`crate::archive::Workspace`].
//!
//! Two principles run through all of them. Applying the same facts again changes nothing (G2): rows are found by
//! (session, href) or by operation id before any is made, states only move forward, and what is known is not
//! overwritten by what a later event leaves out. And whatever mentions a resource first makes its row, because the
//! server merges and reorders events.

mod conversations;
mod invitations;
mod logs;
mod messages;
mod participants;
mod purged;
mod quarantine;
mod sends;
mod settle;
#[cfg(test)]
mod tests;
mod typing;

pub(crate) use conversations::RESUME;
pub(crate) use logs::LATE_INVITATION;
pub(crate) use settle::PATIENCE;

use crate::archive::fact::FailureReason;

/// Takes `new` if nothing is known yet.
fn fill<T: Clone>(known: &mut Option<T>, new: Option<&T>) {
    if known.is_none() {
        *known = new.cloned();
    }
}

/// Takes `new` if it says something.
fn replace<T: Clone>(known: &mut Option<T>, new: Option<&T>) {
    if let Some(new) = new {
        *known = Some(new.clone());
    }
}

/// The server's reason as a sentence for people.
fn sentence(reason: Option<&FailureReason>) -> String {
    let Some(reason) = reason else {
        return "the server reported a failure without a reason".to_owned();
    };
    match (&reason.message, &reason.subcode, &reason.code) {
        (Some(message), _, _) if !message.trim().is_empty() => message.trim().to_owned(),
        (_, Some(subcode), Some(code)) => format!("the server reported {subcode} ({code})"),
        (_, Some(word), None) | (_, None, Some(word)) => format!("the server reported {word}"),
        _ => "the server reported a failure without a reason".to_owned(),
    }
}
