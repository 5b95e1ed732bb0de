//! What a node knows of itself and the cluster, as of the end of its last turn.

use std::sync::Arc;

use super::Replica;
use crate::{
    ids::{Index, NodeId, Revision, Term},
    machine::Machine,
    watch,
};

/// What a node knows of itself and the cluster, for status, metrics, leader hints.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The current term.
    pub term: Term,
    /// Who leads, if known.
    pub leader: Option<NodeId>,
    /// What this node is.
    pub role: Role,
    /// Up to where entries are applied.
    pub applied: Index,
    /// Up to where entries are committed.
    pub committed: Index,
    /// The last entry of the log.
    pub last: Index,
    /// The newest revision.
    pub revision: Revision,
    /// The lowest revision that can be read; 0 if all can.
    pub compacted: Revision,
    /// Live sessions.
    pub sessions: usize,
    /// Live keys.
    pub keys: usize,
    /// The size of the state; see [`crate::state::State::bytes`].
    pub state_bytes: u64,
    /// What readers of events take, on this node.
    pub watching: watch::Load,
    /// Whether this node waits for a checkpoint of the leader.
    pub is_behind: bool,
    /// The members that raised the alarm NOSPACE.
    pub out_of_space: Vec<NodeId>,
    /// Members that have served: id, name, client addresses.
    pub members: Arc<Vec<(NodeId, String, Vec<String>)>>,
}

impl Status {
    /// Whether the alarm NOSPACE is raised.
    pub fn is_out_of_space(&self) -> bool {
        !self.out_of_space.is_empty()
    }
}

/// See [`Status::role`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Its directory is new; it may not vote before enough others know it.
    #[default]
    Joining,
    /// Follows a leader, or waits for one.
    Follower,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

impl<M: Machine> Replica<M> {
    pub(super) fn update_status(&mut self) {
        let system = self.state.system();
        if system.publications() != self.published_seen {
            self.published_seen = system.publications();
            let members = system.members().iter();
            let members =
                members.map(|(id, member)| (*id, member.name.clone(), member.client_urls.clone()));
            self.status.members = Arc::new(members.collect());
        }
        self.status.term = self.consensus.term();
        self.status.leader = self.consensus.leader();
        self.status.role = match self.admission {
            Some(_) => Role::Joining,
            None => self.consensus.role(),
        };
        self.status.applied = self.state.applied();
        self.status.committed = self.consensus.committed();
        self.status.last = self.consensus.last_index();
        self.status.revision = self.state.keyspace().revision();
        self.status.compacted = self.state.keyspace().compacted();
        self.status.sessions = self.state.sessions().len();
        self.status.keys = self.state.keyspace().len();
        self.status.state_bytes = self.state.bytes();
        self.status.watching = self.watchers.load();
        self.status.is_behind = self.is_behind();
        let out_of_space = self.state.system().out_of_space();
        self.status.out_of_space = out_of_space.iter().copied().collect();
    }
}
