//! What the server counts, and how it tells: the Prometheus text format.
//!
//! Names are a contract with dashboards, so all of them are in one list.

use std::{
    fmt::Write as _,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use conclave_core::replica::{Role, Status};
use futures_util::Stream;
use tonic::Code;

/// One series, or several that differ in labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
}

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric {
        name,
        kind: "counter",
        help,
    }
}

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric {
        name,
        kind: "gauge",
        help,
    }
}

const REQUESTS: Metric = counter(
    "conclave_requests_total",
    "Requests answered, by method and gRPC code.",
);
const IN_FLIGHT: Metric = gauge(
    "conclave_requests_in_flight",
    "Requests that wait for their answer, and streams that are open, by method.",
);
const CONNECTIONS: Metric = counter(
    "conclave_client_connections_total",
    "Connections accepted on the client addresses.",
);
const WATCHED: Metric = gauge(
    "conclave_watched_sessions",
    "Sessions followed by event streams.",
);
const SLOW_READERS: Metric = counter(
    "conclave_slow_readers_total",
    "Event streams cut because they were read too slowly.",
);
const WATCHERS: Metric = gauge("conclave_watchers", "Watchers of keys on this member.");
const WATCHERS_BEHIND: Metric = gauge(
    "conclave_watchers_behind",
    "Watchers that are being caught up, or whose readers are slow.",
);
const WATCH_EVENTS: Metric = counter(
    "conclave_watch_events_total",
    "Events of keys that were told, once for each watcher.",
);
const INFO: Metric = gauge("conclave_info", "Always 1; the labels say what runs.");
const HAS_LEADER: Metric = gauge("conclave_has_leader", "Whether this member knows a leader.");
const IS_LEADER: Metric = gauge("conclave_is_leader", "Whether this member leads.");
const TERM: Metric = gauge("conclave_term", "The current Raft term.");
const COMMITTED: Metric = gauge(
    "conclave_committed_index",
    "The last entry known to be committed.",
);
const APPLIED: Metric = gauge("conclave_applied_index", "The last entry applied.");
const LAST: Metric = gauge("conclave_last_index", "The last entry of the log.");
const LOG_BYTES: Metric = gauge("conclave_log_bytes", "Bytes of the log on disk.");
const INSTALLS: Metric = counter(
    "conclave_checkpoints_installed_total",
    "Checkpoints of other members that this one has gone on from.",
);
const REVISION: Metric = gauge("conclave_revision", "The newest revision of the keyspace.");
const COMPACTED: Metric = gauge(
    "conclave_compacted_revision",
    "The lowest revision that can be read; 0 if all can.",
);
const SESSIONS: Metric = gauge("conclave_sessions", "Sessions that are alive.");
const KEYS: Metric = gauge("conclave_keys", "Keys that are there now.");
const STATE_BYTES: Metric = gauge(
    "conclave_state_bytes",
    "Size of the state that counts against the quota, in bytes.",
);
const NO_SPACE: Metric = gauge(
    "conclave_alarm_nospace",
    "Whether the state is at its quota and may not grow.",
);
const PEER_CONNECTED: Metric = gauge(
    "conclave_peer_connected",
    "Whether the link to a member stands, by member.",
);
const PEER_SENT: Metric = counter(
    "conclave_peer_messages_sent_total",
    "Messages given to the link to a member.",
);
const PEER_DROPPED: Metric = counter(
    "conclave_peer_messages_dropped_total",
    "Messages to a member dropped because its link was down or full.",
);
const PEER_RECEIVED: Metric = counter(
    "conclave_peer_messages_received_total",
    "Messages received from a member.",
);
const START_TIME: Metric = gauge(
    "process_start_time_seconds",
    "When the process started, in seconds since 1970.",
);
const RESIDENT: Metric = gauge("process_resident_memory_bytes", "Memory in use, in bytes.");
const CPU: Metric = counter("process_cpu_seconds_total", "Processor time used.");

/// Every metric there is.
#[cfg(test)]
const CATALOGUE: [Metric; 30] = [
    REQUESTS,
    IN_FLIGHT,
    CONNECTIONS,
    WATCHED,
    SLOW_READERS,
    WATCHERS,
    WATCHERS_BEHIND,
    WATCH_EVENTS,
    INFO,
    HAS_LEADER,
    IS_LEADER,
    TERM,
    COMMITTED,
    APPLIED,
    LAST,
    LOG_BYTES,
    INSTALLS,
    REVISION,
    COMPACTED,
    SESSIONS,
    KEYS,
    STATE_BYTES,
    NO_SPACE,
    PEER_CONNECTED,
    PEER_SENT,
    PEER_DROPPED,
    PEER_RECEIVED,
    START_TIME,
    RESIDENT,
    CPU,
];

