//! The frame around every record: where it lies, what it follows, what it
//! attests, and a checksum over all of it. See the format in [`super`].

use xxhash_rust::xxh3::xxh3_64_with_seed;

const MAGIC: u32 = u32::from_le_bytes(*b"CLog");
/// What records and their fields are aligned to.
const WORD_BYTES: usize = 8;
const FRAME_WORDS: usize = 6;
const FRAME_BYTES: usize = FRAME_WORDS * WORD_BYTES;

/// A place in the row of segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) segment: u64,
    pub(super) offset: u64,
}

/// What ties a record to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Where the record lies: where the one before it ends, or a new segment begins.
    pub(super) at: Position,
    /// The checksum of the record before it; 0 for the first of all.
    pub(super) previous: u64,
    /// Everything before this was synced when the record was written.
    pub(super) attested: Position,
}

/// A record that agrees with its own checksum and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) link: Link,
    /// Where the body lies in the file.
    pub(super) body: std::ops::Range<usize>,
    /// Where the next record begins.
    pub(super) end: u64,
    pub(super) checksum: u64,
}

/// Empties the buffer and leaves room for the frame; the body is pushed behind it.
pub(super) fn begin(buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.resize(FRAME_BYTES, 0);
}

/// How long the record that was begun in this buffer will be.
pub(super) fn sealed_bytes(buffer: &[u8]) -> u64 {
    (buffer.len().next_multiple_of(WORD_BYTES) + WORD_BYTES) as u64
}

/// Whether the body in this buffer has a length that the frame can say.
pub(super) fn fits(buffer: &[u8]) -> bool {
    u32::try_from(buffer.len()).is_ok()
}

/// Completes a record that was begun; returns its checksum.
pub(super) fn seal(buffer: &mut Vec<u8>, link: &Link) -> u64 {
    let body_bytes = (buffer.len() - FRAME_BYTES) as u64;
    buffer.resize(buffer.len().next_multiple_of(WORD_BYTES), 0);
    let words = [
        u64::from(MAGIC) | body_bytes << 32,
        link.at.segment,
        link.at.offset,
        link.previous,
        link.attested.segment,
        link.attested.offset,
    ];
    for (bytes, word) in buffer.chunks_exact_mut(WORD_BYTES).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let checksum = xxh3_64_with_seed(buffer, link.at.segment);
    buffer.extend_from_slice(&checksum.to_le_bytes());
    checksum
}

/// The record at a place of a segment, if a whole one was written for that place.
pub(super) fn parse(file: &[u8], at: Position) -> Option<Record> {
    let from = usize::try_from(at.offset).ok()?;
    let bytes = file.get(from..)?;
    let (first, segment, offset) = (word(bytes, 0)?, word(bytes, 1)?, word(bytes, 2)?);
    // The place is looked at before the checksum: a scan over bytes that clients
    // chose must not compute one at every step.
    if first as u32 != MAGIC || (Position { segment, offset }) != at {
        return None;
    }
    let body_bytes = usize::try_from(first >> 32).ok()?;
    let covered = (FRAME_BYTES + body_bytes).next_multiple_of(WORD_BYTES);
    let checksum = word(bytes, covered / WORD_BYTES)?;
    if xxh3_64_with_seed(&bytes[..covered], segment) != checksum {
        return None;
    }
    let link = Link {
        at,
        previous: word(bytes, 3)?,
        attested: Position {
            segment: word(bytes, 4)?,
            offset: word(bytes, 5)?,
        },
    };
    Some(Record {
        link,
        body: from + FRAME_BYTES..from + FRAME_BYTES + body_bytes,
        end: at.offset + (covered + WORD_BYTES) as u64,
        checksum,
    })
}

/// The segment for which a whole record at the beginning of this file was written.
pub(super) fn claimed_segment(file: &[u8]) -> Option<u64> {
    let segment = word(file, 1)?;
    parse(file, Position { segment, offset: 0 }).map(|_| segment)
}

