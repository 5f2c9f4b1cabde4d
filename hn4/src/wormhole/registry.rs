//! The satellite registry: who is mounted under which UUID.
//!
//! A plain volume asserts that its UUID is its own; a second volume with it is a safety panic
//! unless it says WORMHOLE, in which case it is registered as a satellite. The registry lives as
//! long as the process; it holds no I/O and no clock.

use std::collections::BTreeMap;

use super::certificate::Certificate;
use super::require_strict_flush;
use crate::device::Device;
use crate::status::{Code, Problem, Region};
use crate::superblock::Superblock;

/// Volumes that one registry holds at most.
pub const MAX_VOLUMES: usize = 4096;

/// What a volume became in the registry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// The only plain volume of its UUID.
    Owner,
    /// Shares its UUID on purpose.
    Satellite,
}

#[derive(Clone, Debug)]
struct Member {
    standing: Standing,
    certificate: Certificate,
}

/// Mounted volumes by UUID and by the name of their device.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    volumes: BTreeMap<[u8; 16], BTreeMap<String, Member>>,
}

impl Registry {
    /// Registers a volume. `name` says where it is, and is unique for each device.
    ///
    /// # Errors
    /// [`Code::HwIo`] for a satellite without strict flushes, checked first; [`Code::Exists`] for a
    /// duplicate UUID without WORMHOLE intent, naming both; [`Code::Geometry`] for a satellite that
    /// is not isomorphic to what is there, naming the field.
    pub fn register(
        &mut self,
        name: &str,
        superblock: &Superblock,
        device: &Device,
    ) -> Result<Standing, Problem> {
        if superblock.is_wormhole() {
            require_strict_flush(device)?;
        }
        let at = (Region::Superblock, 0);
        let count: usize = self.volumes.values().map(BTreeMap::len).sum();
        if count >= MAX_VOLUMES {
            let advice = "detach volumes that are not used";
            let found = format!("{count} volumes");
            return Err(Problem::new(Code::Busy, at, found, "fewer", advice));
        }
        let certificate = Certificate::of(superblock, device.sector_size);
        let members = self.volumes.entry(superblock.uuid()).or_default();
        if let Some(other) = members.keys().find(|other| other.as_str() == name) {
            let advice = "the device is attached already";
            let found = format!("{other} twice");
            return Err(Problem::new(
                Code::Busy,
                at,
                found,
                "one attachment",
                advice,
            ));
        }
        let owner = members
            .iter()
            .find(|(_, member)| member.standing == Standing::Owner);
        let standing = if superblock.is_wormhole() {
            Standing::Satellite
        } else {
            Standing::Owner
        };
        if let (Standing::Owner, Some((other, _))) = (standing, owner) {
            let advice = "safety panic: two plain volumes with one UUID; make one a clone, \
                          or give it an identity of its own";
            let found = format!("{name} with the UUID of {other}");
            return Err(Problem::new(
                Code::Exists,
                at,
                found,
                "a UUID of its own",
                advice,
            ));
        }
        if let Some(other) = members.values().next() {
            other.certificate.agree(&certificate)?;
        }
        members.insert(
            name.to_owned(),
            Member {
                standing,
                certificate,
            },
        );
        Ok(standing)
    }

    /// Removes a volume; true when it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        let mut removed = false;
        for members in self.volumes.values_mut() {
            removed |= members.remove(name).is_some();
        }
        self.volumes.retain(|_, members| !members.is_empty());
        removed
    }

    /// The names and standings under a UUID.
    #[must_use]
    pub fn members(&self, uuid: &[u8; 16]) -> Vec<(&str, Standing)> {
        let members = self.volumes.get(uuid).into_iter().flatten();
        members
            .map(|(name, member)| (name.as_str(), member.standing))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::superblock::intent;

    fn volume(uuid: u64, flags: u64) -> Superblock {
        let mut superblock = Superblock::zeroed();
        superblock.uuid_lo = uuid.into();
        superblock.block_size = 4096.into();
        superblock.mount_intent = flags.into();
        superblock
    }

    #[test]
    fn a_duplicate_uuid_is_refused_without_wormhole_intent_and_a_satellite_with_it() {
        let device = Device::plain(1 << 27, 512);
        let mut registry = Registry::default();
        let plain = volume(1, 0);
        assert_eq!(registry.register("a", &plain, &device), Ok(Standing::Owner));
        let refused = registry
            .register("b", &plain, &device)
            .expect_err("a duplicate");
        assert!(
            refused.code == Code::Exists && refused.found.contains("UUID of a"),
            "{refused}"
        );
        let satellite = volume(1, intent::WORMHOLE);
        assert_eq!(
            registry.register("b", &satellite, &device),
            Ok(Standing::Satellite)
        );
        assert_eq!(registry.members(&plain.uuid()).len(), 2);
        assert!(registry.remove("a"));
        assert_eq!(registry.register("c", &plain, &device), Ok(Standing::Owner));
    }

    #[test]
    fn satellites_need_strict_flushes_and_the_same_geometry() {
        let strict = Device::plain(1 << 27, 512);
        let lax = Device {
            hw_flags: crate::device::HwFlags(0),
            ..strict
        };
        let mut registry = Registry::default();
        let satellite = volume(1, intent::WORMHOLE);
        let refused = registry
            .register("a", &satellite, &lax)
            .expect_err("lax flushes");
        assert_eq!(refused.code, Code::HwIo);
        assert!(registry.register("a", &satellite, &strict).is_ok());
        let mut other = satellite;
        other.device_type_tag = 1.into();
        let refused = registry
            .register("b", &other, &strict)
            .expect_err("other addresses");
        assert!(refused.found.contains("device type tag"), "{refused}");
    }
}
