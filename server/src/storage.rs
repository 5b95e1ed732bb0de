//! The data directory: locked by one process, and the right one for this member.
//!
//! ```text
//! NAME.conclave/
//!   lock    held by the process that uses the directory
//!   log/    the write-ahead log
//! ```

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use conclave_core::{
    disk::FileDisk,
    ids::NodeId,
    log::{Facts, Identity, Log, LogError, Recovered},
};
use rustix::{
    fs::{FlockOperation, flock},
    rand::{GetRandomFlags, getrandom},
};

use crate::options::{ClusterState, Settings, Topology};

const LOCK: &str = "lock";
const LOG: &str = "log";

/// The log of a data directory, with what it held when it was opened.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) log: Log<FileDisk>,
    pub(crate) recovered: Recovered,
}

/// The lock on a data directory; the kernel lets go of it when the process ends,
/// however it ends.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Makes the directory if it is not there, and locks it.
    pub(crate) fn take(directory: &Path) -> Result<Self, StorageError> {
        let io = |source| StorageError::Io {
            path: directory.to_owned(),
            source,
        };
        make_durable_directory(directory).map_err(io)?;
        let file = File::create(directory.join(LOCK)).map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StorageError::InUse {
                path: directory.to_owned(),
            }),
            Err(error) => Err(io(error.into())),
        }
    }
}

impl Storage {
    /// Opens the log of a directory that this process has locked, or begins one.
    pub(crate) fn open(settings: &Settings) -> Result<Self, StorageError> {
        let path = settings.data_dir.join(LOG);
        let io = |source| StorageError::Io {
            path: path.clone(),
            source,
        };
        make_durable_directory(&path).map_err(io)?;
        let disk = || FileDisk::open(&path).map_err(io);
        let damaged = |source| StorageError::Log {
            path: path.clone(),
            source,
        };
        if let Some((log, recovered)) = Log::open(disk()?).map_err(damaged)? {
            check_identity(&recovered, &settings.topology, &settings.data_dir)?;
            return Ok(Self { log, recovered });
        }
        if settings.cluster_state == ClusterState::Existing {
            return Err(StorageError::EmptyButExisting {
                path: settings.data_dir.clone(),
            });
        }
        let recovered = first_contents(&settings.topology, random());
        let log = Log::create(disk()?, recovered.identity.clone(), recovered.facts.clone())
            .map_err(damaged)?;
        Ok(Self { log, recovered })
    }
}

/// What a new log holds.
fn first_contents(topology: &Topology, incarnation: u64) -> Recovered {
    let node = topology.own().id;
    let voters: Vec<NodeId> = topology.members().iter().map(|member| member.id).collect();
    Recovered {
        identity: Identity {
            cluster: topology.cluster,
            node,
            incarnation,
        },
        hard_state: Default::default(),
        // Nobody can know another directory of a cluster's only member.
        facts: Facts {
            admitted: voters.len() == 1,
            voters,
            ..Facts::default()
        },
        entries: Vec::new(),
    }
}

/// Whether a log is the one of this member of this cluster.
fn check_identity(
    recovered: &Recovered,
    topology: &Topology,
    path: &Path,
) -> Result<(), StorageError> {
    let path = path.to_owned();
    let Identity { cluster, node, .. } = recovered.identity;
    let own = topology.own().id;
    // Ids are made from addresses and the token, so the same member's id in
    // another cluster means that only the other members differ.
    match (cluster == topology.cluster, node == own) {
        (true, true) => Ok(()),
        (true, false) => Err(StorageError::OtherMember {
            path,
            found: node,
            own,
        }),
        (false, true) => Err(StorageError::MembersChanged { path }),
        (false, false) => Err(StorageError::OtherCluster {
            path,
            found: cluster,
            own: topology.cluster,
        }),
    }
}

