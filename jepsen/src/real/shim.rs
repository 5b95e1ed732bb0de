//! The C library that stands between a server and its disk and clocks, and the
//! file through which it is told what to do.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

const SOURCE: &str = include_str!("shim.c");
/// Room for `struct control`.
const CONTROL_BYTES: u64 = 4096;

/// The fields of `struct control` in `shim.c`, eight bytes each.
#[derive(Clone, Copy, Debug)]
enum Field {
    Version,
    Anchor,
    Ahead,
    Rate,
    DateAhead,
    SyncMode,
    SyncDelay,
    DiskIsFull,
}

/// What the library counts, behind those fields.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Counter {
    SlowSyncs = 8,
    FailedSyncs,
    RefusedWrites,
    DriftedReads,
    ShiftedDates,
}

const SYNC_AS_USUAL: i64 = 0;
const SYNC_SLOW: i64 = 1;
const SYNC_FAILS: i64 = 2;

/// Makes the library; says why if that cannot be.
pub(crate) fn compile(directory: &Path) -> Result<PathBuf, String> {
    let source = directory.join("shim.c");
    let library = directory.join("shim.so");
    fs::write(&source, SOURCE).map_err(|error| format!("{}: {error}", source.display()))?;
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
        .args([&library, &source])
        .status()
        .map_err(|error| format!("no C compiler `cc`: {error}"))?;
    if status.success() {
        Ok(library)
    } else {
        Err(format!("{} does not compile here", source.display()))
    }
}

/// The control of one server's library.
#[derive(Debug)]
pub(crate) struct Shim {
    library: PathBuf,
    path: PathBuf,
    control: File,
    boot: BootClock,
}

/// How far the boot clock of the server is ahead of the true one: `ahead_ns` at
/// `anchor_ns`, and since then more by `rate_ppm`.
#[derive(Clone, Copy, Debug, Default)]
struct BootClock {
    anchor_ns: i64,
    ahead_ns: i64,
    rate_ppm: i64,
}

impl BootClock {
    /// The same clock, which from now on runs at another rate, without a step.
    fn at_rate(self, now_ns: i64, rate_ppm: i64) -> Self {
        let gained = (now_ns - self.anchor_ns) / 1_000_000 * self.rate_ppm;
        Self {
            anchor_ns: now_ns,
            ahead_ns: self.ahead_ns + gained,
            rate_ppm,
        }
    }
}

impl Shim {
    /// The library beside this control file, which is made.
    pub(crate) fn new(library: &Path, path: PathBuf) -> io::Result<Self> {
        let control = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)?;
        control.set_len(CONTROL_BYTES)?;
        let boot = BootClock::default().at_rate(boot_ns(), 0);
        Ok(Self {
            library: library.to_owned(),
            path,
            control,
            boot,
        })
    }

    /// Puts the library before a server.
    pub(crate) fn preload(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("SHIM_CONTROL", &self.path);
    }

    /// From now on every sync takes longer by this.
    pub(crate) fn slow_syncs(&self, delay: Duration) -> io::Result<()> {
        self.write(Field::SyncDelay, delay.as_millis() as i64)?;
        self.write(Field::SyncMode, SYNC_SLOW)
    }

    /// From now on every sync fails.
    pub(crate) fn fail_syncs(&self) -> io::Result<()> {
        self.write(Field::SyncMode, SYNC_FAILS)
    }

    /// From now on nothing can be written.
    pub(crate) fn fill_disk(&self) -> io::Result<()> {
        self.write(Field::DiskIsFull, 1)
    }

    /// The disk is as good as any.
    pub(crate) fn mend_disk(&self) -> io::Result<()> {
        self.write(Field::SyncMode, SYNC_AS_USUAL)?;
        self.write(Field::DiskIsFull, 0)
    }

    /// The date is wrong by this from now on.
    pub(crate) fn shift_date(&self, ahead_ms: i64) -> io::Result<()> {
        self.write(Field::DateAhead, ahead_ms * 1_000_000)
    }

    /// The clock of elapsed time runs faster by this from now on.
    pub(crate) fn drift(&mut self, rate_ppm: i64) -> io::Result<()> {
        self.boot = self.boot.at_rate(boot_ns(), rate_ppm);
        let version = self.read(Field::Version as u64)?;
        self.write(Field::Version, version + 1)?;
        self.write(Field::Anchor, self.boot.anchor_ns)?;
        self.write(Field::Ahead, self.boot.ahead_ns)?;
        self.write(Field::Rate, self.boot.rate_ppm)?;
        self.write(Field::Version, version + 2)
    }

    /// How often something happened.
    pub(crate) fn count(&self, counter: Counter) -> io::Result<i64> {
        self.read(counter as u64)
    }

    fn write(&self, field: Field, value: i64) -> io::Result<()> {
        self.control
            .write_all_at(&value.to_ne_bytes(), 8 * field as u64)
    }

    fn read(&self, place: u64) -> io::Result<i64> {
        let mut bytes = [0; 8];
        self.control.read_exact_at(&mut bytes, 8 * place)?;
        Ok(i64::from_ne_bytes(bytes))
    }
}

fn boot_ns() -> i64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_changes_its_rate_does_not_step() {
        let clock = BootClock::default().at_rate(1_000_000_000, 0);
        let fast = clock.at_rate(2_000_000_000, 50_000);
        assert_eq!(fast.ahead_ns, 0);
        let slow = fast.at_rate(3_000_000_000, -50_000);
        assert_eq!(slow.ahead_ns, 50_000_000);
        assert_eq!(slow.at_rate(4_000_000_000, 0).ahead_ns, 0);
    }
}
