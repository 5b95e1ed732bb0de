//! One real server and the native API, over real sockets and a real disk.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::time::Instant;

use bytes::Bytes;
use conclave_proto::v1::{self, LossReason, session_event::Event};
use conclave_server::{
    Options, ServerError, net::BindError, options::OptionsError, storage::StorageError,
};
use harness::{
    Client, Directory, Node, PATIENCE, acquire, alone, eventually, exchange, get, reason,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

async fn list(client: &Client, name: &str) -> Vec<v1::LockInfo> {
    let request = v1::ListLocksRequest {
        name: name.to_owned(),
        ..Default::default()
    };
    client
        .locks()
        .list(request)
        .await
        .unwrap()
        .into_inner()
        .locks
}

async fn release(client: &Client, name: &str, session_id: i64, token: u64) -> Result<(), Status> {
    let request = v1::ReleaseRequest {
        name: name.to_owned(),
        session_id,
        token,
        ..Default::default()
    };
    client.locks().release(request).await.map(|_| ())
}

async fn check(client: &Client, name: &str, token: u64) -> bool {
    let request = v1::CheckRequest {
        name: name.to_owned(),
        token,
    };
    client
        .locks()
        .check(request)
        .await
        .unwrap()
        .into_inner()
        .held
}

/// Follows sessions.
struct Watch {
    asks: mpsc::Sender<v1::WatchSessionsRequest>,
    events: Streaming<v1::SessionEvent>,
}

impl Watch {
    async fn open(client: &Client) -> Self {
        let (asks, requests) = mpsc::channel(8);
        let events = client
            .sessions()
            .watch(ReceiverStream::new(requests))
            .await
            .unwrap()
            .into_inner();
        Self { asks, events }
    }

    async fn add(&self, session_id: i64) {
        self.asks
            .send(v1::WatchSessionsRequest {
                session_id,
                attachment: 0,
            })
            .await
            .unwrap();
    }

    async fn next(&mut self) -> Result<(i64, Event), Status> {
        let event = timeout(PATIENCE, self.events.message())
            .await
            .expect("no event came")?;
        let event = event.expect("the stream goes on");
        Ok((event.session_id, event.event.unwrap()))
    }
}

#[tokio::test]
async fn a_lock_is_granted_listed_checked_and_released() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let session = client.open("worker").await;
    let granted = client
        .locks()
        .acquire(acquire("deploy", session, None))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(granted.key, format!("deploy/{session:x}"));
    let header = granted.header.unwrap();
    assert_eq!(header.leader_id, header.member_id);
    assert!(header.revision >= granted.token);

    let locks = list(&client, "").await;
    let holder = locks[0].holder.as_ref().unwrap();
    assert_eq!((locks.len(), locks[0].name.as_str()), (1, "deploy"));
    assert_eq!((holder.session_id, holder.token), (session, granted.token));
    assert_eq!(holder.session_name, "worker");
    assert!(check(&client, "deploy", granted.token).await);

    release(&client, "deploy", session, granted.token)
        .await
        .unwrap();
    assert!(!check(&client, "deploy", granted.token).await);
    assert_eq!(list(&client, "deploy").await, []);
    let stale = release(&client, "deploy", session, granted.token)
        .await
        .unwrap_err();
    assert_eq!(
        (stale.code(), reason(&stale).as_str()),
        (Code::FailedPrecondition, "NOT_HOLDER")
    );
}

#[tokio::test]
async fn those_who_wait_are_served_in_turn_and_not_longer_than_they_want() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (one, two) = (client.open("one").await, client.open("two").await);
    let first = client.acquire(acquire("l", one, None)).await.unwrap();
    let tried = client
        .acquire(acquire("l", two, Some(0)))
        .await
        .unwrap_err();
    assert_eq!(reason(&tried), "LOCK_HELD");
    let waited = client
        .acquire(acquire("l", two, Some(30)))
        .await
        .unwrap_err();
    assert_eq!(
        (waited.code(), reason(&waited).as_str()),
        (Code::DeadlineExceeded, "WAIT_TIMED_OUT")
    );

    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.acquire(acquire("l", two, None)).await }
    });
    while list(&client, "l").await[0].waiters.is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished());
    release(&client, "l", one, first).await.unwrap();
    let second = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
    assert!(second > first);
}

