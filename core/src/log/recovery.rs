//! What a start makes of the segments it finds.
//!
//! First everything is read and judged, and nothing is changed if it is refused;
//! then [`Found::repair`] makes durable what was accepted. A crash in between or
//! during the repair leaves segments of which the next start makes the same,
//! but for a tail that was never durable and may by then be lost.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{
    Inspection, Layout, LogEntry, LogError, Recovered,
    body::{self, FORMAT_VERSION, Malformed, Standing},
    record::{self, Link, Position, Record},
    segments::{Older, close, segment_name},
};
use crate::{disk::Disk, ids::Index};

/// The number of the first segment of all.
pub(super) const FIRST_SEGMENT: u64 = 1;

/// A log that was read.
#[derive(Debug)]
pub(super) struct Found {
    /// What the records add up to.
    pub(super) standing: Standing,
    pub(super) entries: Vec<LogEntry>,
    /// Where the next record goes and what it follows. `attested` is what the
    /// newest record attests.
    pub(super) tail: Link,
    /// Whether the newest record is a mark.
    pub(super) is_marked: bool,
    /// How long the newest segment is on disk.
    pub(super) length: u64,
    /// Those before it.
    pub(super) older: VecDeque<Older>,
    /// See [`Older::behind`]; of the newest segment.
    pub(super) behind: Index,
    /// The index of the first entry, or of the next one if there are none.
    first: Index,
    newest: Segment,
    /// How the newest segment takes up space.
    pub(super) layout: Layout,
    /// What closes the segment before the newest, and whether that was there.
    closing: Option<(Link, bool)>,
    /// A segment behind the newest whose header was never completed.
    torn: Option<Segment>,
}

/// What a directory holds.
#[derive(Debug)]
pub(super) enum Contents {
    Nothing,
    /// A first segment whose making was interrupted.
    HalfCreated,
    Log(Box<Found>),
}

/// Reads and judges all segments; changes nothing.
pub(super) fn read(disk: &impl Disk) -> Result<Contents, LogError> {
    let row = row(disk)?;
    let Some(&newest) = row.last() else {
        return Ok(Contents::Nothing);
    };
    let mut found: Option<Found> = None;
    let mut torn = None;
    for &number in &row {
        let segment = Segment::read(disk, number)?;
        match segment.record(0) {
            Some(record) => found = Some(Found::enter(found, segment, &record)?),
            None if number == newest => torn = Some(segment),
            None => return Err(segment.damaged(0, "its header is damaged")),
        }
    }
    if let Some(torn) = &torn {
        torn.check_never_completed(&row)?;
    }
    let Some(mut found) = found else {
        return match torn {
            Some(torn) if newest > FIRST_SEGMENT => Err(torn.damaged(0, "its header is damaged")),
            _ => Ok(Contents::HalfCreated),
        };
    };
    found.check_attested(torn.as_ref())?;
    if found.older.is_empty() && found.is_fresh() {
        // A log is durable no sooner than the mark behind its first header, and is
        // never cut back to a header that nothing attests.
        return match found.newest.number {
            FIRST_SEGMENT => Ok(Contents::HalfCreated),
            _ => Err(found
                .newest
                .damaged(found.tail.at.offset, "its records are gone")),
        };
    }
    found.torn = torn;
    Ok(Contents::Log(Box::new(found)))
}

/// The numbers of the segments, which must be a row without gaps.
fn row(disk: &impl Disk) -> Result<Vec<u64>, LogError> {
    let names = disk.list().map_err(LogError::io("listing", "."))?;
    let mut row = Vec::new();
    for file in names.into_iter().filter(|name| name.starts_with("log-")) {
        let number = file["log-".len()..].parse().unwrap_or(0);
        if number < FIRST_SEGMENT || segment_name(number) != file {
            return Err(LogError::Name { file });
        }
        row.push(number);
    }
    row.sort_unstable();
    // The oldest may be cut off: the header of the first one that is left restates
    // all that was in those before it.
    let oldest = row.first().copied().unwrap_or(FIRST_SEGMENT);
    for (&number, expected) in row.iter().zip(oldest..) {
        if number != expected {
            return Err(LogError::Damaged {
                file: segment_name(expected),
                offset: 0,
                reason: "the file is missing, and a later one is there",
            });
        }
    }
    Ok(row)
}

impl Found {
    /// Goes on into the next segment, whose header is given, and through it.
    fn enter(before: Option<Self>, segment: Segment, header: &Record) -> Result<Self, LogError> {
        let (standing, layout) =
            body::header(segment.body(header)).map_err(|e| segment.malformed(0, e))?;
        let mut found = match before {
            Some(before) => before.continued(segment, header, &standing)?,
            None => Self::first(segment, header, standing)?,
        };
        found.layout = layout;
        found.follow(header);
        while let Some(record) = found.next_record() {
            found.replay(&record)?;
        }
        Ok(found)
    }

