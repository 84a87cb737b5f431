//! Account passwords: sealed with a key that is never in the database, or referred to and read at the last moment.
//!
//! A sealed password is `version (1 byte) | nonce (24) | ciphertext and tag`, by XChaCha20-Poly1305 under the key of
//! `secrets.key_file`, with the account's SIP URI as associated data: a sealed value that is copied to another account
//! does not open there. The key file is one line of 64 hexadecimal digits, readable by its owner only.
//!
//! Everything here reads small files: from an actor, call it by way of `spawn_blocking`. Errors name the account and
//! the source, never the content.

use std::{
    fmt,
    io::{self, Write},
    path::{Path, PathBuf},
};

use chacha20poly1305::{
    Key, XChaCha20Poly1305, XNonce,
    aead::{Aead, Generate, KeyInit, Payload},
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{identifiers::SipUri, store::SecretSource};

const VERSION: u8 = 1;
const NONCE_BYTES: usize = 24;
const KEY_BYTES: usize = 32;

/// Why there is no password to sign in with, or no key to seal one with.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The key file is not there.
    #[error(
        "there is no key file {}; restore it from its backup, or set the passwords again with \
         `ucwa-relay account set-password`",
        path.display()
    )]
    KeyMissing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The key file can be read by others.
    #[error("the key file {} is readable by others than its owner; run: chmod 600 {}", path.display(), path.display())]
    KeyExposed {
        /// Which file.
        path: PathBuf,
    },
    /// The key file holds something else.
    #[error(
        "the key file {} does not hold a key (64 hexadecimal digits); restore it from its backup, or remove it and \
         set the passwords again",
        path.display()
    )]
    KeyMalformed {
        /// Which file.
        path: PathBuf,
    },
    /// The key file cannot be read or written.
    #[error("cannot use the key file {}", path.display())]
    KeyFile {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The sealed password does not open.
    #[error(
        "the sealed password of {account} does not open: it was sealed with another key, or was changed; set it \
         again with `ucwa-relay account set-password {account}`"
    )]
    Unsealable {
        /// Whose password.
        account: SipUri,
    },
    /// `env:NAME` is not set.
    #[error(
        "the password of {account} is to come from the environment variable {name}, which is not set here"
    )]
    EnvironmentMissing {
        /// Whose password.
        account: SipUri,
        /// Which variable.
        name: String,
    },
    /// `file:PATH` cannot be read.
    #[error("the password of {account} cannot be read from {}", path.display())]
    FileUnreadable {
        /// Whose password.
        account: SipUri,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// `secret_ref` is neither `env:NAME` nor `file:PATH`.
    #[error("the password of {account} has a reference of an unknown kind; write env:NAME or file:PATH")]
    UnknownReference {
        /// Whose password.
        account: SipUri,
    },
    /// The source is there, but there is nothing in it.
    #[error("the password of {account} is empty in {place}")]
    Empty {
        /// Whose password.
        account: SipUri,
        /// Variable or file.
        place: String,
    },
    /// No password was ever given.
    #[error("{account} has no password; give it one with `ucwa-relay account set-password {account}`")]
    Missing {
        /// Whose password.
        account: SipUri,
    },
}

/// Seals and opens passwords with one key.
#[derive(Clone)]
pub struct Sealer {
    cipher: XChaCha20Poly1305,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Sealer(..)")
    }
}

