//! Commands on their way: proposed by the leader, passed on by everybody else.

use std::{collections::BTreeSet, mem};

use conclave_proto::internal::{
    Command, Entry, ExpireSessions, Forward, ForwardRefused, Origin, PublishMember, Stamp, command,
    peer_message,
};
use prost::Message as _;

use super::{Arrived, Failure, Replica, Role, peers::to, reads::Wish, waiting::Pending};
use crate::{
    APPLY_VERSION,
    ids::{NodeId, RequestNumber, SessionId},
    keyspace::reach,
    limits,
    machine::Machine,
};

impl<M: Machine> Replica<M> {
    /// Sends commands and renewals of this turn where they belong.
    pub(super) fn dispatch(&mut self) {
        let arrived = mem::take(&mut self.arrived);
        if self.leadership.is_some() {
            self.lead(arrived);
        } else {
            let Arrived {
                commands,
                forwarded,
                renewals,
            } = arrived;
            self.refuse_forwarded(forwarded);
            let leader = self.consensus.leader();
            match leader {
                Some(leader) if leader != self.config.node && !self.is_behind() => {
                    self.forward(leader, commands);
                    self.forward_renewals(leader, renewals);
                }
                _ => self.refuse(leader, commands, renewals),
            }
        }
    }

    fn lead(&mut self, arrived: Arrived) {
        let mut commands = Vec::new();
        for (number, body) in arrived.commands {
            if self.admit(number, self.config.node) {
                let origin = self.origin(number);
                commands.push(Command {
                    origin: Some(origin),
                    body: Some(body),
                });
            }
        }
        for (from, forward) in arrived.forwarded {
            self.take_forwarded(from, forward, &mut commands);
        }
        for wish in arrived.renewals {
            self.take_renewal(wish);
        }
        let commands = self.without_unhurried(commands);
        let keyspace = self.state.keyspace();
        let touched = |command: &Command| {
            let session = match &command.body {
                Some(command::Body::CloseSession(close)) => close.session_id,
                Some(command::Body::RevokeLease(revoke)) => revoke.session_id,
                Some(command::Body::AttachSession(attach)) => attach.session_id,
                Some(body) => return reach::of_command(keyspace, body),
                None => return 0,
            };
            keyspace.keys_bound(SessionId(session))
        };
        for commands in packed(commands, touched) {
            self.propose(commands);
        }
        self.expire();
        self.publish_self();
        self.compact();
        self.guard_quota();
        self.raise_apply_version();
        self.propose_due_timers();
    }

    fn take_forwarded(&mut self, from: NodeId, forward: Forward, accepted: &mut Vec<Command>) {
        let Forward {
            boot,
            term,
            commands,
        } = forward;
        if term != self.taken.term() {
            // Of another term: its sender has heard of this one, or will.
            return;
        }
        for command in commands {
            if !may_be_forwarded::<M>(from, boot, &command) {
                tracing::warn!(peer = %from, "dropped a malformed command");
                continue;
            }
            let number = command.origin.as_ref().map(|origin| origin.number);
            if number.is_none_or(|number| self.taken.take(from, boot, number)) {
                accepted.push(command);
            }
        }
    }

    /// Proposes one entry; whether raft took it. If not, its commands are
    /// refused.
    pub(super) fn propose(&mut self, commands: Vec<Command>) -> bool {
        self.clock.raise(self.state.system().log_time());
        let stamp = Stamp {
            log_time_ms: self.clock.log_time(),
            date_ms: self.now.date_ms,
        };
        let entry = Entry {
            stamp: Some(stamp),
            commands,
        };
        if !self.consensus.propose(entry.encode_to_vec()) {
            self.refuse_commands(entry.commands);
            return false;
        }
        let index = self.consensus.last_index();
        let origins = entry.commands.into_iter().filter_map(|it| it.origin);
        let mut askers: BTreeSet<_> = origins.map(|origin| NodeId(origin.node)).collect();
        askers.remove(&self.config.node);
        if let Some(leadership) = &mut self.leadership {
            let awaited = askers.into_iter().map(|asker| (index, asker));
            leadership.awaited.extend(awaited);
        }
        true
    }

    /// They are not in the log, and will not be.
    pub(super) fn refuse_commands(&mut self, commands: Vec<Command>) {
        for origin in commands.into_iter().filter_map(|command| command.origin) {
            self.refuse_command(&origin);
        }
    }

