//! Account passwords: sealed with a key that is never in the database, or referred to and read at the last moment.
//!
//! A sealed password is `version (1 byte) | mark (16) | nonce (24) | ciphertext and tag`, by XChaCha20-Poly1305 under a
//! key of `secrets.key_file`, with mark and SIP URI of the account as associated data: a sealed value that is copied to
//! another account does not open there. The mark is drawn when a password is set and stays when it is sealed anew, so that
//! a running server can tell that the password is still the same. Version 1 had none.
//!
//! The key file, readable by its owner only, is a line of 64 hexadecimal digits for each key, the newest first: that one
//! seals, each of them opens. There is more than one only while passwords are being resealed ([`rotation`]). Whoever
//! seals and stores a password holds the file ([`KeyHold`]) until it is stored, so that no key goes meanwhile.
//!
//! Everything here reads small files: from an actor, call it by way of `spawn_blocking`. Errors name the account and
//! the source, never the content.

pub mod rotation;

use std::{
    fmt,
    fs::File,
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

const VERSION: u8 = 2;
const VERSION_WITHOUT_MARK: u8 = 1;
const MARK_BYTES: usize = 16;
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
        "the key file {} does not hold keys (64 hexadecimal digits on each line); restore it from its backup, or remove it and \
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
    /// `credential:NAME`, but systemd gave this process no credentials.
    #[error(
        "the password of {account} is to come from the systemd credential {name}, but systemd gave this process none \
         ($CREDENTIALS_DIRECTORY is not set): write LoadCredential={name}:FILE, or LoadCredentialEncrypted=, into the \
         [Service] section of the unit and restart it; for a command beside the service, set CREDENTIALS_DIRECTORY to that \
         of the running unit, below /run/credentials"
    )]
    NoCredentials {
        /// Whose password.
        account: SipUri,
        /// Which credential.
        name: String,
    },
    /// `credential:NAME` cannot be read.
    #[error(
        "the password of {account} cannot be read from the systemd credential {name} ({}): write LoadCredential={name}:FILE, \
         or LoadCredentialEncrypted=, into the [Service] section of the unit and restart it",
        path.display()
    )]
    CredentialUnreadable {
        /// Whose password.
        account: SipUri,
        /// Which credential.
        name: String,
        /// The file in which it would be.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// `secret_ref` is none of `env:NAME`, `file:PATH` and `credential:NAME`.
    #[error(
        "the password of {account} has a reference of an unknown kind; write env:NAME, file:PATH or credential:NAME"
    )]
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

/// Seals passwords with the newest key and opens them with any.
#[derive(Clone)]
pub struct Sealer {
    /// The newest first; never empty.
    ciphers: Vec<XChaCha20Poly1305>,
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
        let mut file = File::open(path).map_err(failed)?;
        if is_exposed(&file.metadata().map_err(failed)?) {
            return Err(SecretError::KeyExposed { path: path.to_owned() });
        }
        let mut text = Zeroizing::new(Vec::new());
        io::Read::read_to_end(&mut io::Read::take(&mut file, 1024), &mut text).map_err(failed)?;
        let keys = read_keys(&text).ok_or_else(|| SecretError::KeyMalformed { path: path.to_owned() })?;
        Ok(Self::of(&keys))
    }

    fn of(keys: &[Zeroizing<[u8; KEY_BYTES]>]) -> Self {
        Self { ciphers: keys.iter().map(|key| XChaCha20Poly1305::new(&Key::from(**key))).collect() }
    }

    /// How many keys there are.
    pub fn keys(&self) -> usize {
        self.ciphers.len()
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
        self.seal_marked(account, password, *uuid::Uuid::new_v4().as_bytes())
    }

    fn seal_marked(&self, account: &SipUri, password: &SecretString, mark: [u8; MARK_BYTES]) -> Vec<u8> {
        let nonce = XNonce::generate();
        let bound = [&mark, account.as_str().as_bytes()].concat();
        let payload = Payload { msg: password.expose_secret().as_bytes(), aad: &bound };
        let ciphertext =
            self.ciphers[0].encrypt(&nonce, payload).expect("only texts beyond 256 GiB cannot be sealed");
        [&[VERSION], mark.as_slice(), nonce.as_slice(), &ciphertext].concat()
    }

    /// Seals the same password anew, with the newest key.
    pub fn reseal(&self, account: &SipUri, sealed: &[u8]) -> Result<Vec<u8>, SecretError> {
        let password = self.open(account, sealed)?;
        Ok(match mark_of(sealed) {
            Some(mark) => self.seal_marked(account, &password, mark),
            None => self.seal(account, &password),
        })
    }

    /// Opens what [`Self::seal`] made for the same account.
    pub fn open(&self, account: &SipUri, sealed: &[u8]) -> Result<SecretString, SecretError> {
        let unsealable = || SecretError::Unsealable { account: account.clone() };
        let (mark, rest) = match sealed.split_first() {
            Some((&VERSION, rest)) => rest.split_at_checked(MARK_BYTES).ok_or_else(unsealable)?,
            Some((&VERSION_WITHOUT_MARK, rest)) => (&[][..], rest),
            _ => return Err(unsealable()),
        };
        let (nonce, ciphertext) = rest.split_at_checked(NONCE_BYTES).ok_or_else(unsealable)?;
        let nonce = XNonce::try_from(nonce).map_err(|_| unsealable())?;
        let bound = [mark, account.as_str().as_bytes()].concat();
        let opened = self
            .ciphers
            .iter()
            .find_map(|cipher| cipher.decrypt(&nonce, Payload { msg: ciphertext, aad: &bound }).ok());
        let password = Zeroizing::new(opened.ok_or_else(unsealable)?);
        Ok(std::str::from_utf8(&password).map_err(|_| unsealable())?.into())
    }
}

