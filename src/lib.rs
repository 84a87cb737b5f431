//! ucwa-relay keeps every instant message of many Skype for Business accounts in SQL and sends the rows that
//! programs insert into the table `outbox`, over UCWA.

pub mod archive;
pub mod identifiers;
pub mod store;
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
