//! Clients with one call at a time and rests between them.

use super::{
    alarm::{Alarm, Owner},
    ground::{About, CallBody, Ground, Reply},
    link::{Link, Pending},
    tally::Operation,
};

/// What such a client calls, and what it makes of the replies.
pub(crate) trait Paced {
    /// What it knows of the call that is under way.
    type Call;

    fn pace(&mut self) -> &mut Pace<Self::Call>;

    /// Begins a call.
    fn begin(&mut self, ground: &mut Ground);

    /// A call has ended; one that was given up as if its connection had broken.
    fn ended(&mut self, call: Self::Call, pending: Pending, reply: Reply, ground: &mut Ground);

    /// Its alarm may ring.
    fn wake(&mut self, ground: &mut Ground) {
        match self.pace().due(ground) {
            Some(Due::GiveUp(call, pending)) => self.ended(call, pending, Reply::Broken, ground),
            Some(Due::Begin) => self.begin(ground),
            None => {}
        }
    }

    /// Something arrives from a server.
    fn hear(&mut self, id: u64, reply: Reply, ground: &mut Ground) {
        let under_way = &mut self.pace().under_way;
        if let Some((call, pending)) = under_way.take_if(|(_, pending)| pending.id == id) {
            self.ended(call, pending, reply, ground);
        }
    }
}

/// When such a client calls, and whom.
#[derive(Debug)]
pub(crate) struct Pace<C> {
    pub(crate) link: Link,
    alarm: Alarm,
    under_way: Option<(C, Pending)>,
    /// When it begins the next call.
    next_us: u64,
    /// From when on it begins nothing new.
    until_us: u64,
    /// Values made so far.
    values: u64,
}

/// What is due.
enum Due<C> {
    /// It gives its call up.
    GiveUp(C, Pending),
    /// It begins another.
    Begin,
}

impl<C> Pace<C> {
    /// A client that begins soon, and nothing new once everything must have been served.
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        let begin_us = ground.rng.below(500_000);
        Self::within(actor, begin_us, ground.settings.drain_us, ground)
    }

    /// A client that begins at `next_us`, and begins nothing new from `until_us` on.
    pub(crate) fn within(actor: usize, next_us: u64, until_us: u64, ground: &mut Ground) -> Self {
        let mut pace = Self {
            link: Link::new(actor, ground),
            alarm: Alarm::new(Owner::Actor(actor)),
            under_way: None,
            next_us,
            until_us,
            values: 0,
        };
        pace.rearm(ground);
        pace
    }

    fn due(&mut self, ground: &mut Ground) -> Option<Due<C>> {
        if !self.alarm.rings(ground) {
            return None;
        }
        let is_late = |(_, pending): &mut (C, Pending)| pending.until_us <= ground.now_us;
        if let Some((call, pending)) = self.under_way.take_if(is_late) {
            self.link.abandon(pending, ground);
            return Some(Due::GiveUp(call, pending));
        }
        let may_begin = self.next_us <= ground.now_us && ground.now_us < self.until_us;
        if self.under_way.is_none() && may_begin {
            return Some(Due::Begin);
        }
        self.rearm(ground);
        None
    }

    /// Now and then it goes to another server, for no reason.
    pub(crate) fn wander(&mut self, ground: &mut Ground) {
        if ground.rng.chance(50_000) {
            self.link.move_on(None, ground);
        }
    }

    /// A value that nobody else makes, nor this client a second time.
    pub(crate) fn fresh_value(&mut self) -> u64 {
        self.values += 1;
        (self.link.actor as u64 + 1) << 32 | self.values
    }

    /// Sends a call, which must be served in time.
    pub(crate) fn call(&mut self, body: CallBody, about: About, call: C, ground: &mut Ground) {
        let patience_us = ground.rng.between(200_000, 1_500_000);
        self.call_for(patience_us, body, about, call, ground);
    }

    /// The same, with the time for which to wait.
    pub(crate) fn call_for(
        &mut self,
        patience_us: u64,
        body: CallBody,
        about: About,
        call: C,
        ground: &mut Ground,
    ) {
        self.link.begins(ground);
        let pending = self.link.call(body, about, patience_us, ground);
        self.under_way = Some((call, pending));
        self.rearm(ground);
    }

    /// Its call was not served; it tries elsewhere.
    pub(crate) fn not_served(&mut self, hint: Option<usize>, ground: &mut Ground) {
        self.link.gone(ground);
        self.link.move_on(hint, ground);
    }

    /// The same of a call that may have had its effect, with a rest.
    pub(crate) fn failed(&mut self, hint: Option<usize>, ground: &mut Ground) {
        ground.did(Operation::Unknown);
        self.not_served(hint, ground);
        let rest_us = ground.rng.between(10_000, 100_000);
        self.rest(rest_us, ground);
    }

    /// Begins the next call after a rest.
    pub(crate) fn rest(&mut self, rest_us: u64, ground: &mut Ground) {
        self.next_us = ground.now_us + rest_us;
        self.rearm(ground);
    }

    fn rearm(&mut self, ground: &mut Ground) {
        let at_us = match &self.under_way {
            Some((_, pending)) => pending.until_us,
            None if ground.now_us >= self.until_us => return,
            None => self.next_us,
        };
        self.alarm.set(at_us, ground);
    }
}
