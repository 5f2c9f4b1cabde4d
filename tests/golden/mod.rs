//! The reference's HN4 volumes with files, for tests: containers expanded into images, and what
//! their manifest says the files hold.
#![allow(
    dead_code,
    reason = "each test program is compiled with its own copy of this and uses a part of it"
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ring::digest::{SHA256, digest};
use serde_json::Value;

/// Where the golden data is, beside the project; `None` is told, and fails where it must be there.
pub(crate) fn folder() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/hn4");
    if folder.join("data/manifest.json").exists() {
        return Some(folder);
    }
    let required = std::env::var_os("HN4_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(
        !required,
        "../shared/hn4 is missing, and HN4_REQUIRE_TOOLS=1"
    );
    eprintln!("SKIPPED: ../shared/hn4 is missing");
    None
}

/// Bytes of an image that are not zero.
pub(crate) struct Extent {
    /// First byte.
    pub(crate) offset: u64,
    /// What is there.
    pub(crate) bytes: Vec<u8>,
}

/// A volume that the reference wrote.
pub(crate) struct Golden {
    /// Bytes.
    pub(crate) capacity: u64,
    /// All that is not zero, in the order of the container.
    pub(crate) extents: Vec<Extent>,
    case: Value,
}

/// A file on it.
pub(crate) struct Expected {
    /// Its name.
    pub(crate) name: String,
    /// Its seed as `ls` prints it.
    pub(crate) seed: String,
    /// Bytes in it.
    length: usize,
    /// What it holds; `None` where the manifest knows only hashes.
    bytes: Option<Vec<u8>>,
    /// Blocks that the reference could read, with the SHA-256 of their whole payload.
    hashes: Vec<(usize, String)>,
    payload: usize,
}

impl Expected {
    /// Compares what was read from the file with what the manifest says.
    pub(crate) fn check(&self, found: &[u8]) {
        assert_eq!(found.len(), self.length, "{}", self.name);
        if let Some(bytes) = &self.bytes {
            assert!(found == bytes, "{} holds other bytes", self.name);
        }
        assert!(
            self.bytes.is_some() || !self.hashes.is_empty(),
            "{}: nothing is known",
            self.name
        );
        for (n, hash) in &self.hashes {
            let from = n * self.payload;
            let mut block = found[from..found.len().min(from + self.payload)].to_vec();
            block.resize(self.payload, 0);
            let sha256 = hn4::num::hex(digest(&SHA256, &block).as_ref());
            assert_eq!(&sha256, hash, "{} block {n}", self.name);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn size(value: u64) -> usize {
    usize::try_from(value).expect("a golden image fits into memory")
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("a number, not {value}"))
}

/// The pattern that the manifest describes.
fn pattern(length: u64, k: u64) -> Vec<u8> {
    let byte = |i: u64| ((i * k) ^ (i >> 8)).to_le_bytes()[0];
    (0..length).map(byte).collect()
}

impl Golden {
    /// Reads a volume of the `data` folder.
    pub(crate) fn load(folder: &Path, name: &str) -> Self {
        let manifest = std::fs::read(folder.join("data/manifest.json")).expect("a manifest");
        let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
        let cases = manifest["images"].as_array().expect("a list");
        let case = cases
            .iter()
            .find(|case| case["name"] == name)
            .expect("the case")
            .clone();
        let file = folder.join(case["file"].as_str().expect("a path"));
        let packed = std::fs::read(&file).expect("a container");
        let all = zstd::decode_all(&packed[..]).expect("zstd");
        assert_eq!(&all[..8], b"HN4SPRS1", "{}", file.display());
        let count = size(word(&all, 16) & 0xFFFF_FFFF);
        let mut data_at = 24 + 24 * count;
        let mut extents = Vec::new();
        for entry in 0..count {
            let at = 24 + 24 * entry;
            let (offset, length) = (word(&all, at), size(word(&all, at + 8)));
            let bytes = if all[at + 16] == 0 {
                data_at += length;
                all[data_at - length..data_at].to_vec()
            } else {
                vec![all[at + 17]; length]
            };
            extents.push(Extent { offset, bytes });
        }
        assert_eq!(data_at, all.len(), "{}", file.display());
        Self {
            capacity: word(&all, 8),
            extents,
            case,
        }
    }

    /// Writes a sparse image file with those extents that are wanted.
    pub(crate) fn write(&self, path: &Path, wanted: impl Fn(usize) -> bool) {
        let file = File::create(path).expect("an image file");
        file.set_len(self.capacity).expect("its size");
        for (index, extent) in self
            .extents
            .iter()
            .enumerate()
            .filter(|(index, _)| wanted(*index))
        {
            file.write_all_at(&extent.bytes, extent.offset)
                .unwrap_or_else(|error| panic!("extent {index}: {error}"));
        }
    }

    /// The files, with what the reference was told to write into them.
    pub(crate) fn files(&self, block_bytes: u64) -> Vec<Expected> {
        let files = self.case["files"].as_array().expect("a list");
        files
            .iter()
            .map(|file| expected(file, block_bytes - 48))
            .collect()
    }
}

fn expected(file: &Value, payload: u64) -> Expected {
    let (lo, hi) = (number(&file["seed_lo"]), number(&file["seed_hi"]));
    let mut expected = Expected {
        name: file["name"].as_str().expect("a name").to_owned(),
        seed: format!("{hi:016x}{lo:016x}"),
        length: mass(file),
        bytes: None,
        hashes: hashes(file),
        payload: size(payload),
    };
    if !file["nano"].is_null() {
        let nano = &file["nano"];
        expected.bytes = Some(pattern(number(&nano["len"]), number(&nano["pattern_k"])));
        return expected;
    }
    let mut bytes = vec![0; expected.length];
    for write in file["writes"].as_array().expect("a list") {
        assert_eq!(write["result"], "SUCCESS", "{}", expected.name);
        if write["pattern_k"] == 0 {
            // Something that can be compressed, which no pattern is.
            return expected;
        }
        let at = size(number(&write["block"]) * payload);
        // A short write keeps what is behind it in its block.
        let block = pattern(number(&write["len"]), number(&write["pattern_k"]));
        let part = block.len().min(bytes.len() - at);
        bytes[at..at + part].copy_from_slice(&block[..part]);
    }
    expected.bytes = Some(bytes);
    expected
}

/// The file's length, from its anchor.
fn mass(file: &Value) -> usize {
    let anchor = file["anchor_hex"].as_str().expect("an anchor");
    let digits = |at: usize| u8::from_str_radix(&anchor[2 * at..2 * at + 2], 16);
    let bytes: Vec<u8> = (40..48)
        .map(|at| digits(at).expect("hexadecimal"))
        .collect();
    size(word(&bytes, 0))
}

fn hashes(file: &Value) -> Vec<(usize, String)> {
    let reads = file["reads"].as_array().expect("a list").iter();
    reads
        .filter(|read| read["result"] == "SUCCESS")
        .map(|read| {
            let hash = read["payload_sha256"].as_str().expect("a hash");
            (size(number(&read["block"])), hash.to_owned())
        })
        .collect()
}
