//! Another key for all sealed passwords.
//!
//! A new key is put in front of the old ones in the key file; then one transaction seals every password with it; then the
//! old keys go. Each of the three happens wholly or not at all, and between any two of them the key file opens every
//! password: so this may end anywhere, and be begun again where it ended. A running server reads the key file at each
//! sign-in and goes on; where servers have copies of the file, these have to get the new key between the first step and
//! the second ([`prepare`]).

use std::{io, path::Path};

use chacha20poly1305::{Key, aead::Generate};
use zeroize::Zeroizing;

use super::{KeyHold, Sealer, SecretError, keep_name, read_keys, write_keys};
use crate::{
    identifiers::SipUri,
    store::{Resealed, SealedSecret, SecretStore, StoreError},
};

/// How often passwords are read again that were set by somebody who does not hold the key file.
const ROUNDS: usize = 3;

/// Why the key was not changed.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// The key file can't be used.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The database could not be read or written. The key file opens every password.
    #[error("the passwords are not all resealed; the key file opens them all, run this command again")]
    Store(#[from] StoreError),
    /// Some passwords don't open with any key.
    #[error(
        "nothing was changed: the key file does not open the sealed passwords of {}; set them again with `ucwa-relay \
         account set-password`, or remove these accounts, and run this command again",
        .0.join(", ")
    )]
    Unsealable(Vec<String>),
    /// Passwords were sealed with an old key while this ran.
    #[error(
        "passwords are being sealed with an old key, by a program with another copy of the key file; the old keys stay, \
         so that they open: run this command again once all have the same file"
    )]
    KeptOld,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotated {
    /// Passwords that were sealed anew.
    pub resealed: usize,
    /// A new key had been put into the file before, by [`prepare`] or a run that was interrupted.
    pub resumed: bool,
}

/// Puts a new key in front of the others, and does nothing else. `false` if one waits there already.
///
/// # Errors
/// [`SecretError`] if the file can't be read or written; it is then as it was.
pub fn prepare(path: &Path) -> Result<bool, SecretError> {
    let _hold = KeyHold::alone(path)?;
    Ok(add_key(path)?.is_some())
}

/// Changes the key.
///
/// # Errors
/// [`RotationError`]; whatever it is, the key file opens what it opened before.
pub async fn rotate(path: &Path, store: &dyn SecretStore) -> Result<Rotated, RotationError> {
    let _hold = KeyHold::alone(path)?;
    // Before anything is changed.
    let known = Sealer::load(path)?;
    open_all(&known, &store.sealed_secrets().await?)?;
    let hold_of_new = add_key(path)?;
    let resumed = hold_of_new.is_none();
    let keys = Sealer::load(path)?;
    let newest = keys.newest();
    let mut resealed = 0;
    for _ in 0..ROUNDS {
        let secrets = store.sealed_secrets().await?;
        let addresses = open_all(&keys, &secrets)?;
        let stale: Vec<Resealed> = secrets
            .into_iter()
            .zip(addresses)
            .filter(|(secret, address)| newest.open(address, &secret.sealed).is_err())
            .map(|(secret, address)| {
                Ok(Resealed { new: keys.reseal(&address, &secret.sealed)?, old: secret })
            })
            .collect::<Result<_, SecretError>>()?;
        if stale.is_empty() {
            drop_old_keys(path)?;
            drop(hold_of_new);
            return Ok(Rotated { resealed, resumed });
        }
        resealed += stale.len();
        store.replace_sealed(&stale).await?;
    }
    Err(RotationError::KeptOld)
}

impl Sealer {
    /// With the newest key alone.
    fn newest(&self) -> Self {
        Self { ciphers: self.ciphers[..1].to_vec() }
    }
}

/// The addresses of these accounts, if their passwords all open.
fn open_all(sealer: &Sealer, secrets: &[SealedSecret]) -> Result<Vec<SipUri>, RotationError> {
    let mut refused = Vec::new();
    let mut addresses = Vec::new();
    for secret in secrets {
        match secret.sip_uri.parse::<SipUri>() {
            Ok(address) if sealer.open(&address, &secret.sealed).is_ok() => addresses.push(address),
            _ => refused.push(secret.sip_uri.clone()),
        }
    }
    if refused.is_empty() { Ok(addresses) } else { Err(RotationError::Unsealable(refused)) }
}