#[tokio::test]
async fn a_numbered_call_is_safe_to_repeat_and_can_be_cancelled() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let session = client.open("").await;
    let numbered = |request| v1::AcquireRequest {
        number: number(request),
        ..acquire("l", session, None)
    };
    let token = client.acquire(numbered(1)).await.unwrap();
    assert_eq!(client.acquire(numbered(1)).await.unwrap(), token);
    let again = client.acquire(numbered(2)).await.unwrap_err();
    assert_eq!(
        (again.code(), reason(&again).as_str()),
        (Code::AlreadyExists, "ALREADY_CONTENDING")
    );

    let name = "l".to_owned();
    let cancel = v1::CancelRequest {
        name,
        session_id: session,
        owner: String::new(),
        request: 1,
        attachment: 0,
    };
    client.locks().cancel(cancel).await.unwrap();
    assert!(!check(&client, "l", token).await);
    assert_eq!(client.acquire(numbered(1)).await.unwrap(), token);
    let mut after = numbered(4);
    after.number.as_mut().unwrap().acknowledged = 3;
    let second = client.acquire(after).await.unwrap();
    for request in [1, 3] {
        let stale = client.acquire(numbered(request)).await.unwrap_err();
        assert_eq!(reason(&stale), "STALE_REQUEST");
    }
    let release = |request| v1::ReleaseRequest {
        name: "l".to_owned(),
        session_id: session,
        token: second,
        number: number(request),
        ..v1::ReleaseRequest::default()
    };
    for _ in 0..2 {
        client.locks().release(release(5)).await.unwrap();
    }
    let other = client.locks().release(release(4)).await.unwrap_err();
    assert_eq!(reason(&other), "INVALID_ARGUMENT");
}

#[tokio::test]
async fn a_session_is_opened_once_for_a_secret() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut sessions = client.sessions();
    let opened = sessions
        .open(open_with(&[1; 16]))
        .await
        .unwrap()
        .into_inner();
    let session = opened.session_id;
    let again = sessions
        .open(open_with(&[1; 16]))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again.session_id, session);
    let invalid = sessions.open(open_with(&[1; 15])).await.unwrap_err();
    assert_eq!(reason(&invalid), "INVALID_ARGUMENT");
}

fn open_with(secret: &'static [u8]) -> v1::OpenSessionRequest {
    v1::OpenSessionRequest {
        secret: Bytes::from_static(secret),
        ..v1::OpenSessionRequest::default()
    }
}

