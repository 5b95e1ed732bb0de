//! The watchers of a node against a naive model: whatever is asked for, written,
//! compacted and read slowly, each watcher is told exactly what it asked for of the
//! history, or that this is not known any more.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use conclave_core::{
    ids::Revision,
    keyspace::{Event, Interest, KeyRange, Keyspace, Overlay},
    limits,
    watch::{Hub, Notice, Notices, Request, StreamId, WatcherId},
};
use proptest::prelude::*;

/// So long that a few of them fill the queue of a stream.
static LONG: [u8; 150_000] = [7; 150_000];
const STREAMS: u64 = 3;

#[derive(Clone, Debug)]
enum Write {
    Put { key: Bytes, long: bool },
    Delete { key: Bytes, end: Bytes },
}

#[derive(Clone, Debug)]
enum Step {
    /// Entries with one command each, in one turn.
    Write(Vec<Vec<Write>>),
    /// Compacts so far below the newest revision, and sweeps.
    Compact(u64, usize),
    /// Begins a watcher: so far below the next revision; far below 0 is later.
    Create(u64, Interest, Option<i64>),
    Cancel(prop::sample::Index),
    Progress(u64),
    ProgressOf(prop::sample::Index),
    /// A stream reads some of what it was told.
    Read(u64, usize),
    CatchUp,
    /// Another keyspace, with changes that were never shown.
    Install(Vec<Vec<Write>>),
    Close(u64),
}

fn key() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["a", "a/1", "a/2", "b", "c"]).prop_map(Bytes::from)
}

fn end() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["", "", "\0", "a0", "b", "d"]).prop_map(Bytes::from)
}

fn entries() -> impl Strategy<Value = Vec<Vec<Write>>> {
    let write = prop_oneof![
        4 => (key(), prop::bool::weighted(0.3)).prop_map(|(key, long)| Write::Put { key, long }),
        1 => (key(), end()).prop_map(|(key, end)| Write::Delete { key, end }),
    ];
    prop::collection::vec(prop::collection::vec(write, 1..4), 1..4)
}

fn step() -> impl Strategy<Value = Step> {
    let of = (
        key(),
        end(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.8),
    )
        .prop_map(|(key, end, puts, deletes)| Interest {
            range: KeyRange::new(key, end),
            puts,
            deletes,
        });
    let which = any::<prop::sample::Index>;
    prop_oneof![
        8 => entries().prop_map(Step::Write),
        1 => (0..12u64, 0..6usize).prop_map(|(back, sweep)| Step::Compact(back, sweep)),
        5 => (0..STREAMS, of, prop::option::of(-5..25i64))
            .prop_map(|(stream, of, back)| Step::Create(stream, of, back)),
        1 => which().prop_map(Step::Cancel),
        1 => (0..STREAMS).prop_map(Step::Progress),
        1 => which().prop_map(Step::ProgressOf),
        3 => (0..STREAMS, 0..4usize).prop_map(|(stream, notices)| Step::Read(stream, notices)),
        3 => Just(Step::CatchUp),
        1 => entries().prop_map(Step::Install),
        1 => (0..STREAMS).prop_map(Step::Close),
    ]
}

/// What a reader knows of one of its watchers.
#[derive(Debug)]
struct Reader {
    stream: StreamId,
    of: Interest,
    start: Option<Revision>,
    /// Told everything up to here, once it has begun.
    upto: Option<Revision>,
}

fn everything() -> Interest {
    Interest {
        range: KeyRange::prefix(b""),
        puts: true,
        deletes: true,
    }
}

fn delete_range(overlay: &mut Overlay<'_>, range: &KeyRange) {
    let records = overlay.range(range);
    let keys: Vec<Bytes> = records.map(|record| record.key.clone()).collect();
    for key in keys {
        overlay.delete(&key);
    }
}

struct World {
    keyspace: Keyspace,
    hub: Hub,
    /// Every event that ever was.
    history: Vec<Event>,
    readers: BTreeMap<WatcherId, Reader>,
    /// What was told and not read, by stream: bytes of each notice.
    unread: BTreeMap<StreamId, Vec<u64>>,
    /// Names that streams have by now.
    streams: [StreamId; STREAMS as usize],
    last_id: u64,
}

