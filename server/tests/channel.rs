//! Many calls on one stream, against a real server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::{collections::BTreeSet, time::Duration};

use conclave_proto::{
    etcd::etcdserverpb::{WatchRequest, watch_client::WatchClient},
    v1::{self, call::Request, channel_client::ChannelClient, reply::Outcome},
};
use harness::{Client, Directory, Node, PATIENCE, acquire, get, reason};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// One stream of calls.
struct Stream {
    frames: Option<mpsc::Sender<v1::ClientFrame>>,
    replies: Streaming<v1::ServerFrame>,
    read: Vec<v1::Reply>,
}

impl Stream {
    async fn open(client: &Client) -> Stream {
        let (frames, receiver) = mpsc::channel(1);
        let replies = ChannelClient::new(client.channel.clone())
            .connect(ReceiverStream::new(receiver))
            .await
            .unwrap()
            .into_inner();
        Stream {
            frames: Some(frames),
            replies,
            read: Vec::new(),
        }
    }

    async fn send(&self, calls: impl IntoIterator<Item = (u64, Option<Request>)>) {
        let calls = calls
            .into_iter()
            .map(|(tag, request)| v1::Call { tag, request })
            .collect();
        let frames = self.frames.as_ref().unwrap();
        frames.send(v1::ClientFrame { calls }).await.unwrap();
    }

    /// The next answer, or `None` at the end of the stream.
    async fn next(&mut self) -> Option<(u64, Outcome)> {
        while self.read.is_empty() {
            let frame = timeout(PATIENCE, self.replies.message()).await;
            self.read = frame.expect("no answer came").unwrap()?.replies;
            assert!(!self.read.is_empty(), "an empty frame");
        }
        let reply = self.read.remove(0);
        Some((reply.tag, reply.outcome.unwrap()))
    }

    async fn call(&mut self, tag: u64, request: Request) -> Outcome {
        self.send([(tag, Some(request))]).await;
        let (answered, outcome) = self.next().await.unwrap();
        assert_eq!(answered, tag);
        outcome
    }

    async fn open_session(&mut self) -> i64 {
        let request = v1::OpenSessionRequest {
            ttl_ms: 60_000,
            ..Default::default()
        };
        let Outcome::OpenSession(opened) = self.call(1, Request::OpenSession(request)).await else {
            panic!("not opened");
        };
        opened.session_id
    }
}

fn granted(outcome: Outcome) -> u64 {
    let Outcome::AcquireLock(granted) = outcome else {
        panic!("not granted: {outcome:?}");
    };
    granted.token
}

fn refused(outcome: Outcome) -> (Code, String) {
    let Outcome::Error(error) = outcome else {
        panic!("not refused: {outcome:?}");
    };
    let code = Code::from(i32::try_from(error.code).unwrap());
    let status = Status::with_details(code, error.message, error.details);
    (code, reason(&status))
}

fn lock(session_id: i64) -> Option<Request> {
    Some(Request::AcquireLock(acquire("l", session_id, None)))
}

fn release(session_id: i64, token: u64) -> v1::ReleaseRequest {
    v1::ReleaseRequest {
        name: "l".to_owned(),
        session_id,
        token,
        ..Default::default()
    }
}

