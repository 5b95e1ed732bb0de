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
//! | then | 8 | first index of the log |
//! | then | 8 | index behind the newest entry |
//!
//! | body of a batch | bytes | |
//! |---|---|---|
//! | 0 | 1 | 2 |
//! | 1 | 1 | 1 if a hard state follows, plus 2 if facts follow |
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

mod body;
mod record;
mod recovery;

use std::{collections::VecDeque, io};

use bytes::Bytes;

use crate::{
    disk::Disk,
    ids::{Index, NodeId, Term},
};
use body::Standing;
use record::{Link, Position};
use recovery::{Contents, FIRST_SEGMENT};

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

/// Raft's hard state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// The current term.
    pub term: Term,
    /// Who got this node's vote in it; 0 for nobody.
    pub vote: u64,
    /// Up to where the log is known to be committed.
    pub commit: Index,
}

/// What a node must remember beside the log of Raft.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether enough other members know this directory's incarnation, so that
    /// it may vote.
    pub admitted: bool,
    /// The incarnations of other members, in order of id; the first one seen stays.
    pub incarnations: std::collections::BTreeMap<NodeId, u64>,
    /// The voters, in order of id.
    pub voters: Vec<NodeId>,
}

/// One entry of Raft's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its position.
    pub index: Index,
    /// The term it was proposed in.
    pub term: Term,
    /// What `data` is.
    pub kind: EntryKind,
    /// An encoded `internal::Entry`, or empty.
    pub data: Bytes,
}

/// The kinds of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// Commands.
    Normal,
    /// A change of membership.
    Membership,
}

/// What one turn makes durable, in one write and one sync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// If changed.
    pub hard_state: Option<HardState>,
    /// If changed.
    pub facts: Option<Facts>,
    /// An entry replaces all earlier ones from its index on.
    pub entries: Vec<LogEntry>,
}

impl Batch {
    /// Whether there is nothing to make durable.
    pub fn is_empty(&self) -> bool {
        self.hard_state.is_none() && self.facts.is_none() && self.entries.is_empty()
    }
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

/// How a log takes up space. It may change from one start to the next; each segment
/// keeps the one that it was begun with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How long a segment gets, in bytes. A batch that is longer gets a segment
    /// of its own, as long as it takes.
    pub segment_bytes: u64,
    /// How far the file is filled with zeros at a time, in bytes.
    pub step_bytes: u64,
}

impl Default for Layout {
    /// 16 MiB, in steps of 1 MiB.
    fn default() -> Self {
        Self {
            segment_bytes: 16 << 20,
            step_bytes: 1 << 20,
        }
    }
}

impl Layout {
    /// How long a segment is made whose records end here.
    fn length(self, end: u64) -> u64 {
        let steps = end.checked_next_multiple_of(self.step_bytes);
        steps.unwrap_or(end).min(self.segment_bytes).max(end)
    }
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

/// A segment that is complete.
#[derive(Clone, Copy, Debug)]
struct Older {
    number: u64,
    length: u64,
    /// Behind the highest index of an entry that was ever written up to its end.
    behind: Index,
}

/// The segment that is written to.
#[derive(Debug)]
struct Tail {
    name: String,
    layout: Layout,
    /// Where the next record goes.
    end: Position,
    /// The checksum of the record before that.
    previous: u64,
    /// How long the file is.
    length: u64,
    /// Whether it holds nothing but its header.
    is_fresh: bool,
    /// See [`Older::behind`].
    behind: Index,
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
            first: 1,
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
    /// term, or a commit index beyond the newest entry.
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

impl Tail {
    /// Makes a segment, durable when this returns.
    fn begin<D: Disk>(
        disk: &mut D,
        layout: Layout,
        link: &Link,
        standing: &Standing,
    ) -> Result<Self, LogError> {
        let mut tail = Self {
            name: segment_name(link.at.segment),
            layout,
            end: link.at,
            previous: link.previous,
            length: 0,
            is_fresh: true,
            behind: standing.next,
        };
        let mut header = Vec::new();
        record::begin(&mut header);
        body::put_header(&mut header, standing, layout);
        tail.write(disk, &mut header, link.attested)?;
        sync(disk, &tail.name)?;
        disk.sync_directory()
            .map_err(LogError::io("syncing", "."))?;
        tail.is_fresh = true;
        Ok(tail)
    }

