//! `etcdserverpb.KV` over real sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use conclave_proto::etcd::etcdserverpb::{PutRequest, RangeRequest, kv_client::KvClient};
use harness::{Client, Directory, Node};
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