/// gRPC has codes 0 to 16.
const CODES: usize = 17;

/// A call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    SessionOpen,
    SessionRenew,
    SessionAttach,
    SessionClose,
    SessionList,
    SessionWatch,
    LockAcquire,
    LockRelease,
    LockCancel,
    LockForceRelease,
    LockList,
    LockCheck,
    ElectionCampaign,
    ElectionProclaim,
    ElectionResign,
    ElectionCancel,
    ElectionLeader,
    ElectionObserve,
    ElectionList,
    ClusterStatus,
    ClusterCompact,
    ClusterDisarm,
    ChannelConnect,
    KvRange,
    KvRangeStream,
    KvPut,
    KvDeleteRange,
    KvTxn,
    KvCompact,
    Watch,
    LeaseGrant,
    LeaseRevoke,
    LeaseKeepAlive,
    LeaseTimeToLive,
    LeaseLeases,
    MemberAdd,
    MemberRemove,
    MemberUpdate,
    MemberList,
    MemberPromote,
    Alarm,
    MemberStatus,
    Defragment,
    Hash,
    HashKv,
    Snapshot,
    MoveLeader,
    Downgrade,
    Auth,
    V3Lock,
    V3Unlock,
    V3Campaign,
    V3Proclaim,
    V3Leader,
    V3Observe,
    V3Resign,
}

impl Method {
    const ALL: &[Self] = &[
        Self::SessionOpen,
        Self::SessionRenew,
        Self::SessionAttach,
        Self::SessionClose,
        Self::SessionList,
        Self::SessionWatch,
        Self::LockAcquire,
        Self::LockRelease,
        Self::LockCancel,
        Self::LockForceRelease,
        Self::LockList,
        Self::LockCheck,
        Self::ElectionCampaign,
        Self::ElectionProclaim,
        Self::ElectionResign,
        Self::ElectionCancel,
        Self::ElectionLeader,
        Self::ElectionObserve,
        Self::ElectionList,
        Self::ClusterStatus,
        Self::ClusterCompact,
        Self::ClusterDisarm,
        Self::ChannelConnect,
        Self::KvRange,
        Self::KvRangeStream,
        Self::KvPut,
        Self::KvDeleteRange,
        Self::KvTxn,
        Self::KvCompact,
        Self::Watch,
        Self::LeaseGrant,
        Self::LeaseRevoke,
        Self::LeaseKeepAlive,
        Self::LeaseTimeToLive,
        Self::LeaseLeases,
        Self::MemberAdd,
        Self::MemberRemove,
        Self::MemberUpdate,
        Self::MemberList,
        Self::MemberPromote,
        Self::Alarm,
        Self::MemberStatus,
        Self::Defragment,
        Self::Hash,
        Self::HashKv,
        Self::Snapshot,
        Self::MoveLeader,
        Self::Downgrade,
        Self::Auth,
        Self::V3Lock,
        Self::V3Unlock,
        Self::V3Campaign,
        Self::V3Proclaim,
        Self::V3Leader,
        Self::V3Observe,
        Self::V3Resign,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::ChannelConnect => "Channel/Connect",
            Self::SessionOpen => "Session/Open",
            Self::SessionRenew => "Session/Renew",
            Self::SessionAttach => "Session/Attach",
            Self::SessionClose => "Session/Close",
            Self::SessionList => "Session/List",
            Self::SessionWatch => "Session/Watch",
            Self::LockAcquire => "Lock/Acquire",
            Self::LockRelease => "Lock/Release",
            Self::LockCancel => "Lock/Cancel",
            Self::LockForceRelease => "Lock/ForceRelease",
            Self::LockList => "Lock/List",
            Self::LockCheck => "Lock/Check",
            Self::ElectionCampaign => "Election/Campaign",
            Self::ElectionProclaim => "Election/Proclaim",
            Self::ElectionResign => "Election/Resign",
            Self::ElectionCancel => "Election/Cancel",
            Self::ElectionLeader => "Election/Leader",
            Self::ElectionObserve => "Election/Observe",
            Self::ElectionList => "Election/List",
            Self::ClusterStatus => "Cluster/Status",
            Self::ClusterCompact => "Cluster/Compact",
            Self::ClusterDisarm => "Cluster/Disarm",
            Self::KvRange => "etcdserverpb.KV/Range",
            Self::KvRangeStream => "etcdserverpb.KV/RangeStream",
            Self::KvPut => "etcdserverpb.KV/Put",
            Self::KvDeleteRange => "etcdserverpb.KV/DeleteRange",
            Self::KvTxn => "etcdserverpb.KV/Txn",
            Self::KvCompact => "etcdserverpb.KV/Compact",
            Self::Watch => "etcdserverpb.Watch/Watch",
            Self::LeaseGrant => "etcdserverpb.Lease/LeaseGrant",
            Self::LeaseRevoke => "etcdserverpb.Lease/LeaseRevoke",
            Self::LeaseKeepAlive => "etcdserverpb.Lease/LeaseKeepAlive",
            Self::LeaseTimeToLive => "etcdserverpb.Lease/LeaseTimeToLive",
            Self::LeaseLeases => "etcdserverpb.Lease/LeaseLeases",
            Self::MemberAdd => "etcdserverpb.Cluster/MemberAdd",
            Self::MemberRemove => "etcdserverpb.Cluster/MemberRemove",
            Self::MemberUpdate => "etcdserverpb.Cluster/MemberUpdate",
            Self::MemberList => "etcdserverpb.Cluster/MemberList",
            Self::MemberPromote => "etcdserverpb.Cluster/MemberPromote",
            Self::Alarm => "etcdserverpb.Maintenance/Alarm",
            Self::MemberStatus => "etcdserverpb.Maintenance/Status",
            Self::Defragment => "etcdserverpb.Maintenance/Defragment",
            Self::Hash => "etcdserverpb.Maintenance/Hash",
            Self::HashKv => "etcdserverpb.Maintenance/HashKV",
            Self::Snapshot => "etcdserverpb.Maintenance/Snapshot",
            Self::MoveLeader => "etcdserverpb.Maintenance/MoveLeader",
            Self::Downgrade => "etcdserverpb.Maintenance/Downgrade",
            Self::Auth => "etcdserverpb.Auth",
            Self::V3Lock => "v3lockpb.Lock/Lock",
            Self::V3Unlock => "v3lockpb.Lock/Unlock",
            Self::V3Campaign => "v3electionpb.Election/Campaign",
            Self::V3Proclaim => "v3electionpb.Election/Proclaim",
            Self::V3Leader => "v3electionpb.Election/Leader",
            Self::V3Observe => "v3electionpb.Election/Observe",
            Self::V3Resign => "v3electionpb.Election/Resign",
        }
    }
}

