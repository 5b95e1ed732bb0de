//! The etcd v3 API of the built binary: against the reference, request by request,
//! and with the tools that were made for etcd.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]
#![expect(unreachable_pub, reason = "shared between tests, not an interface")]

mod contend;
mod contending;
mod differences;
mod differential;
mod etcdctl;
mod fuzz;
mod generate;
mod names;
mod python;
mod reference;
mod side;
mod step;
mod watching;

#[allow(dead_code, reason = "shared with the other tests of the binary")]
#[path = "../binary/support.rs"]
mod support;

use std::time::{Duration, Instant};

/// Tries until there is something, for what takes a millisecond; none after a while
/// in which it would have come.
async fn soon<T, F: Future<Output = Option<T>>>(mut attempt: impl FnMut() -> F) -> Option<T> {
    let until = Instant::now() + support::PATIENCE / 10;
    loop {
        let found = attempt().await;
        if found.is_some() || Instant::now() > until {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
