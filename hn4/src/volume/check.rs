//! The read-only fsck: everything that can be wrong, by LBA.

use std::collections::BTreeMap;

use super::Volume;
use crate::anchor::class;
use crate::chronicle::{LinkKey, verify};
use crate::plan::Medium;
use crate::reserve;
use crate::status::{Code, Problem, Region};
use crate::superblock::copies;
use crate::superblock::vote::read_copy;

/// Findings that one check reports at most.
pub const MAX_FINDINGS: usize = 10_000;

impl Volume<'_> {
    /// Checks copies, chronicle, bitmap and every block of every file. Findings are sorted by LBA.
    #[must_use]
    pub fn check(&self, key: &LinkKey) -> Vec<Problem> {
        let mut findings = Vec::new();
        self.check_copies(&mut findings);
        self.check_chronicle(key, &mut findings);
        self.check_reservation(&mut findings);
        self.check_files(&mut findings);
        findings.sort_by_key(|problem| problem.lba);
        findings.truncate(MAX_FINDINGS);
        findings
    }

    fn check_copies(&self, findings: &mut Vec<Problem>) {
        let superblock = self.superblock();
        let device = self.medium().device;
        let block = u64::from(superblock.block_size.get());
        let capacity = superblock.total_capacity.get();
        for (cardinal, offset) in copies::fitting(capacity, block, device.is_zns(), device.capacity)
        {
            let lba = offset / device.sector();
            match read_copy(self.medium(), offset) {
                Err(problem) => findings.push(problem),
                Ok(copy) if copy.copy_generation != superblock.copy_generation => {
                    let advice = "a mount that may write heals it";
                    let found =
                        format!("{} of generation {}", cardinal.name(), copy.copy_generation);
                    let expected = superblock.copy_generation;
                    let at = (Region::Superblock, lba);
                    let code = Code::GenerationSkew;
                    findings.push(Problem::new(code, at, found, expected, advice));
                }
                Ok(_) => {}
            }
        }
    }

    fn check_chronicle(&self, key: &LinkKey, findings: &mut Vec<Problem>) {
        let mut medium = Medium::beside(self.medium());
        let mut superblock = *self.superblock();
        if let Err(problem) = verify::verify(&mut medium, &mut superblock, self.conduct, key) {
            findings.push(problem);
        }
    }

    /// Blocks that must never hold data but are free in the bitmap: the reference's defect 1.
    fn check_reservation(&self, findings: &mut Vec<Problem>) {
        let Some(bitmap) = self.bitmap() else { return };
        let device = self.medium().device;
        let spb = self.geometry().sectors_per_block();
        for range in reserve::reserved(self.superblock(), device.sector(), device.is_zns())
            .iter()
            .skip(1)
        {
            let mut blocks = range.blocks.start..range.blocks.end.min(bitmap.blocks());
            if let Some(block) = blocks.find(|&block| !bitmap.is_used(block)) {
                let advice = "data written there is lost at the next heal or unmount: reserve it \
                              (formatted by the reference, defect 1)";
                let at = (range.region, block * spb);
                let found = "a free block in the bitmap";
                let code = Code::BitmapCorrupt;
                findings.push(Problem::new(code, at, found, "a reserved block", advice));
            }
        }
    }

    fn check_files(&self, findings: &mut Vec<Problem>) {
        let mut owners: BTreeMap<u64, String> = BTreeMap::new();
        for (_, anchor) in self.files() {
            if anchor.has_class(class::NANO) {
                findings.extend(self.read_nano(&anchor).err());
                continue;
            }
            let blocks = anchor
                .logical_blocks(self.payload_bytes())
                .min(self.geometry().blocks());
            for n in 0..blocks {
                if findings.len() >= MAX_FINDINGS {
                    return;
                }
                match self.read_block(&anchor, n) {
                    Err(problem) => findings.push(problem),
                    Ok(read) => {
                        let Some(place) = read.place else { continue };
                        let name = format!("{}:{n}", anchor.seed());
                        if let Some(other) = owners.insert(place.block, name.clone()) {
                            let advice = "two blocks share a place: copy both files away";
                            let at = (Region::Flux, place.lba);
                            let code = Code::GravityCollapse;
                            findings.push(Problem::new(code, at, name, other, advice));
                        }
                    }
                }
            }
        }
    }
}
