//! Everything that the simulated server does later: one queue, one task, however many accounts there are.
//!
//! An action that has become pointless (the call was answered before it timed out) is not removed; it looks at
//! the state when its time comes and does nothing. Actions due at one moment run in the order they were set, so
//! what a correspondent says stays in order.

use std::{
    cmp::Ordering,
    collections::BinaryHeap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::server::Server;

type Action = Box<dyn FnOnce(&Arc<Server>) + Send>;

struct Entry {
    due: Instant,
    sequence: u64,
    /// Part of what correspondents do, for which a drain waits; not a mere time limit.
    scripted: bool,
    action: Action,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    /// Reversed, because the heap gives its greatest element first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.due, other.sequence).cmp(&(self.due, self.sequence))
    }
}

#[derive(Default)]
struct Queue {
    entries: BinaryHeap<Entry>,
    next_sequence: u64,
}

/// The queue of later actions.
#[derive(Default)]
pub(crate) struct Timers {
    queue: Mutex<Queue>,
    changed: Notify,
    scripted: AtomicUsize,
}

impl Timers {
    /// Runs `action` after `delay`.
    pub(crate) fn after(&self, delay: Duration, action: impl FnOnce(&Arc<Server>) + Send + 'static) {
        self.add(delay, false, Box::new(action));
    }

    /// Runs `action` after `delay`; until then the server does not count as quiet.
    pub(crate) fn after_scripted(&self, delay: Duration, action: impl FnOnce(&Arc<Server>) + Send + 'static) {
        self.scripted.fetch_add(1, SeqCst);
        self.add(delay, true, Box::new(action));
    }

    /// Whether nothing is left that a correspondent is about to do.
    pub(crate) fn nothing_scripted(&self) -> bool {
        self.scripted.load(SeqCst) == 0
    }

    fn add(&self, delay: Duration, scripted: bool, action: Action) {
        let due = Instant::now() + delay;
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = queue.next_sequence;
        queue.next_sequence += 1;
        let earliest = queue.entries.peek().is_none_or(|entry| due < entry.due);
        queue.entries.push(Entry { due, sequence, scripted, action });
        drop(queue);
        if earliest {
            self.changed.notify_one();
        }
    }

    /// The next action that is due, or when one will be.
    fn next(&self) -> Result<Entry, Option<Instant>> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        match queue.entries.peek().map(|entry| entry.due) {
            Some(due) if due <= Instant::now() => queue.entries.pop().ok_or(None),
            due => Err(due),
        }
    }

    /// Runs due actions until the task is dropped.
    pub(crate) async fn run(server: Arc<Server>) {
        loop {
            match server.timers.next() {
                Ok(entry) => {
                    (entry.action)(&server);
                    if entry.scripted {
                        server.timers.scripted.fetch_sub(1, SeqCst);
                    }
                    tokio::task::consume_budget().await;
                }
                Err(Some(due)) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(due) => {}
                        () = server.timers.changed.notified() => {}
                    }
                }
                Err(None) => server.timers.changed.notified().await,
            }
        }
    }
}
