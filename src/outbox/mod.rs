//! The queue's working side: which rows may be sent at all, and who hands them to the accounts.

pub mod admission;
pub mod dispatcher;