/// Whether a file can be one whose first record was never completed: a write of
/// it leaves the beginning as it was made, zero, or as the record has it.
pub(super) fn may_be_torn(file: &[u8]) -> bool {
    word(file, 0).is_none_or(|first| first == 0 || first as u32 == MAGIC)
}

/// The records written for places of a segment from an offset on, wherever they are.
pub(super) fn scan(file: &[u8], from: Position) -> impl Iterator<Item = Record> {
    let steps = (from.offset..file.len() as u64).step_by(WORD_BYTES);
    steps.filter_map(move |offset| parse(file, Position { offset, ..from }))
}

fn word(bytes: &[u8], number: usize) -> Option<u64> {
    let from = number.checked_mul(WORD_BYTES)?;
    let bytes = bytes.get(from..from + WORD_BYTES)?;
    bytes.try_into().map(u64::from_le_bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link {
        at: Position {
            segment: 7,
            offset: 16,
        },
        previous: 99,
        attested: Position {
            segment: 6,
            offset: 1_000,
        },
    };

    fn sealed(body: &[u8]) -> Vec<u8> {
        let mut buffer = Vec::new();
        begin(&mut buffer);
        buffer.extend_from_slice(body);
        let bytes = sealed_bytes(&buffer);
        seal(&mut buffer, &LINK);
        assert_eq!(buffer.len() as u64, bytes);
        buffer
    }

    fn file(record: &[u8]) -> Vec<u8> {
        [&[0; 16], record, &[0; 24]].concat()
    }

    #[test]
    fn a_record_is_read_back() {
        for length in 0..20 {
            let body = vec![b'x'; length];
            let file = file(&sealed(&body));
            let record = parse(&file, LINK.at).unwrap();
            assert_eq!(record.link, LINK);
            assert_eq!(file[record.body.clone()], body);
            assert_eq!(record.end % 8, 0);
            assert_eq!(record.end as usize, file.len() - 24);
            let found: Vec<_> = scan(
                &file,
                Position {
                    offset: 0,
                    ..LINK.at
                },
            )
            .collect();
            assert_eq!(found, [record]);
        }
    }

    #[test]
    fn the_format_is_as_documented() {
        let record = sealed(b"abc");
        assert_eq!(record.len(), 64);
        assert_eq!(record[..8], *b"CLog\x03\0\0\0");
        assert_eq!(record[8..16], 7u64.to_le_bytes());
        assert_eq!(record[16..24], 16u64.to_le_bytes());
        assert_eq!(record[24..32], 99u64.to_le_bytes());
        assert_eq!(record[32..40], 6u64.to_le_bytes());
        assert_eq!(record[40..48], 1_000u64.to_le_bytes());
        assert_eq!(record[48..56], *b"abc\0\0\0\0\0");
        let checksum = xxh3_64_with_seed(&record[..56], 7);
        assert_eq!(record[56..], checksum.to_le_bytes());
    }

    #[test]
    fn no_changed_bit_goes_unnoticed() {
        let whole = file(&sealed(b"hello"));
        for bit in 16 * 8..(whole.len() - 24) * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(parse(&damaged, LINK.at), None, "bit {bit}");
        }
    }

    #[test]
    fn a_record_out_of_its_place_is_none() {
        let whole = file(&sealed(b"hello"));
        let elsewhere = [
            Position {
                segment: 8,
                ..LINK.at
            },
            Position {
                offset: 24,
                ..LINK.at
            },
        ];
        for at in elsewhere {
            assert_eq!(parse(&whole, at), None);
        }
        let moved = [&[0; 8], &whole[..]].concat();
        assert_eq!(
            parse(
                &moved,
                Position {
                    offset: 24,
                    ..LINK.at
                }
            ),
            None
        );
        assert_eq!(parse(&moved, LINK.at), None);
    }

    #[test]
    fn a_cut_record_is_none() {
        let whole = file(&sealed(b"hello"));
        for length in 0..whole.len() - 24 {
            assert_eq!(parse(&whole[..length], LINK.at), None, "{length} bytes");
        }
    }
}