    fn first(segment: Segment, header: &Record, standing: Standing) -> Result<Self, LogError> {
        let is_first = standing.next == 1 && header.link.previous == 0;
        if segment.number == FIRST_SEGMENT && !is_first {
            return Err(segment.corrupt(0, "it is not the first of its row"));
        }
        Ok(Self {
            first: standing.next,
            behind: standing.next,
            standing,
            entries: Vec::new(),
            tail: header.link,
            is_marked: false,
            length: segment.bytes.len() as u64,
            older: VecDeque::new(),
            newest: segment,
            layout: Layout::default(),
            closing: None,
            torn: None,
        })
    }

    fn continued(
        mut self,
        segment: Segment,
        header: &Record,
        standing: &Standing,
    ) -> Result<Self, LogError> {
        if (header.link.previous, header.link.attested) != (self.tail.previous, self.tail.at) {
            let reason = "the next segment follows something else";
            return Err(self.newest.damaged(self.tail.at.offset, reason));
        }
        if *standing != self.standing {
            return Err(segment.corrupt(0, "its header restates something else"));
        }
        self.older.push_back(Older {
            number: self.newest.number,
            length: self.length,
            behind: self.behind,
        });
        let closing = Link {
            attested: segment.at(header.end),
            ..self.tail
        };
        let found = self.newest.record(closing.at.offset);
        self.closing = Some((closing, found.is_some_and(|record| record.link == closing)));
        self.behind = standing.next;
        self.length = segment.bytes.len() as u64;
        self.tail.at = segment.at(0);
        self.newest = segment;
        Ok(self)
    }

    /// The record at the end, if it follows what was read, and does not close the
    /// segment.
    fn next_record(&self) -> Option<Record> {
        let record = self.newest.record(self.tail.at.offset)?;
        let Link {
            previous, attested, ..
        } = record.link;
        let follows = previous == self.tail.previous && attested.segment <= self.newest.number;
        follows.then_some(record)
    }

    fn follow(&mut self, record: &Record) {
        self.tail = Link {
            at: self.newest.at(record.end),
            previous: record.checksum,
            attested: record.link.attested,
        };
    }

    fn replay(&mut self, record: &Record) -> Result<(), LogError> {
        let offset = record.link.at.offset;
        let batch = body::batch(self.newest.body(record))
            .map_err(|malformed| self.newest.malformed(offset, malformed))?;
        let next = self
            .standing
            .check(&batch)
            .map_err(|reason| self.newest.corrupt(offset, reason))?;
        if record.link.attested > record.link.at {
            return Err(self.newest.corrupt(offset, "it attests what is behind it"));
        }
        self.standing.advance(&batch, next);
        self.is_marked = batch.is_empty();
        self.behind = self.behind.max(next);
        if let Some((base, _)) = batch.base {
            self.entries.clear();
            self.first = base + 1;
        }
        for entry in batch.entries {
            // It may replace entries of segments that are cut off. Checked: it is
            // not behind the end.
            self.first = self.first.min(entry.index);
            self.entries.truncate((entry.index - self.first) as usize);
            self.entries.push(entry);
        }
        self.follow(record);
        Ok(())
    }

    /// Refuses if any record behind the end says that more was durable, or the file
    /// is shorter than it was then.
    fn check_attested(&self, torn: Option<&Segment>) -> Result<(), LogError> {
        let end = self.tail.at;
        let behind = record::scan(&self.newest.bytes, end);
        let in_torn = torn.into_iter().flat_map(Segment::records);
        for Record { link, .. } in behind.chain(in_torn) {
            if link.attested.segment > end.segment {
                return Err(LogError::Damaged {
                    file: segment_name(link.attested.segment),
                    offset: 0,
                    reason: match torn {
                        Some(_) => "its header is damaged",
                        None => "the file is missing, and was there",
                    },
                });
            }
            // One that lies at the very end and attests all before it, but does
            // not follow it, was written behind something else.
            if link.attested > end || (link.attested == end && link.at == end) {
                let reason = "a later record says that what was here is durable";
                return Err(self.newest.damaged(end.offset, reason));
            }
        }
        let attested = match self.closing {
            Some((closing, true)) => self.tail.attested.max(closing.attested),
            _ => self.tail.attested,
        };
        if attested.segment == end.segment && self.length < self.layout.length(attested.offset) {
            let reason = "it is shorter than it was when it was synced";
            return Err(self.newest.damaged(self.length, reason));
        }
        Ok(())
    }

