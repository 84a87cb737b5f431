//! Parts of a page that follow what happens, as server-sent events.
//!
//! Each open page has one connection with a task of its own, which makes its part of the page again and again and sends it
//! when it differs from what was sent last. Nothing piles up: the next one is made only when the last one is on its way. A
//! browser that takes nothing for a while is let go, and so is everyone after some time; browsers come back by
//! themselves. There are at most so many connections; who comes then has a page that stands still, and says so. Nobody
//! follows a page longer than their session lasts: nothing more is sent from the moment at which it is over.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    http::HeaderName,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::StreamExt as _;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{AdminState, PageError, link};
use crate::admin::viewer::Viewer;

/// Connections at once.
pub(in crate::admin) const MOST: usize = 32;
/// How often a page is made again.
const EVERY: Duration = Duration::from_secs(2);
/// How long a browser may take for one page.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);
/// How long one connection lasts.
const LASTS: Duration = Duration::from_secs(15 * 60);
/// When a browser asks again after its connection has ended.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// What a part of a page is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// To see whether it has changed; nobody gets it.
    Compare,
    /// It has changed and is sent.
    Send,
}

/// The channel of live connections.
#[derive(Debug, Clone)]
pub(in crate::admin) struct LivePages {
    permits: Arc<Semaphore>,
    stop: CancellationToken,
}

impl LivePages {
    pub(in crate::admin) fn new(stop: CancellationToken) -> Self {
        Self { permits: Arc::new(Semaphore::new(MOST)), stop }
    }
}

/// A part of a page with the address from which it is followed.
pub(super) struct Live {
    pub(super) html: String,
    pub(super) from: String,
}

impl Live {
    /// `from` is the path, `query` what the page asks for.
    pub(super) fn new(html: String, from: &str, query: &[(&str, Option<String>)]) -> Self {
        let mut query = query.to_vec();
        query.push(("have", Some(digest(&html))));
        Self { from: link(from, &query), html }
    }
}

/// What a browser has already.
#[derive(Debug, Default, Deserialize)]
pub(in crate::admin) struct Have {
    have: Option<String>,
}

fn digest(page: &str) -> String {
    hex::encode(Sha256::digest(page.as_bytes()))
}

/// Follows what `make` makes, from what the browser has. It is called with [`Reason::Compare`] again and again, and with [`Reason::Send`] before
/// something that differs is sent; there it may refuse.
pub(super) fn follow<M, F>(
    state: &AdminState,
    viewer: &Viewer,
    have: Have,
    make: M,
) -> Result<Response, PageError>
where
    M: Fn(Reason) -> F + Send + Sync + 'static,
    F: Future<Output = Result<String, PageError>> + Send,
{
    let permit = Arc::clone(&state.live.permits).try_acquire_owned().map_err(|_| PageError::Busy)?;
    let stop = state.live.stop.clone();
    let lasts = viewer.lasts.clone();
    // What was made already is not sent either.
    let over = Box::pin(lasts.clone().over());
    let (sender, mut receiver) = mpsc::channel::<Event>(1);
    tokio::spawn(async move {
        let following = async {
            let end = Instant::now() + LASTS;
            let mut last = have.have;
            while Instant::now() < end {
                let event = match next(&make, &mut last).await {
                    Ok(Some(page)) => Some(Event::default().event("page").data(page)),
                    Ok(None) => None,
                    // Said once, until there is a page again.
                    Err(_) if last.take().is_some() => Some(Event::default().event("trouble").data("")),
                    Err(_) => None,
                };
                if let Some(event) = event
                    && !matches!(timeout(TAKEN_WITHIN, sender.send(event)).await, Ok(Ok(())))
                {
                    return;
                }
                tokio::select! {
                    () = sleep(EVERY) => {}
                    () = sender.closed() => return,
                }
            }
        };
        tokio::select! {
            () = following => {}
            () = stop.cancelled() => {}
            () = lasts.over() => {}
        }
        drop(permit);
    });
    let events = futures_util::stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|event| event.map(Ok::<_, Infallible>))
    });
    let begin = futures_util::stream::iter([Ok(Event::default().retry(ASK_AGAIN).comment("follows"))]);
    let stream = begin.chain(events).take_until(over);
    // Proxies that know this word pass on each piece as it comes (nginx, X-Accel-Buffering).
    let passed_on = [(HeaderName::from_static("x-accel-buffering"), "no")];
    Ok((passed_on, Sse::new(stream).keep_alive(KeepAlive::default())).into_response())
}

/// The page in JSON, so that it has no line ends, if it is another one than the last, of which the digest is known.
async fn next<M, F>(make: &M, last: &mut Option<String>) -> Result<Option<String>, PageError>
where
    M: Fn(Reason) -> F,
    F: Future<Output = Result<String, PageError>>,
{
    let page = make(Reason::Compare).await?;
    if last.as_ref() == Some(&digest(&page)) {
        return Ok(None);
    }
    let page = make(Reason::Send).await?;
    *last = Some(digest(&page));
    Ok(Some(serde_json::Value::from(page).to_string()))
}