/// Puts a new key in front, unless one waits there already. Whoever comes for the new file waits for the hold.
fn add_key(path: &Path) -> Result<Option<KeyHold>, SecretError> {
    change(path, |mut keys| {
        if keys.len() > 1 {
            return None;
        }
        keys.insert(0, Zeroizing::new(Key::generate().into()));
        Some(keys)
    })
}

fn drop_old_keys(path: &Path) -> Result<Option<KeyHold>, SecretError> {
    change(path, |mut keys| {
        keys.truncate(1);
        Some(keys)
    })
}

type Keys = Vec<Zeroizing<[u8; super::KEY_BYTES]>>;

/// Puts a file with other keys into the place of the key file, at once and for good, and holds it. Nothing changes where
/// `changed` says so.
fn change(path: &Path, changed: impl FnOnce(Keys) -> Option<Keys>) -> Result<Option<KeyHold>, SecretError> {
    let failed = |source| SecretError::KeyFile { path: path.to_owned(), source };
    let text = Zeroizing::new(std::fs::read(path).map_err(failed)?);
    let keys = read_keys(&text).ok_or_else(|| SecretError::KeyMalformed { path: path.to_owned() })?;
    let Some(keys) = changed(keys) else { return Ok(None) };
    // A key file may be a link; what it leads to is replaced.
    let place = path.canonicalize().map_err(failed)?;
    let mut name = place.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?.to_owned();
    name.push(format!(".{}.new", uuid::Uuid::new_v4().simple()));
    let new = place.with_file_name(name);
    let replace = || {
        let file = write_keys(&new, &keys)?;
        keep_owner(&place, &file)?;
        file.lock()?;
        std::fs::rename(&new, &place)?;
        // Before the database forgets the old keys.
        keep_name(&place)?;
        Ok(KeyHold { _file: file })
    };
    replace().map(Some).map_err(|source| {
        // It may not have come into being, or have gone into its place.
        let _ = std::fs::remove_file(&new);
        failed(source)
    })
}

/// A superuser who changes the keys leaves them to whom they belonged.
#[cfg(unix)]
fn keep_owner(place: &Path, new: &std::fs::File) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};
    let (old, ours) = (std::fs::metadata(place)?, new.metadata()?);
    if (old.uid(), old.gid()) == (ours.uid(), ours.gid()) {
        return Ok(());
    }
    fchown(new, Some(old.uid()), Some(old.gid()))
}

#[cfg(not(unix))]
fn keep_owner(_: &Path, _: &std::fs::File) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{File, TryLockError};

    use super::*;

    #[test]
    fn keys_stay_while_somebody_stores_what_he_sealed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relay.key");
        Sealer::load_or_create(&path).unwrap();
        let storing = KeyHold::shared(&path).unwrap();
        let another = KeyHold::shared(&path).unwrap();
        let rotating = File::open(&path).unwrap();
        assert!(matches!(rotating.try_lock(), Err(TryLockError::WouldBlock)), "rotation has to wait");
        drop((storing, another));
        rotating.try_lock().unwrap();
    }

    #[test]
    fn a_file_that_takes_the_place_of_the_key_file_is_held_from_its_first_moment() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relay.key");
        Sealer::load_or_create(&path).unwrap();
        let hold = add_key(&path).unwrap().unwrap();
        assert!(matches!(File::open(&path).unwrap().try_lock_shared(), Err(TryLockError::WouldBlock)));
        drop(hold);
        KeyHold::shared(&path).unwrap();
        assert_eq!(Sealer::load(&path).unwrap().keys(), 2);
        assert!(add_key(&path).unwrap().is_none(), "a new key waits there already");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_a_link_and_the_file_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("relay.key"), folder.path().join("link"));
        let account: SipUri = "sip:alice@contoso.com".parse().unwrap();
        let sealed = Sealer::load_or_create(&path).unwrap().seal(&account, &"x".into());
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(prepare(&link).unwrap());
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let both = Sealer::load(&path).unwrap();
        assert!(both.open(&account, &sealed).is_ok() && both.newest().open(&account, &sealed).is_err());
    }
}
