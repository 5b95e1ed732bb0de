//! A client that watches keys: a few watchers on one stream, which go on with another
//! stream, mostly at another node, whenever that breaks. The client library decides from
//! where.
//!
//! It is served when each of its watchers has been told everything up to what was the
//! newest revision when it began to wait for that.

mod wire;

use conclave_client::watch_state::WatchState;
use conclave_core::{
    ids::Revision,
    keyspace::{Interest, KeyRange},
    watch::{Notice, Request, StreamId, WatcherId},
};
use conclave_proto::etcd::etcdserverpb::WatchCreateRequest;

use super::{
    alarm::{Alarm, Owner},
    ground::Ground,
    link::Link,
    settings::PATIENCE_US,
    tally::{Fault, Operation},
};
use crate::{
    checkers::{Verdict, watched::Wanted},
    rng::Rng,
};

/// See the module.
#[derive(Debug)]
pub(crate) struct WatchClient {
    link: Link,
    alarm: Alarm,
    stream: Option<StreamId>,
    /// When it connects again.
    connects_us: u64,
    heard_us: u64,
    watches: Vec<Watching>,
    /// What every watcher is to be told.
    goal: Option<Revision>,
    /// When the next goal is set.
    next_us: u64,
    /// Bytes of events that the node does not know to be read.
    unread: u64,
    /// Until when it does not say what it has read.
    slow_until_us: u64,
}

#[derive(Debug)]
struct Watching {
    /// Its name for the checker.
    name: u64,
    /// Its name on the stream.
    watcher: WatcherId,
    wanted: Wanted,
    state: WatchState,
    is_created: bool,
    /// When it has seen enough.
    until_us: u64,
}

