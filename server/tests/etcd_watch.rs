//! `etcdserverpb.Watch` over real sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::time::Duration;

use conclave_proto::{
    etcd::etcdserverpb::{
        PutRequest, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest,
        WatchResponse, kv_client::KvClient, watch_client::WatchClient,
        watch_create_request::FilterType, watch_request::RequestUnion,
    },
    v1::{CompactRequest, ReleaseRequest},
};
use harness::{Client, Directory, Node, PATIENCE, acquire, alone, get};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

struct Watcher {
    requests: Option<mpsc::Sender<WatchRequest>>,
    responses: Streaming<WatchResponse>,
}

fn key(key: &str) -> WatchCreateRequest {
    WatchCreateRequest {
        key: key.to_owned().into(),
        ..WatchCreateRequest::default()
    }
}

fn since(name: &str, start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest {
        start_revision,
        ..key(name)
    }
}

impl Watcher {
    async fn open(client: &Client) -> Self {
        Self::open_with(client, |_| ()).await.unwrap()
    }

    async fn open_with(
        client: &Client,
        prepare: impl FnOnce(&mut Request<ReceiverStream<WatchRequest>>),
    ) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(1_024);
        let mut request = Request::new(ReceiverStream::new(receiver));
        prepare(&mut request);
        let mut client =
            WatchClient::new(client.channel.clone()).max_decoding_message_size(64 << 20);
        let responses = client.watch(request).await?.into_inner();
        Ok(Self {
            requests: Some(requests),
            responses,
        })
    }

    async fn ask(&self, union: RequestUnion) {
        let request_union = Some(union);
        let requests = self.requests.as_ref().unwrap();
        requests.send(WatchRequest { request_union }).await.unwrap();
    }

    async fn create(&self, create: WatchCreateRequest) {
        self.ask(RequestUnion::CreateRequest(create)).await;
    }

    async fn cancel(&self, watch_id: i64) {
        self.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))
            .await;
    }

    async fn ask_progress(&self) {
        self.ask(RequestUnion::ProgressRequest(WatchProgressRequest {}))
            .await;
    }

    async fn outcome(&mut self) -> Result<Option<WatchResponse>, Status> {
        let next = time::timeout(PATIENCE, self.responses.message());
        next.await.expect("it is told within time")
    }

    async fn next(&mut self) -> WatchResponse {
        self.outcome().await.unwrap().unwrap()
    }

    /// Begins a watcher; its name, and the revision of the header.
    async fn begin(&mut self, create: WatchCreateRequest) -> (i64, i64) {
        self.create(create).await;
        let begun = self.next().await;
        assert!(begun.created && !begun.canceled && begun.events.is_empty());
        (begun.watch_id, revision(&begun))
    }

    /// Revisions of the events of the next response, with a minus where a key was
    /// deleted.
    async fn revisions(&mut self) -> Vec<i64> {
        let response = self.next().await;
        let events = response.events.iter();
        let revisions = events.map(|event| {
            let at = event.kv.as_ref().unwrap().mod_revision;
            if event.r#type == 1 { -at } else { at }
        });
        revisions.collect()
    }
}

fn revision(response: &WatchResponse) -> i64 {
    response.header.as_ref().unwrap().revision
}

async fn put(client: &Client, key: &str, value: &str) -> i64 {
    let put = PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..PutRequest::default()
    };
    let mut kv = KvClient::new(client.channel.clone());
    let answer = kv.put(put).await.unwrap().into_inner();
    answer.header.unwrap().revision
}

async fn compact(client: &Client, revision: i64) {
    let revision = revision.unsigned_abs();
    let compact = CompactRequest { revision };
    client.cluster().compact(compact).await.unwrap();
}

/// Takes a lock, and gives it back: a key under `l/` is made and deleted.
async fn make_and_delete(client: &Client) -> i64 {
    let session = client.open("s").await;
    let token = client.acquire(acquire("l", session, None)).await.unwrap();
    let release = ReleaseRequest {
        name: "l".to_owned(),
        session_id: session,
        token,
        ..ReleaseRequest::default()
    };
    client.locks().release(release).await.unwrap();
    token.cast_signed()
}

