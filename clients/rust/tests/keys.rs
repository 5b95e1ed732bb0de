//! Keys, watches and leases against servers that misbehave on purpose.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

mod fake_etcd;

use std::{collections::BTreeMap, time::Duration};

use conclave_client::{Client, Error, Event, Get, KeyRange, LossReason, Put, Status, Watch};
use fake_etcd::{Fault, Servers};
use tokio::time::timeout;

/// Longer than anything here takes; only a hang fails by it.
const LONG: Duration = Duration::from_secs(20);

fn client(servers: &Servers) -> Client {
    Client::connect(&servers.addresses).unwrap()
}

#[tokio::test]
async fn a_write_is_sent_again_only_if_it_certainly_was_not_done() {
    let servers = Servers::start(2).await;
    let kv = client(&servers).kv();
    servers.inject(&[Fault::NoLeader, Fault::NoLeader, Fault::NoLeader]);
    let written = kv.put(Put::new("a", "1")).await.unwrap();
    assert_eq!((written.revision, servers.state().history.len()), (2, 1));
    servers.inject(&[Fault::NoLeader, Fault::Unknown]);
    let error = kv.put(Put::new("a", "2")).await.unwrap_err();
    assert!(error.may_have_applied() && error.is_retryable(), "{error}");
    assert_eq!(servers.state().history.len(), 2);
}

#[tokio::test]
async fn a_read_is_repeated() {
    let servers = Servers::start(2).await;
    let kv = client(&servers).kv();
    servers.inject(&[Fault::Unknown, Fault::Unknown]);
    kv.get("a").await.unwrap();
    servers.compact(5);
    let old = kv.get(Get::new("a").at_revision(3)).await;
    assert!(matches!(old, Err(Error::Compacted { .. })));
}

#[tokio::test]
async fn a_write_goes_on_while_servers_stop_one_after_the_other() {
    let servers = Servers::start(2).await;
    let kv = client(&servers).kv();
    servers.inject(&[Fault::Stopping, Fault::Stopping]);
    kv.put(Put::new("a", "1")).await.unwrap();
    assert_eq!(servers.state().history.len(), 1);
}

#[tokio::test]
async fn a_read_goes_to_another_server_when_one_hangs() {
    let servers = Servers::start(2).await;
    servers.hang(0);
    for read in [Get::new("a"), Get::new(KeyRange::prefix("a"))] {
        // Each begins with the server that hangs.
        let kv = client(&servers).kv();
        timeout(LONG, kv.get(read)).await.unwrap().unwrap();
    }
    let leases = client(&servers).leases();
    let renewed = timeout(LONG, leases.renew(1)).await.unwrap();
    assert!(matches!(renewed, Err(Error::LeaseNotFound)));
}

#[tokio::test]
async fn a_read_that_nobody_answers_had_no_effect() {
    let servers = Servers::start(1).await;
    servers.hang(0);
    let kv = client(&servers).kv();
    let error = timeout(LONG, kv.get("a")).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&servers.addresses[0]), "{error}");
}

#[tokio::test]
async fn a_watch_leaves_a_server_that_says_nothing() {
    let servers = Servers::start(2).await;
    // Before it has begun ...
    servers.mute(&[0]);
    let client = client(&servers);
    let watching = timeout(LONG, client.watch(Watch::new("k"))).await;
    let mut watching = watching.unwrap().unwrap();
    servers.change(1);
    let events = timeout(LONG, watching.next()).await.unwrap().unwrap();
    assert_eq!(places(&events), [(2, 0)]);
    // ... and long after, when nothing has happened for a while.
    servers.mute(&[1]);
    let (told, ()) = tokio::join!(timeout(LONG, watching.next()), async {
        servers.until(|state| state.watches[&0] == 2).await;
        servers.change(1);
    });
    assert_eq!(places(&told.unwrap().unwrap()), [(3, 0)]);
}

#[tokio::test]
async fn a_watch_stays_with_a_server_that_has_nothing_to_tell() {
    let servers = Servers::start(2).await;
    let mut watching = client(&servers).watch(Watch::new("k")).await.unwrap();
    // Longer than a server may be silent.
    let nothing = timeout(Duration::from_secs(9), watching.next()).await;
    assert!(nothing.is_err());
    assert_eq!(servers.state().watches, BTreeMap::from([(0, 1)]));
}

#[tokio::test]
async fn what_an_attempt_without_an_answer_has_done_is_done() {
    let servers = Servers::start(2).await;
    let client = client(&servers);
    let (kv, leases) = (client.kv(), client.leases());
    servers.inject(&[Fault::Unknown]);
    kv.compact(3, false).await.unwrap();
    let again = kv.compact(3, false).await;
    assert!(matches!(again, Err(Error::Compacted { .. })), "{again:?}");
    let (id, _) = leases.grant(Duration::from_secs(60), 0).await.unwrap();
    servers.inject(&[Fault::Unknown]);
    leases.revoke(id).await.unwrap();
    let again = leases.revoke(id).await;
    assert!(matches!(again, Err(Error::LeaseNotFound)), "{again:?}");
}

#[tokio::test]
async fn a_lease_lives_from_the_attempt_that_granted_it() {
    let servers = Servers::start(1).await;
    servers.state().may_grant = false;
    let client = client(&servers);
    let granting = client.lease(Duration::from_secs(1));
    let (granted, ()) = tokio::join!(granting, async {
        // Longer than the lease.
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        servers.state().may_grant = true;
    });
    assert_eq!(granted.unwrap().status(), Status::Active);
}

/// Where each event is, and of which key.
fn places(events: &[Event]) -> Vec<(i64, u8)> {
    let place = |event: &Event| (event.kv.mod_revision, event.kv.key[1]);
    events.iter().map(place).collect()
}

