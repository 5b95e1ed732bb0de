//! What a server is told at start: plain data, checked once, turned into the
//! [`Settings`] that the rest of the crate runs on.
//!
//! The names and meanings are etcd's flags, so that a start script carries over.
//! Known differences: each member has exactly one peer address, and an address
//! that is not given is derived where that is unambiguous.

use std::{collections::BTreeSet, fmt, path::PathBuf, thread};

use axum::http::Uri;
use conclave_core::{ids::NodeId, limits, replica::Retention};
use xxhash_rust::xxh3::xxh3_64;

pub use crate::retention::CompactionMode;
use crate::retention::retention;

/// More voters make every write slower and the cluster no safer.
const MEMBERS_MAX: usize = 7;
/// The longest name of a member.
const MEMBER_NAME_BYTES_MAX: usize = 128;
/// Below this, a timer of the operating system decides, not the heartbeat.
const HEARTBEAT_MS_MIN: u64 = 10;
/// As etcd has it: more often than that, it would be traffic for nothing.
const WATCH_PROGRESS_MS_MIN: u64 = 100;
/// A single late heartbeat must not start an election.
const HEARTBEATS_PER_ELECTION_MIN: u64 = 5;
/// Above this a dead leader would stop the service for minutes.
const ELECTION_MS_MAX: u64 = 50_000;
/// Smaller requests could not carry the longest names.
const REQUEST_BYTES_MIN: usize = 64 << 10;
/// More threads than this only take processor time from each other.
const IO_THREADS_MAX: usize = 64;

/// How a server is to run. [`Options::default`] is a cluster of one on this
/// machine. Lists that are empty, and `None`, are derived from the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The member's name; must be one of those in `initial_cluster`.
    pub name: String,
    /// Where the member keeps its log; by default `NAME.conclave`.
    pub data_dir: Option<PathBuf>,
    /// Where to listen for clients; by default `http://localhost:2379`.
    pub listen_client_urls: Vec<String>,
    /// What clients are told to dial; by default `listen_client_urls`.
    pub advertise_client_urls: Vec<String>,
    /// Where to listen for the other members; by default `http://localhost:2380`.
    pub listen_peer_urls: Vec<String>,
    /// What the other members dial: exactly one, and the one that
    /// `initial_cluster` has for this member; by default that one.
    pub initial_advertise_peer_urls: Vec<String>,
    /// Every member as `name=url`; by default this one alone. Must be the same on
    /// all members, and for the life of the data directory.
    pub initial_cluster: Vec<String>,
    /// Whether an empty data directory may start a cluster.
    pub initial_cluster_state: ClusterState,
    /// Keeps apart clusters that have the same members.
    pub initial_cluster_token: String,
    /// Between two heartbeats of the leader, in milliseconds.
    pub heartbeat_interval_ms: u64,
    /// Without a heartbeat for this long a member campaigns, in milliseconds.
    pub election_timeout_ms: u64,
    /// Where to serve metrics and health in addition to the client addresses.
    pub listen_metrics_urls: Vec<String>,
    /// The largest request of a client, in bytes.
    pub max_request_bytes: usize,
    /// Operations that a transaction of the etcd API may have in each of its lists.
    pub max_txn_ops: usize,
    /// What `auto_compaction_retention` counts.
    pub auto_compaction_mode: CompactionMode,
    /// What automatic compaction keeps, as text; `0`: everything. By default the
    /// newest 1,000,000 revisions and 10 minutes.
    pub auto_compaction_retention: Option<String>,
    /// The size of the state, in bytes, above which commands that grow it are
    /// refused; 0: the default of 2 GiB; below 0: no limit.
    pub quota_backend_bytes: i64,
    /// Entries of the log between two checkpoints; 0 stands for the default.
    pub snapshot_count: u64,
    /// Bytes of log that are kept for members who are away; who needs more gets a
    /// checkpoint. 0 stands for the default of 1 GiB.
    pub log_retention_bytes: u64,
    /// How often a watcher that asked for it hears how far it has come, although nothing
    /// happens, in milliseconds.
    pub watch_progress_notify_interval_ms: u64,
    /// Threads that serve clients; with 0 the thread of the node serves them, too.
    /// By default none with one or two processors, where a change of threads costs
    /// more than it gains, else half as many as processors, up to 4.
    pub io_threads: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "default".to_owned(),
            data_dir: None,
            listen_client_urls: Vec::new(),
            advertise_client_urls: Vec::new(),
            listen_peer_urls: Vec::new(),
            initial_advertise_peer_urls: Vec::new(),
            initial_cluster: Vec::new(),
            initial_cluster_state: ClusterState::New,
            initial_cluster_token: "conclave-cluster".to_owned(),
            heartbeat_interval_ms: 100,
            election_timeout_ms: 500,
            listen_metrics_urls: Vec::new(),
            max_request_bytes: limits::COMMAND_BYTES_MAX,
            max_txn_ops: limits::TXN_OPERATIONS_DEFAULT,
            auto_compaction_mode: CompactionMode::default(),
            auto_compaction_retention: None,
            quota_backend_bytes: 0,
            snapshot_count: limits::CHECKPOINT_ENTRIES,
            log_retention_bytes: limits::LOG_BYTES_MAX,
            watch_progress_notify_interval_ms: 10 * 60 * 1_000,
            io_threads: None,
        }
    }
}

