//! Garbage on the ports of a running cluster, and servers that stop in order.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use rustix::process::Signal;
use tokio::task::JoinSet;

use crate::support::Cluster;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes that look random and are always the same (xorshift).
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    let byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(byte).take(count).collect()
}

/// The head of an HTTP/2 frame.
fn frame(length: u32, kind: u8, flags: u8, stream: u32) -> Vec<u8> {
    let length = length.to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()];
    head.concat()
}

/// What nobody should send.
fn garbage() -> Vec<Vec<u8>> {
    let after_preface = |rest: &[u8]| [PREFACE, &frame(0, 4, 0, 0), rest].concat();
    let many_resets: Vec<u8> = (0..5_000_u32)
        .flat_map(|n| [frame(4, 3, 0, 2 * n + 1), vec![0, 0, 0, 8]].concat())
        .collect();
    vec![
        noise(1, 1),
        noise(2, 100_000),
        vec![0; 100_000],
        vec![0xff; 100_000],
        PREFACE[..10].to_vec(),
        [PREFACE, &noise(3, 10_000)].concat(),
        after_preface(&noise(4, 10_000)),
        // A frame of 16 MiB, of which little comes.
        after_preface(&[frame(0xff_ffff, 0, 0, 1), noise(5, 1_000)].concat()),
        // Headers that do not decode, and headers that never end.
        after_preface(&[frame(100, 1, 4, 1), noise(6, 100)].concat()),
        after_preface(&[frame(100, 1, 0, 1), vec![0x40; 100]].concat()),
        // Settings that cannot be, and a window that overflows.
        after_preface(&[frame(6, 4, 0, 0), vec![0, 4, 0xff, 0xff, 0xff, 0xff]].concat()),
        after_preface(&[frame(4, 8, 0, 0), vec![0x7f, 0xff, 0xff, 0xff]].concat()),
        after_preface(&many_resets),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        [
            b"GET /".to_vec(),
            vec![b'a'; 200_000],
            b" HTTP/1.1\r\n\r\n".to_vec(),
        ]
        .concat(),
        b"POST /conclave.v1.Lock/Acquire HTTP/1.1\r\nHost: x\r\nContent-Type: application/grpc\r\n\
          Content-Length: 9999999999\r\n\r\n\x00\xff\xff\xff\xff"
            .to_vec(),
    ]
}

/// Sends it and goes, or stays silent with half of the connection open.
fn send(port: u16, bytes: &[u8], stay: bool) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let moment = Some(Duration::from_millis(20));
    stream.set_write_timeout(moment).unwrap();
    stream.set_read_timeout(moment).unwrap();
    // The server may hang up at any time.
    stream.write_all(bytes).ok();
    if !stay {
        stream.shutdown(Shutdown::Write).ok();
    }
    stream.read_exact(&mut [0]).ok();
    stream
}

#[tokio::test]
async fn garbage_on_both_ports_disturbs_nobody() {
    let mut cluster = Cluster::start("garbage", 3);
    let leader = cluster.leader().await;
    let term = |status: &serde_json::Value| status["servers"][0]["term"].clone();
    let before = cluster.run(["status", "-o", "json"]).await.json();
    let holder = cluster.begin(["lock", "held", "--ttl", "2s"]);
    holder.printed("token").await;
    let lock = cluster.lock("held").await;

    let mut open = Vec::new();
    for node in 0..3 {
        let (client, peer) = cluster.ports(node);
        for port in [client, peer] {
            for bytes in garbage() {
                drop(send(port, &bytes, false));
                open.push(send(port, &bytes, true));
                tokio::task::yield_now().await;
            }
            open.extend((0..50).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()));
        }
    }
    let other = cluster.run(["lock", "other", "--", "true"]).await;
    assert_eq!(other.code, 0, "{other:?}");
    drop(open);

    assert_eq!(
        cluster.lock("held").await["holder"]["key"],
        lock["holder"]["key"]
    );
    assert_eq!(cluster.leader().await, leader);
    let after = cluster.run(["status", "-o", "json"]).await.json();
    assert_eq!(term(&before), term(&after), "nobody was elected anew");
    holder.signal(Signal::TERM);
    assert_eq!(holder.ended().await.code, 0, "never lost");
    for node in 0..3 {
        assert!(cluster.is_running(node));
        assert!(!cluster.log(node).contains("panicked"), "n{node}");
    }
}

#[tokio::test]
async fn each_server_is_restarted_in_turn_without_an_error() {
    let mut cluster = Cluster::start("rolling", 3);
    let client = cluster.client();
    cluster
        .session(&client, Duration::from_secs(10))
        .await
        .close()
        .await
        .unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut workers = JoinSet::new();
    for worker in 0..4_u64 {
        let session = cluster
            .session(&cluster.client(), Duration::from_secs(10))
            .await;
        let stopped = stopped.clone();
        workers.spawn(async move {
            let mut last = 0;
            while !*stopped.borrow() {
                let guard = session
                    .lock(format!("rolling/{}", worker % 2))
                    .await
                    .unwrap();
                assert!(guard.token() > last);
                last = guard.token();
                guard.release().await.unwrap();
            }
            last
        });
    }
    for _ in 0..2 {
        let leader = cluster.leader().await;
        assert_eq!(cluster.stop(leader).await, 0);
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        cluster.leader_of(&others).await;
        cluster.spawn(leader);
        cluster.leader().await;
    }
    stop.send_replace(true);
    while let Some(ended) = workers.join_next().await {
        assert!(ended.unwrap() > 0);
    }
}