impl World {
    fn new() -> Self {
        let keyspace = Keyspace::new();
        Self {
            hub: Hub::new(keyspace.revision(), limits::WATCH_QUEUE_BYTES_MAX),
            keyspace,
            history: Vec::new(),
            readers: BTreeMap::new(),
            unread: BTreeMap::new(),
            streams: [0, 1, 2].map(StreamId),
            last_id: STREAMS,
        }
    }

    fn id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn write(&mut self, writes: &[Write]) {
        let mut overlay = self.keyspace.overlay();
        for write in writes {
            match write.clone() {
                Write::Put { key, long } => {
                    let value = if long { &LONG[..] } else { b"short" };
                    overlay.put(key, Bytes::from_static(value), None);
                }
                Write::Delete { key, end } => {
                    delete_range(&mut overlay, &KeyRange::new(key, end));
                }
            }
        }
        let before = self.keyspace.revision();
        let writes = overlay.into_writes();
        self.keyspace.keep(writes);
        if self.keyspace.revision() > before {
            let told = self
                .keyspace
                .events_since(&everything(), before + 1, usize::MAX, u64::MAX);
            self.history.extend(told.events);
        }
    }

    fn step(&mut self, step: &Step) {
        let mut out = Notices::new();
        match step {
            Step::Write(entries) => {
                for writes in entries {
                    // As an entry does.
                    self.keyspace.sweep(3);
                    self.write(writes);
                    self.hub.advance(&self.keyspace, &mut out);
                }
            }
            Step::Compact(back, sweep) => {
                let at = self.keyspace.revision().saturating_sub(*back);
                self.keyspace.compact(at).ok();
                self.keyspace.sweep(*sweep);
            }
            Step::Create(stream, of, back) => self.create(*stream, of, *back, &mut out),
            Step::Cancel(which) => {
                if let Some(watcher) = self.choose(which) {
                    self.take(Request::Cancel { watcher }, &mut out);
                    let reader = self.readers.get(&watcher);
                    let stream = reader.expect("it was chosen of these").stream;
                    let last = Notice::Canceled {
                        watcher,
                        compacted: None,
                    };
                    assert_eq!(out, [(stream, last)]);
                }
            }
            Step::Progress(stream) => {
                let stream = self.streams[*stream as usize];
                self.take(Request::Progress { stream }, &mut out);
            }
            Step::ProgressOf(which) => {
                if let Some(watcher) = self.choose(which) {
                    self.take(Request::ProgressOf { watcher }, &mut out);
                }
            }
            Step::Read(stream, notices) => {
                self.read(self.streams[*stream as usize], *notices, &mut out)
            }
            Step::CatchUp => self.hub.catch_up(&self.keyspace, &mut out),
            Step::Install(entries) => {
                for writes in entries {
                    self.write(writes);
                    self.keyspace.sweep(3);
                }
                self.hub.install(&self.keyspace);
            }
            Step::Close(stream) => {
                let id = StreamId(self.id());
                let closed = std::mem::replace(&mut self.streams[*stream as usize], id);
                self.take(Request::Close { stream: closed }, &mut out);
                self.unread.remove(&closed);
                self.readers.retain(|_, reader| reader.stream != closed);
            }
        }
        self.check(out);
    }

    fn create(&mut self, stream: u64, of: &Interest, back: Option<i64>, out: &mut Notices) {
        let stream = self.streams[stream as usize];
        let watcher = WatcherId(self.id());
        let next = self.keyspace.revision() + 1;
        let start = back.map(|back| next.saturating_add_signed(-back).max(1));
        let of = of.clone();
        let reader = Reader {
            stream,
            of: of.clone(),
            start,
            upto: None,
        };
        self.readers.insert(watcher, reader);
        let create = Request::Create {
            stream,
            watcher,
            of,
            start,
        };
        self.take(create, out);
        let at_once = start.is_some_and(|start| start + 1 >= next && start <= next);
        if start.is_none() || at_once && !self.is_full(stream) {
            // Nothing that comes next is late: it is live at once.
            let before = out.len();
            self.take(Request::ProgressOf { watcher }, out);
            assert_eq!(out.len(), before + 1, "{start:?} at {next}");
        }
    }

    fn is_full(&self, stream: StreamId) -> bool {
        let unread = self.unread.get(&stream).into_iter().flatten();
        unread.sum::<u64>() >= limits::WATCH_QUEUE_BYTES_MAX / 4
    }

