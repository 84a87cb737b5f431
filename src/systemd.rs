//! What a service tells systemd (`Type=notify`, `WatchdogSec=`): that it is ready, that it lives, that it stops. Without
//! systemd nothing is said.
//!
//! Source: `sd_notify(3)`, `sd_watchdog_enabled(3)`.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

use crate::store::SharedStore;

/// Says that the server runs, and from now on that it lives: as often as the watchdog asks for, while the database's
/// writer stands. The task runs on the thread on which every actor lives, so it also proves that this thread turns.
pub fn ready(store: SharedStore) -> Option<JoinHandle<()>> {
    notify(&[NotifyState::Ready]);
    // Half the time, as the manual advises.
    let every = sd_notify::watchdog_enabled()? / 2;
    Some(actix_rt::spawn(async move {
        let mut tick = tokio::time::interval(every.max(Duration::from_millis(100)));
        let broken = store.broken();
        tokio::pin!(broken);
        loop {
            tokio::select! {
                _ = tick.tick() => notify(&[NotifyState::Watchdog]),
                () = &mut broken => return,
            }
        }
    }))
}

/// Says that an orderly stop has begun.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd could not be told");
    }
}
