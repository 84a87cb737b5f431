//! Handing the archive over: files that others can read, and that can be proven later.
pub mod csv;