/// What tells that a password is the same although it was sealed anew; nothing for one sealed by version 1.
fn mark_of(sealed: &[u8]) -> Option<[u8; MARK_BYTES]> {
    match sealed.split_first() {
        Some((&VERSION, rest)) => rest.first_chunk().copied(),
        _ => None,
    }
}

/// Whether both are certainly the same password, although perhaps sealed with different keys.
pub fn is_same_password(one: &SecretSource, other: &SecretSource) -> bool {
    match (one, other) {
        (SecretSource::Sealed(one), SecretSource::Sealed(other)) => {
            one == other || mark_of(one).is_some_and(|mark| mark_of(other) == Some(mark))
        }
        _ => one == other,
    }
}

/// Keeps the keys of a key file where they are: whoever holds it knows that what it sealed can be opened until it lets
/// go. Rotation waits for all who hold it, and they for it.
#[derive(Debug)]
pub struct KeyHold {
    /// Locked until it is closed.
    _file: File,
}

impl KeyHold {
    /// Waits while somebody changes the keys. The file must be there.
    pub fn shared(path: &Path) -> Result<Self, SecretError> {
        Self::take(path, File::lock_shared)
    }

    /// Waits until nobody else holds it.
    fn alone(path: &Path) -> Result<Self, SecretError> {
        Self::take(path, File::lock)
    }

    fn take(path: &Path, lock: impl Fn(&File) -> io::Result<()>) -> Result<Self, SecretError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => SecretError::KeyMissing { path: path.to_owned() },
            _ => SecretError::KeyFile { path: path.to_owned(), source },
        };
        loop {
            let file = File::open(path).map_err(failed)?;
            lock(&file).map_err(failed)?;
            // Another file may have come into its place while this one was waited for.
            if is_same_file(&file.metadata().map_err(failed)?, &std::fs::metadata(path).map_err(failed)?) {
                return Ok(Self { _file: file });
            }
        }
    }
}

#[cfg(unix)]
fn is_same_file(one: &std::fs::Metadata, other: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(not(unix))]
fn is_same_file(_: &std::fs::Metadata, _: &std::fs::Metadata) -> bool {
    true
}

