//! A session that goes on after a restart of its program: attached to with its
//! credentials, with what it held and what it still waits for.

use std::{future::IntoFuture, pin::Pin, time::Duration};

use conclave_proto::v1::{
    self, AttachSessionRequest, AttachSessionResponse, Place, RenewSessionRequest,
    session_client::SessionClient,
};

use tokio::time::Instant;

use crate::{
    client::{Client, PATIENCE, incomplete},
    clock,
    contention::{Contended, Held, Pending},
    credentials::{Credentials, nonce},
    election::Leadership,
    error::Error,
    lock::LockGuard,
    requests::{Granted, Requests},
    session::Session,
    session_state::SessionState,
    transport::ATTEMPT_TIMEOUT,
};

/// A session that goes on; see [`Client::resume`].
#[derive(Debug)]
#[must_use = "dropped, everything is given up"]
pub struct Resumed {
    /// The session.
    pub session: Session,
    /// The locks that it held when this program attached: of a grant that several acquires
    /// share, one for each of them.
    pub guards: Vec<LockGuard>,
    /// The elections in which it led then.
    pub leaderships: Vec<Leadership>,
    /// The locks that it still waits for, of what was to be kept.
    pub waiting: Vec<Waiting>,
    /// The elections in which it is still a candidate, of what was to be kept.
    pub campaigns: Vec<Candidacy>,
}

/// A place in the queue of a lock that an earlier start of this program took; await
/// it to hold the lock. Dropped before, it is given up.
#[derive(Debug)]
#[must_use = "dropped, its place is given up"]
pub struct Waiting {
    session: Session,
    pending: Pending,
}

impl Waiting {
    /// The name of the lock.
    pub fn name(&self) -> &str {
        &self.pending.contended().name
    }

    /// The owner inside the session; mostly empty.
    pub fn owner(&self) -> &str {
        &self.pending.contended().owner
    }
}

impl IntoFuture for Waiting {
    type Output = Result<LockGuard, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async {
            let granted = self
                .pending
                .granted_within(self.session, None, Instant::now());
            granted.await.map(LockGuard)
        })
    }
}

/// A candidate that an earlier start of this program made; await it to lead. Dropped
/// before, it is withdrawn.
#[derive(Debug)]
#[must_use = "dropped, it is withdrawn"]
pub struct Candidacy {
    session: Session,
    pending: Pending,
}

impl Candidacy {
    /// The name of the election.
    pub fn name(&self) -> &str {
        &self.pending.contended().name
    }

    /// The owner inside the session; mostly empty.
    pub fn owner(&self) -> &str {
        &self.pending.contended().owner
    }
}

impl IntoFuture for Candidacy {
    type Output = Result<Leadership, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async {
            let granted = self
                .pending
                .granted_within(self.session, None, Instant::now());
            granted.await.map(Leadership::new)
        })
    }
}

/// Attaches, after asking how the session stands; then it must be renewed once before
/// anything is certain.
pub(crate) async fn resume(
    client: &Client,
    credentials: &Credentials,
    mut keep: impl FnMut(&str, &str) -> bool,
) -> Result<Resumed, Error> {
    let ask = AttachSessionRequest {
        session_id: credentials.session_id,
        secret: credentials.secret.to_bytes(),
        ..AttachSessionRequest::default()
    };
    let present = attach(client, ask.clone()).await?;
    let wanted = present.places.iter().filter(|place| {
        let contends = place.contends.as_ref();
        place.request != 0 && contends.is_some_and(|grant| keep(&grant.lock, &grant.owner))
    });
    let wanted: Vec<u64> = wanted.map(|place| place.request).collect();
    let attached = attach(
        client,
        AttachSessionRequest {
            replaces: present.attachment,
            nonce: nonce(),
            wanted: wanted.clone(),
            ..ask
        },
    )
    .await?;
    let state = confirm(client, credentials, &attached).await?;
    let mut requests = Requests::attached(attached.attachment, attached.last_request);
    wanted.iter().for_each(|request| requests.resume(*request));
    let ttl = Duration::from_millis(attached.ttl_ms);
    let session = Session::start(client, credentials.clone(), ttl, state, requests);
    Ok(take_up(session, attached, wanted))
}

async fn attach(
    client: &Client,
    request: AttachSessionRequest,
) -> Result<AttachSessionResponse, Error> {
    let call = |channel| {
        let request = request.clone();
        async move { SessionClient::new(channel).attach(request).await }
    };
    client
        .transport
        .repeat(PATIENCE, ATTEMPT_TIMEOUT, call)
        .await
}

/// Renews for the new attachment, so that it is known until when the session lives.
async fn confirm(
    client: &Client,
    credentials: &Credentials,
    attached: &AttachSessionResponse,
) -> Result<SessionState, Error> {
    let request = RenewSessionRequest {
        session_id: credentials.session_id,
        attachment: attached.attachment,
    };
    let mut sent = 0;
    let attempt = || {
        sent = clock::now();
        request
    };
    let renewed = client.transport.repeat_call(PATIENCE, attempt).await?;
    if renewed.ttl_ms == 0 {
        return Err(incomplete("ttl_ms"));
    }
    let ttl = renewed.ttl_ms.saturating_mul(1_000);
    Ok(SessionState::opened(sent, ttl))
}

/// Guards for what is held, and requests for what is waited for. One that was wanted
/// and has no place any more is decided, so it is asked for its answer, too.
fn take_up(session: Session, attached: AttachSessionResponse, mut wanted: Vec<u64>) -> Resumed {
    let revision = attached.header.map_or(u64::MAX, |header| header.revision);
    let mut resumed = Resumed {
        session,
        guards: Vec::new(),
        leaderships: Vec::new(),
        waiting: Vec::new(),
        campaigns: Vec::new(),
    };
    for grant in attached.grants {
        let v1::Grant {
            lock,
            owner,
            key,
            token,
            entries,
            candidate,
        } = grant;
        let granted = Granted {
            key,
            token,
            revision,
        };
        let contended = Contended::new(lock, owner);
        for entry in entries {
            let session = resumed.session.clone();
            let granted = granted.clone();
            if candidate {
                let held = Held::adopted(session, contended.clone(), granted, None);
                resumed.leaderships.push(Leadership::new(held));
            } else {
                let held = Held::adopted(session, contended.clone(), granted, Some(entry));
                resumed.guards.push(LockGuard(held));
            }
        }
    }
    for Place { contends, request } in attached.places {
        let Some(grant) = contends.filter(|_| wanted.contains(&request)) else {
            continue;
        };
        wanted.retain(|other| *other != request);
        let session = resumed.session.clone();
        let contended = Contended::new(grant.lock, grant.owner);
        let pending = Pending::resumed(session.core(), contended, grant.candidate, request);
        match grant.candidate {
            true => resumed.campaigns.push(Candidacy { session, pending }),
            false => resumed.waiting.push(Waiting { session, pending }),
        }
    }
    for decided in wanted {
        resumed.session.core().end_request(decided);
    }
    resumed
}
