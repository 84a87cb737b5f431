//! Seals: signed checkpoints of all chain heads, to be kept where nobody who can write the database can write.
//!
//! What is signed (Ed25519, RFC 8032) is this text in UTF-8, each line with its line feed:
//!
//! ```text
//! ucwa-relay-seal/1
//! 2026-11-22T16:41:07.123Z
//! sip:alice@contoso.com 4711 <chain_hash of message 4711>
//! ```
//!
//! The third line is there once for each account, in the order of the file. The key file holds the 32 secret bytes as
//! 64 hexadecimal digits and is readable by its owner only.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::{Context, bail, ensure};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    archive::{chain::GENESIS, text::iso_milliseconds},
    store::{Head, Store},
};

/// First line of what is signed, and `format` of the file.
const FORMAT: &str = "ucwa-relay-seal/1";

/// The head of one account's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedHead {
    /// SIP URI.
    pub account: String,
    /// Number of the newest chained message, 0 if there is none.
    pub seq: i64,
    /// Its `chain_hash`.
    pub chain_hash: String,
}

/// A seal as its file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    format: String,
    /// When it was made, by the clock of who made it.
    pub created_at: String,
    /// By account.
    pub heads: Vec<SealedHead>,
    /// 64 hexadecimal digits.
    pub public_key: String,
    signature: String,
}

impl Seal {
    /// Seals the heads of all chains as they are now.
    pub async fn of(store: &dyn Store, key: &SigningKey, at: Timestamp) -> anyhow::Result<Self> {
        let mut heads = Vec::new();
        for account in store.archived_accounts().await? {
            let head = store.chain_head(account.id).await?;
            let head = head.unwrap_or_else(|| Head { seq: 0, hash: GENESIS.to_owned() });
            heads.push(SealedHead { account: account.uri, seq: head.seq, chain_hash: head.hash });
        }
        Ok(Self::signed(heads, key, at))
    }

    fn signed(heads: Vec<SealedHead>, key: &SigningKey, at: Timestamp) -> Self {
        let mut seal = Self {
            format: FORMAT.to_owned(),
            created_at: iso_milliseconds(at),
            heads,
            public_key: hex::encode(key.verifying_key().as_bytes()),
            signature: String::new(),
        };
        seal.signature = hex::encode(key.sign(seal.signed_text().as_bytes()).to_bytes());
        seal
    }

    /// Where the seal says that an account's chain was.
    pub fn head(&self, account: &str) -> Option<Head> {
        self.heads
            .iter()
            .find(|head| head.account == account && head.seq > 0)
            .map(|head| Head { seq: head.seq, hash: head.chain_hash.clone() })
    }

    fn signed_text(&self) -> String {
        let mut text = format!("{}\n{}\n", self.format, self.created_at);
        for head in &self.heads {
            let _infallible = writeln!(text, "{} {} {}", head.account, head.seq, head.chain_hash);
        }
        text
    }

    /// Reads a seal and checks its signature: by one of `public_keys` if there are any, else by the key that it carries.
    ///
    /// # Errors
    /// If it can't be read, was changed, or was signed by another key.
    pub fn read(path: &Path, public_keys: &BTreeSet<String>) -> anyhow::Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read the seal {}", path.display()))?;
        let seal: Self =
            serde_json::from_str(&text).with_context(|| format!("{} is not a seal", path.display()))?;
        seal.check(public_keys).with_context(|| format!("the seal {} is not good", path.display()))?;
        Ok(seal)
    }

    fn check(&self, public_keys: &BTreeSet<String>) -> anyhow::Result<()> {
        ensure!(self.format == FORMAT, "its format is {:?}, this program knows {FORMAT}", self.format);
        if !public_keys.is_empty() && !public_keys.contains(&self.public_key.to_ascii_lowercase()) {
            let expected: Vec<&str> = public_keys.iter().map(String::as_str).collect();
            bail!("it was signed with the key {}, not with {}", self.public_key, expected.join(" or "));
        }
        let key: [u8; 32] = bytes(&self.public_key).context("its public key is malformed")?;
        let key = VerifyingKey::from_bytes(&key).context("its public key is no key")?;
        let signature: [u8; 64] = bytes(&self.signature).context("its signature is malformed")?;
        key.verify_strict(self.signed_text().as_bytes(), &Signature::from_bytes(&signature))
            .context("its signature does not fit: it was changed after it was made")
    }

    /// Writes the file; one that is there is not overwritten, because it may be the older proof.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut file = fs::File::create_new(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                anyhow::anyhow!(
                    "{} is there already; an older seal is never overwritten, choose another name",
                    path.display()
                )
            }
            _ => anyhow::Error::new(error).context(format!("cannot create {}", path.display())),
        })?;
        file.write_all(serde_json::to_string_pretty(self)?.as_bytes())
            .and_then(|()| file.write_all(b"\n"))
            .and_then(|()| file.sync_all())
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

