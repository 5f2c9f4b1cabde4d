//! CRC-32/ISO-HDLC, the only checksum HN4 uses (its documents say CRC32C; the disk says otherwise).
//!
//! Invariant: `crc32(0, b)` equals zlib's `crc32`, and `crc32(crc32(0, a), b)` is the checksum of
//! `a` followed by `b`. Not here: CRC-32C, which the delta log uses.
//= HN4_SPEC conventions

const POLYNOMIAL: u32 = 0xEDB8_8320;
const SLICES: usize = 8;

const TABLES: [[u32; 256]; SLICES] = build_tables();

// The check value of the algorithm, proven when the crate is compiled.
const _: () = assert!(tail_register(u32::MAX, b"123456789") == !0xCBF4_3926);

const fn build_tables() -> [[u32; 256]; SLICES] {
    let mut tables = [[0_u32; 256]; SLICES];
    let mut index = 0;
    let mut seed = 0_u32;
    while index < 256 {
        let mut value = seed;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 {
                (value >> 1) ^ POLYNOMIAL
            } else {
                value >> 1
            };
            bit += 1;
        }
        tables[0][index] = value;
        index += 1;
        seed += 1;
    }
    let mut slice = 1;
    while slice < SLICES {
        let mut index = 0;
        while index < 256 {
            let below = tables[slice - 1][index];
            tables[slice][index] = (below >> 8) ^ tables[0][(below & 0xFF) as usize];
            index += 1;
        }
        slice += 1;
    }
    tables
}

const fn tail_register(mut register: u32, bytes: &[u8]) -> u32 {
    let mut index = 0;
    while index < bytes.len() {
        let low = (register ^ bytes[index] as u32) & 0xFF;
        register = (register >> 8) ^ TABLES[0][low as usize];
        index += 1;
    }
    register
}

/// Checksum of `bytes` continued from `seed`: 0 starts a new one, a previous result chains.
#[must_use]
pub fn crc32(seed: u32, bytes: &[u8]) -> u32 {
    let mut register = !seed;
    let mut chunks = bytes.chunks_exact(SLICES);
    for chunk in &mut chunks {
        let mut word = [0_u8; SLICES];
        word.copy_from_slice(chunk);
        let word = u64::from_le_bytes(word) ^ u64::from(register);
        let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
        register = TABLES[7][usize::from(a)]
            ^ TABLES[6][usize::from(b)]
            ^ TABLES[5][usize::from(c)]
            ^ TABLES[4][usize::from(d)]
            ^ TABLES[3][usize::from(e)]
            ^ TABLES[2][usize::from(f)]
            ^ TABLES[1][usize::from(g)]
            ^ TABLES[0][usize::from(h)];
    }
    !tail_register(register, chunks.remainder())
}

/// What a host returns that never built its CRC tables (all zero): a constant for four or more
/// bytes. Used only to recognise and reject what such a host wrote (defect 10).
#[must_use]
pub fn crc32_of_broken_host(seed: u32, length: usize) -> u32 {
    match u32::try_from(length) {
        Ok(bytes @ 0..4) => !(!seed >> (8 * bytes)),
        _ => u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_single_bytes_give_the_same_checksum() {
        let bytes: Vec<u8> = (0..=255_u8).cycle().take(1000).collect();
        for length in [0, 1, 7, 8, 9, 63, 64, 1000] {
            let part = &bytes[..length];
            assert_eq!(
                crc32(0, part),
                !tail_register(u32::MAX, part),
                "length {length}"
            );
        }
    }

    #[test]
    fn checksums_chain() {
        let bytes = b"the quick brown fox jumps over the lazy dog";
        let (head, tail) = bytes.split_at(13);
        assert_eq!(crc32(crc32(0, head), tail), crc32(0, bytes));
    }
}
