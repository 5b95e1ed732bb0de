//! `etcdserverpb.Lease` over real sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use conclave_proto::{
    etcd::etcdserverpb::{
        LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
        LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
        PutRequest, RangeRequest, kv_client::KvClient, lease_client::LeaseClient,
    },
    v1,
};
use harness::{Client, Directory, Node, PATIENCE, acquire, eventually, reason, three};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming, transport::Channel};

fn leases(client: &Client) -> LeaseClient<Channel> {
    LeaseClient::new(client.channel.clone())
}

async fn grant(client: &Client, id: i64, ttl: i64) -> Result<LeaseGrantResponse, Status> {
    let request = LeaseGrantRequest { ttl, id };
    let granted = leases(client).lease_grant(request).await?;
    Ok(granted.into_inner())
}

async fn revoke(client: &Client, id: i64) -> Result<i64, Status> {
    let revoked = leases(client)
        .lease_revoke(LeaseRevokeRequest { id })
        .await?;
    Ok(revoked.into_inner().header.unwrap().revision)
}

async fn life(client: &Client, id: i64) -> LeaseTimeToLiveResponse {
    let request = LeaseTimeToLiveRequest { id, keys: true };
    let life = leases(client).lease_time_to_live(request).await;
    life.unwrap().into_inner()
}

async fn put(client: &Client, key: &str, lease: i64) -> i64 {
    let request = PutRequest {
        key: key.to_owned().into(),
        lease,
        ..PutRequest::default()
    };
    let mut kv = KvClient::new(client.channel.clone());
    let put = kv.put(request).await.unwrap().into_inner();
    put.header.unwrap().revision
}

async fn count(client: &Client) -> i64 {
    let request = RangeRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        ..RangeRequest::default()
    };
    let mut kv = KvClient::new(client.channel.clone());
    kv.range(request).await.unwrap().into_inner().count
}

struct KeepAlive {
    ask: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: Streaming<LeaseKeepAliveResponse>,
}

impl KeepAlive {
    async fn open(client: &Client) -> Self {
        let (ask, asked) = mpsc::channel(1_000);
        let stream = ReceiverStream::new(asked);
        let answers = leases(client).lease_keep_alive(stream).await.unwrap();
        let answers = answers.into_inner();
        Self { ask, answers }
    }

    async fn next(&mut self) -> Option<Result<LeaseKeepAliveResponse, Status>> {
        let next = timeout(PATIENCE, self.answers.message());
        next.await.unwrap().transpose()
    }

    /// Id and TTL of the next answer.
    async fn told(&mut self) -> (i64, i64) {
        let answer = self.next().await.unwrap().unwrap();
        assert!(answer.header.unwrap().revision > 0);
        (answer.id, answer.ttl)
    }

    fn ask(&self, id: i64) {
        self.ask.try_send(LeaseKeepAliveRequest { id }).unwrap();
    }
}

#[tokio::test]
async fn leases_are_granted_with_ids_of_either_kind_and_refused_in_etcds_words() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let made = grant(&client, 0, 60).await.unwrap();
    assert!(made.id > 0 && made.error.is_empty());
    assert_eq!((made.ttl, made.header.unwrap().revision), (60, 1));
    let chosen = grant(&client, -7, 1).await.unwrap();
    assert_eq!((chosen.id, chosen.ttl), (-7, 2));
    for (id, ttl, code, text) in [
        (-7, 9, Code::FailedPrecondition, "lease already exists"),
        (8, 9_000_000_001, Code::OutOfRange, "too large lease TTL"),
    ] {
        let refused = grant(&client, id, ttl).await.unwrap_err();
        assert_eq!(refused.code(), code);
        assert_eq!(refused.message(), format!("etcdserver: {text}"));
    }
    let longest = grant(&client, 8, 9_000_000_000).await.unwrap();
    assert_eq!(longest.ttl, 9_000_000_000);
    let all = leases(&client).lease_leases(LeaseLeasesRequest {}).await;
    let mut ids: Vec<i64> = all
        .unwrap()
        .into_inner()
        .leases
        .iter()
        .map(|l| l.id)
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, [-7, 8, made.id]);
}

#[tokio::test]
async fn a_revoked_lease_takes_its_keys_along() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let id = grant(&client, 0, 60).await.unwrap().id;
    put(&client, "b", id).await;
    let last = put(&client, "a", id).await;
    let lives = life(&client, id).await;
    assert_eq!((lives.id, lives.granted_ttl), (id, 60));
    assert!((58..=60).contains(&lives.ttl), "{lives:?}");
    assert_eq!(lives.keys, ["a", "b"]);
    assert_eq!(revoke(&client, id).await.unwrap(), last + 1);
    assert_eq!(count(&client).await, 0);
    for id in [id, 0] {
        let refused = revoke(&client, id).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound);
        assert_eq!(refused.message(), "etcdserver: requested lease not found");
        let gone = life(&client, id).await;
        assert_eq!((gone.id, gone.ttl, gone.granted_ttl), (id, -1, 0));
        assert!(gone.header.unwrap().revision > 0);
    }
}

