//! Lag control: what happens when a peer falls further behind than its configuration allows.
//!
//! Lag is the log after what a peer has flushed, in bytes, and the age of the oldest epoch that it
//! lacks. What is sealed while a peer is away counts. A peer that takes no epochs has no lag. Nor
//! has one that is being filled with a full copy, except with `detach`: the log must not be kept
//! for that one either if clients would have to wait.
//!
//! - `throttle`: new writes wait while the lag is at the bound. A bound in seconds becomes one in
//!   bytes by the rate at which the peer has been flushing. A peer that comes back further behind
//!   than its bound gets twice as much as writers add, so it catches up and nobody stands still.
//! - `spill`: nothing is held back before the log is full; it is only shown.
//! - `detach`: the peer's acknowledgements count no longer, and the log is not kept for it once
//!   space is short. It is still sent what the log has, and counts again when its lag is down to
//!   half the bound.

use hn4::log::Role;
use hn4::types::{BLOCK_BYTES, Epoch, LogOffset};

use super::config::LagPolicy;
use super::event::{Now, Time};
use super::volume::Volume;

/// With nothing known of its rate, or very slow, a peer may be behind by so much.
const RATE_FLOOR_BYTES: u64 = 256 << 10;
/// A rate is measured over at least so long.
const RATE_WINDOW_MS: u64 = 500;
/// An open epoch is closed early when so little of its room is left.
const CLOSE_BYTES: u64 = 128 << 10;

/// What happens when a peer's lag exceeds its bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnExceed {
    /// Writers wait.
    #[default]
    Throttle,
    /// Nothing, until the log is full.
    Spill,
    /// The peer counts no longer, until it has caught up.
    Detach,
}

/// How lag control sees a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LagState {
    /// Within its bound, or without one.
    #[default]
    Within,
    /// Writers wait for it.
    Throttling,
    /// Further behind than its bound, and the log takes it.
    Spilling,
    /// It does not count.
    Detached,
}

/// How far behind a peer is.
#[derive(Clone, Copy, Debug)]
struct Behind {
    epochs: u64,
    /// Of log, as far as it is kept.
    bytes: u64,
    /// Age of the oldest epoch that it lacks.
    ms: u64,
}

/// How fast a peer flushes while it has something to flush.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    bytes_per_s: Option<u64>,
    since: Option<Time>,
    bytes: u64,
}

impl Rate {
    fn flushed(&mut self, now: Time, bytes: u64) {
        let since = *self.since.get_or_insert(now);
        self.bytes = self.bytes.saturating_add(bytes);
        let ms = now.0.saturating_sub(since.0) / 1_000_000;
        // Between two flushes, so that the time is what these bytes took.
        if ms < RATE_WINDOW_MS || bytes == 0 {
            return;
        }
        let sample = self.bytes.saturating_mul(1000) / ms;
        let old = self.bytes_per_s.unwrap_or(sample);
        // A bound is kept by believing in less sooner than in more.
        let next = sample.min(old + sample.saturating_sub(old) / 4);
        self.bytes_per_s = Some(next);
        (self.since, self.bytes) = (Some(now), 0);
    }

    /// Time without anything to flush says nothing about the rate.
    fn idle(&mut self) {
        (self.since, self.bytes) = (None, 0);
    }
}

/// What lag control knows of a peer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PeerLag {
    /// Everything up to here counts as the peer's.
    pub(super) has: Epoch,
    pub(super) state: LagState,
    /// Where its log ended when it was looked at last.
    position: LogOffset,
    /// Its lag counted then.
    counted: bool,
    /// It came back with more than its bound, and may lag by so much.
    ceiling_bytes: u64,
    rate: Rate,
}

impl PeerLag {
    /// Of a peer that is not known to lack anything up to an epoch.
    pub(super) fn at(has: Epoch) -> Self {
        Self {
            has,
            ..Self::default()
        }
    }

    /// Takes note of where the peer's log ends now.
    fn look(&mut self, now: Time, policy: &LagPolicy, lag: &Behind, position: LogOffset) {
        let flushed = position.0.saturating_sub(self.position.0);
        if !self.counted || position < self.position {
            // It is new, or had to go back.
            self.ceiling_bytes = lag.bytes;
            self.rate.idle();
        } else {
            self.ceiling_bytes = self.ceiling_bytes.saturating_sub(flushed / 2);
        }
        if lag.epochs == 0 {
            self.rate.idle();
        } else {
            self.rate.flushed(now, flushed);
        }
        if self.ceiling_bytes <= self.bound_bytes(policy) {
            self.ceiling_bytes = 0;
        }
        (self.counted, self.position) = (true, position);
    }

    /// The bound in bytes.
    fn bound_bytes(&self, policy: &LagPolicy) -> u64 {
        let by_time = policy.max_ms.map(|ms| {
            let rate = self.rate.bytes_per_s.unwrap_or(0);
            let bytes = u128::from(rate) * u128::from(ms) / 1000;
            u64::try_from(bytes)
                .unwrap_or(u64::MAX)
                .max(RATE_FLOOR_BYTES)
        });
        let bounds = [policy.max_bytes, by_time];
        bounds.into_iter().flatten().min().unwrap_or(u64::MAX)
    }

