//! Checkpoints on their way from one member to another, on connections of their own.
//!
//! Who needs one asks for it; the thread that gets it has a runtime of its own, so
//! that neither the node nor its other links wait for it. Who has one reads it on
//! another thread, too, and no faster than clients can bear. Memory is bounded on
//! both sides: each waits for the other's disk and network.

use std::{io, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use conclave_core::{
    checkpoint::{CheckpointStore as _, FjallCheckpoints, Sink},
    ids::Index,
    limits,
    node::{Handle, Sent},
    replica::Fetch,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    CheckpointChunk, FetchRequest, PeerGreeting, peer_client::PeerClient,
};
use tokio::{
    runtime::Builder,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task, time,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{FRAME_BYTES_MAX, Link, dial::LinkError, dial::endpoint};
use crate::{
    options::Member,
    outflow::{self, Pace, STALLED_AFTER, Untaken},
};

/// How long the next part of a checkpoint may take.
const CHUNK_WITHIN: Duration = Duration::from_secs(10);
/// How long to wait for room when the disk is slower than the network.
const ROOM_AFTER: Duration = Duration::from_millis(2);
/// Chunks that wait for the network.
const QUEUED_MAX: usize = 8;
/// How long the log is kept behind a checkpoint that was sent: the other member
/// verifies it, and then needs what follows.
const KEEPS_LOG: Duration = Duration::from_secs(60);

/// Gets a checkpoint, on a thread of its own. Whatever happens, the sink is dropped
/// in the end; whether all has come shows in the records.
pub(super) fn start(link: &Link, greeting: PeerGreeting, fetch: Fetch, sink: Sink) {
    let link = link.clone();
    let run = move || {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let member = &link.member;
        tracing::info!(
            peer = member.name,
            at_least = fetch.at_least,
            "asks for a checkpoint"
        );
        match runtime.block_on(receive(member, greeting, fetch, &sink)) {
            Ok(bytes) => tracing::info!(peer = member.name, bytes, "received a checkpoint"),
            Err(error) => {
                tracing::warn!(peer = member.name, %error, "a checkpoint did not come");
            }
        }
        runtime.shutdown_background();
        io::Result::Ok(())
    };
    let name = "conclave-fetch".to_owned();
    if let Err(error) = thread::Builder::new().name(name).spawn(run) {
        tracing::warn!(%error, "cannot start a thread to get a checkpoint");
    }
}

async fn receive(
    member: &Member,
    greeting: PeerGreeting,
    fetch: Fetch,
    sink: &Sink,
) -> Result<usize, LinkError> {
    let request = FetchRequest {
        greeting: Some(greeting),
        at_least: fetch.at_least,
    };
    let channel = endpoint(member)?.connect().await;
    let channel = channel.map_err(LinkError::Unreachable)?;
    let mut client = PeerClient::new(channel).max_decoding_message_size(FRAME_BYTES_MAX);
    let answered = time::timeout(CHUNK_WITHIN, client.fetch(request)).await;
    let mut chunks = answered.map_err(|_| LinkError::Silent)??.into_inner();
    let mut bytes = 0;
    while let Some(chunk) = next(&mut chunks).await? {
        bytes += chunk.records.iter().map(Bytes::len).sum::<usize>();
        put(sink, chunk.records).await?;
    }
    Ok(bytes)
}

async fn next(
    chunks: &mut Streaming<CheckpointChunk>,
) -> Result<Option<CheckpointChunk>, LinkError> {
    let next = time::timeout(CHUNK_WITHIN, chunks.message()).await;
    Ok(next.map_err(|_| LinkError::Silent)??)
}

/// Waits without blocking: the connection has to answer pings meanwhile.
async fn put(sink: &Sink, mut records: Vec<Bytes>) -> Result<(), LinkError> {
    use std::sync::mpsc::TrySendError;
    loop {
        match sink.try_send(records) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(back)) => records = back,
            // The node has ended.
            Err(TrySendError::Disconnected(_)) => return Err(LinkError::Closed),
        }
        time::sleep(ROOM_AFTER).await;
    }
}

/// Sends checkpoints, one at a time.
#[derive(Debug)]
pub(super) struct Sender {
    store: FjallCheckpoints,
    handle: Handle<Primitives>,
    turn: Arc<Semaphore>,
}

/// The parts of a checkpoint.
pub(super) type Chunks = ReceiverStream<Result<CheckpointChunk, Status>>;

impl Sender {
    pub(super) fn new(store: FjallCheckpoints, handle: Handle<Primitives>) -> Arc<Self> {
        Arc::new(Self {
            store,
            handle,
            turn: Arc::new(Semaphore::new(1)),
        })
    }

    /// Begins to send the newest checkpoint, if it reaches far enough.
    pub(super) fn send(self: &Arc<Self>, at_least: Index, peer: &str) -> Result<Chunks, Status> {
        let busy = |_| Status::unavailable("another member is being sent a checkpoint");
        let turn = Arc::clone(&self.turn).try_acquire_owned().map_err(busy)?;
        let at = self.handle.checkpoint();
        if at == 0 || at < at_least {
            self.handle.want_checkpoint(at_least);
            let reason = format!("no checkpoint reaches up to entry {at_least} yet");
            return Err(Status::unavailable(reason));
        }
        let (chunks, stream) = mpsc::channel(QUEUED_MAX);
        let sent = self.handle.keep_log_behind(at);
        let run = Arc::clone(self).run(at, peer.to_owned(), turn, sent, chunks);
        tokio::spawn(run);
        Ok(ReceiverStream::new(stream))
    }

