//! Leases last as long as they must, and not beyond their end.
//!
//! An id may be granted again when the lease that had it is over, so what is followed is
//! the opening, by the order in which openings and ends were committed. The keys of a
//! lease go with it, in the same revision: that is seen where entries are applied once
//! more. Here:
//!
//! - an id is granted only while nobody has it, and one that is made up was never used;
//! - who is told that a lease is alive, or over, is told what was true at some moment
//!   between question and answer. So one that was over never lives again;
//! - none expires early, by the rule of [`EarlyExpiry`], which holds for leases as for
//!   other sessions;
//! - the time left is never more than the TTL, and if the same member has led for long and
//!   since everything that may have renewed the lease was answered, never more than the TTL
//!   less what has passed since then by that member's clock, and how late it may have
//!   applied the grant. A renewal that one member passes on to another may arrive twice,
//!   and late, and count again.

use std::collections::BTreeMap;

use conclave_core::limits;

use super::{
    Verdict, broken,
    early_expiry::{EarlyExpiry, Moment, NODES_MAX},
    serializable::Origin,
};

/// The name of this checker.
pub(crate) const NAME: &str = "leases";

/// For milliseconds that were rounded, and a turn of the leader.
const SLACK_US: u64 = 5_000;
/// How late a leader may apply what a quorum has saved, by its own clock: it has yet to save
/// it, after another save. It goes on during a part of each, and then stands still, which
/// its clock takes for two heartbeats at most, of 100 ms.
const APPLIES_US: u64 = 2 * (limits::TURNS_DURING_SAVE_US + 2 * 100_000) + SLACK_US;
/// By then a leader has got what was on its way when it began to lead.
const SETTLES_US: u64 = 10_000_000;

/// When some nodes were last seen to lead.
pub(crate) type Led = [Option<u64>; NODES_MAX];

/// What is asked of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Renew(i64),
    TimeLeft(i64),
    Revoke(i64),
}

impl Call {
    fn id(self) -> i64 {
        let (Self::Renew(id) | Self::TimeLeft(id) | Self::Revoke(id)) = self;
        id
    }
}

/// What is said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Renewed { ttl_ms: u64 },
    Left { ttl_ms: u64, left_ms: u64 },
    Revoked,
    Over,
}

/// Who leads, and since when.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Leader {
    pub(crate) node: usize,
    pub(crate) since_us: u64,
}

#[derive(Debug)]
struct Opening {
    /// Its name.
    number: i64,
    ttl_ms: u64,
    opened_us: u64,
    ended_us: Option<u64>,
    /// Renewals on their way, which may have been sent for an earlier opening; those
    /// without an answer may yet come.
    renewing: u64,
    /// When the last of them was answered, or the grant if there was none;
    /// and how long after that the leader counts from, at most.
    settled: Option<(Moment, u64)>,
}

impl Opening {
    fn is_alive_within(&self, from_us: u64, to_us: u64) -> bool {
        self.opened_us <= to_us && self.ended_us.is_none_or(|ended_us| ended_us >= from_us)
    }

    fn is_alive_throughout(&self, from_us: u64, to_us: u64) -> bool {
        self.opened_us < from_us && self.ended_us.is_none_or(|ended_us| ended_us > to_us)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// By id, in order.
    openings: BTreeMap<i64, Vec<Opening>>,
    count: i64,
    /// Grants that were committed and not answered: id, number and TTL.
    granted: BTreeMap<Origin, (i64, i64, u64)>,
    early_expiry: EarlyExpiry,
    /// Renewals that were sent when nobody had the id.
    in_vain: BTreeMap<i64, u64>,
}

impl Leases {
    /// A grant was committed that opened a lease.
    pub(crate) fn opened(
        &mut self,
        origin: Option<Origin>,
        (chosen, id): (i64, i64),
        ttl_ms: u64,
        at: Moment,
    ) -> Verdict {
        let openings = self.openings.entry(id).or_default();
        let is_alive = openings.last().is_some_and(|last| last.ended_us.is_none());
        let is_wrong = match chosen {
            0 => !openings.is_empty(),
            chosen => chosen != id,
        };
        if is_alive || is_wrong {
            return broken(
                NAME,
                format!("{chosen:x} was asked for, and {id:x} granted"),
            );
        }
        self.count += 1;
        let before = openings.last().map_or(0, |last| last.renewing);
        let in_vain = self.in_vain.get(&id).copied().unwrap_or(0);
        openings.push(Opening {
            number: self.count,
            ttl_ms,
            opened_us: at.true_us,
            ended_us: None,
            renewing: before + in_vain,
            settled: None,
        });
        if let Some(origin) = origin {
            self.granted.insert(origin, (id, self.count, ttl_ms));
        }
        Ok(())
    }