/// What an empty data directory means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    /// The cluster starts with its members.
    New,
    /// The cluster runs already, so this member must have its directory.
    Existing,
}

impl Options {
    /// Checks everything that can be checked without touching the machine.
    pub fn validate(&self) -> Result<Settings, OptionsError> {
        check_name(&self.name)?;
        self.check_times()?;
        self.check_sizes()?;
        let listen_client = urls("listen-client-urls", &self.listen_client_urls, 2379)?;
        let listen_peer = urls("listen-peer-urls", &self.listen_peer_urls, 2380)?;
        let listen_metrics = parse_all("listen-metrics-urls", &self.listen_metrics_urls)?;
        check_distinct(&[&listen_client, &listen_peer, &listen_metrics])?;
        let advertise_client = self.advertise_client(&listen_client)?;
        let topology = self.topology(&listen_peer)?;
        let quota_bytes = match u64::try_from(self.quota_backend_bytes) {
            Ok(0) => limits::QUOTA_BYTES_DEFAULT,
            Ok(bytes) => bytes,
            Err(_) => u64::MAX,
        };
        Ok(Settings {
            name: self.name.clone(),
            data_dir: self
                .data_dir
                .clone()
                .unwrap_or_else(|| format!("{}.conclave", self.name).into()),
            cluster_state: self.initial_cluster_state,
            listen_client,
            advertise_client,
            listen_peer,
            listen_metrics,
            topology,
            heartbeat_ms: self.heartbeat_interval_ms,
            election_ms: self.election_timeout_ms,
            max_request_bytes: self.max_request_bytes,
            max_txn_ops: self.max_txn_ops,
            retention: retention(
                self.auto_compaction_mode,
                self.auto_compaction_retention.as_deref(),
                quota_bytes,
            )?,
            quota_bytes,
            snapshot_count: match self.snapshot_count {
                0 => limits::CHECKPOINT_ENTRIES,
                count => count,
            },
            log_retention_bytes: match self.log_retention_bytes {
                0 => limits::LOG_BYTES_MAX,
                bytes => bytes,
            },
            watch_progress_ms: self.watch_progress_notify_interval_ms,
            io_threads: self.io_threads.unwrap_or_else(default_io_threads),
        })
    }

