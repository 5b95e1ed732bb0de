//! What is inside a record. See the format in [`super`].

use bytes::{Buf, BufMut, Bytes, TryGetError};

use super::{Batch, EntryKind, Facts, HardState, Identity, Layout, LogEntry};
use crate::ids::{Index, NodeId};

/// The version of the format that this code writes, and the only one it reads.
pub(super) const FORMAT_VERSION: u32 = 1;

const HEADER: u8 = 1;
const BATCH: u8 = 2;

const HAS_HARD_STATE: u8 = 1;
const HAS_FACTS: u8 = 2;

const NORMAL: u8 = 0;
const MEMBERSHIP: u8 = 1;

/// What all records so far add up to, but for the entries themselves. Each
/// segment begins with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) identity: Identity,
    pub(super) hard_state: HardState,
    pub(super) facts: Facts,
    /// The first index of the log.
    pub(super) first: Index,
    /// The index behind the newest entry.
    pub(super) next: Index,
}

impl Standing {
    /// Checks that a batch may follow; returns the index behind its newest entry.
    /// Whoever writes asks this too, so that nothing is written that a later
    /// start would refuse.
    pub(super) fn check(&self, batch: &Batch) -> Result<Index, &'static str> {
        let mut next = self.next;
        for entry in &batch.entries {
            if entry.term == 0 {
                return Err("an entry without a term");
            }
            if entry.index < self.first {
                return Err("an entry below the first index");
            }
            if entry.index > next {
                return Err("a gap between two entries");
            }
            next = entry
                .index
                .checked_add(1)
                .ok_or("an index at the end of all")?;
        }
        if batch.hard_state.unwrap_or(self.hard_state).commit >= next {
            return Err("a commit index beyond the newest entry");
        }
        Ok(next)
    }

    /// Takes a batch in that was checked.
    pub(super) fn advance(&mut self, batch: &Batch, next: Index) {
        self.next = next;
        if let Some(hard_state) = batch.hard_state {
            self.hard_state = hard_state;
        }
        if let Some(facts) = &batch.facts {
            self.facts.clone_from(facts);
        }
    }
}

/// Why a body cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// A header of another version of the format.
    Version(u32),
    /// It does not say what it should.
    Content(&'static str),
}

impl From<TryGetError> for Malformed {
    fn from(_: TryGetError) -> Self {
        Self::Content("a body that ends too early")
    }
}

pub(super) fn put_header(buffer: &mut Vec<u8>, standing: &Standing, layout: Layout) {
    buffer.put_u8(HEADER);
    buffer.put_u32_le(FORMAT_VERSION);
    buffer.put_u64_le(layout.segment_bytes);
    buffer.put_u64_le(layout.step_bytes);
    buffer.put_u64_le(standing.identity.cluster);
    buffer.put_u64_le(standing.identity.node.0);
    buffer.put_u64_le(standing.identity.incarnation);
    put_hard_state(buffer, &standing.hard_state);
    put_facts(buffer, &standing.facts);
    buffer.put_u64_le(standing.first);
    buffer.put_u64_le(standing.next);
}

pub(super) fn header(mut body: Bytes) -> Result<(Standing, Layout), Malformed> {
    if body.try_get_u8()? != HEADER {
        return Err(Malformed::Content("no header where one should be"));
    }
    let version = body.try_get_u32_le()?;
    if version != FORMAT_VERSION {
        return Err(Malformed::Version(version));
    }
    let layout = Layout {
        segment_bytes: body.try_get_u64_le()?,
        step_bytes: body.try_get_u64_le()?.max(1),
    };
    let standing = Standing {
        identity: Identity {
            cluster: body.try_get_u64_le()?,
            node: NodeId(body.try_get_u64_le()?),
            incarnation: body.try_get_u64_le()?,
        },
        hard_state: hard_state(&mut body)?,
        facts: facts(&mut body)?,
        first: body.try_get_u64_le()?,
        next: body.try_get_u64_le()?,
    };
    let Standing { first, next, .. } = standing;
    if standing.identity.node.0 == 0 || first == 0 || next < first {
        return Err(Malformed::Content("a header that contradicts itself"));
    }
    finish(&body)?;
    Ok((standing, layout))
}

