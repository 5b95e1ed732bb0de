//! etcd's services for locks and elections, against a real server, and together with
//! native clients and those that write keys themselves.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::time::Duration;

use bytes::Bytes;
use conclave_proto::{
    etcd::{
        etcdserverpb::{
            LeaseTimeToLiveRequest, PutRequest, RangeRequest, kv_client::KvClient,
            lease_client::LeaseClient,
        },
        mvccpb::KeyValue,
        v3electionpb::{
            CampaignRequest, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
            ResignRequest, election_client::ElectionClient,
        },
        v3lockpb::{LockRequest, UnlockRequest, lock_client::LockClient},
    },
    v1,
};
use harness::{Client, Directory, Node, PATIENCE, acquire};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::{Code, Status, Streaming, transport::Channel};

fn locks(client: &Client) -> LockClient<Channel> {
    LockClient::new(client.channel.clone())
}

fn elections(client: &Client) -> ElectionClient<Channel> {
    ElectionClient::new(client.channel.clone())
}

async fn lock(client: &Client, name: &'static str, lease: i64) -> Result<Bytes, Status> {
    let name = name.into();
    let call = timeout(PATIENCE, async {
        locks(client).lock(LockRequest { name, lease }).await
    });
    Ok(call
        .await
        .expect("neither granted nor refused")?
        .into_inner()
        .key)
}

fn waiting_lock(client: &Client, lease: i64) -> JoinHandle<Result<Bytes, Status>> {
    let client = client.clone();
    tokio::spawn(async move { lock(&client, "l", lease).await })
}

async fn unlock(client: &Client, key: Bytes) -> Result<(), Status> {
    locks(client).unlock(UnlockRequest { key }).await.map(drop)
}

/// The keys of the queue of a name, in the order in which they came.
async fn queue(client: &Client, name: &str) -> Vec<KeyValue> {
    let request = RangeRequest {
        key: format!("{name}/").into(),
        range_end: format!("{name}0").into(),
        ..RangeRequest::default()
    };
    let answer = KvClient::new(client.channel.clone()).range(request).await;
    let mut keys = answer.unwrap().into_inner().kvs;
    keys.sort_by_key(|key| key.create_revision);
    keys
}

