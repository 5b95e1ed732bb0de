//! A disk in memory that can crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::Disk;

/// What a disk writes as a whole: a crash loses or keeps each sector apart.
const SECTOR_BYTES: usize = 512;

/// A disk in memory that can crash, fail, fill up and be damaged.
///
/// Clones are handles on the same disk, so that whoever gave one away can pull
/// the plug; [`SimDisk::fork`] makes a copy. Nothing here is random: what a
/// crash keeps is asked of the caller, always in the same order.
#[derive(Clone, Debug, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Debug, Default)]
struct State {
    files: BTreeMap<u64, Content>,
    /// The directory as programs see it: names and keys of `files`.
    names: BTreeMap<String, u64>,
    /// The directory as a crash may leave it.
    durable_names: BTreeMap<String, u64>,
    files_made: u64,
    capacity: Option<u64>,
    syncs_to_fail: u32,
    lies: bool,
    power: Power,
}

#[derive(Clone, Copy, Debug, Default)]
enum Power {
    #[default]
    On,
    /// Fails after so many more operations.
    OnFor(u64),
    Off,
}

/// A file: what programs see, and what is needed to undo it.
#[derive(Clone, Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    durable_length: usize,
    unsynced: BTreeMap<usize, Sector>,
}

/// A sector that was written since it was last durable.
#[derive(Clone, Debug)]
struct Sector {
    /// Its durable bytes; fewer than a sector where the file ended.
    durable: Vec<u8>,
    /// Whether a sync of it failed: the kernel then holds it to be clean, so that
    /// only another write makes a later sync care for it.
    given_up: bool,
}

impl SimDisk {
    /// An empty disk without a limit.
    pub fn new() -> Self {
        Self::default()
    }

