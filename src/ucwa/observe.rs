//! What a client tells whoever watches it sign in: each request with its answer, what the server asked for, and each
//! token that was issued. It holds no token, no password and no query string, so that it can be shown to anybody.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use url::Url;

use super::{
    error::UcwaError,
    http::{Call, Reply},
};

/// Is told of each [`Observation`] as it is made, from whichever task makes the request.
pub type Observer = Arc<dyn Fn(Observation) + Send + Sync>;

/// Something that happened on the way.
#[derive(Debug, Clone)]
pub enum Observation {
    /// A request was answered, or failed.
    Exchange(Exchange),
    /// A server said where tokens are issued (header `WWW-Authenticate`, scheme `MsRtcOAuth`).
    Challenge {
        /// Host and port that asked for a token.
        from: String,
        /// Host and port of its token service.
        service: String,
        /// The grants it takes; `None` if it does not say.
        grants: Option<Vec<String>>,
    },
    /// A token was issued.
    Token {
        /// Host and port for which it is.
        host: String,
        /// The grant that was used.
        grant: &'static str,
        /// How long it is valid.
        lifetime: Duration,
    },
}

/// A request and what came of it.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// UCWA resource, or what stands for it.
    pub resource: &'static str,
    /// `GET`, `POST`, `DELETE`.
    pub method: String,
    /// Where it went, without its query.
    pub address: String,
    /// From connecting to the last byte of the answer.
    pub took: Duration,
    /// HTTP status; `None` without an answer.
    pub status: Option<u16>,
    /// What the server said beyond a status of 400 or more, or why there is no answer.
    pub problem: Option<UcwaError>,
    /// The header `Date`: the server's clock, in whole seconds.
    pub date: Option<Timestamp>,
}

impl Exchange {
    pub(super) fn new(call: &Call<'_>, took: Duration, outcome: &Result<Reply, UcwaError>) -> Self {
        let (status, problem, date) = match outcome {
            Ok(reply) => {
                let problem = (reply.status >= 400).then(|| reply.refusal());
                (Some(reply.status), problem, reply.date())
            }
            Err(error) => (None, Some(error.clone()), None),
        };
        Self {
            resource: call.resource,
            method: call.method.to_string(),
            address: without_query(&call.url),
            took,
            status,
            problem,
            date,
        }
    }
}

/// An address as it may be shown.
fn without_query(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_query(None);
    shown.set_fragment(None);
    shown.into()
}