impl WatchClient {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        let mut client = Self {
            link: Link::new(actor, ground),
            alarm: Alarm::new(Owner::Actor(actor)),
            stream: None,
            connects_us: ground.rng.below(500_000),
            heard_us: 0,
            watches: Vec::new(),
            goal: None,
            next_us: 0,
            unread: 0,
            slow_until_us: 0,
        };
        for _ in 0..ground.rng.between(1, 3) {
            let watch = Watching::draw(None, ground);
            client.watches.push(watch);
        }
        client.alarm.set(client.connects_us, ground);
        client
    }

    pub(crate) fn wake(&mut self, ground: &mut Ground) {
        if !self.alarm.rings(ground) {
            return;
        }
        let now_us = ground.now_us;
        let alive_us = self.heard_us.max(self.slow_until_us);
        match self.stream {
            None if self.connects_us <= now_us => self.connect(ground),
            Some(stream) if alive_us + PATIENCE_US < now_us => {
                // Nobody says that it is broken.
                ground.break_stream(stream);
                self.broken(ground);
            }
            _ => {}
        }
        if self.goal.is_none() && self.next_us <= now_us && !ground.draining {
            self.begin(ground);
        }
        if let Some(stream) = self.stream {
            self.go_on(stream, ground);
        }
        let soon_us = now_us + ground.rng.between(50_000, 200_000);
        self.alarm.set(soon_us, ground);
    }

    fn begin(&mut self, ground: &mut Ground) {
        self.goal = Some(ground.checks.serializable.model.revision());
        self.link.begins(ground);
        if ground.troubled() && ground.rng.chance(50_000) {
            ground.tally.fault(Fault::ReaderSlow);
            self.slow_until_us = ground.now_us + ground.rng.between(200_000, 2_000_000);
        }
        self.has_come(ground);
    }

    fn connect(&mut self, ground: &mut Ground) {
        let stream = ground.open_stream(self.link.actor, self.link.node);
        self.stream = Some(stream);
        self.heard_us = ground.now_us;
        self.unread = 0;
        for watch in &mut self.watches {
            watch.begin(stream, ground);
        }
    }

    fn broken(&mut self, ground: &mut Ground) {
        self.stream = None;
        self.connects_us = ground.now_us + ground.rng.between(1_000, 300_000);
        self.link.move_on(None, ground);
        // Served by nobody.
        self.goal = None;
        self.link.gone(ground);
    }

    /// As the server does for a stream that takes what it is sent.
    fn say_what_is_read(&mut self, stream: StreamId, ground: &mut Ground) {
        if self.unread > 0 && self.slow_until_us <= ground.now_us {
            let bytes = std::mem::take(&mut self.unread);
            ground.ask(stream, Request::Consumed { stream, bytes });
        }
    }

    /// What a client with a stream does from time to time.
    fn go_on(&mut self, stream: StreamId, ground: &mut Ground) {
        let now_us = ground.now_us;
        self.say_what_is_read(stream, ground);
        let over = self.watches.iter_mut();
        for watch in over.filter(|watch| watch.is_created && watch.until_us <= now_us) {
            // It is told so, and asks once.
            watch.until_us = u64::MAX;
            let watcher = watch.watcher;
            ground.ask(stream, Request::Cancel { watcher });
        }
        if self.goal.is_some() {
            ground.ask(stream, Request::Progress { stream });
            let watch = &self.watches[ground.rng.index(self.watches.len())];
            let watcher = watch.watcher;
            ground.ask(stream, Request::ProgressOf { watcher });
        }
    }

    /// Its stream says something, or that it is broken.
    pub(crate) fn told(&mut self, stream: StreamId, notice: Option<Notice>, ground: &mut Ground) {
        if self.stream != Some(stream) {
            return;
        }
        let Some(notice) = notice else {
            return self.broken(ground);
        };
        self.heard_us = ground.now_us;
        let verdict = self.take(stream, notice, ground);
        ground.checks.note(verdict);
        self.has_come(ground);
    }

    fn take(&mut self, stream: StreamId, notice: Notice, ground: &mut Ground) -> Verdict {
        let checks = &mut ground.checks;
        let (watched, model) = (&mut checks.watched, &checks.serializable.model);
        match notice {
            Notice::Created { watcher, revision } => {
                let Some(watch) = self.find(watcher) else {
                    return Ok(());
                };
                watch.is_created = true;
                watch.state.received(wire::created(revision));
                let name = watch.name;
                watched.created(name, revision, model)
            }
            Notice::Events {
                watcher,
                revision,
                events,
                bytes,
            } => {
                self.unread += bytes;
                let is_much = self.unread >= ground.settings.watch_queue_bytes / 4;
                if is_much {
                    self.say_what_is_read(stream, ground);
                }
                let checks = &mut ground.checks;
                let (watched, model) = (&mut checks.watched, &checks.serializable.model);
                let Some(watch) = self.find(watcher) else {
                    return Ok(());
                };
                watch.state.received(wire::events(revision, &events));
                watched.told(watch.name, revision, &events, model)?;
                ground.did(Operation::WatchTold);
                Ok(())
            }
            Notice::Progress { watcher, revision } => {
                let watches = self.watches.iter_mut();
                let meant = watches.filter(|watch| {
                    watch.is_created && watcher.is_none_or(|one| one == watch.watcher)
                });
                for watch in meant {
                    watch.state.received(wire::progress(revision));
                    watched.progress(watch.name, revision, model)?;
                }
                ground.did(Operation::WatchProgress);
                Ok(())
            }
            Notice::Canceled { watcher, compacted } => {
                self.cancelled(stream, watcher, compacted, ground)
            }
            Notice::Refused { .. } => {
                ground.break_stream(stream);
                self.broken(ground);
                Ok(())
            }
        }
    }

    fn cancelled(
        &mut self,
        stream: StreamId,
        watcher: WatcherId,
        compacted: Option<Revision>,
        ground: &mut Ground,
    ) -> Verdict {
        let Some(name) = self.find(watcher).map(|watch| watch.name) else {
            return Ok(());
        };
        let checks = &mut ground.checks;
        match compacted {
            Some(compacted) => {
                let model = &checks.serializable.model;
                checks.watched.cancelled(name, compacted, model)?;
                ground.did(Operation::WatchCompacted);
            }
            None => {
                checks.watched.ends(name);
                ground.did(Operation::WatchEnded);
            }
        }
        // The next one takes its place, at times from where that one cannot.
        let mut next = Watching::draw(compacted, ground);
        next.begin(stream, ground);
        if let Some(watch) = self.find(watcher) {
            *watch = next;
        }
        Ok(())
    }

    fn find(&mut self, watcher: WatcherId) -> Option<&mut Watching> {
        self.watches
            .iter_mut()
            .find(|watch| watch.watcher == watcher)
    }

    /// Completes the goal if all watchers have come so far.
    fn has_come(&mut self, ground: &mut Ground) {
        let Some(goal) = self.goal else { return };
        let watched = &ground.checks.watched;
        let has_come = |watch: &Watching| watched.upto(watch.name).is_some_and(|upto| upto >= goal);
        if self.watches.iter().all(has_come) {
            self.goal = None;
            self.next_us = ground.now_us + ground.rng.between(50_000, 400_000);
            self.link.served(ground);
        }
    }
}

