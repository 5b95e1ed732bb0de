//! The gateway against that of etcd itself, with an etcd behind each. Without the
//! `etcd` command this says that it is skipped.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{service::Routes, transport::Endpoint};

use super::*;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);

/// An etcd that ends with the test.
struct Etcd {
    child: Child,
    directory: PathBuf,
    address: String,
}

impl Etcd {
    async fn start() -> Option<Etcd> {
        let version = Command::new("etcd")
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if !version.is_ok_and(|status| status.success()) {
            return None;
        }
        let (client, peer) = (free_address().await, free_address().await);
        let unique = format!("conclave-json-{}-{client}", std::process::id());
        let directory = std::env::temp_dir().join(unique);
        let (client_url, peer_url) = (format!("http://{client}"), format!("http://{peer}"));
        let child = Command::new("etcd")
            .env_clear()
            .args(["--log-level", "error", "--name", "a", "--data-dir"])
            .arg(&directory)
            .args(["--listen-client-urls", &client_url])
            .args(["--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url])
            .args(["--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("a={peer_url}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let etcd = Etcd {
            child,
            directory,
            address: client,
        };
        let serving = async {
            while !etcd.serves().await {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(LONG, serving).await.expect("etcd serves in time");
        Some(etcd)
    }

    async fn serves(&self) -> bool {
        TcpStream::connect(&self.address).await.is_ok()
            && post(&self.address, "/v3/kv/range", r#"{"key":"YQ=="}"#, 1)
                .await
                .0
                == 200
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        std::fs::remove_dir_all(&self.directory).ok();
    }
}

async fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().to_string()
}

/// This gateway, with the services at an address behind it. It ends with the test.
async fn gateway(services: &str) -> String {
    let channel = Endpoint::from_shared(format!("http://{services}")).unwrap();
    let router = routes(&channel.connect_lazy(), 1 << 20);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = tonic::transport::Server::builder()
        .accept_http1(true)
        .add_routes(Routes::from(router))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serve);
    address
}

/// The HTTP code, and the first `count` JSON objects of the answer.
async fn post(address: &str, path: &str, body: &str, count: usize) -> (u16, Vec<Value>) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = async {
        loop {
            let text = String::from_utf8_lossy(&answer).into_owned();
            let objects: Vec<Value> = text
                .lines()
                .filter(|line| line.starts_with('{'))
                .filter_map(|line| {
                    let mut values = serde_json::Deserializer::from_str(line).into_iter();
                    values.next()?.ok()
                })
                .collect();
            if objects.len() >= count {
                let code = text.split(' ').nth(1).unwrap().parse().unwrap();
                return (code, objects);
            }
            let read = stream.read_buf(&mut answer).await.unwrap();
            assert_ne!(read, 0, "{path} {body}: only {text}");
        }
    };
    timeout(LONG, read)
        .await
        .unwrap_or_else(|_| panic!("no answer to {path} {body}"))
}

/// Without what differs between two servers.
fn normalized(value: &mut Value) {
    const OWN: [&str; 9] = [
        "cluster_id",
        "member_id",
        "leader",
        "peerURLs",
        "clientURLs",
        "raftIndex",
        "raftAppliedIndex",
        "dbSize",
        "dbSizeInUse",
    ];
    match value {
        Value::Array(values) => values.iter_mut().for_each(normalized),
        Value::Object(fields) => {
            OWN.iter().for_each(|name| drop(fields.remove(*name)));
            // Of a member, and of a lease whose id was not asked for.
            if let Some(id) = fields.get_mut("ID")
                && id.as_str().is_some_and(|id| id.len() > 6)
            {
                *id = json!("long");
            }
            fields.values_mut().for_each(normalized);
        }
        _ => {}
    }
}

/// Path, body, and how many objects to wait for.
const REQUESTS: [(&str, &str, usize); 33] = [
    ("kv/put", r#"{"key":"Zm9v","value":"YmFy"}"#, 1),
    (
        "kv/put",
        r#"{"key":"Zm9v","value":"YmFy","prevKv":true}"#,
        1,
    ),
    (
        "kv/put",
        r#"{"key":"Zm9v","value":"YmFy","prev_kv":true}"#,
        1,
    ),
    ("kv/put", r#"{"key":"YQ==","value":"//8="}"#, 1),
    ("kv/put", r#"{"key":"Zm9v","lease":"99"}"#, 1),
    ("kv/range", r#"{"key":"Zm9v"}"#, 1),
    (
        "kv/range",
        r#"{"key":"AA==","rangeEnd":"AA==","limit":1}"#,
        1,
    ),
    (
        "kv/range",
        r#"{"key":"AA==","range_end":"AA==","limit":"1"}"#,
        1,
    ),
    (
        "kv/range",
        r#"{"key":"Zm9v","sort_order":"DESCEND","sortTarget":1}"#,
        1,
    ),
    ("kv/range", r#"{"key":"Zm9v","count_only":true}"#, 1),
    ("kv/range", r#"{"key":"bm9uZQ=="}"#, 1),
    ("kv/range", r#"{"key":"Zm9v","unknown":{"a":[1]}}"#, 1),
    ("kv/range", r#"{"key":"Zm9v","revision":"100000"}"#, 1),
    ("kv/range", r#"{"key":null}"#, 1),
    ("kv/range", "{}", 1),
    ("kv/range", "", 1),
    ("kv/range", r#"{"key":"#, 1),
    ("kv/range", "[]", 1),
    ("kv/range", r#"{"key":"!!"}"#, 1),
    ("kv/range", r#"{"key":"Zm9v","limit":"abc"}"#, 1),
    (
        "kv/txn",
        r#"{"compare":[{"key":"Zm9v","target":"VALUE","value":"YmFy","result":"EQUAL"}],
            "success":[{"requestPut":{"key":"Yg==","value":"YQ=="}},
                       {"request_range":{"key":"Zm9v"}},
                       {"request_delete_range":{"key":"Yg=="}},
                       {"request_txn":{"failure":[{"request_range":{"key":"Zm9v"}}]}}],
            "failure":[]}"#,
        1,
    ),
    (
        "kv/txn",
        r#"{"success":[{"request_put":{"key":"YQ=="}},{"request_put":{"key":"YQ=="}}]}"#,
        1,
    ),
    ("kv/txn", r#"{"success":[{}]}"#, 1),
    ("kv/deleterange", r#"{"key":"YQ==","prev_kv":true}"#, 1),
    ("lease/grant", r#"{"TTL":"60"}"#, 1),
    ("lease/grant", r#"{"TTL":60,"ID":77}"#, 1),
    ("lease/keepalive", r#"{"ID":"77"}{"ID":78}"#, 2),
    ("lease/timetolive", r#"{"ID":78,"keys":true}"#, 1),
    ("kv/lease/revoke", r#"{"ID":78}"#, 1),
    ("cluster/member/list", "{}", 1),
    ("lock/unlock", "{}", 1),
    (
        "watch",
        r#"{"create_request":{"key":"Zm9v","watch_id":"7","start_revision":2,"filters":["NODELETE"]}}
           {"create_request":{"key":"Zm9v","watch_id":7}}"#,
        3,
    ),
    ("maintenance/status", "{}", 1),
];

#[expect(clippy::print_stderr, reason = "a test says that it is skipped")]
fn skipped() {
    eprintln!("SKIPPED: there is no `etcd`");
}

/// What newer versions of grpc-gateway do otherwise: 400 for FAILED_PRECONDITION.
fn newer(code: u16) -> u16 {
    if code == 412 { 400 } else { code }
}

#[tokio::test]
async fn answers_are_those_of_etcds_own_gateway() {
    let (Some(theirs), Some(behind_ours)) = (Etcd::start().await, Etcd::start().await) else {
        skipped();
        return;
    };
    let ours = gateway(&behind_ours.address).await;
    for version in VERSIONS {
        for (path, body, count) in REQUESTS {
            let path = format!("/{version}/{path}");
            let (code, mut expected) = post(&theirs.address, &path, body, count).await;
            let (our_code, mut answered) = post(&ours, &path, body, count).await;
            expected.iter_mut().for_each(normalized);
            answered.iter_mut().for_each(normalized);
            let is_of_the_service = |error: &str| error.starts_with("etcdserver: ");
            if !expected[0]["error"].as_str().is_none_or(is_of_the_service) {
                // What is wrong with the JSON is said in other words.
                for values in [&mut expected, &mut answered] {
                    assert!(values[0]["error"].is_string(), "{path} {body}: {values:?}");
                    assert_eq!(values[0]["error"], values[0]["message"]);
                    values[0] = json!({ "code": values[0]["code"] });
                }
            }
            assert_eq!(our_code, newer(code), "{path} {body}: {answered:?}");
            assert_eq!(answered, expected, "{path} {body}");
        }
    }
}

#[tokio::test]
async fn a_stream_goes_on_and_takes_requests_as_they_come() {
    let Some(etcd) = Etcd::start().await else {
        skipped();
        return;
    };
    let ours = gateway(&etcd.address).await;
    let mut stream = TcpStream::connect(&ours).await.unwrap();
    let head = "POST /v3/watch HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let create = |key: &str| {
        let json = format!(r#"{{"create_request":{{"key":"{key}"}}}}"#);
        format!("{:x}\r\n{json}\r\n", json.len())
    };
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut told = Vec::new();
    let mut told_of = async |stream: &mut TcpStream, text: &str| {
        let read = async {
            while !String::from_utf8_lossy(&told).contains(text) {
                assert_ne!(stream.read_buf(&mut told).await.unwrap(), 0);
            }
        };
        timeout(LONG, read)
            .await
            .unwrap_or_else(|_| panic!("nothing of {text}"));
    };
    stream.write_all(create("YQ==").as_bytes()).await.unwrap();
    told_of(&mut stream, r#""created":true"#).await;
    let put = post(&ours, "/v3/kv/put", r#"{"key":"YQ==","value":"b25l"}"#, 1).await;
    assert_eq!(put.0, 200);
    told_of(&mut stream, "b25l").await;
    stream.write_all(create("Yg==").as_bytes()).await.unwrap();
    told_of(&mut stream, r#""watch_id":"1""#).await;
}

#[tokio::test]
async fn errors_before_the_first_message_of_a_stream_have_an_http_code() {
    let nobody = free_address().await;
    let ours = gateway(&nobody).await;
    let (code, body) = post(&ours, "/v3/election/observe", r#"{"name":"YQ=="}"#, 1).await;
    assert_eq!((code, &body[0]["error"]["grpc_code"]), (503, &json!(14)));
    let (code, body) = post(&ours, "/v3/watch", r#"{"create_request":1}"#, 1).await;
    assert_eq!((code, &body[0]["error"]["code"]), (400, &json!(3)));
    let (code, body) = post(&ours, "/v3/kv/put", "{}", 1).await;
    assert_eq!((code, &body[0]["code"]), (503, &json!(14)));
}

#[test]
fn every_method_of_the_schemas_has_a_path() {
    let packages = ["etcdserverpb", "v3lockpb", "v3electionpb"];
    let services = SCHEMAS
        .services()
        .filter(|service| packages.contains(&service.package_name()));
    let mut count = 0;
    for method in services.flat_map(|service| service.methods().collect::<Vec<_>>()) {
        let name = format!("{}/{}", method.parent_service().full_name(), method.name());
        // It came with a path to none.
        let is_served = PATHS.iter().any(|(known, _)| *known == name);
        assert_eq!(is_served, name != "etcdserverpb.KV/RangeStream", "{name}");
        count += 1;
    }
    assert_eq!(count, 49);
}
