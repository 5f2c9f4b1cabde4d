//! Any 8 KiB as a superblock: parsing, checking, layout texts and addresses never panic.
#![no_main]

use hn4::address::{Geometry, Path, Space};
use hn4::superblock::Superblock;
use hn4::superblock::copies;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut bytes = vec![0; 8192];
    let length = input.len().min(bytes.len());
    bytes[..length].copy_from_slice(&input[..length]);
    let Some(superblock) = Superblock::from_bytes(&bytes) else { return };
    for sector in [512, 4096] {
        let _ = superblock.check(sector, 0);
        let _ = superblock.sealed().check(sector, 0);
        let _ = hn4::tool::inspect::layout_text(&superblock, sector);
        let _ = hn4::reserve::reserved(&superblock, sector, false);
    }
    let block = u64::from(superblock.block_size.get());
    let capacity = superblock.total_capacity.get();
    assert!(copies::fitting(capacity, block, false, u64::MAX).count() <= 4);
    let geometry = Geometry::of(&superblock, 512);
    for m in [0, 5, 62] {
        let Some(space) = Space::new(&geometry, m) else { continue };
        let path = Path::new(space, superblock.uuid_lo.get(), superblock.uuid_hi.get());
        let _ = path.inverse(path.block(9, 3), 3, 100);
    }
});
