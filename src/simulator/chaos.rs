//! Faults at random, while the simulator runs: for the demo, for tests, and for whoever wants to see what happens.
//!
//! One task switches faults on, one after the other, each for one account and one operation and for one or two strikes.
//! Which ones is decided by a seed alone, so that a run can be repeated as far as a run with many clients ever can. What
//! it has switched on it switches off again when it is stopped, or when it has struck nobody for a while.
//!
//! It keeps to what a client can survive by itself. What a client may rightly leave to an operator has tests of its own:
//! an account without the right to sign in, too many applications, a foreign host, a GET that somebody else replaces
//! again and again.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{
    fault::{Fault, FaultKind, Operation, Refusal, RefusalBody},
    server::Server,
};

/// How wild it gets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChaosSettings {
    /// Decides which faults come, and in which order.
    pub seed: u64,
    /// Faults that are switched on in a second, for all accounts together.
    pub faults_per_second: f64,
}

impl Default for ChaosSettings {
    fn default() -> Self {
        Self { seed: 1, faults_per_second: 2.0 }
    }
}

/// The chaos of one simulator, running or not.
#[derive(Default)]
pub(crate) struct Chaos {
    settings: Mutex<ChaosSettings>,
    running: AtomicBool,
    changed: Notify,
}

/// How many faults wait to strike; beyond that the oldest, which nobody seems to meet, is switched off.
const WAITING_AT_MOST: usize = 64;

impl Chaos {
    pub(crate) fn start(&self, settings: ChaosSettings) {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
        self.running.store(true, SeqCst);
        self.changed.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.running.store(false, SeqCst);
        self.changed.notify_one();
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(SeqCst)
    }

    /// Switches faults on until the task is dropped.
    pub(crate) async fn run(server: Arc<Server>) {
        let chaos = &server.chaos;
        let accounts: Vec<String> = server.account_list.iter().map(|account| account.uri.clone()).collect();
        loop {
            let settings = chaos.settings.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if !chaos.is_running() || settings.faults_per_second <= 0.0 || accounts.is_empty() {
                chaos.changed.notified().await;
                continue;
            }
            let mut plan = Plan::new(settings.seed, accounts.clone());
            let mut waiting = VecDeque::new();
            while chaos.is_running() {
                let pause = plan.random.random_range(0.2..1.8) / settings.faults_per_second;
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_secs_f64(pause.min(60.0))) => {}
                    () = chaos.changed.notified() => break,
                }
                waiting.push_back(super::inject(&server, plan.next_fault()));
                if waiting.len() > WAITING_AT_MOST {
                    server.faults.clear(waiting.pop_front());
                }
            }
            for id in waiting {
                server.faults.clear(Some(id));
            }
        }
    }
}

/// Who is asked for what, and what goes wrong then: an endless sequence.
pub(crate) struct Plan {
    random: StdRng,
    accounts: Vec<String>,
    /// Faults that an account survives by itself, but not several times: who has had which.
    rare: BTreeSet<(String, &'static str)>,
}

/// Requests that are made all the time, and those that need a fault more urgently because they are made seldom.
const OPERATIONS: [Operation; 20] = [
    Operation::Events,
    Operation::Events,
    Operation::Events,
    Operation::Events,
    Operation::SendMessage,
    Operation::SendMessage,
    Operation::StartMessaging,
    Operation::StartMessaging,
    Operation::AddMessaging,
    Operation::Accept,
    Operation::Accept,
    Operation::Message,
    Operation::Participant,
    Operation::Invitation,
    Operation::Conversation,
    Operation::Conversations,
    Operation::Applications,
    Operation::Application,
    Operation::MakeMeAvailable,
    Operation::Token,
];

impl Plan {
    pub(crate) fn new(seed: u64, accounts: Vec<String>) -> Self {
        Self { random: StdRng::seed_from_u64(seed), accounts, rare: BTreeSet::new() }
    }

    pub(crate) fn next_fault(&mut self) -> Fault {
        loop {
            let account = self.accounts.choose(&mut self.random).cloned().unwrap_or_default();
            let operation = *OPERATIONS.choose(&mut self.random).unwrap_or(&Operation::Any);
            let kind = if operation == Operation::Events && self.random.random_bool(0.5) {
                self.channel_fault()
            } else {
                self.any_fault(operation)
            };
            let rare = match &kind {
                // Whoever lost its GET three times to somebody else is right to ask an operator.
                FaultKind::PgetReplaced => Some("replaced"),
                FaultKind::Status(Refusal { status: 403, .. }) => Some("forbidden"),
                // A client is right to pass over a package that it cannot read twice in a row.
                FaultKind::CutMidway
                | FaultKind::TruncatedXml
                | FaultKind::MalformedXml
                | FaultKind::InvalidUtf8
                | FaultKind::Doctype
                | FaultKind::HugeBody { .. }
                | FaultKind::EndlessBody
                | FaultKind::WrongContentType { .. }
                    if operation == Operation::Events =>
                {
                    Some("unreadable")
                }
                _ => None,
            };
            if rare.is_some_and(|name| !self.rare.insert((account.clone(), name))) {
                continue;
            }
            // Nobody is known yet where discovery begins.
            if operation == Operation::Token && self.random.random_bool(0.3) {
                return Fault::new(kind).on(Operation::Discovery);
            }
            let once = Fault::new(kind).on(operation).account(account);
            return if rare.is_none() && self.random.random_bool(0.15) { once.times(2) } else { once };
        }
    }

