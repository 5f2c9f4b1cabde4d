//! Who is on the other side: TLS 1.3 with mutual certificates and pinned keys.
//!
//! A certificate that the authority has signed proves nothing here by itself. The SHA-256 of a
//! node's public key is *pinned* in the configuration to the node's name (and from there to
//! volumes); the handshake fails unless the key on the other side is pinned. So an unknown peer,
//! even one with a valid certificate, gets no stream, no hello, and no hint which volumes exist.
//!
//! One provider (aws-lc-rs), TLS 1.3 only, key exchange X25519MLKEM768 only: there is nothing
//! weaker to be talked down to. No tickets and no resumption: each connection is checked in full.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, RwLock};

use hn4::types::VolumeId;
use ring::digest;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};

use crate::wire::{SessionKeys, StreamKeys};

/// Label of the TLS exporter from which the frame keys come.
const EXPORTER_LABEL: &[u8] = b"EXPORTER-hn4-wormhole-v1";

/// SHA-256 of a public key (its SubjectPublicKeyInfo), written `sha256:<hex>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyPin(pub [u8; 32]);

impl KeyPin {
    /// The pin of a SubjectPublicKeyInfo in DER.
    #[must_use]
    pub fn of_public_key(spki_der: &[u8]) -> Self {
        let mut pin = [0; 32];
        pin.copy_from_slice(digest::digest(&digest::SHA256, spki_der).as_ref());
        Self(pin)
    }

    /// The pin of the key in a certificate.
    ///
    /// # Errors
    ///
    /// If the certificate can not be read.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        Ok(Self::of_public_key(&parsed.subject_public_key_info()))
    }
}

impl fmt::Display for KeyPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not a key pin.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a key pin: expected \"sha256:\" and 64 hexadecimal digits")]
pub struct BadKeyPin;

impl FromStr for KeyPin {
    type Err = BadKeyPin;

    fn from_str(text: &str) -> Result<Self, BadKeyPin> {
        let digits = text.strip_prefix("sha256:").ok_or(BadKeyPin)?.as_bytes();
        let mut pin = [0_u8; 32];
        if digits.len() != 2 * pin.len() {
            return Err(BadKeyPin);
        }
        let value = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .and_then(|v| u8::try_from(v).ok())
        };
        for (byte, pair) in pin.iter_mut().zip(digits.chunks_exact(2)) {
            let [high, low] = pair else {
                return Err(BadKeyPin);
            };
            *byte = (value(*high).ok_or(BadKeyPin)? << 4) | value(*low).ok_or(BadKeyPin)?;
        }
        Ok(Self(pin))
    }
}

/// What is wrong with certificates or keys.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("cannot read the {what} {}: {source}", path.display())]
    Unreadable {
        /// What the file should hold.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A PEM text does not hold what it should.
    #[error("the {what} is not usable PEM: {why}")]
    BadPem {
        /// What the text should hold.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Certificate and key, or certificate and authority, do not go together.
    #[error("certificate, key and authority cannot be used: {0}")]
    Unusable(String),
}

/// What this node shows to others, and whom it believes.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    pin: KeyPin,
}

impl Identity {
    /// Reads PEM files: certificate (chain), private key, certificate of the authority.
    ///
    /// # Errors
    ///
    /// If a file can not be read, or holds something else.
    pub fn from_files(certificate: &Path, key: &Path, authority: &Path) -> Result<Self, TlsError> {
        let read = |what, path: &Path| {
            std::fs::read(path).map_err(|source| TlsError::Unreadable {
                what,
                path: path.to_owned(),
                source,
            })
        };
        let certificate = read("node certificate", certificate)?;
        let key = read("node key", key)?;
        let authority = read("certificate of the authority", authority)?;
        Self::from_pem(&certificate, &key, &authority)
    }

