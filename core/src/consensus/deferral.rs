//! Appends that can wait.
//!
//! An entry is committed once a quorum has synced it, and only the fastest
//! followers make the difference. The others get the entries of a few turns in one
//! message, so that they sync once for all of them: that costs less of their
//! processor and, where members share a disk, of everybody's syncs. They lag by
//! [`DEFER_US`] at most, which is also the most that an entry can be late when the
//! fastest follower turns out not to be. Related: thrifty quorums in "There Is More
//! Consensus in Egalitarian Parliaments" (Moraru et al., SOSP 2013), section 6.
//!
//! A follower whose clients use it is never made to wait.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry as Slot};

use raft::eraftpb::{Message, MessageType};

/// How long an append is held back at most.
const DEFER_US: u64 = 2_000;

/// How long a follower counts as serving clients after it passed on something of
/// theirs. Short against the period of a health check, which reads as a client does.
const SERVES_US: u64 = 100_000;

/// What a leader holds back, and from whom.
#[derive(Debug, Default)]
pub(super) struct Deferral {
    /// Followers that wait for nothing.
    eager: BTreeSet<u64>,
    /// Until when followers count as serving clients.
    serves_until_us: BTreeMap<u64, u64>,
    held: BTreeMap<u64, Held>,
}

#[derive(Debug)]
struct Held {
    due_us: u64,
    /// All that was to be sent, as one.
    append: Message,
}

impl Deferral {
    /// A client of this follower wants something.
    pub(super) fn serves(&mut self, follower: u64, now_us: u64) {
        self.serves_until_us.insert(follower, now_us + SERVES_US);
    }

    /// Whether an append to this follower is held back.
    pub(super) fn holds(&self, follower: u64) -> bool {
        self.held.contains_key(&follower)
    }

    /// When something that is held back must leave.
    pub(super) fn next_due_us(&self) -> Option<u64> {
        self.held.values().map(|held| held.due_us).min()
    }

    /// Leadership is gone, and what was said under it.
    pub(super) fn forget(&mut self) {
        self.held.clear();
    }

    /// Chooses who waits for nothing: as many as make a quorum with the leader, of
    /// those that acknowledged most, and all that serve clients. Between equals it
    /// stays with the present choice, which keeps a slow follower from coming back
    /// whenever there is nothing to do.
    pub(super) fn choose(&mut self, matched: impl Iterator<Item = (u64, u64)>, now_us: u64) {
        let mut followers: Vec<_> = matched
            .map(|(id, matched)| (matched, self.eager.contains(&id), id))
            .collect();
        followers.sort_unstable();
        // With the leader, n followers have a quorum of (n + 1) / 2 + 1.
        let needed = followers.len().div_ceil(2);
        let fastest = followers
            .iter()
            .rev()
            .take(needed)
            .map(|follower| follower.2);
        self.serves_until_us
            .retain(|_, until_us| *until_us > now_us);
        self.eager = fastest
            .chain(self.serves_until_us.keys().copied())
            .collect();
    }

    /// What of these messages, and of those held back, leaves now. Appends to one
    /// follower stay in order.
    pub(super) fn pass(&mut self, messages: Vec<Message>, now_us: u64) -> Vec<Message> {
        let mut leaving = Vec::with_capacity(messages.len());
        for message in messages {
            match message.msg_type {
                MessageType::MsgAppend => self.pass_append(message, now_us, &mut leaving),
                _ => leaving.push(message),
            }
        }
        let due = self.held.extract_if(.., |_, held| held.due_us <= now_us);
        leaving.extend(due.map(|(_, held)| held.append));
        leaving
    }

    fn pass_append(&mut self, append: Message, now_us: u64, leaving: &mut Vec<Message>) {
        let waits = !self.eager.contains(&append.to);
        let due_us = now_us + DEFER_US;
        match self.held.entry(append.to) {
            Slot::Vacant(slot) if waits && !append.entries.is_empty() => {
                slot.insert(Held { due_us, append });
            }
            Slot::Vacant(_) => leaving.push(append),
            Slot::Occupied(mut slot) => {
                let apart = join(&mut slot.get_mut().append, append).err();
                if !waits || apart.is_some() {
                    leaving.push(slot.remove().append);
                }
                leaving.extend(apart);
            }
        }
    }
}

