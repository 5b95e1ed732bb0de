//! The etcd v3 API of the built binary: against the reference, request by request,
//! and with the tools that were made for etcd.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]
#![expect(unreachable_pub, reason = "shared between tests, not an interface")]

mod contending;
mod differences;
mod differential;
mod generate;
mod names;
mod reference;
mod side;
mod step;
mod watching;

#[allow(dead_code, reason = "shared with the other tests of the binary")]
#[path = "../binary/support.rs"]
mod support;
