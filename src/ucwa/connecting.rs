//! A layer under an HTTP client that tells whether a connection is being made.
//!
//! The silence of a server means something only once a request has reached it. What a client says of a request that
//! waits is nothing; but one that has begun and for which no connection is being made has one.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::sync::watch;
use tower_layer::Layer;
use tower_service::Service;

/// The layer; its clones count together.
#[derive(Debug, Clone, Default)]
pub(super) struct Connecting {
    /// How many connections are being made: name, TCP, proxy and TLS.
    count: watch::Sender<usize>,
}

impl Connecting {
    /// Makes a request, and says so once it is on a connection: at once, or when no connection is being made for
    /// anybody any more.
    pub(super) async fn while_on_connection<F: Future + Unpin>(
        &self,
        mut request: F,
        on_connection: impl FnOnce(),
    ) -> F::Output {
        let mut count = self.count.subscribe();
        tokio::select! {
            // The request first: it begins to connect when it is polled.
            biased;
            answer = &mut request => return answer,
            // The sender is ours, so there is always one.
            _ = count.wait_for(|connecting| *connecting == 0) => on_connection(),
        }
        request.await
    }
}

/// Counts as long as it lives.
struct Counted(watch::Sender<usize>);

impl Counted {
    fn new(count: watch::Sender<usize>) -> Self {
        count.send_modify(|connecting| *connecting += 1);
        Self(count)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|connecting| *connecting -= 1);
    }
}

impl<S> Layer<S> for Connecting {
    type Service = CountingConnections<S>;

    fn layer(&self, inner: S) -> CountingConnections<S> {
        CountingConnections { inner, count: self.count.clone() }
    }
}

/// A connector under [`Connecting`].
#[derive(Debug, Clone)]
pub(super) struct CountingConnections<S> {
    inner: S,
    count: watch::Sender<usize>,
}

impl<S, R> Service<R> for CountingConnections<S>
where
    S: Service<R>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, target: R) -> Self::Future {
        let counted = Counted::new(self.count.clone());
        let connecting = self.inner.call(target);
        Box::pin(async move {
            let _counted = counted;
            connecting.await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, convert::Infallible, future::poll_fn};

    use futures_util::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    /// Connects when it is told to.
    struct Connector(Option<oneshot::Receiver<()>>);

    impl Service<()> for Connector {
        type Response = ();
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<(), Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, (): ()) -> Self::Future {
            let connected = self.0.take().unwrap();
            Box::pin(connected.map(|_| Ok(())))
        }
    }

    #[test]
    fn a_request_is_on_a_connection_once_none_is_being_made() {
        let connecting = Connecting::default();
        let (connect, connected) = oneshot::channel();
        let mut connector = connecting.layer(Connector(Some(connected)));
        let mut connection = None;
        // Connects when it is polled first, and is never answered.
        let request = poll_fn(move |context| {
            let connection = connection.get_or_insert_with(|| connector.call(()).fuse());
            let _connected: Poll<_> = connection.poll_unpin(context);
            Poll::<()>::Pending
        });
        let on_connection = Cell::new(false);
        let mut watched = Box::pin(connecting.while_on_connection(request, || on_connection.set(true)));
        assert!(watched.as_mut().now_or_never().is_none());
        assert!(!on_connection.get(), "it is connecting");
        connect.send(()).unwrap();
        assert!(watched.as_mut().now_or_never().is_none());
        assert!(on_connection.get());
    }
}
