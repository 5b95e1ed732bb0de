//! Leases: sessions with ids that clients choose, revoked by anyone, with a time left
//! that only the leader knows; and what else the etcd API asks of a member.

use conclave_core::{ids::Revision, keyspace::Hashed};
use conclave_proto::internal::{GrantLease, RevokeLease};

use super::*;

const CHOSEN: SessionId = SessionId(-5);

fn grant(session: SessionId, ttl_ms: u64) -> command::Body {
    command::Body::GrantLease(GrantLease {
        session_id: session.0,
        ttl_ms,
    })
}

fn revoke(session: SessionId) -> command::Body {
    command::Body::RevokeLease(RevokeLease {
        session_id: session.0,
    })
}

fn put_bound(keys: &[&str], session: SessionId) -> command::Body {
    let put = |key: &&str| Operation {
        operation: Some(operation::Operation::Put(Put {
            key: (*key).to_owned().into(),
            value: Bytes::new(),
            lease: session.0,
            ..Put::default()
        })),
    };
    command::Body::Txn(Txn {
        success: keys.iter().map(put).collect(),
        ..Txn::default()
    })
}

impl Cluster {
    fn run(&mut self, node: NodeId, body: command::Body) -> String {
        let number = self.send(node, body);
        self.settle();
        self.outcome(node, number)
    }

    fn time_left(&mut self, node: NodeId, session: SessionId) -> RequestNumber {
        self.last_number += 1;
        let number = self.last_number;
        self.input(node, Input::TimeLeft { number, session });
        number
    }

    fn ask(&mut self, node: NodeId, query: Query<Register>) -> String {
        self.last_number += 1;
        let number = self.last_number;
        self.input(node, Input::Read { number, query });
        self.settle();
        self.outcome(node, number)
    }

    fn hash(&mut self, node: NodeId, revision: Option<Revision>) -> Hashed {
        self.last_number += 1;
        let number = self.last_number;
        self.input(node, Input::Hash { number, revision });
        self.run_ms(10);
        match self.nodes.get_mut(&node).unwrap().outcomes.remove(&number) {
            Some(Ok(AnswerBody::Hashed(Ok(hashed)))) => hashed,
            other => panic!("{other:?}"),
        }
    }

    fn lives(&self, node: NodeId, session: SessionId) -> bool {
        let sessions = self.nodes[&node].replica.state().sessions();
        sessions.get(session).is_some()
    }
}

#[test]
fn a_chosen_id_is_given_out_once_at_a_time() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let granted = "Ok(SessionOpened { session: SessionId(-5), ttl_ms: 9000 })";
    assert_eq!(cluster.run(follower, grant(CHOSEN, 9_000)), granted);
    assert_eq!(
        cluster.run(leader, grant(CHOSEN, 5_000)),
        "Ok(SessionExists)"
    );
    assert_eq!(cluster.run(leader, revoke(CHOSEN)), "Ok(Done)");
    assert_eq!(
        cluster.run(follower, revoke(CHOSEN)),
        "Ok(SessionEnded(Revoked))"
    );
    assert_eq!(cluster.run(follower, grant(CHOSEN, 9_000)), granted);
    assert_eq!(
        cluster.ask(follower, Query::SessionIds),
        "Ok(SessionIds([SessionId(-5)]))"
    );
    cluster.assert_equal_states();
}

#[test]
fn ttls_of_leases_are_kept_within_those_of_etcd() {
    let mut cluster = Cluster::ready(1);
    for (asked, given) in [(0, 2_000), (700, 2_000), (u64::MAX, 9_000_000_000_000_u64)] {
        let outcome = cluster.run(NodeId(1), grant(SessionId(0), asked));
        let given = format!("ttl_ms: {given} }})");
        assert!(outcome.ends_with(&given), "{outcome}");
    }
}

#[test]
fn a_revoked_session_takes_its_keys_along_in_one_revision() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let native = cluster.open(follower, 60_000);
    cluster.run(leader, put_bound(&["c", "a", "b"], native));
    assert_eq!(
        cluster.ask(follower, Query::KeysOf(native)),
        r#"Ok(Keys([b"a", b"b", b"c"]))"#
    );
    let before = cluster.revision(leader);
    assert_eq!(cluster.run(follower, revoke(native)), "Ok(Done)");
    assert_eq!(cluster.revision(leader), before + 1);
    let told = (native, EventBody::SessionEnded(EndReason::Revoked));
    assert_eq!(cluster.nodes[&leader].events, [told]);
    assert_eq!(
        cluster.ask(leader, Query::KeysOf(native)),
        "Ok(SessionEnded(Revoked))"
    );
    // Without keys there is nothing to number.
    let bare = cluster.open(follower, 60_000);
    assert_eq!(cluster.run(leader, revoke(bare)), "Ok(Done)");
    assert_eq!(cluster.revision(follower), before + 1);
}

