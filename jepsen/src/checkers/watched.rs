//! Watchers are told the truth, all of it, and once.
//!
//! A watcher is followed over all its streams: it goes on behind the revision to which
//! it had come, on whichever node. What it is told up to a revision are exactly the events
//! of the model's history ([`Model`]) from where it stood up to there, for its keys and
//! its filter: in the order of revisions, none missing, none twice, each with the version
//! before. So all of a revision comes at once, and a progress revision is one up to which
//! there was nothing left to tell. It is cancelled only if what it lacks is compacted.

use std::collections::BTreeMap;

use bytes::Bytes;
use conclave_core::{ids::Revision, keyspace::Event};

use super::{
    Verdict, broken,
    model::{Model, covers, in_order},
};

const NAME: &str = "watched";

/// What a watcher is to be told.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) start: Bytes,
    pub(crate) end: Bytes,
    pub(crate) puts: bool,
    pub(crate) deletes: bool,
}

impl Wanted {
    fn takes(&self, event: &Event) -> bool {
        let kind = match event.after {
            Some(_) => self.puts,
            None => self.deletes,
        };
        kind && covers(&event.key, &self.start, &self.end)
    }
}

#[derive(Debug)]
struct Watcher {
    wanted: Wanted,
    /// The lowest revision of which it has not been told; none before it is known where
    /// it begins.
    next: Option<Revision>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    watchers: BTreeMap<u64, Watcher>,
}

impl Watched {
    /// A watcher begins with a revision; `None`: with what is yet to come.
    pub(crate) fn begins(&mut self, watcher: u64, wanted: Wanted, next: Option<Revision>) {
        self.watchers.insert(watcher, Watcher { wanted, next });
    }

    /// Nobody listens any more.
    pub(crate) fn ends(&mut self, watcher: u64) {
        self.watchers.remove(&watcher);
    }

    /// Up to where a watcher has been told everything.
    pub(crate) fn upto(&self, watcher: u64) -> Option<Revision> {
        let next = self.watchers.get(&watcher)?.next?;
        Some(next - 1)
    }

    /// Its client asks for it again, from a revision on.
    pub(crate) fn resumes(
        &mut self,
        watcher: u64,
        from: Option<Revision>,
        model: &Model,
    ) -> Verdict {
        let Some(known) = self.watchers.get_mut(&watcher) else {
            return Ok(());
        };
        let is_good = match (known.next, from) {
            (None, None) => true,
            (Some(next), Some(from)) => {
                // It was told that there was nothing in between.
                let between = model.events((from, next - 1), |event| known.wanted.takes(event));
                from <= next && between.is_empty()
            }
            _ => false,
        };
        if !is_good {
            let what = format!(
                "watcher {watcher} stands at {:?}, and asks from {from:?}",
                known.next
            );
            return broken(NAME, what);
        }
        known.next = from;
        Ok(())
    }

    /// A stream says that a watcher has begun, at its newest revision.
    pub(crate) fn created(&mut self, watcher: u64, newest: Revision, model: &Model) -> Verdict {
        if newest > model.revision() {
            return broken(
                NAME,
                format!("watcher {watcher} begins at {newest}, yet to come"),
            );
        }
        if let Some(known) = self.watchers.get_mut(&watcher) {
            known.next.get_or_insert(newest + 1);
        }
        Ok(())
    }

    /// A watcher is told of events, and with them of everything up to a revision.
    pub(crate) fn told(
        &mut self,
        watcher: u64,
        upto: Revision,
        events: &[Event],
        model: &Model,
    ) -> Verdict {
        let Some(known) = self.watchers.get_mut(&watcher) else {
            return Ok(());
        };
        let Some(next) = known
            .next
            .filter(|next| *next <= upto && upto <= model.revision())
        else {
            let what = format!(
                "watcher {watcher} at {:?} is told of everything up to {upto}",
                known.next
            );
            return broken(NAME, what);
        };
        let expected = model.events((next, upto), |event| known.wanted.takes(event));
        if !is_same(events, &expected, model.compacted()) {
            let what = format!(
                "watcher {watcher} is told of {next} to {upto}: {events:?}, and not {expected:?}"
            );
            return broken(NAME, what);
        }
        known.next = Some(upto + 1);
        Ok(())
    }

    /// A watcher is told that it has been told everything up to a revision.
    pub(crate) fn progress(&mut self, watcher: u64, upto: Revision, model: &Model) -> Verdict {
        match self.upto(watcher) {
            // It begins later, or has been told more.
            Some(told) if upto <= told => Ok(()),
            Some(_) => self.told(watcher, upto, &[], model),
            None => broken(
                NAME,
                format!("watcher {watcher} has come to {upto} before it began"),
            ),
        }
    }

    /// A watcher is over, because what it was to be told next is compacted.
    pub(crate) fn cancelled(
        &mut self,
        watcher: u64,
        compacted: Revision,
        model: &Model,
    ) -> Verdict {
        let Some(known) = self.watchers.remove(&watcher) else {
            return Ok(());
        };
        // Of the compacted revision itself a checkpoint does not hold all.
        let is_true =
            known.next.is_some_and(|next| next < compacted) && compacted <= model.compacted() + 1;
        match is_true {
            true => Ok(()),
            false => broken(
                NAME,
                format!(
                    "watcher {watcher} at {:?} is cancelled for {compacted}, and {} is compacted",
                    known.next,
                    model.compacted()
                ),
            ),
        }
    }
}

