//! What a start makes of a directory, one situation each.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::error::Error;

use bytes::Bytes;
use conclave_core::{
    disk::{Disk, FileDisk, SimDisk},
    ids::NodeId,
    log::{
        Batch, EntryKind, Facts, HardState, Identity, Layout, Log, LogEntry, LogError, Recovered,
    },
};

const TINY: Layout = Layout {
    segment_bytes: 1_024,
    step_bytes: 256,
};

fn identity() -> Identity {
    Identity {
        cluster: 1,
        node: NodeId(3),
        incarnation: 9,
    }
}

fn facts() -> Facts {
    Facts {
        admitted: true,
        incarnations: [(NodeId(1), 11)].into(),
        voters: vec![NodeId(1), NodeId(3)],
    }
}

fn create(disk: &SimDisk) -> Log<SimDisk> {
    Log::create_with(disk.clone(), TINY, identity(), facts()).unwrap()
}

fn open(disk: &SimDisk) -> (Log<SimDisk>, Recovered) {
    Log::open_with(disk.clone(), TINY).unwrap().unwrap()
}

fn refusal(disk: &SimDisk) -> String {
    Log::open(disk.clone())
        .expect_err("this is refused")
        .to_string()
}

fn batch(index: u64, length: usize) -> Batch {
    Batch {
        entries: vec![LogEntry {
            index,
            term: 1,
            kind: EntryKind::Normal,
            data: Bytes::from(vec![b'x'; length]),
        }],
        ..Batch::default()
    }
}

/// Appends and syncs a batch for each index.
fn write(log: &mut Log<SimDisk>, indexes: std::ops::RangeInclusive<u64>) {
    for index in indexes {
        log.append(&batch(index, 100)).unwrap();
        log.sync().unwrap();
    }
}

fn segment(number: u64) -> String {
    format!("log-{number:020}")
}

#[test]
fn a_directory_without_a_log_says_so() {
    let mut disk = SimDisk::new();
    assert!(Log::open(disk.clone()).unwrap().is_none());
    disk.write("notes.txt", 0, b"not ours").unwrap();
    assert!(Log::open(disk.clone()).unwrap().is_none());
    let mut log = create(&disk);
    write(&mut log, 1..=1);
    assert_eq!(open(&disk).1.entries, batch(1, 100).entries);
    assert_eq!(disk.read("notes.txt").unwrap(), b"not ours");
}

#[test]
fn half_a_creation_is_no_log_and_is_replaced() {
    let mut disk = SimDisk::new();
    // Made, but nothing was written to it.
    disk.write(&segment(1), 0, &[0; 300]).unwrap();
    assert!(Log::open(disk.clone()).unwrap().is_none());
    create(&disk);
    assert_eq!(open(&disk).1.facts, facts());
}

#[test]
fn a_log_is_not_made_over_another() {
    let disk = SimDisk::new();
    create(&disk);
    let again = Log::create(disk.clone(), identity(), facts());
    assert!(matches!(again, Err(LogError::Exists)));
    open(&disk);
}

#[test]
fn a_new_log_is_attested_at_once() {
    let mut disk = SimDisk::new();
    let log = create(&disk);
    assert!(!log.wants_mark());
    disk.damage(&segment(1), |bytes| bytes[60] ^= 1);
    let message = refusal(&disk);
    assert!(message.contains("`log-00000000000000000001`"), "{message}");
    assert!(message.contains("restore this directory"), "{message}");
    assert!(message.contains("add the member again"), "{message}");
}

#[test]
fn the_newest_state_is_recovered() {
    let disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=9);
    let hard_state = HardState {
        term: 4,
        vote: 2,
        commit: 3,
    };
    let newer = Facts {
        voters: vec![NodeId(3)],
        ..facts()
    };
    let replacing = Batch {
        hard_state: Some(hard_state),
        facts: Some(newer.clone()),
        ..batch(4, 7)
    };
    log.append(&replacing).unwrap();
    log.sync().unwrap();
    assert!(disk.list().unwrap().len() > 1);
    drop(log);
    let (log, recovered) = open(&disk);
    let entries = [batch(1, 100), batch(2, 100), batch(3, 100), batch(4, 7)];
    let expected = Recovered {
        identity: identity(),
        hard_state,
        facts: newer,
        first: 1,
        entries: entries
            .into_iter()
            .flat_map(|batch| batch.entries)
            .collect(),
    };
    assert_eq!(recovered, expected);
    let lengths = disk.list().unwrap().into_iter();
    let lengths = lengths.map(|name| disk.read(&name).unwrap().len() as u64);
    assert_eq!(log.bytes(), lengths.sum::<u64>());
}