#[test]
fn the_time_left_is_told_on_any_member_and_renews_nothing() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.run(leader, grant(CHOSEN, 5_000));
    let mut last = 5_000;
    for node in [follower, leader, follower] {
        cluster.run_ms(1_000);
        let number = cluster.time_left(node, CHOSEN);
        cluster.settle();
        let outcome = cluster
            .nodes
            .get_mut(&node)
            .unwrap()
            .outcomes
            .remove(&number);
        let Some(Ok(AnswerBody::TimeLeft { ttl_ms, left_ms })) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(ttl_ms, 5_000);
        assert!(left_ms <= last - 1_000 && left_ms > last - 1_200);
        last = left_ms;
    }
    cluster.run_ms(2_300);
    assert!(!cluster.lives(leader, CHOSEN));
    let number = cluster.time_left(follower, CHOSEN);
    cluster.settle();
    assert_eq!(
        cluster.outcome(follower, number),
        "Ok(SessionEnded(Expired))"
    );
}

#[test]
fn a_leader_cut_off_does_not_tell_the_time_left() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    let session = cluster.open(old, 60_000);
    cluster.cut.push(old);
    let number = cluster.time_left(old, session);
    cluster.run_ms(2_000);
    assert_eq!(
        cluster.outcome(old, number),
        "Err(NotLeader { leader: None })"
    );
}

#[test]
fn a_lease_that_takes_the_id_of_another_lives_its_own_time() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.run(leader, grant(CHOSEN, 3_000));
    cluster.run_ms(2_500);
    // Both in one entry: the deadline of the one must not be that of the other, and the
    // end of the one not that of the other.
    let numbers = [revoke(CHOSEN), grant(CHOSEN, 4_000)].map(|body| cluster.send(follower, body));
    cluster.settle();
    assert_eq!(cluster.outcome(follower, numbers[0]), "Ok(Done)");
    let granted = cluster.outcome(follower, numbers[1]);
    assert!(granted.starts_with("Ok(SessionOpened"), "{granted}");
    cluster.run_ms(3_500);
    assert!(cluster.lives(leader, CHOSEN));
    cluster.run_ms(1_000);
    assert!(!cluster.lives(leader, CHOSEN));
    // Why it ended is on record for the newest alone.
    let number = cluster.renew(follower, CHOSEN);
    cluster.settle();
    assert_eq!(
        cluster.outcome(follower, number),
        "Ok(SessionEnded(Expired))"
    );
}

#[test]
fn an_expiry_that_comes_late_spares_the_lease_that_took_the_id() {
    let mut state = State::<Register>::new(7);
    let mut apply = |index, log_time_ms, bodies: Vec<command::Body>| {
        let entry = conclave_proto::internal::Entry {
            stamp: Some(conclave_proto::internal::Stamp {
                log_time_ms,
                date_ms: 0,
            }),
            commands: bodies
                .into_iter()
                .map(|body| Command {
                    origin: None,
                    body: Some(body),
                })
                .collect(),
        };
        state
            .apply(index, 1, &entry.encode_to_vec().into())
            .unwrap();
        state.sessions().get(CHOSEN).is_some()
    };
    let expire = |opened_at| {
        command::Body::ExpireSessions(conclave_proto::internal::ExpireSessions {
            term: 1,
            session_ids: vec![CHOSEN.0],
            opened_at_ms: vec![opened_at],
        })
    };
    assert!(apply(1, 0, vec![grant(CHOSEN, 2_000)]));
    // The leader has seen that it is over, and not yet that it was revoked.
    assert!(apply(
        2,
        2_001,
        vec![revoke(CHOSEN), grant(CHOSEN, 2_000), expire(0)]
    ));
    assert!(!apply(3, 4_001, vec![expire(2_001)]));
}

#[test]
fn a_chosen_id_that_ends_often_keeps_its_newest_reason_on_record() {
    let mut cluster = Cluster::ready(1);
    let node = NodeId(1);
    cluster.run(node, grant(CHOSEN, 5_000));
    cluster.run(node, revoke(CHOSEN));
    cluster.run(node, grant(CHOSEN, 5_000));
    let close = CloseSession {
        session_id: CHOSEN.0,
        attachment: 0,
    };
    cluster.run(node, command::Body::CloseSession(close));
    for _ in 0..limits::ENDED_SESSIONS_KEPT - 1 {
        let other = SessionId(77);
        cluster.send(node, grant(other, 5_000));
        cluster.send(node, revoke(other));
    }
    cluster.settle();
    let reason = |cluster: &Cluster| {
        let system = cluster.nodes[&node].replica.state().system().clone();
        system.end_reason(CHOSEN)
    };
    assert_eq!(reason(&cluster), EndReason::Closed);
    cluster.run(node, grant(SessionId(77), 5_000));
    cluster.run(node, revoke(SessionId(77)));
    assert_eq!(reason(&cluster), EndReason::Unknown);
}

