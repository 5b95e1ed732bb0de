//! The etcd API over HTTP and JSON, with the services of this server behind it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::net::SocketAddr;

use harness::{Directory, Node, exchange, get};

/// HTTP code and body. The server closes the connection behind it.
fn post(address: SocketAddr, path: &str, body: &str) -> (u16, String) {
    post_with(address, path, "", body)
}

/// With more lines for the head.
fn post_with(address: SocketAddr, path: &str, headers: &str, body: &str) -> (u16, String) {
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    let answer = String::from_utf8(exchange(address, request.as_bytes())).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, body.to_owned())
}

#[test]
fn keys_are_written_and_read_with_json() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    node.await_ready();
    let address = node.client();
    let put = r#"{"key":"Zm9v","value":"YmFy"}"#;
    for (revision, path) in [("2", "/v3/kv/put"), ("3", "/v3beta/kv/put")] {
        let (code, body) = post(address, path, put);
        assert_eq!(code, 200, "{body}");
        assert!(
            body.contains(&format!(r#""revision":"{revision}""#)),
            "{body}"
        );
        assert!(body.contains(r#"{"header":{"cluster_id":""#), "{body}");
    }
    let (code, body) = post(address, "/v3/kv/range", r#"{"key":"Zm9v"}"#);
    let kv = r#""kvs":[{"key":"Zm9v","create_revision":"2","mod_revision":"3","version":"2","value":"YmFy"}],"count":"1"}"#;
    assert_eq!(code, 200, "{body}");
    assert!(body.ends_with(kv), "{body}");

    let no_key = "etcdserver: key is not provided";
    let refused = format!(r#"{{"code":3,"error":"{no_key}","message":"{no_key}"}}"#);
    assert_eq!(post(address, "/v3/kv/range", "{}"), (400, refused));
    let long = format!(r#"{{"key":"YQ==","value":"{}"}}"#, "A".repeat(2_200_000));
    let (code, body) = post(address, "/v3/kv/put", &long);
    assert_eq!(code, 400, "{body}");
    assert!(body.contains("etcdserver: request is too large"), "{body}");
    assert_eq!(get(address, "/v3/kv/range").0, 405);
    assert_eq!(post(address, "/v3/kv/fly", "{}").0, 404);
}

#[test]
fn who_waits_for_a_lock_until_a_deadline_is_told_that_it_has_passed() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let address = node.client();
    let (code, body) = post(address, "/v3/lock/lock", r#"{"name":"bA=="}"#);
    assert_eq!(code, 200, "{body}");
    let soon = "Grpc-Timeout: 50m\r\n";
    let (code, body) = post_with(address, "/v3/lock/lock", soon, r#"{"name":"bA=="}"#);
    let text = "context deadline exceeded";
    let refused = format!(r#"{{"code":4,"error":"{text}","message":"{text}"}}"#);
    assert_eq!((code, body), (504, refused));

    let watch = r#"{"create_request":{"key":"YQ=="}}"#;
    let (code, body) = post_with(address, "/v3/watch", soon, watch);
    assert_eq!(code, 200, "{body}");
    assert!(body.contains(r#""created":true"#), "{body}");
    assert!(body.contains(r#"{"error":{"code":4,"#), "{body}");

    // gRPC over HTTP/1.1, by a client that does not keep the deadline itself.
    let message = "\0\0\0\0\u{3}\n\u{1}l";
    let request = format!(
        "POST /v3lockpb.Lock/Lock HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\
         Content-Type: application/grpc\r\nTE: trailers\r\nContent-Length: {}\r\n{soon}\r\n{message}",
        message.len()
    );
    let answer = String::from_utf8(exchange(address, request.as_bytes())).unwrap();
    assert!(answer.contains("grpc-status: 4\r\n"), "{answer}");
    assert!(
        answer.contains("grpc-message: context%20deadline%20exceeded\r\n"),
        "{answer}"
    );
}

#[test]
fn leases_locks_elections_and_watches_are_served_with_json() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let address = node.client();
    let says = |path: &str, headers: &str, body: &str, parts: &[&str]| {
        let (code, answer) = post_with(address, path, headers, body);
        assert_eq!(code, 200, "{path} {answer}");
        for part in parts {
            assert!(answer.contains(part), "{path} {part} {answer}");
        }
        answer
    };
    says("/v3/kv/put", "", r#"{"key":"YQ==","value":"MQ=="}"#, &[]);
    let grant = r#"{"TTL":60,"ID":77}"#;
    says("/v3/lease/grant", "", grant, &[r#""ID":"77","TTL":"60""#]);
    let renewed = r#""ID":"77","TTL":"60"}}"#;
    let renewals = r#"{"ID":77}{"ID":"78"}"#;
    let told = says(
        "/v3/lease/keepalive",
        "",
        renewals,
        &[renewed, r#""ID":"78"}}"#],
    );
    assert_eq!(told.matches(r#"{"result":{"#).count(), 2, "{told}");

    let key = r#""key":"bC80ZA==""#;
    says("/v3/lock/lock", "", r#"{"name":"bA==","lease":77}"#, &[key]);
    says("/v3/lock/unlock", "", &format!("{{{key}}}"), &[]);

    let campaign = r#"{"name":"ZQ==","lease":77,"value":"dg=="}"#;
    let elected = says("/v3/election/campaign", "", campaign, &[r#""lease":"77""#]);
    let (_, leader) = elected.split_once(r#""leader":"#).unwrap();
    let leader = leader.trim_end().strip_suffix('}').unwrap();
    let proclaim = format!(r#"{{"leader":{leader},"value":"dw=="}}"#);
    says("/v3/election/proclaim", "", &proclaim, &[]);
    let name = r#"{"name":"ZQ=="}"#;
    let value = r#""value":"dw==""#;
    says("/v3/election/leader", "", name, &[value]);
    let soon = "Grpc-Timeout: 200m\r\n";
    says(
        "/v3/election/observe",
        soon,
        name,
        &[r#"{"result":{"#, value],
    );
    says(
        "/v3/election/resign",
        "",
        &format!(r#"{{"leader":{leader}}}"#),
        &[],
    );
    let (code, nobody) = post(address, "/v3/election/leader", name);
    assert_eq!(code, 500, "{nobody}");
    assert!(nobody.contains("election: no leader"), "{nobody}");

    let watch = r#"{"create_request":{"key":"YQ==","start_revision":"2"}}"#;
    let event = r#""events":[{"kv":{"key":"YQ==","create_revision":"2""#;
    says("/v3/watch", soon, watch, &[r#""created":true"#, event]);
}
