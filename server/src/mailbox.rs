//! Answers on their way from the loop thread to the thread that waits for them.
//!
//! One turn of the loop answers many requests at once. Each I/O thread has a
//! mailbox, where the loop thread puts the answers for that thread, and wakes it
//! once, after the last of them: a wake costs more than an answer, and answers
//! that arrive together leave in one write for each connection.

use std::{
    fmt, mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use conclave_core::replica::Failure;
use tokio::sync::{Notify, oneshot};

use crate::gateway::Answer;

/// What became of a request.
pub(crate) type Outcome = Result<Answer, Failure>;

/// See the module.
#[derive(Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Vec<(oneshot::Sender<Outcome>, Outcome)>>,
    posted: Notify,
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl Mailbox {
    /// Puts an answer in; [`Mailbox::post`] must follow.
    pub(crate) fn put(&self, to: oneshot::Sender<Outcome>, outcome: Outcome) {
        self.letters().push((to, outcome));
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
            for (to, outcome) in letters {
                // An error means that nobody waits for it any more.
                to.send(outcome).ok();
            }
        }
    }

    fn letters(&self) -> MutexGuard<'_, Vec<(oneshot::Sender<Outcome>, Outcome)>> {
        // Nothing in here can stop half way.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
