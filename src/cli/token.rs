//! The identity token: what the second copy of a volume must know of the first.
//!
//! `hn4v1:<uuid>:<birth nonce, 32 hexadecimal digits>:<size in bytes>:<sector bytes>`. No secret.

use std::fmt;
use std::str::FromStr;

use hn4::log::LogIdentity;
use hn4::types::{BLOCK_BYTES, VolumeId};
use thiserror::Error;

use crate::control::report::hex;

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IdentityToken(pub LogIdentity);

/// A text is no identity token.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "not an identity token: {0}; copy the whole line that `hn4ctl volume create` or `hn4ctl volume \
     inspect` printed, hn4v1:<uuid>:<nonce>:<size bytes>:<sector bytes>"
)]
pub struct BadToken(&'static str);

impl fmt::Display for IdentityToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let identity = &self.0;
        write!(
            f,
            "hn4v1:{}:{}:{}:{}",
            identity.volume,
            hex(&identity.birth_nonce),
            identity.size_bytes,
            identity.sector_bytes
        )
    }
}

impl FromStr for IdentityToken {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let parts: Vec<&str> = text.trim().split(':').collect();
        let [version, volume, nonce, size, sector] = parts.as_slice() else {
            return Err(BadToken("it does not have five parts"));
        };
        if *version != "hn4v1" {
            return Err(BadToken("it does not begin with hn4v1"));
        }
        let uuid = |text: &str| text.parse::<VolumeId>();
        let identity = LogIdentity {
            volume: uuid(volume).map_err(|_| BadToken("its second part is no UUID"))?,
            birth_nonce: uuid(nonce)
                .map_err(|_| BadToken("its third part is not 32 hexadecimal digits"))?
                .0,
            size_bytes: size
                .parse()
                .map_err(|_| BadToken("its fourth part is no number"))?,
            sector_bytes: sector
                .parse()
                .map_err(|_| BadToken("its fifth part is no number"))?,
        };
        if identity.size_bytes == 0 || !identity.size_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(BadToken("its size is not a positive multiple of 4096"));
        }
        if ![512, 4096].contains(&identity.sector_bytes) {
            return Err(BadToken("its sectors have neither 512 nor 4096 bytes"));
        }
        Ok(Self(identity))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_round_trips_and_every_damaged_one_is_refused() {
        let token = IdentityToken(LogIdentity {
            volume: VolumeId([7; 16]),
            birth_nonce: [9; 16],
            size_bytes: 1 << 30,
            sector_bytes: 512,
        });
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token));
        assert_eq!(format!(" {text}\n").parse(), Ok(token));
        for bad in [
            "",
            "hn4v1",
            &text.replace("hn4v1", "hn4v2"),
            &text.replace(":512", ":513"),
            &text.replace(":1073741824:", ":1073741825:"),
            &text.replace(":1073741824:", ":0:"),
            &text.replacen("07", "x7", 1),
            &format!("{text}:1"),
        ] {
            assert!(bad.parse::<IdentityToken>().is_err(), "{bad}");
        }
    }
}