/// The counters of this process.
#[derive(Debug)]
pub(crate) struct Metrics {
    methods: [MethodCounters; Method::ALL.len()],
    pub(crate) connections: AtomicU64,
    pub(crate) slow_readers: AtomicU64,
    started: SystemTime,
}

#[derive(Debug, Default)]
struct MethodCounters {
    in_flight: AtomicU64,
    answered: [AtomicU64; CODES],
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            methods: std::array::from_fn(|_| MethodCounters::default()),
            connections: AtomicU64::new(0),
            slow_readers: AtomicU64::new(0),
            started: SystemTime::now(),
        }
    }

    /// Counts a request from now on until what is returned is dropped.
    pub(crate) fn begin(self: &Arc<Self>, method: Method) -> InFlight {
        let counters = &self.methods[method as usize];
        counters.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight {
            metrics: Arc::clone(self),
            method,
            code: Code::Cancelled,
        }
    }
}

/// A request that is being served. One that is dropped was cancelled.
#[derive(Debug)]
pub(crate) struct InFlight {
    metrics: Arc<Metrics>,
    method: Method,
    code: Code,
}

impl InFlight {
    pub(crate) fn end(mut self, code: Code) {
        self.code = code;
    }

    /// Goes on as long as this stream does, and ends with its code.
    pub(crate) fn stream<S>(self, stream: S) -> Counted<S> {
        let call = Some(self);
        Counted { stream, call }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let counters = &self.metrics.methods[self.method as usize];
        counters.in_flight.fetch_sub(1, Ordering::Relaxed);
        counters.answered[self.code as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// A stream that is being served.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    stream: S,
    /// Until it has ended.
    call: Option<InFlight>,
}

impl<T, S: Stream<Item = Result<T, tonic::Status>> + Unpin> Stream for Counted<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let next = ready!(Pin::new(&mut self.stream).poll_next(context));
        let code = match &next {
            Some(Ok(_)) => return Poll::Ready(next),
            Some(Err(status)) => status.code(),
            None => Code::Ok,
        };
        if let Some(call) = self.call.take() {
            call.end(code);
        }
        Poll::Ready(next)
    }
}