    /// A copy that goes its own way.
    pub fn fork(&self) -> Self {
        let state = self.state().clone();
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Loses power and comes back: every unsynced sector, length and change of
    /// the directory is kept if `keep` says so, and lost otherwise. What is left
    /// is durable. Ends failures of syncs and of power that were ordered.
    pub fn crash(&mut self, keep: &mut dyn FnMut() -> bool) {
        let mut state = self.state();
        state.crash_directory(keep);
        for content in state.files.values_mut() {
            content.crash(keep);
        }
        state.power = Power::On;
        state.syncs_to_fail = 0;
    }

    /// Lets this many operations that change something succeed; the one after
    /// that fails halfway, and everything then fails until [`SimDisk::crash`].
    pub fn cut_power_after(&mut self, operations: u64) {
        self.state().power = Power::OnFor(operations);
    }

    /// Makes the next syncs, of files or of the directory, fail with EIO. What
    /// they were to sync is seen by programs but may be lost in a crash, even if
    /// a later sync succeeds, unless it is written again.
    pub fn fail_syncs(&mut self, count: u32) {
        self.state().syncs_to_fail = count;
    }

    /// Makes every sync from now on succeed without doing anything, as a disk
    /// does that lies. Proves that a test would notice.
    pub fn lie_about_syncs(&mut self) {
        self.state().lies = true;
    }

    /// Limits the length of all files together; a write beyond it is cut short
    /// with ENOSPC. `None` lifts the limit.
    pub fn limit(&mut self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// Changes the bytes of a file behind everyone's back, durably.
    ///
    /// # Panics
    ///
    /// If there is no file of that name.
    pub fn damage(&mut self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let content = state.named(name).expect("the file to damage exists");
        change(&mut content.bytes);
        content.unsynced.clear();
        content.durable_length = content.bytes.len();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock but `damage`, for a test to fail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let state = self.state();
        state.check_power()?;
        Ok(state.names.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut state = self.state();
        state.check_power()?;
        Ok(state.named(name)?.bytes.clone())
    }

    fn write(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state.check_power()?;
        let interrupted = state.spend_power();
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let room = state.room();
        let content = state.named_or_made(name);
        let longest = content.bytes.len().saturating_add(room);
        let fitting = longest.saturating_sub(offset).min(bytes.len());
        content.write(offset, &bytes[..fitting]);
        interrupted?;
        if fitting < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.spend_power()?;
        let fails = state.spend_failure();
        let lies = state.lies;
        let content = state.named(name)?;
        if fails.is_err() {
            content.give_up();
        } else if !lies {
            content.sync();
        }
        fails
    }

    fn sync_directory(&mut self) -> io::Result<()> {
        let mut state = self.state();
        state.spend_power()?;
        state.spend_failure()?;
        if !state.lies {
            state.durable_names = state.names.clone();
            state.forget_unnamed();
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.check_power()?;
        let interrupted = state.spend_power();
        state.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        interrupted
    }
}

impl State {
    fn named(&mut self, name: &str) -> io::Result<&mut Content> {
        let file = self.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.files.entry(*file).or_default())
    }

    fn named_or_made(&mut self, name: &str) -> &mut Content {
        if !self.names.contains_key(name) {
            self.files_made += 1;
            self.names.insert(name.to_owned(), self.files_made);
        }
        self.files.entry(self.names[name]).or_default()
    }

    /// By how many bytes files may still grow.
    fn room(&self) -> usize {
        let Some(capacity) = self.capacity else {
            return usize::MAX;
        };
        let lengths = self.names.values().filter_map(|file| self.files.get(file));
        let used: usize = lengths.map(|content| content.bytes.len()).sum();
        usize::try_from(capacity)
            .unwrap_or(usize::MAX)
            .saturating_sub(used)
    }

    fn check_power(&self) -> io::Result<()> {
        match self.power {
            Power::On | Power::OnFor(_) => Ok(()),
            Power::Off => Err(io::Error::other("the power is off")),
        }
    }

    fn spend_power(&mut self) -> io::Result<()> {
        if let Power::OnFor(operations) = self.power {
            self.power = match operations.checked_sub(1) {
                Some(left) => Power::OnFor(left),
                None => Power::Off,
            };
        }
        self.check_power()
    }

    fn spend_failure(&mut self) -> io::Result<()> {
        match self.syncs_to_fail.checked_sub(1) {
            None => Ok(()),
            Some(left) => {
                self.syncs_to_fail = left;
                Err(rustix::io::Errno::IO.into())
            }
        }
    }

    fn crash_directory(&mut self, keep: &mut dyn FnMut() -> bool) {
        let names: BTreeSet<_> = self.names.keys().chain(self.durable_names.keys()).collect();
        let mut left = BTreeMap::new();
        for name in names {
            let (old, new) = (self.durable_names.get(name), self.names.get(name));
            let file = match (old, new) {
                (old, new) if old == new => old,
                // A removal and a making: each is a change of its own.
                (Some(_), Some(_)) if keep() => new.filter(|_| keep()),
                (Some(_), Some(_)) => old,
                _ if keep() => new,
                _ => old,
            };
            if let Some(file) = file {
                left.insert(name.clone(), *file);
            }
        }
        self.names = left.clone();
        self.durable_names = left;
        self.forget_unnamed();
    }

    fn forget_unnamed(&mut self) {
        let named = self.names.values().chain(self.durable_names.values());
        let named: BTreeSet<u64> = named.copied().collect();
        self.files.retain(|file, _| named.contains(file));
    }
}

impl Content {
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        let length = self.bytes.len();
        for number in offset / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
            let from = (number * SECTOR_BYTES).min(length);
            let to = (from + SECTOR_BYTES).min(length);
            let sector = self.unsynced.entry(number).or_insert_with(|| Sector {
                durable: self.bytes[from..to].to_vec(),
                given_up: false,
            });
            sector.given_up = false;
        }
        self.bytes.resize(length.max(end), 0);
        self.bytes[offset..end].copy_from_slice(bytes);
    }

    fn sync(&mut self) {
        self.unsynced.retain(|_, sector| sector.given_up);
        self.durable_length = self.bytes.len();
    }

    fn give_up(&mut self) {
        for sector in self.unsynced.values_mut() {
            sector.given_up = true;
        }
    }

    fn crash(&mut self, keep: &mut dyn FnMut() -> bool) {
        for (number, sector) in std::mem::take(&mut self.unsynced) {
            if !keep() {
                let from = number * SECTOR_BYTES;
                let to = (from + SECTOR_BYTES).min(self.bytes.len());
                self.bytes[from..to].fill(0);
                self.bytes[from..from + sector.durable.len()].copy_from_slice(&sector.durable);
            }
        }
        // A file grows in several steps, and any of them may be the last.
        let mut length = self.bytes.len();
        while length > self.durable_length && !keep() {
            length = self.durable_length + (length - self.durable_length) / 2;
        }
        self.bytes.truncate(length);
        self.durable_length = length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl FnMut() -> bool {
        || true
    }

    fn nothing() -> impl FnMut() -> bool {
        || false
    }

    /// A disk with one durable file of three sectors of `a`.
    fn prepared() -> SimDisk {
        let mut disk = SimDisk::new();
        disk.write("f", 0, &[b'a'; 3 * SECTOR_BYTES]).unwrap();
        disk.sync("f").unwrap();
        disk.sync_directory().unwrap();
        disk
    }

    #[test]
    fn what_was_synced_survives() {
        let mut disk = prepared();
        disk.crash(&mut nothing());
        assert_eq!(disk.read("f").unwrap(), [b'a'; 3 * SECTOR_BYTES]);
    }

    #[test]
    fn each_unsynced_sector_is_kept_or_lost() {
        let mut disk = prepared();
        disk.write("f", 100, &[b'b'; 3 * SECTOR_BYTES]).unwrap();
        let mut asked = 0;
        // Sectors 0 to 3 are asked for in order, then the length.
        disk.crash(&mut || {
            asked += 1;
            asked % 2 == 1
        });
        let bytes = disk.read("f").unwrap();
        assert_eq!(bytes.len(), 3 * SECTOR_BYTES + 100);
        assert_eq!((bytes[99], bytes[100], bytes[511]), (b'a', b'b', b'b'));
        assert_eq!((bytes[512], bytes[1023]), (b'a', b'a'));
        assert_eq!((bytes[1024], bytes[1535]), (b'b', b'b'));
        assert_eq!(bytes[1536..], [0; 100]);
    }

    #[test]
    fn a_length_and_a_name_are_lost_unless_synced() {
        let mut disk = prepared();
        disk.write("f", 3 * SECTOR_BYTES as u64, b"more").unwrap();
        disk.write("g", 0, b"new").unwrap();
        disk.sync("g").unwrap();
        disk.crash(&mut nothing());
        assert_eq!(disk.read("f").unwrap().len(), 3 * SECTOR_BYTES);
        assert_eq!(disk.list().unwrap(), ["f"]);
    }

    #[test]
    fn a_removal_is_undone_unless_synced() {
        let mut disk = prepared();
        disk.remove("f").unwrap();
        disk.write("f", 0, b"another").unwrap();
        let mut other = disk.fork();
        disk.crash(&mut nothing());
        assert_eq!(disk.read("f").unwrap(), [b'a'; 3 * SECTOR_BYTES]);
        other.crash(&mut all());
        assert_eq!(other.read("f").unwrap(), b"another");
    }

    #[test]
    fn what_a_failed_sync_gave_up_needs_another_write() {
        let mut disk = prepared();
        disk.write("f", 0, b"b").unwrap();
        disk.fail_syncs(1);
        let error = disk.sync("f").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5));
        disk.sync("f").unwrap();
        assert_eq!(disk.read("f").unwrap()[0], b'b');
        let mut rewritten = disk.fork();
        disk.crash(&mut nothing());
        assert_eq!(disk.read("f").unwrap()[0], b'a');
        rewritten.write("f", 0, b"b").unwrap();
        rewritten.sync("f").unwrap();
        rewritten.crash(&mut nothing());
        assert_eq!(rewritten.read("f").unwrap()[0], b'b');
    }

