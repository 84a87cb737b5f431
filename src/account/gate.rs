//! Paces sign-ins: at most so many at once and so many a second, over all accounts of this process.
//!
//! A pool that restarts drops every account at the same moment; without the gate they would all knock together.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

/// Shared by all accounts; cheap to clone.
#[derive(Debug, Clone)]
pub struct SignInGate {
    at_once: Arc<Semaphore>,
    next_start: Arc<Mutex<Instant>>,
    interval: Duration,
}

impl SignInGate {
    /// `at_once` sign-ins may be under way (`relay.accounts_online_at_once`), `rate` may begin in a second
    /// (`relay.sign_in_rate`).
    pub fn new(at_once: usize, rate: f64) -> Self {
        Self {
            at_once: Arc::new(Semaphore::new(at_once.max(1))),
            next_start: Arc::new(Mutex::new(Instant::now())),
            interval: Duration::from_secs_f64(1.0 / rate.max(0.001)),
        }
    }

    /// Waits for a turn. The sign-in is over when the permit is dropped.
    ///
    /// # Panics
    /// Never: the semaphore lives as long as the gate and is not closed.
    pub async fn enter(&self) -> OwnedSemaphorePermit {
        let permit = Arc::clone(&self.at_once)
            .acquire_owned()
            .await
            .expect("the semaphore lives as long as the gate and is never closed");
        let start = {
            let mut next_start = self.next_start.lock().await;
            let start = (*next_start).max(Instant::now());
            *next_start = start + self.interval;
            start
        };
        tokio::time::sleep_until(start).await;
        permit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_more_than_the_allowed_number_enter_at_once() {
        let gate = SignInGate::new(2, 10_000.0);
        let first = gate.enter().await;
        let _second = gate.enter().await;
        let third = gate.enter();
        tokio::pin!(third);
        assert!(futures_util::poll!(third.as_mut()).is_pending());
        drop(first);
        let _third = third.await;
    }
}