#[tokio::test]
async fn a_client_that_was_started_again_attaches_and_the_one_before_is_fenced() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut sessions = client.sessions();
    let opened = sessions
        .open(open_with(&[1; 16]))
        .await
        .unwrap()
        .into_inner();
    let session = opened.session_id;
    let token = client.acquire(acquire("l", session, None)).await.unwrap();

    let other = client.open("").await;
    client.acquire(acquire("m", other, None)).await.unwrap();
    let waiting = |request: u64| {
        let client = client.clone();
        let owner = request.to_string();
        tokio::spawn(async move {
            client
                .acquire(v1::AcquireRequest {
                    number: number(request),
                    owner,
                    ..acquire("m", session, None)
                })
                .await
        })
    };
    let (wanted, unwanted) = (waiting(1), waiting(2));
    while list(&client, "m").await[0].waiters.len() < 2 {
        tokio::task::yield_now().await;
    }
    let mut watch = Watch::open(&client).await;
    watch.add(session).await;
    let (_, Event::Attached(attached)) = watch.next().await.unwrap() else {
        panic!("attached")
    };
    assert_eq!((attached.grants.len(), attached.places.len()), (1, 2));

    for (request, expected) in [
        (attach(session, &[2; 16], 1), "WRONG_SECRET"),
        (attach(session, &[1; 16], 9), "ATTACHMENT_CHANGED"),
    ] {
        let refused = sessions.attach(request).await.unwrap_err();
        assert_eq!(reason(&refused), expected);
    }
    let present = sessions.attach(attach(session, &[1; 16], 0)).await.unwrap();
    assert_eq!(present.into_inner().attachment, 1);
    for _ in 0..2 {
        let attached = sessions.attach(attach(session, &[1; 16], 1)).await.unwrap();
        let attached = attached.into_inner();
        assert_eq!((attached.attachment, attached.last_request), (2, 2));
        assert_eq!(attached.grants[0].token, token);
        let places: Vec<_> = attached.places.iter().map(|place| place.request).collect();
        assert_eq!(places, [1]);
    }
    let unwanted = unwanted.await.unwrap().unwrap_err();
    assert_eq!(reason(&unwanted), "CANCELLED");
    assert!(!wanted.is_finished());
    let (_, Event::Ended(ended)) = watch.next().await.unwrap() else {
        panic!("ended")
    };
    assert_eq!(
        (ended.reason(), ended.attachment),
        (LossReason::Superseded, 2)
    );
    only_the_second_attachment_is_served(&client, session).await;
    let ended = wanted.await.unwrap().unwrap_err();
    assert_eq!(reason(&ended), "SESSION_CLOSED");
}

fn attach(session: i64, secret: &'static [u8], replaces: u64) -> v1::AttachSessionRequest {
    v1::AttachSessionRequest {
        session_id: session,
        secret: Bytes::from_static(secret),
        replaces,
        nonce: 7,
        wanted: vec![1],
    }
}

/// Renews, asks for a lock, and closes the session, each for an older attachment first.
async fn only_the_second_attachment_is_served(client: &Client, session: i64) {
    let mut sessions = client.sessions();
    let renew = |attachment| v1::RenewSessionRequest {
        session_id: session,
        attachment,
    };
    let fenced = sessions.renew(renew(1)).await.unwrap_err();
    assert_eq!(reason(&fenced), "SESSION_SUPERSEDED");
    sessions.renew(renew(2)).await.unwrap();
    let fenced = client
        .acquire(acquire("n", session, None))
        .await
        .unwrap_err();
    assert_eq!(reason(&fenced), "SESSION_SUPERSEDED");
    let close = |attachment| v1::CloseSessionRequest {
        session_id: session,
        attachment,
    };
    let fenced = sessions.close(close(1)).await.unwrap_err();
    assert_eq!(reason(&fenced), "SESSION_SUPERSEDED");
    sessions.close(close(2)).await.unwrap();
}

fn number(request: u64) -> Option<v1::RequestNumber> {
    Some(v1::RequestNumber {
        request,
        ..v1::RequestNumber::default()
    })
}

#[tokio::test]
async fn a_call_without_a_number_is_withdrawn_when_it_is_dropped() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (one, two) = (client.open("").await, client.open("").await);
    let token = client.acquire(acquire("l", one, None)).await.unwrap();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.acquire(acquire("l", two, None)).await }
    });
    while list(&client, "l").await[0].waiters.is_empty() {
        tokio::task::yield_now().await;
    }
    waiting.abort();
    while !list(&client, "l").await[0].waiters.is_empty() {
        tokio::task::yield_now().await;
    }
    release(&client, "l", one, token).await.unwrap();
    assert_eq!(list(&client, "l").await, []);
}

