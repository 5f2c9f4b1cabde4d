//! What a session does with what the peer sends.

use std::time::Duration;

use super::api::{CloseReason, FeedRefusal, LocalState, Output, Refusal, Role};
use super::core::{Established, Session};
use super::hello::{compare, compare_identity, is_news};
use super::inbound::Bounds;
use super::roles::compare_roles;
use crate::wire::control::{ControlMessage, ErrorMessage, Heartbeat, Hello};
use crate::wire::data::{DATA_HEADER_BYTES, DataMessage};
use crate::wire::{FrameKind, OpenFrame, Stream, WireError};

/// The peer is told of handled frames in steps of this many, a quarter of the smaller window.
const TELL_EVERY: u64 = 64;

impl Session {
    pub(super) fn received(&mut self, now: Duration, stream: Stream, bytes: &[u8]) {
        let Some(channel) = &mut self.channel else {
            return;
        };
        let opener = match stream {
            Stream::Control => &mut channel.control_in,
            Stream::Data => &mut channel.data_in,
        };
        opener.push(bytes);
        while let Some(frame) = self.next_frame(stream) {
            self.liveness.last_heard = now;
            if let Err(what) = self.frame(now, stream, frame) {
                return self.broke_protocol(what);
            }
            if self.closed {
                return;
            }
        }
        if let Some(channel) = &self.channel {
            let opener = match stream {
                Stream::Control => &channel.control_in,
                Stream::Data => &channel.data_in,
            };
            self.unfinished.look(now, stream, opener.unfinished());
        }
        self.tell_progress();
    }

    fn next_frame(&mut self, stream: Stream) -> Option<OpenFrame> {
        let channel = self.channel.as_mut()?;
        let opener = match stream {
            Stream::Control => &mut channel.control_in,
            Stream::Data => &mut channel.data_in,
        };
        match opener.next_frame() {
            Ok(frame) => frame,
            Err(error) => {
                self.broke_protocol(error.to_string());
                None
            }
        }
    }

    pub(super) fn broke_protocol(&mut self, what: String) {
        let error = ErrorMessage::Protocol(what.clone());
        self.close(CloseReason::Protocol(what), Some(error));
    }

    fn frame(&mut self, now: Duration, stream: Stream, frame: OpenFrame) -> Result<(), String> {
        let text = |error: WireError| error.to_string();
        match stream {
            Stream::Control => self.control_progress.handled = frame.sequence,
            Stream::Data => self.data_progress.handled = frame.sequence,
        }
        match frame.kind {
            FrameKind::Control => {
                let message = ControlMessage::decode(frame.payload).map_err(text)?;
                self.control_message(message)?;
                if self.control_progress.pending > self.config.control_window {
                    return Err("more control frames than the window allows".to_owned());
                }
                Ok(())
            }
            FrameKind::Data => {
                let message = self.bulk_message(frame).map_err(text)?;
                self.data_message(message)
            }
            FrameKind::Heartbeat => {
                self.heartbeat(now, Heartbeat::decode(frame.payload).map_err(text)?);
                Ok(())
            }
            FrameKind::Error => {
                self.peer_error(ErrorMessage::decode(frame.payload).map_err(text)?);
                Ok(())
            }
        }
    }

    fn heartbeat(&mut self, now: Duration, heartbeat: Heartbeat) {
        if heartbeat.answer
            && self
                .liveness
                .asked
                .take_if(|id| *id <= heartbeat.id)
                .is_some()
        {
            self.output(None, Output::Alive);
        }
        if !heartbeat.answer {
            self.control.pong(heartbeat.id);
        } else if heartbeat.id == self.liveness.pings
            && let Some(sent) = self.liveness.ping_sent.take()
        {
            self.liveness.round_trip = Some(now.saturating_sub(sent));
        }
    }

