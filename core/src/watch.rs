//! Who is told which events: [`Hub`], the watchers of one node.
//!
//! A watcher is *live* when it has been told everything up to the newest revision:
//! then it is in an index by key, and hears of each revision when it is applied. One
//! that is *behind* is told from the history of the keyspace, some of it a turn, until
//! it is live. One whose reader does not keep up is *stalled*: once what waits for its
//! stream comes to what [`Hub::new`] was told, it is told nothing more; when the
//! stream has read half of that, it is behind. One that begins with a *later* revision
//! hears nothing before that. Whichever it is, only its next revision counts, and both
//! ways lead over the same events: so it is told each event once, in order, and all of
//! a revision together.
//!
//! What is applied is committed, so nothing is ever told that did not happen. What
//! happens is told only as long as it is known: a watcher that a compaction overtakes
//! is cancelled, and never told less without a word.

mod matcher;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    sync::Arc,
};

use bytes::Bytes;

use self::matcher::Matcher;
use crate::{
    ids::Revision,
    keyspace::{Event, Interest, Keyspace},
    limits,
};

/// Names a watcher. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WatcherId(pub u64);

/// Names a stream of one reader, which has any number of watchers. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// What a reader asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Begins a watcher.
    Create {
        /// Whose it is. A stream begins with its first watcher.
        stream: StreamId,
        /// Its name.
        watcher: WatcherId,
        /// Which events it is told.
        of: Interest,
        /// From which revision on; `None`: those that are yet to come.
        start: Option<Revision>,
    },
    /// Ends a watcher, which is told so if it is there.
    Cancel {
        /// Its name.
        watcher: WatcherId,
    },
    /// Asks how far a stream has come. Answered at once or not at all.
    Progress {
        /// Which.
        stream: StreamId,
    },
    /// Asks how far a watcher has come. Answered at once or not at all.
    ProgressOf {
        /// Which.
        watcher: WatcherId,
    },
    /// A stream has read this much of what it was told, by [`Notice::Events`].
    Consumed {
        /// Which.
        stream: StreamId,
        /// How much.
        bytes: u64,
    },
    /// Ends a stream with all its watchers, without a word.
    Close {
        /// Which.
        stream: StreamId,
    },
}

/// What a stream is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// A watcher has begun. Comes before all else about it.
    Created {
        /// Which.
        watcher: WatcherId,
        /// The newest revision then.
        revision: Revision,
    },
    /// Something happened.
    Events {
        /// Who is told.
        watcher: WatcherId,
        /// With these it has been told everything up to this revision.
        revision: Revision,
        /// In order; all of a revision.
        events: Arc<[Event]>,
        /// What they count for until they are read.
        bytes: u64,
    },
    /// The last word about a watcher.
    Canceled {
        /// Which.
        watcher: WatcherId,
        /// What it was to be told next is compacted, and this is the lowest revision of
        /// which all is known. `None`: it was asked to end.
        compacted: Option<Revision>,
    },
    /// Everything up to this revision has been told.
    Progress {
        /// To this watcher; `None`: to all of the stream.
        watcher: Option<WatcherId>,
        /// The newest.
        revision: Revision,
    },
    /// This node cannot begin a watcher now, and another may.
    Refused {
        /// Which.
        watcher: WatcherId,
    },
}

/// Notices on their way to streams.
pub type Notices = Vec<(StreamId, Notice)>;

/// How much there is to do and was done, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Watchers.
    pub watchers: usize,
    /// Those of them that are behind or stalled.
    pub behind: usize,
    /// Events that were told since the start, once for each who was.
    pub events: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Hub {
    /// Up to here live watchers have been told everything.
    seen: Revision,
    watchers: BTreeMap<WatcherId, Watcher>,
    streams: BTreeMap<StreamId, Stream>,
    live: Matcher,
    /// In turn. Some that are named are behind no longer.
    behind: VecDeque<WatcherId>,
    later: BTreeSet<(Revision, WatcherId)>,
    /// Events that live watchers may yet be told in this turn, each counted for
    /// everyone who is.
    tellings_left: usize,
    /// Changes that may yet be looked at in this turn for watchers that begin.
    at_once_left: usize,
    /// Bytes that wait for a stream at most, and the events of one revision more.
    queue_bytes_max: u64,
    /// Watchers that are behind or stalled.
    lagging: usize,
    told: u64,
}

#[derive(Debug)]
struct Watcher {
    stream: StreamId,
    of: Interest,
    /// The lowest revision that it has not been told, if it is not live.
    next: Revision,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Live,
    Behind,
    Stalled,
    Later,
}

