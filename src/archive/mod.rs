//! What the archive knows and how events change it: facts in, rows out, without XML, SQL or actors.

pub mod fact;
