//! Checkpoints as fjall databases: one directory each, named by the newest entry
//! that it holds.
//!
//! A checkpoint is written once, in order, straight into tables that fjall syncs
//! when it finishes them; nothing of it goes through a journal, whose damage fjall
//! may not notice, nor through memory tables. What it does notice and what it does
//! not makes no difference to us: the records say whether they are whole.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ::fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use bytes::Bytes;

use super::{CheckpointStore, Slot};
use crate::ids::Index;

/// The only keyspace of a database. Keys are places in the row of records.
const RECORDS: &str = "records";
/// Where one is written, until it is durable and gets its name: so what is not
/// whole under its name is damaged, and no half-written one passes for that.
const UNFINISHED: &str = "unfinished";
/// It is read once, from beginning to end.
const CACHE_BYTES: u64 = 1 << 20;
/// The directory of [`Slot::Incoming`].
const INCOMING: &str = "incoming";

/// See the module. Clones are handles on the same directory.
#[derive(Clone, Debug)]
pub struct FjallCheckpoints {
    path: PathBuf,
    /// Those that are being read. A database can be opened once at a time, so all who
    /// read one share it.
    read: Arc<Mutex<BTreeMap<Slot, Shared>>>,
}

/// A database that is being read.
struct Shared {
    readings: usize,
    records: Keyspace,
    _database: Database,
}

impl fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shared = formatter.debug_struct("Shared");
        shared.field("readings", &self.readings).finish()
    }
}

/// While it is there, a checkpoint stays.
struct Reading<'a> {
    store: &'a FjallCheckpoints,
    slot: Slot,
}

impl Drop for Reading<'_> {
    /// The last one closes the database, before anybody could open it again.
    fn drop(&mut self) {
        let mut read = self.store.being_read();
        let Some(shared) = read.get_mut(&self.slot) else {
            return;
        };
        shared.readings -= 1;
        if shared.readings == 0 {
            read.remove(&self.slot);
        }
    }
}