    fn check_times(&self) -> Result<(), OptionsError> {
        let (heartbeat_ms, election_ms) = (self.heartbeat_interval_ms, self.election_timeout_ms);
        if heartbeat_ms < HEARTBEAT_MS_MIN {
            return Err(OptionsError::HeartbeatTooShort { heartbeat_ms });
        }
        let progress_ms = self.watch_progress_notify_interval_ms;
        if progress_ms < WATCH_PROGRESS_MS_MIN {
            return Err(OptionsError::WatchProgressTooOften { progress_ms });
        }
        if election_ms > ELECTION_MS_MAX {
            return Err(OptionsError::ElectionTooLong { election_ms });
        }
        if election_ms / HEARTBEATS_PER_ELECTION_MIN < heartbeat_ms {
            return Err(OptionsError::ElectionTooShort {
                heartbeat_ms,
                election_ms,
            });
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), OptionsError> {
        let bytes = self.max_request_bytes;
        if !(REQUEST_BYTES_MIN..=limits::COMMAND_BYTES_MAX).contains(&bytes) {
            return Err(OptionsError::RequestBytes { bytes });
        }
        let operations = self.max_txn_ops;
        if !(1..=limits::TXN_OPERATIONS_MAX).contains(&operations) {
            return Err(OptionsError::TxnOperations { operations });
        }
        if let Some(threads) = self.io_threads
            && threads > IO_THREADS_MAX
        {
            return Err(OptionsError::IoThreads { threads });
        }
        Ok(())
    }

    fn advertise_client(&self, listen: &[Url]) -> Result<Vec<Url>, OptionsError> {
        if !self.advertise_client_urls.is_empty() {
            return parse_all("advertise-client-urls", &self.advertise_client_urls);
        }
        match listen.iter().find(|url| url.is_wildcard()) {
            Some(url) => Err(OptionsError::NothingToAdvertise {
                flag: "advertise-client-urls",
                listen: url.clone(),
            }),
            None => Ok(listen.to_vec()),
        }
    }

    fn topology(&self, listen_peer: &[Url]) -> Result<Topology, OptionsError> {
        let advertised = parse_all(
            "initial-advertise-peer-urls",
            &self.initial_advertise_peer_urls,
        )?;
        if advertised.len() > 1 {
            return Err(OptionsError::SeveralPeerUrls);
        }
        let advertised = advertised.into_iter().next();
        if self.initial_cluster.is_empty() {
            let url = self.own_peer_url(advertised, listen_peer)?;
            return Topology::new(
                &self.name,
                vec![(self.name.clone(), url)],
                &self.initial_cluster_token,
            );
        }
        let members = self
            .initial_cluster
            .iter()
            .map(|entry| member(entry))
            .collect::<Result<_, _>>()?;
        let topology = Topology::new(&self.name, members, &self.initial_cluster_token)?;
        match advertised {
            Some(advertised) if advertised != topology.own().peer_url => {
                Err(OptionsError::AdvertiseMismatch {
                    name: self.name.clone(),
                    listed: topology.own().peer_url.clone(),
                    advertised,
                })
            }
            _ => Ok(topology),
        }
    }

    fn own_peer_url(&self, advertised: Option<Url>, listen: &[Url]) -> Result<Url, OptionsError> {
        if let Some(url) = advertised {
            return Ok(url);
        }
        let listen = listen
            .first()
            .expect("an empty list was replaced by the default")
            .clone();
        if listen.is_wildcard() {
            return Err(OptionsError::NothingToAdvertise {
                flag: "initial-advertise-peer-urls",
                listen,
            });
        }
        Ok(listen)
    }
}

/// Options that hold together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// See [`Options::name`].
    pub name: String,
    /// See [`Options::data_dir`].
    pub data_dir: PathBuf,
    /// See [`Options::initial_cluster_state`].
    pub cluster_state: ClusterState,
    /// At least one.
    pub listen_client: Vec<Url>,
    /// At least one.
    pub advertise_client: Vec<Url>,
    /// At least one.
    pub listen_peer: Vec<Url>,
    /// May be empty.
    pub listen_metrics: Vec<Url>,
    /// Who is in the cluster.
    pub topology: Topology,
    /// See [`Options::heartbeat_interval_ms`].
    pub heartbeat_ms: u64,
    /// See [`Options::election_timeout_ms`].
    pub election_ms: u64,
    /// See [`Options::max_request_bytes`].
    pub max_request_bytes: usize,
    /// See [`Options::max_txn_ops`].
    pub max_txn_ops: usize,
    /// What automatic compaction keeps; `None`: everything.
    pub retention: Option<Retention>,
    /// The size of the state above which it may not grow, in bytes.
    pub quota_bytes: u64,
    /// Entries between two checkpoints, at least 1.
    pub snapshot_count: u64,
    /// Bytes of log that are kept for members who are away, at least 1.
    pub log_retention_bytes: u64,
    /// See [`Options::watch_progress_notify_interval_ms`].
    pub watch_progress_ms: u64,
    /// See [`Options::io_threads`].
    pub io_threads: usize,
}

