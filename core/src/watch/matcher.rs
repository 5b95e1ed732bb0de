//! Who watches a key, found in less time than it takes to look at every watcher.
//!
//! Watchers of one key are in a map. Ranges are in a tree in order of their start,
//! where each node knows the furthest end below it; so a search leaves out whatever
//! ends before the key or begins behind it. The tree is a treap: its shape follows
//! from the ranges alone.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    mem,
    ops::Bound,
};

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::WatcherId;
use crate::keyspace::KeyRange;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Matcher {
    single: BTreeMap<Bytes, BTreeSet<WatcherId>>,
    ranges: Tree,
}

/// Where a range ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Before(Bytes),
    /// Behind all others.
    Never,
}

type Tree = Option<Box<Node>>;

/// A range with its watchers, above those with a lower priority.
#[derive(Debug)]
struct Node {
    start: Bytes,
    end: End,
    priority: u64,
    watchers: BTreeSet<WatcherId>,
    /// The furthest end in here and below.
    furthest: End,
    left: Tree,
    right: Tree,
}

impl Matcher {
    /// Whether nobody watches.
    pub(super) fn is_empty(&self) -> bool {
        self.single.is_empty() && self.ranges.is_none()
    }

    /// Adds a watcher of a range.
    pub(super) fn insert(&mut self, range: &KeyRange, watcher: WatcherId) {
        match range.as_single() {
            Some(key) => {
                self.single.entry(key.clone()).or_default().insert(watcher);
            }
            None => {
                let (start, end) = span(range);
                insert(&mut self.ranges, &start, &end, watcher);
            }
        }
    }

    /// Removes a watcher of a range, if it is there.
    pub(super) fn remove(&mut self, range: &KeyRange, watcher: WatcherId) {
        match range.as_single() {
            Some(key) => {
                if let Some(watchers) = self.single.get_mut(key) {
                    watchers.remove(&watcher);
                    if watchers.is_empty() {
                        self.single.remove(key);
                    }
                }
            }
            None => {
                let (start, end) = span(range);
                remove(&mut self.ranges, &start, &end, watcher);
            }
        }
    }

    /// Names everyone who watches a key, each once.
    pub(super) fn watching(&self, key: &[u8], found: &mut impl FnMut(WatcherId)) {
        let single = self.single.get(key).into_iter().flatten();
        single.for_each(|watcher| found(*watcher));
        search(&self.ranges, key, found);
    }
}

fn span(range: &KeyRange) -> (Bytes, End) {
    let end = match range.end() {
        Bound::Unbounded => End::Never,
        Bound::Included(end) | Bound::Excluded(end) => End::Before(end.clone()),
    };
    (range.start().clone(), end)
}

impl Node {
    fn new(start: &Bytes, end: &End) -> Self {
        let seed = match end {
            End::Before(end) => xxh3_64(end),
            End::Never => 0,
        };
        Self {
            start: start.clone(),
            end: end.clone(),
            priority: xxh3_64_with_seed(start, seed),
            watchers: BTreeSet::new(),
            furthest: end.clone(),
            left: None,
            right: None,
        }
    }

    fn side(&mut self, start: &Bytes, end: &End) -> Option<&mut Tree> {
        match (start, end).cmp(&(&self.start, &self.end)) {
            Ordering::Less => Some(&mut self.left),
            Ordering::Equal => None,
            Ordering::Greater => Some(&mut self.right),
        }
    }

    /// After something below has changed.
    fn update(&mut self) {
        let below = self.left.iter().chain(&self.right);
        let furthest = below.map(|node| &node.furthest).max();
        self.furthest = furthest.map_or(&self.end, |end| end.max(&self.end)).clone();
    }
}

fn insert(tree: &mut Tree, start: &Bytes, end: &End, watcher: WatcherId) {
    let node = tree.get_or_insert_with(|| Box::new(Node::new(start, end)));
    let Some(side) = node.side(start, end) else {
        node.watchers.insert(watcher);
        return;
    };
    insert(side, start, end, watcher);
    rise(tree);
}

