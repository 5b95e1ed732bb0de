//! The Rust client of Conclave: sessions that renew themselves, locks and elections with
//! fencing tokens, keys and values with watches that resume by themselves, and leases.
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), conclave_client::Error> {
//! use conclave_client::{Client, SessionOptions};
//!
//! let client = Client::connect(["127.0.0.1:2379"])?;
//! let session = client.session(SessionOptions::default()).await?;
//! let guard = session.lock("deploy").await?;
//! tokio::select! {
//!     reason = guard.lost() => eprintln!("stop, the lock is lost: {reason}"),
//!     () = work(guard.token()) => guard.release().await?,
//! }
//! # Ok(()) }
//! # async fn work(_token: u64) {}
//! ```
//!
//! Keys, watches and leases are those of the etcd v3 API, so that they are shared with
//! all that speaks it; this part of the client works with etcd itself, too.
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), conclave_client::Error> {
//! use std::time::Duration;
//!
//! use conclave_client::{Client, KeyRange, Put, Watch};
//!
//! let client = Client::connect(["127.0.0.1:2379"])?;
//! // Bound to a lease, the key goes when this program does.
//! let lease = client.lease(Duration::from_secs(10)).await?;
//! client.kv().put(Put::new("here/me", "10.0.0.7").lease(lease.id())).await?;
//! let mut watching = client.watch(Watch::new(KeyRange::prefix("here/"))).await?;
//! tokio::select! {
//!     reason = lease.lost() => eprintln!("nobody sees me any more: {reason}"),
//!     events = watching.next() => println!("others come and go: {:?}", events?),
//! }
//! # Ok(()) }
//! ```
//!
//! In reading order:
//!
//! - `client`: [`Client`], the calls without a session;
//! - `session`: [`Session`], kept alive in the background;
//! - `lock`: [`LockRequest`] and [`LockGuard`]; `election`: [`Campaign`],
//!   [`Leadership`] and [`stand_by`]; `contention`: what they have in common;
//! - `observe`: [`Observer`], who leads;
//! - `credentials`, `resume`: [`Resumed`], a session after a restart of its program;
//! - [`session_state`] and [`requests`]: the decisions behind those two, without
//!   clock or I/O, so that a simulator runs the very same code;
//! - `keys`, `kv`: [`Kv`], with what it reads and writes;
//! - `watch`: [`Watching`], over [`watch_state`], which says from where to go on;
//! - `lease`: [`Lease`], kept alive in the background as a session is, and [`Leases`];
//! - `grants`, `events`: what is held, and how news of its loss arrives;
//! - `transport`, `routes`: connections to several servers, and which to use;
//! - `calls`: many calls to one server on one stream;
//! - `error`: [`Error`].
//!
//! Invariants: a session, or a lease, is given up before the cluster can end it, and never
//! comes back to life; every numbered request is repeated until its outcome is
//! known or the session is over; a write without a number is
//! sent again only if it certainly was not done; nothing that is dropped stays behind.
//!
//! A lock alone does not protect data from a holder that was paused and does
//! not know yet that it lost: the token does, if whatever the lock protects
//! refuses tokens lower than the highest it has seen.

mod calls;
mod client;
mod clock;
mod contention;
mod credentials;
mod election;
mod error;
mod events;
mod grants;
mod keys;
mod kv;
mod lease;
mod lock;
mod observe;
pub mod requests;
mod resume;
mod routes;
mod session;
pub mod session_state;
mod transport;
mod watch;
pub mod watch_state;

pub use bytes::Bytes;
pub use client::{Client, ServerStatus};
pub use conclave_proto::v1::{
    Contender, ElectionInfo, Leader, LockInfo, Member, SessionInfo, StatusResponse,
};
pub use credentials::Credentials;
pub use election::{Campaign, Leadership, stand_by};
pub use error::Error;
pub use keys::{Event, EventKind, KeyRange, KeyValue};
pub use kv::{
    Compare, Compared, ComparedValue, Delete, Deleted, Found, Get, Kv, Op, OpResult, Put, SortBy,
    Txn, TxnDone, Written,
};
pub use lease::{Lease, LeaseInfo, Leases};
pub use lock::{LockGuard, LockRequest};
pub use observe::{Observed, Observer};
pub use resume::{Candidacy, Resumed, Waiting};
pub use session::{Session, SessionOptions};
pub use session_state::{LossReason, Status};
pub use watch::{Watch, Watching};
