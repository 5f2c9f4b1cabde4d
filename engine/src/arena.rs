//! The memory that payload lives in: 4 KiB slots, named by [`SlotId`], allocated once.
//!
//! [`Arena`] is one anonymous mapping per shard. The shard's ring owns it, so the memory outlives
//! every operation that the kernel may still be working on, and the ring *pins* the slots of an
//! operation until its completion:
//!
//! - a slot the kernel writes to can be neither looked at, changed nor freed;
//! - a slot the kernel reads from can be looked at, but neither changed nor freed.
//!
//! A breach is a bug of the caller, not of its input, and panics with the name of the slot. That
//! turns "the kernel owns what was submitted" from a convention into a rule that holds, and it is
//! what makes the accessors here safe functions.
//!
//! Several threads can have a share of one mapping: [`Arena::share`] makes an arena over the same
//! memory that has no slots, and [`Arena::lend`] hands slots over, as a [`Lent`] that cannot be
//! copied. So at any time one arena at most has a slot, and none while it is on its way.
//!
//! [`Arena::view`] lets another thread look at slots. Until the [`View`] is dropped they cannot be
//! changed; those that are freed meanwhile are free when it has come back.
//!
//! [`VecArena`] is the same thing in plain memory, for simulation and tests.
//!
//! Not here: who refers to a slot and why (the overlay), registration with the kernel (`ring`).
#![expect(
    unsafe_code,
    reason = "the arena maps memory that the kernel also reads and writes"
)]

mod list;
mod plain;

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use self::list::FreeList;
pub use self::plain::VecArena;

/// Bytes in a slot: one block of the volume, and a page of the machine.
pub const SLOT_BYTES: usize = 4096;

/// Most slots in one arena: 1 TiB, far above what one shard is given, and small enough that no
/// offset computed here can overflow.
pub const SLOTS_MAX: u32 = 1 << 28;

/// Most threads that clear pages of a new arena: memory is no faster with more.
const POPULATE_THREADS: usize = 8;
/// Parts of different threads do not share one.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// A slot of one arena, `0..capacity`. It is a name, not a right: whoever holds it must know that
/// the slot is still allocated.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotId(pub u32);

impl SlotId {
    /// Position in tables indexed by slot.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the overlay needs of the memory below it.
///
/// All methods that take a [`SlotId`] panic if the slot is not allocated: that is a bug in the
/// bookkeeping above, and going on would hand one client's data to another.
pub trait SlotMemory {
    /// Takes a free slot; its content is whatever was left there. `None` when all are in use.
    fn alloc(&mut self) -> Option<SlotId>;
    /// Gives a slot back.
    fn free(&mut self, slot: SlotId);
    /// The slot's [`SLOT_BYTES`] bytes.
    fn bytes(&self, slot: SlotId) -> &[u8];
    /// The slot's [`SLOT_BYTES`] bytes, to change.
    fn bytes_mut(&mut self, slot: SlotId) -> &mut [u8];
    /// Copies `source_range` of one slot to `destination_offset` of another, or of the same.
    fn copy(
        &mut self,
        source: SlotId,
        source_range: Range<usize>,
        destination: SlotId,
        destination_offset: usize,
    );
    /// Slots that [`SlotMemory::alloc`] can still hand out.
    fn free_slots(&self) -> usize;
    /// All slots, free or not.
    fn capacity(&self) -> usize;
}

/// How many operations in the kernel use a slot, by direction.
#[derive(Clone, Copy, Default)]
struct Pins {
    /// Operations in which the kernel reads the slot (writes to a file, sends).
    kernel_reads: u16,
    /// Operations in which the kernel writes the slot (reads from a file, receives).
    kernel_writes: u16,
    /// Views that have it.
    views: u16,
}

impl Pins {
    fn count(&mut self, access: Access) -> &mut u16 {
        match access {
            Access::KernelReads => &mut self.kernel_reads,
            Access::KernelWrites => &mut self.kernel_writes,
        }
    }
}

/// Direction of an operation, seen from memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    /// The kernel only reads the memory.
    KernelReads,
    /// The kernel changes the memory.
    KernelWrites,
}

/// Anonymous memory for slots.
struct Mapping {
    base: NonNull<u8>,
    slots: u32,
    /// No other mapping has had it: addresses come again.
    serial: u64,
}

// SAFETY: a mapping is an address and a length; it is not tied to a thread. Whoever looks at the
// memory behind it has an arena and a slot of it, or a view.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing here changes before it is dropped.
unsafe impl Sync for Mapping {}

/// Slots on their way from one arena to another one over the same memory. Dropping it loses them.
#[derive(Debug)]
#[must_use]
pub struct Lent {
    slots: Vec<SlotId>,
    serial: u64,
}

