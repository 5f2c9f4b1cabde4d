//! Answers to the control socket.

use std::time::{Duration, Instant};

use hn4::log::Role;
use hn4::types::NodeId;
use hn4_engine::core::event::Control;
use tokio::sync::{mpsc, oneshot};

use super::volume::{Ask, Report};
use crate::config::{Config, VolumeSection};
use crate::control::api::{NodeStatus, Request, Response, VolumeReport};
use crate::control::report;

/// A volume has this long to answer; it takes microseconds unless its thread is stuck.
const ANSWER: Duration = Duration::from_secs(5);
/// How often a waiting request looks again.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Clone)]
struct Volume {
    section: VolumeSection,
    asks: mpsc::Sender<Ask>,
}

/// What the control socket can ask about.
pub(super) struct Node {
    name: String,
    id: NodeId,
    started: Instant,
    volumes: Vec<Volume>,
}

fn error(what: String, why: impl Into<String>, next: impl Into<String>) -> Response {
    Response::Error {
        what,
        why: why.into(),
        next: next.into(),
    }
}

impl Node {
    pub(super) fn new(config: &Config, id: NodeId, started: Instant) -> Self {
        Self {
            name: config.node.name.clone(),
            id,
            started,
            volumes: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, section: &VolumeSection, asks: mpsc::Sender<Ask>) {
        self.volumes.push(Volume {
            section: section.clone(),
            asks,
        });
    }

    pub(super) fn asks(&self) -> impl Iterator<Item = &mpsc::Sender<Ask>> {
        self.volumes.iter().map(|volume| &volume.asks)
    }

    /// Answers when it is done, without holding up anybody else.
    pub(super) fn answer(&self, request: Request, reply: oneshot::Sender<Response>) {
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
        let Some(volume) = self
            .volumes
            .iter()
            .find(|volume| volume.section.name == name)
        else {
            let known: Vec<&str> = self
                .volumes
                .iter()
                .map(|volume| volume.section.name.as_str())
                .collect();
            let why = format!(
                "the configuration has no volume {name}, only: {}",
                known.join(", ")
            );
            let _ = reply.send(error(format!("{request:?}"), why, "name one of them"));
            return;
        };
        let volume = volume.clone();
        tokio::spawn(async move {
            // Who asked may be gone.
            let _ = reply.send(volume.answer(request).await);
        });
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
        reports.push(report(shard, &volume.section, links));
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
    async fn report(&self) -> Option<Report> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Status(reply)).await.ok()?;
        tokio::time::timeout(ANSWER, answer).await.ok()?.ok()
    }

    async fn answer(&self, request: Request) -> Response {
        let name = &self.section.name;
        match request {
            Request::Status => error("status".to_owned(), "not of a volume", "ask without one"),
            Request::Flush { .. } => {
                let done = format!("{name}: everything written before is durable");
                self.control(Control::Flush, format!("flush {name}"), done)
                    .await
            }
            Request::Drain { .. } => {
                let done = format!("{name}: the backing holds everything that may be written back");
                self.control(Control::Drain, format!("drain {name}"), done)
                    .await
            }
            Request::Demote { .. } => {
                let done = format!("{name}: this node is a replica now");
                self.control(Control::Demote, format!("demote {name}"), done)
                    .await
            }
            Request::Promote { accept_loss, .. } => self.promote(accept_loss).await,
            Request::Wait {
                applied,
                timeout_ms,
                ..
            } => self.wait(applied, timeout_ms).await,
        }
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

    /// A promotion must not lose what was acknowledged: of n copies besides the primary, k have it,
    /// so n - k + 1 of them must be asked. This node is one of them; others cannot be asked yet.
    async fn promote(&self, accept_loss: bool) -> Response {
        let name = &self.section.name;
        let what = format!("promote {name}");
        let (copies, holders) = (self.section.peers.len(), self.section.required_peers());
        let needed = (copies + 1).saturating_sub(holders);
        let Some(report) = self.report().await else {
            return error(what, "the volume does not answer", "see the daemon's log");
        };
        let status = report.shard.copy;
        if needed > 1 && !accept_loss && status.role == Role::Replica {
            let why = format!(
                "{needed} of {copies} copies must be asked before it is certain that nothing \
                 acknowledged is lost (acknowledgements wait for {holders}), and only this one can \
                 be. It ends at epoch {}; what the old primary sealed after that would be lost",
                status.tip.epoch
            );
            let next =
                format!("if the old primary is gone for good: hn4ctl promote {name} --accept-loss");
            return error(what, why, next);
        }
        let (reply, answer) = oneshot::channel();
        let done = format!(
            "{name}: this node is the primary now, from epoch {} on",
            status.tip.epoch
        );
        self.finish(Ask::Promote(reply), answer, what, done).await
    }

    async fn wait(&self, applied: u64, timeout_ms: u64) -> Response {
        let name = &self.section.name;
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