async fn until_queued(client: &Client, name: &str, count: usize) {
    let wait = async {
        while queue(client, name).await.len() != count {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .expect("the queue never has this length");
}

async fn put(client: &Client, key: &str, value: &'static str, lease: i64) {
    let request = PutRequest {
        key: key.to_owned().into(),
        value: value.into(),
        lease,
        ..PutRequest::default()
    };
    KvClient::new(client.channel.clone())
        .put(request)
        .await
        .unwrap();
}

async fn close(client: &Client, session_id: i64) {
    let request = v1::CloseSessionRequest {
        session_id,
        attachment: 0,
    };
    client.sessions().close(request).await.unwrap();
}

fn told(status: Status) -> (Code, String) {
    (status.code(), status.message().to_owned())
}

fn unknown(text: &str) -> (Code, String) {
    (Code::Unknown, text.to_owned())
}

#[tokio::test]
async fn a_lock_is_a_key_without_value_and_the_same_for_the_same_lease() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (a, b) = (client.open("a").await, client.open("b").await);
    let key = lock(&client, "l", a).await.unwrap();
    assert_eq!(key, format!("l/{a:x}"));
    assert_eq!(
        lock(&client, "l", a).await.unwrap(),
        key,
        "it has it already"
    );
    let keys = queue(&client, "l").await;
    assert_eq!(
        (keys.len(), keys[0].lease, &keys[0].value[..]),
        (1, a, &b""[..])
    );
    let (one, two) = (waiting_lock(&client, b), waiting_lock(&client, b));
    until_queued(&client, "l", 2).await;
    unlock(&client, key.clone()).await.unwrap();
    let (one, two) = (one.await.unwrap().unwrap(), two.await.unwrap().unwrap());
    assert_eq!(
        (&one, &two),
        (&format!("l/{b:x}").into(), &format!("l/{b:x}").into())
    );
    unlock(&client, key).await.unwrap();
    assert_eq!(
        told(unlock(&client, Bytes::new()).await.unwrap_err()),
        unknown("etcdserver: key is not provided")
    );
    assert_eq!(
        told(lock(&client, "l", 77).await.unwrap_err()),
        unknown("etcdserver: requested lease not found")
    );
}

#[tokio::test]
async fn whoever_came_first_holds_however_it_came() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut sessions = Vec::new();
    for name in ["a", "b", "c", "d"] {
        sessions.push(client.open(name).await);
    }
    let native = client.clone();
    let [a, b, c, d] = sessions[..] else { panic!() };
    // By the native API, by a client that writes its key, by the lock service.
    let first = client.acquire(acquire("l", a, None)).await.unwrap();
    put(&client, &format!("l/{b:x}"), "", b).await;
    let third = waiting_lock(&client, c);
    until_queued(&client, "l", 3).await;
    let fourth = tokio::spawn(async move { native.acquire(acquire("l", d, None)).await });
    until_queued(&client, "l", 4).await;
    let release = v1::ReleaseRequest {
        name: "l".to_owned(),
        session_id: a,
        token: first,
        ..v1::ReleaseRequest::default()
    };
    client.locks().release(release).await.unwrap();
    let info = client
        .locks()
        .list(v1::ListLocksRequest {
            name: "l".to_owned(),
            ..v1::ListLocksRequest::default()
        })
        .await
        .unwrap()
        .into_inner();
    let lock = &info.locks[0];
    assert_eq!(lock.holder.as_ref().unwrap().session_id, b);
    let waiters: Vec<i64> = lock
        .waiters
        .iter()
        .map(|waiter| waiter.session_id)
        .collect();
    assert_eq!(waiters, [c, d]);
    assert!(!third.is_finished() && !fourth.is_finished());
    unlock(&client, format!("l/{b:x}").into()).await.unwrap();
    let key = third.await.unwrap().unwrap();
    assert!(!fourth.is_finished());
    unlock(&client, key).await.unwrap();
    fourth.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_call_that_is_gone_leaves_no_key_and_a_lease_that_is_dead_gets_none() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (a, b) = (client.open("a").await, client.open("b").await);
    let key = lock(&client, "l", a).await.unwrap();
    // With a lease, and with one of its own.
    for lease in [b, 0] {
        let waiting = waiting_lock(&client, lease);
        until_queued(&client, "l", 2).await;
        waiting.abort();
        until_queued(&client, "l", 1).await;
    }
    // The lease of the call went with it.
    let until = async {
        loop {
            let listed = client
                .sessions()
                .list(v1::ListSessionsRequest::default())
                .await;
            if listed.unwrap().into_inner().sessions.len() == 2 {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, until).await.expect("a lease is left");
    let waiting = waiting_lock(&client, b);
    until_queued(&client, "l", 2).await;
    close(&client, b).await;
    assert_eq!(
        told(waiting.await.unwrap().unwrap_err()),
        unknown("mutex: session is expired")
    );
    let free = waiting_lock(&client, 0);
    until_queued(&client, "l", 2).await;
    unlock(&client, key).await.unwrap();
    let key = free.await.unwrap().unwrap();
    let keys = queue(&client, "l").await;
    assert_eq!((keys.len(), &keys[0].key), (1, &key));
    assert_eq!(key, format!("l/{:x}", keys[0].lease));
}

async fn campaign(client: &Client, lease: i64, value: &'static str) -> Result<LeaderKey, Status> {
    let request = CampaignRequest {
        name: "e".into(),
        lease,
        value: value.into(),
    };
    let call = timeout(PATIENCE, async {
        elections(client).campaign(request).await
    });
    let answer = call.await.expect("neither elected nor refused")?;
    Ok(answer.into_inner().leader.unwrap())
}

async fn proclaim(client: &Client, leader: LeaderKey, value: &'static str) -> Result<(), Status> {
    let request = ProclaimRequest {
        leader: Some(leader),
        value: value.into(),
    };
    elections(client).proclaim(request).await.map(drop)
}

async fn resign(client: &Client, leader: LeaderKey) {
    let leader = Some(leader);
    elections(client)
        .resign(ResignRequest { leader })
        .await
        .unwrap();
}

async fn leader(client: &Client) -> Result<KeyValue, Status> {
    let request = LeaderRequest { name: "e".into() };
    let answer = elections(client).leader(request).await?;
    Ok(answer.into_inner().kv.unwrap())
}

async fn next(stream: &mut Streaming<LeaderResponse>) -> (Bytes, Bytes) {
    let message = timeout(PATIENCE, stream.message()).await;
    let told = message.expect("nothing is told").unwrap().unwrap();
    let kv = told.kv.unwrap();
    (kv.key, kv.value)
}

#[tokio::test]
async fn an_election_has_the_forms_of_etcd() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (a, b) = (client.open("a").await, client.open("b").await);
    assert_eq!(
        told(leader(&client).await.unwrap_err()),
        unknown("election: no leader")
    );
    let request = LeaderRequest { name: "e".into() };
    let mut seen = elections(&client)
        .observe(request)
        .await
        .unwrap()
        .into_inner();
    let first = campaign(&client, a, "1").await.unwrap();
    assert_eq!((&first.name[..], first.lease), (&b"e"[..], a));
    assert_eq!(first.key, format!("e/{a:x}"));
    // The same lease is the same candidate, who says something else.
    assert_eq!(campaign(&client, a, "2").await.unwrap(), first);
    let now = leader(&client).await.unwrap();
    assert_eq!(
        (&now.value[..], now.create_revision, now.version),
        (&b"2"[..], first.rev, 2)
    );
    let other = client.clone();
    let second = tokio::spawn(async move { campaign(&other, b, "b1").await });
    until_queued(&client, "e", 2).await;
    proclaim(&client, first.clone(), "3").await.unwrap();
    let stale = LeaderKey {
        rev: first.rev + 1,
        ..first.clone()
    };
    let refused = proclaim(&client, stale.clone(), "4").await.unwrap_err();
    assert_eq!(told(refused), unknown("election: not leader"));
    resign(&client, stale).await;
    assert!(!second.is_finished());
    resign(&client, first.clone()).await;
    resign(&client, first).await;
    let second = second.await.unwrap().unwrap();
    resign(&client, second).await;
    let third = campaign(&client, 0, "c").await.unwrap();
    let (a, b) = (format!("e/{a:x}"), format!("e/{b:x}"));
    for (key, value) in [(&a, "1"), (&a, "2"), (&a, "3"), (&b, "b1")] {
        assert_eq!(next(&mut seen).await, (key.clone().into(), value.into()));
    }
    assert_eq!(next(&mut seen).await, (third.key, "c".into()));
    let nobody = ProclaimRequest::default();
    assert_eq!(
        told(elections(&client).proclaim(nobody).await.unwrap_err()),
        unknown("\"leader\" field must be provided")
    );
}

#[tokio::test]
async fn native_candidates_and_those_of_etcd_are_in_one_election() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (a, b) = (client.open("a").await, client.open("b").await);
    let first = campaign(&client, a, "etcd").await.unwrap();
    let native = client.clone();
    let request = v1::CampaignRequest {
        name: "e".to_owned(),
        session_id: b,
        value: "native".into(),
        ..v1::CampaignRequest::default()
    };
    let waiting = tokio::spawn(async move { native.elections().campaign(request).await });
    until_queued(&client, "e", 2).await;
    let observe = v1::ObserveRequest {
        name: "e".to_owned(),
        after_revision: 0,
    };
    let mut seen = client
        .elections()
        .observe(observe)
        .await
        .unwrap()
        .into_inner();
    resign(&client, first.clone()).await;
    let term = waiting.await.unwrap().unwrap().into_inner().term;
    assert_eq!(leader(&client).await.unwrap().value, "native");
    // A lease that is given has one role in a name.
    let lock = LockRequest {
        name: "e".into(),
        lease: b,
    };
    let refused = locks(&client).lock(lock).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unknown);
    let resign = v1::ResignRequest {
        name: "e".to_owned(),
        session_id: b,
        term,
        ..v1::ResignRequest::default()
    };
    client.elections().resign(resign).await.unwrap();
    let mut told = Vec::new();
    for _ in 0..3 {
        told.push(observed(&mut seen).await);
    }
    let first = u64::try_from(first.rev).unwrap();
    let values: Vec<_> = told.iter().map(|(_, leader)| leader.clone()).collect();
    assert_eq!(
        values,
        [
            Some((first, "etcd".into())),
            Some((term, "native".into())),
            None
        ]
    );
    // One that goes on behind the first is told the rest.
    let observe = v1::ObserveRequest {
        name: "e".to_owned(),
        after_revision: told[0].0,
    };
    let mut again = client
        .elections()
        .observe(observe)
        .await
        .unwrap()
        .into_inner();
    for next in &told[1..] {
        assert_eq!(observed(&mut again).await, *next);
    }
}