#[test]
fn a_mark_is_due_once_after_each_batch() {
    let disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=1);
    assert!(log.wants_mark());
    drop(log);
    let (mut log, _) = open(&disk);
    assert!(log.wants_mark());
    log.mark().unwrap();
    assert!(!log.wants_mark());
    log.append(&Batch::default()).unwrap();
    assert!(!log.wants_mark());
    drop(log);
    assert!(!open(&disk).0.wants_mark());
}

#[test]
fn a_mark_syncs_and_attests_what_was_appended() {
    let mut disk = SimDisk::new();
    let mut log = create(&disk);
    log.append(&batch(1, 100)).unwrap();
    log.mark().unwrap();
    disk.crash(&mut || false);
    assert_eq!(open(&disk).1.entries.len(), 1);
    disk.damage(&segment(1), |bytes| {
        let data = bytes.windows(100).position(|bytes| bytes == [b'x'; 100]);
        bytes[data.unwrap()] = b'y';
    });
    assert!(refusal(&disk).contains("durable"));
}

#[test]
fn a_torn_batch_is_dropped_for_good() {
    let mut disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=1);
    let before = disk.read(&segment(1)).unwrap();
    log.append(&batch(2, 500)).unwrap();
    let mut asked = 0;
    disk.crash(&mut || {
        asked += 1;
        asked != 2
    });
    let (_, recovered) = open(&disk);
    assert_eq!(recovered.entries.len(), 1);
    let after = disk.read(&segment(1)).unwrap();
    let (kept, cleared) = after.split_at(before.len());
    assert_eq!(kept, before);
    assert!(cleared.iter().all(|byte| *byte == 0));
}

#[test]
fn a_missing_segment_is_refused() {
    let mut disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=20);
    let mut gap = disk.fork();
    gap.remove(&segment(2)).unwrap();
    let message = refusal(&gap);
    assert!(message.contains(&segment(2)), "{message}");
    assert!(message.contains("missing"), "{message}");
    // Without the first it looks as if it had been cut: a checkpoint must hold
    // what is not there.
    let mut cut = disk.fork();
    cut.remove(&segment(1)).unwrap();
    assert!(open(&cut).1.first > 1);
    // A copy under the next number is no continuation.
    let count = disk.list().unwrap().len() as u64;
    let copied = disk.read(&segment(count)).unwrap();
    disk.write(&segment(count + 1), 0, &copied).unwrap();
    assert!(refusal(&disk).contains("copy"));
}

#[test]
fn names_that_are_almost_right_are_refused() {
    for name in [
        "log-1",
        "log-",
        "log-0000000000000000000x",
        "log-00000000000000000000",
        "log-000000000000000000001",
        "log-+0000000000000000001",
        "log-99999999999999999999",
        "log-00000000000000000001.bak",
    ] {
        let mut disk = SimDisk::new();
        create(&disk);
        disk.write(name, 0, b"").unwrap();
        assert!(refusal(&disk).contains(name));
    }
}

#[test]
fn a_batch_longer_than_a_segment_gets_its_own() {
    let disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=1);
    log.append(&batch(2, 5_000)).unwrap();
    log.append(&batch(3, 10)).unwrap();
    log.sync().unwrap();
    assert_eq!(disk.list().unwrap(), [segment(1), segment(2), segment(3)]);
    assert!(disk.read(&segment(2)).unwrap().len() > 5_000);
    assert_eq!(open(&disk).1.entries.len(), 3);
}