#[tokio::test]
async fn calls_of_one_stream_run_side_by_side_and_are_told_apart() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let (one, two) = (stream.open_session().await, stream.open_session().await);
    let renewal = v1::RenewSessionRequest {
        session_id: one,
        attachment: 0,
    };
    let renewed = stream.call(5, Request::RenewSession(renewal)).await;
    assert!(matches!(renewed, Outcome::RenewSession(renewed) if renewed.ttl_ms == 60_000));
    let first = granted(stream.call(6, lock(one).unwrap()).await);
    // In one frame, and the first has to wait for what the second does.
    let give_up = Request::ReleaseLock(release(one, first));
    stream.send([(7, lock(two)), (8, Some(give_up))]).await;
    let mut second = None;
    for _ in 0..2 {
        match stream.next().await.unwrap() {
            (7, outcome) => second = Some(granted(outcome)),
            (8, Outcome::ReleaseLock(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(second.unwrap() > first);
    let closing = v1::CloseSessionRequest {
        session_id: two,
        attachment: 0,
    };
    let closed = stream.call(9, Request::CloseSession(closing)).await;
    assert!(matches!(closed, Outcome::CloseSession(_)));
    node.stop().unwrap();
}

#[tokio::test]
async fn refusals_are_those_of_a_call_of_its_own_and_end_nothing() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let session = stream.open_session().await;
    let token = granted(stream.call(2, lock(session).unwrap()).await);
    let stale = stream
        .call(3, Request::ReleaseLock(release(session, token - 1)))
        .await;
    let alone = client.locks().release(release(session, token - 1)).await;
    let alone = alone.unwrap_err();
    assert_eq!(refused(stale), (alone.code(), reason(&alone)));
    let nameless = Request::AcquireLock(acquire("", session, None));
    let (code, reason) = refused(stream.call(4, nameless).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "INVALID_NAME")
    );
    stream.send([(5, None)]).await;
    let (tag, outcome) = stream.next().await.unwrap();
    assert_eq!((tag, refused(outcome).0), (5, Code::InvalidArgument));
    let given_up = Request::ReleaseLock(release(session, token));
    assert!(matches!(
        stream.call(6, given_up).await,
        Outcome::ReleaseLock(_)
    ));
    node.stop().unwrap();
}

#[tokio::test]
async fn what_is_under_way_at_the_end_of_the_requests_is_still_answered() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let (one, two) = (stream.open_session().await, stream.open_session().await);
    let first = granted(stream.call(3, lock(one).unwrap()).await);
    stream.send([(4, lock(two))]).await;
    stream.frames = None;
    client.locks().release(release(one, first)).await.unwrap();
    let (tag, outcome) = stream.next().await.unwrap();
    assert_eq!(tag, 4);
    granted(outcome);
    assert_eq!(stream.next().await, None);
    node.stop().unwrap();
}

#[tokio::test]
async fn a_stream_that_breaks_withdraws_calls_without_a_number() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let (one, two) = (stream.open_session().await, client.open("two").await);
    let first = granted(stream.call(3, lock(one).unwrap()).await);
    let numbered = v1::AcquireRequest {
        number: Some(v1::RequestNumber {
            request: 1,
            ..v1::RequestNumber::default()
        }),
        ..acquire("l", two, None)
    };
    let calls = [
        (4, lock(client.open("three").await)),
        (5, Some(Request::AcquireLock(numbered))),
    ];
    stream.send(calls).await;
    let waiters = async || {
        let request = v1::ListLocksRequest::default();
        let listed = client.locks().list(request).await.unwrap().into_inner();
        let waiters = &listed.locks[0].waiters;
        waiters
            .iter()
            .map(|waiter| waiter.session_id)
            .collect::<Vec<_>>()
    };
    while waiters().await.len() < 2 {
        tokio::task::yield_now().await;
    }
    drop(stream);
    let left = async {
        while waiters().await != [two] {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, left).await.expect("still two wait");
    client.locks().release(release(one, first)).await.unwrap();
    node.stop().unwrap();
}

#[tokio::test]
async fn a_server_that_stops_answers_what_is_under_way_and_ends_the_stream() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let (one, two) = (stream.open_session().await, stream.open_session().await);
    granted(stream.call(3, lock(one).unwrap()).await);
    stream.send([(4, lock(two))]).await;
    let renewal = v1::RenewSessionRequest {
        session_id: one,
        attachment: 0,
    };
    stream.call(5, Request::RenewSession(renewal)).await;
    node.request_stop();
    let (tag, outcome) = stream.next().await.unwrap();
    let (code, reason) = refused(outcome);
    assert_eq!(
        (tag, code, reason.as_str()),
        (4, Code::Unavailable, "OUTCOME_UNKNOWN")
    );
    assert_eq!(stream.next().await, None);
    node.stop().unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_is_not_read_and_then_gets_every_answer_once() {
    const FRAMES: u64 = 4_000;
    const CALLS: u64 = 256;
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let mut sent = 0;
    let sending = async {
        while sent < FRAMES * CALLS {
            stream
                .send((sent..sent + CALLS).map(|tag| (tag, None)))
                .await;
            sent += CALLS;
        }
    };
    // Long enough that only a window that is full can stop it.
    let stopped = timeout(Duration::from_secs(5), sending).await;
    assert!(stopped.is_err(), "{sent} calls were taken unread");
    stream.frames = None;
    let mut answered = BTreeSet::new();
    while let Some((tag, outcome)) = stream.next().await {
        assert_eq!(refused(outcome).0, Code::InvalidArgument);
        assert!(answered.insert(tag), "{tag} was answered twice");
    }
    // The frame at which the sending stopped may have left or not.
    let count = answered.len() as u64;
    assert!(count == sent || count == sent + CALLS, "{count} of {sent}");
    node.stop().unwrap();
}

