//! What an arena must refuse, and what it must not lose.

use super::*;

fn both(check: impl Fn(&mut dyn SlotMemory)) {
    check(&mut Arena::new(4).expect("four pages can be mapped"));
    check(&mut VecArena::new(4));
}

#[test]
fn slots_are_handed_out_once_and_come_back() {
    both(|memory| {
        let slots: Vec<_> = std::iter::from_fn(|| memory.alloc()).collect();
        assert_eq!(slots, [SlotId(0), SlotId(1), SlotId(2), SlotId(3)]);
        assert_eq!(memory.free_slots(), 0);
        memory.free(SlotId(2));
        assert_eq!(memory.alloc(), Some(SlotId(2)));
        assert_eq!((memory.alloc(), memory.capacity()), (None, 4));
    });
}

#[test]
fn copies_move_exactly_the_named_bytes() {
    both(|memory| {
        let (one, two) = (memory.alloc().expect("free"), memory.alloc().expect("free"));
        memory.bytes_mut(one).fill(7);
        memory.bytes_mut(two).fill(1);
        memory.copy(one, 0..512, two, 1024);
        assert!(memory.bytes(two)[1024..1536].iter().all(|&byte| byte == 7));
        assert_eq!((memory.bytes(two)[1023], memory.bytes(two)[1536]), (1, 1));
        memory.copy(two, 1024..1536, two, 1280);
        assert!(memory.bytes(two)[1024..1792].iter().all(|&byte| byte == 7));
    });
}

#[test]
#[should_panic(expected = "slot 0 of 4 freed twice")]
fn a_slot_freed_twice_is_named() {
    let mut arena = Arena::new(4).expect("four pages can be mapped");
    let slot = arena.alloc().expect("free");
    arena.free(slot);
    arena.free(slot);
}

#[test]
#[should_panic(expected = "leave slot 1")]
fn a_copy_cannot_leave_its_slot() {
    let mut arena = Arena::new(4).expect("four pages can be mapped");
    let (one, two) = (arena.alloc().expect("free"), arena.alloc().expect("free"));
    arena.copy(one, 0..512, two, 3600);
}

#[test]
#[should_panic(expected = "slot 0 is looked at while the kernel writes to it")]
fn a_slot_the_kernel_writes_to_cannot_be_looked_at() {
    let mut arena = Arena::new(1).expect("a page can be mapped");
    let slot = arena.alloc().expect("free");
    arena.pin(slot, Access::KernelWrites);
    let _ = arena.bytes(slot);
}

#[test]
fn a_slot_the_kernel_reads_can_be_looked_at_but_not_changed() {
    let mut arena = Arena::new(1).expect("a page can be mapped");
    let slot = arena.alloc().expect("free");
    arena.pin(slot, Access::KernelReads);
    assert_eq!(arena.bytes(slot).len(), SLOT_BYTES);
    let change = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = arena.bytes_mut(slot);
    }));
    assert!(change.is_err());
    arena.unpin(slot, Access::KernelReads);
    arena.bytes_mut(slot).fill(1);
}

#[test]
fn a_slot_is_in_one_arena_at_a_time() {
    let mut owner = Arena::new(4).expect("four pages can be mapped");
    let mut other = owner.share();
    assert_eq!((other.alloc(), other.capacity()), (None, 4));
    let slots: Vec<_> = (0..2).filter_map(|_| owner.alloc()).collect();
    owner.bytes_mut(slots[1]).fill(7);
    let lent = owner.lend(slots.clone());
    assert_eq!((lent.len(), owner.free_slots()), (2, 2));
    let look = std::panic::AssertUnwindSafe(|| _ = owner.bytes(slots[1]));
    assert!(std::panic::catch_unwind(look).is_err(), "on its way");
    assert_eq!(other.borrow(lent), slots);
    assert!(other.bytes(slots[1]).iter().all(|&byte| byte == 7));
    // What it frees stays with it, until it is lent back.
    other.free(slots[0]);
    assert_eq!((other.free_slots(), owner.free_slots()), (1, 2));
    other.bytes_mut(slots[1]).fill(8);
    let back = other.lend(vec![slots[1]]);
    owner.borrow(back);
    drop(other);
    assert!(owner.bytes(slots[1]).iter().all(|&byte| byte == 8));
}

#[test]
#[should_panic(expected = "between arenas over the same memory")]
fn slots_of_other_memory_are_refused() {
    let mut one = Arena::new(1).expect("a page can be mapped");
    let mut other = Arena::new(1).expect("a page can be mapped");
    let slot = one.alloc().expect("free");
    let lent = one.lend(vec![slot]);
    other.borrow(lent);
}

