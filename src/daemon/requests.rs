//! Answers to the control socket.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hn4::log::CopyState;
use hn4::types::NodeId;
use hn4_engine::core::event::Control;
use hn4_transport::session::Role;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::mesh::Reload;
use super::proof::rotation::Rotation;
use super::volume::{Ask, Report};
use crate::config::{Config, VolumeSection};
use crate::control::api::{ComparedReport, NodeStatus, Request, Response, VolumeReport};
use crate::control::report::{compression_report, report};
use crate::control::{proofs, trees};

/// A volume has this long to answer; it takes microseconds unless its thread is stuck.
const ANSWER: Duration = Duration::from_secs(5);
/// A primary that says nothing for so long may be replaced.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);
/// How often a waiting request looks again.
const LOOK: Duration = Duration::from_millis(20);
/// Flushes and drains of one volume that are not done yet. They go on when who asked is gone, so
/// the places of the control socket do not bound them.
const UNFINISHED_MAX: usize = 256;

#[derive(Clone)]
pub(super) struct Volume {
    pub(super) name: String,
    /// Its section of the configuration; the peers in it may change.
    section: watch::Receiver<Arc<VolumeSection>>,
    pub(super) asks: mpsc::Sender<Ask>,
    unfinished: Arc<Semaphore>,
}

/// What the control socket can ask about.
pub(super) struct Node {
    name: String,
    id: NodeId,
    started: Instant,
    volumes: Vec<Volume>,
    reloads: mpsc::Sender<Reload>,
    rotation: Rotation,
}

pub(super) fn error(what: String, why: impl Into<String>, next: impl Into<String>) -> Response {
    Response::Error {
        what,
        why: why.into(),
        next: next.into(),
    }
}

impl Node {
    pub(super) fn new(
        config: &Config,
        id: NodeId,
        started: Instant,
        reloads: mpsc::Sender<Reload>,
    ) -> Self {
        Self {
            name: config.node.name.clone(),
            id,
            started,
            volumes: Vec::new(),
            reloads,
            rotation: Rotation::new(&config.node.state_dir),
        }
    }

    pub(super) fn add(
        &mut self,
        section: watch::Receiver<Arc<VolumeSection>>,
        asks: mpsc::Sender<Ask>,
    ) {
        let name = section.borrow().name.clone();
        self.volumes.push(Volume {
            name,
            section,
            asks,
            unfinished: Arc::new(Semaphore::new(UNFINISHED_MAX)),
        });
    }

    pub(super) fn asks(&self) -> impl Iterator<Item = &mpsc::Sender<Ask>> {
        self.volumes.iter().map(|volume| &volume.asks)
    }

    /// Goes on with keys that were being replaced when the last daemon ended.
    pub(super) fn resume_rotation(&self) {
        self.rotation.clone().go_on(self.volumes.clone());
    }

    /// Answers when it is done, without holding up anybody else. What was begun goes on when who
    /// asked is gone.
    pub(super) fn answer(&self, request: Request, mut reply: oneshot::Sender<Response>) {
        if let Request::Reload {
            accept_fewer_copies,
        } = request
        {
            let reloads = self.reloads.clone();
            tokio::spawn(async move {
                // Who asked may be gone.
                let _ = reply.send(reload(&reloads, accept_fewer_copies).await);
            });
            return;
        }
        if let Request::RotateKeys { algorithms } = &request {
            let (rotation, algorithms) = (self.rotation.clone(), algorithms.clone());
            let volumes = self.volumes.clone();
            tokio::spawn(async move {
                // Who asked may be gone.
                let _ = reply.send(rotation.rotate(&algorithms, volumes).await);
            });
            return;
        }
        let Some(name) = request.volume() else {
            let volumes = self.volumes.clone();
            let (node, id) = (self.name.clone(), self.id);
            let uptime = self.started.elapsed();
            tokio::spawn(async move {
                // Who asked may be gone.
                let _ = reply.send(status(node, id, uptime, volumes).await);
            });
            return;
        };
        let mut volumes = self.volumes.iter();
        let Some(volume) = volumes.find(|volume| volume.name == name) else {
            let known = self.volumes.iter().map(|volume| volume.name.as_str());
            let known: Vec<&str> = known.collect();
            let why = format!(
                "the configuration has no volume {name}, only: {}",
                known.join(", ")
            );
            let _ = reply.send(error(format!("{request:?}"), why, "name one of them"));
            return;
        };
        let volume = volume.clone();
        tokio::spawn(async move {
            let only_looks = matches!(request, Request::Wait { .. });
            tokio::select! {
                answer = volume.answer(request) => {
                    // Who asked may be gone.
                    let _ = reply.send(answer);
                }
                () = reply.closed(), if only_looks => {}
            }
        });
    }
}

