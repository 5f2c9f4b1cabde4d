//! The delta log: the one structure that is write-ahead log, replication stream, proof leaves and
//! history at once. `docs/LOG_FORMAT.md` has the byte map.
