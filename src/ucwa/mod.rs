//! The UCWA client: everything this program knows about the wire, and nothing about actors or databases.
//!
//! ```text
//! sign-in:  discovery ─▶ challenge ─▶ token ─▶ user ─▶ (another pool: token) ─▶ application
//! requests: client ─▶ token of the origin ─▶ http ─▶ xml ─▶ model
//! ```
//!
//! [`UcwaClient`] is the client of one account, [`HttpClients`] what all accounts share. What a failed request means is
//! decided in one place, [`UcwaError::action`]. The formats ([`model`], [`xml`], [`json`], [`character`],
//! [`data_uri`], [`html`], [`time`]) need no network.

mod application;
mod certificates;
mod challenge;
pub mod character;
mod client;
mod connect_once;
mod connecting;
pub mod data_uri;
pub mod decode;
mod discovery;
mod error;
pub mod html;
mod http;
pub mod json;
pub mod model;
mod ntlm;
mod observe;
pub mod time;
mod token;
mod trust;
pub mod xml;

pub use url::Url;

pub use self::{
    application::{Application, NewApplication},
    certificates::{CertificateLog, ShownCertificate},
    client::{
        EventParameters, NewMeeting, OutgoingInvitation, Permit, PollAnswer, SignInMethod, SignInSettings,
        UcwaClient,
    },
    discovery::{SignInStep, SignedIn},
    error::{Action, UcwaError},
    http::{HttpClients, HttpSettings},
    model::{Continuation, Event, EventBatch, EventKind, Link, Reason, Resource, Sender},
    observe::{Exchange, Observation, Observer},
};
