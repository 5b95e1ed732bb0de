//! Hashes over all keys, made of the state little by little: some of it each turn.

use std::collections::VecDeque;

use super::{AnswerBody, Failure, Replica};
use crate::{
    ids::{RequestNumber, Revision},
    limits,
    machine::Machine,
};

/// Those that are asked for, in turn.
#[derive(Debug, Default)]
pub(super) struct Hashings {
    asked: VecDeque<Asked>,
    /// The first of them is under way.
    is_begun: bool,
}

#[derive(Debug)]
struct Asked {
    number: RequestNumber,
    revision: Option<Revision>,
    /// After this its caller is taken for gone, by CLOCK_BOOTTIME.
    deadline_us: u64,
}

impl Hashings {
    pub(super) fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    /// What was under way is gone, with the state that it was made of.
    pub(super) fn restart(&mut self) {
        self.is_begun = false;
    }
}

impl<M: Machine> Replica<M> {
    /// Takes the wish for a hash as of a revision that this node has; `None`: the newest
    /// when it begins.
    pub(super) fn hash(&mut self, number: RequestNumber, revision: Option<Revision>) {
        if !self.may_read() {
            let leader = self.consensus.leader();
            return self.fail(number, Failure::NotLeader { leader });
        }
        if self.hashings.asked.len() >= limits::HASHINGS_MAX {
            return self.fail(number, Failure::Overloaded);
        }
        self.hashings.asked.push_back(Asked {
            number,
            revision,
            deadline_us: self.now.boot_us + limits::HASHING_US_MAX,
        });
    }

    /// Does the share of one turn.
    pub(super) fn go_on_hashing(&mut self) {
        let Some(Asked {
            number, revision, ..
        }) = self.hashings.asked.front()
        else {
            return;
        };
        let (number, revision) = (*number, *revision);
        let begun = match self.hashings.is_begun {
            true => Ok(()),
            false => self.state.begin_hash(revision),
        };
        self.hashings.is_begun = begun.is_ok();
        let (max, max_bytes) = (
            limits::DRAWN_PER_TURN_MAX,
            limits::HASHED_BYTES_PER_TURN_MAX,
        );
        let hashed = begun.map(|()| self.state.go_on_hashing(max, max_bytes));
        if let Some(hashed) = hashed.transpose() {
            self.hashings.asked.pop_front();
            self.hashings.is_begun = false;
            self.answer(number, AnswerBody::Hashed(hashed));
        }
    }

    /// Gives up those that nobody waits for any more. The oldest are first.
    pub(super) fn give_up_late_hashings(&mut self) {
        let now_us = self.now.boot_us;
        while let Some(late) = self.hashings.asked.front()
            && late.deadline_us <= now_us
        {
            let number = late.number;
            self.hashings.asked.pop_front();
            self.hashings.is_begun = false;
            self.state.give_up_hash();
            self.fail(number, Failure::Overloaded);
        }
    }
}
