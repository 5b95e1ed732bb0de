//! The client against servers that misbehave on purpose: its calls over real
//! sockets, with answers lost, leaders moved and servers hung.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

mod fake;

use std::time::Duration;

use conclave_client::{Client, Error, LossReason, Session, SessionOptions, Status};
use fake::{Fault, Servers};
use tokio::time::timeout;

/// Longer than anything here takes; only a hang fails by it.
const LONG: Duration = Duration::from_secs(20);

async fn session(servers: &Servers, ttl: Duration) -> Session {
    let client = Client::connect(servers.addresses()).unwrap();
    let options = SessionOptions {
        ttl,
        ..SessionOptions::default()
    };
    client.session(options).await.unwrap()
}

async fn patient_session(servers: &Servers) -> Session {
    session(servers, Duration::from_secs(60)).await
}

#[tokio::test]
async fn the_leader_is_followed() {
    let servers = Servers::start(3).await;
    servers.lead(2);
    let session = patient_session(&servers).await;
    let guard = session.lock("a").await.unwrap();
    assert_eq!(guard.token(), servers.holder("a").unwrap().token);
    servers.lead(1);
    guard.release().await.unwrap();
    assert!(servers.holder("a").is_none());
    let before = servers.calls(0);
    session.lock("b").await.unwrap().release().await.unwrap();
    assert_eq!(servers.calls(0), before, "the leader is asked at once");
    session.close().await.unwrap();
    assert_eq!(servers.open_sessions(), 0);
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_under_the_same_number() {
    let servers = Servers::start(2).await;
    let session = patient_session(&servers).await;
    servers.inject(Fault::LoseAnswer);
    let guard = session.lock("a").await.unwrap();
    assert_eq!(servers.grants(), 1);
    servers.inject(Fault::LoseAnswer);
    guard.release().await.unwrap();
    assert!(servers.holder("a").is_none());
}

#[tokio::test]
async fn a_server_that_hangs_is_left() {
    let servers = Servers::start(2).await;
    let session = patient_session(&servers).await;
    servers.hang(0);
    servers.lead(1);
    let acquired = timeout(LONG, session.lock("a").try_now().into_future()).await;
    acquired.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn what_is_dropped_is_given_up() {
    let servers = Servers::start(1).await;
    let holder = patient_session(&servers).await;
    let waiter = patient_session(&servers).await;
    let guard = holder.lock("a").await.unwrap();
    let waiting = waiter.lock("a").into_future();
    assert!(timeout(Duration::from_millis(200), waiting).await.is_err());
    servers.until(|state| !state.cancelled.is_empty()).await;
    drop(guard);
    servers.until(|state| state.holders.is_empty()).await;
    let guard = waiter.lock("a").try_now().await.unwrap();
    guard.release().await.unwrap();
    drop((holder, waiter));
    servers.until(|state| state.sessions.is_empty()).await;
}

#[tokio::test]
async fn a_dropped_guard_does_not_stand_in_the_way_of_its_own_session() {
    let servers = Servers::start(1).await;
    let session = patient_session(&servers).await;
    for _ in 0..3 {
        drop(session.lock("a").try_now().await.unwrap());
    }
    let guard = session.lock("a").wait(LONG).await.unwrap();
    assert_eq!(guard.token(), servers.holder("a").unwrap().token);
    assert_eq!(servers.grants(), 4);
}

#[tokio::test]
async fn a_guard_outlives_its_session_handle() {
    let servers = Servers::start(1).await;
    let guard = {
        let session = patient_session(&servers).await;
        session.lock("a").await.unwrap()
    };
    assert_eq!(guard.session().status(), Status::Active);
    guard.release().await.unwrap();
    servers.until(|state| state.sessions.is_empty()).await;
}

#[tokio::test]
async fn refusals_are_told_apart() {
    let servers = Servers::start(1).await;
    let session = patient_session(&servers).await;
    let guard = session.lock("a").owner("x").await.unwrap();
    let other = session.lock("a").owner("y");
    assert!(matches!(
        other.clone().try_now().await,
        Err(Error::LockHeld)
    ));
    let late = other.wait(Duration::from_millis(50)).await;
    assert!(matches!(late, Err(Error::WaitTimedOut)));
    servers.steal("a");
    assert!(matches!(
        guard.release().await,
        Err(Error::NotHolder { .. })
    ));
}

#[tokio::test]
async fn a_forced_release_reaches_the_guard_with_its_reason() {
    let servers = Servers::start(1).await;
    let session = patient_session(&servers).await;
    let guard = session.lock("a").await.unwrap();
    servers
        .until(|state| state.sessions.values().all(Option::is_some))
        .await;
    let client = Client::connect(servers.addresses()).unwrap();
    let token = guard.token();
    client
        .force_release("a", "maintenance", Some(token))
        .await
        .unwrap();
    let reason = timeout(LONG, guard.lost()).await.unwrap();
    assert_eq!(
        reason,
        LossReason::Forced {
            reason: "maintenance".to_owned()
        }
    );
    assert_eq!(guard.remaining(), Duration::ZERO);
    assert_eq!(session.status(), Status::Active);
}

#[tokio::test]
async fn a_forced_release_without_a_token_is_sent_again_if_it_certainly_was_not_done() {
    let servers = Servers::start(2).await;
    let session = patient_session(&servers).await;
    let _guard = session.lock("a").await.unwrap();
    // Of this client the first server does not lead.
    servers.lead(1);
    let client = Client::connect(servers.addresses()).unwrap();
    client
        .force_release("a", "maintenance", None)
        .await
        .unwrap();
    assert!(servers.holder("a").is_none());
}

#[tokio::test]
async fn without_renewals_the_session_becomes_suspect_and_is_lost_for_good() {
    let servers = Servers::start(1).await;
    let session = session(&servers, Duration::from_millis(600)).await;
    let guard = session.lock("a").await.unwrap();
    let mut changes = session.changes();
    servers.hang(0);
    timeout(LONG, changes.changed()).await.unwrap().unwrap();
    assert!(matches!(
        *changes.borrow_and_update(),
        Status::Suspect { .. }
    ));
    timeout(LONG, changes.changed()).await.unwrap().unwrap();
    assert_eq!(guard.lost().await, LossReason::SessionExpired);
    servers.recover(0);
    let again = session.lock("b").await;
    assert!(matches!(
        again,
        Err(Error::SessionLost(LossReason::SessionExpired))
    ));
}

#[tokio::test]
async fn a_wait_ends_although_the_server_hangs() {
    let servers = Servers::start(1).await;
    let session = patient_session(&servers).await;
    servers.hang(0);
    let wait = session.lock("a").wait(Duration::from_millis(100));
    let ended = timeout(LONG, wait.into_future()).await.unwrap();
    assert!(matches!(ended, Err(Error::WaitTimedOut)), "{ended:?}");
    let ended = timeout(LONG, session.lock("b").try_now().into_future()).await;
    let error = ended.unwrap().unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    // Both are withdrawn as soon as somebody listens.
    servers.recover(0);
    servers.until(|state| state.cancelled.len() == 2).await;
    servers.until(|state| state.holders.is_empty()).await;
    assert_eq!(session.status(), Status::Active);
}

#[tokio::test]
async fn no_server_at_all_is_an_error_that_may_be_retried() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = unused.local_addr().unwrap().to_string();
    drop(unused);
    let client = Client::connect([address]).unwrap();
    let error = timeout(LONG, client.check("a", 1))
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.is_retryable() && !error.may_have_applied());
}
