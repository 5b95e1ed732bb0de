//! The same requests to two servers: code, text and answer must be equal.
//!
//! The differences that are meant are in [`crate::differences`]. A case that fails is
//! made as short as it can be and still fail, and printed with its seed:
//!
//! ```sh
//! CONCLAVE_ETCD_SEED=4711 CONCLAVE_ETCD_CASES=1 cargo test -p conclave --test etcd differential
//! ```

use std::{
    collections::BTreeSet,
    env,
    fmt::Write as _,
    ops::Range,
    time::{Duration, Instant},
};

use conclave_proto::etcd::etcdserverpb::request_op::Request;

use crate::{
    differences::{After, KNOWN, Known, Seen},
    generate,
    reference::{Reference, installed, serving},
    side::{Answer, Side},
    step::{Step, script},
    support::{Cluster, PATIENCE},
};

/// Cases of a run, unless `CONCLAVE_ETCD_CASES` says how many.
const CASES: u64 = 1_000;

/// In which the reference has looked at every watch, also on a slow machine.
const PARKED: Duration = Duration::from_millis(300);
/// For how long a case is made shorter: each try may wait for what does not come.
const SHRINKING: Duration = Duration::from_secs(120);
/// After so many that fail, a run ends.
const FAILURES: usize = 12;

/// The reference, or who stands in for it, and the one that is compared with it.
struct Pair {
    theirs: Side,
    ours: Side,
    known: &'static [Known],
    /// How often each known difference occurred.
    occurred: Vec<u64>,
    requests: u64,
    /// Both leave a watch of the past alone for a while, as the reference does.
    both_park: bool,
    /// Prints every request and answer.
    trace: bool,
}

/// Where two servers differ.
#[derive(Debug)]
struct Difference {
    /// How many steps of the case it takes.
    steps: usize,
    theirs: String,
    ours: String,
}

impl Pair {
    async fn new(theirs: &str, ours: &str, known: &'static [Known]) -> Self {
        let mut sides = [
            Side::new(serving(theirs).await),
            Side::new(serving(ours).await),
        ];
        for side in &mut sides {
            // Room for revisions before the beginning of a case.
            for _ in 0..generate::HISTORY {
                side.begin().await;
            }
        }
        let [theirs, ours] = sides;
        Self {
            theirs,
            ours,
            known,
            occurred: vec![0; known.len()],
            requests: 0,
            both_park: false,
            trace: env::var_os("CONCLAVE_ETCD_TRACE").is_some(),
        }
    }

    /// Runs a case on both, until they differ in what nobody knows of.
    async fn run(&mut self, steps: &[Step]) -> Result<(), Difference> {
        tokio::join!(self.theirs.begin(), self.ours.begin());
        let result = self.run_steps(steps).await;
        tokio::join!(self.theirs.end(), self.ours.end());
        result
    }

    async fn run_steps(&mut self, steps: &[Step]) -> Result<(), Difference> {
        for (at, step) in steps.iter().enumerate() {
            let parts = |known: &Known| match known.seen {
                Seen::Beforehand(parts) => parts(&self.theirs, step),
                Seen::InAnswers(..) => false,
            };
            if let Some(known) = self.known.iter().position(parts) {
                self.occurred[known] += 1;
                return self.events(at).await.map(|_| ());
            }
            let after = if step.waits_for_events() {
                let ends_watches = match step {
                    Step::Compact(_) => true,
                    // Else they wait until the other side's events have come here, too.
                    Step::Cancel { .. } => self.both_park,
                    _ => false,
                };
                if ends_watches && self.theirs.may_be_parked() {
                    // The reference looks at watches of the past ten times a second:
                    // what ends them by then leaves them without their events.
                    tokio::time::sleep(PARKED).await;
                }
                self.events(at).await?
            } else {
                After::TheSame
            };
            if after == After::Apart || self.step(at + 1, step).await? == After::Apart {
                return Ok(());
            }
        }
        self.events(steps.len()).await.map(|_| ())
    }

    async fn step(&mut self, steps: usize, step: &Step) -> Result<After, Difference> {
        self.requests += 1;
        let (theirs, ours) = tokio::join!(self.theirs.perform(step), self.ours.perform(step));
        if self.trace {
            let request = script(std::slice::from_ref(step));
            told(&format!("{request}      {}", ours.0));
        }
        let (Answer(theirs), Answer(ours)) = (theirs, ours);
        let difference = Difference {
            steps,
            theirs,
            ours,
        };
        self.explained(Some(step), difference)
    }

