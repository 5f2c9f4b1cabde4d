//! Heap buffers that move into an operation and come back with its completion.
//!
//! A connection's headers and its read-ahead live here, as does anything else that is not a slot of
//! the arena. The buffer is page-aligned, so that O_DIRECT takes it as well.
//!
//! Not here: slots (`arena`). Allocation happens when a connection opens, never per operation.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ptr::NonNull;

/// Alignment of every buffer in bytes: enough for O_DIRECT on any device.
pub const BUFFER_ALIGN: usize = 4096;

/// Longest buffer in bytes, far above what a connection needs.
pub const BUFFER_BYTES_MAX: usize = 64 << 20;

/// A page-aligned buffer with one owner: the program, or the operation it was moved into.
pub struct OwnedBuf {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the allocation belongs to this value alone and is not tied to a thread.
unsafe impl Send for OwnedBuf {}

impl OwnedBuf {
    /// A buffer of `len` zero bytes, 1 to [`BUFFER_BYTES_MAX`].
    ///
    /// # Panics
    /// If `len` is outside that range: lengths come from the configuration, never from a peer.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size was checked not to be zero.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        Self { base, len }
    }

    fn layout(len: usize) -> Layout {
        assert!(
            (1..=BUFFER_BYTES_MAX).contains(&len),
            "a buffer of {len} bytes"
        );
        Layout::from_size_align(len, BUFFER_ALIGN).expect("a bounded length and a power of two")
    }

    /// Bytes in the buffer; never zero.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a buffer is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The content.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation has `len` initialised bytes and lives as long as `self`. The
        // kernel uses it only while an operation owns it, and then nobody can call this.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The content, to change.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; `&mut self` excludes other references.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// Address of bytes in the buffer, or nothing if they are not all within it.
    pub(super) fn address(&self, offset: usize, len: usize) -> Option<*mut u8> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: `offset` was just checked to lie within the allocation.
        Some(unsafe { self.base.as_ptr().add(offset) })
    }
}

impl Drop for OwnedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout, and owned by this value alone.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.len)) }
    }
}

impl fmt::Debug for OwnedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedBuf({} bytes)", self.len)
    }
}
