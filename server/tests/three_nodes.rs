//! Three real servers in one process: what peers say to each other, and what
//! clients of any of them see.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::fs;

use conclave_core::replica::Fatal;
use conclave_proto::{
    internal::{PeerFrame, PeerGreeting, peer_client::PeerClient},
    v1,
};
use conclave_server::{Options, ServerError};
use harness::{Directory, Node, PATIENCE, acquire, eventually, get, reason, three};
use tokio::time::timeout;
use tonic::{Code, transport::Channel};

fn start_all(options: &[Options]) -> Vec<Node> {
    let nodes: Vec<Node> = options
        .iter()
        .map(|member| Node::start(member).unwrap())
        .collect();
    nodes.iter().for_each(Node::await_ready);
    nodes
}

fn leads(node: &Node) -> bool {
    get(node.client(), "/metrics")
        .1
        .contains("\nconclave_is_leader 1\n")
}

#[tokio::test]
async fn any_member_serves_and_a_grant_reaches_a_client_of_another() {
    let directory = Directory::new();
    let nodes = start_all(&three(&directory));
    let mut clients = vec![];
    for node in &nodes {
        clients.push(node.connect().await);
    }
    let mut last = 0;
    for client in &clients {
        let session = client.open("").await;
        let token = client.acquire(acquire("l", session, None)).await.unwrap();
        assert!(token > last);
        let waiter = client.open("").await;
        let waiting = tokio::spawn({
            let other = clients[1].clone();
            async move { other.acquire(acquire("l", waiter, None)).await }
        });
        tokio::task::yield_now().await;
        let request = v1::ReleaseRequest {
            name: "l".to_owned(),
            session_id: session,
            token,
            ..Default::default()
        };
        client.locks().release(request).await.unwrap();
        last = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
        let request = v1::CloseSessionRequest {
            session_id: waiter,
            attachment: 0,
        };
        client.sessions().close(request).await.unwrap();
    }
    let status = clients[0]
        .cluster()
        .status(v1::StatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        status
            .members
            .iter()
            .filter(|member| !member.client_urls.is_empty())
            .count(),
        3
    );
}

#[tokio::test]
async fn the_others_go_on_when_the_leader_stops_and_it_catches_up() {
    let directory = Directory::new();
    let options = three(&directory);
    let mut nodes = start_all(&options);
    let leader = nodes.iter().position(leads).unwrap();
    let session = nodes[leader].connect().await.open("").await;
    nodes.remove(leader).stop().unwrap();
    eventually("another leads", || nodes.iter().any(leads));
    let client = nodes[0].connect().await;
    let token = client.acquire(acquire("l", session, None)).await.unwrap();

    let back = Node::start(&options[leader]).unwrap();
    back.await_ready();
    let request = v1::CheckRequest {
        name: "l".to_owned(),
        token,
    };
    let checked = back
        .connect()
        .await
        .locks()
        .check(request)
        .await
        .unwrap()
        .into_inner();
    assert!(checked.held);
}

#[tokio::test]
async fn a_member_without_a_majority_says_so_and_does_not_hang() {
    let directory = Directory::new();
    let options = three(&directory);
    let mut nodes = start_all(&options);
    let left = nodes.pop().unwrap();
    let client = left.connect().await;
    // Patiently: one that is dropped may go on for a moment.
    for node in nodes {
        node.stop().unwrap();
    }
    let opened = timeout(
        PATIENCE,
        client.sessions().open(v1::OpenSessionRequest::default()),
    )
    .await;
    assert_eq!(
        opened.expect("an answer comes").unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(get(left.client(), "/livez").0, 200);
    assert_eq!(get(left.client(), "/readyz").0, 503);
    assert!(
        get(left.client(), "/health")
            .1
            .contains(r#""health":"false""#)
    );
}

#[tokio::test]
async fn a_member_without_a_leader_ends_the_streams_of_observers() {
    let directory = Directory::new();
    let options = three(&directory);
    let mut nodes = start_all(&options);
    let left = nodes.pop().unwrap();
    let client = left.connect().await;
    let observe = v1::ObserveRequest {
        name: "db".to_owned(),
        after_revision: 0,
    };
    let mut observed = client
        .elections()
        .observe(observe)
        .await
        .unwrap()
        .into_inner();
    let first = timeout(PATIENCE, observed.message()).await.unwrap();
    assert!(first.unwrap().unwrap().leader.is_none());
    for node in nodes {
        node.stop().unwrap();
    }
    let ended = timeout(PATIENCE, observed.message()).await;
    let ended = ended.expect("it would be silent for ever").unwrap_err();
    assert_eq!(reason(&ended), "NOT_LEADER");
}

#[tokio::test]
async fn an_emptied_directory_under_a_known_id_is_refused() {
    let directory = Directory::new();
    let options = three(&directory);
    let mut nodes = start_all(&options);
    let session = nodes[0].connect().await.open("").await;
    nodes.pop().unwrap().stop().unwrap();
    fs::remove_dir_all(options[2].data_dir.as_ref().unwrap()).unwrap();

    let refused = Node::start(&options[2]).unwrap().ended().unwrap_err();
    assert!(
        matches!(refused, ServerError::Fatal(Fatal::Replaced { .. })),
        "{refused}"
    );
    nodes[0]
        .connect()
        .await
        .acquire(acquire("l", session, None))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stranger_is_refused_with_the_reason() {
    let directory = Directory::new();
    let options = three(&directory);
    let nodes = start_all(&options);
    let topology = options[0].validate().unwrap().topology;
    let good = PeerGreeting {
        cluster_id: topology.cluster,
        node: topology.others().next().unwrap().id.0,
        incarnation: 1,
        boot: 1,
        protocol: 1,
    };
    let own = topology.own().id.0;
    for (greeting, expected) in [
        (None, "greeting"),
        (
            Some(PeerGreeting {
                cluster_id: 1,
                ..good
            }),
            "belongs to cluster 1",
        ),
        (
            Some(PeerGreeting { node: 1, ..good }),
            "not one of this cluster",
        ),
        (Some(PeerGreeting { node: own, ..good }), "dialled itself"),
        (
            Some(PeerGreeting {
                protocol: 9,
                ..good
            }),
            "version 9",
        ),
    ] {
        let endpoint = Channel::from_shared(format!("http://{}", nodes[0].addresses.peers[0]));
        let mut peer = PeerClient::new(endpoint.unwrap().connect().await.unwrap());
        let frame = PeerFrame {
            greeting,
            messages: vec![],
        };
        let refused = peer.exchange(tokio_stream::once(frame)).await.unwrap_err();
        assert!(refused.message().contains(expected), "{refused}");
    }
}