    /// Reads PEM texts: certificate (chain), private key, certificate of the authority.
    ///
    /// # Errors
    ///
    /// If a text holds something else, or certificate and key do not go together.
    pub fn from_pem(certificate: &[u8], key: &[u8], authority: &[u8]) -> Result<Self, TlsError> {
        let chain = certificates("node certificate", certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| TlsError::BadPem {
            what: "node key",
            why: error.to_string(),
        })?;
        let mut roots = RootCertStore::empty();
        for root in certificates("certificate of the authority", authority)? {
            roots
                .add(root)
                .map_err(|error| TlsError::Unusable(error.to_string()))?;
        }
        let own = chain
            .first()
            .ok_or_else(|| TlsError::Unusable("empty chain".to_owned()))?;
        let pin =
            KeyPin::of_certificate(own).map_err(|error| TlsError::Unusable(error.to_string()))?;
        Ok(Self {
            chain,
            key,
            roots: Arc::new(roots),
            pin,
        })
    }

    /// The pin that peers must have configured for this node.
    #[must_use]
    pub fn pin(&self) -> KeyPin {
        self.pin
    }

    /// The same identity once more.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            roots: self.roots.clone(),
            pin: self.pin,
        }
    }

    /// Derives a secret that only holders of the node's key know, for `purpose`.
    pub(crate) fn derived_secret(&self, purpose: &[u8]) -> [u8; 32] {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, self.key.secret_der());
        let mut secret = [0; 32];
        secret.copy_from_slice(ring::hmac::sign(&key, purpose).as_ref());
        secret
    }

    /// For connections that this node opens to the peer with this pin.
    ///
    /// # Errors
    ///
    /// If certificate and key do not go together.
    pub fn client_config(&self, pin: KeyPin, alpn: &[u8]) -> Result<ClientConfig, TlsError> {
        let unusable = |error: &dyn fmt::Display| TlsError::Unusable(error.to_string());
        let provider = provider();
        let chain_verifier =
            WebPkiServerVerifier::builder_with_provider(self.roots.clone(), provider.clone())
                .build()
                .map_err(|error| unusable(&error))?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PinnedServer {
                pin,
                chain_verifier,
            }))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        config.resumption = rustls::client::Resumption::disabled();
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// For connections that others open to this node; only pinned keys come through.
    ///
    /// # Errors
    ///
    /// If certificate and key do not go together.
    pub fn server_config(&self, pins: PinnedKeys, alpn: &[u8]) -> Result<ServerConfig, TlsError> {
        let unusable = |error: &dyn fmt::Display| TlsError::Unusable(error.to_string());
        let provider = provider();
        let chain_verifier =
            WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider.clone())
                .build()
                .map_err(|error| unusable(&error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(Arc::new(PinnedClients {
                pins,
                chain_verifier,
            }))
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }
}

fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| TlsError::BadPem {
        what,
        why: error.to_string(),
    })?;
    if all.is_empty() {
        return Err(TlsError::BadPem {
            what,
            why: "it holds no certificate".to_owned(),
        });
    }
    Ok(all)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        kx_groups: vec![aws_lc_rs::kx_group::X25519MLKEM768],
        ..aws_lc_rs::default_provider()
    })
}

/// The keys that may connect, and whose they are. Shared with the listener, so that peers can be
/// added and removed while it runs.
#[derive(Clone, Debug, Default)]
pub struct PinnedKeys(Arc<RwLock<HashMap<KeyPin, String>>>);

impl PinnedKeys {
    /// Lets a key in, under the name of its node. Replaces what the key stood for.
    pub fn insert(&self, pin: KeyPin, name: &str) {
        self.0
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .insert(pin, name.to_owned());
    }

    /// Lets a key in no longer. Open connections are not affected.
    pub fn remove(&self, pin: KeyPin) {
        self.0
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .remove(&pin);
    }

    /// Whose key it is.
    #[must_use]
    pub fn name_of(&self, pin: KeyPin) -> Option<String> {
        self.0
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .get(&pin)
            .cloned()
    }
}

