//! Any 128 bytes as an anchor, any bytes as a block and as a nano sector.
#![no_main]

use hn4::address::hinted_orbit;
use hn4::anchor::{Anchor, probe_slots};
use hn4::status::Conduct;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some(anchor) = Anchor::from_bytes(input) else {
        return;
    };
    let rest = &input[128..];
    let _ = (
        anchor.name(),
        anchor.extension_lba(),
        anchor.is_live(),
        anchor.logical_blocks(464),
    );
    assert!(anchor.sealed().is_sound());
    assert!(hinted_orbit(anchor.orbit_hints.get(), anchor.mass.get()) <= 3);
    assert!(probe_slots(anchor.seed(), 100).all(|slot| slot < 100));
    for conduct in [Conduct::Corrected, Conduct::ReferenceCompatible] {
        if let Ok(payload) = hn4::block::open(rest, &anchor, 0, 0, conduct) {
            assert_eq!(payload.len(), rest.len() - 48);
        }
    }
    let _ = hn4::nano::open(rest, 7, anchor.seed(), 0);
    let (k, end) = (anchor.gravity_center.get(), 3 + anchor.mass.get() % 9999);
    let _ = hn4::nano::sector(7, anchor.seed(), k, 3, end);
});