    fn expire(&mut self) {
        let now_us = self.clock.micros();
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        let Some(liveness) = &mut leadership.liveness else {
            return;
        };
        // One at a time, and not one after the other, so that expiry does not crowd out
        // others where it is applied.
        let is_paused = leadership
            .expiry_resumes_us
            .is_some_and(|resumes_us| self.now.boot_us < resumes_us);
        if is_paused || leadership.expiry_entry > self.state.applied() {
            return;
        }
        let keyspace = self.state.keyspace();
        let work = |session: SessionId| 1 + keyspace.keys_bound(session);
        let due = liveness.expire(now_us, limits::EXPIRY_WORK_PER_COMMAND_MAX, work);
        let is_full =
            due.iter().copied().map(work).sum::<usize>() >= limits::EXPIRY_WORK_PER_COMMAND_MAX;
        leadership.expiry_resumes_us =
            is_full.then(|| self.now.boot_us.saturating_add(limits::EXPIRY_PAUSE_US));
        if due.is_empty() {
            return;
        }
        let sessions = self.state.sessions();
        let named = due
            .iter()
            .filter_map(|id| sessions.get(*id).map(|live| (id.0, live.opened_at)));
        let (session_ids, opened_at_ms) = named.unzip();
        let expire = ExpireSessions {
            term: leadership.term,
            session_ids,
            opened_at_ms,
        };
        let body = Some(command::Body::ExpireSessions(expire));
        let is_proposed = self.propose(vec![Command { origin: None, body }]);
        let entry = self.consensus.last_index();
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        match &mut leadership.liveness {
            _ if is_proposed => leadership.expiry_entry = entry,
            Some(liveness) => {
                liveness.expiry_dropped(&due);
                leadership.expiry_resumes_us = None;
            }
            None => {}
        }
    }

    /// Proposes an entry for timers that are due, or for what a compaction left
    /// to drop; applying it does the work.
    fn propose_due_timers(&mut self) {
        let Some(leadership) = &self.leadership else {
            return;
        };
        let under_way = leadership.timers_entry > self.state.applied();
        let now = self.clock.log_time();
        let is_due = self.state.next_due().is_some_and(|due| due <= now);
        if !under_way && is_due && self.propose(Vec::new()) {
            let entry = self.consensus.last_index();
            if let Some(leadership) = &mut self.leadership {
                leadership.timers_entry = entry;
            }
        }
    }

    /// Tells the cluster this member's name and addresses, until it knows.
    fn publish_self(&mut self) {
        if self.now.boot_us < self.next_publish_us || self.is_published() {
            return;
        }
        self.next_publish_us = self.now.boot_us + 2 * self.election_us();
        let member = PublishMember {
            node: self.config.node.0,
            name: self.config.name.clone(),
            client_urls: self.config.client_urls.clone(),
            apply_version: APPLY_VERSION,
        };
        let body = Some(command::Body::PublishMember(member));
        let command = Command { origin: None, body };
        match self.consensus.leader() {
            _ if self.leadership.is_some() => {
                self.propose(vec![command]);
            }
            Some(leader) => self.send_forward(leader, vec![command]),
            None => {}
        }
    }

    pub(super) fn is_published(&self) -> bool {
        self.state
            .system()
            .members()
            .get(&self.config.node)
            .is_some_and(|member| {
                member.name == self.config.name
                    && member.client_urls == self.config.client_urls
                    && member.apply_version == APPLY_VERSION
            })
    }

    fn forward(&mut self, leader: NodeId, arrived: Vec<(RequestNumber, command::Body)>) {
        let mut commands = Vec::new();
        for (number, body) in arrived {
            if self.admit(number, leader) {
                let origin = self.origin(number);
                commands.push(Command {
                    origin: Some(origin),
                    body: Some(body),
                });
            }
        }
        for commands in packed(commands, |_| 0) {
            self.send_forward(leader, commands);
        }
        self.publish_self();
    }

    fn send_forward(&mut self, leader: NodeId, commands: Vec<Command>) {
        let forward = Forward {
            boot: self.config.boot,
            term: self.consensus.term(),
            commands,
        };
        self.outbox
            .push(to(leader, peer_message::Message::Forward(forward)));
    }

    /// Nobody leads, as far as this node knows, or it would not learn what comes of
    /// a request.
    fn refuse(
        &mut self,
        leader: Option<NodeId>,
        commands: Vec<(RequestNumber, command::Body)>,
        renewals: Vec<Wish>,
    ) {
        let failure = Failure::NotLeader { leader };
        for (number, _) in commands {
            self.fail(number, failure);
        }
        for wish in renewals {
            self.refuse_renewal(wish.from);
        }
    }

    /// This node does not lead. Only a leader of the term can have taken what is
    /// forwarded, so if that was this node in this start of its process, it knows
    /// what it did not take and never will. Of the rest it says nothing.
    fn refuse_forwarded(&mut self, forwarded: Vec<(NodeId, Forward)>) {
        for (from, forward) in forwarded {
            let Forward {
                boot,
                term,
                commands,
            } = forward;
            for origin in commands.into_iter().filter_map(|command| command.origin) {
                let number = origin.number;
                if term == self.taken.term() && self.taken.is_new(from, boot, number) {
                    self.refusals.entry((from, boot)).or_default().push(number);
                }
            }
        }
    }

