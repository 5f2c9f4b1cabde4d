//! ML-DSA-65 through aws-lc-rs, which the daemon links for TLS anyway.

use aws_lc_rs::signature::{
    KeyPair, ML_DSA_65, ML_DSA_65_SIGNING, PqdsaKeyPair, UnparsedPublicKey,
};

fn pair(seed: &[u8]) -> Option<PqdsaKeyPair> {
    PqdsaKeyPair::from_seed(&ML_DSA_65_SIGNING, seed).ok()
}

pub(super) fn public(seed: &[u8]) -> Option<Vec<u8>> {
    Some(pair(seed)?.public_key().as_ref().to_vec())
}

pub(super) fn sign(seed: &[u8], message: &[u8]) -> Option<Vec<u8>> {
    let mut signature = vec![0; super::Algorithm::MlDsa65.signature_bytes()];
    let length = pair(seed)?.sign(message, &mut signature).ok()?;
    (length == signature.len()).then_some(signature)
}

pub(super) fn verify(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ML_DSA_65, public)
        .verify(message, signature)
        .is_ok()
}
