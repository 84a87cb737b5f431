//! A layer under an HTTP client that lets it connect once.
//!
//! What is said on a connection that NTLM signs in must stay on it. A client's pool alone does not keep it there: it
//! opens another connection when the one at hand was closed, or is just on its way back from the last answer. Without
//! a second connection it waits for the first, and fails where that is gone.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tower_layer::Layer;
use tower_service::Service;

/// How long a connection that is still there can be on its way back to its pool.
const ON_ITS_WAY: Duration = Duration::from_secs(2);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no second connection.
#[derive(Debug, thiserror::Error)]
#[error("the connection was closed in the middle of its sign-in")]
struct Closed;

/// The layer; its clones count as one.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectOnce {
    connected: Arc<AtomicBool>,
}

impl<S> Layer<S> for ConnectOnce {
    type Service = ConnectingOnce<S>;

    fn layer(&self, inner: S) -> ConnectingOnce<S> {
        ConnectingOnce { inner, connected: Arc::clone(&self.connected) }
    }
}

/// A connector under [`ConnectOnce`].
#[derive(Debug, Clone)]
pub(super) struct ConnectingOnce<S> {
    inner: S,
    connected: Arc<AtomicBool>,
}

impl<S, R> Service<R> for ConnectingOnce<S>
where
    S: Service<R, Error = BoxError>,
    S::Response: Send + 'static,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, target: R) -> Self::Future {
        if !self.connected.swap(true, Ordering::SeqCst) {
            return Box::pin(self.inner.call(target));
        }
        // Whoever asks takes the first connection if it comes back meanwhile.
        Box::pin(async {
            tokio::time::sleep(ON_ITS_WAY).await;
            Err(BoxError::from(Closed))
        })
    }
}
