//! Commands that a leader holds back for a moment, since nobody gains by haste.
//!
//! Who asks for a lock that others hold and wait for gets it after all of them, and most
//! give it up by a command of their own. So a request for a place in a queue goes into the
//! log with the next command that comes, in front of it, and has the place that it would
//! have had. For a contended lock that halves the entries, and the one that hands it on does
//! not wait for the disk behind the one that only queues. Where all in front go without a
//! command, since their sessions or waits end, the lock is free for
//! `limits::UNHURRIED_WITHIN_US` at most.

use conclave_proto::internal::{Command, command};

use super::Replica;
use crate::{limits, machine::Machine};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Unhurried {
    commands: Vec<Command>,
    /// When they go without company.
    due_us: Option<u64>,
}

impl Unhurried {
    /// When the first must go, by CLOCK_BOOTTIME.
    pub(super) fn due_us(&self) -> Option<u64> {
        self.due_us
    }

    /// All that are held back, in order.
    pub(super) fn take(&mut self) -> Vec<Command> {
        self.due_us = None;
        std::mem::take(&mut self.commands)
    }
}

impl<M: Machine> Replica<M> {
    /// What is to be proposed now, of what was held back and what has arrived since.
    pub(super) fn without_unhurried(&mut self, arrived: Vec<Command>) -> Vec<Command> {
        let can_wait = arrived.iter().all(|command| self.can_wait(command));
        let Some(leadership) = &mut self.leadership else {
            return arrived;
        };
        let unhurried = &mut leadership.unhurried;
        unhurried.commands.extend(arrived);
        if unhurried.commands.is_empty() {
            return Vec::new();
        }
        let now_us = self.now.boot_us;
        let due_us = *unhurried
            .due_us
            .get_or_insert(now_us + limits::UNHURRIED_WITHIN_US);
        let is_full = unhurried.commands.len() >= limits::UNHURRIED_MAX;
        match can_wait && now_us < due_us && !is_full {
            true => Vec::new(),
            false => unhurried.take(),
        }
    }

    fn can_wait(&self, command: &Command) -> bool {
        let Some(command::Body::Machine(body)) = &command.body else {
            return false;
        };
        let decoded = M::decode(body.clone());
        decoded.is_some_and(|command| self.state.machine().can_wait(self.state.view(), &command))
    }
}