impl Lent {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

/// Views that were dropped, on their way back.
///
/// The arena is notified only if it waits for a slot that was freed in a view. Whoever drops a view
/// says so and then looks whether it is awaited; the arena says that it waits and then looks what
/// is there: at least one of them sees the other.
#[derive(Default)]
struct Returns {
    slots: Mutex<Vec<SlotId>>,
    any: AtomicBool,
    awaited: AtomicBool,
    notify: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Returns {
    fn put(&self, slots: &mut Vec<SlotId>) {
        let mut returned = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        returned.append(slots);
        drop(returned);
        self.any.store(true, Ordering::SeqCst);
        if self.awaited.load(Ordering::SeqCst) {
            self.notify();
        }
    }

    fn await_some(&self) {
        self.awaited.store(true, Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst) {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(notify) = self.notify.get() {
            notify();
        }
    }

    fn take(&self) -> Vec<SlotId> {
        if !self.any.load(Ordering::Relaxed) || !self.any.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        let mut returned = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut returned)
    }
}

/// Slots that any thread can look at, and nobody can change. Dropping it gives them back.
pub struct View {
    mapping: Arc<Mapping>,
    slots: Vec<SlotId>,
    returns: Arc<Returns>,
}

impl View {
    /// What is in the slots, in the order in which they were named.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = &[u8; SLOT_BYTES]> {
        let base = self.mapping.base.cast::<[u8; SLOT_BYTES]>();
        // SAFETY: the slots lie within the mapping, which lives as long as `self`; anonymous memory
        // is initialised. Nobody changes them: the arena that made this counts it until it has
        // come back, and refuses to change such slots, to let the kernel change them, to lend them
        // or to hand them out again. When it is gone, nobody has them.
        let block = move |slot: &SlotId| unsafe { base.add(slot.index()).as_ref() };
        self.slots.iter().map(block)
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("View").field(&self.slots).finish()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.returns.put(&mut self.slots);
    }
}

/// The slots of one shard in one anonymous mapping, or a share of them.
pub struct Arena {
    mapping: Arc<Mapping>,
    pins: Box<[Pins]>,
    list: FreeList,
    returns: Arc<Returns>,
    /// Slots in views, as often as they are in one.
    viewed: usize,
    /// Slots that were freed in views.
    awaited: usize,
    /// Threads that make pages present.
    populating: Vec<JoinHandle<()>>,
}

impl Arena {
    /// Maps memory for `slots` slots, 1 to [`SLOTS_MAX`]. Pages are touched on first use.
    ///
    /// # Errors
    /// What `mmap` says, most often out of memory; `InvalidInput` for a wrong number of slots.
    pub fn new(slots: u32) -> io::Result<Self> {
        Self::map(slots)
    }

    /// Like [`Arena::new`], with every page in memory, so that the first writes to a slot are as
    /// fast as later ones.
    ///
    /// # Errors
    /// As for [`Arena::new`].
    pub fn new_populated(slots: u32) -> io::Result<Self> {
        let mut arena = Self::new_populating(slots)?;
        arena.join();
        Ok(arena)
    }

    /// Like [`Arena::new_populated`], but the pages are still being cleared by threads of their own
    /// when it returns: of a large arena that is most of a start, and there is other work to do.
    /// Whoever needs a page earlier gets it earlier.
    ///
    /// # Errors
    /// As for [`Arena::new`].
    pub fn new_populating(slots: u32) -> io::Result<Self> {
        let mut arena = Self::map(slots)?;
        arena.populate();
        Ok(arena)
    }

    /// What fails here fails again, and is told, where the memory is used.
    fn populate(&mut self) {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let part = self.len_bytes().div_ceil(threads.min(POPULATE_THREADS));
        let part = part.next_multiple_of(LARGE_PAGE_BYTES);
        let base = self.mapping.base.as_ptr().expose_provenance();
        let bytes = self.len_bytes();
        for from in (0..bytes).step_by(part) {
            let start = base + from;
            let length = part.min(bytes - from);
            let clear = move || {
                let start = std::ptr::with_exposed_provenance_mut(start);
                // SAFETY: a part of the mapping, which outlives this thread: `drop` joins it first.
                // What is there is not changed, it is only made present.
                let _ = unsafe { libc::madvise(start, length, libc::MADV_POPULATE_WRITE) };
            };
            let builder = std::thread::Builder::new().name("overlay".to_owned());
            // Without a thread the pages come when they are used.
            self.populating.extend(builder.spawn(clear));
        }
    }

    /// Waits until no thread clears pages any more.
    fn join(&mut self) {
        for thread in self.populating.drain(..) {
            let _nothing_to_tell = thread.join();
        }
    }

