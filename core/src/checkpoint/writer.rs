//! The thread that writes checkpoints, its own and those of other members, so that
//! the node's thread does not wait.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{
            Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel,
        },
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use bytes::Bytes;

use super::{CheckpointStore, Image, Invalid, ReadError, Slot, read};
use crate::{ids::Index, limits, machine::Machine, state::State};

/// How often a thread that waits for records looks whether it is to end.
const GIVEN_UP_EVERY: Duration = Duration::from_millis(50);

/// Where the records of another member's checkpoint go, many at a time, in order.
/// The end of it is the end of the row; whether it is whole shows in the records.
pub type Sink = SyncSender<Vec<Bytes>>;

/// See the module. When it is dropped, what is being written is given up.
#[derive(Debug)]
pub struct Writer<M: Machine> {
    /// `None` once it is to end.
    orders: Option<Sender<Order>>,
    results: Receiver<Result<Done<M>, WriteError>>,
    is_given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Order {
    Write {
        image: Image,
        /// The older and the newer checkpoint there are. Others go first, before it
        /// takes space, and the older one when it is durable.
        keep: [Index; 2],
    },
    Receive(Receiver<Vec<Bytes>>),
    Adopt(Index),
}

/// What the thread has done.
#[derive(Debug)]
pub enum Done<M: Machine> {
    /// The checkpoint of this entry is durable, and was read back.
    Written(Index),
    /// The incoming one is durable, and this is its state; or it is not whole.
    Received(Result<Box<State<M>>, Invalid>),
    /// The incoming one is now the checkpoint of this entry, and the only one.
    Adopted(Index),
}

impl<M: Machine + Send + 'static> Writer<M> {
    /// Starts the thread.
    pub fn start(store: impl CheckpointStore + Send + 'static) -> io::Result<Self> {
        let (orders, received) = channel();
        let (done, results) = channel();
        let is_given_up = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&is_given_up);
        let run = move || run(store, &received, &done, &given_up);
        let thread = Builder::new()
            .name("conclave-checkpoint".to_owned())
            .spawn(run)?;
        Ok(Self {
            orders: Some(orders),
            results,
            is_given_up,
            thread: Some(thread),
        })
    }

    /// Orders a checkpoint, beside the older and the newer one there are. All others
    /// are removed, and the older one when this one is durable.
    pub fn write(&self, image: Image, keep: [Index; 2]) {
        self.order(Order::Write { image, keep });
    }

    /// Orders that records which come from another member be written to the incoming
    /// slot. The sink takes so much ahead of the disk, and no more.
    pub fn receive(&self) -> Sink {
        let (sink, records) = sync_channel(limits::CHECKPOINT_CHUNKS_QUEUED_MAX);
        self.order(Order::Receive(records));
        sink
    }

    /// Orders that the incoming one become the checkpoint of an entry, as the log
    /// says; all others are removed.
    pub fn adopt(&self, at: Index) {
        self.order(Order::Adopt(at));
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // If the thread has ended, it has said why.
            orders.send(order).ok();
        }
    }

    /// What has been done since it was asked last, one thing at a time. An error is
    /// the last there is.
    pub fn poll(&self) -> Option<Result<Done<M>, WriteError>> {
        match self.results.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(WriteError::Ended)),
        }
    }
}

impl<M: Machine> Drop for Writer<M> {
    fn drop(&mut self) {
        self.is_given_up.store(true, Ordering::Relaxed);
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic there ends the process in a release.
            thread.join().ok();
        }
    }
}

fn run<M: Machine>(
    mut store: impl CheckpointStore,
    orders: &Receiver<Order>,
    done: &Sender<Result<Done<M>, WriteError>>,
    is_given_up: &AtomicBool,
) {
    while let Ok(order) = orders.recv() {
        let result = match order {
            Order::Write { image, keep } => write(&mut store, image, keep, is_given_up),
            Order::Receive(records) => receive(&mut store, &records, is_given_up),
            Order::Adopt(at) => adopt(&mut store, at),
        };
        let is_over = result.is_err();
        // Nobody may listen any more.
        done.send(result).ok();
        if is_over {
            return;
        }
    }
}

fn write<M: Machine>(
    store: &mut impl CheckpointStore,
    image: Image,
    keep: [Index; 2],
    is_given_up: &AtomicBool,
) -> Result<Done<M>, WriteError> {
    let at = image.applied();
    store.remove(Slot::Incoming)?;
    remove_all_but(store, keep)?;
    let mut records = 0u64;
    let mut rows = image
        .into_records()
        .take_while(|_| !is_given_up.load(Ordering::Relaxed))
        .inspect(|_| records += 1);
    store.write(at.into(), &mut rows)?;
    drop(rows);
    if is_given_up.load(Ordering::Relaxed) {
        return Err(WriteError::Ended);
    }
    read(store, at).map_err(WriteError::NotReadBack)?;
    remove_all_but(store, [keep[1], at])?;
    tracing::info!(checkpoint = at, records, "wrote a checkpoint");
    Ok(Done::Written(at))
}

fn receive<M: Machine>(
    store: &mut impl CheckpointStore,
    records: &Receiver<Vec<Bytes>>,
    is_given_up: &AtomicBool,
) -> Result<Done<M>, WriteError> {
    let chunks = std::iter::from_fn(|| next_chunk(records, is_given_up));
    store.write(Slot::Incoming, &mut chunks.flatten())?;
    if is_given_up.load(Ordering::Relaxed) {
        return Err(WriteError::Ended);
    }
    let received = match read(store, Slot::Incoming) {
        Ok(image) => Ok(Box::new(State::restore(image))),
        Err(ReadError::Invalid(invalid)) => Err(invalid),
        Err(ReadError::Io(error)) => return Err(error.into()),
    };
    if received.is_err() {
        store.remove(Slot::Incoming)?;
    }
    Ok(Done::Received(received))
}

fn next_chunk(records: &Receiver<Vec<Bytes>>, is_given_up: &AtomicBool) -> Option<Vec<Bytes>> {
    while !is_given_up.load(Ordering::Relaxed) {
        match records.recv_timeout(GIVEN_UP_EVERY) {
            Ok(chunk) => return Some(chunk),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    None
}

fn adopt<M: Machine>(store: &mut impl CheckpointStore, at: Index) -> Result<Done<M>, WriteError> {
    store.adopt(at)?;
    remove_all_but(store, [at; 2])?;
    Ok(Done::Adopted(at))
}

fn remove_all_but(store: &mut impl CheckpointStore, keep: [Index; 2]) -> io::Result<()> {
    for old in store.list()? {
        if !keep.contains(&old) {
            store.remove(old.into())?;
        }
    }
    Ok(())
}

/// Why no more checkpoints are written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The disk failed.
    #[error("writing a checkpoint failed: {0}")]
    Io(#[source] io::Error),
    /// There is no space left. A start after space was made goes on from the
    /// checkpoints before.
    #[error("writing a checkpoint failed: the disk is full; make space and start again")]
    Full(#[source] io::Error),
    /// What was written does not verify.
    #[error("a checkpoint that was just written does not verify: {0}")]
    NotReadBack(#[source] ReadError),
    /// The thread has ended.
    #[error("checkpoints are not written any more")]
    Ended,
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full(error),
            _ => Self::Io(error),
        }
    }
}
