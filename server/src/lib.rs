//! The Conclave server: gRPC in, replies out.
//!
//! In reading order:
//!
//! - [`options`] with `retention`: what a server is told, and who is in its
//!   cluster;
//! - [`server`]: how it is put together, and taken apart;
//! - [`storage`], [`inspect`], [`net`], [`shutdown`]: the data directory, a look at
//!   it, sockets, signals;
//! - `routes`: everything that is served on the client addresses, which is
//!   `session`, `lock`, `election` and `cluster` (the native API), `channel` (the same,
//!   many calls on one stream), `etcd` (the etcd v3 API) and `http` (health, metrics);
//!   over them `deadline`, which ends what a client gave a time for;
//! - `gateway`: the way from all of these to the replica, and `mailbox`: the way
//!   back;
//! - `validate`, `convert`, `status`: requests are checked, answers converted,
//!   and errors mapped to the wire, each in one place;
//! - `events`: streams that follow sessions; `readers`: streams that watch keys;
//!   `observe`: streams that observe elections;
//! - `turns`: the thread of the node, with `saver`, the one that writes its log while it
//!   goes on, and `peers`, the links between members;
//! - `metrics`: what is counted.
//!
//! Nothing here decides who holds what, and nothing here keeps state that
//! matters: that is the replica's, behind a [`Handle`]. No service builds a gRPC
//! status of its own.
//!
//! [`Handle`]: conclave_core::node::Handle

mod channel;
mod cluster;
mod convert;
mod deadline;
mod election;
mod etcd;
mod events;
mod gateway;
mod http;
pub mod inspect;
mod lock;
mod mailbox;
mod metrics;
pub mod net;
mod observe;
pub mod options;
mod peers;
mod readers;
mod retention;
mod routes;
mod saver;
pub mod server;
mod session;
pub mod shutdown;
mod status;
pub mod storage;
mod turns;
mod validate;

pub use options::{ClusterState, Options};
pub use server::{Server, ServerError, run};
pub use shutdown::{Shutdown, Stopper};
