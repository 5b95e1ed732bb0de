//! Where streams of watchers end in a node.

use conclave_core::{
    replica::{Input, Role},
    watch::{Notices, Request, StreamId},
};

use super::{Node, Running};
use crate::sim::{ground::Ground, tally::Operation};

impl Node {
    /// The client of a stream asks for something.
    pub(crate) fn asked(&mut self, stream: StreamId, request: Request, ground: &mut Ground) {
        if self.running.is_none() {
            return ground.break_stream(stream);
        }
        if ground.has_stream(stream) {
            self.take_in(Input::Watch(request), ground);
        }
    }

    /// The server notices that a stream is broken.
    pub(crate) fn stream_closed(&mut self, stream: StreamId, ground: &mut Ground) {
        self.take_in(Input::Watch(Request::Close { stream }), ground);
    }
}

impl Running {
    /// Passes on what readers are told.
    pub(super) fn notify(&self, node: usize, notices: Notices, ground: &mut Ground) {
        let status = self.replica.status();
        if status.watching.behind > 0 {
            ground.did(Operation::WatchBehind);
        }
        if !notices.is_empty() && status.role != Role::Leader {
            ground.did(Operation::WatchedAtFollower);
        }
        for (stream, notice) in notices {
            ground.tell(format_args!("node {node} tells {stream:?}: {notice:?}"));
            ground.notify(stream, notice);
        }
    }
}
