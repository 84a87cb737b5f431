//! The queue: what may leave, to whom and when.

pub mod admission;