/// Who is in the cluster, and which of them this is.
///
/// Ids are computed, not given out: every member that is told the same
/// `initial-cluster` and token comes to the same ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The cluster's id; never 0.
    pub cluster: u64,
    own: NodeId,
    members: Vec<Member>,
}

/// One member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Where the others reach it.
    pub peer_url: Url,
}

impl Topology {
    fn new(own: &str, members: Vec<(String, Url)>, token: &str) -> Result<Self, OptionsError> {
        if members.len() > MEMBERS_MAX {
            return Err(OptionsError::TooManyMembers {
                members: members.len(),
            });
        }
        let mut names = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for (name, url) in &members {
            if !names.insert(name) {
                return Err(OptionsError::DuplicateName { name: name.clone() });
            }
            if !addresses.insert(url) {
                return Err(OptionsError::DuplicatePeerUrl { url: url.clone() });
            }
        }
        let mut members: Vec<Member> = members
            .into_iter()
            .map(|(name, peer_url)| Member {
                id: member_id(&peer_url, token),
                name,
                peer_url,
            })
            .collect();
        members.sort_by_key(|member| member.id);
        if members.windows(2).any(|pair| pair[0].id == pair[1].id) {
            return Err(OptionsError::IdCollision);
        }
        let own = members
            .iter()
            .find(|member| member.name == own)
            .ok_or_else(|| OptionsError::NotInCluster {
                name: own.to_owned(),
            })?
            .id;
        Ok(Self {
            cluster: cluster_id(&members, token),
            own,
            members,
        })
    }

    /// This member.
    pub fn own(&self) -> &Member {
        self.member(self.own)
            .expect("the own id was taken from the list")
    }

    /// All members in order of id.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// All members but this one.
    pub fn others(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.id != self.own)
    }

    /// A member, if it is one.
    pub fn member(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }
}

/// A stable number made from the given parts; never 0, which means "nobody".
fn stable_id<'a>(parts: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    xxh3_64(&bytes).max(1)
}

fn member_id(peer_url: &Url, token: &str) -> NodeId {
    let url = peer_url.to_string();
    NodeId(stable_id([url.as_bytes(), token.as_bytes()].into_iter()))
}

fn cluster_id(members: &[Member], token: &str) -> u64 {
    let ids: Vec<[u8; 8]> = members
        .iter()
        .map(|member| member.id.0.to_le_bytes())
        .collect();
    stable_id(
        ids.iter()
            .map(<[u8; 8]>::as_slice)
            .chain([token.as_bytes()]),
    )
}

/// An address as `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Url {
    host: String,
    port: u16,
}

impl Url {
    /// A name or an address; an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        self.host.trim_start_matches('[').trim_end_matches(']')
    }

    /// The port; 0 lets the system choose.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether it means every address of the machine, so that nobody can dial it.
    fn is_wildcard(&self) -> bool {
        matches!(self.host(), "0.0.0.0" | "::")
    }

    fn parse(flag: &'static str, text: &str) -> Result<Self, OptionsError> {
        let bad = |what| OptionsError::BadUrl {
            flag,
            url: text.to_owned(),
            what,
        };
        let uri: Uri = text.parse().map_err(|_| bad("it is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(OptionsError::Tls {
                    flag,
                    url: text.to_owned(),
                });
            }
            _ => return Err(bad("it must begin with http://")),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad("it must end after the port"));
        }
        let authority = uri.authority().ok_or_else(|| bad("it has no host"))?;
        if authority.host().is_empty() || authority.as_str().contains('@') {
            return Err(bad("it must be http://host:port"));
        }
        let port = authority.port_u16().ok_or_else(|| bad("it has no port"))?;
        Ok(Self {
            host: authority.host().to_ascii_lowercase(),
            port,
        })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

