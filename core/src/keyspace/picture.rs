//! All versions of all keys as they were at one revision, copied little by little.
//!
//! The walk goes over keys in order; of one key, over the versions that have ended
//! in the order of their ends, then the live one. A version that was live when the
//! walk began and ended since has moved, but only to just before its key's live
//! version: still ahead of the walk, if it was. So each version of the picture is
//! met once, where it is by then, whatever is written meanwhile. Only what a
//! compaction drops ahead of the walk would be missed, and is taken when it goes.

use std::{collections::BTreeSet, mem, ops::Bound};

use bytes::Bytes;

use super::{
    History, Record,
    order::{Live, Past},
};
use crate::{checkpoint::Versions, ids::Revision};

/// All versions of all keys at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Picture {
    pub(crate) revision: Revision,
    pub(crate) compacted: Revision,
    pub(crate) digest: u64,
    /// In order of key, but for those that a compaction dropped meanwhile.
    pub(crate) live: Vec<Record>,
    /// Each with the revision that ended it; the same order.
    pub(crate) past: Vec<(Revision, Record)>,
}

/// The end of a version that has none.
const LIVES: Revision = Revision::MAX;

/// A walk over all versions of all keys, some at a time. Met twice is none, and missed
/// only what a compaction drops ahead of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Walk {
    /// The version it came to: its key and its end. No key is empty.
    at: (Bytes, Revision),
}

impl Walk {
    /// Walks on over `max` versions, or until `meet` says that it is enough for now.
    /// `meet` gets each with the revision that ended it, the highest of all if it lives.
    /// Whether it has come to the end.
    pub(super) fn go_on(
        &mut self,
        live: &BTreeSet<Live>,
        past: &History,
        max: usize,
        mut meet: impl FnMut(Revision, &Record) -> bool,
    ) -> bool {
        let at = self.at.clone();
        let from = match &at {
            (key, LIVES) => Bound::Excluded(&key[..]),
            (key, _) => Bound::Included(&key[..]),
        };
        let mut live = live.range::<[u8], _>((from, Bound::Unbounded)).peekable();
        let mut past = past.after(&at.0, at.1).peekable();
        let mut walked = None;
        for _ in 0..max {
            let is_past = match (past.peek(), live.peek()) {
                (Some(past), Some(Live(live))) => past.record.key <= live.key,
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (None, None) => return true,
            };
            let (ended, record) = match is_past {
                true => past.next().map(|Past { ended, record }| (*ended, record)),
                false => live.next().map(|Live(record)| (LIVES, record)),
            }
            .expect("it was there to be seen");
            walked = Some((&record.key, ended));
            if !meet(ended, record) {
                break;
            }
        }
        if let Some((key, ended)) = walked {
            self.at = (key.clone(), ended);
        }
        false
    }

    /// Whether a version that has ended is yet to be met.
    pub(super) fn is_ahead(&self, ended: Revision, record: &Record) -> bool {
        let (key, end) = &self.at;
        (key, *end) < (&record.key, ended)
    }
}

/// A picture, as far as it is drawn.
#[derive(Clone, Debug)]
pub(super) struct Drawing {
    picture: Picture,
    walk: Walk,
}

impl Drawing {
    pub(super) fn new(revision: Revision, digest: u64, past: &History) -> Self {
        let picture = Picture {
            revision,
            compacted: past.compacted(),
            digest,
            ..Picture::default()
        };
        Self {
            picture,
            walk: Walk::default(),
        }
    }

    /// Walks on over `max` versions. Whether it has come to the end.
    pub(super) fn walk(&mut self, live: &BTreeSet<Live>, past: &History, max: usize) -> bool {
        let picture = &mut self.picture;
        self.walk.go_on(live, past, max, |ended, record| {
            picture.take(ended, record);
            true
        })
    }

    /// A version that has ended goes for good.
    pub(super) fn rescue(&mut self, ended: Revision, record: &Record) {
        if self.walk.is_ahead(ended, record) {
            self.picture.take(ended, record);
        }
    }

    /// What it has come by since this was asked last; the picture will lack it.
    pub(super) fn take_drawn(&mut self) -> Versions {
        Versions {
            live: mem::take(&mut self.picture.live),
            past: mem::take(&mut self.picture.past),
        }
    }

    pub(super) fn into_picture(self) -> Picture {
        self.picture
    }
}

impl Picture {
    /// Takes a version in, if it was there then.
    fn take(&mut self, ended: Revision, record: &Record) {
        if record.mod_revision > self.revision {
            return;
        }
        if ended > self.revision {
            self.live.push(record.clone());
        } else {
            self.past.push((ended, record.clone()));
        }
    }
}
