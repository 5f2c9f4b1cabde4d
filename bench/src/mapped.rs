//! A file's bytes where the page cache has them. `b3sum` comes by its bytes in this way, and what
//! is compared with it has to as well.
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZero;
use std::ops::Deref;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A file that is mapped to be read. Nobody may write to it or shorten it meanwhile: it is for
/// files of this program, in a folder that only its user can enter.
pub(crate) struct Mapped {
    start: NonNull<u8>,
    length: NonZero<usize>,
}

impl Mapped {
    /// Maps all of a file.
    ///
    /// # Errors
    /// If it is not there, is empty, or the kernel refuses.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("{}", path.display()))?;
        let length = usize::try_from(file.metadata()?.len())?;
        let length = NonZero::new(length).with_context(|| format!("{}: empty", path.display()))?;
        let (read, shared) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice replaces no other.
        let start = unsafe { mmap(None, length, read, shared, &file, 0) }
            .with_context(|| format!("mmap of {}", path.display()))?;
        Ok(Self {
            start: start.cast(),
            length,
        })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped until `self` is dropped, and nobody writes to the file.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length.get()) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this mapping is of `new`, and no slice of it outlives `self`.
        let done = unsafe { munmap(self.start.cast(), self.length.get()) };
        done.expect("a mapping of this program");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_has_the_bytes_of_its_file() {
        let folder = tempfile::tempdir_in(crate::test_folder()).expect("a folder");
        let path = folder.path().join("data");
        let data: Vec<u8> = (0..10_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        std::fs::write(&path, &data).expect("a file");
        assert_eq!(*Mapped::new(&path).expect("a mapping"), *data);
        std::fs::write(&path, "").expect("a file");
        let error = Mapped::new(&path).err().expect("nothing to map");
        assert!(error.to_string().ends_with("data: empty"), "{error}");
    }
}
