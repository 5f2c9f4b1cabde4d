//! A small sound volume with any bytes written over its metadata: an assessment always ends, and a
//! refused mount plans nothing.
#![no_main]

use std::sync::LazyLock;

use hn4::device::Device;
use hn4::format::{Identity, Params, format};
use hn4::mount::{self, Request};
use hn4::plan::{Faults, Op};
use hn4::profile::Profile;
use hn4::status::Conduct;
use hn4::superblock::{MAGIC, MAGIC_TAIL, Superblock};
use hn4::volume::Volume;
use libfuzzer_sys::fuzz_target;
use zerocopy::IntoBytes;

const CAPACITY: usize = 2 << 20;
const HEAD: usize = 280;

static VOLUME: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; CAPACITY];
    let params = Params {
        profile: Profile::Pico.id(),
        label: None,
        identity: Identity::Specific { lo: 1, hi: 2 },
        mount_intent_flags: 0,
        override_capacity_bytes: 0,
        root_perms_or: 0,
        now_ns: 1,
        conduct: Conduct::Corrected,
    };
    let device = Device::plain(CAPACITY as u64, 512);
    let plan = format(&bytes, device, &Faults::default(), &params).plan;
    for step in plan.steps {
        if let Op::Write { offset, data } = step.op {
            let at = offset as usize;
            data.copy_to(0, &mut bytes[at..at + data.len() as usize]);
        }
    }
    bytes
});

fuzz_target!(|input: &[u8]| {
    let mut bytes = VOLUME.clone();
    // The first input bytes are a superblock's fields, the others go to the metadata behind it.
    let (head, rest) = input.split_at(input.len().min(HEAD));
    let Some(mut superblock) = Superblock::from_bytes(&bytes) else { return };
    superblock.as_mut_bytes()[..head.len()].copy_from_slice(head);
    superblock.magic = MAGIC.into();
    superblock.magic_tail = MAGIC_TAIL.into();
    bytes[..8192].copy_from_slice(superblock.sealed().as_bytes());
    let length = rest.len().min(256 << 10);
    bytes[8192..8192 + length].copy_from_slice(&rest[..length]);

    let device = Device::plain(CAPACITY as u64, 512);
    for conduct in [Conduct::Corrected, Conduct::ReferenceCompatible] {
        let request = Request { now_ns: 5, conduct, ..Request::default() };
        let assessment = mount::assess(&bytes, device, &Faults::default(), &request);
        let refused = assessment.verdict.is_err() && conduct == Conduct::Corrected;
        assert!(!refused || assessment.plan.is_empty());
    }
    let Ok(volume) = Volume::open(&bytes, device, Conduct::Corrected) else { return };
    for (_, anchor) in volume.files().into_iter().take(8) {
        let _ = volume.read_block(&anchor, anchor.mass.get() % 7);
    }
    let _ = volume.which(input.len() as u64);
});
