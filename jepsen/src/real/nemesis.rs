//! What goes wrong, and when. Two rows of faults run beside each other: one hurts
//! machines (processes, disks, clocks), the other the network between them. Each
//! deals its kinds like cards, all of them before any comes again, and a fault
//! that had no effect goes back into the deck.

use std::{collections::BTreeMap, io, str::FromStr, sync::Arc, time::Duration};

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::{
    cluster::{Cluster, Observer, name},
    proxy::{Link, Network, Way},
    shim::Counter,
    world::World,
};
use crate::{
    checkers::{STAYS_UP, broken},
    rng::Rng,
};

/// A fault takes up to so much of the time that its row has for it.
const SLOT_MIN: Duration = Duration::from_secs(3);
const SLOT_MAX: Duration = Duration::from_secs(8);
/// More than an election timeout.
const PAUSE_MIN: Duration = Duration::from_millis(1_200);
/// A server whose disk fails must end by then.
const END_WITHIN: Duration = Duration::from_secs(5);

macro_rules! faults {
    ($($variant:ident = $word:literal,)*) => {
        /// Kinds of faults.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Fault { $($variant,)* }

        impl Fault {
            /// All of them.
            const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As people write it.
            pub(crate) fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

faults! {
    Kill = "kill",
    KillLeader = "kill-leader",
    KillAll = "kill-all",
    Pause = "pause",
    PauseLeader = "pause-leader",
    Restart = "restart",
    SlowSync = "slow-sync",
    FailedSync = "failed-sync",
    FullDisk = "full-disk",
    DateStep = "date-step",
    Drift = "drift",
    Split = "split",
    IsolatedLeader = "isolated-leader",
    OneWay = "one-way",
    Delays = "delays",
    PeersCut = "peers-cut",
    ClientsCut = "clients-cut",
    ClientsApart = "clients-apart",
    RepliesHeld = "replies-held",
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|fault| fault.word() == word);
        found.copied().ok_or_else(|| {
            let words: Vec<&str> = Self::ALL.iter().map(|fault| fault.word()).collect();
            format!("there are {}", words.join(", "))
        })
    }
}

/// Which faults there may be.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Only these; all if there are none.
    pub(crate) only: Vec<Fault>,
    /// How long they go on.
    pub(crate) length: Duration,
    /// How wrong the rates of clocks are at most, in parts of a million.
    pub(crate) drift_ppm: u64,
}

impl Plan {
    fn enabled(&self, kinds: &[Fault]) -> Vec<Fault> {
        let enabled = kinds
            .iter()
            .filter(|kind| self.only.is_empty() || self.only.contains(kind));
        enabled.copied().collect()
    }
}

const OF_PROCESSES: &[Fault] = &[
    Fault::Kill,
    Fault::KillLeader,
    Fault::KillAll,
    Fault::Pause,
    Fault::PauseLeader,
    Fault::Restart,
];
/// These need the library before the servers.
const OF_MACHINES: &[Fault] = &[
    Fault::SlowSync,
    Fault::FailedSync,
    Fault::FullDisk,
    Fault::DateStep,
    Fault::Drift,
];
const OF_NETWORK: &[Fault] = &[
    Fault::Split,
    Fault::IsolatedLeader,
    Fault::OneWay,
    Fault::Delays,
    Fault::PeersCut,
    Fault::ClientsCut,
    Fault::ClientsApart,
    Fault::RepliesHeld,
];

/// How often each enabled fault took place.
#[derive(Debug, Default)]
pub(crate) struct Tally(BTreeMap<Fault, u64>);

impl Tally {
    /// How many took place.
    pub(crate) fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// What was enabled and never took place.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let never = self.0.iter().filter(|(_, count)| **count == 0);
        never.map(|(fault, _)| fault.word()).collect()
    }

    /// Each fault and how often.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.0.iter().map(|(fault, count)| (fault.word(), *count))
    }
}

/// Hurts the cluster as planned. Afterwards some of it may still be broken:
/// see [`heal`].
pub(crate) async fn trouble(
    cluster: &mut Cluster,
    world: &World,
    rng: &mut Rng,
    plan: &Plan,
) -> io::Result<Tally> {
    let mut kinds = OF_PROCESSES.to_vec();
    if cluster.shim(0).is_some() {
        kinds.extend(OF_MACHINES);
    }
    let mut machines = Row::new(&kinds, plan, rng);
    let mut network = Row::new(OF_NETWORK, plan, rng);
    let wires = Wires {
        network: Arc::clone(cluster.network()),
        observer: cluster.observer(),
        nodes: cluster.size(),
    };
    let until = Instant::now() + plan.length;
    let (on_machines, ()) = tokio::join!(
        machines.hurt_machines(cluster, world, until),
        network.hurt_network(&wires, world, until),
    );
    on_machines?;
    machines.tally.0.append(&mut network.tally.0);
    Ok(machines.tally)
}