#[tokio::test]
async fn a_stream_renews_in_order_and_says_of_what_is_gone_that_it_is() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let long = grant(&client, 0, 60).await.unwrap().id;
    let other = grant(&client, -9, 30).await.unwrap().id;
    let mut stream = KeepAlive::open(&client).await;
    let asked = [(long, 60), (77, 0), (other, 30), (0, 0), (long, 60)];
    for _ in 0..50 {
        asked.iter().for_each(|(id, _)| stream.ask(*id));
    }
    for _ in 0..50 {
        for expected in asked {
            assert_eq!(stream.told().await, expected);
        }
    }
    revoke(&client, other).await.unwrap();
    stream.ask(other);
    assert_eq!(stream.told().await, (other, 0));
    // A client that has no more requests gets the answers that are due, and the end.
    stream.ask(long);
    let KeepAlive { ask, answers } = stream;
    drop(ask);
    let mut stream = KeepAlive {
        ask: mpsc::channel(1).0,
        answers,
    };
    assert_eq!(stream.told().await, (long, 60));
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn a_lease_lives_by_renewals_and_expires_without_on_any_member() {
    let directory = Directory::new();
    let nodes: Vec<Node> = three(&directory)
        .iter()
        .map(|member| Node::start(member).unwrap())
        .collect();
    nodes.iter().for_each(Node::await_ready);
    let mut clients = vec![];
    for node in &nodes {
        clients.push(node.connect().await);
    }
    let id = grant(&clients[0], 0, 5).await.unwrap().id;
    put(&clients[1], "k", id).await;
    for client in clients.iter().cycle().take(6) {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        let mut stream = KeepAlive::open(client).await;
        stream.ask(id);
        assert_eq!(stream.told().await, (id, 5));
        let lives = life(client, id).await;
        assert_eq!((lives.granted_ttl, &lives.keys[..]), (5, &["k".into()][..]));
    }
    let until = tokio::time::Instant::now() + PATIENCE;
    while count(&clients[2]).await > 0 {
        assert!(tokio::time::Instant::now() < until);
    }
    for client in &clients {
        assert_eq!(life(client, id).await.ttl, -1);
        let mut stream = KeepAlive::open(client).await;
        stream.ask(id);
        assert_eq!(stream.told().await, (id, 0));
    }
}

#[tokio::test]
async fn native_sessions_are_leases() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let request = v1::OpenSessionRequest {
        ttl_ms: 700,
        ..Default::default()
    };
    let short = client.sessions().open(request).await.unwrap().into_inner();
    let mut stream = KeepAlive::open(&client).await;
    stream.ask(short.session_id);
    assert_eq!(stream.told().await, (short.session_id, 1));
    let session = client.open("mine").await;
    client.acquire(acquire("l", session, None)).await.unwrap();
    let lives = life(&client, session).await;
    assert_eq!(lives.granted_ttl, 60);
    assert_eq!(lives.keys, [format!("l/{session:x}")]);
    revoke(&client, session).await.unwrap();
    let refused = client.acquire(acquire("l", session, None)).await;
    assert_eq!(reason(&refused.unwrap_err()), "SESSION_REVOKED");
    // And the other way round, with an id that only an etcd client would have.
    let lease = grant(&client, -3, 60).await.unwrap().id;
    client.acquire(acquire("l", lease, None)).await.unwrap();
    assert_eq!(life(&client, lease).await.keys.len(), 1);
    let close = v1::CloseSessionRequest {
        session_id: lease,
        attachment: 0,
    };
    client.sessions().close(close).await.unwrap();
    assert_eq!(life(&client, lease).await.ttl, -1);
}

#[tokio::test]
async fn without_a_leader_a_stream_that_needs_one_ends() {
    let directory = Directory::new();
    let mut nodes: Vec<Node> = three(&directory)
        .iter()
        .map(|member| Node::start(member).unwrap())
        .collect();
    nodes.iter().for_each(Node::await_ready);
    let left = nodes.pop().unwrap();
    let client = left.connect().await;
    let lease = grant(&client, 0, 60).await.unwrap().id;
    let (ask, asked) = mpsc::channel(8);
    let mut request = Request::new(ReceiverStream::new(asked));
    request
        .metadata_mut()
        .insert("hasleader", "true".parse().unwrap());
    let answers = leases(&client).lease_keep_alive(request).await.unwrap();
    let mut stream = KeepAlive {
        ask,
        answers: answers.into_inner(),
    };
    stream.ask(lease);
    assert_eq!(stream.told().await, (lease, 60));
    for node in nodes {
        node.stop().unwrap();
    }
    let ended = stream.next().await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable);
    assert_eq!(ended.message(), "etcdserver: no leader");
    eventually("the health is told", || {
        let (status, body) = harness::get(left.client(), "/health");
        status == 503 && body.contains("RAFT NO LEADER")
    });
}

#[tokio::test]
async fn a_server_that_stops_ends_streams() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let lease = grant(&client, 0, 60).await.unwrap().id;
    let mut stream = KeepAlive::open(&client).await;
    stream.ask(lease);
    assert_eq!(stream.told().await, (lease, 60));
    node.request_stop();
    let ended = stream.next().await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable);
    node.ended().unwrap();
}
