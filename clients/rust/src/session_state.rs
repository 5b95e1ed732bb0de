//! The life of one session as its client sees it, without clock or I/O: when
//! to send a renewal, until when the session is certainly alive, and why it
//! ended. The client drives it with real time, the simulator with its own.
//!
//! The one promise: [`SessionState::deadline`] lies before the earliest moment
//! at which the cluster can end the session for want of renewals, if the clocks
//! of client and servers differ in rate by at most 5 %. That holds because the
//! deadline counts from the moment a renewal was *sent*, while the servers
//! count from a later one, when it arrived.
//!
//! Times are microseconds of a clock that never steps and goes on during
//! suspend (`CLOCK_BOOTTIME`); its zero does not matter.

use std::{fmt, time::Duration};

/// A moment or a span, in microseconds.
pub type Micros = u64;

/// The part of the TTL, in percent, after which the client gives the session
/// up. What is left pays for clocks that run at different rates.
const DEADLINE_PERCENT: u64 = 85;
/// One attempt to renew is given up as lost after this long at most.
const ATTEMPT_TIMEOUT_MAX: Micros = 1_000_000;
/// The pause after a failed attempt is between these.
const RETRY_PAUSE_MIN: Micros = 20_000;
const RETRY_PAUSE_MAX: Micros = 500_000;

/// The session logic. See the head of this file for what it promises.
#[derive(Clone, Debug)]
pub struct SessionState {
    ttl: Micros,
    /// When the newest acknowledged renewal (or the opening) was sent.
    confirmed: Micros,
    /// When the next renewal is due, should no answer change that.
    next_renewal: Micros,
    /// The newest attempt, while unanswered.
    in_flight: Option<Attempt>,
    last_attempt: u64,
    lost: Option<LossReason>,
}

/// One renewal that was sent. Hand it back with its outcome, however late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    number: u64,
    sent: Micros,
}

/// What there is to do now; see [`SessionState::poll`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Poll {
    /// Send this renewal now.
    pub renew: Option<Attempt>,
    /// Poll again at this time, if nothing happens before. `None`: never, the
    /// session is lost.
    pub wake_at: Option<Micros>,
}

/// How a session stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Alive, as far as anybody can know.
    Active,
    /// Renewals fail. Unless one succeeds, the session is lost in `left`: time
    /// to bring guarded work to a safe point.
    Suspect {
        /// Time until the client's own deadline.
        left: Duration,
    },
    /// Over, and never alive again.
    Lost(LossReason),
}

/// Why a session or a grant ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LossReason {
    /// It was not renewed in time.
    SessionExpired,
    /// Its client closed it.
    SessionClosed,
    /// Its lease was revoked through the etcd API.
    Revoked,
    /// An operator took the grant away.
    Forced {
        /// What the operator said.
        reason: String,
    },
    /// Someone deleted the key that the grant stands for.
    KeyDeleted,
    /// Another process attached to the session, with its credentials.
    Superseded,
    /// The cluster says that there is no such lease any more: it was revoked, or it
    /// expired.
    LeaseGone,
}

impl SessionState {
    /// A session whose opening was sent at `sent` and has been acknowledged
    /// with this TTL.
    pub fn opened(sent: Micros, ttl: Micros) -> SessionState {
        SessionState {
            ttl,
            confirmed: sent,
            next_renewal: sent + ttl / 3,
            in_flight: None,
            last_attempt: 0,
            lost: None,
        }
    }

    /// Takes note of the time: gives the session up if its deadline has
    /// passed, and says whether to send a renewal.
    pub fn poll(&mut self, now: Micros) -> Poll {
        self.advance(now);
        if self.lost.is_some() {
            return Poll {
                renew: None,
                wake_at: None,
            };
        }
        let renew = (now >= self.next_renewal).then(|| self.start_attempt(now));
        let change = if now < self.suspect_from() {
            self.suspect_from()
        } else {
            self.deadline()
        };
        Poll {
            renew,
            wake_at: Some(change.min(self.next_renewal)),
        }
    }

    /// The renewal `attempt` was acknowledged.
    pub fn renewed(&mut self, now: Micros, attempt: Attempt) {
        self.advance(now);
        if self.lost.is_some() {
            return;
        }
        self.confirmed = self.confirmed.max(attempt.sent);
        if self.in_flight == Some(attempt) {
            self.in_flight = None;
            self.next_renewal = attempt.sent + self.ttl / 3;
        }
    }

    /// The renewal `attempt` failed without an answer about the session.
    pub fn renewal_failed(&mut self, now: Micros, attempt: Attempt) {
        self.advance(now);
        if self.in_flight == Some(attempt) {
            self.in_flight = None;
            self.next_renewal = now + self.retry_pause();
        }
    }

