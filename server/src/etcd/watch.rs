//! `etcdserverpb.Watch`: any number of watchers on a stream.
//!
//! What they are told is decided on the node's thread ([`conclave_core::watch`]); here
//! it gets the forms of the wire. A stream is polled by the connection that sends it:
//! so who does not read holds up nothing but his own stream.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use conclave_core::{
    ids::Revision,
    keyspace::{Event, Interest, KeyRange},
    limits,
    replica::Failure,
    watch::{self, Notice, WatcherId},
};
use conclave_proto::etcd::{
    etcdserverpb::{
        WatchCreateRequest, WatchRequest, WatchResponse, watch_create_request::FilterType,
        watch_request::RequestUnion, watch_server::Watch,
    },
    mvccpb::{self, KeyValue, event::EventType},
};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use prost::Message as _;
use tokio::time::{self, Instant, Interval, MissedTickBehavior};
use tonic::{Code, Request, Response, Status, Streaming};

use super::{Etcd, kv::key_value, signed, status, status::Error};
use crate::{
    metrics::{Counted, Method},
    readers::Reader,
    routes::REQUEST_OVERHEAD_BYTES,
    status::Refusal,
};

/// In place of the name of a watcher: of a response that is about none.
const NO_WATCHER: i64 = -1;
/// Watchers of a stream that have not begun yet.
const CREATING_MAX: usize = 1_024;
/// After a request was refused because of overload.
const RETRY_AFTER: Duration = Duration::from_millis(10);

const DUPLICATE_ID: &str = "mvcc: duplicate watch ID provided on the WatchStream";
const EMPTY_RANGE: &str = "mvcc: watcher range is empty";
/// With the prefix of errors on the wire, and unlike the others: clients look for it so.
const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct WatchService(pub(super) Etcd);

#[async_trait]
impl Watch for WatchService {
    type WatchStream = Counted<BoxStream<'static, Result<WatchResponse, Status>>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let etcd = &self.0;
        let open = |requests, wants_leader| async move {
            let serving = Serving::new(etcd.clone(), requests, wants_leader);
            Ok(serving.into_stream().boxed())
        };
        etcd.stream(Method::Watch, request, open).await
    }
}

/// One stream.
struct Serving {
    etcd: Etcd,
    reader: Reader,
    /// Until the client has closed its half. The watchers live on.
    requests: Option<Streaming<WatchRequest>>,
    watchers: BTreeMap<WatcherId, Watched>,
    /// Those that the client has not cancelled, by their names on the wire; also what a
    /// compaction has cancelled, whose name stays taken.
    named: BTreeMap<i64, WatcherId>,
    next_name: i64,
    /// What was asked for and not yet told to have begun, in order: clients tell the
    /// answers apart by it.
    creating: VecDeque<Creating>,
    /// To be sent, in order.
    ready: VecDeque<WatchResponse>,
    /// Taken in and not yet reported, in bytes.
    consumed: u64,
    /// Once some watcher wants to hear that nothing has happened.
    progress: Option<Interval>,
    is_over: Pin<Box<dyn Future<Output = Failure> + Send>>,
}

/// A watcher, as the wire has it.
#[derive(Clone, Copy, Debug)]
struct Watched {
    name: i64,
    prev_kv: bool,
    fragment: bool,
    progress_notify: bool,
    /// Nothing was told since the last look.
    is_quiet: bool,
}

#[derive(Debug)]
enum Creating {
    Asked(WatcherId),
    /// Was refused, behind what was asked for before.
    Refused(WatchResponse),
}

impl Serving {
    fn new(etcd: Etcd, requests: Streaming<WatchRequest>, wants_leader: bool) -> Self {
        let is_over = Arc::clone(&etcd.0).is_over(wants_leader);
        Self {
            reader: etcd.reader(),
            etcd,
            requests: Some(requests),
            watchers: BTreeMap::new(),
            named: BTreeMap::new(),
            next_name: 0,
            creating: VecDeque::new(),
            ready: VecDeque::new(),
            consumed: 0,
            progress: None,
            is_over: Box::pin(is_over),
        }
    }