/// A random number, not 0.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    let filled = getrandom(&mut bytes, GetRandomFlags::empty());
    assert_eq!(
        filled,
        Ok(bytes.len()),
        "the kernel gives out small random numbers whole"
    );
    u64::from_le_bytes(bytes).max(1)
}

/// Bytes of the log on disk; 0 if they cannot be counted.
pub(crate) fn log_bytes(data_dir: &Path) -> u64 {
    let Ok(files) = fs::read_dir(data_dir.join(LOG)) else {
        return 0;
    };
    files
        .flatten()
        .filter_map(|file| file.metadata().ok())
        .map(|file| file.len())
        .sum()
}

/// Makes a directory with those above it, and makes them last.
fn make_durable_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    make_durable_directory(parent)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    File::open(parent)?.sync_all()
}

/// Why the data directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say it, and the fields are what they name"
)]
pub enum StorageError {
    #[error("data directory {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("data directory {} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error("the log in {} cannot be used", path.display())]
    Log { path: PathBuf, source: LogError },
    #[error(
        "data directory {} belongs to another cluster ({found:x}, not {own:x}); \
         give another --data-dir, or the --initial-cluster and token it was made with",
        path.display()
    )]
    OtherCluster { path: PathBuf, found: u64, own: u64 },
    #[error(
        "data directory {} belongs to another member of the cluster ({found}, not {own}); \
         check --name and --data-dir",
        path.display()
    )]
    OtherMember {
        path: PathBuf,
        found: NodeId,
        own: NodeId,
    },
    #[error(
        "data directory {} was made with another --initial-cluster; \
         the members of a cluster cannot be changed this way",
        path.display()
    )]
    MembersChanged { path: PathBuf },
    #[error(
        "--initial-cluster-state is existing, but data directory {} is empty; restore it. \
         Adding members to a running cluster is not supported yet",
        path.display()
    )]
    EmptyButExisting { path: PathBuf },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;

    fn topology(name: &str, members: &[&str], token: &str) -> Topology {
        let options = Options {
            name: name.to_owned(),
            initial_cluster: members
                .iter()
                .map(|m| format!("{m}=http://{m}:1"))
                .collect(),
            initial_cluster_token: token.to_owned(),
            ..Options::default()
        };
        options.validate().unwrap().topology
    }

    #[test]
    fn a_directory_is_taken_only_by_the_member_it_was_made_for() {
        let check = |topology: &Topology| {
            let made = first_contents(&self::topology("a", &["a", "b", "c"], "t"), 5);
            check_identity(&made, topology, Path::new("d"))
        };
        assert!(check(&topology("a", &["c", "a", "b"], "t")).is_ok());
        assert!(matches!(
            check(&topology("b", &["a", "b", "c"], "t")),
            Err(StorageError::OtherMember { .. })
        ));
        assert!(matches!(
            check(&topology("a", &["a", "b", "d"], "t")),
            Err(StorageError::MembersChanged { .. })
        ));
        assert!(matches!(
            check(&topology("a", &["a", "b", "c"], "u")),
            Err(StorageError::OtherCluster { .. })
        ));
        assert!(matches!(
            check(&topology("x", &["x", "y", "z"], "t")),
            Err(StorageError::OtherCluster { .. })
        ));
    }

    #[test]
    fn a_directory_is_locked_by_one_at_a_time() {
        let path = std::env::temp_dir().join(format!("conclave-lock-{:x}", random()));
        let lock = DirectoryLock::take(&path).unwrap();
        assert!(matches!(
            DirectoryLock::take(&path),
            Err(StorageError::InUse { .. })
        ));
        drop(lock);
        assert!(DirectoryLock::take(&path).is_ok());
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn only_a_cluster_of_one_admits_itself() {
        assert!(
            first_contents(&topology("a", &["a"], "t"), 5)
                .facts
                .admitted
        );
        assert!(
            !first_contents(&topology("a", &["a", "b"], "t"), 5)
                .facts
                .admitted
        );
    }
}
