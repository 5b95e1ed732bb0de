//! `etcdserverpb.KV` over real sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use conclave_proto::{
    etcd::etcdserverpb::{
        CompactionRequest, Compare, DeleteRangeRequest, PutRequest, RangeRequest, RangeResponse,
        RequestOp, TxnRequest, TxnResponse,
        compare::{CompareResult, CompareTarget, TargetUnion},
        kv_client::KvClient,
        request_op::Request as Op,
        response_op::Response as Done,
    },
    v1,
};
use harness::{Client, Directory, Node, acquire, alone, three};
use tonic::{Code, Status, client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};

fn kv(client: &Client) -> KvClient<Channel> {
    KvClient::new(client.channel.clone())
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..PutRequest::default()
    }
}

fn told(status: &Status) -> (Code, &str) {
    (status.code(), status.message())
}

#[tokio::test]
async fn what_is_put_is_found() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let first = kv(&client).put(put("a", "1")).await.unwrap().into_inner();
    let header = first.header.unwrap();
    assert_eq!(header.revision, 2);
    assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term != 0);
    let request = RangeRequest {
        key: "a".into(),
        ..RangeRequest::default()
    };
    let found = kv(&client).range(request).await.unwrap().into_inner();
    assert_eq!((found.kvs.len(), found.count, found.more), (1, 1, false));
    let record = &found.kvs[0];
    assert_eq!((&record.key[..], &record.value[..]), (&b"a"[..], &b"1"[..]));
    let numbers = (record.create_revision, record.mod_revision, record.version);
    assert_eq!(numbers, (2, 2, 1));
}

#[tokio::test]
async fn what_is_too_large_is_refused_in_etcds_words() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let large = |bytes| put("a", &"x".repeat(bytes));
    let refused = kv(&client).put(large(1_572_864)).await.unwrap_err();
    let expected = (Code::InvalidArgument, "etcdserver: request is too large");
    assert_eq!(told(&refused), expected);
    kv(&client).put(large(1_572_000)).await.unwrap();
    let refused = kv(&client).put(large(3_000_000)).await.unwrap_err();
    assert_eq!(
        told(&refused),
        (
            Code::ResourceExhausted,
            "grpc: received message larger than max (3000008 vs. 2097152)"
        )
    );
}

#[tokio::test]
async fn an_unknown_method_is_named() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut grpc = Grpc::new(client.channel.clone());
    grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/etcdserverpb.KV/Fly");
    let codec = conclave_proto::codec::Codec::<PutRequest, PutRequest>::default();
    let refused = grpc
        .unary(tonic::Request::new(PutRequest::default()), path, codec)
        .await
        .unwrap_err();
    assert_eq!(
        told(&refused),
        (
            Code::Unimplemented,
            "unknown method Fly for service etcdserverpb.KV"
        )
    );
}

fn from(key: &str, end: &str) -> RangeRequest {
    RangeRequest {
        key: key.to_owned().into(),
        range_end: end.to_owned().into(),
        ..RangeRequest::default()
    }
}

fn delete(key: &str, end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest {
        key: key.to_owned().into(),
        range_end: end.to_owned().into(),
        prev_kv: true,
    }
}

fn keys(found: &RangeResponse) -> Vec<&str> {
    let keys = found.kvs.iter();
    keys.map(|record| str::from_utf8(&record.key).unwrap())
        .collect()
}

fn success(operations: Vec<Op>) -> TxnRequest {
    let operation = |request| RequestOp {
        request: Some(request),
    };
    TxnRequest {
        success: operations.into_iter().map(operation).collect(),
        ..TxnRequest::default()
    }
}

/// The revision that each operation tells.
fn revisions(response: &TxnResponse) -> Vec<i64> {
    let each = response.responses.iter();
    each.map(|response| {
        let header = match response.response.as_ref().unwrap() {
            Done::ResponsePut(put) => &put.header,
            Done::ResponseRange(range) => &range.header,
            Done::ResponseDeleteRange(delete) => &delete.header,
            Done::ResponseTxn(txn) => &txn.header,
        };
        header.as_ref().unwrap().revision
    })
    .collect()
}