impl Watching {
    /// A new one, of keys that clients of plain keys write, or of all there are.
    fn draw(compacted: Option<Revision>, ground: &mut Ground) -> Self {
        let name = ground.stream_name();
        let newest = ground.checks.serializable.model.revision();
        let wanted = wanted(&mut ground.rng);
        let rng = &mut ground.rng;
        let next = match (compacted, rng.below(10)) {
            (Some(compacted), 0..8) => Some(compacted),
            (_, 0..5) => None,
            (_, 5..7) => Some(newest.saturating_sub(rng.below(100)).max(1)),
            (_, 7..8) => Some(newest.saturating_sub(rng.below(1_000)).max(1)),
            _ => Some(newest + rng.below(10)),
        };
        let until_us = ground.now_us + rng.between(1_000_000, 15_000_000);
        let request = WatchCreateRequest {
            start_revision: next.map_or(0, u64::cast_signed),
            ..WatchCreateRequest::default()
        };
        ground.checks.watched.begins(name, wanted.clone(), next);
        ground.did(Operation::WatchBegun);
        Self {
            name,
            watcher: WatcherId(0),
            wanted,
            state: WatchState::new(request),
            is_created: false,
            until_us,
        }
    }

    /// Asks for it on a new stream, from where it has come to.
    fn begin(&mut self, stream: StreamId, ground: &mut Ground) {
        if self.is_created {
            ground.did(Operation::WatchResumed);
        }
        self.is_created = false;
        self.until_us = self.until_us.min(ground.now_us + 15_000_000);
        self.watcher = WatcherId(ground.stream_name());
        let from = self.state.begin().start_revision.cast_unsigned();
        let start = (from > 0).then_some(from);
        let checks = &mut ground.checks;
        let model = &checks.serializable.model;
        let verdict = checks.watched.resumes(self.name, start, model);
        checks.note(verdict);
        let of = Interest {
            range: KeyRange::new(self.wanted.start.clone(), self.wanted.end.clone()),
            puts: self.wanted.puts,
            deletes: self.wanted.deletes,
        };
        let create = Request::Create {
            stream,
            watcher: self.watcher,
            of,
            start,
        };
        ground.ask(stream, create);
    }
}

fn wanted(rng: &mut Rng) -> Wanted {
    let key = |number: u64| format!("kv/{number:02}");
    let first = rng.below(12);
    let (start, end) = match rng.below(8) {
        0..2 => (key(first), String::new()),
        2..4 => (key(first), key(first + rng.between(1, 5))),
        4..6 => ("kv/".into(), "kv0".into()),
        6 => ("register/".into(), "register0".into()),
        // Of locks and elections, too.
        _ => ("\0".into(), "\0".into()),
    };
    let filter = rng.below(10);
    Wanted {
        start: start.into(),
        end: end.into(),
        puts: filter != 0,
        deletes: filter != 1,
    }
}
