//! Where the dictionary of a volume lies, for all sessions that share the volume, and where it is
//! trained: on a thread of its own, so that no session waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hn4_proof::scxq2::train::Samples;
use hn4_proof::scxq2::{Dictionary, Scxq2Error, Shipment};
use tokio::sync::watch;

/// See the module. Each session's task has one; clones lie side by side.
#[derive(Clone)]
pub(crate) struct Shelf {
    newest: watch::Receiver<Option<Arc<Shipment>>>,
    inner: Arc<Inner>,
}

struct Inner {
    newest: watch::Sender<Option<Arc<Shipment>>>,
    is_training: AtomicBool,
}

impl Default for Shelf {
    fn default() -> Self {
        let (sender, newest) = watch::channel(None);
        Self {
            newest,
            inner: Arc::new(Inner {
                newest: sender,
                is_training: AtomicBool::new(false),
            }),
        }
    }
}

impl Shelf {
    /// The volume's newest dictionary, if there is one yet.
    pub(crate) fn newest(&mut self) -> Option<Arc<Shipment>> {
        self.newest.borrow_and_update().clone()
    }

    /// Waits for the next one.
    pub(crate) async fn changed(&mut self) -> Arc<Shipment> {
        loop {
            // The sender lies beside the receiver, so there always is one.
            let _ = self.newest.changed().await;
            if let Some(shipment) = self.newest() {
                return shipment;
            }
        }
    }

    /// Trains a dictionary and lays it on the shelf. Samples that come while one is being trained
    /// are dropped: another session of the volume was first.
    pub(crate) fn train(&self, samples: Samples) {
        if self.inner.is_training.swap(true, Ordering::AcqRel) {
            return;
        }
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || {
            let before = inner.newest.borrow().clone();
            let before = before.as_ref().map(|shipment| shipment.dictionary());
            match make(&samples, before) {
                Ok(shipment) => {
                    let (id, bytes) = (shipment.dictionary().id(), shipment.for_peer(None).len());
                    tracing::debug!(%id, bytes, "a dictionary was trained");
                    inner.newest.send_replace(Some(Arc::new(shipment)));
                }
                // Samples that are too few or too alike need none.
                Err(error) => tracing::debug!(%error, "no dictionary"),
            }
            inner.is_training.store(false, Ordering::Release);
        });
    }
}

fn make(samples: &Samples, before: Option<&Dictionary>) -> Result<Shipment, Scxq2Error> {
    Shipment::new(samples.train()?, before)
}
