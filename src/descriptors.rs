//! File descriptors: how many this process may have open, and how many its accounts need.
//!
//! Each account keeps a connection for its event channel, and takes another one for what it asks and sends. Where the
//! limit is too low, the last accounts don't get theirs and nothing else can be opened either, the database included: so
//! the server takes all that it is allowed to, and says at its start what is missing.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections of an account while all of them send: the parked GET's and the request's. Measured over HTTP/1.1, with 900
/// accounts: 952 descriptors when all were signed in, 1,853 when all sent at once. Over HTTP/2 accounts share connections.
const FOR_AN_ACCOUNT: u64 = 2;
/// What a server has open without any account: its logs, listeners, runtime, the admin page's visitors, and what a sign-in
/// by NTLM, an export or the look-up of names needs for a moment.
const WITHOUT_ACCOUNTS: u64 = 64;
/// A reader of SQLite has the file, its log and the log's index open.
const FOR_A_READER: u64 = 3;

/// How many descriptors a process may have; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What holds now.
    pub soft: Option<u64>,
    /// As far as the process may raise it by itself.
    pub hard: Option<u64>,
}

impl Limits {
    /// Those of this process.
    pub fn current() -> Self {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        Self { soft: current, hard: maximum }
    }

    /// At least so many may be open.
    pub fn allow(self, descriptors: u64) -> bool {
        self.soft.is_none_or(|soft| soft >= descriptors)
    }
}

/// Raises this process's limit as far as it may, and gives what holds then.
///
/// # Errors
/// What the system said; the limits are what they were.
pub fn raise() -> io::Result<Limits> {
    let Limits { soft, hard } = Limits::current();
    if soft.is_some() && soft != hard {
        setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard })?;
    }
    Ok(Limits::current())
}

/// How many descriptors a server needs that has `accounts` signed in, which all send at once, and `readers` connections to
/// read its database (`database.max_connections`). Accounts that send to many people at the same moment take more.
pub fn needed(accounts: usize, readers: u32) -> u64 {
    let accounts = u64::try_from(accounts).unwrap_or(u64::MAX);
    let database = FOR_A_READER * (u64::from(readers) + 1);
    accounts.saturating_mul(FOR_AN_ACCOUNT).saturating_add(database + WITHOUT_ACCOUNTS)
}

/// What to do about a limit below `needed`.
pub fn advice(needed: u64) -> String {
    format!(
        "raise the limit to {needed} or more: LimitNOFILE= in the systemd unit, --ulimit nofile= for a container, or \
         `ulimit -n` in the shell that starts it"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_1024_is_too_low_near_a_thousand_accounts_and_nothing_is_too_much() {
        let limits = Limits { soft: Some(1024), hard: None };
        assert!(limits.allow(needed(300, 8)));
        assert!(!limits.allow(needed(1000, 8)));
        assert!(Limits { soft: None, hard: None }.allow(needed(usize::MAX, u32::MAX)));
    }
}
