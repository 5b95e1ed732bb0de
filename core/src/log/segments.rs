//! The files of a log: how they are named, how they take up space, and how a record gets
//! to the end of the newest. See the format in [`super`].

use super::{
    Batch, LogError,
    body::{self, Standing},
    record::{self, Link, Position},
};
use crate::{disk::Disk, ids::Index};

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
    pub(super) fn length(self, end: u64) -> u64 {
        let steps = end.checked_next_multiple_of(self.step_bytes);
        steps.unwrap_or(end).min(self.segment_bytes).max(end)
    }
}

/// A segment that is complete.
#[derive(Clone, Copy, Debug)]
pub(super) struct Older {
    pub(super) number: u64,
    pub(super) length: u64,
    /// Behind the highest index of an entry that was ever written up to its end.
    pub(super) behind: Index,
}

/// The segment that is written to.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) name: String,
    pub(super) layout: Layout,
    /// Where the next record goes.
    pub(super) end: Position,
    /// The checksum of the record before that.
    pub(super) previous: u64,
    /// How long the file is.
    pub(super) length: u64,
    /// Whether it holds nothing but its header.
    pub(super) is_fresh: bool,
    /// See [`Older::behind`].
    pub(super) behind: Index,
}

impl Tail {
    /// Makes a segment, durable when this returns.
    pub(super) fn begin<D: Disk>(
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
    pub(super) fn write<D: Disk>(
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
pub(super) fn close<D: Disk>(disk: &mut D, link: &Link) -> Result<(), LogError> {
    let name = segment_name(link.at.segment);
    let mut record = Vec::new();
    record::begin(&mut record);
    body::put_batch(&mut record, &Batch::default());
    record::seal(&mut record, link);
    disk.write(&name, link.at.offset, &record)
        .map_err(LogError::io("writing", &name))?;
    sync(disk, &name)
}

pub(super) fn sync<D: Disk>(disk: &mut D, name: &str) -> Result<(), LogError> {
    disk.sync(name).map_err(LogError::io("syncing", name))
}

pub(super) fn remove<D: Disk>(disk: &mut D, name: &str) -> Result<(), LogError> {
    disk.remove(name).map_err(LogError::io("removing", name))?;
    disk.sync_directory().map_err(LogError::io("syncing", "."))
}

pub(super) fn segment_name(number: u64) -> String {
    format!("log-{number:020}")
}
