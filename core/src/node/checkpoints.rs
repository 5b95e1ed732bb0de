//! What a node does about checkpoints: it orders its own when they are due, takes note
//! of what the writer has done, and cuts the log behind what is durable.

use std::{mem, sync::atomic::Ordering};

use super::{Node, storage, unpoisoned};
use crate::{
    checkpoint::Done,
    disk::Disk,
    ids::Index,
    limits,
    machine::Machine,
    replica::{Fatal, Input},
};

impl<M: Machine + Send + 'static, D: Disk> Node<M, D> {
    /// Takes note of what the writer has done.
    pub(super) fn checkpoints_done(&mut self) -> Result<Vec<Input<M>>, Fatal> {
        let mut inputs = Vec::new();
        if mem::take(&mut self.is_fetch_refused) {
            inputs.push(Input::Fetched(None));
        }
        while let Some(done) = self.checkpoints.poll() {
            match done.map_err(|error| Fatal::Storage(error.to_string()))? {
                Done::Written(at) => {
                    self.schedule.complete(at);
                    self.checkpointed(at);
                }
                Done::Received(received) => {
                    self.schedule.discard();
                    if let Err(reason) = &received {
                        tracing::warn!(%reason, "a checkpoint of another member did not arrive");
                    }
                    self.received = Some(received.ok());
                }
                Done::Adopted(at) => self.checkpointed(at),
            }
        }
        // It may begin the log anew, under nothing that is on its way there.
        if self.log.is_some()
            && let Some(received) = self.received.take()
        {
            self.save()?;
            inputs.push(Input::Fetched(received));
        }
        Ok(inputs)
    }

    fn checkpointed(&mut self, at: Index) {
        self.replica.checkpointed(at);
        self.shared.checkpoint.store(at, Ordering::Relaxed);
    }

    /// The state of another member's checkpoint is that of this one.
    pub(super) fn installed(&mut self, at: Index) {
        self.shared.installs.fetch_add(1, Ordering::Relaxed);
        self.schedule.install(at);
        self.checkpoints.adopt(at);
    }

    /// Orders a checkpoint when one is due, and draws it.
    pub(super) fn keep_checkpoints(&mut self) {
        self.schedule
            .want(self.shared.wanted.load(Ordering::Relaxed));
        let written_bytes = self.written_bytes;
        let state = self.replica.state();
        let (applied, state_bytes) = (state.applied(), state.bytes());
        if self.schedule.is_due(applied, written_bytes, state_bytes) {
            self.schedule.begin(applied, written_bytes);
            self.replica.begin_image();
            self.checkpoints.begin(applied, self.schedule.newest());
        }
        if self.checkpoints.has_room()
            && let Some(part) = self.replica.draw_part(limits::DRAWN_PER_TURN_MAX)
        {
            self.checkpoints.take(part);
        }
    }

    /// Cuts the log, if it is here.
    pub(super) fn cut(&mut self) -> Result<(), Fatal> {
        let Some(log) = &mut self.log else {
            return Ok(());
        };
        let held = self.replica.held_by_all();
        let sent = unpoisoned(self.shared.sent.lock()).iter().min().copied();
        let upto = self.schedule.cut(held, sent, log.bytes());
        if upto > held && !self.is_warned {
            let reason = "the log is too long to keep it for a member that is away";
            tracing::info!(upto, held, reason, "that member will get a checkpoint");
        }
        self.is_warned = upto > held;
        // Before its base a log holds nothing.
        if log.cut(upto.max(log.base())).map_err(storage)? {
            self.replica.cut(upto);
            let bytes = log.bytes();
            tracing::info!(upto, bytes, "cut the log");
            self.shared.log_bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}
