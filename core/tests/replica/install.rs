//! Checkpoints of other members: who asks for one, when, and what becomes of those
//! who wait at the member that installs it.

use conclave_core::ids::{Index, NodeId};
use raft::eraftpb::{MessageType, Snapshot};

use super::*;

impl Cluster {
    /// Three members, of which one is away, and the others have cut the log behind
    /// what that one has. The leader, and who is away.
    fn with_one_away() -> (Self, NodeId, NodeId) {
        let mut cluster = Self::ready(3);
        let (leader, away) = (cluster.leader(), cluster.follower());
        cluster.append_some(leader, 3);
        cluster.run_ms(100);
        (cluster, leader, away)
    }

    fn leave(&mut self, away: NodeId) {
        self.cut.push(away);
        self.run_ms(100);
    }

    /// Who is there has a checkpoint of now, and cuts the log behind it.
    fn cut_logs(&mut self) {
        // So that nothing is held back that would still reach who is away.
        self.run_ms(100);
        for (id, node) in &mut self.nodes {
            if !self.cut.contains(id) {
                let at = node.replica.state().applied();
                node.replica.checkpointed(at);
                node.replica.cut(at);
            }
        }
    }

    fn come_back(&mut self) {
        self.cut.clear();
        self.run_ms(1_500);
    }

    fn asks(&self, node: NodeId) -> Option<Fetch> {
        self.nodes[&node].fetch
    }

    /// The state of a checkpoint of now.
    fn checkpoint(&mut self, node: NodeId) -> State<Register> {
        let replica = &mut self.nodes.get_mut(&node).unwrap().replica;
        replica.begin_image();
        State::restore(replica.draw_part(usize::MAX).and_then(Part::rest).unwrap())
    }

    /// A checkpoint of now, as of the member that was asked, arrives.
    fn fetched(&mut self, node: NodeId) {
        let fetch = self.nodes.get_mut(&node).unwrap().fetch.take().unwrap();
        let state = self.checkpoint(fetch.from);
        assert!(state.applied() >= fetch.at_least);
        self.input(node, Input::Fetched(Some(Box::new(state))));
        self.settle();
    }

    fn not_fetched(&mut self, node: NodeId) {
        assert!(self.nodes.get_mut(&node).unwrap().fetch.take().is_some());
        self.input(node, Input::Fetched(None));
    }

    fn applied(&self, node: NodeId) -> Index {
        self.nodes[&node].replica.state().applied()
    }
}

#[test]
fn who_is_too_far_behind_installs_a_checkpoint_and_takes_part() {
    let (mut cluster, leader, away) = Cluster::with_one_away();
    cluster.leave(away);
    cluster.append_some(leader, 10);
    cluster.cut_logs();
    cluster.come_back();
    let fetch = cluster.asks(away).unwrap();
    assert_eq!(
        (fetch.from, fetch.at_least),
        (leader, cluster.applied(leader))
    );
    assert!(cluster.nodes[&away].replica.status().is_behind);
    cluster.append_some(leader, 2);
    cluster.fetched(away);
    let node = &cluster.nodes[&away];
    assert_eq!(node.installed, Some(node.log.base.0));
    assert!(node.log.base.0 > fetch.at_least);
    assert!(!node.replica.status().is_behind);
    cluster.append_some(leader, 2);
    cluster.run_ms(1_500);
    cluster.assert_equal_states();
    // With the other follower gone, nothing is committed without it.
    let other = *cluster
        .nodes
        .keys()
        .find(|id| **id != leader && **id != away)
        .unwrap();
    cluster.cut.push(other);
    let number = cluster.append(away, "z");
    cluster.run_ms(1_000);
    assert!(cluster.outcome(away, number).starts_with("Ok("));
}

#[test]
fn a_start_goes_on_from_what_was_installed() {
    let (mut cluster, leader, away) = Cluster::with_one_away();
    cluster.leave(away);
    cluster.append_some(leader, 10);
    cluster.cut_logs();
    cluster.come_back();
    let state = cluster.checkpoint(leader);
    cluster.fetched(away);
    let log = cluster.nodes[&away].log.clone();
    assert_eq!(log.base.0, state.applied());
    assert_eq!(log.hard_state.commit, state.applied());
    assert!(log.entries.is_empty());
    let replica = restored(&log, Some(state), 2, cluster.boot_us);
    cluster.nodes.insert(away, Node::with(replica, log));
    cluster.append_some(leader, 3);
    cluster.run_ms(1_000);
    cluster.assert_equal_states();
}

