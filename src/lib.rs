//! ucwa-relay.

pub mod archive;
pub mod cli;
pub mod config;
pub mod identifiers;
pub mod outbox;
pub mod secrets;
pub mod simulator;
pub mod store;
pub mod ucwa;