    fn peer_error(&mut self, error: ErrorMessage) {
        let reason = match error {
            ErrorMessage::Refused(reason) => {
                self.output(None, Output::Refused { reason });
                CloseReason::Refused
            }
            ErrorMessage::Protocol(text) => CloseReason::PeerError(text),
            ErrorMessage::Heartbeat => CloseReason::PeerError("it heard nothing of us".to_owned()),
            ErrorMessage::RoleChanged => {
                CloseReason::PeerError("its role or term changed".to_owned())
            }
            ErrorMessage::Closing => CloseReason::PeerError("it is closing".to_owned()),
        };
        self.close(reason, None);
    }

    fn bulk_message(&mut self, frame: OpenFrame) -> Result<DataMessage, WireError> {
        let packed = frame.payload.len().saturating_sub(DATA_HEADER_BYTES);
        if !frame.packed {
            let message = DataMessage::decode(frame.payload)?;
            let is_dictionary = matches!(message, DataMessage::Dictionary { .. });
            let raw = if is_dictionary { 0 } else { packed };
            self.compression.received(raw, packed);
            return Ok(message);
        }
        let most = self.config.max_piece_bytes.max(self.config.chunk_bytes);
        let compression = &mut self.compression;
        DataMessage::decode_packed(frame.payload, |segment| compression.unpack(&segment, most))
    }

    fn data_message(&mut self, message: DataMessage) -> Result<(), String> {
        if self.established.is_none() {
            return Err("data before hello".to_owned());
        }
        if let DataMessage::Dictionary { bytes } = message {
            return self.compression.learn(&bytes);
        }
        let bounds = Bounds {
            max_frame_bytes: self.max_frame_bytes(),
            max_piece_bytes: self.config.max_piece_bytes,
            volume_bytes: self.local.size_bytes,
        };
        if let Some(output) = self.inbound.take(message, bounds)? {
            self.output(Some(Stream::Data), output);
        }
        Ok(())
    }

    fn control_message(&mut self, message: ControlMessage) -> Result<(), String> {
        let message = match (message, self.established.is_some()) {
            (ControlMessage::Hello(hello), false) => {
                self.hello(*hello);
                return Ok(());
            }
            (ControlMessage::Hello(_), true) => return Err("a second hello".to_owned()),
            (_, false) => return Err("a message before hello".to_owned()),
            (message, true) => message,
        };
        self.may_say(&message)?;
        let output = match message {
            ControlMessage::Hello(_) => return Ok(()),
            ControlMessage::FrameAck {
                control_sequence,
                data_sequence,
            } => {
                return self.frame_ack(control_sequence, data_sequence);
            }
            ControlMessage::State(state) => return self.peer_state(*state),
            ControlMessage::Subscribe { tip, anchored } => {
                self.peer_subscribed = true;
                Output::Subscribe { tip, anchored }
            }
            ControlMessage::SeedRequest { cursor_bytes, from } => {
                self.peer_wants_seed = true;
                Output::SeedRequest { cursor_bytes, from }
            }
            ControlMessage::FeedRefused(refusal) => {
                self.asked.refused(refusal);
                match refusal {
                    FeedRefusal::Truncate { to } => Output::Truncate { to },
                    FeedRefusal::Diverged { epoch } => Output::Diverged { epoch },
                    FeedRefusal::TooOld { oldest } => Output::TooOld { oldest },
                }
            }
            ControlMessage::Anchored((epoch, chain)) => Output::Anchored { epoch, chain },
            ControlMessage::Ack(ack) => Output::PeerAck(ack),
            ControlMessage::Credit { bytes } => {
                self.data.grant(bytes);
                Output::PeerCredit { bytes }
            }
            ControlMessage::SeedAck { cursor_bytes } => Output::SeedAck { cursor_bytes },
            ControlMessage::TermNotice(term) => Output::HigherTerm { term },
            ControlMessage::StepDown => Output::StepDown,
            ControlMessage::Proof(message) => Output::Proof(message),
            ControlMessage::Root(root) => Output::Root(root),
            ControlMessage::Tree(message) => Output::Tree(message),
        };
        self.output(Some(Stream::Control), output);
        // A refusal may already be answered by the state: the copy was dropped meanwhile.
        self.ask_if_due();
        Ok(())
    }