async fn reload(reloads: &mpsc::Sender<Reload>, accept_fewer_copies: bool) -> Response {
    let what = "take over the configuration's peers".to_owned();
    let (reply, answer) = oneshot::channel();
    let reload = Reload {
        accept_fewer_copies,
        reply: Some(reply),
    };
    if reloads.send(reload).await.is_err() {
        return error(what, "the daemon is stopping", "start it again");
    }
    match answer.await {
        Ok(Ok(message)) => Response::Done { message },
        Ok(Err(why)) => error(what, format!("{why:#}"), "see hn4ctl status"),
        Err(_) => error(what, "the daemon is stopping", "start it again"),
    }
}

async fn status(node: String, id: NodeId, uptime: Duration, volumes: Vec<Volume>) -> Response {
    let mut reports: Vec<VolumeReport> = Vec::new();
    for volume in volumes {
        let state = volume.report().await;
        let shard = state
            .as_ref()
            .map(|state| &state.shard)
            .ok_or("it does not answer");
        let links = state
            .as_ref()
            .map(|state| state.links.as_slice())
            .unwrap_or_default();
        let section = match &state {
            Some(state) => Arc::clone(&state.section),
            None => volume.section(),
        };
        let mut report = report(shard, &section, links);
        let compression = state.iter().flat_map(|state| &state.compression);
        for (peer, status) in report.peers.iter_mut().zip(compression) {
            peer.compression = compression_report(status);
        }
        let compared = state.iter().flat_map(|state| &state.compared);
        for (peer, compared) in report.peers.iter_mut().zip(compared) {
            peer.compared = compared.map(|compared| ComparedReport {
                equal: compared.ours == compared.theirs,
                epoch: compared.at.epoch.0,
                age_ms: u64::try_from(compared.when.elapsed().as_millis()).unwrap_or(u64::MAX),
                root: compared.ours.to_string(),
                peer_root: compared.theirs.to_string(),
            });
        }
        trees::add_differences(&mut report);
        let proof = state.as_ref().and_then(Report::proof);
        if let Some(proof) = proof {
            proofs::add(&mut report, proof);
        }
        if let Some(tree) = state.as_ref().and_then(Report::tree) {
            trees::add(&mut report, tree);
        }
        reports.push(report);
    }
    Response::Status(NodeStatus {
        node,
        node_id: id.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
        volumes: reports,
    })
}

impl Volume {
    pub(super) fn section(&self) -> Arc<VolumeSection> {
        Arc::clone(&self.section.borrow())
    }

