//! Elections of the client, against servers that misbehave on purpose.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

mod fake;

use std::{collections::HashMap, time::Duration};

use conclave_client::{Client, Error, Observed, Observer, Session, SessionOptions, stand_by};
use fake::Servers;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Longer than anything here takes; only a hang fails by it.
const LONG: Duration = Duration::from_secs(20);
/// Longer than an observer looks for a server that tells it something.
const BEYOND_PATIENCE: Duration = Duration::from_millis(5_500);

fn client(servers: &Servers) -> Client {
    Client::connect(servers.addresses()).unwrap()
}

async fn session(servers: &Servers) -> Session {
    let options = SessionOptions {
        ttl: Duration::from_secs(60),
        ..SessionOptions::default()
    };
    client(servers).session(options).await.unwrap()
}

async fn told(observer: &mut Observer) -> Observed {
    timeout(LONG, observer.next()).await.unwrap().unwrap()
}

/// What the leader proclaims, if there is one.
fn value(observed: &Observed) -> Option<String> {
    let leader = observed.leader.as_ref()?;
    Some(String::from_utf8_lossy(&leader.value).into_owned())
}

#[tokio::test]
async fn an_observer_that_was_quiet_survives_a_broken_stream() {
    let servers = Servers::start(2).await;
    let session = session(&servers).await;
    let mut observer = client(&servers).observe("db");
    assert_eq!(value(&told(&mut observer).await), None);
    let waiting = tokio::spawn(async move {
        let observed = observer.next().await;
        (observer, observed)
    });
    sleep(BEYOND_PATIENCE).await;
    servers.end_observers(0, &Status::unavailable("connection reset"));
    servers
        .until(|state| state.elections.observed.len() == 2)
        .await;
    let _leads = session.campaign("db").value("here").await.unwrap();
    let (_, observed) = timeout(LONG, waiting).await.unwrap().unwrap();
    let observed = observed.unwrap();
    assert_eq!(value(&observed).as_deref(), Some("here"));
    assert!(!observed.missed);
}

#[tokio::test]
async fn an_observer_leaves_a_member_without_a_leader() {
    let servers = Servers::start(2).await;
    let session = session(&servers).await;
    let leadership = session.campaign("db").value("first").await.unwrap();
    let mut observer = client(&servers).observe("db");
    let first = told(&mut observer).await;
    assert_eq!(value(&first).as_deref(), Some("first"));
    let waiting = tokio::spawn(async move {
        let second = observer.next().await.unwrap();
        let third = observer.next().await.unwrap();
        [second, third]
    });
    let details = ErrorDetails::with_error_info("NOT_LEADER", "conclave.dev", HashMap::new());
    let no_leader = Status::with_error_details(Code::Unavailable, "no leader", details);
    servers.end_observers(0, &no_leader);
    servers
        .until(|state| state.elections.observed.len() == 2)
        .await;
    leadership.proclaim("second").await.unwrap();
    leadership.proclaim("third").await.unwrap();
    let observed = timeout(LONG, waiting).await.unwrap().unwrap();
    let values = observed.each_ref().map(value);
    assert_eq!(
        values,
        [Some("second".to_owned()), Some("third".to_owned())]
    );
    let asked = servers.state().elections.observed.clone();
    assert_eq!(asked, [(0, 0), (1, first.revision)]);
}

#[tokio::test]
async fn an_observer_leaves_a_server_that_says_nothing() {
    let servers = Servers::start(2).await;
    let mut observer = client(&servers).observe("db");
    told(&mut observer).await;
    servers.hang(0);
    let waiting = tokio::spawn(async move { observer.next().await });
    servers
        .until(|state| state.elections.observed.len() == 2)
        .await;
    servers.lead(1);
    let _leads = session(&servers).await.campaign("db").await.unwrap();
    let observed = timeout(LONG, waiting).await.unwrap().unwrap();
    assert!(observed.unwrap().leader.is_some());
    assert_eq!(servers.state().elections.observed[1].0, 1);
}

#[tokio::test]
async fn what_is_proclaimed_is_told_in_order_also_if_nobody_waits_for_it() {
    let servers = Servers::start(1).await;
    let leads = session(&servers).await;
    let leadership = leads.campaign("db").value("0").await.unwrap();
    leadership.proclaim("1").await.unwrap();
    servers.hang(0);
    {
        // Begun, and dropped half-way.
        let dropped = leadership.proclaim("2");
        assert!(timeout(Duration::from_millis(50), dropped).await.is_err());
    }
    servers.recover(0);
    leadership.proclaim("3").await.unwrap();
    assert_eq!(servers.state().elections.values(), ["0", "1", "2", "3"]);
    servers.usurp("db");
    let stale = leadership.proclaim("4").await;
    assert!(matches!(stale, Err(Error::NotHolder { .. })), "{stale:?}");
}

#[tokio::test]
async fn a_campaign_that_is_dropped_is_withdrawn_and_leadership_resigned() {
    let servers = Servers::start(1).await;
    let (a, b) = (session(&servers).await, session(&servers).await);
    let leadership = a.campaign("db").await.unwrap();
    let refused = b.campaign("db").try_now().await;
    assert!(matches!(refused, Err(Error::LockHeld)), "{refused:?}");
    let waiting = b.campaign("db").into_future();
    assert!(timeout(Duration::from_millis(100), waiting).await.is_err());
    servers.until(|state| !state.cancelled.is_empty()).await;
    drop(leadership);
    servers
        .until(|state| state.elections.leader("db").is_none())
        .await;
    let leadership = b.campaign("db").try_now().await.unwrap();
    leadership.resign().await.unwrap();
    assert!(servers.state().elections.leader("db").is_none());
}

#[tokio::test]
async fn stand_by_returns_the_result_although_leadership_went() {
    let servers = Servers::start(1).await;
    let session = session(&servers).await;
    let done = stand_by(session.campaign("db"), |_| async {
        servers.usurp("db");
        7
    });
    assert_eq!(timeout(LONG, done).await.unwrap().unwrap(), 7);
}

#[tokio::test]
async fn stand_by_leads_again_after_a_loss() {
    let servers = Servers::start(1).await;
    let session = session(&servers).await;
    servers
        .until(|state| state.sessions.values().all(Option::is_some))
        .await;
    let mut terms: Vec<u64> = Vec::new();
    let done = stand_by(session.campaign("db"), |leadership| {
        terms.push(leadership.term());
        let is_first = terms.len() == 1;
        let servers = &servers;
        async move {
            if is_first {
                servers.depose("db");
                std::future::pending::<()>().await;
            }
            "done"
        }
    });
    assert_eq!(timeout(LONG, done).await.unwrap().unwrap(), "done");
    assert!(terms.len() == 2 && terms[0] < terms[1], "{terms:?}");
    assert!(servers.state().elections.leader("db").is_none());
}
