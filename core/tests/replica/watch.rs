//! Watchers of a member: told what it has applied, and nothing else, whatever becomes
//! of its leader, its log and its state. That they are told all of it is shown by
//! `tests/watch.rs`.

use conclave_core::{
    ids::Revision,
    keyspace::{Interest, KeyRange},
    watch::{Request, StreamId, WatcherId},
};

use super::*;

const WATCHER: WatcherId = WatcherId(1);

impl Cluster {
    fn watch(&mut self, node: NodeId, start: Option<Revision>) {
        let of = Interest {
            range: KeyRange::single("key".into()),
            puts: true,
            deletes: true,
        };
        let create = Request::Create {
            stream: StreamId(1),
            watcher: WATCHER,
            of,
            start,
        };
        self.input(node, Input::Watch(create));
        self.settle();
    }

    pub(crate) fn revision(&self, node: NodeId) -> Revision {
        self.nodes[&node].replica.state().keyspace().revision()
    }

    /// Revisions of events, and with what it ended, if it did.
    fn heard(&self, node: NodeId) -> (Vec<Revision>, Option<Option<Revision>>) {
        let (mut heard, mut end) = (vec![], None);
        for notice in &self.nodes[&node].notices {
            match notice {
                Notice::Events { events, .. } => {
                    heard.extend(events.iter().map(|event| event.revision));
                }
                Notice::Canceled { compacted, .. } => end = Some(*compacted),
                _ => {}
            }
        }
        (heard, end)
    }

    /// A member that was away while the key was written twice, and whose log was cut;
    /// its revision when it left.
    fn with_one_behind(compacts: bool) -> (Self, NodeId, Revision) {
        let mut cluster = Self::ready(3);
        let (leader, away) = (cluster.leader(), cluster.follower());
        cluster.put(leader, 1);
        cluster.settle();
        cluster.run_ms(100);
        let before = cluster.revision(away);
        cluster.watch(away, None);
        cluster.cut.push(away);
        for _ in 0..2 {
            cluster.put(leader, 1);
            cluster.settle();
        }
        if compacts {
            cluster.send(leader, compact(before + 2));
            cluster.settle();
            cluster.append_some(leader, 2);
        }
        cluster.run_ms(200);
        for (_, node) in cluster.nodes.iter_mut().filter(|(id, _)| **id != away) {
            let at = node.replica.state().applied();
            node.replica.checkpointed(at);
            node.replica.cut(at);
        }
        cluster.cut.clear();
        cluster.run_ms(1_500);
        (cluster, away, before)
    }

    fn install(&mut self, node: NodeId) {
        let fetch = self.nodes.get_mut(&node).unwrap().fetch.take().unwrap();
        let from = &mut self.nodes.get_mut(&fetch.from).unwrap().replica;
        from.begin_image();
        let state = State::restore(from.draw_part(usize::MAX).and_then(Part::rest).unwrap());
        self.input(node, Input::Fetched(Some(Box::new(state))));
        self.settle();
    }
}

#[test]
fn watchers_of_every_member_hear_what_is_committed() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    for node in [leader, follower] {
        cluster.watch(node, None);
    }
    let before = cluster.revision(leader);
    cluster.put(follower, 1);
    cluster.settle();
    cluster.run_ms(100);
    for node in [leader, follower] {
        assert_eq!(cluster.heard(node), (vec![before + 1], None));
    }
}

#[test]
fn nobody_hears_of_what_was_proposed_and_never_committed() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    cluster.watch(old, None);
    let before = cluster.revision(old);
    cluster.cut.push(old);
    cluster.put(old, 1);
    cluster.settle();
    assert_eq!(cluster.heard(old), (vec![], None));
    cluster.run_ms(3_000);
    cluster.cut.clear();
    cluster.run_ms(2_000);
    let new = cluster.leader();
    assert_ne!(new, old);
    cluster.put(new, 1);
    cluster.settle();
    cluster.run_ms(200);
    assert_eq!(cluster.heard(old), (vec![before + 1], None));
}

#[test]
fn after_an_install_watchers_hear_what_they_missed() {
    let (mut cluster, away, before) = Cluster::with_one_behind(false);
    assert_eq!(cluster.heard(away), (vec![], None));
    cluster.install(away);
    assert_eq!(cluster.heard(away), (vec![before + 1, before + 2], None));
    cluster.run_ms(1_500);
    cluster.put(away, 1);
    cluster.settle();
    cluster.run_ms(200);
    assert_eq!(cluster.heard(away).0.last(), Some(&(before + 3)));
}

#[test]
fn after_an_install_of_what_is_compacted_watchers_are_told_so() {
    let (mut cluster, away, _) = Cluster::with_one_behind(true);
    cluster.install(away);
    let complete_from = cluster.nodes[&away]
        .replica
        .state()
        .keyspace()
        .complete_from();
    assert_eq!(cluster.heard(away), (vec![], Some(Some(complete_from))));
}

#[test]
fn who_waits_for_a_checkpoint_begins_no_watcher() {
    let (mut cluster, away, _) = Cluster::with_one_behind(false);
    cluster.nodes.get_mut(&away).unwrap().notices.clear();
    cluster.watch(away, None);
    let refused = Notice::Refused { watcher: WATCHER };
    assert_eq!(cluster.nodes[&away].notices, [refused]);
}

#[test]
fn a_member_that_starts_again_is_silent_until_it_has_caught_up() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.put(leader, 1);
    cluster.settle();
    cluster.run_ms(100);
    let newest = cluster.revision(follower);
    cluster.restart(follower, 77);
    // As a client would that has seen the newest elsewhere.
    cluster.watch(follower, Some(newest + 1));
    cluster.run_ms(1_500);
    assert_eq!(cluster.heard(follower), (vec![], None));
    cluster.put(leader, 1);
    cluster.settle();
    cluster.run_ms(200);
    assert_eq!(cluster.heard(follower), (vec![newest + 1], None));
}