    fn choose(&self, which: &prop::sample::Index) -> Option<WatcherId> {
        let ids: Vec<_> = self.readers.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[which.index(ids.len())])
    }

    fn take(&mut self, request: Request, out: &mut Notices) {
        self.hub.take(request, &self.keyspace, out);
    }

    fn read(&mut self, stream: StreamId, notices: usize, out: &mut Notices) {
        let unread = self.unread.entry(stream).or_default();
        let read = unread.drain(..notices.min(unread.len()));
        let bytes = read.sum();
        self.take(Request::Consumed { stream, bytes }, out);
    }

    /// What a reader is to be told of these revisions.
    fn expected(&self, reader: &Reader, from: Revision, upto: Revision) -> Vec<Event> {
        let events = self.history.iter();
        let events = events.filter(|event| (from..=upto).contains(&event.revision));
        let events = events.filter(|event| reader.of.range.contains(&event.key));
        events
            .filter(|event| reader.of.takes_event(event))
            .cloned()
            .collect()
    }

    fn check(&mut self, out: Notices) {
        for (stream, notice) in out {
            match notice {
                Notice::Created { watcher, revision } => {
                    assert_eq!(revision, self.keyspace.revision());
                    let reader = self.readers.get_mut(&watcher).expect("it asked");
                    assert_eq!((reader.stream, reader.upto), (stream, None));
                    reader.upto = Some(reader.start.map_or(revision, |start| start - 1));
                }
                Notice::Events {
                    watcher,
                    revision,
                    events,
                    bytes,
                } => {
                    let unread = self.unread.entry(stream).or_default();
                    assert!(unread.iter().sum::<u64>() < limits::WATCH_QUEUE_BYTES_MAX);
                    unread.push(bytes);
                    self.told(watcher, revision, &events);
                }
                Notice::Canceled {
                    watcher,
                    compacted: None,
                } => {
                    self.readers.remove(&watcher).expect("it was there");
                }
                Notice::Canceled {
                    watcher,
                    compacted: Some(compacted),
                } => {
                    let reader = self.readers.remove(&watcher).expect("it was there");
                    let next = reader.upto.expect("it has begun") + 1;
                    assert_eq!(compacted, self.keyspace.complete_from());
                    assert!(next < compacted);
                    assert!(!self.keyspace.knows_all(&reader.of, next));
                }
                Notice::Progress { watcher, revision } => {
                    assert_eq!(revision, self.keyspace.revision());
                    let all = self.readers.iter();
                    let all: BTreeSet<WatcherId> = all
                        .filter(|(_, reader)| reader.stream == stream)
                        .map(|(id, _)| *id)
                        .collect();
                    assert!(!all.is_empty());
                    for id in all
                        .into_iter()
                        .filter(|id| watcher.is_none_or(|of| of == *id))
                    {
                        self.told(id, revision, &[]);
                    }
                }
                Notice::Refused { .. } => panic!("the hub refuses nobody"),
            }
        }
    }

    /// A watcher is told that these were all events up to a revision.
    fn told(&mut self, watcher: WatcherId, revision: Revision, events: &[Event]) {
        let reader = &self.readers[&watcher];
        let upto = reader
            .upto
            .expect("it has begun before it is told of anything");
        assert!(upto <= revision, "beyond {revision} already");
        let mut expected = self.expected(reader, upto + 1, revision);
        for (expected, event) in expected.iter_mut().zip(events) {
            if event.revision <= self.keyspace.compacted() && event.before.is_none() {
                expected.before = None;
            }
        }
        assert_eq!(events, expected);
        self.readers.get_mut(&watcher).expect("found above").upto = Some(revision);
    }

    /// Once everybody reads, everybody knows everything.
    fn finish(&mut self) {
        let mut out = Notices::new();
        loop {
            for stream in self.streams {
                self.read(stream, usize::MAX, &mut out);
            }
            if !self.hub.has_work() {
                break;
            }
            self.hub.catch_up(&self.keyspace, &mut out);
            self.check(std::mem::take(&mut out));
        }
        assert_eq!(self.hub.load().behind, 0);
        assert_eq!(self.hub.load().watchers, self.readers.len());
        let newest = self.keyspace.revision();
        for reader in self.readers.values() {
            let upto = reader.upto.expect("all have begun");
            assert_eq!(self.expected(reader, upto + 1, newest), []);
        }
        for stream in self.streams {
            let mut all = self
                .readers
                .values()
                .filter(|reader| reader.stream == stream);
            let starts = |reader: &Reader| reader.start.is_none_or(|start| start <= newest + 1);
            let is_synced = all.clone().next().is_some() && all.all(starts);
            self.take(Request::Progress { stream }, &mut out);
            assert_eq!(!out.is_empty(), is_synced);
            self.check(std::mem::take(&mut out));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_watcher_is_told_exactly_what_it_asked_for(steps in prop::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
        }
        world.finish();
    }
}

