//! What etcd's services for locks and elections have in common: a lease that the client
//! gives or the server grants, and a place in a queue that goes when the call does.

use std::sync::Arc;

use bytes::Bytes;
use conclave_core::{
    ids::{Attachment, Revision, SessionId},
    replica::AnswerBody,
    session::EndReason,
};
use conclave_primitives::{
    Rejection, Reply,
    name::{self, Invalid},
};
use conclave_proto::{
    etcd::etcdserverpb::ResponseHeader,
    internal::{
        self, CloseSession, OpenSession, Txn, command::Body, compare::Target,
        operation::Operation as Kind, primitive_command::Command,
    },
};

use prost::Message as _;
use tokio::sync::oneshot;

use super::{Etcd, is_untaken, patiently, status::Error};
use crate::{gateway::Gateway, lock::run_unnumbered, status::Refusal};

/// The TTL of a lease that is granted for a call without one. Nobody renews it but a
/// client that reads its id off the key.
const LEASE_TTL_MS: u64 = 60_000;

const ANOTHER_KIND: Error = Error::Refused(Refusal::Internal("contention"));

/// A key of a queue that is first now.
pub(super) struct Granted {
    pub(super) header: Option<ResponseHeader>,
    pub(super) key: Bytes,
    pub(super) revision: Revision,
    pub(super) lease: i64,
}

/// The lease of a call.
struct Lease {
    gateway: Arc<Gateway>,
    id: i64,
    /// It was granted for this call, which has not succeeded yet.
    is_ours: bool,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.is_ours {
            return;
        }
        let gateway = Arc::clone(&self.gateway);
        let close = CloseSession {
            session_id: self.id,
            attachment: 0,
        };
        tokio::spawn(async move {
            if let Err(error) = gateway.ending(Body::CloseSession(close)).await {
                tracing::debug!(%error, "the lease of an abandoned call will expire");
            }
        });
    }
}

/// The name of a lock or election, which is text here.
pub(super) fn name_of(name: &Bytes) -> Result<String, Error> {
    let text = str::from_utf8(name).map_err(|_| Error::BadName)?;
    match name::validate_name(text) {
        Ok(()) => Ok(text.to_owned()),
        Err(_) => Err(Error::BadName),
    }
}

/// Puts a key into the queue of a name, unless this lease has one there already, and
/// waits until it is first. Dropped, the call leaves no key of its own.
pub(super) async fn contend(
    etcd: &Etcd,
    name: String,
    lease: i64,
    command: impl Fn(i64, u64) -> Command,
) -> Result<Granted, Error> {
    let mut lease = lease_of(etcd, lease).await?;
    let id = lease.id;
    let waits = patiently(is_untaken, || {
        let contender = (name.clone(), id, String::new());
        run_unnumbered(&etcd.0, contender, |tag| command(id, tag))
    });
    let given = if lease.is_ours { 0 } else { id };
    let (outcome, was_alive) = renewed_once(etcd, given, waits).await;
    let (header, reply) = outcome.map_err(|error| place_lost(error, was_alive))?;
    let Reply::Granted { key, token } = reply else {
        return Err(ANOTHER_KIND);
    };
    lease.is_ours = false;
    Ok(Granted {
        header: header.and_then(|header| etcd.header(header.revision, header.term)),
        key,
        revision: token,
        lease: id,
    })
}

/// As in etcd, a call that is given a lease renews it, whatever comes of the call. With
/// whether the lease was alive then, as far as is known.
pub(super) async fn renewed_once<T>(
    etcd: &Etcd,
    id: i64,
    call: impl Future<Output = T>,
) -> (T, bool) {
    if id == 0 {
        return (call.await, true);
    }
    let of = Attachment::present(SessionId(id));
    let (outcome, renewed) = tokio::join!(call, etcd.renew(of));
    let is_gone = match renewed {
        Ok(_) => false,
        Err(error) => {
            tracing::debug!(
                ?error,
                "a lease was not renewed by a call that came with it"
            );
            matches!(error, Error::Refused(Refusal::SessionEnded(_)))
        }
    };
    (outcome, !is_gone)
}

async fn lease_of(etcd: &Etcd, id: i64) -> Result<Lease, Error> {
    if id == 0 {
        // Goes on if the call is dropped, and then gives back what it gets.
        let (sender, granted) = oneshot::channel();
        let etcd = etcd.clone();
        tokio::spawn(async move { sender.send(grant(&etcd).await) });
        return granted.await.unwrap_or(Err(Error::Stopped));
    }
    Ok(Lease {
        gateway: Arc::clone(&etcd.0),
        id,
        is_ours: false,
    })
}

async fn grant(etcd: &Etcd) -> Result<Lease, Error> {
    let open = OpenSession {
        ttl_ms: LEASE_TTL_MS,
        ..OpenSession::default()
    };
    let answer = etcd.command(Body::OpenSession(open)).await?;
    let AnswerBody::SessionOpened { session, .. } = answer.body else {
        return Err(ANOTHER_KIND);
    };
    Ok(Lease {
        gateway: Arc::clone(&etcd.0),
        id: session.0,
        is_ours: true,
    })
}

/// Runs an operation if this revision made the key; whether it did. With the header of
/// the answer.
pub(super) async fn if_made_at(
    etcd: &Etcd,
    key: Bytes,
    revision: i64,
    then: Kind,
) -> Result<(Option<ResponseHeader>, bool), Error> {
    let compare = internal::Compare {
        key,
        target: Some(Target::CreateRevision(revision)),
        ..internal::Compare::default()
    };
    run(etcd, vec![compare], then).await
}

/// Runs an operation if all compares hold.
pub(super) async fn run(
    etcd: &Etcd,
    compares: Vec<internal::Compare>,
    then: Kind,
) -> Result<(Option<ResponseHeader>, bool), Error> {
    let gives_back = matches!(then, Kind::DeleteRange(_));
    let operation = internal::Operation {
        operation: Some(then),
    };
    let txn = Txn {
        compares,
        success: vec![operation],
        ..Txn::default()
    };
    etcd.check_size(txn.encoded_len())?;
    let answer = match gives_back {
        true => etcd.ending(Body::Txn(txn)).await?,
        false => etcd.command(Body::Txn(txn)).await?,
    };
    let AnswerBody::Txn(ran) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let reply = ran.map_err(Error::from)?;
    Ok((etcd.header(answer.revision, answer.term), reply.succeeded))
}

/// What a call is told that was refused, or whose place is gone. For that, etcd knows
/// only one reason, but it tells a lease that was not there at all.
fn place_lost(error: Error, was_alive: bool) -> Error {
    let Error::Refused(Refusal::Rejected(rejection)) = error else {
        return error;
    };
    match rejection {
        Rejection::SessionEnded(end) if end == EndReason::Unknown || !was_alive => {
            Error::Refused(Refusal::SessionEnded(end))
        }
        Rejection::SessionEnded(_) | Rejection::PlaceLost(_) | Rejection::Cancelled => {
            Error::SessionExpired
        }
        Rejection::AlreadyContending { .. } => Error::OtherContender,
        Rejection::Invalid(Invalid::ValueOfLock) => Error::ValueOfLock,
        rejection => Error::Refused(Refusal::Rejected(rejection)),
    }
}
