//! Any bytes as a chronicle: both verifiers end, and the listing is bounded.
#![no_main]

use hn4::chronicle::{LinkKey, verify};
use hn4::device::Device;
use hn4::plan::{Faults, Medium};
use hn4::status::Conduct;
use hn4::superblock::Superblock;
use libfuzzer_sys::fuzz_target;

const SECTORS: u64 = 64;

fuzz_target!(|input: &[u8]| {
    let [head, sequence, log @ ..] = input else { return };
    let mut bytes = vec![0; 128 * 512];
    let length = log.len().min(32 * 512);
    bytes[16 * 512..16 * 512 + length].copy_from_slice(&log[..length]);
    let mut superblock = Superblock::zeroed();
    superblock.block_size = 512.into();
    superblock.total_capacity = (128 * 512).into();
    superblock.journal_start = 16.into();
    superblock.journal_ptr = u64::from(*head).into();
    superblock.last_journal_seq = u64::from(*sequence).into();
    let faults = Faults::default();
    let device = Device::plain(128 * 512, 512);
    for conduct in [Conduct::Corrected, Conduct::ReferenceCompatible] {
        let mut medium = Medium::new(&bytes, device, &faults);
        let mut trial = superblock;
        if let Ok(report) = verify::verify(&mut medium, &mut trial, conduct, &LinkKey::Public) {
            assert!(report.linked <= report.checked);
        }
        assert!(verify::list(&medium, &superblock, SECTORS).len() as u64 <= SECTORS);
    }
});