#[test]
fn segments_grow_in_steps_up_to_their_size() {
    let disk = SimDisk::new();
    let mut log = Log::create(disk.clone(), identity(), facts()).unwrap();
    let length = || disk.read(&segment(1)).unwrap().len();
    assert_eq!(length(), 1 << 20);
    log.append(&batch(1, 1 << 20)).unwrap();
    assert_eq!(length(), 2 << 20);
    for index in 2..=15 {
        log.append(&batch(index, 1 << 20)).unwrap();
    }
    log.sync().unwrap();
    assert_eq!((length(), log.bytes()), (16 << 20, 16 << 20));
    log.append(&batch(16, 1 << 20)).unwrap();
    assert_eq!((length(), log.bytes()), (16 << 20, 18 << 20));
}

#[test]
fn a_full_disk_is_named_and_nothing_is_lost() {
    let mut disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=3);
    disk.limit(Some(log.bytes()));
    let error = log.append(&batch(4, 2_000)).unwrap_err();
    assert!(matches!(error, LogError::Full { .. }));
    assert!(error.to_string().contains("the disk is full"), "{error}");
    assert!(error.source().is_some());
    assert!(matches!(log.sync(), Err(LogError::Poisoned)));
    drop(log);
    // A start needs no space.
    let (mut log, recovered) = open(&disk);
    assert_eq!(recovered.entries.len(), 3);
    disk.limit(None);
    write(&mut log, 4..=4);
}

#[test]
fn a_batch_that_makes_no_sense_is_refused_and_changes_nothing() {
    let disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=1);
    let before = disk.read(&segment(1)).unwrap();
    let refused = log.append(&batch(3, 1)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "refused to write a gap between two entries"
    );
    assert_eq!(disk.read(&segment(1)).unwrap(), before);
    write(&mut log, 2..=2);
    assert_eq!(open(&disk).1.entries.len(), 2);
}