#[test]
#[should_panic(expected = "slot 0 of 4 is allocated already")]
fn a_slot_that_is_allocated_here_cannot_come_from_elsewhere() {
    let mut arena = Arena::new(4).expect("four pages can be mapped");
    let slot = arena.alloc().expect("free");
    arena.borrow(Lent {
        slots: vec![slot],
        serial: arena.mapping.serial,
    });
}

#[test]
#[should_panic(expected = "slot 0 is lent while the kernel uses it")]
fn a_slot_the_kernel_uses_cannot_be_lent() {
    let mut arena = Arena::new(1).expect("a page can be mapped");
    let slot = arena.alloc().expect("free");
    arena.pin(slot, Access::KernelReads);
    let _lent = arena.lend(vec![slot]);
}

#[test]
fn an_arena_of_no_slots_is_refused() {
    assert!(Arena::new(0).is_err());
    assert!(Arena::new(SLOTS_MAX + 1).is_err());
}

#[test]
fn what_is_freed_in_a_view_comes_back_with_it() {
    let mut arena = Arena::new(2).expect("two pages can be mapped");
    let slots: Vec<_> = std::iter::from_fn(|| arena.alloc()).collect();
    arena.bytes_mut(slots[0]).fill(7);
    let (one, two) = (arena.view(slots.clone()), arena.view(vec![slots[0]]));
    assert_eq!((one.blocks().len(), arena.viewed()), (2, 3));
    arena.free(slots[0]);
    assert_eq!((arena.alloc(), arena.free_slots()), (None, 0));
    let looks = std::thread::spawn(move || {
        let first = one.blocks().next().expect("two");
        assert!(first.iter().all(|&byte| byte == 7));
    });
    looks.join().expect("it is as it was");
    assert!(!arena.take_back(), "the other view has it still");
    assert_eq!(arena.viewed(), 1);
    // The one that was not freed is as it was before.
    arena.bytes_mut(slots[1]).fill(1);
    drop(two);
    assert!(arena.take_back());
    assert_eq!((arena.alloc(), arena.viewed()), (Some(slots[0]), 0));
    assert!(!arena.take_back());
}

#[test]
fn a_view_is_given_back_after_its_arena_is_gone() {
    let mut arena = Arena::new(1).expect("a page can be mapped");
    let slot = arena.alloc().expect("free");
    arena.bytes_mut(slot).fill(7);
    let view = arena.view(vec![slot]);
    drop(arena);
    assert!(view.blocks().all(|block| block == &[7; SLOT_BYTES]));
}

#[test]
fn it_is_told_when_a_slot_comes_back_that_was_freed_in_a_view() {
    use std::sync::atomic::AtomicUsize;
    let mut arena = Arena::new(1).expect("a page can be mapped");
    let told = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&told);
    arena.notify_returns(Box::new(move || {
        _ = counter.fetch_add(1, Ordering::Relaxed)
    }));
    let told = || told.load(Ordering::Relaxed);
    let slot = arena.alloc().expect("free");
    drop(arena.view(vec![slot]));
    assert!(!arena.take_back() && told() == 0, "nobody waits for it");
    // Freed before it comes back, and after.
    let view = arena.view(vec![slot]);
    arena.free(slot);
    assert_eq!(told(), 0);
    drop(view);
    assert_eq!(told(), 1);
    assert!(arena.take_back());
    let slot = arena.alloc().expect("free");
    drop(arena.view(vec![slot]));
    arena.free(slot);
    assert_eq!(told(), 2);
    assert!(arena.take_back());
    assert_eq!(arena.alloc(), Some(slot));
}

#[test]
fn what_another_thread_looks_at_is_neither_changed_nor_lent_nor_freed_twice() {
    let mut arena = Arena::new(2).expect("two pages can be mapped");
    let (slot, other) = (arena.alloc().expect("free"), arena.alloc().expect("free"));
    let _view = arena.view(vec![slot]);
    let mut panics = |act: &dyn Fn(&mut Arena)| {
        let act = std::panic::AssertUnwindSafe(|| act(&mut arena));
        assert!(std::panic::catch_unwind(act).is_err());
    };
    panics(&|arena| _ = arena.bytes_mut(slot));
    panics(&|arena| arena.copy(other, 0..512, slot, 0));
    panics(&|arena| _ = arena.lend(vec![slot]));
    panics(&|arena| arena.pin(slot, Access::KernelWrites));
    arena.free(slot);
    let mut panics = |act: &dyn Fn(&mut Arena)| {
        let act = std::panic::AssertUnwindSafe(|| act(&mut arena));
        assert!(std::panic::catch_unwind(act).is_err());
    };
    panics(&|arena| arena.free(slot));
    panics(&|arena| _ = arena.bytes(slot));
    panics(&|arena| _ = arena.view(vec![slot]));
}