impl FjallCheckpoints {
    /// The checkpoints in a directory, which is made if it is not there. The
    /// caller sees to it that no other process uses it.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => {
                made?;
                sync_directory(path.parent().unwrap_or_else(|| Path::new(".")))?;
            }
        }
        let read = Arc::default();
        Ok(Self { path, read })
    }

    fn directory(&self, slot: Slot) -> PathBuf {
        match slot {
            Slot::At(at) => self.path.join(format!("{at:020}")),
            Slot::Incoming => self.path.join(INCOMING),
        }
    }

    /// Begins to read a checkpoint.
    fn reading(&self, slot: Slot) -> io::Result<(Reading<'_>, Keyspace)> {
        let mut read = self.being_read();
        let shared = match read.entry(slot) {
            Entry::Occupied(shared) => shared.into_mut(),
            Entry::Vacant(place) => {
                let directory = self.directory(slot);
                // fjall would make it anew.
                fs::metadata(&directory)?;
                let (database, records) = open(&directory).map_err(plain)?;
                place.insert(Shared {
                    readings: 0,
                    records,
                    _database: database,
                })
            }
        };
        shared.readings += 1;
        let records = shared.records.clone();
        Ok((Reading { store: self, slot }, records))
    }

    fn being_read(&self) -> MutexGuard<'_, BTreeMap<Slot, Shared>> {
        // Nothing in here can stop half way.
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CheckpointStore for FjallCheckpoints {
    fn list(&self) -> io::Result<Vec<Index>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            let at = name.to_str().and_then(|name| name.parse().ok());
            if let Some(at) = at
                && name == *format!("{at:020}")
            {
                found.push(at);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn read(&self, slot: Slot, take: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<()> {
        // What is declared later goes first: the records, then the last handle on them.
        let (_reading, records) = self.reading(slot)?;
        for record in records.iter() {
            let value = record.value().map_err(plain)?;
            if !take(&value) {
                break;
            }
        }
        Ok(())
    }

    fn write(&mut self, slot: Slot, rows: &mut dyn Iterator<Item = Bytes>) -> io::Result<()> {
        self.remove(slot)?;
        let directory = self.path.join(UNFINISHED);
        remove_directory(&directory)?;
        DirBuilder::new().mode(0o700).create(&directory)?;
        let write = || {
            let (database, records) = open(&directory)?;
            let mut ingestion = records.start_ingestion()?;
            for (place, record) in (0u64..).zip(rows) {
                ingestion.write(place.to_be_bytes(), &record[..])?;
            }
            ingestion.finish()?;
            database.persist(PersistMode::SyncAll)
        };
        write().map_err(plain)?;
        sync_directories(&directory)?;
        fs::rename(&directory, self.directory(slot))?;
        sync_directory(&self.path)
    }

    fn adopt(&mut self, at: Index) -> io::Result<()> {
        self.remove(Slot::At(at))?;
        fs::rename(self.directory(Slot::Incoming), self.directory(Slot::At(at)))?;
        sync_directory(&self.path)
    }

    fn remove(&mut self, slot: Slot) -> io::Result<()> {
        let read = self.being_read();
        match read.contains_key(&slot) {
            true => Ok(()),
            false => remove_directory(&self.directory(slot)),
        }
    }
}

fn remove_directory(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn open(directory: &Path) -> ::fjall::Result<(Database, Keyspace)> {
    let database = Database::builder(directory)
        .cache_size(CACHE_BYTES)
        .worker_threads(1)
        .open()?;
    let records = database.keyspace(RECORDS, KeyspaceCreateOptions::default)?;
    Ok((database, records))
}

/// Makes durable which directories there are: fjall makes those of its keyspaces
/// after it has synced the one that they are in.
fn sync_directories(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_directories(&entry.path())?;
        }
    }
    sync_directory(path)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn plain(error: ::fjall::Error) -> io::Error {
    match error {
        ::fjall::Error::Io(error) => error,
        error => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::{self, Image},
        keyspace::{Picture, Record},
        session::Sessions,
        system::System,
    };

    const RECORDS: u32 = 20_000;

    /// A store in a directory that goes away with it.
    struct Scratch(FjallCheckpoints);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("conclave-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::remove_dir_all(&path).ok();
            Self(FjallCheckpoints::open(path).unwrap())
        }

        fn write(&mut self, at: Index) {
            self.0.write(at.into(), &mut records()).unwrap();
        }

        fn read(&self, at: Index) -> io::Result<Vec<Bytes>> {
            let mut read = Vec::new();
            self.0.read(at.into(), &mut |record| {
                read.push(Bytes::copy_from_slice(record));
                true
            })?;
            Ok(read)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0.path).ok();
        }
    }

    fn records() -> impl Iterator<Item = Bytes> {
        (0..RECORDS).map(|number| format!("record {number}").into())
    }

    #[test]
    fn records_are_read_back_in_order() {
        let mut store = Scratch::new("order");
        store.write(7);
        store.write(12);
        assert_eq!(store.0.list().unwrap(), [7, 12]);
        assert_eq!(store.read(7).unwrap(), records().collect::<Vec<_>>());
        let mut taken = 0;
        store
            .0
            .read(12.into(), &mut |_| {
                taken += 1;
                taken < 3
            })
            .unwrap();
        assert_eq!(taken, 3);
        store.0.remove(7.into()).unwrap();
        store.0.remove(7.into()).unwrap();
        assert_eq!(store.0.list().unwrap(), [12]);
        assert_eq!(store.read(7).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(store.0.list().unwrap(), [12]);
    }

    #[test]
    fn a_checkpoint_is_written_in_place_of_what_was_left_of_one() {
        let mut store = Scratch::new("again");
        store.0.write(7.into(), &mut records().take(5)).unwrap();
        store.write(7);
        assert_eq!(store.read(7).unwrap().len(), RECORDS as usize);
    }

    #[test]
    fn one_whose_writing_was_interrupted_is_not_listed() {
        let mut store = Scratch::new("interrupted");
        let mut rows = records().chain(std::iter::once_with(|| panic!("interrupted")));
        let write = std::panic::AssertUnwindSafe(|| store.0.write(7.into(), &mut rows));
        std::panic::catch_unwind(write).unwrap_err();
        assert_eq!(store.0.list().unwrap(), []);
        assert!(store.0.path.join(UNFINISHED).exists());
        store.write(8);
        assert_eq!(store.0.list().unwrap(), [8]);
        assert!(!store.0.path.join(UNFINISHED).exists());
        assert_eq!(store.read(8).unwrap().len(), RECORDS as usize);
    }

    #[test]
    fn one_that_is_being_read_can_be_read_by_others() {
        let mut store = Scratch::new("shared");
        store.write(7);
        let mut whole = 0;
        let read = |_: &[u8]| {
            whole += usize::from(
                store
                    .read(7)
                    .is_ok_and(|read| read.len() == RECORDS as usize),
            );
            whole < 2
        };
        store.0.read(7.into(), &mut { read }).unwrap();
        assert_eq!(whole, 2);
        assert_eq!(store.read(7).unwrap().len(), RECORDS as usize);
        assert!(store.0.being_read().is_empty());
        store.0.remove(7.into()).unwrap();
        assert_eq!(store.0.list().unwrap(), []);
    }

    #[test]
    fn long_records_are_kept() {
        let mut store = Scratch::new("long");
        let long = Bytes::from(vec![7; 3 << 20]);
        let mut row = [long.clone()].into_iter();
        store.0.write(1.into(), &mut row).unwrap();
        assert_eq!(store.read(1).unwrap(), [long]);
    }

    #[test]
    fn the_incoming_one_is_adopted_in_place_of_what_is_there() {
        let mut store = Scratch::new("incoming");
        store.0.write(7.into(), &mut records().take(5)).unwrap();
        store.0.write(Slot::Incoming, &mut records()).unwrap();
        assert_eq!(store.0.list().unwrap(), [7]);
        store.0.adopt(7).unwrap();
        assert_eq!(store.0.list().unwrap(), [7]);
        assert_eq!(store.read(7).unwrap().len(), RECORDS as usize);
        store.0.adopt(8).unwrap_err();
    }

    #[test]
    fn one_that_is_read_is_not_removed() {
        let mut store = Scratch::new("read");
        store.write(7);
        let mut handle = store.0.clone();
        let mut taken = 0;
        store
            .0
            .read(7.into(), &mut |_| {
                if taken == 0 {
                    handle.remove(7.into()).unwrap();
                }
                taken += 1;
                true
            })
            .unwrap();
        assert_eq!((taken, store.0.list().unwrap()), (RECORDS, vec![7]));
        handle.remove(7.into()).unwrap();
        assert_eq!(store.0.list().unwrap(), [0; 0]);
    }

    fn image() -> Image {
        let record = |number: u32| Record {
            key: format!("key {number:06}").into(),
            value: format!("value {number}").into(),
            create_revision: 2,
            mod_revision: 2,
            version: 1,
            lease: None,
        };
        let picture = Picture {
            live: (0..RECORDS).map(record).collect(),
            ..Picture::default()
        };
        Image {
            cluster: 1,
            applied: 7,
            term: 1,
            digest: 3,
            keyspace: picture,
            sessions: Sessions::default(),
            system: System::default(),
        }
    }

    /// What comes back is an error, or what was written; and nothing panics.
    #[test]
    fn damage_to_any_file_is_survived() {
        let mut store = Scratch::new("damage");
        store
            .0
            .write(7.into(), &mut image().into_records())
            .unwrap();
        let written = format!("{:?}", image());
        let mut files = Vec::new();
        files_below(&store.0.directory(7.into()), &mut files);
        assert!(files.len() > 4, "{files:?}");
        let whole: Vec<_> = files.iter().map(content).collect();
        for (file, bytes) in files.iter().zip(&whole) {
            for damaged in damages(bytes) {
                restore(&store.0.directory(7.into()), &files, &whole);
                match &damaged {
                    Some(damaged) => fs::write(file, damaged).unwrap(),
                    None => fs::remove_file(file).unwrap(),
                }
                if let Ok(read) = checkpoint::read(&store.0, 7) {
                    assert!(format!("{read:?}") == written, "{}", file.display());
                }
            }
        }
    }

    fn restore(directory: &Path, files: &[PathBuf], whole: &[Vec<u8>]) {
        fs::remove_dir_all(directory).unwrap();
        for (file, bytes) in files.iter().zip(whole) {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, bytes).unwrap();
        }
    }

    /// Without the zeros that a journal ends with: there are 64 MiB of them.
    fn content(file: &PathBuf) -> Vec<u8> {
        let mut bytes = fs::read(file).unwrap();
        let length = bytes.iter().rposition(|byte| *byte != 0);
        bytes.truncate(length.map_or(0, |last| last + 1));
        bytes
    }

    fn files_below(path: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files_below(&path, files);
            } else {
                files.push(path);
            }
        }
    }

    /// Flipped, zeroed, cut, missing.
    fn damages(bytes: &[u8]) -> impl Iterator<Item = Option<Vec<u8>>> {
        let length = bytes.len().min(1 << 20);
        let places = (0..length).step_by((length / 40).max(1));
        let flipped = places.map(move |place| {
            let mut flipped = bytes.to_vec();
            flipped[place] ^= 0xff;
            Some(flipped)
        });
        let cut = bytes[..bytes.len() / 2].to_vec();
        let zeroed = vec![0; bytes.len()];
        flipped.chain([Some(cut), Some(zeroed), None])
    }
}