#[tokio::test]
async fn ranges_are_filtered_sorted_limited_counted_and_read_in_the_past() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    for (key, value) in [("a", "3"), ("b", "2"), ("c", "1"), ("a", "4")] {
        kv(&client).put(put(key, value)).await.unwrap();
    }
    let range = async |request: RangeRequest| kv(&client).range(request).await;
    let all = from("\0", "\0");

    let limited = RangeRequest {
        limit: 2,
        ..all.clone()
    };
    let found = range(limited).await.unwrap().into_inner();
    assert_eq!(
        (keys(&found), found.count, found.more),
        (vec!["a", "b"], 3, true)
    );
    assert_eq!(found.header.unwrap().revision, 5);

    let sorted = RangeRequest {
        sort_order: 2,
        sort_target: 4,
        ..all.clone()
    };
    assert_eq!(
        keys(&range(sorted).await.unwrap().into_inner()),
        ["a", "b", "c"]
    );
    // Without an order only the first keys are sorted, one more than the limit.
    for (sort_order, least) in [(0, "b"), (1, "c")] {
        let first = RangeRequest {
            sort_order,
            sort_target: 4,
            limit: 1,
            ..all.clone()
        };
        let found = range(first).await.unwrap().into_inner();
        assert_eq!(
            (keys(&found), found.count, found.more),
            (vec![least], 3, true)
        );
    }
    let counted = RangeRequest {
        count_only: true,
        ..all.clone()
    };
    let found = range(counted).await.unwrap().into_inner();
    assert_eq!((keys(&found), found.count, found.more), (vec![], 3, false));
    let bare = RangeRequest {
        keys_only: true,
        ..all.clone()
    };
    assert!(
        range(bare)
            .await
            .unwrap()
            .into_inner()
            .kvs
            .iter()
            .all(|record| record.value.is_empty())
    );
    let filtered = RangeRequest {
        min_mod_revision: 4,
        ..all.clone()
    };
    let found = range(filtered).await.unwrap().into_inner();
    assert_eq!((keys(&found), found.count), (vec!["a", "c"], 3));
    let past = RangeRequest {
        revision: 3,
        serializable: true,
        ..all.clone()
    };
    let found = range(past).await.unwrap().into_inner();
    assert_eq!(
        (keys(&found), &found.kvs[0].value[..]),
        (vec!["a", "b"], &b"3"[..])
    );
    assert_eq!(
        keys(&range(from("c", "b")).await.unwrap().into_inner()),
        [""; 0]
    );
}

#[tokio::test]
async fn ranges_are_refused_in_etcds_words() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let range = async |request: RangeRequest| kv(&client).range(request).await;
    let all = from("\0", "\0");
    let future = RangeRequest {
        revision: 2,
        ..all.clone()
    };
    assert_eq!(
        told(&range(future).await.unwrap_err()),
        (
            Code::OutOfRange,
            "etcdserver: mvcc: required revision is a future revision"
        )
    );
    let unsorted = RangeRequest {
        sort_target: 9,
        ..all.clone()
    };
    assert_eq!(
        told(&range(unsorted).await.unwrap_err()),
        (Code::InvalidArgument, "etcdserver: invalid sort option")
    );
    assert_eq!(
        told(&range(from("", "")).await.unwrap_err()),
        (Code::InvalidArgument, "etcdserver: key is not provided")
    );
}

#[tokio::test]
async fn large_ranges_come_in_pieces_and_whole() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let count = 10_000;
    for first in (0..count).step_by(100) {
        let puts = first..first + 100;
        let puts = puts.map(|number| Op::RequestPut(put(&format!("k{number:05}"), "v")));
        kv(&client).txn(success(puts.collect())).await.unwrap();
    }
    let all = from("k", "l");
    let found = kv(&client).range(all.clone()).await.unwrap().into_inner();
    assert_eq!(
        (found.kvs.len(), found.count, found.more),
        (count, 10_000, false)
    );
    assert!(found.kvs.is_sorted_by(|a, b| a.key < b.key));

    let limited = RangeRequest {
        limit: 9_000,
        ..all
    };
    let newest = RangeRequest {
        sort_order: 2,
        limit: 3,
        ..limited.clone()
    };
    let found = kv(&client).range(newest).await.unwrap().into_inner();
    assert_eq!(keys(&found), ["k09999", "k09998", "k09997"]);
    assert_eq!((found.count, found.more), (10_000, true));

    let mut stream = kv(&client)
        .range_stream(limited.clone())
        .await
        .unwrap()
        .into_inner();
    let mut streamed = RangeResponse::default();
    while let Some(message) = stream.message().await.unwrap() {
        let part = message.range_response.unwrap();
        assert!(streamed.header.is_none(), "only the last one has a header");
        streamed.header = part.header;
        (streamed.count, streamed.more) = (part.count, part.more);
        streamed.kvs.extend(part.kvs);
    }
    let whole = kv(&client).range(limited).await.unwrap().into_inner();
    assert_eq!(streamed, whole);
    let sorted = RangeRequest {
        sort_target: 1,
        ..from("k", "l")
    };
    let refused = kv(&client).range_stream(sorted).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
}