    /// A lease was over when a node applied its end first; `led` if it expired.
    pub(crate) fn ended(&mut self, id: i64, at: Moment, led: Option<&Led>) -> Verdict {
        let Some(last) = self.openings.get_mut(&id).and_then(|all| all.last_mut()) else {
            return Ok(());
        };
        last.ended_us.get_or_insert(at.true_us);
        let number = last.number;
        let Some(led) = led else { return Ok(()) };
        let since = self.early_expiry.renewed_at(number).unwrap_or(0);
        let led = led.map(|led_us| led_us.is_some_and(|led_us| led_us >= since));
        self.early_expiry.expired(number, at, led)
    }

    /// A grant is answered: `Some` with id and TTL if it opened a lease. It was sent at
    /// `sent`.
    pub(crate) fn grant_answered(
        &mut self,
        origin: Origin,
        told: Option<(i64, u64)>,
        sent: Moment,
        at: Moment,
    ) -> Verdict {
        let known = self.granted.remove(&origin);
        if known.map(|(id, _, ttl_ms)| (id, ttl_ms)) != told {
            return broken(NAME, format!("{told:?} is granted where it was {known:?}"));
        }
        let Some((id, number, ttl_ms)) = known else {
            return Ok(());
        };
        if let Some(opening) = self.opening(id, number) {
            opening.settled.get_or_insert((at, APPLIES_US));
        }
        self.early_expiry.renewed(number, sent, ttl_ms)
    }

    /// A renewal is sent; to another than the leader, as far as that is known, or to it.
    pub(crate) fn renewing(&mut self, id: i64, to_another: bool) {
        let count = 1 + u64::from(to_another);
        let last = self.openings.get_mut(&id).and_then(|all| all.last_mut());
        match last.filter(|last| last.ended_us.is_none()) {
            // What may arrive twice is never known to be over.
            Some(last) => last.renewing += count,
            None => *self.in_vain.entry(id).or_default() += 1,
        }
    }

    /// Something is said of a lease that was asked at `sent`.
    pub(crate) fn answered(
        &mut self,
        call: Call,
        told: Told,
        (sent, at): (Moment, Moment),
        leader: Leader,
    ) -> Verdict {
        let id = call.id();
        let within = (sent.true_us, at.true_us);
        let openings = self.openings.entry(id).or_default();
        let mut meant = openings
            .iter_mut()
            .filter(|opening| opening.is_alive_within(within.0, within.1));
        let (first, second) = (meant.next(), meant.next());
        if told == Told::Over {
            let is_alive = first.is_some_and(|one| one.is_alive_throughout(within.0, within.1));
            return match is_alive {
                true => broken(NAME, format!("{id:x} is said to be over, and lived")),
                false => Ok(()),
            };
        }
        let Some(opening) = first else {
            return broken(
                NAME,
                format!("{call:?} is told {told:?}, and was over before"),
            );
        };
        if second.is_some() {
            // One of two; nobody knows of which this is true.
            return Ok(());
        }
        match told {
            Told::Renewed { ttl_ms } => {
                if opening.opened_us < sent.true_us {
                    opening.renewing = opening.renewing.saturating_sub(1);
                }
                if opening.renewing == 0 {
                    opening.settled = Some((at, SLACK_US));
                }
                let number = opening.number;
                self.early_expiry.renewed(number, sent, ttl_ms)
            }
            Told::Left { ttl_ms, left_ms } => {
                if ttl_ms == opening.ttl_ms && left_ms <= opening.left_ms_max(sent, leader) {
                    return Ok(());
                }
                let what = format!("{opening:?} is said to have {left_ms} of {ttl_ms} ms left");
                broken(NAME, what)
            }
            Told::Revoked | Told::Over => Ok(()),
        }
    }