    fn into_stream(self) -> impl stream::Stream<Item = Result<WatchResponse, Status>> {
        stream::unfold(Some(self), |serving| async move {
            let mut serving = serving?;
            match serving.next().await {
                Ok(response) => Some((Ok(response), Some(serving))),
                Err(status) => (status.code() != Code::Cancelled).then_some((Err(status), None)),
            }
        })
    }

    /// The next response. An error ends the stream.
    async fn next(&mut self) -> Result<WatchResponse, Status> {
        loop {
            if let Some(response) = self.ready.pop_front() {
                return Ok(response);
            }
            let asks = self.creating.len() < CREATING_MAX;
            tokio::select! {
                notice = self.reader.next() => self.told(notice)?,
                request = asked(&mut self.requests), if asks && self.requests.is_some() => {
                    match request? {
                        Some(request) => self.asked(request).await?,
                        None => self.requests = None,
                    }
                }
                () = tick(&mut self.progress), if self.progress.is_some() => {
                    self.ask_quiet_ones()?;
                }
                failure = &mut self.is_over => return Err(failed(failure)),
            }
        }
    }

    async fn asked(&mut self, request: WatchRequest) -> Result<(), Status> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create).await,
            Some(RequestUnion::CancelRequest(cancel)) => {
                match self.named.remove(&cancel.watch_id) {
                    Some(watcher) if self.watchers.contains_key(&watcher) => {
                        self.ask(watch::Request::Cancel { watcher })
                    }
                    // As in etcd, one that a compaction has cancelled can be cancelled.
                    Some(_) => {
                        let revision = self.etcd.handle.status().revision;
                        let response = WatchResponse {
                            canceled: true,
                            ..self.response(cancel.watch_id, revision)
                        };
                        self.ready.push_back(response);
                        Ok(())
                    }
                    None => Ok(()),
                }
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                let stream = self.reader.id();
                self.ask_patiently(watch::Request::Progress { stream })
                    .await
            }
            None => Ok(()),
        }
    }

    async fn create(&mut self, create: WatchCreateRequest) -> Result<(), Status> {
        let name = create.watch_id;
        if let Some(reason) = refused(&create) {
            self.refuse(reason);
            return Ok(());
        }
        let name = match name {
            0 => self.free_name(),
            name if self.named.contains_key(&name) => {
                self.refuse(DUPLICATE_ID);
                return Ok(());
            }
            name => name,
        };
        let watcher = self.reader.watcher();
        let watched = Watched {
            name,
            prev_kv: create.prev_kv,
            fragment: create.fragment,
            progress_notify: create.progress_notify,
            is_quiet: true,
        };
        self.watchers.insert(watcher, watched);
        self.named.insert(name, watcher);
        self.creating.push_back(Creating::Asked(watcher));
        if create.progress_notify && self.progress.is_none() {
            self.progress = Some(self.interval());
        }
        let start = u64::try_from(create.start_revision).unwrap_or_default();
        let request = watch::Request::Create {
            stream: self.reader.id(),
            watcher,
            of: interest(create),
            start: (start > 0).then_some(start),
        };
        self.ask_patiently(request).await
    }

    fn free_name(&mut self) -> i64 {
        while self.named.contains_key(&self.next_name) {
            self.next_name += 1;
        }
        self.next_name += 1;
        self.next_name - 1
    }

    /// Says so when all that was asked for before has begun.
    fn refuse(&mut self, reason: &str) {
        let response = WatchResponse {
            created: true,
            canceled: true,
            cancel_reason: reason.to_owned(),
            ..self.response(NO_WATCHER, self.etcd.handle.status().revision)
        };
        self.creating.push_back(Creating::Refused(response));
        self.tell_refused();
    }

    fn tell_refused(&mut self) {
        while let Some(Creating::Refused(_)) = self.creating.front() {
            if let Some(Creating::Refused(response)) = self.creating.pop_front() {
                self.ready.push_back(response);
            }
        }
    }

    fn told(&mut self, notice: Notice) -> Result<(), Status> {
        match notice {
            Notice::Created { watcher, revision } => {
                let first = self.creating.pop_front();
                debug_assert!(matches!(first, Some(Creating::Asked(asked)) if asked == watcher));
                if let Some(watched) = self.watchers.get(&watcher) {
                    let response = WatchResponse {
                        created: true,
                        ..self.response(watched.name, revision)
                    };
                    self.ready.push_back(response);
                }
                self.tell_refused();
            }
            Notice::Events {
                watcher,
                revision,
                events,
                bytes,
            } => {
                self.consume(bytes)?;
                if let Some(watched) = self.watchers.get_mut(&watcher) {
                    watched.is_quiet = false;
                    let watched = *watched;
                    self.tell_events(watched, revision, &events);
                }
            }
            Notice::Canceled { watcher, compacted } => {
                let Some(watched) = self.watchers.remove(&watcher) else {
                    return Ok(());
                };
                let revision = match compacted {
                    Some(_) => 0,
                    None => self.etcd.handle.status().revision,
                };
                let response = WatchResponse {
                    canceled: true,
                    compact_revision: compacted.map_or(0, signed),
                    ..self.response(watched.name, revision)
                };
                self.ready.push_back(response);
            }
            Notice::Progress { watcher, revision } => {
                let name = match watcher {
                    Some(watcher) => self.watchers.get(&watcher).map(|watched| watched.name),
                    None => Some(NO_WATCHER),
                };
                let response = name.map(|name| self.response(name, revision));
                self.ready.extend(response);
            }
            Notice::Refused { .. } => return Err(Error::Behind.into_status()),
        }
        Ok(())
    }

    fn tell_events(&mut self, watched: Watched, revision: Revision, events: &[Event]) {
        let events = events.iter().map(|event| wire(event, watched.prev_kv));
        let response = WatchResponse {
            events: events.collect(),
            ..self.response(watched.name, revision)
        };
        let bytes_max = self.etcd.settings.max_request_bytes + REQUEST_OVERHEAD_BYTES;
        if watched.fragment && response.encoded_len() >= bytes_max {
            self.ready.extend(fragments(response, bytes_max));
        } else {
            self.ready.push_back(response);
        }
    }

    fn response(&self, name: i64, revision: Revision) -> WatchResponse {
        let term = self.etcd.handle.status().term;
        WatchResponse {
            header: self.etcd.header(revision, term),
            watch_id: name,
            ..WatchResponse::default()
        }
    }

    /// So that the node goes on with what it holds back.
    fn consume(&mut self, bytes: u64) -> Result<(), Status> {
        self.consumed += bytes;
        if self.consumed < limits::WATCH_QUEUE_BYTES_MAX / 4 {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.consumed);
        let stream = self.reader.id();
        self.ask(watch::Request::Consumed { stream, bytes })
    }

    fn ask_quiet_ones(&mut self) -> Result<(), Status> {
        let wanting = self.watchers.iter_mut();
        let wanting = wanting.filter(|(_, watched)| watched.progress_notify);
        let mut quiet = Vec::new();
        for (watcher, watched) in wanting {
            if std::mem::replace(&mut watched.is_quiet, true) {
                quiet.push(*watcher);
            }
        }
        for watcher in quiet {
            match self.reader.ask(watch::Request::ProgressOf { watcher }) {
                // There is another time.
                Ok(()) | Err(Failure::Overloaded) => {}
                Err(failure) => return Err(failed(failure)),
            }
        }
        Ok(())
    }

    fn ask(&self, request: watch::Request) -> Result<(), Status> {
        self.reader.ask(request).map_err(failed)
    }

    /// Waits for its turn if there is too much to do. Meanwhile the stream stands still.
    async fn ask_patiently(&mut self, request: watch::Request) -> Result<(), Status> {
        loop {
            match self.reader.ask(request.clone()) {
                Err(Failure::Overloaded) => time::sleep(RETRY_AFTER).await,
                outcome => return outcome.map_err(failed),
            }
        }
    }

    /// Up to a tenth longer than it is set to, so that streams which began together
    /// are not all told at once.
    fn interval(&self) -> Interval {
        let period = Duration::from_millis(self.etcd.settings.watch_progress_ms);
        let spread = u32::try_from(self.reader.id().0 % 64).unwrap_or_default();
        let period = period + period / 640 * spread;
        let mut interval = time::interval_at(Instant::now() + period, period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval
    }
}