#[tokio::test]
async fn a_watch_survives_streams_that_break_and_loses_and_doubles_nothing() {
    for breaks_after in 3..12 {
        let servers = Servers::start(3).await;
        servers.change(1);
        servers.state().breaks_after = breaks_after;
        let mut watching = client(&servers).watch(Watch::new("k")).await.unwrap();
        let begin = watching.revision();
        assert_eq!(begin, 2);
        let sizes = [1, 2, 1, 1, 1, 2, 1, 2, 1, 1];
        // The part of an answer that two revisions fill must fit on one stream.
        if breaks_after < 5 {
            sizes.iter().for_each(|_| servers.change(1));
        } else {
            sizes.iter().for_each(|size| servers.change(*size));
        }
        let history = servers.state().history.clone();
        let expected: Vec<Event> = history
            .into_iter()
            .filter(|(at, _)| *at > begin)
            .flat_map(|(_, events)| events)
            .map(Event::from)
            .collect();
        let mut told: Vec<Event> = Vec::new();
        while told.len() < expected.len() {
            let events = timeout(LONG, watching.next()).await.unwrap().unwrap();
            let (first, last) = (&events[0], &events[events.len() - 1]);
            told.extend_from_slice(&events);
            // All of a revision together.
            let size = |event: &Event| {
                let same = |other: &&Event| other.kv.mod_revision == event.kv.mod_revision;
                (
                    events.iter().filter(same).count(),
                    expected.iter().filter(same).count(),
                )
            };
            for event in [first, last] {
                let (here, all) = size(event);
                assert_eq!(here, all, "{event:?}");
            }
        }
        assert_eq!(places(&told), places(&expected));
        assert_eq!(watching.revision(), servers.state().revision);
        assert!(
            servers.state().watches.len() > 1,
            "another server was asked"
        );
    }
}

#[tokio::test]
async fn a_watch_that_comes_too_late_says_from_where_to_go_on() {
    let servers = Servers::start(1).await;
    (0..9).for_each(|_| servers.change(1));
    servers.compact(7);
    let watch = Watch::new("k").from_revision(3);
    let mut watching = client(&servers).watch(watch).await.unwrap();
    for _ in 0..2 {
        let error = watching.next().await.unwrap_err();
        assert!(
            matches!(error, Error::Compacted { compacted: 7 }),
            "{error}"
        );
        assert!(error.to_string().contains("before revision 7"), "{error}");
    }
}

#[tokio::test]
async fn a_watch_that_nobody_begins_fails() {
    let servers = Servers::start(1).await;
    servers.hang(0);
    let client = client(&servers);
    let watch = client.watch(Watch::new("k"));
    let error = timeout(LONG, async { watch.await.unwrap_err() })
        .await
        .unwrap();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn a_lease_is_kept_alive_and_revoked_when_its_value_goes() {
    let servers = Servers::start(2).await;
    let lease = client(&servers)
        .lease(Duration::from_secs(1))
        .await
        .unwrap();
    let id = lease.id();
    servers.until(|state| state.leases[&id].1 >= 2).await;
    assert_eq!(lease.status(), Status::Active);
    // The other server takes over.
    servers.hang(0);
    let renewed = servers.state().leases[&id].1;
    servers
        .until(|state| state.leases[&id].1 >= renewed + 4)
        .await;
    assert_eq!(lease.status(), Status::Active);
    drop(lease);
    servers.until(|state| state.leases.is_empty()).await;
}

#[tokio::test]
async fn a_lease_that_cannot_be_renewed_is_given_up() {
    let servers = Servers::start(1).await;
    let lease = client(&servers)
        .lease(Duration::from_secs(1))
        .await
        .unwrap();
    let mut changes = lease.changes();
    servers.hang(0);
    timeout(LONG, changes.changed()).await.unwrap().unwrap();
    assert!(matches!(
        *changes.borrow_and_update(),
        Status::Suspect { .. }
    ));
    let reason = timeout(LONG, lease.lost()).await.unwrap();
    assert_eq!(reason, LossReason::SessionExpired);
    assert_eq!(lease.remaining(), Duration::ZERO);
}

#[tokio::test]
async fn the_end_of_a_lease_is_heard_from_the_cluster() {
    let servers = Servers::start(1).await;
    let client = client(&servers);
    let granted = client
        .leases()
        .grant(Duration::from_secs(1), 0)
        .await
        .unwrap();
    let lease = client.leases().keep(granted.0).await.unwrap();
    client.leases().revoke(lease.id()).await.unwrap();
    assert_eq!(
        timeout(LONG, lease.lost()).await.unwrap(),
        LossReason::LeaseGone
    );
    assert!(matches!(lease.revoke().await, Err(Error::SessionLost(_))));
    let gone = client.leases().keep(granted.0).await;
    assert!(matches!(gone, Err(Error::LeaseNotFound)));
}

#[tokio::test]
async fn a_lease_that_was_only_kept_outlives_its_value() {
    let servers = Servers::start(1).await;
    let client = client(&servers);
    let (id, _) = client
        .leases()
        .grant(Duration::from_secs(60), 0)
        .await
        .unwrap();
    drop(client.leases().keep(id).await.unwrap());
    let other = client.lease(Duration::from_secs(60)).await.unwrap();
    let other_id = other.id();
    other.leave();
    drop(client.lease(Duration::from_secs(60)).await.unwrap());
    servers.until(|state| state.leases.len() == 2).await;
    let left: Vec<i64> = servers.state().leases.keys().copied().collect();
    assert_eq!(left, [id, other_id]);
}
