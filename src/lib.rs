//! ucwa-relay keeps every instant message of many Skype for Business accounts in SQL and sends the rows that
//! programs insert into the table `outbox`, over UCWA.

pub mod archive;
pub mod identifiers;
pub mod outbox;
pub mod store;
