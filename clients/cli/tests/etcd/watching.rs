//! A watch stream of a case, and everything that has come on it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use conclave_proto::etcd::{
    etcdserverpb::{
        WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
        watch_client::WatchClient, watch_request::RequestUnion,
    },
    mvccpb::Event,
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::{
    names::{Names, Shown as _},
    soon,
    step::terse,
};

/// The id of the watch that every stream begins with: an event of it tells that the
/// stream has come so far.
pub const FENCE: i64 = 7777;
/// The key that it watches.
pub const FENCE_KEY: &[u8] = b"~fence";

/// What has come, by watch, in order. Events are flat: how many revisions a response
/// has depends on time.
#[derive(Debug, Default)]
pub struct Arrived {
    log: BTreeMap<i64, Vec<Line>>,
    /// The responses that only answer requests, as they came.
    controls: Vec<WatchResponse>,
    fenced: i64,
    ended: bool,
    /// What no server may do.
    pub wrong: Vec<String>,
    /// By watch, the revision of its newest event, and whether more of it must come.
    newest: BTreeMap<i64, (i64, bool)>,
}

#[derive(Clone, Debug)]
enum Line {
    Control(WatchResponse),
    Event(Event),
}

pub struct Watching {
    requests: mpsc::Sender<WatchRequest>,
    arrived: Arc<Mutex<Arrived>>,
    /// The highest revision that a watch of it begins at.
    last_start: AtomicI64,
    reader: JoinHandle<()>,
}

impl Watching {
    /// A new stream with its fence.
    pub async fn open(channel: Channel) -> Self {
        let (requests, receiver) = mpsc::channel(64);
        let arrived = Arc::new(Mutex::new(Arrived::default()));
        let log = arrived.clone();
        let reader = tokio::spawn(async move {
            let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
            let mut stream = match client.watch(ReceiverStream::new(receiver)).await {
                Ok(response) => response.into_inner(),
                Err(status) => return log.lock().unwrap().ended(&status),
            };
            loop {
                match stream.message().await {
                    Ok(Some(response)) => log.lock().unwrap().take(response),
                    Ok(None) => return log.lock().unwrap().ended(&tonic::Status::ok("")),
                    Err(status) => return log.lock().unwrap().ended(&status),
                }
            }
        });
        let stream = Self {
            requests,
            arrived,
            last_start: AtomicI64::new(0),
            reader,
        };
        let fence = WatchCreateRequest {
            key: FENCE_KEY.into(),
            watch_id: FENCE,
            ..WatchCreateRequest::default()
        };
        stream.create(fence).await;
        stream
    }

    async fn ask(&self, union: RequestUnion) {
        let request = WatchRequest {
            request_union: Some(union),
        };
        // A stream that has ended takes nothing more, and has told so.
        self.requests.send(request).await.ok();
    }

    /// Asks, and waits for the answer; none if the stream is broken.
    async fn answered(&self, union: RequestUnion) -> Option<WatchResponse> {
        let before = self.with(|arrived| arrived.controls.len());
        self.ask(union).await;
        soon(|| async {
            self.with(|arrived| match arrived.controls.get(before) {
                None if arrived.ended => Some(None),
                answer => answer.cloned().map(Some),
            })
        })
        .await
        .flatten()
    }

    /// Whether a watch may not have begun yet, as far as the fence tells.
    pub fn begins_later(&self) -> bool {
        let last = self.last_start.load(Ordering::Relaxed);
        self.with(|arrived| last > arrived.fenced)
    }

    pub fn has_a_past(&self) -> bool {
        self.last_start.load(Ordering::Relaxed) > 0
    }

    pub async fn create(&self, create: WatchCreateRequest) -> Option<WatchResponse> {
        self.last_start
            .fetch_max(create.start_revision, Ordering::Relaxed);
        self.answered(RequestUnion::CreateRequest(create)).await
    }

    /// Nothing answers if there is no such watch.
    pub async fn cancel(&self, id: i64) -> Option<WatchResponse> {
        let known = self.with(|arrived| arrived.is_there(id));
        let request = RequestUnion::CancelRequest(WatchCancelRequest { watch_id: id });
        if !known {
            self.ask(request).await;
            return None;
        }
        self.answered(request).await
    }

    pub async fn progress(&self) -> Option<WatchResponse> {
        let request = RequestUnion::ProgressRequest(WatchProgressRequest {});
        self.answered(request).await
    }

    /// Waits until the event of the fence at this revision has come, unless it never
    /// does.
    pub async fn fenced(&self, revision: i64) {
        soon(|| async {
            self.with(|arrived| (arrived.ended || arrived.fenced >= revision).then_some(()))
        })
        .await;
    }

    pub fn with<T>(&self, look: impl FnOnce(&Arrived) -> T) -> T {
        look(&self.arrived.lock().unwrap())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Arrived {
    /// Everything, in the case's names: by watch, in order.
    pub fn shown(&self, names: &Names) -> Vec<String> {
        let mut all = Vec::new();
        for (id, log) in &self.log {
            for line in log {
                let shown = match line.clone() {
                    Line::Control(mut response) => {
                        response.shown(names);
                        format!("{response:?}")
                    }
                    Line::Event(mut event) => {
                        event.shown(names);
                        format!("{event:?}")
                    }
                };
                all.push(format!("watch {id}: {}", terse(&shown)));
            }
        }
        all.extend(self.wrong.iter().map(|line| format!("WRONG: {line}")));
        all
    }

    fn ended(&mut self, status: &tonic::Status) {
        let (code, text) = (status.code(), status.message());
        self.wrong.push(format!("ended with {code:?} {text}"));
        self.ended = true;
    }

    fn take(&mut self, response: WatchResponse) {
        self.check(&response);
        let id = response.watch_id;
        let current = response.header.as_ref().map_or(0, |header| header.revision);
        let control = response.created || response.canceled || response.events.is_empty();
        let log = self.log.entry(id).or_default();
        if control {
            log.push(Line::Control(response.clone()));
            // A watch behind the compacted revision ends unasked.
            if response.compact_revision == 0 {
                self.controls.push(response);
            }
            return;
        }
        if id == FENCE {
            self.fenced = current;
        }
        log.extend(response.events.into_iter().map(Line::Event));
    }

    /// What holds for every response, whatever was asked.
    fn check(&mut self, response: &WatchResponse) {
        let id = response.watch_id;
        let header = response.header.as_ref().map_or(0, |header| header.revision);
        let (mut newest, open) = self.newest.get(&id).copied().unwrap_or_default();
        for (at, event) in response.events.iter().enumerate() {
            let revision = event.kv.as_ref().map_or(0, |kv| kv.mod_revision);
            let parted = at == 0 && revision == newest && !open;
            if revision < newest || parted || revision > header {
                let told = format!("{revision} after {newest} in a response at {header}");
                self.wrong.push(format!("watch {id}: {told}"));
            }
            newest = revision;
        }
        self.newest.insert(id, (newest, response.fragment));
    }

    /// Whether there is a watch to cancel; also if a compaction has cancelled it.
    fn is_there(&self, id: i64) -> bool {
        let of = |what: fn(&WatchResponse) -> bool| {
            let controls = self.controls.iter();
            controls.filter(|c| c.watch_id == id && what(c)).count()
        };
        of(|c| c.created && !c.canceled) > of(|c| c.canceled)
    }
}
