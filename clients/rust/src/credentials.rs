//! What a program keeps to go on with its session after it was started again.

use std::{fmt, str::FromStr};

use bytes::Bytes;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::Error;

const SECRET_BYTES: usize = 16;

/// With these a program can go on with its session after it was started again; see
/// [`crate::Client::resume`]. Who has them can act for the session: keep them as you
/// keep a password. As text they are `ID:SECRET`, both in hexadecimal.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub(crate) session_id: i64,
    pub(crate) secret: Secret,
}

/// Random; who knows it acts for the session.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Secret([u8; SECRET_BYTES]);

impl Credentials {
    /// The session.
    pub fn session_id(&self) -> i64 {
        self.session_id
    }
}

impl Secret {
    pub(crate) fn random() -> Secret {
        let mut secret = [0; SECRET_BYTES];
        random(&mut secret);
        Secret(secret)
    }

    pub(crate) fn to_bytes(self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }
}

/// A random number, to tell attempts apart.
pub(crate) fn nonce() -> u64 {
    let mut bytes = [0; 8];
    random(&mut bytes);
    u64::from_le_bytes(bytes)
}

fn random(bytes: &mut [u8]) {
    let filled = getrandom(&mut *bytes, GetRandomFlags::empty());
    let whole = filled.is_ok_and(|filled| filled == bytes.len());
    assert!(whole, "the system gives random numbers");
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:", self.session_id)?;
        let secret = self.secret.0.iter();
        secret
            .into_iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({:x})", self.session_id)
    }
}

impl FromStr for Credentials {
    type Err = Error;

    fn from_str(text: &str) -> Result<Credentials, Error> {
        let parse = || {
            let (session_id, secret) = text.trim().split_once(':')?;
            let session_id = i64::from_str_radix(session_id, 16).ok()?;
            let is_hex = secret.bytes().all(|digit| digit.is_ascii_hexdigit());
            let secret = u128::from_str_radix(secret, 16)
                .ok()
                .filter(|_| is_hex && secret.len() == 2 * SECRET_BYTES && session_id > 0)?;
            Some(Credentials {
                session_id,
                secret: Secret(secret.to_be_bytes()),
            })
        };
        parse().ok_or_else(|| Error::InvalidArgument {
            reason: "INVALID_CREDENTIALS".to_owned(),
            message: "credentials are ID:SECRET, both in hexadecimal".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_survive_as_text_and_show_no_secret_otherwise() {
        let credentials = Credentials {
            session_id: 0x7f00,
            secret: Secret::random(),
        };
        let text = credentials.to_string();
        assert_eq!(text.parse::<Credentials>().unwrap(), credentials);
        assert_eq!(format!("{credentials:?}"), "Credentials(7f00)");
        let long = format!("{text}0");
        let signed = format!("1:+{}", "0".repeat(31));
        for bad in ["", "1", "1:2", "0:", &text[1..4], &long, &signed] {
            assert!(bad.parse::<Credentials>().is_err(), "{bad}");
        }
        assert!(Secret::random() != Secret::random());
    }
}