    /// The session ended: told by the cluster, or closed here. The first
    /// reason stays.
    pub fn ended(&mut self, now: Micros, reason: LossReason) {
        self.advance(now);
        self.lost.get_or_insert(reason);
    }

    /// How the session stands at `now`.
    pub fn status(&self, now: Micros) -> Status {
        match self.lost_at(now) {
            Some(reason) => Status::Lost(reason),
            None if now < self.suspect_from() => Status::Active,
            None => Status::Suspect {
                left: self.remaining(now),
            },
        }
    }

    /// Why the session is lost at `now`, if it is.
    pub fn lost_at(&self, now: Micros) -> Option<LossReason> {
        let expired = now >= self.deadline();
        self.lost
            .clone()
            .or_else(|| expired.then_some(LossReason::SessionExpired))
    }

    /// When the newest acknowledged renewal, or the opening, was sent.
    pub fn confirmed(&self) -> Micros {
        self.confirmed
    }

    /// The moment from which the session may be over: 0.85 TTL after the last
    /// acknowledged renewal was sent.
    pub fn deadline(&self) -> Micros {
        self.confirmed + self.ttl / 100 * DEADLINE_PERCENT
    }

    /// Time until the deadline; zero if the session is lost.
    pub fn remaining(&self, now: Micros) -> Duration {
        let left = match self.lost {
            Some(_) => 0,
            None => self.deadline().saturating_sub(now),
        };
        Duration::from_micros(left)
    }

    /// How long one renewal may stay unanswered before another is sent.
    pub fn attempt_timeout(&self) -> Micros {
        (self.ttl / 6).min(ATTEMPT_TIMEOUT_MAX)
    }

    fn suspect_from(&self) -> Micros {
        self.confirmed + self.ttl / 3 * 2
    }

    fn retry_pause(&self) -> Micros {
        (self.ttl / 24).clamp(RETRY_PAUSE_MIN, RETRY_PAUSE_MAX)
    }

    fn start_attempt(&mut self, now: Micros) -> Attempt {
        self.last_attempt += 1;
        let attempt = Attempt {
            number: self.last_attempt,
            sent: now,
        };
        self.in_flight = Some(attempt);
        self.next_renewal = now + self.attempt_timeout();
        attempt
    }

    /// Makes the passing of the deadline final, so that an acknowledgement
    /// that comes later revives nothing.
    fn advance(&mut self, now: Micros) {
        if self.lost.is_none() {
            self.lost = self.lost_at(now);
        }
    }
}

impl LossReason {
    /// The stable, machine-readable word for it.
    pub fn code(&self) -> &'static str {
        match self {
            LossReason::SessionExpired => "session_expired",
            LossReason::SessionClosed => "session_closed",
            LossReason::Revoked => "revoked",
            LossReason::Forced { .. } => "forced",
            LossReason::KeyDeleted => "key_deleted",
            LossReason::Superseded => "superseded",
            LossReason::LeaseGone => "lease_gone",
        }
    }
}

