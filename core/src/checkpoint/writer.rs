//! The thread that writes checkpoints, its own and those of other members, so that
//! the node's thread does not wait.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{
            Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel,
        },
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use bytes::Bytes;

use super::{CheckpointStore, Invalid, Part, ReadError, Slot, read, records, verify};
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
    /// Where the parts of the checkpoint go that is being written.
    parts: Option<Sender<Part>>,
    /// How many of them wait.
    waiting: Arc<AtomicUsize>,
    results: Receiver<Result<Done<M>, WriteError>>,
    is_given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Order {
    /// A checkpoint that follows the newest one that is whole.
    Write {
        at: Index,
        newest: Index,
        parts: Parts,
    },
    Receive(Receiver<Vec<Bytes>>),
    Adopt(Index),
}

/// The parts of a checkpoint, as they come.
#[derive(Debug)]
struct Parts {
    parts: Receiver<Part>,
    waiting: Arc<AtomicUsize>,
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
            parts: None,
            waiting: Arc::default(),
            results,
            is_given_up,
            thread: Some(thread),
        })
    }

    /// Orders a checkpoint of the entry `at` that follows `newest`, the newest one that
    /// is whole; 0 for none. That one and the one before it stay while this one is
    /// written, and that one alone when it is durable. Its parts are to follow.
    pub fn begin(&mut self, at: Index, newest: Index) {
        let (sender, parts) = channel();
        self.parts = Some(sender);
        self.waiting = Arc::default();
        let parts = Parts {
            parts,
            waiting: Arc::clone(&self.waiting),
        };
        self.order(Order::Write { at, newest, parts });
    }

    /// Whether few parts wait to be written.
    pub fn has_room(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) < limits::CHECKPOINT_PARTS_WAITING_MAX
    }

    /// Takes the next part of the checkpoint that was begun.
    pub fn take(&mut self, part: Part) {
        let is_last = matches!(part, Part::Rest(_));
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if let Some(parts) = &self.parts {
            // If the thread has ended, it has said why.
            parts.send(part).ok();
        }
        if is_last {
            self.parts = None;
        }
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
    // What a start has not gone on from is of no use.
    if let Err(error) = store.remove(Slot::Incoming) {
        done.send(Err(error.into())).ok();
        return;
    }
    while let Ok(order) = orders.recv() {
        let result = match order {
            Order::Write { at, newest, parts } => {
                let parts = std::iter::from_fn(|| parts.next(is_given_up));
                write(&mut store, at, parts, newest, is_given_up)
            }
            Order::Receive(records) => receive(&mut store, &records, is_given_up),
            Order::Adopt(at) => adopt(&mut store, at)
                .map(|()| Done::Adopted(at))
                .map_err(WriteError::from),
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
    at: Index,
    parts: impl Iterator<Item = Part>,
    newest: Index,
    is_given_up: &AtomicBool,
) -> Result<Done<M>, WriteError> {
    keep_two(store, newest)?;
    let mut written = 0u64;
    let mut rows = records(parts)
        .take_while(|_| !is_given_up.load(Ordering::Relaxed))
        .inspect(|_| written += 1);
    store.write(at.into(), &mut rows)?;
    drop(rows);
    if is_given_up.load(Ordering::Relaxed) {
        store.remove(at.into())?;
        return Err(WriteError::Ended);
    }
    verify(store, at).map_err(WriteError::NotReadBack)?;
    keep_two(store, at)?;
    tracing::info!(checkpoint = at, records = written, "wrote a checkpoint");
    Ok(Done::Written(at))
}

fn receive<M: Machine>(
    store: &mut impl CheckpointStore,
    records: &Receiver<Vec<Bytes>>,
    is_given_up: &AtomicBool,
) -> Result<Done<M>, WriteError> {
    let chunks = std::iter::from_fn(|| next(records, is_given_up));
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

impl Parts {
    fn next(&self, is_given_up: &AtomicBool) -> Option<Part> {
        let part = next(&self.parts, is_given_up)?;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Some(part)
    }
}

/// What comes next; none if it is given up, or nobody sends any more.
fn next<T>(incoming: &Receiver<T>, is_given_up: &AtomicBool) -> Option<T> {
    while !is_given_up.load(Ordering::Relaxed) {
        match incoming.recv_timeout(GIVEN_UP_EVERY) {
            Ok(item) => return Some(item),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    None
}

/// Makes the incoming one the only one: the log goes on from no other.
pub fn adopt(store: &mut impl CheckpointStore, at: Index) -> io::Result<()> {
    store.adopt(at)?;
    for other in store.list()? {
        if other != at {
            store.remove(other.into())?;
        }
    }
    tracing::info!(checkpoint = at, "keeps a checkpoint of another member");
    Ok(())
}

/// Removes all checkpoints but this one and the one before it. That one may be
/// damaged: a start does not look at it if it does not have to. It may also be all
/// that there is to fall back on.
pub fn keep_two(store: &mut impl CheckpointStore, newest: Index) -> io::Result<()> {
    let stored = store.list()?;
    let before = stored.iter().copied().filter(|at| *at < newest).max();
    for at in stored {
        if at != newest && Some(at) != before {
            store.remove(at.into())?;
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
    use std::{convert::Infallible, sync::Mutex};

    use conclave_proto::internal::Request;

    use super::*;
    use crate::{
        checkpoint::{Image, SimCheckpoints, Versions},
        ids::{LogTime, SessionId},
        keyspace::{Change, Keyspace, Overlay, Picture, Record},
        machine::{Cause, Context, Executed, Settled, View},
        session::{EndReason, Sessions},
        system::System,
    };

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

        fn read(&self, slot: Slot, take: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<()> {
            self.store.read(slot, take)
        }

        fn write(&mut self, slot: Slot, rows: &mut dyn Iterator<Item = Bytes>) -> io::Result<()> {
            self.seen.lock().unwrap().push(self.store.list()?);
            self.store.write(slot, rows)
        }

        fn adopt(&mut self, at: Index) -> io::Result<()> {
            self.store.adopt(at)
        }

        fn remove(&mut self, slot: Slot) -> io::Result<()> {
            self.store.remove(slot)
        }
    }

    /// What is replicated makes no difference here.
    #[derive(Debug, PartialEq)]
    struct Nothing;

    impl Machine for Nothing {
        type Command = Infallible;
        type Reply = Infallible;
        type Rejection = Infallible;
        type Note = Infallible;
        type Event = Infallible;
        type Query = Infallible;
        type Answer = Infallible;

        fn rebuild(_: &Keyspace) -> Self {
            Self
        }

        fn decode(_: Bytes) -> Option<Infallible> {
            None
        }

        fn request(command: &Infallible) -> Option<(SessionId, &Request)> {
            match *command {}
        }

        fn keep(answer: &Result<Infallible, Infallible>) -> Bytes {
            match *answer {
                Ok(never) | Err(never) => match never {},
            }
        }

        fn recall(_: &Bytes) -> Result<Infallible, Infallible> {
            unreachable!("nothing is kept")
        }

        fn execute(
            &self,
            _: &mut Context<'_>,
            command: Infallible,
        ) -> Result<Executed<Self>, Infallible> {
            match command {}
        }

        fn next_due(&self) -> Option<LogTime> {
            None
        }

        fn fire(&self, _: &mut Context<'_>) -> Infallible {
            unreachable!("no timer is due")
        }

        fn outlives(&self, _: &Record, _: EndReason, _: LogTime) -> Option<Bytes> {
            None
        }

        fn withdraw(&self, _: &mut Context<'_>, _: SessionId, _: &[u64]) {}

        fn follow(&self, _: &mut Overlay<'_>) {}

        fn holdings(&self, _: View<'_>, _: SessionId) -> Infallible {
            unreachable!("nobody attaches")
        }

        fn settle(&mut self, _: &[Change], _: Cause<'_, Infallible>) -> Settled<Self> {
            Settled::default()
        }

        fn query(&self, _: View<'_>, query: Infallible) -> Infallible {
            match query {}
        }

        fn work(answer: &Infallible) -> usize {
            match *answer {}
        }
    }

    const WAIT: Duration = Duration::from_secs(60);

    fn done(writer: &Writer<Nothing>) -> Done<Nothing> {
        writer.results.recv_timeout(WAIT).unwrap().unwrap()
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
            watched.store.write((*at).into(), &mut rows).unwrap();
        }
        let mut writer = Writer::start(watched.clone()).unwrap();
        writer.begin(200, newest);
        writer.take(Part::Versions(Versions::default()));
        writer.take(Part::Rest(Box::new(image(200))));
        assert!(matches!(done(&writer), Done::Written(200)));
        assert!(writer.has_room());
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
    fn what_another_member_sends_is_there_once_it_is_whole_and_takes_the_place_of_all() {
        let mut store = SimCheckpoints::new();
        let mut old = image(100).into_records();
        store.write(100.into(), &mut old).unwrap();
        let writer = Writer::start(store.clone()).unwrap();
        let rows: Vec<Bytes> = image(300).into_records().collect();
        let cut_short = writer.receive();
        cut_short.send(rows[..rows.len() - 1].to_vec()).unwrap();
        drop(cut_short);
        let received = done(&writer);
        assert!(matches!(received, Done::Received(Err(Invalid::Incomplete))));
        let sink = writer.receive();
        for row in rows {
            sink.send(vec![row]).unwrap();
        }
        drop(sink);
        match done(&writer) {
            Done::Received(Ok(state)) => assert_eq!(state.applied(), 300),
            other => panic!("{other:?}"),
        }
        assert_eq!(store.list().unwrap(), [100]);
        writer.adopt(300);
        assert!(matches!(done(&writer), Done::Adopted(300)));
        assert_eq!(store.list().unwrap(), [300]);
        // A sink that nobody fills does not keep it from ending.
        let _sink = writer.receive();
        drop(writer);
    }

    #[test]
    fn so_many_parts_wait_and_one_without_its_end_is_given_up() {
        let store = SimCheckpoints::new();
        let mut writer = Writer::<Nothing>::start(store.clone()).unwrap();
        // The thread is busy with this.
        let _sink = writer.receive();
        writer.begin(200, 0);
        for _ in 0..limits::CHECKPOINT_PARTS_WAITING_MAX {
            assert!(writer.has_room());
            writer.take(Part::Versions(Versions::default()));
        }
        assert!(!writer.has_room());
        drop(writer);
        assert_eq!(store.list().unwrap(), [0; 0]);
    }

    #[test]
    fn one_that_a_start_has_passed_over_goes_first() {
        let expected = (vec![50], vec![50, 200]);
        assert_eq!(write_behind(50, &[50, 100]), expected);
        assert_eq!(write_behind(0, &[50, 100]), (vec![], vec![200]));
    }
}