#[tokio::test]
async fn a_watcher_is_told_what_it_holds_what_it_loses_and_when_it_is_over() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let session = client.open("").await;
    let token = client.acquire(acquire("l", session, None)).await.unwrap();
    let mut watch = Watch::open(&client).await;
    watch.add(session).await;
    let (told, Event::Attached(attached)) = watch.next().await.unwrap() else {
        panic!("attached")
    };
    assert_eq!(
        (told, attached.grants.len(), attached.grants[0].token),
        (session, 1, token)
    );

    let name = "l".to_owned();
    let force = v1::ForceReleaseRequest {
        name,
        reason: "stuck".to_owned(),
        ..Default::default()
    };
    let forced = client
        .locks()
        .force_release(force)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(forced.released.unwrap().token, token);
    let (_, Event::GrantLost(lost)) = watch.next().await.unwrap() else {
        panic!("lost")
    };
    assert_eq!(
        (lost.reason(), lost.detail.as_str()),
        (LossReason::Forced, "stuck")
    );
    assert_eq!(lost.grant.unwrap().token, token);
    let stale = release(&client, "l", session, token).await.unwrap_err();
    assert!(stale.message().contains("stuck"), "{stale}");

    let mut late = Watch::open(&client).await;
    late.add(session).await;
    let (_, Event::Attached(attached)) = late.next().await.unwrap() else {
        panic!("attached")
    };
    assert_eq!(
        (attached.grants.len(), attached.forced[0].detail.as_str()),
        (0, "stuck")
    );

    client
        .sessions()
        .close(v1::CloseSessionRequest {
            session_id: session,
            attachment: 0,
        })
        .await
        .unwrap();
    for watch in [&mut watch, &mut late] {
        let (_, Event::Ended(ended)) = watch.next().await.unwrap() else {
            panic!("ended")
        };
        assert_eq!(ended.reason(), LossReason::SessionClosed);
    }
    let renewed = client
        .sessions()
        .renew(v1::RenewSessionRequest {
            session_id: session,
            attachment: 0,
        })
        .await;
    assert_eq!(reason(&renewed.unwrap_err()), "SESSION_CLOSED");
}

#[tokio::test]
async fn a_session_that_was_over_before_it_was_watched_leaves_nothing_behind() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let session = client.open("").await;
    let mut watch = Watch::open(&client).await;
    watch.add(session).await;
    let watched = || get(node.client(), "/metrics").1;
    let (_, Event::Attached(_)) = watch.next().await.unwrap() else {
        panic!("attached")
    };
    assert!(watched().contains("\nconclave_watched_sessions 1\n"));
    watch.add(session + 1).await;
    let (_, Event::Ended(_)) = watch.next().await.unwrap() else {
        panic!("ended")
    };
    assert!(watched().contains("\nconclave_watched_sessions 1\n"));
}