    /// Makes durable what was accepted, and takes away what was not.
    ///
    /// Everything behind the attested end is written again, not only synced: if
    /// the process before this one ended after a failed sync, the kernel holds
    /// those pages to be clean although the disk does not have them.
    pub(super) fn repair(&mut self, disk: &mut impl Disk) -> Result<(), LogError> {
        if let Some(torn) = self.torn.take() {
            disk.remove(&torn.name)
                .map_err(LogError::io("removing", &torn.name))?;
        }
        let Link {
            at: end, attested, ..
        } = self.tail;
        let from = if attested.segment == end.segment {
            attested.offset
        } else {
            0
        };
        let mut bytes = self.newest.bytes.slice(from as usize..).to_vec();
        bytes.truncate((end.offset - from) as usize);
        // It may end anywhere if the disk was full.
        self.length = self.layout.length(self.length);
        bytes.resize((self.length - from) as usize, 0);
        let name = &self.newest.name;
        disk.write(name, from, &bytes)
            .map_err(LogError::io("writing", name))?;
        disk.sync(name).map_err(LogError::io("syncing", name))?;
        disk.sync_directory()
            .map_err(LogError::io("syncing", "."))?;
        match &self.closing {
            Some((closing, _)) => close(disk, closing),
            None => Ok(()),
        }
    }

    /// Whether the newest segment holds nothing but its header.
    pub(super) fn is_fresh(&self) -> bool {
        self.newest
            .record(0)
            .is_some_and(|header| header.end == self.tail.at.offset)
    }

    pub(super) fn inspection(mut self) -> Inspection {
        let Link { at, attested, .. } = self.tail;
        let unattested_bytes = match attested.segment == at.segment {
            _ if self.is_marked => 0,
            true => at.offset - attested.offset,
            false => at.offset,
        };
        let older = self.older.iter().map(|older| (older.number, older.length));
        let rows = older.chain([(self.newest.number, self.length)]);
        Inspection {
            segments: rows.map(|(n, length)| (segment_name(n), length)).collect(),
            end: at.offset,
            unattested_bytes,
            recovered: self.recovered(),
        }
    }

    pub(super) fn recovered(&mut self) -> Recovered {
        Recovered {
            identity: self.standing.identity.clone(),
            hard_state: self.standing.hard_state,
            facts: self.standing.facts.clone(),
            first: self.first,
            base: self.standing.base,
            entries: std::mem::take(&mut self.entries),
        }
    }
}

/// The whole content of a segment.
#[derive(Debug)]
struct Segment {
    number: u64,
    name: String,
    bytes: Bytes,
}

impl Segment {
    fn read(disk: &impl Disk, number: u64) -> Result<Self, LogError> {
        let name = segment_name(number);
        let bytes = disk.read(&name).map_err(LogError::io("reading", &name))?;
        Ok(Self {
            number,
            name,
            bytes: bytes.into(),
        })
    }

    fn at(&self, offset: u64) -> Position {
        Position {
            segment: self.number,
            offset,
        }
    }

    fn record(&self, offset: u64) -> Option<Record> {
        record::parse(&self.bytes, self.at(offset))
    }

    fn records(&self) -> impl Iterator<Item = Record> {
        record::scan(&self.bytes, self.at(0))
    }

    fn body(&self, record: &Record) -> Bytes {
        self.bytes.slice(record.body.clone())
    }

    /// Refuses a segment without a header unless it can be the work of a crash
    /// while it was begun.
    fn check_never_completed(&self, row: &[u64]) -> Result<(), LogError> {
        if let Some(number) = record::claimed_segment(&self.bytes)
            && row.contains(&number)
        {
            return Err(self.damaged(0, "it is a copy of another segment"));
        }
        if !record::may_be_torn(&self.bytes) {
            return Err(self.damaged(0, "it does not begin like a segment"));
        }
        let begin = self.at(0);
        if self.records().any(|record| record.link.attested > begin) {
            return Err(self.damaged(0, "a later record says that its header is durable"));
        }
        Ok(())
    }

    fn damaged(&self, offset: u64, reason: &'static str) -> LogError {
        LogError::Damaged {
            file: self.name.clone(),
            offset,
            reason,
        }
    }

    fn corrupt(&self, offset: u64, reason: &'static str) -> LogError {
        LogError::Corrupt {
            file: self.name.clone(),
            offset,
            reason,
        }
    }

