//! Images that were made by mounting and unmounting another one.

use hn4::chronicle::LinkKey;
use hn4::epoch_ring::{EpochRecord, RECORD_BYTES};
use hn4::mount::{self, Mounted, Request};
use hn4::num::index;
use hn4::plan::{Faults, Medium, Plan};
use hn4::status::{Conduct, Defect};
use hn4::superblock::Superblock;
use hn4::unmount::unmount;
use serde_json::Value;
use zerocopy::{FromBytes, IntoBytes};

use hn4::device::{Device, ReadAt};

use crate::anyhow_lite::{Context, Result, bail};
use crate::json::{self, compare_trace, list, number, text_of, trace, u64_of};
use crate::mounts::compare_volume;
use crate::sparse::Image;
use crate::{Golden, Outcome};

struct Life {
    image: Image,
    device: Device,
    conduct: Conduct,
    plans: Vec<Plan>,
    mounted: Option<Mounted>,
}

pub(crate) fn run(golden: &Golden, case: &Value) -> Result<Outcome> {
    let file = format!("images/{}.sparse.zst", text_of(case, "base")?);
    let live = |conduct| -> Result<Life> {
        let image = golden.image(&file)?;
        let device = json::device(&case["device"])?;
        let mut life = Life {
            image,
            device,
            conduct,
            plans: Vec::new(),
            mounted: None,
        };
        for step in list(case, "steps") {
            life.step(step)?;
        }
        Ok(life)
    };
    let theirs = live(Conduct::ReferenceCompatible)?;
    let (found, expected) = (
        theirs.image.content_sha256(),
        text_of(case, "content_sha256")?,
    );
    if found != expected {
        return bail(format!("content {found} instead of {expected}"));
    }
    if let Some(io) = case["io"].as_array() {
        let plans: Vec<_> = theirs.plans.iter().collect();
        compare_trace(&trace(&plans, &theirs.device), io)?;
    }
    judge(case, &theirs)
}

/// With corrections the same life must at least end in a volume that mounts for writing.
fn judge(case: &Value, theirs: &Life) -> Result<Outcome> {
    let last = list(case, "steps")
        .iter()
        .rev()
        .find_map(|step| number(&step["now_ns"]));
    let request = Request {
        now_ns: last.unwrap_or(0) + 1,
        ..Request::default()
    };
    let compatible = Request {
        conduct: Conduct::ReferenceCompatible,
        ..request
    };
    let assess = |request| mount::assess(&theirs.image, theirs.device, &Faults::default(), request);
    let (ours, reference) = (assess(&request), assess(&compatible));
    let stuck = reference.verdict.as_ref().is_ok_and(Mounted::is_read_only);
    if ours.corrections.contains(&Defect(4)) && stuck && !ours.repairs.is_empty() {
        let what = "recognised, and a repair of the epoch record offered".to_owned();
        return Ok(Outcome::Corrected(vec![Defect(4)], what));
    }
    if ours.plan != reference.plan && !ours.corrections.is_empty() {
        let what = "the next mount writes elsewhere".to_owned();
        return Ok(Outcome::Corrected(ours.corrections, what));
    }
    Ok(Outcome::Passed)
}

impl Life {
    fn step(&mut self, step: &Value) -> Result<()> {
        match text_of(step, "op")? {
            "mount" => self.mount(step),
            "unmount" => self.unmount(step),
            "crash" => {
                self.mounted = None;
                Ok(())
            }
            "patch_epoch_crc" => self.patch_epoch_crc(),
            other => bail(format!("unknown step {other}")),
        }
    }

    fn apply(&mut self, plan: Plan) {
        self.image
            .apply(&plan, true, u64::from(self.device.zone_size));
        self.plans.push(plan);
    }

    fn mount(&mut self, step: &Value) -> Result<()> {
        let request = Request {
            flags: number(&step["flags"]).unwrap_or(0),
            now_ns: u64_of(step, "now_ns")?,
            conduct: self.conduct,
            ..Request::default()
        };
        let assessment = mount::assess(&self.image, self.device, &Faults::default(), &request);
        let found = match &assessment.verdict {
            Ok(_) => "SUCCESS".to_owned(),
            Err(problem) => format!("ERR_{}", problem.code),
        };
        if step["result"].as_str() != Some(&found) {
            return bail(format!("mount: {found} instead of {}", step["result"]));
        }
        self.mounted = None;
        let Ok(volume) = assessment.verdict else {
            self.apply(assessment.plan);
            return Ok(());
        };
        compare_volume(&volume, &step["state"])?;
        self.apply(assessment.plan);
        self.mounted = Some(volume);
        Ok(())
    }

    fn unmount(&mut self, step: &Value) -> Result<()> {
        let mut volume = self.mounted.take().context("a mounted volume")?;
        let faults = Faults::default();
        let image = self.image.clone();
        let mut medium = Medium::new(&image, self.device, &faults);
        let now = u64_of(step, "now_ns")?;
        let result = unmount(
            &mut medium,
            &mut volume,
            now,
            self.conduct,
            &LinkKey::Public,
        );
        let expected = step["result"].as_str() == Some("SUCCESS");
        if result.is_ok() != expected {
            return bail(format!("unmount: {result:?} instead of {}", step["result"]));
        }
        self.apply(medium.into_plan());
        Ok(())
    }

    fn patch_epoch_crc(&mut self) -> Result<()> {
        let mut bytes = vec![0; 8192];
        self.image.read_at(0, &mut bytes)?;
        let north = Superblock::from_bytes(&bytes).context("a superblock")?;
        let offset = north.epoch_ring_block_idx.get() * u64::from(north.block_size.get());
        let mut record = vec![0; index(RECORD_BYTES)];
        self.image.read_at(offset, &mut record)?;
        let record = EpochRecord::read_from_bytes(&record)
            .ok()
            .context("a record")?;
        self.image.write(offset, record.sealed().as_bytes());
        Ok(())
    }
}