#[tokio::test]
async fn a_session_that_is_not_renewed_expires_and_one_that_is_does_not() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let open = v1::OpenSessionRequest {
        ttl_ms: 500,
        ..Default::default()
    };
    let kept = client
        .sessions()
        .open(open.clone())
        .await
        .unwrap()
        .into_inner()
        .session_id;
    let left = client
        .sessions()
        .open(open)
        .await
        .unwrap()
        .into_inner()
        .session_id;
    let mut watch = Watch::open(&client).await;
    watch.add(left).await;
    let renewing = tokio::spawn({
        let mut sessions = client.sessions();
        async move {
            loop {
                sessions
                    .renew(v1::RenewSessionRequest {
                        session_id: kept,
                        attachment: 0,
                    })
                    .await
                    .unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    });
    loop {
        if let (_, Event::Ended(ended)) = watch.next().await.unwrap() {
            assert_eq!(ended.reason(), LossReason::SessionExpired);
            break;
        }
    }
    assert!(!renewing.is_finished());
    let listed = client
        .sessions()
        .list(v1::ListSessionsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let ids: Vec<i64> = listed
        .sessions
        .iter()
        .map(|session| session.session_id)
        .collect();
    assert_eq!(ids, [kept]);
    renewing.abort();
}

#[tokio::test]
async fn sessions_are_listed_in_pages() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut opened = Vec::new();
    for _ in 0..5 {
        opened.push(client.open("").await);
    }
    opened.sort_unstable();
    let mut listed = Vec::new();
    for (number, more) in [(2, true), (2, true), (1, false)] {
        let request = v1::ListSessionsRequest {
            limit: 2,
            after: listed.last().copied().unwrap_or(0),
        };
        let page = client.sessions().list(request).await.unwrap().into_inner();
        assert_eq!((page.sessions.len(), page.more), (number, more));
        listed.extend(page.sessions.iter().map(|session| session.session_id));
    }
    assert_eq!(listed, opened);
}

#[tokio::test]
async fn bad_input_is_refused_with_its_reason() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let session = client.open("").await;
    let long = "x".repeat(1_025);
    let numbered = v1::AcquireRequest {
        number: number(1 << 63),
        ..acquire("l", session, None)
    };
    let owner = v1::AcquireRequest {
        owner: "x".repeat(257),
        ..acquire("l", session, None)
    };
    for (request, expected) in [
        (acquire("", session, None), "INVALID_NAME"),
        (acquire(&long, session, None), "INVALID_NAME"),
        (acquire("_conclave/x", session, None), "INVALID_NAME"),
        (acquire("l", 0, None), "SESSION_NOT_FOUND"),
        (acquire("l", -5, None), "SESSION_NOT_FOUND"),
        (acquire("l", 12345, None), "SESSION_NOT_FOUND"),
        (owner, "INVALID_OWNER"),
        (numbered, "INVALID_ARGUMENT"),
    ] {
        let shown = format!("{request:?}");
        assert_eq!(
            reason(&client.acquire(request).await.unwrap_err()),
            expected,
            "{shown}"
        );
    }
    for ttl_ms in [1, 499, 86_400_001, u64::MAX] {
        let open = v1::OpenSessionRequest {
            ttl_ms,
            ..Default::default()
        };
        assert_eq!(
            reason(&client.sessions().open(open).await.unwrap_err()),
            "INVALID_TTL"
        );
    }
    let force = v1::ForceReleaseRequest {
        name: "l".to_owned(),
        ..Default::default()
    };
    assert_eq!(
        reason(
            &client
                .locks()
                .force_release(force.clone())
                .await
                .unwrap_err()
        ),
        "INVALID_REASON"
    );
    let force = v1::ForceReleaseRequest {
        reason: "why".to_owned(),
        ..force
    };
    assert_eq!(
        reason(&client.locks().force_release(force).await.unwrap_err()),
        "NOT_HELD"
    );
    let huge = acquire(&"x".repeat(4 << 20), session, None);
    assert_eq!(
        client.acquire(huge).await.unwrap_err().code(),
        Code::OutOfRange
    );
    client.acquire(acquire("l", session, None)).await.unwrap();
}

#[tokio::test]
async fn garbage_on_both_ports_harms_nobody() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let zeros = vec![0; 100_000];
    let noise: Vec<u8> = (0..100_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let framed = [&preface[..], &noise].concat();
    for address in [node.client(), node.addresses.peers[0]] {
        for bytes in [
            &zeros[..],
            &noise,
            &framed,
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\x02\x00",
        ] {
            tokio::task::spawn_blocking({
                let bytes = bytes.to_vec();
                move || exchange(address, &bytes)
            })
            .await
            .unwrap();
        }
    }
    let client = node.connect().await;
    let session = client.open("").await;
    client.acquire(acquire("l", session, None)).await.unwrap();
}