/// Ends all faults, and starts every server that is down.
pub(crate) fn heal(cluster: &mut Cluster) -> io::Result<()> {
    cluster.network().heal();
    for node in 0..cluster.size() {
        if let Some(shim) = cluster.shim(node) {
            shim.mend_disk()?;
            shim.drift(0)?;
        }
        cluster.signal(node, Signal::CONT)?;
        cluster.start(node)?;
    }
    Ok(())
}

/// One row of faults.
#[derive(Debug)]
struct Row {
    kinds: Vec<Fault>,
    deck: Vec<Fault>,
    slot: Duration,
    drift_ppm: u64,
    rng: Rng,
    tally: Tally,
}

impl Row {
    fn new(kinds: &[Fault], plan: &Plan, rng: &mut Rng) -> Self {
        let kinds = plan.enabled(kinds);
        // Less than its share, so that a fault can be tried again.
        let count = u32::try_from(kinds.len().max(1)).expect("a few kinds");
        let share = plan.length * 7 / 10 / count;
        Self {
            tally: Tally(kinds.iter().map(|kind| (*kind, 0)).collect()),
            kinds,
            deck: Vec::new(),
            slot: share.clamp(SLOT_MIN, SLOT_MAX),
            drift_ppm: plan.drift_ppm,
            rng: Rng::new(rng.next()),
        }
    }

    /// The next fault, and how long it lasts; none if none is enabled.
    fn deal(&mut self) -> Option<(Fault, Duration)> {
        if self.kinds.is_empty() {
            return None;
        }
        if self.deck.is_empty() {
            self.deck.clone_from(&self.kinds);
        }
        let fault = self.deck.swap_remove(self.rng.index(self.deck.len()));
        Some((fault, self.part_of_slot(20, 60)))
    }

    fn part_of_slot(&mut self, low: u64, high: u64) -> Duration {
        let percent = u32::try_from(self.rng.between(low, high)).expect("at most 100");
        self.slot * percent / 100
    }

    fn note(&mut self, fault: Fault, took_place: bool, world: &World) {
        if took_place {
            *self.tally.0.entry(fault).or_default() += 1;
            world.history.fault(fault.word(), ":over");
        } else {
            self.deck.push(fault);
            world.history.fault(fault.word(), ":without-effect");
        }
    }

    async fn hurt_machines(
        &mut self,
        cluster: &mut Cluster,
        world: &World,
        until: Instant,
    ) -> io::Result<()> {
        while Instant::now() < until && !world.is_broken() {
            sleep(self.part_of_slot(20, 40)).await;
            world.note(cluster.all_run()?);
            let Some((fault, span)) = self.deal() else {
                continue;
            };
            let took_place = match fault {
                Fault::Kill | Fault::KillLeader | Fault::KillAll => {
                    self.kill(fault, span, cluster, world).await?
                }
                Fault::Pause | Fault::PauseLeader => {
                    self.pause(fault, span.max(PAUSE_MIN), cluster, world)
                        .await?
                }
                Fault::Restart => {
                    let node = self.rng.index(cluster.size());
                    world.history.fault(fault.word(), &edn(&[node]));
                    let stopped = cluster.stop(node).await?;
                    cluster.start(node)?;
                    stopped
                }
                Fault::FailedSync | Fault::FullDisk => {
                    self.break_disk(fault, cluster, world).await?
                }
                _ => self.disturb(fault, span, cluster, world).await?,
            };
            self.note(fault, took_place, world);
        }
        Ok(())
    }

    async fn victims(&mut self, fault: Fault, cluster: &Cluster) -> Vec<usize> {
        match fault {
            Fault::KillLeader | Fault::PauseLeader => {
                cluster.observer().leader().await.into_iter().collect()
            }
            Fault::KillAll => (0..cluster.size()).collect(),
            _ => vec![self.rng.index(cluster.size())],
        }
    }