#[test]
fn what_was_not_fetched_is_asked_for_again_and_what_is_late_changes_nothing() {
    let (mut cluster, leader, away) = Cluster::with_one_away();
    cluster.leave(away);
    cluster.append_some(leader, 10);
    cluster.cut_logs();
    cluster.come_back();
    for _ in 0..3 {
        cluster.not_fetched(away);
        cluster.run_ms(100);
        assert_eq!(cluster.asks(away), None, "not at once");
        cluster.run_ms(1_000);
    }
    let old = cluster.checkpoint(leader);
    cluster.append_some(leader, 5);
    cluster.fetched(away);
    cluster.append_some(leader, 5);
    cluster.run_ms(1_500);
    let digest = cluster.nodes[&away].replica.state().digest();
    cluster.input(away, Input::Fetched(Some(Box::new(old))));
    cluster.settle();
    assert_eq!(cluster.nodes[&away].replica.state().digest(), digest);
    assert_eq!(cluster.asks(away), None);
    cluster.assert_equal_states();
}

#[test]
fn who_waits_with_a_number_waits_on_and_who_has_none_is_told_that_nobody_knows() {
    let (mut cluster, leader, away) = Cluster::with_one_away();
    let session = cluster.open(leader, 60_000);
    let install_while = |cluster: &mut Cluster, waits| {
        cluster.run_ms(100);
        cluster.leave(away);
        cluster.append_some(leader, 10);
        cluster.cut_logs();
        cluster.come_back();
        assert_eq!(cluster.outcome(away, waits), "none");
        cluster.fetched(away);
        cluster.run_ms(1_500);
        cluster.outcome(away, waits)
    };
    let unnumbered = cluster.append(away, "?");
    let told = install_while(&mut cluster, unnumbered);
    assert_eq!(told, "Err(OutcomeUnknown)");
    let waits = cluster.append_once(away, "?", (session, 1));
    assert_eq!(install_while(&mut cluster, waits), "none", "it waits on");
    cluster.append_some(leader, 3);
    cluster.append(leader, ".");
    cluster.run_ms(100);
    assert!(cluster.outcome(away, waits).ends_with("aaa.\")))"));
}

#[test]
fn who_waits_with_a_number_gets_the_answer_that_was_kept_for_it() {
    let (mut cluster, leader, away) = Cluster::with_one_away();
    let session = cluster.open(leader, 60_000);
    let waits = cluster.append_once(away, "?", (session, 1));
    cluster.run_ms(100);
    cluster.leave(away);
    cluster.append(leader, ".");
    // By the state alone, nobody could tell any more that it was granted.
    cluster.append_some(leader, 3);
    let again = cluster.append_once(leader, "?", (session, 1));
    cluster.run_ms(100);
    let kept = cluster.outcome(leader, again);
    assert!(kept.ends_with(".\")))"), "{kept}");
    cluster.cut_logs();
    cluster.come_back();
    cluster.fetched(away);
    assert_eq!(cluster.outcome(away, waits), kept);
    cluster.assert_equal_states();
}

#[test]
fn what_was_on_its_way_may_have_happened_and_what_comes_is_sent_elsewhere() {
    let (mut cluster, leader, away) = Cluster::with_one_away();
    let other = *cluster
        .nodes
        .keys()
        .find(|id| **id != leader && **id != away)
        .unwrap();
    // The command gets there, and no answer back; nor does it hear that it is cut off.
    cluster.mute.extend([(leader, away), (other, away)]);
    let number = cluster.append(away, "x");
    cluster.settle();
    cluster.append_some(leader, 10);
    cluster.cut_logs();
    cluster.mute.clear();
    cluster.run_ms(200);
    assert!(cluster.asks(away).is_some());
    let refused = cluster.append(away, "y");
    let unread = cluster.read(away);
    cluster.settle();
    let hint = format!("Err(NotLeader {{ leader: Some({leader:?}) }})");
    assert_eq!(cluster.outcome(away, refused), hint);
    assert_eq!(cluster.outcome(away, unread), hint);
    cluster.fetched(away);
    assert_eq!(cluster.outcome(away, number), "Err(OutcomeUnknown)");
    assert!(cluster.register(away).contains(&b'x'));
    cluster.run_ms(1_500);
    cluster.assert_equal_states();
}