#[test]
fn people_and_probes_are_answered_over_http_1() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    for address in [node.client(), node.addresses.metrics[0]] {
        assert_eq!(
            get(address, "/health"),
            (200, r#"{"health":"true","reason":""}"#.to_owned())
        );
        assert_eq!(get(address, "/livez").0, 200);
        assert_eq!(get(address, "/readyz").0, 200);
        let version = get(address, "/version").1;
        assert!(version.contains(env!("CARGO_PKG_VERSION")));
        assert!(version.contains(r#""etcdserver":"3.6.0""#));
        let (status, metrics) = get(address, "/metrics");
        assert_eq!(status, 200);
        assert!(metrics.contains("\nconclave_is_leader 1\n"), "{metrics}");
        assert_eq!(get(address, "/nothing").0, 404);
    }
}

#[tokio::test]
async fn health_and_reflection_are_served() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let service = "conclave.v1.Lock".to_owned();
    let mut health = HealthClient::new(client.channel.clone());
    let mut watch = health
        .watch(HealthCheckRequest { service })
        .await
        .unwrap()
        .into_inner();
    while watch.message().await.unwrap().unwrap().status() as i32 != 1 {}

    let mut reflection = ServerReflectionClient::new(client.channel.clone());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = reflection
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else {
        panic!("a list of services");
    };
    let names: Vec<String> = services
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for name in [
        "conclave.v1.Session",
        "conclave.v1.Lock",
        "conclave.v1.Cluster",
    ] {
        assert!(names.contains(&name.to_owned()), "{names:?}");
    }
    assert!(
        names.iter().all(|name| !name.contains("internal")),
        "{names:?}"
    );
}

#[tokio::test]
async fn what_was_granted_is_there_after_a_restart() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let session = client.open("worker").await;
    let token = client.acquire(acquire("l", session, None)).await.unwrap();
    node.stop().unwrap();

    let node = Node::alone(&directory);
    let client = node.connect().await;
    assert!(check(&client, "l", token).await);
    let status = client
        .cluster()
        .status(v1::StatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (status.role.as_str(), status.sessions, status.keys),
        ("leader", 1, 1)
    );
    assert_eq!(status.members.len(), 1);
    assert!(status.log_bytes > 0);
}

#[tokio::test]
async fn a_start_goes_on_from_the_newest_checkpoint_that_is_whole() {
    let directory = Directory::new();
    let options = Options {
        snapshot_count: 5,
        ..alone(&directory)
    };
    let start = || {
        let node = Node::start(&options).unwrap();
        node.await_ready();
        node
    };
    let node = start();
    let client = node.connect().await;
    let session = client.open("worker").await;
    let token = client.acquire(acquire("l", session, None)).await.unwrap();
    let checkpoints = directory.0.join("alone/checkpoints");
    let stored = || {
        let mut stored: Vec<_> = std::fs::read_dir(&checkpoints)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        stored.sort();
        stored
    };
    let deadline = Instant::now() + PATIENCE;
    while stored().len() < 2 {
        assert!(Instant::now() < deadline, "no checkpoints: {:?}", stored());
        let other = client.acquire(acquire("m", session, None)).await.unwrap();
        release(&client, "m", session, other).await.unwrap();
    }
    node.stop().unwrap();

    // The newest one loses its records; then all are gone, and the log is whole.
    let newest = stored().pop().unwrap();
    std::fs::remove_dir_all(newest.join("keyspaces")).unwrap();
    for _ in 0..2 {
        let node = start();
        let client = node.connect().await;
        assert!(check(&client, "l", token).await);
        node.stop().unwrap();
        std::fs::remove_dir_all(&checkpoints).unwrap();
    }
}

#[tokio::test]
async fn a_server_that_stops_answers_those_who_wait() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (one, two) = (client.open("").await, client.open("").await);
    client.acquire(acquire("l", one, None)).await.unwrap();
    let mut watch = Watch::open(&client).await;
    watch.add(one).await;
    watch.next().await.unwrap();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.acquire(acquire("l", two, None)).await }
    });
    while list(&client, "l").await[0].waiters.is_empty() {
        tokio::task::yield_now().await;
    }
    node.request_stop();
    let refused = timeout(PATIENCE, waiting)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::Unavailable, "OUTCOME_UNKNOWN")
    );
    let ended = watch.next().await.unwrap_err();
    assert_eq!(reason(&ended), "SHUTTING_DOWN");
    node.stop().unwrap();
}