fn read_keys(text: &[u8]) -> Option<Vec<Zeroizing<[u8; KEY_BYTES]>>> {
    text.trim_ascii()
        .split(|byte| *byte == b'\n')
        .map(|line| {
            let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
            hex::decode_to_slice(line.trim_ascii(), key.as_mut_slice()).ok()?;
            Some(key)
        })
        .collect()
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
            Some(("credential", name)) if is_credential_name(name) => from_credential(account, name),
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

/// The directory in which systemd puts a unit's credentials (systemd.exec(5), `LoadCredential=`).
const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// The file of a systemd credential, if systemd gave this process any.
pub(crate) fn credential_file(name: &str) -> Option<PathBuf> {
    let directory = std::env::var_os(CREDENTIALS_DIRECTORY).filter(|directory| !directory.is_empty())?;
    Some(Path::new(&directory).join(name))
}

/// As systemd allows them: printable ASCII that names a file of one directory.
pub(crate) fn is_credential_name(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':')
        && !matches!(name, "." | "..")
}

fn from_credential(account: &SipUri, name: &str) -> Result<SecretString, SecretError> {
    let Some(path) = credential_file(name) else {
        return Err(SecretError::NoCredentials { account: account.clone(), name: name.to_owned() });
    };
    let text = std::fs::read_to_string(&path).map(Zeroizing::new).map_err(|source| {
        SecretError::CredentialUnreadable { account: account.clone(), name: name.to_owned(), path, source }
    })?;
    not_empty(account, without_line_end(&text).into(), || format!("the systemd credential {name}"))
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
    let written = write_keys(&new, &[Zeroizing::new(Key::generate().into())]).map(drop).and_then(|()| {
        match std::fs::hard_link(&new, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        }
    });
    let removed = std::fs::remove_file(&new);
    // What the key seals is soon in the database, for good.
    written.and(removed).and_then(|()| keep_name(path))
}

/// Brings to the disk that a file of this name is there: the name stands in the directory, not in the file.
#[cfg(unix)]
fn keep_name(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

/// Directories can't be opened there.
#[cfg(not(unix))]
fn keep_name(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Writes a file that is its owner's alone, and on the disk when this returns.
fn write_keys(path: &Path, keys: &[Zeroizing<[u8; KEY_BYTES]>]) -> io::Result<File> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    for key in keys {
        let line = Zeroizing::new(hex::encode(**key));
        file.write_all(line.as_bytes())?;
        file.write_all(b"\n")?;
    }
    file.sync_all()?;
    Ok(file)
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
        for length in [0, 1, 16, 17, 40, 41, sealed.len() - 1] {
            let error = key.open(&alice(), &sealed[..length]).unwrap_err().to_string();
            assert!(error.contains("sip:alice@contoso.com") && error.contains("set-password"), "{error}");
        }
    }

    #[test]
    fn what_was_sealed_without_a_mark_still_opens() {
        let key = Zeroizing::new([7_u8; KEY_BYTES]);
        let cipher = XChaCha20Poly1305::new(&Key::from(*key));
        let nonce = XNonce::generate();
        let account = alice();
        let payload = Payload { msg: b"old", aad: account.as_str().as_bytes() };
        let ciphertext = cipher.encrypt(&nonce, payload).unwrap();
        let sealed = [&[1][..], nonce.as_slice(), &ciphertext].concat();
        let keys = Sealer::of(&[key]);
        assert_eq!(keys.open(&alice(), &sealed).unwrap().expose_secret(), "old");
        let resealed = keys.reseal(&alice(), &sealed).unwrap();
        assert_eq!(keys.open(&alice(), &resealed).unwrap().expose_secret(), "old");
        let (old, new) = (SecretSource::Sealed(sealed), SecretSource::Sealed(resealed.clone()));
        assert!(!is_same_password(&old, &new), "nothing tells so");
        let again = SecretSource::Sealed(keys.reseal(&alice(), &resealed).unwrap());
        assert!(new != again && is_same_password(&new, &again));
        let another = SecretSource::Sealed(keys.seal(&alice(), &"old".into()));
        assert!(!is_same_password(&new, &another), "it was set anew");
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
            ("vault:x", "env:NAME, file:PATH or credential:NAME"),
            ("credential:../shadow", "credential:NAME"),
            ("credential:", "credential:NAME"),
        ] {
            let error = look_up(reference).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("sip:alice@contoso.com"), "{error}");
        }
        let error = resolve(&alice(), &SecretSource::Missing, no_key).unwrap_err().to_string();
        assert!(error.contains("account set-password"), "{error}");
    }
}