    async fn run(
        self: Arc<Self>,
        at: Index,
        peer: String,
        turn: OwnedSemaphorePermit,
        sent: Sent,
        chunks: mpsc::Sender<Result<CheckpointChunk, Status>>,
    ) {
        tracing::info!(peer, checkpoint = at, "sends a checkpoint");
        let is_sent = read(self.store.clone(), at, &peer, chunks, STALLED_AFTER).await;
        drop(turn);
        if is_sent {
            tracing::info!(peer, checkpoint = at, "sent a checkpoint");
            time::sleep(KEEPS_LOG).await;
        }
        drop(sent);
    }
}

/// Reads a checkpoint on a thread that may wait, and sends it for as long as the other
/// member takes some of it within `patience`. Whether it came to its end. When this is
/// done, nothing of the checkpoint is open any more.
async fn read(
    store: FjallCheckpoints,
    at: Index,
    peer: &str,
    chunks: mpsc::Sender<Result<CheckpointChunk, Status>>,
    patience: Duration,
) -> bool {
    let failures = chunks.clone();
    let read = task::spawn_blocking(move || {
        let mut row = Row::new(chunks, patience);
        let mut put = Ok(());
        store.read(at.into(), &mut |record| {
            put = row.put(record);
            put.is_ok()
        })?;
        Ok::<_, io::Error>(put.and_then(|()| row.flush()))
    });
    match read.await {
        Ok(Ok(Ok(()))) => true,
        Ok(Ok(Err(Untaken::Stalled))) => {
            tracing::warn!(
                peer,
                checkpoint = at,
                "a member takes no more of a checkpoint; it may ask again"
            );
            false
        }
        Ok(Ok(Err(Untaken::Gone))) => false,
        Ok(Err(error)) => {
            tracing::warn!(checkpoint = at, %error, "cannot read a checkpoint to send it");
            let status = Status::unavailable("the checkpoint cannot be read");
            failures.try_send(Err(status)).ok();
            false
        }
        // A panic ends the process in a release.
        Err(_) => false,
    }
}

/// Packs records, and hands them on at a measured pace.
struct Row {
    chunks: mpsc::Sender<Result<CheckpointChunk, Status>>,
    patience: Duration,
    packed: CheckpointChunk,
    packed_bytes: usize,
    pace: Pace,
}

impl Row {
    fn new(chunks: mpsc::Sender<Result<CheckpointChunk, Status>>, patience: Duration) -> Self {
        Self {
            chunks,
            patience,
            packed: CheckpointChunk::default(),
            packed_bytes: 0,
            pace: Pace::new(),
        }
    }

    fn put(&mut self, record: &[u8]) -> Result<(), Untaken> {
        self.packed_bytes += record.len();
        self.packed.records.push(Bytes::copy_from_slice(record));
        if self.packed_bytes < limits::CHECKPOINT_CHUNK_BYTES {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Untaken> {
        let chunk = std::mem::take(&mut self.packed);
        self.pace
            .wait_for(std::mem::take(&mut self.packed_bytes) as u64);
        outflow::put(&self.chunks, Ok(chunk), self.patience)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    const AT: Index = 7;

    /// A directory that goes away with this, with a checkpoint of more chunks than wait
    /// for the network.
    struct Scratch(PathBuf, FjallCheckpoints);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("conclave-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::remove_dir_all(&path).ok();
            let mut store = FjallCheckpoints::open(path.clone()).unwrap();
            store.write(AT.into(), &mut records()).unwrap();
            Self(path, store)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).ok();
        }
    }

    fn records() -> impl Iterator<Item = Bytes> {
        let record = |number: u8| Bytes::from(vec![number; limits::CHECKPOINT_CHUNK_BYTES]);
        (0..3 * QUEUED_MAX as u8).map(record)
    }

    #[tokio::test]
    async fn whoever_takes_it_gets_all_of_it() {
        let scratch = Scratch::new("taken");
        let (chunks, mut taken) = mpsc::channel::<Result<CheckpointChunk, Status>>(QUEUED_MAX);
        let take = async {
            let mut all = Vec::new();
            while let Some(chunk) = taken.recv().await {
                all.extend(chunk.unwrap().records);
            }
            all
        };
        let read = read(scratch.1.clone(), AT, "b", chunks, STALLED_AFTER);
        let (is_sent, taken) = tokio::join!(read, take);
        assert!(is_sent);
        assert_eq!(taken, records().collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_checkpoint_is_not_kept_for_a_member_that_takes_nothing() {
        let mut scratch = Scratch::new("stalled");
        let (chunks, stalled) = mpsc::channel(QUEUED_MAX);
        let patience = Duration::from_millis(50);
        let read = read(scratch.1.clone(), AT, "b", chunks, patience);
        let read = time::timeout(STALLED_AFTER, read).await;
        assert_eq!(read, Ok(false), "it is given up");
        assert_eq!(stalled.len(), QUEUED_MAX);
        // While one is read, it stays.
        scratch.1.remove(AT.into()).unwrap();
        assert!(scratch.1.list().unwrap().is_empty());
    }
}
