//! The thread that writes checkpoints, so that the node's thread does not wait.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{Builder, JoinHandle},
};

use super::{CheckpointStore, Image, ReadError, read};
use crate::ids::Index;

/// See the module. When it is dropped, what is being written is given up.
#[derive(Debug)]
pub struct Writer {
    /// `None` once it is to end.
    orders: Option<Sender<Order>>,
    results: Receiver<Result<Index, WriteError>>,
    is_given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Order {
    image: Image,
    /// The older and the newer checkpoint there are. Others go first, before it
    /// takes space, and the older one when it is durable.
    keep: [Index; 2],
}

impl Writer {
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
        if let Some(orders) = &self.orders {
            // If the thread has ended, it has said why.
            orders.send(Order { image, keep }).ok();
        }
    }

    /// The checkpoint that has become durable and was read back, if one has since
    /// it was asked last. An error is the last there is.
    pub fn poll(&self) -> Option<Result<Index, WriteError>> {
        match self.results.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(WriteError::Ended)),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.is_given_up.store(true, Ordering::Relaxed);
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic there ends the process in a release.
            thread.join().ok();
        }
    }
}

fn run(
    mut store: impl CheckpointStore,
    orders: &Receiver<Order>,
    done: &Sender<Result<Index, WriteError>>,
    is_given_up: &AtomicBool,
) {
    while let Ok(order) = orders.recv() {
        let result = write(&mut store, order, is_given_up);
        let is_over = result.is_err();
        // Nobody may listen any more.
        done.send(result).ok();
        if is_over {
            return;
        }
    }
}

fn write(
    store: &mut impl CheckpointStore,
    order: Order,
    is_given_up: &AtomicBool,
) -> Result<Index, WriteError> {
    let Order { image, keep } = order;
    let at = image.applied();
    remove_all_but(store, keep)?;
    let mut records = 0u64;
    let mut rows = image
        .into_records()
        .take_while(|_| !is_given_up.load(Ordering::Relaxed))
        .inspect(|_| records += 1);
    store.write(at, &mut rows)?;
    drop(rows);
    if is_given_up.load(Ordering::Relaxed) {
        return Err(WriteError::Ended);
    }
    read(store, at).map_err(WriteError::NotReadBack)?;
    remove_all_but(store, [keep[1], at])?;
    tracing::info!(checkpoint = at, records, "wrote a checkpoint");
    Ok(at)
}

fn remove_all_but(store: &mut impl CheckpointStore, keep: [Index; 2]) -> io::Result<()> {
    for old in store.list()? {
        if !keep.contains(&old) {
            store.remove(old)?;
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
