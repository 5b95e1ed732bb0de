//! How a command fails: one line for people, one exit code for scripts.

use std::io;

use conclave_client::Error;

/// Something went wrong that has no code of its own.
pub(crate) const GENERAL: u8 = 1;
/// Something is damaged that can be done without.
pub(crate) const DAMAGED: u8 = 2;
/// The command line or an argument is wrong.
pub(crate) const USAGE: u8 = 64;
/// No cluster was reached.
pub(crate) const UNREACHED: u8 = 69;
/// The lock is held by another, and `--try` was given.
pub(crate) const HELD: u8 = 73;
/// The lock was lost while it was held.
pub(crate) const LOST: u8 = 75;
/// The lock was not acquired in time.
pub(crate) const TIMED_OUT: u8 = 124;
/// As a shell: the command was found, but could not be run.
pub(crate) const NOT_EXECUTABLE: u8 = 126;
/// As a shell: the command was not found.
pub(crate) const NOT_FOUND: u8 = 127;

/// Why the program ends without success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) code: u8,
    /// What people are told.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Failure {
        Failure {
            code,
            message: message.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let code = match &error {
            Error::InvalidEndpoint { .. } | Error::InvalidArgument { .. } => USAGE,
            Error::Unreachable { .. } | Error::OutcomeUnknown { .. } => UNREACHED,
            Error::LockHeld => HELD,
            Error::WaitTimedOut => TIMED_OUT,
            Error::SessionLost(_) | Error::PlaceLost { .. } => LOST,
            _ => GENERAL,
        };
        let hint = match &error {
            Error::Unreachable { .. } => {
                "; --endpoints, or CONCLAVE_ENDPOINTS, says where they are"
            }
            _ => "",
        };
        Failure::new(code, format!("{error}{hint}"))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::new(GENERAL, error.to_string())
    }
}
