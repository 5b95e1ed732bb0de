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

/// How often a turn steps back before it blocks on its sync, so that what it sent
/// is written to sockets meanwhile: once for the stream, once for its connection,
/// and once for what these have woken.
const STEPS_BACK: usize = 3;

/// Runs turns until the node stops or cannot go on. `arrived` is told by the
/// node's inbox.
pub(crate) async fn run(
    mut node: Node<Primitives, FileDisk>,
    arrived: Arc<Notify>,
) -> Result<(), Fatal> {
    loop {
        let wait = node.wait();
        if wait.is_zero() {
            // Others on this thread have their turn, too.
            task::yield_now().await;
        } else {
            // Either way it is time for a turn.
            time::timeout(wait, arrived.notified()).await.ok();
        }
        if node.begin_turn()? {
            for _ in 0..STEPS_BACK {
                task::yield_now().await;
            }
        }
        if node.finish_turn()? == Progress::Stopped {
            return Ok(());
        }
    }
}
