//! Snapshots: a checkpoint as one file, in the frame that clients of etcd expect.
//!
//! The file: the line [`MAGIC`]; the records of the checkpoint in their order, each with
//! its length in four bytes before it, the highest first; a length of 0; zeros up to a
//! multiple of 512 bytes; and a SHA-256 of all before it. The last of the records is the
//! manifest, with which the others must agree.
//!
//! A checkpoint is read twice: clients are told how many bytes are left.

use std::{io, sync::Arc};

use bytes::{BufMut as _, Bytes, BytesMut};
use conclave_core::{
    checkpoint::{CheckpointStore as _, FjallCheckpoints},
    ids::Index,
};
use conclave_proto::etcd::etcdserverpb::SnapshotResponse;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{Semaphore, mpsc},
    task,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Etcd, VERSION, maintenance::checkpoint, status::Error};
use crate::outflow::{Pace, STALLED_AFTER, put};

/// What a snapshot begins with.
const MAGIC: &[u8] = b"conclave snapshot 1\n";
/// Without the hash, its length is a multiple of this: by that, clients of etcd see that
/// the hash has come, too.
const BLOCK_BYTES: u64 = 512;
const LENGTH_BYTES: u64 = 4;
/// Of one message, as with etcd.
const BLOB_BYTES: usize = 32 << 10;
/// Messages that wait for the network.
const QUEUED_MAX: usize = 8;

/// A snapshot on its way.
pub(super) type Blobs = ReceiverStream<Result<SnapshotResponse, Status>>;
type Sender = mpsc::Sender<Result<SnapshotResponse, Status>>;

/// Where snapshots come from: one is sent at a time.
#[derive(Debug)]
pub(crate) struct Source {
    store: FjallCheckpoints,
    turn: Arc<Semaphore>,
}

impl Source {
    pub(crate) fn new(store: FjallCheckpoints) -> Self {
        Self {
            store,
            turn: Arc::new(Semaphore::new(1)),
        }
    }
}

/// Begins to send a snapshot that holds all that was acknowledged before.
pub(super) fn begin(etcd: &Etcd) -> Blobs {
    let (blobs, stream) = mpsc::channel(QUEUED_MAX);
    tokio::spawn(send(etcd.clone(), blobs));
    ReceiverStream::new(stream)
}

async fn send(etcd: Etcd, blobs: Sender) {
    let sent = tokio::select! {
        () = blobs.closed() => return,
        sent = prepare(&etcd, &blobs) => sent,
    };
    if let Err(error) = sent {
        blobs.send(Err(error.into_status())).await.ok();
    }
}

async fn prepare(etcd: &Etcd, blobs: &Sender) -> Result<(), Error> {
    let source = &etcd.snapshots;
    let turn = Arc::clone(&source.turn).acquire_owned().await;
    let turn = turn.map_err(|_| Error::Stopped)?;
    let at = checkpoint(etcd).await?;
    tracing::info!(checkpoint = at, "sends a snapshot");
    let (store, to) = (source.store.clone(), blobs.clone());
    // Whatever becomes of the call, the turn is over when nothing is read any more.
    let work = move || {
        let _turn = turn;
        write(&store, at, to)
    };
    let sent = task::spawn_blocking(work).await;
    match sent {
        Ok(Ok(bytes)) => tracing::info!(checkpoint = at, bytes, "sent a snapshot"),
        Ok(Err(error)) => {
            tracing::warn!(checkpoint = at, %error, "cannot send a snapshot");
            return Err(Error::SnapshotFailed);
        }
        // A panic ends the process in a release.
        Err(_) => return Err(Error::SnapshotFailed),
    }
    Ok(())
}

/// Sends all of it; how many bytes that was.
fn write(store: &FjallCheckpoints, at: Index, blobs: Sender) -> io::Result<u64> {
    let mut bytes = 0;
    store.read(at.into(), &mut |record| {
        bytes += LENGTH_BYTES + record.len() as u64;
        !blobs.is_closed()
    })?;
    let mut file = File::new(padded(bytes), blobs);
    file.put(MAGIC)?;
    let mut put = Ok(());
    store.read(at.into(), &mut |record| {
        put = file.record(record);
        put.is_ok()
    })?;
    put?;
    file.end()
}

/// The length of a file with so many bytes of records, without the hash.
fn padded(records: u64) -> u64 {
    let bytes = MAGIC.len() as u64 + records + LENGTH_BYTES;
    bytes.next_multiple_of(BLOCK_BYTES)
}

/// The file as it is written: to the client, blob by blob.
struct File {
    left: u64,
    sum: Sha256,
    blob: BytesMut,
    blobs: Sender,
    pace: Pace,
    written: u64,
}

impl File {
    fn new(left: u64, blobs: Sender) -> Self {
        Self {
            left,
            sum: Sha256::new(),
            blob: BytesMut::new(),
            blobs,
            pace: Pace::new(),
            written: 0,
        }
    }

    fn record(&mut self, record: &[u8]) -> io::Result<()> {
        let length = u32::try_from(record.len()).map_err(io::Error::other)?;
        self.put(&length.to_be_bytes())?;
        self.put(record)
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = BLOB_BYTES - self.blob.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.blob.put_slice(now);
            bytes = later;
            if self.blob.len() == BLOB_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let blob = self.blob.split().freeze();
        if blob.is_empty() {
            return Ok(());
        }
        self.sum.update(&blob);
        let left = self.left.checked_sub(blob.len() as u64);
        self.left = left.ok_or_else(|| io::Error::other("it has grown meanwhile"))?;
        self.pace.wait_for(blob.len() as u64);
        self.say(blob)
    }

    fn say(&mut self, blob: Bytes) -> io::Result<()> {
        self.written += blob.len() as u64;
        let response = SnapshotResponse {
            header: None,
            remaining_bytes: self.left,
            blob,
            version: VERSION.to_owned(),
        };
        put(&self.blobs, Ok(response), STALLED_AFTER).map_err(io::Error::other)
    }

    /// What follows the records.
    fn end(mut self) -> io::Result<u64> {
        self.put(&[0; LENGTH_BYTES as usize])?;
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let padding = left.saturating_sub(self.blob.len());
        if padding >= BLOCK_BYTES as usize {
            return Err(io::Error::other("it has shrunk meanwhile"));
        }
        self.put(&[0; BLOCK_BYTES as usize][..padding])?;
        self.flush()?;
        let sum = self.sum.finalize_reset();
        self.say(Bytes::copy_from_slice(&sum))?;
        Ok(self.written)
    }
}
