//! What etcd's services for locks and elections have in common: a lease that the client
//! gives or the server grants, and a place in a queue that goes when the call does.

use std::sync::Arc;

use bytes::Bytes;
use conclave_core::{
    ids::{Attachment, Revision, SessionId},
    replica::AnswerBody,
    session::EndReason,
};
use conclave_primitives::{Rejection, Reply, name};
use conclave_proto::{
    etcd::etcdserverpb::ResponseHeader,
    internal::{
        self, CloseSession, OpenSession, Txn, command::Body, compare::Target,
        operation::Operation as Kind, primitive_command::Command,
    },
};

use super::{Etcd, status::Error};
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
    command: impl FnOnce(i64, u64) -> Command,
) -> Result<Granted, Error> {
    let mut lease = lease_of(etcd, lease).await?;
    let id = lease.id;
    let contender = (name, id, String::new());
    let waits = run_unnumbered(&etcd.0, contender, |tag| command(id, tag));
    let (outcome, was_alive) = match lease.is_ours {
        true => (waits.await, true),
        false => renewed_once(etcd, id, waits).await,
    };
    let (header, reply) = outcome.map_err(|refusal| place_lost(refusal, was_alive))?;
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
async fn renewed_once<T>(etcd: &Etcd, id: i64, call: impl Future<Output = T>) -> (T, bool) {
    let of = Attachment::present(SessionId(id));
    let (outcome, renewed) = tokio::join!(call, etcd.renew(of));
    let is_gone = match renewed {
        Ok(_) => false,
        Err(refusal) => {
            tracing::debug!(%refusal, "a lease was not renewed by a call that came with it");
            matches!(refusal, Refusal::SessionEnded(_))
        }
    };
    (outcome, !is_gone)
}

async fn lease_of(etcd: &Etcd, id: i64) -> Result<Lease, Error> {
    let gateway = Arc::clone(&etcd.0);
    if id != 0 {
        let is_ours = false;
        return Ok(Lease {
            gateway,
            id,
            is_ours,
        });
    }
    let open = OpenSession {
        ttl_ms: LEASE_TTL_MS,
        ..OpenSession::default()
    };
    let answer = etcd.command(Body::OpenSession(open)).await?;
    let AnswerBody::SessionOpened { session, .. } = answer.body else {
        return Err(ANOTHER_KIND);
    };
    Ok(Lease {
        gateway,
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
    let txn = Body::Txn(Txn {
        compares,
        success: vec![operation],
        ..Txn::default()
    });
    let answer = match gives_back {
        true => etcd.ending(txn).await?,
        false => etcd.command(txn).await?,
    };
    let AnswerBody::Txn(ran) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let reply = ran.map_err(Error::from)?;
    Ok((etcd.header(answer.revision, answer.term), reply.succeeded))
}

/// What a call is told that was refused, or whose place is gone. For that, etcd knows
/// only one reason, but it tells a lease that was not there at all.
fn place_lost(refusal: Refusal, was_alive: bool) -> Error {
    let Refusal::Rejected(rejection) = refusal else {
        return refusal.into();
    };
    match rejection {
        Rejection::SessionEnded(end) if end == EndReason::Unknown || !was_alive => {
            Error::Refused(Refusal::SessionEnded(end))
        }
        Rejection::SessionEnded(_) | Rejection::PlaceLost(_) | Rejection::Cancelled => {
            Error::SessionExpired
        }
        Rejection::AlreadyContending { .. } => Error::OtherContender,
        rejection => Error::Refused(Refusal::Rejected(rejection)),
    }
}
