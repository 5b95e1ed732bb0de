//! The real file system.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::Disk;

/// Locked for as long as a process uses the directory.
const LOCK: &str = "LOCK";

/// A directory of the real file system, held by one process at a time.
#[derive(Debug)]
pub struct FileDisk {
    path: PathBuf,
    directory: File,
    /// The file written last. Only one is kept open, so that the number of
    /// descriptors does not grow with the number of files.
    current: Option<Current>,
    /// Never read: the lock lasts as long as this is open.
    _lock: File,
}

#[derive(Debug)]
struct Current {
    name: String,
    file: File,
    unsynced: bool,
}

impl FileDisk {
    /// Opens a directory, and makes it if it is missing (mode 0700, parents too).
    ///
    /// Fails with [`io::ErrorKind::ResourceBusy`] if another `FileDisk`, of this
    /// or any other process, holds it.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        sync_parent(&path)?;
        let lock = lock(&path)?;
        let directory = File::open(&path)?;
        Ok(Self {
            path,
            directory,
            current: None,
            _lock: lock,
        })
    }

    /// Opens a directory that is there, for one who only looks. It makes nothing,
    /// not even the lock, and keeps all others out that would write.
    ///
    /// Fails with [`io::ErrorKind::ResourceBusy`] if another process uses it.
    pub fn open_to_read(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let directory = File::open(&path)?;
        let lock = match File::open(path.join(LOCK)) {
            Ok(lock) => held(lock.try_lock_shared(), lock, &path)?,
            // Nobody can use it: the lock is made before anything else is.
            Err(error) if error.kind() == io::ErrorKind::NotFound => directory.try_clone()?,
            Err(error) => return Err(error),
        };
        Ok(Self {
            path,
            directory,
            current: None,
            _lock: lock,
        })
    }

    /// The open file of that name, made if it is missing.
    fn open_file(&mut self, name: &str) -> io::Result<&mut Current> {
        if self.current.as_ref().is_none_or(|open| open.name != name) {
            // An error of writing back is told to the descriptors open at the
            // time, so none is closed before it was synced.
            if let Some(open) = self.current.take_if(|open| open.unsynced) {
                open.file.sync_data()?;
            }
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(self.path.join(name))?;
            self.current = Some(Current {
                name: name.to_owned(),
                file,
                unsynced: false,
            });
        }
        self.current
            .as_mut()
            .ok_or_else(|| io::Error::other("no file is open"))
    }
}

impl Disk for FileDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
                && name != LOCK
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path.join(name))
    }

    fn write(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let open = self.open_file(name)?;
        open.unsynced = true;
        open.file.write_all_at(bytes, offset)
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let open = self.open_file(name)?;
        open.file.sync_data()?;
        open.unsynced = false;
        Ok(())
    }

    fn sync_directory(&mut self) -> io::Result<()> {
        self.directory.sync_all()
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.current.take_if(|open| open.name == name);
        fs::remove_file(self.path.join(name))
    }
}

fn lock(path: &Path) -> io::Result<File> {
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path.join(LOCK))?;
    held(lock.try_lock(), lock, path)
}

/// The lock, if taking it succeeded.
fn held(taken: Result<(), TryLockError>, lock: File, path: &Path) -> io::Result<File> {
    match taken {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!(
                "the data directory `{}` is in use by another process",
                path.display()
            ),
        )),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Makes the directory's own name durable.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        None => return Ok(()),
        Some(parent) if parent.as_os_str() == OsStr::new("") => Path::new("."),
        Some(parent) => parent,
    };
    match File::open(parent) {
        Ok(parent) => parent.sync_all(),
        // One may be allowed to use a directory whose parent one may not read;
        // whoever made it then answers for its name.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A directory that is removed again, below the one cargo gives to tests.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("conclave-disk-{}-{name}", std::process::id()));
            drop(fs::remove_dir_all(&path));
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn writes_are_read_back_and_files_grow() {
        let scratch = Scratch::new("write");
        let mut disk = FileDisk::open(scratch.0.join("a/b")).unwrap();
        disk.write("one", 0, b"hello").unwrap();
        disk.write("two", 2, b"x").unwrap();
        disk.write("one", 8, b"!").unwrap();
        disk.sync("one").unwrap();
        disk.sync("two").unwrap();
        disk.sync_directory().unwrap();
        assert_eq!(disk.list().unwrap(), ["one", "two"]);
        assert_eq!(disk.read("one").unwrap(), b"hello\0\0\0!");
        assert_eq!(disk.read("two").unwrap(), b"\0\0x");
        disk.remove("one").unwrap();
        assert_eq!(disk.list().unwrap(), ["two"]);
        let kind = disk.read("one").unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::NotFound);
    }

    #[test]
    fn the_directory_is_private_and_held_by_one() {
        let scratch = Scratch::new("lock");
        let first = FileDisk::open(&scratch.0).unwrap();
        let mode = fs::metadata(&scratch.0).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let refused = FileDisk::open(&scratch.0).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        assert!(refused.to_string().contains("in use by another process"));
        drop(first);
        FileDisk::open(&scratch.0).unwrap();
    }

    #[test]
    fn whoever_only_looks_changes_nothing_and_keeps_others_out() {
        let scratch = Scratch::new("look");
        let missing = FileDisk::open_to_read(&scratch.0).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let mut writing = FileDisk::open(&scratch.0).unwrap();
        writing.write("a", 0, b"x").unwrap();
        let refused = FileDisk::open_to_read(&scratch.0).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        drop(writing);
        let looking = FileDisk::open_to_read(&scratch.0).unwrap();
        let beside = FileDisk::open_to_read(&scratch.0).unwrap();
        assert_eq!(beside.read("a").unwrap(), b"x");
        FileDisk::open(&scratch.0).unwrap_err();
        drop((looking, beside));
        fs::remove_file(scratch.0.join(LOCK)).unwrap();
        let looking = FileDisk::open_to_read(&scratch.0).unwrap();
        assert_eq!(looking.list().unwrap(), ["a"]);
        assert!(!scratch.0.join(LOCK).exists());
    }

    #[test]
    fn only_regular_files_but_the_lock_are_listed() {
        let scratch = Scratch::new("list");
        let mut disk = FileDisk::open(&scratch.0).unwrap();
        fs::create_dir(scratch.0.join("checkpoint")).unwrap();
        disk.write("b", 0, b"").unwrap();
        disk.write("a", 0, b"").unwrap();
        assert_eq!(disk.list().unwrap(), ["a", "b"]);
    }
}
