//! The admin listener: health, metrics, and the page that people look at, over HTTP on `admin.listen`.
//!
//! It reads the database through the same traits as the commands and never writes the archive. Every request passes the
//! `guard` first: a foreign `Host` is refused (DNS rebinding), and every answer carries headers that keep a browser
//! from doing anything with it but show it. What people look at passes `viewer`, too, which knows who they are, and so does
//! what programs ask by `api`. Trouble
//! here ends no account: the listener is a task of its own, and takes few readers of the database.

mod api;
mod connections;
mod guard;
mod health;
mod local_user;
mod page;
mod viewer;

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    Router, middleware,
    response::IntoResponse,
    routing::{get, post},
};
use axum_server::{
    Handle,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    sync::{Mutex, Semaphore},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{account::state_board::CurrentStates, config::AdminSection, metrics, store::SharedStore};

/// How often what histograms have gathered is folded together, so that it does not pile up where nobody scrapes.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// How soon an address that was taken is tried again.
const BIND_AGAIN_EVERY: Duration = Duration::from_secs(5);
/// How long answers that are under way may take at the end.
const END_WITHIN: Duration = Duration::from_secs(2);
/// How long a new connection may take until it asks for something.
const FIRST_REQUEST_WITHIN: Duration = Duration::from_secs(15);
/// How long a connection may then be silent, or take to say what it asks for.
const NEXT_REQUEST_WITHIN: Duration = Duration::from_secs(60);
/// Requests at once of one connection that can have several (HTTP/2).
const MOST_STREAMS: u32 = 64;

/// Readers of the database that pages take at once, of those that the relay has.
const READERS: usize = 2;

/// What the pages show, and who looks at them.
#[derive(Clone)]
struct AdminState {
    store: SharedStore,
    states: CurrentStates,
    metrics: PrometheusHandle,
    guard: Arc<guard::Guard>,
    /// Browsers speak TLS with this listener.
    tls: bool,
    viewers: Arc<viewer::Viewers>,
    reads: Arc<Semaphore>,
    database: Arc<health::DatabaseLook>,
    overview: Arc<page::OverviewCache>,
    pulse: Arc<Mutex<page::Pulse>>,
    live: page::live::LivePages,
}

/// The running listener.
pub struct AdminServer {
    url: Option<String>,
    handle: Handle<SocketAddr>,
    stop: CancellationToken,
    /// Tells live pages, which would go on for ever, that it ends.
    ending: CancellationToken,
    serving: JoinHandle<()>,
    upkeep: JoinHandle<()>,
}

impl AdminServer {
    /// Listens on `admin.listen`. If another program has the address, accounts are served without the listener, which
    /// tries again until the address is free: the archive does not wait for a page.
    ///
    /// # Errors
    /// If the token or the certificate can't be used, or metrics can't be gathered; each names its key.
    pub async fn start(
        section: &AdminSection,
        store: SharedStore,
        states: CurrentStates,
    ) -> anyhow::Result<Self> {
        let guard = Arc::new(guard::Guard::new(section)?);
        let metrics = metrics::install().context("metrics can't be gathered")?;
        let tls = match (&section.tls_cert_file, &section.tls_key_file) {
            (Some(certificate), Some(key)) => Some(tls(certificate, key).await?),
            _ => None,
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (listen, handle, stop) = (section.listen, Handle::new(), CancellationToken::new());
        let ending = CancellationToken::new();
        let router = router(AdminState {
            store,
            states,
            metrics: metrics.clone(),
            guard,
            tls: tls.is_some(),
            viewers: Arc::new(viewer::Viewers::new()),
            reads: Arc::new(Semaphore::new(READERS)),
            database: Arc::default(),
            overview: Arc::default(),
            pulse: Arc::default(),
            live: page::live::LivePages::new(ending.clone()),
        });
        let listener = bind(listen);
        let address = listener.as_ref().ok().and_then(|listener| listener.local_addr().ok());
        let url = address.map(|address| format!("{scheme}://{address}/"));
        match (&url, &listener) {
            (Some(url), _) => tracing::info!(%url, "the admin listener answers"),
            (None, Err(error)) => tracing::error!(
                %error,
                "admin.listen: {listen} can't be listened on, so there are no metrics and no health; tried again \
                 every {} s",
                BIND_AGAIN_EVERY.as_secs()
            ),
            (None, Ok(_)) => {}
        }
        let serving = {
            let (handle, stop) = (handle.clone(), stop.clone());
            tokio::spawn(async move {
                let serving = async {
                    let listener = bound(listener, listen).await;
                    let service = router.into_make_service_with_connect_info::<SocketAddr>();
                    let bounded = connections::Bounded::default();
                    let plain = axum_server::from_tcp(listener)?.handle(handle).acceptor(bounded.clone());
                    let mut plain = plain.first_request_timeout(FIRST_REQUEST_WITHIN);
                    plain.http_builder().http1().header_read_timeout(NEXT_REQUEST_WITHIN);
                    plain.http_builder().http2().max_concurrent_streams(MOST_STREAMS);
                    match tls {
                        Some(tls) => {
                            let tls = RustlsAcceptor::new(tls).acceptor(bounded);
                            plain.acceptor(tls).serve(service).await
                        }
                        None => plain.serve(service).await,
                    }
                };
                let served: std::io::Result<()> = tokio::select! {
                    served = serving => served,
                    () = stop.cancelled() => Ok(()),
                };
                if let Err(error) = served {
                    tracing::error!(%error, "the admin listener has ended; accounts go on without it");
                }
            })
        };
        let upkeep = tokio::spawn(async move {
            let mut tick = tokio::time::interval(UPKEEP_EVERY);
            loop {
                tick.tick().await;
                metrics.run_upkeep();
            }
        });
        Ok(Self { url, handle, stop, ending, serving, upkeep })
    }

    /// `http://127.0.0.1:8470/`; `None` if the address was taken at the start.
    pub fn url(&self) -> Option<&str> {
        self.url.as_deref()
    }

    /// Answers what is under way and ends.
    pub async fn stop(self) {
        let Self { handle, stop, ending, mut serving, upkeep, .. } = self;
        ending.cancel();
        handle.graceful_shutdown(Some(END_WITHIN));
        upkeep.abort();
        // A panic in it was logged when it happened.
        if tokio::time::timeout(END_WITHIN * 2, &mut serving).await.is_err() {
            stop.cancel();
            let _ = serving.await;
        }
    }
}

fn bind(listen: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The listener, as soon as its address is free.
async fn bound(first: std::io::Result<TcpListener>, listen: SocketAddr) -> TcpListener {
    let mut attempt = first;
    loop {
        match attempt {
            Ok(listener) => return listener,
            Err(_) => tokio::time::sleep(BIND_AGAIN_EVERY).await,
        }
        attempt = bind(listen);
        if attempt.is_ok() {
            tracing::info!(%listen, "the admin listener answers now");
        }
    }
}

fn router(state: AdminState) -> Router {
    use page::{accounts, assets, conversations, outbox, overview, search, sign_in};
    let guard = Arc::clone(&state.guard);
    let restricted = Router::new()
        .route("/metrics", get(health::metrics))
        .route_layer(middleware::from_fn_with_state(state.clone(), viewer::require_token));
    let pages = Router::new()
        .route("/", get(overview::page))
        .route("/live", get(overview::follow))
        .route("/accounts", get(accounts::list))
        .route("/accounts/{uri}", get(accounts::detail))
        .route("/conversations", get(conversations::list))
        .route("/conversations/{id}", get(conversations::detail))
        .route("/conversations/{id}/live", get(conversations::follow))
        .route("/search", get(search::page))
        .route("/outbox", get(outbox::list).post(outbox::queue))
        .route("/outbox/live", get(outbox::follow))
        .route("/outbox/new", get(outbox::compose))
        .route("/outbox/{id}", get(outbox::detail))
        .route("/outbox/{id}/live", get(outbox::follow_row))
        .route("/outbox/{id}/{change}", post(outbox::change))
        .route("/sign-out", post(sign_in::sign_out))
        .route_layer(middleware::from_fn_with_state(state.clone(), viewer::require_viewer));
    let door = Router::new()
        .route("/sign-in", get(sign_in::page).post(sign_in::sign_in))
        .route_layer(middleware::from_fn(viewer::refuse_foreign));
    Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .route("/assets/page.css", get(assets::style))
        .route("/assets/page.js", get(assets::script))
        .route("/assets/icon.svg", get(assets::icon))
        .merge(restricted)
        .merge(pages)
        .nest("/api/v1", api::router(&state))
        .merge(door)
        .fallback(async || page::PageError::NotFound("There is no such page.".to_owned()).into_response())
        .layer(middleware::from_fn_with_state(guard, guard::protect))
        .with_state(state)
}

async fn tls(certificate: &Path, key: &Path) -> anyhow::Result<RustlsConfig> {
    let read = |name: &'static str, path: &Path| {
        let path = path.to_owned();
        async move {
            tokio::fs::read(&path).await.with_context(|| format!("{name} {} can't be read", path.display()))
        }
    };
    let (certificates, private_key) =
        (read("admin.tls_cert_file", certificate).await?, read("admin.tls_key_file", key).await?);
    // An error means that the process has a provider already, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
    RustlsConfig::from_pem(certificates, private_key).await.with_context(|| {
        format!(
            "admin.tls_cert_file {} and admin.tls_key_file {} are not a certificate chain and its key in PEM form",
            certificate.display(),
            key.display()
        )
    })
}