#[test]
fn trouble_at_the_start_is_told_apart() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let start = |options: &Options| Node::start(options).map(|_| ()).unwrap_err();
    let elsewhere = Directory::new();
    let taken = Options {
        listen_client_urls: vec![format!("http://{}", node.client())],
        ..alone(&elsewhere)
    };
    assert!(matches!(
        start(&taken),
        ServerError::Bind(BindError::InUse { .. })
    ));
    let in_use = start(&alone(&directory));
    assert!(
        matches!(in_use, ServerError::Storage(StorageError::InUse { .. })),
        "{in_use}"
    );
    node.stop().unwrap();

    let other_token = Options {
        initial_cluster_token: "other".to_owned(),
        ..alone(&directory)
    };
    let other = start(&other_token);
    assert!(
        matches!(
            other,
            ServerError::Storage(StorageError::OtherCluster { .. })
        ),
        "{other}"
    );
    let grown = Options {
        initial_cluster: vec![
            "default=http://127.0.0.1:1".to_owned(),
            "more=http://127.0.0.1:2".to_owned(),
        ],
        ..alone(&directory)
    };
    let grown = start(&grown);
    assert!(
        matches!(
            grown,
            ServerError::Storage(StorageError::MembersChanged { .. })
        ),
        "{grown}"
    );
    let nobody = Options {
        name: "nobody".to_owned(),
        ..taken
    };
    let nobody = Options {
        initial_cluster: vec!["a=http://h:1".to_owned()],
        ..nobody
    };
    assert!(matches!(
        start(&nobody),
        ServerError::Options(OptionsError::NotInCluster { .. })
    ));
    eventually("the directory is free", || {
        Node::start(&alone(&directory)).is_ok()
    });
}

#[tokio::test]
async fn history_is_compacted_on_request_and_only_once() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let session = client.open("s").await;
    let token = client.acquire(acquire("l", session, None)).await.unwrap();
    let compact = async |revision| {
        let request = v1::CompactRequest { revision };
        client.cluster().compact(request).await
    };
    let future = compact(token + 1).await.unwrap_err();
    assert_eq!(reason(&future), "REVISION_FUTURE");
    compact(token).await.unwrap();
    let again = compact(token).await.unwrap_err();
    assert_eq!(reason(&again), "REVISION_COMPACTED");
    assert!(check(&client, "l", token).await);
    let status = client.cluster().status(v1::StatusRequest {}).await;
    assert_eq!(status.unwrap().into_inner().compacted_revision, token);
}

#[tokio::test]
async fn at_the_quota_nothing_grows_until_the_alarm_is_cleared() {
    let directory = Directory::new();
    let node = Node::start(&Options {
        quota_backend_bytes: 2_000,
        ..alone(&directory)
    })
    .unwrap();
    let client = node.connect().await;
    let first = client.open("first").await;
    let token = client.acquire(acquire("l", first, None)).await.unwrap();
    let others = [client.open("second").await, client.open("third").await];
    let alarmed = || {
        get(node.client(), "/metrics")
            .1
            .contains("conclave_alarm_nospace 1")
    };
    eventually("the alarm", alarmed);
    let refused = client.acquire(acquire("m", first, None)).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused)),
        (Code::ResourceExhausted, "NO_SPACE".to_owned())
    );
    release(&client, "l", first, token).await.unwrap();
    for session_id in others {
        let request = v1::CloseSessionRequest {
            session_id,
            attachment: 0,
        };
        client.sessions().close(request).await.unwrap();
    }
    let status = client.cluster().status(v1::StatusRequest {}).await;
    assert_eq!(status.unwrap().into_inner().alarms, ["NOSPACE"]);
    client.cluster().disarm(v1::DisarmRequest {}).await.unwrap();
    client.acquire(acquire("m", first, None)).await.unwrap();
}