#[derive(Debug, Default)]
struct Stream {
    watchers: BTreeSet<WatcherId>,
    /// Those that are not live.
    unsynced: usize,
    stalled: BTreeSet<WatcherId>,
    /// Bytes that it was told and has not read.
    unread: u64,
}

impl Hub {
    /// A hub without watchers, on a keyspace at this revision. So many bytes of events
    /// may wait for a stream, and the events of one revision more.
    pub fn new(seen: Revision, queue_bytes_max: u64) -> Self {
        Self {
            seen,
            watchers: BTreeMap::new(),
            streams: BTreeMap::new(),
            live: Matcher::default(),
            behind: VecDeque::new(),
            later: BTreeSet::new(),
            tellings_left: limits::WATCH_TELLINGS_PER_TURN_MAX,
            at_once_left: limits::WATCH_CHANGES_PER_TURN_MAX,
            queue_bytes_max,
            lagging: 0,
            told: 0,
        }
    }

    /// How much there is to do.
    pub fn load(&self) -> Load {
        Load {
            watchers: self.watchers.len(),
            behind: self.lagging,
            events: self.told,
        }
    }

    /// Whether some watcher could be told more at once.
    pub fn has_work(&self) -> bool {
        !self.behind.is_empty()
    }

    /// Does what a reader asks for. `keyspace` is the one that was shown last.
    pub fn take(&mut self, request: Request, keyspace: &Keyspace, out: &mut Notices) {
        match request {
            Request::Create {
                stream,
                watcher,
                of,
                start,
            } => {
                let next = start.unwrap_or(self.seen + 1);
                #[cfg(conclave_plant)]
                let next = match start {
                    Some(start) if crate::plant::is("resume-one-too-late") => start + 1,
                    _ => next,
                };
                self.create(stream, watcher, of, next, out);
                if self.stage_of(watcher) == Some(Stage::Behind) && self.at_once_left > 0 {
                    // Most have little to catch up on: they are live at once.
                    let max = limits::WATCH_CHANGES_AT_ONCE;
                    let looked_at = self.catch_up_one(watcher, max, keyspace, out);
                    self.at_once_left = self.at_once_left.saturating_sub(looked_at + 4);
                }
            }
            Request::Cancel { watcher } => self.cancel(watcher, None, out),
            Request::Progress { stream } => {
                let all = self.streams.get(&stream);
                #[cfg(conclave_plant)]
                if crate::plant::is("progress-too-early") {
                    let (watcher, revision) = (None, self.seen);
                    return out.push((stream, Notice::Progress { watcher, revision }));
                }
                if all.is_some_and(|all| all.unsynced == 0 && !all.watchers.is_empty()) {
                    let (watcher, revision) = (None, self.seen);
                    out.push((stream, Notice::Progress { watcher, revision }));
                }
            }
            Request::ProgressOf { watcher } => {
                if let Some(Watcher { stream, stage, .. }) = self.watchers.get(&watcher)
                    && *stage == Stage::Live
                {
                    let (watcher, revision) = (Some(watcher), self.seen);
                    out.push((*stream, Notice::Progress { watcher, revision }));
                }
            }
            Request::Consumed { stream, bytes } => self.consumed(stream, bytes),
            Request::Close { stream } => {
                let closed = self.streams.get_mut(&stream);
                let watchers = closed.map(|closed| mem::take(&mut closed.watchers));
                for watcher in watchers.unwrap_or_default() {
                    self.set_stage(watcher, Stage::Stalled);
                    self.watchers.remove(&watcher);
                    self.lagging -= 1;
                }
                self.streams.remove(&stream);
            }
        }
    }

    /// Tells live watchers what has happened since it was shown the keyspace last. To
    /// be called after each entry, before the next one sweeps.
    pub fn advance(&mut self, keyspace: &Keyspace, out: &mut Notices) {
        while self.seen < keyspace.revision() {
            if self.live.is_empty() && self.later.is_empty() {
                self.seen = keyspace.revision();
                return;
            }
            let revision = self.seen + 1;
            if !self.live.is_empty() {
                self.tell_live(revision, keyspace, out);
            }
            self.seen = revision;
            self.begin_later();
        }
    }

    /// Tells those who are behind some of what they lack. Once a turn.
    pub fn catch_up(&mut self, keyspace: &Keyspace, out: &mut Notices) {
        self.tellings_left = limits::WATCH_TELLINGS_PER_TURN_MAX;
        self.at_once_left = limits::WATCH_CHANGES_PER_TURN_MAX;
        let mut left = limits::WATCH_CHANGES_PER_TURN_MAX;
        while left > 0
            && let Some(watcher) = self.behind.pop_front()
        {
            if self.stage_of(watcher) != Some(Stage::Behind) {
                continue;
            }
            let max = left.min(limits::WATCH_CHANGES_PER_STEP_MAX);
            let looked_at = self.catch_up_one(watcher, max, keyspace, out);
            // Each takes a moment, even if it finds nothing.
            left = left.saturating_sub(looked_at + 4);
            if self.stage_of(watcher) == Some(Stage::Behind) {
                self.behind.push_back(watcher);
            }
        }
    }

