//! Names of locks and elections, owners, and the keys made of them.
//!
//! The contenders of lock or election `N` are the keys `N/S` with no `/` in `S`, whoever
//! wrote them, as long as `N` passes [`validate_name`] and the key is not under
//! `_conclave/`. Any other key contends for nothing: it could not be named in a
//! request. A contender of this API has as `S` its session's id in lowercase hex,
//! then, if it has an owner, `:` and the owner percent-encoded.
//!
//! What does not fit into the value of a contender's key lies beside it:
//! `_conclave/elect/N/S` for a candidate, `_conclave/lock/N/S` for a plain contender
//! for a lock that has to wait.

use std::fmt::Write as _;

use bytes::Bytes;
use conclave_core::{
    ids::SessionId,
    limits::{ELECTION_VALUE_BYTES_MAX, NAME_BYTES_MAX, OWNER_BYTES_MAX, REASON_BYTES_MAX},
};

/// Where all state lies that is not a contender; keys under it, with a `/`
/// between, are not for clients to write.
const RESERVED: &str = "_conclave";
/// Where the request of a candidate lies, beside its key.
const CAMPAIGNS: &[u8] = b"_conclave/elect/";
/// The same of a plain contender for a lock, while it waits and after.
const PLAIN_WAITS: &[u8] = b"_conclave/lock/";

/// What is wrong with a name, an owner or a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The name is empty.
    #[error("name is empty")]
    NameEmpty,
    /// The name is too long.
    #[error("name is longer than {NAME_BYTES_MAX} bytes")]
    NameTooLong,
    /// The name holds what neither an environment variable nor a path can.
    #[error("name contains a zero byte")]
    NameWithZero,
    /// The keys of this name would be the service's own.
    #[error("names under `{RESERVED}` are reserved")]
    NameReserved,
    /// The owner is too long.
    #[error("owner is longer than {OWNER_BYTES_MAX} bytes")]
    OwnerTooLong,
    /// There is no reason.
    #[error("reason is empty")]
    ReasonEmpty,
    /// The reason is too long.
    #[error("reason is longer than {REASON_BYTES_MAX} bytes")]
    ReasonTooLong,
    /// What a candidate proclaims is too long.
    #[error("value is longer than {ELECTION_VALUE_BYTES_MAX} bytes")]
    ValueTooLong,
    /// What a candidate proclaims would make its key that of a lock.
    #[error("value is that of a lock")]
    ValueOfLock,
}

/// Whether a lock or election can have this name: 1 to 1,024 bytes without a zero byte,
/// neither `_conclave` nor under it.
pub fn validate_name(name: &str) -> Result<(), Invalid> {
    if name.is_empty() {
        return Err(Invalid::NameEmpty);
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Invalid::NameTooLong);
    }
    if name.contains('\0') {
        return Err(Invalid::NameWithZero);
    }
    match name.strip_prefix(RESERVED) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => Err(Invalid::NameReserved),
        _ => Ok(()),
    }
}

/// Whether this can be an owner inside a session: at most 256 bytes; empty means
/// none.
pub fn validate_owner(owner: &str) -> Result<(), Invalid> {
    if owner.len() > OWNER_BYTES_MAX {
        Err(Invalid::OwnerTooLong)
    } else {
        Ok(())
    }
}

/// Whether this can be an operator's reason: 1 to 1,024 bytes.
pub fn validate_reason(reason: &str) -> Result<(), Invalid> {
    match reason.len() {
        0 => Err(Invalid::ReasonEmpty),
        1..=REASON_BYTES_MAX => Ok(()),
        _ => Err(Invalid::ReasonTooLong),
    }
}

/// The key with which a session, or an owner in it, contends.
pub fn contender_key(name: &str, session: SessionId, owner: &str) -> Result<Bytes, Invalid> {
    validate_name(name)?;
    validate_owner(owner)?;
    let mut key = format!("{name}/{session}");
    if !owner.is_empty() {
        key.push(':');
        percent_encode(owner, &mut key);
    }
    Ok(key.into())
}