    /// What a difference means, if it is one.
    fn explained(
        &mut self,
        step: Option<&Step>,
        difference: Difference,
    ) -> Result<After, Difference> {
        let Difference { theirs, ours, .. } = &difference;
        if theirs == ours {
            return Ok(After::TheSame);
        }
        for (known, occurred) in self.known.iter().zip(&mut self.occurred) {
            if let Seen::InAnswers(after, explains) = known.seen
                && explains(step, theirs, ours)
            {
                *occurred += 1;
                return Ok(after);
            }
        }
        Err(difference)
    }

    /// Waits until what has come on the watch streams is the same, which it need not
    /// be at once: a watch may be catching up.
    async fn events(&mut self, steps: usize) -> Result<After, Difference> {
        tokio::join!(self.theirs.fenced(), self.ours.fenced());
        let until = Instant::now() + PATIENCE / 10;
        loop {
            let (theirs, ours) = (self.theirs.arrived(), self.ours.arrived());
            if theirs == ours {
                return Ok(After::TheSame);
            }
            if Instant::now() > until {
                let difference = first_difference(steps, &theirs, &ours);
                return self.explained(None, difference);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The shortest case found that still fails, and how it does.
    async fn shrink(&mut self, mut steps: Vec<Step>, first: Difference) -> (Vec<Step>, Difference) {
        let until = Instant::now() + SHRINKING;
        steps.truncate(first.steps);
        let mut difference = first;
        let mut changed = true;
        while std::mem::take(&mut changed) {
            for candidate in simpler(&steps) {
                if Instant::now() > until {
                    break;
                }
                if let Err(still) = self.run(&candidate).await {
                    steps = candidate;
                    steps.truncate(still.steps);
                    difference = still;
                    changed = true;
                    break;
                }
            }
        }
        (steps, difference)
    }

    /// Runs the cases of these seeds; those that fail, for people to read. Of those
    /// that seem to fail alike only the first, and not more than `most`.
    async fn cases(&mut self, seeds: impl Iterator<Item = u64>, most: usize) -> Vec<Failed> {
        let (mut failed, mut kinds, mut short) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        for seed in seeds {
            let steps = generate::case(seed);
            if let Err(first) = self.run(&steps).await
                && kinds.insert(first.kind(&steps))
            {
                let (steps, difference) = self.shrink(steps, first).await;
                if !short.insert(difference.kind(&steps)) {
                    continue;
                }
                failed.push(Failed {
                    seed,
                    steps,
                    difference,
                });
                if failed.len() == most {
                    break;
                }
            }
        }
        failed
    }
}

/// The same case with one part less, in every way there is.
fn simpler(steps: &[Step]) -> Vec<Vec<Step>> {
    let mut candidates = Vec::new();
    for at in (0..steps.len()).rev() {
        let mut less = steps.to_vec();
        less.remove(at);
        let mut earlier = less.clone();
        earlier[at..].iter_mut().for_each(Step::earlier);
        candidates.extend([less, earlier]);
    }
    for (at, step) in steps.iter().enumerate() {
        for simple in step.simpler() {
            let mut less = steps.to_vec();
            less[at] = simple;
            candidates.push(less);
        }
    }
    candidates
}

impl Difference {
    /// What failures of one cause probably share.
    fn kind(&self, steps: &[Step]) -> String {
        const LONG: usize = 60;
        let words = |text: &str| -> String {
            let text = text.chars().filter(|c| !c.is_ascii_digit());
            text.take(LONG).collect()
        };
        let last = steps.get(self.steps.wrapping_sub(1)).map(Step::name);
        let last = last.unwrap_or_default();
        format!("{last} {} {}", words(&self.theirs), words(&self.ours))
    }
}

/// A case that fails, made short.
struct Failed {
    seed: u64,
    steps: Vec<Step>,
    difference: Difference,
}

impl Failed {
    fn told(&self) -> String {
        let mut text = format!("seed {} fails; the shortest case:\n", self.seed);
        text += &script(&self.steps);
        writeln!(text, "  the reference: {}", self.difference.theirs).unwrap();
        writeln!(text, "  the other:     {}", self.difference.ours).unwrap();
        text
    }
}

fn told_all(failed: &[Failed]) -> String {
    let told: Vec<_> = failed.iter().map(Failed::told).collect();
    told.join("\n")
}

fn first_difference(steps: usize, theirs: &[String], ours: &[String]) -> Difference {
    let nothing = "nothing more has come".to_owned();
    let longest = theirs.len().max(ours.len());
    let pairs = (0..longest).map(|at| {
        let theirs = theirs.get(at).unwrap_or(&nothing);
        (theirs, ours.get(at).unwrap_or(&nothing))
    });
    let mut differing = pairs.skip_while(|(theirs, ours)| theirs == ours);
    let (theirs, ours) = differing.next().unwrap();
    Difference {
        steps,
        theirs: theirs.clone(),
        ours: ours.clone(),
    }
}

#[expect(clippy::print_stderr, reason = "a test tells what it did")]
fn told(text: &str) {
    eprintln!("{text}");
}

fn setting(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| value.parse().unwrap())
}

/// How many cases, and the seed of the first.
fn seeds(usual: u64) -> Range<u64> {
    let first = setting("CONCLAVE_ETCD_SEED").unwrap_or(1);
    first..first + setting("CONCLAVE_ETCD_CASES").unwrap_or(usual)
}

/// The harness itself: a server does not differ from its like.
#[tokio::test]
async fn the_reference_equals_itself() {
    if !installed() {
        return;
    }
    let servers = [
        Reference::start("etcd-one", 1),
        Reference::start("etcd-other", 1),
    ];
    let [one, other] = servers.each_ref().map(|server| &server.endpoints()[0]);
    let mut pair = Pair::new(one, other, &[]).await;
    pair.both_park = true;
    let failed = pair.cases(seeds(CASES / 10), 1).await;
    assert!(failed.is_empty(), "{}", told_all(&failed));
    // A server that behaves otherwise is found out, with a short case.
    for (name, plant) in PLANTS {
        pair.ours.plant = Some(*plant);
        let failed = pair.cases(seeds(CASES), 1).await;
        assert!(!failed.is_empty(), "{name} is not found");
        let told = told_all(&failed);
        assert!(failed[0].steps.len() <= SHORT, "{name}: {told}");
        self::told(&format!("planted: {name}; {told}"));
    }
}

/// The shortest case for a planted difference has so many steps at most.
const SHORT: usize = 6;

/// Changes a request.
type Plant = fn(&mut Step);

/// Servers that misunderstand requests.
const PLANTS: &[(&str, Plant)] = &[
    ("forgets prev_kv", |step| {
        if let Step::Put(put) = step {
            put.prev_kv = false;
        }
    }),
    ("one more than the limit", |step| {
        if let Step::Range(range) = step
            && range.limit > 0
        {
            range.limit = range.limit.saturating_add(1);
        }
    }),
    ("reads the newest revision", |step| {
        if let Step::Range(range) = step
            && range.revision < 1000
        {
            range.revision = 0;
        }
    }),
    ("takes no lease from a put", |step| {
        if let Step::Put(put) = step {
            put.lease = 0;
        }
    }),
    ("compares one version too few", |step| {
        if let Step::Txn(txn) = step {
            for compare in &mut txn.compare {
                if compare.target == 0 {
                    compare.key = "elsewhere".into();
                }
            }
        }
    }),
    ("runs no nested failure", |step| {
        if let Step::Txn(txn) = step {
            for op in txn.success.iter_mut().chain(&mut txn.failure) {
                if let Some(Request::RequestTxn(nested)) = &mut op.request {
                    nested.failure.clear();
                }
            }
        }
    }),
    ("compacts one revision less", |step| {
        if let Step::Compact(compact) = step
            && compact.revision < 1000
        {
            compact.revision = compact.revision.saturating_sub(1);
        }
    }),
    ("sends no deletes", |step| {
        if let Step::Watch { create, .. } = step {
            create.filters.push(1);
        }
    }),
    ("unlocks another lease's key", |step| {
        if let Step::Unlock { lease, .. } = step {
            *lease = 4;
        }
    }),
    ("proclaims for anybody", |step| {
        if let Step::Proclaim { later, .. } = step {
            *later = 0;
        }
    }),
    ("deletes more of a range", |step| {
        if let Step::Delete(delete) = step
            && !delete.range_end.is_empty()
        {
            delete.range_end = "\0".into();
        }
    }),
];

/// Conclave answers as the reference does, but for what is known.
#[tokio::test]
async fn conclave_equals_the_reference() {
    if !installed() {
        return;
    }
    let reference = Reference::start("etcd-reference", 1);
    let cluster = Cluster::start("etcd-differential", 1);
    let ours = cluster.endpoints().remove(0);
    let mut pair = Pair::new(&reference.endpoints()[0], &ours, KNOWN).await;
    let seeds = seeds(CASES);
    let count = seeds.end - seeds.start;
    let failed = pair.cases(seeds, FAILURES).await;
    assert!(failed.is_empty(), "{}", told_all(&failed));
    told(&format!("{count} cases with {} requests", pair.requests));
    for (known, occurred) in KNOWN.iter().zip(&pair.occurred) {
        told(&format!(
            "known: {} ({occurred} times): {}",
            known.name, known.reason
        ));
        // A few cases need not have them all.
        assert!(
            count < CASES || *occurred > 0,
            "{} occurs no more",
            known.name
        );
    }
}