    /// Goes on with another keyspace, which is ahead of the one before: events in
    /// between were not shown.
    pub fn install(&mut self, keyspace: &Keyspace) {
        let seen = mem::replace(&mut self.seen, keyspace.revision());
        let live: Vec<WatcherId> = self
            .watchers
            .iter()
            .filter(|(_, watcher)| watcher.stage == Stage::Live)
            .map(|(id, _)| *id)
            .collect();
        for id in live {
            if self.seen > seen {
                self.fall_behind(id, seen + 1);
            }
        }
        self.begin_later();
    }

    fn create(
        &mut self,
        stream: StreamId,
        id: WatcherId,
        of: Interest,
        next: Revision,
        out: &mut Notices,
    ) {
        let revision = self.seen;
        let watcher = id;
        out.push((stream, Notice::Created { watcher, revision }));
        let watcher = Watcher {
            stream,
            of,
            next,
            stage: Stage::Stalled,
        };
        let before = self.watchers.insert(id, watcher);
        assert!(
            before.is_none(),
            "the name of a watcher is never used again"
        );
        let all = self.streams.entry(stream).or_default();
        all.watchers.insert(id);
        all.stalled.insert(id);
        all.unsynced += 1;
        self.lagging += 1;
        self.set_stage(id, self.due(next));
    }

    /// What a watcher is that was told all before `next`.
    fn due(&self, next: Revision) -> Stage {
        if next <= self.seen {
            Stage::Behind
        } else if next == self.seen + 1 {
            Stage::Live
        } else {
            Stage::Later
        }
    }

    fn cancel(&mut self, id: WatcherId, compacted: Option<Revision>, out: &mut Notices) {
        self.set_stage(id, Stage::Stalled);
        let Some(watcher) = self.watchers.remove(&id) else {
            return;
        };
        self.lagging -= 1;
        if let Some(stream) = self.streams.get_mut(&watcher.stream) {
            stream.watchers.remove(&id);
            stream.stalled.remove(&id);
            stream.unsynced -= 1;
        }
        let notice = Notice::Canceled {
            watcher: id,
            compacted,
        };
        out.push((watcher.stream, notice));
    }

    fn consumed(&mut self, stream: StreamId, bytes: u64) {
        let Some(read) = self.streams.get_mut(&stream) else {
            return;
        };
        read.unread = read.unread.saturating_sub(bytes);
        if read.unread <= self.queue_bytes_max / 2 {
            for watcher in mem::take(&mut read.stalled) {
                self.set_stage(watcher, Stage::Behind);
            }
        }
    }

    fn tell_live(&mut self, revision: Revision, keyspace: &Keyspace, out: &mut Notices) {
        let mut events = Vec::new();
        let mut told: Vec<(WatcherId, usize)> = Vec::new();
        let mut changed = keyspace.changed_by(revision);
        while told.len() <= self.tellings_left
            && let Some((key, event)) = changed.next()
        {
            let before = told.len();
            let at = events.len();
            self.live
                .watching(key, &mut |watcher| told.push((watcher, at)));
            if told.len() > before {
                events.push(event());
            }
        }
        if told.len() > self.tellings_left {
            let told = told.into_iter().map(|(watcher, _)| watcher);
            return self.leave_behind(revision, told, changed.map(|(key, _)| key));
        }
        told.sort_unstable();
        let events: Arc<[Event]> = events.into();
        for group in told.chunk_by(|(one, _), (other, _)| one == other) {
            let id = group[0].0;
            let of = &self.watchers[&id].of;
            let all = group.iter().map(|(_, at)| &events[*at]);
            let taken = all.filter(|event| of.takes_event(event));
            let count = taken.clone().count();
            if count == 0 {
                continue;
            }
            if self.is_full(id) {
                self.fall_behind(id, revision);
                continue;
            }
            let events = match count == events.len() {
                true => Arc::clone(&events),
                false => taken.cloned().collect(),
            };
            self.tellings_left -= count;
            #[cfg(conclave_plant)]
            if crate::plant::is("tell-a-revision-in-halves") && events.len() > 1 {
                let (first, rest) = events.split_at(events.len() / 2);
                self.tell(id, revision, first.into(), out);
                self.tell(id, revision, rest.into(), out);
                continue;
            }
            self.tell(id, revision, events, out);
        }
    }

