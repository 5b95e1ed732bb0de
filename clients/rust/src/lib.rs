//! The Rust client of Conclave: sessions that renew themselves, locks and elections with
//! fencing tokens.
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
//! - `grants`, `events`: what is held, and how news of its loss arrives;
//! - `transport`, `routes`: connections to several servers, and which to use;
//! - `calls`: many calls to one server on one stream;
//! - `error`: [`Error`].
//!
//! Invariants: a session is given up before the cluster can end it, and never
//! comes back to life; every numbered request is repeated until its outcome is
//! known or the session is over; nothing that is dropped stays behind.
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
mod lock;
mod observe;
pub mod requests;
mod resume;
mod routes;
mod session;
pub mod session_state;
mod transport;

pub use client::{Client, ServerStatus};
pub use conclave_proto::v1::{
    Contender, ElectionInfo, Leader, LockInfo, Member, SessionInfo, StatusResponse,
};
pub use credentials::Credentials;
pub use election::{Campaign, Leadership, stand_by};
pub use error::Error;
pub use lock::{LockGuard, LockRequest};
pub use observe::{Observed, Observer};
pub use resume::{Candidacy, Resumed, Waiting};
pub use session::{Session, SessionOptions};
pub use session_state::{LossReason, Status};
