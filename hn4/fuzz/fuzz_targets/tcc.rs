//! Any bytes as a TCC stream: the output never grows beyond its block.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    for limit in [0, 464, 4048] {
        if let Ok(output) = hn4::tcc::decode(input, limit) {
            assert!(output.len() <= limit);
        }
    }
});