    /// How many bytes writers may add, and from how many bytes on an open epoch should be closed.
    fn room(&self, policy: &LagPolicy, lag: &Behind) -> (u64, u64) {
        let limit = self.bound_bytes(policy).max(self.ceiling_bytes);
        let late = policy.max_ms.is_some_and(|ms| lag.ms >= ms) && lag.epochs > 0;
        let room = if late && self.ceiling_bytes == 0 {
            0
        } else {
            limit.saturating_sub(lag.bytes)
        };
        (room, room.saturating_sub(CLOSE_BYTES).max(limit / 4))
    }

    fn next_state(&self, policy: &LagPolicy, lag: &Behind, live: bool) -> LagState {
        let share = |bound: u64, part: u64| bound / 8 * part;
        let over = |part: u64| {
            let bytes = policy
                .max_bytes
                .is_some_and(|most| lag.bytes > share(most, part));
            let time = policy.max_ms.is_some_and(|most| lag.ms > share(most, part));
            lag.epochs > 0 && (bytes || time)
        };
        match (policy.on_exceed, self.state) {
            (OnExceed::Throttle, _) => {
                let (room, _) = self.room(policy, lag);
                let limit = self.bound_bytes(policy).max(self.ceiling_bytes);
                if lag.epochs > 0 && room < limit / 8 {
                    LagState::Throttling
                } else {
                    LagState::Within
                }
            }
            (OnExceed::Spill, _) if over(8) => LagState::Spilling,
            (OnExceed::Detach, LagState::Detached) if over(4) || !live => LagState::Detached,
            (OnExceed::Detach, LagState::Within) if over(8) => LagState::Detached,
            (OnExceed::Spill | OnExceed::Detach, _) => LagState::Within,
        }
    }
}

/// What writers may do for all peers' sake.
#[derive(Clone, Copy, Debug)]
pub(super) struct LagRoom {
    /// Bytes of an open epoch that may be admitted.
    bytes: u64,
    /// An open epoch of so many bytes should be closed.
    close_bytes: u64,
    /// No peer that writers wait for lags.
    none_lags: bool,
    /// When a bound in time is reached at the earliest.
    pub(super) deadline: Option<Time>,
}

impl Default for LagRoom {
    fn default() -> Self {
        Self {
            bytes: u64::MAX,
            close_bytes: u64::MAX,
            none_lags: true,
            deadline: None,
        }
    }
}

impl LagRoom {
    /// Whether an epoch of so many open blocks may take so many more; its head counts as one. A
    /// single request is never too large for a peer that has everything.
    pub(super) fn admits(&self, open: usize, more: usize) -> bool {
        let bytes = (open + more + 1) as u64 * BLOCK_BYTES;
        bytes <= self.bytes || (open == 0 && self.none_lags)
    }

    /// Whether an epoch of so many blocks should not wait for more.
    pub(super) fn closes(&self, open: usize) -> bool {
        open as u64 * BLOCK_BYTES >= self.close_bytes
    }
}

impl Volume {
    /// Looks at how far behind every peer with a bound is.
    pub(super) fn lag_progress(&mut self, now: Now) {
        let mut all = LagRoom::default();
        if self.role() == Role::Primary {
            for index in 0..self.peers.len() {
                self.look_at_lag(index, now, &mut all);
            }
        }
        self.lag = all;
    }

    fn look_at_lag(&mut self, index: usize, now: Now, all: &mut LagRoom) {
        let policy = self.config.lag.get(index).copied().unwrap_or_default();
        if !policy.is_bounded() {
            return;
        }
        let peer = &self.peers[index];
        let live = peer.is_live();
        let filled = policy.on_exceed == OnExceed::Detach && peer.seeding().is_some();
        if peer.connected && !live && !filled {
            let peer = &mut self.peers[index];
            peer.lag.counted = false;
            if peer.lag.state != LagState::Detached {
                peer.lag.state = LagState::Within;
            }
            return;
        }
        let (lag, position) = self.behind(peer.lag.has, now.wall_ms);
        let known = &mut self.peers[index].lag;
        known.look(now.time, &policy, &lag, position);
        known.state = known.next_state(&policy, &lag, live);
        if policy.on_exceed == OnExceed::Throttle {
            let (room, close) = known.room(&policy, &lag);
            all.bytes = all.bytes.min(room);
            all.close_bytes = all.close_bytes.min(close);
            all.none_lags &= lag.epochs == 0;
        }
        if let Some(left) = policy.max_ms.and_then(|most| most.checked_sub(lag.ms))
            && lag.epochs > 0
        {
            let at = now.time.plus_ms(left + 1);
            all.deadline = Some(all.deadline.map_or(at, |earlier| earlier.min(at)));
        }
    }

    /// For how long somebody who has everything up to an epoch has lacked the next one.
    pub(super) fn lag_ms(&self, has: Epoch, wall_ms: u64) -> u64 {
        self.behind(has, wall_ms).0.ms
    }

