//! Who uses a tool, for `access_log`: the operating system's user, not what the environment claims.

#[cfg(unix)]
use std::os::unix::fs::MetadataExt;

/// The name of the user that runs this process; `root (sudo alice)` where root acts for somebody.
pub(super) fn name() -> String {
    let Some(uid) = user_id() else {
        return std::env::var("USER")
            .or_else(|_| std::env::var("USERNAME"))
            .unwrap_or_else(|_| "unknown".into());
    };
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = name_in(&users, uid).unwrap_or_else(|| format!("uid {uid}"));
    match std::env::var("SUDO_USER") {
        Ok(person) if uid == 0 => format!("{name} (sudo {person})"),
        _ => name,
    }
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
        assert!(!name().is_empty());
    }
}
