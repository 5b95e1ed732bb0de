//! Answers, and notices for streams, on their way from the loop thread to the thread
//! that waits for them.
//!
//! One turn of the loop answers many requests at once. Each I/O thread has a
//! mailbox, where the loop thread puts the answers for that thread, and wakes it
//! once, after the last of them: a wake costs more than an answer, and answers
//! that arrive together leave in one write for each connection.

use std::{
    fmt, mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use conclave_core::{replica::Failure, watch::Notice};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::gateway::Answer;

/// What became of a request.
pub(crate) type Outcome = Result<Answer, Failure>;

/// See the module.
#[derive(Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Vec<Letter>>,
    posted: Notify,
}

enum Letter {
    Answer(oneshot::Sender<Outcome>, Outcome),
    Notice(mpsc::UnboundedSender<Notice>, Notice),
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl Mailbox {
    /// Puts an answer in; [`Mailbox::post`] must follow.
    pub(crate) fn put(&self, to: oneshot::Sender<Outcome>, outcome: Outcome) {
        self.letters().push(Letter::Answer(to, outcome));
    }

    /// The same for what a stream is told.
    pub(crate) fn put_notice(&self, to: mpsc::UnboundedSender<Notice>, notice: Notice) {
        self.letters().push(Letter::Notice(to, notice));
    }

    /// Has everything that was put in delivered.
    pub(crate) fn post(&self) {
        if !self.letters().is_empty() {
            self.posted.notify_one();
        }
    }

    /// Delivers, for ever; runs on the thread to which the mailbox belongs.
    pub(crate) async fn deliver(&self) {
        loop {
            self.posted.notified().await;
            let letters = mem::take(&mut *self.letters());
            for letter in letters {
                // An error means that nobody waits for it any more.
                match letter {
                    Letter::Answer(to, outcome) => drop(to.send(outcome)),
                    Letter::Notice(to, notice) => drop(to.send(notice)),
                }
            }
        }
    }

    fn letters(&self) -> MutexGuard<'_, Vec<Letter>> {
        // Nothing in here can stop half way.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