/// Starts a member again with nothing but the newest entries of its log.
fn restart_without_state(cluster: &mut Cluster, id: NodeId, left: u64) {
    let mut log = cluster.nodes[&id].log.clone();
    log.first = log.entries.last().unwrap().index + 1 - left;
    log.entries.retain(|entry| entry.index >= log.first);
    let replica = restored(&log, None, 9, cluster.boot_us);
    cluster.nodes.insert(id, Node::with(replica, log));
}

#[test]
fn who_lost_its_checkpoints_votes_and_keeps_its_log_but_does_not_campaign() {
    let (mut cluster, leader, follower) = Cluster::with_one_away();
    restart_without_state(&mut cluster, follower, 2);
    // With the leader gone, the other one needs its vote, and its log.
    cluster.cut.push(leader);
    cluster.run_ms(6_000);
    let next = cluster.leader();
    assert_ne!(next, follower);
    let number = cluster.append(next, "b");
    cluster.run_ms(100);
    assert!(cluster.outcome(next, number).starts_with("Ok("));
    assert_eq!(cluster.asks(follower).map(|fetch| fetch.from), Some(next));
    // Nor when it is asked to lead.
    let message = cluster.raft(next, follower, MessageType::MsgTimeoutNow);
    cluster.say_raft(&message);
    cluster.cut.push(next);
    cluster.run_ms(6_000);
    let status = cluster.nodes[&follower].replica.status().clone();
    assert_eq!(status.role, Role::Follower);
    cluster.cut.clear();
    cluster.run_ms(3_000);
    let base = cluster.nodes[&follower].log.base;
    cluster.fetched(follower);
    assert_eq!(cluster.nodes[&follower].log.base, base, "its log stays");
    let leader = cluster.leader();
    cluster.append_some(leader, 2);
    cluster.run_ms(1_000);
    cluster.assert_equal_states();
    // From now on it can lead.
    for id in cluster.nodes.keys().copied().collect::<Vec<_>>() {
        if id != follower {
            cluster.input(id, Input::Resign);
        }
    }
    cluster.run_ms(1_000);
    cluster.leader();
}

#[test]
fn a_checkpoint_that_ends_before_the_log_begins_is_not_enough() {
    let (mut cluster, leader, follower) = Cluster::with_one_away();
    let old = cluster.checkpoint(leader);
    cluster.append_some(leader, 10);
    cluster.run_ms(1_000);
    restart_without_state(&mut cluster, follower, 2);
    cluster.run_ms(1_000);
    let asked = cluster.nodes.get_mut(&follower).unwrap().fetch.take();
    assert!(asked.unwrap().at_least > old.applied());
    cluster.input(follower, Input::Fetched(Some(Box::new(old))));
    cluster.run_ms(1_000);
    assert_eq!(cluster.asks(follower), asked);
    cluster.fetched(follower);
    cluster.run_ms(1_000);
    cluster.assert_equal_states();
}

#[test]
fn offers_that_make_no_sense_are_dropped() {
    let (mut cluster, leader, follower) = Cluster::with_one_away();
    let last = cluster.applied(leader);
    let offer = |index, term, voters: &[u64], data: &'static [u8]| {
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = index;
        snapshot.mut_metadata().term = term;
        snapshot.mut_metadata().mut_conf_state().voters = voters.to_vec();
        snapshot.data = data.into();
        snapshot
    };
    let term = cluster.term();
    let bad = [
        offer(0, 0, &[1, 2, 3], b""),
        offer(last + 5, 0, &[1, 2, 3], b""),
        offer(last + 5, term + 1, &[1, 2, 3], b""),
        offer(last + 5, term, &[1, 2], b""),
        offer(last + 5, term, &[1, 2, 3], b"data"),
        offer(last, term + 7, &[1, 2, 3], b""),
        // It has these.
        offer(last, term, &[1, 2, 3], b""),
        offer(2, term, &[1, 2, 3], b""),
    ];
    for snapshot in bad {
        let mut message = cluster.raft(leader, follower, MessageType::MsgSnapshot);
        message.set_snapshot(snapshot);
        cluster.say_raft(&message);
        cluster.run_ms(100);
        assert_eq!(cluster.asks(follower), None);
    }
    cluster.append_some(leader, 2);
    cluster.run_ms(1_000);
    cluster.assert_equal_states();
}
