//! `/sign-in` and `/sign-out`, where `admin.token_file` is set.

use std::net::SocketAddr;

use askama::Template;
use axum::{
    Form,
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode, header},
    response::{Html, IntoResponse, Redirect, Response},
};
use serde::Deserialize;

use super::{AdminState, Asked, PageError, Shell, filled, html};
use crate::admin::viewer::{self, SignInRefused};

/// Longest name, in characters.
const LONGEST_NAME: usize = 80;

#[derive(Template)]
#[template(path = "sign_in.html")]
struct SignInPage {
    shell: Shell,
    next: String,
    name: String,
    problem: Option<String>,
}

impl SignInPage {
    fn new(next: String, name: String, problem: Option<String>) -> Self {
        Self { shell: Shell { title: "Sign in".to_owned(), ..Shell::bare() }, next, name, problem }
    }
}

/// Where to go after it.
#[derive(Debug, Deserialize)]
pub(in crate::admin) struct Next {
    next: Option<String>,
}

/// A page of ours; anything else is the overview.
fn of_ours(next: Option<String>) -> String {
    next.filter(|next| {
        next.starts_with('/')
            && !next.starts_with("//")
            && next.chars().all(|c| c.is_ascii_graphic() && c != '\\')
            && !next.starts_with("/sign-")
    })
    .unwrap_or_else(|| "/".to_owned())
}

/// `GET /sign-in`.
pub(in crate::admin) async fn page(
    State(state): State<AdminState>,
    Asked(asked): Asked<Next>,
) -> Result<Response, PageError> {
    if !state.guard.has_token() {
        return Ok(Redirect::to("/").into_response());
    }
    html(&SignInPage::new(of_ours(asked.next), String::new(), None))
}

/// The form.
#[derive(Deserialize)]
pub(in crate::admin) struct SignIn {
    token: String,
    name: String,
    next: Option<String>,
}

/// `POST /sign-in`.
pub(in crate::admin) async fn sign_in(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    Form(form): Form<SignIn>,
) -> Result<Response, PageError> {
    let next = of_ours(form.next);
    let name: String = filled(Some(form.name))
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(LONGEST_NAME)
        .collect();
    let again = |status: StatusCode, problem: &str, name: String| {
        let page = SignInPage::new(next.clone(), name, Some(problem.to_owned()));
        Ok((status, Html(page.render()?)).into_response())
    };
    if name.is_empty() {
        return again(
            StatusCode::UNPROCESSABLE_ENTITY,
            "Give your name: it is noted beside every message that you read.",
            name,
        );
    }
    match viewer::sign_in(&state, peer, &headers, &name, &form.token) {
        Ok(cookie) => Ok(([(header::SET_COOKIE, cookie)], Redirect::to(&next)).into_response()),
        Err(SignInRefused::WrongToken) => again(
            StatusCode::UNAUTHORIZED,
            "That is not the token. It is in the file that admin.token_file names.",
            name,
        ),
        Err(SignInRefused::Wait(wait)) => Err(PageError::Wait(wait)),
    }
}

/// `POST /sign-out`.
pub(in crate::admin) async fn sign_out(State(state): State<AdminState>, headers: HeaderMap) -> Response {
    let cookie = viewer::sign_out(&state, &headers);
    ([(header::SET_COOKIE, cookie)], Redirect::to("/sign-in")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_in_leads_to_our_own_pages_only() {
        for (next, goes_to) in [
            ("/outbox?state=failed", "/outbox?state=failed"),
            ("//evil.example/", "/"),
            ("https://evil.example/", "/"),
            ("/\\evil.example", "/"),
            ("/sign-out", "/"),
            ("", "/"),
            ("/a\r\nset-cookie: x", "/"),
        ] {
            assert_eq!(of_ours(Some(next.to_owned())), goes_to, "{next:?}");
        }
        assert_eq!(of_ours(None), "/");
    }
}
