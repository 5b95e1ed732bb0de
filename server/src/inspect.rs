//! What a data directory holds, and whether a server would start from it: for
//! operators, of a server that does not run. Nothing is ever changed.
//!
//! The verdict comes from the code that a start runs, up to where a start begins to
//! write. Opening a checkpoint's database may write, too, so each is verified in a
//! copy.

use std::{
    env,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use conclave_core::{
    checkpoint::{self, CheckpointStore as _, FjallCheckpoints, Image, ReadError},
    disk::FileDisk,
    ids::Index,
    log::Log,
};

pub use conclave_core::log;

use crate::storage::{CHECKPOINTS, LOG, StorageError, random};

/// What a data directory holds.
#[derive(Debug)]
pub struct Inspection {
    /// What the log holds, if it is whole.
    pub log: Option<log::Inspection>,
    /// Oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// What a start would go on from, or why it would be refused. Flags of the
    /// server are not considered: whether they fit the directory is another matter.
    pub start: Result<Start, StorageError>,
}

/// A checkpoint that is there.
#[derive(Debug)]
pub struct Checkpoint {
    /// The newest entry that it holds, by its name.
    pub at: Index,
    /// Bytes on disk.
    pub bytes: u64,
    /// What it holds, or why it does not verify.
    pub content: Result<Content, String>,
}

/// What a checkpoint holds that verifies.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// The cluster that it belongs to.
    pub cluster: u64,
    /// The term of its newest entry.
    pub term: u64,
    /// The hash over the history up to there, equal on all members.
    pub digest: u64,
    /// How many versions of keys it holds.
    pub versions: usize,
    /// How many sessions it holds.
    pub sessions: usize,
}

/// What a start would go on from.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// The checkpoint; `None` if it is the log alone.
    pub checkpoint: Option<Index>,
    /// How many entries the log has behind it.
    pub entries: u64,
}

impl Inspection {
    /// Whether everything is whole.
    pub fn is_whole(&self) -> bool {
        self.start.is_ok() && self.checkpoints.iter().all(|one| one.content.is_ok())
    }
}

/// Looks at a data directory, and keeps servers out meanwhile. Copies go below the
/// system's directory for temporary files (`TMPDIR`), one checkpoint at a time.
///
/// Fails if the directory cannot be read, or is in use ([`StorageError::InUse`]).
pub fn inspect(data_dir: &Path) -> Result<Inspection, StorageError> {
    let failed = |source| StorageError::Io {
        path: data_dir.to_owned(),
        source,
    };
    // Held until everything was looked at.
    let disk = match data_dir.join(LOG) {
        log if log.is_dir() => Some(reading(data_dir, &log)?),
        _ => None,
    };
    let directory = data_dir.join(CHECKPOINTS);
    let is_begun = directory.is_dir();
    let at = if is_begun {
        let store = FjallCheckpoints::open(directory.clone()).map_err(failed)?;
        store.list().map_err(failed)?
    } else {
        fs::read_dir(data_dir).map_err(failed)?;
        Vec::new()
    };
    let log = match &disk {
        Some(disk) => Log::inspect(disk),
        None => Ok(None),
    };

    let mut checkpoints = Vec::new();
    let mut newest_first = at.into_iter().rev().map(|at| {
        let read = verify(&directory, at);
        checkpoints.push(Checkpoint {
            at,
            bytes: bytes_below(&directory.join(name(at))).unwrap_or_default(),
            content: read.as_ref().map(Content::of).map_err(ToString::to_string),
        });
        (at, read)
    });
    let path = || data_dir.to_owned();
    let (log, start) = match log {
        Ok(Some(log)) => {
            let chosen = checkpoint::choose(&mut newest_first, &log.recovered);
            let start = match chosen {
                Ok(image) => Ok(Start::from(image.map(|image| image.applied()), &log)),
                Err(source) => Err(StorageError::Checkpoint {
                    path: path(),
                    source,
                }),
            };
            (Some(log), start)
        }
        Ok(None) if is_begun => (None, Err(StorageError::LogGone { path: path() })),
        Ok(None) => (None, Ok(Start::new())),
        Err(source) => {
            let path = path();
            (None, Err(StorageError::Log { path, source }))
        }
    };
    // Also those that a start would not come to.
    newest_first.for_each(drop);
    checkpoints.reverse();
    Ok(Inspection {
        log,
        checkpoints,
        start,
    })
}

impl Start {
    /// In an empty directory.
    fn new() -> Self {
        Self {
            checkpoint: None,
            entries: 0,
        }
    }

    fn from(checkpoint: Option<Index>, log: &log::Inspection) -> Self {
        let recovered = &log.recovered;
        let next = recovered.first + recovered.entries.len() as u64;
        Self {
            checkpoint,
            entries: next - 1 - checkpoint.unwrap_or(0),
        }
    }
}

impl Content {
    fn of(image: &Image) -> Self {
        Self {
            cluster: image.cluster(),
            term: image.term(),
            digest: image.digest(),
            versions: image.versions(),
            sessions: image.sessions(),
        }
    }
}

fn reading(data_dir: &Path, log: &Path) -> Result<FileDisk, StorageError> {
    FileDisk::open_to_read(log).map_err(|source| {
        let path = data_dir.to_owned();
        match source.kind() {
            io::ErrorKind::ResourceBusy => StorageError::InUse { path },
            _ => StorageError::Io { path, source },
        }
    })
}

/// Verifies a checkpoint in a copy.
fn verify(directory: &Path, at: Index) -> Result<Image, ReadError> {
    let scratch = Scratch::new()?;
    copy(&directory.join(name(at)), &scratch.0.join(name(at)))?;
    checkpoint::read(&FjallCheckpoints::open(scratch.0.clone())?, at)
}

/// A directory that goes with this value.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> io::Result<Self> {
        let path = env::temp_dir().join(format!("conclave-check-{:x}", random()));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // If that fails there is nobody to tell, and nothing is lost.
        fs::remove_dir_all(&self.0).ok();
    }
}

fn name(at: Index) -> String {
    format!("{at:020}")
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if !from.is_dir() {
        return fs::copy(from, to).map(drop);
    }
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// What the files take on disk, holes not counted.
fn bytes_below(path: &Path) -> io::Result<u64> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.blocks() * 512);
    }
    let mut bytes = 0;
    for entry in fs::read_dir(path)? {
        bytes += bytes_below(&entry?.path())?;
    }
    Ok(bytes)
}
