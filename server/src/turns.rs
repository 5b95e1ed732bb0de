//! The thread that runs the node: it shares it with the links to other members,
//! so that a message costs no change of threads on either side.

use std::sync::Arc;

use conclave_core::{
    disk::FileDisk,
    node::{Node, Progress},
    replica::Fatal,
};
use conclave_primitives::Primitives;
use tokio::{sync::Notify, task, time};

use crate::saver::Saver;

/// How often a turn steps back before it goes on, so that what it sent is written to
/// sockets meanwhile: once for the stream, once for its connection, and once for what
/// these have woken.
const STEPS_BACK: usize = 3;

/// Runs turns until the node stops or cannot go on. `arrived` is told by the
/// node's inbox.
///
/// While there is nothing else to do, a save is made on this thread: that costs no change
/// of threads. Otherwise it is made on another, and turns go on.
pub(crate) async fn run(
    mut node: Node<Primitives, FileDisk>,
    arrived: Arc<Notify>,
) -> Result<(), Fatal> {
    let mut saver = Saver::start(Arc::clone(&arrived))
        .map_err(|error| Fatal::Storage(format!("cannot start the thread for the log: {error}")))?;
    loop {
        let wait = node.wait();
        if wait.is_zero() {
            // Others on this thread have their turn, too.
            task::yield_now().await;
        } else {
            // Either way it is time for a turn.
            time::timeout(wait, arrived.notified()).await.ok();
        }
        if let Some(saved) = saver.saved() {
            node.saved(saved)?;
        }
        if let Some(save) = node.begin_turn()? {
            for _ in 0..STEPS_BACK {
                task::yield_now().await;
            }
            match node.has_arrived() {
                true => saver.save(save),
                false => node.saved(save.run())?,
            }
        }
        if node.finish_turn()? == Progress::Stopped {
            return Ok(());
        }
    }
}