#[tokio::test]
async fn a_client_that_sends_more_than_it_reads_is_read_no_faster_in_the_end() {
    const CALLS: u64 = 256;
    // What the server takes, and what windows and buffers hold.
    const UNREAD_MAX: u64 = 600_000;
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let (mut sent, mut read) = (0, 0);
    for _ in 0..20 {
        // As much as is taken, and then a few answers.
        let frame = |from| (from..from + CALLS).map(|tag| (tag, None));
        while let Ok(()) = timeout(Duration::from_millis(200), stream.send(frame(sent))).await {
            sent += CALLS;
            assert!(sent - read < UNREAD_MAX, "{sent} calls, {read} answers");
        }
        for _ in 0..4 * CALLS {
            stream.next().await.unwrap();
            read += 1;
        }
    }
    node.stop().unwrap();
}

/// Calls of one frame, and frames of one round: more than the 65,536 that may wait.
const CALLS: u64 = 20_000;
const FRAMES: u64 = 8;

/// Asks for a lock that another session holds in every call of a round; how many
/// were refused for being too many.
async fn flood(stream: &mut Stream, session: i64) -> usize {
    let try_now = || Some(Request::AcquireLock(acquire("l", session, Some(0))));
    let frames = stream.frames.clone().unwrap();
    let send = async move {
        for frame in 0..FRAMES {
            let tags = frame * CALLS..(frame + 1) * CALLS;
            let calls = tags.map(|tag| v1::Call {
                tag,
                request: try_now(),
            });
            let calls = calls.collect();
            frames.send(v1::ClientFrame { calls }).await.unwrap();
        }
    };
    let hear = async {
        let mut answered = BTreeSet::new();
        let mut overloaded = 0;
        for _ in 0..FRAMES * CALLS {
            let (tag, outcome) = stream.next().await.unwrap();
            assert!(answered.insert(tag), "{tag} was answered twice");
            match refused(outcome) {
                (Code::ResourceExhausted, reason) if reason == "OVERLOADED" => overloaded += 1,
                (_, reason) => assert_eq!(reason, "LOCK_HELD"),
            }
        }
        overloaded
    };
    tokio::join!(send, hear).1
}

#[tokio::test]
async fn more_calls_than_may_wait_are_told_to_come_again() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut stream = Stream::open(&client).await;
    let (one, two) = (stream.open_session().await, stream.open_session().await);
    let token = granted(stream.call(1, lock(one).unwrap()).await);
    // A machine with many processors may keep up for a while.
    let mut overloaded = 0;
    for _ in 0..20 {
        overloaded += flood(&mut stream, two).await;
        if overloaded > 0 {
            break;
        }
    }
    assert!(overloaded > 0, "every call was taken");
    let again = Request::AcquireLock(acquire("l", two, Some(0)));
    assert_eq!(refused(stream.call(2, again).await).1, "LOCK_HELD");
    let given_up = Request::ReleaseLock(release(one, token));
    let released = stream.call(3, given_up).await;
    assert!(matches!(released, Outcome::ReleaseLock(_)));
    node.stop().unwrap();
}

/// Streams, of every service that has some.
const STREAMS: [&str; 4] = [
    "Channel/Connect",
    "Session/Watch",
    "Election/Observe",
    "etcdserverpb.Watch/Watch",
];

/// Whether so many of each kind are open, and so many have ended, in whatever way.
fn counts(node: &Node, open: u64, ended: u64) -> bool {
    let page = get(node.client(), "/metrics").1;
    STREAMS.iter().all(|method| {
        let now = format!("conclave_requests_in_flight{{method=\"{method}\"}} {open}\n");
        let over = format!("conclave_requests_total{{method=\"{method}\",");
        let over = page.lines().filter_map(|line| line.strip_prefix(&over));
        let over = over.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
        page.contains(&now) && over.sum::<u64>() == ended
    })
}

#[tokio::test]
async fn streams_of_every_service_count_until_they_end() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let channel = Stream::open(&client).await;
    let (follow, receiver) = mpsc::channel::<v1::WatchSessionsRequest>(1);
    let sessions = client.sessions().watch(ReceiverStream::new(receiver)).await;
    let observe = v1::ObserveRequest {
        name: "db".to_owned(),
        ..Default::default()
    };
    let election = client.elections().observe(observe).await;
    let (create, receiver) = mpsc::channel::<WatchRequest>(1);
    let mut keys = WatchClient::new(client.channel.clone());
    let keys = keys.watch(ReceiverStream::new(receiver)).await;
    assert!(counts(&node, 1, 0));

    drop((channel, follow, sessions.unwrap(), election.unwrap()));
    drop((create, keys.unwrap()));
    let ended = async {
        while !counts(&node, 0, 1) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, ended).await.expect("they do not end");
}
