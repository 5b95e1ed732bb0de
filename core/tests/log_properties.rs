//! The log against a naive model: whatever crashes, failures and damage happen to
//! its disk, nothing that was synced is lost, changed or silently missing.
//!
//! `PROPTEST_CASES` sets the number of cases of each property.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::collections::VecDeque;

use bytes::Bytes;
use conclave_core::{
    disk::{Disk, SimDisk},
    ids::NodeId,
    log::{
        Batch, EntryKind, Facts, HardState, Identity, Layout, Log, LogEntry, LogError, Recovered,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};

/// Enough to find a log that does not zero what was torn, the rarest of the
/// mistakes that were tried on this test; a few seconds.
const CASES: u32 = 10_000;

fn config() -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok();
    Config {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(CASES),
        failure_persistence: None,
        ..Config::default()
    }
}

/// What a batch is made of; the rest follows from what is in the log by then.
#[derive(Clone, Debug)]
struct Shape {
    /// How many entries are replaced, as far as they are not committed.
    back: u64,
    /// The lengths of the entries.
    entries: Vec<usize>,
    hard_state: bool,
    facts: bool,
}

/// What a crash keeps.
#[derive(Clone, Debug)]
struct Keep {
    seed: u64,
    /// Of 256 questions, about how many are answered with yes.
    share: u64,
}

const NOTHING: Keep = Keep { seed: 0, share: 0 };

impl Keep {
    fn answers(&self) -> impl FnMut() -> bool + use<> {
        let (mut state, share) = (self.seed, self.share);
        move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state >> 56 < share
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Append(Shape),
    /// Appends what was lost last once more, as a leader does that sends it again.
    Repeat,
    Sync,
    Mark,
    /// The process ends and starts again; the machine goes on.
    Restart,
    Crash(Keep),
    /// The power fails in the midst of an operation to come.
    CrashLater {
        operations: u64,
        keep: Keep,
    },
    /// A sync to come fails; then the process restarts, or the machine crashes.
    FailSync {
        machine_crashes: Option<Keep>,
    },
    /// There are only so many bytes left.
    Fill {
        left: u64,
    },
}

fn shapes() -> impl Strategy<Value = Shape> {
    let length = prop_oneof![6 => 0..80_usize, 2 => 80..900_usize, 1 => 900..5_000_usize];
    let entries = vec(length, 0..4);
    (0..4_u64, entries, any::<bool>(), prop::bool::weighted(0.2)).prop_map(
        |(back, entries, hard_state, facts)| Shape {
            back,
            entries,
            hard_state,
            facts,
        },
    )
}

fn keeps() -> impl Strategy<Value = Keep> {
    let share = prop_oneof![Just(0), Just(40), Just(128), Just(216), Just(256)];
    (any::<u64>(), share).prop_map(|(seed, share)| Keep { seed, share })
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => shapes().prop_map(Step::Append),
        4 => Just(Step::Repeat),
        8 => Just(Step::Sync),
        2 => Just(Step::Mark),
        2 => Just(Step::Restart),
        2 => keeps().prop_map(Step::Crash),
        2 => (0..12_u64, keeps())
            .prop_map(|(operations, keep)| Step::CrashLater { operations, keep }),
        1 => prop::option::of(keeps())
            .prop_map(|machine_crashes| Step::FailSync { machine_crashes }),
        1 => (0..3_000_u64).prop_map(|left| Step::Fill { left }),
    ]
}

/// Segments small enough that most cases roll a few times.
fn layouts() -> impl Strategy<Value = Layout> {
    (300..4_000_u64, 1..2_000_u64).prop_map(|(segment_bytes, step_bytes)| Layout {
        segment_bytes,
        step_bytes,
    })
}

/// A new directory: what the model starts with. Its facts are long, so that a
/// header can be torn.
fn founded() -> Recovered {
    Recovered {
        identity: Identity {
            cluster: 0xc1,
            node: NodeId(2),
            incarnation: 77,
        },
        hard_state: HardState::default(),
        facts: Facts {
            admitted: false,
            incarnations: (1..40).map(|node| (NodeId(node), node * 3)).collect(),
            voters: vec![NodeId(1), NodeId(2), NodeId(3)],
        },
        first: 1,
        entries: Vec::new(),
    }
}