    fn opening(&mut self, id: i64, number: i64) -> Option<&mut Opening> {
        let openings = self.openings.get_mut(&id)?;
        openings.iter_mut().find(|opening| opening.number == number)
    }
}

impl Opening {
    /// For who asks at this moment.
    fn left_ms_max(&self, asked: Moment, leader: Leader) -> u64 {
        let settled = self.settled.filter(|(settled, _)| {
            self.renewing == 0 && leader.since_us + SETTLES_US < settled.true_us
        });
        let passed_us = settled.map_or(0, |(settled, late_us)| {
            let counted = |moment: Moment| moment.stall_free_us[leader.node];
            let passed_us = counted(asked).saturating_sub(counted(settled));
            passed_us.saturating_sub(late_us)
        });
        self.ttl_ms.saturating_sub(passed_us / 1_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin = (1, 1, 1);

    fn at(ms: u64) -> Moment {
        Moment {
            true_us: ms * 1_000,
            stall_free_us: [ms * 1_000; NODES_MAX],
        }
    }

    /// Granted for two seconds at 10 ms, by a leader of long ago.
    fn granted() -> Leases {
        let mut leases = Leases::default();
        leases.opened(Some(ORIGIN), (7, 7), 2_000, at(10)).unwrap();
        leases
            .grant_answered(ORIGIN, Some((7, 2_000)), at(5), at(12))
            .unwrap();
        leases
    }

    fn ask(leases: &mut Leases, call: Call, told: Told, times: (u64, u64)) -> Verdict {
        leases.answered(call, told, (at(times.0), at(times.1)), Leader::default())
    }

    const RENEWED: Told = Told::Renewed { ttl_ms: 2_000 };
    const EXPIRED: Led = [Some(u64::MAX); NODES_MAX];

    #[test]
    fn finds_a_grant_of_an_id_that_somebody_has() {
        let mut leases = granted();
        let verdict = leases.opened(None, (7, 7), 2_000, at(20));
        assert_eq!(verdict.unwrap_err().checker, NAME);
        leases.ended(7, at(30), None).unwrap();
        leases.opened(None, (7, 7), 2_000, at(40)).unwrap();
        leases.ended(7, at(50), None).unwrap();
        assert!(leases.opened(None, (0, 7), 2_000, at(60)).is_err());
        assert!(leases.opened(None, (8, 9), 2_000, at(60)).is_err());
        assert!(
            leases
                .grant_answered(ORIGIN, Some((7, 2_000)), at(1), at(2))
                .is_err()
        );
    }

    #[test]
    fn finds_one_that_lives_again_or_is_over_too_soon() {
        let mut leases = granted();
        assert!(ask(&mut leases, Call::Renew(7), Told::Over, (20, 30)).is_err());
        leases.ended(7, at(50), None).unwrap();
        ask(&mut leases, Call::Renew(7), Told::Over, (40, 60)).unwrap();
        ask(&mut leases, Call::Renew(7), RENEWED, (40, 60)).unwrap();
        assert!(ask(&mut leases, Call::Renew(7), RENEWED, (51, 60)).is_err());
        assert!(ask(&mut leases, Call::Revoke(7), Told::Revoked, (51, 60)).is_err());
    }

    #[test]
    fn finds_an_early_expiry_also_by_an_answer_that_comes_later() {
        assert!(granted().ended(7, at(1_000), Some(&EXPIRED)).is_err());
        let mut leases = granted();
        leases.renewing(7, false);
        leases.ended(7, at(2_010), Some(&EXPIRED)).unwrap();
        let verdict = ask(&mut leases, Call::Renew(7), RENEWED, (1_000, 2_020));
        assert_eq!(verdict.unwrap_err().checker, "early_expiry");
        // The next one of that id has a life of its own.
        let mut leases = granted();
        leases.ended(7, at(2_010), Some(&EXPIRED)).unwrap();
        leases.opened(None, (7, 7), 2_000, at(2_020)).unwrap();
        ask(&mut leases, Call::Renew(7), RENEWED, (3_000, 3_001)).unwrap();
        assert!(leases.ended(7, at(4_000), Some(&EXPIRED)).is_err());
    }

    #[test]
    fn finds_more_time_than_there_can_be() {
        let left = |left_ms| Told::Left {
            ttl_ms: 2_000,
            left_ms,
        };
        let mut leases = granted();
        let call = Call::TimeLeft(7);
        // A leader of late may have begun anew.
        ask(&mut leases, call, left(2_000), (900, 910)).unwrap();
        assert!(ask(&mut leases, call, left(2_001), (20, 30)).is_err());
        let from = SETTLES_US / 1_000;
        let (renewed, asked) = ((from + 100, from + 110), (from + 200, from + 210));
        leases.renewing(7, false);
        ask(&mut leases, Call::Renew(7), RENEWED, renewed).unwrap();
        ask(&mut leases, call, left(1_900), asked).unwrap();
        assert!(ask(&mut leases, call, left(1_950), asked).is_err());
        leases.renewing(7, true);
        ask(&mut leases, Call::Renew(7), RENEWED, renewed).unwrap();
        ask(&mut leases, call, left(1_950), asked).unwrap();
    }
}
