//! Signals and exit codes, as shells know them.

use std::{ffi::OsString, io, process::ExitStatus};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    process::Command,
    signal::unix::{self, SignalKind},
};

use crate::failure::{Failure, GENERAL, NOT_EXECUTABLE, NOT_FOUND};

/// The signals that are passed on to a command. While this lives, they do not
/// end this process.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    hangup: unix::Signal,
    quit: unix::Signal,
    user1: unix::Signal,
    user2: unix::Signal,
}

impl Signals {
    pub(crate) fn new() -> io::Result<Signals> {
        Ok(Signals {
            interrupt: unix::signal(SignalKind::interrupt())?,
            terminate: unix::signal(SignalKind::terminate())?,
            hangup: unix::signal(SignalKind::hangup())?,
            quit: unix::signal(SignalKind::quit())?,
            user1: unix::signal(SignalKind::user_defined1())?,
            user2: unix::signal(SignalKind::user_defined2())?,
        })
    }

    /// The next signal. Safe to drop and call again.
    pub(crate) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hangup.recv() => Signal::HUP,
            _ = self.quit.recv() => Signal::QUIT,
            _ = self.user1.recv() => Signal::USR1,
            _ = self.user2.recv() => Signal::USR2,
        }
    }

    /// The next signal that asks to end.
    pub(crate) async fn end(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if signal != Signal::USR1 && signal != Signal::USR2 {
                return signal;
            }
        }
    }
}

/// The exit code of a process that was ended by this signal.
pub(crate) fn signal_code(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// The exit code for how a command ended.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(u8::MAX),
        (None, Some(signal)) => signal_code(signal),
        (None, None) => GENERAL,
    }
}

/// A command from its words; there is at least one.
pub(crate) fn command(words: &[OsString]) -> Command {
    let (program, arguments) = words.split_first().expect("there is a program to run");
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Why a command could not be started, with the code that a shell would use.
pub(crate) fn not_started(program: &OsString, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    Failure::new(code, format!("cannot run `{}`: {error}", program.display()))
}

/// Sends a signal to a process group. One that has ended is no error.
pub(crate) fn signal_group(group: Pid, signal: Signal) {
    if let Err(error) = kill_process_group(group, signal) {
        tracing::debug!(%error, "the process group has ended");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(exit_code(ExitStatus::from_raw(0)), 0);
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
        let missing = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(not_started(&"x".into(), &missing).code, 127);
        let forbidden = io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(not_started(&"x".into(), &forbidden).code, 126);
    }
}
