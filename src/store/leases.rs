//! Which accounts this process may act for.
//!
//! Several nodes may share one database. Each account is then held by one of them at a time, under a lease that expires
//! unless it is renewed, and under an epoch that rises whenever somebody takes the lease (guarantee G10). The database
//! judges every write by the epoch. [`Leases`] is what the process itself knows, for everything that the database does not
//! see: by the process's own clock a lease ends no later than in the database, since it is counted from before the
//! request that renewed it. A process that slept, or can't reach the database, thus stops by itself.
//!
//! Where a database has one server only (SQLite), that server holds everything, for ever.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use tokio::sync::Notify;

use super::StoreError;
use crate::identifiers::AccountId;

/// The epoch of a server that has its database to itself.
const ALONE: i64 = 0;

/// When a lease ends. The monotonic clock stands still while the machine is suspended and the wall clock may be set, so
/// whichever says first that it is over is believed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    monotonic: Instant,
    wall: SystemTime,
}

impl Deadline {
    /// So long from now.
    pub(super) fn after(time: Duration) -> Self {
        Self { monotonic: Instant::now() + time, wall: SystemTime::now() + time }
    }

    fn has_passed(&self) -> bool {
        Instant::now() >= self.monotonic || SystemTime::now() >= self.wall
    }
}

#[derive(Debug, Clone)]
struct Lease {
    epoch: i64,
    until: Deadline,
    stage: Stage,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Kept,
    /// The account is to be stopped, so that another node can have it.
    Leaving,
    /// The account has stopped, as these words say; the database is to be told.
    Released(String),
}

/// A lease that is to be given up in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Release {
    /// Of this account.
    pub(super) account: AccountId,
    /// Under this epoch.
    pub(super) epoch: i64,
    /// For `account_status.detail`.
    pub(super) why: String,
}