async fn asked(
    requests: &mut Option<Streaming<WatchRequest>>,
) -> Result<Option<WatchRequest>, Status> {
    let Some(requests) = requests else {
        return Ok(None);
    };
    let told = requests.message().await;
    told.map_err(|error| status::too_long(&error).unwrap_or(error))
}

async fn tick(progress: &mut Option<Interval>) {
    if let Some(progress) = progress {
        progress.tick().await;
    }
}

fn failed(failure: Failure) -> Status {
    Error::Refused(Refusal::Failed(failure)).into_status()
}

/// Why a watcher does not begin, if that can be told without looking at any other.
fn refused(create: &WatchCreateRequest) -> Option<&'static str> {
    if create.start_revision < 0 {
        return Some(COMPACTED);
    }
    let (key, end) = range(create);
    (!end.is_empty() && end != [0] && end <= key).then_some(EMPTY_RANGE)
}

/// The range as it is meant: an empty key is the first that there can be.
fn range(create: &WatchCreateRequest) -> (&[u8], &[u8]) {
    let key = if create.key.is_empty() {
        &[0]
    } else {
        &create.key[..]
    };
    (key, &create.range_end)
}

fn interest(create: WatchCreateRequest) -> Interest {
    let (key, end) = range(&create);
    // Copies: a watcher outlives by far the message that it came in.
    let range = KeyRange::new(Bytes::copy_from_slice(key), Bytes::copy_from_slice(end));
    let leaves_out = |kind: FilterType| create.filters.contains(&kind.into());
    Interest {
        range,
        puts: !leaves_out(FilterType::Noput),
        deletes: !leaves_out(FilterType::Nodelete),
    }
}