/// Adds an append to one that is to be sent before it; gives it back if it does
/// not follow on that.
#[expect(
    clippy::result_large_err,
    reason = "the message is moved on at once, and boxing each would cost more"
)]
fn join(before: &mut Message, after: Message) -> Result<(), Message> {
    let last = before.index + before.entries.len() as u64;
    if (before.term, last) != (after.term, after.index) {
        return Err(after);
    }
    before.commit = before.commit.max(after.commit);
    before.mut_entries().extend(after.entries);
    Ok(())
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    const APPEND: MessageType = MessageType::MsgAppend;

    /// Entries behind `index`, in term 1.
    fn append(to: u64, index: u64, entries: u64) -> Message {
        let entry = |index| Entry {
            index,
            term: 1,
            ..Entry::default()
        };
        let entries: Vec<_> = (1..=entries).map(|i| entry(index + i)).collect();
        let mut message = Message {
            msg_type: APPEND,
            to,
            term: 1,
            index,
            commit: index,
            ..Message::default()
        };
        message.set_entries(entries.into());
        message
    }

    /// Receiver, index and number of entries of each.
    fn seen(messages: &[Message]) -> Vec<(u64, u64, usize)> {
        let seen = |message: &Message| (message.to, message.index, message.entries.len());
        messages.iter().map(seen).collect()
    }

    fn with_eager(matched: &[(u64, u64)]) -> Deferral {
        let mut deferral = Deferral::default();
        deferral.choose(matched.iter().copied(), 0);
        deferral
    }

    #[test]
    fn the_fastest_wait_for_nothing_and_others_get_all_at_once() {
        let mut deferral = with_eager(&[(2, 5), (3, 4)]);
        let first = vec![append(2, 5, 1), append(3, 4, 2)];
        assert_eq!(seen(&deferral.pass(first, 10)), [(2, 5, 1)]);
        assert_eq!(deferral.next_due_us(), Some(10 + DEFER_US));
        let second = vec![append(2, 6, 1), append(3, 6, 1)];
        assert_eq!(seen(&deferral.pass(second, 1_000)), [(2, 6, 1)]);
        assert_eq!(deferral.pass(vec![], 9 + DEFER_US), []);
        let late = deferral.pass(vec![], 10 + DEFER_US);
        assert_eq!(seen(&late), [(3, 4, 3)]);
        assert_eq!(late[0].commit, 6, "the newest word on what is committed");
        assert_eq!(deferral.next_due_us(), None);
    }

    #[test]
    fn an_append_never_overtakes_one_that_is_held() {
        let mut deferral = with_eager(&[(2, 5), (3, 4)]);
        assert_eq!(deferral.pass(vec![append(3, 4, 2)], 0), []);
        // A probe that goes back to an earlier place.
        let apart = deferral.pass(vec![append(3, 2, 1)], 1);
        assert_eq!(seen(&apart), [(3, 4, 2), (3, 2, 1)]);
        // Without entries: nothing to sync for, so nothing to wait for.
        assert_eq!(deferral.pass(vec![append(3, 3, 0)], 2).len(), 1);
        assert_eq!(deferral.pass(vec![append(3, 3, 1)], 3), []);
        deferral.serves(3, 4);
        deferral.choose([(2, 9), (3, 4)].into_iter(), 4);
        let joined = deferral.pass(vec![append(3, 4, 1)], 4);
        assert_eq!(seen(&joined), [(3, 3, 2)]);
    }

    #[test]
    fn the_choice_makes_a_quorum_and_stays_between_equals() {
        let mut deferral = with_eager(&[(2, 5), (3, 5), (4, 7), (5, 1)]);
        assert_eq!(deferral.eager, BTreeSet::from([3, 4]));
        deferral.choose([(2, 9), (3, 9), (4, 9), (5, 9)].into_iter(), 0);
        assert_eq!(deferral.eager, BTreeSet::from([3, 4]));
        deferral.choose([(2, 10), (3, 9), (4, 9), (5, 9)].into_iter(), 0);
        assert_eq!(deferral.eager, BTreeSet::from([2, 4]));
        assert_eq!(with_eager(&[(2, 0)]).eager, BTreeSet::from([2]));
        assert_eq!(with_eager(&[]).eager, BTreeSet::new());
    }

    #[test]
    fn who_serves_clients_waits_for_nothing_until_they_are_gone() {
        let mut deferral = Deferral::default();
        deferral.serves(3, 100);
        deferral.choose([(2, 5), (3, 1)].into_iter(), 99 + SERVES_US);
        assert_eq!(deferral.eager, BTreeSet::from([2, 3]));
        deferral.choose([(2, 5), (3, 1)].into_iter(), 100 + SERVES_US);
        assert_eq!(deferral.eager, BTreeSet::from([2]));
    }
}