/// Turns the tree so that the root has the highest priority, if a child of it has.
fn rise(tree: &mut Tree) {
    let Some(mut root) = tree.take() else {
        return;
    };
    let priority = root.priority;
    let is_above = |child: &mut Box<Node>| child.priority > priority;
    if let Some(mut left) = root.left.take_if(is_above) {
        root.left = left.right.take();
        root.update();
        left.right = Some(root);
        root = left;
    } else if let Some(mut right) = root.right.take_if(is_above) {
        root.right = right.left.take();
        root.update();
        right.left = Some(root);
        root = right;
    }
    root.update();
    *tree = Some(root);
}

fn remove(tree: &mut Tree, start: &Bytes, end: &End, watcher: WatcherId) {
    let Some(node) = tree else {
        return;
    };
    if let Some(side) = node.side(start, end) {
        remove(side, start, end, watcher);
        node.update();
        return;
    }
    node.watchers.remove(&watcher);
    if node.watchers.is_empty() {
        let (left, right) = (mem::take(&mut node.left), mem::take(&mut node.right));
        *tree = merge(left, right);
    }
}

/// Two trees as one, of which all of the first are before all of the second.
fn merge(left: Tree, right: Tree) -> Tree {
    match (left, right) {
        (Some(mut left), Some(mut right)) => Some(if left.priority >= right.priority {
            left.right = merge(left.right.take(), Some(right));
            left.update();
            left
        } else {
            right.left = merge(Some(left), right.left.take());
            right.update();
            right
        }),
        (one, other) => one.or(other),
    }
}

fn search(tree: &Tree, key: &[u8], found: &mut impl FnMut(WatcherId)) {
    let ends_before = |end: &End| matches!(end, End::Before(end) if &end[..] <= key);
    let Some(node) = tree else {
        return;
    };
    if ends_before(&node.furthest) {
        return;
    }
    search(&node.left, key, found);
    if &node.start[..] > key {
        return;
    }
    if !ends_before(&node.end) {
        node.watchers.iter().for_each(|watcher| found(*watcher));
    }
    search(&node.right, key, found);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range() -> impl Strategy<Value = KeyRange> {
        let key = prop::collection::vec(0..4u8, 1..4);
        let end = prop::collection::vec(0..4u8, 0..4);
        (key, end).prop_map(|(key, end)| KeyRange::new(key.into(), end.into()))
    }

    fn depth(tree: &Tree) -> usize {
        tree.as_ref()
            .map_or(0, |node| 1 + depth(&node.left).max(depth(&node.right)))
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whoever_watches_a_key_is_found_once(
            steps in prop::collection::vec((range(), any::<bool>(), any::<prop::sample::Index>()), 1..60),
            keys in prop::collection::vec(prop::collection::vec(0..4u8, 1..4), 1..12),
        ) {
            let mut matcher = Matcher::default();
            let mut there: Vec<(KeyRange, WatcherId)> = Vec::new();
            for (id, (range, adds, which)) in (0..).zip(steps) {
                if adds || there.is_empty() {
                    matcher.insert(&range, WatcherId(id));
                    there.push((range, WatcherId(id)));
                } else {
                    let (range, id) = there.swap_remove(which.index(there.len()));
                    matcher.remove(&range, id);
                }
                prop_assert_eq!(matcher.is_empty(), there.is_empty());
                for key in &keys {
                    let mut found = Vec::new();
                    matcher.watching(key, &mut |id| found.push(id));
                    found.sort();
                    let watching = there.iter().filter(|(range, _)| range.contains(key));
                    let mut expected: Vec<_> = watching.map(|(_, id)| *id).collect();
                    expected.sort();
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }

    #[test]
    fn the_tree_stays_flat_whatever_the_order() {
        let mut matcher = Matcher::default();
        for id in 0..10_000 {
            let range = KeyRange::prefix(format!("key/{id:08}/").as_bytes());
            matcher.insert(&range, WatcherId(id));
        }
        // Some three times the logarithm is to be expected.
        assert!(depth(&matcher.ranges) < 64, "{}", depth(&matcher.ranges));
        for id in (0..10_000).filter(|id| id % 100 != 0) {
            let range = KeyRange::prefix(format!("key/{id:08}/").as_bytes());
            matcher.remove(&range, WatcherId(id));
        }
        assert!(depth(&matcher.ranges) < 32);
    }
}
