//! The write-ahead log: what a member must not forget, in the order it happened.
//!
//! # Format, version 1
//!
//! A log is a row of files, the segments: `log-` and a number of 20 digits, from
//! 1 on, without gaps; those that are oldest may be cut off. A segment is a chain of
//! records; the first is its header.
//! Behind the last record the file is zero. All numbers are little-endian, all
//! records begin at a multiple of 8.
//!
//! | record | bytes | |
//! |---|---|---|
//! | 0 | 4 | `CLog` |
//! | 4 | 4 | length of the body |
//! | 8 | 16 | where this record lies: segment, offset in the file |
//! | 24 | 8 | checksum of the record before it, across segments; 0 for the very first |
//! | 32 | 16 | attested position: segment, offset |
//! | 48 | n | body |
//! | 48+n | 0-7 | zero |
//! | then | 8 | checksum: XXH3 with 64 bits and the segment number as seed, over all before it |
//!
//! | body of a header | bytes | |
//! |---|---|---|
//! | 0 | 1 | 1 |
//! | 1 | 4 | version of the format; what follows may differ in others |
//! | 5 | 16 | layout: how long the segment gets, and in which steps |
//! | 21 | 24 | identity: cluster, node, incarnation |
//! | 45 | 24 | hard state: term, vote, commit |
//! | 69 | n | facts |
//! | then | 8 | first index of the log; 1, unless it was begun anew |
//! | then | 8 | index behind the newest entry |
//! | then | 8 | if the first index is not 1: the term of the entry before it |
//!
//! | body of a batch | bytes | |
//! |---|---|---|
//! | 0 | 1 | 2 |
//! | 1 | 1 | 1 if a hard state follows, plus 2 if facts follow, plus 4 if a base follows |
//! | then | 16 | base: index, term |
//! | then | 24 | hard state: term, vote, commit |
//! | then | n | facts |
//! | then | n | entries up to the end: index (8), term (8), kind (1; 0 normal, 1 membership), length (4), data |
//!
//! | facts | bytes | |
//! |---|---|---|
//! | 0 | 1 | 1 if admitted, else 0 |
//! | 1 | 4 | number of incarnations |
//! | 5 | 16 each | node, incarnation |
//! | then | 4 | number of voters |
//! | then | 8 each | node |
//!
//! # Why a record never passes for another
//!
//! Its checksum covers its place and the checksum of the record before it. So
//! one that was left over in a segment, or was copied from elsewhere, neither
//! agrees with its place nor continues the chain.
//!
//! # Torn or damaged
//!
//! A write that a crash interrupted leaves a record that does not agree with
//! its checksum, and so does damage to one that was durable. What tells them
//! apart is the attested position: everything before it had been synced when
//! the record was written. If the chain stops before a position that any record
//! attests, something durable is gone, and [`Log::open`] refuses
//! ([`LogError::Damaged`]). If not, what lies behind the stop was never
//! acknowledged, and is dropped. Only the newest batch has no record behind it:
//! damage to it cannot be told from a torn write. An idle node therefore writes
//! an empty batch, a mark ([`Log::mark`]).
//!
//! # A base
//!
//! A member that installs a checkpoint of another one begins its log anew: all
//! entries so far are dropped, and the next one is that behind the base, which the
//! checkpoint holds. That is part of a batch, so that a crash leaves either the one
//! log or the other.
//!
//! # Segments
//!
//! A header restates all that the segments before it add up to, except entries.
//! It is written and synced, and so is the directory, before any batch follows
//! it, and after the segment before it was synced. A crash in between leaves one
//! segment without a header at the end of the row, which is removed.
//!
//! Then the segment before it is closed, before any batch follows the header: behind
//! its last record goes an empty batch that attests the header. It is no part of the
//! chain, which goes on in the header. So a newest segment that is gone, or begins
//! with damage, is known to have been there.
//!
//! The oldest go ([`Log::cut`]) when all their entries are in checkpoints and a
//! header behind them is attested, one after the other, so that a crash never
//! leaves a gap. Then the entries begin with those of the oldest segment that is
//! left: its header says where. They are not recycled: space is written ahead, so
//! that a new segment costs a sync no more than an old one.
//!
//! Space is filled with zeros a step ahead, by the write that reaches it:
//! overwriting is cheaper to sync than growing. So a segment is always as long as
//! its header has it for what is attested in it, and one that is shorter was cut off.

mod batch;
mod body;
mod error;
mod record;
mod recovery;
mod segments;

use std::collections::VecDeque;

pub use self::{
    batch::{Batch, EntryKind, Facts, HardState, LogEntry},
    error::LogError,
    segments::Layout,
};
use self::{
    body::Standing,
    record::{Link, Position},
    recovery::{Contents, FIRST_SEGMENT},
    segments::{Older, Tail, close, remove, segment_name, sync},
};
use crate::{
    disk::Disk,
    ids::{Index, NodeId, Term},
};

/// The encoding buffer keeps at most this much room between batches.
const BUFFER_BYTES_KEPT: usize = 2 << 20;