impl Sealer {
    /// Reads the key file, which must be its owner's alone.
    pub fn load(path: &Path) -> Result<Self, SecretError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => SecretError::KeyMissing { path: path.to_owned() },
            _ => SecretError::KeyFile { path: path.to_owned(), source },
        };
        let mut file = std::fs::File::open(path).map_err(failed)?;
        if is_exposed(&file.metadata().map_err(failed)?) {
            return Err(SecretError::KeyExposed { path: path.to_owned() });
        }
        let mut text = Zeroizing::new(Vec::new());
        io::Read::read_to_end(&mut io::Read::take(&mut file, 1024), &mut text).map_err(failed)?;
        let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
        hex::decode_to_slice(text.trim_ascii(), key.as_mut_slice())
            .map_err(|_| SecretError::KeyMalformed { path: path.to_owned() })?;
        Ok(Self { cipher: XChaCha20Poly1305::new(&Key::from(*key)) })
    }

    /// Reads the key file, or makes one with a fresh key if there is none.
    pub fn load_or_create(path: &Path) -> Result<Self, SecretError> {
        match Self::load(path) {
            Err(SecretError::KeyMissing { .. }) => {
                create_key_file(path)
                    .map_err(|source| SecretError::KeyFile { path: path.to_owned(), source })?;
                Self::load(path)
            }
            loaded => loaded,
        }
    }

    /// Seals the password of `account`.
    ///
    /// # Panics
    /// Not for any text that fits into memory: the cipher's own limit is 256 GiB.
    pub fn seal(&self, account: &SipUri, password: &SecretString) -> Vec<u8> {
        let nonce = XNonce::generate();
        let payload = Payload { msg: password.expose_secret().as_bytes(), aad: account.as_str().as_bytes() };
        let ciphertext =
            self.cipher.encrypt(&nonce, payload).expect("only texts beyond 256 GiB cannot be sealed");
        [&[VERSION], nonce.as_slice(), &ciphertext].concat()
    }

    /// Opens what [`Self::seal`] made for the same account.
    pub fn open(&self, account: &SipUri, sealed: &[u8]) -> Result<SecretString, SecretError> {
        let unsealable = || SecretError::Unsealable { account: account.clone() };
        let Some((&VERSION, rest)) = sealed.split_first() else { return Err(unsealable()) };
        let (nonce, ciphertext) = rest.split_at_checked(NONCE_BYTES).ok_or_else(unsealable)?;
        let nonce = XNonce::try_from(nonce).map_err(|_| unsealable())?;
        let payload = Payload { msg: ciphertext, aad: account.as_str().as_bytes() };
        let password = Zeroizing::new(self.cipher.decrypt(&nonce, payload).map_err(|_| unsealable())?);
        Ok(std::str::from_utf8(&password).map_err(|_| unsealable())?.into())
    }
}

/// The password of `account`, wherever it is. `key_file` is only read for a sealed one.
pub fn resolve(
    account: &SipUri,
    source: &SecretSource,
    key_file: &Path,
) -> Result<SecretString, SecretError> {
    match source {
        SecretSource::Missing => Err(SecretError::Missing { account: account.clone() }),
        SecretSource::Sealed(sealed) => Sealer::load(key_file)?.open(account, sealed),
        SecretSource::Reference(reference) => match reference.split_once(':') {
            Some(("env", name)) => from_environment(account, name),
            Some(("file", path)) => from_file(account, Path::new(path)),
            _ => Err(SecretError::UnknownReference { account: account.clone() }),
        },
    }
}

fn from_environment(account: &SipUri, name: &str) -> Result<SecretString, SecretError> {
    let value = std::env::var(name)
        .map_err(|_| SecretError::EnvironmentMissing { account: account.clone(), name: name.to_owned() })?;
    not_empty(account, value.into(), || format!("the environment variable {name}"))
}

fn from_file(account: &SipUri, path: &Path) -> Result<SecretString, SecretError> {
    let text = std::fs::read_to_string(path).map(Zeroizing::new).map_err(|source| {
        SecretError::FileUnreadable { account: account.clone(), path: path.to_owned(), source }
    })?;
    not_empty(account, without_line_end(&text).into(), || path.display().to_string())
}

fn not_empty(
    account: &SipUri,
    password: SecretString,
    place: impl FnOnce() -> String,
) -> Result<SecretString, SecretError> {
    if password.expose_secret().is_empty() {
        return Err(SecretError::Empty { account: account.clone(), place: place() });
    }
    Ok(password)
}

/// A password without the line end that editors and `echo` put behind it. Other white space is part of it.
pub fn without_line_end(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}

/// Writes a fresh key under a name of its own and links it into place, so that nobody ever reads half a key and the
/// first of two processes wins.
fn create_key_file(path: &Path) -> io::Result<()> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".{}.new", uuid::Uuid::new_v4().simple()));
    let new = path.with_file_name(name);
    let written = write_key(&new).and_then(|()| match std::fs::hard_link(&new, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    });
    let removed = std::fs::remove_file(&new);
    written.and(removed)
}

