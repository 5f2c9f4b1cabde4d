//! The two disks below a volume: carrying out the core's operations on the ring.
//!
//! An operation that the ring has no room for waits here in order. Zeroing falls back from what the
//! device does best to plain writes of zeroes, so that zeroed sectors read as zeroes on every copy,
//! whatever the device is.

use std::collections::VecDeque;

use hn4::log::RING_START;
use hn4::types::Epoch;

use crate::core::event::{Disk, Io, IoToken, PeerId, Seg as CoreSeg};
use crate::device::{
    Device, DeviceError, DeviceInfo, Extent, Extents, KNOWN_FILE_SYSTEMS, ZeroSupport,
};
use crate::ring::{
    Completion, FallocateMode, FileId, Memory, Op, OpError, OpId, OwnedBuf, Refusal, Refused, Ring,
    Seg,
};

/// Bytes of zeroes written at once where the device cannot zero by itself.
const ZERO_CHUNK: usize = 1 << 20;

/// What an operation on a disk was for.
#[derive(Debug)]
pub(super) enum Purpose {
    /// The core's.
    Core(IoToken),
    /// Zeroing a range for the core: what is left, and how.
    Zero {
        token: IoToken,
        offset: u64,
        bytes: u64,
        method: ZeroMethod,
    },
    /// Frames for a peer or the prover.
    Feed(FeedRead),
    /// A piece of the backing for a peer.
    Piece {
        peer: PeerId,
        session: u64,
        offset: u64,
    },
}

/// Whom frames are read for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reader {
    /// A peer, in this session.
    Peer(PeerId, u64),
    /// The prover beside the volume.
    Prover,
}

/// Frames being read from the log.
#[derive(Debug)]
pub(super) struct FeedRead {
    pub(super) reader: Reader,
    pub(super) frames: Vec<(Epoch, u64)>,
    /// Where the rest starts, if the run wraps around the end of the ring.
    rest: Option<(u64, u64)>,
    pub(super) bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ZeroMethod {
    Punch,
    Range,
    Write,
}

/// An operation in words of its own, so that it can wait.
#[derive(Debug)]
struct Queued {
    purpose: Purpose,
    file: FileId,
    what: What,
}

#[derive(Debug)]
enum What {
    Read {
        offset: u64,
        segs: Vec<Seg>,
        buf: Option<OwnedBuf>,
    },
    Write {
        offset: u64,
        segs: Vec<Seg>,
        buf: Option<OwnedBuf>,
        then_sync: bool,
    },
    Sync,
    Fallocate {
        mode: FallocateMode,
        offset: u64,
        bytes: u64,
    },
}

/// See the module.
pub(super) struct Disks {
    log: FileId,
    backing: FileId,
    shadow: Option<FileId>,
    zeroing: ZeroSupport,
    extents: Extents,
    ring_bytes: u64,
    purposes: Vec<Option<Purpose>>,
    free: Vec<u32>,
    queue: VecDeque<Queued>,
    segs: Vec<Seg>,
    /// Bits of the token that say it is ours.
    tag: u64,
}

/// What came of a completion.
pub(super) enum Done {
    /// For the core.
    Core(IoToken, Result<(), i32>),
    /// Frames for a peer or the prover, read or not.
    Feed(FeedRead, bool),
    /// A piece for a peer.
    Piece {
        peer: PeerId,
        session: u64,
        offset: u64,
        data: Option<OwnedBuf>,
    },
    /// More is under way.
    Busy,
}

impl Disks {
    pub(super) fn new(
        ring: &mut Ring,
        (log, backing, shadow): (&Device, &Device, Option<&Device>),
        ring_bytes: u64,
        tag: u64,
    ) -> Result<Self, DeviceError> {
        let os = |device: &Device, source| DeviceError::Os {
            path: device.info().path.display().to_string(),
            what: "handing it to the ring",
            source,
        };
        let zeroing = if zeroes_by_itself(backing.info()) {
            backing.zeroing()?
        } else {
            // Over FUSE, for one, a punched hole may be a mere hint to the server behind it.
            ZeroSupport {
                punch_hole: false,
                zero_range: false,
            }
        };
        let extents = backing.extents().map_err(|error| os(backing, error))?;
        let mut add = |device: &Device| {
            let fd = device.descriptor().map_err(|error| os(device, error))?;
            ring.add_file(fd).map_err(|error| os(device, error))
        };
        Ok(Self {
            log: add(log)?,
            backing: add(backing)?,
            shadow: shadow.map(add).transpose()?,
            zeroing,
            extents,
            ring_bytes,
            purposes: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            segs: Vec::new(),
            tag,
        })
    }