/// The naive model: what a log holds after a batch.
fn apply(state: &Recovered, batch: &Batch) -> Recovered {
    let mut state = state.clone();
    for entry in &batch.entries {
        state.entries.retain(|earlier| earlier.index < entry.index);
        state.entries.push(entry.clone());
    }
    if let Some(hard_state) = batch.hard_state {
        state.hard_state = hard_state;
    }
    if let Some(facts) = &batch.facts {
        state.facts = facts.clone();
    }
    state
}

/// A batch of that shape which fits behind `state`, unlike any other stamp's.
fn batch(shape: &Shape, state: &Recovered, stamp: u64) -> Batch {
    let next = state.entries.len() as u64 + 1;
    let first = (next - shape.back.min(next - 1)).max(state.hard_state.commit + 1);
    let entry = |(index, length): (u64, &usize)| LogEntry {
        index,
        term: stamp,
        kind: match stamp % 5 {
            0 => EntryKind::Membership,
            _ => EntryKind::Normal,
        },
        data: Bytes::from(vec![stamp as u8; *length]),
    };
    let entries: Vec<_> = (first..).zip(&shape.entries).map(entry).collect();
    let last = entries.last().map_or(next - 1, |entry| entry.index);
    let facts = shape.facts.then(|| Facts {
        admitted: stamp.is_multiple_of(2),
        incarnations: [(NodeId(1), stamp)].into(),
        voters: vec![NodeId(stamp)],
    });
    let is_empty = entries.is_empty() && facts.is_none();
    let hard_state = (shape.hard_state || is_empty).then(|| HardState {
        term: stamp,
        vote: stamp % 4,
        commit: last.saturating_sub(stamp % 3).max(state.hard_state.commit),
    });
    Batch {
        hard_state,
        facts,
        entries,
    }
}

/// A log on a disk that fails, and what must be in it.
struct World {
    disk: SimDisk,
    layout: Layout,
    log: Option<Log<SimDisk>>,
    is_created: bool,
    /// The states that may be found: after everything that was synced, and after
    /// each batch since.
    states: Vec<Recovered>,
    /// The batches between these states.
    batches: VecDeque<Batch>,
    /// Those that the last restart did not find.
    lost: VecDeque<Batch>,
    stamp: u64,
    /// Whether a fault was ordered, so that the disk may fail.
    is_faulty: bool,
    /// What the machine keeps if it then crashes.
    crash: Option<Keep>,
}

impl World {
    fn new(layout: Layout) -> Self {
        Self {
            disk: SimDisk::new(),
            layout,
            log: None,
            is_created: false,
            states: vec![founded()],
            batches: VecDeque::new(),
            lost: VecDeque::new(),
            stamp: 0,
            is_faulty: false,
            crash: None,
        }
    }

