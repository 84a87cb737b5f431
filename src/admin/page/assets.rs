//! Style, script and sign of the page, from the binary: it needs nothing from anywhere else.

use axum::response::Response;

use super::with_type;

/// `/assets/page.css`.
pub(in crate::admin) async fn style() -> Response {
    with_type("text/css; charset=utf-8", include_str!("page.css"))
}

/// `/assets/page.js`.
pub(in crate::admin) async fn script() -> Response {
    with_type("text/javascript; charset=utf-8", include_str!("page.js"))
}

/// `/assets/icon.svg`.
pub(in crate::admin) async fn icon() -> Response {
    with_type("image/svg+xml", include_str!("icon.svg"))
}