    /// How far behind somebody is who has everything up to an epoch, and where his log ends in
    /// ours. Of what our log has let go of already, only the epochs are counted.
    fn behind(&self, has: Epoch, wall_ms: u64) -> (Behind, LogOffset) {
        let tip = self.tip().epoch;
        let first = self.journal.index.front();
        let next = match self.journal.info(has.next()) {
            None if has < tip => first,
            found => found,
        };
        let position = next.map_or(self.journal.tail(), |info| info.offset);
        let lag = Behind {
            epochs: tip.0.saturating_sub(has.0),
            bytes: self.journal.tail().0 - position.0,
            ms: next.map_or(0, |info| wall_ms.saturating_sub(info.sealed_ms)),
        };
        (lag, position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn policy(on_exceed: OnExceed, max_bytes: Option<u64>, max_ms: Option<u64>) -> LagPolicy {
        LagPolicy {
            max_bytes,
            max_ms,
            on_exceed,
        }
    }

    fn lag(bytes: u64, ms: u64) -> Behind {
        let epochs = bytes.div_ceil(4096);
        Behind { epochs, bytes, ms }
    }

    #[test]
    fn throttle_leaves_exactly_the_room_up_to_the_bound() {
        let policy = policy(OnExceed::Throttle, Some(8 * MIB), None);
        let mut peer = PeerLag::default();
        peer.look(Time(0), &policy, &lag(0, 0), LogOffset(0));
        assert_eq!(peer.room(&policy, &lag(3 * MIB, 0)).0, 5 * MIB);
        assert_eq!(peer.room(&policy, &lag(9 * MIB, 0)).0, 0);
        let full = lag(8 * MIB - 4096, 0);
        assert_eq!(peer.next_state(&policy, &full, true), LagState::Throttling);
        let half = lag(4 * MIB, 0);
        assert_eq!(peer.next_state(&policy, &half, true), LagState::Within);
    }

    #[test]
    fn a_bound_in_seconds_follows_the_rate_at_which_the_peer_flushes() {
        let policy = policy(OnExceed::Throttle, None, Some(2000));
        let mut peer = PeerLag::default();
        assert_eq!(peer.bound_bytes(&policy), RATE_FLOOR_BYTES);
        for tick in 0..20 {
            // 1 MiB in 100 ms.
            let at = Time(tick * 100_000_000);
            peer.look(at, &policy, &lag(MIB, 100), LogOffset(tick * MIB));
        }
        let bound = peer.bound_bytes(&policy);
        assert!((19 * MIB..=21 * MIB).contains(&bound), "{bound}");
        // A peer that stands still is not measured, it is late.
        assert_eq!(peer.room(&policy, &lag(MIB, 2000)).0, 0);
    }

    #[test]
    fn a_peer_that_comes_back_far_behind_catches_up_while_writers_go_on() {
        let policy = policy(OnExceed::Throttle, Some(MIB), None);
        let mut peer = PeerLag::default();
        let mut behind = 64 * MIB;
        let mut position = 0;
        peer.look(Time(0), &policy, &lag(behind, 9000), LogOffset(position));
        for tick in 1..200_u64 {
            let (room, _) = peer.room(&policy, &lag(behind, 9000));
            // Writers take all the room there is, the peer flushes 1 MiB.
            behind = (behind + room).saturating_sub(MIB);
            position += MIB;
            peer.look(Time(tick), &policy, &lag(behind, 9000), LogOffset(position));
        }
        assert!(behind <= MIB, "{behind}");
        assert_eq!(peer.ceiling_bytes, 0);
    }

    #[test]
    fn a_detached_peer_counts_again_only_when_it_is_there_and_well_within_its_bound() {
        let policy = policy(OnExceed::Detach, Some(8 * MIB), Some(1000));
        let mut peer = PeerLag::default();
        let mut go = |bytes, ms, live| {
            peer.state = peer.next_state(&policy, &lag(bytes, ms), live);
            peer.state
        };
        assert_eq!(go(8 * MIB, 1000, true), LagState::Within);
        assert_eq!(go(8 * MIB + 4096, 10, true), LagState::Detached);
        assert_eq!(go(5 * MIB, 10, true), LagState::Detached);
        assert_eq!(go(MIB, 10, false), LagState::Detached);
        assert_eq!(go(MIB, 10, true), LagState::Within);
        assert_eq!(go(4096, 1001, true), LagState::Detached);
        assert_eq!(go(0, 0, true), LagState::Within);
    }

    #[test]
    fn spilling_only_shows_and_a_single_request_fits_any_bound() {
        let spill = policy(OnExceed::Spill, Some(MIB), None);
        let peer = PeerLag::default();
        assert_eq!(
            peer.next_state(&spill, &lag(2 * MIB, 0), true),
            LagState::Spilling
        );
        let room = LagRoom {
            bytes: 4096,
            ..LagRoom::default()
        };
        assert!(room.admits(0, 2000) && !room.admits(1, 1) && room.admits(0, 1));
        let lags = LagRoom {
            none_lags: false,
            ..room
        };
        assert!(!lags.admits(0, 2000));
    }
}
