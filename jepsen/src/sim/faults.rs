//! What goes wrong, and when: every second or so, until all faults stop.

use super::{
    ground::{Event, Ground, Reply},
    node::Node,
    settings::Weather,
    tally::Fault,
};

/// The kinds of faults with how often each is chosen. The place in this list is
/// its bit in [`super::settings::Settings::left_out`].
const KINDS: &[(Kind, u64)] = &[
    (Kind::Split, 8),
    (Kind::IsolateLeader, 8),
    (Kind::OneWay, 6),
    (Kind::Storm, 4),
    (Kind::LosePeer, 6),
    (Kind::Crash, 8),
    (Kind::CrashLeader, 8),
    (Kind::CrashAll, 2),
    (Kind::Pause, 5),
    (Kind::PauseLeader, 8),
    (Kind::PauseAll, 3),
    (Kind::SlowDisk, 5),
    (Kind::FailSync, 5),
    (Kind::LoseConnection, 6),
    (Kind::CutClient, 5),
];

#[derive(Clone, Copy, Debug)]
enum Kind {
    Split,
    IsolateLeader,
    OneWay,
    Storm,
    LosePeer,
    Crash,
    CrashLeader,
    CrashAll,
    Pause,
    PauseLeader,
    PauseAll,
    SlowDisk,
    FailSync,
    LoseConnection,
    CutClient,
}

/// Makes one fault, and plans the next.
pub(crate) fn trouble(nodes: &mut [Node], actors: usize, ground: &mut Ground) {
    if !ground.troubled() {
        return;
    }
    let gap_us = ground.settings.fault_gap_us;
    let next_us = ground.now_us + ground.rng.between(gap_us / 2, gap_us * 3 / 2);
    ground.schedule(next_us, Event::Trouble);
    let Some(kind) = choose(ground) else { return };
    ground.tell(format_args!("trouble: {kind:?}"));
    match kind {
        Kind::Split | Kind::IsolateLeader | Kind::OneWay => partition(kind, nodes, actors, ground),
        Kind::Storm => storm(ground),
        Kind::LosePeer => lose_peer(nodes, ground),
        Kind::Crash | Kind::CrashLeader | Kind::CrashAll => crash(kind, nodes, ground),
        Kind::Pause | Kind::PauseLeader | Kind::PauseAll => pause(kind, nodes, ground),
        Kind::SlowDisk => {
            ground.tally.fault(Fault::SlowSync);
            let node = ground.rng.index(nodes.len());
            nodes[node].slow_down(ground.rng.between(5, 300));
            let until_us = ground.now_us + ground.rng.between(100_000, 4_000_000);
            ground.schedule(until_us, Event::DiskRecovers { node });
        }
        Kind::FailSync => {
            // Counted when it happens.
            let node = ground.rng.index(nodes.len());
            nodes[node].fail_next_sync();
        }
        Kind::LoseConnection => {
            ground.tally.fault(Fault::ConnectionLost);
            let actor = ground.rng.index(actors);
            for node in nodes {
                node.hang_up(actor, ground);
            }
        }
        Kind::CutClient => {
            ground.tally.fault(Fault::ClientCut);
            let since = ground.network.begin();
            let actor = ground.rng.index(actors);
            for node in 0..nodes.len() {
                if ground.rng.chance(700_000) {
                    ground.network.cut_client(actor, node);
                }
            }
            end_later(since, ground);
        }
    }
}

fn choose(ground: &mut Ground) -> Option<Kind> {
    let left_out = ground.settings.left_out;
    let enabled = || {
        KINDS
            .iter()
            .enumerate()
            .filter(move |(bit, _)| left_out & (1 << bit) == 0)
    };
    let total: u64 = enabled().map(|(_, (_, weight))| weight).sum();
    if total == 0 {
        return None;
    }
    let mut drawn = ground.rng.below(total);
    for (_, (kind, weight)) in enabled() {
        if drawn < *weight {
            return Some(*kind);
        }
        drawn -= weight;
    }
    None
}

fn leader(nodes: &[Node], ground: &mut Ground) -> usize {
    let leader = nodes
        .iter()
        .position(|node| node.is_leader() && !node.is_paused());
    leader.unwrap_or_else(|| ground.rng.index(nodes.len()))
}

fn end_later(since: u64, ground: &mut Ground) {
    let until_us = match ground.rng.chance(800_000) {
        true => ground.now_us + ground.rng.between(100_000, 2_500_000),
        false => ground.now_us + ground.rng.between(2_500_000, 8_000_000),
    };
    ground.schedule(until_us, Event::NetworkHeals { since });
}

