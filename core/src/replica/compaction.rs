//! Automatic compaction: which history the leader keeps. It decides alone and
//! proposes an entry, so nobody else needs to know the rule.

use std::collections::VecDeque;

use conclave_proto::internal::{Command, Compact, command};

use super::Replica;
use crate::{
    ids::{LogTime, Revision},
    keyspace::Keyspace,
    limits,
    machine::Machine,
};

/// Which history is kept, at least as long as it fits into the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest revisions.
    pub revisions: u64,
    /// What could be read for this long by log time, in milliseconds. A new
    /// leader counts from its start.
    pub ms: u64,
    /// Of history that is larger than this by [`crate::keyspace::Record::bytes`],
    /// the older half of the revisions goes whatever else is said.
    pub bytes: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            revisions: limits::REVISIONS_KEPT,
            ms: limits::HISTORY_KEPT_MS,
            bytes: limits::HISTORY_BYTES_KEPT,
        }
    }
}

/// What a leader has noted of the past. See the module.
#[derive(Debug, Default)]
pub(super) struct Compactor {
    /// The newest revision at some log times, the oldest in front.
    seen: VecDeque<(LogTime, Revision)>,
    next_ms: LogTime,
}

impl Compactor {
    /// The revision to compact at, if it is time to. Called often; looks once a
    /// second, or more rarely if much time is kept.
    fn due(
        &mut self,
        retention: &Retention,
        keyspace: &Keyspace,
        now: LogTime,
    ) -> Option<Revision> {
        if now < self.next_ms {
            return None;
        }
        let pause_ms = (retention.ms / limits::COMPACTION_SAMPLES).max(1_000);
        self.next_ms = now.saturating_add(pause_ms);
        let (compacted, newest) = (keyspace.compacted(), keyspace.revision());
        let old = self.newest_unkept(retention.ms, newest, now);
        let unkept = old.map(|old| old.min(newest.saturating_sub(retention.revisions)));
        // What is given up already still counts until it is dropped.
        let is_large = keyspace.history_bytes() > retention.bytes && !keyspace.has_superseded();
        let too_much = is_large.then_some(compacted.midpoint(newest));
        unkept.max(too_much).filter(|at| *at > compacted)
    }

    /// The newest revision that has been there for longer than `ms`.
    fn newest_unkept(&mut self, ms: u64, newest: Revision, now: LogTime) -> Option<Revision> {
        self.seen.push_back((now, newest));
        let is_old = |(at, _): &(LogTime, Revision)| now.saturating_sub(*at) >= ms;
        while self.seen.get(1).is_some_and(is_old) {
            self.seen.pop_front();
        }
        self.seen
            .front()
            .filter(|seen| is_old(seen))
            .map(|seen| seen.1)
    }
}

impl<M: Machine> Replica<M> {
    /// Proposes the compaction that is due by the rule of this leader.
    pub(super) fn compact(&mut self) {
        let now = self.clock.log_time();
        let (Some(leadership), Some(retention)) = (&mut self.leadership, &self.config.retention)
        else {
            return;
        };
        let keyspace = self.state.keyspace();
        if let Some(revision) = leadership.compactor.due(retention, keyspace, now) {
            #[cfg(conclave_plant)]
            if crate::plant::is("compact-locally") {
                return self.state.compact_locally(revision);
            }
            let body = Some(command::Body::Compact(Compact { revision }));
            // Refused, it comes again with the next look.
            self.propose(vec![Command { origin: None, body }]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETENTION: Retention = Retention {
        revisions: 3,
        ms: 10_000,
        bytes: 5_120,
    };

    fn write(keyspace: &mut Keyspace, value: Vec<u8>) {
        let mut overlay = keyspace.overlay();
        overlay.put("key".into(), value.into(), None);
        let writes = overlay.into_writes();
        keyspace.keep(writes);
    }

    /// One revision a second, each looked at.
    fn run(retention: &Retention, keyspace: &mut Keyspace, seconds: u64) -> Vec<Option<Revision>> {
        let mut compactor = Compactor::default();
        let second = |second| {
            write(keyspace, Vec::new());
            let due = compactor.due(retention, keyspace, second * 1_000);
            assert_eq!(compactor.due(retention, keyspace, second * 1_000), None);
            due
        };
        (1..=seconds).map(second).collect()
    }

    #[test]
    fn what_is_old_enough_goes_and_the_newest_revisions_stay() {
        // In second s the newest revision is s + 1.
        let due = run(&RETENTION, &mut Keyspace::new(), 12);
        assert_eq!(due[..10], [None; 10]);
        assert_eq!(due[10..], [Some(2), Some(3)]);
        let many = Retention {
            revisions: 11,
            ..RETENTION
        };
        let due = run(&many, &mut Keyspace::new(), 13);
        assert_eq!(due[10..], [Some(1), Some(2), Some(3)]);
        let newest = Retention { ms: 0, ..RETENTION };
        assert_eq!(run(&newest, &mut Keyspace::new(), 4)[3], Some(2));
    }

    #[test]
    fn what_is_compacted_is_not_compacted_again() {
        let mut keyspace = Keyspace::new();
        run(&RETENTION, &mut keyspace, 20);
        keyspace.compact(20).unwrap();
        assert_eq!(run(&RETENTION, &mut keyspace, 10), [None; 10]);
    }

    #[test]
    fn half_of_too_much_goes_at_once() {
        let mut keyspace = Keyspace::new();
        write(&mut keyspace, vec![0; 5_000]); // 2
        write(&mut keyspace, Vec::new()); // 3
        write(&mut keyspace, Vec::new()); // 4
        let mut compactor = Compactor::default();
        assert_eq!(compactor.due(&RETENTION, &keyspace, 1_000), Some(2));
        keyspace.compact(3).unwrap();
        assert_eq!(compactor.due(&RETENTION, &keyspace, 2_000), None);
        keyspace.sweep(9);
        assert_eq!(compactor.due(&RETENTION, &keyspace, 3_000), None);
    }
}
