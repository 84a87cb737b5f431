//! The queue's working side: which rows may be sent at all, who hands them to the accounts, and who removes what is over.

pub mod admission;
pub mod dispatcher;
pub mod pace;
pub mod pruning;
