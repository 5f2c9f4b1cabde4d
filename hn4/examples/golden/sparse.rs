//! Sparse images in memory: terabytes of zeroes cost nothing. Reads golden containers, applies
//! plans, and hashes content the way the golden manifests do.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow_lite::{Context, Result, bail};
use hn4::device::ReadAt;
use hn4::num::index;
use hn4::plan::{Op, Plan};
use sha2::{Digest, Sha256};

use crate::anyhow_lite;

const PAGE: u64 = 4096;

#[derive(Clone)]
enum Content {
    Bytes { all: Arc<Vec<u8>>, from: usize },
    Fill(u8),
}

#[derive(Clone)]
struct Extent {
    end: u64,
    content: Content,
}

/// An image: disjoint extents over zeroes.
#[derive(Clone, Default)]
pub(crate) struct Image {
    pub(crate) size: u64,
    extents: BTreeMap<u64, Extent>,
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    let word = bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .context("short container")?;
    Ok(u64::from_le_bytes(word))
}

impl Image {
    pub(crate) fn blank(size: u64) -> Self {
        Self {
            size,
            extents: BTreeMap::new(),
        }
    }

    pub(crate) fn load(path: &Path) -> Result<Self> {
        let raw = std::fs::read(path).with_context(|| path.display().to_string())?;
        let bytes = if raw.starts_with(b"HN4SPRS1") {
            raw
        } else {
            zstd::decode_all(&raw[..])?
        };
        if !bytes.starts_with(b"HN4SPRS1") {
            bail("no HN4SPRS1 container")?;
        }
        let mut image = Self::blank(u64_at(&bytes, 8)?);
        let count = index(u64_at(&bytes, 16)? & 0xFFFF_FFFF);
        let mut data_at = 24 + 24 * count;
        let all = Arc::new(bytes);
        for entry in 0..count {
            let at = 24 + 24 * entry;
            let (offset, length) = (u64_at(&all, at)?, u64_at(&all, at + 8)?);
            let content = if all[at + 16] == 0 {
                let content = Content::Bytes {
                    all: Arc::clone(&all),
                    from: data_at,
                };
                data_at += index(length);
                content
            } else {
                Content::Fill(all[at + 17])
            };
            image.put(offset, length, content);
        }
        if data_at != all.len() {
            bail("container with bytes left over")?;
        }
        Ok(image)
    }

    fn split(&mut self, at: u64) {
        let Some((&start, extent)) = self.extents.range_mut(..at).next_back() else {
            return;
        };
        if extent.end <= at {
            return;
        }
        let content = match &extent.content {
            Content::Fill(value) => Content::Fill(*value),
            Content::Bytes { all, from } => Content::Bytes {
                all: Arc::clone(all),
                from: from + index(at - start),
            },
        };
        let right = Extent {
            end: extent.end,
            content,
        };
        extent.end = at;
        self.extents.insert(at, right);
    }

    fn put(&mut self, offset: u64, length: u64, content: Content) {
        if length == 0 {
            return;
        }
        let end = offset + length;
        self.split(offset);
        self.split(end);
        let covered: Vec<u64> = self
            .extents
            .range(offset..end)
            .map(|(&start, _)| start)
            .collect();
        for start in covered {
            self.extents.remove(&start);
        }
        if !matches!(content, Content::Fill(0)) {
            self.extents.insert(offset, Extent { end, content });
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let content = Content::Bytes {
            all: Arc::new(bytes.to_vec()),
            from: 0,
        };
        self.put(offset, bytes.len() as u64, content);
    }

    /// Does what a device would do. `discard_zeroes` says what discards and resets leave.
    pub(crate) fn apply(&mut self, plan: &Plan, discard_zeroes: bool, zone: u64) {
        for step in plan.steps.iter().filter(|step| step.fails.is_none()) {
            match &step.op {
                Op::Write { offset, data } => {
                    let head = data.head();
                    self.write(*offset, head);
                    let rest = offset + head.len() as u64;
                    self.put(
                        rest,
                        data.len() - head.len() as u64,
                        Content::Fill(data.fill()),
                    );
                }
                Op::Zero { offset, length } => self.put(*offset, *length, Content::Fill(0)),
                Op::Discard { offset, length } if discard_zeroes => {
                    self.put(*offset, *length, Content::Fill(0));
                }
                Op::ZoneReset { offset, length } if discard_zeroes => {
                    let length = if *length == 0 { zone } else { *length };
                    self.put(*offset, length, Content::Fill(0));
                }
                Op::Discard { .. } | Op::ZoneReset { .. } | Op::Flush => {}
            }
        }
    }

    pub(crate) fn sha256_of(&self, offset: u64, length: u64) -> String {
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let part = buffer.len().min(index(end - at));
            if self.read_at(at, &mut buffer[..part]).is_err() {
                return "outside the image".to_owned();
            }
            hasher.update(&buffer[..part]);
            at += part as u64;
        }
        hn4::num::hex(&hasher.finalize())
    }

    /// SHA-256 over (offset, page) of every page that is not all zero.
    pub(crate) fn content_sha256(&self) -> String {
        let mut hasher = Sha256::new();
        let mut done = 0;
        let mut page = vec![0; index(PAGE)];
        for (&start, extent) in &self.extents {
            let mut at = (start / PAGE * PAGE).max(done);
            while at < extent.end {
                let length = PAGE.min(self.size - at);
                let bytes = &mut page[..index(length)];
                if self.read_at(at, bytes).is_ok() && bytes.iter().any(|&byte| byte != 0) {
                    hasher.update(at.to_le_bytes());
                    hasher.update(&*bytes);
                }
                at += PAGE;
                done = at;
            }
        }
        hn4::num::hex(&hasher.finalize())
    }
}

impl ReadAt for Image {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        if end > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(0);
        let before = self
            .extents
            .range(..=offset)
            .next_back()
            .map_or(offset, |(&start, _)| start);
        for (&start, extent) in self.extents.range(before..end) {
            let (first, last) = (start.max(offset), extent.end.min(end));
            if first >= last {
                continue;
            }
            let target = &mut buffer[index(first - offset)..index(last - offset)];
            match &extent.content {
                Content::Fill(value) => target.fill(*value),
                Content::Bytes { all, from } => {
                    let from = from + index(first - start);
                    target.copy_from_slice(&all[from..from + target.len()]);
                }
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Option<u64> {
        let inside = self.extents.range(..=offset).next_back();
        if inside.is_some_and(|(_, extent)| extent.end > offset) {
            return Some(offset);
        }
        self.extents.range(offset..).next().map(|(&start, _)| start)
    }
}