    /// Writes the record that was begun in the buffer, and zeros behind it where
    /// the file has to grow for it.
    fn write<D: Disk>(
        &mut self,
        disk: &mut D,
        buffer: &mut Vec<u8>,
        attested: Position,
    ) -> Result<(), LogError> {
        let link = Link {
            at: self.end,
            previous: self.previous,
            attested,
        };
        let checksum = record::seal(buffer, &link);
        let end = self.end.offset + buffer.len() as u64;
        if end > self.length {
            self.length = self.layout.length(end);
            buffer.resize((self.length - self.end.offset) as usize, 0);
        }
        disk.write(&self.name, self.end.offset, buffer)
            .map_err(LogError::io("writing", &self.name))?;
        self.end.offset = end;
        self.previous = checksum;
        self.is_fresh = false;
        Ok(())
    }
}

/// Makes durable in a segment that the header of the next one is.
fn close<D: Disk>(disk: &mut D, link: &Link) -> Result<(), LogError> {
    let name = segment_name(link.at.segment);
    let mut record = Vec::new();
    record::begin(&mut record);
    body::put_batch(&mut record, &Batch::default());
    record::seal(&mut record, link);
    disk.write(&name, link.at.offset, &record)
        .map_err(LogError::io("writing", &name))?;
    sync(disk, &name)
}

fn sync<D: Disk>(disk: &mut D, name: &str) -> Result<(), LogError> {
    disk.sync(name).map_err(LogError::io("syncing", name))
}

fn remove<D: Disk>(disk: &mut D, name: &str) -> Result<(), LogError> {
    disk.remove(name).map_err(LogError::io("removing", name))?;
    disk.sync_directory().map_err(LogError::io("syncing", "."))
}

fn segment_name(number: u64) -> String {
    format!("log-{number:020}")
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk failed.
    #[error("{doing} `{file}` failed")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// With which file; `.` is the directory.
        file: String,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// There is no space left. A start after space was made finds everything
    /// that was synced.
    #[error("{doing} `{file}` failed: the disk is full; make space and start again")]
    Full {
        /// What was being done.
        doing: &'static str,
        /// With which file.
        file: String,
        /// How it failed.
        #[source]
        source: io::Error,
    },
    /// Something that was durable is not there any more.
    #[error(
        "`{file}` is damaged at byte {offset}: {reason}; nothing was changed: restore this \
         directory as it was, or remove it and add the member again as a new one"
    )]
    Damaged {
        /// In which file.
        file: String,
        /// Where what is left of it ends.
        offset: u64,
        /// How it is known.
        reason: &'static str,
    },
    /// What is there is whole, but no correct program writes it.
    #[error(
        "`{file}` contradicts itself at byte {offset}: {reason}; nothing was changed: please \
         report this, then remove the directory and add the member again as a new one"
    )]
    Corrupt {
        /// In which file.
        file: String,
        /// The offset of the record.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It was written by a newer or older program.
    #[error(
        "`{file}` has version {found} of the log format; this program reads version {supported}"
    )]
    Version {
        /// In which file.
        file: String,
        /// The version it has.
        found: u32,
        /// The version that could be read.
        supported: u32,
    },
    /// A file that is named almost like a segment.
    #[error("`{file}` is not the name of a log segment (`log-` and 20 digits); move it away")]
    Name {
        /// The file.
        file: String,
    },
    /// There is a log already where one was to be made.
    #[error("the directory holds a log already")]
    Exists,
    /// What was to be written makes no sense; nothing was written.
    #[error("refused to write {reason}")]
    Invalid {
        /// What it is.
        reason: &'static str,
    },
    /// The disk failed before; nothing more is written.
    #[error("the log is closed since its disk failed")]
    Poisoned,
}

impl LogError {
    /// Says what an error of the disk interrupted.
    fn io(doing: &'static str, file: &str) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            let file = file.to_owned();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full {
                    doing,
                    file,
                    source,
                },
                _ => Self::Io {
                    doing,
                    file,
                    source,
                },
            }
        }
    }
}