/// Believes a server only if its chain *and* its key are right.
#[derive(Debug)]
struct PinnedServer {
    pin: KeyPin,
    chain_verifier: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.chain_verifier.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        let found = KeyPin::of_certificate(end_entity)?;
        if found != self.pin {
            let pinned = self.pin;
            return Err(rustls::Error::General(format!(
                "the key of {server_name:?} is {found}, pinned is {pinned}"
            )));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain_verifier
            .verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain_verifier
            .verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain_verifier.supported_verify_schemes()
    }
}

/// Believes a client only if its chain is right *and* its key is pinned to some node.
#[derive(Debug)]
struct PinnedClients {
    pins: PinnedKeys,
    chain_verifier: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for PinnedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain_verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .chain_verifier
            .verify_client_cert(end_entity, intermediates, now)?;
        let found = KeyPin::of_certificate(end_entity)?;
        if self.pins.name_of(found).is_none() {
            return Err(rustls::Error::General(format!(
                "no peer is pinned to the key {found}"
            )));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain_verifier
            .verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain_verifier
            .verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain_verifier.supported_verify_schemes()
    }
}

/// Which end of a connection we are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// We opened the connection.
    Dialer,
    /// The peer opened it.
    Acceptor,
}

/// The frame keys of one session, from the exporter of its TLS connection. `channel` tells sessions
/// on one connection apart that follow one another.
///
/// # Errors
///
/// If the exporter fails, which it does only before the handshake is done.
pub fn session_keys<E>(
    side: Side,
    volume: VolumeId,
    channel: u64,
    mut export: impl FnMut(&mut [u8; 32], &[u8], &[u8]) -> Result<(), E>,
) -> Result<SessionKeys, E> {
    let mut key = |stream: u8, from_dialer: bool| {
        let mut context = Vec::with_capacity(26);
        context.extend_from_slice(&volume.0);
        context.extend_from_slice(&channel.to_le_bytes());
        context.extend_from_slice(&[stream, u8::from(from_dialer)]);
        let mut key = [0; 32];
        export(&mut key, EXPORTER_LABEL, &context).map(|()| key)
    };
    let is_dialer = side == Side::Dialer;
    Ok(SessionKeys {
        control: StreamKeys {
            send: key(0, is_dialer)?,
            receive: key(0, !is_dialer)?,
        },
        data: StreamKeys {
            send: key(1, is_dialer)?,
            receive: key(1, !is_dialer)?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_pin_text_round_trips_and_refuses_other_texts() {
        let pin = KeyPin::of_public_key(b"key");
        assert_eq!(pin.to_string().parse(), Ok(pin));
        for bad in ["", "sha256:", "sha256:00", &pin.to_string()[..70], "md5:00"] {
            assert_eq!(bad.parse::<KeyPin>(), Err(BadKeyPin), "{bad}");
        }
    }

    #[test]
    fn both_ends_derive_the_same_keys_and_no_two_are_equal() {
        let export = |key: &mut [u8; 32], label: &[u8], context: &[u8]| {
            key.copy_from_slice(
                digest::digest(&digest::SHA256, &[label, context].concat()).as_ref(),
            );
            Ok::<(), ()>(())
        };
        let keys = |side, channel| {
            session_keys(side, VolumeId([1; 16]), channel, export).expect("the export succeeds")
        };
        let (dialer, acceptor) = (keys(Side::Dialer, 4), keys(Side::Acceptor, 4));
        assert_eq!(dialer.control.send, acceptor.control.receive);
        assert_eq!(dialer.control.receive, acceptor.control.send);
        assert_eq!(dialer.data.send, acceptor.data.receive);
        assert_eq!(dialer.data.receive, acceptor.data.send);
        let next = keys(Side::Dialer, 8);
        let all = [&dialer, &next]
            .map(|keys| {
                [
                    keys.control.send,
                    keys.control.receive,
                    keys.data.send,
                    keys.data.receive,
                ]
            })
            .concat();
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}