    /// What only a primary says, or somebody who wants to be one.
    fn may_say(&self, message: &ControlMessage) -> Result<(), String> {
        let leads = match message {
            ControlMessage::TermNotice(_) | ControlMessage::StepDown => true,
            // A copy whose tail we pull tells how much of it is anchored.
            ControlMessage::Anchored(_) => !self.inbound.may_feed(),
            _ => false,
        };
        if leads && !self.config.peer_roles.primary {
            return Err("the word of a primary, from a peer that may only be replica".to_owned());
        }
        Ok(())
    }

    fn hello(&mut self, theirs: Hello) {
        let agreed = compare(&self.our_hello(), &theirs);
        let roles = compare_roles(self.config.peer_roles, &self.local, &theirs.state);
        match agreed.and_then(|agreed| roles.map(|()| agreed)) {
            Err(refusal) => self.refuse(refusal),
            Ok(agreed) => {
                let peer = theirs.state;
                self.output(None, Output::PeerState(peer.clone()));
                let (ours, theirs) = (self.local.term, peer.term);
                if theirs.counter > ours.counter {
                    self.output(None, Output::HigherTerm { term: theirs });
                } else if ours.counter > theirs.counter && peer.role == Role::Primary {
                    self.ask_peer(ControlMessage::TermNotice(ours));
                }
                if agreed.scxq2()
                    && let Some(channel) = &mut self.channel
                {
                    channel.data_in.take_packed();
                    self.compression.agree();
                }
                self.established = Some(Established { peer, agreed });
                if is_news(&self.local, &self.said) {
                    self.control.state(self.local.clone());
                }
                self.ask_if_due();
            }
        }
    }

    fn peer_state(&mut self, state: LocalState) -> Result<(), String> {
        let Some(established) = &mut self.established else {
            return Ok(());
        };
        let old = &established.peer;
        if state.node != old.node || state.role != old.role {
            return Err("a state of another node or role than in hello".to_owned());
        }
        // Terms change with a new hello, except when a replica adopts ours.
        let adopts = state.role == Role::Replica && state.term == self.local.term;
        if state.term != old.term && !adopts {
            return Err(format!("term {} after hello said {}", state.term, old.term));
        }
        let roles = compare_roles(self.config.peer_roles, &self.local, &state);
        if let Err(refusal) = compare_identity(&self.local, &state).and(roles) {
            self.refuse(refusal);
            return Ok(());
        }
        established.peer = state.clone();
        self.output(Some(Stream::Control), Output::PeerState(state));
        self.ask_if_due();
        Ok(())
    }

    fn refuse(&mut self, reason: Refusal) {
        self.output(
            None,
            Output::Refused {
                reason: reason.clone(),
            },
        );
        self.close(CloseReason::Refused, Some(ErrorMessage::Refused(reason)));
    }

    fn frame_ack(&mut self, control_sequence: u64, data_sequence: u64) -> Result<(), String> {
        let Some(channel) = &self.channel else {
            return Ok(());
        };
        if control_sequence > channel.control_out.last_sequence()
            || data_sequence > channel.data_out.last_sequence()
        {
            return Err("an acknowledgement of frames that were never sent".to_owned());
        }
        self.control.acknowledged(control_sequence);
        self.data.acknowledged(data_sequence);
        Ok(())
    }

    /// Tells the peer what was handled, once it is worth a frame. A frame counts as handled when
    /// the daemon has taken what came of it and of all before it.
    pub(super) fn tell_progress(&mut self) {
        let reached = |progress: &super::core::Progress| {
            if progress.pending == 0 {
                progress.handled
            } else {
                progress.told
            }
        };
        let (control, data) = (
            reached(&self.control_progress),
            reached(&self.data_progress),
        );
        let is_due = control - self.control_progress.told >= TELL_EVERY
            || data - self.data_progress.told >= TELL_EVERY;
        if is_due && !self.closed {
            (self.control_progress.told, self.data_progress.told) = (control, data);
            self.control.frame_ack(control, data);
        }
    }
}