fn write_key(path: &Path) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    let key = Zeroizing::new(<[u8; KEY_BYTES]>::from(Key::generate()));
    let text = Zeroizing::new(hex::encode(*key));
    file.write_all(text.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()
}

#[cfg(unix)]
fn is_exposed(metadata: &std::fs::Metadata) -> bool {
    std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o077 != 0
}

#[cfg(not(unix))]
fn is_exposed(_: &std::fs::Metadata) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alice() -> SipUri {
        "sip:alice@contoso.com".parse().unwrap()
    }

    #[test]
    fn a_password_opens_with_the_same_key_for_the_same_account_only() {
        let folder = tempfile::tempdir().unwrap();
        let key = Sealer::load_or_create(&folder.path().join("a.key")).unwrap();
        let sealed = key.seal(&alice(), &"pässwörd ".into());
        assert_ne!(sealed, key.seal(&alice(), &"pässwörd ".into()), "every nonce is fresh");

        let again = Sealer::load(&folder.path().join("a.key")).unwrap();
        assert_eq!(again.open(&alice(), &sealed).unwrap().expose_secret(), "pässwörd ");

        let bob = "sip:bob@contoso.com".parse().unwrap();
        assert!(key.open(&bob, &sealed).is_err(), "copied to another account");
        let other = Sealer::load_or_create(&folder.path().join("b.key")).unwrap();
        assert!(other.open(&alice(), &sealed).is_err(), "another key");
        for index in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[index] ^= 1;
            assert!(key.open(&alice(), &changed).is_err(), "byte {index} changed");
        }
        for length in [0, 1, 24, 25, sealed.len() - 1] {
            let error = key.open(&alice(), &sealed[..length]).unwrap_err().to_string();
            assert!(error.contains("sip:alice@contoso.com") && error.contains("set-password"), "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn the_key_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relay.key");
        Sealer::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");

        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let error = Sealer::load_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_key_file_that_is_missing_or_damaged_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relay.key");
        assert!(matches!(Sealer::load(&path), Err(SecretError::KeyMissing { .. })));
        Sealer::load_or_create(&path).unwrap();
        std::fs::write(&path, "not a key").unwrap();
        let error = Sealer::load_or_create(&path).unwrap_err();
        assert!(matches!(error, SecretError::KeyMalformed { .. }), "{error}");
        assert!(matches!(
            Sealer::load_or_create(&folder.path().join("no/such/folder.key")),
            Err(SecretError::KeyFile { .. })
        ));
    }

    #[test]
    fn two_that_create_the_key_at_once_get_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relay.key");
        let sealers: Vec<Sealer> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| Sealer::load_or_create(&path).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let sealed = sealers[0].seal(&alice(), &"x".into());
        assert!(sealers.iter().all(|sealer| sealer.open(&alice(), &sealed).is_ok()));
    }

    #[test]
    fn references_are_followed_at_the_last_moment() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        std::fs::write(&file, " with spaces \r\n").unwrap();
        let no_key = Path::new("/does/not/exist");
        let look_up = |reference: &str| resolve(&alice(), &SecretSource::Reference(reference.into()), no_key);

        let found = look_up(&format!("file:{}", file.display())).unwrap();
        assert_eq!(found.expose_secret(), " with spaces ");
        // Cargo sets this one for tests.
        assert_eq!(look_up("env:CARGO_PKG_NAME").unwrap().expose_secret(), "ucwa-relay");

        std::fs::write(&file, "\n").unwrap();
        for (reference, named) in [
            ("env:UCWA_RELAY_TEST_UNSET", "UCWA_RELAY_TEST_UNSET"),
            ("file:/does/not/exist", "/does/not/exist"),
            (&*format!("file:{}", file.display()), "is empty"),
            ("vault:x", "env:NAME or file:PATH"),
        ] {
            let error = look_up(reference).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("sip:alice@contoso.com"), "{error}");
        }
        let error = resolve(&alice(), &SecretSource::Missing, no_key).unwrap_err().to_string();
        assert!(error.contains("account set-password"), "{error}");
    }
}