    fn channel_fault(&mut self) -> FaultKind {
        let kinds = [
            FaultKind::Resync,
            FaultKind::Resume { lose_conversations: false },
            FaultKind::Resume { lose_conversations: true },
            FaultKind::NoLink,
            FaultKind::UnknownThings,
            FaultKind::LinkOnly,
            FaultKind::OddOrder,
            FaultKind::Aggregate,
            FaultKind::PgetReplaced,
            FaultKind::ApplicationNotFound { keep: false },
            FaultKind::InactiveApplicationExpired { keep: false },
            FaultKind::status(403),
        ];
        kinds.choose(&mut self.random).cloned().unwrap_or(FaultKind::CutBefore)
    }

    fn any_fault(&mut self, operation: Operation) -> FaultKind {
        let ms = self.random.random_range(50..1500);
        let refusal = |status| Refusal { status, ..Refusal::default() };
        let sign_in = matches!(operation, Operation::Token | Operation::Discovery);
        let mut kinds = vec![
            FaultKind::CutBefore,
            FaultKind::CutBefore,
            FaultKind::CutAfter,
            FaultKind::CutAfter,
            FaultKind::CutMidway,
            FaultKind::Delay { ms },
            FaultKind::DelayAfter { ms },
            FaultKind::status(429),
            FaultKind::Status(Refusal { retry_after: Some(1), ..refusal(429) }),
            FaultKind::Status(Refusal { retry_after: Some(2), retry_after_as_date: true, ..refusal(503) }),
            FaultKind::status(503),
            FaultKind::status(500),
            FaultKind::Status(Refusal { body: Some(RefusalBody::Empty), ..refusal(500) }),
            FaultKind::Status(Refusal { executed: true, ..refusal(500) }),
            FaultKind::status(502),
            FaultKind::Status(Refusal { executed: true, ..refusal(504) }),
            FaultKind::TruncatedXml,
            FaultKind::MalformedXml,
            FaultKind::InvalidUtf8,
            FaultKind::Doctype,
            FaultKind::HugeBody { bytes: Some(5_000_000) },
            FaultKind::EndlessBody,
            FaultKind::WrongContentType { content_type: None },
        ];
        if !sign_in {
            kinds.extend([
                FaultKind::ExpiredToken,
                FaultKind::ExpiredToken,
                FaultKind::EarlyEvents,
                FaultKind::EarlyEvents,
                FaultKind::refusal(409, "AnotherOperationPending"),
            ]);
        }
        kinds.choose(&mut self.random).cloned().unwrap_or(FaultKind::CutBefore)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64, length: usize) -> Vec<Fault> {
        let accounts = (0..50).map(|number| format!("sip:user{number}@contoso.example")).collect();
        let mut plan = Plan::new(seed, accounts);
        (0..length).map(|_| plan.next_fault()).collect()
    }

    #[test]
    fn a_seed_makes_the_same_faults_again_and_another_seed_makes_others() {
        assert_eq!(plan(7, 500), plan(7, 500));
        assert_ne!(plan(7, 500), plan(8, 500));
    }

    #[test]
    fn a_minute_has_every_kind_of_fault_a_client_can_survive() {
        let faults = plan(1, 3000);
        let kinds: BTreeSet<&str> = faults.iter().map(|fault| fault.kind.name()).collect();
        let left_out: Vec<&str> = FaultKind::NAMES.into_iter().filter(|name| !kinds.contains(name)).collect();
        assert_eq!(left_out, ["too_many_applications", "redirect"]);
        for operation in OPERATIONS.into_iter().chain([Operation::Discovery]) {
            assert!(faults.iter().any(|fault| fault.operation == operation), "{operation:?}");
        }
        let replaced = |fault: &&Fault| fault.kind == FaultKind::PgetReplaced;
        let accounts: BTreeSet<_> = faults.iter().filter(replaced).map(|fault| &fault.account).collect();
        assert_eq!(faults.iter().filter(replaced).count(), accounts.len(), "once for each account");
    }
}