/// The counters of the link to one member.
#[derive(Debug, Default)]
pub(crate) struct LinkCounters {
    pub(crate) sent: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) received: AtomicU64,
}

/// What is told beside the counters of this process.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    pub(crate) status: &'a Status,
    pub(crate) member: &'a str,
    pub(crate) watched_sessions: usize,
    pub(crate) log_bytes: u64,
    pub(crate) installs: u64,
    /// Name of the member, whether it is connected, its counters.
    pub(crate) links: Vec<(&'a str, bool, &'a LinkCounters)>,
}

impl Metrics {
    /// Everything in the text format of Prometheus, version 0.0.4.
    pub(crate) fn render(&self, snapshot: &Snapshot<'_>) -> String {
        let mut page = Page::default();
        self.render_requests(&mut page);
        render_links(&mut page, &snapshot.links);
        render_status(&mut page, snapshot);
        page.one(CONNECTIONS, load(&self.connections));
        page.one(SLOW_READERS, load(&self.slow_readers));
        self.render_process(&mut page);
        page.text
    }

    fn render_requests(&self, page: &mut Page) {
        page.begin(REQUESTS);
        for (method, counters) in Method::ALL.iter().zip(&self.methods) {
            for (code, count) in counters.answered.iter().enumerate() {
                let count = load(count);
                if count > 0 {
                    let code = format!("{:?}", Code::from_i32(i32::try_from(code).unwrap_or(2)));
                    page.series(
                        REQUESTS,
                        &[("method", method.label()), ("code", &code)],
                        count,
                    );
                }
            }
        }
        page.begin(IN_FLIGHT);
        for (method, counters) in Method::ALL.iter().zip(&self.methods) {
            page.series(
                IN_FLIGHT,
                &[("method", method.label())],
                load(&counters.in_flight),
            );
        }
    }

    fn render_process(&self, page: &mut Page) {
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        page.one(START_TIME, started.as_secs_f64());
        page.one(CPU, processor_time().as_secs_f64());
        if let Some(bytes) = resident_bytes() {
            page.one(RESIDENT, bytes);
        }
    }
}

fn render_links(page: &mut Page, links: &[(&str, bool, &LinkCounters)]) {
    page.begin(PEER_CONNECTED);
    for (name, connected, _) in links {
        page.series(PEER_CONNECTED, &[("peer", name)], u8::from(*connected));
    }
    let mut one = |metric, counter: fn(&LinkCounters) -> &AtomicU64| {
        page.begin(metric);
        for (name, _, link) in links {
            page.series(metric, &[("peer", name)], load(counter(link)));
        }
    };
    one(PEER_SENT, |link| &link.sent);
    one(PEER_DROPPED, |link| &link.dropped);
    one(PEER_RECEIVED, |link| &link.received);
}

fn render_status(page: &mut Page, snapshot: &Snapshot<'_>) {
    let status = snapshot.status;
    page.begin(INFO);
    let version = env!("CARGO_PKG_VERSION");
    page.series(
        INFO,
        &[("version", version), ("member", snapshot.member)],
        1,
    );
    page.one(HAS_LEADER, u8::from(status.leader.is_some()));
    page.one(IS_LEADER, u8::from(status.role == Role::Leader));
    page.one(TERM, status.term);
    page.one(COMMITTED, status.committed);
    page.one(APPLIED, status.applied);
    page.one(LAST, status.last);
    page.one(LOG_BYTES, snapshot.log_bytes);
    page.one(INSTALLS, snapshot.installs);
    page.one(REVISION, status.revision);
    page.one(COMPACTED, status.compacted);
    page.one(SESSIONS, status.sessions);
    page.one(KEYS, status.keys);
    page.one(STATE_BYTES, status.state_bytes);
    page.one(NO_SPACE, u8::from(status.is_out_of_space()));
    page.one(WATCHED, snapshot.watched_sessions);
    page.one(WATCHERS, status.watching.watchers);
    page.one(WATCHERS_BEHIND, status.watching.behind);
    page.one(WATCH_EVENTS, status.watching.events);
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// Text that grows. Writing to a string cannot fail.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn begin(&mut self, metric: Metric) {
        let Metric { name, kind, help } = metric;
        writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}").expect("a string grows");
    }

    fn one(&mut self, metric: Metric, value: impl std::fmt::Display) {
        self.begin(metric);
        writeln!(self.text, "{} {value}", metric.name).expect("a string grows");
    }

    fn series(&mut self, metric: Metric, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, value)| format!("{key}=\"{}\"", escape(value)))
            .collect();
        writeln!(self.text, "{}{{{}}} {value}", metric.name, labels.join(","))
            .expect("a string grows");
    }
}