#[tokio::test]
async fn puts_and_deletes_say_what_was_there() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let with_previous = |value: &str| PutRequest {
        prev_kv: true,
        ..put("a", value)
    };
    let first = kv(&client)
        .put(with_previous("1"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.prev_kv, None);
    let second = kv(&client)
        .put(with_previous("2"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(second.prev_kv.unwrap().value, "1");
    let same = PutRequest {
        ignore_value: true,
        ..put("a", "")
    };
    kv(&client).put(same).await.unwrap();

    let gone = kv(&client)
        .delete_range(delete("a", "b"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (
            gone.deleted,
            &gone.prev_kvs[0].value[..],
            gone.prev_kvs[0].version
        ),
        (1, &b"2"[..], 3)
    );
    assert_eq!(gone.header.unwrap().revision, 5);
    let nothing = kv(&client)
        .delete_range(delete("a", "b"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((nothing.deleted, nothing.header.unwrap().revision), (0, 5));
}

#[tokio::test]
async fn puts_are_refused_in_etcds_words() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let refused = async |request| kv(&client).put(request).await.unwrap_err();
    for (request, code, text) in [
        (put("", "1"), Code::InvalidArgument, "key is not provided"),
        (
            PutRequest {
                ignore_value: true,
                ..put("a", "1")
            },
            Code::InvalidArgument,
            "value is provided",
        ),
        (
            PutRequest {
                ignore_lease: true,
                lease: 5,
                ..put("a", "1")
            },
            Code::InvalidArgument,
            "lease is provided",
        ),
        (
            PutRequest {
                ignore_value: true,
                ..put("b", "")
            },
            Code::InvalidArgument,
            "key not found",
        ),
        (
            PutRequest {
                lease: 5,
                ..put("a", "1")
            },
            Code::NotFound,
            "requested lease not found",
        ),
        (
            put("_conclave/a", "1"),
            Code::PermissionDenied,
            "permission denied",
        ),
    ] {
        assert_eq!(
            told(&refused(request).await),
            (code, &*format!("etcdserver: {text}"))
        );
    }
}

#[tokio::test]
async fn transactions_compare_run_and_tell_the_revision_each_operation_saw() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let inner = success(vec![
        Op::RequestRange(from("a", "")),
        Op::RequestPut(put("b", "1")),
    ]);
    let mut request = success(vec![
        Op::RequestRange(from("a", "")),
        Op::RequestDeleteRange(delete("z", "")),
        Op::RequestPut(put("a", "1")),
        Op::RequestTxn(inner),
    ]);
    request.compare = vec![Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: "a".into(),
        target_union: Some(TargetUnion::CreateRevision(0)),
        ..Compare::default()
    }];
    request.failure = success(vec![Op::RequestRange(from("a", "c"))]).success;
    let first = kv(&client).txn(request.clone()).await.unwrap().into_inner();
    assert!(first.succeeded);
    assert_eq!(first.header.as_ref().unwrap().revision, 2);
    assert_eq!(revisions(&first), [1, 1, 2, 0]);
    let Some(Done::ResponseTxn(inner)) = &first.responses[3].response else {
        panic!("not a transaction");
    };
    assert_eq!(revisions(inner), [2, 2]);

    let second = kv(&client).txn(request).await.unwrap().into_inner();
    assert!(!second.succeeded);
    assert_eq!(second.header.as_ref().unwrap().revision, 2);
    let Some(Done::ResponseRange(found)) = &second.responses[0].response else {
        panic!("not a range");
    };
    assert_eq!(
        (keys(found), found.header.as_ref().unwrap().revision),
        (vec!["a", "b"], 2)
    );

    let reads = success(vec![
        Op::RequestRange(from("a", "")),
        Op::RequestRange(from("b", "")),
    ]);
    let read = kv(&client).txn(reads).await.unwrap().into_inner();
    assert_eq!(
        (revisions(&read), read.header.unwrap().revision),
        (vec![2, 2], 2)
    );
}

#[tokio::test]
async fn transactions_are_refused_in_etcds_words() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let future = RangeRequest {
        revision: 9,
        ..from("a", "")
    };
    let many = (0..129)
        .map(|number| Op::RequestPut(put(&number.to_string(), "")))
        .collect();
    let nothing = TxnRequest {
        failure: vec![RequestOp { request: None }],
        ..TxnRequest::default()
    };
    let puts = || vec![Op::RequestPut(put("a", "1")), Op::RequestPut(put("a", "2"))];
    for (request, code, text) in [
        (
            success(puts()),
            Code::InvalidArgument,
            "duplicate key given in txn request",
        ),
        (
            success(vec![Op::RequestTxn(success(puts()))]),
            Code::InvalidArgument,
            "duplicate key given in txn request",
        ),
        (
            success(many),
            Code::InvalidArgument,
            "too many operations in txn request",
        ),
        (nothing, Code::InvalidArgument, "key not found"),
        (
            success(vec![Op::RequestRange(future.clone())]),
            Code::OutOfRange,
            "mvcc: required revision is a future revision",
        ),
        (
            success(vec![
                Op::RequestPut(put("a", "1")),
                Op::RequestRange(future),
            ]),
            Code::OutOfRange,
            "mvcc: required revision is a future revision",
        ),
        (
            success(vec![Op::RequestPut(put("_conclave/a", "1"))]),
            Code::PermissionDenied,
            "permission denied",
        ),
    ] {
        let refused = kv(&client).txn(request).await.unwrap_err();
        assert_eq!(told(&refused), (code, &*format!("etcdserver: {text}")));
    }
    let all = kv(&client)
        .range(from("\0", "\0"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((all.count, all.header.unwrap().revision), (0, 1));
}

#[tokio::test]
async fn compaction_gives_up_the_past() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let compact = async |revision| {
        let request = CompactionRequest {
            revision,
            physical: true,
        };
        kv(&client).compact(request).await
    };
    compact(0).await.unwrap();
    for value in ["1", "2", "3"] {
        kv(&client).put(put("a", value)).await.unwrap();
    }
    let header = compact(3).await.unwrap().into_inner().header.unwrap();
    assert_eq!(header.revision, 4);
    let gone = (
        Code::OutOfRange,
        "etcdserver: mvcc: required revision has been compacted",
    );
    for again in [3, 0, -3] {
        assert_eq!(told(&compact(again).await.unwrap_err()), gone);
    }
    let future = (
        Code::OutOfRange,
        "etcdserver: mvcc: required revision is a future revision",
    );
    assert_eq!(told(&compact(5).await.unwrap_err()), future);
    let at = |revision| RangeRequest {
        revision,
        ..from("a", "")
    };
    assert_eq!(told(&kv(&client).range(at(2)).await.unwrap_err()), gone);
    let there = kv(&client).range(at(3)).await.unwrap().into_inner();
    assert_eq!(there.kvs[0].value, "2");
}

#[tokio::test]
async fn above_the_quota_only_deletes_pass() {
    let directory = Directory::new();
    let options = conclave_server::Options {
        quota_backend_bytes: 10_000,
        ..alone(&directory)
    };
    let node = Node::start(&options).unwrap();
    node.await_ready();
    let client = node.connect().await;
    let until = std::time::Instant::now() + harness::PATIENCE;
    let refused = loop {
        assert!(
            std::time::Instant::now() < until,
            "the quota was never reached"
        );
        if let Err(refused) = kv(&client).put(put("a", &"x".repeat(5_000))).await {
            break refused;
        }
    };
    let full = (
        Code::ResourceExhausted,
        "etcdserver: mvcc: database space exceeded",
    );
    assert_eq!(told(&refused), full);
    let txn = success(vec![Op::RequestPut(put("a", "1"))]);
    assert_eq!(told(&kv(&client).txn(txn).await.unwrap_err()), full);
    let gone = kv(&client)
        .delete_range(delete("a", ""))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(gone.deleted, 1);
}

#[tokio::test]
async fn a_deleted_holders_grant_ends_and_the_next_one_holds() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let (one, two) = (client.open("one").await, client.open("two").await);
    let token = client.acquire(acquire("deploy", one, None)).await.unwrap();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.acquire(acquire("deploy", two, None)).await }
    });
    let listed = async || {
        let request = v1::ListLocksRequest {
            name: "deploy".to_owned(),
            ..Default::default()
        };
        let list = client.locks().list(request).await.unwrap().into_inner();
        list.locks.first().map_or(0, |lock| lock.waiters_total)
    };
    let until = std::time::Instant::now() + harness::PATIENCE;
    while listed().await == 0 {
        assert!(std::time::Instant::now() < until, "nobody waits");
    }
    let gone = kv(&client)
        .delete_range(delete(&format!("deploy/{one:x}"), ""))
        .await;
    assert_eq!(gone.unwrap().into_inner().deleted, 1);
    assert!(waiting.await.unwrap().unwrap() > token);
}

