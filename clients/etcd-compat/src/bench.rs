//! Workloads: each client has one request in flight, and a session where it needs one.
//!
//! What is counted is what ended between the start and the end of the measured time;
//! an operation of two calls (lock and unlock, campaign and resign) counts once.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    error::Error,
    fmt::Display,
    fs,
    rc::Rc,
    time::{Duration, Instant},
};

use etcd_client::{Client, GetOptions, LockOptions, ResignOptions, Txn, TxnOp, WatchOptions};
use tokio::task::LocalSet;

use crate::Arguments;

type Failure = Box<dyn Error>;

const WORKLOADS: [&str; 8] = [
    "put",
    "get",
    "lock",
    "hot-lock-16",
    "hot-lock-64",
    "campaign",
    "keep-alive",
    "watch",
];
/// Before the measured time: connections are made, caches are warm.
const WARM_UP: Duration = Duration::from_millis(500);
const LEASE_SECONDS: i64 = 120;
const VALUE: [u8; 128] = [b'v'; 128];
/// How many keys a transaction makes, before the measured time.
const KEYS_OF_TXN: usize = 100;

/// What all clients of a workload share.
struct Plan {
    clients: Vec<Client>,
    count: usize,
    name: String,
    /// Puts and gets are of one of so many keys, drawn evenly; of one a client if none.
    keys: usize,
    begin: Instant,
    end: Instant,
    /// In microseconds.
    latencies: RefCell<Vec<u64>>,
}

impl Plan {
    fn goes_on(&self) -> bool {
        Instant::now() < self.end
    }

    fn done(&self, since: Instant) {
        let now = Instant::now();
        if since >= self.begin && now <= self.end {
            let micros = now.duration_since(since).as_micros();
            let micros = u64::try_from(micros).unwrap_or(u64::MAX);
            self.latencies.borrow_mut().push(micros);
        }
    }
}

/// Runs the named workloads, or all.
pub async fn run(endpoints: &[String], arguments: &Arguments) -> Result<(), Failure> {
    let names: Vec<_> = match &arguments.names[..] {
        [] => WORKLOADS.iter().map(|name| (*name).to_owned()).collect(),
        named => named.to_vec(),
    };
    let seconds = arguments.number("seconds", 5);
    let connections = arguments.number("connections", 4);
    let keys = arguments.number("keys", 0);
    let pids = arguments.list("pids");
    for name in names {
        let count = match name.as_str() {
            "hot-lock-16" => 16,
            _ => arguments.number("clients", 64),
        };
        let mut clients = Vec::new();
        for _ in 0..connections {
            clients.push(crate::connect(endpoints).await?);
        }
        LocalSet::new()
            .run_until(workload(&name, clients, count, seconds, keys, &pids))
            .await?;
    }
    Ok(())
}

async fn workload(
    name: &str,
    mut clients: Vec<Client>,
    count: usize,
    seconds: usize,
    keys: usize,
    pids: &[String],
) -> Result<(), Failure> {
    let mut leases = Vec::new();
    for number in 0..count {
        let of = number % clients.len();
        leases.push(clients[of].lease_grant(LEASE_SECONDS, None).await?.id());
    }
    let keys = match name {
        "put" | "get" => keys,
        _ => 0,
    };
    fill(&clients, keys).await?;
    let begin = Instant::now() + WARM_UP;
    let plan = Rc::new(Plan {
        clients,
        count,
        name: format!("bench/{name}/{}", std::process::id()),
        keys,
        begin,
        end: begin + Duration::from_secs(seconds as u64),
        latencies: RefCell::new(Vec::new()),
    });
    let mut running = Vec::new();
    for (number, lease) in leases.iter().copied().enumerate() {
        let (plan, name) = (plan.clone(), name.to_owned());
        running.push(tokio::task::spawn_local(async move {
            match name.as_str() {
                "put" => put(&plan, number).await,
                "get" => get(&plan, number).await,
                "lock" => lock(&plan, number, lease, format!("{}/{number}", plan.name)).await,
                "hot-lock-16" | "hot-lock-64" => {
                    lock(&plan, number, lease, plan.name.clone()).await
                }
                "campaign" => campaign(&plan, number, lease).await,
                "keep-alive" => keep_alive(&plan, number, lease).await,
                "watch" => watch(&plan, number).await,
                _ => Err(format!("no workload {name}").into()),
            }
        }));
    }
    tokio::time::sleep_until(plan.begin.into()).await;
    let before = processor_time(pids);
    tokio::time::sleep_until(plan.end.into()).await;
    let used = processor_time(pids) - before;
    for client in running {
        client.await??;
    }
    for (number, lease) in leases.into_iter().enumerate() {
        let mut client = plan.clients[number % plan.clients.len()].clone();
        client.lease_revoke(lease).await?;
    }
    report(name, &plan, seconds, pids, used);
    Ok(())
}

