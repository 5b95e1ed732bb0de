//! Streams of events of keys: where the notices for each of them go.
//!
//! The loop thread sorts them into the mailboxes of the threads that serve the
//! streams, so that it wakes each thread once a turn, however many streams are told.
//! What waits in here is bounded by the hub, which counts what a stream has not read,
//! and by the requests that a stream has under way.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use conclave_core::{
    node::Handle,
    replica::Failure,
    watch::{Notice, Request, StreamId, WatcherId},
};
use conclave_primitives::Primitives;
use tokio::sync::mpsc;

use crate::mailbox::Mailbox;

/// All streams of this server.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    streams: Mutex<BTreeMap<StreamId, Place>>,
    last_id: AtomicU64,
}

/// Where a stream is served.
#[derive(Debug)]
struct Place {
    mailbox: Arc<Mailbox>,
    notices: mpsc::UnboundedSender<Notice>,
}

impl Readers {
    /// Passes notices on. Never waits.
    pub(crate) fn notify(&self, notices: Vec<(StreamId, Notice)>) {
        let streams = self.streams();
        for (stream, notice) in notices {
            // One that is gone has been closed.
            if let Some(place) = streams.get(&stream) {
                place.mailbox.put_notice(place.notices.clone(), notice);
            }
        }
    }

    fn id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed)
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<StreamId, Place>> {
        // Nothing in here can stop half way.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream; it is closed when this is dropped.
#[derive(Debug)]
pub(crate) struct Reader {
    id: StreamId,
    all: Arc<Readers>,
    handle: Handle<Primitives>,
    notices: mpsc::UnboundedReceiver<Notice>,
}

impl Reader {
    /// Begins a stream that is served by the thread of this mailbox.
    pub(crate) fn new(
        all: &Arc<Readers>,
        handle: Handle<Primitives>,
        mailbox: &Arc<Mailbox>,
    ) -> Self {
        let (sender, notices) = mpsc::unbounded_channel();
        let id = StreamId(all.id());
        let place = Place {
            mailbox: Arc::clone(mailbox),
            notices: sender,
        };
        all.streams().insert(id, place);
        Self {
            id,
            all: Arc::clone(all),
            handle,
            notices,
        }
    }

    /// Its name.
    pub(crate) fn id(&self) -> StreamId {
        self.id
    }

    /// A name for a watcher.
    pub(crate) fn watcher(&self) -> WatcherId {
        WatcherId(self.all.id())
    }

    /// Asks for something.
    pub(crate) fn ask(&self, request: Request) -> Result<(), Failure> {
        self.handle.watch(request)
    }

    /// What it is told next.
    pub(crate) async fn next(&mut self) -> Notice {
        let notice = self.notices.recv().await;
        notice.expect("the other end goes when this does")
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.all.streams().remove(&self.id);
        // A node that is stopping forgets it anyway.
        self.ask(Request::Close { stream: self.id }).ok();
    }
}
