//! Failing closed (P5): after a failed write or flush nothing more is written to a volume.

use super::event::{Action, Actions, Disk, Failure, IoToken, TreeWork};
use super::volume::Volume;

/// Why a volume stopped accepting writes (P5). Reads go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FailedClosed {
    /// The device that failed.
    pub disk: Disk,
    /// What was being done.
    pub doing: &'static str,
    /// The error number of the operating system.
    pub errno: i32,
}

impl Volume {
    /// P5: stop, say why, and never try again.
    pub(super) fn fail(&mut self, token: IoToken, errno: i32, out: &mut Actions) {
        let (disk, doing) = token.place(self.reads_shadow());
        self.failed
            .get_or_insert(FailedClosed { disk, doing, errno });
        self.waiters.fail_all(|id, control| {
            if control {
                let result = Err("the volume has failed closed".to_owned());
                out.push(Action::ControlDone { id, result });
            } else {
                out.complete(id, Err(Failure::Io));
            }
        });
        if self.config.tree {
            out.push(Action::Tree(TreeWork::Halt));
        }
        self.cancel_election("the volume has failed closed", out);
        let transition = self.transition.take().map(|transition| transition.id);
        self.give_up_regroup("the volume has failed closed", out);
        for id in self.drains.drain(..).chain(transition) {
            let result = Err("the volume has failed closed".to_owned());
            out.push(Action::ControlDone { id, result });
        }
    }
}
