//! The files of a state tree that a daemon may be changing, opened without changing anything: what
//! opening them would write stays in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;

use hn4_proof::tree::ReadAt;
use hn4_proof::tree::keeper::TreeMedium;

/// See the module.
#[derive(Debug)]
pub(super) struct Shade {
    folder: PathBuf,
    manifest: Option<Vec<u8>>,
    runs: BTreeMap<u64, Rc<Vec<u8>>>,
}

impl Shade {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            manifest: None,
            runs: BTreeMap::new(),
        }
    }
}

/// A run that is there, or one that only this process has.
#[derive(Debug)]
pub(super) enum ShadeRun {
    There(File),
    Here(Rc<Vec<u8>>),
}

impl ReadAt for ShadeRun {
    fn len_bytes(&self) -> io::Result<u64> {
        match self {
            Self::There(file) => Ok(file.metadata()?.len()),
            Self::Here(bytes) => Ok(bytes.len() as u64),
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = match self {
            Self::There(file) => return file.read_exact_at(buffer, offset),
            Self::Here(bytes) => bytes,
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = bytes.get(start..start.saturating_add(buffer.len()));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A run that is being written.
#[derive(Debug)]
pub(super) struct ShadeSink {
    id: u64,
    bytes: Vec<u8>,
}

impl Write for ShadeSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TreeMedium for Shade {
    type Run = ShadeRun;
    type Sink = ShadeSink;

    fn manifest(&self) -> io::Result<Option<Vec<u8>>> {
        if self.manifest.is_some() {
            return Ok(self.manifest.clone());
        }
        match std::fs::read(self.folder.join("manifest")) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn replace_manifest(&mut self, bytes: Option<&[u8]>) -> io::Result<()> {
        self.manifest = bytes.map(<[u8]>::to_vec);
        Ok(())
    }

    fn create(&mut self, id: u64) -> io::Result<ShadeSink> {
        let bytes = Vec::new();
        Ok(ShadeSink { id, bytes })
    }

    fn seal(&mut self, sink: ShadeSink) -> io::Result<()> {
        self.runs.insert(sink.id, Rc::new(sink.bytes));
        Ok(())
    }

    fn open(&self, id: u64) -> io::Result<ShadeRun> {
        if let Some(bytes) = self.runs.get(&id) {
            return Ok(ShadeRun::Here(Rc::clone(bytes)));
        }
        let path = self.folder.join(format!("run-{id}"));
        File::open(path).map(ShadeRun::There)
    }

    fn remove(&mut self, id: u64) -> io::Result<()> {
        self.runs.remove(&id);
        Ok(())
    }

    fn ids(&self) -> io::Result<Vec<u64>> {
        // Whatever lies there and is not named is the daemon's to remove.
        Ok(self.runs.keys().copied().collect())
    }
}