/// So many keys, made by one revision.
fn of_one_revision(keys: usize) -> Keyspace {
    let mut keyspace = Keyspace::new();
    let mut overlay = keyspace.overlay();
    for number in 0..keys {
        overlay.put(format!("{number:05}").into(), Bytes::new(), None);
    }
    let writes = overlay.into_writes();
    keyspace.keep(writes);
    keyspace
}

#[test]
fn a_revision_of_many_changes_is_told_to_many_over_many_turns() {
    const WATCHERS: u64 = 2_000;
    const KEYS: usize = 1_000;
    let mut keyspace = of_one_revision(KEYS);
    let mut hub = Hub::new(keyspace.revision(), limits::WATCH_QUEUE_BYTES_MAX);
    let mut notices = Notices::new();
    for id in 0..WATCHERS {
        let create = Request::Create {
            stream: StreamId(id),
            watcher: WatcherId(id),
            of: everything(),
            start: None,
        };
        hub.take(create, &keyspace, &mut notices);
    }
    let mut overlay = keyspace.overlay();
    delete_range(&mut overlay, &KeyRange::prefix(b""));
    let writes = overlay.into_writes();
    keyspace.keep(writes);
    let newest = keyspace.revision();
    let excerpt = keyspace.events_since(&everything(), newest, usize::MAX, u64::MAX);
    let deleted = excerpt.events;
    assert_eq!(deleted.len(), KEYS);

    let mut done = BTreeSet::new();
    let mut turn = |notices: &mut Notices, most: usize| {
        let mut told = 0;
        for (_, notice) in notices.drain(..) {
            if let Notice::Events {
                watcher, events, ..
            } = notice
            {
                assert!(*events == deleted && done.insert(watcher));
                told += events.len();
            }
        }
        assert!(told <= most, "{told} in one turn");
        done.len()
    };
    notices.clear();
    hub.advance(&keyspace, &mut notices);
    turn(&mut notices, limits::WATCH_TELLINGS_PER_TURN_MAX);
    let mut count = 0;
    while hub.has_work() {
        hub.catch_up(&keyspace, &mut notices);
        count = turn(&mut notices, limits::WATCH_CHANGES_PER_TURN_MAX + KEYS);
    }
    assert_eq!(count as u64, WATCHERS);
}

#[test]
fn watchers_that_begin_behind_a_revision_of_many_changes_take_their_share_of_a_turn() {
    const KEYS: usize = 10_000;
    let keyspace = of_one_revision(KEYS);
    let from = keyspace.revision();
    let one = Interest {
        range: KeyRange::new("00007".into(), Bytes::new()),
        ..everything()
    };
    let excerpt = keyspace.events_since(&one, from, usize::MAX, u64::MAX);
    assert_eq!(excerpt.events.len(), 1);
    assert!(excerpt.looked_at < 5, "{}", excerpt.looked_at);

    let mut hub = Hub::new(from, limits::WATCH_QUEUE_BYTES_MAX);
    let mut notices = Notices::new();
    for id in 0..100 {
        let create = Request::Create {
            stream: StreamId(id),
            watcher: WatcherId(id),
            of: everything(),
            start: Some(from),
        };
        hub.take(create, &keyspace, &mut notices);
    }
    let most = (limits::WATCH_CHANGES_PER_TURN_MAX + KEYS) as u64;
    assert!(hub.load().events <= most, "{:?}", hub.load());
    while hub.has_work() {
        hub.catch_up(&keyspace, &mut notices);
    }
    assert_eq!(hub.load().events, 100 * KEYS as u64);
}
