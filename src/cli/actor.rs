//! Who uses a tool, for `access_log`: the operating system's user, not what the environment claims.

use crate::system_user;

/// The name of the user that runs this process; `root (sudo alice)` where root acts for somebody.
pub(super) fn name() -> String {
    let name = system_user::current();
    match std::env::var("SUDO_USER") {
        Ok(person) if system_user::is_superuser() => format!("{name} (sudo {person})"),
        _ => name,
    }
}