pub(super) fn put_batch(buffer: &mut Vec<u8>, batch: &Batch) {
    let mut parts = 0;
    if batch.hard_state.is_some() {
        parts |= HAS_HARD_STATE;
    }
    if batch.facts.is_some() {
        parts |= HAS_FACTS;
    }
    buffer.put_u8(BATCH);
    buffer.put_u8(parts);
    if let Some(hard_state) = &batch.hard_state {
        put_hard_state(buffer, hard_state);
    }
    if let Some(facts) = &batch.facts {
        put_facts(buffer, facts);
    }
    for entry in &batch.entries {
        buffer.put_u64_le(entry.index);
        buffer.put_u64_le(entry.term);
        buffer.put_u8(match entry.kind {
            EntryKind::Normal => NORMAL,
            EntryKind::Membership => MEMBERSHIP,
        });
        // A length that does not fit makes the whole body too long to be sealed.
        buffer.put_u32_le(entry.data.len() as u32);
        buffer.extend_from_slice(&entry.data);
    }
}

/// The entries' data are slices of `body`.
pub(super) fn batch(mut body: Bytes) -> Result<Batch, Malformed> {
    if body.try_get_u8()? != BATCH {
        return Err(Malformed::Content("no batch where one should be"));
    }
    let parts = body.try_get_u8()?;
    if parts & !(HAS_HARD_STATE | HAS_FACTS) != 0 {
        return Err(Malformed::Content("a batch with an unknown part"));
    }
    let mut batch = Batch::default();
    if parts & HAS_HARD_STATE != 0 {
        batch.hard_state = Some(hard_state(&mut body)?);
    }
    if parts & HAS_FACTS != 0 {
        batch.facts = Some(facts(&mut body)?);
    }
    while !body.is_empty() {
        batch.entries.push(entry(&mut body)?);
    }
    Ok(batch)
}

fn entry(body: &mut Bytes) -> Result<LogEntry, Malformed> {
    let index = body.try_get_u64_le()?;
    let term = body.try_get_u64_le()?;
    let kind = match body.try_get_u8()? {
        NORMAL => EntryKind::Normal,
        MEMBERSHIP => EntryKind::Membership,
        _ => return Err(Malformed::Content("an entry of an unknown kind")),
    };
    let length = body.try_get_u32_le()? as usize;
    if length > body.len() {
        return Err(Malformed::Content("an entry that ends too early"));
    }
    Ok(LogEntry {
        index,
        term,
        kind,
        data: body.split_to(length),
    })
}

fn put_hard_state(buffer: &mut Vec<u8>, hard_state: &HardState) {
    buffer.put_u64_le(hard_state.term);
    buffer.put_u64_le(hard_state.vote);
    buffer.put_u64_le(hard_state.commit);
}

fn hard_state(body: &mut Bytes) -> Result<HardState, Malformed> {
    Ok(HardState {
        term: body.try_get_u64_le()?,
        vote: body.try_get_u64_le()?,
        commit: body.try_get_u64_le()?,
    })
}

fn put_facts(buffer: &mut Vec<u8>, facts: &Facts) {
    buffer.put_u8(u8::from(facts.admitted));
    buffer.put_u32_le(facts.incarnations.len() as u32);
    for (node, incarnation) in &facts.incarnations {
        buffer.put_u64_le(node.0);
        buffer.put_u64_le(*incarnation);
    }
    buffer.put_u32_le(facts.voters.len() as u32);
    for node in &facts.voters {
        buffer.put_u64_le(node.0);
    }
}

fn facts(body: &mut Bytes) -> Result<Facts, Malformed> {
    let mut facts = Facts {
        admitted: match body.try_get_u8()? {
            0 => false,
            1 => true,
            _ => return Err(Malformed::Content("neither admitted nor not")),
        },
        ..Facts::default()
    };
    for _ in 0..body.try_get_u32_le()? {
        let node = NodeId(body.try_get_u64_le()?);
        facts.incarnations.insert(node, body.try_get_u64_le()?);
    }
    for _ in 0..body.try_get_u32_le()? {
        facts.voters.push(NodeId(body.try_get_u64_le()?));
    }
    Ok(facts)
}