fn parse_all(flag: &'static str, texts: &[String]) -> Result<Vec<Url>, OptionsError> {
    texts.iter().map(|text| Url::parse(flag, text)).collect()
}

fn urls(flag: &'static str, texts: &[String], default_port: u16) -> Result<Vec<Url>, OptionsError> {
    if texts.is_empty() {
        return Ok(vec![Url {
            host: "localhost".to_owned(),
            port: default_port,
        }]);
    }
    parse_all(flag, texts)
}

fn member(entry: &str) -> Result<(String, Url), OptionsError> {
    let (name, url) = entry
        .split_once('=')
        .ok_or_else(|| OptionsError::BadMember {
            entry: entry.to_owned(),
        })?;
    check_name(name)?;
    Ok((name.to_owned(), Url::parse("initial-cluster", url)?))
}

fn check_name(name: &str) -> Result<(), OptionsError> {
    let fits = (1..=MEMBER_NAME_BYTES_MAX).contains(&name.len());
    if fits && !name.contains(|c: char| c.is_control() || matches!(c, '=' | ',')) {
        return Ok(());
    }
    Err(OptionsError::BadName {
        name: name.to_owned(),
    })
}

fn check_distinct(lists: &[&[Url]]) -> Result<(), OptionsError> {
    let mut seen = BTreeSet::new();
    for url in lists.iter().copied().flatten().filter(|url| url.port != 0) {
        if !seen.insert(url) {
            return Err(OptionsError::ListensTwice { url: url.clone() });
        }
    }
    Ok(())
}

fn default_io_threads() -> usize {
    match thread::available_parallelism().map_or(1, usize::from) {
        0..=2 => 0,
        processors => (processors / 2).min(4),
    }
}

