//! The operating system's users, by name.

#[cfg(unix)]
use std::os::unix::fs::MetadataExt;

/// The user that runs this process, whatever the environment claims.
pub(crate) fn current() -> String {
    match user_id() {
        Some(uid) => name_of(uid),
        None => {
            std::env::var("USER").or_else(|_| std::env::var("USERNAME")).unwrap_or_else(|_| "unknown".into())
        }
    }
}

/// Whether this process runs as the superuser.
pub(crate) fn is_superuser() -> bool {
    user_id() == Some(0)
}

/// The name of a user; `uid 1000` if it has none here.
pub(crate) fn name_of(uid: u32) -> String {
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    name_in(&users, uid).unwrap_or_else(|| format!("uid {uid}"))
}

#[cfg(unix)]
fn user_id() -> Option<u32> {
    Some(std::fs::metadata("/proc/self").ok()?.uid())
}

#[cfg(not(unix))]
fn user_id() -> Option<u32> {
    None
}

fn name_in(users: &str, uid: u32) -> Option<String> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_database_names_a_user_id() {
        let users = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n";
        assert_eq!(name_in(users, 1000).as_deref(), Some("alice"));
        assert_eq!(name_in(users, 1), None);
        assert!(!current().is_empty());
    }
}
