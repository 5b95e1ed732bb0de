//! A turn in its two halves, the sync that is between them or goes on meanwhile, and what
//! leaves with it.

use std::mem;

use conclave_core::{
    ids::NodeId,
    limits,
    log::Batch,
    replica::{AnswerBody, EventBody, Finished, Input, Role},
    session::EndReason,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::PeerMessage;

use super::{Node, Running, Sync, id, index};
use crate::{
    checkers::leases::Leader,
    sim::{
        ground::{Event, Ground, Reply},
        tally::Operation,
    },
};

/// How often an index is made anew and compared, in a million turns.
const REBUILDS: u64 = 200;
/// How often nothing else is done during a sync, in a million.
const BLOCKS: u64 = 500_000;

impl Node {
    /// The first half of a turn, if one is due; and the second, unless a sync is between
    /// them.
    pub(crate) fn turn(&mut self, ground: &mut Ground) {
        if !self.alarm.rings(ground) {
            return;
        }
        let now = self.clocks(ground);
        let Some(running) = &mut self.running else {
            return;
        };
        let is_held_up = |sync: Sync| {
            sync.blocks || ground.now_us - sync.since_us > limits::TURNS_DURING_SAVE_US
        };
        if self.paused || running.sync.is_some_and(is_held_up) {
            return;
        }
        let inputs = running.take_inbox();
        if inputs
            .iter()
            .any(|input| matches!(input, Input::Fetched(_)))
            && !running.is_at_rest()
        {
            // It may begin the log anew, under nothing that is on its way there.
            running.inbox = inputs;
            return self.write(true, ground);
        }
        ground.stall_free[self.index].turn(ground.now_us);
        let is_idle = inputs.is_empty();
        let begun = match running.replica.begin(now, inputs) {
            Ok(begun) => begun,
            Err(fatal) => return ground.checks.node_failed(self.index, &fatal),
        };
        send(self.index, begun.messages, ground);
        let begins_anew = begun.batch.as_ref().is_some_and(Batch::begins_anew);
        if let Some(batch) = begun.batch {
            ground.checks.logs(self.index, &batch);
            running.unsaved.push(batch);
        }
        if running.sync.is_none() {
            if !running.unsaved.is_empty() {
                let blocks = begins_anew || ground.rng.chance(BLOCKS);
                self.write(blocks, ground);
                if blocks {
                    return;
                }
            } else if is_idle
                && running.log.wants_mark()
                && let Err(error) = running.log.mark()
            {
                return self.disk_failed(&error, ground);
            }
        }
        self.finish(ground);
    }

    /// Writes what waits for the log, and begins to sync it.
    fn write(&mut self, blocks: bool, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        for batch in mem::take(&mut running.unsaved) {
            running.handed += 1;
            if let Err(error) = running.log.append(&batch) {
                return self.disk_failed(&error, ground);
            }
        }
        running.sync = Some(Sync {
            since_us: ground.now_us,
            blocks,
            is_unnoticed: false,
        });
        let takes = (10 + ground.rng.skewed(ground.settings.sync_us)) * self.slowness;
        let at_us = ground.now_us + takes;
        let (node, boot) = (self.index, self.boot);
        ground.schedule(at_us, Event::Synced { node, boot });
    }

    /// A sync has taken its time.
    pub(crate) fn synced(&mut self, boot: u64, ground: &mut Ground) {
        let paused = self.paused;
        let running = self.running.as_mut().filter(|_| boot == self.boot);
        let Some((running, sync)) = running.and_then(|running| {
            let sync = running.sync?;
            Some((running, sync))
        }) else {
            return;
        };
        if paused {
            running.sync = Some(Sync {
                is_unnoticed: true,
                ..sync
            });
            return;
        }
        if self.fails_next_sync {
            self.disk.fail_syncs(1);
        }
        if let Err(error) = running.log.sync() {
            return self.disk_failed(&error, ground);
        }
        running.sync = None;
        running.replica.saved(running.handed);
        if sync.blocks {
            self.finish(ground);
        } else {
            self.cut(ground);
            self.alarm.set(ground.now_us, ground);
        }
    }

    /// The second half of a turn.
    fn finish(&mut self, ground: &mut Ground) {
        let index = self.index;
        let Some(running) = &mut self.running else {
            return;
        };
        let finished = match running.replica.finish() {
            Ok(finished) => finished,
            Err(fatal) => return ground.checks.node_failed(index, &fatal),
        };
        let status = running.replica.status();
        if status.role == Role::Leader {
            ground.led_us[index] = Some(ground.now_us);
            if status.term > ground.term {
                ground.term = status.term;
                ground.leader = Leader {
                    node: index,
                    since_us: ground.now_us,
                };
            }
        }
        let (fetch, installed) = (finished.fetch, finished.installed);
        running.deliver(index, finished, ground);
        if let Some(at) = installed {
            self.installed(at, ground);
        }
        if let Some(fetch) = fetch {
            self.fetch(fetch, ground);
        }
        self.keep_checkpoints(ground);
        let Some(running) = &mut self.running else {
            return;
        };
        let next_us = self.clock.true_at(running.replica.next_turn_us());
        let next_us = if running.inbox.iter().any(|input| running.can_take(input)) {
            ground.now_us
        } else {
            next_us
        };
        self.alarm.set(next_us.max(ground.now_us + 1), ground);
    }
}

impl Running {
    /// A checkpoint is not taken before the log is at hand.
    fn can_take(&self, input: &Input<Primitives>) -> bool {
        self.sync.is_none() || !matches!(input, Input::Fetched(_))
    }

    /// What has arrived.
    fn take_inbox(&mut self) -> Vec<Input<Primitives>> {
        let arrived = mem::take(&mut self.inbox);
        let (now, later) = arrived.into_iter().partition(|input| self.can_take(input));
        self.inbox = later;
        now
    }

    fn is_at_rest(&self) -> bool {
        self.sync.is_none() && self.unsaved.is_empty()
    }

    /// Events before answers, for the checkers: who was forced out is known
    /// before the next holder is told.
    fn deliver(&mut self, node: usize, finished: Finished<Primitives>, ground: &mut Ground) {
        send(node, finished.messages, ground);
        let applied = self.replica.state().applied();
        if applied != self.applied {
            self.committed(node, applied, ground);
        }
        self.notify(node, finished.notices, ground);
        if !finished.events.is_empty() {
            let at = ground.moment();
            let led = ground.led_us;
            let led_since = |since| led.map(|led| led.is_some_and(|at: u64| at >= since));
            for event in &finished.events {
                ground.checks.published(event, at, led_since);
            }
        }
        for (number, result) in finished.answers {
            let Some(caller) = self.callers.remove(&number) else {
                ground
                    .checks
                    .node_failed(node, &format_args!("call {number} answered twice"));
                continue;
            };
            ground.checks.dropped(node, number, caller.about);
            if caller.is_command {
                let origin = (id(node).0, self.process, number);
                ground.checks.command_answered(origin, &result);
            }
            let reply = match result {
                Ok(answer) => {
                    self.lease_answered(node, number, &caller, &answer.body, ground);
                    if matches!(answer.body, AnswerBody::NoSpace) {
                        ground.did(Operation::NoSpace);
                    }
                    let (now_us, state) = (ground.now_us, self.replica.state());
                    let about = caller.about;
                    let checks = &mut ground.checks;
                    if checks.answered(about, caller.sent, &answer, now_us, state) {
                        ground.did(Operation::AnsweredAgain);
                    }
                    Reply::Answer(Box::new(answer))
                }
                Err(failure) => Reply::Failure(failure),
            };
            ground.tell(format_args!(
                "node {node} answers {}.{}: {reply:?}",
                caller.actor, caller.id
            ));
            ground.send_reply(node, caller.actor, caller.id, reply);
        }
        for event in finished.events {
            if matches!(event.body, EventBody::SessionEnded(EndReason::Expired))
                && self.replica.status().role == Role::Leader
            {
                ground.did(Operation::SessionExpired);
            }
            ground.publish(node, event.session.0, event.body);
        }
        if applied != self.applied {
            self.applied = applied;
            ground
                .checks
                .applied(node, ground.settings.locks, &self.replica);
            if ground.rng.chance(REBUILDS) {
                ground.checks.rebuilt(&self.replica);
                ground.did(Operation::IndexRebuilt);
            }
        }
    }
}

fn send(from: usize, messages: Vec<(NodeId, PeerMessage)>, ground: &mut Ground) {
    for (to, message) in messages {
        ground.send_peer(from, index(to), message);
    }
}