/// What this process holds; cheap to clone, all clones are one.
#[derive(Debug, Clone)]
pub struct Leases(Option<Arc<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    leases: RwLock<HashMap<AccountId, Lease>>,
    released: Notify,
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, HashMap<AccountId, Lease>> {
        self.leases.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<AccountId, Lease>> {
        self.leases.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leases {
    /// Of a process that has the database to itself.
    pub(super) fn of_everything() -> Self {
        Self(None)
    }

    /// Of a node among others: nothing yet.
    pub(super) fn among_others() -> Self {
        Self(Some(Arc::default()))
    }

    /// The epoch under which this process holds the account; `None` if it does not, or its time is over.
    pub fn epoch(&self, account: AccountId) -> Option<i64> {
        let Some(shared) = &self.0 else { return Some(ALONE) };
        let leases = shared.read();
        let lease = leases.get(&account)?;
        let is_held = !matches!(lease.stage, Stage::Released(_)) && !lease.until.has_passed();
        is_held.then_some(lease.epoch)
    }

    /// Whether this process still holds the account under this epoch.
    pub fn holds(&self, account: AccountId, epoch: i64) -> bool {
        self.epoch(account) == Some(epoch)
    }

    /// Whether the account is to be stopped for another node's sake.
    pub fn is_leaving(&self, account: AccountId) -> bool {
        self.0.as_ref().is_some_and(|shared| {
            shared.read().get(&account).is_some_and(|lease| lease.stage == Stage::Leaving)
        })
    }

    /// All accounts that are to be stopped for other nodes' sake.
    pub fn leaving(&self) -> Vec<AccountId> {
        let Some(shared) = &self.0 else { return Vec::new() };
        let leases = shared.read();
        let leaving = leases.iter().filter(|(_, lease)| lease.stage == Stage::Leaving);
        leaving.map(|(account, _)| *account).collect()
    }

    /// How many accounts are held and stay, and how many are being handed over.
    pub fn count(&self) -> (usize, usize) {
        let Some(shared) = &self.0 else { return (0, 0) };
        let leases = shared.read();
        let count = |stage: &Stage| leases.values().filter(|lease| lease.stage == *stage).count();
        (count(&Stage::Kept), count(&Stage::Leaving))
    }

    /// Asks that so many accounts be stopped for other nodes: those with the highest ids.
    pub fn hand_over(&self, how_many: usize) {
        let Some(shared) = &self.0 else { return };
        let mut leases = shared.write();
        let mut kept: Vec<AccountId> = leases
            .iter()
            .filter(|(_, lease)| lease.stage == Stage::Kept)
            .map(|(account, _)| *account)
            .collect();
        kept.sort_unstable();
        for account in kept.into_iter().rev().take(how_many) {
            if let Some(lease) = leases.get_mut(&account) {
                lease.stage = Stage::Leaving;
            }
        }
    }

    /// The account has stopped here. From now on it is not held; the database is told soon, with `why`.
    pub fn release(&self, account: AccountId, why: &str) {
        let Some(shared) = &self.0 else { return };
        if let Some(lease) = shared.write().get_mut(&account) {
            lease.stage = Stage::Released(why.to_owned());
            shared.released.notify_one();
        }
    }

    /// Gives up everything that is still held.
    pub(super) fn release_all(&self, why: &str) {
        let Some(shared) = &self.0 else { return };
        for lease in shared.write().values_mut() {
            if !matches!(lease.stage, Stage::Released(_)) {
                lease.stage = Stage::Released(why.to_owned());
            }
        }
    }

    /// Returns when an account was released.
    pub async fn released(&self) {
        match &self.0 {
            Some(shared) => shared.released.notified().await,
            None => std::future::pending().await,
        }
    }

    /// What the database is to be told.
    pub(super) fn to_release(&self) -> Vec<Release> {
        let Some(shared) = &self.0 else { return Vec::new() };
        let leases = shared.read();
        leases
            .iter()
            .filter_map(|(account, lease)| match &lease.stage {
                Stage::Released(why) => {
                    Some(Release { account: *account, epoch: lease.epoch, why: why.clone() })
                }
                _ => None,
            })
            .collect()
    }

    /// Everything that this process has in the database as far as it knows, whether or not its time is over.
    pub(super) fn known(&self) -> Vec<(AccountId, i64)> {
        let Some(shared) = &self.0 else { return Vec::new() };
        shared.read().iter().map(|(account, lease)| (*account, lease.epoch)).collect()
    }

    /// Accounts that are held now.
    pub(super) fn held(&self) -> Vec<(AccountId, i64)> {
        let Some(shared) = &self.0 else { return Vec::new() };
        let leases = shared.read();
        leases
            .iter()
            .filter(|(_, lease)| !matches!(lease.stage, Stage::Released(_)) && !lease.until.has_passed())
            .map(|(account, lease)| (*account, lease.epoch))
            .collect()
    }

    /// The database gave this lease.
    pub(super) fn take(&self, account: AccountId, epoch: i64, until: Deadline) {
        if let Some(shared) = &self.0 {
            shared.write().insert(account, Lease { epoch, until, stage: Stage::Kept });
        }
    }

    /// The database renewed this lease.
    pub(super) fn extend(&self, account: AccountId, epoch: i64, until: Deadline) {
        if let Some(shared) = &self.0
            && let Some(lease) = shared.write().get_mut(&account).filter(|lease| lease.epoch == epoch)
        {
            lease.until = until;
        }
    }

    /// The database says that the account is not held under this epoch (any more). Says whether that is news.
    pub(super) fn lose(&self, account: AccountId, epoch: i64) -> bool {
        let Some(shared) = &self.0 else { return false };
        let mut leases = shared.write();
        let is_this = leases.get(&account).is_some_and(|lease| lease.epoch == epoch);
        is_this && leases.remove(&account).is_some()
    }
}

/// What a fair share depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// Accounts that some node should hold.
    pub accounts: usize,
    /// Nodes that live and are not about to stop.
    pub nodes: usize,
    /// When the first lease of another node runs out, unless that node renews it.
    pub first_ends_in: Option<Duration>,
}

/// Who of several nodes holds which account.
#[async_trait]
pub trait ClusterStore: Send + Sync {
    /// How long a lease lasts unless it is renewed.
    fn lease_ttl(&self) -> Duration;
    /// Tells the other nodes that this one lives, and renews what it holds; what another node has taken meanwhile is
    /// no longer held. [`StoreError::InUse`] if another process goes by this node's name.
    async fn renew_leases(&self) -> Result<Cluster, StoreError>;
    /// Takes at most so many accounts that nobody holds, that a node did not renew in time, or that an earlier process of
    /// this node's name left. Gives how many.
    async fn acquire_leases(&self, at_most: usize) -> Result<usize, StoreError>;
    /// Tells the database, and with it the other nodes, what was released by [`Leases::release`]. Gives how many.
    async fn release_leases(&self) -> Result<usize, StoreError>;
    /// This node is about to stop: the others may take its share.
    async fn retire_node(&self) -> Result<(), StoreError>;
    /// Returns when nodes or leases may have changed.
    async fn leases_changed(&self);
}

/// Which accounts are this process's.
pub trait LeaseStore: Send + Sync {
    /// What this process holds.
    fn leases(&self) -> Leases;
    /// Where several nodes may share the database: how they do. `None` where one server has it to itself, and for tools.
    fn cluster(&self) -> Option<&dyn ClusterStore>;
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANN: AccountId = AccountId(1);
    const BEN: AccountId = AccountId(2);

    fn long() -> Deadline {
        Deadline::after(Duration::from_secs(3600))
    }

    #[test]
    fn a_server_alone_holds_everything() {
        let leases = Leases::of_everything();
        assert!(leases.holds(ANN, ALONE) && !leases.is_leaving(ANN));
        leases.release(ANN, "stopped");
        assert!(leases.holds(ANN, ALONE) && leases.to_release().is_empty());
    }

    #[test]
    fn a_lease_is_held_under_its_epoch_and_for_its_time() {
        let leases = Leases::among_others();
        assert_eq!(leases.epoch(ANN), None);
        leases.take(ANN, 3, long());
        leases.take(BEN, 1, Deadline::after(Duration::ZERO));
        assert!(leases.holds(ANN, 3) && !leases.holds(ANN, 2));
        assert_eq!(leases.epoch(BEN), None, "its time is over");
        assert_eq!(leases.held(), [(ANN, 3)]);
        leases.extend(BEN, 1, long());
        assert!(leases.holds(BEN, 1), "renewed before anybody took it");
        assert!(!leases.lose(BEN, 7) && leases.lose(BEN, 1) && !leases.lose(BEN, 1));
        assert_eq!(leases.epoch(BEN), None);
    }

    #[test]
    fn a_clock_that_is_ahead_ends_a_lease_whichever_clock_it_is() {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let later = Duration::from_secs(3600);
        assert!(Deadline { monotonic: now, wall: wall + later }.has_passed());
        assert!(Deadline { monotonic: now + later, wall }.has_passed());
        assert!(!Deadline { monotonic: now + later, wall: wall + later }.has_passed());
    }

    #[test]
    fn handing_over_goes_on_to_the_release() {
        let leases = Leases::among_others();
        for id in 1..=4 {
            leases.take(AccountId(id), id, long());
        }
        leases.hand_over(2);
        assert_eq!(leases.count(), (2, 2));
        assert!(leases.is_leaving(AccountId(4)) && !leases.is_leaving(ANN));
        assert!(leases.holds(AccountId(4), 4), "it works until it has stopped");
        leases.release(AccountId(4), "handed over");
        assert_eq!(leases.epoch(AccountId(4)), None);
        let release = Release { account: AccountId(4), epoch: 4, why: "handed over".to_owned() };
        assert_eq!(leases.to_release(), [release]);
        assert_eq!((leases.known().len(), leases.held().len()), (4, 3));
    }
}