    /// Runs the steps, then loses everything that is not durable.
    fn survives(mut self, steps: &[Step]) -> Result<(), TestCaseError> {
        self.restart()?;
        for step in steps {
            self.run(step)?;
        }
        self.crash(&NOTHING);
        self.restart()
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Append(shape) => {
                self.stamp += 1;
                self.lost.clear();
                return self.append(batch(shape, self.newest(), self.stamp));
            }
            Step::Repeat => {
                let lost = self.lost.pop_front();
                return lost.map_or(Ok(()), |batch| self.append(batch));
            }
            Step::Sync => return self.work(Log::sync),
            Step::Mark => return self.work(Log::mark),
            Step::Restart => return self.restart(),
            Step::Crash(keep) => {
                self.crash(keep);
                return self.restart();
            }
            Step::CrashLater { operations, keep } => {
                self.disk.cut_power_after(*operations);
                self.crash = Some(keep.clone());
            }
            Step::FailSync { machine_crashes } => {
                self.disk.fail_syncs(1);
                self.crash = self.crash.take().or_else(|| machine_crashes.clone());
            }
            Step::Fill { left } => {
                let files = files(&self.disk);
                let used: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
                self.disk.limit(Some(used as u64 + left));
            }
        }
        self.is_faulty = true;
        Ok(())
    }

    fn append(&mut self, batch: Batch) -> Result<(), TestCaseError> {
        self.states.push(apply(self.newest(), &batch));
        self.batches.push_back(batch.clone());
        let log = self.log.as_mut().expect("every step leaves a log");
        match log.append(&batch) {
            Ok(()) => {
                prop_assert!(log.wants_mark());
                Ok(())
            }
            Err(error) => self.recover_from(&error),
        }
    }

    fn work(
        &mut self,
        work: fn(&mut Log<SimDisk>) -> Result<(), LogError>,
    ) -> Result<(), TestCaseError> {
        let log = self.log.as_mut().expect("every step leaves a log");
        match work(log) {
            Ok(()) => {
                self.settle();
                Ok(())
            }
            Err(error) => self.recover_from(&error),
        }
    }

    fn newest(&self) -> &Recovered {
        self.states.last().expect("there is at least one state")
    }

    /// Everything written so far is durable.
    fn settle(&mut self) {
        self.states.drain(..self.states.len() - 1);
        self.batches.clear();
    }

    fn recover_from(&mut self, error: &LogError) -> Result<(), TestCaseError> {
        let log = self.log.as_mut().expect("it was the log that failed");
        for again in [log.sync(), log.mark(), log.append(&Batch::default())] {
            prop_assert!(matches!(again, Err(LogError::Poisoned)));
        }
        prop_assert!(!log.wants_mark());
        self.fail(error)?;
        self.restart()
    }

    /// The disk failed: only if it was to, and only with an error of the disk.
    fn fail(&mut self, error: &LogError) -> Result<(), TestCaseError> {
        prop_assert!(self.is_faulty, "failed without a reason: {error}");
        prop_assert!(
            matches!(error, LogError::Io { .. } | LogError::Full { .. }),
            "refused without damage: {error}"
        );
        if let Some(keep) = self.crash.take() {
            self.crash(&keep);
        }
        self.disk.fail_syncs(0);
        self.disk.limit(None);
        self.is_faulty = false;
        Ok(())
    }

    fn crash(&mut self, keep: &Keep) {
        self.log = None;
        self.disk.crash(&mut keep.answers());
        self.disk.limit(None);
        self.is_faulty = false;
        self.crash = None;
    }

    fn restart(&mut self) -> Result<(), TestCaseError> {
        self.log = None;
        let started = match self.start() {
            Ok(started) => started,
            Err(error) => {
                self.fail(&error)?;
                let again = self.start();
                again.map_err(|error| TestCaseError::fail(error.to_string()))?
            }
        };
        self.log = Some(started.0);
        match started.1 {
            Some(recovered) => self.check(recovered)?,
            None => prop_assert!(!self.is_created, "the log is gone"),
        }
        self.is_created = true;
        Ok(())
    }

    fn start(&self) -> Result<(Log<SimDisk>, Option<Recovered>), LogError> {
        if let Some((log, recovered)) = Log::open_with(self.disk.clone(), self.layout)? {
            return Ok((log, Some(recovered)));
        }
        let Recovered {
            identity, facts, ..
        } = founded();
        let log = Log::create_with(self.disk.clone(), self.layout, identity, facts)?;
        Ok((log, None))
    }

    fn check(&mut self, recovered: Recovered) -> Result<(), TestCaseError> {
        let kept = self.states.iter().position(|state| *state == recovered);
        prop_assert!(kept.is_some(), "{recovered:?} is none of {:?}", self.states);
        let lost = self.batches.drain(..).skip(kept.unwrap_or(0));
        if self.states.len() > 1 {
            self.lost = lost.collect();
        }
        if !self.is_faulty {
            // It is durable, and every further recovery finds the same.
            let mut disk = self.disk.fork();
            disk.crash(&mut NOTHING.answers());
            for _ in 0..2 {
                let again = Log::open_with(disk.clone(), self.layout);
                let again = again.map_err(|error| TestCaseError::fail(error.to_string()))?;
                let again = again.map(|(_, recovered)| recovered);
                prop_assert_eq!(again.as_ref(), Some(&recovered));
            }
        }
        self.states = vec![recovered];
        Ok(())
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_was_synced_survives_and_the_rest_is_a_prefix(
        layout in layouts(),
        steps in vec(steps(), 1..50),
    ) {
        World::new(layout).survives(&steps)?;
    }

    #[test]
    fn crashes_during_creation_leave_a_log_or_none(
        layout in layouts(),
        crashes in vec((0..12_u64, keeps()), 1..6),
    ) {
        let mut world = World::new(layout);
        for (operations, keep) in crashes {
            world.run(&Step::CrashLater { operations, keep })?;
            world.restart()?;
        }
        world.survives(&[])?;
    }

    #[test]
    fn damage_to_anything_attested_is_refused(
        shapes in vec(shapes(), 1..15),
        layout in layouts(),
        damages in vec(damages(), 1..3),
    ) {
        let (mut disk, states) = written(&shapes, layout);
        let (mut log, _) = Log::open_with(disk.clone(), layout).unwrap().unwrap();
        log.mark().unwrap();
        let whole = Attested::of(&disk);
        let mut damaged = whole.files.clone();
        for damage in &damages {
            damage.inflict(&mut damaged);
        }
        whole.keep_newest_record(&mut damaged);
        disk = on_disk(&damaged);
        match Log::open(disk.clone()) {
            Ok(opened) => {
                let recovered = opened.map(|(_, recovered)| recovered);
                let mut expected = states.last().cloned();
                let oldest = &whole.files[0].0;
                if damaged.iter().all(|(name, _)| name != oldest) {
                    // Then it says that a checkpoint must hold what is not there.
                    let first = recovered.as_ref().map_or(1, |recovered| recovered.first);
                    expected.iter_mut().for_each(|expected| {
                        expected.first = first;
                        expected.entries.retain(|entry| entry.index >= first);
                    });
                } else {
                    prop_assert!(whole.is_whole(&damaged), "damage was not noticed");
                }
                prop_assert_eq!(recovered, expected);
            }
            Err(error) => {
                let is_damaged = !whole.is_whole(&damaged) || whole.is_longer(&damaged);
                prop_assert!(is_damaged, "refused without damage: {error}");
                prop_assert!(is_refusal(&error), "{error}");
                prop_assert_eq!(files(&disk), damaged, "a refusal changes nothing");
            }
        }
    }

    #[test]
    fn damage_to_the_newest_batch_drops_it_or_is_refused(
        shapes in vec(shapes(), 1..15),
        layout in layouts(),
        at in any::<prop::sample::Index>(),
        length in 1..100_usize,
        mask in 1..=u8::MAX,
    ) {
        let (mut disk, states) = written(&shapes, layout);
        let whole = Attested::of(&disk);
        let newest = &whole.files[whole.files.len() - 1].0;
        disk.damage(newest, |bytes| {
            let from = whole.newest.start + at.index(whole.newest.len());
            let to = whole.newest.end.min(from + length);
            bytes[from..to].iter_mut().for_each(|byte| *byte ^= mask);
        });
        match Log::open(disk) {
            Ok(opened) => {
                let recovered = opened.map(|(_, recovered)| recovered);
                prop_assert_eq!(recovered.as_ref(), states.iter().nth_back(1));
            }
            Err(error) => prop_assert!(is_refusal(&error), "{error}"),
        }
    }
}