/// The name of the lock or election that a key contends for, if it does for any. Shares the
/// memory of the key, and is UTF-8.
pub fn lock_of(key: &Bytes) -> Option<Bytes> {
    let slash = key.iter().rposition(|byte| *byte == b'/')?;
    validate_name(str::from_utf8(&key[..slash]).ok()?).ok()?;
    Some(key.slice(..slash))
}

/// The key beside that of a candidate, under which its request lies.
pub(crate) fn campaign_key(contender: &[u8]) -> Bytes {
    [CAMPAIGNS, contender].concat().into()
}

/// The key beside that of a plain contender for a lock, under which its request lies.
pub(crate) fn plain_wait_key(contender: &[u8]) -> Bytes {
    [PLAIN_WAITS, contender].concat().into()
}

/// All that may lie beside a contender's key; at most one does.
pub(crate) fn beside(contender: &[u8]) -> [Bytes; 2] {
    [campaign_key(contender), plain_wait_key(contender)]
}

/// The candidate beside whose key this one is, if it is. Shares its memory.
pub(crate) fn candidate_of(key: &Bytes) -> Option<Bytes> {
    key.starts_with(CAMPAIGNS)
        .then(|| key.slice(CAMPAIGNS.len()..))
}

/// The lock for which a plain contender waits beside whose key this one is, if it is.
pub(crate) fn plain_wait_of(key: &Bytes) -> Option<Bytes> {
    let is_beside = key.starts_with(PLAIN_WAITS);
    is_beside.then(|| lock_of(&key.slice(PLAIN_WAITS.len()..)))?
}

/// The owner that a contender's key names: empty if it names none, or none that
/// this API would have written.
pub fn owner_of(key: &[u8]) -> String {
    let suffix = suffix(key);
    let owner = suffix
        .iter()
        .position(|byte| *byte == b':')
        .map(|at| &suffix[at + 1..]);
    owner.and_then(percent_decode).unwrap_or_default()
}

/// Whether this is a key with which this session contends, with any owner.
pub fn is_of(key: &[u8], session: SessionId) -> bool {
    let id = suffix(key).split(|byte| *byte == b':').next();
    id == Some(session.to_string().as_bytes())
}

/// The session that a key of this API is named after.
pub fn session_of(key: &[u8]) -> Option<SessionId> {
    let id = suffix(key).split(|byte| *byte == b':').next()?;
    let id = i64::from_str_radix(str::from_utf8(id).ok()?, 16).ok()?;
    Some(SessionId(id)).filter(|session| is_of(key, *session))
}

/// What stands behind the last `/`, or all if there is none.
fn suffix(key: &[u8]) -> &[u8] {
    let slash = key.iter().rposition(|byte| *byte == b'/');
    &key[slash.map_or(0, |slash| slash + 1)..]
}

/// Appends `text` with all but RFC 3986's unreserved characters as `%` and two
/// uppercase hex digits; above all, without `/`.
fn percent_encode(text: &str, to: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            to.push(char::from(byte));
        } else {
            write!(to, "%{byte:02X}").expect("a string takes all that is written");
        }
    }
}

/// The text that was encoded; `None` if this is no encoding of UTF-8.
fn percent_decode(encoded: &[u8]) -> Option<String> {
    let mut decoded = Vec::with_capacity(encoded.len());
    let mut rest = encoded.iter();
    while let Some(byte) = rest.next() {
        decoded.push(match byte {
            b'%' => hex_digit(*rest.next()?)? << 4 | hex_digit(*rest.next()?)?,
            plain => *plain,
        });
    }
    String::from_utf8(decoded).ok()
}

