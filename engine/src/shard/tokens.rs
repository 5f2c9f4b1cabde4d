//! Names of the ring's operations: what they are of in the highest byte, for whom in the rest.

/// Mask of the kind.
pub(super) const KIND: u64 = 0xFF << 56;
/// An operation on a disk.
pub(super) const DISK: u64 = 1 << 56;
/// Accepting connections.
pub(super) const ACCEPT: u64 = 2 << 56;
/// Operations of clients.
pub(super) const TOKENS: Tokens = Tokens {
    receive: 3 << 56,
    send: 4 << 56,
    close: 5 << 56,
};

/// Makes the tokens of a client's operations.
pub(super) struct Tokens {
    pub(super) receive: u64,
    pub(super) send: u64,
    pub(super) close: u64,
}

impl Tokens {
    pub(super) fn receive(&self, index: u32, generation: u32) -> u64 {
        self.receive | pack(index, generation)
    }
    pub(super) fn send(&self, index: u32, generation: u32) -> u64 {
        self.send | pack(index, generation)
    }
    pub(super) fn close(&self, index: u32, generation: u32) -> u64 {
        self.close | pack(index, generation)
    }
}

fn pack(index: u32, generation: u32) -> u64 {
    u64::from(index) | u64::from(generation & 0xFF_FFFF) << 32
}