    /// Operations that are on their way or waiting.
    pub(super) fn is_busy(&self) -> bool {
        !self.queue.is_empty() || self.free.len() < self.purposes.len()
    }

    /// What the backing holds from `offset` on, as far as is known without reading.
    pub(super) fn extent(&self, offset: u64, end: u64) -> Extent {
        self.extents.at(offset, end)
    }

    fn file(&self, disk: Disk) -> FileId {
        match disk {
            Disk::Log => self.log,
            Disk::Backing => self.backing,
            Disk::Shadow => self
                .shadow
                .expect("the core knows whether there is room in it"),
        }
    }

    /// Starts one of the core's operations; `segs` is what its range refers to.
    pub(super) fn submit(&mut self, ring: &mut Ring, token: IoToken, io: &Io, segs: &[CoreSeg]) {
        let purpose = Purpose::Core(token);
        match io {
            Io::Read {
                disk,
                offset,
                segs: range,
            } => {
                self.transfer(ring, purpose, *disk, *offset, &segs[range.clone()], None);
            }
            Io::Write {
                disk,
                offset,
                segs: range,
                then_fsync,
            } => {
                let segs = &segs[range.clone()];
                self.transfer(ring, purpose, *disk, *offset, segs, Some(*then_fsync));
            }
            Io::Fsync { disk } => {
                let file = self.file(*disk);
                self.start(
                    ring,
                    Queued {
                        purpose,
                        file,
                        what: What::Sync,
                    },
                );
            }
            Io::Zero {
                offset,
                bytes,
                trim,
            } => {
                let method = match self.zeroing {
                    ZeroSupport {
                        punch_hole: true, ..
                    } if *trim => ZeroMethod::Punch,
                    ZeroSupport {
                        zero_range: true, ..
                    } => ZeroMethod::Range,
                    ZeroSupport {
                        punch_hole: true, ..
                    } => ZeroMethod::Punch,
                    ZeroSupport { .. } => ZeroMethod::Write,
                };
                self.zero(ring, token, *offset, *bytes, method);
            }
        }
    }

    /// The path of every write and read: no allocation if the ring has room.
    fn transfer(
        &mut self,
        ring: &mut Ring,
        purpose: Purpose,
        disk: Disk,
        offset: u64,
        segs: &[CoreSeg],
        write: Option<bool>,
    ) {
        let file = self.file(disk);
        self.segs.clear();
        let convert = |seg: &CoreSeg| Seg::slot(seg.slot, seg.offset.into(), seg.bytes.into());
        self.segs.extend(segs.iter().map(convert));
        if self.queue.is_empty() {
            let token = self.register(purpose);
            let memory = Memory::slots(&self.segs);
            let op = match write {
                None => Op::Read {
                    file,
                    offset,
                    memory,
                },
                Some(then_sync) => Op::Write {
                    file,
                    offset,
                    memory,
                    then_sync,
                },
            };
            match ring.submit(op, token) {
                Ok(_) => return,
                Err(refused) if refused.why == Refusal::Full => {}
                Err(refused) => panic!("the ring refused an operation on a disk: {}", refused.why),
            }
            let purpose = self.unregister(token);
            return self.enqueue(purpose, file, offset, write);
        }
        self.enqueue(purpose, file, offset, write);
    }

    fn enqueue(&mut self, purpose: Purpose, file: FileId, offset: u64, write: Option<bool>) {
        let segs = self.segs.clone();
        let what = match write {
            None => What::Read {
                offset,
                segs,
                buf: None,
            },
            Some(then_sync) => What::Write {
                offset,
                segs,
                buf: None,
                then_sync,
            },
        };
        self.queue.push_back(Queued {
            purpose,
            file,
            what,
        });
    }