/// Why options do not hold together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say it, and the fields are what they name"
)]
pub enum OptionsError {
    #[error("name `{name}` is empty, too long, or has `=`, `,` or control characters in it")]
    BadName { name: String },
    #[error("--{flag}: `{url}`: {what}")]
    BadUrl {
        flag: &'static str,
        url: String,
        what: &'static str,
    },
    #[error("--{flag}: `{url}`: TLS is not supported yet; use http://")]
    Tls { flag: &'static str, url: String },
    #[error("--initial-cluster: `{entry}` is not name=url")]
    BadMember { entry: String },
    #[error("--initial-cluster names `{name}` twice; a member has one peer address")]
    DuplicateName { name: String },
    #[error("--initial-cluster gives {url} to two members")]
    DuplicatePeerUrl { url: Url },
    #[error("--initial-cluster has {members} members; at most {MEMBERS_MAX} are supported")]
    TooManyMembers { members: usize },
    #[error("two members have the same id by chance; change --initial-cluster-token")]
    IdCollision,
    #[error("--name is `{name}`, which --initial-cluster does not list")]
    NotInCluster { name: String },
    #[error("--initial-advertise-peer-urls must be a single address")]
    SeveralPeerUrls,
    #[error(
        "--initial-cluster has {listed} for `{name}`, but --initial-advertise-peer-urls is {advertised}"
    )]
    AdvertiseMismatch {
        name: String,
        listed: Url,
        advertised: Url,
    },
    #[error("--{flag} is needed, because nobody can dial {listen}")]
    NothingToAdvertise { flag: &'static str, listen: Url },
    #[error("{url} is given twice as an address to listen on")]
    ListensTwice { url: Url },
    #[error("--heartbeat-interval is {heartbeat_ms} ms; at least {HEARTBEAT_MS_MIN} ms are needed")]
    HeartbeatTooShort { heartbeat_ms: u64 },
    #[error(
        "--watch-progress-notify-interval is {progress_ms} ms; at least \
         {WATCH_PROGRESS_MS_MIN} ms are needed"
    )]
    WatchProgressTooOften { progress_ms: u64 },
    #[error(
        "--election-timeout is {election_ms} ms; it must be at least \
         {HEARTBEATS_PER_ELECTION_MIN} times --heartbeat-interval ({heartbeat_ms} ms)"
    )]
    ElectionTooShort { heartbeat_ms: u64, election_ms: u64 },
    #[error("--election-timeout is {election_ms} ms; at most {ELECTION_MS_MAX} ms are allowed")]
    ElectionTooLong { election_ms: u64 },
    #[error(
        "--max-request-bytes is {bytes}; it must be {REQUEST_BYTES_MIN} to {}",
        limits::COMMAND_BYTES_MAX
    )]
    RequestBytes { bytes: usize },
    #[error(
        "--max-txn-ops is {operations}; it must be 1 to {}",
        limits::TXN_OPERATIONS_MAX
    )]
    TxnOperations { operations: usize },
    #[error(
        "--auto-compaction-retention: `{text}` is not a time such as 1h or 30m, \
         or, with --auto-compaction-mode=revision, a number"
    )]
    CompactionRetention { text: String },
    #[error("{threads} I/O threads were asked for; it must be at most {IO_THREADS_MAX}")]
    IoThreads { threads: usize },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|&text| text.to_owned()).collect()
    }

    fn three() -> Options {
        Options {
            name: "b".to_owned(),
            initial_cluster: strings(&["a=http://h1:2380", "b=http://h2:2380", "c=http://h3:2380"]),
            ..Options::default()
        }
    }

    #[test]
    fn defaults_are_a_cluster_of_one_on_this_machine() {
        let settings = Options::default().validate().unwrap();
        assert_eq!(settings.data_dir, PathBuf::from("default.conclave"));
        assert_eq!(settings.topology.members().len(), 1);
        assert_eq!(
            settings.topology.own().peer_url.to_string(),
            "http://localhost:2380"
        );
        assert_eq!(settings.advertise_client, settings.listen_client);
        assert!(settings.io_threads <= 4);
        assert_eq!(settings.quota_bytes, 2 << 30);
    }

    #[test]
    fn members_agree_on_ids_whatever_order_they_are_told() {
        let mut other = three();
        other.name = "c".to_owned();
        other.initial_cluster.reverse();
        let (b, c) = (three().validate().unwrap(), other.validate().unwrap());
        assert_eq!(b.topology.cluster, c.topology.cluster);
        assert_eq!(b.topology.members(), c.topology.members());
        assert_ne!(b.topology.own().id, c.topology.own().id);
        assert_eq!(b.topology.others().count(), 2);
    }

    #[test]
    fn ids_are_part_of_the_format_of_data_directories() {
        let topology = three().validate().unwrap().topology;
        let ids: Vec<String> = topology
            .members()
            .iter()
            .map(|member| member.id.to_string())
            .collect();
        assert_eq!(format!("{:x}", topology.cluster), "76fbd70b79b550e4");
        assert_eq!(
            ids,
            ["c9ffafee1866c3", "80b18dce3dd9a480", "d4fd881b85ee9b78"]
        );
    }

    #[test]
    fn the_token_keeps_clusters_apart() {
        let mut other = three();
        other.initial_cluster_token = "other".to_owned();
        let (one, two) = (three().validate().unwrap(), other.validate().unwrap());
        assert_ne!(one.topology.cluster, two.topology.cluster);
        assert_ne!(one.topology.own().id, two.topology.own().id);
    }

    #[test]
    fn addresses_are_compared_without_case_and_trailing_slash() {
        let options = Options {
            initial_advertise_peer_urls: strings(&["http://H2:2380/"]),
            ..three()
        };
        assert!(options.validate().is_ok());
    }

    /// Spoils good options in one way, and says which error that makes.
    fn refused(spoil: impl FnOnce(&mut Options)) -> String {
        let mut options = three();
        spoil(&mut options);
        let error = format!("{:?}", options.validate().expect_err("spoilt"));
        error
            .split([' ', '{'])
            .next()
            .unwrap_or_default()
            .to_owned()
    }

    #[test]
    fn mistakes_in_names_and_members_are_told_apart() {
        let many = |o: &mut Options| {
            o.initial_cluster
                .extend((0..5).map(|i| format!("n{i}=http://n{i}:1")));
        };
        assert_eq!(refused(|o| o.name = String::new()), "BadName");
        assert_eq!(refused(|o| o.name = "a=b".to_owned()), "BadName");
        assert_eq!(refused(|o| o.name = "x".repeat(129)), "BadName");
        assert_eq!(refused(|o| o.name = "d".to_owned()), "NotInCluster");
        assert_eq!(
            refused(|o| o.initial_cluster[0] = "a".to_owned()),
            "BadMember"
        );
        assert_eq!(
            refused(|o| o.initial_cluster[0] = "=http://h:1".to_owned()),
            "BadName"
        );
        assert_eq!(
            refused(|o| o.initial_cluster[0] = "b=http://h9:1".to_owned()),
            "DuplicateName"
        );
        let twice = "a=http://h2:2380".to_owned();
        assert_eq!(
            refused(|o| o.initial_cluster[0] = twice),
            "DuplicatePeerUrl"
        );
        assert_eq!(refused(many), "TooManyMembers");
    }

    #[test]
    fn mistakes_in_addresses_are_told_apart() {
        let advertise =
            |urls: &'static [&str]| refused(|o| o.initial_advertise_peer_urls = strings(urls));
        let listen = |url: &'static str| refused(|o| o.listen_client_urls = strings(&[url]));
        assert_eq!(advertise(&["http://h9:2380"]), "AdvertiseMismatch");
        assert_eq!(
            advertise(&["http://h2:2380", "http://h4:2380"]),
            "SeveralPeerUrls"
        );
        assert_eq!(listen("http://0.0.0.0:2379"), "NothingToAdvertise");
        assert_eq!(listen("http://[::]:2379"), "NothingToAdvertise");
        assert_eq!(listen("http://localhost:2380"), "ListensTwice");
    }

    #[test]
    fn mistakes_in_numbers_are_told_apart() {
        assert_eq!(
            refused(|o| o.heartbeat_interval_ms = 1),
            "HeartbeatTooShort"
        );
        assert_eq!(refused(|o| o.election_timeout_ms = 499), "ElectionTooShort");
        assert_eq!(
            refused(|o| o.heartbeat_interval_ms = u64::MAX),
            "ElectionTooShort"
        );
        assert_eq!(
            refused(|o| o.election_timeout_ms = 60_000),
            "ElectionTooLong"
        );
        assert_eq!(refused(|o| o.max_request_bytes = 1), "RequestBytes");
        assert_eq!(refused(|o| o.max_request_bytes = 1 << 30), "RequestBytes");
        assert_eq!(refused(|o| o.max_txn_ops = 0), "TxnOperations");
        assert_eq!(refused(|o| o.max_txn_ops = 5_000), "TxnOperations");
        assert_eq!(refused(|o| o.io_threads = Some(65)), "IoThreads");
        let retention = Some("1d".to_owned());
        assert_eq!(
            refused(|o| o.auto_compaction_retention = retention),
            "CompactionRetention"
        );
    }

    #[test]
    fn an_address_must_be_http_with_host_and_port() {
        let listen = |url: &str| {
            let options = Options {
                listen_client_urls: strings(&[url]),
                ..Options::default()
            };
            options
                .validate()
                .map(|settings| settings.listen_client[0].to_string())
        };
        assert_eq!(listen("http://[::1]:2379").unwrap(), "http://[::1]:2379");
        assert_eq!(listen("http://10.0.0.1:0").unwrap(), "http://10.0.0.1:0");
        assert!(matches!(
            listen("https://h:1"),
            Err(OptionsError::Tls { .. })
        ));
        for url in [
            "",
            "h",
            "h:1",
            "ftp://h:1",
            "http://h",
            "http://h:1/p",
            "http://h:1?q",
            "http://:1",
            "http://u@h:1",
            "http://h:99999",
        ] {
            assert!(
                matches!(listen(url), Err(OptionsError::BadUrl { .. })),
                "{url}"
            );
        }
    }
}
