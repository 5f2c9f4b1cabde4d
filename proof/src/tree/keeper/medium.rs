//! What a keeper stands on: files of its own, and the volume's backing.

use std::io;

use super::super::ReadAt;

/// Where the files of one tree lie.
pub trait TreeMedium {
    /// A run that is open for reading.
    type Run: ReadAt + std::fmt::Debug;
    /// A run that is being written.
    type Sink: io::Write + std::fmt::Debug;

    /// The manifest, if there is one.
    ///
    /// # Errors
    /// What the medium says.
    fn manifest(&self) -> io::Result<Option<Vec<u8>>>;

    /// Replaces the manifest atomically and durably, and makes all sealed runs findable; `None`
    /// removes it.
    ///
    /// # Errors
    /// What the medium says.
    fn replace_manifest(&mut self, bytes: Option<&[u8]>) -> io::Result<()>;

    /// Begins a run, in place of any file of that id.
    ///
    /// # Errors
    /// What the medium says.
    fn create(&mut self, id: u64) -> io::Result<Self::Sink>;

    /// Makes the contents of a run durable.
    ///
    /// # Errors
    /// What the medium says.
    fn seal(&mut self, sink: Self::Sink) -> io::Result<()>;

    /// Opens a run.
    ///
    /// # Errors
    /// What the medium says.
    fn open(&self, id: u64) -> io::Result<Self::Run>;

    /// Deletes a run that the manifest does not name.
    ///
    /// # Errors
    /// What the medium says.
    fn remove(&mut self, id: u64) -> io::Result<()>;

    /// Ids of all runs that are there.
    ///
    /// # Errors
    /// What the medium says.
    fn ids(&self) -> io::Result<Vec<u64>>;
}

/// The volume's backing, for reading.
pub trait Device {
    /// Fills `buffer` from byte `offset`; both are multiples of 4096.
    ///
    /// # Errors
    /// What the medium says.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// The first byte at or behind `offset` that may hold data, a multiple of 4096; what lies
    /// between is a hole and reads as zeroes. The size of the device if nothing follows.
    ///
    /// # Errors
    /// What the medium says.
    fn next_data(&mut self, offset: u64) -> io::Result<u64>;

    /// The first byte behind `offset`, where data may lie, at which a hole begins, a multiple of
    /// 4096. Anything behind the end of the device if none follows, or it cannot be told.
    ///
    /// # Errors
    /// What the medium says.
    fn next_hole(&mut self, offset: u64) -> io::Result<u64>;
}