/// Shows that the model notices a disk that does not sync.
#[test]
fn a_disk_that_lies_is_found_out() {
    let mut runner = TestRunner::new(Config {
        max_shrink_iters: 0,
        ..config()
    });
    let cases = (layouts(), vec(steps(), 1..50));
    let outcome = runner.run(&cases, |(layout, steps)| {
        let mut world = World::new(layout);
        world.disk.lie_about_syncs();
        world.survives(&steps)
    });
    assert!(outcome.is_err(), "no case noticed");
}

fn is_refusal(error: &LogError) -> bool {
    matches!(error, LogError::Damaged { .. } | LogError::Corrupt { .. })
}

/// A log of such batches, each synced, and the states after each of them.
fn written(shapes: &[Shape], layout: Layout) -> (SimDisk, Vec<Recovered>) {
    let disk = SimDisk::new();
    let mut states = vec![founded()];
    let Recovered {
        identity, facts, ..
    } = founded();
    let mut log = Log::create_with(disk.clone(), layout, identity, facts).unwrap();
    for (shape, stamp) in shapes.iter().zip(1..) {
        let newest = &states[states.len() - 1];
        let batch = batch(shape, newest, stamp);
        let state = apply(newest, &batch);
        states.push(state);
        log.append(&batch).unwrap();
        log.sync().unwrap();
    }
    (disk, states)
}

type File = (String, Vec<u8>);
type Files = Vec<File>;

fn files(disk: &SimDisk) -> Files {
    let names = disk.list().unwrap_or_default().into_iter();
    names
        .filter_map(|name| disk.read(&name).ok().map(|bytes| (name, bytes)))
        .collect()
}

fn on_disk(files: &Files) -> SimDisk {
    let mut disk = SimDisk::new();
    for (name, bytes) in files {
        disk.write(name, 0, bytes).unwrap();
    }
    disk
}

/// A log as it was, and where its newest record lies in the newest segment:
/// everything in front of that is attested.
struct Attested {
    files: Files,
    newest: std::ops::Range<usize>,
}