    fn map(slots: u32) -> io::Result<Self> {
        if slots == 0 || slots > SLOTS_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("an arena holds 1 to {SLOTS_MAX} slots of {SLOT_BYTES} bytes, not {slots}"),
            ));
        }
        let bytes = slots as usize * SLOT_BYTES;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no memory
        // that anybody uses; the result is checked before use.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| io::Error::other("the kernel mapped the arena at address zero"))?;
        // Registered pages would have to be copied for every child process, and children do not
        // need them. A refusal costs speed only.
        // SAFETY: exactly the range that was mapped above.
        let _ = unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_DONTFORK) };
        // Large pages where the kernel has them to give: fewer page faults when it is filled or
        // registered, fewer misses of the TLB when it is used. Never required (P9).
        // SAFETY: exactly the range that was mapped above.
        let _ = unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        static SERIALS: AtomicU64 = AtomicU64::new(0);
        let serial = SERIALS.fetch_add(1, Ordering::Relaxed);
        let mapping = Mapping {
            base,
            slots,
            serial,
        };
        Ok(Self::over(Arc::new(mapping), FreeList::new(slots)))
    }

    fn over(mapping: Arc<Mapping>, list: FreeList) -> Self {
        Self {
            pins: vec![Pins::default(); mapping.slots as usize].into_boxed_slice(),
            mapping,
            list,
            returns: Arc::default(),
            viewed: 0,
            awaited: 0,
            populating: Vec::new(),
        }
    }

    /// An arena over the same memory, for another thread. It has no slots but those that it is
    /// lent; what it frees it keeps.
    #[must_use]
    pub fn share(&self) -> Self {
        let list = FreeList::of_others(self.mapping.slots);
        Self::over(Arc::clone(&self.mapping), list)
    }

    /// Gives allocated slots away.
    ///
    /// # Panics
    /// If one is not allocated here, or the kernel uses it, or a view has it.
    pub fn lend(&mut self, slots: Vec<SlotId>) -> Lent {
        for &slot in &slots {
            self.list.assert_allocated(slot);
            self.assert_own(slot, "lent");
            self.list.clear(slot);
        }
        let serial = self.mapping.serial;
        Lent { slots, serial }
    }

    /// Takes slots over; they are allocated here, then.
    ///
    /// # Panics
    /// If they are of other memory, or one is allocated here.
    pub fn borrow(&mut self, lent: Lent) -> Vec<SlotId> {
        assert!(
            lent.serial == self.mapping.serial,
            "slots are lent between arenas over the same memory"
        );
        for &slot in &lent.slots {
            self.list.mark(slot);
        }
        lent.slots
    }

    /// Lets another thread look at allocated slots.
    ///
    /// # Panics
    /// If one is not allocated here, the kernel writes to it, or 65535 views have it already.
    pub fn view(&mut self, slots: Vec<SlotId>) -> View {
        for &slot in &slots {
            self.list.assert_allocated(slot);
            self.assert_readable(slot);
            let views = &mut self.pins[slot.index()].views;
            *views = views.checked_add(1).expect("fewer views than 65536");
        }
        self.viewed += slots.len();
        View {
            mapping: Arc::clone(&self.mapping),
            slots,
            returns: Arc::clone(&self.returns),
        }
    }

    /// How many slots are in views, each as often as it is in one.
    #[must_use]
    pub fn viewed(&self) -> usize {
        self.viewed
    }

    /// Is called when [`Self::take_back`] has something to free. The first one stays.
    pub fn notify_returns(&mut self, notify: Box<dyn Fn() + Send + Sync>) {
        let _kept = self.returns.notify.set(notify);
    }

    /// Takes back the views that were dropped. True if slots are free now that were freed before.
    pub fn take_back(&mut self) -> bool {
        let before = self.awaited;
        for slot in self.returns.take() {
            self.viewed -= 1;
            let views = &mut self.pins[slot.index()].views;
            *views -= 1;
            if *views == 0 && !self.list.is_allocated(slot) {
                self.list.free.push(slot);
                self.awaited -= 1;
            }
        }
        if before > 0 && self.awaited == 0 {
            self.returns.awaited.store(false, Ordering::SeqCst);
        }
        self.awaited < before
    }

    /// Slots that can still be allocated.
    #[must_use]
    pub fn free_count(&self) -> usize {
        self.list.free.len()
    }

    /// Length of the mapping in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.pins.len() * SLOT_BYTES
    }

    /// First byte of the mapping, for registration with the kernel.
    pub(crate) fn base(&self) -> *mut u8 {
        self.mapping.base.as_ptr()
    }

    /// Address of bytes within an allocated slot.
    ///
    /// # Panics
    /// If the bytes are not all within the slot, or the slot is not allocated.
    #[track_caller]
    pub(crate) fn address(&self, slot: SlotId, offset: usize, len: usize) -> *mut u8 {
        self.list.assert_allocated(slot);
        assert!(
            offset <= SLOT_BYTES && len <= SLOT_BYTES - offset,
            "bytes {offset}+{len} leave slot {}",
            slot.0
        );
        // SAFETY: the slot was just checked to lie within the mapping, the offset within the slot.
        unsafe { self.base().add(slot.index() * SLOT_BYTES + offset) }
    }

    /// Marks an allocated slot as used by an operation in the kernel.
    ///
    /// # Panics
    /// If the slot is not allocated, or part of 65535 operations already, or the kernel is to write
    /// to it and a view has it.
    #[track_caller]
    pub(crate) fn pin(&mut self, slot: SlotId, access: Access) {
        self.list.assert_allocated(slot);
        if access == Access::KernelWrites {
            self.assert_not_viewed(slot, "changed");
        }
        let count = self.pins[slot.index()].count(access);
        *count = count
            .checked_add(1)
            .expect("fewer operations in flight than 65536");
    }

    /// Undoes one [`Arena::pin`].
    pub(crate) fn unpin(&mut self, slot: SlotId, access: Access) {
        let count = self.pins[slot.index()].count(access);
        *count = count
            .checked_sub(1)
            .expect("a slot is unpinned as often as it was pinned");
    }

    #[track_caller]
    fn assert_readable(&self, slot: SlotId) {
        assert!(
            self.pins[slot.index()].kernel_writes == 0,
            "slot {} is looked at while the kernel writes to it",
            slot.0
        );
    }

    #[track_caller]
    fn assert_idle(&self, slot: SlotId, what: &str) {
        let pins = self.pins[slot.index()];
        assert!(
            pins.kernel_writes == 0 && pins.kernel_reads == 0,
            "slot {} is {what} while the kernel uses it",
            slot.0
        );
    }

    #[track_caller]
    fn assert_not_viewed(&self, slot: SlotId, what: &str) {
        assert!(
            self.pins[slot.index()].views == 0,
            "slot {} is {what} while another thread looks at it",
            slot.0
        );
    }

    #[track_caller]
    fn assert_own(&self, slot: SlotId, what: &str) {
        self.assert_idle(slot, what);
        self.assert_not_viewed(slot, what);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.join();
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let bytes = self.slots as usize * SLOT_BYTES;
        // SAFETY: the range was mapped by `map`, and the last arena and view over it are gone. No
        // operation in the kernel can refer to it: a ring owns its arena, and drops it after it has
        // reaped every operation. Threads that clear pages are joined by the arena. A failure could
        // only leak, so the result is of no use.
        let _ = unsafe { libc::munmap(self.base.as_ptr().cast(), bytes) };
    }
}