    /// A command that was taken and could not be proposed.
    fn refuse_command(&mut self, origin: &Origin) {
        if !self.is_mine(origin) {
            let sender = (NodeId(origin.node), origin.boot);
            self.refusals.entry(sender).or_default().push(origin.number);
            return;
        }
        if self.pending.remove(&origin.number).is_none() {
            return;
        }
        let is_over = self.consensus.role() != Role::Leader;
        let failure = if is_over || self.consensus.is_handing_over() {
            Failure::NotLeader { leader: None }
        } else {
            Failure::Overloaded
        };
        self.fail(origin.number, failure);
    }

    pub(super) fn receive_refusal(&mut self, refused: &ForwardRefused) {
        if refused.boot != self.config.boot {
            return;
        }
        let leader = self.consensus.leader();
        for number in &refused.numbers {
            if self.pending.remove(number).is_some() {
                self.fail(*number, Failure::NotLeader { leader });
            }
        }
    }

    fn origin(&self, number: RequestNumber) -> Origin {
        Origin {
            node: self.config.node.0,
            boot: self.config.boot,
            number,
        }
    }

    /// Notes a command as on its way; false if too many are.
    fn admit(&mut self, number: RequestNumber, leader: NodeId) -> bool {
        if self.pending.len() >= limits::PENDING_COMMANDS_MAX {
            self.fail(number, Failure::Overloaded);
            return false;
        }
        let deadline_us = self.request_deadline_us();
        let under = (leader, self.consensus.term());
        self.pending.insert(number, Pending { under, deadline_us });
        true
    }
}

/// Commands in order, in as few lots as the limits of an entry allow. `touched` says how
/// many keys the session has that one closes, or attaches to, or how many are in reach of
/// its ranges.
fn packed(commands: Vec<Command>, touched: impl Fn(&Command) -> usize) -> Vec<Vec<Command>> {
    let mut lots: Vec<Vec<Command>> = Vec::new();
    let (mut bytes, mut keys) = (0, 0);
    for command in commands {
        let (size, its_keys) = (command.encoded_len(), touched(&command));
        bytes += size;
        keys += its_keys;
        match lots.last_mut() {
            Some(lot)
                if lot.len() < limits::ENTRY_COMMANDS_MAX
                    && bytes <= limits::ENTRY_BYTES_MAX
                    && keys <= limits::ENTRY_KEYS_MAX =>
            {
                lot.push(command);
            }
            _ => {
                (bytes, keys) = (size, its_keys);
                lots.push(vec![command]);
            }
        }
    }
    lots
}

/// What only a leader may propose, or what this version does not know, is not
/// taken from another member: in the log it would stop every node.
fn may_be_forwarded<M: Machine>(from: NodeId, boot: u64, command: &Command) -> bool {
    let from_sender =
        |origin: &Origin| NodeId(origin.node) == from && origin.boot == boot && origin.number > 0;
    match &command.body {
        Some(command::Body::PublishMember(member)) => member.node == from.0,
        Some(command::Body::AttachSession(attach))
            if attach.wanted.len() > limits::REQUESTS_OPEN_MAX =>
        {
            false
        }
        Some(
            command::Body::OpenSession(_)
            | command::Body::AttachSession(_)
            | command::Body::CloseSession(_)
            | command::Body::GrantLease(_)
            | command::Body::RevokeLease(_)
            | command::Body::Txn(_)
            | command::Body::Put(_)
            | command::Body::DeleteRange(_)
            | command::Body::Compact(_)
            | command::Body::NoSpace(_),
        ) => command.origin.as_ref().is_some_and(from_sender),
        Some(command::Body::Machine(bytes)) => {
            command.origin.as_ref().is_some_and(from_sender) && M::decode(bytes.clone()).is_some()
        }
        Some(command::Body::ExpireSessions(_) | command::Body::RaiseApplyVersion(_)) | None => {
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_for_so_many_keys_or_for_one_command_with_more() {
        let keys = [4_000, 96, 0, 1, 5_000, 0];
        let command = |number| Command {
            origin: Some(Origin {
                number,
                ..Origin::default()
            }),
            body: None,
        };
        let touched = |command: &Command| {
            let number = command.origin.as_ref().map_or(0, |origin| origin.number);
            keys[usize::try_from(number).unwrap_or_default()]
        };
        let lots = packed((0..6).map(command).collect(), touched);
        let lots: Vec<Vec<usize>> = lots
            .iter()
            .map(|lot| lot.iter().map(touched).collect())
            .collect();
        assert_eq!(lots, [vec![4_000, 96, 0], vec![1], vec![5_000], vec![0]]);
    }
}