pub(super) fn bytes<const N: usize>(text: &str) -> anyhow::Result<[u8; N]> {
    let bytes = hex::decode(text)?;
    bytes.try_into().map_err(|bytes: Vec<u8>| anyhow::anyhow!("{} bytes instead of {N}", bytes.len()))
}

/// The key that signs seals and tombstones: the one in the file, or a new one where there is no file. Gives whether it is new.
pub fn load_or_create_key(path: &Path) -> anyhow::Result<(SigningKey, bool)> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let text = Zeroizing::new(text);
            ensure_private(path)?;
            let secret: Zeroizing<[u8; 32]> = Zeroizing::new(bytes(text.trim()).ok().with_context(|| {
                format!("the key file {} does not hold a key (64 hexadecimal digits)", path.display())
            })?);
            Ok((SigningKey::from_bytes(&secret), false))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = Zeroizing::new(rand::random::<[u8; 32]>());
            create_private(path, Zeroizing::new(hex::encode(*secret) + "\n").as_bytes())
                .with_context(|| format!("cannot create the key file {}", path.display()))?;
            Ok((SigningKey::from_bytes(&secret), true))
        }
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("cannot read the key file {}", path.display())))
        }
    }
}

/// The public half of the key in the file, for who checks; none where there is no file, or it is not for this user.
///
/// # Errors
/// It is there and can't be read, or holds no key.
pub fn known_public_key(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::metadata(path).and_then(|_| fs::File::open(path)) {
        Ok(_) => {
            let (key, _) = load_or_create_key(path)?;
            Ok(Some(hex::encode(key.verifying_key().as_bytes())))
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            Ok(None)
        }
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("cannot read the key file {}", path.display())))
        }
    }
}

#[cfg(unix)]
fn ensure_private(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(path)?.permissions().mode();
    // The six bits for group and others.
    ensure!(
        mode.trailing_zeros() >= 6,
        "the key file {0} is readable by others than its owner; run: chmod 600 {0}",
        path.display()
    );
    Ok(())
}

#[cfg(not(unix))]
fn ensure_private(_: &Path) -> anyhow::Result<()> {
    Ok(())
}

fn create_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads() -> Vec<SealedHead> {
        vec![SealedHead { account: "sip:alice@contoso.com".into(), seq: 7, chain_hash: "ab".repeat(32) }]
    }

    #[test]
    fn a_seal_is_good_only_as_it_was_made_and_for_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let (key, new) = load_or_create_key(&folder.path().join("a.key")).unwrap();
        let (again, old) = load_or_create_key(&folder.path().join("a.key")).unwrap();
        assert!(new && !old && key == again);
        let path = folder.path().join("seal.json");
        Seal::signed(heads(), &key, Timestamp::UNIX_EPOCH).write(&path).unwrap();
        let public = hex::encode(key.verifying_key().as_bytes());
        let seal = Seal::read(&path, &BTreeSet::from([public])).unwrap();
        assert_eq!(seal.head("sip:alice@contoso.com").unwrap().seq, 7);
        assert!(seal.write(&path).unwrap_err().to_string().contains("never overwritten"));

        let other = hex::encode(SigningKey::from_bytes(&[1; 32]).verifying_key().as_bytes());
        assert!(
            format!("{:#}", Seal::read(&path, &BTreeSet::from([other])).unwrap_err())
                .contains("signed with the key")
        );
        let changed = fs::read_to_string(&path).unwrap().replace("\"seq\": 7", "\"seq\": 6");
        fs::write(&path, changed).unwrap();
        assert!(
            format!("{:#}", Seal::read(&path, &BTreeSet::new()).unwrap_err())
                .contains("changed after it was made")
        );
    }

    #[cfg(unix)]
    #[test]
    fn the_key_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.key");
        load_or_create_key(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        assert!(load_or_create_key(&path).unwrap_err().to_string().contains("chmod 600"));
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        fs::write(&path, "secret").unwrap();
        let refused = format!("{:#}", load_or_create_key(&path).unwrap_err());
        assert!(refused.contains("does not hold a key") && !refused.contains("secret"), "{refused}");
    }
}