#[test]
fn leases_survive_a_checkpoint() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.run(leader, grant(CHOSEN, 5_000));
    cluster.run(leader, put_bound(&["a"], CHOSEN));
    let raise = NoSpace {
        raised: true,
        member: 3,
    };
    cluster.run(leader, command::Body::NoSpace(raise));
    cluster.restart_from_checkpoint(follower, 9, 2);
    cluster.run_ms(500);
    assert!(cluster.lives(follower, CHOSEN));
    assert_eq!(
        cluster.ask(follower, Query::KeysOf(CHOSEN)),
        r#"Ok(Keys([b"a"]))"#
    );
    assert_eq!(
        cluster.ask(follower, Query::Alarms),
        "Ok(Alarms([NodeId(3)]))"
    );
    assert_eq!(
        cluster.run(follower, grant(SessionId(9), 5_000)),
        "Ok(NoSpace)"
    );
    let clear = |member| {
        command::Body::NoSpace(NoSpace {
            raised: false,
            member,
        })
    };
    assert_eq!(cluster.run(follower, clear(2)), "Ok(Alarms([]))");
    assert_eq!(cluster.run(follower, clear(3)), "Ok(Alarms([NodeId(3)]))");
    // Nobody waits at the third.
    cluster.run_ms(10);
    cluster.assert_equal_states();
}

#[test]
fn members_make_the_same_hash_at_the_same_revision() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.append_some(leader, 20);
    let at = cluster.revision(leader);
    let hashed = cluster.hash(leader, None);
    assert_eq!((hashed.revision, hashed.compacted), (at, 0));
    cluster.append_some(leader, 3);
    assert_eq!(cluster.hash(follower, Some(at)), hashed);
    assert_ne!(cluster.hash(follower, None).hash, hashed.hash);
    // One that holds what was compacted still, and one that never had it.
    let compact = Compact { revision: at - 4 };
    cluster.run(leader, command::Body::Compact(compact));
    cluster.run_ms(100);
    cluster.restart_from_checkpoint(follower, 9, 2);
    cluster.run_ms(500);
    let hashed = cluster.hash(leader, Some(at));
    assert_eq!(hashed.compacted, at - 4);
    assert_eq!(cluster.hash(follower, Some(at)), hashed);

    cluster.last_number += 1;
    let number = cluster.last_number;
    let revision = Some(at - 5);
    cluster.input(follower, Input::Hash { number, revision });
    cluster.settle();
    let refused = cluster.outcome(follower, number);
    assert!(refused.starts_with("Ok(Hashed(Err(Compacted"), "{refused}");
}

#[test]
fn leadership_goes_to_the_member_that_is_named() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    for _ in 0..2 {
        let leader = cluster.leader();
        let all = [1, 2, 3].map(NodeId);
        let to = all.into_iter().find(|id| *id != leader && *id != old);
        let to = to.unwrap_or(old);
        cluster.input(leader, Input::HandOver(to));
        cluster.run_ms(50);
        assert_eq!(cluster.leader(), to);
    }
    let leader = cluster.leader();
    cluster.input(leader, Input::HandOver(NodeId(99)));
    cluster.input(leader, Input::HandOver(leader));
    cluster.run_ms(50);
    assert_eq!(cluster.leader(), leader);
    let number = cluster.append(leader, "a");
    cluster.settle();
    assert_eq!(cluster.outcome(leader, number), r#"Ok(Machine(Ok(b"a")))"#);
}

#[test]
fn questions_that_take_long_are_answered_over_several_turns() {
    let mut cluster = Cluster::ready(1);
    let one = NodeId(1);
    for _ in 0..100 {
        cluster.open(one, 10_000);
    }
    let asked: Vec<RequestNumber> = (0..1_000)
        .map(|_| {
            cluster.last_number += 1;
            let number = cluster.last_number;
            let query = Query::SessionIds;
            cluster.input(one, Input::Read { number, query });
            number
        })
        .collect();
    let mut turns = 0;
    let mut before = 0;
    while before < asked.len() {
        assert!(cluster.turn(one), "it has work as long as any is left");
        let answered = cluster.nodes[&one].outcomes.len();
        let most = limits::READ_STEPS_PER_TURN_MAX / 100;
        assert!(answered - before <= most, "{answered} after {before}");
        before = answered;
        turns += 1;
    }
    assert!(turns > 1);
    for number in asked {
        let answer = cluster.outcome(one, number);
        assert!(answer.starts_with("Ok(SessionIds("), "{answer}");
    }
}

#[test]
fn a_hash_that_nobody_waits_for_any_more_is_given_up() {
    let mut cluster = Cluster::ready(1);
    let one = NodeId(1);
    for number in 0..3 * limits::DRAWN_PER_TURN_MAX {
        let put = Put {
            key: number.to_string().into(),
            ..Put::default()
        };
        cluster.send(one, command::Body::Put(put));
    }
    cluster.settle();
    let hashes: Vec<RequestNumber> = (0..2)
        .map(|_| {
            cluster.last_number += 1;
            let number = cluster.last_number;
            let revision = None;
            cluster.input(one, Input::Hash { number, revision });
            number
        })
        .collect();
    cluster.turn(one);
    // One is under way, and this node stands still.
    cluster.boot_us += limits::HASHING_US_MAX;
    cluster.settle();
    for number in hashes {
        assert_eq!(cluster.outcome(one, number), "Err(Overloaded)");
    }
    assert_eq!(cluster.hash(one, None), cluster.hash(one, None));
}