    /// A revision has more to tell than a turn has room for: those who were found, and
    /// those who watch the rest of its keys, are told from the history. Who has fallen
    /// behind is found no more, so each costs this once, and not once a key.
    fn leave_behind<'a>(
        &mut self,
        revision: Revision,
        found: impl Iterator<Item = WatcherId>,
        rest: impl Iterator<Item = &'a Bytes>,
    ) {
        found.for_each(|watcher| self.fall_behind(watcher, revision));
        let mut watching = Vec::new();
        for key in rest {
            self.live
                .watching(key, &mut |watcher| watching.push(watcher));
            for watcher in watching.drain(..) {
                self.fall_behind(watcher, revision);
            }
        }
    }

    /// Those who begin with the next revision, or have missed some, wait no longer.
    fn begin_later(&mut self) {
        while let Some((next, watcher)) = self.later.first().copied()
            && next <= self.seen + 1
        {
            self.set_stage(watcher, self.due(next));
        }
    }

    /// A live watcher is told from the history, from `next` on.
    fn fall_behind(&mut self, id: WatcherId, next: Revision) {
        if let Some(watcher) = self.watchers.get_mut(&id) {
            watcher.next = next;
        }
        let stage = match self.is_full(id) {
            true => Stage::Stalled,
            false => Stage::Behind,
        };
        self.set_stage(id, stage);
    }

    fn is_full(&self, id: WatcherId) -> bool {
        let watcher = self.watchers.get(&id);
        watcher
            .and_then(|watcher| self.streams.get(&watcher.stream))
            .is_some_and(|stream| self.has_no_room(stream))
    }

    fn has_no_room(&self, stream: &Stream) -> bool {
        stream.unread >= self.queue_bytes_max
    }

    /// Tells a watcher that is behind some of what it lacks; how many changes it took.
    fn catch_up_one(
        &mut self,
        id: WatcherId,
        max: usize,
        keyspace: &Keyspace,
        out: &mut Notices,
    ) -> usize {
        let watcher = &self.watchers[&id];
        let stream = &self.streams[&watcher.stream];
        if self.has_no_room(stream) {
            self.set_stage(id, Stage::Stalled);
            return 0;
        }
        if !keyspace.knows_all(&watcher.of, watcher.next) {
            self.cancel(id, Some(keyspace.complete_from()), out);
            return 0;
        }
        let room = self.queue_bytes_max - stream.unread;
        let excerpt = keyspace.events_since(&watcher.of, watcher.next, max, room);
        if !excerpt.events.is_empty() {
            self.tell(id, excerpt.next - 1, excerpt.events.into(), out);
        }
        if let Some(watcher) = self.watchers.get_mut(&id) {
            watcher.next = excerpt.next;
        }
        if excerpt.next > self.seen {
            self.set_stage(id, Stage::Live);
        }
        excerpt.looked_at
    }

    fn tell(&mut self, id: WatcherId, revision: Revision, events: Arc<[Event]>, out: &mut Notices) {
        let stream = self.watchers[&id].stream;
        let bytes = events.iter().map(Event::bytes).sum();
        self.told += events.len() as u64;
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.unread += bytes;
        }
        let notice = Notice::Events {
            watcher: id,
            revision,
            events,
            bytes,
        };
        out.push((stream, notice));
    }

    fn stage_of(&self, id: WatcherId) -> Option<Stage> {
        self.watchers.get(&id).map(|watcher| watcher.stage)
    }

    /// Moves a watcher to where those of a stage are kept, if it is there.
    fn set_stage(&mut self, id: WatcherId, stage: Stage) {
        let Some(watcher) = self.watchers.get_mut(&id) else {
            return;
        };
        let old = mem::replace(&mut watcher.stage, stage);
        if old == stage {
            return;
        }
        let Some(stream) = self.streams.get_mut(&watcher.stream) else {
            return;
        };
        match old {
            Stage::Live => {
                self.live.remove(&watcher.of.range, id);
                stream.unsynced += 1;
            }
            Stage::Stalled => {
                stream.stalled.remove(&id);
            }
            Stage::Later => {
                self.later.remove(&(watcher.next, id));
            }
            // It is met there, and left out.
            Stage::Behind => {}
        }
        match stage {
            Stage::Live => {
                self.live.insert(&watcher.of.range, id);
                stream.unsynced -= 1;
            }
            Stage::Stalled => {
                stream.stalled.insert(id);
            }
            Stage::Later => {
                self.later.insert((watcher.next, id));
            }
            Stage::Behind => self.behind.push_back(id),
        }
        let lags = |stage| matches!(stage, Stage::Behind | Stage::Stalled);
        match (lags(old), lags(stage)) {
            (false, true) => self.lagging += 1,
            (true, false) => self.lagging -= 1,
            _ => {}
        }
    }
}