    fn start(&mut self, ring: &mut Ring, queued: Queued) {
        self.queue.push_back(queued);
        self.retry(ring);
    }

    /// Starts what is waiting, as far as the ring has room.
    pub(super) fn retry(&mut self, ring: &mut Ring) {
        while let Some(Queued {
            purpose,
            file,
            what,
        }) = self.queue.pop_front()
        {
            if ring.room() == 0 {
                return self.queue.push_front(Queued {
                    purpose,
                    file,
                    what,
                });
            }
            let token = self.register(purpose);
            match what {
                What::Sync => checked(ring.submit(
                    Op::Sync {
                        file,
                        data_only: true,
                    },
                    token,
                )),
                What::Fallocate {
                    mode,
                    offset,
                    bytes,
                } => checked(ring.submit(
                    Op::Fallocate {
                        file,
                        mode,
                        offset,
                        len: bytes,
                    },
                    token,
                )),
                What::Read { offset, segs, buf } => {
                    let memory = Memory { segs: &segs, buf };
                    checked(ring.submit(
                        Op::Read {
                            file,
                            offset,
                            memory,
                        },
                        token,
                    ))
                }
                What::Write {
                    offset,
                    segs,
                    buf,
                    then_sync,
                } => {
                    let memory = Memory { segs: &segs, buf };
                    checked(ring.submit(
                        Op::Write {
                            file,
                            offset,
                            memory,
                            then_sync,
                        },
                        token,
                    ))
                }
            }
        }
    }

    fn zero(
        &mut self,
        ring: &mut Ring,
        token: IoToken,
        offset: u64,
        bytes: u64,
        method: ZeroMethod,
    ) {
        let purpose = Purpose::Zero {
            token,
            offset,
            bytes,
            method,
        };
        let mode = match method {
            ZeroMethod::Punch => FallocateMode::PunchHole,
            ZeroMethod::Range => FallocateMode::ZeroRange,
            ZeroMethod::Write => {
                let chunk = usize::try_from(bytes).unwrap_or(ZERO_CHUNK).min(ZERO_CHUNK);
                let buf = OwnedBuf::zeroed(chunk);
                let length = u32::try_from(chunk).expect("a chunk is 1 MiB");
                let segs = vec![Seg::buf(0, length)];
                let what = What::Write {
                    offset,
                    segs,
                    buf: Some(buf),
                    then_sync: false,
                };
                return self.start(
                    ring,
                    Queued {
                        purpose,
                        file: self.backing,
                        what,
                    },
                );
            }
        };
        let what = What::Fallocate {
            mode,
            offset,
            bytes,
        };
        self.start(
            ring,
            Queued {
                purpose,
                file: self.backing,
                what,
            },
        );
    }

    /// Reads frames from the log.
    pub(super) fn read_frames(
        &mut self,
        ring: &mut Ring,
        reader: Reader,
        offset: u64,
        frames: Vec<(Epoch, u64)>,
    ) {
        let total: u64 = frames.iter().map(|(_, bytes)| bytes).sum();
        let bytes = Vec::with_capacity(usize::try_from(total).unwrap_or(0));
        let feed = FeedRead {
            reader,
            frames,
            rest: Some((offset, total)),
            bytes,
        };
        self.read_more_frames(ring, feed);
    }

    fn read_more_frames(&mut self, ring: &mut Ring, mut feed: FeedRead) {
        let Some((offset, bytes)) = feed.rest.take() else {
            return;
        };
        let in_ring = offset % self.ring_bytes;
        let part = bytes.min(self.ring_bytes - in_ring).min(4 << 20);
        if part < bytes {
            feed.rest = Some((offset + part, bytes - part));
        }
        let length = u32::try_from(part).expect("at most 4 MiB");
        let buf = OwnedBuf::zeroed(length as usize);
        let segs = vec![Seg::buf(0, length)];
        let what = What::Read {
            offset: RING_START + in_ring,
            segs,
            buf: Some(buf),
        };
        self.start(
            ring,
            Queued {
                purpose: Purpose::Feed(feed),
                file: self.log,
                what,
            },
        );
    }

