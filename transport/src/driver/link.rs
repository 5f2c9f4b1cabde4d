//! A link: one session's two streams over some connection, whatever kind it is.
//!
//! A transport (QUIC, WebSocket) makes links and moves bytes in tasks of its own; the session's
//! task sees four bounded queues. Dropping a link stops its readers; its writers end when they have
//! written what was queued, so that the reason for the end still reaches the peer.

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};

use crate::wire::{SessionKeys, WireFrame};

/// Frames on their way to the socket, per stream.
pub(crate) const CONTROL_OUT_FRAMES: usize = 16;
/// Few, because they are large, and priorities hold only before this queue.
pub(crate) const DATA_OUT_FRAMES: usize = 4;
/// Reads on their way to the session, per stream.
pub(crate) const READS_IN: usize = 8;

/// Why a link has no more bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkEnd {
    /// The other node does not share this volume with us.
    NotShared,
    /// Anything else.
    Lost(String),
}

/// What came in one read, or why nothing more comes.
pub(crate) type Reads = Result<Read, LinkEnd>;

/// What came in one read. Holds its share of the link's buffer, if the transport counts that,
/// until the session has taken it.
pub(crate) struct Read {
    pub(crate) chunks: Vec<Bytes>,
    pub(crate) _room: Option<OwnedSemaphorePermit>,
}

/// How a session ended, told to whoever made the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SessionEnd {
    /// Hello was accepted.
    pub(crate) was_established: bool,
    /// Both sides disagree on something that will not change by itself.
    pub(crate) was_refused: bool,
    /// The peer fell silent: the connection is probably gone.
    pub(crate) was_silent: bool,
}

/// See the [module](self).
pub(crate) struct Link {
    pub(crate) keys: SessionKeys,
    pub(crate) control_out: mpsc::Sender<WireFrame>,
    pub(crate) data_out: mpsc::Sender<WireFrame>,
    pub(crate) control_in: mpsc::Receiver<Reads>,
    pub(crate) data_in: mpsc::Receiver<Reads>,
    pub(crate) tasks: LinkTasks,
    pub(crate) ended: oneshot::Sender<SessionEnd>,
}

/// The tasks that move a link's bytes. Readers have no purpose without the link.
pub(crate) struct LinkTasks {
    pub(crate) readers: Vec<AbortHandle>,
    /// Ends when the peer has the last frame, or it took too long.
    pub(crate) control_writer: Option<JoinHandle<()>>,
}

impl Drop for LinkTasks {
    fn drop(&mut self) {
        for task in &self.readers {
            task.abort();
        }
    }
}

/// The transport's ends of a link's queues.
pub(crate) struct LinkEnds {
    pub(crate) control_out: mpsc::Receiver<WireFrame>,
    pub(crate) data_out: mpsc::Receiver<WireFrame>,
    pub(crate) control_in: mpsc::Sender<Reads>,
    pub(crate) data_in: mpsc::Sender<Reads>,
}

/// Makes a link's queues, the one for the data that comes in with this many places; `start` gets
/// the transport's ends and spawns the tasks.
pub(crate) fn link(
    keys: SessionKeys,
    data_in_places: usize,
    start: impl FnOnce(LinkEnds) -> LinkTasks,
) -> (Link, oneshot::Receiver<SessionEnd>) {
    let (control_out, control_out_end) = mpsc::channel(CONTROL_OUT_FRAMES);
    let (data_out, data_out_end) = mpsc::channel(DATA_OUT_FRAMES);
    let (control_in_end, control_in) = mpsc::channel(READS_IN);
    let (data_in_end, data_in) = mpsc::channel(data_in_places);
    let (ended, ended_end) = oneshot::channel();
    let tasks = start(LinkEnds {
        control_out: control_out_end,
        data_out: data_out_end,
        control_in: control_in_end,
        data_in: data_in_end,
    });
    (
        Link {
            keys,
            control_out,
            data_out,
            control_in,
            data_in,
            tasks,
            ended,
        },
        ended_end,
    )
}
