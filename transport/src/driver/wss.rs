//! WebSocket: one connection for each volume and pair of nodes, where UDP does not get through.
//!
//! `wss://<node>/v1/volumes/<uuid>/runtime`. Each frame is one binary message; the frame's own
//! flags say to which stream it belongs. What QUIC does by itself is done here: control overtakes
//! data before the socket, and the data that waits for the session is bounded by bytes, so that
//! control behind it is still read.

mod dial;
mod listen;
mod pump;

use hn4::types::VolumeId;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

pub(super) use listen::Wss;

use crate::wire::MAX_FRAME_BYTES;

/// Name of the protocol inside TLS, as WebSocket needs it.
const ALPN: &[u8] = b"http/1.1";
const PATH_PREFIX: &str = "/v1/volumes/";
const PATH_SUFFIX: &str = "/runtime";

fn path(volume: VolumeId) -> String {
    format!("{PATH_PREFIX}{volume}{PATH_SUFFIX}")
}

fn volume_of(path: &str) -> Option<VolumeId> {
    path.strip_prefix(PATH_PREFIX)?
        .strip_suffix(PATH_SUFFIX)?
        .parse()
        .ok()
}

fn web_socket_config() -> WebSocketConfig {
    let largest = MAX_FRAME_BYTES + 4096;
    WebSocketConfig::default()
        .max_message_size(Some(largest))
        .max_frame_size(Some(largest))
        .write_buffer_size(256 << 10)
        .max_write_buffer_size(2 * largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_its_volume_and_other_paths_name_none() {
        let volume = VolumeId([0x5A; 16]);
        assert_eq!(volume_of(&path(volume)), Some(volume));
        for other in [
            "/",
            "/v1/volumes//runtime",
            "/v1/volumes/5a5a/runtime",
            "/v1/volumes/",
        ] {
            assert_eq!(volume_of(other), None, "{other}");
        }
    }
}
