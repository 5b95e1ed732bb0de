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
    newest: Index,
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

    /// Orders a checkpoint that follows `newest`, the newest one that is whole; 0 for
    /// none. That one and the one before it stay while this one is written, and that
    /// one alone when it is durable.
    pub fn write(&self, image: Image, newest: Index) {
        if let Some(orders) = &self.orders {
            // If the thread has ended, it has said why.
            orders.send(Order { image, newest }).ok();
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
    let Order { image, newest } = order;
    let at = image.applied();
    keep_two(store, newest)?;
    let mut records = 0u64;
    let mut rows = image
        .into_records()
        .take_while(|_| !is_given_up.load(Ordering::Relaxed))
        .inspect(|_| records += 1);
    store.write(at, &mut rows)?;
    drop(rows);
    if is_given_up.load(Ordering::Relaxed) {
        store.remove(at)?;
        return Err(WriteError::Ended);
    }
    read(store, at).map_err(WriteError::NotReadBack)?;
    keep_two(store, at)?;
    tracing::info!(checkpoint = at, records, "wrote a checkpoint");
    Ok(at)
}

/// Removes all checkpoints but this one and the one before it. That one may be
/// damaged: a start does not look at it if it does not have to. It may also be all
/// that there is to fall back on.
pub fn keep_two(store: &mut impl CheckpointStore, newest: Index) -> io::Result<()> {
    let stored = store.list()?;
    let before = stored.iter().copied().filter(|at| *at < newest).max();
    for at in stored {
        if at != newest && Some(at) != before {
            store.remove(at)?;
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

#[cfg(test)]
mod tests {
    use std::{sync::Mutex, time::Duration};

    use bytes::Bytes;

    use super::*;
    use crate::{checkpoint::SimCheckpoints, keyspace::Picture, session::Sessions, system::System};

    /// Notes which checkpoints there are whenever one is written.
    #[derive(Clone, Debug, Default)]
    struct Watched {
        store: SimCheckpoints,
        seen: Arc<Mutex<Vec<Vec<Index>>>>,
    }

    impl CheckpointStore for Watched {
        fn list(&self) -> io::Result<Vec<Index>> {
            self.store.list()
        }

        fn read(&self, at: Index, take: &mut dyn FnMut(Bytes) -> bool) -> io::Result<()> {
            self.store.read(at, take)
        }

        fn write(&mut self, at: Index, rows: &mut dyn Iterator<Item = Bytes>) -> io::Result<()> {
            self.seen.lock().unwrap().push(self.store.list()?);
            self.store.write(at, rows)
        }

        fn remove(&mut self, at: Index) -> io::Result<()> {
            self.store.remove(at)
        }
    }

    fn image(applied: Index) -> Image {
        Image {
            cluster: 1,
            applied,
            term: 1,
            digest: 0,
            keyspace: Picture::default(),
            sessions: Sessions::default(),
            system: System::default(),
        }
    }

    /// What is there while the checkpoint at 200 is written, and when it is done.
    fn write_behind(newest: Index, stored: &[Index]) -> (Vec<Index>, Vec<Index>) {
        let mut watched = Watched::default();
        for at in stored {
            let mut rows = image(*at).into_records();
            watched.store.write(*at, &mut rows).unwrap();
        }
        let writer = Writer::start(watched.clone()).unwrap();
        writer.write(image(200), newest);
        let wait = Duration::from_secs(60);
        assert_eq!(writer.results.recv_timeout(wait).unwrap().unwrap(), 200);
        let during = watched.seen.lock().unwrap().remove(0);
        (during, watched.store.list().unwrap())
    }

    #[test]
    fn two_are_left_while_one_is_written_also_after_a_start() {
        assert_eq!(write_behind(0, &[]), (vec![], vec![200]));
        assert_eq!(write_behind(100, &[100]), (vec![100], vec![100, 200]));
        let both = (vec![50, 100], vec![100, 200]);
        assert_eq!(write_behind(100, &[50, 100]), both);
        assert_eq!(write_behind(100, &[10, 50, 100]), both);
    }

    #[test]
    fn one_that_a_start_has_passed_over_goes_first() {
        let expected = (vec![50], vec![50, 200]);
        assert_eq!(write_behind(50, &[50, 100]), expected);
        assert_eq!(write_behind(0, &[50, 100]), (vec![], vec![200]));
    }
}