    #[test]
    fn a_full_disk_writes_what_fits() {
        let mut disk = prepared();
        disk.limit(Some(3 * SECTOR_BYTES as u64 + 2));
        let error = disk.write("g", 0, b"abc").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.read("g").unwrap(), b"ab");
        disk.write("f", 0, b"over what is there").unwrap();
        disk.limit(None);
        disk.write("g", 0, b"abc").unwrap();
    }

    #[test]
    fn without_power_everything_fails_until_the_crash() {
        let mut disk = prepared();
        disk.cut_power_after(1);
        disk.write("f", 0, b"b").unwrap();
        disk.sync("f").unwrap_err();
        disk.write("f", 1, b"b").unwrap_err();
        disk.list().unwrap_err();
        disk.crash(&mut nothing());
        assert_eq!(disk.read("f").unwrap()[..2], *b"aa");
    }

    #[test]
    fn clones_share_and_forks_do_not() {
        let disk = prepared();
        let mut fork = disk.fork();
        disk.clone().damage("f", |bytes| bytes.truncate(1));
        assert_eq!(disk.read("f").unwrap(), b"a");
        assert_eq!(fork.read("f").unwrap().len(), 3 * SECTOR_BYTES);
        fork.remove("f").unwrap();
        assert_eq!(disk.list().unwrap(), ["f"]);
    }
}
