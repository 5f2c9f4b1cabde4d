//! Frames that do not come to their end.
//!
//! What checks a frame lies behind its payload. A frame whose *length* was damaged is therefore
//! found out only when as many bytes have come as it speaks of; if the peer has nothing more to
//! send on that stream, they never come, and heartbeats on the other one keep the session alive. So
//! a frame that has begun must move: in any [`Config::frame_timeout`](super::Config) it ends, or
//! at least [`LEAST_BYTES`] of it come. Else it counts as damaged, and the session ends.
//!
//! Not here: reading, which may pause while the daemon takes nothing. Then nobody is to blame.

use std::time::Duration;

use crate::wire::Stream;

/// A frame of which no more than this comes in the time is damaged: slower than any line that is
/// of use, and more than the heartbeats and acknowledgements that an idle peer sends.
const LEAST_BYTES: usize = 16 << 10;

#[derive(Clone, Copy, Debug)]
struct Watch {
    sequence: u64,
    since: Duration,
    /// Bytes of it that were there then.
    bytes: usize,
}

/// The frames that have begun, one per stream at most.
#[derive(Debug, Default)]
pub(super) struct Unfinished {
    control: Option<Watch>,
    data: Option<Watch>,
}

impl Unfinished {
    fn of(&mut self, stream: Stream) -> &mut Option<Watch> {
        match stream {
            Stream::Control => &mut self.control,
            Stream::Data => &mut self.data,
        }
    }

    /// Bytes of a stream have been taken: so many of the frame with this sequence are there, if one
    /// has begun.
    pub(super) fn look(&mut self, now: Duration, stream: Stream, begun: Option<(u64, usize)>) {
        let watch = self.of(stream);
        let moved = |watch: &Watch, sequence: u64, bytes: usize| {
            watch.sequence != sequence || bytes >= watch.bytes + LEAST_BYTES
        };
        match (begun, &watch) {
            (Some((sequence, bytes)), Some(old)) if !moved(old, sequence, bytes) => {}
            (begun, _) => {
                *watch = begun.map(|(sequence, bytes)| Watch {
                    sequence,
                    since: now,
                    bytes,
                });
            }
        }
    }

    /// When a frame will have stood still for so long.
    pub(super) fn deadline(&self, timeout: Duration) -> Option<Duration> {
        let watches = self.control.iter().chain(&self.data);
        watches.map(|watch| watch.since + timeout).min()
    }

    /// A frame that has stood still for so long: its stream, its sequence, and how much of it is
    /// there in bytes.
    pub(super) fn stalled(&self, now: Duration, timeout: Duration) -> Option<(Stream, u64, usize)> {
        let streams = [(Stream::Control, self.control), (Stream::Data, self.data)];
        let late = |watch: &Watch| now >= watch.since + timeout;
        let late = streams
            .into_iter()
            .find_map(|(stream, watch)| Some((stream, watch.filter(late)?)));
        late.map(|(stream, watch)| (stream, watch.sequence, watch.bytes))
    }

    /// What has come of a stream counts from now on.
    pub(super) fn excuse(&mut self, now: Duration, stream: Stream) {
        if let Some(watch) = self.of(stream) {
            watch.since = now;
        }
    }
}
