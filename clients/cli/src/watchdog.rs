//! Kills a command when the `conclave` that runs it is gone, however it went.
//!
//! The watchdog is this binary again, started before the command. It leads the
//! process group that the command joins, so there is no moment at which the
//! command runs and would survive. It holds the read end of a pipe whose write
//! end only its parent has: when that end closes without a word, the parent is
//! dead, and the watchdog kills the whole group, itself included.

use std::{
    env,
    io::{self, Read as _, Write as _},
    process::Stdio,
};

use rustix::process::{Pid, Signal, kill_current_process_group};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
};

use crate::{
    failure::{Failure, GENERAL},
    process::Signals,
};

/// Sent by the watchdog when no signal but SIGKILL ends it any more.
const READY: &[u8] = b"+";
/// Sent to the watchdog when it is not needed any more.
const DISMISSED: &[u8] = b"-";

/// A running watchdog. If this process ends, it kills its group.
#[derive(Debug)]
pub(crate) struct Watchdog {
    child: Child,
    group: Pid,
}

impl Watchdog {
    /// Starts a watchdog in a new process group, and waits until it is ready.
    pub(crate) async fn start() -> Result<Watchdog, Failure> {
        let mut child = Command::new(env::current_exe()?)
            .arg("watchdog")
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let id = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let group = id.ok_or_else(|| Failure::new(GENERAL, "the watchdog ended at once"))?;
        let stdout = child.stdout.as_mut().expect("its stdout is a pipe");
        let mut ready = [0];
        stdout.read_exact(&mut ready).await?;
        Ok(Watchdog { child, group })
    }

    /// The process group to put the command into.
    pub(crate) fn group(&self) -> Pid {
        self.group
    }

    /// Lets the watchdog go: the group lives on.
    pub(crate) async fn dismiss(mut self) {
        let stdin = self.child.stdin.as_mut().expect("its stdin is a pipe");
        if let Err(error) = stdin.write_all(DISMISSED).await {
            tracing::debug!(%error, "the watchdog was killed with its group");
        }
        if let Err(error) = self.child.wait().await {
            tracing::debug!(%error, "the watchdog cannot be waited for");
        }
    }
}

/// The watchdog's own program.
pub(crate) fn run() -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let _within = runtime.enter();
    // Signals that are meant for the command reach this process too. Nobody
    // reads them here, but they do not end it either.
    let _caught = Signals::new()?;
    io::stdout().write_all(READY)?;
    io::stdout().flush()?;
    let mut word = [0];
    let heard = io::stdin().read(&mut word);
    if matches!(heard, Ok(1)) && word == DISMISSED {
        return Ok(0);
    }
    kill_current_process_group(Signal::KILL).map_err(io::Error::from)?;
    Ok(GENERAL)
}
