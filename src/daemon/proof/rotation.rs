//! Replacing the keys that a node signs with, while it runs.
//!
//! The next key is drawn, every volume's prover brings it into its ledger and ends the right of the
//! old one there, and when all ledgers say so, the files change places. What fails in between, for
//! lack of room most likely, is tried again; what is killed goes on here at the next start.

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
/// After a failure, which is logged each time, it is tried again so often.
const PAUSE: Duration = Duration::from_secs(10);
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
                    let (why, next) = unfinished(&self.lacking(&left, &volumes).await);
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
        tokio::spawn(self.finish(volumes, PAUSE));
    }

    async fn finish(self, volumes: Vec<Volume>, pause: Duration) {
        // Key files may have changed places, of which the volumes have not heard.
        let mut changed = false;
        while let Err(error) = self.try_finish(&volumes, &mut changed).await {
            tracing::error!("a key cannot be replaced yet, it is tried again: {error}");
            tokio::time::sleep(pause).await;
        }
    }

    async fn try_finish(&self, volumes: &[Volume], changed: &mut bool) -> Result<(), StateError> {
        loop {
            let hand = self.hand.lock().await;
            let next = keys::rotating(&self.state_dir)?;
            if next.is_empty() && !*changed {
                return Ok(());
            }
            if self.lacking(&next, volumes).await.is_empty() {
                for (algorithm, id) in next {
                    *changed = true;
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

/// Why a rotation is not at its end, and what to do, if these volumes' ledgers lack the new keys.
fn unfinished(lacking: &[String]) -> (String, &'static str) {
    if lacking.is_empty() {
        let why = "all ledgers hold the new keys, but the key files have not changed places yet";
        let next = "see the daemon's log for what hinders it, and to the state directory; it is \
                    tried again every 10 s, also after a restart; `hn4ctl keys show` tells";
        return (why.to_owned(), next);
    }
    let why = format!(
        "the new keys are not in the ledger of {} yet; the old ones are kept until they are",
        lacking.join(", ")
    );
    let next = "nothing: it is done when a replica has reached its primary, also after a restart; \
                `hn4ctl keys show` tells";
    (why, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_rotation_goes_on_by_itself_after_a_failure() {
        let root = tempfile::tempdir().expect("a directory");
        let state = root.path();
        let old = keys::node_key_or_new(state, Algorithm::Ed25519).expect("a key");
        keys::begin_rotation(state, Algorithm::Ed25519).expect("begun");
        // The old key cannot be kept for verifiers.
        std::fs::create_dir(keys::retired_path(state)).expect("in the way");
        let rotation = Rotation::new(state);
        let mut changed = false;
        let failed = rotation.try_finish(&[], &mut changed).await;
        assert!(failed.is_err(), "{failed:?}");
        let finishing = tokio::spawn(rotation.finish(Vec::new(), Duration::from_millis(1)));
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!finishing.is_finished(), "it does not give up");
        std::fs::remove_dir(keys::retired_path(state)).expect("room again");
        let finished = tokio::time::timeout(LIMIT, finishing).await;
        finished.expect("in time").expect("no panic");
        let new = keys::node_key(state, Algorithm::Ed25519).expect("readable");
        assert_ne!(new.expect("a key").public(), old.public());
        let retired = keys::public_keys(&keys::retired_path(state)).expect("kept");
        assert_eq!(&retired[..], std::slice::from_ref(old.public()));
    }

    #[test]
    fn who_waits_for_a_rotation_is_told_what_it_waits_for() {
        let both = ["one".to_owned(), "two".to_owned()];
        let (why, _) = unfinished(&both);
        assert!(why.contains("not in the ledger of one, two yet"), "{why}");
        let (why, next) = unfinished(&[]);
        assert!(!why.contains("ledger of"), "{why}");
        assert!(next.contains("the daemon's log"), "{next}");
    }
}