/// What a data directory is; written once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster it belongs to.
    pub cluster: u64,
    /// The member it belongs to.
    pub node: NodeId,
    /// Random, made with the directory.
    pub incarnation: u64,
}

/// What a log held when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Whose directory it is.
    pub identity: Identity,
    /// The newest.
    pub hard_state: HardState,
    /// The newest.
    pub facts: Facts,
    /// The index of the first entry that the log still holds, or of the next one
    /// if it holds none; 1 if nothing was ever cut off.
    pub first: Index,
    /// The entry behind which it was last begun anew, with its term; (0, 0) if it
    /// never was.
    pub base: (Index, Term),
    /// All entries, without gaps, from `first` on.
    pub entries: Vec<LogEntry>,
}

/// What a log holds, for one who only looks at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// What a start would find.
    pub recovered: Recovered,
    /// The files and how long they are, oldest first.
    pub segments: Vec<(String, u64)>,
    /// Where the newest record ends, in the newest segment.
    pub end: u64,
    /// How many bytes at the end no later record says to be durable: of damage to
    /// these a start could not know.
    pub unattested_bytes: u64,
}

/// The log over a disk.
///
/// After an error of the disk it writes nothing more, and every call fails with
/// [`LogError::Poisoned`]: what was appended since the last good sync may be on
/// disk or not, and only a new start can tell.
#[derive(Debug)]
pub struct Log<D> {
    disk: D,
    layout: Layout,
    standing: Standing,
    tail: Tail,
    /// Everything before this is synced.
    synced: Position,
    /// Whether the newest record is a mark.
    is_marked: bool,
    /// All segments but the newest.
    older: VecDeque<Older>,
    /// Bytes of records written since it was opened.
    written_bytes: u64,
    buffer: Vec<u8>,
    is_poisoned: bool,
}

impl<D: Disk> Log<D> {
    /// Makes the log of a new data directory, durable when this returns.
    ///
    /// Fails with [`LogError::Exists`] if there is one already. What an
    /// interrupted `create` left behind is removed.
    pub fn create(disk: D, identity: Identity, facts: Facts) -> Result<Self, LogError> {
        Self::create_with(disk, Layout::default(), identity, facts)
    }

    /// [`Log::create`] with segments of another size.
    pub fn create_with(
        mut disk: D,
        layout: Layout,
        identity: Identity,
        facts: Facts,
    ) -> Result<Self, LogError> {
        if identity.node.0 == 0 {
            return Err(LogError::Invalid {
                reason: "a node without an id",
            });
        }
        match recovery::read(&disk)? {
            Contents::Nothing => {}
            Contents::HalfCreated => remove(&mut disk, &segment_name(FIRST_SEGMENT))?,
            Contents::Log(_) => return Err(LogError::Exists),
        }
        let standing = Standing {
            identity,
            hard_state: HardState::default(),
            facts,
            base: (0, 0),
            next: 1,
        };
        let at = Position {
            segment: FIRST_SEGMENT,
            offset: 0,
        };
        let link = Link {
            at,
            previous: 0,
            attested: at,
        };
        let tail = Tail::begin(&mut disk, layout, &link, &standing)?;
        let mut log = Self {
            disk,
            layout,
            standing,
            synced: tail.end,
            tail,
            is_marked: false,
            older: VecDeque::new(),
            written_bytes: 0,
            buffer: Vec::new(),
            is_poisoned: false,
        };
        // From here on damage to the header is not taken for half a creation.
        log.mark()?;
        Ok(log)
    }

    /// Opens a log, or says that the directory holds none, or no more than an
    /// interrupted [`Log::create`].
    ///
    /// Everything that was synced is recovered. Of what was appended and not
    /// synced, a number of the oldest batches is recovered, each as a whole, and
    /// is durable when this returns. What cannot be the work of a crash is
    /// refused, and then nothing on disk was changed.
    pub fn open(disk: D) -> Result<Option<(Self, Recovered)>, LogError> {
        Self::open_with(disk, Layout::default())
    }

    /// [`Log::open`] with segments of another size from now on.
    pub fn open_with(mut disk: D, layout: Layout) -> Result<Option<(Self, Recovered)>, LogError> {
        let Contents::Log(mut found) = recovery::read(&disk)? else {
            return Ok(None);
        };
        found.repair(&mut disk)?;
        let recovered = found.recovered();
        let end = found.tail.at;
        let log = Self {
            disk,
            layout,
            tail: Tail {
                name: segment_name(end.segment),
                layout: found.layout,
                end,
                previous: found.tail.previous,
                length: found.length,
                is_fresh: found.is_fresh(),
                behind: found.behind,
            },
            synced: end,
            is_marked: found.is_marked,
            older: found.older,
            written_bytes: 0,
            standing: found.standing,
            buffer: Vec::new(),
            is_poisoned: false,
        };
        Ok(Some((log, recovered)))
    }

    /// What a log holds, or `None` where [`Log::open`] says so. Changes nothing, and
    /// refuses what `open` refuses.
    pub fn inspect(disk: &D) -> Result<Option<Inspection>, LogError> {
        Ok(match recovery::read(disk)? {
            Contents::Log(found) => Some(found.inspection()),
            Contents::Nothing | Contents::HalfCreated => None,
        })
    }

