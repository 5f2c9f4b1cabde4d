//! Replacing the keys that a node signs with, while it runs.
//!
//! The next key is drawn, every volume's prover brings it into its ledger and ends the right of the
//! old one there, and when all ledgers say so, the files change places. What is killed in between
//! goes on here at the next start.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hn4_proof::sign::{Algorithm, KeyId};
use tokio::sync::Mutex;

use crate::config::keys;
use crate::config::state::StateError;
use crate::control::api::Response;
use crate::daemon::requests::{Volume, error};
use crate::daemon::volume::Ask;

/// How often it is looked whether the ledgers have the new keys.
const LOOK: Duration = Duration::from_millis(100);
/// Who asks for a rotation is answered after this time at the latest.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Clone)]
pub(in crate::daemon) struct Rotation {
    state_dir: PathBuf,
    /// Held by the one task that changes key files.
    hand: Arc<Mutex<()>>,
}

impl Rotation {
    pub(in crate::daemon) fn new(state_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            hand: Arc::default(),
        }
    }

    /// Replaces the keys of these algorithms, or of all that are in use.
    pub(in crate::daemon) async fn rotate(
        self,
        algorithms: &[String],
        volumes: Vec<Volume>,
    ) -> Response {
        let what = "replace this node's keys".to_owned();
        let begun = match self.begin(algorithms, &volumes).await {
            Ok(begun) => begun,
            Err(why) => {
                let next = "see `hn4ctl keys show` for the keys that there are";
                return error(what, why, next);
            }
        };
        self.clone().go_on(volumes.clone());
        let deadline = Instant::now() + PATIENCE;
        loop {
            match keys::rotating(&self.state_dir) {
                Ok(left) if left.is_empty() => {
                    let message = format!("replaced, and recorded in all ledgers: {begun}");
                    return Response::Done { message };
                }
                Ok(_) if Instant::now() < deadline => tokio::time::sleep(LOOK).await,
                Ok(left) => {
                    let waits = self.lacking(&left, &volumes).await.join(", ");
                    let why = format!(
                        "the new keys are not in the ledger of {waits} yet; the old ones are kept \
                         until they are"
                    );
                    let next = "nothing: it is done when a replica has reached its primary, also \
                                after a restart; `hn4ctl keys show` tells";
                    return error(what, why, next);
                }
                Err(why) => return error(what, why.to_string(), "see to the state directory"),
            }
        }
    }

    /// Draws the next keys and hands them out.
    async fn begin(&self, algorithms: &[String], volumes: &[Volume]) -> Result<String, String> {
        let parse = |name: &String| {
            let known = name.parse::<Algorithm>();
            known.map_err(|_| format!("`{name}` is no algorithm"))
        };
        let mut wanted = algorithms
            .iter()
            .map(parse)
            .collect::<Result<Vec<_>, _>>()?;
        let in_use = |algorithm: Algorithm| {
            let sections = volumes.iter().map(Volume::section);
            let mut proving = sections.filter(|section| section.proof);
            proving.any(|section| {
                algorithm == Algorithm::Ed25519 || section.algorithms().contains(&algorithm)
            })
        };
        if let Some(idle) = wanted.iter().find(|it| !in_use(**it)) {
            return Err(format!("no volume of this node signs with {idle}"));
        }
        if wanted.is_empty() {
            wanted.extend(Algorithm::ALL.into_iter().filter(|it| in_use(*it)));
        }
        let _hand = self.hand.lock().await;
        for algorithm in &wanted {
            let begun = keys::begin_rotation(&self.state_dir, *algorithm);
            begun.map_err(|error| error.to_string())?;
        }
        let handed = self.hand_out(volumes).await;
        handed.map_err(|error| error.to_string())?;
        let names: Vec<String> = wanted.iter().map(Algorithm::to_string).collect();
        Ok(names.join(", "))
    }

    async fn hand_out(&self, volumes: &[Volume]) -> Result<(), StateError> {
        for volume in volumes {
            let wanted = volume.section().algorithms();
            let keys = keys::node_keys(&self.state_dir, &wanted)?;
            // Fails if the volume has ended.
            let _ = volume.asks.send(Ask::Keys(Box::new(keys))).await;
        }
        Ok(())
    }

    /// Waits in a task of its own until all ledgers have the next keys, and lets them take the
    /// places of the old ones.
    pub(in crate::daemon) fn go_on(self, volumes: Vec<Volume>) {
        tokio::spawn(async move {
            let result = self.finish(&volumes).await;
            if let Err(error) = result {
                tracing::error!("a key cannot be replaced: {error}");
            }
        });
    }

    async fn finish(&self, volumes: &[Volume]) -> Result<(), StateError> {
        loop {
            let hand = self.hand.lock().await;
            let next = keys::rotating(&self.state_dir)?;
            if next.is_empty() {
                return Ok(());
            }
            if self.lacking(&next, volumes).await.is_empty() {
                for (algorithm, id) in next {
                    keys::finish_rotation(&self.state_dir, algorithm)?;
                    tracing::info!(%algorithm, key = %id, "a new key signs from now on");
                }
                return self.hand_out(volumes).await;
            }
            drop(hand);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Volumes whose ledgers do not hold these keys.
    async fn lacking(&self, next: &[(Algorithm, KeyId)], volumes: &[Volume]) -> Vec<String> {
        let mut lacking = Vec::new();
        for volume in volumes {
            let section = volume.section();
            if !section.proof {
                continue;
            }
            let report = volume.report().await;
            let status = report.and_then(|report| Some(report.proof?.status));
            let active = status.map_or_else(Vec::new, |status| status.active_keys);
            let wanted = section.algorithms();
            let mut own = next
                .iter()
                .filter(|(it, _)| *it == Algorithm::Ed25519 || wanted.contains(it));
            if !own.all(|(_, id)| active.contains(id)) {
                lacking.push(volume.name.clone());
            }
        }
        lacking
    }
}