/// Inside a revision the order is not promised. Of the compacted revision, the versions
/// before may be gone.
fn is_same(told: &[Event], expected: &[&Event], compacted: Revision) -> bool {
    let is_ordered = told.is_sorted_by_key(|event| event.revision);
    let mut ordered = Vec::with_capacity(told.len());
    for of_revision in told.chunk_by(|one, other| one.revision == other.revision) {
        let mut of_revision = of_revision.to_vec();
        in_order(&mut of_revision);
        ordered.extend(of_revision);
    }
    let equals = |(told, expected): (&Event, &&Event)| {
        let has_lost_before = told.before.is_none() && told.revision <= compacted;
        told == *expected
            || (has_lost_before
                && (&told.key, told.revision, &told.after)
                    == (&expected.key, expected.revision, &expected.after))
    };
    is_ordered && told.len() == expected.len() && ordered.iter().zip(expected).all(equals)
}

#[cfg(test)]
mod tests {
    use conclave_proto::internal::{DeleteRange, Operation, Put, Txn, command::Body, operation};

    use super::*;

    fn operation(key: &'static str, is_put: bool) -> Operation {
        let key = Bytes::from(key);
        Operation {
            operation: Some(match is_put {
                true => operation::Operation::Put(Put {
                    key,
                    ..Put::default()
                }),
                false => operation::Operation::DeleteRange(DeleteRange {
                    key,
                    ..DeleteRange::default()
                }),
            }),
        }
    }

    /// Revision 2 makes `a` and `b`, 3 makes `c`, 4 deletes `a` and makes `b` again.
    fn history() -> Model {
        let mut model = Model::default();
        let revisions = [
            vec![("a", true), ("b", true)],
            vec![("c", true)],
            vec![("a", false), ("b", true)],
        ];
        for writes in revisions {
            let success = writes.into_iter().map(|(key, put)| operation(key, put));
            let txn = Txn {
                success: success.collect(),
                ..Txn::default()
            };
            model.execute(&Body::Txn(txn)).unwrap();
        }
        model
    }

    fn watcher(next: Option<Revision>) -> Watched {
        let wanted = Wanted {
            start: "a".into(),
            end: "c".into(),
            puts: true,
            deletes: true,
        };
        let mut watched = Watched::default();
        watched.begins(1, wanted, next);
        watched
    }

    fn all(model: &Model, from: Revision, upto: Revision) -> Vec<Event> {
        let inside = model.events((from, upto), |event| event.key < "c");
        inside.into_iter().cloned().collect()
    }

    #[test]
    fn accepts_a_history_over_several_streams() {
        let model = history();
        let mut checker = watcher(Some(2));
        checker.created(1, 4, &model).unwrap();
        checker.told(1, 3, &all(&model, 2, 3), &model).unwrap();
        // The client knows of the events only.
        checker.resumes(1, Some(3), &model).unwrap();
        checker.told(1, 4, &all(&model, 3, 4), &model).unwrap();
        checker.progress(1, 4, &model).unwrap();
        assert_eq!(checker.upto(1), Some(4));
    }

    #[test]
    fn finds_what_is_missing_doubled_or_torn() {
        let model = history();
        let events = all(&model, 2, 4);
        assert_eq!(events.len(), 4);
        for left_out in 0..events.len() {
            let mut some = events.clone();
            some.remove(left_out);
            assert!(watcher(Some(2)).told(1, 4, &some, &model).is_err());
        }
        let mut doubled = watcher(Some(2));
        doubled.told(1, 4, &events, &model).unwrap();
        assert!(doubled.told(1, 4, &events, &model).is_err());
        let half = &events[..1];
        assert_eq!(
            watcher(Some(2))
                .told(1, 2, half, &model)
                .unwrap_err()
                .checker,
            NAME
        );
    }

    #[test]
    fn finds_what_is_out_of_order_or_has_another_past() {
        let model = history();
        let mut events = all(&model, 2, 4);
        events.rotate_left(2);
        assert!(watcher(Some(2)).told(1, 4, &events, &model).is_err());
        let mut events = all(&model, 4, 4);
        events[0].before = None;
        assert!(watcher(Some(4)).told(1, 4, &events, &model).is_err());
    }

    #[test]
    fn finds_progress_beyond_what_was_told() {
        let model = history();
        let mut checker = watcher(Some(3));
        checker.progress(1, 3, &model).unwrap();
        assert!(checker.progress(1, 4, &model).is_err());
        assert!(watcher(None).progress(1, 1, &model).is_err());
        assert!(watcher(Some(3)).created(1, 9, &model).is_err());
    }

    #[test]
    fn finds_a_resumption_that_leaves_something_out_or_repeats_it() {
        let model = history();
        assert!(watcher(Some(3)).resumes(1, Some(4), &model).is_err());
        assert!(watcher(Some(5)).resumes(1, Some(4), &model).is_err());
        assert!(watcher(Some(3)).resumes(1, None, &model).is_err());
    }

    #[test]
    fn finds_a_cancellation_for_no_reason() {
        let mut model = history();
        assert!(watcher(Some(2)).cancelled(1, 3, &model).is_err());
        model.compact(3);
        watcher(Some(2)).cancelled(1, 3, &model).unwrap();
        assert!(watcher(Some(3)).cancelled(1, 3, &model).is_err());
        assert!(watcher(Some(2)).cancelled(1, 5, &model).is_err());
    }
}