    /// Writes a batch; not durable before [`Log::sync`]. An empty one writes
    /// nothing.
    ///
    /// A batch that a later start would refuse fails with [`LogError::Invalid`]
    /// and changes nothing: one with a gap between entries, an entry without a
    /// term, a base before what is committed, or a commit index beyond the newest
    /// entry.
    pub fn append(&mut self, batch: &Batch) -> Result<(), LogError> {
        let invalid = |reason| LogError::Invalid { reason };
        let next = self.standing.check(batch).map_err(invalid)?;
        if batch.is_empty() {
            return self.attempt(|_| Ok(()));
        }
        record::begin(&mut self.buffer);
        body::put_batch(&mut self.buffer, batch);
        if !record::fits(&self.buffer) {
            return Err(invalid("a batch of more than 4 GiB"));
        }
        self.attempt(Self::write_record)?;
        self.standing.advance(batch, next);
        self.tail.behind = self.tail.behind.max(next);
        self.is_marked = false;
        self.buffer.shrink_to(BUFFER_BYTES_KEPT);
        Ok(())
    }

    /// Makes everything appended durable.
    pub fn sync(&mut self) -> Result<(), LogError> {
        self.attempt(Self::sync_tail)
    }

    /// Whether a mark is due: the newest batch is not attested by a record behind it.
    pub fn wants_mark(&self) -> bool {
        !self.is_marked && !self.is_poisoned
    }

    /// Makes everything appended durable and attested. For a node that is idle.
    pub fn mark(&mut self) -> Result<(), LogError> {
        self.attempt(|log| {
            log.sync_tail()?;
            record::begin(&mut log.buffer);
            body::put_batch(&mut log.buffer, &Batch::default());
            log.write_record()?;
            log.sync_tail()
        })?;
        self.is_marked = true;
        Ok(())
    }

    /// Bytes on disk, those written ahead included.
    pub fn bytes(&self) -> u64 {
        let older: u64 = self.older.iter().map(|segment| segment.length).sum();
        older + self.tail.length
    }

    /// Bytes of records written since it was opened.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// The entry behind which it was last begun anew; 0 if it never was.
    pub fn base(&self) -> Index {
        self.standing.base.0
    }

    /// Removes the oldest segment if it holds no entries behind `upto`, which must be
    /// in a durable checkpoint: what is left needs that. The newest always stays.
    /// Whether one was removed. Only one, since each costs a sync of the directory,
    /// and whoever calls has others waiting.
    pub fn cut(&mut self, upto: Index) -> Result<bool, LogError> {
        // A record behind the newest header attests it: without one, damage to it
        // would look like a log that never began.
        let is_attested = !self.tail.is_fresh && self.synced == self.tail.end;
        let is_over = |oldest: &&Older| oldest.behind <= upto.saturating_add(1);
        let Some(oldest) = self.older.front().filter(is_over) else {
            return Ok(false);
        };
        if is_attested {
            let name = segment_name(oldest.number);
            self.attempt(|log| remove(&mut log.disk, &name))?;
            self.older.pop_front();
        }
        Ok(is_attested)
    }

    /// Works on the disk, unless that failed before; remembers if it fails now.
    fn attempt(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<(), LogError>,
    ) -> Result<(), LogError> {
        if self.is_poisoned {
            return Err(LogError::Poisoned);
        }
        self.is_poisoned = true;
        work(self)?;
        self.is_poisoned = false;
        Ok(())
    }

    /// Writes the record that was begun in the buffer.
    fn write_record(&mut self) -> Result<(), LogError> {
        let bytes = record::sealed_bytes(&self.buffer);
        let is_full = self.tail.end.offset + bytes > self.tail.layout.segment_bytes;
        if is_full && !self.tail.is_fresh {
            self.roll()?;
        }
        self.tail
            .write(&mut self.disk, &mut self.buffer, self.synced)?;
        self.written_bytes += bytes;
        Ok(())
    }

    /// Goes on in a new segment, which is durable when this returns.
    fn roll(&mut self) -> Result<(), LogError> {
        self.sync_tail()?;
        let link = Link {
            at: Position {
                segment: self.tail.end.segment + 1,
                offset: 0,
            },
            previous: self.tail.previous,
            attested: self.synced,
        };
        let tail = Tail::begin(&mut self.disk, self.layout, &link, &self.standing)?;
        let closing = Link {
            at: self.tail.end,
            previous: self.tail.previous,
            attested: tail.end,
        };
        close(&mut self.disk, &closing)?;
        self.older.push_back(Older {
            number: self.tail.end.segment,
            length: self.tail.length,
            behind: self.tail.behind,
        });
        self.synced = tail.end;
        self.tail = tail;
        Ok(())
    }

    fn sync_tail(&mut self) -> Result<(), LogError> {
        if self.synced != self.tail.end {
            sync(&mut self.disk, &self.tail.name)?;
            self.synced = self.tail.end;
        }
        Ok(())
    }
}