    fn malformed(&self, offset: u64, malformed: Malformed) -> LogError {
        match malformed {
            Malformed::Content(reason) => self.corrupt(offset, reason),
            Malformed::Version(found) => LogError::Version {
                file: self.name.clone(),
                found,
                supported: FORMAT_VERSION,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::SimDisk,
        ids::NodeId,
        log::{Batch, EntryKind, Facts, HardState, Identity, Log},
    };

    fn identity() -> Identity {
        Identity {
            cluster: 1,
            node: NodeId(1),
            incarnation: 9,
        }
    }

    fn log(disk: &SimDisk) -> Log<SimDisk> {
        Log::create(disk.clone(), identity(), Facts::default()).unwrap()
    }

    fn entries(indexes: impl IntoIterator<Item = u64>, term: u64) -> Batch {
        let entry = |index| LogEntry {
            index,
            term,
            kind: EntryKind::Normal,
            data: Bytes::from_static(b"data"),
        };
        Batch {
            entries: indexes.into_iter().map(entry).collect(),
            ..Batch::default()
        }
    }

    fn found(disk: &SimDisk) -> Found {
        match read(disk).unwrap() {
            Contents::Log(found) => *found,
            other => panic!("no log but {other:?}"),
        }
    }

    /// Puts a whole record behind the last one, whatever it says.
    fn forge(disk: &mut SimDisk, put: impl FnOnce(&mut Vec<u8>)) {
        let found = found(disk);
        let mut buffer = Vec::new();
        record::begin(&mut buffer);
        put(&mut buffer);
        record::seal(&mut buffer, &found.tail);
        disk.write(&found.newest.name, found.tail.at.offset, &buffer)
            .unwrap();
    }

    fn refusal(disk: &SimDisk) -> LogError {
        Log::open(disk.clone()).expect_err("this is refused")
    }

    #[test]
    fn whole_records_that_make_no_sense_are_refused() {
        let gap = entries([2], 1);
        let no_term = entries([1], 0);
        let zero = entries([0], 1);
        let uncommittable = Batch {
            hard_state: Some(HardState {
                term: 1,
                vote: 0,
                commit: 1,
            }),
            ..Batch::default()
        };
        for batch in [gap, no_term, zero, uncommittable] {
            let mut disk = SimDisk::new();
            log(&disk);
            forge(&mut disk, |buffer| body::put_batch(buffer, &batch));
            assert!(matches!(refusal(&disk), LogError::Corrupt { .. }));
        }
        let garbage: [&[u8]; 4] = [b"", b"\x07", b"\x02\x09", b"\x02\x00garbage"];
        for body in garbage {
            let mut disk = SimDisk::new();
            log(&disk);
            forge(&mut disk, |buffer| buffer.extend_from_slice(body));
            assert!(matches!(refusal(&disk), LogError::Corrupt { .. }));
        }
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let mut disk = SimDisk::new();
        log(&disk);
        let mut header = Vec::new();
        record::begin(&mut header);
        body::put_header(&mut header, &found(&disk).standing, Layout::default());
        header[49] = 2;
        let at = Position {
            segment: 1,
            offset: 0,
        };
        let link = Link {
            at,
            previous: 0,
            attested: at,
        };
        record::seal(&mut header, &link);
        disk.write(&segment_name(1), 0, &header).unwrap();
        let message = refusal(&disk).to_string();
        assert!(message.contains("version 2"), "{message}");
        assert!(message.contains("reads version 1"), "{message}");
    }

    #[test]
    fn a_record_of_another_history_is_refused() {
        let (mut one, other) = (SimDisk::new(), SimDisk::new());
        for (disk, term) in [(&one, 1), (&other, 2)] {
            let mut log = log(disk);
            log.append(&entries([1], term)).unwrap();
            log.sync().unwrap();
        }
        let end = found(&one).tail.at.offset;
        assert_eq!(end, found(&other).tail.at.offset);
        let (mut log, _) = Log::open(other.clone()).unwrap().unwrap();
        log.append(&entries([2], 3)).unwrap();
        let foreign = other.read(&segment_name(1)).unwrap();
        one.write(&segment_name(1), end, &foreign[end as usize..])
            .unwrap();
        assert!(matches!(refusal(&one), LogError::Damaged { offset, .. } if offset == end));
    }

    #[test]
    fn a_first_segment_that_is_something_else_is_not_half_a_creation() {
        let mut disk = SimDisk::new();
        disk.write(&segment_name(1), 0, b"another file").unwrap();
        assert!(matches!(refusal(&disk), LogError::Damaged { .. }));
        let creation = Log::create(disk.clone(), identity(), Facts::default());
        creation.expect_err("it is not overwritten");
        assert_eq!(disk.read(&segment_name(1)).unwrap(), b"another file");
    }
}