impl SlotMemory for Arena {
    fn alloc(&mut self) -> Option<SlotId> {
        self.list.alloc()
    }

    fn free(&mut self, slot: SlotId) {
        self.list.assert_freeable(slot);
        self.assert_idle(slot, "freed");
        if self.pins[slot.index()].views > 0 {
            // Nobody's, until it has come back.
            self.list.clear(slot);
            self.awaited += 1;
            return self.returns.await_some();
        }
        self.list.free(slot);
    }

    fn bytes(&self, slot: SlotId) -> &[u8] {
        self.list.assert_allocated(slot);
        self.assert_readable(slot);
        let start = self.address(slot, 0, SLOT_BYTES);
        // SAFETY: the slot lies in the mapping, which lives as long as `self`; anonymous memory is
        // initialised. Nobody changes it during the borrow: it is allocated here, hence in no other
        // arena; the program would need `&mut self`, and so would the ring to pin the slot and let
        // the kernel write to it.
        unsafe { std::slice::from_raw_parts(start, SLOT_BYTES) }
    }

    fn bytes_mut(&mut self, slot: SlotId) -> &mut [u8] {
        self.list.assert_allocated(slot);
        self.assert_own(slot, "changed");
        let start = self.address(slot, 0, SLOT_BYTES);
        // SAFETY: as for `bytes`; the exclusive borrow of `self` excludes other references, and the
        // absence of pins excludes the kernel and views.
        unsafe { std::slice::from_raw_parts_mut(start, SLOT_BYTES) }
    }

    fn copy(
        &mut self,
        source: SlotId,
        source_range: Range<usize>,
        destination: SlotId,
        destination_offset: usize,
    ) {
        self.list.assert_allocated(source);
        self.assert_readable(source);
        let len = source_range.len();
        let from = self.address(source, source_range.start, len);
        let to = self.address(destination, destination_offset, len);
        self.assert_own(destination, "changed");
        // SAFETY: both ranges were checked to lie within their slots, `copy` allows them to
        // overlap, `&mut self` excludes references, and the pins exclude the kernel.
        unsafe { std::ptr::copy(from, to, len) }
    }

    fn free_slots(&self) -> usize {
        self.list.free.len()
    }

    fn capacity(&self) -> usize {
        self.pins.len()
    }
}