    /// Reads a piece of the backing for a peer.
    pub(super) fn read_piece(
        &mut self,
        ring: &mut Ring,
        (peer, session): (PeerId, u64),
        offset: u64,
        bytes: u64,
    ) {
        let length = u32::try_from(bytes).expect("pieces are bounded by the configuration");
        let buf = OwnedBuf::zeroed(length as usize);
        let segs = vec![Seg::buf(0, length)];
        let what = What::Read {
            offset,
            segs,
            buf: Some(buf),
        };
        let purpose = Purpose::Piece {
            peer,
            session,
            offset,
        };
        self.start(
            ring,
            Queued {
                purpose,
                file: self.backing,
                what,
            },
        );
    }

    /// Takes a completion of an operation that was started here.
    pub(super) fn done(&mut self, ring: &mut Ring, completion: Completion) -> Done {
        let failed = completion.result.as_ref().err().copied();
        match self.unregister(completion.token) {
            Purpose::Core(token) => Done::Core(token, failed.map_or(Ok(()), |e| Err(errno(e)))),
            Purpose::Zero {
                token,
                offset,
                bytes,
                method,
            } => self.zero_done(ring, token, (offset, bytes, method), failed),
            Purpose::Feed(mut feed) => {
                if failed.is_some() {
                    return Done::Feed(feed, false);
                }
                feed.bytes
                    .extend_from_slice(completion.buf.as_ref().map_or(&[], |b| b.bytes()));
                if feed.rest.is_none() {
                    return Done::Feed(feed, true);
                }
                self.read_more_frames(ring, feed);
                Done::Busy
            }
            Purpose::Piece {
                peer,
                session,
                offset,
            } => {
                let data = completion.buf.filter(|_| failed.is_none());
                Done::Piece {
                    peer,
                    session,
                    offset,
                    data,
                }
            }
        }
    }

    fn zero_done(
        &mut self,
        ring: &mut Ring,
        token: IoToken,
        (offset, bytes, method): (u64, u64, ZeroMethod),
        failed: Option<OpError>,
    ) -> Done {
        let fallback = match (method, failed) {
            (ZeroMethod::Write, None) if bytes > ZERO_CHUNK as u64 => {
                let chunk = ZERO_CHUNK as u64;
                self.zero(ring, token, offset + chunk, bytes - chunk, method);
                return Done::Busy;
            }
            (_, None) => return Done::Core(token, Ok(())),
            (ZeroMethod::Punch, Some(error)) if is_unsupported(error) => ZeroMethod::Range,
            (ZeroMethod::Range, Some(error)) if is_unsupported(error) => ZeroMethod::Write,
            (_, Some(error)) => return Done::Core(token, Err(errno(error))),
        };
        self.zero(ring, token, offset, bytes, fallback);
        Done::Busy
    }

    fn register(&mut self, purpose: Purpose) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.purposes.push(None);
            u32::try_from(self.purposes.len() - 1).expect("bounded by the ring")
        });
        self.purposes[index as usize] = Some(purpose);
        self.tag | u64::from(index)
    }

    fn unregister(&mut self, token: u64) -> Purpose {
        let index = u32::try_from(token & !self.tag).expect("a token of ours");
        let purpose = self.purposes[index as usize].take();
        self.free.push(index);
        purpose.expect("completions name operations that are on their way")
    }
}

/// Whether a punched hole or a zeroed range surely reads as zeroes: on block devices, where the
/// kernel sees to it, and on file systems that are known to.
fn zeroes_by_itself(backing: &DeviceInfo) -> bool {
    match backing.file_system.as_deref() {
        None => true,
        Some(fs) => KNOWN_FILE_SYSTEMS.contains(&fs),
    }
}

/// Room was checked, and everything else about an operation is ours to get right.
fn checked(result: Result<OpId, Refused<'_>>) {
    if let Err(refused) = result {
        panic!("the ring refused an operation on a disk: {}", refused.why);
    }
}

fn is_unsupported(error: OpError) -> bool {
    matches!(
        errno(error),
        libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENODEV
    )
}

fn errno(error: OpError) -> i32 {
    match error {
        OpError::Os(errno) => errno as i32,
        OpError::UnexpectedEof | OpError::WroteNothing => libc::EIO,
        OpError::Cancelled => libc::ECANCELED,
    }
}
