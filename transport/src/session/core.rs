//! The session itself: its state, what the daemon and the driver do with it.
//!
//! What the peer sends is taken in by `receive`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hn4::types::Epoch;
use hn4_proof::scxq2::train::Samples;
use hn4_proof::scxq2::{MAX_DELTA_BYTES, Shipment};

use super::Config;
use super::api::{
    CloseReason, CopyState, FeedRefusal, Field, FoundBy, Input, LocalState, Output, PieceKind,
    Refusal, Role,
};
use super::asking::{Ask, Asked};
use super::compression::{Compression, CompressionStatus};
use super::control_lane::ControlLane;
use super::data_lane::DataLane;
use super::hello::{Agreed, is_news};
use super::inbound::Inbound;
use super::unfinished::Unfinished;
use crate::wire::control::{ControlMessage, ErrorMessage, Hello, MAX_CONTROL_BYTES};
use crate::wire::data::{DATA_HEADER_BYTES, DataMessage};
use crate::wire::{FrameKind, FrameOpener, FrameSealer, SessionKeys, Stream, WireFrame};

/// Messages that wait to be sent, at most; the rest of the bound is in bytes.
const MAX_QUEUED_MESSAGES: usize = 4096;
/// Outputs of the data stream that wait for the daemon before reading pauses.
const MAX_PENDING_DATA: usize = 64;

/// What happens to a session.
#[derive(Clone)]
pub enum Event {
    /// The channel is open; its exporter gave these keys. Must be the first event.
    Connected {
        /// Secrets that bind frames to this channel.
        keys: SessionKeys,
    },
    /// Bytes have arrived, cut anyhow.
    Received {
        /// On which stream.
        stream: Stream,
        /// The bytes.
        bytes: Bytes,
    },
    /// The channel is gone.
    Disconnected {
        /// In the words of the channel.
        why: String,
    },
    /// The other node does not share this volume with us.
    NotShared,
    /// A dictionary was trained from what went to this peer or to another one that shares the
    /// volume.
    Dictionary(Arc<Shipment>),
    /// The daemon wants something.
    Daemon(Input),
}

/// Numbers of one stream, to tell the peer what was handled and handed on.
#[derive(Default, Clone, Copy)]
pub(super) struct Progress {
    /// Sequence of the last frame that was handled.
    pub(super) handled: u64,
    /// Outputs of this stream that the daemon has not taken yet.
    pub(super) pending: usize,
    /// What the peer was told last.
    pub(super) told: u64,
}

pub(super) struct Channel {
    pub(super) control_out: FrameSealer,
    pub(super) data_out: FrameSealer,
    pub(super) control_in: FrameOpener,
    pub(super) data_in: FrameOpener,
}

/// What is known of the peer once its hello was accepted.
pub(super) struct Established {
    pub(super) peer: LocalState,
    pub(super) agreed: Agreed,
}

/// When to ask for a sign of life, and when to give up.
#[derive(Clone, Copy)]
pub(super) struct Liveness {
    pub(super) started: Duration,
    pub(super) last_heard: Duration,
    pub(super) ping_sent: Option<Duration>,
    pub(super) pings: u64,
    /// The daemon waits for the answer to this one.
    pub(super) asked: Option<u64>,
    pub(super) round_trip: Option<Duration>,
}

/// See the [module](super).
pub struct Session {
    pub(super) config: Config,
    pub(super) local: LocalState,
    /// The state that our hello says.
    pub(super) said: LocalState,
    pub(super) channel: Option<Channel>,
    pub(super) established: Option<Established>,
    pub(super) closed: bool,
    pub(super) control: ControlLane,
    pub(super) data: DataLane,
    pub(super) inbound: Inbound,
    pub(super) compression: Compression,
    pub(super) asked: Asked,
    pub(super) peer_subscribed: bool,
    pub(super) peer_wants_seed: bool,
    next_epoch: Option<Epoch>,
    feeding: bool,
    pub(super) liveness: Liveness,
    pub(super) control_progress: Progress,
    pub(super) data_progress: Progress,
    pub(super) unfinished: Unfinished,
    /// The daemon took nothing for a while, and reading of the data stream paused.
    paused: bool,
    outputs: VecDeque<(Option<Stream>, Output)>,
}