fn hex_digit(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    Some(u8::try_from(value).expect("a hex digit is below 16"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lock(key: &[u8]) -> Option<Bytes> {
        lock_of(&Bytes::copy_from_slice(key))
    }

    #[test]
    fn a_key_is_the_name_the_session_in_hex_and_the_owner_encoded() {
        let key = |owner| contender_key("jobs/a", SessionId(0x1f), owner).unwrap();
        assert_eq!(key(""), "jobs/a/1f");
        assert_eq!(key("worker-1"), "jobs/a/1f:worker-1");
        assert_eq!(key("a/b: ü"), "jobs/a/1f:a%2Fb%3A%20%C3%BC");
    }

    #[test]
    fn an_id_that_a_client_chose_may_be_negative() {
        let session = SessionId(-0x1f);
        let key = contender_key("a", session, "").unwrap();
        assert_eq!(key, "a/-1f");
        assert_eq!(session_of(&key), Some(session));
    }

    #[test]
    fn the_last_slash_ends_the_name() {
        assert_eq!(lock(b"a/b/c").unwrap(), "a/b");
        assert_eq!(lock(b"a//").unwrap(), "a/");
        assert_eq!(lock(b"_conclaves/1").unwrap(), "_conclaves");
    }

    #[test]
    fn what_no_request_could_name_contends_for_nothing() {
        let long = [&[b'n'; NAME_BYTES_MAX + 1][..], b"/1"].concat();
        for key in [
            &b"plain"[..],
            b"/1",
            b"_conclave/1",
            b"_conclave/q/1",
            b"\xff/1",
            b"a\0/1",
        ] {
            assert_eq!(lock(key), None, "{key:?}");
        }
        assert_eq!(lock(&long), None);
        assert!(lock(&long[1..]).is_some());
    }

    #[test]
    fn a_strange_suffix_has_no_owner() {
        for key in ["a/1", "a/", "a/x:%", "a/x:%4", "a/x:%zz", "a/x:%ff"] {
            assert_eq!(owner_of(key.as_bytes()), "", "{key}");
        }
    }

    #[test]
    fn a_key_is_of_a_session_by_its_exact_id() {
        assert!(is_of(b"a/1f:1e", SessionId(0x1f)));
        for other in [0x1e, 0x1, 0xf, 0x1f1] {
            assert!(!is_of(b"a/1f:1e", SessionId(other)));
        }
        assert!(!is_of(b"a/1F", SessionId(0x1f)));
        for other in [
            &b"a/1F"[..],
            b"a/",
            b"a/+1f",
            b"a/x:1f",
            b"a/01f",
            b"a/\xff",
        ] {
            assert_eq!(session_of(other), None);
        }
    }

    #[test]
    fn limits_are_inclusive() {
        let bytes = |n| "x".repeat(n);
        assert_eq!(validate_name(&bytes(NAME_BYTES_MAX)), Ok(()));
        assert_eq!(
            validate_name(&bytes(NAME_BYTES_MAX + 1)),
            Err(Invalid::NameTooLong)
        );
        assert_eq!(validate_name(""), Err(Invalid::NameEmpty));
        assert_eq!(validate_name("a\0"), Err(Invalid::NameWithZero));
        assert_eq!(validate_name("_conclave"), Err(Invalid::NameReserved));
        assert_eq!(validate_owner(&bytes(OWNER_BYTES_MAX)), Ok(()));
        assert_eq!(
            validate_owner(&bytes(OWNER_BYTES_MAX + 1)),
            Err(Invalid::OwnerTooLong)
        );
        assert_eq!(validate_reason(""), Err(Invalid::ReasonEmpty));
        assert_eq!(validate_reason(&bytes(REASON_BYTES_MAX)), Ok(()));
        assert_eq!(
            validate_reason(&bytes(REASON_BYTES_MAX + 1)),
            Err(Invalid::ReasonTooLong)
        );
    }

    proptest! {
        #[test]
        fn a_key_gives_back_what_it_was_made_of(
            name in "[^\0]{1,20}",
            owner in ".{0,20}",
            session in 1i64..,
        ) {
            prop_assume!(validate_name(&name).is_ok());
            let key = contender_key(&name, SessionId(session), &owner).unwrap();
            prop_assert_eq!(lock_of(&key).unwrap(), name);
            prop_assert_eq!(owner_of(&key), owner);
            prop_assert!(is_of(&key, SessionId(session)));
            prop_assert_eq!(session_of(&key), Some(SessionId(session)));
        }
    }
}