#[test]
fn a_real_directory_is_opened_again() {
    let path = std::env::temp_dir().join(format!("conclave-log-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&path));
    let disk = || FileDisk::open(&path).unwrap();
    assert!(Log::open_with(disk(), TINY).unwrap().is_none());
    let mut log = Log::create_with(disk(), TINY, identity(), facts()).unwrap();
    for index in 1..=30 {
        log.append(&batch(index, 50)).unwrap();
        log.sync().unwrap();
        if index % 7 == 0 {
            drop(log);
            log = Log::open_with(disk(), TINY).unwrap().unwrap().0;
        }
    }
    drop(log);
    let (_, recovered) = Log::open_with(disk(), TINY).unwrap().unwrap();
    assert_eq!(recovered.entries.len(), 30);
    std::fs::remove_dir_all(&path).unwrap();
}

#[test]
fn a_log_is_cut_by_whole_segments_and_goes_on() {
    let disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=20);
    let segments = || disk.list().unwrap().len();
    let (before, bytes) = (segments(), log.bytes());
    assert!(!log.cut(0).unwrap());
    assert!(log.cut(10).unwrap());
    assert_eq!(segments(), before - 1);
    assert!(log.bytes() < bytes);
    while log.cut(10).unwrap() {}
    assert!(segments() < before - 1);
    write(&mut log, 21..=22);
    drop(log);
    let (mut log, recovered) = open(&disk);
    assert!((2..=11).contains(&recovered.first), "{}", recovered.first);
    let indexes: Vec<u64> = recovered.entries.iter().map(|e| e.index).collect();
    assert_eq!(indexes, (recovered.first..=22).collect::<Vec<_>>());
    // The newest segment stays, whatever is cut.
    while log.cut(u64::MAX).unwrap() {}
    write(&mut log, 23..=24);
    let (_, recovered) = open(&disk);
    assert_eq!(recovered.entries.last().unwrap().index, 24);
    assert_eq!(recovered.facts, facts());
}

#[test]
fn a_log_is_not_cut_behind_a_header_that_nothing_attests() {
    let disk = SimDisk::new();
    let mut log = create(&disk);
    let mut index = 0;
    // Until a segment was begun by a batch that is not synced yet.
    while disk.list().unwrap().len() < 2 {
        index += 1;
        log.append(&batch(index, 100)).unwrap();
    }
    assert!(!log.cut(index - 1).unwrap());
    log.sync().unwrap();
    assert!(log.cut(index - 1).unwrap());
    let mut damaged = disk.fork();
    damaged.damage(&segment(2), |bytes| bytes[60] ^= 1);
    refusal(&damaged);
}

#[test]
fn entries_that_replace_others_of_a_segment_that_was_cut_are_kept() {
    let disk = SimDisk::new();
    let mut log = create(&disk);
    write(&mut log, 1..=5);
    let mut index = 5;
    while disk.list().unwrap().len() < 2 {
        index += 1;
        write(&mut log, index..=index);
    }
    let replaced = index - 2;
    write(&mut log, replaced..=index + 1);
    assert!(log.cut(index - 1).unwrap());
    drop(log);
    let (_, recovered) = open(&disk);
    assert_eq!(recovered.first, replaced);
    assert_eq!(recovered.entries.last().unwrap().index, index + 1);
}

#[test]
fn a_newest_segment_that_is_gone_is_missed() {
    let whole = SimDisk::new();
    write(&mut create(&whole), 1..=10);
    let newest = whole.list().unwrap().pop().unwrap();
    assert!(newest > segment(2), "{newest}");
    let mut missing = whole.fork();
    missing.remove(&newest).unwrap();
    let message = refusal(&missing);
    assert!(message.contains(&newest), "{message}");
    for change in [
        (|bytes| bytes.fill(0)) as fn(&mut Vec<u8>),
        |bytes| bytes.clear(),
        |bytes| bytes[60] ^= 1,
    ] {
        let mut damaged = whole.fork();
        damaged.damage(&newest, change);
        let message = refusal(&damaged);
        assert!(message.contains(&newest), "{message}");
    }
}

/// But where a record crosses the end of a step: a crash leaves the same.
#[test]
fn a_segment_that_is_cut_inside_a_step_is_refused() {
    const STEPS: Layout = Layout {
        segment_bytes: 1 << 20,
        step_bytes: 2_048,
    };
    let whole = SimDisk::new();
    let mut log = Log::create_with(whole.clone(), STEPS, identity(), facts()).unwrap();
    write(&mut log, 1..=40);
    log.mark().unwrap();
    let length = whole.read(&segment(1)).unwrap().len() as u64;
    assert!(length > 3 * STEPS.step_bytes);
    // The one that crosses it, and the one that attests that.
    let records_bytes = 400;
    for cut in 1..length {
        let mut damaged = whole.fork();
        damaged.damage(&segment(1), |bytes| bytes.truncate(cut as usize));
        // With less than its first mark there is no log, which is for others to miss.
        let opened = Log::open(damaged);
        let refused = matches!(opened, Ok(None) | Err(LogError::Damaged { .. }));
        assert!(
            refused || cut % STEPS.step_bytes < records_bytes,
            "cut at {cut}: {opened:?}"
        );
    }
}

#[test]
fn what_closes_a_segment_is_written_again() {
    let mut disk = SimDisk::new();
    write(&mut create(&disk), 1..=10);
    let files = disk.list().unwrap();
    let [.., before, newest] = &files[..] else {
        panic!("{files:?}")
    };
    let closed = disk.read(before).unwrap();
    let at = closed.iter().rposition(|byte| *byte != 0).unwrap();
    disk.damage(before, |bytes| bytes[at] ^= 1);
    let (log, recovered) = open(&disk);
    assert_eq!(recovered.entries.len(), 10);
    drop(log);
    assert_eq!(disk.read(before).unwrap(), closed);
    disk.remove(newest).unwrap();
    refusal(&disk);
}

#[test]
fn a_log_of_one_header_is_half_a_creation_or_damaged() {
    let mut disk = SimDisk::new();
    drop(create(&disk));
    let header = disk.read(&segment(1)).unwrap();
    let body = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
    let end = (48 + body).next_multiple_of(8) + 8;
    disk.damage(&segment(1), |bytes| bytes[end..].fill(0));
    assert!(Log::open(disk.clone()).unwrap().is_none());
    create(&disk);

    write(&mut open(&disk).0, 1..=10);
    let (mut log, _) = open(&disk);
    log.mark().unwrap();
    while log.cut(10).unwrap() {}
    let newest = disk.list().unwrap().pop().unwrap();
    assert_eq!(disk.list().unwrap(), std::slice::from_ref(&newest));
    disk.damage(&newest, |bytes| bytes[end..].fill(0));
    let message = refusal(&disk);
    assert!(message.contains(&newest), "{message}");
}