fn finish(body: &Bytes) -> Result<(), Malformed> {
    if body.is_empty() {
        Ok(())
    } else {
        Err(Malformed::Content("a body that goes on behind its end"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full_batch() -> Batch {
        Batch {
            hard_state: Some(HardState {
                term: 3,
                vote: 2,
                commit: 9,
            }),
            facts: Some(Facts {
                admitted: true,
                incarnations: [(NodeId(1), 11), (NodeId(2), 22)].into(),
                voters: vec![NodeId(1), NodeId(2)],
            }),
            entries: vec![
                LogEntry {
                    index: 10,
                    term: 3,
                    kind: EntryKind::Normal,
                    data: Bytes::from_static(b"data"),
                },
                LogEntry {
                    index: 11,
                    term: 3,
                    kind: EntryKind::Membership,
                    data: Bytes::new(),
                },
            ],
        }
    }

    fn standing() -> Standing {
        Standing {
            identity: Identity {
                cluster: 5,
                node: NodeId(1),
                incarnation: 77,
            },
            hard_state: HardState::default(),
            facts: full_batch().facts.unwrap(),
            first: 1,
            next: 10,
        }
    }

    fn encoded(put: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let mut buffer = Vec::new();
        put(&mut buffer);
        buffer.into()
    }

    #[test]
    fn batches_and_headers_are_read_back() {
        for original in [Batch::default(), full_batch()] {
            let bytes = encoded(|buffer| put_batch(buffer, &original));
            assert_eq!(batch(bytes), Ok(original));
        }
        let bytes = encoded(|buffer| put_header(buffer, &standing(), Layout::default()));
        assert_eq!(header(bytes), Ok((standing(), Layout::default())));
    }

    #[test]
    fn data_are_slices_of_the_body() {
        let bytes = encoded(|buffer| put_batch(buffer, &full_batch()));
        let read = batch(bytes.clone()).unwrap();
        let inside = bytes.as_ptr_range();
        assert!(inside.contains(&read.entries[0].data.as_ptr()));
    }

    #[test]
    fn nothing_that_is_cut_or_longer_is_taken_for_a_header() {
        let bytes = encoded(|buffer| put_header(buffer, &standing(), Layout::default()));
        for length in 0..bytes.len() {
            header(bytes.slice(..length)).unwrap_err();
        }
        let longer = [&bytes[..], b"x"].concat();
        header(longer.into()).unwrap_err();
    }

    #[test]
    fn no_bytes_make_a_batch_panic() {
        let bytes = encoded(|buffer| put_batch(buffer, &full_batch()));
        for length in 0..bytes.len() {
            if let Ok(shorter) = batch(bytes.slice(..length)) {
                assert!(shorter.entries.len() < 2);
            }
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[at] = 0xff;
            drop(batch(damaged.into()));
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes =
            encoded(|buffer| put_header(buffer, &standing(), Layout::default())).to_vec();
        bytes[1] = 9;
        assert_eq!(header(bytes.into()), Err(Malformed::Version(9)));
    }

    #[test]
    fn what_cannot_follow_is_refused() {
        let with = |change: fn(&mut Batch)| {
            let mut batch = full_batch();
            change(&mut batch);
            standing().check(&batch)
        };
        assert_eq!(with(|_| ()), Ok(12));
        assert_eq!(with(|batch| batch.entries.clear()), Ok(10));
        with(|batch| batch.entries[0].index = 12).unwrap_err();
        with(|batch| batch.entries[1].index = 12).unwrap_err();
        with(|batch| batch.entries[0].index = 0).unwrap_err();
        with(|batch| batch.entries[1].term = 0).unwrap_err();
        with(|batch| batch.hard_state.as_mut().unwrap().commit = 12).unwrap_err();
        assert_eq!(with(|batch| batch.entries[1].index = 10), Ok(11));
    }
}
