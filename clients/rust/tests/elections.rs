//! Elections of the client, against servers that misbehave on purpose.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

mod fake;

use std::{collections::HashMap, time::Duration};

use conclave_client::{Client, Observed, Observer, Session, SessionOptions};
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
