//! Why an account needs attention, as the run-book knows it: each reason is a heading of `docs/operations.md`.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $anchor:literal,)+) => {
        /// What an operator has to look at before an account goes on.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum AttentionReason {
            $($(#[$doc])* $name,)+
        }

        impl AttentionReason {
            /// Every reason there is.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Its heading in the run-book, `docs/operations.md`; `detail` and the log name it.
            pub fn anchor(self) -> &'static str {
                match self {
                    $(Self::$name => $anchor,)+
                }
            }
        }
    };
}

reasons! {
    /// The token service refused user name and password.
    PasswordRefused = "password-refused",
    /// There is no password, or it can't be read or unsealed.
    PasswordUnavailable = "password-unavailable",
    /// The account's way to sign in is not one that this program or the server takes.
    SignInMethod = "sign-in-method",
    /// The server issues or takes no token for another reason than the password.
    TokenRefused = "token-refused",
    /// No discovery address led to the account's server.
    ServerNotFound = "server-not-found",
    /// The server's certificate is not trusted, or the certificates to trust can't be used.
    Certificate = "certificate",
    /// An address that the server gave leads to where credentials must not go.
    UntrustedAddress = "untrusted-address",
    /// The server forbids what the account needs.
    Policy = "policy",
    /// The user has too many UCWA applications.
    TooManyApplications = "too-many-applications",
    /// Another program follows the same application.
    AnotherRelay = "another-relay",
    /// The database takes nothing about this account.
    DatabaseRefuses = "database-refuses",
    /// The account's row holds what can't be read.
    UnreadableAccount = "unreadable-account",
}