fn escape(label: &str) -> String {
    label
        .replace('\\', r"\\")
        .replace('"', "\\\"")
        .replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use futures_util::{FutureExt as _, StreamExt as _, stream};

    use super::*;

    fn rendered(metrics: &Metrics) -> String {
        let counters = LinkCounters::default();
        metrics.render(&Snapshot {
            status: &Status::default(),
            member: "a \"b\"",
            watched_sessions: 3,
            log_bytes: 4,
            installs: 0,
            links: vec![("c", true, &counters)],
        })
    }

    #[test]
    fn names_are_unique_and_documented() {
        let names: BTreeSet<&str> = CATALOGUE.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for metric in CATALOGUE {
            assert!(
                metric.help.ends_with('.') && metric.help.contains(' '),
                "{metric:?}"
            );
            assert_eq!(
                metric.kind == "counter",
                metric.name.ends_with("_total"),
                "{metric:?}"
            );
        }
    }

    #[test]
    fn every_metric_is_told_once() {
        let text = rendered(&Metrics::new());
        for metric in CATALOGUE {
            let heading = format!("# TYPE {} {}\n", metric.name, metric.kind);
            assert_eq!(text.matches(&heading).count(), 1, "{}", metric.name);
        }
        assert_eq!(text.matches("# TYPE").count(), CATALOGUE.len());
    }

    #[test]
    fn a_stream_is_counted_until_its_end() {
        let metrics = Arc::new(Metrics::new());
        let open = |told: Vec<Result<(), tonic::Status>>| {
            let call = metrics.begin(Method::Watch);
            call.stream(stream::iter(told))
        };
        let next = |stream: &mut Counted<_>| stream.next().now_or_never().flatten();
        let (mut ended, mut failed) = (
            open(vec![Ok(())]),
            open(vec![Ok(()), Err(tonic::Status::unavailable(""))]),
        );
        let dropped = open(vec![Ok(())]);
        for stream in [&mut ended, &mut failed] {
            assert!(next(stream).is_some_and(|told| told.is_ok()));
        }
        let line = "conclave_requests_in_flight{method=\"etcdserverpb.Watch/Watch\"}";
        assert!(rendered(&metrics).contains(&format!("{line} 3\n")));
        assert!(next(&mut ended).is_none());
        assert!(next(&mut failed).is_some_and(|told| told.is_err()));
        drop((dropped, ended, failed));
        let text = rendered(&metrics);
        assert!(text.contains(&format!("{line} 0\n")), "{text}");
        for code in ["Ok", "Unavailable", "Cancelled"] {
            let line = format!("{{method=\"etcdserverpb.Watch/Watch\",code=\"{code}\"}} 1\n");
            assert!(text.contains(&line), "{code}: {text}");
        }
    }

    #[test]
    fn requests_are_counted_by_method_and_code() {
        let metrics = Arc::new(Metrics::new());
        metrics.begin(Method::LockAcquire).end(Code::Ok);
        metrics.begin(Method::LockAcquire).end(Code::Ok);
        drop(metrics.begin(Method::LockAcquire));
        let held = metrics.begin(Method::LockCheck);
        let text = rendered(&metrics);
        held.end(Code::Ok);
        for line in [
            "conclave_requests_total{method=\"Lock/Acquire\",code=\"Ok\"} 2\n",
            "conclave_requests_total{method=\"Lock/Acquire\",code=\"Cancelled\"} 1\n",
            "conclave_requests_in_flight{method=\"Lock/Acquire\"} 0\n",
            "conclave_requests_in_flight{method=\"Lock/Check\"} 1\n",
            "conclave_info{version=\"0.1.0\",member=\"a \\\"b\\\"\"} 1\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn methods_are_indexed_in_the_order_of_the_list() {
        for (index, method) in Method::ALL.iter().enumerate() {
            assert_eq!(*method as usize, index);
        }
    }
}
