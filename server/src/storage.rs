//! The data directory: locked by one process, and the right one for this member.
//!
//! ```text
//! NAME.conclave/
//!   log/            the write-ahead log, locked
//!   checkpoints/    the state at two moments, from which the log goes on; made
//!                   after the log, so where they are, there was a log
//! ```

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use conclave_core::{
    checkpoint::{self, FjallCheckpoints, RestoreError},
    disk::FileDisk,
    ids::NodeId,
    log::{Facts, Identity, Log, LogError, Recovered},
    state::State,
};
use conclave_primitives::Primitives;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::options::{ClusterState, Settings, Topology};

pub(crate) const LOG: &str = "log";
pub(crate) const CHECKPOINTS: &str = "checkpoints";

/// What a data directory held when it was opened, and where more goes.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) log: Log<FileDisk>,
    pub(crate) recovered: Recovered,
    pub(crate) state: State<Primitives>,
    pub(crate) checkpoints: FjallCheckpoints,
}

impl Storage {
    /// Takes the directory for this process, and opens its log or begins one.
    pub(crate) fn open(settings: &Settings) -> Result<Self, StorageError> {
        let path = &settings.data_dir;
        let failed = |source| StorageError::Io {
            path: path.clone(),
            source,
        };
        make_durable(path).map_err(failed)?;
        let unusable = |source| StorageError::Log {
            path: path.clone(),
            source,
        };
        // The lock of the log is that of the whole directory.
        let opened = Log::open(disk(path)?).map_err(unusable)?;
        let checkpoints = path.join(CHECKPOINTS);
        let is_begun = checkpoints.is_dir();
        let open_checkpoints = || FjallCheckpoints::open(checkpoints).map_err(failed);
        if let Some((log, recovered)) = opened {
            let checkpoints = open_checkpoints()?;
            check_identity(&recovered, &settings.topology, path)?;
            let restored = checkpoint::restore(&checkpoints, &recovered);
            let state = restored.map_err(|source| StorageError::Checkpoint {
                path: path.clone(),
                source,
            })?;
            return Ok(Self {
                log,
                recovered,
                state,
                checkpoints,
            });
        }
        if is_begun {
            return Err(StorageError::LogGone { path: path.clone() });
        }
        if settings.cluster_state == ClusterState::Existing {
            return Err(StorageError::EmptyButExisting { path: path.clone() });
        }
        let recovered = first_contents(&settings.topology, random());
        let Recovered {
            identity, facts, ..
        } = recovered.clone();
        let state = State::new(identity.cluster);
        let log = Log::create(disk(path)?, identity, facts).map_err(unusable)?;
        Ok(Self {
            log,
            recovered,
            state,
            // Made after the log, so that a directory that has them had one.
            checkpoints: open_checkpoints()?,
        })
    }
}

/// The directory of the log, held by this process alone.
fn disk(data_dir: &Path) -> Result<FileDisk, StorageError> {
    FileDisk::open(data_dir.join(LOG)).map_err(|source| {
        let path = data_dir.to_owned();
        match source.kind() {
            io::ErrorKind::ResourceBusy => StorageError::InUse { path },
            _ => StorageError::Io { path, source },
        }
    })
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
        first: 1,
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

/// Makes a directory that is not there, with those above it, and makes their
/// names durable: acknowledged commands must not vanish with the directory.
fn make_durable(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        make_durable(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
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
    #[error("the checkpoints in {} cannot be used", path.display())]
    Checkpoint { path: PathBuf, source: RestoreError },
    #[error(
        "the log in data directory {} is gone; nothing was changed: restore the directory as it \
         was, or remove it and add the member again as a new one",
        path.display()
    )]
    LogGone { path: PathBuf },
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
    use std::fs;

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
    fn a_directory_is_used_by_one_at_a_time_and_only_for_what_it_was_made() {
        let path = std::env::temp_dir().join(format!("conclave-storage-{:x}", random()));
        let options = Options {
            data_dir: Some(path.join("deep/down")),
            ..Options::default()
        };
        let settings = options.validate().unwrap();
        let first = Storage::open(&settings).unwrap();
        assert!(matches!(
            Storage::open(&settings),
            Err(StorageError::InUse { .. })
        ));
        let identity = first.recovered.identity.clone();
        drop(first);
        let again = Storage::open(&settings).unwrap();
        assert_eq!(again.recovered.identity, identity);
        drop(again);
        let initial_cluster_token = "other".to_owned();
        let other = Options {
            initial_cluster_token,
            ..options
        }
        .validate()
        .unwrap();
        assert!(matches!(
            Storage::open(&other),
            Err(StorageError::OtherCluster { .. })
        ));
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_directory_that_lost_its_log_is_not_taken_for_a_new_one() {
        let path = std::env::temp_dir().join(format!("conclave-storage-{:x}", random()));
        let options = Options {
            data_dir: Some(path.clone()),
            ..Options::default()
        };
        let settings = options.validate().unwrap();
        drop(Storage::open(&settings).unwrap());
        fs::remove_dir_all(path.join(LOG)).unwrap();
        let opened = Storage::open(&settings);
        assert!(matches!(opened, Err(StorageError::LogGone { .. })));
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn an_empty_segment_is_a_new_directory_only_until_the_first_start_succeeded() {
        let path = std::env::temp_dir().join(format!("conclave-storage-{:x}", random()));
        let options = Options {
            data_dir: Some(path.clone()),
            ..Options::default()
        };
        let settings = options.validate().unwrap();
        let segment = path.join(LOG).join("log-00000000000000000001");
        fs::create_dir_all(path.join(LOG)).unwrap();
        fs::write(&segment, "").unwrap();
        drop(Storage::open(&settings).unwrap());
        fs::write(&segment, "").unwrap();
        let opened = Storage::open(&settings);
        assert!(matches!(opened, Err(StorageError::LogGone { .. })));
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn an_empty_directory_does_not_join_a_running_cluster() {
        let path = std::env::temp_dir().join(format!("conclave-storage-{:x}", random()));
        let options = Options {
            data_dir: Some(path.clone()),
            initial_cluster_state: ClusterState::Existing,
            ..Options::default()
        };
        let opened = Storage::open(&options.validate().unwrap());
        assert!(matches!(opened, Err(StorageError::EmptyButExisting { .. })));
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
