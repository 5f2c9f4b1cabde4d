//! Real nodes in one process, over real sockets on loopback. What concerns sessions is tested over
//! each transport.

/// Makes a test for each transport of each named function.
macro_rules! over_each_transport {
    ($($test:ident),+ $(,)?) => {
        mod quic {
            $(#[tokio::test]
            async fn $test() {
                super::$test(hn4_transport::driver::TransportKind::Quic).await;
            })+
        }
        mod wss {
            $(#[tokio::test]
            async fn $test() {
                super::$test(hn4_transport::driver::TransportKind::Wss).await;
            })+
        }
    };
}

mod common;
mod exchange;
mod faults;
mod proxy;
mod strangers;