    async fn kill(
        &mut self,
        fault: Fault,
        span: Duration,
        cluster: &mut Cluster,
        world: &World,
    ) -> io::Result<bool> {
        let mut victims = self.victims(fault, cluster).await;
        world.history.fault(fault.word(), &edn(&victims));
        let mut killed = !victims.is_empty();
        for victim in &victims {
            killed &= cluster.kill(*victim)?;
        }
        sleep(span).await;
        while !victims.is_empty() {
            let next = victims.swap_remove(self.rng.index(victims.len()));
            cluster.start(next)?;
            sleep(Duration::from_millis(self.rng.below(200))).await;
        }
        Ok(killed)
    }

    async fn pause(
        &mut self,
        fault: Fault,
        span: Duration,
        cluster: &Cluster,
        world: &World,
    ) -> io::Result<bool> {
        let victims = self.victims(fault, cluster).await;
        world.history.fault(fault.word(), &edn(&victims));
        for victim in &victims {
            cluster.signal(*victim, Signal::STOP)?;
        }
        sleep(span).await;
        for victim in &victims {
            cluster.signal(*victim, Signal::CONT)?;
        }
        Ok(!victims.is_empty())
    }

    /// A server whose disk fails must end, by itself and without a crash.
    async fn break_disk(
        &mut self,
        fault: Fault,
        cluster: &mut Cluster,
        world: &World,
    ) -> io::Result<bool> {
        let node = self.rng.index(cluster.size());
        world.history.fault(fault.word(), &edn(&[node]));
        let counter = match fault {
            Fault::FullDisk => Counter::RefusedWrites,
            _ => Counter::FailedSyncs,
        };
        let before = count(cluster, node, counter)?;
        if let Some(shim) = cluster.shim(node) {
            match fault {
                Fault::FullDisk => shim.fill_disk()?,
                _ => shim.fail_syncs()?,
            }
        }
        let code = cluster.ended(node, END_WITHIN).await?;
        if code.is_none() {
            // Else it may end when that would be taken for a crash.
            cluster.kill(node)?;
        }
        if let Some(code) = code.filter(|code| *code == 0 || *code >= 101) {
            world.note(broken(
                STAYS_UP,
                format!("{} ended with {code} at a {}", name(node), fault.word()),
            ));
        }
        sleep(self.part_of_slot(0, 30)).await;
        if let Some(shim) = cluster.shim(node) {
            shim.mend_disk()?;
        }
        cluster.start(node)?;
        Ok(code.is_some() && count(cluster, node, counter)? > before)
    }

    /// Slow disks and wrong clocks.
    async fn disturb(
        &mut self,
        fault: Fault,
        span: Duration,
        cluster: &mut Cluster,
        world: &World,
    ) -> io::Result<bool> {
        let node = self.rng.index(cluster.size());
        let delay = Duration::from_millis(self.rng.between(5, 400));
        let ahead_ms = self.signed(1_000, 86_400_000);
        let rates: Vec<i64> = (0..cluster.size())
            .map(|_| self.signed(1_000, self.drift_ppm))
            .collect();
        let counter = match fault {
            Fault::SlowSync => Counter::SlowSyncs,
            Fault::DateStep => Counter::ShiftedDates,
            _ => Counter::DriftedReads,
        };
        let what = match fault {
            Fault::Drift => format!("{{:ppm {rates:?}}}"),
            Fault::DateStep => format!("{{:node \"{}\", :ms {ahead_ms}}}", name(node)),
            _ => edn(&[node]),
        };
        world.history.fault(fault.word(), &what);
        let before = count(cluster, node, counter)?;
        for (other, rate) in rates.into_iter().enumerate() {
            let Some(shim) = cluster.shim(other) else {
                continue;
            };
            match fault {
                // It stays until the next one: what drifts apart takes time.
                Fault::Drift => shim.drift(rate)?,
                Fault::SlowSync if other == node => shim.slow_syncs(delay)?,
                Fault::DateStep if other == node => shim.shift_date(ahead_ms)?,
                _ => {}
            }
        }
        sleep(span).await;
        if let Some(shim) = cluster.shim(node) {
            shim.mend_disk()?;
        }
        Ok(count(cluster, node, counter)? > before)
    }

    fn signed(&mut self, low: u64, high: u64) -> i64 {
        let size = i64::try_from(self.rng.between(low, high)).expect("a small number");
        if self.rng.chance(500_000) {
            size
        } else {
            -size
        }
    }