impl Attested {
    fn of(disk: &SimDisk) -> Self {
        let files = files(disk);
        let newest = last_record(&files[files.len() - 1].1);
        Self { files, newest }
    }

    /// Undoes damage to the newest record: without it, nothing attests the rest.
    fn keep_newest_record(&self, damaged: &mut Files) {
        let (name, whole) = &self.files[self.files.len() - 1];
        let at = damaged.iter().position(|(damaged, _)| damaged == name);
        let mut bytes = at.map(|at| damaged.remove(at).1).unwrap_or_default();
        bytes.resize(bytes.len().max(self.newest.end), 0);
        bytes[self.newest.clone()].copy_from_slice(&whole[self.newest.clone()]);
        damaged.push((name.clone(), bytes));
    }

    /// Whether the newest segment was cut behind its records.
    fn is_longer(&self, damaged: &Files) -> bool {
        let newest = [&self.files, damaged].map(|files| files.last().map(|(_, b)| b.len()));
        newest[0] > newest[1]
    }

    fn is_whole(&self, damaged: &Files) -> bool {
        let newest = &self.files[self.files.len() - 1].0;
        let is_whole = |(old, new): (&File, &File)| {
            let end = if old.0 == *newest {
                self.newest.start
            } else {
                last_record(&old.1).end
            };
            old.0 == new.0 && new.1.get(..end) == Some(&old.1[..end])
        };
        self.files.len() == damaged.len() && self.files.iter().zip(damaged).all(is_whole)
    }
}

/// Where the last record of a segment lies, by the lengths of the records alone. What
/// closes a segment is not counted: it says nothing that the next one does not.
fn last_record(segment: &[u8]) -> std::ops::Range<usize> {
    let mut last = 0..0;
    let word = |at: usize| u64::from_le_bytes(segment[at..at + 8].try_into().unwrap());
    let closes = |at: usize| word(at + 32) > word(at + 8);
    while segment.get(last.end..last.end + 4) == Some(b"CLog") && !closes(last.end) {
        let length = segment[last.end + 4..last.end + 8].try_into().unwrap();
        let length = u32::from_le_bytes(length) as usize;
        last = last.end..last.end + (48 + length).next_multiple_of(8) + 8;
    }
    last
}

/// Damage to a disk. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Damage {
    Flip { at: usize, bit: u8 },
    Overwrite { at: usize, length: usize, with: u8 },
    Cut { file: usize, at: usize },
    Remove { file: usize },
    Swap { one: usize, other: usize },
    Replace { file: usize, by: usize },
}

fn damages() -> impl Strategy<Value = Damage> {
    let number = any::<usize>;
    let with = prop_oneof![Just(0), any::<u8>()];
    prop_oneof![
        6 => (number(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        6 => (number(), 1..2_000_usize, with)
            .prop_map(|(at, length, with)| Damage::Overwrite { at, length, with }),
        2 => (number(), number()).prop_map(|(file, at)| Damage::Cut { file, at }),
        1 => number().prop_map(|file| Damage::Remove { file }),
        1 => (number(), number()).prop_map(|(one, other)| Damage::Swap { one, other }),
        1 => (number(), number()).prop_map(|(file, by)| Damage::Replace { file, by }),
    ]
}

impl Damage {
    fn inflict(&self, files: &mut Files) {
        let count = files.len();
        let total: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
        let total = total.max(1);
        let bytes = files.iter_mut().flat_map(|(_, bytes)| bytes);
        match *self {
            Self::Flip { at, bit } => {
                bytes
                    .skip(at % total)
                    .take(1)
                    .for_each(|byte| *byte ^= 1 << bit);
            }
            Self::Overwrite { at, length, with } => {
                bytes
                    .skip(at % total)
                    .take(length)
                    .for_each(|byte| *byte = with);
            }
            Self::Cut { file, at } => {
                let bytes = &mut files[file % count].1;
                bytes.truncate(at % (bytes.len() + 1));
            }
            Self::Remove { file } if count > 1 => drop(files.remove(file % count)),
            Self::Remove { .. } => {}
            Self::Swap { one, other } => {
                let (one, other) = (one % count, other % count);
                let bytes = files[one].1.clone();
                files[one].1 = std::mem::replace(&mut files[other].1, bytes);
            }
            Self::Replace { file, by } => {
                files[file % count].1 = files[by % count].1.clone();
            }
        }
    }
}