impl Session {
    /// A session that waits for its channel. `now` is the time since any fixed start, the same for
    /// all calls.
    #[must_use]
    pub fn new(config: Config, local: LocalState, now: Duration) -> Self {
        let liveness = Liveness {
            started: now,
            last_heard: now,
            ping_sent: None,
            pings: 0,
            asked: None,
            round_trip: None,
        };
        let compression = Compression::new(config.dictionaries);
        Self {
            config,
            said: local.clone(),
            local,
            liveness,
            compression,
            channel: None,
            established: None,
            closed: false,
            control: ControlLane::default(),
            data: DataLane::default(),
            inbound: Inbound::default(),
            asked: Asked::default(),
            peer_subscribed: false,
            peer_wants_seed: false,
            next_epoch: None,
            feeding: false,
            control_progress: Progress::default(),
            data_progress: Progress::default(),
            unfinished: Unfinished::default(),
            paused: false,
            outputs: VecDeque::new(),
        }
    }

    /// Takes an event. Afterwards there may be outputs and frames to transmit.
    pub fn handle(&mut self, now: Duration, event: Event) {
        if self.closed {
            return;
        }
        match event {
            Event::Connected { keys } => self.connected(now, &keys),
            Event::Received { stream, bytes } => self.received(now, stream, &bytes),
            Event::Disconnected { why } => self.close(CloseReason::Disconnected(why), None),
            Event::NotShared => self.not_shared(),
            Event::Dictionary(shipment) => self.compression.trained(shipment),
            Event::Daemon(input) => self.daemon(input),
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        if self.closed {
            return None;
        }
        let unfinished = self.unfinished.deadline(self.config.frame_timeout);
        let alive = self.liveness_deadline();
        Some(unfinished.map_or(alive, |at| at.min(alive)))
    }

    fn liveness_deadline(&self) -> Duration {
        let liveness = &self.liveness;
        match (&self.established, liveness.ping_sent) {
            (None, _) => liveness.started + self.config.hello_timeout,
            (Some(_), Some(sent)) => sent + self.config.heartbeat_timeout,
            (Some(_), None) => liveness.last_heard + self.config.heartbeat_interval,
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.next_timeout().is_none_or(|at| now < at) {
            return;
        }
        self.check_unfinished(now);
        if self.closed || now < self.liveness_deadline() {
            return;
        }
        if self.established.is_none() {
            return self.close(CloseReason::HelloTimeout, Some(ErrorMessage::Heartbeat));
        }
        match self.liveness.ping_sent {
            // Any authentic frame since the heartbeat is as good as its answer.
            Some(sent) if self.liveness.last_heard <= sent => {
                self.close(CloseReason::HeartbeatTimeout, Some(ErrorMessage::Heartbeat));
            }
            Some(_) => self.liveness.ping_sent = None,
            None => {
                self.liveness.pings += 1;
                self.liveness.ping_sent = Some(now);
                self.control.ping(self.liveness.pings);
            }
        }
    }

    /// A frame that does not come to its end was damaged.
    fn check_unfinished(&mut self, now: Duration) {
        let timeout = self.config.frame_timeout;
        while let Some((stream, sequence, bytes)) = self.unfinished.stalled(now, timeout) {
            if stream == Stream::Data && self.paused {
                self.paused = !self.accepts_data();
                self.unfinished.excuse(now, stream);
                continue;
            }
            let seconds = timeout.as_secs();
            return self.broke_protocol(format!(
                "frame {sequence} on the {stream:?} stream does not come to its end: {bytes} bytes \
                 of it were there {seconds} s ago, and hardly any since"
            ));
        }
    }

    /// Whether [`poll_transmit`](Self::poll_transmit) would give a frame.
    #[must_use]
    pub fn has_transmit(&self, stream: Stream) -> bool {
        let Some(channel) = &self.channel else {
            return false;
        };
        match stream {
            Stream::Control => self
                .control
                .has_transmit(self.established.is_some(), self.config.control_window),
            Stream::Data => {
                let sequence = channel.data_out.last_sequence();
                self.data.has_transmit(sequence, self.config.data_window)
            }
        }
    }

    /// The next frame to write to a stream. After the session was closed, its last frame tells the
    /// peer why.
    pub fn poll_transmit(&mut self, stream: Stream) -> Option<WireFrame> {
        let channel = self.channel.as_mut()?;
        match stream {
            Stream::Control => self.control.transmit(
                &mut channel.control_out,
                self.established.is_some(),
                self.config.control_window,
            ),
            Stream::Data => {
                let (sealer, window) = (&mut channel.data_out, self.config.data_window);
                // A dictionary goes right before the first message that may need it.
                if self.data.has_transmit(sealer.last_sequence(), window)
                    && let Some(message) = self.compression.dictionary_to_send()
                {
                    let (head, body) = message.encode();
                    return Some(sealer.seal(FrameKind::Data, true, &head, body));
                }
                self.data.transmit(
                    sealer,
                    window,
                    self.config.chunk_bytes,
                    &mut self.compression,
                )
            }
        }
    }

    /// Samples of what was sent, when a dictionary is due. Whoever takes them trains it away from
    /// this session and gives it to all sessions of the volume, with [`Event::Dictionary`].
    pub fn take_samples(&mut self) -> Option<Samples> {
        self.compression.take_samples()
    }

    /// What compression has done in this session so far.
    #[must_use]
    pub fn compression(&self) -> CompressionStatus {
        self.compression.status()
    }

    /// Whether [`poll_output`](Self::poll_output) would give one.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// The next output for the daemon. Taking it is what lets the peer send more.
    pub fn poll_output(&mut self) -> Option<Output> {
        let (stream, output) = self.outputs.pop_front()?;
        match stream {
            Some(Stream::Control) => self.control_progress.pending -= 1,
            Some(Stream::Data) => self.data_progress.pending -= 1,
            None => {}
        }
        self.tell_progress();
        Some(output)
    }

    /// Whether the session is over. Outputs and a last frame may still wait.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether hello was accepted.
    #[must_use]
    pub fn is_established(&self) -> bool {
        self.established.is_some() && !self.closed
    }

    /// Whether the driver should give it more of the daemon's inputs. A daemon that keeps within
    /// the peer's credit finds it always true.
    #[must_use]
    pub fn accepts_input(&self) -> bool {
        self.data.queued_bytes() < self.config.queue_bytes
            && self.data.queued_messages() < MAX_QUEUED_MESSAGES
    }

    /// Whether the driver should read on from the data stream. The control stream is always read.
    #[must_use]
    pub fn accepts_data(&self) -> bool {
        self.data_progress.pending < MAX_PENDING_DATA
    }

    /// Time between the last heartbeat and its answer.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.liveness.round_trip
    }

    fn connected(&mut self, now: Duration, keys: &SessionKeys) {
        let max_message_bytes = self.config.max_piece_bytes.max(self.config.chunk_bytes);
        let max_data_bytes = max_message_bytes.max(MAX_DELTA_BYTES) + DATA_HEADER_BYTES;
        let opener = FrameOpener::new;
        self.channel = Some(Channel {
            control_out: FrameSealer::new(Stream::Control, &keys.control.send),
            data_out: FrameSealer::new(Stream::Data, &keys.data.send),
            control_in: opener(Stream::Control, &keys.control.receive, MAX_CONTROL_BYTES),
            data_in: opener(Stream::Data, &keys.data.receive, max_data_bytes),
        });
        (self.liveness.started, self.liveness.last_heard) = (now, now);
        self.said = self.local.clone();
        let hello = self.our_hello();
        self.control.hello(ControlMessage::Hello(Box::new(hello)));
    }

    fn not_shared(&mut self) {
        let reason = Refusal {
            found_by: FoundBy::Peer,
            field: Field::NotShared,
            ours: self.local.volume.to_string(),
            theirs: "a list without it".to_owned(),
        };
        self.output(None, Output::Refused { reason });
        self.close(CloseReason::Refused, None);
    }

    pub(super) fn our_hello(&self) -> Hello {
        Hello {
            protocol: self.config.protocol,
            capabilities: self.config.capabilities.clone(),
            state: self.local.clone(),
        }
    }

    fn daemon(&mut self, input: Input) {
        match input {
            Input::LocalState(state) => self.local_state(state),
            Input::Anchored { epoch, chain } => self.control.anchored((epoch, chain)),
            Input::Ack(ack) => self.control.ack(ack),
            Input::Credit { bytes } => {
                self.inbound.grant(bytes);
                self.control.credit(bytes);
            }
            Input::SeedAck { cursor_bytes } => self.control.seed_ack(cursor_bytes),
            Input::Subscribe { tip, anchored } => {
                self.inbound.expect_feed();
                self.ask_peer(ControlMessage::Subscribe { tip, anchored });
            }
            Input::Ping => {
                self.liveness.pings += 1;
                self.liveness.asked = Some(self.liveness.pings);
                self.control.ping(self.liveness.pings);
            }
            Input::StepDown => self.ask_peer(ControlMessage::StepDown),
            Input::Proof(message) => self.ask_peer(ControlMessage::Proof(message)),
            Input::Root(root) => self.control.root(root),
            Input::Tree(message) => self.ask_peer(ControlMessage::Tree(message)),
            Input::Close => self.close(CloseReason::Local, Some(ErrorMessage::Closing)),
            Input::FeedOpened { .. }
            | Input::FeedRefused(_)
            | Input::SendEpoch { .. }
            | Input::SeedStart { .. }
            | Input::SeedPiece(_)
            | Input::SeedEnd { .. } => {
                if let Err(what) = self.feed(input) {
                    self.misuse(what);
                }
            }
        }
    }

    /// What only the sending side of a feed or of a copy may ask for.
    fn feed(&mut self, input: Input) -> Result<(), String> {
        match input {
            Input::FeedOpened { from } => {
                if !self.peer_subscribed {
                    return Err("a feed that the peer did not subscribe to".to_owned());
                }
                (self.feeding, self.next_epoch) = (true, Some(from));
                self.data.queue(DataMessage::FeedBegin { from });
            }
            Input::FeedRefused(refusal) => self.refuse_feed(refusal),
            Input::SendEpoch { epoch, frame } => self.send_epoch(epoch, frame)?,
            Input::SeedStart {
                from,
                log_offset,
                cursor_bytes,
            } => {
                if !self.peer_wants_seed {
                    return Err("a full copy that the peer did not ask for".to_owned());
                }
                (self.feeding, self.next_epoch) = (true, None);
                self.data.queue(DataMessage::SeedStart {
                    from,
                    log_offset,
                    cursor_bytes,
                });
            }
            Input::SeedPiece(piece) => {
                let offset_bytes = piece.offset_bytes;
                self.data.queue(match piece.kind {
                    PieceKind::Data(bytes) => {
                        if bytes.is_empty() || bytes.len() > self.config.max_piece_bytes {
                            return Err(format!("a piece of {} bytes", bytes.len()));
                        }
                        DataMessage::SeedData {
                            offset_bytes,
                            checksum: piece.checksum,
                            bytes,
                        }
                    }
                    PieceKind::Zero { length } => DataMessage::SeedZero {
                        offset_bytes,
                        length,
                    },
                    PieceKind::Same { length } => {
                        let peer = self.established.as_ref().map(|known| &known.peer);
                        if !peer.is_some_and(|peer| peer.resyncs) {
                            return Err("a piece that the peer does not understand".to_owned());
                        }
                        DataMessage::SeedSame {
                            offset_bytes,
                            length,
                        }
                    }
                });
            }
            Input::SeedEnd { usable_after } => {
                self.data.queue(DataMessage::SeedEnd { usable_after });
            }
            _ => {}
        }
        Ok(())
    }

    fn refuse_feed(&mut self, refusal: FeedRefusal) {
        self.peer_subscribed = false;
        self.ask_peer(ControlMessage::FeedRefused(refusal));
    }

    fn send_epoch(&mut self, epoch: Epoch, frame: Bytes) -> Result<(), String> {
        if !self.feeding {
            return Err(format!("epoch {epoch} without an open feed"));
        }
        if let Some(next) = self.next_epoch.filter(|&next| next != epoch) {
            return Err(format!("epoch {epoch} where epoch {next} should follow"));
        }
        let limit = self.max_frame_bytes();
        if frame.is_empty() || frame.len() as u64 > limit {
            let length = frame.len();
            return Err(format!(
                "epoch {epoch} of {length} bytes; the peer takes 1 to {limit}"
            ));
        }
        self.next_epoch = Some(epoch.next());
        self.data.queue_epoch(epoch, frame);
        Ok(())
    }

    pub(super) fn max_frame_bytes(&self) -> u64 {
        let agreed = self
            .established
            .as_ref()
            .map(|established| &established.agreed);
        let max_epoch_bytes = agreed.map_or(0, |agreed| agreed.max_epoch_bytes);
        max_epoch_bytes.saturating_add(self.config.epoch_overhead_bytes)
    }

    fn local_state(&mut self, state: LocalState) {
        let old = std::mem::replace(&mut self.local, state);
        let new = &self.local;
        if new.volume != old.volume || new.node != old.node {
            return self.misuse("a local state of another volume or node".to_owned());
        }
        let Some(established) = &self.established else {
            // Hello is under way with the old state; the peer hears the new one after its own.
            if new.role != old.role || new.term != old.term {
                self.close(CloseReason::RoleChanged, Some(ErrorMessage::RoleChanged));
            }
            return;
        };
        let adopts = new.role == Role::Replica && new.term == established.peer.term;
        if new.role != old.role || (new.term != old.term && !adopts) {
            return self.close(CloseReason::RoleChanged, Some(ErrorMessage::RoleChanged));
        }
        if is_news(new, &old) {
            self.control.state(self.local.clone());
        }
        self.ask_if_due();
    }

    /// Asks the peer for the log or for a copy, if the states of both sides call for it.
    pub(super) fn ask_if_due(&mut self) {
        let Some(established) = &self.established else {
            return;
        };
        match self.asked.next(&self.local, &established.peer) {
            None => {}
            Some(Ask::Feed) => {
                self.inbound.expect_feed();
                let (tip, anchored) = (self.local.tip, self.local.anchored);
                self.ask_peer(ControlMessage::Subscribe { tip, anchored });
            }
            Some(Ask::Seed { cursor_bytes }) => {
                self.inbound.expect_seed();
                let from = match self.local.copy {
                    CopyState::Shadowing { from, .. } => from,
                    _ => self.local.tip,
                };
                self.ask_peer(ControlMessage::SeedRequest { cursor_bytes, from });
            }
        }
    }

    pub(super) fn ask_peer(&mut self, message: ControlMessage) {
        if self.control.queue(message).is_err() {
            self.misuse("more requests than the peer takes".to_owned());
        }
    }

    fn misuse(&mut self, what: String) {
        self.close(CloseReason::Misuse(what), Some(ErrorMessage::Closing));
    }

    /// Ends the session. Nothing that waited is sent any more, except the reason.
    pub(super) fn close(&mut self, reason: CloseReason, error: Option<ErrorMessage>) {
        if self.closed {
            return;
        }
        self.closed = true;
        self.data.clear();
        self.control.finish(error);
        self.outputs.push_back((None, Output::Closed { reason }));
    }

    pub(super) fn output(&mut self, stream: Option<Stream>, output: Output) {
        match stream {
            Some(Stream::Control) => self.control_progress.pending += 1,
            Some(Stream::Data) => {
                self.data_progress.pending += 1;
                self.paused |= !self.accepts_data();
            }
            None => {}
        }
        self.outputs.push_back((stream, output));
    }
}
