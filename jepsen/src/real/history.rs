//! What clients and faults did, in the form that Jepsen reads: one map a line,
//! each operation as its invocation and its completion. `:info` completes what
//! may have happened or yet may; the process that hears it goes on under a new
//! number, as Jepsen wants.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It happened.
    Ok,
    /// It certainly did not.
    Fail,
    /// Nobody knows.
    Info,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct History {
    started: Instant,
    lines: Mutex<Lines>,
}

#[derive(Debug)]
struct Lines {
    file: BufWriter<File>,
    index: u64,
    /// The first write that failed; a history with a hole is none.
    trouble: Option<io::Error>,
}

impl History {
    /// A new history in this file.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self {
            started: Instant::now(),
            lines: Mutex::new(Lines {
                file: BufWriter::new(File::create(path)?),
                index: 0,
                trouble: None,
            }),
        })
    }

    /// Microseconds since the beginning.
    pub(crate) fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// A process begins an operation; when.
    pub(crate) fn invoke(&self, process: u64, operation: &str, value: &str) -> u64 {
        let now_us = self.now_us();
        self.line(&process.to_string(), ":invoke", operation, value, now_us);
        now_us
    }

    /// A process hears how its operation ended, at this time.
    pub(crate) fn complete(
        &self,
        process: u64,
        ending: Ending,
        operation: &str,
        value: &str,
        now_us: u64,
    ) {
        let kind = match ending {
            Ending::Ok => ":ok",
            Ending::Fail => ":fail",
            Ending::Info => ":info",
        };
        self.line(&process.to_string(), kind, operation, value, now_us);
    }

    /// A fault begins or ends.
    pub(crate) fn fault(&self, fault: &str, value: &str) {
        self.line(":nemesis", ":info", fault, value, self.now_us());
    }

    /// All of it is in the file.
    pub(crate) fn close(&self) -> io::Result<()> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        match lines.trouble.take() {
            Some(trouble) => Err(trouble),
            None => lines.file.flush(),
        }
    }

    fn line(&self, process: &str, kind: &str, operation: &str, value: &str, now_us: u64) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let index = lines.index;
        lines.index += 1;
        let written = writeln!(
            lines.file,
            "{{:index {index}, :type {kind}, :process {process}, :f :{operation}, \
             :value {value}, :time {}}}",
            now_us * 1_000
        );
        if let Err(trouble) = written {
            lines.trouble.get_or_insert(trouble);
        }
    }
}
