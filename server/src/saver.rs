//! The thread that writes the log while turns go on.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use conclave_core::{
    disk::FileDisk,
    limits,
    node::{Save, Saved},
};
use tokio::sync::Notify;

const GOES_ON_FOR: Duration = Duration::from_micros(limits::TURNS_DURING_SAVE_US);

const LIVES: &str = "the thread that writes the log lives as long as who gives it work";

/// See the module. When it is dropped, what was begun comes to its end.
#[derive(Debug)]
pub(crate) struct Saver {
    /// `None` once it is to end.
    to: Option<Sender<Save<FileDisk>>>,
    from: Receiver<Saved<FileDisk>>,
    /// When the save began that is under way.
    since: Option<Instant>,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// Starts the thread. `done` is told after each save.
    pub(crate) fn start(done: Arc<Notify>) -> io::Result<Self> {
        let (to, saves) = mpsc::channel::<Save<FileDisk>>();
        let (saved, from) = mpsc::channel();
        let save_all = move || {
            for save in saves {
                // An error means that nobody wants to know.
                saved.send(save.run()).ok();
                done.notify_one();
            }
        };
        let thread = thread::Builder::new().name("conclave-log".to_owned());
        Ok(Self {
            to: Some(to),
            from,
            since: None,
            thread: Some(thread.spawn(save_all)?),
        })
    }

    /// Begins a save. There must be none under way.
    pub(crate) fn save(&mut self, save: Save<FileDisk>) {
        self.since = Some(Instant::now());
        let to = self.to.as_ref().expect("it is not to end");
        assert!(to.send(save).is_ok(), "{LIVES}");
    }

    /// What has come of the save that is under way, once it is done. Blocks until then
    /// if that takes long.
    pub(crate) fn saved(&mut self) -> Option<Saved<FileDisk>> {
        let is_late = self.since?.elapsed() > GOES_ON_FOR;
        let saved = match is_late {
            true => Some(self.from.recv().expect(LIVES)),
            false => match self.from.try_recv() {
                Err(TryRecvError::Disconnected) => panic!("{LIVES}"),
                saved => saved.ok(),
            },
        };
        self.since = self.since.filter(|_| saved.is_none());
        saved
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.to = None;
        if let Some(thread) = self.thread.take() {
            // It panics only if the log does, and that was told.
            thread.join().ok();
        }
    }
}
