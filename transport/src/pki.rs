//! Makes the certificates that nodes show to one another: `pki init` and `pki issue`.
//!
//! An authority of its own for each cluster, ECDSA P-256. What counts in the end is the key's pin
//! in the configuration (see [`tls`](crate::tls)); the authority only keeps strangers out of the
//! handshake. Certificates do not expire: a key is withdrawn by removing its pin.
//!
//! The authority's name and parameters are fixed, so that issuing needs its key and nothing else.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};

use crate::tls::KeyPin;

/// Common name of every authority that `init` makes.
const AUTHORITY_NAME: &str = "hn4-replicad authority";

/// Why a certificate was not made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The node's name can not stand in a certificate.
    #[error(
        "\"{name}\" cannot be a node name: use letters, digits, \"-\" and \".\", at most 63 \
         characters, beginning and ending with a letter or digit"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// The authority's key can not be read, or something went wrong while signing.
    #[error("{doing}: {source}")]
    Certificate {
        /// What was being done.
        doing: &'static str,
        /// What went wrong.
        source: rcgen::Error,
    },
}

/// A certificate with its private key, as PEM texts.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key, PKCS #8. To be written with [`write_secret`].
    pub key_pem: String,
    /// Pin of the key, for the configuration of peers.
    pub pin: KeyPin,
}

/// Makes an authority.
///
/// # Errors
///
/// If the system gives no random numbers.
pub fn init_authority() -> Result<Issued, PkiError> {
    let doing = "making the authority";
    let wrap = |source| PkiError::Certificate { doing, source };
    let key = KeyPair::generate().map_err(wrap)?;
    let certificate = authority_params().self_signed(&key).map_err(wrap)?;
    Ok(issued(certificate.pem(), &key))
}

/// Makes a key and a certificate for a node, signed by the authority with this key.
///
/// # Errors
///
/// If the name is unfit, or the authority's key unreadable.
pub fn issue_node(authority_key_pem: &str, name: &str) -> Result<Issued, PkiError> {
    check_name(name)?;
    let authority_key =
        KeyPair::from_pem(authority_key_pem).map_err(|source| PkiError::Certificate {
            doing: "reading the authority's key",
            source,
        })?;
    let issuer = Issuer::new(authority_params(), authority_key);
    let doing = "making the node's certificate";
    let wrap = |source| PkiError::Certificate { doing, source };
    let key = KeyPair::generate().map_err(wrap)?;
    let mut params = CertificateParams::new(vec![name.to_owned()]).map_err(wrap)?;
    params.distinguished_name = common_name(name);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let certificate = params.signed_by(&key, &issuer).map_err(wrap)?;
    Ok(issued(certificate.pem(), &key))
}

/// Whether a name can stand in a certificate and be asked for in a handshake.
///
/// # Errors
///
/// If it can not.
pub fn check_name(name: &str) -> Result<(), PkiError> {
    let is_legal = |character: char| character.is_ascii_alphanumeric() || "-.".contains(character);
    let is_edge = |character: Option<char>| {
        character.is_some_and(|character| character.is_ascii_alphanumeric())
    };
    let is_good = name.len() <= 63
        && name.chars().all(is_legal)
        && is_edge(name.chars().next())
        && is_edge(name.chars().next_back())
        // A name of digits and dots would be taken for an address.
        && name.chars().any(|character| character.is_ascii_alphabetic())
        && !name.contains("..");
    if is_good {
        Ok(())
    } else {
        Err(PkiError::BadName {
            name: name.to_owned(),
        })
    }
}

/// Writes a private key to a new file that only its owner can read.
///
/// # Errors
///
/// If the file exists already, or can not be written.
pub fn write_secret(path: &Path, pem: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(pem.as_bytes())?;
    file.sync_all()
}

/// Writes a certificate to a new file.
///
/// # Errors
///
/// If the file exists already, or can not be written.
pub fn write_certificate(path: &Path, pem: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.write_all(pem.as_bytes())?;
    file.sync_all()
}

fn issued(certificate_pem: String, key: &KeyPair) -> Issued {
    let pin = KeyPin::of_public_key(&key.subject_public_key_info());
    Issued {
        certificate_pem,
        key_pem: key.serialize_pem(),
        pin,
    }
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(AUTHORITY_NAME);
    // It signs nodes, not further authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::tls::Identity;

    #[test]
    fn an_issued_certificate_is_usable_and_has_the_pin_it_was_issued_with() {
        let authority = init_authority().expect("an authority");
        let node = issue_node(&authority.key_pem, "node-a").expect("a node");
        let identity = Identity::from_pem(
            node.certificate_pem.as_bytes(),
            node.key_pem.as_bytes(),
            authority.certificate_pem.as_bytes(),
        )
        .expect("an identity");
        assert_eq!(identity.pin(), node.pin);
        assert!(identity.client_config(node.pin, b"x").is_ok());
    }

    #[test]
    fn names_that_cannot_stand_in_a_certificate_are_refused() {
        for good in ["a", "node-1", "n1.rack2.example"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a.",
            "a b",
            "a..b",
            "10.0.0.1",
            "a_b",
            &"a".repeat(64),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_secret_is_private_and_never_overwrites() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("node.key");
        write_secret(&path, "secret").expect("a new file");
        let mode = std::fs::metadata(&path)
            .expect("the file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = write_secret(&path, "other").expect_err("the file exists");
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn bad_key_material_is_an_error_that_names_it() {
        let error = Identity::from_pem(b"x", b"y", b"z").expect_err("no PEM");
        assert!(error.to_string().contains("node certificate"), "{error}");
        let missing = Path::new("does/not/exist.pem");
        let error = Identity::from_files(missing, missing, missing).expect_err("no file");
        assert!(error.to_string().contains("does/not/exist.pem"), "{error}");
    }
}
