//! Keeps this node's fair share of the accounts, where several nodes share a database.
//!
//! The database is the only thing the nodes have in common: each of them tells it that it lives, renews its leases, and
//! looks how many accounts and nodes there are. One that has less than its share takes what nobody holds or somebody did
//! not renew in time; one that has more gives some up, a few at a time, each after its life here has ended in order. Shares
//! are rounded up, so that nothing moves back and forth. [`super::supervisor`] begins and ends lives by what [`Leases`]
//! says.
//!
//! If the database can't be reached, nothing is decided here: leases run out by themselves, and with them the lives.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::store::{Cluster, ClusterStore, Leases, SharedStore, StoreError};

/// At least so many accounts may be taken in one round, however small the share.
const TAKEN_AT_ONCE: usize = 20;
/// So many accounts may be on their way to other nodes at a time.
const LEAVING_AT_ONCE: usize = 10;
/// Leases are renewed in a third of their time, and new accounts are noticed soon.
const REGULARLY: Duration = Duration::from_secs(3);
/// When a round left something to do.
const SOON: Duration = Duration::from_secs(1);
/// Between two rounds that notices ask for: they come in crowds.
const GATHERS: Duration = Duration::from_millis(100);

/// What a node does about its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    Take(usize),
    HandOver(usize),
    Stay,
}

/// A share of the accounts, rounded up.
fn fair_share(cluster: Cluster) -> usize {
    cluster.accounts.div_ceil(cluster.nodes.max(1))
}

/// What to do, with so many accounts that stay and so many that leave.
fn next_move(cluster: Cluster, staying: usize, leaving: usize) -> Move {
    let share = fair_share(cluster);
    if staying < share {
        // Other nodes that start at the same moment shall find some, too.
        Move::Take((share - staying).min(TAKEN_AT_ONCE.max(share.div_ceil(3))))
    } else if staying > share && leaving < LEAVING_AT_ONCE {
        Move::HandOver((staying - share).min(LEAVING_AT_ONCE - leaving))
    } else {
        Move::Stay
    }
}

/// Handle of the task.
pub struct Coordinator {
    retiring: CancellationToken,
    ended: CancellationToken,
    task: JoinHandle<()>,
}

impl Coordinator {
    /// Starts the task on the current tokio runtime. `node`: for the log.
    pub fn start(store: SharedStore, node: String) -> Self {
        let (retiring, ended) = (CancellationToken::new(), CancellationToken::new());
        let rounds =
            Rounds { leases: store.leases(), store, node, trouble: false, shown: None, retired: false };
        let task = tokio::spawn(rounds.run(retiring.clone(), ended.clone()));
        Self { retiring, ended, task }
    }

    /// From now on nothing is taken any more, and the other nodes know it. What is held is renewed until it is released,
    /// and what is released is theirs at once.
    pub fn retire(&self) {
        self.retiring.cancel();
    }

    /// Ends the task, after what was released has been told.
    pub async fn end(self) {
        self.ended.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the keeper of leases panicked; what it held runs out");
        }
    }
}

struct Rounds {
    store: SharedStore,
    leases: Leases,
    node: String,
    trouble: bool,
    /// What was last said in the log.
    shown: Option<(usize, usize, usize)>,
    retired: bool,
}

impl Rounds {
    async fn run(mut self, retiring: CancellationToken, ended: CancellationToken) {
        let store = Arc::clone(&self.store);
        let Some(cluster) = store.cluster() else { return };
        loop {
            let is_retiring = retiring.is_cancelled();
            let pause = match self.round(cluster, is_retiring).await {
                Ok(pause) => {
                    self.trouble = false;
                    pause
                }
                Err(error) => {
                    self.complain(&error);
                    SOON.min(cluster.lease_ttl() / 6)
                }
            };
            if ended.is_cancelled() {
                return;
            }
            let next = Instant::now() + pause;
            tokio::select! {
                () = ended.cancelled() => {}
                () = retiring.cancelled(), if !is_retiring => {}
                () = self.leases.released() => {}
                () = cluster.leases_changed() => sleep(GATHERS).await,
                () = sleep_until(next) => {}
            }
        }
    }