fn partition(kind: Kind, nodes: &[Node], actors: usize, ground: &mut Ground) {
    let since = ground.network.begin();
    let count = nodes.len();
    let mut side = vec![false; count];
    match kind {
        Kind::Split => {
            ground.tally.fault(Fault::Split);
            for part in &mut side {
                *part = ground.rng.chance(500_000);
            }
        }
        Kind::OneWay => {
            ground.tally.fault(Fault::OneWay);
            let node = match ground.rng.chance(500_000) {
                true => leader(nodes, ground),
                false => ground.rng.index(count),
            };
            side[node] = true;
        }
        _ => {
            ground.tally.fault(Fault::LeaderIsolated);
            let node = leader(nodes, ground);
            side[node] = true;
        }
    }
    // One way: the one node is deaf, or dumb.
    let (there, back) = match kind {
        Kind::OneWay if ground.rng.chance(500_000) => (true, false),
        Kind::OneWay => (false, true),
        _ => (true, true),
    };
    for from in (0..count).filter(|node| side[*node]) {
        for to in (0..count).filter(|node| !side[*node]) {
            if there {
                ground.network.cut(from, to);
            }
            if back {
                ground.network.cut(to, from);
            }
            if ground.rng.chance(300_000) {
                let at_us = ground.now_us + ground.rng.below(1_000_000);
                for (node, peer) in [(from, to), (to, from)] {
                    ground.schedule(at_us, Event::PeerLost { node, peer });
                }
            }
        }
    }
    // Some clients are on one side of it, others reach everyone.
    for actor in 0..actors {
        if ground.rng.chance(400_000) {
            let theirs = ground.rng.chance(500_000);
            for node in (0..count).filter(|node| side[*node] != theirs) {
                ground.network.cut_client(actor, node);
            }
        }
    }
    end_later(since, ground);
}

fn storm(ground: &mut Ground) {
    ground.tally.fault(Fault::Storm);
    let since = ground.network.begin();
    let lost = ground.rng.between(0, 300_000);
    let doubled = ground.rng.between(0, 300_000);
    let late = ground.rng.between(0, 400_000);
    let late_us = ground.rng.between(10_000, 2_000_000);
    let delay_us = ground.rng.between(300, 20_000);
    ground.network.storm(Weather {
        lost,
        doubled,
        late,
        delay_us,
        late_us,
    });
    end_later(since, ground);
}

fn lose_peer(nodes: &mut [Node], ground: &mut Ground) {
    ground.tally.fault(Fault::PeerLost);
    let one = ground.rng.index(nodes.len());
    let other = (one + 1 + ground.rng.index(nodes.len() - 1)) % nodes.len();
    nodes[one].peer_lost(other, ground);
    if ground.rng.chance(700_000) {
        nodes[other].peer_lost(one, ground);
    }
}

fn victims(kind: Kind, nodes: &[Node], ground: &mut Ground) -> Vec<usize> {
    match kind {
        Kind::CrashAll | Kind::PauseAll => (0..nodes.len()).collect(),
        Kind::CrashLeader | Kind::PauseLeader => vec![leader(nodes, ground)],
        _ => vec![ground.rng.index(nodes.len())],
    }
}

fn crash(kind: Kind, nodes: &mut [Node], ground: &mut Ground) {
    let victims = victims(kind, nodes, ground);
    ground.tally.fault(match kind {
        Kind::Crash => Fault::Crash,
        Kind::CrashLeader => Fault::CrashOfLeader,
        _ => Fault::CrashOfAll,
    });
    for victim in victims {
        nodes[victim].crash(ground);
        let back_us = match ground.rng.chance(700_000) {
            true => ground.now_us + ground.rng.between(10_000, 800_000),
            false => ground.now_us + ground.rng.between(800_000, 5_000_000),
        };
        ground.schedule(back_us, Event::Start { node: victim });
    }
}

fn pause(kind: Kind, nodes: &mut [Node], ground: &mut Ground) {
    let victims = victims(kind, nodes, ground);
    ground.tally.fault(match kind {
        Kind::Pause => Fault::Pause,
        Kind::PauseLeader => Fault::PauseOfLeader,
        _ => Fault::PauseOfAll,
    });
    let span_us = match ground.rng.chance(700_000) {
        true => ground.rng.between(50_000, 1_000_000),
        false => ground.rng.between(1_000_000, 4_000_000),
    };
    for victim in victims {
        let wobble_us = ground.rng.below(20_000);
        let until_us = ground.now_us + span_us + wobble_us;
        nodes[victim].pause(until_us, ground);
    }
}

impl Node {
    /// The connections of a client to this node break. Its calls go on here, but
    /// nobody hears of them.
    fn hang_up(&self, actor: usize, ground: &mut Ground) {
        ground.break_streams(self.index(), Some(actor));
        for id in self.calls_of(actor) {
            ground.send_reply(self.index(), actor, id, Reply::Broken);
        }
    }
}
