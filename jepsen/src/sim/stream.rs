//! Streams between watchers and nodes: connections that keep the order of what they
//! carry, and break instead of losing some of it.

use std::collections::BTreeMap;

use conclave_core::watch::{Notice, Request, StreamId};

use super::{
    ground::{Event, Ground},
    tally::Fault,
};

/// How late a client notices that its stream is broken, if it does.
const NOTICED_US_MAX: u64 = 1_000_000;
/// How late the node does.
const CLOSED_US_MAX: u64 = 2_000_000;

/// All streams that are not broken.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    names: u64,
    open: BTreeMap<StreamId, Line>,
}

#[derive(Clone, Copy, Debug)]
struct Line {
    actor: usize,
    node: usize,
    /// When what was sent last arrives, in each direction.
    asked_us: u64,
    told_us: u64,
}

impl Ground {
    /// A name that was never given.
    pub(crate) fn stream_name(&mut self) -> u64 {
        self.streams.names += 1;
        self.streams.names
    }

    /// A client connects to a node.
    pub(crate) fn open_stream(&mut self, actor: usize, node: usize) -> StreamId {
        let stream = StreamId(self.stream_name());
        let line = Line {
            actor,
            node,
            asked_us: 0,
            told_us: 0,
        };
        self.streams.open.insert(stream, line);
        stream
    }

    /// The client of a stream asks for something.
    pub(crate) fn ask(&mut self, stream: StreamId, request: Request) {
        let Some(line) = self.carried(stream) else {
            return;
        };
        let at_us = self.arrival().max(line.asked_us + 1);
        let node = line.node;
        self.tell(format_args!(
            "client {} asks node {node} on {stream:?}: {request:?}",
            line.actor
        ));
        if let Some(line) = self.streams.open.get_mut(&stream) {
            line.asked_us = at_us;
        }
        let asked = Event::Asked {
            node,
            stream,
            request,
        };
        self.schedule(at_us, asked);
    }

    /// The node of a stream tells its client something.
    pub(crate) fn notify(&mut self, stream: StreamId, notice: Notice) {
        let Some(line) = self.carried(stream) else {
            return;
        };
        let at_us = self.arrival().max(line.told_us + 1);
        if let Some(line) = self.streams.open.get_mut(&stream) {
            line.told_us = at_us;
        }
        let told = Event::Told {
            actor: line.actor,
            stream,
            notice: Some(notice),
        };
        self.schedule(at_us, told);
    }

    /// Whether a stream is there, and lives on now that something is to be sent.
    fn carried(&mut self, stream: StreamId) -> Option<Line> {
        let line = *self.streams.open.get(&stream)?;
        let lost = self.network.weather().lost / 10;
        if self.network.is_client_cut(line.actor, line.node) || self.rng.chance(lost) {
            self.break_stream(stream);
            return None;
        }
        Some(line)
    }

    /// Whether a stream is there.
    pub(crate) fn has_stream(&self, stream: StreamId) -> bool {
        self.streams.open.contains_key(&stream)
    }

    /// A stream breaks. What is on its way may arrive, and nothing after it.
    pub(crate) fn break_stream(&mut self, stream: StreamId) {
        let Some(line) = self.streams.open.remove(&stream) else {
            return;
        };
        self.tally.fault(Fault::StreamBroken);
        let Line { actor, node, .. } = line;
        if self.rng.chance(800_000) {
            let at_us = self.now_us + self.rng.below(NOTICED_US_MAX);
            let notice = None;
            let told = Event::Told {
                actor,
                stream,
                notice,
            };
            self.schedule(at_us.max(line.told_us + 1), told);
        }
        let at_us = self.now_us + self.rng.below(CLOSED_US_MAX);
        self.schedule(at_us, Event::StreamClosed { node, stream });
    }

    /// All streams of a node break, or those of one client.
    pub(crate) fn break_streams(&mut self, node: usize, actor: Option<usize>) {
        let is_hit = |line: &Line| line.node == node && actor.is_none_or(|one| one == line.actor);
        let open = self.streams.open.iter();
        let hit = open.filter(|(_, line)| is_hit(line));
        let hit: Vec<StreamId> = hit.map(|(stream, _)| *stream).collect();
        for stream in hit {
            self.break_stream(stream);
        }
    }
}