    /// Renews, releases, and takes or gives up. Gives when the next round is due.
    async fn round(&mut self, store: &dyn ClusterStore, retiring: bool) -> Result<Duration, StoreError> {
        let regular = REGULARLY.min(store.lease_ttl() / 3);
        if retiring && !self.retired {
            store.retire_node().await?;
            self.retired = true;
        }
        store.release_leases().await?;
        let cluster = store.renew_leases().await?;
        if retiring {
            return Ok(regular);
        }
        let (staying, leaving) = self.leases.count();
        let pause = match next_move(cluster, staying, leaving) {
            Move::Take(at_most) => {
                let taken = store.acquire_leases(at_most).await?;
                if taken == at_most { SOON } else { regular }
            }
            Move::HandOver(how_many) => {
                tracing::info!(
                    node = self.node,
                    accounts = how_many,
                    "this node has more than its share; accounts are stopped here and go to other nodes"
                );
                self.leases.hand_over(how_many);
                SOON
            }
            Move::Stay => regular,
        };
        self.tell(cluster);
        // A node that died does not say so: its leases are looked at the moment they run out.
        let until_free = cluster.first_ends_in.map_or(regular, |time| time + GATHERS);
        Ok(pause.min(regular).min(until_free))
    }

    fn tell(&mut self, cluster: Cluster) {
        let (staying, leaving) = self.leases.count();
        let now = (cluster.accounts, cluster.nodes, staying);
        if self.shown.replace(now) != Some(now) {
            tracing::info!(
                node = self.node,
                held = staying,
                leaving,
                share = fair_share(cluster),
                accounts = cluster.accounts,
                nodes = cluster.nodes,
                "this node holds {staying} of {} accounts",
                cluster.accounts
            );
        }
    }

    fn complain(&mut self, error: &StoreError) {
        if std::mem::replace(&mut self.trouble, true) {
            tracing::debug!(error = %crate::error_chain(error), "leases are not renewed");
            return;
        }
        tracing::error!(
            node = self.node,
            error = %crate::error_chain(error),
            "leases can't be renewed; trying again. Accounts whose lease runs out stop here, and another node may take them"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(accounts: usize, nodes: usize) -> Cluster {
        Cluster { accounts, nodes, first_ends_in: None }
    }

    #[test]
    fn a_node_takes_what_it_lacks_a_part_at_a_time() {
        assert_eq!(next_move(of(10, 1), 0, 0), Move::Take(10));
        assert_eq!(next_move(of(60, 1), 0, 0), Move::Take(20));
        assert_eq!(next_move(of(3000, 1), 0, 0), Move::Take(1000));
        assert_eq!(next_move(of(61, 3), 20, 0), Move::Take(1));
        assert_eq!(next_move(of(0, 0), 0, 0), Move::Stay);
    }

    #[test]
    fn a_node_gives_up_only_what_is_above_the_rounded_share() {
        assert_eq!(next_move(of(61, 3), 21, 0), Move::Stay);
        assert_eq!(next_move(of(61, 3), 22, 0), Move::HandOver(1));
        assert_eq!(next_move(of(60, 2), 60, 0), Move::HandOver(10));
        assert_eq!(next_move(of(60, 2), 50, 10), Move::Stay);
        assert_eq!(next_move(of(60, 2), 50, 7), Move::HandOver(3));
    }

    #[test]
    fn shares_rounded_up_leave_nothing_to_move() {
        for accounts in 0..40 {
            for nodes in 1..7 {
                let cluster = of(accounts, nodes);
                let share = fair_share(cluster);
                assert!(share * nodes >= accounts, "everything finds a place");
                assert_eq!(next_move(cluster, share, 0), Move::Stay);
            }
        }
    }
}
