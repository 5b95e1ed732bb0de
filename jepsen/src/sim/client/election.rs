//! Every second lock is an election: who holds it leads, and proclaims. So what must be
//! true of locks is looked at for elections, too.

use conclave_proto::internal::{
    ElectCampaign, ElectProclaim, ElectResign, command, primitive_command::Command,
};

use super::{LockClient, hold::Aside, internal};
use crate::sim::{
    checks::{is_election, lock_name},
    ground::{About, CallBody, Ground},
};

/// The value of a candidate that has proclaimed nothing yet.
const FIRST_WORD: u64 = 0;

impl LockClient {
    /// The same as an acquire of a lock, for an election.
    pub(super) fn campaign_of(
        &self,
        lock: usize,
        wait_ms: Option<u64>,
        request: u64,
    ) -> Option<Command> {
        let session = self.session.as_ref().filter(|_| is_election(lock))?;
        Some(Command::ElectCampaign(ElectCampaign {
            name: lock_name(lock),
            session_id: session.id,
            owner: self.owner.clone(),
            request: Some(internal(session.requests.number(request))),
            wait_ms,
            value: word(FIRST_WORD),
            ..ElectCampaign::default()
        }))
    }

    /// The same as a release.
    pub(super) fn resignation_of(
        &self,
        lock: usize,
        token: u64,
        request: u64,
    ) -> Option<command::Body> {
        let session = self.session.as_ref().filter(|_| is_election(lock))?;
        let resign = Command::ElectResign(ElectResign {
            name: lock_name(lock),
            session_id: session.id,
            owner: self.owner.clone(),
            token,
            request: Some(internal(session.requests.number(request))),
        });
        Some(conclave_primitives::command(resign))
    }

    /// Says something as the leader, beside what it does.
    pub(super) fn proclaim(&mut self, lock: usize, token: u64, ground: &mut Ground) {
        let Some(session) = self.session.as_ref().filter(|_| is_election(lock)) else {
            return;
        };
        let said = 1 + ground.rng.below(1 << 40);
        let proclaim = Command::ElectProclaim(ElectProclaim {
            name: lock_name(lock),
            session_id: session.id,
            owner: self.owner.clone(),
            token,
            value: word(said),
            request: Some(internal(session.requests.number(0))),
        });
        let body = CallBody::Command(conclave_primitives::command(proclaim));
        let about = About::Proclaim { lock, token, said };
        let call = self.link.send(body, about, ground);
        self.aside = Some((call, Aside::Proclaim { token }));
    }
}

fn word(said: u64) -> bytes::Bytes {
    said.to_be_bytes().to_vec().into()
}