impl fmt::Display for LossReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LossReason::Forced { reason } => write!(f, "forced: {reason}"),
            _ => f.write_str(self.code()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TTL: Micros = 12_000_000;

    #[test]
    fn renews_a_third_of_the_ttl_after_the_last_sending() {
        let mut state = SessionState::opened(100, TTL);
        assert_eq!(
            state.poll(100),
            Poll {
                renew: None,
                wake_at: Some(100 + TTL / 3)
            }
        );
        let attempt = state.poll(100 + TTL / 3).renew.expect("due");
        state.renewed(100 + TTL / 3 + 700, attempt);
        assert_eq!(
            state.poll(100 + TTL / 3 + 700).wake_at,
            Some(100 + 2 * (TTL / 3))
        );
    }

    #[test]
    fn a_failed_renewal_is_retried_soon_and_suspicion_grows_into_loss() {
        let mut state = SessionState::opened(0, TTL);
        let first = state.poll(TTL / 3).renew.expect("due");
        state.renewal_failed(TTL / 3 + 10, first);
        let wake = state.poll(TTL / 3 + 10).wake_at.expect("alive");
        assert_eq!(wake, TTL / 3 + 10 + 500_000);
        assert!(state.poll(wake).renew.is_some());
        assert_eq!(state.status(wake), Status::Active);
        let late = TTL / 3 * 2;
        assert!(matches!(state.status(late), Status::Suspect { .. }));
        assert_eq!(
            state.status(state.deadline()),
            Status::Lost(LossReason::SessionExpired)
        );
    }

    #[test]
    fn a_late_acknowledgement_counts_from_the_sending_of_its_own_attempt() {
        let mut state = SessionState::opened(0, TTL);
        let first = state.poll(TTL / 3).renew.expect("due");
        let second = state
            .poll(TTL / 3 + 1_000_000)
            .renew
            .expect("the first timed out");
        state.renewed(TTL / 3 + 1_500_000, first);
        assert_eq!(state.deadline(), TTL / 3 + TTL / 100 * 85);
        state.renewed(TTL / 3 + 1_600_000, second);
        assert_eq!(state.deadline(), TTL / 3 + 1_000_000 + TTL / 100 * 85);
    }

    #[test]
    fn the_first_reason_stays() {
        let mut state = SessionState::opened(0, TTL);
        state.ended(5, LossReason::Revoked);
        state.ended(6, LossReason::SessionClosed);
        assert_eq!(state.status(u64::MAX), Status::Lost(LossReason::Revoked));
        assert_eq!(
            state.poll(7),
            Poll {
                renew: None,
                wake_at: None
            }
        );
    }

    #[test]
    fn an_acknowledgement_behind_the_deadline_revives_nothing() {
        let mut state = SessionState::opened(0, TTL);
        let attempt = state.poll(TTL / 3).renew.expect("due");
        state.renewed(state.deadline(), attempt);
        assert_eq!(state.status(0), Status::Lost(LossReason::SessionExpired));
    }

    /// What becomes of one renewal.
    #[derive(Clone, Copy, Debug)]
    enum Fate {
        Acknowledged { there: Micros, back: Micros },
        AnswerLost,
        Failed { after: Micros },
    }

    fn fate() -> impl Strategy<Value = Fate> {
        let delay = || prop_oneof![0..20_000_u64, 0..3_000_000_u64];
        prop_oneof![
            3 => (delay(), delay()).prop_map(|(there, back)| Fate::Acknowledged { there, back }),
            1 => Just(Fate::AnswerLost),
            1 => delay().prop_map(|after| Fate::Failed { after }),
        ]
    }

    /// Something that reaches the client, at a moment of its own clock.
    #[derive(Clone, Copy, Debug)]
    enum Answer {
        Renewed(Attempt, Micros),
        Failed(Attempt),
    }

    proptest! {
        /// A world in client time. The server's clock runs up to 5 % faster
        /// than the client's; it ends the session when its own clock has
        /// counted a TTL since the last renewal that arrived.
        #[test]
        fn never_believes_in_a_session_that_the_server_may_have_ended(
            ttl in 500_000..60_000_000_u64,
            server_percent in 95..=105_u64,
            opening in 0..200_000_u64,
            fates in prop::collection::vec(fate(), 1..60),
            lateness in prop::collection::vec(0..300_000_u64, 8),
        ) {
            let mut state = SessionState::opened(0, ttl);
            let server_ttl = ttl * 100 / server_percent;
            let mut expiry = opening + server_ttl;
            let mut answers: Vec<(Micros, Answer)> = Vec::new();
            let mut now = opening;
            let mut sent: Option<Micros> = None;
            let mut fates = fates.into_iter();
            let mut lateness = lateness.into_iter().cycle();
            let mut lost = false;
            loop {
                // The server was promised nothing beyond what it acknowledged.
                prop_assert!(state.deadline() <= expiry, "{} > {expiry}", state.deadline());
                let poll = state.poll(now);
                if matches!(state.status(now), Status::Lost(_)) {
                    lost = true;
                } else {
                    prop_assert!(!lost, "lost is final");
                }
                if let Some(attempt) = poll.renew {
                    prop_assert!(!lost);
                    if let Some(before) = sent {
                        let answered = !answers.iter().any(|(_, a)| matches!(a,
                            Answer::Renewed(a, _) | Answer::Failed(a) if a.sent == before));
                        prop_assert!(answered || now >= before + state.attempt_timeout());
                    }
                    sent = Some(now);
                    match fates.next() {
                        Some(Fate::Acknowledged { there, back }) => {
                            let renewed = Answer::Renewed(attempt, now + there + server_ttl);
                            answers.push((now + there + back, renewed));
                        }
                        Some(Fate::Failed { after }) => {
                            answers.push((now + after, Answer::Failed(attempt)));
                        }
                        Some(Fate::AnswerLost) | None => {}
                    }
                }
                answers.sort_by_key(|(at, _)| *at);
                let next_answer = answers.first().map(|(at, _)| *at);
                match (poll.wake_at, next_answer) {
                    (_, Some(at)) if poll.wake_at.is_none_or(|wake| at <= wake) => {
                        now = now.max(at);
                        match answers.remove(0).1 {
                            Answer::Renewed(attempt, until) => {
                                // The server took it whether or not we listen.
                                expiry = expiry.max(until);
                                state.renewed(now, attempt);
                            }
                            Answer::Failed(attempt) => state.renewal_failed(now, attempt),
                        }
                    }
                    (Some(wake), _) => {
                        prop_assert!(wake > now, "polls itself without end");
                        now = wake + lateness.next().expect("endless");
                    }
                    (None, _) => break,
                }
            }
            prop_assert!(lost);
        }
    }
}
