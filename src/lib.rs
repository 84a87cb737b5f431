//! ucwa-relay keeps every instant message of many Skype for Business accounts in SQL and sends the rows that
//! programs insert into the table `outbox`, over UCWA, the HTTP API of Skype for Business Server.
//!
//! ```text
//!  server ──GET events──▶ EventChannel ──facts──▶ archive rules ──rows──▶ store ──commit──▶ database
//!    ▲                        │  └───────── next GET, only after the commit ◀──────────────────┘
//!    │                        └─EventsCommitted─▶ Account ──▶ Conversation (what can be said now)
//!    │                                              ▲              │
//!    └────────────POST sendMessage──────────────────┼──Delivery◀───┘
//!  INSERT INTO outbox ──▶ store ──claim──▶ Dispatcher ──Relay──┘
//! ```
//!
//! **One message in.** A response of the event channel is parsed into an [`ucwa::EventBatch`];
//! [`archive::interpret`] turns it into facts; the store's writer applies the facts of all accounts that brought some
//! within a few milliseconds to rows and commits rows and cursors in one transaction; only then the `next` link is
//! followed, which acknowledges. The account then works on the events: it answers invitations, keeps the views of its
//! conversations, and fetches what was only linked.
//!
//! **One message out.** The dispatcher claims the first due row of each destination: its operation id is committed
//! before anything leaves. The account picks the open conversation with that recipient or starts one; the
//! conversation's delivery makes one request and commits its outcome. The `completed` event settles whether it was
//! delivered, and what became of a request whose answer was lost.
//!
//! What may import what is in `ARCHITECTURE.md`.

pub mod account;
pub mod admin;
pub mod archive;
pub mod bench;
pub mod cli;
pub mod config;
pub mod demo;
pub mod descriptors;
pub mod doctor;

pub mod evidence;
pub mod export;
pub mod identifiers;
pub mod metrics;
pub mod outbox;
pub mod query;
pub mod relay;
pub mod retention;
pub mod secrets;
pub mod simulator;
pub mod store;
mod system_user;
pub mod systemd;
pub mod traces;
pub mod ucwa;

/// An error with all its causes in one line, for logs and for columns that people read.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let words = source.to_string();
        // Drivers like to repeat their cause in their own text.
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = source.source();
    }
    text
}