    async fn hurt_network(&mut self, wires: &Wires, world: &World, until: Instant) {
        while Instant::now() < until && !world.is_broken() {
            sleep(self.part_of_slot(20, 40)).await;
            let Some((fault, span)) = self.deal() else {
                continue;
            };
            let took_place = match fault {
                Fault::PeersCut | Fault::ClientsCut => {
                    world.history.fault(fault.word(), "nil");
                    wires.cut(fault, span).await
                }
                _ => {
                    let before = wires.disturbed();
                    let victims = wires.disturb(fault, &mut self.rng).await;
                    world.history.fault(fault.word(), &edn(&victims));
                    sleep(span).await;
                    wires.network.heal();
                    wires.disturbed() > before
                }
            };
            self.note(fault, took_place, world);
        }
    }
}

fn count(cluster: &mut Cluster, node: usize, counter: Counter) -> io::Result<i64> {
    cluster.shim(node).map_or(Ok(0), |shim| shim.count(counter))
}

fn edn(nodes: &[usize]) -> String {
    let names: Vec<String> = nodes
        .iter()
        .map(|node| format!("\"{}\"", name(*node)))
        .collect();
    format!("[{}]", names.join(" "))
}

/// The network, as faults see it.
#[derive(Debug)]
struct Wires {
    network: Arc<Network>,
    observer: Observer,
    nodes: usize,
}

impl Wires {
    fn disturbed(&self) -> u64 {
        self.network.links().map(Link::disturbed).sum()
    }

    /// Cuts connections again and again; whether there were any.
    async fn cut(&self, fault: Fault, span: Duration) -> bool {
        const TIMES: u32 = 5;
        let mut ended = 0;
        for _ in 0..TIMES {
            for node in 0..self.nodes {
                if fault == Fault::ClientsCut {
                    ended += self.network.client(node).cut();
                    continue;
                }
                for other in 0..self.nodes {
                    ended += self.network.peer(node, other).cut();
                }
            }
            sleep(span / TIMES).await;
        }
        ended > 0
    }

    /// Begins a fault; whom it hurts.
    async fn disturb(&self, fault: Fault, rng: &mut Rng) -> Vec<usize> {
        let leader = self.observer.leader().await;
        let one = match fault {
            // Without a leader: nobody.
            Fault::IsolatedLeader => leader,
            _ if rng.chance(500_000) => leader,
            _ => None,
        };
        let one = one.or_else(|| {
            let drawn = rng.index(self.nodes);
            (fault != Fault::IsolatedLeader).then_some(drawn)
        });
        let Some(one) = one else { return Vec::new() };
        let bad = if rng.chance(500_000) {
            Way::Held
        } else {
            Way::Lost
        };
        match fault {
            Fault::Split => {
                let side = self.minority(one, rng);
                self.part(&side, bad, bad);
                self.part_clients(&side, bad, rng);
                return side;
            }
            Fault::IsolatedLeader => {
                self.part(&[one], bad, bad);
                self.part_clients(&[one], bad, rng);
            }
            Fault::OneWay if rng.chance(500_000) => self.part(&[one], bad, Way::Open),
            Fault::OneWay => self.part(&[one], Way::Open, bad),
            Fault::ClientsApart => self.network.client(one).set(bad, bad),
            Fault::RepliesHeld => self.network.client(one).set(Way::Open, bad),
            _ => {
                for link in self.network.links() {
                    let mut delay = || Way::Late(Duration::from_millis(rng.between(1, 40)));
                    let [forth, back] = [delay(), delay()];
                    link.set(forth, back);
                }
                return (0..self.nodes).collect();
            }
        }
        vec![one]
    }

    /// A minority with this one in it.
    fn minority(&self, one: usize, rng: &mut Rng) -> Vec<usize> {
        let size = rng.between(1, (self.nodes as u64 - 1) / 2);
        (0..size as usize)
            .map(|offset| (one + offset) % self.nodes)
            .collect()
    }

    /// What this side sends to others goes the one way, what it gets from them
    /// the other.
    fn part(&self, side: &[usize], out: Way, into: Way) {
        for inner in side {
            for outer in (0..self.nodes).filter(|node| !side.contains(node)) {
                self.network.peer(*inner, outer).set(out, out);
                self.network.peer(outer, *inner).set(into, into);
            }
        }
    }

    /// Sometimes clients do not reach this side either.
    fn part_clients(&self, side: &[usize], bad: Way, rng: &mut Rng) {
        if rng.chance(500_000) {
            for node in side {
                self.network.client(*node).set(bad, bad);
            }
        }
    }
}
