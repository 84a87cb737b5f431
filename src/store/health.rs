//! Whether the database takes what is written, as the writer found it last.
//!
//! The log says once when trouble begins and once when it is over, however many accounts try again meanwhile.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Who has events to store tries again within this time. If nobody did, nobody has any more, and any transaction tells
/// that the trouble is over.
const TRIES_AGAIN_WITHIN: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
pub(super) struct Health {
    trouble: Mutex<Option<Trouble>>,
}

#[derive(Debug)]
struct Trouble {
    began: Instant,
    last: Instant,
    problem: String,
}

impl Health {
    /// The database did not take a transaction.
    pub(super) fn refused(&self, problem: String) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let began = if let Some(trouble) = trouble.as_ref() {
            tracing::debug!(error = problem, "the database still takes nothing");
            trouble.began
        } else {
            tracing::error!(
                error = problem,
                "the database takes nothing; nothing is acknowledged until it does, and nothing is sent"
            );
            now
        };
        *trouble = Some(Trouble { began, last: now, problem });
    }

    /// It took one. `events`: what accounts had to store was in it. A disk that is full may take what needs no room, so
    /// anything else proves little.
    pub(super) fn took(&self, events: bool) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(over) = trouble.take_if(|trouble| events || trouble.last.elapsed() > TRIES_AGAIN_WITHIN) {
            tracing::warn!(
                after_ms = over.began.elapsed().as_millis(),
                "the database takes what is written again"
            );
        }
    }

    /// What keeps it from doing so, in words.
    pub(super) fn problem(&self) -> Option<String> {
        self.trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|trouble| trouble.problem.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_no_room_does_not_end_the_trouble_of_events() {
        let health = Health::default();
        assert_eq!(health.problem(), None);
        health.refused("the disk is full".to_owned());
        health.took(false);
        assert_eq!(health.problem().as_deref(), Some("the disk is full"));
        health.refused("the server is starting".to_owned());
        assert_eq!(health.problem().as_deref(), Some("the server is starting"), "the latest is told");
        health.took(true);
        assert_eq!(health.problem(), None);
    }
}