fn wire(event: &Event, prev_kv: bool) -> mvccpb::Event {
    let (kind, kv) = match &event.after {
        Some(after) => (EventType::Put, key_value(after.clone())),
        None => {
            let deleted = KeyValue {
                key: event.key.clone(),
                mod_revision: signed(event.revision),
                ..KeyValue::default()
            };
            (EventType::Delete, deleted)
        }
    };
    let before = event.before.as_ref().filter(|_| prev_kv);
    mvccpb::Event {
        r#type: kind.into(),
        kv: Some(kv),
        prev_kv: before.cloned().map(key_value),
    }
}

/// A response in parts that are shorter than this, unless a single event is not.
fn fragments(mut whole: WatchResponse, bytes_max: usize) -> Vec<WatchResponse> {
    let events = std::mem::take(&mut whole.events);
    whole.fragment = true;
    let empty = whole.encoded_len();
    let mut parts = vec![whole.clone()];
    let mut bytes = empty;
    for event in events {
        let length = event.encoded_len();
        // With its tag and its length.
        let takes = 1 + prost::length_delimiter_len(length) + length;
        let last = parts.last_mut().expect("there is always one");
        if !last.events.is_empty() && bytes + takes >= bytes_max {
            parts.push(whole.clone());
            bytes = empty;
        }
        bytes += takes;
        let last = parts.last_mut().expect("there is always one");
        last.events.push(event);
    }
    if let Some(last) = parts.last_mut() {
        last.fragment = false;
    }
    parts
}
