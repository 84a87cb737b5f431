//! How many connections the listener keeps: descriptors are what accounts sign in with, too, and a limit of the process
//! holds for both. Whoever opens connections and does nothing with them gets no more of them than one address may have,
//! and leaves some for others.
//!
//! A connection beyond the limits is closed at once. The log says so when it begins, and not for every one.

use std::{
    collections::HashMap,
    future::{Ready, ready},
    io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use axum_server::accept::Accept;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::viewer::network;

/// Connections at once.
const MOST: usize = 256;
/// Of one address. All that come through one proxy or tunnel have one.
const MOST_OF_ONE: usize = 128;

/// Lets only so many connections in.
#[derive(Debug, Clone, Default)]
pub(super) struct Bounded(Arc<Mutex<Open>>);

/// The connections that there are.
#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_network: HashMap<IpAddr, usize>,
    /// It was said that there are too many.
    told: bool,
}

impl Open {
    /// Counts one more, if it may be.
    fn enter(&mut self, network: IpAddr) -> bool {
        let of_one = self.by_network.get(&network).copied().unwrap_or_default();
        if self.all >= MOST || of_one >= MOST_OF_ONE {
            if !self.told {
                tracing::warn!(
                    peer = %network,
                    "the admin listener has {} connections, {of_one} of them from this address, and closes further \
                     ones until some have ended",
                    self.all
                );
            }
            self.told = true;
            return false;
        }
        self.all += 1;
        self.by_network.insert(network, of_one + 1);
        true
    }

    fn leave(&mut self, network: IpAddr) {
        self.all -= 1;
        match self.by_network.get_mut(&network) {
            Some(of_one) if *of_one > 1 => *of_one -= 1,
            _ => drop(self.by_network.remove(&network)),
        }
        // Who sits at the limit and comes again at once is not told every time.
        if self.all < MOST / 2 && self.by_network.values().all(|of_one| *of_one < MOST_OF_ONE / 2) {
            self.told = false;
        }
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S> Accept<TcpStream, S> for Bounded {
    type Stream = Counted;
    type Service = S;
    type Future = Ready<io::Result<(Counted, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        ready(stream.peer_addr().and_then(|peer| {
            let network = network(peer.ip());
            if lock(&self.0).enter(network) {
                Ok((Counted { stream, network, open: Arc::clone(&self.0) }, service))
            } else {
                Err(io::Error::other("too many connections"))
            }
        }))
    }
}

/// A connection that is counted until it ends.
#[derive(Debug)]
pub(super) struct Counted {
    stream: TcpStream,
    network: IpAddr,
    open: Arc<Mutex<Open>>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        lock(&self.open).leave(self.network);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_room_for_others_and_all_together_for_the_relay() {
        let address = |last: u8| IpAddr::from([192, 0, 2, last]);
        let mut open = Open::default();
        assert_eq!((0..MOST).filter(|_| open.enter(address(1))).count(), MOST_OF_ONE);
        assert_eq!((0..MOST).filter(|_| open.enter(address(2))).count(), MOST - MOST_OF_ONE);
        assert!(!open.enter(address(3)));
        open.leave(address(1));
        assert!(open.enter(address(3)));
        for _ in 1..MOST_OF_ONE {
            open.leave(address(1));
        }
        for _ in 0..MOST - MOST_OF_ONE {
            open.leave(address(2));
        }
        open.leave(address(3));
        assert_eq!((open.all, open.by_network.len(), open.told), (0, 0, false));
    }
}