    pub(super) async fn report(&self) -> Option<Report> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Status(reply)).await.ok()?;
        tokio::time::timeout(ANSWER, answer).await.ok()?.ok()
    }

    async fn answer(&self, request: Request) -> Response {
        let name = &self.name;
        match request {
            Request::Status | Request::Reload { .. } | Request::RotateKeys { .. } => {
                error(format!("{request:?}"), "not of a volume", "ask without one")
            }
            Request::Flush { .. } => {
                let done = format!("{name}: everything written before is durable");
                self.bounded(Control::Flush, format!("flush {name}"), done)
                    .await
            }
            Request::Drain { .. } => {
                let done = format!("{name}: the backing holds everything that may be written back");
                self.bounded(Control::Drain, format!("drain {name}"), done)
                    .await
            }
            Request::Verify { .. } => {
                let (reply, answer) = oneshot::channel();
                let done = format!(
                    "{name}: a deep verify has begun; `hn4ctl status` shows how far it is and \
                     what it has found"
                );
                self.finish(Ask::Verify(reply), answer, format!("verify {name}"), done)
                    .await
            }
            Request::Demote { .. } => {
                let done = format!("{name}: this node is a replica now");
                self.control(Control::Demote, format!("demote {name}"), done)
                    .await
            }
            Request::Promote { accept_loss, .. } => self.promote(accept_loss).await,
            Request::Switchover { timeout_ms, .. } => self.switchover(timeout_ms).await,
            Request::Wait {
                applied,
                timeout_ms,
                ..
            } => self.wait(applied, timeout_ms).await,
        }
    }

    /// For what may take as long as its peers or its disks do.
    async fn bounded(&self, control: Control, what: String, done: String) -> Response {
        let Ok(_place) = self.unfinished.try_acquire() else {
            let why = format!("{UNFINISHED_MAX} flushes and drains are not done yet");
            return error(what, why, "hn4ctl status says what the volume waits for");
        };
        self.control(control, what, done).await
    }

    async fn control(&self, control: Control, what: String, done: String) -> Response {
        let (reply, answer) = oneshot::channel();
        self.finish(Ask::Control(control, reply), answer, what, done)
            .await
    }

    async fn finish(
        &self,
        ask: Ask,
        answer: oneshot::Receiver<Result<(), String>>,
        what: String,
        done: String,
    ) -> Response {
        let ended = "the volume has ended";
        let next = "see hn4ctl status and the daemon's log";
        if self.asks.send(ask).await.is_err() {
            return error(what, ended, next);
        }
        match answer.await {
            Ok(Ok(())) => Response::Done { message: done },
            Ok(Err(why)) => error(what, why, "see hn4ctl status"),
            Err(_) => error(what, ended, next),
        }
    }

    /// A promotion must not lose what was acknowledged: of n copies besides the primary k have it,
    /// so n - k + 1 of all n + 1 must obey the new term before the longest history is known.
    fn answers(&self) -> usize {
        let section = self.section();
        (section.peers.len() + 1).saturating_sub(section.required_peers())
    }

    async fn promote(&self, accept_loss: bool) -> Response {
        let name = &self.name;
        let what = format!("promote {name}");
        let Some(report) = self.report().await else {
            return error(what, "the volume does not answer", "see the daemon's log");
        };
        if !accept_loss && let Some(primary) = self.living_primary(&report).await {
            let why = format!("{primary} is primary and connected; its clients would be cut off");
            let next = format!("for an orderly change: hn4ctl switchover {name}");
            return error(what, why, next);
        }
        if !accept_loss && let Some(why) = known_damage(&report) {
            let next = "promote a copy without damage, or wait for the repair from a peer; to \
                        serve this one with errors where it is damaged: --accept-loss";
            return error(what, why, next);
        }
        self.take_over(what, if accept_loss { 0 } else { self.answers() })
            .await
    }

    async fn take_over(&self, what: String, answers: usize) -> Response {
        let name = &self.name;
        let (reply, answer) = oneshot::channel();
        if self
            .asks
            .send(Ask::Promote { answers, reply })
            .await
            .is_err()
        {
            return error(what, "the volume has ended", "see the daemon's log");
        }
        let why = match answer.await {
            Ok(Ok(())) => {
                let tip = self
                    .report()
                    .await
                    .map(|report| report.shard.copy.tip.epoch);
                let from = tip.map_or(String::new(), |tip| format!(", from epoch {tip} on"));
                let message = format!("{name}: this node is the primary now{from}");
                return Response::Done { message };
            }
            Ok(Err(why)) => why,
            Err(_) => "the volume has ended".to_owned(),
        };
        let next = format!(
            "see `hn4ctl status` for what keeps the other copies. If they are gone for good: \
             `hn4ctl promote {name} --accept-loss`"
        );
        error(what, why, next)
    }

    /// Name of the peer that is primary and gives a sign of life. A connection alone proves
    /// nothing: that a node was killed is noticed only seconds later.
    async fn living_primary(&self, report: &Report) -> Option<String> {
        let peer = report.primary()?;
        let (reply, answer) = oneshot::channel();
        self.asks
            .send(Ask::Ping {
                peer: peer.clone(),
                reply,
            })
            .await
            .ok()?;
        tokio::time::timeout(SIGN_OF_LIFE, answer)
            .await
            .ok()?
            .ok()?;
        Some(peer)
    }

    /// The planned change of primary: it writes everything back and becomes a replica, then this
    /// node takes over. Nothing is lost, and there is no fork.
    async fn switchover(&self, timeout_ms: u64) -> Response {
        let name = &self.name;
        let what = format!("switch {name} over to this node");
        let deadline = Instant::now() + Duration::from_millis(timeout_ms);
        let asked = self.report().await;
        let damage = asked.as_ref().and_then(known_damage);
        let asked = asked.and_then(|report| Some((report.primary()?, report.shard.copy)));
        let Some((peer, copy)) = asked else {
            let why = "no connected peer is primary";
            let next = format!("without a primary: hn4ctl promote {name}");
            return error(what, why, next);
        };
        if copy.copy != CopyState::Usable {
            let why = "this copy is not usable: it has not received everything yet";
            return error(what, why, "wait until hn4ctl status shows it usable");
        }
        if let Some(why) = damage {
            let next = "wait until it is repaired from the primary's copy, or write those blocks \
                        again; hn4ctl status tells";
            return error(what, why, next);
        }
        let ask = Ask::StepDown { peer: peer.clone() };
        if self.asks.send(ask).await.is_err() {
            return error(what, "the volume has ended", "see the daemon's log");
        }
        loop {
            let Some(report) = self.report().await else {
                return error(what, "the volume does not answer", "see the daemon's log");
            };
            if report.role_of(&peer) == Some(Role::Replica) {
                break;
            }
            if Instant::now() >= deadline {
                let why = format!("the primary has not handed over after {timeout_ms} ms");
                let next = format!(
                    "see hn4ctl status there. It refuses writes while it writes everything back, \
                     and then is a replica: `hn4ctl promote {name}` on either node goes on"
                );
                return error(what, why, next);
            }
            tokio::time::sleep(LOOK).await;
        }
        self.take_over(what, self.answers()).await
    }

    async fn wait(&self, applied: u64, timeout_ms: u64) -> Response {
        let name = &self.name;
        let what = format!("wait for epoch {applied} of {name}");
        let deadline = Instant::now() + Duration::from_millis(timeout_ms);
        loop {
            let Some(report) = self.report().await else {
                return error(what, "the volume does not answer", "see the daemon's log");
            };
            let at = report.shard.copy.progress.applied.0;
            if at >= applied {
                return Response::Done {
                    message: format!("{name}: the backing is at epoch {at}"),
                };
            }
            if Instant::now() >= deadline {
                let why = format!("the backing is at epoch {at} after {timeout_ms} ms");
                return error(
                    what,
                    why,
                    format!("hn4ctl status says what {name} waits for"),
                );
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
/// What is known to be damaged in this copy.
fn known_damage(report: &Report) -> Option<String> {
    let tree = report.tree().filter(|tree| tree.bad_blocks > 0)?;
    let (count, places) = (tree.bad_blocks, tree.bad_lbas.join(", "));
    Some(format!(
        "this copy is DAMAGED: {count} blocks of its backing are not what was written there: \
         {places}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A node with one volume, and what its task is asked.
    fn node() -> (Node, mpsc::Receiver<Ask>) {
        let text = "[node]\nname = \"alpha\"\n[[volume]]\nname = \"vol0\"\n\
                    backing = \"one\"\nlog = \"two\"\n";
        let config = Config::parse(std::path::Path::new("/nowhere"), text).expect("good");
        let (reloads, _) = mpsc::channel(1);
        let mut node = Node::new(&config, NodeId([1; 16]), Instant::now(), reloads);
        let (asks, asked) = mpsc::channel(1);
        let section = watch::Sender::new(Arc::new(config.volumes[0].clone()));
        node.add(section.subscribe(), asks);
        (node, asked)
    }

    fn ask(node: &Node, request: Request) -> oneshot::Receiver<Response> {
        let (reply, answer) = oneshot::channel();
        node.answer(request, reply);
        answer
    }

    async fn next(asked: &mut mpsc::Receiver<Ask>) -> Option<Ask> {
        let next = tokio::time::timeout(LIMIT, asked.recv()).await;
        next.expect("in time")
    }

    fn flush() -> Request {
        let volume = "vol0".to_owned();
        Request::Flush { volume }
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_bounded_and_promotions_are_not() {
        let (node, mut asked) = node();
        let mut unfinished = Vec::new();
        for _ in 0..UNFINISHED_MAX {
            drop(ask(&node, flush()));
            unfinished.push(next(&mut asked).await.expect("a flush goes on"));
        }
        let refused = ask(&node, flush()).await.expect("an answer");
        assert!(matches!(refused, Response::Error { .. }), "{refused:?}");
        let volume = "vol0".to_owned();
        let _answer = ask(&node, Request::Demote { volume });
        let demote = next(&mut asked).await;
        assert!(matches!(demote, Some(Ask::Control(Control::Demote, _))));
        let Some(Ask::Control(Control::Flush, done)) = unfinished.pop() else {
            panic!("flushes");
        };
        done.send(Ok(())).expect("the daemon waits for it");
        // Its place is free for the next one, as soon as its task has heard.
        loop {
            let answer = ask(&node, flush());
            tokio::select! {
                refused = answer => assert!(refused.is_ok()),
                flush = next(&mut asked) => break assert!(flush.is_some()),
            }
        }
    }

    #[tokio::test]
    async fn a_wait_ends_with_who_asked_for_it() {
        let (node, mut asked) = node();
        let (volume, applied, timeout_ms) = ("vol0".to_owned(), 7, u64::MAX);
        let wait = Request::Wait {
            volume,
            applied,
            timeout_ms,
        };
        let answer = ask(&node, wait);
        let look = next(&mut asked).await;
        assert!(matches!(look, Some(Ask::Status(_))));
        drop((answer, node));
        // Nobody is left who could ask.
        assert!(next(&mut asked).await.is_none());
    }
}
