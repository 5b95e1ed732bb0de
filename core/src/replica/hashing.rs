//! Hashes over all keys, made of the state little by little: some of it each turn.

use std::collections::VecDeque;

use super::{AnswerBody, Failure, Replica};
use crate::{
    ids::{RequestNumber, Revision},
    keyspace::Hashing,
    limits,
    machine::Machine,
};

/// Those that are asked for, the first of them under way.
#[derive(Debug, Default)]
pub(super) struct Hashings(VecDeque<(RequestNumber, Hashing)>);

impl Hashings {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<M: Machine> Replica<M> {
    /// Begins a hash as of a revision that this node has; `None`: the newest.
    pub(super) fn hash(&mut self, number: RequestNumber, revision: Option<Revision>) {
        if self.is_behind() {
            let leader = self.consensus.leader();
            return self.fail(number, Failure::NotLeader { leader });
        }
        if self.hashings.0.len() >= limits::HASHINGS_MAX {
            return self.fail(number, Failure::Overloaded);
        }
        match Hashing::new(self.state.keyspace(), revision) {
            Ok(hashing) => self.hashings.0.push_back((number, hashing)),
            Err(error) => self.answer(number, AnswerBody::Hashed(Err(error))),
        }
    }

    /// Does the share of one turn.
    pub(super) fn go_on_hashing(&mut self) {
        let Some((number, hashing)) = self.hashings.0.front_mut() else {
            return;
        };
        let number = *number;
        let (max, max_bytes) = (
            limits::DRAWN_PER_TURN_MAX,
            limits::HASHED_BYTES_PER_TURN_MAX,
        );
        let hashed = hashing.go_on(self.state.keyspace(), max, max_bytes);
        if let Some(hashed) = hashed.transpose() {
            self.hashings.0.pop_front();
            self.answer(number, AnswerBody::Hashed(hashed));
        }
    }
}