async fn started() -> (Directory, Node, Client) {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    (directory, node, client)
}

#[tokio::test]
async fn an_event_has_the_form_of_the_wire() {
    let (_directory, _node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    let create = WatchCreateRequest {
        prev_kv: true,
        ..key("a")
    };
    assert_eq!(watcher.begin(create).await, (0, 1));
    put(&client, "b", "other").await;
    put(&client, "a", "1").await;
    put(&client, "a", "2").await;
    let made = watcher.next().await;
    assert_eq!(
        (made.watch_id, revision(&made), made.events.len()),
        (0, 3, 1)
    );
    assert!(made.header.unwrap().raft_term > 0);
    let event = &made.events[0];
    assert_eq!((event.r#type, &event.prev_kv), (0, &None));
    let kv = event.kv.as_ref().unwrap();
    assert_eq!((&kv.key[..], &kv.value[..]), (&b"a"[..], &b"1"[..]));
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (3, 3, 1));
    let replaced = watcher.next().await;
    let event = &replaced.events[0];
    assert_eq!(event.prev_kv.as_ref().unwrap().value, "1");
    assert_eq!(event.kv.as_ref().unwrap().version, 2);
}

#[tokio::test]
async fn a_deletion_names_the_key_and_the_revision() {
    let (_directory, _node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    let create = WatchCreateRequest {
        range_end: "l0".into(),
        ..key("l/")
    };
    watcher.begin(create).await;
    let made = make_and_delete(&client).await;
    assert_eq!(watcher.revisions().await, [made]);
    let deleted = watcher.next().await;
    assert_eq!(revision(&deleted), made + 1);
    let event = &deleted.events[0];
    let kv = event.kv.as_ref().unwrap();
    assert_eq!((event.r#type, &event.prev_kv), (1, &None));
    assert!(kv.key.starts_with(b"l/") && kv.value.is_empty());
    let numbers = (kv.mod_revision, kv.create_revision, kv.version, kv.lease);
    assert_eq!(numbers, (made + 1, 0, 0, 0));
}

#[tokio::test]
async fn filters_leave_out_what_nobody_wants() {
    let (_directory, _node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    for (name, filter) in [(1, FilterType::Noput), (2, FilterType::Nodelete)] {
        let create = WatchCreateRequest {
            range_end: "l0".into(),
            filters: vec![filter.into()],
            watch_id: name,
            ..key("l/")
        };
        assert_eq!(watcher.begin(create).await.0, name);
    }
    let made = make_and_delete(&client).await;
    let first = watcher.next().await;
    let second = watcher.next().await;
    assert_eq!((first.watch_id, revision(&first)), (2, made));
    assert_eq!((second.watch_id, revision(&second)), (1, made + 1));
}

#[tokio::test]
async fn names_are_given_or_chosen_and_free_again_after_a_cancel() {
    let (_directory, _node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    let named = |name| WatchCreateRequest {
        watch_id: name,
        ..key("a")
    };
    assert_eq!(watcher.begin(key("a")).await.0, 0);
    assert_eq!(watcher.begin(named(1)).await.0, 1);
    assert_eq!(watcher.begin(key("a")).await.0, 2);
    watcher.create(named(1)).await;
    let refused = watcher.next().await;
    assert!(refused.created && refused.canceled);
    assert_eq!(
        (refused.watch_id, &refused.cancel_reason[..]),
        (-1, "mvcc: duplicate watch ID provided on the WatchStream")
    );
    watcher.cancel(77).await;
    watcher.cancel(1).await;
    let canceled = watcher.next().await;
    assert!(canceled.canceled && !canceled.created);
    assert_eq!((canceled.watch_id, canceled.compact_revision), (1, 0));
    assert_eq!(canceled.cancel_reason, "");
    assert_eq!(watcher.begin(named(1)).await.0, 1);
    put(&client, "a", "1").await;
    let mut told = vec![];
    for _ in 0..3 {
        told.push(watcher.next().await.watch_id);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 1, 2]);
}

#[tokio::test]
async fn what_cannot_begin_is_said_in_the_order_of_the_requests() {
    let (_directory, _node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    let empty = WatchCreateRequest {
        range_end: "a".into(),
        ..key("b")
    };
    watcher.create(key("a")).await;
    let both = WatchCreateRequest {
        start_revision: -1,
        ..empty.clone()
    };
    watcher.create(empty).await;
    watcher.create(since("a", -1)).await;
    watcher.create(both).await;
    watcher.create(key("")).await;
    let mut told = vec![];
    for _ in 0..5 {
        let response = watcher.next().await;
        assert!(response.created && revision(&response) == 1);
        told.push((response.watch_id, response.cancel_reason));
    }
    let told: Vec<_> = told.iter().map(|(id, why)| (*id, &why[..])).collect();
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    assert_eq!(
        told,
        [
            (0, ""),
            (-1, "mvcc: watcher range is empty"),
            (-1, compacted),
            (-1, compacted),
            (1, "")
        ]
    );
}

#[tokio::test]
async fn the_past_is_told_and_then_the_present_without_a_gap() {
    let (_directory, _node, client) = started().await;
    for _ in 0..3 {
        put(&client, "a", "1").await;
    }
    let mut watcher = Watcher::open(&client).await;
    watcher.begin(since("a", 2)).await;
    let past = watcher.next().await;
    assert_eq!((past.events.len(), revision(&past)), (3, 4));
    // From the newest revision on, and from the next: at once.
    watcher.begin(since("a", 4)).await;
    assert_eq!(watcher.revisions().await, [4]);
    watcher.begin(since("a", 5)).await;
    // Later: silent until then.
    watcher.begin(since("a", 6)).await;
    put(&client, "a", "1").await;
    let mut told = vec![];
    for _ in 0..3 {
        told.push(watcher.next().await.watch_id);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 1, 2]);
    put(&client, "a", "1").await;
    let mut told = vec![];
    for _ in 0..4 {
        let response = watcher.next().await;
        assert_eq!(revision(&response), 6);
        told.push(response.watch_id);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 1, 2, 3]);
}

#[tokio::test]
async fn what_is_compacted_is_not_left_out_in_silence() {
    let (_directory, _node, client) = started().await;
    put(&client, "still", "1").await; // 2
    for _ in 0..4 {
        put(&client, "a", "1").await; // 3 to 6
    }
    compact(&client, 5).await;
    let mut watcher = Watcher::open(&client).await;
    watcher.begin(since("a", 4)).await;
    let canceled = watcher.next().await;
    assert!(canceled.canceled && !canceled.created);
    assert_eq!((canceled.watch_id, canceled.compact_revision), (0, 5));
    assert_eq!((revision(&canceled), &canceled.cancel_reason[..]), (0, ""));
    // From the compacted revision on, nothing is missing.
    watcher.begin(since("a", 5)).await;
    assert_eq!(watcher.revisions().await, [5, 6]);
    // Nor of a key that has not changed since.
    watcher.begin(since("still", 3)).await;
    let changed = put(&client, "still", "2").await;
    assert_eq!(watcher.revisions().await, [changed]);
}

#[tokio::test]
async fn progress_is_told_when_all_watchers_know_everything() {
    let (_directory, _node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    // Without a watcher there is nothing to say.
    watcher.ask_progress().await;
    watcher.begin(key("a")).await;
    put(&client, "b", "1").await;
    watcher.ask_progress().await;
    let told = watcher.next().await;
    assert_eq!((told.watch_id, revision(&told)), (-1, 2));
    assert!(told.events.is_empty() && !told.created && !told.canceled);
    // One that begins later knows nothing yet.
    let (later, _) = watcher.begin(since("a", 9)).await;
    watcher.ask_progress().await;
    watcher.cancel(later).await;
    assert!(watcher.next().await.canceled);
    watcher.ask_progress().await;
    assert_eq!(watcher.next().await.watch_id, -1);
}

#[tokio::test]
async fn a_quiet_watcher_hears_now_and_then_how_far_it_has_come() {
    let directory = Directory::new();
    let mut options = alone(&directory);
    options.watch_progress_notify_interval_ms = 100;
    let node = Node::start(&options).unwrap();
    node.await_ready();
    let client = node.connect().await;
    let mut watcher = Watcher::open(&client).await;
    watcher.begin(key("b")).await;
    let create = WatchCreateRequest {
        progress_notify: true,
        ..key("a")
    };
    watcher.begin(create).await;
    let other = put(&client, "c", "1").await;
    loop {
        let told = watcher.next().await;
        assert_eq!((told.watch_id, told.events.len()), (1, 0));
        if revision(&told) == other {
            break;
        }
    }
}

#[tokio::test]
async fn events_go_on_after_the_client_has_asked_for_everything() {
    let (_directory, _node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    watcher.begin(key("a")).await;
    watcher.requests = None;
    for expected in 2..5 {
        put(&client, "a", "1").await;
        assert_eq!(watcher.revisions().await, [expected]);
    }
}

#[tokio::test]
async fn a_large_response_comes_in_parts_if_that_is_wanted() {
    let (_directory, _node, client) = started().await;
    put(&client, "a", &"x".repeat(900_000)).await;
    put(&client, "b", &"y".repeat(1_400_000)).await;
    let mut watcher = Watcher::open(&client).await;
    for fragment in [false, true] {
        let create = WatchCreateRequest {
            range_end: "\0".into(),
            start_revision: 2,
            fragment,
            ..key("a")
        };
        watcher.begin(create).await;
        let first = watcher.next().await;
        assert_eq!(first.fragment, fragment);
        assert_eq!(first.events.len(), if fragment { 1 } else { 2 });
    }
    let last = watcher.next().await;
    assert_eq!(
        (last.fragment, last.events.len(), revision(&last)),
        (false, 1, 3)
    );
}

#[tokio::test]
async fn who_reads_late_still_reads_everything() {
    let (_directory, node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    watcher.begin(key("a")).await;
    // Another connection: this one is full before long.
    let writer = node.connect().await;
    let value = "x".repeat(400_000);
    let mut last = 0;
    for _ in 0..60 {
        last = put(&writer, "a", &value).await;
    }
    let page = get(node.client(), "/metrics").1;
    assert!(page.contains("conclave_watchers_behind 1"), "{page}");
    let mut told = vec![];
    while told.last() != Some(&last) {
        told.extend(watcher.revisions().await);
    }
    assert_eq!(told, (2..=last).collect::<Vec<_>>());
    put(&writer, "a", "1").await;
    assert_eq!(watcher.revisions().await, [last + 1]);
    let page = get(node.client(), "/metrics").1;
    assert!(page.contains("conclave_watchers_behind 0"), "{page}");
    assert!(page.contains("conclave_watch_events_total 61"), "{page}");
}

#[tokio::test]
async fn streams_that_are_gone_leave_no_watchers_behind() {
    let (_directory, node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    for _ in 0..3 {
        watcher.begin(key("a")).await;
    }
    let watchers = |count: u32| {
        let page = get(node.client(), "/metrics").1;
        page.contains(&format!("\nconclave_watchers {count}\n"))
    };
    assert!(watchers(3));
    drop(watcher);
    // The connection of this client is served by this thread, too.
    let gone = async {
        while !watchers(0) {
            time::sleep(Duration::from_millis(20)).await;
        }
    };
    time::timeout(PATIENCE, gone).await.expect("they go");
}

#[tokio::test]
async fn a_server_that_stops_says_so() {
    let (_directory, node, client) = started().await;
    let mut watcher = Watcher::open(&client).await;
    watcher.begin(key("a")).await;
    node.request_stop();
    let end = watcher.outcome().await.unwrap_err();
    assert_eq!(
        (end.code(), end.message()),
        (Code::Unavailable, "etcdserver: server stopped")
    );
}

#[tokio::test]
async fn who_wants_a_leader_is_told_when_there_is_none() {
    let directory = Directory::new();
    let options = harness::three(&directory).remove(0);
    let node = Node::start(&options).unwrap();
    let client = node.connect().await;
    let wants = |request: &mut Request<_>| {
        let yes = "true".parse().unwrap();
        request.metadata_mut().insert("hasleader", yes);
    };
    let Err(refused) = Watcher::open_with(&client, wants).await else {
        panic!("there is no leader");
    };
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::Unavailable, "etcdserver: no leader")
    );
}