/// The next revision that an observer is told of, with the term and the word of the
/// leader.
async fn observed(stream: &mut Streaming<v1::ObserveResponse>) -> (u64, Option<(u64, Bytes)>) {
    let message = timeout(PATIENCE, stream.message()).await;
    let told = message.expect("nothing is told").unwrap().unwrap();
    let leader = told.leader.map(|leader| (leader.term, leader.value));
    (told.revision, leader)
}

#[tokio::test]
async fn what_is_too_large_or_would_be_a_native_lock_is_refused() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let key = Bytes::from(vec![b'k'; 1_572_864]);
    let too_large = unknown("etcdserver: request is too large");
    let refused = unlock(&client, key.clone()).await.unwrap_err();
    assert_eq!(told(refused), too_large);
    let leader = LeaderKey {
        key,
        ..LeaderKey::default()
    };
    let refused = proclaim(&client, leader.clone(), "v").await.unwrap_err();
    assert_eq!(told(refused), too_large);
    let request = ResignRequest {
        leader: Some(leader),
    };
    let refused = elections(&client).resign(request).await.unwrap_err();
    assert_eq!(told(refused), too_large);

    let a = client.open("a").await;
    client.acquire(acquire("l", a, None)).await.unwrap();
    let native = queue(&client, "l").await.remove(0).value;
    let request = CampaignRequest {
        name: "e".into(),
        lease: a,
        value: native,
    };
    let refused = elections(&client).campaign(request).await.unwrap_err();
    let text = "etcdserver: the value is that of a native lock";
    assert_eq!(told(refused), unknown(text));
}

#[tokio::test]
async fn who_proclaims_without_a_lease_keeps_the_one_that_its_key_has() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let a = client.open("a").await;
    let key = campaign(&client, a, "1").await.unwrap();
    let without = LeaderKey {
        lease: 0,
        ..key.clone()
    };
    proclaim(&client, without, "2").await.unwrap();
    let now = leader(&client).await.unwrap();
    assert_eq!((&now.value[..], now.lease), (&b"2"[..], a));
    close(&client, a).await;
    let gone = proclaim(&client, key, "3").await.unwrap_err();
    assert_eq!(told(gone), unknown("election: not leader"));
}

#[tokio::test]
async fn the_keys_of_a_lease_are_those_that_clients_know() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (a, b) = (client.open("a").await, client.open("b").await);
    lock(&client, "l", a).await.unwrap();
    let waiting = waiting_lock(&client, b);
    until_queued(&client, "l", 2).await;
    let request = LeaseTimeToLiveRequest { id: b, keys: true };
    let life = LeaseClient::new(client.channel.clone())
        .lease_time_to_live(request)
        .await;
    let keys = life.unwrap().into_inner().keys;
    assert_eq!(keys, [format!("l/{b:x}")]);
    waiting.abort();
}