fn report(name: &str, plan: &Plan, seconds: usize, pids: &[String], used: Duration) {
    let mut latencies = plan.latencies.take();
    latencies.sort_unstable();
    let ops = latencies.len();
    let quantile = |percent: usize| {
        let at = (ops * percent / 100).min(ops.saturating_sub(1));
        latencies.get(at).copied().unwrap_or_default()
    };
    let mut fields = BTreeMap::new();
    fields.insert("clients", plan.count as u64);
    fields.insert("connections", plan.clients.len() as u64);
    fields.insert("seconds", seconds as u64);
    fields.insert("keys", plan.keys as u64);
    fields.insert("ops", ops as u64);
    fields.insert("ops_s", (ops / seconds.max(1)) as u64);
    fields.insert("p50_us", quantile(50));
    fields.insert("p99_us", quantile(99));
    fields.insert("max_us", quantile(100));
    if !pids.is_empty() && ops > 0 {
        let micros = used.as_micros() / ops as u128;
        fields.insert(
            "server_cpu_us_per_op",
            u64::try_from(micros).unwrap_or(u64::MAX),
        );
    }
    let fields = fields
        .iter()
        .map(|(field, value)| format!("\"{field}\":{value}"));
    let fields: Vec<_> = fields.collect();
    println!("{{\"bench\":\"{name}\",{}}}", fields.join(","));
}

/// What these processes have used so far, in user and system mode.
fn processor_time(pids: &[String]) -> Duration {
    /// Of the clock of /proc, everywhere.
    const TICKS_PER_SECOND: u64 = 100;
    let ticks = pids.iter().map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit(") ").next().unwrap_or_default();
        let fields: Vec<_> = rest.split(' ').collect();
        let field = |at: usize| fields.get(at).and_then(|f| f.parse().ok()).unwrap_or(0u64);
        field(11) + field(12)
    });
    Duration::from_millis(ticks.sum::<u64>() * 1000 / TICKS_PER_SECOND)
}

impl Plan {
    fn client(&self, number: usize) -> Client {
        self.clients[number % self.clients.len()].clone()
    }
}

/// Makes the keys that are drawn from, unless they are there.
async fn fill(clients: &[Client], keys: usize) -> Result<(), Failure> {
    let range = GetOptions::new().with_prefix().with_count_only();
    let mut client = clients[0].clone();
    let there = client
        .get(format!("bench/of-{keys}/"), Some(range))
        .await?
        .count();
    if usize::try_from(there) == Ok(keys) {
        return Ok(());
    }
    let mut filling = Vec::new();
    let txns = keys.div_ceil(KEYS_OF_TXN);
    for (number, client) in clients.iter().cycle().take(64).enumerate() {
        let mut client = client.clone();
        filling.push(tokio::task::spawn_local(async move {
            for txn in (number..txns).step_by(64) {
                let keys_of = txn * KEYS_OF_TXN..keys.min((txn + 1) * KEYS_OF_TXN);
                let puts = keys_of.map(|key| TxnOp::put(drawn_key(keys, key), VALUE, None));
                let txn = Txn::new().and_then(puts.collect::<Vec<_>>());
                client.txn(txn).await?;
            }
            Ok::<_, etcd_client::Error>(())
        }));
    }
    for part in filling {
        part.await??;
    }
    Ok(())
}

