//! Why a log cannot be used, and what whoever runs the member can do about it.

use std::io;

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk failed.
    #[error("{doing} `{file}` failed")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// With which file; `.` is the directory.
        file: String,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// There is no space left. A start after space was made finds everything
    /// that was synced.
    #[error("{doing} `{file}` failed: the disk is full; make space and start again")]
    Full {
        /// What was being done.
        doing: &'static str,
        /// With which file.
        file: String,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// Something that was durable is not there any more.
    #[error(
        "`{file}` is damaged at byte {offset}: {reason}; nothing was changed: restore this \
         directory as it was (this version cannot yet replace a member)"
    )]
    Damaged {
        /// In which file.
        file: String,
        /// Where what is left of it ends.
        offset: u64,
        /// How it is known.
        reason: &'static str,
    },
    /// What is there is whole, but no correct program writes it.
    #[error(
        "`{file}` contradicts itself at byte {offset}: {reason}; nothing was changed: please \
         report this with a copy of the directory, and restore it as it was"
    )]
    Corrupt {
        /// In which file.
        file: String,
        /// The offset of the record.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It was written by a newer or older program.
    #[error(
        "`{file}` has version {found} of the log format; this program reads version {supported}"
    )]
    Version {
        /// In which file.
        file: String,
        /// The version it has.
        found: u32,
        /// The version that could be read.
        supported: u32,
    },
    /// A file that is named almost like a segment.
    #[error("`{file}` is not the name of a log segment (`log-` and 20 digits); move it away")]
    Name {
        /// The file.
        file: String,
    },
    /// There is a log already where one was to be made.
    #[error("the directory holds a log already")]
    Exists,
    /// What was to be written makes no sense; nothing was written.
    #[error("refused to write {reason}")]
    Invalid {
        /// What it is.
        reason: &'static str,
    },
    /// The disk failed before; nothing more is written.
    #[error("the log is closed since its disk failed")]
    Poisoned,
}

impl LogError {
    /// Says what an error of the disk interrupted.
    pub(super) fn io(doing: &'static str, file: &str) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            let file = file.to_owned();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full {
                    doing,
                    file,
                    source,
                },
                _ => Self::Io {
                    doing,
                    file,
                    source,
                },
            }
        }
    }
}