#[tokio::test]
async fn without_a_leader_who_wants_one_is_refused_and_local_reads_go_on() {
    let directory = Directory::new();
    let mut nodes: Vec<Node> = three(&directory)
        .iter()
        .map(|options| Node::start(options).unwrap())
        .collect();
    nodes.iter().for_each(Node::await_ready);
    let client = nodes[0].connect().await;
    kv(&client).put(put("a", "1")).await.unwrap();
    for other in nodes.drain(1..) {
        other.stop().unwrap();
    }
    let wants_leader = || {
        let mut request = tonic::Request::new(RangeRequest {
            serializable: true,
            ..from("a", "")
        });
        request
            .metadata_mut()
            .insert("hasleader", "true".parse().unwrap());
        request
    };
    let until = std::time::Instant::now() + harness::PATIENCE;
    let refused = loop {
        assert!(std::time::Instant::now() < until, "it never noticed");
        if let Err(refused) = kv(&client).range(wants_leader()).await {
            break refused;
        }
    };
    assert_eq!(told(&refused), (Code::Unavailable, "etcdserver: no leader"));
    let local = RangeRequest {
        serializable: true,
        ..from("a", "")
    };
    let found = kv(&client).range(local).await.unwrap().into_inner();
    assert_eq!(found.kvs[0].value, "1");
    // Others wait for one, for as long as they do with etcd.
    let (mut one, mut other) = (kv(&client), kv(&client));
    let (read, written) = tokio::join!(one.range(from("a", "")), other.put(put("a", "2")));
    let timed_out = (Code::Unavailable, "etcdserver: request timed out");
    assert_eq!(told(&read.unwrap_err()), timed_out);
    assert_eq!(told(&written.unwrap_err()), timed_out);
}

#[tokio::test]
async fn a_request_waits_for_a_leader() {
    let directory = Directory::new();
    let members = three(&directory);
    let first = Node::start(&members[0]).unwrap();
    let client = first.connect().await;
    let mut wants_leader = tonic::Request::new(put("a", "1"));
    wants_leader
        .metadata_mut()
        .insert("hasleader", "true".parse().unwrap());
    let refused = kv(&client).put(wants_leader).await.unwrap_err();
    assert_eq!(told(&refused), (Code::Unavailable, "etcdserver: no leader"));

    let (to_put, to_read) = (client.clone(), client.clone());
    let written = tokio::spawn(async move { kv(&to_put).put(put("a", "1")).await });
    let request = RangeRequest {
        key: "b".into(),
        ..RangeRequest::default()
    };
    let read = tokio::spawn(async move { kv(&to_read).range(request).await });
    // Longer than a request that is refused takes.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    assert!(!written.is_finished() && !read.is_finished());
    let others: Vec<Node> = members[1..]
        .iter()
        .map(|member| Node::start(member).unwrap())
        .collect();
    written.await.unwrap().unwrap();
    read.await.unwrap().unwrap();
    drop(others);
}
