//! The ring's table of registered files.
//!
//! Files and sockets are registered with the kernel once, which saves taking a reference for every
//! operation. A [`FileId`] carries a generation, so the name of a closed connection can never
//! reach the connection that got its place.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use io_uring::Submitter;

/// A file or socket that belongs to one ring.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileId {
    index: u16,
    generation: u16,
}

impl FileId {
    /// Position in the kernel's table.
    pub(super) fn fixed(self) -> io_uring::types::Fixed {
        io_uring::types::Fixed(u32::from(self.index))
    }
}

struct Place {
    fd: Option<OwnedFd>,
    generation: u16,
    /// Operations of the caller on this file that have not completed.
    in_flight: u32,
    /// Slab index of the close that waits for them.
    close: Option<u32>,
}

pub(super) struct FileTable {
    places: Box<[Place]>,
    free: Vec<u16>,
}

impl FileTable {
    pub(super) fn new(places: u16) -> Self {
        Self {
            places: (0..places)
                .map(|_| Place {
                    fd: None,
                    generation: 0,
                    in_flight: 0,
                    close: None,
                })
                .collect(),
            free: (0..places).rev().collect(),
        }
    }

    /// Registers a file. `ENFILE` when the table is full, else what the kernel says.
    pub(super) fn add(&mut self, io: &Submitter<'_>, fd: OwnedFd) -> std::io::Result<FileId> {
        let index = *self
            .free
            .last()
            .ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENFILE))?;
        io.register_files_update(u32::from(index), &[fd.as_raw_fd()])?;
        self.free.pop();
        let place = &mut self.places[usize::from(index)];
        place.fd = Some(fd);
        Ok(FileId {
            index,
            generation: place.generation,
        })
    }

    fn place(&self, file: FileId) -> Option<&Place> {
        self.places
            .get(usize::from(file.index))
            .filter(|place| place.generation == file.generation && place.fd.is_some())
    }

    fn place_mut(&mut self, file: FileId) -> &mut Place {
        let place = &mut self.places[usize::from(file.index)];
        assert!(
            place.generation == file.generation,
            "{file:?} outlived its file"
        );
        place
    }

    pub(super) fn fd(&self, file: FileId) -> Option<BorrowedFd<'_>> {
        self.place(file)
            .and_then(|place| place.fd.as_ref())
            .map(AsFd::as_fd)
    }

    /// Whether operations may be started: the file is known and nobody is closing it.
    pub(super) fn is_open(&self, file: FileId) -> bool {
        self.place(file).is_some_and(|place| place.close.is_none())
    }

    pub(super) fn started(&mut self, file: FileId) {
        self.place_mut(file).in_flight += 1;
    }

    /// Counts an operation as done. Returns the close that waited for it, if it was the last.
    pub(super) fn finished(&mut self, file: FileId) -> Option<u32> {
        let place = self.place_mut(file);
        place.in_flight = place
            .in_flight
            .checked_sub(1)
            .expect("an operation finishes as often as it starts");
        if place.in_flight == 0 {
            place.close
        } else {
            None
        }
    }

    /// Refuses new operations from now on. True if none is in flight.
    pub(super) fn begin_close(&mut self, file: FileId, entry: u32) -> bool {
        let place = self.place_mut(file);
        place.close = Some(entry);
        place.in_flight == 0
    }

    /// Takes the file out of the table and closes it.
    pub(super) fn close(&mut self, io: &Submitter<'_>, file: FileId) -> std::io::Result<()> {
        let place = self.place_mut(file);
        assert!(
            place.in_flight == 0,
            "{file:?} is closed under its operations"
        );
        self.remove(io, file).map(drop)
    }

    /// Takes the file out of the table, open. `EBUSY` while operations need it, `EBADF` if it is
    /// not there.
    pub(super) fn take(&mut self, io: &Submitter<'_>, file: FileId) -> std::io::Result<OwnedFd> {
        let place = self.place(file).ok_or_else(not_there)?;
        if place.in_flight > 0 || place.close.is_some() {
            return Err(std::io::Error::from_raw_os_error(libc::EBUSY));
        }
        self.remove(io, file)
    }

    fn remove(&mut self, io: &Submitter<'_>, file: FileId) -> std::io::Result<OwnedFd> {
        let place = self.place_mut(file);
        let fd = place.fd.take().ok_or_else(not_there)?;
        place.close = None;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(file.index);
        io.register_files_update(u32::from(file.index), &[-1])?;
        Ok(fd)
    }
}

fn not_there() -> std::io::Error {
    std::io::Error::from_raw_os_error(libc::EBADF)
}