fn drawn_key(keys: usize, key: impl Display) -> String {
    format!("bench/of-{keys}/{key:0>8}")
}

/// The keys that a client puts or gets, one after the other.
fn keys_of(plan: &Plan, number: usize) -> impl FnMut() -> String {
    let (own, keys) = (format!("{}/{number}", plan.name), plan.keys as u64);
    let mut drawn = number as u64;
    move || {
        if keys == 0 {
            return own.clone();
        }
        // Knuth's linear congruential generator; its high bits are the better ones.
        drawn = drawn
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        drawn_key(keys as usize, (drawn >> 33) % keys)
    }
}

async fn put(plan: &Plan, number: usize) -> Result<(), Failure> {
    let mut client = plan.client(number);
    let mut key = keys_of(plan, number);
    while plan.goes_on() {
        let since = Instant::now();
        client.put(key(), VALUE, None).await?;
        plan.done(since);
    }
    Ok(())
}

async fn get(plan: &Plan, number: usize) -> Result<(), Failure> {
    let mut client = plan.client(number);
    let mut key = keys_of(plan, number);
    if plan.keys == 0 {
        client.put(key(), VALUE, None).await?;
    }
    while plan.goes_on() {
        let since = Instant::now();
        client.get(key(), None).await?;
        plan.done(since);
    }
    Ok(())
}

async fn lock(plan: &Plan, number: usize, lease: i64, name: String) -> Result<(), Failure> {
    let mut client = plan.client(number);
    while plan.goes_on() {
        let since = Instant::now();
        let options = LockOptions::new().with_lease(lease);
        let held = client.lock(name.as_str(), Some(options)).await?;
        client.unlock(held.key()).await?;
        plan.done(since);
    }
    Ok(())
}

async fn campaign(plan: &Plan, number: usize, lease: i64) -> Result<(), Failure> {
    let mut client = plan.client(number);
    let name = format!("{}/{number}", plan.name);
    while plan.goes_on() {
        let since = Instant::now();
        let won = client.campaign(name.as_str(), "value", lease).await?;
        let leader = won.leader().ok_or("no leader key")?.clone();
        let options = ResignOptions::new().with_leader(leader);
        client.resign(Some(options)).await?;
        plan.done(since);
    }
    Ok(())
}

async fn keep_alive(plan: &Plan, number: usize, lease: i64) -> Result<(), Failure> {
    let mut client = plan.client(number);
    let (mut keeper, mut answers) = client.lease_keep_alive(lease).await?;
    while plan.goes_on() {
        let since = Instant::now();
        keeper.keep_alive().await?;
        let kept = answers.message().await?.ok_or("the stream has ended")?;
        if kept.ttl() <= 0 {
            return Err("a lease is lost".into());
        }
        plan.done(since);
    }
    Ok(())
}

/// From the put's call to the event's arrival at one watcher of its key.
async fn watch(plan: &Plan, number: usize) -> Result<(), Failure> {
    /// Few enough that no queue forms: what is measured is the way.
    const PAUSE: Duration = Duration::from_millis(20);
    let mut client = plan.client(number);
    let key = format!("{}/{number}", plan.name);
    let mut stream = client
        .watch(key.as_str(), Some(WatchOptions::new()))
        .await?;
    stream.message().await?.ok_or("the stream has ended")?;
    while plan.goes_on() {
        let since = Instant::now();
        let (put, event) = tokio::join!(client.put(key.as_str(), VALUE, None), async {
            let event = stream.message().await;
            plan.done(since);
            event
        });
        put?;
        event?.ok_or("the stream has ended")?;
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
